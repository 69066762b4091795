"""The InternLM-XComposer2 family of vision-language models on transformers 5.

Importing this package registers its classes, so that `AutoModel.from_pretrained` and its siblings read the
published checkpoints with this code instead of the code that lies beside them.
"""

import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .auto_internlm_xcomposer2 import MODEL_CLASSES
from .configuration_internlm_xcomposer2 import (
    PUBLISHED_MODEL_TYPES,
    InternLMXcomposer2Config,
    InternLMXcomposer2TextConfig,
)
from .image_processor_internlm_xcomposer2 import InternLMXComposer2ImageProcessor
from .modeling_internlm2 import InternLM2Model
from .modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from .processing_internlm_xcomposer2 import InternLMXComposer2Processor
from .reward_internlm_xcomposer2 import InternLMXComposer2ForSequenceClassification
from .tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer

__all__ = [
    "InternLM2Model",
    "InternLMXComposer2ForCausalLM",
    "InternLMXComposer2ForSequenceClassification",
    "InternLMXComposer2ImageProcessor",
    "InternLMXComposer2Processor",
    "InternLMXComposer2Tokenizer",
    "InternLMXcomposer2Config",
    "InternLMXcomposer2TextConfig",
]


class _PublishedConfig(InternLMXcomposer2Config):
    """Reads a published file whose `model_type` is that of the text-only decoder."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """An `InternLMXcomposer2Config`.

        Raises:
            ValueError: the file describes a text-only InternLM, which shares these model types.
        """
        architectures = config_dict.get("architectures") or []
        if architectures and not any(name.startswith("InternLMXComposer2") for name in architectures):
            raise ValueError(
                f"{', '.join(architectures)} is no InternLM-XComposer2 but shares its model type "
                f"{config_dict.get('model_type')!r}; load it in a process that has not imported "
                "internlm_xcomposer2"
            )
        return InternLMXcomposer2Config.from_dict(config_dict, **kwargs)


def _register() -> None:
    for model_type in PUBLISHED_MODEL_TYPES:
        config_class = InternLMXcomposer2Config
        if model_type != config_class.model_type:
            config_class = type("_PublishedConfig", (_PublishedConfig,), {"model_type": model_type})
        AutoConfig.register(model_type, config_class, exist_ok=True)
    for name in MODEL_CLASSES:
        auto_class = getattr(transformers, name)
        auto_class.register(InternLMXcomposer2Config, InternLMXComposer2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        InternLMXcomposer2Config, InternLMXComposer2ForSequenceClassification, exist_ok=True
    )
    AutoTokenizer.register(
        InternLMXcomposer2Config, slow_tokenizer_class=InternLMXComposer2Tokenizer, exist_ok=True
    )
    AutoImageProcessor.register(
        InternLMXcomposer2Config,
        image_processor_classes={"pil": InternLMXComposer2ImageProcessor},
        exist_ok=True,
    )
    AutoProcessor.register(InternLMXcomposer2Config, InternLMXComposer2Processor, exist_ok=True)


if __name__ == "internlm_xcomposer2":  # pytest imports the same file under the name of its directory
    _register()
