"""Structured output: a specification from a request becomes a mask over the next token.

`llguidance` does the parsing.  This package chooses its grammar for each kind of constraint,
bridges the SentencePiece vocabulary (byte pieces, the word-boundary mark, tokens that are not
text), bounds size and time, caches compiled grammars and delays the constraint until the model
stops thinking.
"""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import llguidance
import numpy as np

from fastdeploy_lite.guided.matcher import Grammar, VocabularySource
from fastdeploy_lite.guided.spec import GuidedSpec, invalid, short_reason
from fastdeploy_lite.guided.translation import grammar_text

# Most grammars take a MiB or two, one with a large `multipleOf` a hundred.
CACHE_BYTES = 256 << 20
LEAST_BYTES = 256 << 10  # of an entry: what it takes is measured in pages of the whole process
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=2_000_000, max_lexer_states=50_000, max_grammar_size=200_000,
    # 800 optional properties are 3,200 items: what compiles must not fail at its first token.
    max_items_in_row=20_000,
    verbose_errors=False,
)  # fmt: skip


class _LLVocabulary:
    """The object that llguidance's tokenizer constructor reads."""

    def __init__(self, source: VocabularySource, vocab_size: int) -> None:
        known = min(source.vocab_size, vocab_size)
        pieces = [source.token_bytes(i) for i in range(known)]
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        # 0xFF never occurs in UTF-8, so that no text can match the name of a special token. Rows of
        # the embedding beyond the tokenizer get such a name too: they are never allowed.
        self.special_token_ids += range(known, vocab_size)
        names = (piece or b"\xff<%d>" % i for i, piece in enumerate(pieces))
        self.tokens = [*names, *(b"\xff<%d>" % i for i in range(known, vocab_size))]
        self.eos_token_id = source.eos_token_ids[0]
        self.bos_token_id = None
        self._encode = source.encode_as_text

    def __call__(self, text: str) -> list[int]:
        """Tokenise text that the grammar forces, as the model would have written it."""
        return self._encode(text)


class GuidedDecoder:
    """Compiles constraints for one vocabulary; thread-safe.

    Args:
        source: The tokenizer.
        vocab_size: Number of logits of the model, at least the tokenizer's size when the embedding
            is padded; None takes the tokenizer's.
    """

    def __init__(self, source: VocabularySource, vocab_size: int | None = None) -> None:
        size = source.vocab_size if vocab_size is None else vocab_size
        wrapper = llguidance.TokenizerWrapper(_LLVocabulary(source, size))
        self._tokenizer = llguidance.LLTokenizer(
            wrapper, n_vocab=size, eos_token=list(source.eos_token_ids)
        )
        self._source = source
        self._cache: OrderedDict[GuidedSpec, tuple[Grammar, int]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def compile(self, spec: GuidedSpec) -> Grammar:
        """Compile a constraint, or fetch it from the cache.

        Args:
            spec: The constraint.

        Returns:
            The grammar.

        Raises:
            RequestError: The constraint is malformed, unsupported (the message names the keyword)
                or over a bound.
        """
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
                return self._cache[spec][0]
        before = _resident_bytes()
        grammar = Grammar(self._build(spec), self._source, spec.start_after)
        size = max(_resident_bytes() - before, LEAST_BYTES)
        with self._lock:
            self._store(spec, grammar, size)
        return grammar

    def _store(self, spec: GuidedSpec, grammar: Grammar, size: int) -> None:
        if spec in self._cache:  # another thread compiled it meanwhile
            return
        self._cache[spec] = (grammar, size)
        self._cached_bytes += size
        while self._cached_bytes > CACHE_BYTES:
            _, (_, freed) = self._cache.popitem(last=False)
            self._cached_bytes -= freed

    def _build(self, spec: GuidedSpec) -> Any:
        text = grammar_text(spec)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        probe = matcher.deep_copy()
        mask = probe.compute_bitmask()  # some grammars prove empty only at the first step
        if probe.is_error():
            raise invalid(spec, short_reason(probe.get_error()))
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        allowed[list(self._source.eos_token_ids)] = 0
        if not allowed.any():
            raise invalid(spec, "it allows nothing but an empty output")
        probe.try_consume_tokens([int(allowed.argmax())])  # a text that is forced for ever
        if probe.is_error():
            raise invalid(spec, short_reason(probe.get_error()))
        return matcher


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


_decoders: dict[int, tuple[VocabularySource, GuidedDecoder]] = {}


def compile(  # the name is the seam's; the builtin is not used here
    spec: GuidedSpec, tokenizer: VocabularySource, vocab_size: int | None = None
) -> Grammar:
    """Compile `spec` with the decoder that belongs to `tokenizer` (made on first use).

    Args:
        spec: The constraint.
        tokenizer: The vocabulary.
        vocab_size: Number of logits of the model; None takes the tokenizer's.

    Returns:
        The compiled grammar.

    Raises:
        RequestError: See `GuidedDecoder.compile`.
    """
    entry = _decoders.get(id(tokenizer))
    if entry is None or entry[0] is not tokenizer:
        entry = (tokenizer, GuidedDecoder(tokenizer, vocab_size))
        _decoders[id(tokenizer)] = entry
    return entry[1].compile(spec)
