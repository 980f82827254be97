"""Shared helpers: errors printed as one sentence, and atomic writes."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wasabi import msg

# errors of a disk or its permissions
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


class UserError(Exception):
    """An error that a user can fix; the message says what, where, what was expected and what to do."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Print a UserError or an OSError as one sentence and exit with code 1."""
    try:
        yield
    except UserError as error:
        msg.fail(str(error))
        sys.exit(1)
    except OSError as error:
        reason, of_disk = error.strerror or error, error.errno in DISK
        # the error of a failed write has no file name: `replacing` adds it, all other files are temporary
        where = error.filename or (tempfile.gettempdir() if of_disk else "")
        if isinstance(error, shutil.Error):  # copytree's list of (source, target, "[Errno 28] No space …: 'target'")
            reason, of_disk = error.args[0][0][2].split("] ")[-1].split(": ")[0], True
        hint = "free the space or the path it names" if of_disk else "fix that"
        msg.fail(f"{where}{where and ': '}{reason}; {hint} and run the command again.")
        sys.exit(1)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder that replaces `path` if the block succeeds.

    On an error the temporary is removed and `path` stays unchanged. Leftovers of killed processes of this machine are
    removed first. Raises OSError, with `path` if the error names no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = f".{path.name}.partial-{socket.gethostname()}-"  # the host's name, for folders that machines share
    temporary = path.with_name(f"{beside}{os.getpid()}")
    for left in path.parent.glob(f"{glob.escape(beside)}*"):
        if not _is_running(left.name.removeprefix(beside)):
            _remove(left)
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            _remove(path)  # a folder cannot replace one that has files
        os.replace(temporary, path)
    except OSError as error:
        # an error without a number does not come from the file system, except copytree's
        if error.errno is not None or isinstance(error, shutil.Error):
            error.filename = error.filename or str(path)  # a failed write does not name the file
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
