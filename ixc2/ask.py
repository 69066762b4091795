"""Questions in the terminal: `ixc2 ask`, `ixc2 video` and `ixc2 caption`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import TextStreamer

from ..cache_internlm_xcomposer2 import ChatHistory
from ..ixc_utils import draw_boxes, parse_boxes
from ..media_internlm_xcomposer2 import MAX_FRAMES, load_image
from ..prompt_internlm_xcomposer2 import mark_pictures
from ..sources_internlm_xcomposer2 import (
    CAPTION_FILE,
    ENGLISH_QUESTION,
    CaptionFile,
    SidecarFiles,
    describe_pictures,
    pictures_in,
)
from ..writing_internlm_xcomposer2 import NO_SEED, check_seed, seeded_generators
from .engine import Engine, add_decoding_options, add_engine_options, decoding_settings, load_engine

GREEDY = {"do_sample": False}
_SHOWN = {"skip_prompt": True, "skip_special_tokens": True, "clean_up_tokenization_spaces": False}
BATCH_SIZE = 4


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this file to the parser."""
    command = commands.add_parser(
        "ask",
        help="answer a question about pictures",
        usage="%(prog)s [OPTION ...] [PICTURE ...] QUESTION",
        description="Answer a question about pictures or videos, or about nothing. Several pictures are "
        "numbered; write <ImageHere> in the question to place them yourself. In a dialogue (--chat), a line "
        "/add PICTURE adds one to the next question, and an empty line ends it.",
    )
    command.add_argument(
        "inputs", metavar="PICTURE ... QUESTION", nargs="*", help="files or URLs, and the question at the end"
    )
    command.add_argument("--chat", action="store_true", help="go on asking; QUESTION may be left out")
    command.add_argument("--draw", metavar="FILE", help="write the picture with the boxes in the answer")
    _add_common(command, sampling=True)
    command.set_defaults(run=_ask, files="inputs")
    command = commands.add_parser("video", help="answer a question about a video")
    command.add_argument("file", metavar="FILE", help="a file or URL")
    command.add_argument("question", metavar="QUESTION")
    _add_common(command, sampling=True)
    command.set_defaults(run=_video)
    _add_caption(commands)


def _add_caption(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "caption",
        help="describe all pictures in a folder",
        description="Describe all pictures in a folder. Captions are written one by one, and an interrupted "
        "run continues where it stopped. Pictures that can't be read are left out and listed, and the exit "
        "status is 1 then.",
    )
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("--question", default=ENGLISH_QUESTION, help="default: %(default)s")
    place = command.add_mutually_exclusive_group()
    place.add_argument("--output", metavar="FILE", help=f"JSON lines; default: FOLDER/{CAPTION_FILE}")
    place.add_argument("--sidecar", action="store_true", help="write PICTURE.txt beside each picture instead")
    command.add_argument("--recursive", action="store_true", help="folders in FOLDER too")
    command.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="default: %(default)s"
    )
    _add_common(command, max_new_tokens=256)
    command.set_defaults(run=_caption)


def _add_common(
    command: argparse.ArgumentParser, *, sampling: bool = False, max_new_tokens: int = 1024
) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    add_decoding_options(command, max_new_tokens)
    if sampling:
        group = command.add_argument_group("videos")
        group.add_argument("--fps", type=float, default=1.0, help="frames per second; default: %(default)s")
        group.add_argument(
            "--num-frames", type=int, default=MAX_FRAMES, metavar="N", help="at most; default: %(default)s"
        )
    add_engine_options(command)


# ---- ask, video ----


def _ask(options: argparse.Namespace) -> int:
    pictures, question = split_inputs(options.inputs, needs_question=not options.chat)
    if options.draw is not None and len(pictures) != 1:
        raise ValueError(f"--draw needs one picture, but there are {len(pictures)}")
    picture = load_image(pictures[0]) if options.draw is not None else None
    dialogue = _Dialogue(load_engine(options), options)
    if question is not None:
        answer = dialogue.ask(question, pictures)
        if picture is not None:
            _draw(picture, answer, options.draw)
    dialogue.waiting += pictures if question is None else []
    if options.chat:
        _go_on(dialogue)
    return 0


def split_inputs(inputs: Sequence[str], *, needs_question: bool) -> tuple[list[str], str | None]:
    """What comes before the question, and the question, if the last argument is one.

    Raises:
        ValueError: it is a file, or there is none.
        FileNotFoundError: a picture does not exist.
    """
    is_question = bool(inputs) and not _is_file(inputs[-1])
    if needs_question and not is_question:
        last = f"the last argument, {inputs[-1]!r}, is a file" if inputs else "there are no arguments"
        raise ValueError(f"{last}; write a question after the pictures")
    pictures = list(inputs[:-1]) if is_question else list(inputs)
    for picture in pictures:
        check_exists(picture)
    return pictures, inputs[-1] if is_question else None


def check_exists(source: str) -> None:
    """Raise `FileNotFoundError` before a model is loaded, unless a source is a file or a URL."""
    if "://" not in source and not source.startswith("data:") and not _is_file(source):
        raise FileNotFoundError(f"no such file: {source!r:.120}")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # longer than a path can be
        return False


def _video(options: argparse.Namespace) -> int:
    check_exists(options.file)
    _Dialogue(load_engine(options), options).ask(options.question, [options.file])
    return 0


class _Dialogue:
    """Questions and answers that are shown as they are written, with their pictures.

    Attributes:
        waiting: pictures that go with the next question.
    """

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.pictures: list[str] = []
        self.waiting: list[str] = []
        self.questions: list[str] = []
        self.counts: list[int] = []  # how many pictures each question came with
        self.history = ChatHistory()

    def ask(self, question: str, pictures: Sequence[str] = ()) -> str:
        """Show the answer to a question about more pictures, and remember both."""
        added = [*self.waiting, *pictures]
        questions, counts = [*self.questions, question], [*self.counts, len(added)]
        *earlier, query = mark_pictures(questions, counts, version=self.engine.model.config.version)
        # A second picture changes how the first is marked.
        turns = [(marked, answer) for marked, (_, answer) in zip(earlier, self.history, strict=True)]
        options, seed = self.options, NO_SEED if self.options.seed is None else self.options.seed
        check_seed(seed)
        settings = decoding_settings(options, GREEDY)
        shows = not options.json and settings.get("num_beams", 1) == 1
        streamer = TextStreamer(self.engine.tokenizer, **_SHOWN) if shows else None
        with seeded_generators(seed):
            answer, self.history = self.engine.model.chat(
                self.engine.tokenizer,
                query,
                [*self.pictures, *added],
                options.hd_num,
                ChatHistory(turns, self.history.prompt_cache),
                streamer=streamer,
                fps=options.fps,
                num_frames=options.num_frames,
                **settings,
            )
        self.waiting, self.questions, self.counts = [], questions, counts
        self.pictures += added
        if options.json:
            row = {"question": question, "pictures": added, "answer": answer, "model": self.engine.source}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        elif not shows:
            print(answer, flush=True)
        return answer


def _go_on(dialogue: _Dialogue) -> None:
    """Ask what is typed, line by line, until an empty line or the end; errors are shown and end nothing."""
    for line in _typed_lines():
        command, _, rest = line.partition(" ")
        try:
            if command == "/add":
                check_exists(rest.strip())
                dialogue.waiting.append(rest.strip())
            else:
                dialogue.ask(line)
        except (ValueError, OSError) as error:
            dialogue.waiting = []
            print(f"ixc2: {error}", file=sys.stderr)


def _typed_lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _draw(picture: Image.Image, answer: str, file: str) -> None:
    boxes = parse_boxes(answer, picture.size[::-1])
    draw_boxes(picture, boxes).save(file)
    print(f"{len(boxes)} boxes in {file}", file=sys.stderr)


# ---- caption ----


def _caption(options: argparse.Namespace) -> int:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {options.batch_size}")
    names = pictures_in(options.folder, recursive=options.recursive)
    if not names:
        raise ValueError(f"no pictures in {options.folder!r}")
    folder = Path(options.folder)
    output = folder / CAPTION_FILE if options.output is None else Path(options.output)
    file = SidecarFiles(names) if options.sidecar else CaptionFile(output)
    num_known = len(set(file.known(folder, options.question)) & set(names))
    if num_known < len(names):
        _describe(load_engine(options), options, names, file)
    known = file.known(folder, options.question)
    missing = [name for name in names if name not in known]
    where = str(folder if options.sidecar else output)
    report = {"pictures": len(names), "new": len(names) - len(missing) - num_known, "known": num_known}
    if options.json:
        print(json.dumps({**report, "unreadable": missing, "output": where}, ensure_ascii=False))
    else:
        print(f"{report['new']} new captions and {num_known} earlier ones in {where}")
    for name in missing:
        print(f"ixc2: left out {name}: it can't be read", file=sys.stderr)
    return 1 if missing else 0


def _describe(
    engine: Engine, options: argparse.Namespace, names: Sequence[str], file: CaptionFile | SidecarFiles
) -> None:
    """Write the captions that are missing."""
    settings = decoding_settings(options, GREEDY)
    (question,) = mark_pictures([options.question], [1], version=engine.model.config.version)
    seed = NO_SEED if options.seed is None else options.seed
    check_seed(seed)

    def describe(images: Sequence[Image.Image], _: str) -> list[str]:
        questions = [question] * len(images)
        answers = engine.model.batch_chat(
            engine.tokenizer, questions, list(images), options.hd_num, **settings
        )
        return [answer.strip() for answer, _ in answers]

    described = describe_pictures(
        options.folder, names, describe, file, options.question, batch_size=options.batch_size
    )
    with seeded_generators(seed), tqdm(total=len(names), unit="picture", disable=None) as bar:
        for _ in described:
            bar.update()
