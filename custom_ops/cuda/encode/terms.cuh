// What a search takes of the moments H of its inputs: fastdeploy_lite/quantization/hessian.py on a
// card, in float64.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

/// mixed [K, K] = first * first_share + second * second_share, divided by its mean diagonal, plus
/// `damping` on the diagonal; the identity if the mean is not positive. Null matrices count as
/// zeros. status: 1 if the mean is not finite, else left alone.
void blend_moments(const float* first, double first_share, const float* second, double second_share,
                   int size, double damping, double* mean, float* mixed, int* status,
                   cudaStream_t stream);

/// wide [K, K] becomes U of H = U U', upper triangular; below the diagonal is left what it likes. K
/// is a multiple of 64. status: 2 unless H is positive definite.
void factorize(const float* hessian, int size, double* wide, int* status, cudaStream_t stream);

/// metric [K/4, 4, 4] and feedback [K, K] of an elimination from U.
void elimination_terms(const double* upper, int size, float* metric, float* feedback,
                       cudaStream_t stream);
/// metric and inverse [K/4, 4, 4], feedback [K/64, 64, 64] of a descent.
void descent_terms(const float* hessian, int size, float* metric, float* inverse, float* feedback,
                   cudaStream_t stream);

/// solution [K, N] = H^-1 right / divisor of H = U U'; wide: float64 [K, N] scratch.
void solve(const double* upper, int size, const float* right, double divisor, int columns,
           double* wide, float* solution, cudaStream_t stream);

/// out [T, I] = silu(gate) * up * weight [T] of both [T, 2 I], the gate first.
void swiglu(const float* both, const float* weight, int tokens, int width, float* out,
            cudaStream_t stream);

/// to [K, K] = from with rows and columns where row_of [64] says inside every group.
void permute_moments(const float* from, const int* row_of, int size, float* to,
                     cudaStream_t stream);

/// total = sum of a * b over `count` values, float64, in one order.
void inner_product(const float* a, const float* b, int64_t count, double* parts, double* total,
                   cudaStream_t stream);
constexpr int kInnerParts = 1024;  // doubles of scratch

}  // namespace fd::cuda
