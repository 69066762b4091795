"""What each of several processes does in `test_devices.py`: `parallel_worker.py JOB OUT`, under torchrun.

The job is JSON. The results of each rank are saved as OUT/RANK.pt.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import ROOT, picture_inputs
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from transformers.distributed import DistributedConfig

QUESTION = ("What number is printed in the picture?", str(ROOT / "examples" / "number.png"))


def family_logits(directory: str, infer_modes: list[str]) -> dict[str, torch.Tensor]:
    """The last logits of a prompt with a picture, in each mode."""
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = InternLMXComposer2ForCausalLM.from_pretrained(
        directory, dtype="float32", distributed_config=config
    )
    inputs = picture_inputs(model, [(1, 1)])
    return {mode: model(**inputs, infer_mode=mode, logits_to_keep=4).logits for mode in infer_modes}


def local_size(weight: torch.Tensor) -> int:
    """How many numbers of a weight this process holds."""
    return (weight.to_local() if hasattr(weight, "to_local") else weight).numel()


def nano_answers(save_directory: str) -> dict:
    """Nano through its methods; each rank has a different random state."""
    share = DistributedConfig(tp_plan="auto")
    model = InternLMXComposer2ForCausalLM.from_pretrained(ROOT, dtype="float32", distributed_config=share)
    tokenizer = InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))
    torch.manual_seed(dist.get_rank())
    wild = {"temperature": 9.0, "top_p": 1.0, "max_new_tokens": 12}
    prompt = {"inputs": torch.tensor([[1, 60, 70]]), "max_new_tokens": 6, "do_sample": False}
    results = {
        "greedy": model.chat(tokenizer, *QUESTION, do_sample=False)[0],
        "beams": model.chat(tokenizer, *QUESTION, do_sample=False, num_beams=2)[0],
        "streamed": list(model.stream_chat(tokenizer, *QUESTION, do_sample=False))[-1][0],
        "drawn": [model.chat(tokenizer, *QUESTION, **wild)[0] for _ in range(2)],
        "generated": model.generate(**{**prompt, **wild, "do_sample": True}).tolist(),
        "static": model.generate(**prompt, cache_implementation="static").tolist(),
        "random": torch.rand(1).item(),
    }
    attention = model.model.layers[0].attention
    local = [
        weight.to_local() if hasattr(weight, "to_local") else weight for weight in attention.parameters()
    ]
    results["part"] = sum(weight.numel() for weight in local)
    try:
        model.save_pretrained(save_directory)
    except ValueError as error:
        results["refused"] = str(error)
    return results


def output_of(script: Path) -> str:
    """What a script prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(str(script), run_name="__main__")
    return stdout.getvalue()


@torch.no_grad()
def main(job: dict, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {family: family_logits(*arguments) for family, arguments in job["families"].items()}
    results["nano"] = nano_answers(job["save_directory"])
    results["example"] = output_of(ROOT / "examples" / "tensor_parallel.py")  # leaves the process group
    torch.save(results, out / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
