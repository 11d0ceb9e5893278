"""An error that belongs to a request or to a message ends that one, and nothing outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from unittest.mock import AsyncMock

import msgspec
import numpy as np
import pytest
import zmq
from fake_runner import FakeRunner
from helpers import (
    EOS,
    demo_tokenizer,
    make_config,
    make_core,
    make_request,
    run,
    runner_of,
    tokens,
)

from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.core_process import CoreLoop
from fastdeploy_lite.engine.engine_client import AsyncEngineClient
from fastdeploy_lite.engine.engine_core import EngineCore, EngineDeadError
from fastdeploy_lite.request.messages import Abort, EngineOutput, EngineRequest, FromCore, Outputs
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice, SliceResult


class RefusesHotRequests(FakeRunner):
    """Fails every step with a slice whose numbers it does not like, as a narrow store would."""

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        if any(part.sampling.temperature == 99.0 for part in slices):
            raise OverflowError("Python int too large to convert to C int32")
        return super().execute(slices)


def hot(name: str) -> EngineRequest:
    request = make_request(name, [11, 12, 13], 5)
    sampling = msgspec.structs.replace(request.sampling, sampler=SamplerParams(temperature=99.0))
    return msgspec.structs.replace(request, sampling=sampling)


@pytest.mark.parametrize("together", [1, 3])
def test_failures_of_requests_never_add_up_to_a_dead_engine(together: int) -> None:
    core = EngineCore(make_config(), RefusesHotRequests(64, 256), demo_tokenizer(), 64)
    for i in range(8):
        names = [f"bad{i}.{j}" for j in range(together)]
        outputs = run(core, *map(hot, names))
        assert [outputs[name][-1].error_code for name in names] == [500] * together
    good = make_request("good", [11, 12, 13], 5)
    assert tokens(run(core, good)["good"]) == tokens(run(make_core(), good)["good"])


def test_a_runner_that_fails_plain_numbers_too_is_dead() -> None:
    class Broken(FakeRunner):
        def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
            raise RuntimeError("the card is gone")

    core = EngineCore(make_config(), Broken(64, 256), demo_tokenizer(), 64)
    with pytest.raises(EngineDeadError, match="failed 3 steps in a row: RuntimeError"):
        for i in range(5):
            run(core, make_request(f"r{i}", [11], 5))


@pytest.mark.parametrize(
    "sampler",
    [
        {"top_k": 2**31},
        {"seed": 2**63},
        {"banned_ids": (10**6,)},
        {"logit_bias": {-1: 1.0}},
        {"logprobs": 2**40},
        {"prompt_logprobs": -2},
    ],
    ids=str,
)
def test_the_core_trusts_no_client_with_numbers(sampler: dict[str, Any]) -> None:
    core = make_core()
    request = make_request("r", [11, 12], 4)
    sampling = msgspec.structs.replace(request.sampling, sampler=SamplerParams(**sampler))
    outputs = run(core, msgspec.structs.replace(request, sampling=sampling))
    assert outputs["r"][-1].error_code == 400
    for prompt in ([-1], [2**31], [11, 5000]):
        assert run(core, make_request("p", prompt, 4))["p"][-1].error_code == 400
    assert core.stats().failed_steps == 0


# Messages ----------------------------------------------------------------------------------------


class Wires:
    """A core loop between two in-process sockets."""

    def __init__(self, core: EngineCore) -> None:
        self._context = zmq.Context()
        self.to_core, inbox = self._pair("in")
        outbox, self.from_core = self._pair("out")
        self.loop = CoreLoop(core, inbox, outbox)

    def _pair(self, name: str) -> tuple[Any, Any]:
        push, pull = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        pull.bind(f"inproc://{name}")
        push.connect(f"inproc://{name}")
        return push, pull

    def news(self, most: int = 200) -> list[EngineOutput]:
        """Step until nothing is left to do; everything that was sent."""
        found: list[EngineOutput] = []
        for _ in range(most):
            self.loop._receive()
            self.loop._report(self.loop._core.step() if self.loop._core.has_work else [])
            while self.from_core.poll(0):
                message = msgspec.msgpack.decode(self.from_core.recv(), type=FromCore)
                found += message.outputs if isinstance(message, Outputs) else []
            if not self.loop._core.has_work:
                return found
        raise AssertionError("the core did not finish")

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("fastdeploy_lite.engine.core_process.STATS_SECONDS", 0.001)
    wires = Wires(make_core())
    yield wires
    wires.close()


def test_a_message_that_cannot_be_read_ends_its_own_request(wires: Wires) -> None:
    pack = msgspec.msgpack.encode
    good = make_request("good", [11, 12], 6)
    spoilt = msgspec.msgpack.decode(pack(make_request("bad", [11, 12], 6)))
    spoilt["sampling"]["reasoning_max_tokens"] = True  # a bool is no int on the wire
    wires.to_core.send(pack(good))
    wires.to_core.send(pack(spoilt))
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    for raw in (b"", b"\xc1", b"\xff" * 20, pack({"type": "abort"}), pack([1, 2]), pack("x"),
                pack({"type": "nonsense", "request_id": 5}), pack(deep)[:300]):  # fmt: skip
        wires.to_core.send(raw)
    outputs = wires.news()
    (failure,) = [o for o in outputs if o.request_id == "bad"]
    assert (failure.error_code, failure.finished) == (400, True)
    assert "cannot read this request" in str(failure.error_msg)
    answer = [o for o in outputs if o.request_id == "good"]
    assert tokens(answer) == tokens(run(make_core(), good)["good"])


def test_an_unreadable_message_does_not_touch_a_living_request(wires: Wires) -> None:
    pack = msgspec.msgpack.encode
    good = make_request("same", [11, 12], 6)
    spoilt = {**msgspec.msgpack.decode(pack(good)), "prompt_token_ids": "text"}
    wires.to_core.send(pack(good))
    wires.to_core.send(pack(spoilt))
    assert tokens(wires.news()) == tokens(run(make_core(), good)["same"])


def test_an_answer_that_cannot_be_sent_ends_its_own_request(wires: Wires) -> None:
    core = wires.loop._core
    core.add(make_request("good", [11, 12], 3))
    core._outbox.append(EngineOutput("bad", finished=True, error_msg="\ud83d"))
    outputs = wires.news()
    assert [o.error_code for o in outputs if o.request_id == "bad"] == [500]
    assert len(tokens([o for o in outputs if o.request_id == "good"])) == 3


def test_the_clients_reader_survives_or_is_seen_to_die() -> None:
    async def main() -> None:
        client, sent = AsyncEngineClient(EngineArgs(model="demo")), []
        client._send = sent.append  # type: ignore[method-assign]
        queues = {name: asyncio.Queue() for name in ("a", "b")}
        client._queues.update(queues)  # type: ignore[arg-type]
        pack = msgspec.msgpack.encode
        spoilt = msgspec.msgpack.decode(pack(Outputs([EngineOutput("a", [1])])))
        spoilt["outputs"][0]["new_token_ids"] = ["x"]
        client._take(pack(spoilt))
        failure = queues["a"].get_nowait()
        assert (failure.error_code, failure.finished) == (500, True)
        assert sent == [Abort(["a"])]
        client._take(pack(Outputs([EngineOutput("b", [7])])))
        assert queues["b"].get_nowait().new_token_ids == [7]

        gone = asyncio.get_running_loop().create_future()
        gone.cancel()
        client._checks.append(gone)
        client._take(pack({"type": "checked", "error": None}))

        class Noise:
            async def recv(self) -> bytes:
                return b"\xc1\xc1"

        client._from_core = Noise()
        client._meet = AsyncMock()  # type: ignore[method-assign]
        await client._read()
        assert "reading the engine's messages failed" in await client.wait_dead()
        assert isinstance(queues["b"].get_nowait(), EngineDeadError)

    asyncio.run(main())


def test_ignore_eos_bans_it_until_the_limit() -> None:
    core = make_core(eos_every=2)
    outputs = run(core, make_request("r", [11, 12], 12, ignore_eos=True))
    found = tokens(outputs["r"])
    assert EOS not in found[:-1]
    assert len(found) == 12
    assert outputs["r"][-1].finish_reason == "length"
    assert len(tokens(run(make_core(eos_every=2), make_request("r", [11, 12], 12))["r"])) < 12
    assert runner_of(core).steps


def test_buffers_of_the_sampler_survive_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_lite import device
    from fastdeploy_lite.model_executor.sampling_batch import SamplingBatch
    from fastdeploy_lite.model_executor.workspace import Workspace

    place = device.activate(0, "cpu")
    batch = SamplingBatch(4, 64, Workspace(place), "raw_logprobs")

    def no_memory(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("fastdeploy_lite.model_executor.sampling_batch.PackedBuffer", no_memory)
        with pytest.raises(MemoryError):
            batch._reserve(20)
    batch._reserve(20)
    assert batch._outputs.host["top_ids"].size == 4 * 20
    assert np.isfinite(batch.nbytes)
