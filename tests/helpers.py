"""Shared by the tests: where the goldens are, checkpoints made from their recipe, and small models."""

import hashlib
import json
import os
import shutil
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ROOT = HERE.parent
FAMILIES = ("2", "vl", "4khd", "2d5", "2d5-ol")
VERSION_OF_FAMILY = {"2": "2", "vl": "2", "4khd": "2-4khd", "2d5": "2.5", "2d5-ol": "2.5"}


def golden_directory() -> Path:
    """The full set of goldens if `IXC2_GOLDEN` names one, else the part in the repository."""
    return Path(os.environ.get("IXC2_GOLDEN") or HERE / "golden")


def published_tokenizer() -> Path | None:
    """The sentencepiece model of the published checkpoints, if `IXC2_TOKENIZER` names it."""
    path = os.environ.get("IXC2_TOKENIZER")
    return Path(path) if path else None


needs_published_tokenizer = pytest.mark.skipif(
    published_tokenizer() is None,
    reason="set IXC2_TOKENIZER to the tokenizer.model of a published checkpoint",
)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache
def family_config(family: str) -> dict:
    """`config.json` of a golden family."""
    return read_json(golden_directory() / family / "config.json")


def golden_cases(family: str) -> list[str]:
    """Names of the family's cases that call the model with a prompt."""
    names = sorted(path.stem for path in (golden_directory() / family).glob("*.safetensors"))
    return [name for name in names if not name.startswith("train")]


def training_cases() -> list[tuple[str, str]]:
    """Family and name of each recorded batch of the published trainers."""
    folder = golden_directory()
    return [
        (family, path.stem) for family in FAMILIES for path in sorted((folder / family).glob("train*.json"))
    ]


def golden_case(family: str, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a case records: its JSON and its tensors."""
    folder = golden_directory() / family
    return read_json(folder / f"{name}.json"), load_file(folder / f"{name}.safetensors")


def call_of(case: dict) -> dict:
    """The recorded arguments of `chat`, with full paths."""
    call = dict(case["call"])
    image = call.get("image")
    if isinstance(image, list):
        call["image"] = [str(golden_directory() / name) for name in image]
    elif image:
        call["image"] = str(golden_directory() / image)
    return call


def recipe_tensor(key: str, shape: list[int]) -> np.ndarray:
    """The weights of a key, as the recipe of the goldens draws them: float16 values in float32."""
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    t = rng.standard_normal(size=shape).astype(np.float32)
    return (_scaled(t, key, shape)).astype(np.float16).astype(np.float32)


def _scaled(t: np.ndarray, key: str, shape: list[int]) -> np.ndarray:
    last = key.rsplit(".", 1)[-1]
    fixed = {"tok_embeddings.weight": 0.5, "position_embedding.weight": 0.3, "class_embedding": 0.5}
    for ending, factor in fixed.items():
        if key.endswith(ending):
            return t * np.float32(factor)
    if "plora_" in key:
        return t * np.float32(0.5)
    if "norm" in key or "layrnorm" in key:
        return 1 + np.float32(0.1) * t if last == "weight" else np.float32(0.05) * t
    if last == "bias":
        return t * np.float32(0.05)
    if key.endswith("patch_embedding.weight"):
        return t / np.float32(np.sqrt(np.prod(shape[1:])))
    for ending, factor in {
        "_B.weight": 0.5,
        "wqkv.weight": 1.8,
        "q_proj.weight": 1.8,
        "k_proj.weight": 1.8,
    }.items():
        if key.endswith(ending):
            return t * np.float32(factor / np.sqrt(shape[1]))
    if key == "output.weight":
        return t * np.float32(1.5 / np.sqrt(shape[1]))
    return t / np.float32(np.sqrt(shape[1]))


def recipe_state_dict(family: str) -> dict[str, torch.Tensor]:
    """All weights of a golden family under their published names; checked against the recorded hash."""
    config = family_config(family)
    weights = {key: recipe_tensor(key, shape) for key, shape in config["state_dict_shapes"].items()}
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].tobytes())
    assert digest.hexdigest() == config["state_dict_sha256"]
    return {key: torch.from_numpy(value) for key, value in weights.items()}


def published_config(family: str) -> dict:
    """A `config.json` as published: flat, asking for flash attention, silent about the tower's sizes."""
    fields = {**family_config(family)["config"], "attn_implementation": "flash_attention_2"}
    heads = family_config(family)["clip_config"]["num_attention_heads"]
    return {
        **fields,
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "model_type": "internlm2",
        "vision_config": {**family_config(family)["clip_config"], "num_attention_heads": heads},
        "auto_map": {
            "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
            "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
        },
    }


def write_checkpoint(directory: Path, family: str, **config_changes) -> Path:
    """A checkpoint of a golden family in the published layout."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(recipe_state_dict(family), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**published_config(family), **config_changes}))
    return directory


TINY_TEXT = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "plora_rank": 4,
}
TINY_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def tiny_config(version: str = "2.5", **fields):
    """A model of two layers that speaks the small vocabulary in the repository's root."""
    from internlm_xcomposer2 import InternLMXcomposer2Config

    defaults = {"task_adapters": {}, "image_token_id": 4, "end_token_id": 5, "vision_config": TINY_TOWER}
    return InternLMXcomposer2Config(version=version, **{**TINY_TEXT, **defaults, **fields})


def tiny_model(version: str = "2.5", seed: int = 0, **fields):
    """The model of `tiny_config` in evaluation mode, with weights so large that every part matters."""
    from internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InternLMXComposer2ForCausalLM(tiny_config(version, **fields)).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                torch.nn.init.normal_(parameter, std=0.7 / parameter.shape[-1] ** 0.5)
        torch.nn.init.normal_(model.model.tok_embeddings.weight)
    return model


def random_pictures(model, grids: list[tuple[int, int]], seed: int = 0):
    """`pixel_values` and `image_grid_hw` of random pictures for a tiny model."""
    side = model.config.img_size
    counts = [1 + rows * cols if model.config.is_tiled else 1 for rows, cols in grids]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(counts), 3, side, side, generator=generator), torch.tensor(grids)


def prompt_with_pictures(model, grids: list[tuple[int, int]], seed: int = 0) -> list[int]:
    """Ids of a random prompt in which each picture has its run of image tokens."""
    rng = np.random.RandomState(seed)
    ids = [1]
    for grid in grids:
        ids += rng.randint(7, 600, size=3).tolist()
        ids += [model.config.image_token_id] * model.num_image_tokens(*grid)
    return ids + rng.randint(7, 600, size=5).tolist()


def logits_of(model, seed=0):
    """Logits of a prompt with one picture."""
    pixel_values, grids = random_pictures(model, [(1, 1)], seed)
    ids = [1, *[model.config.image_token_id] * model.num_image_tokens(1, 1), 60, 70, 80]
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([ids]), pixel_values=pixel_values, image_grid_hw=grids)
    return outputs.logits[:, -4:].float()


def write_published(directory, state_dict, fields, *, shards=1, kind="safetensors"):
    """Weights as safetensors or .bin, whole or sharded, with a published config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    names = sorted(state_dict)
    weight_map = {}
    for i in range(shards):
        part = {name: state_dict[name] for name in names[i::shards]}
        file = f"{suffix[0]}.{suffix[1]}"
        if shards > 1:
            file = f"{suffix[0]}-{i + 1:05}-of-{shards:05}.{suffix[1]}"
        if kind == "bin":
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{suffix[0]}.{suffix[1]}.index.json").write_text(json.dumps(index))
    return directory


def published_weights(model):
    """A model's weights under the published names."""
    return {name.replace(".linear.", "."): value.clone() for name, value in model.state_dict().items()}


def flat_config(model):
    """What a published file would say about a tiny model."""
    config = model.config
    fields = {name: getattr(config, name) for name in family_config("2")["config"] if hasattr(config, name)}
    if config.version != "2":
        del fields["img_size"]
    fields |= {"rope_theta": 1_000_000, "architectures": ["InternLMXComposer2ForCausalLM"]}
    fields |= {"model_type": "internlm", "attn_implementation": "flash_attention_2", "rope_scaling": None}
    fields |= {"vision_config": config.vision_config.to_dict(), "image_token_id": 4, "end_token_id": 5}
    fields["_name_or_path"] = "internlm/internlm-xcomposer2-4khd-7b" if config.version == "2-4khd" else ""
    return fields


def published_source(directory: Path, version="2.5", *, changes=None, weights=None, tokenizer=True, **kwargs):
    """A tiny checkpoint in the published layout, with the small vocabulary -> its model."""
    model = tiny_model(version)
    fields = {**flat_config(model), **(changes or {})}
    fields = {name: value for name, value in fields.items() if value is not ...}
    write_published(directory, published_weights(model) if weights is None else weights, fields, **kwargs)
    if tokenizer:
        shutil.copy(ROOT / "tokenizer.model", directory)
    return model


def content_of(directory: Path) -> dict[str, str]:
    """Every file below a directory and the digest of what it holds."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def picture_inputs(model, grids: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The inputs of `forward`: one random prompt with random pictures; squares have no grid."""
    pixel_values, image_grid_hw = random_pictures(model, grids)
    ids = torch.tensor([prompt_with_pictures(model, grids)])
    return {"input_ids": ids, "pixel_values": pixel_values, "image_grid_hw": image_grid_hw}


# ---- published checkpoints in full size ----

FULL_SIZES = tuple(json.loads((HERE / "golden" / "state_dict_fullsize.json").read_text(encoding="utf-8")))


def full_size_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a published checkpoint by their names in its files."""
    shapes = {}
    for key, (shape, count) in read_json(HERE / "golden" / "state_dict_fullsize.json")[name]["keys"].items():
        for index in range(count):
            shapes[key.replace(".N.", f".{index}.")] = tuple(shape)
    return shapes


def full_size_config(name: str):
    """Its configuration, from the shapes and the heads, which every published file gives."""
    version = next(version for version in ("2.5", "2-4khd", "2") if name.startswith(version))
    config = tiny_config(version, vision_config=None, image_token_id=None)
    config = config.complete_from_shapes(full_size_shapes(name))
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads = text.hidden_size // 128, 8
    return config
