"""`.bin` weights as safetensors: exact, in files of a chosen size, and one in memory at a time."""

import subprocess
import sys

import pytest
import torch
from helpers import logits_of, published_source, published_weights, read_json, tiny_model
from internlm_xcomposer2.ixc2.adopt import adopt
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel


def test_conversion_is_exact_and_splits_large_shards(tmp_path):
    model = tiny_model("2.5")
    weights = published_weights(model)
    norms = torch.arange(64.0, dtype=torch.bfloat16)  # two tensors in one storage, and one that is transposed
    weights["model.layers.0.attention_norm.weight"] = norms[:32]
    weights["model.layers.1.attention_norm.weight"] = norms[16:48]
    weights["vision_proj.2.weight"] = weights["vision_proj.2.weight"].T.contiguous().T
    published_source(tmp_path / "source", weights=weights, kind="bin", shards=2)
    adopt(tmp_path / "source", tmp_path / "target", convert_bin=True, max_shard_size="60KB")
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 4
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        part = load_file(file)
        found |= part
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 60_000
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    index = read_json(tmp_path / "target" / "model.safetensors.index.json")
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())


MEMORY = """
import sys
from pathlib import Path
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import read_headers
from internlm_xcomposer2.ixc2.convert import convert, plan_pieces

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

files = sorted(Path(sys.argv[1]).glob("*.bin"))
before = peak()
headers = read_headers(files)
after_headers = peak()
convert(plan_pieces(headers, "5GB"), Path(sys.argv[1]))
print(after_headers - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_conversion_holds_one_shard_at_a_time(tmp_path):
    shard_bytes, num_shards = 48 << 20, 6
    for i in range(num_shards):
        torch.save({f"w{i}": torch.full((shard_bytes // 4,), float(i))}, tmp_path / f"{i}.bin")
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    headers, whole = map(int, result.stdout.split())
    assert headers < shard_bytes / 4
    assert shard_bytes / 2 < whole < 2.5 * shard_bytes  # the mapped shard and what is written of it
    assert load_file(tmp_path / "model-00006-of-00006.safetensors")["w5"][0] == 5


def test_a_file_from_before_torch_1_6_is_converted(tmp_path):
    model = published_source(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "source" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    adopt(tmp_path / "source", tmp_path / "target", convert_bin=True)
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "target")), logits_of(model))
