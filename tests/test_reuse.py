"""What the history that `chat` returns keeps, when it is used again, and that answers stay the same."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager

import pytest
import torch
from helpers import golden_directory, prompt_with_pictures, random_pictures, tiny_model
from internlm_xcomposer2.prompt_internlm_xcomposer2 import plan_chat, system_text
from PIL import Image

GREEDY = {"do_sample": False, "max_new_tokens": 6}
MARK = "<ImageHere>"


def picture(shade: int = 0) -> Image.Image:
    image = Image.open(golden_directory() / "inputs" / "small.png").convert("RGB")
    image.putpixel((0, 0), (shade, 0, 0))
    return image


@contextmanager
def counted(model):
    """(batch, tokens) of every run of the decoder, and the number of tiles of every run of the tower."""
    runs, tiles = [], []

    def note(module, arguments, kwargs):
        size = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        runs.append(tuple(size.shape[:2]))

    handles = [
        model.model.register_forward_pre_hook(note, with_kwargs=True),
        model.vit.vision_tower.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0]))),
    ]
    try:
        yield runs, tiles
    finally:
        for handle in handles:
            handle.remove()


def prompt_tokens(runs) -> int:
    """How many tokens of the prompt were computed: the runs before the last one, and its last token."""
    return sum(tokens for _, tokens in runs if tokens > 1) + 1


@pytest.mark.parametrize("version", ["2", "2-4khd", "2.5"])
def test_a_second_turn_computes_only_what_is_new(version, tokenizer):
    model, question = tiny_model(version), f"{MARK}what?"
    first, history = model.chat(tokenizer, question, picture(), **GREEDY)
    with counted(model) as (runs, tiles):
        second = model.chat(tokenizer, "and?", picture(), history=history, **GREEDY)
    kept = history.prompt_cache.tokens
    whole = plan_chat(
        model.config,
        tokenizer,
        "and?",
        picture(),
        None,
        history,
        system_text(model.config.version, None, "x"),
    )
    assert not tiles
    assert 1 < prompt_tokens(runs) < 30 < len(kept)
    with counted(model) as (runs, tiles):
        assert model.chat(tokenizer, "and?", picture(), history=list(history), **GREEDY) == second
    assert sum(tiles) and prompt_tokens(runs) > len(whole.ids) - 40
    assert model.chat(tokenizer, "and?", picture(), history=history, reuse=False, **GREEDY) == second
    third = model.chat(tokenizer, "why?", picture(), history=second[1], **GREEDY)
    assert third == model.chat(tokenizer, "why?", picture(), history=second[1], reuse=False, **GREEDY)


def test_a_picture_is_recognised_by_its_content(model, tokenizer, tmp_path):
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)
    picture().save(tmp_path / "same.png")
    with counted(model) as (runs, tiles):
        model.chat(tokenizer, "and?", str(tmp_path / "same.png"), history=history, **GREEDY)
    assert not tiles
    with counted(model) as (runs, tiles):
        other = model.chat(tokenizer, "and?", picture(shade=255), history=history, **GREEDY)
    assert tiles and prompt_tokens(runs) > history.prompt_cache.tokens.count(1)
    assert other == model.chat(tokenizer, "and?", picture(255), history=list(history), **GREEDY)
    with counted(model) as (_, tiles):
        model.chat(tokenizer, "and?", picture(), hd_num=1, history=history, **GREEDY)
    assert tiles == [
        1
    ]  # cut differently, so a different picture to the decoder; its one tile is also its global view


def test_a_new_picture_in_a_later_turn_is_the_only_one_encoded(model, tokenizer):
    ask = {"hd_num": 1, **GREEDY}
    _, history = model.chat(tokenizer, f"{MARK}what?", [picture()], **ask)
    images = [picture(), picture(shade=9)]
    with counted(model) as (_, tiles):
        answer = model.chat(tokenizer, f"and {MARK}?", images, history=history, **ask)
    assert tiles == [1]  # the one tile of a square is also its global view
    assert answer == model.chat(tokenizer, f"and {MARK}?", images, history=list(history), **ask)


def test_a_video_is_recognised(model, tokenizer):
    frames = [Image.new("RGB", (80, 60), (40 * i, 0, 0)) for i in range(3)]
    _, history = model.chat(tokenizer, "what?", [frames], **GREEDY)
    with counted(model) as (_, tiles):
        model.chat(tokenizer, "and?", [[frame.copy() for frame in frames]], history=history, **GREEDY)
    assert not tiles
    with counted(model) as (_, tiles):
        model.chat(tokenizer, "and?", [frames[:2]], history=history, **GREEDY)
    assert tiles


@pytest.mark.parametrize("edit", ["question", "answer", "dropped", "slice", "none"])
def test_edited_histories(model, tokenizer, edit):
    history = []
    for question in (f"{MARK}one?", "two?"):
        _, history = model.chat(tokenizer, question, picture(), history=history, **GREEDY)
    if edit == "question":
        history[1] = ("three?", history[1][1])
    elif edit == "answer":
        history[0] = (history[0][0], "blue")
    elif edit == "dropped":
        history.pop()
    elif edit == "slice":
        history = history[:1]
    assert history.prompt_cache is not None
    with counted(model) as (_, tiles):
        answer = model.chat(tokenizer, "four?", picture(), history=history, **GREEDY)
    assert not tiles
    assert answer == model.chat(tokenizer, "four?", picture(), history=list(history), **GREEDY)


@pytest.mark.parametrize("image", [None, []])
def test_text_alone(model, tokenizer, image):
    ask = {"repetition_penalty": 1.3, **GREEDY}
    _, history = model.chat(tokenizer, "what is a word of many?", image, **ask)
    with counted(model) as (runs, _):
        answer = model.chat(tokenizer, "and?", image, history=history, **ask)
    whole = plan_chat(model.config, tokenizer, "and?", image, None, history).ids
    assert prompt_tokens(runs) < len(whole) - 10
    assert answer == model.chat(tokenizer, "and?", image, history=list(history), **ask)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 2.0, "top_p": 1.0},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_beams_and_sampling(model, tokenizer, settings):
    ask = {"max_new_tokens": 6, **settings}
    _, history = model.chat(tokenizer, "what?", picture(), **ask)
    answers = []
    for earlier in (history, list(history)):
        torch.manual_seed(3)
        with counted(model) as (_, tiles):
            answers.append(model.chat(tokenizer, "and?", picture(), history=earlier, **ask))
        assert bool(tiles) is (earlier is not history)
    assert answers[0] == answers[1]
    assert all(len(tensor) == 1 for layer in history.prompt_cache.layers for tensor in layer)


def test_copies_continue_independently(model, tokenizer):
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)
    histories = [history, history.copy(), copy.copy(history), copy.deepcopy(history), history + []]
    before = [tuple(tensor.clone() for tensor in layer) for layer in history.prompt_cache.layers]
    questions = ["one?", "two?", "three?", "four?", "five?"]
    answers = [
        model.chat(tokenizer, question, picture(), history=own, **GREEDY)
        for question, own in zip(questions, histories, strict=True)
    ]
    for question, answer in zip(questions, answers, strict=True):
        assert answer == model.chat(tokenizer, question, picture(), history=list(history), **GREEDY)
    for layer, old in zip(history.prompt_cache.layers, before, strict=True):
        torch.testing.assert_close(layer, old, rtol=0, atol=0)
    restored = pickle.loads(pickle.dumps(history))
    assert restored == history and restored.prompt_cache is None


def test_another_model_mode_or_weight_computes_again(tokenizer):
    adapters = {"sft": 2, "dpo": 2, "web": 2}
    model = tiny_model("2.5", task_adapters=adapters)
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)

    def is_reused(model, **settings) -> bool:
        with counted(model) as (_, tiles):
            answer = model.chat(tokenizer, "and?", picture(), history=history, **GREEDY, **settings)
        assert answer == model.chat(tokenizer, "and?", picture(), history=list(history), **GREEDY, **settings)
        return not tiles

    assert is_reused(model)
    assert not is_reused(tiny_model("2.5", task_adapters=adapters))
    assert not is_reused(model, infer_mode="web")
    with torch.no_grad():
        model.model.layers[0].attention.wqkv.linear.weight.mul_(1.5)
    assert not is_reused(model)
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)
    assert is_reused(model)
    model.bfloat16()
    assert not is_reused(model)
    model.float().train()
    assert model.chat(tokenizer, "and?", picture(), history=history, **GREEDY)[1].prompt_cache is None


def test_a_limit_bounds_what_is_kept(tokenizer):
    model = tiny_model("2.5")
    _, history = model.chat(tokenizer, f"what {MARK}?", picture(), **GREEDY)
    whole = history.prompt_cache.nbytes
    model.reuse_limit = whole // 3
    _, history = model.chat(tokenizer, f"what {MARK}?", picture(), **GREEDY)
    assert 0 < history.prompt_cache.nbytes <= whole // 3
    storages = {t.untyped_storage() for layer in history.prompt_cache.layers for t in layer}
    assert sum(storage.nbytes() for storage in storages) <= model.reuse_limit
    answer = model.chat(tokenizer, "and?", picture(), history=history, **GREEDY)
    assert answer == model.chat(tokenizer, "and?", picture(), history=list(history), **GREEDY)
    model.reuse_limit = 0
    assert model.chat(tokenizer, "what?", picture(), **GREEDY)[1].prompt_cache is None


def test_dropping_the_history_frees_the_memory(model, tokenizer):
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)
    keys = weakref.ref(history.prompt_cache.layers[0][0])
    del history
    gc.collect()
    assert keys() is None
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)
    keys = weakref.ref(history.prompt_cache.layers[0][0])
    history.release()
    gc.collect()
    assert keys() is None and len(history) == 1
    assert model.chat(tokenizer, "what?", picture(), reuse=False, **GREEDY)[1].prompt_cache is None


def test_positions_that_depend_on_the_length_are_computed_again(tokenizer):
    model = tiny_model("2.5", max_position_embeddings=160, rope_scaling={"type": "dynamic", "factor": 4.0})
    ask = {"hd_num": 4, **GREEDY}
    _, history = model.chat(tokenizer, "what?", picture(), **ask)
    with counted(model) as (_, tiles):
        _, history = model.chat(tokenizer, "and?", picture(), history=history, **ask)
    assert not tiles  # within the trained length
    long = "word " * 120
    with counted(model) as (_, tiles):
        answer = model.chat(tokenizer, long, picture(), history=history, **ask)
    assert tiles
    assert answer == model.chat(tokenizer, long, picture(), history=list(history), **ask)
    with counted(model) as (_, tiles):
        model.chat(tokenizer, "?", picture(), history=answer[1], **ask)
    assert tiles


def test_a_failed_call_leaves_the_history_as_it_was(model, tokenizer):
    _, history = model.chat(tokenizer, "what?", picture(), **GREEDY)
    kept = history.prompt_cache
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.chat(tokenizer, "and?", picture(), history=history, **GREEDY)
    handle.remove()
    assert history.prompt_cache is kept
    answer = model.chat(tokenizer, "and?", picture(), history=history, **GREEDY)
    assert answer == model.chat(tokenizer, "and?", picture(), history=list(history), **GREEDY)


def library_only(**settings) -> dict:
    """Arguments that keep `generate` from computing the prompt once beforehand."""
    return {"cache_implementation": "dynamic", **settings}


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("way", ["ids", "pictures", "embeddings"])
def test_beams_prefill_once(model, settings, way):
    """The same sequences and scores as with every beam computing the prompt, also in a padded batch."""
    grids = [(1, 2), (2, 1)]
    rows = [prompt_with_pictures(model, [grid], seed) for seed, grid in enumerate(grids)]
    longest = max(len(row) for row in rows) + 2
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    inputs = {"attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])}
    pixel_values, image_grid_hw = random_pictures(model, grids)
    if way == "ids":
        inputs["input_ids"] = ids.clamp(min=7)
    elif way == "pictures":
        inputs |= {"input_ids": ids, "pixel_values": pixel_values, "image_grid_hw": image_grid_hw}
    else:
        embeds, im_mask = model.embed_inputs(ids, pixel_values, image_grid_hw)
        inputs |= {"inputs_embeds": embeds, "im_mask": im_mask}
    ask = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 2, **settings}
    ask |= {"return_dict_in_generate": True, "output_scores": True}
    with counted(model) as (runs, _):
        once = model.generate(**inputs, **ask)
    copies = settings["num_beams"]
    assert runs[0] == (2, longest - 1) and set(runs[1:]) == {(2 * copies, 1)}
    with counted(model) as (runs, _):
        expected = model.generate(**inputs, **library_only(**ask))
    assert runs[0] == (2 * copies, longest)
    assert torch.equal(once.sequences, expected.sequences)
    torch.testing.assert_close(once.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-5)


def test_a_padded_batch_of_embeddings_is_penalised_like_single_rows(model):
    rows = [prompt_with_pictures(model, [(1, 1)], seed) for seed in range(2)]
    rows[1] = rows[1] + rows[1][-3:] * 4
    longest = max(len(row) for row in rows)
    pixel_values, grids = random_pictures(model, [(1, 1), (1, 1)])
    ask = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.5, "pad_token_id": 2}
    batch = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    embeds, im_mask = model.embed_inputs(batch, pixel_values, grids)
    together = model.generate(inputs_embeds=embeds, im_mask=im_mask, attention_mask=mask, **ask)
    for row, start, answer in zip(range(2), mask.long().argmax(1).tolist(), together.tolist(), strict=True):
        alone = model.generate(
            inputs_embeds=embeds[row : row + 1, start:], im_mask=im_mask[row : row + 1, start:], **ask
        )[0].tolist()
        assert answer[: len(alone)] == alone and set(answer[len(alone) :]) <= {2}
