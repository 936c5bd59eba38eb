"""The main job: data, encoders and a method in; a checkpoint, a report and a model card out."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainerState, TrainingArguments, set_seed

from .allocator import keep_freed_memory
from .card import write_card
from .data import HostCopies, MissingPattern, MultimodalCollator, with_missing
from .data.labels import label_names, labels_of, task_of
from .data.presence import undecoded, warn_of_cuts
from .data_checks import PROBLEM_TYPES, check_data, numbered_alike, warn_of_holes
from .evaluation import evaluate
from .kernels import keep_turned_weights
from .label_checks import labels_in_words, warn_of_classes
from .losses import StandardLabels, balanced
from .methods import METHODS, LateFusion
from .methods.base import MultimodalModel
from .methods.loading import overlay
from .methods.saved import saved_state
from .metrics import UNBOUNDED, refuse_not_finite, score
from .options import (
    TrainOptions,
    check_splits,
    choices,
    default_encoders,
    is_known,
    load_sources,
    read_whole,
    refuse_of_tables,
    settled,
)
from .processes import check_shards, collect_for_evaluation, for_main, is_main, least, on_cpu, processes, share
from .quantization import fast_dtype, read_quantization
from .reports import Row, plot_curves, print_report, with_baseline, write_report
from .runs import BESIDE, as_begun, check_directory, claim_directory, split_before

logger = logging.getLogger(__name__)

OWN = "own data"  # what splits are called that were given without a name
STATE = "trainer_state.json"
WORKERS_BESIDE_GPU = 2
SAMPLE_BYTES = 150 * 2**20  # kept for backward by a sample, ViT-B + BERT-base with adapters, counted generously


def train(options: TrainOptions, splits: Mapping[str, Any] | None = None) -> list[Row]:
    """Train, evaluate every scenario, and write checkpoint, `report.csv`, `report.png`, `curves.png` and `README.md`.

    Under `accelerate launch` or `torchrun` the processes share each step's batch; the first one writes.

    Args:
        splits: `{"train", "validation", "test"}` of Hugging Face data sets or streams in place of `options.data`, with
            columns as `load_table` gives them. They are your own data, of which nothing is taken away without a
            `missing_rate`, and `options.data` is their name in messages and card, unless it is one that we know. A
            stream needs `max_steps`, features that name the classes, and two modalities.

    Raises:
        ValueError: an unknown method, data that it cannot be trained on, or an output directory that holds another run
            or model.
    """
    if options.method not in METHODS:
        raise ValueError(f"unknown method {options.method!r}: use one of {', '.join(METHODS)}")
    if splits is not None and is_known(options.data):  # it was not asked for, and its recipe is of other rows
        options = replace(options, data=OWN)
    check_directory(options)
    if splits is None:
        with processes().local_main_process_first():  # encoders are unpacked once
            splits, sources = load_sources(options)
        return run_once(options, splits, sources)
    refuse_of_tables(options)
    check_splits(options.data, splits)
    splits = numbered_alike(options.data, read_whole(splits, options.all_absent))
    return run_once(options, splits, dict(options.encoders or default_encoders(options, splits)))


def run_once(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> list[Row]:
    """`train` on splits and encoders that are loaded already; what is refused is refused before anything is written."""
    checkpoint = check_directory(options)
    check_data(options, splits, sources)
    chosen = settled(as_begun(options), splits)
    trainer = make_trainer(METHODS[options.method], chosen, splits, sources, Path(options.output_dir))
    check_shards(trainer, checkpoint)
    processes().wait_for_everyone()  # all have looked at the folder
    if is_main():
        said = choices(options, chosen, list(sources)), labels_in_words(splits["train"])
        print(*filter(None, said), trainer.train_dataset.summary(), sep="\n")
        warn_of_classes(options.data, splits)
        warn_of_holes(options, chosen, sources)
        if hasattr(splits["train"], "__len__"):
            warn_of_cuts(trainer.model.processors, training_split(chosen, splits))
        trainer.model.print_trainable_parameters()
        claim_directory(options, chosen)
    model = run_trainer(trainer, checkpoint)
    rows = evaluate(model, splits["test"], seed=options.seed, output_dir=for_main(options.output_dir))
    for name, baseline in BASELINES.items() if options.baselines else ():
        within = replace(chosen, capture=False, output_dir=str(Path(options.output_dir) / BESIDE))
        rows += with_baseline(baseline(within, splits, sources), name)
    if is_main():
        write_report(rows, options.output_dir)
        write_card(model, chosen, rows, trainer.train_dataset, training_split(chosen, splits))
        print_report(rows, title=f"{options.method} on {options.data}, seed {options.seed}")
    return rows


def make_trainer(
    method: type[MultimodalModel],
    options: TrainOptions,
    splits: Mapping[str, Any],
    sources: Mapping[str, str],
    folder: Path,
) -> Trainer:
    """A model of `method`, the training split with simulated holes, and the optimizer, ready to train.

    Raises:
        ValueError: data or options that the method cannot be trained on.
    """
    check_data(options, splits, sources)
    options = settled(options, splits)
    set_seed(options.seed)
    pool = training_split(options, splits)
    model = build_model(method, options, splits, sources)
    collate: Any = MultimodalCollator(model.processors, cache=options.data_cache)
    if model.config.problem_type == "regression":
        collate = StandardLabels(collate, _labels(pool))
        model.config.label_scale = collate.scale  # checkpoints are models too
    if options.class_weights:
        model.loss = balanced(model, _labels(pool))
    watched: dict[str, Any] = {}
    if options.metric_for_best:
        watched["eval_dataset"] = holed(splits["validation"], options, sources, "validation")
        watched["compute_metrics"] = _measure(model, collate)
    trainer = Trainer(
        model,
        training_arguments(options, folder, workers_for(options, pool)),
        train_dataset=holed(pool, options, sources, "train"),
        data_collator=HostCopies(collate) if torch.cuda.is_available() else collate,
        optimizer_cls_and_kwargs=optimizer_for(model, options),
        **watched,
    )
    if options.capture:
        trainer.model.capture()  # Trainer has moved it
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    return trainer


class LossBar(ProgressCallback):
    """Trainer's bar with the loss behind the time left, instead of a line for every ten steps."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        else:
            super().on_log(args, state, control, logs, **kwargs)


@keep_freed_memory()
@keep_turned_weights()
def run_trainer(trainer: Trainer, checkpoint: str | None = None) -> MultimodalModel:
    """Train to the end, from a checkpoint where one is given; the model, saved."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / STATE)) if checkpoint else None
    if state is not None and state.global_step >= state.max_steps:  # in the middle of an epoch Trainer would go on
        best = state.best_model_checkpoint or str(checkpoint)
        overlay(trainer.model, saved_state(best), best)
        trainer.model.to(trainer.args.device)  # where Trainer leaves it to be sharded
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    for name, weights in trainer.model.named_parameters():
        if weights.requires_grad:
            refuse_not_finite(f"training diverged: {name}", weights, "lower --learning-rate, or take --dtype float32")
    if isinstance(trainer.data_collator, StandardLabels):
        trainer.data_collator.into_head(trainer.model)
    collect_for_evaluation(trainer.model)
    saved = trainer.accelerator.get_state_dict(trainer.model)  # of which every process may hold a share
    if is_main():
        trainer.model.save_pretrained(trainer.args.output_dir, state_dict=saved)
        folder = Path(trainer.args.output_dir)
        trainer.state.save_to_json(str(folder / STATE))
        plot_curves({"": [trainer.state.log_history]}).savefig(folder / "curves.png", dpi=120)
    return trainer.model


# -------------------------------------------------------------------------------------------------------------- data
def training_split(options: TrainOptions, splits: Mapping[str, Any]) -> Any:
    """Train and validation together: hyperparameters were chosen before, on validation, never on test."""
    from datasets import concatenate_datasets

    names = ["train"] if options.metric_for_best else ["train", "validation"]
    parts = [undecoded(splits[name]) for name in names if name in splits]
    if not hasattr(parts[0], "__len__"):
        parts = [part.to_iterable_dataset() if hasattr(part, "__len__") else part for part in parts]
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def holed(pool: Any, options: TrainOptions, sources: Mapping[str, str], split: str) -> Any:
    """A split with the holes that training simulates; nothing is decoded, since that was done on loading."""
    modalities, table = list(sources), missing_pattern(options, split)
    for name in modalities if hasattr(pool, "__len__") else ():
        if name not in pool.column_names:  # of the validation split, where the train split has it
            pool = pool.add_column(name, [None] * len(pool))
    if len(modalities) == 1:
        table = torch.ones(len(pool), 1, dtype=torch.bool)
    return with_missing(pool, table, modalities, all_absent=options.all_absent, decode=False)


def missing_pattern(options: TrainOptions, split: str) -> MissingPattern:
    assert options.missing_rate is not None  # settled
    return MissingPattern(rate=options.missing_rate, kind=options.missing_kind, seed=options.seed, split=split)


def _labels(pool: Any) -> torch.Tensor:
    return torch.tensor(labels_of(pool)[:])


# ------------------------------------------------------------------------------------------------ model and optimizer
def build_model(
    method: type[MultimodalModel], options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]
) -> MultimodalModel:
    from .encoders import load_encoder

    feature = splits["train"].features["label"]
    names = label_names(feature)
    vector = getattr(feature, "feature", None) is not None
    dtype = fast_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    modes = read_quantization(options.quantization, sources)
    model = method(
        {name: load_encoder(source, name, modes[name], dtype=dtype) for name, source in sources.items()},
        num_labels=len(names) if names else len(next(iter(splits["train"]))["label"]) if vector else 1,
        problem_type=PROBLEM_TYPES[str(task_of(feature))],
        quantization=options.quantization,
        all_absent=options.all_absent,
        label_smoothing=options.label_smoothing,
        **adaptation(method, options),
    )
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def adaptation(method: type[MultimodalModel], options: TrainOptions) -> dict[str, Any]:
    """What the method's `recipe` takes of the options; TypeError where its constructor has other names."""
    chosen, parameters = method.recipe(options), inspect.signature(method.__init__).parameters.values()
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        unknown = set(chosen) - {parameter.name for parameter in parameters}
        if unknown:
            raise TypeError(
                f"{method.__name__} takes no {min(unknown)!r}, which its recipe names: define a recipe for it"
            )
    return chosen


def optimizer_for(model: MultimodalModel, options: TrainOptions) -> tuple[type[torch.optim.AdamW], dict[str, Any]]:
    """For Trainer, which makes it itself: what is sharded is so together with its optimizer."""
    trained = [(name.startswith("head."), p) for name, p in model.named_parameters() if p.requires_grad]
    rest, head = ([p for in_head, p in trained if in_head is which] for which in (False, True))
    groups = [{"params": rest}, {"params": head, "lr": options.head_learning_rate}]
    common = {"lr": options.learning_rate, "weight_decay": options.weight_decay, "fused": True}
    return torch.optim.AdamW, {"params": groups, **common}


def training_arguments(options: TrainOptions, folder: Path, workers: int) -> TrainingArguments:
    assert options.batch_size is not None  # settled
    own = share(options.batch_size)
    before = split_before(folder)  # or a run that goes on with other memory would round otherwise
    part = least(before if before and own % before == 0 else fitting_batch(own))
    best = {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": options.metric_for_best,
        "greater_is_better": options.metric_for_best not in UNBOUNDED,
    }
    return TrainingArguments(
        str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=part,
        gradient_accumulation_steps=own // part,
        # Of several processes one would wait for ever, and what a graph holds is not given back.
        auto_find_batch_size=torch.cuda.is_available() and processes().num_processes == 1 and not options.capture,
        ddp_find_unused_parameters=False,  # every encoder runs in every process, on no rows if need be
        use_cpu=on_cpu(),
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=1,
        seed=options.seed,
        report_to="none",
        disable_tqdm=False,  # or silencing transformers' log turns the bar off
        dataloader_num_workers=workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # or Trainer drops the image and text columns
        **(best if options.metric_for_best else {}),
    )


def workers_for(options: TrainOptions, pool: Any) -> int:
    """How many processes prepare batches: on a CPU they would take the cores of the step itself.

    Several may each read all of a stream, whose holes they draw otherwise, so there they have to be asked for.
    """
    if options.num_workers is not None:
        return options.num_workers
    return WORKERS_BESIDE_GPU if torch.cuda.is_available() and hasattr(pool, "__len__") else 0


def fitting_batch(batch_size: int) -> int:
    """The batch, halved until its activations take no more than half of the memory that is free."""
    part = batch_size
    if not torch.cuda.is_available():  # on a GPU Trainer itself takes fewer samples a step, until they fit
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        while part > 1 and part % 2 == 0 and part * SAMPLE_BYTES > free / 2:
            part //= 2
    return part


def _measure(model: MultimodalModel, collate: MultimodalCollator | StandardLabels) -> Any:
    """The task's measures of what Trainer predicted, those of numbers in the labels' own units."""

    def compute(predicted: EvalPrediction) -> dict[str, float]:
        logits, labels = torch.from_numpy(predicted.predictions).float(), torch.from_numpy(predicted.label_ids)
        if isinstance(collate, StandardLabels):
            logits, labels = collate.in_units(logits), collate.in_units(labels)
        return score(model.config.problem_type, logits, labels)

    return compute


# --------------------------------------------------------------------------------------------------------- baselines
def late_fusion_rows(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> list[Row]:
    """Late fusion with zeros for what is missing, under every scenario."""
    folder = Path(options.output_dir) / "late_fusion"
    model = run_trainer(make_trainer(LateFusion, options, splits, sources, folder))
    return evaluate(model, splits["test"], seed=options.seed, output_dir=for_main(folder))


def unimodal_rows(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> list[Row]:
    """A model per modality, trained on those samples that keep it under the same missing table: what remains."""
    options = settled(options, splits)
    pool, rows = training_split(options, splits), []
    left = holed(pool, options, sources, "train")
    for i, (name, source) in enumerate(sources.items()):
        there = left.rows[left.table[:, i]].tolist()
        remains = {"train": pool.select(there), **{k: part for k, part in splits.items() if k != "train"}}
        if not options.metric_for_best:
            remains.pop("validation", None)  # it is in the pool
        try:
            check_data(options, remains, {name: source})
        except ValueError as error:  # the whole split passed
            logger.warning("no model of %s only is trained on what remains of it: %s", name, error)
            continue
        folder = Path(options.output_dir) / f"{name}_only"
        model = run_trainer(make_trainer(LateFusion, options, remains, {name: source}, folder))
        found = evaluate(model, splits["test"], output_dir=for_main(folder))
        rows += [{**row, "scenario": f"{name} only"} for row in found]
    return rows


BASELINES = {"late fusion": late_fusion_rows, "unimodal": unimodal_rows}
