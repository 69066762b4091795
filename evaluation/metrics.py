"""Metrics of benchmarks that no harness has: pure functions of predictions and accepted answers."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from pycocoevalcap.cider.cider import Cider
from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5  # of the benchmark's definition (arXiv:1905.13648)


def normalise(text: str) -> str:
    """Lower case, without articles, punctuation and extra spaces."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation)))
    return " ".join(text.split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised similarity to the nearest answer, in 0..1; 0 below one half."""
    mine = " ".join(prediction.lower().split())
    scores = [Levenshtein.normalized_similarity(mine, " ".join(answer.lower().split())) for answer in answers]
    best = max(scores)
    return best if best >= ANLS_THRESHOLD else 0.0


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if it is one of the answers, after `normalise`; numbers may be written in different ways."""
    return float(any(_same(prediction, answer) for answer in answers))


def _same(first: str, second: str) -> bool:
    numbers = [_number(text) for text in (first, second)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return normalise(first) == normalise(second)


def _number(text: str) -> float | None:
    try:
        return float(text.strip().rstrip("%").replace(",", "").lstrip("$"))
    except ValueError:
        return None


def field_f1(predictions: Sequence[dict[str, str]], answers: Sequence[dict[str, str]]) -> float:
    """Micro F1 over the fields of documents: one counts if its value is the document's, after `normalise`.

    Args:
        predictions, answers: for each document, its fields with their values; empty values are no fields.
    """
    right = found = wanted = 0
    for mine, other in zip(predictions, answers, strict=True):
        mine, other = (Counter((k, normalise(v)) for k, v in fields.items() if v) for fields in (mine, other))
        right += sum((mine & other).values())
        found += sum(mine.values())
        wanted += sum(other.values())
    return 2 * right / (found + wanted) if found + wanted else 1.0


def cider(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv:1411.5726), times 100 as it is published."""
    keys = [str(number) for number in range(len(predictions))]
    references = {key: [normalise(text) for text in texts] for key, texts in zip(keys, answers, strict=True)}
    candidates = {key: [normalise(text)] for key, text in zip(keys, predictions, strict=True)}
    score, _ = Cider().compute_score(references, candidates)
    return 100 * float(score)


def mean(
    metric: Callable[[str, Sequence[str]], float],
) -> Callable[[Sequence[str], Sequence[Sequence[str]]], float]:
    """A metric of samples as the percentage over all of them."""

    def of_all(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
        scores = [metric(*pair) for pair in zip(predictions, answers, strict=True)]
        return 100 * sum(scores) / len(scores)

    return of_all
