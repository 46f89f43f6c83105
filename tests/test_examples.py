"""Each script of examples/ runs as a user would run it, and prints the results that it demonstrates."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Arguments that keep a script short here.
ARGUMENTS = {
    "compile_and_cuda_graph.py": ["--backend", "aot_eager"],  # no C++ compiler
    "fsdp_and_experts.py": ["--steps", "4"],
    "moe_layer.py": ["--steps", "16"],
    "override_existing_model.py": [],
    "quantized_weights.py": [],
    "transformers_experts.py": [],
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device):
    """Runs a script in this process, which has imported torch already, and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--device", device.type, *ARGUMENTS[name], *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_explains_itself(name, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    assert f"python examples/{name}" in capsys.readouterr().out


def test_a_moe_layer_learns_in_both_recipes_from_weights_quantized_once(run):
    *lines, shared = run("moe_layer.py").splitlines()
    (_, *first), (_, *last) = lines[1].split(), lines[-1].split()
    assert all(float(after) < 0.85 * float(before) for before, after in zip(first, last))
    assert int(re.search(r"share: ([\d,]+)$", shared)[1].replace(",", "")) >= 3 * 8 * 64 * 128  # a byte per weight


def test_two_ranks_learn_as_one_process(run):
    def losses(out: str) -> list[list[float]]:
        return [[float(loss) for loss in line.split()] for line in out.splitlines() if line.startswith("  ")]

    script = "--standalone", "--nproc-per-node", "2", EXAMPLES / "fsdp_and_experts.py"
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *script, "--device", "cpu", "--steps", "4"],
        env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    for recipe, expected in zip(losses(found), losses(run("fsdp_and_experts.py", "--device", "cpu")), strict=True):
        assert recipe[-1] < recipe[0] - 0.3
        assert recipe == pytest.approx(expected, abs=5e-3)


def test_weights_of_a_checkpoint_take_half_the_memory(run):
    out = run("quantized_weights.py")
    found = re.search(r"weights: ([\d,]+); in bf16: ([\d,]+)", out).groups()
    nbytes, in_bf16 = (int(n.replace(",", "")) for n in found)
    assert nbytes < 0.51 * in_bf16
    assert float(re.search(r"bf16: (0\.\d+)\n", out)[1]) < 0.05


def test_compiled_and_eager_agree(run, device):
    out = run("compile_and_cuda_graph.py")
    errors = [float(error) for error in re.findall(r"compiled and eager: (\S+)", out)]
    assert len(errors) == 6 and max(errors) < 1e-2
    if device.type == "cuda":
        replays = [float(error) for error in re.findall(r"replay and eager: (\S+)", out)]
        assert len(replays) == 2 and max(replays) < 1e-2
    else:
        assert "needs a GPU" in out


def test_an_override_changes_the_recipe_of_a_model(run):
    out = run("override_existing_model.py")
    error = float(re.search(r"output (0\.\d+)", out)[1])
    assert 0.01 < error < 0.1
    assert "the decorated layer gives the same: True" in out


def test_a_transformers_model_agrees_with_its_own_experts(run):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[transformers]'")
    out = run("transformers_experts.py")
    assert float(re.search(r"difference of logits: (\S+)", out)[1]) < 0.02
    assert re.search(r"generated: \[(\d+, ){7}\d+\]", out)
