"""Articles and pages: links, scripts and file names, then the methods on small models."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ROOT, golden_case, golden_directory, needs_published_tokenizer
from internlm_xcomposer2 import InternLMXComposer2Tokenizer, writing_internlm_xcomposer2
from internlm_xcomposer2.writing_internlm_xcomposer2 import (
    answer_budget,
    join_scripts,
    merge_scripts,
    page_path,
    read_resume,
    rewrite_image_links,
    save_page,
    seeded_generators,
)
from PIL import Image

UNSPLASH = "https://source.unsplash.com/random/800x600"
PICSUM = "https://picsum.photos/800/600"
ADAPTERS = {"sft": 3, "dpo": 2, "web": 4}
SCREENSHOT = Image.new("RGB", (40, 30), "teal")


# ---- links ----


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f'<img src="{UNSPLASH}/?city,night">', f'<img src="{PICSUM}">'),
        (f'<img src="{UNSPLASH}/?business man" alt="a">', f'<img src="{PICSUM}" alt="a">'),
        (f'<img src="{UNSPLASH}/?kid\'s toys">', f'<img src="{PICSUM}">'),
        (f"url({UNSPLASH}/?city)", f"url({PICSUM})"),
        (f"url(&quot;{UNSPLASH}/?city&quot;)", f"url(&quot;{PICSUM}&quot;)"),
        (f'srcset="{UNSPLASH}/?a 1x, {UNSPLASH}/?b 2x"', f'srcset="{PICSUM} 1x, {PICSUM} 2x"'),
        (f"see {UNSPLASH}/?city. It's there", f"see {PICSUM}. It's there"),
        (f'"{UNSPLASH}"', f'"{PICSUM}"'),
        (f'"{UNSPLASH}/?"', f'"{PICSUM}"'),
        ('"https://source.unsplash.com/random/?city"', '"https://source.unsplash.com/random/?city"'),
        (f"{UNSPLASH}/other", f"{UNSPLASH}/other"),
        ("https://example.org/800x600/?city", "https://example.org/800x600/?city"),
    ],
)
def test_links_lead_to_picsum(before, after):
    assert rewrite_image_links(before) == after


def test_other_picture_services():
    page = f'<img src="{UNSPLASH}/?city">'
    assert rewrite_image_links(page, "placehold") == '<img src="https://placehold.co/800x600">'
    assert rewrite_image_links(page, "keep") == page
    with pytest.raises(ValueError, match="unsplash.*picsum, placehold, keep"):
        rewrite_image_links(page, "unsplash")


# ---- scripts ----


@pytest.mark.parametrize(
    ("page", "answer", "merged"),
    [
        (
            "<html><script>a();</script></html>",
            "<script>b();</script> and <SCRIPT type='module'>c()</SCRIPT >",
            "<html><script>a();\nb();\nc()\n</script></html>",
        ),
        ("<script>a()</script>", "<script>(b)()</script>", "<script>a()\n;\n(b)()\n</script>"),
        ("<html>\n</html>", "<script>b()</script>", "<html>\n<script>\nb()\n</script>\n</html>"),
        ("<p>", "<script>b()</script>", "<p>\n<script>\nb()\n</script>\n"),
        ("<p>", "b()", "<p>\n<script>\nb()\n</script>\n"),
        ("<p>", "So:\n```js\nb()\n```\nDone.", "<p>\n<script>\nb()\n</script>\n"),
        (
            "<script>first</script><script>last</script>",
            r"<script>'\1\n'</script>",
            "<script>first</script><script>last\n'\\1\\n'\n</script>",
        ),
        (
            '<script src="tailwind.js"></script><script type="application/json">{}</script></html>',
            "<script>b()</script>",
            '<script src="tailwind.js"></script><script type="application/json">{}</script>'
            "\n<script>\nb()\n</script>\n</html>",
        ),
        (
            "<script>a();</script>",
            "<script src='x.js'></script><script>b()</script>",
            "\n<script src='x.js'></script>\n<script>a();\nb()\n</script>".lstrip("\n"),
        ),
        ("<script>a(", "<script>b()", "<script>a(\n</script>\n<script>\nb()\n</script>\n"),
        ("<html></html>", "", "<html></html>"),
        ("<html></html>", "<script></script>", "<html></html>"),
    ],
)
def test_scripts_join_the_page(page, answer, merged):
    assert merge_scripts(page, answer) == merged


# What a hostile answer repeats: starts without ends, fences without lines, spaces within tags.
UNITS = [
    "<script",
    "<script ",
    "<script>",
    "<script src=",
    "</script",
    "</script ",
    "```",
    "```\n",
    "```\na\n",
]
UNITS += ["<script>a</script>", '<script src="a"></script>', " ", "<", "</html ", "type=", "type ", "`", '"']
UNITS += [f"'{UNSPLASH}?", f"{UNSPLASH}/?a ", f'"{UNSPLASH}? 11 ', "https://source.unsplash.com/random/", "1"]


@pytest.mark.parametrize("unit", UNITS)
def test_anything_takes_a_second_for_each_megabyte_at_most(unit):
    text = unit * (300_000 // len(unit))
    attribute = f"<script type{text}>"
    for page, answer in (
        (text, "b()"),
        ("<html></html>", text),
        (attribute, attribute),
        (UNSPLASH + text, ""),
    ):
        started = time.process_time()
        rewrite_image_links(merge_scripts(page, answer))
        assert time.process_time() - started < len(page + answer) / 1_000_000 + 0.3


def test_joined_scripts_stay_separate():
    assert join_scripts(["a()", " ", "\nb();\n", "[c]"]) == "a()\nb();\n[c]"
    assert join_scripts(["a = b", "`c`.d()"]) == "a = b\n;\n`c`.d()"
    assert join_scripts([]) == ""


# ---- files ----


def test_page_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page_path("Resume-to-Personal Page") == tmp_path / "Resume-to-Personal_Page.html"
    (tmp_path / "out").mkdir()
    assert page_path("Seite 灵笔 v1.2", "out") == tmp_path / "out" / "Seite_灵笔_v1.2.html"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "task",
    ["", "  ", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "C:x", "a\0b", "a\nb", "nul", "Com1.x", "a" * 251],
)
def test_task_cannot_leave_the_directory(task, tmp_path):
    with pytest.raises(ValueError, match="task"):
        page_path(task, tmp_path)


def test_bad_directories(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "page.html").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        page_path("page", tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        page_path("page", tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        page_path("page", tmp_path)
    with pytest.raises(TypeError, match="task"):
        page_path(None, tmp_path)

    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="save=False"):
        page_path("other", tmp_path)


def test_page_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    save_page("灵\r\n笔\n", path)
    assert path.read_bytes() == "灵\r\n笔\n".encode()
    save_page("new", path)
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        save_page("half\ud800", path)
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_page("other", path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "new"


class FullDisk:
    """A file of a disk that is full: it can be made, but not filled."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, content):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("method", ["write_webpage", "resume_2_webpage", "screen_2_webpage"])
def test_a_full_disk_is_noticed_before_any_compute(idle, resume, monkeypatch, tmp_path, method):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: FullDisk())
    arguments = (resume, None) if method == "resume_2_webpage" else ("red", SCREENSHOT)
    with pytest.raises(
        OSError, match="no room for a page .No space left on device.; pass another output_dir"
    ):
        getattr(idle, method)(*arguments, output_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["resume.md"]


def test_a_page_that_cannot_be_saved_is_in_the_error(writer, monkeypatch, tmp_path):
    (tmp_path / "red.html").write_text("old")

    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fill)
    options = {"task": "red", "output_dir": tmp_path, "do_sample": False, "num_beams": 1, "max_new_tokens": 3}
    expected = writer.write_webpage("red", save=False, **{**options, "output_dir": None})
    with pytest.raises(OSError, match="No space left on device: the page wasn't saved.*red.html") as caught:
        writer.write_webpage("red", **options)
    assert caught.value.text == expected and caught.value.errno == 28
    assert [file.name for file in tmp_path.iterdir()] == ["red.html"]
    assert (tmp_path / "red.html").read_text() == "old"


def test_read_resume(tmp_path):
    path = tmp_path / "resume.md"
    path.write_bytes("\ufeff# 灵笔\r\n".encode())
    assert read_resume(path) == read_resume(str(path)) == "# 灵笔\n"
    for content, message in ((b"\xff\xfe#", "UTF-8"), (b" \n", "empty"), (b"#" * (5 << 20), "limit")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_resume(path)
    for missing in (tmp_path, tmp_path / "other.md", "# A resume\n" * 1000, "a\0b"):
        with pytest.raises(FileNotFoundError, match="Markdown"):
            read_resume(missing)
    with pytest.raises(TypeError, match="NoneType"):
        read_resume(None)


# ---- budgets and seeds ----


def test_answer_budget():
    assert answer_budget(100, 8192) == 8092
    assert answer_budget(100, 8192, 10) == 10
    assert answer_budget(100, 104, 10) == 4
    with pytest.raises(ValueError, match="104 tokens.*max_length 104"):
        answer_budget(104, 104)


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_seeding_ends_with_the_block():
    before = random_states()
    with seeded_generators(7):
        first = torch.rand(3)
    assert random_states() == before
    with pytest.raises(ZeroDivisionError), seeded_generators(7):
        assert torch.equal(torch.rand(3), first)
        _ = 1 / 0
    assert random_states() == before
    with seeded_generators(-1):
        assert torch.rand(1) is not None
    assert random_states() != before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeding_of_a_gpu_ends_with_the_block():
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded_generators(7):
            draws.append(torch.rand(3, device="cuda"))
    assert torch.equal(*draws)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ---- the methods, on a random model with the small vocabulary ----


@pytest.fixture(scope="module")
def tokenizer() -> InternLMXComposer2Tokenizer:
    return InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))


@pytest.fixture
def writer(tiny, tokenizer):
    model = tiny(task_adapters=ADAPTERS)
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def seen(writer, tokenizer, monkeypatch) -> list[dict]:
    """What each call generates from and with, the prompt as text."""
    calls = []
    generate = writer._generate_answer

    def record(inputs, **kwargs):
        ids = [i for i in inputs["input_ids"][0].tolist() if i != writer.config.image_token_id]
        calls.append({**kwargs, "inputs": inputs, "prompt": tokenizer.decode(ids[1:])})
        calls[-1]["state"] = torch.get_rng_state()
        return generate(inputs, **kwargs)

    monkeypatch.setattr(writer, "_generate_answer", record)
    return calls


@pytest.fixture
def resume(tmp_path):
    path = tmp_path / "resume.md"
    path.write_text("# A name\n")
    return path


def user_turn(text: str) -> str:
    return f"[UNUSED_TOKEN_146]user\n{text}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"


def test_article_defaults(writer, seen):
    writer.write_artical("red", max_length=30)
    (call,) = seen
    assert call["prompt"] == user_turn("red")
    assert call["infer_mode"] == "write"
    assert call["eos_token_id"] == [2, 5]
    assert call["max_new_tokens"] == 30 - call["inputs"]["input_ids"].shape[1]
    sampling = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 0.8, "top_k": 40}
    assert sampling.items() <= call.items()
    assert {"repetition_penalty": 1.005, "length_penalty": 1.0}.items() <= call.items()


def test_webpage_defaults(writer, seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = writer.write_webpage("red", max_new_tokens=3)
    (call,) = seen
    assert call["prompt"] == user_turn("red")
    assert {
        "do_sample": True,
        "num_beams": 2,
        "temperature": 1.0,
        "repetition_penalty": 3.0,
    }.items() <= call.items()
    assert call["infer_mode"] == "web"
    assert "top_p" not in call
    assert (tmp_path / "Instruction-aware_Webpage_Generation.html").read_text(encoding="utf-8") == page


def test_no_markup_in_the_answer(writer, monkeypatch):
    answer = torch.tensor([writer.tokenizer("[UNUSED_TOKEN_146]red[UNUSED_TOKEN_145]")["input_ids"]])
    monkeypatch.setattr(writer, "_generate_answer", lambda *args, **kwargs: answer)
    assert writer.write_artical("red").strip() == "red"


def test_one_seed_one_text(writer):
    def write(seed: int) -> str:
        return writer.write_article("red", max_new_tokens=12, seed=seed)

    torch.manual_seed(0)
    before = random_states()
    first = write(3)
    assert write(3) == first
    assert write(4) != first
    assert random_states() == before
    texts = {write(-1), write(-1)}
    assert len(texts) == 2
    assert random_states() != before


@pytest.mark.parametrize("beams", [1, 2])
def test_threads_with_seeds_write_as_one_alone(writer, beams):
    def write(seed: int) -> str:
        return writer.write_article("red", max_new_tokens=12, seed=seed, num_beams=beams)

    def chat(_: int) -> str:
        return writer.chat(writer.tokenizer, "red", max_new_tokens=12)[0]

    alone = [write(seed) for seed in range(8)]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(chat, seed) for seed in range(8)]
        assert list(threads.map(write, range(8))) == alone
        assert list(threads.map(write, range(7, -1, -1))) == alone[::-1]
    assert len({other.result() for other in others}) > 4


def test_tiles_and_pictures(writer, seen):
    wide = Image.new("RGB", (20 * writer.config.img_size, writer.config.img_size))
    writer.write_artical("red", wide, max_new_tokens=1)
    writer.write_artical("red", [wide], 4, max_new_tokens=1)
    writer.write_webpage("<ImageHere> or <ImageHere>", [wide, wide], 1, save=False)
    writer.write_artical("red", None, max_new_tokens=1)
    grids = [call["inputs"]["image_grid_hw"].tolist() for call in seen[:3]]
    assert grids == [[[1, 20]], [[1, 4]], [[1, 20], [1, 20]]]
    assert seen[3]["inputs"]["input_ids"][0].tolist().count(1) == 1


def test_resume_takes_two_steps(writer, seen, resume, tmp_path):
    before = random_states()
    page = writer.resume_2_webpage(
        resume, max_new_tokens=3, seed=202, output_dir=tmp_path, image_links="keep"
    )
    html, javascript = seen
    assert html["prompt"] == user_turn(" Generate a personal page using the content in the resume:# A name\n")
    assert "user\n Generate JavaScript events for the html code:" in javascript["prompt"]
    assert torch.equal(html["state"], javascript["state"])
    assert html["infer_mode"] == javascript["infer_mode"] == "web"
    assert (tmp_path / "Resume-to-Personal_Page.html").read_text(encoding="utf-8") == page
    assert random_states() == before


def test_resume_joins_the_answers(writer, resume, monkeypatch, tmp_path):
    answers = iter([f'<html><img src="{UNSPLASH}/?a"><script>a();</script></html>', "<script>b()</script>"])
    prompts = []

    def answer(query, *args, **kwargs):
        prompts.append(query)
        return next(answers)

    monkeypatch.setattr(writer, "_write", answer)
    page = writer.resume_2_webpage(str(resume), save=False)
    assert page == f'<html><img src="{PICSUM}"><script>a();\nb()\n</script></html>'
    assert UNSPLASH in prompts[1]
    assert [file.name for file in tmp_path.iterdir()] == ["resume.md"]


def test_screenshot(writer, seen, tmp_path):
    path = tmp_path / "shot.png"
    SCREENSHOT.save(path)
    page = writer.screen_2_webpage("anything", [str(path)], max_new_tokens=3, output_dir=tmp_path)
    assert seen[0]["prompt"] == user_turn(" Generate the HTML code of this web image with Tailwind CSS.")
    assert (tmp_path / "Screenshot-to-Webpage.html").read_text(encoding="utf-8") == page
    writer.screen_2_webpage(None, SCREENSHOT, max_new_tokens=1, save=False)


@pytest.mark.parametrize("autocast", [False, True])
def test_all_methods_under_autocast(writer, resume, autocast):
    options = {"max_new_tokens": 3, "seed": 1, "save": False}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        texts = [
            writer.write_artical("red", [SCREENSHOT], max_new_tokens=3),
            writer.write_artical("red", num_beams=2, max_new_tokens=3, min_new_tokens=3),
            writer.write_webpage("red", do_sample=False, num_beams=1, **options),
            writer.resume_2_webpage(resume, **options),
            writer.screen_2_webpage("", SCREENSHOT, **options),
        ]
    assert all(isinstance(text, str) for text in texts)


def test_history_is_ignored_with_a_warning(writer, monkeypatch):
    warnings = []
    monkeypatch.setattr(writing_internlm_xcomposer2.logger, "warning_once", warnings.append)
    options = {"max_new_tokens": 3, "do_sample": False}
    plain = writer.write_artical("red", **options)
    assert writer.write_artical("red", history=[("a", "b")], **options) == plain
    assert len(warnings) == 1
    assert "history" in warnings[0]


def test_system_text_and_tokenizer_on_request(writer, seen, tokenizer):
    writer.tokenizer = None
    writer.write_artical(
        "red", max_new_tokens=1, use_meta=True, meta_instruction="Blue.", tokenizer=tokenizer, max_length=100
    )
    assert seen[0]["prompt"].startswith("[UNUSED_TOKEN_146]system\nBlue.[UNUSED_TOKEN_145]\n")


# ---- bad input, before any compute ----


@pytest.fixture
def idle(writer, monkeypatch):
    """A model that must not be run."""

    def fail(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(writer, "_generate_answer", fail)
    monkeypatch.setattr(writer, "embed_inputs", fail)
    return writer


def test_bad_input(idle, tmp_path):
    with pytest.raises(ValueError, match="picture"):
        idle.screen_2_webpage("red", [])
    with pytest.raises(ValueError, match="picture"):
        idle.screen_2_webpage("red", None)
    with pytest.raises(ValueError, match="task"):
        idle.write_webpage("red", task="../page")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        idle.write_webpage("red", output_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="image_links"):
        idle.write_webpage("red", image_links="flickr", save=False)
    with pytest.raises(FileNotFoundError):
        idle.resume_2_webpage(tmp_path / "resume.md", save=False)
    with pytest.raises(ValueError, match="seed"):
        idle.write_artical("red", seed=-2)
    with pytest.raises(TypeError, match="seed"):
        idle.write_artical("red", seed="7")
    with pytest.raises(TypeError, match="inst"):
        idle.write_artical(None)
    with pytest.raises(ValueError, match="max_length 5"):
        idle.write_artical("red", max_length=5)
    with pytest.raises(ValueError, match="streamer"):
        idle.write_webpage("red", streamer=object(), save=False)
    idle.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        idle.write_artical("red")


def test_adapters_that_the_checkpoint_lacks(tiny, tokenizer, resume, monkeypatch, tmp_path):
    model = tiny(task_adapters={"web": 4})
    model.tokenizer = tokenizer
    with pytest.raises(ValueError, match="sft, dpo.*base"):
        model.write_artical("red")
    assert isinstance(model.write_artical("red", infer_mode="base", max_new_tokens=2), str)
    bare = tiny()
    bare.tokenizer = tokenizer
    for write, inst in ((bare.write_webpage, "red"), (bare.resume_2_webpage, resume)):
        with pytest.raises(ValueError, match="adapters web"):
            write(inst, output_dir=tmp_path)
    with pytest.raises(ValueError, match="adapters web"):
        bare.screen_2_webpage("", SCREENSHOT, output_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["resume.md"]


def test_failed_generation_writes_nothing(writer, monkeypatch, tmp_path):
    state = torch.get_rng_state()
    monkeypatch.setattr(writer, "_generate_answer", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.write_webpage("red", seed=1, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)


# ---- the original's numbers ----


@needs_published_tokenizer
def test_article_as_recorded(family_model, published):
    case, _ = golden_case("2d5", "infer_write_text")
    for recorded in case["generations"]:
        text = family_model("2d5").write_artical(
            case["call"]["query"],
            tokenizer=published,
            do_sample=False,
            max_new_tokens=len(recorded["new_tokens"]),
            num_beams=recorded["num_beams"],
            repetition_penalty=recorded["repetition_penalty"],
        )
        assert text == recorded["response"]


@needs_published_tokenizer
def test_page_as_recorded(family_model, published):
    case, _ = golden_case("2d5", "infer_web_image")
    for recorded in case["generations"]:
        page = family_model("2d5").write_webpage(
            case["call"]["query"],
            [golden_directory() / name for name in case["call"]["image"]],
            tokenizer=published,
            do_sample=False,
            max_new_tokens=len(recorded["new_tokens"]),
            num_beams=recorded["num_beams"],
            repetition_penalty=recorded["repetition_penalty"],
            save=False,
        )
        assert page == recorded["response"]
