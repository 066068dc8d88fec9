"""The outer form of a cubin, an ELF file of 64 bits. The driver trusts it: given one that is cut off, it crashes."""

from __future__ import annotations

import struct

from attncompile.core.errors import KernelError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_CUDA = 190
_NO_BITS = 8


def check(data: bytes) -> None:
    """Raise ``KernelError`` unless ``data`` is an ELF file for CUDA, all of whose parts lie inside it."""
    if len(data) < _HEADER.size or data[:5] != b"\x7fELF\x02":
        raise _bad("it is no ELF file")
    fields = _HEADER.unpack_from(data)
    machine, segments, sections = fields[2], fields[5], fields[6]
    segment_size, segment_count, section_size, section_count = fields[9:13]
    if machine != _CUDA:
        raise _bad("it is not for CUDA")
    if (segment_count and segment_size != _SEGMENT.size) or (section_count and section_size != _SECTION.size):
        raise _bad("its tables have another form")
    for start, size, count in ((segments, segment_size, segment_count), (sections, section_size, section_count)):
        _inside(data, start, size * count)
    for number in range(section_count):
        section = _SECTION.unpack_from(data, sections + number * section_size)
        if section[1] not in (0, _NO_BITS):
            _inside(data, section[4], section[5])
    for number in range(segment_count):
        segment = _SEGMENT.unpack_from(data, segments + number * segment_size)
        _inside(data, segment[2], segment[5])


def _inside(data: bytes, start: int, size: int) -> None:
    if start + size > len(data):
        raise _bad(f"it is cut off after {len(data)} bytes")


def _bad(reason: str) -> KernelError:
    return KernelError(f"the cubin is damaged: {reason}", "build the bundle again")
