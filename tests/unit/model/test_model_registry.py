"""Model classes by architecture name, and classes that plug-ins add."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_driver import make_runner
from tiny_model import tiny_config, write_tiny_model

import fastdeploy_lite
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.models import family
from fastdeploy_lite.models.ernie4_5.model import Ernie4_5_MoeForCausalLM
from fastdeploy_lite.models.registry import ModelRegistry
from fastdeploy_lite.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRegistry, "_classes", dict(ModelRegistry._classes))
    monkeypatch.setattr(family, "_registered", dict(family._registered))


def test_the_package_forwards_the_registry() -> None:
    assert fastdeploy_lite.ModelRegistry is ModelRegistry
    assert ModelRegistry.get_supported_archs() == [
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
    ]


def test_a_plug_in_runs_the_checkpoints_that_name_it(tmp_path: Path) -> None:
    @ModelRegistry.register_model_class
    class Mine(Ernie4_5_MoeForCausalLM):
        pass

    names = ["Mine", "Ernie4_5_MoeForCausalLM"]
    runner = make_runner(write_tiny_model(tmp_path, layers=1, architectures=names))
    assert type(runner.model) is Mine
    own = ModelConfig.from_dict(tiny_config())
    assert ModelRegistry.get_class(own) is Ernie4_5_MoeForCausalLM


def test_a_plug_in_may_take_over_an_architecture() -> None:
    class Mine(Ernie4_5_MoeForCausalLM):
        pass

    ModelRegistry.register_model_class(Mine, "Ernie4_5_MoeForCausalLM")
    assert ModelRegistry.get_class(ModelConfig.from_dict(tiny_config())) is Mine


def test_an_unknown_architecture_names_what_is_known() -> None:
    ModelRegistry.register_model_class(Ernie4_5_MoeForCausalLM, "Other")
    with pytest.raises(ConfigError, match=r"architectures: found \['Llama'\].*'Other'$"):
        ModelConfig.from_dict(tiny_config(architectures=["Llama"]))


def test_a_class_that_no_family_reads_is_refused() -> None:
    class Qwen3MoeForCausalLM:
        pass

    with pytest.raises(ConfigError, match=r"how config.json of 'Qwen3MoeForCausalLM' is read"):
        ModelRegistry.register_model_class(Qwen3MoeForCausalLM)
    assert "Qwen3MoeForCausalLM" not in ModelRegistry.get_supported_archs()
