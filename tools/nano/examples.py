"""Draws the pictures and the video in `examples/`: `python -m tools.nano.examples --out examples`.

The strings, fonts and sizes are held-back ones. The video needs av.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from .fonts import find_fonts
from .pictures import Picture, Thing, draw_object, draw_objects, draw_text, stamp
from .scenes import draw_receipt, draw_small_print
from .words import split_of_string

NUMBER, WORD, SMALL = "6143", "CLOUD", "ART"
RECEIPT = [("TEA", "4"), ("CAKE", "11"), ("TOTAL", "15")]
VIDEO_SIZE = (240, 180)  # (width, height) px
FRAMES_PER_SECOND, SECONDS = 10, 3


def draw_examples(seed: int) -> dict[str, Picture]:
    """File name -> picture."""
    rng, families = random.Random(seed), find_fonts("held_back")
    circles = [Thing("circle", "blue")] * 4
    objects = [Thing("square", "red"), Thing("triangle", "green"), Thing("star", "purple")]
    return {
        "number.png": draw_text(rng, "held_back", NUMBER, families),
        "word.jpg": draw_text(rng, "held_back", WORD, families),
        "star.png": draw_object(rng, "held_back", Thing("star", "orange")),
        "ring.jpg": draw_object(rng, "held_back", Thing("ring", "green")),
        "circles.png": draw_objects(rng, "held_back", circles),
        "objects.png": draw_objects(rng, "held_back", objects),
        "receipt.png": draw_receipt(rng, "held_back", RECEIPT, families),
        "small.png": draw_small_print(rng, "held_back", SMALL, families, tiles_along=3),
    }


def draw_video() -> list[Image.Image]:
    """Frames of a red circle that moves from left to right and stays there."""
    frames = []
    for number in range(FRAMES_PER_SECOND * SECONDS):
        image = Image.new("RGB", VIDEO_SIZE, "white")
        stamp(
            ImageDraw.Draw(image), random.Random(0), Thing("circle", "red"), min(7 + 8 * number, 163), 53, 71
        )
        frames.append(image)
    return frames


def write_video(path: Path, frames: list[Image.Image], shown: int = 1) -> None:
    """An MP4 file at ten frames per second; each frame is there `shown` times."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for _ in range(shown):
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    for text in (NUMBER, WORD, SMALL, RECEIPT[-1][1]):
        if split_of_string(text) != "held_back":
            raise ValueError(f"{text} is not held back; choose another")
    for name, picture in draw_examples(arguments.seed).items():
        picture.image.save(arguments.out / name, **({"quality": 90} if name.endswith(".jpg") else {}))
    write_video(arguments.out / "circle.mp4", draw_video())


if __name__ == "__main__":
    main()
