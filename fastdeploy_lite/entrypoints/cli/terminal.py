"""The conversation in a terminal: line editing and history by prompt_toolkit, text by rich."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from fastdeploy_lite.entrypoints.cli.conversation import AnswerText, Backend, Conversation, converse
from fastdeploy_lite.utils.errors import FastDeployError
from fastdeploy_lite.utils.interrupts import Stop

HELP = """\
/clear          forget the conversation, keep the system prompt
/system [TEXT]  show the system prompt, or replace it
/save FILE      write the conversation as JSON
/load FILE      go on with a conversation of a file
/tokens         how much of the context is in use
/exit           leave (also Ctrl-D)
Enter sends, Alt-Enter or Ctrl-J begins a new line, Up and Down walk through earlier messages.
Ctrl-C stops an answer; what has come of it stays in the conversation."""
COMMANDS = ("/clear", "/system", "/save", "/load", "/tokens", "/exit", "/help")
REFRESH_PER_SECOND = 12


def run(backend: Backend, conversation: Conversation) -> int:
    """Converse until the user leaves.

    Args:
        backend: What answers.
        conversation: May hold a system prompt.

    Returns:
        The exit status.
    """
    return Terminal(backend, conversation, Console(highlight=False)).run()


class Terminal:
    """One session.

    Args:
        backend: What answers.
        conversation: What is talked about.
        console: Where to.
    """

    def __init__(self, backend: Backend, conversation: Conversation, console: Console) -> None:
        self._backend = backend
        self._conversation = conversation
        self._console = console
        self._stop = Stop()
        self._actions: dict[str, Callable[[str], None]] = {
            "/clear": self._clear, "/system": self._system, "/save": self._save,
            "/load": self._load, "/tokens": self._tokens, "/help": self._help,
        }  # fmt: skip

    def run(self) -> int:
        """Read and answer until the end of input."""
        with self._stop.heeded():
            return self._converse(_prompt_session())

    def _converse(self, prompt: PromptSession[str]) -> int:
        self._note(f"{self._backend.model}: /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                text = prompt.prompt("> ", multiline=True, prompt_continuation="  ").strip()
            except KeyboardInterrupt:
                continue  # the line is forgotten, as in a shell
            except EOFError:
                return 0
            if text == "/exit":
                return 0
            if text:
                self._take(text)

    def _take(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        try:
            if name in self._actions:
                with self._stop.possible():
                    self._actions[name](rest.strip())
            elif name.startswith("/") and name[1:].isalpha():
                self._note(f"no command {name}: /help lists them")
            else:
                self._turn(text)
        except FastDeployError as error:
            self._console.print(Text(f"error: {error}", "red"))
        except KeyboardInterrupt:
            self._note("stopped")

    def _turn(self, text: str) -> None:
        notes: list[str] = []
        answer = _Answer(self._console)
        pieces = converse(self._backend, self._conversation, text, notes)
        try:
            with self._stop.possible():
                for piece in pieces:
                    self._say(notes)
                    answer.add(piece)
        except KeyboardInterrupt:
            notes.append("stopped")
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator: ends the work at once
            answer.close()
            self._say(notes)
        self._note(answer.summary())

    def _say(self, notes: list[str]) -> None:
        while notes:
            self._note(notes.pop(0))

    def _note(self, text: str) -> None:
        if text:
            self._console.print(Text(text, "dim"))

    # Commands ------------------------------------------------------------------------------------

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._note("the conversation is empty")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(text)
        self._note(f"system prompt: {self._conversation.system or 'none'}")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        self._conversation.save(path)
        self._note(f"{len(self._conversation.messages)} messages written to {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        self._conversation.load(path)
        self._note(f"{len(self._conversation.messages)} messages read from {path}")

    def _tokens(self, _: str) -> None:
        messages = self._conversation.sent()
        usage = self._backend.usage(messages) if messages else None
        if usage is None:
            self._note("nothing was said yet" if not messages else "this server does not say")
            return
        used, limit = usage
        self._note(f"{used} of {limit} tokens of the context, {100 * used / limit:.0f} %")

    def _help(self, _: str) -> None:
        self._console.print(HELP)


def _path(name: str, command: str) -> Path:
    if not name:
        raise FastDeployError(f"{command} needs the name of a file")
    return Path(name).expanduser()


def _prompt_session() -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(),
        key_bindings=keys,
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
    )
    return session


def _history() -> History:
    """Earlier messages of this user; kept in memory where the file cannot be written."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    path = Path(base) / "fastdeploy_lite" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()


class _Answer:
    """Shows an answer while it comes.

    Whole Markdown blocks are printed for good; the one that is being written is drawn again and
    again, at most a screen of it, so that a long answer scrolls as any output does.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ""
        self._thinking = False
        self._started = time.perf_counter()
        self._first: float | None = None
        self._live = Live(
            console=console, refresh_per_second=REFRESH_PER_SECOND, transient=True,
            vertical_overflow="visible",
        )  # fmt: skip
        self._live.start()

    def add(self, piece: AnswerText) -> None:
        """Show new text."""
        if self._first is None and (piece.text or piece.thinking):
            self._first = time.perf_counter() - self._started
        if piece.thinking:
            self._think(piece.thinking)
        if piece.text:
            self._end_thinking()
            self._open += piece.text
            whole, self._open = split_blocks(self._open)
            self._print(whole)
            self._live.update(_Tail(Markdown(self._open)))

    def _think(self, text: str) -> None:
        self._thinking = True
        self._open += text
        self._live.update(_Tail(Text(self._open, "dim italic")))

    def _end_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._live.update(Text())
            self._console.print(Text(self._open.strip(), "dim italic"), Text())
            self._open = ""

    def _print(self, text: str) -> None:
        if text.strip():
            self._live.update(Text())
            self._console.print(Markdown(text.strip("\n")), Text())

    def close(self) -> None:
        """Print what is left."""
        self._end_thinking()
        self._live.update(Text())
        self._live.stop()
        if self._open.strip():
            self._console.print(Markdown(self._open.strip("\n")))

    def summary(self) -> str:
        """Time to the first text and to the end."""
        if self._first is None:
            return ""
        seconds = time.perf_counter() - self._started
        return f"first text after {self._first:.2f} s, {seconds:.1f} s in all"


class _Tail:
    """The last lines of something, as many as the screen has."""

    def __init__(self, content: Markdown | Text) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


def split_blocks(text: str) -> tuple[str, str]:
    """Split Markdown after its last block that is complete.

    Args:
        text: What has come so far.

    Returns:
        Blocks that no later text can change, and the rest.
    """
    cut = position = 0
    fence = ""
    for line in _lines(text):
        stripped = line.strip()
        marker = next((m for m in ("```", "~~~") if stripped.startswith(m)), "")
        if marker and fence in ("", marker):
            fence = "" if fence else marker
        position += len(line)
        # A list or a quote may go on after a blank line; cutting there renders the same.
        if not stripped and not fence and line.endswith("\n"):
            cut = position
    return text[:cut], text[cut:]


def _lines(text: str) -> Iterator[str]:
    yield from text.splitlines(keepends=True)
