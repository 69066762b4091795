"""How much memory each quantisation of a model needs to load it and to answer one question about a picture.

    python benchmarks/memory_quantized.py
    python benchmarks/memory_quantized.py --model . --quantizations none nf4

Every row is measured in a separate process, forked once the libraries are imported. By default the model is
random: a decoder as deep and wide as --layers and --hidden say, on a small tower, because nano's 4 MB of
weights are negligible compared with what a run needs anyway.

- weights: bytes of all tensors in memory after loading, the quantiser's scales and tables included;
- peak, quantising: the peak resident memory (VmHWM) while the weights were loaded and quantised and the
  question was answered, minus what the process held after the imports;
- peak, read back: the same for the quantised model, saved and loaded again. A dash: it can't be saved.

Pages of the checkpoint's file count while they are mapped.
Times are not reported. Linux only. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.quantizations import QUANTIZATIONS, quantization_config  # noqa: E402

MEGABYTE = 10**6
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "torchao")
ROWS = {"none": "not quantised", **QUANTIZATIONS}
QUESTION, PICTURE = "What shape is the object?", ROOT / "examples" / "star.png"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint, instead of a random model")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the random model's decoder")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random model's decoder")
    parser.add_argument("--dtype", default="bfloat16", help="of everything that isn't quantised")
    parser.add_argument("--quantizations", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--new-tokens", type=int, default=8, help="length of the answer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_random_model(folder: str, arguments: argparse.Namespace) -> None:
    """A checkpoint of version 2.5 with random weights and nano's vocabulary."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    text, heads, rank = config.text_config, arguments.hidden // 64, arguments.hidden // 16
    text.hidden_size, text.num_hidden_layers = arguments.hidden, arguments.layers
    text.num_attention_heads, text.num_key_value_heads = heads, max(1, heads // 4)
    text.intermediate_size = arguments.hidden * 7 // 2
    text.plora_rank = text.plora_alpha = text.plora_wqkv_rank = text.plora_wqkv_alpha = rank
    torch.manual_seed(arguments.seed)
    model = AutoModel.from_config(config, trust_remote_code=True, dtype=getattr(torch, arguments.dtype))
    model.save_pretrained(folder)


def resident_bytes(field: str) -> int:
    """Of this process: `VmRSS` now, `VmHWM` the peak so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def tensor_bytes(tensor: object) -> int:
    """Bytes of a tensor, or of the tensors that a quantised one is made of."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def measure(
    folder: str, quantization: str, arguments: argparse.Namespace, save_in: str | None = None
) -> dict:
    """One row, in the process that calls it; all in bytes. Saves the model afterwards, if it can be saved."""
    before = resident_bytes("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    config = None if quantization == "none" else quantization_config(quantization)
    model = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=arguments.dtype, quantization_config=config
    ).eval()
    loaded = resident_bytes("VmHWM")
    length = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens}
    model.chat(tokenizer, QUESTION, PICTURE, do_sample=False, **length)
    peak = resident_bytes("VmHWM")
    weights = sum(tensor_bytes(tensor) for tensor in model.state_dict().values())
    if save_in is not None:
        with suppress(ValueError):  # torchao's layout for CPUs can't be saved
            model.save_pretrained(save_in)
    return {"weights": weights, "peak_loading": loaded - before, "peak": peak - before, "imports": before}


def measure_both(folder: str, quantization: str, arguments: argparse.Namespace) -> dict:
    """A row: quantised while loading, and read back from where it was saved."""
    with tempfile.TemporaryDirectory() as saved:
        row = forked(measure, folder, quantization, arguments, saved)
        if quantization != "none" and (Path(saved) / "config.json").exists():
            row["read_back"] = forked(measure, saved, "none", arguments)
    return row


def forked(function: Callable, *args) -> object:
    """What a function returns in a separate process.

    Raises:
        RuntimeError: the process died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} died; see its error above") from None
    finally:
        process.join()


def import_quantisers() -> None:
    """Make every row's process start with the same libraries in memory."""
    for name in ("bitsandbytes", "torchao.quantization"):
        try:
            __import__(name)
        except ImportError:
            print(f"{name} is not installed; pip install -e '.[quant]'", file=sys.stderr)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def print_table(arguments: argparse.Namespace, folder: str) -> dict[str, dict]:
    print(f"| {arguments.dtype} | weights, MB | peak, quantising, MB | peak, read back, MB |")
    print("|---|---|---|---|")
    rows = {}
    for name in arguments.quantizations:
        row = rows[name] = measure_both(folder, name, arguments)
        numbers = [row["weights"], row["peak"], row.get("read_back", {}).get("peak")]
        cells = ["-" if number is None else f"{number / MEGABYTE:.0f}" for number in numbers]
        print(f"| {ROWS[name]} | {' | '.join(cells)} |", flush=True)
    return rows


def main() -> None:
    arguments = parse_arguments()
    import_quantisers()
    found = versions()
    print(f"CPU, {platform.machine()}; " + ", ".join(f"{name} {found[name]}" for name in found), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.model:
            forked(write_random_model, folder, arguments)
        rows = print_table(arguments, arguments.model or folder)
    size = {} if arguments.model else {"hidden": arguments.hidden, "layers": arguments.layers}
    size |= {"new_tokens": arguments.new_tokens, "dtype": arguments.dtype, "device": "cpu"}
    print(json.dumps({"model": arguments.model or "random", **size, "versions": found, "rows": rows}))


if __name__ == "__main__":
    main()
