"""Every public name has a docstring and a place on the API pages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import grouped_gemm

MODULES = {module.__name__: module for module in (grouped_gemm, grouped_gemm.backend, grouped_gemm.ops)}
NAMES = [
    (module, name)
    for module, public in (("grouped_gemm", grouped_gemm.__all__), ("grouped_gemm.ops", grouped_gemm.ops.__all__))
    for name in public
]
NAMES.append(("grouped_gemm.backend", "gmm"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pdoc")
    script = Path(__file__).resolve().parent.parent / "docs" / "api.py"
    spec = importlib.util.spec_from_file_location("api", script)
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    directory = tmp_path_factory.mktemp("api")
    api.build(directory)
    return directory


@pytest.mark.parametrize("module, name", NAMES)
def test_a_public_name_has_a_docstring(module: str, name: str) -> None:
    described = getattr(MODULES[module], name)
    text = vars(described).get("__doc__") if isinstance(described, type) else described.__doc__  # not a base's
    assert text and not text.startswith(f"{name}("), "no docstring of its own; a dataclass gets its signature as one"


@pytest.mark.parametrize("module, name", NAMES)
def test_a_public_name_is_on_a_page(pages: Path, module: str, name: str) -> None:
    described = getattr(MODULES[module], name)
    if isinstance(described, ModuleType):
        text = (pages / described.__name__.replace(".", "/")).with_suffix(".html").read_text(encoding="utf-8")
        assert re.search(r'<section class="module-info">.*?<div class="docstring"><p>', text, re.S)
        return
    text = (pages / module.replace(".", "/")).with_suffix(".html").read_text(encoding="utf-8")
    _, found, section = text.partition(f'<section id="{name}">')
    assert found
    assert '<div class="docstring"><p>' in section.partition("</section>")[0]
