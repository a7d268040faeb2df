"""Header compression: the examples of RFC 7541, and whatever else a peer may send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from katapy_agent.hpack import Decoder, HpackError, encode

SIZE = 16 << 10
DATE = "Mon, 21 Oct 2013 20:13:21 GMT"


def decode(decoder: Decoder, block: str) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in decoder.decode(bytes.fromhex(block), size_max=SIZE)}


FIRST = {":method": "GET", ":scheme": "http", ":path": "/", ":authority": "www.example.com"}
SECOND = {**FIRST, "cache-control": "no-cache"}
THIRD = {**FIRST, ":scheme": "https", ":path": "/index.html", "custom-key": "custom-value"}


@pytest.mark.parametrize(
    "blocks",
    [
        # Appendix C.3
        (
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ),
        # Appendix C.4, the same with Huffman codes
        (
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ),
    ],
)
def test_requests_of_the_rfc(blocks: tuple[str, ...]) -> None:
    decoder = Decoder()
    assert [decode(decoder, block) for block in blocks] == [FIRST, SECOND, THIRD]


def test_the_table_forgets_what_does_not_fit() -> None:
    """Appendix C.5: a table of 256 octets, to which the peer makes it smaller first."""
    decoder = Decoder()
    first = decode(
        decoder,
        "3fe101"
        "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
        "6e1768747470733a2f2f7777772e6578616d706c652e636f6d",
    )
    rest = {"cache-control": "private", "date": DATE, "location": "https://www.example.com"}
    assert first == {":status": "302", **rest}
    assert decode(decoder, "4803333037c1c0bf") == {":status": "307", **rest}
    with pytest.raises(HpackError, match="there is no entry 66"):
        decode(decoder, "c2")


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ("80", "no entry 0"),
        ("ff00", "no entry 127"),
        ("41", "ends too early"),
        ("410f7777", "ends too early"),
        ("ff", "ends too early"),
        ("ffffffffffff00", "too large"),
        ("3fe21f", "larger than was agreed"),
        ("8220", "in the middle of a block"),
        ("4101ff", None),
        ("418100", "not padded"),
        ("4184ffffffff", "its end in the middle"),
        ("4182f8ff", "not padded"),
    ],
)
def test_what_makes_no_sense_is_refused(block: str, text: str | None) -> None:
    if text is None:
        Decoder().decode(bytes.fromhex(block), size_max=SIZE)
        return
    with pytest.raises(HpackError, match=text):
        Decoder().decode(bytes.fromhex(block), size_max=SIZE)


def test_headers_are_bounded() -> None:
    """An index of one octet may stand for a header of 4 KiB."""
    large = encode([(b"x", b"y" * 4000)])
    decoder = Decoder()
    decoder.decode(b"\x40" + large[1:], size_max=SIZE)
    with pytest.raises(HpackError, match="larger than 16384"):
        decoder.decode(b"\xbe" * 5, size_max=SIZE)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=126), st.binary(max_size=500)), max_size=8))
def test_what_is_written_is_read(headers: list[tuple[bytes, bytes]]) -> None:
    assert Decoder().decode(encode(headers), size_max=1 << 20) == headers


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_nothing_else_comes_of_any_bytes(blocks: list[bytes]) -> None:
    decoder = Decoder()
    try:
        for block in blocks:
            decoder.decode(block, size_max=SIZE)
    except HpackError:
        pass
    assert decoder._size <= 4096
