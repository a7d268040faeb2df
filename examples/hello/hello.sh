#!/bin/sh
# Runs as pid 1 of the container, inside the VM.
echo "Hello from inside a virtual machine."
echo "  guest kernel   $(uname -r)"
echo "  host kernel    $HOST_KERNEL"
echo "  pid 1          $(tr '\0' ' ' < /proc/1/cmdline)(this process is $$)"
for namespace in mnt pid ipc uts cgroup; do
    echo "  namespace      $(readlink "/proc/self/ns/$namespace")"
done
echo "  memory limit   $(($(cat /sys/fs/cgroup/memory.max) / 1048576)) MiB"
echo "  memory of VM   $(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024)) MiB, $(nproc) vCPU"
