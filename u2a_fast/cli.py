"""`u2a-fast train | evaluate | predict | compare | memory | doctor`."""

from __future__ import annotations

import logging
import sys
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import transformers
from jsonargparse import ArgumentParser, Namespace
from safetensors import SafetensorError

from .comparison import CompareOptions, compare
from .data.table_files import find_tables
from .data.tables import drop_missing_files
from .data_checks import PROBLEM_TYPES
from .evaluation import evaluate
from .lora_config import LoraConfig
from .memory import plan, print_plan
from .methods import load_model
from .methods.base import MultimodalModel
from .options import (
    DATA_HELP,
    TrainOptions,
    check_splits,
    data_digest,
    is_known,
    load_splits,
    option,
    refuse_empty,
    refuse_negative,
    refuse_of_tables,
)
from .prediction import check_output, predict_answers, samples_from, write_answers
from .processes import leave
from .reports import print_report
from .runs import data_of, modalities_of, refuse_model, run_of, seed_of
from .training import train

logger = logging.getLogger(__name__)

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


def run_train(options: TrainOptions) -> None:
    train(options)


def run_evaluate(options: EvaluateOptions) -> None:
    if is_known(options.data):
        refuse_of_tables(options)
    refuse_model(options.output_dir)
    model = load_model(options.model, encoders=options.encoders)
    run, same = run_of(options.model), is_same_table(options)
    seed = seed_of(options.model) if options.seed is None else options.seed
    table = {
        "label_separator": options.label_separator or run.get("label_separator"),
        "columns": options.columns,
        "usual": run.get("columns"),
        "task": task_of(model),
        "modalities": model.config.modalities,
    }
    splits = load_splits(options.data, seed, **table)
    check_splits(options.data, splits, ["test"])
    test = splits["test"]
    if same is False and Path(options.data).stem.casefold() == "test":
        from datasets import concatenate_datasets

        test = concatenate_datasets([*splits.values()])
    elif same is False or (same and seed != run.get("seed")):
        logger.warning(
            "the test split of %s, %d of %d rows, is not that of the run in %s, which may have trained on some of "
            "them: to score all rows of new data, name their file test%s",
            *(options.data, len(test), sum(map(len, splits.values()))),
            *(options.model, Path(options.data).suffix),
        )
    rows = evaluate(model, test, None, options.output_dir, options.batch_size, seed)
    print_report(rows, title=f"{options.model} on {options.data}, seed {seed}")


def is_same_table(options: EvaluateOptions) -> bool | None:
    """Whether one table is split into the rows that the model's run split it into; None where splits are given."""
    digest = data_digest(options.data)
    if digest is None or "all" not in find_tables(Path(options.data)):
        return None
    return digest == data_of(options.model)


def task_of(model: MultimodalModel) -> str:
    """The task under which a table's labels are read: the model's."""
    return next(task for task, problem_type in PROBLEM_TYPES.items() if problem_type == model.problem_type(None))


def run_predict(options: PredictOptions) -> None:
    if options.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, not {options.top_k}")
    usual, modalities = run_of(options.model).get("columns"), modalities_of(options.model)
    samples = samples_from(options.input, options.columns, usual, modalities)
    model = load_model(options.model, encoders=options.encoders)
    for modality in model.config.modalities:
        drop_missing_files(samples, modality, Path(options.input))
    check_output(options.output, options.input)
    write_answers(predict_answers(model, samples, options.batch_size, options.top_k), options.output)


def run_memory(options: MemoryOptions) -> None:
    if not options.encoders:
        raise ValueError('--encoders is needed, for example --encoders \'{"text": "bert-base-uncased"}\'')
    rows = plan(
        options.encoders,
        batch=options.batch,
        quantization=options.quantization,
        checkpointing=options.checkpointing,
        optimizer=options.optimizer,
        lora=LoraConfig(r=options.lora_r),
    )
    print_plan(rows)


def run_compare(options: CompareOptions) -> None:
    compare(options)


def run_doctor(options: DoctorOptions) -> None:
    from .doctor import print_findings, prove_kernels

    print_findings()
    if options.run and not prove_kernels():
        sys.exit("u2a-fast doctor: a kernel is wrong on this machine")


COMMANDS: dict[str, tuple[type, Any, str]] = {
    "train": (TrainOptions, run_train, "train on data with missing modalities and report every scenario"),
    "evaluate": (EvaluateOptions, run_evaluate, "report every scenario of a trained model"),
    "predict": (PredictOptions, run_predict, "label samples; any modality may be missing"),
    "compare": (CompareOptions, run_compare, "train all methods and the baselines over seeds, one table"),
    "memory": (MemoryOptions, run_memory, "bytes of a training step, beside PEFT's and full fine-tuning's"),
    "doctor": (DoctorOptions, run_doctor, "what this machine has and what is missing"),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="u2a-fast", description="Multimodal fine-tuning of frozen encoders.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (options, _, help) in COMMANDS.items():
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
        else:
            parser.add_argument(flag, type=hints[item.name], default=item.default, help=item.metadata["help"])
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; a mistake of the user is one sentence and exit code 1, not a traceback."""
    transformers.logging.set_verbosity_error()  # no report of the poolers that we drop on purpose
    transformers.logging.disable_progress_bar()
    try:
        parsed = build_parser().parse_args(arguments)
    except UnicodeDecodeError:  # which jsonargparse lets through
        sys.exit("u2a-fast: the file of --config is not UTF-8: save it as UTF-8")
    options, run, _ = COMMANDS[parsed.command]
    values: Namespace = parsed[parsed.command]
    try:
        run(options(**{item.name: values[item.name] for item in fields(options)}))
        leave()
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        sentence = next(iter(str(error).splitlines()), repr(error))  # Hugging Face's go on for paragraphs
        sys.exit(f"u2a-fast {parsed.command}: {sentence}")
    except RuntimeError as error:
        if "inline_container.cc" not in str(error) or "Reader" in str(error):  # which writes torch's files
            raise
        told = str(error).splitlines()[0].rpartition("] . ")[2]
        cure = "make sure that the disk is not full"
        sys.exit(f"u2a-fast {parsed.command}: torch could not write a file: {cure} ({told})")
