"""What goes wrong with a disk, in words: full, over a quota, read-only, not ours.

Libraries report it in classes of their own: safetensors and tokenizers, for two, raise errors that
are no `OSError` and hold the system's number in their text alone.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

PROBE_BYTES = 1024**2
"""Less room than this, and the first checkpoint would already meet the end of the disk."""

ELSEWHERE = "set LATENT_REASONING_RESULTS to a folder on another disk"
MAKE_ROOM = f"free some space or {ELSEWHERE}, and run again: nothing that is finished is lost"
MAKE_WRITABLE = f"make it writable or {ELSEWHERE}, and run again"
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EROFS: MAKE_WRITABLE,
    errno.EACCES: MAKE_WRITABLE,
    errno.EPERM: MAKE_WRITABLE,
}


def explain(error: OSError) -> str:
    """What, where and, for a disk that takes no more, what to do."""
    where = f"{error.filename}: " if error.filename else ""
    what = where + (error.strerror or str(error))
    return f"{what}; {REMEDIES[error.errno]}" if error.errno in REMEDIES else what


def disk_error(error: Exception, path: Path) -> OSError | None:
    """The error of the system behind `error`, met while `path` was written; None for another."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else None
    if number not in REMEDIES:
        return None
    named = getattr(error, "filename", None)
    return OSError(number, os.strerror(number), str(named or path))


def check_writable(folder: Path) -> None:
    """Write and remove a little below `folder`; an `OSError` that names it where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".probe.") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
