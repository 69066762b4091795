"""Methods on embeddings that clients of the published code call, and the batches of its trainers.

New code needs none of them: `forward` and `generate` accept ids with pictures. Both generations of the API
are here, distinguished by `config.version`: "2" and "2-4khd" on one side, "2.5" on the other.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, StoppingCriteria, StoppingCriteriaList

from .build_mlp import leaves_autocast
from .image_processing_internlm_xcomposer2 import (
    as_visuals,
    check_pixels,
    check_stack,
    prepare_visuals,
)
from .inputs_internlm_xcomposer2 import IGNORED
from .media_internlm_xcomposer2 import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from .prompt_internlm_xcomposer2 import (
    batch_inputs,
    check_length,
    check_tokenizer,
    check_turns,
    context_length,
    encode_prompt,
    format_prompt,
    place_images,
    plan_chat,
)
from .tokenization_internlm_xcomposer2 import BEGIN_OF_TURN, END_OF_TURN, IMAGE_MARK

# The published default of `encode_img`; `chat` uses `config.hd_num`.
HD_NUM_OF_ENCODE_IMG = 25

image_extensions = IMAGE_EXTENSIONS
video_extensions = VIDEO_EXTENSIONS

Embedded = tuple[Tensor, Tensor, Tensor, Tensor]


class EmbeddingMethodsMixin:
    """Text and pictures -> embeddings. Needs a model that can `chat`; most methods need `self.tokenizer`."""

    # ---- text ----

    def encode_text(self, text: str, add_special_tokens: bool = False) -> Tensor:
        """Text -> (1, tokens, hidden); special tokens put BOS first, even if the text is empty."""
        return self._embed_text(self._own_tokenizer(), text, add_special_tokens)

    def text2emb(
        self, text: str | list[str], add_special: bool = False, *, add_special_tokens: bool | None = None
    ) -> tuple[BatchEncoding, Tensor]:
        """Whole conversations -> ids and mask, padded right, and the labels of their answers.

        Args:
            add_special, add_special_tokens: whether BOS goes first; one name for each generation of the API.

        Returns:
            `input_ids` and `attention_mask` of (batch, tokens), and (batch, tokens) labels.

        Raises:
            ValueError: a conversation is longer than `self.max_length`.
        """
        with_bos = add_special if add_special_tokens is None else add_special_tokens
        tokenizer = self._own_tokenizer()
        texts = [text] if isinstance(text, str) else list(text)
        rows = [tokenizer(text, add_special_tokens=with_bos)["input_ids"] for text in texts]
        ids, attention_mask = self._pad(rows, tokenizer.pad_token_id)
        labels = self.mask_human_targets(ids).masked_fill(attention_mask == 0, IGNORED)
        return BatchEncoding({"input_ids": ids, "attention_mask": attention_mask}), labels

    def mask_human_targets(self, input_ids: Tensor, pure: bool = False) -> Tensor:
        """(batch, tokens) ids of whole conversations -> (batch, tokens) labels.

        Answers count, with the mark that ends them, and after the last one also the newline and `</s>`.
        Everything else is -100: system, questions, the line that opens an answer, anything after `</s>`.

        Args:
            pure: the rows are plain text, all of which counts.
        """
        tokenizer = self._own_tokenizer()
        opening = tokenizer(f"{BEGIN_OF_TURN}assistant", add_special_tokens=False)["input_ids"]
        end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        labels = torch.full_like(input_ids, IGNORED)
        for row, ids in enumerate(input_ids.tolist()):
            stop = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            spans = [(0, stop)] if pure else find_answers(ids[:stop], opening, end)
            for first, last in spans:
                labels[row, first:last] = input_ids[row, first:last]
        return labels

    # ---- pictures ----

    @leaves_autocast
    def encode_img(self, image, hd_num: int | None = None) -> Tensor | list[Tensor] | None:
        """Pictures -> embeddings of the decoder.

        Args:
            image: a picture or video as in `chat`, or (pictures, 3, height, width) pixels normalised by
                `vis_processor`, of any dtype and device, or a list of these, or a 5-D stack.
            hd_num: how many local tiles a picture may be cut into, 25 by default; pixels are never resized.

        Returns:
            (pictures, tokens, hidden); for a list of pictures, a list of these; for a stack of
            (pictures, 1, 3, height, width), whose pictures have one size, one tensor; and `None` for `None`.

        Raises:
            ValueError, TypeError, FileNotFoundError: the picture can't be read, or pixels have a wrong size.
        """
        if image is None:
            return None
        if isinstance(image, list | tuple):
            return [self.encode_img(item, hd_num) for item in image]
        if isinstance(image, Tensor) and image.ndim == 5:
            image = image.flatten(0, 1)
        if isinstance(image, Tensor):
            if image.ndim != 4:
                raise ValueError(
                    f"normalised pixels must be (pictures, 3, height, width), not {tuple(image.shape)}; "
                    "add the missing dimension with unsqueeze(0)"
                )
            return torch.cat(self._encode_pixels(check_stack(image).split(1)))
        hd_num = HD_NUM_OF_ENCODE_IMG if hd_num is None else hd_num
        pixel_values, grid = prepare_visuals(
            as_visuals(image, self.config), self.config, hd_num, font=self.font
        )
        return self.get_image_features(pixel_values, grid).pooler_output[0][None]

    def img2emb(self, image) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of one size -> (pictures, tokens, hidden), and (pictures, tokens) of ones and of -100."""
        embeds = self.encode_img(image)
        if not isinstance(embeds, Tensor):
            raise ValueError(f"img2emb takes one picture or pixels of one size, not {type(image).__name__}")
        ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return embeds, ones, torch.full_like(ones, IGNORED)

    def _encode_pixels(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Normalised (1, 3, height, width) pictures -> one (1, tokens, hidden) each, in one pass."""
        if not pictures:
            return []
        for picture in pictures:
            check_pixels(picture[0], self.config)
        # The tower is called as published, so that clients' hooks see it.
        if self.config.is_tiled:
            features, counts = self.vit(list(pictures), self.plora_glb_GN, self.plora_sub_GN)
            return list(self.vision_proj(features).split(counts, dim=1))
        return list(self.vision_proj(self.vit(torch.cat(list(pictures)))).split(1))

    # ---- both ----

    @leaves_autocast
    def prompt_wrap(self, img_embeds: Tensor, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """Insert each of (pictures, tokens, hidden) into a prompt that has one `<ImageHere>` and gets BOS.

        Returns:
            (pictures, all tokens, hidden), and (pictures, all tokens) of ones and of -100.
        """
        before, after = place_images(prompt, 1, version="2")
        tokenizer = self._own_tokenizer()
        parts = [(before, True), (after, False)]
        texts = [
            self._embed_text(tokenizer, text, special).expand(len(img_embeds), -1, -1)
            for text, special in parts
        ]
        embeds = torch.cat([texts[0], img_embeds.to(texts[0].device, texts[0].dtype), texts[1]], dim=1)
        ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return embeds, ones, torch.full_like(ones, IGNORED)

    @leaves_autocast
    def interleav_wrap(
        self, img_list, text_list: Sequence, image_nums: Sequence[int] | None = None
    ) -> Embedded:
        """A batch of whole conversations with pictures, as the trainers need it, with one BOS in each.

        Args:
            img_list: the pictures in the order of the marks, as in `encode_img`: one entry for each
                conversation, or one for each picture together with `image_nums`.
            text_list: conversations with an `<ImageHere>` for each picture, or a list with the list of them.
            image_nums: how many pictures each conversation has.

        Returns:
            Embeddings (batch, tokens, hidden), attention mask, labels and image mask (batch, tokens), padded
            right.

        Raises:
            ValueError: the numbers of marks and pictures differ, or a conversation is longer than
                `self.max_length`.
        """
        texts = list(flatten(text_list))
        rows = group_pictures(img_list, len(texts), image_nums)
        for row, (text, pictures) in enumerate(zip(texts, rows, strict=True)):
            if text.count(IMAGE_MARK) != len(pictures):
                raise ValueError(
                    f"conversation {row} has {text.count(IMAGE_MARK)} {IMAGE_MARK} marks but {len(pictures)} "
                    "pictures; put one mark for each"
                )
        features = self._encode_pictures([picture for pictures in rows for picture in pictures])
        return self._interleave_batch(texts, features)

    @leaves_autocast
    def interleav_wrap_chat(self, *args, **kwargs) -> tuple:
        """A chat prompt with pictures -> what `generate` accepts, in the API of the checkpoint's version.

        2 and 4KHD: `(tokenizer, query, image, history=(), meta_instruction="")` with the embeddings of
        `encode_img`, (pictures, tokens, hidden) or a list, returns `({"inputs_embeds"}, im_mask)`.

        2.5: `(query, image, history=(), meta_instruction="", max_length=None, hd_num=None)` with pictures and
        videos as in `chat` returns `({"inputs_embeds"}, im_mask, number of tokens)`.

        Embeddings are (1, tokens, hidden), masks (1, tokens).

        Raises:
            ValueError: the numbers of marks and pictures differ, or the prompt is too long; it is never cut.
        """
        wrap = self._interleave_media if self.config.version == "2.5" else self._interleave_embeds
        return wrap(*args, **kwargs)

    def _interleave_embeds(
        self, tokenizer, query: str, image, history=(), meta_instruction: str | None = ""
    ) -> tuple[dict, Tensor]:
        pictures = [part for part in ([] if image is None else image) for part in _rows_of_tokens(part)]
        prompt = format_prompt(query, check_turns(query, history), _as_text(meta_instruction))
        texts = place_images(prompt, len(pictures), version=self.config.version)
        embeds, im_mask = self._place_features(tokenizer, texts, pictures)
        return {"inputs_embeds": embeds}, im_mask

    def _interleave_media(
        self,
        query: str,
        image,
        history=(),
        meta_instruction: str | None = "",
        max_length: int | None = None,
        hd_num: int | None = None,
    ) -> tuple[dict, Tensor, int]:
        tokenizer = self._own_tokenizer()
        history = check_turns(query, history)
        image = [] if image is None else image
        meta = _as_text(meta_instruction)
        prompt = plan_chat(self.config, tokenizer, query, image, hd_num, history, meta, allow_markup=True)
        num_tokens = len(prompt.ids)
        if max_length is not None and num_tokens > max_length:
            raise ValueError(
                f"the prompt has {num_tokens} tokens but max_length is {max_length}; raise it, lower hd_num "
                "or pass fewer pictures"
            )
        inputs = batch_inputs(self.config, [prompt], font=self.font, device=self.input_device)
        names = ("input_ids", "pixel_values", "image_grid_hw", "im_mask")
        embeds, im_mask = self.embed_inputs(**{name: inputs.get(name) for name in names})
        if im_mask is None:
            im_mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"inputs_embeds": embeds}, im_mask, num_tokens

    # ---- training ----

    def embed_samples(self, samples: dict) -> Embedded:
        """A batch of the published trainers -> embeddings, attention mask, labels and image mask.

        Args:
            samples: `text_input`, the conversations, however deeply nested; `data_type`, a list that begins
                with `"multi"` or `"text"`; for `"multi"` also `image`, the normalised pixels of
                (1, 3, height, width) or (pictures, 3, side, side), one entry or list for each conversation.

        Returns:
            The same as `interleav_wrap`.

        Raises:
            ValueError: something is missing or doesn't fit, or a conversation is longer than
                `self.max_length`.
        """
        has_pictures = check_samples(samples, ("text_input",))
        texts = list(flatten(samples["text_input"]))
        return self.interleav_wrap(samples["image"] if has_pictures else [[] for _ in texts], texts)

    def _encode_pictures(self, pictures: list) -> list[Tensor]:
        """Pictures or pixels -> one (tokens, hidden) each; pixels go through the tower together."""
        if all(isinstance(picture, Tensor) for picture in pictures):
            return [embeds[0] for embeds in self._encode_pixels(pictures)]
        return [self.encode_img(picture)[0] for picture in pictures]

    def _interleave_batch(self, texts: list[str], features: list[Tensor]) -> Embedded:
        """Conversations and the (tokens, hidden) of their pictures, in order -> a padded batch."""
        tokenizer = self._own_tokenizer()
        lengths = iter([len(feature) for feature in features])
        prompts = [
            encode_prompt(
                tokenizer,
                parts,
                [next(lengths) for _ in parts[1:]],
                version="2.5",  # one BOS, as in the training of every version
                image_token_id=self.config.image_token_id,
            )
            for parts in (text.split(IMAGE_MARK) for text in texts)
        ]
        ids, attention_mask = self._pad([prompt.ids for prompt in prompts], tokenizer.pad_token_id)
        im_mask, _ = self._pad([prompt.is_image for prompt in prompts], 0)
        im_mask = im_mask.bool()
        labels = self.mask_human_targets(ids).masked_fill(im_mask | (attention_mask == 0), IGNORED)
        return self._scatter(ids, im_mask, features), attention_mask, labels, im_mask

    # ---- helpers ----

    def _own_tokenizer(self):
        check_tokenizer(self.config, self.tokenizer)
        return self.tokenizer

    def _embed_text(self, tokenizer, text: str, add_special_tokens: bool) -> Tensor:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return self.model.tok_embeddings(torch.tensor([ids], dtype=torch.long, device=self.input_device))

    def _pad(self, rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
        """Lists of ids -> (batch, tokens) ids padded right, and their attention mask."""
        lengths = [len(row) for row in rows]
        limit = self.max_length
        too_long = {row: length for row, length in enumerate(lengths) if limit and length > limit}
        if too_long:
            raise ValueError(
                f"these conversations are longer than max_length {limit} (row: tokens): {too_long}; raise "
                "model.max_length, shorten them or use fewer tiles"
            )
        device, longest = self.input_device, max(lengths)
        ids = torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)
        attention_mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], dtype=torch.long)
        return ids.to(device), attention_mask.to(device)

    def _place_features(self, tokenizer, texts: list[str], features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Texts with (tokens, hidden) pictures between them -> (1, tokens, hidden) and the image mask."""
        check_tokenizer(self.config, tokenizer)
        lengths = [len(feature) for feature in features]
        prompt = encode_prompt(
            tokenizer,
            texts,
            lengths,
            version=self.config.version,
            image_token_id=self.config.image_token_id,
        )
        check_length(len(prompt.ids), lengths, context_length(self.config))
        device = self.input_device
        im_mask = torch.tensor([prompt.is_image], dtype=torch.bool, device=device)
        return self._scatter(torch.tensor([prompt.ids], device=device), im_mask, features), im_mask

    def _scatter(self, ids: Tensor, im_mask: Tensor, features: list[Tensor]) -> Tensor:
        """Embeddings of (batch, tokens) ids, with those of pictures where the mask is true."""
        embeds = self.model.tok_embeddings(ids)
        if not features:
            return embeds
        placed = torch.cat([feature.to(embeds.device, embeds.dtype) for feature in features])
        return embeds.masked_scatter(im_mask.to(embeds.device)[..., None], placed)


def check_samples(samples: dict, texts: Sequence[str]) -> bool:
    """Whether a batch of the published trainers has pictures.

    Args:
        texts: the keys that must hold texts.

    Raises:
        ValueError: a key is missing, or `data_type` is unknown.
    """
    lacking = [name for name in (*texts, "data_type") if not samples.get(name)]
    if lacking:
        raise ValueError(f"samples lack {', '.join(lacking)}; they hold {', '.join(samples)}")
    kind = next(flatten(samples["data_type"]))
    if kind not in ("multi", "text"):
        raise ValueError(f"unknown data_type {kind!r}; choose 'multi' or 'text'")
    if kind == "multi" and samples.get("image") is None:
        raise ValueError("samples of data_type 'multi' lack 'image'; use 'text' if there are no pictures")
    return kind == "multi"


def find_answers(ids: list[int], opening: list[int], end: int) -> list[tuple[int, int]]:
    """Where the answers of a conversation are, as (first, one past the last) positions.

    Args:
        opening: how an assistant's turn begins, without the newline, which may be merged into one piece with
            what follows it.
        end: the mark after each turn. Everything after the last answer belongs to it.
    """
    starts = [index for index, token in enumerate(ids) if token == opening[0]]
    spans = []
    for start, following in pairwise([*starts, len(ids)]):
        first = start + len(opening) + 1
        if ids[start : start + len(opening)] != opening:
            continue
        is_last = following == len(ids)
        ended = not is_last and end in ids[first:following]
        spans.append((first, ids.index(end, first) + 1 if ended else following))
    return spans


def group_pictures(pictures, num_rows: int, image_nums: Sequence[int] | None = None) -> list[list]:
    """Pictures in any nesting of lists and stacks -> the pictures of each of `num_rows` conversations.

    Raises:
        ValueError: the number of entries doesn't match the number of conversations.
    """
    if image_nums is not None:
        flat = list(flatten(pictures))
        if len(image_nums) != num_rows or sum(image_nums) != len(flat):
            raise ValueError(
                f"image_nums {list(image_nums)} must cover {len(flat)} pictures in {num_rows} conversations"
            )
        remaining = iter(flat)
        return [[next(remaining) for _ in range(count)] for count in image_nums]
    if num_rows == 1:
        return [list(flatten(pictures))]
    while len(pictures) == 1 and isinstance(pictures[0], list | tuple | Tensor):
        pictures = pictures[0]
    if len(pictures) != num_rows:
        raise ValueError(f"there are {num_rows} conversations but pictures for {len(pictures)}")
    return [list(flatten(entry)) for entry in pictures]


def flatten(items) -> Iterable:
    """The items of nested lists, in order; stacks of pixels become one (1, 3, height, width) each."""
    if isinstance(items, Tensor):
        yield from items.reshape(-1, *items.shape[-3:]).split(1)
    elif isinstance(items, list | tuple):
        for item in items:
            yield from flatten(item)
    else:
        yield items


def _rows_of_tokens(embeds: Tensor) -> list[Tensor]:
    """(tokens, hidden) or (pictures, tokens, hidden) -> a list of (tokens, hidden)."""
    return list(embeds) if embeds.ndim == 3 else [embeds]


def _as_text(meta_instruction) -> str:
    """The system text; some clients pass `None`, or a tuple because of a stray comma."""
    while isinstance(meta_instruction, list | tuple) and len(meta_instruction) == 1:
        meta_instruction = meta_instruction[0]
    return str(meta_instruction) if meta_instruction else ""


class _StopOnIds(StoppingCriteria):
    """Stops each sequence that ends in one of several runs of ids."""

    def __init__(self, stops: list[list[int]]) -> None:
        self.stops = stops

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs) -> Tensor:
        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            if input_ids.shape[1] >= len(stop):
                tail = input_ids[:, -len(stop) :]
                stopped |= (tail == torch.tensor(stop, device=input_ids.device)).all(dim=1)
        return stopped


def get_stopping_criteria(stop_words_ids: Iterable) -> StoppingCriteriaList:
    """Criteria for `generate` that stop at any of these ids, or runs of ids."""
    stops = [torch.as_tensor(stop).flatten().tolist() for stop in stop_words_ids]
    if not all(stops):
        raise ValueError("a stop must have at least one id")
    return StoppingCriteriaList([_StopOnIds(stops)])


def set_random_seed(seed: int, set_cudnn: bool = False) -> None:
    """Seed Python, NumPy and torch on every device; `set_cudnn` also limits cuDNN to repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if set_cudnn:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
