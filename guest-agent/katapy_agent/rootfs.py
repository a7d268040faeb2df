"""The root file system of a container: root, mounts, /dev, what is hidden and what is read-only, in order.

It is built in two steps. ``open_sources`` runs with all privileges in the VM's own namespaces and opens what comes
from there: bind sources, the root, device nodes. ``build`` and ``protect`` run inside the container's namespaces and
touch nothing of the VM but /dev/null; ``set_propagation`` follows when the root is in place. The steps themselves are
``mounts``'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from katapy_agent import linux, mounts
from katapy_agent.config import Device, Mount, NamespaceType, Spec
from katapy_agent.errors import InvalidArgument, PermissionDenied, doing
from katapy_agent.mounts import IN_ROOT, Options, closing

_DEFAULT_DEVICES: Final = (
    Device("/dev/null", "c", 1, 3),
    Device("/dev/zero", "c", 1, 5),
    Device("/dev/full", "c", 1, 7),
    Device("/dev/random", "c", 1, 8),
    Device("/dev/urandom", "c", 1, 9),
    Device("/dev/tty", "c", 5, 0),
)
_LINKS: Final = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
)
_FILE_TYPES: Final = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
# What may be mounted over inside /proc (lxcfs and the like do), as in runc.
_PROC_TARGETS: Final = frozenset(
    f"/proc/{name}"
    for name in (
        "cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev",
        "sys/kernel/ns_last_pid", "sys/crypto/fips_enabled",
    )
)  # fmt: skip
_PROC_ROOT_INODE: Final = 1
# Room for nodes and missing mount points, which is all that is ever written there.
_SMALL: Final = (("size", "1m"), ("mode", "0755"))


@dataclass(frozen=True)
class Sources:
    """What a container takes from the VM, as descriptors: detached mounts, and the VM's /proc/sys.

    ``trees`` has the bind mounts by their index in the specification. ``nodes`` holds a node per device, named by its
    index, where nodes cannot be made in the container.
    """

    root: int
    trees: dict[int, int]
    nodes: int | None
    proc_sys: int


def check(spec: Spec) -> None:
    """Refuse mounts that katapy does not make, before anything exists. Raises InvalidArgument and Unsupported."""
    for mount in spec.mounts:
        mounts.parse_options(mount)


def open_sources(spec: Spec) -> Sources:
    """Open what the container takes from the VM. Raises KatapyError."""
    user_namespace = spec.linux.has(NamespaceType.USER)
    trees = {}
    for index, mount in enumerate(spec.mounts):
        options = mounts.parse_options(mount)
        with doing(f"mount {mount.destination}: open its source {mount.source}"):
            if options.is_bind:
                trees[index] = _clone_private(mount.source, recursive=options.recursive, flag=linux.MS_SLAVE)
            elif options.filesystem == "sysfs" and user_namespace:
                # A new one takes rights over the network namespace, which is the VM's.
                trees[index] = _clone_private("/sys", recursive=False, flag=linux.MS_PRIVATE)
    with doing(f"open the root file system {spec.root.path}"):
        root = _clone_private(spec.root.path, recursive=True, flag=linux.MS_PRIVATE)
    with doing("open /proc/sys"):
        proc_sys = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    nodes = _make_nodes(spec) if _needs_node_copies(spec) else None
    return Sources(root, trees, nodes, proc_sys)


def bind_sources(spec: Spec) -> list[str]:
    """Return the paths of what is mounted in the container by a bind mount."""
    return [mount.source for mount in spec.mounts if mounts.parse_options(mount).is_bind]


def refresh(sources: Sequence[str]) -> None:
    """Have the host say how large these files are.

    What a guest knows of that is a second old at times, and engines write files between create and start: podman 5
    does /etc/hosts.
    """
    for source in sources:
        with contextlib.suppress(OSError):
            linux.fetch_attributes(source)


def build(spec: Spec, sources: Sources) -> int:
    """Make the root and everything mounted in it, in this new mount namespace; return the root's descriptor.

    The root is attached but not yet the process's root. Raises KatapyError.
    """
    with doing("mount the root file system"), closing(os.open("/", os.O_PATH | os.O_CLOEXEC)) as top:
        linux.mount_setattr(top, propagation=linux.MS_PRIVATE, recursive=True)
        if sources.nodes is not None:
            linux.move_mount(sources.nodes, top)
        # On top of the VM's root: the one directory that is there and can be reached whatever the user namespace.
        linux.move_mount(sources.root, top)
        places = [mount.destination for mount in spec.mounts]
        root = _cover(sources.root, top, places) if spec.root.readonly else sources.root
    for index, mount in enumerate(spec.mounts):
        with doing(f"mount {mount.destination}"):
            _mount(root, mount, sources.trees.get(index))
    if not _is_own_dev(spec):
        _fill_dev(root, spec, sources.nodes)
    if spec.process:
        with doing(f"make the working directory {spec.process.cwd}"):
            os.close(mounts.make_target(root, spec.process.cwd, directory=True))
    return root


def protect(spec: Spec, root: int) -> None:
    """Hide masked paths and make read-only what shall be. Raises KatapyError."""
    for path in spec.linux.readonly_paths:
        with doing(f"make {path} read-only"):
            _make_read_only(root, path)
    for path in spec.linux.masked_paths:
        with doing(f"mask {path}"):
            _mask(root, path)
    if spec.root.readonly:
        with doing("make the root file system read-only"):
            linux.mount_setattr(root, set_=linux.MOUNT_ATTR_RDONLY)


def set_propagation(name: str) -> None:
    """Set rootfsPropagation on what is the root now: pivot_root(2) takes no shared mount. Raises KatapyError."""
    with doing(f"set rootfsPropagation {name}"), closing(os.open("/", os.O_PATH | os.O_CLOEXEC)) as root:
        flag = mounts.PROPAGATIONS[name.removeprefix("r")]
        linux.mount_setattr(root, propagation=flag, recursive=name.startswith("r"))


def _clone_private(path: str, *, recursive: bool, flag: int) -> int:
    # A copy is of its original's peer group: what the container mounts in it would appear in the VM.
    tree = mounts.clone_path(path, recursive=recursive)
    linux.mount_setattr(tree, propagation=flag, recursive=True)
    return tree


def _cover(lower: int, top: int, places: Sequence[str]) -> int:
    """Put an overlay over the root ``lower``, which itself cannot take new mount points; return the overlay.

    ``places`` are where something will be mounted on it.
    """
    # Attached, for overlay only takes layers of this mount namespace; the tmpfs goes away with the VM's old root.
    with closing(mounts.new_filesystem("tmpfs", source="tmpfs", attributes=0, data=_SMALL)) as scratch:
        linux.move_mount(scratch, top)
        below, upper, work = f"/proc/self/fd/{lower}", f"/proc/self/fd/{scratch}/upper", f"/proc/self/fd/{scratch}/work"
        os.mkdir(work, 0o755)
        _copy_directory(f"{below}/.", upper)
        for place in places:
            with doing(f"make room for a mount at {place}"):
                _hide_submount(below, upper, place)
        data = (("lowerdir", below), ("upperdir", upper), ("workdir", work))
        overlay = mounts.new_filesystem("overlay", source="overlay", attributes=0, data=data)
    linux.move_mount(overlay, top)
    return overlay


def _copy_directory(source: str, copy: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(copy)
    status = os.stat(source)
    os.chmod(copy, stat.S_IMODE(status.st_mode))
    # An owner that the user namespace does not know cannot be given.
    with contextlib.suppress(OSError):
        os.chown(copy, status.st_uid, status.st_gid)


def _hide_submount(lower: str, upper: str, place: str) -> None:
    """Hide a submount of the lower layer that ``place`` is at or in behind an empty directory of the upper one.

    An overlay does not look into a submount of virtio-fs (EREMOTE): nothing could be mounted there.
    """
    way = _find_submount(lower, place)
    for path in way:
        _copy_directory(f"{lower}{path}", f"{upper}{path}")
    if way:
        os.setxattr(f"{upper}{way[-1]}", "trusted.overlay.opaque", b"y")


def _find_submount(lower: str, place: str) -> list[str]:
    """Return the directories on the way to the first submount that ``place`` is at or in, that one last; or nothing."""
    device, way, path = os.stat(f"{lower}/.").st_dev, [], ""
    # What is missing or out of reach is for the making of the mount point to report.
    with contextlib.suppress(OSError):
        for name in os.path.normpath(place).strip("/").split("/"):
            path = f"{path}/{name}"
            way.append(path)
            if not stat.S_ISDIR(os.lstat(f"{lower}{path}").st_mode):
                break
            # Only at the dot the kernel goes into it.
            if os.stat(f"{lower}{path}/.").st_dev != device:
                return way
    return []


def _mount(root: int, mount: Mount, tree: int | None) -> None:
    options = mounts.parse_options(mount)
    directory = tree is None or mounts.is_directory(tree)
    resolve = mounts.target_resolution(options)
    # As under runc, a tmpfs is like the directory that it covers, and where there was none as the kernel makes it.
    made = mounts.is_missing(root, mount.destination, resolve=resolve)
    with closing(mounts.make_target(root, mount.destination, directory=directory, resolve=resolve)) as target:
        _check_target(root, mount, target)
        tree = _new_filesystem(mount, options, None if made else target) if tree is None else tree
        with closing(tree):
            if options.copy_up and not made:
                mounts.copy_up(target, tree)
            mounts.apply_options(tree, options)
            linux.move_mount(tree, target)


def _new_filesystem(mount: Mount, options: Options, target: int | None) -> int:
    data = options.data
    if options.filesystem == "tmpfs" and target is not None and not any(key == "mode" for key, _ in data):
        data = (*data, ("mode", f"{stat.S_IMODE(os.fstat(target).st_mode):04o}"))
    # A read-only mount that is still to be filled becomes so afterwards.
    attributes = options.own.set & ~linux.MOUNT_ATTR_RDONLY if options.copy_up else options.own.set
    return mounts.new_filesystem(options.filesystem, source=mount.source, attributes=attributes, data=data)


def _check_target(root: int, mount: Mount, target: int) -> None:
    here, top = os.fstat(target), os.fstat(root)
    if (here.st_dev, here.st_ino) == (top.st_dev, top.st_ino):
        raise InvalidArgument(f"cannot mount {mount.destination}: it is the root of the container")
    if linux.fstatfs_type(target) != linux.PROC_SUPER_MAGIC or here.st_ino == _PROC_ROOT_INODE:
        return
    if os.path.normpath(mount.destination) not in _PROC_TARGETS:
        raise PermissionDenied(f"cannot mount {mount.destination}: it is inside /proc")


def _devices(spec: Spec) -> list[Device]:
    """Return the specification's devices and those of the default ones that it does not replace."""
    own = {os.path.normpath(device.path) for device in spec.linux.devices}
    return [*spec.linux.devices, *(device for device in _DEFAULT_DEVICES if device.path not in own)]


def _is_own_dev(spec: Spec) -> bool:
    """Return whether /dev is bound from somewhere and is therefore left as it is."""
    at_dev = [mount for mount in spec.mounts if os.path.normpath(mount.destination) == "/dev"]
    return bool(at_dev) and mounts.parse_options(at_dev[-1]).is_bind


def _needs_node_copies(spec: Spec) -> bool:
    if _is_own_dev(spec):
        return False
    # No node can be made in a user namespace, nor on a shared directory whose server may not.
    has_tmpfs = any(os.path.normpath(each.destination) == "/dev" and each.type == "tmpfs" for each in spec.mounts)
    inside = all(os.path.normpath(device.path).startswith("/dev/") for device in spec.linux.devices)
    return spec.linux.has(NamespaceType.USER) or not (has_tmpfs and inside)


def _make_nodes(spec: Spec) -> int:
    with doing("make device nodes"):
        nodes = mounts.new_filesystem("tmpfs", source="tmpfs", attributes=linux.MOUNT_ATTR_NOEXEC, data=_SMALL)
        for index, device in enumerate(_devices(spec)):
            _make_node(nodes, str(index), device)
        return nodes


def _make_node(directory: int, name: str, device: Device) -> None:
    number = os.makedev(device.major, device.minor)
    kind = _FILE_TYPES[device.type]
    try:
        os.mknod(name, kind | stat.S_IMODE(device.file_mode), number, dir_fd=directory)
        os.chown(name, device.uid, device.gid, dir_fd=directory, follow_symlinks=False)
    except FileExistsError:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if (stat.S_IFMT(status.st_mode), status.st_rdev) != (kind, number):
            raise


def _fill_dev(root: int, spec: Spec, nodes: int | None) -> None:
    for index, device in enumerate(_devices(spec)):
        path, name = os.path.split(os.path.normpath(device.path))
        with doing(f"make device {device.path}"), closing(mounts.make_target(root, path, directory=True)) as directory:
            if nodes is None:
                _make_node(directory, name, device)
            else:
                if device in spec.linux.devices:
                    _check_place(directory, name, device)
                _bind_node(directory, name, nodes, str(index))
    with doing("make the links in /dev"), closing(mounts.make_target(root, "/dev", directory=True)) as dev:
        with contextlib.suppress(FileNotFoundError):
            os.unlink("ptmx", dir_fd=dev)
        for name, target in _LINKS:
            # Not every kernel has it; runc looks, too.
            if name == "core" and not os.path.exists(target):
                continue
            with contextlib.suppress(FileExistsError):
                os.symlink(target, name, dir_fd=dev)


def _check_place(directory: int, name: str, device: Device) -> None:
    """Refuse to hide what is no such device (config-linux.md, "Devices"); to an empty file one was bound before."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    placeholder = stat.S_ISREG(status.st_mode) and status.st_size == 0
    number = 0 if device.type == "p" else os.makedev(device.major, device.minor)
    if not placeholder and (stat.S_IFMT(status.st_mode), status.st_rdev) != (_FILE_TYPES[device.type], number):
        raise FileExistsError(errno.EEXIST, "something else is there")


def _bind_node(directory: int, name: str, nodes: int, index: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory))
    target = linux.openat2(directory, name, os.O_PATH, resolve=mounts.NO_LINKS)
    with closing(target), closing(linux.open_tree(nodes, index, recursive=False)) as tree:
        linux.move_mount(tree, target)


def _make_read_only(root: int, path: str) -> None:
    target = _open_if_there(root, path)
    if target is None:
        return
    with closing(target), closing(linux.open_tree(target, "", recursive=True)) as tree:
        linux.mount_setattr(tree, set_=linux.MOUNT_ATTR_RDONLY, recursive=True)
        linux.move_mount(tree, target)


def _open_if_there(root: int, path: str) -> int | None:
    try:
        return linux.openat2(root, path, os.O_PATH, resolve=IN_ROOT)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _mask(root: int, path: str) -> None:
    target = _open_if_there(root, path)
    if target is None:
        return
    with closing(target):
        if mounts.is_directory(target):
            attributes = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC
            tree = mounts.new_filesystem("tmpfs", source="tmpfs", attributes=attributes, data=_SMALL)
        else:
            # The VM's own, never the container's, which an image may have put there.
            tree = linux.open_tree(linux.AT_FDCWD, "/dev/null", recursive=False)
        with closing(tree):
            linux.move_mount(tree, target)
