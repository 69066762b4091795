"""Scores of conversations, as InternLM-XComposer2.5-Reward gives them (arXiv:2501.12368).

The published training code shows how a conversation is written: its turns, then `</s>[UNUSED_TOKEN_130]`.
It is inferred that the score is read at this last token, that BOS comes before everything, and that a
conversation is scored in the form it was trained in.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from .embedding_methods_internlm_xcomposer2 import check_samples, flatten, group_pictures
from .prompt_internlm_xcomposer2 import ChatPrompt, Conversation, batch_inputs, plan_conversation
from .tokenization_internlm_xcomposer2 import IMAGE_MARK

# Tokens, padding included, that `get_scores` computes at once unless told otherwise.
BATCH_TOKENS = 16384


def pairwise_loss(scores: Tensor) -> Tensor:
    """Alternating chosen and rejected scores -> the mean of -log sigmoid(chosen - rejected), in float32.

    Args:
        scores: (2 x pairs,) or (2 x pairs, 1).

    Raises:
        ValueError: the scores are not pairs.
    """
    if len(scores) % 2 or scores.numel() != len(scores):
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} are not pairs of one chosen and one rejected"
        )
    chosen, rejected = scores.float().view(-1, 2).unbind(1)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def batches_within(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in batches of similar length, each of at most `budget` tokens, padding included.

    A row longer than that gets its own batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def last_positions(length: int, mask: Tensor | None) -> Tensor | int:
    """The position of each row's last token, by a (batch, tokens) mask: false on padding, on either side."""
    if mask is None:
        return length - 1
    mask = mask[:, -length:].bool()
    return torch.where(mask, torch.arange(length, device=mask.device), -1).amax(dim=1)


class RewardMixin:
    """Scoring and the batches of the published trainer. Needs a model with a score head and its methods."""

    def get_score(
        self,
        conversation: Conversation,
        image: object = (),
        max_length: int | None = None,
        hd_num: int | None = None,
    ) -> float:
        """The score of the answer that a conversation ends with. Needs `self.tokenizer`.

        Args:
            conversation: dicts of `role` and `content`; earlier turns and a system message may come first.
            image: nothing, or as in `chat`: a picture or video, or a list of them with an `<ImageHere>` for
                each in the text; a single one may go unmarked. Or they are parts of the content.
            max_length: the most tokens of a conversation; nothing is cut.
            hd_num: how many local tiles a picture may be cut into, by default as in `chat`.

        Raises:
            FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, before any compute.
        """
        return self.get_scores([conversation], [image], max_length, hd_num)[0]

    @torch.no_grad()
    def get_scores(
        self,
        conversations: Sequence[Conversation],
        images: Sequence | None = None,
        max_length: int | None = None,
        hd_num: int | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[float]:
        """The score of each of several conversations, as in `get_score`.

        Identical conversations, pictures included, have the same score. Otherwise a score may differ from the
        one computed alone by rounding (some 1e-6 in float32), depending on what else is in the batch.

        Args:
            images: for each conversation, what `get_score` accepts as `image`; `None` if none has any.
            batch_tokens: how many tokens are computed at once, padding included. A longer row goes alone.

        Raises:
            FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, before any compute.
        """
        tokenizer = self._own_tokenizer()
        images = self._check_scored(conversations, images, batch_tokens)
        prompts = [
            plan_conversation(self.config, tokenizer, conversation, image, hd_num, max_length)
            for conversation, image in zip(conversations, images, strict=True)
        ]
        contents = [self._content_of(prompt) for prompt in prompts]
        first = {content: index for index, content in reversed(list(enumerate(contents)))}
        different = sorted(first.values())
        scores: dict[int, float] = {}
        for batch in batches_within([len(prompts[index].ids) for index in different], batch_tokens):
            indices = [different[position] for position in batch]
            inputs = batch_inputs(
                self.config,
                [prompts[index] for index in indices],
                pad_token_id=tokenizer.pad_token_id,
                font=self.font,
                device=self.input_device,
            )
            logits = self(**inputs).logits[:, 0].float().tolist()
            scores |= zip(indices, logits, strict=True)
        return [scores[first[content]] for content in contents]

    def _content_of(self, prompt: ChatPrompt) -> Hashable:
        """Equal for identical prompts, pictures included."""
        identities = [visual.identity(self.config, prompt.hd_num, self.font) for visual in prompt.visuals]
        return tuple(prompt.tokens(identities))

    def compare(
        self,
        conversation1: Conversation,
        image1: object,
        conversation2: Conversation,
        image2: object,
        max_length: int | None = None,
        hd_num: int | None = None,
    ) -> bool:
        """Whether the first of two conversations scores higher; false if they are the same.

        The errors are those of `get_scores`.
        """
        first, second = self.get_scores([conversation1, conversation2], [image1, image2], max_length, hd_num)
        return first > second

    def rank(
        self,
        conversations: Sequence[Conversation],
        images: Sequence | None = None,
        max_length: int | None = None,
        hd_num: int | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[int]:
        """The rank of each conversation, 0 for the highest score; the first of equal ones is better.

        The arguments and errors are those of `get_scores`.
        """
        scores = self.get_scores(conversations, images, max_length, hd_num, batch_tokens=batch_tokens)
        best_first = sorted(range(len(scores)), key=lambda index: -scores[index])
        places = {index: place for place, index in enumerate(best_first)}
        return [places[index] for index in range(len(scores))]

    def _check_scored(
        self, conversations: Sequence[Conversation], images: Sequence | None, batch_tokens: int
    ) -> Sequence:
        """The images of each conversation, after checking that there is one entry for each."""
        if self.num_labels != 1:
            raise ValueError(f"a reward is one score, but this model has {self.num_labels} labels")
        if not isinstance(conversations, list | tuple) or not conversations:
            raise TypeError(f"conversations must be a list of at least one, not {conversations!r:.80}")
        if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens must be an int of at least 1, not {batch_tokens!r}")
        images = [()] * len(conversations) if images is None else images
        if not isinstance(images, list | tuple):
            raise TypeError(f"images must be a list with an entry per conversation, not {images!r:.80}")
        if len(images) != len(conversations):
            raise ValueError(
                f"there are {len(conversations)} conversations but {len(images)} images; give an entry for "
                "each, [] for none"
            )
        return images

    def embed_pairs(self, samples: dict) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of the published trainer -> embeddings, attention mask and image mask, padded right.

        Args:
            samples: `chosen` and `rejected`, whole conversations as text, however deeply nested; `data_type`,
                `"multi"` or `"text"`, the same for all; for `"multi"` also `image`, the normalised pixels of
                (1, 3, height, width) of each pair, which both of its conversations share.

        Returns:
            (2 x pairs, tokens, hidden), alternately chosen and rejected, and two (2 x pairs, tokens) masks.

        Raises:
            ValueError: something is missing or doesn't fit, or a conversation is longer than
                `self.max_length`.
        """
        has_pictures = check_samples(samples, ("chosen", "rejected"))
        chosen, rejected = (list(flatten(samples[name])) for name in ("chosen", "rejected"))
        if len(chosen) != len(rejected):
            raise ValueError(
                f"there are {len(chosen)} chosen conversations but {len(rejected)} rejected ones"
            )
        if len(kinds := set(flatten(samples["data_type"]))) > 1:
            raise ValueError(f"one batch has pairs of data_type {' and '.join(sorted(kinds))}; separate them")
        pictures = group_pictures(samples["image"], len(chosen)) if has_pictures else [[] for _ in chosen]
        texts = [text for pair in zip(chosen, rejected, strict=True) for text in pair]
        rows = [row for row in pictures for _ in range(2)]
        marked = [
            IMAGE_MARK + text if len(row) == 1 and IMAGE_MARK not in text else text
            for text, row in zip(texts, rows, strict=True)
        ]
        embeds, attention_mask, _, im_mask = self.interleav_wrap(rows, marked)
        return embeds, attention_mask, im_mask
