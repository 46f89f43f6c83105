"""Files of the project that state the same fact agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grouped_gemm import __version__

ROOT = Path(__file__).resolve().parent.parent


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    assert re.findall(r"^## \[(\d\S*)\]", read("CHANGELOG.md"), re.M)[0] == __version__


def test_pre_commit_has_the_ruff_of_the_constraints() -> None:
    (expected,) = re.findall(r"^ruff==(\S+)$", read("constraints.txt"), re.M)
    found = re.findall(r"\bruff==([\d.]+)", read(".pre-commit-config.yaml"))
    assert found and set(found) == {expected}


def test_actions_are_pinned_by_commit() -> None:
    """A tag can be moved to other code; dependabot reads the version in the comment."""
    uses = re.findall(r"\buses: *(.*)$", read(".github/workflows/ci.yml"), re.M)
    assert uses
    for use in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use), use


def test_figures_name_the_versions_of_their_constraints() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", read("constraints-gpu.txt"), re.M))
    deepgemm = re.findall(r'^deepgemm = \["([\w-]+)==([\d.]+)", "([\w-]+)==([\d.]+)"', read("pyproject.toml"), re.M)
    ((package, version, needed, needed_version),) = deepgemm
    assert (pins[package], pins[needed]) == (version, needed_version)
    page = read("docs/performance.md")
    assert set(re.findall(r"\btorch (\d+\.\d+\.\d+)\+cu130", page)) == {pins["torch"]}
    assert set(re.findall(r"\btriton (\d+\.\d+\.\d+), `sgl", page)) == {pins["triton"]}
    assert set(re.findall(r"`sgl-deep-gemm` (\d+\.\d+\.\d+)", page)) == {pins["sgl-deep-gemm"]}
    assert set(re.findall(r"\btorchao (\d+\.\d+\.\d+)", page)) == {pins["torchao"]}


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them in links."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
