"""After which layers a killed run goes on: what of the journal holds the streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdeploy_lite.quantization.journal import Journal, LayerResult


class RestartPoints:
    """Which finished layers keep the streams behind them: the last one worth it, and no other."""

    def __init__(self, journal: Journal, every: float, count: int, keep_end: bool) -> None:
        """`keep_end`: tuning begins with the streams behind the last of `count` layers."""
        self.journal, self._every, self._count, self._keep_end = journal, every, count, keep_end
        self._kept: int | None = None
        self._at_risk = 0.0

    def resume(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Figures of the layers that need not be made again, and the streams behind them."""
        found = list(self._finished())
        kept = [layer for layer, (_, has_state) in enumerate(found) if has_state]
        for layer in kept[:-1]:  # killed between writing one state and dropping the one before
            self.journal.forget_state(layer)
        self._kept = kept[-1] if kept else None
        done = len(found)
        if done < self._count or self._keep_end:
            done = 0 if self._kept is None else self._kept + 1
        last = self.journal.load(done - 1) if 0 < done < self._count else None
        return [figures for figures, _ in found[:done]], {} if last is None else last.state

    def save(self, layer: int, result: LayerResult) -> None:
        """Keep a finished layer, and its state where enough work would be lost without."""
        self._at_risk += result.figures["seconds"]
        last = layer == self._count - 1
        if not (self._keep_end if last else self._at_risk >= self._every):
            result.state = {}
        self.journal.save(layer, result)
        if result.state:
            if self._kept is not None:
                self.journal.forget_state(self._kept)
            self._kept, self._at_risk = layer, 0.0

    def _finished(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """The first layers, up to the first that is not there or damaged."""
        for layer in range(self._count):
            found = self.journal.finished(layer)
            if found is None:
                return
            yield found
