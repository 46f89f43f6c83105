"""benchmarks/serve.py without a GPU: the goals and tables of a run, checks before timing, every part on tiny sizes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install '.[transformers]'"
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def recorded(load: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The group module, and the lists that it fills: rows, failures, and what was left out."""
    common, group = load("_common"), load("_serve_group")
    lists: tuple[list[Any], list[str], dict[str, None]] = [], [], {}
    monkeypatch.setattr(group, "results", lists[0])
    for module in (common, group):
        monkeypatch.setattr(module, "failures", lists[1])
    monkeypatch.setattr(common, "not_measured", lists[2])
    return group, *lists


@pytest.fixture
def implementation(load: Any) -> Iterator[Any]:
    """Registers a peer of bf16 models in transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    load("_serve_layers").register()
    names: list[str] = []

    def register(function: Any) -> str:
        ALL_EXPERTS_FUNCTIONS.register(function.__name__, function)
        names.append(function.__name__)
        return names[-1]

    yield register
    for name in names:
        del ALL_EXPERTS_FUNCTIONS._global_mapping[name]


# -- goals and tables of a run


def row(part: str, us: float | None, dtype: str = "fp8", name: str = "grouped_gemm", **fields: Any) -> dict[str, Any]:
    times = None if us is None else {"mean": us, "median": us, "p10": us, "p90": us}
    found = {
        "part": part,
        "shape": "qwen3-30b",
        "tokens": 1,
        "dtype": dtype,
        "name": name,
        "mode": "graph",
        "us": times,
    }
    return found | {"error": None, "peak": None, "speedup": {}, "reading": 10.0, "batch": 1, "sequence": 16} | fields


LARGE = {"tokens": 4096, "mode": "eager"}
COMPAT = {"part": "compat", "dtype": "bf16", "mode": "default", "graph": False, "fullgraph": True, "skips": False,
          "state": "agrees", "reason": ""}  # fmt: skip
ROWS = [
    row("layer", 22.0, speedup={"fp8 grouped_mm": 3.0, "fp8 batched_mm": 1.2, "bf16 batched_mm": 0.9}),
    row("layer", 15.0, tokens=4, speedup={"fp8 batched_mm": 1.2}),  # within 1.6 of reading the weights
    row("layer", 40.0, tokens=16, speedup={"fp8 batched_mm": 1.2}),
    row("layer", 40.0, "bf16", tokens=16),  # no peer, and not within 1.6: nothing to compare with
    row("layer", 12.0, shape="dsv3-ep8"),
    row("layer", 500.0, **LARGE, speedup={"fp8 grouped_mm": 2.6, "bf16 grouped_mm": 1.9}),
    row("layer", 900.0, "bf16", **LARGE, peak=30.0, speedup={"bf16 grouped_mm": 1.4}),
    row("layer", 1260.0, "bf16", "grouped_mm", **LARGE, peak=100.0),
    row("layer", None, "bf16", tokens=512, mode="eager"),
    row("stack", 9.0, "bf16", "grouped_gemm_fp8", speedup={"bf16 grouped_mm": 1.5}),
    row("stack", 9.0, "bf16", speedup={"bf16 grouped_mm": 1.1}),
    row("generate", 2e6, layers=2, batch=4, prompt=16, new=8, mode="static", peak=12.0),
    row("prefill", 1500.0, batch=4, tokens=64, mode="default"),
    COMPAT | {"name": "grouped_gemm"},
    COMPAT | {"name": "grouped_gemm", "graph": True},
    COMPAT | {"name": "eager", "fullgraph": False, "reason": "a loop"},
    COMPAT | {"name": "deepgemm", "fullgraph": None, "state": "raises", "reason": "no kernel"},
    COMPAT | {"name": "batched_mm", "mode": "reduce-overhead", "skips": True},
]
RUN = {"device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.11.0"}, "seconds": 9.0, "copy": 2900.0,
       "failures": [], "left_out": ["x: y"], "rows": ROWS}  # fmt: skip


def test_each_goal_takes_its_own_rows(load):
    found = {
        goal.what: (goal.limit, goal.reached, len(goal.cases), goal.worst[1])
        for goal in load("_serve_report").goals(ROWS, RUN["device"])
        if goal.cases
    }
    small = "T<=64 as CUDA graphs: 1.5x transformers' best, or within 1.6x of reading"
    assert found == {
        "layer fp8, T=4096, against transformers' best in fp8": (2.5, 1, 1, 2.6),
        "layer bf16, T=4096, against transformers' best in bf16": (1.5, 0, 1, 1.4),
        "layer bf16, T=512, against transformers' best in bf16": (2.0, 0, 1, None),
        f"layer fp8, {small}": (1.0, 2, 4, pytest.approx(0.8)),
        "dsv3-ep8 fp8 T=1, share of a copy's bandwidth": (0.85, 0, 1, 10 / 12),
        "qwen3-30b fp8 T=1 as a CUDA graph": (25.0, 1, 1, 22.0),
        "stack grouped_gemm_fp8, a step, against transformers' grouped_mm": (1.4, 1, 1, 1.5),
        "stack grouped_gemm, a step, against transformers' grouped_mm": (1.2, 0, 1, 1.1),
        "layer, peak memory against transformers' grouped_mm": (0.6, 1, 1, 0.3),
    }


@pytest.mark.parametrize("device, limit", [("NVIDIA H200", 20.0), ("NVIDIA H100 80GB HBM3", 25.0)])
def test_the_time_of_one_token_is_that_of_the_gpu(load, device, limit):
    (goal,) = [g for g in load("_serve_report").goals(ROWS, device) if g.unit == " us"]
    assert goal.limit == limit and goal.cases == [("layer fp8 grouped_gemm qwen3-30b graph T=1", 22.0)]


def test_the_tables_of_a_run(load):
    lines = load("_serve_report").markdown(RUN).splitlines()
    assert lines[0] == "NVIDIA H100 80GB HBM3, torch 2.11.0."
    for line in (
        "| batch | sequence | mode | implementation | mean | median | p10 | p90 | peak, MiB |",
        "| 4 | 16 | default | `grouped_gemm` | 1.500 | 1.500 | 1.500 | 1.500 |  |",
        "| qwen3-30b | fp8 | 4 | 16 | static | `grouped_gemm` | 16 | 12.0 |",
        "| dtype | implementation | default | default, CUDA graph | reduce-overhead |",
        "| bf16 | `grouped_gemm` | yes | yes |  |",
        "| bf16 | `eager` | yes, graph breaks (1) |  |  |",
        "| bf16 | `deepgemm` | raises (2) |  |  |",
        "| bf16 | `batched_mm` |  |  | yes, no CUDA graph |",
        "1. a loop",
        "2. no kernel",
    ):
        assert line in lines


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "serve.py", *arguments], capture_output=True, text=True)


def test_a_run_is_reported_again(tmp_path):
    file, tables = tmp_path / "run.json", tmp_path / "run.md"
    file.write_text(json.dumps(RUN))
    found = script("--from-json", str(file), "--markdown", str(tables))
    assert found.returncode == 0, found.stderr
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    assert ("layer fp8 grouped_gemm qwen3-30b graph T=4 15.0 15.0 15.0 15.0 us 1.50x reading the weights (10.0 us) "
            "1.20x fp8 batched_mm") in lines  # fmt: skip
    assert "a copy reads and writes 2,900 GB/s" in lines
    assert any(line.startswith("NOT reached dsv3-ep8 fp8 T=1") for line in lines)
    assert "1 left out" in lines and "x: y" in lines
    assert "| bf16 | `deepgemm` | raises (2) |  |  |" in tables.read_text()


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"rows": []}')
    found = script("--from-json", str(file))
    assert found.returncode == 1 and "expected what --json has written; found no copy, device" in found.stderr


def test_without_transformers_it_says_so(load, monkeypatch):
    layers = load("_serve_layers")
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    assert layers.missing().startswith("expected transformers >= 5.17; found none. Install it")


# -- timing


def test_cold_samples_name_what_fails(load):
    def fails() -> None:
        raise RuntimeError("no\n  such kernel")

    calls: list[int] = []
    samples, errors = load("_calls").cold_samples({"good": lambda: calls.append(1), "bad": fails}, rounds=5)
    assert errors == {"bad": "RuntimeError: no such kernel"}
    assert list(samples) == ["good"] and len(samples["good"]) == 5 and len(calls) == 6


def test_a_wrong_result_is_not_timed(recorded):
    group, rows, failures, left_out = recorded
    timed: list[str] = []

    def timer(runs: Any) -> Any:
        timed.extend(call.name for call in runs)
        return {call: [2.0 if call.name == "grouped_mm" else 1.0] * 3 for call in runs}, {}

    errors = {"grouped_gemm": 0.003, "grouped_gemm_fp8": float("nan"), "grouped_mm": 0.004, "batched_mm": 0.02}
    calls = {group.Call("bf16", name, "eager"): row("layer", None, "bf16", name) for name in errors}
    group.measure_group(
        calls,
        prepare=lambda call: lambda: errors[call.name],
        error_of=lambda call, error: group.checked(error, group.limit_of(call)),
        timer=timer,
        peak_of=lambda call, run: 7.0,
    )
    assert timed == ["grouped_gemm", "grouped_mm"]
    found = {r["name"]: (r["us"] and r["us"]["median"], r["error"], r["speedup"]) for r in rows}
    assert found == {
        "grouped_gemm_fp8": (None, None, {}),
        "grouped_gemm": (1.0, 0.003, {"bf16 grouped_mm": 2.0}),
        "grouped_mm": (2.0, 0.004, {}),
    }
    assert len(failures) == 1 and "grouped_gemm_fp8" in failures[0] and "relative error nan" in failures[0]
    (line,) = left_out
    assert line.endswith("batched_mm qwen3-30b graph T=1: WrongResult: relative error 2.0e-02, expected below 0.01")


# -- layers


@needs_transformers
@pytest.mark.parametrize("model", ("qwen2_moe", "deepseek_v3"))
def test_modules_of_all_implementations_agree_with_fp32(load, model):
    layers = load("_serve_layers")
    layers.register()
    shape = layers.Shape(model, 4, 128, 384, 2)
    inputs = layers.inputs_of(shape.case(16), "cpu")
    for dtype, names in (("bf16", ("grouped_gemm", "grouped_gemm_fp8", "grouped_mm")), ("fp8", ("grouped_gemm",))):
        weights = layers.Weights(shape, dtype, "cpu")
        truth = weights.truth(inputs)
        assert truth.square().mean() > 0.01
        for name in names:
            module = weights.module(name)
            y = layers.layer_of(module, inputs).call()
            assert module.down_proj is weights.down
            assert (y - truth).norm() < (0.1 if dtype == "fp8" or name.endswith("fp8") else 1e-2) * truth.norm()


@needs_transformers
def test_only_active_experts_are_read(load):
    layers = load("_serve_layers")
    ids = torch.tensor([[0, 2], [2, 0], [2, 3]])
    values = 3 * 3 * 128 * 256
    shape = layers.Shape("qwen3_moe", 5, 128, 256, 2)
    assert layers.Weights(shape, "bf16", "cpu").active_bytes(ids) == 2 * values
    assert layers.Weights(shape, "fp8", "cpu").active_bytes(ids) == values + 4 * values // 128**2


def test_what_is_left_out_has_a_reason(load):
    layers = load("_serve_layers")
    case = layers.SHAPES["qwen3-30b"].case(64)
    reasons = {
        ("grouped_gemm", "bf16", "graph", "cuda"): "",
        ("grouped_gemm_fp8", "bf16", "eager", "cuda"): "",
        ("grouped_gemm_fp8", "bf16", "graph", "cuda"): "weight cache",
        ("eager", "bf16", "default", "cuda"): "graph breaks",
        ("eager", "fp8", "graph", "cuda"): "host syncs",
        ("grouped_gemm", "bf16", "graph", "cpu"): "CUDA GPU",
        ("batched_mm", "bf16", "eager", "cuda"): "",
    }
    for (name, dtype, mode, device), reason in reasons.items():
        found = layers.left_out(name, dtype, mode, case, device)
        assert (reason in found) if reason else found == ""
    large = case._replace(tokens=512)
    assert "GiB of weights" in layers.left_out("batched_mm", "bf16", "eager", large, "cuda")
    assert layers.left_out("batched_mm", "fp8", "eager", large, "cuda") == ""


# -- compatibility


def without_the_last_slot(self, hidden_states, top_k_index, top_k_weights):
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(self, hidden_states, top_k_index[:, :-1], top_k_weights[:, :-1])


def breaks_the_graph(self, hidden_states, top_k_index, top_k_weights):
    from transformers.integrations.moe import batched_mm_experts_forward

    torch._dynamo.graph_break()
    return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def is_not_installed(self, hidden_states, top_k_index, top_k_weights):
    raise ImportError("its kernel\n  is " + "very " * 100)


@needs_transformers
def test_a_cell_says_what_a_call_does(load, implementation):
    compat, layers = load("_serve_compat"), load("_serve_layers")
    names = [implementation(f) for f in (without_the_last_slot, breaks_the_graph, is_not_installed)]
    shape = layers.TINY["tiny"]
    modes = ("eager", compat.TRACED)
    rows = list(compat.rows_of(["bf16"], lambda _: ["grouped_gemm", *names], modes, "cpu", lambda what: True, shape))
    found = {(r["name"], r["mode"]): (r["state"], r["fullgraph"]) for r in rows}
    assert found == {
        ("grouped_gemm", "eager"): ("agrees", None),
        ("without_the_last_slot", "eager"): ("disagrees", None),
        ("breaks_the_graph", "eager"): ("agrees", None),
        ("is_not_installed", "eager"): ("raises", None),
        ("grouped_gemm", "aot_eager"): ("agrees", True),
        ("without_the_last_slot", "aot_eager"): ("disagrees", None),
        ("breaks_the_graph", "aot_eager"): ("agrees", False),
        ("is_not_installed", "aot_eager"): ("raises", None),
    }
    reasons = {r["name"]: r["reason"] for r in rows}
    assert reasons["grouped_gemm"] == ""
    assert "expected below 0.01" in reasons["without_the_last_slot"] and reasons["breaks_the_graph"]
    assert reasons["is_not_installed"].startswith("ImportError: its kernel is very very")
    assert len(reasons["is_not_installed"]) <= 124


# -- whole models


@pytest.fixture
def family(load: Any) -> Any:
    layers, models = load("_serve_layers"), load("_serve_models")
    layers.register()
    return models, layers.TINY["tiny"], models.Models(layers.TINY["tiny"], 1, "bf16", "cpu")


@needs_transformers
def test_a_step_is_compared_with_fp32(family):
    models, shape, family = family
    torch.manual_seed(0)
    x, dy = torch.randn(2, 1, 6, shape.hidden).bfloat16()

    def step(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        with models.fixed_routing(model, shape):
            return models.step_of(model, "", x.to(dtype).requires_grad_(), dy.to(dtype))()

    truth, found = step(family.in_fp32(), torch.float32), step(family.named("grouped_gemm"), torch.bfloat16)
    errors = models.check_step(found, truth, 2e-2)
    assert len(errors) == len(found) > 5 and max(errors) > 1e-3
    wrong = (*found[:3], found[3] * 1.1, *found[4:])
    with pytest.raises(Exception, match="relative error"):
        models.check_step(wrong, truth, 2e-2)


@needs_transformers
def test_wrong_logits_of_generate_are_found(family):
    models, _, family = family
    prompt = family.prompt(2, 5)
    run = models.generator_of(family.named("grouped_gemm"), prompt, 3, "static")
    output, truth = run(return_dict_in_generate=True, output_logits=True), family.in_fp32()
    assert output.sequences.shape == (2, 8)
    assert models.generated_error(truth, output, 5) < 0.03
    output.logits = output.logits[1:] + output.logits[:1]
    assert models.generated_error(truth, output, 5) > 0.5


@needs_transformers
def test_every_part_runs_on_tiny_sizes(tmp_path):
    file = tmp_path / "run.json"
    names = ("grouped_gemm", "grouped_gemm_fp8", "grouped_mm")
    options = ("--modes", "eager", "--batches", "1", "--layers", "1", "--new", "2", "--json", str(file))
    found = script("--device", "cpu", "--names", *names, *options)
    assert found.returncode == 0, found.stderr + found.stdout
    run = json.loads(file.read_text())
    keys = {tuple(row[key] for key in ("part", "dtype", "name")) for row in run["rows"] if row.get("us", True)}
    expected = {
        (part, dtype, name)
        for part in ("layer", "decode", "prefill", "stack", "generate", "compat")
        for dtype, name in (*(("bf16", name) for name in names), ("fp8", "grouped_gemm"))
        if (part, dtype) != ("stack", "fp8")
    }
    assert expected <= keys and keys - expected <= {(*key[:1], "fp8", "grouped_mm") for key in expected}
    assert run["copy"] > 0 and all(row["reading"] > 0 for row in run["rows"] if row["part"] == "layer")
    assert "0 failures" in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run on it")
@needs_transformers
def test_without_a_gpu_it_says_so():
    found = script()
    assert found.returncode == 1 and found.stderr.startswith("bench serve: needs a CUDA GPU")
