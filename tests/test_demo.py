"""The demo: a small model learns, FP8 as bf16 does, and the reader gets a table and a chart."""

from __future__ import annotations

import io
import sys

import pytest

from grouped_gemm import __main__ as cli
from grouped_gemm.cli import demo

STEPS = 40
SMALL = demo.Config(layers=1, width=64, hidden=128, batch=4)


@pytest.fixture(scope="module")
def curves() -> list[demo.Curve]:
    return [demo.train(recipe, steps=STEPS, config=SMALL, progress=False) for recipe in demo.RECIPES]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*options: str) -> int:
    return cli.main(["demo", *options])


@pytest.fixture
def trained(curves, monkeypatch) -> list[object]:
    """The recipes that the demo trains; it gets curves that were computed before."""
    recipes: list[object] = []
    by_recipe = {curve.recipe: curve for curve in curves}

    def train(recipe, **_: object) -> demo.Curve:
        recipes.append(recipe)
        return by_recipe[recipe]

    monkeypatch.setattr(demo, "train", train)
    return recipes


def test_the_model_learns_more_than_byte_frequencies(curves):
    assert curves[0].losses[0] > 5  # 256 bytes, all alike: 5.5 nats
    assert curves[0].smoothed[-1] < demo.unigram_entropy()


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


def test_the_chart_is_a_png(curves, tmp_path):
    demo.draw(curves, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else object())
    assert run() == 1
    assert capsys.readouterr().err == "The demo needs tqdm: pip install grouped-gemm-dispatch[demo]\n"


def test_the_format_of_the_chart_follows_the_suffix(trained, tmp_path, capsys):
    assert run("--output", str(tmp_path / "chart.SVG")) == 0
    assert "<svg" in (tmp_path / "chart.SVG").read_text()
    assert (trained, "chart.SVG" in capsys.readouterr().out) == (list(demo.RECIPES), True)


def test_every_line_and_band_is_in_a_legend(curves, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure))
    demo.draw(curves, tmp_path / "chart.png")
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
