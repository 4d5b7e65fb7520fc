"""What every reader and writer of files needs: the user's error, whole files, a lock."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock


class UserError(Exception):
    """Something the user can mend. Its text is told in one line, and the exit status is 2."""


def write_whole(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a file. At any moment `path` holds the old or the new content, whole.

    Raises UserError if the file cannot be written; what was there before is kept.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
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
