"""The ERNIE-4.5 model under FastDeploy's name for it."""

from fastdeploy_lite.models.ernie4_5.model import Ernie4_5_MoeForCausalLM

__all__ = ["Ernie4_5_MoeForCausalLM"]
