"""`tokenizer.json` alone gives the ids and texts of the SentencePiece model it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import CheckpointError

TEXTS = (
    "解析三首李白的诗",
    "The river runs from the mountains to the sea.",
    "  two  spaces\n\tand a tab, 12345 and 6.78",
    "User: hello\nAssistant: 你好！</s>",
    "emoji 🙂 and ŝtrange letters",
    "",
)


def convert(model: Path) -> Tokenizer:
    """A BPE tokenizer of the library with the pieces of a SentencePiece model."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = pieces.vocab_size()
    vocabulary = {pieces.id_to_piece(i): i for i in range(size)}
    merges = []
    for i in range(size):
        piece = pieces.id_to_piece(i)
        if pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i):
            continue
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [
            (-pieces.get_score(i), vocabulary[a], vocabulary[b], (a, b))
            for a, b in pairs
            if a in vocabulary and b in vocabulary
        ]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for *_, pair in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    controls = [pieces.id_to_piece(i) for i in range(size) if pieces.is_control(i)]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in controls])
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("json")
    shutil.copyfile(demo_path() / "tokenizer_config.json", result / "tokenizer_config.json")
    convert(demo_path() / "tokenizer.model").save(str(result / "tokenizer.json"))
    return result


def test_ids_and_texts_are_equal(folder: Path) -> None:
    found = Ernie4_5Tokenizer.from_pretrained(folder)
    wanted = Ernie4_5Tokenizer.from_pretrained(demo_path())
    assert found.vocab_size == wanted.vocab_size == 8192
    assert found.eos_token_ids == wanted.eos_token_ids
    assert set(found.all_special_ids) == set(wanted.all_special_ids)
    for text in TEXTS:
        assert found.encode_text(text) == wanted.encode_text(text), text
        assert found.decode(found.encode_text(text)) == wanted.decode(wanted.encode_text(text))
    assert [found.token_bytes(i) for i in range(8192)] == [
        wanted.token_bytes(i) for i in range(8192)
    ]


def test_limits_in_the_file_do_not_cut_prompts(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(Ernie4_5Tokenizer.from_pretrained(tmp_path).encode_text(TEXTS[1])) > 5


def test_a_byte_level_vocabulary_is_spelled_in_bytes(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = Ernie4_5Tokenizer.from_pretrained(tmp_path)
    for text in ("a b", "春眠不觉晓", "é\n🙂"):
        ids = found.encode_text(text)
        assert b"".join(found.token_bytes(i) for i in ids) == text.encode()
        assert found.decode(ids) == text


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"
    ) as found:
        Ernie4_5Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(found.value)


def test_neither_file_names_both(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: no such file; .*tokenizer\.json"):
        Ernie4_5Tokenizer.from_pretrained(tmp_path)
