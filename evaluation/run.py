"""Measure a model on a local file of questions, for benchmarks that no harness has.

    python evaluation/run.py WTQ questions.jsonl --out answers.jsonl --model internlm/internlm-xcomposer2d5-7b

Each line of the file is a JSON object with `id`, `image` (a path beside the file, or a list of them),
`question` and `answers` (a list of texts that are right); DeepForm's also has `document` and `field`. The
settings are those of `benchmarks.yaml`. Answers are written one by one; a run that was interrupted goes on.
The last line on the terminal is JSON with the score. Needs `pip install -e '.[evaluation]'`.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from internlm_xcomposer2.evaluation.asking import Asker, Sample  # noqa: E402
from internlm_xcomposer2.media_internlm_xcomposer2 import load_image  # noqa: E402

from evaluation.benchmarks import settings_of  # noqa: E402
from evaluation.metrics import accuracy, anls, cider, field_f1, mean  # noqa: E402

METRICS = {"WTQ": mean(accuracy), "TabFact": mean(accuracy), "VisualMRC": cider, "ANLS": mean(anls)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", choices=["DeepForm", *METRICS])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where answers go, and are found again")
    parser.add_argument("--model", default=str(ROOT), help="a folder or a repository; nano by default")
    parser.add_argument("--version", default="2.5", help="whose settings to use")
    parser.add_argument("--batch", type=int, default=1, help="questions that are answered at once")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--hd-num", type=int, help="local tiles of a picture, the table's by default")
    return parser.parse_args(arguments)


def read_rows(path: Path, needed: Sequence[str]) -> list[dict]:
    """The rows of a file of JSON lines.

    Raises:
        ValueError: a line is no JSON object, lacks something, or has the id of an earlier one.
    """
    rows, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        lacking = [name for name in needed if not isinstance(row, dict) or name not in row]
        if lacking:
            raise ValueError(f"{path}, line {number} lacks {', '.join(lacking)}")
        if row["id"] in seen:
            raise ValueError(f"{path}, line {number}: the id {row['id']!r} was already there")
        seen.add(row["id"])
        rows.append(row)
    return rows


def read_answers(path: Path) -> dict[object, str]:
    """Answers of an earlier run, by id. A last line that was cut off is removed."""
    if not path.exists():
        return {}
    whole, cut, _ = path.read_text(encoding="utf-8").rpartition("\n")
    path.write_text(whole + cut, encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines() if line]
    return {row["id"]: row["answer"] for row in rows}


def batches(rows: Sequence[dict], size: int) -> Iterator[Sequence[dict]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def samples_of(rows: Sequence[dict], folder: Path) -> list[Sample]:
    """Rows as `Asker` takes them, their pictures read."""
    named = [[row["image"]] if isinstance(row["image"], str) else row["image"] for row in rows]
    pictures = [[load_image(folder / name) for name in names] for names in named]
    return [
        Sample(row["question"], media, {"question": row["question"]})
        for row, media in zip(rows, pictures, strict=True)
    ]


def score(benchmark: str, rows: Sequence[dict], answers: dict[object, str]) -> float:
    """The benchmark's metric over all rows, in percent."""
    if benchmark == "DeepForm":
        mine, right = defaultdict(dict), defaultdict(dict)
        for row in rows:
            mine[row["document"]][row["field"]] = answers[row["id"]]
            right[row["document"]][row["field"]] = row["answers"][0]
        return 100 * field_f1(list(mine.values()), [right[name] for name in mine])
    return METRICS[benchmark]([answers[row["id"]] for row in rows], [row["answers"] for row in rows])


def main(arguments: Sequence[str] | None = None) -> dict:
    options = parse_arguments(arguments)
    benchmark = "DocVQA" if options.benchmark == "ANLS" else options.benchmark
    settings = settings_of(benchmark, options.version)
    needed = ("id", "image", "question", "answers")
    rows = read_rows(
        options.questions, (*needed, "document", "field") if options.benchmark == "DeepForm" else needed
    )
    answers = read_answers(options.out)
    remaining = [row for row in rows if row["id"] not in answers]
    if remaining:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
        model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=options.dtype).eval()
        asker = Asker(
            model,
            tokenizer,
            benchmark=benchmark,
            version=options.version,
            hd_num=options.hd_num,
            batch_size=options.batch,
        )
        with options.out.open("a", encoding="utf-8") as out, tqdm(total=len(remaining)) as progress:
            for batch in batches(remaining, options.batch):
                texts = asker.answers(samples_of(batch, options.questions.parent))
                for row, text in zip(batch, texts, strict=True):
                    answers[row["id"]] = text
                    out.write(json.dumps({"id": row["id"], "answer": text}, ensure_ascii=False) + "\n")
                out.flush()
                progress.update(len(batch))
    result = {"benchmark": options.benchmark, "samples": len(rows), "metric": settings.metric}
    result["score"] = round(score(options.benchmark, rows, answers), 2)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
