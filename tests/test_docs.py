"""The documentation: its examples run, its numbers and names are those of the package, in both languages."""

import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import HERE, ROOT, read_json, tiny_model
from internlm_xcomposer2 import (
    InternLMXcomposer2Config,
    InternLMXComposerConfig,
    InternLMXComposerForCausalLM,
)
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import checkpoint_headers, shapes_of
from internlm_xcomposer2.configuration_internlm_xcomposer2 import TESTED_TRANSFORMERS
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import Visual
from internlm_xcomposer2.ixc_utils import num_image_tokens
from PIL import Image
from transformers import initialization as init

READMES = ("README.md", "README_CN.md")
MAX_BYTES = 12_000  # of each README
ENGLISH_ONLY = ("docs/compatibility.md", "docs/nano.md")
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PAIRS = (
    READMES,
    *(
        (page, page.replace("docs/", "docs/zh/"))
        for page in PAGES
        if page not in ("README.md", *ENGLISH_ONLY)
    ),
)
ALL_PAGES = (*(name for pair in PAIRS for name in pair), *ENGLISH_ONLY)
LINKING = (
    *ALL_PAGES,
    "finetune/README.md",
    "finetune/README_CN.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
)
BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)```\n", re.DOTALL)
# Need a download, test_serve.py's server, vLLM, or llama.cpp, with which test_gguf.py runs them.
OUTSIDE = ("published", "server", "vllm", "gguf")
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


def examples_of(name: str) -> list[tuple[str, str]]:
    """(mark before it, content) of every block of Python that can run here."""
    blocks = blocks_of(name)
    return [(mark, code) for mark, language, code in blocks if language == "python" and mark not in OUTSIDE]


def printed_after(name: str) -> dict[str, str]:
    """Block of Python -> the output that the page shows right after it."""
    text, shown = text_of(name), {}
    blocks = list(BLOCK.finditer(text))
    for block, output in zip(blocks, blocks[1:], strict=False):
        between = text[block.end() : output.start()].strip()
        if (block[2], output[2]) == ("python", "") and between in ("", "It prints:"):
            shown[block[3]] = output[3]
    return shown


def tables_of(name: str) -> list[list[list[str]]]:
    """The cells of every table, without its header."""
    tables = re.findall(r"(?:^\|.*\n)+", BLOCK.sub("", text_of(name)), re.MULTILINE)
    return [[cells_of(line) for line in table.splitlines()[2:]] for table in tables]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of(name: str, mark: str) -> list[list[str]]:
    """The cells of the table after a mark, without its header."""
    table = text_of(name).split(f"<!-- {mark} -->\n\n")[1].split("\n\n")[0]
    return [cells_of(line) for line in table.splitlines()[2:]]


def offline_environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONIOENCODING": "utf-8"}


# ---- speed ----

# Rows of the table of benchmarks: benchmark, what was measured, and which of its rows.
MEASURED = (
    ("prefill_decode", "prefill", {"tokens": 2879}),
    ("prefill_decode", "decode", {"tokens": 2879}),
    ("chat_turns", "total", {"beams": 1, "turn": 1}),
    ("chat_turns", "total", {"beams": 1, "turn": 2}),
    ("chat_turns", "total", {"beams": 3, "turn": 1}),
    ("vision", "time", {"tiles": 7}),
    ("preprocess", "time", {"of": "Video_transform, 640x360"}),
    ("memory", "peak_gb", {"tiles": 6, "adapters": "all"}),
    ("batch", "time", {"conversations": 8}),
)
UNITS = {"s": 1, "ms": 1e-3, "GB": 1}


def measured(benchmark: str, name: str, where: dict) -> list[float]:
    """What RESULTS.md says of our way and of the other, in seconds or GB."""
    reports = read_json(ROOT / "benchmarks" / "results.json").values()
    rows = [row for report in reports if report["benchmark"] == benchmark for row in report["rows"]]
    found = {row["mode"]: row[name] for row in reversed(rows) if where.items() <= row.items()}
    values = [found[mode] for mode in ("ours", "naive")]
    return [value["median"] if isinstance(value, dict) else value for value in values]


@pytest.mark.parametrize("page", ["docs/speed.md", "docs/zh/speed.md"])
def test_the_table_of_benchmarks_says_what_was_measured(page):
    rows = rows_of(page, "benchmarks")
    assert len(rows) == len(MEASURED)
    for (label, *cells, ratio), case in zip(rows, MEASURED, strict=True):
        values = measured(*case)
        shown = [float(number) * UNITS[unit] for number, unit in map(str.split, cells)]
        assert shown == pytest.approx(values, rel=0.01), label
        assert float(ratio) == pytest.approx(values[1] / values[0], rel=0.03), label


# ---- examples ----


def quick_start() -> str:
    (code,) = [content for mark, _, content in blocks_of("README.md") if mark == "quick start"]
    return code


@pytest.mark.slow
def test_the_quick_start_prints_what_it_says(tmp_path):
    code = quick_start()
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
    assert result.stdout == printed_after("README.md")[code]


@dataclass(frozen=True)
class Ran:
    """What the examples of a page produced: their variables and the web pages that they wrote."""

    names: dict
    pages: set[str]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What the examples need from the root, in a place where they may write."""
    folder = tmp_path_factory.mktemp("clone")
    for pattern in ("*.py", "*.json", "*.jinja", "*.safetensors", "tokenizer.model"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.fixture(scope="module")
def started(clone) -> dict:
    """The variables after the quick start."""
    names = {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.chdir(clone)
        exec(compile(quick_start(), "quick start", "exec"), names)
    return names


@pytest.fixture(scope="module")
def writer():
    """A small model of version 2.5 with the task adapters, whose answers are short."""
    adapters = {"sft": 2, "dpo": 2, "web": 2}
    model = tiny_model("2.5", task_adapters=adapters, max_position_embeddings=32768)
    generate = model._generate_answer
    model._generate_answer = lambda *args, **kwargs: generate(
        *args, **{**kwargs, "max_new_tokens": NUM_ANSWER_TOKENS}
    )
    return model


@pytest.fixture(scope="module")
def run(clone, started, writer) -> Callable[[str], Ran]:
    """Run a page's examples once, in order and in one namespace, except those that can't run here.

    The namespace has the variables of the quick start if the page links to it.
    """
    done: dict[str, Ran] = {}

    def call(page: str) -> Ran:
        if page not in done:
            names = dict(started) if "README.md#quick-start" in text_of(page) else {}
            with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
                patch.chdir(clone)
                torch.manual_seed(0)
                run_examples(page, names, writer)
                written = list(clone.glob("*.html"))
                done[page] = Ran(names, {path.name for path in written})
                for path in written:
                    path.unlink()
        return done[page]

    return call


def run_examples(page: str, names: dict, writer) -> None:
    shown = printed_after(page)
    for mark, code in examples_of(page):
        nano, output = names.get("model"), io.StringIO()
        if mark == "2.5":
            names["model"] = writer
        with redirect_stdout(output):
            exec(compile(code, f"{page}: {code.strip().splitlines()[0]}", "exec"), names)
        if mark == "2.5":
            names["model"] = nano
        printed = output.getvalue()
        assert printed == shown.get(code, printed)
        for line in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE):
            assert line in printed.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if examples_of(page)])
def test_every_example_runs(page, run):
    run(page)


def test_what_the_examples_produce(run):
    names = run("docs/methods.md").names
    assert names["loss"].isfinite() and names["stacked"].shape[0] == 2
    assert len(names["states"]) == 1 + len(names["model"].vit.vision_tower.vision_model.encoder.layers)
    assert run("docs/methods.md").pages == {"Bakery.html", "Resume-to-Personal_Page.html"}
    assert run("README.md").pages == {"Bakery.html"}
    trained = run("docs/finetuning.md").names["trained"].named_parameters()
    assert all(".default." in name for name, weight in trained if weight.requires_grad)


# ---- numbers ----


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_are_short(name):
    assert (ROOT / name).stat().st_size <= MAX_BYTES


def image_tokens(config: InternLMXcomposer2Config, hd_num: int | None, size: tuple[int, int]) -> int:
    """How many tokens the package makes of a picture, given as (width, height)."""
    if not config.is_tiled:
        return num_image_tokens(1, 1, config.tile_tokens_per_side, is_tiled=False)
    grid = Visual(image=Image.new("1", size)).grid(config, hd_num)
    return num_image_tokens(*grid, config.tile_tokens_per_side)


def test_the_table_of_checkpoints_is_what_the_package_computes():
    nano, *published, first = rows_of("README.md", "checkpoints")
    config = InternLMXcomposer2Config.from_pretrained(ROOT)
    counts = [math.prod(shape) for shape in shapes_of(checkpoint_headers(ROOT)).values()]
    check_row(nano, config, config.hd_num, sum(counts))
    recorded = read_json(HERE / "golden" / "state_dict_fullsize.json")
    for row, (fields, hd_num, key) in zip(published, ROWS, strict=True):
        check_row(row, InternLMXcomposer2Config(**fields), hd_num, recorded[key]["params"])
    with torch.device("meta"), init.no_init_weights():
        model = InternLMXComposerForCausalLM(InternLMXComposerConfig())
    _, layout, *tokens, memory, _ = first
    assert f"{model.config.img_size} px" in layout
    assert {int(count) for count in tokens} == {model.num_image_tokens(1, 1)}
    assert float(memory) == round(2 * model.num_parameters() / 1e9, 1)


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


def test_the_summary_of_nano_is_that_of_its_table():
    right = {row[0]: float(row[-2]) for row in rows_of("docs/nano.md", "nano-table")}
    small, one_tile = right.pop("small"), right.pop("small, one tile")
    assert one_tile < small < min(right.values())
    for name in READMES:
        text = text_of(name)
        for percent in (small, min(right.values()), max(right.values())):
            assert re.search(rf"\b{percent:.1f} ?%", text) or f"{percent:.1f} to" in text, (name, percent)


def test_releases_are_those_that_the_package_asks_for():
    text = text_of("pyproject.toml")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    requirements = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    requirements["Python"] = re.search(r'requires-python = ">=([\d.]+)"', text)[1]
    for name, oldest, *_ in rows_of("docs/compatibility.md", "releases"):
        assert requirements[name] == oldest, name
    assert TESTED_TRANSFORMERS in text_of("docs/compatibility.md")
    for name in READMES:
        oldest = (requirements[part] for part in ("Python", "torch", "transformers"))
        for release in (*oldest, TESTED_TRANSFORMERS):
            assert release in text_of(name), (name, release)


# ---- both languages ----


def test_every_page_has_a_twin():
    chinese = {f"docs/zh/{path.name}" for path in (ROOT / "docs/zh").glob("*.md")}
    assert chinese == {other for _, other in PAIRS[1:]}


def test_both_languages_have_the_same_head():
    heads = [text_of(name).split("\n---\n")[0] for name in READMES]
    assert heads[0] == heads[1]


@pytest.fixture(params=PAIRS, ids=[page for page, _ in PAIRS])
def pair(request) -> tuple[str, str]:
    return request.param


def test_both_languages_have_the_same_blocks(pair):
    english, chinese = map(blocks_of, pair)
    assert english == chinese


def test_both_languages_have_the_same_numbers(pair):
    numbers, names = [], []
    for name in pair:
        tables = tables_of(name)
        rows = [row for table in tables for row in table]
        numbers.append([re.findall(r"\d[\d.]*", " ".join(row[1:])) for row in rows])
        names.append([re.findall(r"`[^`]+`", row[0]) for row in rows])
    assert numbers[0] == numbers[1]
    assert names[0] == names[1]


def test_both_languages_name_the_same_code(pair):
    english, chinese = (
        set(re.findall(r"`[^`]+`", " ".join(BLOCK.sub("", text_of(name)).split()))) for name in pair
    )
    assert english == chinese


def test_both_languages_have_the_same_sections(pair):
    levels = [re.findall(r"^#+(?= )", BLOCK.sub("", text_of(name)), re.MULTILINE) for name in pair]
    assert levels[0] == levels[1]


# ---- what they name ----


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKING)
def test_links_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", text_of(name))) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_in_its_index():
    for index in ("docs/README.md", "docs/zh/README.md"):
        folder = (ROOT / index).parent
        for page in folder.glob("*.md"):
            assert page.name == "README.md" or f"({page.name})" in text_of(index), (index, page.name)


@pytest.mark.parametrize("name", ALL_PAGES)
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
