"""The command line: each command's output, its exit code, and bad arguments, which are one line and no traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grouped_gemm import BackendKind, Machine, Pass, Recipe, __version__, explain
from grouped_gemm import __main__ as cli
from grouped_gemm.backends import Candidate, candidates, emulated
from grouped_gemm.backends.base import Health, requires_arch, requires_recipe
from grouped_gemm.cli import demo, doctor
from grouped_gemm.core.machine import default_device, machine_of

CPU = torch.device("cpu")
B200 = Machine("nvidia", "sm_100", "NVIDIA B200")
CALL = "--experts 4 --k 32 --n 48"
EXPLAIN = f"explain {CALL} --m 96"


class _HopperWgrad(emulated.Backend):
    kind = BackendKind.DEEPGEMM
    summary = "Stands for a backend that runs only some passes here."
    requirements = (
        requires_recipe([Recipe.FP8_BLOCKWISE]),
        requires_arch(["sm_90"], "Use another backend.", passes=(Pass.WGRAD,)),
    )


def _run(command: str) -> int:
    return cli.main(command.split())


def _findings(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return doctor.gather(machine_of(CPU), candidates(CPU))


def _error(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad command prints to stderr."""
    with pytest.raises(SystemExit) as exit_:
        _run(command)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_calling_without_a_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("doctor", "explain", "warmup", "demo", "bench"))


def test_commands_are_imported_when_they_run() -> None:
    commands = {"grouped_gemm.cli.doctor", "grouped_gemm.cli.demo"}
    code = f"import sys, grouped_gemm.__main__; print({commands} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "grouped_gemm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_doctor_shows_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("doctor") == 0
    out = capsys.readouterr().out
    assert machine_of(default_device()).name in out
    assert torch.__version__ in out
    assert all(candidate.backend.summary in out for candidate in candidates(default_device()))


def test_doctor_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    _run("doctor")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 120, max(out.splitlines(), key=len)


def test_doctor_json_has_the_documented_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("doctor --json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings) == {"machine", "versions", "overwritten_by", "backends", "switches", "choices"}
    assert set(findings["machine"]) == {"name", "vendor", "arch", "fp8_dtype"}
    assert {"grouped_gemm", "python", "torch"} <= set(findings["versions"])
    assert all(set(b) == {"name", "ready", "runs", "reasons", "summary"} for b in findings["backends"])
    assert all(set(r) == {"passes", "reason", "fix"} for b in findings["backends"] for r in b["reasons"])
    assert all(set(s) == {"name", "value", "default", "meaning", "error"} for s in findings["switches"])
    assert set(findings["choices"]) == {recipe.value for recipe in Recipe}
    assert all(set(by_pass) == {p.value for p in Pass} for by_pass in findings["choices"].values())


def test_on_a_cpu_every_choice_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = _findings(monkeypatch)["choices"]
    assert {backend for by_pass in choices.values() for backend in by_pass.values()} == {"emulated"}


def test_choices_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = _findings(monkeypatch, GROUPED_GEMM_BACKEND="hipblaslt")["choices"]
    assert choices["mxfp8"] == {"forward": None, "dgrad": None, "wgrad": None}


def test_strict_leaves_a_gpu_without_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPED_GEMM_STRICT", "1")
    choices = doctor.gather(B200, [Candidate(emulated.Backend())])["choices"]
    assert choices["none"]["forward"] is None


def test_a_switch_shows_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = {switch["name"]: switch for switch in _findings(monkeypatch, GROUPED_GEMM_LOG="1")["switches"]}
    assert (switches["GROUPED_GEMM_LOG"]["value"], switches["GROUPED_GEMM_LOG"]["default"]) == ("1", "0")


def test_doctor_shows_where_files_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, value in (("/some/where", "/some/where"), ("~no_such_user_/x", None)):
        found = _findings(monkeypatch, GROUPED_GEMM_CACHE_DIR=named)
        directory = found["switches"][-1]
        assert (directory["name"], directory["value"], directory["error"]) == ("GROUPED_GEMM_CACHE_DIR", value, None)
        assert f"  GROUPED_GEMM_CACHE_DIR  {value or 'none'} (default grouped_gemm in" in doctor.render(found)
        assert not doctor.errors(found)


def test_doctor_fails_on_an_unknown_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GROUPED_GEMM_STRICT", "yes")
    assert _run("doctor") == 1
    assert "error: GROUPED_GEMM_STRICT: expected one of 0, 1; found 'yes'" in capsys.readouterr().out


def test_an_unknown_value_leaves_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = _findings(monkeypatch, GROUPED_GEMM_STRICT="yes")["choices"]
    assert {backend for by_pass in choices.values() for backend in by_pass.values()} == {None}


def test_a_backend_shows_what_it_runs_and_why_not_the_rest() -> None:
    (found,) = doctor.gather(B200, [Candidate(_HopperWgrad())])["backends"]
    assert found["ready"]
    assert found["runs"]["fp8_blockwise"] == ["forward", "dgrad"]
    reason = "requires sm_90; found sm_100"
    assert found["reasons"] == [{"passes": ["wgrad"], "reason": reason, "fix": "Use another backend."}]


def test_a_reason_names_its_passes_and_remedy() -> None:
    text = doctor.render(doctor.gather(B200, [Candidate(_HopperWgrad())]))
    assert "    forward+dgrad: fp8_blockwise\n    wgrad requires sm_90; found sm_100. Use another backend." in text


def test_a_broken_backend_is_not_ready() -> None:
    broken = Candidate(emulated.Backend(), lambda: Health("no nvcc", "Install a CUDA toolkit."))
    (found,) = doctor.gather(B200, [broken])["backends"]
    assert not found["ready"]
    assert [(r["reason"], r["fix"]) for r in found["reasons"]] == [
        ("is installed but broken: no nvcc", "Install a CUDA toolkit.")
    ]


@pytest.mark.parametrize("recipe", [recipe.value for recipe in Recipe])
@pytest.mark.parametrize("is_inference", [False, True])
def test_explain_agrees_with_the_function(recipe: str, is_inference: bool, capsys: pytest.CaptureFixture[str]) -> None:
    device = default_device()
    a = torch.zeros(96, 32, dtype=torch.bfloat16, device=device, requires_grad=not is_inference)
    b = torch.zeros(4, 48, 32, dtype=torch.bfloat16, device=device, requires_grad=not is_inference)
    offs = torch.tensor([24, 48, 72, 96], dtype=torch.int32, device=device)
    expected = explain(a, b.transpose(1, 2), offs, recipe=recipe)

    _run(f"{EXPLAIN} --recipe {recipe} --json {'--inference' if is_inference else ''}")
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_explain_allocates_no_operands(capsys: pytest.CaptureFixture[str]) -> None:
    million = 10**6  # a thousand such matrices would take 2 petabytes
    _run(f"explain --m {million} --n {million} --k {million} --experts 1000 --recipe mxfp8")
    assert "E=1000, K=1000000, N=1000000" in capsys.readouterr().out


def test_explain_accepts_as_many_rows_as_offs_can_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"explain {CALL} --m {2**31 - 1} --group-alignment {2**31 - 1} --backend emulated") == 0
    assert "M = 2147483647" in capsys.readouterr().out


def test_explain_succeeds_where_a_backend_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{EXPLAIN} --dtype float32 --backend emulated") == 0
    assert "asked for by the argument" in capsys.readouterr().out


def test_explain_fails_where_none_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{EXPLAIN} --recipe mxfp8 --backend hipblaslt") == 1
    assert "hipblaslt" in capsys.readouterr().out


def test_explain_follows_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "emulated")
    _run(f"{EXPLAIN} --json")
    assert json.loads(capsys.readouterr().out)["asked_by"] == "environment"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--m -1", "argument --m/-m: expected a whole number of at least 0 and at most 2147483647; found '-1'"),
        ("--m 2147483648", "argument --m/-m: expected a whole number of at least 0 and at most 2147483647; found"),
        (
            "--group-alignment 2147483648",
            "argument --group-alignment: expected a whole number of at least 1 and at most",
        ),
        ("--k 0", "argument --k/-k: expected a whole number of at least 1; found '0'"),
        ("--experts many", "argument --experts/--groups: expected a whole number of at least 1; found 'many'"),
        ("--recipe fp4", "argument --recipe: invalid choice: 'fp4' (choose from"),
        ("--dtype int8", "argument --dtype: expected one of bfloat16, float16, float32; found 'int8'"),
        ("--backend cutlass", "argument --backend: invalid choice: 'cutlass' (choose from"),
    ],
)
def test_explain_names_a_bad_argument(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _error(f"{EXPLAIN} {arguments}", capsys)


def test_explain_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: --experts/--groups, --k/-k, --n/-n" in _error("explain --m 1", capsys)


def test_explain_names_a_bad_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "cutlass")
    assert "GROUPED_GEMM_BACKEND: expected one of auto," in _error(EXPLAIN, capsys)


@pytest.mark.parametrize("options", ["--bias", "--out-dtype float32", "--group-alignment 32", "--b-contiguous n"])
def test_explain_accepts_the_options_of_a_call(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{EXPLAIN} {options} --backend emulated") == 0
    assert _run(f"explain {CALL} {options} --m 96 --arch sm_90 --backend deepgemm --packages deep_gemm=0.1.5") == 1
    refused = {
        "--bias": "requires no bias",
        "--out-dtype float32": "requires output in bfloat16; found float32",
        "--group-alignment 32": "requires K and N in multiples of",
        "--b-contiguous n": "requires K and N in multiples of",
    }
    assert refused[options] in capsys.readouterr().out


def test_explain_without_m_covers_every_row_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"explain {CALL} --json") == 0
    assert [found["call"]["rows"] for found in json.loads(capsys.readouterr().out)] == ["decode", "small", "large"]


def test_explain_of_another_machine_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    _run(f"{EXPLAIN} --recipe fp8_rowwise --arch gfx942 --packages triton=3.6.0,rocm=7.0,deep_gemm=none")
    head, assumed, *rest = capsys.readouterr().out.splitlines()
    here = machine_of(default_device())
    assert "another machine, amd gfx942;" in head and here.arch in head
    assert f"torch {here.version('torch')}, triton 3.6.0, rocm 7.0; no deep_gemm, cuda, mslk" in assumed
    assert assumed.endswith("FP8 data in float8_e4m3fnuz")
    assert "  forward     triton" in rest


def test_explain_of_another_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    _run(f"{EXPLAIN} --arch sm_100 --vendor NVIDIA --packages triton=3.6.0,deep_gemm=0.1.5 --json")
    found = json.loads(capsys.readouterr().out)
    assert (found["call"]["arch"], found["chosen"]["forward"]) == ("sm_100", "triton")
    assert (found["assumed"]["vendor"], found["assumed"]["versions"]["deep_gemm"]) == ("nvidia", "0.1.5")


def test_a_description_of_this_machine_gives_its_own_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    here = machine_of(default_device())
    _run(EXPLAIN)
    expected = capsys.readouterr().out
    _run(f"{EXPLAIN} --arch {here.arch} --vendor {here.vendor} --packages torch={torch.__version__}")
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--arch sm_100 --vendor amd", "vendor: expected nvidia, the vendor of arch sm_100; found 'amd'"),
        ("--arch gfx942 --vendor cpu", "vendor: expected amd, the vendor of arch gfx942; found 'cpu'"),
        ("--arch hopper", "arch: expected a name like sm_90 (nvidia) or gfx942 (amd), or cpu; found 'hopper'"),
        (
            "--packages cudnn=9",
            "packages: expected names out of torch, triton, deep_gemm, cuda, rocm, mslk; found 'cudnn'",
        ),
        ("--packages torch=new", "packages: expected a version of torch such as 2.11.0; found 'new'"),
        ("--packages torch", "argument --packages: expected NAME=VERSION, or NAME=none, separated by commas;"),
        ("--rows small", "argument --rows: not allowed with argument --m/-m"),
    ],
)
def test_explain_names_options_that_do_not_fit(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _error(f"{EXPLAIN} {options}", capsys)


def test_explain_and_warmup_take_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    def options(command: str) -> set[str]:
        with pytest.raises(SystemExit):
            _run(f"{command} -h")
        return set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", capsys.readouterr().out))

    assert options("explain") - options("warmup") == {"--arch", "--vendor", "--packages"}
    assert options("warmup") <= options("explain")


@pytest.mark.parametrize(
    "command", [f"{EXPLAIN} --recipes mxfp8", f"warmup {CALL} --arch sm_90", "doctor all", "--all"]
)
def test_an_unknown_argument_is_named_with_what_is_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = _error(command, capsys)
    assert re.search(r"unknown arguments: (--recipes mxfp8|--arch sm_90|all|--all); expected \[-h\] ", error)


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        _run("--version")
    assert (exit_.value.code, capsys.readouterr().out) == (0, f"grouped_gemm {__version__}\n")


# with option names that warmup had before it took those of explain
WARMUP = "warmup --groups 4 -k 32 -n 48 --backend emulated"


def test_warmup_shows_the_call_and_its_row_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{WARMUP} --recipe mxfp8 --bias") == 0
    out = capsys.readouterr().out
    assert out.startswith("grouped_mm(E=4, K=32, N=48, mxfp8, bfloat16, ")
    assert all(f"  {rows} " in out for rows in ("decode", "small", "large"))


def test_warmup_json_follows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{WARMUP} --rows small,decode --inference --dtype float32 --b-contiguous n --json") == 0
    done = json.loads(capsys.readouterr().out)
    assert set(done) == {"classes", "seconds"}
    assert [warmed["call"]["rows"] for warmed in done["classes"]] == ["small", "decode"]
    assert all(warmed["chosen"] == {"forward": "emulated"} for warmed in done["classes"])


def test_warmup_fails_where_no_backend_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{WARMUP.replace('emulated', 'hipblaslt')} --recipe mxfp8") == 1
    assert "hipblaslt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows big", "rows: expected row classes out of decode, small, large; found 'big'"),
        ("-k 0", "argument --k/-k: expected a whole number of at least 1; found '0'"),
        (f"-m {10**30}", "argument --m/-m: expected a whole number of at least 0 and at most 2147483647; found '1000"),
    ],
)
def test_warmup_names_a_bad_argument(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _error(f"{WARMUP} {arguments}", capsys)


def test_warmup_names_a_bad_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", "yes")
    assert "GROUPED_GEMM_AUTOTUNE: expected one of 0, 1; found 'yes'" in _error(WARMUP, capsys)


def test_an_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'docter'" in _error("docter", capsys)


def test_demo_runs_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run", lambda args: 3)
    assert _run("demo") == 3


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an empty folder of benchmarks, which is returned."""
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "grouped_gemm" / "__main__.py"))
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    return folder


def test_bench_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("bench --list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("auto            The regret of AUTO on one CUDA GPU")
    assert any(line.startswith("profiles        Measures the profile that AUTO reads") for line in lines)
    assert not [line for line in lines if line.startswith("_")]  # parts of a benchmark


def test_bench_without_a_name_is_grouped_mm(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "grouped_mm.py").write_text("import sys\nprint(sys.argv[1:])\n")
    assert _run("bench") == 0
    assert capsys.readouterr().out == "[]\n"


def test_a_benchmark_may_import_a_module_of_its_folder(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "_part_of_speed.py").write_text("value = 3\n")
    (checkout / "speed.py").write_text("from _part_of_speed import value\nprint(value)\n")
    before = list(sys.path)
    assert _run("bench speed") == 0
    assert (capsys.readouterr().out, sys.path) == ("3\n", before)


def test_bench_runs_a_script_with_its_arguments(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "speed.py").write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n")
    assert _run("bench speed --json out.json -h") == 0
    assert capsys.readouterr().out == "['--json', 'out.json', '-h']\n"


def test_bench_restores_the_arguments_of_the_process(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["before"])
    (checkout / "speed.py").write_text("")
    _run("bench speed")
    assert sys.argv == ["before"]


def test_bench_lists_its_names_when_one_is_unknown(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "speed.py").write_text("")
    assert "argument NAME: expected one of speed; found 'sped'" in _error("bench sped", capsys)


@pytest.mark.usefixtures("checkout")
def test_bench_outside_a_checkout_says_where_benchmarks_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("bench") == 1
    assert "source repository" in capsys.readouterr().err
