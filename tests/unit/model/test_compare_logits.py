"""The script that compares logits over a text file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles.compare_logits import Errors, compare

from fastdeploy_lite.worker.model_runner import ModelRunner


@pytest.fixture
def text(tmp_path: Path) -> Path:
    documents = [
        {"text": "床前看月光，疑是地上霜。"},
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
            ]
        },
    ]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps(document) for document in documents), encoding="utf-8")
    return path


def test_a_sound_model_agrees(tiny_w4w2: Path, text: Path) -> None:
    line = compare(tiny_w4w2, text, context=16, limit=None, wide=True)
    assert line.startswith(str(tiny_w4w2))
    worst = float(line.split("max |error| ")[1].split(",")[0])
    assert 0 < worst < 1e-3


def test_a_wrong_product_is_seen(
    tiny_w4w2: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ModelRunner.logits

    def shifted(self: ModelRunner, token_ids: list[int]) -> np.ndarray[tuple[int, int], np.dtype]:
        return np.roll(original(self, token_ids), 1, axis=1)

    monkeypatch.setattr(ModelRunner, "logits", shifted)
    line = compare(tiny_w4w2, text, context=16, limit=20, wide=False)
    assert "20 tokens" in line
    assert float(line.split("max |error| ")[1].split(",")[0]) > 1
    assert "same argmax 0/" in line


def test_figures_of_parts_are_joined_by_token() -> None:
    expected = np.zeros((3, 4), np.float32)
    expected[:, 2] = 1.0
    found = expected.copy()
    found[2, 3] = 1.5
    parts = [Errors.between(found[:1], expected[:1]), Errors.between(found[1:], expected[1:])]
    joined = Errors.joined(parts)
    assert (joined.tokens, joined.same_argmax, joined.worst, joined.widest_gap) == (3, 2, 1.5, 1.0)
    assert joined.mean == pytest.approx(1.5 / 12)
