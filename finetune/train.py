"""Fine-tune a checkpoint on conversations: `python -m finetune.train --help`."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from internlm_xcomposer2 import (
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2Processor,
    InternLMXComposerForCausalLM,
)
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import checkpoint_config
from internlm_xcomposer2.configuration_internlm_xcomposer2 import FIRST_GENERATION
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils import logging

from .arguments import FINAL, WAYS, DataArguments, ModelArguments, TrainArguments, check_arguments
from .card import Facts, card_text
from .dataset import Collator, ConversationDataset, RowEncoder
from .freezing import freeze, hold_trained_in_float32
from .lora import add_lora, import_peft, quantization, target_modules
from .packing import PackedDataset
from .rows import read_data
from .saving import move_unfinished, save_trained
from .trainer import FinetuneTrainer

Arguments = tuple[ModelArguments, DataArguments, TrainArguments]


@dataclass(frozen=True)
class Task:
    """What is trained: a chat model by default.

    Attributes:
        model, first_model: what a checkpoint is loaded as, and one of the first generation, if it can be.
        read_data, dataset: like the function and class of the defaults.
        heads: modules that always train.
        ways: which values of `--train` it has.
        adapters: the task adapters that train in a mode, unless all of the mode do.
        packs: whether its rows can be packed.
        peft_task, pipeline: what peft and the hub call it.
    """

    model: type[PreTrainedModel] = InternLMXComposer2ForCausalLM
    first_model: type[PreTrainedModel] | None = InternLMXComposerForCausalLM
    trainer: type[FinetuneTrainer] = FinetuneTrainer
    read_data: Callable[..., list] = read_data
    dataset: type[ConversationDataset] = ConversationDataset
    collator: type[Collator] = Collator
    heads: tuple[str, ...] = ()
    ways: tuple[str, ...] = WAYS
    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packs: bool = True
    peft_task: str = "CAUSAL_LM"
    pipeline: str = "image-text-to-text"


CHAT = Task()

# Settings that the card lists in addition to those that say what trains.
_SETTINGS = (
    "learning_rate",
    "vit_learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
)


def parse_arguments(arguments: Sequence[str] | None = None) -> Arguments:
    """Flags, or the path of a YAML or JSON file that holds them."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(arguments[0])
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0])
    return parser.parse_args_into_dataclasses(arguments)


def train(
    model_arguments: ModelArguments, data: DataArguments, training: TrainArguments, task: Task = CHAT
) -> FinetuneTrainer:
    """Train, and write the finished model or adapter to `final` in the output directory.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: arguments, data or checkpoint are unusable.
        ImportError: LoRA without peft.
        RuntimeError: out of memory; says what needs less.
    """
    if training.should_save and (moved := move_unfinished(Path(training.output_dir) / FINAL)):
        print(f"a model that isn't complete was in the way: moved to {moved}")
    check_arguments(model_arguments, data, training)
    check_task(task, model_arguments, data)
    checkpoint = checkpoint_to_resume(training)
    source = model_arguments.model_name_or_path
    config = checkpoint_config(source)
    model_class(task, config.version)
    if model_arguments.train == "lora":
        import_peft()
        targets = target_modules(model_arguments.lora_target_modules, config.version)
        model_arguments = replace(model_arguments, lora_target_modules=targets)
    processor = InternLMXComposer2Processor.from_pretrained(source)
    datasets = read_datasets(processor, config, data, training, task)
    set_seed(training.seed)
    model = load_model(model_arguments, training, task)
    trainer = build_trainer(model, processor, datasets, model_arguments, training, task)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    facts = Facts(
        base=source,
        is_adapter=model_arguments.train == "lora",
        data=_count(datasets["train"]),
        eval_data=_count(datasets.get("eval")),
        num_trained=trainer.num_trained,
        num_weights=trainer.num_weights,
        settings=_settings(model_arguments, data, _rows_of(datasets["train"]).encoder, training),
        history=trainer.state.log_history,
        seconds=time.monotonic() - started,
        pipeline=task.pipeline,
    )
    save_trained(trainer, processor.tokenizer, card_text(facts), Path(training.output_dir) / FINAL)
    return trainer


def check_task(task: Task, model: ModelArguments, data: DataArguments) -> None:
    """Raise `ValueError` for arguments that this task doesn't have."""
    if data.packing and not task.packs:
        raise ValueError("--packing True: each pair has a score of its own, so its rows can't be packed")
    if model.train not in task.ways:
        raise ValueError(f"--train {model.train}: this command has --train {' and '.join(task.ways)}")
    if model.train == "adapter" and task.adapters and model.infer_mode not in task.adapters:
        raise ValueError(
            f"--infer_mode {model.infer_mode}: here adapters train in {', '.join(task.adapters)}; use "
            "--train lora"
        )


def checkpoint_to_resume(training: TrainArguments) -> str | None:
    """The checkpoint of `--resume_from_checkpoint`: a directory, or the last complete one for `True`.

    Raises:
        FileNotFoundError: there is none.
    """
    asked = training.resume_from_checkpoint
    if not asked or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"{asked} holds no checkpoint to resume from: trainer_state.json is missing"
            )
        return str(asked)
    # The state is written last, so a save that was interrupted has none.
    found = [path.parent for path in Path(training.output_dir).glob("checkpoint-*/trainer_state.json")]
    if not found:
        raise FileNotFoundError(
            f"{training.output_dir} holds no checkpoint to resume from; leave --resume_from_checkpoint out"
        )
    return str(max(found, key=lambda path: int(path.name.split("-")[1])))


# ---- data ----


def read_datasets(
    processor, config, data: DataArguments, training: TrainArguments, task: Task
) -> dict[str, Dataset]:
    """The datasets `train` and, with `--eval_data`, `eval`.

    Raises:
        FileNotFoundError: a file doesn't exist.
        ValueError: a file or a row is bad; says which and why.
    """
    max_length = config.max_length if data.max_length is None else data.max_length
    datasets = {}
    for name, paths in (("train", data.data_path), ("eval", training.eval_data)):
        if not paths:
            continue
        rows = task.read_data(paths, data.media_root, data.ignore_keys, training.seed)
        datasets[name] = task.dataset(rows, processor, max_length, data.layout, data.hd_num, data.too_long)
        if data.check_data:
            _ = datasets[name].lengths  # raises at the first bad row
    if data.packing:
        datasets["train"] = PackedDataset(datasets["train"], config)
    return datasets


def _rows_of(dataset: Dataset) -> ConversationDataset:
    return dataset.dataset if isinstance(dataset, PackedDataset) else dataset


def _count(dataset: Dataset | None) -> dict[str, int]:
    """How many rows come from each file."""
    return dict(Counter(str(row.source) for row in _rows_of(dataset).rows)) if dataset is not None else {}


# ---- model ----


def model_class(task: Task, version: str) -> type[PreTrainedModel]:
    """What a checkpoint of a version is loaded as.

    Raises:
        ValueError: the task can't train this version.
    """
    chosen = task.first_model if version == FIRST_GENERATION else task.model
    if chosen is None:
        raise ValueError(f"version {version} has no {task.pipeline} model to train; use version 2 or later")
    return chosen


def load_model(arguments: ModelArguments, training: TrainArguments, task: Task = CHAT) -> PreTrainedModel:
    """The checkpoint with exactly the weights trainable that should train, LoRA's new ones included.

    Raises:
        ValueError: the checkpoint can't be loaded, or lacks what should train.
    """
    dtype = weights_dtype(arguments, training)
    quantized = quantization(arguments, dtype)
    is_lora = arguments.train == "lora"
    modes = () if arguments.infer_mode == "base" else (arguments.infer_mode,)
    version = checkpoint_config(arguments.model_name_or_path).version
    # Low-rank weights of the first generation are part of the plain ones, unless they alone train.
    kept = {"fold_low_rank": arguments.train != "plora"} if version == FIRST_GENERATION else {}
    model = model_class(task, version).from_pretrained(
        arguments.model_name_or_path,
        dtype=dtype,
        # A whole chat model is saved with all its task adapters; other models have no modes to use them in.
        adapters=modes if is_lora or task.heads else None,
        quantization_config=quantized,
        dequantize=True,  # of a GPTQ or AWQ checkpoint
        device_map={"": training.device} if quantized else None,
        **({"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}),
        **kept,
    )
    freeze(model, arguments, task.adapters.get(arguments.infer_mode))
    for head in task.heads:
        model.get_submodule(head).requires_grad_(True)
    if is_lora:
        model = add_lora(model, arguments, task.peft_task, task.heads)
    if training.mixed_precision != "no":
        hold_trained_in_float32(model)
    return model


def weights_dtype(arguments: ModelArguments, training: TrainArguments) -> torch.dtype:
    """The type that weights are held in."""
    if arguments.dtype != "auto":
        return getattr(torch, arguments.dtype)
    if arguments.train != "lora":
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.mixed_precision, torch.float32)


def build_trainer(
    model: PreTrainedModel,
    processor,
    datasets: dict,
    arguments: ModelArguments,
    training: TrainArguments,
    task: Task = CHAT,
) -> FinetuneTrainer:
    """A trainer for the datasets `train` and `eval`; prints how many weights train."""
    callbacks = []
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    trainer = task.trainer(
        infer_mode=arguments.infer_mode,
        model=model,
        args=training,
        data_collator=task.collator(processor.tokenizer.pad_token_id),
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        share = 100 * trainer.num_trained / trainer.num_weights
        print(f"training {trainer.num_trained:,} of {trainer.num_weights:,} weights ({share:.2f} %)")
    return trainer


def _settings(
    arguments: ModelArguments, data: DataArguments, encoder: RowEncoder, training: TrainArguments
) -> dict[str, object]:
    """What the card lists."""
    names = ["train", "fix_vit", "fix_sampler", "infer_mode", "dtype"]
    if arguments.train == "lora":
        names += ["quantize", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"]
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {name: getattr(encoder, name) for name in ("hd_num", "max_length", "too_long", "layout")}
    settings["packing"] = data.packing
    values = {name: getattr(training, name) for name in _SETTINGS}
    settings |= {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: value for name, value in settings.items() if value is not None}


def run_command(task: Task = CHAT) -> None:
    """Train according to the flags of the command line."""
    logging.set_verbosity_warning()
    try:
        trainer = train(*parse_arguments(), task)
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        sys.exit(f"error: {error}")
    if trainer.is_world_process_zero():
        print(f"written to {Path(trainer.args.output_dir) / FINAL}")


if __name__ == "__main__":
    run_command()
