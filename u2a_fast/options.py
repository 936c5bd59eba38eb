"""What `u2a-fast train` takes, the data it knows by name, and what it chooses where nothing is said."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from . import data as data_module
from .data.inputs import DecodeError, is_absent, to_image
from .data.presence import without_unreadable
from .data.splits import MODALITIES
from .data.table_files import digest_of
from .lora_config import LoraConfig

logger = logging.getLogger(__name__)


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def refuse_empty(options: Any) -> None:
    """ValueError where an option is a string of nothing: of a folder Python makes the working directory."""
    for item in fields(options):
        if getattr(options, item.name) == "":
            raise ValueError(f"--{item.name.replace('_', '-')} is empty: give it a value, or leave it out")


def refuse_negative(options: Any, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {value}")


@dataclass(frozen=True)
class Recipe:
    """What a run takes where its options say nothing."""

    missing_rate: float = 0.7
    modality_dropout: float = 0.1
    epochs: float = 12
    batch_size: int = 16
    image_size: int = 112
    translators: bool = True
    separate_heads: bool = False


@dataclass(frozen=True)
class BuiltinData:
    """A data set that `--data` knows by name: `load(seed=...)` gives its splits."""

    load: Callable[..., Mapping[str, Any]]
    recipe: Recipe = Recipe()


DATASETS = {
    "emoji": BuiltinData(data_module.load_emoji),  # 72 pixels wide
    # Larger pictures, which at 112 pixels take a quarter of the time; 454 samples to train on.
    "stamps": BuiltinData(data_module.load_stamps, Recipe(translators=False, separate_heads=True)),
}
DATA_HELP = (
    ", ".join(DATASETS)
    + ", "
    + ", ".join(f"{name}:FOLDER" for name in data_module.BENCHMARKS)
    + ", or a folder or table with image, text, audio and label columns"
)

BESIDES = ("label", "group")  # columns that are no modality

# For data that nobody has tuned a recipe for.
SAMPLES_SEEN = 20_000  # over all epochs, which are not fewer than 3 nor more than 12
FEWEST_EPOCHS, MOST_EPOCHS = 3, 12
TRANSLATED = 650  # samples from which on U2A has translators, below it separate heads (docs/choosing.md)
IMAGE_SIZES = (112, 168, 224)  # multiples of DINOv2's patch; the middle one is the largest on a CPU
PICTURES_MEASURED = 64


@dataclass(frozen=True)
class TrainOptions:
    """Everything `u2a-fast train` takes; a YAML file may set the same names."""

    data: str = option("emoji", DATA_HELP)
    method: str = option("u2a", "which method to train: u2a, pmf, joint_embedding or late_fusion")
    output_dir: str = option("out", "where checkpoint, report and model card go")
    encoders: dict[str, str] | None = option(
        None, "{modality: hub id or folder} of the encoders; None: those of [demo]"
    )
    columns: dict[str, str] | None = option(None, "{our column: the table's}, where a table has other names")
    task: str | None = option(None, "classification, multi_label or regression; None: what the labels look like")
    label_separator: str | None = option(None, "what stands between several labels in one cell of a table")
    all_absent: str = option("error", "rows with nothing that can be read: error leaves them out, prior keeps them")
    missing_rate: float | None = option(
        None, "share of training samples that lose one modality; None: 0.7, and none of your own table's"
    )
    missing_kind: str = option("both", "which modality is lost: both, any, or the name of one")
    image_size: int | None = option(None, "pixels of the [demo] image encoder; None: by the pictures and the machine")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: float = option(16, "the adapters are scaled by alpha / r")
    lora_dropout: float = option(0.0, "dropout inside the adapters")
    modality_dropout: float | None = option(
        None, "u2a only: chance that a complete sample loses a modality in a step; None: by the missing rate"
    )
    translators: bool | None = option(
        None, "u2a only: a linear layer behind each encoder; None: where there are samples enough to train it"
    )
    separate_heads: bool | None = option(
        None, "u2a only: class tokens of one size, and a head for each encoder; None: where translators are too many"
    )
    label_smoothing: float = option(0.2, "label smoothing of the cross entropy, while training")
    class_weights: str | None = option(None, "balanced: rare classes count for more in the loss; None: they do not")
    tuning: str = option("bitfit", "joint_embedding only: bitfit or lora")
    quantization: str | None = option(None, "int8, int8_w8a8 or nf4: how frozen weights are stored")
    epochs: float | None = option(None, "how many passes over the training split; None: by its size")
    max_steps: int = option(-1, "stop after so many steps, whatever epochs says")
    batch_size: int | None = option(
        None,
        "how many samples a step takes; None: 16. Where memory is short, a CPU takes them in parts, and a step on a "
        "GPU has fewer, a tenth less until they fit",
    )
    learning_rate: float = option(7e-4, "peak of the cosine schedule, for all but the head")
    head_learning_rate: float = option(1e-3, "peak for the head, whose classes start from nothing")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    metric_for_best: str | None = option(
        None, "keep the epoch that is best by this measure on the validation split, which is then not trained on"
    )
    seed: int = option(0, "seed of weights, order, missing table and split")
    feature_cache: str | None = option(None, "pmf only: folder that keeps frozen features across epochs")
    data_cache: str | None = option(None, "folder that keeps processed pictures and recordings, for epochs and runs")
    num_workers: int | None = option(None, "processes that prepare batches; None: 2 where there is a GPU, otherwise 0")
    capture: bool = option(
        False, "u2a on one GPU only: training steps are replayed as CUDA graphs, of which a host launches far more"
    )
    dtype: str = option("auto", "dtype of the frozen encoders: float32, bfloat16, or auto (bfloat16 where it is fast)")
    baselines: bool = option(False, "train unimodal and late-fusion models too and add them to the report")
    save_steps: int | None = option(None, "steps between checkpoints, and what a killed run may lose; None: an epoch")
    resume: bool = option(False, "go on from the last checkpoint in output_dir")

    def __post_init__(self) -> None:
        refuse_empty(self)
        counts = ("epochs", "batch_size", "save_steps", "image_size")
        for name in (*counts, "learning_rate", "head_learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"--max-steps must be above 0, or -1 for as many as --epochs says, not {self.max_steps}")
        refuse_negative(self, ("num_workers", "seed", "weight_decay"))
        if self.save_steps is not None and self.metric_for_best:
            raise ValueError("--metric-for-best keeps the best epoch: leave --save-steps out beside it")

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout)


@dataclass(frozen=True)
class CompareOptions(TrainOptions):
    """The options of `train`, for every method and seed; `method` and `seed` are set by the comparison."""

    methods: list[str] | None = option(None, "which methods to train; None: all but the baselines")
    seeds: list[int] | None = option(None, "which seeds to train with; None: 0, 1, 2")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("method", "seed", "resume"):
            if getattr(self, name) != getattr(TrainOptions, name):
                raise ValueError(f"compare takes --methods and --seeds, and goes on by itself: leave --{name} out")
        for name in ("methods", "seeds"):
            given = getattr(self, name) or []
            twice = next((value for value in given if given.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"--{name} has {twice!r} twice, which would count one run as two: name it once")


# ----------------------------------------------------------------------------------------------------------- choices
def settled(options: TrainOptions, splits: Mapping[str, Any]) -> TrainOptions:
    """The options with a value for each that was None because it depends on the data."""
    if not unsettled(options):
        return options
    recipe = recipe_for(options, splits)
    missing_rate = recipe.missing_rate if options.missing_rate is None else options.missing_rate
    chosen = asdict(replace(recipe, missing_rate=missing_rate, modality_dropout=0.1 if missing_rate else 0.3))
    if options.translators or options.separate_heads:  # who asks for one of them does not ask for both
        chosen |= {"translators": False, "separate_heads": False}
    return replace(options, **{name: value for name, value in chosen.items() if getattr(options, name) is None})


def recipe_for(options: TrainOptions, splits: Mapping[str, Any]) -> Recipe:
    """The recipe of data that we know; for any other, epochs by size, pictures by their own size, holes as they are."""
    if options.data in DATASETS:
        return DATASETS[options.data].recipe
    train = splits["train"]
    epochs: float = FEWEST_EPOCHS
    translators = True
    if hasattr(train, "__len__"):
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(SAMPLES_SEEN / max(len(train), 1))))
        translators = len(train) >= TRANSLATED
    missing_rate = 0.7 if _benchmark(options.data) is not None else 0.0
    heads = {"translators": translators, "separate_heads": not translators}
    return Recipe(missing_rate, epochs=epochs, image_size=picture_size(train), **heads)


def picture_size(dataset: Any) -> int:
    """Pixels for an image encoder: as many as half of the pictures have, no more than the machine does in good time."""
    fast = torch.cuda.is_available()
    sizes = []
    columns = getattr(dataset, "column_names", None) or ()
    for i in range(min(len(dataset), PICTURES_MEASURED) if "image" in columns and hasattr(dataset, "__len__") else 0):
        cell = dataset[i]["image"]
        try:
            sizes.append(0 if is_absent(cell) else to_image(cell).width)
        except DecodeError:
            continue
    wide = statistics.median(size for size in sizes if size) if any(sizes) else IMAGE_SIZES[-1]
    allowed = IMAGE_SIZES if fast else IMAGE_SIZES[:-1]
    return next((size for size in allowed if size >= wide), allowed[-1])


def choices(asked: TrainOptions, found: TrainOptions, modalities: Sequence[str]) -> str:
    """What `settled` chose and how to choose otherwise, in a sentence; empty where everything was said.

    >>> asked = TrainOptions(epochs=3, missing_rate=0.7, method="pmf")
    >>> choices(asked, replace(asked, batch_size=16, image_size=112), ("image", "text"))
    'Chosen for this data: --batch-size 16 --image-size 112; pass any of them to change it.'
    """
    without_effect = {
        "modality_dropout": asked.method != "u2a",
        "translators": asked.method != "u2a",
        "separate_heads": asked.method != "u2a",
        "image_size": asked.encoders or "image" not in modalities,
    }
    names = [name for name in unsettled(asked) if not without_effect.get(name)]
    chosen = " ".join(f"--{name.replace('_', '-')} {getattr(found, name)}" for name in names)
    return f"Chosen for this data: {chosen}; pass any of them to change it." if chosen else ""


def unsettled(options: TrainOptions) -> list[str]:
    """Names of the options that a recipe decides, and nobody asked for."""
    return [item.name for item in fields(Recipe) if getattr(options, item.name) is None]


def recipe_of(options: TrainOptions) -> dict[str, Any]:
    """What settled options say of all that a recipe decides."""
    return {item.name: getattr(options, item.name) for item in fields(Recipe)}


# -------------------------------------------------------------------------------------------------------------- data
def load_splits(data: str, seed: int, **table: Any) -> Mapping[str, Any]:
    """`{"train", "validation", "test"}` of one of DATASETS, of a benchmark, or of a user's own folder or table.

    `table` is what `load_table` takes too.
    """
    if data in DATASETS:
        return DATASETS[data].load(seed=seed)
    benchmark = _benchmark(data)
    return data_module.load_table(data, seed, **table) if benchmark is None else benchmark(data.partition(":")[2])


def data_digest(data: str) -> str | None:
    """What tells whether a user's own table has changed; None of data that we know by name."""
    return None if is_known(data) else digest_of(Path(data))


def is_known(data: str) -> bool:
    """Whether it is one of DATASETS or a benchmark, and not a user's own folder or table."""
    return data in DATASETS or _benchmark(data) is not None


def _benchmark(data: str) -> Callable[[str], Mapping[str, Any]] | None:
    return data_module.BENCHMARKS.get(data.partition(":")[0]) if ":" in data and not Path(data).exists() else None


def refuse_of_tables(options: Any) -> None:
    """ValueError where options that say how a table is read are given for data that is none."""
    for name in ("task", "columns", "label_separator"):
        if getattr(options, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} says how a table is read, and {options.data} is none: leave it out")


def load_sources(options: TrainOptions) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The splits, and the folder or id of each modality's encoder."""
    if is_known(options.data):
        refuse_of_tables(options)
    asked = set(options.encoders or MODALITIES)
    splits = load_splits(
        options.data,
        options.seed,
        task=options.task,
        label_separator=options.label_separator,
        columns=options.columns,
        decode=True,
        keep_empty=options.all_absent == "prior",
        modalities=asked if asked <= set(MODALITIES) else MODALITIES,  # an unknown one is refused beside all others
    )
    check_splits(options.data, splits)
    if _benchmark(options.data):
        splits = read_whole(splits, options.all_absent)
    return splits, dict(options.encoders or default_encoders(options, splits))


def check_splits(data: str, splits: Mapping[str, Any], needed: Sequence[str] = ("train", "test")) -> None:
    """ValueError where a split that is needed is not there, or one does not say what its columns are."""
    if not isinstance(splits, Mapping):
        raise TypeError(f'splits are {{"train": .., "test": ..}}, not a {type(splits).__name__}: name each')
    for name in needed:
        if name not in splits:
            found = f"only {' and '.join(splits)}" if splits else "nor any other"
            raise ValueError(
                f"{data} has no {name} split, {found}: put all rows into one table, which is split by seed, or add one "
                f"named {name}"
            )
    for name, part in splits.items():
        if not getattr(part, "features", None):
            raise ValueError(
                f"the {name} split of {data} has no features, which say its columns and classes: pass them where it is "
                "made, as in from_generator(.., features=datasets.Features(..))"
            )


def read_whole(splits: Mapping[str, Any], all_absent: str) -> dict[str, Any]:
    """Splits in which what cannot be decoded is None, and what they train on has no row with nothing left."""
    modalities = [column for column in splits["train"].features if column not in BESIDES]
    return {
        name: part
        if name == "test"  # where such rows do not count
        else without_unreadable(part, modalities, all_absent == "prior", f"the {name} split")
        for name, part in splits.items()
    }


def default_encoders(options: TrainOptions, splits: Mapping[str, Any]) -> dict[str, str]:
    """The folder of a small pretrained encoder for each modality among the columns."""
    folders = {
        "image": lambda: data_module.dinov2_folder(image_size=settled(options, splits).image_size or IMAGE_SIZES[0]),
        "text": data_module.minilm_folder,
        "audio": data_module.whisper_folder,
    }
    columns = splits["train"].column_names
    if "video" in columns:
        logger.warning("no small encoder of videos is known, and the column video is left out: name one in --encoders")
    return {name: str(folder()) for name, folder in folders.items() if name in columns}
