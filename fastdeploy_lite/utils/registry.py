"""Classes by name, as plug-ins register them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastdeploy_lite.utils.errors import ConfigError, quote

Registered = TypeVar("Registered", bound=type)


def registering(
    registry: dict[str, Any], kind: str, name: str | Sequence[str], force: bool
) -> Callable[[Registered], Registered]:
    """A class decorator that registers a class.

    Args:
        registry: Where to.
        kind: What the classes are, for messages.
        name: One name or several.
        force: Whether to replace a class of that name.

    Returns:
        The decorator; it raises ConfigError when the name is taken and `force` is false.
    """
    names = [name] if isinstance(name, str) else list(name)

    def register(item: Registered) -> Registered:
        for each in names:
            if each in registry and not force:
                raise ConfigError(f"{kind} {quote(each)} is already registered")
            registry[each] = item
        return item

    return register


def registered(registry: dict[str, Registered], kind: str, name: str) -> Registered:
    """The class registered under a name.

    Args:
        registry: Where from.
        kind: What the classes are, for messages.
        name: As a user gave it.

    Returns:
        The class.

    Raises:
        ConfigError: Nothing is registered under the name.
    """
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise ConfigError(f"Unknown {kind} {quote(name)}; choose from {known}")
    return registry[name]
