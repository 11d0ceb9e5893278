"""`--lm-head-quantization wint8`: the head rounded as Paddle rounds it, all else as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from model_driver import make_runner
from oracles.ernie_float32 import ErnieFloat32, unpack_int8
from paddle.nn.quant import weight_quantize
from tiny_model import write_tiny_model

from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32
from fastdeploy_lite.config import LoadConfig, ModelConfig
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.model_executor import weights
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

IDS = [5, 900, 17, 17, 4000, 8191, 3, 77]
WINT8 = LoadConfig(lm_head_quantization="wint8")


def rounded_head(folder: Path) -> tuple[ErnieFloat32, np.ndarray]:
    """The oracle of a folder and its head [H, V] after Paddle's int8 rounding."""
    oracle = ErnieFloat32(folder)
    head = paddle.to_tensor(oracle._head(), place=paddle.CPUPlace()).astype("bfloat16")
    packed, scale = weight_quantize(head, algo="weight_only_int8", arch=80)
    return oracle, unpack_int8(
        packed.numpy().view(np.uint8), scale.astype("float32").numpy(), *head.shape
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bf16", "w4w2"])
def test_logits_are_those_of_a_head_that_paddle_rounded(
    tmp_path: Path, kind: Any, tied: bool
) -> None:
    write_tiny_model(tmp_path, kind=kind, tied=tied)
    runner, plain = make_runner(tmp_path, load=WINT8), make_runner(tmp_path)
    oracle, head = rounded_head(tmp_path)
    found = runner.logits(IDS)
    assert np.abs(found - oracle.hidden(IDS) @ head).max() < 1e-3
    assert not np.array_equal(found, plain.logits(IDS))
    kinds = {role: {w.kind for w in kept} for role, kept in runner.model.weights().items()}
    assert kinds["head"] == {"int8"}
    assert kinds["embedding"] == {"dense"}
    ours, theirs = runner.memory_report().weights, plain.memory_report().weights
    table = theirs["embedding"]
    assert 0.5 * table < ours["head"] < 0.52 * table
    assert {**ours, "head": 0} == {**theirs, "head": 0}


def test_memory_is_asked_for_the_head(tiny_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(weights, "check_memory", asked.append)
    make_runner(tiny_bf16)
    head = make_runner(tiny_bf16, load=WINT8).memory_report().weights["head"]
    assert asked[1] - asked[0] == pytest.approx(head, rel=0.01)


def test_dummy_weights_have_the_head(tiny_bf16: Path) -> None:
    runner = make_runner(tiny_bf16, load=LoadConfig("dummy", lm_head_quantization="wint8"))
    assert {w.kind for w in runner.model.weights()["head"]} == {"int8"}


def test_a_head_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, kind="bf16")
    oracle = ErnieFloat32(tmp_path)
    where, base, entry = oracle.files._found["ernie.embed_tokens.weight"]
    with where.open("r+b") as stream:
        stream.seek(base + entry["data_offsets"][0] + 2 * 64)
        stream.write(b"\xc0\x7f")  # NaN in bf16
    assert np.isnan(bfloat16_to_float32(oracle.files.raw("ernie.embed_tokens.weight"))).any()
    with pytest.raises(CheckpointError, match=r"weight: .*(not finite|nan)") as caught:
        make_runner(tmp_path, load=WINT8)
    assert "\n" not in str(caught.value)


def test_the_flag_reaches_the_loader(tiny_bf16: Path) -> None:
    made = EngineArgs(model=str(tiny_bf16), lm_head_quantization="wint8").create_runtime_config()
    assert made.load.head_kind == "int8"
    with pytest.raises(ConfigError, match="lm_head_quantization"):
        LoadConfig(lm_head_quantization="wint4")  # type: ignore[arg-type]


def test_sizes_that_int8_cannot_hold_are_refused_before_reading(tiny_bf16: Path) -> None:
    model = ModelConfig.from_dir(tiny_bf16)
    config = make_runner(tiny_bf16).config
    odd = replace(config, load=WINT8, model=replace(model, vocab_size=model.vocab_size - 8))
    with pytest.raises(ConfigError, match=r"lm_head_quantization: the head of a rank is \d+ x \d+"):
        weights.open_source(odd, paddle.CPUPlace(), False)
