"""ERNIE-4.5 text models: `config` reads config.json, `names` the tensors, `model` runs them."""

from fastdeploy_lite.models.ernie4_5.names import Ernie45

FAMILY = Ernie45()
