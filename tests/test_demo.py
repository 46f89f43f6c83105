"""The demo: a small model learns, FP8 as bf16 does, and the reader gets a table and a chart."""

from __future__ import annotations

import argparse
import sys

import pytest

from grouped_gemm import demo

STEPS = 40
SMALL = demo.Config(layers=1, width=64, hidden=128, batch=4)


@pytest.fixture(scope="module")
def curves() -> list[demo.Curve]:
    return [demo.train(recipe, steps=STEPS, config=SMALL, progress=False) for recipe in demo.RECIPES]


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(options)


def test_the_model_learns_more_than_how_often_each_byte_occurs(curves):
    assert curves[0].losses[0] > 5  # 256 bytes, all alike: 5.5 nats
    assert curves[0].smoothed[-1] < demo.unigram_entropy()


@pytest.mark.parametrize("index", range(1, len(demo.RECIPES)), ids=[r.value for r in demo.RECIPES[1:]])
def test_an_fp8_curve_follows_bf16s_within_two_percent(curves, index):
    assert curves[index].gap_to(curves[0]).abs().max() <= 2


@pytest.mark.parametrize("index", range(1, len(demo.RECIPES)), ids=[r.value for r in demo.RECIPES[1:]])
def test_an_fp8_curve_is_not_bf16s(curves, index):
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
    assert demo.run(parsed()) == 1
    assert capsys.readouterr().err == "The demo needs tqdm: pip install grouped-gemm-dispatch[demo]\n"


def test_a_run_needs_two_steps(capsys):
    with pytest.raises(SystemExit):
        parsed("--steps", "1")
    assert "expected at least 2" in capsys.readouterr().err
