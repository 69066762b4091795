"""Which files and addresses are read for whom, how long a URL may take, and that nothing is told on."""

import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT
from internlm_xcomposer2 import access_internlm_xcomposer2 as access_module
from internlm_xcomposer2.access_internlm_xcomposer2 import (
    DOMAINS_VARIABLE,
    LOCAL_PATH_VARIABLE,
    SERVER_MODULES,
    MediaAccess,
    bad_requests,
    fetch,
    is_public,
)
from internlm_xcomposer2.media_internlm_xcomposer2 import as_source, load_image, load_video
from starlette.exceptions import HTTPException

STAR = ROOT / "examples" / "star.png"
SECRET = "hunter2"
OPEN = MediaAccess()
LOOPBACK = MediaAccess(domains=("127.0.0.1",))


class Answers(BaseHTTPRequestHandler):
    """A picture, detours to it, and answers that take long or say what nobody may hear."""

    seen: list[str] = []

    def do_GET(self):
        self.seen.append(self.path)
        name, _, rest = self.path[1:].partition("/")
        getattr(self, f"answer_{name}", self.answer_star)(rest)  # also as a proxy

    def redirect(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer_star(self, _):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(STAR.read_bytes())

    def answer_to(self, where):
        self.redirect(where)

    def answer_detours(self, number):
        time.sleep(0.15)
        self.redirect(f"/detours/{int(number) - 1}" if int(number) else "/star")

    def answer_circle(self, _):
        self.redirect("/circle")

    def drip(self, content: bytes) -> None:
        for byte in content:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.05)

    def answer_slow_status(self, _):
        self.drip(b"HTTP/1.1 200 OK" + b" " * 400)

    def answer_slow_headers(self, _):
        self.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 400)

    def answer_slow_continue(self, _):
        self.drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 20)

    def answer_slow_body(self, _):
        self.drip(b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 400)

    def answer_raw(self, which):
        self.wfile.write(RAW[which.replace("%20", " ")])

    def handle(self):
        try:
            super().handle()
        except OSError:  # the client hung up, as it should
            self.close_connection = True

    def log_message(self, *_):
        pass


OK = b"HTTP/1.1 200 OK\r\n"
RAW = {
    "reason": f"HTTP/1.1 403 {SECRET}\r\n\r\n{SECRET}".encode(),
    "status": f"HTTP/1.1 {SECRET}\r\n\r\n".encode(),
    "line": f"{SECRET}\r\n\r\n".encode(),
    "header": OK + f"{SECRET}\r\n{SECRET}: {SECRET}\r\n\r\n{SECRET}".encode(),
    "length": OK + f"Content-Length: {SECRET}\r\n\r\n{SECRET}".encode(),
    "chunk": OK + f"Transfer-Encoding: chunked\r\n\r\n{SECRET}\r\n{SECRET}".encode(),
    "scheme": f"HTTP/1.1 302 Found\r\nLocation: {SECRET}://{SECRET}/\r\n\r\n".encode(),
    "host": f"HTTP/1.1 302 Found\r\nLocation: http://{SECRET}.invalid/\r\n\r\n".encode(),
    "port": f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{SECRET}/\r\n\r\n".encode(),
    "bracket": f"HTTP/1.1 302 Found\r\nLocation: http://[{SECRET}/\r\n\r\n".encode(),
    "user": f"HTTP/1.1 302 Found\r\nLocation: http://{SECRET}:{SECRET}@127.0.0.1/\r\n\r\n".encode(),
    "text": OK + f"\r\n{SECRET}".encode(),
    "ppm": OK + f"\r\nP3\n2 2\n255\n{SECRET} {SECRET}".encode(),
    "header of a ppm": OK + f"\r\nP6\n{SECRET} 2\n255\n".encode(),
    "chunk of a png": OK + b"\r\n\x89PNG\r\n\x1a\n\0\0\0\7hunter2hunter2",
    "video": OK + b"\r\n\0\0\0\x18ftypisom" + SECRET.encode() * 20,
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def served(monkeypatch) -> None:
    """As in a process of `transformers serve`."""
    monkeypatch.setitem(sys.modules, SERVER_MODULES[0], types.ModuleType(SERVER_MODULES[0]))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch) -> None:
    for name in (LOCAL_PATH_VARIABLE, DOMAINS_VARIABLE, "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


# ---- settings ----


def test_direct_calls_read_anything():
    assert MediaAccess.of() == OPEN
    MediaAccess.of().check_path("/etc/passwd")
    assert load_image(STAR).size == load_image(str(STAR)).size


def test_a_server_reads_nothing_until_it_is_allowed_to(served, server, monkeypatch):
    assert MediaAccess.of() == MediaAccess("", ())
    for source in (STAR, str(STAR), "/nothing/here.png"):
        for read in (load_image, load_video):
            with pytest.raises(ValueError, match="may not be read here"):
                read(source)
    Answers.seen.clear()
    with pytest.raises(ValueError, match="host that is not allowed"):
        load_image(f"{server}/star")
    assert not Answers.seen
    monkeypatch.setenv(DOMAINS_VARIABLE, " Example.ORG. , 127.0.0.1")
    monkeypatch.setenv(LOCAL_PATH_VARIABLE, str(STAR.parent))
    assert MediaAccess.of() == MediaAccess(str(STAR.parent), ("example.org", "127.0.0.1"))
    assert load_image(STAR).size == load_image(f"{server}/star").size
    assert load_image(STAR.read_bytes()).size == load_image(STAR).size


def test_settings_come_before_the_environment(monkeypatch):
    monkeypatch.setenv(DOMAINS_VARIABLE, "example.org")
    monkeypatch.setenv(LOCAL_PATH_VARIABLE, "/srv")
    assert MediaAccess.of() == MediaAccess("/srv", ("example.org",))
    assert MediaAccess.of("/data", []) == MediaAccess("/data", ())
    assert MediaAccess.of(domains="a.org,b.org").domains == ("a.org", "b.org")
    for wrong in ({"local_path": 3}, {"domains": [3]}):
        with pytest.raises(TypeError, match="allowed_"):
            MediaAccess.of(**wrong)


# ---- files ----


def test_only_files_in_the_folder_are_read(tmp_path):
    folder, beside = tmp_path / "open", tmp_path / "open-not"
    for place in (folder, beside):
        place.mkdir()
        (place / "star.png").write_bytes(STAR.read_bytes())
    (folder / "link.png").symlink_to(beside / "star.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (tmp_path / "way").symlink_to(folder)
    access = MediaAccess.of(folder)
    for allowed in (folder / "star.png", tmp_path / "way" / "star.png", f"{beside}/../open/star.png"):
        assert load_image(allowed, access=access).mode == "RGB"
    outside = [beside / "star.png", f"{folder}/../open-not/star.png", folder / "link.png", "/etc/passwd"]
    messages = set()
    for refused in [*outside, "/nothing/here.png", "nothing.png", "\0", f"{folder}\0.png"]:
        with pytest.raises(ValueError, match="may not be read here") as raised:
            load_image(refused, access=access)
        messages.add(str(raised.value).partition("may not be read")[2])
        assert str(folder) not in str(raised.value).replace(str(refused), "")
    assert len(messages) == 1  # whether there is a file or not
    with pytest.raises((ValueError, FileNotFoundError)):
        load_image(folder / "loop.png", access=access)


def test_frames_of_a_list_are_no_way_around(tmp_path):
    with pytest.raises(ValueError, match="may not be read here"):
        load_video([STAR, STAR], access=MediaAccess.of(tmp_path))


def test_base64_does_not_tell_which_files_exist(served, tmp_path):
    there = tmp_path / ("a" * 40)
    there.touch()
    said = set()
    for name in (str(there), str(there)[:-1] + "b"):
        name = name.replace("_", "").replace("-", "")
        name += "/" * ((1 - len(name)) % 4)  # of no length that base64 has
        with pytest.raises(ValueError) as raised:
            load_image(as_source(name))
        said.add(str(raised.value).replace(name, ""))
    assert all("neither a file nor valid base64" in text or "may not be read" in text for text in said)


# ---- addresses ----


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_public_addresses(address):
    assert is_public(access_module._address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.1.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1"),
    ],
)
def test_addresses_inside(address):
    assert not is_public(access_module._address(address))


@contextmanager
def names(monkeypatch, **addresses: str):
    """Let names of hosts lead to these addresses."""
    real = socket.getaddrinfo

    def look_up(host, *args, **kwargs):
        return real(addresses.get(host.split(".")[0], host), *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        yield


@pytest.mark.parametrize(
    "domains, host, is_read",
    [
        (["127.0.0.1"], "127.0.0.1", True),
        (["127.0.0.0/8"], "127.0.0.1", True),
        (["localhost"], "localhost", True),
        (["localhost"], "LOCALHOST", True),
        (["localhost"], "127.0.0.1", False),
        (["pictures.example", "127.0.0.1"], "pictures.example", True),
        (["pictures.example"], "pictures.example", False),  # a name that leads inside
        (["pictures.example"], "evil.pictures.example", False),
        (["pictures.example"], "pictures.example.evil", False),
        (["*"], "pictures.example", False),
        (["*"], "127.0.0.1", False),
        (["*"], "127.1", False),
        (["*"], "2130706433", False),
        (["*"], "0x7f000001", False),
        (["*"], "[::ffff:127.0.0.1]", False),
        (["*", "127.0.0.1"], "localhost", True),
        ([], "127.0.0.1", False),
    ],
)
def test_hosts_and_where_they_lead(domains, host, is_read, server, monkeypatch):
    url, access = f"http://{host}:{server.rpartition(':')[2]}/star", MediaAccess.of(domains=domains)
    Answers.seen.clear()
    with names(monkeypatch, pictures="127.0.0.1", evil="127.0.0.1"):
        if is_read:
            assert load_image(url, access=access).mode == "RGB"
        else:
            with pytest.raises(ValueError, match="not allowed|can't be read"):
                load_image(url, access=access)
            assert not Answers.seen


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1@evil.example/", "http://evil.example#@127.0.0.1/", "http://evil.example\\@127.0.0.1/"],
)
def test_urls_that_readers_understand_differently(url, monkeypatch):
    """Whatever is connected to is checked, not what a parser of URLs takes for the host."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    with pytest.raises(ValueError):
        load_image(url, access=LOOPBACK)
    assert not set(asked) - {"127.0.0.1"}


def test_redirects_are_checked_again(server, monkeypatch):
    port = server.rpartition(":")[2]
    Answers.seen.clear()
    for where in (f"http://localhost:{port}/star", f"//localhost:{port}/star", "http://10.0.0.1/star"):
        with pytest.raises(ValueError, match="not allowed"):
            load_image(f"{server}/to/{where}", access=LOOPBACK)
    assert "/star" not in Answers.seen
    assert load_image(f"{server}/to/http://127.0.0.1:{port}/star", access=LOOPBACK).mode == "RGB"
    assert load_image(f"{server}/to//star", access=OPEN).mode == "RGB"
    with pytest.raises(ValueError, match="redirects more than"):
        load_image(f"{server}/circle", access=OPEN)
    with names(monkeypatch, pictures="127.0.0.1"), pytest.raises(ValueError, match="own network"):
        load_image(
            f"http://pictures.example:{port}/star", access=MediaAccess.of(domains=["pictures.example"])
        )


def test_a_proxy_is_used_only_where_any_address_may_be_reached(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    Answers.seen.clear()
    assert load_image("http://pictures.example/star", access=OPEN).mode == "RGB"
    with names(monkeypatch, pictures="127.0.0.1"), pytest.raises(ValueError, match="own network"):
        load_image("http://pictures.example/star", access=MediaAccess.of(domains=["pictures.example"]))
    assert Answers.seen == ["http://pictures.example/star"]


# ---- time ----


@pytest.mark.parametrize("path", ["slow_status", "slow_headers", "slow_continue", "slow_body", "detours/9"])
def test_the_time_out_is_for_all_of_it(path, server):
    begin = time.monotonic()
    with pytest.raises(ValueError, match="timed out after 0.4 seconds in all"):
        fetch(f"{server}/{path}", timeout=0.4, max_bytes=10**6, access=OPEN)
    assert time.monotonic() - begin < 2.0


def test_the_time_out_includes_the_name(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3.0))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="timed out"):
        fetch("http://pictures.example/", timeout=0.2, max_bytes=10, access=OPEN)
    assert time.monotonic() - begin < 2.0


# ---- what is said ----


@pytest.mark.parametrize("which", RAW)
@pytest.mark.parametrize("read", [load_image, load_video])
def test_an_error_never_repeats_what_a_server_sent(which, read, server):
    with pytest.raises(ValueError) as raised:
        read(f"{server}/raw/{which.replace(' ', '%20')}", timeout=3.0)
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("name", [name for name in RAW if RAW[name].startswith(OK + b"\r\n")])
def test_an_error_never_repeats_what_a_file_says(name, tmp_path):
    (tmp_path / "file").write_bytes(RAW[name].removeprefix(OK + b"\r\n"))
    for read in (load_image, load_video):
        with pytest.raises(ValueError) as raised:
            read(tmp_path / "file")
        assert SECRET not in "".join(traceback.format_exception(raised.value))


# ---- servers ----


@pytest.mark.parametrize("error", [ValueError("too big"), TypeError("no text"), FileNotFoundError("no file")])
def test_in_a_server_a_bad_request_is_one_of_its_framework(error, served):
    with pytest.raises(HTTPException) as raised, bad_requests():
        raise error
    assert raised.value.status_code == 400 and raised.value.detail == str(error)
    assert isinstance(raised.value, ValueError)


def test_other_errors_stay_as_they_are(served, monkeypatch):
    with pytest.raises(MemoryError), bad_requests():
        raise MemoryError
    monkeypatch.delitem(sys.modules, SERVER_MODULES[0])
    with pytest.raises(ValueError, match="too big") as raised, bad_requests():
        raise ValueError("too big")
    assert type(raised.value) is ValueError
