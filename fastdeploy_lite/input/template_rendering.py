"""Jinja rendering in a sandbox; also the program that renders templates from the network.

Jinja's sandbox keeps a template away from Python objects but not from endless loops or gigabyte
strings, and there are too many ways to those (nested ranges, filters that pad, formats with a
width) to forbid one by one. So a template that did not come from whoever runs the server is
rendered by this file as a process of its own, with limits that the kernel enforces.

Imports nothing of the package, so that the process starts in tens of milliseconds.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARACTERS = 8 << 20
UNTRUSTED_SECONDS = 2
UNTRUSTED_WALL_SECONDS = 10  # a loaded machine starts processes slowly
UNTRUSTED_BYTES = 512 << 20


class TemplateError(Exception):
    """The template cannot be rendered; the message is for whoever wrote it or its input."""


def render(source: str, variables: dict[str, Any]) -> str:
    """Render a template in this process.

    Args:
        source: Jinja source.
        variables: Names for the template.

    Returns:
        The text.

    Raises:
        TemplateError: The template is wrong, refuses its input, or gives too much text.
    """
    try:
        parts, size = [], 0
        for part in _compile(source).generate(variables):
            size += len(part)
            if size > MAX_OUTPUT_CHARACTERS:
                raise TemplateError(f"it gives more than {MAX_OUTPUT_CHARACTERS} characters")
            parts.append(part)
        return "".join(parts)
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateError("it recurses too deeply") from None
    except MemoryError:
        raise TemplateError("it needs too much memory") from None
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from None


def check(source: str) -> None:
    """Find out whether a template can be read at all; rendering may still fail.

    Args:
        source: Jinja source.

    Raises:
        TemplateError: It is no Jinja; the message names the line.
    """
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise TemplateError("it is nested too deeply") from None


def render_untrusted(source: str, variables: dict[str, Any]) -> str:
    """Render a template in a process with limits on time, memory and output.

    Args, Returns, Raises: See `render`; variables must be JSON.
    """
    try:
        request = json.dumps({"source": source, "variables": variables})
    except (TypeError, ValueError, RecursionError) as error:  # numbers of 5000 digits, nesting
        raise TemplateError(f"its variables are not JSON: {error}") from None
    try:
        done = subprocess.run(
            [sys.executable, __file__],
            input=request.encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=UNTRUSTED_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError("it takes too long to render") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # killed by a limit before it could answer
        raise TemplateError("it takes too much time or memory to render") from None
    if "error" in answer:
        raise TemplateError(answer["error"])
    return str(answer["text"])


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is text like any."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _limit_this_process() -> None:
    os.nice(15)  # whoever serves plain requests comes first
    resource.setrlimit(resource.RLIMIT_CPU, (UNTRUSTED_SECONDS, UNTRUSTED_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (UNTRUSTED_BYTES, UNTRUSTED_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Render the request on standard input, answer on standard output, both JSON."""
    request = json.loads(sys.stdin.buffer.read())
    _limit_this_process()
    try:
        answer = {"text": render(request["source"], request["variables"])}
    except TemplateError as failure:
        answer = {"error": str(failure)[:1000]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
