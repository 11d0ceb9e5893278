"""`--quantization` on a bf16 checkpoint: the same model as the one converted beforehand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from model_driver import make_runner
from oracles.ernie_float32 import ErnieFloat32
from paddle.nn.quant import weight_quantize
from tiny_model import TOKENIZER_FILES, tiny_config, write_tensors, write_tiny_model

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.checkpoint import Checkpoint, inventory
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.config import LoadConfig, ModelConfig
from fastdeploy_lite.model_executor import weights
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.quantization_config import QuantizationConfig
from fastdeploy_lite.utils.errors import CheckpointError, FastDeployError
from fastdeploy_lite.worker.model_runner import ModelRunner

IDS = [5, 900, 17, 17, 4000, 8191, 3, 77]


def online(folder: Path, wanted: str | dict[str, Any], **runtime: Any) -> ModelRunner:
    """A runner on bf16 files that are quantised while they are read."""
    return make_runner(
        folder, model=ModelConfig.from_dir(folder).with_quantization(wanted), **runtime
    )


def kept_kinds(runner: ModelRunner) -> dict[str, set[str]]:
    """Formats in memory by role."""
    return {role: {w.kind for w in found} for role, found in runner.model.weights().items()}


def write_with_paddle(source: Path, folder: Path, scheme: str) -> Path:
    """Convert a bf16 checkpoint with Paddle's own operator; shares no code with the product."""
    checkpoint = Checkpoint.open(source)
    quantization = QuantizationConfig.from_dict({"quantization": scheme})
    config = dict(checkpoint.config.raw) | {
        "is_quantized": True,
        "quantization_config": quantization.to_dict(),
    }
    tensors = {key: (checkpoint.get(key).data, checkpoint.info(key).dtype) for key in checkpoint}
    for linear in model_linears(ModelConfig.from_dict(config)):
        (only,) = inventory.expected_linear_tensors(checkpoint, linear, "dense")
        values = bfloat16_to_float32(tensors.pop(only.key)[0])
        weight = paddle.to_tensor(values, place=paddle.CPUPlace()).astype("bfloat16")
        packed, scale = weight_quantize(weight, algo=f"weight_only_{linear.kind}", arch=80)
        tensors[f"{linear.module}.quant_weight"] = (packed.numpy(), "I8")
        bits = float32_to_bfloat16(scale.astype("float32").numpy())
        tensors[f"{linear.module}.weight_scale"] = (bits, "BF16")
    write_tensors(folder, config, tensors)
    return folder


@pytest.mark.parametrize(("scheme", "expert"), [("wint8", "int8"), ("wint4", "int4")])
def test_logits_equal_those_of_files_that_paddle_quantised(
    tiny_bf16: Path, tmp_path: Path, scheme: str, expert: str
) -> None:
    files = write_with_paddle(tiny_bf16, tmp_path / "files", scheme)
    found = online(tiny_bf16, scheme)
    expected = make_runner(files)
    logits = found.logits(IDS)
    assert logits.tobytes() == expected.logits(IDS).tobytes()
    assert np.abs(logits - ErnieFloat32(files).logits(IDS)).max() < 1e-3
    kinds = {"embedding": {"dense"}, "head": {"dense"}, "experts": {expert}}
    assert kept_kinds(found) == kinds | {"attention": {"int8"}, "mlp": {"int8"}}
    assert found.memory_report() == expected.memory_report()


@pytest.mark.parametrize("scheme", ["wint8", "wint4"])
def test_loading_equals_the_converters_output(tiny_bf16: Path, tmp_path: Path, scheme: Any) -> None:
    quantize_checkpoint(tiny_bf16, tmp_path / "files", scheme=scheme, progress=False)
    expected = make_runner(tmp_path / "files").logits(IDS)
    for wanted in (scheme, {"quantization": scheme}):
        assert online(tiny_bf16, wanted).logits(IDS).tobytes() == expected.tobytes()


def test_wint4_equals_the_converters_output_on_the_demo(
    demo_bf16_dir: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(demo_bf16_dir, tmp_path / "files", scheme="wint4", progress=False)
    expected = make_runner(tmp_path / "files").logits(IDS)
    assert online(demo_bf16_dir, "wint4").logits(IDS).tobytes() == expected.tobytes()


def test_dense_linears_may_be_int4_too(tiny_bf16: Path) -> None:
    mixed = {"quantization": "mix_quant", "dense_quant_type": "wint4", "moe_quant_type": "wint8"}
    kinds = kept_kinds(online(tiny_bf16, mixed))
    assert (kinds["attention"], kinds["mlp"], kinds["experts"]) == ({"int4"}, {"int4"}, {"int8"})


def test_a_model_without_experts(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, kind="bf16", experts=0, moe_k=None)
    runners = [online(tmp_path, scheme) for scheme in ("wint8", "wint4")]
    assert kept_kinds(runners[0])["mlp"] == {"int8"}
    assert runners[0].logits(IDS).tobytes() == runners[1].logits(IDS).tobytes()


def test_quantised_files_are_loaded_as_they_are(tiny_w4w2: Path) -> None:
    expected = make_runner(tiny_w4w2)
    found = online(tiny_w4w2, "wint8")
    assert kept_kinds(found) == kept_kinds(expected)
    assert found.logits(IDS).tobytes() == expected.logits(IDS).tobytes()


def test_reports_show_what_is_kept(tiny_bf16: Path) -> None:
    plain, wint8, wint4 = (
        make.memory_report()
        for make in (make_runner(tiny_bf16), online(tiny_bf16, "wint8"), online(tiny_bf16, "wint4"))
    )
    # The scales, float32 a column of 128 or 256 rows, are the rest.
    assert 8.0 < wint8.bits_per_expert_weight < 8.3
    assert 4.0 < wint4.bits_per_expert_weight < 4.3
    assert wint4.weights["experts"] < 0.27 * plain.weights["experts"]
    assert wint8.weights["attention"] < 0.52 * plain.weights["attention"]
    assert wint8.weights["embedding"] == plain.weights["embedding"]


def test_dummy_weights_have_the_wanted_form(tiny_bf16: Path) -> None:
    runner = online(tiny_bf16, "wint4", load=LoadConfig("dummy"))
    assert kept_kinds(runner)["experts"] == {"int4"}


def test_memory_is_asked_for_what_is_kept(tiny_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(weights, "check_memory", asked.append)
    report = online(tiny_bf16, "wint4").memory_report()
    assert asked[0] == pytest.approx(sum(report.weights.values()), rel=0.01)

    def refuse(_: int) -> None:
        raise FastDeployError("too large")

    monkeypatch.setattr(weights, "check_memory", refuse)
    with pytest.raises(FastDeployError, match="too large"):
        online(tiny_bf16, "wint4")


def test_the_bar_counts_bytes_of_the_files(
    tiny_bf16: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.from_dir(tiny_bf16).with_quantization("wint4")
    checkpoint = Checkpoint.open(tiny_bf16)
    place = paddle.CPUPlace()
    with weights.QuantizingSource(checkpoint, config, place, show_progress=True) as source:
        for module in source._linears:
            if ".experts." not in module:
                source.linear(module)
        for layer in (1, 2):
            source.experts(layer, "up_gate_proj")
            source.experts(layer, "down_proj")
        read = source._bar.n
    assert read == inventory.expected_nbytes(checkpoint) - inventory.plain_nbytes(checkpoint)
    assert "Loading Weights: 100%" in capfd.readouterr().err


def test_sizes_that_a_format_cannot_hold_are_named_before_loading(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, kind="bf16", moe_intermediate_size=72)
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj: found K = 72.*int8 weights"):
        online(tmp_path, "wint8")


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    config = tiny_config("bf16")
    write_tiny_model(tmp_path / "good", kind="bf16")
    good = Checkpoint.open(tmp_path / "good")
    tensors = {key: (good.get(key).data.copy(), good.info(key).dtype) for key in good}
    key = "ernie.layers.2.mlp.experts.1.up_gate_proj.weight"
    tensors[key][0][3, 300] = 0x7FC0
    write_tensors(tmp_path / "bad", config, tensors)
    with pytest.raises(CheckpointError, match=rf"{key}: found nan at element"):
        online(tmp_path / "bad", "wint4")


def test_llm_takes_the_flag(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bf16, tmp_path / "bf16"))
    assert all((folder / name).is_file() for name in TOKENIZER_FILES)
    quantize_checkpoint(folder, tmp_path / "files", scheme="wint4", progress=False)
    greedy = SamplingParams(temperature=0, max_tokens=12)

    def answers(**arguments: Any) -> tuple[list[int], float]:
        llm = LLM(max_model_len=64, num_gpu_blocks_override=16, **arguments)
        (output,) = llm.generate([[5, 900, 17]], greedy, use_tqdm=False)
        return output.outputs.token_ids, llm.llm_engine.ready.bits_per_expert_weight

    expected = answers(model=str(tmp_path / "files"))
    assert answers(model=str(folder), quantization={"quantization": "wint4"}) == expected
    assert answers(model=str(folder), quantization="wint4") == expected
    assert 8.0 < answers(model=str(folder), quantization='{"quantization": "wint8"}')[1] < 8.3
