"""The block manager: sharing, eviction, and no block ever lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fastdeploy_lite.engine.kv_cache import BlockManager, DigestChain, chain_digest, token_range

SIZE = 4


def digests_of(tokens: list[int]) -> list[bytes]:
    return list(DigestChain(SIZE).up_to(len(tokens) // SIZE, tokens, []))


def test_token_range_joins_prompt_and_output() -> None:
    prompt, output = [1, 2, 3], [4, 5, 6]
    for start in range(7):
        for end in range(start, 7):
            assert list(token_range(prompt, output, start, end)) == [1, 2, 3, 4, 5, 6][start:end]


def test_digest_depends_on_every_token_before() -> None:
    base = digests_of([1, 2, 3, 4, 5, 6, 7, 8])
    assert digests_of([1, 2, 3, 4, 5, 6, 7, 9])[0] == base[0]
    assert digests_of([1, 2, 3, 4, 5, 6, 7, 9])[1] != base[1]
    assert digests_of([9, 2, 3, 4, 5, 6, 7, 8])[1] != base[1]
    assert chain_digest(b"", [1, 2, 3, 4]) == base[0]


def test_digests_continue_over_growing_output() -> None:
    chain, output = DigestChain(SIZE), [5, 6]
    first = list(chain.up_to(1, [1, 2, 3, 4], output))
    output.extend([7, 8])
    assert chain.up_to(2, [1, 2, 3, 4], output)[:1] == first
    assert chain.up_to(2, [1, 2, 3, 4], output) == digests_of([1, 2, 3, 4, 5, 6, 7, 8])


def test_least_recently_used_prefix_goes_first_and_its_tail_before_its_head() -> None:
    blocks = BlockManager(4, SIZE, True)
    chain_a, chain_b = digests_of([1] * 8), digests_of([2] * 8)
    table_a = blocks.allocate([], 2)
    table_b = blocks.allocate([], 2)
    assert table_a and table_b
    for table, chain in ((table_a, chain_a), (table_b, chain_b)):
        for block, digest in zip(table, chain, strict=True):
            blocks.publish(block, digest)
    blocks.release(table_a)
    blocks.release(table_b)
    assert blocks.num_free == blocks.num_cached == 4
    taken = blocks.allocate([], 1)
    assert taken
    assert len(blocks.find_prefix(chain_a)) == 1, "the tail of the older chain is evicted first"
    assert len(blocks.find_prefix(chain_b)) == 2
    blocks.check_integrity([taken])


def test_a_prefix_in_use_counts_as_free_only_for_its_sharer() -> None:
    blocks = BlockManager(2, SIZE, True)
    table = blocks.allocate([], 2)
    assert table
    blocks.publish(table[0], digests_of([1] * 4)[0])
    blocks.release(table)
    prefix = blocks.find_prefix(digests_of([1] * 4))
    assert blocks.allocate(prefix, 2) is None, "the shared block cannot also be a new one"
    shared = blocks.allocate(prefix, 1)
    assert shared == [prefix[0], shared[1]]  # type: ignore[index]
    blocks.check_integrity([shared])  # type: ignore[list-item]


def test_forget_prefixes_keeps_held_blocks() -> None:
    blocks = BlockManager(3, SIZE, True)
    table = blocks.allocate([], 2)
    assert table
    blocks.publish(table[0], b"x" * 16)
    blocks.forget_prefixes()
    assert blocks.find_prefix([b"x" * 16]) == []
    blocks.check_integrity([table])
    blocks.release(table)
    assert (blocks.num_free, blocks.num_cached) == (3, 0)


@pytest.mark.parametrize("damage", ["lost", "shared", "digest"])
def test_integrity_check_sees_damage(damage: str) -> None:
    blocks = BlockManager(4, SIZE, True)
    table = blocks.allocate([], 2)
    assert table
    blocks.publish(table[0], b"y" * 16)
    tables = [table]
    if damage == "lost":
        tables = [table[:1]]
    elif damage == "shared":
        blocks._unused[0] = table[0]
    else:
        blocks._block_of.clear()
    with pytest.raises(RuntimeError, match="KV blocks"):
        blocks.check_integrity(tables)


class Blocks(RuleBasedStateMachine):
    """Random sharing, growth and release over few blocks and few distinct contents."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(8, SIZE, True)
        self.alive: dict[int, tuple[list[int], list[int]]] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.names = 0

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def admit(self, tokens: list[int]) -> int:
        prefix = self.blocks.find_prefix(digests_of(tokens)[: (len(tokens) - 1) // SIZE])
        for index, block in enumerate(prefix):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        free = self.blocks.num_free
        table = self.blocks.allocate(prefix, -(-len(tokens) // SIZE) - len(prefix))
        self.names += 1
        if table is None:
            assert self.blocks.num_free == free
            return -1
        assert table[: len(prefix)] == prefix
        for block in table[len(prefix) :]:
            self.content.pop(block, None)
        self.alive[self.names] = (table, tokens)
        return self.names

    @rule(name=tables)
    def publish(self, name: int) -> None:
        table, tokens = self.alive.get(name, ([], []))
        for index, digest in enumerate(digests_of(tokens)):
            self.content[table[index]] = tuple(tokens[: (index + 1) * SIZE])
            self.blocks.publish(table[index], digest)

    @rule(name=tables, token=st.integers(0, 1))
    def grow(self, name: int, token: int) -> None:
        if name not in self.alive:
            return
        table, tokens = self.alive[name]
        if len(tokens) == len(table) * SIZE:
            if not self.blocks.num_free:
                return
            self.blocks.append(table)
            self.content.pop(table[-1], None)
        tokens.append(token)

    @rule(name=consumes(tables))
    def release(self, name: int) -> None:
        if name in self.alive:
            table, _ = self.alive.pop(name)
            self.blocks.release(table)
            assert table == []

    @invariant()
    def nothing_is_lost(self) -> None:
        self.blocks.check_integrity(table for table, _ in self.alive.values())


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
