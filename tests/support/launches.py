"""One run in several processes beside the same run in one: its data, what it wrote, and who wrote it."""

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path

import tiny_data

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_distributed.py"


def arguments(root, count=80):
    """Complete samples: then the mean of the ranks' losses is the loss of all their samples, alignment included."""
    table = tiny_data.write_table(root / "data", count)
    with open(table, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["text"] and row["image"]]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    given = ["--data", str(table), "--encoders", json.dumps(tiny_data.encoder_folders(root))]
    return [*given, "--batch-size", "8", "--modality-dropout", "0", "--missing-rate", "0"]


def losses(folder):
    """`{step: loss}` of the run in a folder."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def example(*given):
    """The example in this process."""
    spec = importlib.util.spec_from_file_location("train_distributed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*given])


def watched(given):
    """The command line in a process that a launcher started, and what it wrote into the folder of the run."""
    from u2a_fast.cli import main

    rank, folder, written = os.environ["RANK"], given[-1], set()

    def watch(event, values):
        if event in ("open", "os.mkdir", "os.rename") and str(values[0]).startswith(folder):
            reads = event == "open" and values[1] is not None and not set(values[1]) & set("wax+")
            if not reads:
                written.add(Path(str(values[0])).name)

    sys.addaudithook(watch)
    main(given)
    written.discard("checkpoint-4")  # Trainer makes sure that it is there for rng_state_1.pth
    print(f"rank {rank} wrote {'report.csv' if 'report.csv' in written else sorted(written) or 'nothing'}")


if __name__ == "__main__":
    watched(sys.argv[1:])
