"""Compiled engines, prompts in chunks, and several processes, on a random checkpoint of 2.5."""

import pytest
from engines import (
    LAYOUT_QUESTIONS,
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
