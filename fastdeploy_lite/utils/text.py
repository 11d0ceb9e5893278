"""Text that can leave this program, and text that cannot."""

from __future__ import annotations


def is_encodable(text: str) -> bool:
    """Whether a text is made of characters: a lone surrogate (half of a pair) is none, and no
    message, log or file can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
