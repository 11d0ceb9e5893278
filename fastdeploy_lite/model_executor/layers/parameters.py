"""What layers ask of whoever supplies their parameters (a checkpoint, or made-up numbers)."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from fastdeploy_lite.model_executor.ops import PackedWeight

Split = Literal["column", "row", "qkv", "up_gate"]
"""How tensor parallelism cuts a matrix [K, N]: along N, along K, by heads, or gate and up apart."""


class ParameterSource(Protocol):
    """Supplier of parameters, each asked for once, in the order of the model.

    Sizes are those of the whole model; a source for one tensor-parallel rank returns that rank's
    part, whose own sizes are in the weight. All raise CheckpointError when a parameter cannot be
    had.
    """

    def linear(
        self, module: str, in_features: int, out_features: int, split: Split
    ) -> PackedWeight:
        """Weight of the linear `module`, in the form in which the files hold it."""

    def experts(
        self, layer: int, name: str, in_features: int, out_features: int, split: Split
    ) -> PackedWeight:
        """Linear `name` of all routed experts of decoder layer `layer`."""

    def embedding(self) -> PackedWeight:
        """The table [V, H] as a dense weight that also serves as a tied head."""

    def head(self) -> PackedWeight | None:
        """The matrix of logits, None when it is the embedding table."""

    def vector(self, key: str, size: int) -> Any:
        """A norm's scale [size]."""

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """Gate matrix float32 [H, E] and selection bias float32 [E] or None."""
