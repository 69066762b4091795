"""What each turn of a conversation about one picture costs, with one beam and with three.

    python benchmarks/chat_turns.py
    python benchmarks/chat_turns.py --tiles 15 --turns 2 --beams 1

Every turn is one call of `chat` with the same picture and the history that the previous turn returned, with
greedy decoding and a fixed number of new tokens. The first token counts everything before it: preparing the
picture, the tower and the prefill. The naive way passes `reuse=False` and a plain history, so that every turn
starts from scratch, expands beams before the prefill, materialises attention and computes logits everywhere.
The last line is JSON.
"""

import argparse
import time

import common

QUESTIONS = (
    "What does the picture show?",
    "How many are there?",
    "What is at the left?",
    "Which colour is it?",
    "What is written below?",
)


def measure(turns: int, beams: int, mode: str, tiles: int, num_new: int, size: str, device: str, dtype: str):
    """A conversation in one mode: seconds to the first token and in total, turn by turn."""
    naive = mode == "naive"
    model = common.build_model(size, naive=naive, device=device, dtype=dtype)
    tokenizer = common.load_tokenizer()
    picture = common.picture_for(size)
    settings = {"do_sample": False, "num_beams": beams, "max_new_tokens": num_new, "min_new_tokens": num_new}
    settings |= {"hd_num": tiles, **(common.naive_chat() if naive else {})}
    model.chat(tokenizer, "Warm up.", **{**settings, "num_beams": 1, "max_new_tokens": num_new})
    rows, history = [], []
    for number in range(turns):
        marks = common.Marks(device)
        _, history = model.chat(
            tokenizer,
            QUESTIONS[number % len(QUESTIONS)],
            [picture],
            history=history,
            logits_processor=[marks],
            **settings,
        )
        total = time.perf_counter() - marks.start
        rows.append({"first_token": round(marks.first, 4), "total": round(total, 4)})
        history = [tuple(turn) for turn in history] if naive else history
    return {"turns": rows}


def parse_arguments() -> argparse.Namespace:
    result = common.parser(__doc__)
    result.add_argument("--turns", type=int, default=5)
    result.add_argument("--beams", type=int, nargs="*", default=[1, 3])
    result.add_argument("--tiles", type=int, default=6, help="the most local tiles of the picture")
    result.add_argument("--new-tokens", type=int, default=8)
    return result.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = common.begin("chat_turns", arguments)
    rows = []
    for beams in arguments.beams:
        for mode in common.modes(arguments):
            found = common.measure_apart(
                measure,
                arguments,
                turns=arguments.turns,
                beams=beams,
                mode=mode,
                tiles=arguments.tiles,
                num_new=arguments.new_tokens,
                **common.model_options(arguments),
            )
            for number, turn in enumerate(found["turns"], start=1):
                rows.append(
                    {"mode": mode, "beams": beams, "turn": number, **turn, "peak_gb": found["peak_gb"]}
                )
                common.print_row(rows[-1])
    common.finish(report, rows, common.ratios(rows, ("beams", "turn"), ("first_token", "total")))


if __name__ == "__main__":
    main()
