"""Calls of the large row class on the Triton backend, for tests on a GPU: few shapes, so that tests share kernels.

Kernels are specialized on dtypes, on whether sizes and strides are multiples of 16, and on E rounded up. So
there are few K and N, and always 6 groups. `compile_in_parallel` compiles beforehand, on many cores.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import Tensor

from grouped_gemm import BackendKind, Pass, Recipe, grouped_mm
from grouped_gemm.backends import get_backend
from grouped_gemm.testing import TRAINING, Case, Inputs, Shape

TRITON = BackendKind.TRITON
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)
# Whole and short tiles of every kernel, empty groups, a group of one row, rows of no group. K and N are no multiples of
# 128: the last blocks of both are half full.
RAGGED = Shape("ragged", (0, 700, 1, 333, 0, 1500), tail=70, k=2880, n=704)
# K is a multiple of 8, which TMA needs, but not of 16.
K1000 = Shape("k1000", RAGGED.sizes, tail=70, k=1000, n=704)


def training(shape: Shape = RAGGED, recipes: Iterable[Recipe] = RECIPES) -> pytest.MarkDecorator:
    """Parametrizes a test with ``case``: a call with all its gradients in bf16, for each recipe."""
    cases = [Case(TRITON, recipe, passes=TRAINING, shape=shape) for recipe in recipes]
    return pytest.mark.parametrize("case", cases, ids=str)


def layer(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The call of ``case``, as a function of ``a``, ``b`` and ``offs``."""

    def call(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(a, b, offs, recipe=case.recipe, out_dtype=case.out_dtype, kernel_preference=case.backend)

    return call


def train(call: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """The output, dA and dB of a `layer`, as from `testing.run`, without poisoned memory, which all threads share."""
    a, b = inputs.a.detach().requires_grad_(), inputs.b.detach().requires_grad_()
    y = call(a, b, inputs.offs)
    return (y.detach(), *torch.autograd.grad(y, (a, b), inputs.dy))


@contextmanager
def portable_kernels() -> Iterator[None]:
    """Runs calls without the Hopper kernels."""
    from grouped_gemm.kernels.gemm import k_grouped, k_grouped_hopper, m_grouped, m_grouped_hopper

    with pytest.MonkeyPatch.context() as patch:
        for module in (m_grouped, k_grouped):
            patch.setattr(module, "_gemms", {})  # cached launches of the Hopper kernels
        for module in (m_grouped_hopper, k_grouped_hopper):
            patch.setattr(module, "can_run", lambda *operands: False)
        yield


def tests_of_module(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """The selected tests of the module that ``request`` comes from."""
    return [item for item in request.session.items if getattr(item, "module", None) is request.module]


def cases_of(items: Iterable[pytest.Item]) -> list[Case]:
    """The cases of ``items``, each once."""
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(found["case"] for found in parameters if "case" in found))


def compile_in_parallel(jobs: Iterable[Callable[[], object]]) -> None:
    """Runs ``jobs`` in threads, so that kernels compile in parallel. A job that fails will fail again in its test."""

    def attempt(job: Callable[[], object]) -> None:
        with suppress(Exception):
            job()

    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        list(pool.map(attempt, jobs))


class Passes:
    """The passes of a call. Once its operands are quantized, any thread may run them in any order.

    They do without autograd, which runs the whole backward of a device in one thread.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs, self.backend = case, inputs, get_backend(TRITON)
        self.plan = self.backend.plan(inputs.offs, len(inputs.a))

    def quantize(self) -> None:
        """Writes the layouts that the passes need."""
        case, inputs = self.case, self.inputs
        columns, dgrad = Pass.WGRAD in case.passes, Pass.DGRAD in case.passes
        self.a, self.dy = (
            self.backend.quantize_activations(x.to(case.dtype), self.plan, case.recipe, rows=True, columns=columns)
            for x in (inputs.a, inputs.dy)
        )
        self.b = self.backend.quantize_weights(inputs.b, case.recipe, forward=True, dgrad=dgrad)

    def gemms(self) -> list[Callable[[], object]]:
        """The GEMM of each pass."""
        case, run, contiguous = self.case, self.backend, self.case.b_contiguous
        out_dtype, bias = case.out_dtype or case.dtype, self.inputs.bias
        gemms = {
            Pass.FORWARD: lambda: run.grouped_mm(self.a[0], self.b[0], self.plan, out_dtype, bias),
            Pass.DGRAD: lambda: run.grouped_mm(self.dy[0], self.b[1], self.plan, case.dtype),
            Pass.WGRAD: lambda: run.wgrad(self.a[1], self.dy[1], self.plan, case.dtype, contiguous=contiguous),
        }
        return [gemms[pass_] for pass_ in case.passes]


def with_sizes(case: Case, sizes: tuple[int, ...], tail: int = 0) -> Case:
    """``case`` with other groups."""
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, sizes=sizes, tail=tail))
