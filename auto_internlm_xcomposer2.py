"""Where the library finds the classes of this family: by `auto_map` in a file, or by the model type."""

from transformers.models.auto import modeling_auto

_CONFIG = "configuration_internlm_xcomposer2.InternLMXcomposer2Config"
_MODEL = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
_REWARD = "reward_internlm_xcomposer2.InternLMXComposer2ForSequenceClassification"
_PROCESSOR = "processing_internlm_xcomposer2.InternLMXComposer2Processor"
_IMAGE_PROCESSOR = "image_processor_internlm_xcomposer2.InternLMXComposer2ImageProcessor"
_TOKENIZER = "tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer"

MODEL_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)

# `auto_map` of each file that carries one. A reward model is no chat model, whichever class asks for it.
CONFIG_AUTO_MAP = {
    "AutoConfig": _CONFIG,
    **dict.fromkeys(MODEL_CLASSES, _MODEL),
    "AutoModelForSequenceClassification": _REWARD,
    "AutoProcessor": _PROCESSOR,
}
REWARD_AUTO_MAP = {**CONFIG_AUTO_MAP, **dict.fromkeys(MODEL_CLASSES, _REWARD)}
PROCESSOR_AUTO_MAP = {"AutoProcessor": _PROCESSOR}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": _IMAGE_PROCESSOR, "AutoProcessor": _PROCESSOR}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": [_TOKENIZER, None], "AutoProcessor": _PROCESSOR}


def announce_multimodal(model_type: str) -> None:
    """Name the model among those that read pictures, for pipelines and servers that choose by model type."""
    for table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
        getattr(modeling_auto, table, {}).setdefault(model_type, _MODEL.split(".")[1])
