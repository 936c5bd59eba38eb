"""What the page on encoders says is so: its code runs, and it names every class that is read or refused."""

import re
from pathlib import Path

from u2a_fast.encoders.families import FAMILIES, REFUSED

PAGE = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {"__name__": "page"})


def test_every_class_is_in_the_tables():
    classes = [name for family in FAMILIES for name in family.classes]
    missing = [name for name in (*classes, *REFUSED) if f"`{name}`" not in PAGE]
    assert len(classes) > 30 and not missing
