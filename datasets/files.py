"""What every reader and writer of files needs."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class DataError(Exception):
    """The data or a setting cannot be used; the message is one line that says what to change."""


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same file `lock`, which is there only meanwhile.

    So that of runs that start together one downloads. Does nothing where the folder cannot be
    written to, hence nothing downloaded, or the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            while True:
                file = stack.enter_context(open(lock, "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
                        stack.callback(lock.unlink)
                        break  # or else whoever had the lock has removed the file
        yield


def sync_folder(folder: Path) -> None:
    """Write the folder's entries to disk, where the file system can: they outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
