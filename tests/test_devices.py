"""A model on several devices and in several processes gives the same as on one."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import check_device_map
from helpers import (
    FAMILIES,
    HERE,
    ROOT,
    full_size_config,
    picture_inputs,
    tiny_config,
    tiny_model,
)
from helpers import FULL_SIZES as ALL_SIZES
from internlm_xcomposer2 import (
    InternLMXcomposer2Config,
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2Tokenizer,
)
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import tensor_parallel_size
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig
from transformers.integrations.accelerate import _get_device_map, compute_module_sizes

PICTURE = [(1, 1)]
TASKS = {"sft": 4, "dpo": 4, "web": 6}
QUESTION = ("What number is printed in the picture?", str(ROOT / "examples" / "number.png"))
LOW_RANK = ("Plora", "lora_sft", "lora_dpo", "lora_web")
FULL_SIZES = {
    "2": {"version": "2", "img_size": 490},
    "4khd": {"version": "2-4khd"},
    "2d5": {"version": "2.5"},
    "2d5-ol": {"version": "2.5", "video_memory_size": 1536, "text_config": {"num_key_value_heads": 8}},
}


@torch.no_grad()
def last_logits(model, infer_mode: str = "base") -> torch.Tensor:
    return model(**picture_inputs(model, PICTURE), infer_mode=infer_mode, logits_to_keep=4).logits


def size_in_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def nano() -> InternLMXComposer2ForCausalLM:
    return InternLMXComposer2ForCausalLM.from_pretrained(ROOT, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> InternLMXComposer2Tokenizer:
    return InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))


# ---- device_map ----


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("family", FULL_SIZES)
def test_full_sizes_are_spread_in_the_order_of_computation(family, num_devices):
    with torch.device("meta"):
        model = InternLMXComposer2ForCausalLM(InternLMXcomposer2Config(**FULL_SIZES[family])).half()
    sizes, _ = compute_module_sizes(model)
    device_map = _get_device_map(model, "auto", dict.fromkeys(range(num_devices), 40 * 10**9), None)

    first = {name for name, device in device_map.items() if device == 0}
    assert {"vit", "vision_proj", "model.tok_embeddings", "model.layers.0"} <= first
    assert {name for name, _ in model.named_parameters(recurse=False)} <= first
    assert "video_mem_proj" in first or not model.config.video_memory_size
    assert device_map["model.norm"] == device_map["output"] == num_devices - 1

    devices = [device_map[f"model.layers.{index}"] for index in range(len(model.model.layers))]
    assert devices == sorted(devices) and set(devices) == set(range(num_devices))
    loads = [sum(sizes[n] for n, d in device_map.items() if d == device) for device in range(num_devices)]
    assert max(loads) < 1.3 * sizes[""] / num_devices


CARDS = {"1 x 24 GB": [24], "2 x 24 GB": [24, 24], "1 x 80 GB": [80]}


@pytest.mark.parametrize("cards", CARDS)
@pytest.mark.parametrize("name", ALL_SIZES)
def test_published_checkpoints_are_planned_for_usual_cards(name, cards):
    """In bfloat16, a tenth of each card left for the cache: whole layers, in order, within the limits."""
    with torch.device("meta"):
        model = InternLMXComposer2ForCausalLM(full_size_config(name)).to(torch.bfloat16)
    limits = {index: int(0.9e9 * size) for index, size in enumerate(CARDS[cards])}
    whole = model._no_split_modules
    plan = infer_auto_device_map(model, {**limits, "cpu": 10**11}, no_split_module_classes=whole)
    check_device_map(model, plan)  # everything has a place
    places, used = {}, defaultdict(int)
    for key, weight in model.named_parameters():
        part = max((part for part in plan if f"{key}.".startswith(f"{part}.") or not part), key=len)
        places[key] = plan[part]
        used[plan[part]] += weight.nbytes
    layers = [layer for layer, module in model.named_modules() if type(module).__name__ in whole]
    found = [{place for key, place in places.items() if key.startswith(f"{layer}.")} for layer in layers]
    assert len(layers) == 24 + len(model.model.layers) and all(len(one) == 1 for one in found)
    order = [place for layer, (place,) in zip(layers, found, strict=True) if layer.startswith("model.layers")]
    assert order == sorted(order, key=[*limits, "cpu"].index)
    assert all(used[index] <= limit for index, limit in limits.items())
    assert ("cpu" in used) == (size_in_bytes(model) > sum(limits.values()))
    assert len(limits) > 1 or "cpu" in used or set(places.values()) == {0}


def test_a_small_first_device_takes_what_is_computed_first():
    with torch.device("meta"):
        model = InternLMXComposer2ForCausalLM(InternLMXcomposer2Config(version="2.5")).half()
    budget = {0: 4 * 10**9, 1: 4 * 10**9, "cpu": 40 * 10**9}
    device_map = _get_device_map(model, "auto", budget, None)
    assert [device_map[name] for name in ("vit", "vision_proj", "plora_glb_GN", "model.layers.0")] == [0] * 4
    order = [device_map[f"model.layers.{index}"] for index in range(32)]
    assert order == sorted(order, key=[0, 1, "cpu"].index) and set(order) == {0, 1, "cpu"}
    assert device_map["output"] == "cpu"


@pytest.mark.parametrize(("family", "share"), [*((family, 0.8) for family in FAMILIES), ("2d5", 0.3)])
def test_a_model_that_outgrows_memory_gives_the_same_numbers(
    checkpoint, family_model, tmp_path, family, share
):
    reference = family_model(family)
    model = InternLMXComposer2ForCausalLM.from_pretrained(
        checkpoint(family),
        dtype="float32",
        device_map="auto",
        max_memory={"cpu": int(share * size_in_bytes(reference))},
        offload_folder=tmp_path,
    )
    place = {name.split(".")[0]: device for name, device in model.hf_device_map.items()}  # of each part's end
    assert place.get("output", place.get("")) == "disk"
    assert share < 0.5 or place["vit"] == place["vision_proj"] == "cpu"
    torch.testing.assert_close(last_logits(model), last_logits(reference), rtol=0, atol=1e-6)
    prompt = {**picture_inputs(reference, PICTURE), "max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(**prompt), reference.generate(**prompt))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_nano_chats_when_it_outgrows_memory(nano, tokenizer, tmp_path, share):
    model = InternLMXComposer2ForCausalLM.from_pretrained(
        ROOT,
        dtype="float32",
        device_map="auto",
        max_memory={"cpu": int(share * size_in_bytes(nano))},
        offload_folder=tmp_path,
    )
    assert "disk" in model.hf_device_map.values()
    call = (tokenizer, *QUESTION)
    answer, history = model.chat(*call, do_sample=False)
    assert (answer, history) == nano.chat(*call, do_sample=False)
    assert list(model.stream_chat(*call, do_sample=False))[-1] == (answer, history)


# ---- tensor parallelism ----


@pytest.fixture(scope="module")
def shared(tmp_path_factory, checkpoint) -> list[dict]:
    """What two processes that share the models returned, by rank; under `saved`, nano as they saved it."""
    out = tmp_path_factory.mktemp("shared")
    modes = {"2d5": ["base", "write", "web"]}
    job = {
        "families": {name: (str(checkpoint(name)), modes.get(name, ["base"])) for name in FAMILIES},
        "save_directory": str(out / "saved"),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, str(HERE / "parallel_worker.py"), json.dumps(job), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out / "home")},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-9000:]
    results = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    return [{**ranked, "saved": out / "saved"} for ranked in results]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_the_logits_of_one(shared, family_model, family):
    model = family_model(family)
    for results in shared:
        for mode, logits in results[family].items():
            expected = last_logits(model, mode)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert set(shared[0]["2d5"]) == {"base", "write", "web"}


@pytest.mark.slow
def test_two_processes_answer_as_one(shared, nano, tokenizer):
    call = (tokenizer, *QUESTION)
    ask = partial(nano.chat, *call, do_sample=False)
    prompt = torch.tensor([[1, 60, 70]])
    generated = nano.generate(prompt, max_new_tokens=6, do_sample=False).tolist()
    for results in (ranked["nano"] for ranked in shared):
        assert results["greedy"] == results["streamed"] == ask()[0]
        assert results["beams"] == ask(num_beams=2)[0]
        assert results["static"] == generated


@pytest.mark.slow
def test_the_example_prints_once(shared, nano, tokenizer):
    call = (tokenizer, *QUESTION)
    assert [ranked["example"] for ranked in shared] == [f"{nano.chat(*call, do_sample=False)[0]}\n", ""]


@pytest.mark.slow
def test_each_process_holds_a_part(shared, nano):
    whole = sum(parameter.numel() for parameter in nano.model.layers[0].attention.parameters())
    for ranked in shared:
        assert whole / 2 < ranked["nano"]["part"] < 0.6 * whole  # one low-rank factor of each pair is whole


@pytest.mark.slow
def test_processes_sample_the_same_tokens_from_different_random_states(shared):
    first, second = (ranked["nano"] for ranked in shared)
    assert first["drawn"] == second["drawn"]
    assert first["generated"] == second["generated"]
    assert first["drawn"][0] != first["drawn"][1]
    assert first["random"] != second["random"]


@pytest.mark.slow
def test_a_shared_model_is_saved_whole_or_not_at_all(shared):
    refused = [ranked["nano"].get("refused") for ranked in shared]
    if refused[0]:  # transformers before it split models by DTensor
        assert "2 processes" in refused[0] and refused[0] == refused[1]
        assert not shared[0]["saved"].exists()
        return
    saved, published = (load_file(folder / "model.safetensors") for folder in (shared[0]["saved"], ROOT))
    assert saved.keys() == published.keys()
    for name, weight in published.items():
        assert torch.equal(saved[name], weight.float()), name


def test_the_plan_names_every_linear_of_the_decoder():
    model = tiny_model("2.5", task_adapters=TASKS)
    plan = model.model.tp_plan
    names = {name for name, _ in model.model.named_modules()}
    assert all(rule.replace("*", "0") in names for rule in plan)
    for linear in ("attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in "123")):
        pairs = [
            {f"layers.*.{linear}.{pair}_{f}" for f in "AB"} for pair in ("Plora", "lora_sft", "lora_web")
        ]
        assert f"layers.*.{linear}.linear" in plan
        assert all(len(pair & plan.keys()) == 1 for pair in pairs)
    assert not any("lora_sft" in rule for rule in tiny_model("2.5").model.tp_plan)
    assert "base_model_tp_plan" not in tiny_config().to_dict()["text_config"]


@pytest.mark.parametrize(
    ("arguments", "world", "numbers"),
    [
        ({"tp_plan": "auto"}, "3", ("3 processes", "num_key_value_heads 2")),
        ({"tp_plan": "auto", "tp_size": 4}, "8", ("4 processes", "num_key_value_heads 2")),
        ({"distributed_config": {"tp_size": 5}}, "5", ("5 processes", "num_key_value_heads 2")),
    ],
)
def test_numbers_that_do_not_divide_are_named(monkeypatch, arguments, world, numbers):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError) as error:
        InternLMXComposer2ForCausalLM.from_pretrained(ROOT, **arguments)
    assert all(number in str(error.value) for number in numbers)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, 1),
        ({"tp_plan": "auto"}, 8),
        ({"tp_plan": "auto", "tp_size": 4}, 4),
        ({"tp_plan": "auto", "device_mesh": SimpleNamespace(ndim=1, size=lambda: 2)}, 2),
        ({"distributed_config": {"tp_plan": "auto", "fsdp_size": 2}}, 4),
        ({"distributed_config": DistributedConfig()}, 1),
        ({"distributed_config": DistributedConfig(tp_size=2, fsdp_size=4)}, 2),
    ],
)
def test_how_many_processes_a_model_is_split_across(monkeypatch, arguments, size):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert tensor_parallel_size(arguments) == size


def test_processes_that_share_nothing_load_and_sample_as_usual(monkeypatch, nano, tokenizer):
    monkeypatch.setenv("WORLD_SIZE", "3")  # as under a data-parallel launcher
    model = InternLMXComposer2ForCausalLM.from_pretrained(ROOT, dtype="float32")
    with torch.random.fork_rng():
        drawn = []
        for each in (model, nano):
            torch.manual_seed(5)
            drawn.append(each.chat(tokenizer, "Who?", [], temperature=5.0, max_new_tokens=8)[0])
    assert drawn[0] == drawn[1]
