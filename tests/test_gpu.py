"""What a GPU has to show: `pytest -m gpu` on a machine that has one; elsewhere the same steps on the CPU."""

import copy
import importlib
import json
import sys
import time

import pytest
import torch
from helpers import FAMILIES, ROOT, golden_case, golden_cases
from test_parity import inputs_of

BENCHMARKS = ROOT / "benchmarks"
MODULES = ("common", "gpu", "prefill_decode")


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in MODULES:
        sys.modules.pop(name, None)


def states(run) -> dict[str, str]:
    return {row["step"]: row["state"] for row in run.rows}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.no_grad()
def test_everything_is_right_on_a_gpu(gpu):
    run = gpu.Run("cuda", False, time.perf_counter() + 480)
    gpu.check_all(run)
    assert {name: state for name, state in states(run).items() if state != "ok"} == {}


def largest_difference(model, family: str, name: str) -> float:
    """Between the logits of a model, on its device, and the recorded ones; 1 if the best tokens differ."""
    case, tensors = golden_case(family, name)
    inputs = {key: value.to(model.device) for key, value in inputs_of(model, case).items()}
    logits = model(**inputs, infer_mode=case["call"].get("infer_mode", "base")).logits[0].cpu()
    if not torch.equal(logits.argmax(-1), tensors["argmax_all"].flatten()):
        return 1.0
    return (logits[-1] - tensors["logits_last"].flatten()).abs().max().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_every_golden_case_on_a_gpu(attention, family_model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for family in FAMILIES:
        model = copy.deepcopy(family_model(family)).cuda()
        model.set_attn_implementation(attention)
        found = {name: largest_difference(model, family, name) for name in golden_cases(family)}
        assert {name: value for name, value in found.items() if value > 2e-4} == {}


@torch.no_grad()
def test_the_golden_cases_on_this_machine(family_model):
    """What the GPU is compared by, and that it sees a difference."""
    family, name = "2d5", golden_cases("2d5")[0]
    assert largest_difference(family_model(family), family, name) < 2e-4
    changed = copy.deepcopy(family_model(family))
    changed.model.norm.weight.mul_(1.01)
    assert largest_difference(changed, family, name) > 2e-4


def test_a_dry_run_measures_every_step(gpu, monkeypatch, tmp_path, capsys):
    command = ["gpu.py", "--out", str(tmp_path), "--device", "cpu", "--small", "--only", "fast"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["state"] for row in report["rows"]} == {"ok"}
    assert {"2.5, 2000 tokens", "4khd, three beams", "a 4-bit product"} <= {r["step"] for r in report["rows"]}
    assert len((tmp_path / "gpu.md").read_text().splitlines()) == 2 + len(report["rows"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == []


@torch.no_grad()
def test_steps_that_must_be_right_notice_what_is_wrong(gpu, monkeypatch):
    run = gpu.Run("cpu", True, time.perf_counter() + 600)
    run.step("logits", gpu.same_logits, "sdpa")
    run.step("4 bits", gpu.few_bits, 4)
    run.step("flash", gpu.flash_kernel)
    run.step("offload", gpu.offloaded)
    assert set(states(run).values()) == {"ok"}
    monkeypatch.setattr(gpu, "FLOAT32_LIMIT", -1)
    monkeypatch.setattr(gpu, "QUESTIONS", (("star.png", "What shape is the object?", "ring"),))
    run.step("wrong logits", gpu.same_logits, "sdpa")
    run.step("wrong answer", gpu.same_answers, "bfloat16", "sdpa")
    run.deadline = 0
    run.step("late", gpu.flash_kernel)
    assert states(run)["wrong logits"].startswith("failed: AssertionError: logits differ")
    assert states(run)["wrong answer"].startswith("failed: AssertionError: What shape")
    assert states(run)["late"] == "left out: no time"
