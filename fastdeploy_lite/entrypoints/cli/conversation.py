"""A conversation and what answers it: a model in this process, or a server."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastdeploy_lite.entrypoints.cli.client import Client
from fastdeploy_lite.utils.errors import FastDeployError, RequestError, quote

if TYPE_CHECKING:
    from fastdeploy_lite.engine.sampling_params import SamplingParams
    from fastdeploy_lite.entrypoints.llm import LLM

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class AnswerText:
    """New text of an answer.

    Attributes:
        text: Of the answer.
        thinking: Of the model's reasoning.
    """

    text: str = ""
    thinking: str = ""


class Backend(Protocol):
    """What answers."""

    model: str
    reserve: int  # tokens that an answer may take

    def usage(self, messages: list[Message]) -> tuple[int, int] | None:
        """Tokens of the rendered conversation and of the whole context; None if not known."""

    def answer(self, messages: list[Message]) -> Generator[AnswerText, None, None]:
        """The pieces of an answer; closing the generator ends the work."""


class Local:
    """A model in this process.

    Args:
        llm: The model.
        sampling: For every answer.
        name: Shown to the user.
    """

    def __init__(self, llm: LLM, sampling: SamplingParams, name: str) -> None:
        self._llm = llm
        self._sampling = sampling
        self.model = name
        self.reserve = sampling.max_tokens or 0

    def usage(self, messages: list[Message]) -> tuple[int, int] | None:
        """See `Backend`."""
        return self._llm.count_chat_tokens(messages), self._llm.max_model_len

    def answer(self, messages: list[Message]) -> Generator[AnswerText, None, None]:
        """See `Backend`."""
        steps: Any = self._llm.chat(messages, self._sampling, use_tqdm=False, stream=True)
        try:
            for step in steps:
                for output in filter(None, step):
                    new = output.outputs
                    yield AnswerText(new.text or "", new.reasoning_content or "")
        finally:
            steps.close()


class Remote:
    """A server.

    Args:
        client: Knows its address.
        fields: Sampling fields of each request.
    """

    def __init__(self, client: Client, fields: dict[str, Any]) -> None:
        self._client = client
        self._fields = fields
        self.model = client.model
        self.reserve = int(fields.get("max_tokens") or 0)

    def usage(self, messages: list[Message]) -> tuple[int, int] | None:
        """See `Backend`; servers without `/tokenize` cannot say."""
        return self._client.count(messages)

    def answer(self, messages: list[Message]) -> Generator[AnswerText, None, None]:
        """See `Backend`."""
        body = {"messages": messages, **self._fields}
        for choice in self._client.stream("/chat/completions", body):
            delta = choice.get("delta") or {}
            thinking = delta.get("reasoning_content") or delta.get("reasoning") or ""
            yield AnswerText(delta.get("content") or "", thinking)


@dataclass
class Conversation:
    """Messages, first the system prompt if there is one.

    Attributes:
        messages: In OpenAI's form.
        dropped: Messages at the beginning that no longer fit and are not sent.
    """

    messages: list[Message] = field(default_factory=list)
    dropped: int = 0

    @property
    def system(self) -> str:
        """The system prompt, or nothing."""
        first = self.messages[0] if self.messages else {}
        return first.get("content", "") if first.get("role") == "system" else ""

    def set_system(self, text: str) -> None:
        """Replace, add or (with an empty text) remove the system prompt."""
        rest = self.messages[1:] if self.system else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages, self.dropped = [m for m in self.messages[:1] if self.system], 0

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": content})

    def drop_turn(self) -> bool:
        """Leave the oldest turn out of what is sent.

        Returns:
            Whether there was one beside the newest question.
        """
        turns = self._turns()
        later = [i for i in range(self.dropped + 1, len(turns)) if turns[i]["role"] == "user"]
        if not later:
            return False
        self.dropped = later[0]
        return True

    def sent(self) -> list[Message]:
        """What a request holds."""
        system = self.messages[:1] if self.system else []
        return [*system, *self._turns()[self.dropped :]]

    def _turns(self) -> list[Message]:
        return self.messages[1:] if self.system else self.messages

    def fit(self, backend: Backend) -> int:
        """Drop oldest turns until the prompt leaves room for an answer.

        Args:
            backend: Counts tokens and says how many an answer may take.

        Returns:
            Messages that were dropped now.
        """
        before = self.dropped
        while True:
            usage = backend.usage(self.sent())
            if usage is None:
                break
            used, limit = usage
            # An answer may be allowed to fill the whole context: it then gets a quarter of it.
            if used + min(backend.reserve, limit // 4) <= limit or not self.drop_turn():
                break
        return self.dropped - before

    def save(self, path: Path) -> None:
        """Write the messages as JSON.

        Raises:
            FastDeployError: The file cannot be written.
        """
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise FastDeployError(f"cannot write {quote(str(path))}: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Take the messages of a file that `save` wrote, or a JSON list of messages.

        Raises:
            FastDeployError: The file cannot be read or holds something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FastDeployError(f"cannot read {quote(str(path))}: {error.strerror}") from None
        except ValueError as error:
            raise FastDeployError(f"{quote(str(path))} is not JSON: {error}") from None
        found = data.get("messages") if isinstance(data, dict) else data
        if not isinstance(found, list) or not all(_is_message(i, m) for i, m in enumerate(found)):
            raise FastDeployError(f"{quote(str(path))} holds no list of messages")
        self.messages = [{"role": m["role"], "content": m["content"]} for m in found]
        self.dropped = 0


def _is_message(index: int, value: Any) -> bool:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        return False
    return isinstance(value.get("content"), str) and (index == 0 or value["role"] != "system")


def converse(
    backend: Backend, conversation: Conversation, text: str, notes: list[str]
) -> Iterator[AnswerText]:
    """Ask and record the answer, as far as it comes; a turn that fails is forgotten.

    Args:
        backend: What answers.
        conversation: Gets the question and the answer.
        text: The question.
        notes: Gets what the user should know before the answer.

    Yields:
        New text.

    Raises:
        FastDeployError: There is no answer.
    """
    before = len(conversation.messages)
    conversation.add("user", text)
    parts: list[str] = []
    try:
        _note_dropped(conversation.fit(backend), notes)
        for piece in _answer(backend, conversation, notes):
            parts.append(piece.text)
            yield piece
    except FastDeployError:
        if not parts:
            del conversation.messages[before:]
        raise
    finally:
        if len(conversation.messages) > before:  # stopped early, too
            conversation.add("assistant", "".join(parts))


def _answer(
    backend: Backend, conversation: Conversation, notes: list[str]
) -> Generator[AnswerText, None, None]:
    """The answer, without the oldest turns where the server says that the prompt is too long."""
    while True:
        pieces = backend.answer(conversation.sent())
        try:
            yield from pieces
            return
        except RequestError as error:
            before = conversation.dropped
            if "long" not in str(error) or not conversation.drop_turn():
                raise
            _note_dropped(conversation.dropped - before, notes)


def _note_dropped(count: int, notes: list[str]) -> None:
    if count:
        notes.append(f"the context is full: the {count} oldest messages are no longer sent")
