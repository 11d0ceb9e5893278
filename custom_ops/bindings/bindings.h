// Glue shared by the binding files: a Python view (pointer, dtype name, shape, strides) becomes a
// fd::TensorView argument.
//
// A family of ops adds a file bindings/cpu_<family>.cc with `void bind_<family>(py::module_& m)`,
// declares it in module_cpu.cc and binds every op with `no_gil`, so that other Python threads run
// meanwhile. std::invalid_argument thrown by an op arrives as ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_view.h"

namespace fd {
namespace py = pybind11;
using no_gil = py::call_guard<py::gil_scoped_release>;
}  // namespace fd

namespace pybind11::detail {

template <>
struct type_caster<fd::TensorView> {
  PYBIND11_TYPE_CASTER(fd::TensorView, const_name("tuple[int, str, Sequence[int], Sequence[int]]"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source) || len(source) != 4) return false;
    const tuple view = reinterpret_borrow<tuple>(source);
    const sequence shape = view[2], strides = view[3];
    value.rank = static_cast<int>(len(shape));
    if (value.rank > fd::TensorView::kMaxRank || len(strides) != len(shape)) return false;
    value.data = reinterpret_cast<void*>(view[0].cast<uintptr_t>());
    value.dtype = fd::dtype_from_name(view[1].cast<std::string>());
    for (int i = 0; i < value.rank; ++i) {
      value.shape[i] = shape[i].cast<int64_t>();
      value.strides[i] = strides[i].cast<int64_t>();
    }
    return true;
  }
};

}  // namespace pybind11::detail
