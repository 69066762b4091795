"""The library's own ways to the model: auto classes and the pipeline, as remote code and as a package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from internlm_xcomposer2.configuration_internlm_xcomposer2 import CONFIG_AUTO_MAP
from test_docs import offline_environment
from transformers import pipeline

# A plain clone is not on this process's path, so its files are read as remote code.
REMOTE = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

clone, saved, picture = sys.argv[1:]
trust = {"trust_remote_code": True}
pipe = pipeline("image-text-to-text", model=clone, **trust)
ask = [{"role": "user", "content": [
    {"type": "image", "image": picture}, {"type": "text", "text": "What shape is the object?"}]}]
options = {"max_new_tokens": 8, "return_full_text": False}
found = {"pipeline": pipe(text=ask, **options)[0]["generated_text"]}
pipe.model.save_pretrained(saved)
pipe.processor.save_pretrained(saved)
processor = AutoProcessor.from_pretrained(saved, **trust)
images = AutoImageProcessor.from_pretrained(saved, **trust)
found["same"] = images.to_dict() == processor.image_processor.to_dict()
found["modules"] = [type(each).__module__ for each in (pipe.processor, processor, images)]
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(saved, **trust)
    again = pipeline("image-text-to-text", model=model, processor=processor)
    found[auto_class.__name__] = again(text=ask, **options)[0]["generated_text"]
found["package"] = "internlm_xcomposer2" in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_remote_code_answers_and_is_saved(tmp_path):
    """Through a clone that is not installed, and again from what it saves."""
    arguments = [str(ROOT), str(tmp_path / "saved"), str(ROOT / "examples/star.png")]
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, *arguments],
        capture_output=True,
        text=True,
        env=offline_environment(tmp_path / "home"),
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["pipeline"] == "star"
    assert found["AutoModelForImageTextToText"] == found["AutoModelForMultimodalLM"] == "star"
    assert found["same"] and not found["package"]
    assert all(name.startswith("transformers_modules") for name in found["modules"])
    assert json.loads((tmp_path / "saved/config.json").read_text())["auto_map"] == CONFIG_AUTO_MAP


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True)


def ask(name: str, question: str) -> list[dict]:
    content = [{"type": "image", "image": str(ROOT / "examples" / name)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


OPTIONS = {"max_new_tokens": 8, "return_full_text": False}
QUESTIONS = [
    ask("star.png", "What shape is the object?"),
    ask("number.png", "What number is printed in the picture?"),
    ask("circles.png", "How many circles are there?"),
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_several_conversations(pipe, batch_size):
    answers = pipe(text=QUESTIONS, batch_size=batch_size, **OPTIONS)
    assert [answer[0]["generated_text"] for answer in answers] == ["star", "6143", "4"]


def test_the_whole_conversation_comes_back_with_its_answer(pipe):
    (record,) = pipe(text=QUESTIONS[0], max_new_tokens=8)
    assert record["generated_text"] == [*QUESTIONS[0], {"role": "assistant", "content": "star"}]
    started = [*QUESTIONS[1], {"role": "assistant", "content": [{"type": "text", "text": "61"}]}]
    (record,) = pipe(text=started, max_new_tokens=8)
    assert record["generated_text"][-1]["content"] == [{"type": "text", "text": "6143"}]


def test_a_text_beside_its_pictures(pipe):
    text = pipe.processor.apply_chat_template(QUESTIONS[0], add_generation_prompt=True)
    (record,) = pipe(images=str(ROOT / "examples/star.png"), text=text, **OPTIONS)
    assert record["generated_text"] == "star"
    (record,) = pipe(images=str(ROOT / "examples/star.png"), text=text, max_new_tokens=8)
    assert record["generated_text"] == f"{text}star"


def test_a_wrong_message_is_rejected(pipe):
    with pytest.raises(ValueError, match="unknown content type 'audio'"):
        pipe(text=[{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}])


def test_the_tokenizer_in_the_root_pads_where_generation_needs_it():
    """The pipeline pads on the tokenizer's side, whatever the processor does."""
    fields = json.loads(Path(ROOT / "tokenizer_config.json").read_text())
    assert fields["padding_side"] == "left"
