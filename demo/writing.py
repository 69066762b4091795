"""The tab that writes web pages: from an instruction, a résumé or a screenshot."""

import html
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gradio as gr
from internlm_xcomposer2.demo.dialogue import (
    MAX_BEAMS,
    MAX_NEW_TOKENS,
    MAX_TEXT,
    MAX_TILES,
    Meter,
    Settings,
    check_text,
)
from internlm_xcomposer2.demo.server import MODEL, translate
from internlm_xcomposer2.demo.service import Service, as_text
from internlm_xcomposer2.ixc2.engine import PLAIN as PLAIN_OPTIONS

SOURCES = ("instruction", "resume", "screenshot")
FILE_TYPES = [".md", ".txt", "image"]
FILE_LABEL = "Résumé or screenshot · 简历或截图"  # gradio translates no labels of files in a second tab
EXAMPLE = "Make a green web page with the title TIGER."
HEIGHT = 420  # px of the frame

# The methods' own defaults, and what suits nano.
PLAIN = Settings(num_beams=2, repetition_penalty=3.0, max_new_tokens=4800)
PLAIN_NANO = Settings(**PLAIN_OPTIONS, max_new_tokens=512)

# First in every frame: no requests, no forms, no frames inside. Such a frame also inherits the policy of the
# page around it, which says what else may be loaded.
FRAME_POLICY = "connect-src 'none'; form-action 'none'; frame-src 'none'; object-src 'none'; base-uri 'none'"


@dataclass
class Writing:
    """The state of one visitor: what counts the page that is being written."""

    meter: Meter | None = None

    def stop(self) -> None:
        """End the page after the current token."""
        if self.meter is not None:
            self.meter.stop.set()


def framed(page: str) -> str:
    """A written page in a frame that runs its scripts as a stranger to the page around it.

    The sandbox lacks `allow-same-origin`: no cookies, no storage, no access to what is outside, no pop-ups,
    and no navigation of the window.
    """
    policy = f'<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="{FRAME_POLICY}">'
    return (
        '<iframe id="page-frame" sandbox="allow-scripts" referrerpolicy="no-referrer" title="page" '
        f'style="width: 100%; height: {HEIGHT}px; border: 1px solid #ccc; background: white" '
        f'srcdoc="{html.escape(policy + page)}"></iframe>'
    )


# ---- what happens ----


def write(service: Service, writing: Writing, *values) -> Iterator[tuple[str, str, str]]:
    """Write a page -> message, frame, code."""
    writing.meter = meter = Meter()
    yield "…", "", ""
    try:
        page = write_page(service, meter, *values)
        yield f"{meter.num_tokens} tokens, {meter.seconds:.1f} s", framed(page), page
    except Exception as error:
        files = tuple(value for value in values[2:3] if value)
        yield f"Error · 错误: {as_text(error, files)}", "", ""
    finally:
        writing.meter = None


def write_page(
    service: Service,
    meter: Meter,
    source: str,
    text: str,
    file: str | None,
    hd_num: float,
    seed: float,
    *decoding,
) -> str:
    """The HTML of a page.

    Raises:
        ValueError, TypeError, OSError: as in the methods that write pages; or there is nothing to write from.
    """
    names = ("do_sample", "temperature", "num_beams", "repetition_penalty", "max_new_tokens")
    settings = Settings(int(hd_num) or None, **dict(zip(names, decoding, strict=True)))
    arguments = {name: getattr(settings, name) for name in ("hd_num", *names)}
    arguments |= {"seed": int(seed), "save": False, "stopping_criteria": [meter]}
    if source == "screenshot":
        if file is None:
            raise ValueError("add the file of a screenshot")
        return service.model.screen_2_webpage("", [file], **arguments)
    if source == "resume" and file is not None:
        return service.model.resume_2_webpage(file, **arguments)
    if not check_text("the text", text).strip():
        raise ValueError("write what the page should be, or add a file")
    if source == "instruction":
        return service.model.write_webpage(text, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "resume.md")
        path.write_text(text, encoding="utf-8")
        return service.model.resume_2_webpage(path, **arguments)


# ---- where it is ----


def writing_tab(service: Service) -> None:
    """What to write at the left, the page and its code at the right."""
    writing = gr.State(Writing())
    with gr.Row():
        with gr.Column(scale=2):
            inputs = [
                gr.Radio(
                    [(translate(name), name) for name in SOURCES], value=SOURCES[0], label=translate("source")
                ),
                gr.Textbox(
                    EXAMPLE if service.is_nano else "",
                    label=translate("instruction_label"),
                    lines=4,
                    max_length=MAX_TEXT,
                    elem_id="instruction",
                ),
                gr.File(label=FILE_LABEL, file_types=FILE_TYPES, type="filepath", elem_id="page-file"),
                *_controls(PLAIN_NANO if service.is_nano else PLAIN),
            ]
            with gr.Row():
                button = gr.Button(translate("write"), variant="primary", elem_id="write")
                stop = gr.Button(translate("stop"), elem_id="stop-writing")
            message = gr.Textbox(label=translate("message"), interactive=False, elem_id="page-message")
        with gr.Column(scale=3):
            frame = gr.HTML(label=translate("frame"), elem_id="page", min_height=HEIGHT)
            code = gr.Code(
                label="HTML",
                language="html",
                lines=8,
                max_lines=16,
                interactive=False,
                elem_id="code",
            )
    button.click(
        partial(write, service),
        [writing, *inputs],
        [message, frame, code],
        concurrency_id=MODEL,
        api_visibility="private",
    )
    stop.click(Writing.stop, writing, None, queue=False, api_visibility="private")


def _controls(plain: Settings) -> list:
    with gr.Accordion(translate("settings"), open=False):
        return [
            gr.Slider(0, MAX_TILES, 0, step=1, label=translate("hd_num"), info=translate("hd_num_info")),
            gr.Number(-1, label=translate("seed"), info=translate("seed_info"), precision=0),
            gr.Checkbox(plain.do_sample, label=translate("do_sample"), info=translate("do_sample_info")),
            gr.Slider(0.05, 2, plain.temperature, step=0.05, label=translate("temperature")),
            gr.Slider(1, MAX_BEAMS, plain.num_beams, step=1, label=translate("num_beams")),
            gr.Slider(1, 5, plain.repetition_penalty, step=0.005, label=translate("repetition_penalty")),
            gr.Slider(1, MAX_NEW_TOKENS, plain.max_new_tokens, step=1, label=translate("max_new_tokens")),
        ]
