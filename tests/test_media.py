"""Pictures and videos from every source, and what is said when a source is unusable."""

import base64
import io
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden_directory
from internlm_xcomposer2.media_internlm_xcomposer2 import (
    image_size,
    is_video,
    load_image,
    load_video,
    to_rgb,
)
from internlm_xcomposer2.video_internlm_xcomposer2 import open_video
from PIL import Image, ImageFile

INPUTS = golden_directory() / "inputs"
PHOTO = INPUTS / "photo.jpg"
VIDEO = INPUTS / "wide_6s.mp4"


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(PHOTO).convert("RGB")


def data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def assert_same(first: Image.Image, second: Image.Image) -> None:
    assert first.mode == second.mode == "RGB"
    assert first.size == second.size and first.tobytes() == second.tobytes()


# --- pictures: sources ---


def read_to_the_end(path: Path) -> io.BytesIO:
    file = io.BytesIO(path.read_bytes())
    file.seek(0, io.SEEK_END)
    return file


PHOTO_SOURCES = {
    "str": lambda: str(PHOTO),
    "Path": lambda: PHOTO,
    "PIL": lambda: Image.open(PHOTO),
    "bytes": PHOTO.read_bytes,
    "bytearray": lambda: bytearray(PHOTO.read_bytes()),
    "BytesIO at its end": lambda: read_to_the_end(PHOTO),
    "data URI": lambda: data_uri(PHOTO, "image/jpeg"),
    "array": lambda: np.asarray(Image.open(PHOTO)),
    "float array": lambda: np.asarray(Image.open(PHOTO)) / 255,
    "tensor CHW": lambda: torch.from_numpy(np.array(Image.open(PHOTO))).permute(2, 0, 1),
    "tensor HWC": lambda: torch.from_numpy(np.array(Image.open(PHOTO))),
    "float tensor": lambda: torch.from_numpy(np.array(Image.open(PHOTO))).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("kind", PHOTO_SOURCES)
def test_one_picture_from_every_source(kind, photo):
    source = PHOTO_SOURCES[kind]()
    assert not is_video(source)
    assert_same(load_image(source), photo)


def test_an_open_file_is_read(photo):
    with VIDEO.open("rb") as file:
        assert is_video(file) and len(load_video(file)) == 6
    with PHOTO.open("rb") as file:
        assert not is_video(file)
        assert_same(load_image(file), photo)
    with PHOTO.open(encoding="latin-1") as file, pytest.raises(TypeError, match="binary mode"):
        load_image(file)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 4, 5)])
def test_one_channel_is_grey(shape):
    numbers = np.arange(20, dtype=np.uint8).reshape(shape)
    source = torch.from_numpy(numbers) if shape[0] == 1 else numbers
    assert np.array_equal(np.asarray(load_image(source))[..., 1], np.arange(20).reshape(4, 5))


def test_four_channels_are_put_on_white():
    assert load_image(np.zeros((2, 2, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)


def test_half_precision_tensors_with_gradients():
    tensor = torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert load_image(tensor).getpixel((0, 0)) == (128, 128, 128)


def test_a_percent_encoded_data_uri():
    content = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(content, "PNG")
    uri = "data:image/png," + "".join(f"%{byte:02x}" for byte in content.getvalue())
    assert load_image(uri).getpixel((0, 0)) == (255, 0, 0)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert not is_video(tmp_path / "two.gif")
    assert load_image(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)


def test_content_decides_not_the_name(tmp_path, photo):
    (tmp_path / "picture.mp4").write_bytes(PHOTO.read_bytes())
    assert not is_video(tmp_path / "picture.mp4")
    assert_same(load_image(tmp_path / "picture.mp4"), photo)
    with pytest.raises(ValueError, match=r"picture\.mp4' is a picture"):
        load_video(tmp_path / "picture.mp4")
    (tmp_path / "video.jpg").write_bytes(VIDEO.read_bytes())
    assert is_video(tmp_path / "video.jpg")
    assert len(load_video(tmp_path / "video.jpg")) == 6
    with pytest.raises(ValueError, match=r"video\.jpg' is a video"):
        load_image(tmp_path / "video.jpg")


# --- pictures: errors ---


@pytest.mark.parametrize("read", [load_image, load_video])
def test_missing_files(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="not a file"):
        read(tmp_path)
    with pytest.raises(ValueError, match="not a usable path"):
        read("x" * 5000)


@pytest.mark.parametrize("read", [load_image, load_video])
def test_empty_content(read, tmp_path):
    (tmp_path / "empty.png").touch()
    for source in (tmp_path / "empty.png", b"", io.BytesIO(), "data:image/png;base64,"):
        with pytest.raises(ValueError, match="0 bytes"):
            read(source)


@pytest.mark.parametrize("read", [load_image, load_video])
@pytest.mark.parametrize("source", [None, 7, {}, object()])
def test_sources_of_unknown_type(read, source):
    with pytest.raises(TypeError, match=type(source).__name__):
        read(source)


@pytest.mark.parametrize("read", [load_image, load_video])
@pytest.mark.parametrize(
    "uri", ["data:image/png", "data:image/png;base64,@@@@", "data:image/png;base64,iVBORw0KGg"]
)
def test_broken_data_uris(read, uri):
    with pytest.raises(ValueError, match="data: URI"):
        read(uri)


@pytest.mark.parametrize("read", [load_image, load_video])
@pytest.mark.parametrize("content", [b"just some text", b"\0" * 600, b"#EXTM3U\nhttp://127.0.0.1/x.ts\n"])
def test_unknown_content(read, content, tmp_path):
    (tmp_path / "text.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.png'.*known format"):
        read(tmp_path / "text.png")


@pytest.mark.parametrize("name", ["photo.jpg", "rgba.png", "palette.png"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_truncated_pictures(name, part):
    content = (INPUTS / name).read_bytes()
    with pytest.raises(ValueError, match="content given"):
        load_image(content[: int(len(content) * part)])


def test_a_truncated_picture_that_the_caller_opened():
    content = PHOTO.read_bytes()
    with pytest.raises(ValueError, match="truncated"):
        load_image(Image.open(io.BytesIO(content[: len(content) // 2])))


def test_damaged_pictures_never_raise_anything_else():
    random = np.random.default_rng(0)
    for name in ("tiny.png", "photo.jpg"):
        content = np.frombuffer((INPUTS / name).read_bytes(), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[random.integers(0, len(damaged), 5)] = random.integers(0, 256, 5)
            try:
                load_image(damaged.tobytes())
            except ValueError as error:
                assert "content given" in str(error)


def test_a_decompression_bomb_is_rejected_by_its_header():
    content = io.BytesIO()
    Image.new("1", (20000, 20000)).save(content, "PNG")
    with pytest.raises(ValueError, match=r"(?i)20000x20000|400000000"):
        load_image(content)
    with pytest.raises(ValueError, match="640x480 px, beyond the limit of 1000"):
        load_image(PHOTO, max_pixels=1000)


def test_a_hair_thin_picture_is_legal():
    assert load_image(Image.new("L", (1, 30000))).size == (1, 30000)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 2), np.int64), "int64"),
        (np.zeros((2, 2, 2), np.uint8), r"\(2, 2, 2\)"),
        (np.zeros((3, 224, 224), np.uint8), r"\(3, 224, 224\)"),
        (np.zeros((2,), np.uint8), r"\(2,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.full((2, 2, 3), np.nan), "nan"),
        (np.full((2, 2, 3), 1.5), "1.5"),
        (np.full((2, 2, 3), -0.1), "-0.1"),
        (torch.zeros(1, 3, 4, 4), r"\(1, 3, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "int32"),
        (torch.full((3, 4, 4), float("nan")), "nan"),
    ],
)
def test_arrays_that_are_not_pictures(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_broken_metadata_turn_nothing(mode):
    content = io.BytesIO()
    Image.new(mode, (5, 3)).save(content, "JPEG", exif=b"Exif\0\0" + b"nonsense" * 3)
    image = load_image(content)
    assert image.size == (5, 3) and image_size(content) == (3, 5)
    assert to_rgb(image).size == (5, 3)


def test_pillows_settings_stay_as_they_are():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    load_image(PHOTO, max_pixels=10**9)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


# --- URLs ---


class Answers(BaseHTTPRequestHandler):
    """A server with a good picture and every kind of bad answer."""

    def do_GET(self):
        getattr(self, "answer_" + self.path[1:].partition(".")[0], self.answer_missing)()

    def begin(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def answer_photo(self):
        self.begin(Content_Length=str(PHOTO.stat().st_size))
        self.wfile.write(PHOTO.read_bytes())

    def answer_video(self):
        self.begin()
        self.wfile.write(VIDEO.read_bytes())

    def answer_missing(self):
        self.send_error(404)

    def answer_moved(self):
        self.begin(302, Location="/photo.jpg")

    def answer_outside(self):
        self.begin(302, Location="file:///etc/hostname")

    def answer_ftp(self):
        self.begin(302, Location="ftp://127.0.0.1/photo.jpg")

    def answer_huge(self):
        self.begin(Content_Length="99999999999")

    def answer_endless(self):
        self.begin()
        for _ in range(64):
            self.wfile.write(bytes(1 << 14))

    def answer_short(self):
        self.begin(Content_Length=str(PHOTO.stat().st_size))
        self.wfile.write(PHOTO.read_bytes()[:1000])

    def answer_silent(self):
        time.sleep(1.0)

    def answer_slow(self):
        self.begin()
        for _ in range(20):
            self.wfile.write(b"\xff")
            self.wfile.flush()
            time.sleep(0.1)

    def handle(self):
        try:
            super().handle()
        except OSError:  # the client hung up, as it should
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["photo.jpg", "moved"])
def test_a_url_is_read_when_it_is_passed(server, path, photo):
    assert_same(load_image(f"{server}/{path}"), photo)


def test_a_video_url(server):
    assert is_video(f"{server}/video.mp4?width=320") and not is_video(f"{server}/photo.jpg")
    assert len(load_video(f"{server}/video.mp4")) == 6


@pytest.mark.parametrize(
    "path, message",
    [
        ("missing", "404"),
        ("outside", "can't be read"),
        ("ftp", "can't be read"),
        ("huge", "promises 99999999999 bytes"),
        ("endless", "more than the limit of 100000 bytes"),
        ("short", "1000 of 49376 bytes"),
        ("silent", "timed out"),
        ("slow", "too slow"),
    ],
)
def test_urls_that_go_wrong(server, path, message):
    with pytest.raises(ValueError, match=message):
        load_image(f"{server}/{path}", timeout=0.4, max_bytes=100_000)


def test_a_server_that_does_not_exist():
    with pytest.raises(ValueError, match="can't be read"):
        load_image("http://127.0.0.1:9/photo.jpg", timeout=0.5)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.png", "file:///etc/hostname", "gopher://x/y"])
def test_other_schemes_are_rejected(url):
    for read in (load_image, load_video):
        with pytest.raises(ValueError, match="only http and https"):
            read(url)


# --- videos ---

av = pytest.importorskip("av")


def write_video(path: Path, *, codec="libx264", num_frames=24, fps=8, options=None) -> Path:
    """A clip whose frame i has the grey level 10 * i."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 9
        for index in range(num_frames):
            picture = np.full((48, 64, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def levels(frames: list[Image.Image]) -> list[int]:
    """Which frames of `write_video` these are."""
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


@contextmanager
def only(monkeypatch, name: str | None):
    """Let only this reader be installed."""
    with monkeypatch.context() as patch:
        for other in {"av", "decord"} - {name}:
            patch.setitem(sys.modules, other, None)
        yield


VIDEO_SOURCES = {
    "str": lambda: str(VIDEO),
    "Path": lambda: VIDEO,
    "bytes": VIDEO.read_bytes,
    "BytesIO at its end": lambda: read_to_the_end(VIDEO),
    "data URI": lambda: data_uri(VIDEO, "video/mp4"),
}


@pytest.mark.parametrize("kind", VIDEO_SOURCES)
def test_one_video_from_every_source(kind):
    source = VIDEO_SOURCES[kind]()
    assert is_video(source)
    frames = load_video(source)
    assert len(frames) == 6
    for frame, expected in zip(frames, load_video(VIDEO), strict=True):
        assert_same(frame, expected)


def test_a_list_of_frames_is_thinned_out():
    frames = [Image.new("L", (4, 4), index) for index in range(40)]
    assert is_video(frames)
    chosen = load_video(frames)
    assert len(chosen) == 32 and all(frame.mode == "RGB" for frame in chosen)
    assert [frame.getpixel((0, 0))[0] for frame in load_video(frames[:3])] == [0, 1, 2]
    with pytest.raises(ValueError, match="no frames"):
        load_video([])


def test_sampling_is_the_callers_choice():
    assert len(load_video(VIDEO, fps=4.0)) == 24
    assert len(load_video(VIDEO, fps=4.0, max_frames=5)) == 5


@pytest.mark.parametrize("name", ["wide_6s", "tall_3s", "long_40s"])
def test_both_readers_give_the_same_frames(name, monkeypatch):
    pytest.importorskip("decord")
    readings = []
    for reader in ("av", "decord"):
        with only(monkeypatch, reader):
            readings.append(load_video(INPUTS / f"{name}.mp4"))
    for first, second in zip(*readings, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize(
    "suffix, codec",
    [
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("mkv", "libx264"),
        ("avi", "mpeg4"),
        ("avi", "libx264"),
        ("ts", "libx264"),
    ],
)
def test_jumping_gives_the_frames_that_counting_gives(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"clip.{suffix}", codec=codec)
    indices = [0, 3, 8, 9, 17, 20, 23]
    with path.open("rb") as file, open_video(file, max_frame_pixels=10**6) as video:
        assert video.num_frames == 24 and video.average_fps == 8.0
        assert levels(video.frames(indices)) == indices


# How a picture is turned -> the matrix of a track header that says so.
ROTATIONS = {
    Image.Transpose.ROTATE_270: (0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000),
    Image.Transpose.ROTATE_180: (0xFFFF0000, 0, 0, 0, 0xFFFF0000, 0, 0, 0, 0x40000000),
    Image.Transpose.ROTATE_90: (0, 0xFFFF0000, 0, 0x10000, 0, 0, 0, 0, 0x40000000),
}


@pytest.mark.parametrize("turn", ROTATIONS)
def test_a_phone_video_is_shown_upright(turn):
    content = bytearray(VIDEO.read_bytes())
    start = content.find(b"tkhd") + 44
    content[start : start + 36] = b"".join(number.to_bytes(4, "big") for number in ROTATIONS[turn])
    assert_same(load_video(bytes(content))[0], load_video(VIDEO)[0].transpose(turn))


@pytest.mark.parametrize("reader", ["av", "decord"])
@pytest.mark.parametrize("part", [0.002, 0.1, 0.5, 0.9])
def test_truncated_videos(reader, part, monkeypatch):
    pytest.importorskip(reader)
    content = VIDEO.read_bytes()
    with only(monkeypatch, reader), pytest.raises(ValueError, match="content given"):
        load_video(content[: int(len(content) * part)])


@pytest.mark.parametrize("suffix, options", [("mp4", {"movflags": "faststart"}), ("mkv", {}), ("avi", {})])
def test_a_truncated_video_with_its_index_in_front(tmp_path, suffix, options):
    path = write_video(tmp_path / f"clip.{suffix}", options=options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(ValueError, match="truncated"):
        load_video(path)


def test_a_video_without_frames(tmp_path):
    path = write_video(tmp_path / "clip.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    content = path.read_bytes()
    path.write_bytes(content[: content.find(b"moof") - 4])
    with pytest.raises(ValueError, match=r"clip\.mp4'.*no frames"):
        load_video(path)


def test_a_video_file_without_a_video_track(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no video track"):
        load_video(path)


def test_frames_beyond_memory_are_rejected():
    with pytest.raises(ValueError, match="320x240 px, more than the limit of 1000"):
        load_video(VIDEO, max_frame_pixels=1000)


def test_without_a_reader_the_package_is_named(monkeypatch):
    with only(monkeypatch, None), pytest.raises(ImportError, match="pip install av"):
        load_video(VIDEO)


def test_what_is_a_video(tmp_path):
    assert is_video("clip.MP4") and is_video(Path("a/b.webm")) and is_video("https://example.org/a.mov#t=1")
    assert not is_video("photo.jpg") and not is_video("no extension")
    assert not is_video(None) and not is_video(torch.zeros(1, 3, 4, 4)) and not is_video(np.zeros((4, 4)))
    assert is_video("data:video/mp4;base64,AAAA") and not is_video("data:image/png;base64,AAAA")
