"""The NVIDIA plug-in for Paddle's pluggable-device interface: where it is, how it is registered.

Paddle's CPU wheel loads every shared object in the folder named by `CUSTOM_DEVICE_ROOT` once, while
`import paddle` runs; so registration is an environment variable set before that import. Nothing
here imports Paddle.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastdeploy_lite.utils.errors import ConfigError

ROOT_VARIABLE = "CUSTOM_DEVICE_ROOT"
PLUGIN_FOLDER = Path(__file__).resolve().parent / "_paddle_device"


def plugin_folder() -> Path | None:
    """Return the folder with the built plug-in, None when this installation has none."""
    return PLUGIN_FOLDER if any(PLUGIN_FOLDER.glob("*.so")) else None


def is_registered() -> bool:
    """Whether Paddle, imported now or later, finds the plug-in."""
    return os.environ.get(ROOT_VARIABLE) == str(PLUGIN_FOLDER)


def register() -> None:
    """Tell Paddle where the plug-in is.

    Raises:
        ConfigError: Paddle was imported already without it, or another plug-in folder is set.
    """
    if is_registered():
        return
    other = os.environ.get(ROOT_VARIABLE)
    if other:
        raise ConfigError(
            f"{ROOT_VARIABLE} is {other!r} but the NVIDIA plug-in is in '{PLUGIN_FOLDER}': "
            "unset it, or set FD_LITE_DEVICE=cpu"
        )
    if "paddle" in sys.modules:
        raise ConfigError(
            "paddle was imported before fastdeploy_lite, too early for the NVIDIA plug-in: "
            f"import fastdeploy_lite first, set {ROOT_VARIABLE}='{PLUGIN_FOLDER}', "
            "or set FD_LITE_DEVICE=cpu"
        )
    os.environ[ROOT_VARIABLE] = str(PLUGIN_FOLDER)
