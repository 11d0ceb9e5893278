"""An engine's answers over a card whose work waits until somebody waits for it.

    python engine_on_card.py [--seed N]

Requests of all kinds come at random, run together, are aborted, preempted and refused tokens; each
answer has to be the one that the request gets alone, and greedy ones what the model says directly.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import place  # noqa: F401 - first of all: it makes the place
from queued_card import QueuedCard

CUDA = sys.modules["fastdeploy_lite._ops_cuda"] = QueuedCard()

import numpy as np  # noqa: E402
from engine import VOCAB, create  # noqa: E402
from hashed_model import EOS, digest, logits_of  # noqa: E402

from fastdeploy_lite.engine.engine_core import EngineCore  # noqa: E402
from fastdeploy_lite.guided.spec import GuidedSpec  # noqa: E402
from fastdeploy_lite.request.messages import EngineRequest, EngineSampling  # noqa: E402
from fastdeploy_lite.request.step import SamplerParams  # noqa: E402

REQUESTS, NUM_BLOCKS = 60, 12
os.environ["FD_ENC_DEC_BLOCK_NUM"] = "0"  # nothing is kept free for those that run
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.0}, {}),
    ({"temperature": 0.0}, {"ignore_eos": True}),
    ({"temperature": 0.7, "top_p": 0.9}, {}),
    ({"temperature": 1.0, "top_k": 50, "banned_ids": (3, 4, 5)}, {"min_tokens": 20}),
    ({"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.2}, {}),
    ({"temperature": 0.0, "logprobs": 2}, {}),
    ({"temperature": 0.5}, {"stop_token_seqs": tuple((i,) for i in range(100, 300))}),
    ({"temperature": 0.8}, {"guided": GuidedSpec("regex", "[a-z ]{9,30}")}),
    ({"temperature": 0.0}, {"stop": ("e", "\u7684")}),
]


def requests(seed: int) -> Iterator[EngineRequest]:
    draw = random.Random(seed)
    beginning = [draw.randrange(10, VOCAB) for _ in range(130)]
    for number in range(REQUESTS):
        sampler, rules = draw.choice(KINDS)
        prompt = beginning[: draw.choice([0, 0, 70, 130])]
        prompt = prompt + [draw.randrange(10, VOCAB) for _ in range(draw.randint(1, 90))]
        params = SamplerParams(seed=draw.randrange(1 << 40), **sampler)
        answer = EngineSampling(params, draw.randint(1, 250), (EOS, 7), **rules)
        yield EngineRequest(f"r{number}", prompt, answer)


def run(
    core: EngineCore, coming: list[EngineRequest], draw: random.Random, aborts: float = 0.0
) -> dict[str, list[int]]:
    """Answers by request; those that are aborted, in this share of the steps, end early."""
    found: dict[str, list[int]] = {request.request_id: [] for request in coming}
    left = list(coming)
    while left or core.has_work:
        while left and (draw.random() < 0.2 or not core.has_work):
            core.add(left.pop(0))
        if draw.random() < aborts:
            core.abort([draw.choice(list(found))])
        for output in core.step():
            assert output.finish_reason != "error", output
            found[output.request_id] += output.new_token_ids
    core.check_integrity()
    return found


def greedy(request: EngineRequest, length: int) -> list[int]:
    """What the model says."""
    tokens, rules = list(request.prompt_token_ids), request.sampling
    for number in range(length):
        row = logits_of(digest(tokens))
        if rules.ignore_eos or number < rules.min_tokens:
            row[list(rules.eos_token_ids)] = -np.inf
        tokens.append(int(row.argmax()))
    return tokens[len(request.prompt_token_ids) :]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    coming, draw = list(requests(seed)), random.Random(seed)
    core = create(NUM_BLOCKS)
    together = run(core, coming, draw, aborts=0.02)
    assert core.stats().preemptions
    lone = create(NUM_BLOCKS)
    for request in coming:
        alone = run(lone, [request], draw)[request.request_id]
        answer = together[request.request_id]
        assert answer == alone[: len(answer)], (request, answer, alone)
        sampler = request.sampling.sampler
        if sampler.temperature == 0.0 and not request.sampling.stop:
            wanted = greedy(request, len(alone) - 1)
            assert alone[:-1] == wanted, (request, alone, wanted)
    print("equal")


main()
