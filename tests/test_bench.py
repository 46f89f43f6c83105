"""Benchmarks without a GPU: the report, the goals and the chart of an earlier run of grouped_mm.py; tiny runs."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text

from grouped_gemm import __main__ as cli

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def gemm(recipe: str, pass_: str, ms: float | None, kind: str = "balanced", **peers: float | None) -> dict[str, Any]:
    row = {"shape": "seed", "kind": kind, "recipe": recipe, "pass": pass_, "flops": 1e12, "error": 1.7e-3}
    return row | {"ms": ms, "peers": peers}


RUN = {
    "device": "a GPU",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "seconds": 100.0,
    "ceilings": {"bf16": 800.0, "fp8": 1600.0},
    "failures": [],
    "rows": [
        gemm("none", "forward", 1.6, torch=2.0),
        gemm("none", "forward", 2.0, "ragged", torch=1.8, deep_gemm=1.5),
        gemm("none", "wgrad", 2.0, torch=2.0),
        gemm("fp8_rowwise", "dgrad", 1.0, torch=None),
        gemm("fp8_blockwise", "forward", 1.0, deep_gemm=0.9),
        gemm("fp8_blockwise", "dgrad", 1.0, deep_gemm=0.1),
        gemm("fp8_blockwise", "wgrad", 1.0, deep_gemm=0.9),
        {"host": "grouped_mm none", "us": 24.0},
        {"host": "grouped_mm fp8_rowwise", "us": 90.0},
    ],
}  # fmt: skip


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_report")


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Reports a run from the command line; returns the exit code and what was printed."""

    def show(run: object, *arguments: str) -> tuple[Any, str, str]:
        file = tmp_path / "run.json"
        file.write_text(run if isinstance(run, str) else json.dumps(run))
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", "grouped_mm", "--from-json", str(file), *arguments])
        return exit_.value.code, *capsys.readouterr()

    return show


def test_a_row_shows_our_rate_the_peers_and_the_ratio(shown):
    code, out, _ = shown(RUN)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("seed ragged none forward")]
    words = " ".join(line.split())
    assert "500 TFLOP/s 0.62 of a matmul torch 556, 0.90x deep_gemm 667, 0.75x error 2e-03" in words


def test_each_goal_has_its_count_and_its_worst_case(shown):
    _, out, _ = shown(RUN)
    goals = [
        " ".join(line.split()) for line in out.partition("goals, in this run\n")[2].splitlines() if line[:2] == "  "
    ]
    assert goals == [
        "NOT reached bf16 forward against torch >= 1.00x 1 of 2, worst 0.90x: seed ragged none forward",
        "not measured bf16 dgrad against torch >= 1.00x",
        "reached bf16 wgrad against torch >= 1.00x 1 of 1, worst 1.00x: seed balanced none wgrad",
        "not measured fp8_rowwise forward against torch >= 1.00x",
        "not measured fp8_rowwise dgrad against torch >= 1.00x",
        "not measured fp8_rowwise wgrad against torch >= 1.00x",
        "NOT reached fp8_blockwise forward against deep_gemm >= 1.00x 0 of 1, worst 0.90x: "
        "seed balanced fp8_blockwise forward",
        "NOT reached fp8_blockwise dgrad against deep_gemm >= 1.00x 0 of 1, worst 0.10x: "
        "seed balanced fp8_blockwise dgrad",
        "NOT reached fp8_blockwise wgrad against deep_gemm >= 1.15x 0 of 1, worst 0.90x: "
        "seed balanced fp8_blockwise wgrad",
        "reached host time of an eager call in bf16 <= 25 us 1 of 1, worst 24.0 us: host time of grouped_mm none",
    ]


def test_goals_of_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    steps = importlib.import_module("steps")
    at = {"shape": "seed", "kind": "zipf"}
    rows = [
        at | {"name": "torch", "us": 300.0, "kept": 100, "peak": 1000},
        at | {"name": "none", "us": 290.0, "kept": 100, "peak": 1010, "plan": "none on triton"},
        at | {"name": "fp8", "us": 200.0, "kept": 52, "peak": 990, "plan": "fp8_rowwise on triton"},
    ]
    assert [" ".join(str(goal).split()) for goal in steps.goals(rows)] == [
        "reached fp8 on seed beside torch >= 1.50x 1 of 1, worst 1.50x: seed zipf fp8",
        "not measured fp8 on qwen3_gateup beside torch >= 1.25x",
        "reached fp8 beside torch >= 0.98x 1 of 1, worst 1.50x: seed zipf fp8",
        "reached kept activations in FP8 of torch's <= 0.55x 1 of 1, worst 0.52x: seed zipf fp8",
        "NOT reached peak of torch's <= 1.00x 1 of 2, worst 1.01x: seed zipf none",
    ]


@pytest.mark.parametrize("kind", ("balanced", "ragged", "zipf"))
def test_groups_of_benchmarks_have_all_rows(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    sizes = importlib.import_module("_common").ends_of(4096, 8, kind, "cpu").diff(prepend=torch.zeros(1)).int()
    assert sizes.sum() == 4096 and not (sizes % 16).any() and (sizes >= 0).all()
    assert (sizes.max() == 512) == (kind == "balanced")


def test_a_case_that_failed_does_not_reach_a_goal(report):
    run = copy.deepcopy(RUN)
    run["rows"][0]["ms"] = None
    run["rows"][-2]["us"] = None
    goals = {goal.what: goal for goal in report.goals(run["rows"])}
    forward, host = goals["bf16 forward against torch"], goals["host time of an eager call in bf16"]
    assert (forward.reached, forward.worst) == (0, ("seed balanced none forward", None))
    assert (host.reached, "worst failed" in str(host)) == (0, True)


def test_failures_are_listed_and_make_the_exit_code_1(shown):
    code, out, _ = shown(RUN | {"failures": ["seed none forward: error nan"]})
    assert code == 1
    assert "1 failures, 100 s\n  seed none forward: error nan\n" in out


def test_a_run_is_drawn_and_written_as_json_again(shown, tmp_path):
    picture, again = tmp_path / "run.png", tmp_path / "again.json"
    failed = RUN | {"rows": [*RUN["rows"], gemm("none", "dgrad", None, torch=None)]}
    code, out, _ = shown(failed, "--plot", str(picture), "--json", str(again))
    assert code == 0 and str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads(again.read_text()) == failed


def test_the_names_of_shapes_are_explained(shown):
    _, out, _ = shown(RUN)
    assert "shapes, M x E x N x K: seed 32768x8x2048x7168\n" in out


def test_the_chart_explains_itself(shown, tmp_path, monkeypatch):
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    shown(RUN | {"rows": [*RUN["rows"], gemm("none", "dgrad", None)]}, "--plot", str(tmp_path / "run.png"))
    (figure,) = figures
    (legend,) = figure.legends
    named = {text.get_text() for text in legend.get_texts()}
    assert named == {"grouped_gemm, balanced", "grouped_gemm, ragged", "torch", "DeepGEMM", "ceiling", "failed"}
    for axes in figure.axes:
        texts = [text for text in axes.findobj(Text) if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 8
        assert axes.get_ylabel() == "share of the matmul"
        assert axes.get_xlabel().startswith("shape, M x E x N x K")
        assert any("seed" in text.get_text() and "32768x8x2048x7168" in text.get_text() for text in texts)


@pytest.mark.parametrize("part", ("pass", "host", "nothing"))
def test_part_of_a_run_can_be_drawn(shown, tmp_path, part):
    rows = [row for row in RUN["rows"] if part in row]
    assert shown(RUN | {"rows": rows, "ceilings": {}}, "--plot", str(tmp_path / "run.png"))[0] == 0


def test_without_matplotlib_the_remedy_is_named(shown, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = shown(RUN, "--plot", str(tmp_path / "run.png"))
    assert (code, out, err) == (1, "", "--plot needs matplotlib: pip install grouped-gemm-dispatch[bench]\n")


@pytest.mark.parametrize("content", ("{", "[]", '{"rows": []}'))
def test_a_file_that_holds_no_run_is_named(shown, content):
    code, _, err = shown(content)
    assert code == 1
    assert "expected what --json has written; found" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run on it")
def test_without_a_gpu_it_says_so():
    found = subprocess.run([sys.executable, FOLDER / "grouped_mm.py"], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("This benchmark needs a CUDA GPU")


def test_expert_parallelism_is_measured_beside_torch(tmp_path):
    """On a CPU: every part runs on two ranks, and results agree with the peer's."""
    command = [
        sys.executable,
        "-m",
        "grouped_gemm",
        "bench",
        "expert_parallel",
        "--device",
        "cpu",
        "--repetitions",
        "1",
    ]
    out = subprocess.run(
        [*command, "--json", tmp_path / "run.json"], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert {(row["part"], row["name"]) for row in rows} >= {("dispatch", "peer"), ("step", "fp8_blockwise")}
    assert all(0 < row["us"] < 1e8 for row in rows)
    assert 0 < next(row["error"] for row in rows if row["name"] == "fp8_blockwise" and "error" in row) < 0.1
    assert out.count("reached") == 6


def test_host_time_is_that_of_replayed_calls(tmp_path, capsys):
    """On a CPU, with launches that do nothing. Forward is one program, and so is backward; a layer routes before."""
    pytest.importorskip("triton")
    cli.main(["bench", "host_time", "--repeats", "1", "--json", str(tmp_path / "run.json")])
    results = json.loads((tmp_path / "run.json").read_text())
    assert results.pop("a function that does nothing, step")["programs"] == 0
    programs = {name: us["programs"] for name, us in results.items()}
    assert [programs.pop(f"experts_forward{of}") for of in (" step", " fp8_blockwise", " fp8_blockwise step")] == [
        3,
        2,
        3,
    ]
    assert len(programs) == 9
    assert all(number == (2 if name.endswith("step") else 1) for name, number in programs.items())
    assert all(us["first"] > 0 and us["replayed"] > 0 for us in results.values())
    assert "none step" in capsys.readouterr().out


def test_quantizers_are_measured_beside_a_copy(tmp_path, monkeypatch, capsys):
    """On a CPU: the emulated backend on a tiny shape."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it would compile for half a minute
    command = ["bench", "quantizers", "--device", "cpu", "--rounds", "2", "--json", str(tmp_path / "run.json")]
    with pytest.raises(SystemExit) as exit_:
        cli.main(command)
    assert exit_.value.code == 0
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    weights = ("weights, K contiguous", "weights, N contiguous")
    assert [(row["recipe"], row["quantizer"]) for row in rows] == [
        (recipe, what)
        for recipe in ("fp8_rowwise", "fp8_blockwise", "mxfp8")
        for what in ("rows", "columns", "both", *weights)
    ]
    values = 256 * 128
    assert [row["bytes"] for row in rows[:4]] == [3 * values, 3 * values, 4 * values, 4 * 4 * 64 * 128]
    assert all(row["us"] > 0 and row["copy_us"] > 0 and list(row["peers"]) == ["torch.compile"] for row in rows)
    out = capsys.readouterr().out
    assert out.count("reached") == 9 and out.endswith("0 failures\n")


def test_shares_and_means_of_quantizers(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    quantizers = importlib.import_module("quantizers")
    row = {"recipe": "fp8_rowwise", "quantizer": "both", "bytes": 1, "us": 200.0}
    first, second = list(quantizers.SWEEP)[:2]
    rows = [
        row | {"shape": "seed", "copy_us": 130.0, "peers": {}},
        row | {"shape": first, "copy_us": 40.0, "peers": {"torch.compile": 400.0}},
        row | {"shape": second, "copy_us": 160.0, "peers": {"torch.compile": 1600.0, "torchao": 300.0}},
        row | {"shape": "qwen3_gateup", "us": None, "copy_us": 130.0, "peers": {}},
    ]
    (goal,) = (goal for goal in quantizers.goals(rows) if goal.cases)
    assert (goal.what, goal.reached, goal.worst) == (
        "fp8_rowwise both", 1, ("qwen3_gateup fp8_rowwise both", None)
    )  # fmt: skip
    (line,) = quantizers.means(rows)
    found = " ".join(line.split())
    assert found == "fp8_rowwise both 0.40 of a copy, 4.00x torch.compile (2 of 2), 1.50x torchao (1 of 2)"
