"""What each of two processes does in `test_finetune_devices.py`: `finetune_worker.py JOB OUT`.

Under torchrun. The job is JSON. The results of each rank are saved as OUT/RANK.pt.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from finetune_helpers import losses, run
from helpers import picture_inputs, tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from finetune.arguments import ModelArguments
from finetune.freezing import freeze, hold_trained_in_float32
from finetune.lora import add_lora

# More local tiles than the tower encodes at once if it isn't sharded.
GRID = (3, 3)


def batches(model) -> list[dict]:
    """One batch with a picture of many tiles, and one without."""
    with_picture, text = picture_inputs(model, [GRID]), {"input_ids": torch.tensor([[1, 50, 51, 52]])}
    return [{**inputs, "labels": inputs["input_ids"]} for inputs in (with_picture, text)]


def shard(model, **settings):
    """The model sharded as in `finetune/configs/fsdp2.yaml`."""
    for module in list(model.modules()):
        if type(module).__name__ in ("InternLM2DecoderLayer", "CLIPEncoderLayer"):
            fully_shard(module, **settings)
    return fully_shard(model, **settings)


def sharded_step(target: Path) -> dict:
    """Loss and gradients of a model that is sharded and saved, each rank with a different kind of batch."""
    model = tiny_model("2.5", plora_dropout=0.0).train()
    freeze(model, ModelArguments("", fix_vit=False))
    batch = batches(model)[dist.get_rank()]
    shard(model)
    calls = []
    model.vit.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    loss = model(**batch).loss
    loss.backward()
    gradients = {
        name: weight.grad.full_tensor() for name, weight in model.named_parameters() if weight.requires_grad
    }
    with torch.no_grad():
        evaluated = model.eval()(**batch).loss
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)  # as accelerate puts it together
    if dist.get_rank() == 0:
        model.save_pretrained(target, state_dict=whole)
    return {"loss": loss.item(), "eval_loss": evaluated.item(), "gradients": gradients, "calls": len(calls)}


def sharded_lora() -> dict:
    """A step of LoRA in float32 on a frozen model in bfloat16, sharded and computed in bfloat16."""
    arguments = ModelArguments("", train="lora", lora_r=2, fix_sampler=False)
    model = tiny_model("2.5", plora_dropout=0.0).to(torch.bfloat16)
    batch = batches(model)[dist.get_rank()]
    freeze(model, arguments)
    wrapped = add_lora(model, arguments).train()
    hold_trained_in_float32(wrapped)
    shard(wrapped, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    loss = wrapped(**batch).loss
    loss.backward()
    trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
    return {
        "loss": loss.item(),
        "finite": all(weight.grad.full_tensor().isfinite().all().item() for weight in trained),
        "types": {weight.dtype for weight in trained},
    }


def main(job: dict, out: Path) -> None:
    torch.set_num_threads(1)
    base, rows = Path(job["base"]), Path(job["rows"])
    results = {}
    for name, flags in job["runs"].items():
        results[name] = losses(run(base, rows, out / name, *flags))
    results["sharded"] = sharded_step(out / "whole")
    results["sharded lora"] = sharded_lora()
    torch.save(results, out / f"{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
