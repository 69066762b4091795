"""The first turn about a picture, beside transformers' own models of other families with the same decoder.

    python benchmarks/peers.py
    python benchmarks/peers.py --tokens 800 --repeats 1

All have a decoder of the same shape and a tower as deep and wide, with random weights, and a picture of about
--tokens tokens, as near as each family's tiles come. A turn runs from pixels to the last of --new-tokens
tokens: tower, prefill, decoding. Preparing the picture is left out. Ratios are times of the others divided by
ours. The last line is JSON.
"""

import argparse
import math

import common
import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE_TOKEN, START_TOKEN, END_TOKEN = 7, 8, 9
PEERS = ("ours", "Qwen2.5-VL", "InternVL")
SIDE_OF_INTERNVL = 448  # px of a tile


def prompt_of(num_image_tokens: int, image_token: int) -> torch.Tensor:
    """(1, tokens) ids with one picture among some text."""
    before = [10] * (common.NUM_TEXT_BEFORE - 1) + [START_TOKEN]
    after = [END_TOKEN] + [11] * (common.NUM_TEXT_AFTER - 1)
    return torch.tensor([[*before, *[image_token] * num_image_tokens, *after]])


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text_of(size: str) -> dict:
    """The decoder of one of the sizes, in the names that all families share."""
    text = {name: value for name, value in common.SIZES[size].text.items() if name != "plora_rank"}
    return {**text, "max_position_embeddings": 32768, "tie_word_embeddings": False}


def build_ours(size: str, num_tokens: int):
    """This package's 2.5, whose tiles make the number of tokens nearest to the one wanted."""
    model = common.build_model(size, adapters=False)
    grids = [(rows, cols) for rows in range(1, 9) for cols in range(rows, 9)]
    grid = min(grids, key=lambda grid: abs(model.num_image_tokens(*grid) - num_tokens))
    side = model.config.img_size
    inputs = {
        "input_ids": prompt_of(model.num_image_tokens(*grid), model.config.image_token_id),
        "pixel_values": random_pixels(1 + grid[0] * grid[1], 3, side, side),
        "image_grid_hw": torch.tensor([grid]),
    }
    return model, inputs


def build_qwen(size: str, num_tokens: int):
    """Qwen2.5-VL, which merges 2 x 2 patches of one picture."""
    text, vision = text_of(size), common.SIZES[size].vision
    part = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [part - 2 * (3 * part // 8), 3 * part // 8, 3 * part // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "rope_scaling": {**rope, "type": "default"}},
        vision_config={
            "depth": vision["num_hidden_layers"],
            "hidden_size": vision["hidden_size"],
            "num_heads": vision["num_attention_heads"],
            "intermediate_size": vision["intermediate_size"],
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": list(range(vision["num_hidden_layers"])),
        },
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=START_TOKEN,
        vision_end_token_id=END_TOKEN,
    )
    rows = round(math.sqrt(num_tokens))
    cols = round(num_tokens / rows)
    patches = 4 * rows * cols
    ids = prompt_of(rows * cols, IMAGE_TOKEN)
    inputs = {
        "input_ids": ids,
        "pixel_values": random_pixels(patches, 3 * 2 * common.PATCH**2),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * cols]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }
    return Qwen2_5_VLForConditionalGeneration(config), inputs


def build_internvl(size: str, num_tokens: int):
    """InternVL, with tiles of 256 tokens."""
    vision = {**common.SIZES[size].vision, "image_size": [SIDE_OF_INTERNVL] * 2}
    vision["patch_size"] = [common.PATCH] * 2
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_of(size)},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
    )
    each = (SIDE_OF_INTERNVL // common.PATCH // 2) ** 2
    tiles = max(1, round(num_tokens / each))
    pixels = random_pixels(tiles, 3, SIDE_OF_INTERNVL, SIDE_OF_INTERNVL)
    inputs = {"input_ids": prompt_of(tiles * each, IMAGE_TOKEN), "pixel_values": pixels}
    return InternVLForConditionalGeneration(config), inputs


BUILDERS = {"ours": build_ours, "Qwen2.5-VL": build_qwen, "InternVL": build_internvl}


def measure(peer: str, tokens: int, num_new: int, repeats: int, size: str, device: str, dtype: str) -> dict:
    """First turns of one family: a row of the table."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[peer](size, tokens)
    model = model.eval().requires_grad_(False).to(device, getattr(torch, dtype))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
    settings = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new}
    turns = []
    for _ in range(repeats + 1):
        turns.append(common.Marks(device))
        model.generate(**inputs, **settings, logits_processor=[turns[-1]])
    return {
        "mode": peer,
        "tokens": inputs["input_ids"].shape[1],
        "first_token": common.spread([marks.first for marks in turns[1:]]),
        "turn": common.spread([marks.times[-1] - marks.start for marks in turns[1:]]),
        "decode": common.spread([step for marks in turns[1:] for step in marks.steps]),
    }


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--tokens", type=int, default=2861, help="of the picture, about")
    result.add_argument("--new-tokens", type=int, default=8)
    result.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("peers", arguments)
    cases = [
        {
            "peer": peer,
            "tokens": arguments.tokens,
            "num_new": arguments.new_tokens,
            "repeats": arguments.repeats,
            **common.model_options(arguments),
        }
        for peer in arguments.peers
    ]
    rows = common.measure_all(measure, cases, arguments)
    ours = next((row for row in rows if row["mode"] == "ours"), None)
    times = ("first_token", "turn", "decode")
    compared = [
        {
            "peer": row["mode"],
            **{name: round(row[name]["median"] / ours[name]["median"], 2) for name in times},
        }
        for row in rows
        if ours and row is not ours
    ]
    common.finish(report, rows, compared)


if __name__ == "__main__":
    main()
