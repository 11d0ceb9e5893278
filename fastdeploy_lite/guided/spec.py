"""One constraint on an output, as data: what travels from the front end to the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from fastdeploy_lite.utils.errors import RequestError

GuidedKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "structural_tag"]
_PARAMS: Mapping[str, str] = {
    "json_schema": "guided_json",
    "json_object": "response_format",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
    "structural_tag": "structural_tag",
}


class GuidedSpec(msgspec.Struct, frozen=True):
    """One constraint, as it travels from the front end to the engine.

    Attributes:
        kind: What `value` is.
        value: JSON text (`json_schema`, `choice` as a list of strings, `structural_tag`), a regular
            expression, or a Lark/EBNF grammar; empty for `json_object`.
        any_whitespace: Whether JSON may be laid out freely; otherwise `", "` and `": "` separate.
        start_after: Text after which the constraint starts (`</think>`), or None for at once.
        closes_objects: Whether a schema's objects have no other properties than the declared ones
            where it does not say (`additionalProperties`).
    """

    kind: GuidedKind
    value: str = ""
    any_whitespace: bool = True
    start_after: str | None = None
    closes_objects: bool = True


def invalid(spec: GuidedSpec, reason: str) -> RequestError:
    """The error of a constraint that cannot be used.

    Args:
        spec: The constraint.
        reason: One line.

    Returns:
        The error, naming the field of the request that holds such a constraint.
    """
    return RequestError(
        f"Invalid {spec.kind} for guided decoding: {reason}",
        param=_PARAMS[spec.kind],
        code="invalid_value",
    )


def short_reason(message: str) -> str:
    """The parsing library's error as one short line."""
    if message.startswith("NoExtension"):
        return "nothing satisfies it"
    # A regex error shows the pattern and, last, what is wrong with it.
    cause = re.findall(r"^error: (.*)$", message, re.MULTILINE)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = cause[-1] if cause else (lines[0] if lines else "not supported")
    return re.sub(r"^at \d+\(\d+\): ", "", text)[:300]
