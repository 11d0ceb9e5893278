"""What `speculative_config` may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.logging import get_logger

METHODS = ("ngram", "suffix", "mtp", "naive")
# Keys of FastDeploy's; scripts set them beside any method.
WITHOUT_EFFECT = ("benchmark_mode", "mtp_strategy", "num_model_steps", "quantization")
# What only some methods look at.
OF_METHODS = {
    "min_ngram_size": ("ngram",),
    "max_ngram_size": ("ngram",),
    "suffix_decoding_max_cached_tokens": ("suffix",),
    "suffix_decoding_min_token_prob": ("suffix",),
    "model": ("mtp",),
    "num_speculative_tokens": ("ngram", "suffix", "mtp"),
    "adaptive": ("ngram", "suffix", "mtp"),
}
DEFAULT_TOKENS = {"ngram": 5, "suffix": 8, "mtp": 1, "naive": 0}
MOST_TOKENS = 32
# Tokens of steps that check guesses: all steps up to a size cost about the same, since they are one
# graph where there are graphs. Larger steps than the last are not.
CHECK_SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_log = get_logger("fastdeploy")


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are guessed.  Source: FastDeploy's `--speculative-config`, widened.

    Attributes:
        method: "ngram" copies what followed the same words before (prompt lookup), "suffix" also
            learns from earlier answers, "mtp" asks the model's own prediction layer, "naive"
            guesses nothing.
        num_speculative_tokens: most tokens guessed for a sequence and step, 1 to 32; None takes
            the method's default.
        min_ngram_size, max_ngram_size: words compared by "ngram", longest first.
        suffix_decoding_max_cached_tokens: tokens of earlier answers that "suffix" remembers.
        suffix_decoding_min_token_prob: "suffix" stops a guess below this share of what followed.
        adaptive: guess only as much as pays by what was measured; False always guesses.
        model: folder of the prediction layer for "mtp"; None looks beside the model's weights and
            in the folder `mtp` there.
    """

    method: str = "ngram"
    num_speculative_tokens: int | None = None
    min_ngram_size: int = 2
    max_ngram_size: int = 5
    suffix_decoding_max_cached_tokens: int = 200_000
    suffix_decoding_min_token_prob: float = 0.1
    adaptive: bool = True
    model: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            _refuse("method", self.method, f"one of {', '.join(METHODS)}")
        if self.num_speculative_tokens is not None:
            self._check_count("num_speculative_tokens", 1, MOST_TOKENS)
        self._check_count("min_ngram_size", 1, 64)
        self._check_count("max_ngram_size", self.min_ngram_size, 64)
        self._check_count("suffix_decoding_max_cached_tokens", 0, 1 << 28)
        least = self.suffix_decoding_min_token_prob
        if type(least) not in (int, float) or not 0.0 <= least <= 1.0:
            _refuse("suffix_decoding_min_token_prob", least, "a number in [0, 1]")
        if type(self.model) not in (str, type(None)):
            _refuse("model", self.model, "a folder")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SpeculativeConfig:
        """Build from the user's JSON object.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(quote(key) for key in set(values) - known - set(WITHOUT_EFFECT))
        if unknown:
            raise ConfigError(
                f"speculative_config: unknown keys {', '.join(unknown[:5])}, expected some of"
                f" {', '.join(sorted(known))}"
            )
        if type(values.get("adaptive", True)) is not bool:
            _refuse("adaptive", values["adaptive"], "true or false")
        if "method" not in values:
            raise ConfigError(f"speculative_config: needs a method, one of {', '.join(METHODS)}")
        config = cls(**{key: value for key, value in values.items() if key in known})
        for key in sorted(values):
            if config.method not in OF_METHODS.get(key, METHODS) or key in WITHOUT_EFFECT:
                _log.warning(
                    "speculative_config.%s has no effect with the method %s", key, config.method
                )
        return config

    @property
    def most_tokens(self) -> int:
        """Most tokens guessed for a sequence and step."""
        if self.method == "naive":
            return 0
        return self.num_speculative_tokens or DEFAULT_TOKENS[self.method]

    def _check_count(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            _refuse(name, value, f"an integer from {least} to {most}")


def _refuse(name: str, value: object, expected: str) -> None:
    raise ConfigError(f"speculative_config.{name}: found {quote(value)}, expected {expected}")
