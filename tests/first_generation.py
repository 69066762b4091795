"""Shared by the tests of the first generation: checkpoints from the recipe of its goldens, and small ones."""

import hashlib
import io
import json
import shutil
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from helpers import golden_directory, published_tokenizer, read_json
from safetensors.torch import load_file, save_file

FAMILY = "1.0"
NUM_ROWS = 66  # tokens of a picture


def first_tokenizer() -> Path | None:
    """The sentencepiece model of the first generation, beside that of the second."""
    path = published_tokenizer()
    path = path and path.with_name("internlm_xcomposer1_tokenizer.model")
    return path if path and path.is_file() else None


needs_first_tokenizer = pytest.mark.skipif(
    first_tokenizer() is None,
    reason="IXC2_TOKENIZER has no internlm_xcomposer1_tokenizer.model beside it",
)


def golden_file(name: str) -> Path:
    return golden_directory() / FAMILY / name


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a case records, or skip the test if the full set isn't there."""
    path = golden_file(f"{name}.json")
    if not path.is_file():
        pytest.skip(f"set IXC2_GOLDEN to a directory with {FAMILY}/{path.name}")
    tensors = path.with_suffix(".safetensors")
    return read_json(path), load_file(tensors) if tensors.is_file() else {}


def picture(path: str | None) -> str | None:
    """The path of a golden's picture."""
    return path and str(golden_directory() / path)


def expected_ids(segments: list, image_token_id: int) -> list[int]:
    """The prompt that a case records, with image tokens for its pictures."""
    parts = [part[1] if part[0] == "text" else [image_token_id] * NUM_ROWS for part in segments]
    return [token for part in parts for token in part]


def _recipe(key: str, shape: list[int]) -> np.ndarray:
    """The weights of a key as the goldens draw them: float16 values in float32."""
    rng, f = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF), np.float32
    t = rng.standard_normal(size=shape).astype(f)
    last, low = key.rsplit(".", 1)[-1], key.lower()
    fixed = {"pos_embed": 0.3, "q_bias": 0.3, "v_bias": 0.3, "cls_token": 0.5, "query_tokens": 0.5}
    fixed |= {"flag_image_start": 0.5, "flag_image_end": 0.5}
    queries = ("q_proj.weight", "k_proj.weight", "attn.qkv.weight", "self.query.weight", "self.key.weight")
    factors = {"_B.weight": 0.5, "lm_head.weight": 1.5, **dict.fromkeys(queries, 1.8)}
    if key.endswith("embed_tokens.weight"):
        t = t * f(0.5)
    elif last in fixed:
        t = t * f(fixed[last])
    elif "norm" in low or "ln_vision" in low:
        t = 1 + f(0.1) * t if last == "weight" else f(0.05) * t
    elif last == "bias":
        t = t * f(0.05)
    elif key.endswith("patch_embed.proj.weight"):
        t = t / f(np.sqrt(np.prod(shape[1:])))
    else:
        factor = next((value for ending, value in factors.items() if key.endswith(ending)), None)
        t = (t if factor is None else t * f(factor)) / f(np.sqrt(shape[1]))
    return t.astype(np.float16).astype(f)


@lru_cache
def recipe_state_dict(lora: bool = True) -> dict[str, torch.Tensor]:
    """All weights under their published names; those of the complete set are checked against their hash."""
    recorded = read_json(golden_file("config.json"))
    shapes = recorded["state_dict_shapes"]
    weights = {key: _recipe(key, shape) for key, shape in shapes.items() if lora or "lora_" not in key}
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].tobytes())
    assert not lora or digest.hexdigest() == recorded["state_dict_sha256"]
    return {key: torch.from_numpy(value) for key, value in weights.items()}


def published_buffers() -> dict[str, torch.Tensor]:
    """What published files hold besides weights."""
    frequencies = (1 / 10000 ** (torch.arange(0, 16, 2) / 16)).half()
    names = [f"internlm_model.model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    ids = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    return dict.fromkeys(names, frequencies) | ids


def published_fields(lora: bool = True, **changes) -> dict:
    """A `config.json` as published, but with the sizes of tower and Q-Former that it leaves to the code."""
    recorded = read_json(golden_file("config.json"))
    fields = recorded["config"] | {name: recorded[name] for name in ("vision_config", "qformer_config")}
    low_rank = fields["internlm_lora"] if lora else None
    module = "modeling_InternLM_XComposer.InternLMXComposerForCausalLM"
    return fields | {
        "model_type": "InternLMXComposer",
        "architectures": ["InternLMXComposerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_InternLM_XComposer.InternLMXComposerConfig",
            "AutoModel": module,
            "AutoModelForCausalLM": module,
        },
        "internlm_lora": low_rank,
        "lora_cfg": low_rank,
        "torch_dtype": "float32",
        **changes,
    }


def write_first(directory: Path, *, lora: bool = True, state_dict: dict | None = None, **changes) -> Path:
    """The goldens' checkpoint in the published layout, with its tokenizer if that is there."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = recipe_state_dict(lora) | published_buffers() if state_dict is None else state_dict
    save_file({k: v.clone() for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(published_fields(lora, **changes)))
    if path := first_tokenizer():
        shutil.copyfile(path, directory / "tokenizer.model")
    return directory


@lru_cache
def small_vocabulary() -> bytes:
    """A sentencepiece model with the first generation's markup and few pieces besides bytes."""
    words = [f"{first}{second}{third}" for first in "bdfklmn" for second in "aeiou" for third in "lnrst"]
    text = "\n".join(" ".join(words[i::7]) for i in range(40))
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=content,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", *(f"<TOKENS_UNUSED_{i}>" for i in range(4))],
        minloglevel=2,
    )
    return content.getvalue()


def tiny_first(seed: int = 0, **fields):
    """A random model of two layers with the small vocabulary and its tokenizer, in evaluation mode."""
    from internlm_xcomposer2 import InternLMXComposerConfig, InternLMXComposerForCausalLM

    tokenizer = small_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<TOKENS_UNUSED_1>")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = InternLMXComposerConfig(
        **{"vocab_size": len(tokenizer), **sizes, "end_token_id": end, **fields},
        image_token_id=tokenizer.convert_tokens_to_ids("<TOKENS_UNUSED_3>"),
        num_query_token=6,
        vision_config={**sizes, "image_size": 56},
        qformer_config=sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InternLMXComposerForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.7 / parameter.shape[-1] ** 0.5)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.tokenizer = tokenizer
    return model


@lru_cache
def small_tokenizer():
    """The tokenizer of the small vocabulary."""
    import tempfile

    from internlm_xcomposer2 import InternLMXComposerTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        path.write_bytes(small_vocabulary())
        return InternLMXComposerTokenizer(str(path))
