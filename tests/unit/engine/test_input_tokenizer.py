"""The tokenizer: round trips, special strings, streams of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from helpers import demo_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import CheckpointError

TEXTS = st.text(max_size=60) | st.text("ab 你好李白🙂\n<|/s>_▁0é", max_size=40)


def spell(text: str) -> str:
    """What the vocabulary keeps of a text: its mark for a space reads as a space."""
    return text.replace("▁", " ")


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("  a b  c\n\n 12 🙂</s>ﬁ\x00<think>x")
@example("<|begin_of_sentence|>User: 你好\nAssistant: ")
@example("</s></s><s>")
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == spell(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-1, 8200), max_size=30))
def test_a_stream_never_shows_half_a_character_and_ends_like_the_whole(ids: list[int]) -> None:
    tokenizer = demo_tokenizer()
    stream = tokenizer.detokenizer()
    pieces = [stream.feed(i) for i in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)
    for piece in pieces:
        piece.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 8191), max_size=20))
def test_plain_ids_decode_as_sentencepiece_does(ids: list[int]) -> None:
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(demo_path() / "tokenizer.model")
    )
    tokenizer = demo_tokenizer()
    plain = [i for i in ids if tokenizer.token_bytes(i) and not reference.is_byte(i)]
    assert tokenizer.decode(plain) == reference.decode(plain)


def test_a_character_of_several_byte_tokens_appears_at_its_last_byte() -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode_text("🙂")
    assert len(ids) == 4
    stream = tokenizer.detokenizer()
    assert [stream.feed(i) for i in ids] == ["", "", "", "🙂"]
    stream.feed(ids[0])
    assert stream.flush() == "\ufffd"


def test_decode_token_streams_like_upstreams_method() -> None:
    tokenizer = demo_tokenizer()
    text = "Hello 李白 🙂 ok"
    ids = tokenizer.encode_text(text)
    shown, prefix, read = "", 0, 0
    for count in range(1, len(ids) + 1):
        new, prefix, read = tokenizer.decode_token(ids[:count], prefix, read)
        assert "\ufffd" not in new
        shown += new
    assert shown == text


def test_special_strings_are_split_out_and_nothing_is_added() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.encode_text("") == []
    assert tokenizer.encode_text("</s>") == [2]
    assert tokenizer.tokenize("a</s>b<|end_of_sentence|>") == [
        "a", "</s>", "b", "<|end_of_sentence|>",
    ]  # fmt: skip
    assert tokenizer.encode("ab")["input_ids"] == tokenizer.encode_text("ab")
    assert tokenizer("ab") == tokenizer.encode("ab")


def test_ids_are_looked_up_by_piece() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.convert_tokens_to_ids("</s>") == 2
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_sentence|>", "no such piece"]) == [6, 0]
    assert tokenizer.token_id("no such piece") is None
    assert tokenizer.token_id("<unk>") == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (tokenizer.cls_token_id, tokenizer.sep_token) == (6, "<|end_of_sentence|>")
    assert tokenizer.sys_start_token is None
    assert tokenizer.eos_token_ids == (2, 7)
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 8192
    with pytest.raises(AttributeError):
        _ = tokenizer.no_such_attribute


def test_structure_is_no_text_but_markers_are() -> None:
    tokenizer = demo_tokenizer()
    for piece in ("</s>", "<s>", "<unk>", "<|end_of_sentence|>", "<mask:4>", "<|im_start|>"):
        assert tokenizer.token_bytes(tokenizer.convert_tokens_to_ids(piece)) == b""
    assert tokenizer.token_bytes(tokenizer.convert_tokens_to_ids("</think>")) == b"</think>"
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(99999) == b""
    assert tokenizer.decode([6, *tokenizer.encode_text("hi"), 2], skip_special_tokens=True) == "hi"


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(tokenizer.encode_text("a\ud800b")) == "a\ufffdb"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert demo_tokenizer().decode([9000, 100000]) == ""
    assert demo_tokenizer().convert_ids_to_tokens(9000) == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, tmp_path / name)
    return tmp_path


def test_added_tokens_extend_the_vocabulary(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 8195}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"8194": {"content": "<more>"}}
    config["additional_special_tokens"] = ["<think>", {"content": "<mask:4>"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Ernie4_5Tokenizer.from_pretrained(folder)
    assert tokenizer.encode_text("<more><extra>") == [8194, 8195]
    assert tokenizer.decode([8195, 8194, 8193]) == "<extra><more>"
    assert tokenizer.vocab_size == 8196
    assert {"<think>", "<mask:4>", "<extra>"} <= set(tokenizer.all_special_tokens)


def test_missing_and_damaged_files_name_themselves(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a readable SentencePiece"):
        Ernie4_5Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: no such file"):
        Ernie4_5Tokenizer.from_pretrained(folder)


def test_named_templates_and_template_files(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool", "template": "T"},
        {"name": "default", "template": "D"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Ernie4_5Tokenizer.from_pretrained(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Ernie4_5Tokenizer.from_pretrained(folder).chat_template == "F"
