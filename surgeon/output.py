"""Output directories that appear whole or not at all.

A build writes into a hidden sibling folder and takes the final name at the end.  Replacing an existing output is one
exchange of names in the kernel, so a kill at any moment leaves either the old output or the new one, never a mixture.
Nobody asked for the hidden name, and it is gone when a message is read: errors say the final one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgeon.errors import RecipeError, SurgeonError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_free(target: Path, force: bool) -> None:
    """Refuse an output directory that exists, before any work is done.

    Raises:
        RecipeError: it exists and ``force`` is False, it is a file, or its parent cannot be written to.
    """
    if target.is_file():
        raise RecipeError(f"output: {target} is a file; an output is a directory, name another one")
    parent = next(folder for folder in (target.parent, *target.parent.parents) if folder.exists())
    if not parent.is_dir():
        raise RecipeError(f"output: {target} would lie in {parent}, which is a file; name another directory")
    if target.exists() and not force:
        raise RecipeError(f"output: {target} exists already; remove it, name another directory, or pass --force (force=True)")
    if target.exists() and not (target / "surgeon.json").exists() and any(target.iterdir()):
        raise RecipeError(f"output: {target} is not an output of surgeon; force replaces only those, name another directory")
    try:  # permissions do not say it all: some disks are mounted to be read
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.trial-", dir=parent))
    except OSError as error:
        raise RecipeError(f"output: {parent} cannot be written to ({error.strerror}); name another directory") from error


@contextmanager
def staged(target: Path, force: bool = False) -> Iterator[Path]:
    """Give an empty folder beside ``target``; when the body ends well it takes ``target``'s place, else it vanishes.

    Args:
        target: final directory.
        force: replace what is there at the end.

    Yields:
        The folder to write into.

    Raises:
        RecipeError: something is there at the end that ``force`` does not replace, made by another build meanwhile.
    """
    named, target = target, target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    folder = target.parent / f".{target.name}.building-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    with _errors_say(named, folder):
        folder.mkdir()
        try:
            yield folder
            check_free(target, force)
            if target.exists():
                _exchange(folder, target)
            else:
                folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _errors_say(target: Path, hidden: Path) -> Iterator[None]:
    """Errors from within, and what they came from, name ``target`` where they name the hidden place of the moment.

    A full disk is an error of one form, whichever library wrote.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, SurgeonError) and _is_full(error):
            where = f"no space is left on the disk of {target}"
            raise RecipeError(f"output: {where}; make room, or name another directory") from error
        link: BaseException | None = error
        while link is not None:
            link.args = tuple(_said(value, target, hidden) for value in link.args)
            if isinstance(link, OSError):  # its names are no arguments once it is made
                link.filename, link.filename2 = (_said(name, target, hidden) for name in (link.filename, link.filename2))
            link = link.__cause__ or link.__context__
        raise


def _is_full(error: Exception) -> bool:
    """Whether a disk is full; libraries that write by themselves only say so in words of the system."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)


def _said(value: Any, target: Path, hidden: Path) -> Any:
    return str(value).replace(str(hidden), str(target)) if isinstance(value, str | Path) else value


def _remove_abandoned(target: Path) -> None:
    """Remove staging folders of builds that were killed."""
    for folder in target.parent.glob(f".{target.name}.building-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories' names; atomic where the kernel offers it, otherwise two renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = (os.fsencode(new), os.fsencode(old))
        if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
    aside = old.with_name(f".{old.name}.building-{os.getpid()}.old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before minutes of work, not after."""
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, needed the name of a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise RecipeError(f"{path}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"{path}: the folder {parent} cannot be written to")


def write_file(path: Path, text: str, *, lasting: bool = False) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: of the file.
        text: its content.
        lasting: return when it would outlast a loss of power.
    """
    check_writable(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")  # another process may write the same file
    with _errors_say(path, partial):
        try:
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                if lasting:
                    stream.flush()
                    os.fsync(stream.fileno())
            partial.replace(path)
            if lasting:
                folder = os.open(path.absolute().parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            partial.unlink(missing_ok=True)
