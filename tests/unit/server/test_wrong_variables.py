"""A wrong value of any environment variable is one line: its name, what was found, what it takes.

The server and the commands end with status 2, `LLM` raises.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import environment

from fastdeploy_lite import LLM, envs
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.utils.errors import VariableError

BOOLEAN = ("maybe", "one of 1, true, on, 0, false, off")
WRONG = {
    "ENABLE_V1_KVCACHE_SCHEDULER": BOOLEAN,
    "EXPORTER_OTLP_ENDPOINT": ("localhost:4318", "an http:// or https:// address"),
    "EXPORTER_OTLP_HEADERS": ("Authorization", "NAME=VALUE pairs with commas between"),
    "FD_API_KEY": (" , ", "at least one name"),
    "FD_DEBUG": BOOLEAN,
    "FD_DETERMINISTIC_MODE": BOOLEAN,
    "FD_DISABLED_RECOVER": BOOLEAN,
    "FD_DISABLE_CHUNKED_PREFILL": BOOLEAN,
    "FD_ENC_DEC_BLOCK_NUM": ("-1", "a whole number of at least 0"),
    "FD_GUIDANCE_DISABLE_ADDITIONAL": BOOLEAN,
    "FD_LITE_COUNT_CLOSING_EOS": BOOLEAN,
    "FD_LITE_CPU_ISA": ("mmx", "one of plain"),
    "FD_LITE_DEVICE": ("tpu", "one of auto, cpu, nvidia, gpu"),
    "FD_LITE_HEAD_SECONDS": ("0", "a whole number of at least 1"),
    "FD_LITE_HUGE_PAGES": BOOLEAN,
    "FD_LITE_RACECHECK": ("2", "one of 0, 1"),
    "FD_LITE_PEER_SUMS": BOOLEAN,
    "FD_LITE_KEEPALIVE_SECONDS": ("1.5", "a whole number of at least 1"),
    "FD_LITE_LOG_FORMAT": ("xml", "one of text, json"),
    "FD_LITE_MAX_BODY_BYTES": ("4M", "a whole number of at least 1"),
    "FD_LITE_MAX_BODY_VALUES": ("1e5", "a whole number of at least 1"),
    "FD_LITE_NUM_THREADS": ("1_0", "a whole number of at least 1 and at most 4096"),
    "FD_LITE_OPEN_METRICS": BOOLEAN,
    "FD_LITE_RAY_WAIT_SECONDS": ("1" + 400 * "0", "a whole number of at least 0"),
    "FD_LITE_SEND_SECONDS": ("99999999999", "a whole number of at least 1"),
    "FD_LITE_STEP_SECONDS": ("inf", "a whole number of at least 0"),
    "FD_LITE_STRICT_STATUS": BOOLEAN,
    "FD_LITE_STRIP_STOP_TEXT": BOOLEAN,
    "FD_LITE_WINT2_ROW_ORDER": ("rows", "one of auto, natural, permuted"),
    "FD_LOG_BACKUP_COUNT": ("36501", "a whole number of at least 0 and at most 36500"),
    "FD_LOG_LEVEL": ("loud", "one of DEBUG, INFO, WARNING, ERROR"),
    "FD_LOG_MAX_LEN": ("٣", "a whole number of at least 0"),
    "FD_LOG_REQUESTS": BOOLEAN,
    "FD_LOG_REQUESTS_LEVEL": ("x", "a whole number of at least 0"),
    "FD_MAX_STOP_SEQS_NUM": ("five", "a whole number of at least 0"),
    "FD_MODEL_SOURCE": ("HUB", "one of AISTUDIO, MODELSCOPE, HUGGINGFACE"),
    "FD_STOP_SEQS_MAX_LEN": ("8 9", "a whole number of at least 0"),
    "FD_SUPPORT_MAX_CONNECTIONS": ("0", "a whole number of at least 1"),
    "FD_TRACE": ("yes", "one of off, local, otel, all"),
    "FD_USE_GET_SAVE_OUTPUT_V1": BOOLEAN,
    "TRACES_ENABLE": BOOLEAN,
    "TRACES_EXPORTER": ("jaeger", "one of console, otlp"),
}
# Any text is one; what it leads to is looked at where it is used.
TEXTS = {
    "FD_BUILDING_ARCS", "FD_HOST_NAME", "FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR",
    "FD_LITE_PACKED_CACHE", "FD_LOG_DIR", "FD_MODEL_CACHE", "FD_PLUGINS", "FD_SERVICE_NAME",
}  # fmt: skip
# Runs the server once for every variable, in one process: its imports take seconds.
SERVERS = """\
import json, os, sys
from fastdeploy_lite.entrypoints.openai import api_server
sys.argv = ["api_server", "--model", "demo"]
for name, value in json.loads(sys.stdin.read()).items():
    os.environ[name] = value
    try:
        api_server.main()
    except SystemExit as end:
        api_server.flush_logs()
        print(f"{name} ended with {end.code}", file=sys.stderr, flush=True)
    del os.environ[name]
"""


def is_named(line: str, name: str) -> bool:
    value, expected = WRONG[name]
    found = "what it is set to" if value == "Authorization" else envs.quote(value)
    return f"Environment variable {name}: cannot use {found}, expected {expected}" in line


def test_every_variable_is_here() -> None:
    assert set(WRONG) | TEXTS == set(envs.VARIABLES)


@pytest.mark.parametrize("name", WRONG)
def test_commands_and_the_class_name_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, WRONG[name][0])
    assert cli.run(["inspect", "demo"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert is_named(line, name)
    with pytest.raises(VariableError) as caught:
        LLM("demo")
    assert is_named(str(caught.value), name)
    assert cli.run(["collect-env"]) == 0  # says what is set


def test_the_server_names_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVERS], input=json.dumps({n: v for n, (v, _) in WRONG.items()}),
        capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    for name, line, end in zip(WRONG, lines[::2], lines[1::2], strict=True):
        assert is_named(line, name)
        assert end == f"{name} ended with 2"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("FD_LITE_CPU_ISA", "mmx", "cannot use 'mmx', expected one of plain"),
        ("FD_LITE_NUM_THREADS", "many", "cannot use 'many', expected a whole number"),
        ("FD_LOG_DIR", "/dev/null/log", "'/dev/null/log' cannot be written: Not a directory"),
        ("FD_DISABLED_RECOVER", "1", "1 is not available: unset it"),
        ("TRACES_EXPORTER", "otlp", "otlp needs EXPORTER_OTLP_ENDPOINT, an HTTP address"),
        ("FD_LITE_DEVICE", "gpu", "is 'gpu' but"),
    ],
)
def test_a_server_process_ends_with_one_line(
    name: str, value: str, reason: str, tmp_path: Path
) -> None:
    variables = {"FD_LITE_DEVICE": "cpu", "TRACES_ENABLE": "1", name: value}
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy_lite.entrypoints.openai.api_server", "--model", "demo"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(variables), check=False,
    )  # fmt: skip
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert name in line
    assert reason in line


def test_blanks_around_a_value_do_not_matter() -> None:
    code = "from fastdeploy_lite import _ops_cpu as o, envs\nenvs.check()\n"
    code += "print(o.current_isa(), o.num_threads())"
    for isa, threads, found in ((" Plain ", " 2 ", "plain 2"), (" ", " ", None)):
        variables = {"FD_LITE_CPU_ISA": isa, "FD_LITE_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, env=environment(variables), check=True,
        )  # fmt: skip
        assert found is None or done.stdout.split() == found.split()
