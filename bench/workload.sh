#!/bin/sh
# Times work on the files of the present directory, which were put there just before, so that the guest has none of
# them in its memory. Needs nothing but busybox, whose `ts` has the one fine clock, and /tmp in memory: to start the
# programs must take as long wherever this runs. Prints lines: NAME BEGAN ENDED, in seconds.
set -eu
cp /bin/busybox read-randomly /tmp/

timed() { # NAME PROGRAM ARGUMENTS...
    name=$1
    shift
    began=$(echo | /tmp/busybox ts %.s)
    "$@" 2>/dev/null
    echo "$name $began $(echo | /tmp/busybox ts %.s)"
}

timed read /tmp/busybox dd if=data of=/dev/null bs=1M
timed write /tmp/busybox dd if=/dev/zero of=written bs=1M count="$(($(stat -c %s data) / 1048576))"
timed random /tmp/read-randomly <pages
timed untar /tmp/busybox tar xf tree.tar
