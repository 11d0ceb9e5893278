"""The sampling chain against exact probabilities, and its draws bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_ops import ISAS, assert_same_everywhere, isa, tensor
from oracles import sampling as oracle

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.model_executor.ops.sampling import sample

ERNIE_VOCAB = 103424


def draw(
    logits: np.ndarray,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seeds: Any = 0,
    steps: Any = 0,
    forced: Any = -1,
) -> np.ndarray:
    """Tokens of rows [R, V]; scalars hold for all rows."""
    rows = len(logits)
    out = paddle.full([rows], -7, "int32")

    def column(value: Any, dtype: str) -> paddle.Tensor:
        return tensor(np.broadcast_to(np.asarray(value, dtype), [rows]))

    sample(
        tensor(logits, "float32"),
        column(temperature, "float32"),
        column(top_k, "int32"),
        column(top_p, "float32"),
        column(min_p, "float32"),
        column(seeds, "int64"),
        column(steps, "int64"),
        column(forced, "int32"),
        out,
    )
    return out.numpy()


def draw_many(row: np.ndarray, count: int, seed: int = 1, **limits: Any) -> np.ndarray:
    """`count` draws of one row, at the steps 0 .. count - 1."""
    return draw(np.tile(row, (count, 1)), seeds=seed, steps=np.arange(count), **limits)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with the reference implementation (Random123, kat_vectors)
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert _ops_cpu.philox4x32_10(counter, key) == expected
    assert oracle.philox(tuple(counter), tuple(key)) == expected


def test_the_uniform_number_comes_from_seed_and_step() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 922337203685477580, 2000)
    steps = rng.integers(0, 2**40, 2000)
    found = draw(np.zeros((2000, 1000), "f4"), seeds=seeds, steps=steps)
    pairs = zip(seeds.tolist(), steps.tolist(), strict=True)
    expected = [int(1000 * oracle.uniform(seed, step)) for seed, step in pairs]
    np.testing.assert_array_equal(found, expected)


# --- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 8192, ERNIE_VOCAB])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_greedy_is_the_first_best(name: str, vocab: int, how: dict[str, float]) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-5, 6, (20, vocab)).astype("f4")  # many ties
    with isa(name):
        np.testing.assert_array_equal(draw(logits, **how), logits.argmax(axis=1))


def test_a_top_p_just_above_greedy_keeps_the_best_alone() -> None:
    logits = np.array([0.0, 1.0, 0.9], "f4")
    assert set(draw_many(logits, 100, top_p=2e-5)) == {1}


# --- distributions -----------------------------------------------------------------------------


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square exceeds once in 10^6 times (Wilson and Hilferty, 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.7534 * np.sqrt(2 / (9 * freedom))) ** 3


LIMITS = [
    {},
    {"top_p": 0.7},
    {"top_k": 5},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.9},
    {"top_k": 10, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_draws_follow_the_exact_probabilities(limits: dict[str, Any], spread: float) -> None:
    logits = (np.random.default_rng(5).standard_normal(40) * spread).astype("f4")
    exact = oracle.distribution(logits, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **limits})
    count = 40_000
    found = np.bincount(draw_many(logits, count, **limits), minlength=40)
    assert not found[exact == 0].any()
    expected = count * exact[exact > 0]
    statistic = ((found[exact > 0] - expected) ** 2 / expected).sum()
    assert statistic < chi_square_limit(len(expected) - 1)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12), min_size=1, max_size=20),
    top_k=st.integers(-1, 22),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.25, 0.9, 1.0]),
    seed=st.integers(0, 922337203685477580),
)
def test_only_kept_tokens_are_drawn_and_the_draw_is_exact(
    logits: list[int], top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    row = np.array(logits, "f4") / 4  # quarters: ties are frequent
    limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    top_p = float(np.float32(top_p))
    min_p = float(np.float32(min_p))
    found = draw_many(row, 30, seed=seed, **limits)
    if top_k == 1:
        assert set(found) == {int(row.argmax())}
        return
    expected = [oracle.draw(row, top_k, top_p, min_p, seed, step) for step in range(30)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ISAS)
def test_equal_logits_are_kept_by_ascending_id(name: str) -> None:
    logits = np.zeros(256, "f4")
    with isa(name):
        assert set(draw_many(logits, 400, top_k=4)) == {0, 1, 2, 3}
        assert set(draw_many(logits, 400, top_p=4 / 256)) == {0, 1, 2, 3}  # reached exactly
        assert set(draw_many(logits, 5000, min_p=1.0)) == set(range(256))


@pytest.mark.parametrize("limits", [*LIMITS, {"top_k": 5000}, {"top_p": 0.999}], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])
def test_large_vocabulary_draws_equal_the_oracle(limits: dict[str, Any], spread: float) -> None:
    """Flat rows keep nearly everything, peaked rows a handful: each road of the selection."""
    rng = np.random.default_rng(int(10 * spread))
    logits = (rng.standard_normal((3, ERNIE_VOCAB)) * spread).astype("f4")
    seeds, steps = [11, 12, 13], [0, 1, 2**33]
    found = draw(logits, seeds=seeds, steps=steps, **limits)
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **limits}
    exact = {key: float(np.float32(v)) if key != "top_k" else v for key, v in full.items()}
    expected = [
        oracle.draw(logits[r], **exact, seed=seeds[r], step=steps[r]) for r in range(len(logits))
    ]
    np.testing.assert_array_equal(found, expected)


def test_same_tokens_everywhere_and_alone() -> None:
    rng = np.random.default_rng(9)
    rows = 48
    logits = (rng.standard_normal((rows, 5000)) * 3).astype("f4")
    options: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0], rows),
        "top_k": rng.choice([0, 1, 20, 6000], rows),
        "top_p": rng.choice([0.0, 0.5, 0.95, 1.0], rows),
        "min_p": rng.choice([0.0, 0.02], rows),
        "seeds": rng.integers(0, 2**59, rows),
        "steps": rng.integers(0, 100, rows),
        "forced": rng.choice([-1, -1, -1, 17], rows),
    }
    batch = assert_same_everywhere(lambda: draw(logits, **options))
    for r in range(rows):
        alone = draw(logits[r : r + 1], **{name: value[r] for name, value in options.items()})
        assert alone[0] == batch[r]


def test_a_seed_reproduces_and_steps_differ() -> None:
    logits = np.zeros(1000, "f4")
    first = draw_many(logits, 50, seed=123)
    np.testing.assert_array_equal(first, draw_many(logits, 50, seed=123))
    assert len(set(first)) > 40
    assert (first != draw_many(logits, 50, seed=124)).sum() > 40


# --- special rows ------------------------------------------------------------------------------


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full(300, -np.inf, "f4")
    logits[[5, 250]] = [1.0, -40.0]
    for limits in LIMITS:
        assert set(draw_many(logits, 50, **limits)) == {5}
    logits[250] = 1.0
    assert set(draw_many(logits, 50)) == {5, 250}
    assert set(draw_many(logits, 50, top_k=299)) == {5, 250}
    assert set(draw_many(logits, 50, top_p=0.99)) == {5, 250}


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_infinite_logits_share_the_probability(limits: dict[str, Any]) -> None:
    logits = np.zeros(100, "f4")
    logits[[3, 70]] = np.inf
    assert set(draw_many(logits, 60, **limits)) == {3, 70}
    assert draw(logits[None], temperature=0.0)[0] == 3


def test_forced_tokens_win_over_any_logits() -> None:
    logits = np.zeros((3, 10), "f4")
    logits[1] = np.nan
    found = draw(logits, temperature=0.0, forced=[9, 4, -1])
    np.testing.assert_array_equal(found, [9, 4, 0])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("at", [0, 63, 64, 998, 999])
def test_nan_names_the_row_and_leaves_the_others(name: str, at: int) -> None:
    logits = np.zeros((3, 1000), "f4")
    logits[:, 7] = 1
    logits[1, at] = np.nan
    out = paddle.full([3], -7, "int32")
    floats, ints, longs = tensor([0.0] * 3, "float32"), tensor([-1] * 3, "int32"), tensor([0] * 3)
    with isa(name), pytest.raises(ValueError, match=r"sample: row 1 of logits contains NaN$"):
        sample(tensor(logits), floats, ints, floats, floats, longs, longs, ints, out)
    np.testing.assert_array_equal(out.numpy()[[0, 2]], [7, 7])


def test_a_row_without_allowed_tokens_is_named() -> None:
    logits = np.full((2, 70), -np.inf, "f4")
    logits[0, 0] = 0
    with pytest.raises(ValueError, match=r"row 1 of logits allows no token \(all -inf\)"):
        draw(logits)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"temperature": -1.0}, r"temperature\[0\] is -1.0+, expected 0 or more"),
        ({"temperature": np.nan}, r"temperature\[0\] is -?nan"),
        ({"top_p": [0.5, 1.5]}, r"top_p\[1\] is 1.50*, expected 0 to 1"),
        ({"min_p": [-0.1, 0.0]}, r"min_p\[0\]"),
        ({"forced": [-1, 10]}, r"forced\[1\] is 10"),
        ({"forced": [-2, 0]}, r"forced\[0\] is -2"),
    ],
)
def test_bad_parameters_are_named(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="sample: " + message):
        draw(np.zeros((2, 10), "f4"), **limits)


def test_a_vocabulary_that_could_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 1048576, expected 1 to 1048575"):
        draw(np.zeros((1, 1 << 20), "f4"))


def test_no_rows() -> None:
    assert draw(np.zeros((0, 10), "f4")).shape == (0,)
