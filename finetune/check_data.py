"""Check training data before training: `python -m finetune.check_data --model DIR DATA...`.

Prints what is wrong with every bad row, in the same words with which training would stop at it, and how many
tokens the rows of each file have. Exits with 1 if any row is bad.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median

from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import checkpoint_config
from internlm_xcomposer2.processing_internlm_xcomposer2 import InternLMXComposer2Processor
from tqdm import tqdm

from .dataset import PROMPTS, TOO_LONG, RowEncoder
from .preferences import PairEncoder, read_both
from .rows import MIXTURE, Row, RowFault, read_rows, read_sources

MAX_WORKERS = 8


@dataclass
class Finding:
    """Something to say about a row, or about the whole file if `row` is None."""

    text: str
    row: int | None = None
    line: int | None = None
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


@dataclass
class FileReport:
    """What was found in one file.

    Attributes:
        samples: how many rows a mixture draws from it, None if it takes them as they are.
        tokens: of each good row.
    """

    file: str
    samples: int | None = None
    rows: int = 0
    tokens: list[int] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def token_counts(self) -> dict[str, float]:
        """Fewest, median and most tokens of a good row, and the total."""
        if not self.tokens:
            return {}
        low, high = min(self.tokens), max(self.tokens)
        return {"min": low, "median": median(self.tokens), "max": high, "total": sum(self.tokens)}

    def to_dict(self) -> dict:
        """The report in the form of the JSON output."""
        return {**asdict(self), "tokens": self.token_counts()}

    def __str__(self) -> str:
        drawn = "" if self.samples is None else f", {self.samples} drawn"
        counts = ", ".join(f"{name} {count:.15g}" for name, count in self.token_counts().items())
        tokens = f"tokens {counts}; " if counts else ""
        bad = f"{len(self.faults)} bad" if self.faults else "all good"
        return f"{self.file}: {self.rows} rows{drawn}; {tokens}{bad}"


def check_row(row: Row, encoder: RowEncoder, *, decode: bool = True) -> tuple[int, Finding | None, bool]:
    """Tokens of a row, what there is to say about it, and whether that is a fault, not a warning."""
    place = {"row": row.index, "line": row.line, "place": row.place}
    try:
        plan = encoder.plan(row, decode=decode)
    except RowFault as error:
        return 0, Finding("; ".join(error.faults), **place), True
    if not plan.num_cut:
        return len(plan.ids), None, False
    text = f"{plan.num_cut} tokens of the answers are beyond max_length {encoder.max_length} and are cut off"
    return len(plan.ids), Finding(text, **place), False


def check_file(
    path: Path,
    encoder: RowEncoder,
    *,
    samples: int | None = None,
    decode: bool = True,
    media_root: str | None = None,
    ignore_keys: Sequence[str] = (),
    workers: int = 1,
) -> FileReport:
    """Check every row of one file, or both conversations of each pair if `encoder` is one of pairs.

    Args:
        decode: whether pictures and videos are fully decoded; else only their headers are read.
    """
    report = FileReport(str(path), samples)
    read = read_both if isinstance(encoder, PairEncoder) else read_rows
    try:
        rows = read(path, media_root, ignore_keys)
    except (OSError, ValueError) as error:
        report.faults.append(Finding(str(error)))
        return report
    report.rows = len(rows)
    found = _map_in_threads(lambda row: check_row(row, encoder, decode=decode), rows, workers)
    for num_tokens, finding, is_fault in tqdm(found, path.name, len(rows), leave=False, disable=None):
        if not is_fault:
            report.tokens.append(num_tokens)
        if finding is not None:
            (report.faults if is_fault else report.warnings).append(finding)
    return report


def check_data(paths: Sequence[Path], encoder: RowEncoder, **options) -> list[FileReport]:
    """Check files, and all files that mixtures (`.txt`) list, as `check_file` does."""
    reports = []
    for path in paths:
        if path.suffix.lower() != MIXTURE:
            reports.append(check_file(path, encoder, **options))
            continue
        try:
            sources = read_sources(path)
        except (OSError, ValueError) as error:
            reports.append(FileReport(str(path), faults=[Finding(str(error))]))
            continue
        reports += [check_file(source, encoder, samples=samples, **options) for source, samples in sources]
    return reports


def _map_in_threads(function, rows: Sequence[Row], workers: int) -> Iterator:
    """The results in order; Pillow releases the GIL while it decodes."""
    if workers == 1:
        yield from map(function, rows)
        return
    with ThreadPool(workers) as pool:
        yield from pool.imap(function, rows, chunksize=8)


def print_report(reports: Iterable[FileReport]) -> None:
    """Every fault and warning, then a line for each file."""
    for report in reports:
        for finding in report.faults:
            print(f"FAULT {finding}")
        for finding in report.warnings:
            print(f"WARNING {finding}")
    for report in reports:
        print(report)
    num_bad = sum(len(report.faults) for report in reports)
    print(f"{num_bad} faults in {sum(report.rows for report in reports)} rows of {len(reports)} files")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m finetune.check_data", description=__doc__)
    add = parser.add_argument
    add("data", nargs="+", type=Path, help="JSON lists, JSON lines (.jsonl), or mixtures of them (.txt)")
    add("--model", required=True, help="the checkpoint to be trained")
    add("--media-root", help="what relative picture paths are relative to, instead of each file's folder")
    add("--ignore-key", action="append", default=[], help="a key of rows to allow and ignore")
    add("--max-length", type=int, help="tokens that a row may have; by default as many as in training")
    add("--layout", choices=PROMPTS, default="inference", help="as in training")
    add("--hd-num", type=int, help="local tiles of a picture; by default as in chat")
    add("--too-long", choices=TOO_LONG, default="error", help="whether longer rows are faults or are cut")
    add("--pairs", action="store_true", help="the rows are pairs of conversations, for a reward model")
    add("--headers-only", action="store_true", help="don't decode pictures; misses damage after the headers")
    add("--workers", type=int, default=min(MAX_WORKERS, os.cpu_count() or 1), help="threads")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command -> 0 if all rows are good, else 1."""
    args = parse_arguments(arguments)
    processor = InternLMXComposer2Processor.from_pretrained(args.model)
    max_length = args.max_length or checkpoint_config(args.model).max_length
    if args.pairs and args.too_long == "cut":
        raise SystemExit("--too-long cut: a pair is scored at its ends, which can't be cut off; leave it out")
    kind = PairEncoder if args.pairs else partial(RowEncoder, too_long=args.too_long)
    encoder = kind(processor, max_length, args.layout, args.hd_num)
    reports = check_data(
        args.data,
        encoder,
        decode=not args.headers_only,
        media_root=args.media_root,
        ignore_keys=args.ignore_key,
        workers=max(1, args.workers),
    )
    if args.json:
        fields = {"model": args.model, "max_length": max_length, "layout": args.layout}
        print(json.dumps({**fields, "files": [r.to_dict() for r in reports]}, ensure_ascii=False, indent=2))
    else:
        print_report(reports)
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
