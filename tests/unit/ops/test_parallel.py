"""Threads and instruction sets: choices, errors, use from several threads and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from native_ops import ISAS, bits, isa, tensor, threads
from oracles import ops as oracle

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.model_executor import ops


def in_new_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from fastdeploy_lite import _ops_cpu as o\n{code}"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def big_weight() -> tuple[ops.PackedWeight, np.ndarray]:
    """A weight that is worth several threads, and its product with some rows on one."""
    arrays, _ = oracle.random_weight("int8", 512, 2048, np.random.default_rng(0))
    weight = ops.allocate_weight("int8", 512, 2048, paddle.CPUPlace())
    ops.fill_weight(weight, None, **arrays)
    return weight, np.random.default_rng(1).standard_normal((8, 512), dtype=np.float32)


def multiply(x: np.ndarray, weight: ops.PackedWeight) -> np.ndarray:
    out = paddle.empty([len(x), weight.out_features])
    ops.linear(tensor(x), weight, out)
    return out.numpy()


def test_plain_code_is_always_there() -> None:
    assert ISAS[0] == "plain"
    for name in ISAS:
        with isa(name):
            assert _ops_cpu.current_isa() == name


@pytest.mark.parametrize("name", ["", "sse9"])
def test_unknown_instruction_sets_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"instruction set is '{name}', .* offer: plain"):
        _ops_cpu.set_isa(name)


def test_the_environment_forces_an_instruction_set() -> None:
    done = in_new_process("print(o.current_isa())", FD_LITE_CPU_ISA="plain")
    assert done.stdout.strip() == "plain"
    done = in_new_process("o.current_isa()", FD_LITE_CPU_ISA="mmx")
    assert "ValueError" in done.stderr
    assert "FD_LITE_CPU_ISA is 'mmx', this machine and build offer: plain" in done.stderr


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {}, 0),
        ("0::/\n", {"cpu.max": "max 100000"}, 0),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "5000 100000"}, 1),
        ("0::/gone\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"cpu.max": "nonsense"}, 0),
        ("4:cpu,cpuacct:/x\n3:memory:/\n",
         {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpuset:/x\n",
         {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 0),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 0),
        ("", {"cpu.max": "100000 100000"}, 0),
    ],
)  # fmt: skip
def test_control_groups_limit_the_cpus(
    tmp_path: Path, groups: str, files: dict[str, str], cpus: int
) -> None:
    """Both versions, ancestors included; odd files are no limit."""
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _ops_cpu.cpu_quota(str(tmp_path / "groups"), str(tmp_path)) == cpus
    assert _ops_cpu.cpu_quota(str(tmp_path / "absent"), str(tmp_path)) == 0


def test_the_environment_sets_the_number_of_threads() -> None:
    assert in_new_process("print(o.num_threads())", FD_LITE_NUM_THREADS="3").stdout == "3\n"
    done = in_new_process("print(o.num_threads())", FD_LITE_NUM_THREADS="")
    quota = _ops_cpu.cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup")
    used = len(_ops_cpu.performance_cpus("/sys/devices", sorted(os.sched_getaffinity(0))))
    assert int(done.stdout) == (min(quota, used) if quota else used)
    for wrong in ("0", "-2", "two", "1.5", "99999"):
        done = in_new_process("o.num_threads()", FD_LITE_NUM_THREADS=wrong)
        assert f"FD_LITE_NUM_THREADS is '{wrong}', expected a number from 1 to 4096" in done.stderr


def test_a_process_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="number of threads is 0, expected at least 1"):
        _ops_cpu.set_num_threads(0)


@pytest.mark.parametrize("microseconds", [0, 20, 2000])
def test_loops_end_however_patient_idle_threads_are(microseconds: int) -> None:
    weight, x = big_weight()
    with threads(1):
        expected = multiply(x, weight)
    _ops_cpu.set_loop_patience(microseconds)
    try:
        with threads(4):
            for pause in (0, 0, 1e-4, 1e-4, 3e-3, 0):
                time.sleep(pause)
                np.testing.assert_array_equal(multiply(x, weight), expected)
    finally:
        _ops_cpu.set_loop_patience(20)


def test_patience_has_bounds() -> None:
    for wrong in (-1, 10_001):
        with pytest.raises(ValueError, match=f"patience is {wrong} microseconds, expected 0 to"):
            _ops_cpu.set_loop_patience(wrong)


def test_several_python_threads_may_compute_at_once() -> None:
    weight, x = big_weight()
    with threads(1):
        expected = multiply(x, weight)
    found: list[np.ndarray] = []
    with threads(4):
        workers = [
            threading.Thread(target=lambda: found.extend(multiply(x, weight) for _ in range(20)))
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(found) == 80
    for result in found:
        np.testing.assert_array_equal(bits(result), bits(expected))


def test_a_forked_process_computes_with_threads_of_its_own() -> None:
    code = """
import os
import numpy as np
data = np.arange(1 << 21, dtype=np.uint64)
view = (data.__array_interface__["data"][0], "int64", [data.size], [1])
expected = int(np.bitwise_xor.reduce(data))
assert o.fold_memory(view) == expected
child = os.fork()
if child == 0:
    os._exit(0 if all(o.fold_memory(view) == expected for _ in range(50)) else 1)
assert os.waitpid(child, 0)[1] == 0
assert o.fold_memory(view) == expected
"""
    done = in_new_process(code, FD_LITE_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr


def test_idle_threads_sleep() -> None:
    """Helpers must not burn the cores of other processes between ops."""
    code = """
import time
import numpy as np
data = np.ones(1 << 20, np.uint64)
view = (data.__array_interface__["data"][0], "int64", [data.size], [1])
o.fold_memory(view)
time.sleep(0.05)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    done = in_new_process(code, FD_LITE_NUM_THREADS="8")
    assert float(done.stdout) < 0.1, done.stderr


def test_shared_loops_are_timed_when_asked() -> None:
    weight, x = big_weight()
    with threads(4):
        _ops_cpu.time_loops(True)
        try:
            _ops_cpu.loop_times()
            for _ in range(3):
                multiply(x, weight)
        finally:
            _ops_cpu.time_loops(False)
        multiply(x, weight)
    loops = _ops_cpu.loop_times()
    assert len(loops) == 3
    for wall, slowest, fastest, mean in loops:
        assert 0 <= fastest <= mean <= slowest <= wall
        assert slowest > 0
    assert _ops_cpu.loop_times() == []


@pytest.mark.parametrize("workers", [1, 2, 3, 16, 100])
@pytest.mark.parametrize("grain", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("count", [1, 2, 15, 64, 1152, 3584, 3585])
def test_pieces_cover_a_loop_once_and_shrink(count: int, grain: int, workers: int) -> None:
    pieces = _ops_cpu.loop_pieces(count, grain, workers)
    ends = [0, *(end for _, end in pieces)]
    assert [begin for begin, _ in pieces] == ends[:-1]
    assert ends[-1] == count
    sizes = [end - begin for begin, end in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= max(grain, count / (2 * workers))
    assert all(size >= grain / 2 - 1 for size in sizes[:-1])
    if grain % 2 == 0:
        assert all(begin % 2 == 0 for begin, _ in pieces)


def test_the_last_pieces_are_small() -> None:
    """Experts of 300B, one token on 16 threads: who takes the last piece keeps the others waiting
    for a hundredth of the loop at most."""
    pieces = _ops_cpu.loop_pieces(8 * 448, 2, 16)
    assert pieces[-1][1] - pieces[-1][0] <= 8 * 448 / 16 / 100
    assert len(pieces) < 200


@pytest.mark.parametrize("microseconds", [0, 300])
def test_more_threads_than_processors_and_loops_of_all_sizes(microseconds: int) -> None:
    """Helpers come late, join the next loop instead, or find that few are wanted."""
    weight, x = big_weight()
    with threads(1):
        expected = multiply(x, weight)
    _ops_cpu.set_loop_patience(microseconds)
    try:
        for _ in range(20):
            for count in (16, 2, 5, 1, 9):
                with threads(count):
                    np.testing.assert_array_equal(multiply(x, weight), expected)
    finally:
        _ops_cpu.set_loop_patience(20)
