"""The stages of training: what is learnt from a batch, and how well it has been learnt."""

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from .asides import Asides, ids_of_names
from .dense import DenseHead, Pages, dense_loss, glyph_accuracy
from .fonts import find_fonts
from .model import TOWER, new_model, quicken
from .prompts import Prompt, Tiles, make_prompt, normalise, tiles_of
from .questions import ABILITIES, PLACES, WAYS
from .samples import LESSONS, Drawer, Sample

DENSE_WEIGHT = 0.5  # of the dense loss relative to that of the answers
ASIDE_WEIGHT = 1.0
CHOICE_WEIGHT = 4.0  # "picture 1" is five ids of which one is a choice, so its mean says little
CHOICES = (*(f"picture {place}" for place in (1, 2, 3)), *WAYS, *itertools.chain(*PLACES))
MICRO_BATCH = 16  # tiles whose activations stay in a core's cache
WEIGHTS = "model.safetensors"
PAGE_SHARE = 1 / 6  # of full tiles in addition to the samples of a batch
RENEWAL_SHARE = 0.3  # of the batches come with a fresh page
READING = ("number", "word", "code")  # validated on twice as many samples

Case = tuple[Sample, list[Tiles], Prompt]
LabelledTile = tuple[np.ndarray, np.ndarray]


@dataclass
class StageArguments:
    """What is trained, and from what."""

    stage: str = field(metadata={"help": "dense or joint", "choices": ("dense", "joint")})
    stage_before: Path | None = field(default=None, metadata={"help": "folder of the weights to start from"})
    root: Path = field(default=Path(), metadata={"help": "folder of the package and its tokenizer"})
    fonts: list[str] | None = field(
        default=None, metadata={"help": "folders of fonts; /usr/share/fonts by default"}
    )
    validation: int = field(default=100, metadata={"help": "samples of each ability to choose by"})
    muon_lr: float = field(default=0.02, metadata={"help": "learning rate of the matrices"})
    tower_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rates of tower and dense head, as a share of the others'"}
    )

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        self.stage_before = Path(self.stage_before) if self.stage_before else None


class DenseStage(nn.Module):
    """The tower alone, on tiles full of text."""

    def __init__(self, arguments: StageArguments, rng: random.Random):
        super().__init__()
        self.rng = rng
        self.tower = CLIPVisionModel(CLIPVisionConfig(**TOWER, hidden_act="quick_gelu"))
        quicken(self.tower)
        self.head = DenseHead(TOWER["hidden_size"])
        self.losses: dict[str, float] = {}
        self.pages = Pages(rng, find_fonts("train", arguments.fonts))
        families = find_fonts("validation", arguments.fonts)
        self.unseen = Pages(random.Random("validation"), families, first=24).draw(256)

    def forward(self, tiles: Tensor) -> Tensor:
        """(tiles, 3, 112, 112) -> (tiles, 16, 16, classes)"""
        return self.head(self.tower(pixel_values=tiles).last_hidden_state[:, 1:])

    def draw(self, progress: float) -> LabelledTile:
        """One training tile, of the same kind at any `progress`."""
        return self.pages.cut()

    def backward(self, batch: list[LabelledTile]) -> float:
        """Adds the gradients of one batch; returns its loss."""
        if self.rng.random() < RENEWAL_SHARE:
            self.pages.renew()
        tiles, labels = map(np.stack, zip(*batch, strict=True))
        total = 0.0
        for start in range(0, len(batch), MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            loss = dense_loss(self(normalise(tiles[part])), torch.from_numpy(labels[part]))
            loss = loss * len(tiles[part]) / len(batch)
            loss.backward()
            total += loss.item()
        return total

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        tiles, labels = self.unseen
        logits = torch.cat([self(normalise(part)) for part in torch.from_numpy(tiles).split(32)])
        labels = torch.from_numpy(labels)
        return {"loss": dense_loss(logits, labels).item(), "score": glyph_accuracy(logits, labels)}


class JointStage(nn.Module):
    """The whole model on all lessons, with the dense task alongside."""

    lessons: dict[str, tuple[float, float]] = LESSONS
    abilities: tuple[str, ...] = ABILITIES

    def __init__(self, arguments: StageArguments, rng: random.Random):
        super().__init__()
        self.rng, families = rng, find_fonts("train", arguments.fonts)
        self.drawer = Drawer("train", rng, families, self.lessons)
        self.losses: dict[str, float] = {}
        self.pieces = SentencePieceProcessor(model_file=str(arguments.root / "tokenizer.model"))
        self.model = new_model(self.pieces)
        self.head = DenseHead(TOWER["hidden_size"])
        self.asides = Asides(self.model.config.hidden_size, ids_of_names(self.pieces.piece_to_id))
        if arguments.stage_before:
            self.load(arguments.stage_before)
        quicken(self.model)
        self.pages = Pages(rng, families)
        self.unseen = [self.case(sample) for sample in self.draw_unseen(arguments)]

    def load(self, path: Path) -> None:
        """Loads tower and dense head from a checkpoint of the dense stage."""
        state = load_file(path / WEIGHTS)
        self.model.vit.vision_tower.vision_model.load_state_dict(part_of(state, "tower."))
        self.head.load_state_dict(part_of(state, "head."))

    def draw_unseen(self, arguments: StageArguments) -> list[Sample]:
        """The fixed samples for choosing a checkpoint: 100 of each ability, twice as many of reading."""
        families = find_fonts("validation", arguments.fonts)
        drawer = Drawer("validation", random.Random("validation"), families, self.lessons)
        return [
            drawer.sample(ability)
            for ability in self.abilities
            for _ in range(arguments.validation * (2 if ability in READING else 1))
        ]

    def case(self, sample: Sample) -> Case:
        tiles = tiles_of(sample)
        return sample, tiles, make_prompt(sample, tiles, self.pieces, self.model.config.image_token_id)

    def draw(self, progress: float) -> Case:
        """One training sample at `progress`, from 0 to 1."""
        return self.case(self.drawer.draw(progress))

    def backward(self, cases: list[Case]) -> float:
        """Adds the gradients of a batch and of some tiles full of text; returns the answers' loss."""
        num_answers = sum(len(sample.turns) for sample, _, _ in cases)
        total = 0.0
        for group in self.groups(cases):
            features, tiles_loss = self.encode([tiles for _, tiles, _ in group])
            answers, _, aside = self.answers_loss(features, [prompt for *_, prompt in group])
            weights = torch.tensor([answer_weight(turn) for sample, *_ in group for turn in sample.turns])
            aside = DENSE_WEIGHT * tiles_loss + ASIDE_WEIGHT * aside
            loss = answers @ weights / num_answers + aside * len(group) / len(cases)
            loss.backward()
            total += answers.sum().item() / num_answers
            self.note([sample for sample, _, _ in group], answers.tolist())
        self.backward_pages(max(1, int(len(cases) * PAGE_SHARE)))
        self.losses |= self.asides.losses
        return total

    def note(self, group: list[Sample], losses: list[float]) -> None:
        """Keeps moving averages for the log: each ability's loss, of its first question and of later ones."""
        names = [
            sample.ability + (" (more)" if number else "")
            for sample in group
            for number, _ in enumerate(sample.turns)
        ]
        for name, loss in zip(names, losses, strict=True):
            self.losses[name] = 0.99 * self.losses.get(name, loss) + 0.01 * loss

    def backward_pages(self, count: int) -> None:
        """Adds the gradients of the dense task on `count` tiles full of text."""
        if self.rng.random() < RENEWAL_SHARE:
            self.pages.renew()
        tiles, labels = self.pages.draw(count)
        for start in range(0, count, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            logits = self.head(self.model.vit.vision_tower(normalise(tiles[part]))[:, 1:])
            loss = dense_loss(logits, torch.from_numpy(labels[part]))
            (DENSE_WEIGHT * loss * len(tiles[part]) / count).backward()

    def groups(self, cases: list[Case]) -> list[list[Case]]:
        """Cases with the same number of pictures and similar lengths, as many as fit a micro-batch."""
        alike: dict[tuple[int, bool], list[Case]] = {}
        for case in cases:
            tiles = [len(each.pixels) for each in case[1]]
            alike.setdefault((len(tiles), max(tiles, default=0) > 1), []).append(case)
        groups = []
        for members in alike.values():
            members.sort(key=lambda case: len(case[2].ids))
            group, size = [], 0
            for case in members:
                count = sum(len(each.pixels) for each in case[1]) or 1
                if group and size + count > MICRO_BATCH:
                    groups.append(group)
                    group, size = [], 0
                group, size = [*group, case], size + count
            groups.append(group)
        return groups

    def encode(self, pictures: list[list[Tiles]]) -> tuple[Tensor | None, Tensor]:
        """(tokens of all pictures, hidden) embeddings, and the dense loss.

        A picture of one tile is its own global view, so the tower runs once for both.
        """
        tiles = [each for row in pictures for each in row]
        if not tiles:
            return None, torch.zeros(())
        features = self.model.vit.vision_tower(torch.cat([each.pixels for each in tiles]))[:, 1:]
        parts, local, places = [], [], []
        for each, part in zip(tiles, features.split([len(each.pixels) for each in tiles]), strict=True):
            parts.append(part.expand(2, -1, -1) if len(part) == 1 else part)
            local.append(part[-len(each.labels) :])
            places.append(torch.from_numpy(each.labels))
        loss = dense_loss(self.head(torch.cat(local)), torch.cat(places))
        model = self.model
        assembled = model.vit.assemble(
            torch.cat(parts), [each.grid for each in tiles], model.plora_glb_GN, model.plora_sub_GN
        )
        return model.vision_proj(torch.cat(assembled)), loss

    def answers_loss(self, features: Tensor | None, prompts: list[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of each answer, whether all its ids are the most likely, and the asides' loss."""
        ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        embeds, mask = self.model.model.tok_embeddings(ids), None
        if features is not None:
            mask = ids == self.model.config.image_token_id
            embeds = embeds.masked_scatter(mask[..., None], features)
        # Padding is at the end, where causal attention never looks.
        outputs = self.model.model(
            inputs_embeds=embeds, im_mask=mask, use_cache=False, output_hidden_states=True
        )
        places = [(row, at, turn) for row, turn, span in spans(prompts) for at in span]
        rows, columns, turns = torch.tensor(places).T
        logits = self.model.output(outputs.last_hidden_state[rows, columns])
        targets = ids[rows, columns + 1]
        sizes = torch.bincount(turns).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        right = torch.zeros_like(sizes).index_add(0, turns, (logits.argmax(-1) == targets).float())
        means = torch.zeros_like(sizes).index_add(0, turns, losses) / sizes
        aside = self.asides(self.model.model, outputs.hidden_states, mask, prompts)
        return means, right == sizes, aside

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Share of unseen answers that are exactly right, for each ability and length of text."""
        tally: dict[str, list[bool]] = {}
        for group in self.groups(self.unseen):
            features, _ = self.encode([tiles for _, tiles, _ in group])
            prompts = [prompt for *_, prompt in group]
            rights = iter(self.answers_loss(features, prompts)[1].tolist())
            for sample, *_ in group:
                for name, right in zip(parts_of(sample), rights, strict=False):
                    for each in name:
                        tally.setdefault(each, []).append(right)
        scores = {name: sum(rights) / len(rights) for name, rights in sorted(tally.items())}
        abilities = [scores[ability] for ability in self.abilities]
        return {**scores, "score": (min(abilities) + sum(abilities) / len(abilities)) / 2}


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def parts_of(sample: Sample) -> list[list[str]]:
    """For each turn that counts, the names it counts under: its ability, and its length or number."""
    answer = sample.turns[0][1]
    if sample.ability == "follow-up":
        return [["follow-up (1)"], ["follow-up"], ["follow-up"]][: len(sample.turns)]
    if sample.ability in READING:
        return [[sample.ability, f"{sample.ability} {len(answer)}"]]
    if sample.ability == "count":
        return [["count", f"count {answer}"]]
    if sample.ability in ("which", "more"):
        return [[sample.ability, f"{sample.ability} of {len(sample.pictures)}"]]
    return [[sample.ability]] + [[]] * (len(sample.turns) - 1)


def answer_weight(turn: tuple[str, str]) -> float:
    """How much the mean loss of a turn's answer counts."""
    return CHOICE_WEIGHT if turn[1] in CHOICES else 1.0


def spans(prompts: list[Prompt]) -> list[tuple[int, int, range]]:
    """(row, number of the answer in the batch, positions) of every answer."""
    answers = [(row, span) for row, prompt in enumerate(prompts) for span in prompt.answers]
    return [(row, turn, span) for turn, (row, span) in enumerate(answers)]
