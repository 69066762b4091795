"""What a checkpoint of full size needs from disk to answer: time and peak memory of each step, on a CPU.

    python benchmarks/full_size.py --folder SCRATCH --dtype bfloat16
    python benchmarks/full_size.py --folder SCRATCH --dtype bfloat16 --steps quantize "chat, 4 bits"

`make` writes random weights of the 1.8B checkpoint (4.9 GB) to SCRATCH, the others use what came before:
load, chat about a picture of its full side, save, read that back and compare, pack in 4 bits as GPTQ does,
and chat with that. Each step is a process of its own. Peaks are resident memory, in which pages of a mapped
file count. The answers mean nothing. The last line is JSON; delete SCRATCH afterwards (10 GB).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_NEW_TOKENS = 8


def make(folder: Path, size: str, dtype: str) -> dict:
    """Random weights of a published layout, with nano's tokenizer."""
    torch.manual_seed(0)
    config, tokenizer = common.build_config(size, adapters=False), common.load_tokenizer()
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.output.weight[len(tokenizer) :] = 0  # pieces that nano's tokenizer lacks are never chosen
    model.save_pretrained(folder / "made")
    tokenizer.save_pretrained(folder / "made")
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def load(folder: Path, size: str, dtype: str) -> dict:
    """Only load it, and read every weight once."""
    model = _read(folder / "made", dtype)
    return {"finite": all(bool(weight.isfinite().all()) for weight in model.parameters())}


def chat(folder: Path, size: str, dtype: str, of: str = "made") -> dict:
    """Load it and answer one question about a picture."""
    model, tokenizer = _read(folder / of, dtype), AutoTokenizer.from_pretrained(folder / of)
    marks = common.Marks("cpu")
    question = "<ImageHere>What does the picture show?"
    _, history = model.chat(
        tokenizer,
        question,
        common.picture_for(size),
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        logits_processor=[marks],
    )
    steps = sorted(marks.steps)
    return {"first_token_s": round(marks.first, 2), "token_s": round(steps[len(steps) // 2], 3)}


def chat_packed(folder: Path, size: str, dtype: str) -> dict:
    """The same from packed weights."""
    return chat(folder, size, dtype, "packed")


def save(folder: Path, size: str, dtype: str) -> dict:
    """Load it and write it again."""
    _read(folder / "made", dtype).save_pretrained(folder / "saved")
    return {}


def compare(folder: Path, size: str, dtype: str) -> dict:
    """Read both files, one weight at a time."""
    first, second = (dict(_weights(folder / name)) for name in ("made", "saved"))
    equal = first.keys() == second.keys() and all(
        torch.equal(read(), second[name]()) for name, read in first.items()
    )
    return {"weights": len(first), "equal": equal}


def quantize(folder: Path, size: str, dtype: str) -> dict:
    """Pack the decoder in 4 bits."""
    from internlm_xcomposer2.ixc2.quantize import quantize as pack

    return {"how": pack(folder / "made", folder / "packed", num_attention_heads=_heads(size))[-1]}


def _heads(size: str) -> int:
    return common.SIZES[size].text["num_attention_heads"]


def _read(folder: Path, dtype: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _weights(folder: Path):
    """(name, a function that reads it) of each weight in a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            yield name, lambda path=path, name=name: _tensor(path, name)


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


STEPS: dict[str, Callable[..., dict]] = {
    "make": make,
    "load": load,
    "chat": chat,
    "save": save,
    "compare": compare,
    "quantize": quantize,
    "chat, 4 bits": chat_packed,
}
WRITES = {"make": "made", "save": "saved", "quantize": "packed"}


def measure(step: str, folder: str, size: str, dtype: str) -> dict:
    """One step: a row of the table."""
    import internlm_xcomposer2  # noqa: F401  AutoModelForCausalLM then reads published configurations

    start = time.perf_counter()
    found = STEPS[step](Path(folder), size, dtype)
    row = {"step": step, "seconds": round(time.perf_counter() - start, 1), **found}
    if step in WRITES:
        files = (Path(folder) / WRITES[step]).glob("*.safetensors")
        row["disk_gb"] = round(sum(file.stat().st_size for file in files) / 1e9, 6)
    return row


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__, size="1.8b")
    result.add_argument("--folder", type=Path, required=True, help="where the checkpoints go")
    result.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("full_size", arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    named = {"folder": str(arguments.folder), "size": arguments.size, "dtype": arguments.dtype}
    cases = [{"step": step, **named} for step in arguments.steps]
    rows = common.measure_all(measure, cases, arguments)
    common.finish(report, rows, [])


if __name__ == "__main__":
    main()
