"""Vision tower, 2x2 merge, projector and the Partial LoRA linear. Built from a configuration, not loaded."""

import functools
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import align_module_device
from einops import rearrange
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel, CLIPVisionEmbeddings

from .configuration_internlm_xcomposer2 import ADAPTERS_OF_MODE, InternLMXcomposer2Config
from .image_processing_internlm_xcomposer2 import check_grids, split_tiles
from .inputs_internlm_xcomposer2 import check_finite
from .kernels_internlm_xcomposer2 import Linear, LowRank, add_product, with_kernels

# How many tiles go through the tower at once: bounds the memory of a 4K picture or a long video.
MAX_TILES_PER_BATCH = 8

HALF_TYPES = (torch.float16, torch.bfloat16)


def outside_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast to the other half type doesn't touch what is computed from `x`.

    Published scripts run bfloat16 weights inside autocast to float16, where the two parts of a sum would have
    different types. Weights in float32 stay under autocast, which is meant for them.
    """
    kind = x.device.type
    if kind == "meta":  # offloaded weights: the accelerator, if there is one, computes with them
        kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if (
        x.dtype in HALF_TYPES
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) != x.dtype
    ):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def leaves_autocast(method: Callable) -> Callable:
    """Run a model's method in `outside_autocast`, according to the type of its weights."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with outside_autocast(self.get_input_embeddings().weight):
            return method(self, *args, **kwargs)

    return call


# ---- vision ----


def merge_2x2(features: Tensor) -> Tensor:
    """(tiles, patches, width) -> (tiles, side / 2, side / 2, 4 * width), channels ordered (dy, dx, width)."""
    side = int(features.shape[1] ** 0.5)
    return rearrange(features, "t (y dy x dx) c -> t y x (dy dx c)", y=side // 2, dy=2, dx=2)


def append_newlines(raster: Tensor, newline: Tensor) -> Tensor:
    """(rows, cols, width) raster and a newline vector of `width` -> (rows * (cols + 1), width)."""
    column = newline.to(raster.dtype).reshape(1, 1, -1).expand(raster.shape[0], 1, -1)
    return torch.cat([raster, column], dim=1).flatten(0, 1)


def assemble_tiles(features: Tensor, grid: tuple[int, int], separator: Tensor, newline: Tensor) -> Tensor:
    """Put the tiles of one picture in the order the decoder reads them in.

    Args:
        features: (1 + rows * cols, patches, width), the global view first, then the tiles row by row.
        grid: (rows, cols) of the local tiles.
        separator: `plora_glb_GN`, once between the global view and the rest.
        newline: `plora_sub_GN`, after every row of tokens, those of the global view too.

    Returns:
        (tokens, 4 * width): `(rows * cols + 1) * m**2 + 1 + (rows + 1) * m` tokens for tiles m tokens wide.
    """
    rows, cols = grid
    merged = merge_2x2(features)
    local = rearrange(merged[1:], "(rows cols) y x c -> (rows y) (cols x) c", rows=rows, cols=cols)
    between = separator.to(features.dtype).reshape(1, -1)
    return torch.cat([append_newlines(merged[0], newline), between, append_newlines(local, newline)])


def find_repetitions(tiles: Tensor) -> tuple[list[int], list[int]] | None:
    """Which of (tiles, 3, side, side) to encode, and for each tile its place among those.

    `None` if no tile repeats another, or if they are on an accelerator, where checking costs more than it
    saves.
    """
    if tiles.device.type != "cpu":
        return None
    step = max(1, tiles.shape[-1] // 16)
    samples = tiles[..., step // 2 :: step, step // 2 :: step].flatten(1).float().tolist()
    firsts, places, alike = [], [], {}
    for index, sample in enumerate(samples):
        candidates = alike.setdefault(tuple(sample), [])
        place = next((p for p in candidates if torch.equal(tiles[firsts[p]], tiles[index])), None)
        if place is None:
            place = len(firsts)
            firsts.append(index)
            candidates.append(place)
        places.append(place)
    return (firsts, places) if len(firsts) < len(tiles) else None


class CLIPVisionTransformer(nn.Module):
    """CLIP's image encoder under the names of the published state dicts (Radford et al., 2021)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = with_kernels(CLIPEncoder(config))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(images, 3, side, side) -> (images, 1 + patches, width), before `post_layernorm`."""
        hidden_states = self.embed(pixel_values, interpolate_pos_encoding)
        return self.encoder(inputs_embeds=hidden_states).last_hidden_state

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(images, 3, side, side) -> (images, 1 + patches, width), the input of the first layer."""
        embeddings = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.pre_layrnorm(embeddings)

    def all_hidden_states(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> list[Tensor]:
        """(images, 3, side, side) -> (images, 1 + patches, width) before the first and after each layer."""
        states = [self.embed(pixel_values, interpolate_pos_encoding)]
        for layer in self.encoder.layers:
            output = layer(states[-1], attention_mask=None)
            states.append(output[0] if isinstance(output, tuple) else output)
        return states


class CLIPVisionBackbone(CLIPPreTrainedModel):
    """The tower as a separate model, so that it can be frozen, checkpointed and dispatched."""

    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["CLIPEncoderLayer"]

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = CLIPVisionTransformer(config)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> Tensor | BaseModelOutputWithPooling:
        """(images, 3, side, side) -> (images, 1 + patches, width), before `post_layernorm`.

        Args:
            output_hidden_states, return_dict: either makes the result an object, like that of CLIP in
                transformers, with this tensor as `last_hidden_state`, and all `hidden_states` on request.
            interpolate_pos_encoding: accept pictures of a different size than the tower's.
        """
        if output_hidden_states:
            states = self.vision_model.all_hidden_states(pixel_values, interpolate_pos_encoding)
            return BaseModelOutputWithPooling(last_hidden_state=states[-1], hidden_states=tuple(states))
        last = self.vision_model(pixel_values, interpolate_pos_encoding)
        as_object = return_dict or output_hidden_states is not None
        return BaseModelOutputWithPooling(last_hidden_state=last) if as_object else last


class CLIPVisionTower(nn.Module):
    """`vit`: pictures or tiles -> features, the class token dropped.

    Published attributes kept for clients: `vision_tower`, `vision_tower_name`, `select_layer`,
    `select_feature`, `feature_select`, `is_loaded`, `load_model`, `resize_pos`, `dtype`, `device`, `config`,
    `hidden_size`, `num_patches`.
    """

    vision_tower_name = "openai/clip-vit-large-patch14-336"
    select_layer = -1
    select_feature = "patch"
    is_loaded = True

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionBackbone(config)

    def load_model(self) -> None:
        """Nothing to do: the tower is built with the model and loaded from its own checkpoint."""

    def resize_pos(self) -> None:
        """Nothing to do: the position table is built at the size that the configuration gives."""

    def feature_select(self, image_forward_outs) -> Tensor:
        """The output of `vision_tower` with hidden states -> (images, patches, width) of `select_layer`.

        Raises:
            ValueError: `select_feature` is neither `"patch"` nor `"cls_patch"`.
        """
        features = image_forward_outs.hidden_states[self.select_layer]
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"select_feature must be 'patch' or 'cls_patch', not {self.select_feature!r}")
        return features[:, 1:] if self.select_feature == "patch" else features

    @property
    def config(self) -> CLIPVisionConfig:
        """The tower's configuration."""
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        """Width of one patch feature."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        """Number of patches in one square or tile."""
        return (self.config.image_size // self.config.patch_size) ** 2

    @property
    def _weight(self) -> Tensor:
        return self.vision_tower.vision_model.embeddings.patch_embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tower's weights."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tower's weights."""
        return self._weight.device

    @property
    def last_layer(self) -> nn.Module:
        """The last layer of the encoder."""
        return self.vision_tower.vision_model.encoder.layers[-1]

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """(tiles, 3, side, side) of any dtype and device -> (tiles, patches, width) on the tower's.

        Without gradients, identical tiles are encoded once. Processes that shard the tower's weights run it
        once each, however many tiles each of them has.
        """
        device = tiles.device if self.device.type == "meta" else self.device
        places = None if torch.is_grad_enabled() or self.training else find_repetitions(tiles)
        if places is not None:
            firsts, places = places
            tiles = tiles[firsts]
        chunks = [tiles] if is_sharded(self.last_layer) else tiles.split(MAX_TILES_PER_BATCH)
        # A frozen tower needs no gradients, even if checkpointing requires them of its embeddings.
        wanted = torch.is_grad_enabled() and not (is_frozen(self) and not tiles.requires_grad)
        chunks = [chunk.to(device, self.dtype) for chunk in chunks]
        with torch.set_grad_enabled(wanted), outside_autocast(chunks[0]):
            features = [self.vision_tower(chunk)[:, 1:] for chunk in chunks]
        features = features[0] if len(features) == 1 else torch.cat(features)
        return features if places is None else features[places]

    def assemble(self, features: Tensor, grids: list[tuple[int, int]], separator: Tensor, newline: Tensor):
        """Features of all tiles of several pictures -> one (tokens, 4 * width) tensor per picture."""
        counts = [1 + rows * cols for rows, cols in grids]
        separator, newline = separator.to(features.device), newline.to(features.device)
        pieces = zip(features.split(counts), grids, strict=True)
        with outside_autocast(features):
            return [assemble_tiles(piece, grid, separator, newline) for piece, grid in pieces]

    def forward(
        self, images: Tensor | list[Tensor], glb_GN: Tensor | None = None, sub_GN: Tensor | None = None
    ):
        """The published call, in its three forms.

        Args:
            images: (images, 3, side, side), or a list of (1, 3, height, width).
            glb_GN, sub_GN: the newline vectors of the tiled versions.

        Returns:
            Without newline vectors: (images, patches, width), or for a list, a list of (1, patches, width).
            With them, for a list of pictures padded to multiples of the tile's side: all tokens as
            (1, tokens, 4 * width), and how many belong to each picture.
        """
        if glb_GN is None:
            if isinstance(images, list | tuple):
                return list(self.encode_tiles(torch.cat(list(images))).split(1))
            return self.encode_tiles(images)
        side = self.config.image_size
        grids = [(image.shape[-2] // side, image.shape[-1] // side) for image in images]
        tiles = torch.cat([split_tiles(image.reshape(image.shape[-3:]), side) for image in images])
        embeds = self.assemble(self.encode_tiles(tiles), grids, glb_GN, sub_GN)
        return torch.cat(embeds)[None], [len(embed) for embed in embeds]


def build_vision_tower(config: InternLMXcomposer2Config) -> CLIPVisionTower:
    """The tower that `config.vision_config` describes, without weights."""
    return CLIPVisionTower(config.vision_config)


class Projector(nn.Sequential):
    """Linear, exact GELU, linear: (..., input_size) -> (..., hidden_size)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        layers = Linear(input_size, hidden_size), nn.GELU(), Linear(hidden_size, hidden_size)
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """(..., input_size) -> (..., hidden_size)."""
        with outside_autocast(features):
            return super().forward(features)


def build_vision_projector(config: InternLMXcomposer2Config) -> Projector:
    """`vision_proj`: features of the tower (merged 2x2 where tiled) -> embeddings of the decoder."""
    return Projector(config.projector_input_size, config.text_config.hidden_size)


class VisionMixin:
    """Pictures to embeddings of the decoder: `vit`, `vision_proj`, and the newline vectors where tiled.

    A mixin, so that the parts have their published names both in the whole model and without the decoder.
    Needs `config`.
    """

    def _build_vision(self) -> None:
        # In the order of computation, in which `device_map="auto"` fills the devices.
        self.vit = build_vision_tower(self.config)
        self.vision_proj = build_vision_projector(self.config)
        if self.config.is_tiled:
            width = self.config.projector_input_size
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, width))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))

    @leaves_autocast
    def get_image_features(
        self, pixel_values: Tensor, image_grid_hw: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: (tiles, 3, side, side), all tiles of all pictures, each global view first.
            image_grid_hw: (pictures, 2), rows and columns of local tiles; squares need none.

        Returns:
            `pooler_output`: one (tokens, hidden) tensor per picture.

        Raises:
            TypeError, ValueError: the grids don't fit the tiles, or pixels aren't finite floats.
        """
        grids = check_grids(self.config, pixel_values, image_grid_hw)
        check_finite(pixel_values)
        features = self.vit.encode_tiles(pixel_values)
        if self.config.is_tiled:
            with align_module_device(self):  # the newline vectors are ours, and may be offloaded
                pieces = self.vit.assemble(features, grids, self.plora_glb_GN, self.plora_sub_GN)
            counts = [len(piece) for piece in pieces]
            features = torch.cat(pieces)
        else:
            counts = [features.shape[1]] * len(grids)
            features = features.flatten(0, 1)
        projected = self.vision_proj(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=list(projected.split(counts))
        )


# ---- training in several processes ----


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's first weight is sharded across processes (FSDP2, DeepSpeed ZeRO-3).

    The weight is gathered for each call, so all processes must call the module equally often.
    """
    weight = next(module.parameters(), None)
    return hasattr(weight, "placements") or is_deepspeed_zero3_enabled()  # a DTensor has placements


def is_frozen(module: nn.Module) -> bool:
    """Whether none of the module's weights are trained."""
    return not any(weight.requires_grad for weight in module.parameters())


def must_see_pictures(model: nn.Module) -> bool:
    """Whether a training or evaluation batch without pictures must pass through the vision parts anyway.

    In training, each trained weight gets a gradient from every batch, zero if the batch holds no picture:
    other processes wait for it, and the optimiser treats every step alike.
    """
    if is_sharded(model.vit.last_layer):
        return True
    if not (model.training and torch.is_grad_enabled()):
        return False
    newlines = (getattr(model, name, None) for name in ("plora_glb_GN", "plora_sub_GN"))
    trained = any(newline is not None and newline.requires_grad for newline in newlines)
    return trained or not (is_frozen(model.vit) and is_frozen(model.vision_proj))


def blank_picture(config: InternLMXcomposer2Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest picture, of zeros: (tiles, 3, side, side) and its (1, 2) grid."""
    num_tiles = 2 if config.is_tiled else 1
    pixel_values = torch.zeros(num_tiles, 3, config.img_size, config.img_size, device=device)
    return pixel_values, torch.ones(1, 2, dtype=torch.long, device=device)


# ---- Partial LoRA ----


class LowRankUp(Linear):
    """The second of two low-rank factors (B): a separate class, because new ones start at zero."""

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """(rows, rank) -> (rows, out), added in place to `onto` (rows, out) if that is given."""
        return super().forward(x) if onto is None else add_product(onto, x, self.weight)

    def adds_in_place(self, x: Tensor, onto: Tensor) -> bool:
        """Whether the weight is a plain tensor of the same type as both, neither quantised nor sharded."""
        return type(self.weight.data) is Tensor and self.weight.dtype == x.dtype == onto.dtype


class PLoRA(nn.Module):
    """A linear layer whose low-rank weights act on image tokens only (Partial LoRA, arXiv:2401.16420).

    `y = W x` everywhere, plus `alpha / rank * B(A(dropout(x)))` on the tokens of pictures. Task adapters, if
    a checkpoint has them, act on all tokens in the inference mode that names them. The plain linear is a
    separate child, so that a quantiser or an adapter library can replace it without touching the rest.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        lora_r: int = 256,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.05,
        adapters: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)  # of the class that quantisers look for
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_scaling = (lora_r if lora_alpha is None else lora_alpha) / lora_r
        self.Plora_A = Linear(in_features, lora_r, bias=False)
        self.Plora_B = LowRankUp(lora_r, out_features, bias=False)
        for name, rank in (adapters or {}).items():
            self.add_module(f"lora_{name}_A", Linear(in_features, rank, bias=False))
            self.add_module(f"lora_{name}_B", LowRankUp(rank, out_features, bias=False))

    @property
    def weight(self) -> Tensor:
        """Weight of the plain linear."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the plain linear, if any."""
        return self.linear.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.linear.out_features

    def forward(
        self,
        x: Tensor,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        image_rows: Tensor | slice | None = None,
    ) -> Tensor:
        """(batch, tokens, in) -> (batch, tokens, out).

        Args:
            im_mask: (batch, tokens), true on image tokens; any dtype and device.
            infer_mode: `"base"`, `"write"` or `"web"`.
            image_rows: the same as `im_mask`, as indices into batch * tokens or as the one range they form;
                computed once per forward.
        """
        if image_rows is None and im_mask is not None:
            image_rows = image_row_indices(im_mask, x.device)
        low_rank = self._to_fold(x, image_rows) if isinstance(image_rows, slice) else None
        if low_rank is not None:
            output, image_rows = self.linear(x, low_rank), None
        else:
            output = self.linear(x)
        if image_rows is None and torch.is_grad_enabled() and self.Plora_A.weight.requires_grad:
            # Without pictures these weights get zero gradients, not `None`: other ranks may wait for them.
            image_rows = torch.empty(0, dtype=torch.long, device=x.device)
        if image_rows is not None:
            output = self._add_on_rows(output, x, image_rows)
        for name in ADAPTERS_OF_MODE[infer_mode]:
            output = self._add_low_rank(output, x, f"lora_{name}")
        return output

    def _to_fold(self, x: Tensor, rows: slice) -> LowRank | None:
        """The low-rank weights if the linear folds them into its own weight for these rows."""
        plain = type(self.Plora_A) is Linear and type(self.Plora_B) is LowRankUp
        if not plain or not hasattr(self.linear, "folds") or self.lora_dropout.training:
            return None
        low_rank = LowRank(self.Plora_B.weight, self.Plora_A.weight, self.lora_scaling, rows)
        return low_rank if self.linear.folds(x, low_rank) else None

    def _add_on_rows(self, output: Tensor, x: Tensor, rows: Tensor | slice) -> Tensor:
        """Add the low-rank product of some rows to them, in place unless gradients are needed."""
        x, flat = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        if torch.is_grad_enabled() and isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=x.device)
        if isinstance(rows, slice):
            self._add_low_rank(flat[rows], self.lora_dropout(x[rows]), "Plora", self.lora_scaling)
            return output
        rows = rows.to(x.device)
        low = self._scaled(self.Plora_A(self.lora_dropout(x[rows])), self.lora_scaling)
        delta = self.Plora_B(low).to(flat.dtype)
        add = flat.index_add if torch.is_grad_enabled() else flat.index_add_
        return add(0, rows, delta).view(output.shape)

    def _add_low_rank(self, output: Tensor, x: Tensor, name: str, scaling: float = 1.0) -> Tensor:
        """`output + scaling * B(A(x))`, as one product straight into `output` where possible."""
        up = getattr(self, f"{name}_B")
        low = self._scaled(getattr(self, f"{name}_A")(x), scaling)
        if torch.is_grad_enabled():
            return output + up(low)
        if isinstance(up, LowRankUp) and up.adds_in_place(low, output):
            flat = output.reshape(-1, output.shape[-1])
            up(low.reshape(-1, low.shape[-1]), onto=flat)
            return output
        return output.add_(up(low))

    @staticmethod
    def _scaled(low: Tensor, scaling: float) -> Tensor:
        """Scale while the tensor is narrow; most checkpoints have a scale of 1, which costs nothing."""
        return low if scaling == 1.0 else low * scaling


def image_row_indices(im_mask: Tensor | None, device: torch.device) -> Tensor | slice | None:
    """Where the image tokens are among batch * tokens rows, computed once for all linears of a forward.

    Args:
        im_mask: (batch, tokens) of any dtype.

    Returns:
        Indices on `device`; their range if they form one and no gradients are needed, which saves gathering
        and scattering; `None` if there are none.
    """
    if im_mask is None:
        return None
    rows = im_mask.to(device).bool().flatten().nonzero(as_tuple=True)[0]
    if not rows.numel():
        return None
    if not torch.is_grad_enabled():
        first, last = rows[[0, -1]].tolist()
        if last - first + 1 == rows.numel():
            return slice(first, last + 1)
    return rows


# ---- peft ----

# Names of our weights that contain "lora_": those of Partial LoRA, newline vectors and task adapters.
OWN_LOW_RANK = re.compile(r"Plora_|plora_|\.lora_\w+_[AB]\.")


def introduce_to_peft() -> None:
    """Let peft wrap a whole `PLoRA` if a target gives its published name (`attention.wqkv`).

    peft recognises linears by their class, and has `_register_custom_module` for others, per configuration.
    This calls it for every configuration that targets a `PLoRA`. The adapter then sits where the published
    training puts it, under the same names, acts on all tokens, and is all that trains. Does nothing until
    peft is imported.
    """
    lora = sys.modules.get("peft.tuners.lora")
    # Remote code makes copies of this file, each with its own class.
    if lora is None or PLoRA in (known := getattr(lora.LoraModel, "_plora_classes", ())):
        return
    create, mark = lora.LoraModel._create_new_module, lora.LoraModel._mark_only_adapters_as_trainable

    class PLoRAWithLora(lora.Linear):
        """peft's layer around a `PLoRA`."""

        def merge(self, *args, **kwargs) -> None:
            """Like the base class.

            Raises:
                ValueError: the plain weight is quantised.
            """
            weight = self.get_base_layer().weight
            if not (isinstance(weight, nn.Parameter) and weight.is_floating_point()):
                raise ValueError(
                    "an adapter can't be merged into quantised weights; load the checkpoint without "
                    "quantization_config and merge into that (GPTQ and AWQ: with dequantize=True)"
                )
            super().merge(*args, **kwargs)

    def create_new_module(lora_config, adapter_name: str, target: nn.Module, **kwargs) -> nn.Module:
        if not isinstance(target, PLoRA):
            return create(lora_config, adapter_name, target, **kwargs)
        lora_config._register_custom_module({PLoRA: PLoRAWithLora})
        with warnings.catch_warnings():
            # peft warns about any custom class, and reads the widths anyway.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            return create(lora_config, adapter_name, target, **kwargs)

    def mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        mark(self, model)
        if any(isinstance(module, PLoRA) for module in model.modules()):
            for name, weight in model.named_parameters():
                if OWN_LOW_RANK.search(name):  # peft before 0.21 takes any "lora_" to be its own
                    weight.requires_grad_(False)

    lora.LoraModel._create_new_module = staticmethod(create_new_module)
    lora.LoraModel._mark_only_adapters_as_trainable = mark_only_adapters_as_trainable
    lora.LoraModel._plora_classes = (*known, PLoRA)
