"""The search for bytes: the native op against its numpy statement, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.quantization import hessian
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.code_search import (
    SearchResult,
    code_books,
    search,
    search_reference,
)
from tests.native_ops import ISAS, isa

BOOKS = code_books(np.array(CODES[:5], np.float32))


def case(seed: int, columns: int, blocks: int, trials: int, descent: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = 4 * blocks
    root = rng.standard_normal((blocks, 4, 4))
    weight = rng.standard_normal((columns, rows)).astype(np.float32)
    moved = weight + 0.1 * rng.standard_normal((columns, rows)).astype(np.float32)
    before = (0.2 * rng.standard_normal((columns, rows))).astype(np.float32)
    return {
        "target": moved,
        "weight": weight,
        "metric": (root @ root.transpose(0, 2, 1) + np.eye(4)).astype(np.float32),
        "books": BOOKS,
        "code": rng.integers(0, len(BOOKS), columns).astype(np.int32),
        "scales": rng.uniform(0.03, 0.1, (columns, trials)).astype(np.float32),
        "feedback": (0.05 * rng.standard_normal((rows, rows))).astype(np.float32),
        **({"before": before} if descent else {}),
    }


def assert_same(first: SearchResult, second: SearchResult) -> None:
    for name in ("error", "packed", "choice", "loss"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(("columns", "blocks", "trials"), [(1, 1, 1), (37, 16, 3), (5, 23, 2)])
def test_native_search_finds_what_the_statement_finds(
    columns: int, blocks: int, trials: int, descent: bool
) -> None:
    given = case(7, columns, blocks, trials, descent)
    found, expected = search(**given), search_reference(**given)
    # Rounding may break a tie of two codewords differently and change all that follows; rare.
    same = (found.packed == expected.packed).all(axis=1)
    assert same.mean() > 0.9
    np.testing.assert_array_equal(found.choice[same], expected.choice[same])
    np.testing.assert_allclose(found.error[same], expected.error[same], atol=1e-5)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ISAS)
def test_all_instruction_sets_and_thread_counts_give_the_same_bits(name: str) -> None:
    given = case(11, 67, 16, 3, True)
    expected = search(**given)
    with isa(name):
        assert_same(search(**given), expected)
        before = _ops_cpu.num_threads()
        _ops_cpu.set_num_threads(1)
        try:
            assert_same(search(**given), expected)
        finally:
            _ops_cpu.set_num_threads(before)


def test_loss_is_the_change_of_the_squared_error() -> None:
    """With the terms of a matrix H, the losses of a pass add up to e' H e, whatever the bytes."""
    rng = np.random.default_rng(2)
    root = rng.standard_normal((64, 80)).astype(np.float32)
    moments = hessian.blend(root @ root.T, 80)
    weight = rng.standard_normal((20, 64)).astype(np.float32)
    code, scales = np.zeros(20, np.int32), np.full((20, 1), 0.062, np.float32)
    metric, feedback = hessian.elimination_terms(moments)
    first = search(weight, weight, metric, BOOKS, code, scales, feedback=feedback)
    loss = hessian.loss(first.error, moments)
    np.testing.assert_allclose(first.loss, loss, rtol=1e-4)
    terms = hessian.descent_terms(moments)
    target = weight + terms.drift(0, first.error @ moments, first.error)
    second = search(
        target, weight, terms.metric, BOOKS, code, scales, feedback=terms.feedback[0],
        before=first.error,
    )  # fmt: skip
    after = hessian.loss(second.error, moments)
    np.testing.assert_allclose(second.loss, after - loss, rtol=1e-3, atol=1e-4)
    assert (second.loss <= 1e-4).all()


def test_lowest_byte_wins_among_equals() -> None:
    given = case(3, 4, 2, 1, False)
    given["books"] = np.ones((1, 4, 256), np.float32)
    given["code"][:] = 0
    assert not search(**given).packed.any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("code", np.full(5, 9, np.int32), "code[0] is 9, expected 0 to 4"),
        ("scales", np.zeros((5, 0), np.float32), "expected at least one"),
        ("target", np.zeros((5, 3), np.float32), "target has size 3 along axis 1"),
        ("books", np.zeros((1, 4, 255), np.float32), "books has size 255"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, value: np.ndarray, message: str) -> None:
    given = case(5, 5, 4, 1, False)
    given[name] = value
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        search(**given)
