"""Models that bring Python code of their own: run only where the command line names the model and what its code is.

`--trust-code MODEL@REVISION`: of a hub id the commit (40 hexadecimal digits), which the recipe's `revision` must name
too; of a local folder the hash of its Python files. No recipe can ask for it. Without torch: refused before imports.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import RecipeError, UnsafeError

_COMMIT, _HASH = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_TRUSTED: dict[str, str] = {}  # a registry: of this process's command line


def trust_only(options: Sequence[str]) -> None:
    """Take over what `--trust-code` says, in place of what was said before."""
    found = dict(_parsed(text) for text in options)
    _TRUSTED.clear()
    _TRUSTED.update(found)


def _parsed(text: str) -> tuple[str, str]:
    model, at, revision = text.rpartition("@")
    is_local = Path(model).expanduser().is_dir()
    if not at or not model or not (_HASH if is_local else _COMMIT).fullmatch(revision):
        wanted = "the hash of a folder's code (64 digits)" if is_local else "a commit (40 digits)"
        raise RecipeError(
            f"expected MODEL@REVISION with {wanted}, found {text!r}",
            where="--trust-code",
            fix="A branch or tag can be moved to other code. Without the option, the refusal tells a folder's hash.",
        )
    return _name(model), revision


def _name(source: str) -> str:
    """How a model is known: a folder by its place, a hub id by itself."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def trusted_revision(source: str) -> str | None:
    """What the command line trusts of a model, None where it does not name it."""
    name = _name(source)
    return _TRUSTED[name] if name in _TRUSTED else None


def code_hash(folder: Path) -> str:
    """SHA-256 over names and contents of all Python files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def may_run_code(source: str, revision: str | None, config: dict[str, Any], where: str) -> bool:
    """Whether a configuration asks for code (`auto_map`) that the command line trusts; UnsafeError where it does not.

    False: no code is asked for, and none is to be run.
    """
    asked = config.get("auto_map")
    if not asked:
        return False
    refuse_other_models(source, asked, where)
    folder, trusted = Path(source).expanduser(), trusted_revision(source)
    found = code_hash(folder) if folder.is_dir() else revision
    if trusted is None:
        option = f"--trust-code {source}@{found or 'COMMIT'}" if folder.is_dir() else f"--trust-code {source}@COMMIT"
        raise UnsafeError(
            "expected a model that transformers knows, found auto_map: it would run code from the model's folder",
            where=where,
            fix=f"If you have read its code and trust it, add: {option}"
            + ("" if folder.is_dir() else ", and the same commit as `revision` in the recipe."),
        )
    if found != trusted:
        told = "the code that --trust-code names" if folder.is_dir() else "the revision that --trust-code names"
        raise UnsafeError(
            f"expected {told} ({trusted}), found {found or 'no revision in the recipe'}",
            where=where,
            fix="Read what has changed; nothing of it was run.",
        )
    return True


def refuse_other_models(source: str, asked: Any, where: str) -> None:
    """`other/model--file.Class` takes the code from another model, which nobody has named."""
    for name in _names(asked):
        other, marked, _ = name.rpartition("--")
        if marked and other != source:
            raise UnsafeError(
                f"expected code of this model, found that of {other}",
                where=f"{where}: auto_map",
                fix="Make a local copy of both, with the code in the model's own folder.",
            )


def _names(asked: Any) -> Iterable[str]:
    for value in asked.values() if isinstance(asked, dict) else [asked]:
        yield from (str(name) for name in (value if isinstance(value, list) else [value]) if name)
