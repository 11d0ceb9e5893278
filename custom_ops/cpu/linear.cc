#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "parallel.h"

namespace fd {
namespace {

// Memory for the digits of at most kMaxRows rows, kept between calls of a thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  uint8_t* get(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, capacity_));
      if (data_ == nullptr) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t capacity_ = 0;
};
thread_local Scratch scratch;

void multiply_rows(const PackedWeight& weight, const Rows& input, int64_t count, float* out,
                   int64_t out_stride) {
  parallel_for(weight.tiles(), tile_grain(weight, count), [&](int64_t begin, int64_t end) {
    multiply_tiles(weight, 0, begin, end, input, count, out, out_stride);
  });
}

// Quantised weights are decoded once for all rows of a block, and their kernels see to it that the
// digits come from the cache. Dense ones want as many rows as stay in the L2 cache while all tiles
// pass by: reading the weights once more for every 16 rows or more costs little beside the
// products.
int64_t block_rows(const PackedWeight& weight) {
  if (weight.quantized()) return kMaxRows;
  constexpr int64_t kCacheBytes = 1 << 20;
  const int64_t row_bytes = weight.in_features * int64_t{sizeof(float)};
  return std::clamp<int64_t>(kCacheBytes / row_bytes / 16 * 16, 16, kMaxRows);
}

}  // namespace

void linear(const TensorView& x, const PackedWeight& weight, const TensorView& out) {
  x.check_rank("x", 2).check_extent("x", 1, weight.in_features);
  out.check_rank("out", 2).check_extent("out", 0, x.shape[0]);
  out.check_extent("out", 1, weight.out_features);
  const float* in = x.as<float>("x");
  float* result = out.as<float>("out");
  const int64_t depth = weight.in_features;
  const int64_t block = block_rows(weight);
  for (int64_t first = 0; first < x.shape[0]; first += block) {
    const int64_t count = std::min(block, x.shape[0] - first);
    Rows rows{in + first * x.strides[0], x.strides[0], nullptr, nullptr};
    if (weight.quantized()) {
      uint8_t* memory = scratch.get(digit_bytes(count, depth) + group_bytes(count, depth));
      auto* digits = reinterpret_cast<int8_t*>(memory);
      auto* groups = reinterpret_cast<GroupNumbers*>(memory + digit_bytes(count, depth));
      quantize_rows(rows.x, rows.x_stride, count, weight, digits, groups);
      rows.digits = digits;
      rows.groups = groups;
    }
    multiply_rows(weight, rows, count, result + first * out.strides[0], out.strides[0]);
  }
}

namespace {

/// Row `id` of the table whose columns are held, zeros for an id that is not among them.
void look_up(const PackedWeight& weight, int64_t id, float* row) {
  if (id < 0 || id >= weight.out_features) {
    std::fill(row, row + weight.in_features, 0.0f);
    return;
  }
  const uint8_t* tile = weight.tile(0, id / kTileColumns);
  for (int64_t k = 0; k < weight.in_features; ++k) {
    const int64_t element = k * kTileColumns + id % kTileColumns;
    uint32_t bits;
    if (weight.kind == WeightKind::kFloat32) {
      bits = reinterpret_cast<const uint32_t*>(tile)[element];
    } else {
      bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(tile)[element]) << 16;
    }
    std::memcpy(row + k, &bits, sizeof(bits));
  }
}

}  // namespace

void embedding(const TensorView& token_ids, const PackedWeight& weight, const TensorView& out) {
  token_ids.check_rank("token_ids", 1);
  const int32_t* ids = token_ids.as<int32_t>("token_ids");
  for (int64_t t = 0; t < token_ids.shape[0]; ++t) {
    if (ids[t] < 0 || ids[t] >= weight.out_features) {
      throw std::invalid_argument("token_ids[" + std::to_string(t) + "] is " +
                                  std::to_string(ids[t]) + ", expected 0 to " +
                                  std::to_string(weight.out_features - 1));
    }
  }
  embedding_share(token_ids, weight, 0, out);
}

void embedding_share(const TensorView& token_ids, const PackedWeight& weight, int64_t first,
                     const TensorView& out) {
  token_ids.check_rank("token_ids", 1);
  out.check_rank("out", 2).check_extent("out", 0, token_ids.shape[0]);
  out.check_extent("out", 1, weight.in_features);
  if (weight.quantized()) throw std::invalid_argument("weight is quantised, expected dense");
  const int32_t* ids = token_ids.as<int32_t>("token_ids");
  float* result = out.as<float>("out");
  const int64_t grain = std::max<int64_t>(1, 8192 / weight.in_features);
  parallel_for(token_ids.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      look_up(weight, ids[t] - first, result + t * out.strides[0]);
  });
}

}  // namespace fd
