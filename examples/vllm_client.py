"""Asks a vLLM server about two pictures, prints the answer as it is written, then asks again.

Start a server first (docs/vllm.md), for instance on nano:
    vllm serve . --config-format ixc2 --served-model-name nano
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI

EXAMPLES = Path(__file__).parent


def picture(path: Path) -> dict:
    """A picture as a part of a message."""
    kind = mimetypes.guess_type(path.name)[0]
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def text(words: str) -> dict:
    """Text as a part of a message."""
    return {"type": "text", "text": words}


def ask(client: OpenAI, model: str, messages: list[dict]) -> str:
    """Print an answer piece by piece, and return all of it."""
    pieces = []
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, temperature=0, stream=True
    )
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        print(pieces[-1], end="", flush=True)
    print()
    return "".join(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="nano", help="the served name, or that of an adapter")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none")
    content = [text("Which picture shows the ring? Picture 1: "), picture(EXAMPLES / "star.png")]
    content += [text("; picture 2: "), picture(EXAMPLES / "ring.jpg")]
    messages = [{"role": "user", "content": content}]
    answer = ask(client, options.model, messages)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What colour is it?"}]
    ask(client, options.model, messages)


if __name__ == "__main__":
    main()
