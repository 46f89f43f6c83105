"""The demo: a small model learns, FP8 as bf16 does, and the reader gets a table and a chart."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest
import torch

from grouped_gemm import KernelPreference, NoBackendError, Recipe
from grouped_gemm import __main__ as cli
from grouped_gemm.cli import demo, language

STEPS = 40
SMALL = demo.Config(layers=1, width=64, hidden=128, batch=4, learning_rate=3e-3)  # so that few steps are enough


@pytest.fixture(scope="module")
def curves() -> list[demo.Curve]:
    return [demo.train(recipe, steps=STEPS, config=SMALL, progress=False) for recipe in demo.RECIPES]


@pytest.fixture(scope="module")
def read() -> language.Texts:
    return demo.texts(SMALL, STEPS, 0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*options: str) -> int:
    return cli.main(["demo", *options])


@pytest.fixture
def trained(curves, monkeypatch) -> list[str]:
    """The labels of what the demo trains on the CPU; it gets curves that were computed before."""
    labels: list[str] = []
    by_recipe = {curve.recipe: curve for curve in curves}

    def train(recipe, preference, **_: object) -> demo.Curve:
        curve = replace(by_recipe[recipe], preference=preference)
        labels.append(curve.label)
        return curve

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(demo, "SIZES", {"small": SMALL})
    return labels


def test_the_model_learns_more_than_byte_frequencies(curves, read):
    assert curves[0].losses[0] > 5  # 256 bytes, all alike: 5.5 nats
    assert read.least_loss < curves[0].final < read.unigram_loss - 0.5


@pytest.mark.parametrize("index", range(1, len(demo.RECIPES)), ids=[r.value for r in demo.RECIPES[1:]])
def test_an_fp8_curve_follows_bf16s_within_two_percent(curves, index):
    assert curves[index].gap_to(curves[0]).abs().max() <= 2


@pytest.mark.parametrize("index", range(1, len(demo.RECIPES)), ids=[r.value for r in demo.RECIPES[1:]])
def test_an_fp8_curve_differs_from_bf16s(curves, index):
    assert curves[index].gap_to(curves[0]).abs().max() > 0


def test_a_run_repeats_bit_for_bit(curves):
    again = demo.train(demo.RECIPES[1], steps=STEPS, config=SMALL, progress=False)
    assert again.losses.equal(curves[1].losses)


def test_the_table_names_every_run_with_its_gap_and_its_backends(curves):
    lines = demo.table(curves).splitlines()
    for curve in curves[1:]:
        (line,) = [line for line in lines if line.startswith(curve.label)]
        assert f"{curve.gap_to(curves[0]).abs().max():.2f}%" in line
        assert line.endswith("emulated")


def test_the_mean_is_over_a_thirtieth_of_a_long_run():
    curve = demo.Curve(Recipe.NONE, KernelPreference.AUTO, torch.arange(600.0), 0.0, ())
    assert curve.smoothed.tolist() == pytest.approx(torch.arange(9.5, 590).tolist())
    assert len(replace(curve, losses=torch.arange(30.0)).smoothed) == 30 - demo.WINDOW + 1
    assert len(replace(curve, losses=torch.arange(4.0)).smoothed) == 1


def test_a_backend_that_is_asked_for_runs_the_experts():
    curve = demo.train(Recipe.FP8_ROWWISE, KernelPreference.EMULATED, steps=2, config=SMALL, progress=False)
    assert (curve.label, curve.backends) == ("fp8_rowwise on emulated", ("emulated",))
    with pytest.raises(NoBackendError):
        demo.train(Recipe.NONE, KernelPreference.HIPBLASLT, steps=2, config=SMALL, progress=False)


def test_losses_on_each_backend_are_within_the_limit(backend, device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "SIZES", {"small": SMALL})
    arguments = ("--backend", backend.value, "--device", device.type, "--steps", "12")
    code = run(*arguments, "--output", str(tmp_path / "chart.png"), "--json", str(tmp_path / "run.json"))
    out, err = capsys.readouterr()
    if "expected a backend that trains in bf16" in err:
        pytest.skip(err.strip())
    assert code == 0, out
    curves = json.loads((tmp_path / "run.json").read_text())["curves"]
    assert curves[0]["label"] == f"bf16 on {backend.value}"
    assert all(curve["backends"] == [backend.value] and curve["is_within_limit"] for curve in curves)


def test_all_backends_are_trained_beside_the_first_bf16(trained, tmp_path, capsys):
    assert run("--backend", "all", "--recipes", "fp8_rowwise", "--output", str(tmp_path / "chart.png")) == 0
    assert trained == ["bf16 on emulated", "bf16 on torch", "fp8_rowwise on emulated"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not run: ")]
    assert any(line.startswith("Not run: fp8_rowwise on torch. torch ") for line in lines)
    assert any(line.startswith("Not run: bf16 on triton, fp8_rowwise on triton. triton ") for line in lines)


def test_a_backend_without_bf16_is_refused_with_its_reason(trained, capsys):
    assert run("--backend", "deepgemm") == 1
    err = capsys.readouterr().err
    assert err.startswith("Not run: bf16 on deepgemm, ") and "deepgemm  requires sm_90 or sm_100; found cpu." in err
    assert err.endswith("--backend deepgemm: expected a backend that trains in bf16 on this machine\n")
    assert trained == []


def test_recipes_are_trained_beside_bf16_in_the_order_of_the_demo(trained, tmp_path):
    assert run("--recipes", "mxfp8,fp8_rowwise", "--output", str(tmp_path / "chart.png")) == 0
    assert trained == ["bf16", "fp8_rowwise", "mxfp8"]


def test_an_unknown_recipe_is_named(capsys):
    with pytest.raises(SystemExit):
        run("--recipes", "fp8_rowwise,fp4")
    expected = "expected recipes out of fp8_rowwise, fp8_blockwise, mxfp8; found 'fp8_rowwise,fp4'"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "code"), [(1.015, 0), (0.985, 0), (1.03, 1), (0.97, 1), (float("nan"), 1)])
def test_a_final_loss_beyond_the_limit_is_named_and_fails(curves, trained, monkeypatch, tmp_path, capsys, factor, code):
    bf16 = curves[0]
    other = replace(bf16, recipe=Recipe.MXFP8, losses=bf16.losses * factor)
    monkeypatch.setattr(demo, "train", lambda recipe, *_, **__: other if recipe.is_scaled else bf16)
    assert run("--recipes", "mxfp8", "--output", str(tmp_path / "chart.png")) == code
    out = capsys.readouterr().out
    assert ("Not within 2% of bf16 at the end: mxfp8." in out) == (code == 1)
    assert ("Within 2% of bf16 at the end: yes, all 1." in out) == (code == 0)


def test_the_json_file_has_every_curve(curves, read, trained, tmp_path):
    path = tmp_path / "run.json"
    arguments = ("--output", str(tmp_path / "chart.png"), "--json", str(path), "--steps", str(STEPS))
    assert run(*arguments) == 0
    data = json.loads(path.read_text())
    assert (data["steps"], data["window"], data["config"]["experts"]) == (STEPS, demo.WINDOW, SMALL.experts)
    assert data["least_loss"] == pytest.approx(read.least_loss, abs=1e-4)
    for found, curve in zip(data["curves"], curves, strict=True):
        assert found["label"] == curve.label
        assert found["losses"] == pytest.approx(curve.losses.tolist(), abs=1e-4)
        assert found["ratio_to_bf16"] == pytest.approx(curve.final / curves[0].final, abs=1e-4)


def test_the_chart_is_a_png(curves, read, tmp_path):
    demo.draw(curves, read, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else object())
    assert run() == 1
    assert capsys.readouterr().err == "The demo needs tqdm: pip install grouped-gemm-dispatch[demo]\n"


def test_the_format_of_the_chart_follows_the_suffix(trained, tmp_path, capsys):
    assert run("--output", str(tmp_path / "chart.SVG")) == 0
    assert "<svg" in (tmp_path / "chart.SVG").read_text()
    assert trained == ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8"]
    assert "chart.SVG" in capsys.readouterr().out


def test_every_line_and_band_is_in_a_legend(curves, read, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure))
    demo.draw(curves, read, tmp_path / "chart.png")
    for axes in figures[0].axes:
        drawn = {artist.get_label() for artist in (*axes.lines, *axes.patches)}
        assert drawn == {text.get_text() for text in axes.get_legend().get_texts()}
        assert axes.get_ylabel().rstrip(")").endswith(("%", "steps"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("chart.txt", "expected a file name with one of the suffixes ."),
        ("chart", "found 'no suffix'"),
        ("missing/chart.png", "expected an existing directory; found no "),
        ("folder.png", "expected a writable file; found: Is a directory"),
    ],
)
def test_output_is_checked_before_the_training(trained, tmp_path, capsys, output, message):
    (tmp_path / "folder.png").mkdir()
    assert run("--output", str(tmp_path / output)) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"--output {tmp_path / output}: ") and message in err
    assert (trained, out) == ([], "")


def test_an_output_that_cannot_be_written_is_named(trained, tmp_path, capsys):
    """Not even root may write to /proc."""
    (tmp_path / "dangling.png").symlink_to(tmp_path / "missing" / "chart.png")
    for output in (tmp_path / "dangling.png", "/proc/chart.png"):
        assert run("--output", str(output)) == 1
        expected = f"--output {output}: expected a writable file; found: No such file or directory\n"
        assert capsys.readouterr().err == expected
    assert trained == []


def test_the_json_file_is_checked_before_the_training(trained, tmp_path, capsys):
    output = tmp_path / "missing" / "run.json"
    assert run("--json", str(output), "--output", str(tmp_path / "chart.png")) == 1
    expected = f"--json {output}: expected an existing directory; found no {output.parent}\n"
    assert (capsys.readouterr().err, trained) == (expected, [])


@pytest.mark.parametrize("before", [None, b"an earlier chart"])
def test_a_run_that_fails_leaves_the_output_as_it_was(tmp_path, monkeypatch, before):
    chart, link = tmp_path / "chart.png", tmp_path / "link.png"
    link.symlink_to(chart)
    if before is not None:
        chart.write_bytes(before)

    def train(*_: object, **__: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run("--output", str(link))
    assert link.is_symlink()
    assert (chart.read_bytes() if chart.exists() else None) == before


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_bars_are_for_terminals(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    demo.train(demo.RECIPES[0], steps=2, config=SMALL)
    assert ("2/2" in sys.stderr.getvalue()) == (stream is Terminal)


@pytest.mark.parametrize(("option", "least"), [("--steps", 2), ("--seed", 0)])
@pytest.mark.parametrize("value", ["-1", "many"])
def test_an_option_that_is_no_number_is_named(capsys, option, least, value):
    with pytest.raises(SystemExit):
        run(option, value)
    assert f"argument {option}: expected a whole number of at least {least}; found '{value}'" in capsys.readouterr().err
