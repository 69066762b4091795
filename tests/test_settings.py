"""Arguments that `generate` can't use are refused before anything is computed, by every way to it."""

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

WRONG = [
    ({"colour": "red"}, TypeError, "no argument colour"),
    ({"max_new_token": 5}, TypeError, "no argument max_new_token"),
    ({"labels": torch.zeros(1, 1)}, TypeError, "no argument labels"),
    ({"to_dict": 1}, TypeError, "no argument to_dict"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, not 0"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int"),
    ({"max_new_tokens": "5"}, TypeError, "max_new_tokens must be an int"),
    ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be at least 0"),
    ({"num_beams": True}, TypeError, "num_beams must be an int"),
    ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
    ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1"),
    ({"num_return_sequences": 2, "do_sample": False}, ValueError, "num_return_sequences"),
    ({"num_return_sequences": 3, "num_beams": 2}, ValueError, "num_return_sequences"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0, not -1"),
    ({"top_k": 2.5}, TypeError, "top_k must be an int"),
    ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, not 0.0"),
    ({"top_p": 1.5}, ValueError, "at most 1, not 1.5"),
    ({"min_p": 2.0}, ValueError, "min_p must be at least 0 and at most 1"),
    ({"typical_p": 0.0}, ValueError, "typical_p"),
    ({"temperature": 0.0}, ValueError, "temperature must be above 0, not 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be above 0, not nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be above 0, not inf"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number"),
    ({"repetition_penalty": -1.0}, ValueError, "repetition_penalty must be above 0"),
    ({"length_penalty": "long"}, TypeError, "length_penalty must be a number"),
    ({"length_penalty": float("nan")}, ValueError, "length_penalty must be finite"),
    ({"max_time": 0}, ValueError, "max_time must be above 0"),
    ({"no_repeat_ngram_size": -2}, ValueError, "no_repeat_ngram_size"),
    ({"do_sample": "yes"}, TypeError, "do_sample must be True or False"),
    ({"use_cache": 3}, TypeError, "use_cache must be True or False"),
    ({"early_stopping": "soon", "num_beams": 2}, ValueError, "early_stopping"),
    ({"eos_token_id": "end"}, TypeError, "eos_token_id must be an id or a list of ids"),
    ({"eos_token_id": 1.5}, TypeError, "eos_token_id must be an id"),
    ({"eos_token_id": [2, 10**9]}, ValueError, "eos_token_id has 1000000000, but the vocabulary"),
    ({"eos_token_id": [[2]]}, TypeError, "eos_token_id must be an id"),
    ({"pad_token_id": -7}, ValueError, "pad_token_id has -7"),
    ({"suppress_tokens": [-3]}, ValueError, "suppress_tokens has -3"),
    ({"bad_words_ids": [[]]}, TypeError, "bad_words_ids must be a list of lists"),
    ({"bad_words_ids": 3}, TypeError, "bad_words_ids must be a list of lists"),
    ({"streamer": object()}, TypeError, "streamer must have the methods put and end"),
    ({"streamer": "stdout"}, TypeError, "streamer must have the methods put and end"),
    ({"stop_strings": 3}, TypeError, "stop_strings must be a text"),
    ({"stop_strings": [""]}, TypeError, "stop_strings must be a text"),
    ({"logits_processor": 5}, TypeError, "logits_processor must be a list"),
    ({"logits_processor": ["x"]}, TypeError, "logits_processor must be a list"),
    ({"stopping_criteria": [None]}, TypeError, "stopping_criteria must be a list"),
    ({"prefix_allowed_tokens_fn": [1]}, TypeError, "prefix_allowed_tokens_fn must be a function"),
    ({"generation_config": {"top_k": 1}}, TypeError, "generation_config must be a GenerationConfig"),
    ({"cache_implementation": "quick"}, ValueError, "cache_implementation"),
    ({"cache_implementation": 1}, TypeError, "cache_implementation must be a name"),
    ({"compile_config": {"mode": "fast"}}, ValueError, "compile_config"),
    ({"past_key_values": ((1, 2),)}, TypeError, "past_key_values must be a cache"),
    ({"cache": "none"}, TypeError, "cache must be a cache"),
    ({"assistant_model": "nano"}, TypeError, "assistant_model must be a model"),
    ({"custom_generate": 5}, TypeError, "custom_generate must be a function"),
    ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, ValueError, "contrastive_search"),
    ({"infer_mode": "dance"}, ValueError, "infer_mode"),
]
IDS = [f"{', '.join(arguments)}: {message[:30]}" for arguments, _, message in WRONG]
# chat makes these itself, or reads them in its own way
OF_GENERATE = [{"stop_strings": "x"}, {"max_length": 0}, {"max_length": 2.5}]


@pytest.fixture
def idle(model, tokenizer, monkeypatch):
    """The model, in which anything that computes is an error of the test."""

    def compute(*args, **kwargs):
        pytest.fail("computed before the check")

    monkeypatch.setattr(model, "get_image_features", compute)
    monkeypatch.setattr(model.model, "_run_layers", compute)
    monkeypatch.setattr(model, "tokenizer", tokenizer, raising=False)
    return model


@pytest.fixture(scope="module")
def picture():
    return Image.new("RGB", (80, 60), "red")


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=IDS)
def test_every_method_refuses_it(idle, tokenizer, picture, arguments, error, message):
    base = {"infer_mode": "base", **arguments}
    calls = [
        lambda: idle.chat(tokenizer, "what?", picture, **arguments),
        lambda: idle.write_artical("write", picture, **base),
        lambda: idle.write_webpage("write", picture, save=False, **{"num_beams": 1, **base}),
    ]
    if "streamer" not in arguments:  # which these refuse for what they are
        calls.append(lambda: idle.batch_chat(tokenizer, ["what?"], [picture], **arguments))
    if not {"streamer", "num_beams"} & set(arguments):
        calls.append(lambda: idle.chat_stream(tokenizer, "what?", picture, **arguments))
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_the_model_of_these_tests_would_notice(idle, tokenizer, picture):
    for image in ((), picture):
        with pytest.raises(pytest.fail.Exception, match="computed before the check"):
            idle.chat(tokenizer, "what?", image)


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=IDS)
def test_generate_refuses_it(idle, processor, picture, arguments, error, message):
    inputs = processor(images=picture, text="<ImageHere>what?", return_tensors="pt")
    for prompt in (inputs, {"inputs_embeds": torch.zeros(1, 3, 32)}):
        with pytest.raises(error, match=message):
            idle.generate(**prompt, **{"max_new_tokens": 3, **arguments})


@pytest.mark.parametrize("arguments", OF_GENERATE, ids=str)
def test_generate_refuses_what_chat_would_not_pass(idle, arguments):
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        idle.generate(input_ids=torch.full((1, 3), 9), **arguments)


@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_temperature_of_zero_may_accompany_greedy_decoding(model, zero):
    """Evaluation harnesses pass both."""
    asked = {"input_ids": torch.full((1, 3), 9), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**asked, temperature=zero), model.generate(**asked))


def test_settings_by_position_and_in_a_configuration(idle):
    ids = torch.full((1, 3), 9)
    with pytest.raises(TypeError, match="generation_config must be"):
        idle.generate(ids, {"top_k": 3})
    with pytest.raises(ValueError, match="num_return_sequences"):
        idle.generate(ids, GenerationConfig(max_new_tokens=3), num_return_sequences=2)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([5, 6]), ValueError, "must be \\(batch, tokens\\)"),
        (torch.zeros(1, 1, 1, dtype=torch.long), ValueError, "must be \\(batch, tokens\\)"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, "must be \\(batch, tokens\\)"),
        (torch.tensor([[5.0, 6.0]]), TypeError, "must be integers, not torch.float32"),
        (torch.tensor([[True, False]]), TypeError, "must be integers, not torch.bool"),
        (torch.tensor([[5, -1]]), ValueError, "contain -1, but the vocabulary has the ids 0 to 639"),
        (torch.tensor([[5, 640]]), ValueError, "contain 640, but the vocabulary has the ids 0 to 639"),
        ([[5, 6]], TypeError, "must be a tensor, not list"),
    ],
)
def test_ids_that_are_none(idle, ids, error, message):
    for call in (idle, idle.generate, idle.model):
        with pytest.raises(error, match=message):
            call(input_ids=ids)


@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (2, 3), (3,)])
def test_masks_that_do_not_fit(idle, shape):
    ids = torch.full((1, 3), 9)
    for call in (idle, idle.generate, idle.model):
        with pytest.raises(ValueError, match="attention_mask has the shape"):
            call(input_ids=ids, attention_mask=torch.ones(shape))


def test_embeddings_without_rows(idle):
    for embeds in (torch.zeros(3, 32), torch.zeros(1, 0, 32)):
        with pytest.raises(ValueError, match="inputs_embeds"):
            idle.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_stop_strings_end_an_answer(model, tokenizer):
    whole, _ = model.chat(tokenizer, "what?", do_sample=False, max_new_tokens=12)
    stop = whole[2:5]
    assert len(stop) == 3
    answer, _ = model.chat(tokenizer, "what?", do_sample=False, max_new_tokens=12, stop_strings=stop)
    assert stop in answer and len(answer) < len(whole)
    ids = tokenizer("what?", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        model.generate(ids, stop_strings="x", max_new_tokens=2)
    assert (
        len(model.generate(ids, stop_strings="\x01", tokenizer=tokenizer, max_new_tokens=2)[0]) > ids.shape[1]
    )
