"""Who pads an expert's rows to a multiple, and to which: the one place that answers, from recipe and backend.

A backend declares what it does with groups of any size. Most multiply them as they are. One may pad them inside its
calls (`padded_to`), or take only groups that the caller has padded (`required_alignment`): then the kernel that gathers
the rows into expert order pads as well. Both end where rows arrive padded and `group_alignment` says so.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch

from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.backends.base import _GroupedMMBackend
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass
from grouped_gemm.core.machine import default_device
from grouped_gemm.core.preference import (
    STRICT,
    BackendKind,
    KernelPreference,
    Preference,
    check_bool,
    resolve,
    surrounding,
)
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection.rules import decide


class Pads(Enum):
    """Who pads. `grouped_mm`: its backend does, while it quantizes."""

    NOBODY = "nobody"
    CALL = "`grouped_mm`"
    GATHER = "the gather"
    DISPATCHER = "the dispatcher"


class Case(NamedTuple):
    """Who pads, by recipe and by where a rank's rows come from.

    Attributes:
        recipe: "bf16", that is no recipe, "mxfp8", or "fp8", any other.
        rows_from: "own tokens", "a dispatcher" such as `AllToAll`, or "a dispatcher that pads" and asks
            `group_alignment` for the multiple.
        others: who pads for Triton, torch and Emulated.
        deepgemm: who pads for DeepGEMM; None: it does not run the recipe.
        hipblaslt: who pads for hipBLASLt in training. In inference, nobody does.
    """

    recipe: str
    rows_from: str
    others: Pads
    deepgemm: Pads | None
    hipblaslt: Pads

    def pads(self, kind: BackendKind) -> Pads | None:
        """Who pads for one backend."""
        return {BackendKind.DEEPGEMM: self.deepgemm, BackendKind.HIPBLASLT: self.hipblaslt}.get(kind, self.others)


# docs/training.md shows this table. With a dispatcher that pads, bf16 and fp8 are as with any other, unless a backend
# pads there: then the dispatcher does.
CASES = (
    Case("bf16", "own tokens", Pads.NOBODY, Pads.CALL, Pads.NOBODY),
    Case("bf16", "a dispatcher", Pads.NOBODY, Pads.CALL, Pads.NOBODY),
    Case("mxfp8", "own tokens", Pads.NOBODY, None, Pads.GATHER),
    Case("mxfp8", "a dispatcher", Pads.NOBODY, None, Pads.GATHER),
    Case("mxfp8", "a dispatcher that pads", Pads.NOBODY, None, Pads.DISPATCHER),
    Case("fp8", "own tokens", Pads.NOBODY, Pads.CALL, Pads.GATHER),
    Case("fp8", "a dispatcher", Pads.NOBODY, Pads.CALL, Pads.GATHER),
)


def group_alignment(
    recipe: Recipe | str | None = None,
    *,
    kernel_preference: Preference = KernelPreference.AUTO,
    device: torch.device | str | None = None,
    training: bool = True,
) -> int:
    """The multiple to which a dispatcher that pads should pad each expert's rows: with it, nobody pads again.

    Mostly 1: then padding gains nothing. The dispatcher returns the multiple in `SortedRows.group_alignment`.

    Args:
        recipe: as in `grouped_mm`.
        kernel_preference: as in `grouped_mm`. With AUTO, the backend that the vendor's order puts first.
        device: where the experts run; None: the GPU where there is one, else the CPU.
        training: whether there will be gradients of the weights.

    Raises:
        TypeError, ValueError: an argument does not fit.
        NoBackendError: no backend, or not the requested one, can run the recipe.
    """
    check_bool("training", training)
    parsed = Recipe.NONE if recipe is None else Recipe.parse(recipe)
    where = torch.empty(0, device=default_device() if device is None else device).device  # with its index
    preference, asked_by = resolve(KernelPreference.parse(kernel_preference), surrounding.kernel_preference)
    found, spec = candidates(where), _spec(where, parsed, training)
    best = spec._replace(group_alignment=math.lcm(*[_multiple(candidate.backend, spec) for candidate in found]))
    decision = decide(best, preference, found, asked_by=asked_by, strict=STRICT.is_on())
    decision.check()
    return math.lcm(*[_multiple(get_backend(kind), spec) for kind in decision.backends])


def gathered_to(recipe: Recipe | None, kernel_preference: Preference, device: torch.device, training: bool) -> int:
    """The multiple to which each expert's rows are padded while they are gathered; 1: they are not padded.

    With AUTO, 1: it takes no backend that would refuse the groups as they are.

    Args:
        recipe: of the GEMMs.
        kernel_preference: of the GEMMs.
        device: where they run.
        training: whether a gradient of weights is wanted that are not quantized beforehand.
    """
    preference, _ = resolve(KernelPreference.parse(kernel_preference), surrounding.kernel_preference)
    return 1 if preference is KernelPreference.AUTO else _gathered_to(preference, recipe, device, training)


def _gathered_to(preference: KernelPreference, recipe: Recipe | None, device: torch.device, training: bool) -> int:
    assert preference.kind is not None, "a backend is named"
    backend, spec = get_backend(preference.kind), _spec(device, recipe or Recipe.NONE, training)
    return _multiple(backend, spec) if who_pads(backend, spec) is Pads.GATHER else 1


_gathered_to._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `selection.route._decided`


def who_pads(backend: _GroupedMMBackend, spec: CallSpec) -> Pads:
    """Who pads the groups of a layer whose GEMMs run on ``backend``. The dispatcher has, if ``spec`` guarantees it."""
    multiple = _multiple(backend, spec)
    if multiple == 1:
        return Pads.NOBODY
    if spec.group_alignment % multiple == 0:
        return Pads.DISPATCHER
    return Pads.GATHER if backend.required_alignment(spec) > 1 else Pads.CALL


def _multiple(backend: _GroupedMMBackend, spec: CallSpec) -> int:
    """With groups in multiples of this, ``backend`` runs and does not pad."""
    return math.lcm(backend.padded_to(spec), backend.required_alignment(spec))


def _spec(device: torch.device, recipe: Recipe, training: bool) -> CallSpec:
    """A call of large groups, in sizes that every backend takes: padding does not depend on sizes."""
    passes = tuple(Pass) if training else (Pass.FORWARD,)
    return CallSpec(device, num_groups=8, k=4096, n=4096, rows=RowClass.LARGE, recipe=recipe, passes=passes)
