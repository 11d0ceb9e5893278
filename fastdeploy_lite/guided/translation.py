"""From a constraint to the grammar language of `llguidance`, within bounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import llguidance

from fastdeploy_lite.guided.closed_objects import close_objects
from fastdeploy_lite.guided.layout import layout_options
from fastdeploy_lite.guided.plain_schema import plain_schema, read_json
from fastdeploy_lite.guided.spec import GuidedSpec, invalid, short_reason
from fastdeploy_lite.utils.errors import RequestError

# Bounds: a schema of a real application is a few KiB; ours must compile in well under a second.
MAX_SPEC_BYTES = 65536
MAX_CHOICES = 4096
MAX_NESTING = 64


def grammar_text(spec: GuidedSpec) -> str:
    """Translate a constraint into llguidance's own form.

    Args:
        spec: The constraint.

    Returns:
        llguidance grammar text.

    Raises:
        RequestError: The constraint is malformed or over a bound.
    """
    size = len(spec.value.encode())
    if size > MAX_SPEC_BYTES:
        raise invalid(spec, f"it has {size} bytes, the limit is {MAX_SPEC_BYTES}")
    try:
        return _TRANSLATORS[spec.kind](spec)
    except RequestError:
        raise
    except RecursionError:
        raise invalid(spec, "it is nested too deeply") from None
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        raise invalid(spec, short_reason(str(error))) from None


def _json_grammar(schema: Any, spec: GuidedSpec) -> str:
    schema = _checked_schema(schema, spec)
    layout: Any = layout_options(schema, spec.any_whitespace)
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=layout))


def _checked_schema(schema: Any, spec: GuidedSpec) -> dict[str, Any]:
    if schema is False:
        raise ValueError("the schema false allows no value")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is a JSON object or a bool, found {type(schema).__name__}")
    check_nesting(schema)
    schema = plain_schema(schema)
    return close_objects(schema) if spec.closes_objects else schema


def check_nesting(value: Any) -> None:
    """Refuse JSON nested beyond `MAX_NESTING`, which costs compilers stack.

    Args:
        value: Parsed JSON.

    Raises:
        ValueError: It is nested too deeply.
    """
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")


def _json_schema(spec: GuidedSpec) -> str:
    return _json_grammar(read_json(spec.value), spec)


def _json_object(spec: GuidedSpec) -> str:
    return _json_grammar({"type": "object"}, spec)


def _regex(spec: GuidedSpec) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(strip_anchors(spec.value)))


def strip_anchors(pattern: str) -> str:
    r"""Remove the anchors that say what a full match says anyway.

    `^`, `\A` count at the start of an alternative and `$`, `\Z`, `\z` at its end or before its last
    line break, at top level or in groups that stand there themselves.  Others stay, for the
    compiler to refuse.

    Args:
        pattern: A regular expression.

    Returns:
        The pattern without redundant anchors.
    """
    tokens = _regex_tokens(pattern)
    forward = _drop_edge(tokens, {"^", r"\A"}, opens="(", closes=")")
    backward = _drop_edge(forward[::-1], {"$", r"\Z", r"\z"}, opens=")", closes="(")
    return "".join(backward[::-1])


_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\(\?[^:)(]*:")


def _regex_tokens(pattern: str) -> list[str]:
    """Escapes, classes, openings of groups, single characters.  Linear: a class that never closes
    is looked for once."""
    tokens: list[str] = []
    at, can_close = 0, True
    while at < len(pattern):
        char, found = pattern[at], None
        if char == "[" and can_close:
            found = _CLASS.match(pattern, at)
            can_close = found is not None
        elif char == "(":
            found = _GROUP.match(pattern, at)
        text = pattern[at : at + 2] if char == "\\" else found[0] if found else char
        tokens.append(text)
        at += len(text)
    return tokens


_LINE_BREAKS = ("\n", r"\n")


def _drop_edge(tokens: list[str], anchors: set[str], opens: str, closes: str) -> list[str]:
    """Drop anchors at the leading edge of every alternative; groups are followed by a stack."""
    kept: list[str] = []
    edge, stack = True, [True]
    for token in tokens:
        kind = token[0] if token[0] == "(" else token
        if edge and token in anchors:
            continue
        kept.append(token)
        if edge and token in _LINE_BREAKS and "$" in anchors:
            continue  # `$` also stands before a last line break
        if kind == opens:
            stack.append(edge)
        elif kind == closes:
            edge = False
            if len(stack) > 1:
                stack.pop()
        elif token == "|":
            edge = stack[-1]
        else:
            edge = False
    return kept


def _choice(spec: GuidedSpec) -> str:
    choices = read_json(spec.value)
    if not isinstance(choices, list) or not choices:
        raise ValueError("a non-empty list of strings is expected")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"it has {len(choices)} entries, the limit is {MAX_CHOICES}")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("every choice must be a non-empty string")
    # One automaton: as rules of a grammar, 2000 choices are 2000 items of the parser's row.
    alternatives = "|".join(map(_literal, dict.fromkeys(choices)))
    return str(llguidance.LLMatcher.grammar_from_lark(f"start: /{alternatives}/"))


def _literal(text: str) -> str:
    """A regular expression for a text."""
    plain = (c if c.isalnum() or c == " " else rf"\x{{{ord(c):x}}}" for c in text)
    return "".join(plain)


def _grammar(spec: GuidedSpec) -> str:
    depth = deepest = 0
    for character in spec.value:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
    return str(llguidance.grammar_from("grammar", spec.value))


def _structural_tag(spec: GuidedSpec) -> str:
    """Free text in which each trigger opens a tag whose content follows a schema."""
    value = read_json(spec.value)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, found {type(value).__name__}")
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise ValueError("'structures' must be a non-empty list")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise ValueError("'triggers' must be a list of non-empty strings")
    check_nesting(structures)
    tags = [_tag(structure, triggers, spec) for structure in structures]
    return str(llguidance.StructTag.to_grammar(tags, assume_special=False))


def _tag(structure: Any, triggers: list[str], spec: GuidedSpec) -> Any:
    if not isinstance(structure, dict) or not isinstance(structure.get("begin"), str):
        raise ValueError("every structure needs the text 'begin'")
    begin, end = structure["begin"], structure.get("end", "")
    trigger = next((t for t in triggers if begin.startswith(t)), None)
    if trigger is None:
        raise ValueError(f"no trigger is a prefix of begin {begin!r}")
    if not isinstance(end, str):
        raise ValueError("'end' must be text")
    schema = structure.get("schema")
    schema = _checked_schema({} if schema is None else schema, spec)
    schema = {**schema, "x-guidance": layout_options(schema, spec.any_whitespace)}
    return llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=end)


_TRANSLATORS: Mapping[str, Callable[[GuidedSpec], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
