"""The ERNIE 4.5 tokenizer: SentencePiece plus special strings, under upstream's names.

Special strings (`</s>`, `<|begin_of_sentence|>` ...) are split out before SentencePiece sees the
text, because it would spell some of them in pieces. Nothing is added at the ends.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from fastdeploy_lite.input.chat_template import load_model_template, render_chat
from fastdeploy_lite.input.detokenizer import IncrementalDetokenizer
from fastdeploy_lite.input.tokenizer_json import TokenizerJson
from fastdeploy_lite.utils.errors import CheckpointError
from fastdeploy_lite.utils.files import check_regular, is_there, refuse_pointer
from fastdeploy_lite.utils.json_fields import read_json_object

VOCABULARY_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
_LARGEST_MODEL = 256 << 20  # bytes; ERNIE's has 1.6 MB
_SPACE = "\u2581"  # SentencePiece's mark for a space
_NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token",
    "sys_start_token", "sys_end_token", "header_start_token", "header_end_token",
)  # fmt: skip
# Pieces that structure a prompt; in an answer they are no text. Markers that parsers look for
# (`<think>`, `<tool_call>` ...) are text.
_STRUCTURE = re.compile(r"<(\|.*\||mask:\d+|pad|cls|sep|s|/s|unk)>")
_MARKERS = frozenset(
    f"<{slash}{name}>" for slash in ("", "/") for name in ("think", "tool_call", "response")
)


class Ernie4_5Tokenizer:  # noqa: N801 - upstream's name
    """Text to token ids and back.

    Args:
        model_file: SentencePiece model, or a `tokenizer.json`.
        config: Content of tokenizer_config.json: named special tokens, chat template.
        added_tokens: Special strings that are not pieces of the model, with their ids.
        eos_token_ids: Further ids that end a sequence, beyond the tokenizer's own.
        chat_template: Jinja source; None takes the one in `config`.

    Raises:
        CheckpointError: The model file is missing or not a SentencePiece model.
    """

    def __init__(
        self,
        model_file: str | Path,
        config: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self._pieces = _load_model(Path(model_file))
        self._config = dict(config or {})
        self._added = dict(added_tokens or {})
        self._added_by_id = {token_id: text for text, token_id in self._added.items()}
        self.name_or_path = str(Path(model_file).parent)
        self.chat_template = chat_template
        self.special_tokens_map = self._named_tokens()
        self._special_ids = self._find_special_ids()
        self._splitter = _alternation(self._special_ids)
        self._bytes = self._all_bytes()
        # A model trained with a dummy prefix puts a space before the text, which is not the text's.
        self._dummy_prefix = self._pieces.encode("a", out_type=str)[:1] != ["a"]
        own = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids = tuple(dict.fromkeys([*own, *eos_token_ids]))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, eos_token_ids: Iterable[int] = (), **_: Any
    ) -> Ernie4_5Tokenizer:
        """Read tokenizer.model and the JSON files beside it.

        Args:
            path: Folder of the model.
            eos_token_ids: Further ids that end a sequence (generation_config.json's).
            **_: Other keywords that scripts pass are accepted.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: A file is missing or unreadable.
        """
        folder = Path(path)
        file = folder / VOCABULARY_FILE
        if not is_there(file) and is_there(folder / JSON_FILE):
            file = folder / JSON_FILE
        if not is_there(file):
            raise CheckpointError(
                f"{file}: no such file; the folder needs a SentencePiece model, or {JSON_FILE}"
            )
        config = _read_optional(folder / "tokenizer_config.json")
        config = {**_read_optional(folder / "special_tokens_map.json"), **config}
        added = _added_tokens(_read_optional(folder / "added_tokens.json"), config)
        template = load_model_template(folder, config)
        return cls(file, config, added, eos_token_ids, template)

    # Vocabulary ----------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._bytes)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """All pieces with their ids."""
        pieces = {self._pieces.id_to_piece(i): i for i in range(self._pieces.vocab_size())}
        return {**pieces, **self._added}

    @property
    def all_special_tokens(self) -> list[str]:
        """Strings that are split out of a text."""
        return list(self._special_ids)

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return list(self._special_ids.values())

    def token_id(self, piece: str) -> int | None:
        """The id of a piece or special string; None when there is no such piece."""
        token_id = self._added.get(piece)
        if token_id is None:
            token_id = self._pieces.piece_to_id(piece)
            if token_id == self._pieces.unk_id() and piece != self._pieces.id_to_piece(token_id):
                return None
        return int(token_id)

    def __getattr__(self, name: str) -> Any:
        """`eos_token`, `eos_token_id` and the like for every named special token, else None."""
        base = name.removesuffix("_id")
        if base not in _NAMED_TOKENS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        text = self.special_tokens_map.get(base)
        if base == name or text is None:
            return text
        return self.token_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to an answer's text; empty for structure (`</s>`, `<mask:1>` ...)."""
        if not 0 <= token_id < len(self._bytes):
            return b""
        piece = self.convert_ids_to_tokens(token_id)
        if piece in _MARKERS:
            return self._bytes[token_id]
        structural = piece in self._special_ids or _STRUCTURE.fullmatch(piece)
        return b"" if structural else self._bytes[token_id]

    # Text -> ids ---------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text`; special strings become their ids, nothing is added."""
        if self._splitter is None:
            return self.encode_plain(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            special = self._special_ids.get(part)
            if special is not None:
                ids.append(special)
            elif part:
                ids.extend(self.encode_plain(part))
        return ids

    def encode_as_text(self, text: str, markers: bool = True) -> list[int]:
        """Token ids that spell `text`; names of control tokens in it are letters like any others.

        Args:
            text: What a user wrote, for a place where no control token may come from it.
            markers: Whether `<think>`, `<tool_call>` ... are the tokens that a model writes them
                with, which are text.

        Returns:
            Ids whose bytes together are the text.
        """
        ids: list[int] = []
        for part in self._control_splitter.split(text):
            marker = self.token_id(part) if markers and part in _MARKERS else None
            if marker is not None:
                ids.append(marker)
                continue
            # Its first character alone, so that the rest is no special string either.
            pieces = (part[:1], part[1:]) if self._control_splitter.fullmatch(part) else (part,)
            for piece in filter(None, pieces):
                ids.extend(self._spell(piece))
        return ids

    def _spell(self, text: str) -> list[int]:
        ids = self.encode_plain(text)
        if b"".join(map(self.token_bytes, ids)) == text.encode("utf-8", "replace"):
            return ids
        # Pieces that the model's normalizer changes, or a space put before the text.
        spelled = [self._letters.get(char.encode("utf-8", "replace")) for char in text]
        if None in spelled:
            letters = (bytes([b]) for b in text.encode("utf-8", "replace"))
            spelled = [self._letters.get(letter) for letter in letters]
        return ids if None in spelled else [i for i in spelled if i is not None]

    @functools.cached_property
    def _letters(self) -> dict[bytes, int]:
        """Tokens of single characters and bytes."""
        texts = ((self.token_bytes(i), i) for i in reversed(range(self.vocab_size)))
        return {text: i for text, i in texts if 0 < len(text) <= 4 and _is_letter(text)}

    @functools.cached_property
    def _control_splitter(self) -> re.Pattern[str]:
        """Splits out whatever names a token that is not plain text."""
        pieces = [self._pieces.id_to_piece(i) for i in range(self._pieces.vocab_size())]
        names = {piece for piece in pieces if _STRUCTURE.fullmatch(piece)}
        pattern = _alternation({*names, *self._special_ids, *_MARKERS})
        assert pattern is not None
        return pattern

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` as SentencePiece reads it: no string is special."""
        try:
            return list(self._pieces.encode(text))
        except (UnicodeEncodeError, RuntimeError):  # lone surrogates: JSON has them, UTF-8 not
            return list(self._pieces.encode(_without_surrogates(text)))

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Pieces of `text`."""
        return [self.convert_ids_to_tokens(i) for i in self.encode_text(text)]

    def encode(self, text: str, **_: Any) -> dict[str, list[int]]:
        """`{"input_ids": ids}`; see `encode_text`."""
        return {"input_ids": self.encode_text(text)}

    __call__ = encode

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of one piece or of a list of pieces; an unknown piece has the id of `<unk>`."""
        if isinstance(tokens, str):
            token_id = self.token_id(tokens)
            return self._pieces.unk_id() if token_id is None else token_id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    # Ids -> text ---------------------------------------------------------------------------------

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The piece of one id, or the pieces of a list; an id beyond the vocabulary gives ""."""
        if not isinstance(ids, int):
            return [self.convert_ids_to_tokens(int(i)) for i in ids]
        if ids in self._added_by_id:
            return self._added_by_id[ids]
        return self._pieces.id_to_piece(ids) if 0 <= ids < self._pieces.vocab_size() else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of pieces."""
        return self.decode(self.convert_tokens_to_ids(list(tokens)))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            token_ids: One id or several.
            skip_special_tokens: Leave out what is structure rather than text.
            **_: Other keywords that scripts pass are accepted.

        Returns:
            The text.
        """
        ids = (int(i) for i in ([token_ids] if isinstance(token_ids, int) else token_ids))
        if skip_special_tokens:
            ids = (i for i in ids if self.token_bytes(i))
        stream = self.detokenizer()
        return stream.feed_all(ids) + stream.flush()

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh stream from token ids to text."""
        return IncrementalDetokenizer(self._bytes, strip_first_space=self._dummy_prefix)

    def decode_token(
        self, all_input_ids: Sequence[int], prefix_offset: int = 0, read_offset: int = 0
    ) -> tuple[str, int, int]:
        """Text that the ids from `read_offset` on add; upstream's form of incremental decoding.

        Args:
            all_input_ids: All ids so far.
            prefix_offset, read_offset: From the previous call, 0 at first.

        Returns:
            New text (empty while a character is incomplete) and the two offsets.
        """
        before = self.decode(all_input_ids[prefix_offset:read_offset])
        after = self.decode(all_input_ids[prefix_offset:])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            return after[len(before) :], read_offset, len(all_input_ids)
        return "", prefix_offset, read_offset

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation.

        Args:
            conversation: Messages with `role` and `content`.
            tools: Tool definitions.
            chat_template: Jinja source that overrides the model's.
            add_generation_prompt: Whether to open the assistant's turn.
            tokenize: Whether to return ids instead of text.
            **kwargs: Further variables of the template.

        Returns:
            Token ids, or text.

        Raises:
            RequestError: The messages or the template cannot be used.
        """
        text = render_chat(
            conversation,
            template=chat_template or self.chat_template,
            special_tokens=self.special_tokens_map,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=kwargs,
        )
        return self.encode_text(text) if tokenize else text

    # Construction --------------------------------------------------------------------------------

    def _named_tokens(self) -> dict[str, str]:
        texts = ((name, _token_text(self._config.get(name))) for name in _NAMED_TOKENS)
        return {name: text for name, text in texts if text is not None}

    def _find_special_ids(self) -> dict[str, int]:
        extra = self._config.get("additional_special_tokens") or []
        texts = [*self.special_tokens_map.values(), *filter(None, map(_token_text, extra))]
        size = self._pieces.vocab_size()
        controls = [i for i in range(size) if self._pieces.is_control(i)]
        texts += [self._pieces.id_to_piece(i) for i in controls]
        found = ((text, self.token_id(text)) for text in [*texts, *self._added])
        return {text: token_id for text, token_id in found if token_id is not None}

    def _all_bytes(self) -> list[bytes]:
        size = self._pieces.vocab_size()
        table = [self._piece_bytes(i) for i in range(size)]
        for text, token_id in self._added.items():
            table.extend([b""] * (token_id + 1 - len(table)))
            table[token_id] = text.encode()
        return table

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self._pieces.id_to_piece(token_id)
        spelled = getattr(self._pieces, "spelled_bytes", lambda _: None)(token_id)
        if spelled is not None:
            return bytes(spelled)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(_SPACE, " ").encode()


def _load_model(path: Path) -> Any:
    if path.name.endswith(".json"):
        return TokenizerJson(path)
    check_regular(path, _LARGEST_MODEL)
    with path.open("rb") as file:
        refuse_pointer(path, file.read(64))
    try:
        found = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for token_id in range(found.vocab_size()):
            found.id_to_piece(token_id)  # a damaged piece is not UTF-8
        return found
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable SentencePiece model: {error}") from None


def _read_optional(path: Path) -> dict[str, Any]:
    return dict(read_json_object(path)) if is_there(path) else {}


def _token_text(value: Any) -> str | None:
    """A special token's text: configurations hold it plainly or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_tokens(added: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    tokens = {text: i for text, i in added.items() if isinstance(i, int) and 0 <= i < 1 << 24}
    decoder = config.get("added_tokens_decoder")
    for key, value in (decoder if isinstance(decoder, Mapping) else {}).items():
        text = _token_text(value)
        if text is not None and str(key).isdecimal() and int(key) < 1 << 24:
            tokens.setdefault(text, int(key))
    return tokens


def _alternation(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern whose `split` keeps the special strings; longer ones first."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _is_letter(text: bytes) -> bool:
    return len(text) == 1 or len(text.decode("utf-8", "replace")) == 1


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
