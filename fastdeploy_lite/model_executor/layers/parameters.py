"""What layers ask of whoever supplies their parameters (a checkpoint, or made-up numbers)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from fastdeploy_lite.model_executor.ops import ExpertWeight, PackedWeight, Weight


class ParameterSource(Protocol):
    """Supplier of one rank's parameters, each asked for once and in the order of the model.

    Names are checkpoint keys without the suffix; sizes and forms are the supplier's knowledge. All
    methods raise CheckpointError when a parameter cannot be had.

    Attributes:
        row_order: how the rows of 2-bit experts are read and why, "" without such experts.
        is_permuted: whether the hidden channels come in another order than the files', see
            checkpoint.host_weights.PermutedWeights.
    """

    @property
    def row_order(self) -> str: ...

    @property
    def is_permuted(self) -> bool: ...

    def layers(self, count: int) -> Iterator[int]:
        """Numbers of the decoder layers, to be built one by one; shows how many are."""

    def linear(self, module: str) -> Weight:
        """Weight of the linear `module`."""

    def experts(self, layer: int, name: str) -> ExpertWeight | None:
        """Linear `name` of all routed experts of decoder layer `layer`; None where this rank has
        no part of them."""

    def embedding(self) -> PackedWeight:
        """The table [V, H] as a dense weight [H, V] that also serves as a tied head."""

    def head(self) -> PackedWeight | None:
        """The dense matrix [H, V] of logits, None when it is the embedding table."""

    def vector(self, key: str) -> Any:
        """A norm's scale [H]."""

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """Gate matrix float32 [H, E] and selection bias float32 [E] or None."""

    def __enter__(self) -> ParameterSource:
        """Begin loading."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End of loading: everything has been asked for, or it failed."""


class DraftParameterSource(ParameterSource, Protocol):
    """Supplier of a draft layer's parameters."""

    def projection(self, key: str) -> tuple[PackedWeight, PackedWeight]:
        """The halves [H, H] of the matrix [2H, H] that joins a token and a hidden state."""
