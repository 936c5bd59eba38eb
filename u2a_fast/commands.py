"""What the commands of cli.py do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError

from .data.table_files import find_tables
from .data.tables import drop_missing_files
from .data_checks import PROBLEM_TYPES
from .evaluation import evaluate
from .lora_config import LoraConfig
from .memory import plan, print_plan
from .methods import load_model
from .methods.base import MultimodalModel
from .options import CompareOptions, TrainOptions, check_splits, data_digest, is_known, load_splits, refuse_of_tables
from .prediction import check_output, predict_answers, refuse_top_k, samples_from, write_answers
from .processes import leave
from .reports import print_report
from .runs import data_of, modalities_of, refuse_model, run_of, seed_of

if TYPE_CHECKING:
    from .cli import DoctorOptions, EvaluateOptions, MemoryOptions, PredictOptions

logger = logging.getLogger(__name__)


def run_train(options: TrainOptions) -> None:
    from .training import train  # Trainer takes as long to import as all else

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
    refuse_top_k(options.top_k)
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
    from .comparison import compare

    compare(options)


def run_doctor(options: DoctorOptions) -> None:
    from .doctor import print_findings, prove_kernels

    print_findings()
    if options.run and not prove_kernels():
        sys.exit("u2a-fast doctor: a kernel is wrong on this machine")


COMMANDS: dict[str, Callable[[Any], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "compare": run_compare,
    "memory": run_memory,
    "doctor": run_doctor,
}


def run(name: str, options: Callable[[], Any]) -> None:
    """Make the options of a command and run it; a mistake of the user is one sentence and exit code 1."""
    transformers.logging.set_verbosity_error()  # no report of the poolers that we drop on purpose
    transformers.logging.disable_progress_bar()
    try:
        COMMANDS[name](options())
        leave()
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        sentence = next(iter(str(error).splitlines()), repr(error))  # Hugging Face's go on for paragraphs
        sys.exit(f"u2a-fast {name}: {sentence}")
    except RuntimeError as error:
        if "inline_container.cc" not in str(error) or "Reader" in str(error):  # which writes torch's files
            raise
        told = str(error).splitlines()[0].rpartition("] . ")[2]
        cure = "make sure that the disk is not full"
        sys.exit(f"u2a-fast {name}: torch could not write a file: {cure} ({told})")
