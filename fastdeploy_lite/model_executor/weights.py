"""Parameters of the model: streamed from a checkpoint; `dummy_weights` makes them up.

A checkpoint is read in the order of the model, one expert at a time: each array is a view of a
mapped file, is repacked once into the kernel's layout, and its pages are given back. So the peak
of host memory is the weights that are kept plus what one layer maps; where bf16 weights are
quantised on the way, plus less than one of them in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import Checkpoint, inventory, row_order
from fastdeploy_lite.checkpoint.host_weights import (
    FileWeights,
    HostWeights,
    PartOfFolder,
    PermutedWeights,
    RankFolders,
    check_same_kinds,
)
from fastdeploy_lite.checkpoint.linears import (
    Linear,
    check_sizes,
    check_tensor_parallel,
    model_linears,
)
from fastdeploy_lite.checkpoint.progress import count_layers, loading_bar
from fastdeploy_lite.checkpoint.reader import open_folders
from fastdeploy_lite.checkpoint.row_order import Decision
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.formats import Arrays
from fastdeploy_lite.model_executor import int8_head, ops
from fastdeploy_lite.model_executor.dummy_weights import DummySource
from fastdeploy_lite.model_executor.expert_placement import NO_LINKS, offloaded_nbytes
from fastdeploy_lite.model_executor.layers.parameters import ParameterSource
from fastdeploy_lite.model_executor.ops import (
    ExpertWeight,
    HostLink,
    HostWeight,
    PackedWeight,
    SegmentedWeight,
    Weight,
)
from fastdeploy_lite.model_executor.packed_cache import PackedCache, PackedCacheSource
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization.online import OnlineQuantizer
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import CheckpointError, FastDeployError
from fastdeploy_lite.utils.host_memory import available_bytes

log = logging.getLogger(__name__)
GIB = 1 << 30


class UndecidedRowOrderError(CheckpointError):
    """The weights of 2-bit experts do not say in which order their rows are stored."""


def open_source(
    config: RuntimeConfig,
    place: Any,
    show_progress: bool,
    check: Callable[[], None] | None = None,
    host_links: Mapping[int, HostLink] = NO_LINKS,
) -> ParameterSource:
    """Return where the parameters of `config` come from.

    Args:
        config: how the model is run.
        place: where weights are kept.
        show_progress: draw bars on stderr.
        check: called before each matrix.
        host_links: layers whose routed experts stay in main memory, and the way there.

    Raises:
        ConfigError, CheckpointError: the checkpoint does not fit the configuration; everything
            that headers tell is checked before any data is read.
        FastDeployError: main memory does not suffice.
    """
    parallel, ranks = config.parallel, config.parallel.tensor_parallel_size
    if host_links:
        check_memory(offloaded_nbytes(config.model, host_links))
    if config.load.head_kind == "int8":
        int8_head.check_head(config.model, ranks, place)
    if config.load.load_choices == "dummy":
        check_tensor_parallel(config.model, ranks)
        source = DummySource(config, place)
        source.host_links = host_links
        if place.is_cpu_place() and parallel.rank == 0:
            check_memory(source.nbytes * ranks + _head_nbytes(config))
        return source

    def open_files(needs_room: bool) -> CheckpointSource:
        return _open_checkpoint(config, place, show_progress, check, host_links, needs_room)

    if config.load.packed_cache is None or not (place.is_cpu_place() or host_links):
        return open_files(True)
    cache = PackedCache(config.load.packed_cache, config, host_links)
    kept = PackedCacheSource(cache, open_files, place, host_links, show_progress, check)
    if place.is_cpu_place() and parallel.rank == 0:
        check_memory(kept.nbytes * ranks)
    return kept


def _open_checkpoint(
    config: RuntimeConfig,
    place: Any,
    show_progress: bool,
    check: Callable[[], None] | None,
    host_links: Mapping[int, HostLink],
    needs_room: bool,
) -> CheckpointSource:
    """As `open_source`; needs_room: look for the memory that all weights take."""
    ranks = config.parallel.tensor_parallel_size
    weights, decision = open_weights(config)
    if needs_room and place.is_cpu_place() and config.parallel.rank == 0:
        check_memory(_kept_nbytes(weights, config.model, ranks) + _head_nbytes(config))
    if decision.order == "permuted":
        weights = PermutedWeights(weights)
    if config.model.quantizes_on_load:
        files: CheckpointSource = QuantizingSource(weights, config.model, place, show_progress)
    else:
        files = CheckpointSource(weights, place, show_progress)
        files.row_order = decision.describe()
    files.check, files.head_kind = check, config.load.head_kind
    files.host_links = host_links
    return files


def open_weights(config: RuntimeConfig) -> tuple[HostWeights, Decision]:
    """Open and verify the files, and say in one line how 2-bit rows are read.

    Raises:
        UndecidedRowOrderError: 2-bit experts whose order nothing tells.
    """
    parallel = config.parallel
    folders = open_folders(
        config.model_path,
        parallel.tensor_parallel_size,
        parallel.rank,
        config_name=Path(config.model.source).name,
    )
    for folder in folders:
        inventory.verify(folder)
    check_same_kinds(folders)
    decision = row_order.decide(_deciding_folder(config, folders[0]), config.load.row_order)
    if decision.order is None:
        raise UndecidedRowOrderError(
            f"{folders[0].source}: the row order of the 2-bit experts cannot be told:"
            f" {decision.reason}; say which it is: {row_order.OPTION}"
        )
    if decision.describe():
        log.info("2-bit rows: %s", decision.describe())
    if decision.warning:
        log.warning("%s: %s", folders[0].source, decision.warning)
    if len(folders) == 1 and folders[0].tensor_parallel_size < parallel.tensor_parallel_size:
        part = PartOfFolder(folders[0], parallel.tensor_parallel_size, parallel.rank)
        return part, decision
    if len(folders) == 1:
        return FileWeights(folders[0]), decision
    ranks = RankFolders(folders, parallel.tensor_parallel_size, parallel.rank)
    return ranks, decision


def _deciding_folder(config: RuntimeConfig, own: Checkpoint) -> Checkpoint:
    """The same checkpoint for every rank and every size, since all must decide alike."""
    parallel, name = config.parallel, Path(config.model.source).name
    if parallel.tensor_parallel_size == 1:
        return own
    if own.is_presharded:
        return Checkpoint.open(config.model_path, own.tensor_parallel_size, 0, name)
    return Checkpoint.open(config.model_path, config_name=name)


def check_memory(needed: int) -> None:
    """Raise FastDeployError when `needed` bytes of weights cannot fit in main memory."""
    available = available_bytes()
    if needed > available:
        raise FastDeployError(
            f"the weights need {needed / GIB:.1f} GiB of main memory, {available / GIB:.1f} GiB "
            "are available: free memory, or use a smaller or more quantised model"
        )


def _head_nbytes(config: RuntimeConfig) -> int:
    """Bytes of the output heads that are made while loading."""
    if config.load.head_kind == "dense":
        return 0
    return int8_head.head_nbytes(config.model, config.parallel.tensor_parallel_size)


def _kept_nbytes(weights: HostWeights, model: ModelConfig, ranks: int) -> int:
    """Bytes of the weights as all ranks of this host keep them: those of the files, or of what is
    made of them."""
    is_whole = isinstance(weights, FileWeights) and not weights.checkpoint.is_presharded
    copies = 1 if is_whole else ranks
    if not model.quantizes_on_load:
        return weights.nbytes * copies
    wanted = {linear.module: linear.kind for linear in model_linears(model)}
    made = bf16 = 0
    for linear in model_linears(model) if is_whole else weights.linears.values():
        rows, columns = linear.in_features, linear.out_features
        made += formats.get(wanted[linear.module]).nbytes(rows, columns)
        bf16 += formats.get("dense").nbytes(rows, columns)
    return (max(weights.nbytes - bf16, 0) + made) * copies


class CheckpointSource:
    """Parameters of one rank of a checkpoint whose headers have been verified."""

    row_order = ""
    check: Callable[[], None] | None = None
    head_kind: WeightKind = "dense"
    host_links: Mapping[int, HostLink] = NO_LINKS

    def __init__(
        self, checkpoint: Checkpoint | HostWeights, place: Any, show_progress: bool = False
    ) -> None:
        """Args: place: where weights are kept; show_progress: draw bars on stderr."""
        self.weights: HostWeights = (
            FileWeights(checkpoint) if isinstance(checkpoint, Checkpoint) else checkpoint
        )
        self.is_permuted = isinstance(self.weights, PermutedWeights)
        self.config = self.weights.config
        self.place = place
        self._show_progress = show_progress
        self._linears = self.weights.linears
        # Layers whose experts stay in parts, among those that were looked at.
        self._apart: set[int] = set()
        self._known: set[int] = set()
        self._left = self.weights.nbytes
        self._bar = loading_bar(self._left, enabled=show_progress)

    def __enter__(self) -> CheckpointSource:
        """Begin loading."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the progress bar, at 100 % unless loading failed, and give back all file pages."""
        if kind is None:
            self._advance(self._left)
        self._bar.close()
        self.weights.release()

    def layers(self, count: int) -> Iterator[int]:
        """See ParameterSource."""
        return count_layers(count, self._show_progress)

    def linear(self, module: str) -> Weight:
        """See ParameterSource."""
        linear = self._linears[module]
        parts = self.weights.parts(linear)
        packed = [self._pack(linear, [(None, arrays)], self.place) for arrays in parts]
        return packed[0] if len(packed) == 1 else SegmentedWeight(tuple(packed))

    def experts(self, layer: int, name: str) -> ExpertWeight | None:
        """See ParameterSource."""
        linears = [self._linears[module] for module in self._expert_modules(layer, name)]
        if not linears[0].in_features * linears[0].out_features:
            return None
        link = self.host_links.get(layer)
        if link is None:
            return self._experts(layer, linears, self.place)
        return HostWeight(self._experts(layer, linears, link.place), link)

    def _experts(self, layer: int, linears: list[Linear], place: Any) -> Weight:
        """A down projection that ranks keep apart needs gate and up in the same parts."""
        if self._stays_apart(layer):
            return self._segments(linears, place)
        stream = ((i, self._only_part(linear)) for i, linear in enumerate(linears))
        return self._pack(linears[0], stream, place, len(linears))

    def _expert_modules(self, layer: int, name: str) -> list[str]:
        module = self.config.family.expert_module
        return [module(layer, expert, name) for expert in range(self.config.moe_num_experts)]

    def _stays_apart(self, layer: int) -> bool:
        """Whether some expert's down projection has parts with scales of their own."""
        if not isinstance(self.weights, FileWeights) and layer not in self._known:
            self._known.add(layer)
            for module in self._expert_modules(layer, "down_proj"):
                if len(self.weights.parts(self._linears[module])) > 1:
                    self._apart.add(layer)
                    break
            self.weights.release()
        return layer in self._apart

    def _segments(self, linears: list[Linear], place: Any) -> Weight:
        first = self.weights.stretches(linears[0])
        packed = []
        for part in range(len(first)):
            stream = ((i, self.weights.stretches(linear)[part]) for i, linear in enumerate(linears))
            packed.append(self._pack(linears[0], stream, place, len(linears)))
        return SegmentedWeight(tuple(packed))

    def _only_part(self, linear: Linear) -> Arrays:
        (arrays,) = self.weights.parts(linear)
        return arrays

    def _pack(
        self,
        linear: Linear,
        stream: Iterable[tuple[int | None, Arrays]],
        place: Any,
        experts: int = 0,
    ) -> PackedWeight:
        """Keep one matrix, or one for each expert; sizes are those of the arrays."""
        weight: PackedWeight | None = None
        for expert, arrays in stream:
            if weight is None:
                rows, columns = formats.get(self.weights.kind(linear)).shape(arrays)
                kernel = formats.get(self._kind(linear)).kernel
                weight = ops.allocate_weight(kernel, rows, columns, place, num_experts=experts)
            self._fill(weight, expert, linear, arrays)
        assert weight is not None
        return self._finish(weight, linear.module)

    def embedding(self) -> PackedWeight:
        """See ParameterSource."""
        return self._dense(self.weights.embedding(), True, self.config.family.embedding_key)

    def head(self) -> PackedWeight | None:
        """See ParameterSource."""
        found, key = self.weights.head(), self.config.family.head_key
        if self.head_kind == "int8":
            table, transposed = found or (self.weights.embedding(), True)
            try:
                weight = int8_head.int8_head(table.T if transposed else table, self.place)
            except ValueError as error:
                raise self._blame(key, error) from error
            self._advance(table.nbytes if found else 0)
            return self._finish(weight, key)
        return None if found is None else self._dense(*found, key)

    def vector(self, key: str) -> Any:
        """See ParameterSource."""
        return self._tensor(self.weights.vector(key, self.config.hidden_size))

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """See ParameterSource."""
        gate, bias = self.weights.router(layer)
        return self._tensor(gate), None if bias is None else self._tensor(bias)

    def _kind(self, linear: Linear) -> WeightKind:
        """Format in which a linear is kept."""
        return self.weights.kind(linear)

    def _converted(self, linear: Linear, arrays: dict[str, Array]) -> dict[str, Array]:
        """What `fill_weight` gets of a linear whose arrays in the files are `arrays`."""
        return arrays

    def _fill(
        self, weight: PackedWeight, expert: int | None, linear: Linear, found: Arrays
    ) -> None:
        if self.check is not None:
            self.check()
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
        self.weights.release()
        return weight

    def _tensor(self, values: npt.NDArray[np.float32]) -> Any:
        self._advance(values.nbytes)
        return ops.fix(paddle.to_tensor(np.ascontiguousarray(values), place=self.place))

    def _blame(self, module: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.weights.source}: {module}: {error}")

    def _advance(self, nbytes: int) -> None:
        """Move the bar, never beyond its end: scales that became float32 count double."""
        step = min(nbytes, self._left)
        self._left -= step
        self._bar.update(step)


class QuantizingSource(CheckpointSource):
    """A bf16 checkpoint whose linears become int8 or int4 while they are read."""

    def __init__(
        self,
        checkpoint: Checkpoint | HostWeights,
        model: ModelConfig,
        place: Any,
        show_progress: bool = False,
    ) -> None:
        """Args: model: the checkpoint's, with the quantisation that is wanted.

        Raises:
            CheckpointError: a linear has sizes that its format cannot hold.
        """
        super().__init__(checkpoint, place, show_progress)
        wanted = {linear.module: linear for linear in model_linears(model)}
        linears = [replace(one, kind=wanted[one.module].kind) for one in self._linears.values()]
        check_sizes(linears, model.source)
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


def bits_per_weight(weights: Iterable[ExpertWeight]) -> float:
    """Bytes kept for `weights` in bits per logical element."""
    kept = list(weights)
    count = sum(w.in_features * w.out_features * max(1, w.num_experts) for w in kept)
    return 8.0 * sum(w.nbytes for w in kept) / count if count else 0.0
