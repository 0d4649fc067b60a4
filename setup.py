"""Finds the packages; everything else there is to say stands in pyproject.toml."""

from setuptools import find_packages, setup

INTEGRATIONS = find_packages("integration")

setup(
    packages=[
        *find_packages(include=["vcache", "vcache.*", "vram_metadata_server", "vram_metadata_server.*"]),
        *INTEGRATIONS,
    ],
    package_dir={name: f"integration/{name.replace('.', '/')}" for name in INTEGRATIONS},
)
