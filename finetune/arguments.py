"""The arguments of the training command, with their defaults, and which combinations make no sense."""

from dataclasses import dataclass, field
from pathlib import Path

from internlm_xcomposer2.configuration_internlm_xcomposer2 import ADAPTERS_OF_MODE
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from .dataset import PROMPTS, TOO_LONG

WAYS = ("full", "plora", "adapter", "lora")
QUANTIZATIONS = ("none", "nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
FINAL = "final"  # in the output directory: the finished model or adapter

# The linears that get LoRA, under their published names.
LORA_TARGETS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


# The same for the first generation.
FIRST_LORA_TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass
class ModelArguments:
    """Which checkpoint, and which of its weights train."""

    model_name_or_path: str = field(metadata={"help": "The checkpoint: a directory, or a name on the hub."})
    train: str = field(
        default="full",
        metadata={
            "help": "'full' (decoder and Partial LoRA), 'plora' (only Partial LoRA, or in version 1.0 the "
            "checkpoint's own low-rank weights), 'adapter' (the task adapters of --infer_mode) or 'lora' "
            "(new low-rank weights on the decoder)."
        },
    )
    use_lora: bool = field(default=False, metadata={"help": "The published way to say --train lora."})
    fix_vit: bool | None = field(
        default=None, metadata={"help": "Freeze the vision tower; the default with every --train."}
    )
    fix_sampler: bool | None = field(
        default=None,
        metadata={
            "help": "Freeze the projector and the newline vectors, or in version 1.0 the projector, the "
            "Q-Former and its queries; by default they train only with --train full. With LoRA, the modules "
            "among them can be trained too and are saved in the adapter."
        },
    )
    infer_mode: str = field(
        default="base", metadata={"help": "The mode to train in: 'base', 'write' or 'web' (task adapters)."}
    )
    quantize: str = field(
        default="none",
        metadata={
            "help": "Quantise the frozen decoder under LoRA: 'nf4' (QLoRA) or 'int8', with bitsandbytes."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights; auto: float32 if they train (computed in bfloat16 with --bf16), or "
            "the type of the computation under LoRA."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa' (the default), 'eager' or 'flash_attention_2'."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Numerator of LoRA's scale, alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's product."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "The decoder's linears that get LoRA, as published or followed by '.linear'; all of them "
            "by default."
        },
    )

    def __post_init__(self) -> None:
        if self.use_lora and self.train == "full":
            self.train = "lora"
        self.fix_vit = True if self.fix_vit is None else self.fix_vit
        self.fix_sampler = self.train != "full" if self.fix_sampler is None else self.fix_sampler


@dataclass
class DataArguments:
    """The conversations, and how their pictures are cut."""

    data_path: list[str] = field(
        metadata={"help": "JSON or JSONL files, or data.txt files that list several with their counts."}
    )
    media_root: str | None = field(
        default=None,
        metadata={"help": "What picture paths are relative to; the data file's folder by default."},
    )
    ignore_keys: list[str] = field(
        default_factory=list, metadata={"help": "Keys of rows to allow and ignore."}
    )
    hd_num: int | None = field(
        default=None, metadata={"help": "The most local tiles of a picture; the checkpoint's by default."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "The most tokens of a row, including those of its pictures; the checkpoint's by default."
        },
    )
    too_long: str = field(
        default="error", metadata={"help": "What happens to longer rows: 'error', or 'cut' at their end."}
    )
    layout: str = field(
        default="inference",
        metadata={"help": "How prompts and pictures are laid out: 'inference', as in chat, or 'training'."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Fill sequences of max_length with several rows, kept exactly separate."},
    )
    check_data: bool = field(
        default=True, metadata={"help": "Check all rows, without decoding pictures, before the start."}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """Those of transformers' `Trainer`, with different defaults and a few of our own."""

    output_dir: str | None = field(default="output/finetune", metadata={"help": "Where everything goes."})
    report_to: list[str] | str | None = field(
        default="tensorboard",
        metadata={"help": "Where curves are logged: 'tensorboard', 'wandb', 'mlflow', ..., or 'none'."},
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The peak; for LoRA about 5e-5 to 2e-4."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of all weights except biases and norms."})
    adam_beta2: float = field(default=0.95, metadata={"help": "As in the published training."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate decays."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes through the data."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per step and device."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "The same for evaluation."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep for resuming."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Leave this on."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trained weight takes part in every step."}
    )
    vit_learning_rate: float | None = field(
        default=None, metadata={"help": "The tower's own peak, if it trains; usually the smaller one."}
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "Held-out rows, in the formats of data_path."}
    )
    dpo_beta: float = field(
        default=0.1, metadata={"help": "Of finetune.train_dpo: how closely the model keeps to what it was."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better loss; keep the best."},
    )

    def __post_init__(self) -> None:
        self.label_names = ["labels"] if self.label_names is None else self.label_names
        if self.eval_data and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            by_steps = str(getattr(self.save_strategy, "value", self.save_strategy)) == "steps"
            self.eval_strategy = "steps" if by_steps else "epoch"
            self.eval_steps = self.eval_steps or self.save_steps
        if self.early_stopping_patience is not None and self.eval_data:
            self.load_best_model_at_end = True
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
            self.greater_is_better = bool(self.greater_is_better)
        super().__post_init__()


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainArguments) -> None:
    """Reject what can't work before anything is loaded.

    Raises:
        ValueError: an unknown value, or two that contradict each other.
        FileNotFoundError: a data file doesn't exist.
        FileExistsError: the output directory holds another run.
        ImportError: TensorBoard is requested but not installed.
    """
    _check_choices(model, data)
    _check_model(model, training)
    _check_training(training)
    for path in (*data.data_path, *training.eval_data):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file; pass a JSON, a JSONL or a data.txt file")
    _check_output(training)


def _check_choices(model: ModelArguments, data: DataArguments) -> None:
    for name, value, known in (
        ("train", model.train, WAYS),
        ("infer_mode", model.infer_mode, tuple(ADAPTERS_OF_MODE)),
        ("quantize", model.quantize, QUANTIZATIONS),
        ("dtype", model.dtype, DTYPES),
        ("layout", data.layout, PROMPTS),
        ("too_long", data.too_long, TOO_LONG),
    ):
        if value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, not {value!r}")
    for name, value in (("max_length", data.max_length), ("hd_num", data.hd_num), ("lora_r", model.lora_r)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be a positive number, not {value}")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must be at least 0 and less than 1, not {model.lora_dropout}")


def _check_model(model: ModelArguments, training: TrainArguments) -> None:
    if model.use_lora and model.train != "lora":
        raise ValueError(f"--use_lora True means --train lora, not --train {model.train}; pass one of them")
    if model.train == "lora" and not model.fix_vit:
        raise ValueError(
            "--fix_vit False with LoRA: the tower's weights aren't part of the saved adapter; use --train "
            "full, or leave the tower frozen"
        )
    if model.quantize != "none" and model.train != "lora":
        raise ValueError(
            f"--quantize {model.quantize} needs --train lora: quantised weights can't be trained with "
            f"--train {model.train}"
        )
    if model.train == "adapter" and model.infer_mode == "base":
        raise ValueError("--train adapter needs --infer_mode write or web, which says which adapters train")
    if model.train != "lora" and model.dtype == "float16":
        raise ValueError(
            "--dtype float16: weights of that type can't be trained, because their gradients vanish; use "
            "float32 with --bf16 or --fp16"
        )
    if training.vit_learning_rate is not None and model.fix_vit:
        raise ValueError("--vit_learning_rate needs --fix_vit False: the tower is frozen")


def _check_training(training: TrainArguments) -> None:
    if "tensorboard" in training.report_to and not is_tensorboard_available():
        raise ImportError(
            "--report_to tensorboard, the default, needs the tensorboard package; install it with "
            "pip install '.[finetune]', or choose another or none"
        )
    if training.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor isn't supported: the model computes its loss itself")
    if not training.dpo_beta > 0:
        raise ValueError(f"--dpo_beta must be above 0, not {training.dpo_beta}")
    if training.early_stopping_patience is not None:
        if not training.eval_data:
            raise ValueError("--early_stopping_patience needs --eval_data to know when to stop")
        if training.early_stopping_patience < 1:
            raise ValueError(
                f"--early_stopping_patience must be at least 1, not {training.early_stopping_patience}"
            )
    if str(training.eval_strategy.value) != "no" and not training.eval_data:
        raise ValueError(f"--eval_strategy {training.eval_strategy.value} needs --eval_data")


def _check_output(training: TrainArguments) -> None:
    output = Path(training.output_dir)
    if (output / FINAL).exists():
        raise FileExistsError(
            f"{output / FINAL} holds a finished model; move it away or choose another --output_dir"
        )
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    if checkpoints and not training.resume_from_checkpoint:
        raise FileExistsError(
            f"{output} holds {checkpoints[-1]} of another run; continue it with --resume_from_checkpoint "
            "True, or choose another --output_dir"
        )
