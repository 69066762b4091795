"""Shared by the tests of the pages: a model that never ends, and the browser."""

import argparse
import os
import shutil
from functools import cache

from helpers import tiny_model
from internlm_xcomposer2.demo.service import Service, add_options, load_service, service_of

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
BROWSER = os.environ.get("IXC2_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@cache
def nano_service() -> Service:
    """The checkpoint in the root. Shared: don't change it."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return load_service(parser.parse_args([]))


@cache
def endless_service() -> Service:
    """A random model that never ends its answer. Shared: don't change it."""
    adapters = {"sft": 2, "dpo": 2, "web": 2}
    model = tiny_model("2.5", max_position_embeddings=16384, task_adapters=adapters)
    model.output.weight.data[[2, 5]] = 0
    return service_of(model, nano_service().tokenizer)
