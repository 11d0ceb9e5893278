"""What a weight of the kernels is: its kind, sizes and memory; `weights` allocates and fills it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fastdeploy_lite.model_executor.ops._view import Tensor
from fastdeploy_lite.model_executor.ops.host_link import HostLink

WeightKind = Literal["dense", "int8", "int4", "ccq"]


@dataclass(slots=True, eq=False)
class PackedWeight:
    """One linear map [K, N], or one for each expert, on one place.

    Attributes:
        kind: how the numbers are stored.
        in_features: K.
        out_features: N.
        num_experts: 0 for a plain linear map.
        place: Paddle place of all tensors.
        tensors: the memory; empty for a dense weight until its first fill says bf16 or float32.
        handle: what the native ops take in its place.
    """

    kind: WeightKind
    in_features: int
    out_features: int
    num_experts: int
    place: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    handle: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(int(t.size) * int(t.element_size()) for t in self.tensors.values())

    @property
    def logical_bits(self) -> float:
        """Bits of memory per weight, scales and padding included."""
        weights = self.in_features * self.out_features * max(self.num_experts, 1)
        return 8.0 * self.nbytes / weights


@dataclass(slots=True, eq=False)
class SegmentedWeight:
    """A linear map in parts whose scales differ: x @ W is the sum of x's stretches times parts.

    Parts are stretches of K; those of an expert's gate and up projection are the columns that feed
    the down projection's part of the same number.
    """

    parts: tuple[PackedWeight, ...]

    @property
    def kind(self) -> WeightKind:
        """How the numbers are stored."""
        return self.parts[0].kind

    @property
    def in_features(self) -> int:
        """K."""
        return sum(part.in_features for part in self.parts)

    @property
    def out_features(self) -> int:
        """N."""
        return self.parts[0].out_features

    @property
    def num_experts(self) -> int:
        """0 for a plain linear map."""
        return self.parts[0].num_experts

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.nbytes for part in self.parts)


Weight: TypeAlias = PackedWeight | SegmentedWeight


@dataclass(slots=True, eq=False)
class HostWeight:
    """Experts that stay in main memory while the rest of their layer is on a card.

    Attributes:
        weight: as the CPU's ops take it.
        link: the way there and back.
    """

    weight: Weight
    link: HostLink

    @property
    def kind(self) -> WeightKind:
        """How the numbers are stored."""
        return self.weight.kind

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.out_features

    @property
    def num_experts(self) -> int:
        """At least 1."""
        return self.weight.num_experts

    @property
    def nbytes(self) -> int:
        """Bytes of main memory held."""
        return self.weight.nbytes


ExpertWeight: TypeAlias = Weight | HostWeight
