"""Pages and articles in the terminal: `ixc2 page`, `resume`, `screenshot` and `article`."""

import argparse
import json
from pathlib import Path

from ..article_internlm_xcomposer2 import Article
from ..demo.service import add_options
from ..sources_internlm_xcomposer2 import FolderSource
from ..writing_internlm_xcomposer2 import IMAGE_SERVICES, NO_SEED, page_path, save_page
from .ask import check_exists
from .engine import PLAIN, add_decoding_options, add_engine_options, decoding_settings, load_engine

RESUME = "resume_2_webpage"
ENDINGS = {"markdown": "md", "html": "html", "json": "json"}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this file to the parser."""
    command = commands.add_parser("page", help="write a web page from an instruction")
    command.add_argument("instruction", metavar="INSTRUCTION")
    command.add_argument("pictures", metavar="PICTURE", nargs="*", help="files or URLs to look at")
    _add_page_options(command, "page.html")
    command.set_defaults(run=_page, method="write_webpage", files="pictures")
    command = commands.add_parser("resume", help="write a personal page from a resume")
    command.add_argument("instruction", metavar="FILE", help="Markdown in UTF-8")
    _add_page_options(command, "resume.html")
    command.set_defaults(run=_page, method=RESUME, pictures=())
    command = commands.add_parser("screenshot", help="write a page that looks like a screenshot")
    command.add_argument("pictures", metavar="FILE", nargs=1, help="a picture")
    _add_page_options(command, "screenshot.html")
    command.set_defaults(run=_page, method="screen_2_webpage", instruction="")
    _add_article(commands)
    command = commands.add_parser("web", help="serve pages for a browser: chat, web pages, composition")
    add_options(command)
    command.set_defaults(run=_web)


def _add_page_options(command: argparse.ArgumentParser, output: str) -> None:
    command.add_argument(
        "--output",
        metavar="FILE",
        default=output,
        help="ends in .html; - prints the page; default: %(default)s",
    )
    command.add_argument("--force", action="store_true", help="replace FILE")
    command.add_argument(
        "--image-links",
        choices=IMAGE_SERVICES,
        default="picsum",
        help="where links to random pictures lead; default: %(default)s",
    )
    command.add_argument("--json", action="store_true", help="print where the page is as JSON, for machines")
    add_decoding_options(command)
    add_engine_options(command)


def _add_article(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "article",
        help="write an article with pictures",
        description="Write an article, and choose pictures for it among your own (--images) or those of a "
        "folder (--pictures). A folder is ranked by captions that the model writes once and keeps in "
        "FOLDER/captions.jsonl, or by a CLIP or SigLIP checkpoint (--encoder).",
    )
    command.add_argument("instruction", metavar="INSTRUCTION")
    place = command.add_mutually_exclusive_group()
    place.add_argument("--pictures", metavar="FOLDER", help="where pictures may come from")
    place.add_argument("--images", metavar="FILE", nargs="+", help="pictures to use once each")
    command.add_argument("--encoder", metavar="SRC", help="a CLIP or SigLIP checkpoint that ranks FOLDER")
    command.add_argument("--num-pictures", type=int, metavar="N", help="default: the model decides")
    command.add_argument("--output", metavar="DIRECTORY", default="article", help="default: %(default)s")
    command.add_argument("--format", choices=ENDINGS, default="markdown", help="default: %(default)s")
    command.add_argument("--force", action="store_true", help="replace an earlier article in DIRECTORY")
    command.add_argument("--json", action="store_true", help="print the parts as JSON, for machines")
    add_decoding_options(command)
    add_engine_options(command)
    command.set_defaults(run=_article)


# ---- pages ----


def _page(options: argparse.Namespace) -> int:
    for file in (*options.pictures, *([options.instruction] if options.method == RESUME else [])):
        check_exists(file)
    to_stdout = options.output == "-"
    target = None if to_stdout else plan_output(options.output, options.force)
    engine = load_engine(options, ("web",))
    place = {"save": False} if target is None else {"task": target.stem, "output_dir": target.parent}
    page = getattr(engine.model, options.method)(
        options.instruction,
        list(options.pictures),
        seed=NO_SEED if options.seed is None else options.seed,
        image_links=options.image_links,
        hd_num=options.hd_num,
        **place,
        **decoding_settings(options, PLAIN if engine.is_nano else None),
    )
    if options.json:
        report = {"html": page} if target is None else {"file": str(target), "characters": len(page)}
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(page if target is None else target)
    return 0


def plan_output(output: str, force: bool) -> Path:
    """Where a page goes.

    Raises:
        ValueError, OSError: the name can't be that of a page, or the place can't be written to.
    """
    path = Path(output)
    if path.suffix != ".html":
        raise ValueError(f"--output {output!r} must end in .html, or be - for the terminal")
    target = page_path(path.stem, path.parent)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; pass --force to replace it, or another --output")
    return target


# ---- articles ----


def _article(options: argparse.Namespace) -> int:
    if options.encoder is not None and options.pictures is None:
        raise ValueError("--encoder ranks a folder; pass --pictures too")
    directory, name = Path(options.output), f"article.{ENDINGS[options.format]}"
    if (directory / name).exists() and not options.force:
        raise FileExistsError(f"{directory / name} exists; pass --force to replace it, or another --output")
    for picture in options.images or ():
        check_exists(picture)
    source = None if options.pictures is None else FolderSource(options.pictures, encoder=options.encoder)
    engine = load_engine(options, None)
    article = engine.model.compose(
        options.instruction,
        options.images,
        source,
        options.num_pictures,
        tokenizer=engine.tokenizer,
        hd_num=options.hd_num,
        seed=NO_SEED if options.seed is None else options.seed,
        fill_spots=options.num_pictures is not None,
        **decoding_settings(options, PLAIN if engine.is_nano else None),
    )
    file = _save(article, directory, name, options.format)
    print(json.dumps(_report(article, file), ensure_ascii=False) if options.json else file)
    return 0


def _save(article: Article, directory: Path, name: str, kind: str) -> Path:
    if kind == "markdown":
        return article.to_markdown(directory)
    if kind == "html":
        return article.to_html(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_page(article.to_json(), directory / name)
    return directory / name


def _report(article: Article, file: Path) -> dict:
    """The article without the pixels of its pictures."""
    paragraphs = []
    for part in article.paragraphs:
        picture = part.picture and {
            "caption": part.picture.caption,
            "candidates": [candidate.id for candidate in part.picture.candidates],
            "choice": part.picture.choice,
        }
        paragraphs.append({"text": part.text, "picture": picture})
    return {"file": str(file), "instruction": article.instruction, "paragraphs": paragraphs}


# ---- pages for a browser ----


def _web(options: argparse.Namespace) -> None:
    try:
        from ..demo import server, web
    except ImportError as error:
        raise ImportError(f"ixc2 web needs {error.name}: pip install 'internlm-xcomposer2[web]'") from None
    server.run(web.build, options)
