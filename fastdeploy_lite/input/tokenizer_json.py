"""`tokenizer.json` through the `tokenizers` library, with the face of a SentencePiece model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastdeploy_lite.utils.errors import CheckpointError, one_line
from fastdeploy_lite.utils.files import check_regular

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LARGEST = 256 << 20


class TokenizerJson:
    """The vocabulary of a `tokenizer.json`; methods are named as SentencePiece's."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is missing or not a tokenizer."""
        from tokenizers import Tokenizer  # noqa: PLC0415 - only folders without tokenizer.model

        check_regular(path, _LARGEST)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"{path}: not a readable tokenizer: {one_line(error)[:200]}"
            ) from None
        # Their sizes would cut and pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._pieces = {token_id: piece for piece, token_id in self._vocabulary.items()}
        self._size = max(self._pieces, default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = {token_id for token_id, token in added.items() if token.special}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown = self._vocabulary.get(str(unknown), 0)
        decoder = getattr(self._tokenizer, "decoder", None)
        self._byte_level = _byte_alphabet() if "ByteLevel" in repr(decoder) else None

    def encode(self, text: str, out_type: type = int) -> list[Any]:
        """Token ids, or pieces with `out_type=str`; nothing is added at the ends."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return list(found.tokens if out_type is str else found.ids)

    def vocab_size(self) -> int:
        """Number of ids, gaps included."""
        return self._size

    def id_to_piece(self, token_id: int) -> str:
        """Piece of an id, "" for a gap."""
        return self._pieces.get(token_id, "")

    def piece_to_id(self, piece: str) -> int:
        """Id of a piece, that of the unknown piece if there is none."""
        return self._vocabulary.get(piece, self._unknown)

    def unk_id(self) -> int:
        """Id of the unknown piece."""
        return self._unknown

    def is_control(self, token_id: int) -> bool:
        """Whether it is a special string."""
        return token_id in self._controls

    def is_byte(self, token_id: int) -> bool:
        """Whether it stands for one byte, spelt `<0xE4>`."""
        return _BYTE.fullmatch(self.id_to_piece(token_id)) is not None

    def spelled_bytes(self, token_id: int) -> bytes | None:
        """Bytes of a piece of a byte-level vocabulary; None where pieces are text."""
        if self._byte_level is None or token_id in self._controls:
            return None
        try:
            return bytes(self._byte_level[c] for c in self.id_to_piece(token_id))
        except KeyError:
            return None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level vocabularies use for the 256 bytes (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
