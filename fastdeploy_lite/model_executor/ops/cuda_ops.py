"""The ops of `fastdeploy_lite.model_executor.ops` for a card: same names, checked views in.

Each function adds the stream and scratch memory and calls `_ops_cuda`. Shapes, dtypes and meaning
are documented at the functions of the same name in `ops`; indices are not read back, so the caller
vouches for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops import cuda_weights
from fastdeploy_lite.model_executor.ops._view import Tensor, View
from fastdeploy_lite.model_executor.ops.cuda_pinned import CudaMirror
from fastdeploy_lite.model_executor.ops.cuda_runtime import address, scratch, stream
from fastdeploy_lite.model_executor.ops.cuda_weights import CudaWeight
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight

CHOSEN_TILE = 0
"""Rows of a linear's tile: the plan decides (custom_ops/cuda/gemm/plan_linear.h)."""
_HOST_DTYPES = {"bfloat16": "uint16"}


# -- copies ---------------------------------------------------------------------------------------


def upload(array: npt.NDArray[Any], out: Tensor) -> None:
    """Copy a contiguous host array to the head of `out`, ordered on the stream."""
    name = _dtype_name(out)
    if array.dtype.name != _HOST_DTYPES.get(name, name):
        raise ValueError(f"upload: array has dtype {array.dtype.name}, the tensor {name}")
    host = np.ascontiguousarray(array)
    _ops_cuda.upload(int(out.data_ptr()), host.ctypes.data, host.nbytes, stream())


def download(tensor: Tensor) -> npt.NDArray[Any]:
    """Wait for all queued work and return the values; bfloat16 comes as its bits in uint16."""
    name = _dtype_name(tensor)
    host = np.empty(tensor.shape, _HOST_DTYPES.get(name, name))
    if host.nbytes:
        _ops_cuda.download(host.ctypes.data, int(tensor.data_ptr()), host.nbytes, stream())
    return host


def mirror(tensor: Tensor) -> CudaMirror:
    """See ops.mirror."""
    return CudaMirror(tensor)


def clear(tensor: Tensor) -> None:
    """See ops.clear."""
    nbytes = int(tensor.size) * int(tensor.element_size())
    _ops_cuda.clear(int(tensor.data_ptr()), nbytes, stream())


def own_scratch(place: Any) -> Callable[[], AbstractContextManager[None]]:
    """See ops.own_scratch."""
    return runtime.Scratch(place).use


def branch(rows: int) -> runtime.Branch | None:
    """See ops.branch."""
    if rows > runtime.BRANCH_ROWS or not runtime.records_branches():
        return None
    return runtime.Branch()


def announce_step(rows: int) -> None:
    """See ops.announce_step."""
    _ops_cuda.allow_early_start(rows <= runtime.EARLY_START_ROWS)


def memory_info(place: Any) -> tuple[int, int]:
    """Free and total bytes of the card."""
    del place  # a process has one card
    facts = _ops_cuda.device_facts(runtime.device_index())
    return int(facts.free_bytes), int(facts.total_bytes)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition(".")[2]


# -- rows -----------------------------------------------------------------------------------------


def rms_norm(x: View, weight: View, eps: float, out: View) -> None:
    """See ops.rms_norm."""
    _ops_cuda.rms_norm(x, None, None, weight, eps, out, stream())


def add_rms_norm(
    x: View, residual: View, weight: View, eps: float, out: View, also: View | None = None
) -> None:
    """See ops.add_rms_norm."""
    _ops_cuda.rms_norm(x, also, residual, weight, eps, out, stream())


def silu_and_mul(x: View, out: View) -> None:
    """See ops.silu_and_mul."""
    _ops_cuda.silu_and_mul(x, out, stream())


def add_inplace(x: View, y: View) -> None:
    """See ops.add_inplace."""
    _ops_cuda.add_inplace(x, y, stream())


def gather_rows(x: View, rows: View, out: View) -> None:
    """See ops.gather_rows."""
    _ops_cuda.gather_rows(x, rows, out, stream())


# -- products -------------------------------------------------------------------------------------


def embedding(token_ids: View, weight: CudaWeight, out: View) -> None:
    """See ops.embedding."""
    embedding_share(token_ids, weight, 0, out)


def embedding_share(token_ids: View, weight: CudaWeight, first: int, out: View) -> None:
    """See ops.embedding_share."""
    if not weight.rows:
        raise ValueError("embedding: the table must be a dense weight")
    _ops_cuda.embedding(token_ids, weight.rows, first, weight.out_features, out, stream())


def linear(x: View, weight: CudaWeight, out: View) -> None:
    """See ops.linear."""
    room = (scratch(runtime.SCRATCH_BYTES), runtime.SCRATCH_BYTES)
    if weight.native is None:
        runtime.open_blas()
        _ops_cuda.dense_linear(x, weight.rows, out, *room, stream())
    else:
        _ops_cuda.linear(x, weight.native, out, CHOSEN_TILE, *room, stream())


def route(
    x: View, gate_weight: View, bias: View | None, topk_ids: View, topk_weights: View
) -> None:
    """See ops.route."""
    tokens, hidden = x[2]
    partial = scratch(_ops_cuda.route_bytes(tokens, hidden, gate_weight[2][1]))
    _ops_cuda.route(x, gate_weight, bias, topk_ids, topk_weights, partial, stream())


# -- attention ------------------------------------------------------------------------------------


def rope_and_cache(
    qkv: View,
    positions: View,
    cos_sin: View,
    slot_mapping: View,
    key_cache: View,
    value_cache: View,
    q_out: View,
) -> None:
    """See ops.rope_and_cache."""
    _ops_cuda.rope_and_cache(
        qkv, positions, cos_sin, slot_mapping, key_cache, value_cache, q_out, stream()
    )


def paged_attention(
    q: View,
    key_cache: View,
    value_cache: View,
    block_tables: View,
    cu_seqlens_q: View,
    context_lens: View,
    scale: float,
    out: View,
) -> None:
    """See ops.paged_attention."""
    caches, batch = (key_cache, value_cache), (block_tables, cu_seqlens_q, context_lens)
    _ops_cuda.paged_attention(q, *caches, *batch, scale, *_attention_room(), out, stream())


def decode_attention(
    qkv: View,
    positions: View,
    cos_sin: View,
    slot_mapping: View,
    key_cache: View,
    value_cache: View,
    block_tables: View,
    cu_seqlens_q: View,
    context_lens: View,
    scale: float,
    out: View,
) -> None:
    """See ops.decode_attention."""
    fresh = (qkv, positions, cos_sin, slot_mapping, key_cache, value_cache)
    batch = (block_tables, cu_seqlens_q, context_lens)
    _ops_cuda.decode_new_tokens(*fresh, *batch, scale, *_attention_room(), out, stream())


def _attention_room() -> tuple[int, int, int]:
    """Address and bytes of scratch, and what the kernels count with."""
    room = runtime.SCRATCH_BYTES
    return scratch(room), room, runtime.attention_counters()


# -- sampling -------------------------------------------------------------------------------------


def mask_logits(logits: View, bitmask: View, bitmask_rows: View) -> None:
    """See ops.mask_logits."""
    _ops_cuda.mask_logits(logits, bitmask, bitmask_rows, stream())


def process_logits(
    logits: View,
    slots: View,
    occurrences: View | None,
    repetition: View,
    frequency: View,
    presence: View,
    temperature: View,
    edit_offsets: View,
    edit_ids: View,
    edit_values: View,
) -> None:
    """See ops.process_logits."""
    vectors = (slots, occurrences, repetition, frequency, presence, temperature)
    _ops_cuda.process_logits(logits, *vectors, edit_offsets, edit_ids, edit_values, stream())


def update_occurrences(occurrences: View, slots: View, token_ids: View, prompt: bool) -> None:
    """See ops.update_occurrences."""
    _ops_cuda.update_occurrences(occurrences, slots, token_ids, prompt, stream())


def sample(logits: View, *parameters: View) -> None:
    """See ops.sample. A row of NaN, or of nothing but -inf, gets -1: nothing is read back."""
    arguments: list[Any] = [logits, *parameters, stream()]
    _ops_cuda.sample(*arguments)


def token_logprobs(
    logits: View,
    tokens: View,
    k: int,
    out_logprob: View,
    out_rank: View,
    out_ids: View,
    out_logprobs: View,
) -> None:
    """See ops.token_logprobs."""
    outputs = (out_logprob, out_rank, out_ids, out_logprobs)
    if k <= _ops_cuda.max_top_logprobs:
        _ops_cuda.token_logprobs(logits, tokens, k, *outputs, stream())
        return
    # a request for (nearly) all tokens is a diagnosis: the host sorts
    results = _host_logprobs(_fetch(logits), _fetch(tokens), k)
    for view, result in zip(outputs, results, strict=True):
        host = np.ascontiguousarray(result, view[1])
        _ops_cuda.upload(address(view), host.ctypes.data, host.nbytes, stream())


def _fetch(view: View) -> npt.NDArray[Any]:
    host = np.empty(view[2], view[1])
    _ops_cuda.download(host.ctypes.data, address(view), host.nbytes, stream())
    return host


def _host_logprobs(
    logits: npt.NDArray[Any], tokens: npt.NDArray[Any], k: int
) -> tuple[npt.NDArray[Any], ...]:
    """Log-probability and rank of each token, ids and log-probabilities of the k best."""
    lowest = float(np.finfo(np.float32).min)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    logprobs = np.maximum(logprobs, lowest)
    order = np.argsort(-shifted, axis=1, kind="stable")
    rows = np.arange(len(tokens))
    rank = 1 + (order == tokens[:, None]).argmax(axis=1)
    best = order[:, :k]
    return logprobs[rows, tokens], rank, best, np.take_along_axis(logprobs, best, axis=1)


def randomize_weight(weight: PackedWeight, seed: int) -> None:
    """See ops.randomize_weight."""
    cuda_weights.randomize(weight, seed)
