// Threads and instruction sets.
#include <pybind11/stl.h>

#include <atomic>

#include "../cpu/read_kernels.h"
#include "bindings.h"
#include "checked_read.h"
#include "cpu_features.h"
#include "cpu_quota.h"
#include "cpu_topology.h"
#include "loop_pieces.h"
#include "loop_times.h"
#include "parallel.h"
#include "weight_memory.h"

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
  m.def("loop_cpus", &loop_cpus, "CPUs that num_threads() counts where nothing else decides.");
  m.def("allowed_cpus", &allowed_cpus, "CPUs in the affinity mask of the process.");
  m.def("parse_cpu_list", &parse_cpu_list, py::arg("text"), "Numbers of a list such as 0-3,8.");
  m.def("performance_cpus", &performance_cpus, py::arg("devices"), py::arg("allowed"),
        "The fast ones of the allowed CPUs, by a folder like /sys/devices.");
  m.def("nodes_of", &nodes_of, py::arg("devices"), py::arg("cpus"),
        "Memory nodes of CPUs, by a folder like /sys/devices.");
  m.def(
      "place_weights",
      [](uintptr_t address, int64_t bytes, bool huge, const std::vector<int>& nodes) {
        const Placement placed = place_weights(address, bytes, huge, nodes);
        return py::make_tuple(placed.huge, placed.dealt);
      },
      py::arg("address"), py::arg("bytes"), py::arg("huge"), py::arg("nodes"),
      "Ask for huge pages, and for pages on several nodes in turn; whether each was granted.");
  m.def("set_num_threads", &set_num_threads, py::arg("count"),
        "Change num_threads() for the process.");
  m.def("set_loop_patience", &set_loop_patience, py::arg("microseconds"),
        "How long the process's idle threads look for the next loop before they sleep.");
  m.def(
      "loop_pieces",
      [](int64_t count, int64_t grain, int workers) {
        const LoopPieces pieces(count, grain, workers);
        std::vector<std::pair<int64_t, int64_t>> found;
        for (int64_t number = 0;; ++number) {
          const auto [begin, end] = pieces[number];
          if (begin == end) return found;
          found.emplace_back(begin, end);
        }
      },
      py::arg("count"), py::arg("grain"), py::arg("workers"),
      "How a loop of `count` units is cut for so many threads, in the order in which it is taken.");
  m.def("time_loops", &time_loops, py::arg("on"), "Whether shared loops are timed from now on.");
  m.def(
      "loop_times",
      [] {
        py::list found;
        for (const LoopTimes& loop : loop_times()) {
          found.append(py::make_tuple(loop.wall, loop.slowest, loop.fastest, loop.mean));
        }
        return found;
      },
      "Of each shared loop since the last call, nanoseconds of the loop and of its busiest, least "
      "busy and average thread.");
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
  m.attr("CHECKSUM_BYTES") = kChecksumBytes;
  m.def("checksums", &checksums, py::arg("data"), py::arg("sums"), no_gil(),
        "CRC-32C of each CHECKSUM_BYTES of data.");
  m.def("read_checked", &read_checked, py::arg("file"), py::arg("offset"), py::arg("data"),
        py::arg("sums"), no_gil(),
        "Fill data from an open file, and sums with its checksums; 0 or an errno.");
}

}  // namespace fd
