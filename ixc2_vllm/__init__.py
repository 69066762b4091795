"""InternLM-XComposer2 on vLLM: a plugin that vLLM finds by its entry point once this package is installed.

Apart from `internlm_xcomposer2`, so that a process that serves another model imports nothing of the family.
"""

ARCHITECTURE = "InternLMXComposer2ForCausalLM"
NAME = "ixc2"  # of the configuration format, the tokenizer mode and the video backend


def register() -> None:
    """Tell vLLM, by names that it imports when it meets a checkpoint of the family, what runs it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser

    from .defaults import FamilyConfigParser, FamilyDefaults

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = FamilyDefaults
    TokenizerRegistry.tokenizers[NAME] = (f"{__name__}.renderer", "FamilyTokenizer")
    RENDERER_REGISTRY.renderers[NAME] = (f"{__name__}.renderer", "FamilyRenderer")
    try:
        get_config_parser(NAME)
    except ValueError:  # not registered in this process yet
        register_config_parser(NAME)(FamilyConfigParser)
