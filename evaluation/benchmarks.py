"""The settings of `benchmarks.yaml`: what `chat` gets for a sample, and how its answer is read.

python evaluation/benchmarks.py                  # the table, in Markdown
python evaluation/benchmarks.py DocVQA 2.5       # one benchmark's settings for a version
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import yaml

TABLE = Path(__file__).with_name("benchmarks.yaml")
UNKNOWN = "unknown"
VERSIONS = ("1.0-vl", "vl", "4khd", "2.5")
READERS = {
    "whole answer": str.strip,
    "first capital letter": lambda answer: next(iter(re.findall("[A-Z]", answer)), ""),
    UNKNOWN: str.strip,
}


@dataclass(frozen=True)
class Settings:
    """How one version was asked on one benchmark. What no source says is `"unknown"`.

    Attributes:
        hd_num: local tiles of a picture; `None` where pictures are squares.
        query, option, empty_hint: forms of the question, with {question}, {options} and {hint}.
        prefix: how the answer was begun for the model.
        mark, mark_of_several: what stood before the question for one picture, and for each of several.
        read: how the answer is read, one of `READERS`.
        score: the published one, of the split named.
    """

    benchmark: str
    version: str
    kind: str
    metric: str
    hd_num: int | str | None
    num_beams: int | str
    max_new_tokens: int | str
    repetition_penalty: float | str
    query: str
    read: str
    prefix: str = ""
    mark: str = ""
    mark_of_several: str = ""
    option: str = ""
    empty_hint: str = ""
    cut_question_at: str = ""
    with_system: bool = False
    num_frames: int | str | None = None
    id_scale: float | None = None
    hd_num_of_several: Mapping[str, int] | None = None
    split: str = UNKNOWN
    score: float | str = UNKNOWN
    source: str = ""

    @property
    def unknown(self) -> list[str]:
        """The names of what no source says, the score apart."""
        return [
            name
            for name, value in asdict(self).items()
            if value == UNKNOWN and name not in ("score", "split")
        ]

    def ask(self, question: str, options: Sequence[str] = (), hint: str = "") -> str:
        """A sample's question in the published form.

        Raises:
            ValueError: the form is not known.
        """
        if self.query == UNKNOWN:
            raise ValueError(f"no source says how {self.benchmark} was asked; write the question yourself")
        if self.cut_question_at:
            question = question.split(self.cut_question_at)[0].strip()
        letters = [self.option.format(letter=chr(65 + n), text=text) for n, text in enumerate(options)]
        fields = {"question": question, "options": " ".join(letters), "hint": hint or self.empty_hint}
        return self.query.format(**fields)

    def chat_arguments(self, num_pictures: int = 1) -> dict:
        """Keyword arguments of `chat`. What is not known is left to its defaults, but nothing is sampled."""
        arguments = {"do_sample": False}
        if self.version != "1.0-vl":  # the first generation's `chat` has its own system text and prompt
            arguments |= {"use_meta": self.with_system, "answer_prefix": self.prefix}
        for name in ("num_beams", "max_new_tokens", "repetition_penalty"):
            value = getattr(self, name)
            if value != UNKNOWN:
                arguments[name] = value
        if isinstance(self.hd_num, int):
            arguments["hd_num"] = self.tiles(num_pictures)
        if self.kind == "video" and isinstance(self.num_frames, int):
            arguments["num_frames"] = self.num_frames
        return arguments

    def marks(self, num_pictures: int) -> str:
        """What stands before the question for so many pictures; nothing where `chat` decides."""
        if num_pictures < 2:
            return self.mark * num_pictures
        return " ".join(self.mark_of_several.format(number=number + 1) for number in range(num_pictures))

    def tiles(self, num_pictures: int) -> int:
        """`hd_num` for so many pictures."""
        if num_pictures < 2 or self.hd_num_of_several is None:
            return self.hd_num
        share = self.hd_num_of_several["budget"] // num_pictures
        return max(share, self.hd_num_of_several["at_least"])

    def read_answer(self, answer: str) -> str:
        """What of an answer counts."""
        return READERS[self.read](answer)


@cache
def read_table() -> dict:
    """The table, checked.

    Raises:
        ValueError: something in it is neither known nor marked as unknown.
    """
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    for name, entry in table["benchmarks"].items():
        if entry["prompt"] not in table["prompts"]:
            raise ValueError(f"{TABLE.name}: {name} has the prompt {entry['prompt']!r}, which has no form")
        for version, own in entry["versions"].items():
            if version not in VERSIONS or "score" not in own:
                raise ValueError(f"{TABLE.name}: {name}, {version}: an unknown version, or no score")
            if own["score"] != UNKNOWN and own.get("source") not in table["sources"]:
                raise ValueError(f"{TABLE.name}: {name}, {version}: a score without a source")
    return table


def benchmark_of(task: str, harness: str = "lmms_eval") -> str | None:
    """The benchmark that a harness's task belongs to, and None for any other task."""
    for name, entry in read_table()["benchmarks"].items():
        patterns = entry.get("harness", {}).get(harness, [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if any(fnmatchcase(task, pattern) for pattern in patterns):
            return name
    return None


def settings_of(benchmark: str, version: str, split: str | None = None) -> Settings:
    """The settings of a version for a benchmark.

    Args:
        split: one of the data set's, for which a version may have settings of its own.

    Raises:
        ValueError: the table has no such benchmark, or not for this version.
    """
    table = read_table()
    if benchmark not in table["benchmarks"]:
        raise ValueError(f"unknown benchmark {benchmark!r}; choose one of {', '.join(table['benchmarks'])}")
    entry = table["benchmarks"][benchmark]
    if version not in entry["versions"]:
        raise ValueError(f"{benchmark} has no {version!r}; it has {', '.join(entry['versions'])}")
    own = entry["versions"][version]
    own = {**own, **(own.get(split) or {})} if split else own
    values = {**table["defaults"][version], **own}
    form = own.get("prompt", entry["prompt"])
    prompt = table["prompts"][form]
    beams = values["num_beams"]
    hd_num = values["hd_num"]
    return Settings(
        benchmark=benchmark,
        version=version,
        kind=entry["kind"],
        metric=entry["metric"],
        hd_num=None if hd_num == "none" else hd_num,
        num_beams=beams.get(form, beams["other"]) if isinstance(beams, Mapping) else beams,
        repetition_penalty=values["repetition_penalty"],
        with_system=prompt.get("system", False),
        **{name: prompt[name] for name in ("query", "max_new_tokens", "read")},
        **{name: prompt.get(name, "") for name in ("prefix", "option", "empty_hint", "cut_question_at")},
        **{name: values.get(name) for name in ("num_frames", "id_scale", "hd_num_of_several")},
        **{name: values.get(name, "") for name in ("mark", "mark_of_several")},
        **{name: own[name] for name in ("split", "score", "source") if name in own},
    )


def markdown() -> str:
    """The table of scores and settings, as the docs show it."""
    rows = [
        "| benchmark | version | `hd_num` | beams | new tokens | metric | split | published |",
        "|---" * 8 + "|",
    ]
    for name, entry in read_table()["benchmarks"].items():
        for version in entry["versions"]:
            one = settings_of(name, version)
            cells = [
                name,
                version,
                one.hd_num or "-",
                one.num_beams,
                one.max_new_tokens,
                one.metric,
                one.split,
            ]
            rows.append("| " + " | ".join(str(cell) for cell in (*cells, one.score)) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", nargs="?")
    parser.add_argument("version", nargs="?", default="2.5", choices=VERSIONS)
    arguments = parser.parse_args()
    if arguments.benchmark is None:
        print(markdown())
        return
    print(json.dumps(asdict(settings_of(arguments.benchmark, arguments.version)), indent=2))


if __name__ == "__main__":
    main()
