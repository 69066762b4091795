"""Two processes train the same as one, and the configurations for several devices are understood."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from finetune_helpers import losses, parse_arguments, run, weights_of, write_base, write_rows
from finetune_worker import batches
from helpers import HERE, ROOT, tiny_model
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from finetune.arguments import ModelArguments
from finetune.freezing import freeze

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "finetune" / "configs"

# Rows alternate, so that one process gets the pictures and the other the text.
IN_TURN = ("--train_sampling_strategy", "sequential", "--learning_rate", "0.01", "--max_steps", "3")
RUNS = {
    "full": (*IN_TURN, "--fix_vit", "False", "--gradient_checkpointing", "True"),
    "lora": (*IN_TURN, "--train", "lora", "--lora_r", "4", "--lora_dropout", "0", "--fix_sampler", "False"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_base(folder / "base")
    write_rows(folder / "rows")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What the two processes saved."""
    out = folder / "two"
    out.mkdir()
    job = {"base": str(folder / "base"), "rows": str(folder / "rows" / "rows.json"), "runs": RUNS}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "finetune_worker.py"), json.dumps(job), str(out)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


# ---- two processes ----


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(folder, ranks, name):
    """Without a search for unused weights, though one process never has a picture."""
    rows = folder / "rows" / "rows.json"
    output = folder / "one" / name
    alone = run(folder / "base", rows, output, *RUNS[name], "--per_device_train_batch_size", "2")
    assert len(losses(alone)) == 3 and losses(alone)[-1] < losses(alone)[0]
    for found in ranks:
        if found[name]:  # the first process logs
            assert found[name] == pytest.approx(losses(alone), abs=1e-4)
    assert ranks[0][name]
    assert alone.args.ddp_find_unused_parameters is False
    if name == "full":
        one, two = weights_of(output / "final"), weights_of(folder / "two" / name / "final")
        differing = sum((one[key] - two[key]).abs().gt(1e-4).sum() for key in one)
        assert differing < 0.01 * sum(value.numel() for value in one.values())


def test_a_sharded_model_is_saved_whole(folder, ranks):
    saved, expected = weights_of(folder / "two" / "whole"), tiny_model("2.5").state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)


def test_sharded_weights_get_the_gradients_of_whole_ones(ranks):
    """FSDP2 on gloo: ten tiles in one process, no picture in the other, the tower called once in each."""
    model = tiny_model("2.5", plora_dropout=0.0).train()
    freeze(model, ModelArguments("", fix_vit=False))
    expected = [model(**batch).loss for batch in batches(model)]
    (sum(expected) / 2).backward()
    for rank, loss in enumerate(expected):
        assert ranks[rank]["sharded"]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert ranks[rank]["sharded"]["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert ranks[rank]["sharded"]["calls"] == 2  # one in training, one in evaluation
    wanted = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    for found in ranks:
        assert found["sharded"]["gradients"].keys() == wanted.keys()
        for name, gradient in found["sharded"]["gradients"].items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_lora_on_a_sharded_model_in_bfloat16(ranks):
    for found in ranks:
        assert found["sharded lora"]["finite"]
        assert found["sharded lora"]["types"] == {torch.float32}
        assert found["sharded lora"]["loss"] == pytest.approx(found["sharded"]["loss"], rel=0.05)


# ---- configurations ----


def launch_arguments(name: str):
    """What `accelerate launch` makes of a configuration and the training command."""
    command = ["--config_file", str(CONFIGS / name), "-m", "finetune.train", "--bf16", "True"]
    return launch._validate_launch_command(launch.launch_command_parser().parse_args(command))[0]


def test_every_configuration_is_listed():
    names = {path.name for path in CONFIGS.iterdir()}
    assert names == {"ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml", "zero2.json", "zero3.json"}


def test_ddp_is_launched_in_several_processes():
    arguments = launch_arguments("ddp.yaml")
    assert arguments.multi_gpu and arguments.num_processes == 8 and arguments.module
    assert not arguments.use_fsdp and not arguments.use_deepspeed


def test_fsdp_wraps_the_layers_of_the_model(monkeypatch):
    arguments = launch_arguments("fsdp2.yaml")
    assert arguments.use_fsdp and not arguments.multi_gpu
    environment = prepare_multi_gpu_env(arguments)
    for name in list(os.environ):
        if name.startswith("FSDP_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing and type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # none
    assert "SHARDED" in str(plugin.state_dict_type)
    model = tiny_model("2.5")
    plugin.set_auto_wrap_policy(model)
    wrapped = {
        type(module).__name__
        for module in model.modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    assert wrapped == {"InternLM2DecoderLayer", "CLIPEncoderLayer"}


def deepspeed_reader() -> type:
    """`Trainer`'s reader of DeepSpeed's files, which transformers assembles only with DeepSpeed."""
    names = ("is_auto", "fill_match", "fill_only", "trainer_config_process", "trainer_config_finalize")
    methods = {name: vars(HfTrainerDeepSpeedConfig)[name] for name in names}
    return type("Reader", (HfDeepSpeedConfig,), {**methods, "mismatches": []})


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_its_numbers_from_the_command(stage, tmp_path):
    """As far as accelerate and transformers read the files; DeepSpeed itself is not needed for that."""
    arguments = launch_arguments(f"zero{stage}.yaml")
    assert arguments.use_deepspeed and arguments.deepspeed_config_file == f"finetune/configs/zero{stage}.json"
    assert (ROOT / arguments.deepspeed_config_file).is_file()
    plugin = DeepSpeedPlugin(hf_ds_config=str(ROOT / arguments.deepspeed_config_file), zero3_init_flag=False)
    assert plugin.zero_stage == stage
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--use_cpu", "True"]
    named = ["--model_name_or_path", "x", "--data_path", "x", "--output_dir", str(tmp_path)]
    training = parse_arguments([*named, *flags, "--bf16", "True"])[2]
    config = deepspeed_reader()(str(CONFIGS / f"zero{stage}.json"))
    config.trainer_config_process(training)
    model = SimpleNamespace(config=tiny_model("2.5").config)
    config.trainer_config_finalize(training, model, 10)
    assert "auto" not in json.dumps(config.config)
    assert config.config["train_micro_batch_size_per_gpu"] == 2 and config.config["train_batch_size"] == 6
    assert config.config["bf16"]["enabled"] is True and config.config["fp16"]["enabled"] is False
    assert config.is_zero3() == (stage == 3)
