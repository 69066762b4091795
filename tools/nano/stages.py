"""The two stages of training: what is learnt from a batch, and how well it is known."""

import argparse
import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
from internlm_xcomposer2.auto_internlm_xcomposer2 import CONFIG_AUTO_MAP
from internlm_xcomposer2.configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from internlm_xcomposer2.modeling_internlm2 import apply_rotary
from internlm_xcomposer2.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from .dense import UNKNOWN, DenseHead, Pages, dense_loss, glyph_accuracy, to_tile
from .fonts import find_fonts
from .pictures import Picture
from .questions import ABILITIES, COLOURS, SHAPES
from .samples import END_OF_TURN, IMAGE_MARK, Sample, draw_sample, draw_training_sample, segments

TOWER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 112,
    "patch_size": 14,
}
DENSE_WEIGHT = 0.5  # of the dense loss beside that of the answers
ORDER_LAYER, ASKED_LAYER = 2, 3  # after how many of the decoder's layers a picture's tokens have to know
POINTER_LAYERS = (2, 3)
PAIR_WEIGHT = 1.0  # of what the tokens of two pictures have to know
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

    def forward(
        self, x: Tensor, infer_mode: str = "base", image_rows: Tensor | slice | None = None
    ) -> Tensor:
        """(batch, tokens, in) -> (batch, tokens, out)"""
        flat = x.flatten(0, 1)
        mask = flat.new_zeros(len(flat), 1)
        mask[image_rows] = 1.0
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
    things: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # colour, shape; by picture
    choice: tuple[int, int] | None = None  # where "1" or "2" is to be said of two pictures; which, from 0
    asked: int = UNKNOWN  # which of two pictures is the right one, from 0, where the question stands first


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
        self.order_head = nn.Linear(self.model.config.hidden_size, 2)
        self.asked_head = nn.Linear(self.model.config.hidden_size, 2)
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
            answers, _, pair_loss = self.answers_loss(features, prompts)
            weights = torch.tensor([answer_weight(turn) for sample in group for turn in sample.turns])
            aside = DENSE_WEIGHT * tiles_loss + PAIR_WEIGHT * pair_loss
            loss = answers @ weights / num_answers + aside * len(group) / batch
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
        question, answer = sample.turns[0]
        knows = sample.ability == "which" and question.index("?") < question.index(IMAGE_MARK)
        asked = int(answer.removeprefix("picture ")) - 1 if knows else UNKNOWN
        things = [only_thing(picture) for picture in sample.pictures]
        choice = None
        for (_, answer), span in zip(sample.turns, answers, strict=True):
            if answer.startswith("picture "):
                choice = (span.stop - 2, int(answer[-1]) - 1)  # after the digit only the turn's end is said
        return Prompt(ids, answers, len(sample.pictures), things, choice, asked)

    def answers_loss(self, features: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of each answer, whether every id of it is the likeliest, and `pair_loss`."""
        ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        mask = ids == self.model.config.image_token_id
        embeds = self.model.model.tok_embeddings(ids).masked_scatter(mask[..., None], features)
        # Padding stands at the end, where causal attention never looks.
        outputs = self.model.model(
            inputs_embeds=embeds, im_mask=mask, use_cache=False, output_hidden_states=True
        )
        hidden = outputs.last_hidden_state
        places = [(row, at, turn) for row, turn, span in spans(prompts) for at in span]
        rows, columns, turns = torch.tensor(places).T
        logits = self.model.output(hidden[rows, columns])
        targets = ids[rows, columns + 1]
        sizes = torch.bincount(turns).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        right = torch.zeros_like(sizes).index_add(0, turns, (logits.argmax(-1) == targets).float())
        means = torch.zeros_like(sizes).index_add(0, turns, losses) / sizes
        pair_loss = self.pair_loss(outputs.hidden_states, mask, prompts)
        return means, right == sizes, pair_loss + self.pointer_loss(outputs.hidden_states, mask, prompts)

    def pointer_loss(self, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]) -> Tensor:
        """How little one head of each upper layer looks at the right picture where its number is to be said.

        To look there and to copy the number pay off only together, so that neither begins: this begins it.
        """
        choices = [(row, *prompt.choice) for row, prompt in enumerate(prompts) if prompt.choice]
        if not choices:
            return mask.new_zeros((), dtype=torch.float32)
        rows, positions, places = torch.tensor(choices).T
        positional = self.model.model.rotary_emb(torch.arange(mask.shape[1])[None])
        loss = 0.0
        for index in POINTER_LAYERS:
            layer = self.model.model.layers[index]
            attention = layer.attention
            image_rows = mask.flatten().nonzero()[:, 0]
            packed = attention.wqkv(layer.attention_norm(hidden[index]), image_rows=image_rows)
            packed = packed.unflatten(-1, (-1, attention.num_key_value_groups + 2, attention.head_dim))
            query, key = (apply_rotary(packed[:, None, :, 0, part], *positional)[:, 0] for part in (0, -2))
            keys = key[mask].view(len(prompts), 2, -1, attention.head_dim)[rows]
            scores = torch.einsum("nd,nptd->npt", query[rows, positions], keys) * attention.scaling
            loss = loss + functional.cross_entropy(scores.logsumexp(-1), places)
        self.losses["pointer"] = loss.item()
        return loss

    def pair_loss(self, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]) -> Tensor:
        """How badly the tokens of two pictures know which of them they belong to, and if it was asked for.

        Among a hundred tokens the one that numbers a picture, or names the thing asked for, is too faint a
        cue to be found from the answer alone.
        """
        if prompts[0].num_pictures < 2:
            return mask.new_zeros((), dtype=torch.float32)
        loss = self.names_loss(
            hidden[ORDER_LAYER][mask].view(2 * len(prompts), -1, hidden[0].shape[-1]), prompts
        )
        places = torch.arange(2)[None, :, None]
        right = torch.tensor([prompt.asked for prompt in prompts])[:, None, None]
        asked = torch.where(right == UNKNOWN, UNKNOWN, (places == right).long())
        for name, head, layer, targets in (
            ("order", self.order_head, ORDER_LAYER, places),
            ("asked", self.asked_head, ASKED_LAYER, asked),
        ):
            logits = head(hidden[layer][mask]).view(len(prompts), 2, -1, 2)
            targets = targets.expand(logits.shape[:3]).flatten()
            part = functional.cross_entropy(logits.flatten(0, 2), targets, reduction="sum")
            part = part / max(1, int((targets != UNKNOWN).sum()))
            self.losses[name] = part.item()
            loss = loss + part
        return loss

    def names_loss(self, hidden: Tensor, prompts: list[Prompt]) -> Tensor:
        """How far the mean token of each picture is from the embeddings of its colour's and its shape's name.

        A picture is then matched with the words for what it shows by a mere inner product.
        """
        means = self.model.model.layers[ORDER_LAYER].attention_norm(hidden.mean(1))
        loss = 0.0
        for field, names in enumerate((COLOURS, SHAPES)):
            rows = [self.pieces.piece_to_id(f"\u2581{name}") for name in names]
            logits = means @ self.model.model.tok_embeddings.weight[rows].T
            targets = torch.tensor([thing[field] for prompt in prompts for thing in prompt.things])
            part = functional.cross_entropy(logits, targets, reduction="sum")
            loss = loss + part / max(1, int((targets != UNKNOWN).sum()))
        self.losses["names"] = loss.item()
        return loss

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Share of unseen answers that come out exactly, for each ability and length of text."""
        tally = {}
        for group in self.groups(self.unseen):
            features, prompts, _ = self.encode(group)
            for sample, right in zip(group, self.answers_loss(features, prompts)[1].tolist(), strict=True):
                names = [sample.ability]  # and its parts
                if sample.ability in ("number", "word", "count"):
                    answer = sample.turns[0][1]
                    names.append(f"{sample.ability} {answer if sample.ability == 'count' else len(answer)}")
                for name in names:
                    tally.setdefault(name, []).append(right)
        scores = {name: sum(rights) / len(rights) for name, rights in sorted(tally.items())}
        abilities = [scores[ability] for ability in ABILITIES]
        return {**scores, "score": (min(abilities) + sum(abilities) / len(abilities)) / 2}


def only_thing(picture: Picture) -> tuple[int, int]:
    """Colour and shape of a picture's one object as indices, or unknown."""
    marks = [mark for mark in picture.marks if mark.name in SHAPES]
    if len(marks) != 1:
        return UNKNOWN, UNKNOWN
    return COLOURS.index(marks[0].colour), SHAPES.index(marks[0].name)


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
    model.config.auto_map = dict(CONFIG_AUTO_MAP)
    model.half().save_pretrained(out)
