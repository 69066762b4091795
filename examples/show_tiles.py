"""Draw what a model sees of a picture or a video: its tiles with their numbers, and the global view.

python examples/show_tiles.py examples/number.png --hd-num 9 --out tiles.png
"""

import argparse
from pathlib import Path

from internlm_xcomposer2.demo.tiles import show_tiles


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1]), help="folder or hub id")
    parser.add_argument("--hd-num", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=True)
    show_tiles(arguments.picture, config, arguments.hd_num).savefig(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
