"""Selective activation checkpointing by op: GEMMs that a policy saves are not recomputed."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grouped_gemm import Recipe, gemm_ops, grouped_mm
from grouped_gemm.core.library import NAMES
from grouped_gemm.testing import TRAINING, Case, Shape, cases, make_inputs

SHAPE = Shape("whole_blocks", (0, 37, 1, 130, 0), tail=5, k=256, n=128)
of_cases = pytest.mark.parametrize(
    "case", cases(recipes=(Recipe.NONE, Recipe.FP8_BLOCKWISE), passes=(TRAINING,), shapes=[SHAPE]), ids=str
)


class Counted(TorchDispatchMode):
    """Counts the ops of this package that are computed, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "grouped_gemm":
            self.names[op.__name__.removesuffix(".default")] += 1
        return op(*args, **kwargs or {})


def train(case: Case, device: torch.device, **options) -> tuple[list[Tensor], Counter[str]]:
    """The output and gradients of a call that is checkpointed under ``options``, and the ops that were computed."""
    inputs = make_inputs(case, device)
    leaves = inputs.a.nan_to_num().requires_grad_(), inputs.b.clone().requires_grad_()

    def layer(a: Tensor, b: Tensor) -> Tensor:
        y = grouped_mm(a, b, inputs.offs, recipe=case.recipe, kernel_preference=case.backend)
        return torch.nn.functional.silu(y)  # has to be recomputed from the saved GEMM

    with Counted() as counted:
        y = checkpoint(layer, *leaves, use_reentrant=False, **options) if options else layer(*leaves)
        gradients = torch.autograd.grad(y, leaves, inputs.dy.nan_to_num())
    return [y, *gradients], counted.names


def num_gemms(counted: Counter[str]) -> int:
    return sum(count for name, count in counted.items() if name.endswith(("_grouped_mm", "_wgrad")))


def by_policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in gemm_ops() else CheckpointPolicy.PREFER_RECOMPUTE


@of_cases
@pytest.mark.parametrize("policy", [gemm_ops(), by_policy], ids=["list", "function"])
def test_a_saved_gemm_is_not_recomputed(case, policy, device):
    wanted, plain = train(case, device)
    found, saved = train(case, device, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
    _, recomputed = train(case, device, determinism_check="default")
    assert all(torch.equal(x, right) for x, right in zip(found, wanted))
    assert num_gemms(saved) == num_gemms(plain)
    assert num_gemms(recomputed) == num_gemms(plain) + 1


def test_gemm_ops_has_the_gemms_of_every_backend(backend):
    names = {op.__name__.removesuffix(".default") for op in gemm_ops()}
    assert {f"{backend.value}_grouped_mm", f"{backend.value}_wgrad"} <= names <= set(NAMES)
