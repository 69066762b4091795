"""Write a checkpoint as GGUF, for llama.cpp.

The decoder is a `llama` of llama.cpp, Partial LoRA and the task adapters are LoRA files for it, and the
vision half stays as it is. Tensors are read, written and quantised one at a time.
"""

import copy
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..checkpoint_internlm_xcomposer2 import read_tensor
from ..configuration_internlm_xcomposer import published_name as first_published_name
from ..configuration_internlm_xcomposer2 import (
    ADAPTERS_OF_MODE,
    FIRST_GENERATION,
    is_reward,
    published_name,
)
from ..llamacpp.files import DECODER, EXPORT_KEY, PLORA, RECORD, VISION, mode_file
from ..llamacpp.library import file_name, load_gguf, load_library
from ..modeling_internlm2 import unpack_heads
from ..quantization_internlm_xcomposer2 import PackedLinear
from ..tokenization_internlm_xcomposer2 import tokenizer_class
from .adopt import check_loadable, check_target, put_in_place, staging_beside
from .examine import Findings, examine
from .quantize import folded, low_rank_of
from .small_files import describe_checkpoint, json_bytes

DEFAULT_TYPE = "q4_k_m"
ADAPTER_TYPES = {"f32": "F32", "f16": "F16", "bf16": "F16"}  # of the low-rank weights, else Q8_0

_PLAIN_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NOT_FOR_LLAMA = ("quantize_config.json", "quant_config.json")
_VISION = re.compile(
    r"(?:vit|vision_proj|visual_encoder|ln_vision|Qformer|internlm_proj)\.(?!.*\.position_ids$)"
    r"|plora_|query_tokens|flag_image_"
)
_MARKUP = re.compile(r"\[UNUSED_TOKEN_\d+\]|<TOKENS_UNUSED_\d+>")
# Our linears with low-rank weights -> their names in llama.cpp, which has three in place of `wqkv`.
_LINEARS = {
    "attention.wqkv": "",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
# The same for the first generation, whose attention has biases.
_FIRST_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FIRST_BIAS = re.compile(r"^internlm_model\..*\.self_attn\.._proj\.bias$")
_UNQUANTISED = "unquantised.gguf"
_QUANTISE_BYTES = 1 << 29  # what llama.cpp's quantiser holds at once
_SPARE = 1.05  # more than a type's own bytes: some types keep parts of a model in more bits
_STEP = re.compile(r"\[\s*\d+/\s*\d+\]")  # how llama.cpp's quantiser begins with a tensor


@dataclass(frozen=True)
class Export:
    """What `export` did."""

    target: Path
    findings: Findings
    type: str
    written: tuple[str, ...]  # nothing if all was there
    fallbacks: tuple[str, ...]  # tensors that the type can't hold, with what they have instead
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a GGUF file: its name, shape and type there, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]


def export(
    source: str | os.PathLike,
    target: str | os.PathLike,
    type: str = DEFAULT_TYPE,
    *,
    tokenizer: str | os.PathLike | None = None,
    num_attention_heads: int | None = None,
) -> Export:
    """Write a directory that `internlm_xcomposer2.from_gguf` loads.

    It is built beside `target` and renamed when it is complete. `source` is never changed. A second call
    finds everything in place, or writes it again if `source` or the type has changed.

    Args:
        source: the directory of a checkpoint: published, adopted, fine-tuned, or packed by GPTQ or AWQ.
        target: the new directory, or one that an earlier call wrote.
        type: of the decoder's weights: any name that llama.cpp's quantiser knows, such as `q8_0`.
        tokenizer: a `tokenizer.model` if `source` has none.
        num_attention_heads: if `config.json` doesn't say; the weights don't determine it.

    Raises:
        FileNotFoundError: no directory, no weights, or not all shards.
        FileExistsError: `target` holds other files, or another run is working on it.
        ImportError: gguf or llama-cpp-python is missing.
        ValueError: the type is unknown, `source` isn't a checkpoint of the family or is damaged, or llama.cpp
            has no such model.
        OSError: the disk is too small or can't be written to.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    type = type.lower()
    _number_of_type(type)  # raises if there is none
    previous = check_target(source, target, RECORD, "exported")
    findings = examine(source, num_attention_heads)
    check_loadable(findings)
    _check_runnable(findings)
    texts, notes = describe_checkpoint(_without_packing(findings), Path(tokenizer) if tokenizer else None)
    texts = {name: content for name, content in texts.items() if name not in _NOT_FOR_LLAMA}
    notes = (*findings.notes, *notes)
    inputs = _state_of(findings, texts)
    if _is_in_place(target, previous, type, inputs):
        return Export(target, findings, type, (), tuple(previous["fallbacks"]), notes)
    _check_space(findings, type, target)
    name = uuid.uuid4().hex
    with staging_beside(target) as staging:
        fallbacks = _write(findings, staging, type, name, texts)
        written = sorted(path.name for path in staging.iterdir())
        record = {"source": os.path.realpath(source), "export": name, "type": type, "inputs": inputs}
        record |= {"files": {file: (staging / file).stat().st_size for file in written}}
        record |= {"fallbacks": fallbacks}
        (staging / RECORD).write_bytes(json_bytes(record))
        stale = [file for file in previous.get("files", {}) if file not in written]
        put_in_place(staging, target, [file for file in stale if (target / file).exists()], RECORD)
    return Export(target, findings, type, (*written, RECORD), tuple(fallbacks), notes)


# ---- checks ----


def known_types() -> dict[str, int]:
    """The types of llama.cpp's quantiser by name, such as `q4_k_m`, with its numbers for them."""
    api = load_library().api
    names = [name for name in vars(api) if name.startswith(("LLAMA_FTYPE_ALL_", "LLAMA_FTYPE_MOSTLY_"))]
    return {name.split("_", 3)[3].lower(): getattr(api, name) for name in names}


def _number_of_type(type: str) -> int:
    types = known_types()
    if type not in types:
        raise ValueError(f"unknown type {type!r}; llama.cpp's quantiser knows {', '.join(types)}")
    return types[type]


def _check_runnable(findings: Findings) -> None:
    """Raise `ValueError` for a checkpoint that a `llama` of llama.cpp doesn't compute."""
    text, scaling = findings.config.text_config, findings.config.text_config.rope_parameters["rope_type"]
    if is_reward(findings.headers):
        raise ValueError(f"{findings.source} is a reward model; llama.cpp runs chat models only")
    if scaling not in ("default", "dynamic", "linear"):
        raise ValueError(f"rope_scaling of type {scaling!r} can't be exported, only dynamic and linear")
    if text.hidden_act != "silu":
        raise ValueError(f"hidden_act {text.hidden_act!r} can't be exported, only 'silu'")
    if getattr(text, "bias", False):
        raise ValueError("a decoder whose linears have biases can't be exported; published ones have none")


def _without_packing(findings: Findings) -> Findings:
    """The same, with a configuration of plain weights, because packed and low-rank ones become such."""
    config = copy.deepcopy(findings.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.version == FIRST_GENERATION:
        config.internlm_lora = None
    return replace(findings, config=config)


def _state_of(findings: Findings, texts: dict[str, bytes]) -> dict:
    """What an export depends on, to see whether it has changed; the package's own modules don't count."""
    stats = {path.name: path.stat() for path in findings.paths}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    data = {name: content for name, content in sorted(texts.items()) if not name.endswith(".py")}
    return {
        "weights": files,
        "texts": {name: hashlib.sha256(content).hexdigest() for name, content in data.items()},
    }


def _is_in_place(target: Path, previous: dict, type: str, inputs: dict) -> bool:
    """Whether an earlier run has written the same, and all of it is still there."""
    if previous.get("type") != type or previous.get("inputs") != inputs:
        return False
    placed = {name: target / name for name in previous["files"]}
    return all(
        path.is_file() and path.stat().st_size == previous["files"][name] for name, path in placed.items()
    )


def _check_space(findings: Findings, type: str, target: Path) -> None:
    """Raise `OSError` before anything is written if the disk can't hold the files, the temporary one too."""
    num_weights = sum(np.prod(shape, dtype=np.int64) for shape in findings.shapes.values())
    needed = int(num_weights * (findings.dtype.itemsize + _bytes_per_weight(type) * _SPARE))
    folder = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{target} needs up to {needed / 1e9:.2f} GB while it is written, and {folder} has "
            f"{free / 1e9:.2f} GB free; make room or choose another target directory"
        )


def _main_type(type: str):
    """The type of most weights: `q4_k_m` is a mixture around Q4_K. `None` if the name doesn't say."""
    kinds = load_gguf().GGMLQuantizationType
    matching = [kind for kind in kinds if type.startswith(kind.name.lower())]
    return max(matching, key=lambda kind: len(kind.name), default=None)


def _block_size(type: str) -> int:
    """How many weights of a row a type stores together."""
    main = _main_type(type)
    return 256 if main is None else load_gguf().GGML_QUANT_SIZES[main][0]


def _bytes_per_weight(type: str) -> float:
    main = _main_type(type)
    if main is None:
        return 0.5
    size, num_bytes = load_gguf().GGML_QUANT_SIZES[main]
    return num_bytes / size


# ---- writing ----


def _write(
    findings: Findings,
    directory: Path,
    type: str,
    export_name: str,
    texts: dict[str, bytes],
) -> list[str]:
    """Every file but the record -> the tensors that fell back to another type."""
    for name, content in texts.items():
        (directory / name).write_bytes(content)
    weights = _Weights(findings)
    metadata = {"general.name": findings.source.name, EXPORT_KEY: export_name}
    decoder = list(_decoder_tensors(findings, weights))
    adapters = list(_adapter_tensors(findings, weights, ADAPTER_TYPES.get(type, "Q8_0")))
    total = 2 * len(decoder) + sum(len(tensors) for _, tensors in adapters)
    with logging.tqdm(total=total, desc=f"writing {type}", unit="tensor") as progress:
        _save_vision(findings, weights, directory / VISION, export_name)
        for file, tensors in adapters:
            fields = {**metadata, "general.type": "adapter", "adapter.type": "lora"}
            # Without an alpha, llama.cpp uses B as it is, and ours contains the scale.
            _write_gguf(directory / file, {**fields, "adapter.lora.alpha": 0.0}, tensors, progress)
        fields = {**metadata, **_decoder_fields(findings)}
        plain = directory / _UNQUANTISED
        vocabulary = {"tokenizer.ggml.model": "none"}
        if "tokenizer.model" in texts:
            vocabulary = _vocabulary(directory, findings)
        _write_gguf(plain, {**fields, **vocabulary}, decoder, progress)
        _quantise(plain, directory / DECODER, _number_of_type(type), progress)
        plain.unlink()
    return _fallbacks(directory, type)


def _write_gguf(path: Path, fields: dict, tensors: Sequence[_Tensor], progress) -> None:
    """One file, with one tensor in memory at a time."""
    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        _add_field(writer, key, value)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        total = int(np.prod(tensor.shape)) // size * num_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.int8), total, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for tensor in tensors:
            writer.write_tensor_data(_values(tensor))
            progress.update()
    finally:
        writer.close()


def _add_field(writer, key: str, value) -> None:
    """A value of a file's metadata under its key, whole numbers as 32 bits."""
    kinds = load_gguf().GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        known = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
        writer.add_key_value(key, value, known[type(value)])


def _values(tensor: _Tensor) -> np.ndarray:
    """What is written of a tensor, in its type."""
    values = tensor.read().contiguous()
    if tensor.type == "BF16":
        return values.to(torch.bfloat16).view(torch.int16).numpy()
    if tensor.type == "F16":
        return values.half().numpy()
    values = values.float().numpy()
    if tensor.type == "F32":
        return values
    gguf = load_gguf()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.type])


def _quantise(source: Path, target: Path, ftype: int, progress) -> None:
    """llama.cpp's own quantiser, from one file to another.

    Raises:
        ValueError: it refuses; with its reason.
    """
    library = load_library()
    parameters = library.api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = ftype, torch.get_num_threads()
    parameters.allow_requantize = True  # bfloat16 counts as quantised
    parameters.max_buf_size = _QUANTISE_BYTES

    def count(line: str) -> None:
        if _STEP.match(line):
            progress.update()

    def run() -> None:
        codes.append(library.api.llama_model_quantize(file_name(source), file_name(target), parameters))

    # In a thread, so that an interrupt needn't wait for the end.
    codes, thread = [], threading.Thread(target=run, daemon=True)
    with library.heard_by(count), library.complaining("llama.cpp can't quantise the decoder") as fault:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
        if codes != [0]:
            raise fault()


def _fallbacks(directory: Path, type: str) -> list[str]:
    """Matrices in types of smaller blocks than the requested one, because its blocks don't fit the rows."""
    gguf, found = load_gguf(), Counter()
    adapter_type = ADAPTER_TYPES.get(type, "Q8_0")
    for path in sorted(directory.glob("*.gguf")):
        wanted = _block_size(type) if path.name == DECODER else _block_size(adapter_type.lower())
        for tensor in gguf.GGUFReader(path).tensors:
            size, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            if len(tensor.shape) > 1 and size < wanted:
                name = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
                kind = tensor.tensor_type.name.lower()
                found[f"{path.name}: {name} has rows of {tensor.shape[0]} and is stored as {kind}"] += 1
    return [f"{text} ({count} of them)" if count > 1 else text for text, count in found.items()]


# ---- what is read ----


class _Weights:
    """A checkpoint's tensors by published name. Each is read when it is asked for, and nothing is kept."""

    def __init__(self, findings: Findings) -> None:
        rename = first_published_name if findings.config.version == FIRST_GENERATION else published_name
        self._findings, self._low_rank = findings, low_rank_of(findings)
        self._names = {rename(name): name for name in findings.headers}
        self._headers, self._packing, self._shapes = findings.headers, findings.packing, findings.shapes
        packed = findings.packing.linears if findings.packing else ()
        self._packed = {rename(f"{linear}.weight"): linear for linear in packed}
        self._dtype = findings.dtype
        self.shapes = {rename(name): tuple(shape) for name, shape in findings.shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._packed:
            return self._unpack(name, self._packed[name])
        tensor, pair = read_tensor(self._headers, self._names[name]), self._low_rank.get(self._names[name])
        return tensor if pair is None else folded(self._findings, tensor, pair)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, unpacked."""
        return self._dtype if name in self._packed else self._headers[self._names[name]].dtype

    @torch.no_grad()
    def _unpack(self, name: str, linear: str) -> Tensor:
        """A weight that GPTQ or AWQ has packed.

        Raises:
            ValueError: it has a bias that isn't zero, or names a group that doesn't exist.
        """
        parts = [
            part for part in ("qweight", "qzeros", "scales", "g_idx") if f"{linear}.{part}" in self._headers
        ]
        tensors = {part: read_tensor(self._headers, f"{linear}.{part}") for part in parts}
        bias = f"{linear}.bias"
        if (
            _FIRST_BIAS.search(bias) is None
            and bias in self._headers
            and read_tensor(self._headers, bias).any()
        ):
            raise ValueError(f"{linear} has a bias, which no checkpoint of the family has")
        outputs, inputs = self.shapes[name]
        packed = PackedLinear(
            inputs,
            outputs,
            self._packing,
            num_groups=len(tensors["scales"]),
            has_index="g_idx" in tensors,
        )
        packed.load_state_dict(tensors)
        return packed.unpack(self._dtype)


# ---- what is written ----


def _take_heads(text, part: str, packed: Tensor) -> Tensor:
    """Rows of `wqkv` (rows, in) -> those of the queries, keys or values, (heads * head_dim, in).

    llama.cpp rotates neighbouring rows of queries and keys together, this decoder those of two halves.
    """
    heads = unpack_heads(packed, text.num_attention_heads, text.num_key_value_heads)
    num_rows = _rows_of_heads(text)
    taken = dict(zip(num_rows, heads.split(list(num_rows.values())), strict=True))[part]
    if part == "attn_v":
        return taken
    return rearrange(taken, "(h half d) i -> (h d half) i", half=2, d=text.head_dim // 2)


def _parts_of_linear(text, linear: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """A linear's names in llama.cpp, and for each what it takes of (out, in) or (out, rank) rows."""
    if linear != "attention.wqkv":
        return {_LINEARS[linear]: lambda weight: weight}
    return {part: partial(_take_heads, text, part) for part in _rows_of_heads(text)}


def _rows_of_heads(text) -> dict[str, int]:
    """The parts of `wqkv` in llama.cpp, and how many rows each has."""
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return {"attn_q": queries, "attn_k": keys, "attn_v": keys}


def _decoder_tensors(findings: Findings, weights: "_Weights") -> Iterator[_Tensor]:
    """The plain decoder, its matrices in the type of the checkpoint, its norms in float32."""
    text = findings.config.text_config

    def tensor(name: str, source: str, kind: str | None = None) -> _Tensor:
        kind = kind or _PLAIN_TYPES[weights.dtype(source)]
        return _Tensor(name, weights.shapes[source], kind, lambda: weights[source])

    if findings.config.version == FIRST_GENERATION:
        yield from _first_decoder_tensors(text, weights, tensor)
        return
    yield tensor("token_embd.weight", "model.tok_embeddings.weight")
    yield tensor("output_norm.weight", "model.norm.weight", "F32")
    yield tensor("output.weight", "output.weight")
    for layer in range(text.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        yield tensor(f"{theirs}.attn_norm.weight", f"{ours}.attention_norm.weight", "F32")
        yield tensor(f"{theirs}.ffn_norm.weight", f"{ours}.ffn_norm.weight", "F32")
        for linear in _LINEARS:
            source = f"{ours}.{linear}.weight"
            rows, width = weights.shapes[source]
            kind = _PLAIN_TYPES[weights.dtype(source)]
            for part, take in _parts_of_linear(text, linear).items():
                shape = _rows_of_heads(text).get(part, rows), width
                yield _Tensor(
                    f"{theirs}.{part}.weight",
                    shape,
                    kind,
                    _taking(take, partial(weights.__getitem__, source)),
                )


def _first_decoder_tensors(text, weights: "_Weights", tensor: Callable[..., _Tensor]) -> Iterator[_Tensor]:
    """The decoder of the first generation, its low-rank weights folded in, its biases in float32."""
    model = "internlm_model.model"
    yield tensor("token_embd.weight", f"{model}.embed_tokens.weight")
    yield tensor("output_norm.weight", f"{model}.norm.weight", "F32")
    yield tensor("output.weight", "internlm_model.lm_head.weight")
    for layer in range(text.num_hidden_layers):
        ours, theirs = f"{model}.layers.{layer}", f"blk.{layer}"
        yield tensor(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", "F32")
        yield tensor(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", "F32")
        for linear, name in _FIRST_LINEARS.items():
            heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(name)
            for part in ("weight", "bias") if linear.startswith("self_attn.") else ("weight",):
                plain = tensor(f"{theirs}.{name}.{part}", f"{ours}.{linear}.{part}")
                plain = plain if part == "weight" else replace(plain, type="F32")
                yield plain if heads is None else replace(plain, read=_taking(_neighbours(heads), plain.read))


def _neighbours(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of queries or keys in the order of llama.cpp, which rotates neighbours, not rows of two halves."""
    return lambda rows: rearrange(rows, "(h half d) ... -> (h d half) ...", h=heads, half=2)


def _adapter_tensors(findings: Findings, weights: "_Weights", type: str) -> list[tuple[str, list[_Tensor]]]:
    """The files with low-rank weights, and what goes into each: Partial LoRA, and one for each mode."""
    if findings.config.version == FIRST_GENERATION:
        return []
    named = findings.config.text_config.task_adapters
    files = {PLORA: ("Plora",)}
    for mode, names in ADAPTERS_OF_MODE.items():
        if names and set(names) <= set(named):
            files[mode_file(mode)] = tuple(f"lora_{name}" for name in names)
    return [(file, list(_low_rank(findings, weights, names, type))) for file, names in files.items()]


def _low_rank(
    findings: Findings, weights: "_Weights", names: tuple[str, ...], type: str
) -> Iterator[_Tensor]:
    """Low-rank pairs for all linears; the sum of several pairs is one of their joint rank."""
    text = findings.config.text_config
    for layer in range(text.num_hidden_layers):
        for linear in _LINEARS:
            prefix = f"model.layers.{layer}.{linear}"
            downs, ups = ([f"{prefix}.{name}_{half}.weight" for name in names] for half in "AB")
            scale = _scale(text, linear) if names == ("Plora",) else 1.0
            rank, width = sum(weights.shapes[down][0] for down in downs), weights.shapes[downs[0]][1]
            for part, take in _parts_of_linear(text, linear).items():
                name = f"blk.{layer}.{part}.weight"
                rows = _rows_of_heads(text).get(part, weights.shapes[ups[0]][0])
                kind = type if width % _block_size(type.lower()) == 0 else "F16"
                yield _Tensor(f"{name}.lora_a", (rank, width), kind, partial(_joined, weights, downs, 0, 1.0))
                kind = type if rank % _block_size(type.lower()) == 0 else "F16"
                up = partial(_joined, weights, ups, 1, scale)
                yield _Tensor(f"{name}.lora_b", (rows, rank), kind, _taking(take, up))


def _scale(text, linear: str) -> float:
    """What Partial LoRA's product is multiplied by."""
    if linear == "attention.wqkv":
        return text.plora_wqkv_alpha / text.plora_wqkv_rank
    return text.plora_alpha / text.plora_rank


def _joined(weights: "_Weights", names: Sequence[str], dim: int, scale: float) -> Tensor:
    """Several low-rank factors side by side, in float32."""
    return torch.cat([weights[name].float() for name in names], dim=dim) * scale


def _taking(take: Callable[[Tensor], Tensor], read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: take(read())


def _save_vision(findings: Findings, weights: "_Weights", path: Path, export_name: str) -> None:
    """Everything before the decoder, under the published names and in the types of the files."""
    tensors = {name: weights[name].contiguous() for name in weights.shapes if _VISION.match(name)}
    save_file(tensors, path, metadata={"format": "pt", EXPORT_KEY: export_name})


def _decoder_fields(findings: Findings) -> dict:
    """The decoder's numbers under llama.cpp's keys."""
    text = findings.config.text_config
    fields = {
        "llama.context_length": text.max_position_embeddings,
        "llama.embedding_length": text.hidden_size,
        "llama.block_count": text.num_hidden_layers,
        "llama.feed_forward_length": text.intermediate_size,
        "llama.attention.head_count": text.num_attention_heads,
        "llama.attention.head_count_kv": text.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "llama.rope.dimension_count": text.head_dim,
        "llama.rope.freq_base": float(text.rope_parameters["rope_theta"]),
        "llama.vocab_size": text.vocab_size,
    }
    if text.rope_parameters["rope_type"] == "linear":
        fields["llama.rope.scaling.type"] = "linear"
        fields["llama.rope.scaling.factor"] = float(text.rope_parameters["factor"])
    return fields


def _vocabulary(directory: Path, findings: Findings) -> dict:
    """The tokenizer and the chat template, so that llama.cpp's own tools can open the file for text."""
    tokenizer = tokenizer_class(findings.config.version).from_pretrained(directory)
    pieces, num_rows = tokenizer.sp_model, findings.config.text_config.vocab_size
    num_pieces = pieces.get_piece_size()
    names = [pieces.id_to_piece(index) for index in range(num_pieces)]
    # A text in GGUF ends at a null character; this piece can't be reached anyway.
    names = [name.replace("\0", "[NULL]") for name in names]
    unused = range(num_pieces, num_rows)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*names, *(f"[PAD{index}]" for index in unused)],
        "tokenizer.ggml.scores": [*map(pieces.get_score, range(num_pieces)), *(0.0 for _ in unused)],
        "tokenizer.ggml.token_type": [
            *(_kind_of_piece(pieces, i) for i in range(num_pieces)),
            *(5 for _ in unused),
        ],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.eot_token_id": findings.config.end_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_token_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": pieces.encode("a", out_type=str)[0].startswith("\u2581"),
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _kind_of_piece(pieces, index: int) -> int:
    """llama.cpp's number for a kind of piece; those of the markup are control pieces, which text can't be."""
    if pieces.is_unknown(index):
        return 2
    if pieces.is_control(index) or _MARKUP.match(pieces.id_to_piece(index)):
        return 3
    if pieces.is_unused(index):
        return 5
    return 6 if pieces.is_byte(index) else 1
