"""Composition: the recorded prompts and answers, what is computed once, guards, and edits."""

import numpy as np
import pytest
from helpers import golden_directory, read_json, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from PIL import Image

ADAPTERS = {"sft": 3, "dpo": 2, "web": 4}
VERSIONS = ("2", "2.5")


def composing_model(version: str, **fields) -> InternLMXComposer2ForCausalLM:
    """A tiny model with room for the prompts, which take three tokens per Chinese character here."""
    adapters = {"task_adapters": ADAPTERS} if version == "2.5" else {}
    return tiny_model(version, **{"max_position_embeddings": 8192, "hd_num": 4, **adapters, **fields})


def colour(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def numbered(count: int, start: int = 0):
    """A source that never offers the same picture twice."""
    numbers = iter(range(start, 10_000))
    return lambda caption, exclude, k: [(number := next(numbers), colour(number)) for _ in range(count)]


@pytest.fixture
def composing(tokenizer):
    """Version -> a tiny model with its tokenizer."""

    def build(version: str = "2.5", **fields) -> InternLMXComposer2ForCausalLM:
        model = composing_model(version, **fields)
        model.tokenizer = tokenizer
        return model

    return build


class Canned:
    """Answers in place of a model's, and the prompts and settings that it was asked with."""

    def __init__(self, model, answers: list[str]) -> None:
        self.answers, self.asked, self.tokenizer = list(answers), [], model.tokenizer
        model._answer = self.answer

    def answer(self, prompts, settings, earlier=None, keep=False):
        (prompt,) = prompts
        texts, start = [], 1  # after BOS
        for first, last in [*prompt.spans(), (len(prompt.ids), None)]:
            texts.append(self.tokenizer.decode(prompt.ids[start:first]))
            start = last
        self.asked.append({**settings, "prompt": "<image>".join(texts), "n_images": len(texts) - 1})
        return [self.tokenizer(self.answers.pop(0), add_special_tokens=False)["input_ids"]], None


# ---- the recorded prompts ----

RUNS = read_json(golden_directory() / "composition" / "prompts_2x.json")["runs"]
IDS = [f"{run['version']}-{'meta' if run['with_meta'] else 'plain'}-{run['uploads']}" for run in RUNS]
ACTIONS = {
    "insert a paragraph before": "insert_before",
    "insert a paragraph after": "insert_after",
}


def recorded_settings(step: dict) -> dict:
    names = ("do_sample", "temperature", "max_new_tokens", "repetition_penalty", "top_p", "top_k")
    return {name: step["settings"][name] for name in names} if "settings" in step else {}


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_steps_as_recorded(composing, run):
    model = composing(run["version"])
    canned = Canned(model, ["\n".join(run["lines"]), *(step["answer"] for step in run["steps"])])
    composer = model.composer(use_meta=run["with_meta"], choose_by="text")
    uploads = [colour(number) for number in range(run["uploads"])] or None
    source = None if uploads else numbered(4)
    article = composer.compose(run["instruction"], uploads, source, int(run["image_num"]))
    assert article.lines == run["lines"]
    # The demos ask for all captions first, and then for all choices, as we do.
    assert [asked["prompt"] for asked in canned.asked] == [
        run["article_prompt"],
        *(step["prompt"] for step in run["steps"]),
    ]
    for asked, step in zip(canned.asked[1:], run["steps"], strict=True):
        assert recorded_settings(step).items() <= asked.items()
        assert asked["n_images"] == step.get("n_images", 0)
        assert asked["infer_mode"] == ("write" if run["version"] == "2.5" else "base")
        assert asked["eos_token_id"] == [2, 5]
    assert list(article.pictures) == run["spots"]
    captions = {str(line): picture.caption for line, picture in article.pictures.items() if picture.caption}
    assert captions == run["captions"]
    choices = {str(line): picture.choice for line, picture in article.pictures.items()}
    assert choices == run["selected"]


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_edits_as_recorded(composing, run):
    model = composing(run["version"])
    composer = model.composer(use_meta=run["with_meta"])
    article = composer.article_of(run["instruction"], "\n".join(run["lines"]))
    for name, edit in run["edits"].items():
        action, _, index = name.partition("@")
        material = "大纲" if action in ACTIONS else "" if action == "abbreviate" else "素材"
        canned = Canned(model, ["one\ntwo"])
        edited = composer.edit(article, int(index), ACTIONS.get(action, action), material)
        assert canned.asked[0]["prompt"] == edit["prompt"]
        assert canned.asked[0]["infer_mode"] == "base"
        place = int(index) + (action == "insert a paragraph after")
        assert edited.lines[place] == "one two"
        assert len(edited.lines) == len(article.lines) + (action in ACTIONS)
