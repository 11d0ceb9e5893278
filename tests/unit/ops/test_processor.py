"""Which cores loops use, and where the pages of weights lie, by trees like those of the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_lite import _ops_cpu, processor

ALL = list(range(8))


def make_tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3,8\n", [0, 1, 2, 3, 8]), ("5", [5]), ("0-0,2-3", [0, 2, 3]),
        ("", []), ("\n", []), ("none", []), ("3-1", []), ("1,x", []), ("-1", []),
        ("0-99999999", []),
    ],
)  # fmt: skip
def test_lists_of_cpus(text: str, cpus: list[int]) -> None:
    assert _ops_cpu.parse_cpu_list(text) == cpus


def capacities(*values: int) -> dict[str, str]:
    return {f"system/cpu/cpu{i}/cpu_capacity": f"{value}\n" for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("files", "allowed", "used"),
    [
        ({}, ALL, ALL),
        ({"cpu_core/cpus": "0-3\n", "cpu_atom/cpus": "4-7\n"}, ALL, [0, 1, 2, 3]),
        ({"cpu_core/cpus": "0-3\n"}, [2, 3, 4, 5], [2, 3]),
        ({"cpu_core/cpus": "0-3\n"}, [4, 5], [4, 5]),  # only slow ones are allowed
        ({"cpu_core/cpus": "nonsense\n"}, ALL, ALL),
        (capacities(446, 446, 446, 446, 1024, 1024, 871, 871), ALL, [4, 5, 6, 7]),
        (capacities(446, 446, 446, 446, 1024, 1024, 871, 871), [0, 1], [0, 1]),
        (capacities(*[1024] * 8), ALL, ALL),
        # Intel names its kinds by name and by capacity; the name decides.
        ({"cpu_core/cpus": "0-1", **capacities(1024, 1024, 600, 600)}, [0, 1, 2, 3], [0, 1]),
    ],
)
def test_fast_cores_only_where_cores_differ(
    tmp_path: Path, files: dict[str, str], allowed: list[int], used: list[int]
) -> None:
    assert _ops_cpu.performance_cpus(make_tree(tmp_path, files), allowed) == used


TWO_NODES = {
    "system/node/has_memory": "0-1\n",
    "system/node/node0/cpulist": "0-3\n",
    "system/node/node1/cpulist": "4-7\n",
}


@pytest.mark.parametrize(
    ("files", "cpus", "nodes"),
    [
        (TWO_NODES, ALL, [0, 1]),
        (TWO_NODES, [5, 6], [1]),
        ({}, ALL, []),
        ({**TWO_NODES, "system/node/has_memory": "0\n"}, ALL, [0]),  # processors without memory
        ({**TWO_NODES, "system/node/node2/cpulist": "\n"}, ALL, [0, 1]),  # memory alone
        ({"system/node/has_memory": "0-2\n"}, ALL, []),
    ],
)
def test_memory_nodes_of_the_cores_in_use(
    tmp_path: Path, files: dict[str, str], cpus: list[int], nodes: list[int]
) -> None:
    assert _ops_cpu.nodes_of(make_tree(tmp_path, files), cpus) == nodes


IN_HUGE_PAGES = """
import re
from pathlib import Path
from fastdeploy_lite import device
import paddle
from fastdeploy_lite import processor
from fastdeploy_lite.model_executor import ops

weight = ops.allocate_weight("int8", 4096, 4096, paddle.CPUPlace())
data = weight.tensors["data"]
address = data.data_ptr() + data.size // 2
for line in Path("/proc/self/smaps").read_text().splitlines():
    if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(found[1], 16) <= address < int(found[2], 16)
    elif inside and line.startswith("VmFlags:"):
        print("hg" in line.split(), "small pages (FD_LITE_HUGE_PAGES=0)" in processor.describe())
"""


@pytest.mark.skipif(not processor.HUGE_PAGES.exists(), reason="no transparent huge pages")
@pytest.mark.parametrize("wanted", [True, False])
def test_weights_are_asked_for_in_huge_pages(wanted: bool) -> None:
    """In a new process: an allocator gives memory that was advised before to anybody."""
    done = subprocess.run(
        [sys.executable, "-c", IN_HUGE_PAGES],
        env={**os.environ, "FD_LITE_HUGE_PAGES": str(int(wanted))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(wanted), str(not wanted)]


def test_advice_on_memory_keeps_its_contents() -> None:
    """Also for parts of pages, for nothing, and for a node that is not there."""
    data = np.arange(3 << 20, dtype=np.uint8)
    address = data.__array_interface__["data"][0]
    for begin, size in ((1, data.nbytes - 7), (5, 100), (0, 0)):
        _ops_cpu.place_weights(address + begin, size, True, [0, 1])
    assert _ops_cpu.place_weights(address, 100, True, [0, 1]) == (False, False)
    assert _ops_cpu.place_weights(address, data.nbytes, False, [0, 4096]) == (False, False)
    np.testing.assert_array_equal(data, np.arange(3 << 20, dtype=np.uint8))


def test_the_line_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_ops_cpu, "allowed_cpus", lambda: ALL)
    monkeypatch.setattr(_ops_cpu, "loop_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(processor, "memory_nodes", lambda: [0, 1])
    monkeypatch.setattr(processor, "HUGE_PAGES", tmp_path / "enabled")
    assert "performance cores of 8 CPUs" in processor.describe()
    assert "small pages (the kernel knows no transparent huge pages)" in processor.describe()
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert "enabled is never), dealt out among memory nodes 0, 1" in processor.describe()
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(_ops_cpu, "loop_cpus", lambda: ALL)
    monkeypatch.setattr(processor, "memory_nodes", lambda: [0])
    assert processor.describe().endswith(f" on 8 CPUs, {_ops_cpu.current_isa()};"
                                         " weights in huge pages")  # fmt: skip


def test_threads_are_as_many_as_cores_in_use() -> None:
    assert _ops_cpu.allowed_cpus() == sorted(os.sched_getaffinity(0))
    assert set(_ops_cpu.loop_cpus()) <= set(_ops_cpu.allowed_cpus())
