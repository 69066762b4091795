"""The calls of public clients of the published code, replayed on small models, without their `.cuda()`."""

import os
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from accelerate import dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from helpers import ROOT, golden_directory, needs_published_tokenizer, read_json, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer, ixc_utils
from internlm_xcomposer2.build_mlp import CLIPVisionTower
from internlm_xcomposer2.modeling_internlm_xcomposer2 import get_stopping_criteria
from PIL import Image, ImageFont
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

VERSIONS = ("2", "2-4khd", "2.5")
OLDER = ("2", "2-4khd")
SIDE = 56  # of the tiny models' squares and tiles
BATCH = golden_directory() / "vl" / "batch_left_pad.json"
TASKS = {"sft": 2, "dpo": 2, "web": 2}


@pytest.fixture(scope="module")
def tokenizer() -> InternLMXComposer2Tokenizer:
    """The small vocabulary in the repository's root."""
    return InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))


@pytest.fixture
def load(tokenizer):
    """Version -> a separate tiny model with the tokenizer set, as clients set it."""

    def build(version: str, **fields) -> InternLMXComposer2ForCausalLM:
        model = tiny_model(version, **fields)
        model.tokenizer = tokenizer
        return model

    return build


@pytest.fixture
def path(tmp_path) -> str:
    picture().save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def picture(width: int = 120, height: int = 50, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepared(model, hd_num: int = 2, seed: int = 0) -> torch.Tensor:
    """(1, 3, height, width) pixels as clients make them with their own copy of the transform."""
    image = picture(seed=seed)
    if model.config.is_tiled:
        image = ixc_utils.R560_HD18_Identity_transform(image, hd_num=hd_num, tile_size=SIDE)
    return model.vis_processor(image).unsqueeze(0)


def ends(tokenizer) -> list[int]:
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]")]


# --- VLMEvalKit, and the evaluation scripts and notebooks of InternLM-XComposer-2.0 ---


def vlmevalkit_prompt(model, parts: list) -> tuple[torch.Tensor, torch.Tensor]:
    """BOS, then texts and pixels one after the other, with masks of several types."""
    embeds = [model.encode_text("", add_special_tokens=True)]
    masks = [torch.zeros(1, 1)]
    for part in parts:
        if isinstance(part, str):
            embeds.append(model.encode_text(part, add_special_tokens=False))
            masks.append(torch.zeros(embeds[-1].shape[:2]))
        else:
            embeds.append(model.encode_img(part))
            masks.append(torch.ones(embeds[-1].shape[:2], dtype=torch.long))
    return torch.cat(embeds, dim=1), torch.cat(masks, dim=1).bool()


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_vlmevalkit(version, load, tokenizer):
    model = load(version).eval()
    assert model.model.tok_embeddings.weight.device == model.device
    model.hd_num, model.id_scale = 36, 1.5
    assert (model.hd_num, model.id_scale) == (36, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        embeds, im_mask = vlmevalkit_prompt(
            model,
            [
                "[UNUSED_TOKEN_146]user\n",
                prepared(model),
                "Which?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
            ],
        )
        outputs = model.generate(
            inputs_embeds=embeds,
            im_mask=im_mask,
            temperature=1.0,
            max_new_tokens=5,
            num_beams=3,
            do_sample=False,
            repetition_penalty=1.0,
        )
    output = outputs[0]
    assert output[0] == tokenizer.bos_token_id and 2 <= len(output) <= 6
    if output[0] in (0, 1):
        output = output[1:]
    text = tokenizer.decode(output, add_special_tokens=False).split("[UNUSED_TOKEN_145]")[0]
    assert isinstance(text, str)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_converted_to_half_in_place(version, load):
    model = load(version).half()
    embeds, im_mask = vlmevalkit_prompt(model, [prepared(model), "Hi"])
    assert embeds.dtype == model.dtype == model.vit.dtype == torch.float16
    assert model.generate(inputs_embeds=embeds, im_mask=im_mask, max_new_tokens=2).shape[1] >= 2


# --- ms-swift ---


@pytest.mark.parametrize("version", VERSIONS)
def test_swift_template(version, load, tokenizer):
    model = load(version)
    model.model_dir = str(ROOT)
    assert isinstance(model.font, ImageFont.FreeTypeFont)
    frames = ixc_utils.frame2img([picture(), picture(seed=1)], model.font)
    assert ixc_utils.Video_transform(frames, hd_num=4).size[0] % 560 == 0
    images = [prepared(model, seed=seed).to(model.dtype)[0] for seed in range(2)]
    features = torch.concat([model.img2emb(image[None])[0] for image in images], dim=0)
    rows = [torch.tensor(tokenizer("Hi")["input_ids"]), torch.tensor(tokenizer("What is it?")["input_ids"])]
    parts = [
        torch.cat([model.model.tok_embeddings(row), image]) for row, image in zip(rows, features, strict=True)
    ]
    masks = [
        torch.tensor([False] * len(row) + [True] * len(image))
        for row, image in zip(rows, features, strict=True)
    ]
    inputs = {
        "inputs_embeds": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(part)) for part in parts], batch_first=True
        ),
        "im_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=0),
    }
    labels = torch.full(inputs["im_mask"].shape, -100)
    labels[:, 1:4] = 7
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss) and model.vision_proj[0].weight.grad is not None
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_swift_overrides_the_tower_loader(monkeypatch, load):
    called = []
    monkeypatch.setattr(CLIPVisionTower, "load_model", lambda self: called.append(self), raising=True)
    model = load("2.5")
    model.vit.load_model()
    model.vit.resize_pos()
    assert called == [model.vit] and model.vit.is_loaded
    model.vit.vision_tower.gradient_checkpointing_enable()
    model.model.layers[0].attention.__class__.attention_dropout = 0.0
    assert model.encode_img(prepared(model)).shape[0] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_swift_hooks_move_what_tower_and_projector_return(version, load):
    model, seen = load(version), []

    def to_first_device(module, args, kwargs, output):
        first = args[0][0] if isinstance(args[0], list) else args[0]
        seen.append(module)
        if isinstance(output, tuple):
            return output[0].to(first.device), output[1]
        return output.to(first.device)

    for module in (model.vit, model.vision_proj):
        module.register_forward_hook(to_first_device, with_kwargs=True)
    model.img2emb(prepared(model))
    assert seen == [model.vit, model.vision_proj]


# --- InternLM-XComposer-2.0: batch_chat.py ---


def left_padded(model, prompts: list, masks: list, pad_id: int) -> dict:
    """Prompts of different lengths in one batch, padded with the pad embedding as batch_chat.py does."""
    width = max(prompt.shape[1] for prompt in prompts)
    pad = model.model.tok_embeddings(torch.tensor(pad_id))
    embeds, im_masks, attention = [], [], []
    for prompt, mask in zip(prompts, masks, strict=True):
        missing = width - prompt.shape[1]
        embeds.append(torch.cat([pad.repeat(1, missing, 1), prompt], dim=1))
        im_masks.append(torch.cat([torch.zeros(1, missing), mask], dim=1))
        attention.append(torch.cat([torch.zeros(1, missing), torch.ones(1, prompt.shape[1])], dim=1))
    return {
        "inputs_embeds": torch.cat(embeds),
        "im_mask": torch.cat(im_masks).bool(),
        "attention_mask": torch.cat(attention).bool(),
    }


def batch_chat(model, tokenizer, queries, pixels, num_tokens: int, stops: list[int]) -> tuple[list, list]:
    """New tokens of each question alone and of all in a batch."""
    features = model.encode_img(pixels)
    prompts, masks = [], []
    for query, feature in zip(queries, features, strict=True):
        inputs, mask = model.interleav_wrap_chat(
            tokenizer, f"<ImageHere>{query}", feature.unsqueeze(0), [], ""
        )
        prompts.append(inputs["inputs_embeds"])
        masks.append(mask)
    options = {
        "streamer": None,
        "eos_token_id": stops,
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "repetition_penalty": 1.005,
    }
    batch = left_padded(model, prompts, masks, tokenizer.pad_token_id)
    together = model.generate(**batch, **options)
    alone = [
        model.generate(inputs_embeds=prompt, im_mask=mask, **options)
        for prompt, mask in zip(prompts, masks, strict=True)
    ]
    return [row[0, 1:].tolist() for row in alone], together[:, 1:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("version", OLDER)
def test_batch_chat(version, load, tokenizer):
    model = load(version)
    pixels = torch.cat([prepared(model), prepared(model, seed=1)])
    alone, together = batch_chat(model, tokenizer, ["Please describe this.", "Text?"], pixels, 6, [2])
    assert together == [row + [2] * (len(together[0]) - len(row)) for row in alone]


@torch.no_grad()
@needs_published_tokenizer
def test_batch_chat_gives_the_original_tokens(family_model, published):
    model, case = family_model("vl"), read_json(BATCH)
    image = Image.open(golden_directory() / "inputs" / case["image"])
    pixels = model.vis_processor(image)[None].repeat(2, 1, 1, 1)
    alone, together = batch_chat(model, published, case["queries"], pixels, 16, ends(published))
    assert alone == case["single"]
    assert together == case["batch"]


# --- gradio demos ---


class Stream(StoppingCriteria):
    """Collects what the demo would show, and stops at the end of a turn."""

    def __init__(self, stops: list[int]) -> None:
        self.stops, self.seen = stops, []

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        self.seen.append(input_ids[0].tolist())
        return bool(input_ids[0][-1] in self.stops)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradio_chat(version, num_beams, load, tokenizer):
    model = load(version)
    embeds, masks = [], []
    for index, segment in enumerate(["[UNUSED_TOKEN_146]user\n", "Hi"]):
        ids = tokenizer(segment, return_tensors="pt", add_special_tokens=index == 0).input_ids
        embeds.append(model.model.tok_embeddings(ids))
        masks.append(torch.zeros(embeds[-1].shape[:2]))
        image = model.encode_img(prepared(model, seed=index))
        embeds.append(image)
        masks.append(torch.ones(image.shape[:2]))
    stream = Stream(ends(tokenizer))
    output = model.generate(
        inputs_embeds=torch.cat(embeds, dim=1),
        im_mask=torch.cat(masks, dim=1).cpu(),
        max_length=8,
        num_beams=num_beams,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([stream]),
    )[0]
    assert stream.seen[0][0] == tokenizer.bos_token_id and len(stream.seen[0]) == 2
    assert output[0] == tokenizer.bos_token_id and len(output) <= 8
    assert isinstance(tokenizer.decode(output[1:], skip_special_tokens=True), str)
    if num_beams == 1:
        assert output.tolist() == stream.seen[-1]


@torch.no_grad()
def test_gradio_composition(load, tokenizer):
    model = load("2.5", task_adapters=TASKS)
    ids = tokenizer("[UNUSED_TOKEN_146]user\nWrite.[UNUSED_TOKEN_145]\n", return_tensors="pt").input_ids
    options = {"do_sample": True, "num_beams": 1, "max_length": ids.shape[1] + 4, "infer_mode": "write"}
    criteria = get_stopping_criteria([torch.tensor([token]) for token in ends(tokenizer)])
    written = model.generate(ids, stopping_criteria=criteria, **options)
    assert torch.equal(written[:, : ids.shape[1]], ids) and written.shape[1] <= ids.shape[1] + 4
    features = model.encode_img(torch.stack([prepared(model), prepared(model, seed=1)]))
    assert features.shape == (2, model.num_image_tokens(1, 2), 32)
    embeds = torch.cat([model.encode_text("", add_special_tokens=True), features[1][None]], dim=1)
    mask = torch.cat([torch.zeros(1, 1), torch.ones(1, features.shape[1])], dim=1)
    # The demo subtracts the prompt's length from its budget, which may leave nothing.
    outputs = model.generate(inputs_embeds=embeds, im_mask=mask, max_length=10 - embeds.shape[1])
    assert outputs.shape == (1, 2)


@torch.no_grad()
def test_composition_of_2_0_encodes_a_batch_of_squares(load):
    model = load("2")
    model.vit.resize_pos()
    tokens = model.num_image_tokens(1, 1)
    assert model.encode_img(torch.randn(3, 3, SIDE, SIDE)).shape == (3, tokens, 32)


# --- openedai-vision, ipex-llm ---


def stream_text(model, tokenizer, **inputs) -> str:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, streamer=streamer, do_sample=False, max_new_tokens=5)
    text = "".join(streamer)
    assert text == tokenizer.decode(output[0, 1:], skip_special_tokens=True)
    return text


@torch.no_grad()
def test_openedai_vision_2_5(load, tokenizer, path):
    model = load("2.5")
    inputs, im_mask, _ = model.interleav_wrap_chat(
        "<ImageHere>; What?", [path], history=[("Hi", "Hello")], meta_instruction=None, hd_num=2
    )
    assert im_mask.any()
    stream_text(model, tokenizer, **inputs, im_mask=im_mask)


@torch.no_grad()
@pytest.mark.parametrize("version", OLDER)
def test_openedai_vision_of_the_older_generation(version, load, tokenizer, path):
    model = load(version)
    system = ("You are kind.",)  # a client's stray comma
    image = model.encode_img(path, hd_num=2)
    inputs, im_mask = model.interleav_wrap_chat(tokenizer, "<ImageHere>What?", image, [], system)
    stream_text(model, tokenizer, **inputs, im_mask=im_mask)
    text_only = model.build_inputs(tokenizer, "What?", [], system)
    assert text_only["input_ids"].device == model.device
    text_only = {name: value for name, value in text_only.items() if torch.is_tensor(value)}
    assert model.generate(**text_only, do_sample=False, max_new_tokens=2).ndim == 2


# --- taggui ---


@torch.no_grad()
@pytest.mark.parametrize("version", OLDER)
def test_taggui(version, load, tokenizer):
    model = load(version)
    image, *_ = model.img2emb(prepared(model))
    texts = [
        model.model.tok_embeddings(tokenizer(text, return_tensors="pt").input_ids) for text in ("a", "b")
    ]
    embeds = torch.cat([texts[0], image, texts[1]], dim=1)
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    mask[:, texts[0].shape[1] : texts[0].shape[1] + image.shape[1]] = True
    output = model.generate(
        inputs_embeds=embeds, im_mask=mask, eos_token_id=ends(tokenizer), max_new_tokens=3
    )
    assert output[0, 0] == tokenizer.bos_token_id and 2 <= output.shape[1] <= 4


# --- chat: quick starts, lmms-eval ---


@torch.no_grad()
def test_quick_start_of_2_5(load, tokenizer, path):
    model = load("2.5")
    with torch.autocast("cpu", torch.bfloat16):
        options = {"do_sample": False, "num_beams": 3, "use_meta": True, "max_new_tokens": 3, "hd_num": 2}
        response, history = model.chat(tokenizer, "Describe", [path], **options)
        assert history == [("Describe", response)]
        response, history = model.chat(tokenizer, "And?", [path], history=history, **options)
    assert [turn[0] for turn in history] == ["Describe", "And?"] and history[1][1] == response


@torch.no_grad()
@pytest.mark.parametrize("version", OLDER)
def test_quick_start_of_the_older_generation(version, load, tokenizer, path):
    model = load(version)
    options = {"hd_num": 2, "num_beams": 3} if version == "2-4khd" else {}
    response, history = model.chat(
        tokenizer,
        query="<ImageHere>What?",
        image=path,
        history=[],
        do_sample=False,
        max_new_tokens=3,
        **options,
    )
    assert isinstance(response, str) and history == [("<ImageHere>What?", response)]
    if version == "2":
        call = {"do_sample": False, "max_new_tokens": 3}
        assert model.chat(tokenizer, "<ImageHere>What?", path, [], **call) == (response, history)
        assert model.chat(tokenizer, "<ImageHere>What?", prepared(model), **call) == (response, history)


@torch.no_grad()
def test_lmms_eval(load, tokenizer, path):
    model = load("2.5").half().eval()
    context = "Image0 <ImageHere>; Image1 <ImageHere>; Compare."
    options = {"do_sample": False, "num_beams": 1, "use_meta": True, "max_new_tokens": 2}
    response, _ = model.chat(tokenizer, context, [path, path], **options)
    assert isinstance(response, str)


# --- parts by their names ---


DEVICE_MAP = ("vit", "vision_proj", "model.tok_embeddings", "plora_glb_GN", "plora_sub_GN", "model.norm")


@pytest.mark.parametrize("version", VERSIONS)
def test_published_device_maps_cover_the_model(version, load):
    model = load(version, task_adapters=TASKS if version == "2.5" else {})
    layers = [f"model.layers.{index}" for index in range(len(model.model.layers))]
    covering = [*DEVICE_MAP, "output", *layers]
    names = [*dict(model.named_parameters()), *dict(model.named_buffers()), *model.state_dict()]
    uncovered = {
        name for name in names if not any(name == part or name.startswith(f"{part}.") for part in covering)
    }
    assert {name for name in uncovered if "position_ids" not in name} == set()


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_published_device_maps_dispatch_the_model(version, load, tokenizer):
    model = load(version)
    pixels = prepared(model)
    expected = model.encode_img(pixels)
    parts = ["vit", "vision_proj", "model.tok_embeddings", "model.norm", "output"]
    parts += ["plora_glb_GN", "plora_sub_GN"] if model.config.is_tiled else []
    parts += [f"model.layers.{index}" for index in range(len(model.model.layers))]
    model = dispatch_model(model, device_map=dict.fromkeys(parts, "cpu"), force_hooks=True)
    torch.testing.assert_close(model.encode_img(pixels), expected)
    query, image = "<ImageHere>What?", picture()
    response, _ = model.chat(tokenizer, query, image, hd_num=2, do_sample=False, max_new_tokens=2)
    assert isinstance(response, str)


@pytest.mark.parametrize("version", VERSIONS)
def test_attributes_that_clients_read(version, load):
    model = load(version)
    layer = model.model.layers[0]
    for linear in (
        layer.attention.wqkv,
        layer.attention.wo,
        *(getattr(layer.feed_forward, f"w{i}") for i in "123"),
    ):
        assert linear.weight.ndim == 2
    tower = model.vit.vision_tower.vision_model
    assert tower.embeddings.position_embedding.weight.shape[0] == model.vit.num_patches + 1
    assert tower.encoder.layers[0].__class__.__name__ == "CLIPEncoderLayer"
    tower.post_layernorm = torch.nn.Identity()
    assert model.vit.is_loaded and model.vit.vision_tower_name and model.vit.select_feature == "patch"
    assert model.vit.hidden_size == model.vit.config.hidden_size
    assert model.get_input_embeddings() is model.model.tok_embeddings
    assert model.get_output_embeddings() is model.output and model.get_decoder() is model.model
    model.config.use_cache, model.config.max_length = False, 2048
    model.enable_input_require_grads()
    assert isinstance(model.max_length, int) and model.im_size == model.config.img_size == SIDE
    hidden = model.model(
        input_ids=None,
        attention_mask=torch.ones(1, 3),
        position_ids=None,
        past_key_values=None,
        inputs_embeds=model.encode_text("abc")[:, :3],
        im_mask=torch.zeros(1, 3),
    )[0]
    assert model.output(hidden).shape[-1] == model.vocab_size


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_the_tower_alone(version, load):
    model = load(version)
    images = [prepared(model), prepared(model, seed=1)]
    if model.config.is_tiled:
        embeds, split = model.vit(images, model.plora_glb_GN, model.plora_sub_GN)
        assert split == [model.num_image_tokens(1, 2)] * 2 and all(type(n) is int for n in split)
        pieces = torch.split(model.vision_proj(embeds), split, dim=1)
    else:
        listed = model.vit(images)
        torch.testing.assert_close(torch.cat(listed), model.vit(torch.cat(images)))
        pieces = [model.vision_proj(piece) for piece in listed]
    for piece, image in zip(pieces, images, strict=True):
        torch.testing.assert_close(piece, model.encode_img(image), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lmdeploy_loads_only_the_vision_part(load, tmp_path):
    whole = load("2.5")
    whole.save_pretrained(tmp_path)
    with init_empty_weights():
        model = InternLMXComposer2ForCausalLM(whole.config)
        model.vit.load_model()
        model.vit.resize_pos()
        model.vit.vision_tower.vision_model.post_layernorm.to_empty(device="cpu").half()
    del model.model
    del model.output
    options = {"no_split_module_classes": ["CLIPEncoderLayer"], "dtype": torch.float32}
    load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"}, **options)
    pixels = prepared(whole)
    embeds, split = model.vit([pixels, pixels], model.plora_glb_GN, model.plora_sub_GN)
    for piece in torch.split(model.vision_proj(embeds), split, dim=1):
        torch.testing.assert_close(piece, whole.encode_img(pixels))


@pytest.mark.slow
def test_ixc_utils_is_a_standalone_module(tmp_path):
    code = (
        "from io import BytesIO; from PIL import Image\n"
        "from ixc_utils import HD_transform, Image_transform, R560_HD18_Identity_transform\n"
        "from ixc_utils import Video_transform, frame2img, get_font, load_video\n"
        "picture = Image.new('RGB', (90, 60))\n"
        "assert HD_transform(picture, hd_num=9).size[0] % 336 == 0\n"
        "assert Image_transform(picture, hd_num=4).size == (560, 560)\n"
        "assert len(load_video([picture] * 3)) == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
def test_files_load_as_remote_code(tmp_path):
    code = (
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module as get\n"
        "import sys\n"
        "tower = get('build_mlp.CLIPVisionTower', sys.argv[1])\n"
        "tower.load_model = lambda self: None\n"
        "assert get('modeling_internlm_xcomposer2.get_font', sys.argv[1])().size == 40\n"
        "model = get('modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM', sys.argv[1])\n"
        "assert model.encode_img and model.interleav_wrap_chat\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, env=environment, check=True, timeout=120
    )


def test_load_video_reads_what_swift_has_in_memory():
    video = golden_directory() / "inputs" / "tall_3s.mp4"
    frames = ixc_utils.load_video(BytesIO(video.read_bytes()))
    assert [type(frame) for frame in frames] == [Image.Image] * len(frames) and frames
