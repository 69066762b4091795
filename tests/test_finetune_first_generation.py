"""Fine-tuning the first generation: how rows are laid out, what trains, and what the result can do."""

import json

import pytest
import torch
from finetune_helpers import FAST, LORA, losses, run, write_rows
from first_generation import (
    golden,
    needs_first_tokenizer,
    picture,
    tiny_first,
    write_first,
)
from internlm_xcomposer2 import InternLMXComposer2Processor, InternLMXComposerForCausalLM
from internlm_xcomposer2.configuration_internlm_xcomposer import published_name
from internlm_xcomposer2.prompt_internlm_xcomposer2 import FIRST_META_INSTRUCTION
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import check_data, train, train_dpo, train_reward
from finetune.arguments import FIRST_LORA_TARGETS
from finetune.dataset import Collator, ConversationDataset, RowEncoder
from finetune.lora import target_modules
from finetune.merge import merge
from finetune.rows import RowFault, read_rows
from finetune.saving import save_model

IGNORED = -100
LOW_RANK = {"lora_r": 4, "lora_alpha": 4, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint with low-rank weights of its own, complete."""
    model = tiny_first(internlm_lora=LOW_RANK, max_position_embeddings=2048)
    queries = model.config.qformer_config
    queries.hidden_dropout_prob = queries.attention_probs_dropout_prob = 0.0
    directory = tmp_path_factory.mktemp("base") / "model"
    save_model(model, model.tokenizer, "", directory)
    return directory


@pytest.fixture(scope="module")
def processor(base) -> InternLMXComposer2Processor:
    return InternLMXComposer2Processor.from_pretrained(base)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def row_of(tmp_path, turns: list[tuple[str, str]], *pictures: str):
    """A row with turns of (role, text)."""
    conversation = [{"from": role, "value": text} for role, text in turns]
    entry = {"id": "0", "conversations": conversation, **({"image": list(pictures)} if pictures else {})}
    path = tmp_path / "row.json"
    path.write_text(json.dumps([entry]))
    return read_rows(path)[0]


def said(tokenizer, ids, labels) -> str:
    """What is trained of a row."""
    ids = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return tokenizer.decode(ids, skip_special_tokens=True)


def load(directory, **kwargs) -> InternLMXComposerForCausalLM:
    return InternLMXComposerForCausalLM.from_pretrained(directory, dtype="float32", **kwargs).eval()


# ---- how rows are laid out ----


@needs_first_tokenizer
@pytest.mark.parametrize("name", ["train_image", "train_text"])
def test_rows_laid_out_for_training_give_the_published_losses_and_gradients(tmp_path, name):
    case, tensors = golden(name)
    checkpoint = write_first(tmp_path / "checkpoint")
    parsed = []
    for index, text in enumerate(case["text_input"]):
        parts = text.replace(" <|User|>:", "\0user\0").replace("\n <|Bot|>:", "\0bot\0").replace("\n\0", "\0")
        names = parts.split("\0")[1:]
        turns = [
            (role, said.replace("<image>", "<ImageHere>"))
            for role, said in zip(names[::2], names[1::2], strict=True)
        ]
        pictures = [picture(case["images"][index])] if case["images"] else []
        parsed.append(row_of(tmp_path, turns, *pictures))
    processor = InternLMXComposer2Processor.from_pretrained(checkpoint)
    dataset = ConversationDataset(parsed, processor, layout="training")
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(len(parsed))])
    assert torch.equal(batch["labels"], tensors["labels"])
    assert batch["attention_mask"].sum(-1).tolist() == case["attention_mask_sum"]
    model = load(checkpoint, fold_low_rank=False)
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(case["loss"], abs=2e-5)
    loss.backward()
    norms = {
        published_name(n): p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None
    }
    for key, norm in case["grad_norms"].items():
        if norm is not None and not key.endswith(("q_bias", "v_bias")):  # they are joined here
            assert norms[key] == pytest.approx(norm, rel=2e-3, abs=1e-5), key


@pytest.mark.parametrize("mark", ["", "<ImageHere>"])
def test_rows_are_laid_out_as_in_chat(tmp_path, processor, base, mark):
    Image.new("RGB", (50, 30), "red").save(tmp_path / "a.png")
    row = row_of(tmp_path, [("user", f"{mark}what"), ("assistant", "one")], "a.png")
    plan = RowEncoder(processor).plan(row)
    model, planned = load(base), []
    model.tokenizer = processor.tokenizer
    model._answer = lambda prompts, *args, **kwargs: (planned.extend(prompts) or [[2]], None)
    model.chat("what", str(tmp_path / "a.png"), max_new_tokens=4)
    prompt = planned[0].ids
    assert plan.ids[: len(prompt)] == prompt
    assert set(plan.labels[: len(prompt)]) == {IGNORED}
    assert plan.labels[len(prompt) :] == plan.ids[len(prompt) :]
    assert plan.ids[-1] == processor.tokenizer.eos_token_id
    assert said(processor.tokenizer, plan.ids, plan.labels) == "one<TOKENS_UNUSED_1>"


@pytest.mark.parametrize("layout", ["inference", "training"])
def test_every_answer_is_trained_with_its_end(tmp_path, processor, layout):
    turns = [("user", "ask"), ("assistant", "one"), ("user", "again"), ("assistant", "two")]
    plan = RowEncoder(processor, layout=layout).plan(row_of(tmp_path, turns))
    text = said(processor.tokenizer, plan.ids, plan.labels)
    if layout == "training":  # as in the published trainer, which ends turns with lines
        assert text == " one\n<TOKENS_UNUSED_1> two<TOKENS_UNUSED_1>"
    else:
        assert text == "one<TOKENS_UNUSED_1>two<TOKENS_UNUSED_1>"
    assert plan.labels[-1] == plan.ids[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("layout", ["inference", "training"])
def test_a_system_text_goes_first(tmp_path, processor, layout):
    turns = [("system", "be kind"), ("user", "ask"), ("assistant", "one")]
    plan = RowEncoder(processor, layout=layout).plan(row_of(tmp_path, turns))
    text = processor.tokenizer.decode(plan.ids)
    assert "meta instruction\nbe kind\nconversation\n <|User|>:" in text
    default = RowEncoder(processor, layout=layout).plan(row_of(tmp_path, turns[1:]))
    has_default = FIRST_META_INSTRUCTION in processor.tokenizer.decode(default.ids)
    assert has_default == (layout == "inference")


@pytest.mark.parametrize("layout", ["inference", "training"])
def test_pictures_stand_at_their_marks(tmp_path, processor, layout):
    for name in "ab":
        Image.new("RGB", (50, 30), "red").save(tmp_path / f"{name}.png")
    turns = [("user", "see <ImageHere>"), ("assistant", "one"), ("user", "<ImageHere> too"), ("bot", "two")]
    plan = RowEncoder(processor, layout=layout).plan(row_of(tmp_path, turns, "a.png", "b.png"))
    assert plan.ids[0] == 1 and plan.ids.count(1) == 1
    size = processor.image_processor.num_image_tokens(1, 1)
    places = [i for i, token in enumerate(plan.ids) if token == processor.image_token_id]
    assert len(places) == 2 * size
    before = processor.tokenizer.decode(plan.ids[: places[0]])
    between = processor.tokenizer.decode(plan.ids[places[size - 1] + 1 : places[size]])
    assert before.endswith("see ") and "one" in between and between.rstrip().endswith("<|User|>:")
    assert all(plan.labels[place] == IGNORED for place in places)


@pytest.mark.parametrize("piece", ["<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>", "<|User|>", "<|Bot|>", "</s>"])
def test_markup_in_a_text_is_a_fault(tmp_path, processor, piece):
    row = row_of(tmp_path, [("user", f"ask {piece}: now"), ("assistant", "one")])
    with pytest.raises(RowFault, match="turn 0 contains the markup"):
        RowEncoder(processor).plan(row)


def test_a_long_row_is_a_fault_or_is_cut(tmp_path, processor):
    row = row_of(tmp_path, [("user", "ask"), ("assistant", "one " * 40)])
    whole = RowEncoder(processor, layout="training").plan(row)
    limit = len(whole.ids) - 20
    with pytest.raises(RowFault, match=f"max_length is {limit}"):
        RowEncoder(processor, limit, layout="training").plan(row)
    cut = RowEncoder(processor, limit, layout="training", too_long="cut").plan(row)
    assert cut.ids == whole.ids[:limit] and cut.labels == whole.labels[:limit] and cut.num_cut == 20


def test_the_check_reads_rows_as_training_does(base, rows, tmp_path, capsys):
    assert check_data.main([str(rows), "--model", str(base), "--workers", "1"]) == 0
    bad = tmp_path / "bad.json"
    turns = [{"from": "user", "value": "<|Bot|>"}, {"from": "bot", "value": "one"}]
    bad.write_text(json.dumps([{"id": "0", "conversations": turns}]))
    assert check_data.main([str(bad), "--model", str(base), "--workers", "1"]) == 1
    assert "turn 0 contains the markup <|Bot|>" in capsys.readouterr().out


# ---- what trains ----


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def answers(directory) -> str:
    """What a finished checkpoint says, loaded as a stranger would load it."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    return model.chat("what is 0", Image.new("RGB", (60, 40), (0, 99, 0)), num_beams=1, max_new_tokens=8)[0]


@pytest.mark.slow
@pytest.mark.parametrize("fix_vit", [True, False])
def test_full_training_saves_a_checkpoint_that_answers(base, rows, tmp_path, fix_vit):
    flags = ("--fix_vit", str(fix_vit), "--gradient_checkpointing", "True", "--max_steps", "8")
    trainer = run(base, rows, tmp_path, *FAST, *flags)
    assert losses(trainer)[-1] < losses(trainer)[0]
    before, after = load(base).state_dict(), load(tmp_path / "final").state_dict()
    parts = {name.split(".")[0] for name in changed(before, after)}
    tower = set() if fix_vit else {"visual_encoder", "ln_vision"}
    assert parts == {"internlm_model", "Qformer", "internlm_proj", "query_tokens"} | tower
    assert isinstance(answers(tmp_path / "final"), str)


@pytest.mark.slow
def test_only_the_low_rank_weights_of_the_checkpoint_train(base, rows, tmp_path):
    trainer = run(base, rows, tmp_path, *FAST, "--train", "plora")
    assert losses(trainer)[-1] < losses(trainer)[0]
    before = load(base, fold_low_rank=False).state_dict()
    after = load(tmp_path / "final", fold_low_rank=False).state_dict()
    names = changed(before, after)
    assert names and all(".low_rank_" in name for name in names)
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert any(name.endswith("q_proj.lora_A.weight") for name in stored)
    assert isinstance(answers(tmp_path / "final"), str)


@pytest.mark.slow
@pytest.mark.parametrize("fix_sampler", [True, False])
def test_lora_is_merged_into_a_checkpoint_that_answers(base, rows, tmp_path, fix_sampler):
    trainer = run(base, rows, tmp_path, *LORA, *FAST, "--fix_sampler", str(fix_sampler))
    assert losses(trainer)[-1] < losses(trainer)[0]
    card = (tmp_path / "final" / "README.md").read_text()
    assert all(name in card for name in FIRST_LORA_TARGETS)
    merged = merge(tmp_path / "final", tmp_path / "merged")
    ids = torch.arange(290, 310)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            load(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=0, atol=1e-4
        )
    names = changed(load(base).state_dict(), load(tmp_path / "merged").state_dict())
    parts = {name.split(".")[0] for name in names}
    assert parts == {"internlm_model"} | (set() if fix_sampler else {"internlm_proj", "Qformer"})
    assert isinstance(answers(tmp_path / "merged"), str)


@pytest.mark.slow
def test_a_run_that_is_resumed_has_the_losses_of_one_without_a_break(base, rows, tmp_path):
    whole = run(base, rows, tmp_path / "whole", *FAST)
    run(base, rows, tmp_path / "parts", *FAST, "--save_steps", "2", "--max_steps", "2")
    (tmp_path / "parts" / "final").rename(tmp_path / "half")
    resumed = run(base, rows, tmp_path / "parts", *FAST, "--resume_from_checkpoint", "True")
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-5)


@pytest.mark.slow
def test_packed_rows_have_the_losses_of_single_ones(base, rows, tmp_path):
    flags = (
        "--max_steps",
        "1",
        "--packing",
        "True",
        "--max_length",
        "2048",
        "--per_device_train_batch_size",
        "8",
    )
    packed = run(base, rows, tmp_path / "packed", *flags)
    single = run(base, rows, tmp_path / "single", "--max_steps", "1", "--per_device_train_batch_size", "8")
    assert losses(packed) == pytest.approx(losses(single), rel=1e-5)


@pytest.mark.slow
def test_preferences_train_with_lora(base, tmp_path):
    pairs = [{"prompt": f"what is {i}", "chosen": "one one", "rejected": "two"} for i in range(4)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs))
    named = (
        "--model_name_or_path",
        str(base),
        "--data_path",
        str(path),
        "--output_dir",
        str(tmp_path / "out"),
    )
    always = ("--use_cpu", "True", "--logging_steps", "1", "--report_to", "none", "--max_steps", "4")
    trainer = train.train(*train.parse_arguments([*named, *always, *LORA, *FAST]), train_dpo.DPO)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_what_the_first_generation_cannot_train_is_refused(base, rows, tmp_path):
    named = ("--model_name_or_path", str(base), "--data_path", str(rows), "--output_dir", str(tmp_path))
    arguments = train.parse_arguments([*named, "--use_cpu", "True", "--report_to", "none"])
    with pytest.raises(ValueError, match=r"version 1.0 has no text-classification model to train"):
        train.train(*arguments, train_reward.REWARD)
    with pytest.raises(ValueError, match="--train adapter finds no weights to train in this checkpoint"):
        run(base, rows, tmp_path / "a", "--train", "adapter", "--infer_mode", "write")
    with pytest.raises(ValueError, match=r"accepts self_attn.q_proj, .*not attention.wqkv"):
        run(base, rows, tmp_path / "b", *LORA, "--lora_target_modules", "attention.wqkv")
    assert target_modules(["q_proj", "mlp.up_proj"], "1.0") == ["self_attn.q_proj", "mlp.up_proj"]
