"""Requests and responses of the HTTP interface.

Input takes the union of what upstream's versions take; unknown fields are ignored.  Output is the
form of releases 2.3 and up.  Pydantic writes the non-streamed bodies, with nulls kept; the events
of a stream are assembled where they are sent, because there unset and null differ.
"""

from __future__ import annotations

import sys
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    model_validator,
)

from fastdeploy_lite.request.outputs import SpeculateMetrics
from fastdeploy_lite.request.params import LEAST_TOP_K, MAX_SEED, PENALTIES, SHARES
from fastdeploy_lite.utils.errors import quote

MAX_CHOICES = 128  # of `n`; one request must not fill the whole queue
MAX_PROMPTS = 1024
# Coarse bounds, so that no list is walked for long before the exact limits are checked.
MAX_LISTED_IDS = 16384
MAX_CHOICE_TEXTS = 8192
MAX_TOOLS = 1024
MAX_ABORTED = 4096  # ids in one request to abort

_LARGEST_FLOAT = int(sys.float_info.max)

_LEGACY_GUIDED = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structural_tag",
)


def _first_bad_bias(value: Any) -> Any:
    """pydantic would list every bad entry of a mapping; the first one is enough."""
    if isinstance(value, dict):
        if len(value) > MAX_LISTED_IDS:
            raise ValueError(f"logit_bias: {len(value)} entries, the limit is {MAX_LISTED_IDS}")
        for key, number in value.items():
            if not isinstance(number, int | float) or abs(number) > _LARGEST_FLOAT:
                raise ValueError(f"logit_bias: expected numbers, found {quote({key: number})}")
    return value


class FirstFault(FailFast):
    """A list of a million faults is one fault: validation stops at the first."""

    __hash__ = object.__hash__  # unions of annotated types want it


Ids = Annotated[list[int], FirstFault()]
FewIds = Annotated[list[int], FirstFault(), Field(max_length=MAX_LISTED_IDS)]
FewTexts = Annotated[list[str], FirstFault(), Field(max_length=MAX_CHOICE_TEXTS)]
AbortedIds = Annotated[list[str], FirstFault(), Field(max_length=MAX_ABORTED)]
IdLists = Annotated[list[Ids], FirstFault()]
Texts = Annotated[list[str], FirstFault()]
Bias = Annotated[dict[str, float], BeforeValidator(_first_bad_bias)]
Penalty = Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1], allow_inf_nan=False)]
Share = Annotated[float, Field(ge=SHARES[0], le=SHARES[1], allow_inf_nan=False)]


class ErrorInfo(BaseModel):
    """What went wrong; all four keys are always present."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every error of the `/v1` routes."""

    error: ErrorInfo


# Requests ----------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    """Whether and how a stream reports usage."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChatCompletionToolsParam(BaseModel):
    """One tool of a chat request."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"] = "function"
    function: FunctionDefinition


Tools = Annotated[list[ChatCompletionToolsParam], FirstFault(), Field(max_length=MAX_TOOLS)]


class NamedFunction(BaseModel):
    """The name inside a `tool_choice`."""

    name: str


class NamedToolChoice(BaseModel):
    """`tool_choice` that demands a call of one function."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], FirstFault(), Field(max_length=MAX_TOOLS)]


class AllowedToolChoice(BaseModel):
    """`tool_choice` that leaves some of the tools to the model."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def tool_choice_kind(value: Any) -> str | None:
    """Which form of `tool_choice` a value is meant to be; None for none that there is."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", "word")
    known = isinstance(value, str) if kind == "word" else kind in ("function", "allowed_tools")
    return kind if known else None


# Told apart before it is checked: a union would answer every mistake with its first branch's words.
ToolChoiceForm = Discriminator(
    tool_choice_kind,
    custom_error_type="tool_choice",
    custom_error_message="expected 'none', 'auto', 'required', or an object whose type is "
    "'function' or 'allowed_tools'",
)
ChoiceWord = Annotated[Literal["none", "auto", "required"], Tag("word")]
ToolChoice = Annotated[
    ChoiceWord
    | Annotated[NamedToolChoice, Tag("function")]
    | Annotated[AllowedToolChoice, Tag("allowed_tools")],
    ToolChoiceForm,
]


class JsonSchemaResponseFormat(BaseModel):
    """OpenAI's wrapper of a JSON schema."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
    name: str
    description: str | None = None
    # `schema` is a method of the base class
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class StructuralTag(BaseModel):
    """A begin text whose continuation follows a schema up to the end text."""

    model_config = ConfigDict(populate_by_name=True)
    begin: str
    structural_tag_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    end: str = ""


class ResponseFormat(BaseModel):
    """The constraint in OpenAI's form; the fields needed depend on `type`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaResponseFormat | None = None
    structures: Annotated[list[StructuralTag], FirstFault()] | None = None
    triggers: Texts | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type 'json_schema' needs the field 'json_schema'")
        if self.type == "structural_tag" and not (self.structures and self.triggers):
            raise ValueError("response_format of type 'structural_tag' needs structures, triggers")
        return self


class GenerationRequest(BaseModel):
    """The fields that chat and completions share."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = "default"
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: Share | None = None
    top_k: int | None = Field(default=None, ge=LEAST_TOP_K)
    min_p: Share | None = None
    n: int | None = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    max_tokens: int | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop: str | FewTexts | None = Field(default_factory=list)
    stop_token_ids: FewIds | None = Field(default_factory=list)
    include_stop_str_in_output: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_streaming_response_tokens: int | None = None
    user: str | None = None
    request_id: str | None = None
    bad_words: Texts | None = None
    bad_words_token_ids: FewIds | None = None
    logit_bias: Bias | None = None
    logits_processors_args: dict[str, Any] | None = None
    temp_scaled_logprobs: bool | None = False
    top_p_normalized_logprobs: bool | None = False
    include_draft_logprobs: bool | None = False
    include_logprobs_decode_token: bool | None = True
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: FewTexts | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> GenerationRequest:
        used = [name for name in _LEGACY_GUIDED if getattr(self, name, None) is not None]
        constrained = self.response_format is not None and self.response_format.type != "text"
        if len(used) + constrained + bool(self.guided_json_object) > 1:
            raise ValueError(
                "You can only use one kind of guided decoding "
                "('guided_json', 'guided_json_object', 'guided_regex', 'guided_choice', "
                "'guided_grammar', 'structural_tag' or 'response_format')."
            )
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        return self


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Any] | Ids
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    structural_tag: str | None = None
    metadata: dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_max_tokens: int | None = None
    response_max_tokens: int | None = None
    prompt_token_ids: Ids | None = None
    completion_token_ids: Ids | None = None
    disable_chat_template: bool | None = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def _choice_among_tools(self) -> ChatCompletionRequest:
        if isinstance(self.tool_choice, AllowedToolChoice):
            self._keep_allowed(self.tool_choice.allowed_tools)
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return self
        if not self.tools:
            raise ValueError("tool_choice demands a call, but there are no tools")
        if isinstance(choice, NamedToolChoice):
            self._check_known(choice.function.name)
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained or any(getattr(self, n, None) is not None for n in _LEGACY_GUIDED):
            raise ValueError(
                "tool_choice demands a call; it cannot be used with another constraint on the "
                "output"
            )
        return self

    def _keep_allowed(self, allowed: AllowedTools) -> None:
        """Leave the model the tools that it may use, and nothing else to know of the choice."""
        names = [tool.function.name for tool in allowed.tools]
        for name in names:
            self._check_known(name)
        self.tools = [tool for tool in self.tools or [] if tool.function.name in names]
        self.tool_choice = allowed.mode

    def _check_known(self, name: str) -> None:
        names = [tool.function.name for tool in self.tools or []]
        if name not in names:
            raise ValueError(
                f"tool_choice names {quote(name)}, which is not one of the tools {quote(names)}"
            )


Prompt = Ids | IdLists | str | Texts


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompt = Field(...)
    prompt_token_ids: Ids | IdLists | None = None
    suffix: dict[str, Any] | str | None = None
    best_of: int | None = None
    echo: bool | None = False
    logprobs: int | None = None


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`: a text or a conversation, with vLLM's fields."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None  # tokenizers here put none around a prompt
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FirstFault()]


class AbortRequest(BaseModel):
    """Body of `POST /v1/abort` and of upstream's `POST /v1/abort_requests` (`req_ids`)."""

    request_id: str | None = None
    request_ids: AbortedIds | None = None
    req_ids: AbortedIds | None = None
    abort_all: bool = False


# Responses ---------------------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    """Parts of the prompt's tokens."""

    cached_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """Parts of the generated tokens."""

    reasoning_tokens: int = 0
    image_tokens: int = 0


class UsageInfo(BaseModel):
    """Token counts; `completion_tokens` counts the closing end-of-sequence token."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=PromptTokensDetails)
    completion_tokens_details: CompletionTokensDetails = Field(
        default_factory=CompletionTokensDetails
    )


class FunctionCall(BaseModel):
    """A call that the model made; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A tool call of a non-streamed answer."""

    id: str = Field(default_factory=lambda: f"chatcmpl-tool-{uuid.uuid4().hex}")
    type: Literal["function"] = "function"
    function: FunctionCall


class DeltaFunctionCall(BaseModel):
    """New parts of a call."""

    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(BaseModel):
    """New parts of a call in a stream; `id`, `type` and the name come with its first delta."""

    index: int
    type: Literal["function"] | None = None
    id: str | None = None
    function: DeltaFunctionCall | None = None


class DeltaMessage(BaseModel):
    """New parts of a message; what plug-in parsers return."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ExtractedToolCallInformation(BaseModel):
    """What a tool parser found in a whole output."""

    tools_called: bool
    tool_calls: list[ToolCall] = Field(default_factory=list)
    content: str | None = None


class ChatMessage(BaseModel):
    """The answer of a chat choice; `prompt_tokens` and `completion_tokens` are text here."""

    role: str = "assistant"
    content: str | None = None
    multimodal_content: list[Any] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    prompt_tokens: str | None = None
    completion_tokens: str | None = None


class ChatCompletionResponseChoice(BaseModel):
    """One choice of a chat answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    draft_logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[Any] | None = None
    finish_reason: str | None = None
    speculate_metrics: SpeculateMetrics | None = None


class ChatCompletionResponse(BaseModel):
    """Body of a non-streamed chat answer."""

    id: str
    object: str = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: UsageInfo


class CompletionResponseChoice(BaseModel):
    """One choice of a completion answer."""

    index: int
    text: str
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    prompt_tokens: str | None = None
    completion_tokens: str | None = None
    arrival_time: float | None = None
    logprobs: dict[str, Any] | None = None
    draft_logprobs: dict[str, Any] | None = None
    prompt_logprobs: list[Any] | None = None
    reasoning_content: str | None = None
    finish_reason: str | None = None
    tool_calls: list[ToolCall] | None = None
    speculate_metrics: SpeculateMetrics | None = None


class CompletionResponse(BaseModel):
    """Body of a non-streamed completion answer."""

    id: str
    object: str = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[CompletionResponseChoice]
    usage: UsageInfo


class ModelPermission(BaseModel):
    """Kept for clients that read it; says that everything is allowed."""

    id: str = Field(default_factory=lambda: f"modelperm-{uuid.uuid4().hex}")
    object: str = "model_permission"
    created: int = Field(default_factory=lambda: int(time.time()))
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelInfo(BaseModel):
    """One entry of the model list."""

    id: str
    object: str = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "FastDeploy"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    permission: list[ModelPermission] = Field(default_factory=list)


class ModelList(BaseModel):
    """Body of `GET /v1/models`."""

    object: str = "list"
    data: list[ModelInfo] = Field(default_factory=list)
