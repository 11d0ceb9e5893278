"""Weight-only int8 ("wint8"): a byte a weight in Paddle's tile layout (see `tiles`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats import tiles
from fastdeploy_lite.formats.base import Order
from fastdeploy_lite.utils.arrays import Array


class Int8(tiles.TiledIntegers):
    """q in -127..127, nominal shape [N, K]."""

    name = title = kernel = "int8"
    config_name = "wint8"
    bits = 8
    column_cut = 2
    largest = 127
    deviation = 73.3

    def pack(self, quantized: Array) -> npt.NDArray[np.int8]:
        """See TiledIntegers."""
        return tiles.pack_int8(quantized)

    def unpack(self, packed: Array) -> npt.NDArray[np.int8]:
        """See TiledIntegers."""
        return tiles.unpack_int8(packed)

    def tile_order(self, order: Order) -> Order:
        """See TiledIntegers."""
        row = np.arange(tiles.TILE)
        place = row // 16 * 16 + 2 * (row % 8) + row % 16 // 8
        index = np.empty(tiles.TILE, np.intp)
        index[place] = place[order]
        return index
