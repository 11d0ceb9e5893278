"""Model classes by the architecture name of config.json; plug-ins may add their own."""

from __future__ import annotations

from typing import ClassVar

from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.model_executor.models.ernie4_5_moe import Ernie4_5_MoeForCausalLM
from fastdeploy_lite.utils.errors import ConfigError

ModelClass = type[Ernie4_5_MoeForCausalLM]


class ModelRegistry:
    """The known architectures."""

    _classes: ClassVar[dict[str, ModelClass]] = {"Ernie4_5_MoeForCausalLM": Ernie4_5_MoeForCausalLM}

    @classmethod
    def register_model_class(cls, model: ModelClass, architecture: str | None = None) -> ModelClass:
        """Add `model` under `architecture` (its own name by default); usable as a decorator."""
        cls._classes[architecture or model.__name__] = model
        return model

    @classmethod
    def get_supported_archs(cls) -> list[str]:
        """Return the architecture names that can be run."""
        return sorted(cls._classes)

    @classmethod
    def get_class(cls, config: ModelConfig) -> ModelClass:
        """Return the class that runs `config`; ConfigError when there is none."""
        names = config.raw.get("architectures") or []
        for name in names:
            if name in cls._classes:
                return cls._classes[name]
        known = ", ".join(cls.get_supported_archs())
        raise ConfigError(
            f"{config.source}: architectures {names!r} are not supported, expected one of {known}"
        )
