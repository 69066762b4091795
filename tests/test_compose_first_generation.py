"""Composition with the first generation: the recorded prompts and answers, and its own rules."""

import pytest
import torch
from first_generation import (
    expected_ids,
    first_tokenizer,
    golden,
    needs_first_tokenizer,
    picture,
    tiny_first,
    write_first,
)
from helpers import golden_directory, read_json
from internlm_xcomposer2 import InternLMXComposerForCausalLM, InternLMXComposerTokenizer
from internlm_xcomposer2.article_internlm_xcomposer2 import Article, Candidate, Paragraph, Picture
from internlm_xcomposer2.compose_internlm_xcomposer2 import letter_ids
from internlm_xcomposer2.compose_prompts_internlm_xcomposer2 import COMPOSERS
from internlm_xcomposer2.prompt_internlm_xcomposer2 import ChatPrompt
from PIL import Image


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InternLMXComposerForCausalLM:
    """The goldens' checkpoint. Shared: don't change it."""
    directory = write_first(tmp_path_factory.mktemp("first"))
    model = InternLMXComposerForCausalLM.from_pretrained(directory).eval()
    if first_tokenizer():
        model.tokenizer = InternLMXComposerTokenizer.from_pretrained(directory)
    return model


@pytest.fixture
def tiny() -> InternLMXComposerForCausalLM:
    """A random model with room for the prompts, which take several tokens per character here."""
    return tiny_first(max_position_embeddings=4096)


class Listener:
    """Notes what a model is asked and what it answers."""

    def __init__(self, model, monkeypatch) -> None:
        self.prompts, self.answers, self.settings = [], [], []
        self._answer = model._answer
        monkeypatch.setattr(model, "_answer", self.listen)

    def listen(self, prompts, settings, *args, **kwargs):
        answers, cache = self._answer(prompts, settings, *args, **kwargs)
        self.prompts += prompts
        self.answers += answers
        self.settings += [settings]
        return answers, cache


class Canned(Listener):
    """The same, but the answers are given."""

    def __init__(self, model, monkeypatch, answers: list[str]) -> None:
        super().__init__(model, monkeypatch)
        encoded = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        self._answer = lambda prompts, settings, *args, **kwargs: ([encoded.pop(0)], None)


def colour(seed: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (seed % 256, 90, 200 - seed % 200))


def recorded_article(case: dict, until: int | None = None) -> Article:
    """The article of the recorded run; the pictures of lines from `until` on have no choice yet."""
    article = Article(case["title"], tuple(map(Paragraph, case["lines"])))
    for number, line in enumerate(case["positions"]):
        found = tuple(Candidate(path, Image.open(picture(path))) for path in case["candidates"][number])
        choice = case["selected"][str(line)] if until is None or line < until else None
        article = article.with_picture(line, Picture(case["captions"][str(line)], found, choice))
    return article


def steps_of(case: dict, name: str) -> list[dict]:
    return [step for step in case["steps"] if step["step"] == name]


def without_bos(settings: dict) -> dict:
    """Recorded settings of a step as ours."""
    others = {name: value for name, value in settings.items() if name != "max_length"}
    return {**others, "max_new_tokens": settings["max_length"] - 1}


def check_step(listener: Listener, step: dict, config) -> None:
    """The last question and answer are the recorded ones."""
    segments = step.get("segments") or [["text", step["prompt_ids"]]]
    assert listener.prompts[-1].ids == expected_ids(segments, config.image_token_id)
    assert listener.answers[-1] == step["new_tokens"]
    expected = without_bos(step["settings"])
    assert {name: listener.settings[-1][name] for name in expected} == expected


# ---- the recorded run ----


@needs_first_tokenizer
def test_an_article_as_recorded(model, monkeypatch):
    case, _ = golden("compose")
    (step,) = steps_of(case, "article")
    listener = Listener(model, monkeypatch)
    settings = without_bos(step["settings"])
    article = model.composer(num_beams=1, max_new_tokens=settings["max_new_tokens"]).write(case["title"])
    check_step(listener, step, model.config)
    assert article.text == step["response"].strip()


@needs_first_tokenizer
def test_spots_as_recorded(model, monkeypatch):
    case, _ = golden("compose")
    (step,) = steps_of(case, "spots")
    listener = Listener(model, monkeypatch)
    composer = model.composer()
    composer.find_spots(recorded_article(case), case["image_num"])
    check_step(listener, step, model.config)


@needs_first_tokenizer
@pytest.mark.parametrize("number", [0, 1])
def test_captions_as_recorded(model, monkeypatch, number):
    case, _ = golden("compose")
    step, line = steps_of(case, "captions")[number], case["positions"][number]
    article = Article(case["title"], tuple(map(Paragraph, case["lines"])))
    for earlier in case["positions"][:number]:
        article = article.with_picture(earlier, Picture(case["captions"][str(earlier)]))
    listener = Listener(model, monkeypatch)
    assert model.composer().caption(article, line) == case["captions"][str(line)]
    check_step(listener, step, model.config)


@needs_first_tokenizer
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_choices_as_recorded(model, monkeypatch, number, reuse):
    case, _ = golden("compose")
    step, line = steps_of(case, "select")[number], case["positions"][number]
    listener = Listener(model, monkeypatch)
    composer = model.composer(choose_by="text", reuse=reuse)
    for other in case["positions"][: number + reuse]:  # what is kept of the first must not change the second
        composer.choose(recorded_article(case, until=other), other)
    if not reuse:
        composer.choose(recorded_article(case, until=line), line)
    check_step(listener, step, model.config)
    assert len(listener.prompts[-1].visuals) == step["n_images"]


@needs_first_tokenizer
def test_a_whole_run_asks_as_recorded(model, monkeypatch):
    """All prompts in their order, with the recorded answers, and with spots and letters as chosen."""
    case, _ = golden("compose")
    steps = case["steps"]
    spots = "".join(f"<Seg{line}>" for line in case["positions"])
    letters = ["ABCD"[choice] for choice in case["selected"].values()]
    captions = [step["response"] for step in steps_of(case, "captions")]
    answers = ["\n".join(case["lines"]), spots, *captions, *letters]
    canned = Canned(model, monkeypatch, answers)
    offers = iter(case["candidates"])

    def search(caption, exclude, k):
        return [(f"{caption} {path}", picture(path)) for path in next(offers)]

    article = model.compose(case["title"], source=search, num_pictures=case["image_num"], choose_by="text")
    for prompt, step in zip(canned.prompts, steps, strict=True):
        segments = step.get("segments") or [["text", step["prompt_ids"]]]
        assert prompt.ids == expected_ids(segments, model.config.image_token_id)
    assert {str(line): chosen.choice for line, chosen in article.pictures.items()} == case["selected"]
    assert {str(line): one.caption for line, one in article.pictures.items()} == case["captions"]


@needs_first_tokenizer
def test_letters_may_follow_a_blank(model):
    opening = COMPOSERS["1.0"].choice.opening
    assert letter_ids(model.tokenizer, opening, 4) == [290, 309, 289, 302]
    assert letter_ids(model.tokenizer, opening, 4, " ") == [493, 556, 487, 553]


@needs_first_tokenizer
def test_a_choice_takes_the_likeliest_letter_with_and_without_a_blank(model, monkeypatch):
    case, _ = golden("compose")
    line = case["positions"][0]
    article = recorded_article(case, until=line)
    listener = Listener(model, monkeypatch)
    probabilities = model.composer().score(article, line)
    (prompt,) = listener.prompts
    assert model.tokenizer.decode(prompt.ids[-4:]).endswith("图是")
    features = [rows for visual in prompt.visuals for rows in model.encode_img(visual.image)]
    ids = torch.tensor([prompt.ids])
    embeds, mask = model.embed_inputs(ids, im_mask=torch.tensor([prompt.is_image]), features=features)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, im_mask=mask).logits[0, -1]
    plain = logits[[290, 309, 289, 302, 493, 556, 487, 553]].softmax(-1)
    torch.testing.assert_close(torch.tensor(probabilities), plain[:4] + plain[4:], rtol=0, atol=1e-5)
    assert model.composer().choose(article, line) == probabilities.index(max(probabilities))


RUNS = read_json(golden_directory() / "composition" / "prompts_10.json")["runs"]


def texts_of(prompt: ChatPrompt, tokenizer) -> str:
    """What a prompt says, with marks for its pictures."""
    ends = [*prompt.spans(), (len(prompt.ids), None)]
    starts = [1, *(stop for _, stop in prompt.spans())]  # after BOS
    parts = [prompt.ids[start:stop] for start, (stop, _) in zip(starts, ends, strict=True)]
    return "<ImageHere>".join(map(tokenizer.decode, parts))


def settings_of(step: dict) -> dict:
    """Recorded settings of a step as ours, in either of their two forms."""
    named = {"do_sample": "sampling", "num_beams": "beams"}
    names = ("do_sample", "num_beams", "repetition_penalty", "max_length")
    fields = step.get("settings") or {name: step[named.get(name, name)] for name in names}
    return without_bos(fields)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["title"])
def test_steps_as_recorded(tiny, monkeypatch, run):
    answers = ["\n".join(run["lines"]), *(step["answer"] for step in run["steps"][1:])]
    canned, numbers = Canned(tiny, monkeypatch, answers), iter(range(100))
    article = tiny.compose(
        run["title"],
        source=lambda *_: [(number := next(numbers), colour(number)) for _ in range(4)],
        num_pictures=int(run["image_num"]),
        choose_by="text",
    )
    for prompt, asked, step in zip(canned.prompts, canned.settings, run["steps"], strict=True):
        expected = step["prompt"].removesuffix("<TOKENS_UNUSED_1> </s>")
        assert texts_of(prompt, tiny.tokenizer) == expected
        assert {name: asked[name] for name in settings_of(step)} == settings_of(step)
        assert len(prompt.visuals) == step.get("n_images", 0)
    assert list(article.pictures) == run["spots"]
    pictures = {str(line): picture for line, picture in article.pictures.items()}
    assert {line: picture.caption for line, picture in pictures.items()} == run["captions"]
    assert {line: picture.choice for line, picture in pictures.items()} == run["selected"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["title"])
def test_a_picture_that_is_added_gets_its_caption_as_recorded(tiny, monkeypatch, run):
    for step in run["insert_caption"]:
        canned = Canned(tiny, monkeypatch, [step["answer"]])
        composer = tiny.composer()
        article = composer.article_of(run["title"], "\n".join(run["lines"]))
        for line, caption in step["captions_before"].items():
            article = article.with_picture(int(line), Picture(caption))
        article = composer.add_picture(article, step["position"])
        # Without any caption before it, the demo leaves a full stop of what would be told about them.
        expected = step["prompt"] if step["captions_before"] else step["prompt"].replace('" 。给', '" 给')
        assert texts_of(canned.prompts[0], tiny.tokenizer) == expected
        assert article.pictures[step["position"]].caption == step["caption"]


# ---- its own rules ----


def test_settings_of_each_step_are_the_published_ones(tiny, monkeypatch):
    answers = ["one\ntwo", "<Seg0>", 'a cat"', "B", "more"]
    canned = Canned(tiny, monkeypatch, answers)
    composer = tiny.composer(choose_by="text")
    article = composer.compose("write", source=lambda *_: [(1, colour(1)), (2, colour(2))], num_pictures=1)
    assert article.pictures[0].choice == 1
    composer.edit(article, 0, "expand", "cats")
    names = ("num_beams", "repetition_penalty", "max_new_tokens", "do_sample")
    assert [tuple(asked[name] for name in names) for asked in canned.settings] == [
        (5, 5.0, 999, False),
        (5, 1.0, 299, False),
        (1, 5.0, 99, False),
        (5, 1.0, 9, False),
        (5, 1.5, 500, False),
    ]


def test_settings_of_the_caller_count_in_every_step(tiny, monkeypatch):
    canned = Canned(tiny, monkeypatch, ["one", "<Seg0>", 'cat"'])
    tiny.compose("write", num_pictures=1, num_beams=2, repetition_penalty=1.1)
    assert [(asked["num_beams"], asked["repetition_penalty"]) for asked in canned.settings] == [(2, 1.1)] * 3


def test_uploads_are_seen_and_chosen_from(tiny, monkeypatch):
    canned = Canned(tiny, monkeypatch, ["one\ntwo", "<Seg1><Seg0>", "B"])
    article = tiny.compose("write", [colour(1), colour(2)], choose_by="text")
    assert [picture.chosen.id for picture in article.pictures.values()] == [2, 1]
    assert [len(prompt.visuals) for prompt in canned.prompts] == [2, 2, 2]


def test_the_system_text_goes_first_on_request(tiny, monkeypatch):
    canned = Canned(tiny, monkeypatch, ["one"])
    tiny.composer(use_meta=True).write("cats")
    text = tiny.tokenizer.decode(canned.prompts[0].ids[1:])
    assert (
        text.startswith("meta instruction\nYou are an AI assistant")
        and "conversation\n <|User|>:根据" in text
    )


def test_an_article_in_pieces_is_the_same_text(tiny):
    settings = {"max_new_tokens": 12, "num_beams": 1}
    whole = tiny.composer(**settings).write("cats")
    composer = tiny.composer(max_new_tokens=12)
    with composer.stream("cats") as stream:
        text = "".join(stream)
    assert composer.article_of("cats", text) == whole


def test_what_is_kept_changes_no_step(tiny):
    numbers = iter(range(100))

    def compose(reuse: bool) -> Article:
        return tiny.compose(
            "cats",
            source=lambda *_: [(next(numbers), colour(number)) for number in range(3)],
            num_pictures=2,
            reuse=reuse,
            fill_spots=True,
            max_new_tokens=20,
            choose_by="text",
        )

    kept, computed = compose(True), compose(False)
    assert kept.lines == computed.lines
    for one, other in zip(kept.pictures.values(), computed.pictures.values(), strict=True):
        assert (one.caption, one.choice) == (other.caption, other.choice)


def test_pictures_of_a_folder_are_described(tiny):
    """With a tokenizer that the model doesn't have."""
    tokenizer, tiny.tokenizer = tiny.tokenizer, None
    answers = tiny.composer(tokenizer).describe([colour(1), colour(2)], "What is there?")
    tiny.tokenizer = tokenizer
    options = {"max_new_tokens": 128, "do_sample": False, "num_beams": 1}
    assert answers == [tiny.chat("What is there?", colour(i), **options)[0].strip() for i in (1, 2)]


def test_a_long_article_loses_its_beginning_but_never_the_question(tiny, monkeypatch):
    canned = Canned(tiny, monkeypatch, ["B"])
    composer = tiny.composer(choose_by="text")
    article = composer.article_of("write", "\n".join(f"line {i} " + "word " * 30 for i in range(30)))
    article = article.with_picture(29, Picture("cat", (Candidate(1, colour(1)), Candidate(2, colour(2)))))
    assert composer.choose(article, 29) == 1
    (prompt,) = canned.prompts
    assert len(prompt.ids) <= COMPOSERS["1.0"].max_prompt
    text = tiny.tokenizer.decode(prompt.ids)
    assert "line 29" in text and "line 0 " not in text and text.endswith("最合适的图是")
