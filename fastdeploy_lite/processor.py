"""What a process computes with on a CPU: threads, instruction set, and where its weights lie.

Cores that are slower than others are left out, since a loop ends with its slowest thread. Weights
are asked for in 2 MiB pages and, where the CPUs in use belong to several memory nodes, dealt out
among these. Whatever the kernel refuses stays as it was; `describe` says what was taken.
"""

from __future__ import annotations

import functools
from pathlib import Path

from fastdeploy_lite import _ops_cpu, envs

DEVICES = "/sys/devices"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@functools.cache
def memory_nodes() -> list[int]:
    """Memory nodes of the CPUs that loops use; empty where the kernel names none."""
    return _ops_cpu.nodes_of(DEVICES, _ops_cpu.loop_cpus())


def place_weights(address: int, nbytes: int) -> None:
    """Say how the pages of fresh memory for weights are wanted; must come before they are written.

    Args:
        address: where the memory begins.
        nbytes: its size; what is no whole page stays as it is.
    """
    _ops_cpu.place_weights(address, nbytes, envs.FD_LITE_HUGE_PAGES, memory_nodes())


def describe() -> str:
    """Return one line on threads, instruction set and pages of weights."""
    used, allowed = _ops_cpu.loop_cpus(), _ops_cpu.allowed_cpus()
    which = f"performance cores of {len(allowed)} CPUs" if used != allowed else f"{len(used)} CPUs"
    nodes = memory_nodes()
    dealt = f", dealt out among memory nodes {', '.join(map(str, nodes))}" if len(nodes) > 1 else ""
    return (
        f"{_ops_cpu.num_threads()} threads on {which}, {_ops_cpu.current_isa()};"
        f" weights in {_pages(HUGE_PAGES)}{dealt}"
    )


def _pages(setting: Path) -> str:
    """What kind of pages weights get, by the kernel's setting."""
    if not envs.FD_LITE_HUGE_PAGES:
        return "small pages (FD_LITE_HUGE_PAGES=0)"
    try:
        text = setting.read_text()
    except OSError:
        return "small pages (the kernel knows no transparent huge pages)"
    if "[never]" in text:
        return f"small pages ({setting} is never)"
    return "huge pages"
