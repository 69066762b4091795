"""`write_artical` and the three page writers: long answers with the task adapters of version 2.5."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from .prompt_internlm_xcomposer2 import BEGIN_OF_TURN, END_OF_TURN, IMAGE_MARK, META_INSTRUCTION
from .webpage_internlm_xcomposer2 import (
    check_image_links,
    merge_scripts,
    page_path,
    read_resume,
    rewrite_image_links,
    save_page,
)

logger = logging.get_logger(__name__)

# Tiles per picture in these methods, several pictures or one.
WRITING_TILES = 24
NO_SEED = -1

PERSONAL_PAGE_PROMPT = " Generate a personal page using the content in the resume:"
JAVASCRIPT_PROMPT = " Generate JavaScript events for the html code:"
SCREENSHOT_PROMPT = " Generate the HTML code of this web image with Tailwind CSS."


class WritingMixin:
    """Methods that write articles and pages. Needs `ChatMixin`, and `self.tokenizer` where none is passed."""

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
            seed: the same seed gives the same text, and leaves the caller's random state as it was; with -1
                the draws come from the generators as they are.
            kwargs: `tokenizer`, `infer_mode` and `meta_instruction`, and anything that `generate` takes.

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
        """Write the HTML of a page after an instruction, return it, and save it as `<task>.html`.

        Args:
            inst: what the page should be.
            image: pictures and videos as in `chat`.
            seed: as in `write_artical`.
            task: the file's name, whose blanks become underscores.
            image_links: `"picsum"`, `"placehold"` or `"keep"`: where links to random pictures lead.
            output_dir: where the file goes, the working directory by default.
            save: whether there is a file at all.
            kwargs: `hd_num` (24 by default), `tokenizer`, `infer_mode` and `meta_instruction`, and anything
                that `generate` takes.

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

    def resume_2_webpage(
        self,
        inst: str | os.PathLike,
        image=(),
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = NO_SEED,
        use_meta: bool = False,
        task: str = "Resume-to-Personal Page",
        *,
        image_links: str = "picsum",
        output_dir: str | os.PathLike | None = None,
        save: bool = True,
        **kwargs,
    ) -> str:
        """Make a personal page of a resume in two steps, its HTML and then its JavaScript.

        Args:
            inst: the path of a Markdown file in UTF-8.
            image: pictures for the first step.
            seed: as in `write_artical`, set before each of the two steps.
            task, image_links, output_dir, save, kwargs: as in `write_webpage`.

        Raises:
            ValueError, TypeError, OSError: as `write_webpage`, and for a file that can't be read.
        """
        path = _plan_page(task, image_links, output_dir, save)
        arguments = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "num_beams": num_beams,
            "temperature": temperature,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "use_meta": use_meta,
            "image_links": "keep",
            "save": False,
            **kwargs,
        }
        html = self.write_webpage(f"{PERSONAL_PAGE_PROMPT}{read_resume(inst)}", image, **arguments)
        # The answer is text, even where it happens to hold the mark of a picture.
        answer = self.write_webpage(f"{JAVASCRIPT_PROMPT}{html.replace(IMAGE_MARK, '')}", **arguments)
        return _finish_page(merge_scripts(html, answer), image_links, path)

    def screen_2_webpage(
        self,
        inst: str | None,
        image=(),
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = NO_SEED,
        use_meta: bool = False,
        task: str = "Screenshot-to-Webpage",
        **kwargs,
    ) -> str:
        """Write the HTML of a page that looks like a screenshot.

        Args:
            inst: ignored; the models know one instruction for this.
            image: the screenshot, as in `chat`.
            seed: as in `write_artical`.
            task, kwargs: as in `write_webpage`, with its `image_links`, `output_dir` and `save`.

        Raises:
            ValueError, TypeError, OSError: as `write_webpage`, and where there is no picture.
        """
        if image is None or (isinstance(image, list | tuple) and not image):
            raise ValueError("screen_2_webpage needs a picture; pass the screenshot as image")
        return self.write_webpage(
            SCREENSHOT_PROMPT,
            image,
            max_new_tokens,
            do_sample,
            num_beams,
            temperature,
            repetition_penalty,
            seed,
            use_meta,
            task,
            **kwargs,
        )

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
        **generate_kwargs,
    ) -> str:
        """The answer to one turn, without markup."""
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        self._check_writing(
            query, infer_mode, seed, tokenizer, {"max_new_tokens": max_new_tokens, **generate_kwargs}
        )
        inputs = self.prepare_chat(
            tokenizer,
            query,
            [] if image is None else image,
            WRITING_TILES if hd_num is None else hd_num,
            [],
            (meta_instruction or "") if use_meta else "",
        )
        if max_length is not None:
            max_new_tokens = answer_budget(inputs["input_ids"].shape[1], max_length, max_new_tokens)
        stops = {"eos_token_id": self.stop_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        with seeded_generators(seed):
            sequences = self._generate_answer(
                inputs, infer_mode=infer_mode, max_new_tokens=max_new_tokens, **{**stops, **generate_kwargs}
            )
        text = tokenizer.decode(sequences[0].tolist(), skip_special_tokens=True)
        return text.replace(END_OF_TURN, "").replace(BEGIN_OF_TURN, "")

    def _check_writing(
        self, query: str, infer_mode: str, seed: int, tokenizer, generate_kwargs: dict
    ) -> None:
        """Raise `ValueError` or `TypeError` for what is wrong whatever the prompt becomes."""
        if not isinstance(query, str):
            raise TypeError(f"inst must be a str, not {type(query).__name__}")
        self._check_settings({"infer_mode": infer_mode, **generate_kwargs})
        check_seed(seed)
        self.check_tokenizer(tokenizer)


def answer_budget(num_prompt: int, max_length: int, max_new_tokens: int | None = None) -> int:
    """How many tokens an answer may have, where `max_length` counts prompt and answer.

    Raises:
        ValueError: the prompt leaves nothing.
    """
    budget = max_length - num_prompt
    if budget < 1:
        raise ValueError(
            f"the prompt has {num_prompt} tokens, which leaves none of max_length {max_length} for the "
            "answer; raise max_length, shorten the text or lower hd_num"
        )
    return budget if max_new_tokens is None else min(budget, max_new_tokens)


def check_seed(seed: int) -> None:
    """Raise unless the seed is -1 or what every generator takes."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, not {type(seed).__name__}")
    if seed != NO_SEED and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be {NO_SEED} for none or lie in 0..{2**32 - 1}, not {seed}")


@contextlib.contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the torch generators that sampling draws from, and put their states back afterwards."""
    if seed == NO_SEED:
        yield
        return
    with torch.random.fork_rng(devices=()), _seeded_accelerator(seed):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _seeded_accelerator(seed: int) -> Iterator[None]:
    """The accelerator's part, if one is in use: seeding it before would take effect after the call."""
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    module = torch.get_device_module(kind)
    if kind == "cpu" or not getattr(module, "is_initialized", lambda: True)():
        yield
        return
    # MPS has one generator, reached without an index.
    places = [()] if kind == "mps" else [(index,) for index in range(module.device_count())]
    states = [module.get_rng_state(*place) for place in places]
    try:
        (module.manual_seed if kind == "mps" else module.manual_seed_all)(seed)
        yield
    finally:
        for place, state in zip(places, states, strict=True):
            module.set_rng_state(state, *place)


def _plan_page(task: str, image_links: str, output_dir: str | os.PathLike | None, save: bool) -> Path | None:
    """Check the options of a page, and say where it goes if it is saved."""
    check_image_links(image_links)
    return page_path(task, output_dir) if save else None


def _finish_page(page: str, image_links: str, path: Path | None) -> str:
    """Rewrite the links and save."""
    page = rewrite_image_links(page, image_links)
    if path is not None:
        save_page(page, path)
    return page
