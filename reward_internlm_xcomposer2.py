"""The reward model: a score for each conversation, as InternLM-XComposer2.5-Reward has it (arXiv:2501.12368).

The published training code tells how a conversation is written: its turns, then `</s>[UNUSED_TOKEN_130]`.
Inferred are that the score is read at this last token, that BOS stands before everything, and that a
conversation is scored in the form in which it is trained.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple, logging

from .answer_internlm_xcomposer2 import ChatPrompt
from .configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from .conversation_internlm_xcomposer2 import Medium, read_messages
from .embedding_methods_internlm_xcomposer2 import check_samples, flatten, group_pictures
from .ixc_utils import check_hd_num
from .modeling_internlm_xcomposer2 import InternLMXComposer2Backbone
from .prompt_internlm_xcomposer2 import (
    END_OF_TURN,
    IMAGE_MARK,
    check_length,
    encode_prompt,
    format_turn,
    place_images,
)
from .visual_internlm_xcomposer2 import Visual, as_visuals, default_hd_num, load_media, num_tokens_of_grid

logger = logging.get_logger(__name__)

REWARD_MARK = "[UNUSED_TOKEN_130]"
ROLES = ("system", "user", "assistant")

# Tokens, padding included, that `get_scores` computes at once unless told otherwise.
BATCH_TOKENS = 16384

Conversation = Sequence[Mapping]


# ---- conversations ----


def format_conversation(messages: Conversation) -> tuple[str, list[Medium]]:
    """A conversation that ends in the answer to be scored -> its turns as text, and media in its content.

    Args:
        messages: dicts of `role` and `content`, a text or a list of parts as in a chat template; a picture
            that is passed apart from the messages is `<ImageHere>` or `{"type": "image"}` there.

    Raises:
        TypeError, ValueError: no messages, an unknown role, or the last message is no answer.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise TypeError(f"a conversation is a list of at least one message, not {messages!r:.80}")
    rendered, media = read_messages(messages, need_sources=False)
    if unknown := [message["role"] for message in rendered if message["role"] not in ROLES]:
        raise ValueError(f"unknown role {unknown[0]!r}; it is one of {', '.join(ROLES)}")
    if rendered[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is of {rendered[-1]['role']!r}; it must be the answer that is scored, of "
            "'assistant'"
        )
    turns = [format_turn(message["role"], _text_of(message["content"])) for message in rendered]
    return "".join(turns), media


def _text_of(content: str | list[dict]) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] if part["type"] == "text" else IMAGE_MARK for part in parts).strip()


def reward_mark(tokenizer) -> str:
    """The piece that ends a conversation behind `</s>`, at which its score is read.

    It is `[UNUSED_TOKEN_130]`, and the end of a turn in a vocabulary that has no such piece, such as nano's.
    """
    known = tokenizer.convert_tokens_to_ids(REWARD_MARK) not in (None, tokenizer.unk_token_id)
    return REWARD_MARK if known else END_OF_TURN


def plan_conversation(
    messages: Conversation,
    image: object,
    tokenizer,
    config: InternLMXcomposer2Config,
    max_length: int | None = None,
    hd_num: int | None = None,
) -> ChatPrompt:
    """A conversation as ids with the places of its pictures, which are read but not cut.

    Args:
        image: as in `get_score`.
        max_length: an error for a longer conversation; the decoder's context by default.
        hd_num: how many local tiles a picture may be cut into, by default as in `chat`.

    Raises:
        FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, or too long.
    """
    if hd_num is not None:
        check_hd_num(hd_num)
    text, media = format_conversation(messages)
    visuals = _visuals_of(media, image, config)
    hd_num = default_hd_num(config, len(visuals)) if hd_num is None else hd_num
    lengths = [num_tokens_of_grid(config, *visual.grid(config, hd_num)) for visual in visuals]
    text += f"{tokenizer.eos_token}{reward_mark(tokenizer)}"
    texts = place_images(text, len(visuals), version=config.version)
    # BOS stands once, as in the training of every version.
    prompt = encode_prompt(tokenizer, texts, lengths, version="2.5", image_token_id=config.image_token_id)
    num_tokens = len(prompt.ids)

    def count(budget: int) -> int:
        grids = [visual.grid(config, budget) for visual in visuals]
        return num_tokens - sum(lengths) + sum(num_tokens_of_grid(config, *grid) for grid in grids)

    check_length(num_tokens, lengths, config, hd_num, count)
    if max_length is not None and num_tokens > max_length:
        raise ValueError(
            f"the conversation has {num_tokens} tokens, {sum(lengths)} of them for {len(visuals)} pictures, "
            f"but max_length is {max_length}; raise it, lower hd_num or shorten the conversation"
        )
    return ChatPrompt(prompt.ids, prompt.is_image, tuple(visuals), tuple(lengths), hd_num)


def _visuals_of(media: list[Medium], image: object, config: InternLMXcomposer2Config) -> list[Visual]:
    """The pictures of a conversation, which are in its messages or apart from them, not both."""
    apart = (
        [] if image is None or (isinstance(image, list | tuple) and not image) else as_visuals(image, config)
    )
    if media and apart:
        raise ValueError(
            f"the messages hold {len(media)} pictures and {len(apart)} more were given; pass them in one way"
        )
    return load_media(media, config) or apart


# ---- scores ----


def pairwise_loss(scores: Tensor) -> Tensor:
    """Scores of chosen and rejected answers in turn -> the mean of -log sigmoid(chosen - rejected), float32.

    Args:
        scores: (2 x pairs,) or (2 x pairs, 1).

    Raises:
        ValueError: the scores are no pairs.
    """
    if len(scores) % 2 or scores.numel() != len(scores):
        raise ValueError(
            f"scores of the shape {tuple(scores.shape)} are no pairs of one chosen, one rejected"
        )
    chosen, rejected = scores.float().view(-1, 2).unbind(1)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def batches_within(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in batches of about one length, each of at most `budget` tokens, padding included.

    A row that is longer alone goes alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def last_positions(length: int, mask: Tensor | None) -> Tensor | int:
    """Where each row's last token stands, by a (batch, tokens) mask that is false on padding, on any side."""
    if mask is None:
        return length - 1
    mask = mask[:, -length:].bool()
    return torch.where(mask, torch.arange(length, device=mask.device), -1).amax(dim=1)


class InternLMXComposer2ForSequenceClassification(InternLMXComposer2Backbone):
    """The model with a score in place of the output head.

    Trained on pairs of answers (`samples`, or `pairwise_loss` of the logits) it is a reward model. A chat
    checkpoint loads too, with a new head. `config.num_labels` is one, unless a configuration says otherwise.
    """

    _keys_to_ignore_on_load_missing = [
        *InternLMXComposer2Backbone._keys_to_ignore_on_load_missing,
        r"^score\.weight$",
    ]
    _keys_to_ignore_on_load_unexpected = [
        *InternLMXComposer2Backbone._keys_to_ignore_on_load_unexpected,
        r"^output\.weight$",
    ]

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type[InternLMXComposer2Backbone]:
        if "score.weight" not in shapes:
            logger.warning(
                "this checkpoint has no score head: score.weight is new, and its scores mean nothing until "
                "the model is trained"
            )
        return cls

    # ---- scoring ----

    def get_score(
        self,
        conversation: Conversation,
        image: object = (),
        max_length: int | None = None,
        hd_num: int | None = None,
    ) -> float:
        """The score of the answer that a conversation ends in. Needs `self.tokenizer`.

        Args:
            conversation: dicts of `role` and `content`; earlier turns and a system message may go before.
            image: nothing, or what `chat` takes: a picture or video, or a list of them with an `<ImageHere>`
                for each in the text; a single one may go unmarked. Or they are parts of the content.
            max_length: tokens of a conversation at most; nothing is cut.
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
        """The score of each of several conversations, as `get_score` has it.

        Args:
            images: for each conversation what `get_score` takes as `image`; `None` where none has any.
            batch_tokens: how many tokens are computed at once, padding included. A longer row goes alone.

        Raises:
            FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, before any compute.
        """
        tokenizer = self._own_tokenizer()
        images = self._check_scored(conversations, images, batch_tokens)
        prompts = [
            plan_conversation(conversation, image, tokenizer, self.config, max_length, hd_num)
            for conversation, image in zip(conversations, images, strict=True)
        ]
        scores = [0.0] * len(prompts)
        for batch in batches_within([len(prompt.ids) for prompt in prompts], batch_tokens):
            inputs = self._inputs_of([prompts[index] for index in batch], tokenizer.pad_token_id)
            logits = self(**inputs).logits[:, 0].float().tolist()
            for index, score in zip(batch, logits, strict=True):
                scores[index] = score
        return scores

    def compare(
        self,
        conversation1: Conversation,
        image1: object,
        conversation2: Conversation,
        image2: object,
        max_length: int | None = None,
        hd_num: int | None = None,
    ) -> bool:
        """Whether the first of two conversations scores higher. The errors are those of `get_scores`."""
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
        """The place of each conversation, 0 for the highest score; of equal ones the first is better.

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
                f"there are {len(conversations)} conversations but {len(images)} images; give an entry to "
                "each, [] for none"
            )
        return images

    # ---- running ----

    def embed_pairs(self, samples: dict) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of the published trainer -> embeddings, attention mask and image mask, padded right.

        Args:
            samples: `chosen` and `rejected`, whole conversations as text, however deep in lists; `data_type`,
                `"multi"` or `"text"`, the same for all; for `"multi"` also `image`, the normalised pixels of
                (1, 3, height, width) of each pair, which both of its conversations show.

        Returns:
            (2 x pairs, tokens, hidden), chosen and rejected in turn, and two masks of (2 x pairs, tokens).

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
            raise ValueError(f"one batch has pairs of data_type {' and '.join(sorted(kinds))}; part them")
        pictures = group_pictures(samples["image"], len(chosen)) if has_pictures else [[] for _ in chosen]
        texts = [text for pair in zip(chosen, rejected, strict=True) for text in pair]
        rows = [row for row in pictures for _ in range(2)]
        marked = [
            IMAGE_MARK + text if len(row) == 1 and IMAGE_MARK not in text else text
            for text, row in zip(texts, rows, strict=True)
        ]
        embeds, attention_mask, _, im_mask = self.interleav_wrap(rows, marked)
        return embeds, attention_mask, im_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = False,
        samples: dict | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Conversations -> scores, read at the last token of each.

        Args:
            input_ids: (batch, tokens), each picture a run of `config.image_token_id`.
            attention_mask: (batch, tokens), false or 0 on padding, left or right. Without it, what follows
                the last token of `input_ids` that is no padding counts as padding.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`, with `im_mask` where pictures are.
            pixel_values, image_grid_hw: as in the chat model.
            labels: (batch,), for transformers' own losses, by `config.problem_type` and `config.num_labels`.
            samples: a batch of the published trainer, instead of everything above, as `embed_pairs` takes it.

        Returns:
            `logits` (batch, labels). With `samples` they are (2 x pairs, 1), chosen and rejected in turn, and
            `loss` is their `pairwise_loss`.

        Raises:
            ValueError: pictures and conversations don't match.
        """
        if samples is not None:
            inputs_embeds, attention_mask, im_mask = self.embed_pairs(samples)
            input_ids = pixel_values = None
        outputs = self.run_decoder(
            input_ids,
            inputs_embeds,
            pixel_values,
            image_grid_hw,
            im_mask,
            past_key_values,
            for_loss=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        mask = attention_mask
        if mask is None and input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        last = last_positions(hidden.shape[1], None if mask is None else mask.to(hidden.device))
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = pairwise_loss(logits) if samples is not None else None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
