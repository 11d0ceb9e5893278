"""Whether an answer begins inside the model's thinking, decided from tokens in one place.

Only the end of the prompt tells: the generation prompt that a chat template puts after the last
message, or the start of the answer that a client continues. Markers that stand in a user's text
say nothing about the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer

THINK_START, THINK_END = "<think>", "</think>"


class ThinkingMarkers:
    """The tokens that open and close thinking.

    Attributes:
        start_id, end_id: Their ids; -1 for one that the vocabulary lacks.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Ernie4_5Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.start_id, self.end_id = map(self._id, (THINK_START, THINK_END))

    def _id(self, text: str) -> int:
        token_id = self._tokenizer.token_id(text)
        return -1 if token_id is None else token_id

    def may_be_in(self, text: str) -> bool:
        """Whether the model has markers and a text names one."""
        return self.end_id >= 0 and (THINK_START in text or THINK_END in text)

    def last_marker(self, ids: Sequence[int]) -> bool | None:
        """True when the last marker among `ids` opens, False when it closes, None without one."""
        if self.end_id < 0:
            return None
        markers = (i for i in reversed(ids) if i in (self.start_id, self.end_id))
        last = next(markers, None)
        return None if last is None else last == self.start_id

    def at_end(self, ids: Sequence[int]) -> bool | None:
        """As `last_marker`, of a marker that nothing but blanks follows."""
        for token_id in reversed(ids):
            if token_id in (self.start_id, self.end_id):
                return self.last_marker([token_id])
            if self._tokenizer.token_bytes(token_id).strip() or not self._is_text(token_id):
                return None
        return None

    def _is_text(self, token_id: int) -> bool:
        return bool(self._tokenizer.token_bytes(token_id))
