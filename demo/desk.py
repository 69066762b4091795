"""A visitor's article with pictures, and what can be done to it. Knows nothing of pages."""

import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from internlm_xcomposer2.article_internlm_xcomposer2 import Article, Candidate, Paragraph
from internlm_xcomposer2.compose_internlm_xcomposer2 import NO_SEED, Composer
from internlm_xcomposer2.demo.dialogue import Meter, Settings, check_text
from internlm_xcomposer2.demo.service import Service
from internlm_xcomposer2.media_internlm_xcomposer2 import load_image

MAX_UPLOADS = 10
MAX_SIDE = 2400  # px: larger pictures are scaled down
MAX_PARAGRAPHS = 100
MAX_PICTURES = 15
FORMATS = ("markdown", "html")


@dataclass(frozen=True)
class Plan:
    """How an article is composed.

    Attributes:
        settings: how texts are written, and into how many tiles a picture may be cut.
        num_pictures: how many there should be; `None` leaves it to the model.
        fill_spots: whether places are added when the model names fewer than that.
    """

    settings: Settings
    seed: int = NO_SEED
    num_pictures: int | None = None
    fill_spots: bool = False

    def __post_init__(self) -> None:
        if self.num_pictures is not None and self.num_pictures > MAX_PICTURES:
            raise ValueError(f"{self.num_pictures} pictures are wanted, but the limit here is {MAX_PICTURES}")

    def composer(self, service: Service, meter: Meter) -> Composer:
        """The steps, each of which ends when the meter is stopped."""
        return service.model.composer(
            service.tokenizer,
            hd_num=self.settings.hd_num,
            seed=self.seed,
            fill_spots=self.fill_spots,
            stopping_criteria=[meter],
            **self.settings.decoding(),
        )


class Desk:
    """The state of one visitor.

    Attributes:
        article: what is there so far.
        partial: the text that is being written.
        uploads: the visitor's pictures.
    """

    def __init__(self) -> None:
        self.article = Article("")
        self.partial = ""
        self.uploads: tuple[Candidate, ...] = ()
        self._meter: Meter | None = None
        self._folder: TemporaryDirectory | None = None

    def stop(self) -> None:
        """End what is being computed after the current token or step; what is there stays."""
        if self._meter is not None:
            self._meter.stop.set()

    # ---- by the model ----

    def write(self, service: Service, instruction: str, files: Sequence[str], plan: Plan) -> Iterator[str]:
        """Write an article without pictures in place of the present one -> its text so far.

        Raises:
            ValueError, TypeError, OSError: as in `compose`, and for too many or unreadable files.
        """
        check_text("the instruction", instruction)
        self.uploads = load_uploads(files)
        with self._metered() as meter:
            composer = plan.composer(service, meter)
            with composer.stream(instruction, [upload.image for upload in self.uploads]) as stream:
                for _ in stream:
                    self.partial = stream.response
                    yield self.partial
                    if meter.ends:
                        break
            self.article = check_article(composer.article_of(instruction, stream.response))

    def illustrate(self, service: Service, files: Sequence[str], source: object, plan: Plan) -> Iterator[str]:
        """Give the article pictures in place of those it has -> the names of steps as they are done.

        Args:
            source: where pictures come from if there are no files, as in `compose`.

        Raises:
            ValueError, TypeError, OSError: as in `compose`, and for too many or unreadable files.
        """
        self.uploads = load_uploads(files)
        images = [upload.image for upload in self.uploads] or None
        with self._metered() as meter:
            steps = plan.composer(service, meter).illustrate(
                self.article, images, None if images else source, plan.num_pictures
            )
            for step, article in steps:
                self.article = article
                yield step
                if meter.ends:
                    break

    def edit(self, service: Service, index: int, action: str, material: str, plan: Plan) -> None:
        """Let the model change a paragraph, or insert one, as in `Composer.edit`."""
        check_text("the material", material)
        with self._metered() as meter:
            composer = plan.composer(service, meter)
            self.article = check_article(composer.edit(self.article, index, action, material))

    def add_picture(self, service: Service, index: int, caption: str, source: object, plan: Plan) -> None:
        """Put a picture after a paragraph, or look for another one there.

        Args:
            caption: what it should show; if empty, the model writes it.
            source: as in `illustrate`.
        """
        check_text("the caption", caption)
        source = self._search_uploads if self.uploads else source
        with self._metered() as meter:
            composer = plan.composer(service, meter)
            self.article = composer.add_picture(self.article, index, source, caption.strip() or None)

    def _search_uploads(self, caption: str, exclude: Collection[str | int], k: int) -> list[tuple]:
        """The visitor's pictures as a source: in their order."""
        return [(one.id, one.image) for one in self.uploads if one.id not in exclude][:k]

    @contextmanager
    def _metered(self) -> Iterator[Meter]:
        self._meter = Meter()
        try:
            yield self._meter
        finally:
            self._meter, self.partial = None, ""

    # ---- by hand ----

    def set_text(self, text: str) -> None:
        """Take the visitor's own text, a line for each paragraph. A line that was there keeps its picture."""
        self._check_quiet()
        check_text("the text", text)
        pictures = {part.text: part.picture for part in self.article.paragraphs}
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        parts = [Paragraph(line, pictures.get(line)) for line in lines]
        self.article = check_article(Article(self.article.instruction, tuple(parts)))

    def choose(self, index: int, choice: int) -> None:
        """Take another of the candidates after a paragraph."""
        self._check_quiet()
        self.article = self.article.with_choice(index, choice)

    def remove_picture(self, index: int) -> None:
        """Leave a paragraph without a picture."""
        self._check_quiet()
        self.article = self.article.with_picture(index, None)

    def _check_quiet(self) -> None:
        if self._meter is not None:
            raise ValueError("the article is being written; wait for it, or stop it")

    def archive(self, kind: str) -> Path:
        """A zip archive with the article in one of `FORMATS` and its pictures, until the next is made.

        Raises:
            ValueError: an unknown format, or there is nothing in the article.
        """
        if kind not in FORMATS:
            raise ValueError(f"unknown format {kind!r}; choose one of {', '.join(FORMATS)}")
        if not self.article.paragraphs:
            raise ValueError("there is no article yet; write one")
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="ixc2-article-")
        path = Path(self._folder.name, "article.zip")
        with TemporaryDirectory() as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            (self.article.to_markdown if kind == "markdown" else self.article.to_html)(folder)
            for file in sorted(Path(folder).iterdir()):
                archive.write(file, file.name)
        return path


def load_uploads(files: Sequence[str]) -> tuple[Candidate, ...]:
    """A visitor's pictures, none larger than `MAX_SIDE`.

    Raises:
        ValueError, OSError: too many, or one that can't be read.
    """
    if len(files) > MAX_UPLOADS:
        raise ValueError(f"{len(files)} pictures were uploaded, but the limit here is {MAX_UPLOADS}")
    images = [load_image(file) for file in files]
    for image in images:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return tuple(Candidate(number, image) for number, image in enumerate(images, 1))


def check_article(article: Article) -> Article:
    """Raise `ValueError` for one that is too long."""
    if len(article.paragraphs) > MAX_PARAGRAPHS:
        raise ValueError(
            f"the article has {len(article.paragraphs)} paragraphs, but the limit here is {MAX_PARAGRAPHS}"
        )
    check_text("the article", article.text)
    return article
