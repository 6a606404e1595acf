"""What is in the files of a folder: their names, and the hashes of their contents."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, UnsafeError

READERS = 4  # files that are hashed at a time
_CHUNK = 4 * 2**20


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative names of all files below a folder, sorted. Links and special files are refused: they lead elsewhere."""
    names: list[str] = []
    if not folder.exists():
        return names
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in folders + files:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                what = "expected plain files and folders, found a link or special file"
                raise UnsafeError(what, where=str(path), fix="Put the file itself there.")
            if path.is_file():
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _raise(error: OSError) -> None:
    """Of a folder that cannot be listed: by itself `os.walk` takes it for an empty one."""
    raise error


def check_hashes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError naming a file of a manifest's table whose content is not what was written."""

    def look(name: str) -> None:
        try:
            found = hash_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder / name)) from error
        if found != files[name]["sha256"]:
            what = "expected the content that was written, found a changed file"
            raise CheckpointError(what, where=str(folder / name))

    with ThreadPoolExecutor(max_workers=READERS) as pool:
        list(pool.map(look, files))
