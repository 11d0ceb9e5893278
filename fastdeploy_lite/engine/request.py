"""Upstream's import path of a request and its results."""

from fastdeploy_lite.request.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fastdeploy_lite.request.user_request import Request

__all__ = ["CompletionOutput", "Request", "RequestMetrics", "RequestOutput"]
