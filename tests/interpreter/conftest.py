"""Kernels under Triton's interpreter, with its roundings put right: TRITON_INTERPRET=1 pytest tests/interpreter."""

from __future__ import annotations

import os

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]  # ../test_interpreted.py starts them

if IS_INTERPRETED:
    import rounding

    rounding.install()
