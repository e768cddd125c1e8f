"""The lock of a checkpoint directory: one run at a time. It knows no checkpoint."""

import errno
import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from stepc._forks import undone_in_children
from stepc.errors import CheckpointError

LOCK, EXCLUSIVE = "lock", "lock.exclusive"
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what network file systems answer that have no `flock`


class DirectoryLock:
    """Creates a directory and holds its lock, which the system releases however the process ends.

    Meaning: `flock` of the file `lock`. Where the file system has no `flock`, the file `lock.exclusive` that only one
      process can create; one that was left by a process of this host that has ended is taken over.
    Errors: CheckpointError if the directory cannot be used, or is in use.
    `why_exclusive` says why there is no `flock`, or is None.
    A child forked while it is held closes its copy of the file: it would hold the lock for as long as it lives.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.why_exclusive: str | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unusable(directory, error) from error
        self._in_children = undone_in_children(self._close)
        self._in_children.__enter__()
        try:
            self._take()
        except BaseException:
            self._leave()
            raise

    def is_held(self) -> bool:
        """Whether the directory is still the one that was locked."""
        try:
            return os.path.samestat(os.fstat(self._file), (self.directory / LOCK).stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let another run in. In a forked child this does nothing."""
        if self._file < 0:
            return
        if self.why_exclusive is None:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # for a copy in a child that Python did not fork, too
        else:
            (self.directory / EXCLUSIVE).unlink(missing_ok=True)
        self._leave()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(os.read(self._file, 1000).decode(errors="replace")) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise _unusable(self.directory, error) from error
            self._take_exclusive()
            self.why_exclusive = f"no flock here: {error.strerror} ({errno.errorcode[error.errno]})"
            return
        os.ftruncate(self._file, 0)
        os.write(self._file, _holder())

    def _take_exclusive(self) -> None:
        path = self.directory / EXCLUSIVE
        try:
            found = _read(path)
            if found is not None and _has_ended(found):
                stale = path.with_name(f"{EXCLUSIVE}.{os.getpid()}")
                path.rename(stale)
                try:
                    if _read(stale) != found:  # another run took it over since: give it back
                        os.link(stale, path)
                finally:
                    stale.unlink()
            created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            remedy = f"If that process has ended, delete {path}."
            raise self._in_use(_read(path) or "another run", suggestion=remedy) from None
        except OSError as error:
            raise _unusable(self.directory, error) from error
        os.write(created, _holder())
        os.close(created)

    def _in_use(self, holder: str, suggestion: str | None = None) -> CheckpointError:
        facts = (("directory", str(self.directory)), ("used by", holder))
        what = "Another run is using this checkpoint directory."
        return CheckpointError(what, facts=facts, suggestion=suggestion)

    def _leave(self) -> None:
        self._in_children.__exit__(None, None, None)
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _unusable(directory: Path, error: OSError) -> CheckpointError:
    facts = (("directory", str(directory)), ("reason", f"{error.strerror} (errno {error.errno})"))
    return CheckpointError("The checkpoint directory cannot be used.", facts=facts)


def _holder() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _has_ended(holder: str) -> bool:
    """Whether a holder is a process of this host that has ended; nothing is known about other hosts."""
    found = re.fullmatch(r"process (\d+) on (.+), since .+", holder)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
