// What stands for the module _ops_cuda: kernels and all, in main memory.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "rules/peers.h"
#include "rules/rules.h"

namespace py = pybind11;
using Address = uintptr_t;

void bind_encode(py::module_& m);
void bind_experts(py::module_& m);

namespace fd::cuda {
bool starts_early(cudaStream_t) { return false; }
}  // namespace fd::cuda

namespace {

/// What a card says of itself. One with other facts is another card: kernels' hosts ask once.
struct Facts {
  int multiprocessors = 4, shared_bytes = 227 * 1024, major = 9;
};
std::vector<Facts> cards(1);
int current = 0;

int use_card(int multiprocessors, int shared_bytes, int major) {
  for (size_t i = 0; i < cards.size(); ++i) {
    const Facts& known = cards[i];
    if (known.multiprocessors == multiprocessors && known.shared_bytes == shared_bytes &&
        known.major == major) {
      return current = static_cast<int>(i);
    }
  }
  cards.push_back({multiprocessors, shared_bytes, major});
  return current = static_cast<int>(cards.size()) - 1;
}

struct DeviceFacts {
  std::string name = "a card in memory";
};

void* at(Address address) { return reinterpret_cast<void*>(address); }

/// Filled with NaN: what a kernel does not write shows.
Address allocate(int64_t bytes) {
  const size_t rounded = (static_cast<size_t>(bytes) + 255) / 256 * 256;
  void* memory = std::aligned_alloc(256, rounded);
  std::memset(memory, 0xff, rounded);
  return reinterpret_cast<Address>(memory);
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const Facts& facts = cards[device];
  *value = which == cudaDevAttrComputeCapabilityMajor ? facts.major
           : which == cudaDevAttrMultiProcessorCount  ? facts.multiprocessors
                                                      : facts.shared_bytes;
  return cudaSuccess;
}

PYBIND11_MODULE(card_in_memory, m) {
  m.def("schedule", &card::set_seed, "Schedule launches from now on by this seed; 0: in order.");
  m.def("use_card", &use_card, py::arg("multiprocessors"), py::arg("shared_bytes") = 227 * 1024,
        py::arg("major") = 9);
  py::class_<DeviceFacts>(m, "DeviceFacts").def_readonly("name", &DeviceFacts::name);
  m.def("device_facts", [](int) { return DeviceFacts(); });
  m.def("create_stream", [] { return Address{0}; });
  m.def("synchronize", [](Address) {});
  m.def("allocate", &allocate);
  m.def("release", [](Address memory) { std::free(at(memory)); });
  m.def("clear", [](Address to, int64_t bytes, Address) { std::memset(at(to), 0, bytes); });
  m.def("upload", [](Address device, Address host, int64_t bytes, Address) {
    std::memcpy(at(device), at(host), bytes);
  });
  m.def("download", [](Address host, Address device, int64_t bytes, Address) {
    std::memcpy(at(host), at(device), bytes);
  });
  m.def("rules", &card::rule_names);
  m.def("right", &card::right, py::arg("rule"), py::arg("kept"),
        "Whether a small kernel that keeps the rule, or breaks it, computes what it should.");
  m.def("sum_peers", &card::sum_peers, py::arg("numbers"), py::arg("stride"), py::arg("ranks"),
        py::arg("vectors"), py::arg("most_sent"), py::arg("blocks"), py::arg("threads"));
  bind_encode(m);
  bind_experts(m);
}
