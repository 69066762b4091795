"""`ixc2 serve`: an OpenAI-style server over a checkpoint as GGUF."""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from ..llamacpp.decoder import KV_TYPES
from ..llamacpp.model import LlamaCppModel, from_gguf

INSTALL = "pip install 'internlm-xcomposer2[gguf,serve]'"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the command of this file to the parser."""
    command = commands.add_parser(
        "serve",
        help="answer OpenAI's clients from a checkpoint as GGUF",
        description="Serve /v1/chat/completions, with pictures and streams, from a directory that "
        "`ixc2 gguf` wrote. It has no accounts. For checkpoints in torch there is `transformers serve`.",
    )
    command.add_argument("directory", metavar="DIRECTORY")
    command.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only")
    command.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    command.add_argument("--n-ctx", type=int, metavar="N", help="tokens in the context")
    command.add_argument("--threads", type=int, metavar="N", help="default: as many as torch uses")
    command.add_argument("--gpu-layers", type=int, metavar="N", default=0, help="-1 for all; default: 0")
    command.add_argument("--kv-type", choices=KV_TYPES, help="of keys and values; default: f16")
    command.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    try:
        import uvicorn

        from ..llamacpp.server import build_app
    except ImportError as error:
        raise ImportError(f"ixc2 serve needs {error.name}: {INSTALL}") from None
    model = from_gguf(
        options.directory,
        n_ctx=options.n_ctx,
        n_threads=options.threads,
        n_gpu_layers=options.gpu_layers,
        kv_type=options.kv_type,
        adapters=(),
    )
    if not isinstance(model, LlamaCppModel):
        raise ValueError(
            f"{options.directory} is of the first generation, which ixc2 serve doesn't know; use from_gguf"
        )
    model.tokenizer = AutoTokenizer.from_pretrained(options.directory)
    app = build_app(model, Path(options.directory).resolve().name)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
