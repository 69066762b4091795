"""The plugin's parts without an engine: registration, prompts, the penalty on GPUs, positions, the image."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import ROOT
from internlm_xcomposer2.generation_internlm_xcomposer2 import RowPenalty

from ixc2_vllm.decoder import rotation_of
from ixc2_vllm.defaults import limit_dynamic_positions
from ixc2_vllm.penalty import PENALTY, RunnerPenalty
from ixc2_vllm.processing import sampled_frames
from ixc2_vllm.renderer import check_roles, order_marks

VOCABULARY, BOS = 20, 1


def test_registering_imports_nothing_of_the_family_and_may_be_repeated():
    code = (
        "import ixc2_vllm, sys; ixc2_vllm.register(); ixc2_vllm.register();"
        "from vllm import ModelRegistry;"
        "assert 'InternLMXComposer2ForCausalLM' in ModelRegistry.get_supported_archs();"
        "print([name for name in sys.modules if name.startswith('internlm_xcomposer2')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- prompts ----


@pytest.mark.parametrize(
    ("text", "counts", "kinds"),
    [
        ("<ImageHere> <ImageHere>", (2, 0), ["image", "image"]),
        ("<ImageHere>", (0, 1), ["video"]),
        ("<VideoHere>", (0, 1), ["video"]),
        ("<VideoHere> <ImageHere> <VideoHere>", (1, 2), ["video", "image", "video"]),
        ("no mark", (1, 0), ["image"]),
    ],
)
def test_media_in_the_order_of_their_marks(text, counts, kinds):
    assert order_marks(text, *counts) == (text.replace("Video", "Image"), kinds)


@pytest.mark.parametrize(
    "case", [("<ImageHere> <ImageHere>", 1, 1), ("<VideoHere>", 1, 2), ("<VideoHere>", 0, 0)]
)
def test_marks_that_say_too_little(case):
    with pytest.raises(ValueError, match="VideoHere"):
        order_marks(*case)


def test_roles_are_checked():
    check_roles([{"role": role, "content": []} for role in ("system", "user", "assistant")])
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        check_roles([{"role": "tool", "content": []}])


@pytest.mark.parametrize(
    ("num_frames", "metadata", "chosen"),
    [
        (75, {"fps": 25.0, "do_sample_frames": True}, [0, 25, 50]),
        (5, {"do_sample_frames": False}, [0, 1, 2, 3, 4]),
        (5, {"fps": 30.0}, [0, 1, 2, 3, 4]),
    ],
)
def test_frames_that_a_caller_decoded(num_frames, metadata, chosen):
    assert sampled_frames(range(num_frames), metadata) == chosen
    assert len(sampled_frames(range(1000), {})) == 32


# ---- the penalty on GPUs ----


def states(rows: list[list[int]], prompt_lengths: list[int], length: int = 12) -> SimpleNamespace:
    tokens = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return SimpleNamespace(
        max_num_reqs=len(rows),
        all_token_ids=SimpleNamespace(gpu=tokens),
        prompt_len=SimpleNamespace(gpu=torch.tensor(prompt_lengths)),
    )


def config(**settings) -> SimpleNamespace:
    text = SimpleNamespace(bos_token_id=BOS)
    return SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text), additional_config=settings)


def test_the_penalty_of_slots_is_that_of_chat():
    rows = [[BOS, 5, 6, 7, 8], [BOS, BOS, 5, 9, 9], [BOS, 3, 4, 11], [BOS, 2]]
    prompts, penalties = [3, 3, 3, 2], [1.3, 2.0, 1.0, 1.5]
    processor = RunnerPenalty(config(), states(rows, prompts))
    for slot, penalty in enumerate(penalties):
        params = SimpleNamespace(extra_args={PENALTY: penalty} if slot != 2 else None)
        assert processor.add_request(slot, params) == (penalty != 1.0)
    order = [2, 0, 3, 1]  # of the slots in this step's batch
    lengths = [len(rows[slot]) for slot in order]
    context = SimpleNamespace(
        idx_mapping_np=np.array(order),
        expanded_idx_mapping=torch.tensor(order),
        seq_lens_upper_bound_np=np.array(lengths),
        pos=torch.tensor(lengths) - 1,
    )
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    for place, slot in enumerate(order):
        prompt, answer = rows[slot][: prompts[slot]], rows[slot][prompts[slot] :]
        counted = prompt if prompt[:2] == [BOS, BOS] else []
        answer = torch.tensor([answer], dtype=torch.long)
        expected[place] = RowPenalty(penalties[slot], [counted])(answer, logits[place][None])[0]
    assert torch.equal(processor.apply(logits, context), expected)


def test_the_default_of_a_server_and_a_slot_that_is_used_again():
    processor = RunnerPenalty(config(**{PENALTY: 1.005}), states([[BOS, 5]], [1]))
    assert processor.add_request(0, SimpleNamespace(extra_args=None))
    assert processor.penalties[0] == np.float32(1.005)
    assert not processor.add_request(0, SimpleNamespace(extra_args={PENALTY: 1}))
    context = SimpleNamespace(idx_mapping_np=np.array([0]))
    logits = torch.ones(1, VOCABULARY)
    assert processor.apply(logits, context) is logits


# ---- positions ----


def text_config(rope_type: str, trained: int = 100, **parameters) -> SimpleNamespace:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}
    return SimpleNamespace(rope_parameters=rope, max_position_embeddings=trained, head_dim=32)


def test_dynamic_positions_end_where_they_were_trained():
    text = text_config("dynamic", factor=2.0)
    model = SimpleNamespace(max_model_len=200, original_max_model_len=None)
    limit_dynamic_positions(model, text)
    assert model.max_model_len == 100
    assert rotation_of(text, 100) == {"rope_type": "default", "rope_theta": 10000.0}
    asked = SimpleNamespace(max_model_len=200, original_max_model_len=200)
    limit_dynamic_positions(asked, text)
    assert asked.max_model_len == 200 and rotation_of(text, 200)["rope_theta"] > 10000.0
    plain = SimpleNamespace(max_model_len=200, original_max_model_len=None)
    limit_dynamic_positions(plain, text_config("default"))
    assert plain.max_model_len == 200


# ---- the image, the checklist ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; run it by itself")
def test_the_checklist_says_that_nothing_was_checked_without_a_gpu():
    command = [sys.executable, "tests_vllm/gpu_checklist.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == "there is no GPU: nothing was checked\n"


def test_the_dockerfile_names_files_that_exist():
    text = (ROOT / "ixc2_vllm/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} <= {"ARG", "FROM", "COPY", "RUN", "ENTRYPOINT", "ENV", "WORKDIR"}
    assert lines[0][0] in ("ARG", "FROM") and re.fullmatch(r"vllm/vllm-openai:\S+", lines[0][-1])
    for line in lines:
        if line[0] == "COPY":
            assert all((ROOT / source).exists() for source in line[1:-1])
