"""Just enough SVG for the pictures of these pages: text, boxes, arrows, one plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

INK, SOFT, LINE, BACK = "#1f2937", "#6b7280", "#d1d5db", "#ffffff"
BLUE, GREEN, ORANGE, RED, VIOLET = "#2563eb", "#059669", "#d97706", "#dc2626", "#7c3aed"
PALE = {BLUE: "#dbeafe", GREEN: "#d1fae5", ORANGE: "#fef3c7", RED: "#fee2e2", VIOLET: "#ede9fe"}
_FONT = "system-ui, 'Segoe UI', 'Noto Sans', sans-serif"


class Picture:
    """A picture on white, so that it can be read on a dark page too.

    Args:
        width: In pixels, as all lengths.
        height: In pixels.
        title: What a reader hears who does not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="{_FONT}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/>'
            "</marker></defs>",
        ]
        self.box(0, 0, width, height, BACK, BACK)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE,
        text: str = "", size: int = 13,
    ) -> None:  # fmt: skip
        """A rectangle, with a line of text in its middle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + size * 0.36, text, size, middle=True)

    def text(
        self, x: float, y: float, text: str, size: int = 13, colour: str = INK,
        middle: bool = False, end: bool = False, bold: bool = False,
    ) -> None:  # fmt: skip
        """A line of text from, around or up to x."""
        anchor = "middle" if middle else "end" if end else "start"
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = SOFT, arrow: bool = False,
        dashed: bool = False, width: float = 1.5,
    ) -> None:  # fmt: skip
        """A straight line."""
        more = ' marker-end="url(#head)"' if arrow else ""
        more += ' stroke-dasharray="4 4"' if dashed else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"{more}/>'
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 5) -> None:
        """A filled circle."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self._parts, "</svg>", ""]), encoding="utf-8")


class Axes:
    """The frame of a plot in a picture; `x` and `y` turn values into pixels.

    Args:
        picture: Where to.
        x_ticks: Values at the marks of the horizontal axis, its ends included.
        y_ticks: The same of the vertical axis.
        log_x: Whether distances on the horizontal axis are ratios.
    """

    LEFT, TOP, WIDTH, HEIGHT = 70.0, 60.0, 600.0, 300.0

    def __init__(
        self, picture: Picture, x_ticks: Sequence[float], y_ticks: Sequence[float],
        x_title: str, y_title: str, log_x: bool = False,
    ) -> None:  # fmt: skip
        scale: Callable[[float], float] = math.log if log_x else float
        low, high = scale(x_ticks[0]), scale(x_ticks[-1])
        self.x = lambda v: self.LEFT + (scale(v) - low) / (high - low) * self.WIDTH
        bottom, top = y_ticks[0], y_ticks[-1]
        self.y = lambda v: self.TOP + (top - v) / (top - bottom) * self.HEIGHT
        for value in y_ticks:
            picture.line(self.LEFT, self.y(value), self.LEFT + self.WIDTH, self.y(value), LINE)
            picture.text(self.LEFT - 8, self.y(value) + 4, f"{value:,g}", 12, SOFT, end=True)
        for value in x_ticks:
            picture.text(self.x(value), self.TOP + self.HEIGHT + 20, f"{value:g}", 12, SOFT, True)
        picture.text(
            self.LEFT + self.WIDTH / 2, self.TOP + self.HEIGHT + 42, x_title, 13, INK, True
        )
        picture.text(self.LEFT - 50, self.TOP - 14, y_title, 13)
