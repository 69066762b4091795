"""What the configuration says once for all its copies."""

import logging
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT
from internlm_xcomposer2.configuration_internlm_xcomposer2 import TESTED_TRANSFORMERS, warn_of_untested


@pytest.fixture
def warnings_said(caplog, monkeypatch):
    """What the package's logger says; by itself it doesn't pass that on to the root logger."""
    logger = logging.getLogger("internlm_xcomposer2")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def test_an_untested_release_is_named_once(warnings_said):
    for _ in range(2):
        warn_of_untested("97.31.1", "97.30")
    for seen in ("97.30.0", "97.30.9", "97.29.4", "96.99.0"):
        warn_of_untested(seen, "97.30")
    (record,) = [record for record in warnings_said.records if "97." in record.message]
    assert record.levelno == logging.WARNING
    assert "97.31.1 is newer than 97.30" in record.message
    assert 'pip install "transformers==97.30.*"' in record.message


IMPORT = """
import transformers
transformers.__version__ = "97.31.1"
from transformers.dynamic_module_utils import get_class_from_dynamic_module as get
import sys
for path in sys.argv[1:]:
    get("configuration_internlm_xcomposer2.InternLMXcomposer2Config", path, trust_remote_code=True)
"""


@pytest.mark.slow
def test_remote_code_warns_too_and_once_for_all_its_copies(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for file in ROOT.glob("*.py"):
            (tmp_path / name / file.name).symlink_to(file)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "one"), str(tmp_path / "other")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(re.findall(f"97.31.1 is newer than {re.escape(TESTED_TRANSFORMERS)}", run.stderr)) == 1


def test_the_tested_release_is_that_of_the_lock():
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    locked = re.findall(r"^transformers==(\d+\.\d+)", lock, re.MULTILINE)
    assert TESTED_TRANSFORMERS in locked
