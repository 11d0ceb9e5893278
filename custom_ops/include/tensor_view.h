// A tensor as the kernels see it: a pointer, a dtype, a shape and strides. Owns nothing.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fd {

enum class DType { kFloat32, kBFloat16, kInt64, kInt32, kInt16, kInt8, kUInt16, kUInt8 };

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "int64",  "int32",
                                    "int16",   "int8",     "uint16", "uint8"};
  return kNames[static_cast<int>(dtype)];
}

inline int dtype_size(DType dtype) {
  constexpr int kSizes[] = {4, 2, 8, 4, 2, 1, 2, 1};
  return kSizes[static_cast<int>(dtype)];
}

// Throws std::invalid_argument for a name that is not in dtype_name().
inline DType dtype_from_name(const std::string& name) {
  for (int i = 0; i < 8; ++i) {
    if (name == dtype_name(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  throw std::invalid_argument("dtype '" + name + "' is not known to the native ops");
}

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kInt64;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kInt32;
};
template <>
struct DTypeOf<int8_t> {
  static constexpr DType value = DType::kInt8;
};
template <>
struct DTypeOf<uint16_t> {
  static constexpr DType value = DType::kUInt16;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kUInt8;
};

struct TensorView {
  static constexpr int kMaxRank = 6;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};  // in elements

  int64_t size() const {
    int64_t product = 1;
    for (int i = 0; i < rank; ++i) product *= shape[i];
    return product;
  }

  // The elements as T, checked against the dtype. bfloat16 is read as uint16_t bit patterns.
  template <typename T>
  T* as(const char* name) const {
    const bool bits = DTypeOf<T>::value == DType::kUInt16 && dtype == DType::kBFloat16;
    if (dtype != DTypeOf<T>::value && !bits) {
      throw std::invalid_argument(std::string(name) + " has dtype " + dtype_name(dtype) +
                                  ", expected " + dtype_name(DTypeOf<T>::value));
    }
    return static_cast<T*>(data);
  }

  // Throws std::invalid_argument unless the rank is as given and, if there is more than one
  // element along it, the last axis is contiguous.
  const TensorView& check_rank(const char* name, int expected) const {
    if (rank != expected) {
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(rank) +
                                  " dimensions, expected " + std::to_string(expected));
    }
    if (rank > 0 && shape[rank - 1] > 1 && strides[rank - 1] != 1) {
      throw std::invalid_argument(std::string(name) + " has stride " +
                                  std::to_string(strides[rank - 1]) +
                                  " along its last axis, expected 1");
    }
    return *this;
  }

  const TensorView& check_extent(const char* name, int axis, int64_t expected) const {
    if (axis >= rank || shape[axis] != expected) {
      throw std::invalid_argument(std::string(name) + " has size " +
                                  std::to_string(axis < rank ? shape[axis] : -1) + " along axis " +
                                  std::to_string(axis) + ", expected " + std::to_string(expected));
    }
    return *this;
  }

  // Throws unless the elements lie without gaps in row-major order.
  const TensorView& check_contiguous(const char* name) const {
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] > 1 && strides[i] != expected) {
        throw std::invalid_argument(std::string(name) +
                                    " is not contiguous: call contiguous() on it");
      }
      expected *= shape[i];
    }
    return *this;
  }
};

}  // namespace fd
