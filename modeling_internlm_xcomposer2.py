"""The whole model: pictures into the decoder's embeddings, `forward`, loading and saving."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import GENERATION_CONFIG_NAME, can_return_tuple, logging

from .build_mlp import (
    Projector,
    VisionMixin,
    blank_picture,
    leaves_autocast,
    must_see_pictures,
)
from .cache_internlm_xcomposer2 import CACHE, accepts_both_names
from .chat_internlm_xcomposer2 import ChatMixin
from .checkpoint_internlm_xcomposer2 import (
    asking_for_heads,
    check_divisible,
    check_loading,
    check_small_files,
    check_tensors,
    checkpoint_headers,
    choose_adapters,
    hub_arguments_in,
    packer_arguments,
    read_config,
    shapes_of,
    skeleton,
    tensor_parallel_size,
)
from .compose_internlm_xcomposer2 import ComposeMixin
from .configuration_internlm_xcomposer2 import (
    PUBLISHED_KEYS,
    InternLMXcomposer2Config,
    check_infer_mode,
    is_reward,
    our_name,
)
from .embedding_methods_internlm_xcomposer2 import EmbeddingMethodsMixin

# Names that clients import from this module.
from .embedding_methods_internlm_xcomposer2 import get_stopping_criteria as get_stopping_criteria
from .embedding_methods_internlm_xcomposer2 import image_extensions as image_extensions
from .embedding_methods_internlm_xcomposer2 import set_random_seed as set_random_seed
from .embedding_methods_internlm_xcomposer2 import video_extensions as video_extensions
from .files_internlm_xcomposer2 import blaming, finish_saving, saved_aside
from .generation_internlm_xcomposer2 import GenerateMixin
from .image_processing_internlm_xcomposer2 import (
    VisProcessor,
    check_grids,
    default_hd_num,
    tokens_of_grid,
)
from .ixc_utils import get_font
from .modeling_internlm2 import InternLM2Model, InternLM2PreTrainedModel, check_attention, check_ids
from .prompt_internlm_xcomposer2 import check_length, context_length
from .quantization_internlm_xcomposer2 import (
    Packing,
    add_to_config,
    check_savable,
    pack_linears,
    packing_fields,
    packing_to_read,
    quantizer_argument,
    settle_linears,
    settle_quantized,
    settle_saved_metadata,
    unpack_linears,
    unpacked_shapes,
)
from .reward_internlm_xcomposer2 import RewardMixin, last_positions, pairwise_loss
from .writing_internlm_xcomposer2 import WritingMixin

logger = logging.get_logger(__name__)


def _accept_published_names(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Let `load_state_dict` accept the published names too, as the checkpoints of a trainer have them."""
    for name in list(state_dict):
        if name.startswith(prefix) and (ours := our_name(name)) != name:
            state_dict[ours] = state_dict.pop(name)


def writes_alone(arguments: Mapping[str, object]) -> bool:
    """Whether this process is the one that writes, by the arguments of `save_pretrained`."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return (
        is_first
        and bool(arguments.get("is_main_process", True))
        and not arguments.get("distributed_checkpoint")
    )


class InternLMXComposer2Backbone(VisionMixin, EmbeddingMethodsMixin, InternLM2PreTrainedModel):
    """A checkpoint without its head: a vision tower, a projector and InternLM2 with Partial LoRA.

    Subclasses add a head and call `_finish_init`.

    Attributes:
        num_processes: how many processes the decoder is split across (tensor parallelism).
    """

    num_processes = 1

    config_class = InternLMXcomposer2Config
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_missing = [r"vit\..*\.post_layernorm\."]
    _keys_to_ignore_on_load_unexpected = [r"\.position_ids$", r"\.rotary_emb\.inv_freq$"]

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        check_attention(config)
        super().__init__(config)
        self._build_vision()
        if config.video_memory_size:
            self.video_mem_proj = Projector(config.video_memory_size, config.text_config.hidden_size)
        self.model = InternLM2Model(config.text_config)
        self.vis_processor = VisProcessor(None if config.is_tiled else config.img_size)
        self.tokenizer = None
        self.hd_num = config.hd_num
        self.max_length = config.max_length
        self.im_size = config.img_size
        self.vocab_size = config.text_config.vocab_size
        # Task adapters that the configuration doesn't name stay in the file.
        named = "|".join(config.text_config.task_adapters)
        self._keys_to_ignore_on_load_unexpected = [
            *self._keys_to_ignore_on_load_unexpected,
            rf"\.lora_(?!(?:{named})_)\w+_[AB]\.weight$",
        ]

    def _finish_init(self, packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None) -> None:
        """What comes after the head: the library's own steps, and a `PackedLinear` for each packed weight.

        Args:
            packed: how the weights of a file are packed, and the shapes of its tensors.
        """
        if packed is not None:
            pack_linears(self, *packed)
        self.register_load_state_dict_pre_hook(_accept_published_names)
        self.post_init()

    # ---- loading and saving ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        adapters: Sequence[str] | None = None,
        dequantize: bool = False,
        **kwargs,
    ):
        """Load a published checkpoint as it is, or one that `save_pretrained` wrote.

        Weights with a score head in place of the output head belong to a reward model: even if asked for a
        chat model, this returns an `InternLMXComposer2ForSequenceClassification`. The weights determine the
        version and the sizes that `config.json` leaves out. GPTQ and AWQ weights stay packed in memory.
        `quantization_config` quantises only the decoder's plain linears.

        Args:
            adapters: the inference modes (`"write"`, `"web"`) to load task adapters for, by default all that
                are there. Others take no memory, and their modes are rejected. `()` loads none.
            dequantize: unpack GPTQ and AWQ weights, as every process of several does anyway.

        Raises:
            ValueError: a tensor is missing, unknown or badly packed (they are listed), the directory holds
                another model, the quantiser can't work on this device, the model can't be split evenly across
                the processes (`tp_plan`, `distributed_config`), or `adapters` names a mode that the
                checkpoint lacks.
            FileNotFoundError: the directory holds no weights.
        """
        source = pretrained_model_name_or_path
        hub_arguments = hub_arguments_in(kwargs)
        if source is not None and os.path.isdir(source):
            finish_saving(Path(source, hub_arguments.get("subfolder") or ""))
        quantization = quantizer_argument(kwargs.pop("quantization_config", None), kwargs.get("device_map"))
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = read_config(cls.config_class, config or source, **kwargs)
            kwargs = {**kwargs, **hub_arguments}
        headers = checkpoint_headers(source, kwargs.get("state_dict"), **hub_arguments)
        shapes = shapes_of(headers)
        packing = packing_to_read(source, headers, config, quantization, hub_arguments)
        found = {} if packing is None else packer_arguments(source, kwargs, hub_arguments)
        if packing is not None:
            kwargs |= found
            model_args = ((packing, shapes), *model_args)
            shapes = unpacked_shapes(shapes, packing)
        kwargs["quantization_config"] = quantization
        with blaming(f"the weights in {source}"), asking_for_heads(source):
            config = config.complete_from_shapes(shapes)
        if packing is not None and hasattr(config, "quantization_config"):
            del config.quantization_config  # config is a copy; transformers would ask for packages to read it
        model_class = cls._class_for(shapes)
        num_processes = tensor_parallel_size(kwargs)
        check_divisible(config.text_config, num_processes)
        choose_adapters(config, adapters)
        accept_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        check_tensors(skeleton(model_class, config), headers, shapes, source, packing, accept_mismatch)
        if source is not None and not found and kwargs.get("generation_config") is None:
            check_small_files(source, (GENERATION_CONFIG_NAME,), **hub_arguments)
        kwargs["ignore_mismatched_sizes"] = True  # so that every fault is listed below, not only logged
        model, info = super(InternLMXComposer2Backbone, model_class).from_pretrained(
            None if found else source, *model_args, config=config, output_loading_info=True, **kwargs
        )
        check_loading({**info, "mismatched_keys": () if accept_mismatch else info["mismatched_keys"]}, source)
        model.num_processes = num_processes
        if packing is not None:
            settle_linears(model, headers)
        if dequantize or num_processes > 1:
            unpack_linears(model, model.dtype)
        if found:
            model.name_or_path = model.config.name_or_path = str(source)
        model._settle_generation_config()
        settle_quantized(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type["InternLMXComposer2Backbone"]:
        """The class that a checkpoint with these weights is loaded as."""
        return cls

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write the checkpoint, under the published names unless the weights are quantised.

        GPTQ and AWQ weights are written as they were read.

        It is written aside and then moved into place, so that a kill leaves what was there before. Weights of
        another form that were there (a single file, shards, `.bin`) are removed. With
        `distributed_checkpoint=True`, all processes write straight into the directory.

        Raises:
            ValueError: the quantised weights can't be saved; nothing is written.
            FileExistsError: the directory is a file, or another process is saving into it.
            OSError: the disk is full or can't be written to; nothing in the directory has changed.
        """
        fields = packing_fields(self)
        is_quantized = getattr(self, "hf_quantizer", None) is not None
        if is_quantized:
            check_savable(self)
        if is_quantized or fields is not None:
            kwargs["save_original_format"] = False
        if not writes_alone(kwargs):
            super().save_pretrained(save_directory, **kwargs)
        else:
            if kwargs.get("push_to_hub"):
                kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            with saved_aside(save_directory) as folder:
                super().save_pretrained(folder, **kwargs)
                if is_quantized:
                    settle_saved_metadata(folder)
                if fields is not None:
                    add_to_config(folder, {"quantization_config": fields})
        if self.num_processes > 1:
            torch.distributed.barrier()  # so that no process loads what the first one is still moving

    def dequantize(self, dtype: torch.dtype | None = None):
        """This model with plain weights in place of GPTQ's or AWQ's, by default of the model's type.

        Weights that a `quantization_config` quantised are the library's to unpack.
        """
        if packing_fields(self) is None:
            return super().dequantize(dtype)
        unpack_linears(self, dtype or self.dtype)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.is_tiled:
            for newline in (self.plora_glb_GN, self.plora_sub_GN):
                init.normal_(newline, std=self.config.text_config.initializer_range)

    def _settle_generation_config(self) -> None:
        """Correct what the files say about `generate`, in a model that has it."""

    # ---- parts that libraries ask for ----

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_embeddings = value

    def get_decoder(self) -> InternLM2Model:
        return self.model

    def set_decoder(self, decoder: InternLM2Model) -> None:
        self.model = decoder

    @property
    def input_device(self) -> torch.device:
        """Where prompts belong: with the embeddings, or where those are computed if they are offloaded."""
        device = self.model.tok_embeddings.weight.device
        if device.type != "meta":
            return device
        places = getattr(self, "hf_device_map", {}).values()
        return torch.device(next((place for place in places if place not in ("cpu", "disk")), "cpu"))

    @property
    def font(self):
        """The font of video labels: Pillow's own unless another was set."""
        return self.__dict__.get("_font") or get_font()

    @font.setter
    def font(self, value) -> None:
        self.__dict__["_font"] = value

    # ---- pictures ----

    def num_image_tokens(self, rows: int, cols: int) -> int:
        """Tokens of a picture whose local tiles form `rows` x `cols` (1 x 1 for a square)."""
        return tokens_of_grid(self.config, (rows, cols))

    def default_hd_num(self, num_pictures: int) -> int:
        """How many tiles each picture of a prompt may be cut into if the caller gives no number."""
        return default_hd_num(self.config, num_pictures)

    @leaves_autocast
    def embed_inputs(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids and pictures -> (batch, tokens, hidden) embeddings, (batch, tokens) mask of image tokens.

        Args:
            im_mask: where the image tokens are; by default, wherever `config.image_token_id` is.
            features: (tokens, hidden) of each picture, if they are known already, instead of pixels.

        Raises:
            TypeError, ValueError: no ids of the vocabulary, or the numbers of places and of the pictures'
                tokens differ.
        """
        check_ids(input_ids, self.config.text_config.vocab_size)
        if pixel_values is None and features is None:
            return self.model.tok_embeddings(input_ids), None
        im_mask = (
            input_ids == self.config.image_token_id
            if im_mask is None
            else im_mask.to(input_ids.device).bool()
        )
        if features is None:
            grids = check_grids(self.config, pixel_values, image_grid_hw)
            lengths = [self.num_image_tokens(*grid) for grid in grids]
        else:
            lengths = [len(picture) for picture in features]
        num_places = int(im_mask.sum())
        if num_places != sum(lengths):
            raise ValueError(
                f"the prompt reserves {num_places} image tokens but {len(lengths)} pictures give "
                f"{sum(lengths)}; check the <ImageHere> marks and image_grid_hw"
            )
        embeds = self.model.tok_embeddings(input_ids)
        if features is None:
            features = self.get_image_features(pixel_values, image_grid_hw).pooler_output
        features = torch.cat(list(features)).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(im_mask.to(embeds.device)[..., None], features), im_mask

    # ---- running ----

    def run_decoder(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        for_loss: bool,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Ids with pictures, or embeddings with a mask -> (batch, tokens, hidden) for a head.

        Args:
            for_loss: whether this is a training or evaluation batch, which every process runs alike.

        Raises:
            TypeError, ValueError: both or neither input, too many tokens, or pictures and prompt don't match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids, inputs_embeds and samples")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("inputs_embeds already hold the pictures; pass pixel_values with input_ids")
        if input_ids is not None:
            check_ids(input_ids, self.config.text_config.vocab_size)
        if kwargs.get("position_ids") is None:  # they can separate conversations that are packed into a row
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            check_length(tokens.shape[1] if tokens.ndim > 1 else 0, (), context_length(self.config))
        if inputs_embeds is None:
            self._check_pictures_present(input_ids, pixel_values, im_mask, cache)
            inputs_embeds, found = self.embed_inputs(input_ids, pixel_values, image_grid_hw, im_mask)
            im_mask = im_mask if found is None else found
        if for_loss and (im_mask is None or not im_mask.any()) and must_see_pictures(self):
            inputs_embeds = self._pass_blank_picture(inputs_embeds)
        return self.model(inputs_embeds=inputs_embeds, im_mask=im_mask, cache=cache, **kwargs)

    def _pass_blank_picture(self, inputs_embeds: Tensor) -> Tensor:
        """The same embeddings, but dependent on the vision parts, through a picture that isn't used."""
        picture = blank_picture(self.config, inputs_embeds.device)
        features = torch.cat(self.get_image_features(*picture).pooler_output)
        nowhere = torch.zeros_like(inputs_embeds, dtype=torch.bool)
        return inputs_embeds.masked_scatter(nowhere, features.to(inputs_embeds.device, inputs_embeds.dtype))

    def _check_pictures_present(
        self, input_ids: Tensor, pixel_values: Tensor | None, im_mask: Tensor | None, cache: Cache | None
    ) -> None:
        """A prompt with places for pictures but no pictures is a mistake; a generated image piece is not."""
        if pixel_values is not None or im_mask is not None or torch.compiler.is_compiling():
            return
        if cache is not None and cache.get_seq_length() > 0:
            return
        num_places = int((input_ids == self.config.image_token_id).sum())
        if num_places:
            raise ValueError(f"the prompt reserves {num_places} image tokens but no pixel_values were given")


class InternLMXComposer2ForCausalLM(
    ChatMixin, WritingMixin, ComposeMixin, GenerateMixin, InternLMXComposer2Backbone, GenerationMixin
):
    """InternLM-XComposer2, -VL, -4KHD and 2.5: the models that answer.

    Two kinds of input give the same numbers: ids with pictures (`input_ids`, `pixel_values`,
    `image_grid_hw`), and embeddings with a mask (`inputs_embeds`, `im_mask`).
    """

    _tp_plan = {"output": "colwise_gather_output"}

    def __init__(
        self,
        config: InternLMXcomposer2Config,
        packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._finish_init(packed)
        self._settle_generation_config()

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type[InternLMXComposer2Backbone]:
        return InternLMXComposer2ForSequenceClassification if is_reward(shapes) else cls

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    def _settle_generation_config(self) -> None:
        """Make `generate` stop at the end of a turn, which the published configurations leave out.

        The published `max_length` limits a prompt; it is not a default for how much is generated.
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

    @can_return_tuple
    @accepts_both_names
    @leaves_autocast
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
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
        """Ids with pictures, or embeddings with a mask -> logits, and the loss if there are labels.

        Args:
            input_ids: (batch, tokens), each picture a run of `config.image_token_id`.
            attention_mask: (batch, all tokens), false or 0 on padding, left or right, of any dtype.
            cache: what has already been computed; `past_key_values` is its older name.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`.
            pixel_values: (tiles, 3, side, side), all tiles of all pictures in the order of the prompt.
            image_grid_hw: (pictures, 2), rows and columns of local tiles.
            im_mask: (batch, tokens), true on image tokens; needed with `inputs_embeds` only.
            infer_mode: `"base"`, `"write"` or `"web"`: which task adapters act.
            labels: (batch, tokens), -100 where there should be no loss.
            use_cache: whether to keep keys and values; by default not if there are labels, so that
                `position_ids` that restart separate packed conversations.
            logits_to_keep: how many of the last positions get logits, 0 for all, or the positions.
            samples: a batch of the published trainer, instead of everything above; may name an `infer_mode`.
            num_items_in_batch: what the summed loss is divided by when `Trainer` accumulates gradients.

        Raises:
            ValueError: pictures and prompt don't match, or the checkpoint lacks what `infer_mode` needs.
        """
        if samples is not None:
            infer_mode = samples.get("infer_mode", infer_mode)
        check_infer_mode(infer_mode, self.config.text_config)
        if samples is not None:
            inputs_embeds, attention_mask, labels, im_mask = self.embed_samples(samples)
            input_ids = pixel_values = None
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.run_decoder(
            input_ids,
            inputs_embeds,
            pixel_values,
            image_grid_hw,
            im_mask,
            cache,
            for_loss=labels is not None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            infer_mode=infer_mode,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits = self.output(hidden)
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
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class InternLMXComposer2ForSequenceClassification(RewardMixin, InternLMXComposer2Backbone):
    """The model with a score head in place of the output head.

    Trained on pairs of answers (`samples`, or `pairwise_loss` of the logits), it is a reward model. A chat
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

    def __init__(
        self,
        config: InternLMXcomposer2Config,
        packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self._finish_init(packed)

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type[InternLMXComposer2Backbone]:
        if "score.weight" not in shapes:
            logger.warning(
                "this checkpoint has no score head: score.weight is new, and its scores mean nothing until "
                "the model is trained"
            )
        return cls

    @can_return_tuple
    @accepts_both_names
    @leaves_autocast
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
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
            attention_mask: (batch, tokens), false or 0 on padding, left or right. Without it, everything
                after the last token of `input_ids` that is not padding counts as padding.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`, with `im_mask` where pictures are.
            pixel_values, image_grid_hw: as in the chat model.
            labels: (batch,), for transformers' own losses, by `config.problem_type` and `config.num_labels`.
            samples: a batch of the published trainer, instead of everything above, as in `embed_pairs`.

        Returns:
            `logits` (batch, labels). With `samples` they are (2 x pairs, 1), alternately chosen and rejected,
            and `loss` is their `pairwise_loss`.

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
            cache,
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
        hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        logits = self.score(hidden)
        loss = pairwise_loss(logits) if samples is not None else None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# transformers renames keys by class when loading and, the other way round, when saving.
for _class in (InternLMXComposer2ForCausalLM, InternLMXComposer2ForSequenceClassification):
    _renamings = [WeightRenaming(*pair) for pair in PUBLISHED_KEYS.items()]
    register_checkpoint_conversion_mapping(_class.__name__, _renamings, overwrite=True)
