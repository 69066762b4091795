"""How fast pictures become image tokens: tower, merge and projector.

    python benchmarks/vision.py
    python benchmarks/vision.py --tiles 2x3 --pictures 1 4 --repeated

Every picture has a global view besides its local tiles. The naive way passes one tile at a time through
materialised attention. `--repeated` shows the same picture again and again, which is encoded once. The last
line is JSON.
"""

import argparse

import common
import torch


def random_tiles(model, grid: tuple[int, int], num_pictures: int, repeated: bool) -> tuple[torch.Tensor, ...]:
    """Normalised tiles of several pictures, and their grids."""
    side, each = model.config.img_size, 1 + grid[0] * grid[1]
    num_drawn = each if repeated else each * num_pictures
    tiles = torch.randn(num_drawn, 3, side, side, generator=torch.Generator().manual_seed(0))
    tiles = tiles.repeat(num_pictures, 1, 1, 1) if repeated else tiles
    return tiles.to(model.output.weight), torch.tensor([grid] * num_pictures)


def encode_one_by_one(model, tiles: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """What `get_image_features` computes, without batches and again for each repetition."""
    features = torch.cat([model.vit.encode_tiles(tile) for tile in tiles.split(1)])
    pieces = model.vit.assemble(features, grids.tolist(), model.plora_glb_GN, model.plora_sub_GN)
    return [model.vision_proj(piece) for piece in pieces]


def measure(
    grid: tuple[int, int],
    num_pictures: int,
    repeated: bool,
    mode: str,
    repeats: int,
    size: str,
    device: str,
    dtype: str,
) -> dict:
    """Some pictures in one mode: a row of the table."""
    model = common.build_model(size, naive=mode == "naive", adapters=False, device=device, dtype=dtype)
    tiles, grids = random_tiles(model, grid, num_pictures, repeated)
    encode = model.get_image_features if mode == "ours" else lambda *given: encode_one_by_one(model, *given)
    seconds = common.repeat(lambda: encode(tiles, grids), repeats, device)
    return {
        "mode": mode,
        "tiles": len(tiles),
        "pictures": num_pictures,
        "time": seconds,
        "tiles_per_s": round(len(tiles) / seconds["median"], 2),
    }


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--tiles", nargs="*", default=["1x1", "2x3", "4x6"], help="rows x columns")
    result.add_argument("--pictures", type=int, nargs="*", default=[1, 4])
    result.add_argument("--repeated", action="store_true", help="all pictures of a call are the same")
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("vision", arguments)
    cases = [
        {
            "grid": tuple(map(int, name.split("x"))),
            "num_pictures": num_pictures,
            "repeated": arguments.repeated,
            "mode": mode,
            "repeats": arguments.repeats,
            **common.model_options(arguments),
        }
        for name in arguments.tiles
        for num_pictures in arguments.pictures
        for mode in common.modes(arguments)
    ]
    rows = common.measure_all(measure, cases, arguments)
    common.finish(report, rows, common.ratios(rows, ("tiles", "pictures"), ("time", "peak_gb")))


if __name__ == "__main__":
    main()
