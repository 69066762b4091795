"""Which tensors may a caller pass? What is wrong with one is said before anything is computed.

All checks read shapes and types; those that read values say so, and are left out of compiled code.
"""

from collections.abc import Sequence
from numbers import Number

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from .cache_internlm_xcomposer2 import GrowingCache

IGNORED = -100  # the label of a token that no loss is computed for


def check_tensor(name: str, value: object) -> None:
    """Raise `TypeError` for anything but a tensor, `ValueError` for one on the meta device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.is_meta:
        raise ValueError(f"{name} has no values, because it is on the meta device; make it on 'cpu' or a GPU")


def check_integers(name: str, value: object) -> None:
    """Raise `TypeError` or `ValueError` for anything but a tensor of integers."""
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, not {value.dtype}")


def check_floats(name: str, value: object) -> None:
    """Raise `TypeError` or `ValueError` for anything but a tensor of real floats."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floats, not {value.dtype}")


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise `TypeError` or `ValueError` for anything but (batch, tokens) ids of the vocabulary.

    Reads values.
    """
    check_integers("input_ids", input_ids)
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (batch, tokens), not of the shape {tuple(input_ids.shape)}")
    # What `generate` chose itself needs no look, for which a GPU would wait.
    if torch.compiler.is_compiling() or (input_ids.shape[1] == 1 and input_ids.device.type != "cpu"):
        return
    lowest, highest = input_ids.min().item(), input_ids.max().item()
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"input_ids contain {wrong}, but the vocabulary has the ids 0 to {vocab_size - 1}; load the "
            "tokenizer that comes with the checkpoint"
        )


def check_embeds(inputs_embeds: Tensor, hidden_size: int) -> None:
    """Raise `TypeError` or `ValueError` for anything but (batch, tokens, hidden) embeddings."""
    check_floats("inputs_embeds", inputs_embeds)
    shape = tuple(inputs_embeds.shape)
    if len(shape) != 3 or not inputs_embeds.numel() or shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds must be (batch, tokens, {hidden_size}), not of the shape {shape}")


def check_finite(pixel_values: Tensor) -> None:
    """Raise `ValueError` for pixels that aren't numbers. Reads values."""
    if not torch.compiler.is_compiling() and not pixel_values.sum(dtype=torch.float32).isfinite():
        raise ValueError("pixel_values contain NaN or infinity; prepare pictures with the processor")


def check_image_mask(im_mask: Tensor | None, tokens: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless the mask covers exactly the ids or embeddings `tokens`."""
    if im_mask is None:
        return
    check_tensor("im_mask", im_mask)
    if tuple(im_mask.shape) != tuple(tokens.shape[:2]):
        raise ValueError(
            f"im_mask has the shape {tuple(im_mask.shape)} but the tokens {tuple(tokens.shape[:2])}; "
            "it needs one value per token"
        )


def check_attention_mask(attention_mask: object, tokens: Tensor, cache: Cache | None) -> None:
    """Raise `TypeError` or `ValueError` unless a mask of rows covers what is cached and the tokens.

    Masks of more dimensions, or of the library's other kinds, are the caller's; caches of a fixed size have
    longer ones.
    """
    if attention_mask is None or not isinstance(attention_mask, Tensor | Sequence | Number | np.ndarray):
        return
    check_tensor("attention_mask", attention_mask)
    if attention_mask.ndim > 2:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise TypeError(f"a {attention_mask.ndim}-d attention_mask must be bool or float, not integers")
        return
    if cache is not None and not isinstance(cache, GrowingCache):
        return
    cached = 0 if cache is None else cache.get_seq_length()
    wanted = (tokens.shape[0], cached + tokens.shape[1])
    if tuple(attention_mask.shape) != wanted:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)} but should have {wanted}: (batch, "
            f"tokens), {cached} of them cached"
        )


def check_positions(position_ids: Tensor | None, tokens: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless there is a position for each token, of one row or of all."""
    if position_ids is None:
        return
    check_integers("position_ids", position_ids)
    rows, length = tokens.shape[:2]
    if tuple(position_ids.shape) not in ((1, length), (rows, length)):
        raise ValueError(
            f"position_ids have the shape {tuple(position_ids.shape)} but the tokens {(rows, length)}; they "
            "need one value per token"
        )


def check_labels(labels: Tensor | None, tokens: Tensor | None, vocab_size: int) -> None:
    """Raise `TypeError` or `ValueError` unless each token has an id of the vocabulary, or -100.

    Reads values.
    """
    if labels is None or not isinstance(tokens, Tensor):
        return
    check_integers("labels", labels)
    if tuple(labels.shape) != tuple(tokens.shape[:2]):
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)} but the tokens {tuple(tokens.shape[:2])}; they "
            f"need one value per token, {IGNORED} where there is no loss"
        )
    if torch.compiler.is_compiling() or not labels.numel():
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"labels contain {wrong[0].item()}, but the vocabulary has the ids 0 to {vocab_size - 1}, and "
            f"{IGNORED} means no loss"
        )
