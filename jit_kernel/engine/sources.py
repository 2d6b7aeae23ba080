"""Where a kernel's own sources lie: a folder, or texts by name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jit_kernel.engine import packages

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, init=False)
class Sources:
    """A folder of C++, CUDA or Triton sources, or the texts themselves; and the name of their kernels in the store.

    An entry's key covers the bytes of those files that its unit includes, directly or not, by names below the folder:
    two machines, or two places of one, share their kernels. The sources may include `jit_kernel/*` headers.
    package: the one by which a profile names the folder; "" for a folder or texts that were given.
    """

    folder: str
    text: tuple[tuple[str, str], ...]
    name: str
    package: str = field(default="", compare=False, repr=False)

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, text: Mapping[str, str] | None = None, name: str = ""
    ) -> None:
        """Either `folder`, or `text`: each file's text by its name, "a.cuh" or "folder/a.cuh".

        name: of the kernels' folder in the store; without one, the folder's own name, or "text". Raises TypeError and
        ValueError for anything else.
        """
        if (folder is None) == (text is None):
            raise TypeError(f"Sources takes a folder or text=; it got {'none' if text is None else 'both'}")
        found = ""
        if folder is not None:
            found = os.path.realpath(folder)
            if not os.path.isdir(found):
                raise ValueError(f"folder is {os.fspath(folder)!r}; it must be a folder that is there")
        texts = _checked(text) if text is not None else ()
        chosen = name or re.sub(r"[^\w.-]", "_", Path(found).name if found else "text", flags=re.ASCII) or "sources"
        if not _NAME.fullmatch(chosen):
            raise ValueError(f"name is {chosen!r}; it must be letters, digits, and _ . - inside")
        object.__setattr__(self, "folder", found)
        object.__setattr__(self, "text", texts)
        object.__setattr__(self, "name", chosen)
        object.__setattr__(self, "package", "")

    @classmethod
    def of_package(cls, package: str, way: str, name: str) -> Sources:
        """The folder that lies in an installed package, wherever that is here. Raises ValueError without one."""
        found = cls(packages.folder_of(package, way), name=name)
        object.__setattr__(found, "package", package)
        return found

    def read(self, name: str) -> bytes | None:
        """The bytes of a file by its name below the folder, or of a text; None without one."""
        if not self.folder:
            found = dict(self.text).get(name)
            return None if found is None else found.encode()
        path = f"{self.folder}/{name}"
        if not os.access(path, os.F_OK):  # a failed open costs ten times as much
            return None
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except IsADirectoryError:
            return None

    def __str__(self) -> str:
        return self.folder or f"the texts {', '.join(name for name, _ in self.text)}"


def _checked(text: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    for name, value in text.items():
        if not isinstance(name, str) or not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise ValueError(f"text has a file named {name!r}; it must be a file's name, with folders before it or not")
        if not isinstance(value, str):
            raise TypeError(f"text[{name!r}] is of type {type(value).__name__}; it must be a str")
    return tuple(sorted(text.items()))
