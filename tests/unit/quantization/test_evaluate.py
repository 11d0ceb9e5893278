"""entrypoints/evaluate.py: rendering of documents, windows, and scores against the oracle."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from oracles.ernie_float32 import ErnieFloat32
from tiny_model import write_tiny_model

from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.quantization.convert import quantize_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    path = REPOSITORY / "entrypoints" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up here
    spec.loader.exec_module(module)
    return module


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_documents_are_rendered_as_in_training(evaluate: ModuleType, demo_dir: Path) -> None:
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(demo_dir))
    text = evaluate.encode_document(tokenizer, {"text": "静夜思"})
    assert text == [*tokenizer.encode_text("静夜思"), 2]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = evaluate.encode_document(tokenizer, {"messages": messages})
    assert chat[0] == tokenizer.token_id("<|begin_of_sentence|>")
    assert tokenizer.decode(chat) == "<|begin_of_sentence|>User: Hi\nAssistant: Hello</s>"
    assert chat[-1 - len(tokenizer.encode_text("Hello")) :] == [*tokenizer.encode_text("Hello"), 2]


def test_windows_cover_the_stream_once(evaluate: ModuleType) -> None:
    parts = list(evaluate.windows(list(range(23)), 5, None))
    assert [token for part in parts for token in part] == list(range(23))
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    # A single token left over has nothing to be predicted from.
    assert [len(p) for p in evaluate.windows(list(range(23)), 5, 11)] == [5, 5]


@pytest.mark.parametrize("kind", ["bf16", "2bits"])
def test_perplexity_equals_the_oracles(evaluate: ModuleType, tmp_path: Path, kind: str) -> None:
    model = write_tiny_model(tmp_path / "model", kind=kind, experts=2)
    text = tmp_path / "text.jsonl"
    lines = [{"text": "床前明月光，疑是地上霜。" * 9}, {"text": "A peer of the realm."}]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    args = evaluate.parse_arguments(
        ["--text", str(text), "--context", "40", "--limit", "70", "--device", "cpu", str(model)]
    )
    runner = evaluate.load_runner(model, args.context, args.device)
    stream = evaluate.read_stream(Ernie4_5Tokenizer.from_pretrained(str(model)), text)
    oracle, expected = ErnieFloat32(model), []
    for window in evaluate.windows(stream, 40, 70):
        rows = log_softmax(oracle.logits(list(window)))
        targets = np.asarray(window[1:])
        expected.append(rows[np.arange(len(targets)), targets])
        found = evaluate.score(runner, window)
        np.testing.assert_allclose(found.logprobs, expected[-1], atol=2e-4)
        np.testing.assert_array_equal(found.argmax, rows.argmax(axis=1)[:-1])
    perplexity = float(np.exp(-np.concatenate(expected).mean()))
    line = evaluate.report_perplexity(runner, args, model)
    assert float(line.split("perplexity ")[1].split(",")[0]) == pytest.approx(perplexity, rel=1e-3)
    assert "68 tokens in windows of 40" in line


def test_a_bf16_model_is_scored_as_quantised(
    evaluate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The flag gives the line of the model that was converted beforehand."""
    model = write_tiny_model(tmp_path / "model", kind="bf16", experts=2)
    quantize_checkpoint(model, tmp_path / "wint4", scheme="wint4", progress=False)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "床前明月光，疑是地上霜。" * 9}) + "\n", encoding="utf-8")

    def scores(*arguments: str) -> list[str]:
        monkeypatch.setattr(
            sys, "argv", ["evaluate", "--text", str(text), "--device", "cpu", *arguments]
        )
        assert evaluate.main() == 0
        return [line.rsplit(",", 1)[0] for line in capsys.readouterr().out.splitlines()]

    plain, converted = scores(str(model), str(tmp_path / "wint4"))
    (quantised,) = scores("--quantization", "wint4", str(model))
    assert quantised.startswith(f"{model} (wint4): perplexity ")
    assert quantised.split(": ", 1)[1] == converted.split(": ", 1)[1] != plain.split(": ", 1)[1]


def test_agreement_with_recorded_values(evaluate: ModuleType, demo_bf16_dir: Path) -> None:
    """What the demo model's makers recorded in bf16 on a GPU; their README gives the tolerance."""
    reference = demo_bf16_dir / "reference_logprobs.json"
    args = evaluate.parse_arguments(
        ["--reference", str(reference), "--key", "bf16", "--device", "cpu", str(demo_bf16_dir)]
    )
    runner = evaluate.load_runner(demo_bf16_dir, args.context, args.device)
    line = evaluate.report_agreement(runner, args, demo_bf16_dir)
    assert float(line.split("mean |difference| ")[1].split(",")[0]) < 0.04
    assert float(line.split("same argmax ")[1].split("%")[0]) > 97.5
