"""The `openai` package against a running server: whole, streamed, many at a time.

python examples/client.py [http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import asyncio
import sys
import time

from openai import AsyncOpenAI, OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
KEY = "none"  # what the server was given as --api-key


def whole(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, max_tokens=48, messages=[{"role": "user", "content": "解析三首李白的诗"}]
    )
    print(answer.choices[0].message.content)
    print(answer.usage)


def streamed(client: OpenAI, model: str) -> None:
    started, first = time.perf_counter(), None
    stream = client.chat.completions.create(
        model=model, max_tokens=48, stream=True, messages=[{"role": "user", "content": "望岳"}]
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            print(chunk.choices[0].delta.content, end="", flush=True)
    print(f"\nfirst token after {1000 * (first or 0):.0f} ms")


async def many(model: str) -> None:
    async with AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(model=model, prompt=f"诗{i}", max_tokens=16)
                for i in range(8)
            )
        )
    print([answer.choices[0].text for answer in answers])


def main() -> None:
    with OpenAI(base_url=URL, api_key=KEY) as client:
        model = client.models.list().data[0].id
        whole(client, model)
        streamed(client, model)
    asyncio.run(many(model))


if __name__ == "__main__":
    main()
