"""Ports: taking one before the model loads, without opening it; finding a free one."""

from __future__ import annotations

import errno
import socket

from fastdeploy_lite.utils.errors import ConfigError, quote


def reserve(parameter: str, host: str, port: int, probe: bool = True) -> socket.socket:
    """Bind a port; it refuses connections until somebody listens on the socket.

    A busy port is thus reported before minutes of loading, and nobody can take it meanwhile.

    Args:
        parameter: Name for the message.
        host: Address to bind.
        port: The port; 0 takes a free one.
        probe: Whether to ask first if somebody answers there.

    Returns:
        The bound socket.

    Raises:
        ConfigError: The port is taken, or the address cannot be bound.
    """
    family = _family(parameter, host, port)
    # asyncio switches Nagle's algorithm off only where the protocol is given, not the default 0;
    # with it, each answer on a kept connection waits 40 ms for the client's delayed ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        _bind(bound, host, port)
        # Only then: at another machine's address somebody may well answer.
        if probe and _is_listening(family, host, port):
            raise ConfigError(f"The parameter `{parameter}`:{port} is already in use.")
    except OSError as error:
        bound.close()
        raise ConfigError(_reason(parameter, host, port, error)) from None
    except ConfigError:
        bound.close()
        raise
    bound.set_inheritable(False)
    return bound


def _bind(bound: socket.socket, host: str, port: int) -> None:
    """Alone: with SO_REUSEADDR two servers that load at a time would both have the port, and one
    would end when it opens it. With it only where connections of a former server are in TIME_WAIT,
    which a restart must not wait for."""
    try:
        bound.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))


def listen(parameter: str, bound: socket.socket, backlog: int) -> None:
    """Open a port that was reserved.

    Args:
        parameter: Name for the message.
        bound: From `reserve`.
        backlog: Connections that the kernel keeps.

    Raises:
        ConfigError: Another process was faster.
    """
    # Connections inherit it: in TIME_WAIT they must not hold up the next start.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.listen(backlog)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise ConfigError(_reason(parameter, host, port, error)) from None


def in_url(host: str) -> str:
    """An address as URLs take it: that of IPv6 has brackets."""
    return f"[{host}]" if ":" in host else host


def _family(parameter: str, host: str, port: int) -> socket.AddressFamily:
    try:
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"The address {quote(host)} of `{parameter}` cannot be resolved: {reason}"
        ) from None
    families = [entry[0] for entry in found]
    return socket.AF_INET if socket.AF_INET in families else families[0]


def _reason(parameter: str, host: str, port: int, error: OSError) -> str:
    """Only a busy port is called busy: another one would not help with the rest."""
    where = f"`{parameter}`: cannot bind {in_url(host)}:{port}"
    if error.errno == errno.EADDRINUSE:
        return f"The parameter `{parameter}`:{port} is already in use."
    if error.errno == errno.EACCES:
        return f"{where}: no permission; ports below 1024 need it, use another one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where}: this machine has no such address; use 0.0.0.0 or one of its own"
    if error.errno == errno.EMFILE:
        return f"{where}: too many open files; raise the limit (ulimit -n)"
    return f"{where}: {error.strerror or error}"


def is_port_available(host: str, port: int) -> bool:
    """Return whether `port` of address `host` can be bound and nobody answers there."""
    try:
        reserve("port", host, port).close()
    except ConfigError:
        return False
    return True


def get_random_port() -> int:
    """Return a port that is free on this machine at the moment."""
    with reserve("port", "127.0.0.1", 0) as bound:
        number: int = bound.getsockname()[1]
    return number


def _is_listening(family: int, host: str, port: int) -> bool:
    """Whether somebody answers there: a bind alone may succeed beside a wildcard listener."""
    if port == 0:
        return False
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((target, port)) == 0
