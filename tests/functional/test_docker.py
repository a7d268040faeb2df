"""Docker with katapy as its runtime, and its networks: Debian's docker.io, whose daemon calls an OCI command line.

Where it can be compared, the same runs with runc too. Where docker cannot run that either, the machine is the reason,
and the tests are skipped with it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from docker_daemon import IMAGE, Docker, start_docker
from harness import DEADLINE

SOURCE = Path(__file__).resolve().parents[2]
WEB = ("httpd", "-f", "-p", "80", "-h", "/etc")
PAGE = "passwd"
# Everything about a container's network but what is its own: its address, its names.
FACTS = r"""
part() { echo "== $1"; }
part links; for path in /sys/class/net/*; do
    echo "${path##*/} mtu $(cat $path/mtu) up $(( $(cat $path/flags) & 1 ))"
done
part addresses; ip addr show eth0 | grep -wE 'inet|inet6' | sed 's/10\.7[78]\.[0-9]*\.[0-9]*/ADDRESS/g'
part mac; [ "$(cat /sys/class/net/eth0/address)" = "02:42$(hostname -i | tr . '\n' |
    while read -r part; do printf ':%02x' $part; done)" ] && echo by address
part routes; ip route | sed "s/$(hostname -i)/ADDRESS/"; ip -6 route | grep -v fe80
part files; cat /etc/resolv.conf; sed "s/$(hostname -i)/ADDRESS/; s/$(hostname)/NAME/" /etc/hosts
"""


@pytest.fixture(scope="module")
def daemon(busybox: Path) -> Iterator[Docker]:
    """A daemon with runc and katapy."""
    with tempfile.TemporaryDirectory(prefix="katapy-") as name:
        try:
            with start_docker(Path(name), busybox) as docker:
                probe = docker.run("--rm", IMAGE, "true", runtime="runc", check=False)
                if probe.status:
                    pytest.skip(f"docker cannot run runc on this machine either: {probe.err.strip()}")
                yield docker
        except RuntimeError as error:
            pytest.skip(f"docker cannot run on this machine: {error}")


@pytest.fixture
def docker(daemon: Docker, host: None) -> Iterator[Docker]:
    """The daemon; afterwards it has no container, and no network of the test's."""
    yield daemon
    left = daemon("ps", "--all", "--quiet").out.split()
    if left:
        daemon("rm", "--force", *left, check=False)
    daemon("network", "prune", "--force")
    assert not left, "containers left behind"


@contextmanager
def container(docker: Docker, name: str, *args: str) -> Iterator[str]:
    """Run a container while the context lasts, and give its name."""
    docker.run("--detach", "--name", name, *args)
    try:
        yield name
    finally:
        docker("rm", "--force", name)


def fetched(docker: Docker, url: str) -> str:
    """Return a page as the host gets it, once the server is up."""
    deadline = time.monotonic() + DEADLINE
    while (done := docker.on_host("busybox", "wget", "-q", "-O-", url, check=False)).status:
        assert time.monotonic() < deadline, done
        time.sleep(0.1)
    return done.out


@pytest.mark.parametrize("network", ["bridge", "custom"])
def test_a_container_s_network_is_that_of_runc(docker: Docker, network: str) -> None:
    """On the default bridge and on a network of the user's, where docker resolves names itself."""
    if network == "custom":
        docker("network", "create", network)
    options = ("--rm", "--network", network, "--dns-search", "example.org", IMAGE, "sh", "-c", FACTS)
    theirs, ours = (docker.run(*options, runtime=runtime).out for runtime in ("runc", "katapy"))
    assert ours == theirs
    assert "ADDRESS" in ours


def test_a_published_port(docker: Docker, busybox: Path) -> None:
    """By docker's proxy on the loopback, by its rules on another address; and containers reach one another."""
    page = (busybox / "etc" / PAGE).read_text()
    with container(docker, "web", "--publish", "8080:80", IMAGE, *WEB):
        address = docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web").out.strip()
        assert fetched(docker, f"http://{address}/{PAGE}") == page
        for host in ("127.0.0.1", "10.77.0.1"):
            assert fetched(docker, f"http://{host}:8080/{PAGE}") == page
        for runtime in ("runc", "katapy"):
            command = ("wget", "-q", "-O-", f"http://{address}/{PAGE}")
            assert docker.run("--rm", IMAGE, *command, runtime=runtime).out == page


def test_names_of_a_user_s_network(docker: Docker, busybox: Path) -> None:
    """Docker answers them on the loopback of the container's namespace, which is not the VM's."""
    docker("network", "create", "custom")
    with container(docker, "web", "--network", "custom", "--network-alias", "www", IMAGE, *WEB):
        address = docker("inspect", "--format", "{{.NetworkSettings.Networks.custom.IPAddress}}", "web").out.strip()
        fetched(docker, f"http://{address}/{PAGE}")
        # Many at once, and each gets its own answer.
        ask = f"""
            for name in web www; do wget -q -O- http://$name/{PAGE}; done
            for i in $(seq 40); do nslookup web > /tmp/$i & done; wait; grep -l 'Address: {address}' /tmp/* | wc -l
            nslookup nobody.invalid > /dev/null || echo unknown
        """
        expected = 2 * (busybox / "etc" / PAGE).read_text() + "40\nunknown\n"
        assert docker.run("--rm", "--network", "custom", IMAGE, "sh", "-c", ask).out == expected


def test_dns(docker: Docker) -> None:
    """The files are docker's, and what they name is asked."""
    done = docker.run(
        "--rm", "--dns", "10.77.0.1", "--add-host", "db:192.0.2.7", IMAGE, "cat", "/etc/resolv.conf", "/etc/hosts"
    )
    assert "nameserver 10.77.0.1\n" in done.out
    assert "192.0.2.7\tdb\n" in done.out


def test_networks_come_and_go(docker: Docker) -> None:
    """`docker network connect` and `disconnect`, while the container runs."""
    docker("network", "create", "custom")
    appears = "until ip addr | grep -q 'inet 10.78'; do sleep 0.1; done"
    goes = "while [ $(ls /sys/class/net | wc -l) != 2 ]; do sleep 0.1; done; ip addr show eth0 | grep -c 'inet 10.77'"
    with container(docker, "web", IMAGE, *WEB):
        for _ in range(2):
            docker("network", "connect", "custom", "web")
            docker("exec", "web", "sh", "-c", appears)
            docker("network", "disconnect", "custom", "web")
            assert docker("exec", "web", "sh", "-c", goes).out == "1\n"


def test_without_a_network(docker: Docker) -> None:
    """Loopback, and no device that could be one."""
    look = "ls /sys/class/net; grep -il '^0x1041\\|^0x1000' /sys/bus/pci/devices/*/device | wc -l"
    assert docker.run("--rm", "--network", "none", IMAGE, "sh", "-c", look).out == "lo\n0\n"


def test_the_readme_s_docker_commands(docker: Docker, busybox: Path) -> None:
    """As written, but for the installation and the daemon."""
    section = (SOURCE / "README.md").read_text().partition("## With docker")[2]
    blocks = [block.partition("```")[0] for block in section.split("```sh\n")[1:3]]
    assert blocks[0].startswith("apt-get install ")
    (docker.directory / "examples/hello").mkdir(parents=True)
    (docker.directory / "examples/hello/rootfs").symlink_to(busybox)
    lines = docker.on_host("sh", "-euc", blocks[1]).out
    docker("image", "rm", "hello")
    assert lines.count((busybox / "etc/passwd").read_text()) == 2
