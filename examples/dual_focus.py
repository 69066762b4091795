"""Answer a question about a detail: look at all, find the region, look again, take the better answer.

python examples/dual_focus.py PICTURE "question" --model CHECKPOINT
python examples/dual_focus.py examples/small.png "What word is printed in the picture?" --box 165 130 235 168

The recipe is DualFocus: the model says which box a question is about and answers again with the box enlarged.
Of both answers, the one with the lower loss wins. Nano finds no boxes, but `--box` gives one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from internlm_xcomposer2.ixc_utils import parse_boxes
from internlm_xcomposer2.media_internlm_xcomposer2 import load_image
from PIL import Image
from transformers import AutoModel, AutoTokenizer

FIND = "Please provide the bounding box coordinate of the region this question asks: {question}"
COMBINE = "Please combine the information from these two images and answer this question: {question}"
MARGIN = 25  # px around the square

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Focus:
    """Both answers, how surprising each is to the model that sees the enlarged box, and the box.

    Without a box there is only the first answer.
    """

    macro: str
    micro: str | None = None
    box: Box | None = None
    macro_loss: float = 0.0
    micro_loss: float = 0.0

    @property
    def answer(self) -> str:
        """The better of the two."""
        return self.micro if self.micro is not None and self.micro_loss < self.macro_loss else self.macro


def enlarged_box(box: Box, size: tuple[int, int], margin: int = MARGIN) -> Box:
    """The square around a box with a margin, within a picture of (height, width) pixels."""
    left, top, right, bottom = box
    half = max(right - left, bottom - top) / 2 + margin
    x, y = (left + right) / 2, (top + bottom) / 2
    height, width = size
    return (
        max(0, int(x - half)),
        max(0, int(y - half)),
        min(width, round(x + half)),
        min(height, round(y + half)),
    )


@torch.no_grad()
def loss_of(model, tokenizer, query: str, pictures: Sequence, history: Sequence, answer: str) -> float:
    """The mean loss of an answer's tokens, its end included."""
    inputs = model.prepare_chat(tokenizer, query, list(pictures), history=history)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [model.config.end_token_id]
    ids = torch.cat([inputs["input_ids"], torch.tensor([ids], device=inputs["input_ids"].device)], dim=1)
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_hw") if name in inputs}
    return float(model(input_ids=ids, labels=labels, **pixels).loss)


def dual_focus(
    model, tokenizer, question: str, picture: Image.Image, box: Box | None = None, **settings
) -> Focus:
    """Answer twice and compare.

    Args:
        box: the region that the question is about; the model is asked for it by default.
        settings: as in `chat`; greedy by default.
    """
    settings = {"do_sample": False, **settings}
    macro, _ = model.chat(tokenizer, f"<ImageHere>{question}", [picture], **settings)
    find = f"<ImageHere>{FIND.format(question=question)}"
    if box is None:
        where, _ = model.chat(tokenizer, find, [picture], **settings)
        # Version 2.5 answers in thousandths of the picture, earlier ones in parts of it.
        scale = 1000 if model.config.version == "2.5" else 1
        box = next(iter(parse_boxes(where, picture.size[::-1], scale=scale)), None)
    else:
        where = as_answer(box, picture.size[::-1], model.config.version)
    if box is None:
        return Focus(macro)
    crop = picture.crop(enlarged_box(box, picture.size[::-1]))
    combine, history = f"<ImageHere>{COMBINE.format(question=question)}", [(find, where)]
    micro, _ = model.chat(tokenizer, combine, [picture, crop], history=history, **settings)
    losses = [loss_of(model, tokenizer, combine, [picture, crop], history, text) for text in (macro, micro)]
    return Focus(macro, micro, box, *losses)


def as_answer(box: Box, size: tuple[int, int], version: str) -> str:
    """A box as the model would have answered it, for a picture of (height, width) pixels."""
    parts = [value / size[1 - index % 2] for index, value in enumerate(box)]
    if version == "2.5":
        return f"[{', '.join(str(round(1000 * part)) for part in parts)}]"
    return f"[{', '.join(f'{part:.3f}' for part in parts)}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture")
    parser.add_argument("question")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1]), help="folder or hub id")
    parser.add_argument(
        "--box", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="in pixels"
    )
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").eval()
    box = tuple(arguments.box) if arguments.box else None
    focus = dual_focus(model, tokenizer, arguments.question, load_image(arguments.picture), box)
    print(f"whole picture: {focus.macro}" + (f" (loss {focus.macro_loss:.3f})" if focus.box else ""))
    if focus.box:
        print(f"box {focus.box}: {focus.micro} (loss {focus.micro_loss:.3f})")
    print(f"answer: {focus.answer}")


if __name__ == "__main__":
    main()
