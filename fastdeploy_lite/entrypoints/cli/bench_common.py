"""Prompts, percentiles and tables of the benchmarks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_lite.utils.errors import ConfigError

# fmt: off
WORDS = ("time", "water", "moon", "mountain", "river", "light", "spring", "wind", "night", "home",
         "old", "friend", "road", "song", "wine")
# fmt: on


@dataclass(slots=True)
class BenchRequest:
    """One request: its text, and how many tokens to ask for."""

    prompt: str
    output_len: int


def random_requests(
    count: int, input_len: int, output_len: int, prefix_len: int = 0, seed: int = 0
) -> list[BenchRequest]:
    """Prompts of random words; a word is one to three tokens, by the vocabulary (the demo: 2.2).

    Args:
        count: How many.
        input_len: Words of each prompt, the common prefix not included.
        output_len: Tokens to generate.
        prefix_len: Words that all prompts begin with.
        seed: Makes them repeatable.

    Returns:
        The requests.
    """
    rng = random.Random(seed)
    prefix = " ".join(rng.choices(WORDS, k=prefix_len))
    prompts = (" ".join(rng.choices(WORDS, k=max(input_len, 1))) for _ in range(count))
    return [BenchRequest(f"{prefix} {p}".strip(), output_len) for p in prompts]


def sharegpt_requests(path: str, count: int, output_len: int | None) -> list[BenchRequest]:
    """First turns of conversations in ShareGPT's form.

    Args:
        path: JSON file: a list of objects with `conversations` of `value` texts.
        count: How many at most.
        output_len: Tokens to generate; None takes a quarter of the answer's characters.

    Returns:
        The requests.

    Raises:
        ConfigError: The file cannot be used.
    """
    if not path:
        raise ConfigError("--dataset-path is missing: the ShareGPT JSON file to read")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--dataset-path {path}: {error}") from None
    requests = []
    for entry in data if isinstance(data, list) else []:
        turns = _turns(entry)
        if len(turns) >= 2 and turns[0]:
            length = output_len or max(len(turns[1]) // 4, 1)
            requests.append(BenchRequest(turns[0], length))
    if not requests:
        raise ConfigError(f"--dataset-path {path}: no conversation of two turns")
    return requests[:count]


def _turns(entry: Any) -> list[str]:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    found = turns if isinstance(turns, list) else []
    return [str(turn.get("value", "")) for turn in found if isinstance(turn, dict)]


def percentiles(values: Sequence[float], wanted: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles.

    Args:
        values: Observations.
        wanted: Percentiles, 0 to 100.

    Returns:
        `mean`, `p50`, ...; zeros when there is nothing.
    """
    array = np.asarray(values if len(values) else [0.0], dtype=np.float64)
    named = {f"p{p:g}": float(np.percentile(array, p)) for p in wanted}
    return {"mean": float(array.mean()), **named}


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    print(f"{title:=^60}")
    for name, value in rows:
        print(f"{name:<40}{value:>20}")
    print("=" * 60)


def save(path: str | None, result: dict[str, Any]) -> None:
    """Write a result as JSON when a path is given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1), encoding="utf-8")
