"""Tar headers of the formats v7, ustar, GNU and pax; an invalid one is a `ValueError` and costs no memory."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

BLOCK = 512
"""Size of a tar's blocks in bytes; a member's content follows its header block."""

_MAX_BYTES = 1 << 18
"""Maximum size of a header with its extended headers, of which there may be `_MAX_EXTENDED`."""
_MAX_EXTENDED = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarHeader(NamedTuple):
    """Header of a member.

    Attributes:
        block: Header block, directly before the content.
        name: Name of the member.
        link: Target of a link.
        kind: Type flag.
        size: Size of the stored content in bytes.
        fault: Reason why the content cannot be read, completing the sentence 'a member that …'.
        begin: Offset of the content in the tar.
    """

    block: bytes
    name: str
    link: str
    kind: bytes
    size: int
    fault: str = ""
    begin: int = 0


def read_header(
    read_at: Callable[[int, int], bytes], tar_size: int, offset: int, *, is_strict: bool
) -> TarHeader:
    """Read the header of a member, with the extended headers before it.

    Args:
        read_at: Function that returns bytes from an offset and a length; only called with ``offset``, since
            what follows may be no header.
        tar_size: Size of the tar in bytes.
        offset: Offset of the first block.
        is_strict: Require the magic string, which old tars lack.

    Raises:
        ValueError: There is no valid header.
    """
    extended: dict[str, str] = {}
    end = offset

    def following(length: int) -> bytes:
        nonlocal end
        if end + length - offset > _MAX_BYTES or end + length > tar_size:
            raise ValueError("a header that is cut or too long")
        end += length
        return read_at(offset, end - offset)[-length:]

    for _ in range(_MAX_EXTENDED):
        block = following(BLOCK)
        header = _parsed_header(block, is_strict=is_strict)
        if header.kind not in b"LKxgX":
            is_extended = header.kind == b"S" and block[482]
            while is_extended:
                is_extended = following(BLOCK)[504]
            return _with_extended(header, extended)._replace(begin=end)
        content = following(-(-header.size // BLOCK) * BLOCK or BLOCK)
        extended |= _extended_entries(header.kind, content[: header.size])
    raise ValueError("too many extended headers")


def _parsed_header(block: bytes, *, is_strict: bool) -> TarHeader:
    """Parse a header block; a `ValueError` if it is invalid. ``is_strict`` requires the magic string."""
    for magic, kind in _COMPRESSED.items():
        if block.startswith(magic):
            raise ValueError(f"compressed with {kind}; unpack it first")
    excess = sum(block) - sum(block[148:156]) + 8 * ord(" ") - _number(block[148:156])
    # Some old programs add up signed bytes.
    is_valid = not excess or excess == 256 * sum(byte >= 128 for byte in block[:148] + block[156:])
    if not is_valid or (is_strict and block[257:262] != b"ustar"):
        raise ValueError("an invalid header")
    name = _decoded(block[:100])
    # Other formats than this one have times at the place of the prefix.
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_decoded(block[345:500])}/{name}"
    kind = block[156:157]
    fault = "" if kind in b"0\0007" else "is no regular file"
    size = 0 if kind in b"123456" else _number(block[124:136])
    return TarHeader(block, name, _decoded(block[157:257]), kind, size, fault)


def _with_extended(header: TarHeader, extended: Mapping[str, str]) -> TarHeader:
    """Apply the entries of extended headers; a `ValueError` if one is invalid."""
    size = header.size
    if "size" in extended and header.kind not in b"123456":
        if not re.fullmatch("[0-9]{1,18}", extended["size"]):
            raise ValueError("an invalid size")
        size = int(extended["size"])
    name = extended.get("GNU.sparse.name") or extended.get("path") or header.name
    if not name or "\0" in name:
        raise ValueError("an invalid name")
    # So v7 marks a folder.
    kind = b"5" if header.kind == b"\0" and name.endswith("/") else header.kind
    is_sparse = header.kind == b"S" or any(entry.startswith("GNU.sparse.") for entry in extended)
    fault = "is stored with holes (tar --sparse)" if is_sparse else header.fault
    link = extended.get("linkpath") or header.link
    return header._replace(name=name, link=link, kind=kind, size=size, fault=fault)


def _extended_entries(kind: bytes, content: bytes) -> dict[str, str]:
    """Parse the content of an extended header; a `ValueError` if it is invalid."""
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": _decoded(content)}
    entries: dict[str, str] = {}
    begin = 0
    while begin < len(content) and content[begin]:
        length = content[begin : begin + 8].partition(b" ")[0]
        end = begin + int(length) if length.isdigit() else 0
        record = content[begin + len(length) + 1 : end]
        if end > len(content) or not record.endswith(b"\n"):
            raise ValueError("an invalid extended header")
        name, _, value = record[:-1].partition(b"=")
        # A global header describes all members, and so has no name, link or size.
        if kind != b"g":
            entries[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        begin = end
    return entries


def _number(field: bytes) -> int:
    """Parse an octal or binary number of a header; a `ValueError` if it is invalid or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not re.fullmatch(b"[0-7]*", digits):
        raise ValueError("an invalid number")
    return int(digits or b"0", 8)


def _decoded(field: bytes) -> str:
    # surrogateescape: names may have any encoding.
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
