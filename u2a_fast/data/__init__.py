"""Samples with holes: data sets, missing tables and the collator that turns rows into batches.

Nothing heavy is imported here: Pillow, SciPy, soundfile, `datasets` and `transformers` are loaded by the functions
that need them.
"""

from u2a_fast.data.carriers import MissingPackageError
from u2a_fast.data.collator import MultimodalCollator
from u2a_fast.data.emoji import load_emoji
from u2a_fast.data.holes import MissingDataset, with_missing
from u2a_fast.data.inputs import is_absent
from u2a_fast.data.missing import MissingPattern, import_upstream_table
from u2a_fast.data.pretrained import dinov2_folder, minilm_folder, whisper_folder
from u2a_fast.data.splits import grouped_split
from u2a_fast.data.stamps import fetch_stamps, load_stamps
from u2a_fast.data.tables import load_table

__all__ = [
    "MissingDataset",
    "MissingPackageError",
    "MissingPattern",
    "MultimodalCollator",
    "dinov2_folder",
    "fetch_stamps",
    "grouped_split",
    "import_upstream_table",
    "is_absent",
    "load_emoji",
    "load_stamps",
    "load_table",
    "minilm_folder",
    "whisper_folder",
    "with_missing",
]
