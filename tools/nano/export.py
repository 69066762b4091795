"""Writes a trained stage as a model: `python -m tools.nano.export --checkpoint runs/joint/best --out .`"""

import argparse
from pathlib import Path

import torch
from internlm_xcomposer2.configuration_internlm_xcomposer2 import CONFIG_AUTO_MAP
from internlm_xcomposer2.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from .model import make_config
from .samples import END_OF_TURN
from .stages import WEIGHTS

TASK_ADAPTERS = {"sft": 8, "dpo": 8, "web": 16}  # ranks; what write_artical and write_webpage learn


def export(checkpoint: Path, root: Path, out: Path, adapters: bool = False) -> None:
    """Writes `config.json`, `generation_config.json` and the weights, in float32, into `out`.

    `checkpoint` is the folder of a stage's weights, which `adapters` gives new adapters that do nothing yet,
    or that of a model whose adapters were trained.
    """
    if (checkpoint / "config.json").exists():
        model = InternLMXComposer2ForCausalLM.from_pretrained(checkpoint)
    else:
        model = model_of(load_file(checkpoint / WEIGHTS), root, TASK_ADAPTERS if adapters else {})
    model.config.auto_map = dict(CONFIG_AUTO_MAP)
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # the whole configuration has one
    model.float().save_pretrained(out)


def model_of(
    state: dict[str, Tensor], root: Path, task_adapters: dict[str, int]
) -> InternLMXComposer2ForCausalLM:
    """The model of a stage's checkpoint, with new task adapters of these ranks."""
    pieces = SentencePieceProcessor(model_file=str(root / "tokenizer.model"))
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    torch.manual_seed(0)
    model = InternLMXComposer2ForCausalLM(make_config(pieces, task_adapters))
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "_B." in name:
            nn.init.zeros_(parameter)
    found = model.load_state_dict(weights, strict=False)
    wrong = [key for key in found.missing_keys if ".lora_" not in key] + found.unexpected_keys
    if wrong:
        raise ValueError(f"the checkpoint and the model differ in {', '.join(wrong)}")
    model.generation_config.eos_token_id = [pieces.eos_id(), pieces.piece_to_id(END_OF_TURN)]
    model.generation_config.do_sample = False
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder of a stage's weights, or of a model"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the package and its tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", action="store_true", help="with task adapters to be trained")
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.root, arguments.out, arguments.adapters)


if __name__ == "__main__":
    main()
