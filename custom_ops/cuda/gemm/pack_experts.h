// Filling the chunks of experts; free of device code.
#pragma once

#include <cuda_runtime.h>

#include "expert_weight.h"

namespace fd::cuda {

/// One expert from the file's layout, which lies on the card; `local_scale`: CCQ only.
void pack_expert(Coding coding, const void* codes, const uint8_t* local_scale, uint8_t* chunks,
                 int in_features, int out_features, cudaStream_t stream);
/// One number a column, from file order to block order.
void order_columns(const float* from, float* to, int out_features, cudaStream_t stream);
/// Finds the fast decoder's constants of CCQ columns, {code_scale, code_zp + 0.5} each, checks them
/// for all 256 bytes and adds the number of columns without any to `unproven` (on the card).
void fit_columns(const float2* exact, ColumnCode* codes, int columns, int* unproven,
                 cudaStream_t stream);
/// One expert as the kernels decode it: float32 [K, N] in file order; without `scaled_too` bare
/// integers.
void unpack_expert(const ExpertWeight& w, int expert, bool scaled_too, float* out,
                   cudaStream_t stream);

}  // namespace fd::cuda
