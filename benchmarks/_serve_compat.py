"""Which implementation runs in which mode of torch.compile, in one graph or not, and in CUDA graphs: found by a run.

Each cell runs a small layer with one token and with several. Its results must agree with those in fp32, or the cell
says by how much they do not. A compiled cell is first compiled with ``fullgraph=True``. If that raises, it is compiled
without, and the reason is kept. A cell with a CUDA graph captures the call, in eager mode or compiled; reduce-overhead
and max-autotune capture by themselves, unless Inductor skips it, which the cell then says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _calls import captured
from _common import reason_of, relative_error
from _report import Row
from _serve_group import Call, WrongResult, checked, limit_of, poisoned
from _serve_layers import COMPILED, Inputs, Shape, Weights, inputs_of
from torch import Tensor

SHAPE = Shape("qwen3_moe", 8, 256, 256, 2)
TOKENS = (1, 64)
TRACED = "aot_eager"  # traces and runs what it has traced: torch.compile without a compiler
MODES = ("eager", TRACED, *COMPILED)
_CAPTURES = ("reduce-overhead", "max-autotune")  # by themselves
_LENGTH = 120


def rows_of(
    dtypes: Sequence[str],
    names: Callable[[str], Sequence[str]],
    modes: Sequence[str],
    device: str,
    has_time: Callable[[str], bool],
    shape: Shape,
) -> Iterator[Row]:
    """A row for each cell: see `_serve_report`.

    Args:
        dtypes: of the model.
        names: the implementations of a dtype.
        modes: out of `MODES`.
        device: "cuda" or "cpu"; without a GPU there are no CUDA graphs.
        has_time: asked before each cell.
        shape: of the layer.
    """
    broken: dict[tuple[str, str], tuple[str, str]] = {}  # what fails in eager mode is not compiled
    for mode in modes:
        for dtype in dtypes:
            layer = _Layer(Weights(shape, dtype, device), device)
            for name in names(dtype):
                if not has_time(f"compat {dtype} {name} {mode}"):
                    continue
                row: Row = {"part": "compat", "dtype": dtype, "name": name, "mode": mode, "graph": False}
                row |= {"fullgraph": None, "skips": False}
                if (dtype, name) not in broken:
                    broken[dtype, name] = layer.result(layer.module(name), name)
                state, reason = broken[dtype, name]
                if state == "agrees" and mode != "eager":
                    yield from layer.compiled_rows(row)
                    continue
                yield row | {"state": state, "reason": reason}
                if state == "agrees" and device == "cuda":
                    state, reason = layer.result(layer.module(name), name, captures=True)
                    yield row | {"graph": True, "state": state, "reason": reason}


class _Layer:
    """Weights and inputs, with the results that are right."""

    def __init__(self, weights: Weights, device: str) -> None:
        self.weights, self.device, self.module = weights, device, weights.module
        self.cases = [inputs_of(weights.shape.case(tokens), device) for tokens in TOKENS]
        self.truths = [weights.truth(inputs) for inputs in self.cases]

    def compiled_rows(self, row: Row) -> Iterator[Row]:
        """The row of a compiled mode; and that of a CUDA graph of it, if it does not capture by itself."""
        name, mode = row["name"], row["mode"]
        module, counters = self._compiled(name, mode, fullgraph=True)
        state, reason = self.result(module, name)
        row = row | {"fullgraph": True if state == "agrees" else None}
        if state == "raises":
            module, counters = self._compiled(name, mode, fullgraph=False)
            state, other = self.result(module, name)
            row, reason = (row | {"fullgraph": False}, reason) if state == "agrees" else (row, other)
        row["skips"] = self.device == "cuda" and mode in _CAPTURES and counters["inductor"]["cudagraph_skips"] > 0
        yield row | {"state": state, "reason": reason}
        if self.device == "cuda" and mode not in (TRACED, *_CAPTURES) and state == "agrees":
            state, reason = self.result(module, name, captures=True)
            yield row | {"graph": True, "state": state, "reason": reason}

    def _compiled(self, name: str, mode: str, fullgraph: bool) -> tuple[Any, Any]:
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        options: dict[str, Any] = {"backend": TRACED} if mode == TRACED else {"mode": mode}
        return torch.compile(self.module(name), fullgraph=fullgraph, **options), counters

    def result(self, module: Any, name: str, captures: bool = False) -> tuple[str, str]:
        """The state of a cell, and the reason if it does not agree."""

        @torch.no_grad()
        def run(inputs: Inputs) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return module(*inputs)

        try:
            for inputs, truth in zip(self.cases, self.truths):
                call = lambda: run(inputs)  # noqa: B023, E731
                if captures:
                    replay, _ = captured(call)
                    call = poisoned(replay, replay())
                for _ in range(3):  # reduce-overhead warms up, captures and replays
                    checked(relative_error(call(), truth), limit_of(Call(self.weights.dtype, name, "")))
        except WrongResult as error:
            return "disagrees", str(error)
        except Exception as error:
            return "raises", _short(error)
        return "agrees", ""


def _short(error: Exception) -> str:
    """One sentence of an error."""
    text = reason_of(error)
    return text if len(text) <= _LENGTH else text[:_LENGTH].rsplit(" ", 1)[0] + " ..."
