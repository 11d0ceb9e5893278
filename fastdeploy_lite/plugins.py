"""Plug-ins: functions of installed packages, found by their entry points.

Upstream's groups: `fastdeploy.model_register_plugins` registers models in the engine's process,
`fastdeploy.reasoning_parser_plugins` and `fastdeploy.tool_parser_plugins` parsers in the server's.
All that are installed are loaded unless `FD_PLUGINS` names some.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from fastdeploy_lite import envs
from fastdeploy_lite.utils.errors import explain
from fastdeploy_lite.utils.logging import get_logger

MODELS = "fastdeploy.model_register_plugins"
REASONING_PARSERS = "fastdeploy.reasoning_parser_plugins"
TOOL_PARSERS = "fastdeploy.tool_parser_plugins"
UNAVAILABLE = (
    "fastdeploy.model_runner_plugins",
    "fastdeploy.input_processor_plugins",
    "fastdeploy.token_processor_plugins",
)
_log = get_logger("console")
_loaded: set[str] = set()


def load_plugins(group: str) -> list[str]:
    """Call the functions of a group, once in a process.

    A plug-in that fails is named in an error and does not keep the others, or the program, from
    their work: what it would have registered is then missing by name.

    Args:
        group: One of this module's.

    Returns:
        Names of the plug-ins that were called.
    """
    if group in _loaded:
        return []
    _loaded.add(group)
    wanted = envs.FD_PLUGINS
    called = []
    for entry in entry_points(group=group):
        if wanted is not None and entry.name not in wanted:
            continue
        try:
            entry.load()()
        except Exception as error:
            _log.error("Plug-in %s of %s failed: %s", entry.name, group, explain(error))
        else:
            _log.info("Plug-in %s of %s is loaded", entry.name, group)
            called.append(entry.name)
    return called


def warn_about_plugins() -> None:
    """Name plug-ins that are wanted and not installed, or installed and of no use here."""
    groups = (MODELS, REASONING_PARSERS, TOOL_PARSERS)
    installed = {entry.name for group in groups for entry in entry_points(group=group)}
    missing = [name for name in envs.FD_PLUGINS or () if name not in installed]
    if missing:
        _log.warning("FD_PLUGINS: no installed plug-in is called %s", ", ".join(missing))
    useless = [entry.name for group in UNAVAILABLE for entry in entry_points(group=group)]
    if useless:
        _log.warning("Plug-ins of a kind that is not available here: %s", ", ".join(useless))
