"""4-bit checkpoints on vLLM's own kernels: nano in both formats, and those that vLLM has no kernel for."""

import shutil
from pathlib import Path

import pytest
import torch
from engines import NANO_QUESTIONS, ROOT, answers_of, answers_of_chat, differing, engine, prompt_of, sampling
from helpers import read_json, write_published
from internlm_xcomposer2.ixc2.quantize import quantize
from packers import pack_checkpoint
from safetensors.torch import load_file

ASKED = NANO_QUESTIONS[::4]


def gptq_by_us(folder: Path) -> Path:
    quantize(ROOT, folder, bits=4)
    return folder


def packed_nano(folder: Path, method: str, **options: bool) -> Path:
    """Nano as published 4-bit checkpoints are: zero points of their own, settings in `config.json`."""
    weights, _ = pack_checkpoint(load_file(ROOT / "model.safetensors"), method, group_size=32, **options)
    settings = {
        "gptq": {"bits": 4, "group_size": 32, "desc_act": options.get("act_order", False), "sym": False},
        "awq": {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    }
    fields = read_json(ROOT / "config.json")
    fields["quantization_config"] = {"quant_method": method, **settings[method]}
    write_published(folder, weights, fields)
    shutil.copy(ROOT / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize(
    "write", [gptq_by_us, lambda folder: packed_nano(folder, "awq")], ids=["gptq", "awq"]
)
def test_answers_are_those_of_chat(write, tmp_path):
    """`chat` computes in float32 and vLLM in bfloat16, which may turn an answer where two are near."""
    path = write(tmp_path / "packed")
    expected = answers_of_chat(path, ASKED)
    with engine(path, dtype="bfloat16") as llm:
        outputs = llm.generate([prompt_of(question) for question in ASKED], sampling(), use_tqdm=False)
        assert llm.apply_model(lambda model: model.model.layers[0].feed_forward.w2.qweight.dtype) == [
            torch.int32
        ]
    assert len(differing(ASKED, answers_of(outputs), expected)) <= len(ASKED) // 10


@pytest.mark.parametrize(("options", "reason"), [({}, "sym=False"), ({"act_order": True}, "desc_act=True")])
def test_what_has_no_kernel_is_refused(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason), engine(packed_nano(tmp_path, "gptq", **options)):
        pass
