"""`ixc2 serve` on nano as GGUF, over HTTP on loopback with OpenAI's client."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers import ROOT
from openai import APIStatusError, BadRequestError, OpenAI, UnprocessableEntityError
from test_docs import offline_environment
from test_serve import EXAMPLES, ask, complete, picture
from transformers import AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from internlm_xcomposer2 import InternLMXComposer2ForCausalLM  # noqa: E402
from internlm_xcomposer2.benchmarks.loopback import data_uri, free_port, running  # noqa: E402
from internlm_xcomposer2.ixc2.gguf import export  # noqa: E402
from internlm_xcomposer2.ixc2.main import main  # noqa: E402

pytestmark = pytest.mark.slow

N_CTX = 1024
COMMAND = (
    sys.executable,
    "-c",
    "import sys; from internlm_xcomposer2.ixc2.main import main; sys.exit(main(sys.argv[1:]))",
)
SHAPE = "What shape is the object?"


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[OpenAI]:
    """A client of a server of nano in float32."""
    folder = tmp_path_factory.mktemp("serve")
    export(ROOT, folder / "nano", "f32")
    port = free_port()
    command = [*COMMAND, "serve", str(folder / "nano"), "--port", str(port), "--n-ctx", str(N_CTX)]
    environment = offline_environment(folder / "home")
    with running([*command, "--threads", "1"], port, env=environment, cwd=folder) as opened:
        yield opened


def streamed(client: OpenAI, *messages: dict, **options) -> tuple[str, str, object]:
    """The text, why it ended, and the usage of a streamed answer."""
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(complete(client, *messages, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, chunks[-1].usage


def refusal(kind: type[APIStatusError], client: OpenAI, *messages: dict, **options) -> str:
    """What the server says is wrong with a request."""
    with pytest.raises(kind) as raised:
        complete(client, *messages, **options)
    return str(raised.value.body["detail"])


def test_an_answer_about_a_picture_whole_and_streamed(client):
    message = ask(picture("star.png"), SHAPE)
    completion = complete(client, message)
    (choice,) = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("star", "stop")
    assert completion.model == "nano" and completion.usage.prompt_tokens > 41
    assert streamed(client, message) == ("star", "stop", completion.usage)
    assert [model.id for model in client.models.list()] == ["nano"]


def test_an_answer_that_is_cut_says_so(client):
    message = ask(picture("number.png"), "What number is printed in the picture?")
    whole = complete(client, message)
    assert whole.choices[0].message.content == "6143" and whole.usage.completion_tokens > 2
    for limit in ({"max_tokens": 2}, {"max_tokens": None, "max_completion_tokens": 2}):
        cut = complete(client, message, **limit)
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2
        assert "6143".startswith(cut.choices[0].message.content)


def test_several_turns_with_pictures_are_answered_as_by_chat(client):
    query = "Picture {}: ", f"; {SHAPE}"
    texts = [tuple(part.format(number) for part in query) for number in (1, 2)]
    names = ["star.png", "ring.jpg"]
    turns = [ask(text[0], picture(name), text[1]) for text, name in zip(texts, names, strict=True)]
    system = {"role": "system", "content": "Be brief."}
    messages = [system, turns[0], {"role": "assistant", "content": "star"}, turns[1]]
    model = InternLMXComposer2ForCausalLM.from_pretrained(ROOT).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    first, second = ("<ImageHere>".join(text) for text in texts)
    images = [ROOT / "examples" / name for name in names]
    options = {"use_meta": True, "meta_instruction": "Be brief.", "repetition_penalty": 1.0}
    options |= {"history": [(first, "star")], "do_sample": False, "max_new_tokens": 8}
    expected, _ = model.chat(tokenizer, second, images, **options)
    assert complete(client, *messages).choices[0].message.content == expected
    assert streamed(client, *messages)[0] == expected


def test_a_video_and_settings_of_our_own(client):
    video = {"type": "video_url", "video_url": {"url": data_uri(EXAMPLES / "circle.mp4")}}
    assert complete(client, ask(video, "What happens?"), max_tokens=3).usage.prompt_tokens > 80
    small = [picture("small.png"), "What word is printed in the picture?"]
    lengths = [
        complete(client, ask(*small), extra_body={"hd_num": number}).usage.prompt_tokens for number in (1, 4)
    ]
    assert lengths[0] < lengths[1]
    settings = {"temperature": 1.5, "top_p": 0.9, "extra_body": {"top_k": 5, "min_p": 0.1}}
    assert complete(client, ask("Who are you?"), **settings).usage.completion_tokens <= 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/etc/passwd", "may not be read here"),
        ("http://127.0.0.1/a.png", "not allowed here"),
        ("data:image/png;base64,A", "not valid base64"),
    ],
)
def test_pictures_that_may_not_or_can_t_be_read(client, url, message, stream):
    part = {"type": "image_url", "image_url": {"url": url}}
    assert message in refusal(BadRequestError, client, ask(part, SHAPE), stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_explained_and_the_next_request_is_answered(client, stream):
    for messages, options, message in (
        ([{"role": "assistant", "content": "star"}], {}, "the last from user"),
        ([ask("What?"), ask("What?")], {}, "user and assistant in turn"),
        ([ask("word " * 2 * N_CTX)], {}, str(N_CTX)),
        ([ask("What?")], {"temperature": -1.0}, "temperature"),
        ([ask("What?")], {"extra_body": {"hd_num": 0}}, "hd_num must be at least 1"),
    ):
        assert message in refusal(BadRequestError, client, *messages, stream=stream, **options)
    for options in ({"n": 2}, {"stop": ["a"]}, {"logprobs": True}):  # what isn't done is not ignored
        (name,) = options
        assert name in refusal(UnprocessableEntityError, client, ask("What?"), stream=stream, **options)
    assert complete(client, ask(picture("star.png"), SHAPE)).choices[0].message.content == "star"


def test_a_client_that_goes_away_ends_its_answer(client):
    with complete(client, ask("Who are you?"), stream=True, max_tokens=900) as stream:
        next(iter(stream))
    assert complete(client, ask(picture("star.png"), SHAPE)).choices[0].message.content == "star"


@pytest.mark.parametrize("name", ["uvicorn", "fastapi"])
def test_a_missing_library_says_what_to_install(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "internlm_xcomposer2.llamacpp.server", raising=False)
    assert main(["serve", str(tmp_path)]) == 1
    assert f"ixc2 serve needs {name}: pip install" in capsys.readouterr().err


def test_the_directory_must_be_one(tmp_path):
    run = [*COMMAND, "serve", str(tmp_path / "nowhere")]
    options = {"capture_output": True, "text": True, "env": offline_environment(tmp_path), "cwd": tmp_path}
    result = subprocess.run(run, **options)
    assert result.returncode == 1 and "is not a directory; write one with: ixc2 gguf" in result.stderr
