"""The log: runc's two formats, one line for each record whatever a guest put in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy import log
from katapy.errors import InvalidArgument


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The root logger as pytest had it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers and isinstance(handler, logging.StreamHandler):
            handler.stream.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json(tmp_path: Path) -> None:
    log.setup(file=str(tmp_path / "log"), format="json")
    logging.error("cannot start %s:\n%s", "c1", '{"msg":"forged"}')
    logging.info("not shown")
    [line] = (tmp_path / "log").read_text().splitlines()
    record = json.loads(line)
    assert list(record) == ["level", "msg", "time"]
    assert record["level"] == "error"
    assert record["msg"] == 'cannot start c1:\n{"msg":"forged"}'
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])


def test_text_is_one_line_and_appended(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("kept\n")
    log.setup(file=str(file), debug=True)
    logging.debug("done")
    logging.warning('a "b"\nlevel=error \udcff\x1b[31m')
    kept, plain, quoted = file.read_text().splitlines()
    assert kept == "kept"
    assert re.fullmatch(r'time="\S+Z" level=debug msg=done', plain)
    assert quoted.endswith('level=warning msg="a \\"b\\"\\nlevel=error \\udcff\\u001b[31m"')


def test_a_traceback_is_part_of_the_record(tmp_path: Path) -> None:
    log.setup(file=str(tmp_path / "log"), format="json")
    try:
        raise ValueError("x")
    except ValueError:
        logging.exception("failed")
    [line] = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["msg"].endswith("ValueError: x")


def test_a_new_file_is_private(tmp_path: Path) -> None:
    log.setup(file=str(tmp_path / "log"))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("path", "problem"), [("/nowhere/log", "cannot be opened: no such file or directory"), ("a\0", "not a valid path")]
)
def test_no_file(path: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        log.setup(file=path)


def test_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    logging.warning("hm")
    assert capsys.readouterr().err.endswith("level=warning msg=hm\n")
