"""Metrics: names, types and buckets of upstream; gauges that tell the truth."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastdeploy_lite.metrics.metrics import ServerMetrics, TokenRates, one_two_five
from fastdeploy_lite.request.messages import DraftCounts, EngineStats


def names(text: str) -> set[str]:
    return {f"fastdeploy:{name}" for name in text.split()}


GAUGES = names(
    """num_requests_running num_requests_waiting num_requests_preempted num_requests_enqueued
batch_size max_batch_size available_batch_size gpu_cache_usage_perc available_gpu_block_num
free_gpu_block_num max_gpu_block_num available_gpu_resource hit_req_rate hit_token_rate
gpu_hit_token_rate cpu_hit_token_rate first_token_latency infer_latency cache_config_info"""
)
COUNTERS = names(
    """requests_number request_success request_preempted prompt_tokens generation_tokens
prefix_cache_token_num prefix_gpu_cache_token_num prefix_cpu_cache_token_num
prefix_ssd_cache_token_num send_cache_failed_num"""
)
HISTOGRAMS = names(
    """time_to_first_token_seconds time_per_output_token_seconds
e2e_request_latency_seconds request_inference_time_seconds request_queue_time_seconds
request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
request_generation_tokens request_params_max_tokens request_token_ratio"""
)


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics(8, {"block_size": 64, "num_blocks": None})


def families(metrics: ServerMetrics) -> dict:
    text = metrics.render().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def sample(metrics: ServerMetrics, name: str) -> float:
    value = metrics.registry.get_sample_value(f"fastdeploy:{name}")
    assert value is not None
    return value


def test_names_and_types(metrics: ServerMetrics) -> None:
    found = {name: family.type for name, family in families(metrics).items()}
    assert {n for n, t in found.items() if t == "gauge"} >= GAUGES
    assert {n for n, t in found.items() if t == "counter"} >= COUNTERS
    kinds = {n for n, t in found.items() if t == "histogram"}
    assert kinds >= HISTOGRAMS
    assert {"http_requests", "http_request_duration_seconds"} <= set(found)
    assert "fastdeploy:requests_number_total 0.0" in metrics.render().decode()


def test_buckets(metrics: ServerMetrics) -> None:
    metrics.observe("time_to_first_token_seconds", 0.003)
    name = "fastdeploy:time_to_first_token_seconds"
    buckets = [s.labels["le"] for s in families(metrics)[name].samples if "le" in s.labels]
    assert buckets == ["0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25",
                       "0.5", "0.75", "1.0", "+Inf"]  # fmt: skip
    assert one_two_five(33792)[-3:] == (5000.0, 10000.0, 20000.0)
    assert one_two_five(50) == (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def test_gauges_follow_the_engine_and_return_to_zero(metrics: ServerMetrics) -> None:
    busy = EngineStats(num_running=3, num_waiting=2, num_preempted=1, num_blocks=10,
                       num_free_blocks=4, num_cached_blocks=1, last_batch_size=3,
                       prefix_queries=4, prefix_hits=1, prefix_query_tokens=200,
                       prefix_hit_tokens=50)  # fmt: skip
    metrics.update(busy)
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "num_requests_preempted": 1,
        "batch_size": 3, "available_batch_size": 5, "max_batch_size": 8,
        "gpu_cache_usage_perc": 0.6, "available_gpu_block_num": 4, "free_gpu_block_num": 3,
        "max_gpu_block_num": 10, "available_gpu_resource": 0.4, "hit_req_rate": 0.25,
        "hit_token_rate": 0.25,
    }  # fmt: skip
    assert {n: pytest.approx(v) for n, v in expected.items()} == {
        n: sample(metrics, n) for n in expected
    }
    metrics.update(EngineStats(num_blocks=10, num_free_blocks=10))
    for name in ("num_requests_running", "num_requests_waiting", "num_requests_preempted",
                 "batch_size", "gpu_cache_usage_perc"):  # fmt: skip
        assert sample(metrics, name) == 0


def test_counters_grow_and_survive_an_engine_restart(metrics: ServerMetrics) -> None:
    metrics.update(EngineStats(generation_tokens=100, preemptions=2))
    metrics.update(EngineStats(generation_tokens=130, preemptions=2))
    metrics.update(EngineStats(generation_tokens=5))  # a new engine starts again
    assert sample(metrics, "generation_tokens_total") == 135
    assert sample(metrics, "request_preempted_total") == 2


def test_token_rates_fall_to_zero() -> None:
    rates = TokenRates()
    for second in range(11):
        rates.add(EngineStats(generation_tokens=50 * second, prompt_tokens=10 * second), second)
    assert (rates.prompt, rates.generation) == pytest.approx((10.0, 50.0))
    for second in range(11, 32):
        rates.add(EngineStats(generation_tokens=500, prompt_tokens=100), second)
    assert (rates.prompt, rates.generation) == (0.0, 0.0)


def test_cache_configuration_is_a_labelled_gauge(metrics: ServerMetrics) -> None:
    labels = {"block_size": "64", "num_blocks": "None"}
    assert metrics.registry.get_sample_value("fastdeploy:cache_config_info", labels) == 1


def test_speculation_has_metrics_only_when_it_is_on(metrics: ServerMetrics) -> None:
    metrics.update(EngineStats())
    assert not any("spec_decode" in name for name in families(metrics))
    metrics.update(EngineStats(drafts=DraftCounts(drafted=4, accepted=2, steps=2)))
    assert sample(metrics, "spec_decode_draft_acceptance_rate") == 0.5
    assert sample(metrics, "spec_decode_efficiency") == 2.0
    metrics.update(EngineStats(drafts=DraftCounts(drafted=12, accepted=12, steps=3)))
    assert sample(metrics, "spec_decode_num_draft_tokens_total") == 12
    assert sample(metrics, "spec_decode_num_accepted_tokens_total") == 12
    assert sample(metrics, "spec_decode_num_emitted_tokens_total") == 15
    metrics.update(EngineStats(drafts=DraftCounts(drafted=3, accepted=1, steps=1)))
    assert sample(metrics, "spec_decode_num_draft_tokens_total") == 15
    assert sample(metrics, "spec_decode_num_accepted_tokens_total") == 13
