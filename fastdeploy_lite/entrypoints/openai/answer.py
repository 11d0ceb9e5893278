"""One answer under way, whatever form it leaves in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastdeploy_lite.entrypoints.openai.choices import Choice
from fastdeploy_lite.entrypoints.openai.protocol import (
    CompletionTokensDetails,
    GenerationRequest,
    PromptTokensDetails,
    UsageInfo,
)
from fastdeploy_lite.request.user_request import Request

Body = TypeVar("Body", bound=GenerationRequest)


@dataclass(slots=True)
class Answer(Generic[Body]):
    """What a client asked for and what has become of it.

    Attributes:
        body: The request, side channels merged.
        id: Public name of the answer.
        model: Public name of the model.
        created: Seconds since the epoch.
        top: Alternatives per token that are shown; None shows no log-probabilities.
        prompts: One request per prompt.
        shows_prompt: Whether the answer holds the prompt's text.
        scores_only: Whether the prompt is scored and nothing generated.
        choices: `n` per prompt, once the prompts are prepared.
        original: The client's body where it has another form.
    """

    body: Body
    id: str
    model: str
    created: int
    top: int | None
    prompts: list[Request]
    shows_prompt: bool = False
    scores_only: bool = False
    choices: list[Choice] = field(default_factory=list)
    original: Any = None

    def usage(self, reasoning_tokens: int = 0, later: int = 0) -> UsageInfo:
        """Token counts; a prompt with several choices counts once.

        Args:
            reasoning_tokens: Tokens of reasoning text, of all choices.
            later: What to add to the generated tokens: those of the next event are taken off.

        Returns:
            The usage.
        """
        each = max(len(self.choices) // max(len(self.prompts), 1), 1)
        firsts = self.choices[::each]
        prompt = sum(len(choice.request.prompt_token_ids) for choice in firsts)
        completion = sum(choice.num_tokens for choice in self.choices) + later
        cached = sum(choice.num_cached_tokens for choice in firsts)
        return UsageInfo(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
        )
