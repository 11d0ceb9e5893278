// Tensors on a card as the CPU's ops take them: views, checked where an address is taken of them.
// Kernels take no strides, so every view is contiguous.
#pragma once

#include <cuda_bf16.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

#include "view_caster.h"

namespace fd {

template <>
struct DTypeOf<__nv_bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};

namespace cuda {

using OptionalView = std::optional<TensorView>;

inline int extent(const TensorView& view, int axis) { return static_cast<int>(view.shape[axis]); }

inline void check_shape(const TensorView& view, const char* name,
                        std::initializer_list<int> shape) {
  view.check_rank(name, static_cast<int>(shape.size()));
  int axis = 0;
  for (const int expected : shape) view.check_extent(name, axis++, expected);
  view.check_contiguous(name);
}

/// Address of a tensor of T of this shape. Throws std::invalid_argument with the `name`, of the op
/// and the argument, and what was found and expected.
template <typename T>
T* device(const TensorView& view, const char* name, std::initializer_list<int> shape) {
  check_shape(view, name, shape);
  return view.as<std::remove_const_t<T>>(name);
}

/// Null where there is none.
template <typename T>
T* device(const OptionalView& view, const char* name, std::initializer_list<int> shape) {
  return view ? device<T>(*view, name, shape) : nullptr;
}

/// Whether a tensor that may be bf16 or float32 is the latter.
inline bool is_float(const TensorView& view) { return view.dtype == DType::kFloat32; }

/// Address of a tensor of bf16 or float32.
inline void* device_floats(const TensorView& view, const char* name,
                           std::initializer_list<int> shape) {
  if (is_float(view)) return device<float>(view, name, shape);
  return device<__nv_bfloat16>(view, name, shape);
}

}  // namespace cuda
}  // namespace fd
