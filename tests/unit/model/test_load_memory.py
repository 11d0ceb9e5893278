"""The peak of a load is the weights that are kept plus less than one shard, in every form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hugging_face import hugging_face_config, hugging_face_tensors
from tiny_model import tiny_config, tiny_tensors, write_tensors, write_tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "moe_intermediate_size": 1024,
    "layers": 4,
    "experts": 6,
    "vocab_size": 4096,
}
SHARD = 64 << 20
LOAD = """
import sys
from pathlib import Path
from fastdeploy_lite.config import ModelConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.worker.model_runner import ModelRunner

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10

folder, wanted = Path(sys.argv[1]), sys.argv[2] or None
model = ModelConfig.from_dir(folder).with_quantization(wanted)
config = RuntimeConfig(folder, model, scheduler=SchedulerConfig(1, 256, 256), device="cpu")
runner = ModelRunner(config)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
runner.load_model()
print(status("VmHWM") - before, sum(runner.memory_report().weights.values()))
"""


def write(folder: Path, form: str) -> Path:
    if form in ("hf", "stacked"):
        config = tiny_config("bf16", **SIZES)
        tensors = hugging_face_tensors(config, tiny_tensors(config), stacked=form == "stacked")
        write_tensors(folder, hugging_face_config(config), tensors, SHARD)
        return folder
    write_tiny_model(
        folder,
        kind="2bits",
        tokenizer=False,
        tensor_parallel_size=2 if form == "ranks" else 1,
        shard_bytes=SHARD,
        **SIZES,
    )
    if form == "permuted":
        file = folder / "config.json"
        file.write_text(
            file.read_text().replace('"row_order": "natural"', '"row_order": "permuted"')
        )
    return folder


@pytest.mark.parametrize(
    ("form", "wanted"),
    [("hf", ""), ("stacked", ""), ("hf", "wint4"), ("permuted", ""), ("ranks", "")],
)
def test_peak_of_a_load(tmp_path: Path, form: str, wanted: str) -> None:
    folder = write(tmp_path, form)
    arguments = [sys.executable, "-c", LOAD, str(folder), wanted]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    peak, kept = map(int, output.split()[-2:])
    assert kept > 30 << 20
    assert peak - kept < SHARD
