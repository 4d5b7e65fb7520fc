"""What every reader and writer of files needs: the user's error, whole files, a lock."""

import contextlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. Its text is told in one line, and the exit status is 2."""


def tell(line: str) -> None:
    """Print a line above the progress bars; the run goes on if nobody reads its output any more."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def told(path: Path | str) -> Iterator[None]:
    """Turn an OSError inside, of writing to `path`, into the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_whole(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a file. At any moment `path` holds the old or the new content, whole.

    Raises UserError if the file cannot be written; what was there before is kept.
    """
    temporary = f"{path}.tmp"
    try:
        with told(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, so that of several runs started together only one downloads.

    Does nothing where the folder cannot be written to or its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path, fallback_to_soft=False))
        yield


def lock(path: Path) -> FileLock:
    """Lock the file `path` until this process ends; UserError if another one holds it."""
    # A soft lock, filelock's way out, would outlive a killed process.
    held = FileLock(path, fallback_to_soft=False)
    try:
        with told(path):
            held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process holds {path}") from None
    return held


def check_space(folder: Path, need: int) -> None:
    """Raise UserError if the disk of `folder` has less than `need` bytes free."""
    disk = shutil.disk_usage(folder)
    if disk.free < need and disk.total:  # some file systems do not tell
        raise UserError(f"{folder} needs {need // 10**6} MB, {disk.free // 10**6} MB are free")


def load_checkpoint(path: Path) -> dict:
    """What torch.save wrote, without running code; UserError if it is damaged or unreadable."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksum
            if file.testzip():
                raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch names no common class for a file that is no checkpoint
        what = "put a good copy there, or start again with --overwrite"
        raise UserError(f"{path} is damaged: {what}") from error
