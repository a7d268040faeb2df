"""The configuration files: defaults, order, refusals, and that the page shows every key."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from katapy import config
from katapy.config import SECTIONS, Config, Hypervisor, check_owner, format_size, parse_size, parse_toml
from katapy.errors import InvalidArgument, NotFound, PermissionDenied

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's /etc/katapy, empty."""
    monkeypatch.delenv(config.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "katapy.toml")
    monkeypatch.setattr(config, "DEFAULT_DIRECTORY", tmp_path / "conf.d")
    (tmp_path / "conf.d").mkdir()
    return tmp_path


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_defaults(host: Path) -> None:
    assert Config.load() == Config()
    assert Config().hypervisor.memory == 256 << 20
    assert Config().storage.virtiofsd_paths == (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))


def test_later_files_override_single_keys(host: Path) -> None:
    write(host / "katapy.toml", '[hypervisor]\nvcpus = 2\nmemory = "1G"\n')
    write(host / "conf.d" / "20-b.toml", "[hypervisor]\nvcpus = 4\n")
    write(host / "conf.d" / "10-a.toml", '[hypervisor]\nvcpus = 3\n[storage]\nvirtiofsd = "/opt/virtiofsd"\n')
    write(host / "conf.d" / "30-c.toml.off", "garbage")
    loaded = Config.load()
    assert (loaded.hypervisor.vcpus, loaded.hypervisor.memory) == (4, 1 << 30)
    assert loaded.storage.virtiofsd_paths == (Path("/opt/virtiofsd"),)


def test_the_order_is_that_of_the_names(host: Path) -> None:
    for number in (7, 2, 9, 4, 1, 8, 3, 6, 5):
        write(host / "conf.d" / f"{number}.toml", f"[hypervisor]\nvcpus = {number}\n")
    assert Config.load().hypervisor.vcpus == 9


def test_a_named_file_replaces_the_hosts(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(host / "katapy.toml", "[hypervisor]\nvcpus = 2\nrequire_kvm = true\n")
    write(host / "env.toml", "[hypervisor]\nvcpus = 5\n")
    monkeypatch.setenv(config.ENVIRONMENT_VARIABLE, str(host / "env.toml"))
    assert Config.load().hypervisor == Hypervisor(vcpus=5)
    assert Config.load(write(host / "x.toml", "")) == Config()


def test_every_key_is_taken() -> None:
    text = """
        [hypervisor]
        qemu = "/q"
        accel = "tcg"
        require_kvm = true
        vcpus = 2
        memory = "512M"
        overhead_memory = "64M"
        kernel = "6.1.0-13-cloud-amd64"
        image = "1f2e"
        kernel_params = ["quiet", "a.b=c"]
        template = false
        templates_max = 3
        templates_size = "1G"
        vsock = "user"
        [storage]
        virtiofsd = "/v"
        [network]
        model = "none"
        spoofing = true
        metadata = true
        ingress_rate = "10M"
        egress_rate = "1500k"
        vhost = false
        forward_loopback = false
        [runtime]
        data_dir = "/d"
        boot_timeout = 7
        agent_timeout = 0
    """
    values = parse_toml(text.encode(), what="f")
    assert values["hypervisor"] == {
        "qemu": Path("/q"),
        "accel": "tcg",
        "require_kvm": True,
        "vcpus": 2,
        "memory": 512 << 20,
        "overhead_memory": 64 << 20,
        "kernel": "6.1.0-13-cloud-amd64",
        "image": "1f2e",
        "kernel_params": ("quiet", "a.b=c"),
        "template": False,
        "templates_max": 3,
        "templates_size": 1 << 30,
        "vsock": "user",
    }
    assert values["storage"] == {"virtiofsd": Path("/v")}
    assert values["network"] == {
        "model": "none",
        "spoofing": True,
        "metadata": True,
        "ingress_rate": 10_000_000,
        "egress_rate": 1_500_000,
        "vhost": False,
        "forward_loopback": False,
    }
    assert values["runtime"] == {"data_dir": Path("/d"), "boot_timeout": 7.0, "agent_timeout": 0.0}
    assert {name: {key.name for key in fields(section)} for name, section in SECTIONS.items()} == {
        name: set(keys) for name, keys in values.items()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[hypervisor]\nvcpu = 1", "f: unknown key 'vcpu' in [hypervisor]; did you mean 'vcpus'?"),
        ("[storage]\nzzz = 1", "f: unknown key 'zzz' in [storage]; known are virtiofsd"),
        ("[hypervizor]", "f: unknown section 'hypervizor'; did you mean 'hypervisor'?"),
        ("runtime = 3", "f: runtime: expected a section [runtime]"),
        ('[hypervisor]\nvcpus = "2"', "f: hypervisor.vcpus: expected an integer"),
        ("[hypervisor]\nvcpus = true", "f: hypervisor.vcpus: expected an integer"),
        ("[hypervisor]\nvcpus = 0", "f: hypervisor.vcpus: 0 is not between 1 and 255"),
        ("[hypervisor]\nmemory = 256", "f: hypervisor.memory: expected a string"),
        ('[hypervisor]\nmemory = "256MB"', "f: hypervisor.memory: '256MB' is not a size such as \"256M\""),
        ('[hypervisor]\nmemory = "1M"', "f: hypervisor.memory: 1M is not between 128M and 4T"),
        ('[hypervisor]\naccel = "KVM"', "f: hypervisor.accel: 'KVM' is none of auto, kvm, tcg"),
        ("[hypervisor]\naccel = [1]", "f: hypervisor.accel: '[1]' is none of auto, kvm, tcg"),
        ("[hypervisor]\nrequire_kvm = 1", "f: hypervisor.require_kvm: expected true or false"),
        ('[hypervisor]\nimage = "../x"', "f: hypervisor.image: '../x' is not a name"),
        ('[hypervisor]\nqemu = "qemu"', "f: hypervisor.qemu: 'qemu' is not an absolute path"),
        ('[hypervisor]\nkernel_params = "quiet"', "f: hypervisor.kernel_params: expected an array of strings"),
        (
            '[hypervisor]\nkernel_params = ["quiet init=/bin/sh"]',
            "f: hypervisor.kernel_params: 'quiet init=/bin/sh' is not one kernel parameter",
        ),
        ("[runtime]\nboot_timeout = nan", "f: runtime.boot_timeout: expected a number of seconds"),
        ("[runtime]\nagent_timeout = 0.5", "f: runtime.agent_timeout: 0.5 is not between 1 and 3600"),
        ("[runtime]\nagent_timeout = false", "f: runtime.agent_timeout: expected a number of seconds"),
        ("[runtime]\nboot_timeout = 0", "f: runtime.boot_timeout: 0 is not between 1 and 3600"),
        ("[hypervisor", "f: not TOML: expected ']' at the end of a table declaration (at end of document)"),
        ("[hypervisor]\nvcpus = 1\nvcpus = 2", "f: not TOML: cannot overwrite a value (at end of document)"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_toml(text.encode(), what="f")
    assert str(caught.value) == message


@pytest.mark.parametrize("data", [b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000, b"a = '\xff'", b"a = \x00"])
def test_hostile_documents_get_one_line(data: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_toml(data, what="f")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_files_that_are_no_configuration(host: Path) -> None:
    os.mkfifo(host / "fifo", 0o600)
    with pytest.raises(NotFound, match=r"configuration .*/gone: no such file"):
        Config.load(host / "gone")
    for path in (host, host / "fifo"):
        with pytest.raises(InvalidArgument, match="not a regular file"):
            Config.load(path)
    with pytest.raises(InvalidArgument, match="larger than 1048576 bytes"):
        Config.load(write(host / "big", "#" * (1 << 20) + "\n"))


@pytest.mark.parametrize(
    ("mode", "uid", "error"),
    [
        (0o100600, os.geteuid(), None),
        (0o100644, 0, None),
        (0o100664, 0, PermissionDenied),
        (0o100602, 0, PermissionDenied),
        (0o100600, os.geteuid() + 1, PermissionDenied),
    ],
)
def test_only_its_owner_may_write_it(mode: int, uid: int, error: type[PermissionDenied] | None) -> None:
    status = os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))
    if error is None:
        check_owner(status, "f")
    else:
        with pytest.raises(error, match=r"^f: "):
            check_owner(status, "f")


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1K", 1024), ("256M", 256 << 20), ("3G", 3 << 30), ("1T", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "1m", "1 M", "1M\n", "\u0661M", "9" * 16])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def default_of(value: object) -> str:
    """A default as the TOML file would have it."""
    if value is None:
        return '"auto"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1 << 20:
        return f'"{format_size(value)}"'
    if isinstance(value, (str, Path)):
        return f'"{value}"'
    return "[]" if value == () else f"{value:g}"


def test_the_page_shows_every_key() -> None:
    page = PAGE.read_text()
    for name, section in SECTIONS.items():
        rows = [f"| `{key.name}` | `{default_of(key.default)}` | {key.metadata['doc']} |" for key in fields(section)]
        table = f"## [{name}]\n\n| key | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
        assert table in page, f"docs/configuration.md should contain:\n{table}"
