"""Train a reward model on preferences: `python -m finetune.train_reward --help`.

The flags are those of `finetune.train`. In a chat checkpoint the score head is new; it trains with every
`--train`. The loss of a pair is -log sigmoid(chosen - rejected) (arXiv:2501.12368).
"""

import torch
from internlm_xcomposer2 import InternLMXComposer2ForSequenceClassification
from internlm_xcomposer2.reward_internlm_xcomposer2 import pairwise_loss
from torch import Tensor, nn
from transformers import EvalPrediction

from .preferences import PairCollator, PairDataset, read_preferences
from .train import Task, run_command
from .trainer import FinetuneTrainer


class RewardTrainer(FinetuneTrainer):
    """Trains on batches of `PairCollator`, and logs the share of pairs whose chosen answer scores higher."""

    def __init__(self, **kwargs) -> None:
        super().__init__(compute_metrics=pair_metrics, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, not over tokens
        self._accuracies: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The mean loss of a batch, and its (pairs, 2) scores with `return_outputs`."""
        scores = self.scores(model, inputs)
        loss, scores = pairwise_loss(scores), scores.detach().float().view(-1, 2)
        if model.training:
            self._accuracies.append((scores[:, 0] > scores[:, 1]).float().mean())
        return (loss, scores) if return_outputs else loss

    def scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(2 x pairs, 1) scores, alternately of chosen and rejected conversations."""
        return model(**inputs).logits

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, (pairs, 2) scores, and which of each pair is the better one: always the first."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        better = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return loss.detach(), scores, better

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like the base class, with the accuracy of the training batches since the last line."""
        if "loss" in logs and self._accuracies:
            accuracy = self.accelerator.gather(torch.stack(self._accuracies).mean()).mean()
            logs = {**logs, "accuracy": round(accuracy.item(), 4)}
            self._accuracies.clear()
        super().log(logs, start_time)


def pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The share of pairs in which the chosen answer scores higher, and by how much on average."""
    gaps = prediction.predictions[:, 0] - prediction.predictions[:, 1]
    return {"accuracy": float((gaps > 0).mean()), "margin": float(gaps.mean())}


REWARD = Task(
    model=InternLMXComposer2ForSequenceClassification,
    first_model=None,
    trainer=RewardTrainer,
    read_data=read_preferences,
    dataset=PairDataset,
    collator=PairCollator,
    heads=("score",),
    packs=False,
    peft_task="SEQ_CLS",
    pipeline="text-classification",
)


if __name__ == "__main__":
    run_command(REWARD)
