"""The main job: data, encoders and a method in; a checkpoint, a report and a model card out."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainingArguments, set_seed

from . import data as data_module
from .card import write_card
from .data import MissingPattern, MultimodalCollator, with_missing
from .evaluation import Row, evaluate, print_report, write_report
from .lora import LoraConfig
from .methods import METHODS, LateFusion
from .methods.base import MultimodalModel, check_modalities
from .methods.config import check_choice

RUN_FILE = "run.yaml"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
LEFT_BY_OTHERS = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "checkpoint-*")


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class BuiltinData:
    """A data set that `--data` knows by name: `load(seed=...)` gives its splits."""

    load: Callable[..., Mapping[str, Any]]
    image_size: int


DATASETS = {
    "emoji": BuiltinData(data_module.load_emoji, image_size=112),  # 72 pixels wide
    "stamps": BuiltinData(data_module.load_stamps, image_size=112),  # a quarter of the time
}
TABLE_IMAGE_SIZE = 224  # of a user's own pictures
DATA_HELP = ", ".join(DATASETS) + ", or a folder or table with image, text, audio and label columns"


@dataclass(frozen=True)
class TrainOptions:
    """Everything `u2a-fast train` takes; a YAML file may set the same names."""

    data: str = option("emoji", DATA_HELP)
    method: str = option("u2a", "which method to train, one of " + ", ".join(METHODS))
    output_dir: str = option("out", "where checkpoint, report and model card go")
    encoders: dict[str, str] | None = option(
        None, "{modality: hub id or folder} of the encoders; None: those of [demo]"
    )
    missing_rate: float = option(0.7, "share of training samples that lose one modality")
    missing_kind: str = option("both", "which modality is lost: both, any, or the name of one")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: float = option(16, "the adapters are scaled by alpha / r")
    lora_dropout: float = option(0.0, "dropout inside the adapters")
    modality_dropout: float = option(0.1, "u2a only: chance that a complete sample loses a modality in a step")
    label_smoothing: float = option(0.2, "label smoothing of the cross entropy, while training")
    tuning: str = option("bitfit", "joint_embedding only: bitfit or lora")
    quantization: str | None = option(None, "int8, int8_w8a8 or nf4: how frozen weights are stored")
    epochs: float = option(12, "how many passes over the training split")
    max_steps: int = option(-1, "stop after so many steps, whatever epochs says")
    batch_size: int = option(16, "how many samples a step takes")
    learning_rate: float = option(7e-4, "peak of the cosine schedule, for all but the head")
    head_learning_rate: float = option(1e-3, "peak for the head, whose classes start from nothing")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    seed: int = option(0, "seed of weights, order, missing table and split")
    feature_cache: str | None = option(None, "pmf only: folder that keeps frozen features across epochs")
    dtype: str = option("auto", "dtype of the frozen encoders: float32, bfloat16, or auto (bfloat16 where it is fast)")
    baselines: bool = option(False, "train unimodal and late-fusion models too and add them to the report")
    resume: bool = option(False, "go on from the last checkpoint in output_dir")

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout)


def train(options: TrainOptions) -> list[Row]:
    """Train, evaluate every scenario, and write checkpoint, `report.csv`, `report.png` and `README.md`.

    Raises:
        ValueError: an unknown method, or an output directory that holds another run or model.
    """
    if options.method not in METHODS:
        raise ValueError(f"unknown method {options.method!r}: use one of {', '.join(METHODS)}")
    check_directory(options)
    return run_once(options, *load_sources(options))


def run_once(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> list[Row]:
    """`train` on splits and encoders that are loaded already; what is refused is refused before anything is written."""
    checkpoint = check_directory(options)
    trainer = make_trainer(METHODS[options.method], options, splits, sources, Path(options.output_dir))
    claim_directory(options)
    model = run_trainer(trainer, checkpoint)
    rows = evaluate(model, splits["test"], seed=options.seed)
    for name, baseline in BASELINES.items() if options.baselines else ():
        within = replace(options, output_dir=str(Path(options.output_dir) / "baselines"))
        rows += [{**row, "scenario": f"{row['scenario']} [{name}]"} for row in baseline(within, splits, sources)]
    write_report(rows, options.output_dir)
    write_card(model, asdict(options), rows, missing_pattern(options, "train"), merged_training_split(splits))
    print_report(rows, title=f"{options.method} on {options.data}, seed {options.seed}")
    return rows


def make_trainer(
    method: type[MultimodalModel],
    options: TrainOptions,
    splits: Mapping[str, Any],
    sources: Mapping[str, str],
    folder: Path,
) -> Trainer:
    """A model of `method`, the train and validation splits with simulated holes, and the optimizer, ready to train.

    Raises:
        ValueError: data or options that the method cannot be trained on.
    """
    check_data(options, splits, sources)
    train_split = merged_training_split(splits)
    pattern, modalities = missing_pattern(options, "train"), list(sources)
    if len(modalities) > 1:
        print(pattern.summary(len(train_split), modalities))
        train_split = with_missing(train_split, pattern, modalities)
    set_seed(options.seed)
    model = build_model(method, options, splits, sources)
    model.print_trainable_parameters()
    return Trainer(
        model,
        training_arguments(options, folder),
        train_dataset=train_split,
        data_collator=MultimodalCollator(model.processors),
        optimizers=(make_optimizer(model, options), None),
    )


def run_trainer(trainer: Trainer, checkpoint: str | None = None) -> MultimodalModel:
    """Train to the end, from a checkpoint where one is given; the model, saved."""
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.save_pretrained(trainer.args.output_dir)
    return trainer.model


def check_data(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse what would fail later: a split or a column that is not there, labels without classes, a wrong dtype."""
    check_choice("dtype", options.dtype, DTYPES)
    absent = [name for name in ("train", "test") if name not in splits]
    if absent:
        raise ValueError(
            f"{options.data} has no {absent[0]} split: put all rows into one table, which is split by seed, or add one "
            f"named {absent[0]}"
        )
    columns = splits["train"].features
    if not hasattr(columns.get("label"), "names"):
        raise ValueError(
            f"{options.data} needs a label column of class names or whole numbers: for other problems build a model "
            "with problem_type=... and use Trainer"
        )
    check_modalities(sources, [name for name in columns if name not in ("label", "group")])


def make_optimizer(model: MultimodalModel, options: TrainOptions) -> torch.optim.AdamW:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith("head.")]
    rest = [p for name, p in trained.items() if not name.startswith("head.")]
    groups = [{"params": rest}, {"params": head, "lr": options.head_learning_rate}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)


def build_model(
    method: type[MultimodalModel], options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]
) -> MultimodalModel:
    from .encoders import load

    names = splits["train"].features["label"].names
    dtype = fast_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    model = method(
        {name: load(source, name, dtype=dtype) for name, source in sources.items()},
        num_labels=len(names),
        quantization=options.quantization,
        label_smoothing=options.label_smoothing,
        **adaptation(method, options),
    )
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


def training_arguments(options: TrainOptions, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="epoch",
        save_total_limit=1,
        seed=options.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # or Trainer drops the image and text columns
    )


def merged_training_split(splits: Mapping[str, Any]) -> Any:
    """Train and validation together: hyperparameters were chosen before, on validation, never on test."""
    from datasets import concatenate_datasets

    parts = [splits[name] for name in ("train", "validation") if name in splits]
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def missing_pattern(options: TrainOptions, split: str) -> MissingPattern:
    return MissingPattern(rate=options.missing_rate, kind=options.missing_kind, seed=options.seed, split=split)


def load_sources(options: TrainOptions) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The splits, and the folder or id of each modality's encoder."""
    splits = load_splits(options.data, options.seed)
    sources = options.encoders or default_encoders(options.data, splits["train"].column_names)
    return splits, dict(sources)


def load_splits(data: str, seed: int) -> Mapping[str, Any]:
    """`{"train", "validation", "test"}` of one of DATASETS, or of a user's own folder or table."""
    return DATASETS[data].load(seed=seed) if data in DATASETS else data_module.load_table(data, seed=seed)


def default_encoders(data: str, columns: list[str]) -> dict[str, str]:
    """The folder of a small pretrained encoder for each modality among the columns."""
    size = DATASETS[data].image_size if data in DATASETS else TABLE_IMAGE_SIZE
    folders = {
        "image": lambda: data_module.dinov2_folder(image_size=size),
        "text": data_module.minilm_folder,
        "audio": data_module.whisper_folder,
    }
    return {name: str(folder()) for name, folder in folders.items() if name in columns}


def fast_dtype() -> torch.dtype:
    """bfloat16 on a GPU and on CPUs that multiply it in hardware, float32 on others."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def late_fusion_rows(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> list[Row]:
    """Late fusion with zeros for what is missing, under every scenario."""
    model = run_trainer(make_trainer(LateFusion, options, splits, sources, Path(options.output_dir) / "late_fusion"))
    return evaluate(model, splits["test"], seed=options.seed)


def unimodal_rows(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> list[Row]:
    """A model per modality, trained on those samples that keep it under the same missing table: what remains."""
    pool, rows = merged_training_split(splits), []
    table = missing_pattern(options, "train").table(len(pool), list(sources))
    for i, (name, source) in enumerate(sources.items()):
        there = [row for row, value in enumerate(pool[name]) if value is not None and table[row, i]]
        remains = {"train": pool.select(there), "test": splits["test"]}
        folder = Path(options.output_dir) / f"{name}_only"
        model = run_trainer(make_trainer(LateFusion, options, remains, {name: source}, folder))
        rows += [{**row, "scenario": f"{name} only"} for row in evaluate(model, splits["test"])]
    return rows


BASELINES = {"late fusion": late_fusion_rows, "unimodal": unimodal_rows}


def check_directory(options: TrainOptions) -> str | None:
    """Refuse a directory that holds something else; the checkpoint to resume from, if that was asked for."""
    folder = Path(options.output_dir)
    if (folder / RUN_FILE).exists():
        found, asked = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8")), _run(options)
        changed = sorted(name for name in asked if found.get(name) != asked[name])
        if changed:
            raise ValueError(f"{folder} holds another run ({', '.join(changed)} differ): choose another output_dir")
        if not options.resume:
            raise ValueError(f"{folder} holds this run already: pass --resume to go on, or choose another output_dir")
        return _last_checkpoint(folder)
    found = sorted(path.name for pattern in LEFT_BY_OTHERS for path in folder.glob(pattern))
    if found:
        raise ValueError(f"{folder} holds another model ({found[0]}): choose another output_dir")
    return None


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: Trainer writes its state last, and a killed run may have got less far."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(json.JSONDecodeError):
            whole.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
    return max(whole, default=(0, None))[1]


def claim_directory(options: TrainOptions) -> None:
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(yaml.safe_dump(_run(options), sort_keys=False), encoding="utf-8")


def _run(options: TrainOptions) -> dict[str, Any]:
    """What makes two runs the same run: every option but where it is written and whether it goes on."""
    return {name: value for name, value in asdict(options).items() if name not in ("output_dir", "resume")}
