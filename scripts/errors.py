"""Errors that a user can mend: printed as one sentence, exit code 1, no traceback."""

import contextlib
import errno
import shutil
import sys
from collections.abc import Iterator

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
