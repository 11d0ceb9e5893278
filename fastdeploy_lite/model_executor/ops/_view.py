"""From a Paddle tensor to what a native op takes: (address, dtype name, shape, strides).

The checks here are the only ones between a model and raw pointers, so every op passes every tensor
through `Arguments`. An op makes about five views a call, at about 2 us each.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeAlias, cast

import paddle

from fastdeploy_lite.model_executor.ops._dispatch import PlaceKind, native, place_kind

Tensor: TypeAlias = Any
"""A `paddle.Tensor`; Paddle's own annotations are not checked here."""
View: TypeAlias = tuple[int, str, list[int], list[int]]
"""Address, dtype name, shape, strides in elements."""

DTYPE_NAMES: dict[Any, str] = {
    paddle.float32: "float32",
    paddle.bfloat16: "bfloat16",
    paddle.int64: "int64",
    paddle.int32: "int32",
    paddle.int16: "int16",
    paddle.int8: "int8",
    paddle.uint8: "uint8",
}
"""Dtypes that ops take; Paddle 3.2 has no unsigned types but uint8."""
ACTIVATION_DTYPE: dict[PlaceKind, str] = {"cpu": "float32", "cuda": "bfloat16"}


class ScratchSource(Protocol):
    """Source of named scratch tensors, as `model_executor.workspace.Workspace`."""

    def get(self, name: str, shape: list[int], dtype: str) -> Tensor:
        """Return an uninitialised tensor."""
        ...

    def zeroed(self, name: str, shape: list[int], dtype: str) -> Tensor:
        """Return a tensor that held zeros when it was made and keeps what ops leave in it."""
        ...


class WeightOnPlace(Protocol):
    """What an op reads of a `PackedWeight`."""

    num_experts: int
    place: Any
    handle: Any


_FIXED = "fd_lite_fixed_view"
_PLACES: list[Any] = []


def intern_place(place: Any) -> Any:
    """One Python object per place: comparing two costs 1.1 us, asking `is` nothing."""
    for known in _PLACES:
        if known == place:
            return known
    _PLACES.append(place)
    return place


def fix(tensor: Tensor) -> Tensor:
    """Promise that the tensor keeps its memory, shape and dtype; return it.

    Ops then remember its view, which saves 3 us per use: half of a decode step of a small model.
    Values may change. In-place operations that give a tensor other memory must not be used on it.
    """
    view = Arguments("fix", tensor).view(
        "tensor", tensor, tuple(DTYPE_NAMES.values()), *[None] * len(tensor.shape)
    )
    place = intern_place(tensor.place)
    accepted: set[Any] = set()  # (dtype, shape) that calls asked for and this tensor satisfies
    setattr(tensor, _FIXED, (place, place_kind(place), view, accepted))
    return tensor


class Arguments:
    """Collects and checks the tensors of one call of an op; all must lie on the first one's place.

    Attributes:
        op: name of the op, for messages and dispatch.
        place: Paddle place of the first tensor.
        kind: kind of that place.
    """

    __slots__ = ("kind", "op", "place")

    def __init__(self, op: str, first: Tensor) -> None:
        self.op = op
        if not isinstance(first, paddle.Tensor):
            raise TypeError(f"{op}: expected a paddle.Tensor, found {type(first).__name__}")
        fixed = getattr(first, _FIXED, None)
        self.place: Any
        self.kind: PlaceKind
        if fixed is None:
            self.place = intern_place(first.place)
            self.kind = place_kind(self.place)
        else:
            self.place, self.kind, _, _ = fixed

    @property
    def activation(self) -> str:
        """dtype of activations at this place."""
        return ACTIVATION_DTYPE[self.kind]

    def view(
        self, name: str, tensor: Tensor, dtype: str | tuple[str, ...], *shape: int | None
    ) -> View:
        """Check one tensor and return its view.

        Args:
            name: the argument's name, for messages.
            tensor: the tensor.
            dtype: the dtype, or those, that the op accepts.
            shape: expected shape; None accepts any extent along that axis.

        Raises:
            TypeError: not a tensor, or another dtype.
            ValueError: another shape or place, or a last axis with gaps.
        """
        fixed = getattr(tensor, _FIXED, None)
        if fixed is not None and fixed[0] is self.place and (dtype, shape) in fixed[3]:
            return cast(View, fixed[2])
        view = self._checked_view(name, tensor, dtype, shape)
        if fixed is not None:
            fixed[3].add((dtype, shape))
        return view

    def _checked_view(
        self,
        name: str,
        tensor: Tensor,
        dtype: str | tuple[str, ...],
        shape: tuple[int | None, ...],
    ) -> View:
        if not isinstance(tensor, paddle.Tensor):
            raise TypeError(
                f"{self.op}: {name} must be a paddle.Tensor, found {type(tensor).__name__}"
            )
        found = DTYPE_NAMES.get(tensor.dtype)
        if found is None or (found != dtype if isinstance(dtype, str) else found not in dtype):
            wanted = dtype if isinstance(dtype, str) else " or ".join(dtype)
            raise TypeError(f"{self.op}: {name} has dtype {tensor.dtype}, expected {wanted}")
        extents, strides = tensor.shape, tensor.strides
        if 0 in extents:  # Paddle leaves such strides meaningless; nothing is read
            strides = [math.prod(extents[axis + 1 :]) for axis in range(len(extents))]
        if len(extents) != len(shape) or any(
            want is not None and want != have for want, have in zip(shape, extents, strict=True)
        ):
            wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
            raise ValueError(f"{self.op}: {name} has shape {list(extents)}, expected [{wanted}]")
        if extents and strides[-1] != 1 and extents[-1] > 1:
            raise ValueError(
                f"{self.op}: {name} has stride {strides[-1]} along its last axis, expected 1: "
                f"call contiguous() on it"
            )
        if tensor.place != self.place:
            raise ValueError(
                f"{self.op}: {name} is on {tensor.place}, the other arguments on {self.place}"
            )
        return tensor.data_ptr(), found, extents, strides

    def weight(self, name: str, weight: WeightOnPlace, experts: bool = False) -> Any:
        """Check a packed weight and return what the native op takes in its place.

        Raises:
            TypeError: not a PackedWeight.
            ValueError: another place, never filled, or with experts where there should be none.
        """
        handle = getattr(weight, "handle", None)
        if handle is None:
            if not hasattr(weight, "handle"):
                raise TypeError(
                    f"{self.op}: {name} must be a PackedWeight, found {type(weight).__name__}"
                )
            raise ValueError(f"{self.op}: {name} was never filled")
        if (weight.num_experts > 0) != experts:
            raise ValueError(
                f"{self.op}: {name} has {weight.num_experts} experts, expected "
                f"{'at least 1' if experts else 'a plain linear map'}"
            )
        if weight.place is not self.place and weight.place != self.place:
            raise ValueError(
                f"{self.op}: {name} is on {weight.place}, the other arguments on {self.place}"
            )
        return handle

    def native(self, op: str | None = None) -> Any:
        """The native function of this op (or of another name) for this place."""
        return native(self.kind, op or self.op)
