"""Files that torch.save wrote, read without running anything that they name.

A pickle is a program, and may call whatever it can name. Here it can name what `_Reader.find_class`
gives: data types, and inert stand-ins that keep what they are given. Any other name ends the
reading. Tensors stay on disk, memory-mapped.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.lazy import Lazy

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_SETTINGS = 1_000_000
_LOCAL_HEADER, _LOCAL_HEADER_BYTES = b"PK\x03\x04", 30

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}
_BUILTINS = {each.__name__: each for each in (dict, list, set, tuple, int, float, bool, complex)}
_BUILTINS["long"] = int  # Python 2's, which protocol 2 names


class Inert:
    """In place of an object of another program: what it was made of, and its attributes."""

    def __init__(self, *made_of: Any, **named: Any) -> None:
        """Keep the arguments."""
        self.made_of, self.named = made_of, named

    def __setstate__(self, state: Any) -> None:
        """Keep a dictionary as attributes, anything else whole."""
        values = state if isinstance(state, dict) else {"state": state}
        self.__dict__.update({str(name): value for name, value in values.items()})

    def append(self, _: Any) -> None:
        """Items of a stand-in for a list are left out."""

    def extend(self, _: Any) -> None:
        """As append."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """As append."""


class _Namespace(Inert):
    """In place of argparse's: attributes alone."""


class _Enum(Inert):
    """In place of a member of an enumeration: its value."""


# Whole modules of which every name is inert: settings of metaseq, and what numpy made of an array.
_INERT_NAMES = {
    "argparse.Namespace": _Namespace,
    "typing.Any": Inert,
    "torch.device": Inert,
    "torch.Size": tuple,
    "_codecs.encode": Inert,
    "copyreg._reconstructor": lambda kind, *_: kind() if kind in (Inert, _Namespace) else Inert(),
    "builtins.slice": Inert,
    "builtins.object": Inert,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "numpy.dtype": Inert,
    "numpy.ndarray": Inert,
    "metaseq.data.document_to_sequence.LockingArray": Inert,
}
_INERT_MODULES = {
    "omegaconf.base": Inert,
    "omegaconf.dictconfig": Inert,
    "omegaconf.listconfig": Inert,
    "omegaconf.nodes": Inert,
    "numpy.core.multiarray": Inert,
    "numpy._core.multiarray": Inert,
    "metaseq.dataclass.constants": _Enum,
}
# Packages of which every name is: what a trainer keeps beside the weights.
_INERT_PACKAGES = ("pytorch_lightning", "lightning")
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _Storage:
    """Where a run of numbers lies in the file; the offset may become known later."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.dtype, self.size = dtype, size
        self.offset: int | None = None


# Python's own, not C's: that one reserves as much memory as the highest number of a memo asks for.
class _Reader(pickle._Unpickler):
    def __init__(self, file: IO[bytes], owner: "TorchFile") -> None:
        super().__init__(file, encoding="latin1")
        self._owner = owner

    def find_class(self, module: str, name: str) -> Any:
        module = _OLD_MODULES.get(module, module)
        whole = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if whole in _DTYPES:
            return _DTYPES[whole]
        if whole in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._owner.tensor
        if whole == "torch._utils._rebuild_parameter":
            return lambda data, *_: data
        if module == "builtins" and name in _BUILTINS:
            return _BUILTINS[name]
        found = _INERT_NAMES.get(whole, _INERT_MODULES.get(module))
        if module.split(".")[0] in _INERT_PACKAGES:
            found = Inert
        if found is None or "." in name:
            raise UsageError(
                f"{self._owner.path} names {whole}, which no checkpoint of weights needs: it is"
                " refused, and nothing of it was run"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(size) is not int:
            raise ValueError(f"unknown reference {pid!r}")
        return self._owner.storage(str(key), dtype, size)


class TorchFile:
    """One file: `values` as it was saved, a :class:`Lazy` in place of each tensor."""

    def __init__(self, path: Path) -> None:
        """Read all but the tensors of `path`.

        Raises:
            UsageError: it is no such file, is damaged, or names what is not on the list.
        """
        self.path = Path(path)
        self._bytes = self.path.stat().st_size
        self._storages: dict[str, _Storage] = {}
        self._map: Tensor | None = None
        try:
            is_zip = zipfile.is_zipfile(self.path)
            self.values: Any = self._read_zip() if is_zip else self._read_legacy()
        except UsageError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # a pickle can go wrong in every way there is
            raise UsageError(
                f"{self.path} is no file of torch.save, or is damaged"
                f" ({type(error).__name__}: {error}): copy it again"
            ) from error

    def storage(self, key: str, dtype: torch.dtype, size: int) -> _Storage:
        """The storage of a key, one object however often it is named."""
        return self._storages.setdefault(key, _Storage(dtype, size))

    def tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> Lazy:
        """A view of a storage; of nothing that lies outside of it."""
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        count = math.prod(shape)
        if min((offset, *shape, *stride)) < 0 or (count and reach >= storage.size):
            raise ValueError("a tensor reaches beyond its numbers")
        if count > storage.size:
            raise ValueError("a tensor has more numbers than are stored")
        return Lazy(
            shape=shape,
            dtype=storage.dtype,
            read=lambda: self._view(storage, offset, shape, stride),
            cut=lambda start, stop: self._view(
                storage, offset + start * stride[0], (stop - start, *shape[1:]), stride
            ),
        )

    def _view(self, storage: _Storage, offset: int, shape: Any, stride: Any) -> Tensor:
        if self._map is None:
            self._map = torch.from_file(
                str(self.path), shared=False, size=self._bytes, dtype=torch.uint8
            )
        if not math.prod(shape):
            return torch.empty(shape, dtype=storage.dtype)
        assert storage.offset is not None
        size = storage.dtype.itemsize
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        start = storage.offset + offset * size
        raw = self._map[start : start + reach * size]
        if start % size:
            raw = raw.clone()  # not aligned, as in files of before 2020
        return raw.view(storage.dtype).as_strided(shape, stride)

    def _read_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            (pickled,) = [n for n in archive.namelist() if n.split("/", 1)[-1] == "data.pkl"]
            root = pickled[: -len("data.pkl")]
            order = f"{root}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("it was written on a big-endian machine")
            with archive.open(pickled) as file:
                values = _Reader(file, self).load()
            with self.path.open("rb") as raw:
                for key, storage in self._storages.items():
                    info = archive.getinfo(f"{root}data/{key}")
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("its tensors are compressed")
                    self._place(storage, self._start_of(info, raw), info.file_size)
        return values

    def _start_of(self, info: zipfile.ZipInfo, raw: IO[bytes]) -> int:
        raw.seek(info.header_offset)
        header = raw.read(_LOCAL_HEADER_BYTES)
        if header[:4] != _LOCAL_HEADER:
            raise ValueError(f"entry {info.filename} is not where it should be")
        name, extra = struct.unpack("<HH", header[26:30])
        return info.header_offset + _LOCAL_HEADER_BYTES + name + extra

    def _read_legacy(self) -> Any:
        """The form before torch 1.6: pickles, then each storage after its length."""
        with self.path.open("rb") as file:
            if _Reader(file, self).load() != _LEGACY_MAGIC:
                raise ValueError("it begins with no mark of torch.save")
            for _ in range(2):
                _Reader(file, self).load()  # protocol, and sizes of C's types
            values = _Reader(file, self).load()
            for key in _Reader(file, self).load():
                storage = self._storages[key]
                (size,) = struct.unpack("<q", file.read(8))
                self._place(storage, file.tell(), size * storage.dtype.itemsize)
                file.seek(size * storage.dtype.itemsize, 1)
        return values

    def _place(self, storage: _Storage, offset: int, num_bytes: int) -> None:
        if num_bytes < storage.size * storage.dtype.itemsize or offset + num_bytes > self._bytes:
            raise ValueError("it is cut off")
        storage.offset = offset


def plain(value: Any) -> Any:
    """Settings as dictionaries, lists, strings and numbers, whatever class held them.

    Raises:
        ValueError: they are more than 1,000,000, where one that stands in several places counts in
            each.
        RecursionError: one holds itself.
    """
    return _plain(value, iter(range(_MOST_SETTINGS)))


def _plain(value: Any, left: Iterator[int]) -> Any:
    if next(left, None) is None:
        raise ValueError("too many settings")
    if isinstance(value, dict):
        return {str(_plain(name, left)): _plain(each, left) for name, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each, left) for each in value]
    if isinstance(value, _Enum):
        return _plain(value.made_of[0], left) if value.made_of else None
    if isinstance(value, _Namespace):
        kept = {k: v for k, v in vars(value).items() if k not in ("made_of", "named")}
        return _plain(kept, left)
    if isinstance(value, Inert):
        # omegaconf's containers keep `_content`, its leaves `_val`.
        return _plain(vars(value).get("_content", vars(value).get("_val")), left)
    return value
