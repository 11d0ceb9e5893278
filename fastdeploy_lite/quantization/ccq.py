"""The CCQ code (`formats.ccq`, the definition) with its encoder.

Everything of the format is here under the name that scripts use, beside `encode`.
"""

from __future__ import annotations

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
from fastdeploy_lite.quantization.ccq_search import encode

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
