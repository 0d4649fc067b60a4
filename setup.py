"""Finds the packages and names the files in C; everything else there is to say stands in pyproject.toml."""

from setuptools import Extension, find_packages, setup

INTEGRATIONS = find_packages("integration")

setup(
    packages=[
        *find_packages(include=["vcache", "vcache.*", "vram_metadata_server", "vram_metadata_server.*"]),
        *INTEGRATIONS,
    ],
    ext_modules=[
        Extension(name, [source], extra_compile_args=["-O3", "-std=c11", "-pthread"], extra_link_args=["-pthread"])
        for name, source in {
            "vcache.transfer._copy_blocks": "vcache/transfer/copy_blocks.c",
            "vcache.pool._shared_index": "vcache/pool/shared_index.c",
        }.items()
    ],
    package_dir={name: f"integration/{name.replace('.', '/')}" for name in INTEGRATIONS},
)
