"""Official files: found in the data folder, downloaded where missing, verified before anyone reads them.

A reader describes its file once and asks for it:

    ETTH1 = OfficialFile(
        name="ett/ETTh1.csv",
        url="https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
        sha256="...",
        size=2_589_657,
        alternates=(StoredForm("ett/ETTh1.csv.gz", sha256="...", size=405_540),),
    )
    with open_data(ETTH1) as stream:
        ...

The data folder is `$JAXPAPERS_DATA`, by default `~/.cache/jaxpapers`; `name` is the path below it. The folder
may be read-only and may hold a file in another stored form (a compressed copy under a name of its own), if
the reader lists that form in `alternates`. A file of the wrong size or checksum is refused, never half read.
"""

import bz2
import functools
import gzip
import hashlib
import http.client
import io
import lzma
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

ENVIRONMENT_VARIABLE = "JAXPAPERS_DATA"
DEFAULT_FOLDER = "~/.cache/jaxpapers"
TIMEOUT = 30.0  # seconds without a byte from the server
CHUNK = 1 << 20


class DataNotFound(FileNotFoundError):
    """An official file is missing and could not be downloaded; the message says where to take and put it."""


class CorruptData(ValueError):
    """A stored or downloaded file is not the official one; the message has what was expected and found."""


class StoredForm(NamedTuple):
    """Another form of an official file that a data folder may hold, such as a compressed copy.

    Attributes:
        name: path below the data folder, with `/`.
        sha256: checksum of this form's own bytes, in hexadecimal.
        size: number of its own bytes.
    """

    name: str
    sha256: str
    size: int


class OfficialFile(NamedTuple):
    """A file as its publisher serves it.

    Attributes:
        name: path below the data folder, with `/`.
        url: official address; None where no address serves this very file (a subset, a member of an archive).
        sha256: checksum of the bytes at `url`, in hexadecimal.
        size: number of bytes.
        alternates: stored forms with the same content that are as good as the official file.
    """

    name: str
    url: str | None
    sha256: str
    size: int
    alternates: tuple[StoredForm, ...] = ()


def data_folder() -> Path:
    """The folder of all official files: `$JAXPAPERS_DATA`, or `~/.cache/jaxpapers` where that is not set."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FOLDER).expanduser()


def find(file: OfficialFile) -> Path | None:
    """Verified path of a file, or of one of its alternates, in the data folder; None where there is none.

    Never touches the network. The size is checked on every call, the checksum once per process for each
    version of a stored file (path, modification time, size).

    Raises:
        CorruptData: the stored file has another size or checksum.
    """
    forms: tuple[OfficialFile | StoredForm, ...] = (file, *file.alternates)
    for form in forms:
        path = data_folder() / form.name
        if path.is_file():
            status = path.stat()
            # A wrong size settles it without reading what may be gigabytes.
            digest = _sha256(path, status.st_mtime_ns, status.st_size) if status.st_size == form.size else None
            _check(str(path), form, file.url, status.st_size, digest)
            return path
    return None


def locate(file: OfficialFile) -> Path:
    """Verified path of a file: from the data folder, else downloaded into it from the official address.

    The path may be that of an alternate: `open_data` is the way to the content whatever its stored form.
    Processes that download the same file at the same time do not disturb each other, and an interrupted
    download leaves nothing under the file's name.

    Raises:
        DataNotFound: the file is missing and cannot be downloaded (no network, no address, no write access).
        CorruptData: the stored or the downloaded file has another size or checksum.
    """
    return find(file) or _download(file)


def open_data(file: OfficialFile) -> io.BufferedIOBase:
    """Binary stream of a file's content, decompressed where the name ends in `.gz`, `.xz` or `.bz2`.

    A `.tar.gz` therefore reads as a plain tar; zip containers (`.zip`, `.npz`) are passed through.

    Raises:
        DataNotFound: as `locate`.
        CorruptData: as `locate`.
    """
    path = locate(file)
    match path.suffix:
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case _:
            return path.open("rb")


@functools.cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    """Checksum of a stored file; time and size are arguments so that a changed file is read anew."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(what: str, form: OfficialFile | StoredForm, url: str | None, size: int, digest: str | None) -> None:
    if size == form.size and digest == form.sha256:
        return
    found = f"{size} bytes" + (f" with sha256 {digest}" if digest else "")
    remedy = f"download it anew from {url}" if url else "replace it by the official file"
    raise CorruptData(
        f"{what} is not the official {form.name}: expected {form.size} bytes with sha256 {form.sha256}, "
        f"found {found}. Delete it and {remedy}."
    )


def _not_found(file: OfficialFile, reason: str) -> DataNotFound:
    path = data_folder() / file.name
    source = f"Take it from {file.url}" if file.url else "Obtain it as the reader's documentation says"
    return DataNotFound(
        f"{file.name} is not in {data_folder()}, and {reason}. {source} and put it into {path.parent} as "
        f"{path.name}, or set ${ENVIRONMENT_VARIABLE} (default {DEFAULT_FOLDER}) to the folder that has "
        f"{file.name}."
    )


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    # os.access grants root everything; a folder closed to everybody is meant to stay as it is, for root too.
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


class _NetworkError(Exception):
    pass


def _chunks(url: str) -> Iterator[bytes]:
    """Bytes at an address; only failures of the network, not of the reader, become a _NetworkError."""
    # Some servers refuse Python's default agent.
    request = urllib.request.Request(url, headers={"User-Agent": "jaxpapers"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise _NetworkError(f"{type(error).__name__}: {error}") from error


def _download(file: OfficialFile) -> Path:
    path = data_folder() / file.name
    if file.url is None:
        raise _not_found(file, "no address serves it by itself")
    if not _writable(path.parent):
        raise _not_found(file, "that folder is not writable, so it was not downloaded")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each download, next to the target, so that the rename is atomic. Not tempfile:
    # its files are private to their owner, and a data folder may be shared.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    console = Console(stderr=True)
    digest, size = hashlib.sha256(), 0
    try:
        with (
            part.open("xb") as sink,
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            bar = progress.add_task(file.name, total=file.size)
            for chunk in _chunks(file.url):
                sink.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress.advance(bar, len(chunk))
                if size > file.size:  # it is wrong already: do not fill the disk
                    break
        _check(f"what {file.url} sent", file, file.url, size, digest.hexdigest())
        os.replace(part, path)
    except _NetworkError as error:
        raise _not_found(file, f"{file.url} could not be read ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    return path
