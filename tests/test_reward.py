"""The reward model: scores by hand, in batches, by rank; loading under every name; the published trainer."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    content_of,
    flat_config,
    needs_published_tokenizer,
    picture_inputs,
    published_weights,
    random_pictures,
    read_json,
    tiny_config,
    tiny_model,
    write_published,
)
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2ForSequenceClassification
from internlm_xcomposer2.configuration_internlm_xcomposer2 import REWARD_AUTO_MAP
from internlm_xcomposer2.ixc2.adopt import adopt
from internlm_xcomposer2.ixc2.main import main
from internlm_xcomposer2.prompt_internlm_xcomposer2 import (
    batch_inputs,
    format_conversation,
    plan_chat,
    plan_conversation,
    reward_mark,
)
from internlm_xcomposer2.reward_internlm_xcomposer2 import batches_within, pairwise_loss
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)


def tiny_reward():
    """A random reward model with the weights of `tiny_model`, except for its head."""
    chat = tiny_model()
    model = InternLMXComposer2ForSequenceClassification(chat.config).eval()
    model.load_state_dict(chat.state_dict(), strict=False)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture(scope="module")
def reward(tokenizer):
    """Shared: don't change it."""
    model = tiny_reward()
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((50, 70), (150, 50))]


def ask(question, answer, *earlier):
    roles = ("user", "assistant")
    texts = [*earlier, question, answer]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def chats(pictures):
    """(conversations, images): one picture, two, none in two ways, and a picture in an earlier turn."""
    rows = [
        (ask("what?", "red"), pictures[0]),
        (ask("<ImageHere> and <ImageHere>?", "a star and a number"), pictures),
        (ask("hello", "hi"), []),
        (ask("hello", "hi, what can I do for you today?"), None),
        (ask("and now?", "a circle", "<ImageHere>what?", "a star"), [pictures[1]]),
    ]
    return [row[0] for row in rows], [row[1] for row in rows]


# ---- scores ----


def test_a_score_is_the_last_hidden_state_times_the_head(reward, tokenizer, pictures):
    begin, close = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]\n"
    text = f"{begin}user\nwhat?{close}{begin}assistant\nred{close}"
    end = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]")]
    text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = batch_inputs(reward.config, [plan_chat(reward.config, tokenizer, "", [pictures[0]], 2)])
    num_tokens = int(prompt["im_mask"].sum())
    ids = torch.tensor([[1, *[4] * num_tokens, *text_ids, *end]])
    embeds, mask = reward.embed_inputs(ids, prompt["pixel_values"], prompt["image_grid_hw"])
    with torch.no_grad():
        hidden = reward.model(inputs_embeds=embeds, im_mask=mask).last_hidden_state
    expected = float(hidden[0, -1] @ reward.score.weight[0].detach())
    score = reward.get_score(ask(" what? \n", "red"), [pictures[0]], hd_num=2)
    assert isinstance(score, float) and score == pytest.approx(expected, abs=1e-5)


@needs_published_tokenizer
def test_a_conversation_ends_as_in_the_published_training(published):
    messages = [{"role": "system", "content": "be kind"}, *ask("hi", "hello")]
    plan = plan_conversation(tiny_config(vocab_size=92544, image_token_id=92398), published, messages)
    assert plan.ids[0] == 1 and plan.ids[-2:] == [2, 92527] and plan.ids.count(1) == 1
    begin, end = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]\n"
    text = f"{begin}system\nbe kind{end}{begin}user\nhi{end}{begin}assistant\nhello{end}"
    assert plan.ids[1:-2] == published(text, add_special_tokens=False)["input_ids"]
    assert reward_mark(published) == "[UNUSED_TOKEN_130]"


@pytest.mark.parametrize("batch_tokens", [1, 60, 200, 10_000])
def test_scores_in_batches_are_those_of_single_rows(reward, chats, batch_tokens):
    conversations, images = chats
    singles = [reward.get_score(*row, hd_num=2) for row in zip(conversations, images, strict=True)]
    assert len({round(score, 3) for score in singles}) == len(singles)
    scores = reward.get_scores(conversations, images, hd_num=2, batch_tokens=batch_tokens)
    assert scores == pytest.approx(singles, abs=1e-5)


def test_batches_stay_within_their_budget(reward, chats):
    conversations, images = chats
    sizes = []
    handle = reward.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    reward.get_scores(conversations, images, hd_num=2, batch_tokens=150)
    handle.remove()
    assert 1 < len(sizes) < len(conversations) and max(sizes) <= 150
    assert batches_within([5, 9, 1, 5, 40], 20) == [[2, 0, 3], [1], [4]]
    assert sorted(sum(batches_within([7] * 10, 21), [])) == list(range(10))


def test_rank_and_compare_follow_the_scores(reward, chats):
    conversations, images = chats
    scores = reward.get_scores(conversations, images, None, 2)
    places = reward.rank(conversations, images, None, 2)
    assert sorted(places) == list(range(len(scores)))
    assert [scores[places.index(place)] for place in range(len(scores))] == sorted(scores, reverse=True)
    first, second = (conversations[0], images[0]), (conversations[1], images[1])
    assert reward.compare(*first, *second, hd_num=2) == (scores[0] > scores[1])
    assert reward.compare(*second, *first, hd_num=2) == (scores[1] > scores[0])
    assert not reward.compare(*first, *first, hd_num=2)


def test_equal_conversations_tie_wherever_they_are_in_a_batch(reward, chats):
    """Rounding in a batch depends on what is beside a row, so each conversation is scored only once."""
    conversations, images = chats
    for order in ([0, 1, 0, 0], [0, 0], [1, 0, 1, 0]):
        scores = reward.get_scores([conversations[i] for i in order], [images[i] for i in order], hd_num=2)
        assert all(len({scores[j] for j in range(len(order)) if order[j] == i}) == 1 for i in set(order))
    assert reward.rank([conversations[0]] * 3, [images[0]] * 3, hd_num=2) == [0, 1, 2]


def test_pictures_may_be_parts_of_the_messages(reward, pictures):
    parts = [{"type": "text", "text": "see "}, {"type": "image", "image": pictures[0]}]
    inside = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    apart = ask("see <ImageHere>", "red")
    bare = [{"role": "user", "content": [parts[0], {"type": "image"}]}, inside[1]]
    scores = [reward.get_score(inside), *(reward.get_score(m, pictures[0]) for m in (apart, bare))]
    assert scores[0] == scores[1] == scores[2]


def test_videos_are_scored(reward, pictures):
    frames = [picture.resize((60, 40)) for picture in pictures]
    assert reward.get_score(ask("what moves?", "a star"), [frames]) != reward.get_score(
        ask("what moves?", "a star"), [frames[::-1]]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_leaves_the_scores_unchanged(side, attention):
    model = tiny_reward()
    model.set_attn_implementation(attention)
    rows = [picture_inputs(model, grids) for grids in ([(1, 2)], [(2, 1), (1, 1)])]
    rows.append({"input_ids": torch.tensor([[1, 60, 70, 80, 90]])})
    with torch.no_grad():
        singles = torch.cat([model(**row).logits for row in rows])
    longest = max(row["input_ids"].shape[1] for row in rows)
    pads = [(longest - row["input_ids"].shape[1]) for row in rows]
    widths = [(pad, 0) if side == "left" else (0, pad) for pad in pads]
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(row["input_ids"], w, value=2) for row, w in zip(rows, widths, strict=True)])
    mask = torch.cat([pad(torch.ones_like(row["input_ids"]), w) for row, w in zip(rows, widths, strict=True)])
    shown = {name: torch.cat([row[name] for row in rows[:2]]) for name in ("pixel_values", "image_grid_hw")}
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask, **shown)
        torch.testing.assert_close(outputs.logits, singles, rtol=0, atol=1e-5)
        if side == "right":  # transformers' own convention
            torch.testing.assert_close(model(input_ids=ids, **shown).logits, singles, rtol=0, atol=1e-5)
    assert outputs.logits.shape == (3, 1) and outputs.past_key_values is None


def test_labels_give_the_losses_of_the_library():
    ids = torch.tensor([[1, 60, 70], [1, 90, 80]])
    single = tiny_reward()
    outputs = single(input_ids=ids, labels=torch.tensor([0.5, -2.0]))
    expected = torch.nn.functional.mse_loss(outputs.logits[:, 0], torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(outputs.loss, expected)
    several = InternLMXComposer2ForSequenceClassification(tiny_config(num_labels=3))
    outputs = several(input_ids=ids, labels=torch.tensor([2, 0]))
    assert outputs.logits.shape == (2, 3)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([2, 0]))
    torch.testing.assert_close(outputs.loss, expected)
    several.tokenizer = object()
    with pytest.raises(TypeError, match="tokenizer is a object"):
        several.get_score(ask("a", "b"))


# ---- faults ----


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"conversations": []}, TypeError, "at least one, not"),
        ({"conversations": ask("a", "b")}, TypeError, "list of at least one message"),
        ({"conversations": [[]]}, TypeError, "at least one message"),
        ({"conversations": [ask("a", "b")[:1]]}, ValueError, "last message is from 'user'"),
        (
            {"conversations": [[{"role": "bot", "content": "b"}]]},
            ValueError,
            "unknown role 'bot'; choose one of",
        ),
        ({"images": "a.png"}, TypeError, "entry per conversation"),
        ({"images": [[], []]}, ValueError, "1 conversations but 2 images"),
        ({"images": [["nowhere.png"]]}, FileNotFoundError, "nowhere.png"),
        ({"images": [[Image.new("RGB", (9, 9))] * 2]}, ValueError, "0 <ImageHere> marks .* 2 pictures"),
        ({"conversations": [ask("<ImageHere>", "b")]}, ValueError, "1 <ImageHere> marks .* 0 pictures"),
        ({"max_length": 9}, ValueError, "has 15 tokens.*max_length is 9; raise it"),
        ({"conversations": [ask("a" * 1100, "b")]}, ValueError, "context holds 1024"),
        ({"hd_num": 0}, ValueError, "hd_num"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be an int of at least 1, not 0"),
    ],
)
def test_faults_are_named_before_any_compute(reward, arguments, error, words):
    handles = [
        part.register_forward_pre_hook(lambda *_: pytest.fail("ran")) for part in (reward.vit, reward.model)
    ]
    try:
        with pytest.raises(error, match=words):
            reward.get_scores(**{"conversations": [ask("a", "b")], **arguments})
    finally:
        for handle in handles:
            handle.remove()


def test_a_picture_is_passed_only_one_way(reward, pictures):
    part = {"type": "image", "image": pictures[0]}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "red"}]
    with pytest.raises(ValueError, match="hold 1 pictures and 1 more"):
        reward.get_score(messages, pictures[0])


def test_without_a_tokenizer_or_with_several_labels_there_is_no_score(tokenizer):
    with pytest.raises(ValueError, match=r"set model\.tokenizer"):
        tiny_reward().get_score(ask("a", "b"))
    several = InternLMXComposer2ForSequenceClassification(tiny_config(num_labels=3))
    several.tokenizer = tokenizer
    with pytest.raises(ValueError, match="a reward is one score, but this model has 3 labels"):
        several.get_score(ask("a", "b"))


# ---- loading and saving ----


def reward_weights(model) -> dict[str, torch.Tensor]:
    weights = published_weights(model)
    assert "score.weight" in weights and "output.weight" not in weights
    return weights


def score_of(model):
    with torch.no_grad():
        return model(**picture_inputs(model, [(1, 1)])).logits.float()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_weights_make_it_a_reward_model_whichever_class_loads_it(tmp_path, kind):
    model = tiny_reward()
    write_published(tmp_path, reward_weights(model), flat_config(model), kind=kind, shards=2)
    for auto_class in AUTO_CLASSES:
        loaded = auto_class.from_pretrained(tmp_path, dtype="float32")
        assert type(loaded) is InternLMXComposer2ForSequenceClassification and loaded.num_labels == 1
        assert torch.equal(score_of(loaded), score_of(model))
    loaded.save_pretrained(tmp_path / "saved")
    assert read_json(tmp_path / "saved/config.json")["architectures"] == [type(model).__name__]
    for auto_class in AUTO_CLASSES:
        again = auto_class.from_pretrained(tmp_path / "saved", dtype="float32")
        assert torch.equal(score_of(again), score_of(model))


def test_a_chat_checkpoint_gets_a_new_head_and_says_so(tmp_path, monkeypatch):
    model = tiny_model()
    write_published(tmp_path, published_weights(model), flat_config(model))
    warnings = []
    monkeypatch.setattr(
        "internlm_xcomposer2.modeling_internlm_xcomposer2.logger.warning", lambda text: warnings.append(text)
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="float32")
    assert "score.weight is new" in warnings[0] and len(warnings) == 1
    assert type(loaded) is InternLMXComposer2ForSequenceClassification
    assert 0 < loaded.score.weight.std() < 0.1
    assert torch.equal(loaded.model.tok_embeddings.weight, model.model.tok_embeddings.weight)
    assert type(AutoModel.from_pretrained(tmp_path)) is InternLMXComposer2ForCausalLM
    wide = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert wide.score.weight.shape == (4, 32)


def test_a_reward_model_that_lacks_more_than_its_head_is_rejected(tmp_path):
    model = tiny_reward()
    weights = reward_weights(model)
    weights["model.norm.other"] = weights.pop("model.norm.weight")
    write_published(tmp_path / "source", weights, flat_config(model))
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight.*1 unexpected: model\.norm\.other"):
        AutoModel.from_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight.*1 unknown: model\.norm\.other"):
        adopt(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


FRESH = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from PIL import Image
picture = Image.linear_gradient("L").resize((70, 50))
question = {"role": "user", "content": "what?"}
chats = [[question, {"role": "assistant", "content": text}] for text in ("a", "b c")]
for directory in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = auto_class.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
        assert type(model).__name__ == "InternLMXComposer2ForSequenceClassification", type(model)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        model.tokenizer = tokenizer
        print(*model.get_scores(chats, [[picture], []], hd_num=2))
model.save_pretrained(sys.argv[1])
assert "internlm_xcomposer2" not in sys.modules
"""


@pytest.mark.slow
def test_an_adopted_reward_checkpoint_loads_without_the_package(tmp_path, tokenizer, capsys):
    """Adopted and converted from the published layout, and with the modules beside the published files."""
    model = tiny_reward()
    published_map = {
        "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
        "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
        "AutoModelForSequenceClassification": REWARD_AUTO_MAP["AutoModelForSequenceClassification"],
    }
    fields = {**flat_config(model), "auto_map": published_map}
    source = write_published(tmp_path / "source", reward_weights(model), fields, kind="bin", shards=2)
    shutil.copy(ROOT / "tokenizer.model", source)
    before = content_of(source)
    assert main(["inspect", str(source)]) == 0
    assert "score head: this is a reward model" in capsys.readouterr().out
    assert main(["adopt", str(source), str(tmp_path / "target"), "--convert"]) == 0
    assert content_of(source) == before
    config = read_json(tmp_path / "target/config.json")
    assert config["auto_map"] == REWARD_AUTO_MAP and config["id2label"] == {"0": "LABEL_0"}
    assert config["architectures"] == ["InternLMXComposer2ForSequenceClassification"]
    for path in [*(tmp_path / "target").glob("*.py"), tmp_path / "target/tokenizer_config.json"]:
        shutil.copy(path, source)
    command = [
        sys.executable,
        "-I",
        "-c",
        FRESH,
        *map(str, (tmp_path / "saved", tmp_path / "target", source)),
    ]
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    model.tokenizer = tokenizer
    picture = Image.linear_gradient("L").resize((70, 50))
    expected = model.get_scores([ask("what?", "a"), ask("what?", "b c")], [[picture], []], hd_num=2)
    lines = [[float(score) for score in line.split()] for line in result.stdout.splitlines()[-6:]]
    assert len(lines) == 6 and all(line == pytest.approx(expected, abs=1e-5) for line in lines)
    assert (tmp_path / "saved/reward_internlm_xcomposer2.py").is_file()
    saved = json.loads((tmp_path / "saved/config.json").read_text())["auto_map"]
    assert (
        saved["AutoModelForSequenceClassification"] == REWARD_AUTO_MAP["AutoModelForSequenceClassification"]
    )


# ---- pairs ----


def test_the_pairwise_loss_is_that_of_the_paper():
    scores = torch.tensor([[2.0], [1.0], [-3.0], [0.5]], dtype=torch.bfloat16)
    gaps = torch.tensor([1.0, -3.5])
    expected = -torch.log(1 / (1 + torch.exp(-gaps))).mean()
    torch.testing.assert_close(pairwise_loss(scores), expected)
    torch.testing.assert_close(pairwise_loss(scores[:, 0]), expected)
    assert torch.isfinite(pairwise_loss(torch.tensor([-300.0, 300.0])))
    for wrong in (torch.zeros(3), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match="are not pairs"):
            pairwise_loss(wrong)


def samples_of(reward, pairs, pixels):
    """What the published trainer's collator makes of pairs of conversations."""
    mark = reward.tokenizer.eos_token + reward_mark(reward.tokenizer)
    texts = [[[format_conversation(side)[0] + mark] for side in sides] for sides in zip(*pairs, strict=True)]
    samples = {"chosen": texts[0], "rejected": texts[1], "data_type": ["text"] * len(pairs)}
    if pixels is not None:
        samples |= {"data_type": ["multi"] * len(pairs), "image": [[row] for row in pixels]}
    return samples


@pytest.mark.parametrize("with_pictures", [False, True])
def test_the_published_trainer_gets_alternating_scores_and_their_loss(reward, with_pictures):
    pairs = [
        (ask("what?", "red"), ask("what?", "blue sky")),
        (ask("why?", "so"), ask("why?", "I don't know")),
    ]
    pixels = None
    if with_pictures:
        tiles = random_pictures(reward, [(1, 1)])[0]
        pixels = [[tiles[1:2] * sign] for sign in (1, -1)]
    outputs = reward(samples=samples_of(reward, pairs, pixels))
    rows = [row for pair in pairs for row in pair]
    images = [[]] * 4 if pixels is None else [picture for picture in pixels for _ in range(2)]
    expected = reward.get_scores(rows, [list(image) for image in images])
    assert outputs.logits.shape == (4, 1)
    assert outputs.logits[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(outputs.loss, pairwise_loss(torch.tensor(expected)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen": None}, "samples lack chosen"),
        ({"rejected": [["a"]]}, "2 chosen conversations but 1 rejected"),
        ({"data_type": ["text", "multi"]}, "multi and text; separate them"),
        ({"data_type": ["multi"]}, "lack 'image'"),
        ({"data_type": ["audio"]}, "unknown data_type 'audio'"),
    ],
)
def test_bad_pairs_are_named(reward, changes, words):
    samples = {"chosen": [["a"], ["b"]], "rejected": [["c"], ["d"]], "data_type": ["text"], **changes}
    with pytest.raises(ValueError, match=words):
        reward(samples=samples)


def test_a_training_batch_without_pictures_gives_every_weight_a_gradient():
    """Other processes, whose batches have pictures, wait for all of them."""
    model = tiny_reward().train()
    pairwise_loss(model(input_ids=torch.tensor([[1, 60, 70], [1, 90, 80]])).logits).backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert all("post_layernorm" in name for name in lacking), lacking
