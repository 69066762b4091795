"""Nano: what it is trained on, that training learns, and that the checkpoint in the root answers."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.nano import asides, export, stages, train  # noqa: E402
from tools.nano.dense import NAMES, grid_labels, mark_table  # noqa: E402
from tools.nano.fonts import BUILT_IN, SPLITS, split_of  # noqa: E402
from tools.nano.pictures import TILE, draw_text  # noqa: E402
from tools.nano.prompts import cut, make_prompt, tiles_of  # noqa: E402
from tools.nano.questions import ABILITIES, every_text  # noqa: E402
from tools.nano.samples import Drawer, Sample  # noqa: E402
from tools.nano.stages import StageArguments  # noqa: E402
from tools.nano.talk import PAGE, article, web_page  # noqa: E402
from tools.nano.train_tokenizer import train as train_tokenizer  # noqa: E402
from tools.nano.words import KINDS, random_string, split_of_string  # noqa: E402

FAMILIES = [[BUILT_IN]]


def draw(ability: str, split: str, rng: random.Random) -> Sample:
    return Drawer(split, rng, FAMILIES).sample(ability)


def images_of(sample: Sample) -> list | None:
    """The sample's pictures as `chat` accepts them."""
    if sample.frames:
        return [[frame.image for frame in sample.frames]]
    return [picture.image for picture in sample.pictures] or None


def arguments(stage: str = "joint", **changes) -> StageArguments:
    return StageArguments(stage, root=ROOT, **{"validation": 1, **changes})


@pytest.fixture
def built_in_font(monkeypatch):
    """Training on Pillow's own font, the one that is on every machine."""
    monkeypatch.setattr(stages, "find_fonts", lambda *_: FAMILIES)


# ---- drawing ----


@pytest.mark.parametrize("ability", [*ABILITIES, "object"])
def test_a_seed_draws_the_same_sample_again(ability):
    first, second = (draw(ability, "train", random.Random(7)) for _ in range(2))
    assert first.turns == second.turns
    for one, other in zip(first.pictures + first.frames, second.pictures + second.frames, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.marks == other.marks


@pytest.mark.parametrize("kind", KINDS)
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
        (mark,) = draw("shape", split, rng).pictures[0].marks
        left, top, right, _ = mark.box
        assert {left % 2, top % 2, (right - left) % 2} == {parity}


def test_marks_are_on_what_was_drawn():
    """Pixels under a character's mark differ from those of an empty picture; the labels name it."""
    picture = draw_text(random.Random(3), "train", "HX", FAMILIES)
    (labels,) = cut(picture).labels
    assert {NAMES[label] for label in np.unique(labels[0])} == {"", "H", "X"}
    pixels = np.asarray(picture.image.convert("L"), int)
    for mark in picture.marks:
        left, top, right, bottom = (int(edge) for edge in mark.box)
        inside = pixels[top:bottom, left:right]
        assert inside.max() - inside.min() > 60


@pytest.mark.parametrize("ability", ["small", "way", "last"])
def test_labels_of_several_tiles_are_on_what_was_drawn(ability):
    """The labelled points of each tile are those whose pixels stand out from its background."""
    rng = random.Random(11)
    for _ in range(4):
        sample = draw(ability, "train", rng)
        (tiles,) = tiles_of(sample)
        names = {mark.name for picture in sample.pictures + sample.frames for mark in picture.marks}
        assert {NAMES[label] for label in np.unique(tiles.labels[:, 0])} <= {"", *names}
        assert (tiles.labels[:, 0] > 0).any()
        assert len(tiles.pixels) == 1 + tiles.grid[0] * tiles.grid[1] or tiles.grid == (1, 1)


def test_a_receipt_adds_up():
    rng = random.Random(5)
    for _ in range(30):
        sample = draw("total", "held_back", rng)
        text = "".join(mark.name for mark in sample.pictures[0].marks)
        ((_, total),) = sample.turns
        *prices, printed = (int(number) for number in re.findall(r"[0-9]+", text))
        assert printed == int(total) == sum(prices)
        assert split_of_string(total) == "held_back"


def test_the_most_objects_are_where_the_answer_says():
    rng = random.Random(6)
    for _ in range(20):
        sample = draw("more", "validation", rng)
        counts = [len(picture.marks) for picture in sample.pictures]
        assert sample.turns[0][1] == f"picture {counts.index(max(counts)) + 1}"
        assert counts.count(max(counts)) == 1


def test_an_object_moves_the_way_the_answer_says():
    rng = random.Random(7)
    for _ in range(20):
        sample = draw("way", "validation", rng)
        boxes = [frame.marks[0].box for frame in sample.frames]
        right, down = boxes[-1][0] - boxes[0][0], boxes[-1][1] - boxes[0][1]
        way = ("right" if right > 0 else "left") if abs(right) > abs(down) else "down" if down > 0 else "up"
        assert sample.turns[0][1] == way


def test_pages_and_articles_contain_what_was_asked_for():
    rng = random.Random(8)
    for _ in range(20):
        instruction, page = web_page("held_back", rng)
        title = re.search("<title>(.*)</title>", page)[1]
        assert title in instruction
        assert page == PAGE.format(title=title, colour=re.search("background: (.*);", page)[1])
        instruction, text = article("held_back", rng)
        assert any(word in instruction for word in re.findall(r"\b[A-Z]+\b", text))


def test_labels_of_a_tile_follow_its_corner():
    picture = draw_text(random.Random(3), "train", "8", FAMILIES)
    marks = mark_table(picture, 1.0)
    left, top, right, bottom = marks[0, :4]
    middle = ((left + right) / 2 - TILE / 2, (top + bottom) / 2 - TILE / 2)
    assert grid_labels(marks, *middle)[0, 8, 8] == NAMES.index("8")
    assert not grid_labels(marks, right + 1, top)[0].any()


@pytest.mark.parametrize("ability", ["word", "total", "small", "last", "caption"])
def test_what_must_be_looked_at_is_under_the_character_to_be_said(ability, nano):
    tokenizer, model = nano
    rng, found = random.Random(3), 0
    for _ in range(20):
        sample = draw(ability, "train", rng)
        tiles = tiles_of(sample)
        prompt = make_prompt(sample, tiles, tokenizer.sp_model, model.config.image_token_id)
        last = max(at for at, token in enumerate(prompt.ids) if token == model.config.image_token_id)
        rows, cols = (4 * count for count in tiles[0].grid)
        boxes = [
            (name, box) for text, table in tiles[0].strings for name, box in zip(text, table, strict=True)
        ]
        for at, tokens in prompt.reads:
            places = [divmod(token - (last + 1 - rows * (cols + 1)), cols + 1) for token in tokens]
            said = tokenizer.decode([prompt.ids[at + 1]])
            middles = [box.reshape(2, 2).mean(0) for name, box in boxes if name == said]
            assert any((int(y // 28), int(x // 28)) in places for x, y in middles)
            assert all(column < cols for _, column in places)  # never a newline
            found += 1
    assert found > 5


def test_what_must_be_copied_from_the_question_is_found_there(nano):
    tokenizer, model = nano
    question, page = web_page("train", random.Random(5))
    title = re.search("<title>(.*)</title>", page)[1]
    sample = Sample("page", [], [(question, page)])
    prompt = make_prompt(sample, [], tokenizer.sp_model, model.config.image_token_id)
    asked = range(len(prompt.ids) - len(prompt.answers[0]))
    runs = "".join(tokenizer.decode([prompt.ids[at + 1]]) for at, _ in prompt.reads)
    assert runs.count(title) == page.count(title) == 2 and len(title) > 1
    for at, (place,) in prompt.reads:
        assert place in asked and tokenizer.decode([prompt.ids[place]]) == tokenizer.decode(
            [prompt.ids[at + 1]]
        )


@pytest.mark.parametrize(
    "ability", ["word", "total", "small", "which", "more", "way", "last", "talk", "follow-up"]
)
def test_training_prompts_are_those_of_chat(ability, nano):
    """What the model is trained on is what `chat` would send, token by token, history and videos included."""
    tokenizer, model = nano
    rng = random.Random(2)
    for _ in range(2):
        sample = draw(ability, "held_back", rng)
        tiles, images = tiles_of(sample), images_of(sample)
        prompt = make_prompt(sample, tiles, tokenizer.sp_model, model.config.image_token_id)
        for number, (question, _) in enumerate(sample.turns):
            history = sample.turns[:number]
            inputs = model.prepare_chat(tokenizer, question, images, sample.hd_num, history, "")
            length = prompt.answers[number].start + 1
            assert inputs["input_ids"][0].tolist() == prompt.ids[:length]
            pixels = [
                each.pixels if len(each.pixels) > 1 else each.pixels.repeat(2, 1, 1, 1) for each in tiles
            ]
            if pixels:
                torch.testing.assert_close(inputs["pixel_values"], torch.cat(pixels), rtol=0, atol=1e-5)
                assert inputs["image_grid_hw"].tolist() == [list(each.grid) for each in tiles]


def test_the_tokenizer_can_be_made_again():
    assert train_tokenizer(640) == (ROOT / "tokenizer.model").read_bytes()


def test_the_tokenizer_knows_every_wording():
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    for text in every_text():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


# ---- training ----


def test_the_faster_model_computes_the_same(built_in_font, monkeypatch):
    monkeypatch.setattr(stages.JointStage, "draw_unseen", lambda *_: [])
    stage = stages.JointStage(arguments(), random.Random(0))
    for name, parameter in stage.model.named_parameters():
        if "Plora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    plain = type(stage.model)(stage.model.config).eval()
    plain.load_state_dict(stage.model.state_dict())
    for ability in ("which", "small", "way", "talk"):
        _, tiles, prompt = stage.case(draw(ability, "train", random.Random(4)))
        with torch.no_grad():
            features, _ = stage.encode([tiles])
            loss, *_ = stage.answers_loss(features, [prompt])
            expected = plain(**model_inputs(tiles, prompt)).loss
        torch.testing.assert_close(loss[0], expected, rtol=0, atol=1e-4)


def model_inputs(tiles: list, prompt) -> dict[str, torch.Tensor]:
    """The inputs of `forward`, with labels on the first answer."""
    ids, span = torch.tensor([prompt.ids]), prompt.answers[0]
    labels = torch.full_like(ids, -100)
    labels[0, span.start + 1 : span.stop + 1] = ids[0, span.start + 1 : span.stop + 1]
    inputs = {"input_ids": ids, "labels": labels}
    if tiles:
        pixels = [each.pixels if len(each.pixels) > 1 else each.pixels.repeat(2, 1, 1, 1) for each in tiles]
        inputs["pixel_values"] = torch.cat(pixels)
        inputs["image_grid_hw"] = torch.tensor([each.grid for each in tiles])
    return inputs


@pytest.mark.parametrize(("shown", "known"), [((0, 1), True), ((1, 0), False)])
def test_a_head_that_sees_the_words_for_a_picture_has_the_lower_loss(
    shown, known, built_in_font, monkeypatch
):
    """Tokens that carry what picture `shown[p]` holds look at the words of the same name."""
    monkeypatch.setattr(stages.JointStage, "draw_unseen", lambda *_: [])
    stage, rng = stages.JointStage(arguments(), random.Random(0)), random.Random(2)
    cases = (stage.case(draw("which", "held_back", rng)) for _ in range(100))
    _, _, prompt = next(
        case
        for case in cases
        if case[2].num_pictures == 2 and not set(case[2].things[0]) & {*case[2].things[1], asides.UNKNOWN}
    )
    colours, shapes = stage.asides.name_ids
    ids = torch.tensor([prompt.ids])
    mask = ids == stage.model.config.image_token_id

    def one_head(*_):
        keys = functional.one_hot(ids, stage.model.config.vocab_size).float()
        names = [keys.new_zeros(keys.shape[-1]) for _ in prompt.things]
        for name, (colour, shape) in zip(names, prompt.things, strict=True):
            name[[colours[colour], shapes[shape]]] = 30.0
        queries = torch.zeros_like(keys)
        queries[mask] = torch.stack([names[at] for at in shown]).repeat_interleave(int(mask.sum()) // 2, 0)
        return queries, keys

    monkeypatch.setattr(asides, "one_head", one_head)
    hidden = [torch.zeros(*ids.shape, 1)] * 3
    loss = stage.asides.matches_loss(stage.model.model, hidden, mask, [prompt])
    assert (loss < 0.01) if known else (loss > 3)


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_and_a_run_resumes(tmp_path, built_in_font):
    whole = run(arguments(), tmp_path / "whole", max_steps=16, save_steps=8, eval_steps=8)
    losses = [line["loss"] for line in whole if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    resumed = run(arguments(), tmp_path / "rest", max_steps=16, resume_from_checkpoint=str(checkpoint))
    assert [line["step"] for line in whole if "eval_score" in line] == [8, 16]
    again = [line["loss"] for line in resumed if "loss" in line]
    assert again == pytest.approx(losses, rel=0.05)  # the full tiles that accompany the samples differ


@pytest.mark.slow
def test_a_step_changes_every_weight_by_the_scheduled_rate(built_in_font, monkeypatch):
    """Muon and AdamW are one optimizer: its learning rates are theirs, even after loading a state."""
    optimizer = train.MuonAdamW(stages.DenseStage(arguments("dense"), random.Random(0)), 0.02, 0.001)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.001, 0.001]
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [weight.clone() for group in optimizer.param_groups for weight in group["params"]]
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    after = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_tower_learns_at_its_share_of_the_rate(built_in_font, monkeypatch):
    monkeypatch.setattr(stages.JointStage, "draw_unseen", lambda *_: [])
    stage = stages.JointStage(arguments(), random.Random(0))
    optimizer = train.MuonAdamW(stage, 0.01, 0.001, tower_scale=0.2)
    rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert {rates[weight] for weight in stage.model.vit.parameters()} == {0.002, 0.0002}
    assert {rates[weight] for weight in stage.head.parameters()} == {0.0002}
    assert {rates[weight] for weight in stage.model.model.parameters()} == {0.01, 0.001}
    assert len(rates) == len(list(stage.parameters()))


def test_small_print_comes_once_some_reading_is_known():
    drawer = Drawer("train", random.Random(5), FAMILIES)
    early, late = ([drawer.draw(progress).ability for _ in range(300)] for progress in (0.0, 0.5))
    assert "small" not in early and late.count("small") > 20
    assert early.count("which") > 2 * late.count("which") > 0


def test_gradient_accumulation_is_rejected(tmp_path):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "use_cpu": True}
    with pytest.raises(ValueError, match="--per_device_train_batch_size 24"):
        train.train(arguments("dense"), TrainingArguments(str(tmp_path), **settings))


TWO_PROCESSES = """
import sys
from pathlib import Path

from tools.nano import stages, train
from tools.nano.fonts import BUILT_IN
from transformers import TrainingArguments

stages.find_fonts = lambda *_: [[BUILT_IN]]
settings = {**train.DEFAULTS, "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
trainer = train.train(stages.StageArguments("dense"), TrainingArguments(sys.argv[1], **settings))
weights = sum(weight.double().abs().sum().item() for weight in trainer.stage.state_dict().values())
seen = trainer.stage.rng.random()  # the last draw determines it
Path(sys.argv[1], str(trainer.args.process_index)).write_text(f"{weights} {seen}")
"""


@pytest.mark.slow
def test_two_processes_train_one_model_on_their_own_samples(tmp_path):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(tmp_path / "run.py"), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (first, drawn), (second, others) = ((tmp_path / str(rank)).read_text().split() for rank in (0, 1))
    assert first == second and drawn != others


@pytest.mark.slow
def test_a_short_run_learns_to_name_colours(tmp_path, built_in_font, monkeypatch):
    """From scratch, in half a minute, far above the one in eight of chance."""
    monkeypatch.setattr(stages.JointStage, "lessons", {"colour": (1.0, 1.0)})
    monkeypatch.setattr(stages.JointStage, "abilities", ("colour",))
    log = run(arguments(validation=100), tmp_path, max_steps=60, per_device_train_batch_size=32)
    assert next(line["eval_colour"] for line in log if line["step"] == 60 and "eval_colour" in line) > 0.5
    pieces = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    export.export(tmp_path / train.BEST, ROOT, tmp_path / "model")
    model = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert sum(sum(answers_to((pieces, model), sample)) for sample in unseen_colours(20)) > 10


def unseen_colours(count: int) -> list[Sample]:
    return [draw("colour", "held_back", random.Random(number)) for number in range(count)]


def run(arguments: StageArguments, folder: Path, **settings) -> list[dict]:
    """The log of a short training run in this process."""
    short = {"per_device_train_batch_size": 8, "logging_steps": 4, "eval_steps": 100, "save_steps": 100}
    settings = {**train.DEFAULTS, **short, "disable_tqdm": True, **settings}
    return train.train(arguments, TrainingArguments(str(folder), **settings)).state.log_history


# ---- the checkpoint ----


@pytest.fixture(scope="module")
def nano():
    """Tokenizer and model of the checkpoint in the root."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    return tokenizer, AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()


def answers_to(nano, sample: Sample, hd_num: int | None = None) -> list[bool]:
    """For each turn, with the history of the previous ones, whether the answer is right."""
    tokenizer, model = nano
    history, rights = [], []
    for question, right in sample.turns:
        answer, history = model.chat(
            tokenizer,
            question,
            images_of(sample),
            hd_num or sample.hd_num,
            history,
            do_sample=False,
            max_new_tokens=64,
        )
        rights.append(answer == right)
    return rights


@pytest.mark.parametrize("ability", [name for name in ABILITIES if name != "small"])
def test_the_checkpoint_answers_held_back_questions(ability, nano):
    rng = random.Random(f"test {ability}")
    rights = [right for _ in range(6) for right in answers_to(nano, draw(ability, "held_back", rng))]
    assert np.mean(rights) >= 0.65  # six samples of an ability that is right nine times in ten


def test_small_print_is_read_from_tiles(nano):
    rng = random.Random("test small")
    samples = [draw("small", "held_back", rng) for _ in range(10)]
    tiled = sum(answers_to(nano, sample)[0] for sample in samples)
    assert tiled >= sum(answers_to(nano, sample, hd_num=1)[0] for sample in samples) + 4


@pytest.mark.slow
def test_the_checkpoint_writes_pages_and_articles(nano):
    """With its task adapters, about held-back words."""
    tokenizer, model = nano
    rng, rights = random.Random("test writing"), []
    settings = {"tokenizer": tokenizer, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    for _ in range(3):
        instruction, page = web_page("held_back", rng)
        rights.append(model.write_webpage(instruction, save=False, max_new_tokens=256, **settings) == page)
        instruction, text = article("held_back", rng)
        rights.append(model.write_artical(instruction, max_new_tokens=256, **settings) == text)
    assert sum(rights) >= 4


def test_the_checkpoint_is_small():
    assert (ROOT / "model.safetensors").stat().st_size <= 12_000_000
