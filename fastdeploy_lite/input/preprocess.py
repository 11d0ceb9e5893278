"""From a user's request to the engine's: tokens, resolved defaults, limits.

Shared by `LLM` and the HTTP server, so that both give the same answers and the same errors.
Defaults resolve as explicit value, then the model's generation_config.json, then built-in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from fastdeploy_lite import envs
from fastdeploy_lite.config import GenerationDefaults, RuntimeConfig
from fastdeploy_lite.guided import compiler
from fastdeploy_lite.guided.spec import GuidedKind, GuidedSpec
from fastdeploy_lite.guided.trial import ConstraintTrial, Vocabulary
from fastdeploy_lite.input.chat_template import (
    load_template_argument,
    render_chat,
)
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.input.template_rendering import TemplateError, check
from fastdeploy_lite.input.thinking import THINK_END, ThinkingMarkers
from fastdeploy_lite.request.messages import EngineRequest, EngineSampling
from fastdeploy_lite.request.params import (
    MAX_SEED,
    TOOL_CHOICE,
    GuidedDecodingParams,
    SamplingParams,
)
from fastdeploy_lite.request.step import SamplerParams
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import ConfigError, RequestError, quote
from fastdeploy_lite.utils.logging import get_logger
from fastdeploy_lite.utils.request_log import content
from fastdeploy_lite.utils.text import is_encodable

BUILT_IN_DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 0.7,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
_RESOLVED = {"top_k", "seed", "logprobs", "prompt_logprobs"}  # here, from what else is known
_TAKEN_OVER: Mapping[str, Callable[[Any], Any]] = {
    field.name: type(field.default)
    for field in dataclasses.fields(SamplerParams)
    if field.name in {other.name for other in dataclasses.fields(SamplingParams)}
    and field.name not in {*_RESOLVED, *BUILT_IN_DEFAULTS}
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
BIAS_PROCESSOR = "LogitBiasLogitsProcessor"
_UNPACKABLE = (TypeError, ValueError, OverflowError, RecursionError)
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
        _warn_of_unused(self.generation)
        self.chat_template = load_template_argument(config.chat_template)
        if self.chat_template is None:
            _warn_of_broken(self.tokenizer.chat_template)
        self.max_model_len = config.scheduler.max_model_len
        self._warned_of_tools = False
        self._longest_piece = max(map(len, self.tokenizer.get_vocab()))
        # Own processors take over from the built-in ones that are not named beside them.
        processors = config.logits_processors
        self._biases = not processors or any(p.endswith(BIAS_PROCESSOR) for p in processors)
        self._trial: ConstraintTrial | None = None
        self._thinking = ThinkingMarkers(self.tokenizer)

    def try_constraints_apart(self) -> None:
        """From now on check constraints in a process with limits: they come from the network."""
        vocabulary = Vocabulary.of(self.tokenizer, self.config.model.vocab_size)
        self._trial = ConstraintTrial(vocabulary)

    def close(self) -> None:
        """End the helper process, when there is one."""
        if self._trial is not None:
            self._trial.close()

    def process(self, request: Request) -> EngineRequest:
        """Check a request and turn it into tokens and numbers.

        Args:
            request: As the user stated it.

        Returns:
            What the engine takes.

        Raises:
            RequestError: The request is at fault; `param` and `code` say where and why.
        """
        _check_params(request.sampling_params)
        prompt = self._prompt(request)
        thinking = prompt.thinking if request.thinking is None else request.thinking
        if thinking is None:
            thinking = request.thinking_switch
        return EngineRequest(
            request_id=encodable(request.request_id, "request_id"),
            prompt_token_ids=prompt.token_ids,
            sampling=self._sampling(request, prompt.token_ids, thinking),
            arrival_time=request.arrival_time,
            preprocess_end_time=time.time(),
            include_stop_str_in_output=request.include_stop_str_in_output,
            thinking=thinking,
        )

    # Prompt --------------------------------------------------------------------------------------

    def prompt_token_ids(self, request: Request) -> list[int]:
        """The prompt's tokens, the start of the answer included.

        Raises:
            RequestError: There is none, or an id is not in the vocabulary.
        """
        return self._prompt(request).token_ids

    def text_of(self, token_ids: list[int], param: str) -> str:
        """The text of tokens.

        Args:
            token_ids: From a request.
            param: The field that holds them.

        Raises:
            RequestError: An id is not in the vocabulary; it would show no text.
        """
        return self.tokenizer.decode(self._within_vocabulary(token_ids, param))

    def _prompt(self, request: Request) -> _Prompt:
        start = self._checked_ids(request.completion_token_ids or (), "completion_token_ids")
        prompt, param = self._stated_prompt(request)
        ids = prompt.token_ids + start
        if not ids:
            raise RequestError(
                "The prompt is empty: at least one token is needed",
                param=param,
                code="invalid_value",
            )
        answered = self._thinking.last_marker(start)
        return _Prompt(ids, prompt.thinking if answered is None else answered)

    def _stated_prompt(self, request: Request) -> tuple[_Prompt, str]:
        """The prompt without the start of the answer, and the field that states it."""
        if request.prompt_token_ids is not None:
            return self._raw(
                self._checked_prompt(request.prompt_token_ids, "prompt_token_ids")
            ), "prompt"
        if request.prompt is not None:
            return self._raw(self._encode(request.prompt, "prompt")), "prompt"
        messages = request.messages
        if not messages:
            raise RequestError(
                "messages can not be an empty list, unless prompt_token_ids is passed",
                param="messages",
                code="invalid_value",
            )
        if all(isinstance(m, int) for m in messages):
            return self._raw(self._checked_prompt(messages, "messages")), "messages"
        contents = (m.get("content") for m in messages if isinstance(m, Mapping))
        self._check_length(sum(len(c) for c in contents if isinstance(c, str)), "messages")
        text = self.render(request)
        return _Prompt(self._encode(text, "messages"), self._opening(request, text)), "messages"

    def _raw(self, ids: list[int]) -> _Prompt:
        return _Prompt(ids, self._thinking.at_end(ids))

    def _opening(self, request: Request, text: str) -> bool | None:
        """What the generation prompt, the part after the last message, says about thinking."""
        if not self._thinking.may_be_in(text):
            return None
        ids = self.tokenizer.encode_text(text)
        if not request.add_generation_prompt or request.disable_chat_template:
            return self._thinking.at_end(ids)
        try:
            without = self.render(dataclasses.replace(request, add_generation_prompt=False))
        except RequestError:  # a template that insists on it
            return self._thinking.at_end(ids)
        common = _common_length(text, without)
        if common == len(text):  # a template without the switch
            return self._thinking.at_end(ids)
        return self._thinking.last_marker(self.tokenizer.encode_text(text[common:]))

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
        given = (own, self.chat_template, self.tokenizer.chat_template)
        template = next((text for text in given if text is not None), None)
        if request.tools:
            self._warn_of_dropped_tools(template)
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
            continues=request.continue_final_message,
        )

    def _warn_of_dropped_tools(self, template: str | None) -> None:
        """Say once that the model never hears of the tools."""
        if self._warned_of_tools or "tools" in (template or ""):
            return
        self._warned_of_tools = True
        _log.warning(
            "The chat template shows no tools: the model is not told of them; give another one "
            "with --chat-template (a forced tool_choice works nevertheless)"
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
                f"{param}: token id {quote(bad)} is outside the model's vocabulary of {size}",
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

    def _sampling(self, request: Request, prompt: list[int], state: bool | None) -> EngineSampling:
        params = request.sampling_params
        room = self.max_model_len - len(prompt)
        if params.min_tokens >= room:
            param = "messages" if request.messages else "prompt"
            raise self._too_long(len(prompt), params.min_tokens, param)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        thinking = request.assumes_thinking if state is None else state
        thinking = thinking and self._thinking.end_id >= 0
        arguments = dict(params.logits_processors_args or {})
        packed = self._processor_arguments(arguments)
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
            think_start_id=self._thinking.start_id,
            think_end_id=self._thinking.end_id,
            think_truncate_ids=truncation,
            reasoning_max_tokens=budget,
            response_max_tokens=_at_most(params.response_max_tokens, max_tokens),
            ignore_eos=bool(params.ignore_eos),
            logits_processors_args=packed,
        )

    def _sampler(self, params: SamplingParams, arguments: dict[str, Any]) -> SamplerParams:
        resolved: dict[str, Any] = {name: self._resolve(params, name) for name in BUILT_IN_DEFAULTS}
        resolved["repetition_penalty"] = _clamp(resolved["repetition_penalty"], *PENALTY_RANGE)
        if resolved["temperature"] > 0.0:
            resolved["temperature"] = _clamp(resolved["temperature"], *TEMPERATURE_RANGE)
        seed = random.randint(0, MAX_SEED) if params.seed is None else int(params.seed)
        return SamplerParams(
            **resolved,
            **_taken_over(params),
            top_k=self._top_k(params.top_k),
            seed=seed,
            logit_bias=self._logit_bias(arguments.get("logit_bias")) if self._biases else None,
            banned_ids=self._banned_ids(params),
            logprobs=self._logprobs(params.logprobs, "logprobs"),
            prompt_logprobs=self._logprobs(params.prompt_logprobs, "prompt_logprobs"),
        )

    def _top_k(self, value: int) -> int:
        """Candidates kept; as many as the vocabulary has are all."""
        return 0 if value <= 0 or value >= self.config.model.vocab_size else int(value)

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
        encodable(word, "bad_words")
        encoded = (self.tokenizer.encode_plain(form) for form in (word, f" {word}"))
        singles = [ids[0] for ids in encoded if len(ids) == 1]
        text = [i for i in singles if self.tokenizer.token_bytes(i)]  # `</s>` is not banned so
        return self._within_vocabulary(text, "bad_words")

    # Stops ---------------------------------------------------------------------------------------

    @staticmethod
    def _stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
        texts = [stop] if isinstance(stop, str) else stop or ()
        return tuple(dict.fromkeys(encodable(text, "stop") for text in texts if text))

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

    def _thinking_budget(
        self, params: SamplingParams, arguments: dict[str, Any], max_tokens: int
    ) -> tuple[int | None, tuple[int, ...]]:
        """The budget and what is forced when it is spent."""
        budget = params.reasoning_max_tokens
        sentence = arguments.pop("think_stop_sentence", None)
        other = arguments.pop("thinking_budget", None)
        if not isinstance(sentence, str | None):
            raise _bad_argument("think_stop_sentence", "text", sentence)
        sentence = encodable(sentence or "", "think_stop_sentence")
        if other is not None and (type(other) is not int or other < 0):
            raise _bad_argument("thinking_budget", "an integer of at least 0", other)
        budget = other if budget is None else int(budget)
        if budget is None or self._thinking.end_id < 0:
            return None, ()
        ids = self.tokenizer.encode_as_text(sentence, markers=False)
        ids += self.tokenizer.encode_text(envs.FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR)
        if self._thinking.end_id not in ids:  # or thinking would never end
            ids.append(self._thinking.end_id)
        if budget > max_tokens:
            _log.warning("reasoning_max_tokens %s lowered to max_tokens %d",
                         quote(budget), max_tokens)  # fmt: skip
        return min(budget, max_tokens), tuple(ids)

    def _guided(
        self, guided: GuidedDecodingParams | Mapping[str, Any] | None, thinking: bool
    ) -> GuidedSpec | None:
        if isinstance(guided, Mapping):
            guided = GuidedDecodingParams(**guided)
        spec = None if guided is None else self._guided_spec(guided, thinking)
        if spec is None:
            return None
        is_off = self.config.guided_decoding_backend == "off"
        if is_off and (guided is None or guided.source != TOOL_CHOICE):
            raise RequestError(
                "Structured output is off: start with --guided-decoding-backend auto",
                param="guided_decoding",
                code="invalid_value",
            )
        self._check_compiles(spec, None if guided is None else guided.source)
        return spec

    def _check_compiles(self, spec: GuidedSpec, source: str | None) -> None:
        """Refuse a bad constraint before the engine sees it; `source` is the field to blame."""
        if not is_encodable(spec.value):
            raise RequestError(
                "The constraint holds a lone surrogate, which is no character",
                param=source or "guided_decoding",
                code="invalid_value",
            )
        try:
            if self._trial is not None:
                self._trial.check(spec)
            else:
                compiler.compile(spec, self.tokenizer, self.config.model.vocab_size)
        except RequestError as error:
            param = source or error.param
            raise RequestError(str(error), param=param, code=error.code) from None

    def _guided_spec(self, guided: GuidedDecodingParams, thinking: bool) -> GuidedSpec | None:
        start_after = THINK_END if thinking else None
        names = guided.given()
        if not names:
            return None
        kind, value = _GUIDED_KINDS[names[0]], getattr(guided, names[0])
        field = guided.source or f"guided_{names[0]}"
        text = "" if kind == "json_object" else _constraint_text(names[0], value, field)
        return GuidedSpec(
            kind,
            encodable(text, field),
            self.config.guided_any_whitespace,
            start_after,
            closes_objects=envs.FD_GUIDANCE_DISABLE_ADDITIONAL,
        )

    def _processor_arguments(self, arguments: dict[str, Any]) -> bytes:
        try:
            packed = msgspec.msgpack.encode(arguments)
            msgspec.msgpack.decode(packed)  # nesting that only the decoder refuses
        except (
            TypeError,
            ValueError,
            OverflowError,
            RecursionError,
            msgspec.MsgspecError,
        ) as error:
            raise RequestError(
                f"logits_processors_args: only plain values can be passed: {error}",
                param="logits_processors_args",
                code="invalid_value",
            ) from None
        return packed if arguments and self.config.logits_processors else b""


class _Prompt(NamedTuple):
    """A prompt's tokens, and whether it leaves the model thinking; None when it does not say."""

    token_ids: list[int]
    thinking: bool | None


def _common_length(text: str, other: str) -> int:
    if text.startswith(other):
        return len(other)
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def encodable(text: str, param: str) -> str:
    """Refuse text that UTF-8 cannot hold.

    Args:
        text: From a request.
        param: Its field.

    Returns:
        The same text.

    Raises:
        RequestError: It holds half of a surrogate pair, as JSON's escapes can.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param}: the character at {error.start} is half of a surrogate pair, not text",
            param=param,
            code="invalid_value",
        ) from None
    return text


def _check_params(params: SamplingParams) -> None:
    """Fields of a checked object may have been changed since."""
    try:
        params.check()
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(str(error), code="invalid_value") from None


def _bad_argument(name: str, expected: str, value: object) -> RequestError:
    return RequestError(
        f"logits_processors_args: {name} must be {expected}, got {quote(value)}",
        param="logits_processors_args",
        code="invalid_value",
    )


def _at_most(value: int | None, most: int) -> int | None:
    return None if value is None else min(int(value), most)


def _stop_limit(what: str, name: str, limit: int) -> RequestError:
    return RequestError(
        f"{what} exceeds the limit {name} ({limit}). Please reduce it or raise the limit with the "
        f"environment variable FD_{name.upper()}",
        param="stop",
        code="invalid_value",
    )


def _taken_over(params: SamplingParams) -> dict[str, Any]:
    """Parameters that the sampler takes as they are; None stands for its own default."""
    given = {name: getattr(params, name) for name in _TAKEN_OVER}
    return {name: _TAKEN_OVER[name](value) for name, value in given.items() if value is not None}


def _warn_of_unused(generation: GenerationDefaults) -> None:
    """Requests cannot tell "no top_k" from "the default", so the file's are not applied."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    for name, value in generation.others.items():
        if name not in names:
            continue
        try:
            SamplingParams(**{name: value})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"generation_config.json: {error}") from None
        if value:
            _log.warning(
                "generation_config.json: %s %s is not applied: send it with requests", name, value
            )


def _warn_of_broken(template: str | None) -> None:
    """The model's own template is no reason not to start: completions need none."""
    try:
        check(template or "")
    except TemplateError as error:
        _log.warning(
            "The model's chat template is not Jinja (%s): chats will be refused; give another one "
            "with --chat-template", error,
        )  # fmt: skip


def _clamp(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)


_CONSTRAINTS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "json": ((Mapping, bool, str), "a JSON schema as a dict or as text"),
    "regex": ((str,), "text"),
    "choice": ((list, tuple), "a list of texts"),
    "grammar": ((str,), "text"),
    "structural_tag": ((Mapping, str), "a structural tag as a dict or as text"),
}


def _constraint_text(name: str, value: Any, field: str) -> str:
    kinds, expected = _CONSTRAINTS[name]
    try:
        if isinstance(value, kinds):
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        reason = ""
    except (TypeError, ValueError, RecursionError) as error:
        reason = f" ({error})"
    raise RequestError(
        f"{field}: expected {expected}, found {quote(value)}{reason}",
        param=field,
        code="invalid_value",
    )
