"""Every benchmark runs at tiny size and ends with the JSON that the report is written from; no timings."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from helpers import HERE, ROOT

BENCHMARKS = ROOT / "benchmarks"
MODULES = (
    "batch",
    "chat_turns",
    "common",
    "few_bits",
    "full_size",
    "memory",
    "operations",
    "peers",
    "prefill_decode",
    "preprocess",
    "report",
    "vision",
)
TINY = ["--size", "tiny", "--repeats", "1", "--same-process", "--threads", "1"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark in this process -> its JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def call(name: str, *options: str, common: list[str] = TINY) -> dict:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *common, *options])
        importlib.import_module(name).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    yield call
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def check(report: dict, name: str, num_rows: int, times: tuple[str, ...]) -> None:
    assert report["benchmark"] == name and len(report["rows"]) == num_rows
    assert {"device", "dtype", "torch", "transformers", "threads"} <= report["machine"].keys()
    for row in report["rows"]:
        assert row["peak_gb"] > 0
        for key in times:
            value = row[key]
            assert value["min"] <= value["median"] <= value["max"] if isinstance(value, dict) else value > 0
    assert {row["mode"] for row in report["rows"]} >= {"ours", "naive"}
    assert report["ratios"]


def test_prefill_and_decode(run):
    report = run("prefill_decode", "--tiles", "1x1", "2x3", "--new-tokens", "4")
    check(report, "prefill_decode", 4, ("prefill", "decode"))
    assert [row["image_tokens"] for row in report["rows"]] == [13, 13, 35, 35]
    for row in report["rows"]:
        assert row["prefill_share"] > 0 and row["decode_share"] > 0
    products = [row["prefill_gflops"] * row["prefill"]["median"] for row in report["rows"]]
    limits = report["limits"]
    assert limits.keys() == {"gflops", "fastest", "rates", "gb_per_s"} and products[0] <= products[2]
    assert limits["gflops"] == max(limits["rates"].values()) == limits["rates"][limits["fastest"]]
    assert {"float32 by torch", "bfloat16 by torch"} <= limits["rates"].keys()


def test_useful_products_are_those_that_torch_counts(run, monkeypatch):
    """Counted by torch's own counter: everything except the half of attention above the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    prefill, common = importlib.import_module("prefill_decode"), importlib.import_module("common")
    model = common.build_model("tiny", naive=True)
    inputs = common.bare_prompt(model, (1, 1))
    num_tokens, num_image = inputs["im_mask"].shape[1], int(inputs["im_mask"].sum())
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:  # it doesn't count in-place products
        model(**inputs, logits_to_keep=1)
    text = model.config.text_config
    above = 2 * text.num_hidden_layers * text.hidden_size * num_tokens * (num_tokens - 1)
    assert counter.get_total_flops() - above == pytest.approx(
        1e9 * prefill.useful_products(model, num_tokens, num_image)
    )


def test_full_size(run, tmp_path):
    pytest.importorskip("torchao")
    report = run("full_size", "--folder", str(tmp_path / "made here"))
    rows = {row["step"]: row for row in report["rows"]}
    assert list(rows) == ["make", "load", "chat", "save", "compare", "quantize", "chat, 4 bits"]
    assert rows["load"]["finite"] and rows["compare"]["equal"] and rows["compare"]["weights"] > 50
    assert rows["quantize"]["disk_gb"] < rows["make"]["disk_gb"] == rows["save"]["disk_gb"]
    for step in ("chat", "chat, 4 bits"):
        assert rows[step]["first_token_s"] >= 0 and rows[step]["token_s"] > 0


def test_the_1_8b_checkpoint_has_the_published_number_of_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    with torch.device("meta"):
        model = InternLMXComposer2ForCausalLM(importlib.import_module("common").build_config("1.8b"))
    recorded = json.loads((HERE / "golden" / "state_dict_fullsize.json").read_text(encoding="utf-8"))
    found = sum(weight.numel() for weight in model.parameters())
    assert found == recorded["2-vl-1.8b(assumed dims)"]["params"]
    sys.modules.pop("common", None)


def test_vision(run):
    report = run("vision", "--tiles", "1x2", "--pictures", "1", "2", "--repeated")
    check(report, "vision", 4, ("time",))
    assert [row["tiles"] for row in report["rows"]] == [3, 3, 6, 6]


def test_preprocessing(run):
    pytest.importorskip("av")
    report = run("preprocess", "--pictures", "2", "--minutes", "0.5", "--frames")
    check(report, "preprocess", 12, ("time",))
    frames = {row["of"] for row in report["rows"] if row["number"] == 16}
    assert len(frames) == 4 and "Video_transform, 640x360" in frames


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (120, 120)])
def test_both_ways_of_putting_frames_on_a_picture_give_the_same_bits(run, size):
    """Except for the lines between frames, which the naive way leaves out."""
    preprocess, common = importlib.import_module("preprocess"), importlib.import_module("common")
    font = preprocess.get_font()
    frame = common.draw_picture(*size)
    assert preprocess.composite_naively([frame], font).tobytes() == preprocess.frame2img([frame]).tobytes()
    composite = preprocess.frame2img([frame, frame])
    assert (
        preprocess.transform_naively(composite).tobytes() == preprocess.Video_transform(composite).tobytes()
    )


def test_both_ways_of_preprocessing_give_the_same_bits(run):
    preprocess, common = importlib.import_module("preprocess"), importlib.import_module("common")
    from helpers import tiny_config

    drawn = [common.draw_picture(90, 200, seed) for seed in range(3)]
    visuals = [preprocess.Visual(image=picture) for picture in drawn]
    ours = preprocess.prepare_visuals(visuals, tiny_config(), 6)
    naive = preprocess.prepare_naively(drawn, 56, 6)
    assert all(torch.equal(one, other) for one, other in zip(ours, naive, strict=True))


def test_turns_of_a_chat(run):
    report = run("chat_turns", "--turns", "2", "--beams", "1", "2", "--new-tokens", "3")
    check(report, "chat_turns", 8, ("first_token", "total"))
    assert [(row["beams"], row["turn"]) for row in report["rows"][:4]] == [(1, 1), (1, 2)] * 2


def test_memory(run):
    report = run("memory", "--tiles", "1")
    check(report, "memory", 3, ("model_gb",))
    whole, naive, bare = report["rows"]
    assert (whole["adapters"], naive["adapters"], bare["adapters"]) == ("all", "all", "none")
    assert whole["model_gb"] == naive["model_gb"] > bare["model_gb"]


def test_a_batch(run):
    report = run("batch", "--conversations", "1", "2", "--new-tokens", "2")
    check(report, "batch", 4, ("time",))


def test_operations_are_of_four_kinds(run):
    report = run("operations", "--tiles", "1x1", "--new-tokens", "2", "--dtypes", "float32")
    assert [(row["dtype"], row["phase"]) for row in report["rows"]] == [
        ("float32", "prefill"),
        ("float32", "decode"),
    ]
    operations = importlib.import_module("operations")
    for row in report["rows"]:
        shares = [row[kind] for kind in (*operations.KINDS, operations.OTHERS)]
        assert all(share > 0 for share in shares) and sum(shares) == pytest.approx(1, abs=0.01)
        assert row["seconds"] > 0
    assert operations.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert operations.kind_of("mkldnn::_linear_pointwise") == operations.kind_of("aten::addmm") == "products"
    assert operations.kind_of("aten::copy_") == "copies"
    assert operations.kind_of("aten::silu") == "element-wise"


def test_peers_have_the_same_decoder_and_about_as_many_tokens(run):
    report = run("peers", "--tokens", "260")
    assert [row["mode"] for row in report["rows"]] == ["ours", "Qwen2.5-VL", "InternVL"]
    assert [row["peer"] for row in report["ratios"]] == ["Qwen2.5-VL", "InternVL"]
    for row in report["rows"]:
        assert 250 < row["tokens"] < 320 and 0 < row["first_token"]["median"] < row["turn"]["median"]
    peers = importlib.import_module("peers")
    sizes = set()
    for build in peers.BUILDERS.values():
        model, _ = build("tiny", 260)
        weights = {name: weight for name, weight in model.named_parameters() if "layers.1." in name}
        decoder = [
            weight.numel() for name, weight in weights.items() if "vi" not in name and "bias" not in name
        ]
        sizes.add(sum(decoder) - sum(w.numel() for name, w in weights.items() if "Plora" in name))
    assert len(sizes) == 1


@pytest.mark.slow
def test_few_bits(run):
    sizes = ["--hidden", "256", "--layers", "1", "--tokens", "20", "--new-tokens", "4"]
    report = run("few_bits", *sizes, common=["--repeats", "1", "--same-process"])
    whole, four, eight = report["rows"]
    assert (whole["kind"], four["kind"], eight["kind"]) == ("bfloat16", "4 bits", "8 bits")
    assert four["linears_mb"] < 0.35 * whole["linears_mb"] and eight["linears_mb"] < 0.6 * whole["linears_mb"]
    assert [row["kind"] for row in report["ratios"]] == ["4 bits", "8 bits"]
    assert all(row["prefill"]["median"] > row["decode"]["median"] > 0 for row in report["rows"])


@pytest.mark.slow
def test_rows_come_from_separate_processes(tmp_path):
    command = [sys.executable, BENCHMARKS / "vision.py", *TINY, "--tiles", "1x1", "--pictures", "1"]
    command.remove("--same-process")
    result = subprocess.run(
        [*map(str, command), "--naive", "off"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert [row["mode"] for row in report["rows"]] == ["ours"] and report["ratios"] == []


def test_the_report_holds_every_number(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    results = {"prefill_decode.py": run("prefill_decode", "--tiles", "1x1", "1x2", "--new-tokens", "3")}
    results["vision.py --tiles 2x3"] = run("vision", "--tiles", "1x1", "--pictures", "1")
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["report.py", "--render", "--out", str(tmp_path)])
    importlib.import_module("report").main()
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    for report in results.values():
        assert f"## {report['benchmark']}" in text and "| mode |" in text
        for row in report["ratios"]:
            assert (
                f"| {' | '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in row.values())} |"
                in text
            )
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
