"""`katapy features` is true: what it lists is what the host's parser and the guest's tables take, and no more."""

from __future__ import annotations

import pytest
from katapy_agent import config, errors, mounts, seccomp

from katapy.oci import features
from katapy.oci.linux import NAMESPACES
from katapy.oci.seccomp import OPERATORS

# The mount options that only say what a mount is, or how; each has its own line in mounts.parse_options.
KINDS = {"bind", "rbind", "tmpcopyup"}


def mount(option: str) -> config.Mount:
    return config.Mount("/x", "bind" if option in ("bind", "rbind") else "tmpfs", "/x", (option,))


def test_mount_options() -> None:
    tables = (
        mounts._ATTRIBUTES,
        mounts._RECURSIVE_ATTRIBUTES,
        mounts.PROPAGATIONS,
        mounts._RECURSIVE_PROPAGATIONS,
        mounts._NOTHING,
    )
    assert set(features.MOUNT_OPTIONS) == {option for table in tables for option in table} | KINDS
    for option in features.MOUNT_OPTIONS:
        # Understood here, and not passed on to the file system.
        assert mounts.parse_options(mount(option)).data == (), option
    assert not mounts._REFUSED & set(features.MOUNT_OPTIONS)


def test_namespaces() -> None:
    assert set(NAMESPACES) == set(config.NamespaceType)


def test_capabilities() -> None:
    assert tuple(config._CAPABILITY_BIT) == features.CAPABILITIES


def test_seccomp() -> None:
    assert set(features.SECCOMP_ACTIONS) == {*seccomp._ACTIONS, *seccomp._ACTIONS_WITH_NUMBER}
    assert set(OPERATORS) == set(seccomp._OPERATORS)
    assert set(features.SECCOMP_FLAGS) == set(seccomp._FLAGS)


@pytest.mark.parametrize(
    "architecture",
    [
        *("X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32"),
        *("PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64"),
    ],
)
def test_seccomp_architectures(architecture: str) -> None:
    """All that the specification names: what is listed compiles, and what is not is refused."""
    name = f"SCMP_ARCH_{architecture}"
    profile = config.Seccomp("SCMP_ACT_ALLOW", architectures=(name,))
    if name in features.SECCOMP_ARCHITECTURES:
        assert seccomp.compile_filter(profile)
    else:
        with pytest.raises(errors.InvalidArgument, match=name):
            seccomp.compile_filter(profile)


def test_what_is_refused_is_not_enabled() -> None:
    """tests/unit/test_oci_page.py shows that these are refused."""
    linux = features.features()["linux"]
    enabled = {name: linux[name]["enabled"] for name in ("apparmor", "selinux", "intelRdt")}
    assert enabled == {"apparmor": False, "selinux": False, "intelRdt": False}
    assert not linux["mountExtensions"]["idmap"]["enabled"]
    assert not linux["cgroup"]["rdma"]
