"""`u2a-fast train | evaluate | predict | compare | memory | doctor`: what each takes. What it does is in commands.py.

Of what is heavy torch alone is imported before a command is known: all libraries take a slow machine 16 seconds.
"""

from __future__ import annotations

import sys
import typing
from dataclasses import dataclass, fields

from jsonargparse import ArgumentParser, Namespace

from .options import DATA_HELP, CompareOptions, TrainOptions, option, refuse_empty, refuse_negative

COLUMNS_HELP = "{our column: the table's}, where it has other names; those of training are known where it has them"
ENCODERS_HELP = "{modality: hub id or folder} of encoders that have moved; None: where they were"


@dataclass(frozen=True)
class EvaluateOptions:
    model: str = option("out", "folder of a trained model")
    data: str = option("emoji", DATA_HELP)
    encoders: dict[str, str] | None = option(None, ENCODERS_HELP)
    columns: dict[str, str] | None = option(None, COLUMNS_HELP)
    label_separator: str | None = option(None, "what stands between several labels in one cell; None: as in training")
    output_dir: str = option("out/evaluation", "where report.csv and the pictures go")
    batch_size: int = option(32, "how many samples a pass takes")
    seed: int | None = option(None, "seed of split and missing tables; None: the model's own, or 0 where none is known")

    def __post_init__(self) -> None:
        refuse_empty(self)
        refuse_negative(self, ("seed",))


@dataclass(frozen=True)
class PredictOptions:
    model: str = option("out", "folder of a trained model")
    input: str = option("-", "a table (csv, tsv, jsonl, parquet), or - for JSON lines on the standard input")
    output: str = option("-", "where the answers go: a .csv, any other name for JSON lines, - the standard output")
    encoders: dict[str, str] | None = option(None, ENCODERS_HELP)
    columns: dict[str, str] | None = option(None, COLUMNS_HELP)
    top_k: int = option(3, "how many classes are listed with their probabilities")
    batch_size: int = option(32, "how many samples a pass takes")

    def __post_init__(self) -> None:
        refuse_empty(self)


@dataclass(frozen=True)
class MemoryOptions:
    encoders: dict[str, str] = option(None, '{modality: hub id or folder}, for example {"text": "bert-base-uncased"}')
    batch: int = option(32, "how many samples a step takes, every modality present")
    quantization: str | None = option(None, "int8, int8_w8a8 or nf4: how frozen weights are stored")
    checkpointing: bool = option(False, "keep only what enters each block")
    optimizer: str = option("adamw", "adamw or adamw_8bit")
    lora_r: int = option(8, "rank of the adapters")


@dataclass(frozen=True)
class DoctorOptions:
    run: bool = option(False, "also prove every kernel against fp64, in less than a minute")


COMMANDS: dict[str, tuple[type, str]] = {
    "train": (TrainOptions, "train on data with missing modalities and report every scenario"),
    "evaluate": (EvaluateOptions, "report every scenario of a trained model"),
    "predict": (PredictOptions, "label samples; any modality may be missing"),
    "compare": (CompareOptions, "train all methods and the baselines over seeds, one table"),
    "memory": (MemoryOptions, "bytes of a training step, beside PEFT's and full fine-tuning's"),
    "doctor": (DoctorOptions, "what this machine has and what is missing"),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="u2a-fast", description="Multimodal fine-tuning of frozen encoders.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (options, help) in COMMANDS.items():
        commands.add_subcommand(name, _options_parser(options), help=help)
    return parser


def _options_parser(options: type) -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    hints = typing.get_type_hints(options)
    for item in fields(options):
        flag = "--" + item.name.replace("_", "-")
        if hints[item.name] is bool:
            parser.add_argument(flag, action="store_true", help=item.metadata["help"])
        else:  # of a string that may be None, jsonargparse would read ~ and # as YAML does
            kind = str if hints[item.name] == (str | None) else hints[item.name]
            parser.add_argument(flag, type=kind, default=item.default, help=item.metadata["help"])
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; a mistake of the user is one sentence and exit code 1, not a traceback."""
    try:
        parsed = build_parser().parse_args(arguments)
    except UnicodeDecodeError:  # which jsonargparse lets through
        sys.exit("u2a-fast: the file of --config is not UTF-8: save it as UTF-8")
    values: Namespace = parsed[parsed.command]
    options, _ = COMMANDS[parsed.command]
    from . import commands

    commands.run(parsed.command, lambda: options(**{item.name: values[item.name] for item in fields(options)}))
