"""Where the parameters of a draft layer come from: beside the model's, in bf16, never quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.host_weights import FileWeights, HostWeights, PermutedWeights
from fastdeploy_lite.checkpoint.location import find_weight_files
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.model_executor.ops import PackedWeight
from fastdeploy_lite.model_executor.weights import CheckpointSource
from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

_FLOATS = ("BF16", "F32")
_FOLDER = "mtp"  # below the model's, where FastDeploy's releases have draft weights
_MARK = ".mtp_linear_proj."


class DraftFiles(FileWeights):
    """The tensors of a draft layer in the files of a folder.

    Args:
        checkpoint: the folder, opened with the model's configuration.
            Each rank takes its part of the block.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config, self.source = checkpoint.config, checkpoint.source
        size, rank = checkpoint.tensor_parallel_size, checkpoint.rank
        linears = self.config.family.draft_linears(self.config, size, rank)
        self.linears = {one.module: one for one in linears}
        self.nbytes = sum(checkpoint.info(key).nbytes for key in checkpoint if ".mtp_" in key)

    def projection(self, key: str) -> tuple[Array, Array]:
        """Return a matrix [2H, H], which files may also hold as [H, 2H], in halves [H, H].

        Raises:
            CheckpointError: it is missing, of another form, or not finite.
        """
        hidden = self.config.hidden_size
        shapes = ((2 * hidden, hidden), (hidden, 2 * hidden))
        data = self.checkpoint.expect(key, _FLOATS, shapes, finite=True).data
        whole = data if data.shape[0] == 2 * hidden else data.T
        return whole[:hidden], whole[hidden:]


class DraftSource(CheckpointSource):
    """Parameters of a draft layer, in the order of channels that the model's were loaded in.

    Args:
        files: of the layer.
        place: where weights are kept.
        is_permuted: whether the model's hidden channels were rearranged, see PermutedWeights.
    """

    def __init__(self, files: DraftFiles, place: Any, is_permuted: bool) -> None:
        weights: HostWeights = PermutedWeights(files) if is_permuted else files
        super().__init__(weights, place)
        self._files = files
        self._order = weights.hidden_order if isinstance(weights, PermutedWeights) else None

    def projection(self, key: str) -> tuple[PackedWeight, PackedWeight]:
        """Return the halves of `DraftFiles.projection`: of the token, of the hidden state."""
        kept = []
        for half in self._files.projection(key):
            rows = half if self._order is None else half[self._order][:, self._order]
            kept.append(self._dense(np.ascontiguousarray(rows), False, key))
        return kept[0], kept[1]


def open_draft(config: RuntimeConfig, place: Any, is_permuted: bool) -> DraftSource:
    """Find the draft layer's files: where the user says, with the model, or in its folder `mtp`.

    Raises:
        ConfigError: there are none, or the model is of a kind that has no draft layer.
        CheckpointError: a file cannot be read.
    """
    model = config.model
    if not any(True for _ in model.family.draft_linears(model)) or model.is_moe_layer(0):
        raise ConfigError(
            f"{model.source}: a draft layer for this model is not supported: "
            "use the method ngram or suffix"
        )
    given = None if config.speculative is None else config.speculative.model
    folders = [Path(given)] if given else [config.model_path, config.model_path / _FOLDER]
    for folder in folders:
        if folder.is_dir():
            checkpoint = _open(folder, config)
            if checkpoint is not None:
                return DraftSource(DraftFiles(checkpoint), place, is_permuted)
    raise ConfigError(
        f"{folders[0]}: no tensors *{_MARK}* of a draft layer are there: name the folder that has "
        "them as speculative_config.model, or use the method ngram or suffix"
    )


def _open(folder: Path, config: RuntimeConfig) -> Checkpoint | None:
    try:
        location = find_weight_files(folder, 1, 0)  # always whole
        parallel = config.parallel
        checkpoint = Checkpoint(
            folder, config.model, location, parallel.tensor_parallel_size, parallel.rank
        )
    except CheckpointError:
        if config.speculative is not None and config.speculative.model:
            raise
        return None
    return checkpoint if any(_MARK in key for key in checkpoint) else None
