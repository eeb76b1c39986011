"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnx_autoglm.errors import UserError

ENGINE_FILES = ("model.engine", "model.engine.log", "engine.json", "build_engine.sh")
_FILES = (
    *(f"{name}{end}" for name in ("model.onnx", "model.cpu.onnx", "model.trt.onnx") for end in (".data", "")),
    "plan.json",
    "report.json",
    "quantization.json",
    *ENGINE_FILES,
)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder on the disk of the output; gone afterwards, whatever happens.

    It lies inside the output folder where that exists (which may be a mount point), otherwise beside it.

    Raises UserError if it cannot be made, or if writing into it fails.
    """
    folder = folder.resolve()
    blocked = next((name for name in _FILES if (folder / name).is_dir()), None)
    if blocked:
        raise UserError(f"{folder / blocked} is a folder: choose another output folder")
    parent = folder if folder.is_dir() else folder.parent
    created = [path for path in (parent, *parent.parents) if not path.exists()]
    # Named before it is made: an interrupt between the two leaves nothing that is not removed.
    staged = parent / f".{folder.name}.partial-{secrets.token_hex(6)}"
    try:
        with explained(parent):
            parent.mkdir(parents=True, exist_ok=True)
            staged.mkdir()
            yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a failure to write into one line with its fix."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space, or choose another output folder" if full else "choose another output folder"
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; {fix}") from error


def publish(staged: Path, folder: Path, names: Sequence[str] = _FILES) -> None:
    """Moves the finished files of these names into place.

    A new folder appears in one step. In an existing one the old files are set aside first and come back
    if anything goes wrong, so that a model never lies beside the data or the plan of another.
    """
    folder = folder.resolve()
    if not folder.exists():
        os.rename(staged, folder)
        return
    aside = staged / "replaced"
    aside.mkdir()
    try:
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, aside / name)
        for name in names:
            if (staged / name).exists():
                os.replace(staged / name, folder / name)
    except BaseException:
        for name in names:
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
        raise
