// Ops over dense and quantised weights; documented in fastdeploy_lite/model_executor/ops.
#pragma once

#include <cstdint>

#include "packed_weight.h"
#include "tensor_view.h"

namespace fd {

// x float32 [T, K], out float32 [T, N].
void linear(const TensorView& x, const PackedWeight& weight, const TensorView& out);
// token_ids int32 [T], weight dense (in_features H, out_features V), out float32 [T, H].
void embedding(const TensorView& token_ids, const PackedWeight& weight, const TensorView& out);
/// The same of a table that holds the rows from `first` on; ids of other rows give zeros.
void embedding_share(const TensorView& token_ids, const PackedWeight& weight, int64_t first,
                     const TensorView& out);

// x float32 [T, H], gate float32 [H, E], bias float32 [E] or with data == null.
void route(const TensorView& x, const TensorView& gate, const TensorView& bias,
           const TensorView& topk_ids, const TensorView& topk_weights);

// Bytes of workspace that fused_moe wants for that many tokens.
int64_t moe_workspace_bytes(int64_t tokens, int64_t top_k, const PackedWeight& up_gate,
                            const PackedWeight& down);
// x and out float32 or bfloat16: widened exactly, the sum over a token's experts rounded once.
void fused_moe(const TensorView& x, const TensorView& topk_ids, const TensorView& topk_weights,
               const PackedWeight& up_gate, const PackedWeight& down, const TensorView& out,
               const TensorView& workspace);

}  // namespace fd
