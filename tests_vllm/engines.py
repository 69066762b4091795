"""Questions, the answers of `chat` to them, and engines that must give the same ids."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Before vLLM is imported: one small engine in this process, on whatever cores are free.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from helpers import TINY_TOWER, flat_config, published_weights, tiny_model, write_published
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from internlm_xcomposer2.prompt_internlm_xcomposer2 import META_INSTRUCTION, format_prompt, system_text
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import IMAGE_MARK
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MAX_TOKENS = 32
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": MAX_TOKENS, "reuse": False}


@dataclass(frozen=True)
class Question:
    """What somebody asks; `IMAGE_MARK` in the texts says where pictures are."""

    text: str
    images: tuple[str, ...] = ()
    hd_num: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    infer_mode: str = "base"

    @property
    def texts(self) -> list[str]:
        """All that is said, turn by turn."""
        return [text for turn in self.history for text in turn] + [self.text]


@dataclass(frozen=True)
class Answer:
    """Ids of a prompt and of the answer to it."""

    prompt: list[int]
    ids: list[int]


PAIR = f"Which picture shows the ring? Picture 1: {IMAGE_MARK}; picture 2: {IMAGE_MARK}"
TURNS = (("What shape is the object?", "star"), ("What colour is it?", "orange"))

# Of one picture each, asked both with it at the front and with a mark.
ABOUT_ONE = [
    ("number.png", "What number is printed in the picture?", None),
    ("word.jpg", "What word is printed in the picture?", None),
    ("receipt.png", "What is the total?", None),
    ("small.png", "What word is printed in the picture?", 9),
    ("star.png", "What shape is the object?", None),
    ("star.png", "What colour is the object?", None),
    ("ring.jpg", "What colour is the object?", None),
    ("ring.jpg", "What shape is the object?", None),
    ("circles.png", "How many circles are there?", None),
    ("circles.png", "What colour are the circles?", None),
    ("objects.png", "How many objects are there?", None),
    ("objects.png", "Describe the picture.", None),
    ("star.png", "Where is the object?", None),
    ("ring.jpg", "Describe the picture.", 4),
    ("number.png", "Read the number.", 9),
    ("receipt.png", "What is the total?", 6),
    ("word.jpg", "Read the word.", 4),
    ("circles.png", "How many circles are there?", 9),
    ("objects.png", "How many objects are there?", 4),
    ("small.png", "What word is printed in the picture?", 1),
    ("star.png", "What shape is the object?", 12),
]

TEXT_ONLY = [Question("Hello"), Question("Who are you?"), Question("What can you do? 你好")]

NANO_QUESTIONS = [
    *(Question(text, (name,), budget) for name, text, budget in ABOUT_ONE),
    *(Question(f"{IMAGE_MARK}{text}", (name,), budget) for name, text, budget in ABOUT_ONE),
    Question(PAIR, ("star.png", "ring.jpg")),
    Question(PAIR.replace("shows the ring", "has the most objects"), ("circles.png", "objects.png")),
    Question(PAIR, ("ring.jpg", "star.png"), 4),
    Question(f"{IMAGE_MARK} and {IMAGE_MARK}: which picture shows the star?", ("ring.jpg", "star.png")),
    *TEXT_ONLY,
    Question("What colour is it?", ("star.png",), 9, TURNS[:1]),
    Question("Where is it?", ("star.png",), 9, TURNS),
    Question(
        f"And this one? {IMAGE_MARK}",
        ("star.png", "ring.jpg"),
        history=((f"{IMAGE_MARK}{TURNS[0][0]}", "star"),),
    ),
]

# Version of each published layout, and the side of its square or tile, scaled down.
LAYOUTS = {"2": ("2", 28), "vl": ("2", 70), "4khd": ("2-4khd", 56), "2d5": ("2.5", 56)}

# What every layout is asked; all but 2.5 need a mark for each picture.
LAYOUT_QUESTIONS = [
    Question(f"{IMAGE_MARK}What shape is the object?", ("star.png",)),
    Question(f"Read {IMAGE_MARK} the number.", ("number.png",), 2),
    Question(f"{IMAGE_MARK}How many?", ("circles.png",), 6),
    Question(PAIR, ("star.png", "ring.jpg")),
    Question("Hello"),
    Question("What can you do? 你好", history=(("Hello", "Hi."),)),
    Question(
        f"And {IMAGE_MARK} this?",
        ("star.png", "word.jpg"),
        history=((f"{IMAGE_MARK}What is it?", "a star"), ("Sure?", "yes")),
    ),
]


# ---- checkpoints ----

# vLLM's attention on CPUs has heads of 32 at least.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 2048}


def write_layout(layout: str, folder: Path, changes: Callable[[dict], dict] = dict) -> Path:
    """A random checkpoint with a `config.json` as flat as published -> its directory.

    Args:
        changes: its weights by published name -> those that are written.
    """
    version, side = LAYOUTS[layout]
    adapters = {"sft": 4, "dpo": 4, "web": 8} if version == "2.5" else {}
    ranks = {"plora_wqkv_rank": 2, "plora_wqkv_alpha": 4} if version == "2-4khd" else {}
    tower = {**TINY_TOWER, "hidden_size": 64, "image_size": side}
    model = tiny_model(version, vision_config=tower, task_adapters=adapters, **WIDE, **ranks)
    write_published(folder, changes(published_weights(model)), flat_config(model))
    shutil.copy(ROOT / "tokenizer.model", folder)
    return folder


# ---- chat ----


def answers_of_chat(path: Path, questions: Sequence[Question], **settings) -> list[Answer]:
    """What `chat` makes of each question, one at a time, in float32."""
    model = InternLMXComposer2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = InternLMXComposer2Tokenizer.from_pretrained(path)
    answers, answer = [], model._answer

    def record(prompts: Sequence, *args, **kwargs):
        sequences, cache = answer(prompts, *args, **kwargs)
        answers.append(Answer(list(prompts[0].ids), [int(token) for token in sequences[0]]))
        return sequences, cache

    model._answer = record
    for question in questions:
        images = [EXAMPLES / name for name in question.images]
        options = {**GREEDY, "infer_mode": question.infer_mode, "history": question.history, **settings}
        model.chat(tokenizer, question.text, images, question.hd_num, **options)
    return answers


# ---- engines ----


@contextmanager
def engine(path: Path, **settings) -> Iterator[LLM]:
    """A small engine in float32, which is closed afterwards."""
    defaults = {
        "config_format": "ixc2",
        "dtype": "float32",
        "max_model_len": 2048,
        "block_size": 32,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 3, "video": 1},
        "mm_processor_cache_gb": 0.2,
        "seed": 0,
    }
    llm = LLM(str(path), **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling(**settings) -> SamplingParams:
    """Greedy, as `GREEDY` is."""
    return SamplingParams(temperature=0, max_tokens=MAX_TOKENS, **settings)


def prompt_of(question: Question, version: str = "2.5") -> dict:
    """A question as a whole prompt with its pictures, as `LLM.generate` takes it."""
    meta = system_text(version, None, META_INSTRUCTION)
    prompt = {"prompt": format_prompt(question.text, question.history, meta)}
    if question.images:
        prompt["multi_modal_data"] = {"image": [Image.open(EXAMPLES / name) for name in question.images]}
    if question.hd_num:
        prompt["mm_processor_kwargs"] = {"hd_num": question.hd_num}
    return prompt


def messages_of(question: Question) -> list[dict]:
    """A question as messages with pictures at its marks, as `LLM.chat` takes it."""
    images = iter(question.images)
    messages = []
    for place, text in enumerate(question.texts):
        pieces = text.split(IMAGE_MARK)
        content = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            picture = Image.open(EXAMPLES / next(images))
            content += [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": piece}]
        role = "user" if place % 2 == 0 else "assistant"
        messages.append({"role": role, "content": [part for part in content if part.get("text") != ""]})
    return messages


def answers_of(outputs: Sequence) -> list[Answer]:
    """What an engine made of prompts."""
    return [Answer(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


def num_cached(outputs: Sequence) -> int:
    """How many tokens of the prompts were computed before."""
    return sum(output.num_cached_tokens or 0 for output in outputs)


def differing(
    questions: Sequence, found: Sequence[Answer], expected: Sequence[Answer]
) -> Mapping[str, tuple]:
    """Questions whose prompt or answer is another one, with both."""
    triples = zip(questions, found, expected, strict=True)
    return {str(question): (ours, theirs) for question, ours, theirs in triples if ours != theirs}
