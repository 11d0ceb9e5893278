"""Command-line parsing as FastDeploy's users expect it: two spellings, and a YAML file of defaults.

Source of the rules: FastDeploy's `FlexibleArgumentParser` and its documentation.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fastdeploy_lite.utils.errors import ConfigError, one_line, quote

_UNSET = object()
NO_EFFECT = "accepted for FastDeploy's sake, no effect here"  # the group that --help leaves out


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser with three conveniences.

    * `--max_model_len` and `--max-model-len` are the same flag.
    * `--config FILE.yaml` supplies values under the underscore names; flags given on the command
      line win, unknown keys are named in one warning.
    * `--help` leaves flags without effect out; `format_whole_help` shows them.
    """

    def format_help(self) -> str:
        """Help on what has an effect."""
        everything = self._action_groups
        hidden = [group for group in everything if group.title == NO_EFFECT]
        if not hidden:
            return super().format_help()
        self._action_groups = [group for group in everything if group not in hidden]
        usage, self.usage = self.usage, self.usage or self._short_usage()
        try:
            more = "--help=all shows every option, --help=KEYWORD those that match."
            return f"{super().format_help()}\n{more}\n"
        finally:
            self._action_groups, self.usage = everything, usage

    def format_whole_help(self) -> str:
        """Help on every flag."""
        return super().format_help()

    def _short_usage(self) -> str:
        names = [a.metavar or a.dest for a in self._actions if not a.option_strings]
        return " ".join(["%(prog)s [options]", *(f"[{name}]" for name in names)])

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; see the class for the differences.

        Raises:
            SystemExit: The command line is wrong (the message is on stderr).
        """
        given = sys.argv[1:] if args is None else args
        arguments = [_dashed(self._as_text(argument)) for argument in given]
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

    def _as_text(self, argument: str) -> str:
        """UTF-8 whatever the locale says; other bytes would fail later, where they are sent."""
        try:
            return os.fsencode(argument).decode()
        except UnicodeError:
            self.error(f"argument {quote(argument)} is not UTF-8 text")

    def _fill_unset(self, target: argparse.Namespace, actions: list[argparse.Action]) -> None:
        missing = [a for a in actions if _is_unset(getattr(target, a.dest), a)]
        path = getattr(target, "config", None)
        config = self._read_config(path) if isinstance(path, str) else {}
        self._name_unknown(config, target)
        for action in missing:
            value = config.get(action.dest, _UNSET)
            value = self._default(action) if value is _UNSET else self._convert(action, value)
            if value is argparse.SUPPRESS:
                delattr(target, action.dest)
            else:
                setattr(target, action.dest, value)

    def _name_unknown(self, config: dict[str, Any], target: argparse.Namespace) -> None:
        known = [action.dest for action in self._actions if action.dest != argparse.SUPPRESS]
        for key in config:
            if key not in known and not hasattr(target, key):
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                text = f"warning: --config: there is no flag {quote(key)}: ignored{hint}"
                print(f"{self.prog}: {text}", file=sys.stderr)

    def _default(self, action: argparse.Action) -> Any:
        value = action.default
        return self._get_value(action, value) if isinstance(value, str) and value else value

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        """A value from YAML as the flag would have read it; mappings stay for flags of JSON."""
        if value is None:
            return self._default(action)
        if isinstance(value, list):
            return self._convert_list(action, value)
        if isinstance(value, Mapping):
            return self._convert_mapping(action, value)
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"--config: {action.dest}: expected true or false, got {quote(value)}")
            return value
        converted = self._convert_text(action, value)
        return [converted] if _appends(action) or action.nargs in ("+", "*") else converted

    def _convert_text(self, action: argparse.Action, value: Any) -> Any:
        if isinstance(value, Mapping | list):
            self.error(f"--config: {action.dest}: expected a plain value, got {quote(value)}")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            converted = self._get_value(action, text)
            self._check_value(action, converted)
        except argparse.ArgumentError as error:
            self.error(f"--config: {error}")
        return converted

    def _convert_list(self, action: argparse.Action, values: list[Any]) -> Any:
        if _appends(action) or action.nargs in ("+", "*"):
            return [self._convert_text(action, value) for value in values]
        if getattr(action.type, "takes_list", False):
            return [str(value) for value in values]
        if action.type is not str:
            self.error(f"--config: {action.dest}: expected one value, got {quote(values)}")
        # Ports and hosts, which the command line takes with commas between.
        return ",".join(str(self._convert_text(action, value)) for value in values)

    def _convert_mapping(self, action: argparse.Action, value: Mapping[Any, Any]) -> Any:
        if not getattr(action.type, "takes_mapping", False):
            self.error(f"--config: {action.dest}: expected a plain value, got {quote(value)}")
        return value

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
        ConfigError: The file cannot be read, is not a mapping, or says something twice.
    """
    try:
        data = _UniqueKeys(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {_yaml_reason(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config: {path} holds {type(data).__name__}, expected a mapping")
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in result:
            raise ConfigError(f"--config: {path} gives {name} in both spellings: keep one")
        result[name] = value
    return result


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings say nothing twice: PyYAML would take the last value and be silent."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class; a repeated key is an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {quote(key.value)} stands there twice",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _yaml_reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


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
