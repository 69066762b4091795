"""How often nano answers exactly right, for each of its abilities, on pictures that training never drew.

    python evaluation/nano_accuracy.py --samples 200

Every picture is drawn with held-back words, numbers, fonts, sizes and positions (a single character cannot
be held back as a string: only its font, size and place are new), written to a file, half of them PNG and
half JPEG, and asked about through `chat` with greedy decoding. The last line is JSON.
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

from tools.nano.fonts import find_fonts  # noqa: E402
from tools.nano.questions import ABILITIES  # noqa: E402
from tools.nano.samples import Sample, draw_sample  # noqa: E402
from tools.quantizations import QUANTIZATIONS, quantization_config  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="of each ability")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument(
        "--model", default=str(ROOT), help="folder of the checkpoint; this repository by default"
    )
    parser.add_argument("--fonts", nargs="*", help="folders of fonts; /usr/share/fonts by default")
    parser.add_argument("--dtype", default="auto", help="of the weights; the checkpoint's own by default")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="quantise the decoder's linears; needs '.[quant]'"
    )
    parser.add_argument("--abilities", nargs="*", default=ABILITIES, choices=ABILITIES)
    parser.add_argument("--show-errors", action="store_true", help="print every wrong answer")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the pictures")
    return parser.parse_args()


def write_pictures(sample: Sample, folder: Path, name: str, rng: random.Random) -> list[str]:
    """The sample's pictures as files, PNG or JPEG."""
    paths = []
    for number, picture in enumerate(sample.pictures):
        path = folder / f"{name}_{number}.{rng.choice(('png', 'jpg'))}"
        picture.image.save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))
        paths.append(str(path))
    return paths


def detail(sample: Sample) -> str:
    """The answer's length for text, the answer itself otherwise: what the breakdown is by."""
    answer = sample.turns[0][1]
    return f"{len(answer)} characters" if sample.ability in ("number", "word") else answer


def measure(
    model, tokenizer, ability: str, arguments: argparse.Namespace, folder: Path
) -> dict[str, list[bool]]:
    """Right or wrong, by detail, for one ability."""
    rng = random.Random(f"{arguments.seed} {ability}")
    families = find_fonts("held_back", arguments.fonts)
    outcomes = defaultdict(list)
    for number in range(arguments.samples):
        sample = draw_sample(ability, "held_back", rng, families)
        paths = write_pictures(sample, folder, f"{ability}_{number}", rng)
        (question, answer), *_ = sample.turns
        response, _ = model.chat(tokenizer, question, paths, do_sample=False, max_new_tokens=16)
        outcomes[detail(sample)].append(response == answer)
        if arguments.show_errors and response != answer:
            print(f"{paths}: {question!r} -> {response!r}, should be {answer!r}")
    return outcomes


def percent(outcomes: list[bool]) -> float:
    return round(100 * sum(outcomes) / len(outcomes), 1)


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    quantizer = quantization_config(arguments.quantization) if arguments.quantization else None
    model = AutoModel.from_pretrained(
        arguments.model, trust_remote_code=True, dtype=arguments.dtype, quantization_config=quantizer
    ).eval()
    result = {"samples": arguments.samples, "seed": arguments.seed, "device": str(model.device)}
    result |= {
        "dtype": str(model.dtype),
        "quantization": arguments.quantization,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"| ability | right of {arguments.samples} | % | by answer (%) |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
        for ability in arguments.abilities:
            outcomes = measure(model, tokenizer, ability, arguments, arguments.keep or Path(folder))
            everything = sum(outcomes.values(), [])
            parts = ", ".join(f"{name} {percent(outcomes[name]):g}" for name in sorted(outcomes))
            print(f"| {ability} | {sum(everything)} | {percent(everything):g} | {parts} |", flush=True)
            result[ability] = percent(everything)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
