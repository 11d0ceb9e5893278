"""The terminal chat through a pseudo-terminal, and completion in a real shell."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pexpect
import pytest
from server_process import ServerProcess, environment
from waiting import until

MAIN = ("-m", "fastdeploy_lite.entrypoints.cli.main")
PROMPT = r"\x1b\[\?2004h"  # the line editor asks for bracketed pastes when it waits for a line
LONG = "解析三首李白的诗"  # the demo writes several hundred tokens


def heed_interrupts() -> None:
    """Tests that were started in the background inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts a chat in a terminal of 24 lines."""
    children: list[Any] = []

    def spawn(*flags: str) -> Any:
        extra = {
            "TERM": "xterm", "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path),
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers where the cursor is
        }  # fmt: skip
        child = pexpect.spawn(
            sys.executable, [*MAIN, "chat", *flags], cwd=str(tmp_path), encoding="utf-8",
            env=environment(extra), dimensions=(24, 80), timeout=120, preexec_fn=heed_interrupts,
        )  # fmt: skip
        children.append(child)
        child.expect("lists the commands")
        child.expect(PROMPT)
        return child

    yield spawn
    for child in children:
        child.close(force=True)


def command(child: Any, text: str, answer: str) -> Any:
    """Send a line once the editor waits for one; gives the match of what is said to it."""
    child.expect(PROMPT)
    child.send(f"{text}\r")
    child.expect(answer)
    return child.match


def test_a_conversation(start: Any, tmp_path: Path) -> None:
    child = start("--temperature", "0", "--max-tokens", "40", "--system-prompt", "Be brief.")
    child.send("What is\x1b\ra gourd?\r")  # Alt-Enter begins a new line
    child.expect("in all")
    found = command(child, "/tokens", r"(\d+) of \d+ tokens of the context")
    assert int(found[1]) > 20
    command(child, "/save talk.json", "3 messages written")
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert saved[1]["content"] == "What is\na gourd?"
    command(child, "/clear", "the conversation is empty")
    command(child, "/system Answer in Chinese.", "system prompt: Answer in Chinese.")
    command(child, "/load talk.json", "3 messages read")
    command(child, "/load absent.json", "error: cannot read 'absent.json'")
    command(child, "/nonsense", "no command /nonsense")
    child.expect(PROMPT)
    child.send("/exit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    history = (tmp_path / "fastdeploy_lite" / "chat_history").read_text(encoding="utf-8")
    assert "a gourd?" in history


@pytest.mark.parametrize("where", ["here", "server"])
def test_ctrl_c_stops_the_answer_only(
    start: Any, server: ServerProcess, where: str, tmp_path: Path
) -> None:
    flags = ("--url", server.url) if where == "server" else ()
    child = start("--temperature", "0", "--max-tokens", "1500", *flags)
    child.send(f"{LONG}\r")
    child.expect("李白")
    child.expect("。")
    child.sendintr()
    child.expect("stopped")
    if where == "server":
        server.wait_idle()  # its request is aborted, not left to run
    command(child, "/save cut.json", "2 messages written")
    saved = json.loads((tmp_path / "cut.json").read_text(encoding="utf-8"))["messages"]
    assert 0 < len(saved[1]["content"]) < 2000
    child.expect(PROMPT)
    child.sendintr()  # forgets the line, does not leave
    command(child, "/tokens", "tokens of the context")
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_arrows_walk_through_the_history(start: Any) -> None:
    child = start("--temperature", "0", "--max-tokens", "4")
    child.send("remember me\r")
    child.expect("in all")
    child.expect(PROMPT)
    child.send("\x1b[A")
    child.expect("remember me")
    child.send("\r")
    child.expect("in all")


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
function_name=$(complete -p fastdeploy-lite | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function_name" fastdeploy-lite "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion(tmp_path: Path) -> None:
    script = subprocess.run(
        [sys.executable, *MAIN, "completion", "bash"],
        check=True, capture_output=True, text=True, env=environment(), cwd=tmp_path,
    ).stdout  # fmt: skip
    (tmp_path / "complete.bash").write_text(script)

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "complete.bash"), *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.split()

    assert complete("fastdeploy-lite", "quan") == ["quantize"]
    assert complete("fastdeploy-lite", "serve", "--max-mod") == ["--max-model-len"]
    assert "--num-prompts" in complete("fastdeploy-lite", "bench", "serve", "--n")
    assert complete("fastdeploy-lite", "serve", "--enable-epl") == []  # without effect


def is_heard(child: Any, keys: str, answer: Any) -> bool:
    """Whether the editor takes keys: what is typed before it waits, an interrupt may delete."""
    child.send(keys)
    return child.expect([answer, pexpect.TIMEOUT], timeout=2) == 0


@pytest.mark.parametrize("where", ["here", "server"])
def test_ctrl_c_in_haste_does_not_leave(start: Any, server: ServerProcess, where: str) -> None:
    """The second and the third come while the answer is being put away, or a command works."""
    flags = ("--url", server.url) if where == "server" else ()
    child = start("--temperature", "0", "--max-tokens", "1500", *flags)
    for pause in (0.0, 0.001, 0.01, 0.1):
        child.send(f"{LONG}\r")
        child.expect("李白")
        for _ in range(8):
            child.sendintr()
            time.sleep(pause)
        until(partial(is_heard, child, "/clear\r", "the conversation is empty"))
    until(partial(is_heard, child, "\x04", pexpect.EOF))
    child.close()
    assert child.exitstatus == 0
