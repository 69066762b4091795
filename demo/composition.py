"""The composition page: an article with pictures, step by step.

python demo/composition.py                       # nano
python demo/composition.py --pictures FOLDER     # where articles may take pictures from, besides uploads
"""

import base64
import html
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import gradio as gr
from internlm_xcomposer2.article_internlm_xcomposer2 import Article
from internlm_xcomposer2.compose_internlm_xcomposer2 import NO_SEED
from internlm_xcomposer2.demo.chat import TITLE, decoding_controls
from internlm_xcomposer2.demo.desk import FORMATS, MAX_PICTURES, Desk, Plan
from internlm_xcomposer2.demo.dialogue import MAX_TEXT, MAX_TILES, Settings
from internlm_xcomposer2.demo.server import MODEL, blocks, serve, translate
from internlm_xcomposer2.demo.service import Service, as_text
from internlm_xcomposer2.ixc2.engine import PLAIN as PLAIN_OPTIONS
from PIL import Image

ACTIONS = ("rewrite", "expand", "abbreviate", "insert_before", "insert_after")
SHOWN_SIDE = 480  # px of pictures in the article, and of candidates
NUM_LETTERS = 60  # of a paragraph in the list
EXAMPLE = "Write a short article about TIGER."
PLAIN = Settings(max_new_tokens=4096)
PLAIN_NANO = Settings(**PLAIN_OPTIONS, max_new_tokens=128)
AUTOMATIC = -1


def build(service: Service) -> gr.Blocks:
    """The page by itself."""
    with blocks(TITLE) as pages:
        composition_page(service)
    return pages


# ---- what is shown ----


def article_html(article: Article) -> str:
    """An article as HTML in which texts are only texts."""
    parts = []
    for number, part in enumerate(article.paragraphs, 1):
        parts.append(f"<p><small>{number}</small> {html.escape(part.text)}</p>")
        if part.picture is not None:
            chosen = part.picture.chosen
            picture = f'<img src="{_data_uri(chosen.image)}" alt="">' if chosen else ""
            caption = html.escape(part.picture.caption)
            parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="article">{"".join(parts)}</div>'


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    _small(image).save(file, format="JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _small(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return copy


def view(desk: Desk, index: int | None = None, message: str = "") -> tuple:
    """What the page shows -> message, article, its text, list of paragraphs, candidates, caption.

    Args:
        index: the paragraph that is selected.
    """
    article = desk.article
    if desk.partial:
        return message, f"<p>{html.escape(desk.partial)}</p>", *[gr.skip()] * 4
    if index is None or index >= len(article.paragraphs):
        index = next(iter(article.pictures), 0)
    names = [(f"{i + 1}. {line[:NUM_LETTERS]}", i) for i, line in enumerate(article.lines)]
    picture = article.paragraphs[index].picture if names else None
    offered = [] if picture is None else [_small(candidate.image) for candidate in picture.candidates]
    chosen = None if picture is None else picture.choice
    return (
        message,
        article_html(article),
        article.text,
        gr.Dropdown(choices=names, value=index if names else None),
        gr.Gallery(value=offered, selected_index=chosen),
        "" if picture is None else picture.caption,
    )


# ---- what happens ----


def follow(
    desk: Desk, index: int | None, files: Sequence[str], work: Callable[[], Iterator[str | None] | None]
) -> Iterator[tuple]:
    """Do some work, and show the article after each of its steps."""
    yield view(desk, index, "…")
    try:
        for step in work() or ():
            yield view(desk, index, f"{step or ''}…")
    except Exception as error:
        yield view(desk, index, f"Error · 错误: {as_text(error, tuple(files))}")
    else:
        yield view(desk, index)


def write(service: Service, desk: Desk, instruction: str, files: list[str] | None, *plan) -> Iterator[tuple]:
    """Write an article."""
    work = partial(desk.write, service, instruction, files or ())
    yield from follow(desk, None, files or (), lambda: (None for _ in work(plan_of(*plan))))


def illustrate(service: Service, desk: Desk, files: list[str] | None, *plan) -> Iterator[tuple]:
    """Give the article pictures."""
    work = partial(desk.illustrate, service, files or (), service.pictures)
    yield from follow(desk, None, files or (), lambda: work(plan_of(*plan)))


def add_picture(service: Service, desk: Desk, index: int | None, caption: str, *plan) -> Iterator[tuple]:
    """Put another picture after the selected paragraph."""
    work = partial(desk.add_picture, service, index, caption, service.pictures)
    yield from follow(desk, index, (), lambda: work(plan_of(*plan)))


def change(
    service: Service, desk: Desk, index: int | None, action: str, material: str, *plan
) -> Iterator[tuple]:
    """Let the model edit the selected paragraph."""
    work = partial(desk.edit, service, index, action, material)
    yield from follow(desk, index, (), lambda: work(plan_of(*plan)))


def take_text(desk: Desk, text: str) -> tuple:
    """Take the visitor's own text."""
    return _at_once(desk, None, desk.set_text, text)


def choose(desk: Desk, index: int | None, event: gr.SelectData) -> tuple:
    """Take the candidate that was clicked."""
    return _at_once(desk, index, desk.choose, index, event.index)


def remove_picture(desk: Desk, index: int | None) -> tuple:
    """Leave the selected paragraph without a picture."""
    return _at_once(desk, index, desk.remove_picture, index)


def _at_once(desk: Desk, index: int | None, action: Callable[..., None], *arguments) -> tuple:
    *_, shown = follow(desk, index, (), partial(action, *arguments))
    return shown


def archive(kind: str, desk: Desk) -> tuple[str, str | None]:
    """A file for download -> message, path."""
    try:
        return "", str(desk.archive(kind))
    except (ValueError, OSError) as error:
        return f"Error · 错误: {as_text(error)}", None


def plan_of(num_pictures: float, fill_spots: bool, hd_num: float, seed: float, *decoding) -> Plan:
    """What the controls say."""
    names = ("do_sample", "temperature", "top_p", "num_beams", "repetition_penalty", "max_new_tokens")
    settings = Settings(int(hd_num) or None, **dict(zip(names, decoding, strict=True)))
    wanted = None if num_pictures == AUTOMATIC else int(num_pictures)
    return Plan(settings, int(seed), wanted, fill_spots)


# ---- where it is ----


def composition_page(service: Service) -> None:
    """What to write at the left, the article at the right. Inside of a `gr.Blocks`."""
    gr.Markdown(f"# {TITLE} · 图文创作")
    desk = gr.State(Desk())
    with gr.Row():
        with gr.Column(scale=2):
            about = gr.Textbox(
                EXAMPLE if service.is_nano else "",
                label=translate("about"),
                lines=3,
                max_length=MAX_TEXT,
                elem_id="about",
            )
            files = gr.File(
                label=translate("uploads"),
                file_count="multiple",
                file_types=["image"],
                type="filepath",
                height=140,
                elem_id="uploads",
            )
            plan = plan_controls(service)
            with gr.Row():
                buttons = [
                    gr.Button(translate("write_article"), variant="primary", elem_id="write-article"),
                    gr.Button(translate("illustrate"), variant="primary", elem_id="illustrate"),
                    gr.Button(translate("stop"), elem_id="stop-composing"),
                ]
            message = gr.Textbox(label=translate("message"), interactive=False, elem_id="article-message")
            with gr.Row():
                downloads = [gr.Button(translate(f"as_{kind}"), elem_id=f"as-{kind}") for kind in FORMATS]
            file = gr.File(label=translate("archive"), interactive=False, elem_id="archive")
        with gr.Column(scale=3):
            shown = gr.HTML(label=translate("article"), elem_id="article", min_height=120, container=True)
            parts = paragraph_panel()
    text, line, candidates, caption = parts[:4]
    results = [message, shown, text, line, candidates, caption]
    at_once = {"queue": False, "api_visibility": "private"}
    queued = {"concurrency_id": MODEL, "api_visibility": "private"}
    buttons[0].click(partial(write, service), [desk, about, files, *plan], results, **queued)
    buttons[1].click(partial(illustrate, service), [desk, files, *plan], results, **queued)
    buttons[2].click(Desk.stop, desk, None, **at_once)
    for kind, button in zip(FORMATS, downloads, strict=True):
        button.click(partial(archive, kind), desk, [message, file], **at_once)
    connect_paragraphs(service, desk, parts, plan, results, at_once, queued)


def plan_controls(service: Service) -> list:
    """The controls, in the order of `plan_of`."""
    plain = PLAIN_NANO if service.is_nano else PLAIN
    number = gr.Slider(
        AUTOMATIC,
        MAX_PICTURES,
        3 if service.is_nano else AUTOMATIC,
        step=1,
        label=translate("num_pictures"),
        info=translate("num_pictures_info"),
        elem_id="num-pictures",
    )
    with gr.Accordion(translate("settings"), open=False):
        return [
            number,
            gr.Checkbox(service.is_nano, label=translate("fill_spots")),
            gr.Slider(0, MAX_TILES, 0, step=1, label=translate("hd_num"), info=translate("hd_num_info")),
            gr.Number(NO_SEED, label=translate("seed"), info=translate("seed_info"), precision=0),
            *decoding_controls(plain),
        ]


def paragraph_panel() -> list:
    """Everything about the selected paragraph, in the order of `connect_paragraphs`."""
    with gr.Accordion(translate("article_text"), open=False):
        text = gr.Textbox(show_label=False, lines=6, max_length=MAX_TEXT, elem_id="article-text")
        take = gr.Button(translate("take_text"), elem_id="take-text")
    line = gr.Dropdown([], label=translate("paragraph"), elem_id="paragraph")
    candidates = gr.Gallery(
        label=translate("candidates"), columns=4, object_fit="contain", format="jpeg", allow_preview=False,
        interactive=False, height=180, elem_id="candidates",
    )  # fmt: skip
    caption = gr.Textbox(label=translate("caption"), max_length=MAX_TEXT, elem_id="caption")
    with gr.Row():
        add = gr.Button(translate("add_picture"), elem_id="add-picture")
        remove = gr.Button(translate("remove_picture"), elem_id="remove-picture")
    names = [(translate(action), action) for action in ACTIONS]
    action = gr.Radio(names, value=ACTIONS[0], label=translate("action"), elem_id="action")
    material = gr.Textbox(label=translate("material"), max_length=MAX_TEXT, elem_id="material")
    button = gr.Button(translate("change"), elem_id="change")
    return [text, line, candidates, caption, take, add, remove, action, material, button]


def connect_paragraphs(service: Service, desk, parts, plan, results, at_once, queued) -> None:
    """What follows from what in the paragraph's panel."""
    text, line, candidates, caption, take, add, remove, action, material, button = parts
    take.click(take_text, [desk, text], results, **at_once)
    line.input(view, [desk, line], results, **at_once)
    candidates.select(choose, [desk, line], results, **at_once)
    remove.click(remove_picture, [desk, line], results, **at_once)
    add.click(partial(add_picture, service), [desk, line, caption, *plan], results, **queued)
    button.click(partial(change, service), [desk, line, action, material, *plan], results, **queued)


if __name__ == "__main__":
    serve(build, __doc__.splitlines()[0])
