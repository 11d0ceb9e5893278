"""Every weight format against the matrix that it decodes to; a format that tests bring along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from model_driver import make_runner
from tiny_model import random_linear, tiny_config, tiny_tensors, write_tensors

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.formats import Arrays, TensorSpec, WeightFormat, ccq
from fastdeploy_lite.formats.base import GROUP, Order, Range, spread, take
from fastdeploy_lite.utils.arrays import bfloat16_to_float32

NAMES = ("dense", "int8", "int4", "ccq")
ROWS, COLUMNS = 384, 192


class Sign(WeightFormat):
    """One byte a weight, its sign, and a scale per column; kept as bf16."""

    name = title = "sign"
    config_name = "wsign"
    kernel = "dense"
    bits = 8
    column_bits = 32
    vectors = ("scale",)

    def shape(self, arrays: Arrays) -> tuple[int, int]:
        rows, columns = arrays["signs"].shape
        return rows, columns

    def tensors(self, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("signs", ("I8",), ((rows, columns),)),
            TensorSpec("scale", ("F32",), ((columns,),)),
        )

    def slice_columns(self, arrays: Arrays, ranges: Sequence[Range]) -> Arrays:
        return {name: take(array, ranges, -1) for name, array in arrays.items()}

    def slice_rows(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        return {**arrays, "signs": arrays["signs"][start:stop]}

    def join_columns(self, parts: Sequence[Arrays]) -> Arrays:
        return {n: np.concatenate([part[n] for part in parts], -1) for n in parts[0]}

    def join_rows(self, parts: Sequence[Arrays]) -> Arrays | None:
        if not self.same_vectors(parts):
            return None
        return {**parts[0], "signs": np.concatenate([part["signs"] for part in parts])}

    def permute_columns(self, arrays: Arrays, order: Order) -> Arrays:
        return {n: np.take(a, spread(order, a.shape[-1]), -1) for n, a in arrays.items()}

    def permute_rows(self, arrays: Arrays, order: Order) -> Arrays:
        signs = arrays["signs"]
        return {**arrays, "signs": signs[spread(order, len(signs))]}

    def decode(self, arrays: Arrays) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = arrays["signs"].view(np.int8).astype(np.float32)
        return values * arrays["scale"]

    def for_kernel(self, arrays: Arrays) -> Arrays:
        return {"weight": self.decode(arrays)}

    def random(self, random: np.random.Generator, rows: int, columns: int) -> Arrays:
        return {
            "signs": random.choice(np.array([-1, 1], np.int8), (rows, columns)),
            "scale": np.full(columns, rows**-0.5, np.float32),
        }


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sign]:
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    format_ = Sign()
    assert formats.register(format_) is format_
    yield format_


def a_matrix(name: str, seed: int = 0, rows: int = ROWS) -> tuple[Arrays, npt.NDArray[np.float32]]:
    format_ = formats.get(name)
    arrays = format_.random(np.random.default_rng(seed), rows, COLUMNS)
    for vector in format_.vectors:  # distinct, so that a column that got lost is noticed
        spread_ = np.linspace(0.5, 2, COLUMNS, dtype=np.float32)
        arrays[vector] = (arrays[vector] * spread_).astype(np.float32)
    return arrays, format_.decode(arrays)


@pytest.mark.parametrize("name", (*NAMES, "sign"))
def test_tensors_are_those_of_the_file(name: str, sign: Sign) -> None:
    arrays, matrix = a_matrix(name)
    specs = formats.get(name).tensors(ROWS, COLUMNS)
    assert [spec.suffix for spec in specs] == list(arrays)
    for spec in specs:
        assert arrays[spec.suffix].shape in spec.shapes
    assert matrix.shape == formats.get(name).shape(arrays) == (ROWS, COLUMNS)
    assert abs(matrix).max() > 0
    kept = sum(array.nbytes for array in arrays.values())
    assert formats.get(name).nbytes(ROWS, COLUMNS) == kept


@pytest.mark.parametrize("name", (*NAMES, "sign"))
def test_parts_are_parts_of_the_matrix(name: str, sign: Sign) -> None:
    format_ = formats.get(name)
    arrays, matrix = a_matrix(name)
    ranges = [(64, 128), (16, 48)]
    found = format_.decode(format_.slice_columns(arrays, ranges))
    wanted = np.concatenate([matrix[:, 64:128], matrix[:, 16:48]], axis=1)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(
        format_.decode(format_.slice_rows(arrays, 128, 256)), matrix[128:256]
    )


@pytest.mark.parametrize("name", (*NAMES, "sign"))
def test_joined_parts_are_the_whole(name: str, sign: Sign) -> None:
    format_ = formats.get(name)
    arrays, matrix = a_matrix(name)
    columns = [format_.slice_columns(arrays, [part]) for part in ((0, 64), (64, 192))]
    joined = format_.join_columns(columns)
    rows = format_.join_rows([format_.slice_rows(arrays, *p) for p in ((0, 128), (128, ROWS))])
    assert rows is not None
    for found in (joined, rows):
        np.testing.assert_array_equal(format_.decode(found), matrix)
        assert all(np.array_equal(found[n].view(arrays[n].dtype), arrays[n]) for n in arrays)


@pytest.mark.parametrize("name", ("int8", "int4", "ccq", "sign"))
def test_rows_of_other_scales_are_not_joined(name: str, sign: Sign) -> None:
    format_ = formats.get(name)
    parts = [a_matrix(name)[0], a_matrix(name)[0]]
    vector = format_.vectors[-1]
    parts[1][vector] = parts[1][vector] * np.float32(1.5)
    assert format_.join_rows(parts) is None


@pytest.mark.parametrize("name", (*NAMES, "sign"))
def test_orders_move_columns_and_rows(name: str, sign: Sign) -> None:
    format_ = formats.get(name)
    arrays, matrix = a_matrix(name)
    order = np.random.default_rng(7).permutation(GROUP)
    columns = format_.decode(format_.permute_columns(arrays, order))
    np.testing.assert_array_equal(columns, matrix[:, spread(order, COLUMNS)])
    if name == "ccq":
        with pytest.raises(ValueError, match="four of them share a byte"):
            format_.permute_rows(arrays, order)
        assert format_.permute_rows(arrays, np.arange(GROUP)) is arrays
        return
    rows = format_.decode(format_.permute_rows(arrays, order))
    np.testing.assert_array_equal(rows, matrix[spread(order, ROWS)])


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="ccq: found K = 64, N = 8, expected K a multiple of 128"):
        formats.get("ccq").check_sizes(64, 8)
    with pytest.raises(ValueError, match="int8: cannot cut columns"):
        formats.get("int8").slice_columns(a_matrix("int8")[0], [(0, 3)])
    with pytest.raises(ValueError, match="ccq: cannot cut rows"):
        formats.get("ccq").slice_rows(a_matrix("ccq")[0], 64, 128)


def test_stored_rows_of_the_permuted_generation() -> None:
    """checkpoint_format: stored 16 t + 2 q + s is true 8 q + 2 t + s."""
    true = np.arange(128)
    stored = ccq.to_stored_order(true, "permuted")
    for t in range(4):
        for q in range(8):
            for s in range(2):
                assert stored[16 * t + 2 * q + s] == 8 * q + 2 * t + s
    np.testing.assert_array_equal(
        stored[:64].reshape(4, 8, 2).transpose(1, 0, 2).reshape(-1), true[:64]
    )
    np.testing.assert_array_equal(stored[4:8], [16, 17, 24, 25])  # the rows of a byte
    np.testing.assert_array_equal(ccq.to_true_order(stored, "permuted"), true)
    assert ccq.to_stored_order(true, "natural") is true
    with pytest.raises(ValueError, match="multiple of 64"):
        ccq.to_stored_order(np.arange(65), "permuted")


def test_a_registered_format_is_found_by_both_names(sign: Sign) -> None:
    assert formats.get("sign") is formats.from_config_name("wsign") is sign
    assert "wsign" in formats.config_names()
    assert "sign" in formats.names()


def test_a_model_in_a_registered_format_runs(sign: Sign, tmp_path: Path) -> None:
    """config.json names it, files hold it, the loader keeps it: one new class, no other change."""
    config = tiny_config("bf16")
    tensors = tiny_tensors(config)
    quantized = {
        "quantization": "mix_quant",
        "dense_quant_type": "wint8",
        "moe_quant_type": "wsign",
    }
    signs = config | {"is_quantized": True, "quantization_config": quantized}
    random = np.random.default_rng(1)
    decoded = {}
    for linear in model_linears(ModelConfig.from_dict(signs)):
        del tensors[f"{linear.module}.weight"]
        if linear.kind != "sign":
            tensors |= random_linear(linear, random)
            continue
        arrays = sign.random(random, linear.in_features, linear.out_features)
        decoded[linear.module] = sign.decode(arrays)
        tensors |= {
            f"{linear.module}.signs": (arrays["signs"], "I8"),
            f"{linear.module}.scale": (arrays["scale"], "F32"),
        }
    assert decoded
    write_tensors(tmp_path / "signs", signs, tensors)
    runner = make_runner(tmp_path / "signs")
    assert runner.config.model.describe_weights() == "int8 linears, sign experts"
    logits = runner.logits(list(range(20)))

    plain = {k: v for k, v in tensors.items() if not k.endswith((".signs", ".scale"))}
    for linear in model_linears(ModelConfig.from_dict(config)):
        if linear.module in decoded:
            plain[f"{linear.module}.weight"] = (decoded[linear.module], "F32")
        else:
            arrays_ = {
                name: plain.pop(f"{linear.module}.{name}")[0]
                for name in ("quant_weight", "weight_scale")
            }
            arrays_["weight_scale"] = bfloat16_to_float32(arrays_["weight_scale"])
            weight = formats.get("int8").decode(arrays_)
            plain[f"{linear.module}.weight"] = (weight, "F32")
    write_tensors(tmp_path / "plain", config, plain)
    wanted = make_runner(tmp_path / "plain").logits(list(range(20)))
    np.testing.assert_allclose(logits, wanted, atol=1e-3)
