"""The service's Prometheus metrics: upstream's names, types and buckets, and tokens per second.

Gauges are read from the engine's newest statistics when somebody scrapes, so that they are true at
that time; counters and histograms are fed by the request handlers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as _generate_latest

from fastdeploy_lite.request.messages import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0)
TPOT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
HTTP_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATE_WINDOW_SECONDS = 10.0
_LARGEST_LENGTH = 33792


def one_two_five(largest: int) -> tuple[float, ...]:
    """The series 1, 2, 5, 10, 20, 50, … up to `largest`."""
    values, power = [], 1
    while power <= largest:
        values += [float(m * power) for m in (1, 2, 5) if m * power <= largest]
        power *= 10
    return tuple(values)


_GAUGES = {
    "num_requests_running": "Requests running",
    "num_requests_waiting": "Requests waiting",
    "num_requests_preempted": "Preempted requests that wait to be recomputed",
    "num_requests_enqueued": "Requests to be scheduled",
    "batch_size": "Sequences in the newest step",
    "max_batch_size": "Most sequences that run at the same time",
    "available_batch_size": "Sequences that can still be admitted",
    "gpu_cache_usage_perc": "Share of KV blocks in use, 0 to 1",
    "available_gpu_block_num": "KV blocks that can be had: unused or evictable",
    "free_gpu_block_num": "KV blocks that hold nothing",
    "max_gpu_block_num": "KV blocks",
    "available_gpu_resource": "Share of KV blocks that can be had, 0 to 1",
    "hit_req_rate": "Share of requests that found a cached prefix",
    "hit_token_rate": "Share of prompt tokens served by the prefix cache",
    "gpu_hit_token_rate": "Share of prompt tokens served by the device's prefix cache",
    "cpu_hit_token_rate": "Share of prompt tokens served by the host's prefix cache",
    "first_token_latency": "Newest time to first token, seconds",
    "infer_latency": "Newest time per output token, seconds",
    "prompt_tokens_per_second": "Prompt tokens per second over the last ten seconds",
    "generation_tokens_per_second": "Generated tokens per second over the last ten seconds",
}
_COUNTERS = {
    "requests_number": "Requests received",
    "request_success_total": "Requests completed",
    "request_preempted_total": "Preemptions",
    "prompt_tokens_total": "Prompt tokens processed",
    "generation_tokens_total": "Tokens generated",
    "prefix_cache_token_num": "Prompt tokens served by the prefix cache",
    "prefix_gpu_cache_token_num": "Prompt tokens served by the device's prefix cache",
    "prefix_cpu_cache_token_num": "Prompt tokens served by the host's prefix cache",
    "prefix_ssd_cache_token_num": "Prompt tokens served by a prefix cache in storage",
    "send_cache_failed_num": "KV transfers that failed",
    "engine_steps_total": "Engine steps",
    "engine_step_seconds_total": "Seconds in engine steps",
    "engine_model_seconds_total": "Seconds in the model within engine steps",
}
_LENGTHS = one_two_five(_LARGEST_LENGTH)
_HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Arrival to first token", TTFT_BUCKETS),
    "time_per_output_token_seconds": ("Time between tokens", TPOT_BUCKETS),
    "e2e_request_latency_seconds": ("Arrival to end", LATENCY_BUCKETS),
    "request_inference_time_seconds": ("First schedule to end", LATENCY_BUCKETS),
    "request_queue_time_seconds": ("Arrival at the engine to first schedule", LATENCY_BUCKETS),
    "request_prefill_time_seconds": ("First schedule to first token", LATENCY_BUCKETS),
    "request_decode_time_seconds": ("First token to end", LATENCY_BUCKETS),
    "request_prompt_tokens": ("Prompt tokens of a request", _LENGTHS),
    "request_generation_tokens": ("Generated tokens of a request", _LENGTHS),
    "request_params_max_tokens": ("max_tokens of a request", _LENGTHS),
    "request_token_ratio": ("Generated tokens per second of a request", _LENGTHS),
}


class ServerMetrics:
    """All metrics of one service.

    Args:
        max_num_seqs: Most sequences at a time.
        cache_config: Fields of the cache configuration; they become labels.
    """

    def __init__(self, max_num_seqs: int, cache_config: Mapping[str, Any]) -> None:
        self.registry = CollectorRegistry()
        self._max_num_seqs = max_num_seqs
        self.gauges = {
            n: Gauge(f"fastdeploy:{n}", t, registry=self.registry) for n, t in _GAUGES.items()
        }
        self.counters = {
            n: Counter(f"fastdeploy:{n}", t, registry=self.registry) for n, t in _COUNTERS.items()
        }
        self.histograms = {
            n: Histogram(f"fastdeploy:{n}", text, buckets=buckets, registry=self.registry)
            for n, (text, buckets) in _HISTOGRAMS.items()
        }
        labels = {name: str(value) for name, value in cache_config.items()}
        info = Gauge(
            "fastdeploy:cache_config_info", "Cache configuration", list(labels),
            registry=self.registry,
        )  # fmt: skip
        info.labels(**labels).set(1)
        self.http_requests = Counter(
            "http_requests_total", "HTTP requests", ["method", "path", "status_code"],
            registry=self.registry,
        )  # fmt: skip
        self.http_duration = Histogram(
            "http_request_duration_seconds", "Time to the end of the answer", ["method", "path"],
            buckets=HTTP_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.gauges["max_batch_size"].set(max_num_seqs)
        self.rates = TokenRates()
        self._seen = EngineStats()

    def update(self, stats: EngineStats) -> None:
        """Take over the engine's newest statistics.

        Args:
            stats: As received; counters may start again when the engine was restarted.
        """
        blocks, usable = stats.num_blocks, stats.num_free_blocks
        values = {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "num_requests_preempted": stats.num_preempted,
            "num_requests_enqueued": stats.num_waiting,
            "batch_size": stats.last_batch_size if stats.num_running else 0,
            "available_batch_size": self._max_num_seqs - stats.num_running,
            "gpu_cache_usage_perc": _ratio(blocks - usable, blocks),
            "available_gpu_block_num": usable,
            "free_gpu_block_num": usable - stats.num_cached_blocks,
            "max_gpu_block_num": blocks,
            "available_gpu_resource": _ratio(usable, blocks),
            "hit_req_rate": _ratio(stats.prefix_hits, stats.prefix_queries),
            "hit_token_rate": _ratio(stats.prefix_hit_tokens, stats.prefix_query_tokens),
            "gpu_hit_token_rate": _ratio(stats.prefix_hit_tokens, stats.prefix_query_tokens),
        }
        for name, value in values.items():
            self.gauges[name].set(value)
        self._advance("request_preempted_total", "preemptions", stats)
        self._advance("prompt_tokens_total", "prompt_tokens", stats)
        self._advance("generation_tokens_total", "generation_tokens", stats)
        self._advance("prefix_cache_token_num", "prefix_hit_tokens", stats)
        self._advance("prefix_gpu_cache_token_num", "prefix_hit_tokens", stats)
        self._advance("engine_steps_total", "steps", stats)
        self._advance("engine_step_seconds_total", "step_seconds", stats)
        self._advance("engine_model_seconds_total", "model_seconds", stats)
        self._seen = stats
        self.rates.add(stats)
        self.gauges["prompt_tokens_per_second"].set(self.rates.prompt)
        self.gauges["generation_tokens_per_second"].set(self.rates.generation)

    def _advance(self, counter: str, field: str, stats: EngineStats) -> None:
        now, before = getattr(stats, field), getattr(self._seen, field)
        self.counters[counter].inc(now - before if now >= before else now)

    def observe(self, histogram: str, value: float) -> None:
        """Add one observation; clocks of two processes may differ, so that negatives are zero."""
        self.histograms[histogram].observe(max(value, 0.0))

    def render(self) -> bytes:
        """The exposition text."""
        return _generate_latest(self.registry)


class TokenRates:
    """Tokens per second over the last ten seconds, from totals.

    Attributes:
        prompt: Prompt tokens per second.
        generation: Generated tokens per second.
    """

    def __init__(self) -> None:
        self.prompt = 0.0
        self.generation = 0.0
        self._samples: deque[tuple[float, int, int]] = deque()

    def add(self, stats: EngineStats, now: float | None = None) -> None:
        """Record totals and renew the rates.

        Args:
            stats: The newest totals.
            now: Seconds of a monotonic clock; None reads it.
        """
        now = time.monotonic() if now is None else now
        samples = self._samples
        if samples and stats.generation_tokens < samples[-1][2]:  # the engine was restarted
            samples.clear()
        samples.append((now, stats.prompt_tokens, stats.generation_tokens))
        # Keep one sample at or beyond the window's edge: the rate is over the whole window.
        while len(samples) > 2 and now - samples[1][0] >= RATE_WINDOW_SECONDS:
            samples.popleft()
        start, prompt, generation = samples[0]
        span = max(now - start, 1e-9)
        self.prompt = (stats.prompt_tokens - prompt) / span
        self.generation = (stats.generation_tokens - generation) / span


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
