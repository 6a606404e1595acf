"""Files of torch.save by which somebody may try to run code: each makes a folder where it succeeds."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import torch


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def rewritten(file: Path, content: bytes, *, twice: bool = False) -> None:
    """A whole archive of torch.save with another pickle in it, or with both."""
    torch.save({"a": torch.ones(2)}, file)
    old = file.with_suffix(".old")
    file.rename(old)
    with zipfile.ZipFile(old) as read, zipfile.ZipFile(file, "w") as write:
        for name in read.namelist():
            inner = read.read(name)
            if name.endswith("/data.pkl"):
                if twice:
                    write.writestr(name, inner)
                write.writestr(name, content)
            else:
                write.writestr(name, inner)
    old.unlink()


def plain(file: Path, mark: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Harmful(mark)}, file)


def legacy(file: Path, mark: Path) -> None:
    torch.save({"b": Harmful(mark)}, file, _use_new_zipfile_serialization=False)


def bare(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Harmful(mark)))


def tar(file: Path, mark: Path) -> None:
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Harmful(mark))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def duplicate(file: Path, mark: Path) -> None:
    """Torch reads the second of two entries of one name."""
    rewritten(file, pickle.dumps(Harmful(mark), protocol=2), twice=True)


def nested(file: Path, mark: Path) -> None:
    inner = pickle.dumps(Harmful(mark))
    call = b"\x80\x02cpickle\nloads\n" + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    rewritten(file, call)


def stack_global(file: Path, mark: Path) -> None:
    rewritten(file, b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + text(str(mark)) + b"\x85R.")


def by_memo(file: Path, mark: Path) -> None:
    """The names reach the stack from the memo: a reader that looks at opcodes alone does not see them together."""
    names = text("mkdir") + b"q\x05" + b"0" + text("os") + b"q\x06" + b"0"
    rewritten(file, b"\x80\x04" + names + b"h\x06h\x05\x93" + text(str(mark)) + b"\x85R.")


def inst(file: Path, mark: Path) -> None:
    rewritten(file, b"(" + b"S" + repr(str(mark)).encode() + b"\n" + b"ios\nmkdir\n.")


def obj(file: Path, mark: Path) -> None:
    rewritten(file, b"(cos\nmkdir\n" + text(str(mark)) + b"o.")


def newobj(file: Path, mark: Path) -> None:
    rewritten(file, b"\x80\x02cbuiltins\neval\n" + text(f"__import__('os').mkdir({str(mark)!r})") + b"\x85\x81.")


def build(file: Path, mark: Path) -> None:
    """State for an object of an inert class that hides a call."""
    call = b"cos\nmkdir\n" + text(str(mark)) + b"\x85R"
    head = b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n" + b"G" + struct.pack(">d", 1.0) + b"\x85R"
    rewritten(file, head + b"}" + text("x") + call + b"sb.")


def extension(file: Path, mark: Path) -> None:
    rewritten(file, b"\x80\x02\x82\x01.")


def persistent(file: Path, mark: Path) -> None:
    """A storage whose type is a call."""
    call = b"cos\nmkdir\n" + text(str(mark)) + b"\x85R"
    rewritten(file, b"\x80\x02(" + text("storage") + call + text("0") + text("cpu") + b"K\x02tQ.")


def attribute(file: Path, mark: Path) -> None:
    """What is inert has attributes that are not."""
    rewritten(
        file,
        b"\x80\x04" + text("deepspeed.runtime.fp16.loss_scaler") + text("torch.os.mkdir") + b"\x93"
        + text(str(mark)) + b"\x85R.",
    )  # fmt: skip


TRICKS = {
    trick.__name__: trick
    for trick in (
        plain, legacy, bare, tar, duplicate, nested, stack_global, by_memo, inst, obj, newobj, build, extension,
        persistent, attribute,
    )
}  # fmt: skip
