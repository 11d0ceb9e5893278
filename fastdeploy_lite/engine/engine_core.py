"""The engine core: requests in, one step at a time, tokens out.

Single-threaded; a process of its own for the server (core_process.py), in-process for `LLM`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ReadOnlyList
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import envs
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.engine.args_utils import check_block_count
from fastdeploy_lite.engine.generation import Generation
from fastdeploy_lite.engine.kv_cache import BlockManager
from fastdeploy_lite.engine.logits_processors import LogitsProcessors
from fastdeploy_lite.engine.rehearsal import rehearse
from fastdeploy_lite.engine.scheduler import Scheduler, Sequence
from fastdeploy_lite.executor.base import Executor, ExecutorDeadError
from fastdeploy_lite.executor.step_clock import StepClock
from fastdeploy_lite.executor.step_limit import StepLimit
from fastdeploy_lite.executor.timed import TimedExecutor
from fastdeploy_lite.executor.verdict import describe, run_step
from fastdeploy_lite.guided import compiler
from fastdeploy_lite.guided.matcher import Grammar
from fastdeploy_lite.guided.paced import PacedMatcher
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.request.messages import (
    PAUSED,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    Ready,
    Timing,
)
from fastdeploy_lite.request.step import (
    NOT_NUMBERS,
    LogitsProcessor,
    SamplerParams,
    SequenceSlice,
    SliceResult,
    TokenLogprobs,
)
from fastdeploy_lite.speculation.drafters import Text
from fastdeploy_lite.speculation.open_step import OpenStep
from fastdeploy_lite.speculation.rates import StepSeconds
from fastdeploy_lite.speculation.speculator import Speculator
from fastdeploy_lite.utils.errors import ConfigError, RequestError, one_line
from fastdeploy_lite.utils.logging import get_logger

# A runner that fails this many steps in a row for every request is taken for broken.
MOST_FAILED_STEPS = 3
# Constraints are followed in threads. A step waits so many seconds for all of them together and
# goes on without those that take longer.
MASK_THREADS, MASK_PATIENCE = 4, 0.005
_log = get_logger("fastdeploy")


class EngineDeadError(RuntimeError):
    """The engine cannot go on; the message says why in one line."""


class _Active:
    """A request inside the core: its sequence, its rules, its clock."""

    __slots__ = (
        "cached_sent",
        "first_token",
        "generation",
        "processors",
        "prompt_logprobs",
        "received",
        "request",
        "sampler",
        "scheduled",
        "sequence",
        "shows_logprobs",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, sequence: Sequence, sampler: SamplerParams) -> None:
        self.request = request
        self.sequence = sequence
        self.sampler = sampler
        self.shows_logprobs = request.sampling.sampler.logprobs is not None
        self.generation: Generation
        self.processors: list[LogitsProcessor] | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.received = time.time()
        self.scheduled = self.first_token = 0.0

    @property
    def timing(self) -> Timing:
        """When it passed through the core."""
        return Timing(self.received, self.scheduled, self.first_token)


class EngineCore:
    """Scheduler, KV blocks, rules of generation, executor.

    Args:
        config: Of the engine.
        executor: Computes steps; its KV cache has `num_blocks` blocks.
        tokenizer: For stop texts and constraints.
        num_blocks: KV blocks.
        step_seconds: What `rehearse` measured.

    Attributes:
        step_seconds: As given.

    Raises:
        ConfigError: The KV cache cannot hold one sequence, or a logits processor is unknown.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        executor: Executor,
        tokenizer: Ernie4_5Tokenizer,
        num_blocks: int,
        step_seconds: StepSeconds | None = None,
    ) -> None:
        check_block_count(num_blocks, config.scheduler.max_model_len, config.cache.block_size)
        if config.early_stop and config.logprobs_mode.endswith("_logits"):
            raise ConfigError("early stop needs probabilities: use logprobs_mode raw_logprobs")
        self.config = config
        self._executor = executor
        self._tokenizer = tokenizer
        self._processors = LogitsProcessors(config)
        self._blocks = BlockManager(
            num_blocks, config.cache.block_size, config.cache.enable_prefix_caching
        )
        self._scheduler = Scheduler(
            config.scheduler,
            self._blocks,
            reserve=envs.FD_ENC_DEC_BLOCK_NUM,
            cache_outputs=config.cache.enable_output_caching,
            on_preempt=_log_preemption,
        )
        self._active: dict[str, _Active] = {}
        self._compiling: dict[Future[Grammar], _Active] = {}
        self._compiler = ThreadPoolExecutor(2, thread_name_prefix="guided-compiler")
        self._masks = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="guided-masks")
        self._patience = MASK_PATIENCE
        self._counts_closing = envs.FD_LITE_COUNT_CLOSING_EOS
        self._outbox: list[EngineOutput] = []
        self._stats = EngineStats(num_blocks=num_blocks)
        self._failed_in_a_row = 0
        self.step_seconds = step_seconds
        self._speculator: Speculator | None = None
        if config.speculative is not None:
            self._speculator = Speculator(config.speculative, step_seconds)
        self._layer: Speculator | None = None  # whose draft layer reads this step
        self._open_step: OpenStep | None = None  # the last one, which lasts until the next begins

    # Requests ------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Take a request; what is wrong with it comes back as an output with an error.

        Raises:
            ValueError: A request of that id is alive.
        """
        if request.request_id in self._active:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._stats.requests += 1
        problem = self._problem(request)
        if problem is not None:
            code, message = problem
            self._outbox.append(_failure(request.request_id, code, message))
            return
        active = _Active(
            request, Sequence(request, self.config.cache.block_size), self._sampler(request)
        )
        self._active[request.request_id] = active
        if request.sampling.guided is None:
            self._enqueue(active, None)
            return
        future = self._compiler.submit(
            compiler.compile,
            request.sampling.guided,
            self._tokenizer,
            self.config.model.vocab_size,
        )
        self._compiling[future] = active

    def has_request(self, request_id: str) -> bool:
        """Whether a request of that id is alive."""
        return request_id in self._active

    def _problem(self, request: EngineRequest) -> tuple[int, str] | None:
        """Why the core cannot run a request: it does not trust its clients to have checked."""
        sampling, count = request.sampling, len(request.prompt_token_ids)
        limits = self.config.scheduler
        if self._stats.paused:  # it was on its way while another client paused
            return 503, PAUSED
        if not count or sampling.max_tokens < 1 or not sampling.eos_token_ids:
            return 400, "The request has no prompt, no room for output, or no EOS id"
        if count + sampling.max_tokens > limits.max_model_len:
            return 400, (
                f"Input text is too long, input_ids_len ({count}) + max_tokens "
                f"({sampling.max_tokens}) > max_model_len ({limits.max_model_len})"
            )
        if not _fits_the_runner(request, self.config.model.vocab_size):
            return (
                400,
                "A number of the request is outside the range that the sampler takes",
            )
        if len(self._scheduler.waiting) + len(self._compiling) >= limits.max_waiting_requests:
            return 429, f"Too many requests wait: the limit is {limits.max_waiting_requests}"
        return None

    def _sampler(self, request: EngineRequest) -> SamplerParams:
        """Numbers for the runner; early stop needs the probability of every token."""
        sampler = request.sampling.sampler
        if self.config.early_stop is None or sampler.logprobs is not None:
            return sampler
        return dataclasses.replace(sampler, logprobs=0)

    def _enqueue(self, active: _Active, grammar: Grammar | None) -> None:
        sampling = active.request.sampling
        try:
            active.generation = Generation(
                sampling,
                active.sequence.output_token_ids,
                vocab_size=self.config.model.vocab_size,
                stream=self._tokenizer.detokenizer() if sampling.stop else None,
                matcher=None if grammar is None else self._paced(grammar),
                early_stop=self.config.early_stop,
                counts_closing=self._counts_closing,
            )
            active.processors = self._processors.for_request(active.request)
        except Exception as error:  # a plug-in's or a constraint's: it ends this request only
            self._outbox.append(self._fail(active, error))
            return
        self._scheduler.add(active.sequence)

    def _paced(self, grammar: Grammar) -> PacedMatcher:
        words = -(-self.config.model.vocab_size // 32)
        return PacedMatcher(grammar.matcher(), words, self._masks.submit)

    def _settle(self, active: _Active) -> bool:
        """Whether the constraint of an answer knows what may come next, within the step's
        patience."""
        started = time.perf_counter()
        settled = active.generation.settle(self._patience)
        self._patience = max(self._patience - (time.perf_counter() - started), 0.0)
        return settled

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End requests now and free their blocks; unknown ids are ignored, None means all."""
        for request_id in list(self._active if request_ids is None else request_ids):
            active = self._active.get(request_id)
            if active is not None:
                self._outbox.append(self._end(active, "abort", 499, "Aborted"))

    def pause(self) -> None:
        """End everything, and refuse requests until `resume`."""
        self._stats.paused = True
        self.abort()

    def resume(self) -> None:
        """Take requests again after `pause`."""
        self._stats.paused = False

    def reset(self) -> None:
        """Abort everything and forget cached prefixes."""
        self.abort()
        self._blocks.forget_prefixes()

    def shutdown(self) -> None:
        """Stop the helper threads and what the executor started."""
        self._executor.close()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    # Steps ---------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        if self._outbox or self._compiling:
            return True
        return self._scheduler.has_sequences

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted."""
        return len(self._scheduler.waiting) + len(self._compiling)

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        return len(self._scheduler.running), self.num_waiting

    def step(self) -> list[EngineOutput]:
        """Run one step.

        Returns:
            News of requests, at most two messages each (a token, then the closing EOS).

        Raises:
            EngineDeadError: The model runner fails whatever it is given.
        """
        started = began = time.perf_counter()
        if self._open_step is not None:
            self.close_step(started)
            began = time.perf_counter()  # what the policy makes of it is no part of the next one
        self._patience = MASK_PATIENCE
        self._collect_compiled()
        plan = self._scheduler.schedule()
        outputs, self._outbox = self._outbox, []
        if plan:
            self._run(plan, outputs, began)
            outputs += self._outbox
            self._outbox = []
            self._stats.steps += 1
        ended = time.perf_counter()
        self._stats.step_seconds += ended - started
        if self._open_step is not None:
            self._open_step.ended = ended
            if not self._scheduler.has_sequences:
                self.close_step(ended)
        return outputs

    def close_step(self, now: float) -> None:
        """Tell the policy of guesses what the last step took, at the time `now` of
        `time.perf_counter`, unless it knows; a step does so when it begins."""
        if self._open_step is not None:
            self._open_step.close(now)
            self._open_step = None

    def _collect_compiled(self) -> None:
        if not self._compiling:
            return
        # With nothing else to do, wait here instead of spinning.
        idle = not self._scheduler.has_sequences and not self._outbox
        done, _ = wait(self._compiling, 0.01 if idle else 0, FIRST_COMPLETED)
        for future in done:
            active = self._compiling.pop(future)
            if self._active.get(active.request.request_id) is not active:  # aborted meanwhile
                continue
            error = future.exception()
            if error is None:
                self._enqueue(active, future.result())
            else:
                self._outbox.append(self._fail(active, error))

    def _run(
        self, plan: list[tuple[Sequence, int]], outputs: list[EngineOutput], began: float
    ) -> None:
        batch: list[tuple[_Active, SequenceSlice]] = []
        now = time.time()
        speculator, self._layer = self._speculator, None
        pauses = speculator is None or (_decodes(plan) and speculator.pauses())
        spent = 0.0 if speculator is None else speculator.seconds
        guesses = {} if pauses or speculator is None else self._guesses(speculator, plan)
        for sequence, count in plan:
            active = self._active[sequence.request.request_id]
            if not active.scheduled:
                active.scheduled = now
            try:
                if not self._is_ready(active, count, outputs):
                    continue
                guess = guesses.get(sequence.request.request_id, ()) if guesses else ()
                batch.append((active, self._slice(active, count, guess)))
            except Exception as error:  # one request's rules must not stop the others
                outputs.append(self._fail(active, error))
        if not batch and self._patience > 0 and plan:
            time.sleep(self._patience)  # all wait for their constraints: no need to spin
        self._stats.last_batch_size = len(batch)
        if batch:
            before, executed = self._stats.generation_tokens, self._stats.model_seconds
            slices = [part for _, part in batch]
            results = self._execute(slices)
            for (active, part), result in zip(batch, results, strict=True):
                self._advance(active, part, result, outputs)
            if speculator is not None and (pauses or speculator.is_pausing):
                speculator.tally.steps += len(slices)
            elif speculator is not None:
                self._open_step = OpenStep(
                    speculator,
                    began,
                    executed=self._stats.model_seconds - executed,
                    guessed=speculator.seconds - spent,
                    sampled=[part.sample for part in slices].count(True),
                    checked=sum(len(p.draft_token_ids) for p in slices) if guesses else 0,
                    emitted=self._stats.generation_tokens - before,
                    decodes=_decodes(plan),
                )

    def _guesses(
        self, speculator: Speculator, plan: list[tuple[Sequence, int]]
    ) -> dict[str, list[int]]:
        """Guessed tokens worth checking, within the step's budget and free KV blocks."""
        if speculator.has_layer:
            speculator.meet([s.request_id for s, _ in plan if s.fresh])
        decodes = _decodes(plan)
        guesses = {} if speculator.rests(decodes) else self._choose(speculator, plan, decodes)
        if speculator.feeds_draft:
            self._layer = speculator
        return guesses

    def _choose(
        self, speculator: Speculator, plan: list[tuple[Sequence, int]], decodes: bool
    ) -> dict[str, list[int]]:
        decoding = [s for s, count in plan if count == 1 and s.output_token_ids]
        free = self.config.scheduler.max_num_batched_tokens - sum(count for _, count in plan)
        most = min(free, self.config.max_draft_tokens)
        return speculator.choose(decoding, self._room_for_guesses, most, decodes)

    def _room_for_guesses(self, sequence: Text, most: int) -> int:
        active = self._active[sequence.request_id]
        room = min(active.generation.num_free - 1, most)
        return self._scheduler.room_for_guesses(active.sequence, room) if room > 0 else 0

    def _is_ready(self, active: _Active, count: int, outputs: list[EngineOutput]) -> bool:
        """Whether an answer takes part in this step; a fulfilled constraint ends one here."""
        if count != active.sequence.num_to_compute:  # not at its last token yet
            return True
        if not self._settle(active):
            return False
        generation = active.generation
        return not (generation.ending and generation.output and self._close_early(active, outputs))

    def _slice(self, active: _Active, count: int, guess: ReadOnlyList[int]) -> SequenceSlice:
        sequence, generation, layer = active.sequence, active.generation, self._layer
        samples = count == sequence.num_to_compute
        forced = generation.forced_token if samples else -1
        free = samples and forced < 0
        bitmask = generation.bitmask() if free else None
        masks: ReadOnlyList[npt.NDArray[np.int32] | None] | None = None
        guess = guess if free else ()
        if guess:
            guess, masks = generation.guess_bitmasks(guess)
        return SequenceSlice(
            request_id=active.request.request_id,
            slot=sequence.slot,
            fresh=sequence.fresh,
            token_ids=[*sequence.next_tokens(count), *guess],
            start=sequence.num_computed,
            block_table=sequence.block_table,
            sample=samples,
            prompt_token_ids=sequence.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            sampling=active.sampler,
            step=len(sequence.output_token_ids),
            banned_now=generation.banned_now if free else (),
            forced_token=forced,
            bitmask=bitmask,
            logits_processors=active.processors,
            draft_token_ids=guess,
            draft_bitmasks=masks,
            num_banned_now=generation.num_banned_now,
            num_drafts=0 if layer is None or not free else layer.drafts_for(sequence),
            feeds_draft=layer is not None,
        )

    def _execute(self, slices: list[SequenceSlice]) -> list[SliceResult]:
        """Run the model; requests that a step fails for have an error in their results.

        Raises:
            EngineDeadError: A device is lost, or every slice failed, and so did plain ones in their
                place, several steps in a row.
        """
        started = time.perf_counter()
        try:
            verdict = run_step(self._executor, slices)
        except ExecutorDeadError as error:
            raise EngineDeadError(str(error)) from error
        if verdict.error is not None:
            _log.error("A step of %d requests failed", len(slices), exc_info=verdict.error)
            self._stats.failed_steps += 1
        self._failed_in_a_row = self._failed_in_a_row + 1 if verdict.is_broken else 0
        if self._failed_in_a_row >= MOST_FAILED_STEPS:
            assert verdict.error is not None
            raise EngineDeadError(
                f"the model runner failed {MOST_FAILED_STEPS} steps in a row: "
                f"{describe(verdict.error)}"
            ) from verdict.error
        self._stats.model_seconds += time.perf_counter() - started
        return verdict.results

    def check_executor(self) -> None:
        """Raise EngineDeadError when a device is lost; for use between steps."""
        try:
            self._executor.check()
        except ExecutorDeadError as error:
            raise EngineDeadError(str(error)) from error

    # After a step --------------------------------------------------------------------------------

    def _advance(
        self,
        active: _Active,
        part: SequenceSlice,
        result: SliceResult,
        outputs: list[EngineOutput],
    ) -> None:
        if result.error is not None:
            outputs.append(self._end(active, "error", *_blame(active.request, result.error)))
            return
        known = len(part.token_ids) - len(part.draft_token_ids)
        self._scheduler.computed(active.sequence, known)
        if result.prompt_logprobs is not None:
            self._collect_prompt_logprobs(active, part, result.prompt_logprobs)
        if not result.token_ids:
            return
        try:
            self._accept(active, part, result, outputs)
        except Exception as error:  # as above
            outputs.append(self._fail(active, error))

    def _accept(
        self,
        active: _Active,
        part: SequenceSlice,
        result: SliceResult,
        outputs: list[EngineOutput],
    ) -> None:
        generation = active.generation
        output = EngineOutput(active.request.request_id)
        tokens = result.token_ids
        if len(tokens) > 1 and result.logprobs is None and generation.accept_all(tokens):
            output.new_token_ids = list(tokens)
            self._scheduler.computed(active.sequence, len(tokens) - 1)
        else:
            self._accept_each(active, result, output)
        output.stop_reason = generation.stop_reason  # now: the text ends here, not with the EOS
        if not active.first_token:
            self._first_token(active, output)
        if part.draft_token_ids or part.num_drafts:
            self._note_tokens(active, part, result, output)
        self._stats.generation_tokens += len(output.new_token_ids)
        outputs.append(output)
        if generation.reason is None and not self._settle(active):
            return  # the next step asks again
        if generation.forced_token >= 0 and generation.reason is None:
            self._close_early(active, outputs)
        elif generation.reason is not None:
            self._complete(active, outputs[-1])

    def _accept_each(self, active: _Active, result: SliceResult, output: EngineOutput) -> None:
        """Accept tokens as far as rules let those after the first stand."""
        generation = active.generation
        for token_id, logprobs in zip_longest(result.token_ids, result.logprobs or ()):
            if output.new_token_ids:  # the guess before was right: it has been computed
                generation.settle()
                if generation.forced_token >= 0:
                    active.sequence.fresh = True  # what was counted for the rest is stale
                    break
                self._scheduler.computed(active.sequence, 1)
            logprob = None if logprobs is None else logprobs.logprob
            output.new_token_ids.append(generation.accept(token_id, logprob))
            if active.shows_logprobs and logprobs is not None:
                output.new_logprobs = [*(output.new_logprobs or []), logprobs]
            if generation.reason is not None:
                break

    def _note_tokens(
        self, active: _Active, part: SequenceSlice, result: SliceResult, output: EngineOutput
    ) -> None:
        assert self._speculator is not None
        is_whole = len(output.new_token_ids) == len(result.token_ids)
        drafts = result.draft_token_ids if is_whole else ()
        checked = len(part.draft_token_ids)
        self._speculator.note_tokens(active.sequence, output.new_token_ids, checked, drafts)

    def _close_early(self, active: _Active, outputs: list[EngineOutput]) -> bool:
        """Append the closing EOS without a step: it is known, and nobody asked how likely it is.

        Returns:
            Whether that could be done.
        """
        generation = active.generation
        eos = active.request.sampling.eos_token_ids[0]
        if active.shows_logprobs or generation.forced_token != eos:
            return False
        generation.accept(eos)
        self._stats.generation_tokens += 1
        outputs.append(EngineOutput(active.request.request_id, [eos]))
        self._complete(active, outputs[-1], without_step=1)
        return True

    def _complete(self, active: _Active, output: EngineOutput, without_step: int = 0) -> None:
        """End a request; the last `without_step` tokens of its answer needed no step."""
        generation = active.generation
        output.finished = True
        output.finish_reason = generation.reason
        output.stop_reason = generation.stop_reason
        output.num_cached_tokens = active.sequence.num_cached_tokens
        output.timing = active.timing
        if self._speculator is not None:
            sampled = len(active.sequence.output_token_ids) - without_step
            output.draft_counts = self._speculator.counts(active.request.request_id, sampled)
        self._forget(active)

    def _first_token(self, active: _Active, output: EngineOutput) -> None:
        active.first_token = time.time()
        output.num_cached_tokens = active.sequence.num_cached_tokens
        output.timing = active.timing
        if active.sampler.prompt_logprobs is not None:
            output.prompt_logprobs = active.prompt_logprobs
        self._stats.prompt_tokens += len(active.request.prompt_token_ids)

    @staticmethod
    def _collect_prompt_logprobs(
        active: _Active, part: SequenceSlice, entries: list[TokenLogprobs]
    ) -> None:
        """Entry i of a chunk is about prompt token start + i + 1; a recomputed chunk brings what
        is known already."""
        known = len(active.prompt_logprobs)
        if part.start <= known:
            active.prompt_logprobs.extend(entries[known - part.start :])

    # Ends ----------------------------------------------------------------------------------------

    def _fail(self, active: _Active, error: BaseException) -> EngineOutput:
        if isinstance(error, RequestError):
            return self._end(active, "error", 400, str(error))
        _log.error("Request %s failed", active.request.request_id, exc_info=error)
        return self._end(active, "error", 500, describe(error))

    def _end(self, active: _Active, reason: FinishReason, code: int, message: str) -> EngineOutput:
        output = _failure(active.request.request_id, code, message, reason)
        output.num_cached_tokens = active.sequence.num_cached_tokens
        output.timing = active.timing
        self._forget(active)
        return output

    def _forget(self, active: _Active) -> None:
        self._scheduler.finish(active.sequence)
        if self._speculator is not None:
            self._speculator.finish(active.sequence)
        del self._active[active.request.request_id]

    # Reports -------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters as of now; a new object."""
        scheduler, blocks = self._scheduler, self._blocks
        stats = self._stats
        stats.time = time.time()
        stats.num_running = len(scheduler.running)
        stats.num_waiting = self.num_waiting
        stats.num_preempted = scheduler.num_preempted
        stats.preemptions = scheduler.num_preemptions
        stats.num_free_blocks = blocks.num_free
        stats.num_cached_blocks = blocks.num_cached
        stats.prefix_queries = scheduler.prefix_queries
        stats.prefix_hits = scheduler.prefix_hits
        stats.prefix_query_tokens = scheduler.prefix_query_tokens
        stats.prefix_hit_tokens = scheduler.prefix_hit_tokens
        if not scheduler.running:
            stats.last_batch_size = 0
        if self._speculator is not None:
            stats.drafts = self._speculator.totals
        return EngineStats(**{name: getattr(stats, name) for name in stats.__struct_fields__})

    def check_integrity(self) -> None:
        """Verify that no block, slot or request is lost.

        Raises:
            RuntimeError: Something is.
        """
        self._scheduler.check_integrity()
        known = {s.request_id for s in [*self._scheduler.running, *self._scheduler.waiting]}
        known |= {active.request.request_id for active in self._compiling.values()}
        if not known >= set(self._active):
            raise RuntimeError(f"Engine: requests are lost: {sorted(set(self._active) - known)}")
        if not self._active and self._blocks.num_free != self._blocks.num_blocks:
            raise RuntimeError("Engine: no request is alive but blocks are held")


def create_core(
    config: RuntimeConfig, tokenizer: Ernie4_5Tokenizer, clock: StepClock | None = None
) -> tuple[EngineCore, Ready]:
    """Load the model, allocate the KV cache and build a core.

    Args:
        config: Of the engine.
        tokenizer: The model's.
        clock: Where it is shown which step is computed, for whoever can end this process.

    Returns:
        The core, and what there is to say about it.

    Raises:
        FastDeployError: Model, configuration or memory do not allow it; one line says why.
    """
    executor = _create_executor(config, None if clock is None else clock.say)
    if clock is not None:
        executor = TimedExecutor(executor, clock, StepLimit(envs.FD_LITE_STEP_SECONDS))
    try:
        num_blocks = executor.load(show_progress=True)
        seconds = rehearse(config, executor)
    except ExecutorDeadError as error:
        raise EngineDeadError(str(error)) from error
    core = EngineCore(config, executor, tokenizer, num_blocks, seconds)
    report = executor.report()
    return core, Ready(
        num_blocks=num_blocks,
        load_seconds=report.load_seconds,
        device=report.device,
        memory=report.memory,
        bits_per_expert_weight=report.bits_per_expert_weight,
        row_order=report.row_order,
    )


def _create_executor(config: RuntimeConfig, on_loss: Callable[[str], None] | None) -> Executor:
    # Only the process that computes pays for importing the framework.
    if config.parallel.executor_backend == "ray":
        from fastdeploy_lite.executor.ray_executor import RayExecutor  # noqa: PLC0415

        return RayExecutor(config, on_loss)
    if config.parallel.tensor_parallel_size == 1:
        from fastdeploy_lite.executor.inline import InlineExecutor  # noqa: PLC0415

        return InlineExecutor(config)
    from fastdeploy_lite.executor.processes import ProcessesExecutor  # noqa: PLC0415

    return ProcessesExecutor(config, on_loss)


def _decodes(plan: list[tuple[Sequence, int]]) -> bool:
    """Whether a step reads no prompts; those come last."""
    return plan[-1][1] == 1


def _fits_the_runner(request: EngineRequest, vocab_size: int) -> bool:
    """Whether every number fits the store that the runner keeps it in."""
    prompt, sampler = request.prompt_token_ids, request.sampling.sampler
    ids = (*sampler.banned_ids, *(sampler.logit_bias or ()))
    counts = [c for c in (sampler.logprobs, sampler.prompt_logprobs) if c is not None]
    return (
        0 <= min(prompt) <= max(prompt) < vocab_size
        and all(0 <= i < vocab_size for i in ids)
        and all(-1 <= count <= vocab_size for count in counts)
        and -1 <= sampler.top_k < 1 << 31
        and 0 <= sampler.seed < 1 << 63
    )


def _failure(
    request_id: str, code: int, message: str, reason: FinishReason = "error"
) -> EngineOutput:
    return EngineOutput(
        request_id, finished=True, finish_reason=reason, error_code=code, error_msg=message
    )


def _blame(request: EngineRequest, error: str) -> tuple[int, str]:
    """Status and message of a sequence that failed: a request may forbid every token."""
    sampling = request.sampling
    restricted = sampling.guided is not None or sampling.sampler.banned_ids
    if error == NOT_NUMBERS and (restricted or sampling.sampler.logit_bias):
        return 400, "The constraint, bad words and biases of this request leave no token to sample"
    return 500, one_line(error)


def _log_preemption(sequence: Sequence) -> None:
    _log.info("Preemption is triggered! Preempted request id: %s", sequence.request_id)
