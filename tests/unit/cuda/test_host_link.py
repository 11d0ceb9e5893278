"""The card's link and its graphs in segments, over a stream that is played in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from fake_cuda import Card
from oracles.rowwise import nearest_bf16

from fastdeploy_lite.benchmarks import layer_times, step_times
from fastdeploy_lite.benchmarks.layer_times import LayerClock, LayerTimes
from fastdeploy_lite.benchmarks.step_times import StepClock, StepTimes
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.host_experts import HostExperts
from fastdeploy_lite.model_executor.ops import HostWeight
from fastdeploy_lite.model_executor.workspace import Workspace

CPU = paddle.CPUPlace()
HIDDEN, INNER, EXPERTS, TOP_K = 128, 256, 4, 2


def bf16(shape: list[int]) -> Any:
    return paddle.empty(shape, dtype="bfloat16", device=CPU)


def test_what_was_fetched_is_there_when_the_host_works_and_not_before(card: Card) -> None:
    for tokens in (2, 1, 5, 2):
        x, out = bf16([tokens, 8]), bf16([tokens, 8])
        ops.host_array(out)[...] = 7

        def fill(x: Any = x, value: int = tokens) -> None:
            ops.host_array(x)[...] = value

        ops.host_array(x)[...] = 0
        card.cuda.put(fill)  # a kernel
        (array,) = card.link.fetch(x)
        answer = card.link.answer(out)
        assert not (array == tokens).any()

        def work(array: Any = array, answer: Any = answer) -> None:
            answer[...] = array + 1

        card.link.on_host(work)
        card.link.send(answer, out)
        assert (ops.host_array(out) == 7).all()
        card.cuda.synchronize()
        assert (ops.host_array(out) == tokens + 1).all()


class Layer:
    """Experts behind the link, and between the crossings a kernel that doubles x."""

    def __init__(self, card: Card, has_shared: bool) -> None:
        weights = []
        for seed, (k, n) in enumerate([(HIDDEN, 2 * INNER), (INNER, HIDDEN)]):
            weight = ops.allocate_weight("ccq", k, n, CPU, num_experts=EXPERTS)
            ops.randomize_weight(weight, seed)
            ops.finish_weight(weight)
            weights.append(weight)
        self.up_gate, self.down = weights
        self.card, self.has_shared = card, has_shared
        hosts = [HostWeight(weight, card.link) for weight in weights]
        self.experts = HostExperts(*hosts)
        self.x, self.out, self.shared = (bf16([8, HIDDEN]) for _ in range(3))
        self.ids = paddle.empty([8, TOP_K], dtype="int32", device=CPU)
        self.shares = paddle.empty([8, TOP_K], dtype="float32", device=CPU)

    def set_inputs(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        x = random.standard_normal((8, HIDDEN)).astype(np.float32)
        ops.host_array(self.x)[...] = nearest_bf16(x)
        ops.host_array(self.ids)[...] = random.integers(0, EXPERTS, (8, TOP_K))
        ops.host_array(self.shares)[...] = random.dirichlet(np.ones(TOP_K), 8)
        for tensor in (self.out, self.shared):
            ops.host_array(tensor)[...] = 0x7FC0

    def __call__(self, rows: int) -> Any:
        """Queue two layers, the second on the first one's answer."""
        inputs = [self.ids[:rows], self.shares[:rows]]
        out, source = self.out[:rows], self.x[:rows]
        for _ in range(2):
            self.experts.begin(source, *inputs)
            if self.has_shared:
                self.card.cuda.put(lambda: self._share(rows))
            self.experts.finish(out)
            source = out
        return out

    def _share(self, rows: int) -> None:
        ops.host_array(self.shared)[:rows] = ops.host_array(self.x)[:rows] ^ 0x8000

    def expected(self, rows: int) -> np.ndarray:
        bits = ops.host_array(self.x)[:rows].copy()
        for _ in range(2):
            wide = paddle.to_tensor((bits.astype(np.uint32) << 16).view(np.float32), place=CPU)
            found = paddle.empty([rows, HIDDEN], dtype="float32", device=CPU)
            routes = (self.ids[:rows], self.shares[:rows])
            ops.routed_experts(wide, *routes, self.up_gate, self.down, found, Workspace(CPU))
            bits = nearest_bf16(found.numpy())
        return bits


@pytest.mark.parametrize("has_shared", [False, True])
def test_replays_equal_launches(card: Card, has_shared: bool) -> None:
    """Sizes in an order that makes arrays move after graphs were recorded over them."""
    layer = Layer(card, has_shared)
    for seed, rows in enumerate([1, 1, 3, 1, 8, 3, 1, 8, 8]):
        layer.set_inputs(seed)
        found = card.graphs.run(rows, lambda rows=rows: layer(rows))
        card.cuda.synchronize()
        np.testing.assert_array_equal(ops.host_array(found), layer.expected(rows))
        if has_shared:
            shared, x = ops.host_array(layer.shared)[:rows], ops.host_array(layer.x)[:rows]
            np.testing.assert_array_equal(shared, x ^ 0x8000)
    # Of each layer: copies, mark, shared experts if there are, work; then the last copy.
    parts = {len(step.parts) for step in card.graphs._steps.values()}
    assert parts == {2 * (3 + has_shared) + 1}
    graphs = list(card.cuda.graphs)
    card.graphs._steps.clear()
    assert graphs
    assert not card.cuda.graphs


def test_a_mute_link_waits_for_nothing(card: Card) -> None:
    layer = Layer(card, False)
    layer.set_inputs(1)
    layer(2)  # arrays exist
    card.cuda.synchronize()
    card.link.is_mute = True
    layer.set_inputs(2)
    layer(2)
    card.cuda.synchronize()
    assert not np.array_equal(ops.host_array(layer.out)[:2], layer.expected(2))
    card.link.is_mute = False
    layer(2)
    card.cuda.synchronize()
    np.testing.assert_array_equal(ops.host_array(layer.out)[:2], layer.expected(2))


# -- where a layer's time goes ---------------------------------------------------------------------


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the clock says next, in nanoseconds."""
    times: list[int] = []
    monkeypatch.setattr(layer_times.time, "perf_counter_ns", lambda: times.pop(0))
    return times


def test_a_layers_time_is_cut_where_it_crosses(card: Card, ticks: list[int]) -> None:
    layer, clock = Layer(card, False), LayerClock(card.link)
    layer.set_inputs(1)
    card.graphs.run(2, lambda: layer(2))  # records, and is not looked at
    for scale in (1000, 2000):
        #         first layer: waits, there, done; and the second
        ticks[:] = [scale * t for t in (5, 10, 40, 45, 70, 90)]
        with clock.running():
            card.graphs.run(2, lambda: layer(2))
            found = clock.step()
        assert (found.handing_on, found.waiting, found.work) == (
            5 * scale / 1e3,
            15 * scale / 1e3,
            25 * scale / 1e3,
        )
    card.graphs.run(2, lambda: layer(2))
    assert not ticks
    with pytest.raises(ValueError, match="no layer has crossed"):
        clock.step()


def test_loops_of_the_host_count_inside_of_experts_alone(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, clock = Layer(card, False), LayerClock(card.link)
    layer.set_inputs(1)
    layer(2)
    # What is seen at each look: before the first layer's experts, in them, and so on.
    first, second = [(70, 50, 15, 40), (30, 30, 5, 20)], [(60, 40, 0, 20)]
    looks = [[(7000, 7000, 7000, 7000)], first, [(9, 9, 9, 9)] * 2, second]
    monkeypatch.setattr(layer_times._ops_cpu, "loop_times", lambda: looks.pop(0))
    with clock.running():
        layer(2)
        assert clock.loops == [first, second]
        found = clock.step()
    assert not clock.loops
    assert (found.loops, found.in_loops, found.slowest) == (1.5, 0.08, 0.06)
    assert (found.fastest, found.mean) == (0.01, 0.04)


def test_who_is_mute_is_not_timed(card: Card) -> None:
    layer, clock = Layer(card, False), LayerClock(card.link)
    card.link.is_mute = True
    with clock.running():
        layer(2)
        with pytest.raises(ValueError, match="no layer has crossed"):
            clock.step()


def test_medians_number_by_number() -> None:
    steps = [LayerTimes(*range(i, i + 8)) for i in (1, 9, 4)]
    assert layer_times.median(steps) == LayerTimes(*range(4, 12))
    line = "handing on 4, waiting for the card 5, experts 6 us (in 7.0 loops 8, threads busy 11 (10"
    assert str(layer_times.median(steps)).startswith(line)


# -- where a whole step's time goes ----------------------------------------------------------------


def test_a_steps_time_is_told_apart(card: Card, ticks: list[int]) -> None:
    layer, clock = Layer(card, False), LayerClock(card.link)
    layer.set_inputs(1)
    card.graphs.run(2, lambda: layer(2))
    step = StepClock(clock, card.cuda)
    launch = card.cuda.launch_graph
    #  begun; a launch; waits, there, done; a launch; waits, there, done; the last launch; ended
    ticks[:] = [1000 * t for t in (0, 2, 5, 9, 10, 40, 43, 45, 50, 51, 91, 95, 97, 99)]
    with clock.running():
        found = step.step(lambda: card.graphs.run(2, lambda: layer(2)))
    assert (found.before, found.waiting, found.experts) == (0.009, 0.002, 0.07)
    assert (found.launches, found.python, found.after) == (0.002, 0.008, 0.008)
    assert found.layers == [30, 40]
    assert len(found.loops) == 2
    assert card.cuda.launch_graph == launch
    clock.discard()
    with clock.running(), pytest.raises(ValueError, match="no layer has crossed"):
        ticks[:] = [0, 0]
        step.step(lambda: 0.0)


def test_medians_of_steps_and_means_of_layers() -> None:
    def made(n: int, *loops: list[tuple[int, int, int, int]]) -> StepTimes:
        return StepTimes(n, n + 1, n + 2, n + 3, n + 4, n + 5, [n, 2 * n], list(loops))

    a, b, c = (1, 2, 3, 4), (5, 6, 7, 8), (3, 0, 9, 4)
    found = step_times.median([made(4, [a, b], [c]), made(1, [b, b], [a]), made(9, [c, b], [])])
    assert found == made(4, [(3, 2, 7, 4), b], [])
    assert str(found).startswith(
        "before the first layer 4.00 ms, launches 5.00, other code between"
    )
    assert step_times.mean_loops([[a, b], [c, c], [a]]) == [(2, 1, 6, 4), (4, 3, 8, 6)]
