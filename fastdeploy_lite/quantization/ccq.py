"""The CCQ code (`formats.ccq`, the definition) with its encoder.

Everything of the format is here under the name that scripts use, beside `encode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdeploy_lite.formats.ccq import (
    CODE_MASK,
    FIELD_MASK,
    FIELD_OFFSET,
    FIELD_SHIFTS,
    GROUP_ROWS,
    MAX_LOCAL_SCALE,
    NUM_CODEWORDS,
    ROWS_PER_SCALE_BYTE,
    WEIGHTS_PER_BYTE,
    ArrayF32,
    ArrayI32,
    ArrayU8,
    CCQWeight,
    code_values,
    codebook,
    decode,
    decode_codes,
    fused_multiply_add,
    pack_local_scale,
    unpack_local_scale,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = [
    "CODE_MASK",
    "FIELD_MASK",
    "FIELD_OFFSET",
    "FIELD_SHIFTS",
    "GROUP_ROWS",
    "MAX_LOCAL_SCALE",
    "NUM_CODEWORDS",
    "ROWS_PER_SCALE_BYTE",
    "WEIGHTS_PER_BYTE",
    "ArrayF32",
    "ArrayI32",
    "ArrayU8",
    "CCQWeight",
    "code_values",
    "codebook",
    "decode",
    "decode_codes",
    "encode",
    "fused_multiply_add",
    "pack_local_scale",
    "unpack_local_scale",
]


def encode(
    weight: npt.NDArray[Any], *, codes: Sequence[tuple[float, float]] | None = None
) -> CCQWeight:
    """Encode a finite real matrix ``[K, N]`` (K a multiple of 128), minimising squared error.

    ``codes`` lists the (code_scale, code_zp) pairs that columns may use; None searches them.
    Deterministic. See ``ccq_search.encode`` for the method, its cost and its errors.
    """
    # Here because the search imports this module.
    from fastdeploy_lite.quantization.ccq_search import encode as search  # noqa: PLC0415

    return search(weight, codes=codes)
