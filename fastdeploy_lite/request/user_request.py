"""What goes in: one request as a user states it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastdeploy_lite.request.params import SamplingParams


@dataclass
class Request:
    """One request as a user states it, before it is turned into tokens.

    Exactly one of `prompt`, `prompt_token_ids` and `messages` says what to continue; token ids win.

    Attributes:
        request_id: Unique name.
        prompt: Text, tokenised as it is.
        prompt_token_ids: The prompt's tokens.
        messages: A conversation for the chat template, or token ids.
        sampling_params: What to do.
        tools: Tool definitions for the template.
        chat_template: Template text that overrides the model's.
        chat_template_kwargs: Variables for the template.
        trusted_template: Whether `chat_template` comes from whoever runs the program; a template
            from the network is rendered in a separate, bounded process.
        disable_chat_template: The first message's content is the prompt.
        add_generation_prompt: Whether the template opens the assistant's turn.
        continue_final_message: Whether the last message is the start of the answer, as text.
        completion_token_ids: Start of the answer, to be continued.
        include_stop_str_in_output: Whether the closing EOS shows in the text.
        thinking: Whether the answer starts inside the thinking; None asks the generation prompt.
        thinking_switch: What the request says where the generation prompt does not; None for
            nothing.
        assumes_thinking: What holds where neither does.
        arrival_time: Seconds since the epoch.
    """

    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    messages: Sequence[Any] | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    tools: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    trusted_template: bool = True
    disable_chat_template: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    completion_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    thinking: bool | None = None
    thinking_switch: bool | None = None
    assumes_thinking: bool = False
    arrival_time: float = field(default_factory=time.time)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Build a request from a flat mapping; sampling fields may stand beside the others."""
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        given.setdefault("sampling_params", SamplingParams.from_dict(values))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a flat mapping, sampling fields beside the others."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sampling_params"}
        return {**own, **asdict(self.sampling_params)}
