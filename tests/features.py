"""What is tested on every sort of host, by name: which tests show that a feature works there.

All of them together are what the lab runs; which feature was seen to work on which host is in docs/testing.md.
"""

from __future__ import annotations

from typing import Final

_FUNCTIONAL: Final = "tests/functional/test_"
_INTEGRATION: Final = "tests/integration/test_"

FEATURES: Final[dict[str, tuple[str, ...]]] = {
    "choice of the accelerator and the vsock device": (f"{_FUNCTIONAL}hardware.py",),
    "cold start": (f"{_FUNCTIONAL}restored.py::test_a_vm_can_be_booted_instead",),
    "template start and restore": (
        f"{_FUNCTIONAL}restored.py::test_the_first_start_makes_it_and_the_second_is_restored",
    ),
    "run and exit status": (
        f"{_FUNCTIONAL}run.py::test_runs_in_another_kernel",
        f"{_FUNCTIONAL}run.py::test_create_then_start",
    ),
    "exec, kill, delete": (f"{_FUNCTIONAL}run.py::test_detach_exec_kill_delete",),
    "signals": (f"{_FUNCTIONAL}run.py::test_signals_reach_the_container",),
    "terminals": (f"{_FUNCTIONAL}stdio.py::test_interactive_shell",),
    "every byte of stdio": (f"{_FUNCTIONAL}stdio.py::test_much_through_cat",),
    "limits of memory (OOM), pids, devices": (f"{_FUNCTIONAL}run.py::test_limits_hold",),
    "cgroups of the host": (
        f"{_INTEGRATION}cgroup.py",
        f"{_FUNCTIONAL}contract.py::test_the_pod_is_in_its_cgroup_on_the_host",
    ),
    "a root that is a disk": (f"{_FUNCTIONAL}root_disk.py::test_a_writable_root_and_its_life",),
    "two pods at once": (f"{_FUNCTIONAL}hardware.py::test_two_pods_at_once",),
    "a pod of two containers": (f"{_FUNCTIONAL}verbs.py::test_the_end_of_a_pod_s_sandbox",),
    "networks through taps": (
        f"{_FUNCTIONAL}pod_network.py::test_a_pod_has_the_interface_of_its_namespace",
        f"{_FUNCTIONAL}pod_network.py::test_everybody_talks_to_everybody",
        f"{_FUNCTIONAL}pod_network.py::test_much_data_arrives_as_it_was[1500]",
    ),
    "containerd": (
        f"{_FUNCTIONAL}containerd.py::test_output_and_exit_status",
        f"{_FUNCTIONAL}containerd.py::test_a_task_s_life",
        f"{_FUNCTIONAL}containerd.py::test_a_terminal",
    ),
    "podman": (f"{_FUNCTIONAL}engines.py::test_attached",),
    "cleanup after kill -9": (
        f"{_FUNCTIONAL}failures.py::test_part_killed_behind_a_detached_container",
        f"{_FUNCTIONAL}containerd_kills.py::test_killed_shim",
        f"{_FUNCTIONAL}containerd_kills.py::test_killed_vm",
    ),
}
# Where there is no such device, there is nothing to be tested.
HARDWARE: Final[dict[str, tuple[str, ...]]] = {
    "CIDs of the kernel's vsock": (f"{_INTEGRATION}vsock_kernel.py",),
    "vhost-net": (f"{_INTEGRATION}network.py::test_vhost_has_a_descriptor_for_each_queue",),
    "privately mapped memory": (f"{_FUNCTIONAL}private_memory.py",),
    "systemd makes the cgroups": (f"{_FUNCTIONAL}systemd.py",),
}


def features_of(test: str) -> list[str]:
    """Return the features that a test shows, given its node id."""
    return [
        name
        for name, selected in (FEATURES | HARDWARE).items()
        if any(test == each or test.startswith((f"{each}::", f"{each}[")) for each in selected)
    ]
