"""Answers of a given form: a JSON schema, a regular expression, one of a few words.

python examples/structured_output.py [http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import json
import re
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
POEM = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "dynasty": {"enum": ["唐", "宋"]},
        "lines": {"type": "integer", "minimum": 2, "maximum": 8},
    },
    "required": ["title", "dynasty", "lines"],
    "additionalProperties": False,
}


def main() -> None:
    with OpenAI(base_url=URL, api_key="none") as client:
        model = client.models.list().data[0].id

        def ask(text: str, **fields: object) -> str:
            answer = client.chat.completions.create(  # type: ignore[call-overload]
                model=model, max_tokens=300, messages=[{"role": "user", "content": text}], **fields
            )
            return str(answer.choices[0].message.content)

        schema = {"name": "poem", "schema": POEM, "strict": True}
        poem = ask("静夜思", response_format={"type": "json_schema", "json_schema": schema})
        print(json.loads(poem))

        date = ask("What day is it?", extra_body={"guided_regex": r"20\d\d-(0[1-9]|1[0-2])"})
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", date)
        print(date)

        word = ask("Is that a poem?", extra_body={"guided_choice": ["yes", "no"]})
        assert word in ("yes", "no")
        print(word)


if __name__ == "__main__":
    main()
