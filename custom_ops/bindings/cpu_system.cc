// Threads and instruction sets.
#include <pybind11/stl.h>

#include <atomic>

#include "../cpu/read_kernels.h"
#include "bindings.h"
#include "cpu_features.h"
#include "cpu_quota.h"
#include "parallel.h"

namespace fd {
namespace {

uint64_t fold_memory(const TensorView& data) {
  data.check_contiguous("data");
  const int64_t words = data.size() * dtype_size(data.dtype) / 8;
  const ReadKernels& kernels = pick(read_kernels_tables);
  std::atomic<uint64_t> result{0};
  parallel_for(words, int64_t{1} << 17, [&](int64_t begin, int64_t end) {
    const uint64_t* from = static_cast<const uint64_t*>(data.data) + begin;
    result.fetch_xor(kernels.fold(from, end - begin), std::memory_order_relaxed);
  });
  return result;
}

}  // namespace

void bind_system(py::module_& m) {
  m.def("num_threads", &num_threads, "Threads that an op may use, the caller included.");
  m.def("cpu_quota", &cpu_quota, py::arg("groups"), py::arg("root"),
        "CPUs that control groups grant, 0 for no limit.");
  m.def("set_num_threads", &set_num_threads, py::arg("count"),
        "Change num_threads() for the process.");
  m.def(
      "current_isa", [] { return isa_name(current_isa()); }, "Name of the instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Switch the instruction set for the process.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (Isa isa : available_isas()) names.push_back(isa_name(isa));
        return names;
      },
      "Names of the instruction sets that were built and that this machine runs, plainest first.");
  m.def("fold_memory", &fold_memory, py::arg("data"), no_gil(),
        "Exclusive or of all whole 64-bit words: a pass over memory, to measure its speed.");
}

}  // namespace fd
