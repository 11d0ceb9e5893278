// The CCQ encoders on a card: what fastdeploy_lite/quantization/ccq_search.py and ccq_hessian.py do
// of a whole matrix, without leaving the card. Pointers are device memory unless said otherwise;
// work is queued on `stream`. Searches give the bits of the CPU's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

constexpr int kMaxFactors = 8;
/// Exponent of a column with a value that is not finite or above 2^126.
constexpr int kBadColumn = 1 << 20;

/// A matrix [rows, columns] as a file has it, and the codes among which its columns choose.
struct EncodeInput {
  const void* weight;  // bfloat16 or float32 [rows, columns]
  bool is_float;
  const int* row_of;    // [64]: where a stored row of a group comes from; null: itself
  int rows, columns;    // rows: a multiple of 128
  const float4* books;  // [codes, 256]
  int codes;
  int factors;
  double factor[kMaxFactors];  // trial values of scale / root mean square
};

/// In units of weight * 2^-exponent of its column.
struct EncodeResult {
  uint8_t* packed;     // [rows / 4, columns]
  uint8_t* local;      // [columns, rows / 64]
  float* super_scale;  // [columns], bfloat16 values
  int* code;           // [columns]
  int* exponent;       // [columns]
  double* sums;        // [columns, 2]: squares of the weights, of the errors
};

/// Bytes of scratch for `encode_plain`.
int64_t encode_plain_bytes(int rows, int columns, int codes);
/// ccq_search.encode: the same bits.
void encode_plain(const EncodeInput& input, int refinements, const EncodeResult& result,
                  void* scratch, cudaStream_t stream);

/// What the moments H of the inputs give (quantization/hessian.py), all float32.
struct HessianTerms {
  const float* hessian;             // [K, K]
  const float* elimination_metric;  // [K/4, 4, 4]
  const float* feedback;            // [K, K]
  const float* descent_metric;      // [K/4, 4, 4]
  const float* descent_inverse;     // [K/4, 4, 4]
  const float* descent_feedback;    // [K/64, 64, 64]
};

int64_t encode_hessian_bytes(int rows, int columns, int codes);
/// ccq_hessian.encode, sums of products in an order of their own. result.sums: as above.
void encode_hessian(const EncodeInput& input, const HessianTerms& terms, int candidates,
                    int descents, const EncodeResult& result, void* scratch, cudaStream_t stream);

/// One search of 64 rows of every column with three trial scales or one: see code_search.py.
struct GroupSearch {
  int columns;
  int first_group, groups;  // of each column: groups after one another independently
  int all_groups;           // K / 64
  const float* weight;      // [N, K]
  const float* target;      // [N, K]; null in a descent
  const float* product;     // [N, K], a descent's errors times H; else null
  const float* inverse;     // [K/4, 4, 4] in a descent
  const float4* books;      // [codes, 256]
  const float* half;        // half_squares of codes: [code * half_code + block * half_block + byte]
  int64_t half_code, half_block;
  const float* metric;    // [block * metric_block, 4, 4]
  int metric_block;       // 0: one for all
  const float* feedback;  // [64, 64] with rows feedback_stride apart, or null
  int64_t feedback_stride;
  const int* code;           // [N]
  const float* super_scale;  // [N]
  int trials;                // 1 or 3: the local scale, one below, one above
  uint8_t* local;            // [N, G], changed
  float* error;              // [N, K]; a descent's errors that stand, changed where that pays
  float* change;             // [N, 64], a descent's; else null
  uint8_t* packed;           // [N, K/4]
  float* loss;               // [N, groups] or null
};
void search_groups(const GroupSearch& search, cudaStream_t stream);

/// Squared errors of every group with the best bytes, no feedback: losses [count, N, G]. Trial i
/// has code `first_code + i * code_step` and scales at scale + i * scale_step.
struct PlainLosses {
  int columns, groups, count, first_code, code_step;
  const float* weight;  // [N, K]
  const float4* books;
  const float* half;
  int64_t half_code, half_block;
  const float* metric;
  int metric_block;
  const float* scale;  // [N, G]
  int64_t scale_step;
  float* losses;
};
void plain_losses(const PlainLosses& call, cudaStream_t stream);

/// half [codes, blocks, 256] of metric [blocks, 4, 4].
void half_squares(const float4* books, int codes, const float* metric, int blocks, float* half,
                  cudaStream_t stream);

/// c [m, n] = (accumulate ? c : 0) + a b, float32; every sum runs through k in order, fused. a is
/// [m, k], or [k, m] if `transposed`; b [k, n]. n and the leading dimensions are multiples of 4,
/// and so is m if `transposed`.
struct Product {
  const float* a;
  int64_t lda;
  bool transposed;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int m, n, k;
  bool accumulate;
};
void multiply(const Product& product, cudaStream_t stream);

}  // namespace fd::cuda
