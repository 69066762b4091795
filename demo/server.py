"""Serves pages: which limits hold for all of them, and what a visitor's browser may do.

All pages share one queue, since there is one model. Everything that a visitor sends is bounded here or in the
page; what doesn't fit is an error before any computation.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from internlm_xcomposer2.demo.service import Service, add_options, load_service
from internlm_xcomposer2.demo.texts import TEXTS
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MODEL = "model"  # the one queue of everything that computes
MAX_WAITING = 32  # questions in the queue
MAX_VISITORS = 64  # whose dialogues are held in memory; the longest unused goes first
MAX_FILE_BYTES = 64 << 20
MAX_UPLOAD_BYTES = 256 << 20  # of all files that come in one request
MAX_REQUEST_BYTES = 1 << 20  # of everything else that is sent
MAX_STORED_BYTES = 8 << 30  # of all visitors' files together
HOUR = 3600  # seconds: how often uploaded files are looked through
FILE_HOURS = 12  # after which they go

translate = gr.I18n(**TEXTS)


# ---- what browsers may do ----


class Guard:
    """Adds security headers to every answer, and refuses what no page of ours asks for.

    Args:
        policy: what a page may load.
        folder: where uploads go.
    """

    def __init__(self, app: ASGIApp, policy: str, folder: Path) -> None:
        self.app, self.folder = app, folder
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = refusal(scope["method"], scope["path"], Headers(scope=scope), self.folder)
        if refused is not None:
            await discard(receive, MAX_UPLOAD_BYTES)
            await PlainTextResponse(refused[1], status_code=refused[0])(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def discard(receive: Receive, most: int) -> None:
    """Take in what is still being sent, at most about `most` bytes: an answer before it is lost."""
    taken, goes_on = 0, True
    while goes_on and taken < most:
        message = await receive()
        taken, goes_on = taken + len(message.get("body", b"")), message.get("more_body", False)


def refusal(method: str, path: str, headers: Headers, folder: Path) -> tuple[int, str] | None:
    """Why a request is refused, as HTTP status and text; `None` for what our own pages ask.

    Refused are requests from other sites' pages, to fetch an address for the visitor, and too large ones.
    """
    _, mark, file = path.partition("/file=")
    origin = headers.get("origin")
    host = headers.get("x-forwarded-host") or headers.get("host", "")
    if (mark and "://" in file) or (origin is not None and origin.partition("://")[2] != host):
        return 403, "refused"
    if method != "POST":
        return None
    is_upload = path.rstrip("/").endswith("/upload")
    limit, length = MAX_UPLOAD_BYTES if is_upload else MAX_REQUEST_BYTES, headers.get("content-length", "")
    if not length.isdecimal():
        return 411, "the length is missing"
    if int(length) > limit:
        return 413, f"{length} bytes were sent, but the limit is {limit}"
    if is_upload and stored_bytes(folder) + int(length) > MAX_STORED_BYTES:
        return 507, "there is no room for more files; try again later"
    return None


def stored_bytes(folder: Path) -> int:
    """The size of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def content_policy(*, web_content: bool) -> str:
    """What a page may load: only from this server; with `web_content`, pictures, styles and scripts too.

    Frames with pages that the model wrote inherit it, besides being sandboxed.
    """
    web = " https:" if web_content else ""
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' 'unsafe-inline' 'unsafe-eval'{web}",
            f"style-src 'self' 'unsafe-inline'{web}",
            f"img-src 'self' data: blob:{web}",
            f"font-src 'self' data:{web}",
            "media-src 'self' data: blob:",
            "worker-src 'self' blob:",
            "connect-src 'self' data: blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
        )
    )


# ---- serving ----


def launch(pages: gr.Blocks, *, host: str, port: int | None, web_content: bool) -> str:
    """Begin to serve pages -> their address. `GRADIO_TEMP_DIR` must be set, as `run` does."""
    pages.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    guard = Middleware(Guard, policy=content_policy(web_content=web_content), folder=folder)
    _, address, _ = pages.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        quiet=True,
        run_history=False,
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
        state_session_capacity=MAX_VISITORS,
        footer_links=["settings"],
        i18n=translate,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
        prevent_thread_lock=True,
    )
    return address


def blocks(title: str) -> gr.Blocks:
    """An empty page that reports nothing to anyone and deletes old uploads."""
    return gr.Blocks(
        title=title, analytics_enabled=False, fill_width=True, delete_cache=(HOUR, FILE_HOURS * HOUR)
    )


def serve(
    build: Callable[[Service], gr.Blocks], description: str, arguments: list[str] | None = None
) -> None:
    """The command of a page: read its options, load the model, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=description)
    add_options(parser)
    run(build, parser.parse_args(arguments))


def run(build: Callable[[Service], gr.Blocks], options: argparse.Namespace) -> None:
    """Load the model and serve what `build` makes of it, with uploads in a folder that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="ixc2-pages-") as folder:
        # The one way to tell gradio; its default is a folder that all users of the machine share.
        os.environ["GRADIO_TEMP_DIR"] = folder
        service = load_service(options)
        pages = build(service)
        address = launch(pages, host=options.host, port=options.port, web_content=options.web_content)
        print(f"serving at {address}", flush=True)
        pages.block_thread()
