"""`ixc2 adapters`: the task adapters of a checkpoint as LoRA, the same numbers in the order of vLLM."""

import json

import pytest
import torch
from helpers import published_source, published_weights, tiny_model
from internlm_xcomposer2.ixc2.adapters import export_adapters
from internlm_xcomposer2.ixc2.main import main
from internlm_xcomposer2.modeling_internlm2 import unpack_heads
from safetensors.torch import load_file

RANKS = {"sft": 4, "dpo": 3, "web": 6}
MODES = {"write": ("sft", "dpo"), "web": ("web",)}


@pytest.fixture
def source(tmp_path):
    """A published checkpoint in two shards, with task adapters -> its directory and its weights."""
    weights = published_weights(tiny_model("2.5", task_adapters=RANKS))
    published_source(tmp_path / "source", weights=weights, changes={"num_key_value_heads": 2}, shards=2)
    return tmp_path / "source", weights


def test_the_products_are_those_of_the_checkpoint(source, tmp_path):
    path, weights = source
    assert export_adapters(path, tmp_path / "out") == {"write": 7, "web": 6}
    linears = {name.rsplit(".lora_", 1)[0] for name in weights if ".lora_" in name}
    for mode, names in MODES.items():
        written = load_file(tmp_path / "out" / mode / "adapter_model.safetensors")
        assert len(written) == 2 * len(linears)
        for linear in linears:
            down, up = (written[f"base_model.model.{linear}.lora_{factor}.weight"] for factor in ("A", "B"))
            products = [
                weights[f"{linear}.lora_{name}_B.weight"] @ weights[f"{linear}.lora_{name}_A.weight"]
                for name in names
            ]
            expected = sum(products)
            if linear.endswith("wqkv"):
                expected = unpack_heads(expected, 4, 2)
            torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-5)


def test_the_settings_give_a_scale_of_one(source, tmp_path):
    export_adapters(source[0], tmp_path / "out")
    for mode, rank in (("write", 7), ("web", 6)):
        config = json.loads((tmp_path / "out" / mode / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == rank
        assert config["target_modules"] == ["wqkv", "wo", "w1", "w2", "w3"]


def test_the_command(source, tmp_path, capsys):
    target = str(tmp_path / "out")
    assert main(["adapters", str(source[0]), target]) == 0
    assert capsys.readouterr().out == f"wrote {target}/write (rank 7)\nwrote {target}/web (rank 6)\n"
    assert main(["adapters", str(source[0]), target]) == 1
    assert "already exists" in capsys.readouterr().err


def test_a_checkpoint_without_adapters_is_refused(tmp_path):
    published_source(tmp_path / "source")
    with pytest.raises(ValueError, match="has no task adapters"):
        export_adapters(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unpacked_heads_are_all_queries_then_all_keys_then_all_values():
    groups, queries, dim = 2, 3, 4
    packed = torch.arange(groups * (queries + 2) * dim)
    rows = packed.view(groups, queries + 2, dim)
    expected = torch.cat([rows[:, :3].flatten(), rows[:, 3].flatten(), rows[:, 4].flatten()])
    assert torch.equal(unpack_heads(packed, groups * queries, groups), expected)
    wide = torch.stack([packed, -packed])
    assert torch.equal(
        unpack_heads(wide, groups * queries, groups, dim=1), torch.stack([expected, -expected])
    )
