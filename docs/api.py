"""Builds the API pages from docstrings: `python docs/api.py DIRECTORY`. `make docs` installs what this needs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import grouped_gemm


def build(directory: Path) -> None:
    """Writes a page for the package and one for each public module."""
    for name in grouped_gemm.__all__:  # pdoc sees only what is imported already, and some names are imported when used
        setattr(grouped_gemm, name, getattr(grouped_gemm, name))
    pdoc.render.configure(docformat="google", show_source=False)
    # Of a dataclass's __init__, whose names are those of another module. It is shown as it is written.
    warnings.filterwarnings("ignore", "Error parsing type annotation")
    pdoc.pdoc("grouped_gemm", output_directory=directory)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
