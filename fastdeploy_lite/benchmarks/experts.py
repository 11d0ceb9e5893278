"""The routed experts of one MoE layer, timed with routing that no cache has seen."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.benchmarks.ceilings import Ceilings
from fastdeploy_lite.benchmarks.timing import call_seconds, graph_seconds, random_bf16
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.model_executor.workspace import Workspace

COLD_BYTES = 1 << 30  # layers are taken in turn until one pass reads so much: beyond any cache
MAX_LAYERS = 16
CALLS = 8  # of the kernel in a round, each with its own layer and routing
MODES = ("0", "1")
_DTYPES = {True: "float32", False: "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a MoE layer.

    Attributes:
        hidden: H, width of the residual stream.
        inner: I, width inside an expert.
        experts: how many there are.
        top_k: experts of a token.
    """

    hidden: int
    inner: int
    experts: int
    top_k: int


SHAPES = {
    "21b": Shape(hidden=2560, inner=1536, experts=64, top_k=6),  # ERNIE-4.5-21B-A3B
    "300b": Shape(hidden=8192, inner=3584, experts=64, top_k=8),  # ERNIE-4.5-300B-A47B
    "demo": Shape(hidden=384, inner=256, experts=16, top_k=4),
}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: of the weights.
        tokens: of the batch.
        mode: FD_DETERMINISTIC_MODE, "0" or "1", or "any" where it makes no difference.
        us: microseconds of the layer's experts, the median round.
        low_us, high_us: the fastest and the slowest round.
        nbytes: packed weights of the experts that the tokens use, and the activations.
        flops: multiplications and additions of the products.
        memory_share, matmul_share: of the ceilings of the same run.
    """

    kind: str
    tokens: int
    mode: str
    us: float
    low_us: float
    high_us: float
    nbytes: float
    flops: float
    memory_share: float
    matmul_share: float

    @property
    def name(self) -> str:
        """Of the weights, and of the mode where it is not the default."""
        return f"{self.kind}, deterministic" if self.mode == "1" else self.kind


class Layers:
    """Equal layers of random weights in different memory.

    Args:
        kind: "ccq", "int4", "int8" or "dense".
        shape: of each.
        place: Paddle place.
        cold_bytes: what all layers together take at least, `MAX_LAYERS` at most.
    """

    def __init__(self, kind: str, shape: Shape, place: Any, cold_bytes: int = COLD_BYTES) -> None:
        self.kind, self.shape, self.place = kind, shape, place
        self.pairs: list[tuple[ops.PackedWeight, ops.PackedWeight]] = []
        self.workspace = Workspace(place)
        while len(self.pairs) < MAX_LAYERS and sum(map(self._nbytes, self.pairs)) < cold_bytes:
            seed = 2 * len(self.pairs)
            up = self._make(shape.hidden, 2 * shape.inner, seed)
            self.pairs.append((up, self._make(shape.inner, shape.hidden, seed + 1)))

    def _make(self, in_features: int, out_features: int, seed: int) -> ops.PackedWeight:
        experts = self.shape.experts
        weight = ops.allocate_weight(self.kind, in_features, out_features, self.place, experts)
        ops.randomize_weight(weight, seed)
        ops.finish_weight(weight)
        return weight

    @staticmethod
    def _nbytes(pair: tuple[ops.PackedWeight, ops.PackedWeight]) -> int:
        return pair[0].nbytes + pair[1].nbytes

    @property
    def expert_bytes(self) -> float:
        """Packed bytes of one expert."""
        return self._nbytes(self.pairs[0]) / self.shape.experts

    @property
    def has_modes(self) -> bool:
        """Whether FD_DETERMINISTIC_MODE can make a difference."""
        return self.kind == "ccq" and not self.place.is_cpu_place()

    def set_mode(self, mode: str) -> None:
        """Compute as a model does that was loaded with this FD_DETERMINISTIC_MODE."""
        for up, _ in self.pairs:
            up.handle.same_bits = mode == "1"

    def run(self, batch: Batch) -> None:
        """Queue every call of a batch."""
        for index, (ids, weights) in enumerate(batch.routing):
            up, down = self.pairs[index % len(self.pairs)]
            ops.fused_moe(batch.x, ids, weights, up, down, batch.out, self.workspace)


class Batch:
    """Random activations, and a fresh uniform routing for every call.

    Args:
        shape: of the layer.
        tokens: T.
        place: Paddle place.
        calls: how many routings.
    """

    def __init__(self, shape: Shape, tokens: int, place: Any, calls: int = CALLS) -> None:
        rng = np.random.default_rng(tokens)
        on_cpu = place.is_cpu_place()
        bits = random_bf16(tokens * shape.hidden, tokens).reshape(tokens, shape.hidden)
        x = (bits.astype(np.uint32) << 16).view(np.float32) if on_cpu else bits
        self.x = _put(x, _DTYPES[on_cpu], place)
        self.out = _put(np.zeros_like(x), _DTYPES[on_cpu], place)
        self.distinct: list[int] = []
        self.routing: list[tuple[Any, Any]] = []
        for _ in range(calls):
            ids = uniform_routing(rng, tokens, shape)
            weights = rng.dirichlet(np.ones(shape.top_k), tokens).astype(np.float32)
            self.distinct.append(len(np.unique(ids)))
            self.routing.append((_put(ids, "int32", place), _put(weights, "float32", place)))


def uniform_routing(rng: np.random.Generator, tokens: int, shape: Shape) -> npt.NDArray[np.int32]:
    """Different experts for each token, every set equally likely: int32 [tokens, top_k]."""
    scores = rng.random((tokens, shape.experts), np.float32)
    chosen = np.argpartition(scores, shape.top_k - 1, axis=1)[:, : shape.top_k]
    return np.ascontiguousarray(chosen.astype(np.int32))


def _put(array: npt.NDArray[Any], dtype: str, place: Any) -> Any:
    tensor = paddle.empty(list(array.shape), dtype=dtype, device=place)
    ops.upload(np.ascontiguousarray(array), tensor)
    return tensor


def measure(
    kind: str, shape: Shape, tokens: Sequence[int], place: Any, ceilings: Ceilings
) -> Iterator[Row]:
    """Time the experts of a kind at each size of a batch.

    Args:
        kind: of the weights.
        shape: of the layer.
        tokens: sizes.
        place: Paddle place.
        ceilings: of the place.

    Yields:
        A row as soon as it is known; 2-bit experts on a card have one for each mode where these
        have different results.
    """
    layers = Layers(kind, shape, place)
    seconds_of = call_seconds if place.is_cpu_place() else graph_seconds
    for count in tokens:
        batch = Batch(shape, count, place)
        ops.announce_step(place, count)
        for mode in modes(layers, batch):
            times = [t / CALLS for t in seconds_of(lambda batch=batch: layers.run(batch))]  # type: ignore[misc]
            yield _row(layers, batch, mode, times, ceilings)


def modes(layers: Layers, batch: Batch) -> Iterator[str]:
    """Values of `Row.mode` to time, each of them set while it is yielded."""
    if not layers.has_modes:
        yield "any"
        return
    results = []
    for mode in MODES:
        layers.set_mode(mode)
        layers.run(batch)
        results.append(ops.download(batch.out).tobytes())
    for mode in MODES if len(set(results)) > 1 else ("any",):
        layers.set_mode(mode)
        yield mode


def _row(
    layers: Layers, batch: Batch, mode: str, times: Sequence[float], ceilings: Ceilings
) -> Row:
    shape, seconds, tokens = layers.shape, statistics.median(times), int(batch.x.shape[0])
    activations = 2 * tokens * shape.hidden * batch.x.element_size()
    nbytes = statistics.mean(batch.distinct) * layers.expert_bytes + activations
    flops = 2.0 * tokens * shape.top_k * 3 * shape.hidden * shape.inner
    return Row(
        layers.kind, tokens, mode, seconds * 1e6, min(times) * 1e6, max(times) * 1e6, nbytes, flops,
        nbytes / seconds / ceilings.bytes_per_second,
        flops / seconds / ceilings.flops_per_second,
    )  # fmt: skip
