"""What the pages do without a browser: dialogues, articles, their limits, and what is shown of errors."""

import shutil
import sys
import threading
import zipfile

import pytest
import torch
from demo_helpers import endless_service, nano_service
from helpers import ROOT
from internlm_xcomposer2.article_internlm_xcomposer2 import Article, Paragraph
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory, PromptCache
from internlm_xcomposer2.demo import dialogue as dialogues
from internlm_xcomposer2.demo.desk import Desk, Plan, load_uploads
from internlm_xcomposer2.demo.dialogue import Dialogue, Meter, Question, Settings, mark_questions
from internlm_xcomposer2.demo.service import KeptHistories, Service, as_text
from internlm_xcomposer2.demo.texts import CHINESE, ENGLISH
from internlm_xcomposer2.demo.tiles import draw_tiles
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import as_visuals
from internlm_xcomposer2.ixc2.main import main
from PIL import Image

GREEDY = Settings(do_sample=False)
STAR, RING, VIDEO = (str(ROOT / "examples" / name) for name in ("star.png", "ring.jpg", "circle.mp4"))


@pytest.fixture(scope="module")
def nano() -> Service:
    return nano_service()


@pytest.fixture(scope="module")
def endless() -> Service:
    return endless_service()


def ask(
    dialogue: Dialogue, service: Service, text: str, *files: str, settings: Settings = GREEDY
) -> list[str]:
    """Ask and answer: the answer as it grew."""
    dialogue.ask(Question(text, files))
    return list(dialogue.answer(service, settings))


# ---- answers ----


def test_a_dialogue_about_a_picture(nano):
    dialogue = Dialogue()
    assert ask(dialogue, nano, "What shape is the object?", STAR)[-1] == "star"
    assert ask(dialogue, nano, "What colour is it?")[-1] == "orange"
    assert [turn.answer for turn in dialogue.turns] == ["star", "orange"]
    assert dialogue.pending is None and not dialogue.is_writing and dialogue.partial == ""


def test_it_answers_what_chat_answers(nano):
    dialogue, history, pictures = Dialogue(), (), []
    turns = [
        ("What shape is it?", [STAR]),
        ("Which picture shows the ring?", [RING]),
        ("How many objects?", []),
    ]
    for text, files in turns:
        pictures += files
        ask(dialogue, nano, text, *files)
    questions = mark_questions("2.5", [turn.question for turn in dialogue.turns])
    for question, turn in zip(questions, dialogue.turns, strict=True):
        num_marks = sum(
            text.count("<ImageHere>") for text in [question, *(earlier for earlier, _ in history)]
        )
        assert num_marks in (1, 2)
        history = [*history, (question, turn.answer)]
    last = nano.model.chat(nano.tokenizer, questions[-1], pictures, history=history[:-1], do_sample=False)[0]
    assert last == dialogue.turns[-1].answer


def test_a_video(nano):
    assert ask(Dialogue(), nano, "Which way does the object move?", VIDEO)[-1] == "right"


def test_several_pictures(nano):
    assert ask(Dialogue(), nano, "Which picture shows the ring?", STAR, RING)[-1] == "picture 2"
    assert ask(Dialogue(), nano, "Which picture shows the ring?", RING, STAR)[-1] == "picture 1"


def test_beams_answer_at_once(nano):
    pieces = ask(Dialogue(), nano, "What shape is it?", STAR, settings=Settings(do_sample=False, num_beams=3))
    assert pieces == ["star"]


def test_what_an_answer_cost(nano):
    dialogue = Dialogue()
    ask(dialogue, nano, "What shape is it?", STAR)
    usage = dialogue.turns[-1].usage
    inputs = nano.model.prepare_chat(nano.tokenizer, "What shape is it?", STAR)
    assert usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert usage.image_tokens == int(inputs["im_mask"].sum())
    sequence = nano.model.generate(**inputs, max_new_tokens=9, do_sample=False)[0]
    assert usage.answer_tokens == len(sequence) - usage.prompt_tokens
    assert 0 < usage.first_seconds <= usage.seconds


def test_a_second_turn_computes_only_what_is_new(nano, monkeypatch):
    lengths = []
    embed = nano.model.embed_inputs
    monkeypatch.setattr(
        nano.model, "embed_inputs", lambda ids, *rest: lengths.append(ids.shape[1]) or embed(ids, *rest)
    )
    dialogue = Dialogue()
    ask(dialogue, nano, "What shape is the object?", STAR)
    ask(dialogue, nano, "What colour is it?")
    first, second = (turn.usage.prompt_tokens for turn in dialogue.turns)
    assert lengths[0] == first and lengths[1] <= second - first


def test_the_system_text_and_tiles_reach_the_model(nano):
    plain, dialogue = Dialogue(), Dialogue()
    ask(plain, nano, "What shape is it?", STAR)
    ask(
        dialogue,
        nano,
        "What shape is it?",
        STAR,
        settings=Settings(hd_num=9, system="Be brief.", do_sample=False),
    )
    assert dialogue.turns[0].usage.image_tokens > plain.turns[0].usage.image_tokens
    text_tokens = [
        turn.usage.prompt_tokens - turn.usage.image_tokens for turn in (plain.turns[0], dialogue.turns[0])
    ]
    assert text_tokens[1] > text_tokens[0]
    assert dialogue.tiles[0].width > plain.tiles[0].width


# ---- stop, retry, undo ----


def test_a_stopped_answer_stays_and_can_be_continued(endless):
    dialogue = Dialogue()
    dialogue.ask(Question("Go on."))
    answer = dialogue.answer(endless, Settings(max_new_tokens=4000))
    next(answer)
    dialogue.stop()
    written = [*answer][-1:]
    assert len(dialogue.turns) == 1 and dialogue.turns[0].usage.answer_tokens < 1000
    assert not written or dialogue.turns[0].answer == written[0]
    ask(dialogue, endless, "Go on.", settings=Settings(max_new_tokens=4))
    assert len(dialogue.turns) == 2


def test_beams_can_be_stopped(endless):
    dialogue = Dialogue()
    dialogue.ask(Question("Go on."))
    threading.Timer(0.3, dialogue.stop).start()
    list(dialogue.answer(endless, Settings(max_new_tokens=4000, num_beams=2)))
    assert dialogue.turns[0].usage.answer_tokens < 4000


def test_an_answer_takes_only_so_long(endless, monkeypatch):
    monkeypatch.setattr(dialogues, "MAX_SECONDS", 0.0)
    dialogue = Dialogue()
    ask(dialogue, endless, "Go on.", settings=Settings(max_new_tokens=4000))
    assert dialogue.turns[0].usage.answer_tokens == 1


def test_a_reader_who_leaves_takes_the_question_along(endless):
    dialogue = Dialogue()
    dialogue.ask(Question("Go on."))
    answer = dialogue.answer(endless, Settings(max_new_tokens=4000))
    next(answer)
    answer.close()
    assert not dialogue.turns and dialogue.pending is None and not dialogue.is_writing


def test_a_waiting_question_can_be_stopped_replaced_and_taken_back(nano):
    dialogue = Dialogue()
    dialogue.ask(Question("Who are you?"))
    dialogue.stop()
    assert list(dialogue.answer(nano, GREEDY)) == []
    dialogue.ask(Question("Who are you?"))
    dialogue.ask(Question("What is your name?"))
    assert dialogue.take_back() == Question("What is your name?")
    assert dialogue.take_back() is None


def test_undo_and_ask_again(nano):
    dialogue = Dialogue()
    ask(dialogue, nano, "What shape is the object?", STAR)
    ask(dialogue, nano, "What colour is it?")
    assert dialogue.take_back() == Question("What colour is it?")
    ask(dialogue, nano, "What colour is it?")
    assert [turn.answer for turn in dialogue.turns] == ["star", "orange"]


def test_nothing_changes_while_an_answer_is_written(endless):
    dialogue = Dialogue()
    dialogue.ask(Question("Go on."))
    answer = dialogue.answer(endless, Settings(max_new_tokens=50))
    next(answer)
    for change in (lambda: dialogue.ask(Question("?")), dialogue.take_back):
        with pytest.raises(ValueError, match="being written"):
            change()
    list(answer)


# ---- limits ----


def test_a_failed_question_leaves_no_trace(nano, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    dialogue = Dialogue()
    ask(dialogue, nano, "What shape is the object?", STAR)
    with pytest.raises(ValueError) as caught:
        ask(dialogue, nano, "And this?", str(broken))
    assert as_text(caught.value, (str(broken),)).startswith("'broken.png'")
    assert len(dialogue.turns) == 1 and dialogue.pending is None
    assert ask(dialogue, nano, "What colour is it?")[-1] == "orange"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("  "), "write a question"),
        (Question("a" * (dialogues.MAX_TEXT + 1)), f"{dialogues.MAX_TEXT + 1} characters"),
        (Question("?", (STAR,) * (dialogues.MAX_FILES + 1)), f"{dialogues.MAX_FILES + 1} files"),
    ],
)
def test_a_question_that_does_not_fit(question, message):
    with pytest.raises(ValueError, match=message):
        Dialogue().ask(question)


def test_the_number_of_turns_is_limited(monkeypatch, nano):
    monkeypatch.setattr(dialogues, "MAX_TURNS", 1)
    dialogue = Dialogue()
    ask(dialogue, nano, "Who are you?")
    with pytest.raises(ValueError, match="1 turns"):
        dialogue.ask(Question("Who are you?"))


@pytest.mark.parametrize(
    "fields",
    [{"hd_num": 65}, {"hd_num": -1}, {"num_beams": 6}, {"max_new_tokens": 10**6}, {"system": "a" * 10**5}],
)
def test_settings_that_are_too_large(fields):
    with pytest.raises(ValueError, match=r"\d"):
        Settings(**fields)


def test_marks_and_files_must_agree():
    assert mark_questions("2.5", [Question("What?", (STAR,))]) == ["What?"]
    assert mark_questions("2-4khd", [Question("What?", (STAR,))]) == ["<ImageHere>What?"]
    several = [Question("What?", (STAR,)), Question("And?"), Question("This?", (RING, STAR))]
    assert mark_questions("2.5", several) == [
        "Image1 <ImageHere>; What?",
        "And?",
        "Image2 <ImageHere>; Image3 <ImageHere>; This?",
    ]
    own = Question("<ImageHere> or <ImageHere>?", (STAR, RING))
    assert mark_questions("2.5", [own]) == [own.text]
    with pytest.raises(ValueError, match="1 <ImageHere> marks but came with 2 pictures"):
        mark_questions("2.5", [Question("<ImageHere>?", (STAR, RING))])
    with pytest.raises(ValueError, match="1 <ImageHere> marks but came with 0 pictures"):
        mark_questions("2.5", [Question("<ImageHere>?")])


# ---- what is kept, and what is said ----


def history_of(num_tokens: int) -> ChatHistory:
    """A history whose size is that of its tokens."""
    states = torch.zeros(1, 1, num_tokens, 1)
    return ChatHistory([], PromptCache([0] * num_tokens, [(states, states)], "origin"))


def test_all_dialogues_together_keep_only_so_much():
    kept = KeptHistories(limit=10 * history_of(1).prompt_cache.nbytes)
    first, second, third = history_of(4), history_of(4), history_of(4)
    kept.keep(first)
    kept.keep(second)
    kept.keep(first)
    kept.keep(third)
    assert [history.prompt_cache is not None for history in (first, second, third)] == [True, False, True]
    del first
    kept.keep(fourth := history_of(6))
    assert third.prompt_cache is not None and fourth.prompt_cache is not None


def test_unexpected_errors_say_nothing_of_the_server():
    text = as_text(RuntimeError("/srv/secret failed"))
    assert "secret" not in text and "RuntimeError" in text


def test_the_command_says_what_it_needs(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("internlm_xcomposer2.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("server", "web"):
        monkeypatch.delattr(sys.modules["internlm_xcomposer2.demo"], name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["web"]) == 1
    assert "needs gradio: pip install 'internlm-xcomposer2[web]'" in capsys.readouterr().err


def test_both_languages_say_everything():
    assert ENGLISH.keys() == CHINESE.keys()


def test_tiles_are_drawn_from_pictures_and_videos(nano):
    for path in (STAR, VIDEO):
        (visual,) = as_visuals([path], nano.config)
        assert draw_tiles(visual, nano.config, 1).width > 100


def test_a_meter_counts_steps_and_stops():
    meter, ids = Meter(), torch.zeros(2, 3, dtype=torch.long)
    assert meter(ids, None).tolist() == [False, False]
    meter.stop.set()
    assert meter(ids, None).tolist() == [True, True] and meter.num_tokens == 2


# ---- articles ----

PLAN = Plan(
    Settings(do_sample=False, repetition_penalty=1.0, max_new_tokens=64), num_pictures=3, fill_spots=True
)
LINES = "The first is a star.\nThe second is a ring.\nThe third shows a number."
NUMBER = str(ROOT / "examples" / "number.png")


def test_an_article_is_what_compose_writes(nano):
    desk = Desk()
    *_, text = desk.write(nano, "Write a short article about TIGER.", (), PLAN)
    article = nano.model.compose(
        "Write a short article about TIGER.", tokenizer=nano.tokenizer, **PLAN.settings.decoding()
    )
    assert text == article.text and desk.article == article and "TIGER" in text


def test_an_article_gets_uploads_each_once(nano):
    desk = Desk()
    desk.set_text(LINES)
    steps = list(desk.illustrate(nano, [STAR, RING, NUMBER], None, PLAN))
    assert steps == ["spots", *["candidates", "choice"] * 3]
    chosen = [picture.chosen.id for picture in desk.article.pictures.values()]
    assert sorted(chosen) == [1, 2, 3] and desk.article.text == LINES
    second = desk.article.pictures[1]
    desk.choose(1, 1 - second.choice)
    assert desk.article.pictures[1].chosen.id != second.chosen.id
    desk.remove_picture(0)
    desk.add_picture(nano, 0, "a star", None, PLAN)
    added = desk.article.pictures[0]
    assert added.caption == "a star" and added.chosen.id not in {
        p.chosen.id for i, p in desk.article.pictures.items() if i
    }


def test_pictures_of_a_folder_are_used_without_uploads(nano, tmp_path):
    for file in (STAR, RING):
        shutil.copy(file, tmp_path)
    desk = Desk()
    desk.set_text(LINES)
    list(desk.illustrate(nano, (), str(tmp_path), Plan(PLAN.settings, num_pictures=1, fill_spots=True)))
    (picture,) = desk.article.pictures.values()
    assert {candidate.id for candidate in picture.candidates} == {"star.png", "ring.jpg"} and picture.chosen


def test_paragraphs_are_edited_by_the_model_and_by_hand(nano):
    desk = Desk()
    desk.set_text(LINES)
    desk.edit(nano, 0, "insert_after", "a ring", PLAN)
    composer = PLAN.composer(nano, Meter())
    expected = composer.edit(
        Article("").with_paragraphs(0, 0, *map(Paragraph, LINES.split("\n"))), 0, "insert_after", "a ring"
    )
    assert desk.article.lines == expected.lines
    list(desk.illustrate(nano, [STAR], None, PLAN))
    (line,) = desk.article.pictures
    kept = desk.article.lines[line]
    desk.set_text(f"Another line.\n\n{kept}")
    assert desk.article.lines == ["Another line.", kept] and list(desk.article.pictures) == [1]


@pytest.mark.parametrize(("kind", "name"), [("markdown", "article.md"), ("html", "article.html")])
def test_an_article_is_packed_with_its_pictures(nano, kind, name):
    desk = Desk()
    with pytest.raises(ValueError, match="no article yet"):
        desk.archive(kind)
    desk.set_text(LINES)
    list(desk.illustrate(nano, [STAR], None, PLAN))
    (line,) = desk.article.pictures
    with zipfile.ZipFile(desk.archive(kind)) as archive:
        assert sorted(archive.namelist()) == [name, f"picture_{line + 1}.png"]
        assert LINES.split("\n")[0] in archive.read(name).decode()


def test_composing_can_be_stopped(endless):
    desk = Desk()
    steps = desk.write(endless, "Go on.", (), Plan(Settings(max_new_tokens=4000)))
    next(steps)
    desk.stop()
    list(steps)
    assert 0 < len(endless.tokenizer(desk.article.text)["input_ids"]) < 1000
    with pytest.raises(ValueError, match="one of markdown, html"):
        desk.archive("pdf")


def test_articles_have_limits(nano, tmp_path, monkeypatch):
    desk = Desk()
    with pytest.raises(ValueError, match="11 pictures"):
        next(desk.write(nano, "Stars", [STAR] * 11, PLAN))
    with pytest.raises(ValueError, match="16 pictures"):
        Plan(PLAN.settings, num_pictures=16)
    with pytest.raises(ValueError, match="101 paragraphs"):
        desk.set_text("a\n" * 101)
    large = tmp_path / "large.png"
    Image.new("L", (3000, 30)).save(large)
    assert load_uploads([str(large)])[0].image.size == (2400, 24)
    with pytest.raises(ValueError, match="no paragraph 0"):
        desk.edit(nano, 0, "rewrite", "", PLAN)
    assert desk.article == Article("")
