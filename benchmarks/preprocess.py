"""How fast pictures become tiles, frames become one picture, and a long video is sampled.

    python benchmarks/preprocess.py --threads 1
    python benchmarks/preprocess.py --threads 2 --pictures 1 8 --minutes 60

Pictures are decoded beforehand, as `chat` gets them, then resized, padded, normalised and cut. The naive way
normalises a whole picture at once, cuts it afterwards and takes one picture after the other. 16 frames, wide
or tall, are put on one picture (`frame2img`), which is resized and padded (`Video_transform`); the naive way
gives each frame its band and turns a tall picture on its side and back, as the definition says. 32 frames of
a video are read (which needs PyAV); the naive way converts every frame on the way. The last line is JSON.
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
from internlm_xcomposer2.ixc_utils import (
    BAND,
    TILE_SIZE,
    Video_transform,
    frame2img,
    get_font,
    load_video,
    plan_composite,
    plan_tiles,
    plan_video,
    tile_picture,
)
from internlm_xcomposer2.media_internlm_xcomposer2 import MAX_FRAMES, plan_frames
from PIL import Image, ImageDraw, ImageOps

VIDEO_FPS = 2
NUM_FRAMES = 16
FRAME_SIZES = ((360, 640), (640, 360))  # (height, width) in px


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


def composite_naively(frames: list[Image.Image], font) -> Image.Image:
    """What `frame2img` returns, without the lines between frames: each frame is widened by its band first."""
    sizes = plan_composite([frame.size[::-1] for frame in frames], tile_size=TILE_SIZE)
    canvas = Image.new("RGB", sizes.size[::-1], "white")
    draw = ImageDraw.Draw(canvas)
    placed = zip(frames, sizes.frame_sizes, sizes.positions, strict=True)
    for index, (frame, (height, width), (top, left)) in enumerate(placed):
        resized = frame.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(ImageOps.expand(resized, (0, BAND, 0, 0), "white"), (left, top))
        draw.text((left, top), f"<IMAGE {index}>", font=font, fill="black")
    return canvas


def transform_naively(picture: Image.Image) -> Image.Image:
    """What `Video_transform` returns, by turning a tall picture on its side and back."""
    plan = plan_video(*picture.size[::-1], tile_size=TILE_SIZE)
    turn = Image.Transpose.TRANSPOSE
    resized, padded = (size[:: 1 if plan.transposed else -1] for size in (plan.resized, plan.padded))
    lying = picture.transpose(turn) if plan.transposed else picture
    lying = lying.resize(resized, Image.Resampling.BILINEAR)
    border = (0, 0, padded[0] - resized[0], padded[1] - resized[1])
    lying = ImageOps.expand(lying, border, "white")
    return lying.transpose(turn) if plan.transposed else lying


def measure_frames(size: tuple[int, int], step: str, mode: str, repeats: int) -> dict:
    """`NUM_FRAMES` frames of (height, width) px in one mode: a row of the table."""
    frames = [common.draw_picture(*size, seed) for seed in range(NUM_FRAMES)]
    font, composite = get_font(), frame2img(frames, get_font())
    run = {
        ("frame2img", "ours"): lambda: frame2img(frames, font),
        ("frame2img", "naive"): lambda: composite_naively(frames, font),
        ("Video_transform", "ours"): lambda: Video_transform(composite),
        ("Video_transform", "naive"): lambda: transform_naively(composite),
    }[step, mode]
    of = f"{step}, {size[1]}x{size[0]}"
    return {"mode": mode, "of": of, "number": NUM_FRAMES, "time": common.repeat(run, 3 * repeats)}


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
    result.add_argument("--frames", action="store_true", help="measure frame2img and Video_transform, too")
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
    frames = [
        {"size": size, "step": step, **way}
        for size in FRAME_SIZES
        for step in ("frame2img", "Video_transform")
        for way in ways
        if arguments.frames
    ]
    rows += common.measure_all(measure_frames, frames, arguments)
    videos = [{"minutes": minutes, **way} for minutes in arguments.minutes for way in ways]
    rows += common.measure_all(measure_video, videos, arguments)
    common.finish(report, rows, common.ratios(rows, ("of", "number"), ("time", "peak_gb")))


if __name__ == "__main__":
    main()
