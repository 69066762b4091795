"""What has been reasoned but not run, because no GPU was there: one line for each item, and JSON at the end.

    python tests_vllm/gpu_checklist.py    # in an environment with vLLM for CUDA; about ten minutes

Nothing is checked without a GPU, and the exit status is 2 then. It is 1 if an item fails.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import torch
from engines import (
    LAYOUT_QUESTIONS,
    NANO_QUESTIONS,
    ROOT,
    TEXT_ONLY,
    Question,
    answers_of,
    answers_of_chat,
    differing,
    engine,
    prompt_of,
    sampling,
    write_layout,
)
from internlm_xcomposer2.ixc2.adapters import export_adapters
from vllm import LLM
from vllm.lora.request import LoRARequest

from ixc2_vllm.penalty import PENALTY

# Settings of `engine` that a GPU needs otherwise than a CPU.
GPU = {"block_size": None, "gpu_memory_utilization": 0.3}
GRAPHS = {**GPU, "enforce_eager": False}
BFLOAT16_AGREEMENT = 0.9  # of nano's answers; rounding differs between kernels


@dataclass(frozen=True)
class Result:
    """What came of one item; `passed` is `None` if it needs more GPUs than there are."""

    passed: bool | None
    detail: str


def compare(questions: Sequence[Question], path: Path, expected: Sequence, **settings) -> Result:
    """Answers of an engine, cold and then from the prefix cache, beside those of `chat`."""
    prompts = [prompt_of(question) for question in questions]
    with engine(path, **settings) as llm:
        wrong = [
            len(differing(questions, answers_of(llm.generate(prompts, sampling(), use_tqdm=False)), expected))
            for _ in range(2)
        ]
    return Result(not any(wrong), f"{wrong[0]} and {wrong[1]} of {len(questions)} differ, cold and warm")


def eager() -> Result:
    """float32 on a GPU without graphs."""
    return compare(NANO_QUESTIONS, ROOT, answers_of_chat(ROOT, NANO_QUESTIONS), **GPU)


def graphs() -> Result:
    """The compiler and CUDA graphs, full ones for decoding and pieces for mixed batches."""
    return compare(NANO_QUESTIONS, ROOT, answers_of_chat(ROOT, NANO_QUESTIONS), **GRAPHS)


def graphs_of_a_random_checkpoint() -> Result:
    """The same where Partial LoRA matters for every answer."""
    path = write_layout("2d5", Path(tempfile.mkdtemp()))
    return compare(LAYOUT_QUESTIONS, path, answers_of_chat(path, LAYOUT_QUESTIONS), **GRAPHS)


def chunks_of_one_token() -> Result:
    """Steps in which one token of a picture goes with others' decoding, so that a full graph runs them."""
    path = write_layout("2d5", Path(tempfile.mkdtemp()))
    questions = LAYOUT_QUESTIONS * 4
    expected = answers_of_chat(path, LAYOUT_QUESTIONS) * 4
    return compare(questions, path, expected, **GRAPHS, max_num_batched_tokens=17)


def bfloat16() -> Result:
    """How many of nano's answers are those of float32."""
    expected = answers_of_chat(ROOT, NANO_QUESTIONS)
    with engine(ROOT, **GRAPHS, dtype="bfloat16") as llm:
        prompts = [prompt_of(question) for question in NANO_QUESTIONS]
        found = answers_of(llm.generate(prompts, sampling(), use_tqdm=False))
    share = 1 - len(differing(NANO_QUESTIONS, found, expected)) / len(NANO_QUESTIONS)
    return Result(share >= BFLOAT16_AGREEMENT, f"{share:.1%} of the answers are those of float32")


def no_waits() -> Result:
    """Whether a step of ours makes the host wait for the device."""
    with engine(ROOT, **GPU) as llm, warnings.catch_warnings(record=True) as caught:
        llm.generate([prompt_of(NANO_QUESTIONS[0])], sampling(), use_tqdm=False)
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        llm.generate([prompt_of(question) for question in TEXT_ONLY], sampling(), use_tqdm=False)
        torch.cuda.set_sync_debug_mode("default")
    ours = {f"{Path(each.filename).name}:{each.lineno}" for each in caught if "ixc2_vllm" in each.filename}
    return Result(not ours, f"waits in {', '.join(sorted(ours))}" if ours else "none")


def penalty() -> Result:
    """The repetition penalty of the runner that keeps all tokens on the device."""
    expected = [answers_of_chat(ROOT, TEXT_ONLY, repetition_penalty=value) for value in (1.1, 2.0)]
    with engine(ROOT, **GRAPHS) as llm:
        runner = "second" if llm.llm_engine.vllm_config.use_v2_model_runner else "first"
        prompts = [prompt_of(question) for question in TEXT_ONLY]
        found = [
            answers_of(llm.generate(prompts, sampling(extra_args={PENALTY: value}), use_tqdm=False))
            for value in (1.1, 2.0)
        ]
    return Result(found == expected, f"in vLLM's {runner} runner")


def adapters() -> Result:
    """LoRA rows beside base rows, with no slot to spare."""
    folder = Path(tempfile.mkdtemp()) / "adapters"
    export_adapters(ROOT, folder)
    text = "Write something about the word CLOUD."
    modes = ("write", "web", "base")
    questions = [Question(text, infer_mode=mode) for mode in modes]
    expected = answers_of_chat(ROOT, questions)
    requests = [
        LoRARequest("write", 1, str(folder / "write")),
        LoRARequest("web", 2, str(folder / "web")),
        None,
    ]
    with engine(ROOT, **GRAPHS, enable_lora=True, max_loras=2, max_lora_rank=16) as llm:
        prompts = [prompt_of(question) for question in questions]
        outputs = llm.generate(prompts, sampling(), lora_request=requests, use_tqdm=False)
    wrong = differing(questions, answers_of(outputs), expected)
    return Result(not wrong, f"{len(wrong)} of {len(modes)} differ")


def several_gpus(**settings: int) -> Callable[[], Result]:
    """An item that splits nano across two GPUs."""

    def check() -> Result:
        if torch.cuda.device_count() < 2:
            return Result(None, "needs two GPUs")
        return compare(NANO_QUESTIONS, ROOT, answers_of_chat(ROOT, NANO_QUESTIONS), **GRAPHS, **settings)

    return check


def speed() -> Result:
    """What graphs save: never slower than without them."""
    seconds = {}
    for name, settings in (("eager", GPU), ("graphs", GRAPHS)):
        with engine(ROOT, **settings, enable_prefix_caching=False) as llm:
            seconds[name] = time_of(llm)
    detail = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return Result(seconds["graphs"] <= 1.05 * seconds["eager"], detail)


def time_of(llm: LLM) -> float:
    """Seconds of nano's questions, after a warm-up."""
    prompts = [prompt_of(question) for question in NANO_QUESTIONS]
    llm.generate(prompts, sampling(), use_tqdm=False)
    start = time.perf_counter()
    llm.generate(prompts, sampling(), use_tqdm=False)
    return time.perf_counter() - start


ITEMS = {
    "float32 without graphs": eager,
    "the compiler and CUDA graphs": graphs,
    "the same on a random checkpoint": graphs_of_a_random_checkpoint,
    "pictures in chunks of one token": chunks_of_one_token,
    "bfloat16": bfloat16,
    "no waits for the device in a step": no_waits,
    "the repetition penalty": penalty,
    "adapters and base rows": adapters,
    "two GPUs for each linear": several_gpus(tensor_parallel_size=2),
    "two GPUs one after the other": several_gpus(pipeline_parallel_size=2),
    "graphs are worth it": speed,
}


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no GPU: nothing was checked")
        return 2
    results = {}
    for name, check in ITEMS.items():
        try:
            results[name] = check()
        except Exception as error:  # the next items don't depend on it
            results[name] = Result(False, f"{type(error).__name__}: {error}"[:300])
        word = {True: "passed", False: "FAILED", None: "not run"}[results[name].passed]
        print(f"{word:8} {name}: {results[name].detail}", flush=True)
    print(json.dumps({name: [result.passed, result.detail] for name, result in results.items()}))
    return int(any(result.passed is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
