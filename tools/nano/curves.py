"""Draws a run's curves: `python -m tools.nano.curves runs/joint/trainer_state.json --out docs/nano.png`.

On the left the loss of the answers, on the right the share of unseen answers that are exactly right, by
ability. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

from .questions import ABILITIES


def draw(log: Path, path: Path) -> None:
    """Writes the curves of `log`, a `trainer_state.json`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = json.loads(log.read_text(encoding="utf-8"))["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    scores = [entry for entry in history if "eval_score" in entry]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], color="black")
    left.set(title="Loss of the answers", xlabel="step", yscale="log")
    colours = pyplot.get_cmap("tab20").colors
    for ability, colour in zip(ABILITIES, colours, strict=False):
        rows = [entry for entry in scores if f"eval_{ability}" in entry]
        if rows:
            values = [100 * entry[f"eval_{ability}"] for entry in rows]
            right.plot([entry["step"] for entry in rows], values, ".-", color=colour, label=ability)
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
