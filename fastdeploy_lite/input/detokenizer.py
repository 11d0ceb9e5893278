"""From token ids to text, one token at a time."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Sequence

_BATCH = 4096  # ids whose bytes are held at the same time
_utf8 = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """A stream of text that never emits half a character.

    A character outside the vocabulary is spelled by several byte tokens; nothing is emitted until
    it is complete. Constant time per token: the pieces before do not matter.

    Args:
        table: Bytes of every token id.
        strip_first_space: Whether a space that the first token begins with is not the text's.
    """

    __slots__ = ("_decoder", "_strip", "_table")

    def __init__(self, table: Sequence[bytes], strip_first_space: bool = False) -> None:
        self._table = table
        self._decoder = _utf8("replace")
        self._strip = strip_first_space

    def feed(self, token_id: int) -> str:
        """Text that this token completes; "" for an id beyond the vocabulary (padding rows)."""
        if not 0 <= token_id < len(self._table):
            return ""
        piece = self._table[token_id]
        if self._strip:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def feed_all(self, token_ids: Iterable[int]) -> str:
        """What `feed` of every id would give, joined; without an object per token."""
        size = len(self._table)
        known = (i for i in token_ids if 0 <= i < size)
        texts = [self.feed(i) for i in itertools.islice(known, 1)]  # may lose a space
        while batch := list(itertools.islice(known, _BATCH)):
            texts.append(self._decoder.decode(b"".join([self._table[i] for i in batch])))
        return "".join(texts)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)
