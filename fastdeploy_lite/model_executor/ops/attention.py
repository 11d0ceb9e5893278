"""Rotary embedding, the write into the paged KV cache, and attention over it.

The cache of a layer is two tensors [num_blocks, kv_heads, 64, head_dim]: token `p` of a sequence
lies in block `block_table[p // 64]`, at offset `p % 64`.
"""

from __future__ import annotations

from fastdeploy_lite.model_executor.ops._view import Arguments, Tensor, View

BLOCK_TOKENS = 64
"""Tokens of a KV block."""


def _cache_views(args: Arguments, key_cache: Tensor, value_cache: Tensor) -> tuple[View, View]:
    keys = args.view("key_cache", key_cache, args.activation, None, None, BLOCK_TOKENS, None)
    return keys, args.view("value_cache", value_cache, args.activation, *keys[2])


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_out: Tensor,
) -> None:
    """Turn queries and keys by their positions; keep keys and values in the cache.

    The rotation is the interleaved one: the pair (x[2i], x[2i + 1]) turns by position * inv_freq[i]
    (Su et al., 2021).

    Args:
        qkv: activations [T, (q_heads + 2 kv_heads) * head_dim]: all queries, all keys, all values.
        positions: int32 [T], rows of cos_sin.
        cos_sin: float32 [max_positions, head_dim]: head_dim / 2 cosines, then as many sines.
        slot_mapping: int32 [T], block * 64 + offset; -1 keeps nothing.
        key_cache: activations [num_blocks, kv_heads, 64, head_dim], written in place; head_dim is a
            multiple of 16 up to 512.
        value_cache: like key_cache.
        q_out: activations [T, q_heads * head_dim].

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place; a position or slot out of
            range (on a card indices are not read back: the caller vouches for them).
    """
    args = Arguments("rope_and_cache", qkv)
    keys, values = _cache_views(args, key_cache, value_cache)
    kv_heads, head_dim = keys[2][1], keys[2][3]
    q_view = args.view("q_out", q_out, args.activation, None, None)
    tokens, q_width = q_view[2]
    args.native()(
        args.view("qkv", qkv, args.activation, tokens, q_width + 2 * kv_heads * head_dim),
        args.view("positions", positions, "int32", tokens),
        args.view("cos_sin", cos_sin, "float32", None, head_dim),
        args.view("slot_mapping", slot_mapping, "int32", tokens),
        keys,
        values,
        q_view,
    )


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Causal attention of this step's tokens over their sequences' cached keys and values.

    Sequence b has the tokens cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 of q, which are the last of
    its context_lens[b] tokens; prefill chunks and single decoded tokens mix freely. Query head h
    reads KV head h // (q_heads / kv_heads). A token's result is the same, bit for bit, whatever
    else is in the batch and however its prompt was chunked.

    Args:
        q: activations [T, q_heads * head_dim], q_heads a multiple of kv_heads.
        key_cache: activations [num_blocks, kv_heads, 64, head_dim], this step's keys included.
        value_cache: like key_cache.
        block_tables: int32 [B, max_blocks]; entries past a sequence's last block are not read.
        cu_seqlens_q: int32 [B + 1], from 0 to T.
        context_lens: int32 [B], in tokens, this step's included.
        scale: factor of the scores, usually head_dim ** -0.5.
        out: activations [T, q_heads * head_dim]; may be q.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place; on the CPU also lengths
            that contradict each other and blocks out of range.
    """
    args = Arguments("paged_attention", q)
    q_view = args.view("q", q, args.activation, None, None)
    keys, values = _cache_views(args, key_cache, value_cache)
    tables = args.view("block_tables", block_tables, "int32", None, None)
    sequences = tables[2][0]
    args.native()(
        q_view,
        keys,
        values,
        tables,
        args.view("cu_seqlens_q", cu_seqlens_q, "int32", sequences + 1),
        args.view("context_lens", context_lens, "int32", sequences),
        scale,
        args.view("out", out, args.activation, *q_view[2]),
    )


def decode_attention(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """rope_and_cache, then paged_attention, of one token a sequence, to the same bits.

    Args:
        qkv: activations [B, (q_heads + 2 kv_heads) * head_dim].
        positions, cos_sin, slot_mapping, key_cache, value_cache: see rope_and_cache.
        block_tables, context_lens, scale: see paged_attention.
        cu_seqlens_q: int32 [B + 1], 0 to B.
        out: activations [B, q_heads * head_dim].

    Raises:
        TypeError, ValueError: as those two.
    """
    args = Arguments("decode_attention", qkv)
    out_view = args.view("out", out, args.activation, None, None)
    tokens, width = out_view[2]
    keys, values = _cache_views(args, key_cache, value_cache)
    kv_heads, head_dim = keys[2][1], keys[2][3]
    table_view = args.view("block_tables", block_tables, "int32", tokens, None)
    fresh = (
        args.view("qkv", qkv, args.activation, tokens, width + 2 * kv_heads * head_dim),
        args.view("positions", positions, "int32", tokens),
        args.view("cos_sin", cos_sin, "float32", None, head_dim),
        args.view("slot_mapping", slot_mapping, "int32", tokens),
        keys,
        values,
    )
    batch = (
        table_view,
        args.view("cu_seqlens_q", cu_seqlens_q, "int32", tokens + 1),
        args.view("context_lens", context_lens, "int32", tokens),
        scale,
        out_view,
    )
    if args.kind == "cpu":
        args.native("rope_and_cache")(*fresh, out_view)
        args.native("paged_attention")(out_view, keys, values, *batch)
    else:
        args.native()(*fresh, *batch)
