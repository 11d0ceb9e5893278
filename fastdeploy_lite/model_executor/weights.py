"""Parameters of the model: streamed from a checkpoint, or made up for runs without files.

A checkpoint is read in the order of the model, one expert at a time: each array is a view of a
mapped file, is repacked once into the kernel's layout, and its pages are given back. So the peak
of host memory is the weights that are kept plus what one layer maps; where bf16 weights are
quantised on the way, plus less than one of them in float32.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import Checkpoint, inventory
from fastdeploy_lite.checkpoint.linears import (
    Linear,
    check_sizes,
    check_tensor_parallel,
    model_linears,
)
from fastdeploy_lite.checkpoint.progress import count_layers, loading_bar
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.parameters import ParameterSource
from fastdeploy_lite.model_executor.ops import PackedWeight
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization.online import OnlineQuantizer
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import CheckpointError, FastDeployError
from fastdeploy_lite.utils.host_memory import available_bytes

log = logging.getLogger(__name__)
GIB = 1 << 30


def open_source(config: RuntimeConfig, place: Any, show_progress: bool) -> ParameterSource:
    """Return where the parameters of `config` come from.

    Raises:
        ConfigError, CheckpointError: the checkpoint does not fit the configuration; everything
            that headers tell is checked before any data is read.
        FastDeployError: main memory does not suffice.
    """
    parallel = config.parallel
    if config.load.load_choices == "dummy":
        check_tensor_parallel(config.model, parallel.tensor_parallel_size)
        return DummySource(config, place)
    checkpoint = Checkpoint.open(
        config.model_path,
        parallel.tensor_parallel_size,
        parallel.rank,
        config_name=Path(config.model.source).name,
    )
    inventory.verify(checkpoint)
    if place.is_cpu_place():
        check_memory(_kept_nbytes(checkpoint, config.model))
    if config.model.quantizes_on_load:
        return QuantizingSource(checkpoint, config.model, place, show_progress)
    return CheckpointSource(checkpoint, place, show_progress)


def check_memory(needed: int) -> None:
    """Raise FastDeployError when `needed` bytes of weights cannot fit in main memory."""
    available = available_bytes()
    if needed > available:
        raise FastDeployError(
            f"the weights need {needed / GIB:.1f} GiB of main memory, {available / GIB:.1f} GiB "
            "are available: free memory, or use a smaller or more quantised model"
        )


def _kept_nbytes(checkpoint: Checkpoint, model: ModelConfig) -> int:
    """Bytes of the weights as they are kept: those of the files, or of what is made of them."""
    if not model.quantizes_on_load:
        return inventory.expected_nbytes(checkpoint)
    linears = model_linears(model, checkpoint.tensor_parallel_size, checkpoint.rank)
    made = sum(
        formats.get(linear.kind).nbytes(linear.in_features, linear.out_features)
        for linear in linears
    )
    return inventory.plain_nbytes(checkpoint) + made


class CheckpointSource:
    """Parameters of one rank of a checkpoint whose headers have been verified."""

    def __init__(self, checkpoint: Checkpoint, place: Any, show_progress: bool = False) -> None:
        """Args: place: where weights are kept; show_progress: draw bars on stderr."""
        self.checkpoint = checkpoint
        self.place = place
        self._show_progress = show_progress
        self._linears = {linear.module: linear for linear in inventory.rank_linears(checkpoint)}
        self._left = inventory.expected_nbytes(checkpoint)
        self._bar = loading_bar(self._left, enabled=show_progress)

    def __enter__(self) -> CheckpointSource:
        """Begin loading."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the progress bar, at 100 % unless loading failed, and give back all file pages."""
        if kind is None:
            self._advance(self._left)
        self._bar.close()
        self.checkpoint.release()

    def layers(self, count: int) -> Iterator[int]:
        """See ParameterSource."""
        return count_layers(count, self._show_progress)

    def linear(self, module: str) -> PackedWeight:
        """See ParameterSource."""
        linear = self._linears[module]
        kind = self._kind(linear)
        weight = self._allocate(kind, linear.in_features, linear.out_features)
        self._fill(weight, None, linear)
        return self._finish(weight, module)

    def experts(self, layer: int, name: str) -> PackedWeight:
        """See ParameterSource."""
        count = self.checkpoint.config.moe_num_experts
        module = self.checkpoint.config.family.expert_module
        first = self._linears[module(layer, 0, name)]
        kind = self._kind(first)
        sizes = (first.in_features, first.out_features)
        weight = self._allocate(kind, *sizes, count)
        for expert in range(count):
            self._fill(weight, expert, self._linears[module(layer, expert, name)])
        return self._finish(weight, first.module)

    def embedding(self) -> PackedWeight:
        """See ParameterSource."""
        table = inventory.read_embedding(self.checkpoint)
        return self._dense(table, True, self.checkpoint.config.family.embedding_key)

    def head(self) -> PackedWeight | None:
        """See ParameterSource."""
        found = inventory.read_lm_head(self.checkpoint)
        return (
            None if found is None else self._dense(*found, self.checkpoint.config.family.head_key)
        )

    def vector(self, key: str) -> Any:
        """See ParameterSource."""
        values = inventory.read_vector(self.checkpoint, key, self.checkpoint.config.hidden_size)
        return self._tensor(values)

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """See ParameterSource."""
        gate, bias = inventory.read_router(self.checkpoint, layer)
        return self._tensor(gate), None if bias is None else self._tensor(bias)

    def _kind(self, linear: Linear) -> WeightKind:
        """Format in which a linear is kept."""
        return inventory.resolve_kind(self.checkpoint, linear)

    def _allocate(
        self, kind: WeightKind, rows: int, columns: int, experts: int = 0
    ) -> PackedWeight:
        kernel = formats.get(kind).kernel
        return ops.allocate_weight(kernel, rows, columns, self.place, num_experts=experts)

    def _converted(self, linear: Linear, arrays: dict[str, Array]) -> dict[str, Array]:
        """What `fill_weight` gets of a linear whose arrays in the files are `arrays`."""
        return arrays

    def _fill(self, weight: PackedWeight, expert: int | None, linear: Linear) -> None:
        found = inventory.read_linear(self.checkpoint, linear).arrays
        try:
            arrays = formats.get(self._kind(linear)).for_kernel(self._converted(linear, found))
            ops.fill_weight(weight, expert, **arrays)
        except ValueError as error:
            raise self._blame(linear.module, error) from error
        self._advance(sum(array.nbytes for array in found.values()))

    def _dense(self, array: npt.NDArray[Any], transposed: bool, module: str) -> PackedWeight:
        """Keep a matrix [K, N], or [N, K] if `transposed`."""
        if array.flags.f_contiguous and not array.flags.c_contiguous:
            array, transposed = array.T, not transposed
        rows, columns = array.shape[::-1] if transposed else array.shape
        weight = ops.allocate_weight("dense", rows, columns, self.place)
        try:
            ops.fill_weight(weight, None, weight=array, transposed=transposed)
        except ValueError as error:
            raise self._blame(module, error) from error
        self._advance(array.nbytes)
        return self._finish(weight, module)

    def _finish(self, weight: PackedWeight, module: str) -> PackedWeight:
        try:
            ops.finish_weight(weight)
        except ValueError as error:
            raise self._blame(module, error) from error
        self.checkpoint.release()
        return weight

    def _tensor(self, values: npt.NDArray[np.float32]) -> Any:
        self._advance(values.nbytes)
        return ops.fix(paddle.to_tensor(np.ascontiguousarray(values), place=self.place))

    def _blame(self, module: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.source}: {module}: {error}")

    def _advance(self, nbytes: int) -> None:
        """Move the bar, never beyond its end: scales that became float32 count double."""
        step = min(nbytes, self._left)
        self._left -= step
        self._bar.update(step)


class QuantizingSource(CheckpointSource):
    """A bf16 checkpoint whose linears become int8 or int4 while they are read."""

    def __init__(
        self, checkpoint: Checkpoint, model: ModelConfig, place: Any, show_progress: bool = False
    ) -> None:
        """Args: model: the checkpoint's, with the quantisation that is wanted.

        Raises:
            CheckpointError: a linear has sizes that its format cannot hold.
        """
        ranks = checkpoint.tensor_parallel_size
        linears = list(model_linears(model, ranks, checkpoint.rank))
        check_sizes(linears, model.source)
        super().__init__(checkpoint, place, show_progress)
        self._kinds = {linear.module: linear.kind for linear in linears}
        self._quantizer = OnlineQuantizer()

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """End the quantiser's threads too."""
        self._quantizer.close()
        super().__exit__(kind, *details)

    def _kind(self, linear: Linear) -> WeightKind:
        return self._kinds[linear.module]

    def _converted(self, linear: Linear, arrays: dict[str, Array]) -> dict[str, Array]:
        return self._quantizer.quantize(self._kind(linear), arrays["weight"])


class DummySource:
    """Valid random weights of any architecture, made where they are kept.

    Norms are ones and the router is random, so activations stay finite and experts are used evenly;
    the text means nothing.
    """

    def __init__(self, config: RuntimeConfig, place: Any) -> None:
        """Args: config: its model, parallel and seed matter; place: where weights are kept."""
        self.config: ModelConfig = config.model
        self.place = place
        self.seed = config.seed
        parallel = config.parallel
        self._ranks = parallel.tensor_parallel_size
        linears = model_linears(config.model, parallel.tensor_parallel_size, parallel.rank)
        self._linears = {linear.module: linear for linear in linears}

    def __enter__(self) -> DummySource:
        """Begin loading."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def layers(self, count: int) -> Iterator[int]:
        """See ParameterSource."""
        return iter(range(count))

    def linear(self, module: str) -> PackedWeight:
        """See ParameterSource."""
        linear = self._linears[module]
        return self._random(module, linear.kind, linear.in_features, linear.out_features)

    def experts(self, layer: int, name: str) -> PackedWeight:
        """See ParameterSource."""
        first = self._linears[self.config.family.expert_module(layer, 0, name)]
        sizes = (first.in_features, first.out_features)
        return self._random(first.module, first.kind, *sizes, self.config.moe_num_experts)

    def embedding(self) -> PackedWeight:
        """See ParameterSource."""
        return self._random("embed_tokens", "dense", *self._table_sizes())

    def head(self) -> PackedWeight | None:
        """See ParameterSource."""
        if self.config.tie_word_embeddings:
            return None
        return self._random("lm_head", "dense", *self._table_sizes())

    def vector(self, key: str) -> Any:
        """See ParameterSource."""
        return paddle.to_tensor(np.ones(self.config.hidden_size, np.float32), place=self.place)

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """See ParameterSource."""
        config = self.config
        generator = np.random.default_rng((self.seed, layer))
        shape = (config.hidden_size, config.moe_num_experts)
        gate = generator.standard_normal(shape, np.float32) * np.float32(0.02)
        bias = None
        if config.moe_use_aux_free:
            zeros = np.zeros(config.moe_num_experts, np.float32)
            bias = paddle.to_tensor(zeros, place=self.place)
        return paddle.to_tensor(gate, place=self.place), bias

    def _table_sizes(self) -> tuple[int, int]:
        return self.config.hidden_size, self.config.vocab_size // self._ranks

    def _random(
        self, name: str, kind: WeightKind, rows: int, columns: int, experts: int = 0
    ) -> PackedWeight:
        kernel = formats.get(kind).kernel
        weight = ops.allocate_weight(kernel, rows, columns, self.place, num_experts=experts)
        ops.randomize_weight(weight, self.seed ^ zlib.crc32(name.encode()))
        ops.finish_weight(weight)
        return weight


def bits_per_weight(weights: Iterable[PackedWeight]) -> float:
    """Bytes kept for `weights` in bits per logical element."""
    kept = list(weights)
    count = sum(w.in_features * w.out_features * max(1, w.num_experts) for w in kept)
    return 8.0 * sum(w.nbytes for w in kept) / count if count else 0.0
