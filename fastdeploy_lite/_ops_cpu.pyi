"""Native CPU kernels. Every op writes into the views that it is given and releases the GIL.

A view is (address, dtype name, shape, strides in elements) of memory that the caller keeps alive.
`fastdeploy_lite.model_executor.ops` holds the documented functions; call those.
"""

from collections.abc import Sequence
from typing import TypeAlias

View: TypeAlias = tuple[int, str, Sequence[int], Sequence[int]]

# --- system -------------------------------------------------------------------------------------
def cpu_quota(groups: str, root: str) -> int: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def fold_memory(data: View) -> int: ...

# --- rows: norms, activation, gathers ------------------------------------------------------------
def rms_norm(x: View, weight: View, eps: float, out: View) -> None: ...
def add_rms_norm(x: View, residual: View, weight: View, eps: float, out: View) -> None: ...
def silu_and_mul(x: View, out: View) -> None: ...
def add_inplace(x: View, y: View) -> None: ...
def gather_rows(x: View, rows: View, out: View) -> None: ...
def exponential(x: View, out: View) -> None: ...

# --- attention ----------------------------------------------------------------------------------
def rope_and_cache(
    qkv: View,
    positions: View,
    cos_sin: View,
    slot_mapping: View,
    key_cache: View,
    value_cache: View,
    q_out: View,
) -> None: ...
def paged_attention(
    q: View,
    key_cache: View,
    value_cache: View,
    block_tables: View,
    cu_seqlens_q: View,
    context_lens: View,
    scale: float,
    out: View,
) -> None: ...

# --- sampling -----------------------------------------------------------------------------------
def mask_logits(logits: View, bitmask: View, bitmask_rows: View) -> None: ...
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
) -> None: ...
def update_occurrences(occurrences: View, slots: View, token_ids: View, prompt: bool) -> None: ...
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
) -> None: ...
def token_logprobs(
    logits: View,
    tokens: View,
    k: int,
    out_logprob: View,
    out_rank: View,
    out_ids: View,
    out_logprobs: View,
) -> None: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...

# --- packed weights, linear maps, mixture of experts ----------------------------------------------
class PackedWeight:
    """Addresses of a packed weight's parts; owns nothing."""

    def __init__(
        self,
        kind: str,
        in_features: int,
        out_features: int,
        experts: int,
        data: int = ...,
        scale: int = ...,
        code_scale: int = ...,
        code_offset: int = ...,
    ) -> None: ...
    @property
    def data_bytes(self) -> int: ...
    @property
    def padded_columns(self) -> int: ...

def pack_dense(weight: PackedWeight, expert: int, source: View, transposed: bool) -> None: ...
def pack_int8(weight: PackedWeight, expert: int, source: View, scale: View) -> None: ...
def pack_int4(weight: PackedWeight, expert: int, source: View, scale: View) -> None: ...
def pack_ccq(
    weight: PackedWeight,
    expert: int,
    packed: View,
    local_scale: View,
    super_scale: View,
    code_scale: View,
    code_zp: View,
) -> None: ...
def linear(x: View, weight: PackedWeight, out: View) -> None: ...
def embedding(token_ids: View, weight: PackedWeight, out: View) -> None: ...
def embedding_share(token_ids: View, weight: PackedWeight, first: int, out: View) -> None: ...
def route(
    x: View, gate_weight: View, bias: View | None, topk_ids: View, topk_weights: View
) -> None: ...
def moe_workspace_bytes(
    tokens: int, top_k: int, up_gate: PackedWeight, down: PackedWeight
) -> int: ...
def fused_moe(
    x: View,
    topk_ids: View,
    topk_weights: View,
    up_gate: PackedWeight,
    down: PackedWeight,
    out: View,
    workspace: View,
) -> None: ...

# --- speculation --------------------------------------------------------------------------------
class SuffixDraft:
    @property
    def tokens(self) -> list[int]: ...
    @property
    def shares(self) -> list[float]: ...
    @property
    def matched(self) -> int: ...

class SuffixIndex:
    def __init__(self) -> None: ...
    def start_sequence(self) -> None: ...
    def extend(self, tokens: Sequence[int]) -> None: ...
    def propose_repeat(self, most: int, least_share: float) -> SuffixDraft: ...
    def propose(self, context: Sequence[int], most: int, least_share: float) -> SuffixDraft: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

# --- the encoder: bytes of a run of blocks ------------------------------------------------------
def code_search(
    target: View,
    weight: View,
    before: View | None,
    metric: View,
    feedback: View | None,
    books: View,
    code: View,
    scales: View,
    error: View,
    packed: View,
    choice: View,
    loss: View,
) -> None: ...

# --- ranks: sums and gathers between processes --------------------------------------------------
class RankGroup:
    def __init__(self, memory: int, rank: int, ranks: int, floats: int) -> None: ...
    @staticmethod
    def bytes(ranks: int, floats: int) -> int: ...
    def all_reduce(self, x: View, seconds: float) -> int: ...
    def all_gather(self, x: View, widths: Sequence[int], out: View, seconds: float) -> int: ...
    def agree(self, sound: bool, seconds: float) -> int: ...
    def advance(self) -> None: ...
    def fail(self) -> None: ...
    def lose(self) -> None: ...
    def is_lost(self) -> bool: ...
    def is_failing(self) -> bool: ...
    def arrivals(self) -> list[int]: ...
