"""Ports: taking one before the model loads, without opening it; finding a free one."""

from __future__ import annotations

import socket

from fastdeploy_lite.utils.errors import ConfigError


def reserve(parameter: str, host: str, port: int) -> socket.socket:
    """Bind a port; it refuses connections until somebody listens on the socket.

    A busy port is thus reported before minutes of loading, and nobody can take it meanwhile.

    Args:
        parameter: Name for the message.
        host: Address to bind.
        port: The port; 0 takes a free one.

    Returns:
        The bound socket.

    Raises:
        ConfigError: The port is taken, or the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is given, not the default 0;
    # with it, each answer on a kept connection waits 40 ms for the client's delayed ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if _is_listening(family, host, port):
            raise ConfigError(f"The parameter `{parameter}`:{port} is already in use.")
        # A restarted server must not wait for old connections to leave TIME_WAIT.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if isinstance(error, socket.gaierror):
            raise ConfigError(f"The address {host} cannot be resolved") from None
        if error.strerror and "in use" in error.strerror:
            raise ConfigError(f"The parameter `{parameter}`:{port} is already in use.") from None
        raise ConfigError(f"Cannot bind {host}:{port}: {error.strerror}") from None
    except ConfigError:
        bound.close()
        raise
    bound.set_inheritable(False)
    return bound


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
