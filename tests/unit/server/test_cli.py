"""The command line: help, dispatch, the small subcommands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastdeploy_lite
from fastdeploy_lite.entrypoints.cli import bench_common, main, tokenizer
from fastdeploy_lite.utils.errors import ConfigError


def test_no_subcommand_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in main.SUBCOMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["-v"]) == 0
    assert capsys.readouterr().out.strip() == fastdeploy_lite.__version__


@pytest.mark.parametrize("arguments", [["nope"], ["bench", "nope"]])
def test_unknown_subcommands_list_the_known(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [[name] for name in main.SUBCOMMANDS if name != "bench"]
    + [["bench", name] for name in main.BENCHMARKS],
)
def test_help_of_every_subcommand(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.run([*command, "--help"])
    assert caught.value.code == 0
    assert f"usage: fastdeploy-lite {' '.join(command)}" in capsys.readouterr().out


def test_help_filters_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "--help=cudagraph"]) == 0
    text = capsys.readouterr().out
    assert "--use-cudagraph" in text
    assert "--port" not in text
    assert main.run(["serve", "--help=listgroup"]) == 0
    assert "engine" in capsys.readouterr().out
    assert main.run(["serve", "--help=server"]) == 0
    assert "--max-concurrency" in capsys.readouterr().out
    assert main.run(["serve", "--help=zzz"]) == 0
    assert "No option matches" in capsys.readouterr().out


def test_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vocabulary.json"
    arguments = ["-m", "demo", "-e", "hello", "-d", "[437, 341]", "-vs", "-ve", str(file)]
    assert main.run(["tokenizer", *arguments]) == 0
    text = capsys.readouterr().out
    assert "vocabulary size: 8192" in text
    assert "text: hell" in text
    assert len(json.loads(file.read_text())) == 8192
    lines = tmp_path / "vocabulary.txt"
    assert main.run(["tokenizer", "-ve", str(lines)]) == 0
    assert lines.read_text().splitlines()[2] == "2\t'</s>'"


@pytest.mark.parametrize("text", ["x", "[1, 'a']", "1;2", "[True]", "__import__('os')"])
def test_tokenizer_refuses_what_is_not_ids(text: str) -> None:
    with pytest.raises(ConfigError, match="--decode"):
        tokenizer.parse_ids(text)


@pytest.mark.parametrize("ids", ["1,8192", "[-1]", "437, 99999999999999999999"])
def test_tokenizer_names_an_unknown_id(ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["tokenizer", "-d", ids]) == 1
    found = capsys.readouterr()
    assert "is outside of the vocabulary of 8192" in found.err
    assert not found.out


def test_errors_of_the_system_name_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nowhere" / "v.json"
    assert main.run(["tokenizer", "-ve", str(file)]) == 1
    expected = f"fastdeploy-lite tokenizer: {file}: No such file or directory\n"
    assert capsys.readouterr().err == expected


def test_errors_are_one_line_and_the_status_is_not_zero(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.run(["tokenizer", "-m", "/nonexistent/model", "-vs"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-tokens", "-1"], "max_tokens must be at least 1, got -1"),
        (["--temperature", "nan"], "temperature must be non-negative, got nan"),
        (["--top-p", "2"], "top_p"),
        (["--sampling-seed", "-3"], "seed"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "hello"], ["chat", "-q", "hello"]])
def test_wrong_sampling_values_are_told_before_loading(
    command: list[str], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # No model could be loaded from here: it is not what the error is about.
    assert main.run([*command, *flags, "--model", "/nonexistent"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [["chat", "-q", "hi"], ["complete", "-q", "hi"]])
def test_an_empty_address_is_not_an_absent_one(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([*command, "--url", ""]) == 1
    assert "--url is empty: give a server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("latency", "--num-iters", "0"),
        ("latency", "--output-len", "-1"),
        ("throughput", "--num-prompts", "0"),
        ("throughput", "--n", "x"),
        ("serve", "--max-concurrency", "0"),
        ("serve", "--request-rate", "0"),
        ("serve", "--request-rate", "nan"),
        ("serve", "--metric-percentiles", "50,x"),
        ("serve", "--metric-percentiles", "101"),
        ("serve", "--random-prefix-len", "-1"),
        ("throughput", "--prefix-len", "-1"),
        ("latency", "--num-iters-warmup", "-1"),
        ("quantize", "--rounds", "0"),
        ("quantize", "--num-threads", "0"),
    ],
)
def test_nothing_cannot_be_measured(
    command: str, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.run(["bench", command, flag, value])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {flag}: expected" in error
    assert f"got '{value}'" in error


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("latency", "--output-json"),
        ("throughput", "--output-json"),
        ("serve", "--result-filename"),
        ("kernels", "--json"),
        ("kernels", "--plot"),
        ("quantize", "--json"),
    ],
)
def test_a_result_that_cannot_be_written_is_told_before_measuring(
    command: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path, tmp_path / "nowhere" / "x"):
        with pytest.raises(SystemExit):
            main.run(["bench", command, flag, str(place)])
        error = capsys.readouterr().err
        assert f"argument {flag}: cannot write {place}" in error
        assert error.count("\n") == 1


def test_unknown_metrics_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.run(["bench", "serve", "--percentile-metrics", "ttft,latency"])
    assert "'latency' is none of ttft, tpot, itl, e2el" in capsys.readouterr().err


def test_collect_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert "device" in text
    assert "numpy" in text


def test_percentiles() -> None:
    report = bench_common.percentiles(list(range(101)), [50, 99])
    assert report == {"mean": 50.0, "p50": 50.0, "p99": 99.0}
    assert bench_common.percentiles([], [50]) == {"mean": 0.0, "p50": 0.0}


def test_sharegpt_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x" * 40}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    [request] = bench_common.sharegpt_requests(str(path), 10, None)
    assert (request.prompt, request.output_len) == ("hi", 10)
    with pytest.raises(ConfigError, match=r"absent\.json"):
        bench_common.sharegpt_requests(str(tmp_path / "absent.json"), 1, None)
    with pytest.raises(ConfigError, match="--dataset-path is missing"):
        bench_common.sharegpt_requests("", 1, None)


@pytest.mark.parametrize("data", [[1, "a"], [{"conversations": [1, {"value": "a"}]}], {"a": 1}])
def test_files_of_another_form_are_no_sharegpt(data: object, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="no conversation of two turns"):
        bench_common.sharegpt_requests(str(path), 10, None)


def test_help_leaves_flags_without_effect_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.run(["serve", "--help"])
    short = capsys.readouterr().out
    assert "--max-model-len" in short
    assert "--scheduler-ttl" not in short
    assert "--help=all" in short
    assert main.run(["serve", "--help=all"]) == 0
    whole = capsys.readouterr().out
    assert "--scheduler-ttl" in whole
    assert len(whole.splitlines()) > len(short.splitlines()) + 50
