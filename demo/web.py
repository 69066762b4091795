"""Both pages at once: chat with web pages, and composition.

python demo/web.py                        # nano
python demo/web.py --model internlm/internlm-xcomposer2d5-7b --dtype bfloat16
"""

import gradio as gr
from internlm_xcomposer2.demo.chat import TITLE, chat_page
from internlm_xcomposer2.demo.composition import composition_page
from internlm_xcomposer2.demo.server import blocks, serve
from internlm_xcomposer2.demo.service import Service


def build(service: Service) -> gr.Blocks:
    """One site with a page for each."""
    with blocks(TITLE) as pages:
        chat_page(service)
    with pages.route("Composition · 图文创作", "/composition"):
        composition_page(service)
    return pages


if __name__ == "__main__":
    serve(build, __doc__.splitlines()[0])
