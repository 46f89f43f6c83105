"""The pages of docs/ that follow from the code are current."""

from __future__ import annotations

from pathlib import Path

import pytest

from grouped_gemm import doctor

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["backends.md", "env.md"])
def test_a_generated_page_is_current(page: str) -> None:
    expected = doctor.pages(DOCS)[DOCS / page]
    found = (DOCS / page).read_text(encoding="utf-8")
    assert found == expected, f"docs/{page} is not current. Regenerate it: python -m grouped_gemm.doctor docs"


def test_hand_written_text_of_a_page_is_kept(tmp_path: Path) -> None:
    before, after = (
        "# Title\n\n<!-- generated: python -m grouped_gemm.doctor docs -->\n\n",
        "\n\n<!-- end of what is generated -->\n",
    )
    (tmp_path / "env.md").write_text(f"{before}old{after}rest\n", encoding="utf-8")
    assert doctor.pages(tmp_path)[tmp_path / "env.md"] == f"{before}{doctor.env_markdown()}{after}rest\n"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "env.md").write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the markers"):
        doctor.pages(tmp_path)
