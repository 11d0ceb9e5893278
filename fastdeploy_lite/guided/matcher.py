"""The state of a constraint while an output grows, and the grammar that it starts from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastdeploy_lite.guided.spec import short_reason
from fastdeploy_lite.utils.errors import RequestError

Bitmask = NDArray[np.int32]


class VocabularySource(Protocol):
    """What the bridge asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Ids that end a sequence, first one canonical."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token contributes to the text; empty for a token that is not text."""

    def encode_as_text(self, text: str) -> list[int]:
        """Tokens that spell a text, no control token among them."""


class Matcher:
    """The state of one request's constraint.  Not thread-safe."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.initial.deep_copy()
        self._token_bytes = grammar.source.token_bytes
        self._eos_token_ids = grammar.source.eos_token_ids
        self._marker = grammar.start_after
        self._tail = b""

    @property
    def is_active(self) -> bool:
        """Whether the constraint has started (it waits while the model thinks)."""
        return not self._marker

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return self.is_active and bool(self._matcher.is_stopped())

    def fill_bitmask(self, row: Bitmask) -> None:
        """Write the mask of allowed next tokens.

        Args:
            row: int32 `[ceil(vocab_size / 32)]`, contiguous; bit `i % 32` of word `i // 32` is set
                when token `i` is allowed.

        Raises:
            RequestError: The constraint became too complex to go on with.
        """
        if not self.is_active:
            row.fill(-1)
            return
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def accept(self, token_id: int) -> bool:
        """Advance by one token.

        Args:
            token_id: The sampled token.

        Returns:
            False when the token was not allowed; the state is then unchanged.

        Raises:
            RequestError: The constraint became too complex to go on with.
        """
        if not self.is_active:
            self._wait_for_marker(token_id)
            return True
        if self._matcher.is_stopped():
            return token_id in self._eos_token_ids
        is_taken = int(self._matcher.try_consume_tokens([token_id])) == 1
        self._check()
        return is_taken

    def look_ahead(
        self, guess: Sequence[int], words: int
    ) -> tuple[list[int], list[Bitmask | None]]:
        """The state after tokens that may come, without going there.

        Args:
            guess: Tokens, in order.
            words: Size of a mask.

        Returns:
            Those of them before the constraint forbids one, begins or is fulfilled, and the mask
            (None before it begins) of the token that follows each.
        """
        if not self.is_active:
            before = self._before_marker(guess)
            return before, [None] * len(before)
        ahead = copy.copy(self)
        ahead._matcher = self._matcher.deep_copy()
        kept: list[int] = []
        masks: list[Bitmask | None] = []
        for token_id in guess:
            if ahead.is_finished or not ahead.accept(token_id) or ahead.is_finished:
                break
            mask = np.empty(words, np.int32)
            ahead.fill_bitmask(mask)
            kept.append(token_id)
            masks.append(mask)
        return kept, masks

    def _before_marker(self, guess: Sequence[int]) -> list[int]:
        tail, kept = self._tail, list[int]()
        for token_id in guess:
            tail += self._token_bytes(token_id)
            if self._marker in tail:
                break
            kept.append(token_id)
        return kept

    def _wait_for_marker(self, token_id: int) -> None:
        self._tail += self._token_bytes(token_id)
        if self._marker in self._tail:
            self._marker = b""
        else:
            self._tail = self._tail[-len(self._marker) :]

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = short_reason(self._matcher.get_error())
            raise RequestError(f"The output constraint failed during generation: {reason}")


class Grammar:
    """A compiled constraint; `matcher()` starts a request with it."""

    def __init__(self, initial: Any, source: VocabularySource, start_after: str | None) -> None:
        self.initial = initial
        self.source = source
        self.start_after = (start_after or "").encode()

    def matcher(self) -> Matcher:
        """A fresh matcher, positioned before the first output token."""
        return Matcher(self)
