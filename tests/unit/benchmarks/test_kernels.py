"""`bench kernels`: what it counts, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_lite.benchmarks import experts
from fastdeploy_lite.benchmarks.ceilings import Ceilings
from fastdeploy_lite.entrypoints.cli import bench_kernels, main
from fastdeploy_lite.model_executor import ops

SMALL = experts.Shape(hidden=128, inner=128, experts=8, top_k=2)
CEILINGS = Ceilings("a machine", 1e9, 1e12, "read", "a product")


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_a_routing_names_different_experts(tokens: int, top_k: int, seed: int) -> None:
    shape = experts.Shape(hidden=64, inner=64, experts=16, top_k=top_k)
    ids = experts.uniform_routing(np.random.default_rng(seed), tokens, shape)
    assert ids.shape == (tokens, top_k)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < 16
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_a_routing_prefers_no_expert() -> None:
    shape = experts.Shape(hidden=64, inner=64, experts=16, top_k=4)
    ids = experts.uniform_routing(np.random.default_rng(5), 20_000, shape)
    counts = np.bincount(ids.ravel(), minlength=16)
    assert np.abs(counts / 5_000 - 1).max() < 0.06  # 4 standard deviations


@pytest.mark.parametrize("kind", ["ccq", "int4", "int8", "dense"])
def test_rows_count_the_work_and_the_bytes(kind: str) -> None:
    (row,) = experts.measure(kind, SMALL, [3], paddle.CPUPlace(), CEILINGS)
    assert row.flops == 3 * 2 * (2 * 128 * 256 + 2 * 128 * 128)
    layers = experts.Layers(kind, SMALL, paddle.CPUPlace(), cold_bytes=1)
    used = np.mean(experts.Batch(SMALL, 3, paddle.CPUPlace()).distinct)
    bits = {"ccq": 2, "int4": 4, "int8": 8, "dense": 16}[kind]
    weights = 3 * 128 * 128
    assert weights * bits / 8 <= layers.expert_bytes <= weights * (bits + 1.5) / 8
    assert row.nbytes == pytest.approx(used * layers.expert_bytes + 2 * 3 * 128 * 4)
    assert row.low_us <= row.us <= row.high_us
    assert row.memory_share == pytest.approx(row.nbytes / row.us * 1e6 / 1e9)
    assert row.matmul_share == pytest.approx(row.flops / row.us * 1e6 / 1e12)


class ModalLayers:
    """Stands for 2-bit layers of a card whose batches of up to 16 tokens have two ways to sum."""

    has_modes = True

    def __init__(self) -> None:
        self.mode = "?"

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def run(self, batch: experts.Batch) -> None:
        other = self.mode == "0" and batch.x.shape[0] <= 16
        ops.upload(np.full(batch.out.shape, 3 + other, np.float32), batch.out)


@pytest.mark.parametrize(("tokens", "wanted"), [(1, ["0", "1"]), (16, ["0", "1"]), (17, ["any"])])
def test_both_modes_are_timed_where_results_differ(tokens: int, wanted: list[str]) -> None:
    layers: Any = ModalLayers()
    batch = experts.Batch(SMALL, tokens, paddle.CPUPlace(), calls=1)
    found = [(mode, layers.mode) for mode in experts.modes(layers, batch)]
    assert found == [(mode, mode) for mode in wanted]


def test_a_cpu_has_one_mode() -> None:
    layers = experts.Layers("ccq", SMALL, paddle.CPUPlace(), cold_bytes=1)
    assert list(experts.modes(layers, experts.Batch(SMALL, 1, paddle.CPUPlace()))) == ["any"]


def test_a_mode_is_that_of_models_loaded_in_it() -> None:
    layers = experts.Layers("ccq", SMALL, paddle.CPUPlace(), cold_bytes=1)
    handles = [SimpleNamespace(same_bits=None) for _ in layers.pairs]
    for (up, _), handle in zip(layers.pairs, handles, strict=True):
        up.handle = handle
    for mode, same_bits in (("1", True), ("0", False)):
        layers.set_mode(mode)
        assert [handle.same_bits for handle in handles] == [same_bits] * len(handles)


def test_what_a_mode_costs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def row(kind: str, tokens: int, mode: str, us: float) -> experts.Row:
        return experts.Row(kind, tokens, mode, us, us, us, 1.0, 1.0, 0.5, 0.5)

    rows = [row("ccq", 1, "0", 60), row("ccq", 1, "1", 90), row("ccq", 64, "any", 500)]
    bench_kernels._print_ratios([*rows, row("int4", 1, "any", 120), row("int4", 64, "any", 400)])
    assert capsys.readouterr().out.split("\n\n") == [
        "\nccq over int4: 0.50 at 1, 1.25 at 64",
        "ccq, deterministic over int4: 0.75 at 1",
        "ccq, deterministic over ccq: 1.50 at 1\n",
    ]  # fmt: skip


def test_layers_are_more_than_a_cache_holds() -> None:
    layers = experts.Layers("int8", SMALL, paddle.CPUPlace(), cold_bytes=1_500_000)
    assert sum(up.nbytes + down.nbytes for up, down in layers.pairs) >= 1_500_000
    assert len({id(up) for up, _ in layers.pairs}) == len(layers.pairs) > 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "roofline.png"
    command = ["bench", "kernels", "--shape", "demo", "--device", "cpu", "--kinds", "ccq,int4"]
    options = ["--tokens", "1,5", "--json", str(file), "--plot", str(picture)]
    assert main.run([*command, *options]) == 0
    text = capsys.readouterr().out
    assert text.count("| ccq |") == text.count("| int4 |") == 2
    assert "ccq over int4: " in text
    result = json.loads(file.read_text())
    assert result["shape"] == "demo"
    assert result["ceilings"]["bytes_per_second"] > 1e8
    assert [(row["kind"], row["tokens"]) for row in result["rows"]] == [
        ("ccq", 1), ("ccq", 5), ("int4", 1), ("int4", 5),
    ]  # fmt: skip
    assert all(row["memory_share"] > 0 for row in result["rows"])
    assert {row["mode"] for row in result["rows"]} == {"any"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kinds", "ccq,int3"], "int3"),
        (["--tokens", "1,0"], "1,0"),
        (["--tokens", "x"], "'x'"),
        (["--tokens", "70000"], "65536"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.run(["bench", "kernels", *options])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
