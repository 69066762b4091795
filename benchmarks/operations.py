"""Where the time goes: torch's own profile of a prefill and of decoding steps.

    python benchmarks/operations.py
    python benchmarks/operations.py --tiles 1x1 --dtypes float32

A prompt with one picture of --tiles tiles is prefilled, and --new-tokens tokens are decoded after it. Shares
are of the processor's time in torch's operations, Python's own not counted:

- products: with weights;
- attention: of queries with keys and values;
- copies: to other places, shapes and types;
- element-wise: activations, norms, rotary embedding, sums and all else.

The last line is JSON.
"""

import argparse

import common
import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("scaled_dot_product", "bmm", "softmax"),
    "products": ("linear_pointwise", "::mm", "::addmm", "::mv", "::addmv", "pack_mm", "::linear"),
    "copies": ("copy_", "::cat", "::clone", "::index", "::_to_copy"),
}
OTHERS = "element-wise"


def kind_of(operation: str) -> str:
    """Which of the kinds an operation of torch is."""
    found = (kind for kind, parts in KINDS.items() if any(part in operation for part in parts))
    return next(found, OTHERS)


def profiled(function) -> tuple[float, dict[str, float]]:
    """Seconds in torch's operations while a function runs, and the share of each kind."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    shares = dict.fromkeys((*KINDS, OTHERS), 0.0)
    for event in run.key_averages():
        shares[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    total = sum(shares.values())
    return total, {kind: round(seconds / total, 3) for kind, seconds in shares.items()}


def measure(grid: tuple[int, int], num_new: int, size: str, device: str, dtype: str) -> dict:
    """Both phases of one type, as rows."""
    model = common.build_model(size, adapters=False, device=device, dtype=dtype)
    inputs = common.bare_prompt(model, grid)
    embed, length = model.get_input_embeddings(), inputs["im_mask"].shape[1]
    model(**{name: value[:, :40] for name, value in inputs.items()})  # measures the ways of products
    kept = []

    def prefill() -> None:
        kept.append(model(**inputs, use_cache=True, logits_to_keep=1)[1])

    def decode() -> None:
        for _ in range(num_new):
            model(inputs_embeds=embed(torch.zeros(1, 1, dtype=torch.long)), past_key_values=kept[0])

    rows = []
    for phase, function, count in (("prefill", prefill, 1), ("decode", decode, num_new)):
        seconds, shares = profiled(function)
        rows.append({"dtype": dtype, "phase": phase, "tokens": length, "seconds": round(seconds / count, 4)})
        rows[-1] |= shares
    return {"rows": rows}


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--tiles", default="2x3", help="rows x columns of local tiles")
    result.add_argument("--new-tokens", type=int, default=8)
    result.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report, rows = common.begin("operations", arguments), []
    grid = tuple(map(int, arguments.tiles.split("x")))
    for dtype in arguments.dtypes:
        options = common.model_options(arguments) | {"dtype": dtype, "num_new": arguments.new_tokens}
        found = common.measure_apart(measure, arguments, grid=grid, **options)
        for row in found["rows"]:
            common.print_row(row)
        rows += found["rows"]
    common.finish(report, rows, [])


if __name__ == "__main__":
    main()
