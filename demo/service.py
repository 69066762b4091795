"""What pages need of a model: loading it, what is kept of dialogues with it, and what is said of errors."""

import logging
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import internlm_xcomposer2  # its classes are what AutoModel finds
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory
from internlm_xcomposer2.sources_internlm_xcomposer2 import pictures_in
from transformers import AutoModel, AutoTokenizer

logger = logging.getLogger(__name__)

ROOT = Path(internlm_xcomposer2.__file__).resolve().parent
NANO = ROOT / "model.safetensors"  # only in a clone


# ---- the model ----


@dataclass(frozen=True)
class Service:
    """What the pages need: a model with its tokenizer, and how it writes best.

    Attributes:
        is_nano: whether it is the checkpoint in the repository, which answers greedily best.
        pictures: a folder that articles may take pictures from.
    """

    model: internlm_xcomposer2.InternLMXComposer2ForCausalLM
    tokenizer: internlm_xcomposer2.InternLMXComposer2Tokenizer
    is_nano: bool
    kept: "KeptHistories"
    pictures: str | None = None

    @property
    def config(self) -> internlm_xcomposer2.InternLMXcomposer2Config:
        return self.model.config


def load_service(
    source: str | None = None,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    pictures: str | None = None,
) -> Service:
    """Load a checkpoint: a directory or hub id, by default nano.

    Args:
        pictures: a folder that articles may take pictures from; captions of them are kept there in a file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FileNotFoundError: no source, and nano is only in a clone of the repository.
        ValueError, OSError: as in `from_pretrained`.
    """
    if source is None and not NANO.is_file():
        raise FileNotFoundError(f"there is no checkpoint in {ROOT}; pass --model, or run this in a clone")
    if pictures is not None:
        pictures_in(pictures)
    source = str(ROOT) if source is None else source
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=dtype, device_map=device_map).eval()
    return service_of(model, tokenizer, is_nano=Path(source).resolve() == ROOT, pictures=pictures)


def service_of(model, tokenizer, *, is_nano: bool = False, pictures: str | None = None) -> Service:
    """The service of a model that is already loaded."""
    model.tokenizer = tokenizer
    return Service(model, tokenizer, is_nano, KeptHistories(model.reuse_limit), pictures)


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
