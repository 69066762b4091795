"""A checkpoint in 4 and in 8 bits beside the same in bfloat16: memory, prefill and decoding.

    python benchmarks/few_bits.py
    python benchmarks/few_bits.py --hidden 256 --layers 2 --tokens 64

The model is random, its decoder as deep and wide as --layers and --hidden say; `ixc2 quantize` makes the
other two from it. Every row is measured in a separate process:

- linears: bytes of the decoder's plain linears in memory;
- weights: bytes of all parameters and buffers;
- loaded, peak: resident memory after loading and the most until the end, less what the imports took;
- prefill: seconds for a prompt of --tokens tokens; decode: seconds for each token after it.

The weights in bfloat16 stay in their file, which is mapped, until the first answer: they are in the peak, not
in what is loaded. Linux only. The last line is JSON.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT))

from benchmarks.memory_quantized import resident_bytes, write_random_model  # noqa: E402

KINDS = {"bfloat16": None, "4 bits": 4, "8 bits": 8}


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def measure(folder: str, kind: str, tokens: int, num_new: int, repeats: int, dtype: str) -> dict:
    """One row, in the process that calls it."""
    from internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    before = resident_bytes("VmRSS")
    model = InternLMXComposer2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    loaded = resident_bytes("VmRSS") - before
    linears = [module for name, module in model.model.named_modules() if name.endswith(".linear")]
    ids = torch.randint(10, 600, (1, tokens), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new}
    marks = []
    for _ in range(repeats + 1):
        marks.append(common.Marks("cpu"))
        model.generate(ids, logits_processor=[marks[-1]], **settings)
    return {
        "kind": kind,
        "linears_mb": round(sum(map(tensor_bytes, linears)) / 1e6, 1),
        "weights_mb": round(tensor_bytes(model) / 1e6, 1),
        "loaded_mb": round(loaded / 1e6, 1),
        "peak_mb": round((resident_bytes("VmHWM") - before) / 1e6, 1),
        "prefill": common.spread([mark.first for mark in marks[1:]]),
        "decode": common.spread([step for mark in marks[1:] for step in mark.steps[1:]]),
    }


def parse_arguments() -> argparse.Namespace:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    result.add_argument("--hidden", type=int, default=2048, help="width of the decoder")
    result.add_argument("--layers", type=int, default=6)
    result.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    result.add_argument("--new-tokens", type=int, default=16)
    result.add_argument("--repeats", type=int, default=3)
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--same-process", action="store_true")
    result.set_defaults(size="random", device="cpu", dtype="bfloat16")
    return result.parse_args()


def main() -> None:
    from internlm_xcomposer2.ixc2.quantize import quantize

    arguments = parse_arguments()
    report = common.begin("few_bits", arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(f"{folder}/bfloat16", arguments)
        for kind, bits in KINDS.items():
            source = Path(folder, kind)
            if bits is not None:
                quantize(f"{folder}/bfloat16", source, bits=bits, tokenizer=common.ROOT / "tokenizer.model")
            given = {"folder": str(source), "kind": kind, "tokens": arguments.tokens, "dtype": "bfloat16"}
            given |= {"num_new": arguments.new_tokens, "repeats": arguments.repeats}
            rows.append(common.measure_apart(measure, arguments, **given))
            common.print_row(rows[-1])
    first = rows[0]
    compared = [
        {
            "kind": row["kind"],
            **{name: round(row[name] / first[name], 3) for name in row if name.endswith("_mb")},
            **{
                f"{name}_speed": round(first[name]["min"] / row[name]["min"], 2)
                for name in ("prefill", "decode")
            },
        }
        for row in rows[1:]
    ]
    common.finish(report, rows, compared)


if __name__ == "__main__":
    main()
