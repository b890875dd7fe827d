import asyncio
import itertools
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from raysed.errors import StorageError, UsageError
from raysed.io.storage import Storage, coalesce


@pytest.fixture(params=["disk", "bucket"])
def storage(request, tmp_path):
    """Every operation on both kinds; the bucket is a real SeaweedFS."""
    if request.param == "bucket":
        return Storage(request.getfixturevalue("bucket") + "/root")
    return Storage(str(tmp_path / "root"))


@pytest.fixture
def impatient(monkeypatch):
    """Two attempts instead of six, and not again for long."""
    monkeypatch.setattr("raysed.io.storage._ATTEMPTS", 2)
    monkeypatch.setattr("raysed.io.storage._PATIENCE", 1.0)


def test_write_read_list_remove(storage):
    storage.write("a/b.bin", b"one")
    storage.write("a/b.bin", b"two!")
    storage.write("c.bin", b"")
    assert storage.read("a/b.bin") == b"two!"
    assert storage.list() == {"a/b.bin": 4, "c.bin": 0}
    assert storage.list("a") == {"a/b.bin": 4}
    assert storage.exists("a/b.bin")
    storage.remove("a/b.bin")
    storage.remove("a/b.bin")
    assert not storage.exists("a/b.bin")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.bin")


def test_one_object_is_seen_as_in_a_listing_and_not_once_it_is_replaced(storage):
    storage.write("a/x.bin", b"one")
    seen = storage.look("a/x.bin")
    assert storage.look_below() == {"a/x.bin": seen}
    time.sleep(1.1)
    storage.write("a/x.bin", b"two")
    assert storage.look("a/x.bin").size == seen.size
    assert storage.look("a/x.bin").changed > seen.changed
    with pytest.raises(FileNotFoundError):
        storage.look("a/y.bin")


def test_create_has_one_winner_among_racing_threads(storage):
    barrier, won = threading.Barrier(8), []

    def race(number: int) -> None:
        barrier.wait()
        if storage.create("manifest.json", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1
    assert storage.read("manifest.json") == b"%d" % won[0]


@pytest.mark.parametrize("lost", [1, 9])
def test_a_put_that_met_another_which_came_to_nothing_is_made_again(bucket, monkeypatch, impatient, lost):
    """S3 answers 409 to one of two puts at a time, and the other may fail."""
    storage, puts, put = Storage(bucket), [], Storage(bucket)._s3fs.pipe_file

    def conflicting(full, data, mode):
        puts.append(full)
        if len(puts) <= lost:
            answer = {"Error": {"Code": "ConditionalRequestConflict"}}
            raise OSError(22, "conflict") from ClientError(answer, "PutObject")
        put(full, data, mode=mode)

    monkeypatch.setattr(storage._s3fs, "pipe_file", conflicting)
    if lost > 2:
        with pytest.raises(StorageError, match="2 puts met another one"):
            storage.create("x", b"data")
        return
    assert storage.create("x", b"data")
    assert storage.read("x") == b"data"


def test_a_put_that_finds_an_object_it_cannot_read_names_it(bucket, monkeypatch, impatient):
    storage = Storage(bucket)
    storage.write("x", b"other")

    def unreadable(full):
        raise OSError("SLOW_DOWN")

    monkeypatch.setattr(storage, "_read", unreadable)
    with pytest.raises(StorageError, match=f"{bucket}/x: SLOW_DOWN"):
        storage.create("x", b"data")


def test_a_failed_write_leaves_the_old_bytes_and_no_litter(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "root"))
    storage.write("x", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Exception, match="No space left"):
        storage.write("x", b"new")
    monkeypatch.undo()
    assert storage.read("x") == b"old"
    assert [p.name for p in Path(storage.uri).iterdir()] == ["x"]


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 50)), min_size=1), st.integers(0, 60))
def test_coalesced_requests_cover_all_spans_and_keep_apart(spans, gap):
    requests = coalesce(spans, gap)
    for offset, length in spans:
        assert any(start <= offset and offset + length <= start + size for start, size in requests)
    for (a, size), (b, _) in itertools.pairwise(requests):
        assert b - (a + size) > gap


def test_ranges_come_back_in_the_order_asked_for(storage):
    data = bytes(range(256)) * 100
    storage.write("x", data)
    spans = [(20000, 10), (5, 3), (5, 8), (25590, 20), (6, 1)]
    assert storage.read_ranges("x", spans) == [data[o : o + n] for o, n in spans]


OPERATIONS = {
    "read": lambda s: s.read("x"),
    "read_ranges": lambda s: s.read_ranges("x", [(0, 4)]),
    "write": lambda s: s.write("x", b"data"),
    "create": lambda s: s.create("x", b"data"),
    "list": lambda s: s.list(),
    "exists": lambda s: s.exists("x"),
    "remove": lambda s: s.remove("x"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_secret_is_one_line_that_names_the_object(bucket, monkeypatch, impatient, operation):
    Storage(bucket).write("x", b"data")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError) as failed:
        OPERATIONS[operation](Storage(bucket))
    assert str(failed.value).startswith(f"{bucket}/" if operation != "list" else bucket)
    assert "\n" not in str(failed.value)
    assert "wrong" not in str(failed.value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unreachable_endpoint_is_one_line_in_bounded_time(bucket, monkeypatch, impatient, operation):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(StorageError) as failed:
        OPERATIONS[operation](Storage(bucket))
    assert "\n" not in str(failed.value)
    assert time.monotonic() - began < 20


def test_endpoint_and_credentials_of_a_profile_hold_for_every_operation(bucket, monkeypatch, tmp_path):
    lines = {
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
        "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "region": "eu-north-1",
    }
    config = tmp_path / "config"
    config.write_text("[profile sea]\n" + "".join(f"{k} = {v}\n" for k, v in lines.items()))
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "sea")
    storage = Storage(bucket)
    assert storage.create("x", b"data")
    storage.write("y", b"more")
    assert (storage.read("x"), storage.list()) == (b"data", {"x": 4, "y": 4})


def test_a_profile_that_there_is_none_of_is_named(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="nobody"):
        Storage("s3://bucket/x").read("x")


@pytest.mark.parametrize("operation", ["write", "create"])
def test_a_missing_bucket_is_refused(bucket, impatient, operation):
    with pytest.raises(StorageError, match="no-such-bucket"):
        OPERATIONS[operation](Storage("s3://no-such-bucket/x"))


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://key:secret@bucket/x", "no credentials"),
        ("s3://bucket/x?access_key=1", "no credentials"),
        ("gs://bucket/x", "scheme must be"),
        ("s3://", "no valid bucket"),
        ("s3://Bad_Bucket/x", "no valid bucket"),
    ],
)
def test_bad_uris_are_refused_without_repeating_secrets(uri, text):
    with pytest.raises(UsageError, match=text) as caught:
        Storage(uri)
    assert "secret" not in str(caught.value)


@given(st.text(max_size=30))
def test_no_path_leaves_its_root(path):
    storage = Storage("s3://bucket/root")
    try:
        full = storage._full(path)
    except UsageError:
        return
    assert full.startswith("bucket/root/")
    assert ".." not in full.split("/")
    assert "\0" not in full


def test_a_storage_pickles_as_its_uri():
    assert pickle.loads(pickle.dumps(Storage("s3://bucket/x"))).uri == "s3://bucket/x"


def test_an_uploaded_file_replaces_the_old_bytes(tmp_path):
    storage = Storage(str(tmp_path / "root"))
    storage.write("deep/map.tif", b"old")
    (tmp_path / "made").write_bytes(b"new" * 1000)
    storage.upload("deep/map.tif", str(tmp_path / "made"))
    assert storage.read("deep/map.tif") == b"new" * 1000
    with pytest.raises(FileNotFoundError):
        storage.upload("deep/map.tif", str(tmp_path / "none"))
    assert storage.list() == {"deep/map.tif": 3000}
    assert list((tmp_path / "root/deep").iterdir()) == [tmp_path / "root/deep/map.tif"]


def test_an_upload_that_is_interrupted_leaves_nothing(bucket, tmp_path, monkeypatch):
    """As by SIGTERM, of which Ray makes a SystemExit wherever a task is."""
    import s3fs

    storage, call = Storage(bucket), s3fs.S3FileSystem._call_s3
    (tmp_path / "map").write_bytes(bytes(20 << 20))

    async def interrupted(self, method, *args, **kwargs):
        if method == "upload_part" and kwargs["PartNumber"] == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(30)
        return await call(self, method, *args, **kwargs)

    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(s3fs.S3FileSystem, "_call_s3", interrupted)
            with pytest.raises(SystemExit):
                storage.upload("map", str(tmp_path / "map"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not storage.exists("map")
    storage.upload("map", str(tmp_path / "map"))
    assert storage.size("map") == 20 << 20
