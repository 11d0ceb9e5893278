"""CUDA ops over tensors on a card; the stream comes last.

Only `fastdeploy_lite.model_executor.ops.cuda_*` and, for the encoders, `quantization.card` call
these. A tensor is a view, whose dtype, shape and contiguity are checked here (ValueError), or where
the argument is an int a plain address, 0 for an absent one: the caller has checked it.
Failures raise RuntimeError naming the op. Every op only queues work on the stream and may be
captured into a graph, but for upload, download, synchronize, time_copy and the functions of pinned
memory, events and graphs.
"""

from collections.abc import Sequence
from typing import TypeAlias

View: TypeAlias = tuple[int, str, Sequence[int], Sequence[int]]
"""Address, dtype name, shape, strides in elements."""

max_top_logprobs: int

class DeviceFacts:
    """What the driver says of a card; sizes in bytes."""

    name: str
    major: int
    minor: int
    multiprocessors: int
    total_bytes: int
    free_bytes: int

class Weight:
    """Sizes and addresses of a tiled weight; kinds: 0 dense, 1 int8, 2 int4, 3 CCQ, 4 wide CCQ."""

    def __init__(
        self,
        kind: int,
        tiles: int,
        local_scale: int,
        code_scale: int,
        code_bias: int,
        column_scale: int,
        in_features: int,
        out_features: int,
    ) -> None: ...
    def hopper_serves(self, scratch_bytes: int) -> bool: ...

hopper_tile: int
"""Row tile of `linear` that stands for Hopper's kernel."""

def device_facts(device: int) -> DeviceFacts: ...
def upload(device: int, host: int, nbytes: int, stream: int) -> None: ...
def download(host: int, device: int, nbytes: int, stream: int) -> None: ...
def copy(to: int, source: int, nbytes: int, stream: int) -> None: ...
def allocate(nbytes: int) -> int: ...
def release(memory: int) -> None: ...
def allocate_pinned(nbytes: int) -> int: ...
def free_pinned(memory: int) -> None: ...
def copy_to_pinned(pinned: int, device: int, nbytes: int, stream: int) -> None: ...
def copy_from_pinned(device: int, pinned: int, nbytes: int, stream: int) -> None: ...
def create_event() -> int: ...
def record_event(event: int, stream: int) -> None: ...
def wait_event(event: int) -> None: ...
def clear(to: int, nbytes: int, stream: int) -> None: ...
def time_copy(to: int, source: int, nbytes: int, repeats: int, stream: int) -> float: ...
def synchronize(stream: int) -> None: ...
def allow_early_start(allowed: bool) -> None: ...
def create_stream() -> int: ...
def follow(stream: int, ahead: int) -> None: ...
def begin_capture(stream: int) -> None: ...
def end_capture(stream: int, discard: bool) -> int: ...
def launch_graph(graph: int, stream: int) -> None: ...
def destroy_graph(graph: int) -> None: ...
def blas_open(path: str) -> None: ...
def nccl_open(path: str) -> None: ...
def nccl_version() -> int: ...
def nccl_unique_id() -> bytes: ...

class NcclGroup:
    """One rank's end of a group of cards, see nccl.h; the constructor waits for all ranks."""

    aborted: bool
    ended: bool

    def __init__(self, id: bytes, rank: int, ranks: int, device: int) -> None: ...
    def share_memory(self) -> bool: ...
    def set_order(self, in_order: bool) -> None: ...
    def set_sharing(self, sharing: bool) -> None: ...
    def all_reduce(
        self, x: int, is_float: bool, count: int, scratch: int, scratch_bytes: int, stream: int
    ) -> None: ...
    def all_gather(
        self,
        x: int,
        rows: int,
        width: int,
        out: int,
        scratch: int,
        scratch_bytes: int,
        stream: int,
    ) -> None: ...
    def abort(self) -> None: ...
    def wait_idle(self, seconds: float, stream: int) -> bool: ...

def sum_of_ranks(
    parts: int, is_float: bool, ranks: int, count: int, out: int, stream: int
) -> None: ...
def side_by_side(parts: int, ranks: int, rows: int, width: int, out: int, stream: int) -> None: ...

class ExpertWeight:
    """Sizes and addresses of quantised experts; codings: 0 CCQ, 1 int4, 2 int8."""

    def __init__(
        self,
        coding: int,
        chunks: int,
        codes: int,
        exact: int,
        column_scale: int,
        experts: int,
        in_features: int,
        out_features: int,
        proven: bool,
    ) -> None: ...

chunk_rows: int

def chunk_bytes(coding: int) -> int: ...
def pack_expert(
    coding: int,
    codes: int,
    local_scale: int,
    chunks: int,
    in_features: int,
    out_features: int,
    stream: int,
) -> None: ...
def fit_columns(exact: int, codes: int, columns: int, unproven: int, stream: int) -> None: ...
def unpack_expert(
    weight: ExpertWeight, expert: int, scaled: bool, out: int, stream: int
) -> None: ...
def tile_bytes(kind: int) -> int: ...
def pack_tiles(
    kind: int,
    source: int,
    source_is_float: bool,
    transposed: bool,
    tiles: int,
    in_features: int,
    out_features: int,
    stream: int,
) -> None: ...
def pack_local_scales(
    source: int, packed: int, in_features: int, out_features: int, stream: int
) -> None: ...
def pack_rows(
    source: int,
    source_is_float: bool,
    transposed: bool,
    out: int,
    in_features: int,
    out_features: int,
    stream: int,
) -> None: ...
def unpack_tiles(weight: Weight, expert: int, scaled: bool, out: int, stream: int) -> None: ...
def randomize(kind: int, data: int, nbytes: int, seed: int, size: float, stream: int) -> None: ...
def embedding(ids: View, table: int, first: int, vocab: int, out: View, stream: int) -> None: ...
def rms_norm(
    x: View,
    also: View | None,
    residual: View | None,
    weight: View,
    eps: float,
    out: View,
    stream: int,
) -> None: ...
def silu_and_mul(x: View, out: View, stream: int) -> None: ...
def add_inplace(x: View, y: View, stream: int) -> None: ...
def gather_rows(x: View, rows: View, out: View, stream: int) -> None: ...
def linear(
    x: View,
    weight: Weight,
    out: View,
    forced_tile: int,
    partial: int,
    partial_bytes: int,
    stream: int,
) -> None: ...
def dense_experts_bytes(
    down: Weight, experts: int, tokens: int, top_k: int, forced_tile: int
) -> int: ...
def dense_experts(
    x: int,
    ids: int,
    weights: int,
    up_gate: Weight,
    down: Weight,
    out: int,
    experts: int,
    tokens: int,
    top_k: int,
    forced_tile: int,
    memory: int,
    stream: int,
) -> None: ...
def experts_bytes(
    up: ExpertWeight, down: ExpertWeight, tokens: int, top_k: int, path: int, same_bits: bool
) -> tuple[int, int]: ...
def experts(
    x: int,
    ids: int,
    weights: int,
    up: ExpertWeight,
    down: ExpertWeight,
    out: int,
    tokens: int,
    top_k: int,
    path: int,
    same_bits: bool,
    memory: int,
    state: int,
    stream: int,
) -> None: ...
def dense_linear(
    x: View, rows: int, out: View, workspace: int, workspace_bytes: int, stream: int
) -> None: ...
def route_bytes(tokens: int, hidden: int, experts: int) -> int: ...
def route(
    x: View,
    gate: View,
    bias: View | None,
    ids: View,
    weights: View,
    partial: int,
    stream: int,
) -> None: ...

attention_counter_bytes: int

def rope_and_cache(
    qkv: View,
    positions: View,
    cos_sin: View,
    slot_mapping: View,
    key_cache: View,
    value_cache: View,
    q_out: View,
    stream: int,
) -> None: ...
def paged_attention(
    q: View,
    key_cache: View,
    value_cache: View,
    block_tables: View,
    cu_seqlens_q: View,
    context_lens: View,
    scale: float,
    partial: int,
    partial_bytes: int,
    counters: int,
    out: View,
    stream: int,
) -> None: ...
def decode_new_tokens(
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
    partial: int,
    partial_bytes: int,
    counters: int,
    out: View,
    stream: int,
) -> None: ...
def mask_logits(logits: View, bitmask: View, rows: View, stream: int) -> None: ...
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
    stream: int,
) -> None: ...
def update_occurrences(
    occurrences: View, slots: View, ids: View, prompt: bool, stream: int
) -> None: ...
def sample(
    logits: View,
    temperature: View,
    top_k: View,
    top_p: View,
    min_p: View,
    seeds: View,
    steps: View,
    forced: View,
    out: View,
    stream: int,
) -> None: ...
def token_logprobs(
    logits: View,
    tokens: View,
    k: int,
    out_logprob: View,
    out_rank: View,
    out_ids: View,
    out_logprobs: View,
    stream: int,
) -> None: ...

bad_column: int

class EncodeInput:
    """A matrix on the card and the codes among which its columns choose."""

    def __init__(
        self,
        weight: int,
        is_float: bool,
        row_of: int,
        rows: int,
        columns: int,
        books: int,
        codes: int,
        factors: Sequence[float],
    ) -> None: ...

def encode_plain_bytes(rows: int, columns: int, codes: int) -> int: ...
def encode_hessian_bytes(rows: int, columns: int, codes: int) -> int: ...
def encode_plain(
    given: EncodeInput, refinements: int, result: Sequence[int], scratch: int, stream: int
) -> None: ...
def encode_hessian(
    given: EncodeInput,
    terms: Sequence[int],
    candidates: int,
    descents: int,
    result: Sequence[int],
    scratch: int,
    stream: int,
) -> None: ...
def hessian_terms(terms: Sequence[int], size: int, wide: int, status: int, stream: int) -> None: ...
def blend_moments(
    first: int,
    first_share: float,
    second: int,
    second_share: float,
    size: int,
    damping: float,
    mean: int,
    mixed: int,
    status: int,
    stream: int,
) -> None: ...
def multiply(
    a: int,
    lda: int,
    transposed: bool,
    b: int,
    ldb: int,
    c: int,
    ldc: int,
    rows: int,
    columns: int,
    depth: int,
    accumulate: bool,
    stream: int,
) -> None: ...

inner_parts: int

def factorize(hessian: int, size: int, wide: int, status: int, stream: int) -> None: ...
def solve(
    upper: int,
    size: int,
    right: int,
    divisor: float,
    columns: int,
    wide: int,
    solution: int,
    stream: int,
) -> None: ...
def swiglu(both: int, weight: int, tokens: int, width: int, out: int, stream: int) -> None: ...
def permute_moments(source: int, row_of: int, size: int, to: int, stream: int) -> None: ...
def inner_product(a: int, b: int, count: int, parts: int, total: int, stream: int) -> None: ...
