"""`chat` and `stream_chat`: questions about pictures and videos, in the forms of both API generations."""

import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from queue import Queue

import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    GenerationMixin,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .ixc_utils import check_hd_num
from .modeling_internlm2 import check_infer_mode
from .prompt_internlm_xcomposer2 import (
    END_OF_TURN,
    META_INSTRUCTION,
    PromptIds,
    cut_response,
    encode_prompt,
    format_prompt,
    place_images,
)
from .visual_internlm_xcomposer2 import Visual, as_visuals, prepare_visuals

# With several pictures in one 2.5 prompt the published code allows each only so many tiles.
MAX_TILES_OF_SEVERAL = 6

History = Sequence[tuple[str, str]]


class ChatMixin:
    """The methods that users call. Needs a model with `embed_inputs`, `config` and `generate`."""

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str,
        image=(),
        hd_num: int | None = None,
        history: History = (),
        streamer=None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        infer_mode: str = "base",
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        **generate_kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer a question, about pictures and videos or without.

        Args:
            image: nothing, one picture or video, or a list of them: path, URL, `data:` URI, bytes,
                `PIL.Image`, array or (3, height, width) tensor in 0..1; a list of frames inside the list is a
                video; a (pictures, 3, side, side) tensor is taken as pixels that are already normalised.
                `None` asks version 2.5 for the published text-only prompt, with BOS twice.
            hd_num: how many local tiles a picture may be cut into, `config.hd_num` by default, in version 2.5
                at most 6 where there are several pictures. Squares ignore it.
            history: earlier (question, answer) turns. The pictures of all turns are passed each time.
            use_meta: whether the system text goes before; in 2.5 only on request, in 2 and 4KHD by default.
            generate_kwargs: anything `generate` takes.

        Returns:
            The answer, and the history with this turn added.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        if isinstance(hd_num, list | tuple):  # history is the fourth argument of the older generation
            if history:
                raise TypeError("arguments after a history in fourth place have to be named")
            hd_num, history = None, hd_num
        settings = {
            "streamer": streamer,
            "infer_mode": infer_mode,
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "repetition_penalty": repetition_penalty,
            **self._token_choice(tokenizer, do_sample, temperature, top_p),
            **generate_kwargs,
        }
        self._check_settings(settings)
        history = check_turns(query, history)
        meta = self._system_text(use_meta, meta_instruction)
        inputs = self.prepare_chat(tokenizer, query, image, hd_num, history, meta)
        sequences = self._generate_answer(inputs, **settings)
        response = cut_response(tokenizer.decode(sequences[0].tolist(), skip_special_tokens=True))
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query: str,
        image=None,
        history: History = (),
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        hd_num: int | None = None,
        infer_mode: str = "base",
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        **generate_kwargs,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """As `chat`, with an iterator of (answer so far, history so far) that begins with an empty answer.

        Closing the iterator stops the computation after the current token.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `chat`, at the call.
        """
        settings = {
            "infer_mode": infer_mode,
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": repetition_penalty,
            **self._token_choice(tokenizer, do_sample, temperature, top_p),
            **generate_kwargs,
            "streamer": _Streamer,  # one is made when the iterator starts
        }
        self._check_settings(settings)
        history = check_turns(query, history)
        meta = self._system_text(use_meta, meta_instruction)
        inputs = self.prepare_chat(tokenizer, query, image, hd_num, history, meta)
        return self._stream_answer(tokenizer, query, history, inputs, settings)

    def _stream_answer(
        self, tokenizer, query: str, history: list[tuple[str, str]], inputs: dict, settings: dict
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Generate in a thread and yield the answer as it grows."""
        yield "", [*history, (query, "")]
        streamer = settings["streamer"] = _Streamer(tokenizer)
        criteria = StoppingCriteriaList([*(settings.pop("stopping_criteria", None) or []), streamer.stop])

        def work() -> None:
            try:
                self._generate_answer(inputs, stopping_criteria=criteria, **settings)
            except BaseException as error:  # handed to the reader, in whose thread it is raised
                streamer.fail(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield cut_response(text), [*history, (query, cut_response(text))]
        finally:
            streamer.stop.set()
            thread.join()

    def build_inputs(
        self, tokenizer, query: str, history: History = (), meta_instruction: str | None = ""
    ) -> BatchEncoding:
        """The published text-only prompt as (1, tokens) ids on the model's device; BOS stands twice."""
        prompt = f"{tokenizer.bos_token}{format_prompt(query, history, meta_instruction)}"
        return tokenizer([prompt], return_tensors="pt").to(self.input_device)

    def prepare_chat(
        self, tokenizer, query: str, image, hd_num: int | None, history: History, meta: str
    ) -> dict:
        """Everything `forward` needs for one prompt, with all checks made and nothing computed by the model.

        Returns:
            `input_ids`, and with pictures `pixel_values`, `image_grid_hw` and `im_mask`.
        """
        if hd_num is not None:
            check_hd_num(hd_num)
        if image is None or (self.config.version != "2.5" and isinstance(image, list | tuple) and not image):
            place_images(format_prompt(query, history, meta), 0, version=self.config.version)
            inputs = self.build_inputs(tokenizer, query, history, meta)
            check_length(inputs["input_ids"].shape[1], [], self.config)
            return {"input_ids": inputs["input_ids"]}
        visuals = as_visuals(image, self.config)
        hd_num = self.default_hd_num(len(visuals)) if hd_num is None else hd_num
        texts = place_images(format_prompt(query, history, meta), len(visuals), version=self.config.version)
        prompt = self.encode_texts(tokenizer, texts, visuals, hd_num)
        ids = torch.tensor([prompt.ids], device=self.input_device)
        if not visuals:
            return {"input_ids": ids, "penalise_prompt": False}
        pixel_values, image_grid_hw = prepare_visuals(visuals, self.config, hd_num, font=self.font)
        mask = torch.tensor([prompt.is_image], device=self.input_device)
        return {
            "input_ids": ids,
            "pixel_values": pixel_values,
            "image_grid_hw": image_grid_hw,
            "im_mask": mask,
        }

    def encode_texts(self, tokenizer, texts: list[str], visuals: list[Visual], hd_num: int) -> PromptIds:
        """Texts with pictures between them -> ids, after checking that they fit the context."""
        lengths = [self.num_image_tokens(*visual.grid(self.config, hd_num)) for visual in visuals]
        prompt = encode_prompt(
            tokenizer,
            texts,
            lengths,
            version=self.config.version,
            image_token_id=self.config.image_token_id,
        )
        num_text = len(prompt.ids) - sum(lengths)

        def count(budget: int) -> int:
            return num_text + sum(self.num_image_tokens(*v.grid(self.config, budget)) for v in visuals)

        check_length(len(prompt.ids), lengths, self.config, hd_num, count)
        return prompt

    def _system_text(self, use_meta: bool | None, meta_instruction: str | None) -> str:
        """The system text if it is wanted; 2.5 leaves it out unless asked."""
        use_meta = self.config.version != "2.5" if use_meta is None else use_meta
        return (meta_instruction or "") if use_meta else ""

    def _token_choice(self, tokenizer, do_sample: bool, temperature: float, top_p: float) -> dict:
        """`generate`'s arguments on how tokens are drawn and where an answer ends."""
        self.check_tokenizer(tokenizer)
        sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
        stops = {"eos_token_id": self.stop_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return {"do_sample": do_sample, **stops, **sampling}

    def _check_settings(self, settings: dict) -> None:
        """Raise `ValueError` or `TypeError` for what `generate` would refuse only after the tower has run."""
        check_infer_mode(settings["infer_mode"], self.config.text_config)
        check_numbers(settings)
        if settings.get("streamer") is not None and settings.get("num_beams", 1) > 1:
            raise ValueError(
                f"a streamer shows one answer as it grows, but num_beams is {settings['num_beams']}; use 1"
            )

    def default_hd_num(self, num_visuals: int) -> int:
        """The budget of tiles where the caller names none."""
        if self.config.version == "2.5" and num_visuals > 1:
            return min(MAX_TILES_OF_SEVERAL, self.config.hd_num)
        return self.config.hd_num

    def stop_token_ids(self, tokenizer) -> list[int]:
        """`</s>` and the end of a turn."""
        return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]

    def check_tokenizer(self, tokenizer) -> None:
        """Raise `ValueError` unless the tokenizer's vocabulary is the model's."""
        if tokenizer is None:
            raise ValueError("no tokenizer: pass one, or set model.tokenizer")
        if not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise TypeError(f"the tokenizer is a {type(tokenizer).__name__}; load it with AutoTokenizer")
        rows = self.model.tok_embeddings.weight.shape[0]
        if rows not in (tokenizer.vocab_size, len(tokenizer)) and len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} pieces but the model {rows}; load the tokenizer that "
                "lies beside the checkpoint"
            )
        end, expected = tokenizer.convert_tokens_to_ids(END_OF_TURN), self.config.end_token_id
        if end in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer has no piece {END_OF_TURN}, which ends every turn of these models"
            )
        if expected < rows and end != expected:
            raise ValueError(
                f"the tokenizer's id of {END_OF_TURN} is {end} but the model's is {expected}; load the "
                "tokenizer that lies beside the checkpoint"
            )

    @torch.no_grad()
    def _generate_answer(self, inputs: dict, **kwargs) -> Tensor:
        """Generate from `prepare_chat`'s inputs -> (sequences, new tokens), the prompt left out."""
        ids = inputs["input_ids"]
        by_embeddings = "pixel_values" in inputs or not inputs.get("penalise_prompt", True)
        if not by_embeddings:
            return self._new_tokens(ids, kwargs)
        embeds, mask = self.embed_inputs(
            ids, inputs.get("pixel_values"), inputs.get("image_grid_hw"), inputs.get("im_mask")
        )
        kwargs |= {"inputs_embeds": embeds, "im_mask": mask}
        # The repetition penalty sees new tokens only, as in the published code.
        if is_assisted(kwargs):  # guesses need the ids, so that the penalty has to be told where to begin
            penalty = RepetitionPenaltyLogitsProcessor(
                kwargs.pop("repetition_penalty", 1.0), prompt_ignore_length=ids.shape[1]
            )
            kwargs["logits_processor"] = LogitsProcessorList(
                [penalty, *(kwargs.get("logits_processor") or [])]
            )
            return self._new_tokens(ids, kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
            return self._new_tokens(None, kwargs, torch.ones_like(ids))

    def _new_tokens(self, ids: Tensor | None, kwargs: dict, attention_mask: Tensor | None = None) -> Tensor:
        """(sequences, new tokens) that `generate` of the library adds to `ids`, or to embeddings alone."""
        attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        outputs = GenerationMixin.generate(self, ids, attention_mask=attention_mask, **kwargs)
        sequences = getattr(outputs, "sequences", outputs)
        return sequences if ids is None else sequences[:, ids.shape[1] :]


def is_assisted(settings: dict) -> bool:
    """Whether `generate` would guess tokens ahead, with these arguments."""
    return any(settings.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens"))


class _Stop(StoppingCriteria):
    """Stops every sequence once it is set."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class _Streamer(TextIteratorStreamer):
    """An iterator of text that can be stopped, and that raises what the generating thread raised."""

    def __init__(self, tokenizer) -> None:
        # Taking blanks away afterwards would shift what was shown already.
        cleanup = {"clean_up_tokenization_spaces": False}
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, **cleanup)
        self.stop = _Stop()
        self.errors: Queue = Queue()

    def fail(self, error: BaseException) -> None:
        self.errors.put(error)
        self.text_queue.put(self.stop_signal)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            if not self.errors.empty():
                raise self.errors.get() from None
            raise


def check_numbers(settings: dict) -> None:
    """Raise `TypeError` or `ValueError` for a number that `generate` can't work with."""
    for name in ("max_new_tokens", "num_beams"):
        value = settings.get(name, 1)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    for name in ("temperature", "top_p", "repetition_penalty"):
        value = settings.get(name, 1.0)
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, not {value!r}")
        if not value > 0 or (name == "top_p" and value > 1):
            limits = "above 0 and at most 1" if name == "top_p" else "above 0"
            raise ValueError(
                f"{name} must be {limits}, not {value}; do_sample=False takes the likeliest tokens"
            )


def check_turns(query: str, history: History | None) -> list[tuple[str, str]]:
    """The history as a list of pairs of text.

    Raises:
        TypeError: the question is no text, or the history no list of (question, answer).
    """
    if not isinstance(query, str):
        raise TypeError(f"query must be a str, not {type(query).__name__}")
    turns = []
    for turn in history or ():
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise TypeError(f"history must be a list of (question, answer) texts; one turn is {turn!r:.80}")
        turns.append((turn[0], turn[1]))
    return turns


def context_length(config) -> int:
    """How many tokens the decoder reads: the trained positions times what their scaling stretches them by."""
    text = config.text_config
    return int(text.max_position_embeddings * text.rope_parameters.get("factor", 1.0))


def check_length(num_tokens: int, image_lengths: list[int], config, hd_num: int = 1, count=None) -> None:
    """Raise `ValueError` for a prompt longer than the context, with what would fit."""
    limit = context_length(config)
    if num_tokens <= limit:
        return
    remedy = "shorten the text or the history"
    if image_lengths and count is not None and config.is_tiled:
        fitting = bisect_right(range(1, hd_num), limit, key=count)  # the count grows with the budget
        remedy = f"hd_num={fitting} would fit" if fitting else "pass fewer pictures or frames, or less text"
    raise ValueError(
        f"the prompt has {num_tokens} tokens, {sum(image_lengths)} of them for "
        f"{len(image_lengths)} pictures, but the context holds {limit}; {remedy}"
    )
