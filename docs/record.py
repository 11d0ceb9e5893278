"""Records a terminal: real commands at their real pace, as asciinema's .cast and as an SVG.

python docs/record.py [FOLDER]       writes terminal.cast and terminal.svg

Waits longer than a second are shown as one second, as `asciinema rec --idle-time-limit 1` does.
"""

from __future__ import annotations

import codecs
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from wcwidth import wcswidth

COMMANDS = (
    'fastdeploy-lite generate "《静夜思》" --max-tokens 40 2>/dev/null',
    "fastdeploy-lite random-model --output random",
    "fastdeploy-lite quantize --model random --output random-2bits --scheme 2bits --quiet",
    "du -sh random random-2bits",
)
COLUMNS, ROWS = 92, 18
IDLE_SECONDS, END_SECONDS = 1.0, 4.0
CELL, LINE, MARGIN = 8.4, 20, 14
Event = tuple[float, str]


def record(commands: tuple[str, ...]) -> list[Event]:
    """Run the commands one after another in an empty folder.

    Returns:
        What appeared, and when, in seconds from the start.
    """
    events: list[Event] = [(0.0, "$ ")]
    clock = 0.5
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            events.append((clock, command + "\r\n"))
            last = time.monotonic()
            for text in _output(command, folder):
                now = time.monotonic()
                clock += min(now - last, IDLE_SECONDS)
                last = now
                events.append((clock, text))
            clock += min(time.monotonic() - last, IDLE_SECONDS)
            events.append((clock, "$ "))
            clock += 1.0
    return events


def _output(command: str, folder: str) -> Iterator[str]:
    """Pieces of a command's output, as they come through a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["sh", "-c", command], cwd=folder, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the last writer has closed it
            break
        if not data:
            break
        text = decoder.decode(data)
        if text:
            yield text
    os.close(master)
    if process.wait():
        raise SystemExit(f"{command}: ended with status {process.returncode}")


def cast(events: list[Event]) -> str:
    """asciinema's format, version 2."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "fastdeploy_lite"}
    lines = [header, *([round(t, 3), "o", text] for t, text in events)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@dataclass(frozen=True)
class Piece:
    """Text in one row of the screen."""

    time: float
    row: int
    column: int
    text: str


def lay_out(events: list[Event]) -> list[Piece]:
    """Where the text stands; knows line ends, tabs and full rows, no other control."""
    pieces: list[Piece] = []
    row, column = 0, 0
    for moment, text in events:
        for number, line in enumerate(text.replace("\r\n", "\n").split("\n")):
            if number:
                row, column = row + 1, 0
            rest = line.expandtabs(8)  # a tab comes after text of its own piece here
            while rest:
                fitting = _head(rest, COLUMNS - column)
                if fitting:
                    pieces.append(Piece(moment, row, column, fitting))
                column += wcswidth(fitting)
                rest = rest[len(fitting) :]
                if rest:
                    row, column = row + 1, 0
    return pieces


def _head(text: str, cells: int) -> str:
    """As much of a text as has room in so many cells."""
    while wcswidth(text) > cells:
        text = text[:-1]
    return text


def svg(events: list[Event]) -> str:
    """The recording as a moving picture; where nothing moves it shows the end."""
    pieces = lay_out(events)
    total = events[-1][0] + END_SECONDS
    width = round(COLUMNS * CELL + 2 * MARGIN)
    height = (max(piece.row for piece in pieces) + 1) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" font-size="14" '
        "font-family=\"ui-monospace, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', monospace\">",
        "<title>The demo model answers; a model of random weights is quantised</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#0f172a"/>',
    ]
    for piece in pieces:
        if not piece.text.strip():
            continue
        x, y = MARGIN + piece.column * CELL, MARGIN + piece.row * LINE + 14
        span = wcswidth(piece.text) * CELL
        colour = "#86efac" if piece.text == "$ " else "#e2e8f0"
        parts.append(
            f'<text x="{x:.1f}" y="{y}" textLength="{span:.1f}" lengthAdjust="spacingAndGlyphs" '
            f'fill="{colour}" xml:space="preserve">{escape(piece.text)}<animate '
            f'attributeName="opacity" values="0;1" keyTimes="0;{piece.time / total:.4f}" '
            f'calcMode="discrete" dur="{total:.2f}s" repeatCount="indefinite"/></text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main(folder: Path) -> None:
    events = record(COMMANDS)
    (folder / "terminal.cast").write_text(cast(events), encoding="utf-8")
    (folder / "terminal.svg").write_text(svg(events), encoding="utf-8")
    print(folder / "terminal.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "images")
