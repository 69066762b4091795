"""Train the small sentencepiece model that the nano checkpoint ships.

It behaves like the published `tokenizer.model` where it matters: ids 0, 1 and 2 are `<unk>`, `<s>` and
`</s>`, the markup pieces are matched whole, text round-trips byte for byte (no normalisation, no dummy
prefix, bytes as a last resort) and each digit is a separate piece. Printed words are read letter by letter,
so no piece joins two capitals. All other ids differ: look pieces up by name.

Training is deterministic: the same sentencepiece version gives the same file.

    python -m tools.nano.train_tokenizer --output tokenizer.model
"""

import argparse
import io
import itertools
import random
import re
import string
from pathlib import Path

import sentencepiece

from .questions import COLOURS, NUMBER_WORDS, PLURALS, QUESTIONS, SHAPES

MARKUP_PIECES = ("[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
ALPHABET = string.ascii_letters + string.digits + ".,:;!?'\"()<>[]{}/\\-_+*=#%&@$|~`^"

# The vocabulary is older than some of the questions; single characters make up for what is new.
PAIR_FRAMES = (
    "Picture 1: {mark}; picture 2: {mark}; {question}",
    "Picture 1 {mark}; picture 2 {mark}; {question}",
    "Image1 {mark}; Image2 {mark}; {question}",
    "{mark}{mark}{question}",
    "{mark} {mark} {question}",
    "Here are two pictures. {mark} and {mark}. {question}",
)

PARAPHRASES = """
What digits are printed in the photo?
Tell me the number shown in the image.
Read the digits in the picture, please.
What letters are shown here?
What text appears in the picture?
What is the color of the shape?
What is the colour of the shape?
Is it red, orange, yellow, green, blue, purple, brown or black?
Is it a circle, a square, a triangle, a star, a cross or a ring?
How many things are there in this photo?
How many shapes are in this image?
Which picture shows the red circle, the first or the second?
Is the yellow star in the first or in the second picture?
Does the first image or the second image show the ring?
Look at both images. Which one shows the blue square?
Describe this picture.
Describe the image.
What happens in the video?
Answer the question using a single word or phrase.
"""

SMALL_TALK = """
Hello, how are you?
Hi, what is your name?
Thank you very much.
Good morning, can you help me with this?
Please tell me more about it.
I think that is right, but I am not sure.
You are an assistant that answers questions about pictures.
The weather is nice today and we are going for a walk.
She said that they would come back in the evening.
There was a small house near the river with a large garden.
This is one of the first things that people want to know.
It has been some time since he was here.
你好，图里有什么？
图里写的是什么字？
谢谢你。
"""

ADJACENT_CAPITALS = re.compile("[A-Z]{2}")


def corpus() -> list[str]:
    """The training sentences in a fixed order; the more often one occurs, the fewer pieces it should take."""
    closed_answers = [*SHAPES, *COLOURS, *NUMBER_WORDS[:5], "yes", "no"]
    roles = ["user", "assistant", "system"]
    small_talk = SMALL_TALK.strip().split("\n")
    paraphrases = PARAPHRASES.strip().split("\n")
    inside = [f" {word}" for word in (*closed_answers, *PLURALS.values(), "first", "second")]
    sentences = questions() * 12 + paraphrases * 6 + small_talk + roles * 60
    return [*ALPHABET, *sentences, *closed_answers * 40, *inside * 30]


def questions() -> list[str]:
    """Each wording once, cut at its image marks, with one of the names that it can be asked about."""
    things = itertools.cycle(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    filled = [
        wording.format(shape="shape", shapes="shapes", thing=next(things))
        for wordings in QUESTIONS.values()
        for wording in wordings
    ]
    parts = [
        part for frame in PAIR_FRAMES for part in frame.format(mark="\n", question="").split("\n") if part
    ]
    return filled + parts


def train(num_pieces: int) -> bytes:
    """The serialised sentencepiece model of `num_pieces` pieces.

    Raises RuntimeError, from sentencepiece, if the corpus can't fill or fit that many pieces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=list(MARKUP_PIECES),
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def check(processor: sentencepiece.SentencePieceProcessor, num_strings: int = 2000) -> None:
    """Verify on random strings what reading letter by letter relies on.

    Raises ValueError naming the first piece or string that breaks a promise of this module.
    """
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if processor.is_byte(index) or processor.is_control(index) or piece in (*MARKUP_PIECES, "<unk>"):
            continue
        if ADJACENT_CAPITALS.search(piece) or (len(piece) > 1 and any(c.isdigit() for c in piece)):
            raise ValueError(f"piece {piece!r} joins capitals or digits; change the corpus")
    rng = random.Random(0)
    for _ in range(num_strings):
        word = "".join(rng.choices(string.ascii_uppercase + string.digits, k=rng.randint(1, 12)))
        for text, expected in ((word, list(word)), (f"it says {word}.", ["▁", *word, "."])):
            pieces = processor.encode(text, out_type=str)
            if pieces[-len(expected) :] != expected:
                raise ValueError(f"{text!r} is read as {pieces}")
        noise = "".join(
            chr(rng.choice((rng.randrange(128), rng.randrange(0x4E00, 0x9FFF)))) for _ in range(9)
        )
        if processor.decode(processor.encode(noise)) != noise:
            raise ValueError(f"{noise!r} comes back as {processor.decode(processor.encode(noise))!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tokenizer.model"))
    parser.add_argument("--num-pieces", type=int, default=640)
    arguments = parser.parse_args()
    model = train(arguments.num_pieces)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    check(processor)
    arguments.output.write_bytes(model)
    print(f"{arguments.output}: {processor.get_piece_size()} pieces, {len(model)} bytes")
    for piece in MARKUP_PIECES:
        print(f"{piece} {processor.piece_to_id(piece)}")


if __name__ == "__main__":
    main()
