"""GPTQ and AWQ files made according to the formats, independently of the code that reads them."""

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(integers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """(rows, cols) -> (rows, cols * bits / 32) int32; `order`: which column each place of a word holds."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    words = np.zeros((integers.shape[0], integers.shape[1] // per_word), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place, column in enumerate(order):
            value = integers[:, word * per_word + column].astype(np.uint32)
            words[:, word] |= value << np.uint32(bits * place)
    return words.view(np.int32)


def groups_of(inputs: int, group_size: int, act_order: bool = False, seed: int = 0) -> np.ndarray:
    """The group of each input: consecutive, or shuffled as activation order leaves them."""
    size = inputs if group_size == -1 else group_size
    groups = np.arange(inputs) // size
    return np.random.RandomState(seed).permutation(groups) if act_order else groups


def quantise(weight: np.ndarray, groups: np.ndarray, bits: int, symmetric: bool = False):
    """A float weight (out, in) -> integers (in, out), zeros and float16 scales (groups, out)."""
    largest, num_groups = 2**bits - 1, groups.max() + 1
    scales = np.zeros((num_groups, len(weight)), dtype=np.float16)
    zeros = np.zeros((num_groups, len(weight)), dtype=np.int64)
    for group in range(num_groups):
        block = weight[:, groups == group]
        low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[group] = np.maximum((high - low) / largest, 1e-4).astype(np.float16)
        zeros[group] = (largest + 1) // 2 if symmetric else np.round(-low / scales[group])
    zeros = np.clip(zeros, 1, largest)  # GPTQ's first format has no place for a zero of 0
    integers = np.round(weight.T / scales[groups].astype(np.float64)) + zeros[groups]
    return np.clip(integers, 0, largest).astype(np.int64), zeros, scales


def dequantise(
    integers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray
) -> torch.Tensor:
    """What the file stands for, (out, in) in float32."""
    weight = (integers - zeros[groups]) * scales[groups].astype(np.float64)
    return torch.from_numpy(weight.T.astype(np.float32).copy())


def gptq_parts(integers, zeros, scales, groups, bits, *, second_format=False, with_index=True) -> dict:
    """The tensors of one linear in GPTQ's format."""
    stored = zeros if second_format else zeros - 1
    parts = {
        "qweight": pack_words(integers.T, bits).T.copy(),
        "qzeros": pack_words(stored, bits),
        "scales": scales,
        **({"g_idx": groups.astype(np.int32)} if with_index else {}),
    }
    return {name: torch.from_numpy(value) for name, value in parts.items()}


def awq_parts(integers, zeros, scales) -> dict:
    """The tensors of one linear in AWQ's gemm format."""
    parts = {
        "qweight": pack_words(integers, 4, AWQ_ORDER),
        "qzeros": pack_words(zeros, 4, AWQ_ORDER),
        "scales": scales,
    }
    return {name: torch.from_numpy(value) for name, value in parts.items()}


def pack_checkpoint(
    state_dict: dict,
    method: str,
    *,
    group_size: int = 16,
    suffix: str = ".linear",
    act_order: bool = False,
    second_format: bool = False,
    symmetric: tuple[str, ...] = ("w2.weight",),
) -> tuple[dict, dict]:
    """Pack the plain linears of every decoder layer, of either generation, in 4 bits.

    Args:
        symmetric: endings of the names of weights whose zero points are in the middle.

    Returns:
        The packed checkpoint, and the plain one whose linears hold what the packed ones stand for.
    """
    packed, plain = dict(state_dict), dict(state_dict)
    endings = ("wqkv.weight", "wo.weight", "w1.weight", "w2.weight", "w3.weight", "_proj.weight")
    layers = ("model.layers.", "internlm_model.model.layers.")
    for name in [name for name in state_dict if name.startswith(layers) and name.endswith(endings)]:
        weight = packed.pop(name).float().numpy()
        groups = groups_of(weight.shape[1], group_size, act_order)
        numbers = quantise(weight, groups, 4, symmetric=name.endswith(symmetric))
        if method == "gptq":
            parts = gptq_parts(*numbers, groups, 4, second_format=second_format)
        else:
            parts = awq_parts(*numbers)
        linear = name.removesuffix(".weight") + suffix
        packed |= {f"{linear}.{part}": value for part, value in parts.items()}
        plain[name] = dequantise(*numbers, groups)
    return packed, plain
