"""The processor: its prompts are those of `chat`, its counts those of its tiles, its errors come first."""

import base64
import io
import json
import random
import shutil
import socket

import numpy as np
import pytest
import torch
from helpers import ROOT, needs_published_tokenizer, tiny_config, write_checkpoint
from internlm_xcomposer2 import (
    InternLMXcomposer2Config,
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2ImageProcessor,
    InternLMXComposer2Processor,
    InternLMXComposer2Tokenizer,
)
from internlm_xcomposer2.configuration_internlm_xcomposer2 import CONFIG_AUTO_MAP, TOKENIZER_AUTO_MAP
from internlm_xcomposer2.processing_internlm_xcomposer2 import OPTION_GROUPS, default_template
from internlm_xcomposer2.prompt_internlm_xcomposer2 import META_INSTRUCTION, system_text
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import CHAT_TEMPLATE
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers import AutoProcessor

VERSIONS = ("2", "2-4khd", "2.5")
QUESTION = "What shape is the object?"
STAR, NUMBER = ROOT / "examples/star.png", ROOT / "examples/number.png"
TO_TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
FOR_ANSWER = {"add_generation_prompt": True, **TO_TENSORS}
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def picture(width: int = 130, height: int = 90, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(*parts) -> list[dict]:
    """One user turn of texts and pictures."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def tokenizer():
    return InternLMXComposer2Tokenizer.from_pretrained(ROOT)


@pytest.fixture
def processor(tokenizer):
    """Version and other fields of a small configuration -> its processor."""

    def build(version: str = "2.5", **fields) -> InternLMXComposer2Processor:
        return InternLMXComposer2Processor.for_config(tiny_config(version, **fields), tokenizer)

    return build


@pytest.fixture(scope="module")
def nano():
    return InternLMXComposer2ForCausalLM.from_pretrained(ROOT).eval()


# ---- prompts ----


@pytest.mark.parametrize("version", VERSIONS)
def test_a_question_is_what_chat_sends(version, tiny, tokenizer, processor):
    model, image = tiny(version), picture()
    meta = "" if version == "2.5" else META_INSTRUCTION
    expected = model.prepare_chat(tokenizer, f"<ImageHere>{QUESTION}", image, None, [], meta)
    inputs = processor(version).apply_chat_template(ask(image, QUESTION), **FOR_ANSWER)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_grid_hw"], expected["image_grid_hw"])
    assert torch.equal(inputs["input_ids"] == model.config.image_token_id, expected["im_mask"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("use_meta", [False, True])
def test_the_system_text_is_switched_as_in_chat(version, use_meta, tiny, tokenizer, processor):
    model, image = tiny(version), picture()
    meta = system_text(version, use_meta, META_INSTRUCTION)
    expected = model.prepare_chat(tokenizer, f"<ImageHere>{QUESTION}", image, None, [], meta)
    inputs = processor(version).apply_chat_template(ask(image, QUESTION), use_meta=use_meta, **FOR_ANSWER)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("version", VERSIONS)
def test_turns_with_pictures_are_what_chat_sends(version, tiny, tokenizer, processor):
    model, images = tiny(version), [picture(seed=1), picture(60, 200, seed=2), picture(20, 20, seed=3)]
    history = [("First: <ImageHere>; second: <ImageHere>", "star"), ("and text only", "yes")]
    expected = model.prepare_chat(tokenizer, "Third <ImageHere>?", images, 3, history, "Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        *ask("First: ", images[0], "; second: ", images[1]),
        {"role": "assistant", "content": "star"},
        {"role": "user", "content": "and text only"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        *ask("Third ", images[2], "?"),
    ]
    inputs = processor(version).apply_chat_template(messages, hd_num=3, **FOR_ANSWER)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_text_is_the_same_with_and_without_its_start(version, processor):
    build = processor(version)
    text = build.apply_chat_template(ask(picture(), QUESTION), add_generation_prompt=True)
    assert text.startswith("<s>") and text.count("<ImageHere>") == 1
    expected = build.apply_chat_template(ask(picture(), QUESTION), **FOR_ANSWER)["input_ids"]
    for form in (text, text.removeprefix("<s>")):
        inputs = build(images=picture(), text=form, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], expected)
    assert 1 not in build(text="no start", add_special_tokens=False)["input_ids"][0]


def test_a_picture_without_a_mark_goes_to_the_front_in_2_5(tiny, tokenizer, processor):
    expected = tiny("2.5").prepare_chat(tokenizer, QUESTION, picture(), None, [], "")["input_ids"]
    text = f"[UNUSED_TOKEN_146]user\n{QUESTION}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    assert torch.equal(processor()(picture(), text, return_tensors="pt")["input_ids"], expected)
    rows = processor()([picture(), picture()], [text, text], return_tensors="pt")["input_ids"]
    assert torch.equal(rows, expected.expand(2, -1))
    with pytest.raises(ValueError, match="0 <ImageHere> marks but 1"):
        processor("2")(picture(), text)


def test_several_pictures_get_six_tiles_each_by_default(processor):
    build, images = processor(hd_num=24), [picture(800, 800), picture(800, 800)]

    def largest(count: int, **options) -> int:
        inputs = build(images[:count], "<ImageHere>" * count, return_tensors="pt", **options)
        return int(inputs["image_grid_hw"].prod(1).max())

    assert 6 < largest(1) <= 24
    assert largest(2) <= 6
    assert 6 < largest(2, hd_num=12) <= 12
    assert 6 < largest(2, images_kwargs={"hd_num": 12}) <= 12


def test_the_last_message_can_be_continued(processor, tokenizer):
    messages = [*ask(picture(), QUESTION), {"role": "assistant", "content": "a st"}]
    text = processor().apply_chat_template(messages, continue_final_message=True)
    assert text.endswith("[UNUSED_TOKEN_146]assistant\na st")
    ids = processor().apply_chat_template(messages, continue_final_message=True, tokenize=True)[0]
    assert tokenizer.decode(ids).endswith("assistant\na st")


def test_both_templates_say_the_same():
    messages = [
        {"role": "system", "content": "s"},
        *ask(picture(), "q"),
        {"role": "assistant", "content": "a"},
    ]
    own, other = (
        InternLMXComposer2Tokenizer.from_pretrained(ROOT, chat_template=template)
        for template in (default_template("2.5"), CHAT_TEMPLATE)
    )
    for generate in (False, True):
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            for tokenizer in (own, other)
        ]
        assert texts[0] == texts[1]


# ---- answers ----


@pytest.mark.parametrize("version", VERSIONS)
def test_generating_from_the_outputs_is_chat(version, tiny, tokenizer, processor):
    model, image, build = tiny(version), picture(), processor(version)
    answer, _ = model.chat(tokenizer, f"<ImageHere>{QUESTION}", image, repetition_penalty=1.0, **GREEDY)
    inputs = build.apply_chat_template(ask(image, QUESTION), **FOR_ANSWER)
    sequences = model.generate(**inputs, **GREEDY)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    assert build.batch_decode(new, skip_special_tokens=True) == [answer]


def test_nano_answers_a_batch_as_it_answers_each(nano, tokenizer):
    build = InternLMXComposer2Processor.for_config(nano.config, tokenizer)
    conversations = [
        ask(STAR, QUESTION),
        ask("Which picture shows the ring? Picture 1: ", STAR, "; picture 2: ", ROOT / "examples/ring.jpg"),
        ask("Who are you?"),
        ask(NUMBER, "What number is printed in the picture?"),
    ]
    single = [answer_of(nano, build, [conversation])[0] for conversation in conversations]
    assert single[0] == "star" and single[3] == "6143"
    assert answer_of(nano, build, conversations) == single


def answer_of(model, build, conversations: list) -> list[str]:
    inputs = build.apply_chat_template(conversations, **FOR_ANSWER)
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return build.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- batches ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_chosen_side(side, processor):
    build, conversations = (
        processor(),
        [ask(picture(), "a"), ask("b" * 60), ask("c", picture(), picture(90, 20))],
    )
    options = {} if side == "left" else {"padding_side": "right"}
    batch = build.apply_chat_template(conversations, **options, **FOR_ANSWER)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    singles = [build.apply_chat_template(each, **FOR_ANSWER) for each in conversations]
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
        assert torch.equal(row[mask.bool()], single["input_ids"][0])
        assert mask[-1 if side == "left" else 0] == 1
    pixels = torch.cat([single["pixel_values"] for single in singles if "pixel_values" in single])
    assert torch.equal(batch["pixel_values"], pixels)
    assert len(batch["image_grid_hw"]) == 3


def test_rows_stay_ragged_or_fill_a_length_on_request(processor):
    build, texts = processor(), ["a", "a b c d"]
    assert len({len(row) for row in build(text=texts, padding=False)["input_ids"]}) == 2
    filled = build(text=texts, padding="max_length", max_length=40, return_tensors="np")
    assert filled["input_ids"].shape == (2, 40)
    assert build(text=texts, pad_to_multiple_of=16, return_tensors="pt")["input_ids"].shape == (2, 16)


def test_pictures_are_distributed_flat_or_by_row(processor):
    build, images = processor(), [picture(60, 60, seed) for seed in range(3)]
    texts = ["a <ImageHere> b <ImageHere>", "no picture", "<ImageHere>"]
    flat = build(images, texts, return_tensors="pt")
    nested = build([images[:2], [], images[2:]], texts, return_tensors="pt")
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    with pytest.raises(ValueError, match="2 <ImageHere> marks but 1"):
        build([images[:1], [], images[1:]], texts)
    with pytest.raises(ValueError, match="3 texts but 2 lists"):
        build([images[:2], images[2:]], texts)


# ---- counts ----


@pytest.mark.parametrize("version", VERSIONS)
def test_counts_from_sizes_are_those_of_tiles_and_ids(version, processor):
    build, rng = processor(version, hd_num=9), random.Random(4)
    for number in range(1, 6):
        sizes = [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(number)]
        images = [picture(width, height) for height, width in sizes]
        for options in ({}, {"hd_num": rng.randint(1, 12)}):
            inputs = build(images, "<ImageHere>x" * number, return_tensors="pt", **options)
            counts = build._get_num_multimodal_tokens(image_sizes=sizes, **options)
            assert inputs["input_ids"].eq(build.image_token_id).sum() == sum(counts["num_image_tokens"])
            assert len(inputs["pixel_values"]) == sum(counts["num_image_patches"])


def test_what_engines_read_of_an_expanded_prompt(processor, tokenizer):
    """Like vLLM's Transformers backend: replacements by mark, and which ids are a picture's."""
    build, images = processor(), [picture(), picture(60, 200)]
    text = "<s>see <ImageHere> and\n<ImageHere>."
    options = {"return_mm_token_type_ids": True, "return_text_replacement_offsets": True}
    inputs = build(images, text, truncation=False, add_special_tokens=False, return_tensors="pt", **options)
    (offsets,) = inputs["text_replacement_offsets"]
    expanded = text
    for number, entry in enumerate(offsets):
        assert text[slice(*entry["span"])] == entry["text"] == build.image_token
        assert entry["replacement"] == build.replace_image_token(inputs, number)
        expanded = expanded.replace(entry["text"], entry["replacement"], 1)
    for entry in offsets:
        assert expanded[slice(*entry["new_span"])] == entry["replacement"]
    ids = tokenizer(expanded.removeprefix("<s>"), add_special_tokens=True)["input_ids"]
    assert inputs["input_ids"][0].tolist() == ids
    lengths = build._get_num_multimodal_tokens(image_sizes=[(90, 130), (200, 60)])["num_image_tokens"]
    assert [entry["replacement"].count(build.image_piece) for entry in offsets] == lengths
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == build.image_token_id).long())
    assert build.image_token_ids == [build.image_token_id]
    assert "image_grid_hw" in build.model_input_names


# ---- videos ----


def test_a_video_is_what_chat_makes_of_it(tiny, tokenizer, processor):
    frames = [picture(120, 80, seed) for seed in range(3)]
    for video in (frames, ROOT / "examples/circle.mp4"):
        expected = tiny("2.5").prepare_chat(tokenizer, f"<ImageHere>{QUESTION}", [video], None, [], "")
        content = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        inputs = processor().apply_chat_template(messages, **FOR_ANSWER)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        text = processor().apply_chat_template(messages, add_generation_prompt=True)
        again = processor()(text=text, videos=video, return_tensors="pt")
        assert torch.equal(again["input_ids"], expected["input_ids"])


def test_videos_next_to_pictures_have_their_own_mark(processor):
    build, frames, image = processor(), [picture(120, 80, seed) for seed in range(2)], picture()
    inputs = build([image], "<VideoHere> or <ImageHere>?", [frames], return_tensors="pt")
    parts = [{"type": "video", "video": frames}, {"type": "text", "text": " or "}]
    parts += [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    template = "{{ bos_token }}{% for part in messages[0].content %}" + (
        "{{ part.text if part.type == 'text' else '<ImageHere>' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": parts}]
    expected = build.apply_chat_template(messages, chat_template=template, **TO_TENSORS)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match="must mark each video with <VideoHere>"):
        build([image], "<ImageHere> or <ImageHere>?", [frames])


def test_frames_are_sampled_and_counted(processor):
    build, frames = processor(), [picture(120, 80, seed) for seed in range(8)]
    for number in (2, 5):
        inputs = build(text="<ImageHere>", videos=frames, num_frames=number, return_tensors="pt")
        counts = build._get_num_multimodal_tokens(video_sizes=[(number, 80, 120)])["num_video_tokens"]
        assert inputs["input_ids"].eq(build.image_token_id).sum() == sum(counts)


def test_videos_in_lists_are_distinguished_from_frames(processor):
    build, film = processor(), ROOT / "examples/circle.mp4"
    once = build(text="<ImageHere>", videos=film, return_tensors="pt")["pixel_values"]
    for videos in ([film, film], [[film], [film]], [film, [film]]):
        inputs = build(text=["<ImageHere>", "<ImageHere>"], videos=videos, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], torch.cat([once, once]))
    stack = np.stack([np.asarray(picture(120, 80, seed)) for seed in range(2)])
    frames = [picture(120, 80, seed) for seed in range(2)]
    one, other = (build(text="<ImageHere>", videos=form)["pixel_values"] for form in (stack, [frames]))
    assert torch.equal(one, other)


# ---- sources ----


def test_every_form_of_a_picture_is_the_same_picture(processor):
    content = STAR.read_bytes()
    encoded = base64.b64encode(content).decode()
    uri = f"data:image/png;base64,{encoded}"
    forms = [
        {"type": "image", "image": Image.open(STAR)},
        {"type": "image", "image": STAR},
        {"type": "image", "image": str(STAR)},
        {"type": "image", "image": content},
        {"type": "image", "image": encoded},
        {"type": "image", "image": uri},
        {"type": "image", "path": str(STAR)},
        {"type": "image", "url": uri},
        {"type": "image", "base64": encoded},
        {"type": "image", "base64": encoded, "url": None},
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "image_url", "image_url": uri},
    ]
    expected = processor().image_processor(Image.open(STAR), return_tensors="pt")["pixel_values"]
    for form in forms:
        inputs = processor().apply_chat_template([{"role": "user", "content": [form]}], **TO_TENSORS)
        assert torch.equal(inputs["pixel_values"], expected), form.keys()


def test_pictures_alone(processor):
    image_processor = processor(hd_num=4).image_processor
    inputs = image_processor([picture(), [picture(30, 300)]], return_tensors="pt")
    assert inputs["image_grid_hw"].shape == (2, 2)
    assert len(inputs["pixel_values"]) == int((inputs["image_grid_hw"].prod(1) + 1).sum())
    assert torch.equal(processor(hd_num=4)([picture()])["pixel_values"], inputs["pixel_values"][: 1 + 4])
    stack = np.stack([np.asarray(picture())] * 2)
    assert len(image_processor(stack)["image_grid_hw"]) == 2


# ---- texts ----


def test_decoding_leaves_out_pictures_and_the_end_mark(processor, tokenizer):
    build = processor()
    inputs = build.apply_chat_template(ask(picture(), "hi"), **FOR_ANSWER)
    ids = inputs["input_ids"][0].tolist()
    answer = tokenizer("a star[UNUSED_TOKEN_145]", add_special_tokens=False)["input_ids"]
    assert build.decode(answer + [2, 2], skip_special_tokens=True) == "a star"
    assert build.decode(torch.tensor(answer)) == "a star[UNUSED_TOKEN_145]"
    whole = build.post_process_image_text_to_text(torch.tensor([ids + answer]))
    prompt = build.post_process_image_text_to_text(inputs["input_ids"])
    assert [text.removeprefix(start) for text, start in zip(whole, prompt, strict=True)] == ["a star"]
    assert build.batch_decode([answer, answer], skip_special_tokens=True) == ["a star"] * 2
    assert build.decode(ids).count(build.image_piece) == ids.count(build.image_token_id)


def streamed(tokenizer, ids: list[int]) -> str:
    stream = DecodeStream([], skip_special_tokens=True)
    return "".join(filter(None, (stream.step(tokenizer._tokenizer, token) for token in ids)))


TEXTS = ("a star", " leading", "a  b\n\nc", "浦语·灵笔 é 🦉!", "it 's ok .", "tab\tend\n")


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_tokens_reads_as_their_text(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    end = tokenizer("[UNUSED_TOKEN_145]", add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, [1, *ids, *end, 2]) == text


@needs_published_tokenizer
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_published_tokens_reads_as_their_text(text, published):
    assert streamed(published, published(f"{text}[UNUSED_TOKEN_145]")["input_ids"]) == text


def test_a_stream_knows_tokens_that_were_added():
    own = InternLMXComposer2Tokenizer.from_pretrained(ROOT)
    assert streamed(own, own("star")["input_ids"]) == "star"
    own.add_tokens(["<mark>"])
    assert streamed(own, own("star<mark>")["input_ids"]) == "star<mark>"


# ---- loading and saving ----


def test_files_in_the_root_are_those_that_saving_writes(tokenizer):
    build = InternLMXComposer2Processor.for_config(InternLMXcomposer2Config.from_pretrained(ROOT), tokenizer)
    read = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.j*")}
    assert read["processor_config.json"] == build.to_json_string()
    assert read["preprocessor_config.json"] == build.image_processor.to_json_string()
    assert read["chat_template.jinja"] == build.chat_template == default_template("2.5")
    assert json.loads(read["config.json"])["auto_map"] == CONFIG_AUTO_MAP
    assert json.loads(read["tokenizer_config.json"])["auto_map"] == TOKENIZER_AUTO_MAP


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_processor_is_the_same(version, processor, tmp_path):
    build = processor(version, hd_num=7)
    build.save_pretrained(tmp_path)
    loaded = InternLMXComposer2Processor.from_pretrained(tmp_path)
    assert loaded.to_dict() == build.to_dict()
    assert loaded.chat_template == build.chat_template
    inputs = [each.apply_chat_template(ask(picture(), "q"), **FOR_ANSWER) for each in (build, loaded)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])


@pytest.mark.parametrize(("family", "version"), [("vl", "2"), ("4khd", "2-4khd")])
def test_a_published_directory_needs_no_processor_files(family, version, tmp_path):
    """Version and sizes come from the weights; a flat file gives neither."""
    directory = write_checkpoint(tmp_path / family, family)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ROOT / name, directory)
    shapes = InternLMXComposer2ForCausalLM.from_pretrained(directory).config
    loaded = AutoProcessor.from_pretrained(directory)
    assert isinstance(loaded, InternLMXComposer2Processor)
    assert (loaded.version, loaded.image_processor.img_size) == (version, shapes.img_size)
    assert loaded.image_token_id == shapes.image_token_id
    images = InternLMXComposer2ImageProcessor.from_pretrained(directory)
    assert images.to_dict() == loaded.image_processor.to_dict()


def test_a_directory_without_anything_is_named(tmp_path):
    with pytest.raises(OSError, match="processor|tokenizer"):
        InternLMXComposer2Processor.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="image processor"):
        InternLMXComposer2ImageProcessor.from_pretrained(tmp_path)


# ---- bad input ----


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


BAD_PARTS = [
    ({"type": "audio", "audio": "a.wav"}, ValueError, "unknown content type 'audio'.*image_url"),
    ({"text": "no type"}, TypeError, "dicts with a type"),
    ("text", TypeError, "dicts with a type"),
    ({"type": "text"}, TypeError, "needs a text"),
    ({"type": "image"}, ValueError, "no source; put it under image or url or path or base64"),
    ({"type": "image", "image": "a.png", "url": "b.png"}, ValueError, "2 sources, image and url"),
    ({"type": "image", "image": "gone.png"}, FileNotFoundError, "gone.png"),
    ({"type": "image", "base64": "A"}, ValueError, "not valid base64"),
    ({"type": "image", "image": "A" * 41}, ValueError, "neither a file nor valid base64"),
    ({"type": "image", "url": "data:image/png;base64,A"}, ValueError, "not valid base64"),
    ({"type": "image", "base64": base64.b64encode(b"no picture").decode()}, ValueError, "not a picture"),
    ({"type": "image_url", "image_url": {"uri": "x"}}, TypeError, "needs a url"),
    ({"type": "image", "image": 7}, TypeError, "can't be read from int"),
    ({"type": "video", "video": str(STAR)}, ValueError, "picture, not a video"),
    ({"type": "image", "image": str(ROOT / "examples/circle.mp4")}, ValueError, "is a video"),
]


@pytest.mark.parametrize(("part", "kind", "message"), BAD_PARTS)
def test_bad_content_is_named(part, kind, message, processor):
    with pytest.raises(kind, match=message):
        processor().apply_chat_template([{"role": "user", "content": [part]}], **TO_TENSORS)


@pytest.mark.parametrize("depth", [2, 3, 100_000])
def test_batches_are_nested_once(depth, processor):
    conversation = [{"role": "user", "content": "x"}]
    for _ in range(depth):
        conversation = [conversation]
    with pytest.raises(ValueError, match="nested too deep"):
        processor().apply_chat_template(conversation)


def test_lists_that_contain_themselves(processor):
    loop = []
    loop.append(loop)
    for name in ("images", "videos"):
        with pytest.raises(ValueError, match="nested more than"):
            processor()(text="<ImageHere>", **{name: loop})


def test_settings_of_access_belong_to_the_processor_alone(processor, tmp_path):
    """They decide what each way in reads, are set on loading, and never saved."""
    build = processor()
    build.allowed_local_media_path, build.allowed_media_domains = str(tmp_path), []
    message = [{"role": "user", "content": [{"type": "image", "image": str(STAR)}]}]
    frames = [{"role": "user", "content": [{"type": "video", "video": [str(STAR)] * 2}]}]
    for call in (
        lambda: build(STAR, "<ImageHere>"),
        lambda: build(STAR),
        lambda: build(videos=[[STAR, STAR]], text="<ImageHere>"),
        lambda: build.apply_chat_template(message, **TO_TENSORS),
        lambda: build.apply_chat_template(frames, **TO_TENSORS),
    ):
        with pytest.raises(ValueError, match="may not be read here"):
            call()
    with pytest.raises(ValueError, match="not allowed here"):
        build("http://127.0.0.1/a.png", "<ImageHere>")
    build.save_pretrained(tmp_path / "saved")
    assert "allowed_" not in "".join(path.read_text() for path in tmp_path.glob("saved/*.json"))
    again = type(build).from_pretrained(tmp_path / "saved", allowed_media_domains=["example.org"])
    assert again.allowed_media_domains == ["example.org"] and again.allowed_local_media_path is None
    with pytest.raises(ValueError, match="not allowed here"):
        again("http://127.0.0.1/a.png", "<ImageHere>")
    assert again(STAR, "<ImageHere>")["input_ids"]


def test_a_file_whose_reading_fails_is_named(processor):
    class Raising:
        def read(self, *_):
            raise RuntimeError("cable pulled")

    closed = open(STAR, "rb")  # noqa: SIM115
    closed.close()
    write_only = io.BufferedWriter(io.BytesIO())
    for file, message in ((Raising(), "RuntimeError"), (closed, "ValueError"), (write_only, "can't be read")):
        with pytest.raises(ValueError, match=message):
            processor()(file, "<ImageHere>")


def test_a_url_that_does_not_answer_is_named(processor):
    url = f"http://127.0.0.1:{closed_port()}/a.png"
    with pytest.raises(ValueError, match="can't be read"):
        part = {"type": "image_url", "image_url": {"url": url}}
        processor().apply_chat_template([{"role": "user", "content": [part]}], **TO_TENSORS)


BAD_CALLS = [
    ({"text": "<ImageHere><ImageHere>", "images": [picture()]}, ValueError, "2 <ImageHere> marks but 1"),
    ({"text": "<ImageHere>", "images": [picture(), picture()]}, ValueError, "1 <ImageHere> marks but 2"),
    ({"text": "<ImageHere>"}, ValueError, "1 <ImageHere> marks but 0"),
    ({"text": "x", "images": [picture(), picture()]}, ValueError, "0 <ImageHere> marks but 2"),
    ({"text": "x", "hd_num": 0}, ValueError, "hd_num must be at least 1"),
    ({"text": "x", "hd_num": "many"}, TypeError, "hd_num must be an integer"),
    ({"text": "x", "hd_number": 3}, TypeError, "unknown option hd_number; the processor accepts .*hd_num"),
    ({"text": "x", "padding_side": "top"}, ValueError, "'left' or 'right', not 'top'"),
    ({"text": "x", "pad_to_multiple_of": 0}, ValueError, "at least 1, got 0"),
    ({"text": "x", "text_kwargs": {"pad_to_multiple_of": -8}}, ValueError, "at least 1, got -8"),
    ({"text": "x", "pad_to_multiple_of": 8.0}, TypeError, "must be an integer, got 8.0"),
    ({"text": "x", "pad_to_multiple_of": True}, TypeError, "must be an integer, got True"),
    ({"text": "x", "videos": []}, ValueError, "videos is empty"),
    ({"text": "x", "videos": [[], []]}, ValueError, "videos is empty"),
    ({"text": "x", "videos": torch.zeros(0, 3, 8, 8)}, ValueError, "no frames|marks"),
    ({"text": "<ImageHere>", "images": [[[picture()]]]}, ValueError, "nested more than 2 deep"),
    ({"text": "<ImageHere>", "videos": [[[[picture()]]]]}, ValueError, "nested more than 3 deep"),
    ({"text": "<ImageHere>", "images": [picture()], "fps": 0}, ValueError, "fps must be > 0"),
    ({"text": "<ImageHere>", "images": [picture()], "num_frames": 1.5}, TypeError, "must be an integer"),
    ({"text": "a b c d", "max_length": 2}, ValueError, "tokens with its pictures but max_length is 2"),
    ({"text": "[UNUSED_TOKEN_1]"}, ValueError, "stands for image tokens"),
    ({"text": 3}, TypeError, "must be a str"),
    ({"text": []}, TypeError, "must be a str"),
    ({}, ValueError, "no pictures and no videos"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_CALLS)
def test_bad_calls_are_named(arguments, kind, message, processor):
    with pytest.raises(kind, match=message):
        processor()(**arguments)


@pytest.mark.parametrize(
    ("conversation", "kind", "message"),
    [
        ("hello", TypeError, "a list of messages, not str"),
        ([], ValueError, "empty"),
        ([[]], ValueError, "empty"),
        (["hello"], TypeError, "a dict with a role"),
        ([{"content": "x"}], TypeError, "a dict with a role"),
        ([{"role": "user", "content": 3}], TypeError, "a text or a list, not int"),
        (ask(picture(), "and <ImageHere>"), ValueError, "2 <ImageHere> marks .* but 1 pictures"),
    ],
)
def test_bad_conversations_are_named(conversation, kind, message, processor):
    with pytest.raises(kind, match=message):
        processor().apply_chat_template(conversation, **TO_TENSORS)


def test_what_sentencepiece_cannot_give_is_named(processor):
    with pytest.raises(ValueError, match="needs offsets"):
        processor().apply_chat_template(ask("q"), return_assistant_tokens_mask=True, **TO_TENSORS)
    for version in ("2", "2-4khd"):
        with pytest.raises(ValueError, match="doesn't read videos"):
            processor(version)(text="<ImageHere>", videos=[[picture()]])


def test_counts_are_checked_before_anything_is_read(processor, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("a picture was read")

    monkeypatch.setattr(InternLMXComposer2ImageProcessor, "load", read)
    with pytest.raises(ValueError, match="2 <ImageHere> marks"):
        processor().apply_chat_template(ask(STAR, "<ImageHere>"), **TO_TENSORS)


def test_a_call_leaves_messages_and_tokenizer_alone(processor, tokenizer):
    messages = ask(picture(), QUESTION)
    before = [dict(part) for part in messages[0]["content"]], tokenizer.padding_side
    processor().apply_chat_template([messages, messages], padding_side="right", **FOR_ANSWER)
    assert (messages[0]["content"], tokenizer.padding_side) == before


def test_wrong_arguments_of_the_processors_are_named(tokenizer):
    with pytest.raises(ValueError, match="unknown version '3'"):
        InternLMXComposer2ImageProcessor(version="3")
    with pytest.raises(ValueError, match="image_token_id is missing"):
        InternLMXComposer2Processor(InternLMXComposer2ImageProcessor(), tokenizer)


def test_every_option_is_described():
    for group in OPTION_GROUPS.values():
        assert all(name in group.__doc__.split("Args:")[1] for name in group.__annotations__)


@pytest.mark.parametrize("name", ["pad_to_multiple_of", "max_length"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-2, ValueError), (2.5, TypeError), (True, TypeError), ("8", TypeError)],
)
def test_numbers_of_tokens_that_are_none(processor, name, value, error):
    with pytest.raises(error, match=f"{name} must be (at least 1|an integer), got"):
        processor()(text="hi", **{name: value})


@pytest.mark.parametrize("version", VERSIONS)
def test_a_text_with_lengths_has_the_ids_that_pictures_of_them_would_give(version, processor):
    ready = processor(version)
    text = "<s>One <ImageHere> and <ImageHere>, which?"
    inputs = ready(text=text, images=[picture(), picture(60, 200)], hd_num=2)
    lengths = [ready.image_processor.num_image_tokens(*grid) for grid in inputs["image_grid_hw"].tolist()]
    assert ready.encode_text(text, lengths) == inputs["input_ids"][0]
    assert ready.encode_text(text.removeprefix("<s>"), lengths) == inputs["input_ids"][0]
    bare = ready.encode_text("Hello", add_special_tokens=False)
    assert bare == ready.encode_text("Hello")[1:] and ready.tokenizer.bos_token_id not in bare
    with pytest.raises(ValueError, match="2 <ImageHere> marks .* 1 pictures"):
        ready.encode_text(text, lengths[:1])
    with pytest.raises(ValueError, match="stands for image tokens"):
        ready.encode_text(f"{text}{ready.image_piece}", lengths)
