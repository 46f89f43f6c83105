"""Imports run downwards, and `import grouped_gemm` needs only torch and packaging."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import grouped_gemm

ROOT = Path(grouped_gemm.__file__).parent

# From top to bottom. A module imports only from lower layers, and not from its own: so no backend imports another.
LAYERS = (
    ("__main__",),
    ("cli", "cli.*", "testing"),
    ("cli.language",),
    ("integrations", "integrations.*"),
    ("moe", "moe.*"),
    ("moe.module",),
    ("moe.experts",),
    ("moe.arguments",),
    ("moe.expert_parallel", "moe.implementations"),
    ("moe.peer_memory",),
    ("moe.decode",),
    ("moe.fused",),
    ("moe.tokens",),
    ("moe.composed", "moe.gemms", "moe.steps"),
    ("moe.activation", "moe.packing", "moe.padding", "moe.routing", "moe.rows"),
    ("__init__",),
    ("ops",),
    ("autotune.warmup", "backend", "integrations.torch_function", "linear"),
    ("autotune.measure", "functional"),
    ("autograd", "selection.dtensor"),
    ("group_plan", "weight_gradients"),
    ("selection.route",),
    ("selection.spec",),
    ("selection.checks",),
    ("autotune.profile", "core.dense", "selection.explanation"),
    ("core.tracing", "selection.rules", "weight_cache"),
    ("backends",),
    ("backends.*",),
    ("selection.cost_model",),
    ("backends.*.package",),
    ("backends.*.quantize*", "kernels.quantize.blocks"),
    ("backends.base",),
    ("kernels.moe.decode",),
    ("kernels.moe.packing", "kernels.moe.quantize"),
    (
        "kernels.gemm.k_grouped",
        "kernels.gemm.m_grouped",
        "kernels.moe.*",
        "kernels.quantize.fp8",
        "kernels.quantize.mx",
    ),
    ("kernels.gemm.tile_search",),
    (
        "kernels.gemm.k_grouped_hopper",
        "kernels.gemm.m_grouped_hopper",
        "kernels.quantize.blockwise",
        "kernels.quantize.packed_bf16",
        "kernels.quantize.rowwise",
    ),
    ("kernels.quantize.primitives",),
    ("backends.*.layouts", "kernels.common.hopper"),
    ("kernels", "kernels.*"),
    ("core.library", "core.call_spec", "core.quantized", "core.store", "reference"),
    ("core.replay",),
    ("core.machine", "core.pools", "core.preference", "core.recipes", "kernels.common.interpreter"),
    ("autotune.timing", "core.distributions", "core.vmap"),
    ("autotune", "core", "selection"),
)

# Packages that a module may import besides the standard library: all modules, at module level, and in functions.
EVERYWHERE = {"torch", "packaging"}
AT_ONCE = {
    "backends.*.quantize*": {"triton"},
    # These extend classes of their trainers, and what they register is registered by an import.
    "integrations.megatron": {"megatron"},
    "integrations.torchao": {"torchao"},
    "integrations.torchtitan": {"spmd_types", "torchtitan"},
    "kernels.*": {"triton"},
    "kernels.common.interpreter": {"numpy"},
}
WHEN_USED = {
    "backends.deepgemm.package": {"deep_gemm"},
    "cli.demo": {"matplotlib", "tqdm"},
    "core.machine": {"triton"},
    "integrations.transformers": {"transformers"},
}


class Import(NamedTuple):
    module: str  # as it is imported: "torch.nn", "grouped_gemm.selection.rules"
    line: int
    is_at_once: bool  # when the file is imported, not when a function runs


def module_of(path: Path) -> str:
    """The name inside the package, "backends.base"; "__init__" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", FILES)


def imports_of(module: str) -> list[Import]:
    """Every import of a file, those inside functions too."""
    return list(_imports(ast.parse(FILES[module].read_text()), module, is_at_once=True))


def _imports(node: ast.AST, module: str, *, is_at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_at_once)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{FILES[module]}:{child.lineno}: imports are absolute here"
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                is_module = submodule.partition(".")[2] in FILES
                yield Import(submodule if is_module else child.module, child.lineno, is_at_once)
        else:
            in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, module, is_at_once=is_at_once and not in_function)


def depth(module: str) -> int | None:
    """The layer of a module, counted from the top: that of the longest name or pattern that matches."""
    matches = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if fnmatchcase(module, name)]
    return max(matches)[1] if matches else None


def allowed(table: dict[str, set[str]], module: str) -> set[str]:
    return set().union(*(packages for name, packages in table.items() if fnmatchcase(module, name)))


@every_module
def test_every_module_has_its_layer(module):
    assert depth(module) is not None, f"{module} is in no layer: put it into LAYERS"


@every_module
def test_imports_run_downwards_only(module):
    for target, line, _ in imports_of(module):
        package, _, inside = target.partition(".")
        if package == "grouped_gemm":
            inside = inside or "__init__"
            assert depth(inside) > depth(module), f"{FILES[module]}:{line}: {module} may not import {inside}"


@every_module
def test_optional_packages_are_imported_where_they_are_used(module):
    for target, line, is_at_once in imports_of(module):
        package = target.partition(".")[0]
        if package == "grouped_gemm" or package in sys.stdlib_module_names:
            continue
        packages = EVERYWHERE | allowed(AT_ONCE, module)
        packages |= set() if is_at_once else allowed(WHEN_USED, module)
        when = "at once" if is_at_once else "in a function"
        assert package in packages, f"{FILES[module]}:{line}: {module} may not import {package} {when}"


def in_a_fresh_process(script: str) -> dict[str, Any]:
    """What ``script``, run by a new interpreter without a GPU, prints as JSON in its last line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GROUPED_GEMM_")}
    environment |= {"PYTHONPATH": str(ROOT.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """The modules that `import grouped_gemm` adds to those of `import torch`, and whether it starts a GPU.

    torch is made to report a GPU. Any use of it, by tensors as well, calls torch.cuda._lazy_init first.
    """
    return in_a_fresh_process(
        """
import json, sys, torch
starts = []
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda._lazy_init = lambda: starts.append(True)
before = set(sys.modules)
import grouped_gemm
print(json.dumps({"modules": sorted(set(sys.modules) - before), "starts a GPU": bool(starts)}))
"""
    )


def test_importing_the_package_imports_no_other_but_packaging(imported):
    packages = {module.partition(".")[0] for module in imported["modules"]}
    assert packages - set(sys.stdlib_module_names) <= {"grouped_gemm", "packaging", "torch"}


def test_importing_the_package_does_not_import_the_compiler(imported):
    compiler = ("torch._dynamo", "torch._inductor", "torch._functorch")
    assert not [module for module in imported["modules"] if module.startswith(compiler)]


def test_expert_parallelism_does_not_import_dynamo():
    """Which takes three seconds; torch.distributed does not import it either."""
    assert not in_a_fresh_process(
        """
import json, sys
import grouped_gemm.moe.expert_parallel
print(json.dumps("torch._dynamo" in sys.modules))
"""
    )


def test_importing_the_package_does_not_import_dtensor(imported):
    assert "torch.distributed.tensor" not in imported["modules"]


def test_importing_the_package_imports_no_backend(imported):
    backends = {module for module in imported["modules"] if module.startswith("grouped_gemm.backends.")}
    assert backends == {"grouped_gemm.backends.base"}


def test_importing_the_package_does_not_start_the_gpu(imported):
    assert not imported["starts a GPU"]


def test_a_call_runs_where_no_optional_package_can_be_imported():
    packages = set().union(*AT_ONCE.values(), *WHEN_USED.values())
    result = in_a_fresh_process(
        f"""
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(name + " is not here")

sys.meta_path.insert(0, Missing())
import torch
import grouped_gemm

a = torch.ones(4, 32, requires_grad=True)
b = torch.ones(2, 32, 8, requires_grad=True)
y = grouped_gemm.grouped_mm(a, b, torch.tensor([1, 4], dtype=torch.int32), recipe="mxfp8")
y.sum().backward()
print(json.dumps({{"y": y.unique().tolist(), "da": a.grad.unique().tolist()}}))
"""
    )
    assert result == {"y": [32.0], "da": [8.0]}
