"""One root, on disk or `s3://`, and the few operations raysed needs on it.

Credentials, region and endpoint come from the standard AWS environment and profile, never from the URI.  A `Storage` pickles
as its URI, so every process builds its own client: a pyarrow S3 filesystem loses its retry strategy when pickled.
"""

import contextlib
import hashlib
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from raysed.errors import StorageError, UsageError

GAP = 8 << 10
"""Bytes between two wanted ranges up to which one request fetches both."""
_CONCURRENCY = 16
_PIECE = 8 << 20
_ATTEMPTS = 6
_PATIENCE = 45.0
"""Seconds for which a busy store, or one that cannot be reached, is asked again, after the attempts of the client library."""
_BUSY = (
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "HTTP status 50",
    "NETWORK_CONNECTION",
    "Could not connect to the endpoint",
    "Failed to flush response stream",
)
"""Answers (that to a HEAD has a status alone), or the lack of one, after which the client libraries give up before a store has caught its breath: their retries
share a budget, which many concurrent reads use up, and the last of these (an error answer longer than the bytes asked for) is not retried at all."""
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
"""Answers to a conditional put of an object that exists, or that somebody else is putting."""
_CONNECT, _REQUEST = 5, 30
"""Seconds until a connection or a request counts as failed."""
_T = TypeVar("_T")


class _PathTaken(Exception):
    """A conditional put met an object."""


class Seen(NamedTuple):
    """What a store tells of an object without reading it; other bytes of the same path have another one."""

    size: int
    """Bytes."""
    changed: int
    """When it was last written: Unix time in nanoseconds on disk, in whole seconds in a bucket."""


class Storage:
    """A directory or bucket prefix.

    Args:
        uri: a local path, `file://` or `s3://bucket/prefix`.

    Raises:
        UsageError: another scheme, credentials in the URI, or no bucket.
    """

    def __init__(self, uri: str) -> None:
        scheme, _, rest = uri.rpartition("://")
        if scheme not in ("", "file") and (
            "@" in rest or "?" in rest
        ):  # first, so that no message repeats them
            raise UsageError(
                "a storage URI must hold no credentials or options: set AWS_PROFILE or AWS_ACCESS_KEY_ID and the like"
            )
        if scheme not in ("", "file", "s3"):
            raise UsageError(f"storage URI {uri!r}: scheme must be file or s3, got {scheme!r}")
        self.is_local = scheme != "s3"
        if self.is_local:
            self.uri = self._root = str(Path(rest).expanduser().absolute())
            return
        self._root = rest.strip("/")
        self.uri = f"s3://{self._root}"
        if not re.match(r"[a-z0-9][a-z0-9.-]{2,62}(/|\Z)", self._root):
            raise UsageError(f"storage URI {uri!r} names no valid bucket")

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Storage, (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def at(self, prefix: str) -> "Storage":
        """The storage rooted at a prefix of this one."""
        return Storage(f"{self.uri}/{_relative(prefix)}")

    def local_path(self, path: str) -> str | None:
        """Path of an object on this machine's disk; None in a bucket."""
        return self._full(path) if self.is_local else None

    def read(self, path: str) -> bytes:
        """All bytes of one object.

        Raises:
            FileNotFoundError: no such object.
            StorageError: unreachable, or refused.
        """
        return self._try(path, lambda: self._read(self._full(path)))

    def read_ranges(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of each (offset, length) of one object; near ranges share a request, requests run concurrently.

        A range past the end of the object comes back short: whoever knows the hash of the bytes finds out.
        """
        requests = coalesce(spans, GAP)
        if self.is_local:
            parts = self._try(path, lambda: _pread(self._full(path), requests))
        else:
            file = self._try(path, lambda: self._open(self._full(path)))

            def fetched(offset: int, length: int) -> bytes:
                return self._try(path, lambda: file.read_at(length, offset))

            parts = list(_pool().map(lambda r: fetched(*r), requests))
        starts = [offset for offset, _ in requests]
        pieces = []
        for offset, length in spans:
            k = max(i for i, start in enumerate(starts) if start <= offset)
            pieces.append(parts[k][offset - starts[k] : offset - starts[k] + length])
        return pieces

    def write(self, path: str, data: bytes) -> None:
        """Write or replace one object; readers see the old bytes or the new ones, never a part."""
        self._try(path, lambda: self._write(self._full(path), data))

    def upload(self, path: str, file: str) -> None:
        """`write` of a file of any size on this machine's disk, in pieces; a bucket shows it when the last one has arrived."""
        self._try(path, lambda: self._upload(self._full(path), file))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False if it does.  The one operation that commits.

        A put whose answer was lost and that is retried meets its own object: put a token of the owner into `data`.
        """
        full = self._full(path)
        if self.is_local:
            return self._try(path, lambda: _link_new(full, data))

        def put() -> None:
            try:
                _by_s3fs(lambda: self._s3fs.pipe_file(full, data, mode="create"))
            except OSError as error:
                code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
                if isinstance(error, FileExistsError) or code in _TAKEN:
                    raise _PathTaken from error
                raise

        for _ in range(_ATTEMPTS):
            with contextlib.suppress(_PathTaken):
                self._try(path, put)
                return True
            with contextlib.suppress(FileNotFoundError):  # the put that was in the way came to nothing
                return self.read(path) == data
        raise StorageError(f"{self.uri}/{path}: {_ATTEMPTS} puts met another one, and no object is there")

    def list(self, prefix: str = "") -> dict[str, int]:
        """Paths below a prefix, recursively, with their sizes in bytes; empty if there is nothing."""
        return {path: seen.size for path, seen in self.look_below(prefix).items()}

    def look_below(self, prefix: str = "") -> dict[str, Seen]:
        """`look` at every path below a prefix, recursively, with one listing; empty if there is nothing."""
        return self._try(prefix, lambda: self._list(self._full(prefix) if prefix else self._root))

    def exists(self, path: str) -> bool:
        """True if there is an object of this path."""
        if self.is_local:
            return os.path.isfile(self._full(path))
        return self._try(path, lambda: self._arrow.get_file_info(self._full(path)).is_file)

    def look(self, path: str) -> Seen:
        """Size and last change of an object.

        Raises:
            FileNotFoundError: no such object.
        """
        if self.is_local:
            status = os.stat(self._full(path))
            return Seen(status.st_size, status.st_mtime_ns)
        info = self._try(path, lambda: self._arrow.get_file_info(self._full(path)))
        if not info.is_file:
            raise FileNotFoundError(path)
        return _seen(info)

    def size(self, path: str) -> int:
        """Bytes of an object.

        Raises:
            FileNotFoundError: no such object.
        """
        return self.look(path).size

    def remove(self, path: str) -> None:
        """Remove one object; none is no error."""
        full = self._full(path)
        if self.is_local:
            Path(full).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._try(path, lambda: self._arrow.delete_file(full))

    def _full(self, path: str) -> str:
        return f"{self._root}/{_relative(path)}"

    def _try(self, path: str, action: Callable[[], _T]) -> _T:
        began, pause = time.monotonic(), 0.5
        while True:
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if self.is_local or not _is_busy(error) or time.monotonic() - began > _PATIENCE:
                    raise StorageError(f"{self.uri}/{path}: {_line(error)}") from error
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, 5.0)

    def _read(self, full: str) -> bytes:
        if self.is_local:
            return Path(full).read_bytes()
        with self._arrow.open_input_stream(full) as stream:
            return stream.read()

    def _write(self, full: str, data: bytes) -> None:
        if self.is_local:
            os.replace(_temporary(full, data), full)
            _fsync_directory(full)
            return
        _by_s3fs(lambda: self._s3fs.pipe_file(full, data))

    def _upload(self, full: str, file: str) -> None:
        if self.is_local:
            name = _temporary(full, b"")
            try:
                shutil.copyfile(file, name)
                _fsync(name)
                os.replace(name, full)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            _fsync_directory(full)
            return
        _by_s3fs(lambda: self._s3fs.put_file(file, full, chunksize=_PIECE, max_concurrency=2))

    def _list(self, full: str) -> dict[str, Seen]:
        if self.is_local:
            root = Path(self._root)
            return {
                str(p.relative_to(root)): Seen(p.stat().st_size, p.stat().st_mtime_ns)
                for p in sorted(Path(full).rglob("*"))
                if p.is_file() and not p.name.startswith(".raysed-")
            }
        from pyarrow import fs

        found = self._arrow.get_file_info(fs.FileSelector(full, recursive=True, allow_not_found=True))
        return {
            i.path.removeprefix(self._root + "/"): _seen(i)
            for i in sorted(found, key=lambda i: i.path)
            if i.is_file
        }

    def _open(self, full: str) -> Any:
        with self._lock:
            if full in self._files:
                return self._files[full]
        file = self._arrow.open_input_file(full)  # a round trip, beside those for other objects
        with self._lock:
            if len(self._files) >= 512:
                self._files.clear()
            return self._files.setdefault(full, file)

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    @cached_property
    def _arrow(self) -> Any:
        from pyarrow import fs

        endpoint, region = _place()
        return fs.S3FileSystem(
            endpoint_override=endpoint,
            region=region or ("us-east-1" if endpoint else None),
            connect_timeout=_CONNECT,
            request_timeout=_REQUEST,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        )

    @cached_property
    def _s3fs(self) -> Any:
        """What writes: an output stream of pyarrow completes its upload when it is closed, also by an exception in the middle."""
        import s3fs

        endpoint, _ = _place()
        limits = {
            "connect_timeout": _CONNECT,
            "read_timeout": _REQUEST,
            "retries": {"max_attempts": _ATTEMPTS, "mode": "standard"},
        }
        return s3fs.S3FileSystem(endpoint_url=endpoint, config_kwargs=limits, skip_instance_cache=True)


def _is_busy(error: OSError) -> bool:
    """Whether a store may well answer otherwise in a while; s3fs passes on the words of an answer, and the answer as the cause."""
    answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
    return answer.get("HTTPStatusCode", 0) >= 500 or any(word in str(error) for word in _BUSY)


def _by_s3fs(action: Callable[[], None]) -> None:
    """An action whose errors are all `OSError`."""
    from botocore.exceptions import BotoCoreError

    try:
        action()
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def _place() -> tuple[str | None, str | None]:
    """Endpoint and region by the environment or the profile, resolved by botocore's rules for both clients: pyarrow knows no
    endpoint of a profile, and reads would go to another store than commits.

    Raises:
        UsageError: a profile that there is none of.
    """
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError

    session = botocore.session.get_session()
    try:
        provider = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3")
        return provider.provide(), os.environ.get("AWS_REGION") or session.get_config_variable("region")
    except BotoCoreError as error:
        raise UsageError(f"AWS configuration: {_line(error)}") from error


def digest(data: bytes) -> str:
    """sha256, hex."""
    return hashlib.sha256(data).hexdigest()


def coalesce(spans: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Sorted (offset, length) requests that cover all spans, merging those at most `gap` bytes apart."""
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(spans):
        if merged and offset - sum(merged[-1]) <= gap:
            start = merged[-1][0]
            merged[-1] = (start, max(sum(merged[-1]), offset + length) - start)
        else:
            merged.append((offset, length))
    return merged


def _relative(path: str) -> str:
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in parts):
        raise UsageError(f"path {path[:120]!r} does not stay below its root")
    return path


def _seen(info: Any) -> Seen:
    """Of an object in a bucket: stores tell seconds of one object and may tell more in a listing."""
    return Seen(info.size, info.mtime_ns // 10**9)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _pread(full: str, requests: list[tuple[int, int]]) -> list[bytes]:
    with open(full, "rb") as file:
        return [os.pread(file.fileno(), length, offset) for offset, length in requests]


def _temporary(full: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(full), exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".raysed-", dir=os.path.dirname(full))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
    except OSError:
        os.unlink(name)
        raise
    return name


def _link_new(full: str, data: bytes) -> bool:
    name = _temporary(full, data)
    try:
        os.link(name, full)
    except FileExistsError:
        return False
    finally:
        os.unlink(name)
    _fsync_directory(full)
    return True


def _fsync_directory(full: str) -> None:
    _fsync(os.path.dirname(full))


def _fsync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="raysed-read")
