"""The whole model: two kinds of input, batches, every kind of generation."""

import pytest
import torch
from helpers import prompt_with_pictures, random_pictures, tiny_model
from transformers import TextIteratorStreamer, TextStreamer

LAYOUTS = {"2": [(1, 1), (1, 1)], "2-4khd": [(1, 2), (2, 1)], "2.5": [(2, 2), (1, 1)]}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 2}


def pictures_and_ids(model, grids, seed=0):
    pixel_values, image_grid_hw = random_pictures(model, grids, seed)
    ids = torch.tensor([prompt_with_pictures(model, grids, seed)])
    return {"input_ids": ids, "pixel_values": pixel_values, "image_grid_hw": image_grid_hw}


def padded_batch(model, rows, side):
    """Rows of different pictures in one batch -> `forward`'s inputs, and where each row's tokens are."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    width = max(lengths)
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    places = [slice(width - n, None) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row["input_ids"][0], 1
    with_pictures = [row for row in rows if "pixel_values" in row]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([row["pixel_values"] for row in with_pictures]),
        "image_grid_hw": torch.cat([row["image_grid_hw"] for row in with_pictures]),
    }
    return inputs, places


def mixed_rows(model):
    text_only = {"input_ids": torch.tensor([[1, 50, 51, 52, 53]])}
    return [
        pictures_and_ids(model, LAYOUTS[model.config.version], seed=1),
        text_only,
        pictures_and_ids(model, LAYOUTS[model.config.version][:1], seed=2),
    ]


@torch.no_grad()
@pytest.mark.parametrize("version", LAYOUTS)
def test_both_kinds_of_input_give_the_same_logits(version):
    model = tiny_model(version)
    inputs = pictures_and_ids(model, LAYOUTS[version])
    by_ids = model(**inputs).logits
    features = torch.cat(
        model.get_image_features(inputs["pixel_values"], inputs["image_grid_hw"]).pooler_output
    )
    mask = inputs["input_ids"] == model.config.image_token_id
    embeds = model.model.tok_embeddings(inputs["input_ids"])
    embeds[mask] = features
    torch.testing.assert_close(model(inputs_embeds=embeds, im_mask=mask.float()).logits, by_ids)
    assert (model(inputs_embeds=embeds).logits - by_ids).abs().max() > 1e-3  # the mask matters


@torch.no_grad()
@pytest.mark.parametrize("version", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_each_row_gives(version, side):
    model = tiny_model(version)
    rows = mixed_rows(model)
    inputs, places = padded_batch(model, rows, side)
    batch = model(**inputs).logits
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        torch.testing.assert_close(batch[i, place], model(**row).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_more_tiles_than_one_batch_of_the_tower(monkeypatch):
    model = tiny_model("2.5")
    inputs = pictures_and_ids(model, [(2, 3), (1, 2)])
    whole = model(**inputs).logits
    monkeypatch.setitem(type(model.vit).encode_tiles.__globals__, "MAX_TILES_PER_BATCH", 3)
    torch.testing.assert_close(model(**inputs).logits, whole)


@torch.no_grad()
def test_logits_to_keep_and_loss():
    model = tiny_model("2.5")
    inputs = pictures_and_ids(model, [(1, 2)])
    full = model(**inputs)
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, full.logits[:, -1:])
    positions = torch.tensor([0, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, full.logits[:, positions])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    expected = torch.nn.functional.cross_entropy(full.logits[0, -5:-1], labels[0, -4:])
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    assert isinstance(model(**inputs, return_dict=False), tuple)


def greedy_without_cache(model, inputs, steps):
    ids = inputs["input_ids"]
    for _ in range(steps):
        logits = model(**{**inputs, "input_ids": ids, "use_cache": False}).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("version", LAYOUTS)
def test_greedy_generation_equals_decoding_without_a_cache(version):
    model = tiny_model(version)
    inputs = pictures_and_ids(model, LAYOUTS[version])
    expected = greedy_without_cache(model, inputs, 6)
    found = model.generate(**inputs, **{**GREEDY, "eos_token_id": None})
    assert torch.equal(found, expected)
    assert torch.equal(model.generate(**inputs, **{**GREEDY, "eos_token_id": None}, use_cache=True), expected)
    static = model.generate(**inputs, **{**GREEDY, "eos_token_id": None}, cache_implementation="static")
    assert torch.equal(static, expected)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_padded_batch_generates_what_each_row_generates(num_beams):
    model = tiny_model("2.5")
    rows = mixed_rows(model)
    inputs, _ = padded_batch(model, rows, "left")
    settings = {**GREEDY, "num_beams": num_beams}
    batch = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for i, row in enumerate(rows):
        alone = model.generate(**row, **settings)[0, row["input_ids"].shape[1] :]
        assert batch[i, : len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_pictures_are_encoded_once_regardless_of_beams():
    model = tiny_model("2.5")
    calls = []
    handle = model.vit.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    inputs = pictures_and_ids(model, [(1, 2)])
    sequences = model.generate(**inputs, **{**GREEDY, "num_beams": 3, "num_return_sequences": 2})
    handle.remove()
    assert len(calls) == 1 and len(sequences) == 2


@torch.no_grad()
def test_sampling_follows_the_seed():
    model = tiny_model("2.5")
    inputs = pictures_and_ids(model, [(1, 1)])
    settings = {**GREEDY, "do_sample": True, "temperature": 1.5}
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, **settings).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@torch.no_grad()
def test_assisted_generation_gives_the_greedy_answer():
    model, assistant = tiny_model("2.5"), tiny_model("2.5", seed=5)
    inputs = pictures_and_ids(model, [(1, 1)])
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant), expected)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -4:]], dim=1)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2), expected)
    text = {"input_ids": torch.tensor([[1, 50, 51, 52, 53]])}
    expected = model.generate(**text, **GREEDY)
    assert torch.equal(model.generate(**text, **GREEDY, assistant_model=assistant), expected)


@torch.no_grad()
def test_the_loss_is_divided_by_the_trainers_count():
    model = tiny_model("2.5")
    ids = torch.tensor([[1, 50, 51, 52, 53]])
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=8).loss, mean * 4 / 8)


@torch.no_grad()
def test_embeddings_alone_give_sequences_that_begin_with_bos():
    model = tiny_model("2.5")
    inputs = pictures_and_ids(model, [(1, 1)])
    embeds, mask = model.embed_inputs(**inputs)
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    for kind in (torch.float32, torch.long, torch.bool):
        found = model.generate(inputs_embeds=embeds, im_mask=mask.to(kind), **GREEDY)
        assert found[0].tolist() == [1, *expected]
    settings = {key: value for key, value in GREEDY.items() if key != "max_new_tokens"}
    found = model.generate(inputs_embeds=embeds, im_mask=mask, max_length=4, **settings)
    assert found[0].tolist() == [1, *expected[:3]]  # the old max_length: BOS and new tokens


@torch.no_grad()
def test_works_under_autocast_and_in_half_precision():
    model = tiny_model("2.5")
    inputs = pictures_and_ids(model, [(1, 2)])
    expected = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**inputs).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.25)
    half = tiny_model("2.5").to(torch.bfloat16)
    torch.testing.assert_close(half(**inputs).logits.float(), expected, rtol=0.1, atol=0.25)
    assert half.generate(**inputs, **GREEDY).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_weights_of_one_half_type_work_under_autocast_to_the_other(version):
    """As in the published model cards: bfloat16 weights, autocast to float16."""
    model = tiny_model(version)
    inputs = pictures_and_ids(model, [(1, 2)] if version == "2.5" else [(1, 1)])
    expected = model.to(torch.bfloat16)(**inputs).logits
    with torch.autocast("cpu", dtype=torch.float16):
        found = model(**inputs).logits
        answer = model.generate(**inputs, **GREEDY)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(answer, model.generate(**inputs, **GREEDY))


def test_a_generated_image_token_is_not_a_picture():
    model = tiny_model("2.5")
    token = model.config.image_token_id
    bias = {"sequence_bias": {(token,): 100.0}}
    found = model.generate(torch.tensor([[1, 50]]), **{**GREEDY, "max_new_tokens": 3}, **bias)
    assert found[0, 2:].tolist() == [token] * 3


class _Recorder(TextStreamer):
    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.pieces.append("end")


def test_streaming_by_embeddings_shows_every_token():
    model, recorder = tiny_model("2.5"), _Recorder()
    embeds, mask = model.embed_inputs(**pictures_and_ids(model, [(1, 1)]))
    found = model.generate(inputs_embeds=embeds, im_mask=mask, streamer=recorder, **GREEDY)
    assert recorder.pieces[0] == [[1]] and recorder.pieces[-1] == "end"
    assert sum(recorder.pieces[1:-1], []) == found[0, 1:].tolist()
    assert issubclass(TextIteratorStreamer, TextStreamer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_values": None}, "reserves 13 image tokens but no pixel_values"),
        ({"image_grid_hw": torch.tensor([[1, 2]])}, "stands for 3 tiles.*hold 2"),
        ({"image_grid_hw": torch.tensor([[0, 1]])}, "stands for"),
        ({"image_grid_hw": None}, "image_grid_hw is needed"),
        ({"image_grid_hw": torch.tensor([1, 1])}, r"shape \(2,\).*pictures, 2"),
        ({"image_grid_hw": torch.tensor([[1, 1, 1]])}, r"shape \(1, 3\).*pictures, 2"),
        ({"pixel_values": torch.zeros(2, 3, 28, 28)}, r"\(2, 3, 28, 28\).*56"),
        ({"input_ids": torch.tensor([[1, 4, 4, 9]])}, "reserves 2 image tokens but 1 pictures give 13"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_pictures_that_do_not_fit_are_named_before_any_compute(change, words, call):
    model = tiny_model("2.5")
    inputs = {**pictures_and_ids(model, [(1, 1)]), **change}
    model.vit.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    with pytest.raises(ValueError, match=words):
        getattr(model, call)(**inputs)


def test_a_small_model_builds_in_under_a_second_without_weights():
    with torch.device("meta"):
        model = tiny_model("2.5", vision_config=None)
    assert model.output.weight.is_meta
