"""Linear maps, packed weights and mixture of experts, stated plainly in numpy.

Written from docs/checkpoint_format.md and not from the package: position formulas element by
element, the fused multiply-add in exact integer arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

GROUP = 64


def round_to_float32(numerator: int, exponent: int) -> float:
    """`numerator * 2**exponent` rounded once to the nearest float32, ties to even."""
    size = abs(numerator).bit_length()
    if size > 24:
        drop = size - 24
        rest, half = abs(numerator) & ((1 << drop) - 1), 1 << (drop - 1)
        kept = abs(numerator) >> drop
        kept += rest > half or (rest == half and kept & 1)
        numerator, exponent = kept if numerator > 0 else -kept, exponent + drop
    return float(np.ldexp(float(numerator), exponent))


def as_scaled_integer(value: float) -> tuple[int, int]:
    """(n, e) with value = n * 2**e."""
    numerator, denominator = float(value).as_integer_ratio()
    return numerator, 1 - denominator.bit_length()


def fused_multiply_add(byte: int, scale: np.float32, addend: np.float32) -> float:
    """byte * scale + addend with one rounding to float32."""
    (s, s_exponent), (a, a_exponent) = as_scaled_integer(scale), as_scaled_integer(addend)
    exponent = min(s_exponent, a_exponent)
    total = (byte * s << (s_exponent - exponent)) + (a << (a_exponent - exponent))
    return round_to_float32(total, exponent)


def ccq_codes(code_scale: np.ndarray, code_zp: np.ndarray) -> np.ndarray:
    """The low 15 bits of floor(fma(byte, code_scale, code_zp + 0.5)): int64 [256, N]."""
    codes = np.empty((256, len(code_scale)), np.int64)
    for n, (scale, zero) in enumerate(zip(code_scale, code_zp, strict=True)):
        addend = np.float32(zero) + np.float32(0.5)
        for byte in range(256):
            codes[byte, n] = int(np.floor(fused_multiply_add(byte, scale, addend))) & 0x7FFF
    return codes


def ccq_weight(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix that five CCQ tensors stand for: float64 [K, N]."""
    packed, local = arrays["quant_weight"], arrays["weight_scale"]
    quads, columns = packed.shape
    codes = ccq_codes(arrays["code_scale"], arrays["code_zp"])
    weight = np.empty((quads * 4, columns))
    for row in range(quads * 4):
        code = codes[packed[row // 4], np.arange(columns)]
        value = ((code >> (9 - 3 * (row % 4))) & 63) - 32
        scale = local[row // 128] >> (4 if row // GROUP % 2 == 0 else 0) & 15
        weight[row] = value * scale.astype(np.int64)
    return weight * arrays["super_scales"].astype(np.float64)


def permute(quantized: np.ndarray, bits: int) -> np.ndarray:
    """File bytes of an int8 or int4 matrix [K, N], by the format's position formula."""
    rows, columns = quantized.shape
    k, n = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    tiles = rows // GROUP
    if bits == 8:
        place = ((n // 2) * tiles + k // 64) * 128 + (n % 2) * 64
        place += (k % 64) // 16 * 16 + 2 * (k % 8) + (k % 16) // 8
        flat = np.empty(rows * columns, np.uint8)
        flat[place] = quantized + 128
        return flat
    place = ((n // 4) * tiles + k // 64) * 256 + (n % 4) * 64
    place += (k % 64) // 32 * 32 + 4 * (k % 8) + (k % 32) // 8
    nibbles = np.empty(rows * columns, np.uint8)
    nibbles[place] = quantized + 8
    return nibbles[0::2] | nibbles[1::2] << 4


def random_weight(
    kind: str, k: int, n: int, rng: np.random.Generator
) -> tuple[dict[str, Any], np.ndarray]:
    """Arrays as `fill_weight` takes them, and the matrix they stand for: float64 [k, n].

    kind: "bf16", "f32" (dense), "int8", "int4" or "ccq".
    """
    if kind in ("bf16", "f32"):
        weight = rng.standard_normal((k, n), dtype=np.float32)
        if kind == "f32":
            return {"weight": weight}, weight.astype(np.float64)
        bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
        return {"weight": bits}, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "ccq":
        arrays = {
            "quant_weight": rng.integers(0, 256, (k // 4, n), dtype=np.uint8),
            "weight_scale": rng.integers(0, 256, (k // 128, n), dtype=np.uint8),
            "super_scales": rng.uniform(-0.01, 0.01, n).astype(np.float32),
            "code_scale": rng.uniform(60, 140, n).astype(np.float32),
            "code_zp": rng.uniform(-5000, 5000, n).astype(np.float32),
        }
        return arrays, ccq_weight(arrays)
    half = 128 if kind == "int8" else 8
    quantized = rng.integers(-half, half, (k, n))
    scale = rng.uniform(0.001, 0.02, n).astype(np.float32)
    arrays = {"quant_weight": permute(quantized, 8 if kind == "int8" else 4), "weight_scale": scale}
    return arrays, quantized * scale.astype(np.float64)


def rounded_activations(x: np.ndarray, bits: int = 24) -> np.ndarray:
    """The activations [T, K] that quantised weights are multiplied by: float64.

    A group of 64 is a power of two times integers below 2^23; those of 16 bits are multiples of
    256. The power is the least, and at least 2^-100, that keeps the largest integer at most
    0x7f7f7f or 0x7f7f00. Rounding is to nearest, ties to even; a group that holds an infinity or a
    NaN is NaN throughout.
    """
    largest, unit = (0x7F7F7F, 1) if bits == 24 else (0x7F7F00, 256)
    groups = x.astype(np.float64).reshape(len(x), -1, GROUP)
    result = np.empty_like(groups)
    for index in np.ndindex(groups.shape[:2]):
        group = groups[index]
        top, exponent = np.abs(group).max(), 100
        while np.isfinite(top) and np.ldexp(top, exponent) > largest:
            exponent -= 1
        rounded = np.rint(np.ldexp(group, exponent) / unit) * unit
        result[index] = np.ldexp(rounded, -exponent) if np.isfinite(top) else np.nan
    return result.reshape(x.shape)


def linear_error_bound(
    x: np.ndarray, weight: np.ndarray, quantized: bool, activation_bits: int = 24
) -> np.ndarray:
    """How far a float32 linear may be from float64: [T, N].

    The roundings of the sums (one a group, or one an element for dense weights), and for quantised
    weights the error of the activations, 2^-22.99 of the group's largest element, or 2^-14.99.
    """
    x, weight = np.abs(x.astype(np.float64)), np.abs(weight)
    depth = weight.shape[0]
    sums = depth // GROUP + 5 if quantized else depth + 2
    bound = sums * 2.0**-24 * (x @ weight)
    if quantized:
        tops = x.reshape(len(x), -1, GROUP).max(axis=2).repeat(GROUP, axis=1)
        bound += 2.0 ** (1.1 - activation_bits) * (tops @ weight)
    return bound + 1e-37


def route(
    x: np.ndarray, gate: np.ndarray, bias: np.ndarray | None, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and their weights: int64 [T, k], float64 [T, k]."""
    logits = x.astype(np.float64) @ gate.astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    score = p if bias is None else p + bias
    ids = np.argsort(-score, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(p, ids, axis=1)
    return ids, chosen / chosen.sum(axis=1, keepdims=True)


def moe(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, up_gate: np.ndarray, down: np.ndarray
) -> np.ndarray:
    """Sum over slots of weight * expert(x); up_gate [E, H, 2 I], down [E, I, H]; float64 [T, H]."""
    out = np.zeros((len(x), down.shape[2]))
    for t, row in enumerate(x.astype(np.float64)):
        for expert, share in zip(ids[t], weights[t].astype(np.float64), strict=True):
            gate, up = np.split(row @ up_gate[expert], 2)
            out[t] += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
    return out
