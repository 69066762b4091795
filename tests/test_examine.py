"""What `ixc2 inspect` says about a checkpoint, local or remote."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import (
    FULL_SIZES,
    HERE,
    ROOT,
    flat_config,
    full_size_config,
    full_size_shapes,
    published_source,
    published_weights,
    read_json,
    tiny_model,
    write_published,
)
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import TensorHeader
from internlm_xcomposer2.ixc2 import fetch as fetching
from internlm_xcomposer2.ixc2.examine import (
    NF4_BYTES,
    count_parameters,
    examine,
    picture_costs,
    weight_memory,
)
from internlm_xcomposer2.ixc2.main import main
from packers import pack_checkpoint


@pytest.mark.parametrize("key", FULL_SIZES)
def test_full_sizes_are_known_from_the_headers_alone(tmp_path, key):
    config = full_size_config(key)
    headers = {
        name: TensorHeader(shape, torch.bfloat16, Path("model.safetensors"))
        for name, shape in full_size_shapes(key).items()
    }
    findings = examine(tmp_path, headers=headers)
    assert not findings.missing and not findings.unknown
    found = findings.config
    assert found.version == config.version and found.img_size == config.img_size
    assert found.vision_config.to_dict() == config.vision_config.to_dict()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "plora_rank", "task_adapters")
    assert [getattr(found.text_config, name) for name in sizes] == [
        getattr(config.text_config, name) for name in sizes
    ]
    counts = count_parameters(findings)
    recorded = read_json(HERE / "golden" / "state_dict_fullsize.json")[key]
    assert sum(counts.values()) == recorded["params"]
    assert counts["PLoRA"] == recorded["plora"] and counts["vision tower"] == recorded["vit"]
    adapters = sum(count for part, count in counts.items() if part.startswith("task adapter"))
    assert adapters == recorded["task_loras"]
    memory = weight_memory(findings)
    assert memory["stored"] == memory["bfloat16"] == 2 * recorded["params"]
    plain = memory["bfloat16"] - memory["int8"]
    assert memory["nf4"] == pytest.approx(memory["bfloat16"] - (2 - NF4_BYTES) * plain)


def test_packed_weights_count_as_what_they_unpack_to(tmp_path):
    model = tiny_model("2.5")
    weights, _ = pack_checkpoint(published_weights(model), "gptq")
    published_source(tmp_path, weights=weights)
    assert sum(count_parameters(examine(tmp_path)).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_the_cache_is_as_large_as_estimated(version):
    model = tiny_model(version)
    cost = picture_costs(model.config, (56, 56), num_bytes=4)[0]
    assert cost.tokens == model.num_image_tokens(*cost.grid)
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, cost.tokens), 60), use_cache=True).past_key_values
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert num_bytes == cost.cache_bytes > 0


def test_what_is_printed(tmp_path, capsys):
    model = published_source(tmp_path)
    assert main(["inspect", str(tmp_path), "--picture", "100x200"]) == 0
    text = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in model.parameters())
    assert "InternLM-XComposer version 2.5" in text and "tiles of 56 px" in text
    assert re.search(rf"^total +{total:,} parameters$", text, re.MULTILINE)
    assert "a picture of 100x200" in text and "2 x layers x key_value_heads" in text
    assert main(["inspect", str(tmp_path), "--json", "--picture", "100x200"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["total"] == total and report["version"] == "2.5"
    assert report["picture"] == {"height": 200, "width": 100}
    assert [row["hd_num"] for row in report["pictures"]] == [1, 6, 12, 24, 36, 55]
    assert report["sizes"]["num_attention_heads"] == 4 and report["quantisation"] is None
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), "--picture", "0x5"])
    assert "is not a size such as" in capsys.readouterr().err


def test_the_documentation_shows_what_is_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["inspect", "."]) == 0
    shown = (
        (ROOT / "docs" / "adopting.md")
        .read_text(encoding="utf-8")
        .split("ixc2 inspect .\n```\n\nIt prints:\n\n```\n")[1]
    )
    assert shown.startswith(capsys.readouterr().out + "```\n")


# ---- hubs ----


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as is needed to read the repositories `owner/*`, folders of one directory."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send([row for row in self.rows(self.path.split("/")[4]) if row["path"] in body])

    def log_message(self, *_):
        pass

    def rows(self, repository: str) -> list[dict]:
        files = sorted((self.server.folder / repository).iterdir())
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "1" * 40}
            for file in files
        ]

    def answer(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/owner/(\w+)/tree/\w+", path):
            return self.send(self.rows(found[1]))
        if found := re.fullmatch(r"/api/models/owner/(\w+)(/revision/\w+)?", path):
            siblings = [{"rfilename": row["path"]} for row in self.rows(found[1])]
            return self.send({"id": f"owner/{found[1]}", "sha": "0" * 40, "siblings": siblings})
        found = re.fullmatch(r"/owner/(\w+)/resolve/\w+/([\w.-]+)", path)
        if found and (self.server.folder / found[1] / found[2]).is_file():
            return self.send_file(self.server.folder / found[1] / found[2])
        self.send({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def send(self, content, status: int = 200, headers: dict | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.reply(json.dumps(content).encode(), status, headers)

    def send_file(self, file: Path) -> None:
        content, status = file.read_bytes(), 200
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET":
            self.server.served.append((file, len(content)))
        self.reply(content, status, headers)

    def reply(self, content: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    """A server for the folders in `tmp_path / "hub"`; `served` lists files and numbers of bytes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.served = tmp_path / "hub", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


COMMANDS = """
import sys
from internlm_xcomposer2.ixc2.main import main
for kind in ("safetensors", "bin"):
    assert main(["inspect", f"owner/{kind}", "--json"]) == 0
print("inspected", flush=True)
sys.stdin.readline()
for kind in ("safetensors", "bin"):
    assert main(["adopt", f"owner/{kind}", *(["--convert"] if kind == "bin" else [])]) == 0
"""


@pytest.mark.slow
def test_hub_ids_are_inspected_by_headers_and_adopted_whole(tmp_path, hub):
    model = tiny_model("2.5", vocab_size=40000, image_token_id=4)
    weights = published_weights(model)
    for kind in ("safetensors", "bin"):
        write_published(hub.folder / kind, weights, flat_config(model), kind=kind, shards=2)
        shutil.copy(ROOT / "tokenizer.model", hub.folder / kind)
        (hub.folder / kind / "large.zip").write_bytes(b"0" * 1000)
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
    settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS],
        env={**os.environ, **settings},
        cwd=tmp_path,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    printed = ""
    while not printed.endswith("inspected\n"):
        line = process.stdout.readline()
        assert line, "the commands ended early"
        printed += line
    read = sum(count for file, count in hub.served if file.name.startswith(("model-", "pytorch_model-")))
    process.communicate("go on\n", timeout=200)
    assert process.returncode == 0
    total = sum(parameter.numel() for parameter in model.parameters())
    assert printed.count(f'"total": {total}') == 2
    assert 0 < read < sum(value.nbytes for value in weights.values()) / 2  # of both repositories
    assert "large.zip" not in {file.name for file, _ in hub.served}
    for kind in ("safetensors", "bin"):
        assert len(list((tmp_path / f"{kind}-ixc2").glob("model-*.safetensors"))) == 2
        assert examine(tmp_path / f"{kind}-ixc2").config.version == "2.5"


def test_a_hub_that_lacks_the_repository_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("inspect", "adopt"):
        assert main([command, "owner/nothing"]) == 1
        error = capsys.readouterr().err
        assert "owner/nothing is not a directory here, and can't be downloaded from huggingface" in error
        assert "--from modelscope" in error
    assert main(["inspect", "no such place"]) == 1
    assert "neither a directory nor the id of a repository" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_modelscope_is_used_on_request(tmp_path, monkeypatch, capsys):
    published_source(tmp_path / "cache")
    calls = []

    def snapshot_download(repository, revision=None, allow_patterns=None):
        calls.append((repository, revision, allow_patterns))
        return str(tmp_path / "cache")

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", module)
    monkeypatch.chdir(tmp_path)
    assert main(["adopt", "owner/name", "--from", "modelscope", "--revision", "v1"]) == 0
    assert {(repository, revision) for repository, revision, _ in calls} == {("owner/name", "v1")}
    assert (tmp_path / "name-ixc2" / "config.json").is_file()
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert main(["inspect", "owner/name", "--from", "modelscope"]) == 1
    assert "pip install modelscope" in capsys.readouterr().err


def test_files_of_a_subfolder_are_requested_by_its_name(tmp_path, monkeypatch):
    published_source(tmp_path / "cache" / "base")
    asked = []

    def snapshot_download(repository, revision=None, allow_patterns=None):
        asked.extend(allow_patterns)
        return str(tmp_path / "cache")

    monkeypatch.setattr(fetching, "snapshot_download", snapshot_download)
    assert fetching.fetch("owner/name", subfolder="base") == tmp_path / "cache" / "base"
    assert all(pattern.startswith("base/") for pattern in asked) and "base/*model*.bin" not in asked
