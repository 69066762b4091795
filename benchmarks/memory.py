"""The peak memory of a question about a picture, with all task adapters and with none.

    python benchmarks/memory.py
    python benchmarks/memory.py --tiles 15 --naive off

Each row is one call of `chat` in a separate process; `model_gb` is the size of the weights. The naive way has
all adapters, attention materialised and logits at every position. The last line is JSON.
"""

import argparse

import common


def measure(tiles: int, adapters: bool, mode: str, size: str, device: str, dtype: str) -> dict:
    """One question: a row of the table."""
    naive = mode == "naive"
    model = common.build_model(size, naive=naive, adapters=adapters or naive, device=device, dtype=dtype)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "hd_num": tiles}
    settings |= common.naive_chat() if naive else {}
    picture = common.picture_for(size)
    model.chat(common.load_tokenizer(), "What does the picture show?", [picture], **settings)
    return {
        "mode": mode,
        "tiles": tiles,
        "adapters": "all" if adapters or naive else "none",
        "model_gb": round(weights / 1e9, 6),
    }


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--tiles", type=int, nargs="*", default=[1, 6, 15], help="the most local tiles")
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("memory", arguments)
    modes = common.modes(arguments)
    ways = [(mode, True) for mode in modes] + [("ours", False)] * ("ours" in modes)
    cases = [
        {"tiles": tiles, "adapters": adapters, "mode": mode, **common.model_options(arguments)}
        for tiles in arguments.tiles
        for mode, adapters in ways
    ]
    rows = common.measure_all(measure, cases, arguments)
    whole = [row for row in rows if row["adapters"] == "all"]
    common.finish(report, rows, common.ratios(whole, ("tiles",), ("peak_gb",)))


if __name__ == "__main__":
    main()
