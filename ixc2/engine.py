"""Which model answers in the terminal: a checkpoint in torch, or one that was written for llama.cpp."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from ..chat_internlm_xcomposer2 import ChatMixin
from ..configuration_internlm_xcomposer2 import FIRST_GENERATION
from ..llamacpp.files import DECODER
from ..llamacpp.model import from_gguf
from ..tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer
from .small_files import PACKAGE

NANO = PACKAGE / "model.safetensors"  # only in a clone
BACKENDS = ("torch", "llama.cpp")

# Nano's answers have no randomness, and its pages repeat small pieces.
PLAIN = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer.

    Attributes:
        source: where it is.
        is_nano: whether it is the checkpoint in the repository.
    """

    model: ChatMixin
    tokenizer: InternLMXComposer2Tokenizer
    source: str

    @property
    def is_nano(self) -> bool:
        return Path(self.source).resolve() == PACKAGE


def add_engine_options(command: argparse.ArgumentParser) -> None:
    """Options of every command that asks a model."""
    group = command.add_argument_group("model")
    group.add_argument("--model", metavar="SRC", help="a checkpoint's directory or hub id; default: nano")
    group.add_argument("--backend", choices=BACKENDS, help="what runs it; default: as SRC needs")
    group.add_argument("--dtype", default="auto", help="of the weights; default: as in the checkpoint")
    group.add_argument(
        "--device",
        metavar="DEVICE",
        help="such as cpu, cuda or auto; default: an accelerator if there is one",
    )


def add_decoding_options(command: argparse.ArgumentParser, max_new_tokens: int | None = None) -> None:
    """Options of how an answer is generated."""
    group = command.add_argument_group("answer")
    group.add_argument("--max-new-tokens", type=int, metavar="N", default=max_new_tokens)
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely tokens")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--beams", type=int, metavar="N", dest="num_beams")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument("--hd-num", type=int, metavar="N", help="how many tiles a picture may be cut into")


def decoding_settings(options: argparse.Namespace, defaults: dict | None = None) -> dict:
    """What the options say about generating, over the defaults of a command."""
    names = ("max_new_tokens", "temperature", "top_p", "num_beams", "repetition_penalty")
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    settings = {**(defaults or {}), **chosen}
    if "temperature" in chosen or "top_p" in chosen:
        settings["do_sample"] = chosen.get("temperature") != 0
    if settings.get("do_sample") is False:
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_p")}
    return settings


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Without the library's progress bars, unless somebody watches; afterwards they are as before."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def load_engine(options: argparse.Namespace, adapters: tuple[str, ...] | None = ()) -> Engine:
    """Load the model that the options name.

    Args:
        adapters: the inference modes that are needed; `None` for all that are there.

    Raises:
        FileNotFoundError: no model is named, and nano is only in a clone of the repository.
        ValueError, OSError: it can't be loaded, or is one of the first generation.
    """
    if options.model is None and not NANO.is_file():
        raise FileNotFoundError(f"there is no checkpoint in {PACKAGE}; pass --model, or install a clone")
    source = str(PACKAGE) if options.model is None else options.model
    if getattr(AutoConfig.from_pretrained(source), "version", None) == FIRST_GENERATION:
        raise ValueError(
            f"{source!r} is of version {FIRST_GENERATION}, whose methods these commands don't know; call "
            "model.chat in Python, or start transformers serve"
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    is_gguf = (Path(source) / DECODER).is_file()
    load = _load_gguf if options.backend == "llama.cpp" or (options.backend is None and is_gguf) else _load
    with _bars_on_a_terminal():
        model = load(source, options, adapters)
    model.tokenizer = tokenizer
    return Engine(model, tokenizer, source)


def _load(source: str, options: argparse.Namespace, adapters: tuple[str, ...]) -> ChatMixin:
    """The model in torch."""
    device = options.device or ("auto" if torch.accelerator.is_available() else None)
    model = AutoModel.from_pretrained(source, dtype=options.dtype, device_map=device, adapters=adapters)
    if not isinstance(model, ChatMixin):
        raise ValueError(f"{source!r} scores answers and writes none; use a chat checkpoint")
    return model.eval()


def _load_gguf(source: str, options: argparse.Namespace, adapters: tuple[str, ...]) -> ChatMixin:
    """The model in llama.cpp, with its vision half on the device."""
    device = "cpu" if options.device in (None, "auto") else options.device
    return from_gguf(source, adapters=adapters, dtype=options.dtype, device=device)
