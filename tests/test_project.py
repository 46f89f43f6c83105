"""Files of the project that state the same fact agree."""

from __future__ import annotations

import re
from pathlib import Path

from grouped_gemm import __version__

ROOT = Path(__file__).resolve().parent.parent


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    assert re.findall(r"^## \[(\d\S*)\]", read("CHANGELOG.md"), re.M)[0] == __version__
