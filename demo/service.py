"""What pages need of a model: loading it, what is kept of dialogues with it, and what is said of errors."""

import argparse
import logging
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

from internlm_xcomposer2 import (
    InternLMXcomposer2Config,
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2Tokenizer,
)
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory
from internlm_xcomposer2.ixc2.engine import add_engine_options, load_engine
from internlm_xcomposer2.sources_internlm_xcomposer2 import pictures_in

logger = logging.getLogger(__name__)

PORT = 7860


# ---- the model ----


@dataclass(frozen=True)
class Service:
    """What the pages need: a model with its tokenizer, and how it writes best.

    Attributes:
        is_nano: whether it is the checkpoint in the repository, which answers greedily best.
        pictures: a folder that articles may take pictures from.
    """

    model: InternLMXComposer2ForCausalLM
    tokenizer: InternLMXComposer2Tokenizer
    is_nano: bool
    kept: "KeptHistories"
    pictures: str | None = None

    @property
    def config(self) -> InternLMXcomposer2Config:
        return self.model.config


def load_service(options: argparse.Namespace) -> Service:
    """Load the model that the options of `add_options` name.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder of pictures; and as in `load_engine`.
        ValueError, OSError: as in `load_engine`.
    """
    if options.pictures is not None:
        pictures_in(options.pictures)
    engine = load_engine(options, adapters=None)
    return service_of(engine.model, engine.tokenizer, is_nano=engine.is_nano, pictures=options.pictures)


def service_of(model, tokenizer, *, is_nano: bool = False, pictures: str | None = None) -> Service:
    """The service of a model that is already loaded."""
    return Service(model, tokenizer, is_nano, KeptHistories(model.reuse_limit), pictures)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that serves pages."""
    parser.add_argument("--pictures", metavar="FOLDER", help="articles may take pictures from it")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=int, help=f"default: the first free one from {PORT}")
    parser.add_argument(
        "--web-content",
        action="store_true",
        help="let written pages load pictures, styles and scripts from the web in their frame",
    )
    add_engine_options(parser)


class KeptHistories:
    """What the decoder computed for the dialogues of all visitors, `limit` bytes at most together.

    Beyond it, the dialogue that has been quiet for longest is computed again when it goes on.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._histories: list[weakref.ref[ChatHistory]] = []  # the last used at the end
        self._lock = threading.Lock()

    def keep(self, history: ChatHistory) -> None:
        """Count a history, and free others until all of them fit."""
        with self._lock:
            alive = [kept for reference in self._histories if (kept := reference()) is not None]
            alive = [*(kept for kept in alive if kept is not history), history]
            num_bytes = 0
            for kept in reversed(alive):
                num_bytes += kept.prompt_cache.nbytes if kept.prompt_cache else 0
                if num_bytes > self.limit:
                    kept.release()
            self._histories = [weakref.ref(kept) for kept in alive]


# ---- errors ----


def as_text(error: Exception, files: tuple[str, ...] = ()) -> str:
    """What a visitor reads of an error: never where files are on the server.

    A mistake of the visitor's is explained as the package does it; anything else is logged.
    """
    if not isinstance(error, ValueError | TypeError | OSError):
        logger.error("a computation failed", exc_info=error)
        return f"The computation failed ({type(error).__name__}). Try a shorter question or fewer tiles."
    text = str(error)
    for file in files:
        text = text.replace(file, Path(file).name)
    return text
