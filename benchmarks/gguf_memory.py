"""How much memory it takes to write a model of published size as GGUF, and to answer from it.

    python benchmarks/gguf_memory.py --size 1.8b
    python benchmarks/gguf_memory.py --size 7b-4khd --layers 2 --kv-type q8_0 --n-ctx 4864
    python benchmarks/gguf_memory.py --size 7b-4khd --kv-type f16 --hd-num 9

Weights are random and stored in bfloat16; vocabulary, widths and tower are those of the published checkpoint.
What layers add are their parts of the files and of the keys and values, so --layers saves time and disk. With
fewer tiles (--hd-num) the answer comes sooner; what it takes is the same from eight on, because the context
is of --n-ctx tokens in any case and the tower gets eight tiles at a time.

- writing: the peak resident memory of the process that writes, and its time;
- loading, answering: the peak of another process after loading, and after an answer about one 4K picture.

Pages of files count while they are mapped. Linux only. Needs disk for about 2.5 times the source in bfloat16.
The last line is JSON.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import common
import torch
from safetensors.torch import save_file

PUBLISHED = {
    "1.8b": {
        "version": "2",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "7b-4khd": {
        "version": "2-4khd",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 92544
SHARD_BYTES = 1 << 30
STD = 0.02
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of a key or value


def build_config(size: str, layers: int):
    """The configuration of a published checkpoint, with the markup of nano's vocabulary."""
    from internlm_xcomposer2 import InternLMXcomposer2Config

    fields = {**PUBLISHED[size], "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    return InternLMXcomposer2Config(**fields, image_token_id=4, end_token_id=5)


def write_source(folder: str, size: str, layers: int) -> dict:
    """A random checkpoint in bfloat16, one shard in memory at a time."""
    from internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    config = build_config(size, layers)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        shapes = {
            name: each.shape for name, each in InternLMXComposer2ForCausalLM(config).state_dict().items()
        }
    generator, shard, index = torch.Generator().manual_seed(0), {}, {}
    for name, shape in shapes.items():
        values = torch.empty(shape, dtype=torch.bfloat16).uniform_(-STD, STD, generator=generator)
        if name == "output.weight":
            values[len(common.load_tokenizer()) :] = 0  # computed, but never chosen
        shard[name] = torch.ones_like(values) if "norm" in name and name.endswith("weight") else values
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES:
            _save(shard, folder, index)
            shard = {}
    _save(shard, folder, index)
    config.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(common.ROOT / name, folder)
    return {"gb": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e9}


def _save(shard: dict, folder: str, index: dict) -> None:
    """One more file of weights, named in an index of all of them."""
    name = f"model-{len(set(index.values())) + 1:05}.safetensors"
    save_file(shard, Path(folder) / name, metadata={"format": "pt"})
    index |= dict.fromkeys(shard, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (Path(folder) / "model.safetensors.index.json").write_text(text)


def measure_writing(source: str, target: str, kind: str) -> dict:
    """Write one type -> the sizes of the files in GB, and what the process took."""
    from internlm_xcomposer2.ixc2.gguf import export

    start = time.perf_counter()
    export(source, target, kind)
    seconds = time.perf_counter() - start
    sizes = {path.name: path.stat().st_size / 1e9 for path in Path(target).iterdir()}
    found = {name.split(".")[0]: round(sizes[name], 3) for name in ("decoder.gguf", "plora.gguf")}
    found |= {"vision": round(sizes["vision.safetensors"], 3), "writing_gb": round(common.peak_memory(), 2)}
    return {"seconds": round(seconds), **found}


def measure_answering(folder: str, n_ctx: int, kv_type: str, threads: int, hd_num: int | None) -> dict:
    """Load, and answer a question about one 4K picture -> peak memory in GB."""
    from internlm_xcomposer2 import from_gguf

    before = common.peak_memory()
    model = from_gguf(folder, n_ctx=n_ctx, kv_type=kv_type, n_threads=threads)
    loaded = common.peak_memory()
    picture = common.draw_picture(2160, 3840)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4, "hd_num": hd_num}
    model.chat(model.tokenizer, "<ImageHere>What is it?", picture, **settings)
    text, num_tokens = model.config.text_config, len(model._kept.tokens) + 1
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    numbers = {"imports_gb": before, "loading_gb": loaded, "answering_gb": common.peak_memory()}
    return {
        "n_ctx": n_ctx,
        "kv_type": kv_type,
        "tokens": num_tokens,
        "kv_gb": round(per_token * KV_BYTES[kv_type] * n_ctx / 1e9, 3),
        **{name: round(value, 2) for name, value in numbers.items()},
    }


def parse_arguments() -> argparse.Namespace:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    result.add_argument("--size", default="1.8b", choices=PUBLISHED)
    result.add_argument("--layers", type=int, help="of the decoder; default: as published")
    result.add_argument("--type", default="q4_k_m", help="of llama.cpp's quantiser")
    result.add_argument("--n-ctx", type=int, default=4864)
    result.add_argument("--kv-type", nargs="+", default=["f16", "q8_0"], choices=KV_BYTES)
    result.add_argument("--hd-num", type=int, help="tiles of the picture; default: the checkpoint's")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--folder", help="where files are written, and kept; default: a temporary folder")
    result.set_defaults(device="cpu", dtype="bfloat16", same_process=False)
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    layers = arguments.layers or PUBLISHED[arguments.size]["num_hidden_layers"]
    report, rows = common.begin("gguf_memory", arguments) | {"layers": layers}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        source, target = str(folder / "source"), str(folder / arguments.type)
        if not Path(source).exists():
            Path(source).mkdir(parents=True)
            common.measure_apart(write_source, arguments, folder=source, size=arguments.size, layers=layers)
        rows.append(
            common.measure_apart(
                measure_writing, arguments, source=source, target=target, kind=arguments.type
            )
        )
        common.print_row(rows[-1])
        for kv_type in arguments.kv_type:
            options = {"folder": target, "n_ctx": arguments.n_ctx, "kv_type": kv_type}
            options["hd_num"] = arguments.hd_num
            rows.append(
                common.measure_apart(measure_answering, arguments, threads=arguments.threads, **options)
            )
            common.print_row(rows[-1])
    common.finish(report, rows, [])


if __name__ == "__main__":
    main()
