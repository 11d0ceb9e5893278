"""Where the model runs, decided from files and the environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_lite import device, paddle_device
from fastdeploy_lite.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh_decision() -> Iterator[None]:
    device.decide.cache_clear()
    yield
    device.decide.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch, *, cards: int, cuda_paddle: bool, module: bool, plugin: bool
) -> None:
    monkeypatch.delenv("FD_LITE_DEVICE", raising=False)
    monkeypatch.setattr(device, "_count_cards", lambda: cards)
    monkeypatch.setattr(device, "_paddle_cuda", lambda: "12.6" if cuda_paddle else None)
    monkeypatch.setattr(device, "has_cuda_module", lambda: module)
    folder = Path("/plugin") if plugin else None
    monkeypatch.setattr(paddle_device, "plugin_folder", lambda: folder)


@pytest.mark.parametrize(
    ("cards", "cuda_paddle", "module", "plugin", "kind", "reason"),
    [
        (0, False, False, False, "cpu", "no NVIDIA card is present"),
        (1, False, False, False, "cpu", "the CUDA module is not built"),
        (1, False, True, False, "cpu", "the NVIDIA plug-in is not built"),
        (1, False, True, True, "nvidia", "Paddle is a CPU build, with the plug-in"),
        (1, True, True, False, "gpu", "Paddle is a CUDA build"),
        (0, True, True, True, "cpu", "no NVIDIA card is present"),
    ],
)
def test_automatic_choice(
    monkeypatch: pytest.MonkeyPatch,
    cards: int,
    cuda_paddle: bool,
    module: bool,
    plugin: bool,
    kind: str,
    reason: str,
) -> None:
    pretend(monkeypatch, cards=cards, cuda_paddle=cuda_paddle, module=module, plugin=plugin)
    decided = device.decide()
    assert decided.kind == kind
    assert reason in decided.reason
    assert device.describe()["device"] == kind


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=1, cuda_paddle=True, module=True, plugin=True)
    monkeypatch.setenv("FD_LITE_DEVICE", "cpu")
    assert device.decide().kind == "cpu"
    device.decide.cache_clear()
    monkeypatch.setenv("FD_LITE_DEVICE", "NVIDIA")
    assert device.decide().kind == "nvidia"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("tpu", "FD_LITE_DEVICE is 'tpu', expected one of auto, gpu, nvidia, cpu"),
        ("gpu", "FD_LITE_DEVICE is 'gpu' but no NVIDIA card is present"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, wanted: str, message: str
) -> None:
    """Never a silent fallback: the user asked for it by name."""
    pretend(monkeypatch, cards=0, cuda_paddle=True, module=True, plugin=True)
    monkeypatch.setenv("FD_LITE_DEVICE", wanted)
    with pytest.raises(ConfigError, match=message):
        device.decide()


def test_asking_a_cpu_process_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=0, cuda_paddle=False, module=False, plugin=False)
    with pytest.raises(ConfigError, match=r"device 'gpu' was asked for .* no NVIDIA card"):
        device.activate(0, "gpu")
    assert device.activate(0, "cpu").is_cpu_place()
    assert device.activation_dtype(device.activate()) == "float32"


def test_a_process_computes_on_one_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two were tried in one process: the ops of the one read the tensors of the other."""
    pretend(monkeypatch, cards=1, cuda_paddle=False, module=True, plugin=True)
    monkeypatch.setattr(device, "_active", "nvidia")
    monkeypatch.setattr(paddle_device, "register", lambda: None)
    with pytest.raises(ConfigError, match="'cpu' was asked for but this process computes on 'nv"):
        device.activate(0, "cpu")


def test_hidden_cards_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device._count_cards() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert device._count_cards() == 0


def test_the_plugin_must_come_before_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(paddle_device.ROOT_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "paddle", sys)  # any module: only the name counts
    with pytest.raises(ConfigError, match="paddle was imported before fastdeploy_lite"):
        paddle_device.register()
    monkeypatch.setenv(paddle_device.ROOT_VARIABLE, "/elsewhere")
    with pytest.raises(ConfigError, match="CUSTOM_DEVICE_ROOT is '/elsewhere' but"):
        paddle_device.register()
    monkeypatch.setenv(paddle_device.ROOT_VARIABLE, str(paddle_device.PLUGIN_FOLDER))
    paddle_device.register()


def test_deciding_does_not_import_paddle() -> None:
    code = "import sys; from fastdeploy_lite import device; device.describe(); " + (
        "import fastdeploy_lite.request.step; sys.exit('paddle' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


IMPORT_PADDLE = """
import logging
{before}
from fastdeploy_lite import device
device.activate(wanted="cpu")
root = logging.getLogger()
logging.getLogger("somebody").info("small talk")
print(len(root.handlers), root.level)
"""


@pytest.mark.parametrize(
    ("before", "root"),
    [
        ("", "0 30"),
        ("logging.basicConfig(level=logging.ERROR)", "1 40"),
        ("logging.basicConfig(level=logging.INFO, format='%(message)s')", "1 20"),
    ],
    ids=["untouched", "a handler of the user's", "INFO asked for"],
)
def test_importing_paddle_leaves_logging_and_warnings_alone(before: str, root: str) -> None:
    """Paddle warns about ccache and takes the root logger, were it not prevented."""
    code = IMPORT_PADDLE.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == root
    assert "ccache" not in done.stderr
    assert ("small talk" in done.stderr) == (root == "1 20")
