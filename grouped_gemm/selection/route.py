"""The route of a call: decided once per `CallSpec`, and looked up for later eager calls with equal arguments."""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouped_gemm.backends import Candidate, candidates, get_backend
from grouped_gemm.core import replay
from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.machine import Machine
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
from grouped_gemm.core.recipes import OF_FASTEST, Recipe
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.rules import Decision, NoBackendError, decide, fastest_recipe, times_of_recipes
from grouped_gemm.selection.spec import key_of


class Route(NamedTuple):
    """The backend of each pass, None for a pass that is not needed, and what the passes need to know."""

    forward: BackendKind | None
    dgrad: BackendKind | None
    wgrad: BackendKind | None
    recipe: Recipe
    dtype: torch.dtype
    out_dtype: torch.dtype
    b_contiguous: str
    backends: tuple[BackendKind, ...]  # each backend that runs a pass, once
    blocks: tuple[bool, ...]  # for each of them, whether its quantizers need token blocks in the plan
    group_alignment: int = 1  # every group's size is a multiple of this

    @property
    def unscaled_dgrad(self) -> Route:
        """The route of dA = dY B^T as a separate call, whose own dgrad is forward. For `Recipe.NONE`."""
        b_contiguous = "n" if self.b_contiguous == "k" else "k"
        return self._replace(forward=self.dgrad, dgrad=self.forward, out_dtype=self.dtype, b_contiguous=b_contiguous)

    @property
    def unscaled_wgrad(self) -> Route:
        """The route of dB as a separate call, or of forward with the dtype of a gradient. For `Recipe.NONE`."""
        return self._replace(out_dtype=self.dtype)


def route_of(spec: CallSpec) -> Route:
    """The route of a call. Equal specs are decided once.

    Raises:
        NoBackendError: a pass has no backend.
        ValueError: an environment switch has an unknown value.
    """
    found = _decided(tuple(spec))  # a plain tuple: Dynamo of torch 2.13 passes a NamedTuple on empty
    if len(found) == 2:
        kind, text = found
        raise _ERRORS[kind](text)
    forward, dgrad, wgrad = [BackendKind.named(name) if name else None for name in found]
    return _route(spec, forward, dgrad, wgrad)


def route_on(spec: CallSpec, plan: Mapping[Pass, BackendKind]) -> Route:
    """The route of a call that runs on the backends of ``plan``, without a decision."""
    return _route(spec, plan.get(Pass.FORWARD), plan.get(Pass.DGRAD), plan.get(Pass.WGRAD))


def expected_route(spec: CallSpec) -> Route | None:
    """The route of a call if all backends are healthy, which this does not check. None: a pass has no backend.

    Raises:
        ValueError: an environment switch has an unknown value.
    """
    preference, _ = resolve(spec.preference, spec.context)
    assert isinstance(spec.where, torch.device), "a call runs on a device"
    healthy = [Candidate(candidate.backend) for candidate in candidates(spec.where)]
    chosen = decide(spec, preference, healthy, profiles=_profiles(spec.machine, AUTOTUNE.is_on())).chosen
    return route_on(spec, dict(chosen)) if len(chosen) == len(spec.passes) else None


def _profiles(machine: Machine, tunes: bool) -> Any:
    from grouped_gemm.autotune import profile  # only decisions need it; importing it here keeps our import fast

    return profile.profiles(machine, tunes)


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
    """The backends of forward, dgrad and wgrad for a `CallSpec` of ``fields``, "" for none. Or two strings: the type
    and text of an error.

    Dynamo evaluates this while tracing, and treats the result as a constant. It would report an exception as an
    internal error. So `route_of`, which Dynamo traces, raises the error.
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
    except ValueError as error:  # an environment switch has an unknown value
        return "ValueError", str(error)
    kinds = (decision.backend(pass_) for pass_ in (Pass.FORWARD, Pass.DGRAD, Pass.WGRAD))
    return tuple("" if kind is None else kind.value for kind in kinds)


# The same as torch.compiler.assume_constant_result, which would import all of Dynamo together with this package.
_decided._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_fastest_recipe(spec: CallSpec) -> CallSpec:
    """``spec``, in the recipe that ``recipe="fp8"`` stands for. Weights that are quantized already keep theirs.

    Raises:
        ValueError: an environment switch has an unknown value.
    """
    return spec if spec.weights is not None else spec._replace(recipe=Recipe.parse(_fastest(tuple(spec))))


def _fastest(fields: tuple[Any, ...]) -> str:
    """The name of the recipe for a `CallSpec` of ``fields``. As `_decided`, a constant of Dynamo."""
    try:
        return fastest_recipe(times_of(CallSpec(*fields))).value
    except ValueError:
        return Recipe.NONE.value  # `route_of` raises it


_fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def times_of(spec: CallSpec) -> dict[Recipe, float]:
    """Measured microseconds of a call in `OF_FASTEST` and in its own recipe, see `times_of_recipes`.

    Calls on weights that are quantized already, and wgrads as calls of their own, are not measured.

    Raises:
        ValueError: an environment switch has an unknown value.
    """
    if spec.weights is not None or spec.passes[0] is not Pass.FORWARD:
        return {}
    recipes = dict.fromkeys((*OF_FASTEST, spec.recipe))
    return times_of_recipes([decision_of(spec._replace(recipe=recipe)) for recipe in recipes])


def decision_of(spec: CallSpec) -> Decision:
    """The decision under the current switches, complete or not.

    Raises:
        ValueError: an environment switch has an unknown value.
    """
    preference, asked_by = resolve(spec.preference, spec.context)
    # A capture may assume that a backend is healthy. A decision that rests on this must not be cached.
    decide_now = _decide_once.__wrapped__ if spec.captured else _decide_once
    return decide_now(_epoch, spec, preference, asked_by, STRICT.is_on(), AUTOTUNE.is_on())


@functools.lru_cache(maxsize=4096)
def _decide_once(
    epoch: int, spec: CallSpec, preference: KernelPreference, asked_by: str, strict: bool, tunes: bool
) -> Decision:
    assert isinstance(spec.where, torch.device), "a call runs on a device"
    profiles = _profiles(spec.machine, tunes)
    return decide(spec, preference, candidates(spec.where), asked_by=asked_by, strict=strict, profiles=profiles)


_logged: set[Decision] = set()
_warned: set[str] = set()


def _warn_once(decision: Decision) -> None:
    """Warns that AUTO fell back to Emulated. Warns once for each set of reasons."""
    head = f"{decision.spec.recipe.value} falls back to the Emulated backend, which is slow; no other backend runs it:"
    tail = f"{STRICT.name}=1 makes this an error; KernelPreference.EMULATED silences it."
    text = "\n".join([head, *(f"  {line}" for line in decision.refusal_lines()), tail])
    if text not in _warned:
        _warned.add(text)
        frame, level = sys._getframe(), 1
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("grouped_gemm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(text, stacklevel=level)  # shows the line that calls this package


# -- eager calls

Key = tuple[Any, ...]


class Known(NamedTuple):
    """What is remembered of a call.

    Attributes:
        route: its route.
        number: of its key, see `core.replay.replayed`; None: operands are of a subclass, and are never replayed.
    """

    route: Route
    number: int | None


_known: dict[Key, Known] = {}  # of eager calls
_numbers = itertools.count()
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_MAX_ROUTES = 4096
# How often `forget` was called. It is part of the keys: a decision that was under way during a `forget` is never found.
_epoch = 0


def recall(
    a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> tuple[Key | None, Known | None]:
    """The key of a call, and what is known of an earlier call with the same key.

    The earlier call passed every check, so this one would pass them too.

    Args:
        a: as in `grouped_mm`.
        b: as in `grouped_mm`.
        offs: as in `grouped_mm`.
        bias: as in `grouped_mm`.
        options: recipe, out_dtype, group_alignment and kernel_preference.

    Returns:
        The key; None: such a call has to be described each time. What is known; None: no earlier call.
    """
    key = key_of(a, b, offs, bias, options)
    if key is None:
        return None, None
    key = key, _epoch, environment()
    try:
        return key, _known.get(key)
    except TypeError:  # an option cannot be hashed; the checks will name it
        return None, None


def remember(key: Key, route: Route, *operands: object) -> Known:
    """Caches the route for ``key``, unless another thread has changed the environment in the meantime.

    ``operands`` are all those of the call. Returns what is known of it now.
    """
    if key[-1] != environment():
        return Known(route, None)
    if len(_known) >= _MAX_ROUTES:
        _known.clear()
    is_plain = _PLAIN.issuperset(map(type, operands))
    found = _known[key] = Known(route, next(_numbers) if is_plain else None)
    return found


def epoch() -> int:
    """How often decisions were dropped: part of the key of anything else that depends on them."""
    return _epoch


def forget() -> None:
    """Drops all decisions, including those that other threads are making, because their inputs have changed."""
    global _epoch
    _epoch += 1
    _known.clear()
    _decide_once.cache_clear()
    replay.forget()


def reset_caches() -> None:
    """Clears all decisions, logged decisions and issued warnings of this process."""
    forget()
    _logged.clear()
    _warned.clear()
