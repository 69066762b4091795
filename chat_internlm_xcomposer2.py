"""`chat`, `batch_chat` and streams: questions about pictures and videos, as both API generations ask."""

from collections.abc import Iterator, Sequence

import torch
from transformers import StoppingCriteriaList

from .answer_internlm_xcomposer2 import AnswerMixin, ChatPrompt
from .generation_internlm_xcomposer2 import as_list
from .modeling_internlm2 import check_infer_mode
from .prefix_internlm_xcomposer2 import ChatHistory, PromptCache, num_copies, prefills_once
from .prompt_internlm_xcomposer2 import END_OF_TURN, META_INSTRUCTION, History, check_turns, cut_response
from .streaming_internlm_xcomposer2 import AnswerStreamer, ChatStream


class ChatMixin(AnswerMixin):
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
        reuse: bool = True,
        **generate_kwargs,
    ) -> tuple[str, ChatHistory]:
        """Answer a question, about pictures and videos or without.

        Args:
            image: nothing, one picture or video, or a list of them: path, URL, `data:` URI, bytes,
                `PIL.Image`, array or (3, height, width) tensor in 0..1; a list of frames inside the list is a
                video; a (pictures, 3, side, side) tensor is taken as pixels that are already normalised.
                `None` asks version 2.5 for the published text-only prompt, with BOS twice.
            hd_num: how many local tiles a picture may be cut into, `config.hd_num` by default, in version 2.5
                at most 6 where there are several pictures. Squares ignore it.
            history: earlier (question, answer) turns. The pictures of all turns are passed each time.
            streamer: gets the ids as they come, without those that end the answer.
            use_meta: whether the system text goes before; in 2.5 only on request, in 2 and 4KHD by default.
            reuse: whether the returned history owns what was computed (`model.reuse_limit` bytes at most),
                and whether that of the passed one is used: only what differs from it is computed again.
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
        settings = self._settings(
            tokenizer,
            streamer=streamer,
            infer_mode=infer_mode,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            **generate_kwargs,
        )
        turns = check_turns(query, history)
        meta = self._system_text(use_meta, meta_instruction)
        prompt = self.plan_chat(tokenizer, query, image, hd_num, turns, meta)
        sequence, cache = self._answer(prompt, history, reuse, settings)
        response = cut_response(tokenizer.decode(sequence, skip_special_tokens=True))
        return response, ChatHistory([*turns, (query, response)], cache)

    @torch.no_grad()
    def batch_chat(
        self,
        tokenizer,
        queries: Sequence[str],
        images: Sequence | None = None,
        hd_num: int | None = None,
        histories: Sequence[History] | None = None,
        *,
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        **settings,
    ) -> list[tuple[str, ChatHistory]]:
        """Answer several questions at once, each as `chat` would alone, but for what sampling draws.

        Args:
            images: for each question what `chat` takes as `image`: none, one or several, of any size.
            histories: for each question its earlier turns.
            settings: how answers are drawn, with the names and defaults of `chat`, and anything else that
                `generate` takes.

        Returns:
            For each question the answer, and its history with this turn added.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        settings = self._settings(tokenizer, **settings)
        check_batch(queries, images, histories, settings)
        meta = self._system_text(use_meta, meta_instruction)
        nothing = [()] * len(queries)
        turns = [check_turns(*pair) for pair in zip(queries, histories or nothing, strict=True)]
        prompts = [
            self.plan_chat(tokenizer, query, image, hd_num, earlier, meta)
            for query, image, earlier in zip(queries, images or nothing, turns, strict=True)
        ]
        inputs = self._inputs_of(prompts, tokenizer.pad_token_id)
        sequences = self._generate_answer(inputs, **settings)
        sequences = sequences[:: len(sequences) // len(prompts)]  # the first where each has several
        answers = [cut_response(tokenizer.decode(s.tolist(), skip_special_tokens=True)) for s in sequences]
        return [
            (answer, ChatHistory([*earlier, (query, answer)]))
            for answer, earlier, query in zip(answers, turns, queries, strict=True)
        ]

    def chat_stream(
        self,
        tokenizer,
        query: str,
        image=(),
        hd_num: int | None = None,
        history: History = (),
        *,
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        reuse: bool = True,
        **settings,
    ) -> ChatStream:
        """As `chat`, with an iterator of pieces of the answer, which has the `history` at its end.

        Closing the iterator stops the computation after the current token.

        Args:
            settings: as in `batch_chat`.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `chat`, at the call.
        """
        if settings.get("streamer") is not None:
            raise ValueError("a stream has its own streamer; pass yours to chat")
        settings = self._settings(
            tokenizer, **{**settings, "streamer": True}
        )  # another takes its place below
        turns = check_turns(query, history)
        meta = self._system_text(use_meta, meta_instruction)
        prompt = self.plan_chat(tokenizer, query, image, hd_num, turns, meta)

        def generate(streamer: AnswerStreamer, criteria: StoppingCriteriaList) -> PromptCache | None:
            own = {"stopping_criteria": [*(settings.get("stopping_criteria") or []), *criteria]}
            return self._answer(prompt, history, reuse, {**settings, **own, "streamer": streamer})[1]

        return ChatStream(
            AnswerStreamer(tokenizer, as_list(settings["eos_token_id"])), generate, query, turns
        )

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
        **kwargs,
    ) -> Iterator[tuple[str, ChatHistory]]:
        """As `chat_stream`, with the defaults and the results of the older generation.

        Returns:
            An iterator of (answer so far, history so far) that begins with an empty answer.

        Raises:
            ValueError, TypeError, FileNotFoundError: as `chat`, at the call.
        """
        settings = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature}
        settings |= {"top_p": top_p, "repetition_penalty": repetition_penalty, **kwargs}
        stream = self.chat_stream(tokenizer, query, image, hd_num, history, **settings)
        return _answers_so_far(stream)

    @torch.no_grad()
    def _answer(
        self, prompt: ChatPrompt, history: History, reuse: bool, settings: dict
    ) -> tuple[list[int], PromptCache | None]:
        """Ids of the answer, and what is kept of its computation."""
        reuse = reuse and not self.training and self.reuse_limit > 0 and prefills_once(self, settings)
        if not reuse:
            return self._generate_answer(self._inputs_of([prompt]), **settings)[0].tolist(), None
        earlier = getattr(history, "prompt_cache", None)
        inputs, kept = self._reuse(prompt, earlier, settings["infer_mode"])
        answer = self._generate_answer(inputs, **settings)[0]
        return answer.tolist(), self._capture(kept, answer, num_copies(self, settings))

    def _system_text(self, use_meta: bool | None, meta_instruction: str | None) -> str:
        """The system text if it is wanted; 2.5 leaves it out unless asked."""
        use_meta = self.config.version != "2.5" if use_meta is None else use_meta
        return (meta_instruction or "") if use_meta else ""

    def _settings(
        self,
        tokenizer,
        *,
        max_new_tokens: int | None = 1024,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        infer_mode: str = "base",
        **settings,
    ) -> dict:
        """`generate`'s arguments: how tokens are drawn, where an answer ends, and what the caller adds.

        Raises:
            ValueError, TypeError: they, or the tokenizer, can't be worked with.
        """
        self.check_tokenizer(tokenizer)
        settings = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "num_beams": num_beams,
            **({"temperature": temperature, "top_p": top_p} if do_sample else {}),
            "repetition_penalty": repetition_penalty,
            "infer_mode": infer_mode,
            "eos_token_id": self.stop_token_ids(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
        self._check_settings(settings)
        return settings

    def _check_settings(self, settings: dict) -> None:
        """Raise `ValueError` or `TypeError` for what `generate` would refuse only after the tower has run."""
        check_infer_mode(settings["infer_mode"], self.config.text_config)
        check_numbers(settings)
        if settings.get("streamer") is not None and settings.get("num_beams", 1) > 1:
            raise ValueError(
                f"a streamer shows one answer as it grows, but num_beams is {settings['num_beams']}; use 1"
            )

    def stop_token_ids(self, tokenizer) -> list[int]:
        """`</s>` and the end of a turn."""
        return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def _answers_so_far(stream: ChatStream) -> Iterator[tuple[str, ChatHistory]]:
    with stream:
        yield "", stream.history
        for _ in stream:
            yield stream.response, stream.history


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


def check_batch(
    queries: Sequence[str], images: Sequence | None, histories: Sequence | None, settings: dict
) -> None:
    """Raise `TypeError` or `ValueError` unless there is one entry for each question."""
    if isinstance(queries, str) or not isinstance(queries, Sequence) or not queries:
        raise TypeError(f"queries must be a list of questions, at least one, not {queries!r:.80}")
    for name, values in (("images", images), ("histories", histories)):
        if values is None:
            continue
        if isinstance(values, str) or not isinstance(values, list | tuple):
            raise TypeError(f"{name} must be a list with one entry per question, not {type(values).__name__}")
        if len(values) != len(queries):
            raise ValueError(f"there are {len(queries)} queries but {len(values)} {name}; give one for each")
    if settings.get("streamer") is not None:
        raise ValueError(f"a streamer shows one answer, but there are {len(queries)} queries; use chat")
