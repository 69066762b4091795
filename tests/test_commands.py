"""The commands of `ixc2` that ask a model and write with it, on nano."""

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForSequenceClassification
from internlm_xcomposer2.article_internlm_xcomposer2 import Article
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory
from internlm_xcomposer2.ixc2 import ask, engine, pages
from internlm_xcomposer2.ixc2.main import main
from PIL import Image

EXAMPLES = ROOT / "examples"
STAR, RING, VIDEO = (str(EXAMPLES / name) for name in ("star.png", "ring.jpg", "circle.mp4"))


@pytest.fixture(scope="module")
def nano():
    options = argparse.Namespace(model=None, backend=None, dtype="auto", device=None)
    return engine.load_engine(options, None)


@pytest.fixture(autouse=True)
def loaded(nano, monkeypatch, tmp_path):
    """The commands load nano once, and work in an empty directory."""
    for module in (ask, pages):
        monkeypatch.setattr(module, "load_engine", lambda *args: nano)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Arguments -> exit status, what was printed, and the errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def no_model(*args):
    raise AssertionError("a model was loaded")


# ---- ask, video ----


def test_a_question_about_a_picture(run):
    assert run("ask", STAR, "What shape is the object?") == (0, "star\n", "")


def test_several_pictures_are_numbered(run):
    assert run("ask", STAR, RING, "Which picture shows the ring?")[1] == "picture 2\n"
    marked = "Which picture shows the ring? Picture 1: <ImageHere>; picture 2: <ImageHere>"
    assert run("ask", STAR, RING, marked)[1] == "picture 2\n"


def test_a_question_after_options_and_tiles(run):
    small = EXAMPLES / "small.png"
    question = "What word is printed in the picture?"
    with_tiles = run("ask", small, "--hd-num", "9", question)
    assert with_tiles[:2] == (0, "ART\n")
    assert run("ask", small, question)[1] != with_tiles[1]


def test_json_for_machines(run):
    status, printed, _ = run("ask", STAR, "What shape is the object?", "--json")
    assert status == 0
    row = json.loads(printed)
    assert row == {
        "question": "What shape is the object?",
        "pictures": [STAR],
        "answer": "star",
        "model": str(ROOT),
    }


def test_a_dialogue(run, monkeypatch):
    lines = ["What colour is it?", "/add nowhere.png", f"/add {RING}", "What shape is it?", "", "no"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, printed, errors = run("ask", "--chat", STAR, "What shape is the object?")
    assert (status, printed.splitlines()[:2]) == (0, ["star", "orange"])
    assert len(printed.splitlines()) == 3
    assert errors == "ixc2: no such file: 'nowhere.png'\n"


def test_a_dialogue_without_a_first_question(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What shape is the object?\n"))
    assert run("ask", "--chat", RING)[:2] == (0, "ring\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?"))
    assert "nano" in run("ask", "--chat")[1]


def test_a_video(run):
    assert run("video", VIDEO, "Which way does the object move?", "--fps", "2")[1] == "right\n"
    assert run("video", VIDEO, "Which way does the object move?", "--num-frames", "0")[0] == 1


def test_one_seed_one_answer(run):
    def answer(seed: int) -> str:
        return run("ask", "Who are you?", "--temperature", "9", "--seed", seed, "--max-new-tokens", "20")[1]

    assert answer(1) == answer(1) != answer(2)
    assert run("ask", "Who are you?", "--beams", "2")[1].startswith("I am nano")


def test_boxes_are_drawn(run, nano, monkeypatch):
    answer = "[100, 100, 900, 900]"
    monkeypatch.setattr(nano.model, "chat", lambda *args, **kwargs: (answer, ChatHistory()))
    assert run("ask", STAR, "Where is the star?", "--draw", "boxes.png")[0] == 0
    side = Image.open(STAR).width
    assert Image.open("boxes.png").getpixel((round(side / 10), side // 2)) == (255, 0, 0)
    assert run("ask", STAR, RING, "Where?", "--draw", "boxes.png")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask"], "write a question after the pictures"),
        (["ask", STAR], "is a file"),
        (["ask", "nowhere.png", "What?"], "nowhere.png"),
        (["video", "nowhere.mp4", "What?"], "nowhere.mp4"),
        (["page", "A page.", "nowhere.png"], "nowhere.png"),
        (["page", "A page.", "--output", "page.txt"], "must end in .html"),
        (["page", "A page.", "--output", "nowhere/page.html"], "does not exist"),
        (["resume", "nowhere.md"], "nowhere.md"),
        (["screenshot", "nowhere.png"], "nowhere.png"),
        (["article", "Tigers.", "--images", "nowhere.png"], "nowhere.png"),
        (["article", "Tigers.", "--pictures", "nowhere"], "nowhere"),
        (["article", "Tigers.", "--encoder", "clip"], "--pictures"),
        (["caption", "nowhere"], "nowhere"),
        (["caption", "."], "no pictures"),
        (["caption", str(EXAMPLES), "--batch-size", "0"], "at least 1"),
    ],
)
def test_errors_before_a_model_is_loaded(run, monkeypatch, arguments, words):
    for module in (ask, pages):
        monkeypatch.setattr(module, "load_engine", no_model)
    status, printed, errors = run(*arguments)
    assert (status, printed) == (1, "")
    assert errors.startswith("ixc2: ") and words in errors and errors.count("\n") == 1
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "arguments", [["ask", "--frobnicate"], ["frobnicate"], [], ["page"], ["video", VIDEO]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: ixc2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ask", "video", "caption", "page", "resume", "screenshot", "article"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--model" in capsys.readouterr().out


# ---- caption ----


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures, a broken one, one in a folder below, and a text."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name in ("star.png", "ring.jpg", "circles.png", "objects.png", "number.png"):
        shutil.copy(EXAMPLES / name, folder)
    shutil.copy(EXAMPLES / "word.jpg", folder / "below")
    (folder / "broken.png").write_text("broken")
    (folder / "notes.txt").write_text("notes")
    return folder


def rows_of(path: Path) -> dict[str, str]:
    return {(row := json.loads(line))["file"]: row["caption"] for line in path.read_text().splitlines()}


def test_captions_as_json_lines(run, folder):
    status, printed, errors = run("caption", folder, "--json")
    assert status == 1  # for the broken one
    report = json.loads(printed)
    assert report == {
        "pictures": 6,
        "new": 5,
        "known": 0,
        "unreadable": ["broken.png"],
        "output": str(folder / "captions.jsonl"),
    }
    rows = rows_of(folder / "captions.jsonl")
    assert rows["star.png"] == "The picture shows an orange star."
    assert rows["ring.jpg"] == "The picture shows a green ring."
    (folder / "broken.png").unlink()
    status, printed, _ = run("caption", folder, "--recursive", "--batch-size", "1")
    assert status == 0
    assert "1 new captions and 5 earlier ones" in printed
    assert "below/word.jpg" in rows_of(folder / "captions.jsonl")


def test_an_interrupted_run_goes_on(run, nano, folder, monkeypatch):
    chat, asked = nano.model.batch_chat, []

    def interrupted(tokenizer, questions, images, *args, **kwargs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(images))
        return chat(tokenizer, questions, images, *args, **kwargs)

    (folder / "broken.png").unlink()
    output = folder.parent / "out.jsonl"
    command = ("caption", folder, "--output", output, "--batch-size", "2")
    with monkeypatch.context() as patch:
        patch.setattr(nano.model, "batch_chat", interrupted)
        assert run(*command)[0] == 130
    assert asked == [2, 2] and len(rows_of(output)) == 4
    whole = output.read_bytes()
    output.write_bytes(whole[:-5])  # killed while it wrote
    asked.clear()
    monkeypatch.setattr(nano.model, "batch_chat", interrupted)
    status, printed, _ = run(*command)
    assert (status, asked) == (0, [2])
    assert "2 new captions and 3 earlier ones" in printed
    assert len(output.read_text().splitlines()) == len(rows_of(output)) == 5


def test_a_changed_picture_or_question_counts_as_new(run, folder):
    (folder / "broken.png").unlink()
    run("caption", folder)
    shutil.copy(EXAMPLES / "word.jpg", folder / "star.png")
    assert "1 new captions and 4 earlier" in run("caption", folder)[1]
    assert "5 new captions and 0 earlier" in run("caption", folder, "--question", "Write a short caption.")[1]


def test_captions_beside_the_pictures(run, folder):
    (folder / "star.txt").write_text("my own words")
    assert run("caption", folder, "--sidecar")[0] == 1
    assert (folder / "ring.txt").read_text() == "The picture shows a green ring.\n"
    assert (folder / "star.txt").read_text() == "my own words"
    assert not (folder / "broken.txt").exists()
    shutil.copy(folder / "star.png", folder / "ring.png")
    status, _, errors = run("caption", folder, "--sidecar")
    assert status == 1 and "ring.jpg and ring.png would share ring.txt" in errors


def test_a_file_that_holds_something_else(run, folder):
    (folder / "captions.jsonl").write_text('{"image": "star.png"}\n')
    status, _, errors = run("caption", folder)
    assert status == 1 and "line 1" in errors and "another file" in errors


# ---- pages and articles ----

PAGE = "Make a green web page with the title TIGER."


def test_a_page(run, tmp_path):
    status, printed, _ = run("page", PAGE, "--output", "tiger.html")
    assert (status, printed) == (0, f"{tmp_path / 'tiger.html'}\n")
    page = (tmp_path / "tiger.html").read_text()
    assert "<title>TIGER</title>" in page and "background: green" in page
    assert run("page", PAGE, "--output", "-")[1].strip() == page.strip()
    status, _, errors = run("page", PAGE, "--output", "tiger.html")
    assert status == 1 and "--force" in errors
    assert json.loads(run("page", PAGE, "--output", "tiger.html", "--force", "--json")[1]) == {
        "file": str(tmp_path / "tiger.html"),
        "characters": len(page),
    }


def test_pages_from_a_resume_and_a_screenshot(run, tmp_path):
    (tmp_path / "ada.md").write_text("# Ada\n")
    assert run("resume", "ada.md", "--max-new-tokens", "5")[0] == 0
    assert run("screenshot", STAR, "--max-new-tokens", "5")[0] == 0
    assert {path.name for path in tmp_path.glob("*.html")} == {"resume.html", "screenshot.html"}


def test_an_article(run, tmp_path):
    status, printed, _ = run("article", "Write a short article about TIGER.", "--max-new-tokens", "60")
    assert (status, printed) == (0, "article/article.md\n")
    assert "TIGER" in (tmp_path / "article" / "article.md").read_text()
    assert run("article", "Write a short article about TIGER.")[0] == 1


def test_an_article_with_pictures(run, tmp_path, folder):
    command = (
        "article",
        "Write a short article about TIGER.",
        "--max-new-tokens",
        "60",
        "--num-pictures",
        "1",
    )
    status, printed, _ = run(*command, "--pictures", folder, "--format", "html", "--json")
    assert status == 0
    (part,) = json.loads(printed)["paragraphs"]
    assert len(part["picture"]["candidates"]) == 4 and part["picture"]["choice"] in range(4)
    assert '<img src="picture_1.png"' in (tmp_path / "article" / "article.html").read_text()
    assert run(*command, "--images", STAR, RING, "--format", "json", "--output", "two")[0] == 0
    article = Article.from_json((tmp_path / "two" / "article.json").read_text())
    assert len(article.pictures[0].candidates) == 2


# ---- the model ----


def test_which_models(monkeypatch, tmp_path):
    options = argparse.Namespace(model=None, backend=None, dtype="auto", device=None)
    assert engine.load_engine(options).is_nano
    monkeypatch.setattr(engine, "NANO", tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="--model"):
        engine.load_engine(options)


def test_a_reward_model_is_refused(tmp_path, monkeypatch):
    reward = InternLMXComposer2ForSequenceClassification(tiny_model("2.5").config)
    reward.save_pretrained(tmp_path)
    shutil.copy(ROOT / "tokenizer.model", tmp_path)
    options = argparse.Namespace(model=str(tmp_path), backend=None, dtype="auto", device=None)
    with pytest.raises(ValueError, match="chat checkpoint"):
        engine.load_engine(options)
