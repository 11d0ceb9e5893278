"""Second moments of what enters the linears that all tokens of a layer pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.models.linear import Role
from fastdeploy_lite.quantization.products import Products

ArrayF32 = npt.NDArray[np.float32]
ROWS_AT_ONCE = 8192
"""Tokens that wait for one product: a sum of [K, K] for every window would take longer."""
MOST_INPUTS = 8192
"""Of a linear whose moments are taken: 256 MiB of them, 1.5 GiB more while they are factorised.
Dense layers have wider ones (12,288 in 21B, 28,672 in 300B), and int8 loses little there."""


@dataclass
class _Input:
    """Of one linear: rows that wait, their number, moments of those before them, all tokens."""

    rows: list[ArrayF32] = field(default_factory=list)
    waiting: int = 0
    moments: ArrayF32 | None = None
    tokens: int = 0


class InputMoments:
    """Adds up the moments of several linears, window by window."""

    def __init__(self, products: Products) -> None:
        """`products` takes the products."""
        self._products = products
        self._inputs: dict[Role, _Input] = {}

    def see(self, role: Role, x: ArrayF32) -> None:
        """Count rows [T, K]; those of a linear that is too wide are passed over."""
        if x.shape[1] > MOST_INPUTS:
            return
        entered = self._inputs.setdefault(role, _Input())
        entered.rows.append(x)
        entered.waiting += len(x)
        if entered.waiting >= ROWS_AT_ONCE:
            self._add_up(entered)

    def take(self, role: Role) -> ArrayF32 | None:
        """Positive definite moments [K, K], mean 1, of one linear; they are not kept.

        None: it is too wide.
        """
        entered = self._inputs.pop(role, None)
        if entered is None:
            return None
        self._add_up(entered)
        assert entered.moments is not None
        return self._products.blend(entered.moments, entered.tokens)

    def _add_up(self, entered: _Input) -> None:
        if not entered.rows:
            return
        rows = np.concatenate(entered.rows)
        entered.rows, entered.waiting = [], 0
        found = self._products.second_moment(rows)
        entered.moments = found if entered.moments is None else entered.moments + found
        entered.tokens += len(rows)
