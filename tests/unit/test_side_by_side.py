"""The two halves of `entrypoints/test.sh`, with a pytest that does what the test says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

PROGRAM = Path(__file__).resolve().parents[1] / "side_by_side.py"
# `tests/unit` is what the first half is asked for, `tests` what the second is.
FAKE_PYTEST = """\
import os, signal, sys, time
from pathlib import Path
half = "unit" if "tests/unit" in sys.argv else "rest"
print(half, *sys.argv[1:])
exec(os.environ[half])
"""
PASSED = "print('==== 3 passed, 1 skipped, 2 warnings in 0.10s ====')"
FAILED = """\
print('FAILED in the middle of what a test has written')
print('==== short test summary info ====')
print('SKIPPED [1] tests/a.py:3: no card')
print('FAILED tests/a.py::test_a - assert 1 == 2')
print('ERROR tests/b.py::test_b - OSError')
print('\\x1b[31m== 1 failed\\x1b[0m, \\x1b[32m5 passed\\x1b[0m, 1 error in 61.0s (0:01:01) ==')
sys.exit(1)
"""
# Waits for its end as pytest does, and says that it has seen it.
WAITING = """\
try:
    Path(half).touch()
    time.sleep(600)
except KeyboardInterrupt:
    print(half, 'takes its fixtures down')
    print('==== 2 passed in 0.10s ====')
    sys.exit(2)
"""


def start(folder: Path, unit: str, rest: str) -> subprocess.Popen[str]:
    (folder / "pytest.py").write_text(FAKE_PYTEST)
    env = {**os.environ, "PYTHONPATH": str(folder), "unit": unit, "rest": rest}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM)], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(folder: Path, unit: str, rest: str) -> tuple[int, list[str]]:
    process = start(folder, unit, rest)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.splitlines()


def test_both_are_shown_one_after_the_other_and_summed(tmp_path: Path) -> None:
    meet = """\
Path(half).touch()
while not (Path('unit').exists() and Path('rest').exists()): time.sleep(0.01)
"""
    code, lines = run(tmp_path, meet + PASSED, meet + PASSED)
    assert code == 0
    assert lines[0].startswith("unit tests/unit --ignore=tests/unit/")
    assert lines[2].startswith("rest tests --ignore=tests/unit/")
    assert lines[5:7] == [f"{name}: 3 passed, 1 skipped, 2 warnings"
                          for name in ("most of tests/unit", "everything else")]  # fmt: skip
    assert lines[-1].strip("=").startswith(" 6 passed, 2 skipped, 4 warnings in ")


def test_each_unit_test_is_in_one_half(tmp_path: Path) -> None:
    _, lines = run(tmp_path, PASSED, PASSED)
    ignored = [
        {word.removeprefix("--ignore=") for word in line.split() if word.startswith("--ignore=")}
        for line in lines
        if line.startswith(("unit ", "rest "))
    ]
    assert set.intersection(*ignored) == set()
    unit = PROGRAM.with_name("unit")
    assert set.union(*ignored) == {f"tests/unit/{path.name}" for path in unit.iterdir()}


@pytest.mark.parametrize("said", [None, "3"])
def test_products_of_numpy_keep_to_a_share_of_the_cores(
    tmp_path: Path, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", said)
    tell = "print('threads', os.environ['OPENBLAS_NUM_THREADS'])\n"
    _, lines = run(tmp_path, tell + PASSED, tell + PASSED)
    share = said or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert lines.count(f"threads {share}") == 2


@pytest.mark.parametrize("failing", ["unit", "rest"])
def test_a_failure_of_either_is_the_result(tmp_path: Path, failing: str) -> None:
    code, lines = run(tmp_path, *((FAILED, PASSED) if failing == "unit" else (PASSED, FAILED)))
    assert code == 1
    result = lines[lines.index(" both halves ".center(80, "=")) :]
    assert [line for line in result if line.startswith(("FAILED", "ERROR"))] == [
        "FAILED tests/a.py::test_a - assert 1 == 2",
        "ERROR tests/b.py::test_b - OSError",
    ]
    assert " 1 failed, 1 error, 8 passed, 1 skipped, 2 warnings in " in result[-1]


@pytest.mark.parametrize("crashing", ["unit", "rest"])
def test_a_crash_of_one_hides_nothing_of_the_other(tmp_path: Path, crashing: str) -> None:
    crash = "print('too much memory'); os.kill(os.getpid(), signal.SIGKILL)"
    code, lines = run(tmp_path, *((crash, FAILED) if crashing == "unit" else (FAILED, crash)))
    assert code == (137 if crashing == "unit" else 1)  # that of the first
    assert {"too much memory", "FAILED tests/a.py::test_a - assert 1 == 2"} <= set(lines)
    name = "most of tests/unit" if crashing == "unit" else "everything else"
    assert f" no result of {name} (status 137), 1 failed, 1 error, 5 passed in " in lines[-1]


def test_a_test_that_says_what_pytest_says_is_no_result(tmp_path: Path) -> None:
    code, lines = run(tmp_path, PASSED + "; print('and more'); sys.exit(3)", PASSED)
    assert code == 3
    assert " no result of most of tests/unit (status 3), 3 passed, " in lines[-1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_both_and_shows_both(tmp_path: Path, sent: signal.Signals) -> None:
    process = start(tmp_path, WAITING, WAITING)
    until(lambda: (tmp_path / "unit").exists() and (tmp_path / "rest").exists())
    process.send_signal(sent)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + sent
    assert "unit takes its fixtures down" in output
    assert "rest takes its fixtures down" in output
    assert " 4 passed in " in output.splitlines()[-1]
