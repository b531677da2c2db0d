"""Files that appear under their names only when they are whole, and fingerprints of files."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def data_dir() -> Path:
    """Where downloads, the toy and what is computed once are kept: --cache_dir, which is the
    environment's NANODSKD_CACHE, else this project's data/."""
    return Path(os.environ.get("NANODSKD_CACHE", PROJECT / "data"))


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a text file; it is flushed and renamed to `path` when the block ends well."""
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file


@contextlib.contextmanager
def atomic_path(path: Path):
    """The same for a file that is written by its name."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(path: Path):
    """A block that one process of this machine is in at a time. path: a file for its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"note: another process is at work there ({path}); this one waits", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush(path: Path) -> None:
    """Make sure that a file's (or folder's) content is on the disk, not only in a cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, which is read again only when it has changed."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_label(name: str) -> str:
    """A name of data or of a model as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")
