"""What the decoder must know about its pictures' tokens: loss terms in addition to that of the answers.

To find the picture that was asked for, the decoder must match words with pictures and copy a number, and
neither pays off without the other; to say where an object is, it must know where each token is, which is
useless until it looks at the right ones. These terms get it started. Several pictures have one tile each.
"""

import functools

import torch
from internlm_xcomposer2.ixc_utils import num_image_tokens
from internlm_xcomposer2.modeling_internlm2 import apply_rotary
from torch import Tensor, nn
from torch.nn import functional

from .dense import UNKNOWN
from .prompts import TOKENS_ALONG_TILE, Prompt
from .questions import COLOURS, MOST_OBJECTS, SHAPES

ORDER_LAYER, ASKED_LAYER = 2, 3  # after how many of the decoder's layers a picture's tokens must know
POINTER_LAYERS = (2, 3)
READING_LAYERS = (2, 3)
# (key head, which of the query heads that share it)
POINTER_HEAD, READING_HEAD, COPYING_HEAD, MATCHING_HEAD = (0, 0), (0, 1), (1, 0), (1, 1)
MOST_PICTURES = 3
MOST_TILES = 6  # along a picture
PLACE_WEIGHT = 0.3
READING_WEIGHT = 0.3


class Asides(nn.Module):
    """Heads that are thrown away after training, and the losses that train them."""

    def __init__(self, width: int, name_ids: tuple[list[int], list[int]]):
        """`name_ids`: the ids of the names of colours and shapes."""
        super().__init__()
        self.name_ids = name_ids
        self.order_head = nn.Linear(width, MOST_PICTURES)
        self.asked_head = nn.Linear(width, 2)
        self.count_head = nn.Linear(width, MOST_OBJECTS + 1)
        self.place_head = nn.Linear(width, 2 * (TOKENS_ALONG_TILE + MOST_TILES))
        self.losses: dict[str, float] = {}

    def forward(
        self, decoder: nn.Module, hidden: tuple[Tensor, ...], mask: Tensor | None, prompts: list[Prompt]
    ) -> Tensor:
        """The sum of all terms for prompts with equally many pictures, which are where `mask` is true."""
        if mask is None:
            copy = self.reading_loss(decoder, hidden, None, prompts)
            self.losses["copy"] = copy.item()
            return READING_WEIGHT * copy
        place = self.place_loss(hidden, mask, prompts)
        self.losses["place"] = place.item()
        if prompts[0].num_pictures < 2:
            read = self.reading_loss(decoder, hidden, mask, prompts)
            self.losses["read"] = read.item()
            return PLACE_WEIGHT * place + READING_WEIGHT * read
        terms = {
            "names": self.names_loss(decoder, hidden, mask, prompts),
            "order": self.order_loss(hidden, mask, prompts),
            "asked": self.asked_loss(hidden, mask, prompts),
            "matches": self.matches_loss(decoder, hidden, mask, prompts),
            "counts": self.counts_loss(hidden, mask, prompts),
            "pointer": self.pointer_loss(decoder, hidden, mask, prompts),
        }
        self.losses |= {name: term.item() for name, term in terms.items()}
        return PLACE_WEIGHT * place + sum(terms.values())

    def place_loss(self, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]) -> Tensor:
        """How badly the tokens of local tiles know the row and column of their tile, and theirs within it."""
        grids = [grid for prompt in prompts for grid in prompt.grids]
        places = torch.cat([token_places(*grid) for grid in grids])
        logits = self.place_head(hidden[ORDER_LAYER][mask])
        parts = logits.split((MOST_TILES, MOST_TILES, TOKENS_ALONG_TILE, TOKENS_ALONG_TILE), dim=-1)
        return sum(known_loss(part, target) for part, target in zip(parts, places.T, strict=True))

    def order_loss(self, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]) -> Tensor:
        """How badly the tokens of each picture know which one they belong to.

        Among a hundred tokens, the one that numbers a picture is too faint a cue to be found from the answer.
        """
        logits = self.order_head(by_picture(hidden[ORDER_LAYER], mask, prompts))
        places = torch.arange(logits.shape[1])[None, :, None].expand(logits.shape[:3])
        return known_loss(logits, places)

    def asked_loss(self, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]) -> Tensor:
        """How badly they know whether their picture was asked for, if the question comes first."""
        logits = self.asked_head(by_picture(hidden[ASKED_LAYER], mask, prompts))
        places = torch.arange(logits.shape[1])[None, :, None]
        right = torch.tensor([prompt.asked for prompt in prompts])[:, None, None]
        asked = torch.where(right == UNKNOWN, UNKNOWN, (places == right).long())
        return known_loss(logits, asked.expand(logits.shape[:3]))

    def counts_loss(self, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]) -> Tensor:
        """How badly the mean token of each picture knows how many objects it shows."""
        means = by_picture(hidden[ORDER_LAYER], mask, prompts).mean(2)
        return known_loss(self.count_head(means), torch.tensor([prompt.counts for prompt in prompts]))

    def names_loss(
        self, decoder: nn.Module, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]
    ) -> Tensor:
        """How far the mean token of each picture is from the embeddings of its colour's and its shape's name.

        A mere inner product then matches a picture with the words for what it shows.
        """
        means = by_picture(hidden[ORDER_LAYER], mask, prompts).mean(2)
        means = decoder.layers[ORDER_LAYER].attention_norm(means)
        things = torch.tensor([prompt.things for prompt in prompts])  # (prompts, pictures, 2)
        loss = 0.0
        for field, ids in enumerate(self.name_ids):
            loss = loss + known_loss(means @ decoder.tok_embeddings.weight[ids].T, things[..., field])
        return loss

    def matches_loss(
        self, decoder: nn.Module, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]
    ) -> Tensor:
        """How little one head of each picture's tokens sees of the question's words for what it shows.

        If the question has no words for it, how much it sees of the words for something else.
        """
        query, key = one_head(decoder, ORDER_LAYER, MATCHING_HEAD, hidden[ORDER_LAYER], mask)
        terms = []
        for row, prompt in enumerate(prompts):
            if prompt.asked == UNKNOWN:
                continue
            tokens = mask[row].nonzero()
            names = {
                each: (field, at) for field, ids in enumerate(self.name_ids) for at, each in enumerate(ids)
            }
            words = {at: names[each] for at, each in enumerate(prompt.ids[: tokens[0]]) if each in names}
            scores = query[row, tokens[:, 0]] @ key[row].T
            scores = scores.masked_fill(torch.arange(scores.shape[1]) > tokens, -torch.inf)
            seen = scores.softmax(-1)[:, list(words)].unflatten(0, (prompt.num_pictures, -1)).mean(1)
            for shares, thing in zip(seen, prompt.things, strict=True):
                right = torch.tensor([thing[field] == name for field, name in words.values()])
                share = shares[right].sum() if right.any() else 1 - shares.sum()
                terms.append(-share.clamp_min(1e-6).log())
        return torch.stack(terms).mean() if terms else hidden[0].new_zeros(())

    def pointer_loss(
        self, decoder: nn.Module, hidden: tuple[Tensor, ...], mask: Tensor, prompts: list[Prompt]
    ) -> Tensor:
        """How little one head of each upper layer looks at the right picture when its number is said."""
        choices = [(row, *prompt.choice) for row, prompt in enumerate(prompts) if prompt.choice]
        if not choices:
            return mask.new_zeros((), dtype=torch.float32)
        rows, positions, places = torch.tensor(choices).T
        loss = 0.0
        for index in POINTER_LAYERS:
            query, key = one_head(decoder, index, POINTER_HEAD, hidden[index], mask)
            keys = by_picture(key, mask, prompts)[rows]
            scores = torch.einsum("nd,nptd->npt", query[rows, positions], keys)
            loss = loss + functional.cross_entropy(scores.logsumexp(-1), places)
        return loss

    def reading_loss(
        self, decoder: nn.Module, hidden: tuple[Tensor, ...], mask: Tensor | None, prompts: list[Prompt]
    ) -> Tensor:
        """How little of what a head sees of the picture is where the next character to be said is.

        Without it, strings are read by a blurred look at all of them, and similar neighbours are mixed up. If
        there is no picture, a head of the last layer looks at the text that is to be repeated.
        """
        reads = [(row, at, tokens) for row, prompt in enumerate(prompts) for at, tokens in prompt.reads]
        if not reads:
            return hidden[0].new_zeros(())
        rows, positions, tokens = zip(*reads, strict=True)
        rows, positions = torch.tensor(rows), torch.tensor(positions)
        right = torch.zeros(len(reads), hidden[0].shape[1], dtype=torch.bool)
        for row, each in zip(right, tokens, strict=True):
            row[each] = True
        if mask is None:
            visible = torch.arange(right.shape[1]) <= positions[:, None]
            layers, head = (len(decoder.layers) - 1,), COPYING_HEAD
        else:
            visible, layers, head = mask[rows], READING_LAYERS, READING_HEAD
        loss = 0.0
        for index in layers:
            query, key = one_head(decoder, index, head, hidden[index], mask)
            scores = torch.einsum("nd,ntd->nt", query[rows, positions], key[rows])
            seen = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
            loss = loss + (seen - scores.masked_fill(~right, -torch.inf).logsumexp(-1)).mean()
        return loss


@functools.cache
def token_places(rows: int, cols: int) -> Tensor:
    """(tokens of a picture, 4): row and column of the tile, and in it; unknown except in local tiles."""
    side = TOKENS_ALONG_TILE
    down = torch.arange(rows * side)[:, None].expand(-1, cols * side + 1)
    right = torch.arange(cols * side + 1)[None].expand(rows * side, -1)
    local = torch.stack([down // side, right // side, down % side, right % side], dim=-1)
    local = torch.where((right < cols * side)[..., None], local, UNKNOWN).flatten(0, 1)
    before = torch.full((num_image_tokens(rows, cols, side) - len(local), 4), UNKNOWN)
    return torch.cat([before, local])


def one_head(
    decoder: nn.Module, index: int, head: tuple[int, int], hidden: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(rows, tokens, head_dim): scaled queries and keys of a head of the layer `index`."""
    layer = decoder.layers[index]
    attention, image_rows = layer.attention, None if mask is None else mask.flatten().nonzero()[:, 0]
    packed = attention.wqkv(layer.attention_norm(hidden), image_rows=image_rows)
    packed = packed.unflatten(-1, (-1, attention.num_key_value_groups + 2, attention.head_dim))
    positional = decoder.rotary_emb(torch.arange(hidden.shape[1])[None])
    group, part = head
    query, key = (apply_rotary(packed[:, None, :, group, at], *positional)[:, 0] for at in (part, -2))
    return query * attention.scaling, key


def by_picture(hidden: Tensor, mask: Tensor, prompts: list[Prompt]) -> Tensor:
    """(prompts, tokens, width) -> (prompts, pictures, tokens of a picture, width)"""
    return hidden[mask].view(len(prompts), prompts[0].num_pictures, -1, hidden.shape[-1])


def known_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of (..., classes) over the targets that are known; zero if none is."""
    total = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return total / max(1, int((targets != UNKNOWN).sum()))


def ids_of_names(piece_to_id) -> tuple[list[int], list[int]]:
    """The ids of the names of colours and shapes, as they occur inside a sentence."""
    return tuple([piece_to_id(f"\u2581{name}") for name in names] for names in (COLOURS, SHAPES))
