"""Model classes by the architecture name of config.json; plug-ins may add their own."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdeploy_lite.models.family import (
    ModelConfig,
    ModelFamily,
    known_architectures,
    register_family,
)
from fastdeploy_lite.utils.errors import ConfigError

ModelClass = type[Any]
"""Built by `(config, source, cos_sin, dtype)`; see `models.ernie4_5.model`."""


class ModelRegistry:
    """The known architectures."""

    _classes: ClassVar[dict[str, ModelClass]] = {}

    @classmethod
    def register_model_class(
        cls,
        model: ModelClass,
        architecture: str | None = None,
        family: ModelFamily | None = None,
    ) -> ModelClass:
        """Add `model` under `architecture` (its own name by default); usable as a decorator.

        Args:
            model: the class that runs the model.
            architecture: as config.json says it.
            family: how config.json and the files are read; by default `model.family`, which a
                subclass of a known model has.

        Raises:
            ConfigError: no family is known, so the configuration could not be read.
        """
        name = architecture or model.__name__
        reader = family or getattr(model, "family", None)
        if reader is None:
            raise ConfigError(
                f"{model.__name__}: nothing says how config.json of {name!r} is read: give the"
                " class a `family` (models.family.ModelFamily), or pass one"
            )
        register_family(reader, name)
        cls._classes[name] = model
        return model

    @classmethod
    def get_supported_archs(cls) -> list[str]:
        """Return the architecture names that can be run."""
        return sorted({*cls._classes, *known_architectures()})

    @classmethod
    def get_class(cls, config: ModelConfig) -> ModelClass:
        """Return the class that runs `config`: a registered one, else the family's own."""
        for name in config.raw.get("architectures") or []:
            if name in cls._classes:
                return cls._classes[name]
        found: ModelClass = config.family.model_class()
        return found
