"""The options ``--backend`` and ``--device``, skips where a device is missing, and a clean state for each test.

A test is about a backend if it takes ``backend``, which runs it once on every backend of this version, or a ``case`` of
`grouped_gemm.testing.cases`. A case that its backend refuses is skipped with the text of the refusal.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from grouped_gemm import testing
from grouped_gemm.core.machine import default_device
from grouped_gemm.core.preference import SWITCHES, BackendKind
from grouped_gemm.selection import route

LONGEST = ("test_interpreted.py", "test_compile_ahead.py")  # files that start processes of their own
SPLIT = ("test_backends.py", "test_properties.py")  # files that run every case


def pytest_addoption(parser: pytest.Parser) -> None:
    names = [kind.value for kind in testing.backend_kinds()]
    parser.addoption("--backend", choices=names, help="run only the tests that are about this backend")
    parser.addoption("--device", help="where the tests of backends run; default: the GPU where there is one, else cpu")
    parser.addoption("--min-passed", type=int, default=0, help="fail if fewer tests than this have passed")


def pytest_configure(config: pytest.Config) -> None:
    # Operands are small: more threads gain nothing, and on shared cores they mostly wait for each other.
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, one worker runs a file, whose fixtures may start processes or compile for all of its tests.

    Files that run every case are split by backend and recipe, whose tests share compiled kernels.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            case = re.search(r"\[([^-\]]+(?:-[^-\]]+)?)", test) if file.endswith(SPLIT) else None
            return f"{file} {case[1]}" if case else file

    config.option.loadscopereorder = False  # in the order of collection, which has the longest files first
    return ByFile(config, log)


def pytest_report_header(config: pytest.Config) -> str:
    backend = config.getoption("--backend") or "all"
    return f"grouped_gemm: backend {backend}, device {_device(config)}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist; the process that started the workers counts passed tests
        return
    passed, least = len(reporter.stats.get("passed", ())), session.config.getoption("--min-passed")
    if passed < least and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"\n--min-passed: expected at least {least} tests to pass; found {passed}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", testing.backend_kinds(), ids=lambda kind: kind.value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and _device(config).type != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none, or --device names another device"))
        if item.get_closest_marker("gpu2") and (_device(config).type != "cuda" or torch.cuda.device_count() < 2):
            found = f"torch sees {torch.cuda.device_count()}, or --device names another device"
            item.add_marker(pytest.mark.skip(reason=f"needs 2 GPUs of one host; {found}"))
        if item.get_closest_marker("rocm") and not (torch.cuda.is_available() and torch.version.hip):
            item.add_marker(pytest.mark.skip(reason="needs an AMD GPU and a ROCm build of torch"))
    items.sort(key=lambda item: item.path.name not in LONGEST)
    name = config.getoption("--backend")
    if name is None:
        return
    about_it = [item for item in items if _backend(item) is BackendKind(name.lower())]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(about_it)])
    items[:] = about_it


def _backend(item: pytest.Item) -> BackendKind | None:
    """The backend that a test is about."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters["case"].backend if "case" in parameters else parameters.get("backend")


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or default_device())


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the tests of backends run."""
    return _device(pytestconfig)


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds torch, unsets all switches, and empties the caches of decisions, logs and warnings."""
    # Not torch.manual_seed, which takes two milliseconds: it formats the stack for each kind of device that is missing.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    for switch in SWITCHES:
        monkeypatch.delenv(switch.name, raising=False)
    route.reset_caches()


@pytest.fixture(autouse=True)
def skip_refused_cases(request: pytest.FixtureRequest, clean_state: None) -> None:
    if "case" in request.fixturenames:
        reason = testing.refusal(request.getfixturevalue("case"), request.getfixturevalue("device"))
        if reason:
            pytest.skip(reason)
