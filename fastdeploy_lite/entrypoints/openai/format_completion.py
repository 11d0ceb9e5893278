"""`POST /v1/completions`: raw text in, raw text out, without template and parsers."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.entrypoints.openai import logprobs_format
from fastdeploy_lite.entrypoints.openai.answer import Answer
from fastdeploy_lite.entrypoints.openai.choices import Choice, Piece
from fastdeploy_lite.entrypoints.openai.handler import Events, Pieces
from fastdeploy_lite.entrypoints.openai.logprobs_format import CompletionLogprobs
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParser, OutputParsers
from fastdeploy_lite.entrypoints.openai.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    Prompt,
)
from fastdeploy_lite.entrypoints.openai.request_building import (
    answer_id,
    completion_logprobs,
    merge_extra,
    sampling_params,
    scores_only,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.streams import DONE
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.outputs import LogprobsLists, PromptLogprobs
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError

Completion = Answer[CompletionRequest]


def split_prompts(prompt: Prompt, field_name: str = "prompt") -> list[str | list[int]]:
    """The prompts of one request.

    Args:
        prompt: A text, token ids, or a list of either.
        field_name: For messages.

    Returns:
        One entry per prompt.

    Raises:
        RequestError: There is none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(f"{field_name} can not be an empty list", param=field_name)
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class CompletionFormat:
    """See `AnswerFormat`."""

    name = "completion"
    closing = DONE

    def open(self, body: CompletionRequest, service: Service, arrival: float) -> Completion:
        """See `AnswerFormat`."""
        service.check_model(body.model)
        body = merge_extra(body, body.suffix if isinstance(body.suffix, dict) else None, "suffix")
        name = answer_id("cmpl", body.request_id, body.user)
        top = completion_logprobs(body, service)
        if body.prompt_token_ids is not None:
            prompts = split_prompts(body.prompt_token_ids, "prompt_token_ids")
        else:
            prompts = split_prompts(body.prompt)
        params = sampling_params(body, service, top)
        requests = [
            Request(
                request_id=name,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=None if isinstance(prompt, str) else prompt,
                sampling_params=params,
                include_stop_str_in_output=bool(body.include_stop_str_in_output),
                arrival_time=arrival,
            )
            for prompt in prompts
        ]
        return Answer(
            body, name, service.model_name, int(arrival), top, requests,
            shows_prompt=bool(body.echo or body.return_token_ids), scores_only=scores_only(body),
        )  # fmt: skip

    def parser(self, answer: Completion, request: EngineRequest, service: Service) -> OutputParser:
        """See `AnswerFormat`."""
        return OutputParser(OutputParsers())

    def failure(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        return {"error": {"message": body["error"]["message"], "code": str(status)}}

    def field_of(self, body: CompletionRequest, name: str | None) -> str | None:
        """See `AnswerFormat`."""
        return name

    # Whole answers -------------------------------------------------------------------------------

    def whole(self, answer: Completion, service: Service) -> dict[str, Any]:
        """See `AnswerFormat`."""
        return CompletionResponse(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            choices=[self._choice(answer, choice, service) for choice in answer.choices],
            usage=answer.usage(),
        ).model_dump()

    def _choice(
        self, answer: Completion, choice: Choice, service: Service
    ) -> CompletionResponseChoice:
        body, text = answer.body, "".join(choice.text)
        writer = _LogprobsWriter(answer, choice, service)
        rows = logprobs_format.join(choice.logprobs) if choice.logprobs else None
        result = CompletionResponseChoice(
            index=choice.index,
            text=(choice.prompt_text if body.echo else "") + text,
            logprobs=writer.write(rows, choice.prompt_logprobs),
            prompt_logprobs=_prompt_logprobs(answer, choice.prompt_logprobs),
            finish_reason=choice.finish_reason,
            speculate_metrics=choice.speculation,
        )
        if body.return_token_ids:
            result.prompt_token_ids = choice.request.prompt_token_ids
            result.completion_token_ids = choice.token_ids
            result.prompt_tokens = choice.prompt_text
            result.completion_tokens = text
        return result

    # Streams -------------------------------------------------------------------------------------

    async def events(self, answer: Completion, pieces: Pieces, service: Service) -> Events:
        """See `AnswerFormat`."""
        options = answer.body.stream_options
        continuous = options is not None and bool(options.continuous_usage_stats)
        size = max(answer.body.max_streaming_response_tokens or 1, 1)
        waiting: list[dict[str, Any]] = []
        writers: dict[int, _LogprobsWriter] = {}
        async for piece in pieces:
            choice = piece.choice
            first = choice.index not in writers
            if first:
                writers[choice.index] = _LogprobsWriter(answer, choice, service)
                if answer.body.return_token_ids:
                    opening, later = [self._opening(answer, piece)], -len(piece.token_ids)
                    yield self._event(answer, opening, continuous, later)
            waiting.append(self._delta(answer, piece, writers[choice.index], first))
            if piece.finished or len(waiting) >= size:
                yield self._event(answer, waiting, continuous)
                waiting = []
        if options is not None and options.include_usage is not False:
            yield self._event(answer, [], True)

    @staticmethod
    def _event(
        answer: Completion, choices: list[Any], with_usage: bool, later: int = 0
    ) -> dict[str, Any]:
        value: dict[str, Any] = {
            "id": answer.id,
            "object": "text_completion",
            "created": answer.created,
            "model": answer.model,
            "choices": choices,
        }
        if with_usage:
            value["usage"] = answer.usage(later=later).model_dump()
        return value

    @staticmethod
    def _opening(answer: Completion, piece: Piece) -> dict[str, Any]:
        choice = piece.choice
        value = {
            "index": choice.index,
            "text": "",
            "prompt_token_ids": choice.request.prompt_token_ids,
            "completion_token_ids": None,
            "prompt_tokens": choice.prompt_text,
            "completion_tokens": None,
        }
        if answer.body.prompt_logprobs is not None:
            value["prompt_logprobs"] = _prompt_logprobs(answer, piece.prompt_logprobs)
        return value

    def _delta(
        self, answer: Completion, piece: Piece, writer: _LogprobsWriter, first: bool
    ) -> dict[str, Any]:
        choice, body = piece.choice, answer.body
        echo = choice.prompt_text if first and body.echo else ""
        value: dict[str, Any] = {
            "index": choice.index,
            "text": echo + piece.text,
            "prompt_token_ids": None,
            "completion_token_ids": piece.token_ids if body.return_token_ids else None,
            "tool_calls": None,
            "reasoning_content": "",
            "arrival_time": choice.arrival_time(),
            "logprobs": writer.write(piece.logprobs, piece.prompt_logprobs) if answer.top else None,
            "draft_logprobs": None,
        }
        if body.return_token_ids:
            value["completion_tokens"] = piece.text
        if body.prompt_logprobs is not None:
            rows = piece.prompt_logprobs if first and not body.return_token_ids else None
            value["prompt_logprobs"] = _prompt_logprobs(answer, rows)
        if piece.finished:
            value["finish_reason"] = choice.finish_reason
            value["speculate_metrics"] = choice.speculate_metrics()
        return value


class _LogprobsWriter:
    """Writes the log-probabilities of one choice, the prompt's first where it is echoed.

    Args:
        answer: Says what is shown.
        choice: Whose.
        service: Has the tokenizer.
    """

    def __init__(self, answer: Completion, choice: Choice, service: Service) -> None:
        top = answer.top
        decode = answer.body.include_logprobs_decode_token is not False
        self._form = None if top is None else CompletionLogprobs(service.tokenizer, top, decode)
        self._prompt_ids = choice.request.prompt_token_ids if answer.body.echo else None

    def write(
        self, rows: LogprobsLists | None, prompt_rows: PromptLogprobs | None
    ) -> dict[str, Any] | None:
        """The new part.

        Args:
            rows: Of generated tokens, or None.
            prompt_rows: Of the prompt, when they have come.

        Returns:
            The completion form, or None when there is nothing to show.
        """
        if self._form is None:
            return None
        found = []
        if self._prompt_ids is not None and prompt_rows is not None:
            found.append(self._form.prompt(self._prompt_ids, prompt_rows))
        if rows is not None:
            found.append(self._form.rows(rows))
        return logprobs_format.joined(found)


def _prompt_logprobs(answer: Completion, rows: PromptLogprobs | None) -> list[Any] | None:
    if answer.body.prompt_logprobs is None:
        return None
    decode = answer.body.include_logprobs_decode_token is not False
    return logprobs_format.prompt_logprobs(rows, decode)
