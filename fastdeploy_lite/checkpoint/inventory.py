"""What a checkpoint must hold for its config.json, checked as a whole and read piece by piece.

`verify` compares every expected key, dtype and shape with the file headers before any data is
read. `read_linear`, `read_vector`, `read_embedding` and `read_lm_head` then return one rank's
arrays in the form in which the native ops take them, whatever spelling the files use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint.linears import Linear, check_tensor_parallel, model_linears
from fastdeploy_lite.checkpoint.reader import Checkpoint, Shape, check_finite, describe_expected
from fastdeploy_lite.checkpoint.tensor import Array, HostTensor
from fastdeploy_lite.formats import Arrays
from fastdeploy_lite.models.sharding import Shard
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.errors import CheckpointError

log = logging.getLogger(__name__)

_DENSE = ("BF16", "F32")
_MOST_PROBLEMS = 1000  # counted, not shown; a damaged config.json can expect millions of tensors


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor that must be there. `aliases` are other keys under which it is accepted."""

    key: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Last part of the key: `quant_weight`, `super_scales`, ..."""
        return self.key.rsplit(".", 1)[1]


@dataclass(frozen=True, eq=False)
class LinearArrays:
    """One linear's weights on the host, in file layout; `formats` says what `arrays` are."""

    kind: WeightKind
    arrays: Arrays


def verify(checkpoint: Checkpoint) -> None:
    """Check every expected tensor; raise one CheckpointError with the first problem and a count."""
    config, size = checkpoint.config, checkpoint.tensor_parallel_size
    if size > 1 and not checkpoint.is_presharded:
        check_tensor_parallel(config, size)
    problems = list(islice(find_problems(checkpoint), _MOST_PROBLEMS))
    if problems:
        # Impossible sizes in config.json explain the tensors that do not fit them.
        problems.sort(key=lambda problem: not problem.startswith(config.source))
        rest = len(problems) - 1
        more = f" (and {rest}{'+' if len(problems) == _MOST_PROBLEMS else ''} more problems)"
        raise CheckpointError(problems[0] + (more if rest else ""))
    for line in contradictions(checkpoint):
        log.warning(line)
    _log_unknown_keys(checkpoint)


def check_plain_values(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if what is never quantised holds a NaN or an infinity; reads it all."""
    for expected in expected_plain_tensors(checkpoint):
        _fetch(checkpoint, expected, finite=True)
    checkpoint.release()


def check_dense_values(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a NaN or an infinity in the linears of an unquantised model.

    Reads the whole model, at 0.2 ns a value: for those who would find it after hours.
    """
    for linear in file_linears(checkpoint):
        for expected in expected_linear_tensors(checkpoint, linear, "dense"):
            _fetch(checkpoint, expected, finite=True)
        checkpoint.release()


def find_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield one line per missing, mis-shaped, mis-typed or contradictory tensor."""
    yield from _layer_problems(checkpoint)
    yield from _bias_problems(checkpoint)
    for expected in expected_plain_tensors(checkpoint):
        yield from _compare(checkpoint, expected)
    first_kinds: dict[tuple[int, str], WeightKind] = {}
    for linear in file_linears(checkpoint):
        kind = resolve_kind(checkpoint, linear)
        # One native weight holds all experts of a layer, so they share a format.
        stack = (linear.layer, linear.role if linear.expert is not None else linear.module)
        first = first_kinds.setdefault(stack, kind)
        if first != kind:
            yield (
                f"{checkpoint.source}: {linear.module}: found {kind} weights, expected {first}"
                " as in the layer's first expert"
            )
            continue
        size_problem = linear.size_problem(kind)
        if size_problem:
            yield f"{checkpoint.config.source}: {size_problem}"
            continue
        for expected in expected_linear_tensors(checkpoint, linear, kind):
            yield from _compare(checkpoint, expected)


def file_linears(checkpoint: Checkpoint) -> Iterator[Linear]:
    """Yield the linears with the sizes that the files have (whole, or one rank's)."""
    if checkpoint.is_presharded:
        return model_linears(checkpoint.config, checkpoint.tensor_parallel_size, checkpoint.rank)
    return model_linears(checkpoint.config)


def rank_linears(checkpoint: Checkpoint) -> Iterator[Linear]:
    """Yield the linears with the sizes that this rank computes with."""
    return model_linears(checkpoint.config, checkpoint.tensor_parallel_size, checkpoint.rank)


def other_half(checkpoint: Checkpoint, linear: Linear) -> Linear:
    """Return the down projection that follows an expert's gate and up projection."""
    family, config = checkpoint.config.family, checkpoint.config
    assert linear.expert is not None
    module = family.expert_module(linear.layer, linear.expert, "down_proj")
    shard = Shard(config, checkpoint.tensor_parallel_size, checkpoint.rank)
    prefix = module.removesuffix(".down_proj")
    width, kind = linear.segments[0], linear.kind
    return shard.mlp(prefix, linear.layer, width, kind, linear.expert)[1]


def resolve_kind(checkpoint: Checkpoint, linear: Linear) -> WeightKind:
    """Return the format of a linear's weights: config.json's, corrected by what the files hold.

    For routed experts the key `.super_scales` means ccq on any layer. Without it, a configured
    ccq is int4 if the bytes are as many as int4 needs (twice those of ccq).
    """
    if linear.expert is None or linear.kind == "dense":
        return linear.kind
    module = linear.module
    if any(f"{module}.{name}" in checkpoint for name in ("super_scales", "super_scale")):
        return "ccq"
    weight = f"{module}.quant_weight"
    if linear.kind == "ccq" and weight in checkpoint:
        in_file = linear if checkpoint.is_presharded else linear.whole()
        if checkpoint.info(weight).nbytes == in_file.in_features * in_file.out_features // 2:
            return "int4"
    return linear.kind


def expected_plain_tensors(checkpoint: Checkpoint) -> Iterator[ExpectedTensor]:
    """Yield the tensors that are never quantised: embedding, norms, router, head."""
    config = checkpoint.config
    for plain in config.family.plain_tensors(config, _file_vocab_size(checkpoint)):
        if plain.key != config.family.head_key or _has_head(checkpoint):
            yield ExpectedTensor(plain.key, _DENSE, plain.shapes)


def expected_linear_tensors(
    checkpoint: Checkpoint, linear: Linear, kind: WeightKind
) -> Iterator[ExpectedTensor]:
    """Yield the tensors of one linear of `file_linears`, under the names that the files use."""
    module, k, n = linear.module, linear.in_features, linear.out_features
    if kind == "dense":
        if f"{module}.weight" in checkpoint or not _has_parts(checkpoint, linear):
            yield ExpectedTensor(f"{module}.weight", _DENSE, ((k, n),))
            return
        for part, width in linear.parts:
            yield ExpectedTensor(f"{part}.weight", _DENSE, ((k, width),))
        return
    for spec in formats.get(kind).tensors(k, n):
        first, *aliases = (f"{module}.{suffix}" for suffix in spec.suffixes)
        yield ExpectedTensor(first, spec.dtypes, spec.shapes, tuple(aliases))


def expected_nbytes(checkpoint: Checkpoint) -> int:
    """Return the bytes in files of all tensors that will be read (for progress bars)."""
    return plain_nbytes(checkpoint) + _linear_nbytes(checkpoint)


def plain_nbytes(checkpoint: Checkpoint) -> int:
    """Return the bytes in files of what is never quantised: embedding, norms, router, head."""
    return sum(checkpoint.info(e.key).nbytes for e in expected_plain_tensors(checkpoint))


def _linear_nbytes(checkpoint: Checkpoint) -> int:
    keys = []
    for linear in file_linears(checkpoint):
        kind = resolve_kind(checkpoint, linear)
        for expected in expected_linear_tensors(checkpoint, linear, kind):
            keys.append(_actual_key(checkpoint, expected) or expected.key)
    return sum(checkpoint.info(key).nbytes for key in keys)


def read_linear(checkpoint: Checkpoint, linear: Linear) -> LinearArrays:
    """Return this rank's arrays of `linear` (one of `rank_linears`).

    Zero-copy where the files hold just that; fused from separate q/k/v or gate/up tensors and cut
    for tensor parallelism otherwise. Scales and dense weights are checked to be finite. Raises
    CheckpointError.
    """
    in_file = linear if _holds_ranks(checkpoint) else linear.whole()
    kind = resolve_kind(checkpoint, linear)
    expected = list(expected_linear_tensors(checkpoint, in_file, kind))
    if kind == "dense":
        tensors = [_fetch(checkpoint, e) for e in expected]
        if in_file is not linear:
            tensors = _cut_dense(tensors, linear)
        for tensor in tensors:
            check_finite(tensor)
        return LinearArrays(kind, {"weight": _fuse(tensors)})
    arrays: Arrays = {e.name: _quantized_array(_fetch(checkpoint, e)) for e in expected}
    _check_values(checkpoint, linear.module, kind, arrays)
    if in_file is not linear:
        arrays = _cut(kind, arrays, linear)
    return LinearArrays(kind, arrays)


def read_vector(checkpoint: Checkpoint, key: str, size: int) -> npt.NDArray[np.float32]:
    """Return a tensor of [size] or [1, size] elements, such as a norm weight, finite, float32."""
    tensor = checkpoint.expect(key, _DENSE, ((size,), (1, size)), finite=True)
    return tensor.float32().reshape(-1)


def read_router(
    checkpoint: Checkpoint, layer: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Return a MoE layer's gate weight [H, E] and selection bias [E] (None without one)."""
    config = checkpoint.config
    key, bias_key = config.family.router_keys(config, layer)
    experts = config.moe_num_experts
    shape = (config.hidden_size, experts)
    gate = checkpoint.expect(key, _DENSE, shape, finite=True).float32()
    if bias_key is None:
        return gate, None
    return gate, read_vector(checkpoint, bias_key, experts)


def read_embedding(checkpoint: Checkpoint) -> Array:
    """Return the embedding table [V, H], bf16 bits (uint16) or float32: this rank's rows."""
    shape = (_file_vocab_size(checkpoint), checkpoint.config.hidden_size)
    key = checkpoint.config.family.embedding_key
    table = checkpoint.expect(key, _DENSE, shape)
    return _finite_part(table, (_vocab_slice(checkpoint),))


def read_lm_head(checkpoint: Checkpoint) -> tuple[Array, bool] | None:
    """Return (head, transposed) for this rank, or None if the embedding table is the head.

    The array is [H, V], or [V, H] if `transposed`; bf16 bits (uint16) or float32. A head in the
    files is used even where config.json says that it is tied.
    """
    key, hidden = checkpoint.config.family.head_key, checkpoint.config.hidden_size
    if not _has_head(checkpoint):
        return None
    vocab = _file_vocab_size(checkpoint)
    shapes = ((hidden, vocab), (vocab, hidden))
    head = checkpoint.expect(key, _DENSE, shapes)
    transposed = head.shape != (hidden, vocab)
    part = _vocab_slice(checkpoint)
    return _finite_part(head, (part,) if transposed else (slice(None), part)), transposed


def _finite_part(tensor: HostTensor, part: tuple[slice, ...]) -> Array:
    """Cut before anything is read: other ranks' pages stay in the file."""
    cut = replace(tensor, data=tensor.data[part])
    check_finite(cut)
    return cut.data


def _has_head(checkpoint: Checkpoint) -> bool:
    """Whether there is a head of its own: what files have decides, config.json is often wrong."""
    return checkpoint.config.family.head_key in checkpoint


def contradictions(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield one line for each key of config.json that the files prove wrong, harmlessly."""
    config, key = checkpoint.config, checkpoint.config.family.head_key
    said = config.raw.get("tie_word_embeddings")
    if said is True and key in checkpoint:
        yield (
            f"{config.source}: tie_word_embeddings is true, but {checkpoint.source} has {key}:"
            " it is used"
        )
    if said is False and key not in checkpoint:
        yield (
            f"{config.source}: tie_word_embeddings is false, but {checkpoint.source} has no {key}:"
            " the embedding table is used in its place"
        )


def _holds_ranks(checkpoint: Checkpoint) -> bool:
    """Whether the files hold just what a rank needs: pre-sharded, or only one rank."""
    return checkpoint.is_presharded or checkpoint.tensor_parallel_size == 1


def _file_vocab_size(checkpoint: Checkpoint) -> int:
    """Rows of the tables in the files: a rank's share, but some ranks have them whole."""
    config = checkpoint.config
    key = config.family.embedding_key
    share = config.vocab_size // checkpoint.tensor_parallel_size
    if not checkpoint.is_presharded:
        return config.vocab_size
    if key in checkpoint and checkpoint.info(key).shape[:1] == (config.vocab_size,):
        return config.vocab_size
    return share


def _vocab_slice(checkpoint: Checkpoint) -> slice:
    size = checkpoint.config.vocab_size
    if checkpoint.tensor_parallel_size == 1 or _file_vocab_size(checkpoint) != size:
        return slice(None)
    share = checkpoint.config.vocab_size // checkpoint.tensor_parallel_size
    return slice(checkpoint.rank * share, (checkpoint.rank + 1) * share)


def _has_parts(checkpoint: Checkpoint, linear: Linear) -> bool:
    return any(f"{part}.weight" in checkpoint for part, _ in linear.parts)


def _actual_key(checkpoint: Checkpoint, expected: ExpectedTensor) -> str | None:
    return next((key for key in (expected.key, *expected.aliases) if key in checkpoint), None)


def _fetch(checkpoint: Checkpoint, expected: ExpectedTensor, finite: bool = False) -> HostTensor:
    key = _actual_key(checkpoint, expected) or expected.key
    return checkpoint.expect(key, expected.dtypes, expected.shapes, finite)


def _fuse(tensors: list[HostTensor]) -> Array:
    """Concatenate separately stored linears along N; one is returned as it is."""
    if len(tensors) == 1:
        return tensors[0].data
    if len({tensor.dtype for tensor in tensors}) == 1:
        return np.concatenate([tensor.data for tensor in tensors], axis=1)
    return np.concatenate([tensor.float32() for tensor in tensors], axis=1)


def _quantized_array(tensor: HostTensor) -> Array:
    if tensor.data.dtype.itemsize == 1:  # codes, 4-bit scales
        return tensor.data.view(np.uint8)
    check_finite(tensor)
    return tensor.float32()


def _check_values(checkpoint: Checkpoint, module: str, kind: WeightKind, arrays: Arrays) -> None:
    try:
        formats.get(kind).check(arrays)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {module}.{error}") from None


def _cut_dense(tensors: list[HostTensor], linear: Linear) -> list[HostTensor]:
    """Cut whole bf16 tensors before anything reads them: other ranks' pages stay in the file."""
    if linear.is_row_split:
        rows = slice(*linear.row_range)
        return [replace(tensor, data=tensor.data[rows]) for tensor in tensors]
    if len(tensors) == 1:
        return [
            replace(tensors[0], data=tensors[0].data[:, start:stop])
            for start, stop in linear.column_ranges
        ]
    starts = (0, *accumulate(linear.segments))
    return [
        replace(tensor, data=tensor.data[:, start - at : stop - at])
        for tensor, at, (start, stop) in zip(tensors, starts, linear.column_ranges, strict=False)
    ]


def _cut(kind: WeightKind, arrays: Arrays, linear: Linear) -> Arrays:
    format_ = formats.get(kind)
    if linear.is_row_split:
        return format_.slice_rows(arrays, *linear.row_range)
    return format_.slice_columns(arrays, linear.column_ranges)


def _compare(checkpoint: Checkpoint, expected: ExpectedTensor) -> Iterator[str]:
    wanted = describe_expected(expected.dtypes, expected.shapes)
    key = _actual_key(checkpoint, expected)
    if key is None:
        hint = _missing_hint(checkpoint, expected.key)
        yield f"{checkpoint.source}: {expected.key}: found nothing, expected {wanted}{hint}"
        return
    info = checkpoint.info(key)
    if info.dtype not in expected.dtypes or info.shape not in expected.shapes:
        is_transposed = info.shape[::-1] in expected.shapes and info.dtype in _DENSE
        hint = " (transposed)" if is_transposed else ""
        yield f"{info.file}: {info.key}: found {info.describe()}, expected {wanted}{hint}"


def _missing_hint(checkpoint: Checkpoint, key: str) -> str:
    module, _, name = key.rpartition(".")
    other = {"weight": "quant_weight", "quant_weight": "weight"}.get(name)
    if other is None or f"{module}.{other}" not in checkpoint:
        return ""
    verb = "has no" if name == "weight" else "has a"
    return f" (there is .{other} instead, but config.json {verb} quantization_config for it)"


def _layer_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Files with more layers than config.json runs would load, and answer with noise."""
    config = checkpoint.config
    held = {config.family.layer_of(key) for key in checkpoint} - {None}
    last = max((layer for layer in held if layer is not None), default=-1)
    if last >= config.layers_in_files:
        yield (
            f"{config.source}: num_hidden_layers: found {config.layers_in_files}, but"
            f" {checkpoint.source} holds layer {last}: expected {last + 1}"
        )


def _bias_problems(checkpoint: Checkpoint) -> Iterator[str]:
    for key in checkpoint:
        if key.endswith(("_proj.bias", "norm.bias", "lm_head.bias")) and "mtp" not in key:
            yield f"{checkpoint.info(key).file}: {key}: biases are not supported"


def _log_unknown_keys(checkpoint: Checkpoint) -> None:
    if log.isEnabledFor(logging.DEBUG):
        for key in unknown_keys(checkpoint):
            log.debug("%s: %s is not used", checkpoint.source, key)


def unknown_keys(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the tensors that loading does not use."""
    known = {e.key for e in expected_plain_tensors(checkpoint)}
    for linear in file_linears(checkpoint):
        kind = resolve_kind(checkpoint, linear)
        for expected in expected_linear_tensors(checkpoint, linear, kind):
            known.add(_actual_key(checkpoint, expected) or expected.key)
    yield from (key for key in checkpoint if key not in known)
