"""The int8 and int4 file layouts under their former name; `formats.tiles` is their home."""

from fastdeploy_lite.formats.tiles import (
    TILE,
    check_sizes,
    pack_int4,
    pack_int8,
    packed_shape,
    unpack_int4,
    unpack_int8,
)

__all__ = [
    "TILE",
    "check_sizes",
    "pack_int4",
    "pack_int8",
    "packed_shape",
    "unpack_int4",
    "unpack_int8",
]
