"""ERNIE-4.5's multi-token prediction layer: what may come after the next token.

Row i takes token i + 1 and the model's normalised hidden state of token i, and its own normalised
output gives, through the model's head, a guess of token i + 2. Embedding, final norm and head are
the model's; the block is a decoder layer with a dense MLP and a KV cache of its own.
"""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.forward_batch import ForwardBatch
from fastdeploy_lite.model_executor.layers.linear import GatedMLP, Linear
from fastdeploy_lite.model_executor.layers.parameters import DraftParameterSource
from fastdeploy_lite.model_executor.ops import Weight
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.models.ernie4_5.model import DecoderLayer, Ernie4_5_MoeForCausalLM
from fastdeploy_lite.models.ernie4_5.names import DRAFT_BLOCK


class Ernie4_5_MTP:  # noqa: N801 - named as the model
    """The prediction layer of a loaded model."""

    def __init__(
        self, model: Ernie4_5_MoeForCausalLM, source: DraftParameterSource, cos_sin: Any
    ) -> None:
        """Load the layer.

        Args:
            model: whose hidden states it continues.
            source: the layer's parameters.
            cos_sin: float32 [max positions, head_dim].
        """
        config = model.config
        self.model, self._eps = model, config.rms_norm_eps
        self._token_norm = source.vector("ernie.mtp_emb_norm.0.weight")
        self._hidden_norm = source.vector("ernie.mtp_hidden_norm.0.weight")
        of_token, of_hidden = source.projection("ernie.mtp_linear_proj.0.weight")
        self._of_token = Linear(of_token, "draft_residual")
        self._of_hidden = Linear(of_hidden, "draft_projected")
        self.block = DecoderLayer(
            config, source, config.num_hidden_layers, cos_sin, block=DRAFT_BLOCK,
            communicator=model.communicator,
        )  # fmt: skip

    def __call__(self, batch: ForwardBatch, hidden: Any) -> Any:
        """Return the layer's normalised hidden states [T, H].

        Args:
            batch: as the model's, but each row holds the token after the one it stands for.
            hidden: [T, H], the model's or this layer's output for those rows' tokens; may lie in
                the buffer that is returned.
        """
        workspace = batch.workspace
        residual = self._of_token(self._normed_tokens(batch), workspace)
        normed = workspace.get("draft_hidden", hidden.shape, hidden.dtype)
        ops.rms_norm(hidden, self._hidden_norm, self._eps, normed)
        ops.add_inplace(residual, self._of_hidden(normed, workspace))
        update = self.block(None, residual, batch)
        return self.model.norm.after_adding(update[0], residual, workspace, update[1])

    def _normed_tokens(self, batch: ForwardBatch) -> Any:
        embedded = self.model.embedding(batch.token_ids, batch.workspace)
        out = batch.workspace.get("draft_tokens", embedded.shape, embedded.dtype)
        ops.rms_norm(embedded, self._token_norm, self._eps, out)
        return out

    def logits(self, hidden: Any, workspace: Workspace) -> Any:
        """Return float32 logits [R, V] of rows that `__call__` gave."""
        return self.model.logits(hidden, workspace)

    def weights(self) -> list[Weight]:
        """Return all matrices that are not the model's."""
        mlp, attention = self.block.mlp, self.block.attention
        assert isinstance(mlp, GatedMLP)
        return [
            self._of_token.weight,
            self._of_hidden.weight,
            attention.qkv.weight,
            attention.output.weight,
            mlp.up_gate.weight,
            mlp.down.weight,
        ]
