"""What is in a model folder, without loading it: headers, a few sampled tensors, contradictions.

Nothing here raises for a damaged folder: what cannot be read is a line among the problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import inventory, row_order
from fastdeploy_lite.checkpoint.location import rank_numbers
from fastdeploy_lite.checkpoint.reader import Checkpoint, open_folders
from fastdeploy_lite.formats.ccq import decode_codes
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.models.sharding import obstacle
from fastdeploy_lite.utils.errors import FastDeployError

_MOST_PROBLEMS, _MOST_UNKNOWN = 20, 20
_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16)
_SAMPLED_COLUMNS, _SAMPLED_ROWS = 256, 1024
_SIDE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_Found = TypeVar("_Found")


@dataclass
class Stack:
    """Linears of one role and format in neighbouring layers: layers first to last, inclusive."""

    role: str
    format: str
    first_layer: int
    last_layer: int
    linears: int
    bits_per_weight: float
    nbytes: int
    deviation: float | None = None


@dataclass
class Inspection:
    """See `inspect`; `problems` stop a load, `remarks` do not."""

    folder: str
    architecture: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    spelling: str = ""
    rank_folders: int = 0
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    stacks: list[Stack] = field(default_factory=list)
    row_order: str | None = None
    row_order_reason: str = ""
    tensor_parallel_sizes: list[int] = field(default_factory=list)
    tied_by_config: bool | None = None
    head: str = ""
    embedding: str = ""
    scale_dtypes: dict[str, int] = field(default_factory=dict)
    draft_tensors: int = 0
    side_files: list[str] = field(default_factory=list)
    missing_side_files: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)


def inspect(folder: str | Path, config_name: str = "config.json") -> Inspection:
    """Describe a model folder; damaged ones too."""
    root = Path(folder)
    found = Inspection(str(root))
    found.side_files = [name for name in _SIDE_FILES if (root / name).is_file()]
    found.missing_side_files = [n for n in _SIDE_FILES if n not in found.side_files]
    config = _attempt(found, lambda: ModelConfig.from_dir(root, config_name))
    if config is None:
        return found
    _describe_config(found, config)
    folders = _attempt(found, lambda: open_folders(root, 1, 0, config_name))
    if folders is None:
        return found
    found.rank_folders = len(rank_numbers(root))
    _describe_files(found, folders)
    for one in folders:
        found.problems += list(inventory.find_problems(one))[:_MOST_PROBLEMS]
    if not found.problems:
        _describe_weights(found, folders)
    return found


def _attempt(found: Inspection, action: Callable[[], _Found]) -> _Found | None:
    try:
        return action()
    except (FastDeployError, OSError) as error:
        found.problems.append(str(error))
        return None


def _describe_config(found: Inspection, config: ModelConfig) -> None:
    found.architecture = next(iter(config.raw.get("architectures") or []), "")
    found.sizes = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate": config.intermediate_size,
        "experts": config.moe_num_experts,
        "experts_per_token": config.moe_k,
        "expert_intermediate": config.moe_intermediate_size,
        "shared_experts": config.moe_num_shared_experts,
        "first_moe_layer": config.moe_layer_start_index,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
    }
    tied = config.raw.get("tie_word_embeddings")
    found.tied_by_config = tied if isinstance(tied, bool) else None
    found.tensor_parallel_sizes = [
        size for size in _TENSOR_PARALLEL_SIZES if obstacle(config, size) is None
    ]


def _describe_files(found: Inspection, folders: list[Checkpoint]) -> None:
    first, family = folders[0], folders[0].config.family
    found.spelling = first.spelling
    found.tensors = sum(len(one) for one in folders)
    found.nbytes = sum(one.nbytes for one in folders)
    found.files = len({one.info(key).file for one in folders for key in one})
    found.draft_tensors = sum("mtp_" in key for one in folders for key in one)
    for name, key in (("head", family.head_key), ("embedding", family.embedding_key)):
        setattr(found, name, first.info(key).describe() if key in first else "none")
    dtypes = Counter(
        first.info(key).dtype for key in first if key.endswith(("weight_scale", "super_scales"))
    )
    found.scale_dtypes = dict(sorted(dtypes.items()))
    found.remarks += [line for one in folders for line in inventory.contradictions(one)]
    if found.rank_folders > 1:
        found.tensor_parallel_sizes = [
            size
            for size in found.tensor_parallel_sizes
            if found.rank_folders % size == 0 or size % found.rank_folders == 0
        ]


def _describe_weights(found: Inspection, folders: list[Checkpoint]) -> None:
    unused = sorted({key for one in folders for key in inventory.unknown_keys(one)})
    found.unused = unused[:_MOST_UNKNOWN]
    if len(unused) > _MOST_UNKNOWN:
        found.unused.append(f"and {len(unused) - _MOST_UNKNOWN} more")
    found.stacks = _stacks(folders)
    for stack in found.stacks:
        _attempt(found, lambda stack=stack: _sample(found, folders[0], stack))  # type: ignore[misc]
    decision = _attempt(found, lambda: row_order.decide(folders[0], doubts_key=True))
    if decision is not None:
        found.row_order, found.row_order_reason = decision.order, decision.reason
        found.remarks += [decision.warning] if decision.warning else []


def _stacks(folders: list[Checkpoint]) -> list[Stack]:
    stacks: dict[tuple[str, str], list[Stack]] = {}
    for checkpoint in folders:
        for linear in inventory.rank_linears(checkpoint):
            kind = inventory.resolve_kind(checkpoint, linear)
            role = ("expert " if linear.expert is not None else "") + linear.role
            runs = stacks.setdefault((role, kind), [])
            run = next((r for r in runs if r.first_layer <= linear.layer <= r.last_layer + 1), None)
            if run is None:
                run = Stack(role, kind, linear.layer, linear.layer, 0, 0.0, 0)
                runs.append(run)
            run.last_layer = max(run.last_layer, linear.layer)
            run.linears += 1
            weights = linear.in_features * linear.out_features
            nbytes = formats.get(kind).nbytes(linear.in_features, linear.out_features)
            run.nbytes += nbytes
            run.bits_per_weight = 8 * nbytes / weights
    return [run for runs in stacks.values() for run in runs]


def _sample(found: Inspection, checkpoint: Checkpoint, stack: Stack) -> None:
    """Decode part of one matrix: its deviation, and values that its format should not have."""
    linear = next(
        one for one in inventory.rank_linears(checkpoint) if _is_of(checkpoint, one, stack)
    )
    read = inventory.read_linear(checkpoint, linear)
    format_, arrays = formats.get(read.kind), read.arrays
    rows, columns = format_.shape(arrays)
    arrays = format_.slice_columns(arrays, [(0, min(columns, _SAMPLED_COLUMNS))])
    arrays = format_.slice_rows(arrays, 0, min(rows, _SAMPLED_ROWS))
    with np.errstate(all="ignore"):  # scales may be finite and still too large for float32
        deviation = float(format_.decode(arrays).std())
    stack.deviation = deviation if np.isfinite(deviation) else None
    if stack.deviation is None:
        found.remarks.append(f"{linear.module}: values beyond float32")
    if stack.deviation == 0:
        found.remarks.append(f"{linear.module}: the first columns are all zero")
    if read.kind == "int8" and (arrays["quant_weight"].view(np.uint8) == 0).any():
        found.remarks.append(f"{linear.module}: bytes of 0 (-128), which no quantiser writes")
    if read.kind == "ccq":
        names = ("quant_weight", "code_scale", "code_zp")
        codes = decode_codes(*(arrays[name] for name in names))
        if codes.min() < -(1 << 15) or codes.max() >= 1 << 16:
            found.remarks.append(f"{linear.module}: codes from {codes.min()} to {codes.max()}")
    checkpoint.release()


def _is_of(checkpoint: Checkpoint, linear: Linear, stack: Stack) -> bool:
    role = ("expert " if linear.expert is not None else "") + linear.role
    return (
        role == stack.role
        and stack.first_layer <= linear.layer <= stack.last_layer
        and inventory.resolve_kind(checkpoint, linear) == stack.format
    )
