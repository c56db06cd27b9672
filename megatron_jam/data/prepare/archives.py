"""Records of WebDataset .tar files."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

from megatron_jam.data.prepare.files import Part, Step, grouped, opened
from megatron_jam.data.prepare.records import START, BadRecord, Position, Record


def read_tar(part: Part, position: Position | None, num_records: int) -> Iterator[Step]:
    """Records of a WebDataset .tar: neighbouring files of one name up to the first dot."""
    return grouped(_records(part, position or START), num_records)


def _records(part: Part, begin: Position) -> Iterator[tuple[Record | BadRecord, Position]]:
    number = begin.number
    with opened(part.path) as stream:
        stream.seek(begin.offset)
        for first, fields, key, end in _files(part, stream, begin.offset):
            if part.stop is not None and first >= part.stop:
                return
            number += 1
            if first >= part.start:
                where = f"{part.path}: record {key!r}"
                yield Record(where, key, fields, str(part.path)), Position(end, number)


def _files(
    part: Part, stream: IO[bytes], offset: int
) -> Iterator[tuple[int, dict[str, bytes], str, int]]:
    """First byte, files by extension, key and end of each record; of those before the part's start
    the files are not read.

    Raises:
        BadRecord: the archive does not end as one does.
    """
    first, key, fields = offset, None, {}
    blocks = _LastBlock(stream)
    try:
        archive = tarfile.open(fileobj=blocks, mode="r:")  # noqa: SIM115
        # Asked once more where there is none, tarfile would seek back.
        member = archive.next() if archive.firstmember is not None else None
        while member is not None:
            archive.members.clear()  # else it grows with the file
            if member.isfile():
                name, extension = key_and_extension(member)
                if name != key:
                    if key is not None:
                        yield first, fields, key, member.offset
                    first, key, fields = member.offset, name, {}
                if first >= part.start and (part.stop is None or first < part.stop):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a plain file
                    fields[extension] = content.read()
            member = archive.next()
        if not blocks.is_mark:
            raise tarfile.ReadError("it has no end-of-archive mark")
    except tarfile.TarError as error:
        raise BadRecord(str(part.path), f"it is not a whole .tar file ({error})") from error
    if key is not None:
        yield first, fields, key, archive.offset


class _LastBlock:
    """A file for tarfile, which takes a damaged header for the end, that knows what was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.tell, self.seek = stream.tell, stream.seek
        self.is_mark = False
        """Whether it was the block of zeros at an archive's end."""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.is_mark = data == tarfile.NUL * tarfile.BLOCKSIZE
        return data


def key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    """A record's key and the file's extension: what is before the name's first dot, and behind."""
    path = PurePosixPath(member.name)
    name, _, extension = path.name.partition(".")
    return str(path.with_name(name)), extension.lower()
