"""Log-probabilities in the forms of the two interfaces."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.request.outputs import LogprobsLists


def token_text(tokenizer: Any, token_id: int, decode: bool = True) -> tuple[str, list[int]]:
    r"""A token's own text and bytes.

    Args:
        tokenizer: The model's tokenizer.
        token_id: The token.
        decode: False names it by its id.

    Returns:
        The text (`bytes:\xNN…` when it is not UTF-8 alone) and the bytes.
    """
    data = tokenizer.token_bytes(token_id) or tokenizer.convert_ids_to_tokens(token_id).encode()
    if not decode:
        return f"token_id:{token_id}", list(data)
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def chat_logprobs(
    tokenizer: Any, lists: LogprobsLists, top: int, decode: bool = True
) -> dict[str, Any]:
    """The chat form.

    Args:
        tokenizer: The model's tokenizer.
        lists: One row per token, the sampled one first.
        top: Number of best tokens to list; -1 lists all there are.
        decode: Whether tokens are shown as text.

    Returns:
        `{"content": [...], "refusal": None}`.
    """
    content = []
    for ids, values in zip(lists.logprob_token_ids, lists.logprobs, strict=True):
        end = None if top < 0 else 1 + top
        best = [
            {**_entry(tokenizer, i, v, decode), "top_logprobs": None}
            for i, v in zip(ids[1:end], values[1:end], strict=True)
        ]
        content.append({**_entry(tokenizer, ids[0], values[0], decode), "top_logprobs": best})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token_id: int, value: float, decode: bool) -> dict[str, Any]:
    text, data = token_text(tokenizer, token_id, decode)
    return {"token": text, "logprob": value, "bytes": data}


def completion_logprobs(
    tokenizer: Any, lists: LogprobsLists, top: int, decode: bool = True
) -> dict[str, Any]:
    """The completion form; see `chat_logprobs`.

    Returns:
        `tokens`, `token_logprobs`, `top_logprobs` (text to value), `text_offset` None.
    """
    end = None if top < 0 else 1 + top
    rows = list(zip(lists.logprob_token_ids, lists.logprobs, strict=True))
    return {
        "tokens": [token_text(tokenizer, ids[0], decode)[0] for ids, _ in rows],
        "token_logprobs": [values[0] for _, values in rows],
        "top_logprobs": [
            {
                token_text(tokenizer, i, decode)[0]: v
                for i, v in zip(ids[1:end], values[1:end], strict=True)
            }
            for ids, values in rows
        ],
        "text_offset": None,
    }


def join(parts: list[LogprobsLists]) -> LogprobsLists:
    """Concatenate the rows of several steps."""
    whole = LogprobsLists([], [], [])
    for part in parts:
        whole.extend(part)
    return whole


def prompt_logprobs(rows: list[Any] | None) -> list[Any] | None:
    """Prompt log-probabilities as plain data: None for the first token, then id to details."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(i): {"logprob": e.logprob, "rank": e.rank, "decoded_token": e.decoded_token}
            for i, e in row.items()
        }
        for row in rows
    ]
