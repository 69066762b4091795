"""The two stages of training: what is learnt from a batch, and how well it is known."""

import argparse
import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
from internlm_xcomposer2.configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from internlm_xcomposer2.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from .dense import DenseHead, Pages, dense_loss, glyph_accuracy, to_tile
from .fonts import find_fonts
from .questions import ABILITIES
from .samples import END_OF_TURN, Sample, draw_sample, draw_training_sample, segments

TOWER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 112,
    "patch_size": 14,
}
DENSE_WEIGHT = 0.5  # of the dense loss beside that of the answers
AUTO_MAP = {
    "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
    "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
}
CHOICE_WEIGHT = 4.0  # "picture 1" is five ids of which one is a choice, so its mean says little
MICRO_BATCH = 16  # tiles whose activations stay in a core's cache
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1) * 255
DEVIATION = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1) * 255
QUICK_GELU = 1.702


class FusedQuickGELUMLP(nn.Module):
    """The tower's MLP with its activation as one kernel: quick_gelu(x) = silu(1.702 x) / 1.702."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.fc1.weight * QUICK_GELU, self.fc1.bias * QUICK_GELU)
        return functional.linear(functional.silu(x), self.fc2.weight / QUICK_GELU, self.fc2.bias)


class MaskedPLoRA(nn.Module):
    """The decoder's PLoRA without gathering rows: the low-rank product everywhere, zero off the pictures."""

    def __init__(self, plora: nn.Module):
        super().__init__()
        self.linear, self.Plora_A, self.Plora_B = plora.linear, plora.Plora_A, plora.Plora_B

    def forward(self, x: Tensor, infer_mode: str = "base", image_rows: Tensor | None = None) -> Tensor:
        """(batch, tokens, in) -> (batch, tokens, out)"""
        flat = x.flatten(0, 1)
        mask = flat.new_zeros(len(flat), 1).index_fill_(0, image_rows, 1.0)
        low_rank = self.Plora_A(flat) * mask
        return torch.addmm(self.linear(flat), low_rank, self.Plora_B.weight.T).view(*x.shape[:2], -1)


def quicken(model: nn.Module) -> None:
    """Trades MLPs of the tower and low-rank linears for ones that compute the same in less time.

    The names of all parameters stay as they were.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == "mlp":
                parent.mlp = FusedQuickGELUMLP(child)
            elif hasattr(child, "Plora_A") and not isinstance(child, MaskedPLoRA):
                setattr(parent, name, MaskedPLoRA(child))


def normalise(tiles: np.ndarray | Tensor) -> Tensor:
    """uint8 (tiles, 112, 112, 3) array -> normalised (tiles, 3, 112, 112)"""
    return (torch.as_tensor(tiles).permute(0, 3, 1, 2).float() - MEAN) / DEVIATION


class DenseStage(nn.Module):
    """The tower alone, on tiles full of text."""

    def __init__(self, arguments: argparse.Namespace, rng: random.Random):
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**TOWER, hidden_act="quick_gelu"))
        quicken(self.tower)
        self.head = DenseHead(TOWER["hidden_size"])
        self.losses: dict[str, float] = {}
        self.pages = Pages(rng, find_fonts("train", arguments.fonts))
        for _ in range(10):
            self.pages.renew()
        unseen = Pages(random.Random("validation"), find_fonts("validation", arguments.fonts))
        for _ in range(24):
            unseen.renew()
        self.unseen = unseen.draw(256)

    def forward(self, tiles: Tensor) -> Tensor:
        """(tiles, 3, 112, 112) -> (tiles, 16, 16, classes)"""
        return self.head(self.tower(pixel_values=tiles).last_hidden_state[:, 1:])

    def backward(self, batch: int) -> float:
        """Adds the gradients of one batch; returns its loss."""
        if random.random() < 0.5:
            self.pages.renew()
        tiles, labels = self.pages.draw(batch)
        total = 0.0
        for start in range(0, batch, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            loss = dense_loss(self(normalise(tiles[part])), torch.from_numpy(labels[part]))
            loss = loss * len(tiles[part]) / batch
            loss.backward()
            total += loss.item()
        return total

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        tiles, labels = self.unseen
        logits = torch.cat([self(normalise(part)) for part in torch.from_numpy(tiles).split(32)])
        labels = torch.from_numpy(labels)
        return {"loss": dense_loss(logits, labels).item(), "score": glyph_accuracy(logits, labels)}


@dataclasses.dataclass
class Prompt:
    """A sample as ids: `answers` holds, for each turn, the positions whose next id has to be guessed."""

    ids: list[int]
    answers: list[range]
    num_pictures: int


class JointStage(nn.Module):
    """The whole model on questions about pictures, and the dense task beside it."""

    def __init__(self, arguments: argparse.Namespace, rng: random.Random):
        super().__init__()
        self.rng, self.families = rng, find_fonts("train", arguments.fonts)
        self.losses: dict[str, float] = {}
        self.pieces = SentencePieceProcessor(model_file=str(arguments.root / "tokenizer.model"))
        self.model = InternLMXComposer2ForCausalLM(make_config(self.pieces)).eval()  # no dropout at this size
        for name, parameter in self.model.named_parameters():
            if "Plora_B" in name:
                nn.init.zeros_(parameter)
        self.head = DenseHead(TOWER["hidden_size"])
        if arguments.tower:
            self.load_tower(arguments.tower)
        quicken(self.model)
        self.pages = Pages(rng, self.families)
        for _ in range(10):
            self.pages.renew()
        self.unseen = draw_unseen(arguments)

    def load_tower(self, path: Path) -> None:
        """Takes tower and dense head from a checkpoint of the dense stage."""
        state = torch.load(path, weights_only=True)["model"]
        tower = {
            key.removeprefix("tower."): value for key, value in state.items() if key.startswith("tower.")
        }
        self.model.vit.vision_tower.vision_model.load_state_dict(tower)
        self.head.load_state_dict(
            {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
        )

    def backward(self, batch: int) -> float:
        """Adds the gradients of `batch` samples and of a sixth as many pages; returns the answers' loss."""
        samples = [draw_training_sample(self.rng, self.families) for _ in range(batch)]
        num_answers = sum(len(sample.turns) for sample in samples)
        total = 0.0
        for group in self.groups(samples):
            features, prompts, tiles_loss = self.encode(group)
            answers, _ = self.answers_loss(features, prompts)
            weights = torch.tensor([answer_weight(turn) for sample in group for turn in sample.turns])
            loss = answers @ weights / num_answers + DENSE_WEIGHT * tiles_loss * len(group) / batch
            loss.backward()
            total += answers.sum().item() / num_answers
            self.note(group, answers.tolist())
        self.backward_pages(batch // 6)
        return total

    def note(self, group: list[Sample], losses: list[float]) -> None:
        """Keeps a moving average of each ability's loss, for the log."""
        names = [
            "which"
            if answer.startswith("picture")
            else f"{sample.ability} (about)"
            if len(sample.pictures) > 1
            else sample.ability
            for sample in group
            for _, answer in sample.turns
        ]
        for name, loss in zip(names, losses, strict=True):
            self.losses[name] = 0.998 * self.losses.get(name, loss) + 0.002 * loss

    def backward_pages(self, count: int) -> None:
        """Adds the gradients of the dense task on `count` tiles full of text."""
        if self.rng.random() < 0.3:
            self.pages.renew()
        tiles, labels = self.pages.draw(count)
        for start in range(0, count, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            logits = self.head(self.model.vit.vision_tower(normalise(tiles[part]))[:, 1:])
            loss = dense_loss(logits, torch.from_numpy(labels[part]))
            (DENSE_WEIGHT * loss * len(tiles[part]) / count).backward()

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        """Samples with equally many pictures, of like lengths, as many as fit a micro-batch."""
        groups = []
        for count in (1, 2):
            alike = [sample for sample in samples if len(sample.pictures) == count]
            alike.sort(key=lambda sample: sum(len(text or "") for text, _ in segments(sample)))
            size = MICRO_BATCH // count
            groups += [alike[start : start + size] for start in range(0, len(alike), size)]
        return groups

    def encode(self, samples: list[Sample]) -> tuple[Tensor, list[Prompt], Tensor]:
        """(pictures, tokens, hidden) embeddings of all pictures, the prompts, and the dense loss.

        A picture of one tile is its own global view, so the tower runs once for both.
        """
        tiles, labels = zip(
            *(to_tile(picture) for sample in samples for picture in sample.pictures), strict=True
        )
        features = self.model.vit.vision_tower(normalise(np.stack(tiles)))[:, 1:]
        loss = dense_loss(self.head(features), torch.from_numpy(np.stack(labels)))
        twice = features.repeat_interleave(2, dim=0)
        grids = [(1, 1)] * len(tiles)
        model = self.model
        assembled = model.vit.assemble(twice, grids, model.plora_glb_GN, model.plora_sub_GN)
        return model.vision_proj(torch.stack(assembled)), [self.prompt(sample) for sample in samples], loss

    def prompt(self, sample: Sample) -> Prompt:
        ids, answers = [self.pieces.bos_id()], []
        for text, is_answer in segments(sample):
            if text is None:
                ids += [self.model.config.image_token_id] * self.model.num_image_tokens(1, 1)
                continue
            piece = self.pieces.encode(text)
            if is_answer:
                answers.append(range(len(ids) - 1, len(ids) - 1 + len(piece)))
            ids += piece
        return Prompt(ids, answers, len(sample.pictures))

    def answers_loss(self, features: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """The mean loss of each answer, and whether every id of it is the likeliest; both (answers,)."""
        ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        mask = ids == self.model.config.image_token_id
        embeds = self.model.model.tok_embeddings(ids).masked_scatter(mask[..., None], features)
        # Padding stands at the end, where causal attention never looks.
        hidden = self.model.model(inputs_embeds=embeds, im_mask=mask, use_cache=False).last_hidden_state
        places = [(row, at, turn) for row, turn, span in spans(prompts) for at in span]
        rows, columns, turns = torch.tensor(places).T
        logits = self.model.output(hidden[rows, columns])
        targets = ids[rows, columns + 1]
        sizes = torch.bincount(turns).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        right = torch.zeros_like(sizes).index_add(0, turns, (logits.argmax(-1) == targets).float())
        return torch.zeros_like(sizes).index_add(0, turns, losses) / sizes, right == sizes

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Share of unseen answers that come out exactly, for each ability and length of text."""
        tally = {}
        for group in self.groups(self.unseen):
            features, prompts, _ = self.encode(group)
            for sample, right in zip(group, self.answers_loss(features, prompts)[1].tolist(), strict=True):
                names = [sample.ability]
                if sample.ability in ("number", "word", "count"):
                    answer = sample.turns[0][1]
                    names.append(f"{sample.ability} {answer if sample.ability == 'count' else len(answer)}")
                for name in names:
                    tally.setdefault(name, []).append(right)
        scores = {name: sum(rights) / len(rights) for name, rights in sorted(tally.items())}
        abilities = [scores[ability] for ability in ABILITIES]
        return {**scores, "score": (min(abilities) + sum(abilities) / len(abilities)) / 2}


def answer_weight(turn: tuple[str, str]) -> float:
    """What the mean loss of a turn's answer counts."""
    return CHOICE_WEIGHT if turn[1].startswith("picture") else 1.0


def spans(prompts: list[Prompt]) -> list[tuple[int, int, range]]:
    """(row, number of the answer in the batch, positions) of every answer."""
    answers = [(row, span) for row, prompt in enumerate(prompts) for span in prompt.answers]
    return [(row, turn, span) for turn, (row, span) in enumerate(answers)]


def draw_unseen(arguments: argparse.Namespace) -> list[Sample]:
    """The fixed samples by which a checkpoint is chosen: 100 of each ability, twice as many to read."""
    rng, families = random.Random("validation"), find_fonts("validation", arguments.fonts)
    return [
        draw_sample(ability, "validation", rng, families)
        for ability in ABILITIES
        for _ in range(200 if ability in ("number", "word") else 100)
    ]


def make_config(pieces: SentencePieceProcessor) -> InternLMXcomposer2Config:
    """The sizes of nano; ids are those of the tokenizer in the same folder."""
    return InternLMXcomposer2Config(
        version="2.5",
        vocab_size=pieces.vocab_size(),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=4096,
        max_length=4096,
        rope_theta=10_000,
        plora_rank=8,
        plora_alpha=8,
        task_adapters={},
        hd_num=1,
        image_token_id=pieces.piece_to_id("[UNUSED_TOKEN_1]"),
        end_token_id=pieces.piece_to_id(END_OF_TURN),
        vision_config=TOWER,
        attn_implementation="sdpa",
    )


def export(checkpoint: Path, root: Path, out: Path) -> None:
    """Writes `config.json`, `generation_config.json` and the weights, in float16, into `out`."""
    pieces = SentencePieceProcessor(model_file=str(root / "tokenizer.model"))
    state = torch.load(checkpoint, weights_only=True)["model"]
    model = InternLMXComposer2ForCausalLM(make_config(pieces))
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = [pieces.eos_id(), pieces.piece_to_id(END_OF_TURN)]
    model.generation_config.do_sample = False
    model.config.auto_map = AUTO_MAP
    model.half().save_pretrained(out)
