"""Log records and environment variables."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from machine import handicap

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.entrypoints.openai.middleware import access_line
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.log_sinks import LogFile, Sink, write_all
from fastdeploy_lite.utils.logging import (
    FileHandler,
    JsonFormatter,
    RecordFormatter,
    current_request_id,
    init_file_logging,
)
from fastdeploy_lite.utils.request_log import HIDDEN, content, shortened

LAYOUT = re.compile(
    r"^(INFO|WARNING|ERROR) +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \d+ +\w+\.py\[line:\d+\] "
)


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("x", level, "/a/engine.py", 202, message, (), None)


def test_record_layout() -> None:
    text = RecordFormatter().format(record("Worker processes are launched with 51.1 seconds."))
    assert LAYOUT.match(text)
    assert text.startswith("INFO     ")
    assert text.endswith("engine.py[line:202] Worker processes are launched with 51.1 seconds.")


@pytest.mark.parametrize(
    "text", ["a\nINFO     2026-01-14 forged", "a\r\n\x1b[31mred", "a\x85b\u2028c"]
)
def test_user_text_cannot_forge_a_record(text: str) -> None:
    line = RecordFormatter().format(record(f"request: {text}"))
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def test_tracebacks_cannot_forge_a_record() -> None:
    try:
        raise ValueError("x\nINFO     2026-01-14 15:10:33,026 1     a.py[line:1] forged")
    except ValueError:
        entry = record("failed")
        entry.exc_info = sys.exc_info()
    first, *rest = RecordFormatter().format(entry).splitlines()
    assert LAYOUT.match(first)
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_access_line_escapes_what_the_client_chose() -> None:
    scope = {
        "client": ("1.2.3.4", 5),
        "method": "GET",
        "path": '/a\n[INFO] "x',
        "http_version": "1.1",
    }
    line = access_line(scope, 404)
    assert line.count("\n") == 1
    assert re.fullmatch(
        r'\[[-\d: ]+\] \[\d+\] \[INFO\] 1\.2\.3\.4:5 - "GET /a\\n\[INFO\] %22x HTTP/1\.1" 404\n',
        line,
    )


def test_access_lines_are_json_when_records_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LITE_LOG_FORMAT", "json")
    scope = {"client": ("1.2.3.4", 5), "method": "GET", "path": '/a\n"x', "http_version": "1.1"}
    value = json.loads(access_line(scope, 404, "abc"))
    assert (value["status"], value["request_id"], value["client"]) == (404, "abc", "1.2.3.4:5")
    assert value["message"] == "GET /a\\n%22x HTTP/1.1"


def test_files_are_opened_by_the_start_only(tmp_path: Path) -> None:
    code = (
        "import fastdeploy_lite.utils.logging as l, pathlib\n"
        "log = l.get_logger('api_server'); log.warning('before')\n"
        "assert not pathlib.Path('log').exists()\n"
        "l.init_file_logging(); l.init_file_logging(); log.info('after'); log.error('again')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(envs.__file__).parents[1])}
    script = tmp_path / "script.py"
    script.write_text(code)
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, check=True)
    lines = (tmp_path / "log" / "api_server.log").read_text().splitlines()
    assert [line.split("] ")[-1] for line in lines] == ["after", "again"]
    assert all(LAYOUT.match(line) for line in lines)


def test_a_full_disk_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = FileHandler(Path("/dev/full"))
    for _ in range(3):
        handler.handle(record("lost"))
        assert handler.sink.flush(5)
    [line] = capsys.readouterr().err.splitlines()
    assert "/dev/full" in line
    assert "No space left" in line


def test_a_stalled_pipe_stops_nobody() -> None:
    reader, writer = os.pipe()
    sink = Sink(lambda data: write_all(writer, data))
    started = time.monotonic()
    for _ in range(100):
        sink.put(b"x" * 99_999 + b"\n")  # ten times what the pipe and the queue hold
    assert time.monotonic() - started < 2
    assert not sink.flush(0.05)
    got = b""
    while b"records were lost" not in got:  # said once somebody reads again
        got += os.read(reader, 1 << 20)
    assert got.count(b"\n") < 100
    os.close(reader)  # the thread ends its write with EPIPE, and goes on
    sink.put(b"nobody\n")
    assert sink.flush(5)
    os.close(writer)


def test_log_files_are_of_their_user_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        folder = tmp_path / "log"
        old = folder / "api_server.log"
        folder.mkdir()
        old.write_text("")
        old.chmod(0o644)
        for name in ("api_server.log", "console.log"):
            LogFile(folder / name, 7).write(b"prompt\n")
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    finally:
        os.umask(previous)


def test_links_are_not_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "a.log"
    victim.write_text("precious")
    link.symlink_to(victim)
    LogFile(link, 7).write(b"record\n")
    assert victim.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_text() == "record\n"


def test_a_pipe_in_place_of_a_log_file_blocks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.log")
    handler = FileHandler(tmp_path / "a.log")
    handler.handle(record("lost"))
    assert handler.sink.flush(5)
    assert "records are lost" in capsys.readouterr().err


def test_a_renamed_file_is_replaced(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a.log", 7)
    file.write(b"one\n")
    (tmp_path / "a.log").rename(tmp_path / "a.log.1")
    file.write(b"two\n")
    (tmp_path / "a.log").unlink()
    file.write(b"three\n")
    assert (tmp_path / "a.log.1").read_text() == "one\n"
    assert (tmp_path / "a.log").read_text() == "three\n"


def test_json_lines() -> None:
    token = current_request_id.set("abc")
    try:
        entry = record("a\nb \ud800 中")
        line = JsonFormatter().format(entry)
        assert "[abc] a\\nb" in RecordFormatter().format(entry)
    finally:
        current_request_id.reset(token)
    value = json.loads(line)
    assert line.isascii()
    assert value["message"] == "a\nb \ud800 中"
    assert (value["level"], value["line"], value["request_id"]) == ("INFO", 202, "abc")


@pytest.mark.parametrize(
    ("env", "seen"),
    [
        ({}, '{"prompt": "secret", "n": 2}'),
        ({"FD_LOG_MAX_LEN": "13"}, '{"prompt": "s\u2026 (cut)'),
        ({"FD_LOG_MAX_LEN": "13", "FD_LOG_REQUESTS_LEVEL": "3"}, '{"prompt": "secret", "n": 2}'),
        ({"FD_LOG_REQUESTS_LEVEL": "1"}, HIDDEN),
        ({"FD_LOG_REQUESTS_LEVEL": "0"}, HIDDEN),
        ({"FD_LOG_REQUESTS": "0", "FD_LOG_REQUESTS_LEVEL": "3"}, HIDDEN),
    ],
)
def test_prompts_stay_out_of_logs_when_told_so(
    env: dict[str, str], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert content({"prompt": "secret", "n": 2}) == seen


def test_a_long_value_is_not_walked_to_its_end() -> None:
    class Endless(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield from range(1000)
            raise AssertionError("walked on")

    assert shortened({"a": Endless()}, 100).endswith("(cut)")
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert len(shortened(deep, 1 << 20)) < 100
    started = time.thread_time()
    shortened(["x" * 10_000_000] * 100, 2048)
    assert time.thread_time() - started < 0.1 * handicap()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdeploy_lite.utils.logging.init_console_logging", lambda: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"FD_LOG_DIR .*/file/log'? cannot be written"):
        init_file_logging(tmp_path / "file" / "log")


def test_two_processes_rotate_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for day in ("2020-01-01", "2020-01-02"):
        (tmp_path / f"a.log.{day}").write_text("old")
    files = [LogFile(path, 2), LogFile(path, 2)]
    for number, file in enumerate(files):
        file.write(b"before %d\n" % number)
    for number, file in enumerate(files):
        file.rotate("2999-01-01")
        file._day = time.strftime("%Y-%m-%d")  # or the next write would see midnight again
        file.write(b"after %d\n" % number)
        file.close()
    [dated] = [p for p in tmp_path.iterdir() if p != path and "2020" not in p.name]
    assert dated.read_text().splitlines() == ["before 0", "before 1"]
    assert path.read_text().splitlines() == ["after 0", "after 1"]
    assert len(list(tmp_path.iterdir())) == 3  # the newest two old ones, and the present one


def test_variables_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_MAX_STOP_SEQS_NUM", raising=False)
    assert envs.FD_MAX_STOP_SEQS_NUM == 5
    monkeypatch.setenv("FD_MAX_STOP_SEQS_NUM", "9")
    assert envs.FD_MAX_STOP_SEQS_NUM == 9
    monkeypatch.setenv("FD_API_KEY", "a, b,")
    assert envs.FD_API_KEY == ["a", "b"]
    for nothing in ("", ",", " , "):
        monkeypatch.setenv("FD_API_KEY", nothing)
        with pytest.raises(ConfigError, match="FD_API_KEY"):  # never a door that stands open
            _ = envs.FD_API_KEY
    monkeypatch.delenv("FD_API_KEY")
    assert envs.FD_API_KEY == []
    monkeypatch.setenv("FD_DEBUG", "true")
    assert envs.FD_DEBUG is True


def test_a_value_of_the_wrong_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_BACKUP_COUNT", "many")
    with pytest.raises(ConfigError, match=r"FD_LOG_BACKUP_COUNT.*'many'"):
        _ = envs.FD_LOG_BACKUP_COUNT


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FD_LITE_HUGE_PAGES", "maybe", "one of 1, true, on, 0, false, off"),
        ("FD_LITE_NUM_THREADS", "0", "a whole number of at least 1 and at most 4096"),
        ("FD_LITE_NUM_THREADS", "4097", "a whole number of at least 1 and at most 4096"),
        ("FD_LITE_SEND_SECONDS", "0", "a whole number of at least 1 and at most 1000000000"),
        ("FD_TRACE", "yes", "one of off, local, otel, all"),
        ("FD_MODEL_SOURCE", "Hub", "one of AISTUDIO, MODELSCOPE, HUGGINGFACE"),
        ("FD_API_KEY", " , ", "at least one name"),
    ],
)
def test_what_a_variable_takes_is_said(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        envs.check()
    found = f"Environment variable {name}: cannot use {value!r}, expected {expected}; see docs"
    assert str(caught.value).startswith(found)


def test_a_report_survives_its_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FD_TRACE", "yes")
    monkeypatch.setenv("FD_LOG_DIRECTORY", "x")
    monkeypatch.setenv("FD_API_KEY", "secret")
    assert cli.run(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert "FD_TRACE='yes'" in text
    assert "FD_LOG_DIRECTORY='x'" in text
    assert "FD_API_KEY='***'" in text


def test_unknown_variables_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="FD_NOPE"):
        _ = envs.FD_NOPE


def test_snapshot_hides_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_API_KEY", "secret")
    monkeypatch.setenv("EXPORTER_OTLP_HEADERS", "Authorization=secret")
    assert "secret" not in str(envs.snapshot())


def test_misspelt_variables_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_DIRECTORY", "x")
    monkeypatch.setenv("FD_LOG_DIR", "x")
    assert "FD_LOG_DIRECTORY" in envs.without_meaning()
    assert "FD_LOG_DIR" not in envs.without_meaning()
    monkeypatch.setenv("ENABLE_V1_KVCACHE_SCHEDULER", "0")
    assert envs.check() == [
        "Environment variables without a meaning here: FD_LOG_DIRECTORY",
        "ENABLE_V1_KVCACHE_SCHEDULER=0 has no effect: there is one scheduler",
    ]
