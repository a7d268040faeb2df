"""Header compression of HTTP/2 (RFC 7541): reading what a peer compressed, and writing without compression.

A decoder belongs to one connection: what it reads changes its table. Nothing here knows of frames.
"""

from __future__ import annotations

from typing import Final

Header = tuple[bytes, bytes]

TABLE_SIZE: Final = 4096
"""The size of the dynamic table that a peer may use, in octets of section 4.1."""
_ENTRY_OVERHEAD: Final = 32
_INTEGER_MAX: Final = 1 << 24
# Appendix A; a value follows its name after "=".
_STATIC: Final[tuple[Header, ...]] = tuple(
    (name, value)
    for name, _, value in (
        entry.partition(b"=")
        for entry in (
            b":authority|:method=GET|:method=POST|:path=/|:path=/index.html|:scheme=http|:scheme=https|:status=200|"
            b":status=204|:status=206|:status=304|:status=400|:status=404|:status=500|accept-charset|"
            b"accept-encoding=gzip, deflate|accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|"
            b"authorization|cache-control|content-disposition|content-encoding|content-language|content-length|"
            b"content-location|content-range|content-type|cookie|date|etag|expect|expires|from|host|if-match|"
            b"if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|link|location|max-forwards|"
            b"proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|server|set-cookie|"
            b"strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate"
        ).split(b"|")
    )
)
# Appendix B: the length in bits of each octet's code and of the one that ends a string; the codes follow from these,
# shortest first and equal ones in order.
_CODE_BITS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b080606060505"
    "050606060606060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e060f050605"
    "06050606060507070606060506070605050607070707070f0b0e0d1c14161414161616171617171717171817181816171817"
    "1717171516171617171816151416161717151716161815161717151516151716171714161616171616171a1a141316171619"
    "1a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c"
    "1b1b1b1b1b1a1e"
)
_END: Final = 256


class HpackError(Exception):
    """A header block that makes no sense: the connection cannot go on (COMPRESSION_ERROR)."""


class Decoder:
    """Reads header blocks, in the order in which they came."""

    def __init__(self) -> None:
        self._table: list[Header] = []  # the newest first
        self._size = 0
        self._limit = TABLE_SIZE

    def decode(self, block: bytes, *, size_max: int) -> list[Header]:
        """Return the headers of a block. Raises HpackError, also where they take more than ``size_max`` octets."""
        headers: list[Header] = []
        size = position = 0
        try:
            while position < len(block):
                first = block[position]
                if first & 0x80:  # 6.1, indexed
                    index, position = _integer(block, position, 7)
                    header = self._entry(index)
                elif first & 0xE0 == 0x20:  # 6.3, a new size of the table
                    self._limit, position = _integer(block, position, 5)
                    if headers:  # 4.2
                        raise HpackError("the table changes its size in the middle of a block")
                    if self._limit > TABLE_SIZE:
                        raise HpackError("the table is larger than was agreed")
                    self._evict()
                    continue
                else:  # 6.2, literal: indexed from now on, or not
                    indexed = first & 0xC0 == 0x40
                    index, position = _integer(block, position, 6 if indexed else 4)
                    name = self._entry(index)[0] if index else b""
                    if not index:
                        name, position = _string(block, position)
                    value, position = _string(block, position)
                    header = (name, value)
                    if indexed:
                        self._add(header)
                size += len(header[0]) + len(header[1]) + _ENTRY_OVERHEAD
                if size > size_max:
                    raise HpackError(f"the headers are larger than {size_max} octets")
                headers.append(header)
        except IndexError:
            raise HpackError("the block ends too early") from None
        return headers

    def _entry(self, index: int) -> Header:
        if not 0 < index <= len(_STATIC) + len(self._table):
            raise HpackError(f"there is no entry {index}")
        return _STATIC[index - 1] if index <= len(_STATIC) else self._table[index - len(_STATIC) - 1]

    def _add(self, header: Header) -> None:
        self._table.insert(0, header)
        self._size += len(header[0]) + len(header[1]) + _ENTRY_OVERHEAD
        self._evict()

    def _evict(self) -> None:
        while self._size > self._limit:
            name, value = self._table.pop()
            self._size -= len(name) + len(value) + _ENTRY_OVERHEAD


def encode(headers: list[Header]) -> bytes:
    """Return a block of headers that leaves the peer's table alone, with names of less than 127 octets."""
    block = bytearray()
    for name, value in headers:
        block += b"\0" + bytes((len(name),)) + name
        length = len(value)
        if length < 0x7F:
            block.append(length)
        else:
            block.append(0x7F)
            length -= 0x7F
            while length >= 0x80:
                block.append(length & 0x7F | 0x80)
                length >>= 7
            block.append(length)
        block += value
    return bytes(block)


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    """Return an integer with a prefix of ``bits`` (5.1) and where it ends."""
    mask = (1 << bits) - 1
    value = block[position] & mask
    position += 1
    if value < mask:
        return value, position
    shift = 0
    while True:
        octet = block[position]
        position += 1
        value += (octet & 0x7F) << shift
        if value > _INTEGER_MAX or shift > 28:
            raise HpackError("a number is too large")
        if not octet & 0x80:
            return value, position
        shift += 7


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    compressed = block[position] & 0x80
    length, position = _integer(block, position, 7)
    end = position + length
    if end > len(block):
        raise IndexError
    data = block[position:end]
    return (_expand(data) if compressed else data), end


_codes: dict[tuple[int, int], int] = {}


def _expand(data: bytes) -> bytes:
    """Return what Huffman codes stand for (5.2)."""
    if not _codes:
        _fill_codes()
    out = bytearray()
    code = bits = 0
    for octet in data:
        for shift in range(7, -1, -1):
            code = code << 1 | octet >> shift & 1
            bits += 1
            symbol = _codes.get((bits, code))
            if symbol is not None:
                if symbol == _END:
                    raise HpackError("a string has its end in the middle")
                out.append(symbol)
                code = bits = 0
    # What is left is the beginning of the end's code, which is ones.
    if bits > 7 or code != (1 << bits) - 1:
        raise HpackError("a string is not padded as it should be")
    return bytes(out)


def _fill_codes() -> None:
    code = length = 0
    for symbol in sorted(range(len(_CODE_BITS)), key=lambda symbol: (_CODE_BITS[symbol], symbol)):
        code <<= _CODE_BITS[symbol] - length
        length = _CODE_BITS[symbol]
        _codes[length, code] = symbol
        code += 1
