"""Methods on embeddings: text, pictures, chat prompts, labels, and the batches of the published trainers."""

import random

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    golden_case,
    golden_directory,
    needs_published_tokenizer,
    random_pictures,
    tiny_model,
    training_cases,
)
from internlm_xcomposer2 import InternLMXComposer2Tokenizer, modeling_internlm_xcomposer2
from internlm_xcomposer2.embedding_methods_internlm_xcomposer2 import find_answers, group_pictures
from internlm_xcomposer2.ixc_utils import HD_transform, Image_transform, get_font
from PIL import Image

VERSIONS = ("2", "2-4khd", "2.5")
USER, ANSWER, END = "[UNUSED_TOKEN_146]user\n", "[UNUSED_TOKEN_146]assistant\n", "[UNUSED_TOKEN_145]\n"


@pytest.fixture(scope="module")
def tokenizer() -> InternLMXComposer2Tokenizer:
    """The small vocabulary in the repository's root."""
    return InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))


@pytest.fixture(scope="module", params=VERSIONS)
def model(request, tokenizer):
    """A tiny model of each version. Shared: don't change it."""
    model = tiny_model(request.param)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def tiled_model(tokenizer):
    """A tiny model of version 2.5. Shared: don't change it."""
    model = tiny_model("2.5")
    model.tokenizer = tokenizer
    return model


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(model, rows: int = 1, cols: int = 1, seed: int = 0) -> torch.Tensor:
    """(1, 3, height, width) normalised pixels that the tower reads as `rows` x `cols` tiles."""
    side = model.config.img_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, rows * side, cols * side, generator=generator)


def wide(model) -> torch.Tensor:
    return pixels(model, 1, 2) if model.config.is_tiled else pixels(model)


# --- text ---


def test_text_of_any_length_becomes_embeddings(model, tokenizer):
    table = model.model.tok_embeddings.weight
    assert torch.equal(model.encode_text("", add_special_tokens=True), table[[tokenizer.bos_token_id]][None])
    empty = model.encode_text("")
    assert (empty.shape, empty.dtype) == ((1, 0, table.shape[1]), table.dtype)
    ids = tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    assert torch.equal(model.encode_text("What is it?"), table[ids][None])
    assert model.encode_text("What is it?", add_special_tokens=True).shape[1] == len(ids) + 1
    with pytest.raises(TypeError, match="text must be a str, not int"):
        model.encode_text(5)


def test_a_model_without_tokenizer_says_so():
    with pytest.raises(ValueError, match="model.tokenizer"):
        tiny_model("2").encode_text("Hi")


def test_text2emb_accepts_the_keyword_of_either_generation(model, tokenizer):
    texts = [f"{USER}Hi{END}{ANSWER}Hello{END}</s>", f"{USER}Hi{END}{ANSWER}Yes, hello{END}</s>"]
    old, labels = model.text2emb(texts, add_special=True)
    new, same = model.text2emb(texts, add_special_tokens=True)
    assert torch.equal(old.input_ids, new.input_ids) and torch.equal(labels, same)
    assert old.input_ids[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert (labels[old.attention_mask == 0] == -100).all() and not old.attention_mask[0, -1]
    without, _ = model.text2emb(texts)
    assert without.input_ids.shape[1] == old.input_ids.shape[1] - 1


# --- labels ---


def answers_of(model, text: str, **options) -> list[str]:
    """The runs of ids that count, as text."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    runs, previous = [], -100
    for label in model.mask_human_targets(ids, **options)[0].tolist():
        if label != -100:
            runs = [*runs, [label]] if previous == -100 else [*runs[:-1], [*runs[-1], label]]
        previous = label
    return [model.tokenizer.decode(run).strip(" ") for run in runs]


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        (f"{USER}1{END}{ANSWER}2{END}</s>", [f"2{END}</s>"]),
        (f"{USER}1{END}{ANSWER}2{END}</s></s></s>", [f"2{END}</s>"]),
        (f"{USER}1{END}{ANSWER}2{END}{USER}3{END}{ANSWER}4{END}</s>", ["2[UNUSED_TOKEN_145]", f"4{END}</s>"]),
        (f"[UNUSED_TOKEN_146]system\n0{END}{USER}1{END}{ANSWER}2{END}</s>", [f"2{END}</s>"]),
        (f"{USER}1{END}{ANSWER}2{END}{USER}3{END}", ["2[UNUSED_TOKEN_145]"]),
        (f"{USER}1{END}{ANSWER}2", ["2"]),
        (f"{USER}1{END}{ANSWER}", []),
        (f"{USER}1{END}", []),
        ("no turns</s>", []),
    ],
)
def test_only_answers_count(tiled_model, text, counted):
    assert answers_of(tiled_model, text) == counted


def test_in_plain_text_everything_up_to_the_end_counts(tiled_model):
    assert answers_of(tiled_model, "some words</s></s>", pure=True) == ["<s> some words</s>"]


def test_an_answer_may_begin_with_a_newline_that_joins_the_one_before():
    assert find_answers([8, 9, 50, 7, 3, 1, 8, 9, 51, 7, 3, 1], [8, 9], 3) == [(3, 5), (9, 12)]


# --- pictures ---


def test_pixels_keep_their_shape_of_stack_or_list(model):
    one = model.encode_img(wide(model))
    tokens = model.num_image_tokens(1, 2 if model.config.is_tiled else 1)
    assert one.shape == (1, tokens, model.config.hidden_size)
    assert model.encode_img(pixels(model).repeat(2, 1, 1, 1)).shape == (2, model.num_image_tokens(1, 1), 32)
    stack = model.encode_img(torch.stack([wide(model), wide(model)]))
    assert stack.shape == (2, *one.shape[1:])
    for same in (stack[:1], stack[1:], *model.encode_img([wide(model)])):
        torch.testing.assert_close(same, one)
    assert model.encode_img(None) is None


def test_a_picture_and_its_pixels_encode_alike(model, tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    by_path = model.encode_img(str(tmp_path / "a.png"), hd_num=2)
    torch.testing.assert_close(by_path, model.encode_img(image, hd_num=2))
    transform = {"2-4khd": HD_transform, "2.5": Image_transform}.get(model.config.version)
    if transform:
        image = transform(image, hd_num=2, tile_size=model.config.img_size)
    torch.testing.assert_close(by_path, model.encode_img(model.vis_processor(image)[None]))


def test_a_video_is_one_picture(tiled_model):
    video = golden_directory() / "inputs" / "tall_3s.mp4"
    assert tiled_model.encode_img(str(video)).shape[::2] == (1, 32)


def test_float_pixels_go_into_a_model_of_another_type(model):
    double = tiny_model(model.config.version).to(torch.bfloat16)
    embeds = double.encode_img(pixels(model))
    assert embeds.dtype == torch.bfloat16
    torch.testing.assert_close(embeds.float(), model.encode_img(pixels(model)), atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 56, 56), r"unsqueeze\(0\)"), ((1, 3, 50, 56), "56"), ((1, 4, 56, 56), r"\(4, 56, 56\)")],
)
def test_pixels_that_the_tower_cannot_read(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.encode_img(torch.zeros(shape))


def test_img2emb_has_a_mask_and_no_labels(model):
    embeds, ones, labels = model.img2emb(wide(model))
    assert torch.equal(ones, torch.ones(embeds.shape[:2], dtype=torch.long))
    assert torch.equal(labels, torch.full(embeds.shape[:2], -100))
    with pytest.raises(ValueError, match="one picture"):
        model.img2emb(None)


@torch.no_grad()
def test_the_tower_and_projector_are_called_so_that_hooks_see_them(model):
    seen = []
    hooks = [
        part.register_forward_hook(lambda module, args, output: seen.append((len(args), output)))
        for part in (model.vit, model.vision_proj)
    ]
    model.encode_img(wide(model))
    for hook in hooks:
        hook.remove()
    assert [count for count, _ in seen] == ([3, 1] if model.config.is_tiled else [1, 1])
    if model.config.is_tiled:
        assert all(type(count) is int for count in seen[0][1][1])


# --- prompts ---


def by_ids(model, texts, grids, seed=0):
    """Logits of `forward` for texts with pictures of random tiles between them, and BOS where it belongs."""
    pixel_values, image_grid_hw = random_pictures(model, grids, seed)
    ids = []
    for index, text in enumerate(texts):
        with_bos = index == 0 if model.config.version == "2.5" else bool(text)
        ids += model.tokenizer(text, add_special_tokens=with_bos)["input_ids"]
        if index < len(grids):
            ids += [model.config.image_token_id] * model.num_image_tokens(*grids[index])
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixel_values, "image_grid_hw": image_grid_hw}
    return model(**inputs).logits, inputs


@torch.no_grad()
@pytest.mark.parametrize("version", ["2", "2-4khd"])
def test_interleav_wrap_chat_of_the_older_generation(version, tokenizer):
    model = tiny_model(version)  # the tokenizer is an argument
    model.tokenizer = None
    grids = [(1, 1), (1, 1)]
    query = "Compare <ImageHere> and <ImageHere>"
    texts = f"[UNUSED_TOKEN_146]system\nBe kind{END}{USER}{query}{END}{ANSWER}".split("<ImageHere>")
    model.tokenizer = tokenizer
    expected, inputs = by_ids(model, texts, grids)
    model.tokenizer = None
    features = torch.stack(
        model.get_image_features(inputs["pixel_values"], inputs["image_grid_hw"]).pooler_output
    )
    inputs, im_mask = model.interleav_wrap_chat(tokenizer, query, features, [], "Be kind")
    assert list(inputs) == ["inputs_embeds"] and im_mask.dtype == torch.bool
    torch.testing.assert_close(model(**inputs, im_mask=im_mask).logits, expected)
    by_list, _ = model.interleav_wrap_chat(tokenizer, query, list(features[:, None]), [], ("Be kind",))
    torch.testing.assert_close(by_list, inputs)
    with pytest.raises(ValueError, match="2 <ImageHere> marks .* but 1 pictures"):
        model.interleav_wrap_chat(tokenizer, query, features[:1], [], None)


@torch.no_grad()
def test_interleav_wrap_chat_of_2_5(tiled_model):
    model, image = tiled_model, picture()
    inputs, im_mask, length = model.interleav_wrap_chat(
        "Compare <ImageHere>", [image], [("a", "b")], hd_num=2
    )
    prepared = model.prepare_chat(model.tokenizer, "Compare <ImageHere>", [image], 2, [("a", "b")], "")
    expected = model(**prepared).logits
    torch.testing.assert_close(model(**inputs, im_mask=im_mask).logits, expected)
    assert inputs["inputs_embeds"].shape[1] == im_mask.shape[1] == length == expected.shape[1]


@torch.no_grad()
def test_2_5_puts_one_unmarked_picture_first_and_cuts_nothing(tiled_model):
    model = tiled_model
    limit = model.max_length
    _, im_mask, length = model.interleav_wrap_chat("What?", [picture()], [], "Be kind", 16384, 2)
    assert im_mask[0].nonzero().flatten()[0] == 1
    with pytest.raises(ValueError, match=f"{length} tokens but max_length is 20"):
        model.interleav_wrap_chat("What?", [picture()], [], "Be kind", max_length=20, hd_num=2)
    with pytest.raises(ValueError, match="2 pictures"):
        model.interleav_wrap_chat("What?", [picture(), picture()])
    assert model.max_length == limit


@pytest.mark.parametrize("nothing", [None, "", ("",)])
def test_no_system_text_in_any_of_its_forms(tiled_model, nothing):
    _, im_mask, length = tiled_model.interleav_wrap_chat("Hi", [], meta_instruction=nothing)
    assert not im_mask.any()
    assert length == len(tiled_model.tokenizer(f"{USER}Hi{END}{ANSWER}")["input_ids"])


def test_prompt_wrap_puts_pictures_into_a_prompt(model, tokenizer):
    embeds = model.encode_img(pixels(model).repeat(2, 1, 1, 1))
    wrapped, ones, labels = model.prompt_wrap(embeds, "See <ImageHere>")
    num_before = len(tokenizer("See ")["input_ids"])
    assert torch.equal(wrapped[:, num_before:], embeds)
    assert wrapped.shape[:2] == ones.shape == labels.shape and (labels == -100).all() and ones.all()
    with pytest.raises(ValueError, match="0 <ImageHere> marks"):
        model.prompt_wrap(embeds, "See")


# --- batches of conversations ---


def conversation(question: str, answer: str) -> str:
    return f"{USER}{question}{END}{ANSWER}{answer}{END}</s>"


@torch.no_grad()
def test_interleav_wrap_equals_ids_with_pictures(model):
    texts = [conversation("<ImageHere>What?", "A thing"), conversation("Just words", "Yes, and more of them")]
    embeds, attention_mask, labels, im_mask = model.interleav_wrap([[wide(model)], []], texts)
    length = int(attention_mask[0].sum())
    ids = model.tokenizer(texts[0].split("<ImageHere>")[0])["input_ids"]
    ids += [model.config.image_token_id] * int(im_mask[0].sum())
    ids += model.tokenizer(texts[0].split("<ImageHere>")[1], add_special_tokens=False)["input_ids"]
    assert length == len(ids) and not im_mask[1].any()
    features = model.encode_img(wide(model))
    expected = model.model.tok_embeddings(torch.tensor([ids]))
    expected[im_mask[:1, :length]] = features[0]
    torch.testing.assert_close(embeds[:1, :length], expected)
    batch = model(inputs_embeds=embeds, attention_mask=attention_mask, im_mask=im_mask).logits
    single = model(inputs_embeds=expected, im_mask=im_mask[:1, :length]).logits
    torch.testing.assert_close(batch[:1, :length], single, atol=1e-4, rtol=1e-4)
    assert (labels[attention_mask == 0] == -100).all() and (labels[im_mask] == -100).all()


def test_every_nesting_of_pictures_is_the_same_batch(model):
    texts = [conversation("<ImageHere><ImageHere>?", "Two"), conversation("<ImageHere>?", "One")]
    a, b, c = (pixels(model, seed=seed) for seed in range(3))
    expected = model.interleav_wrap([[a, b], [c]], texts)
    nestings = [
        {"samples": {"text_input": [texts], "data_type": ["multi"], "image": [[[a, b], [c]]]}},
        {"samples": {"text_input": [[t] for t in texts], "data_type": ["multi"], "image": [[a, b], c]}},
        {
            "samples": {
                "text_input": texts,
                "data_type": ["multi", "multi"],
                "image": [torch.cat([a, b]), c[0]],
            }
        },
    ]
    batches = [model.embed_samples(**nesting) for nesting in nestings]
    batches.append(model.interleav_wrap([a, b, c], [texts], [2, 1]))
    for batch in batches:
        for got, wanted in zip(batch, expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_pictures_that_do_not_fit_their_conversations(model):
    texts = [conversation("<ImageHere>?", "One"), conversation("<ImageHere>?", "One")]
    image = pixels(model)
    with pytest.raises(ValueError, match="conversation 0 has 1 <ImageHere> marks but 2 pictures"):
        model.interleav_wrap([[image, image], []], texts)
    with pytest.raises(ValueError, match="2 conversations but pictures for 3"):
        model.interleav_wrap([image] * 3, texts)
    with pytest.raises(ValueError, match=r"image_nums \[1, 2\] must cover 2 pictures"):
        model.interleav_wrap([image] * 2, [texts], [1, 2])


def test_pictures_of_one_conversation_need_no_nesting():
    assert group_pictures("a.png", 1) == group_pictures([["a.png"]], 1) == [["a.png"]]
    assert group_pictures([], 1) == [[]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"text_input": ["a"]}, "lack data_type"),
        ({"text_input": ["a"], "data_type": ["audio"]}, "unknown data_type 'audio'"),
        ({"text_input": ["a"], "data_type": ["multi"]}, "lack 'image'"),
        ({"text_input": ["<ImageHere>"], "data_type": ["text"]}, "1 <ImageHere> marks but 0 pictures"),
    ],
)
def test_samples_that_are_incomplete(tiled_model, samples, message):
    with pytest.raises(ValueError, match=message):
        tiled_model.embed_samples(samples)


def test_a_conversation_beyond_max_length_is_named_not_cut(tokenizer):
    model = tiny_model("2.5")
    model.tokenizer, model.max_length = tokenizer, 24
    texts = [conversation("1", "2"), conversation("1", "a word " * 20)]
    with pytest.raises(ValueError, match=r"max_length 24 \(row: tokens\): \{1: \d+\}"):
        model(samples={"text_input": texts, "data_type": ["text"]})


def test_training_reaches_every_weight_that_pictures_use(model):
    samples = {
        "text_input": [[conversation("<ImageHere>What?", "A thing")]],
        "data_type": ["multi"],
        "image": [[[wide(model)]]],
    }
    model.zero_grad()
    model(samples=samples).loss.backward()
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None and "post_layernorm" not in name
    ]
    model.zero_grad()
    assert unused == []


# --- the original's numbers ---


def golden_samples(model, case: dict) -> dict:
    """`samples` as the trainers of that version make them."""
    samples = {"text_input": case["text_input"], "data_type": case["data_type"]}
    if not case["images"]:
        return samples

    def read(name: str) -> torch.Tensor:
        name, _, hd_num = name.partition("@")
        image = Image.open(golden_directory() / "inputs" / f"{name}.png")
        return model.vis_processor(Image_transform(image, int(hd_num)) if hd_num else image)[None]

    if model.config.version == "2.5":
        images = [[[read(name) for name in row] for row in case["images"]]]
    else:
        images = [read(name) for name in case["images"]]
    return {**samples, "image": images}


@pytest.mark.slow
@needs_published_tokenizer
@pytest.mark.parametrize(("family", "name"), training_cases())
def test_training_as_the_original(family, name, checkpoint, published):
    case, tensors = golden_case(family, name)
    model = modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM.from_pretrained(checkpoint(family))
    model.tokenizer = published
    embeds, attention_mask, labels, im_mask = model.embed_samples(golden_samples(model, case))
    for got, wanted in (("attention_mask", attention_mask), ("labels", labels), ("im_mask", im_mask)):
        assert torch.equal(wanted.int(), tensors[got].int()), got
    assert embeds.double().mean().item() == pytest.approx(case["embeds_stats"]["mean"], abs=1e-6)
    output = model(inputs_embeds=embeds, attention_mask=attention_mask, im_mask=im_mask, labels=labels)
    assert output.loss.item() == pytest.approx(case["loss"], rel=1e-5)
    logits = output.logits[:, tensors["logit_positions"]][..., tensors["logit_vocab"]]
    real = attention_mask[:, tensors["logit_positions"]].bool()
    torch.testing.assert_close(logits[real], tensors["logits_sub"][real], atol=2e-4, rtol=0)
    output.loss.backward()
    parameters = {name.replace(".linear.weight", ".weight"): p for name, p in model.named_parameters()}
    norms = {name: p.grad.norm().item() for name, p in parameters.items() if p.grad is not None}
    expected = {name: norm for name, norm in case["grad_norms"].items() if norm is not None}
    assert norms == pytest.approx(expected, rel=2e-4, abs=2e-7)


# --- names that clients import from the model's module ---


def test_names_that_clients_import():
    module = modeling_internlm_xcomposer2
    assert {".mp4", ".avi", ".mkv"} <= module.video_extensions and {".jpg", ".png"} <= module.image_extensions
    assert module.get_font is get_font


def test_stopping_criteria_stop_each_sequence_at_any_of_the_ids():
    criteria = modeling_internlm_xcomposer2.get_stopping_criteria([torch.tensor([5]), 7, [8, 9]])
    ids = torch.tensor([[1, 5], [1, 7], [1, 8], [8, 9], [9, 8]])
    assert criteria(ids, None).tolist() == [True, True, False, True, False]
    with pytest.raises(ValueError, match="at least one id"):
        modeling_internlm_xcomposer2.get_stopping_criteria([[]])


def test_a_seed_repeats_every_generator():
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        draws = []
        for _ in range(2):
            modeling_internlm_xcomposer2.set_random_seed(3)
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    random.setstate(states[0])
    np.random.set_state(states[1])
    assert draws[0] == draws[1]
