"""For mkdocs: a copy of the sources as they are installed, `kernels/` as `u2a_fast.kernels`, in Markdown's spelling."""

import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
TREE = tempfile.TemporaryDirectory()  # as long as the build runs
EXAMPLE = re.compile(r"^( *)>>> .*\n(?:\1(?! *\"\"\").*\S.*\n)*", re.M)


@event_priority(100)  # before mkdocstrings reads where the sources are
def on_config(config):
    package = Path(TREE.name) / "u2a_fast"
    shutil.copytree(ROOT / "u2a_fast", package, dirs_exist_ok=True)
    shutil.copytree(ROOT / "kernels", package / "kernels", dirs_exist_ok=True)
    for source in package.rglob("*.py"):
        text = re.sub(r"^ *::\n", "", source.read_text(encoding="utf-8"), flags=re.M)
        source.write_text(EXAMPLE.sub(r"\1```pycon\n\g<0>\1```\n", text), encoding="utf-8")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [TREE.name]
    return config
