"""How fast llama.cpp runs a checkpoint that was written as GGUF, compared with torch, and how exactly.

    python benchmarks/gguf_speed.py                                  # one thread
    python benchmarks/gguf_speed.py --threads 2 --types q4_k_m q8_0

A random model of the given size is exported in each type. Each row is measured in a separate process, on a
prompt of embeddings with one picture:

- prefill: the time to the first token, Partial LoRA on the picture's tokens included;
- decode: the time of each later token, chosen in Python;
- bare: the time of each later token if nothing but llama.cpp's `llama_decode` runs, in the same context;
- second turn: the time to the first token of another question of the same length about the same picture;
- agreement: in how many of --positions places after the picture the most likely token is that of f32, which
  must come first; among_five: in how many f32's is among the five most likely; error: of all logits there,
  as a part of their length;
- loading and peak: memory of the process in GB, after loading and at most. Mapped pages of files count.

With one thread, times are the processor's, so that other processes on the machine don't count, else the
clock's. The fastest of all repetitions is the one to compare. The last line is JSON.
"""

import argparse
import ctypes
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from prefill_decode import generate

TYPES = ("f32", "f16", "q8_0", "q6_k", "q4_k_m")
TILES = (2, 3)  # rows and columns: 2861 picture tokens at 560 px
QUESTION = list(range(10, 10 + common.NUM_TEXT_AFTER))


def clock_for(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def write_model(folder: Path, size: str) -> None:
    """A random checkpoint in float32, with nano's tokenizer."""
    model = common.build_model(size, adapters=False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(common.ROOT / name, folder)


def write_gguf(source: Path, target: Path, kind: str) -> int:
    """Export one type -> bytes of the decoder's file."""
    from internlm_xcomposer2.ixc2.gguf import export
    from internlm_xcomposer2.llamacpp.files import DECODER

    export(source, target, kind)
    return (target / DECODER).stat().st_size


class Timed:
    """Keeps the time of each call, in seconds."""

    def __init__(self, threads: int) -> None:
        self.clock, self.seconds = clock_for(threads), []

    def __call__(self, function: Callable, *args):
        start = self.clock()
        result = function(*args)
        self.seconds.append(self.clock() - start)
        return result


def prefill(decoder, picture: np.ndarray, start: int = 0) -> np.ndarray:
    """A token, a picture and a question, or from `start` on the question alone -> logits."""
    from internlm_xcomposer2.llamacpp.decoder import PICTURES

    if not start:
        decoder.forget()
        decoder.use([])
        decoder.prefill([1], 0)
        decoder.use([PICTURES])
        decoder.prefill(picture, 1)
    decoder.use([])
    decoder.forget(0, 1 + len(picture))
    return decoder.prefill(QUESTION, 1 + len(picture))


def decode(decoder, logits: np.ndarray, length: int, num_new: int, timed: Timed) -> None:
    """Write tokens greedily after `length` tokens."""
    from internlm_xcomposer2.llamacpp.answers import Answer
    from internlm_xcomposer2.prompt_internlm_xcomposer2 import ChatPrompt
    from transformers import GenerationConfig

    answer = Answer(
        ChatPrompt([1], [False]), {"max_new_tokens": num_new + 1}, num_new + 1, GenerationConfig()
    )
    answer.grow(logits)
    for position in range(length, length + num_new):
        timed(lambda p=position: answer.grow(decoder.step([answer.ids[-1]], [p], [0])[0]))


def decode_bare(decoder, length: int, num_new: int, timed: Timed) -> None:
    """The same with nothing but llama.cpp."""
    api, token = decoder.library.api, (ctypes.c_int32 * 1)(1)
    decoder.forget(0, length)
    for _ in range(num_new):
        timed(api.llama_decode, decoder._context, api.llama_batch_get_one(token, 1))


def logits_of(decoder, length: int, num_positions: int) -> np.ndarray:
    """(positions, vocabulary) logits after each of several random tokens."""
    ids = np.random.default_rng(0).integers(7, decoder.vocab_size, num_positions).tolist()
    decoder.forget(0, length)
    places = np.arange(length, length + num_positions)
    decoder._decode(ids, places, np.zeros(num_positions), np.ones(num_positions, dtype=np.int8))
    return np.stack([decoder._logits(index) for index in range(num_positions)])


def agreement(found: np.ndarray, exact: np.ndarray) -> dict:
    """How (positions, vocabulary) logits agree with those of f32."""
    top = exact.argmax(axis=1)
    five = np.argpartition(-found, 5, axis=1)[:, :5]
    return {
        "agreement": float(np.mean(found.argmax(axis=1) == top)),
        "among_five": float(np.mean((five == top[:, None]).any(axis=1))),
        "error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
    }


def measure_gguf(
    folder: str, kind: str, threads: int, num_new: int, repeats: int, num_positions: int
) -> dict:
    """A row of the table, with logits in place of the agreement."""
    from internlm_xcomposer2 import from_gguf
    from internlm_xcomposer2.image_processing_internlm_xcomposer2 import tokens_of_grid

    model = from_gguf(folder, n_threads=threads)
    loaded = common.peak_memory()
    shape = tokens_of_grid(model.config, TILES), model.decoder.hidden_size
    picture = 0.02 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    length = 1 + len(picture) + len(QUESTION)
    first, second, steps, bare = (Timed(threads) for _ in range(4))
    for _ in range(repeats):
        logits = first(prefill, model.decoder, picture)
        second(prefill, model.decoder, picture, 1)
        decode(model.decoder, logits, length, num_new, steps)
        decode_bare(model.decoder, length, num_new, bare)
    peak = common.peak_memory()
    return {
        "mode": kind,
        "tokens": length,
        "prefill": common.spread(first.seconds),
        "decode": common.spread(steps.seconds),
        "bare": common.spread(bare.seconds),
        "second_turn": common.spread(second.seconds),
        "loading_gb": round(loaded, 3),
        "measured_peak_gb": round(peak, 3),
        "logits": logits_of(model.decoder, length, num_positions),
    }


def measure_torch(size: str, dtype: str, threads: int, num_new: int, repeats: int) -> dict:
    """The same model in torch."""
    model = common.build_model(size, adapters=False, dtype=dtype)
    loaded = common.peak_memory()
    inputs = common.bare_prompt(model, TILES)
    generate(model, {name: value[:, :40] for name, value in inputs.items()}, 3, "ours")
    clock = clock_for(threads)
    marks = [generate(model, inputs, num_new, "ours", clock) for _ in range(repeats)]
    return {
        "mode": f"torch {dtype}",
        "tokens": inputs["im_mask"].shape[1],
        "prefill": common.spread([each.first for each in marks]),
        "decode": common.spread([step for each in marks for step in each.steps]),
        "loading_gb": round(loaded, 3),
    }


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--types", nargs="+", default=TYPES, help="of llama.cpp's quantiser")
    result.add_argument("--dtypes", nargs="*", default=["float32"], help="to measure in torch")
    result.add_argument("--new-tokens", type=int, default=48)
    result.add_argument("--positions", type=int, default=256, help="at which agreement is counted")
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("gguf_speed", arguments)
    shared = {"threads": arguments.threads, "num_new": arguments.new_tokens, "repeats": arguments.repeats}
    rows, exact = [], None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_model(source, arguments.size)
        for kind in arguments.types:
            target = Path(folder) / kind
            num_bytes = write_gguf(source, target, kind)
            row = common.measure_apart(
                measure_gguf,
                arguments,
                folder=str(target),
                kind=kind,
                num_positions=arguments.positions,
                **shared,
            )
            shutil.rmtree(target)
            logits = row.pop("logits")
            row |= {"file_gb": round(num_bytes / 1e9, 4)}
            exact = logits if kind == "f32" else exact
            if exact is not None:
                row |= agreement(logits, exact)
            rows.append(row)
            common.print_row(row)
    for dtype in arguments.dtypes:
        rows.append(
            common.measure_apart(measure_torch, arguments, size=arguments.size, dtype=dtype, **shared)
        )
        common.print_row(rows[-1])
    common.finish(report, rows, ratios_to_torch(rows))


def ratios_to_torch(rows: list[dict]) -> list[dict]:
    """How many times as long torch takes, and how many times as long as llama.cpp alone; by the minima."""
    plain = next((row for row in rows if row["mode"] == "torch float32"), None)
    found = []
    for row in rows:
        if "bare" in row:
            python = round(row["decode"]["min"] / row["bare"]["min"], 3)
            found.append({"mode": row["mode"], "python": python})
            for name in ("prefill", "decode") if plain else ():
                found[-1][f"{name}_of_torch"] = round(plain[name]["min"] / row[name]["min"], 2)
    return found


if __name__ == "__main__":
    main()
