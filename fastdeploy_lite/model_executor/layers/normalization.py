"""RMS normalisation, alone or together with the residual addition before it."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.workspace import Workspace


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, scale: Any, eps: float) -> None:
        """Args: scale: [H]; eps: added to the mean square."""
        self.scale = scale
        self.eps = eps

    def __call__(self, x: Any, workspace: Workspace) -> Any:
        """Return the normalised x [T, H]."""
        out = workspace.get("normed", x.shape, x.dtype)
        ops.rms_norm(x, self.scale, self.eps, out)
        return out

    def after_adding(
        self, x: Any, residual: Any, workspace: Workspace, also: Any | None = None
    ) -> Any:
        """Add x (and `also`) to `residual` in place and return the normalised sum [T, H]."""
        out = workspace.get("normed", x.shape, x.dtype)
        ops.add_rms_norm(x, residual, self.scale, self.eps, out, also)
        return out
