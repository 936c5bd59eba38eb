"""Train U2A with Hugging Face's Trainer in several processes; the launcher says how these share the work.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_distributed.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_distributed.py    on GPUs
    torchrun --nproc-per-node 2 examples/train_distributed.py                                       DDP
    python examples/train_distributed.py                                                            one process

A step takes the same samples however many processes share them, so a run may go on (--resume) in fewer or more.
"""

import argparse
import json
import os

import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from u2a_fast import U2A, LoraConfig, MissingPattern, MultimodalCollator
from u2a_fast.data import with_missing
from u2a_fast.options import TrainOptions, load_sources
from u2a_fast.processes import leave


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="emoji", help="emoji, stamps, or a table with image, text, label columns")
    parser.add_argument("--encoders", type=json.loads, default=None, help="{modality: hub id or folder} as JSON")
    parser.add_argument("--output-dir", default="out/distributed")
    parser.add_argument("--batch-size", type=int, default=16, help="samples of a step, over all processes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--missing-rate", type=float, default=0.7)
    parser.add_argument("--modality-dropout", type=float, default=0.1)
    parser.add_argument("--quantization", default=None, help="int8, int8_w8a8 or nf4")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Trainer:
    options, processes = read_options(arguments), int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % processes:
        shared = f"--batch-size {options.batch_size} cannot be shared by {processes} processes"
        raise SystemExit(f"{shared}: make it a multiple")
    on_cpu = not torch.accelerator.is_available()
    set_seed(0)
    splits, sources = load_sources(TrainOptions(data=options.data, encoders=options.encoders))
    model = U2A(
        sources,
        num_labels=splits["train"].features["label"].num_classes,
        problem_type="single_label_classification",
        lora=LoraConfig(r=8),
        modality_dropout=options.modality_dropout,
        quantization=options.quantization,
    )
    train = with_missing(splits["train"], MissingPattern(options.missing_rate, "both", seed=0), list(sources))
    trainer = Trainer(
        model,
        TrainingArguments(
            options.output_dir,
            per_device_train_batch_size=options.batch_size // processes,
            max_steps=options.steps,
            save_steps=options.save_steps,
            logging_steps=1,
            learning_rate=1e-3,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # every encoder runs in every process, on no rows if need be
            use_cpu=on_cpu,  # or processes without GPUs train each for itself
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=MultimodalCollator(model.processors),
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.accelerator.is_fsdp2:
        raise SystemExit("accelerate shards models on GPUs only: on CPUs, docs/scaling.md shows how to shard by hand")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output_dir) if options.resume else None)
    trainer.save_model()
    trainer.save_state()  # by the first process only, as checkpoints and what is logged
    return trainer


if __name__ == "__main__":
    main()
    leave()
