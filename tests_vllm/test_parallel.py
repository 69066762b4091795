"""Compiled engines, chunks, several processes on a random checkpoint of 2.5, and the example of the page."""

import re
import subprocess
import sys

import pytest
from engines import (
    LAYOUT_QUESTIONS,
    ROOT,
    answers_of,
    answers_of_chat,
    differing,
    engine,
    num_cached,
    prompt_of,
    sampling,
)

pytestmark = pytest.mark.slow

# Chunks shorter than any picture; on CPUs, vLLM's pipelines don't run without a compiler.
SETTINGS = {
    "compiled, in chunks": {"enforce_eager": False, "max_num_batched_tokens": 48},
    "in chunks of one token at times": {"max_num_batched_tokens": 17, "max_num_seqs": 16},
    "two processes for each linear": {"tensor_parallel_size": 2},
    "two processes one after the other": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_those_of_chat(name, published):
    path = published("2d5")
    expected = answers_of_chat(path, LAYOUT_QUESTIONS)
    prompts = [prompt_of(question) for question in LAYOUT_QUESTIONS]
    with engine(path, **SETTINGS[name]) as llm:
        cold = llm.generate(prompts, sampling(), use_tqdm=False)
        assert not differing(LAYOUT_QUESTIONS, answers_of(cold), expected)
        warm = llm.generate(prompts, sampling(), use_tqdm=False)
        assert not differing(LAYOUT_QUESTIONS, answers_of(warm), expected)
        assert num_cached(warm) > num_cached(cold)


def test_the_example_of_the_page_prints_an_answer(tmp_path):
    text = (ROOT / "docs/vllm.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- vllm -->\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    command = [sys.executable, str(tmp_path / "example.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "star" in done.stdout.splitlines()
