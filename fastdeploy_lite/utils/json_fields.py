"""Read JSON objects from files and take typed fields out of them, with errors that name both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fastdeploy_lite.utils.errors import CheckpointError, ConfigError, quote
from fastdeploy_lite.utils.files import read_small

_MISSING = object()
# The largest real configuration is a few kilobytes and an index of 300B a few megabytes.
_LARGEST_JSON_BYTES = 256 << 20


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs; raise ValueError if a key occurs twice (a `pairs_hook`)."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {quote(key)} occurs twice")
        result[key] = value
    return result


def parse_json(text: bytes | str, source: str, refuse_duplicates: bool = False) -> object:
    """Parse strict JSON (no NaN, no Infinity); raise ConfigError naming `source`."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        hook = unique_keys if refuse_duplicates else None
        return json.loads(text, parse_constant=refuse, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise ConfigError(f"{source}: not readable as JSON: {error}") from None


def read_json_object(path: Path, refuse_duplicates: bool = False) -> dict[str, Any]:
    """Read the JSON object in file `path`; raise ConfigError naming the file."""
    try:
        data = read_small(path, _LARGEST_JSON_BYTES)
    except CheckpointError as error:
        raise ConfigError(error) from None
    value = parse_json(data, str(path), refuse_duplicates)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {quote(value)}")
    return value


class JsonFields:
    """Typed access to one JSON object.

    Each getter returns the default for an absent key, and for null when the default is None.
    A getter without a default demands the key. Booleans are not integers here.
    """

    def __init__(self, data: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.data = data
        self.source = source
        self.prefix = prefix

    def fail(self, key: str, value: object, expected: str) -> NoReturn:
        """Raise ConfigError: `source: key: found value, expected ...`."""
        found = "nothing" if value is _MISSING or value is None else quote(value)
        raise ConfigError(f"{self.source}: {self.prefix}{key}: found {found}, expected {expected}")

    def integer(
        self,
        key: str,
        default: Any = _MISSING,
        minimum: int = 0,
        maximum: int = 2**31 - 1,
    ) -> Any:
        """Return an int in [minimum, maximum] (or the default)."""
        value = self._get(key, default)
        if value is default and default is not _MISSING:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.fail(key, value, f"an integer in [{minimum}, {maximum}]")
        return value

    def number(
        self,
        key: str,
        default: Any = _MISSING,
        minimum: float = -math.inf,
        maximum: float = math.inf,
    ) -> Any:
        """Return a finite float in [minimum, maximum] (or the default); integers are accepted."""
        value = self._get(key, default)
        if value is default and default is not _MISSING:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, value, "a number")
        if isinstance(value, int) and abs(value) > 1 << 1000:  # float() would overflow
            self.fail(key, value, "a number that fits a float")
        if not math.isfinite(value) or not minimum <= value <= maximum:
            self.fail(key, value, f"a finite number in [{minimum:g}, {maximum:g}]")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return a bool (or the default)."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value

    def string(self, key: str, default: Any = _MISSING) -> Any:
        """Return a str (or the default)."""
        value = self._get(key, default)
        if value is default and default is not _MISSING:
            return default
        if not isinstance(value, str):
            self.fail(key, value, "a string")
        return value

    def one_of(self, key: str, default: str | None, allowed: tuple[str, ...]) -> str:
        """Return the value, which must be one of `allowed`; without a default it must be there."""
        value = self.data.get(key, default)
        if value not in allowed:
            self.fail(key, value, " or ".join(map(repr, allowed)))
        return str(value)

    def section(self, key: str) -> JsonFields:
        """Return the object under `key`; an absent or null one reads as empty."""
        value = self.data.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self.fail(key, value, "an object")
        return JsonFields(value, self.source, f"{self.prefix}{key}.")

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return one id or a list of ids as a tuple."""
        value = self.data.get(key)
        if value is None:
            return default
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
            self.fail(key, value, "a token id or a list of token ids")
        return tuple(ids)

    def _get(self, key: str, default: object) -> Any:
        value = self.data.get(key, default)
        if value is _MISSING:
            self.fail(key, value, "this key")
        return default if value is None and default is None else value
