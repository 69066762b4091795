"""How fast a prompt with a picture is read, and how fast each token is written after it.

    python benchmarks/prefill_decode.py                      # 1k to 24k image tokens, one thread
    python benchmarks/prefill_decode.py --tiles 2x3 --naive off --compile

Prefill is the time to the first token of a prompt of embeddings, decode the time of each later one. Both are
compared with the most that the machine can do: prefill with the rate of one large matrix product in the
fastest library and type, counting only products that are needed (low-rank ones on image tokens, attention
below the diagonal, the head on one position), decode with the rate of reading memory, counting each weight
and each cached key and value once.
The naive way has attention materialised, logits at every position and a cache that is concatenated. The last
line is JSON.
"""

import argparse
import time
from collections.abc import Callable

import common
import torch
from transformers import CompileConfig, DynamicCache

# Rows and columns of tiles: 841, 2861, 6481, 11701 and 24541 image tokens at 560 px.
GRIDS = ("1x1", "2x3", "3x5", "4x7", "6x10")
# Beyond this many tiles the naive way would need tens of GB for one layer's attention.
MOST_NAIVE_TILES = 15


def decoder_weights(model) -> tuple[int, int]:
    """How many weights act on every token, and how many more on image tokens; without the head."""
    plain = low_rank = 0
    for name, weight in model.model.layers.named_parameters():
        plain += weight.numel() if ".linear." in name else 0
        low_rank += weight.numel() if ".Plora_" in name else 0
    return plain, low_rank


def useful_products(model, num_tokens: int, num_image_tokens: int) -> float:
    """The least GFLOP that the prefill of one prompt needs."""
    text = model.config.text_config
    plain, low_rank = decoder_weights(model)
    attention = text.num_hidden_layers * text.hidden_size * num_tokens * (num_tokens + 1)
    head = model.output.weight.numel()
    return 2 * (plain * num_tokens + low_rank * num_image_tokens + attention + head) / 1e9


def attention_seconds(model, num_tokens: int, repeats: int) -> float:
    """The time of attention alone in the prefill of this many tokens; it grows with their square."""
    text, weight = model.config.text_config, model.output.weight
    query = torch.randn(1, text.num_attention_heads, num_tokens, text.head_dim).to(weight)
    key, value = (query[:, : text.num_key_value_heads].contiguous() for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = common.repeat(
        lambda: attend(query, key, value, is_causal=True, enable_gqa=True), repeats, str(weight.device)
    )
    return text.num_hidden_layers * seconds["median"]


def bytes_read(model, num_tokens: int) -> float:
    """GB that one decoding step must read after `num_tokens` tokens."""
    text = model.config.text_config
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * num_tokens
    weights = decoder_weights(model)[0] + model.output.weight.numel()
    return (weights + cached) * model.output.weight.element_size() / 1e9


def generate(
    model, inputs: dict, num_new: int, mode: str, clock: Callable[[], float] = time.perf_counter
) -> common.Marks:
    """Generate `num_new` tokens in one of the modes, and return when each came."""
    marks = common.Marks(inputs["inputs_embeds"].device, clock)
    settings = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
    if mode == "naive":
        settings |= {"logits_to_keep": 0, "past_key_values": DynamicCache(config=model.config)}
    if mode == "compiled":
        settings |= {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
        settings["compile_config"]._compile_all_devices = True
    model.generate(**inputs, **settings, logits_processor=[marks])
    return marks


def measure(grid: tuple[int, int], mode: str, num_new: int, repeats: int, size: str, device: str, dtype: str):
    """One prompt in one mode: a row of the table."""
    model = common.build_model(size, naive=mode == "naive", adapters=False, device=device, dtype=dtype)
    inputs = common.bare_prompt(model, grid)
    num_tokens, num_image_tokens = inputs["im_mask"].shape[1], int(inputs["im_mask"].sum())
    generate(model, {name: value[:, :40] for name, value in inputs.items()}, 3, mode)
    marks = [generate(model, inputs, num_new, mode) for _ in range(repeats)]
    prefill = common.spread([each.first for each in marks])
    decode = common.spread([step for each in marks for step in each.steps[1:]])
    attention = attention_seconds(model, num_tokens, repeats) if mode == "ours" else None
    return {
        "mode": mode,
        "image_tokens": num_image_tokens,
        "tokens": num_tokens,
        "prefill": prefill,
        "decode": decode,
        "attention_s": None if attention is None else round(attention, 4),
        "prefill_tokens_per_s": round(num_tokens / prefill["median"], 1),
        "decode_tokens_per_s": round(1 / decode["median"], 2),
        "prefill_gflops": common.to_digits(
            useful_products(model, num_tokens, num_image_tokens) / prefill["median"]
        ),
        "decode_gb_per_s": common.to_digits(bytes_read(model, num_tokens) / decode["median"]),
    }


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--tiles", nargs="*", default=GRIDS, help="rows x columns of local tiles")
    result.add_argument("--new-tokens", type=int, default=16)
    result.add_argument(
        "--naive-tiles", type=int, default=MOST_NAIVE_TILES, help="the most tiles in the naive way"
    )
    result.add_argument("--compile", action="store_true", help="measure static cache and torch.compile, too")
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("prefill_decode", arguments)
    small = arguments.size == "tiny"
    torch.set_num_threads(arguments.threads)
    limits = common.machine_limits(arguments.device, small=small)
    common.print_row(limits)
    rows = []
    for name in arguments.tiles:
        grid = tuple(map(int, name.split("x")))
        for mode in common.modes(arguments) + ["compiled"] * arguments.compile:
            if mode == "naive" and grid[0] * grid[1] > arguments.naive_tiles:
                continue
            row = common.measure_apart(
                measure,
                arguments,
                grid=grid,
                mode=mode,
                num_new=arguments.new_tokens,
                repeats=arguments.repeats,
                **common.model_options(arguments),
            )
            row["prefill_share"] = common.to_digits(row["prefill_gflops"] / limits["gflops"])
            row["decode_share"] = common.to_digits(row["decode_gb_per_s"] / limits["gb_per_s"])
            rows.append(row)
            common.print_row(row)
    compared = common.ratios(rows, ("image_tokens",), ("prefill", "decode", "peak_gb"))
    common.finish({**report, "limits": limits}, rows, compared)


if __name__ == "__main__":
    main()
