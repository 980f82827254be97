"""What every command shares: errors printed as one sentence, and atomic writes."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from wasabi import msg

# what a disk or its permissions refuse
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


class UserError(Exception):
    """Bad input or surroundings; the message says what, where, what was expected and what to do."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turns a UserError, and an operating system's refusal, into one printed sentence and exit code 1."""
    try:
        yield
    except UserError as error:
        msg.fail(str(error))
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason, of_disk = error.strerror or error, error.errno in DISK
        if isinstance(error, shutil.Error):  # all that copytree could not copy: (source, target, why) of each
            reason, of_disk = error.args[0][0][2], True
        hint = "free the space or the path it names" if of_disk else "mend that"
        msg.fail(f"{where}{reason}; {hint} and run the command again.")
        sys.exit(1)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` for a file or a folder; it replaces `path` only if the block succeeds.

    Raises OSError as the file system does, naming `path` where it names no file. On any error the temporary is removed
    and `path` stays as it was. What killed processes of this machine left beside `path` is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = f".{path.name}.partial-{socket.gethostname()}-"  # several machines may write to a shared folder
    temporary = path.with_name(f"{beside}{os.getpid()}")
    for left in path.parent.glob(f"{glob.escape(beside)}*"):
        if not _is_running(left.name.rpartition("-")[2]):
            _remove(left)
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            _remove(path)  # a folder can't be renamed onto one that has files in it
        os.replace(temporary, path)
    except OSError as error:
        # one without a number is not the file system's, and has a message of its own; but for copytree's
        if error.errno is not None or isinstance(error, shutil.Error):
            error.filename = error.filename or str(path)  # a refused write does not say to which file
        raise
    finally:
        _remove(temporary)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system has them, so that large files are not stored twice."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
