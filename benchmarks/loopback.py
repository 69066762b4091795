"""Servers on loopback: starting one, a client of it, stopping it."""

import base64
import mimetypes
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from openai import OpenAI

START, STOP = 300.0, 30.0  # seconds that a server may take to start, and to end


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, *, timeout: float = 120.0, **options) -> Iterator[OpenAI]:
    """A client of a server that is started here, and stopped at the end, whatever happens.

    Args:
        port: which the command tells the server to listen on.
        timeout: seconds that an answer may take.
        options: more arguments of `subprocess.Popen`.

    Raises:
        RuntimeError: it doesn't start; the end of its log is in the message.
    """
    with TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health", log)
            url = f"http://127.0.0.1:{port}/v1"
            yield OpenAI(base_url=url, api_key="none", timeout=timeout, max_retries=0)
        finally:
            server.terminate()
            try:
                server.wait(STOP)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(STOP)


def _wait_for(server: subprocess.Popen, url: str, log) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"the server did not start:\n{log.read()[-3000:]}")


def data_uri(path: Path) -> str:
    """A file as a URI that holds it."""
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
