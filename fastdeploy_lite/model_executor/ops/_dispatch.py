"""Which native module computes for a place."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Literal

PlaceKind = Literal["cpu", "cuda"]

_MODULES = {
    "cpu": "fastdeploy_lite._ops_cpu",
    "cuda": "fastdeploy_lite.model_executor.ops.cuda_ops",
}
_HOW_TO_BUILD = {
    "cpu": "build it with `pip install .` (needs a C++17 compiler)",
    "cuda": "build it with `pip install .` where nvcc and a card are present, "
    "or set FD_BUILDING_ARCS",
}


def place_kind(place: Any) -> PlaceKind:
    """ "cpu" for Paddle's CPU place; "cuda" for a CUDA place or the `nvidia` pluggable device."""
    return "cpu" if place.is_cpu_place() else "cuda"


@functools.cache
def _load(kind: PlaceKind) -> Any:
    try:
        return importlib.import_module(_MODULES[kind])
    except ImportError as error:
        raise RuntimeError(
            f"the native ops for {kind} cannot be loaded ({error}); {_HOW_TO_BUILD[kind]}"
        ) from error


def native(kind: PlaceKind, op: str) -> Any:
    """The native function `op` for tensors of that kind of place.

    Raises:
        RuntimeError: the native module or this op in it is not built.
    """
    function = getattr(_load(kind), op, None)
    if function is None:
        raise RuntimeError(f"op {op} is not built for place {kind}; {_HOW_TO_BUILD[kind]}")
    return function
