"""The worked examples of fine-tuning: the documented commands, with fewer rows and steps."""

import re
import runpy
import shlex
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT))

from finetune.example import LETTERS, draw  # noqa: E402

pytestmark = pytest.mark.slow

# What each command gets in addition to what is documented; later flags win.
QUIET = ["--report_to", "none", "--disable_tqdm", "True"]
SHORTER = {
    "draw": ["--train", "480", "--eval", "8", "--test", "24"],
    "finetune.train": ["--max_steps", "100", *QUIET],
    "finetune.train_dpo": ["--max_steps", "20", *QUIET],
}


def documented_commands(mark: str) -> list[list[str]]:
    """The commands of an example, without `python -m`."""
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    commands = [shlex.split(line) for line in block.splitlines()]
    assert all(command[:2] == ["python", "-m"] for command in commands)
    return [command[2:] for command in commands]


def shorter(command: list[str], folder: str) -> list[str]:
    """The command with fewer rows or steps, writing into another folder."""
    extra = [SHORTER[word] for word in command[:2] if word in SHORTER]
    return [re.sub("runs/(example|pairs)", folder, word) for word in command] + sum(extra, [])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("example", ["example", "check_data", "example", "train", "merge", "example"]),
        ("preference example", ["example", "example", "train_dpo", "merge", "example"]),
    ],
)
def test_the_documented_commands_change_what_nano_says(mark, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    modules, rights = [], []
    for command in documented_commands(mark):
        module, *arguments = shorter(command, str(tmp_path / "example"))
        modules.append(module)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        capsys.readouterr()
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code
        printed = capsys.readouterr().out
        if found := re.search(r"(\d+) of 24 right", printed):
            rights.append(int(found[1]))
    assert modules == [f"finetune.{name}" for name in expected]
    before, after = rights
    assert before <= 2 and after >= 12, f"{before} before, {after} after"


def test_drawn_rows_are_reproducible_and_never_overwritten(tmp_path):
    counts = {"train": 6, "test": 6}
    draw(tmp_path / "a", counts)
    draw(tmp_path / "b", counts)
    for name in counts:
        one, other = ((tmp_path / run / f"{name}.jsonl").read_text() for run in "ab")
        assert one == other and len(one.splitlines()) == 6
        assert len(list((tmp_path / "a" / name).glob("*.png"))) == 6
    assert (tmp_path / "a/train/0000.png").read_bytes() == (tmp_path / "b/train/0000.png").read_bytes()
    assert len(set(LETTERS.values())) == len(LETTERS)
    with pytest.raises(FileExistsError, match="choose another directory"):
        draw(tmp_path / "a", counts)
