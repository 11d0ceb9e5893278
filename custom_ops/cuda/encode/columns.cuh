// What an encoder does with whole columns between two searches.
#pragma once

#include "encode.h"

namespace fd::cuda {

/// The 4 x 4 identity.
void identity_metric(float* metric, cudaStream_t stream);

/// weight [K, N] -> scaled [N, K], each column times 2^-exponent so that its largest is in [1/2,
/// 1).
void prepare_columns(const EncodeInput& input, float* scaled, int* exponent, cudaStream_t stream);

/// Square root of the mean square of every group, float64 [N, G], and where asked for the group's
/// energy: sum of squares, or of x' D x over its blocks with a metric [K/4, 4, 4].
void measure_groups(const float* weight, int columns, int groups, const float* metric, double* rms,
                    double* energy, cudaStream_t stream);

/// scale [count, N, G] = rms * factor.
void trial_scales(const EncodeInput& input, const double* rms, float* scale, cudaStream_t stream);

/// sums [N, count] of losses [count, N, G].
void sum_losses(const float* losses, int count, int columns, int groups, double* sums,
                cudaStream_t stream);

/// Local scales and super scale nearest to rms times the factor of the least of sums [N, factors].
void fit_scales(const EncodeInput& input, const double* sums, const double* rms,
                const double* energy, const int* exponent, uint8_t* local, float* super_scale,
                cudaStream_t stream);

/// scale [N, G] = local * super.
void group_scales(const uint8_t* local, const float* super_scale, int columns, int groups,
                  float* scale, cudaStream_t stream);

/// order [count, N]: codes from the least of sums [N, codes] up, the lower number among equals.
void rank_codes(const double* sums, int columns, int codes, int count, int* order,
                cudaStream_t stream);

/// Least-squares super scale of bytes and local scales, as ccq_search does it.
void fit_super_scale(const EncodeInput& input, const float* weight, const int* exponent,
                     const int* code, const uint8_t* packed, const uint8_t* local,
                     float* super_scale, cudaStream_t stream);

/// The state of a search under moments, [N, ...], and what never changes beside it.
struct HessianState {
  const float* weight;          // [N, K]
  const float* weight_product;  // [N, K], weight H
  int* code;
  float* super_scale;
  uint8_t* local;
  uint8_t* packed;
  float* error;    // [N, K]
  float* product;  // [N, K], error H
};
/// Least-squares super scale under the moments; errors and their products follow.
void solve_super_scale(const EncodeInput& input, const int* exponent, const HessianState& state,
                       cudaStream_t stream);
/// Takes the columns of `tried` whose error under the moments is below least [N], or all.
void keep_better(const HessianState& tried, const HessianState& best, int columns, int groups,
                 bool all, double* least, cudaStream_t stream);

/// packed [K/4, N] of [N, K/4]; sums [N, 2]: squares of weights and errors.
void finish_columns(const uint8_t* packed, const float* weight, const float* error, int columns,
                    int rows, const EncodeResult& result, cudaStream_t stream);

}  // namespace fd::cuda
