"""Files that anyone may have written, and files that a kill must not spoil."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    content_of,
    flat_config,
    logits_of,
    published_source,
    published_weights,
    read_json,
    tiny_model,
    write_published,
)
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from internlm_xcomposer2.files_internlm_xcomposer2 import (
    finish_saving,
    is_plain_name,
    read_fields,
    saved_aside,
    staging,
)
from internlm_xcomposer2.ixc2 import adopt as adopting
from internlm_xcomposer2.ixc2.adopt import adopt
from internlm_xcomposer2.ixc2.main import main
from internlm_xcomposer2.ixc2.quantize import quantize
from safetensors.torch import load_file, save_file

# Names that lead out of a directory on some system, or that are no names.
ELSEWHERE = [
    "../x",
    "/tmp/x",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:x",
    "a\x00b",
    "x" * 300,
    5,
    None,
    ["x"],
    "a\nb",
]

# ---- names ----


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_that_lead_elsewhere_are_not_plain(name):
    assert not is_plain_name(name)


def test_names_of_checkpoints_are_plain():
    for name in ("model-00001-of-00003.safetensors", ".hidden", "a b.bin", "名字.json"):
        assert is_plain_name(name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_record_that_names_a_file_elsewhere_removes_nothing(tmp_path, name):
    """Neither outside of the target nor in it, and a second run says what is wrong."""
    published_source(tmp_path / "source")
    adopt(tmp_path / "source", tmp_path / "target")
    record = read_json(tmp_path / "target" / adopting.MARKER)
    for path in ("x", "target/b", "target/x"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(b"mine")
    names = [str(name), "../victim.safetensors", str(victim), "sub/../../victim.safetensors"]
    for doctored in names if isinstance(name, str) else names[1:]:
        record["files"] = {"config.json": "0", doctored: 4}
        (tmp_path / "target" / adopting.MARKER).write_text(json.dumps(record))
        before = content_of(tmp_path)
        with pytest.raises(FileExistsError, match="is damaged.*files names"):
            adopt(tmp_path / "source", tmp_path / "target")
        assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"files": 5},
        {"files": {"a.bin": []}},
        {"files": None},
        {"source": 7},
        {"source": None},
        {"files": ["a"]},
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, change):
    published_source(tmp_path / "source")
    adopt(tmp_path / "source", tmp_path / "target")
    path = tmp_path / "target" / adopting.MARKER
    path.write_text(json.dumps({**read_json(path), **change}))
    with pytest.raises(FileExistsError, match="is damaged"):
        adopt(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_names_only_shards_beside_it(tmp_path, name, kind):
    model = tiny_model("2.5")
    write_published(tmp_path / "source", published_weights(model), flat_config(model), shards=2, kind=kind)
    (index,) = (tmp_path / "source").glob("*.index.json")
    content = read_json(index)
    content["weight_map"]["output.weight"] = name
    index.write_text(json.dumps(content))
    for read in (
        InternLMXComposer2ForCausalLM.from_pretrained,
        lambda source: adopt(source, tmp_path / "target"),
    ):
        with pytest.raises(ValueError, match=rf"{index}: weight_map says of 'output.weight'.*plain name"):
            read(tmp_path / "source")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", 5, ["a"]])
def test_a_packer_names_only_weights_beside_it(tmp_path, name):
    published_source(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-16g.safetensors")
    fields = {"bits": 4, "group_size": 16, "model_file_base_name": name}
    (tmp_path / "quantize_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="quantize_config.json: model_file_base_name must be"):
        InternLMXComposer2ForCausalLM.from_pretrained(tmp_path)


def test_a_name_cannot_ask_for_a_billion_shards(tmp_path):
    published_source(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-9999999999.safetensors")
    for read in (
        InternLMXComposer2ForCausalLM.from_pretrained,
        lambda path: adopt(path, path.with_name("target")),
    ):
        started = time.monotonic()
        with pytest.raises(ValueError, match="9999999999.safetensors claims to be one of more than"):
            read(tmp_path)
        assert time.monotonic() - started < 5


# ---- links ----


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.model", "README.md", "LICENSE"]
)
@pytest.mark.parametrize("kind", ["circle", "nowhere"])
def test_links_that_lead_in_a_circle_or_nowhere_are_named(tmp_path, name, kind, capsys):
    source = tmp_path / "source"
    published_source(source)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(name if kind == "circle" else "gone")
    assert main(["adopt", str(source), str(tmp_path / "target")]) == 1
    said = capsys.readouterr().err
    assert name in said and ("can't be followed" if kind == "circle" else "a link to gone") in said
    assert not (tmp_path / "target").exists()
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(OSError, match=name):
            InternLMXComposer2ForCausalLM.from_pretrained(source)
        assert main(["inspect", str(source)]) == 1


@pytest.mark.parametrize("place", ["source", "target", "above the target"])
def test_circles_around_the_directories_are_named(tmp_path, place, capsys):
    published_source(tmp_path / "right")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    source = tmp_path / ("a" if place == "source" else "right")
    target = tmp_path / {"source": "new", "target": "a"}.get(place, "a/inner")
    assert main(["adopt", str(source), str(target)]) == 1
    assert "can't be followed" in capsys.readouterr().err


def test_texts_elsewhere_are_not_copied_but_those_of_the_hubs_cache_are(tmp_path):
    (tmp_path / "secret").write_text("secret")
    published_source(tmp_path / "source")
    (tmp_path / "source" / "README.md").symlink_to(tmp_path / "secret")
    notes = adopt(tmp_path / "source", tmp_path / "target").notes
    assert "README.md is a link to another place: not copied" in notes
    assert not (tmp_path / "target" / "README.md").exists()
    cache, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    published_source(cache)
    (cache / "README.md").write_text("a card")
    blobs.mkdir()
    for path in list(cache.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    adopt(cache, tmp_path / "cached")
    assert (tmp_path / "cached" / "README.md").read_text() == "a card"


def test_links_in_the_target_are_replaced_and_not_followed(tmp_path):
    published_source(tmp_path / "source")
    target = tmp_path / "target"
    adopt(tmp_path / "source", target)
    (tmp_path / "mine.json").write_text("{}")
    for name in ("config.json", "generation_config.json", adopting.MARKER):
        content = (target / name).read_bytes()
        (target / name).unlink()
        (target / name).symlink_to(tmp_path / "mine.json")
        if name == adopting.MARKER:
            (target / name).unlink()
            (target / name).write_bytes(content)
    (target / "config.json").unlink()
    (target / "config.json").symlink_to("config.json")
    adopt(tmp_path / "source", target)
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert not (target / "config.json").is_symlink()
    (target / "config.json").unlink()
    (target / "config.json").mkdir()
    with pytest.raises(FileExistsError, match="config.json is a directory"):
        adopt(tmp_path / "source", target)


# ---- saving ----


def old_and_new(**fields) -> tuple[InternLMXComposer2ForCausalLM, InternLMXComposer2ForCausalLM]:
    """Two models of the same sizes and different weights."""
    return tiny_model("2.5", seed=1, **fields), tiny_model("2.5", seed=2, **fields)


def write_bin(model, path: Path, shards: int) -> None:
    write_published(path, published_weights(model), flat_config(model), kind="bin", shards=shards)


FORMS = {
    "one file": lambda model, path: model.save_pretrained(path),
    "shards": lambda model, path: model.save_pretrained(path, max_shard_size="20KB"),
    "more shards": lambda model, path: model.save_pretrained(path, max_shard_size="10KB"),
    "bin": lambda model, path: write_published(
        path, published_weights(model), flat_config(model), kind="bin"
    ),
    "bin shards": lambda model, path: write_published(
        path, published_weights(model), flat_config(model), kind="bin", shards=2
    ),
}


@pytest.mark.parametrize("before", FORMS)
@pytest.mark.parametrize("after", ["one file", "shards", "more shards"])
def test_a_save_leaves_no_weights_of_another_form(tmp_path, before, after):
    old, new = old_and_new()
    FORMS[before](old, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.other.safetensors").write_bytes(b"a variant")
    FORMS[after](new, tmp_path)
    FORMS[after](new, tmp_path / "alone")
    left = {path.name for path in tmp_path.iterdir()} - {"alone", "notes.txt", "model.other.safetensors"}
    assert left == {path.name for path in (tmp_path / "alone").iterdir()}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.other.safetensors").read_bytes() == b"a variant"
    assert torch.equal(logits_of(InternLMXComposer2ForCausalLM.from_pretrained(tmp_path)), logits_of(new))


def test_a_failed_save_changes_nothing(tmp_path):
    old, new = old_and_new()
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    before = content_of(tmp_path)

    def fail(tensors, path, **kwargs):
        raise OSError(28, "No space left on device")

    names = type(new).save_pretrained.__globals__["saved_aside"]
    assert names is saved_aside
    import transformers.modeling_utils as library

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(library, "safe_save_file", fail)
        new.save_pretrained(tmp_path)
    assert content_of(tmp_path) == before


def test_two_processes_do_not_save_into_one_directory(tmp_path):
    old, new = old_and_new()
    with saved_aside(tmp_path), pytest.raises(FileExistsError, match="another run is in progress"):
        new.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        new.save_pretrained(tmp_path / "file")


def test_a_linked_source_is_not_written_through(tmp_path):
    """Weights that adoption links are the source's own."""
    published_source(tmp_path / "source")
    before = content_of(tmp_path / "source")
    adopt(tmp_path / "source", tmp_path / "target")
    model = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "target")
    model.output.weight.data.zero_()
    model.save_pretrained(tmp_path / "target")
    assert content_of(tmp_path / "source") == before


# A save in another process that kills itself: while it writes, or after so many files are in place.
KILLED_SAVE = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import torch
torch.set_num_threads(1)
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, files_internlm_xcomposer2 as files
import transformers.modeling_utils as library

source, target, size, moment = *sys.argv[3:6], int(sys.argv[6])
model = InternLMXComposer2ForCausalLM.from_pretrained(source)
calls = iter(range(1000))
def dying(function):
    def call(*args, **kwargs):
        if next(calls) == moment % 100:
            os._exit(9)
        return function(*args, **kwargs)
    return call
if moment < 100:
    library.safe_save_file = dying(library.safe_save_file)
else:
    files._move = dying(files._move)
model.save_pretrained(target, max_shard_size=size)
"""


def killed_save(source: Path, target: Path, size: str, moment: int) -> None:
    places = [ROOT / "tests", ROOT, source, target]
    command = [sys.executable, "-c", KILLED_SAVE, *map(str, places), size, str(moment)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 9, run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "moment"), [("20KB", 2), ("5GB", 0)])
def test_a_kill_while_shards_are_written_leaves_the_old_ones(tmp_path, size, moment):
    old, new = old_and_new()
    new.save_pretrained(tmp_path / "new")
    target = tmp_path / "old"
    old.save_pretrained(target, max_shard_size="20KB")
    before = content_of(target)
    killed_save(tmp_path / "new", target, size, moment)
    now = content_of(target)
    assert {name: now[name] for name in before} == before
    assert torch.equal(logits_of(InternLMXComposer2ForCausalLM.from_pretrained(target)), logits_of(old))
    new.save_pretrained(target, max_shard_size="20KB")
    assert set(content_of(target)) == set(before)
    assert torch.equal(logits_of(InternLMXComposer2ForCausalLM.from_pretrained(target)), logits_of(new))


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "stays"), [(1, True), (101, False)])
def test_a_kill_while_4_bit_weights_are_saved_leaves_no_mixture(tmp_path, moment, stays):
    """Killed while it writes, the full weights stay; while it moves, the 4-bit ones are all there."""
    old, new = old_and_new(hidden_size=64, num_attention_heads=2)
    new.save_pretrained(tmp_path / "new")
    quantize(tmp_path / "new", tmp_path / "4-bit", bits=4)
    packed = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "4-bit", dtype="float32")
    target = tmp_path / "old"
    old.save_pretrained(target)
    killed_save(tmp_path / "4-bit", target, "100KB", moment)
    loaded = InternLMXComposer2ForCausalLM.from_pretrained(target, dtype="float32")
    assert torch.equal(logits_of(loaded), logits_of(old if stays else packed))
    assert ("quantization_config" in read_json(target / "config.json")) is not stays


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize(
    ("before", "after"), [("shards", "shards"), ("one file", "shards"), ("shards", "one file")]
)
def test_a_kill_while_files_are_moved_never_leaves_a_mixture(tmp_path, monkeypatch, before, after, moment):
    """Until the next load or save, there are no weights to load; then the new ones are all there."""
    old, new = old_and_new()
    FORMS[before](old, tmp_path / "model")
    names = saved_aside.__wrapped__.__globals__
    move, count = names["_move"], iter(range(1000))

    class Killed(BaseException):
        pass

    def dying(path, target):
        if next(count) == moment:
            raise Killed
        move(path, target)

    monkeypatch.setitem(names, "_move", dying)
    try:
        FORMS[after](new, tmp_path / "model")
        was_killed = False
    except Killed:
        was_killed = True
    monkeypatch.undo()
    if was_killed:
        with pytest.raises(ValueError, match="interrupted while the files were put in place"):
            adopt(tmp_path / "model", tmp_path / "target")
    FORMS[after](new, tmp_path / "alone")
    loaded = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(new))
    assert content_of(tmp_path / "model").keys() == content_of(tmp_path / "alone").keys()


def test_a_save_that_was_killed_while_moving_is_finished_before_the_next(tmp_path):
    folder = tmp_path / ".ixc2-saved"
    folder.mkdir()
    (folder / ".plan.json").write_text(
        json.dumps({"move": ["a.json", "b.json"], "remove": ["model.safetensors"]})
    )
    (folder / "a.json").write_text("new")
    (tmp_path / "b.json").write_text("moved before")
    (tmp_path / "model.safetensors").write_text("old")
    finish_saving(tmp_path)
    assert content_of(tmp_path).keys() == {"a.json", "b.json"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".plan.json").write_text(json.dumps({"move": ["mine"], "remove": []}))
    (elsewhere / "mine").write_text("mine")
    folder.symlink_to(elsewhere)
    finish_saving(tmp_path)
    assert (elsewhere / "mine").read_text() == "mine" and not (tmp_path / "mine").exists()
    folder.unlink()
    for part in ("move", "remove"):
        folder.mkdir()
        (folder / ".plan.json").write_text(json.dumps({part: ["../../mine"]}))
        with pytest.raises(ValueError, match="plain name"):
            finish_saving(tmp_path)
        (folder / ".plan.json").unlink()
        folder.rmdir()


def test_an_adapter_replaces_an_adapter_and_leaves_the_model(tmp_path):
    """What `save_pretrained` writes for a model with an adapter; its two files come and go together."""
    tiny_model("2.5").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for name in ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("old")
    with saved_aside(tmp_path) as folder:
        save_file({"new": torch.ones(1)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("new")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "adapter_model.bin").exists()
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"new"}
    assert (tmp_path / "adapter_config.json").read_text() == "new"


# ---- adopting and merging after a kill ----

KILLED_ADOPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from internlm_xcomposer2.ixc2 import adopt, convert
save = convert.save_file
def dying(tensors, path, **kwargs):
    if "00002" in path.name:
        os._exit(9)
    save(tensors, path, **kwargs)
convert.save_file = dying
adopt.adopt(sys.argv[2], sys.argv[3], convert_bin=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_adoption_goes_on_by_itself_after_a_kill(tmp_path, again):
    model = published_source(tmp_path / "source", kind="bin", shards=2)
    if again:
        adopt(tmp_path / "source", tmp_path / "target")
    command = [
        sys.executable,
        "-c",
        KILLED_ADOPT,
        str(ROOT),
        str(tmp_path / "source"),
        str(tmp_path / "target"),
    ]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert (tmp_path / "target.partial").is_dir()
    adopt(tmp_path / "source", tmp_path / "target", convert_bin=True)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]
    loaded = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_what_a_killed_run_left_is_removed_and_what_is_yours_is_not(tmp_path):
    partial = tmp_path / "new.partial"
    for names, is_left_over in (
        ((), True),
        (("config.json", "model-00001-of-00002.safetensors", "README.md"), True),
        (("config.json", "thesis.docx"), False),
        (("sub/config.json",), False),
    ):
        partial.mkdir()
        for name in names:
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text("x")
        before = content_of(tmp_path)
        if is_left_over:
            with staging(partial, remedy="wait") as folder:
                assert not any(folder.iterdir())
            assert not any(tmp_path.iterdir())
        else:
            with pytest.raises(FileExistsError, match="holds other files"), staging(partial, remedy="wait"):
                pass
            assert content_of(tmp_path) == before
            shutil.rmtree(partial)


def test_a_run_that_is_still_working_is_not_disturbed(tmp_path):
    published_source(tmp_path / "source")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from internlm_xcomposer2.ixc2.adopt import staging_beside\n"
        "with staging_beside(Path(sys.argv[2])) as folder:\n"
        "    (folder / 'config.json').write_text('mine'); print('working', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "target")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "working"
        with pytest.raises(FileExistsError, match="another run is in progress"):
            adopt(tmp_path / "source", tmp_path / "target")
        assert (tmp_path / "target.partial" / "config.json").read_text() == "mine"
    finally:
        other.kill()
        other.wait()
    adopt(tmp_path / "source", tmp_path / "target")
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


# ---- JSON ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b"5", "holds a int"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_of_any_content_is_fields_or_an_error_that_names_the_file(tmp_path, content, words):
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"some.json.*({words})"):
        read_fields(tmp_path / "some.json")


def test_a_huge_json_is_not_read(tmp_path):
    with open(tmp_path / "some.json", "wb") as file:
        file.truncate(200 << 30)  # takes no room on disk
    started = time.monotonic()
    with pytest.raises(ValueError, match="some.json has 214748364800 bytes, more than the limit"):
        read_fields(tmp_path / "some.json")
    assert time.monotonic() - started < 1
