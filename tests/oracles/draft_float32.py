"""The multi-token prediction layer in plain numpy: guesses of a whole sequence, no cache."""

from __future__ import annotations

import numpy as np
from oracles.ernie_float32 import Array, ErnieFloat32, Files


class DraftFloat32:
    """The layer in `layer` on top of the model `oracle`."""

    def __init__(self, oracle: ErnieFloat32, layer: Files) -> None:
        self._main = oracle
        self._layer = ErnieFloat32.__new__(ErnieFloat32)
        self._layer.__dict__.update(oracle.__dict__, files=layer, _weights={})

    def guesses(self, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
        """The `count` tokens that the layer expects after `tokens`, and each one's lead in logits.

        The last of `tokens` is one that the model has just sampled and has not read.
        """
        hidden = self._main.hidden(tokens[:-1])
        following, leads = list(tokens[1:]), []
        for _ in range(count):
            out = self._hidden(following, hidden)
            logits = out[-1] @ self._main._head()
            second, first = np.sort(logits)[-2:]
            following.append(int(logits.argmax()))
            leads.append(float(first - second))
            hidden = np.concatenate([hidden, out[-1:]])
        return following[len(tokens) - 1 :], leads

    def _hidden(self, following: list[int], hidden: Array) -> Array:
        main, layer, block = self._main, self._layer, "ernie.mtp_block.0"
        size = hidden.shape[1]
        embedded = main.files.floats("ernie.embed_tokens.weight")[following]
        both = [layer._norm(embedded, "ernie.mtp_emb_norm.0")]
        both.append(layer._norm(hidden, "ernie.mtp_hidden_norm.0"))
        matrix = layer.files.floats("ernie.mtp_linear_proj.0.weight")
        matrix = matrix if len(matrix) == 2 * size else matrix.T
        x = np.concatenate(both, axis=1) @ matrix
        x = x + layer._attention(layer._norm(x, f"{block}.input_layernorm"), block)
        normed = layer._norm(x, f"{block}.post_attention_layernorm")
        x = x + layer._mlp(normed, f"{block}.mlp", main.config["intermediate_size"])
        return main._norm(x, "ernie.norm")
