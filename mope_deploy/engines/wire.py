"""Protobuf's wire format, read field by field from a file: no recursion, no payload that nobody asks for.

A message is a row of fields, each a number, a wire type and a value; a message inside another is a payload of a stated
length. Whoever knows the schema says which payloads are messages, so nesting is as deep as that code and no deeper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["LENGTH", "VARINT", "Damaged", "Wire"]

VARINT, LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}  # wire type → bytes
_CHUNK = 2**14
_MOST_BITS = 63  # a varint has at most ten bytes


class Damaged(Exception):
    """These bytes are no such message; the text says why."""


class Wire:
    """A file of fields.

    Args:
        file: open for reading, at its beginning.
        size: its length in bytes.
        most_fields: how many there may be of them, everything that is asked for counted: what bounds the time.
    """

    def __init__(self, file: BinaryIO, size: int, *, most_fields: int) -> None:
        self.size = size
        self._file, self._left = file, most_fields
        self._buffer, self._start, self._at = b"", 0, 0  # bytes of the file from _start on, _at of them read

    @property
    def position(self) -> int:
        return self._start + self._at

    def fields(self, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, wire type, value) of each field up to position ``end``.

        The value of :data:`LENGTH` is where its payload ends; it begins at :attr:`position`. What the caller does not
        read of it is skipped.

        Raises:
            Damaged: they do not end there, or are none.
        """
        while self._start + self._at < end:
            self._left -= 1
            if self._left < 0:
                raise Damaged("it has too many fields")
            tag = self._varint()
            number, kind = tag >> 3, tag & 7
            if number == 0:
                raise Damaged(f"no field begins at byte {self.position:,}")
            if kind == VARINT:
                yield number, kind, self._varint()
                continue
            if kind == LENGTH:
                value = self._varint()
            elif kind in _FIXED:
                value = _FIXED[kind]
            else:
                raise Damaged(f"wire type {kind} at byte {self.position:,}")
            stop = self._start + self._at + value
            if stop > end:
                raise Damaged(f"a field ends at byte {stop:,} and what holds it at {end:,}")
            yield number, kind, stop
            self._seek(stop)
        if self.position != end:
            raise Damaged(f"a field ends at byte {self.position:,} and what holds it at {end:,}")

    def read(self, end: int, *, most: int) -> bytes:
        """The payload up to ``end``, at most ``most`` bytes of it."""
        wanted, found = min(end - self.position, most), b""
        while len(found) < wanted:
            if self._at == len(self._buffer):
                self._fill()
            taken = self._buffer[self._at : self._at + wanted - len(found)]
            found, self._at = found + taken, self._at + len(taken)
        return found

    def _varint(self) -> int:
        if self._at < len(self._buffer) and (byte := self._buffer[self._at]) < 0x80:  # nearly always
            self._at += 1
            return byte
        value = shift = 0
        while True:
            if self._at == len(self._buffer):
                self._fill()
            byte = self._buffer[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > _MOST_BITS:
                raise Damaged(f"a number without an end at byte {self.position:,}")

    def _seek(self, position: int) -> None:
        if self._start <= position <= self._start + len(self._buffer):
            self._at = position - self._start
        else:
            self._file.seek(position)
            self._buffer, self._start, self._at = b"", position, 0

    def _fill(self) -> None:
        self._start += len(self._buffer)
        self._buffer, self._at = self._file.read(_CHUNK), 0
        if not self._buffer:
            raise Damaged(f"it is cut short at byte {self._start:,}")
