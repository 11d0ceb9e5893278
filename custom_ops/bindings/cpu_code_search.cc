// The search of the CCQ encoder.
#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "../cpu/code_search.h"
#include "bindings.h"

namespace fd {
namespace {

using OptionalView = std::optional<TensorView>;

const float* optional_floats(const char* name, const OptionalView& view, int64_t rows,
                             int64_t width) {
  if (!view) return nullptr;
  view->check_rank(name, 2).check_extent(name, 0, rows).check_extent(name, 1, width);
  return view->check_contiguous(name).as<float>(name);
}

template <typename T>
T* vector(const char* name, const TensorView& view, int64_t size) {
  return view.check_rank(name, 1).check_extent(name, 0, size).as<T>(name);
}

template <typename T>
T* matrix(const char* name, const TensorView& view, int64_t rows, int64_t width) {
  view.check_rank(name, 2).check_extent(name, 0, rows).check_extent(name, 1, width);
  return view.check_contiguous(name).as<T>(name);
}

void code_search(const TensorView& target, const TensorView& weight, const OptionalView& before,
                 const TensorView& metric, const OptionalView& feedback, const TensorView& books,
                 const TensorView& code, const TensorView& scales, const TensorView& error,
                 const TensorView& packed, const TensorView& choice, const TensorView& loss) {
  cpu::CodeSearch s;
  metric.check_rank("metric", 3).check_extent("metric", 1, 4).check_extent("metric", 2, 4);
  books.check_rank("books", 3).check_extent("books", 1, 4).check_extent("books", 2, 256);
  scales.check_rank("scales", 2);
  s.columns = code.shape[0];
  s.blocks = metric.shape[0];
  s.codes = books.shape[0];
  s.trials = scales.shape[1];
  const int64_t rows = 4 * s.blocks;
  for (const auto& [name, view] : {std::pair{"target", &target}, std::pair{"weight", &weight}}) {
    view->check_rank(name, 2).check_extent(name, 0, s.columns).check_extent(name, 1, rows);
  }
  if (s.trials < 1) throw std::invalid_argument("scales has no columns, expected at least one");
  s.target = target.as<float>("target");
  s.weight = weight.as<float>("weight");
  s.target_stride = target.strides[0];
  s.weight_stride = weight.strides[0];
  s.before = optional_floats("before", before, s.columns, rows);
  s.metric = metric.check_contiguous("metric").as<float>("metric");
  s.feedback = optional_floats("feedback", feedback, rows, rows);
  s.books = books.check_contiguous("books").as<float>("books");
  s.code = vector<int32_t>("code", code, s.columns);
  s.scales = matrix<float>("scales", scales, s.columns, s.trials);
  s.error = matrix<float>("error", error, s.columns, rows);
  s.packed = matrix<uint8_t>("packed", packed, s.columns, s.blocks);
  s.choice = vector<int32_t>("choice", choice, s.columns);
  s.loss = vector<float>("loss", loss, s.columns);
  cpu::code_search(s);
}

}  // namespace

void bind_code_search(py::module_& m) {
  m.def("code_search", &code_search, py::arg("target"), py::arg("weight"), py::arg("before"),
        py::arg("metric"), py::arg("feedback"), py::arg("books"), py::arg("code"),
        py::arg("scales"), py::arg("error"), py::arg("packed"), py::arg("choice"), py::arg("loss"),
        no_gil());
}

}  // namespace fd
