"""What `katapy install` makes of the engines' files: no root, no engine, each host a directory."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katapy.engines import ENGINES
from katapy.engines.change import Change
from katapy.engines.engine import Runtime
from katapy.engines.host import Host
from katapy.errors import AlreadyExists, InvalidArgument, InvalidState, Unavailable

RUNTIME = Runtime()
ALL = list(ENGINES)
CRI_2, CRI_3 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"
# A file of each engine that has runtimes, comments, and a layout of somebody's own.
LIVED_IN = {
    "containerd": b"""# ours
version = 2
root = '/data'   # a disk of its own
[plugins]
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runsc]
      runtime_type = "io.containerd.runsc.v1"
""",
    "docker": b"""{
\t"data-root": "/data",  "bip" : "10.1.0.1/16",
\t"runtimes": {
\t\t"runsc": {"path": "/usr/bin/runsc", "runtimeArgs": ["{\\"}"]}
\t},
\t"log-opts": {"max-size": "10m"}
}""",
}
BROKEN = {"containerd": b"version = \n", "crio": b"[crio\n", "docker": b'{"a": 1,}\n', "podman": b"\xff\n"}
DEFAULT = {
    "containerd": b'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\ndefault_runtime_name = "katapy"\n',
    "crio": b'[crio.runtime]\ndefault_runtime = "katapy"\n',
    "docker": b'{"default-runtime": "katapy"}',
    "podman": b'[engine]\nruntime = "katapy"\n',
}
MAIN = {"crio": "/etc/crio/crio.conf", "podman": "/etc/containers/containers.conf"}


def path_of(engine: str, name: str = "katapy") -> str:
    return ENGINES[engine].config.format(name=name)


def write(host: Host, path: str, text: bytes) -> Path:
    file = host.locate(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text)
    return file


def install(host: Host, engine: str, runtime: Runtime = RUNTIME) -> Change | None:
    """Install, and return what was done."""
    change = ENGINES[engine].plan_install(host, runtime, path_of(engine, runtime.name))
    if change is not None:
        change.apply()
    return change


def uninstall(host: Host, engine: str, name: str = "katapy") -> Change | None:
    change = ENGINES[engine].plan_uninstall(host, name, path_of(engine, name))
    if change is not None:
        change.apply()
    return change


def files(host: Host) -> dict[str, bytes]:
    """Return all files but the copies of what was there before."""
    return {
        str(path.relative_to(host.root)): path.read_bytes()
        for path in host.root.rglob("*")
        if path.is_file() and path.suffix != ".bak"
    }


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Say which versions of the engines there are."""
    known: dict[str, tuple[int, ...]] = {}
    monkeypatch.setattr(Host, "version", lambda self, program: known.get(program, ()))
    return known


@pytest.mark.parametrize("engine", ALL)
def test_where_there_is_nothing(host: Host, engine: str) -> None:
    """A file is made, is known for katapy's, and goes again."""
    change = install(host, engine)
    assert change is not None
    assert change.before is None
    assert list(files(host)) == [path_of(engine)[1:]]
    assert ENGINES[engine].names(host) == ["katapy"]
    assert install(host, engine) is None
    assert uninstall(host, engine) is not None
    assert files(host) == {}
    assert uninstall(host, engine) is None


@pytest.mark.parametrize("text", [b"", b"\n", b"# mine\n", b"# mine", b"\n  \n"])
def test_a_file_that_says_nothing(host: Host, text: bytes) -> None:
    file = write(host, path_of("containerd"), text)
    assert install(host, "containerd") is not None
    assert tomllib.loads(file.read_text())["version"] == 2
    uninstall(host, "containerd")
    assert file.read_bytes() == text


@pytest.mark.parametrize("text", [b"", b"{}", b"{}\n", b"{\n}\n", b'{"runtimes": {}}', b'{"runtimes":{\n}\n,"a":[1]}'])
def test_an_empty_object(host: Host, text: bytes) -> None:
    file = write(host, path_of("docker"), text)
    assert install(host, "docker") is not None
    assert json.loads(file.read_text())["runtimes"] == {"katapy": {"path": RUNTIME.program}}
    uninstall(host, "docker")
    assert file.read_bytes() == text


@pytest.mark.parametrize("engine", LIVED_IN)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_all_else_stays(host: Host, engine: str, end: bytes) -> None:
    """Byte for byte; and what is read from it is as before, with one runtime more."""
    load: Any = tomllib.loads if engine == "containerd" else json.loads
    keys = ("plugins", CRI_2, "containerd", "runtimes") if engine == "containerd" else ("runtimes",)
    text = LIVED_IN[engine] + end
    file = write(host, path_of(engine), text)
    install(host, engine)
    document = load(file.read_bytes().decode())
    runtimes = document
    for key in keys:
        runtimes = runtimes[key]
    assert runtimes.pop("katapy")
    assert document == load(text.decode())
    if engine == "containerd":
        assert file.read_bytes().startswith(text)
    assert install(host, engine) is None
    uninstall(host, engine)
    assert file.read_bytes() == text


def test_other_edits_outlive_an_uninstall(host: Host) -> None:
    """What was written into the files after the installation, by hand or by a tool that lays them out anew."""
    file = write(host, path_of("containerd"), LIVED_IN["containerd"])
    install(host, "containerd")
    file.write_bytes(b"# first\n" + file.read_bytes() + b"[metrics]\naddress = 'localhost:1'\n")
    uninstall(host, "containerd")
    assert file.read_bytes() == b"# first\n" + LIVED_IN["containerd"] + b"[metrics]\naddress = 'localhost:1'\n"
    file = write(host, path_of("docker"), LIVED_IN["docker"])
    install(host, "docker")
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1, sort_keys=True))
    uninstall(host, "docker")
    assert json.loads(file.read_text()) == json.loads(LIVED_IN["docker"])


@pytest.mark.parametrize("engine", ALL)
def test_programs_that_have_moved(host: Host, engine: str) -> None:
    install(host, engine, Runtime(programs="/opt/old"))
    change = install(host, engine)
    assert change is not None
    assert change.after is not None
    assert b"/opt/old" not in change.after
    assert RUNTIME.programs.encode() in change.after
    uninstall(host, engine)
    assert files(host) == {}


@pytest.mark.parametrize("engine", ALL)
def test_two_names(host: Host, engine: str) -> None:
    """Each comes and goes without the other; containerd's runc, which came with the first, goes last."""
    install(host, engine)
    alone = files(host)
    install(host, engine, Runtime("vm"))
    assert ENGINES[engine].names(host) == ["katapy", "vm"]
    if engine == "containerd":
        with pytest.raises(InvalidState, match="runc came with katapy: take out vm first"):
            uninstall(host, engine)
    uninstall(host, engine, "vm")
    assert files(host) == alone


@pytest.mark.parametrize("engine", ALL)
def test_what_does_not_parse_is_left_alone(host: Host, engine: str) -> None:
    path = MAIN.get(engine, path_of(engine))
    install(host, engine, Runtime("other"))
    file = write(host, path, BROKEN[engine])
    before = files(host)
    plans: tuple[Callable[[], object], ...] = (lambda: install(host, engine), lambda: uninstall(host, engine, "other"))
    for plan in plans:
        with pytest.raises(InvalidArgument, match=f"^{path}") as raised:
            plan()
        assert "\n" not in str(raised.value)
    assert file.read_bytes() == BROKEN[engine]
    assert files(host) == before


@pytest.mark.parametrize("engine", ALL)
def test_what_is_used_by_default_stays(host: Host, engine: str) -> None:
    write(host, MAIN.get(engine, path_of(engine)), DEFAULT[engine])
    install(host, engine)
    before = files(host)
    with pytest.raises(InvalidState, match="has katapy as the default runtime"):
        uninstall(host, engine)
    assert files(host) == before


@pytest.mark.parametrize(
    ("engine", "path", "text"),
    [
        ("containerd", "", f'version = 2\n[plugins."{CRI_2}".containerd.runtimes.katapy]\nruntime_type = "{{}}"\n'),
        ("crio", "/etc/crio/crio.conf", '[crio.runtime.runtimes.katapy]\nruntime_path = "{}"\n'),
        ("docker", "", '{{"runtimes": {{"katapy": {{"path": "{}", "runtimeArgs": ["--debug"]}}}}}}'),
        ("podman", "/etc/containers/containers.conf", '[engine.runtimes]\nkatapy = ["{}"]\n'),
    ],
)
def test_what_was_written_by_hand(host: Host, engine: str, path: str, text: str) -> None:
    """katapy itself is left as it is, another program of that name is refused."""
    ours = {"containerd": "io.containerd.katapy.v2", "crio": RUNTIME.shim}.get(engine, RUNTIME.program)
    file = write(host, path or path_of(engine), text.format(ours).encode())
    assert install(host, engine) is None
    assert ENGINES[engine].names(host) == ["katapy"]
    file.write_text(text.format("/usr/bin/other"))
    with pytest.raises(AlreadyExists, match="has another runtime katapy"):
        install(host, engine)
    assert ENGINES[engine].names(host) == []


@pytest.mark.parametrize("engine", ["crio", "podman"])
def test_a_drop_in_of_somebody_else_s(host: Host, engine: str) -> None:
    text = b"# mine\n"
    file = write(host, path_of(engine), text)
    with pytest.raises(InvalidArgument, match="not written by katapy install"):
        install(host, engine)
    assert uninstall(host, engine) is None
    assert file.read_bytes() == text


# ---------------------------------------------------------------- containerd and its versions


def test_runc_does_not_get_lost(host: Host) -> None:
    """One table of runtimes takes the place of containerd's own, and the plugin fails without its default."""
    file = write(host, path_of("containerd"), b"version = 2\n")
    install(host, "containerd")
    assert set(tomllib.loads(file.read_text())["plugins"][CRI_2]["containerd"]["runtimes"]) == {"katapy", "runc"}


@pytest.mark.parametrize(
    ("text", "daemon", "plugin", "version"),
    [
        (b"root = '/data'\n", (1, 6, 20), "cri", None),
        (b"version = 2\n", (1, 6, 20), CRI_2, 2),
        (b"version = 2\n", (2, 1, 0), CRI_2, 2),
        (b"version = 3\n", (2, 1, 0), CRI_3, 3),
        (b"version = 4\n", (2, 3, 0), CRI_3, 4),
        (None, (1, 7, 0), CRI_2, 2),
        (None, (2, 0, 0), CRI_3, 3),
        (None, (), CRI_2, 2),
    ],
)
def test_the_plugin_s_name(
    host: Host,
    versions: dict[str, tuple[int, ...]],
    text: bytes | None,
    daemon: tuple[int, ...],
    plugin: str,
    version: int,
) -> None:
    """It goes by the version of the file, and only where that is new by the daemon's."""
    versions["containerd"] = daemon
    if text is not None:
        write(host, path_of("containerd"), text)
    install(host, "containerd")
    document = tomllib.loads(host.locate(path_of("containerd")).read_text())
    assert document.get("version") == version
    assert list(document["plugins"]) == [plugin]


def test_what_was_added_to_a_file_that_install_made(host: Host) -> None:
    """The version that it needs stays with it."""
    install(host, "containerd")
    file = host.locate(path_of("containerd"))
    with file.open("a") as text:
        text.write("[metrics]\naddress = 'localhost:1'\n")
    uninstall(host, "containerd")
    assert tomllib.loads(file.read_text()) == {"version": 2, "metrics": {"address": "localhost:1"}}


def test_a_version_that_nobody_knows(host: Host) -> None:
    write(host, path_of("containerd"), b"version = 9\n")
    with pytest.raises(InvalidArgument, match="version 9 is not known"):
        install(host, "containerd")


@pytest.mark.parametrize("pattern", ["/etc/containerd/conf.d/*.toml", "conf.d/*.toml", "./conf.d/*.toml"])
def test_a_directory_that_is_imported(host: Host, pattern: str) -> None:
    """From version 3 on the runtime gets a file there; the main file is not touched, and runc is not said twice."""
    main = f'version = 3\nimports = ["{pattern}"]\n'.encode()
    write(host, path_of("containerd"), main)
    other = (
        f'version = 3\n[plugins."{CRI_3}".containerd.runtimes.runc]\nruntime_type = "io.containerd.runc.v2"\n'.encode()
    )
    write(host, "/etc/containerd/conf.d/cri.toml", other)
    before = files(host)
    install(host, "containerd")
    added = files(host)
    document = tomllib.loads(added.pop("etc/containerd/conf.d/katapy.toml").decode())
    assert added == before
    assert document["version"] == 3
    assert set(document["plugins"][CRI_3]["containerd"]["runtimes"]) == {"katapy"}
    assert install(host, "containerd") is None
    assert ENGINES["containerd"].names(host) == ["katapy"]
    uninstall(host, "containerd")
    assert files(host) == before
    # Copies are not where containerd reads all that there is.
    assert not list(host.locate("/etc/containerd/conf.d").glob("*.bak"))


def test_an_old_file_s_imports_are_not_used(host: Host) -> None:
    """Before containerd 2 an imported file takes the place of the whole section."""
    file = write(host, path_of("containerd"), b'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n')
    install(host, "containerd")
    assert b"runtimes.katapy" in file.read_bytes()


def test_tables_that_cannot_be_added_to(host: Host) -> None:
    """An inline table is closed: what is appended would be no TOML any more."""
    text = f'version = 2\n[plugins."{CRI_2}"]\ncontainerd = {{runtimes = {{}}}}\n'.encode()
    file = write(host, path_of("containerd"), text)
    with pytest.raises(InvalidArgument, match="nothing can be added to tables that are written like these"):
        install(host, "containerd")
    assert file.read_bytes() == text


@pytest.mark.parametrize("text", [b"plugins = 1\n", b"version = 2\nimports = 'x'\n", b"version = '2'\n"])
def test_values_of_another_type(host: Host, text: bytes) -> None:
    write(host, path_of("containerd"), text)
    with pytest.raises(InvalidArgument, match=f"^{path_of('containerd')}: "):
        install(host, "containerd")


# ---------------------------------------------------------------- docker and its versions


@pytest.mark.parametrize(
    ("version", "entry"),
    [
        ((), {"path": RUNTIME.program}),
        ((20, 10, 24), {"path": RUNTIME.program}),
        ((23, 0, 6), {"path": RUNTIME.program}),
        ((24, 0, 0), {"runtimeType": RUNTIME.shim}),
        ((28, 1, 1), {"runtimeType": RUNTIME.shim}),
    ],
)
def test_how_docker_names_a_runtime(
    host: Host, versions: dict[str, tuple[int, ...]], version: tuple[int, ...], entry: dict[str, str]
) -> None:
    versions["dockerd"] = version
    change = install(host, "docker")
    assert change is not None
    assert json.loads(change.after or b"") == {"runtimes": {"katapy": entry}}
    # After an upgrade of docker another installation brings the other way.
    versions["dockerd"] = (24,) if "path" in entry else (20,)
    assert install(host, "docker") is not None
    uninstall(host, "docker")
    assert files(host) == {}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", (1, 6, 20)),
        ("containerd containerd.io 1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da", (1, 7, 27)),
        ("containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4", (2, 1, 4)),
        ("Docker version 20.10.24+dfsg1, build 5d6db84", (20, 10, 24)),
        ("Docker version 28.1.1, build 01f442b", (28, 1, 1)),
        ("podman version 4.3.1", (4, 3, 1)),
        ("crio version 1.35.0\nGitCommit: 0", (1, 35, 0)),
        ("engine version 7.1", (7, 1)),
        ("unknown", ()),
        ("", ()),
    ],
)
def test_what_engines_say_of_their_version(
    host: Host, monkeypatch: pytest.MonkeyPatch, said: str, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(Host, "output", lambda self, *argv: said)
    assert host.version("engine") == ()
    write(host, "/usr/bin/engine", b"").chmod(0o755)
    assert host.version("engine") == version


def test_a_link_is_followed_as_the_engine_would(host: Host, tmp_path: Path) -> None:
    """Of another host: an absolute target is below its root, not below ours. The link stays."""
    write(host, "/data/docker.json", b"{}")
    link = tmp_path / "etc/docker/daemon.json"
    link.parent.mkdir(parents=True)
    link.symlink_to("/data/../data/docker.json")
    change = install(host, "docker")
    assert change is not None
    assert change.path == tmp_path / "data/docker.json"
    assert link.is_symlink()
    assert b"katapy" in (tmp_path / "data/docker.json").read_bytes()


def test_a_circle_of_links(host: Host, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/docker").symlink_to("/etc/docker")
    with pytest.raises(InvalidArgument, match="too many symbolic links"):
        install(host, "docker")


def test_mode_and_copies(host: Host) -> None:
    """The file keeps its mode; each change leaves a copy of its own, as secret as the file."""
    file = write(host, path_of("docker"), LIVED_IN["docker"])
    file.chmod(0o600)
    install(host, "docker")
    uninstall(host, "docker")
    copies = sorted(file.parent.glob("*.bak"))
    assert [copy.name for copy in copies] == ["daemon.json.katapy-1.bak", "daemon.json.katapy-2.bak"]
    assert copies[0].read_bytes() == LIVED_IN["docker"]
    assert {path.stat().st_mode & 0o777 for path in (file, *copies)} == {0o600}
    assert len(list(file.parent.iterdir())) == 3


def test_a_new_file_can_be_read_by_all(host: Host) -> None:
    change = install(host, "podman")
    assert change is not None
    assert change.path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_has_changed_meanwhile(host: Host) -> None:
    file = write(host, path_of("docker"), b"{}")
    change = ENGINES["docker"].plan_install(host, RUNTIME, path_of("docker"))
    assert change is not None
    file.write_bytes(b'{"a": 1}')
    with pytest.raises(InvalidState, match="has changed meanwhile"):
        change.apply()
    assert file.read_bytes() == b'{"a": 1}'


def test_a_directory_that_cannot_be_written(host: Host) -> None:
    """A file where the directory should be: root is refused too."""
    write(host, "/etc/docker", b"")
    change = Change(host.locate("/etc/docker/daemon.json"), None, b"{}\n")
    with pytest.raises(Unavailable, match=r"cannot write .*/etc/docker/daemon.json: "):
        change.apply()


def test_what_is_no_file(host: Host) -> None:
    host.locate(path_of("docker")).mkdir(parents=True)
    with pytest.raises(InvalidArgument, match="not a regular file"):
        install(host, "docker")


def test_a_diff(host: Host) -> None:
    file = write(host, path_of("docker"), b"{}")
    change = ENGINES["docker"].plan_install(host, RUNTIME, path_of("docker"))
    assert change is not None
    assert change.diff() == (
        f"--- {file}\n+++ {file}\n@@ -1 +1 @@\n-{{}}\n\\ No newline at end of file\n"
        '+{"runtimes": {"katapy": {"path": "/usr/local/bin/katapy"}}}\n\\ No newline at end of file\n'
    )
    assert file.read_bytes() == b"{}"
