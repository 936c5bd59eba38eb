"""Processors, encoder folders and a table of samples, all tiny and made on the spot."""

import csv
import io
from pathlib import Path

import numpy as np
import tiny_encoders
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, ViTImageProcessor

from u2a_fast import MultimodalCollator

WORDS = ["[PAD]", "[UNK]", "[CLS]", "red", "green", "blue", "square", "thing"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", model_max_length=16
    )


def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 24, "width": 24})


def processors() -> dict:
    """Not in alphabetic order: `config.json` sorts keys, and the order must survive."""
    return {"text": tokenizer(), "image": image_processor()}


def encoder_folders(root: Path) -> dict[str, str]:
    """`{modality: folder}` of a tiny BERT and a tiny ViT, each with its processor."""
    folders = {}
    for name, family in {"text": "bert", "image": "vit"}.items():
        folder = root / "encoders" / name
        tiny_encoders.build(family).save_pretrained(folder)
        processors()[name].save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def samples(count: int, seed: int = 0) -> list[dict]:
    """Coloured squares and what they are called; the label is the colour."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = i % len(COLOURS)
        word, colour = list(COLOURS.items())[label]
        pixels = np.clip(np.array(colour) + generator.normal(0, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
        rows.append({"image": Image.fromarray(pixels), "text": f"{word} square", "label": label})
    return rows


def write_table(folder: Path, count: int) -> Path:
    """The samples as `table.csv` beside their pictures; every fifth has no text, every seventh no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "text", "label"])
        writer.writeheader()
        for i, sample in enumerate(samples(count)):
            name = f"{i}.png"
            sample["image"].save(folder / name)
            colour = list(COLOURS)[sample["label"]]
            text = "" if i % 5 == 4 else sample["text"]
            image = "" if i % 7 == 6 and text else name
            writer.writerow({"image": image, "text": text, "label": colour})
    return folder / "table.csv"


def clip_file(shades, size: tuple[int, int] = (64, 32), form: str = "mp4", codec: str = "mpeg4") -> bytes:
    """A video file with a frame in each of these shades of grey, 0 to 255."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        for shade in shades:
            pixels = np.full((size[1], size[0], 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def whole_and_resumed(build, folder):
    """Two models after four steps: one that took them at once, and one that went on from the first one's second."""
    rows = [{**row, "image": None} if i % 4 == 3 else row for i, row in enumerate(samples(12))]

    def trainer(name, seed):
        torch.manual_seed(seed)
        arguments = TrainingArguments(
            str(folder / name), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2,
            remove_unused_columns=False, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = build(encoder_folders(folder))
        return Trainer(model, arguments, train_dataset=rows, data_collator=MultimodalCollator(processors()))

    whole, resumed = trainer("whole", 0), trainer("resumed", 1)
    whole.train()
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    return whole.model, resumed.model
