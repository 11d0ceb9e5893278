"""How good a model is on given text: perplexity, divergence from another model, right choices.

All figures come with 95 % intervals. Tokens of one window depend on each other, so an interval of a
mean over tokens is a bootstrap over windows, not over tokens; a comparison of two models resamples
both together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.config import (
    ActivationBits,
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    WantedOrder,
)
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.files import check_readable
from fastdeploy_lite.worker.model_runner import ModelRunner

CHUNK_TOKENS = 256
RESAMPLES = 2000
ArrayF64 = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (float64) of tokens 1.. of a window, and the argmax before each of them."""

    logprobs: ArrayF64
    argmax: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Divergence:
    """Two models on tokens 1.. of a window.

    Attributes:
        logprobs, reference_logprobs: of the tokens that follow.
        kl: nats from the reference's distribution to the model's, of every next token.
        same_top: whether both find the same token likeliest.
    """

    logprobs: ArrayF64
    reference_logprobs: ArrayF64
    kl: ArrayF64
    same_top: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """One question of a choice file: the token ids that precede, and those of each answer."""

    prompt: list[int]
    answers: list[list[int]]
    lengths: list[int]
    right: int


def load_runner(
    model: Path,
    context: int,
    device: str | None = None,
    quantization: str | None = None,
    row_order: WantedOrder = "auto",
    head: Literal["wint8"] | None = None,
    activation_bits: ActivationBits = 24,
) -> ModelRunner:
    """The product's model runner, ready for teacher-forced windows of `context` tokens.

    quantization: what becomes of bf16 weights while they are loaded: wint8 or wint4.
    row_order: of 2-bit experts. head: wint8 for an int8 output head. activation_bits: see
    RuntimeConfig.
    """
    scheduler = SchedulerConfig(
        max_num_seqs=1, max_num_batched_tokens=CHUNK_TOKENS, max_model_len=context
    )
    config = RuntimeConfig(
        model_path=model,
        model=ModelConfig.from_dir(model).with_quantization(quantization),
        scheduler=scheduler,
        load=LoadConfig(row_order=row_order, lm_head_quantization=head),
        activation_bits=activation_bits,
        device=device,
        use_cudagraph=False,
    )
    runner = ModelRunner(config)
    runner.load_model()
    return runner


def score(runner: ModelRunner, token_ids: Sequence[int]) -> Scores:
    """Score every token after the first, given all tokens before it."""
    targets = np.asarray(token_ids[1:])
    logprobs, argmax, done = [], [], 0
    for rows in runner.logits_chunks(token_ids):
        part = targets[done : done + len(rows)]  # the last row predicts beyond the window
        logits = log_softmax(rows[: len(part)])
        logprobs.append(logits[np.arange(len(part)), part])
        argmax.append(logits.argmax(axis=1))
        done += len(rows)
    return Scores(np.concatenate(logprobs), np.concatenate(argmax))


def diverge(runner: ModelRunner, reference: ModelRunner, token_ids: Sequence[int]) -> Divergence:
    """Compare two models on every token after the first."""
    return diverge_all([runner], reference, token_ids)[0]


def diverge_all(
    runners: Sequence[ModelRunner], reference: ModelRunner, token_ids: Sequence[int]
) -> list[Divergence]:
    """Compare several models with one, which runs once, on every token after the first."""
    targets = np.asarray(token_ids[1:])
    parts: list[list[Divergence]] = [[] for _ in runners]
    done = 0
    chunks = (runner.logits_chunks(token_ids) for runner in runners)
    for reference_rows, *rows in zip(reference.logits_chunks(token_ids), *chunks, strict=True):
        part = targets[done : done + len(reference_rows)]
        wanted = log_softmax(reference_rows[: len(part)])
        for found, own in zip(parts, rows, strict=True):
            found.append(_compare(log_softmax(own[: len(part)]), wanted, part))
        done += len(reference_rows)
    return [_joined(found) for found in parts]


def _compare(found: ArrayF64, wanted: ArrayF64, targets: npt.NDArray[np.int64]) -> Divergence:
    """Two models' rows of log-probabilities, before each of these tokens."""
    at = np.arange(len(targets)), targets
    kl = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    return Divergence(found[at], wanted[at], kl, found.argmax(axis=1) == wanted.argmax(axis=1))


def _joined(parts: Sequence[Divergence]) -> Divergence:
    """The chunks of a window as one."""
    columns = ("logprobs", "reference_logprobs", "kl", "same_top")
    return Divergence(*(np.concatenate([getattr(p, name) for p in parts]) for name in columns))


def log_softmax(logits: npt.NDArray[np.float32]) -> ArrayF64:
    """Log-probabilities of rows of logits, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True, initial=-np.inf)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def mean_interval(parts: Sequence[ArrayF64]) -> tuple[float, Interval]:
    """Mean over all values of windows, and its 95 % bootstrap interval over windows.

    One window says nothing of what others would: its interval is NaN to NaN.
    """
    sums = np.array([float(part.sum()) for part in parts])
    counts = np.array([part.size for part in parts], np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(parts) == 1:
        return mean, (math.nan, math.nan)
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(parts), (RESAMPLES, len(parts)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, (float(low), float(high))


def share_interval(hits: int, count: int) -> Interval:
    """95 % interval of a share (Wilson's)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (count + z * z)
    half = z * np.sqrt(hits * (count - hits) / count + z * z / 4) / (count + z * z)
    return float(centre - half), float(centre + half)


def read_choices(tokenizer: Ernie4_5Tokenizer, path: Path) -> Iterator[Question]:
    """Questions of a file: a line `{"question", "choices": [...], "answer": index or letter}`.

    Raises:
        ConfigError: the file is missing, or a line is not of that form; names the line.
    """
    check_readable(path, "a .jsonl file of questions")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _choice(tokenizer, line, f"{path}: line {number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, {error}") from error


def likeliest(runner: ModelRunner, question: Question, per_character: bool) -> int:
    """Index of the answer that the model finds likeliest after the question."""
    scores = []
    for answer, length in zip(question.answers, question.lengths, strict=True):
        found = score(runner, [*question.prompt, *answer]).logprobs[-len(answer) :].sum()
        scores.append(found / length if per_character else found)
    return int(np.argmax(scores))


def _choice(tokenizer: Ernie4_5Tokenizer, line: str, where: str) -> Question:
    try:
        question, answers, right = _fields(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f'{where}: expected {{"question": text, "choices": [text, ...], "answer": index}}: '
            f"{error}"
        ) from None
    prompt = list(tokenizer.encode_text(question))
    encoded = [list(tokenizer.encode_text(text)) for text in answers]
    return Question(prompt, encoded, [len(text) for text in answers], right)


def _fields(data: Any) -> tuple[str, list[str], int]:
    """Question, choices and the index of the right one; ValueError says what is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"found {quote(data)}")
    question, answers, right = (data.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question:
        raise ValueError(f"question: found {quote(question)}")
    texts = answers if isinstance(answers, list) else []
    if len(texts) < 2 or not all(isinstance(a, str | int | float) and a != "" for a in texts):
        raise ValueError(f"choices: found {quote(answers)}, expected at least two texts")
    if isinstance(right, str) and len(right) == 1 and "A" <= right.upper() <= "Z":
        right = ord(right.upper()) - ord("A")
    if isinstance(right, str) and right.isdecimal():
        right = int(right)
    if type(right) is not int or not 0 <= right < len(texts):
        found = quote(data.get("answer"))
        raise ValueError(
            f"answer: found {found}, expected the place of one of {len(texts)} choices"
        )
    return question, [str(text) for text in texts], right
