"""Which kernel serves which shape on which card: decided on the host, checked anywhere.

Of quantised experts see test_plan.py. The tables hold what was chosen when these decisions stood in
Python and beside the kernels.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fastdeploy_lite import _ops_cpu

HOPPER = {"major": 9, "multiprocessors": 132}
AMPERE = {"major": 8, "multiprocessors": 108}
INT8, INT4, CCQ, CCQ_WIDE = 1, 2, 3, 4
WGMMA = _ops_cpu.hopper_tile
SCRATCH_FLOATS = 16 << 20


# -- architectures ---------------------------------------------------------------------------------


def test_only_what_was_timed_is_said_to_be_measured() -> None:
    rows = {major: _ops_cpu.card_table(major) for major in (8, 9, 10, 12)}
    assert {major: row["measured"] for major, row in rows.items()} == {
        8: False, 9: True, 10: False, 12: False,
    }  # fmt: skip
    assert rows[12] == rows[10]


def test_what_was_not_measured_is_as_on_the_architecture_that_was() -> None:
    def thresholds(major: int) -> dict[str, Any]:
        row: dict[str, Any] = _ops_cpu.card_table(major)
        return {name: row[name] for name in row if name not in ("major", "measured")}

    assert thresholds(8) == thresholds(9) == thresholds(10)


def test_a_card_older_than_all_rows_takes_the_first() -> None:
    assert _ops_cpu.card_table(7) == _ops_cpu.card_table(8)


# -- tiles of linear maps --------------------------------------------------------------------------

ROWS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300, 4096)


def tile(rows: int, kind: int, k: int, n: int, **changes: int) -> int:
    sizes = {"in_features": k, "out_features": n, "scratch_floats": SCRATCH_FLOATS, **HOPPER}
    return int(_ops_cpu.linear_tile(rows=rows, kind=kind, **{**sizes, **changes}))


@pytest.mark.parametrize(
    ("kind", "k", "n", "card", "heights"),
    [
        (INT8, 2560, 2560, HOPPER, [8, 8, 16, 16, 16, 16, 32, 32, *[WGMMA] * 5]),
        (INT8, 8192, 7168, HOPPER, [8, 8, 16, 16, 32, 32, 64, 64, *[WGMMA] * 5]),
        (INT8, 8192, 8192, HOPPER, [8, 8, 16, 16, 32, 32, *[WGMMA] * 7]),
        (INT4, 8192, 8192, HOPPER, [8, 8, 16, 16, 32, 32, 64, 64, *[WGMMA] * 5]),
        (CCQ, 8192, 8192, HOPPER, [8, 8, 16, 16, 32, 32, *[64] * 7]),
        (CCQ_WIDE, 8192, 8192, HOPPER, [8, 8, 16, 16, 32, 32, *[64] * 7]),
        (INT8, 2560, 2560, AMPERE, [8, 8, 16, 16, 16, 16, 32, 32, 64, 64, 64, 64, 128]),
        (INT8, 8192, 8192, AMPERE, [8, 8, 16, 16, 32, 32, *[64] * 5, 128, 128]),
        (INT4, 8192, 8192, AMPERE, [8, 8, 16, 16, 32, 32, *[64] * 5, 128, 128]),
        (CCQ, 2560, 2560, AMPERE, [8, 8, 16, 16, 16, 16, 32, 32, *[64] * 5]),
    ],
)
def test_tiles_of_linear_maps(
    kind: int, k: int, n: int, card: dict[str, int], heights: list[int]
) -> None:
    assert [tile(rows, kind, k, n, **card) for rows in ROWS] == heights


def test_a_weight_is_small_up_to_eight_million_elements() -> None:
    assert [tile(20, INT8, 2560, columns) for columns in (3276, 3277)] == [16, 32]


def test_wgmma_needs_scratch_for_a_tile_of_x() -> None:
    needed = 160 * 2560 // 2
    assert tile(300, INT8, 2560, 1040, scratch_floats=needed) == WGMMA
    assert tile(300, INT8, 2560, 1040, scratch_floats=needed - 1) == 64


def test_tall_tiles_where_three_blocks_come_to_two_multiprocessors() -> None:
    ampere = {"major": 8}
    assert tile(256, INT4, 8192, 128 * 81, multiprocessors=108, **ampere) == 128
    assert tile(256, INT4, 8192, 128 * 80, multiprocessors=108, **ampere) == 64


def test_a_forced_tile_is_taken() -> None:
    assert [tile(4096, INT8, 8192, 8192, forced=height) for height in (8, 64)] == [8, 64]


# -- parts of K ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tiles", "k_tiles", "gated", "tiles_of_token", "parts"),
    [
        (1, 2, False, 1, 2),
        (9, 3, False, 1, 2),
        (64, 64, False, 1, 8),
        (160, 20, False, 1, 8),
        (160, 12, False, 6, 2),
        (448, 64, False, 1, 4),
        (512, 64, False, 1, 4),
        (6400, 20, False, 1, 2),
        (448, 64, True, 8, 1),
        (192, 20, True, 6, 2),
    ],
)
def test_parts_of_k_of_a_product(
    n_tiles: int, k_tiles: int, gated: bool, tiles_of_token: int, parts: int
) -> None:
    """A change here changes the bits of results on a card with 132 multiprocessors."""
    found = _ops_cpu.canonical_parts(
        n_tiles=n_tiles, k_tiles=k_tiles, gated=gated, tiles_of_token=tiles_of_token,
        multiprocessors=132,
    )  # fmt: skip
    assert found == parts


def test_parts_of_k_depend_on_the_card() -> None:
    product = {"n_tiles": 512, "k_tiles": 64, "gated": False, "tiles_of_token": 1}
    assert _ops_cpu.canonical_parts(**product, multiprocessors=108) == 8
    assert _ops_cpu.canonical_parts(**product, multiprocessors=132) == 4


@pytest.mark.parametrize("multiprocessors", [46, 108, 132, 170])
@pytest.mark.parametrize("k_tiles", [1, 2, 3, 5, 20, 28, 64])
@pytest.mark.parametrize("n_tiles", [1, 9, 160, 512])
def test_parts_are_whole_k_tiles_and_none_is_empty(
    n_tiles: int, k_tiles: int, multiprocessors: int
) -> None:
    parts = _ops_cpu.canonical_parts(
        n_tiles=n_tiles, k_tiles=k_tiles, gated=False, tiles_of_token=1,
        multiprocessors=multiprocessors,
    )  # fmt: skip
    begins = [
        _ops_cpu.part_begin(k_tiles=k_tiles, part=part, parts=parts) for part in range(parts + 1)
    ]
    assert begins[0] == 0
    assert begins[-1] == k_tiles
    assert all(before < after for before, after in itertools.pairwise(begins))
    assert max(_lengths(begins)) - min(_lengths(begins)) <= 1


def _lengths(begins: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(begins)]


def splits(rows: int, columns: int, k_tiles: int, parts: int, blocks: int, **changes: int) -> bool:
    sizes = {"rows": rows, "columns": columns, "k_tiles": k_tiles, "parts": parts, "blocks": blocks}
    limits = {"partial_floats": SCRATCH_FLOATS, "multiprocessors": 132}
    return bool(_ops_cpu.splits_parts(**sizes, **{**limits, **changes}))


def test_parts_go_to_blocks_of_their_own_where_few_blocks_would_work() -> None:
    assert splits(64, 2560, 20, 4, 40)
    assert not splits(64, 2560, 20, 4, 160)
    assert not splits(300, 8192, 64, 8, 192)


def test_parts_need_room_for_their_sums_and_to_be_several() -> None:
    needed = 8 * 100 * 1024
    assert splits(100, 1024, 64, 8, 16, partial_floats=needed)
    assert not splits(100, 1024, 64, 8, 16, partial_floats=needed - 1)
    assert not splits(100, 1024, 64, 1, 16)


# -- the cut of Hopper's linear kernel -------------------------------------------------------------


def cut(rows: int, columns: int, **changes: int) -> tuple[int, int, int]:
    sizes = {"k_tiles": 64, "parts": 8, "partial_floats": 1 << 24, "multiprocessors": 132}
    found: tuple[int, int, int] = _ops_cpu.hopper_cut(
        rows=rows, columns=columns, **{**sizes, **changes}
    )
    return found


def test_rows_at_once_are_all_or_whole_tiles() -> None:
    floats_of_row = 20 * 128 // 2

    def at_once(rows: int, room: int) -> int:
        found = _ops_cpu.hopper_rows(rows=rows, k_tiles=20, scratch_floats=room * floats_of_row)
        return int(found)

    assert [at_once(1000, room) for room in (1000, 999, 320, 319, 160)] == [
        1000,
        960,
        320,
        160,
        160,
    ]
    assert at_once(100, 160) == 100


@pytest.mark.parametrize("columns", [16, 144, 2560, 8192, 10240])
@pytest.mark.parametrize("rows", [1, 7, 33, 65, 128, 129, 160, 161, 300, 1000, 4096])
def test_tiles_of_whole_eights_hold_all_rows(rows: int, columns: int) -> None:
    height, tiles, runs = cut(rows, columns)
    assert height % 8 == 0
    assert 8 <= height <= 160
    assert height * (tiles - 1) < rows <= height * tiles
    assert 8 % runs == 0


def test_high_tiles_where_they_save_a_round_of_blocks() -> None:
    assert cut(300, 8192)[:2] == (152, 2)  # 128 items, where three tiles would be 192
    assert cut(300, 10240)[:2] == (104, 3)  # two rounds in any case
    assert cut(4096, 8192)[:2] == (160, 26)


def test_few_items_share_the_parts_of_k() -> None:
    assert cut(64, 2560, k_tiles=20)[2] > 1
    assert cut(64, 2560, k_tiles=20, parts=1)[2] == 1
    assert cut(4096, 10240)[2] == 1


def test_parts_are_not_shared_without_room_for_their_sums() -> None:
    needed = 8 * 64 * 2560
    assert cut(64, 2560, k_tiles=20, partial_floats=needed)[2] > 1
    assert cut(64, 2560, k_tiles=20, partial_floats=needed - 1)[2] == 1


# -- routers and bf16 experts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "plan"),
    [
        (1, 64, 16, (1, 1)),
        (1, 2560, 64, (1, 40)),
        (16, 8192, 160, (1, 128)),
        (64, 8192, 64, (1, 128)),
        (257, 8192, 64, (8, 16)),
        (300, 2560, 64, (8, 5)),
        (4096, 8192, 64, (128, 1)),
    ],
)
def test_pieces_of_k_that_a_block_of_the_router_sums(
    tokens: int, hidden: int, experts: int, plan: tuple[int, int]
) -> None:
    sizes = {"tokens": tokens, "hidden": hidden, "experts": experts, "multiprocessors": 132}
    assert _ops_cpu.route_plan(**sizes) == plan


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "plan"),
    [
        (1, 8, 64, (0, 8)),
        (2, 8, 64, (0, 16)),
        (3, 8, 64, (8, 27)),
        (8, 8, 64, (8, 72)),
        (9, 8, 64, (8, 73)),
        (48, 8, 64, (8, 112)),
        (49, 8, 64, (16, 88)),
        (96, 8, 64, (16, 112)),
        (97, 8, 64, (32, 88)),
        (256, 8, 64, (32, 128)),
        (257, 8, 64, (64, 96)),
        (17, 1, 4, (8, 6)),
        (300, 1, 4, (64, 8)),
    ],
)
@pytest.mark.parametrize("major", [8, 9, 12])
def test_tiles_of_bf16_experts(
    tokens: int, top_k: int, experts: int, plan: tuple[int, int], major: int
) -> None:
    sizes = {"tokens": tokens, "top_k": top_k, "experts": experts, "major": major}
    assert _ops_cpu.plan_dense_experts(**sizes) == plan


@pytest.mark.parametrize("forced", [0, 8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 300])
def test_there_is_room_for_all_tiles_of_bf16_experts(tokens: int, forced: int) -> None:
    top_k, experts = 8, 64
    slots = tokens * top_k
    height, most = _ops_cpu.plan_dense_experts(
        tokens=tokens, top_k=top_k, experts=experts, major=9, forced=forced
    )
    assert height == forced
    crowded = slots if forced == 0 else -(-(slots - experts + 1) // forced) + experts - 1
    assert most >= min(crowded, slots)


# -- attention -------------------------------------------------------------------------------------


def attention(tokens: int, sequences: int, **changes: int) -> dict[str, Any]:
    model = {"query_heads": 64, "kv_heads": 8, "head_dim": 128, "table_width": 4}
    sizes = {**model, "capacity": SCRATCH_FLOATS, **HOPPER, **changes}
    found: dict[str, Any] = _ops_cpu.plan_attention(tokens=tokens, sequences=sequences, **sizes)
    return found


def test_segments_of_the_longest_context() -> None:
    blocks = {0: 1, 4: 1, 5: 2, 64: 16, 128: 32, 4096: 32}  # of 64 tokens: segments
    assert {width: attention(1, 1, table_width=width)["segments"] for width in blocks} == blocks


@pytest.mark.parametrize(
    ("sequences", "width", "spread"),
    [
        (1, 4, (1, 8, 0)),
        (1, 64, (1, 128, 133120)),
        (1, 68, (1, 132, 141440)),
        (17, 4, (17, 132, 0)),
        (64, 512, (32, 132, 8519680)),  # two launches: scratch has no room for 64
        (600, 4, (200, 132, 0)),  # a launch lists 256
    ],
)
def test_decodes_are_spread(sequences: int, width: int, spread: tuple[int, int, int]) -> None:
    found = attention(sequences, sequences, table_width=width)
    assert (found["sequences"], found["blocks"], found["partial_floats"]) == spread


def test_scratch_without_room_for_one_sequence_is_refused() -> None:
    needed = 8 * 32 * 8 * 130
    attention(1, 1, table_width=512, capacity=needed)
    with pytest.raises(
        RuntimeError, match=f"needs {4 * needed} bytes .* there are {4 * needed - 4}"
    ):
        attention(1, 1, table_width=512, capacity=needed - 1)


def test_kernels_of_a_step() -> None:
    decode, mixed = attention(4, 4), attention(300, 4)
    assert decode["decodes"] and not decode["takes_chunks"]
    assert mixed["decodes"] and mixed["takes_chunks"]
    wide_groups = attention(4, 4, kv_heads=2)  # 32 query heads a group, a warp's tile has 16 rows
    assert not wide_groups["decodes"] and wide_groups["takes_chunks"]


def test_chunks_take_wgmma_on_hopper_with_heads_of_128() -> None:
    assert attention(300, 4)["chunks_on_wgmma"]
    assert not attention(300, 4, head_dim=64)["chunks_on_wgmma"]
    assert not attention(300, 4, **AMPERE)["chunks_on_wgmma"]
    assert not attention(300, 4, major=12)["chunks_on_wgmma"]


def test_one_kernel_decodes_where_each_block_has_one_segment() -> None:
    assert attention(16, 16)["decodes_in_one"]
    assert not attention(17, 17)["decodes_in_one"]
    assert attention(1, 1, table_width=64)["decodes_in_one"]
    assert not attention(1, 1, table_width=68)["decodes_in_one"]
    assert not attention(2, 1)["decodes_in_one"]


def test_a_kernel_of_its_own_merges_where_blocks_have_more_segments_than_one() -> None:
    assert not attention(16, 16)["merges_apart"]
    assert attention(17, 17)["merges_apart"]
    many = {"multiprocessors": 2000}  # blocks for all, but counters for 1,024 heads
    assert not attention(128, 128, **many)["merges_apart"]
    assert attention(129, 129, **many)["merges_apart"]
