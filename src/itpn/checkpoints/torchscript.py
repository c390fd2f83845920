"""The tensors of a TorchScript archive, without running the program that is in it.

`torch.jit.load` runs it: a module's ``__setstate__`` may write any file.
"""

import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
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
}


class _Module:
    """Stands for a module of whatever class: its attributes are all that is kept."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def read_script(path: str) -> dict[str, Tensor]:
    """Tensors of the modules by name, as ``torch.jit.load(path).state_dict()`` has them, and other tensor attributes.

    Raises:
        pickle.UnpicklingError, ValueError, KeyError, ...: corrupt, or not written by torch.jit.save.
    """
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(_stored(archive, pickled)) as file:
            root = _Unpickler(file, archive, pickled.removesuffix("data.pkl")).load()  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}
    left: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while left:
        prefix, module = left.pop()
        if id(module) in seen or not isinstance(module.attributes, dict):
            continue
        seen.add(id(module))
        for name, value in module.attributes.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                left.append((f"{prefix}{name}.", value))
    return found


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member as torch stores it: not compressed, so that it is no larger than the file."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return info


class _Unpickler(pickle.Unpickler):
    """Makes tensors, plain data and :class:`_Module`; no other class or function can be named."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch.jit._pickle":  # build_intlist, restore_type_tag and the like: marks of types
            return lambda value, *_: value
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")

    def persistent_load(self, reference: Any) -> torch.storage.TypedStorage:
        kind, dtype, key, _, _ = reference
        if kind != "storage":
            raise pickle.UnpicklingError(f"a reference to a {kind}")
        if key not in self.storages:
            content = self.archive.read(_stored(self.archive, f"{self.folder}data/{key}"))
            flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
            self.storages[key] = flat.untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=self.storages[key], dtype=DTYPES[dtype], _internal=True)
