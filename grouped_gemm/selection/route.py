"""From a `CallSpec` to its `Route`, decided once; from the arguments of an eager call to the route of one like it."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.preference import (
    AUTOTUNE,
    LOG,
    STRICT,
    BackendKind,
    KernelPreference,
    environment,
    resolve,
)
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.rules import Decision, NoBackendError, decide
from grouped_gemm.selection.spec import key_of


class Route(NamedTuple):
    """Who runs which pass, None where nobody has to, and what the passes need to know."""

    forward: BackendKind | None
    dgrad: BackendKind | None
    wgrad: BackendKind | None
    recipe: Recipe
    dtype: torch.dtype
    out_dtype: torch.dtype
    b_contiguous: str
    backends: tuple[BackendKind, ...]  # every one that runs a pass, once
    blocks: tuple[bool, ...]  # of each of them, whether its quantizers need token blocks in their plan
    group_alignment: int = 1  # what every group's size is a multiple of

    @property
    def unscaled_dgrad(self) -> Route:
        """The route of dA = dY B^T as a call of its own, whose dgrad is forward. For `Recipe.NONE`."""
        b_contiguous = "n" if self.b_contiguous == "k" else "k"
        return self._replace(forward=self.dgrad, dgrad=self.forward, out_dtype=self.dtype, b_contiguous=b_contiguous)

    @property
    def unscaled_wgrad(self) -> Route:
        """The route of dB as a call of its own, or of forward in the dtype of a gradient. For `Recipe.NONE`."""
        return self._replace(out_dtype=self.dtype)


def route_of(spec: CallSpec) -> Route:
    """The route of a call, decided once for equal specs.

    Raises:
        NoBackendError: a pass has no backend.
        ValueError: a switch in the environment has an unknown value.
    """
    found = _decided(tuple(spec))  # Dynamo of torch 2.13 hands on an empty NamedTuple
    if len(found) == 2:
        kind, text = found
        raise _ERRORS[kind](text)
    forward, dgrad, wgrad = [BackendKind.named(name) if name else None for name in found]
    return _route(spec, forward, dgrad, wgrad)


def route_on(spec: CallSpec, plan: Mapping[Pass, BackendKind]) -> Route:
    """The route of a call whose passes run on the backends of ``plan``, whatever a decision would say."""
    return _route(spec, plan.get(Pass.FORWARD), plan.get(Pass.DGRAD), plan.get(Pass.WGRAD))


def _route(spec: CallSpec, forward: BackendKind | None, dgrad: BackendKind | None, wgrad: BackendKind | None) -> Route:
    backends: tuple[BackendKind, ...] = ()
    for runs in (forward, dgrad, wgrad):
        if runs is not None and runs not in backends:
            backends += (runs,)
    blocks = tuple([get_backend(kind).needs_blocks(spec.recipe, kind is wgrad) for kind in backends])
    call = spec.recipe, spec.dtype, spec.out_dtype, spec.b_contiguous
    return Route(forward, dgrad, wgrad, *call, backends, blocks, spec.group_alignment)


_ERRORS: dict[str, type[Exception]] = {"NoBackendError": NoBackendError, "ValueError": ValueError}


def _decided(fields: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends of forward, dgrad and wgrad for a `CallSpec` of ``fields``, "" for none; or an error, kind and text.

    Dynamo evaluates this while tracing, takes the result for a constant, and would take an exception for an internal
    error of its own. `route_of`, which Dynamo traces, raises it.
    """
    spec = CallSpec(*fields)
    try:
        decision = decision_of(spec)
        if LOG.is_on() and decision not in _logged:
            _logged.add(decision)
            print(Explanation(decision), file=sys.stderr)
        decision.check()
        if decision.falls_back:
            _warn_once(decision)
    except NoBackendError as error:
        return "NoBackendError", str(error)
    except ValueError as error:  # of a switch in the environment
        return "ValueError", str(error)
    kinds = (decision.backend(pass_) for pass_ in (Pass.FORWARD, Pass.DGRAD, Pass.WGRAD))
    return tuple("" if kind is None else kind.value for kind in kinds)


# What torch.compiler.assume_constant_result does, which would import all of Dynamo with this package.
_decided._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decision_of(spec: CallSpec) -> Decision:
    """The decision, complete or not, under the switches of now.

    Raises:
        ValueError: a switch in the environment has an unknown value.
    """
    preference, asked_by = resolve(spec.preference, spec.context)
    # In a capture, health may be taken for granted: what is decided then holds for then.
    decide_now = _decide_once.__wrapped__ if spec.captured else _decide_once
    return decide_now(_epoch, spec, preference, asked_by, STRICT.is_on(), AUTOTUNE.is_on())


@functools.lru_cache(maxsize=4096)
def _decide_once(
    epoch: int, spec: CallSpec, preference: KernelPreference, asked_by: str, strict: bool, tunes: bool
) -> Decision:
    from grouped_gemm.autotune import profile  # what is needed to decide, importing this package need not wait for

    assert isinstance(spec.where, torch.device), "a call runs on a device"
    profiles = profile.profiles(spec.machine, tunes)
    return decide(spec, preference, candidates(spec.where), asked_by=asked_by, strict=strict, profiles=profiles)


_logged: set[Decision] = set()
_warned: set[str] = set()


def _warn_once(decision: Decision) -> None:
    """Warns that AUTO fell back to Emulated, once for each set of reasons."""
    head = f"{decision.spec.recipe.value} runs on the Emulated backend, which is slow; no other one runs it:"
    tail = f"{STRICT.name}=1 makes this an error, KernelPreference.EMULATED silences it."
    text = "\n".join([head, *(f"  {line}" for line in decision.refusal_lines()), tail])
    if text not in _warned:
        _warned.add(text)
        frame, level = sys._getframe(), 1
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("grouped_gemm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(text, stacklevel=level)  # the line that calls this package


# -- eager calls

Key = tuple[Any, ...]
_routes: dict[Key, Route] = {}  # of eager calls, by what `recall` looks at
_MAX_ROUTES = 4096
_epoch = 0  # how often `forget` was called: what it overtakes is kept for an epoch that is over


def recall(
    a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> tuple[Key | None, Route | None]:
    """The key of a call, and the route of an earlier one with an equal key: it passed every check, this one would.

    Args:
        a: as in `grouped_mm`.
        b: likewise.
        offs: likewise.
        bias: likewise.
        options: its other arguments; the third is ``group_alignment``.
    """
    key = key_of(a, b, offs, bias, options)
    if key is None:
        return None, None
    key = (*key, _epoch, environment())
    try:
        return key, _routes.get(key)
    except TypeError:  # an option that has no hash: the checks will name it
        return None, None


def remember(key: Key, route: Route) -> None:
    """Keeps the route that was found for ``key``, unless another thread has changed the environment meanwhile."""
    if key[-1] == environment():
        if len(_routes) >= _MAX_ROUTES:
            _routes.clear()
        _routes[key] = route


def forget() -> None:
    """Forgets what was decided, and what other threads are just deciding: what decisions rest on has changed."""
    global _epoch
    _epoch += 1
    _routes.clear()
    _decide_once.cache_clear()


def reset_caches() -> None:
    """As if nothing had been decided, logged or warned of in this process."""
    forget()
    _logged.clear()
    _warned.clear()
