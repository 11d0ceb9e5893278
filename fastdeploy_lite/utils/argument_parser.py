"""Command-line parsing as FastDeploy's users expect it: two spellings, and a YAML file of defaults.

Source of the rules: FastDeploy's `FlexibleArgumentParser` and its documentation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fastdeploy_lite.utils.errors import ConfigError, one_line, quote

_UNSET = object()


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser with two conveniences.

    * `--max_model_len` and `--max-model-len` are the same flag.
    * `--config FILE.yaml` supplies values under the underscore names; flags given on the command
      line win, unknown keys are ignored.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; see the class for the differences.

        Raises:
            SystemExit: The command line is wrong (the message is on stderr).
        """
        arguments = [_dashed(a) for a in (sys.argv[1:] if args is None else args)]
        # Every destination starts as "unset", so that afterwards a flag that was given can be told
        # from one that was not, even when it repeats the default. Appending flags start as None
        # because argparse copies what it finds there.
        target = argparse.Namespace() if namespace is None else namespace
        mine = [a for a in self._actions if a.dest != argparse.SUPPRESS]
        mine = [a for a in mine if not hasattr(target, a.dest)]
        for action in mine:
            setattr(target, action.dest, None if _appends(action) else _UNSET)
        target, rest = super().parse_known_args(arguments, target)
        self._fill_unset(target, mine)
        return target, rest

    def error(self, message: str) -> NoReturn:
        """End with one line: the usage of an engine's flags would scroll it off the screen.

        Raises:
            SystemExit: With status 2, as argparse's.
        """
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")

    def _fill_unset(self, target: argparse.Namespace, actions: list[argparse.Action]) -> None:
        missing = [a for a in actions if _is_unset(getattr(target, a.dest), a)]
        path = getattr(target, "config", None)
        config = self._read_config(path) if isinstance(path, str) else {}
        for action in missing:
            value = config.get(action.dest, _UNSET)
            value = self._default(action) if value is _UNSET else self._convert(action, value)
            if value is argparse.SUPPRESS:
                delattr(target, action.dest)
            else:
                setattr(target, action.dest, value)

    def _default(self, action: argparse.Action) -> Any:
        value = action.default
        return self._get_value(action, value) if isinstance(value, str) and value else value

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        """A value from YAML as the flag would have read it; mappings and lists stay as they are."""
        if value is None or isinstance(value, Mapping | list):
            return value
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"--config: {action.dest}: expected true or false, got {quote(value)}")
            return value
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            self.error(f"--config: {error}")
        return [converted] if _appends(action) else converted

    def _read_config(self, path: str) -> dict[str, Any]:
        try:
            return read_yaml_mapping(path)
        except ConfigError as error:
            self.error(str(error))


def read_yaml_mapping(path: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: The file.

    Returns:
        Its keys (dashes become underscores) and values.

    Raises:
        ConfigError: The file cannot be read or is not a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config: {path} holds {type(data).__name__}, expected a mapping")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def _dashed(argument: str) -> str:
    """`--max_model_len=4_0` -> `--max-model-len=4_0`; anything else unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _appends(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction | argparse._ExtendAction)


def _is_unset(value: object, action: argparse.Action) -> bool:
    return value is _UNSET or (value is None and _appends(action))
