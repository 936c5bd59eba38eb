"""The model card: what a report needs to be repeated."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .data.pretrained import encoder_title
from .data.processed_cache import file_digest
from .methods import METHODS
from .methods.base import MultimodalModel
from .metrics import NAMES, headline, written
from .options import BESIDES, TrainOptions
from .reports import Row, by_model, columns

PACKAGES = ("u2a-fast", "torch", "transformers", "datasets", "numpy")
PLACES = ("data", "encoders", "output_dir", "feature_cache", "data_cache")  # the options that name files
TASKS = {
    "single_label_classification": "multimodal-classification",
    "multi_label_classification": "multimodal-multi-label-classification",
    "regression": "multimodal-regression",
}
EXAMPLES = {
    "text": ("", '"a short text"'),
    "image": ("from PIL import Image\n", 'Image.new("RGB", (224, 224))'),
    "video": ("import numpy as np\n", "np.zeros((16, 224, 224, 3), np.uint8)"),
    "audio": ("import numpy as np\n", '{"array": np.zeros(16_000), "sampling_rate": 16_000}'),
}

TEMPLATE = """---
{metadata}
---

# {title}

Frozen encoders, trained jointly with [u2a-fast](https://pypi.org/project/u2a-fast/) ({method}).

```python
{imports}import u2a_fast

model = u2a_fast.load_model({quoted})  # the folder that this card lies in
model.predict([{{"{modality}": {sample}}}])  # any of {modalities}; {answer}
```

| modality | encoder | dtype |
|---|---|---|
{encoders}

Data hash `{data_hash}` (SHA-256 of the training rows, files included).
Missing modalities in training: {missing}{table_hash}
Protocol: one fixed table per split; results do not compare with those of holes redrawn at every epoch.
Seed {seed}. {trained:,d} of {total:,d} parameters were trained.

## Results on the test split

{results}

## To repeat

```yaml
{options}```

Versions: {versions}.
"""


def write_card(
    model: MultimodalModel, options: TrainOptions, rows: Sequence[Row], holed: Any, train_split: Any
) -> None:
    """Write `README.md` with Hugging Face's metadata: base models, one metric a scenario, seed, data hash, versions.

    Args:
        rows: the report, baselines included.
        holed: the training split as `with_missing` made it; `train_split` is what it was made from.
    """
    import yaml

    config, folder = model.config, Path(options.output_dir)
    title = folder.resolve().name
    modality = next((name for name in EXAMPLES if name in config.modalities), config.modalities[0])
    imports, sample = EXAMPLES.get(modality, EXAMPLES["text"])
    trained, total = model.get_nb_trainable_parameters()
    classes = f"logits of {config.num_labels} classes" if config.problem_type != "regression" else "numbers"
    pattern, count = holed.pattern, len(holed) if hasattr(holed, "__len__") else None
    hashed = f" Table hash `{pattern.hash(count, config.modalities)}`." if pattern and count else ""
    text = TEMPLATE.format(
        metadata=_metadata(model, options, rows, title),
        title=title,
        quoted=json.dumps(title, ensure_ascii=False),  # which Python reads too
        method=METHODS[options.method].__name__,
        imports=imports,
        modality=modality,
        sample=sample,
        modalities=", ".join(config.modalities),
        answer=f"{classes} a sample",
        encoders="\n".join(_encoder_row(model, name) for name in config.modalities),
        data_hash="none, it was a stream" if count is None else data_hash(train_split, config.modalities),
        missing=holed.summary(),
        table_hash=hashed,
        seed=options.seed,
        trained=trained,
        total=total,
        results=_results(rows),
        options=yaml.safe_dump(_without_places(asdict(options)), sort_keys=False, allow_unicode=True),
        versions=", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _encoder_row(model: MultimodalModel, name: str) -> str:
    title = encoder_title(model.config.encoders[name]) or "given as a module"
    return f"| {name} | {title} | {model.config.encoder_dtypes[name]} |"


def _metadata(model: MultimodalModel, options: TrainOptions, rows: Sequence[Row], title: str) -> str:
    """The card's YAML. Rows that share a data set are one table of the hub, so that the metric names the scenario."""
    from huggingface_hub import EvalResult, ModelCardData

    data, own = _named(options.data), by_model(rows)[""]
    results = [
        EvalResult(
            task_type=TASKS[model.problem_type(None)],
            dataset_type=re.sub(r"\W+", "-", data).strip("-").lower(),
            dataset_name=data,
            dataset_split="test",
            metric_type=name,
            metric_name=f"{NAMES[name]}, {row['scenario']}",
            metric_value=round(row[name], 4),
        )
        for row in own
        for name in columns(own)
        if name == headline(row) and row[name] == row[name]
    ]
    bases = [source for source in model.config.encoders.values() if source and not Path(source).exists()]
    return ModelCardData(
        library_name="u2a_fast", base_model=bases or None, model_name=title, eval_results=results, tags=["multimodal"]
    ).to_yaml()


def _results(rows: Sequence[Row]) -> str:
    names = columns(rows)
    lines = ["| " + " | ".join(NAMES.get(name, name) for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = (written(name, row[name], 3) if name in NAMES else str(row[name]) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with names instead of absolute paths, which say nothing on another machine."""
    named = {
        name: {key: _named(part) for key, part in value.items()} if isinstance(value, Mapping) else _named(value)
        for name, value in options.items()
        if name in PLACES
    }
    return {**options, **named}


def _named(value: Any) -> Any:
    """A path by its last part, with the name in front of it where there is one (mmimdb:FOLDER)."""
    if not isinstance(value, str):
        return value
    kind, colon, place = value.rpartition(":")
    return f"{kind}{colon}{Path(place).name}" if Path(place).is_absolute() or Path(place).exists() else value


def data_hash(rows: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> str:
    """SHA-256 of what a model learns from the rows, in order: a file counts with its content, wherever it lies."""
    content, learnt = hashlib.sha256(), {*modalities, *BESIDES}
    for i in range(len(rows)):
        for name, cell in sorted(rows[i].items()):
            if name not in learnt:
                continue
            if isinstance(cell, Mapping | bytes):  # an image or a recording, not decoded
                cell = file_digest(cell) or cell
            content.update(json.dumps([name, cell], default=lambda array: array.tolist()).encode())
    return content.hexdigest()
