"""Masks, penalties, occurrence counts and log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_ops import ISAS, assert_same_everywhere, bits, isa, tensor
from oracles import sampling as oracle

from fastdeploy_lite.model_executor.ops.sampling import (
    mask_logits,
    process_logits,
    token_logprobs,
    update_occurrences,
)

LOWEST = np.finfo(np.float32).min
PROMPT = 1 << 30

# --- mask_logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_mask_forbids_exactly_the_cleared_bits(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((4, vocab)).astype("f4")
    words = (vocab + 31) // 32
    masks = rng.integers(-(2**31), 2**31, (3, words)).astype("i4")
    masks[1] = -1
    rows = [2, -1, 0, 1]
    found = tensor(logits)
    mask_logits(found, tensor(masks), tensor(rows, "int32"))
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    keep = np.stack([np.ones(vocab, bool) if row < 0 else allowed[row] for row in rows])
    np.testing.assert_array_equal(found.numpy(), np.where(keep, logits, -np.inf))


@pytest.mark.parametrize("row", [-2, 1])
def test_mask_row_out_of_range_is_named(row: int) -> None:
    with pytest.raises(ValueError, match=rf"mask_logits: bitmask_rows\[1\] is {row}, expected"):
        mask_logits(paddle.zeros([2, 40]), tensor([[0, 0]], "int32"), tensor([0, row], "int32"))


def test_mask_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bitmask has shape \[1, 2\], expected \[any, 1\]"):
        mask_logits(paddle.zeros([1, 32]), tensor([[0, 0]], "int32"), tensor([0], "int32"))


# --- process_logits ----------------------------------------------------------------------------


def process(
    logits: np.ndarray,
    *,
    occurrences: np.ndarray | None = None,
    slots: Any = 0,
    repetition: Any = 1.0,
    frequency: Any = 0.0,
    presence: Any = 0.0,
    temperature: Any = 1.0,
    edits: list[dict[int, float]] | None = None,
    **replaced: paddle.Tensor,
) -> np.ndarray:
    """Run process_logits on rows [R, V]; scalars hold for all rows."""
    rows = len(logits)
    edits = edits or [{}] * rows
    ids = [token for row in edits for token in row]
    values = [value for row in edits for value in row.values()]

    def column(value: Any, dtype: str = "float32") -> paddle.Tensor:
        return tensor(np.broadcast_to(np.asarray(value, dtype), [rows]))

    out = tensor(logits)
    arguments = {
        "slots": column(slots, "int32"),
        "occurrences": None if occurrences is None else tensor(occurrences, "int32"),
        "repetition": column(repetition),
        "frequency": column(frequency),
        "presence": column(presence),
        "temperature": column(temperature),
        "edit_offsets": tensor(np.cumsum([0, *map(len, edits)]), "int32"),
        "edit_ids": tensor(ids, "int32"),
        "edit_values": tensor(values, "float32"),
    }
    process_logits(out, **{**arguments, **replaced})
    return out.numpy()


numbers = st.floats(-2, 2, width=32)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    frequency=st.sampled_from([0.0, 0.5, -2.0]),
    presence=st.sampled_from([0.0, 1.5, -0.25]),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
)
def test_process_follows_the_documented_order(
    data: st.DataObject, repetition: float, frequency: float, presence: float, temperature: float
) -> None:
    vocab = data.draw(st.sampled_from([5, 17, 64]))
    row = np.array(data.draw(st.lists(numbers, min_size=vocab, max_size=vocab)), "f4") * 5
    seen = st.sampled_from([0, 0, 1, 3, PROMPT, PROMPT + 2])
    counts = np.array(data.draw(st.lists(seen, min_size=vocab, max_size=vocab)), "i4")
    edits = data.draw(st.dictionaries(st.integers(0, vocab - 1), st.one_of(numbers), max_size=3))
    found = process(
        row[None],
        occurrences=np.stack([np.full(vocab, 9, "i4"), counts]),
        slots=1,
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        temperature=temperature,
        edits=[edits],
    )[0]
    exact = [float(np.float32(v)) for v in (repetition, frequency, presence, temperature)]
    expected = oracle.process(row, counts, *exact, edits)
    scale = max(1.0, 1 / temperature if temperature else 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_each_penalty_touches_its_tokens_only() -> None:
    logits = np.array([[2.0, -2.0, 2.0, -2.0, 2.0]], "f4")
    seen = np.array([[PROMPT, PROMPT, 1, PROMPT + 3, 0]], "i4")
    found = process(logits, occurrences=seen, repetition=2.0)
    np.testing.assert_array_equal(found, [[1, -4, 1, -4, 2]])
    found = process(logits, occurrences=seen, frequency=0.5, presence=0.25)
    np.testing.assert_array_equal(found, [[2, -2, 1.25, -3.75, 2]])


def test_rows_read_their_own_slot_and_edits() -> None:
    logits = np.ones((3, 4), "f4")
    seen = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], "i4")
    edits = [{0: 1.0}, {}, {3: -np.inf, 2: 2.0}]
    found = process(logits, occurrences=seen, slots=[2, 0, 1], presence=0.5, edits=edits)
    expected = [[2, 1, 0.5, 1], [0.5, 1, 1, 1], [1, 0.5, 3, -np.inf]]
    np.testing.assert_array_equal(found, expected)


def test_neutral_parameters_change_no_bit() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 100)).astype("f4")
    seen = np.ones((1, 100), "i4")
    np.testing.assert_array_equal(bits(process(logits, occurrences=seen)), bits(logits))
    np.testing.assert_array_equal(bits(process(logits, temperature=0.0)), bits(logits))


def test_bans_survive_everything() -> None:
    logits = np.array([[-np.inf, 1.0, np.inf, 2.0]], "f4")
    found = process(
        logits,
        occurrences=np.full((1, 4), PROMPT + 1, "i4"),
        repetition=1.5,
        frequency=-2.0,
        presence=-2.0,
        temperature=0.5,
        edits=[{0: 100.0, 1: -np.inf, 2: -np.inf}],
    )
    assert np.isneginf(found[0, :3]).all()
    assert np.isfinite(found[0, 3])


def test_tiny_temperatures_are_greedy_and_not_infinite() -> None:
    found = process(np.array([[10.0, 30.0, 29.0, -5.0]], "f4"), temperature=2e-38)
    np.testing.assert_allclose(found, [[-np.inf, 0, -5e37, -np.inf]], rtol=1e-6)


def test_process_same_bits_everywhere() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((7, 3001)).astype("f4") * 4
    seen = rng.choice([0, 0, 2, PROMPT, PROMPT + 1], (7, 3001)).astype("i4")
    options: dict[str, Any] = {
        "slots": np.arange(7)[::-1],
        "repetition": 1.1,
        "frequency": 0.3,
        "presence": 0.2,
        "temperature": np.linspace(0.1, 1.3, 7),
    }
    batch = assert_same_everywhere(lambda: process(logits, occurrences=seen, **options))
    alone = process(
        logits[2:3], occurrences=seen, **{**options, "slots": 4, "temperature": np.float32(0.5)}
    )
    np.testing.assert_array_equal(bits(alone[0]), bits(batch[2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repetition": 0.0}, r"repetition\[0\] is 0.0*, expected more than 0"),
        ({"temperature": np.inf}, r"temperature\[0\] is inf"),
        ({"presence": np.nan}, r"frequency or presence\[0\] is not finite"),
        ({"occurrences": np.zeros((2, 6), "i4"), "slots": 2}, r"slots\[0\] is 2, expected 0 to 1"),
        ({"edits": [{6: 1.0}]}, r"edit_ids\[0\] is 6, expected 0 to 5"),
        ({"edit_offsets": tensor([0, 3], "int32")}, r"edit_offsets\[1\] is 3, expected 0 to 0"),
        ({"edit_offsets": tensor([-1, 0], "int32")}, r"edit_offsets\[0\] is -1"),
    ],
)
def test_process_names_the_bad_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="process_logits: " + message) as caught:
        process(np.zeros((1, 6), "f4"), **change)
    assert "\n" not in str(caught.value)


# --- update_occurrences ------------------------------------------------------------------------


def test_occurrences_count_outputs_and_mark_prompts() -> None:
    table = paddle.zeros([2, 6], "int32")
    update_occurrences(table, tensor([0, 0, 1], "int32"), tensor([3, 3, 5], "int32"), prompt=True)
    update_occurrences(table, tensor([1, 1, 1], "int32"), tensor([5, 5, 0], "int32"), prompt=False)
    expected = np.zeros((2, 6), "i4")
    expected[0, 3], expected[1, 5], expected[1, 0] = PROMPT, PROMPT + 2, 1
    np.testing.assert_array_equal(table.numpy(), expected)


def test_occurrence_counts_stop_before_they_spill_over() -> None:
    table = tensor([[PROMPT + (1 << 24) - 2]], "int32")
    update_occurrences(table, tensor([0] * 5, "int32"), tensor([0] * 5, "int32"), prompt=False)
    assert table.numpy()[0, 0] == PROMPT + (1 << 24) - 1


@pytest.mark.parametrize(("slot", "token"), [(2, 0), (-1, 0), (0, 6), (0, -1)])
def test_occurrences_check_indices_before_they_write(slot: int, token: int) -> None:
    table = paddle.zeros([2, 6], "int32")
    with pytest.raises(ValueError, match=r"update_occurrences: (slots|token_ids)\[1\] is"):
        update_occurrences(
            table, tensor([0, slot], "int32"), tensor([0, token], "int32"), prompt=False
        )
    assert not table.numpy().any()


# --- token_logprobs ----------------------------------------------------------------------------


def logprobs(
    logits: np.ndarray, tokens: list[int], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = len(logits)
    out = (
        paddle.empty([rows]),
        paddle.empty([rows], "int32"),
        paddle.empty([rows, k], "int32"),
        paddle.empty([rows, k]),
    )
    token_logprobs(tensor(logits, "float32"), tensor(tokens, "int32"), k, *out)
    logprob, rank, ids, values = (part.numpy() for part in out)
    return logprob, rank, ids, values


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (20, 0), (20, 20), (64, 5), (8192, 20), (103424, 20), (5000, 5000)]
)
def test_logprobs_equal_float64(name: str, vocab: int, k: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((3, vocab)) * 4).astype("f4")
    logits[1] = np.round(logits[1])  # ties
    tokens = [int(logits[0].argmax()), int(rng.integers(vocab)), vocab - 1]
    with isa(name):
        logprob, rank, ids, values = logprobs(logits, tokens, k)
    for r, token in enumerate(tokens):
        expected = oracle.log_softmax(logits[r])
        order = np.argsort(-logits[r], kind="stable")
        np.testing.assert_allclose(logprob[r], expected[token], rtol=3e-7, atol=3e-7)
        assert rank[r] == 1 + int(np.flatnonzero(order == token)[0])
        np.testing.assert_array_equal(ids[r], order[:k])
        np.testing.assert_allclose(values[r], expected[order[:k]], rtol=3e-7, atol=3e-7)


def test_logprobs_same_bits_everywhere_and_alone() -> None:
    logits = (np.random.default_rng(1).standard_normal((17, 4003)) * 5).astype("f4")
    tokens = list(range(17))

    def compute() -> np.ndarray:
        logprob, rank, ids, values = logprobs(logits, tokens, 7)
        return np.concatenate([logprob, rank.view("f4"), ids.view("f4").ravel(), values.ravel()])

    assert_same_everywhere(compute)
    logprob, _, _, values = logprobs(logits, tokens, 7)
    alone = logprobs(logits[5:6], [5], 7)
    np.testing.assert_array_equal(bits(alone[0]), bits(logprob[5:6]))
    np.testing.assert_array_equal(bits(alone[3][0]), bits(values[5]))


def test_large_and_shifted_logits_lose_nothing() -> None:
    base = np.array([0.0, 1.0, 2.0, -30.0])
    for shift in (0.0, 4096.0, -4096.0):
        logprob, _, _, _ = logprobs((base + shift)[None].astype("f4"), [3], 0)
        np.testing.assert_allclose(logprob[0], oracle.log_softmax(base)[3], rtol=1e-6)


def test_impossible_tokens_have_the_lowest_number() -> None:
    logits = np.full((1, 70), -np.inf, "f4")
    logits[0, [3, 66]] = 1.0
    logprob, rank, ids, values = logprobs(logits, [4], 4)
    assert logprob[0] == LOWEST
    assert rank[0] == 2 + 4  # behind the two possible ones and the ids 0, 1, 2
    np.testing.assert_array_equal(ids[0], [3, 66, 0, 1])
    np.testing.assert_allclose(values[0], [-np.log(2), -np.log(2), LOWEST, LOWEST], rtol=1e-6)


def test_infinite_logits_share_the_probability() -> None:
    logits = np.zeros((1, 10), "f4")
    logits[0, [2, 6, 7]] = np.inf
    logprob, rank, _, values = logprobs(logits, [6], 4)
    np.testing.assert_allclose(logprob[0], -np.log(3), rtol=1e-6)
    assert rank[0] == 2
    np.testing.assert_allclose(values[0], [-np.log(3)] * 3 + [LOWEST], rtol=1e-6)


def test_logprobs_name_the_bad_row_token_and_k() -> None:
    logits = np.zeros((2, 9), "f4")
    with pytest.raises(ValueError, match=r"token_logprobs: tokens\[1\] is 9, expected 0 to 8"):
        logprobs(logits, [0, 9], 2)
    with pytest.raises(ValueError, match="token_logprobs: k is 10, expected 0 to 9"):
        logprobs(logits, [0, 0], 10)
    logits[1, 8] = np.nan
    with pytest.raises(ValueError, match="token_logprobs: row 1 of logits contains NaN"):
        logprobs(logits, [0, 0], 2)
