"""`kernels/` installs as `u2a_fast.kernels` and leaves the distribution named `kernels` alone."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STUB = """
from setuptools import setup
setup(name="kernels", version="9.9", packages=["kernels"])
"""
PROBE = """
import kernels, u2a_fast, u2a_fast.kernels
print(kernels.__file__, u2a_fast.kernels.__file__, sep="|")
assert kernels.__version__ == "9.9" and not hasattr(u2a_fast.kernels, "__version__")
"""


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_the_wheel_lives_beside_a_distribution_named_kernels(tmp_path):
    stub = tmp_path / "stub"
    (stub / "kernels").mkdir(parents=True)
    (stub / "kernels" / "__init__.py").write_text('__version__ = "9.9"\n')
    (stub / "setup.py").write_text(STUB)
    source = tmp_path / "source"  # a copy: a build leaves files behind
    for name in ("kernels", "u2a_fast"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    wheels = tmp_path / "wheels"
    for project in (source, stub):
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, project)
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    site = Path(run(fresh / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    # torch and transformers from this environment; .pth files found through a .pth are not read, so the editable
    # install of this environment stays out.
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *wheels.iterdir())
    theirs, ours = run(fresh / "bin" / "python", "-c", PROBE, cwd=tmp_path).splitlines()[-1].split("|")
    assert Path(theirs) == site / "kernels" / "__init__.py"
    assert Path(ours) == site / "u2a_fast" / "kernels" / "__init__.py"
    names = {path.name for path in (site / "u2a_fast" / "kernels").glob("*.py")}
    assert names == {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert (site / "u2a_fast" / "py.typed").exists()


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
