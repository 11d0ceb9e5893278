"""Engine arguments: every flag, both spellings, YAML, the rules of validation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_tiny_model

from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.engine import args_utils
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError

DOCUMENTED_START = (
    "--model demo --port 8180 --metrics-port 8181 --engine-worker-queue-port 8182 "
    "--cache-queue-port 8183 --tensor-parallel-size 1 --max-model-len 32768 --use-cudagraph "
    "--enable-prefix-caching --enable-chunked-prefill --max-num-seqs 256"
)
FLAG_NAMES = """
--model --served-model-name --revision --model-config-name --tokenizer --tokenizer-base-url
--max-model-len --max-num-seqs --max-num-batched-tokens --block-size --gpu-memory-utilization
--num-gpu-blocks-override --kv-cache-ratio --static-decode-blocks
--prealloc-dec-block-slot-num-threshold --swap-space --engine-worker-queue-port --cache-queue-port
--tensor-parallel-size -tp --data-parallel-size --local-data-parallel-id --enable-expert-parallel
--disable-custom-all-reduce --enable-flashinfer-allreduce-fusion --use-internode-ll-two-stage
--disable-sequence-parallel-moe --enable-chunked-moe --chunked-moe-size --enable-eplb
--eplb-config --ips --enable-prefix-caching --no-enable-prefix-caching --enable-output-caching
--enable-chunked-prefill --max-num-partial-prefills --max-long-partial-prefills
--long-prefill-token-threshold --quantization --load-choices --dynamic-load-weight --load-strategy
--use-cudagraph --graph-optimization-config --speculative-config --guided-decoding-backend
--guided-decoding-disable-any-whitespace --reasoning-parser --tool-call-parser
--tool-parser-plugin --chat-template --enable-logprob --max-logprobs --logprobs-mode --seed
--enable-early-stop --early-stop-config --lm_head-fp32 --logits-processors --enable-mm
--limit-mm-per-prompt --mm-processor-kwargs --max-encoder-cache --max-processor-cache
--splitwise-role --innode-prefill-ports --pd-comm-port --rdma-comm-ports --cache-transfer-protocol
--router --kvcache-storage-backend --write-policy --scheduler-name --scheduler-max-size
--scheduler-ttl --scheduler-host --scheduler-port --scheduler-db --scheduler-password
--scheduler-topic --scheduler-min-load-score --scheduler-load-shards-num --scheduler-sync-period
--scheduler-expire-period --scheduler-release-load-expire-period --scheduler-reader-parallel
--scheduler-writer-parallel --scheduler-reader-batch-size --scheduler-writer-batch-size --task
--runner --convert --model-impl --override-pooler-config --use-warmup --plas-attention-config
--enable-overlap-schedule --enable-keep-sampling-mask --enable-entropy
--shutdown-comm-group-if-worker-idle --rsync-config --routing-replay-config
"""
ALL_FLAGS = FLAG_NAMES.split()


def parser() -> FlexibleArgumentParser:
    result = FlexibleArgumentParser(prog="serve")
    result.add_argument("--port", type=int, default=8000)
    result.add_argument("--metrics-port", type=int)
    result.add_argument("--api-key", action="append")
    result.add_argument("--config")
    return EngineArgs.add_cli_args(result)


def parse(line: str) -> EngineArgs:
    return EngineArgs.from_cli_args(parser().parse_args(line.split()))


def config_of(**values: Any) -> RuntimeConfig:
    return EngineArgs(model="demo", **values).create_runtime_config()


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args_utils, "_warned", set())


@pytest.mark.parametrize("flag", ALL_FLAGS)
def test_every_upstream_flag_exists(flag: str) -> None:
    known = {name for action in parser()._actions for name in action.option_strings}
    assert flag.replace("_", "-") in known


def test_the_documented_start_line_is_accepted() -> None:
    config = parse(DOCUMENTED_START).create_runtime_config()
    assert (config.scheduler.max_num_seqs, config.use_cudagraph) == (256, True)
    assert config.cache.enable_prefix_caching
    assert config.scheduler.enable_chunked_prefill
    # The demo model has no positions beyond 2048; a larger model would keep 32768.
    assert config.scheduler.max_model_len == 2048


def test_both_spellings_and_prefixes() -> None:
    for line in ("--max-num-seqs 3", "--max_num_seqs 3", "--max_num_seqs=3", "--max-num-s 3"):
        assert parse(line).max_num_seqs == 3
    assert parse("--load_strategy meta --lm_head-fp32").lm_head_fp32
    assert parse("--chat-template a_b_{x}").chat_template == "a_b_{x}"


def test_values_are_not_respelled() -> None:
    args = parse("--model=my_org/my_model --served_model_name a_b")
    assert (args.model, args.served_model_name) == ("my_org/my_model", "a_b")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_model_len": "256"}, "max_model_len: expected an integer, got '256'"),
        ({"max_model_len": 256.0}, "max_model_len: expected an integer, got 256.0"),
        ({"max_num_seqs": True}, "max_num_seqs: expected an integer, got True"),
        ({"tensor_parallel_size": None}, "tensor_parallel_size: expected an integer, got None"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization: expected a number, got '0.5'"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching: expected True or False, got"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"model": None}, "model: expected text, got None"),
        ({"model": b"demo"}, "model: expected text, got b'demo'"),
        ({"chat_template": 5}, "chat_template: expected text or None, got 5"),
        ({"logits_processors": "A"}, "logits_processors: expected a list or None, got 'A'"),
        ({"quantization": 5}, "quantization: expected text or a dict or None, got 5"),
    ],
)
def test_a_keyword_of_another_type_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs(**values)
    assert words in str(caught.value)


def test_keywords_that_mean_the_same_are_taken() -> None:
    args = EngineArgs(
        model=Path("demo"), max_model_len=np.int64(256), gpu_memory_utilization=1,
        enable_prefix_caching=0, kv_cache_ratio=np.float32(0.5), logits_processors=("A", "B"),
    )  # fmt: skip
    assert (args.model, args.max_model_len, args.gpu_memory_utilization) == ("demo", 256, 1)
    assert (args.enable_prefix_caching, args.kv_cache_ratio) == (False, 0.5)
    assert args.logits_processors == ["A", "B"]
    assert type(args.max_model_len) is int


def test_empty_text_means_none() -> None:
    args = parser().parse_args(["--served-model-name", "", "--revision", "", "--tokenizer", ""])
    assert (args.served_model_name, args.revision, args.tokenizer) == (None, None, None)


def test_yaml_supplies_what_the_command_line_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "max_model_len: 4096\nmax_num_seqs: 9\nport: 1234\nunknown_key: 1\nenable_logprob: true\n"
        "enable_prefix_caching: false\nearly_stop_config: {window_size: 7}\n"
        "logits_processors: [A, B]\napi_key: secret\nquantization: wint4\n"
    )
    args = parser().parse_args(["--config", str(file), "--max-num-seqs", "8", "--port", "8000"])
    assert (args.max_model_len, args.max_num_seqs, args.port) == (4096, 8, 8000)
    assert (args.enable_logprob, args.enable_prefix_caching) == (True, False)
    assert args.early_stop_config == {"window_size": 7}
    assert (args.logits_processors, args.api_key) == (["A", "B"], ["secret"])
    assert args.quantization == "wint4"
    assert args.max_logprobs == 20, "neither says: the flag's default"
    [warning] = capsys.readouterr().err.splitlines()
    assert "there is no flag 'unknown_key'" in warning


def test_a_misspelt_yaml_key_is_named_with_what_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_modle_len: 4096\nmax-num-seqs: null\ncache_queue_port: [1, 2]\n")
    args = parser().parse_args(["--config", str(file)])
    assert "did you mean max_model_len?" in capsys.readouterr().err
    assert (args.max_num_seqs, args.cache_queue_port) == (8, "1,2")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lm_head_fp32": True}, "--lm-head-fp32 has no effect"),
        ({"graph_optimization_config": {"use_cuda_graph": True}}, "use_cuda_graph has no effect"),
        ({"graph_optimization_config": {"graph_opt_level": 2}}, "graph_opt_level has no effect"),
        ({"early_stop_config": {"window_size": 7}}, "early_stop_config has no effect"),
        ({"swap_space": 1.0}, "--swap-space has no effect"),
        ({"quantization": {"quantization": "wint8", "x": 1}}, "x has no effect"),
    ],
)
def test_what_does_nothing_is_named(
    values: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(args_utils._log, "propagate", True)
    config_of(**values)
    assert words in caplog.text


def test_chunked_prefill_can_be_switched_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of().scheduler.enable_chunked_prefill
    off = parse("--model demo --no-enable-chunked-prefill").create_runtime_config()
    assert not off.scheduler.enable_chunked_prefill
    assert off.scheduler.max_num_batched_tokens >= off.scheduler.max_model_len
    monkeypatch.setenv("FD_DISABLE_CHUNKED_PREFILL", "1")
    assert not config_of().scheduler.enable_chunked_prefill
    assert config_of(enable_chunked_prefill=True).scheduler.enable_chunked_prefill


def test_passwords_are_not_shown() -> None:
    args = EngineArgs(scheduler_password="hunter2", router="http://me:hunter2@host/")
    assert "hunter2" not in str(args.shown())
    assert args.shown()["router"] == "http://***@host/"
    assert args.shown()["tokenizer"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "expected a mapping"),
        ("a: [", "not YAML"),
        ("max_num_seqs: many", "invalid int value"),
        ("enable_logprob: 3", "expected true or false"),
        ("splitwise_role: other", "invalid choice"),
        ("max_model_len: [1, 2]", "expected one value"),
        ("max_model_len: {a: 1}", "expected a plain value"),
        ("served_model_name: {a: 1}", "expected a plain value"),
        ("api_key: [{a: 1}]", "expected a plain value"),
        ("enable_logprob: [true]", "expected one value"),
        ("seed: 1\nport: 2\nseed: 3", "line 3, column 1: the key 'seed' stands there twice"),
        ("early_stop_config: {a: 1, a: 2}", "the key 'a' stands there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "gives max_num_seqs in both spellings"),
        ("port: [", "line 1, column 8: expected the node content"),
        (None, "cannot read"),
    ],
)
def test_unusable_yaml_is_one_line_and_an_exit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit):
        parser().parse_args(["--config", str(file)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nosuch"], "unrecognized arguments: --nosuch"),
        (["--max-num-seqs", "many"], "argument --max-num-seqs: invalid int value: 'many'"),
        (["--seed"], "argument --seed: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_an_exit(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.endswith("--help\n")


def test_only_a_length_that_was_asked_for_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(write_tiny_model(tmp_path / "model", layers=1, max_position_embeddings=256))
    config = EngineArgs(model=folder).create_runtime_config()
    assert config.scheduler.max_model_len == 256
    assert not caplog.records
    EngineArgs(model=folder, max_model_len=300).create_runtime_config()
    assert "max_model_len 300 is beyond the model's" in caplog.text


def test_yaml_works_in_subcommands(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_num_seqs: 5\n")
    top = FlexibleArgumentParser()
    serve = top.add_subparsers(dest="command").add_parser("serve")
    serve.add_argument("--config")
    EngineArgs.add_cli_args(serve)
    args = top.parse_args(["serve", "--config", str(file), "--max_model_len", "64"])
    assert (args.command, args.max_num_seqs, args.max_model_len) == ("serve", 5, 64)


def test_round_trip_through_plain_data() -> None:
    args = parse('--model demo --quantization {"quantization":"wint2"} --logits-processors A B')
    assert EngineArgs(**args.to_dict()) == args
    assert args.quantization == {"quantization": "wint2"}


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("bf16"), kind="bf16", vocab_size=64))


@pytest.mark.parametrize(
    ("flag", "expert"),
    [("wint8", "int8"), ("wint4", "int4"), ('{"quantization":"wint4"}', "int4")],
)
def test_a_bf16_checkpoint_is_quantised_as_the_flag_says(
    bf16_folder: str, flag: str, expert: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = parse(f"--model {bf16_folder} --quantization {flag}").create_runtime_config().model
    assert model.quantizes_on_load
    assert (model.linear_kind, model.expert_kind(1)) == ("int8", expert)
    assert EngineArgs(model=bf16_folder, quantization=flag).create_runtime_config().model == model
    assert not caplog.records


@pytest.mark.parametrize("name", ["wint2", "w4a8", "weight_only", "mix_quant"])
def test_what_loading_cannot_make_is_refused(bf16_folder: str, name: str) -> None:
    with pytest.raises(ConfigError, match="--quantization"):
        EngineArgs(model=bf16_folder, quantization=name).create_runtime_config()


def test_the_checkpoints_quantisation_wins_and_a_contradiction_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("fastdeploy_lite.console").propagate = True
    with caplog.at_level(logging.WARNING):
        assert not config_of(quantization="wint2").model.quantizes_on_load
        assert not caplog.records
        for _ in range(2):
            config = config_of(quantization={"quantization": "wint4"})
    assert config.model == config_of().model
    messages = {record.getMessage() for record in caplog.records}
    assert messages == {"--quantization wint4 is ignored: this checkpoint is wint2 already"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_num_seqs": 0}, "max_num_seqs must be between 1 and 256, got 0"),
    ({"max_num_seqs": 257}, "max_num_seqs must be between 1 and 256, got 257"),
    ({"max_model_len": 15}, "max_model_len must be at least 16, got 15"),
    ({"max_num_seqs": 100, "max_num_batched_tokens": 99}, "max_num_batched_tokens"),
    (
        {"max_num_seqs": 2, "max_model_len": 128, "max_num_batched_tokens": 257},
        "at most max_num_seqs * max_model_len = 256, got 257",
    ),
    ({"max_num_batched_tokens": 32}, "max_num_batched_tokens must be at least 64, got 32"),
    ({"num_gpu_blocks_override": 33}, "The KV cache has 33 blocks"),
    ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization must be in (0, 1], got 1.1"),
    ({"kv_cache_ratio": 1.5}, "kv_cache_ratio must be in [0, 1]"),
    ({"block_size": 32}, "block_size must be 64"),
    ({"max_num_partial_prefills": 0}, "max_num_partial_prefills"),
    ({"max_long_partial_prefills": 2}, "max_long_partial_prefills"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend must be one of off, auto"),
    ({"early_stop_config": {"enable_early_stop": True, "window_size": 0}}, "window_size"),
    ({"early_stop_config": {"enable_early_stop": True, "window_size": 1.5}}, "window_size"),
    ({"early_stop_config": {"enable_early_stop": True, "threshold": 2}}, "threshold"),
    ({"early_stop_config": {"window_size": 0}}, "window_size"),
    ({"early_stop_config": {"enable_early_stop": "yes"}}, "enable_early_stop must be true or"),
    (
        {"enable_early_stop": True, "early_stop_config": {"enable_early_stop": False}},
        "enable_early_stop is set, but early_stop_config says false",
    ),
    ({"graph_optimization_config": {"graph_opt_level": 3}}, "graph_opt_level must be 0, 1 or 2"),
    ({"graph_optimization_config": {"use_cudagraph": 1}}, "use_cudagraph must be true or false"),
    ({"graph_optimization_config": {"cudagraph_capture_sizes": []}}, "cudagraph_capture_sizes"),
    ({"graph_optimization_config": "[1]"}, "expected a JSON object"),
    (
        {"speculative_config": {"method": "eagle"}},
        "speculative_config.method: found 'eagle', expected one of ngram, suffix, mtp, naive",
    ),
    ({"splitwise_role": "prefill"}, "splitwise_role 'prefill' is not available"),
    ({"data_parallel_size": 0}, "data_parallel_size must be 1 to 64, got 0"),
    ({"data_parallel_size": 65}, "data_parallel_size must be 1 to 64, got 65"),
    ({"quantization": "wint3"}, "Invalid quantization method: 'wint3'"),
    ({"quantization": "{}"}, "needs the key 'quantization'"),
    ({"quantization": "{bad"}, "quantization: expected JSON"),
    ({"load_choices": "v9"}, "load_choices must be one of default, default_v1, dummy"),
    ({"logprobs_mode": "cooked"}, "logprobs_mode must be one of raw_logprobs"),
    ({"max_logprobs": -2}, "max_logprobs must be at least -1"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=str)
def test_rules_of_validation(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        EngineArgs(model="demo", no_such_argument=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(("seqs", "length"), [(2, 2048), (1, 16), (256, 2048), (8, 100)])
def test_the_default_token_budget_never_refuses_to_start(seqs: int, length: int) -> None:
    limits = config_of(max_num_seqs=seqs, max_model_len=length).scheduler
    assert seqs <= limits.max_num_batched_tokens <= max(seqs * length, seqs)


def test_without_chunked_prefill_the_budget_holds_a_whole_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FD_DISABLE_CHUNKED_PREFILL", "1")
    limits = config_of(max_model_len=2048).scheduler
    assert not limits.enable_chunked_prefill
    assert limits.max_num_batched_tokens >= 2048


def test_early_stop_from_its_config() -> None:
    early = config_of(early_stop_config={"enable_early_stop": True, "window_size": 9}).early_stop
    assert early is not None
    assert (early.window_size, early.threshold) == (9, 0.99)
    assert config_of(early_stop_config={"window_size": 9}).early_stop is None
    assert config_of(enable_early_stop=True).early_stop is not None


def test_graph_config_overrides_the_flag() -> None:
    config = config_of(
        graph_optimization_config='{"use_cudagraph": false, "cudagraph_capture_sizes": [4, 1, 4]}'
    )
    assert not config.use_cudagraph
    assert config.cudagraph_capture_sizes == (1, 4)


def test_flags_without_effect_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("fastdeploy_lite.console").propagate = True
    with caplog.at_level(logging.WARNING):
        config_of(swap_space=4.0, engine_worker_queue_port=[8002], ips="10.0.0.1")
        config_of(swap_space=4.0)
    # pytest also listens at loggers that do not propagate, and may then hear a record twice.
    messages = [record.getMessage() for record in dict.fromkeys(caplog.records)]
    for flag in ("--swap-space", "--engine-worker-queue-port", "--ips"):
        assert sum(flag in message for message in messages) == 1


def test_a_second_process_repeats_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("fastdeploy_lite.console").propagate = True
    with caplog.at_level(logging.WARNING):
        EngineArgs(model="demo", swap_space=4.0, max_model_len=32768).create_runtime_config(
            quiet=True
        )
    assert not caplog.records
