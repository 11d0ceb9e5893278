"""Checkpoint files: named host arrays out of folders, and folders out of named arrays.

Nothing here imports Paddle: reading, checking and writing need numpy only.
"""

from fastdeploy_lite.checkpoint.reader import Checkpoint
from fastdeploy_lite.checkpoint.tensor import HostTensor, TensorInfo
from fastdeploy_lite.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "HostTensor", "TensorInfo"]
