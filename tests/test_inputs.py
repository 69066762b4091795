"""Wrong tensors are refused by every method that takes them, before anything is computed."""

import pytest
import torch
from first_generation import tiny_first
from helpers import tiny_model

META = torch.device("meta")
BUILDERS = {"2.5": tiny_model, "1.0": tiny_first}


class Prompt:
    """A prompt with one picture, for a model whose parts must not run."""

    def __init__(self, model) -> None:
        config, text = model.config, model.config.text_config
        tiles = 2 if config.is_tiled else 1
        self.model = model
        self.pixels = torch.rand(tiles, 3, config.img_size, config.img_size)
        self.grid = torch.tensor([[1, 1]])
        marks = [config.image_token_id] * model.num_image_tokens(1, 1)
        self.ids = torch.tensor([[1, *marks, 5]])
        self.embeds = torch.rand(1, 4, text.hidden_size)
        self.vocab_size = text.vocab_size
        self.ones = torch.ones(1, self.ids.shape[1], dtype=torch.long)


@pytest.fixture(scope="module", params=BUILDERS)
def prompt(request):
    return Prompt(BUILDERS[request.param]().eval())


@pytest.fixture
def idle(prompt, monkeypatch):
    """The prompt, in whose model everything that computes is an error of the test."""

    def compute(*args, **kwargs):
        raise AssertionError("computed before the check")

    tower = prompt.model.vit if prompt.model.config.version != "1.0" else prompt.model.visual_encoder
    monkeypatch.setattr(tower, "forward", compute)
    decoder = getattr(prompt.model, "internlm_model", prompt.model).model
    for layer in decoder.layers:
        monkeypatch.setattr(layer, "forward", compute)
    return prompt


def nan_in(pixels: torch.Tensor, value: float) -> torch.Tensor:
    wrong = pixels.clone()
    wrong[-1, -1, -1, -1] = value
    return wrong


PIXELS = {
    "meta": (lambda p: p.to(META), ValueError, "pixel_values has no values"),
    "a NaN": (lambda p: nan_in(p, float("nan")), ValueError, "pixel_values contain NaN"),
    "an infinity": (lambda p: nan_in(p, -float("inf")), ValueError, "pixel_values contain NaN or infinity"),
    "bytes": (lambda p: (p * 255).byte(), TypeError, "pixel_values must be floats, not torch.uint8"),
    "complex": (lambda p: p.to(torch.complex64), TypeError, "pixel_values must be floats"),
    "a list": (lambda p: p.tolist(), TypeError, "pixel_values must be a tensor, not list"),
    "an array": (lambda p: p.numpy(), TypeError, "pixel_values must be a tensor, not ndarray"),
    "one too many": (lambda p: torch.cat([p, p[:1]]), ValueError, r"tiles|pictures|image tokens"),
    "no side": (lambda p: p[..., :0], ValueError, "pixel_values have the shape"),
}
IDS = {
    "meta": (lambda ids: ids.to(META), ValueError, "input_ids has no values"),
    "floats": (lambda ids: ids.float(), TypeError, "input_ids must be integers"),
    "bools": (lambda ids: ids > 1, TypeError, "input_ids must be integers"),
    "one row": (lambda ids: ids[0], ValueError, "input_ids must be"),
    "negative": (lambda ids: -ids, ValueError, "input_ids contain -"),
    "large": (lambda ids: ids + 10**6, ValueError, "input_ids contain 100"),
    "none": (lambda ids: ids[:, :0], ValueError, "input_ids must be"),
}
EMBEDS = {
    "meta": (lambda e: e.to(META), ValueError, "inputs_embeds has no values"),
    "narrow": (lambda e: e[..., :-1], ValueError, r"inputs_embeds must be \(batch, tokens"),
    "one row": (lambda e: e[0], ValueError, "inputs_embeds must be"),
    "none": (lambda e: e[:, :0], ValueError, "inputs_embeds must be"),
    "integers": (lambda e: e.long(), TypeError, "inputs_embeds must be floats"),
    "a list": (lambda e: e.tolist(), TypeError, "inputs_embeds must be a tensor"),
}
# Of (1, tokens), whatever it stands for.
PER_TOKEN = {
    "meta": (lambda ones: ones.to(META), ValueError, "has no values"),
    "too short": (lambda ones: ones[:, 1:], ValueError, r"ha(s|ve) the shape"),
    "too many rows": (lambda ones: ones.repeat(2, 1), ValueError, r"ha(s|ve) the shape"),
    "a list": (lambda ones: ones.tolist(), TypeError, "must be a tensor, not list"),
    "a text": (lambda ones: "x", TypeError, "must be a tensor, not str"),
}


def cases(table: dict):
    return pytest.mark.parametrize(("change", "error", "message"), table.values(), ids=table)


def call_of(model, method: str):
    return {
        "forward": model,
        "generate": lambda **inputs: model.generate(max_new_tokens=2, do_sample=False, **inputs),
        "embed_inputs": model.embed_inputs,
    }[method]


@pytest.mark.parametrize("method", ["forward", "generate", "embed_inputs"])
@cases(PIXELS)
def test_pixels(method, change, error, message, idle):
    wrong = change(idle.pixels)
    with pytest.raises(error, match=message):
        call_of(idle.model, method)(input_ids=idle.ids, pixel_values=wrong, image_grid_hw=idle.grid)
    if message != PIXELS["one too many"][2]:
        with pytest.raises(error, match=message):
            idle.model.get_image_features(wrong, idle.grid)


@pytest.mark.parametrize("method", ["forward", "generate", "embed_inputs"])
@cases(IDS)
def test_ids(method, change, error, message, idle):
    with pytest.raises(error, match=message):
        call_of(idle.model, method)(input_ids=change(idle.ids))


@pytest.mark.parametrize("method", ["forward", "generate"])
@cases(EMBEDS)
def test_embeddings(method, change, error, message, idle):
    with pytest.raises(error, match=message):
        call_of(idle.model, method)(inputs_embeds=change(idle.embeds))


@pytest.mark.parametrize("name", ["attention_mask", "im_mask", "labels", "position_ids"])
@cases(PER_TOKEN)
def test_what_each_token_has(name, change, error, message, idle):
    picture = {"pixel_values": idle.pixels, "image_grid_hw": idle.grid}
    for inputs in ({"input_ids": idle.ids, **picture}, {"input_ids": torch.ones_like(idle.ids)}):
        if name in ("attention_mask", "position_ids") and "pixel_values" in inputs:
            continue  # the picture is encoded by then
        with pytest.raises(error, match=message):
            idle.model(**inputs, **{name: change(idle.ones)})


@cases(PER_TOKEN)
def test_the_mask_of_generate(change, error, message, idle):
    with pytest.raises(error, match=message):
        call_of(idle.model, "generate")(input_ids=torch.ones_like(idle.ids), attention_mask=change(idle.ones))


@pytest.mark.parametrize("name", ["labels", "position_ids"])
def test_numbers_of_the_wrong_kind(name, idle):
    with pytest.raises(TypeError, match=f"{name} must be integers"):
        idle.model(input_ids=torch.ones_like(idle.ids), **{name: idle.ones.float()})


@pytest.mark.parametrize("label", [-1, -101, 10**6])
def test_labels_outside_of_the_vocabulary(label, idle):
    labels = idle.ones.clone()
    labels[0, 1:3] = torch.tensor([-100, label])
    message = f"labels contain {label}, but the vocabulary has the ids 0 to {idle.vocab_size - 1}"
    with pytest.raises(ValueError, match=message):
        idle.model(input_ids=torch.ones_like(idle.ids), labels=labels)


def test_a_mask_of_integers_for_each_pair_of_tokens(idle):
    mask = torch.ones(1, 1, idle.ids.shape[1], idle.ids.shape[1], dtype=torch.long)
    with pytest.raises(TypeError, match="4-d attention_mask must be bool or float"):
        idle.model(input_ids=torch.ones_like(idle.ids), attention_mask=mask)


@torch.no_grad()
def test_what_is_right_is_accepted(prompt):
    picture = {"input_ids": prompt.ids, "pixel_values": prompt.pixels, "image_grid_hw": prompt.grid}
    length = prompt.ids.shape[1]
    plain = prompt.model(**picture).logits
    positions = torch.arange(length)[None]
    for mask in (prompt.ones, prompt.ones.bool(), prompt.ones.float()):
        found = prompt.model(**picture, attention_mask=mask, position_ids=positions, labels=prompt.ones)
        torch.testing.assert_close(found.logits, plain)
    square = torch.ones(1, 1, length, length).tril().bool()
    torch.testing.assert_close(prompt.model(**picture, attention_mask=square).logits, plain)
    assert prompt.model.get_image_features(prompt.pixels.half().float(), prompt.grid).pooler_output
