// Sums and gathers between processes.
#include <pybind11/stl.h>

#include "bindings.h"
#include "rank_group.h"

namespace fd {
namespace {

float* floats(const TensorView& view) { return view.check_contiguous("x").as<float>("x"); }

int all_reduce(RankGroup& group, const TensorView& x, double seconds) {
  return static_cast<int>(group.all_reduce(floats(x), x.size(), seconds));
}

int all_gather(RankGroup& group, const TensorView& x, const std::vector<int64_t>& widths,
               const TensorView& out, double seconds) {
  x.check_rank("x", 2);
  out.check_rank("out", 2).check_extent("out", 0, x.shape[0]);
  return static_cast<int>(group.all_gather(floats(x), x.shape[0], widths, floats(out), seconds));
}

}  // namespace

void bind_ranks(py::module_& m) {
  py::class_<RankGroup>(m, "RankGroup", "See custom_ops/include/rank_group.h.")
      .def(py::init([](uintptr_t memory, int rank, int ranks, int64_t floats) {
             return RankGroup(reinterpret_cast<void*>(memory), rank, ranks, floats);
           }),
           py::arg("memory"), py::arg("rank"), py::arg("ranks"), py::arg("floats"))
      .def_static("bytes", &RankGroup::bytes, py::arg("ranks"), py::arg("floats"))
      .def("all_reduce", &all_reduce, py::arg("x"), py::arg("seconds"), no_gil())
      .def("all_gather", &all_gather, py::arg("x"), py::arg("widths"), py::arg("out"),
           py::arg("seconds"), no_gil())
      .def(
          "agree",
          [](RankGroup& group, bool sound, double seconds) {
            return static_cast<int>(group.agree(sound, seconds));
          },
          py::arg("sound"), py::arg("seconds"), no_gil())
      .def("advance", &RankGroup::advance)
      .def("fail", &RankGroup::fail)
      .def("lose", &RankGroup::lose)
      .def("is_lost", &RankGroup::is_lost)
      .def("is_failing", &RankGroup::is_failing)
      .def("arrivals", &RankGroup::arrivals);
}

}  // namespace fd
