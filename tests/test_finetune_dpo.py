"""Preferences without a reward model: the exact loss, its reference, and answers that become likelier."""

import math
import sys

import pytest
import torch
from finetune_helpers import SIZES, losses, weights_of, write_base
from helpers import ROOT
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Processor
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import END_OF_TURN
from test_finetune_reward import write_pairs

sys.path.insert(0, str(ROOT))

from finetune.merge import merge  # noqa: E402
from finetune.preferences import read_pairs  # noqa: E402
from finetune.train import parse_arguments, train  # noqa: E402
from finetune.train_dpo import DPO, DpoCollator, DpoDataset, log_likelihoods, without_adapter  # noqa: E402
from finetune.train_reward import pairwise_loss  # noqa: E402

pytestmark = pytest.mark.slow

LORA = ("--train", "lora", "--lora_r", "4", "--lora_alpha", "8")
FAST = ("--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--max_steps", "12")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model", **SIZES, hd_num=1)


@pytest.fixture(scope="module")
def batch(base, tmp_path_factory):
    """Two pairs, the second about a picture."""
    processor = InternLMXComposer2Processor.from_pretrained(base)
    dataset = DpoDataset(read_pairs(write_pairs(tmp_path_factory.mktemp("data"), 2)), processor)
    return DpoCollator(processor.tokenizer.pad_token_id)([dataset[0], dataset[1]])


def train_dpo(base, pairs, output, *flags):
    named = ("--model_name_or_path", str(base), "--data_path", str(pairs), "--output_dir", str(output))
    always = ("--use_cpu", "True", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no")
    size = ("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4")
    return train(*parse_arguments([*named, *always, *size, *flags]), DPO)


def test_likelihoods_worked_by_hand():
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]])
    labels = torch.tensor(
        [[-100, 1, 0]]
    )  # the second token after the first position, the third after the second
    expected = math.log(0.25) + math.log(0.1)
    assert log_likelihoods(probabilities.log(), labels).tolist() == pytest.approx([expected])
    assert log_likelihoods(probabilities.log(), torch.tensor([[1, -100, -100]])).tolist() == [0.0]


def test_an_answer_counts_up_to_its_end_mark(base, batch):
    """What the training format writes after an answer is never generated, so it must not be rewarded."""
    end = InternLMXComposer2Processor.from_pretrained(base).tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        last = max(at for at, label in enumerate(labels) if label != -100)
        assert labels[last] == ids[last] == end and end not in ids[last + 1 :]


def test_the_loss_worked_by_hand(base, batch, tmp_path):
    """The loss of a trained adapter, from likelihoods that are computed here one row at a time."""
    trainer = train_dpo(
        base, write_pairs(tmp_path / "a", 4), tmp_path / "out", *LORA, *FAST, "--dpo_beta", "0.3"
    )
    model = trainer.model.eval()
    plain = InternLMXComposer2ForCausalLM.from_pretrained(base, dtype="float32").eval()

    def likelihood(of, row):
        pictures = {name: batch[name] for name in ("pixel_values", "image_grid_hw")} if row > 1 else {}
        if pictures:  # the two rows of the second pair have a picture each
            tiles = len(batch["pixel_values"]) // 2
            pictures["pixel_values"] = batch["pixel_values"][(row - 2) * tiles :][:tiles]
            pictures["image_grid_hw"] = batch["image_grid_hw"][row - 2 : row - 1]
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row, :length]
        with torch.no_grad():
            logits = of(input_ids=ids, **pictures).logits[0].log_softmax(-1)
        return sum(logits[at - 1, label].item() for at, label in enumerate(labels.tolist()) if label != -100)

    ratios = [likelihood(model, row) - likelihood(plain, row) for row in range(4)]
    gaps = [0.3 * (ratios[at] - ratios[at + 1]) for at in (0, 2)]
    expected = sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 2
    with torch.no_grad():
        assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-4)
    assert pairwise_loss(torch.tensor([gaps[0], 0.0, gaps[1], 0.0])).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags", [LORA, ("--train", "adapter", "--infer_mode", "write")], ids=["lora", "adapter"]
)
def test_training_starts_at_log_2_and_makes_chosen_answers_likelier(base, tmp_path, flags):
    pairs, held_back = write_pairs(tmp_path / "a", 16), write_pairs(tmp_path / "b", 8)
    evaluated = ("--eval_data", str(held_back), "--eval_strategy", "steps", "--eval_steps", "12")
    trainer = train_dpo(base, pairs, tmp_path / "out", *flags, *FAST, *evaluated, "--dpo_beta", "0.5")
    curve = losses(trainer)
    if "adapter" not in flags:  # a published adapter is not new: its own effect counts from the start
        assert curve[0] == pytest.approx(math.log(2), abs=1e-3)
    assert curve[-1] < 0.5 * curve[0]
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluation["eval_accuracy"] == 1.0 and evaluation["eval_margin"] > 0.5


def test_an_adapter_trains_alone_and_is_compared_with_the_model_without_it(base, batch, tmp_path):
    flags = ("--train", "adapter", "--infer_mode", "write", *FAST)
    train_dpo(base, write_pairs(tmp_path / "a", 8), tmp_path / "out", *flags)
    before, after = weights_of(base), weights_of(tmp_path / "out/final")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_dpo" in name for name in changed)
    model = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "out/final", dtype="float32").eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        whole = model(**inputs, infer_mode="write").logits
        with without_adapter(model, "write"):
            compared = model(**inputs, infer_mode="write").logits
        for name, module in model.named_modules():
            if name.endswith("lora_dpo_B"):
                module.weight.zero_()
        alone = model(**inputs, infer_mode="write").logits
    assert torch.allclose(compared, alone, atol=1e-6) and not torch.allclose(whole, compared, atol=1e-3)


def test_a_trained_adapter_merges(base, tmp_path):
    train_dpo(base, write_pairs(tmp_path / "a", 4), tmp_path / "out", *LORA, "--max_steps", "1")
    merge(tmp_path / "out/final", tmp_path / "merged")
    assert InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--train", "full"), "--train full: this command has --train lora and adapter"),
        (("--train", "adapter", "--infer_mode", "web"), "here adapters train in write; use --train lora"),
        ((*LORA, "--packing", "True"), "rows can't be packed"),
        ((*LORA, "--dpo_beta", "0"), "--dpo_beta must be above 0, not 0.0"),
        ((*LORA, "--too_long", "cut"), "can't be cut off"),
    ],
)
def test_what_this_command_does_not_have(base, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train_dpo(base, write_pairs(tmp_path, 2), tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
