"""The chat page: questions about pictures and videos, and web pages in a tab of their own.

python demo/chat.py                       # nano
python demo/chat.py --model internlm/internlm-xcomposer2d5-7b --dtype bfloat16
"""

import re
from collections.abc import Iterator
from functools import partial

import gradio as gr
from internlm_xcomposer2.demo.dialogue import (
    MAX_BEAMS,
    MAX_NEW_TOKENS,
    MAX_TEXT,
    MAX_TILES,
    Dialogue,
    Question,
    Settings,
)
from internlm_xcomposer2.demo.server import MODEL, blocks, serve, translate
from internlm_xcomposer2.demo.service import Service, as_text
from internlm_xcomposer2.demo.writing import writing_tab
from internlm_xcomposer2.ixc2.small_files import PACKAGE

TITLE = "InternLM-XComposer2"
FILE_TYPES = ["image", "video"]
PAIR = "Which picture shows the ring? Picture 1: <ImageHere>; picture 2: <ImageHere>"
EXAMPLES = (  # files, question, tiles
    (("number.png",), "What number is printed in the picture?", 0),
    (("star.png", "ring.jpg"), PAIR, 0),
    (("circle.mp4",), "Which way does the object move?", 0),
    (("small.png",), "What word is printed in the picture?", 9),
)
NUMBERS = ("prompt_tokens", "image_tokens", "answer_tokens", "first_seconds", "seconds")
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


def build(service: Service) -> gr.Blocks:
    """The page by itself."""
    with blocks(TITLE) as pages:
        chat_page(service)
    return pages


def chat_page(service: Service) -> None:
    """Both tabs, inside of a `gr.Blocks`."""
    gr.Markdown(f"# {TITLE}")
    with gr.Tab(translate("chat"), id="chat"):
        chat_tab(service)
    with gr.Tab(translate("page"), id="page"):
        writing_tab(service)


# ---- what is shown ----


def as_markdown(text: str) -> str:
    """Markdown in which HTML outside of code is shown instead of meant."""
    parts = _CODE.split(text)
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def messages_of(dialogue: Dialogue, error: str = "") -> list[dict]:
    """A dialogue as the messages of a `gr.Chatbot`, with an error after it."""
    messages = []
    for turn in dialogue.turns:
        messages += [*_asked(turn.question), _message("assistant", as_markdown(turn.answer))]
    if dialogue.pending is not None:
        messages += _asked(dialogue.pending)
    if dialogue.partial:
        messages.append(_message("assistant", as_markdown(dialogue.partial)))
    if error:
        messages.append(_message("assistant", f"**Error · 错误:** {as_markdown(error)}"))
    return messages


def _asked(question: Question) -> list[dict]:
    files = [_message("user", {"path": file}) for file in question.files]
    return [*files, *([_message("user", as_markdown(question.text))] if question.text else [])]


def _message(role: str, content: str | dict) -> dict:
    return {"role": role, "content": content}


def box_of(question: Question | None = None, **properties) -> gr.MultimodalTextbox:
    """The input box with a question, or empty."""
    value = {"text": question.text, "files": list(question.files)} if question else None
    return gr.MultimodalTextbox(value=value, **properties)


# ---- what happens ----


def take(value: dict, dialogue: Dialogue) -> tuple:
    """Show a question at once, before its turn in the queue comes -> messages, box."""
    question = Question(value["text"] or "", tuple(value["files"]))
    try:
        dialogue.ask(question)
    except ValueError as error:
        return messages_of(dialogue, str(error)), gr.skip()
    return messages_of(dialogue), box_of(submit_btn=False, stop_btn=True)


def retake(dialogue: Dialogue) -> tuple:
    """Let the last question wait for another answer -> messages, box."""
    try:
        question = dialogue.take_back()
        if question is not None:
            dialogue.ask(question)
    except ValueError as error:
        return messages_of(dialogue, str(error)), gr.skip()
    return messages_of(dialogue), box_of(submit_btn=False, stop_btn=True)


def take_back(dialogue: Dialogue) -> tuple:
    """Put the last question back into the box -> messages, box."""
    try:
        question = dialogue.take_back()
    except ValueError as error:
        return messages_of(dialogue, str(error)), gr.skip()
    return messages_of(dialogue), box_of(question)


def stop(dialogue: Dialogue) -> tuple:
    """End the answer, or drop a question that waits -> messages, box."""
    dialogue.stop()
    if dialogue.is_writing:  # whoever writes shows how it ends
        return gr.skip(), gr.skip()
    return messages_of(dialogue), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


def begin_anew(dialogue: Dialogue) -> tuple:
    """Stop, and forget the dialogue -> dialogue, messages, box, tiles, numbers."""
    dialogue.stop()
    return Dialogue(), [], box_of(submit_btn=True, stop_btn=False), None, *[None] * len(NUMBERS)


def answer(service: Service, dialogue: Dialogue, *values) -> Iterator[tuple]:
    """Answer the waiting question -> messages, box, tiles, numbers."""
    question, nothing = dialogue.pending, [gr.skip()] * (1 + len(NUMBERS))
    try:
        for _ in dialogue.answer(service, settings_of(*values)):
            yield messages_of(dialogue), gr.skip(), *nothing
    except Exception as error:
        text = as_text(error, question.files if question else ())
        dialogue.pending = None
        yield messages_of(dialogue, text), box_of(question, submit_btn=True, stop_btn=False), *nothing
        return
    usage = dialogue.turns[-1].usage if dialogue.turns else None
    numbers = [getattr(usage, name, None) for name in NUMBERS]
    box = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
    yield messages_of(dialogue), box, dialogue.tiles, *numbers


def settings_of(hd_num: float, own_system: bool, system: str, *decoding) -> Settings:
    """What the controls say; 0 tiles leave the number to the checkpoint."""
    names = ("do_sample", "temperature", "top_p", "num_beams", "repetition_penalty", "max_new_tokens")
    values = dict(zip(names, decoding, strict=True))
    return Settings(hd_num=int(hd_num) or None, system=system if own_system else None, **values)


# ---- where it is ----


def chat_tab(service: Service) -> None:
    """Dialogue and box at the left, settings, tiles and numbers at the right."""
    dialogue = gr.State(Dialogue())
    with gr.Row():
        with gr.Column(scale=3):
            chatbot = gr.Chatbot(
                label=translate("dialogue"),
                height=480,
                allow_tags=False,
                buttons=["copy"],
                elem_id="dialogue",
            )
            box = gr.MultimodalTextbox(
                file_types=FILE_TYPES,
                file_count="multiple",
                sources=["upload"],
                placeholder=translate("ask"),
                show_label=False,
                elem_id="question",
            )
            new = gr.Button(translate("new"), size="sm", elem_id="new")
        with gr.Column(scale=2):
            controls = settings_panel(service)
            with gr.Group():
                tiles = gr.Gallery(
                    label=translate("tiles"),
                    columns=2,
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    elem_id="tiles",
                )
                with gr.Row():
                    numbers = [
                        gr.Number(
                            label=translate(name), precision=2, interactive=False, elem_id=name, min_width=90
                        )
                        for name in NUMBERS
                    ]
    add_examples(box, controls[0])
    connect(service, dialogue, chatbot, box, new, controls, [tiles, *numbers])


def settings_panel(service: Service) -> list:
    """The controls, in the order of `settings_of`."""
    plain = Settings(do_sample=not service.is_nano)
    with gr.Accordion(translate("settings"), open=False):
        return [
            gr.Slider(0, MAX_TILES, 0, step=1, label=translate("hd_num"), info=translate("hd_num_info")),
            gr.Checkbox(False, label=translate("own_system"), info=translate("own_system_info")),
            gr.Textbox(label=translate("system"), lines=2, max_length=MAX_TEXT),
            *decoding_controls(plain),
        ]


def decoding_controls(plain: Settings) -> list:
    """Sampling, temperature, top p, beams, penalty and length."""
    return [
        gr.Checkbox(plain.do_sample, label=translate("do_sample"), info=translate("do_sample_info")),
        gr.Slider(0.05, 2, plain.temperature, step=0.05, label=translate("temperature")),
        gr.Slider(0.05, 1, plain.top_p, step=0.05, label=translate("top_p")),
        gr.Slider(
            1,
            MAX_BEAMS,
            plain.num_beams,
            step=1,
            label=translate("num_beams"),
            info=translate("num_beams_info"),
        ),
        gr.Slider(1, 5, plain.repetition_penalty, step=0.005, label=translate("repetition_penalty")),
        gr.Slider(1, MAX_NEW_TOKENS, plain.max_new_tokens, step=1, label=translate("max_new_tokens")),
    ]


def add_examples(box: gr.MultimodalTextbox, hd_num: gr.Slider) -> None:
    """Questions about the pictures in `examples/`, where they are."""
    folder = PACKAGE / "examples"
    rows = [
        [{"text": text, "files": [str(folder / name) for name in names]}, tiles]
        for names, text, tiles in EXAMPLES
        if all((folder / name).is_file() for name in names)
    ]
    if rows:
        gr.Examples(
            rows,
            [box, hd_num],
            example_labels=[row[0]["text"] for row in rows],
            label="Examples · 示例",
            elem_id="examples",
        )


def connect(service: Service, dialogue, chatbot, box, new, controls: list, results: list) -> None:
    """What follows from what. Only answers wait in the queue."""
    at_once = {"queue": False, "api_visibility": "private"}
    queued = {"concurrency_id": MODEL, "api_visibility": "private"}
    shown = [chatbot, box]
    asked = [
        box.submit(take, [box, dialogue], shown, **at_once),
        chatbot.retry(retake, dialogue, shown, **at_once),
    ]
    for event in asked:
        event.then(partial(answer, service), [dialogue, *controls], [*shown, *results], **queued)
    chatbot.undo(take_back, dialogue, shown, **at_once)
    box.stop(stop, dialogue, shown, **at_once)
    for event in (new.click, chatbot.clear):
        event(begin_anew, dialogue, [dialogue, *shown, *results], **at_once)


if __name__ == "__main__":
    serve(build, __doc__.splitlines()[0])
