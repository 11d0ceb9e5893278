"""Native ops as Python functions: checks, shapes, dispatch by place.

Every function takes Paddle tensors on one place, writes into the tensors it is told to and returns
None. A missing native module raises RuntimeError that says how to build it; nothing falls back.
"""

from fastdeploy_lite.model_executor.ops._view import fix
from fastdeploy_lite.model_executor.ops.activation import add_inplace, gather_rows, silu_and_mul
from fastdeploy_lite.model_executor.ops.attention import (
    decode_attention,
    paged_attention,
    rope_and_cache,
)
from fastdeploy_lite.model_executor.ops.dense import embedding, embedding_share, linear
from fastdeploy_lite.model_executor.ops.dummy import randomize_weight
from fastdeploy_lite.model_executor.ops.host_link import HostLink
from fastdeploy_lite.model_executor.ops.moe import BoundExperts, fused_moe, route
from fastdeploy_lite.model_executor.ops.norm import add_rms_norm, rms_norm
from fastdeploy_lite.model_executor.ops.packed_weight import (
    ExpertWeight,
    HostWeight,
    PackedWeight,
    SegmentedWeight,
    Weight,
)
from fastdeploy_lite.model_executor.ops.sampling import (
    SAMPLE_ROWS,
    best_logits,
    mask_logits,
    process_logits,
    sample,
    token_logprobs,
    update_occurrences,
)
from fastdeploy_lite.model_executor.ops.segments import (
    routed_experts,
    segmented_linear,
    segmented_moe,
)
from fastdeploy_lite.model_executor.ops.transfer import (
    Branch,
    Mirror,
    announce_step,
    branch,
    clear,
    download,
    host_array,
    memory_info,
    mirror,
    narrow,
    own_scratch,
    upload,
    widen,
)
from fastdeploy_lite.model_executor.ops.weights import (
    adopt_weight,
    allocate_weight,
    element_of,
    fill_weight,
    finish_weight,
    layout_probe,
    packed_arrays,
    set_activation_bits,
)

__all__ = [
    "SAMPLE_ROWS",
    "BoundExperts",
    "Branch",
    "ExpertWeight",
    "HostLink",
    "HostWeight",
    "Mirror",
    "PackedWeight",
    "SegmentedWeight",
    "Weight",
    "add_inplace",
    "add_rms_norm",
    "adopt_weight",
    "allocate_weight",
    "announce_step",
    "best_logits",
    "branch",
    "clear",
    "decode_attention",
    "download",
    "element_of",
    "embedding",
    "embedding_share",
    "fill_weight",
    "finish_weight",
    "fix",
    "fused_moe",
    "gather_rows",
    "host_array",
    "layout_probe",
    "linear",
    "mask_logits",
    "memory_info",
    "mirror",
    "narrow",
    "own_scratch",
    "packed_arrays",
    "paged_attention",
    "process_logits",
    "randomize_weight",
    "rms_norm",
    "rope_and_cache",
    "route",
    "routed_experts",
    "sample",
    "segmented_linear",
    "segmented_moe",
    "set_activation_bits",
    "silu_and_mul",
    "token_logprobs",
    "update_occurrences",
    "upload",
    "widen",
]
