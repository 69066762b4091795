"""Articles and pages: long answers with the task adapters of version 2.5, and what becomes of their text."""

import contextlib
import functools
import inspect
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging

from .generation_internlm_xcomposer2 import SeededDraws
from .prompt_internlm_xcomposer2 import (
    META_INSTRUCTION,
    check_tokenizer,
    plan_chat,
    stop_token_ids,
    system_text,
)
from .tokenization_internlm_xcomposer2 import BEGIN_OF_TURN, END_OF_TURN, markup_of

logger = logging.get_logger(__name__)

# Tiles per picture in these methods, whether there are several pictures or one.
WRITING_TILES = 24
NO_SEED = -1

PERSONAL_PAGE_PROMPT = " Generate a personal page using the content in the resume:"
JAVASCRIPT_PROMPT = " Generate JavaScript events for the html code:"
SCREENSHOT_PROMPT = " Generate the HTML code of this web image with Tailwind CSS."

# Where links to random pictures lead. The models write those of a service that has shut down.
IMAGE_SERVICES = {
    "picsum": r"https://picsum.photos/\g<width>/\g<height>",
    "placehold": r"https://placehold.co/\g<width>x\g<height>",
    "keep": r"\g<0>",
}
_RANDOM_PICTURE = r"https?://source\.unsplash\.com/random/(?P<width>\d+)x(?P<height>\d+)"
# Search words end where the link does. In quotes they may contain spaces, but a `srcset` continues after one.
_QUOTED_WORDS = r"(?:(?!(?P=quote)|\s(?:[\d.]+[wx]\b|https?:))[^<>\n])*(?=(?P=quote))"
_BARE_WORDS = r"""(?:(?!&quot;|&\#)[^\s"'<>()`\\])*(?<![,.;])"""
_QUOTED_LINK = re.compile(rf"""(?<=(?P<quote>["'])){_RANDOM_PICTURE}/?\?{_QUOTED_WORDS}""")
_BARE_LINK = re.compile(rf"{_RANDOM_PICTURE}(?:/?\?{_BARE_WORDS}|(?![\w/?-])|/(?![\w?-]))")

_SCRIPT_START = re.compile(r"<script\b", re.IGNORECASE)
_SCRIPT_END = re.compile(r"</script\s*>", re.IGNORECASE)
_OTHER_LANGUAGE = re.compile(
    r"""(?<![\w-])type\s*=\s*["']?(?!["']|module\b|(?:text|application)/(?:java|ecma)script)\w""",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"(?<![\w-])src\s*=", re.IGNORECASE)
_PAGE_END = re.compile(r"</html\s*>", re.IGNORECASE)
_FENCE = "```"

MAX_RESUME_BYTES = 4 << 20  # several times what the longest context holds
PAGE_ROOM = 1 << 20  # bytes that a directory must have room for; the longest answers have a tenth
MAX_NAME_BYTES = 255  # of common file systems
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\ud800-\udfff/\\:*?"<>|]')
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))]
)


def takes_arguments_of(method: Callable, **defaults: object) -> Callable[[Callable], Callable]:
    """Give a method the arguments of another, in the same order, with different defaults for some of them.

    The method itself gets them all by name.
    """
    parameters = inspect.signature(method).parameters.values()
    signature = inspect.Signature([p.replace(default=defaults.get(p.name, p.default)) for p in parameters])

    def decorate(decorated: Callable) -> Callable:
        @functools.wraps(decorated)
        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            named = dict(bound.arguments)
            others = named.pop("kwargs")
            return decorated(**named, **others)

        call.__signature__ = signature
        return call

    return decorate


class WritingMixin:
    """Methods that write articles and pages. Needs `ChatMixin`, and `self.tokenizer` if none is passed."""

    @torch.no_grad()
    def write_artical(
        self,
        inst: str,
        image=(),
        hd_num: int | None = None,
        history: Sequence = (),
        streamer=None,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        max_length: int = 8192,
        seed: int = NO_SEED,
        use_meta: bool = False,
        *,
        top_k: int = 40,
        length_penalty: float = 1.0,
        **kwargs,
    ) -> str:
        """Write an article.

        Args:
            inst: what to write.
            image: pictures and videos as in `chat`.
            hd_num: how many local tiles a picture may be cut into, 24 by default.
            history: ignored, with a warning.
            max_length: prompt and answer together, in tokens; `max_new_tokens` can shorten the answer.
            seed: the same seed gives the same text, whatever other threads do, and leaves the random state
                as it was; with -1, sampling draws from the generators that all threads share.
            kwargs: `tokenizer`, `infer_mode`, `meta_instruction` and `allow_markup` as in `chat`, and
                anything that `generate` accepts.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        if history:
            logger.warning_once("write_artical ignores the history; earlier turns are for chat")
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}
        return self._write(
            inst,
            image,
            hd_num=hd_num,
            seed=seed,
            use_meta=use_meta,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            do_sample=do_sample,
            num_beams=num_beams,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            **sampling,
            **{"infer_mode": "write", **kwargs},
        )

    write_article = write_artical

    def write_webpage(
        self,
        inst: str,
        image=(),
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = NO_SEED,
        use_meta: bool = False,
        task: str = "Instruction-aware Webpage Generation",
        *,
        image_links: str = "picsum",
        output_dir: str | os.PathLike | None = None,
        save: bool = True,
        **kwargs,
    ) -> str:
        """Write the HTML of a page from an instruction, return it, and save it as `<task>.html`.

        Args:
            inst: what the page should be.
            image: pictures and videos as in `chat`.
            seed: as in `write_artical`.
            task: the file's name; spaces become underscores.
            image_links: `"picsum"`, `"placehold"` or `"keep"`: where links to random pictures lead.
            output_dir: where the file goes, the working directory by default.
            save: whether to write a file at all.
            kwargs: `hd_num` (24 by default), `tokenizer`, `infer_mode`, `meta_instruction` and
                `allow_markup` as in `chat`, and anything that `generate` accepts.

        Raises:
            ValueError, TypeError, OSError: anything wrong with the arguments or the directory, before any
                compute.
        """
        path = _plan_page(task, image_links, output_dir, save)
        sampling = {"temperature": temperature} if do_sample else {}
        page = self._write(
            inst,
            image,
            seed=seed,
            use_meta=use_meta,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            repetition_penalty=repetition_penalty,
            **sampling,
            **{"infer_mode": "web", **kwargs},
        )
        return _finish_page(page, image_links, path)

    @takes_arguments_of(write_webpage, task="Resume-to-Personal Page")
    def resume_2_webpage(self, inst, image, task, image_links, output_dir, save, **settings) -> str:
        """Make a personal page from a resume in two steps, its HTML and then its JavaScript.

        The arguments are those of `write_webpage`, except for these.

        Args:
            inst: the path of a Markdown file in UTF-8.
            image: pictures for the first step.
            seed: set before each of the two steps.

        Raises:
            ValueError, TypeError, OSError: as in `write_webpage`, and for a file that can't be read.
        """
        path = _plan_page(task, image_links, output_dir, save)
        settings |= {"image_links": "keep", "save": False}
        html = self.write_webpage(f"{PERSONAL_PAGE_PROMPT}{read_resume(inst)}", image, **settings)
        # The answer is text, even if it happens to contain the mark of a picture.
        tokenizer = settings.get("tokenizer") or self.tokenizer
        said = markup_of(tokenizer).hide(html, with_marks=True)
        answer = self.write_webpage(f"{JAVASCRIPT_PROMPT}{said}", **settings)
        return _finish_page(merge_scripts(html, answer), image_links, path)

    @takes_arguments_of(write_webpage, task="Screenshot-to-Webpage")
    def screen_2_webpage(self, inst, image, **settings) -> str:
        """Write the HTML of a page that looks like a screenshot.

        The arguments are those of `write_webpage`, except for these.

        Args:
            inst: ignored; the models know one instruction for this.
            image: the screenshot, as in `chat`.

        Raises:
            ValueError, TypeError, OSError: as in `write_webpage`, and if there is no picture.
        """
        if image is None or (isinstance(image, list | tuple) and not image):
            raise ValueError("screen_2_webpage needs a picture; pass the screenshot as image")
        return self.write_webpage(SCREENSHOT_PROMPT, image, **settings)

    @torch.no_grad()
    def _write(
        self,
        query: str,
        image,
        *,
        infer_mode: str,
        seed: int,
        use_meta: bool,
        max_new_tokens: int | None,
        max_length: int | None = None,
        hd_num: int | None = None,
        tokenizer=None,
        meta_instruction: str | None = META_INSTRUCTION,
        allow_markup: bool = False,
        **generate_kwargs,
    ) -> str:
        """The answer to one turn, without markup."""
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if not isinstance(query, str):
            raise TypeError(f"inst must be a str, not {type(query).__name__}")
        check_seed(seed)
        check_tokenizer(self.config, tokenizer)
        settings = {
            "eos_token_id": stop_token_ids(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "infer_mode": infer_mode,
            "max_new_tokens": max_new_tokens,
            **generate_kwargs,
        }
        if settings.get("stop_strings") is not None:
            settings["tokenizer"] = tokenizer
        self._check_settings(settings)
        prompt = plan_chat(
            self.config,
            tokenizer,
            query,
            [] if image is None else image,
            WRITING_TILES if hd_num is None else hd_num,
            meta_instruction=system_text(self.config.version, bool(use_meta), meta_instruction),
            allow_markup=allow_markup,
        )
        if max_length is not None:
            settings["max_new_tokens"] = answer_budget(len(prompt.ids), max_length, max_new_tokens)
        with seeded_generators(seed):
            ((ids,), _) = self._answer([prompt], settings)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return text.replace(END_OF_TURN, "").replace(BEGIN_OF_TURN, "")


# ---- sampling ----


def answer_budget(num_prompt: int, max_length: int, max_new_tokens: int | None = None) -> int:
    """How many tokens an answer may have, where `max_length` counts prompt and answer.

    Raises:
        ValueError: the prompt leaves no room.
    """
    budget = max_length - num_prompt
    if budget < 1:
        raise ValueError(
            f"the prompt has {num_prompt} tokens, which leaves none of max_length {max_length} for the "
            "answer; raise max_length, shorten the text or lower hd_num"
        )
    return budget if max_new_tokens is None else min(budget, max_new_tokens)


def check_seed(seed: int) -> None:
    """Raise unless the seed is -1 or one that every generator accepts."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, not {type(seed).__name__}")
    if seed != NO_SEED and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be {NO_SEED} for none, or in 0..{2**32 - 1}, not {seed}")


def seeded_generators(seed: int) -> contextlib.AbstractContextManager:
    """Within it, this thread samples from generators of its own that start at a seed; with -1, as ever."""
    return contextlib.nullcontext() if seed == NO_SEED else SeededDraws(seed)


def _plan_page(task: str, image_links: str, output_dir: str | os.PathLike | None, save: bool) -> Path | None:
    """Check the options of a page, and return where it goes if it is saved."""
    check_image_links(image_links)
    return page_path(task, output_dir) if save else None


def _finish_page(page: str, image_links: str, path: Path | None) -> str:
    """Rewrite the links and save."""
    page = rewrite_image_links(page, image_links)
    if path is not None:
        save_page(page, path)
    return page


# ---- files ----


def page_path(task: str, output_dir: str | os.PathLike | None = None) -> Path:
    """Where a task's page goes: `<task>.html`, spaces as underscores, in the working directory by default.

    Raises:
        TypeError: the name is not a text.
        ValueError: the name is empty, too long, reserved, or could lead out of the directory.
        OSError: the directory is missing or can't be written to, or a directory has the file's name.
    """
    if not isinstance(task, str):
        raise TypeError(f"task must be a str, not {type(task).__name__}")
    if not task.strip(" .") or _FORBIDDEN.search(task) or task.split(".")[0].strip().upper() in _DEVICES:
        raise ValueError(
            f"task {task!r:.80} can't be a file name; use words without separators, and output_dir for the "
            "directory"
        )
    name = f"{task.replace(' ', '_')}.html"
    num_bytes = len(name.encode("utf-8"))
    if num_bytes > MAX_NAME_BYTES:
        raise ValueError(f"task gives a file name of {num_bytes} bytes, more than {MAX_NAME_BYTES}")
    path = _writable_directory(output_dir) / name
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; use another task or output_dir")
    return path


def _writable_directory(output_dir: str | os.PathLike | None) -> Path:
    """The absolute directory, after testing it with a file that leaves no trace."""
    directory = Path.cwd() if output_dir is None else Path(output_dir).absolute()
    if not directory.exists():
        raise FileNotFoundError(f"output_dir {directory} does not exist; create it, or pass save=False")
    if not directory.is_dir():
        raise NotADirectoryError(f"output_dir {directory} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(PAGE_ROOM))
            file.flush()
            os.fsync(file.fileno())  # some file systems notice only now that they are full
    except OSError as error:
        raise OSError(
            error.errno,
            f"this directory is not writable, or has no room for a page ({error.strerror}); pass another "
            "output_dir or save=False",
            directory,
        ) from error
    return directory


class UnsavedPageError(OSError):
    """A page that was written by the model but couldn't be saved; its `text` is the page."""

    text: str = ""


def save_page(page: str, path: Path) -> None:
    """Write as UTF-8, whole or not at all.

    Raises:
        UnsavedPageError: the disk is full or can't be written to. The error has the page as its `text`.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(page)
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror or error}: the page wasn't saved; this error has it as its text"
        unsaved = UnsavedPageError(error.errno, reason, os.fspath(path))
        unsaved.text = page
        raise unsaved from error
    finally:
        temporary.unlink(missing_ok=True)


def read_resume(path: str | os.PathLike) -> str:
    """The text of a Markdown file.

    Raises:
        TypeError: it is not a path.
        FileNotFoundError: no such file.
        ValueError: the file is empty, too large, or not UTF-8.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"inst must be the path of a Markdown file, not {type(path).__name__}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {str(path)!r:.120}; inst must be the path of a resume in Markdown")
    if (num_bytes := os.path.getsize(path)) > MAX_RESUME_BYTES:
        raise ValueError(f"{path} has {num_bytes} bytes, more than the limit of {MAX_RESUME_BYTES}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it should contain a resume in Markdown")
    return text


# ---- links ----


def check_image_links(service: str) -> None:
    """Raise `ValueError` for a picture service that doesn't exist."""
    if service not in IMAGE_SERVICES:
        raise ValueError(f"unknown image_links {service!r}; choose one of {', '.join(IMAGE_SERVICES)}")


def rewrite_image_links(page: str, service: str = "picsum") -> str:
    """Point links to random Unsplash pictures at another service, in the same size.

    Raises:
        ValueError: unknown service.
    """
    check_image_links(service)
    page = _QUOTED_LINK.sub(IMAGE_SERVICES[service], page)
    return _BARE_LINK.sub(IMAGE_SERVICES[service], page)


# ---- scripts ----


class Script(NamedTuple):
    """A script element of a page: what it holds, where it starts, and where its body ends."""

    attributes: str
    body: str
    start: int
    end: int
    is_closed: bool  # by an end tag

    @property
    def is_code(self) -> bool:
        """Whether it holds JavaScript itself, rather than a link to a file or data."""
        text = self.attributes
        return not text or not (_SOURCE.search(text) or _OTHER_LANGUAGE.search(text))


def find_scripts(page: str) -> Iterator[Script]:
    """The script elements of a page, in one pass over it, whatever it holds; the last may be left open."""
    position = 0
    while start := _SCRIPT_START.search(page, position):
        body = page.find(">", start.end()) + 1
        if not body:
            return
        end = _SCRIPT_END.search(page, body)
        position, last = (end.end(), end.start()) if end else (len(page), len(page))
        attributes = page[start.end() : body - 1]
        yield Script(attributes, page[body:last], start.start(), last, end is not None)


def merge_scripts(page: str, answer: str) -> str:
    """Put the JavaScript of an answer into a page.

    It goes to the end of the page's last script that holds code, else before `</html>`, else to the very end.
    Scripts that only refer to a file stay separate elements.
    """
    found = list(find_scripts(answer))
    files = [f"<script{each.attributes}></script>" for each in found if _SOURCE.search(each.attributes)]
    bodies = [each.body for each in found if each.is_code] if found else [_unfence(answer)]
    code = join_scripts(bodies)
    page, home = _last_code(page)
    if home is None:
        elements = [*files, *([f"<script>\n{code}\n</script>"] if code else [])]
        return _insert(page, "\n".join(elements), _end_of_page(page))
    if code:
        page = _insert(page, _separated(home.body, code), home.end)
    return _insert(page, "\n".join(files), home.start)


def join_scripts(bodies: list[str]) -> str:
    """One script out of several."""
    pieces = [body for body in map(str.strip, bodies) if body]
    return "\n".join([*pieces[:1], *(_separated(*pair) for pair in pairwise(pieces))])


def _separated(before: str, code: str) -> str:
    """Code that doesn't run into what comes before it, if that ends without a semicolon."""
    before = before.rstrip()
    return f";\n{code}" if before and not before.endswith(";") and code[0] in "([`+-/" else code


def _last_code(page: str) -> tuple[str, Script | None]:
    """The page, and its last script that holds code; one left open is closed and not counted."""
    scripts = list(find_scripts(page))
    if scripts and not scripts[-1].is_closed:
        return f"{page.rstrip()}\n</script>\n", None
    return page, next((each for each in reversed(scripts) if each.is_code), None)


def _end_of_page(page: str) -> int:
    """Where the last `</html>` is, or the end."""
    return max((match.start() for match in _PAGE_END.finditer(page)), default=len(page))


def _insert(page: str, text: str, position: int) -> str:
    """Insert text on its own lines at a position."""
    if not text:
        return page
    before, after = page[:position], page[position:]
    start = "" if not before or before.endswith("\n") else "\n"
    return f"{before}{start}{text}\n{after}"


def _unfence(answer: str) -> str:
    """The inside of Markdown fences, or the whole answer if there are none."""
    blocks = list(_fenced(answer))
    return join_scripts(blocks) if blocks else answer


def _fenced(answer: str) -> Iterator[str]:
    """What is inside each fence, after the rest of its line; the last may be left open."""
    position = 0
    while (fence := answer.find(_FENCE, position)) >= 0:
        start = answer.find("\n", fence) + 1
        if not start:
            return
        end = answer.find(_FENCE, start)
        yield answer[start : end if end >= 0 else len(answer)]
        position = end + len(_FENCE) if end >= 0 else len(answer)
