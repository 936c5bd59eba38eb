"""Everything else is in pyproject.toml; only the mapping of `kernels/` needs code.

A distribution named `kernels` exists and transformers imports it when it is installed, so the folder `kernels/` is
installed as `u2a_fast.kernels` and never under its own name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["u2a_fast", "u2a_fast.*"]), "u2a_fast.kernels"],
    package_dir={"u2a_fast.kernels": "kernels"},
)
