"""The pages are right: their examples run, and their generated parts are current."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grouped_gemm import Machine, Recipe, grouped_mm, override_torch
from grouped_gemm import __main__ as cli
from grouped_gemm.autotune import warmup
from grouped_gemm.backends import Candidate, candidates
from grouped_gemm.cli import doctor

DOCS = Path(__file__).resolve().parent.parent / "docs"
README = DOCS.parent / "README.md"
BACKENDS = [candidate.backend for candidate in candidates(torch.device("cpu"))]


@pytest.fixture
def process_group() -> Iterator[None]:
    """Destroys the process group that an example leaves behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("page", [README, DOCS / "training.md"], ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they may write files
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    assert len(blocks) >= 2
    names: dict[str, Any] = {}
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(1))  # so that an error names the line of the page
        exec(compile(above + block[1], str(page), "exec"), names)


def test_the_example_for_transformers_registers_a_decorated_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block is marked `py`, since it needs transformers: this test replaces what it imports."""
    registered: dict[str, Any] = {}
    a, b = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(2, 16, 16, dtype=torch.bfloat16)
    offs = torch.tensor([2, 6], dtype=torch.int32)
    moe = types.ModuleType("transformers.integrations.moe")
    moe.ALL_EXPERTS_FUNCTIONS = types.SimpleNamespace(register=registered.__setitem__)
    moe.grouped_mm_experts_forward = lambda: torch.nn.functional.grouped_mm(a, b, offs=offs)
    for name in ("transformers", "transformers.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, moe.__name__, moe)
    chosen: list[str] = []
    model = types.SimpleNamespace(set_experts_implementation=chosen.append)
    blocks = re.findall(r"^```py\n(.*?)^```$", (DOCS / "training.md").read_text(encoding="utf-8"), re.M | re.S)
    (block,) = [block for block in blocks if "ALL_EXPERTS_FUNCTIONS" in block]
    exec(block, {"override_torch": override_torch, "model": model})
    (name,) = chosen
    assert torch.equal(registered[name](), grouped_mm(a, b, offs, recipe="fp8_blockwise"))


def commands() -> list[str]:
    """Every command that a page shows, except those that train or need a GPU."""
    pages = [README, *sorted(DOCS.glob("*.md"))]
    lines = re.findall(
        r"^(?:\w+=\S+ )?python -m grouped_gemm ((?:doctor|explain|warmup)\b.*)$",
        "\n".join(p.read_text() for p in pages),
        re.M,
    )
    return list(dict.fromkeys(line.partition("#")[0].strip() for line in lines))


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_page_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "warmup", lambda *_, **__: warmup.Warmup((), 0.0))
    assert cli.main(command.split()) in (0, 1)  # 1: no backend runs it here


def architectures(text: str) -> set[str]:
    return set(re.findall(r"sm_\d+|gfx[0-9a-f]+", text))


def test_readme_lists_every_backend_with_its_architectures() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", README.read_text(encoding="utf-8"), re.M))
    for backend in BACKENDS:
        required = architectures(" ".join(r.what for r in backend.requirements))
        assert architectures(rows[backend.kind.value]) == required, backend.kind.value


@pytest.mark.parametrize("offered", BACKENDS, ids=lambda backend: backend.kind.value)
def test_a_remedy_names_no_recipe_that_its_backend_never_runs(offered: Any) -> None:
    versions = {"torch": "2.11.0", "triton": "3.6.0", "deep_gemm": "0.1.5", "mslk": "2.11.0", "rocm": "7.0.0"}
    runs = set[str]()
    for arch in {"cpu"}.union(*(architectures(r.what) for backend in BACKENDS for r in backend.requirements)):
        vendor = {"s": "nvidia", "g": "amd"}.get(arch[0], arch)
        machine = Machine(vendor, arch, arch, tuple(versions.items()))
        (found,) = doctor.gather(machine, [Candidate(offered)])["backends"]
        runs |= found["runs"].keys()
    for r in offered.requirements:
        named = {recipe.value for recipe in Recipe if re.search(rf"\b(Recipe\.{recipe.name}|{recipe.value})\b", r.fix)}
        assert named <= runs, r.fix


@pytest.mark.parametrize("page", ["backends.md", "env.md"])
def test_a_generated_page_is_current(page: str) -> None:
    expected = doctor.pages(DOCS)[DOCS / page]
    found = (DOCS / page).read_text(encoding="utf-8")
    assert found == expected, f"docs/{page} is not current. Regenerate it: python -m grouped_gemm.cli.doctor docs"


def test_hand_written_text_of_a_page_is_kept(tmp_path: Path) -> None:
    before, after = (
        "# Title\n\n<!-- generated: python -m grouped_gemm.cli.doctor docs -->\n\n",
        "\n\n<!-- end of the generated part -->\n",
    )
    (tmp_path / "env.md").write_text(f"{before}old{after}rest\n", encoding="utf-8")
    assert doctor.pages(tmp_path)[tmp_path / "env.md"] == f"{before}{doctor.env_markdown()}{after}rest\n"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "env.md").write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the markers"):
        doctor.pages(tmp_path)
