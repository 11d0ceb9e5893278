"""A model folder may come from anywhere: a bad file is one line, in no time and little memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from model_driver import make_runner
from tiny_model import tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import verify
from fastdeploy_lite.config import GenerationDefaults, LoadConfig, ModelConfig
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import FastDeployError

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f"
    b"32b1258daaa5e2ca24d17e2393\nsize 4976698672\n"
)


def everything(folder: Path) -> None:
    """What starting on a folder reads, without running it."""
    checkpoint = Checkpoint.open(folder)
    verify(checkpoint)
    eos = GenerationDefaults.from_dir(folder).eos_token_id
    Ernie4_5Tokenizer.from_pretrained(folder, eos_token_ids=eos)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = write_tiny_model(tmp_path / "model", layers=2, vocab_size=64)
    everything(result)
    return result


def refused(folder: Path, *parts: str) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FastDeployError) as caught:
        everything(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # kB
    return message


FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_named_pipe_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, str(folder))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_terabytes_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(4 << 40)
    refused(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_or_a_link_to_nothing_in_place_of_a_file(folder: Path, name: str) -> None:
    """A link to nothing is a file that is missing, not one that the model does not need."""
    for target in (name, "/nonexistent/blob"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        refused(folder, str(folder))
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, str(folder))


@pytest.mark.parametrize("name", FILES[3:])
def test_a_link_to_nothing_says_where_to(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/nonexistent/blob")
    refused(folder, name, "a link to '/nonexistent/blob', which cannot be followed")


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    refused(folder, name, "Git LFS pointer", "git lfs pull")


def test_a_pointer_in_place_of_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model_state.pdparams").write_bytes(POINTER)
    refused(folder, "model_state.pdparams", "Git LFS pointer")


def test_shards_without_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refused(folder, "model-00001-of-00002.safetensors", "but no model.safetensors.index.json")


def test_shapes_that_numpy_cannot_hold(folder: Path) -> None:
    for shape in ([0, 2**62 - 1], [0, 2**40, 2**40], [2**61, 0]):
        header = {"ernie.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        data = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        refused(folder, "ernie.norm.weight: found shape", "fewer elements")


def test_a_damaged_vocabulary(folder: Path) -> None:
    """Flipped bits, cuts and foreign bytes: an error of one line, or a tokenizer that works."""
    original = (folder / "tokenizer.model").read_bytes()
    random = np.random.default_rng(0)
    for trial in range(60):
        data = bytearray(original)
        for at in random.integers(0, len(data), 1 + trial % 40):
            data[at] ^= 1 << int(random.integers(8))
        if trial % 5 == 0:
            data = data[: int(random.integers(len(data)))]
        (folder / "tokenizer.model").write_bytes(bytes(data))
        try:
            tokenizer = Ernie4_5Tokenizer.from_pretrained(folder)
            tokenizer.decode(tokenizer.encode_text("ab 春眠</s>"))
        except FastDeployError as error:
            assert "\n" not in str(error)
    (folder / "tokenizer.model").write_bytes(original.replace("春".encode(), b"\xe6\xff\xa5"))
    refused(folder, "tokenizer.model", "not a readable SentencePiece model")


def test_dimensions_beyond_any_machine(tmp_path: Path) -> None:
    """Made-up weights of 2**60 bytes are refused before anything native sees the sizes."""
    huge = 1 << 24
    config = tiny_config(
        "2bits",
        hidden_size=huge,
        intermediate_size=huge,
        moe_intermediate_size=huge,
        vocab_size=huge,
        experts=4096,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FastDeployError, match=r"the weights need .* GiB of main memory"):
        make_runner(tmp_path, load=LoadConfig("dummy"))


def test_is_quantized_inside_the_object(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["is_quantized"]
    config["quantization_config"]["is_quantized"] = True
    assert ModelConfig.from_dict(config).is_quantized
    config["quantization_config"]["is_quantized"] = "yes"
    with pytest.raises(FastDeployError, match=r"quantization_config\.is_quantized"):
        ModelConfig.from_dict(config)


def test_a_head_is_what_the_files_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = list(range(30))
    own = write_tiny_model(tmp_path / "own", tied=False, seed=1)
    shared = write_tiny_model(tmp_path / "shared", tied=True, seed=1)
    wanted = [make_runner(folder).logits(ids) for folder in (own, shared)]
    assert not caplog.records or all("tie_word" not in r.getMessage() for r in caplog.records)
    for folder, said, logits in ((own, True, wanted[0]), (shared, False, wanted[1])):
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = said
        (folder / "config.json").write_text(json.dumps(config))
        caplog.clear()
        np.testing.assert_array_equal(make_runner(folder).logits(ids), logits)
        assert sum("tie_word_embeddings is" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_draft_tensors_are_left_alone(tmp_path: Path, turned: bool) -> None:
    config = tiny_config("2bits")
    tensors = tiny_tensors(config)
    random = np.random.default_rng(0)
    projection = random.integers(0, 1 << 14, (256, 128)).astype(np.uint16)
    extra = {
        "ernie.mtp_linear_proj.0.weight": (projection.T.copy() if turned else projection, "BF16"),
        "ernie.mtp_emb_norm.0.weight": (np.zeros(128, np.uint16), "BF16"),
        "ernie.mtp_block.0.self_attn.qkv_proj.bias": (np.zeros(8, np.uint16), "BF16"),
    }
    write_tensors(tmp_path / "with", config, tensors | extra)
    write_tensors(tmp_path / "without", config, tensors)
    ids = list(range(20))
    logits = [make_runner(tmp_path / name).logits(ids) for name in ("with", "without")]
    np.testing.assert_array_equal(*logits)


def test_singular_names_and_other_signs(tmp_path: Path) -> None:
    config = tiny_config("w4w2")
    tensors = tiny_tensors(config)
    other = {}
    for key, (array, dtype) in tensors.items():
        name = key.replace(".super_scales", ".super_scale")
        if dtype in ("U8", "I8"):
            flipped = np.int8 if dtype == "U8" else np.uint8
            other[name] = (array.view(flipped), "I8" if dtype == "U8" else "U8")
        else:
            other[name] = (array, dtype)
    write_tensors(tmp_path / "plain", config, tensors)
    write_tensors(tmp_path / "other", config, other)
    ids = list(range(20))
    logits = [make_runner(tmp_path / name).logits(ids) for name in ("plain", "other")]
    np.testing.assert_array_equal(*logits)


def test_added_tokens_and_a_template_in_files_of_their_own(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<|own|>": 8190}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (folder / "generation_config.json").unlink()
    everything(folder)
    tokenizer = Ernie4_5Tokenizer.from_pretrained(folder)
    assert tokenizer.encode_text("<|own|>") == [8190]
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "a!"
    shutil.rmtree(folder)
