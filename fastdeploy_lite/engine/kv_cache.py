"""KV blocks: who holds which, and which hold a prefix that others can use.

A block stores keys and values of 64 tokens. A full block is known by the digest of all tokens up to
its end, so equal digests mean equal content. Blocks that nobody holds stay findable until they are
needed for something else, the least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Digest = bytes
_ROOT: Digest = b""


def chain_digest(parent: Digest, token_ids: Sequence[int]) -> Digest:
    """Digest of a full block.

    Cryptographic, because a request's author must not be able to make another request read a
    block of different tokens.

    Args:
        parent: Digest of the block before; b"" for the first.
        token_ids: The block's tokens.

    Returns:
        16 bytes.
    """
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


class DigestChain:
    """Digests of the full blocks of a growing token list, each computed once."""

    __slots__ = ("_block_size", "_digests")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._digests: list[Digest] = []

    def up_to(self, count: int, prompt: Sequence[int], output: Sequence[int]) -> list[Digest]:
        """Digests of the first `count` full blocks of `prompt + output`.

        Args:
            count: Number of blocks; `count * block_size` tokens must exist.
            prompt, output: The tokens; may only have grown since the last call.

        Returns:
            A list at least `count` long, owned by this object.
        """
        digests, size = self._digests, self._block_size
        while len(digests) < count:
            start = len(digests) * size
            tokens = token_range(prompt, output, start, start + size)
            digests.append(chain_digest(digests[-1] if digests else _ROOT, tokens))
        return digests


def token_range(
    prompt: Sequence[int], output: Sequence[int], start: int, end: int
) -> Sequence[int]:
    """Tokens `start..end-1` of `prompt + output`, without joining the two whole lists."""
    split = len(prompt)
    if end <= split:
        return prompt[start:end]
    if start >= split:
        return output[start - split : end - split]
    return [*prompt[start:], *output[: end - split]]


class BlockManager:
    """Hands out KV blocks, counts their holders, remembers reusable prefixes.

    Args:
        num_blocks: Blocks that exist; their numbers are 0..num_blocks-1.
        block_size: Tokens of one block.
        enable_prefix_caching: Whether full blocks can be found again.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._holders = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._digest_of: dict[int, Digest] = {}
        self._block_of: dict[Digest, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had now."""
        return len(self._unused) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Those of them that hold a findable prefix."""
        return len(self._evictable)

    def find_prefix(self, digests: Sequence[Digest]) -> list[int]:
        """Blocks of the longest known prefix of a chain of digests, not yet held for it."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, prefix: Sequence[int], count: int, reserve: int = 0) -> list[int] | None:
        """Start a block table: share `prefix`, take `count` new blocks.

        Args:
            prefix: Blocks from `find_prefix`.
            count: New blocks.
            reserve: Blocks that must stay free for others.

        Returns:
            The table, or None (and no change) when there are too few.
        """
        idle = sum(not self._holders[block] for block in prefix)
        if self.num_free - idle < count + reserve:
            return None
        for block in prefix:
            if not self._holders[block]:
                del self._evictable[block]
            self._holders[block] += 1
        table = list(prefix)
        for _ in range(count):
            table.append(self._take())
        return table

    def append(self, table: list[int]) -> None:
        """Add one new block to a table; the caller has seen that one is free."""
        table.append(self._take())

    def release(self, table: list[int]) -> None:
        """Give up every block of a table and clear it.

        The tail is released first, so that the beginning of a prefix is evicted last.
        """
        for block in reversed(table):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._digest_of:
                    self._evictable[block] = None
                else:
                    self._unused.append(block)
        table.clear()

    def publish(self, block: int, digest: Digest) -> None:
        """Make a full, computed block findable; a second copy of known content stays private."""
        if self.enable_prefix_caching and digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget_prefixes(self) -> None:
        """Drop what can be found; held blocks stay held."""
        self._unused.extend(self._evictable)
        self._evictable.clear()
        self._digest_of.clear()
        self._block_of.clear()

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
        self._holders[block] = 1
        return block

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Verify that every block is accounted for exactly once.

        Args:
            tables: The block tables of all sequences alive.

        Raises:
            RuntimeError: A block is lost, held twice by one table, or wrongly counted.
        """
        held: Counter[int] = Counter()
        for table in tables:
            if len(set(table)) != len(table):
                raise RuntimeError(f"KV blocks: a table holds a block twice: {list(table)}")
            held.update(table)
        for block, holders in enumerate(self._holders):
            if held[block] != holders:
                raise RuntimeError(
                    f"KV blocks: block {block} is in {held[block]} tables but counts {holders}"
                )
        idle = [*self._unused, *self._evictable]
        if sorted([*idle, *(b for b in held if held[b])]) != list(range(self.num_blocks)):
            raise RuntimeError("KV blocks: some are lost, or both free and held")
        if {d: b for b, d in self._digest_of.items()} != self._block_of:
            raise RuntimeError("KV blocks: digests and blocks disagree")
        if any(block not in self._digest_of for block in self._evictable):
            raise RuntimeError("KV blocks: an evictable block has no digest")
