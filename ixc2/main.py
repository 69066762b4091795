"""The command `ixc2`: ask a model, write with it, adopt or describe a checkpoint, write it for engines."""

import argparse
import json
import os
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from ..configuration_internlm_xcomposer2 import FIRST_GENERATION, TEXT_SIZES
from . import ask, pages, serve
from .adapters import export_adapters
from .adopt import MAX_SHARD_SIZE, Adoption, adopt
from .examine import (
    FORMULAS,
    Findings,
    count_parameters,
    examine,
    picture_costs,
    quantisation_of,
    weight_memory,
)
from .fetch import HUBS, fetch, fetch_description
from .gguf import DEFAULT_TYPE, export
from .quantize import BITS, METHODS, quantize
from .quantize import MAX_SHARD_SIZE as SHARD_SIZE

PICTURE = "3840x2160"


def main(arguments: list[str] | None = None) -> int:
    """Run the command -> its exit status.

    It is 0 if all went well, 1 after an error, which is printed as one line, 2 for arguments that don't exist
    (argparse exits with it), and 130 if the user interrupted.
    """
    options = _parse(arguments)
    # Raise instead of dying at once, so that half-written files are removed.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"ixc2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ixc2: interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, where files that follow an option belong to those before it."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    files = getattr(options, "files", None)
    if unknown := [word for word in rest if files is None or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        getattr(options, files).extend(rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ixc2",
        description="Ask InternLM-XComposer2 models, write with them, and prepare their checkpoints",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ask.add_commands(commands)
    pages.add_commands(commands)
    serve.add_commands(commands)
    command = commands.add_parser(
        "adopt",
        help="turn a published checkpoint into a directory that transformers 5 loads",
        description="Write a directory that any user of transformers 5 can load. The source is never "
        "changed. Running it again checks the directory and completes it.",
    )
    _add_source(command)
    command.add_argument("target", metavar="DST", nargs="?", help="default: ./NAME-ixc2")
    command.add_argument("--convert", action="store_true", help="write .bin weights as safetensors")
    command.add_argument(
        "--copy",
        action="store_true",
        help="copy the weights instead of linking them; writing to a linked file changes it in both places",
    )
    command.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model, if SRC has none")
    command.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help="of a converted file; default: 5GB"
    )
    command.set_defaults(run=_adopt)
    command = commands.add_parser(
        "gguf",
        help="write a checkpoint as GGUF, for llama.cpp",
        description="Write a directory that internlm_xcomposer2.from_gguf loads. The source is never "
        "changed. Running it again finds everything in place, or writes it again if something has changed.",
    )
    _add_source(command)
    command.add_argument("target", metavar="DST", nargs="?", help="default: ./NAME-TYPE-gguf")
    command.add_argument(
        "--type",
        default=DEFAULT_TYPE,
        help=f"of the decoder's weights: f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0 or any other that llama.cpp's "
        f"quantiser knows; default: {DEFAULT_TYPE}",
    )
    command.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model, if SRC has none")
    command.set_defaults(run=_gguf)
    _add_quantize(commands)
    command = commands.add_parser("inspect", help="describe a checkpoint by the headers of its weights")
    _add_source(command)
    command.add_argument("--json", action="store_true", help="print everything as one JSON object")
    command.add_argument(
        "--picture", type=_size, default=PICTURE, metavar="WxH", help=f"in pixels; default: {PICTURE}"
    )
    command.set_defaults(run=_inspect)
    command = commands.add_parser(
        "adapters",
        help="export the task adapters as LoRA for vLLM",
        description="Write DST/write and DST/web, which vLLM serves with --lora-modules.",
    )
    _add_source(command)
    command.add_argument("target", metavar="DST", help="a new directory")
    command.set_defaults(run=_export_adapters)
    return parser


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "quantize",
        help="write a checkpoint with the decoder's weights in 4 or 8 bits",
        description="Write a complete directory whose decoder has weights of 4 or 8 bits, in GPTQ's layout. "
        "The source is never changed. Vision tower, projector, low-rank weights, embeddings and output head "
        "stay as they are.",
    )
    _add_source(command)
    command.add_argument("target", metavar="DST", help="a new directory")
    command.add_argument("--bits", type=int, choices=BITS, default=BITS[0], help="default: 4")
    command.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="inputs that share a scale, -1 for all; default: 128 or all",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        help="how scales are chosen; default: hqq in 4 bits with torchao, or round",
    )
    command.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model, if SRC has none")
    command.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help="of a file; default: 2GB"
    )
    command.set_defaults(run=_quantize)


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", help="a checkpoint's directory or hub id (owner/name)")
    command.add_argument("--from", dest="hub", choices=HUBS, default=HUBS[0], help="the hub of an id")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--subfolder", default="", help="where the checkpoint is in SRC")
    command.add_argument("--num-attention-heads", type=int, metavar="N", help="if config.json doesn't say")


def _size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` -> (height, width)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or "0" in found.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as {PICTURE}")
    return int(found[2]), int(found[1])


# ---- adopt ----


def default_target(source: str, subfolder: str, ending: str = "ixc2") -> Path:
    """`NAME-ixc2` in the working directory; NAME is the last part of the source's path or id."""
    return Path.cwd() / "-".join([Path(os.path.realpath(source)).name, *Path(subfolder).parts, ending])


def _adopt(options: argparse.Namespace) -> None:
    source = fetch(options.source, options.hub, options.revision, options.subfolder)
    adoption = adopt(
        source,
        options.target or default_target(options.source, options.subfolder),
        convert_bin=options.convert,
        copy=options.copy,
        tokenizer=options.tokenizer,
        max_shard_size=options.max_shard_size,
        num_attention_heads=options.num_attention_heads,
    )
    print("\n".join(describe(adoption.findings)))
    for note in adoption.notes:
        print(f"note: {note}")
    _print_what_was_done(adoption)


def _print_what_was_done(adoption: Adoption) -> None:
    target = adoption.target
    if adoption.written or adoption.removed:
        print(f"wrote {len(adoption.written)} files into {target}")
    else:
        print(f"{target} was adopted before, and everything is in place")
    for name in adoption.removed:
        print(f"removed {name}, which is no longer needed")
    for name in adoption.kept:
        print(f"kept {name}, which was changed after it was written; delete it and run again to restore it")
    print(f"load it: AutoModel.from_pretrained({str(target)!r}, trust_remote_code=True)")


# ---- adapters ----


def _export_adapters(options: argparse.Namespace) -> None:
    source = fetch(options.source, options.hub, options.revision, options.subfolder)
    for mode, rank in export_adapters(source, options.target, options.num_attention_heads).items():
        print(f"wrote {options.target}/{mode} (rank {rank})")


# ---- gguf ----


def _gguf(options: argparse.Namespace) -> None:
    source = fetch(options.source, options.hub, options.revision, options.subfolder)
    exported = export(
        source,
        options.target or default_target(options.source, options.subfolder, f"{options.type}-gguf"),
        options.type,
        tokenizer=options.tokenizer,
        num_attention_heads=options.num_attention_heads,
    )
    print("\n".join(describe(exported.findings)))
    for note in exported.notes:
        print(f"note: {note}")
    for fallback in exported.fallbacks:
        print(f"fallback: {fallback}")
    target = exported.target
    if exported.written:
        print(f"wrote {len(exported.written)} files into {target}")
    else:
        print(f"{target} was exported before, and everything is in place")
    print(f"load it: internlm_xcomposer2.from_gguf({str(target)!r})")


# ---- quantize ----


def _quantize(options: argparse.Namespace) -> None:
    source = fetch(options.source, options.hub, options.revision, options.subfolder)
    notes = quantize(
        source,
        options.target,
        bits=options.bits,
        group_size=options.group_size,
        method=options.method,
        tokenizer=options.tokenizer,
        max_shard_size=options.max_shard_size,
        num_attention_heads=options.num_attention_heads,
    )
    for note in notes:
        print(f"note: {note}")
    print(f"load it: AutoModel.from_pretrained({str(options.target)!r}, trust_remote_code=True)")


# ---- inspect ----


def _inspect(options: argparse.Namespace) -> None:
    source, headers = fetch_description(options.source, options.hub, options.revision, options.subfolder)
    findings = examine(source, options.num_attention_heads, headers)
    if options.json:
        print(json.dumps(report(findings, options.picture), indent=2, ensure_ascii=False))
    else:
        lines = [*describe(findings), *(f"note: {note}" for note in findings.notes)]
        for what, names in (("missing", findings.missing), ("unknown", findings.unknown)):
            lines += [f"{len(names)} tensors {what}: {', '.join(names)}"] if names else []
        lines += [f"can't be used: {fault}" for fault in findings.faults.values()]
        print("\n".join([*lines, "", *_tables(findings, options.picture)]))
    if findings.faults:
        raise ValueError(f"{len(findings.faults)} files can't be used: {'; '.join(findings.faults.values())}")


def describe(findings: Findings) -> list[str]:
    """A checkpoint described in plain words."""
    config, text = findings.config, findings.config.text_config
    kind = "tiles" if config.is_tiled else "one square"
    num_bytes = sum(header.num_bytes for header in findings.headers.values())
    heads = f"{text.num_attention_heads} heads, {text.num_key_value_heads} key-value heads"
    lines = [
        f"{findings.source}: InternLM-XComposer version {config.version}",
        f"pictures: {kind} of {config.img_size} px, tower of {config.vision_config.num_hidden_layers} layers "
        f"{config.vision_config.hidden_size} wide",
        f"decoder: {text.num_hidden_layers} layers {text.hidden_size} wide, {heads}, "
        f"vocabulary {text.vocab_size}",
        *_low_rank_lines(config),
        f"weights: {len(findings.paths)} {findings.paths[0].suffix} file(s), {_readable(num_bytes)}, "
        f"{str(findings.dtype).removeprefix('torch.')}",
    ]
    if config.video_memory_size:
        lines.append(f"video memory projector: {config.video_memory_size} wide (OmniLive)")
    if "score.weight" in findings.headers:
        lines.append("score head: this is a reward model")
    if packed := quantisation_of(findings):
        lines.append(
            f"quantised: {packed['num_linears']} linears in {packed['bits']} bits by "
            f"{packed['method'].upper()}, groups of {packed['group_size']}"
        )
    return lines


def _low_rank_lines(config) -> list[str]:
    """The low-rank weights of a checkpoint in plain words."""
    if config.version == FIRST_GENERATION:
        lora = config.internlm_lora
        if lora is None:
            return ["low-rank weights: none, or folded"]
        names = ", ".join(config.learn_param)
        return [f"low-rank weights: rank {lora['lora_r']}, alpha {lora['lora_alpha']}, on {names}"]
    text = config.text_config
    adapters = ", ".join(f"{name} {rank}" for name, rank in text.task_adapters.items())
    return [
        f"PLoRA: rank {text.plora_rank}, alpha {text.plora_alpha}; "
        f"on wqkv rank {text.plora_wqkv_rank}, alpha {text.plora_wqkv_alpha}",
        f"task adapters: {adapters or 'none'}",
    ]


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _tables(findings: Findings, size: tuple[int, int]) -> list[str]:
    counts = count_parameters(findings)
    lines = [f"{part:24}{count:>16,} parameters" for part, count in counts.items()]
    lines += [f"{'total':24}{sum(counts.values()):>16,} parameters", ""]
    for name, num_bytes in weight_memory(findings).items():
        lines.append(f"weights, {name:15}{_readable(num_bytes):>16}")
    lines += ["", f"a picture of {size[1]}x{size[0]} in 2-byte values:"]
    lines.append(f"{'hd_num':>8}{'grid':>8}{'tokens':>9}{'cache':>12}{'activations':>14}")
    for cost in picture_costs(findings.config, size):
        grid = f"{cost.grid[0]}x{cost.grid[1]}"
        numbers = f"{_readable(cost.cache_bytes):>12}{_readable(cost.activation_bytes):>14}"
        lines.append(f"{cost.hd_num or '-':>8}{grid:>8}{cost.tokens:>9}{numbers}")
    return [*lines, "", *(f"{name}: {formula}" for name, formula in FORMULAS.items())]


def report(findings: Findings, size: tuple[int, int]) -> dict:
    """Everything that `inspect` says, for machines; bytes and pixels as integers."""
    config, text = findings.config, findings.config.text_config
    counts = count_parameters(findings)
    return {
        "source": str(findings.source),
        "version": config.version,
        "format": findings.paths[0].suffix.removeprefix("."),
        "files": [path.name for path in findings.paths],
        "dtype": str(findings.dtype).removeprefix("torch."),
        "sizes": {
            "tile_size": config.img_size,
            "vision_layers": config.vision_config.num_hidden_layers,
            "vision_width": config.vision_config.hidden_size,
            "projector_input_size": getattr(config, "projector_input_size", None),
            "video_memory_size": config.video_memory_size,
            **{name: getattr(text, name, None) for name in (*TEXT_SIZES, "plora_alpha", "plora_wqkv_alpha")},
        },
        "task_adapters": getattr(text, "task_adapters", {}),
        "quantisation": quantisation_of(findings),
        "has_score_head": "score.weight" in findings.headers,
        "parameters": {**counts, "total": sum(counts.values())},
        "weight_bytes": weight_memory(findings),
        "picture": {"height": size[0], "width": size[1]},
        "pictures": [asdict(cost) for cost in picture_costs(config, size)],
        "formulas": FORMULAS,
        "notes": list(findings.notes),
        "missing": list(findings.missing),
        "unknown": list(findings.unknown),
        "faults": findings.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
