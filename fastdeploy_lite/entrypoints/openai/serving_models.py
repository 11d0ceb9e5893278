"""`GET /v1/models`."""

from __future__ import annotations

from fastdeploy_lite.entrypoints.openai.protocol import ModelInfo, ModelList, ModelPermission
from fastdeploy_lite.entrypoints.openai.service import Service


def list_models(service: Service) -> ModelList:
    """The one model that is served.

    Args:
        service: The service.

    Returns:
        The list.
    """
    info = ModelInfo(
        id=service.model_name,
        root=service.args.model,
        max_model_len=service.config.scheduler.max_model_len,
        permission=[ModelPermission()],
    )
    return ModelList(data=[info])
