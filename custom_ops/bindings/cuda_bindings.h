// Glue shared by the files that bind CUDA ops: tensors come as addresses, checked in Python.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fd::cuda {

namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;
using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline cudaStream_t stream_of(Address stream) { return at<CUstream_st>(stream); }

}  // namespace fd::cuda
