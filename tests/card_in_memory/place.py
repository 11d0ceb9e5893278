"""Makes the place `nvidia:0` current; to be imported before anything of the project.

CUSTOM_DEVICE_ROOT names the folder of the plug-in (plugin.py); without it one is built.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plugin

if "CUSTOM_DEVICE_ROOT" not in os.environ:
    _folder = tempfile.TemporaryDirectory()
    plugin.build(Path(_folder.name))
    os.environ["CUSTOM_DEVICE_ROOT"] = _folder.name
os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle tells at length of the plug-in

sys.path.insert(0, str(plugin.HERE.parent))

import numpy as np
import paddle
from fake_cuda import FakeCuda

__all__ = ["CARD", "FakeCuda", "memory", "paddle", "when_synchronized"]

paddle.set_device("nvidia:0")
CARD = paddle.CustomPlace("nvidia", 0)


def when_synchronized(work: Callable[[], None]) -> None:
    """Have `work` done whenever the whole card is waited for, as Paddle's own copies do."""
    _kept.append(ctypes.CFUNCTYPE(None)(work))
    library = ctypes.CDLL(str(Path(os.environ["CUSTOM_DEVICE_ROOT"]) / plugin.LIBRARY))
    library.when_synchronized(_kept[-1])


_kept: list[Any] = []


def memory(tensor: Any, dtype: str) -> np.ndarray:
    """A tensor's own memory, wherever Paddle thinks that it is."""
    nbytes = int(tensor.size) * np.dtype(dtype).itemsize
    bytes_ = (ctypes.c_uint8 * nbytes).from_address(int(tensor.data_ptr()))
    return np.frombuffer(bytes_, dtype).reshape(tensor.shape)
