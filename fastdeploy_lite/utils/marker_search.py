"""Markers in a text that comes in pieces: what is certain is given out once, in linear time."""

from __future__ import annotations


def held_length(text: str, markers: tuple[str, ...]) -> int:
    """Characters at the end of `text` that may be the beginning of a marker.

    Args:
        text: Contains no whole marker.
        markers: What may follow.

    Returns:
        The length of the longest such end.
    """
    most = max(map(len, markers), default=1) - 1
    lengths = range(min(most, len(text)), 0, -1)
    ends = ((n, text[len(text) - n :]) for n in lengths)
    return next((n for n, end in ends if any(m.startswith(end) for m in markers)), 0)


class MarkerSearch:
    """Finds the first of some markers.

    Args:
        *markers: None of them is the beginning of another.
    """

    def __init__(self, *markers: str) -> None:
        self._markers = markers
        self._held = ""

    def feed(self, piece: str, final: bool = False) -> tuple[str, str, str]:
        """Take in the next piece.

        Args:
            piece: New text.
            final: Whether nothing follows.

        Returns:
            Text before the marker that is certain and was not given out yet, the marker once found
            (else empty), and the text after it.
        """
        text = self._held + piece
        found = [(at, m) for m in self._markers if (at := text.find(m)) >= 0]
        if found:
            at, marker = min(found)
            self._held = ""
            return text[:at], marker, text[at + len(marker) :]
        held = 0 if final else held_length(text, self._markers)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], "", ""


class Opening:
    """Decides whether a text opens with one of some markers, blanks before it aside.

    Args:
        blanks: Characters that may stand before it.
        *markers: What is looked for.
    """

    def __init__(self, blanks: str, *markers: str) -> None:
        self._blanks = blanks
        self._markers = markers
        self._before: list[str] = []
        self._first = ""

    def feed(self, piece: str, final: bool = False) -> tuple[str, str] | None:
        """Take in the next piece.

        Args:
            piece: New text.
            final: Whether nothing follows.

        Returns:
            None while it is open; then the marker and the text after it, or no marker and the whole
            text so far.
        """
        if not self._first:
            stripped = piece.lstrip(self._blanks)
            self._before.append(piece[: len(piece) - len(stripped)])
            piece = stripped
        first = self._first = self._first + piece
        for marker in self._markers:
            if first.startswith(marker):
                return marker, first[len(marker) :]
        if not final and any(marker.startswith(first) for marker in self._markers):
            return None
        return "", "".join(self._before) + first
