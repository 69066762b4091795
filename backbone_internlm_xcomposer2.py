"""What the models of both generations share: how a checkpoint becomes a model and files again, where its
inputs belong, and how pictures take their places among the embeddings.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from .build_mlp import blank_picture, leaves_autocast
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
from .files_internlm_xcomposer2 import blaming, finish_saving, saved_aside
from .image_processing_internlm_xcomposer2 import check_grids, default_hd_num, tokens_of_grid
from .inputs_internlm_xcomposer2 import check_ids, check_image_mask
from .packing_internlm_xcomposer2 import packing_to_read, unpacked_shapes
from .prompt_internlm_xcomposer2 import check_length, context_length
from .quantization_internlm_xcomposer2 import (
    FULL_PRECISION_MODULES,
    add_to_config,
    check_savable,
    packing_fields,
    quantizer_argument,
    settle_linears,
    settle_quantized,
    settle_saved_metadata,
    unpack_linears,
)


def writes_alone(arguments: Mapping[str, object]) -> bool:
    """Whether this process is the one that writes, by the arguments of `save_pretrained`."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return (
        is_first
        and bool(arguments.get("is_main_process", True))
        and not arguments.get("distributed_checkpoint")
    )


class BackboneMixin:
    """Loading, saving and the inputs of a model. Goes before transformers' own base class.

    Needs `get_image_features`, and the hooks `_decode` and `_must_see_pictures`.

    Attributes:
        num_processes: how many processes the decoder is split across (tensor parallelism).
        full_precision_modules: what no quantiser touches.
        may_be_mapped: whether weights may still be those of a mapped file; the first call of `generate` moves
            those that each step reads into memory.
    """

    num_processes = 1
    may_be_mapped = False
    full_precision_modules = FULL_PRECISION_MODULES

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
        quantization = kwargs.pop("quantization_config", None)
        quantization = quantizer_argument(quantization, kwargs.get("device_map"), cls.full_precision_modules)
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
            config = cls._complete_config(config, shapes, kwargs)
        if packing is not None and hasattr(config, "quantization_config"):
            del config.quantization_config  # config is a copy; transformers would ask for packages to read it
        model_class = cls._class_for(shapes)
        num_processes = tensor_parallel_size(kwargs)
        check_divisible(config.text_config, num_processes)
        choose_adapters(config, adapters)
        accept_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        read = cls._shapes_to_read(config, shapes)
        check_tensors(skeleton(model_class, config), headers, read, source, packing, accept_mismatch)
        if source is not None and not found and kwargs.get("generation_config") is None:
            check_small_files(source, (GENERATION_CONFIG_NAME,), **hub_arguments)
        kwargs["ignore_mismatched_sizes"] = True  # so that every fault is listed below, not only logged
        model, info = super(BackboneMixin, model_class).from_pretrained(
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
        model._settle_loaded()
        settle_quantized(model)
        model.may_be_mapped = True
        return (model, info) if output_loading_info else model

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type["BackboneMixin"]:
        """The class that a checkpoint with these weights is loaded as."""
        return cls

    @classmethod
    def _complete_config(cls, config, shapes: Mapping[str, tuple[int, ...]], kwargs: dict):
        """A copy with what the weights determine; a class takes its own arguments out of `kwargs`."""
        return config.complete_from_shapes(shapes)

    @classmethod
    def _shapes_to_read(cls, config, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        """The tensors of a file as they are when they have been read into a model."""
        return shapes

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

    def _settle_loaded(self) -> None:
        """Correct what the files say, once the weights are there."""
        self._settle_generation_config()

    def _settle_generation_config(self) -> None:
        """Correct what the files say about `generate`, in a model that has it."""

    # ---- where inputs belong ----

    @property
    def input_device(self) -> torch.device:
        """Where prompts belong: with the embeddings, or where those are computed if they are offloaded."""
        device = self.get_input_embeddings().weight.device
        if device.type != "meta":
            return device
        places = getattr(self, "hf_device_map", {}).values()
        return torch.device(next((place for place in places if place not in ("cpu", "disk")), "cpu"))

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
        check_image_mask(im_mask, input_ids)
        if pixel_values is None and features is None:
            return self.get_input_embeddings()(input_ids), None
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
        embeds = self.get_input_embeddings()(input_ids)
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
        if kwargs.get("position_ids") is None:  # they can separate conversations that are packed into a row
            shape = getattr(input_ids if inputs_embeds is None else inputs_embeds, "shape", ())
            check_length(shape[1] if len(shape) > 1 else 0, (), context_length(self.config))
        if inputs_embeds is None:
            inputs_embeds, found = self.embed_inputs(input_ids, pixel_values, image_grid_hw, im_mask)
            self._check_pictures_present(input_ids, pixel_values, im_mask, cache)
            im_mask = im_mask if found is None else found
        if for_loss and (im_mask is None or not im_mask.any()) and self._must_see_pictures():
            inputs_embeds = self._pass_blank_picture(inputs_embeds)
        return self._decode(inputs_embeds=inputs_embeds, im_mask=im_mask, cache=cache, **kwargs)

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
