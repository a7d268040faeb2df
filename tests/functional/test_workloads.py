"""Real programs in a real root file system: Debian's Python in a tree that mmdebstrap made."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import debian
import pytest
from harness import DEADLINE, Katapy, MakeBundle

PROGRAM = r"""
import hashlib, json, multiprocessing, os, pathlib, socket, sqlite3, subprocess, sys, tempfile, threading

def echo(server):
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)

def over_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=echo, args=[server]); thread.start()
        sent, received = os.urandom(1 << 20), bytearray()
        with socket.create_connection(server.getsockname()) as client:
            sender = threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR)))
            sender.start()
            while data := client.recv(65536):
                received += data
            sender.join()
        thread.join()
    return sent == bytes(received)

def square(number):
    return number * number

def files():
    directory = pathlib.Path("/data/tree"); directory.mkdir()
    for number in range(200):
        (directory / f"file{number}").write_text(str(number) * 100)
    (directory / "file0").rename(directory / "renamed")
    os.symlink("renamed", directory / "link"); os.link(directory / "renamed", directory / "hard")
    os.chmod(directory / "renamed", 0o640); os.truncate(directory / "file1", 3)
    with sqlite3.connect("/data/data.db") as database:
        database.execute("create table t (n integer)")
        database.executemany("insert into t values (?)", [(n,) for n in range(1000)])
    return len(list(directory.iterdir())), (directory / "link").read_text()[:3], (directory / "file1").read_text()

with multiprocessing.get_context("fork").Pool(2) as pool:
    squares = sum(pool.map(square, range(100)))
child = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True)
print(json.dumps({
    "loopback": over_loopback(),
    "squares": squares,
    "child": child.stdout.strip(),
    "files": files(),
    "digest": hashlib.sha256(b"katapy" * 100_000).hexdigest(),
    "uid": os.getuid(),
    "pid": os.getpid(),
    "tmp": tempfile.gettempdir(),
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
}))
"""


@pytest.fixture(scope="module")
def debian_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Debian with Python, the guest's release, from the host's own mirrors."""
    rootfs = tmp_path_factory.mktemp("debian") / "rootfs"
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract", "--include=python3,libc-bin", debian.CODENAME]
    # Extracted, not configured: no maintainer script runs, nothing is mounted.
    subprocess.run([*argv, str(rootfs), "-"], check=True, input=debian.archives().encode(), timeout=600)
    (rootfs / "data").mkdir()
    return rootfs


@pytest.mark.timeout(1200)  # it may be the first to ask for the root
def test_python_in_debian(katapy: Katapy, bundle: MakeBundle, debian_root: Path) -> None:
    """It computes, forks, threads, talks over loopback and writes files; and the host sees what it wrote."""

    def edit(spec: dict[str, Any]) -> None:
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        spec["linux"]["resources"]["memory"] = {"limit": 256 << 20}

    directory = bundle(["/usr/bin/python3.11", "-c", PROGRAM], rootfs=debian_root, edit=edit)
    done = katapy("run", "--bundle", directory, "c1", timeout=3 * DEADLINE)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {
        "loopback": True,
        "squares": 328350,
        "child": "42",
        "files": [202, "000", "111"],
        "digest": hashlib.sha256(b"katapy" * 100_000).hexdigest(),
        "uid": 0,
        "pid": 1,
        "tmp": "/tmp",
        "interfaces": ["lo"],
    }
    tree = debian_root / "data/tree"
    assert (tree / "renamed").stat().st_nlink == 2
    assert (tree / "renamed").stat().st_mode & 0o777 == 0o640
    assert (tree / "link").readlink() == Path("renamed")
    assert (tree / "file199").read_text() == "199" * 100
    with sqlite3.connect(debian_root / "data/data.db") as database:
        assert database.execute("select count(*), sum(n) from t").fetchone() == (1000, 499500)
    database.close()
