"""Sampling by slot: order of the steps, per-row parameters, log-probability modes, bad rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_lite.config import LogprobsMode
from fastdeploy_lite.model_executor.logprobs import log_softmax, nucleus, select
from fastdeploy_lite.model_executor.sampling_batch import SampledRow, SamplingBatch
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.request.step import LOWEST, SamplerParams, SequenceSlice

VOCAB = 100
MASK_WORDS = 4
Row = np.ndarray[Any, Any]


def make_batch(mode: LogprobsMode = "raw_logprobs", slots: int = 8) -> SamplingBatch:
    return SamplingBatch(slots, VOCAB, Workspace(paddle.CPUPlace()), mode)


def make_slice(
    slot: int = 0, sampling: SamplerParams | None = None, fresh: bool = True, **fields: Any
) -> SequenceSlice:
    values: dict[str, Any] = {
        "request_id": str(slot),
        "token_ids": [1],
        "start": 0,
        "block_table": [slot],
        "sample": True,
        "prompt_token_ids": [1],
        "output_token_ids": [],
    }
    return SequenceSlice(
        slot=slot,
        fresh=fresh,
        sampling=sampling or SamplerParams(temperature=0.0),
        **(values | fields),
    )


def random_logits(rows: int = 1, seed: int = 0) -> Row:
    return np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32) * 3


def run(batch: SamplingBatch, logits: Row, slices: Sequence[SequenceSlice]) -> list[SampledRow]:
    for part in slices:
        if part.fresh:
            batch.table.admit(part)
    return batch.sample(paddle.to_tensor(logits), slices)


def greedy(logits: Row, **fields: Any) -> int:
    return run(make_batch(), logits[None], [make_slice(**fields)])[0].token_id


def allow_only(*tokens: int) -> Row:
    bits = np.zeros(MASK_WORDS * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def test_rows_keep_their_own_parameters() -> None:
    """Slots out of order, rows with different rules: each must get its own."""
    logits = random_logits(4)
    best = logits.argsort(1)[:, ::-1]
    slices = [
        make_slice(5),
        make_slice(2, SamplerParams(temperature=0.0, banned_ids=(int(best[1, 0]),))),
        make_slice(7, SamplerParams(temperature=0.0, logit_bias={int(best[2, 9]): 50.0})),
        make_slice(0, banned_now=(int(best[3, 0]), int(best[3, 1]))),
    ]
    tokens = [row.token_id for row in run(make_batch(), logits, slices)]
    assert tokens == [best[0, 0], best[1, 1], best[2, 9], best[3, 2]]


def test_bans_for_one_step_end_with_it() -> None:
    batch, logits = make_batch(), random_logits()
    best = int(logits.argmax())
    assert run(batch, logits, [make_slice(banned_now=(best,))])[0].token_id != best
    assert run(batch, logits, [make_slice(fresh=False)])[0].token_id == best


def test_a_slot_forgets_its_previous_owner() -> None:
    batch, logits = make_batch(), random_logits()
    best = int(logits.argmax())
    spoiled = SamplerParams(temperature=0.0, banned_ids=(best,), presence_penalty=2.0, logprobs=2)
    first = run(batch, logits, [make_slice(sampling=spoiled)])[0]
    assert first.token_id != best
    assert first.logprobs is not None
    second = run(batch, logits, [make_slice()])[0]
    assert second.token_id == best
    assert second.logprobs is None


def test_more_bans_than_the_first_buffer_holds() -> None:
    logits = random_logits(3)
    keep = [3, 50, 99]
    slices = [
        make_slice(
            slot, SamplerParams(temperature=0.0, banned_ids=tuple(set(range(VOCAB)) - {kept}))
        )
        for slot, kept in enumerate(keep)
    ]
    assert [row.token_id for row in run(make_batch(), logits, slices)] == keep


def test_edits_follow_their_rows_from_step_to_step() -> None:
    """Rows change places, leave and come back, with and without the bans of one step."""
    batch, logits = make_batch(), random_logits(3)
    best = logits.argsort(1)[:, ::-1]
    rules = [
        SamplerParams(temperature=0.0, logit_bias={int(best[0, 5]): 50.0, int(best[0, 2]): 9e9}),
        SamplerParams(temperature=0.0, banned_ids=(int(best[1, 0]), int(best[1, 1]))),
        SamplerParams(temperature=0.0),
    ]
    for slot, rule in enumerate(rules):
        batch.table.admit(make_slice(slot, rule))
    plain = [best[0, 2], best[1, 2], best[2, 0]]
    banned = [best[0, 5], best[1, 3], best[2, 1]]
    for order in ([0, 1, 2], [0, 1, 2], [2, 0, 1], [1], [1, 0], [0, 2], [0, 2], [0, 1, 2]):
        for now in ((), (0,), (0, 1, 2), (2,), ()):
            slices = [
                make_slice(
                    slot,
                    rules[slot],
                    fresh=False,
                    banned_now=(int(plain[slot]),) if slot in now else (),
                )
                for slot in order
            ]
            found = [row.token_id for row in run(batch, logits[order], slices)]
            assert found == [banned[slot] if slot in now else plain[slot] for slot in order]


def test_the_card_gets_a_rows_edits_in_ascending_order() -> None:
    batch = make_batch()
    part = make_slice(
        sampling=SamplerParams(logit_bias={40: 1.0, 7: 2.0}, banned_ids=(7, 3)), banned_now=(40, 5)
    )
    batch.table.admit(part)
    rows = batch.table.gather([part])
    ids, values = rows.edit_ids.numpy()[:6].tolist(), rows.edit_values.numpy()[:6].tolist()
    assert (ids, values) == ([3, 5, 7, 7, 40, 40], [-np.inf, -np.inf, 2.0, -np.inf, 1.0, -np.inf])


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    params = SamplerParams(temperature=0.0, logit_bias={VOCAB: 9.0, -1: 9.0}, banned_ids=(10**6,))
    logits = random_logits()[0]
    assert greedy(logits, sampling=params) == logits.argmax()


def test_penalties_count_prompt_and_output() -> None:
    """Repetition sees prompt and output; frequency and presence see output only."""
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 10], logits[:, 11] = 4.0, 3.0
    history = {"prompt_token_ids": [10], "output_token_ids": []}
    produced = {"prompt_token_ids": [1], "output_token_ids": [10, 10]}
    slices = [
        make_slice(0, SamplerParams(temperature=0.0, repetition_penalty=2.0), **history),
        make_slice(1, SamplerParams(temperature=0.0, presence_penalty=2.0), **history),
        make_slice(2, SamplerParams(temperature=0.0, frequency_penalty=0.4), **produced),
        make_slice(3, SamplerParams(temperature=0.0, frequency_penalty=0.6), **produced),
    ]
    assert [r.token_id for r in run(make_batch(), logits, slices)] == [11, 10, 10, 11]


def test_sampled_tokens_are_counted_without_being_told() -> None:
    """The runner is handed the history only when a slot is fresh."""
    batch = make_batch()
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 10], logits[0, 11] = 4.0, 3.5
    params = SamplerParams(temperature=0.0, frequency_penalty=0.3)
    tokens = [
        run(batch, logits, [make_slice(sampling=params, fresh=step == 0)])[0].token_id
        for step in range(4)
    ]
    assert tokens == [10, 10, 11, 10]  # 4.0, 3.7, then 3.4 < 3.5, then 3.2 < 3.4


def test_forced_tokens_win_and_are_counted() -> None:
    batch, logits = make_batch(), random_logits()
    params = SamplerParams(temperature=0.0, presence_penalty=2.0)
    assert run(batch, logits, [make_slice(sampling=params, forced_token=42)])[0].token_id == 42
    flat = np.zeros((1, VOCAB), np.float32)
    flat[0, 42], flat[0, 7] = 1.0, 0.5
    assert run(batch, flat, [make_slice(sampling=params, fresh=False)])[0].token_id == 7


def test_grammar_masks_belong_to_their_rows() -> None:
    logits = random_logits(3)
    slices = [make_slice(0, bitmask=allow_only(7)), make_slice(1), make_slice(2)]
    slices[2].bitmask = allow_only(64, 99)
    tokens = [row.token_id for row in run(make_batch(), logits, slices)]
    assert tokens == [7, logits[1].argmax(), 64 if logits[2, 64] > logits[2, 99] else 99]


def test_custom_processors_run_in_order_on_their_row() -> None:
    seen: list[Sequence[int]] = []

    def raise_40(output: Sequence[int], row: Row) -> None:
        seen.append(output)
        row[40] = 100.0

    def replace(output: Sequence[int], row: Row) -> Row:
        return (
            np.where(row == 100.0, np.float32(0.0), row) + np.eye(VOCAB, dtype=np.float32)[3] * 99
        )

    logits = random_logits(2)
    slices = [
        make_slice(0),
        make_slice(1, logits_processors=[raise_40, replace], output_token_ids=[5, 6]),
    ]
    tokens = [row.token_id for row in run(make_batch(), logits, slices)]
    assert tokens == [logits[0].argmax(), 3]
    assert seen == [[5, 6]]


def fail(_: Sequence[int], row: Row) -> None:
    raise KeyError("broken")


def poison(_: Sequence[int], row: Row) -> None:
    row[5] = np.nan


def forbid_all(_: Sequence[int], row: Row) -> None:
    row[:] = -np.inf


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (fail, "logits processor failed: KeyError: 'broken'"),
        (poison, "the model's logits are not numbers"),
        (forbid_all, "the model's logits are not numbers"),
    ],
)
def test_a_bad_row_fails_alone(processor: Callable[[Any, Row], None], message: str) -> None:
    logits = random_logits(3)
    params = SamplerParams(temperature=0.8, seed=4, logprobs=2)
    slices = [make_slice(slot, params) for slot in range(3)]
    expected = run(make_batch(), logits, slices)
    slices[1].logits_processors = [processor]
    found = run(make_batch(), logits, slices)
    assert found[1].error == message
    assert found[1].logprobs is None
    assert [found[0], found[2]] == [expected[0], expected[2]]


# -- log-probabilities ---------------------------------------------------------------------------

PARAMS = SamplerParams(temperature=0.5, top_p=1e-6, logprobs=4, banned_ids=(9,), logit_bias={3: 2})


def processed(logits: Row) -> Row:
    changed = logits.copy()
    changed[9], changed[3] = -np.inf, changed[3] + 2
    return changed / np.float32(0.5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("raw_logprobs", log_softmax),
        ("raw_logits", lambda row: row),
        ("processed_logprobs", lambda row: log_softmax(processed(row))),
        ("processed_logits", processed),
    ],
)
def test_logprob_modes(mode: LogprobsMode, expected: Callable[[Row], Row]) -> None:
    logits = random_logits(2, seed=3)
    quiet = make_slice(1)
    found, other = run(make_batch(mode), logits, [make_slice(0, PARAMS), quiet])
    values = expected(logits[0])
    assert other.logprobs is None
    assert found.logprobs is not None
    assert found.token_id == processed(logits[0]).argmax()
    assert found.logprobs.logprob == pytest.approx(values[found.token_id], abs=1e-5)
    assert found.logprobs.rank == 1 + (values > values[found.token_id]).sum()
    best = np.argsort(-values)[:4]
    assert found.logprobs.top_ids == best.tolist()
    assert found.logprobs.top_logprobs == pytest.approx(values[best], abs=1e-5)


def test_raw_logprobs_include_the_grammar_mask() -> None:
    """As upstream: the mask comes first, so the only allowed token has probability 1."""
    part = make_slice(0, SamplerParams(temperature=0.0, logprobs=2), bitmask=allow_only(8))
    (found,) = run(make_batch(), random_logits(), [part])
    assert found.logprobs is not None
    assert found.logprobs.logprob == pytest.approx(0.0, abs=1e-6)
    assert found.logprobs.top_logprobs[1] == LOWEST


def test_temperature_scaled_logprobs() -> None:
    logits = random_logits()
    params = SamplerParams(temperature=2.0, top_k=1, logprobs=1, temp_scaled_logprobs=True)
    (found,) = run(make_batch(), logits, [make_slice(0, params)])
    assert found.logprobs is not None
    expected = log_softmax(logits[0] / 2)[found.token_id]
    assert found.logprobs.logprob == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_nucleus_normalised_logprobs(top_p: float) -> None:
    logits = random_logits()
    params = SamplerParams(
        temperature=1.0, top_p=top_p, seed=1, logprobs=VOCAB, top_p_normalized_logprobs=True
    )
    (found,) = run(make_batch(), logits, [make_slice(0, params)])
    assert found.logprobs is not None
    inside = [value for value in found.logprobs.top_logprobs if value > LOWEST]
    assert np.exp(inside).sum() == pytest.approx(1.0)
    assert (len(inside) == VOCAB) == (top_p == 1.0)
    if top_p == 0.0:
        assert found.logprobs.logprob == 0.0


@pytest.mark.parametrize(("wanted", "count"), [(0, 0), (1, 1), (20, 20), (-1, VOCAB)])
def test_number_of_alternatives(wanted: int, count: int) -> None:
    """Rows of one step may ask for different numbers."""
    slices = [
        make_slice(0, SamplerParams(temperature=0.0, logprobs=wanted)),
        make_slice(1, SamplerParams(temperature=0.0, logprobs=3)),
    ]
    found, other = run(make_batch(), random_logits(2), slices)
    assert found.logprobs is not None
    assert other.logprobs is not None
    assert len(found.logprobs.top_ids) == len(found.logprobs.top_logprobs) == count
    assert len(other.logprobs.top_ids) == 3
    assert found.logprobs.rank == 1


def test_growing_the_number_of_alternatives_keeps_results_right() -> None:
    batch, logits = make_batch(), random_logits(2)
    for count in (1, 7, 2, 30):
        params = SamplerParams(temperature=0.0, logprobs=count)
        for row, result in enumerate(run(batch, logits, [make_slice(i, params) for i in (3, 4)])):
            assert result.logprobs is not None
            assert result.token_id == logits[row].argmax()
            assert result.logprobs.top_ids == np.argsort(-logits[row])[:count].tolist()


def test_nucleus_takes_the_smallest_set() -> None:
    values = np.log(np.array([0.1, 0.4, 0.3, 0.2]))
    assert np.exp(nucleus(values, 0.6)) == pytest.approx([0, 4 / 7, 3 / 7, 0])
    assert np.exp(nucleus(values, 0.0)) == pytest.approx([0, 1, 0, 0])


def test_nucleus_is_never_above_certainty() -> None:
    """Rounding used to give a lone token the log-probability 1e-16."""
    for seed in range(200):
        logits = np.random.default_rng(seed).normal(0.0, 3.0, 1000)
        assert nucleus(log_softmax(logits), 0.0).max() == pytest.approx(0.0, abs=1e-12)
        assert nucleus(log_softmax(logits), 0.5).max() <= 0.0


def test_select_breaks_ties_by_id() -> None:
    found = select(np.array([1.0, 3.0, 3.0, -np.inf]), 2, 4)
    assert (found.rank, found.top_ids) == (1, [1, 2, 0, 3])
    assert found.top_logprobs[-1] == LOWEST


def test_memory_is_counted() -> None:
    batch = make_batch()
    before = batch.nbytes
    params = SamplerParams(temperature=0.0, repetition_penalty=1.1)
    run(batch, random_logits(), [make_slice(0, params)])
    assert batch.nbytes == before + 8 * VOCAB * 4
