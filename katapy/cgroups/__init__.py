"""The host's cgroups of a pod: where QEMU and its helpers run, and what they may use together.

``layout`` says what this host has mounted, ``path`` reads cgroupsPath, ``limits`` says which limit is which value in
which file, ``directory`` removes what a record names, ``cgroup`` makes, fills and changes it, ``systemd`` asks systemd
for a scope. The container's own limits, inside of the guest, are the guest agent's.

Nothing is imported here: `katapy delete` needs ``directory`` and ``layout`` alone, which import little.
"""
