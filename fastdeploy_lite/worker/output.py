"""Upstream's import path of the containers of log-probabilities."""

from fastdeploy_lite.request.outputs import Logprob, LogprobsLists, PromptLogprobs

__all__ = ["Logprob", "LogprobsLists", "PromptLogprobs"]
