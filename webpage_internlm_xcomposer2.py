"""What happens to a page around its generation: file names, image links, scripts. Text and paths only."""

import os
import re
import tempfile
import uuid
from pathlib import Path

# Where links to random pictures lead. The models write those of a service that has closed.
IMAGE_SERVICES = {
    "picsum": r"https://picsum.photos/\g<width>/\g<height>",
    "placehold": r"https://placehold.co/\g<width>x\g<height>",
    "keep": r"\g<0>",
}
_RANDOM_PICTURE = r"https?://source\.unsplash\.com/random/(?P<width>\d+)x(?P<height>\d+)"
# Search words end where the link does. Within quotes they may hold blanks, but a `srcset` goes on after one.
_QUOTED_WORDS = r"(?:(?!(?P=quote)|\s(?:[\d.]+[wx]\b|https?:))[^<>\n])*(?=(?P=quote))"
_BARE_WORDS = r"""(?:(?!&quot;|&\#)[^\s"'<>()`\\])*(?<![,.;])"""
_QUOTED_LINK = re.compile(rf"""(?<=(?P<quote>["'])){_RANDOM_PICTURE}/?\?{_QUOTED_WORDS}""")
_BARE_LINK = re.compile(rf"{_RANDOM_PICTURE}(?:/?\?{_BARE_WORDS}|(?![\w/?-])|/(?![\w?-]))")

_SCRIPT = re.compile(
    r"<script\b(?P<attributes>[^>]*)>(?P<body>.*?)(?P<end></script\s*>|\Z)", re.DOTALL | re.IGNORECASE
)
_OTHER_LANGUAGE = re.compile(
    r"""(?<![\w-])type\s*=\s*["']?(?!["']|module\b|(?:text|application)/(?:java|ecma)script)\w""",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"(?<![\w-])src\s*=", re.IGNORECASE)
_PAGE_END = re.compile(r"</html\s*>", re.IGNORECASE)
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)

MAX_RESUME_BYTES = 4 << 20  # several times what the longest context holds
MAX_NAME_BYTES = 255  # of common file systems
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))]
)


# ---- files ----


def page_path(task: str, output_dir: str | os.PathLike | None = None) -> Path:
    """Where a task's page goes: `<task>.html`, blanks as underscores, in the working directory by default.

    Raises:
        TypeError: the name is no text.
        ValueError: the name is empty, too long, reserved, or could lead out of the directory.
        OSError: the directory is missing or can't be written to, or a directory bears the file's name.
    """
    if not isinstance(task, str):
        raise TypeError(f"task must be a str, not {type(task).__name__}")
    if not task.strip(" .") or _FORBIDDEN.search(task) or task.split(".")[0].strip().upper() in _DEVICES:
        raise ValueError(
            f"task {task!r:.80} can't name a file; use words without separators, and output_dir for the place"
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
    """The absolute directory, after trying it with a file that leaves no trace."""
    directory = Path.cwd() if output_dir is None else Path(output_dir).absolute()
    if not directory.exists():
        raise FileNotFoundError(f"output_dir {directory} does not exist; create it, or pass save=False")
    if not directory.is_dir():
        raise NotADirectoryError(f"output_dir {directory} is no directory")
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise OSError(
            error.errno,
            "this directory can't be written to; pass another output_dir or save=False",
            directory,
        ) from error
    return directory


def save_page(page: str, path: Path) -> None:
    """Write as UTF-8, whole or not at all."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(page)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_resume(path: str | os.PathLike) -> str:
    """The text of a Markdown file.

    Raises:
        TypeError: no path.
        FileNotFoundError: no such file.
        ValueError: the file is empty, too large, or not UTF-8.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"inst must be the path of a Markdown file, not {type(path).__name__}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {str(path)!r:.120}; inst is the path of a resume in Markdown")
    if (num_bytes := os.path.getsize(path)) > MAX_RESUME_BYTES:
        raise ValueError(f"{path} has {num_bytes} bytes, more than the limit of {MAX_RESUME_BYTES}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it should hold a resume in Markdown")
    return text


# ---- links ----


def check_image_links(service: str) -> None:
    """Raise `ValueError` for a choice of picture service that doesn't exist."""
    if service not in IMAGE_SERVICES:
        raise ValueError(f"unknown image_links {service!r}; it is one of {', '.join(IMAGE_SERVICES)}")


def rewrite_image_links(page: str, service: str = "picsum") -> str:
    """Let links to random Unsplash pictures lead to another service, in the same size.

    Raises:
        ValueError: unknown service.
    """
    check_image_links(service)
    page = _QUOTED_LINK.sub(IMAGE_SERVICES[service], page)
    return _BARE_LINK.sub(IMAGE_SERVICES[service], page)


# ---- scripts ----


def merge_scripts(page: str, answer: str) -> str:
    """Put the JavaScript of an answer into a page.

    It goes to the end of the page's last script that holds code, else before `</html>`, else to the very end.
    Scripts that only refer to a file stay elements of their own.
    """
    found = list(_SCRIPT.finditer(answer))
    files = [
        f"<script{match['attributes']}></script>" for match in found if _SOURCE.search(match["attributes"])
    ]
    bodies = [match["body"] for match in found if _is_code(match)] if found else [_unfence(answer)]
    code = join_scripts(bodies)
    page, home = _last_code(page)
    if home is None:
        elements = [*files, *([f"<script>\n{code}\n</script>"] if code else [])]
        return _insert(page, "\n".join(elements), _end_of_page(page))
    if code:
        page = _insert(page, _separated(home["body"], code), home.end("body"))
    return _insert(page, "\n".join(files), home.start())


def join_scripts(bodies: list[str]) -> str:
    """One script out of several."""
    joined = ""
    for body in filter(None, map(str.strip, bodies)):
        joined = f"{joined}\n{_separated(joined, body)}" if joined else body
    return joined


def _separated(before: str, code: str) -> str:
    """Code that doesn't run into what stands before it, where that ends without a semicolon."""
    before = before.rstrip()
    return f";\n{code}" if before and not before.endswith(";") and code[0] in "([`+-/" else code


def _is_code(script: re.Match) -> bool:
    """Whether an element holds JavaScript itself, rather than a link to a file or data."""
    attributes = script["attributes"]
    return not _SOURCE.search(attributes) and not _OTHER_LANGUAGE.search(attributes)


def _last_code(page: str) -> tuple[str, re.Match | None]:
    """The page, and its last script that holds code; one left open is closed and not counted."""
    scripts = list(_SCRIPT.finditer(page))
    if scripts and not scripts[-1]["end"]:
        return f"{page.rstrip()}\n</script>\n", None
    return page, next(filter(_is_code, reversed(scripts)), None)


def _end_of_page(page: str) -> int:
    """Where the last `</html>` stands, or the end."""
    return max((match.start() for match in _PAGE_END.finditer(page)), default=len(page))


def _insert(page: str, text: str, position: int) -> str:
    """Text on lines of its own at a position."""
    if not text:
        return page
    before, after = page[:position], page[position:]
    start = "" if not before or before.endswith("\n") else "\n"
    return f"{before}{start}{text}\n{after}"


def _unfence(answer: str) -> str:
    """The inside of Markdown fences, or the whole answer where there are none."""
    blocks = _FENCED.findall(answer)
    return join_scripts(blocks) if blocks else answer
