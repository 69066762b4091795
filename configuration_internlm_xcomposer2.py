"""Numbers and names: every size, rank and token id of a checkpoint, its tensors and its classes.

Published `config.json` files are flat and leave out most of what differs between the checkpoints of the
family. `InternLMXcomposer2Config` accepts them as they are, fills in the defaults of their version, and
`InternLMXcomposer2Config.complete_from_shapes` gives the weights the last word. No torch here.
"""

import copy
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field

import transformers
from packaging.version import parse
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.utils import CONFIG_NAME, logging

from .files_internlm_xcomposer2 import (
    CONFIG_KINDS,
    QUANTIZATION_KINDS,
    ROPE_KINDS,
    SIZE,
    TEXT_KINDS,
    VISION_KINDS,
    blaming,
    check_fields,
    is_file,
    read_fields,
)

# One name for all copies of this file that remote code makes, so that `warning_once` really warns once.
logger = logging.get_logger("internlm_xcomposer2")

# The newest release of transformers that the tests have passed on.
TESTED_TRANSFORMERS = "5.24"


def warn_of_untested(installed: str = transformers.__version__, tested: str = TESTED_TRANSFORMERS) -> None:
    """Warn once that transformers is newer than the newest release that the tests have passed on."""
    if parse(installed).release[:2] > parse(tested).release[:2]:
        logger.warning_once(
            f"transformers {installed} is newer than {tested}, the newest release that internlm_xcomposer2 "
            f'has been tested with. If something fails, downgrade: pip install "transformers=={tested}.*"'
        )


warn_of_untested()


# ---- versions ----


@dataclass(frozen=True)
class Version:
    """What differs between the versions of the family and is missing from published files.

    Attributes:
        image_size: side of a square or tile in pixels.
        layout: how pictures are cut: `"square"`, or one of `ixc_utils.TILE_RULES`.
        hd_num: the default number of local tiles of one picture.
        hd_num_of_several: the same if a prompt has several pictures, `None` if it doesn't differ.
        max_length: the published limit of prompt and answer together, in tokens.
        plora_wqkv_rank, plora_wqkv_alpha: of the image-only weights of `wqkv`, if those differ.
        task_adapters: the rank of each task adapter.
        reads_videos: whether a video becomes one picture of its frames.
    """

    image_size: int
    layout: str
    hd_num: int
    max_length: int
    hd_num_of_several: int | None = None
    plora_wqkv_rank: int | None = None
    plora_wqkv_alpha: int | None = None
    task_adapters: dict[str, int] = field(default_factory=dict)
    reads_videos: bool = False


# Version 1.0 has a configuration and a model of its own; it shares how pictures are cut, and how prompts,
# histories and answers are handled.
FIRST_GENERATION = "1.0"

# From model cards, state dicts and the published code.
VERSIONS = {
    FIRST_GENERATION: Version(image_size=224, layout="square", hd_num=1, max_length=2048),
    "2": Version(image_size=490, layout="square", hd_num=1, max_length=4096),
    "2-4khd": Version(
        image_size=336, layout="always", hd_num=25, max_length=16384, plora_wqkv_rank=8, plora_wqkv_alpha=16
    ),
    "2.5": Version(
        image_size=560,
        layout="bottom",
        hd_num=24,
        hd_num_of_several=6,
        max_length=16384,
        task_adapters={"sft": 256, "dpo": 256, "web": 512},
        reads_videos=True,
    ),
}

# The values of `model_type` in the published files; two of them name the text-only decoder.
PUBLISHED_MODEL_TYPES = ("internlmxcomposer2", "internlm2", "internlm")

# Adapters that each inference mode adds to every token, in the order in which they are added.
ADAPTERS_OF_MODE = {"base": (), "write": ("sft", "dpo"), "web": ("web",)}

_IMAGE_TOKEN_ID = 92398  # [UNUSED_TOKEN_1] of the published vocabulary

# CLIP ViT-L/14, the tower of every published checkpoint.
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}

# Width of an attention head in every published checkpoint; the weights don't say how many heads there are.
_HEAD_DIM = 128

_ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")
_ROPE_NEEDS = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Linears whose outputs tensor parallelism splits across processes, and those whose inputs it splits.
_CUT_OUTPUTS = ("attention.wqkv", "feed_forward.w1", "feed_forward.w3")
_CUT_INPUTS = ("attention.wo", "feed_forward.w2")

# Fields of the decoder that must be positive integers.
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "plora_rank",
    "plora_wqkv_rank",
)


class AttentionHeadsError(ValueError):
    """The number of attention heads, the one size that the weights don't determine, doesn't fit the rest."""


def check_infer_mode(infer_mode: str, config: "InternLMXcomposer2TextConfig") -> None:
    """Raise `ValueError` for an unknown mode, or one whose adapters the checkpoint lacks."""
    if not isinstance(infer_mode, str) or infer_mode not in ADAPTERS_OF_MODE:
        raise ValueError(f"unknown infer_mode {infer_mode!r}; choose one of {', '.join(ADAPTERS_OF_MODE)}")
    adapters = getattr(config, "task_adapters", {})
    lacking = [name for name in ADAPTERS_OF_MODE[infer_mode] if name not in adapters]
    if lacking:
        raise ValueError(
            f"infer_mode {infer_mode!r} needs the adapters {', '.join(lacking)}, but this model has "
            f"{', '.join(adapters) or 'none'}; use infer_mode='base', or load "
            f"InternLM-XComposer2.5-7B without the adapters argument or with {infer_mode!r} in it"
        )


class InternLMXcomposer2TextConfig(PreTrainedConfig):
    """The decoder: InternLM2 with Partial LoRA in each of its five linears.

    Args:
        plora_rank, plora_alpha: rank and numerator of the scale (`alpha / rank`) of the image-only weights.
        plora_wqkv_rank, plora_wqkv_alpha: the same for `wqkv` if it differs (4KHD: 8 and 16).
        plora_dropout: dropout before the low-rank product, in training only.
        task_adapters: rank of each task adapter, for instance `{"sft": 256, "dpo": 256, "web": 512}`.
        rope_theta, rope_scaling: rotary base and, as published, `{"type": "dynamic", "factor": 2.0}`.

    Raises:
        ValueError: a size, a rank or the rotary scaling is invalid.
    """

    model_type = "internlmxcomposer2_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size: int = 92544,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        use_cache: bool = True,
        pad_token_id: int | None = 2,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        bias: bool = False,
        attention_dropout: float = 0.0,
        rope_theta: float = 1_000_000,
        rope_scaling: dict | None = None,
        rope_parameters: dict | None = None,
        plora_rank: int = 256,
        plora_alpha: float | None = None,
        plora_wqkv_rank: int | None = None,
        plora_wqkv_alpha: float | None = None,
        plora_dropout: float = 0.05,
        task_adapters: dict[str, int] | None = None,
        **kwargs,
    ) -> None:
        check_fields(_arguments(locals()), TEXT_KINDS, owner=type(self))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        if num_attention_heads is None:
            num_attention_heads = max(1, hidden_size // _HEAD_DIM)
        self.num_attention_heads = num_attention_heads
        if num_key_value_heads is None:  # 8 in every published checkpoint; the weights correct it
            num_key_value_heads = 8 if num_attention_heads % 8 == 0 else num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        self.attention_dropout = attention_dropout
        self.rope_parameters = _rope_parameters(rope_parameters or rope_scaling, rope_theta)
        self.plora_rank = plora_rank
        self.plora_alpha = plora_rank if plora_alpha is None else plora_alpha
        self.plora_wqkv_rank = plora_rank if plora_wqkv_rank is None else plora_wqkv_rank
        self.plora_wqkv_alpha = self.plora_wqkv_rank if plora_wqkv_alpha is None else plora_wqkv_alpha
        self.plora_dropout = plora_dropout
        self.task_adapters = dict(task_adapters or {})
        self._check()
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """transformers' plan for splitting the decoder across processes, low-rank weights included.

        `wqkv` packs whole key-value groups one after the other, so its rows are split between groups. Of two
        low-rank factors, the one on the split side is split too, and the other is whole in every process.
        """
        low_rank = ["Plora", *(f"lora_{name}" for name in self.task_adapters)]
        plan = {"tok_embeddings": "embedding_rowwise"}
        for names, style, factor in ((_CUT_OUTPUTS, "colwise", "B"), (_CUT_INPUTS, "rowwise", "A")):
            for name in names:
                plan[f"layers.*.{name}.linear"] = style
                plan |= {f"layers.*.{name}.{pair}_{factor}": style for pair in low_rank}
        return plan

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding. Engines read it and write it back."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    def _check(self) -> None:
        check_fields(vars(self), TEXT_KINDS)
        check_fields({name: getattr(self, name) for name in TEXT_SIZES}, dict.fromkeys(TEXT_SIZES, SIZE))
        if self.hidden_size % self.num_attention_heads:
            raise AttentionHeadsError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise AttentionHeadsError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )


def _arguments(names: dict) -> dict:
    """What a constructor was given, from its local names at the start."""
    return {
        name: value for name, value in names.items() if name not in ("self", "kwargs", "__class__")
    } | names["kwargs"]


def _rope_parameters(scaling: dict | None, theta: float) -> dict:
    """The current `rope_parameters` from the published `rope_scaling` (`type`, `factor`) and `rope_theta`."""
    check_fields(scaling or {}, ROPE_KINDS, "rope_scaling.")
    parameters = dict(scaling or {})
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"unknown rope_scaling type {rope_type!r}; choose one of {', '.join(_ROPE_TYPES)}")
    parameters.pop("type", None)
    if lacking := [name for name in _ROPE_NEEDS.get(rope_type, ()) if parameters.get(name) is None]:
        raise ValueError(f"rope_scaling of type {rope_type!r} needs {', '.join(lacking)}")
    return {"rope_theta": theta, **parameters, "rope_type": rope_type}


class CheckpointConfig(PreTrainedConfig):
    """What the configurations of both generations have in common: how their files are read.

    Attributes:
        field_kinds: what the fields of a file must be.
    """

    field_kinds = CONFIG_KINDS

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Like the base class.

        Raises:
            OSError: there is no `config.json`.
            ValueError: it can't be read, or a field is wrong; names the file and the field.
        """
        source = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        file = os.path.join(source, CONFIG_NAME) if os.path.isdir(source) else source
        with blaming(file):
            if kwargs.get("gguf_file") is None and is_file(file):
                check_fields(read_fields(file), cls.field_kinds)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Like the base class, but only the caller can choose the attention implementation, not the file.

        Published files ask for `flash_attention_2`, which would make every load without a GPU fail. And
        `quantization_config=None` means that the caller has none; it would hide how the weights are stored.
        """
        if kwargs.get("quantization_config", ...) is None:
            del kwargs["quantization_config"]
        config_dict = {key: value for key, value in config_dict.items() if key not in CALLER_ONLY}
        return super().from_dict(config_dict, **kwargs)


class InternLMXcomposer2Config(CheckpointConfig):
    """A whole checkpoint: decoder, vision tower, and how pictures become tokens.

    Accepts the nested form (`text_config`, `vision_config`) and the published flat one, whose text fields it
    passes on to `text_config`; they can be read and set here too (`config.hidden_size`).

    Args:
        version: `"2"` (one square), `"2-4khd"` (336 px tiles) or `"2.5"` (560 px tiles).
        text_config: fields of `InternLMXcomposer2TextConfig`.
        vision_config: fields of `CLIPVisionConfig`; `image_size` is the side of a square or tile in pixels.
        img_size: the published name of the square's side (version `"2"` only); wins over `vision_config`.
        image_token_id: the vocabulary piece that stands for one image token, `[UNUSED_TOKEN_1]` by default.
        end_token_id: the piece that ends a turn, `[UNUSED_TOKEN_145]`, where generation stops too.
        hd_num: the default number of local tiles that a picture may be cut into.
        video_memory_size: input width of `video_mem_proj` (OmniLive base), or `None` if there is none.
        max_length: the published limit of prompt and answer together, in tokens.
        num_labels: scores of a reward model, one unless `id2label` names more.
        kwargs: any field of `InternLMXcomposer2TextConfig`, as in published files.

    Raises:
        ValueError: the version is unknown, or a size is invalid.
    """

    model_type = "internlmxcomposer2"
    sub_configs = {"text_config": InternLMXcomposer2TextConfig, "vision_config": CLIPVisionConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    # Declared, because transformers takes an undeclared `max_length` for a generation parameter.
    max_length: int = 16384

    def __init__(
        self,
        version: str | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        img_size: int | None = None,
        image_token_id: int | None = None,
        end_token_id: int = 92542,
        hd_num: int | None = None,
        video_memory_size: int | None = None,
        max_length: int | None = None,
        **kwargs,
    ) -> None:
        check_fields(_arguments(locals()), CONFIG_KINDS, owner=type(self))
        if isinstance(says := kwargs.get("quantization_config"), dict):
            check_fields(says, QUANTIZATION_KINDS, "quantization_config.")
        self.version = version or _guess_version(img_size, kwargs)
        known = [name for name in VERSIONS if name != FIRST_GENERATION]
        if self.version not in known:
            raise ValueError(f"unknown version {self.version!r}; this package knows {', '.join(known)}")
        defaults = VERSIONS[self.version]
        self.text_config = _text_config(text_config, kwargs, defaults)
        self.vision_config = _vision_config(vision_config, img_size, defaults)
        self.image_token_id = image_token_id
        if image_token_id is None:
            self.image_token_id = min(_IMAGE_TOKEN_ID, self.text_config.vocab_size - 1)
        self.end_token_id = end_token_id
        self.hd_num = defaults.hd_num if hd_num is None else hd_num
        self.video_memory_size = video_memory_size
        self.max_length = defaults.max_length if max_length is None else max_length
        self._check()
        if kwargs.get("id2label") is None:
            kwargs["num_labels"] = kwargs.get("num_labels") or 1  # the library's default is two
        forwarded = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
        super().__init__(**{name: getattr(self.text_config, name) for name in forwarded}, **kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        """Like the base class, but reads the model types of published files as ours."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in PUBLISHED_MODEL_TYPES:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def _check(self) -> None:
        check_fields(vars(self), CONFIG_KINDS)
        vision = self.vision_config
        check_fields(vars(vision), VISION_KINDS, "vision_config.")
        if vision.hidden_size % vision.num_attention_heads:
            raise ValueError(
                f"vision_config.hidden_size {vision.hidden_size} must be a multiple of its "
                f"num_attention_heads {vision.num_attention_heads}"
            )
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"image_size {vision.image_size} px is not a multiple of patch_size {vision.patch_size} px"
            )
        if self.is_tiled and vision.image_size % (2 * vision.patch_size):
            raise ValueError(
                f"tiles of {vision.image_size} px can't be merged 2x2 in patches of {vision.patch_size} px"
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of "
                f"{self.text_config.vocab_size} pieces"
            )

    @property
    def is_tiled(self) -> bool:
        """Whether pictures are a global view plus local tiles, with newline vectors between rows."""
        return self.version != "2"

    @property
    def img_size(self) -> int:
        """Side of a square or tile in pixels, under its published name."""
        return self.vision_config.image_size

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation in use, under its published name."""
        return self._attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, value: str | None) -> None:
        self._attn_implementation = value

    @property
    def tile_tokens_per_side(self) -> int:
        """Side, in tokens, of what one square or tile becomes: patches, merged 2x2 if there are tiles."""
        patches = self.vision_config.image_size // self.vision_config.patch_size
        return patches // 2 if self.is_tiled else patches

    @property
    def projector_input_size(self) -> int:
        """Width of the features that enter `vision_proj`."""
        return self.vision_config.hidden_size * (4 if self.is_tiled else 1)

    def complete_from_shapes(self, shapes: dict[str, tuple[int, ...]]) -> "InternLMXcomposer2Config":
        """A copy in which every size that the weights determine comes from them.

        Args:
            shapes: the shape of each tensor of the checkpoint by its published (or our) name.

        Raises:
            ValueError: the names are not those of this family; says what is missing.
        """
        return _complete(self, WeightShapes(shapes))


def forwarded(name: str) -> property:
    """A field that lives in `text_config`, readable and settable on the outer configuration."""

    def read(self):
        return getattr(self.text_config, name)

    def write(self, value) -> None:
        setattr(self.text_config, name, value)

    return property(read, write, doc=f"`text_config.{name}`")


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
    "bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "plora_rank",
    "plora_alpha",
    "plora_wqkv_rank",
    "plora_wqkv_alpha",
    "plora_dropout",
    "task_adapters",
    "rope_theta",
    "rope_parameters",
)
# And what only the text configuration's constructor can read.
_TEXT_ARGUMENTS = (*_TEXT_FIELDS, "rope_scaling")
CALLER_ONLY = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)

for _name in _TEXT_FIELDS:
    setattr(InternLMXcomposer2Config, _name, forwarded(_name))


def _guess_version(img_size: int | None, fields: dict) -> str:
    """The version that a published flat file describes; the weights correct a wrong guess."""
    if img_size is not None:
        return "2"
    origin = f"{fields.get('_name_or_path', '')} {fields.get('name_or_path', '')}".lower()
    return "2-4khd" if "4khd" in origin else "2.5"


def _text_config(given: dict | PreTrainedConfig | None, fields: dict, defaults: Version):
    """The decoder's configuration; flat text fields are taken out of `fields`."""
    flat = {name: fields.pop(name) for name in _TEXT_ARGUMENTS if name in fields}
    if given is None:
        names = ("task_adapters", "plora_wqkv_rank", "plora_wqkv_alpha")
        given = {name: getattr(defaults, name) for name in names}
    return InternLMXcomposer2TextConfig(**{**_own_fields(given), **flat})


def _vision_config(given: dict | PreTrainedConfig | None, img_size: int | None, defaults: Version):
    """The tower's configuration, CLIP-L/14 unless stated otherwise."""
    given = _own_fields(given or {})
    check_fields(given, VISION_KINDS, "vision_config.", CLIPVisionConfig)
    fields = {**_CLIP_LARGE, "image_size": defaults.image_size, **given}
    return CLIPVisionConfig(**{**fields, **({} if img_size is None else {"image_size": img_size})})


def _own_fields(given: dict | PreTrainedConfig) -> dict:
    """The fields of a part, without those that only the caller may choose."""
    given = given.to_dict() if isinstance(given, PreTrainedConfig) else given
    return {name: value for name, value in given.items() if name not in CALLER_ONLY}


# ---- names ----

# Published names of the decoder's plain weights, packed ones included -> ours, which are children of their
# linears. transformers renames them back when saving.
PUBLISHED_KEYS = {
    r"\.(wqkv|wo|w1|w2|w3)\.(?=weight|qweight|qzeros|scales|g_idx|bias)": r".\1.linear.",
}


def published_name(name: str) -> str:
    """A tensor's published name, from its own or ours: `wqkv.linear.weight` -> `wqkv.weight`."""
    return re.sub(r"\.linear\.(\w+)$", r".\1", name)


def our_name(name: str) -> str:
    """A tensor's name in the model, from its published one or its own."""
    for published, ours in PUBLISHED_KEYS.items():
        name = re.sub(published, ours, name)
    return name


def is_reward(names: Collection[str]) -> bool:
    """Whether tensors with these names are a reward model's: a score head in place of the output head."""
    return "score.weight" in names and "output.weight" not in names


class WeightShapes:
    """Shapes by name, regardless of whether a linear is stored plain, wrapped (`.linear`) or quantised."""

    family = "InternLM-XComposer2"

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        plain = {name: s for name, s in shapes.items() if f"{name}.absmax" not in shapes}  # not bitsandbytes'
        self.shapes = {published_name(name): tuple(shape) for name, shape in plain.items()}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ValueError(
                f"this is not an {self.family} checkpoint: its {len(self.shapes)} tensors lack {name!r}"
            )
        return self.shapes[name]

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            ValueError: there is no such tensor, or it has another number of dimensions, or no elements.
        """
        shape = self[name]
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"tensor {name} has the shape {shape}, not {dimensions} positive dimensions")
        return shape

    def rows(self, name: str, default: int | None = None) -> int | None:
        """The first dimension of a tensor, or `default` if there is no such tensor."""
        return self.of(name, len(self[name]) or 1)[0] if name in self.shapes else default

    def count(self, prefix: str) -> int:
        """How many consecutively numbered blocks start with `prefix`."""
        numbers = {name[len(prefix) :].split(".", 1)[0] for name in self.shapes if name.startswith(prefix)}
        return len(numbers)

    def adapters(self) -> dict[str, int]:
        """The rank of each task adapter."""
        prefix = "model.layers.0.attention.wqkv.lora_"
        found = [name for name in self.shapes if name.startswith(prefix) and name.endswith("_A.weight")]
        return {name[len(prefix) : -len("_A.weight")]: self.of(name, 2)[0] for name in found}


# ---- sizes that the weights determine ----


def _complete(config: InternLMXcomposer2Config, shapes: WeightShapes) -> InternLMXcomposer2Config:
    config = copy.deepcopy(config)
    _complete_vision(config, shapes)
    _complete_text(config.text_config, shapes, config.version)
    if config.image_token_id == _IMAGE_TOKEN_ID:  # a vocabulary of another family may lack it
        config.image_token_id = min(_IMAGE_TOKEN_ID, config.text_config.vocab_size - 1)
    memory = "video_mem_proj.0.weight"
    config.video_memory_size = shapes.of(memory, 2)[1] if memory in shapes.shapes else None
    config.num_labels = shapes.rows("score.weight", config.num_labels)
    config._check()
    return config


def _complete_vision(config: InternLMXcomposer2Config, shapes: WeightShapes) -> None:
    """Version and tower from the position table, the patch kernel and the newline vectors."""
    tower = "vit.vision_tower.vision_model."
    width, _, patch, _ = shapes.of(f"{tower}embeddings.patch_embedding.weight", 4)
    side = math.isqrt(shapes.of(f"{tower}embeddings.position_embedding.weight", 2)[0] - 1) * patch
    vision = config.vision_config
    if vision.hidden_size != width:
        vision.num_attention_heads = max(1, width // 64)  # CLIP's heads are 64 wide
        if width % 64:
            logger.warning_once(f"the tower is {width} wide; assuming {vision.num_attention_heads} heads")
    vision.hidden_size, vision.patch_size, vision.image_size = width, patch, side
    vision.num_hidden_layers = shapes.count(f"{tower}encoder.layers.")
    vision.intermediate_size = shapes.of(f"{tower}encoder.layers.0.mlp.fc1.weight", 2)[0]
    previous = config.version
    config.version = _version_of_weights(side, shapes, previous)
    if config.version != previous:
        for name in ("hd_num", "max_length"):
            if getattr(config, name) == getattr(VERSIONS[previous], name):
                setattr(config, name, getattr(VERSIONS[config.version], name))


def _version_of_weights(side: int, shapes: WeightShapes, configured: str) -> str:
    """The version by newline vectors and tile size; an unpublished tile size leaves it as configured."""
    if shapes.rows("plora_glb_GN") is None:
        return "2"
    published = {VERSIONS[version].image_size: version for version in ("2-4khd", "2.5")}
    return published.get(side, "2.5" if configured == "2" else configured)


def _complete_text(text: InternLMXcomposer2TextConfig, shapes: WeightShapes, version: str) -> None:
    """Sizes, ranks and adapters of the decoder."""
    text.vocab_size, hidden_size = shapes.of("model.tok_embeddings.weight", 2)
    if hidden_size != text.hidden_size:  # then the width of heads is as configured, not their number
        text.num_attention_heads = max(1, hidden_size // text.head_dim)
    text.hidden_size = hidden_size
    text.num_hidden_layers = shapes.count("model.layers.")
    block = "model.layers.0."
    # The low-rank factors are as wide as their linears, which may be packed into 4 bits.
    text.intermediate_size = shapes.of(f"{block}feed_forward.w1.Plora_B.weight", 2)[0]
    text.num_key_value_heads = _num_key_value_heads(
        text, shapes.of(f"{block}attention.wqkv.Plora_B.weight", 2)[0]
    )
    rank = shapes.of(f"{block}attention.wo.Plora_A.weight", 2)[0]
    text.plora_rank, text.plora_alpha = _rank_and_alpha(text.plora_rank, text.plora_alpha, rank, 1)
    rank = shapes.of(f"{block}attention.wqkv.Plora_A.weight", 2)[0]
    published = VERSIONS[version]
    default_scale = (published.plora_wqkv_alpha or 1) / (published.plora_wqkv_rank or 1)
    text.plora_wqkv_rank, text.plora_wqkv_alpha = _rank_and_alpha(
        text.plora_wqkv_rank, text.plora_wqkv_alpha, rank, default_scale
    )
    text.task_adapters = shapes.adapters()
    text._check()


def _num_key_value_heads(text: InternLMXcomposer2TextConfig, packed: int) -> int:
    """Groups of `packed` rows of wqkv: one head for each query, and one key and one value head per group."""
    heads, rest = divmod(packed, text.head_dim)
    groups, odd = divmod(heads - text.num_attention_heads, 2)
    if rest or odd or groups < 1 or text.num_attention_heads % groups:
        raise AttentionHeadsError(
            f"wqkv has {packed} rows, which doesn't fit {text.num_attention_heads} attention heads of width "
            f"{text.head_dim}; num_attention_heads is the one size that the weights don't determine"
        )
    return groups


def _rank_and_alpha(rank: int, alpha: float, found: int, default_scale: float) -> tuple[int, float]:
    """Keep a configured scale if its rank fits the weights, else use the version's."""
    return (rank, alpha) if rank == found else (found, found * default_scale)


# ---- where the library finds the classes: by `auto_map` in a file, or by the model type ----

_CONFIG = "configuration_internlm_xcomposer2.InternLMXcomposer2Config"
_MODEL = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
_REWARD = "modeling_internlm_xcomposer2.InternLMXComposer2ForSequenceClassification"
PROCESSOR = "processing_internlm_xcomposer2.InternLMXComposer2Processor"
IMAGE_PROCESSOR = "image_processing_internlm_xcomposer2.InternLMXComposer2ImageProcessor"
_TOKENIZER = "tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer"

MODEL_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)

# `auto_map` of each file that carries one. A reward model is not a chat model, whichever class asks for it.
CONFIG_AUTO_MAP = {
    "AutoConfig": _CONFIG,
    **dict.fromkeys(MODEL_CLASSES, _MODEL),
    "AutoModelForSequenceClassification": _REWARD,
    "AutoProcessor": PROCESSOR,
}
REWARD_AUTO_MAP = {**CONFIG_AUTO_MAP, **dict.fromkeys(MODEL_CLASSES, _REWARD)}
PROCESSOR_AUTO_MAP = {"AutoProcessor": PROCESSOR}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": IMAGE_PROCESSOR, "AutoProcessor": PROCESSOR}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": [_TOKENIZER, None], "AutoProcessor": PROCESSOR}

# Pipelines and `transformers serve` recognise models that read pictures only by these tables of model types.
for _table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
    getattr(modeling_auto, _table, {}).setdefault(InternLMXcomposer2Config.model_type, _MODEL.split(".")[1])
