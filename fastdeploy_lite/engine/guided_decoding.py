"""Structured output: a specification from a request becomes a mask over the next token.

`llguidance` does the parsing.  This module chooses its grammar for each kind of constraint, bridges
the SentencePiece vocabulary (byte pieces, the word-boundary mark, tokens that are not text), bounds
size and time, caches compiled grammars and delays the constraint until the model stops thinking.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import llguidance
import msgspec
import numpy as np
from numpy.typing import NDArray

from fastdeploy_lite.utils.errors import RequestError

GuidedKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "structural_tag"]
Bitmask = NDArray[np.int32]

# Bounds: a schema of a real application is a few KiB; ours must compile in well under a second.
MAX_SPEC_BYTES = 65536
MAX_CHOICES = 4096
MAX_NESTING = 64
CACHE_ENTRIES = 128
# A blank, or a line break and its indentation: every usual layout.  A small model left alone with
# free JSON whitespace emits nothing else until its length limit.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,32}"

_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=2_000_000, max_lexer_states=50_000, max_grammar_size=200_000,
    verbose_errors=False,
)  # fmt: skip


class GuidedSpec(msgspec.Struct, frozen=True):
    """One constraint, as it travels from the front end to the engine.

    Attributes:
        kind: What `value` is.
        value: JSON text (`json_schema`, `choice` as a list of strings, `structural_tag`), a regular
            expression, or a Lark/EBNF grammar; empty for `json_object`.
        any_whitespace: Whether JSON may be laid out freely; otherwise `", "` and `": "` separate.
        start_after: Text after which the constraint starts (`</think>`), or None for at once.
    """

    kind: GuidedKind
    value: str = ""
    any_whitespace: bool = True
    start_after: str | None = None


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

    def encode_text(self, text: str) -> list[int]:
        """The canonical tokenisation of plain text, without BOS."""


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
        self._encode = source.encode_text

    def __call__(self, text: str) -> list[int]:
        """Tokenise text that the grammar forces, as the model would have written it."""
        return self._encode(text)


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
        """
        if not self.is_active:
            self._wait_for_marker(token_id)
            return True
        if self._matcher.is_stopped():
            return token_id in self._eos_token_ids
        return int(self._matcher.try_consume_tokens([token_id])) == 1

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
            reason = _reason(self._matcher.get_error())
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
        self._cache: OrderedDict[GuidedSpec, Grammar] = OrderedDict()
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
                return self._cache[spec]
        grammar = Grammar(self._build(spec), self._source, spec.start_after)
        with self._lock:
            self._cache[spec] = grammar
            while len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return grammar

    def _build(self, spec: GuidedSpec) -> Any:
        text = grammar_text(spec)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        probe = matcher.deep_copy()
        mask = probe.compute_bitmask()  # some grammars prove empty only at the first step
        if probe.is_error():
            raise _error(spec, _reason(probe.get_error()))
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        allowed[list(self._source.eos_token_ids)] = 0
        if not allowed.any():
            raise _error(spec, "it allows nothing but an empty output")
        return matcher


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


# Specification -> llguidance grammar -------------------------------------------------------------


def grammar_text(spec: GuidedSpec) -> str:
    """Translate a constraint into llguidance's own form.

    Args:
        spec: The constraint.

    Returns:
        llguidance grammar text.

    Raises:
        RequestError: The constraint is malformed or over a bound.
    """
    size = len(spec.value.encode())
    if size > MAX_SPEC_BYTES:
        raise _error(spec, f"it has {size} bytes, the limit is {MAX_SPEC_BYTES}")
    try:
        return _TRANSLATORS[spec.kind](spec)
    except RequestError:
        raise
    except RecursionError:
        raise _error(spec, "it is nested too deeply") from None
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        raise _error(spec, _reason(str(error))) from None


def _reason(message: str) -> str:
    """The library's error as one short line."""
    if message.startswith("NoExtension"):
        return "nothing satisfies it"
    # A regex error shows the pattern and, last, what is wrong with it.
    cause = re.findall(r"^error: (.*)$", message, re.MULTILINE)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = cause[-1] if cause else (lines[0] if lines else "not supported")
    return re.sub(r"^at \d+\(\d+\): ", "", text)[:300]


def _error(spec: GuidedSpec, reason: str) -> RequestError:
    return RequestError(
        f"Invalid {spec.kind} for guided decoding: {reason}",
        param=_PARAMS[spec.kind],
        code="invalid_value",
    )


_PARAMS: Mapping[str, str] = {
    "json_schema": "guided_json",
    "json_object": "response_format",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
    "structural_tag": "structural_tag",
}


def _json_grammar(schema: Any, any_whitespace: bool) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is a JSON object, found {type(schema).__name__}")
    check_nesting(schema)
    layout = _layout(any_whitespace)
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=layout))


def _layout(any_whitespace: bool) -> Any:
    """llguidance's options for where JSON may hold whitespace."""
    if any_whitespace:
        return {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def check_nesting(value: Any) -> None:
    """Refuse JSON nested beyond `MAX_NESTING`, which costs compilers stack.

    Args:
        value: Parsed JSON.

    Raises:
        ValueError: It is nested too deeply.
    """
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")


def _json_schema(spec: GuidedSpec) -> str:
    return _json_grammar(json.loads(spec.value), spec.any_whitespace)


def _json_object(spec: GuidedSpec) -> str:
    return _json_grammar({"type": "object"}, spec.any_whitespace)


def _regex(spec: GuidedSpec) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(strip_anchors(spec.value)))


def strip_anchors(pattern: str) -> str:
    r"""Remove the anchors that say what a full match says anyway.

    `^`, `\A` count at the start of an alternative and `$`, `\Z`, `\z` at its end, at top level or
    in groups that stand there themselves.  Others stay, for the compiler to refuse.

    Args:
        pattern: A regular expression.

    Returns:
        The pattern without redundant anchors.
    """
    tokens = re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[^:)(]*:|.", pattern, re.DOTALL)
    forward = _drop_edge(tokens, {"^", r"\A"}, opens="(", closes=")")
    backward = _drop_edge(forward[::-1], {"$", r"\Z", r"\z"}, opens=")", closes="(")
    return "".join(backward[::-1])


def _drop_edge(tokens: list[str], anchors: set[str], opens: str, closes: str) -> list[str]:
    """Drop anchors at the leading edge of every alternative; groups are followed by a stack."""
    kept: list[str] = []
    edge, stack = True, [True]
    for token in tokens:
        kind = token[0] if token[0] == "(" else token
        if edge and token in anchors:
            continue
        kept.append(token)
        if kind == opens:
            stack.append(edge)
        elif kind == closes:
            edge = False
            if len(stack) > 1:
                stack.pop()
        elif token == "|":
            edge = stack[-1]
        else:
            edge = False
    return kept


def _choice(spec: GuidedSpec) -> str:
    choices = json.loads(spec.value)
    if not isinstance(choices, list) or not choices:
        raise ValueError("a non-empty list of strings is expected")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"it has {len(choices)} entries, the limit is {MAX_CHOICES}")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("every choice must be a non-empty string")
    alternatives = " | ".join(json.dumps(c, ensure_ascii=False) for c in dict.fromkeys(choices))
    return str(llguidance.LLMatcher.grammar_from_lark("start: " + alternatives))


def _grammar(spec: GuidedSpec) -> str:
    depth = deepest = 0
    for character in spec.value:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
    return str(llguidance.grammar_from("grammar", spec.value))


def _structural_tag(spec: GuidedSpec) -> str:
    """Free text in which each trigger opens a tag whose content follows a schema."""
    value = json.loads(spec.value)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, found {type(value).__name__}")
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise ValueError("'structures' must be a non-empty list")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise ValueError("'triggers' must be a list of non-empty strings")
    check_nesting(structures)
    layout = _layout(spec.any_whitespace)
    tags = [_tag(structure, triggers, layout) for structure in structures]
    return str(llguidance.StructTag.to_grammar(tags, assume_special=False))


def _tag(structure: Any, triggers: list[str], layout: Any) -> Any:
    if not isinstance(structure, dict) or not isinstance(structure.get("begin"), str):
        raise ValueError("every structure needs the text 'begin'")
    begin, end = structure["begin"], structure.get("end", "")
    trigger = next((t for t in triggers if begin.startswith(t)), None)
    if trigger is None:
        raise ValueError(f"no trigger is a prefix of begin {begin!r}")
    if not isinstance(end, str):
        raise ValueError("'end' must be text")
    schema = structure.get("schema", {})
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": layout}
    return llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=end)


_TRANSLATORS: Mapping[str, Callable[[GuidedSpec], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
