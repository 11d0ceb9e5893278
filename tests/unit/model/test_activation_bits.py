"""`--activation-bits 16`: coarser activations before quantised weights, a property of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_layer import random_layer, write_layer
from host_links import MemoryLink
from invariance import RunnerTests
from model_driver import make_runner
from tiny_model import write_tiny_model

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.config import ExpertOffloadConfig, LoadConfig, ModelConfig, RuntimeConfig
from fastdeploy_lite.engine import args_utils
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.model_executor import expert_placement, ops
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.worker.model_runner import ModelRunner

IDS = [5, 900, 17, 17, 4000, 8191, 3, 77]


def coarse_runner(folder: Path, **more: Any) -> ModelRunner:
    return make_runner(folder, activation_bits=16, **more)


class TestInAnyCompany(RunnerTests):
    @pytest.fixture(params=["tiny_2bits", "tiny_w4w2"])
    def runner(self, request: pytest.FixtureRequest) -> ModelRunner:
        return coarse_runner(request.getfixturevalue(request.param))


def test_step_size_does_not_change_teacher_forced_logits(tiny_w4w2: Path) -> None:
    checks = RunnerTests.checks
    checks.step_sizes(lambda tokens: coarse_runner(tiny_w4w2, tokens=tokens), (256, 64, 97))


def test_models_of_one_process_differ(tiny_2bits: Path) -> None:
    fine, coarse = make_runner(tiny_2bits), coarse_runner(tiny_2bits)
    expected = make_runner(tiny_2bits).logits(IDS)
    found = coarse.logits(IDS)
    np.testing.assert_array_equal(fine.logits(IDS), expected)
    error = np.abs(found - expected).max()
    assert 0 < error < 0.01 * np.abs(expected).max()


def test_all_quantised_weights_take_them(tiny_w4w2: Path, tmp_path: Path) -> None:
    """Those of a draft layer and an int8 head among them; dense ones do not mind."""
    layer = write_layer(tmp_path / "layer", random_layer(ModelConfig.from_dir(tiny_w4w2)))
    runner = coarse_runner(
        tiny_w4w2,
        load=LoadConfig(lm_head_quantization="wint8"),
        speculative=SpeculativeConfig("mtp", num_speculative_tokens=1, model=str(layer)),
    )
    assert runner._drafting is not None
    weights = [weight for found in runner.model.weights().values() for weight in found]
    for weight in [*weights, *runner._drafting.model.weights()]:
        assert weight.handle.activation_bits == 16


def test_a_bf16_model_is_as_ever(tiny_bf16: Path) -> None:
    found = coarse_runner(tiny_bf16).logits(IDS)
    np.testing.assert_array_equal(found, make_runner(tiny_bf16).logits(IDS))


def test_experts_beside_a_card(tiny_w4w2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = MemoryLink()
    monkeypatch.setattr(expert_placement, "open_link", lambda place: link)
    offloaded = coarse_runner(tiny_w4w2, expert_offload=ExpertOffloadConfig())
    found = offloaded.logits(IDS)
    assert link.crossings
    np.testing.assert_array_equal(found, coarse_runner(tiny_w4w2).logits(IDS))


def test_experts_in_parts(tmp_path: Path) -> None:
    """Folders that ranks have quantised apart."""
    from fastdeploy_lite.quantization.convert import quantize_checkpoint

    wide: Any = {"moe_intermediate_size": 512, "intermediate_size": 512}
    whole, parts = write_tiny_model(tmp_path / "bf16", kind="bf16", **wide), tmp_path / "parts"
    quantize_checkpoint(whole, parts, scheme="2bits", tensor_parallel_size=2, progress=False)
    runner = coarse_runner(parts)
    segmented = [w for w in runner._all_weights() if isinstance(w, ops.SegmentedWeight)]
    assert segmented
    assert {part.handle.activation_bits for w in segmented for part in w.parts} == {16}
    assert (runner.logits(IDS) != make_runner(parts).logits(IDS)).any()


@pytest.mark.parametrize("access", ["copy", "map"])
def test_packed_weights_serve_both(tiny_w4w2: Path, tmp_path: Path, access: Any) -> None:
    load = LoadConfig(packed_cache=tmp_path, packed_cache_access=access)
    fine = make_runner(tiny_w4w2, load=load).logits(IDS)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_ino, file.read_bytes()
    coarse = coarse_runner(tiny_w4w2, load=load).logits(IDS)
    assert list(tmp_path.iterdir()) == [file]
    assert (file.stat().st_ino, file.read_bytes()) == written
    np.testing.assert_array_equal(coarse, coarse_runner(tiny_w4w2).logits(IDS))
    np.testing.assert_array_equal(make_runner(tiny_w4w2, load=load).logits(IDS), fine)


def test_the_demo_still_knows_its_poem() -> None:
    params = SamplingParams(temperature=0, max_tokens=32)
    (fine,), (coarse,) = (
        LLM("demo", max_model_len=256, activation_bits=bits).generate(
            ["《静夜思》\n唐代·李白\n"], params, use_tqdm=False
        )
        for bits in (24, 16)
    )
    assert fine.outputs.text == "床前明月光，疑是地上霜，\n举头望明月，低头思故乡。"
    assert coarse.outputs.token_ids == fine.outputs.token_ids


def test_values(tiny_2bits: Path) -> None:
    assert EngineArgs(model=str(tiny_2bits)).create_runtime_config().activation_bits == 24
    args = EngineArgs(model=str(tiny_2bits), activation_bits=16)
    config = args.create_runtime_config()
    assert config.activation_bits == 16
    with pytest.raises(ConfigError, match="activation_bits must be one of 16, 24, got 8"):
        EngineArgs(model=str(tiny_2bits), activation_bits=8)
    with pytest.raises(ConfigError, match="activation_bits must be 16 or 24, got 8"):
        RuntimeConfig(tiny_2bits, config.model, activation_bits=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("moe_device", [None, "cpu"])
def test_on_a_card_alone_it_has_no_effect_and_that_is_said(
    tiny_2bits: Path, moe_device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(args_utils, "_on_cpu", lambda: False)
    monkeypatch.setattr(args_utils, "_warn_once", said.append)
    EngineArgs(str(tiny_2bits), activation_bits=16, moe_device=moe_device).create_runtime_config()
    message = "activation_bits has no effect here: a card takes activations as bfloat16"
    assert said == ([message] if moe_device is None else [])
