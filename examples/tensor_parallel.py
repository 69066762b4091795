"""Ask a model that several processes share, each with a part of every layer of the decoder.

torchrun --nproc-per-node 2 examples/tensor_parallel.py

With GPUs, there is one process for each; without, they run on the CPU. All of them make the same calls.
"""

import os
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.distributed import DistributedConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main() -> None:
    share = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, distributed_config=share).eval()
    question, picture = "What number is printed in the picture?", str(HERE / "number.png")
    answer, _ = model.chat(tokenizer, question, picture, do_sample=False)
    if torch.distributed.get_rank() == 0:
        print(answer)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
