"""What is published installs and works; `kernels/` installs as `u2a_fast.kernels`, beside a distribution named so."""

import re
import shutil
import subprocess
import sys
import venv
import warnings
from pathlib import Path

import pytest
import torch

import u2a_fast

ROOT = Path(__file__).parents[1]

STUB = """
from setuptools import setup
setup(name="kernels", version="9.9", packages=["kernels"])
"""
BESIDE = """
import kernels, u2a_fast, u2a_fast.kernels
print(kernels.__file__, u2a_fast.kernels.__file__, sep="|")
assert kernels.__version__ == "9.9" and not hasattr(u2a_fast.kernels, "__version__")
"""
STEP = """
import torch, u2a_fast
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
image, text = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)), BertModel(BertConfig(vocab_size=9, **sizes))
model = u2a_fast.U2A({"image": image, "text": text}, num_labels=3).train()
batch = dict(image={"pixel_values": torch.randn(2, 3, 8, 8)}, text={"input_ids": torch.ones(2, 4).long()})
present = torch.tensor([[True, True], [False, True]])
model(**batch, modality_mask=present, labels=torch.tensor([0, 2])).loss.backward()
from u2a_fast.cli import main
main(["doctor"])
print(u2a_fast.__file__, u2a_fast.__version__, sep="|")
"""


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source archive and wheel, the latter built from the former, as `python -m build` does without a network."""
    source = tmp_path_factory.mktemp("source")  # a copy: a build leaves files behind
    for name in ("kernels", "u2a_fast"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", source)
    (archive,), (wheel,) = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    return {"archive": archive, "wheel": wheel}


def empty_environment(folder):
    """A new environment's folder for packages. torch and transformers come from where this one has them, by a .pth;
    .pth files found through it are not read, so the editable install of this environment stays out."""
    venv.create(folder, with_pip=False)
    site = Path(run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    (site / "parent.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return site


def install(site, *what):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site, *what)


@pytest.mark.slow
def test_what_is_published_installs_and_trains_a_step(built, tmp_path):
    """The wheel, which was built from the source archive."""
    site = empty_environment(tmp_path / "fresh")
    install(site, built["wheel"])
    told = run(tmp_path / "fresh" / "bin" / "python", "-c", STEP, cwd=tmp_path)
    file, version = told.splitlines()[-1].split("|")
    assert Path(file) == site / "u2a_fast" / "__init__.py"
    assert version == u2a_fast.__version__ and all(version in file.name for file in built.values())
    assert re.search(rf"u2a-fast\W+{re.escape(version)}\W", told)  # doctor reads what pip was told


@pytest.mark.slow
def test_the_wheel_lives_beside_a_distribution_named_kernels(built, tmp_path):
    stub = tmp_path / "stub"
    (stub / "kernels").mkdir(parents=True)
    (stub / "kernels" / "__init__.py").write_text('__version__ = "9.9"\n')
    (stub / "setup.py").write_text(STUB)
    site = empty_environment(tmp_path / "fresh")
    install(site, built["wheel"], stub)
    theirs, ours = run(tmp_path / "fresh" / "bin" / "python", "-c", BESIDE, cwd=tmp_path).splitlines()[-1].split("|")
    assert Path(theirs) == site / "kernels" / "__init__.py"
    assert Path(ours) == site / "u2a_fast" / "kernels" / "__init__.py"
    names = {path.name for path in (site / "u2a_fast" / "kernels").glob("*.py")}
    assert names == {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert (site / "u2a_fast" / "py.typed").exists()


def test_the_changelog_says_this_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == u2a_fast.__version__


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("kernels", "u2a_fast.kernels"), ("u2a_fast.kernels", "kernels")])
def test_from_the_root_the_folder_registers_its_ops_once(first, second):
    """`python -m pytest` puts the root on the path, and transformers imports whatever is called kernels there."""
    probe = f"""
import sys, {first}, {second}
import torch
assert not hasattr(sys.modules["kernels"], "lora_linear")
x = torch.ones(2, 3)
print(sys.modules["u2a_fast.kernels"].lora_linear(x, torch.ones(4, 3), None, None, None, 1.0).sum().item())
"""
    assert run(sys.executable, "-c", probe, cwd=ROOT) == "24.0"


def test_a_warning_of_ours_is_an_error():
    with pytest.raises(UserWarning, match="anything"):
        warnings.warn_explicit("anything", UserWarning, "block.py", 1, "u2a_fast.block")
