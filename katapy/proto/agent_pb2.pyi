from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GuestDetails(_message.Message):
    __slots__ = ("agent_version", "kernel_release", "kernel_version", "hostname", "vcpus", "memory_bytes", "seccomp", "cgroup_controllers")
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    KERNEL_RELEASE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    VCPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECCOMP_FIELD_NUMBER: _ClassVar[int]
    CGROUP_CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    kernel_release: str
    kernel_version: str
    hostname: str
    vcpus: int
    memory_bytes: int
    seccomp: bool
    cgroup_controllers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent_version: _Optional[str] = ..., kernel_release: _Optional[str] = ..., kernel_version: _Optional[str] = ..., hostname: _Optional[str] = ..., vcpus: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., seccomp: _Optional[bool] = ..., cgroup_controllers: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateSandboxRequest(_message.Message):
    __slots__ = ("hostname", "shared_tag", "sandbox_id", "time_ns", "entropy", "interfaces", "routes", "neighbors")
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    SHARED_TAG_FIELD_NUMBER: _ClassVar[int]
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    INTERFACES_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    hostname: str
    shared_tag: str
    sandbox_id: str
    time_ns: int
    entropy: bytes
    interfaces: _containers.RepeatedCompositeFieldContainer[Interface]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    neighbors: _containers.RepeatedCompositeFieldContainer[Neighbor]
    def __init__(self, hostname: _Optional[str] = ..., shared_tag: _Optional[str] = ..., sandbox_id: _Optional[str] = ..., time_ns: _Optional[int] = ..., entropy: _Optional[bytes] = ..., interfaces: _Optional[_Iterable[_Union[Interface, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ..., neighbors: _Optional[_Iterable[_Union[Neighbor, _Mapping]]] = ...) -> None: ...

class UpdateInterfaceRequest(_message.Message):
    __slots__ = ("interface",)
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    interface: Interface
    def __init__(self, interface: _Optional[_Union[Interface, _Mapping]] = ...) -> None: ...

class RelayResolverRequest(_message.Message):
    __slots__ = ("address", "stream")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    address: bytes
    stream: str
    def __init__(self, address: _Optional[bytes] = ..., stream: _Optional[str] = ...) -> None: ...

class ForwardConnectionRequest(_message.Message):
    __slots__ = ("port", "ipv6", "stream")
    PORT_FIELD_NUMBER: _ClassVar[int]
    IPV6_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    port: int
    ipv6: bool
    stream: str
    def __init__(self, port: _Optional[int] = ..., ipv6: _Optional[bool] = ..., stream: _Optional[str] = ...) -> None: ...

class UpdateRoutesRequest(_message.Message):
    __slots__ = ("routes",)
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class AddARPNeighborsRequest(_message.Message):
    __slots__ = ("neighbors",)
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    neighbors: _containers.RepeatedCompositeFieldContainer[Neighbor]
    def __init__(self, neighbors: _Optional[_Iterable[_Union[Neighbor, _Mapping]]] = ...) -> None: ...

class Interface(_message.Message):
    __slots__ = ("device", "name", "hardware_address", "mtu", "up", "no_arp", "disable_ipv6", "addresses")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    NO_ARP_FIELD_NUMBER: _ClassVar[int]
    DISABLE_IPV6_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    device: bytes
    name: str
    hardware_address: bytes
    mtu: int
    up: bool
    no_arp: bool
    disable_ipv6: bool
    addresses: _containers.RepeatedCompositeFieldContainer[InterfaceAddress]
    def __init__(self, device: _Optional[bytes] = ..., name: _Optional[str] = ..., hardware_address: _Optional[bytes] = ..., mtu: _Optional[int] = ..., up: _Optional[bool] = ..., no_arp: _Optional[bool] = ..., disable_ipv6: _Optional[bool] = ..., addresses: _Optional[_Iterable[_Union[InterfaceAddress, _Mapping]]] = ...) -> None: ...

class InterfaceAddress(_message.Message):
    __slots__ = ("address", "prefix_length", "peer", "broadcast", "scope", "no_prefix_route")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    NO_PREFIX_ROUTE_FIELD_NUMBER: _ClassVar[int]
    address: bytes
    prefix_length: int
    peer: bytes
    broadcast: bytes
    scope: int
    no_prefix_route: bool
    def __init__(self, address: _Optional[bytes] = ..., prefix_length: _Optional[int] = ..., peer: _Optional[bytes] = ..., broadcast: _Optional[bytes] = ..., scope: _Optional[int] = ..., no_prefix_route: _Optional[bool] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("family", "destination", "prefix_length", "interface", "gateway", "preferred_source", "metric", "scope", "table", "type", "protocol", "on_link", "mtu", "next_hops")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_SOURCE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ON_LINK_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    NEXT_HOPS_FIELD_NUMBER: _ClassVar[int]
    family: int
    destination: bytes
    prefix_length: int
    interface: str
    gateway: bytes
    preferred_source: bytes
    metric: int
    scope: int
    table: int
    type: int
    protocol: int
    on_link: bool
    mtu: int
    next_hops: _containers.RepeatedCompositeFieldContainer[NextHop]
    def __init__(self, family: _Optional[int] = ..., destination: _Optional[bytes] = ..., prefix_length: _Optional[int] = ..., interface: _Optional[str] = ..., gateway: _Optional[bytes] = ..., preferred_source: _Optional[bytes] = ..., metric: _Optional[int] = ..., scope: _Optional[int] = ..., table: _Optional[int] = ..., type: _Optional[int] = ..., protocol: _Optional[int] = ..., on_link: _Optional[bool] = ..., mtu: _Optional[int] = ..., next_hops: _Optional[_Iterable[_Union[NextHop, _Mapping]]] = ...) -> None: ...

class NextHop(_message.Message):
    __slots__ = ("interface", "gateway", "weight", "on_link")
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ON_LINK_FIELD_NUMBER: _ClassVar[int]
    interface: str
    gateway: bytes
    weight: int
    on_link: bool
    def __init__(self, interface: _Optional[str] = ..., gateway: _Optional[bytes] = ..., weight: _Optional[int] = ..., on_link: _Optional[bool] = ...) -> None: ...

class Neighbor(_message.Message):
    __slots__ = ("interface", "address", "hardware_address")
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    interface: str
    address: bytes
    hardware_address: bytes
    def __init__(self, interface: _Optional[str] = ..., address: _Optional[bytes] = ..., hardware_address: _Optional[bytes] = ...) -> None: ...

class Stdio(_message.Message):
    __slots__ = ("terminal", "stdin", "stdout", "stderr", "rows", "columns")
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    terminal: bool
    stdin: str
    stdout: str
    stderr: str
    rows: int
    columns: int
    def __init__(self, terminal: _Optional[bool] = ..., stdin: _Optional[str] = ..., stdout: _Optional[str] = ..., stderr: _Optional[str] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ...) -> None: ...

class CreateContainerRequest(_message.Message):
    __slots__ = ("container_id", "spec", "stdio", "joined_container_id", "joined_namespaces", "bundle", "memory", "root_disk")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STDIO_FIELD_NUMBER: _ClassVar[int]
    JOINED_CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    JOINED_NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    ROOT_DISK_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    spec: bytes
    stdio: Stdio
    joined_container_id: str
    joined_namespaces: _containers.RepeatedScalarFieldContainer[str]
    bundle: str
    memory: _containers.RepeatedCompositeFieldContainer[SharedMemory]
    root_disk: str
    def __init__(self, container_id: _Optional[str] = ..., spec: _Optional[bytes] = ..., stdio: _Optional[_Union[Stdio, _Mapping]] = ..., joined_container_id: _Optional[str] = ..., joined_namespaces: _Optional[_Iterable[str]] = ..., bundle: _Optional[str] = ..., memory: _Optional[_Iterable[_Union[SharedMemory, _Mapping]]] = ..., root_disk: _Optional[str] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("name", "size_bytes", "mode", "uid", "gid")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    mode: int
    uid: int
    gid: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., mode: _Optional[int] = ..., uid: _Optional[int] = ..., gid: _Optional[int] = ...) -> None: ...

class CreateContainerResponse(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class StartContainerRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class ExecProcessRequest(_message.Message):
    __slots__ = ("container_id", "exec_id", "process", "stdio")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    STDIO_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    exec_id: str
    process: bytes
    stdio: Stdio
    def __init__(self, container_id: _Optional[str] = ..., exec_id: _Optional[str] = ..., process: _Optional[bytes] = ..., stdio: _Optional[_Union[Stdio, _Mapping]] = ...) -> None: ...

class ExecProcessResponse(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class SignalProcessRequest(_message.Message):
    __slots__ = ("container_id", "exec_id", "signal", "all")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    exec_id: str
    signal: int
    all: bool
    def __init__(self, container_id: _Optional[str] = ..., exec_id: _Optional[str] = ..., signal: _Optional[int] = ..., all: _Optional[bool] = ...) -> None: ...

class PauseContainerRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class ResumeContainerRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class UpdateContainerRequest(_message.Message):
    __slots__ = ("container_id", "resources")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    resources: bytes
    def __init__(self, container_id: _Optional[str] = ..., resources: _Optional[bytes] = ...) -> None: ...

class WaitProcessRequest(_message.Message):
    __slots__ = ("container_id", "exec_id")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    exec_id: str
    def __init__(self, container_id: _Optional[str] = ..., exec_id: _Optional[str] = ...) -> None: ...

class WaitProcessResponse(_message.Message):
    __slots__ = ("exit_status", "oom_killed", "signal")
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    OOM_KILLED_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    exit_status: int
    oom_killed: bool
    signal: int
    def __init__(self, exit_status: _Optional[int] = ..., oom_killed: _Optional[bool] = ..., signal: _Optional[int] = ...) -> None: ...

class RemoveContainerRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class TtyWinResizeRequest(_message.Message):
    __slots__ = ("container_id", "exec_id", "rows", "columns")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    exec_id: str
    rows: int
    columns: int
    def __init__(self, container_id: _Optional[str] = ..., exec_id: _Optional[str] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ...) -> None: ...

class CloseStdinRequest(_message.Message):
    __slots__ = ("container_id", "exec_id")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    exec_id: str
    def __init__(self, container_id: _Optional[str] = ..., exec_id: _Optional[str] = ...) -> None: ...

class StatsContainerRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class StatsContainerResponse(_message.Message):
    __slots__ = ("cpu", "memory", "pids", "io", "hugetlb")
    CPU_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    IO_FIELD_NUMBER: _ClassVar[int]
    HUGETLB_FIELD_NUMBER: _ClassVar[int]
    cpu: CpuStats
    memory: MemoryStats
    pids: PidsStats
    io: _containers.RepeatedCompositeFieldContainer[IoStats]
    hugetlb: _containers.RepeatedCompositeFieldContainer[HugetlbStats]
    def __init__(self, cpu: _Optional[_Union[CpuStats, _Mapping]] = ..., memory: _Optional[_Union[MemoryStats, _Mapping]] = ..., pids: _Optional[_Union[PidsStats, _Mapping]] = ..., io: _Optional[_Iterable[_Union[IoStats, _Mapping]]] = ..., hugetlb: _Optional[_Iterable[_Union[HugetlbStats, _Mapping]]] = ...) -> None: ...

class CpuStats(_message.Message):
    __slots__ = ("usage_usec", "user_usec", "system_usec", "periods", "throttled_periods", "throttled_usec")
    USAGE_USEC_FIELD_NUMBER: _ClassVar[int]
    USER_USEC_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_USEC_FIELD_NUMBER: _ClassVar[int]
    PERIODS_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_PERIODS_FIELD_NUMBER: _ClassVar[int]
    THROTTLED_USEC_FIELD_NUMBER: _ClassVar[int]
    usage_usec: int
    user_usec: int
    system_usec: int
    periods: int
    throttled_periods: int
    throttled_usec: int
    def __init__(self, usage_usec: _Optional[int] = ..., user_usec: _Optional[int] = ..., system_usec: _Optional[int] = ..., periods: _Optional[int] = ..., throttled_periods: _Optional[int] = ..., throttled_usec: _Optional[int] = ...) -> None: ...

class MemoryStats(_message.Message):
    __slots__ = ("usage_bytes", "limit_bytes", "peak_bytes", "swap_bytes", "stat", "oom_events", "oom_kills", "swap_limit_bytes")
    class StatEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    USAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    OOM_EVENTS_FIELD_NUMBER: _ClassVar[int]
    OOM_KILLS_FIELD_NUMBER: _ClassVar[int]
    SWAP_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    usage_bytes: int
    limit_bytes: int
    peak_bytes: int
    swap_bytes: int
    stat: _containers.ScalarMap[str, int]
    oom_events: int
    oom_kills: int
    swap_limit_bytes: int
    def __init__(self, usage_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., swap_bytes: _Optional[int] = ..., stat: _Optional[_Mapping[str, int]] = ..., oom_events: _Optional[int] = ..., oom_kills: _Optional[int] = ..., swap_limit_bytes: _Optional[int] = ...) -> None: ...

class PidsStats(_message.Message):
    __slots__ = ("current", "limit", "failures")
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    current: int
    limit: int
    failures: int
    def __init__(self, current: _Optional[int] = ..., limit: _Optional[int] = ..., failures: _Optional[int] = ...) -> None: ...

class IoStats(_message.Message):
    __slots__ = ("major", "minor", "read_bytes", "write_bytes", "reads", "writes")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., read_bytes: _Optional[int] = ..., write_bytes: _Optional[int] = ..., reads: _Optional[int] = ..., writes: _Optional[int] = ...) -> None: ...

class HugetlbStats(_message.Message):
    __slots__ = ("page_size", "usage_bytes", "limit_bytes", "failures")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    USAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    page_size: str
    usage_bytes: int
    limit_bytes: int
    failures: int
    def __init__(self, page_size: _Optional[str] = ..., usage_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., failures: _Optional[int] = ...) -> None: ...

class ListProcessesRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class ListProcessesResponse(_message.Message):
    __slots__ = ("pids", "processes")
    PIDS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    pids: _containers.RepeatedScalarFieldContainer[int]
    processes: _containers.RepeatedCompositeFieldContainer[ProcessInfo]
    def __init__(self, pids: _Optional[_Iterable[int]] = ..., processes: _Optional[_Iterable[_Union[ProcessInfo, _Mapping]]] = ...) -> None: ...

class ProcessInfo(_message.Message):
    __slots__ = ("pid", "container_pid", "uid", "command", "exec_id")
    PID_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    container_pid: int
    uid: int
    command: str
    exec_id: str
    def __init__(self, pid: _Optional[int] = ..., container_pid: _Optional[int] = ..., uid: _Optional[int] = ..., command: _Optional[str] = ..., exec_id: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("exit", "oom")
    EXIT_FIELD_NUMBER: _ClassVar[int]
    OOM_FIELD_NUMBER: _ClassVar[int]
    exit: ExitEvent
    oom: OomEvent
    def __init__(self, exit: _Optional[_Union[ExitEvent, _Mapping]] = ..., oom: _Optional[_Union[OomEvent, _Mapping]] = ...) -> None: ...

class ExitEvent(_message.Message):
    __slots__ = ("container_id", "exec_id", "exit_status")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    exec_id: str
    exit_status: int
    def __init__(self, container_id: _Optional[str] = ..., exec_id: _Optional[str] = ..., exit_status: _Optional[int] = ...) -> None: ...

class OomEvent(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...
