"""The model calls a Python function and is given its result.

python examples/tools.py [http://127.0.0.1:8000/v1]

`tool_choice="required"` makes any model call: what it writes is constrained to calls that fit the
schema. With a model that was taught to call, leave it at "auto" and start the server with its
parser, such as `--tool-call-parser hermes`.
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum of two numbers",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 0, "maximum": 99},
                    "b": {"type": "integer", "minimum": 0, "maximum": 99},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]


def add(a: int, b: int) -> int:
    return a + b


def main() -> None:
    with OpenAI(base_url=URL, api_key="none") as client:
        model = client.models.list().data[0].id
        messages: list[ChatCompletionMessageParam] = [
            {"role": "user", "content": "What is 3 and 4 together?"}
        ]
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice="required", max_tokens=400
        )
        message = answer.choices[0].message
        messages.append(message.to_dict())  # type: ignore[arg-type]
        for call in message.tool_calls or []:
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            result = add(**arguments)
            print(f"{call.function.name}({arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=32
        )
        print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
