"""Articles as files and as JSON, and the sources of their pictures."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from internlm_xcomposer2.article_internlm_xcomposer2 import Article, Candidate, Paragraph, Picture
from internlm_xcomposer2.sources_internlm_xcomposer2 import (
    CHINESE_QUESTION,
    ENGLISH_QUESTION,
    FolderSource,
    TextTower,
    as_source,
    find_candidates,
    pictures_in,
    score_by_words,
    words_of,
)
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (6, 8), "blue")
TWO = (Candidate("a", RED), Candidate(2, BLUE))
ARTICLE = Article(
    "Write <b>about</b> cats.",
    (
        Paragraph("Cats & dogs."),
        Paragraph("<script>alert(1)</script>", Picture('a "cat"\n', TWO, 1)),
        Paragraph("Only a caption.", Picture("a dog")),
        Paragraph("The end.", Picture("", (Candidate("up", RED),), 0)),
    ),
)


# ---- files ----


def test_markdown(tmp_path):
    path = ARTICLE.to_markdown(tmp_path / "new" / "folder")
    assert path.read_text(encoding="utf-8") == (
        "Cats & dogs.\n\n"
        "<script>alert(1)</script>\n"
        '<div align="center"> <img src=picture_2.png width = 500 alt="a &quot;cat&quot;"/> </div>\n\n'
        "Only a caption.\n\n"
        'The end.\n<div align="center"> <img src=picture_4.png width = 500/> </div>\n'
    )
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "article.md",
        "picture_2.png",
        "picture_4.png",
    ]
    assert Image.open(path.parent / "picture_2.png").size == BLUE.size


def test_html_shows_texts_as_they_are(tmp_path):
    page = ARTICLE.to_html(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page
    assert "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>" in page
    assert (
        '<img src="picture_2.png" alt="a &quot;cat&quot;"><figcaption>a &quot;cat&quot;</figcaption>' in page
    )
    assert '<figure><img src="picture_4.png" alt=""></figure>' in page
    assert (tmp_path / "picture_4.png").is_file()


def test_an_article_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    ARTICLE.to_markdown(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = ARTICLE.with_choice(1, 0).with_text(0, "Other.")
    save, count = Image.Image.save, iter(range(9))

    def fail(self, *args, **kwargs):
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        other.to_markdown(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_json_and_back():
    again = Article.from_json(ARTICLE.to_json())
    assert again.lines == ARTICLE.lines and again.instruction == ARTICLE.instruction
    for index, picture in ARTICLE.pictures.items():
        other = again.pictures[index]
        assert (other.caption, other.choice) == (picture.caption, picture.choice)
        assert [one.id for one in other.candidates] == [one.id for one in picture.candidates]
        for one, same in zip(picture.candidates, other.candidates, strict=True):
            assert one.image.tobytes() == same.image.tobytes()
    assert Article.from_json(again.to_json()).to_json() == again.to_json()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "not an article"),
        ("{}", "not an article"),
        ('{"instruction": "a", "paragraphs": [3]}', "not an article"),
        ("[" * 100_000, "not an article"),
        (
            '{"instruction": "a", "paragraphs": [{"text": "a", "picture": {"caption": "", "choice": 0, '
            '"candidates": []}}]}',
            "choice 0 is not one of 0",
        ),
        (
            '{"instruction": "a", "paragraphs": [{"text": "a", "picture": {"caption": "", "choice": null, '
            '"candidates": [{"id": 1, "image": "/etc/passwd"}]}}]}',
            "must be a data: URI",
        ),
        (
            '{"instruction": "a", "paragraphs": [{"text": "a", "picture": {"caption": "", "choice": true, '
            '"candidates": []}}]}',
            "choice must be an int",
        ),
    ],
)
def test_other_json(text, words):
    with pytest.raises(ValueError, match=words):
        Article.from_json(text)


def test_changes_leave_the_article_as_it_was():
    lines = ARTICLE.lines
    changed = ARTICLE.with_text(0, "Birds.").with_picture(3, None).with_paragraphs(1, 3, Paragraph("new"))
    assert changed.lines == ["Birds.", "new", "The end."] and not changed.pictures
    assert ARTICLE.lines == lines and ARTICLE.text.startswith("Cats")
    with pytest.raises(ValueError, match="paragraph 0 has no picture"):
        ARTICLE.with_choice(0, 0)
    with pytest.raises(ValueError, match="choice 2 is not one of 2"):
        ARTICLE.with_choice(1, 2)


# ---- folders ----

CAPTIONS = {
    "a/cat.png": "A black cat sleeps on a red sofa.",
    "b.jpg": "Two dogs play in the snow.",
    "c.png": "一只猫在沙发上睡觉",
    "d.webp": "A city at night.",
    "e.png": "Three cats.",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures whose first pixel says which caption is theirs, and what is no picture."""
    for number, name in enumerate(CAPTIONS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(tmp_path / name, lossless=True, quality=100)
    (tmp_path / "broken.png").write_text("broken")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / ".hidden.png").write_text("hidden")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.fixture
def describe():
    """The captions of pictures, and what was asked."""

    def call(images, question):
        call.asked.append((len(images), question))
        return [list(CAPTIONS.values())[round(image.getpixel((0, 0))[0] / 40)] for image in images]

    call.asked = []
    return call


def test_pictures_in_a_folder(folder):
    assert pictures_in(folder) == ["a/cat.png", "b.jpg", "broken.png", "c.png", "d.webp", "e.png"]
    assert pictures_in(folder, recursive=False) == ["b.jpg", "broken.png", "c.png", "d.webp", "e.png"]
    with pytest.raises(NotADirectoryError):
        pictures_in(folder / "notes.txt")
    with pytest.raises(ValueError, match="no pictures"):
        FolderSource(folder / "folder.png")


def ids(found) -> list[str]:
    return [name for name, _ in found]


def test_words_rank_a_folder(folder, describe):
    source = FolderSource(folder, describe)
    assert ids(source.search("a cat on a sofa", (), 2)) == ["a/cat.png", "e.png"]
    assert ids(source.search("沙发上的猫", (), 1)) == ["c.png"]
    assert ids(source.search("dogs in snow", ("b.jpg",), 9)) == ["a/cat.png", "c.png", "d.webp", "e.png"]
    assert [question for _, question in describe.asked] == [ENGLISH_QUESTION] * 2 + [CHINESE_QUESTION] * 2
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert {row["file"]: row["caption"] for row in rows} == CAPTIONS


def test_captions_are_computed_once(folder, describe, tmp_path_factory):
    captions = tmp_path_factory.mktemp("kept") / "captions.jsonl"
    for _ in range(2):
        source = FolderSource(folder, describe, captions=captions, question="What?")
        assert ids(source.search("snow", (), 1)) == ["b.jpg"]
    assert [number for number, question in describe.asked] == [3, 2]
    assert not (folder / "captions.jsonl").exists()


def test_a_small_folder_needs_no_captions(folder):
    assert ids(FolderSource(folder).search("a cat", (), 6)) == list(CAPTIONS)
    with pytest.raises(ValueError, match="6 pictures.*need a model that describes them"):
        FolderSource(folder).search("a cat", (), 2)


def test_a_reader_without_rights_to_write(folder, describe):
    if os.geteuid() == 0:
        (folder / "captions.jsonl").mkdir()  # root may write anywhere, but not here
    else:
        folder.chmod(0o500)
    with pytest.raises(OSError, match=r"captions\.jsonl"):
        FolderSource(folder, describe).search("a cat", (), 2)
    assert not describe.asked


def test_scores_by_words():
    assert words_of("The cats' sofas: 沙发上a猫 x") == {"the", "cat", "sofa", "沙发", "发上", "a", "猫", "x"}
    captions = ["a cat", "a dog", "a cat and a dog and a bird"]
    scores = score_by_words("cat", captions)
    assert scores[0] > scores[2] > scores[1] == 0
    assert score_by_words("", captions) == [0, 0, 0] and score_by_words("cat", []) == []


def test_other_sources():
    class Library:
        def search(self, caption, exclude, k):
            return [("x", RED)]

    library = Library()
    assert as_source(library, None) is library and as_source(None, None) is None
    assert find_candidates(as_source(lambda *args: [("y", BLUE)], None), "a", (), 4)[0].id == "y"
    star = str(ROOT / "examples" / "star.png")
    assert [one.id for one in find_candidates(as_source(lambda *args: [star] * 9, None), "a", (), 2)] == [
        star
    ] * 2
    for result, words in ((None, "list of"), ("star.png", "list of"), ([("a", "b", "c")], "pairs or paths")):
        with pytest.raises(TypeError, match=words):
            find_candidates(as_source(lambda *args, result=result: result, None), "a", (), 4)


# ---- a text tower ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": 54, "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).eval().save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    """A tiny SigLIP checkpoint with random weights and our vocabulary."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 640, "max_position_embeddings": 16, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SiglipModel(config).eval().save_pretrained(folder)
    pictures = SiglipImageProcessor(size={"height": 16, "width": 16})
    SiglipProcessor(pictures, SiglipTokenizer(str(ROOT / "tokenizer.model"))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_tower_ranks_a_folder(folder, describe, kind, request):
    checkpoint = str(request.getfixturevalue(kind))
    rng = np.random.RandomState(0)
    for name in CAPTIONS:
        pixels = rng.randint(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    images = [Image.open(folder / name).convert("RGB") for name in CAPTIONS]
    caption = "a cat on a sofa that is far too long for this tower"
    length = {"padding": "max_length", "truncation": True, "max_length": 16}
    with torch.no_grad():
        scores = model(**processor(text=[caption], images=images, return_tensors="pt", **length))
    scores = scores.logits_per_text[0].tolist()
    expected = [name for _, name in sorted(zip(scores, CAPTIONS, strict=True), reverse=True)]
    for encoder in (checkpoint, (model, processor)):
        source = FolderSource(folder, describe, encoder=encoder)
        assert ids(source.search(caption, (), 3)) == expected[:3]
        assert ids(source.search(caption, expected[:1], 2)) == expected[1:3]
    assert not describe.asked and not (folder / "captions.jsonl").exists()


def test_an_encoder_that_reads_no_texts():
    with pytest.raises(TypeError, match="CLIP or SigLIP"):
        TextTower((torch.nn.Linear(1, 1), None))
