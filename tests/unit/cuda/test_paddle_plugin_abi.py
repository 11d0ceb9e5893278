"""The plug-in's own declaration of Paddle's device interface against the installed header."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import paddle
import pytest

ROOT = Path(__file__).resolve().parents[3]
ABI = ROOT / "custom_ops" / "paddle_device" / "device_abi.h"
HEADER = Path("paddle", "phi", "backends", "device_ext.h")
INCLUDE = Path(paddle.__file__).parent / "include"


def named_slots() -> list[str]:
    """Every typed function slot of the declaration."""
    body = ABI.read_text(encoding="utf-8").split("struct DeviceInterface {")[1].split("};")[0]
    return re.findall(r"Status \(\*(\w+)\)", body)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(not (INCLUDE / HEADER).is_file(), reason="this Paddle ships no device header")
def test_every_slot_lies_where_paddle_has_it(tmp_path: Path) -> None:
    slots = named_slots()
    assert len(slots) > 40
    checks = [
        f"static_assert(offsetof(C_DeviceInterface, {name}) == "
        f'offsetof(abi::DeviceInterface, {name}), "{name}");'
        for name in slots
    ]
    for name in ("interface", "version", "device_type", "sub_device_type"):
        checks.append(
            f"static_assert(offsetof(CustomRuntimeParams, {name}) == "
            f'offsetof(abi::RuntimeParams, {name}), "{name}");'
        )
    checks.append("static_assert(sizeof(abi::DeviceInterface) <= sizeof(C_DeviceInterface));")
    checks.append(
        "static_assert(int(abi::kFailed) == C_FAILED && int(abi::kSuccess) == C_SUCCESS);"
    )
    checks.append(
        "static_assert(abi::kInterfaceVersion.minor == PADDLE_CUSTOM_RUNTIME_MINOR_VERSION);"
    )
    source = tmp_path / "abi.cc"
    lines = [
        f"#include <{HEADER}>",
        f'#include "{ABI}"',
        "namespace abi = fd::paddle_abi;",
        *checks,
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    command = ["g++", "-std=c++17", "-Wno-invalid-offsetof", f"-I{INCLUDE}", "-fsyntax-only"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plugin_fills_every_slot() -> None:
    source = (ABI.parent / "nvidia.cc").read_text(encoding="utf-8")
    filled = set(re.findall(r"table\.(\w+) =", source))
    assert filled == set(named_slots())
