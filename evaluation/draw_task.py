"""Draw a small task that needs no download, in the formats of lmms-eval, VLMEvalKit and lighteval.

    python evaluation/draw_task.py --out runs/task --samples 60

Every question is about one drawn object, or several, which nano has never seen; the answer is a word. For
lmms-eval, `ixc2_drawn` asks for the word and `ixc2_drawn_choice` compares the likelihoods of four words. For
VLMEvalKit, `ixc2_drawn_openended.tsv` asks for the word and `ixc2_drawn_choice.tsv` for a letter, and
`adapter.json` and `server.json` say how. For lighteval, `task.py` has `ixc2_drawn`. All have the same
pictures. docs/evaluation.md has the commands that use them.
"""

import argparse
import base64
import csv
import io
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.nano.questions import COLOURS, SHAPES  # noqa: E402
from tools.nano.samples import Drawer  # noqa: E402

WORDS = {"shape": SHAPES, "colour": COLOURS, "count": tuple("123456")}
NUM_OPTIONS = 4
NUM_ANNOTATORS = 10  # VLMEvalKit's score of open questions wants the answers of several people

UTILS = '''"""What the tasks of this folder read from a row."""

import PIL.Image


def pictures(row):
    return [PIL.Image.open(row["path"]).convert("RGB")]


def options(row):
    return row["options"]
'''

WORD_TASK = """task: ixc2_drawn
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
metadata:
  - version: 1.0
"""

CHOICE_TASK = """task: ixc2_drawn_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_choice: !function utils.options
doc_to_target: "{{{{options.index(answer)}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 1.0
"""


LIGHTEVAL_TASK = '''"""The drawn task for lighteval."""

import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod
from PIL import Image


class IsAnswer(SampleLevelComputation):
    def compute(self, doc, model_response, **kwargs):
        # lighteval 0.13 goes on after the mark that ends a turn, and passes a text where its own metrics
        # expect a list of texts
        text = model_response.text if isinstance(model_response.text, str) else model_response.text[0]
        return float(text.split("[UNUSED_TOKEN_145]")[0].strip() == doc.choices[0])


def prompt(row, task_name=None):
    picture = Image.open(row["path"]).convert("RGB")
    choices = [row["answer"]]
    return Doc(task_name=task_name, query=row["question"], choices=choices, gold_index=0, images=[picture])


METRIC = SampleLevelMetric(
    metric_name="accuracy",
    higher_is_better=True,
    category=SamplingMethod.GENERATIVE,
    sample_level_fn=IsAnswer(),
    corpus_level_fn=np.mean,
)
TASKS_TABLE = [
    LightevalTaskConfig(
        name="ixc2_drawn",
        prompt_function=prompt,
        hf_repo={folder!r},
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=8,
        metrics=[METRIC],
        version=0,
    )
]
'''

# What VLMEvalKit runs: its own adapter of 2.5 on nano, or its client of servers on `transformers serve`.
DATA = {
    "ixc2_drawn_openended": {"class": "ImageVQADataset", "dataset": "ixc2_drawn_openended"},
    "ixc2_drawn_choice": {"class": "ImageMCQDataset", "dataset": "ixc2_drawn_choice"},
}
SERVER = "http://127.0.0.1:8000/v1/chat/completions"
CONFIGS = {
    "adapter.json": {"nano": {"class": "XComposer2d5", "model_path": str(ROOT)}},
    "server.json": {
        "served": {"class": "LMDeployAPI", "model": ".", "api_base": SERVER, "key": "none", "max_tokens": 16}
    },
}


def draw(out: Path, samples: int, seed: int = 0) -> None:
    """Write the task into a new folder.

    Raises:
        FileExistsError: it already exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another folder")
    for folder in ("pictures", "rows", "lmms_eval", "vlmevalkit", "lighteval"):
        (out / folder).mkdir(parents=True)
    rng = random.Random(f"{seed} task")
    drawer = Drawer("held_back", rng, [])
    rows = [draw_row(drawer, rng, out, index) for index in range(samples)]
    data = out.absolute() / "rows" / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("drawn.yaml", WORD_TASK), ("drawn_choice.yaml", CHOICE_TASK)):
        (out / "lmms_eval" / name).write_text(text.format(rows=data), encoding="utf-8")
    (out / "lmms_eval" / "utils.py").write_text(UTILS, encoding="utf-8")
    task = LIGHTEVAL_TASK.format(folder=str(data.parent))
    (out / "lighteval" / "task.py").write_text(task, encoding="utf-8")
    write_tsv(out / "vlmevalkit" / "ixc2_drawn_openended.tsv", map(open_row, rows))
    write_tsv(out / "vlmevalkit" / "ixc2_drawn_choice.tsv", map(choice_row, rows))
    for name, model in CONFIGS.items():
        config = json.dumps({"model": model, "data": DATA}, indent=2)
        (out / "vlmevalkit" / name).write_text(config, encoding="utf-8")


def draw_row(drawer: Drawer, rng: random.Random, out: Path, index: int) -> dict:
    """A picture, a question about it, its answer, and the options that it is among."""
    kind = list(WORDS)[index % len(WORDS)]
    sample = drawer.sample(kind)
    (question, answer), (picture,) = sample.turns[0], sample.pictures
    others = rng.sample([word for word in WORDS[kind] if word != answer], NUM_OPTIONS - 1)
    options = [answer, *others]
    rng.shuffle(options)
    path = out.absolute() / "pictures" / f"{index:04}.png"
    picture.image.save(path)
    fields = {"index": index, "kind": kind, "path": str(path), "question": question}
    return {**fields, "answer": answer, "options": options}


def open_row(row: dict) -> dict:
    """A row of an open question, as VLMEvalKit has them."""
    answers = json.dumps([row["answer"]] * NUM_ANNOTATORS)
    return {**_common(row), "answer": answers}


def choice_row(row: dict) -> dict:
    """A row of a multiple choice, as VLMEvalKit has them."""
    letters = [chr(65 + number) for number in range(NUM_OPTIONS)]
    answer = letters[row["options"].index(row["answer"])]
    return {**_common(row), **dict(zip(letters, row["options"], strict=True)), "answer": answer}


def _common(row: dict) -> dict:
    picture = base64.b64encode(Path(row["path"]).read_bytes()).decode("ascii")
    return {
        "index": row["index"],
        "image": picture,
        "question": row["question"],
        "category": row["kind"],
    }


def write_tsv(path: Path, rows) -> None:
    """Rows with the same fields, separated by tabs."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw(arguments.out, arguments.samples, arguments.seed)


if __name__ == "__main__":
    main()
