"""Everything that a GPU has to show, in one run of a few minutes without a network.

    python benchmarks/gpu.py --out results/gpu
    python benchmarks/gpu.py --out /tmp/dry --device cpu --small     # a dry run of every step on a CPU

First what must be right: nano in float32 against the same on the CPU, its greedy answers in every type and
attention, torch's flash kernel where no mask is needed, a static cache with CUDA graphs, weights of 4 and 8
bits, offload to the CPU. Then what should be fast, on random weights of full size made on the device: prefill
as a share of the card's rate of bfloat16 products, decoding as a share of its bandwidth, a second turn,
beams, a batch, a video. A step that fails is recorded with its error, and the next one runs. Steps that don't
fit into --minutes are left out, and the table says so.

Writes gpu.json and gpu.md into the directory of --out. The exit status is 1 if something isn't right.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import common
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, CompileConfig

sys.path.insert(0, str(common.ROOT))

QUESTIONS = (
    ("star.png", "What shape is the object?", "star"),
    ("number.png", "What number is printed in the picture?", "6143"),
)
FLOAT32_LIMIT = 2e-4
PREFILLS = (2000, 10000, 24000)  # tokens
FULL = {
    "2.5": {"version": "2.5", "tile": 560},
    "4khd": {"version": "2-4khd", "tile": 336},
}
TEXT_OF_7B = common._text(4096, 14336, 32, 32, 92544, 256) | {"num_key_value_heads": 8}
VISION_OF_7B = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


@dataclass
class Run:
    """What the steps of a run share, and what they found."""

    device: str
    small: bool
    deadline: float  # of time.perf_counter()
    rows: list[dict] = field(default_factory=list)

    @property
    def is_cuda(self) -> bool:
        """Whether this is the real run."""
        return self.device.startswith("cuda")

    def step(self, name: str, function: Callable[..., dict], *args, **kwargs) -> None:
        """Run one step and record what it returns, or why it didn't."""
        start = time.perf_counter()
        if start > self.deadline:
            row = {"step": name, "state": "left out: no time"}
        else:
            try:
                row = {"step": name, "state": "ok", **function(self, *args, **kwargs)}
            except Exception as error:  # the next step may work
                traceback.print_exc()
                row = {"step": name, "state": f"failed: {type(error).__name__}: {str(error)[:300]}"}
        row["seconds"] = round(time.perf_counter() - start, 1)
        self.rows.append(row)
        common.print_row(row)
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def check(condition: bool, message: str) -> None:
    """Fail a step."""
    if not condition:
        raise AssertionError(message)


# ---- right ----


def load_nano(run: Run, dtype: str = "float32", attention: str = "sdpa", **options):
    """Nano on the device."""
    options = {"trust_remote_code": True, "dtype": dtype, "attn_implementation": attention, **options}
    model = AutoModel.from_pretrained(common.ROOT, **options).eval()
    return model if "device_map" in options else model.to(run.device)


def same_logits(run: Run, attention: str) -> dict:
    """Nano's logits for a prompt with a picture, in float32, against those of the CPU."""
    found = []
    for device in ("cpu", run.device):
        model = load_nano(run, attention="eager" if device == "cpu" else attention).to(device)
        inputs = common.bare_prompt(model, (1, 1))
        found.append(model(**inputs).logits.float().cpu())
    difference = (found[0] - found[1]).abs().max().item()
    check(difference < FLOAT32_LIMIT, f"logits differ by {difference:.1e}, more than {FLOAT32_LIMIT:.0e}")
    return {"largest_difference": common.to_digits(difference)}


def same_answers(run: Run, dtype: str, attention: str) -> dict:
    """Nano's greedy answers."""
    return answers_of(load_nano(run, dtype, attention))


def answers_of(model, **settings) -> dict:
    """The answers to questions whose answers are known.

    Raises:
        AssertionError: one is wrong.
    """
    tokenizer = common.load_tokenizer()
    for picture, question, right in QUESTIONS:
        path = common.ROOT / "examples" / picture
        answer, _ = model.chat(tokenizer, question, path, do_sample=False, **settings)
        check(answer == right, f"{question} {answer!r}, not {right!r}")
    return {"answers": len(QUESTIONS)}


def flash_kernel(run: Run) -> dict:
    """torch's flash kernel computes a prompt without padding: with it alone, nothing fails."""
    model = load_nano(run, "bfloat16")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model.model(**common.bare_prompt(model, (1, 1)))
    return {}


def static_cache(run: Run) -> dict:
    """A static cache with compiled steps (CUDA graphs on a GPU) gives the right answers."""
    settings = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
    if not run.is_cuda:
        settings.pop("compile_config")
    return answers_of(load_nano(run, "bfloat16"), **settings)


def few_bits(run: Run, bits: int) -> dict:
    """Nano in few bits answers as before, with the kernels of the device."""
    from internlm_xcomposer2.ixc2.quantize import quantize

    with tempfile.TemporaryDirectory() as folder:
        quantize(common.ROOT, f"{folder}/nano", bits=bits, method="round")
        model = AutoModel.from_pretrained(f"{folder}/nano", trust_remote_code=True, dtype="bfloat16").eval()
        model = model.to(run.device)
        kinds = {type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Weight")}
        return {**answers_of(model), "kernels": ", ".join(kinds) or "none"}


def offloaded(run: Run) -> dict:
    """`device_map="auto"` with most of the model on the CPU."""
    places = {0: "6MB", "cpu": "2GB"} if run.is_cuda else {"cpu": "2GB"}
    model = load_nano(run, "float32", device_map="auto", max_memory=places)
    used = getattr(model, "hf_device_map", {"": model.device}).values()  # not there if one device has it all
    return {**answers_of(model), "devices": ", ".join(sorted({str(place) for place in used}))}


def check_all(run: Run) -> None:
    """Every step about what must be right."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as float32
    attentions = ["sdpa", "eager", "flex_attention"]
    flash = {"flash_attention_2": "flash_attn", "flash_attention_4": "flash_attn.cute"}
    half_only = [name for name, package in flash.items() if run.is_cuda and is_installed(package)]
    for attention in attentions:
        run.step(f"logits of float32, {attention}", same_logits, attention)
    for dtype in ("bfloat16", "float16"):
        # On a CPU flex attention compiles anew for every length.
        for attention in (*(attentions if run.is_cuda else attentions[:2]), *half_only):
            run.step(f"answers in {dtype}, {attention}", same_answers, dtype, attention)
    run.step("torch's flash kernel", flash_kernel)
    run.step("static cache", static_cache)
    for bits in (4, 8):
        run.step(f"answers in {bits} bits", few_bits, bits)
    run.step("offload to the CPU", offloaded)


def is_installed(package: str) -> bool:
    """Whether a package can be found."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


# ---- fast ----


def build_full(run: Run, name: str):
    """A random model of full size in bfloat16, made on the device."""
    from internlm_xcomposer2 import InternLMXcomposer2Config, InternLMXComposer2ForCausalLM

    known = FULL[name]
    size = common.SIZES["tiny"]
    text, vision, tile = (
        (size.text, size.vision, 56) if run.small else (TEXT_OF_7B, VISION_OF_7B, known["tile"])
    )
    config = InternLMXcomposer2Config(
        version=known["version"],
        **text,
        vision_config={**vision, "image_size": tile, "patch_size": common.PATCH},
        image_token_id=4,
        end_token_id=5,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(run.device):
            model = InternLMXComposer2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.normal_(std=0.02) if weight.ndim > 1 else None
    model.output.weight[len(common.load_tokenizer()) :] = 0
    return model


def limits_of(run: Run) -> dict:
    """The device's rate of bfloat16 products and of reading."""
    return common.machine_limits(run.device, small=run.small)


def prompt_of(run: Run, model, tokens: int) -> dict:
    """A prompt of about `tokens` tokens, nearly all of one picture."""
    cols = 1
    while not run.small and model.num_image_tokens(1, cols + 1) < tokens:
        cols += 1
    return common.bare_prompt(model, (1, cols))


def speed(run: Run, model, limits: dict, tokens: int, mode: str, num_new: int = 32) -> dict:
    """Prefill and decoding after a prompt of `tokens` tokens, as shares of the limits."""
    import prefill_decode

    inputs = prompt_of(run, model, tokens)
    mode = mode if run.is_cuda or mode != "compiled" else "static"
    for _ in range(3):  # the first ones compile and tune
        marks = prefill_decode.generate(model, inputs, num_new if not run.small else 4, mode)
    length, images = inputs["im_mask"].shape[1], int(inputs["im_mask"].sum())
    step = sorted(marks.steps)[len(marks.steps) // 2]
    return {
        "tokens": length,
        "prefill_s": common.to_digits(marks.first),
        "prefill_share": common.to_digits(
            prefill_decode.useful_products(model, length, images) / marks.first / limits["gflops"]
        ),
        "decode_tokens_per_s": common.to_digits(1 / step),
        "decode_share": common.to_digits(
            prefill_decode.bytes_read(model, length) / step / limits["gb_per_s"]
        ),
        "peak_gb": round(common.peak_memory(run.device), 2),
    }


def generation_speed(run: Run, model, tokens: int, rows: int = 1, beams: int = 1, num_new: int = 32) -> dict:
    """Seconds to the first token and tokens a second, for several rows or beams."""
    inputs = {
        name: value.repeat(rows, *[1] * (value.ndim - 1))
        for name, value in prompt_of(run, model, tokens).items()
    }
    num_new = 4 if run.small else num_new
    settings = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "num_beams": beams}
    for _ in range(2):
        marks = common.Marks(run.device)
        model.generate(**inputs, **settings, logits_processor=[marks])
    return {
        "rows": rows,
        "beams": beams,
        "first_s": common.to_digits(marks.first),
        "tokens_per_s": common.to_digits(rows * len(marks.steps) / sum(marks.steps)),
        "peak_gb": round(common.peak_memory(run.device), 2),
    }


def turns(run: Run, model, source) -> dict:
    """The first and the second turn about a picture or video."""
    tokenizer, history, seconds = common.load_tokenizer(), [], []
    for question in ("<ImageHere>What does it show?", "What else?"):
        start = time.perf_counter()
        settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        _, history = model.chat(tokenizer, question, source, history=history, **settings)
        common.synchronise(run.device)
        seconds.append(common.to_digits(time.perf_counter() - start))
    return {"first_turn_s": seconds[0], "second_turn_s": seconds[1]}


def video_of(run: Run) -> list:
    """32 frames, as pictures."""
    return [common.draw_picture(90, 160, seed) for seed in range(4 if run.small else 32)]


def int4_speed(run: Run, outputs: int, inputs: int) -> dict:
    """One row times a weight of the decoder in 4 bits, beside bfloat16."""
    from internlm_xcomposer2 import kernels_internlm_xcomposer2 as kernels

    integers = torch.randint(0, 16, (outputs, inputs), device=run.device)
    groups = inputs // 128
    scales = torch.full((outputs, groups), 0.01, device=run.device, dtype=torch.float16)
    zeros = torch.full((outputs, groups), 8, device=run.device, dtype=torch.uint8)
    packed = kernels.Int4Weight(kernels.pack_int4(integers), scales, zeros)
    plain = packed.unpack(torch.bfloat16)
    x = torch.randn(1, inputs, device=run.device, dtype=torch.bfloat16)
    check(
        torch.allclose(packed(x).float(), (x @ plain.T).float(), rtol=0.05, atol=0.1), "the products differ"
    )
    many = x.expand(kernels.KERNEL_ROWS + 1, -1).contiguous()
    check(
        torch.allclose(packed(many).float(), (many @ plain.T).float(), rtol=0.05, atol=0.1),
        "many rows differ",
    )
    repeats = 3 if run.small else 50
    own, other = (
        common.repeat(f, repeats, run.device)["min"] for f in (lambda: packed(x), lambda: x @ plain.T)
    )
    return {"int4_us": common.to_digits(1e6 * own), "bfloat16_us": common.to_digits(1e6 * other)}


def measure_all(run: Run) -> dict:
    """Every step about what should be fast; the limits of the device."""
    limits = limits_of(run)
    shown = {name: value for name, value in limits.items() if name != "rates"}
    run.rows.append({"step": "limits of the device", "state": "ok", **shown, "seconds": 0})
    run.step("a 4-bit product", int4_speed, *((256, 256) if run.small else (14336, 4096)))
    for name in FULL:
        try:
            model = build_full(run, name)
        except Exception as error:  # such as too little memory
            run.rows.append({"step": name, "state": f"failed: {error}", "seconds": 0})
            continue
        prefills = PREFILLS[:1] if run.small else PREFILLS
        for tokens in prefills:
            run.step(f"{name}, {tokens} tokens", speed, model, limits, tokens, "ours")
        run.step(f"{name}, {prefills[0]} tokens, compiled", speed, model, limits, prefills[0], "compiled")
        run.step(f"{name}, three beams", generation_speed, model, prefills[0], beams=3)
        run.step(f"{name}, batch of 16", generation_speed, model, 900, rows=2 if run.small else 16)
        picture = common.draw_picture(*((112, 112) if run.small else (2160, 3840)))
        run.step(f"{name}, two turns about a picture", turns, model, [picture])
        if name == "2.5":
            run.step(f"{name}, two turns about a video", turns, model, [video_of(run)])
        del model
    return limits


# ---- report ----


def table(rows: list[dict]) -> str:
    """All rows as Markdown."""
    lines = ["| step | state | what | seconds |", "|---|---|---|---|"]
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ("step", "state", "seconds")}
        what = ", ".join(f"{key} {value}" for key, value in rest.items())
        cells = row["step"], row["state"].replace("|", "/").replace("\n", " "), what, str(row["seconds"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    result.add_argument("--out", type=Path, required=True, help="directory for gpu.json and gpu.md")
    result.add_argument("--device", default="cuda")
    result.add_argument("--small", action="store_true", help="tiny sizes: a dry run")
    result.add_argument("--minutes", type=float, default=8, help="no step begins later")
    result.add_argument("--only", choices=["right", "fast"])
    result.set_defaults(size="full", threads=torch.get_num_threads(), dtype="bfloat16")
    return result.parse_args()


@torch.no_grad()
def main() -> int:
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU; for a dry run add --device cpu --small", file=sys.stderr)
        return 2
    report = common.begin("gpu", arguments)
    run = Run(arguments.device, arguments.small, time.perf_counter() + 60 * arguments.minutes)
    if arguments.only != "fast":
        check_all(run)
    if arguments.only != "right":
        report["limits"] = measure_all(run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps({**report, "rows": run.rows}, indent=2) + "\n")
    (arguments.out / "gpu.md").write_text(table(run.rows))
    failed = [row["step"] for row in run.rows if row["state"].startswith("failed")]
    print(json.dumps({"steps": len(run.rows), "failed": failed, "out": str(arguments.out)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
