"""The registry under FastDeploy's name for it."""

from fastdeploy_lite.models.registry import ModelRegistry

__all__ = ["ModelRegistry"]
