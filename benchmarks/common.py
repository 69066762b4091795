"""Shared by the benchmarks: sizes, random models, pictures, clocks, and the machine's own limits."""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoTokenizer, LogitsProcessor

ROOT = Path(__file__).resolve().parents[1]

PATCH = 14  # px
PICTURE_OF_NANO = (112, 112)  # (height, width) in px
NUM_TEXT_BEFORE, NUM_TEXT_AFTER = 1, 17  # tokens around the picture of a bare prompt


@dataclass(frozen=True)
class Size:
    """A decoder with its low-rank weights, and a tower. Numbers of a published configuration."""

    text: dict[str, int]
    adapters: dict[str, int]
    vision: dict[str, int]
    picture: tuple[int, int]  # (height, width) in px of the picture that is asked about
    version: str = "2.5"


def _text(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, rank: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": vocabulary,
        "plora_rank": rank,
    }


def _vision(hidden: int, layers: int, heads: int, side: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": PATCH,
    }


SIZES = {
    "tiny": Size(
        text=_text(64, 128, 2, 4, 1000, 4),
        adapters={"sft": 4, "dpo": 4, "web": 8},
        vision=_vision(32, 2, 2, 56),
        picture=(216, 384),
    ),
    "medium": Size(
        text=_text(1024, 4096, 8, 16, 92544, 256),
        adapters={"sft": 256, "dpo": 256, "web": 512},
        vision=_vision(256, 6, 4, 560),
        picture=(2160, 3840),
    ),
    "1.8b": Size(  # internlm-xcomposer2-vl-1_8b; the decoder's sizes are assumed
        text=_text(2048, 8192, 24, 16, 92544, 256),
        adapters={},
        vision=_vision(1024, 24, 16, 490),
        picture=(490, 490),
        version="2",
    ),
}


# ---- what is measured ----


def load_tokenizer():
    """Nano's tokenizer, whose pieces are the first ones of every random model here."""
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


def build_config(size: str, *, adapters: bool = True, attention: str = "sdpa"):
    """The configuration of a random model, with the markup of nano's vocabulary."""
    from internlm_xcomposer2 import InternLMXcomposer2Config

    return InternLMXcomposer2Config(
        version=SIZES[size].version,
        **SIZES[size].text,
        vision_config=SIZES[size].vision,
        task_adapters=SIZES[size].adapters if adapters else {},
        image_token_id=4,
        end_token_id=5,
        attn_implementation=attention,
    )


def build_model(
    size: str, *, naive: bool = False, adapters: bool = True, device: str = "cpu", dtype="float32"
):
    """A random model of one of the `SIZES`, or nano from the repository's root.

    Random models speak nano's vocabulary: pieces beyond it are computed, but never chosen. The naive way has
    eager attention, and torch's own products with all weights.
    """
    from internlm_xcomposer2.kernels_internlm_xcomposer2 import SETTING

    if naive:
        os.environ[SETTING] = "torch"
    else:
        os.environ.pop(SETTING, None)
    attention = "eager" if naive else "sdpa"
    options = {"trust_remote_code": True, "attn_implementation": attention, "dtype": dtype}
    if size == "nano":
        return AutoModel.from_pretrained(ROOT, **options).eval().to(device)
    from internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    config = build_config(size, adapters=adapters, attention=attention)
    torch.manual_seed(0)
    model = InternLMXComposer2ForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("_B.weight"):  # new ones are zeros, which is not a usual weight
            torch.nn.init.normal_(weight, std=0.02)
    model.output.weight[len(load_tokenizer()) :] = 0
    return model.to(device, getattr(torch, dtype))


def draw_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with large shapes and fine grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24 + 1, width // 24 + 1, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-20, 21, pixels.shape, dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def naive_chat() -> dict:
    """Arguments of `chat` that reuse nothing, expand beams before the prefill, and compute all logits."""
    return {"reuse": False, "cache_implementation": "dynamic", "logits_to_keep": 0}


def picture_for(size: str, seed: int = 0) -> Image.Image:
    """The picture that a model of this size is asked about."""
    return draw_picture(*(SIZES[size].picture if size in SIZES else PICTURE_OF_NANO), seed=seed)


def bare_prompt(model, grid: tuple[int, int]) -> dict:
    """Random embeddings of a prompt with one picture of `grid` tiles, and its mask, for `generate`."""
    num_image_tokens = model.num_image_tokens(*grid)
    length = NUM_TEXT_BEFORE + num_image_tokens + NUM_TEXT_AFTER
    embeds = model.model.tok_embeddings
    generator = torch.Generator().manual_seed(0)
    inputs = 0.02 * torch.randn(1, length, embeds.weight.shape[1], generator=generator)
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, NUM_TEXT_BEFORE : NUM_TEXT_BEFORE + num_image_tokens] = True
    return {"inputs_embeds": inputs.to(embeds.weight), "im_mask": mask.to(embeds.weight.device)}


# ---- clocks ----


def synchronise(device: str) -> None:
    """Wait for the device, whose kernels keep running after Python has moved on."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


class Marks(LogitsProcessor):
    """Changes nothing; records when each new token can be chosen, with or without beams."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock, self.times = device, clock, []
        self.start = clock()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        synchronise(self.device)
        self.times.append(self.clock())
        return scores

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.start

    @property
    def steps(self) -> list[float]:
        """Seconds of each later token."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def to_digits(value: float, digits: int = 3) -> float:
    """`value` with this many significant digits, so that a small value is never shown as zero."""
    return float(f"{value:.{digits}g}")


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and maximum, in seconds."""
    values = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(value, 5) for name, value in values.items()}


def repeat(function: Callable[[], object], times: int, device: str = "cpu") -> dict[str, float]:
    """The spread of `times` calls after one warm-up call."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return spread(seconds[1:])


def peak_memory(device: str = "cpu") -> float:
    """The peak memory of this process in GB: of the device, or of the machine."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held before exec, too
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _call(function: Callable[..., dict], threads: int, arguments: dict) -> dict:
    torch.set_num_threads(threads)
    with torch.no_grad():
        result = function(**arguments)
    return {**result, "peak_gb": round(peak_memory(arguments.get("device", "cpu")), 3)}


def measure_apart(function: Callable[..., dict], options: argparse.Namespace, **arguments) -> dict:
    """What `function` returns, and its peak memory, from a separate process unless told otherwise."""
    threads = options.threads
    if options.same_process:
        return _call(function, threads, arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_call, function, threads, arguments).result()


def measure_all(
    function: Callable[..., dict], cases: Iterable[dict], options: argparse.Namespace
) -> list[dict]:
    """A row for each case, which holds the arguments of `function`, printed as soon as it is measured."""
    rows = []
    for case in cases:
        rows.append(measure_apart(function, options, **case))
        print_row(rows[-1])
    return rows


# ---- the machine ----


def machine_limits(device: str = "cpu", *, small: bool = False) -> dict:
    """What the machine can do at best: the fastest of all libraries and types, each the best of several runs.

    Returns:
        The rate of large matrix products in GFLOP/s and who reaches it, the `rates` of all, and the rate of
        reading memory in GB/s.
    """
    rates = product_rates(device, 256 if small else 2048)
    fastest = max(rates, key=rates.get)
    reading = reading_rate(device, 1 << 20 if small else 1 << 28)
    return {"gflops": rates[fastest], "fastest": fastest, "rates": rates, "gb_per_s": reading}


def product_rates(device: str, side: int) -> dict[str, float]:
    """GFLOP/s of one product of two square matrices, by type and library."""
    from internlm_xcomposer2.kernels_internlm_xcomposer2 import WAYS, possible_kernels

    found = {}
    for name in ("float32", "bfloat16"):
        kind = getattr(torch, name)
        left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        ways = possible_kernels(kind, side) if device == "cpu" else ["torch"]
        for way in (way for way in ways if way != "float32"):  # that one is measured as float32
            seconds = repeat(lambda way=way: WAYS[way](left, right, None), 5, device)["min"]  # noqa: B023
            found[f"{name} by {way}"] = round(2 * side**3 / seconds / 1e9, 1)
    return found


def reading_rate(device: str, num_values: int) -> float:
    """GB/s of reading memory once: by a sum, and by a matrix times a vector."""
    values = torch.ones(num_values, device=device)
    matrix, vector = values.view(-1, 1024), values[:1024].clone()
    seconds = min(repeat(read, 5, device)["min"] for read in (values.sum, lambda: matrix.mv(vector)))
    return round(values.nbytes / seconds / 1e9, 2)


def machine(arguments: argparse.Namespace) -> dict:
    """What the numbers depend on."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    if arguments.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


# ---- command line and report ----


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    result.add_argument("--size", default=defaults.get("size", "medium"), choices=[*SIZES, "nano"])
    result.add_argument("--threads", type=int, default=defaults.get("threads", 1))
    result.add_argument("--repeats", type=int, default=defaults.get("repeats", 3))
    result.add_argument("--device", default="cpu")
    result.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    result.add_argument(
        "--naive",
        choices=["both", "only", "off"],
        default="both",
        help="measure with this package's optimisations switched off: too (default), only, or not",
    )
    result.add_argument(
        "--same-process",
        action="store_true",
        help="don't start a process for each row: faster, but peak memory is then that of all rows so far",
    )
    return result


def modes(arguments: argparse.Namespace) -> list[str]:
    """Which of the two modes are measured."""
    return {"both": ["ours", "naive"], "only": ["naive"], "off": ["ours"]}[arguments.naive]


def model_options(arguments: argparse.Namespace) -> dict:
    """What `build_model` and `measure_apart` need from the command line."""
    return {"size": arguments.size, "device": arguments.device, "dtype": arguments.dtype}


def begin(name: str, arguments: argparse.Namespace) -> dict:
    """Print what is measured and on what."""
    found = machine(arguments)
    print(f"{name}: size {arguments.size}")
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "size": arguments.size,
        "machine": found,
    }


def print_row(row: dict) -> None:
    """One line of measurements; times as median and spread."""
    print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)


def _shown(value) -> str:
    if isinstance(value, dict) and "median" not in value:
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, dict):
        return f"{value['median']:.4g} s ({value['min']:.4g}-{value['max']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ratios(rows: list[dict], by: tuple[str, ...], of: tuple[str, ...]) -> list[dict]:
    """How many times as much the naive way needs, for rows that agree in `by`."""
    ours = {tuple(row[key] for key in by): row for row in rows if row["mode"] == "ours"}
    found = []
    for row in rows:
        mine = ours.get(tuple(row[key] for key in by))
        if row["mode"] == "naive" and mine:
            times = {key: round(_number(row[key]) / max(_number(mine[key]), 1e-9), 2) for key in of}
            found.append({**{key: row[key] for key in by}, **times})
    return found


def _number(value) -> float:
    return value["median"] if isinstance(value, dict) else value


def finish(report: dict, rows: list[dict], compared: list[dict]) -> None:
    """Print the ratios, and everything as one line of JSON."""
    for row in compared:
        print("ratio:", end="  ")
        print_row(row)
    print(json.dumps({**report, "rows": rows, "ratios": compared}))
