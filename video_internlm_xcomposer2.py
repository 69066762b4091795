"""Frames of a video file by index, through PyAV or, if only that is installed, decord."""

import importlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from types import ModuleType, TracebackType
from typing import BinaryIO

from PIL import Image

try:
    from .bounds_internlm_xcomposer2 import PIXELS_VARIABLE, max_pixels, samples_promised
except ImportError:
    if __package__:
        raise
    # A model directory on sys.path, this file imported as a top-level module.
    from bounds_internlm_xcomposer2 import PIXELS_VARIABLE, max_pixels, samples_promised

# FFmpeg's names of formats whose times lead to the frames that counting gives; in others, frames are counted.
TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
CUT_SILENTLY = ("matroska,webm",)

TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


# Reaching the sampled frames of a video may cost as many pixels as this many pictures.
DECODED_PICTURES = 256
HUGE_FRAME = 1 << 24  # px; a frame with more is far beyond what a tile shows of it
THREADED_PIXELS = 1 << 27  # in frames that are decoded at the same time
MAX_THREADS = 16
MAX_PACKETS = 1 << 21  # hours of pictures and sound

# Called with how many frames have been read.
Progress = Callable[[int], None]
# Called with each frame.
Each = Callable[[Image.Image], Image.Image]


class VideoError(ValueError):
    """What is wrong with a video, without its name."""


class PyAVReader:
    """Decodes with PyAV, jumping from keyframe to keyframe; only requested frames become pictures."""

    def __init__(self, av: ModuleType, file: BinaryIO, max_frame_pixels: int):
        self.errors = (av.FFmpegError, EOFError, OverflowError)
        self.max_frame_pixels = max_frame_pixels
        self.pixels_left = self.max_decoded = DECODED_PICTURES * max_pixels()
        try:
            # Formats that refer to other files or addresses must not open them.
            self.container = av.open(file, metadata_errors="ignore", options={"protocol_whitelist": "none"})
        except (*self.errors, ValueError) as error:
            raise VideoError(f"unknown or truncated ({_reason(error)})") from error

    def __enter__(self) -> "PyAVReader":
        try:
            if not self.container.streams.video:
                raise VideoError("it has no video track")
            self.stream = self.container.streams.video[0]
            if self.stream.codec_context is None:
                raise VideoError("there is no decoder for its codec")
            check_frame_size(self.stream.width, self.stream.height, self.max_frame_pixels)
            self.stream.thread_type = "AUTO"
            # Each thread holds frames of its own.
            threads = THREADED_PIXELS // (self.stream.width * self.stream.height)
            self.stream.codec_context.thread_count = max(1, min(os.cpu_count() or 1, MAX_THREADS, threads))
            self._read_index()
        except BaseException:
            self.container.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def _read_index(self) -> None:
        """Read when each frame is shown, and where decoding can start, without decoding anything."""
        times, keys, end = [], [], 0.0
        try:
            for number, packet in enumerate(self.container.demux()):
                if number > MAX_PACKETS:
                    raise VideoError(f"it has more than {MAX_PACKETS} packets; take a shorter part of it")
                if packet.pts is not None:
                    end = max(end, float(packet.pts * packet.time_base))
                if packet.stream is not self.stream or not packet.size or packet.is_discard:
                    continue
                if packet.is_corrupt:
                    raise VideoError(f"truncated after {len(times)} frames")
                times.append(packet.pts)
                keys += [packet.pts] if packet.is_keyframe else []
        except self.errors as error:
            raise VideoError(f"truncated or broken after {len(times)} frames ({_reason(error)})") from error
        self._check_end(end)
        self.num_frames = len(times)
        average_fps = float(self.stream.average_rate or self.stream.guessed_rate or Fraction(1))
        self.average_fps = average_fps if 0 < average_fps < math.inf else 1.0
        self.is_timed = self.container.format.name in TIMED_FORMATS and None not in times
        self.times, self.keys = (sorted(times), sorted(keys)) if self.is_timed else ([], [])

    def _check_end(self, end: float) -> None:
        """Reject a file that ends well before its header says, if truncation would go unnoticed otherwise."""
        duration = (self.container.duration or 0) / 1_000_000
        if self.container.format.name in CUT_SILENTLY and duration - end > max(1.0, duration * 0.05):
            raise VideoError(f"truncated: it stops at {end:.1f} of {duration:.1f} seconds")

    def frames(
        self, indices: Sequence[int], progress: Progress | None = None, each: Each | None = None
    ) -> list[Image.Image]:
        """The frames at ascending `indices`, each of them through `each`."""
        progress, each = progress or (lambda num_read: None), each or (lambda frame: frame)
        try:
            found = self._by_time(indices, progress, each) if self.is_timed else None
            found = found or self._by_count(indices, progress, each)
        except self.errors as error:
            raise VideoError(f"decoding failed ({_reason(error)})") from error
        if len(found) < len(indices):
            raise VideoError(f"only {len(found)} of the {len(indices)} sampled frames can be decoded")
        return found

    def _by_time(self, indices: Sequence[int], progress: Progress, each: Each) -> list[Image.Image] | None:
        """Jump to the keyframe before each frame. `None` if the file's times don't lead to its frames."""
        found, position, decoded = [], None, iter(())
        for wanted in (self.times[index] for index in indices):
            num_keys_before = bisect_right(self.keys, wanted)
            key = self.keys[num_keys_before - 1] if num_keys_before else self.times[0]
            if position is None or key > position:
                self.container.seek(key, stream=self.stream)
                decoded = self._decode()
            frame = next((frame for frame in decoded if frame.pts is None or frame.pts >= wanted), None)
            if frame is None or frame.pts != wanted:
                return None
            found.append(each(self._to_image(frame)))
            progress(len(found))
            position = wanted
        return found

    def _by_count(self, indices: Sequence[int], progress: Progress, each: Each) -> list[Image.Image]:
        """Decode from the start and count."""
        self.container.seek(0)
        wanted, found = set(indices), []
        for index, frame in enumerate(self._decode()):
            if index in wanted:
                found.append(each(self._to_image(frame)))
                progress(len(found))
            if len(found) == len(wanted):
                break
        return found

    def _decode(self) -> Iterator["VideoFrame"]:  # noqa: F821
        """Frames from where the container is, as long as they don't cost more than a video may."""
        for frame in self.container.decode(self.stream):
            check_frame_size(frame.width, frame.height, self.max_frame_pixels)
            self.pixels_left -= frame.width * frame.height
            if self.pixels_left < 0:
                raise VideoError(
                    f"more than {self.max_decoded} px have to be decoded to reach the sampled frames; take a "
                    f"shorter part, scale it down, encode it with more keyframes or raise {PIXELS_VARIABLE}"
                )
            yield frame

    def _to_image(self, frame: "VideoFrame") -> Image.Image:  # noqa: F821
        """Convert one decoded frame, rotated upright according to its display matrix.

        One beyond `HUGE_FRAME` is converted at half its width and height.
        """
        turn = TURNS.get(int(getattr(frame, "rotation", 0)) % 360)
        if frame.width * frame.height > HUGE_FRAME:
            halves = {"width": frame.width // 2, "height": frame.height // 2, "interpolation": "AREA"}
            frame = frame.reformat(format="rgb24", **halves)
        image = frame.to_image()
        return image if turn is None else image.transpose(turn)


class DecordReader:
    """Decodes with decord, one frame at a time."""

    def __init__(self, decord: ModuleType, file: BinaryIO, max_frame_pixels: int):
        self.errors = (decord.DECORDError, RuntimeError, IndexError)
        self.max_frame_pixels = max_frame_pixels
        try:
            self.video = decord.VideoReader(file)
            self.num_frames, average_fps = len(self.video), float(self.video.get_avg_fps())
        except self.errors as error:
            raise VideoError(f"unknown or truncated ({_reason(error)})") from error
        self.average_fps = average_fps if math.isfinite(average_fps) else 1.0

    def __enter__(self) -> "DecordReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.video

    def frames(
        self, indices: Sequence[int], progress: Progress | None = None, each: Each | None = None
    ) -> list[Image.Image]:
        """The frames at ascending `indices`, each of them through `each`."""
        found = []
        for index in indices:
            frame = self._frame(index)
            found.append(frame if each is None else each(frame))
            if progress is not None:
                progress(len(found))
        return found

    def _frame(self, index: int) -> Image.Image:
        try:
            pixels = self.video[index].asnumpy()
        except self.errors as error:
            raise VideoError(f"frame {index} can't be decoded ({_reason(error)})") from error
        check_frame_size(pixels.shape[1], pixels.shape[0], self.max_frame_pixels)
        return Image.fromarray(pixels)


def open_video(file: BinaryIO, *, max_frame_pixels: int) -> PyAVReader | DecordReader:
    """Open a video with whichever reader is installed; use it in a `with` block."""
    if number := samples_promised(file):
        raise VideoError(f"its index promises {number} frames, for which the file is too small")
    for name, reader in (("av", PyAVReader), ("decord", DecordReader)):
        module = _optional_module(name)
        if module is not None:
            return reader(module, file, max_frame_pixels)
    raise ImportError("reading videos needs PyAV: pip install av (or decord: pip install decord)")


def check_frame_size(width: int, height: int, max_frame_pixels: int) -> None:
    """Reject frames that are empty or would not fit in memory."""
    if width < 1 or height < 1:
        raise VideoError(f"its frames are empty: {width}x{height} px")
    if width * height > max_frame_pixels:
        raise VideoError(f"its frames have {width}x{height} px, more than the limit of {max_frame_pixels}")


def _optional_module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _reason(error: Exception) -> str:
    """What a library says about a failure, without its stack and its file names."""
    message = getattr(error, "strerror", None) or str(error)
    return next(iter(message.splitlines()), type(error).__name__)
