"""The two lanes of all tests: what a failure stops, and that no test is left out."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

import all_tests
import pytest

_DEADLINE = 60.0


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> all_tests.Runner:
    monkeypatch.setattr(all_tests, "RESULTS", tmp_path)
    return all_tests.Runner()


def test_what_fails_without_a_vm_stops_both_lanes(runner: all_tests.Runner, tmp_path: Path) -> None:
    began = tmp_path / "began"
    os.mkfifo(began)
    long = {"long": ["sh", "-c", f"echo > {began}; exec sleep 1000"]}
    never = {"never": ["touch", str(tmp_path / "never")]}
    with (tmp_path / "log").open("wb") as log:
        other = threading.Thread(target=runner.run, args=({**long, **never}, log), daemon=True)
        other.start()
        # The other lane has begun when this one fails.
        runner.run({"quick": ["sh", "-c", f"read line < {began}; exit 1"], **never}, None)
        other.join(_DEADLINE)
    assert not other.is_alive()
    assert runner.failed.is_set()
    assert not (tmp_path / "never").exists()


def test_what_fails_with_vms_is_said_at_the_end(
    runner: all_tests.Runner, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "log").open("wb") as log:
        runner.run({"cold": ["false"], "next": ["touch", str(tmp_path / "next")]}, log)
    assert runner.failed.is_set()
    assert (tmp_path / "next").exists()
    said = capfd.readouterr().out.splitlines()
    assert [line.split(" after ")[0] for line in said] == ["cold: failed", "next: done"]


def test_a_program_that_is_missing_is_a_failure(runner: all_tests.Runner) -> None:
    with pytest.raises(FileNotFoundError):
        runner.run({"missing": ["/no/such/program"]}, None)
    assert runner.failed.is_set()


def test_a_lane_that_finds_no_tests_has_not_failed(runner: all_tests.Runner) -> None:
    runner.run({"none": ["sh", "-c", f"exit {pytest.ExitCode.NO_TESTS_COLLECTED.value}"]}, None)
    assert not runner.failed.is_set()


def test_every_file_is_in_a_lane() -> None:
    """Once, and once more with VMs that are booted where it is of the runtime itself."""
    first, second = all_tests.plan_lanes([])
    files = {str(path.relative_to(all_tests.SOURCE)) for path in all_tests.TESTS.glob("test_*.py")}
    named = [word for name in ("engines", "sandboxes") for word in first[name] if word in files]
    named += [word for word in second["runtime"] if word in files]
    assert sorted(named) == sorted(files)
    assert [word for word in second["cold"] if word in files] == [word for word in second["runtime"] if word in files]
    everything = {word for lane in (first, second) for command in lane.values() for word in command}
    assert {"tests/unit", "guest-agent/tests", "tests/integration"} <= everything


def test_no_run_of_pytest_sees_another_s_mounts() -> None:
    """Tests compare all mounts before and after, and the other lane mounts what it likes meanwhile."""
    commands = [command for lane in all_tests.plan_lanes([]) for command in lane.values() if command[0] != "make"]
    assert all(command[:4] == ["unshare", "--mount", "--propagation", "private"] for command in commands)


def test_every_module_of_tests_has_a_name_of_its_own() -> None:
    """Of two with one name pytest imports only the first, so `make soak` collected neither."""
    found = [path for top in ("tests", "guest-agent/tests") for path in (all_tests.SOURCE / top).rglob("*.py")]
    names = Counter(path.name for path in found if path.name != "conftest.py")
    assert names["test_all_tests.py"] == 1
    assert [name for name, count in names.items() if count > 1] == []
