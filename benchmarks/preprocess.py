"""How fast pictures become tiles, and how fast a long video is sampled.

    python benchmarks/preprocess.py --threads 1
    python benchmarks/preprocess.py --threads 2 --pictures 1 8 --minutes 60

Pictures are decoded beforehand, as `chat` gets them, then resized, padded, normalised and cut. The naive way
normalises a whole picture at once, cuts it afterwards and takes one picture after the other. 32 frames of a
video are read (which needs PyAV); the naive way converts every frame on the way. The last line is JSON.
"""

import argparse
import tempfile
from pathlib import Path

import common
import numpy as np
import torch
from internlm_xcomposer2.configuration_internlm_xcomposer2 import VERSIONS
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import (
    PreparedImage,
    Visual,
    batch_images,
    normalize_image,
    prepare_visuals,
    split_tiles,
)
from internlm_xcomposer2.ixc_utils import load_video, plan_tiles, tile_picture
from internlm_xcomposer2.media_internlm_xcomposer2 import MAX_FRAMES, plan_frames

VIDEO_FPS = 2


def prepare_naively(pictures: list, tile_size: int, hd_num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `prepare_visuals` computes, with whole pictures in floats and one after the other."""
    prepared = []
    for picture in pictures:
        layout = {"tile_size": tile_size, "layout": VERSIONS["2.5"].layout}
        plan = plan_tiles(*picture.size[::-1], hd_num=hd_num, **layout)
        pixels = normalize_image(tile_picture(picture, plan))
        prepared.append(PreparedImage(split_tiles(pixels, tile_size), plan.grid))
    return batch_images(prepared)


def measure_pictures(pictures: int, tiles: int, mode: str, repeats: int, size: str) -> dict:
    """This many pictures in one mode: a row of the table."""
    config = common.build_config(size)
    drawn = [common.picture_for(size, number) for number in range(pictures)]
    visuals = [Visual(image=picture) for picture in drawn]
    prepare = {
        "ours": lambda: prepare_visuals(visuals, config, tiles),
        "naive": lambda: prepare_naively(drawn, config.img_size, tiles),
    }[mode]
    return {"mode": mode, "of": "pictures", "number": pictures, "time": common.repeat(prepare, repeats)}


def write_video(path: Path, minutes: float, side: int = 64) -> None:
    """A video of grey noise with a keyframe every 20 frames."""
    import av

    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=VIDEO_FPS)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = side, side, "yuv420p", 20
        for _ in range(round(minutes * 60 * VIDEO_FPS)):
            planes = rng.integers(0, 256, (side * 3 // 2, side), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode())


def load_video_naively(path: Path) -> list:
    """The sampled frames of a video, with every frame decoded and converted."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
        rate = float(container.streams.video[0].average_rate)
    return [frames[index] for index in plan_frames(len(frames), rate, max_frames=MAX_FRAMES)]


def measure_video(minutes: float, mode: str, repeats: int) -> dict:
    """A video in one mode: a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, minutes)
        load = load_video if mode == "ours" else load_video_naively
        seconds = common.repeat(lambda: load(path), repeats)
    return {"mode": mode, "of": "minutes of video", "number": minutes, "time": seconds}


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__, threads=2)
    result.add_argument("--pictures", type=int, nargs="*", default=[1, 8])
    result.add_argument("--tiles", type=int, default=6, help="the most local tiles of a picture")
    result.add_argument(
        "--minutes", type=float, nargs="*", default=[60.0], help="of video; no value leaves it out"
    )
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("preprocess", arguments)
    ways = [{"mode": mode, "repeats": arguments.repeats} for mode in common.modes(arguments)]
    rows = common.measure_all(
        measure_pictures,
        [
            {"pictures": number, "tiles": arguments.tiles, "size": arguments.size, **way}
            for number in arguments.pictures
            for way in ways
        ],
        arguments,
    )
    videos = [{"minutes": minutes, **way} for minutes in arguments.minutes for way in ways]
    rows += common.measure_all(measure_video, videos, arguments)
    common.finish(report, rows, common.ratios(rows, ("of", "number"), ("time", "peak_gb")))


if __name__ == "__main__":
    main()
