"""Checkpoints that somebody has doctored: every file is used as it is meant, or refused with its name."""

import json
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    flat_config,
    published_source,
    published_weights,
    read_json,
    tiny_model,
    write_published,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from internlm_xcomposer2 import (
    InternLMXcomposer2Config,
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2ImageProcessor,
    InternLMXComposer2Processor,
    InternLMXComposer2Tokenizer,
)
from internlm_xcomposer2.ixc2.adopt import adopt
from internlm_xcomposer2.ixc2.examine import examine
from internlm_xcomposer2.ixc2.main import main
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

# ---- a checkpoint to doctor, and the ways in ----

READERS = {
    "config.json": (InternLMXcomposer2Config, AutoConfig, InternLMXComposer2ForCausalLM),
    "generation_config.json": (InternLMXComposer2ForCausalLM,),
    "tokenizer_config.json": (InternLMXComposer2Tokenizer, AutoTokenizer, InternLMXComposer2Processor),
    "special_tokens_map.json": (InternLMXComposer2Tokenizer,),
    "added_tokens.json": (InternLMXComposer2Tokenizer, AutoTokenizer),
    "preprocessor_config.json": (InternLMXComposer2ImageProcessor, AutoImageProcessor),
    "processor_config.json": (InternLMXComposer2Processor, AutoProcessor),
    "model.safetensors.index.json": (InternLMXComposer2ForCausalLM,),
}
OTHERS = {
    "generation_config.json": {"eos_token_id": [2, 5], "temperature": 0.7, "do_sample": True},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint with every file that there can be, and one in shards."""
    folder = tmp_path_factory.mktemp("doctored")
    published_source(folder / "plain")
    adopt(folder / "plain", folder / "whole")
    for name in ("generation_config.json", "ixc2_adopted.json"):
        (folder / "whole" / name).unlink()
    for path in (folder / "whole").glob("*.py"):
        path.unlink()
    fields = read_json(folder / "whole" / "tokenizer_config.json")
    del fields["auto_map"]
    for name, content in {**OTHERS, "tokenizer_config.json": fields}.items():
        (folder / "whole" / name).write_text(json.dumps(content))
    shutil.copytree(folder / "whole", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    model = tiny_model("2.5")
    write_published(folder / "more", published_weights(model), flat_config(model), shards=2)
    for path in (folder / "more").glob("model*"):
        path.rename(folder / "sharded" / path.name)
    return {"whole": folder / "whole", "sharded": folder / "sharded"}


def source_of(sources: dict[str, Path], name: str) -> Path:
    return sources["sharded" if "index" in name else "whole"]


class Doctored:
    """A copy of a checkpoint with one file replaced; the other files are links."""

    def __init__(self, source: Path, name: str, content: bytes) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        for path in source.iterdir():
            if path.name != name:
                os.link(path, self.path / path.name)
        (self.path / name).write_bytes(content)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_) -> None:
        self.folder.cleanup()


def refusals(folder: Path, readers: Iterable[type]) -> list[Exception | None]:
    """What each reader of a file raises, after checking that what it accepts can be used."""
    found = []
    for reader in readers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = reader.from_pretrained(folder)
            use(read)
            found.append(None)
        except ValueError as error:
            found.append(error)
    return found


def use(read: object) -> None:
    """A little of what it is for."""
    if isinstance(read, InternLMXComposer2ForCausalLM):
        read.generate(torch.tensor([[1, 60]]), max_new_tokens=1, do_sample=False, num_beams=1)
    elif isinstance(read, InternLMXComposer2Tokenizer):
        read.decode(read("a").input_ids)


# ---- cases that must be refused, by the name of file and field ----

NOT_SIZES = [0, -1, 1.5, "4", True, [], {}, 10**12]
NOT_OBJECTS = [5, "x", [1], True]
NOT_TEXTS = [5, [], {}, True]
NOT_SHARES = [-0.1, 2, "x", True, [], float("nan"), float("inf"), 1e400]
NOT_TOKENS = [-1, 1.5, "x", True, {}, 10**12]
WRONG = {
    "config.json": {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), NOT_SIZES),
        **dict.fromkeys(("num_key_value_heads", "max_position_embeddings", "plora_rank"), NOT_SIZES),
        **dict.fromkeys(("hd_num", "max_length", "video_memory_size", "num_labels"), NOT_SIZES),
        "num_hidden_layers": [*NOT_SIZES, 10**6],
        **dict.fromkeys(("text_config", "vision_config", "auto_map", "id2label", "label2id"), NOT_OBJECTS),
        **dict.fromkeys(("quantization_config", "rope_scaling", "task_adapters"), NOT_OBJECTS),
        **dict.fromkeys(("version", "problem_type", "transformers_version"), NOT_TEXTS),
        **dict.fromkeys(("rms_norm_eps", "attention_dropout", "plora_dropout"), NOT_SHARES),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id"), NOT_TOKENS),
        **dict.fromkeys(("use_cache", "bias", "tie_word_embeddings"), [1, "x", [], {}]),
        "hidden_act": ["nonsense", 5, [], {}, None],
        **dict.fromkeys(("dtype", "torch_dtype"), ["float99", "int8", 5, [], {}, "Tensor"]),
        "rope_theta": [0, -1, "x", float("inf"), True],
        "initializer_range": [-1, "x", float("nan")],
        "architectures": [5, "x", [5]],
        "attribute_map": [{"hidden_size": "vocab_size"}, 5],
        "transformers_weights": ["../x.safetensors", "other.safetensors", 5],
        "configuration_files": [["../x.json"], 5],
        "per_layer_config": [{"0": {}}, 5],
        **dict.fromkeys(("to_dict", "complete_from_shapes", "save_pretrained", "__class__", "is_tiled"), [5]),
    },
    "generation_config.json": {
        **dict.fromkeys(("max_length", "max_new_tokens", "top_k"), [-1, 1.5, "x", [], True]),
        **dict.fromkeys(("num_beams", "num_return_sequences"), [0, -1, "x", 10**9]),
        **dict.fromkeys(("top_p", "min_p"), NOT_SHARES),
        **dict.fromkeys(("temperature", "repetition_penalty"), [-1, "x", True, [], float("nan")]),
        **dict.fromkeys(("do_sample", "use_cache"), [1, "x", [], {}]),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), NOT_TOKENS),
        "eos_token_id": [-1, "x", ["x"], {}, [[1]], [1.5]],
        "cache_implementation": [5, [], "nonsense"],
        "stop_strings": [5, [5], {}],
        **dict.fromkeys(("to_dict", "validate", "__class__"), [5]),
    },
    "tokenizer_config.json": {
        **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), [1, "x", [], {}]),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), [5, [], {}, {"content": 5}]),
        "sp_model_kwargs": [5, [], {"model_file": "/etc/passwd"}, {"alpha": "x"}, {"nonsense": 1}],
        "added_tokens_decoder": [5, [], {"x": {"content": "a"}}, {"1": 5}, {"1": {}}],
        "chat_template": [5, {"a": 5}, [5]],
        "model_max_length": ["x", [], -1, 0],
        "padding_side": ["up", 5, []],
        "init_inputs": [["/etc/passwd"], 5],
        "auto_map": [5, "x"],
    },
    "special_tokens_map.json": dict.fromkeys(("bos_token", "eos_token"), [5, [], {}, {"content": 5}]),
    "added_tokens.json": {"a": [-1, "x", [], 1.5, None, True]},
    "preprocessor_config.json": {
        **dict.fromkeys(("img_size", "tile_tokens_per_side", "hd_num"), [*NOT_SIZES, [1]]),
        "version": [5, [], {}],
        "auto_map": [5],
    },
    "processor_config.json": {
        "image_token_id": [*NOT_TOKENS, None],
        "image_processor": [5, [], "x", {"img_size": 0}, {"hd_num": "x"}],
        "chat_template": [5, [5]],
    },
}
CASES = [(name, field) for name, fields in WRONG.items() for field in fields]


@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_wrong_field_is_named_with_its_file(sources, name, field):
    """Every way in says so for the first value, and the first way in for every value."""
    readers = READERS[name]
    for value in WRONG[name][field]:
        fields = {**read_json(sources["whole"] / name), field: value}
        with Doctored(sources["whole"], name, json.dumps(fields).encode()) as folder:
            for reader, error in zip(readers, refusals(folder, readers), strict=True):
                assert error is not None, (reader, field, value)
                assert name in str(error) and field in str(error), (reader, value, error)
            if readers is READERS[name]:
                assert main(["inspect", str(folder)]) == 1
        readers = readers[:1]


# ---- any field, any value ----

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=False)
    | st.sampled_from(["", "x", "../x", "gelu", "float16", "auto", "<s>", "\x00", "名"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab0"), inner, max_size=3),
    max_leaves=4,
)
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def doctored_json(draw, sources: dict[str, Path]) -> tuple[str, bytes]:
    """A file's name, and its content with a field replaced, added or lost, or with its bytes damaged."""
    name = draw(st.sampled_from(sorted(READERS)))
    content = (source_of(sources, name) / name).read_bytes()
    how = draw(st.sampled_from(["field", "field", "field", "lost", "bytes", "whole"]))
    if how == "whole":
        return name, json.dumps(draw(VALUES)).encode()
    if how == "bytes":
        cut = draw(st.integers(0, len(content)))
        return name, content[:cut] + draw(st.binary(max_size=8)) + content[cut + draw(st.integers(0, 4)) :]
    fields = json.loads(content)
    part = fields
    while nested := [key for key, value in part.items() if isinstance(value, dict) and value]:
        if draw(st.booleans()):
            break
        part = part[draw(st.sampled_from(sorted(nested)))]
    key = draw(st.sampled_from([*sorted(part), "x", "num_labels", "eos_token_id", "chat_template"]))
    if how == "lost":
        part.pop(key, None)
    else:
        part[key] = draw(VALUES)
    return name, json.dumps(fields).encode()


def test_any_doctored_json_is_used_or_refused_by_name(sources):
    @seed(0)
    @settings(max_examples=120, **QUIET)
    @given(doctored_json(sources))
    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        with Doctored(source_of(sources, name), name, content) as folder:
            for error in refusals(folder, READERS[name]):
                assert error is None or str(folder) in str(error), error
            assert main(["inspect", str(folder)]) in (0, 1)

    check()


# ---- weights ----


def tensor_of(values: list, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).as_strided(shape, stride)


def small_weights() -> dict[str, torch.Tensor]:
    return published_weights(tiny_model("2.5"))


BINS = {
    "integer keys": (lambda weights: {0: torch.ones(2)} | weights, "1 of its .* names are not texts: 0"),
    "other keys": (lambda weights: {("a", 1): torch.ones(2)} | weights, "names are not texts: .'a', 1."),
    "a number": (lambda weights: {**weights, "x": 5}, "not tensors: x"),
    "a list": (lambda weights: list(weights.values()), "holds a list"),
    "a tensor": (lambda weights: torch.ones(2), "holds a Tensor"),
    "no values": (
        lambda weights: {**weights, "output.weight": torch.empty(640, 32, device="meta")},
        "output.weight has no plain values",
    ),
    "sparse": (
        lambda weights: {**weights, "output.weight": weights["output.weight"].to_sparse()},
        "output.weight has no plain values",
    ),
    "larger than its storage": (
        lambda weights: {**weights, "model.tok_embeddings.weight": tensor_of([1.0], (10**9, 32), (0, 0))},
        "tok_embeddings.weight has the shape .1000000000, 32., but only 4 bytes are stored",
    ),
    "shared many times": (
        lambda weights: dict.fromkeys((f"x{i}" for i in range(2000)), torch.ones(100_000)),
        "its 2000 tensors claim 800000000 bytes, but the file has",
    ),
    "wrong dimensions": (
        lambda weights: {**weights, "model.tok_embeddings.weight": torch.ones(7)},
        "model.tok_embeddings.weight has the shape .7,.",
    ),
    "no rows": (
        lambda weights: {**weights, "model.tok_embeddings.weight": torch.ones(0, 32)},
        "model.tok_embeddings.weight has the shape .0, 32.",
    ),
    "a scalar": (
        lambda weights: {**weights, "model.layers.0.attention.wo.Plora_A.weight": torch.tensor(1.0)},
        "Plora_A.weight has the shape",
    ),
}


@pytest.mark.parametrize("case", BINS)
def test_a_doctored_bin_is_refused_by_name(sources, tmp_path, case):
    change, words = BINS[case]
    write_published(tmp_path, {}, flat_config(tiny_model("2.5")), kind="bin")
    torch.save(change(small_weights()), tmp_path / "pytorch_model.bin")
    for read in (InternLMXComposer2ForCausalLM.from_pretrained, AutoModel.from_pretrained, examine):
        with pytest.raises(ValueError, match=words) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value)


class Payload:
    """What a pickle can run."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.unlink, (str(self.victim),)


@pytest.mark.parametrize("protocol", [2, "plain"])
def test_a_pickle_runs_nothing(tmp_path, protocol):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    write_published(tmp_path, {}, flat_config(tiny_model("2.5")), kind="bin")
    if protocol == "plain":
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(victim)}))
    else:
        torch.save({"a": Payload(victim)}, tmp_path / "pytorch_model.bin")
    for read in (InternLMXComposer2ForCausalLM.from_pretrained, examine):
        with pytest.raises(ValueError, match="pytorch_model.bin can't be read as a weight file"):
            read(tmp_path)
    assert victim.read_text() == "mine"


def test_a_bin_that_expands_is_not_unpacked(tmp_path):
    """256 MB of zeros in a quarter of a megabyte, in the place of each entry of the archive."""
    write_published(tmp_path, small_weights(), flat_config(tiny_model("2.5")), kind="bin")
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    largest = max(entries, key=lambda name: len(entries[name]))
    for name in (next(name for name in entries if name.endswith("data.pkl")), largest):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for other, content in entries.items():
                archive.writestr(other, bytes(256 << 20) if other == name else content)
        assert path.stat().st_size < 1 << 20
        for read in (InternLMXComposer2ForCausalLM.from_pretrained, examine):
            with pytest.raises(ValueError, match=r"pytorch_model.bin can't be read.*entries are compressed"):
                read(tmp_path)


def test_a_small_file_cannot_ask_for_a_large_model(tmp_path):
    """Shapes of 8 MB of weights that would need 16 GB: one wide tensor in each direction."""
    weights = small_weights()
    factor = "model.layers.0.feed_forward.w1.Plora_B.weight"
    weights[factor] = torch.zeros(1_000_000, 1)
    write_published(tmp_path, weights, flat_config(tiny_model("2.5")))
    with pytest.raises(ValueError, match="bytes, too few for"):
        InternLMXComposer2ForCausalLM.from_pretrained(tmp_path)
    weights[factor] = small_weights()[factor]
    write_published(
        tmp_path,
        {**weights, **{f"model.layers.{i}.x": torch.ones(1) for i in range(3000)}},
        flat_config(tiny_model("2.5")),
    )
    with pytest.raises(ValueError, match="num_hidden_layers must be an integer from 1 to 256, not 3000"):
        examine(tmp_path)


def test_a_state_dict_without_values_is_refused(sources):
    weights = {name: value.to("meta") for name, value in small_weights().items()}
    config = InternLMXcomposer2Config.from_pretrained(sources["whole"])
    with pytest.raises(ValueError, match="tensors of the state_dict have no values"):
        InternLMXComposer2ForCausalLM.from_pretrained(None, config=config, state_dict=weights)


def test_damaged_weights_are_refused_by_name(tmp_path):
    """Bytes of headers, pickles and archives that were changed, cut or put in."""
    contents = {}
    for kind, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        write_published(tmp_path / kind, small_weights(), flat_config(tiny_model("2.5")), kind=kind)
        contents[kind] = name, (tmp_path / kind / name).read_bytes()

    @seed(1)
    @settings(max_examples=60, **QUIET)
    @given(
        st.sampled_from(sorted(contents)),
        st.floats(0, 1, allow_subnormal=False),
        st.binary(min_size=1, max_size=6),
        st.sampled_from(["over", "in", "cut"]),
    )
    def check(kind: str, place: float, damage: bytes, how: str) -> None:
        name, content = contents[kind]
        at = int(place * min(len(content), 4000)) if how != "cut" else int(place * len(content))
        rest = {"over": content[at + len(damage) :], "in": content[at:], "cut": b""}[how]
        with Doctored(tmp_path / kind, name, content[:at] + damage + rest) as folder:
            for read in (InternLMXComposer2ForCausalLM.from_pretrained, examine):
                try:
                    read(folder)
                except ValueError as error:
                    assert str(folder) in str(error)

    check()


def test_a_vocabulary_of_anything_is_refused_by_name(sources):
    content = (ROOT / "tokenizer.model").read_bytes()

    @seed(2)
    @settings(max_examples=40, **QUIET)
    @given(st.integers(0, len(content)), st.binary(max_size=8))
    def check(at: int, damage: bytes) -> None:
        with Doctored(sources["whole"], "tokenizer.model", content[:at] + damage) as folder:
            try:
                InternLMXComposer2Tokenizer.from_pretrained(folder)
            except ValueError as error:
                assert "tokenizer.model" in str(error)

    check()
