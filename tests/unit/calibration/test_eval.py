"""`fastdeploy-lite eval`: figures against numpy, intervals, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles.ernie_float32 import ErnieFloat32
from tiny_model import write_tiny_model

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.calibration.text import read_stream, windows
from fastdeploy_lite.entrypoints import evaluation
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.quantization.weight_only import quantize_int8
from fastdeploy_lite.utils.errors import ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("eval")
    model = write_tiny_model(folder / "bf16", kind="bf16", experts=2)
    quantize_checkpoint(model, folder / "wint4", scheme="wint4", progress=False)
    return model, folder / "wint4"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("床前明月光，疑是地上霜。\n\n" * 12 + "A peer of the realm.", encoding="utf-8")
    return file


def measured(tmp_path: Path, *arguments: str) -> dict[str, object]:
    file = tmp_path / "figures.json"
    assert cli.run(["eval", *arguments, "--device", "cpu", "--json", str(file)]) == 0
    found: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return found


def log_softmax(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return (
        wide
        - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
        - (wide.max(1, keepdims=True))
    )


def test_divergence_and_perplexity_are_the_oracles(
    models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    model, quantized = models
    found = measured(tmp_path, "kl", "--model", str(quantized), "--against", str(model),
                     "--text", str(text), "--context", "48", "--limit", "140")  # fmt: skip
    stream = read_stream(Ernie4_5Tokenizer.from_pretrained(str(model)), text)
    kl, loss, same = [], [], []
    for window in windows(stream, 48, 140):
        q, p = (log_softmax(ErnieFloat32(m).logits(window))[:-1] for m in (quantized, model))
        at = np.arange(len(q)), np.array(window[1:])
        kl.append((np.exp(p) * (p - q)).sum(1))
        loss.append(-q[at])
        same.append(p.argmax(1) == q.argmax(1))
    assert found["kl"][0] == pytest.approx(np.concatenate(kl).mean(), rel=1e-2)
    assert found["kl"][1] <= found["kl"][0] <= found["kl"][2]
    assert found["nats a token"][0] == pytest.approx(np.concatenate(loss).mean(), rel=1e-4)
    assert found["same likeliest token"][0] == pytest.approx(np.concatenate(same).mean(), abs=0.02)
    assert found["tokens"] == 140 - 3


def test_a_model_does_not_diverge_from_itself(
    models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    model = str(models[0])
    found = measured(tmp_path, "kl", "--model", model, "--against", model, "--text", str(text),
                     "--limit", "60", "--context", "30")  # fmt: skip
    assert found["kl"] == [0, 0, 0]
    assert found["same likeliest token"] == [1, 1, 1]


def test_an_int8_head_is_the_models_alone(
    models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    """Against the model itself: what rounding the head costs, and as the oracle has it."""
    model = models[0]
    found = measured(tmp_path, "kl", "--model", str(model), "--against", str(model), "--text",
                     str(text), "--limit", "60", "--lm-head-quantization", "wint8")  # fmt: skip
    oracle = ErnieFloat32(model)
    (window,) = windows(read_stream(Ernie4_5Tokenizer.from_pretrained(str(model)), text), 1024, 60)
    head = oracle._head()
    p, q = (
        log_softmax(oracle.hidden(window) @ matrix)[:-1]
        for matrix in (head, quantize_int8(head).dequantize())
    )
    expected = (np.exp(p) * (p - q)).sum(1).mean()
    assert expected > 1e-6
    assert found["kl"][0] == pytest.approx(expected, rel=0.05)


def test_coarser_activations_are_the_models_alone(
    models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    model = str(models[1])
    found = measured(tmp_path, "kl", "--model", model, "--against", model, "--text", str(text),
                     "--limit", "60", "--activation-bits", "16")  # fmt: skip
    assert 0 < found["kl"][0] < 1e-4


def test_choices_are_what_the_likelihoods_say(models: tuple[Path, Path], tmp_path: Path) -> None:
    model = models[0]
    questions = [
        {"question": "床前明月光，", "choices": ["疑是地上霜", "A peer"], "answer": 0},
        {"question": "A peer of", "choices": ["月", "the realm.", "光"], "answer": "B"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    tokenizer, oracle = Ernie4_5Tokenizer.from_pretrained(str(model)), ErnieFloat32(model)
    hits = 0
    for question, right in zip(questions, (0, 1), strict=True):
        prompt = tokenizer.encode_text(question["question"])
        scores = []
        for choice in question["choices"]:
            answer = tokenizer.encode_text(choice)
            rows = log_softmax(oracle.logits([*prompt, *answer]))[len(prompt) - 1 : -1]
            scores.append(rows[np.arange(len(answer)), answer].sum())
        hits += int(np.argmax(scores)) == right
    found = measured(tmp_path, "choice", "--model", str(model), "--text", str(file))
    assert found["accuracy"][0] == hits / 2
    assert found["questions"] == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("3", "found 3"),
        ('{"question": "", "choices": ["a", "b"], "answer": 0}', "question: found ''"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "choices: found 'ab'"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "choices: found ['a']"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "choices: found ['a', '']"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer: found 2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "answer: found 'C'"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer: found True"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0.7}', "answer: found 0.7"),
        ('{"question": "q", "choices": ["a", "b"]}', "answer: found None"),
        ("\udcff", "expected text in UTF-8"),
    ],
)
def test_questions_that_are_none_are_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n" + line, encoding="utf-8", errors="surrogateescape")
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(demo_path()))
    with pytest.raises(ConfigError) as caught:
        list(evaluation.read_choices(tokenizer, file))
    assert words in str(caught.value)
    assert "line 2" in str(caught.value) or "UTF-8" in words


def test_the_demo_on_the_packaged_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their names. One window has no interval: it was shown as one of no width."""
    asked = ["perplexity", "--model", "demo", "--text", "sample", "--limit", "60"]
    one = measured(tmp_path, *asked)
    value, low, high = one["perplexity"]
    assert value > 1
    assert (low, high) == (None, None)
    assert "no interval: a single window" in capsys.readouterr().out
    _, low, high = measured(tmp_path, *asked, "--context", "20")["perplexity"]
    assert low < high


def test_what_cannot_be_written_is_told_before_the_work(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["perplexity", "--model", str(models[0]), "--text", str(text), "--json", str(tmp_path)]
    assert cli.run(["eval", *call]) == 1
    found = capsys.readouterr()
    assert f"--json {tmp_path}: found a folder" in found.err
    assert not found.out


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        # Values of one window share a part: an interval over values would be far too narrow.
        parts = [rng.normal() + rng.normal(size=30) for _ in range(40)]
        low, high = evaluation.mean_interval(parts)[1]
        covered += low <= 0 <= high
    assert covered >= 85
    low, high = evaluation.share_interval(0, 20)
    assert low == pytest.approx(0)
    assert 0.1 < high < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kl"], "--against is missing"),
        (["perplexity", "--context", "1"], "must be at least 2"),
        (["choice"], "line 1: expected"),
        (["choice", "--limit", "50"], "--limit counts tokens of a text"),
        (["perplexity", "--per-character"], "--per-character belongs to choice"),
        (["perplexity", "--device", "tpu"], "device: found 'tpu', expected one of auto"),
    ],
)
def test_bad_calls_are_one_line(
    models: tuple[Path, Path],
    text: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = [arguments[0], "--model", str(models[0]), "--text", str(text), *arguments[1:]]
    assert cli.run(["eval", *call]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_wrong_row_order_is_warned_of_and_is_garbage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the flag, which wins, and by the variable that the server reads, too."""
    poems = tmp_path / "poems.txt"
    question = "User: 背诵李白的静夜思\nAssistant: "
    poems.write_text(f"{question}床前明月光，疑是地上霜。", encoding="utf-8")
    asked = ["perplexity", "--model", str(demo_path()), "--text", str(poems)]
    right = measured(tmp_path, *asked)
    assert not caplog.records
    monkeypatch.setenv("FD_LITE_WINT2_ROW_ORDER", "permuted")
    wrong = measured(tmp_path, *asked)
    assert "2-bit rows are read in permuted order, but look natural" in caplog.text
    assert wrong["perplexity"][0] > 5 * right["perplexity"][0]
    assert wrong["perplexity"][0] > 500
    again = measured(tmp_path, *asked, "--wint2-row-order", "natural")
    assert again["perplexity"] == right["perplexity"]
