"""Flags of the HTTP side: where it listens, for whom, how much at a time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.entrypoints.openai.app import Cors, Exposure
from fastdeploy_lite.entrypoints.openai.tracing import Tracer
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, quote

_LEAST = {
    "port": 0,
    "max_concurrency": 1,
    "timeout_graceful_shutdown": 0,
    "max_waiting_time": -1,
    "controller_port": -1,
    "workers": 1,
}


@dataclass
class ServerArgs:
    """Arguments of the HTTP side; see `add_server_arguments`."""

    host: str = "0.0.0.0"
    port: int = 8000
    uds: str | None = None
    workers: int = 1
    metrics_port: int | None = None
    controller_port: int = -1
    max_waiting_time: int = -1
    max_concurrency: int = 512
    timeout_graceful_shutdown: int = 0
    api_key: list[str] = field(default_factory=list)
    restart_engine: bool = False
    enable_mm_output: bool = False
    timeout: int = 0
    skip_port_check: bool = False
    allowed_origins: list[str] = field(default_factory=list)
    allow_credentials: bool = False
    allowed_methods: list[str] = field(default_factory=lambda: ["*"])
    allowed_headers: list[str] = field(default_factory=lambda: ["*"])
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = int(ssl.CERT_NONE)
    ssl_keyfile_password: str | None = None

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ConfigError: A value is out of range, or values contradict each other.
        """
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("port", "metrics_port", "controller_port"):
            value = getattr(self, name) or 0
            if value > 65535 or (name == "metrics_port" and value < 0):
                raise ConfigError(f"{name} must be between 0 and 65535, got {value}")
        for name in ("port", "metrics_port") if self.uds is None else ("metrics_port",):
            if self.controller_port > 0 and self.controller_port == getattr(self, name):
                raise ConfigError(
                    f"controller_port {self.controller_port} is {name}, too: give it another one"
                )
        if self.uds is not None and not self.uds.strip():
            raise ConfigError("uds is empty: give a path, or leave the flag out to serve a port")
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("api_key is empty: give a key, or leave the flag out to need none")
        self.api_key = [key.strip() for key in self.api_key]
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must start with /, got {quote(self.root_path)}")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("allow_credentials needs named allowed_origins: '*' is everybody")
        self._check_tls()

    def _check_tls(self) -> None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_keyfile_password"):
            if getattr(self, name) and not self.ssl_certfile:
                raise ConfigError(f"{name} needs ssl_certfile")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ConfigError("ssl_cert_reqs needs ssl_ca_certs: no client could be verified")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"{name}: there is no file {quote(path)}")
        if self.ssl_certfile:
            self._try_certificate()

    def _try_certificate(self) -> None:
        """Before the model loads, not after."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            password = self.ssl_keyfile_password or ""
            context.load_cert_chain(self.ssl_certfile or "", self.ssl_keyfile, password)
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
        except (ssl.SSLError, OSError) as error:
            text = f"ssl_certfile {quote(self.ssl_certfile)} cannot be used: {error}"
            raise ConfigError(text) from None

    @property
    def shares_metrics(self) -> bool:
        """Whether the metrics live on the API's port."""
        if self.metrics_port is None:
            return True
        return self.uds is None and self.metrics_port == self.port

    def exposure(self, tracer: Tracer | None = None) -> Exposure:
        """To whom the ports answer, and who traces them."""
        cors = Cors(
            self.allowed_origins,
            self.allow_credentials,
            self.allowed_methods,
            self.allowed_headers,
        )
        return Exposure(self.api_key, cors, self.root_path, tracer)

    @property
    def tls(self) -> dict[str, Any]:
        """uvicorn's arguments for TLS; empty for plain HTTP."""
        if not self.ssl_certfile:
            return {}
        names = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs",
                 "ssl_keyfile_password")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def without_effect(self) -> list[str]:
        """One line for each value that was given and changes nothing."""
        lines = []
        if self.workers > 1:
            lines.append(f"--workers {self.workers}: one API process serves all")
        if self.enable_mm_output:
            lines.append("--enable-mm-output has no effect here: ignored")
        if self.timeout:
            lines.append("--timeout has no effect here: the engine is always watched")
        most = envs.FD_SUPPORT_MAX_CONNECTIONS
        if self.max_concurrency > most:
            lines.append(f"--max-concurrency is lowered to FD_SUPPORT_MAX_CONNECTIONS, {most}")
        default = ServerArgs()
        for name in ("allow_credentials", "allowed_methods", "allowed_headers"):
            if getattr(self, name) != getattr(default, name) and not self.allowed_origins:
                flag = name.replace("_", "-")
                lines.append(f"--{flag} has no effect without --allowed-origins")
        return lines

    def shown(self) -> dict[str, Any]:
        """The fields for logs, secrets masked."""
        values = dataclasses.asdict(self)
        values["api_key"] = ["***"] * len(self.api_key)
        values["ssl_keyfile_password"] = "***" if self.ssl_keyfile_password else None
        return values


def _texts(value: str) -> list[str]:
    """Argparse type: a JSON list, or texts with commas between."""
    if value.lstrip().startswith("["):
        try:
            items = json.loads(value)
        except ValueError as error:
            text = f"expected a JSON list, got {quote(value)}: {error}"
            raise argparse.ArgumentTypeError(text) from None
    else:
        items = [item.strip() for item in value.split(",") if item.strip()]
    if not all(isinstance(item, str) for item in items):
        raise argparse.ArgumentTypeError(f"expected texts, got {quote(value)}")
    return list(items)


_texts.takes_list = True  # type: ignore[attr-defined]  # in YAML, too


def add_server_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags of the HTTP side.

    Args:
        parser: Where to.
    """
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="0.0.0.0", help="address to bind")
    add("--port", type=int, default=8000, help="HTTP port")
    add("--uds", default=None, metavar="PATH",
        help="serve on a Unix socket instead of host and port; those of metrics and controller"
        " stay ports")  # fmt: skip
    add("--workers", type=int, default=1, help="API processes (one serves all; others: no effect)")
    add("--metrics-port", type=int, default=None, help="metrics port, default: the HTTP port")
    add("--controller-port", type=int, default=-1, help="controller port, -1 is off")
    add("--max-waiting-time", type=int, default=-1,
        help="seconds that a request may wait for its first token, -1 is for ever")  # fmt: skip
    add("--max-concurrency", type=int, default=512, help="requests at the same time; beyond: 429")
    add("--enable-mm-output", action="store_true", help="accepted, no effect")
    add("--timeout-graceful-shutdown", type=int, default=0,
        help="seconds that running requests get to finish after SIGTERM")  # fmt: skip
    add("--timeout", type=int, default=0, help="accepted, no effect: the engine is always watched")
    add("--api-key", action="append", default=None, help="accepted key, repeatable")
    add("--restart-engine", action="store_true", help="restart a dead engine instead of exiting")
    add("--skip-port-check", action="store_true",
        help="do not probe whether somebody answers on a port before taking it")  # fmt: skip
    if not any(action.dest == "config" for action in parser._actions):
        add("--config", default=None, metavar="FILE.yaml", help="YAML file of defaults")
    _add_exposure(parser)


def _add_exposure(parser: FlexibleArgumentParser) -> None:
    group = parser.add_argument_group("browsers, proxies, TLS")
    add = group.add_argument
    add("--allowed-origins", type=_texts, default=[],
        help="pages that may call the service: '*', a JSON list, or commas between")  # fmt: skip
    add("--allow-credentials", action="store_true", help="such pages may send cookies")
    add("--allowed-methods", type=_texts, default=["*"], help="methods that such pages may use")
    add("--allowed-headers", type=_texts, default=["*"], help="headers that they may send")
    add("--root-path", default="", help="prefix of all paths behind a proxy")
    add("--ssl-keyfile", default=None, help="private key, PEM")
    add("--ssl-certfile", default=None, help="certificate chain, PEM; serves HTTPS")
    add("--ssl-ca-certs", default=None, help="certificates that clients' ones must descend from")
    add("--ssl-cert-reqs", type=int, default=int(ssl.CERT_NONE), choices=(0, 1, 2),
        help="client certificates: 0 none, 1 optional, 2 required")  # fmt: skip
    add("--ssl-keyfile-password", default=None, help="password of the private key")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add every flag of the server.

    Args:
        parser: Where to.
    """
    add_server_arguments(parser)
    EngineArgs.add_cli_args(parser)


def server_args(args: argparse.Namespace) -> ServerArgs:
    """The HTTP side of parsed arguments.

    Args:
        args: What the parser gave.

    Returns:
        Checked arguments.

    Raises:
        ConfigError: A value is out of range.
    """
    names = [f.name for f in dataclasses.fields(ServerArgs)]
    values = {name: getattr(args, name) for name in names}
    given = values["api_key"]
    values["api_key"] = list(envs.FD_API_KEY if given is None else given)
    if given is not None and not values["api_key"]:
        raise ConfigError("api_key is an empty list: give a key, or leave it out to need none")
    result = ServerArgs(**values)
    result.check()
    return result
