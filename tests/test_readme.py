"""The READMEs: their examples run, their numbers are what the package computes, what they name exists."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HERE, ROOT, read_json, tiny_model
from internlm_xcomposer2 import InternLMXcomposer2Config
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import checkpoint_headers, shapes_of
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import Visual
from internlm_xcomposer2.ixc_utils import num_image_tokens
from PIL import Image

READMES = ("README.md", "README_CN.md")
PAIRS = (READMES, ("finetune/README.md", "finetune/README_CN.md"))
ALL_READMES = [name for pair in PAIRS for name in pair]
BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)```\n", re.DOTALL)
SIZES = ((640, 480), (1920, 1080), (3840, 2160))  # width, height
NUM_ANSWER_TOKENS = 4  # of the methods that write, whose answers here are noise

# Rows of the checkpoint table, nano's left out: configuration, `hd_num`, key of the recorded parameters.
ROWS = (
    ({"version": "2", "img_size": 224}, None, "2-7b"),
    ({"version": "2"}, None, "2-vl-7b"),
    ({"version": "2"}, None, "2-vl-1.8b(assumed dims)"),
    ({"version": "2-4khd"}, 25, "2-4khd-7b"),
    ({"version": "2-4khd"}, 55, "2-4khd-7b"),
    ({"version": "2.5"}, 24, "2.5-7b"),
    ({"version": "2.5"}, 24, "2.5-ol-base"),
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str) -> list[tuple[str, str, str]]:
    """(mark before it, language, content) of every fenced block."""
    return BLOCK.findall(text_of(name))


def rows_of(name: str, mark: str) -> list[list[str]]:
    """The cells of the table after a mark, without its head."""
    table = text_of(name).split(f"<!-- {mark} -->\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def offline_environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONIOENCODING": "utf-8"}


# ---- examples ----


def test_the_quick_start_prints_what_it_says(tmp_path):
    blocks = blocks_of("README.md")
    ((index, code),) = [
        (number, content) for number, (mark, _, content) in enumerate(blocks) if mark == "quick start"
    ]
    assert len(code.splitlines()) <= 10
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=offline_environment(tmp_path),
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == blocks[index + 1][2]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """What the examples need of the root, as the working directory: some of them write files."""
    for pattern in ("*.py", "*.json", "*.jinja", "*.safetensors", "tokenizer.model"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def writing_model():
    """A small model of version 2.5 with the task adapters, whose answers are short."""
    adapters = {"sft": 2, "dpo": 2, "web": 2}
    model = tiny_model("2.5", task_adapters=adapters, max_position_embeddings=32768)
    generate = model._generate_answer
    model._generate_answer = lambda *args, **kwargs: generate(
        *args, **{**kwargs, "max_new_tokens": NUM_ANSWER_TOKENS}
    )
    return model


def test_every_example_runs(clone, capsys):
    """In the order of the file and in one namespace, but for those that need a download or a server."""
    writer, names = writing_model(), {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for mark, language, code in blocks_of("README.md"):
            if language != "python" or mark in ("published", "server"):
                continue
            nano = names.get("model")
            if mark == "2.5":
                names["model"] = writer
            exec(compile(code, f"README.md: {code.strip().splitlines()[0]}", "exec"), names)
            if mark == "2.5":
                names["model"] = nano
    assert names["loss"].isfinite()
    assert (
        str(names["answers"]) == "['star', '6143']" and "['star', '6143']\nstar\n" in capsys.readouterr().out
    )
    assert [names["spread"].hf_device_map[part] for part in ("vit", "output")] == ["cpu", "disk"]
    assert {path.name for path in clone.glob("*.html")} == {"Bakery.html", "Resume-to-Personal_Page.html"}


# ---- numbers ----


def image_tokens(config: InternLMXcomposer2Config, hd_num: int | None, size: tuple[int, int]) -> int:
    """How many tokens the package makes of one picture, given as (width, height)."""
    if not config.is_tiled:
        return num_image_tokens(1, 1, config.tile_tokens_per_side, is_tiled=False)
    grid = Visual(image=Image.new("1", size)).grid(config, hd_num)
    return num_image_tokens(*grid, config.tile_tokens_per_side)


def test_the_table_of_checkpoints_is_what_the_package_computes():
    nano, *published = rows_of("README.md", "checkpoints")
    config = InternLMXcomposer2Config.from_pretrained(ROOT)
    counts = [math.prod(shape) for shape in shapes_of(checkpoint_headers(ROOT)).values()]
    check_row(nano, config, config.hd_num, sum(counts))
    recorded = read_json(HERE / "golden" / "state_dict_fullsize.json")
    for row, (fields, hd_num, key) in zip(published, ROWS, strict=True):
        check_row(row, InternLMXcomposer2Config(**fields), hd_num, recorded[key]["params"])


def check_row(row: list[str], config: InternLMXcomposer2Config, hd_num: int | None, num_parameters: int):
    name, layout, *tokens, memory, _ = row
    assert f"{config.img_size} px" in layout, name
    assert not config.is_tiled or layout.endswith(f"`hd_num` {hd_num}"), name
    assert [int(count) for count in tokens] == [image_tokens(config, hd_num, size) for size in SIZES], name
    gigabytes = 2 * num_parameters / 1e9
    assert float(memory.split()[0]) == round(gigabytes, 1 if gigabytes > 1 else 3), name


def test_the_defaults_in_the_table_are_those_of_the_configuration():
    defaults = {fields["version"]: InternLMXcomposer2Config(**fields).hd_num for fields, *_ in ROWS}
    assert defaults == {"2": 1, "2-4khd": 25, "2.5": 24}


def test_sizes_in_the_text_are_those_of_the_weights():
    recorded = read_json(HERE / "golden" / "state_dict_fullsize.json")["2.5-7b"]
    adapters = 2 * recorded["task_loras"] / 1e9
    num_parameters = sum(math.prod(shape) for shape in shapes_of(checkpoint_headers(ROOT)).values())
    english, chinese = (" ".join(text_of(name).split()) for name in READMES)
    assert f"{adapters:.1f} are the task adapters" in english
    assert f"{adapters:.1f} GB 是" in chinese
    assert f"{num_parameters / 1e6:.2f} million parameters" in english
    assert f"{num_parameters / 1e4:.0f} 万参数" in chinese


# ---- both languages ----


@pytest.mark.parametrize("pair", PAIRS, ids=["root", "finetune"])
def test_both_languages_have_the_same_blocks(pair):
    english, chinese = map(blocks_of, pair)
    assert english and english == chinese


def test_both_languages_have_the_same_head():
    heads = [text_of(name).split("\n---\n")[0] for name in READMES]
    assert heads[0] == heads[1]


TABLES = [
    (READMES, "checkpoints"),
    (READMES, "nano-table"),
    (PAIRS[1], "example-table"),
    (PAIRS[1], "memory"),
]


@pytest.mark.parametrize(("pair", "mark"), TABLES, ids=[mark for _, mark in TABLES])
def test_both_languages_have_the_same_numbers(pair, mark):
    numbers = [[re.findall(r"\d[\d.]*", " ".join(row[1:])) for row in rows_of(name, mark)] for name in pair]
    assert numbers[0] == numbers[1]
    names = [[re.findall(r"`[^`]+`", row[0]) for row in rows_of(name, mark)] for name in pair]
    assert names[0] == names[1]


@pytest.mark.parametrize("pair", PAIRS, ids=["root", "finetune"])
def test_both_languages_have_the_same_sections(pair):
    levels = [re.findall(r"^#+(?= )", BLOCK.sub("", text_of(name)), re.MULTILINE) for name in pair]
    assert levels[0] == levels[1]


# ---- what they name ----


@pytest.mark.parametrize("name", ALL_READMES)
def test_links_lead_somewhere(name):
    text = BLOCK.sub("", text_of(name))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert not path or ((ROOT / name).parent / path).is_file(), link
        assert not anchor or anchor in anchors, link


@pytest.mark.parametrize("name", ALL_READMES)
def test_make_targets_and_scripts_exist(name):
    makefile = text_of("Makefile")
    commands = "\n".join(content for _, language, content in blocks_of(name) if not language)
    for target in set(re.findall(r"^make (\w+)", commands, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"^ *python ([\w/]+\.py)", text_of(name), re.MULTILINE):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"-m (finetune\.\w+)", text_of(name)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for extra in re.findall(r"'\.\[(\w+)\]'", text_of(name)):
        assert re.search(rf"^{extra} = ", text_of("pyproject.toml"), re.MULTILINE), extra
