"""Draws a run's curves from its log: `python -m tools.nano.curves docs/nano_full.jsonl --out docs/nano.png`.

Left the loss of the answers, right the share of unseen answers that come out exactly, by ability. Needs
matplotlib.
"""

import argparse
import json
from pathlib import Path

from .questions import ABILITIES


def draw(log: Path, path: Path) -> None:
    """Writes the curves of `log` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # A run that was stopped goes on from what it saved last: of a step that came twice the later one counts.
    losses = list({line["step"]: line for line in lines if "loss" in line}.values())
    scores = list({line["step"]: line for line in lines if "score" in line}.values())
    losses.sort(key=lambda line: line["step"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([line["step"] for line in losses], [line["loss"] for line in losses], color="black")
    left.set(title="Loss of the answers", xlabel="step", yscale="log")
    colours = pyplot.get_cmap("tab20").colors
    for ability, colour in zip(ABILITIES, colours, strict=False):
        rows = [line for line in scores if ability in line]
        if rows:
            values = [100 * line[ability] for line in rows]
            right.plot([line["step"] for line in rows], values, ".-", color=colour, label=ability)
    right.set(title="Right on validation samples, %", xlabel="step", ylim=(0, 101))
    right.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw(arguments.log, arguments.out)


if __name__ == "__main__":
    main()
