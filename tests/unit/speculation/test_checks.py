"""What is worked out for every step that checks guesses: which of them, and how they did."""

from __future__ import annotations

import random

import pytest

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.engine.generation import Generation
from fastdeploy_lite.request.messages import DraftCounts, EngineSampling
from fastdeploy_lite.request.step import SamplerParams
from fastdeploy_lite.speculation.tally import Tally


@pytest.mark.parametrize("seed", range(20))
def test_guesses_are_ranked_by_their_chances_and_leads(seed: int) -> None:
    rng = random.Random(seed)
    rates = [rng.choice((0.02, 0.5, 0.9, rng.random())) for _ in range(rng.randrange(9))]
    lengths = [rng.randrange(6) for _ in rates]
    leads = [rng.choice((0.0, 20.0 * rng.random())) for _ in rates]
    most, least = rng.randrange(20), 0.05
    ranked = []
    for owner, (rate, length, lead) in enumerate(zip(rates, lengths, leads, strict=True)):
        chances = [rate ** (i + 1) for i in range(length)]
        ahead = [lead + sum(chances[:i]) for i in range(length)]
        uses = [chance * 2 ** (-a / 8) for chance, a in zip(chances, ahead, strict=True)]
        pairs = zip(uses, chances, strict=True)
        ranked += [(use, chance, owner) for use, chance in pairs if chance >= least]
    ranked = [pair[1:] for pair in sorted(ranked, key=lambda found: -found[0])[:most]]
    won, owners = _ops_cpu.rank_guesses(rates, lengths, leads, least, most)
    assert won == pytest.approx([sum(c for c, _ in ranked[:i]) for i in range(len(ranked) + 1)])
    chances = [won[i + 1] - won[i] for i in range(len(owners))]
    assert chances == pytest.approx([chance for chance, _ in ranked])
    assert sorted(owners) == sorted(owner for _, owner in ranked)


def test_every_guess_has_a_rate() -> None:
    with pytest.raises(ValueError, match="as many lengths and leads as rates"):
        _ops_cpu.rank_guesses([0.5], [1, 2], [0.0], 0.05, 9)
    with pytest.raises(ValueError, match="as many lengths and leads as rates"):
        _ops_cpu.rank_guesses([0.5], [1], [], 0.05, 9)


def test_a_tally_counts_by_place() -> None:
    tally = Tally()
    for drafted, accepted in ((4, 2), (1, 0), (4, 4), (4, 2)):
        tally.note(drafted, accepted)
    tally.steps += 3
    assert tally.counts == DraftCounts(13, 8, 7, 4, [3, 3, 1, 1], [4, 3, 3, 3])
    assert tally.counts is not tally.counts


EOS = (2, 7)


def answer(most: int, **rules: object) -> Generation:
    sampling = EngineSampling(SamplerParams(), most, EOS, **rules)  # type: ignore[arg-type]
    return Generation(sampling, [5], vocab_size=64)


def test_tokens_that_nothing_looks_at_are_accepted_at_once() -> None:
    at_once, each = answer(9), answer(9)
    assert at_once.accept_all([8, 9, 10])
    assert [each.accept(token) for token in (8, 9, 10)] == [8, 9, 10]
    assert at_once.output == each.output == [5, 8, 9, 10]
    assert (at_once.reason, at_once.forced_token) == (each.reason, each.forced_token) == (None, -1)


@pytest.mark.parametrize(
    ("most", "rules", "tokens"),
    [
        (9, {}, [8, EOS[1], 9]),
        (9, {}, [8, EOS[0]]),
        (4, {}, [8, 9, 10]),  # the last one ends the answer
        (9, {"stop_token_seqs": ((9, 10),)}, [8, 9]),
        (9, {"response_max_tokens": 8}, [8, 9]),
    ],
)
def test_tokens_that_may_end_an_answer_are_not(
    most: int, rules: dict[str, object], tokens: list[int]
) -> None:
    generation = answer(most, **rules)
    assert not generation.accept_all(tokens)
    assert generation.output == [5]
