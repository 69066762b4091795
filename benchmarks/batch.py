"""Several conversations at once, compared with the same ones one by one.

    python benchmarks/batch.py --size nano --threads 2
    python benchmarks/batch.py --size medium --conversations 1 4 --new-tokens 16

Each conversation is a question about its own picture, with greedy decoding. Together they go through
`model.batch_chat`; the naive way asks them one after the other, each with the optimisations of a single
question, so that the ratio shows the gain from batching and nothing else. The last line is JSON.
"""

import argparse

import common

QUESTION = "What does the picture show?"


def measure(
    conversations: int, mode: str, num_new: int, repeats: int, size: str, device: str, dtype: str
) -> dict:
    """This many conversations in one mode: a row of the table."""
    model = common.build_model(size, adapters=False, device=device, dtype=dtype)
    tokenizer = common.load_tokenizer()
    pictures = [common.picture_for(size, number) for number in range(conversations)]
    settings = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new}

    def together() -> None:
        model.batch_chat(tokenizer, [QUESTION] * conversations, [[each] for each in pictures], **settings)

    def in_turn() -> None:
        for picture in pictures:
            model.chat(tokenizer, QUESTION, [picture], **settings)

    seconds = common.repeat(together if mode == "ours" else in_turn, repeats, device)
    return {
        "mode": mode,
        "conversations": conversations,
        "time": seconds,
        "conversations_per_s": round(conversations / seconds["median"], 3),
        "tokens_per_s": round(conversations * num_new / seconds["median"], 2),
    }


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__, size="nano", threads=2)
    result.add_argument("--conversations", type=int, nargs="*", default=[1, 4, 8, 16])
    result.add_argument("--new-tokens", type=int, default=8)
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("batch", arguments)
    cases = [
        {
            "conversations": conversations,
            "mode": mode,
            "num_new": arguments.new_tokens,
            "repeats": arguments.repeats,
            **common.model_options(arguments),
        }
        for conversations in arguments.conversations
        for mode in common.modes(arguments)
    ]
    rows = common.measure_all(measure, cases, arguments)
    common.finish(report, rows, common.ratios(rows, ("conversations",), ("time", "peak_gb")))


if __name__ == "__main__":
    main()
