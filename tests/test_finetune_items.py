"""Rows as the model gets them: the prompts of `chat`, the losses of the published trainer, packs."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conversations import VIDEO, row_of
from helpers import (
    golden_case,
    golden_directory,
    needs_published_tokenizer,
    prompt_with_pictures,
    random_pictures,
    tiny_model,
    training_cases,
)
from internlm_xcomposer2.embedding_methods_internlm_xcomposer2 import IGNORED
from internlm_xcomposer2.ixc_utils import HD_transform, R560_HD18_Identity_transform
from internlm_xcomposer2.processing_internlm_xcomposer2 import InternLMXComposer2Processor
from internlm_xcomposer2.prompt_internlm_xcomposer2 import META_INSTRUCTION
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import END_OF_TURN
from PIL import Image
from torch.utils.data import DataLoader

from finetune import dataset as dataset_module
from finetune.dataset import Collator, ConversationDataset, RowEncoder, join_items
from finetune.packing import PackedDataset, check_packing, plan_packs
from finetune.rows import Row, RowFault, Turn

VERSIONS = ("2", "2-4khd", "2.5")


@pytest.fixture(scope="module", params=VERSIONS)
def any_model(request, tokenizer):
    """A tiny model of each version. Shared: don't change it."""
    model = tiny_model(request.param, max_position_embeddings=4096)
    model.tokenizer = tokenizer
    return model


def answers_of(item: dict, tokenizer) -> list[str]:
    """The runs of labels as text."""
    runs, current = [], []
    for label in [*item["labels"].tolist(), IGNORED]:
        if label != IGNORED:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current).strip())
            current = []
    return runs


# ---- prompts and pictures as `chat` has them ----


def chat_inputs(model, row: Row, num_turns: int) -> dict:
    """What `chat` sends for the question after `num_turns` answered ones."""
    turns = [turn.text for turn in row.turns if turn.role != "system"]
    history = list(zip(turns[: 2 * num_turns : 2], turns[1 : 2 * num_turns : 2], strict=True))
    default = "" if model.config.version == "2.5" else META_INSTRUCTION
    system = next((turn.text for turn in row.turns if turn.role == "system"), default)
    image = list(row.media)
    return model.prepare_chat(model.tokenizer, turns[2 * num_turns], image, None, history, system)


@pytest.mark.parametrize("case", ["text", "system", "front", "marked", "two"])
def test_prompts_are_those_of_chat(any_model, pictures, case):
    wide, tall = pictures / "wide.png", pictures / "tall.jpg"
    row = {
        "text": row_of("Who are you?", "Nano.", "And now?", "Still nano."),
        "system": row_of("Hi", "Hello!", system="Be brief."),
        "front": row_of("What is it?", "A cat.", "Which?", "A grey one.", media=[wide]),
        "marked": row_of("See <ImageHere> here", "A cat.", "Which?", "A grey one.", media=[tall]),
        "two": row_of("<ImageHere>One", "A", "Two <ImageHere>", "B", media=[wide, tall]),
    }[case]
    version = any_model.config.version
    encoder = RowEncoder(InternLMXComposer2Processor.for_config(any_model.config, any_model.tokenizer))
    if case == "front" and version != "2.5":
        with pytest.raises(RowFault, match="0 <ImageHere> marks but the row has 1 pictures"):
            encoder.encode(row)
        return
    item = encoder.encode(row)
    num_turns = len([turn for turn in row.turns if turn.role == "user"]) - 1
    inputs = chat_inputs(any_model, row, num_turns)
    prompt = inputs["input_ids"][0]
    assert torch.equal(item["input_ids"][: len(prompt)], prompt)
    expected = any_model.tokenizer(f"{row.turns[-1].text}{END_OF_TURN}\n</s>", add_special_tokens=False)[
        "input_ids"
    ]
    assert item["input_ids"][len(prompt) :].tolist() == expected
    assert set(item) == {"input_ids", "labels", *(("pixel_values", "image_grid_hw") if row.media else ())}
    if row.media:
        assert torch.equal(item["pixel_values"], inputs["pixel_values"])
        assert torch.equal(item["image_grid_hw"], inputs["image_grid_hw"])


def test_videos_are_those_of_chat(model, tokenizer, processor):
    row = row_of("Which way does <ImageHere> move?", "Left", media=[VIDEO])
    item = RowEncoder(processor).encode(row)
    model.tokenizer = tokenizer
    inputs = chat_inputs(model, row, 0)
    assert torch.equal(item["input_ids"][: inputs["input_ids"].shape[1]], inputs["input_ids"][0])
    assert torch.equal(item["pixel_values"], inputs["pixel_values"])


@pytest.mark.parametrize("layout", ["inference", "training"])
def test_answers_and_their_end_are_labels(any_model, pictures, layout):
    tokenizer = any_model.tokenizer
    encoder = RowEncoder(InternLMXComposer2Processor.for_config(any_model.config, tokenizer), layout=layout)
    row = row_of("<ImageHere>Hi", "Hello!", "1+1?", "2", "Bye", "Good bye.", media=[pictures / "wide.png"])
    item = encoder.encode(row)
    assert answers_of(item, tokenizer) == [
        f"Hello!{END_OF_TURN}",
        f"2{END_OF_TURN}",
        f"Good bye.{END_OF_TURN}\n</s>",
    ]
    learnt = item["labels"] != IGNORED
    assert torch.equal(item["labels"][learnt], item["input_ids"][learnt])
    assert not (item["input_ids"][learnt] == any_model.config.image_token_id).any()


def test_the_training_layout_has_no_system_text_and_one_bos(any_model):
    processor = InternLMXComposer2Processor.for_config(any_model.config, any_model.tokenizer)
    ids = RowEncoder(processor, layout="training").encode(row_of("Hi", "Hello!"))["input_ids"].tolist()
    assert ids[0] == any_model.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    assert any_model.tokenizer.decode(ids[1:]).strip() == (
        "[UNUSED_TOKEN_146]user\nHi[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]assistant\nHello![UNUSED_TOKEN_145]\n</s>"
    )


# ---- the loss of the published trainer ----


def test_the_training_layout_gives_the_loss_of_samples(any_model, pictures):
    model = any_model
    side, tiled = model.config.img_size, model.config.is_tiled
    processor = InternLMXComposer2Processor.for_config(model.config, model.tokenizer)
    files = [pictures / "wide.png", pictures / "tall.jpg"]
    rows = [
        row_of("<ImageHere>What?", "A cat.", "Sure?", "Yes.", media=files[:1]),
        row_of("<ImageHere>Hm", "Two.", media=files[1:]),
    ]
    data = ConversationDataset(rows, processor, layout="training", hd_num=4)
    with torch.no_grad():
        loss = model(**Collator(model.tokenizer.pad_token_id)([data[0], data[1]])).loss

    def pixels(path: Path) -> torch.Tensor:
        image = Image.open(path)
        if model.config.version == "2.5":
            image = R560_HD18_Identity_transform(image, 4, tile_size=side)
        elif tiled:
            image = HD_transform(image, 4, tile_size=side)
        return model.vis_processor(image)[None]

    texts = [data.encoder.prompt(row) for row in rows]
    samples = {"text_input": [texts], "data_type": ["multi"], "image": [[[pixels(path)] for path in files]]}
    with torch.no_grad():
        expected = model(samples=samples).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def rows_of_case(case: dict) -> list[Row]:
    """A recorded batch of the published trainer as rows."""
    texts = np.array(case["text_input"]).flatten().tolist()
    names = case["images"] or [[] for _ in texts]
    rows = []
    for text, images in zip(texts, names, strict=True):
        parts = [part.partition("\n") for part in text.split("[UNUSED_TOKEN_146]")[1:]]
        turns = tuple(Turn(role, body.split(END_OF_TURN)[0]) for role, _, body in parts)
        images = [images] if isinstance(images, str) else images
        files = [str(golden_directory() / "inputs" / f"{name.partition('@')[0]}.png") for name in images]
        rows.append(Row(Path("case.json"), len(rows), turns, tuple(files)))
    return rows


@pytest.mark.slow
@needs_published_tokenizer
@pytest.mark.parametrize(("family", "name"), training_cases())
def test_the_loss_of_the_original_trainer(family, name, family_model, published):
    case, tensors = golden_case(family, name)
    model = family_model(family)
    processor = InternLMXComposer2Processor.for_config(model.config, published)
    # The pictures of this 2.5 batch were recorded with the padding of inference, prompts being the same.
    layout = "inference" if family == "2d5" else "training"
    data = ConversationDataset(rows_of_case(case), processor, layout=layout, hd_num=4)
    batch = Collator(published.pad_token_id)([data[0], data[1]])
    for got in ("labels", "attention_mask"):
        assert torch.equal(batch[got].int(), tensors[got].int()), got
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(case["loss"], rel=1e-6)


# ---- the dataset ----


def test_nothing_is_opened_before_it_is_requested(processor, pictures):
    rows = [row_of("<ImageHere>A", "B", media=[pictures / name]) for name in ("none.png", "wide.png")]
    data = ConversationDataset(rows, processor)
    assert len(data) == 2 and data[1]["image_grid_hw"].shape == (1, 2)
    with pytest.raises(RowFault, match="data.json, row 0: no such file: .*none.png"):
        data[0]


def test_worker_processes_give_the_same(processor, pictures, tokenizer):
    names = ["wide.png", "tall.jpg", "wide.png"]
    rows = [row_of("<ImageHere>A", f"B {name}", media=[pictures / name]) for name in names]
    data = ConversationDataset([*rows, row_of("Hi", "Hello")], processor, hd_num=4)
    loader = DataLoader(data, 2, collate_fn=Collator(tokenizer.pad_token_id), num_workers=2)
    copy = pickle.loads(pickle.dumps(data))  # as if processes were spawned
    direct = [Collator(tokenizer.pad_token_id)([copy[i], copy[i + 1]]) for i in (0, 2)]
    for batch, expected in zip(loader, direct, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_worker_reports_the_fault(processor):
    data = ConversationDataset([row_of("Hi", " ")], processor)
    data.rows = [Row(Path("data.json"), 7, data.rows[0].turns, (), faults=("turn 1 is odd",))]
    with pytest.raises(RowFault, match="data.json, row 7: turn 1 is odd"):
        next(iter(DataLoader(data, num_workers=1)))


def test_lengths_are_counted_without_decoding(any_model, pictures, monkeypatch):
    turned = Image.open(pictures / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(pictures / "turned.jpg", exif=exif)
    names = ["wide.png", "tall.jpg", "turned.jpg", *([VIDEO] if any_model.config.version == "2.5" else [])]
    rows = [row_of("See <ImageHere>", "B" * i, media=[pictures / name]) for i, name in enumerate(names, 1)]
    rows += [row_of("Hi", "Hello"), rows[0]]
    processor = InternLMXComposer2Processor.for_config(any_model.config, any_model.tokenizer)
    data = ConversationDataset(rows, processor, hd_num=4)
    expected = [len(data[i]["input_ids"]) for i in range(len(data))]

    def refuse(*args, **kwargs):
        raise AssertionError("a picture is decoded")

    monkeypatch.setattr(dataset_module, "load_image", refuse)
    monkeypatch.setattr(dataset_module, "video_visual", refuse)
    assert data.lengths == expected
    assert len(set(expected[:3])) > 1 or not any_model.config.is_tiled


def test_pixels_in_the_dtype_of_the_tower_change_nothing(model, processor, pictures):
    rows = [row_of("<ImageHere>A", "B", media=[pictures / "wide.png"])]
    wanted = ConversationDataset(rows, processor)[0]["pixel_values"]
    pixels = ConversationDataset(rows, processor, pixel_dtype=torch.bfloat16)[0]["pixel_values"]
    assert pixels.dtype == torch.bfloat16 and torch.equal(pixels, wanted.bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "published"}, "layout must be 'inference' or 'training'"),
        ({"too_long": "drop"}, "too_long must be 'error' or 'cut'"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"hd_num": 0}, "hd_num must be at least 1"),
    ],
)
def test_invalid_settings(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        ConversationDataset([row_of("Hi", "Hello")], processor, **settings)
    with pytest.raises(ValueError, match="no rows"):
        ConversationDataset([], processor)


# ---- batches ----


def test_batches_are_padded_right(processor, pictures, tokenizer):
    rows = [row_of("Hi", "Hello"), row_of("<ImageHere>A", "B", media=[pictures / "wide.png"])]
    items = [ConversationDataset(rows, processor)[i] for i in range(2)]
    batch = Collator(tokenizer.pad_token_id, pad_to_multiple_of=64)(items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] % 64 == 0
    for index, item in enumerate(items):
        length = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][index, :length], item["input_ids"])
        assert batch["attention_mask"][index].sum() == length == batch["attention_mask"][index, :length].sum()
        assert (batch["labels"][index, length:] == IGNORED).all()
    assert torch.equal(batch["pixel_values"], items[1]["pixel_values"])
    text = Collator(tokenizer.pad_token_id)([items[0]])
    assert set(text) == {"input_ids", "attention_mask", "labels"}


# ---- packing ----


def items_of(model, seeds: int = 4) -> list[dict]:
    """Items with random ids, every other one with a picture, of different lengths."""
    items = []
    for seed in range(seeds):
        grids = [(1, 1)] if seed % 2 == 0 else []
        ids = torch.tensor(prompt_with_pictures(model, grids, seed) + [9] * 11 * seed)
        labels = ids.masked_fill(ids == model.config.image_token_id, IGNORED)
        labels[: 2 + seed] = IGNORED
        item = {"input_ids": ids, "labels": labels}
        if grids:
            item["pixel_values"], item["image_grid_hw"] = random_pictures(model, grids, seed)
        items.append(item)
    return items


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rope", [None, {"type": "dynamic", "factor": 2.0}])
def test_packed_rows_are_as_if_alone(attention, rope):
    model = tiny_model("2.5", rope_scaling=rope)
    model.set_attn_implementation(attention)
    items = items_of(model)
    # A pack of packs, like a batch of packed items.
    batch = Collator(0)([join_items(items[:2]), join_items(items[2:])])
    assert batch["input_ids"].shape == (1, sum(len(item["input_ids"]) for item in items))
    assert "attention_mask" not in batch
    packed = model(**batch)
    together = model(**Collator(0)(items))
    alone = [model(**Collator(0)([item])) for item in items]
    torch.testing.assert_close(packed.loss, together.loss, rtol=0, atol=1e-5)
    logits = torch.cat([output.logits[0] for output in alone])
    torch.testing.assert_close(packed.logits[0], logits, rtol=0, atol=1e-5)
    start = 0
    for item, output in zip(items, alone, strict=True):
        stop = start + len(item["input_ids"])
        targets = item["labels"][1:]
        loss = torch.nn.functional.cross_entropy(packed.logits[0, start : stop - 1], targets)
        torch.testing.assert_close(loss, output.loss, rtol=0, atol=1e-5)
        start = stop


def test_packed_rows_have_the_gradients_of_a_batch():
    model = tiny_model("2.5")
    items = items_of(model)
    gradients = []
    for batch in (Collator(0)([join_items(items)]), Collator(0)(items)):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_packs_fill_sequences():
    lengths = [random.Random(0).randrange(1, 90) for _ in range(200)]
    packs = plan_packs(lengths, 100)
    assert sorted(index for pack in packs for index in pack) == list(range(200))
    assert all(sum(lengths[index] for index in pack) <= 100 for pack in packs)
    assert len(packs) <= 1.1 * sum(lengths) / 100
    with pytest.raises(ValueError, match="row 1 has 101 tokens, but a pack holds 100"):
        plan_packs([5, 101], 100)


def test_a_packed_dataset(model, processor, pictures, tokenizer):
    rows = [row_of("<ImageHere>A", "B", media=[pictures / "wide.png"])]
    rows += [row_of("Hi", f"Hello {i}") for i in range(6)]
    data = ConversationDataset(rows, processor, max_length=150, hd_num=1)
    packed = PackedDataset(data, model.config)
    assert len(packed) < len(data) and sum(packed.lengths) == sum(data.lengths)
    item = packed[0]
    assert len(item["input_ids"]) == len(item["position_ids"]) == packed.lengths[0] <= 150
    starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(packed.packs[0])
    assert (item["labels"][starts] == IGNORED).all()  # so that no row predicts the next one's start
    loader = DataLoader(packed, 2, collate_fn=Collator(tokenizer.pad_token_id))
    losses = [model(**batch).loss for batch in loader]
    assert all(torch.isfinite(loss) for loss in losses)
    with pytest.raises(ValueError, match="packing needs max_length"):
        PackedDataset(ConversationDataset(rows, processor), model.config)


def test_packing_is_rejected_if_it_would_not_be_exact():
    config = tiny_model("2.5", rope_scaling={"type": "dynamic", "factor": 2.0}).config
    check_packing(config, config.text_config.max_position_embeddings)
    with pytest.raises(
        ValueError, match="packs of 1025 tokens can't be exact: .* 'dynamic' .* max_length=1024"
    ):
        check_packing(config, 1025)
    check_packing(tiny_model("2.5").config, 10_000)
