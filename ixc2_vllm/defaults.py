"""What an engine is set to when it loads a checkpoint of the family. Every vLLM process imports this."""

from pathlib import Path

from transformers import PreTrainedConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from . import NAME

logger = init_logger(f"vllm.{__name__}")

# Activations of which vLLM's fused layer has a version.
ACTIVATION = "silu"


class FamilyConfigParser(ConfigParserBase):
    """`--config-format ixc2`: reads a published checkpoint as it lies on disk, sizes by its weights.

    Needs no `--trust-remote-code`: the classes are those of the installed package.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs,
    ) -> tuple[dict, PreTrainedConfig]:
        """The content of `config.json` and the whole configuration.

        Raises:
            OSError: there is no `config.json`.
            ValueError: it describes another model.
        """
        from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import checkpoint_config

        hub_arguments = {"revision": revision, "token": kwargs.get("token")}
        fields, _ = PreTrainedConfig.get_config_dict(model, **hub_arguments)
        return fields, checkpoint_config(model, **hub_arguments)


class FamilyDefaults(VerifyAndUpdateConfig):
    """Settings that vLLM can't know, each only where the caller left it open."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """Our tokenizer and video reader, and no more positions than `chat` rotates alike.

        Raises:
            ValueError: something in the configuration has no counterpart in vLLM's layers.
        """
        config, text = model_config.hf_config, model_config.hf_text_config
        if text.hidden_act != ACTIVATION or text.bias:
            raise ValueError(
                f"vLLM's layers of this family have the activation {ACTIVATION} and no bias, but config.json "
                f"says {text.hidden_act!r} and bias {text.bias}"
            )
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = NAME
        if model_config.multimodal_config is not None and config.version == "2.5":
            media = model_config.multimodal_config.media_io_kwargs
            media["video"] = {"video_backend": NAME, **media.get("video", {})}
        limit_dynamic_positions(model_config, text)

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """The repetition penalty of `chat`, for whichever of vLLM's two runners is in use."""
        kind = "RunnerPenalty" if vllm_config.use_v2_model_runner else "BatchPenalty"
        name = f"{__package__}.penalty:{kind}"
        chosen = list(vllm_config.model_config.logits_processors or ())
        if vllm_config.speculative_config is None and name not in chosen:
            vllm_config.model_config.logits_processors = [*chosen, name]


def limit_dynamic_positions(model_config, text) -> None:
    """Stop at the trained positions, beyond which dynamic NTK rotates all keys anew for each length.

    A cache of pages that prompts share can't do that. A caller who asks for more gets one rotation for that
    length, so that shorter prompts differ from `chat` too.
    """
    trained = text.max_position_embeddings
    if text.rope_parameters.get("rope_type") != "dynamic" or model_config.max_model_len <= trained:
        return
    if model_config.original_max_model_len is None:
        model_config.max_model_len = trained
        return
    logger.warning(
        "max_model_len %d is beyond the %d trained positions: all prompts are rotated as one of that length, "
        "so that answers differ from those of `chat`",
        model_config.max_model_len,
        trained,
    )
