#!/usr/bin/env python3
"""What speculative decoding gives: the time of plain decoding over the time with it.

    python entrypoints/bench_speculation.py [--model demo] [--methods ngram,suffix]
        [--batches 1,4,16] [--max-tokens 128] [--rounds 16] [--json FILE] [--profile]
        [--draft-model DIR]  (for mtp)

Three kinds of prompts: conversations, texts that the answer repeats, and random tokens, which give
nothing to guess. Plain decoding and each method answer the same prompts in one engine and take
turns, 8 tokens of each sequence at a time in a random order: the same weights and buffers at the
same addresses, and what else the machine does meets all alike. Who gets which KV blocks changes
with every round. `again` is plain decoding once more: what its ratio differs from 1 is the noise of
the measurement. Methods are compared with both.

A ratio is that of the sums over all turns, with its 95 % bootstrap interval over rounds; by the
clock, and by the processor's time, which other processes hardly disturb. Reading the prompts is
left out, learning is not: a policy keeps what it learnt from one row to the next, as in a server.
Answers of all are compared, token by token; on a card they have to be equal with
FD_DETERMINISTIC_MODE=1, without it near ties may fall otherwise in a step of another size.
`--profile` also says where a step's time goes: in the model, in looking for guesses, in the rest
of the engine; what the policy believes that steps cost; and which functions take the host's time.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import pstats
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_lite import LLM, SamplingParams, device, envs
from fastdeploy_lite.benchmarks.turns import ratio_interval
from fastdeploy_lite.engine.engine_core import EngineCore
from fastdeploy_lite.engine.scheduler import Sequence
from fastdeploy_lite.speculation.config import DEFAULT_TOKENS, SpeculativeConfig
from fastdeploy_lite.speculation.rates import StepCosts, StepSeconds
from fastdeploy_lite.speculation.speculator import Speculator
from fastdeploy_lite.utils.host_memory import keep_what_is_loaded

FORMS = (
    "请背诵《{}》", "《{}》的作者是谁？", "请分析《{}》", "《{}》的第一句是什么？",
    "《{}》写于哪个朝代？", "请解释《{}》", "《{}》好在哪里？", "请翻译《{}》",
    "《{}》写了什么景物？", "《{}》的最后一句是什么？", "谁喜欢《{}》？", "请续写《{}》",
    "《{}》有几句？", "请介绍《{}》的作者",
)  # fmt: skip
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
PLAIN, AGAIN = "none", "again"
# What a policy is told of steps of each kind: how many, their seconds, those beside the executor,
# those of looks in them, tokens, and seconds of plain steps that would have given as many.
PARTS = ("n", "s", "beside_s", "look_s", "tokens", "plain_s")
TOLD = [f"{kind}_{part}" for kind in ("plain", "check", "prompt") for part in PARTS]
TOKENS_A_TURN = 8
MAX_MODEL_LEN, BLOCKS_A_SEQUENCE = 1024, 16
Prompt = str | list[int]


def prompts(kind: str, count: int, vocab_size: int, seed: int) -> list[Prompt]:
    """Prompts of one kind; those of a chat and random ones differ by `seed`."""
    if kind == "chat":  # no question twice, as long as there are new ones
        numbers = range(seed * count, seed * count + count)
        pairs = [(FORMS[i // len(TITLES) % len(FORMS)], TITLES[i % len(TITLES)]) for i in numbers]
        return [f"User: {form.format(title)}\nAssistant: " for form, title in pairs]
    if kind == "repetition":
        return [PASSAGES[i % len(PASSAGES)] * 6 for i in range(count)]
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size) for _ in range(64)] for _ in range(count)]


@dataclass
class Row:
    """What one contestant did with all prompts of a row.

    Attributes:
        wall, cpu: seconds of each round.
        tokens: of all answers.
        totals: of the engine and the policy over these turns, see `Contestant.totals`.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: int = 0
    totals: dict[str, float] = field(default_factory=dict)


class Garbage:
    """Measures what Python's collector of garbage takes.

    Attributes:
        seconds: so far.
        runs: collections.
    """

    def __init__(self) -> None:
        self.seconds, self.runs, self._began = 0.0, 0, 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
            return
        self.seconds += time.perf_counter() - self._began
        self.runs += 1


GARBAGE = Garbage()


class Watched(Speculator):
    """A policy that sums up what it is told of steps.

    Attributes:
        lowest: What its purse held, at least; seconds.
    """

    def __init__(self, config: SpeculativeConfig, known: StepSeconds | None) -> None:
        super().__init__(config, known)
        self._told: list[tuple[int, int, int, float, bool, float, float]] = []
        self.lowest = 0.0

    def note_step(
        self,
        count: int,
        checked: int,
        emitted: int,
        seconds: float,
        decodes: bool = True,
        beside: float = 0.0,
    ) -> None:
        """See Speculator."""
        self._told.append((count, checked, emitted, seconds, decodes, beside, self._look_seconds))
        super().note_step(count, checked, emitted, seconds, decodes, beside)
        self.lowest = min(self.lowest, self._purse.seconds)

    def take_told(self) -> dict[str, float]:
        """Sums of what was told since they were taken last."""
        sums = dict.fromkeys(TOLD, 0.0)
        for count, checked, emitted, seconds, decodes, beside, looked in self._told:
            kind = "check" if checked and decodes else "plain" if decodes else "prompt"
            plain = self._plain_seconds(count) or seconds
            parts = (1.0, seconds, beside, looked, emitted, emitted / max(count, 1) * plain)
            for name, value in zip(PARTS, parts, strict=True):
                sums[f"{kind}_{name}"] += value
        self._told = []
        return sums


class Contestant:
    """One way to decode. The engine has sequences of one contestant at a time.

    Args:
        llm: the engine that all share.
        method: of guessing; PLAIN or AGAIN for none.
    """

    def __init__(self, llm: LLM, method: str) -> None:
        self.llm = llm
        self.core: EngineCore = llm.llm_engine._core
        plain = method in (PLAIN, AGAIN)
        known = self.core.step_seconds
        self.speculator = None if plain else Watched(SpeculativeConfig(method), known)
        self.row = Row()
        self._running: list[Sequence] = []
        self._chunks: Any = iter(())
        self._answers: list[list[int]] = []
        self._most = self._ended = 0

    def ask(self, asked: list[Prompt], params: SamplingParams) -> None:
        """Begin to answer prompts; the first turn reads them."""
        self._chunks = self.llm.generate(asked, params, use_tqdm=False, stream=True)
        self._answers = [[] for _ in asked]
        self._most = self._ended = 0

    def enter(self) -> None:
        """Make the engine's sequences and its policy those of this contestant."""
        self.core._speculator = self.speculator
        self.core._scheduler.running = self._running

    def take_turn(self, tokens: int) -> tuple[float, float]:
        """Answer `tokens` more tokens of each sequence; seconds by the clock and of the CPU."""
        self.enter()
        self._most += tokens * len(self._answers)
        before = self.totals()
        wall, cpu = time.perf_counter(), time.process_time()
        while self._ended < self._most:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            for answer, part in zip(self._answers, chunk, strict=True):
                new = () if part is None else part.outputs.token_ids
                answer.extend(new)
                self._ended += len(new)
        self.core.close_step(time.perf_counter())
        taken = time.perf_counter() - wall, time.process_time() - cpu
        spent = {name: value - before[name] for name, value in self.totals().items()}
        for name, value in (spent | self._told()).items():
            self.row.totals[name] = self.row.totals.get(name, 0) + value
        return taken

    def _told(self) -> dict[str, float]:
        policy = self.speculator
        return dict.fromkeys(TOLD, 0.0) if policy is None else policy.take_told()

    def answers(self) -> list[list[int]]:
        """What was answered, whole once every turn was taken."""
        return self._answers

    def totals(self) -> dict[str, float]:
        """Counters of the engine and of the policy."""
        stats, policy = self.core.stats(), self.speculator
        drafts = None if policy is None else policy.totals
        return {
            "steps": stats.steps,
            "tokens": stats.generation_tokens,
            "step_s": stats.step_seconds,
            "garbage_s": GARBAGE.seconds,
            "garbage_runs": GARBAGE.runs,
            "model_s": stats.model_seconds,
            "guess_s": policy.seconds if policy else 0.0,
            "looks": policy.looks if policy else 0,
            "drafted": drafts.drafted if drafts else 0,
            "accepted": drafts.accepted if drafts else 0,
        }


class Race:
    """All contestants in one engine.

    Args:
        args: of the command line.
        batches: numbers of sequences, to make room for the largest.
    """

    def __init__(self, args: argparse.Namespace, batches: list[int]) -> None:
        methods = args.methods.split(",")
        # One layer more than the others need, and room for the guesses of all.
        widest = max(methods, key=lambda name: (name == "mtp", DEFAULT_TOKENS[name]))
        count = max(batches) * (2 + len(methods))
        self.llm = LLM(
            args.model,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=count,
            num_gpu_blocks_override=count * BLOCKS_A_SEQUENCE,
            enable_prefix_caching=False,  # who comes second would not have to read the prompts
            speculative_config={
                "method": widest,
                "model": args.draft_model,
                "num_speculative_tokens": 8,
            },
        )
        self.contestants = {name: Contestant(self.llm, name) for name in (PLAIN, AGAIN, *methods)}
        self.params = SamplingParams(
            temperature=0, max_tokens=args.max_tokens, min_tokens=args.max_tokens - 1
        )
        self._order = random.Random(0)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.llm.llm_engine.preprocessor.config.model.vocab_size

    def run(self, asked: list[Prompt]) -> int:
        """Let everybody answer the same prompts, in turns; how many answers differ."""
        runners = list(self.contestants.values())
        self._order.shuffle(runners)
        for contestant in runners:
            contestant.ask(asked, self.params)
            contestant.take_turn(1)
            contestant.row.wall.append(0.0)
            contestant.row.cpu.append(0.0)
        for _ in range(0, self.params.max_tokens + 1, TOKENS_A_TURN):
            self._order.shuffle(runners)
            for contestant in runners:
                wall, cpu = contestant.take_turn(TOKENS_A_TURN)
                contestant.row.wall[-1] += wall
                contestant.row.cpu[-1] += cpu
        expected = self.contestants[PLAIN].answers()
        for contestant in runners:
            contestant.row.tokens += sum(map(len, contestant.answers()))
        return sum(contestant.answers() != expected for contestant in runners)

    def forget(self) -> None:
        """Begin a new row."""
        for contestant in self.contestants.values():
            contestant.row = Row()
            if contestant.speculator is not None:
                contestant.speculator.lowest = 0.0


def result(kind: str, batch: int, name: str, rows: dict[str, Row]) -> dict[str, Any]:
    """A line of the table."""
    row = rows[name]
    plain = [rows[PLAIN]] if name in (PLAIN, AGAIN) else [rows[PLAIN], rows[AGAIN]]
    drafted, accepted = row.totals["drafted"], row.totals["accepted"]
    line = {
        "prompts": kind,
        "batch": batch,
        "method": name,
        "tokens_per_second": round(row.tokens / sum(row.wall), 1),
    }
    for key, clock in (("ratio", "wall"), ("cpu_ratio", "cpu")):
        seconds = np.mean([getattr(each, clock) for each in plain], axis=0).tolist()
        ratio, interval = ratio_interval(seconds, getattr(row, clock))
        line |= {key: round(ratio, 3), f"{key}_95": [round(end, 3) for end in interval]}
    line["acceptance"] = round(accepted / drafted, 3) if drafted else 0.0
    line["share_of_answer"] = round(accepted / row.tokens, 3)
    return line


def breakdown(spent: dict[str, float]) -> str:
    """Where the time of a contestant's steps went, in microseconds a step."""
    steps = max(spent["steps"], 1)
    micros = {name: 1e6 * spent[name] / steps for name in ("step_s", "model_s", "guess_s")}
    rest = micros["step_s"] - micros["model_s"] - micros["guess_s"]
    return (
        f"  {steps:.0f} steps of {micros['step_s']:.0f} us: model {micros['model_s']:.0f}, looking"
        f" {micros['guess_s']:.1f}, engine {rest:.0f}; tokens a step {spent['tokens'] / steps:.2f};"
        f" looks {spent['looks']:.0f}, guesses checked {spent['drafted']:.0f}; garbage collected"
        f" {spent['garbage_runs']:.0f} times, {1e3 * spent['garbage_s']:.1f} ms"
    )


def told(row: Row) -> str:
    """What a policy was told of the steps of a row, in microseconds a step."""
    spent, lines = row.totals, []
    for kind in ("plain", "check"):
        steps = max(spent[f"{kind}_n"], 1.0)
        micros = {name: 1e6 * spent[f"{kind}_{name}"] / steps for name in PARTS}
        lines.append(
            f"  told of {spent[f'{kind}_n']:.0f} {kind} steps of {micros['s']:.0f} us, beside the"
            f" executor {micros['beside_s']:.1f}, looking on top {micros['look_s']:.1f};"
            f" {spent[f'{kind}_tokens'] / steps:.1f} tokens, {micros['plain_s']:.0f} us in plain"
            " steps"
        )
    known = sum(spent[f"{kind}_{part}"] for kind in ("plain", "check") for part in ("s", "look_s"))
    rest = spent["steps"] - spent["plain_n"] - spent["check_n"] - spent["prompt_n"]
    wall, others = 1e6 * sum(row.wall), max(rest, 1.0)
    lines.append(
        f"  wall {wall:.0f} us, of which told {1e6 * known:.0f}; {rest:.0f} steps of pauses,"
        f" {(wall - 1e6 * known) / others:.0f} us each if nothing else took time"
    )
    return "\n".join(lines)


def beliefs(speculator: Watched) -> str:
    """What a policy has measured."""

    def costs(steps: StepCosts) -> str:
        found = ((size, steps.larger(size, size)) for size in steps.sizes_noted)
        return ", ".join(f"{n}: {1e6 * f[1]:.0f}" if f else f"{n}: ?" for n, f in found)

    rates = {kind: round(rate.value, 2) for kind, rate in sorted(speculator._rates._own.items())}
    return (
        f"  us of a plain step by sequences: {costs(speculator._plain)}\n"
        f"  us of a step with guesses by tokens: {costs(speculator._checking)}\n"
        f"  rates by class of match: {rates}; purse {1e6 * speculator._purse.seconds:.0f} us,"
        f" lowest {1e6 * speculator.lowest:.0f}; host's part of a guess"
        f" {1e6 * speculator._beside_guess.value:.1f} us, a look"
        f" {1e6 * speculator._own_seconds.value:.0f}"
    )


def functions(contestant: Contestant, asked: list[Prompt], params: SamplingParams) -> str:
    """The functions that take most of the host's time while prompts are answered."""
    profile = cProfile.Profile()
    contestant.ask(asked, params)
    contestant.take_turn(1)
    profile.enable()
    contestant.take_turn(params.max_tokens)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(22)
    lines = text.getvalue().splitlines()
    return "\n".join(line.replace(str(Path.cwd()), "") for line in lines if line.strip())


def print_functions(race: Race, batch: int, rounds: int) -> None:
    """Say for each contestant what takes the host's time."""
    for kind in ("random", "repetition"):
        asked = prompts(kind, batch, race.vocab_size, rounds)
        for name, contestant in race.contestants.items():
            print(f"functions, {kind}, {name}, batch {batch}")
            print(functions(contestant, asked, race.params))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", default="ngram,suffix")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--draft-model", default=None)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    race = Race(args, batches)
    race.run(prompts("random", batches[-1], race.vocab_size, args.rounds + 1))  # to warm up
    keep_what_is_loaded()  # as a server does: one collection takes as long as 100 steps of a card
    rows, differing = [], 0
    for kind in KINDS:
        for batch in batches:
            race.forget()
            for index in range(args.rounds):
                differing += race.run(prompts(kind, batch, race.vocab_size, index))
            done = {name: contestant.row for name, contestant in race.contestants.items()}
            for name, contestant in race.contestants.items():
                rows.append(result(kind, batch, name, done))
                print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
                if args.profile:
                    print(breakdown(contestant.row.totals), flush=True)
                if args.profile and contestant.speculator is not None:
                    print(told(contestant.row), beliefs(contestant.speculator), sep="\n")
    if args.profile:
        print_functions(race, batches[-1], args.rounds)
    gc.unfreeze()
    print(f"runs whose answers differ from those without guesses: {differing}")
    is_promised = envs.FD_DETERMINISTIC_MODE or not device.decide().is_cuda
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if differing and is_promised else 0


if __name__ == "__main__":
    sys.exit(main())
