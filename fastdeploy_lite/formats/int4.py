"""Weight-only int4 ("wint4"): a nibble a weight in Paddle's tile layout (see `tiles`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats import tiles
from fastdeploy_lite.formats.base import Order
from fastdeploy_lite.utils.arrays import Array


class Int4(tiles.TiledIntegers):
    """q in -8..7, nominal shape [N / 2, K]."""

    name = title = kernel = "int4"
    config_name = "wint4"
    bits = 4
    column_cut = 4
    largest = 7
    deviation = 4.3

    def pack(self, quantized: Array) -> npt.NDArray[np.int8]:
        """See TiledIntegers."""
        return tiles.pack_int4(quantized)

    def unpack(self, packed: Array) -> npt.NDArray[np.int8]:
        """See TiledIntegers."""
        return tiles.unpack_int4(packed)

    def tile_order(self, order: Order) -> Order:
        """See TiledIntegers."""
        row = np.arange(tiles.TILE)
        place = row // 32 * 32 + 4 * (row % 8) + row % 32 // 8
        index = np.empty(tiles.TILE, np.intp)
        index[place] = place[order]
        return index
