"""What a user may ask of sampling: upstream's classes, their ranges and their messages."""

from __future__ import annotations

import numbers
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.utils.errors import quote

# Ranges, inclusive: bodies of requests are held to the same ones.
MAX_SEED = 922337203685477580
MAX_LOGPROBS = 20
PENALTIES = (-2.0, 2.0)
SHARES = (0.0, 1.0)  # of probability: top_p, min_p
LEAST_TOP_K = -1
# Each entry is looked at in every step.
MAX_LOGIT_BIAS = 4096
MAX_TOKEN_IDS = 10_000
# What `from_optional` puts in place of None; other fields keep their own default.
_OPTIONAL_DEFAULTS: Mapping[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "max_tokens": 8192,
}


class RequestOutputKind(Enum):
    """Which part of the output each message carries."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """Sampling parameters of one request.

    None means "not given": the value then comes from the model's generation_config.json, else from
    the built-in default (top_p 0.7, temperature 1.0, no penalties).

    Attributes:
        n: Answers per prompt; expanded by the HTTP server only.
        best_of: Accepted and unused, as upstream.
        presence_penalty, frequency_penalty: In [-2, 2]; on output tokens.
        repetition_penalty: Above 0; on prompt and output tokens.
        temperature: At least 0; 0 is greedy.
        top_p: In [0, 1]; 0 is greedy.
        top_k: Candidates kept; 0 or -1 keeps all.
        min_p: In [0, 1]; drops tokens below `min_p` times the best probability.
        seed: Of the request's random stream; None draws one for this object.
        stop: Text that ends generation.
        stop_token_ids: Tokens that end generation.
        stop_seqs_len: Filled by upstream's processor; accepted and unused.
        max_tokens: Tokens to generate; None takes the room that is left.
        reasoning_max_tokens: Tokens of thinking after which the end of thinking is forced.
        min_tokens: Tokens before which the sequence cannot end.
        logprobs: Alternatives to report per token; -1 reports the vocabulary.
        prompt_logprobs: The same for the prompt's tokens.
        temp_scaled_logprobs: Raw log-probabilities are taken after dividing by the temperature.
        top_p_normalized_logprobs: They are renormalised over the nucleus.
        bad_words: Words of one token that are never generated.
        guided_decoding: Constraint on the output.
        bad_words_token_ids: Tokens that are never generated.
        logits_processors_args: Arguments for logits processors; `logit_bias` maps token ids to an
            additive bias.
        response_max_tokens: Tokens after the end of thinking.
        ignore_eos: EOS is not chosen before the length limit or a stop.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_seqs_len: int | None = None
    max_tokens: int | None = None
    reasoning_max_tokens: int | None = None
    min_tokens: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    temp_scaled_logprobs: bool = False
    top_p_normalized_logprobs: bool = False
    bad_words: list[str] | None = None
    guided_decoding: GuidedDecodingParams | None = None
    bad_words_token_ids: list[int] | None = None
    logits_processors_args: dict[str, Any] | None = None
    response_max_tokens: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self.check()
        if self.seed is None:
            self.seed = random.randint(0, MAX_SEED)

    def check(self) -> None:
        """Verify ranges and types; for an object whose fields were changed after construction.

        Raises:
            ValueError: A value is out of its range.
            TypeError: A value is of another type.
        """
        self._check_counts()
        self._check_numbers()
        self._check_lengths()
        self._check_logprobs()
        self._check_lists()
        self._check_logit_bias()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Take the fields that `values` has; missing ones keep their default."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """As the constructor, but None means 0.0 penalties, 1.0 repetition and temperature, and
        8192 `max_tokens`."""
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**{**_OPTIONAL_DEFAULTS, **given})

    def _check_counts(self) -> None:
        if not _is_int(self.n):
            raise ValueError(f"n must be an int, but is of type {type(self.n)}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {quote(self.n)}.")
        if not _is_int(self.top_k):
            raise TypeError(f"top_k must be an integer, got {type(self.top_k).__name__}")
        if self.top_k < LEAST_TOP_K:
            raise ValueError(
                f"top_k must be 0 or -1 (disable), or at least 1, got {quote(self.top_k)}."
            )
        if self.seed is not None:
            _require_int("seed", self.seed)
            if not 0 <= self.seed <= MAX_SEED:
                raise ValueError(f"seed must be in [0, {MAX_SEED}], got {quote(self.seed)}.")

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not _in_range(name, getattr(self, name), *PENALTIES):
                raise ValueError(f"{name} must be in [-2, 2], got {getattr(self, name)}.")
        # Comparisons are written so that NaN fails them.
        value = _number("repetition_penalty", self.repetition_penalty, 1.0)
        if not 0.0 < value < float("inf"):
            raise ValueError(f"repetition_penalty must be greater than zero, got {value}.")
        value = _number("temperature", self.temperature, 1.0)
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"temperature must be non-negative, got {value}.")
        if not _in_range("top_p", self.top_p, *SHARES):
            raise ValueError(f"top_p must be in [0, 1], got {self.top_p}.")
        if not _in_range("min_p", self.min_p, *SHARES):
            raise ValueError(f"min_p must be in [0,1], got {self.min_p}.")

    def _check_lengths(self) -> None:
        for name in ("max_tokens", "reasoning_max_tokens", "response_max_tokens"):
            value = getattr(self, name)
            if value is not None and _require_int(name, value) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if _require_int("min_tokens", self.min_tokens) < 0:
            raise ValueError(
                f"min_tokens must be greater than or equal to 0, got {self.min_tokens}."
            )
        if self.max_tokens is None:
            return
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, "
                f"got {self.min_tokens}."
            )
        if self.reasoning_max_tokens is not None and self.reasoning_max_tokens > self.max_tokens:
            raise ValueError(
                f"reasoning_max_tokens must be less than max_tokens, "
                f"got {self.reasoning_max_tokens}."
            )

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and _require_int(name, value) < -1:
                raise ValueError(f"{name} must be a non-negative value or -1, got {value}.")
        if (self.logprobs or 0) > MAX_LOGPROBS and not envs.FD_USE_GET_SAVE_OUTPUT_V1:
            raise ValueError(
                f"Invalid value for 'top_logprobs': must be less than or equal to {MAX_LOGPROBS}."
            )

    def _check_lists(self) -> None:
        if not isinstance(self.stop, str):
            _require_list("stop", self.stop, str, "text or a list of texts")
        _require_list("bad_words", self.bad_words, str, "a list of words")
        for name in ("stop_token_ids", "bad_words_token_ids"):
            ids = getattr(self, name)
            _require_list(name, ids, numbers.Integral, "a list of token ids")
            if ids is not None and len(ids) > MAX_TOKEN_IDS:
                raise ValueError(f"{name} must have at most {MAX_TOKEN_IDS} ids, got {len(ids)}.")
        constraint, arguments = self.guided_decoding, self.logits_processors_args
        if not isinstance(constraint, GuidedDecodingParams | Mapping | None):
            raise TypeError(
                f"guided_decoding must be GuidedDecodingParams, got {type(constraint).__name__}"
            )
        if not isinstance(arguments, Mapping | None):
            raise TypeError(
                f"logits_processors_args must be a dict, got {type(arguments).__name__}"
            )

    def _check_logit_bias(self) -> None:
        bias = (self.logits_processors_args or {}).get("logit_bias")
        if bias is None:
            return
        if not isinstance(bias, dict):
            raise TypeError(f"logit_bias must be a dict, but got {type(bias)}")
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(bias)}."
            )
        for token_id, value in bias.items():
            if not _is_bias(token_id, value):
                raise TypeError(
                    "logit_bias must be a dict of token id (int) to bias (float), found "
                    f"{quote(token_id)}: {quote(value)}"
                )


# A constraint that stands for a demanded tool call, not for one that the client wrote.
TOOL_CHOICE = "tool_choice"


@dataclass
class GuidedDecodingParams:
    """A constraint on the output; at most one field may be set.

    Attributes:
        json: JSON schema, as text, an object, or a bool.
        regex: Regular expression that the whole output matches.
        choice: Texts of which the output is one.
        grammar: EBNF or Lark grammar.
        json_object: Any JSON object.
        structural_tag: JSON text describing tags whose content follows schemas.
        source: Field of the HTTP request that held it, for errors; None is that of its kind.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    source: str | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) > 1:
            raise ValueError(
                "You can only use one kind of guided decoding "
                f"('json', 'json_object', 'regex', 'choice', 'grammar', 'structural_tag'), "
                f"but {len(given)} are set: {', '.join(given)}."
            )

    def given(self) -> list[str]:
        """Names of the fields that hold a constraint; only `json_object` is a switch, while false
        and {} are JSON schemas and "" is a regular expression."""
        kinds = (f.name for f in fields(self) if f.name != "source")
        values = {name: getattr(self, name) for name in kinds}
        return [
            name
            for name, value in values.items()
            if value is not None and not (name == "json_object" and value is False)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The request fields of the HTTP interface that say the same."""
        names = {
            "json": "guided_json",
            "regex": "guided_regex",
            "choice": "guided_choice",
            "grammar": "guided_grammar",
            "structural_tag": "structural_tag",
            "json_object": "guided_json_object",
        }
        return {names[name]: getattr(self, name) for name in self.given()}


@dataclass
class BeamSearchParams:
    """Beam search parameters; beam search is not implemented, as upstream.

    Attributes:
        beam_width: Beams.
        max_tokens: Tokens per beam.
        ignore_eos: Whether EOS ends a beam.
        temperature: Of the scores.
        length_penalty: Exponent of the length in a beam's score.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _require_int(name: str, value: Any) -> int:
    if not _is_int(value):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return int(value)


def _require_list(name: str, value: Any, kind: type, expected: str) -> None:
    """Refuse what is neither None nor a collection of `kind`, a bare text above all: its letters
    would be taken for the items."""
    if value is None:
        return
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    for item in value:  # None among them is an item, too
        if not isinstance(item, kind):
            found = type(item).__name__
            raise TypeError(f"{name} must be {expected}, found an item of type {found}")


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {quote(value)}.") from None


def _is_bias(token_id: Any, value: Any) -> bool:
    """Whether an entry of `logit_bias` is an id, maybe as JSON's text, and a number."""
    if isinstance(value, bool) or isinstance(token_id, bool | float):
        return False
    try:
        int(token_id), float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _in_range(name: str, value: Any, low: float, high: float) -> bool:
    return low <= _number(name, value, low) <= high
