"""How often nano is exactly right, for each of its abilities, on pictures that training never drew.

    python evaluation/nano_accuracy.py --samples 300

Every picture is drawn with held-back words, numbers, fonts, sizes and positions (a single character cannot
be held back as a string: only its font, size and place are new), written to a file, half of them PNG and
half JPEG, videos as MP4, and asked about through `chat` with greedy decoding. Small print is read twice, with
`hd_num=9` and, in the row "small, one tile", with `hd_num=1` from the same files. Of follow-up questions the
second and third count, with the history of the previous ones. "web" and "write" go through `write_webpage`
and `write_artical`. The last line is JSON.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.nano.examples import FRAMES_PER_SECOND, write_video  # noqa: E402
from tools.nano.fonts import find_fonts  # noqa: E402
from tools.nano.questions import ABILITIES  # noqa: E402
from tools.nano.samples import Drawer, Sample  # noqa: E402
from tools.nano.talk import article, web_page  # noqa: E402
from tools.quantizations import QUANTIZATIONS, quantization_config  # noqa: E402

WRITING = {"web": web_page, "write": article}
READING = ("number", "word", "code", "small")
ROWS = {"small": ("small", "small, one tile")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=300, help="of each ability")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument(
        "--model", default=str(ROOT), help="folder of the checkpoint; this repository by default"
    )
    parser.add_argument("--fonts", nargs="*", help="folders of fonts; /usr/share/fonts by default")
    parser.add_argument("--dtype", default="auto", help="of the weights; the checkpoint's own by default")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="quantise the decoder's linears; needs '.[quant]'"
    )
    parser.add_argument("--gguf", metavar="FOLDER", help="the checkpoint as GGUF, run by llama.cpp instead")
    every = (*ABILITIES, *WRITING)
    parser.add_argument("--abilities", nargs="*", default=every, choices=every)
    parser.add_argument("--show-errors", action="store_true", help="print every wrong answer")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the pictures")
    return parser.parse_args()


def write_pictures(sample: Sample, folder: Path, name: str, rng: random.Random) -> list[str] | None:
    """The sample's pictures as files, PNG or JPEG; its video as MP4; None without any."""
    if sample.frames:
        path = folder / f"{name}.mp4"
        write_video(path, [frame.image for frame in sample.frames], FRAMES_PER_SECOND)
        return [str(path)]
    paths = []
    for number, picture in enumerate(sample.pictures):
        path = folder / f"{name}_{number}.{rng.choice(('png', 'jpg'))}"
        picture.image.save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))
        paths.append(str(path))
    return paths or None


def detail(sample: Sample, turn: int) -> str:
    """What a sample is broken down by: the answer's length for text, how many pictures, the answer itself."""
    answer = sample.turns[turn][1]
    if sample.ability in READING:
        return f"{len(answer)} characters"
    if sample.ability in ("which", "more"):
        return f"of {len(sample.pictures)} pictures"
    if sample.ability in ("way", "last"):
        return f"{len(sample.frames)} frames"
    if sample.ability == "follow-up":
        return f"question {turn + 1}"
    return "all" if sample.ability in ("total", "caption", "talk") else answer


def ask(model, tokenizer, sample: Sample, paths: list[str] | None, hd_num: int) -> list[str]:
    """The answers to all turns, each with the history of the previous ones."""
    history, answers = [], []
    for question, _ in sample.turns:
        answer, history = model.chat(
            tokenizer, question, paths, hd_num, history, do_sample=False, max_new_tokens=64
        )
        answers.append(answer)
    return answers


def measure(
    model, tokenizer, ability: str, arguments: argparse.Namespace, folder: Path
) -> dict[str, dict[str, list[bool]]]:
    """Right or wrong, by row of the table and by detail, for one ability."""
    if ability in WRITING:
        return {ability: {"all": measure_writing(model, tokenizer, ability, arguments)}}
    rng = random.Random(f"{arguments.seed} {ability}")
    drawer = Drawer("held_back", rng, find_fonts("held_back", arguments.fonts))
    rows = {name: defaultdict(list) for name in ROWS.get(ability, [ability])}
    for number in range(arguments.samples):
        sample = drawer.sample(ability)
        paths = write_pictures(sample, folder, f"{ability}_{number}", rng)
        for name, hd_num in zip(rows, (sample.hd_num, 1), strict=False):
            answers = ask(model, tokenizer, sample, paths, hd_num)
            for turn in range(1 if ability == "follow-up" else 0, len(answers)):
                question, right = sample.turns[turn]
                rows[name][detail(sample, turn)].append(answers[turn] == right)
                if arguments.show_errors and answers[turn] != right:
                    print(f"{name} {paths}: {question!r} -> {answers[turn]!r}, should be {right!r}")
    return rows


def measure_writing(model, tokenizer, ability: str, arguments: argparse.Namespace) -> list[bool]:
    """Whether pages, or articles, are exactly as requested."""
    rng, rights = random.Random(f"{arguments.seed} {ability}"), []
    settings = {"tokenizer": tokenizer, "do_sample": False, "repetition_penalty": 1.0, "num_beams": 1}
    for _ in range(arguments.samples):
        instruction, right = WRITING[ability]("held_back", rng)
        if ability == "web":
            text = model.write_webpage(instruction, save=False, max_new_tokens=256, **settings)
        else:
            text = model.write_artical(instruction, max_new_tokens=256, **settings)
        rights.append(text == right)
        if arguments.show_errors and text != right:
            print(f"{ability}: {instruction!r} -> {text!r}, should be {right!r}")
    return rights


def percent(outcomes: list[bool]) -> float:
    return round(100 * sum(outcomes) / len(outcomes), 1)


def load_model(arguments: argparse.Namespace):
    """The model in torch, or as GGUF in llama.cpp."""
    if arguments.gguf:
        from internlm_xcomposer2 import from_gguf

        return from_gguf(arguments.gguf, dtype=arguments.dtype)
    quantizer = quantization_config(arguments.quantization) if arguments.quantization else None
    return AutoModel.from_pretrained(
        arguments.model, trust_remote_code=True, dtype=arguments.dtype, quantization_config=quantizer
    ).eval()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = load_model(arguments)
    result = {"samples": arguments.samples, "seed": arguments.seed, "device": str(model.input_device)}
    result |= {
        "dtype": arguments.dtype if arguments.gguf else str(model.dtype),
        "quantization": arguments.quantization,
        "gguf": arguments.gguf,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print("| ability | right | of | % | by answer (%) |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
        for ability in arguments.abilities:
            rows = measure(model, tokenizer, ability, arguments, arguments.keep or Path(folder))
            for name, outcomes in rows.items():
                everything = sum(outcomes.values(), [])
                parts = ", ".join(f"{part} {percent(outcomes[part]):g}" for part in sorted(outcomes))
                total = percent(everything)
                print(f"| {name} | {sum(everything)} | {len(everything)} | {total:g} | {parts} |", flush=True)
                result[name] = total
    print(json.dumps(result))


if __name__ == "__main__":
    main()
