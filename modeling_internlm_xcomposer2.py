"""The whole model: pictures into the decoder's embeddings, `forward`, loading and saving."""

import os
from collections.abc import Sequence

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .build_mlp import build_projector, build_vision_projector, build_vision_tower
from .chat_internlm_xcomposer2 import ChatMixin
from .checkpoint_internlm_xcomposer2 import (
    asking_for_heads,
    check_loading,
    checkpoint_shapes,
    choose_adapters,
    hub_arguments_in,
    read_config,
)
from .configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from .embedding_methods_internlm_xcomposer2 import EmbeddingMethodsMixin

# Names that clients import from this module.
from .embedding_methods_internlm_xcomposer2 import get_stopping_criteria as get_stopping_criteria
from .embedding_methods_internlm_xcomposer2 import image_extensions as image_extensions
from .embedding_methods_internlm_xcomposer2 import set_random_seed as set_random_seed
from .embedding_methods_internlm_xcomposer2 import video_extensions as video_extensions
from .generation_internlm_xcomposer2 import GenerateMixin
from .image_processing_internlm_xcomposer2 import VisProcessor
from .ixc_utils import get_font
from .modeling_internlm2 import (
    InternLM2Model,
    InternLM2PreTrainedModel,
    check_attention,
    check_infer_mode,
)
from .packed_internlm_xcomposer2 import loading_arguments
from .parallel_internlm_xcomposer2 import check_divisible, check_gatherable, tensor_parallel_size
from .quantization_internlm_xcomposer2 import quantizer_argument, saving_quantized, settle_quantized
from .training_internlm_xcomposer2 import blank_picture, must_see_pictures
from .visual_internlm_xcomposer2 import check_grids, num_tokens_of_grid
from .writing_internlm_xcomposer2 import WritingMixin

# Published names of the decoder's linears -> ours, whose plain linear is a child; and back at saving.
PUBLISHED_KEYS = {r"\.(wqkv|wo|w1|w2|w3)\.weight": r".\1.linear.weight"}


class InternLMXComposer2ForCausalLM(
    ChatMixin,
    WritingMixin,
    EmbeddingMethodsMixin,
    GenerateMixin,
    InternLM2PreTrainedModel,
    GenerationMixin,
):
    """InternLM-XComposer2, -VL, -4KHD and 2.5: a vision tower, a projector and InternLM2 with Partial LoRA.

    Two ways in give the same numbers: ids with pictures (`input_ids`, `pixel_values`, `image_grid_hw`), and
    embeddings with a mask (`inputs_embeds`, `im_mask`).
    """

    config_class = InternLMXcomposer2Config
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_missing = [r"vit\..*\.post_layernorm\."]
    _keys_to_ignore_on_load_unexpected = [r"\.position_ids$", r"\.rotary_emb\.inv_freq$"]
    _tp_plan = {"output": "colwise_gather_output"}

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        check_attention(config)
        super().__init__(config)
        # In the order of computation, in which `device_map="auto"` fills the devices.
        self.vit = build_vision_tower(config)
        self.vision_proj = build_vision_projector(config)
        if config.is_tiled:
            width = config.projector_input_size
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, width))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        if config.video_memory_size:
            self.video_mem_proj = build_projector(config.video_memory_size, config.text_config.hidden_size)
        self.model = InternLM2Model(config.text_config)
        self.output = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vis_processor = VisProcessor(None if config.is_tiled else config.img_size)
        self.tokenizer = None
        self.hd_num = config.hd_num
        self.max_length = config.max_length
        self.im_size = config.img_size
        self.vocab_size = config.text_config.vocab_size
        skipped = getattr(config, "_skipped_adapters", ())
        self._keys_to_ignore_on_load_unexpected = [
            *self._keys_to_ignore_on_load_unexpected,
            *(rf"\.lora_{name}_[AB]\.weight$" for name in skipped),
        ]
        self._weight_conversions = [WeightRenaming(*pair) for pair in PUBLISHED_KEYS.items()]
        self.post_init()
        self._settle_generation_config()

    # ---- loading and saving ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        adapters: Sequence[str] | None = None,
        **kwargs,
    ):
        """Load a published checkpoint as it lies on disk, or one that `save_pretrained` wrote.

        Sizes that `config.json` leaves out, and the version, are what the weights say. GPTQ and AWQ weights
        are unpacked. `quantization_config` quantises the decoder's plain linears alone.

        Args:
            adapters: for which inference modes (`"write"`, `"web"`) to load the task adapters, all that are
                there by default. Others take no memory, and their modes are refused. `()` loads none.

        Raises:
            ValueError: a tensor is missing, unknown or badly packed (they are listed), the directory holds
                another model, the quantiser can't work on this device, the processes that are to share the
                model (`tp_plan`, `distributed_config`) can't do so evenly, or `adapters` names a mode that
                the checkpoint lacks.
            FileNotFoundError: the directory holds no weights.
        """
        source = pretrained_model_name_or_path
        hub_arguments = hub_arguments_in(kwargs)
        quantization = quantizer_argument(kwargs.pop("quantization_config", None), kwargs.get("device_map"))
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = read_config(cls.config_class, config or source, **kwargs)
            kwargs = {**kwargs, **hub_arguments}
        shapes = checkpoint_shapes(source, kwargs.get("state_dict"), **hub_arguments)
        path, shapes, config, kwargs = loading_arguments(source, shapes, config, quantization, kwargs)
        kwargs["key_mapping"] = {**PUBLISHED_KEYS, **(kwargs.get("key_mapping") or {})}
        kwargs["quantization_config"] = quantization
        with asking_for_heads(source):
            config = config.complete_from_shapes(shapes)
        check_divisible(config.text_config, tensor_parallel_size(kwargs))
        config._skipped_adapters = choose_adapters(config, adapters)
        accept_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that every fault is listed below, not only logged
        model, info = super().from_pretrained(
            path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        check_loading({**info, "mismatched_keys": () if accept_mismatch else info["mismatched_keys"]}, source)
        del model.config._skipped_adapters  # of this checkpoint, and not of one that is saved from here
        model._settle_generation_config()
        model.name_or_path = model.config.name_or_path = str(source or "")
        settle_quantized(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write the checkpoint, under the published names where the weights are not quantised.

        Raises:
            ValueError: the quantised weights have no form in a file, or this transformers can't put together
                what several processes share; nothing is written.
        """
        check_gatherable(self)
        if getattr(self, "hf_quantizer", None) is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        with saving_quantized(self):
            super().save_pretrained(save_directory, **{**kwargs, "save_original_format": False})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.is_tiled:
            for newline in (self.plora_glb_GN, self.plora_sub_GN):
                init.normal_(newline, std=self.config.text_config.initializer_range)

    def _settle_generation_config(self) -> None:
        """Let `generate` stop at the end of a turn, which the published configurations leave out.

        The published `max_length` limits a prompt; it is no default for how much is generated.
        """
        if self.generation_config.max_length == self.config.max_length:
            self.generation_config.max_length = None
        if self.config.end_token_id >= self.config.text_config.vocab_size:
            return
        stops = self.generation_config.eos_token_id
        stops = self.config.eos_token_id if stops is None else stops
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        if self.config.end_token_id not in stops:
            self.generation_config.eos_token_id = [*stops, self.config.end_token_id]

    # ---- parts that libraries ask for ----

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    def get_decoder(self) -> InternLM2Model:
        return self.model

    def set_decoder(self, decoder: InternLM2Model) -> None:
        self.model = decoder

    @property
    def input_device(self) -> torch.device:
        """Where prompts belong: with the embeddings, or where they are computed while they are offloaded."""
        device = self.model.tok_embeddings.weight.device
        if device.type == "meta":
            hook = getattr(self.model.tok_embeddings, "_hf_hook", None)
            device = torch.device(getattr(hook, "execution_device", None) or "cpu")
        return device

    @property
    def font(self):
        """The font of video labels: Pillow's own unless another was set."""
        return self.__dict__.get("_font") or get_font()

    @font.setter
    def font(self, value) -> None:
        self.__dict__["_font"] = value

    # ---- pictures ----

    def num_image_tokens(self, rows: int, cols: int) -> int:
        """Tokens of one picture whose local tiles form `rows` x `cols` (1 x 1 for a square)."""
        return num_tokens_of_grid(self.config, rows, cols)

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
            ValueError: the grids don't fit the tiles.
        """
        grids = check_grids(self.config, pixel_values, image_grid_hw)
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

    def embed_inputs(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids and pictures -> (batch, tokens, hidden) embeddings, (batch, tokens) mask of image tokens.

        Args:
            im_mask: where the image tokens are, if not wherever `config.image_token_id` stands.

        Raises:
            ValueError: the places and the pictures' tokens differ in number.
        """
        if pixel_values is None:
            return self.model.tok_embeddings(input_ids), None
        im_mask = (
            input_ids == self.config.image_token_id
            if im_mask is None
            else im_mask.to(input_ids.device).bool()
        )
        grids = check_grids(self.config, pixel_values, image_grid_hw)
        num_features = sum(self.num_image_tokens(*grid) for grid in grids)
        num_places = int(im_mask.sum())
        if num_places != num_features:
            raise ValueError(
                f"the prompt reserves {num_places} image tokens but {len(grids)} pictures give "
                f"{num_features}; check the <ImageHere> marks and image_grid_hw"
            )
        embeds = self.model.tok_embeddings(input_ids)
        features = torch.cat(self.get_image_features(pixel_values, image_grid_hw).pooler_output)
        features = features.to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(im_mask.to(embeds.device)[..., None], features), im_mask

    # ---- running ----

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
        infer_mode: str = "base",
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        samples: dict | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Ids with pictures, or embeddings with a mask -> logits, and the loss where there are labels.

        Args:
            input_ids: (batch, tokens), each picture a run of `config.image_token_id`.
            attention_mask: (batch, all tokens), false or 0 on padding, left or right, of any dtype.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`.
            pixel_values: (tiles, 3, side, side), all tiles of all pictures in the order of the prompt.
            image_grid_hw: (pictures, 2), rows and columns of local tiles.
            im_mask: (batch, tokens), true on image tokens; needed with `inputs_embeds` only.
            infer_mode: `"base"`, `"write"` or `"web"`: which task adapters act.
            labels: (batch, tokens), -100 where no loss is wanted.
            use_cache: whether keys and values are kept; by default not where there are labels, so that
                `position_ids` that restart set packed conversations apart.
            logits_to_keep: how many of the last positions get logits, 0 for all, or the positions.
            samples: a batch of the published trainer, instead of everything above; may name an `infer_mode`.
            num_items_in_batch: what the summed loss is divided by, where `Trainer` accumulates gradients.

        Raises:
            ValueError: pictures and prompt don't match, or the checkpoint lacks what `infer_mode` needs.
        """
        if samples is not None:
            infer_mode = samples.get("infer_mode", infer_mode)
        check_infer_mode(infer_mode, self.config.text_config)
        if samples is not None:
            inputs_embeds, attention_mask, labels, im_mask = self.embed_samples(samples)
        elif (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids, inputs_embeds and samples")
        elif inputs_embeds is not None and pixel_values is not None:
            raise ValueError("inputs_embeds hold the pictures already; give pixel_values with input_ids")
        elif inputs_embeds is None:
            self._check_pictures_present(input_ids, pixel_values, im_mask, past_key_values)
            inputs_embeds, found = self.embed_inputs(input_ids, pixel_values, image_grid_hw, im_mask)
            im_mask = im_mask if found is None else found
        if labels is not None and (im_mask is None or not im_mask.any()) and must_see_pictures(self):
            inputs_embeds = self._pass_blank_picture(inputs_embeds)
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            im_mask=im_mask,
            infer_mode=infer_mode,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pass_blank_picture(self, inputs_embeds: Tensor) -> Tensor:
        """The same embeddings, computed from the vision parts too: a picture of which no token is used."""
        picture = blank_picture(self.config, inputs_embeds.device)
        features = torch.cat(self.get_image_features(*picture).pooler_output)
        nowhere = torch.zeros_like(inputs_embeds, dtype=torch.bool)
        return inputs_embeds.masked_scatter(nowhere, features.to(inputs_embeds.device, inputs_embeds.dtype))

    def _check_pictures_present(
        self, input_ids: Tensor, pixel_values: Tensor | None, im_mask: Tensor | None, cache: Cache | None
    ) -> None:
        """A prompt with places for pictures but no pictures is a mistake; a generated piece is not."""
        if pixel_values is not None or im_mask is not None or torch.compiler.is_compiling():
            return
        if cache is not None and cache.get_seq_length() > 0:
            return
        num_places = int((input_ids == self.config.image_token_id).sum())
        if num_places:
            raise ValueError(f"the prompt reserves {num_places} image tokens but no pixel_values were given")
