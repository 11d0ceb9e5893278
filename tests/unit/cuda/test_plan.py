"""Which kernel serves a call of the experts on a card: decided on the host, checked anywhere."""

from __future__ import annotations

from typing import Any

import pytest

from fastdeploy_lite import _ops_cpu

STREAM, TILES, PLAIN, DIGITS = 0, 1, 2, 3
HOPPER = {"major": 9, "multiprocessors": 132, "shared_bytes": 232448}
AMPERE = {"major": 8, "multiprocessors": 108, "shared_bytes": 166912}
SMALL_BLACKWELL = {"major": 12, "multiprocessors": 170, "shared_bytes": 101376}
LARGE = {"top_k": 8, "experts": 64, "hidden": 8192, "inner": 3584, "chunk_bytes": 2112}
SMALL = {"top_k": 6, "experts": 64, "hidden": 2560, "inner": 1536, "chunk_bytes": 2112}
WARPS, FIXED_BYTES = 16, 16896


def plan(tokens: int, card: dict[str, int], **changes: int) -> dict[str, Any]:
    found: dict[str, Any] = _ops_cpu.plan_experts(tokens=tokens, **{**LARGE, **card, **changes})
    return found


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_few_tokens_take_one_launch_and_many_take_tiles(shape: dict[str, int]) -> None:
    paths = {tokens: plan(tokens, HOPPER, **shape)["path"] for tokens in (1, 4, 8, 64, 4096)}
    assert paths == {1: STREAM, 4: STREAM, 8: STREAM, 64: TILES, 4096: TILES}


@pytest.mark.parametrize(
    ("shape", "chunk_bytes", "most"),
    [(SMALL, 2112, 16), (SMALL, 4096, 16), (LARGE, 2112, 16), (LARGE, 4096, 8)],
)
def test_up_to_so_many_tokens_stream(shape: dict[str, int], chunk_bytes: int, most: int) -> None:
    sizes = {**shape, "chunk_bytes": chunk_bytes}
    assert plan(most, HOPPER, **sizes)["path"] == STREAM
    assert plan(most + 1, HOPPER, **sizes)["path"] == TILES


def test_cards_without_wgmma_sort_and_use_mma() -> None:
    assert plan(1, AMPERE)["path"] == PLAIN
    assert plan(4096, AMPERE)["path"] == PLAIN
    assert plan(4096, SMALL_BLACKWELL)["path"] == PLAIN


def test_weights_of_two_kinds_never_stream() -> None:
    assert plan(1, HOPPER, chunk_bytes=0)["path"] == TILES


@pytest.mark.parametrize("card", [HOPPER, SMALL_BLACKWELL])
@pytest.mark.parametrize("chunk_bytes", [2112, 4096, 8192])
@pytest.mark.parametrize("hidden", [128, 2560, 8192, 16384])
@pytest.mark.parametrize("tokens", [*range(1, 17), 32])
def test_a_streaming_plan_fits_the_card(
    tokens: int, hidden: int, chunk_bytes: int, card: dict[str, int]
) -> None:
    sizes = {"hidden": hidden, "inner": hidden // 2, "chunk_bytes": chunk_bytes}
    try:
        found = plan(tokens, card, forced=STREAM, **sizes)
    except ValueError:
        return
    room, group = found["room_bytes"], found["row_bytes"]
    assert room + FIXED_BYTES <= card["shared_bytes"]
    padded = -(-hidden // 512) * 512
    assert group >= min(tokens, 8) * (2 * padded + 64)
    for wanted in (0, group, 2 * group, 2**30):
        rows, stages, copy_chunks = _ops_cpu.stream_room(
            bytes=room, chunk_bytes=chunk_bytes, wanted=wanted
        )
        assert stages >= 1
        assert copy_chunks >= 1
        assert rows + WARPS * stages * copy_chunks * chunk_bytes <= room
        assert rows >= min(wanted, group), "a group's rows have to fit whatever the ids are"
    assert tokens * LARGE["top_k"] <= 256


def test_rings_give_way_to_rows() -> None:
    room = plan(16, HOPPER)["room_bytes"]
    row = 2 * 8192 + 64
    found = [
        _ops_cpu.stream_room(bytes=room, chunk_bytes=2112, wanted=rows * row)
        for rows in (1, 7, 10, 16)
    ]
    assert found == [(row, 2, 2), (7 * row, 2, 1), (10 * row, 1, 1), (room - 16 * 2112, 1, 1)]


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_tiles_get_higher_with_the_rows_an_expert_has(shape: dict[str, int]) -> None:
    def height(mean: float) -> int:  # of tiles where experts have so many rows on average
        tokens = int(mean * shape["experts"] / shape["top_k"])
        return int(plan(tokens, HOPPER, **shape, forced=TILES)["tile_tokens"])

    low, short, tall = 16, 40, 144
    assert [height(mean) for mean in (0.5, 8)] == [low, low]
    assert [height(mean) for mean in (8.2, 32)] == [short, short]
    assert [height(mean) for mean in (32.2, 64, 512)] == [tall, tall, tall]


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 300, 4096])
@pytest.mark.parametrize("card", [HOPPER, AMPERE])
def test_there_is_room_for_all_tiles(tokens: int, card: dict[str, int]) -> None:
    found = plan(tokens, card)
    slots = tokens * LARGE["top_k"]
    crowded = -(-(slots - LARGE["experts"] + 1) // found["tile_tokens"]) + LARGE["experts"] - 1
    assert found["max_tiles"] >= min(crowded, slots)


def test_a_forced_path_that_cannot_serve_is_refused() -> None:
    assert plan(300, HOPPER, forced=PLAIN)["path"] == PLAIN
    with pytest.raises(ValueError, match="path 0 cannot serve 300 tokens"):
        plan(300, HOPPER, forced=STREAM)
    with pytest.raises(ValueError, match="path 1 cannot serve 1 tokens"):
        plan(1, AMPERE, forced=TILES)
    with pytest.raises(ValueError, match="path 4"):
        plan(1, HOPPER, forced=4)


FAST = {"ccq": True, "same_bits": False}


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_few_tokens_of_two_bits_take_digits_unless_bits_have_to_be_the_same(
    shape: dict[str, int],
) -> None:
    for tokens in range(1, 17):
        assert plan(tokens, HOPPER, **shape, **FAST)["path"] == DIGITS
        assert plan(tokens, HOPPER, **shape, ccq=True)["path"] == STREAM
        assert plan(tokens, HOPPER, **shape, same_bits=False)["path"] == STREAM
    assert plan(17, HOPPER, **shape, **FAST)["path"] == TILES
    assert plan(1, AMPERE, **shape, **FAST)["path"] == PLAIN


@pytest.mark.parametrize("card", [HOPPER, SMALL_BLACKWELL])
@pytest.mark.parametrize("top_k", [1, 8, 17])
@pytest.mark.parametrize("hidden", [128, 2560, 8192, 12800, 16384])
def test_digits_serve_few_tokens_of_any_number_or_none(
    hidden: int, top_k: int, card: dict[str, int]
) -> None:
    """Or a token's bits would depend on how many others there are."""
    sizes = {**LARGE, "hidden": hidden, "inner": hidden // 2, "top_k": top_k, **FAST}
    paths = [plan(tokens, card, **sizes)["path"] for tokens in range(1, 17)]
    assert paths.count(DIGITS) in (0, 16)


def test_halves_serve_where_rows_of_digits_do_not_fit() -> None:
    wide = {"hidden": 12800, "inner": 6400}
    assert [plan(tokens, HOPPER, **wide, **FAST)["path"] for tokens in (6, 8)] == [STREAM, TILES]


def test_no_run_of_digits_crosses_a_whole_group() -> None:
    few = {**HOPPER, "multiprocessors": 15}
    sizes = {**SMALL, "top_k": 8, "experts": 256}
    assert plan(15, few, **sizes, forced=DIGITS, ccq=True)["path"] == DIGITS
    with pytest.raises(ValueError, match="path 3 cannot serve 16 tokens"):
        plan(16, few, **sizes, forced=DIGITS, ccq=True)
    assert plan(16, few, **sizes, forced=STREAM, ccq=True)["path"] == STREAM


def test_digits_are_for_two_bits_on_cards_that_have_them() -> None:
    for card, changes in (
        (HOPPER, {}),
        (AMPERE, {"ccq": True}),
        (HOPPER, {"ccq": True, "top_k": 257}),
    ):
        with pytest.raises(ValueError, match="path 3 cannot serve 1 tokens"):
            plan(1, card, forced=DIGITS, **changes)


@pytest.mark.parametrize("hidden", [128, 2560, 8192, 16384])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 32])
def test_rows_of_digits_are_larger_and_fit(tokens: int, hidden: int) -> None:
    sizes = {"hidden": hidden, "inner": hidden // 2, "ccq": True, "forced": DIGITS}
    try:
        found = plan(tokens, HOPPER, **{**SMALL, **sizes})
    except ValueError:
        assert hidden == 16384
        return
    padded = -(-hidden // 512) * 512
    assert found["row_bytes"] == min(tokens, 8) * (2 * padded + padded // 8 + 16)
    assert found["room_bytes"] + FIXED_BYTES <= HOPPER["shared_bytes"]
