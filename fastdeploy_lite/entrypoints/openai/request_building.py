"""From a validated body to what the preprocessor takes: sampling, constraints, limits."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fastdeploy_lite.entrypoints.openai import forced_calls
from fastdeploy_lite.entrypoints.openai.protocol import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.request.params import (
    MAX_SEED,
    TOOL_CHOICE,
    GuidedDecodingParams,
    SamplingParams,
)
from fastdeploy_lite.utils.errors import RequestError, one_line
from fastdeploy_lite.utils.logging import get_logger

Body = TypeVar("Body", bound=BaseModel)
_log = get_logger("api_server")
_LONGEST_ID = 256
# Fields of a body that mean more, or something else, than the parameter of their name.
_READ_APART = {
    "n", "max_tokens", "prompt_logprobs", "stop", "stop_token_ids", "logits_processors_args",
}  # fmt: skip
_PLAIN_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name in GenerationRequest.model_fields and field.name not in _READ_APART
)


class MergedBodyError(RequestError):
    """A value in `metadata` or `suffix` breaks a field's rule; `errors` are pydantic's."""

    def __init__(self, errors: list[Any]) -> None:
        super().__init__(errors[0].get("msg", "invalid value") if errors else "invalid value")
        self.errors = errors


def merge_extra(body: Body, extra: Mapping[str, Any] | None, source: str) -> Body:
    """Merge upstream's side channel into a request; fields given in the request win.

    Args:
        body: The request.
        extra: `metadata` of a chat, `suffix` of a completion.
        source: Its name, for messages.

    Returns:
        The merged request.

    Raises:
        RequestError: A key or value cannot be used.
    """
    if not extra:
        return body
    if "raw_request" in extra:
        raise RequestError(
            f"The parameter 'raw_request' is not supported in {source}", param="raw_request"
        )
    given = body.model_dump(exclude_unset=True, by_alias=True)
    try:
        return type(body).model_validate({**extra, **given})
    except ValidationError as error:
        raise MergedBodyError(list(error.errors())) from None


def answer_id(prefix: str, request_id: str | None, user: str | None, separator: str = "-") -> str:
    """The id of an answer.

    Args:
        prefix: `chatcmpl`, `cmpl` or `resp`.
        request_id: The client's own, or None.
        user: The client's user name, or None.
        separator: Stands after the prefix.

    Returns:
        Printable text that starts with the prefix.
    """
    if request_id:
        text = one_line(request_id[:_LONGEST_ID])[:_LONGEST_ID]
        start = f"{prefix}{separator}"
        return text if text.startswith(start) else start + text
    middle = f"{one_line(user[:_LONGEST_ID])[:_LONGEST_ID]}-" if user else ""
    return f"{prefix}{separator}{middle}{uuid.uuid4()}"


def sampling_params(
    body: ChatCompletionRequest | CompletionRequest, service: Service, logprobs: int | None
) -> SamplingParams:
    """The sampling parameters of a body.

    Args:
        body: The request.
        service: Whose limits hold.
        logprobs: Alternatives per token, or None.

    Returns:
        The parameters of one sequence.

    Raises:
        RequestError: A value is out of range.
    """
    given = {name: getattr(body, name) for name in _PLAIN_FIELDS}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    values["max_tokens"] = _max_tokens(body, service)
    values["logprobs"] = logprobs
    values["prompt_logprobs"] = _prompt_logprobs(body, service)
    values["stop"] = _stop_texts(body.stop)
    values["stop_token_ids"] = body.stop_token_ids or None
    values["logits_processors_args"] = _processor_args(body)
    values["guided_decoding"] = _guided(body, service)
    values.update(_budgets(body, values["max_tokens"]))
    try:
        return SamplingParams(**values)
    except (ValueError, TypeError) as error:
        raise RequestError(str(error), param=_named_field(str(error), values)) from None


def _named_field(message: str, values: Mapping[str, Any]) -> str | None:
    names = ("logit_bias", *values)
    return next((name for name in names if message.startswith(name)), None)


def _max_tokens(body: ChatCompletionRequest | CompletionRequest, service: Service) -> int | None:
    value, field = body.max_tokens, "max_tokens"
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        value, field = body.max_completion_tokens, "max_completion_tokens"
    limit = service.config.scheduler.max_model_len
    if value == 0 and scores_only(body):
        return 1  # the engine gives a token at least; the handler leaves it out
    if value is not None and value < 1:
        raise RequestError(
            f"{field} can be defined [1, {limit}), but received {value}.", param=field
        )
    return None if value is None else min(value, limit)


def scores_only(body: ChatCompletionRequest | CompletionRequest) -> bool:
    """Whether a completion asks for nothing but its prompt, with log-probabilities as a rule."""
    return isinstance(body, CompletionRequest) and bool(body.echo) and body.max_tokens == 0


def _stop_texts(stop: str | list[str] | None) -> list[str] | None:
    texts = [stop] if isinstance(stop, str) else stop or []
    return [text for text in texts if text] or None


def _processor_args(body: ChatCompletionRequest | CompletionRequest) -> dict[str, Any] | None:
    """Upstream's `logits_processors_args`, and OpenAI's `logit_bias` by the same way."""
    args = dict(body.logits_processors_args or {})
    if body.logit_bias:
        upstream = args.get("logit_bias")
        args["logit_bias"] = {**body.logit_bias, **(upstream if isinstance(upstream, dict) else {})}
    return args or None


def _budgets(
    body: ChatCompletionRequest | CompletionRequest, max_tokens: int | None
) -> dict[str, int]:
    if not isinstance(body, ChatCompletionRequest):
        return {}
    budgets = {}
    for name in ("reasoning_max_tokens", "response_max_tokens"):
        value = getattr(body, name)
        if value is None:
            continue
        if value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}", param=name)
        if max_tokens is not None and value > max_tokens:
            _log.warning("%s %d is lowered to max_tokens %d", name, value, max_tokens)
            value = max_tokens
        budgets[name] = value
    return budgets


# Log-probabilities -------------------------------------------------------------------------------


def chat_logprobs(body: ChatCompletionRequest, service: Service) -> int | None:
    """Alternatives per token that a chat asks for.

    Args:
        body: The request.
        service: Whose limits hold.

    Returns:
        The number, 0 for the sampled token alone; None for no log-probabilities.

    Raises:
        RequestError: They are not permitted, or too many.
    """
    top = body.top_logprobs
    if top is not None:
        _check_count("top_logprobs", top, service)
    if not body.logprobs:
        if top:
            raise RequestError(
                "'top_logprobs' can be used only with 'logprobs': true", param="top_logprobs"
            )
        return None
    _require_enabled(service)
    return top or 0


def completion_logprobs(body: CompletionRequest, service: Service) -> int | None:
    """Alternatives per token that a completion asks for; see `chat_logprobs`."""
    if body.logprobs is None:
        return None
    _require_enabled(service)
    _check_count("logprobs", body.logprobs, service)
    return body.logprobs


def _prompt_logprobs(
    body: ChatCompletionRequest | CompletionRequest, service: Service
) -> int | None:
    wanted = body.prompt_logprobs
    if wanted is not None:
        _require_enabled(service, "prompt_logprobs")
        _check_count("prompt_logprobs", wanted, service)
    echoed = body.logprobs if isinstance(body, CompletionRequest) and body.echo else None
    counts = [count for count in (wanted, echoed) if count is not None]
    return -1 if -1 in counts else max(counts, default=None)


def _require_enabled(service: Service, param: str = "logprobs") -> None:
    if not service.config.enable_logprob:
        raise RequestError("Logprobs is disabled, please enable it in startup config.", param=param)


def _check_count(name: str, value: int, service: Service) -> None:
    limit = service.config.max_logprobs
    least = -1 if limit == -1 else 0
    if value < least:
        raise RequestError(
            f"Invalid value for '{name}': must be greater than or equal to {least}.", param=name
        )
    if limit != -1 and value > limit:
        raise RequestError(
            f"Number of {name} requested ({value}) exceeds maximum allowed value ({limit}): "
            f"it must be less than or equal to {limit}.",
            param=name,
        )


# Constraints -------------------------------------------------------------------------------------


def _guided(
    body: ChatCompletionRequest | CompletionRequest, service: Service
) -> GuidedDecodingParams | None:
    demanded = forced_calls.schema(body) if isinstance(body, ChatCompletionRequest) else None
    if demanded is not None:
        return GuidedDecodingParams(json=demanded, source=TOOL_CHOICE)
    kind, value, field = _constraint(body)
    if kind is None:
        return None
    if service.config.guided_decoding_backend == "off":
        raise RequestError(
            "Guided decoding is off; start the server with --guided-decoding-backend auto",
            param=field,
        )
    try:
        return GuidedDecodingParams(**{kind: value, "source": field})
    except (ValueError, TypeError) as error:
        raise RequestError(str(error), param=field) from None


def _constraint(body: Any) -> tuple[str | None, Any, str]:
    """Kind, value and the field that holds them."""
    form = body.response_format
    if form is not None and form.type == "json_schema":
        schema = form.json_schema.json_schema
        return "json", {} if schema is None else schema, "response_format"
    if form is not None and form.type == "json_object":
        return "json_object", True, "response_format"
    if form is not None and form.type == "structural_tag":
        text = json.dumps(form.model_dump(by_alias=True, exclude_none=True))
        return "structural_tag", text, "response_format"
    for kind in ("json", "regex", "choice", "grammar", "json_object"):
        value = getattr(body, f"guided_{kind}")
        if value is not None and value is not False:
            return kind, value, f"guided_{kind}"
    tag = getattr(body, "structural_tag", None)
    return ("structural_tag", tag, "structural_tag") if tag is not None else (None, None, "")


def seed_of(seed: int, choice: int) -> int:
    """The seed of one of several choices: they differ, and each is reproducible."""
    return (seed + choice) % (MAX_SEED + 1)


def check_count(prompts: int, n: int) -> None:
    """Bound the sequences of one request.

    Args:
        prompts: Number of prompts.
        n: Choices per prompt.

    Raises:
        RequestError: There are too many.
    """
    if prompts * n > MAX_PROMPTS:
        raise RequestError(
            f"The request asks for {prompts} prompts with {n} choices each; "
            f"the limit is {MAX_PROMPTS} sequences",
            param="n" if n > 1 else "prompt",
        )


def opens_answer(adds: bool | None, continues: bool | None) -> bool:
    """Whether a prompt opens the assistant's turn: also where nothing is said of it.

    Args:
        adds: `add_generation_prompt`.
        continues: `continue_final_message`.

    Raises:
        RequestError: Both are asked for.
    """
    if continues and adds:
        text = "continue_final_message: add_generation_prompt would begin another message"
        raise RequestError(text, param="continue_final_message")
    return not continues and adds is not False
