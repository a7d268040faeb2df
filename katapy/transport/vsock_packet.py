"""The virtio-vsock packet header and its numbers (virtio 1.2, section 5.10)."""

from __future__ import annotations

import struct
from typing import Final

HOST_CID: Final = 2
STREAM: Final = 1

OP_REQUEST: Final = 1
OP_RESPONSE: Final = 2
OP_RST: Final = 3
OP_SHUTDOWN: Final = 4
OP_RW: Final = 5
OP_CREDIT_UPDATE: Final = 6
OP_CREDIT_REQUEST: Final = 7

# Flags of OP_SHUTDOWN: what the sender of the packet will not do any more.
SHUT_RECEIVE: Final = 1
SHUT_SEND: Final = 2
SHUT_BOTH: Final = SHUT_RECEIVE | SHUT_SEND

# src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt
HEADER: Final = struct.Struct("<QQIIIHHIII")
