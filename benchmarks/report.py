"""Run all benchmarks at medium size and write RESULTS.md and cost.png beside them.

    python benchmarks/report.py            # runs everything, which takes about half an hour on one core
    python benchmarks/report.py --render   # only rewrites the files, from results.json

Each command's last line, its JSON, is kept in results.json. The plot needs matplotlib.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Each ends within ten minutes on one core, so that a shared machine can be measured in pieces.
RUNS = (
    "prefill_decode.py --tiles 1x1 2x3 3x5 --naive-tiles 6 --repeats 2",
    "prefill_decode.py --tiles 6x10 --naive off --repeats 1",
    "prefill_decode.py --tiles 2x3 --naive off --dtype bfloat16 --repeats 2",
    "operations.py",
    "chat_turns.py --turns 2",
    "memory.py --tiles 6",
    "vision.py --tiles 2x3 --pictures 1",
    "preprocess.py --threads 1 --frames",
    "batch.py --size nano --threads 1",
    "peers.py --repeats 2",
    "few_bits.py --layers 3",
)
INTRODUCTION = """# Results

Written by `python benchmarks/report.py`; `results.json` holds every number. Times are medians, followed
by the range. "Ratio" is naive / ours, where "naive" has this package's optimisations switched off; for peers,
theirs / ours. Sizes and repetitions are small, so that each command ends within ten minutes.

{machine}

![Time per token of prefill, and of decoding, against the number of image tokens](cost.png)
"""


def run(command: str, extra: list[str]) -> dict:
    """The JSON that one benchmark ends with."""
    script, *options = shlex.split(command)
    print(f"$ python benchmarks/{command}", flush=True)
    with subprocess.Popen(
        [sys.executable, HERE / script, *options, *extra], stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            print(line[:300].rstrip(), flush=True)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return {**json.loads(lines[-1]), "command": f"python benchmarks/{command}"}


# ---- text ----


def shown(value) -> str:
    """A cell: times as `median (min-max)` with their unit."""
    if isinstance(value, dict):
        scale, unit = (1000, "ms") if value["median"] < 1 else (1, "s")
        median, least, most = (f"{scale * value[name]:.3g}" for name in ("median", "min", "max"))
        return f"{median} {unit} ({least}-{most})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def table(rows: list[dict]) -> str:
    """Rows with the same keys as Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([shown(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(report: dict) -> str:
    """One benchmark: its command, its rows, its ratios."""
    parts = [f"## {report['benchmark']}", f"    {report['command']}"]
    if "limits" in report:
        limits = report["limits"]
        parts.append(
            f"The machine does {limits['gflops']} GFLOP/s in one large matrix product ({limits['fastest']}, "
            f"the best of {', '.join(limits['rates'])}) and reads memory at "
            f"{limits['gb_per_s']} GB/s; `share` is the fraction of these rates."
        )
    parts.append(table(report["rows"]))
    if report["ratios"]:
        parts += ["Ratio:", table(report["ratios"])]
    return "\n\n".join(parts)


def write_text(reports: list[dict], path: Path) -> None:
    """RESULTS.md."""
    machine = ", ".join(
        f"{name} {value}" for name, value in reports[0]["machine"].items() if name not in ("load", "threads")
    )
    text = [INTRODUCTION.format(machine=f"Machine: {machine}."), *map(section, reports)]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")


# ---- plot ----


def draw_plot(report: dict, path: Path) -> None:
    """Cost of one token of prefill and of one step of decoding against the picture's tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for mode, colour in (("naive", "tab:red"), ("ours", "tab:blue")):
        rows = sorted((r for r in report["rows"] if r["mode"] == mode), key=lambda r: r["image_tokens"])
        tokens = [row["image_tokens"] for row in rows]
        prefill = [1000 * row["prefill"]["median"] / row["tokens"] for row in rows]
        left.plot(tokens, prefill, "o-", color=colour, label=mode)
        right.plot(tokens, [1000 * row["decode"]["median"] for row in rows], "o-", color=colour, label=mode)
        if mode == "ours":
            rest = [1000 * (r["prefill"]["median"] - r["attention_s"]) / r["tokens"] for r in rows]
            left.plot(tokens, rest, "o--", color=colour, label="ours without attention")
    left.set(title="Prefill", ylabel="ms per token")
    right.set(title="Decoding", ylabel="ms per new token")
    for axes in (left, right):
        axes.set(xlabel="image tokens", ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--render", action="store_true", help="run nothing; write the files from results.json"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the files")
    parser.add_argument(
        "--only", nargs="*", help="run only these commands and keep the results of the others"
    )
    parser.add_argument("extra", nargs="*", help="options for every benchmark, after --")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    kept = arguments.out / "results.json"
    is_whole = not arguments.render and not arguments.only  # then nothing of an earlier run stays
    known = {} if is_whole or not kept.exists() else json.loads(kept.read_text(encoding="utf-8"))
    commands = [] if arguments.render else (arguments.only or RUNS)
    for command in commands:
        known[command] = run(command, arguments.extra)
        kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    ordered = sorted(known, key=lambda command: RUNS.index(command) if command in RUNS else len(RUNS))
    reports = [known[command] for command in ordered]
    if not reports:
        raise SystemExit(f"nothing to write: no results in {kept}; run without --render")
    write_text(reports, arguments.out / "RESULTS.md")
    plotted = [report for report in reports if report["benchmark"] == "prefill_decode"]
    if plotted:
        draw_plot(plotted[0], arguments.out / "cost.png")


if __name__ == "__main__":
    main()
