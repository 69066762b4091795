"""The numbers and names of the first generation: InternLM-XComposer 1.0 and ShareCaptioner.

Its published `config.json` files are flat, describe the decoder only, and leave the tower and the Q-Former to
literals in the published code. `InternLMXComposerConfig` accepts them as they are, and
`InternLMXComposerConfig.complete_from_shapes` gives the weights the last word. No torch here.
"""

import copy
import math
import re
from collections.abc import Collection, Mapping

from transformers import Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from .configuration_internlm_xcomposer2 import (
    CALLER_ONLY,
    FIRST_GENERATION,
    IMAGE_PROCESSOR,
    MODEL_CLASSES,
    PROCESSOR,
    VERSIONS,
    AttentionHeadsError,
    CheckpointConfig,
    WeightShapes,
    forwarded,
)
from .files_internlm_xcomposer2 import CONFIG_KINDS, MAPPING, SIZE

MODEL_TYPE = "InternLMXComposer"

# What the fields of a file must be; published ones pad with -1.
FIRST_KINDS = {name: kind for name, kind in CONFIG_KINDS.items() if name != "pad_token_id"} | {
    "qformer_config": MAPPING.or_none(),
    "internlm_lora": MAPPING.or_none(),
    "num_query_token": SIZE,
}

# Widths of an attention head in the published checkpoints; the weights don't say how many heads there are.
_HEAD_DIM, _TOWER_HEAD_DIM, _QFORMER_HEAD_DIM = 128, 88, 64

# The linears that carry low-rank weights, by the names of `learn_param`.
LORA_LINEARS = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",)} | {
    "ffn": ("up_proj", "down_proj")
}

# `<TOKENS_UNUSED_140>`, which stands for a row of a picture, and `<TOKENS_UNUSED_1>`, which ends an answer.
_IMAGE_TOKEN_ID, _END_TOKEN_ID = 103167, 103028

# Fields of the published class of the tower and of the Q-Former, and what transformers calls them.
_VISION_NAMES = {
    "img_size": "image_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_QFORMER_NAMES = {
    "cross_attention_freq": "cross_attention_frequency",
    "encoder_width": "encoder_hidden_size",
}

_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)
# Published fields of the decoder that say nothing new: other values are not supported.
_FIXED = {"intern_converted_llm": True, "kqvo_bias": True, "bias": True}
_DROPPED = ("device", "lora_cfg", "num_quant", *_FIXED)


class InternLMXComposerConfig(CheckpointConfig):
    """A whole checkpoint of the first generation: decoder, tower, Q-Former and low-rank weights.

    Accepts the nested form (`text_config`, `vision_config`, `qformer_config`) and the published flat one,
    whose decoder fields it passes on to `text_config`; they can be read and set here too
    (`config.hidden_size`).

    Args:
        text_config: fields of `LlamaConfig`.
        vision_config: fields of `Blip2VisionConfig`, or of the published tower (`embed_dim`, `depth`).
        qformer_config: fields of `Blip2QFormerConfig`, or of the published one (`encoder_width`).
        num_query_token: queries of the Q-Former; a picture takes two tokens more, for its two flags.
        internlm_lora: the low-rank weights: `lora_r`, `lora_alpha`, `lora_dropout` and `learn_param`, the
            linears that have them (`q`, `k`, `v`, `o`, `ffn`); `None` if they are folded into the plain ones.
        image_token_id: the vocabulary piece that stands for one row of a picture.
        end_token_id: the piece that ends an answer.
        max_length: the most tokens of prompt and answer together.
        kwargs: any field of `LlamaConfig`, as in published files.

    Raises:
        ValueError: a size is invalid, or a field asks for a decoder that no published checkpoint has.
    """

    model_type = MODEL_TYPE
    sub_configs = {
        "text_config": LlamaConfig,
        "vision_config": Blip2VisionConfig,
        "qformer_config": Blip2QFormerConfig,
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    field_kinds = FIRST_KINDS

    # What the rooms that serve both generations ask a configuration.
    version = FIRST_GENERATION
    hd_num = VERSIONS[FIRST_GENERATION].hd_num
    is_tiled = False
    video_memory_size = None
    # Set while a file's low-rank weights are being folded into the plain ones.
    folds_low_rank = False

    # Declared, because transformers takes an undeclared `max_length` for a generation parameter.
    max_length: int = VERSIONS[FIRST_GENERATION].max_length

    def __init__(
        self,
        text_config: dict | PreTrainedConfig | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        qformer_config: dict | PreTrainedConfig | None = None,
        num_query_token: int = 64,
        internlm_lora: dict | None = None,
        image_token_id: int | None = None,
        end_token_id: int = _END_TOKEN_ID,
        max_length: int | None = None,
        **kwargs,
    ) -> None:
        self.internlm_lora = internlm_lora if internlm_lora is not None else kwargs.get("lora_cfg")
        _refuse_other_decoders(kwargs)
        for name in _DROPPED:
            kwargs.pop(name, None)
        padding = kwargs.pop("pad_token_id", None)
        self.text_config = _text_config(text_config, kwargs)
        self.vision_config = _vision_config(vision_config)
        self.qformer_config = _qformer_config(qformer_config, self.vision_config)
        self.num_query_token = num_query_token
        vocab_size = self.text_config.vocab_size
        self.image_token_id = (
            min(_IMAGE_TOKEN_ID, vocab_size - 1) if image_token_id is None else image_token_id
        )
        self.end_token_id = end_token_id
        self.max_length = type(self).max_length if max_length is None else max_length
        self._check()
        # Published files pad with -1, which no tokenizer decodes.
        padding = self.text_config.eos_token_id if padding in (None, -1) else padding
        same = {name: getattr(self.text_config, name) for name in ("bos_token_id", "eos_token_id")}
        same["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(pad_token_id=padding, **same, **kwargs)

    def _check(self) -> None:
        text, vision, queries = self.text_config, self.vision_config, self.qformer_config
        for config, part in ((text, "decoder"), (vision, "tower"), (queries, "Q-Former")):
            _check_heads(config.hidden_size, config.num_attention_heads, part)
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"image_size {vision.image_size} px is not a multiple of patch_size {vision.patch_size} px"
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of {text.vocab_size} pieces"
            )
        if lacking := {"lora_r", "lora_alpha"}.difference(self.internlm_lora or {"lora_r", "lora_alpha"}):
            raise ValueError(f"internlm_lora lacks {', '.join(sorted(lacking))}: {self.internlm_lora}")
        if unknown := set(self.learn_param).difference(LORA_LINEARS):
            raise ValueError(
                f"internlm_lora's learn_param knows {', '.join(LORA_LINEARS)}, not "
                f"{', '.join(sorted(unknown))}"
            )

    @property
    def learn_param(self) -> list[str]:
        """Which linears have low-rank weights, by their published names."""
        return list((self.internlm_lora or {}).get("learn_param", ("q", "v", "ffn")))

    @property
    def img_size(self) -> int:
        """Side of the square in pixels."""
        return self.vision_config.image_size

    @property
    def tile_tokens_per_side(self) -> int:
        """Side of the square in patches, which the Q-Former resamples."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_square(self) -> int:
        """Tokens of a picture: the queries between two flags."""
        return self.num_query_token + 2

    def complete_from_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> "InternLMXComposerConfig":
        """A copy in which every size that the weights determine comes from them.

        Args:
            shapes: the shape of each tensor of the checkpoint by its published (or our) name.

        Raises:
            ValueError: the names are not those of the first generation; says what is missing.
        """
        return _complete(self, FirstShapes(shapes))


for _name in _TEXT_FIELDS:
    setattr(InternLMXComposerConfig, _name, forwarded(_name))


def _refuse_other_decoders(fields: dict) -> None:
    """Raise `ValueError` for published fields with values that no published checkpoint has."""
    for name, expected in _FIXED.items():
        if name in fields and bool(fields[name]) != expected:
            raise ValueError(
                f"{name} {fields[name]!r} isn't supported: every published checkpoint has {expected}"
            )


def _text_config(given: dict | PreTrainedConfig | None, fields: dict) -> LlamaConfig:
    """The decoder's configuration; flat text fields are taken out of `fields`."""
    flat = {name: fields.pop(name) for name in _TEXT_FIELDS if name in fields}
    defaults = {"vocab_size": 103168, "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": False}
    nested = {**_own_fields(given), **flat}
    if nested.get("hidden_size") and not nested.get("num_attention_heads"):
        nested["num_attention_heads"] = max(1, nested["hidden_size"] // _HEAD_DIM)
    if nested.get("hidden_size") and nested.get("num_attention_heads"):
        _check_heads(nested["hidden_size"], nested["num_attention_heads"], "decoder")
    # Without padding of its own: torch would leave the embedding of that id untrained.
    return LlamaConfig(**{**defaults, **nested, "pad_token_id": None})


def _check_heads(width: int, num_heads: int, part: str) -> None:
    if width % num_heads:
        raise AttentionHeadsError(
            f"the {part} is {width} wide, not a multiple of its {num_heads} attention heads"
        )


def _vision_config(given: dict | PreTrainedConfig | None) -> Blip2VisionConfig:
    fields = _renamed(given, _VISION_NAMES)
    if ratio := fields.pop("mlp_ratio", None):
        fields.setdefault("intermediate_size", int(fields.get("hidden_size", 1408) * ratio))
    # New weights of BLIP-2's tower are almost zero, which is of no use for training.
    return Blip2VisionConfig(**{"initializer_range": 0.02, **fields})


def _qformer_config(given: dict | PreTrainedConfig | None, vision: Blip2VisionConfig) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        **{"encoder_hidden_size": vision.hidden_size, **_renamed(given, _QFORMER_NAMES)}
    )


def _renamed(given: dict | PreTrainedConfig | None, names: dict[str, str]) -> dict:
    return {names.get(name, name): value for name, value in _own_fields(given).items()}


def _own_fields(given: dict | PreTrainedConfig | None) -> dict:
    given = given.to_dict() if isinstance(given, PreTrainedConfig) else (given or {})
    return {name: value for name, value in given.items() if name not in CALLER_ONLY}


# ---- names ----

# Published keys -> ours, which are those of transformers' own modules. transformers renames them back when
# saving, so each pattern has at most one group, which the other side repeats.
PUBLISHED_KEYS = {
    r"^visual_encoder\.cls_token": "visual_encoder.embeddings.class_embedding",
    r"^visual_encoder\.pos_embed": "visual_encoder.embeddings.position_embedding",
    r"^visual_encoder\.patch_embed\.proj\.": "visual_encoder.embeddings.patch_embedding.",
    r"^visual_encoder\.blocks\.": "visual_encoder.encoder.layers.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.norm1\.": ".layer_norm1.",
    r"\.norm2\.": ".layer_norm2.",
    r"^Qformer\.bert\.embeddings\.LayerNorm\.": "Qformer.layernorm.",
    r"^Qformer\.bert\.encoder\.": "Qformer.encoder.",
    r"\.attention\.self\.": ".attention.attention.",
    r"\.crossattention\.self\.": ".crossattention.attention.",
}
# The tower's queries and values have biases, its keys have none: two tensors in a file, one in the model.
QUERY_BIAS, VALUE_BIAS, JOINED_BIAS = ".attn.q_bias", ".attn.v_bias", ".self_attn.qkv.bias"
# The low-rank weights of a linear, if they are kept; peft takes every weight with "lora_" for its own.
KEPT_LOW_RANK = {r"\.lora_A\.weight$": ".low_rank_A.weight", r"\.lora_B\.weight$": ".low_rank_B.weight"}

_OURS_TO_PUBLISHED = {
    re.escape(ours): re.sub(r"[\\^$]", "", published)
    for published, ours in (PUBLISHED_KEYS | KEPT_LOW_RANK).items()
}


def published_name(name: str) -> str:
    """A tensor's published name, from its own or ours; joined biases have none and stay as they are."""
    if name.endswith(JOINED_BIAS):
        return name
    for ours, published in _OURS_TO_PUBLISHED.items():
        name = re.sub(ours, published, name, count=1)
    return name


def our_name(name: str) -> str:
    """A tensor's name in the model, from its published one or its own."""
    for published, ours in (PUBLISHED_KEYS | KEPT_LOW_RANK).items():
        name = re.sub(published, ours, name, count=1)
    return name


def shapes_in_model(
    shapes: Mapping[str, tuple[int, ...]], *, folds_low_rank: bool
) -> dict[str, tuple[int, ...]]:
    """The tensors of a file by our names, as they are once biases are joined and low-rank weights folded."""
    named = {our_name(name): shape for name, shape in shapes.items()}
    if folds_low_rank:
        named = {name: shape for name, shape in named.items() if ".low_rank_" not in name}
    for name in [name for name in named if name.endswith(QUERY_BIAS)]:
        stem = name.removesuffix(QUERY_BIAS)
        if (value := named.pop(f"{stem}{VALUE_BIAS}", None)) is not None:
            named[f"{stem}{JOINED_BIAS}"] = (named.pop(name)[0] + 2 * value[0],)
    return named


def is_first_generation(names: Collection[str]) -> bool:
    """Whether tensors with these names are a checkpoint's of the first generation."""
    return "flag_image_start" in names and any(name.startswith("internlm_model.") for name in names)


class FirstShapes(WeightShapes):
    """Shapes of the first generation by published name."""

    family = "InternLM-XComposer 1.0"

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__({published_name(name): tuple(shape) for name, shape in shapes.items()})


# ---- sizes that the weights determine ----


def _complete(config: InternLMXComposerConfig, shapes: FirstShapes) -> InternLMXComposerConfig:
    config = copy.deepcopy(config)
    _complete_text(config.text_config, shapes)
    _complete_vision(config.vision_config, shapes)
    _complete_qformer(config.qformer_config, shapes)
    config.num_query_token = shapes["query_tokens"][1]
    config.internlm_lora = _low_rank(config, shapes)
    if config.image_token_id == _IMAGE_TOKEN_ID:
        config.image_token_id = min(_IMAGE_TOKEN_ID, config.text_config.vocab_size - 1)
    config._check()
    return config


def _complete_text(text: LlamaConfig, shapes: FirstShapes) -> None:
    text.vocab_size, hidden_size = shapes["internlm_model.model.embed_tokens.weight"]
    if hidden_size != text.hidden_size:
        text.num_attention_heads = max(1, hidden_size // _HEAD_DIM)
        text.hidden_size = hidden_size
    text.head_dim = hidden_size // text.num_attention_heads
    block = "internlm_model.model.layers."
    text.num_hidden_layers = shapes.count(block)
    text.intermediate_size = shapes[f"{block}0.mlp.gate_proj.weight"][0]
    text.num_key_value_heads = shapes[f"{block}0.self_attn.k_proj.weight"][0] // text.head_dim


def _complete_vision(vision: Blip2VisionConfig, shapes: FirstShapes) -> None:
    width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
    if width != vision.hidden_size:
        vision.num_attention_heads = max(1, width // _TOWER_HEAD_DIM)
    vision.hidden_size, vision.patch_size = width, patch
    vision.image_size = math.isqrt(shapes["visual_encoder.pos_embed"][1] - 1) * patch
    vision.num_hidden_layers = shapes.count("visual_encoder.blocks.")
    vision.intermediate_size = shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0]


def _complete_qformer(queries: Blip2QFormerConfig, shapes: FirstShapes) -> None:
    layer = "Qformer.bert.encoder.layer."
    width = shapes["query_tokens"][2]
    if width != queries.hidden_size:
        queries.num_attention_heads = max(1, width // _QFORMER_HEAD_DIM)
    queries.hidden_size = width
    queries.encoder_hidden_size = shapes[f"{layer}0.crossattention.self.key.weight"][1]
    queries.num_hidden_layers = shapes.count(layer)
    queries.intermediate_size = shapes[f"{layer}0.intermediate_query.dense.weight"][0]
    layers = range(1, queries.num_hidden_layers)
    crossed = [i for i in layers if shapes.rows(f"{layer}{i}.crossattention.self.key.weight")]
    queries.cross_attention_frequency = crossed[0] if crossed else queries.num_hidden_layers


def _low_rank(config: InternLMXComposerConfig, shapes: FirstShapes) -> dict | None:
    """What the file's low-rank weights are; `None` without any. The scale of another rank stays one."""
    block = "internlm_model.model.layers.0."
    found = [name for name in shapes.shapes if name.startswith(block) and name.endswith(".lora_A.weight")]
    if not found:
        return None
    linears = {name.split(".")[-3] for name in found}
    rank, given = shapes[found[0]][0], config.internlm_lora or {}
    alpha = given["lora_alpha"] if given.get("lora_r") == rank else rank
    learned = [short for short, names in LORA_LINEARS.items() if linears.intersection(names)]
    return {"lora_dropout": 0.05, "freeze": False, **given} | {
        "lora_r": rank,
        "lora_alpha": alpha,
        "learn_param": learned,
    }


# ---- where the library finds the classes ----

_CONFIG = "configuration_internlm_xcomposer.InternLMXComposerConfig"
_MODEL = "modeling_internlm_xcomposer.InternLMXComposerForCausalLM"
_TOKENIZER = "tokenization_internlm_xcomposer2.InternLMXComposerTokenizer"

CONFIG_AUTO_MAP = {
    "AutoConfig": _CONFIG,
    **dict.fromkeys(MODEL_CLASSES, _MODEL),
    "AutoProcessor": PROCESSOR,
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": IMAGE_PROCESSOR, "AutoProcessor": PROCESSOR}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": [_TOKENIZER, None], "AutoProcessor": PROCESSOR}

# As for the second generation: pipelines and servers recognise models that read pictures by these tables.
for _table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
    getattr(modeling_auto, _table, {}).setdefault(MODEL_TYPE, _MODEL.split(".")[1])
