"""Rows -> what `forward` accepts: ids, labels and pictures, planned in integers before any picture is cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from internlm_xcomposer2.configuration_internlm_xcomposer2 import FIRST_GENERATION, VERSIONS
from internlm_xcomposer2.embedding_methods_internlm_xcomposer2 import find_answers
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import (
    PreparedImage,
    Visual,
    batch_images,
    grid_of_frames,
    preprocess_image,
    preprocess_video,
    video_visual,
)
from internlm_xcomposer2.inputs_internlm_xcomposer2 import IGNORED
from internlm_xcomposer2.ixc_utils import check_hd_num, plan_tiles
from internlm_xcomposer2.media_internlm_xcomposer2 import frame_sizes, image_size, is_video, load_image
from internlm_xcomposer2.prompt_internlm_xcomposer2 import (
    META_INSTRUCTION,
    encode_prompt,
    format_turn,
    place_images,
)
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import (
    BEGIN_OF_TURN,
    END_OF_TURN,
    IMAGE_MARK,
    VIDEO_MARK,
    end_mark,
)
from torch import Tensor
from torch.utils.data import Dataset

from .first_generation import FIRST_MARKUP, encode_first
from .rows import Media, Row

PROMPTS = ("inference", "training")
TOO_LONG = ("error", "cut")
TRAINING_TILES = "centred"  # how the published training of 2.5 places a picture on its tiles

PICTURES = ("pixel_values", "image_grid_hw")  # what an item with pictures has besides ids and labels

Grid = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A row in ids. Its pictures are read but not cut; if only their headers were read, there are none.

    Attributes:
        labels: the ids of answers, -100 everywhere else.
        image_lengths: image tokens of each picture and video.
        num_cut: tokens of answers beyond `max_length`, which are left out.
    """

    ids: list[int]
    labels: list[int]
    image_lengths: tuple[int, ...] = ()
    visuals: tuple[Visual, ...] = ()
    hd_num: int = 1
    num_cut: int = 0


class RowEncoder:
    """How rows become inputs of one checkpoint.

    Args:
        processor: the checkpoint's, as `AutoProcessor` loads it.
        max_length: how many tokens a row may have, `None` for any number.
        layout: `"inference"` lays prompts and pictures out as `chat` does (in version 1.0, as the chat
            template does); `"training"` as the published trainers did: BOS once, no system text unless the
            row has it, pictures of 2.5 centred on their tiles and enlarged by half at most.
        hd_num: how many local tiles a picture may be cut into; by default as many as in `chat`.
        too_long: what happens to a row beyond `max_length`: `"error"`, or `"cut"` at its end as long as all
            pictures and some of its answers remain.
        pixel_dtype: of `pixel_values`. The tower casts them to its own dtype, so that one loses nothing.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    def __init__(
        self,
        processor,
        max_length: int | None = None,
        layout: str = "inference",
        hd_num: int | None = None,
        too_long: str = "error",
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value, known in (("layout", layout, PROMPTS), ("too_long", too_long, TOO_LONG)):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, not {max_length}")
        self.processor = processor
        self.max_length = max_length
        self.layout = layout
        self.hd_num = None if hd_num is None else check_hd_num(hd_num)
        self.too_long = too_long
        self.pixel_dtype = pixel_dtype
        tokenizer = processor.tokenizer
        self.opening = tokenizer(f"{BEGIN_OF_TURN}assistant", add_special_tokens=False)["input_ids"]
        self.end = tokenizer.convert_tokens_to_ids(end_mark(self.version))
        turns = FIRST_MARKUP if self.version == FIRST_GENERATION else (BEGIN_OF_TURN, END_OF_TURN)
        pieces = [*turns, processor.image_piece, VIDEO_MARK]
        self.markup = tuple(dict.fromkeys([*pieces, *tokenizer.all_special_tokens]))

    @property
    def version(self) -> str:
        """The checkpoint's version."""
        return self.processor.version

    # ---- rows ----

    def plan(self, row: Row, *, decode: bool = True) -> Plan:
        """A row in ids, checked.

        Args:
            decode: whether pictures and videos are fully read; else only their headers are.

        Raises:
            RowFault: with everything that is wrong with the row.
        """
        faults = [*row.faults, *self._text_faults(row)]
        hd_num = self.hd_num or self.processor.image_processor.default_hd_num(len(row.media))
        visuals, grids = [], []
        for source in row.media:
            try:
                visual, grid = self._look_at(source, hd_num, decode)
                visuals.append(visual)
                grids.append(grid)
            except (OSError, TypeError, ValueError) as error:
                faults.append(str(error))
        if faults:
            raise row.fault(faults)
        lengths = tuple(self.processor.image_processor.num_image_tokens(*grid) for grid in grids)
        ids, labels, is_image = self._encode(row, lengths)
        plan = Plan(ids, labels, lengths, tuple(visuals) if decode else (), hd_num)
        return self._fit(row, plan, is_image)

    def encode(self, row: Row) -> dict[str, Tensor]:
        """A row as tensors.

        Returns:
            `input_ids` and `labels` (tokens,); with pictures also `pixel_values` (tiles, 3, side, side) and
            `image_grid_hw` (pictures, 2).

        Raises:
            RowFault: as in `plan`.
        """
        plan = self.plan(row)
        item = {"input_ids": torch.tensor(plan.ids), "labels": torch.tensor(plan.labels)}
        if plan.visuals:
            prepared = [self._prepare(visual, plan.hd_num) for visual in plan.visuals]
            pixels, item["image_grid_hw"] = batch_images(prepared)
            item["pixel_values"] = pixels.to(self.pixel_dtype)
        return item

    # ---- text ----

    def prompt(self, row: Row) -> str:
        """The whole conversation with its markup, without the BOS that the tokenizer adds."""
        turns = list(row.turns)
        system = turns.pop(0).text if turns[0].role == "system" else self._default_system()
        head = format_turn("system", system) if system else ""
        # `chat` sends two BOS before a text-only prompt of the older versions.
        twice = self._as_chat_of_old() and not row.media
        bos, eos = self.processor.tokenizer.bos_token, self.processor.tokenizer.eos_token
        body = "".join(format_turn(turn.role, turn.text) for turn in turns)
        return f"{bos if twice else ''}{head}{body}{eos}"

    def _as_chat_of_old(self) -> bool:
        return self.layout == "inference" and self.version != "2.5"

    def _default_system(self) -> str:
        return META_INSTRUCTION if self._as_chat_of_old() else ""

    def _encode(self, row: Row, lengths: Sequence[int]) -> tuple[list[int], list[int], list[bool]]:
        """Ids, labels, and which ids stand for image tokens."""
        if self.version == FIRST_GENERATION:
            return encode_first(self.processor, row.turns, lengths, self.layout)
        prompt = encode_prompt(
            self.processor.tokenizer,
            place_images(self.prompt(row), len(lengths), version=self.version),
            lengths,
            version=self.version if self._as_chat_of_old() else "2.5",
            image_token_id=self.processor.image_token_id,
        )
        labels = [IGNORED] * len(prompt.ids)
        for first, last in find_answers(prompt.ids, self.opening, self.end):
            labels[first:last] = [
                IGNORED if image else token
                for token, image in zip(prompt.ids[first:last], prompt.is_image[first:last], strict=True)
            ]
        return prompt.ids, labels, prompt.is_image

    def _text_faults(self, row: Row) -> list[str]:
        """Markup inside turns, and marks that don't match the media."""
        faults = [
            f"turn {index} contains the markup {piece}, which is not allowed in texts"
            for index, turn in enumerate(row.turns)
            for piece in self.markup
            if piece in turn.text
        ]
        num_marks = sum(turn.text.count(IMAGE_MARK) for turn in row.turns)
        at_front = self.version in (FIRST_GENERATION, "2.5") and num_marks == 0 and len(row.media) == 1
        if num_marks != len(row.media) and not at_front and row.turns:
            faults.append(
                f"the turns have {num_marks} {IMAGE_MARK} marks but the row has {len(row.media)} pictures or "
                "videos; put one mark where each belongs"
            )
        return faults

    def _fit(self, row: Row, plan: Plan, is_image: list[bool]) -> Plan:
        """The plan cut to `max_length` if needed, or the row's fault raised."""
        limit, length = self.max_length, len(plan.ids)
        if limit is None or length <= limit:
            return plan
        num_answer = sum(label != IGNORED for label in plan.labels)
        num_cut = sum(label != IGNORED for label in plan.labels[limit:])
        beyond = (
            f"the row has {length} tokens, {sum(plan.image_lengths)} of them for {len(plan.image_lengths)} "
            f"pictures, but max_length is {limit}; {num_cut} of the {num_answer} tokens of its answers"
            f"{' and part of a picture' if any(is_image[limit:]) else ''} are beyond it"
        )
        if self.too_long == "error" or any(is_image[limit:]) or num_cut == num_answer:
            raise row.fault([f"{beyond}; raise max_length, lower hd_num or shorten the row"])
        ids, labels = plan.ids[:limit], plan.labels[:limit]
        return Plan(ids, labels, plan.image_lengths, plan.visuals, plan.hd_num, num_cut)

    # ---- pictures ----

    def _look_at(self, source: Media, hd_num: int, decode: bool) -> tuple[Visual | None, Grid]:
        """A picture or video, not cut yet, if it is needed, and the rows and columns of its local tiles."""
        config = self.processor.image_processor
        if isinstance(source, tuple) or is_video(source):
            frames = list(source) if isinstance(source, tuple) else source
            if decode or self.version != "2.5":
                visual = video_visual(frames, config)
                return visual, visual.grid(config, hd_num)
            return None, grid_of_frames(config, frame_sizes(frames))
        if not decode:
            return None, self._grid(*image_size(source), hd_num)
        image = load_image(source)
        return Visual(image=image), self._grid(image.height, image.width, hd_num)

    @property
    def tiles(self) -> str:
        """How pictures are cut: the name of a rule in `ixc_utils.TILE_RULES`, or the square."""
        trained = self.layout == "training" and self.version == "2.5"
        return TRAINING_TILES if trained else VERSIONS[self.version].layout

    def _grid(self, height: int, width: int, hd_num: int) -> Grid:
        """(rows, cols) of local tiles of a picture of this size in pixels."""
        config = self.processor.image_processor
        if not config.is_tiled:
            return 1, 1
        return plan_tiles(height, width, tile_size=config.img_size, hd_num=hd_num, layout=self.tiles).grid

    def _prepare(self, visual: Visual, hd_num: int) -> PreparedImage:
        """Cut and normalise, following the plan that was counted."""
        side = self.processor.image_processor.img_size
        if visual.frames:
            return preprocess_video(visual.frames, tile_size=side)
        return preprocess_image(visual.image, layout=self.tiles, tile_size=side, hd_num=hd_num)


class ConversationDataset(Dataset):
    """Rows as items of `RowEncoder.encode`, each read when it is requested. Works in worker processes.

    Args:
        rows: as `read_rows` and `read_mixture` return them.
        processor, max_length, layout, hd_num, too_long, pixel_dtype: as in `RowEncoder`.

    Raises:
        ValueError: there are no rows, or an argument is invalid.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor,
        max_length: int | None = None,
        layout: str = "inference",
        hd_num: int | None = None,
        too_long: str = "error",
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not rows:
            raise ValueError("there are no rows to train on")
        self.rows = list(rows)
        self.encoder = RowEncoder(processor, max_length, layout, hd_num, too_long, pixel_dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` (tokens,), and with pictures `pixel_values` and `image_grid_hw`.

        Raises:
            RowFault: the row is bad; the message names its file, its number and everything wrong with it.
        """
        return self.encoder.encode(self.rows[index])

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row, counted from its text and the headers of its pictures, without decoding them.

        Raises:
            RowFault: at the first bad row.
        """
        rows = {id(row): row for row in self.rows}  # those of a mixture repeat
        known = {key: len(self.encoder.plan(row, decode=False).ids) for key, row in rows.items()}
        return [known[id(row)] for row in self.rows]


class Collator:
    """Items -> a batch, padded right. Packed items are joined into one sequence instead, without padding.

    Args:
        pad_token_id: what `input_ids` are padded with.
        pad_to_multiple_of: a number that the padded length is a multiple of.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (items, tokens), and `pixel_values` (tiles, 3, side, side)
        and `image_grid_hw` (pictures, 2) if any item has them. Packed items give (1, all tokens) with
        `position_ids` instead of `attention_mask`."""
        if "position_ids" in items[0]:
            joined = join_items(items)
            return {name: value if name in PICTURES else value[None] for name, value in joined.items()}
        longest = max(len(item["input_ids"]) for item in items)
        longest += -longest % self.pad_to_multiple_of
        batch = {
            "input_ids": _pad([item["input_ids"] for item in items], longest, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(item["input_ids"]) for item in items], longest, 0),
            "labels": _pad([item["labels"] for item in items], longest, IGNORED),
        }
        return batch | _pictures_of(items)


def _pad(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    """(tokens,) each -> (rows, length), padded right."""
    padded = torch.full((len(rows), length), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _pictures_of(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The pictures of all items in order; nothing if there are none."""
    with_pictures = [item for item in items if "pixel_values" in item]
    if not with_pictures:
        return {}
    return {name: torch.cat([item[name] for item in with_pictures]) for name in PICTURES}


def join_items(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items joined into one, with `position_ids` (tokens,) that restart with each."""
    positions = [item.get("position_ids", torch.arange(len(item["input_ids"]))) for item in items]
    joined = {name: torch.cat([item[name] for item in items]) for name in ("input_ids", "labels")}
    return {**joined, "position_ids": torch.cat(positions), **_pictures_of(items)}
