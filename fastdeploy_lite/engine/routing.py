"""Which replica computes a request: the one that has seen most of its prompt, unless it is busy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.engine.kv_cache import Digest, DigestChain

MOST_BLOCKS = 512
"""Full blocks of a prompt that are told apart: 32,768 tokens."""


class PrefixRouter:
    """Remembers which prompts went where, as far as the replicas' caches can.

    A replica finds the blocks of a prefix again that it has computed lately, so what it was sent
    tells what it holds. The books may be wrong about what was evicted since; then a prefix is
    computed again, which costs time alone.

    Args:
        replicas: How many.
        slack: So many requests more than the least busy one a replica may have and still be
            preferred for its prefix.
    """

    def __init__(self, replicas: int, slack: int) -> None:
        self._slack = slack
        self._known: list[OrderedDict[Digest, None]] = [OrderedDict() for _ in range(replicas)]
        self._room = [0] * replicas

    def resize(self, replica: int, blocks: int) -> None:
        """A replica has started with an empty cache of so many blocks."""
        self._room[replica] = blocks
        self._known[replica].clear()

    def choose(self, prompt: Sequence[int], loads: Sequence[int | None]) -> int:
        """Return the replica for a prompt, and remember it there.

        Args:
            prompt: Token ids.
            loads: Unfinished requests of each replica, None for one that takes none; one at
                least takes some.
        """
        count = min(len(prompt) // BLOCK_SIZE, MOST_BLOCKS)
        digests = DigestChain(BLOCK_SIZE).up_to(count, prompt, ())
        least = min(load for load in loads if load is not None)
        able = [
            (-self._known_blocks(replica, digests), load, replica)
            for replica, load in enumerate(loads)
            if load is not None and load <= least + self._slack
        ]
        chosen = min(able)[2]
        self._remember(chosen, digests)
        return chosen

    def _known_blocks(self, replica: int, digests: Sequence[Digest]) -> int:
        known = self._known[replica]
        return next((i for i, digest in enumerate(digests) if digest not in known), len(digests))

    def _remember(self, replica: int, digests: Sequence[Digest]) -> None:
        known = self._known[replica]
        for digest in reversed(digests):  # the end of a prefix is forgotten before its beginning
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > self._room[replica]:
            known.popitem(last=False)
