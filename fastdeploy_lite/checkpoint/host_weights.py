"""One rank's weights as host arrays, wherever they lie: whole files, or several ranks' folders.

`FileWeights` reads the files of one checkpoint. `RankFolders` puts the parts together that
pre-sharded folders hold, in packed form. `PermutedWeights` turns a model whose 2-bit experts store
their rows in the permuted order into an equal model in which no row needs to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import inventory
from fastdeploy_lite.checkpoint.reader import Checkpoint
from fastdeploy_lite.formats import Arrays
from fastdeploy_lite.formats.base import spread
from fastdeploy_lite.formats.ccq import PERMUTED
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import CheckpointError

Floats = npt.NDArray[np.float32]


class HostWeights(Protocol):
    """What a loader asks of a checkpoint; all methods raise CheckpointError for damaged data."""

    config: ModelConfig
    source: Path
    linears: dict[str, Linear]
    nbytes: int

    def kind(self, linear: Linear) -> WeightKind:
        """Return the format of a linear."""

    def parts(self, linear: Linear) -> list[Arrays]:
        """Return a linear's arrays: one, or one for each stretch of K with scales of its own."""

    def stretches(self, linear: Linear) -> list[Arrays]:
        """Return a gate and up projection in the stretches of the down projection after it."""

    def vector(self, key: str, size: int) -> Floats:
        """Return a tensor of `size` elements, such as a norm's scale."""

    def router(self, layer: int) -> tuple[Floats, Floats | None]:
        """Return a MoE layer's gate [H, E] and selection bias [E]."""

    def embedding(self) -> Array:
        """Return the table [V, H]."""

    def head(self) -> tuple[Array, bool] | None:
        """Return (head, transposed), None where the embedding is the head."""

    def release(self) -> None:
        """Give back the memory of file pages."""


class FileWeights(HostWeights):
    """The weights of one checkpoint, whose files hold all that this rank needs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config, self.source = checkpoint.config, checkpoint.source
        self.linears = {linear.module: linear for linear in inventory.rank_linears(checkpoint)}
        self.nbytes = inventory.expected_nbytes(checkpoint)

    def kind(self, linear: Linear) -> WeightKind:
        """See HostWeights."""
        return inventory.resolve_kind(self.checkpoint, linear)

    def parts(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        return [inventory.read_linear(self.checkpoint, linear).arrays]

    def stretches(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        return self.parts(linear)

    def vector(self, key: str, size: int) -> Floats:
        """See HostWeights."""
        return inventory.read_vector(self.checkpoint, key, size)

    def router(self, layer: int) -> tuple[Floats, Floats | None]:
        """See HostWeights."""
        return inventory.read_router(self.checkpoint, layer)

    def embedding(self) -> Array:
        """See HostWeights."""
        return inventory.read_embedding(self.checkpoint)

    def head(self) -> tuple[Array, bool] | None:
        """See HostWeights."""
        return inventory.read_lm_head(self.checkpoint)

    def release(self) -> None:
        """See HostWeights."""
        self.checkpoint.release()


class RankFolders(HostWeights):
    """The weights of several ranks' folders as those of one rank.

    Columns that ranks hold are put side by side, each with its own scale. Rows that ranks hold have
    scales of their own, too: where those are equal (a folder that was cut from a whole model) they
    are joined, otherwise they stay apart and their products are summed.
    """

    def __init__(self, folders: Sequence[Checkpoint], size: int = 1, rank: int = 0) -> None:
        """Args: folders: of the ranks that make up `rank` of `size`, in order, verified."""
        self.folders = [FileWeights(folder) for folder in folders]
        first = self.folders[0]
        self.config, self.source = first.config, folders[0].root
        whole = self.config.family.linears(self.config, size, rank)
        self.linears = {linear.module: linear for linear in whole}
        self.nbytes = sum(folder.nbytes for folder in self.folders)

    def kind(self, linear: Linear) -> WeightKind:
        """See HostWeights."""
        return self.folders[0].kind(self.folders[0].linears[linear.module])

    def parts(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        format_ = formats.get(self.kind(linear))
        found = self._of_all(linear)
        if linear.is_row_split:
            joined = format_.join_rows(found)
            return found if joined is None else [joined]
        pieces: dict[tuple[int, int], Arrays] = {}
        for folder, arrays in zip(self.folders, found, strict=True):
            at = 0
            for start, stop in folder.linears[linear.module].column_ranges:
                here = (at, at + stop - start)
                # Ranks that share a KV head hold it twice.
                if (start, stop) not in pieces:
                    pieces[start, stop] = format_.slice_columns(arrays, [here])
                at = here[1]
        return [format_.join_columns([pieces[part] for part in sorted(pieces)])]

    def stretches(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        return self._of_all(linear)

    def vector(self, key: str, size: int) -> Floats:
        """See HostWeights."""
        return self.folders[0].vector(key, size)

    def router(self, layer: int) -> tuple[Floats, Floats | None]:
        """See HostWeights."""
        return self.folders[0].router(layer)

    def embedding(self) -> Array:
        """See HostWeights."""
        return np.concatenate([folder.embedding() for folder in self.folders])

    def head(self) -> tuple[Array, bool] | None:
        """See HostWeights."""
        found = [folder.head() for folder in self.folders]
        if any(part is None for part in found):
            return None
        tables = [part[0] if part[1] else part[0].T for part in found if part is not None]
        return np.concatenate(tables), True

    def release(self) -> None:
        """See HostWeights."""
        for folder in self.folders:
            folder.release()

    def _of_all(self, linear: Linear) -> list[Arrays]:
        return [
            arrays
            for folder in self.folders
            for arrays in folder.parts(folder.linears[linear.module])
        ]


class PartOfFolder(HostWeights):
    """A rank's share of a folder that was cut for fewer ranks."""

    def __init__(self, folder: Checkpoint, size: int, rank: int) -> None:
        """Args: folder: of the rank that holds what `rank` of `size` needs, verified."""
        self.folder = FileWeights(folder)
        self.config, self.source = folder.config, folder.source
        own = self.config.family.linears(self.config, size, rank)
        self.linears = {linear.module: linear for linear in own}
        self._share = size // folder.tensor_parallel_size
        self._index = rank % self._share
        self.nbytes = self.folder.nbytes // self._share

    def kind(self, linear: Linear) -> WeightKind:
        """See HostWeights."""
        return self.folder.kind(self.folder.linears[linear.module])

    def parts(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        held = self.folder.linears[linear.module]
        format_ = formats.get(self.kind(linear))
        (arrays,) = self.folder.parts(held)
        if linear.is_row_split:
            start, stop = (at - held.row_range[0] for at in linear.row_range)
            return [format_.slice_rows(arrays, start, stop)]
        ranges, at = [], 0
        for (start, stop), (first, last) in zip(
            linear.column_ranges, held.column_ranges, strict=True
        ):
            ranges.append((at + start - first, at + stop - first))
            at += last - first
        return [format_.slice_columns(arrays, ranges)]

    def stretches(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        return self.parts(linear)

    def vector(self, key: str, size: int) -> Floats:
        """See HostWeights."""
        return self.folder.vector(key, size)

    def router(self, layer: int) -> tuple[Floats, Floats | None]:
        """See HostWeights."""
        return self.folder.router(layer)

    def embedding(self) -> Array:
        """See HostWeights."""
        return self._rows(self.folder.embedding())

    def head(self) -> tuple[Array, bool] | None:
        """See HostWeights."""
        found = self.folder.head()
        if found is None:
            return None
        table, transposed = found
        return self._rows(table if transposed else table.T), True

    def release(self) -> None:
        """See HostWeights."""
        self.folder.release()

    def _rows(self, table: Array) -> Array:
        count = len(table) // self._share
        return table[self._index * count : (self._index + 1) * count]


class PermutedWeights(HostWeights):
    """A model with permuted 2-bit rows as an equal model of permuted channels.

    The order of the channels between linear maps means nothing as long as all of them agree. So
    the hidden channels are put in the order in which the 2-bit gate and up projections store their
    rows, and the channels inside 2-bit experts in that of the down projections: embedding, norms,
    routers, heads and the other linears are rearranged once while they are loaded, 2-bit bytes only
    by columns. Nothing is left to do at run time, and no kernel knows.
    """

    def __init__(self, weights: HostWeights) -> None:
        self.weights = weights
        self.config, self.source = weights.config, weights.source
        self.linears, self.nbytes = weights.linears, weights.nbytes
        self.hidden_order = spread(PERMUTED, self.config.hidden_size)

    def kind(self, linear: Linear) -> WeightKind:
        """See HostWeights."""
        return self.weights.kind(linear)

    def parts(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        return [self._arranged(linear, arrays) for arrays in self.weights.parts(linear)]

    def stretches(self, linear: Linear) -> list[Arrays]:
        """See HostWeights."""
        return [self._arranged(linear, arrays) for arrays in self.weights.stretches(linear)]

    def vector(self, key: str, size: int) -> Floats:
        """See HostWeights."""
        values = self.weights.vector(key, size)
        return values[self.hidden_order] if size == len(self.hidden_order) else values

    def router(self, layer: int) -> tuple[Floats, Floats | None]:
        """See HostWeights."""
        gate, bias = self.weights.router(layer)
        return gate[self.hidden_order], bias

    def embedding(self) -> Array:
        """See HostWeights."""
        return self.weights.embedding()[:, self.hidden_order]

    def head(self) -> tuple[Array, bool] | None:
        """See HostWeights."""
        found = self.weights.head()
        if found is None:
            return None
        table, transposed = found
        return (table[:, self.hidden_order] if transposed else table[self.hidden_order]), transposed

    def release(self) -> None:
        """See HostWeights."""
        self.weights.release()

    def _arranged(self, linear: Linear, arrays: Arrays) -> Arrays:
        kind = self.kind(linear)
        format_ = formats.get(kind)
        if linear.is_row_split or kind == "ccq":
            return format_.permute_columns(arrays, PERMUTED)
        return format_.permute_rows(arrays, PERMUTED)


def check_same_kinds(folders: Sequence[Checkpoint]) -> None:
    """Raise CheckpointError where ranks keep a linear in different formats."""
    first = {one.module: one for one in inventory.rank_linears(folders[0])}
    for folder in folders[1:]:
        for linear in inventory.rank_linears(folder):
            wanted = inventory.resolve_kind(folders[0], first[linear.module])
            found = inventory.resolve_kind(folder, linear)
            if found != wanted:
                raise CheckpointError(
                    f"{folder.source}: {linear.module}: found {found} weights, expected {wanted}"
                    f" as in {folders[0].source}: the folders are not of one model"
                )
