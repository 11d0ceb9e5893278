"""The offline API: `LLM(...).generate(...)` and `.chat(...)`, with upstream's behaviours."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from pydantic import ValidationError
from tqdm.auto import tqdm

from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine import LLMEngine
from fastdeploy_lite.entrypoints.openai.output_parser import (
    OutputParser,
    OutputParsers,
    ParsedDelta,
    ParsedOutput,
    thinking_switch,
)
from fastdeploy_lite.entrypoints.openai.protocol import ChatCompletionToolsParam
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.outputs import CompletionOutput, RequestOutput
from fastdeploy_lite.request.params import SamplingParams
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError, one_line

Params = SamplingParams | Sequence[SamplingParams] | None
Stream = Iterator[list[RequestOutput | None]]
MULTIMODAL_KEYS = ("multimodal_data", "multi_modal_data")


class LLM:
    """A model that generates in this process.

    Args:
        model: Model folder, repository id, or "demo" for the small model in the package.
        revision: Revision to download.
        tokenizer: Tokenizer folder; None takes the model's.
        enable_logprob: Permits `logprobs` in sampling parameters.
        chat_template: Jinja text or file for `chat`; None takes the model's.
        **kwargs: Any field of `EngineArgs`.

    Raises:
        TypeError: An argument is unknown.
        FastDeployError: The model cannot be run; one line says why.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = "master",
        tokenizer: str | None = None,
        enable_logprob: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = EngineArgs(
            model=model,
            revision=revision,
            tokenizer=tokenizer,
            enable_logprob=enable_logprob,
            chat_template=chat_template,
            **kwargs,
        )
        self.llm_engine = LLMEngine.from_engine_args(args)
        self._preprocessor = self.llm_engine.preprocessor
        self._parsers = OutputParsers.create(
            self._preprocessor.tokenizer,
            args.reasoning_parser,
            args.tool_call_parser,
            args.tool_parser_plugin,
        )
        weakref.finalize(self, self.llm_engine.shutdown)  # also at exit

    @property
    def max_model_len(self) -> int:
        """Limit of prompt and output together, tokens."""
        return self.llm_engine.config.scheduler.max_model_len

    def count_chat_tokens(self, messages: list[Any]) -> int:
        """Tokens of a conversation as the chat template renders it.

        Args:
            messages: In OpenAI's form.

        Returns:
            The number of tokens.

        Raises:
            RequestError: The messages cannot be rendered.
        """
        return len(self._preprocessor.prompt_token_ids(Request(messages=messages)))

    @overload
    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[True],
    ) -> Stream: ...

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        stream: bool = False,
    ) -> list[RequestOutput] | Stream:
        """Continue prompts.

        Args:
            prompts: Text, token ids, a dict with `prompt`, or a list of any of these (dicts in a
                list may carry `prompt_token_ids` or `messages` instead). Text is tokenised as it
                is: no chat template, no BOS.
            sampling_params: One for all, or one per prompt.
            use_tqdm: Show a progress bar.
            stream: Return a generator instead; each item is a list with one entry per prompt, None
                or what is new.

        Returns:
            One result per prompt, in order; or the generator.

        Raises:
            TypeError: A prompt has another type.
            ValueError: A prompt or the parameters cannot be used.
        """
        batch = _as_batch(prompts)
        params = self._params_for(batch, sampling_params, "prompts")
        requests = [_request(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        return self._answer(requests, batch, use_tqdm, stream)

    @overload
    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tools: Any = None,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tools: Any = None,
        *,
        stream: Literal[True],
    ) -> Stream: ...

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tools: Any = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Stream:
        """Answer conversations.

        Args:
            messages: One conversation (a list of messages) or a list of conversations.
            sampling_params: One for all, or one per conversation.
            use_tqdm: Show a progress bar.
            chat_template_kwargs: Variables for the template, such as `enable_thinking`.
            chat_template: Jinja text that overrides the constructor's.
            tools: Tool definitions: one, or a list.
            stream: As in `generate`; a step holds new text, new `reasoning_content` and pieces of
                `tool_calls` (with their `index`), as in a stream of the server.

        Returns:
            One result per conversation, in order; or the generator.

        Raises:
            ValueError: Messages or parameters cannot be used.
            RuntimeError: `tools` are malformed.
        """
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
            raise ValueError("Invalid input: chat_template_kwargs must be a dict")
        batch = _as_conversations(messages)
        params = self._params_for(batch, sampling_params, "messages")
        definitions = _tool_definitions(tools)
        requests = [
            Request(
                messages=conversation,
                sampling_params=p,
                tools=definitions,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation, p in zip(batch, params, strict=True)
        ]
        return self._answer(requests, batch, use_tqdm, stream)

    # Parameters ----------------------------------------------------------------------------------

    def _params_for(self, batch: Sequence[Any], params: Any, what: str) -> list[SamplingParams]:
        if params is None:
            params = SamplingParams(max_tokens=self.max_model_len)
        if isinstance(params, SamplingParams):
            return [params] * len(batch)
        if not isinstance(params, Sequence) or not all(
            isinstance(p, SamplingParams) for p in params
        ):
            raise TypeError(
                f"sampling_params must be SamplingParams or a list of them, got {params!r}"
            )
        if len(params) == 1:
            return list(params) * len(batch)
        if len(params) != len(batch):
            raise ValueError(f"{what} and sampling_params must be the same length.")
        return list(params)

    # Generation ----------------------------------------------------------------------------------

    def _answer(
        self, requests: list[Request], prompts: Sequence[Any], use_tqdm: bool, stream: bool
    ) -> list[RequestOutput] | Stream:
        if stream and any(r.sampling_params.prompt_logprobs is not None for r in requests):
            raise ValueError("prompt_logprobs cannot be returned with stream=True")
        # All are checked before the first one runs.
        prepared = [self._preprocessor.process(self._with_switch(r)) for r in requests]
        parsers = [self._parser(*pair) for pair in zip(requests, prepared, strict=True)]
        if stream:
            return self._stream(prepared, prompts, parsers)
        results = self._collect(prepared, prompts, use_tqdm)
        for parser, result in zip(parsers, results, strict=True):
            if parser is not None:
                _take_apart(result.outputs, parser.parse(result.outputs.text))
        return results

    def _collect(
        self, requests: list[EngineRequest], prompts: Sequence[Any], use_tqdm: bool
    ) -> list[RequestOutput]:
        results: dict[int, RequestOutput] = {}
        with (
            contextlib.closing(self.llm_engine.run(requests, prompts)) as chunks,
            tqdm(
                total=len(requests),
                desc="Processed prompts",
                dynamic_ncols=True,
                disable=not use_tqdm,
            ) as bar,
        ):
            for chunk in chunks:
                result = results.setdefault(chunk.outputs.index, chunk)
                if result is not chunk:
                    result.add(chunk)
                if chunk.finished:
                    bar.update()
        return [results[index] for index in range(len(requests))]

    def _stream(
        self,
        requests: list[EngineRequest],
        prompts: Sequence[Any],
        parsers: Sequence[OutputParser | None],
    ) -> Stream:
        # Closing this generator must abort what is left at once; from Python 3.12 on the engine's
        # own generator would otherwise live until it is collected.
        with contextlib.closing(self.llm_engine.run(requests, prompts)) as chunks:
            for chunk in chunks:
                new, parser = chunk.outputs, parsers[chunk.outputs.index]
                if parser is not None:
                    _take_apart(new, parser.feed(new.text, new.token_ids, chunk.finished))
                step: list[RequestOutput | None] = [None] * len(requests)
                step[new.index] = chunk
                yield step

    # Parsers -------------------------------------------------------------------------------------

    def _parser(self, request: Request, prepared: EngineRequest) -> OutputParser | None:
        """What takes the answer to `request` apart; None where there is nothing to do."""
        if not request.messages or self._parsers == OutputParsers():
            return None
        return OutputParser(self._parsers, prepared.thinking, request)

    def _with_switch(self, request: Request) -> Request:
        """Say whether the model thinks where the prompt does not."""
        reasoning = self._parsers.reasoning
        if reasoning is None or not request.messages:
            return request
        switch = thinking_switch(dict(request.chat_template_kwargs or {}), None)
        return replace(request, thinking_switch=switch, assumes_thinking=reasoning.assumes_thinking)


def _take_apart(output: CompletionOutput, parsed: ParsedOutput | ParsedDelta) -> None:
    """Replace the raw text of a whole answer, or of a stream step, by its parts."""
    output.text = parsed.content
    output.reasoning_content = parsed.reasoning
    output.tool_calls = parsed.tool_calls


def _as_batch(prompts: Any) -> list[Any]:
    """A list of prompts from any of the accepted forms."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        if "prompt" not in prompts:
            raise ValueError("prompts must be a input dict with the key 'prompt'")
        return [prompts]
    if hasattr(prompts, "tolist"):  # a numpy array of token ids
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"Invalid type for 'prompt': {type(prompts).__name__}")
    if prompts and all(_is_id(p) for p in prompts):
        return [list(prompts)]
    return list(prompts)


def _request(prompt: Any, params: SamplingParams) -> Request:
    if isinstance(prompt, str):
        return Request(prompt=prompt, sampling_params=params)
    if isinstance(prompt, Mapping):
        return _request_from_mapping(prompt, params)
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple) and all(_is_id(p) for p in prompt):
        return Request(prompt_token_ids=list(prompt), sampling_params=params)
    raise TypeError(
        f"Invalid type for 'prompt': {type(prompt).__name__}, expected text, a list of token ids "
        "or a dict"
    )


def _request_from_mapping(prompt: Mapping[str, Any], params: SamplingParams) -> Request:
    if any(prompt.get(key) for key in MULTIMODAL_KEYS):
        raise RequestError(
            "multimodal_data is not supported: this model reads text only",
            param="multimodal_data",
            code="invalid_value",
        )
    for key in ("prompt_token_ids", "prompt", "messages"):
        value = prompt.get(key)
        if value is not None and key == "messages":
            return Request(messages=value, sampling_params=params)
        if value is not None:
            return _request(value, params)
    raise ValueError(
        "prompts must be a input dict with 'prompt', 'prompt_token_ids' or 'messages', found keys "
        f"{sorted(map(str, prompt))}"
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_conversations(messages: Any) -> list[list[Any]]:
    if not isinstance(messages, list | tuple):
        raise TypeError(
            f"messages must be a list of dicts or a list of such lists, got {type(messages)}"
        )
    nested = bool(messages) and all(isinstance(m, list | tuple) for m in messages)
    return [list(m) for m in messages] if nested else [list(messages)]


def _tool_definitions(tools: Any) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    items = tools if isinstance(tools, list | tuple) else [tools]
    try:
        models = [ChatCompletionToolsParam.model_validate(_plain(tool)) for tool in items]
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'tool'}: {e['msg']}" for e in error.errors()
        )
        raise RuntimeError(
            one_line(f"Failed to validate 'tools' parameter in chat method: {reasons}")
        ) from None
    return [model.model_dump(exclude_none=True) for model in models]


def _plain(tool: Any) -> Any:
    return tool.model_dump() if hasattr(tool, "model_dump") else tool
