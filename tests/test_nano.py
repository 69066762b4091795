"""Nano: what it is trained on, that training learns, and that the checkpoint in the root answers."""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.nano import stages, train  # noqa: E402
from tools.nano.dense import NAMES, grid_labels, mark_table, to_tile  # noqa: E402
from tools.nano.fonts import BUILT_IN, SPLITS, split_of  # noqa: E402
from tools.nano.pictures import TILE, draw_text  # noqa: E402
from tools.nano.questions import ABILITIES, every_text  # noqa: E402
from tools.nano.samples import draw_sample, segments  # noqa: E402
from tools.nano.words import random_string, split_of_string  # noqa: E402

FAMILIES = [[BUILT_IN]]


def arguments(folder: Path, **changes) -> argparse.Namespace:
    """Those of a training run of a few steps in one process."""
    fixed = {
        "out": folder,
        "root": ROOT,
        "processes": 1,
        "minutes": 1.0,
        "seed": 0,
        "fonts": None,
        "tower": None,
    }
    return argparse.Namespace(**{**fixed, "validate_every": 100, "muon_lr": 0.02, "batch": 8, **changes})


# ---- drawing ----


@pytest.mark.parametrize("ability", [*ABILITIES, "object"])
def test_a_seed_draws_the_same_sample_again(ability):
    first, second = (draw_sample(ability, "train", random.Random(7), FAMILIES) for _ in range(2))
    assert first.turns == second.turns
    for one, other in zip(first.pictures, second.pictures, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.marks == other.marks


@pytest.mark.parametrize("kind", ["number", "word"])
def test_no_string_of_two_characters_or_more_is_drawn_in_two_splits(kind):
    drawn = {}
    for split in SPLITS:
        rng = random.Random(split)
        strings = {random_string(kind, split, rng) for _ in range(1000)}
        drawn[split] = {text for text in strings if len(text) > 1}
        assert {split_of_string(text) for text in drawn[split]} == {split}
    assert not drawn["train"] & drawn["held_back"]


def test_relatives_of_held_back_fonts_are_held_back_too():
    assert {split_of(Path(name)) for name in ("DejaVuSans.ttf", "Hack-Bold.ttf", "Lato-Regular.ttf")} == {
        "held_back"
    }
    assert split_of(Path("LiberationSans-Regular.ttf")) == "train"
    assert split_of(Path("OpenSans-Regular.ttf")) == "validation"


@pytest.mark.parametrize(("split", "parity"), [("train", 0), ("held_back", 1)])
def test_sizes_and_positions_of_objects_have_the_parity_of_their_split(split, parity):
    rng = random.Random(1)
    for _ in range(50):
        (mark,) = draw_sample("shape", split, rng, FAMILIES).pictures[0].marks
        left, top, right, _ = mark.box
        assert {left % 2, top % 2, (right - left) % 2} == {parity}


def test_marks_lie_on_what_was_drawn():
    """Pixels under a character's mark differ from those of an empty picture; the labels name it."""
    picture = draw_text(random.Random(3), "train", "HX", FAMILIES)
    tile, labels = to_tile(picture)
    assert tile.shape == (TILE, TILE, 3)
    assert {NAMES[label] for label in np.unique(labels[0])} == {"", "H", "X"}
    pixels = np.asarray(picture.image.convert("L"), int)
    for mark in picture.marks:
        left, top, right, bottom = (int(edge) for edge in mark.box)
        inside = pixels[top:bottom, left:right]
        assert inside.max() - inside.min() > 60


def test_labels_of_a_tile_follow_its_corner():
    picture = draw_text(random.Random(3), "train", "8", FAMILIES)
    marks = mark_table(picture, 1.0)
    left, top, right, bottom = marks[0, :4]
    middle = ((left + right) / 2 - TILE / 2, (top + bottom) / 2 - TILE / 2)
    assert grid_labels(marks, *middle)[0, 8, 8] == NAMES.index("8")
    assert not grid_labels(marks, right + 1, top)[0].any()


def test_training_prompts_are_those_of_chat():
    """What the joint stage feeds the model is what `chat` would, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    rng = random.Random(2)
    for ability in ("word", "which"):
        sample = draw_sample(ability, "held_back", rng, FAMILIES)  # one turn
        ids = [tokenizer.bos_token_id]
        for text, is_answer in segments(sample):
            if text is None:
                ids += [model.config.image_token_id] * model.num_image_tokens(1, 1)
            elif not is_answer:
                ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        images = [picture.image for picture in sample.pictures]
        inputs = model.prepare_chat(tokenizer, sample.turns[0][0], images, 1, [], "")
        assert inputs["input_ids"][0].tolist() == ids
        tiles = [stages.normalise(to_tile(picture)[0][None])[0] for picture in sample.pictures]
        torch.testing.assert_close(inputs["pixel_values"][1::2], torch.stack(tiles), rtol=0, atol=1e-4)


def test_the_tokenizer_knows_every_wording():
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    for text in every_text():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


# ---- training ----


def test_the_quickened_model_computes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_fonts", lambda *_: FAMILIES)
    monkeypatch.setattr(stages, "draw_unseen", lambda _: [])
    stage = stages.JointStage(arguments(tmp_path), random.Random(0))
    for name, parameter in stage.model.named_parameters():
        if "Plora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    plain = stages.InternLMXComposer2ForCausalLM(stage.model.config).eval()
    plain.load_state_dict(stage.model.state_dict())
    sample = draw_sample("which", "train", random.Random(4), FAMILIES)
    with torch.no_grad():
        features, prompts, _ = stage.encode([sample])
        loss, *_ = stage.answers_loss(features, prompts)
        ids = torch.tensor([prompts[0].ids])
        span = prompts[0].answers[0]
        labels = torch.full_like(ids, -100)
        labels[0, span.start + 1 : span.stop + 1] = ids[0, span.start + 1 : span.stop + 1]
        tiles = stages.normalise(np.stack([to_tile(picture)[0] for picture in sample.pictures]))
        pixels, grids = tiles.repeat_interleave(2, dim=0), torch.ones(2, 2, dtype=torch.long)
        expected = plain(input_ids=ids, pixel_values=pixels, image_grid_hw=grids, labels=labels).loss
    torch.testing.assert_close(loss[0], expected, rtol=0, atol=1e-4)


def test_a_few_steps_lower_the_loss_and_a_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_fonts", lambda *_: FAMILIES)
    monkeypatch.setattr(stages, "draw_unseen", lambda _: _unseen())
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    threads = torch.get_num_threads()
    train.work(0, arguments(tmp_path, stage="joint", steps=16))
    losses = [line["loss"] for line in _log(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    train.work(0, arguments(tmp_path, stage="joint", steps=17))
    torch.set_num_threads(threads)
    assert _log(tmp_path)[-1]["step"] == 17


def _unseen() -> list:
    rng = random.Random(0)
    return [draw_sample(ability, "validation", rng, FAMILIES) for ability in ABILITIES]


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- the checkpoint ----


def test_the_checkpoint_answers_held_back_questions(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    right = []
    for ability in ABILITIES:
        rng = random.Random(f"test {ability}")
        for number in range(7):
            sample = draw_sample(ability, "held_back", rng, FAMILIES)
            paths = [tmp_path / f"{ability}{number}_{place}.png" for place in range(len(sample.pictures))]
            for path, picture in zip(paths, sample.pictures, strict=True):
                picture.image.save(path)
            question, answer = sample.turns[0]
            right.append(
                model.chat(tokenizer, question, paths, do_sample=False, max_new_tokens=12)[0] == answer
            )
    assert np.mean(right) >= 0.9


def test_the_checkpoint_is_small():
    assert (ROOT / "model.safetensors").stat().st_size <= 8_000_000
