"""A full disk is no candidate's fault: it ends the run, which goes on from there, and is not held against a config for ever."""

from __future__ import annotations

import errno
import os
import tempfile

from autokernel.errors import StorageError

_TROUBLE = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))


def raise_if_disk(error: BaseException) -> None:
    """Tell a compiler that cannot write its files from one that does not like the config.

    Compilers wrap what stopped them, and what a compiler's own process said is only text, so the text is what is looked at.

    Raises:
        StorageError: the disk is the reason.
    """
    link: BaseException | None = error
    while link is not None:
        reason = next((reason for reason in _TROUBLE if reason in str(link)), None)
        if reason is not None:
            folders = dict.fromkeys((os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()), tempfile.gettempdir()))
            raise StorageError(
                f"{' and '.join(folders)}: compilers write their files there: {reason}; free some space there, or set "
                "TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders on another disk, then run the same command again"
            ) from error
        link = link.__cause__ or link.__context__
