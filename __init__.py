"""The InternLM-XComposer2 family of vision-language models on transformers 5.

Importing this package registers its classes, so that `AutoModel.from_pretrained` and its siblings read the
published checkpoints with this code rather than the code that ships with them.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_internlm_xcomposer import InternLMXComposerConfig
from .configuration_internlm_xcomposer2 import (
    MODEL_CLASSES,
    PUBLISHED_MODEL_TYPES,
    InternLMXcomposer2Config,
    InternLMXcomposer2TextConfig,
)
from .files_internlm_xcomposer2 import (
    CONFIG_KINDS,
    SMALL_FILES,
    blaming,
    check_fields,
    check_small_files_in,
    read_fields,
)
from .image_processing_internlm_xcomposer2 import InternLMXComposer2ImageProcessor
from .ixc_utils import draw_boxes, parse_boxes
from .llamacpp.model import from_gguf
from .modeling_internlm2 import InternLM2Model
from .modeling_internlm_xcomposer import InternLMXComposerForCausalLM
from .modeling_internlm_xcomposer2 import (
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2ForSequenceClassification,
)
from .processing_internlm_xcomposer2 import InternLMXComposer2Processor
from .tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer, InternLMXComposerTokenizer

__all__ = [
    "InternLM2Model",
    "InternLMXComposer2ForCausalLM",
    "InternLMXComposer2ForSequenceClassification",
    "InternLMXComposer2ImageProcessor",
    "InternLMXComposer2Processor",
    "InternLMXComposer2Tokenizer",
    "InternLMXComposerConfig",
    "InternLMXComposerForCausalLM",
    "InternLMXComposerTokenizer",
    "InternLMXcomposer2Config",
    "InternLMXcomposer2TextConfig",
    "draw_boxes",
    "parse_boxes",
    "from_gguf",
]


def _register() -> None:
    second, first = InternLMXcomposer2Config, InternLMXComposerConfig
    _register_classes(second, InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer)
    _register_classes(first, InternLMXComposerForCausalLM, InternLMXComposerTokenizer)
    AutoModelForSequenceClassification.register(
        second, InternLMXComposer2ForSequenceClassification, exist_ok=True
    )


def _register_classes(config_class: type, model_class: type, tokenizer_class: type) -> None:
    """Let the Auto classes find those of one generation; it shares the processors with the other."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name in MODEL_CLASSES:
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    AutoTokenizer.register(config_class, slow_tokenizer_class=tokenizer_class, exist_ok=True)
    AutoImageProcessor.register(
        config_class, image_processor_classes={"pil": InternLMXComposer2ImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(config_class, InternLMXComposer2Processor, exist_ok=True)


def _recognise_published() -> None:
    """Let `AutoConfig` read published checkpoints whose model type is that of the text-only decoder.

    Those types can't be registered: text-only checkpoints, which need their own code, use them too.
    """
    read = AutoConfig.from_pretrained.__func__

    @functools.wraps(read)
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        source = pretrained_model_name_or_path
        own = {name: value for name, value in kwargs.items() if name not in _OF_REMOTE_CODE}
        if not is_published(source, **own):
            return read(cls, source, **kwargs)
        return InternLMXcomposer2Config.from_pretrained(source, name_or_path=os.fspath(source), **own)

    AutoConfig.from_pretrained = classmethod(from_pretrained)


_OF_REMOTE_CODE = ("trust_remote_code", "code_revision")


def is_published(source: str | os.PathLike, **kwargs) -> bool:
    """Whether a `config.json` belongs to a checkpoint of this family under another model type.

    Args:
        kwargs: those of `AutoConfig.from_pretrained`, except the two about remote code.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
        model_type = fields.get("model_type")
    except Exception:  # AutoConfig reports whatever is wrong with it
        return False
    if model_type not in PUBLISHED_MODEL_TYPES[1:]:
        return model_type == PUBLISHED_MODEL_TYPES[0]
    auto_map, architectures = fields.get("auto_map") or {}, fields.get("architectures") or ()
    listed = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [*(architectures if isinstance(architectures, list) else ()), *listed]
    return not names or any(
        str(name).split(".")[-1].lower().startswith("internlmxcomposer2") for name in names
    )


def _name_files() -> None:
    """Let the `Auto` classes name the file that is wrong in a directory, in place of what came of it.

    They read some files themselves, before any class of this package is asked.
    """
    for kind in (AutoConfig, AutoTokenizer, AutoImageProcessor, AutoProcessor):
        kind.from_pretrained = classmethod(_naming_files(kind.from_pretrained.__func__))


def _naming_files(read: Callable) -> Callable:
    @functools.wraps(read)
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        try:
            return read(cls, pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            try:
                check_files(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
            except ValueError as fault:
                raise fault from error
            raise

    return from_pretrained


def check_files(folder: Path) -> None:
    """Raise `ValueError` for JSON files without fields, or with wrong ones in a checkpoint of this family."""
    paths = [folder / name for name in ("config.json", *SMALL_FILES) if name.endswith(".json")]
    fields = {path.name: read_fields(path) for path in paths if path.is_file()}
    if fields.get("config.json", {}).get("model_type") in PUBLISHED_MODEL_TYPES:
        with blaming(folder / "config.json"):
            check_fields(fields["config.json"], CONFIG_KINDS)
        check_small_files_in(folder)


if __name__ == "internlm_xcomposer2":  # pytest imports the same file under the name of its directory
    _register()
    _recognise_published()
    _name_files()
