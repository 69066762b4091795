"""The models of this family in lmms-eval: `lmms-eval --model ixc2 --model_args pretrained=CHECKPOINT`.

lmms-eval finds it by the entry point `lmms_eval.models` and needs an environment of its own, because it asks
for an older `av` than this package. docs/evaluation.md has commands and arguments.
"""

from collections.abc import Sequence

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .asking import Asker, Sample


def manifest() -> ModelManifest:
    """What the entry point registers."""
    return ModelManifest(model_id="ixc2", simple_class_path=f"{__name__}.InternLMXComposer2")


class InternLMXComposer2(lmms):
    """A checkpoint of version 2 or newer, asked with the settings of `benchmarks.yaml`.

    Each process has a whole model and a share of the samples.

    Args:
        pretrained: a folder or a repository.
        settings: `"published"` for those of the table where it has the task, or `"task"` for the task's own.
        benchmark: whose settings to use for all tasks, if their names don't tell.
        hd_num: local tiles of a picture, whatever the table says.
        dtype, attn_implementation, device_map: as in `from_pretrained`.
        device: where the model goes, accelerate's choice by default.
        max_batch_size: not used.

    Raises:
        ValueError: an unknown benchmark, or another word for `settings`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "internlm/internlm-xcomposer2d5-7b",
        *,
        settings: str = "published",
        benchmark: str | None = None,
        hd_num: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device_map: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if settings not in ("published", "task"):
            raise ValueError(f"settings must be published or task, not {settings!r}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else device
        self.batch_size = int(batch_size)
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
        options = {name: value for name, value in options.items() if value is not None}
        model = AutoModelForCausalLM.from_pretrained(pretrained, **options).eval()
        model = model if device_map else model.to(self.device)
        self.asker = Asker(
            model,
            AutoTokenizer.from_pretrained(pretrained),
            benchmark=benchmark,
            published=settings == "published",
            hd_num=hd_num,
            batch_size=self.batch_size,
        )

    def generate_until(self, requests: Sequence) -> list[str]:
        """The answer to each request."""
        samples = []
        for text, arguments, doc_to_visual, number, task, split in _arguments(requests):
            samples.append(self._sample(text, arguments, doc_to_visual, number, task, split))
        answers = []
        with tqdm(total=len(samples), disable=self.rank != 0) as progress:
            for start in range(0, len(samples), self.batch_size):
                batch = samples[start : start + self.batch_size]
                answers += self.asker.answers(batch)
                progress.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence) -> list[GenerationResult]:
        """For each request, the mean loss of its answer's tokens, and whether they are the greedy ones.

        lmms-eval 0.7.3 takes the smallest number for the best answer, as losses of its own models, and makes
        a text of a pair that isn't wrapped.
        """
        pairs = []
        for text, answer, doc_to_visual, number, task, split in _arguments(requests):
            sample = self._sample(text, {}, doc_to_visual, number, task, split)
            pairs.append((sample, answer(sample.document) if callable(answer) else answer))
        found = self.asker.likelihoods(pairs)
        return [GenerationResult((-one.total / one.num_tokens, one.is_greedy)) for one in found]

    def generate_until_multi_round(self, requests: Sequence) -> list[list[str]]:
        """For each request, the answers of its rounds, in which the task looks at the answers so far."""
        return [self._rounds(*arguments) for arguments in _arguments(requests)]

    def _rounds(self, text, arguments, doc_to_visual, doc_to_text, number, task, split) -> list[str]:
        sample = self._sample(text, arguments, doc_to_visual, number, task, split)
        answers, known, is_over, turn = [], None, False, 0
        while not is_over:
            answers, turn = [*answers, *self.asker.answers([sample])], turn + 1
            media, text, is_over, answers, known = doc_to_text(
                sample.document, previous_output=answers, round_idx=turn, previous_round_info=known
            )
            sample = Sample(text or "", media or (), sample.document, task, arguments)
        return list(answers)

    def _sample(
        self, text: str, arguments: dict, doc_to_visual, number: int, task: str, split: str
    ) -> Sample:
        document = self.task_dict[task][split][number]
        return Sample(text, doc_to_visual(document) or (), document, task, arguments)


def _arguments(requests: Sequence) -> list[tuple]:
    return [request.args for request in requests]
