"""The one decision where the model runs: "gpu", "nvidia" or "cpu".

* "gpu": a CUDA build of Paddle, whose own place is used;
* "nvidia": Paddle's CPU build with the plug-in of `paddle_device`;
* "cpu": everything else.

The decision looks at files only, so that a process which never computes (the HTTP server) can ask
for it without importing Paddle; `activate` imports Paddle and makes the place current.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdeploy_lite import paddle_device
from fastdeploy_lite.utils.errors import ConfigError, VariableError, quote

DeviceKind = Literal["gpu", "nvidia", "cpu"]
DEVICE_VARIABLE = "FD_LITE_DEVICE"
CARDS_VARIABLE = "CUDA_VISIBLE_DEVICES"
CUDA_MODULE = "fastdeploy_lite._ops_cuda"
_PADDLE_LAYOUT = "[%(asctime)-15s] [%(levelname)8s] %(filename)s"
_KINDS: tuple[DeviceKind, ...] = ("gpu", "nvidia", "cpu")
_active: str | None = None


@dataclass(frozen=True)
class Device:
    """Where the model runs and why.

    Attributes:
        kind: Paddle device type.
        reason: one sentence for people.
    """

    kind: DeviceKind
    reason: str

    @property
    def is_cuda(self) -> bool:
        """Whether the CUDA ops compute."""
        return self.kind != "cpu"


@functools.cache
def decide() -> Device:
    """Return the device of this process; the first answer holds.

    Raises:
        VariableError: `FD_LITE_DEVICE` names an unknown device or one that is not there.
    """
    asked = wanted()
    if asked == "auto":
        return _automatic()
    if asked not in _KINDS:
        raise VariableError(
            f"{DEVICE_VARIABLE} is {asked!r}, expected one of auto, {', '.join(_KINDS)}"
        )
    missing = _missing(asked)
    if missing is not None:
        raise VariableError(f"{DEVICE_VARIABLE} is {asked!r} but {missing}")
    return Device(asked, f"{DEVICE_VARIABLE}={asked}")


def wanted() -> str:
    """What `FD_LITE_DEVICE` asks for; "auto" when it asks for nothing."""
    return os.environ.get(DEVICE_VARIABLE, "").strip().lower() or "auto"


def prepare_environment() -> None:
    """Do what has to be done before `import paddle`: register the plug-in where it is used.

    Raises:
        ConfigError: see `decide` and `paddle_device.register`.
    """
    # Paddle says at import that its C++ extensions would compile faster with ccache; this package
    # compiles none through Paddle.
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    if decide().kind == "nvidia":
        paddle_device.register()


def activate(index: int = 0, wanted: str | None = None) -> Any:
    """Import Paddle, make the device current and return its place.

    Args:
        index: number of the card among those visible; ignored on CPU.
        wanted: "cpu" to leave a card alone, else the decided kind or None.

    Raises:
        ConfigError: the card does not exist, `wanted` is not what was decided, or this process
            computes on another kind of device already: its ops would take the new one's tensors.
    """
    global _active  # noqa: PLW0603 - Paddle's current device is the process's, too
    prepare_environment()
    import paddle  # noqa: PLC0415 - only the process that computes pays for the import

    _release_root_logger()
    decided = decide()
    kind = decided.kind if wanted in (None, "auto") else wanted
    if kind not in _KINDS:
        raise ConfigError(f"device: found {quote(kind)}, expected one of auto, {', '.join(_KINDS)}")
    if kind not in ("cpu", decided.kind):
        raise ConfigError(
            f"device {kind!r} was asked for but this process runs on {decided.kind!r}: "
            f"{decided.reason}"
        )
    if _active not in (None, kind):
        raise ConfigError(
            f"device {kind!r} was asked for but this process computes on {_active!r} already: "
            "use a process for each"
        )
    if kind == "cpu":
        paddle.set_device("cpu")
        _active = kind
        return paddle.CPUPlace()
    try:
        paddle.set_device(f"{kind}:{index}")
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"device {kind}:{index} cannot be used: {error}") from error
    _active = kind
    return paddle.CUDAPlace(index) if kind == "gpu" else paddle.CustomPlace(kind, index)


def visible_cards() -> list[str]:
    """Names of the cards that this process may see, as `CUDA_VISIBLE_DEVICES` takes them.

    Reads device files, so that no driver context is made.
    """
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get(CARDS_VARIABLE)
    if visible is None:
        return [str(number) for number in range(present)]
    named = [part.strip() for part in visible.split(",")]
    return [name for name in named if name not in ("", "-1")][:present]


def _release_root_logger() -> None:
    """Take back what importing Paddle did to a root logger without handlers.

    It adds a handler and sets the level INFO, so that every library's small talk, this package's
    included, would appear on the user's terminal.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        layout = getattr(handler.formatter, "_fmt", None) or ""
        if type(handler) is logging.StreamHandler and layout.startswith(_PADDLE_LAYOUT):
            root.removeHandler(handler)
            root.setLevel(logging.WARNING)


def activation_dtype(place: Any) -> str:
    """Paddle dtype of activations and KV cache: float32 on CPU, bfloat16 on a card."""
    return "float32" if place.is_cpu_place() else "bfloat16"


def describe() -> dict[str, str]:
    """Return the decision and its grounds, one entry a line of `collect-env`."""
    device = decide()
    plugin = paddle_device.plugin_folder()
    return {
        "device": device.kind,
        "reason": device.reason,
        "paddle": _paddle_version() or "not installed",
        "paddle CUDA": _paddle_cuda() or "none",
        "CUDA module": "built" if has_cuda_module() else "not built",
        "NVIDIA plug-in": str(plugin) if plugin else "not built",
        "NVIDIA cards": str(_count_cards()),
    }


def _automatic() -> Device:
    """The best device that is complete; a card that cannot be used is said, never passed over."""
    kind: DeviceKind = "gpu" if _paddle_cuda() else "nvidia"
    missing = _missing(kind)
    if missing is None:
        build = "a CUDA build" if kind == "gpu" else "a CPU build, with the plug-in"
        return Device(kind, f"an NVIDIA card is present and Paddle is {build}")
    return Device("cpu", missing)


def _missing(kind: str) -> str | None:
    """What keeps `kind` from being used, as half a sentence; None when nothing does."""
    if kind == "cpu":
        return None
    if _count_cards() == 0:
        return "no NVIDIA card is present"
    if not has_cuda_module():
        return "the CUDA module is not built: install again where nvcc is on PATH"
    if kind == "gpu" and not _paddle_cuda():
        return "the installed Paddle has no CUDA support"
    if kind == "nvidia" and paddle_device.plugin_folder() is None:
        return "the NVIDIA plug-in is not built: install again where nvcc is on PATH"
    return None


def _count_cards() -> int:
    return len(visible_cards())


def has_cuda_module() -> bool:
    """Whether this installation has the CUDA ops."""
    return importlib.util.find_spec(CUDA_MODULE) is not None


def _paddle_version() -> str | None:
    return _version_field("full_version")


def _paddle_cuda() -> str | None:
    """CUDA version that the installed Paddle was built with, None for a CPU build."""
    version = _version_field("cuda_version")
    return None if version in (None, "False", "None") else version


@functools.cache
def _version_field(name: str) -> str | None:
    """Read a field of Paddle's generated version file without importing Paddle."""
    spec = importlib.util.find_spec("paddle")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "version" / "__init__.py"
    if not path.is_file():
        return None
    found = re.search(rf"^{name}\s*=\s*'([^']*)'", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None
