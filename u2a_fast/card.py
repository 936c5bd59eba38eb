"""The model card: what a report needs to be repeated."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import MissingPattern
from .methods.base import MultimodalModel
from .reports import Row

PACKAGES = ("u2a-fast", "torch", "transformers", "datasets", "numpy")

TEMPLATE = """---
{metadata}
---

# {title}

Frozen encoders, trained jointly with [u2a-fast](https://pypi.org/project/u2a-fast/) ({method}).

| modality | encoder | dtype |
|---|---|---|
{encoders}

Data hash `{data_hash}` (SHA-256 of the training rows, files included).
Missing modalities in training: {missing} Table hash `{table_hash}`.
Protocol: one fixed table per split; results do not compare with those of holes redrawn at every epoch.
Seed {seed}. {trained:,d} of {total:,d} parameters were trained.

## Results on the test split

| scenario | accuracy | macro F1 | n |
|---|---|---|---|
{rows}

## To repeat

```yaml
{options}```

Versions: {versions}.
"""


def write_card(
    model: MultimodalModel,
    options: Mapping[str, Any],
    rows: Sequence[Row],
    pattern: MissingPattern,
    train_split: Sequence[Mapping[str, Any]],
) -> None:
    """Write `README.md` with Hugging Face's metadata: base models, one metric a scenario, seed, data hash, versions."""
    import yaml
    from huggingface_hub import EvalResult, ModelCardData

    config, folder, count = model.config, Path(options["output_dir"]), len(train_split)
    name = folder.resolve().name
    results = [
        EvalResult(
            task_type="multimodal-classification",
            dataset_type=str(options["data"]),
            dataset_name=f"{options['data']}, {row['scenario']}",
            metric_type="accuracy",
            metric_value=round(row["accuracy"], 4),
        )
        for row in rows
    ]
    bases = [source for source in config.encoders.values() if source and not Path(source).exists()]
    metadata = ModelCardData(
        library_name="u2a_fast", base_model=bases or None, model_name=name, eval_results=results, tags=["multimodal"]
    )
    trained, total = model.get_nb_trainable_parameters()
    text = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=name,
        method=type(model).__name__,
        encoders="\n".join(
            f"| {m} | {Path(config.encoders[m]).name or 'given as a module'} | {config.encoder_dtypes[m]} |"
            for m in config.modalities
        ),
        data_hash=data_hash(train_split),
        missing=pattern.summary(count, config.modalities),
        table_hash=pattern.hash(count, config.modalities),
        seed=options["seed"],
        trained=trained,
        total=total,
        rows="\n".join(f"| {r['scenario']} | {r['accuracy']:.3f} | {r['macro_f1']:.3f} | {r['n']} |" for r in rows),
        options=yaml.safe_dump(dict(options), sort_keys=False),
        versions=", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def data_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what the rows say, in order: a file counts with its content, wherever it lies."""
    content = hashlib.sha256()
    for i in range(len(rows)):
        for name, cell in sorted(rows[i].items()):
            if isinstance(cell, Mapping):  # an image or a recording, not decoded
                cell = cell["bytes"] or (Path(cell["path"]).read_bytes() if cell["path"] else b"")
                cell = hashlib.sha256(cell).hexdigest()
            content.update(json.dumps([name, cell]).encode())
    return content.hexdigest()
