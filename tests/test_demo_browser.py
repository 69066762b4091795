"""The pages in a browser: true answers, two visitors, what is refused, and how written pages are kept apart.

`IXC2_SCREENSHOTS=docs/pictures` renews the pictures of the documentation.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from demo_helpers import BROWSER, FLAGS, endless_service, nano_service
from helpers import ROOT

pytest.importorskip("gradio", reason="pip install -e '.[web]'")
pytest.importorskip("playwright", reason="pip install -e '.[web-test]'")
if BROWSER is None:
    pytest.skip("there is no chromium; set IXC2_BROWSER", allow_module_level=True)

from gradio import Blocks
from internlm_xcomposer2.demo import chat, desk, dialogue, server, web, writing
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
SECONDS = 60  # that anything may take
SHAPE, COLOUR = "What shape is the object?", "What colour is it?"
HOSTILE = """<html><body><h1 id="title">Hi</h1><script>
const tried = {};
try { tried.parent = parent.document.title; } catch (error) { tried.parent = "refused"; }
try { tried.storage = String(localStorage); } catch (error) { tried.storage = "refused"; }
try { tried.cookies = document.cookie; } catch (error) { tried.cookies = "refused"; }
fetch("ADDRESS/config").then(() => tried.fetch = "done", () => tried.fetch = "refused").then(() => {
  tried.origin = origin;
  document.getElementById("title").textContent = JSON.stringify(tried);
});
try { top.location = "about:blank"; } catch (error) {}
</script></body></html>"""


# ---- the site and its visitors ----


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[Callable]:
    """A page's builder and a service -> address."""
    running = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))

        def start(build: Callable, service) -> str:
            running.append(build(service))
            address = server.launch(running[-1], host="127.0.0.1", port=None, web_content=False)
            return address.rstrip("/")

        yield start
        for pages in running:
            pages.close()


@pytest.fixture(scope="module")
def site(serve) -> str:
    return serve(web.build, nano_service())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Page]]:
    """Address -> the page of a new visitor. Requests to other hosts and errors of the page fail the test."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def watch(request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            wrong.append(request.url)

    def go(address: str, locale: str = "en-US", ready: str = "#question textarea") -> Page:
        contexts.append(browser.new_context(locale=locale, viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", watch)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    yield go
    for context in contexts:
        wrong += [page.url for page in context.pages if "[object" in page.content()]  # a label without words
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def shot(tmp_path_factory) -> Callable[[Page, str], None]:
    """Take a screenshot, for the documentation if asked for."""
    folder = Path(os.environ.get("IXC2_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))

    def take(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return take


def ask(page: Page, text: str, *files: Path | str) -> None:
    """Upload, write and send."""
    if files:
        page.set_input_files("#question input[type=file]", [str(file) for file in files])
        expect(
            page.locator("#question button[aria-label='Remove file'], #question .thumbnail-item")
        ).not_to_have_count(0)
    page.fill("#question textarea", text)
    page.click("#question [data-testid=submit-button]")


def answers(page: Page):
    return page.locator("#dialogue [data-testid=bot] .md")


def expect_answers(page: Page, *texts: str | re.Pattern) -> None:
    """Exactly these answers, the last of them complete."""
    expect(answers(page)).to_have_text(list(texts), timeout=SECONDS * 1000)
    expect(page.locator("#question [data-testid=submit-button]")).to_be_visible(timeout=SECONDS * 1000)


# ---- chat ----


def test_two_turns_about_a_picture(site, visit, shot):
    page = visit(site)
    ask(page, SHAPE, EXAMPLES / "star.png")
    expect_answers(page, "star")
    ask(page, COLOUR)
    expect_answers(page, "star", "orange")
    expect(page.locator("#answer_tokens input")).not_to_have_value("")
    expect(page.locator("#image_tokens input")).to_have_value("41")
    ask(page, "What number is printed in the picture?", EXAMPLES / "number.png")
    expect(answers(page)).to_have_count(3, timeout=SECONDS * 1000)
    expect(page.locator("#tiles img")).to_have_count(1)
    shot(page, "chat")


def test_a_video(site, visit):
    page = visit(site)
    ask(page, "Which way does the object move?", EXAMPLES / "circle.mp4")
    expect_answers(page, "right")


def test_several_pictures_and_what_the_model_sees(site, visit):
    page = visit(site)
    ask(page, "Which picture shows the ring?", EXAMPLES / "star.png", EXAMPLES / "ring.jpg")
    expect_answers(page, "picture 2")
    expect(page.locator("#tiles img")).not_to_have_count(0)


def test_retry_and_undo(site, visit):
    page = visit(site)
    ask(page, SHAPE, EXAMPLES / "star.png")
    expect_answers(page, "star")
    page.click("#dialogue button[aria-label=Retry]")
    expect_answers(page, "star")
    ask(page, COLOUR)
    expect_answers(page, "star", "orange")
    page.click("#dialogue button[aria-label=Undo]")
    expect_answers(page, "star")
    expect(page.locator("#question textarea")).to_have_value(COLOUR)
    page.click("#new")
    expect(answers(page)).to_have_count(0)


def test_an_example_with_its_tiles(site, visit):
    page = visit(site)
    page.get_by_text("What word is printed in the picture?").click()
    expect(page.locator("#question textarea")).to_have_value("What word is printed in the picture?")
    page.click("#question [data-testid=submit-button]")
    expect_answers(page, "ART")


def test_an_answer_can_be_stopped(serve, visit, request):
    service = endless_service()
    slow = service.model.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))  # half a minute in all
    request.addfinalizer(slow.remove)
    page = visit(serve(chat.build, service))
    ask(page, "Go on.")
    expect(answers(page)).to_have_text(re.compile(r".{20}", re.DOTALL), timeout=SECONDS * 1000)
    page.click("#question .stop-button")
    expect(page.locator("#question [data-testid=submit-button]")).to_be_visible(timeout=SECONDS * 1000)
    number = page.locator("#answer_tokens input")
    expect(number).not_to_have_value("")
    assert 0 < float(number.input_value()) < 1024


def test_two_visitors_at_once(site, visit):
    first, second = visit(site), visit(site)
    ask(first, SHAPE, EXAMPLES / "star.png")
    ask(second, SHAPE, EXAMPLES / "ring.jpg")
    expect_answers(second, "ring")
    expect_answers(first, "star")
    ask(second, COLOUR)
    ask(first, COLOUR)
    expect_answers(first, "star", "orange")
    expect_answers(second, "ring", "green")
    assert "ring" not in first.inner_text("#dialogue") and "star" not in second.inner_text("#dialogue")
    assert "ring.jpg" not in first.inner_html("#dialogue") and "star.png" not in second.inner_html(
        "#dialogue"
    )


def test_a_broken_file_is_explained_and_the_question_is_kept(site, visit, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((EXAMPLES / "star.png").read_bytes()[:200])
    page = visit(site)
    ask(page, SHAPE, broken)
    expect_answers(page, re.compile("^Error.*broken.png"))
    assert str(tmp_path) not in page.content()
    expect(page.locator("#question textarea")).to_have_value(SHAPE)
    page.reload()
    page.wait_for_selector("#question textarea")
    ask(page, SHAPE, EXAMPLES / "star.png")
    expect_answers(page, "star")


def test_marks_that_do_not_fit_are_explained(site, visit):
    page = visit(site)
    ask(page, "<ImageHere><ImageHere> Which?", EXAMPLES / "star.png")
    expect_answers(page, re.compile("2 <ImageHere> marks but came with 1 pictures"))


def test_chinese(site, visit, shot):
    page = visit(site, locale="zh-CN")
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    ask(page, SHAPE, EXAMPLES / "star.png")
    expect_answers(page, "star")
    shot(page, "chat_zh")


# ---- web pages ----


def test_a_page_is_written_shown_and_given(site, visit, shot):
    page = visit(site)
    page.get_by_role("tab", name="Web page").click()
    page.fill("#instruction textarea", "Make a green web page with the title TIGER.")
    page.click("#write")
    frame = page.frame_locator("#page-frame")
    expect(frame.locator("h1")).to_have_text("TIGER", timeout=SECONDS * 1000)
    colour = frame.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert colour == "rgb(0, 128, 0)"
    with page.expect_download() as download:
        page.locator("#code [aria-label=Download], #code a[download]").first.click()
    assert "<title>TIGER</title>" in Path(download.value.path()).read_text(encoding="utf-8")
    shot(page, "page")


def test_pages_come_from_what_the_methods_get(tmp_path):
    service, decoding = nano_service(), (False, 1.0, 1, 1.0, 12)
    settings = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 12,
        "save": False,
    }
    resume, star = tmp_path / "cv.md", str(EXAMPLES / "star.png")
    resume.write_text("# Ada", encoding="utf-8")

    def written(source: str, text: str, file: str | None) -> str:
        return writing.write_page(service, dialogue.Meter(), source, text, file, 0, -1, *decoding)

    expected = service.model.resume_2_webpage(resume, **settings)
    assert written("resume", "# Ada", None) == written("resume", "", str(resume)) == expected
    assert written("screenshot", "", star) == service.model.screen_2_webpage("", star, **settings)
    with pytest.raises(ValueError, match="add a file"):
        written("resume", " ", None)


def test_a_question_that_only_waits_can_be_dropped():
    visitor = dialogue.Dialogue()
    chat.take({"text": "Who are you?", "files": []}, visitor)
    messages, box = chat.stop(visitor)
    assert messages == [] and visitor.pending is None and box.submit_btn is True


def test_a_page_needs_something_to_be_written_from(site, visit):
    page = visit(site)
    page.get_by_role("tab", name="Web page").click()
    page.get_by_label("a screenshot").click()
    page.click("#write")
    expect(page.locator("#page-message textarea, #page-message input")).to_have_value(
        re.compile("screenshot")
    )


# ---- articles ----

LINES = ("The first is a star.", "The second is a ring.", "The third shows a number.")


def compose(visit, site: str, *files: str, locale: str = "en-US") -> Page:
    """A visitor with an article of three lines, and uploads."""
    page = visit(f"{site}/composition", locale, "#about textarea")
    page.set_input_files("#uploads input[type=file]", [str(EXAMPLES / name) for name in files])
    expect(page.locator("#uploads .file-preview tr")).to_have_count(len(files), timeout=SECONDS * 1000)
    page.locator("button.label-wrap").nth(1).click()
    page.fill("#article-text textarea", "\n".join(LINES))
    page.click("#take-text")
    expect(page.locator("#article p")).to_have_count(len(LINES), timeout=SECONDS * 1000)
    return page


def sources(page: Page) -> list[str]:
    """The pictures of the article, in order."""
    return [image.get_attribute("src") for image in page.locator("#article img").all()]


def test_an_article_is_written(site, visit):
    page = visit(f"{site}/composition", ready="#about textarea")
    page.fill("#about textarea", "Write a short article about TIGER.")
    page.click("#write-article")
    expect(page.locator("#article")).to_contain_text("I like TIGER.", timeout=SECONDS * 1000)


def test_an_article_from_three_uploads(site, visit, shot):
    page = compose(visit, site, "star.png", "ring.jpg", "number.png")
    page.click("#illustrate")
    expect(page.locator("#article img")).to_have_count(3, timeout=SECONDS * 1000)
    expect(page.locator("#article-message textarea, #article-message input")).to_have_value("")
    before = sources(page)
    assert len(set(before)) == 3
    offered = page.locator("#candidates button.thumbnail-item")
    expect(offered).to_have_count(3)
    shot(page, "composition")
    offered.nth(0).click()
    expect(page.locator("#article img").first).to_have_attribute("src", re.compile("^data:image/jpeg"))
    page.click("#remove-picture")
    expect(page.locator("#article img")).to_have_count(2, timeout=SECONDS * 1000)
    page.click("#as-html")
    with page.expect_download() as download:
        page.locator("#archive a[download]").first.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert len([name for name in archive.namelist() if name.endswith(".png")]) == 2
        assert all(line in archive.read("article.html").decode() for line in LINES)


def test_a_paragraph_is_changed(site, visit):
    page = compose(visit, site)
    page.fill("#material textarea, #material input", "a star")
    page.get_by_label("insert after").click()
    page.click("#change")
    expect(page.locator("#article p")).to_have_count(4, timeout=SECONDS * 1000)


def test_html_in_an_article_is_text(site, visit):
    page = compose(visit, site)
    page.fill("#article-text textarea", "<img src=x onerror=alert(1)><script>alert(1)</script>")
    page.click("#take-text")
    expect(page.locator("#article p")).to_have_count(1, timeout=SECONDS * 1000)
    expect(page.locator("#article p")).to_contain_text("<script>alert(1)</script>")
    assert page.locator("#article img, #article script").count() == 0


def test_two_composers_and_chinese(site, visit):
    first, second = (
        compose(visit, site, locale="zh-CN"),
        visit(f"{site}/composition", ready="#about textarea"),
    )
    expect(first.get_by_role("button", name="配图")).to_be_visible()
    expect(second.locator("#article p")).to_have_count(0)


# ---- what must not happen ----


def test_a_written_page_is_a_stranger_to_ours(site, visit, monkeypatch):
    hostile = HOSTILE.replace("ADDRESS", site)
    monkeypatch.setattr(nano_service().model, "write_webpage", lambda *args, **kwargs: hostile, raising=False)
    page = visit(site)
    page.get_by_role("tab", name="Web page").click()
    page.click("#write")
    title = page.frame_locator("#page-frame").locator("#title")
    expect(title).to_have_text(re.compile("^{"), timeout=SECONDS * 1000)
    tried = json.loads(title.text_content())
    assert tried == {**dict.fromkeys(("parent", "storage", "cookies", "fetch"), "refused"), "origin": "null"}
    assert page.url.startswith(site)
    frame = page.locator("#page-frame")
    assert frame.get_attribute("sandbox") == "allow-scripts"


def test_the_controls_say_what_is_asked_for():
    with Blocks():
        controls = chat.settings_panel(nano_service())
    values = [control.value for control in controls]
    assert chat.settings_of(*values) == dialogue.Settings(do_sample=False)
    beams = next(at for at, control in enumerate(controls) if '"num_beams"' in str(control.label))
    values[0], values[beams] = 6, 3
    assert chat.settings_of(*values) == dialogue.Settings(do_sample=False, hd_num=6, num_beams=3)


def test_html_of_questions_and_answers_is_text(site, visit, monkeypatch):
    hostile = "<img src=x onerror=\"document.title='run'\"> <script>document.title='run'</script> `<b>`"
    monkeypatch.setattr(
        nano_service().model, "chat", lambda *args, **kwargs: (hostile, kwargs["history"]), raising=False
    )
    # Answers of beams come from `chat`, whole.
    monkeypatch.setattr(chat, "settings_of", lambda *values: dialogue.Settings(num_beams=2))
    page = visit(site)
    ask(page, hostile)
    shown = hostile.replace("`", "")
    expect_answers(page, shown)
    expect(page.locator("#dialogue [data-testid=user] .md")).to_have_text(shown)
    assert page.locator("#dialogue .md img, #dialogue .md script").count() == 0
    assert page.title() != "run"


def test_a_script_says_where_it_serves(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "demo" / "composition.py", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline() == f"serving at http://127.0.0.1:{port}/\n"
            assert status_of(f"http://127.0.0.1:{port}/") == 200
        finally:
            process.send_signal(signal.SIGINT)
    assert not list(tmp_path.glob("ixc2-pages-*"))


def status_of(address: str, data: bytes | Iterator[bytes] | None = None, **headers: str) -> int:
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/proc/self/environ",
        str(ROOT / "config.json"),
        "config.json",
        "../../../../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "http://127.0.0.1:1/",
        "https://example.com/",
    ],
)
def test_files_of_the_server_and_other_addresses_are_refused(site, path):
    assert status_of(f"{site}/gradio_api/file={path}") in (403, 404)


def test_a_forged_upload_is_refused(site, visit):
    page, forged = visit(site), []

    def forge(route) -> None:
        request = json.loads(route.request.post_data or "{}")
        for value in request.get("data", []):
            if isinstance(value, dict) and value.get("files"):
                value["files"] = [{**value["files"][0], "path": "/etc/passwd"}]
                forged.append(value)
        route.continue_(post_data=json.dumps(request))

    page.route(re.compile("/gradio_api/(run|queue/join)"), forge)
    ask(page, SHAPE, EXAMPLES / "star.png")
    expect(page.locator("#dialogue").get_by_text("Error")).to_be_visible(timeout=SECONDS * 1000)
    assert forged and "root:" not in page.content()
    expect(answers(page)).to_have_count(0)


def test_requests_from_other_sites_are_refused(site):
    address, host = f"{site}/config", site.removeprefix("http://")
    assert status_of(address, Origin=f"http://{host}") == 200
    assert status_of(address, Origin="null") == 403
    assert status_of(address, Origin="https://evil.example") == 403


def test_what_is_too_large_is_refused(site, monkeypatch):
    upload, join = f"{site}/gradio_api/upload", f"{site}/gradio_api/queue/join"
    assert status_of(join, b" " * (server.MAX_REQUEST_BYTES + 1)) == 413
    assert status_of(join, b" " * (32 << 20)) == 413  # more than a socket holds
    assert status_of(join, iter([b" "])) == 411
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\na\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert status_of(upload, form, **kind) == 200
    monkeypatch.setattr(server, "MAX_STORED_BYTES", 1)
    assert status_of(upload, form, **kind) == 507
    monkeypatch.setattr(server, "MAX_UPLOAD_BYTES", len(form) - 1)
    assert status_of(upload, form, **kind) == 413


@pytest.mark.parametrize("path", ["/monitoring", "/docs", "/openapi.json", "/gradio_api/runs"])
def test_nothing_else_is_served(site, path):
    assert status_of(f"{site}{path}") in (403, 404)


def test_the_documented_limits_are_these():
    text = (ROOT / "docs" / "pages.md").read_text(encoding="utf-8")
    limits = dict(re.findall(r"^\| ([a-zA-Z' ]+) \| (\d+)(?:, [^|]*)? \|$", text, re.MULTILINE))
    assert limits == {
        "files of a dialogue": str(dialogue.MAX_FILES),
        "turns of a dialogue": str(dialogue.MAX_TURNS),
        "characters of a text": str(dialogue.MAX_TEXT),
        "pictures for an article": str(desk.MAX_UPLOADS),
        "seconds of an answer": f"{dialogue.MAX_SECONDS:.0f}",
        "MiB of a file": str(server.MAX_FILE_BYTES >> 20),
        "GiB of all visitors' files": str(server.MAX_STORED_BYTES >> 30),
        "visitors whose dialogues are kept": str(server.MAX_VISITORS),
        "questions that wait": str(server.MAX_WAITING),
    }
    assert f"{desk.MAX_SIDE} px" in text and f"than {server.FILE_HOURS}\n  hours" in text


def test_the_policy_names_no_other_host():
    assert "http" not in server.content_policy(web_content=False)
    assert "connect-src 'self' data: blob:" in server.content_policy(web_content=True)


def test_a_frame_escapes_its_page():
    framed = writing.framed('"></iframe><script>parent</script>')
    assert framed.count("<iframe") == framed.count("</iframe>") == 1 and "<script" not in framed
