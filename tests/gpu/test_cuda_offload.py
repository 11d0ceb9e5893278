"""Experts in main memory beside a card: crossings, logits, tokens, graphs in segments, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cards
import numpy as np
import partings
import pytest
from model_driver import generate, make_runner, sequences
from test_cuda_model import NEW_TOKENS, distance, prompts, run
from tiny_model import write_tiny_model

from fastdeploy_lite.config import CacheConfig, ExpertOffloadConfig

ALL = ExpertOffloadConfig()
IDS = [int(i) for i in np.random.default_rng(1).integers(0, 8192, 150)]
BLOCKS: Any = {"device": None, "cache": CacheConfig(num_blocks=64)}


def new_link() -> Any:
    from paddle import CPUPlace

    from fastdeploy_lite.model_executor.cuda_host_link import CudaHostLink
    from fastdeploy_lite.model_executor.workspace import Workspace

    return CudaHostLink(Workspace(CPUPlace()))


@pytest.mark.parametrize("tokens", [1, 3, 200, 2])
def test_what_crosses_arrives_whole(tokens: int) -> None:
    """Larger arrays than before, smaller ones, and several crossings queued in a row."""
    link = new_link()
    random = np.random.default_rng(tokens)
    for _ in range(5):
        x = cards.round_bf16(random.standard_normal((tokens, 1024)))
        ids = random.integers(0, 64, (tokens, 8)).astype(np.int32)
        arrays = link.fetch(cards.put(x, "bfloat16"), cards.put(ids))
        out = cards.poisoned([tokens, 1024])
        answer = link.answer(out)
        seen = []

        def work(arrays: Any = arrays, answer: Any = answer, seen: Any = seen) -> None:
            seen.append([array.copy() for array in arrays])
            answer[...] = arrays[0] ^ 0x8000  # the sign

        link.on_host(work)
        link.send(answer, out)
        np.testing.assert_array_equal(seen[0][0], cards.bf16_bits(x))
        np.testing.assert_array_equal(seen[0][1], ids)
        np.testing.assert_array_equal(cards.get(out), -x)


@pytest.mark.parametrize("kind", ["bf16", "wint8", "wint4", "w4w2", "2bits"])
@pytest.mark.parametrize("shared_experts", [0, 1])
def test_logits_are_the_cards_but_for_rounding(
    tmp_path: Path, kind: Any, shared_experts: int
) -> None:
    """The CPU keeps more digits inside an expert: the two may differ as card and CPU do."""
    write_tiny_model(tmp_path, kind=kind, shared_experts=shared_experts, seed=3)
    card = make_runner(tmp_path, **BLOCKS).logits(IDS)
    found = make_runner(tmp_path, expert_offload=ALL, **BLOCKS).logits(IDS)
    gap = distance(found, card)
    print(f"{kind}: gap {gap:.4f} standard deviations")
    assert gap < 0.1


def test_some_layers_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, kind="w4w2", layers=4, seed=3)
    card = make_runner(tmp_path, **BLOCKS).logits(IDS)
    half = make_runner(tmp_path, expert_offload=ExpertOffloadConfig(cpu_layers=2), **BLOCKS)
    assert distance(half.logits(IDS), card) < 0.1


@pytest.mark.parametrize("shared_experts", [0, 1])
def test_graphs_in_segments_change_no_bit(tmp_path: Path, shared_experts: int) -> None:
    """Batches that grow and shrink, so that graphs are recorded before and after arrays move."""
    write_tiny_model(tmp_path, kind="2bits", shared_experts=shared_experts, seed=3)
    texts = [IDS[: 3 + 20 * n] for n in range(5)]

    def rows(use_cudagraph: bool, group: int) -> list[bytes]:
        runner = make_runner(tmp_path, expert_offload=ALL, use_cudagraph=use_cudagraph, **BLOCKS)
        found = []
        for first in range(0, len(texts), group):
            running = sequences(texts[first : first + group], 192)
            generate(runner, running, 12, chunk=33)
            found += [np.stack(one.rows).tobytes() for one in running]
        if use_cudagraph:
            assert all(len(step.parts) > 4 for step in runner._graphs._steps.values())
            assert runner._graphs._steps
        return found

    for group in (1, 3, 5):
        assert rows(True, group) == rows(False, group)


def test_the_cards_memory_shrinks_by_the_experts(tmp_path: Path) -> None:
    write_tiny_model(
        tmp_path, kind="2bits", experts=16, hidden_size=512, moe_intermediate_size=512, seed=3
    )
    plain = make_runner(tmp_path, **BLOCKS)
    held = plain.memory_report()
    offloaded = make_runner(tmp_path, expert_offload=ALL, **BLOCKS).memory_report()
    assert held.weights["experts"] > 4 << 20
    assert offloaded.weights == {**held.weights, "experts": 0}
    # The card keeps more numbers a column, 11 % of columns as short as these.
    assert 0.85 <= offloaded.offloaded_experts / held.weights["experts"] <= 1


def test_no_expert_passes_through_the_card(tmp_path: Path, monkeypatch: Any) -> None:
    from fastdeploy_lite.model_executor.ops import cuda_experts

    def refuse(*_: Any) -> None:
        raise AssertionError("experts on the card")

    monkeypatch.setattr(cuda_experts, "allocate", refuse)
    write_tiny_model(tmp_path, kind="2bits", seed=3)
    make_runner(tmp_path, expert_offload=ALL, **BLOCKS)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("deterministic")  # answers are explained by logits of whole texts
def test_the_demo_says_the_same_or_parts_where_the_card_is_unsure(
    tmp_path: Path, demo_dir: Path
) -> None:
    """As between card and CPU: the two round inside an expert differently."""
    asked = prompts(demo_dir)
    request = {"prompts": asked, "max_tokens": NEW_TOKENS}
    card = run(tmp_path, "", demo_dir, request)
    beside = run(tmp_path, "", demo_dir, {**request, "engine": {"moe_device": "cpu"}})
    found = partings.find(asked, beside, card)
    if found:
        request = partings.request(found)
        theirs = run(tmp_path, "", demo_dir, request)
        ours = run(tmp_path, "", demo_dir, {**request, "expert_offload": {}})
        partings.assert_explained(found, theirs, ours)
