"""What the data-free conversion knows of each linear, and what its report makes of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdeploy_lite.quantization_config import WeightKind


@dataclass
class KindReport:
    """Sums over the linears of one format: counts of weights and bits, squared sums.

    `rounding_error` is what rounding to nearest would lose; of int8 and int4, which are rounded,
    the error itself, of 2 bits estimated by `nearest.two_bit_error`.
    """

    weights: int = 0
    bits: int = 0
    energy: float = 0.0
    error: float = 0.0
    rounding_error: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return self.bits / self.weights

    @property
    def relative_error(self) -> float:
        """Squared error over squared weights."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def relative_rounding_error(self) -> float:
        """The same of rounding to nearest."""
        return self.rounding_error / self.energy if self.energy else 0.0

    def add(self, other: KindReport) -> None:
        """Count the linears of another sum, too."""
        self.weights += other.weights
        self.bits += other.bits
        self.energy += other.energy
        self.error += other.error
        self.rounding_error += other.rounding_error

    def sums(self) -> list[float]:
        """The fields, in order."""
        return [self.weights, self.bits, self.energy, self.error, self.rounding_error]


@dataclass(frozen=True)
class LinearFigures:
    """One linear as one rank has it: its name in its layer, expert or None, format and sums."""

    name: str
    expert: int | None
    kind: WeightKind
    sums: KindReport

    def row(self) -> list[Any]:
        """As a journal keeps it."""
        return [self.name, self.expert, self.kind, *self.sums.sums()]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> LinearFigures:
        """Of what `row` gave."""
        name, expert, kind, *sums = row
        return cls(name, expert, kind, KindReport(*sums))


@dataclass
class ConversionReport:
    """What a conversion did: bytes of tensors read and written, seconds, errors by format.

    `resumed_layers` were found of a run before this one that was killed. `linears` are the figures
    of all linears by decoder layer, those of every rank, and `layers` what report.json says of
    each layer.
    """

    input_bytes: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
    resumed_layers: int = 0
    kinds: dict[str, KindReport] = field(default_factory=dict)
    linears: dict[int, list[LinearFigures]] = field(default_factory=dict)

    def count(self, layer: int, linears: Iterable[LinearFigures]) -> None:
        """Take up what was found of a layer, or of one rank's part of it."""
        for linear in linears:
            self.kinds.setdefault(linear.kind, KindReport()).add(linear.sums)
            self.linears.setdefault(layer, []).append(linear)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Rows of the report, layer by layer: `report.write` names their columns."""
        return [_layer(layer, self.linears[layer]) for layer in sorted(self.linears)]


def _layer(layer: int, linears: Iterable[LinearFigures]) -> dict[str, Any]:
    """Sums by format, and relative errors of every linear, as encoded and as rounded."""
    kinds: dict[str, KindReport] = {}
    wholes: dict[tuple[str, int | None], KindReport] = {}
    for linear in linears:
        kinds.setdefault(linear.kind, KindReport()).add(linear.sums)
        wholes.setdefault((linear.name, linear.expert), KindReport()).add(linear.sums)
    return {
        "layer": layer,
        "kinds": {kind: sums.sums() for kind, sums in kinds.items()},
        "linears": [[name, *_errors(wholes[name, None])] for name, expert in wholes
                    if expert is None],
        "experts": [[name, expert, *_errors(sums)] for (name, expert), sums in wholes.items()
                    if expert is not None],
    }  # fmt: skip


def _errors(sums: KindReport) -> tuple[float, float]:
    return sums.relative_error, sums.relative_rounding_error


def bits_per_weight(kinds: Mapping[str, KindReport]) -> float:
    """Over all linears, scales included."""
    total = KindReport()
    for kind in kinds.values():
        total.add(kind)
    return total.bits_per_weight
