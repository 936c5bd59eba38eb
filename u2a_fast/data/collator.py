"""From rows with holes to a batch: each modality's own processor runs on the rows that have it."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .inputs import FRAMES, DecodeError, is_absent, read_cell
from .processed_cache import ProcessedCache
from .texts import give_padding, has_fixed_length, longest_text, show_a_token, tokenize

logger = logging.getLogger(__name__)

REPORTED = 5  # broken files that are named; the others are counted
LABELS = ("labels", "label")
MEMBERS = {"text": "tokenizer", "image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}
LENGTH = "length"  # of a clip before it was cut, kept beside what the processor made of it
SHORTEST_CLIP = 40  # of a second: the first window of a spectrogram needs 25 ms

Inputs = dict[str, Tensor]


class MultimodalCollator:
    """Turn samples into a batch; a data collator for Trainer and `DataLoader(collate_fn=...)`.

    `processors` maps each modality to its Hugging Face tokenizer, image or video processor or feature extractor; its
    order is the modality order. A sample is a dictionary such as {"image": .., "text": .., "label": ..}. A modality is
    absent where its key is missing, the cell is None or NaN, the text is blank, or the file cannot be decoded; the last
    is counted in `undecodable` ({modality: count}; a DataLoader worker counts for itself) and logged once a file.

    Images may be paths, bytes, {"path", "bytes"} records, PIL images or uint8 arrays; clips the same, or arrays and
    {"array", "sampling_rate"}. Images become white squares, but for SigLIP 2, which takes any shape, and clips mono at
    the extractor's rate with a peak of 1. Raw waveforms always get an attention mask; a group norm over time, as in
    wav2vec2-base, sees the padding all the same.
    Videos may be lists of images, uint8 arrays [T, H, W, channels], or files (paths, bytes, records). As many frames as
    the processor's `num_frames` says, which a model sets to what its encoder takes, are read, evenly spaced, and of a
    shorter video repeated.
    Other keys than the modalities, `label` and `labels` are ignored.

    Texts end at the tokenizer's `model_max_length`, which a model lowers to what its encoder takes, and clips at their
    extractor's window; what is cut is counted in `cut`. Both are padded on the right; texts of SigLIP to its length,
    without a mask, as it was trained. A tokenizer without a padding token gets its end token for one.

    With `cache`, a folder, the tensors of pictures and of clips in a window of their own are kept there by content, and
    such a file is decoded and processed once for all epochs, workers and runs. The batches are the same without it.

    >>> from transformers import Wav2Vec2FeatureExtractor
    >>> collate = MultimodalCollator({"audio": Wav2Vec2FeatureExtractor()})
    >>> batch = collate([{"audio": np.ones(400), "label": 1}, {"audio": None, "label": 0}])
    >>> batch["audio"]["input_values"].shape, batch["modality_mask"].tolist(), batch["labels"].tolist()
    (torch.Size([2, 400]), [[True], [False]], [1, 0])
    """

    def __init__(self, processors: Mapping[str, Any], cache: str | os.PathLike | None = None) -> None:
        if not processors:
            raise ValueError("MultimodalCollator needs a processor for each modality, and got none")
        self.processors: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        for modality, processor in processors.items():
            self.kinds[modality], self.processors[modality] = _fitting(modality, processor)
        self.cache = None if cache is None else ProcessedCache(cache)
        self.undecodable: Counter[str] = Counter()
        self.cut: dict[str, Cut] = {}
        self._reported: set[str] = set()
        self._blanks: dict[str, Inputs] = {}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities, in the order of the columns of `modality_mask`."""
        return tuple(self.processors)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`{modality: {name: tensor [B, ..]}, .., "modality_mask": bool [B, M], "labels": [B] or [B, C]}`.

        Labels are int64 where they are whole numbers, float32 otherwise, and left out where no sample has one. An
        absent row is zeros; an absent text keeps one visible token, and other masks are all ones there, so that no
        attention is over nothing.

        Raises:
            ValueError: no sample has a column for any modality.
        """
        if not any(modality in sample for sample in samples for modality in self.processors):
            raise ValueError(
                f"no sample has a column for {', '.join(self.modalities)}: if Trainer dropped them, pass "
                "TrainingArguments(remove_unused_columns=False)"
            )
        batch: dict[str, Any] = {}
        masks = []
        for modality, processor in self.processors.items():
            compute = self._singly if stands_alone(self.kinds[modality], processor) else self._together
            computed, present = compute(modality, [sample.get(modality) for sample in samples])
            batch[modality] = self._scatter(modality, computed, present)
            masks.append(present)
        batch["modality_mask"] = torch.stack(masks, dim=1)
        labels = _labels(samples)
        if labels is not None:
            batch["labels"] = labels
        return batch

    def read(self, modality: str, value: Any) -> Any:
        """The cell as its processor takes it, or None where it is absent or cannot be decoded."""
        try:
            return read_cell(self.kinds[modality], value, **_options(self.kinds[modality], self.processors[modality]))
        except DecodeError as error:
            self._report(modality, value, error)
            return None
        except TypeError as error:
            if self.kinds[modality] == "text":
                raise TypeError(f"the column {modality} {error}") from error
            raise

    def _report(self, modality: str, value: Any, error: DecodeError) -> None:
        self.undecodable[modality] += 1
        name = cell_name(value)
        if name not in self._reported and len(self._reported) <= REPORTED:
            self._reported.add(name)
            what = "further files are counted, not named" if len(self._reported) > REPORTED else error
            logger.warning("%s %s cannot be decoded and counts as absent: %s", modality, name, what)

    def _together(self, modality: str, cells: list[Any]) -> tuple[Inputs | None, Tensor]:
        """`({name: [P, ..]}, present [B])`, what the processor makes of all P present cells at once; None of none."""
        values = [self.read(modality, cell) for cell in cells]
        there = [value for value in values if value is not None]
        self.measure(modality, there)
        return self._process(modality, there) if there else None, torch.tensor([value is not None for value in values])

    def _singly(self, modality: str, cells: list[Any]) -> tuple[Inputs | None, Tensor]:
        """As `_together`, but cell by cell, so that not a bit of a row depends on its neighbours or on the cache."""

        def read(cell: Any) -> Any:
            return self.read(modality, cell)

        def process(value: Any) -> Inputs:
            length = {LENGTH: torch.tensor([len(value)])} if self.kinds[modality] == "audio" else {}
            return self._process(modality, [value]) | length

        if self.cache is None:
            rows = [None if (value := read(cell)) is None else process(value) for cell in cells]
        else:
            rows = self.cache.lookup(self.processors[modality], cells, read, process)
        there = [row for row in rows if row is not None]
        computed = _concatenated(modality, there) if there else None  # [P, ..]
        if computed is not None and LENGTH in computed:
            self._count(modality, computed.pop(LENGTH).tolist())
        return computed, torch.tensor([row is not None for row in rows])

    def _scatter(self, modality: str, computed: Inputs | None, present: Tensor) -> Inputs:
        """The processor's tensors `[P, ..]` on the present rows of the batch, `[B, ..]`."""
        if computed is not None and present.all():
            return computed
        inputs = {}
        for name, tensor in (computed or self._blank(modality)).items():
            inputs[name] = tensor.new_zeros(len(present), *tensor.shape[1:])
            if computed is not None:
                inputs[name][present] = tensor
        if self.kinds[modality] == "text":
            show_a_token(inputs, ~present, self.processors[modality])
        else:
            for name in inputs:
                if name.endswith("mask"):
                    inputs[name][~present] = 1
        return inputs

    def _blank(self, modality: str) -> Inputs:
        """What the processor makes of one sample: shapes and dtypes for a batch in which nobody has the modality."""
        if modality not in self._blanks:
            from PIL import Image

            kind = self.kinds[modality]
            if kind == "audio":
                sample = np.zeros(self.processors[modality].sampling_rate, np.float32)
            else:
                sample = "." if kind == "text" else Image.new("RGB", (64, 64))
            if kind == "video":
                sample = [sample] * frames_of(self.processors[modality])
            self._blanks[modality] = self._process(modality, [sample])
        return self._blanks[modality]

    def _process(self, modality: str, values: list[Any]) -> Inputs:
        processor = self.processors[modality]
        kind = self.kinds[modality]
        if kind == "image":
            if len(getattr(processor, "image_mean", None) or ()) == 1:  # an encoder of grey pictures
                values = [image.convert("L") for image in values]
            return dict(processor(images=values, return_tensors="pt"))
        if kind == "video":
            return dict(processor(values, return_tensors="pt"))
        return self._process_clips(modality, values) if kind == "audio" else self._process_texts(modality, values)

    def _process_clips(self, modality: str, clips: list[np.ndarray]) -> Inputs:
        # Whisper and AST pad to a window of their own; the others pad nothing unless told to.
        processor = self.processors[modality]
        options = inspect.signature(type(processor).__call__).parameters
        pads_only_if_told = "padding" in options and options["padding"].default is False
        pad: dict[str, Any] = {"padding": True} if pads_only_if_told else {}
        if pad and getattr(processor, "padding_side", "right") != "right":
            processor = copy.copy(processor)  # encoders take a mask of clips for the length of their start
            processor.padding_side = "right"
        if pad and "return_attention_mask" in options and processor.model_input_names[0] == "input_values":
            # Without it the zeros behind a short clip are heard, so that a row depends on its neighbours.
            pad["return_attention_mask"] = True
        if not pad:
            shortest = processor.sampling_rate // SHORTEST_CLIP
            clips = [np.pad(clip, (0, max(0, shortest - len(clip)))) for clip in clips]
        return dict(processor(clips, sampling_rate=processor.sampling_rate, return_tensors="pt", **pad))

    def _process_texts(self, modality: str, texts: list[str]) -> Inputs:
        tokenizer = self.processors[modality]
        options: dict[str, Any] = {"padding": True, "padding_side": "right", "return_attention_mask": True}
        if has_fixed_length(tokenizer):
            options = {"padding": "max_length", "return_attention_mask": False}
        options |= {"truncation": True, "max_length": self._limit(modality), "return_tensors": "pt"}
        return dict(tokenize(tokenizer, texts, **options))

    def measure(self, modality: str, values: list[Any]) -> None:
        """Count which of these texts or clips are too long; of pictures and videos none is."""
        processor = self.processors[modality]
        if self.kinds[modality] == "text" and values:
            lengths = [len(ids) for ids in tokenize(processor, values, verbose=False)["input_ids"]]
        else:
            lengths = [len(clip) for clip in values] if self.kinds[modality] == "audio" else []
        self._count(modality, lengths)

    def _count(self, modality: str, lengths: list[int]) -> None:
        limit = self._limit(modality)
        if limit is not None and lengths:
            counted = self.cut.setdefault(modality, Cut(limit))
            counted.longest = max(counted.longest, *lengths)
            counted.count += sum(length > limit for length in lengths)

    def _limit(self, modality: str) -> int | None:
        """The tokens or samples that are read of a cell; None where all are."""
        processor = self.processors[modality]
        if self.kinds[modality] == "text":
            return longest_text(processor)
        return window(processor) if self.kinds[modality] == "audio" else None


@dataclass
class Cut:
    """How many samples were longer than `limit` (tokens, or samples of a clip), and the longest of all."""

    limit: int
    count: int = 0
    longest: int = 0

    def sentence(self, modality: str, total: int, rate: int | None = None) -> str:
        """For a warning: how many were cut and by how much; `rate` turns samples into seconds.

        >>> Cut(limit=64_000, count=3, longest=144_000).sentence("audio", 20, rate=16_000)
        '3 of 20 audio cells are cut to 4.0 s (the longest has 9.0 s)'
        """
        limit, longest = (f"{n} tokens" if rate is None else f"{n / rate:.1f} s" for n in (self.limit, self.longest))
        return f"{self.count} of {total} {modality} cells are cut to {limit} (the longest has {longest})"


def window(extractor: Any) -> int | None:
    """The samples that a feature extractor hears of a clip: Whisper's chunk, AST's number of 10 ms frames."""
    frames = getattr(extractor, "max_length", None)
    return getattr(extractor, "n_samples", None) or (frames and frames * extractor.sampling_rate // 100)


def stands_alone(kind: str, processor: Any) -> bool:
    """Whether what a processor makes of a cell depends on nothing else, neither its neighbours in a batch nor chance.

    >>> from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor
    >>> stands_alone("audio", ASTFeatureExtractor()), stands_alone("audio", Wav2Vec2FeatureExtractor())
    (True, False)
    """
    if kind != "audio":
        return kind != "text"
    padding = inspect.signature(type(processor).__call__).parameters.get("padding")
    own_window = padding is None or padding.default == "max_length"
    return own_window and not getattr(processor, "dither", 0.0)  # which is noise, drawn anew


def _options(kind: str, processor: Any) -> dict[str, Any]:
    """How `read_cell` reads for this processor: SigLIP 2's cuts patches out of pictures of any shape."""
    if kind == "image":
        return {"square": not hasattr(processor, "max_num_patches")}
    if kind == "video":
        return {"frames": frames_of(processor)}
    return {"rate": processor.sampling_rate} if kind == "audio" else {}


def frames_of(processor: Any) -> int:
    """The frames that are read of a video."""
    return getattr(processor, "num_frames", None) or FRAMES


def takes_videos(processor: Any) -> bool:
    """Whether an image processor's pictures are frames of videos.

    >>> from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
    >>> takes_videos(VideoMAEImageProcessorPil())
    True
    """
    return "videos" in inspect.signature(processor.preprocess).parameters


def cell_name(value: Any) -> str:
    """What to call a cell in a message: the path it holds."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return str(path) if isinstance(path, str | Path) else "unnamed content"


def _fitting(modality: str, processor: Any) -> tuple[str, Any]:
    """The kind of a processor (text, image, audio or video) and the part of it that reads `modality`."""
    from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

    if isinstance(processor, ProcessorMixin):
        part = getattr(processor, MEMBERS.get(modality, ""), None)
        if part is None:
            raise ValueError(
                f"the {type(processor).__name__} given for {modality!r} has several parts; pass the one that reads it "
                f"({', '.join(MEMBERS.values())})"
            )
        processor = part
    kinds = {"text": PreTrainedTokenizerBase, "image": BaseImageProcessor, "audio": FeatureExtractionMixin}
    for kind, parent in kinds.items():
        if isinstance(processor, parent):
            if kind == "text":
                give_padding(modality, processor)
            return "video" if kind == "image" and takes_videos(processor) else kind, processor
    raise ValueError(
        f"the processor given for {modality!r} is a {type(processor).__name__}; a Hugging Face tokenizer, image "
        "processor or feature extractor is needed"
    )


def _concatenated(modality: str, rows: list[Inputs]) -> Inputs:
    """`{name: [P, ..]}` of P rows `{name: [1, ..]}`."""
    shapes = {name: {tuple(row[name].shape[1:]) for row in rows} for name in rows[0]}
    for name, found in shapes.items():
        if len(found) > 1:
            raise ValueError(
                f"the processor for {modality!r} makes {name} of unlike shapes, such as "
                f"{' and '.join(map(str, sorted(found)[:2]))}: let it resize to one size"
            )
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _labels(samples: Sequence[Mapping[str, Any]]) -> Tensor | None:
    name = next((name for name in LABELS if any(name in sample for sample in samples)), LABELS[0])
    values: list[Any] = [sample.get(name) for sample in samples]
    unlabelled = sum(is_absent(value) for value in values)
    if unlabelled == len(values):
        return None
    if unlabelled:
        raise ValueError(f"{unlabelled} of {len(values)} samples have no label; label all of them, or none")
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    if any(isinstance(part, str) for value in values for part in (value if isinstance(value, list) else [value])):
        raise ValueError(
            f"labels must be numbers, not {values[0]!r}: turn names into a datasets.ClassLabel, and lists of names "
            "into vectors of 0 and 1, as load_table does"
        )
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError("the labels of a batch must have the same length; they have not") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"labels must be numbers, not {values[0]!r}")
    if not np.isfinite(array).all():
        raise ValueError(f"a label holds {array[~np.isfinite(array)][0]}; fill it in or leave its sample out")
    return torch.from_numpy(array.astype(np.int64 if array.ndim == 1 and array.dtype.kind != "f" else np.float32))
