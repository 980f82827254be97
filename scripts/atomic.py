"""Writing so that nothing half-written is ever taken for whole: to a temporary sibling, then renamed."""

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


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
