"""Programs written for the published code of the first generation: their calls, on a checkpoint as published.

They build prompts from embeddings, which are compared with ids and pixels.
"""

import copy
from pathlib import Path

import pytest
import torch
from first_generation import (
    golden,
    needs_first_tokenizer,
    picture,
    write_first,
)
from helpers import golden_directory
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
)

SMALL, WIDE = "inputs/small.png", "inputs/wide.png"
# How the kit generates for questions with a short answer.
SHORT = {"max_new_tokens": 5, "num_beams": 5, "do_sample": False, "min_length": 1, "repetition_penalty": 1.5}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_first(tmp_path_factory.mktemp("first") / "checkpoint")


@pytest.fixture(scope="module")
def published(directory):
    """The model as clients load it: on one device, with the tokenizer as an attribute under both names."""
    model = AutoModel.from_pretrained(directory, device_map="cpu", trust_remote_code=True).eval()
    model.tokenizer = model.internlm_tokenizer = AutoTokenizer.from_pretrained(
        directory, trust_remote_code=True
    )
    return model


@pytest.fixture(scope="module", params=["float32", "half"])
def client(request, published):
    """The same in both precisions that clients use. Shared: don't change it."""
    return published if request.param == "float32" else copy.deepcopy(published).bfloat16()


# ---- the evaluation kit ----


class AnyStop(StoppingCriteria):
    """As evaluation kits have it: it looks at the first sequence, and returns a plain bool."""

    def __init__(self, stops: list[torch.Tensor]) -> None:
        self.stops = stops

    def __call__(self, input_ids, scores, **kwargs):
        return any(torch.all(stop == input_ids[0][-len(stop) :]).item() for stop in self.stops)


def embed_prompt(model, prompt: str, pictures: list[str]) -> torch.Tensor:
    """A prompt with `<ImageHere>` for each picture -> (1, tokens, hidden), BOS in front of its first text."""
    device = model.internlm_model.model.embed_tokens.weight.device
    parts = prompt.split("<ImageHere>")
    assert len(parts) == len(pictures) + 1
    embeds = []
    for number, part in enumerate(parts):
        ids = model.tokenizer(part, return_tensors="pt", add_special_tokens=number == 0).to(device).input_ids
        embeds.append(model.internlm_model.model.embed_tokens(ids))
        if number < len(pictures):
            embeds.append(model.encode_img(pictures[number]))
    return torch.cat(embeds, dim=1)


@torch.no_grad()
def ask(model, prompt: str, pictures: list[str], **settings) -> str:
    """An answer as the published evaluation scripts read it."""
    stops = [
        torch.tensor([model.internlm_tokenizer.convert_tokens_to_ids(mark)])
        for mark in (model.eoh, model.eoa)
    ]
    output = model.internlm_model.generate(
        inputs_embeds=embed_prompt(model, prompt, pictures),
        stopping_criteria=StoppingCriteriaList([AnyStop(stops)]),
        **settings,
    )[0]
    output = output[1:] if output[0] in (0, 1) else output
    text = model.tokenizer.decode(output, add_special_tokens=False)
    return text.split(model.eoa)[0].split("<|Bot|>")[-1].strip()


PROMPTS = {
    "MMBench": (
        " <|User|>:<ImageHere>Please answer this question by choosing the correct choice.Context: N/A\n"
        "Question: Which?\nOptions: A. one\nB. two\n<TOKENS_UNUSED_0> <|Bot|>: Answer: The answer is"
    ),
    "MME": " <|User|>:<ImageHere> Is it red? Answer this question briefly<TOKENS_UNUSED_0> <|Bot|>:",
    "the kit": "<|User|>: <ImageHere>Which?<TOKENS_UNUSED_0> <|Bot|>: Answer: The answer is ",
    "the kit, two pictures": "<|User|>: <ImageHere>One, <ImageHere>two?<TOKENS_UNUSED_0> <|Bot|>: Answer: ",
}


@needs_first_tokenizer
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_benchmarks_are_answered_as_ids_with_pictures_are(client, name):
    prompt = PROMPTS[name]
    pictures = [picture(path) for path in (SMALL, WIDE)[: prompt.count("<ImageHere>")]]
    answer = ask(client, prompt, pictures, **SHORT)
    ids: list[int] = []
    for number, part in enumerate(prompt.split("<ImageHere>")):
        ids += [client.config.image_token_id] * 66 if number else []
        ids += client.tokenizer(part, add_special_tokens=number == 0)["input_ids"]
    pixels = torch.stack([client.vis_processor(Image.open(path).convert("RGB")) for path in pictures])
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels.to(client.dtype)}
    (whole,) = client.generate(**inputs, **SHORT)
    text = client.tokenizer.decode(whole[len(ids) :]).split(client.eoa)[0].split("<|Bot|>")[-1].strip()
    assert answer == text != ""


@needs_first_tokenizer
def test_the_published_answer_to_a_benchmarks_question(published):
    case, _ = golden("mmbench_style")
    for expected in case["generations"]:
        settings = {name: expected[name] for name in ("num_beams", "repetition_penalty")}
        settings |= {"max_new_tokens": 32, "do_sample": False, "min_length": 1, "length_penalty": 1.0}
        answer = ask(published, case["call"]["prompt"], [picture(SMALL)], **settings)
        assert answer == expected["response"].split("<|Bot|>")[-1].strip()


@needs_first_tokenizer
@torch.no_grad()
def test_candidates_of_a_benchmark_are_ranked_by_their_loss(client):
    """Each after the same prompt, padded right with 2, by the decoder's logits."""
    prompt = embed_prompt(
        client,
        " <|User|>:<ImageHere>Question: Which?\nOptions: []\n<TOKENS_UNUSED_0> <|Bot|>: ",
        [picture(SMALL)],
    )
    candidates = ["A. one", "B. two and more", "C.", "D. four"]
    rows = client.tokenizer(
        candidates, add_special_tokens=False, padding="longest", padding_side="right", return_tensors="pt"
    )
    assert client.tokenizer.pad_token_id == 2
    embeds = torch.cat([prompt.repeat(4, 1, 1), client.get_input_embeddings()(rows.input_ids)], dim=1)
    mask = torch.cat([torch.ones(4, prompt.shape[1], dtype=torch.long), rows.attention_mask], dim=1)
    logits = client.internlm_model(inputs_embeds=embeds, attention_mask=mask, return_dict=True).logits
    logits = logits[:, prompt.shape[1] - 1 : -1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), rows.input_ids, reduction="none")
    together = (losses * rows.attention_mask).sum(1) / rows.attention_mask.sum(1)
    for number, candidate in enumerate(candidates):
        ids = client.tokenizer(candidate, add_special_tokens=False, return_tensors="pt").input_ids
        one = torch.cat([prompt, client.get_input_embeddings()(ids)], dim=1)
        labels = torch.cat([torch.full((1, prompt.shape[1]), -100), ids], dim=1)
        alone = client.internlm_model(inputs_embeds=one, labels=labels).loss
        tolerance = 1e-4 if client.dtype == torch.float32 else 0.05
        assert together[number].item() == pytest.approx(alone.item(), rel=tolerance)


@needs_first_tokenizer
def test_a_question_about_a_file_under_autocast(client):
    """The kit's own short way: `generate(text, path)` with its settings."""
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        answer = client.generate("What is it?", picture(SMALL), max_new_tokens=6, num_beams=2)
    assert isinstance(answer, str) and answer
    marks = [
        client.internlm_tokenizer.decode(torch.Tensor([i]), skip_special_tokens=True)
        for i in (103027, 103028)
    ]
    assert marks == [client.eoh, client.eoa]


# ---- captions ----


@needs_first_tokenizer
@pytest.mark.parametrize("num_pictures", [1, 2])
def test_captions_of_a_batch_by_sampling(client, num_pictures):
    """As the batch script and the kit do it, in half precision too; pad ids of beams can be decoded."""
    images = [Image.open(picture(path)).convert("RGB") for path in (SMALL, WIDE)[:num_pictures]]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=client.dtype != torch.float32):
        pixels = torch.cat([client.vis_processor(image).unsqueeze(0) for image in images])
        embeds = client.encode_img(pixels)
        before = client.encode_text("<|User|>:", add_special_tokens=True).repeat(num_pictures, 1, 1)
        question = f"Analyze the image in a comprehensive and detailed manner.{client.eoh}\n<|Bot|>:"
        after = client.encode_text(question, add_special_tokens=False).repeat(num_pictures, 1, 1)
        torch.manual_seed(0)
        outputs = client.internlm_model.generate(
            inputs_embeds=torch.cat([before, embeds, after], dim=1),
            max_length=20,
            num_beams=3,
            min_length=1,
            do_sample=True,
            repetition_penalty=1.5,
            length_penalty=1.0,
            temperature=1.0,
            eos_token_id=client.tokenizer.eos_token_id,
            num_return_sequences=1,
        )
    assert outputs.shape == (num_pictures, 20)  # BOS and 19 new tokens
    for output in outputs:
        output[output == -1] = 2
        assert client.decode_text([output])


@needs_first_tokenizer
def test_the_batch_captioning_script_gives_the_published_captions(published):
    case, tensors = golden("sharecaptioner_batch")
    pixels = [
        published.vis_processor(Image.open(golden_directory() / path).convert("RGB")).unsqueeze(0)
        for path in case["call"]["images"]
    ]
    with torch.no_grad():
        embeds = published.encode_img(torch.cat(pixels))
        for index, rows in enumerate(embeds):
            torch.testing.assert_close(rows, tensors[f"img{index}_embeds"], rtol=0, atol=2e-5)
        before = published.encode_text(case["call"]["seg1"], add_special_tokens=True).repeat(
            len(embeds), 1, 1
        )
        question = "Analyze the image in a comprehensive and detailed manner."
        after = published.encode_text(f"{question}{published.eoh}\n<|Bot|>:", add_special_tokens=False)
        inputs = torch.cat([before, embeds, after.repeat(len(embeds), 1, 1)], dim=1)
        assert inputs.shape[1] == case["n_tokens"]
        for expected in case["generations"]:
            outputs = published.internlm_model.generate(
                inputs_embeds=inputs,
                max_length=33,
                num_beams=expected["num_beams"],
                min_length=1,
                do_sample=False,
                repetition_penalty=expected["repetition_penalty"],
                length_penalty=1.0,
                eos_token_id=published.tokenizer.eos_token_id,
                num_return_sequences=1,
            )
            for output, response in zip(outputs, expected["response"], strict=True):
                output[output == -1] = 2
                assert published.decode_text([output]) == response
