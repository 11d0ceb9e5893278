// How a Python view (pointer, dtype name, shape, strides) becomes a fd::TensorView argument.
#pragma once

#include <pybind11/pybind11.h>

#include "../include/tensor_view.h"

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
