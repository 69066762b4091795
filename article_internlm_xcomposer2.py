"""An article with pictures: its parts, and how it is saved. It knows neither models nor prompts.

Articles are never modified: every change returns another one.
"""

import base64
import html
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .media_internlm_xcomposer2 import load_image

PICTURE_WIDTH = 500  # px, in the published pages

# ---- articles ----


@dataclass(frozen=True)
class Candidate:
    """One of the pictures that could go to a place: the name its source knows it by, and the picture."""

    id: str | int
    image: Image.Image


@dataclass(frozen=True)
class Picture:
    """What belongs after a paragraph: a caption, the candidates, and the index of the chosen one.

    The caption is empty for uploads. Without candidates there is only the caption and no choice.
    """

    caption: str = ""
    candidates: tuple[Candidate, ...] = ()
    choice: int | None = None

    def __post_init__(self) -> None:
        if self.choice is not None and not 0 <= self.choice < len(self.candidates):
            raise ValueError(f"choice {self.choice} is not one of {len(self.candidates)} candidates")

    @property
    def chosen(self) -> Candidate | None:
        """The chosen candidate."""
        return None if self.choice is None else self.candidates[self.choice]


@dataclass(frozen=True)
class Paragraph:
    """One line of an article, and the picture after it."""

    text: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Article:
    """What was asked for, and the paragraphs that answer it."""

    instruction: str
    paragraphs: tuple[Paragraph, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The texts of the paragraphs."""
        return [paragraph.text for paragraph in self.paragraphs]

    @property
    def text(self) -> str:
        """The article without pictures."""
        return "\n".join(self.lines)

    @property
    def pictures(self) -> dict[int, Picture]:
        """The index of each paragraph that has a picture, and that picture."""
        return {i: part.picture for i, part in enumerate(self.paragraphs) if part.picture is not None}

    # ---- changes ----

    def with_picture(self, index: int, picture: Picture | None) -> "Article":
        """The article with another picture after a paragraph, or with none there."""
        paragraph = replace(self.paragraph(index), picture=picture)
        return self.with_paragraphs(index, index + 1, paragraph)

    def with_choice(self, index: int, choice: int) -> "Article":
        """The article with another of the candidates after a paragraph.

        Raises:
            ValueError: there is no picture, or no such candidate.
        """
        picture = self.paragraph(index).picture
        if picture is None:
            raise ValueError(f"paragraph {index} has no picture; give it one with with_picture")
        return self.with_picture(index, replace(picture, choice=choice))

    def with_text(self, index: int, text: str) -> "Article":
        """The article with another text in a paragraph."""
        return self.with_paragraphs(index, index + 1, replace(self.paragraph(index), text=text))

    def with_paragraphs(self, start: int, stop: int, *paragraphs: Paragraph) -> "Article":
        """The article with these in place of the paragraphs from `start` to before `stop`."""
        parts = self.paragraphs
        return replace(self, paragraphs=(*parts[:start], *paragraphs, *parts[stop:]))

    def paragraph(self, index: int) -> Paragraph:
        """One paragraph.

        Raises:
            ValueError: there is none with this index.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.paragraphs):
            raise ValueError(f"no paragraph {index!r}: the article has {len(self.paragraphs)}, from 0")
        return self.paragraphs[index]

    # ---- out and in ----

    def to_json(self) -> str:
        """Everything, with all candidates as PNG in `data:` URIs. `from_json` reads it."""
        parts = [
            {"text": part.text, "picture": part.picture and _picture_as_dict(part.picture)}
            for part in self.paragraphs
        ]
        return json.dumps({"instruction": self.instruction, "paragraphs": parts}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Article":
        """The article that `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            fields = json.loads(text)
            parts = [
                Paragraph(str(part["text"]), _picture_of_dict(part.get("picture")))
                for part in fields["paragraphs"]
            ]
            return cls(str(fields["instruction"]), tuple(parts))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"this is not an article written by to_json: {error!r}") from None

    def to_markdown(self, directory: str | os.PathLike) -> Path:
        """Write `article.md` and its pictures into a directory, which is created -> the path of the former.

        Raises:
            OSError: that is not possible; files of an earlier article stay as they are.
        """
        body = "\n\n".join(self._blocks(_markdown_picture))
        return _write_all(directory, "article.md", f"{body}\n", self._picture_files())

    def to_html(self, directory: str | os.PathLike) -> Path:
        """Write `article.html` and its pictures into a directory, which is created -> the path of the former.

        Texts are shown as they are; nothing in them becomes HTML.

        Raises:
            OSError: that is not possible; files of an earlier article stay as they are.
        """
        page = _PAGE.format(title=html.escape(self.instruction), body="\n".join(self._blocks(_html_picture)))
        return _write_all(directory, "article.html", page, self._picture_files())

    def _blocks(self, render: Callable[[str, str, str], str]) -> Iterator[str]:
        for index, part in enumerate(self.paragraphs):
            chosen = part.picture and part.picture.chosen
            yield render(part.text, picture_name(index) if chosen else "", _one_line(part.picture))

    def _picture_files(self) -> dict[str, Image.Image]:
        chosen = {i: picture.chosen for i, picture in self.pictures.items()}
        return {picture_name(i): candidate.image for i, candidate in chosen.items() if candidate is not None}


def picture_name(index: int) -> str:
    """The file of the picture after a paragraph, relative to the article's."""
    return f"picture_{index + 1}.png"


def _one_line(picture: Picture | None) -> str:
    return "" if picture is None else " ".join(picture.caption.split())


def _markdown_picture(text: str, file: str, caption: str) -> str:
    """A paragraph in Markdown, with its picture as the published demos write it."""
    if not file:
        return text
    alt = f' alt="{html.escape(caption)}"' if caption else ""
    return f'{text}\n<div align="center"> <img src={file} width = {PICTURE_WIDTH}{alt}/> </div>'


def _html_picture(text: str, file: str, caption: str) -> str:
    paragraph = f"<p>{html.escape(text)}</p>"
    if not file:
        return paragraph
    label = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'{paragraph}\n<figure><img src="{file}" alt="{html.escape(caption)}">{label}</figure>'


_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 42em; margin: 2em auto; padding: 0 1em; font-family: sans-serif; line-height: 1.6; }}
figure {{ margin: 1em 0; text-align: center; }}
img {{ max-width: 100%; }}
figcaption {{ color: #666; font-size: 0.9em; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _write_all(
    directory: str | os.PathLike, name: str, text: str, pictures: Mapping[str, Image.Image]
) -> Path:
    """Write a text and pictures aside, then move them into place, the text last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{uuid.uuid4().hex}.tmp"
    aside.mkdir()
    try:
        for file, image in pictures.items():
            (aside / file).write_bytes(png_bytes(image))
        (aside / name).write_text(text, encoding="utf-8", newline="")
        for file in (*pictures, name):
            os.replace(aside / file, directory / file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory / name


def png_bytes(image: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _picture_as_dict(picture: Picture) -> dict:
    candidates = [
        {"id": one.id, "image": f"data:image/png;base64,{base64.b64encode(png_bytes(one.image)).decode()}"}
        for one in picture.candidates
    ]
    return {"caption": picture.caption, "candidates": candidates, "choice": picture.choice}


def _picture_of_dict(fields: Mapping | None) -> Picture | None:
    if fields is None:
        return None
    candidates = []
    for item in fields["candidates"]:
        uri = item["image"]
        if not isinstance(uri, str) or not uri.startswith("data:"):
            raise ValueError(f"the picture {item['id']!r:.80} must be a data: URI")
        candidates.append(Candidate(item["id"], load_image(uri)))
    choice = fields["choice"]
    if choice is not None and (isinstance(choice, bool) or not isinstance(choice, int)):
        raise ValueError(f"choice must be an int or null, not {choice!r:.80}")
    return Picture(str(fields["caption"]), tuple(candidates), choice)
