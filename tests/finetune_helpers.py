"""Shared by the tests of fine-tuning: a small checkpoint, a few rows, and runs of the training command."""

import json
import sys
from pathlib import Path

import torch
from helpers import ROOT, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from PIL import Image

sys.path.insert(0, str(ROOT))

from finetune.saving import save_model  # noqa: E402
from finetune.train import parse_arguments, train  # noqa: E402

TASKS = {"sft": 4, "dpo": 4, "web": 8}
# Widths that bitsandbytes quantises.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
FAST = ("--learning_rate", "0.01", "--lr_scheduler_type", "constant")
LORA = ("--train", "lora", "--lora_r", "4", "--lora_alpha", "8")
ALWAYS = ("--use_cpu", "True", "--logging_steps", "1", "--report_to", "none", "--max_steps", "4")


def write_base(directory: Path, **fields) -> Path:
    """A small checkpoint of 2.5 with task adapters, complete."""
    model = tiny_model("2.5", **{"task_adapters": TASKS, "plora_dropout": 0.0, **SIZES, **fields})
    save_model(model, InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model")), "", directory)
    return directory


def write_rows(directory: Path, num_rows: int = 8) -> Path:
    """Rows in the published form, every second one with a picture."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_rows):
        turns = [
            {"from": "user", "value": f"what is {i}"},
            {"from": "assistant", "value": "one " * (1 + i % 3)},
        ]
        rows.append({"id": str(i), "conversations": turns})
        if i % 2 == 0:
            Image.new("RGB", (60 + i, 40), (20 * i, 99, 0)).save(directory / f"{i}.png")
            rows[-1]["image"] = f"{i}.png"
    path = directory / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def run(base: Path, rows: Path, output: Path, *flags: str):
    """The training command in this process -> its trainer."""
    named = ("--model_name_or_path", str(base), "--data_path", str(rows), "--output_dir", str(output))
    return train(*parse_arguments([*named, *ALWAYS, *flags]))


def losses(trainer) -> list[float]:
    """The training loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a whole checkpoint in float32, under our names."""
    return InternLMXComposer2ForCausalLM.from_pretrained(directory, dtype="float32").state_dict()
