"""Runs the model for the engine: slices of sequences in, tokens out.

A step is: fill static arrays on the host, one copy to the device, forward pass (a CUDA graph where
one fits), logits of the rows that sample, sampling, one copy back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import device
from fastdeploy_lite.checkpoint.row_order import OPTION
from fastdeploy_lite.config import BLOCK_SIZE, RuntimeConfig
from fastdeploy_lite.distributed.communicator import Communicator
from fastdeploy_lite.formats.ccq import ROW_ORDERS, RowOrder
from fastdeploy_lite.model_executor import expert_placement, ops, order_probe
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.model_executor.candidates import CandidateRows
from fastdeploy_lite.model_executor.draft_weights import open_draft
from fastdeploy_lite.model_executor.drafting import Drafting
from fastdeploy_lite.model_executor.input_batch import BatchShape, InputBatch
from fastdeploy_lite.model_executor.layers.forward_batch import ForwardBatch, KVCache
from fastdeploy_lite.model_executor.layers.rotary import cos_sin_table
from fastdeploy_lite.model_executor.ops import ExpertWeight
from fastdeploy_lite.model_executor.prompt_logprobs import PromptScorer
from fastdeploy_lite.model_executor.recorded_steps import RecordedSteps
from fastdeploy_lite.model_executor.sampling_batch import SampledRow, SamplingBatch
from fastdeploy_lite.model_executor.verification import logit_rows, sample_slices
from fastdeploy_lite.model_executor.weights import (
    UndecidedRowOrderError,
    bits_per_weight,
    open_source,
)
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.models.registry import ModelRegistry
from fastdeploy_lite.request.step import SampledPart, SequenceSlice, SliceResult
from fastdeploy_lite.speculation.config import CHECK_SIZES
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.worker import kv_budget
from fastdeploy_lite.worker.kv_budget import MemoryReport

log = logging.getLogger(__name__)
LOGIT_ROWS_AT_ONCE = 256
# Tokens of a step that checks guesses by graph. Larger ones gain little: their kernels outlast the
# launches.
MOST_SPREAD = CHECK_SIZES[-1]


class DecodeGraphs(Protocol):
    """Forward passes for steps of single tokens that are captured, one per batch size."""

    def bucket(self, num_seqs: int) -> int | None:
        """Return the smallest captured size that holds `num_seqs`, None when none does."""

    def run(self, size: int, forward: Callable[[], Any]) -> Any:
        """Capture `forward` for `size` or replay it; return the tensor that it returned."""


class ModelRunner:
    """One model on one device with its KV cache; used by one thread.

    Runners of one process may compute on one card at the same time, each on a thread of its own:
    they share no memory but what is only read. (A graph is captured when its size is first needed;
    meanwhile no other thread may wait for the whole card, as loading does.)

    Call `load_model`, `profile_num_blocks`, `allocate_kv_cache`, then `execute` per step.
    """

    def __init__(self, config: RuntimeConfig, communicator: Communicator | None = None) -> None:
        """Choose the device; nothing is loaded yet.

        Args:
            config: its `parallel` says which rank this is.
            communicator: to the other ranks, None where there are none.

        Raises:
            ConfigError: the device or the tensor-parallel degree cannot be had.
        """
        if communicator is None and config.parallel.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size {config.parallel.tensor_parallel_size}: this command runs a"
                " model in one process: set it to 1"
            )
        self.config = config
        self.communicator = communicator
        # Tokens are sampled by the first rank alone; the others are told with the next step.
        self._samples = config.parallel.rank == 0
        self.place = device.activate(0, config.device)  # a rank sees no card but its own
        self.dtype = device.activation_dtype(self.place)
        self.workspace = Workspace(self.place)
        # For what is rare (log-probabilities, evaluation): growing it leaves graphs valid.
        self._scratch = Workspace(self.place)
        self._own_scratch = ops.own_scratch(self.place)
        self._host_links = expert_placement.host_links(config, self.place)
        self.num_blocks = 0
        self.load_seconds = 0.0
        self._row_order = ""
        self._kv_caches: list[KVCache] = []
        self._teacher_caches: list[KVCache] = []
        self._graphs: DecodeGraphs | None = None
        self._guess_graphs: DecodeGraphs | None = None
        self._check_loading: Callable[[], None] | None = None
        self._batches: dict[tuple[int, bool], ForwardBatch] = {}
        self._heads: dict[tuple[str, int, int], tuple[Any, Any]] = {}
        self._drafting: Drafting | None = None
        self._candidates: CandidateRows | None = None

    def load_model(
        self, show_progress: bool = False, check: Callable[[], None] | None = None
    ) -> None:
        """Load all weights and build the step's buffers.

        Args:
            show_progress: draw bars of bytes and of layers on stderr.
            check: called before each matrix; what it raises ends the loading.

        Raises:
            CheckpointError, ConfigError, FastDeployError: one line naming file and key, or memory.
        """
        started = time.perf_counter()
        self._check_loading = check
        if self.communicator is not None:
            self.communicator.open(self._renew_graphs)
        with self._own_scratch():
            try:
                self._load(self.config, show_progress)
            except UndecidedRowOrderError as undecided:
                self._load_by_text(undecided, show_progress)
        self.load_seconds = time.perf_counter() - started

    def _load(self, config: RuntimeConfig, show_progress: bool) -> None:
        limits = config.scheduler
        model = config.model
        table = cos_sin_table(limits.max_model_len, model.head_dim, model.rope_theta)
        cos_sin = ops.fix(paddle.to_tensor(table, place=self.place))
        more = {} if self.communicator is None else {"communicator": self.communicator}
        with open_source(
            config, self.place, show_progress, self._check_loading, self._host_links
        ) as source:
            self._row_order = source.row_order
            self.model = ModelRegistry.get_class(model)(model, source, cos_sin, self.dtype, **more)
            self._candidates = self._new_candidates()
            is_permuted = source.is_permuted
        if config.has_draft_model:
            self._load_draft(config, cos_sin, is_permuted)
        for weight in self._all_weights():
            ops.set_activation_bits(weight, config.activation_bits)
        self._inputs = InputBatch(
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            limits.max_model_len,
            model.vocab_size,
            self.place,
            max_logit_rows=config.max_logit_rows,
            max_spread=self._most_spread,
        )
        self._sampling = SamplingBatch(
            limits.max_num_seqs,
            model.vocab_size,
            self._scratch,
            config.logprobs_mode,
            max_rows=config.max_logit_rows,
        )
        as_logits = config.logprobs_mode.endswith("_logits")
        self._prompts = PromptScorer(
            self.model.logits, self._scratch, as_logits, keeps=self._samples
        )

    def _new_candidates(self) -> CandidateRows | None:
        if self.communicator is None or not self.place.is_cpu_place():
            return None
        if not hasattr(self.model, "own_logits"):  # of a plug-in
            return None
        return CandidateRows(self.communicator, self.vocab_size)

    def _load_draft(self, config: RuntimeConfig, cos_sin: Any, is_permuted: bool) -> None:
        limits = config.scheduler
        with open_draft(config, self.place, is_permuted) as source:
            model = config.model.family.draft_class()(self.model, source, cos_sin)
        self._drafting = Drafting(
            model,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            limits.max_model_len,
            self.place,
            self.workspace,
            self.communicator,
        )

    def _all_weights(self) -> Iterator[ExpertWeight]:
        for found in self.model.weights().values():
            yield from found
        if self._drafting is not None:
            yield from self._drafting.model.weights()

    def _load_by_text(self, undecided: UndecidedRowOrderError, show_progress: bool) -> None:
        """Load in both row orders, and keep the one that reads a text better."""
        config = self.config
        if config.load.packed_cache is not None:
            log.warning(
                "packed_cache has no effect: only reading tells the row order of 2-bit experts;"
                " say which it is: %s",
                OPTION,
            )
        tokens = order_probe.encode(config.tokenizer_path or config.model_path, self.vocab_size)
        tokens = tokens[: config.scheduler.max_model_len]
        scores = {}
        for order in ROW_ORDERS:
            self._load_in(order, show_progress)
            scores[order] = order_probe.log_probabilities(self.logits(tokens), tokens)
        better, reason = order_probe.judge(scores, self.vocab_size)
        if better is None:
            raise UndecidedRowOrderError(f"{undecided}; {reason}")
        if better != order:
            self._load_in(better, show_progress)
        self._row_order = f"{better} order, by reading: {reason}"
        log.info("2-bit rows: %s", self._row_order)

    def _load_in(self, order: RowOrder, show_progress: bool) -> None:
        self.model = None  # its memory is needed
        load = replace(self.config.load, row_order=order, packed_cache=None)
        self._load(replace(self.config, load=load), show_progress)

    @property
    def _most_spread(self) -> int:
        """Tokens of a step whose guesses are checked by graph, at most; 0: none is.

        A draft model reads the step's arrays after it, as they were.
        """
        if self.config.max_draft_tokens == 0 or self.config.has_draft_model:
            return 0
        return min(self.config.max_logit_rows, MOST_SPREAD)

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's vocabulary."""
        return self.config.model.vocab_size

    # -- KV cache --------------------------------------------------------------------------------

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one block of 64 tokens over all layers, keys and values."""
        return kv_budget.bytes_per_block(self.config, self.dtype)

    def profile_num_blocks(self) -> int:
        """Return how many KV blocks to allocate.

        An explicit number wins. Otherwise `gpu_memory_utilization` of the memory that is free after
        loading; on the CPU no more than all slots at full length can use, twice that when finished
        prefixes are kept, plus what the scheduler keeps in reserve.

        Raises:
            ConfigError: not even one sequence of max_model_len fits.
        """
        blocks = self.config.cache.num_blocks
        if blocks is None:
            blocks = int(self._cache_budget() // self.kv_bytes_per_block)
            if self.place.is_cpu_place():
                blocks = min(blocks, kv_budget.most_useful_blocks(self.config))
        elif self._most_spread and not self.place.is_cpu_place():
            # A buffer that grows with the first steps that check guesses undoes all graphs.
            self._run_largest_step()
        return kv_budget.check_blocks(blocks, self.config)

    def _cache_budget(self) -> float:
        """Bytes that the KV cache may take, after a step of the largest size has run on a card."""
        utilization = self.config.cache.gpu_memory_utilization
        if self.place.is_cpu_place():
            # All ranks and replicas of this host share what is free.
            free = ops.memory_info(self.place)[0]
            parallel = self.config.parallel
            return (
                utilization * free / (parallel.tensor_parallel_size * parallel.data_parallel_size)
            )
        with self._own_scratch():
            self._run_largest_step()
        free, total = ops.memory_info(self.place)
        reserved = kv_budget.largest_sampling_bytes(self.config)
        return utilization * total - (total - free) - reserved

    def _run_largest_step(self) -> None:
        """Grow all buffers to their final size: sequences that together fill the token budget, then
        one token, for which the kernels of few rows and branches have memory of their own."""
        limits = self.config.scheduler
        longest = min(limits.max_num_batched_tokens, limits.max_model_len)
        whole, rest = divmod(limits.max_num_batched_tokens, longest)
        lengths = ([longest] * whole + [rest])[: limits.max_num_seqs]
        lengths = [length for length in lengths if length]
        blocks = -(-longest // BLOCK_SIZE)
        caches = self._new_caches(blocks)  # all sequences write the same blocks: values are unused
        batch = self._own_batch([0] * sum(lengths), lengths, 0, blocks, caches)
        with expert_placement.muted(self._host_links):  # it takes no memory of the card
            hidden = self.model(batch)
        self._inputs.upload(0)
        rows = min(self.config.max_logit_rows, sum(lengths))
        self.model.logits(self._sampled_rows(hidden, rows), self.workspace)
        with expert_placement.muted(self._host_links):
            self.model(self._own_batch([0], [1], 0, blocks, caches))

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate `num_blocks` blocks per layer, replacing any earlier cache."""
        self._kv_caches = []
        self._batches = {}
        self._kv_caches = self._new_caches(num_blocks)
        self.num_blocks = self._inputs.num_blocks = num_blocks
        self._renew_graphs()

    @property
    def _is_replayable(self) -> bool:
        """Whether nothing but ops happens in a step: no sums of ranks, no experts elsewhere."""
        if self.communicator is not None or self.config.expert_offload is not None:
            return False
        # Of the class itself: one that is derived from it may do more between its ops.
        return bool(vars(type(self.model)).get("is_replayable"))

    def _renew_graphs(self) -> None:
        """CUDA graphs over the present cache, or what stands for them on a CPU; none if off."""
        self._graphs = self._guess_graphs = None  # first: their memory is needed
        self._heads = {}
        if not self._kv_caches or not self.config.use_cudagraph:
            return
        if self.place.is_cpu_place():
            if self._is_replayable:
                self._graphs = RecordedSteps(self.workspace)
            return
        from fastdeploy_lite.model_executor.cuda_graph import CudaDecodeGraphs  # noqa: PLC0415

        most, sizes = self.config.scheduler.max_num_seqs, self.config.cudagraph_capture_sizes
        few = expert_placement.GRAPH_SIZES if self._host_links else None
        self._graphs = CudaDecodeGraphs(self.workspace, most, few if sizes is None else sizes)
        if self._most_spread:
            checks = [*CHECK_SIZES, self._most_spread] if few is None else few
            self._guess_graphs = CudaDecodeGraphs(self.workspace, self._most_spread, checks)

    def _new_caches(self, num_blocks: int) -> list[KVCache]:
        model = self.config.model
        heads = kv_budget.local_kv_heads(self.config)
        shape = [num_blocks, heads, BLOCK_SIZE, model.head_dim]

        def blocks(of_draft: bool) -> Any:
            # A draft layer that has missed tokens attends to what lies in their place: numbers.
            allocate = paddle.zeros if of_draft else paddle.empty
            return ops.fix(allocate(shape, dtype=self.dtype, device=self.place))

        own = self.config.model.num_hidden_layers
        return [(blocks(i >= own), blocks(i >= own)) for i in range(self.config.num_kv_layers)]

    # -- a step ----------------------------------------------------------------------------------

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """Compute one step.

        Args:
            slices: tokens to compute, at most one slice per sequence; prefill chunks and decodes
                in any order.

        Returns:
            One result per slice, in order; on ranks that do not sample all are empty.

        Raises:
            PeerFailedError, PeerLostError: another rank does not compute its part.
            ValueError: a slice exceeds the step's limits or names blocks that do not exist.
        """
        with self._own_scratch():
            return self._execute(slices)

    def _execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        shape = self._inputs.prepare(slices)
        if self._samples:
            for part in slices:
                if part.fresh:
                    self._sampling.table.admit(part)
        if shape.decode_only and all(part.sample for part in slices):
            return self._decode(shape, slices)
        return self._compute(shape, slices)

    def _decode(self, shape: BatchShape, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """One token per sequence, every row sampled."""
        hidden, logits = self._decode_logits(shape, slices)
        feeds_draft = self._feeds_draft(slices)
        if not feeds_draft:  # else the arrays are still needed
            self._inputs.prepare_next()
        results = self._sample(logits, slices) if self._samples else [SliceResult() for _ in slices]
        if feeds_draft:
            self._follow(shape, hidden, slices, results)
            self._inputs.prepare_next()
        return results

    def _compute(self, shape: BatchShape, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """Any mix of prefill chunks, decodes and guesses."""
        sampled = [index for index, part in enumerate(slices) if part.sample]
        results = [SliceResult() for _ in slices]
        if self._checks_by_graph(shape, slices):
            logits = self._check_guesses(shape)
        else:
            hidden = self._prefill(shape, slices, sampled)
            self._score_prompts(hidden, slices, results)
            count = sum(slices[index].num_rows for index in sampled)
            if sampled:
                parts = [slices[index] for index in sampled]
                logits = self._logits(self._sampled_rows(hidden, count), parts)
        if sampled and self._samples:
            found = self._sample(logits, [slices[index] for index in sampled])
            for index, result in zip(sampled, found, strict=True):
                result.prompt_logprobs = results[index].prompt_logprobs
                results[index] = result
        if self._feeds_draft(slices):
            self._follow(shape, hidden, slices, results)
        return results

    def _feeds_draft(self, slices: Sequence[SequenceSlice]) -> bool:
        return self._drafting is not None and slices[0].feeds_draft

    def _follow(
        self,
        shape: BatchShape,
        hidden: Any,
        slices: Sequence[SequenceSlice],
        results: list[SliceResult],
    ) -> None:
        """Let the draft model read the step, and guess."""
        assert self._drafting is not None
        batch = self._batch(shape.num_tokens, shape.num_seqs)
        self._drafting.follow(batch, hidden, slices, results)

    def _sample(self, logits: Any, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        def rows_of(numbers: Sequence[int], parts: Sequence[SampledPart]) -> list[SampledRow]:
            # All rows in their order, but for what depends on the tokens before.
            is_whole = len(numbers) == logits.shape[0]
            return self._sampling.sample(logits if is_whole else self._pick(logits, numbers), parts)

        return sample_slices(slices, rows_of)

    def _pick(self, logits: Any, numbers: Sequence[int]) -> Any:
        rows = paddle.to_tensor(np.asarray(numbers, np.int32), place=self.place)
        out = self._scratch.get("picked_logits", [len(numbers), logits.shape[1]], "float32")
        ops.gather_rows(logits, rows, out)
        return out

    def _logits(self, hidden: Any, slices: Sequence[SequenceSlice]) -> Any:
        """Logits of the rows that these slices sample; over several ranks perhaps those alone that
        can be sampled, and on the first rank alone."""
        count = 0 if self._candidates is None else self._candidates.count(slices)
        if self._candidates is None or count == 0:
            return self.model.logits(hidden, self.workspace)
        own = self.model.own_logits(hidden, self.workspace)
        return self._candidates.gather(own, slices, count)

    def _decode_logits(self, shape: BatchShape, slices: Sequence[SequenceSlice]) -> tuple[Any, Any]:
        """Hidden states [B, H] and logits [B, V], by graph where there is one."""
        count = shape.num_seqs
        size = None if self._graphs is None else self._graphs.bucket(count)
        if self._graphs is None or size is None:
            self._inputs.upload(count)
            hidden = self._all_hidden(count)
            return hidden, self._logits(hidden, slices)
        self._inputs.pad_decode(count, size)
        self._inputs.upload(size)
        hidden, logits = self._graphs.run(size, lambda: self._all_logits(size))
        if count < size:
            hidden = self._head("hidden", hidden, size, count)
            logits = self._head("logits", logits, size, count)
        return hidden, logits

    def _head(self, name: str, whole: Any, size: int, count: int) -> Any:
        """The first rows of what a graph fills; kept, since to slice a tensor takes 5 us."""
        known = self._heads.get((name, size, count))
        if known is None or known[0] is not whole:
            known = self._heads[name, size, count] = (whole, ops.fix(whole[:count]))
        return known[1]

    def _checks_by_graph(self, shape: BatchShape, slices: Sequence[SequenceSlice]) -> bool:
        """Whether every token of a step is a last one or a guess, few enough for a graph."""
        graphs = self._guess_graphs
        if graphs is None or any(part.num_rows != len(part.token_ids) for part in slices):
            return False
        return graphs.bucket(shape.num_tokens) is not None

    def _check_guesses(self, shape: BatchShape) -> Any:
        """Guesses as sequences of their own, every row sampled: logits [T, V]."""
        graphs, count = self._guess_graphs, shape.num_tokens
        assert graphs is not None
        size = graphs.bucket(count)
        assert size is not None
        self._inputs.spread(shape)
        self._inputs.pad_decode(count, size)
        self._inputs.upload(size)
        _, logits = graphs.run(size, lambda: self._all_logits(size, spread=True))
        return logits if count == size else self._head("checked", logits, size, count)

    def _all_logits(self, count: int, spread: bool = False) -> tuple[Any, Any]:
        """Hidden states and logits of `count` single tokens, all of them sampled."""
        hidden = self._all_hidden(count, spread)
        return hidden, self.model.logits(hidden, self.workspace)

    def _all_hidden(self, count: int, spread: bool = False) -> Any:
        batch = self._batches.get((count, spread))
        if batch is None:
            batch = self._batches[count, spread] = self._batch(count, count, spread)
        ops.announce_step(self.place, count)
        return self.model(batch)

    def _prefill(
        self, shape: BatchShape, slices: Sequence[SequenceSlice], sampled: Sequence[int]
    ) -> Any:
        """Any mix of slices: hidden states [T, H]."""
        host = self._inputs.buffer.host
        rows = logit_rows([slices[i] for i in sampled], host["cu_seqlens_q"][1:][sampled])
        host["logit_rows"][: len(rows)] = rows
        self._inputs.upload(shape.num_seqs)
        ops.announce_step(self.place, shape.num_tokens)
        return self.model(self._batch(shape.num_tokens, shape.num_seqs))

    def _sampled_rows(self, hidden: Any, count: int) -> Any:
        rows = self._inputs.buffer.device["logit_rows"][:count]
        out = self.workspace.get("sampled_hidden", [count, hidden.shape[1]], self.dtype)
        ops.gather_rows(hidden, rows, out)
        return out

    def _batch(self, num_tokens: int, num_seqs: int, spread: bool = False) -> ForwardBatch:
        tensors = self._inputs.buffer.device
        return ForwardBatch.of_buffers(
            tensors, num_tokens, num_seqs, self._kv_caches, self.workspace, spread
        )

    def _score_prompts(
        self, hidden: Any, slices: Sequence[SequenceSlice], results: list[SliceResult]
    ) -> None:
        first_rows = self._inputs.buffer.host["cu_seqlens_q"]
        for index, part in enumerate(slices):
            wanted = part.sampling.prompt_logprobs is not None
            if wanted and part.start < len(part.prompt_token_ids) - 1:
                first = int(first_rows[index])
                results[index].prompt_logprobs = self._prompts.score(hidden, first, part)

    # -- evaluation ------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return next-token logits [T, V] after every token of one sequence (teacher forcing)."""
        return np.concatenate(list(self.logits_chunks(token_ids)))

    def logits_chunks(self, token_ids: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield `logits` in pieces of at most 256 rows, for vocabularies that are large.

        Works beside the engine's sequences: keys and values go to a cache of its own.

        Raises:
            ValueError: the sequence is empty, longer than max_model_len, or has an unknown token.
        """
        limits, count = self.config.scheduler, len(token_ids)
        tokens = np.asarray(token_ids, np.int32)
        if not 0 < count <= limits.max_model_len:
            raise ValueError(f"{count} tokens, expected 1 to max_model_len {limits.max_model_len}")
        if tokens.min() < 0 or tokens.max() >= self.config.model.vocab_size:
            raise ValueError(f"a token id is outside [0, {self.config.model.vocab_size})")
        blocks = -(-count // BLOCK_SIZE)
        if not self._teacher_caches or self._teacher_caches[0][0].shape[0] < blocks:
            self._teacher_caches = self._new_caches(blocks)
        for start in range(0, count, limits.max_num_batched_tokens):
            chunk = tokens[start : start + limits.max_num_batched_tokens]
            batch = self._own_batch(chunk, [len(chunk)], start, blocks, self._teacher_caches)
            with self._own_scratch():
                hidden = self.model(batch)
            for row in range(0, len(chunk), LOGIT_ROWS_AT_ONCE):
                part = hidden[row : row + LOGIT_ROWS_AT_ONCE]
                with self._own_scratch():
                    found = ops.download(self.model.logits(part, self._scratch)).copy()
                yield found

    def _own_batch(
        self,
        token_ids: Any,
        lengths: Sequence[int],
        start: int,
        blocks: int,
        caches: list[KVCache],
    ) -> ForwardBatch:
        """Sequences from position `start` in blocks 0, 1, .. of `caches`: a slot is a position."""

        def tensor(values: Any) -> Any:
            return paddle.to_tensor(np.asarray(values, np.int32), place=self.place)

        positions = tensor(np.concatenate([np.arange(start, start + n) for n in lengths]))
        return ForwardBatch(
            token_ids=tensor(token_ids),
            positions=positions,
            slot_mapping=positions,
            cu_seqlens_q=tensor(np.cumsum([0, *lengths])),
            context_lens=tensor([start + n for n in lengths]),
            block_tables=tensor(np.tile(np.arange(blocks), (len(lengths), 1))),
            kv_caches=caches,
            workspace=self.workspace,
        )

    # -- reports ---------------------------------------------------------------------------------

    def memory_report(self) -> MemoryReport:
        """Return what is held now."""
        weights = self.model.weights()
        weights["experts"], offloaded = expert_placement.by_place(weights["experts"])
        if self._drafting is not None:
            weights["draft"] = self._drafting.model.weights()
        caches = [*self._kv_caches, *self._teacher_caches]
        blocks = sum(int(keys.shape[0]) for keys, _ in caches)
        per_layer = self.kv_bytes_per_block // self.config.num_kv_layers
        return MemoryReport(
            weights={role: sum(w.nbytes for w in found) for role, found in weights.items()},
            kv_cache=blocks * per_layer,
            workspace=self.workspace.nbytes + self._scratch.nbytes,
            sampling=self._sampling.nbytes,
            offloaded_experts=sum(weight.nbytes for weight in offloaded),
            bits_per_expert_weight=bits_per_weight([*weights["experts"], *offloaded]),
            row_order=self._row_order,
        )
