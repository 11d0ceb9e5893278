"""From a user's request to the engine's: tokens, resolved defaults, limits.

Shared by `LLM` and the HTTP server, so that both give the same answers and the same errors.
Defaults resolve as explicit value, then the model's generation_config.json, then built-in.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from fastdeploy_lite import envs
from fastdeploy_lite.config import GenerationDefaults, RuntimeConfig
from fastdeploy_lite.guided import compiler
from fastdeploy_lite.guided.spec import GuidedKind, GuidedSpec
from fastdeploy_lite.input.chat_template import (
    load_template_argument,
    render_chat,
)
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.request.messages import EngineRequest, EngineSampling
from fastdeploy_lite.request.params import GuidedDecodingParams, SamplingParams
from fastdeploy_lite.request.step import SamplerParams
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError, quote
from fastdeploy_lite.utils.logging import get_logger
from fastdeploy_lite.utils.request_log import content

BUILT_IN_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 0.7,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
# The sampler computes in float32: what a request may legally ask for must neither vanish nor
# overflow there, also after one factor has met the others.
PENALTY_RANGE = (2.0**-60, 2.0**60)
TEMPERATURE_RANGE = (1e-5, 1e10)
LARGEST_BIAS = 1e9
MAX_BAD_WORDS = 10_000  # each costs two tokenisations
_GUIDED_KINDS: Mapping[str, GuidedKind] = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}
THINK_START, THINK_END = "<think>", "</think>"
_log = get_logger("data_processor")


def load_tokenizer(config: RuntimeConfig) -> Ernie4_5Tokenizer:
    """The model's tokenizer, knowing every id that ends a sequence.

    Args:
        config: Of the engine.

    Returns:
        A tokenizer whose `eos_token_ids` are its own, then generation_config.json's, then
        config.json's if there is no other.

    Raises:
        CheckpointError: A file is missing or unreadable.
    """
    eos = GenerationDefaults.from_dir(config.model_path).eos_token_id
    folder = config.tokenizer_path or config.model_path
    tokenizer = Ernie4_5Tokenizer.from_pretrained(folder, eos_token_ids=eos)
    if not tokenizer.eos_token_ids:
        tokenizer.eos_token_ids = config.model.eos_token_id
    return tokenizer


class Preprocessor:
    """Turns `Request` into `EngineRequest`; thread-safe, blocking.

    Args:
        config: Of the engine.
        tokenizer: The model's; None loads it.
    """

    def __init__(self, config: RuntimeConfig, tokenizer: Ernie4_5Tokenizer | None = None) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
        self.generation = GenerationDefaults.from_dir(config.model_path)
        self.chat_template = load_template_argument(config.chat_template)
        self.max_model_len = config.scheduler.max_model_len
        self._longest_piece = max(map(len, self.tokenizer.get_vocab()))
        self._think_start = self._marker_id(THINK_START)
        self._think_end = self._marker_id(THINK_END)

    def process(self, request: Request) -> EngineRequest:
        """Check a request and turn it into tokens and numbers.

        Args:
            request: As the user stated it.

        Returns:
            What the engine takes.

        Raises:
            RequestError: The request is at fault; `param` and `code` say where and why.
        """
        prompt = self.prompt_token_ids(request)
        sampling = self._sampling(request, prompt)
        return EngineRequest(
            request_id=request.request_id,
            prompt_token_ids=prompt,
            sampling=sampling,
            arrival_time=request.arrival_time,
            preprocess_end_time=time.time(),
            include_stop_str_in_output=request.include_stop_str_in_output,
        )

    # Prompt --------------------------------------------------------------------------------------

    def prompt_token_ids(self, request: Request) -> list[int]:
        """The prompt's tokens, the start of the answer included.

        Raises:
            RequestError: There is none, or an id is not in the vocabulary.
        """
        ids, param = self._prompt(request)
        ids = ids + self._checked_ids(request.completion_token_ids or (), "completion_token_ids")
        if not ids:
            raise RequestError(
                "The prompt is empty: at least one token is needed",
                param=param,
                code="invalid_value",
            )
        return ids

    def _prompt(self, request: Request) -> tuple[list[int], str]:
        if request.prompt_token_ids is not None:
            return self._checked_prompt(request.prompt_token_ids, "prompt_token_ids"), "prompt"
        if request.prompt is not None:
            return self._encode(request.prompt, "prompt"), "prompt"
        messages = request.messages
        if not messages:
            raise RequestError(
                "messages can not be an empty list, unless prompt_token_ids is passed",
                param="messages",
                code="invalid_value",
            )
        if all(isinstance(m, int) for m in messages):
            return self._checked_prompt(messages, "messages"), "messages"
        contents = (m.get("content") for m in messages if isinstance(m, Mapping))
        self._check_length(sum(len(c) for c in contents if isinstance(c, str)), "messages")
        return self._encode(self.render(request), "messages"), "messages"

    def render(self, request: Request) -> str:
        """The text of a request's conversation.

        Raises:
            RequestError: Messages or template cannot be used.
        """
        messages = request.messages or ()
        if request.disable_chat_template:
            return render_chat(
                messages[:1], template="{{ messages[0].content }}", special_tokens={}
            )
        own = request.chat_template
        template = own or self.chat_template or self.tokenizer.chat_template
        kwargs = request.chat_template_kwargs
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise RequestError(
                "Invalid input: chat_template_kwargs must be a dict",
                param="chat_template_kwargs",
                code="invalid_value",
            )
        return render_chat(
            messages,
            template=template,
            special_tokens=self.tokenizer.special_tokens_map,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            variables=kwargs,
            trusted=own is None or request.trusted_template,
        )

    def _encode(self, text: str, param: str) -> list[int]:
        self._check_length(len(text), param)
        return self._within_vocabulary(self.tokenizer.encode_text(text), param)

    def _check_length(self, characters: int, param: str) -> None:
        """Refuse a text that cannot fit before work goes into it: no token covers more than the
        longest piece."""
        least = characters // self._longest_piece
        if least >= self.max_model_len:
            raise self._too_long(f"at least {least}", 0, param)

    def _checked_prompt(self, ids: Sequence[Any], param: str) -> list[int]:
        """Ids of a prompt; a list that cannot fit is refused before anybody walks it."""
        if len(ids) >= self.max_model_len:
            raise self._too_long(len(ids), 0, param)
        return self._checked_ids(ids, param)

    def _checked_ids(self, ids: Iterable[Any], param: str) -> list[int]:
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for value in values:
            if type(value) is not int:
                raise RequestError(
                    f"{param}: expected token ids (integers), found {quote(value)}",
                    param=param,
                    code="invalid_value",
                )
        return self._within_vocabulary(values, param)

    def _within_vocabulary(self, ids: list[int], param: str) -> list[int]:
        """A tokenizer may know more pieces than the model has rows for."""
        size = self.config.model.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < size):
            bad = next(i for i in ids if not 0 <= i < size)
            raise RequestError(
                f"{param}: token id {bad} is outside the model's vocabulary of {size}",
                param=param,
                code="invalid_value",
            )
        return ids

    def _too_long(self, length: object, min_tokens: int, param: str) -> RequestError:
        return RequestError(
            f"Input text is too long, input_ids_len ({length}) + min_tokens ({min_tokens}) >= "
            f"max_model_len ({self.max_model_len})",
            param=param,
            code="context_length_exceeded",
        )

    # Sampling ------------------------------------------------------------------------------------

    def _sampling(self, request: Request, prompt: list[int]) -> EngineSampling:
        params = request.sampling_params
        room = self.max_model_len - len(prompt)
        if params.min_tokens >= room:
            param = "messages" if request.messages else "prompt"
            raise self._too_long(len(prompt), params.min_tokens, param)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        thinking = self._is_thinking(request, prompt)
        arguments = dict(params.logits_processors_args or {})
        budget, truncation = self._thinking_budget(params, arguments, max_tokens)
        return EngineSampling(
            sampler=self._sampler(params, arguments),
            max_tokens=max_tokens,
            eos_token_ids=self.tokenizer.eos_token_ids,
            min_tokens=params.min_tokens,
            stop=self._stop_texts(params.stop),
            stop_token_seqs=self._stop_sequences(params),
            guided=self._guided(params.guided_decoding, thinking),
            thinking=thinking,
            think_start_id=self._think_start,
            think_end_id=self._think_end,
            think_truncate_ids=truncation,
            reasoning_max_tokens=budget,
            response_max_tokens=params.response_max_tokens,
            logits_processors_args=self._processor_arguments(arguments),
        )

    def _sampler(self, params: SamplingParams, arguments: dict[str, Any]) -> SamplerParams:
        resolved = {name: self._resolve(params, name) for name in BUILT_IN_DEFAULTS}
        resolved["repetition_penalty"] = _clamp(resolved["repetition_penalty"], *PENALTY_RANGE)
        if resolved["temperature"] > 0.0:
            resolved["temperature"] = _clamp(resolved["temperature"], *TEMPERATURE_RANGE)
        assert params.seed is not None  # drawn by SamplingParams
        return SamplerParams(
            **resolved,
            top_k=max(int(params.top_k), 0),
            min_p=float(params.min_p),
            seed=int(params.seed),
            logit_bias=self._logit_bias(arguments.pop("logit_bias", None)),
            banned_ids=self._banned_ids(params),
            logprobs=self._logprobs(params.logprobs, "logprobs"),
            prompt_logprobs=self._logprobs(params.prompt_logprobs, "prompt_logprobs"),
            temp_scaled_logprobs=params.temp_scaled_logprobs,
            top_p_normalized_logprobs=params.top_p_normalized_logprobs,
        )

    def _resolve(self, params: SamplingParams, name: str) -> float:
        candidates = (getattr(params, name), getattr(self.generation, name))
        given = (float(value) for value in candidates if value is not None)
        return next(given, BUILT_IN_DEFAULTS[name])

    def _logprobs(self, count: int | None, param: str) -> int | None:
        if count is None:
            return None
        if not self.config.enable_logprob:
            raise RequestError(
                "Logprobs is disabled, please enable it in startup config.",
                param="logprobs",
                code="invalid_value",
            )
        most = self.config.max_logprobs
        if most != -1 and (count == -1 or count > most):
            raise RequestError(
                f"Number of {param} requested ({count}) exceeds the maximum allowed value ({most})",
                param=param,
                code="invalid_value",
            )
        return min(count, self.config.model.vocab_size)

    def _logit_bias(self, bias: Mapping[Any, Any] | None) -> dict[int, float] | None:
        if not bias:
            return None
        values = {int(token_id): float(value) for token_id, value in bias.items()}
        self._within_vocabulary(list(values), "logit_bias")
        if any(map(math.isnan, values.values())):
            raise RequestError("logit_bias: NaN", param="logit_bias", code="invalid_value")
        return {
            i: value if value == -math.inf else _clamp(value, -LARGEST_BIAS, LARGEST_BIAS)
            for i, value in values.items()
        }

    def _banned_ids(self, params: SamplingParams) -> tuple[int, ...]:
        ids = self._checked_ids(params.bad_words_token_ids or (), "bad_words_token_ids")
        words = params.bad_words or ()
        if len(words) > MAX_BAD_WORDS:
            raise RequestError(
                f"bad_words: found {len(words)} words, the limit is {MAX_BAD_WORDS}",
                param="bad_words",
                code="invalid_value",
            )
        skipped = []
        for word in words:
            single = self._single_tokens(word.lstrip())
            ids += single
            if not single:
                skipped.append(word)
        if skipped:
            _log.warning("bad_words: %d of %d words are not one token and skipped: %s",
                         len(skipped), len(words), content(skipped[:10]))  # fmt: skip
        return tuple(dict.fromkeys(ids))

    def _single_tokens(self, word: str) -> list[int]:
        """The ids that a word is written with, at the start and after a space."""
        if not 0 < len(word) <= self._longest_piece:
            return []
        encoded = (self.tokenizer.encode_text(form) for form in (word, f" {word}"))
        return self._within_vocabulary([ids[0] for ids in encoded if len(ids) == 1], "bad_words")

    # Stops ---------------------------------------------------------------------------------------

    @staticmethod
    def _stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
        texts = [stop] if isinstance(stop, str) else stop or ()
        return tuple(dict.fromkeys(filter(None, texts)))

    def _stop_sequences(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        texts = self._stop_texts(params.stop)
        most, longest = envs.FD_MAX_STOP_SEQS_NUM, envs.FD_STOP_SEQS_MAX_LEN
        if len(texts) > most:
            raise _stop_limit(f"Length of stop ({len(texts)})", "max_stop_seqs_num", most)
        for text in texts:
            if (least := len(text) // self._longest_piece) > longest:  # known without tokenising
                raise _stop_limit(
                    f"Length of stop_seqs (at least {least})", "stop_seqs_max_len", longest
                )
        sequences = [tuple(self.tokenizer.encode_text(text)) for text in texts]
        for sequence in sequences:
            if len(sequence) > longest:
                raise _stop_limit(
                    f"Length of stop_seqs ({len(sequence)})", "stop_seqs_max_len", longest
                )
        singles = self._checked_ids(params.stop_token_ids or (), "stop_token_ids")
        return tuple(dict.fromkeys([*sequences, *((i,) for i in singles)]))

    # Thinking, guidance, processors --------------------------------------------------------------

    def _marker_id(self, text: str) -> int:
        token_id = self.tokenizer.token_id(text)
        return -1 if token_id is None else token_id

    def _is_thinking(self, request: Request, prompt: Sequence[int]) -> bool:
        """Whether the answer starts inside the thinking: the prompt opened it and did not close."""
        if self._think_end < 0:
            return False
        if request.thinking is not None:
            return request.thinking
        for token_id in reversed(prompt):
            if token_id in (self._think_start, self._think_end):
                return token_id == self._think_start
        return False

    def _thinking_budget(
        self, params: SamplingParams, arguments: dict[str, Any], max_tokens: int
    ) -> tuple[int | None, tuple[int, ...]]:
        """The budget and what is forced when it is spent."""
        budget = params.reasoning_max_tokens
        sentence = arguments.pop("think_stop_sentence", "")
        other = arguments.pop("thinking_budget", None)
        if budget is None and isinstance(other, int) and other >= 0:
            budget = other
        if budget is None or self._think_end < 0:
            return None, ()
        text = f"{sentence}{envs.FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR}"
        ids = self.tokenizer.encode_text(text)
        if self._think_end not in ids:  # or thinking would never end
            ids.append(self._think_end)
        if budget > max_tokens:
            _log.warning("reasoning_max_tokens %d lowered to max_tokens %d", budget, max_tokens)
        return min(budget, max_tokens), tuple(ids)

    def _guided(
        self, guided: GuidedDecodingParams | Mapping[str, Any] | None, thinking: bool
    ) -> GuidedSpec | None:
        if isinstance(guided, Mapping):
            guided = GuidedDecodingParams(**guided)
        spec = None if guided is None else self._guided_spec(guided, thinking)
        if spec is None:
            return None
        if self.config.guided_decoding_backend == "off":
            raise RequestError(
                "Structured output is off: start with --guided-decoding-backend auto",
                param="guided_decoding",
                code="invalid_value",
            )
        self._check_compiles(spec, None if guided is None else guided.source)
        return spec

    def _check_compiles(self, spec: GuidedSpec, source: str | None) -> None:
        """Refuse a bad constraint before the engine sees it; `source` is the field to blame."""
        try:
            compiler.compile(spec, self.tokenizer, self.config.model.vocab_size)
        except RequestError as error:
            param = source or error.param
            raise RequestError(str(error), param=param, code=error.code) from None

    def _guided_spec(self, guided: GuidedDecodingParams, thinking: bool) -> GuidedSpec | None:
        start_after = THINK_END if thinking else None
        for name, kind in _GUIDED_KINDS.items():
            value = getattr(guided, name)
            if value is not None and value is not False:
                text = "" if value is True else _json_text(value)
                return GuidedSpec(kind, text, self.config.guided_any_whitespace, start_after)
        return None

    def _processor_arguments(self, arguments: dict[str, Any]) -> bytes:
        if not arguments or not self.config.logits_processors:
            return b""
        try:
            return msgspec.msgpack.encode(arguments)
        except TypeError as error:
            raise RequestError(
                f"logits_processors_args: only plain values can be passed: {error}",
                param="logits_processors_args",
                code="invalid_value",
            ) from None


def _stop_limit(what: str, name: str, limit: int) -> RequestError:
    return RequestError(
        f"{what} exceeds the limit {name} ({limit}). Please reduce it or raise the limit with the "
        f"environment variable FD_{name.upper()}",
        param="stop",
        code="invalid_value",
    )


def _clamp(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
