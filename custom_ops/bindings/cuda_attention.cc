// Attention on a card over views, checked here; the stream comes last. See
// fastdeploy_lite/model_executor/ops/attention.py for meaning, shapes and dtypes.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/gemm/attention_shape.h"
#include "../cuda/gemm/experts.h"
#include "../cuda/ops.h"
#include "cuda_bindings.h"
#include "cuda_views.h"

namespace py = pybind11;

namespace {

namespace fc = fd::cuda;
using fc::Address;
using fc::at;
using fc::bf16;
using fc::device;
using fc::extent;
using fc::stream_of;
using fd::TensorView;

/// Sizes of a step whose queries, or what becomes of them, are `q`.
///
/// Throws std::invalid_argument where they are no whole heads, as many for each KV head.
fc::AttentionShape shape_of(const TensorView& q, const TensorView& keys, int sequences,
                            int table_width) {
  const int width = extent(q, 1), kv_heads = extent(keys, 1), head_dim = extent(keys, 3);
  const int64_t unit = int64_t{kv_heads} * head_dim;
  if (unit == 0 || width % unit != 0) {
    throw std::invalid_argument("attention: q is " + std::to_string(width) +
                                " wide, expected a multiple of " + std::to_string(kv_heads) +
                                " KV heads of " + std::to_string(head_dim));
  }
  return {extent(q, 0), sequences,       width / head_dim, kv_heads,
          head_dim,     extent(keys, 0), table_width};
}

struct Cache {
  bf16* keys;
  bf16* values;

  Cache(const fc::AttentionShape& s, const TensorView& key_view, const TensorView& value_view)
      : keys(part(s, key_view, "attention: key_cache")),
        values(part(s, value_view, "attention: value_cache")) {}

 private:
  static bf16* part(const fc::AttentionShape& s, const TensorView& view, const char* name) {
    return device<bf16>(view, name, {s.num_blocks, s.kv_heads, fc::kBlockTokens, s.head_dim});
  }
};

/// How a step's tokens come, and where their keys and values go.
struct Fresh {
  const bf16* qkv;
  const int* positions;
  const float* cos_sin;
  int max_positions;
  const int* slots;

  Fresh(const fc::AttentionShape& s, const TensorView& qkv_view, const TensorView& position_view,
        const TensorView& angles, const TensorView& slot_view)
      : qkv(device<const bf16>(qkv_view, "attention: qkv",
                               {s.tokens, (s.query_heads + 2 * s.kv_heads) * s.head_dim})),
        positions(device<const int>(position_view, "attention: positions", {s.tokens})),
        cos_sin(device<const float>(angles, "attention: cos_sin", {extent(angles, 0), s.head_dim})),
        max_positions(extent(angles, 0)),
        slots(device<const int>(slot_view, "attention: slot_mapping", {s.tokens})) {}
};

/// Which blocks and lengths a step's sequences have.
struct Batch {
  const int* block_tables;
  const int* cu_seqlens_q;
  const int* context_lens;

  Batch(const fc::AttentionShape& s, const TensorView& tables, const TensorView& cu_seqlens,
        const TensorView& contexts)
      : block_tables(
            device<const int>(tables, "attention: block_tables", {s.sequences, s.table_width})),
        cu_seqlens_q(device<const int>(cu_seqlens, "attention: cu_seqlens_q", {s.sequences + 1})),
        context_lens(device<const int>(contexts, "attention: context_lens", {s.sequences})) {}
};

fc::AttentionPlan plan_of(const fc::AttentionShape& s, int64_t partial_bytes) {
  return fc::plan_attention(s, fc::card_facts().multiprocessors, partial_bytes / 4);
}

bf16* output(const TensorView& out, const fc::AttentionShape& s) {
  return device<bf16>(out, "attention: out", {s.tokens, s.query_heads * s.head_dim});
}

void rope_and_cache(const TensorView& qkv, const TensorView& positions, const TensorView& cos_sin,
                    const TensorView& slots, const TensorView& keys, const TensorView& values,
                    const TensorView& q_out, Address stream) {
  const fc::AttentionShape s = shape_of(q_out, keys, 0, 0);
  const Fresh fresh(s, qkv, positions, cos_sin, slots);
  const Cache cache(s, keys, values);
  fc::rope_and_cache(fresh.qkv, fresh.positions, fresh.cos_sin, fresh.slots, cache.keys,
                     cache.values, output(q_out, s), s, fresh.max_positions, stream_of(stream));
}

/// `partial`: scratch of so many bytes; `counters`: see AttentionScratch.
void paged_attention(const TensorView& q, const TensorView& keys, const TensorView& values,
                     const TensorView& tables, const TensorView& cu_seqlens,
                     const TensorView& contexts, float scale, Address partial,
                     int64_t partial_bytes, Address counters, const TensorView& out,
                     Address stream) {
  const fc::AttentionShape s = shape_of(q, keys, extent(tables, 0), extent(tables, 1));
  const bf16* const queries =
      device<const bf16>(q, "attention: q", {s.tokens, s.query_heads * s.head_dim});
  const Cache cache(s, keys, values);
  const Batch batch(s, tables, cu_seqlens, contexts);
  bf16* const result = output(out, s);
  fc::paged_attention(queries, cache.keys, cache.values, batch.block_tables, batch.cu_seqlens_q,
                      batch.context_lens, scale, plan_of(s, partial_bytes),
                      {at<float>(partial), at<void>(counters)}, result, s, stream_of(stream));
}

void decode_new_tokens(const TensorView& qkv, const TensorView& positions,
                       const TensorView& cos_sin, const TensorView& slots, const TensorView& keys,
                       const TensorView& values, const TensorView& tables,
                       const TensorView& cu_seqlens, const TensorView& contexts, float scale,
                       Address partial, int64_t partial_bytes, Address counters,
                       const TensorView& out, Address stream) {
  const fc::AttentionShape s = shape_of(out, keys, extent(tables, 0), extent(tables, 1));
  const Fresh fresh(s, qkv, positions, cos_sin, slots);
  const Cache cache(s, keys, values);
  const Batch batch(s, tables, cu_seqlens, contexts);
  bf16* const result = output(out, s);
  fc::decode_new_tokens(fresh.qkv, fresh.positions, fresh.cos_sin, fresh.slots, cache.keys,
                        cache.values, batch.block_tables, batch.cu_seqlens_q, batch.context_lens,
                        scale, plan_of(s, partial_bytes), {at<float>(partial), at<void>(counters)},
                        result, s, fresh.max_positions, stream_of(stream));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("attention_counter_bytes") = fc::attention_counter_bytes();
  m.def("rope_and_cache", &rope_and_cache);
  m.def("paged_attention", &paged_attention);
  m.def("decode_new_tokens", &decode_new_tokens);
}
