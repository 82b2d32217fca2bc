"""The data folder: found, downloaded, verified, refused; against a server on this machine."""

import bz2
import gzip
import hashlib
import http.server
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxpapers.data import download
from jaxpapers.data.download import (
    CorruptData,
    DataNotFound,
    OfficialFile,
    StoredForm,
    data_folder,
    find,
    locate,
    open_data,
)

CONTENT = bytes(range(256)) * 16
NAME = "room/table.csv"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `pause` runs in the middle of each answer; `requests` counts the answers."""

    content = CONTENT
    status = 200
    requests = 0
    announced: int | None = None  # Content-Length, where it is to be a lie

    def pause(self):
        pass

    def url(self, name=NAME):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        server.requests += 1
        self.send_response(server.status)
        self.send_header("Content-Length", str(server.announced or len(server.content)))
        self.end_headers()
        half = len(server.content) // 2
        self.wfile.write(server.content[:half])
        self.wfile.flush()
        server.pause()
        self.wfile.write(server.content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setenv("JAXPAPERS_DATA", str(folder))
    return folder


def official(url, content=CONTENT, name=NAME, alternates=()):
    return OfficialFile(name, url, hashlib.sha256(content).hexdigest(), len(content), alternates)


def store(folder, content=CONTENT, name=NAME):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder_is_the_variable_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXPAPERS_DATA", "~/elsewhere")
    assert data_folder() == tmp_path / "elsewhere"
    for unset in (
        lambda: monkeypatch.setenv("JAXPAPERS_DATA", ""),
        lambda: monkeypatch.delenv("JAXPAPERS_DATA"),
    ):
        unset()
        assert data_folder() == tmp_path / ".cache" / "jaxpapers"


def test_a_stored_file_is_found_without_the_network(folder, server):
    path = store(folder)
    assert locate(official(server.url())) == find(official(server.url())) == path
    assert server.requests == 0


def test_a_missing_file_is_downloaded_once(folder, server, capfd):
    file = official(server.url())
    assert find(file) is None
    assert locate(file) == locate(file) == folder / NAME
    assert (folder / NAME).read_bytes() == CONTENT
    assert server.requests == 1
    assert files(folder) == [NAME]
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / NAME).stat().st_mode & 0o777 == 0o666 & ~umask  # as shared as any other file of the user
    assert capfd.readouterr() == ("", "")  # the bar is for terminals only


def not_found_names_everything(error, file, folder):
    message = str(error.value)
    assert isinstance(error.value, FileNotFoundError)
    for part in (file.name, str(folder), str(folder / "room"), "JAXPAPERS_DATA"):
        assert part in message
    return message


def test_without_a_network_the_error_says_what_to_do(folder, server):
    closed = Server(("127.0.0.1", 0), Handler)
    closed.server_close()
    file = official(closed.url())
    with pytest.raises(DataNotFound) as error:
        locate(file)
    assert file.url in not_found_names_everything(error, file, folder)
    assert files(folder) == []


def test_a_server_that_has_lost_the_file(folder, server):
    server.status = 404
    file = official(server.url())
    with pytest.raises(DataNotFound, match="404") as error:
        locate(file)
    assert file.url in not_found_names_everything(error, file, folder)
    assert files(folder) == []


def test_a_server_that_stops_answering(folder, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    go_on = threading.Event()
    server.pause = go_on.wait
    file = official(server.url(), CONTENT)
    with pytest.raises(DataNotFound, match="timed out"):
        locate(file)
    go_on.set()
    assert files(folder) == []


def test_a_file_without_an_address(folder):
    file = official(None)
    with pytest.raises(DataNotFound, match="no address serves it") as error:
        locate(file)
    not_found_names_everything(error, file, folder)


def test_a_read_only_folder_is_read_and_never_written(folder, server):
    path = store(folder)
    other = official(server.url("other"), name="room/other.csv")
    deeper = official(server.url("deeper"), name="room/new/folder/deeper.csv")
    for closed in (path.parent, folder):
        closed.chmod(0o555)
    try:
        assert locate(official(server.url())) == path
        for file in (other, deeper):
            with pytest.raises(DataNotFound, match="not writable") as error:
                locate(file)
            assert file.url in not_found_names_everything(error, file, folder)
    finally:
        for closed in (folder, path.parent):
            closed.chmod(0o755)
    assert server.requests == 0
    assert files(folder) == [NAME]


@pytest.mark.parametrize(
    "stored",
    [CONTENT[:-1], CONTENT + b"x", b"", CONTENT[:-1] + b"x"],
    ids=["short", "long", "empty", "changed"],
)
def test_a_corrupt_stored_file_is_refused_and_left_alone(folder, server, stored):
    path = store(folder, stored)
    file = official(server.url())
    for read in (find, locate, open_data):
        with pytest.raises(CorruptData) as error:
            read(file)
        message = str(error.value)
        assert isinstance(error.value, ValueError)
        for part in (
            str(path),
            file.sha256,
            f"{len(CONTENT)} bytes",
            f"{len(stored)} bytes",
            file.url,
            "Delete",
        ):
            assert part in message
        if len(stored) == len(CONTENT):
            assert hashlib.sha256(stored).hexdigest() in message
    assert path.read_bytes() == stored
    assert server.requests == 0


@pytest.mark.parametrize(
    ("sent", "announced"),
    [(CONTENT[:-1], None), (CONTENT * 2000, None), (CONTENT[:-1] + b"x", None), (CONTENT[:-1], len(CONTENT))],
    ids=["short", "long", "changed", "cut off"],
)
def test_a_corrupt_download_is_refused_and_leaves_nothing(folder, server, sent, announced):
    server.content, server.announced = sent, announced
    with pytest.raises((CorruptData, DataNotFound), match=server.url()) as error:
        locate(official(server.url()))
    assert files(folder) == []
    if len(sent) > 2 * download.CHUNK:  # it was given up long before its end
        assert f"found {len(sent)} bytes" not in str(error.value)


def test_the_checksum_is_computed_once_for_each_version(folder, monkeypatch):
    path = store(folder)
    file = official(None)
    reads = []
    digest = hashlib.file_digest

    def counted(*args):
        reads.append(args)
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    for _ in range(3):
        locate(file)
    assert len(reads) == 1
    path.write_bytes(CONTENT[::-1])  # the same size
    os.utime(path, ns=(0, 0))
    with pytest.raises(CorruptData):
        locate(file)
    assert len(reads) == 2
    path.write_bytes(CONTENT[1:])
    with pytest.raises(CorruptData):
        locate(file)
    assert len(reads) == 2  # a wrong size settles it


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", gzip), (".xz", lzma), (".bz2", bz2)])
def test_a_compressed_copy_is_as_good(folder, server, suffix, codec):
    packed = codec.compress(CONTENT)
    form = StoredForm(NAME + suffix, hashlib.sha256(packed).hexdigest(), len(packed))
    file = official(server.url(), alternates=(StoredForm("room/absent.gz", "0" * 64, 1), form))
    path = store(folder, packed, form.name)
    assert locate(file) == path
    with open_data(file) as stream:
        assert stream.read(3) == CONTENT[:3]
        assert stream.seek(0) == 0
        assert stream.read() == CONTENT
    assert server.requests == 0

    store(folder)
    assert locate(file) == folder / NAME  # the official form comes first
    (folder / NAME).unlink()

    store(folder, packed[:-1] + b"?", form.name)
    with pytest.raises(CorruptData, match=form.name):
        open_data(file)


def test_an_official_file_may_itself_be_compressed(folder, server):
    server.content = gzip.compress(CONTENT)
    file = official(server.url(), server.content, NAME + ".gz")
    with open_data(file) as stream:
        assert stream.read() == CONTENT
    assert (folder / NAME).with_suffix(".csv.gz").read_bytes() == server.content


def test_downloads_at_the_same_time_do_not_disturb_each_other(folder, server):
    both = threading.Barrier(2, timeout=20)
    server.pause = both.wait  # neither goes on before both have written their first half
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(locate, [official(server.url())] * 2))
    assert paths == [folder / NAME] * 2
    assert (folder / NAME).read_bytes() == CONTENT
    assert server.requests == 2
    assert files(folder) == [NAME]


def test_a_process_killed_while_it_downloads_leaves_no_file(folder, server):
    server.content = CONTENT * 1000  # several chunks
    half_sent, go_on = threading.Event(), threading.Event()

    def pause():
        half_sent.set()
        go_on.wait(20)

    server.pause = pause
    file = official(server.url(), server.content)
    child = f"from jaxpapers.data.download import *; locate(OfficialFile{tuple(file)!r})"
    process = subprocess.Popen([sys.executable, "-c", child], env=os.environ | {"no_proxy": "127.0.0.1"})
    assert half_sent.wait(20)
    while not any(folder.rglob("*.part")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert find(file) is None
    go_on.set()
    assert locate(file).read_bytes() == server.content
