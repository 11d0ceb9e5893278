// What quantization/card.py asks of the module _ops_cuda, kernels and all, in main memory.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace py = pybind11;
using Address = uintptr_t;

void bind_encode(py::module_& m);

namespace fd::cuda {
bool starts_early() { return false; }
}  // namespace fd::cuda

namespace {

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

PYBIND11_MODULE(card_in_memory, m) {
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
  bind_encode(m);
}
