"""Pictures that records of another file name."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.archives import key_and_extension
from megatron_jam.data.prepare.pictures import IMAGE_EXTENSIONS
from megatron_jam.data.prepare.records import BadRecord, Record


class PictureStore:
    """Picture files by name, in folders and in .tar files, of which only the table is held."""

    def __init__(self, sources: Sequence[str | Path]) -> None:
        """Look through `sources`.

        Raises:
            UsageError: one is neither a folder nor a whole .tar, or two have a picture of one name.
        """
        self._sources = [str(each) for each in sources]
        self._places: dict[str, tuple[str, int, int]] = {}
        self._folders = [Path(each) for each in sources if Path(each).is_dir()]
        for each in sources:
            if not Path(each).is_dir():
                for name, place in _table(Path(each)):
                    if self._places.setdefault(name, place) != place:
                        raise UsageError(f"{each} has a second picture {name!r}")

    def read(self, name: str, record: Record) -> bytes:
        """The content of the picture file that `record` names: a .tar's key or a file's name.

        Raises:
            BadRecord: there is none.
        """
        if name in self._places:
            path, offset, size = self._places[name]
            with open(path, "rb") as stream:
                stream.seek(offset)
                return stream.read(size)
        for folder in self._folders:
            # A name such as ../../x would lead out of the folder.
            if ".." not in PurePosixPath(name).parts and (folder / name).is_file():
                return (folder / name).read_bytes()
        where = ", ".join(self._sources) or "no file of pictures was named: it"
        raise BadRecord(record.where, f"{where} has no image {name!r}")


def _table(path: Path) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Key, and path, offset and size, of each picture in a .tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()
                key, extension = key_and_extension(member)
                if member.isfile() and extension in IMAGE_EXTENSIONS:
                    yield key, (str(path), member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(f"{path} is neither a folder nor a whole .tar ({error})") from error
