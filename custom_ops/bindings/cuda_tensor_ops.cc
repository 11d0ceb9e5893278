// The CUDA ops whose tensors are views, checked here; the stream comes last. Meaning, shapes and
// dtypes are documented at the functions of the same names in fastdeploy_lite/model_executor/ops.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../cuda/gemm.h"
#include "../cuda/gemm/experts.h"
#include "../cuda/gemm/plan_linear.h"
#include "../cuda/ops.h"
#include "cuda_bindings.h"
#include "cuda_views.h"
#include "cuda_weight.h"

namespace py = pybind11;

namespace {

namespace fc = fd::cuda;
using fc::Address;
using fc::at;
using fc::bf16;
using fc::device;
using fc::extent;
using fc::OptionalView;
using fc::stream_of;
using fd::TensorView;

// -- rows ----------------------------------------------------------------------------------------

/// `table`: of a plain dense weight.
void embedding(const TensorView& ids, Address table, int first, int vocab, const TensorView& out,
               Address stream) {
  const int tokens = extent(out, 0), hidden = extent(out, 1);
  fc::embedding(device<const int>(ids, "embedding: token_ids", {tokens}), at<const bf16>(table),
                device<bf16>(out, "embedding: out", {tokens, hidden}), tokens, hidden, first, vocab,
                stream_of(stream));
}

void rms_norm(const TensorView& x, const OptionalView& also, const OptionalView& residual,
              const TensorView& weight, float eps, const TensorView& out, Address stream) {
  const int tokens = extent(x, 0), hidden = extent(x, 1);
  fc::rms_norm(device<const bf16>(x, "rms_norm: x", {tokens, hidden}),
               device<const bf16>(also, "rms_norm: also", {tokens, hidden}),
               device<bf16>(residual, "rms_norm: residual", {tokens, hidden}),
               fc::device_floats(weight, "rms_norm: weight", {hidden}), fc::is_float(weight), eps,
               device<bf16>(out, "rms_norm: out", {tokens, hidden}), tokens, hidden,
               stream_of(stream));
}

void silu_and_mul(const TensorView& x, const TensorView& out, Address stream) {
  const int tokens = extent(out, 0), width = extent(out, 1);
  fc::silu_and_mul(device<const bf16>(x, "silu_and_mul: x", {tokens, 2 * width}),
                   device<bf16>(out, "silu_and_mul: out", {tokens, width}), tokens, width,
                   stream_of(stream));
}

void add_inplace(const TensorView& x, const TensorView& y, Address stream) {
  const int tokens = extent(x, 0), hidden = extent(x, 1);
  fc::add_inplace(device<bf16>(x, "add_inplace: x", {tokens, hidden}),
                  device<const bf16>(y, "add_inplace: y", {tokens, hidden}),
                  int64_t{tokens} * hidden, stream_of(stream));
}

void gather_rows(const TensorView& x, const TensorView& rows, const TensorView& out,
                 Address stream) {
  const int source_rows = extent(x, 0), width = extent(x, 1), count = extent(out, 0);
  const int64_t row_bytes = int64_t{width} * fd::dtype_size(x.dtype);
  if (x.dtype != out.dtype) throw std::invalid_argument("gather_rows: x and out differ in dtype");
  fc::gather_rows(fc::device_floats(x, "gather_rows: x", {source_rows, width}),
                  device<const int>(rows, "gather_rows: rows", {count}),
                  fc::device_floats(out, "gather_rows: out", {count, width}), count, row_bytes,
                  source_rows, stream_of(stream));
}

void bind_rows(py::module_& m) {
  m.def("embedding", &embedding);
  m.def("rms_norm", &rms_norm);
  m.def("silu_and_mul", &silu_and_mul);
  m.def("add_inplace", &add_inplace);
  m.def("gather_rows", &gather_rows);
}

// -- products ------------------------------------------------------------------------------------

/// `partial`: scratch for the sums of parts of K where few tiles have to fill the card, and for
/// Hopper's order of x. `forced`: see linear_tile().
void linear(const TensorView& x, const fc::Weight& weight, const TensorView& out, int forced,
            Address partial, int64_t partial_bytes, Address stream) {
  const int tokens = extent(x, 0), k = weight.tiled.in_features, n = weight.tiled.out_features;
  fc::GemmParams params;
  params.x = device<const bf16>(x, "linear: x", {tokens, k});
  if (fc::is_float(out)) {
    params.out_float = device<float>(out, "linear: out", {tokens, n});
  } else {
    params.out = device<bf16>(out, "linear: out", {tokens, n});
  }
  params.out_columns = n;
  params.rows.count = tokens;
  params.partial = at<float>(partial);
  params.partial_floats = partial_bytes / 4;
  const int tile_rows =
      fc::linear_tile({tokens, weight.kind, k, n, params.partial_floats}, fc::card_facts(), forced);
  fc::gemm(static_cast<int>(weight.kind), false, weight.tiled, params, tile_rows,
           fc::ceil_div(tokens, tile_rows), stream_of(stream));
}

/// `rows`: of a plain dense weight.
void dense_linear(const TensorView& x, Address rows, const TensorView& out, Address workspace,
                  int64_t workspace_bytes, Address stream) {
  const int tokens = extent(x, 0), k = extent(x, 1), n = extent(out, 1);
  fc::dense_linear(device<const bf16>(x, "linear: x", {tokens, k}), at<const bf16>(rows),
                   fc::device_floats(out, "linear: out", {tokens, n}), fc::is_float(out), tokens, k,
                   n, at<void>(workspace), workspace_bytes, stream_of(stream));
}

/// `forced`: see plan_dense_experts().
fc::DenseExpertsPlan dense_plan(int experts, int tokens, int top_k, int forced) {
  return fc::plan_dense_experts({tokens, top_k, experts}, fc::card_facts().major, forced);
}

int64_t dense_experts_bytes(const fc::Weight& down, int experts, int tokens, int top_k,
                            int forced) {
  return fc::dense_experts_bytes(dense_plan(experts, tokens, top_k, forced), tokens * top_k,
                                 down.tiled.out_features, down.tiled.in_features);
}

/// Over addresses, as bind_experts().
void dense_experts(Address x, Address ids, Address weights, const fc::Weight& up_gate,
                   const fc::Weight& down, Address out, int experts, int tokens, int top_k,
                   int forced, Address memory, Address stream) {
  fc::dense_experts(dense_plan(experts, tokens, top_k, forced),
                    {at<const bf16>(x), at<const int>(ids), at<const float>(weights), up_gate.tiled,
                     down.tiled, experts, at<bf16>(out), tokens, top_k},
                    at<void>(memory), stream_of(stream));
}

fc::RoutePlan plan_route(int tokens, int hidden, int experts) {
  return fc::route_plan(tokens, hidden, experts, fc::card_facts().multiprocessors);
}

int64_t route_bytes(int tokens, int hidden, int experts) {
  return int64_t{4} * plan_route(tokens, hidden, experts).count * tokens * experts;
}

/// `partial`: scratch of route_bytes().
void route(const TensorView& x, const TensorView& gate, const OptionalView& bias,
           const TensorView& ids, const TensorView& weights, Address partial, Address stream) {
  const int tokens = extent(x, 0), hidden = extent(x, 1), experts = extent(gate, 1);
  const int top_k = extent(ids, 1);
  fc::route(device<const bf16>(x, "route: x", {tokens, hidden}),
            device<const float>(gate, "route: gate_weight", {hidden, experts}),
            device<const float>(bias, "route: bias", {experts}), at<float>(partial),
            plan_route(tokens, hidden, experts),
            device<int>(ids, "route: topk_ids", {tokens, top_k}),
            device<float>(weights, "route: topk_weights", {tokens, top_k}), tokens, hidden, experts,
            top_k, stream_of(stream));
}

void bind_products(py::module_& m) {
  m.def("linear", &linear);
  m.def("dense_linear", &dense_linear);
  m.def("dense_experts_bytes", &dense_experts_bytes);
  m.def("dense_experts", &dense_experts);
  m.def("route_bytes", &route_bytes);
  m.def("route", &route);
}

// -- sampling ------------------------------------------------------------------------------------

void mask_logits(const TensorView& logits, const TensorView& bitmask, const TensorView& rows,
                 Address stream) {
  const int count = extent(logits, 0), vocab = extent(logits, 1);
  const int words = extent(bitmask, 1);
  fc::mask_logits(device<float>(logits, "mask_logits: logits", {count, vocab}),
                  device<const int>(bitmask, "mask_logits: bitmask", {extent(bitmask, 0), words}),
                  device<const int>(rows, "mask_logits: bitmask_rows", {count}), count, vocab,
                  words, stream_of(stream));
}

void process_logits(const TensorView& logits, const TensorView& slots,
                    const OptionalView& occurrences, const TensorView& repetition,
                    const TensorView& frequency, const TensorView& presence,
                    const TensorView& temperature, const TensorView& edit_offsets,
                    const TensorView& edit_ids, const TensorView& edit_values, Address stream) {
  const int rows = extent(logits, 0), vocab = extent(logits, 1), edits = extent(edit_ids, 0);
  const int kept = occurrences ? extent(*occurrences, 0) : 0;
  fc::process_logits(device<float>(logits, "process_logits: logits", {rows, vocab}),
                     device<const int>(slots, "process_logits: slots", {rows}),
                     device<const int>(occurrences, "process_logits: occurrences", {kept, vocab}),
                     device<const float>(repetition, "process_logits: repetition", {rows}),
                     device<const float>(frequency, "process_logits: frequency", {rows}),
                     device<const float>(presence, "process_logits: presence", {rows}),
                     device<const float>(temperature, "process_logits: temperature", {rows}),
                     device<const int>(edit_offsets, "process_logits: edit_offsets", {rows + 1}),
                     device<const int>(edit_ids, "process_logits: edit_ids", {edits}),
                     device<const float>(edit_values, "process_logits: edit_values", {edits}), rows,
                     vocab, stream_of(stream));
}

void update_occurrences(const TensorView& occurrences, const TensorView& slots,
                        const TensorView& ids, bool prompt, Address stream) {
  const int slot_count = extent(occurrences, 0), vocab = extent(occurrences, 1);
  const int count = extent(slots, 0);
  fc::update_occurrences(
      device<int>(occurrences, "update_occurrences: occurrences", {slot_count, vocab}),
      device<const int>(slots, "update_occurrences: slots", {count}),
      device<const int>(ids, "update_occurrences: token_ids", {count}), count, prompt, slot_count,
      vocab, stream_of(stream));
}

void sample(const TensorView& logits, const TensorView& temperature, const TensorView& top_k,
            const TensorView& top_p, const TensorView& min_p, const TensorView& seeds,
            const TensorView& steps, const TensorView& forced, const TensorView& out,
            Address stream) {
  const int rows = extent(logits, 0), vocab = extent(logits, 1);
  fc::sample(device<const float>(logits, "sample: logits", {rows, vocab}),
             device<const float>(temperature, "sample: temperature", {rows}),
             device<const int>(top_k, "sample: top_k", {rows}),
             device<const float>(top_p, "sample: top_p", {rows}),
             device<const float>(min_p, "sample: min_p", {rows}),
             device<const int64_t>(seeds, "sample: seeds", {rows}),
             device<const int64_t>(steps, "sample: steps", {rows}),
             device<const int>(forced, "sample: forced", {rows}),
             device<int>(out, "sample: out", {rows}), rows, vocab, stream_of(stream));
}

/// k: at most kMaxTopLogprobs.
void token_logprobs(const TensorView& logits, const TensorView& tokens, int k,
                    const TensorView& out_logprob, const TensorView& out_rank,
                    const TensorView& out_ids, const TensorView& out_logprobs, Address stream) {
  const int rows = extent(logits, 0), vocab = extent(logits, 1);
  fc::token_logprobs(device<const float>(logits, "token_logprobs: logits", {rows, vocab}),
                     device<const int>(tokens, "token_logprobs: tokens", {rows}), k,
                     device<float>(out_logprob, "token_logprobs: out_logprob", {rows}),
                     device<int>(out_rank, "token_logprobs: out_rank", {rows}),
                     device<int>(out_ids, "token_logprobs: out_ids", {rows, k}),
                     device<float>(out_logprobs, "token_logprobs: out_logprobs", {rows, k}), rows,
                     vocab, stream_of(stream));
}

void bind_sampling(py::module_& m) {
  m.attr("max_top_logprobs") = fc::kMaxTopLogprobs;
  m.def("mask_logits", &mask_logits);
  m.def("process_logits", &process_logits);
  m.def("update_occurrences", &update_occurrences);
  m.def("sample", &sample);
  m.def("token_logprobs", &token_logprobs);
}

}  // namespace

void bind_tensor_ops(py::module_& m) {
  bind_rows(m);
  bind_products(m);
  bind_sampling(m);
}
