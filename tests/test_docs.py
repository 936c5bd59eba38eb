"""What people read is true: every block of code runs, every link leads somewhere, every message and figure is ours."""

import ast
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from documents import FENCE, PAGES, ROOT, blocks, commands, furnish, replaced, save_model

import u2a_fast
import u2a_fast.data
import u2a_fast.encoders
from u2a_fast import kernels
from u2a_fast.cli import build_parser, main
from u2a_fast.data import load_table
from u2a_fast.encoders.families import FAMILIES, REFUSED

EXECUTED = [page for page in PAGES if blocks(page) and page != "serving"]  # which a test of its own runs
SHORT = {"train": ("--max-steps", "2"), "compare": ("--max-steps", "2", "--seeds", "[0]")}
PACKAGES = (u2a_fast, kernels, u2a_fast.encoders, u2a_fast.data)


# ------------------------------------------------------------------------------------------------------------- blocks
@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path)


def run_page(page, stand_ins, monkeypatch):
    """Run the blocks of a page in order and give back the names that its Python has made."""
    names = {"__name__": page}
    for block in blocks(page):
        text = replaced(block.text, stand_ins)
        if block.language == "python":
            exec(compile(text, block.name, "exec"), names)
        elif block.language == "sh":
            for command in commands(text):
                run_command(command, stand_ins, monkeypatch)
        elif block.language == "yaml":
            Path("run.yaml").write_text(text)
            run_command("u2a-fast train --config run.yaml", stand_ins, monkeypatch)
        elif block.language == "csv":
            Path("shown.csv").write_text(text)
            assert load_table("shown.csv", decode=True)["train"].features["label"]
        else:
            pytest.fail(f"{block.name} is {block.language or 'of no language'}: nobody would notice if it were wrong")
    return names


def run_command(command, stand_ins, monkeypatch):
    """As it stands where its data is at hand (two steps, one seed); of any other that it may be typed so."""
    before, _, command = command.rpartition(" | ")
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), command
    elif program in ("python", "torchrun", "accelerate"):
        named = [ROOT / argument for argument in arguments if re.search(r"\.(py|yaml)$", argument)]
        modules = [name for flag, name in itertools.pairwise(arguments) if flag == "-m"]
        assert named or modules, command
        assert all(file.exists() for file in named) and all(map(importlib.util.find_spec, modules)), command
    elif program == "u2a-fast":
        data = dict(itertools.pairwise(arguments)).get("--data")
        if "--run" in arguments or (data is not None and not Path(data).exists()):
            build_parser().parse_args(arguments)
            return
        with monkeypatch.context() as patch:
            if before:
                said = subprocess.run(before, shell=True, capture_output=True, check=True).stdout
                patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(said)))
            patch.setattr(u2a_fast.data, "dinov2_folder", lambda image_size: stand_ins["facebook/dinov2-small"])
            patch.setattr(u2a_fast.data, "minilm_folder", lambda: stand_ins["bert-base-uncased"])
            main([*arguments, *SHORT.get(arguments[0], ())])
    else:
        pytest.fail(f"nobody knows how to try {command!r}")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", EXECUTED)
def test_every_block_runs(page, stand_ins, monkeypatch):
    run_page(page, stand_ins, monkeypatch)


@pytest.mark.slow
def test_the_service_answers(stand_ins, monkeypatch):
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    save_model(Path("out/mine"), stand_ins)
    client = TestClient(run_page("serving", stand_ins, monkeypatch)["app"])
    whole = {"files": {"image": Path("0.png").read_bytes()}, "data": {"text": "red square"}}
    for sent in (whole, {"data": whole["data"]}, {"files": whole["files"]}):
        answer = client.post("/predict", **sent)
        assert answer.status_code == 200 and answer.json().keys() == {"label", "probability", "top"}
    assert client.post("/predict").status_code == 422
    assert client.post("/predict", files={"image": b"no picture"}).status_code == 422


# -------------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (PAGES[page].parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", text):
        linked = (PAGES[page].parent / target).read_text(encoding="utf-8") if target else text
        headings = re.findall(r"^#+ (.*)", linked, re.M)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


def messages():
    """Every string of the package, what is put into it as "…"."""
    for path in [*(ROOT / "u2a_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.slow
def test_quoted_messages_are_ours():
    quoted = re.findall(r"^### `(.*)`$", PAGES["faq"].read_text(encoding="utf-8"), re.M)
    said = [message.replace("`", "") for message in messages()]
    assert len(quoted) > 20
    assert [quote for quote in quoted if not any(quote in message for message in said)] == []


def test_the_page_on_encoders_names_every_class_that_is_read_or_refused():
    page = PAGES["encoders"].read_text(encoding="utf-8")
    classes = [name for family in FAMILIES for name in family.classes]
    missing = [name for name in (*classes, *REFUSED) if f"`{name}`" not in page]
    assert len(classes) > 30 and not missing


def test_public_names_are_documented():
    shown = []
    for name in re.findall(r"^::: ([\w.]+)$", PAGES["api"].read_text(encoding="utf-8"), re.M):
        module, _, attribute = name.rpartition(".")
        shown.append(getattr(importlib.import_module(module), attribute))
    public = {f"{package.__name__}.{name}": getattr(package, name) for package in PACKAGES for name in package.__all__}
    missing = [name for name, thing in public.items() if not any(thing is other for other in shown)]
    assert [name for name in missing if not isinstance(public[name], ModuleType)] == []


def test_figures_of_the_readme_stand_in_the_pages_they_come_from():
    table = re.search(r"^## Figures\n(.*?)^## ", PAGES["README"].read_text(encoding="utf-8"), re.M | re.S)[1]
    figures = re.findall(r"\d+\.\d+", table)
    pages = PAGES["results"].read_text(encoding="utf-8") + PAGES["speed"].read_text(encoding="utf-8")
    assert len(figures) > 8 and [figure for figure in figures if figure not in pages] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in PAGES.keys() - {"README", "index"}:
        assert (tmp_path / page / "index.html").exists()
