"""Models by the architecture name of config.json."""

from __future__ import annotations

from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.model_executor.models.ernie4_5_moe import Ernie4_5_MoeForCausalLM
from fastdeploy_lite.utils.errors import ConfigError

MODELS: dict[str, type[Ernie4_5_MoeForCausalLM]] = {
    "Ernie4_5_MoeForCausalLM": Ernie4_5_MoeForCausalLM,
}


def model_class(config: ModelConfig) -> type[Ernie4_5_MoeForCausalLM]:
    """Return the class that runs `config`; ConfigError when there is none."""
    names = config.raw.get("architectures") or []
    for name in names:
        if name in MODELS:
            return MODELS[name]
    raise ConfigError(
        f"{config.source}: architectures {names!r} are not supported, expected one of "
        f"{', '.join(MODELS)}"
    )
