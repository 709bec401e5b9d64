"""Builds rosaq/_C with csrc/build_support; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "build_support"))

from find_torch import find_torch  # noqa: E402
from native import Build, build, choose_toolkit  # noqa: E402


class NativeBuild(build_ext):
    """build_ext with our own compile step: per-file flags, no torch import, several files at once."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        toolkit = choose_toolkit()
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit("rosaq build: torch: none found, need torch>=2.10 installed, or ROSAQ_TORCH_DIR")
        includes = (Path(sysconfig.get_path("include")), Path(pybind11.get_include()))
        job = Build(ROOT / "csrc", ROOT / "build" / "objects", torch_dir, includes, toolkit)
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        build(job, Path(self.get_ext_fullpath(ext.name)), jobs)


setup(ext_modules=[Extension("rosaq._C", sources=[])], cmdclass={"build_ext": NativeBuild})
