"""Samples with holes: data sets, missing tables and the collator that turns rows into batches.

Nothing heavy is imported here: Pillow, SciPy, soundfile, `datasets` and `transformers` are loaded by the functions
that need them.
"""

from .benchmarks import BENCHMARKS, load_food101, load_hateful_memes, load_mmimdb
from .carriers import MissingPackageError
from .collator import MultimodalCollator
from .emoji import load_emoji
from .holes import MissingDataset, with_missing
from .host_copies import HostCopies
from .inputs import is_absent
from .missing import MissingPattern, import_upstream_table
from .presence import readable
from .pretrained import dinov2_folder, minilm_folder, whisper_folder
from .splits import grouped_split
from .stamps import fetch_stamps, load_stamps
from .tables import load_table

__all__ = [
    "BENCHMARKS",
    "MissingDataset",
    "MissingPackageError",
    "MissingPattern",
    "HostCopies",
    "MultimodalCollator",
    "dinov2_folder",
    "fetch_stamps",
    "grouped_split",
    "import_upstream_table",
    "is_absent",
    "load_emoji",
    "load_food101",
    "load_hateful_memes",
    "load_mmimdb",
    "load_stamps",
    "load_table",
    "minilm_folder",
    "readable",
    "whisper_folder",
    "with_missing",
]
