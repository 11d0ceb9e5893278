"""Native CPU kernels. Every op writes into the views that it is given and releases the GIL.

A view is (address, dtype name, shape, strides in elements) of memory that the caller keeps alive.
`fastdeploy_lite.model_executor.ops` holds the documented functions; call those.
"""

from collections.abc import Sequence
from typing import TypeAlias

View: TypeAlias = tuple[int, str, Sequence[int], Sequence[int]]

# --- system -------------------------------------------------------------------------------------
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
