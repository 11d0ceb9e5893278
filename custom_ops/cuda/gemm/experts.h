// The experts of a MoE layer on a card, without device code: arguments and entry points.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "expert_weight.h"
#include "plan.h"

namespace fd::cuda {

/// One call: out[t] = sum over j of route_weights[t, j] * down(swiglu(up_gate(x[t]))) of expert
/// ids[t, j], in the order of j. x [tokens, H] and out [tokens, H] bf16, ids int32 and
/// route_weights float32 [tokens, top_k].
struct ExpertsCall {
  const __nv_bfloat16* x;
  const int* ids;
  const float* route_weights;
  ExpertWeight up_gate;  // [H, 2I], gate columns first
  ExpertWeight down;     // [I, H]
  __nv_bfloat16* out;
  int tokens;
  int top_k;
};

/// Device memory of a call; belongs to the caller, who may not use it for two calls at once.
/// `state` is zero before the first call and the kernels leave it so.
struct ExpertsScratch {
  void* memory;  // experts_memory_bytes()
  void* state;   // experts_state_bytes()
};

/// What a plan takes of a layer; tokens, top_k and same_bits are the call's.
ExpertsShape experts_shape(const ExpertWeight& up_gate, const ExpertWeight& down);

/// Of a warp at a barrier of rings: 32 where racecheck is to understand the kernels.
int warp_arrivals();

/// Of the current card; asked for once.
const CardFacts& card_facts();

int64_t experts_memory_bytes(const ExpertsPlan& plan, const ExpertsShape& shape,
                             const CardFacts& card);
int64_t experts_state_bytes(const CardFacts& card);
void run_experts(const ExpertsPlan& plan, const ExpertsCall& call, const ExpertsScratch& scratch,
                 const CardFacts& card, cudaStream_t stream);

}  // namespace fd::cuda
