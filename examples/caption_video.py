"""Caption a video as ShareCaptioner-Video does: frame by frame with a sliding window, or at once.

python examples/caption_video.py examples/circle.mp4 --model CHECKPOINT
python examples/caption_video.py examples/circle.mp4 --model CHECKPOINT --fast

The prompts are those that this fine-tune of 4KHD was trained with, misspellings included. Nano, the default,
was not trained for them: it only shows that the recipe runs.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from internlm_xcomposer2.ixc_utils import Font, get_font
from internlm_xcomposer2.media_internlm_xcomposer2 import MAX_FRAME_PIXELS
from internlm_xcomposer2.video_internlm_xcomposer2 import open_video
from PIL import Image, ImageDraw
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil

FIRST = "This is the first frame of a video, describe it in detail."
BETWEEN = (
    "Here are the Video frame {first} at {first_second}.00 Second(s) and Video frame {second} at "
    "{second_second}.00 Second(s) of a video, describe what happend between them. "
    "What happend before is: {before}"
)
SUMMARISE = "Summarize the following per frame descriptions:\n"
DESCRIPTION = "Video frame {number} at {second}.00 Second(s) description: {text}\n"
FAST = "Here are a few key frames of a video, discribe this video in detail."
RECAPTION = "Translate this brief generation prompt into a detailed caption: {text}"

SECONDS = 2  # between key frames
MAX_KEY_FRAMES = 61  # two minutes
LONG_SIDE = 1024  # px of a frame
GAP = 50  # px between two frames
LIKE_THE_LAST = 0.93  # cosine of a frame that shows nothing new
WINDOW_TILES, FAST_TILES = 9, 16
ANSWER = {"do_sample": False, "num_beams": 3, "use_meta": False}


def key_frames(path: str | Path) -> list[Image.Image]:
    """A frame every two seconds and the last one, without frames of one colour at the start.

    Raises:
        ValueError, OSError: it can't be read, or is longer than two minutes.
    """
    with open(path, "rb") as file, open_video(file, max_frame_pixels=MAX_FRAME_PIXELS) as video:
        step = max(1, round(video.average_fps * SECONDS))
        indices = sorted({*range(0, video.num_frames, step), video.num_frames - 1})
        if len(indices) > MAX_KEY_FRAMES:
            raise ValueError(
                f"{path} has {len(indices)} key frames, but at most {MAX_KEY_FRAMES} are read; cut it"
            )
        frames = video.frames(indices)
    for frame in frames:
        frame.thumbnail((LONG_SIDE, LONG_SIDE))
    start = next((i for i, frame in enumerate(frames) if not is_plain(frame)), 0)
    return frames[start:]


def is_plain(frame: Image.Image) -> bool:
    """Whether a frame has only one colour."""
    return all(low == high for low, high in frame.getextrema())


@torch.no_grad()
def drop_repeats(frames: Sequence[Image.Image], encoder: str) -> list[Image.Image]:
    """The frames that differ from the last that was kept, by the class token of a CLIP tower; and the end."""
    tower = AutoModel.from_pretrained(encoder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(encoder)  # it needs no torchvision
    tower = getattr(tower, "vision_model", tower)
    pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    vectors = F.normalize(tower(pixels).last_hidden_state[:, 0], dim=-1)
    kept = [0]
    for index in range(1, len(frames)):
        if index == len(frames) - 1 or float(vectors[index] @ vectors[kept[-1]]) < LIKE_THE_LAST:
            kept.append(index)
    return [frames[index] for index in kept]


def stack(frames: Sequence[Image.Image], gap: int = GAP, labels: Font | None = None) -> Image.Image:
    """Frames one below the other on white, with their numbers at the left if there is a font for them."""
    names = [f"Frame {index}" for index in range(1, len(frames) + 1)] if labels else [""] * len(frames)
    margin = max(round(labels.getlength(name)) for name in names) + gap if labels else 0
    width = margin + max(frame.width for frame in frames)
    height = sum(frame.height for frame in frames) + gap * (len(frames) - 1)
    canvas, top = Image.new("RGB", (width, height), "white"), 0
    draw = ImageDraw.Draw(canvas)
    for frame, name in zip(frames, names, strict=True):
        canvas.paste(frame, (margin, top))
        draw.text((0, top), name, fill="black", font=labels)
        top += frame.height + gap
    return canvas


def caption_frames(model, tokenizer, frames: Sequence[Image.Image], **settings) -> Iterator[str]:
    """The sliding window: a description of the first frame, then of what happens from each to the next."""
    settings = {**ANSWER, "hd_num": WINDOW_TILES, **settings}
    before = ""
    for index in range(len(frames)):
        query = FIRST if index == 0 else BETWEEN.format(
            first=index, first_second=index * SECONDS, second=index + 1,
            second_second=(index + 1) * SECONDS, before=before,
        )  # fmt: skip
        picture = frames[0] if index == 0 else stack(frames[index - 1 : index + 1])
        before, _ = model.chat(tokenizer, f"<ImageHere>{query}", picture, **settings)
        yield before


def summarise(model, tokenizer, descriptions: Sequence[str], **settings) -> str:
    """One caption from the descriptions of the sliding window."""
    lines = [
        DESCRIPTION.format(number=index + 1, second=index * SECONDS, text=text)
        for index, text in enumerate(descriptions)
    ]
    return model.chat(tokenizer, SUMMARISE + "".join(lines), **{**ANSWER, **settings})[0]


def caption_at_once(model, tokenizer, frames: Sequence[Image.Image], **settings) -> str:
    """The fast way: all frames on one picture."""
    settings = {**ANSWER, "hd_num": FAST_TILES, **settings}
    picture = stack(frames, labels=get_font())
    return model.chat(tokenizer, f"<ImageHere>{FAST}", picture, **settings)[0]


def recaption(model, tokenizer, text: str, **settings) -> str:
    """A detailed caption from a brief one, as for prompts of video generators."""
    return model.chat(tokenizer, RECAPTION.format(text=text), **{**ANSWER, **settings})[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1]), help="folder or hub id")
    parser.add_argument("--fast", action="store_true", help="all frames on one picture")
    parser.add_argument("--encoder", help="a CLIP checkpoint that drops frames which show nothing new")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    frames = key_frames(arguments.video)
    frames = drop_repeats(frames, arguments.encoder) if arguments.encoder else frames
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").eval()
    length = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.fast:
        print(caption_at_once(model, tokenizer, frames, **length))
        return
    descriptions = []
    for text in caption_frames(model, tokenizer, frames, **length):
        descriptions.append(text)
        print(f"frame {len(descriptions)} of {len(frames)}: {text}")
    print(summarise(model, tokenizer, descriptions, **length))


if __name__ == "__main__":
    main()
