"""`--moe-device cpu`: experts behind a link give the bits that they give beside their layer.

Both sides of the link are main memory here; tests/gpu/test_cuda_offload.py has a card on one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from host_links import MemoryLink
from model_driver import generate, make_runner, sequences
from oracles.rowwise import nearest_bf16
from tiny_model import KINDS, write_tiny_model

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.config import (
    ExpertOffloadConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
)
from fastdeploy_lite.engine import args_utils
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.executor.inline import report_of
from fastdeploy_lite.model_executor import expert_placement, ops, weights
from fastdeploy_lite.model_executor.layers.host_experts import HostExperts
from fastdeploy_lite.model_executor.ops import HostWeight
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError
from fastdeploy_lite.worker.model_runner import ModelRunner

ALL = ExpertOffloadConfig()
CPU = paddle.CPUPlace()
PROMPTS = [[int(i) for i in np.random.default_rng(n).integers(0, 8192, n)] for n in (1, 9, 65, 130)]
IDS = PROMPTS[-1]
PROMPT_TEXTS = ["床前明月光，疑是地上霜。床前明月光，", "你好"]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> MemoryLink:
    """What stands for a card's link from now on."""
    made = MemoryLink()
    monkeypatch.setattr(expert_placement, "open_link", lambda place: made)
    return made


def logits_of_batches(runner: ModelRunner, chunk: int) -> list[np.ndarray]:
    """Rows of every sampled token, prompts in chunks beside sequences that decode."""
    running = sequences(PROMPTS, 192)
    generate(runner, running, 5, chunk)
    return [np.stack(one.rows) for one in running]


@pytest.mark.parametrize("shared_experts", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_without(
    tmp_path: Path, kind: Any, shared_experts: int, link: MemoryLink
) -> None:
    write_tiny_model(tmp_path, kind=kind, shared_experts=shared_experts, seed=4)
    plain, offloaded = make_runner(tmp_path), make_runner(tmp_path, expert_offload=ALL)
    np.testing.assert_array_equal(offloaded.logits(IDS), plain.logits(IDS))
    assert link.crossings == [len(IDS)] * 2  # two layers have experts
    for chunk in (10_000, 17):
        pairs = zip(
            logits_of_batches(offloaded, chunk), logits_of_batches(plain, chunk), strict=True
        )
        for found, expected in pairs:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", ["natural", "permuted"])
@pytest.mark.parametrize("kind", ["2bits", "w4w2"])
def test_both_row_orders(tmp_path: Path, kind: Any, order: Any, link: MemoryLink) -> None:
    write_tiny_model(tmp_path, kind=kind, seed=5)
    load = LoadConfig(row_order=order)
    plain = make_runner(tmp_path, load=load).logits(IDS)
    assert not link.crossings
    found = make_runner(tmp_path, load=load, expert_offload=ALL).logits(IDS)
    np.testing.assert_array_equal(found, plain)


def test_experts_in_parts(tmp_path: Path, link: MemoryLink) -> None:
    """Folders that ranks have quantised apart."""
    from fastdeploy_lite.quantization.convert import quantize_checkpoint

    wide: Any = {"moe_intermediate_size": 512, "intermediate_size": 512}
    whole, parts = write_tiny_model(tmp_path / "bf16", kind="bf16", **wide), tmp_path / "parts"
    quantize_checkpoint(whole, parts, scheme="2bits", tensor_parallel_size=2, progress=False)
    offloaded = make_runner(parts, expert_offload=ALL)
    np.testing.assert_array_equal(offloaded.logits(IDS), make_runner(parts).logits(IDS))
    assert link.crossings


def test_quantised_while_loading_and_dummy(tiny_bf16: Path, link: MemoryLink) -> None:
    model = ModelConfig.from_dir(tiny_bf16).with_quantization("wint4")
    for more in ({"model": model}, {"load": LoadConfig("dummy")}):
        plain = make_runner(tiny_bf16, **more)  # type: ignore[arg-type]
        offloaded = make_runner(tiny_bf16, expert_offload=ALL, **more)  # type: ignore[arg-type]
        np.testing.assert_array_equal(offloaded.logits(IDS), plain.logits(IDS))
    assert link.crossings


@pytest.mark.parametrize("method", [None, "ngram"])
def test_the_demo_says_the_same(method: str | None, link: MemoryLink) -> None:
    def said(**more: Any) -> list[list[int]]:
        speculative = None if method is None else {"method": method, "adaptive": False}
        llm = LLM("demo", max_model_len=256, speculative_config=speculative, **more)
        params = SamplingParams(temperature=0, max_tokens=40)
        outputs = llm.generate(PROMPT_TEXTS, params, use_tqdm=False)
        return [list(output.outputs.token_ids) for output in outputs]

    plain = said()
    assert not link.crossings
    assert said(moe_device="cpu") == plain
    assert link.crossings


def test_weights_go_to_their_side_and_are_reported_there(
    tiny_w4w2: Path, link: MemoryLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[bool, Any]] = []
    allocate = ops.allocate_weight

    def watched(kind: str, rows: int, columns: int, place: Any, num_experts: int = 0) -> Any:
        made.append((num_experts > 0, place))
        return allocate(kind, rows, columns, place, num_experts=num_experts)

    monkeypatch.setattr(ops, "allocate_weight", watched)
    runner = make_runner(tiny_w4w2, expert_offload=ALL)
    assert len(made) > 10
    for is_expert, place in made:
        assert place is (link.place if is_expert else runner.place)
    report, plain = runner.memory_report(), make_runner(tiny_w4w2).memory_report()
    assert report.offloaded_experts == plain.weights["experts"] > 0
    assert report.weights == {**plain.weights, "experts": 0}
    assert report.bits_per_expert_weight == plain.bits_per_expert_weight
    assert report_of(runner).memory["offloaded_experts"] == report.offloaded_experts
    assert plain.offloaded_experts == 0


def test_some_layers_alone(tmp_path: Path, link: MemoryLink) -> None:
    write_tiny_model(tmp_path, kind="w4w2", layers=4, seed=6)
    runner = make_runner(tmp_path, expert_offload=ExpertOffloadConfig(cpu_layers=2))
    held = [isinstance(layer.mlp.up_gate, HostWeight) for layer in runner.model.layers[1:]]
    assert held == [True, True, False]
    np.testing.assert_array_equal(runner.logits(IDS), make_runner(tmp_path).logits(IDS))
    assert link.crossings == [len(IDS)] * 2


def test_a_mute_link_leaves_the_work_out(tiny_2bits: Path, link: MemoryLink) -> None:
    runner = make_runner(tiny_2bits, expert_offload=ALL)
    with expert_placement.muted({1: link, 2: link}):
        assert np.isnan(runner.logits(IDS)).all()
    assert np.isfinite(runner.logits(IDS)).all()


# -- a layer whose activations are bfloat16, as on a card ------------------------------------------


def experts(kind: str) -> tuple[ops.PackedWeight, ops.PackedWeight]:
    made = []
    for seed, (k, n) in enumerate([(128, 512), (256, 128)]):
        weight = ops.allocate_weight(kind, k, n, CPU, num_experts=4)
        ops.randomize_weight(weight, seed)
        ops.finish_weight(weight)
        made.append(weight)
    return made[0], made[1]


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("kind", ["int4", "ccq"])
def test_bfloat16_crosses_exactly_and_is_rounded_once(kind: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    bits = float32_to_bfloat16(rng.standard_normal((tokens, 128)).astype(np.float32))
    ids = rng.integers(0, 4, (tokens, 2)).astype(np.int32)
    shares = rng.dirichlet(np.ones(2), tokens).astype(np.float32)
    up_gate, down = experts(kind)
    x = paddle.empty([tokens, 128], dtype="bfloat16", device=CPU)
    out = paddle.empty([tokens, 128], dtype="bfloat16", device=CPU)
    ops.host_array(x)[...] = bits
    routes = [paddle.to_tensor(array, place=CPU) for array in (ids, shares)]
    link = MemoryLink()
    layer = HostExperts(HostWeight(up_gate, link), HostWeight(down, link))
    layer.begin(x, *routes)
    layer.finish(out)
    wide = paddle.to_tensor(bfloat16_to_float32(bits), place=CPU)
    expected = paddle.empty([tokens, 128], dtype="float32", device=CPU)
    ops.routed_experts(wide, *routes, up_gate, down, expected, Workspace(CPU))
    np.testing.assert_array_equal(ops.host_array(out), nearest_bf16(expected.numpy()))


# -- which layers, and what is refused -------------------------------------------------------------


def test_layers_by_number_and_by_memory(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, kind="w4w2", layers=5)
    model = ModelConfig.from_dir(tmp_path)
    sizes = expert_placement.expert_nbytes(model)
    assert list(sizes) == [1, 2, 3, 4]
    assert sizes[1] > 1.5 * sizes[2] == 1.5 * sizes[4]  # int4 before 2 bits

    def layers(**wanted: Any) -> list[int]:
        return expert_placement.host_layers(ExpertOffloadConfig(**wanted), model)

    assert layers() == [1, 2, 3, 4]
    assert layers(cpu_layers=1) == [1]
    assert layers(card_gib=0) == [1, 2, 3, 4]
    assert layers(card_gib=2.5 * sizes[4] / expert_placement.GIB) == [1, 2]
    assert layers(card_gib=1) == []
    assert expert_placement.offloaded_nbytes(model, [1, 3]) == sizes[1] + sizes[3]
    with pytest.raises(ConfigError, match=r"cpu_moe_layers must be at most 4, .* got 5"):
        layers(cpu_layers=5)


def test_sizes_are_those_that_are_kept(tiny_w4w2: Path) -> None:
    sizes = expert_placement.expert_nbytes(ModelConfig.from_dir(tiny_w4w2))
    kept = make_runner(tiny_w4w2).memory_report().weights["experts"]
    assert sum(sizes.values()) == pytest.approx(kept, rel=0.05)


def test_main_memory_is_asked_for_before_anything_is_read(
    tiny_w4w2: Path, link: MemoryLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(expert_placement.expert_nbytes(ModelConfig.from_dir(tiny_w4w2)).values())
    monkeypatch.setattr(weights, "available_bytes", lambda: needed - 1)
    monkeypatch.setattr(weights, "open_weights", lambda config: pytest.fail("opened"))
    with pytest.raises(FastDeployError, match=r"the weights need .* of main memory"):
        make_runner(tiny_w4w2, expert_offload=ALL)


def test_a_model_without_experts_is_refused(tmp_path: Path, link: MemoryLink) -> None:
    write_tiny_model(tmp_path, kind="bf16", moe_layer_start_index=3)
    with pytest.raises(ConfigError, match=r"moe_device cpu: .*config\.json: this model has no"):
        make_runner(tmp_path, expert_offload=ALL)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"cpu_layers": 0}, "cpu_moe_layers must be at least 1, got 0"),
        ({"card_gib": -1.0}, "moe_card_gib must be at least 0, got -1"),
        ({"card_gib": float("nan")}, "moe_card_gib must be at least 0, got nan"),
        ({"cpu_layers": 3, "card_gib": 4.0}, "cpu_moe_layers and moe_card_gib both"),
    ],
)
def test_values_out_of_range(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertOffloadConfig(**wanted)


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(2), ParallelConfig(data_parallel_size=2)], ids=["ranks", "replicas"]
)
def test_several_cards_are_refused(tiny_2bits: Path, parallel: ParallelConfig) -> None:
    model = ModelConfig.from_dir(tiny_2bits)
    with pytest.raises(ConfigError, match="moe_device cpu is for one card, found tensor_parallel"):
        RuntimeConfig(tiny_2bits, model, parallel=parallel, expert_offload=ALL)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"moe_device": "cpu"}, ALL),
        ({"cpu_moe_layers": 1}, ExpertOffloadConfig(cpu_layers=1)),
        ({"moe_device": "cpu", "moe_card_gib": 2.5}, ExpertOffloadConfig(card_gib=2.5)),
    ],
)
def test_flags(
    tiny_2bits: Path,
    arguments: dict[str, Any],
    expected: ExpertOffloadConfig | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU prefills in seconds what a card does in milliseconds: steps are the CPU's."""
    monkeypatch.setattr(args_utils, "_on_cpu", lambda: False)
    args = EngineArgs(model=str(tiny_2bits), max_num_seqs=64, **arguments)
    config = args.create_runtime_config()
    assert config.expert_offload == expected
    assert config.scheduler.max_num_batched_tokens == (8192 if expected is None else 1024)
    with pytest.raises(ConfigError, match="moe_device must be one of cpu, got 'gpu'"):
        EngineArgs(model=str(tiny_2bits), moe_device="gpu")


def test_on_a_cpu_alone_it_has_no_effect_and_that_is_said(
    tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(args_utils, "_warn_once", said.append)
    args = EngineArgs(model=str(tiny_2bits), moe_device="cpu")
    config = args.create_runtime_config()
    assert said == ["moe_device has no effect here: everything is in main memory"]
    runner = make_runner(tiny_2bits, expert_offload=config.expert_offload)
    assert runner.memory_report() == make_runner(tiny_2bits).memory_report()
