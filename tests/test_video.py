"""An hour of video: skipped through, never held in memory, and with a bar for those who wait."""

import sys
from pathlib import Path

import numpy as np
import pytest
from internlm_xcomposer2.media_internlm_xcomposer2 import load_video, plan_frames
from internlm_xcomposer2.video_internlm_xcomposer2 import open_video
from PIL import Image
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

av = pytest.importorskip("av")

FPS, NUM_FRAMES, KEYFRAMES_EVERY = 2, 7200, 20


def grey(index: int) -> int:
    """The grey level of a frame; it moves slowly enough for the codec to follow."""
    return 16 + 4 * abs(index % 100 - 50)


@pytest.fixture(scope="module")
def hour(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hour") / "hour.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", KEYFRAMES_EVERY
        for index in range(NUM_FRAMES):
            planes = np.full((48, 32), 128, np.uint8)  # 32 rows of luma, then neutral chroma
            planes[:32] = grey(index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode())
    return path


class CountingContainer:
    """A container of PyAV that counts what it decodes."""

    def __init__(self, container) -> None:
        self.container, self.num_decoded = container, 0

    def __getattr__(self, name: str):
        return getattr(self.container, name)

    def decode(self, *args):
        for frame in self.container.decode(*args):
            self.num_decoded += 1
            yield frame


def test_an_hour_is_skipped_through(hour, monkeypatch):
    """Memory follows the frames that are converted and time those that are decoded: both stay few."""
    with hour.open("rb") as file, open_video(file, max_frame_pixels=10**6) as video:
        video.container = CountingContainer(video.container)
        converted, to_image = [], video._to_image
        monkeypatch.setattr(video, "_to_image", lambda frame: converted.append(frame.pts) or to_image(frame))
        indices = plan_frames(video.num_frames, video.average_fps)
        frames = video.frames(indices)
        assert video.num_frames == NUM_FRAMES and len(frames) == len(converted) == len(indices) == 32
        assert video.container.num_decoded <= 32 * KEYFRAMES_EVERY
    found = [np.asarray(frame.convert("L")).mean() for frame in frames]
    expected = [(grey(index) - 16) * 255 / 219 for index in indices]  # of limited range
    np.testing.assert_allclose(found, expected, atol=6)


def test_progress_is_shown_if_someone_is_waiting(hour, capsys, monkeypatch):
    load_video(hour)
    assert capsys.readouterr() == ("", "")
    load_video(hour, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "Reading the video: 100%" in shown.err and "32/32" in shown.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_video(hour)
    assert "32/32" in capsys.readouterr().err
    load_video(hour, progress=False)
    load_video([Image.new("RGB", (8, 8))] * 3)
    disable_progress_bar()
    try:
        load_video(hour)
    finally:
        enable_progress_bar()
    assert capsys.readouterr().err == ""
