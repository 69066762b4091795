"""VLMEvalKit with this package: its own adapters, unchanged, ask models that this package runs.

    python evaluation/vlmevalkit.py --model XComposer2d5 --data MMStar
    python evaluation/vlmevalkit.py --config config.json --work-dir runs/out

All arguments are those of VLMEvalKit's `run.py`. The adapters load with `trust_remote_code=True`; the
package, imported first, takes the place of a checkpoint's own code. Without a GPU their `.cuda()` leaves
models and tensors where they are. Needs `pip install ms-vlmeval` in an environment of its own.
"""

import runpy
import sys

import internlm_xcomposer2  # noqa: F401  its import registers the classes
import torch


def stay(self, *args, **kwargs):
    """Instead of `cuda` on a machine without one."""
    return self


def main() -> None:
    if not torch.cuda.is_available():
        torch.nn.Module.cuda = torch.Tensor.cuda = stay
    sys.argv[0] = "vlmeval.run"
    runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
