"""benchmarks/experts.py without a GPU: parity, the goals of a run, routing, timing, a run on tiny sizes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grouped_gemm import Recipe

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def parity(load: Any) -> Any:
    return load("_experts_parity")


# -- parity


@pytest.mark.parametrize("sizes", ((1, 1, 2), (1, 7, 1), (1, 4, 8)))
def test_exact_operands_give_the_same_bits(parity, sizes):
    rows = list(parity.rows_of(sizes, "exact", "cpu"))
    assert [row["name"] for row in rows] == ["eager", "eager_fused", "batched_mm", "grouped_mm"]
    assert {(row["max"], row["bound_max"], row["outside"]) for row in rows} == {(0.0, 0.0, 0)}


@pytest.mark.parametrize("sizes", ((1, 7, 1), (1, 4, 8)))
def test_results_on_random_operands_lie_within_their_bounds(parity, sizes):
    for row in parity.rows_of(sizes, "random", "cpu"):
        assert row["outside"] == 0
        assert row["max"] <= row["bound_max"] < 0.1 and row["mean"] <= row["bound_mean"]


def in_another_order(parity: Any, inputs: Any, pre: str) -> Tensor:
    """The layer with each sum taken backwards and in fp32; ``pre``: what the activation reads."""
    y = torch.zeros(inputs.x.shape)
    for t, j in ((t, j) for t in range(len(inputs.x)) for j in range(inputs.ids.shape[1])):
        e, x = inputs.ids[t, j], inputs.x[t].float().flip(0)
        gate, up = torch.stack([w @ x for w in inputs.gate_up[e].float().flip(1)]).chunk(2)
        if pre == "bf16":
            gate, up = gate.bfloat16().float(), up.bfloat16().float()
        act = torch.relu(gate) if inputs.exact else torch.nn.functional.silu(gate)
        h = (act * up).bfloat16().float()
        rows = torch.stack([w @ h.flip(0) for w in inputs.down[e].float().flip(1)]).bfloat16()
        y[t] += inputs.weights[t, j] * rows.float()
    return y.bfloat16()


@pytest.mark.parametrize("operands", ("exact", "random"))
@pytest.mark.parametrize("pre", ("bf16", "fp32"))
def test_a_layer_with_other_sums_lies_within_the_bounds(parity, pre, operands):
    inputs = parity.make_inputs(1, 3, 2, operands, "cpu")
    interval, y = parity.bounds(inputs, pre), in_another_order(parity, inputs, pre)
    assert parity.compare(y, y, {"bf16": interval})["outside"] == 0


def test_a_sum_in_fp32_lies_within_its_bound(parity):
    terms = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(len(terms), 1, dtype=torch.float64)
    lo, hi = parity._product(terms.double()[None], parity.Interval(ones, ones), exact=False)
    total = torch.zeros(())
    for term in terms:
        total += term
    assert lo.item() <= total.double() <= hi.item() and total.double() != (lo.item() + hi.item()) / 2
    assert hi.item() - lo.item() <= 2.1 * len(terms) * 2.0**-22 * terms.double().abs().sum()


@pytest.mark.parametrize("pre, h", (("bf16", 187 / 256), ("fp32", 188 / 256)))
def test_the_activation_reads_rounded_or_unrounded_values(parity, pre, h):
    """Gate and up are 1 + 2^-9, which is 1 in bf16."""
    one, gate_up = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1, 2.0**-9]] * 2).double()
    lo, hi = parity._expert(torch.ones(1, 2).double(), gate_up, one, False, pre)
    assert lo == hi == h


def swapped(inputs: Any) -> Any:
    """Gate and up exchanged."""
    return inputs._replace(gate_up=torch.cat(inputs.gate_up.chunk(2, dim=1)[::-1], dim=1))


def without_the_last_slot(inputs: Any) -> Any:
    weights = inputs.weights.clone()
    weights[-1, -1] = 0
    return inputs._replace(weights=weights)


@pytest.mark.parametrize("operands", ("exact", "random"))
@pytest.mark.parametrize("defect", (swapped, without_the_last_slot))
def test_a_defect_is_outside(parity, defect, operands):
    def run(inputs: Any, name: str) -> Tensor:
        return parity.layer(defect(inputs) if name == "grouped_mm" else inputs, "eager")

    outside = {row["name"]: row["outside"] for row in parity.rows_of((1, 4, 2), operands, "cpu", run)}
    assert outside.pop("grouped_mm") > 100
    assert set(outside.values()) == {0}


def test_one_unit_in_the_last_place_is_outside_for_exact_operands(parity):
    def run(inputs: Any, name: str) -> Tensor:
        y = parity.layer(inputs, "eager")
        y[0, 5] += 2.0**-7 * y[0, 5].abs() * (name == "grouped_mm")
        return y

    (row,) = [r for r in parity.rows_of((1, 1, 2), "exact", "cpu", run) if r["name"] == "grouped_mm"]
    assert row["outside"] == 1 and row["max"] > 0


def test_nan_is_outside(parity):
    interval, y = parity.Interval(*torch.tensor([[-1.0, 0], [1, 0]]).double()), torch.tensor([float("nan"), 0])
    assert parity.compare(y, torch.zeros(2), {"bf16": interval})["outside"] == 1


def test_operands_that_are_not_exact_are_refused(parity):
    inputs = parity.make_inputs(1, 1, 2, "exact", "cpu")
    with pytest.raises(ValueError, match="exact operands: expected sums of magnitudes below 2\\^24 units"):
        parity.bounds(inputs._replace(down=inputs.down * 2**14), "bf16")


# -- goals


def row(shape: str, ms: float | None, recipe: str = "none", weights: str = "", **fields: Any) -> dict[str, Any]:
    fields = {"name": "grouped_mm", "keep": "", "routing": "random", "mode": "eager", "pass": "forward"} | fields
    us = None if ms is None else dict.fromkeys(("mean", "median", "p10", "p90"), 1e3 * ms)
    found = {"part": "layer", "shape": shape, "tokens": 16384, "recipe": recipe, "weights": weights, "us": us}
    return found | {"peak": 3000.0, "kept": None, "error": None, "flops": 1e12, "speedup": {}} | fields


ONCE = {"recipe": "fp8_blockwise", "weights": "once"}
ROWS = [
    row("qwen3-30b", 2.0, speedup={"sonic": 1.2, "torch": 2.0}),
    row("olmoe", 2.5, speedup={"sonic": 0.9}),
    row("qwen3-30b", 2.5, mode="graph", speedup={"eager mode": 0.1, "sonic": 0.1}),
    row("qwen3-30b", 6.0, routing="zipf", speedup={"sonic": 0.1, "balanced": 0.8}),
    row("qwen3-30b", 7.0, **{"pass": "step"}, kept=386.0),
    row("qwen3-30b", 7.0, **{"pass": "step"}, kept=386.0, name="sonic"),
    row("qwen3-30b", 1.2, **ONCE, **{"pass": "step"}, kept=300.0, keep="recipe"),
    row("qwen3-30b", 1.5, "fp8_blockwise", "inside", speedup={"sonic": 1.3}),
    row("qwen3-30b", None, **ONCE, speedup={"sonic": None}),
    row("dsv3-ep8", 3.0, **ONCE, speedup={"torch": 2.2, "sonic": 0.1}),
    {"part": "host", "name": "grouped_mm", "recipe": "none", "weights": "", "keep": "", "pass": "step", "us": 901.0},
    {"part": "host", "name": "torch", "recipe": "none", "weights": "", "keep": "", "pass": "forward", "us": 1.0},
]
RUN = {"device": "a GPU", "versions": {"torch": "2.11.0"}, "seconds": 9.0, "failures": [], "left_out": ["x: y"],
       "rows": ROWS}  # fmt: skip


def test_each_goal_takes_its_own_rows(load):
    goals = {goal.what: goal for goal in load("_experts_report").goals(ROWS)}
    found = {what: (goal.limit, goal.reached, len(goal.cases), goal.worst[1]) for what, goal in goals.items()
             if goal.cases}  # fmt: skip
    assert found == {
        "bf16 qwen3-30b/olmoe forward against sonic": (1.0, 1, 2, 0.9),
        "bf16 qwen3-30b/olmoe kept against sonic": (1.0, 1, 1, 1.0),
        "fp8_blockwise once qwen3-30b/olmoe forward against sonic": (1.5, 0, 1, None),
        "fp8_blockwise once keep=recipe qwen3-30b/olmoe kept against sonic": (0.65, 0, 1, 300 / 386),
        "fp8_blockwise inside qwen3-30b/olmoe forward against sonic": (1.2, 1, 1, 1.3),
        "fp8_blockwise once dsv3-ep8 forward against torch": (2.1, 1, 1, 2.2),
        "time with zipf over balanced routing, forward": (1.1, 0, 1, 1.25),
        "host time of a layer, step": (900.0, 0, 1, 901.0),
    }


def test_the_goals_are_those_of_the_project(load):
    assert [f"{goal.what} {goal.limit:g}" for goal in load("_experts_report").goals([])] == [
        "bf16 qwen3-30b/olmoe forward against sonic 1",
        "bf16 qwen3-30b/olmoe step against sonic 1",
        "bf16 qwen3-30b/olmoe kept against sonic 1",
        "bf16 qwen3-30b-4k forward against sonic 1.3",
        "bf16 qwen3-30b-4k step against sonic 1.3",
        "bf16 dsv3-ep8 forward against torch 1.5",
        "bf16 dsv3-ep8 step against torch 1.4",
        "fp8_blockwise once qwen3-30b/olmoe forward against sonic 1.5",
        "fp8_blockwise once qwen3-30b/olmoe step against sonic 1.4",
        "fp8_blockwise once keep=recipe qwen3-30b/olmoe kept against sonic 0.65",
        "fp8_blockwise inside qwen3-30b/olmoe forward against sonic 1.2",
        "fp8_blockwise inside qwen3-30b/olmoe step against sonic 1.2",
        "fp8_blockwise once dsv3-ep8 forward against torch 2.1",
        "fp8_blockwise once dsv3-ep8 step against torch 1.7",
        "time with zipf over balanced routing, forward 1.1",
        "time with zipf over balanced routing, step 1.1",
        "host time of a layer, forward 300",
        "host time of a layer, step 900",
    ]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER / "experts.py", *arguments], capture_output=True, text=True, check=False
    )


def test_a_run_is_reported_and_drawn_again(tmp_path):
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    rows = [*ROWS, *(row("small-8", 0.1, part="small", tokens=t, mode=m) for t in (1, 8) for m in ("eager", "graph"))]
    file.write_text(json.dumps(RUN | {"rows": rows}))
    found = script("--from-json", str(file), "--plot", str(picture))
    assert found.returncode == 0, found.stderr
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    assert ("qwen3-30b T=16384 grouped_mm bf16 eager random forward 2000.0 2000.0 2000.0 2000.0 us peak 3000 MiB "
            "1.20x sonic 2.00x torch") in lines  # fmt: skip
    assert ("NOT reached fp8_blockwise once qwen3-30b/olmoe forward against sonic >= 1.50x 0 of 1, worst failed: "
            "qwen3-30b T=16384 grouped_mm fp8_blockwise once eager random forward") in lines  # fmt: skip
    assert "1 left out" in lines and "x: y" in lines
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# -- layers and timing


@pytest.mark.parametrize("routing", ("random", "balanced", "zipf"))
def test_routing_names_distinct_experts(load, routing):
    layers = load("_experts_layers")
    ids = layers.topk_ids(layers.Case(16, 8, 8, 4, 1024), routing)
    assert ids.shape == (1024, 4) and ids.min() >= 0 and ids.max() < 16
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    counts = ids.flatten().bincount(minlength=16).sort(descending=True).values / 256
    most = {"random": (1, 1.3), "balanced": (1, 1), "zipf": (2.5, 4)}[routing]
    assert most[0] <= counts[0] <= most[1]


def test_a_zipf_share_falls_with_the_rank(load):
    """With one expert per token the shares are those of the distribution."""
    layers = load("_experts_layers")
    counts = layers.topk_ids(layers.Case(8, 8, 8, 1, 100_000), "zipf").flatten().bincount(minlength=8)
    shares = torch.arange(1, 9).double() ** -1.2
    torch.testing.assert_close(
        counts.sort(descending=True).values / 100_000, (shares / shares.sum()).float(), rtol=0.03, atol=0
    )


@pytest.mark.parametrize("routing", ("random", "zipf"))
def test_the_torch_peer_computes_the_layer(load, routing):
    layers = load("_experts_layers")
    with layers.Operands(layers.Case(4, 32, 16, 2, 24), "cpu") as operands:
        ours, peer = operands.ours("eager", layers.BF16, routing).forward(), operands.peer("torch", routing).forward()
    assert (ours - peer).norm() < 1e-2 * ours.norm()


def test_weights_once_are_quantized_once(load, monkeypatch):
    layers = load("_experts_layers")
    inside, once, _ = layers.variants(Recipe.FP8_BLOCKWISE)
    with layers.Operands(layers.Case(4, 32, 16, 2, 24), "cpu") as operands:
        quantizing, cached = (operands.ours("grouped_mm", variant, "random") for variant in (inside, once))
        y = quantizing.forward()
        assert operands.cache.nbytes == 0
        assert torch.equal(cached.forward(), y)
        assert operands.cache.nbytes > 0
    assert operands.cache.nbytes == 0


def test_what_is_left_out_has_a_reason(load):
    layers = load("_experts_layers")
    case = layers.Case(128, 2048, 768, 8, 16384)
    inside, once, recipe_kept = layers.variants(Recipe.FP8_BLOCKWISE)
    assert layers.left_out("grouped_mm", case, inside, "graph") == ""
    assert "weight cache" in layers.left_out("grouped_mm", case, once, "graph")
    assert layers.left_out("grouped_mm", case, once, "eager") == ""
    assert "GiB of weights" in layers.left_out("batched_mm", case, layers.BF16, "eager")
    assert "host syncs" in layers.left_out("eager", case, layers.BF16, "graph")
    assert "not compiled" in layers.left_out("torch", case, layers.BF16, "default")
    assert layers.missing_argument(recipe_kept) in ("", "Experts has no argument keep")


def test_a_call_that_fails_is_named_and_the_others_are_timed(load):
    def fails() -> None:
        raise RuntimeError("no\n  such kernel")

    calls: list[int] = []
    samples, errors = load("_common").interleaved_samples(
        {"good": lambda: calls.append(1), "bad": fails}, seconds=0.0, rounds=(5, 9)
    )
    assert errors == {"bad": "RuntimeError: no such kernel"}
    assert list(samples) == ["good"] and len(samples["good"]) == 5
    assert len(calls) == 2 + 1 + 5 * 10


def test_quantiles_and_speedups(load):
    experts = load("experts")
    figures = experts.figures([float(i) for i in range(101)])
    assert figures == {"mean": 50.0, "median": 50.0, "p10": 10.0, "p90": 90.0}
    bf16 = experts.BF16
    ours, balanced, torch_ = (
        experts.Call(name, bf16, routing, "eager")
        for name, routing in (("grouped_mm", "zipf"), ("grouped_mm", "balanced"), ("torch", "zipf"))
    )
    layers = dict.fromkeys((ours, balanced, torch_))
    medians = {ours: 2.0, balanced: 1.0, torch_: 3.0}
    assert experts.speedups(ours, layers, medians) == {"torch": 1.5, "balanced": 0.5}
    assert experts.speedups(ours, layers, {torch_: 3.0}) == {"torch": None}


def test_every_part_runs_on_tiny_sizes(tmp_path):
    file = tmp_path / "run.json"
    names = ("grouped_mm", "eager_fused", "torch", "sonic")
    found = script("--device", "cpu", "--parts", "layer", "small", "host", "--names", *names, "--json", str(file))
    assert found.returncode == 0, found.stderr + found.stdout
    run = json.loads(file.read_text())
    keys = {tuple(row[key] for key in ("part", "name", "weights", "pass")) for row in run["rows"]}
    assert keys == {
        (part, name, weights, pass_)
        for part in ("layer", "small", "host")
        for name, weights in (
            ("grouped_mm", ""), ("grouped_mm", "inside"), ("grouped_mm", "once"), ("torch", ""), ("eager_fused", ""),
        )
        for pass_ in ("forward", "step")
        if (part, name) != ("host", "eager_fused")
    }  # fmt: skip
    assert all(row["us"] for row in run["rows"])
    assert any(line.startswith("sonic: ") for line in run["left_out"])
    assert "0 failures" in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run on it")
def test_without_a_gpu_the_other_parts_say_so():
    found = script("--parts", "layer", "host")
    assert found.returncode == 1
    assert found.stderr.startswith("layer, host: need a CUDA GPU")
