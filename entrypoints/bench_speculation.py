#!/usr/bin/env python3
"""What speculative decoding gives: tokens a second with and without it, side by side.

    python entrypoints/bench_speculation.py [--model demo] [--methods ngram,suffix]
        [--batches 1,4,16] [--max-tokens 128] [--rounds 5] [--json FILE] [--profile]

Three kinds of prompts: conversations, texts that the answer repeats, and random tokens, which give
nothing to guess. All engines are loaded at once and take turns, so that a machine whose speed
drifts favours none. A figure is the median of the rounds; the first round, in which costs and hit
rates are learnt, is left out. Answers of all engines are compared, token by token.
`--profile` also says where a step's time goes: in the model, in looking for guesses, in the rest
of the engine; what the policy believes that steps cost; and which functions take the host's time.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.engine.engine_core import EngineCore
from fastdeploy_lite.request.messages import DraftCounts
from fastdeploy_lite.speculation.rates import StepCosts

FORMS = ("请背诵《{}》", "《{}》的作者是谁？", "请分析《{}》", "《{}》的第一句是什么？")
TITLES = (
    "静夜思", "春晓", "登鹳雀楼", "相思", "江雪", "早发白帝城", "望庐山瀑布", "黄鹤楼",
    "送元二使安西", "凉州词", "出塞", "芙蓉楼送辛渐", "枫桥夜泊", "乌衣巷", "山行",
    "清明", "泊秦淮", "乐游原", "夜雨寄北", "鹿柴",
)  # fmt: skip
PASSAGES = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "In the beginning God created the heaven and the earth. ",
)
KINDS = ("chat", "repetition", "random")
Prompt = str | list[int]


def prompts(kind: str, count: int, vocab_size: int, seed: int) -> list[Prompt]:
    """Prompts of one kind; those of a chat and random ones differ by `seed`."""
    if kind == "chat":  # no question twice, as long as there are new ones
        numbers = range(seed * count, seed * count + count)
        asked = [FORMS[i // len(TITLES) % 4].format(TITLES[i % len(TITLES)]) for i in numbers]
        return [f"User: {question}\nAssistant: " for question in asked]
    if kind == "repetition":
        return [PASSAGES[i % len(PASSAGES)] * 6 for i in range(count)]
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size) for _ in range(64)] for _ in range(count)]


def counts(llm: LLM) -> DraftCounts:
    """The engine's totals so far."""
    return llm.llm_engine.stats().drafts or DraftCounts()


def measure(llm: LLM, asked: list[Prompt], params: SamplingParams) -> dict[str, Any]:
    """One run: tokens a second, the answers, and what guesses gave."""
    before = counts(llm)
    started = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    after = counts(llm)
    ids = [output.outputs.token_ids for output in outputs]
    return {
        "ids": ids,
        "tokens_per_second": sum(map(len, ids)) / seconds,
        "drafted": after.drafted - before.drafted,
        "accepted": after.accepted - before.accepted,
    }


def core_of(llm: LLM) -> EngineCore:
    """The engine core, which runs in this process."""
    return llm.llm_engine._core


def clocks(llm: LLM) -> dict[str, float]:
    """Totals of an engine: its steps and where their seconds went."""
    stats, speculator = llm.llm_engine.stats(), core_of(llm)._speculator
    return {
        "steps": stats.steps,
        "tokens": stats.generation_tokens,
        "step_s": stats.step_seconds,
        "model_s": stats.model_seconds,
        "guess_s": speculator.seconds if speculator else 0.0,
        "looks": speculator.looks if speculator else 0,
        "checks": speculator.totals.checks if speculator else 0,
    }


def breakdown(method: str, before: dict[str, float], after: dict[str, float]) -> str:
    """Where the time of an engine's steps went, in microseconds a step."""
    spent = {name: after[name] - before[name] for name in after}
    steps = max(spent["steps"], 1)
    micros = {name: 1e6 * spent[name] / steps for name in ("step_s", "model_s", "guess_s")}
    rest = micros["step_s"] - micros["model_s"] - micros["guess_s"]
    return (
        f"  {method}: {steps:.0f} steps of {micros['step_s']:.0f} us: model"
        f" {micros['model_s']:.0f}, looking {micros['guess_s']:.1f}, engine {rest:.0f};"
        f" tokens a step {spent['tokens'] / steps:.2f};"
        f" looks {spent['looks']:.0f}, sequences checked {spent['checks']:.0f}"
    )


def beliefs(llm: LLM) -> str:
    """What the policy of an engine has measured."""
    speculator = core_of(llm)._speculator
    if speculator is None:
        return ""

    def costs(steps: StepCosts) -> str:
        found = ((size, steps.larger(size, size)) for size in steps.sizes_noted)
        return ", ".join(f"{n}: {1e6 * f[1]:.0f}" if f else f"{n}: ?" for n, f in found)

    rates = {kind: round(rate.value, 2) for kind, rate in sorted(speculator._rates._own.items())}
    return (
        f"  us of a plain step by sequences: {costs(speculator._plain)}\n"
        f"  us of a step with guesses by tokens: {costs(speculator._checking)}\n"
        f"  rates by class of match: {rates}; purse {1e6 * speculator._purse.seconds:.0f} us"
    )


def functions(llm: LLM, asked: list[Prompt], params: SamplingParams) -> str:
    """The functions that take most of the host's time while prompts are answered."""
    profile = cProfile.Profile()
    profile.enable()
    llm.generate(asked, params, use_tqdm=False)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(22)
    lines = text.getvalue().splitlines()
    return "\n".join(line.replace(str(Path.cwd()), "") for line in lines if line.strip())


def row(kind: str, batch: int, method: str, runs: list[dict[str, Any]], plain: float) -> Any:
    """Medians of the rounds of one engine."""
    speeds = [run["tokens_per_second"] for run in runs]
    drafted = sum(run["drafted"] for run in runs)
    generated = sum(len(ids) for run in runs for ids in run["ids"])
    accepted = sum(run["accepted"] for run in runs)
    return {
        "prompts": kind,
        "batch": batch,
        "method": method,
        "tokens_per_second": round(statistics.median(speeds), 1),
        "least": round(min(speeds), 1),
        "most": round(max(speeds), 1),
        "ratio": round(statistics.median(speeds) / plain, 3),
        "acceptance": round(accepted / drafted, 3) if drafted else 0.0,
        "share_of_answer": round(accepted / generated, 3),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", default="ngram,suffix")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    shared = {
        "max_model_len": 1024, "num_gpu_blocks_override": 512, "max_num_seqs": max(batches)
    }  # fmt: skip
    engines = {"none": LLM(args.model, **shared)}
    for method in args.methods.split(","):
        engines[method] = LLM(args.model, speculative_config={"method": method}, **shared)
    vocab_size = engines["none"].llm_engine.preprocessor.config.model.vocab_size
    params = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, min_tokens=args.max_tokens - 1
    )
    rows, differing = [], 0
    for kind in KINDS:
        for batch in batches:
            runs: dict[str, list[dict[str, Any]]] = {method: [] for method in engines}
            before = {method: clocks(llm) for method, llm in engines.items()}
            for index in range(args.rounds + 1):
                asked = prompts(kind, batch, vocab_size, index)
                for method, llm in engines.items():
                    runs[method].append(measure(llm, asked, params))
                    differing += runs[method][-1]["ids"] != runs["none"][-1]["ids"]
            plain = statistics.median(run["tokens_per_second"] for run in runs["none"][1:])
            for method, llm in engines.items():
                rows.append(row(kind, batch, method, runs[method][1:], plain))
                print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
                if args.profile:
                    print(breakdown(method, before[method], clocks(llm)))
                    print(beliefs(llm), flush=True)
    if args.profile:
        for kind in ("random", "repetition"):
            for method, llm in engines.items():
                print(f"functions, {kind}, {method}, batch {batches[-1]}")
                asked = prompts(kind, batches[-1], vocab_size, args.rounds + 1)
                print(functions(llm, asked, params))
    print(f"runs whose answers differ from those without guesses: {differing}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
