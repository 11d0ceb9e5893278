"""One linear map of a model: its name, its sizes, and the part of it that is meant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from fastdeploy_lite import formats
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.errors import CheckpointError

Role = Literal["qkv_proj", "o_proj", "up_gate_proj", "down_proj"]


@dataclass(frozen=True)
class Linear:
    """One linear map y = x W, W [K, N].

    Attributes:
        module: key of its tensors without the suffix, such as `layers.0.mlp.down_proj`.
        role: what it is; `o_proj` and `down_proj` are split along K between ranks.
        kind: format of its weights by config.json (`resolve_kind` asks the file).
        whole_in: K of the unsharded model.
        segments: widths in the unsharded W of the linears that are fused in it, in order
            (q, k, v; gate, up; otherwise one).
        segment_modules: modules of those linears where a file keeps them apart.
        column_ranges: the columns [start, stop) of the unsharded W that are meant, in order.
        row_range: the rows of the unsharded W that are meant.
    """

    module: str
    role: Role
    kind: WeightKind
    layer: int
    expert: int | None
    whole_in: int
    segments: tuple[int, ...]
    segment_modules: tuple[str, ...]
    column_ranges: tuple[tuple[int, int], ...]
    row_range: tuple[int, int]

    @property
    def is_row_split(self) -> bool:
        """Whether ranks hold rows of it, not columns."""
        return self.role in ("o_proj", "down_proj")

    @property
    def in_features(self) -> int:
        """K of the part that is meant."""
        return self.row_range[1] - self.row_range[0]

    @property
    def out_features(self) -> int:
        """N of the part that is meant."""
        return sum(stop - start for start, stop in self.column_ranges)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Module and width of each fused linear where a file keeps them apart; else empty."""
        widths = (stop - start for start, stop in self.column_ranges)
        return tuple(zip(self.segment_modules, widths, strict=False))

    def size_problem(self, kind: WeightKind) -> str | None:
        """Return why a matrix of these sizes cannot be stored as `kind`, None if it can."""
        k, n, format_ = self.in_features, self.out_features, formats.get(kind)
        if format_.fits(k, n):
            return None
        return (
            f"{self.module}: found K = {k}, N = {n}, expected multiples of {format_.row_unit} and"
            f" {format_.column_unit} for {kind} weights"
        )

    def whole(self) -> Linear:
        """The same linear, all of it."""
        stops = tuple(accumulate(self.segments))
        ranges = tuple(zip((0, *stops), stops, strict=False))
        return replace(self, column_ranges=ranges, row_range=(0, self.whole_in))


def check_sizes(linears: Iterable[Linear], source: str) -> None:
    """Raise CheckpointError for the first linear whose sizes its format cannot hold.

    For formats that are still to be made; `inventory.verify` checks those that files hold.
    `source` is named in the error.
    """
    for linear in linears:
        problem = linear.size_problem(linear.kind)
        if problem:
            raise CheckpointError(f"{source}: {problem}")
