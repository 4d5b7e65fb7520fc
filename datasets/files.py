"""Files that are whole or missing, and the lock that lets one process at a time make them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from errors import UserError


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Inside, where `path` is written, an OSError becomes a UserError that names what failed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # If its file raises OSError, torch.save raises RuntimeError, with the OSError as context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        what = cause.filename or path
        raise UserError(f"cannot write {what}: {cause.strerror or cause}") from error


def write_whole(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a file. At any moment `path` holds the old or the new content, whole.

    Raises UserError if the file cannot be written; what was there before is kept.
    """
    temporary = f"{path}.tmp"
    try:
        with writing(path):
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

    Do nothing if the folder cannot be written to or if its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path, fallback_to_soft=False))
        yield
