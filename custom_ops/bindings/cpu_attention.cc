// Rotary embedding, cache writes and attention.
#include "../cpu/attention.h"
#include "../cpu/attention_kernels.h"
#include "bindings.h"
#include "recording.h"

namespace fd {
namespace {

cpu::CacheShape cache_shape(const TensorView& keys, const TensorView& values) {
  keys.check_rank("key_cache", 4).check_extent("key_cache", 2, kBlockTokens);
  values.check_rank("value_cache", 4);
  for (int axis = 0; axis < 4; ++axis) {
    values.check_extent("value_cache", axis, keys.shape[axis]);
  }
  keys.check_contiguous("key_cache");
  values.check_contiguous("value_cache");
  const int64_t dim = keys.shape[3];
  if (dim < 16 || dim > kMaxHeadDim || dim % 16 != 0) {
    throw std::invalid_argument("key_cache has head_dim " + std::to_string(dim) +
                                ", expected a multiple of 16 up to " + std::to_string(kMaxHeadDim));
  }
  return {keys.shape[0], static_cast<int>(keys.shape[1]), static_cast<int>(dim)};
}

int query_heads(const TensorView& query, const cpu::CacheShape& cache) {
  const int64_t heads = query.shape[1] / cache.head_dim;
  const int64_t group = heads / cache.kv_heads;
  if (heads * cache.head_dim != query.shape[1] || group * cache.kv_heads != heads || group < 1 ||
      group > kMaxTileRows) {
    throw std::invalid_argument("a query row has " + std::to_string(query.shape[1]) +
                                " elements, expected head_dim " + std::to_string(cache.head_dim) +
                                " times 1 to " + std::to_string(kMaxTileRows) + " times " +
                                std::to_string(cache.kv_heads) + " KV heads");
  }
  return static_cast<int>(heads);
}

const int32_t* indices(const char* name, const TensorView& view, int64_t count) {
  view.check_rank(name, 1).check_extent(name, 0, count);
  return view.as<int32_t>(name);
}

void rope_and_cache(const TensorView& qkv, const TensorView& positions, const TensorView& cos_sin,
                    const TensorView& slots, const TensorView& key_cache,
                    const TensorView& value_cache, const TensorView& q_out) {
  const cpu::CacheShape cache = cache_shape(key_cache, value_cache);
  const int64_t tokens = qkv.check_rank("qkv", 2).check_contiguous("qkv").shape[0];
  q_out.check_rank("q_out", 2).check_extent("q_out", 0, tokens).check_contiguous("q_out");
  const int heads = query_heads(q_out, cache);
  qkv.check_extent("qkv", 1, int64_t{heads + 2 * cache.kv_heads} * cache.head_dim);
  cos_sin.check_rank("cos_sin", 2).check_extent("cos_sin", 1, cache.head_dim);
  cos_sin.check_contiguous("cos_sin");
  cpu::rope_and_cache(
      {qkv.as<float>("qkv"), indices("positions", positions, tokens), cos_sin.as<float>("cos_sin"),
       cos_sin.shape[0], indices("slot_mapping", slots, tokens), key_cache.as<float>("key_cache"),
       value_cache.as<float>("value_cache"), cache, q_out.as<float>("q_out"), tokens, heads});
}

void paged_attention(const TensorView& query, const TensorView& key_cache,
                     const TensorView& value_cache, const TensorView& block_tables,
                     const TensorView& cu_seqlens_q, const TensorView& context_lens, float scale,
                     const TensorView& out) {
  const cpu::CacheShape cache = cache_shape(key_cache, value_cache);
  const int64_t tokens = query.check_rank("q", 2).check_contiguous("q").shape[0];
  const int heads = query_heads(query, cache);
  out.check_rank("out", 2).check_extent("out", 0, tokens).check_extent("out", 1, query.shape[1]);
  out.check_contiguous("out");
  block_tables.check_rank("block_tables", 2).check_contiguous("block_tables");
  const int64_t sequences = block_tables.shape[0];
  cpu::paged_attention({query.as<float>("q"), key_cache.as<float>("key_cache"),
                        value_cache.as<float>("value_cache"), cache,
                        block_tables.as<int32_t>("block_tables"), block_tables.shape[1],
                        indices("cu_seqlens_q", cu_seqlens_q, sequences + 1),
                        indices("context_lens", context_lens, sequences), sequences, tokens, heads,
                        scale, out.as<float>("out")});
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("rope_and_cache", recorded(&rope_and_cache), py::arg("qkv"), py::arg("positions"),
        py::arg("cos_sin"), py::arg("slot_mapping"), py::arg("key_cache"), py::arg("value_cache"),
        py::arg("q_out"), no_gil());
  m.def("paged_attention", recorded(&paged_attention), py::arg("q"), py::arg("key_cache"),
        py::arg("value_cache"), py::arg("block_tables"), py::arg("cu_seqlens_q"),
        py::arg("context_lens"), py::arg("scale"), py::arg("out"), no_gil());
}

}  // namespace fd
