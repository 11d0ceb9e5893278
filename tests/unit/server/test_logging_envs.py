"""Log records and environment variables."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.middleware import access_line
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.logging import RecordFormatter, _FileHandler, init_file_logging

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


def test_a_full_disk_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_FileHandler, "complained", False)
    (tmp_path / "a.log").symlink_to("/dev/full")
    for _ in range(3):
        _FileHandler(tmp_path / "a.log").handle(record("lost"))
    [line] = capsys.readouterr().err.splitlines()
    assert "a.log" in line
    assert "No space left" in line


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdeploy_lite.utils.logging.init_console_logging", lambda: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"FD_LOG_DIR .*/file/log'? cannot be written"):
        init_file_logging(tmp_path / "file" / "log")


def test_two_processes_rotate_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_BACKUP_COUNT", "2")
    path = tmp_path / "a.log"
    for day in ("2020-01-01", "2020-01-02"):
        (tmp_path / f"a.log.{day}").write_text("old")
    handlers = [_FileHandler(path), _FileHandler(path)]
    for number, handler in enumerate(handlers):
        handler.emit(record(f"before {number}"))
    for number, handler in enumerate(handlers):
        handler.doRollover()
        handler.emit(record(f"after {number}"))
        handler.close()
    [dated] = [p for p in tmp_path.iterdir() if p != path and "2020" not in p.name]
    assert [x[-8:] for x in dated.read_text().splitlines()] == ["before 0", "before 1"]
    assert [x[-7:] for x in path.read_text().splitlines()] == ["after 0", "after 1"]
    assert len(list(tmp_path.iterdir())) == 3  # the newest two old ones, and the present one


def test_variables_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_MAX_STOP_SEQS_NUM", raising=False)
    assert envs.FD_MAX_STOP_SEQS_NUM == 5
    monkeypatch.setenv("FD_MAX_STOP_SEQS_NUM", "9")
    assert envs.FD_MAX_STOP_SEQS_NUM == 9
    monkeypatch.setenv("FD_API_KEY", "a, b,")
    assert envs.FD_API_KEY == ["a", "b"]
    monkeypatch.setenv("FD_DEBUG", "true")
    assert envs.FD_DEBUG is True


def test_a_value_of_the_wrong_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_BACKUP_COUNT", "many")
    with pytest.raises(ConfigError, match=r"FD_LOG_BACKUP_COUNT.*'many'"):
        _ = envs.FD_LOG_BACKUP_COUNT


def test_unknown_variables_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="FD_NOPE"):
        _ = envs.FD_NOPE


def test_snapshot_hides_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_API_KEY", "secret")
    assert "secret" not in str(envs.snapshot())
