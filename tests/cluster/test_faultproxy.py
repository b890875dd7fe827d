"""Storage behind the fault proxy, before a real SeaweedFS: what retries recover from, and what ends in a stated time."""

import hashlib
import socket
import time
import uuid

import pytest

from raysed.cluster.chaos import small_store as small_store_at
from raysed.cluster.faultproxy import FaultProxy, Rule
from raysed.errors import DataError, StorageError
from raysed.io.ledger import Ledger
from raysed.io.storage import Storage
from raysed.io.store import BadTile, Store, Tile, read_tiles


@pytest.fixture
def proxy(object_server):
    with FaultProxy(object_server.endpoint) as made:
        yield made


@pytest.fixture
def storage(proxy, object_server, monkeypatch):
    """A fresh prefix, reached through the proxy."""
    for name, value in {**object_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
        monkeypatch.setenv(name, value)
    return Storage(f"s3://raysed/{uuid.uuid4().hex[:8]}")


def test_signed_requests_of_every_kind_pass(storage):
    data = bytes(range(256)) * 5000
    storage.write("a/b c+ü.bin", data)
    assert storage.read("a/b c+ü.bin") == data
    assert storage.read_ranges("a/b c+ü.bin", [(5, 10), (700_000, 9)]) == [data[5:15], data[700_000:700_009]]
    assert storage.list() == {"a/b c+ü.bin": len(data)}
    assert storage.size("a/b c+ü.bin") == len(data)
    assert storage.create("token", b"one")
    assert not storage.create("token", b"two")
    storage.remove("token")
    assert not storage.exists("token")


@pytest.mark.parametrize(
    "rule",
    [
        Rule("refuse", seconds=2),
        Rule("slowdown", seconds=2),
        Rule("error", count=2),
        Rule("stall", seconds=1.5),
        Rule("slow", count=2),
        Rule("slowdown", share=0.2, seconds=30),
        Rule("cut", methods=("GET",), count=1),
    ],
    ids=lambda rule: f"{rule.kind}-{rule.seconds or rule.count}",
)
def test_retries_recover_from_a_short_outage(storage, proxy, rule):
    storage.write("a", b"before" * 1000)
    proxy.add(rule)
    for _ in range(30 if rule.share < 1 else 1):
        assert storage.read("a") == b"before" * 1000
    storage.write("b", b"during")
    assert storage.create("c", b"token")
    assert storage.read("b") == b"during"
    if rule.kind != "refuse":  # a closed port sees nothing
        assert proxy.counts()[rule.kind] >= 1


def test_an_error_answer_longer_than_the_bytes_asked_for_is_tried_again(storage, proxy):
    """pyarrow gives up here: the answer does not fit the buffer it reads into."""
    storage.write("a", b"123456")
    proxy.add(Rule("slowdown", methods=("GET",), count=2))
    assert storage.read("a") == b"123456"
    proxy.add(Rule("slowdown", methods=("GET",), count=2))
    assert storage.read_ranges("a", [(1, 2)]) == [b"23"]
    assert proxy.counts() == {"slowdown": 4}


def test_a_commit_whose_answer_was_lost_is_our_own(storage, proxy):
    proxy.add(Rule("lose", methods=("PUT",), path="manifest", count=1))
    assert storage.create("manifest.json", b"ours")
    assert proxy.counts() == {"lose": 1}
    assert not storage.create("manifest.json", b"another's")


def test_a_flipped_byte_has_another_sha256(storage, proxy):
    data = bytes(1000)
    storage.write("a", data)
    proxy.add(Rule("flip", methods=("GET",), count=1))
    flipped = storage.read("a")
    assert len(flipped) == len(data)
    assert hashlib.sha256(flipped).digest() != hashlib.sha256(data).digest()
    assert storage.read("a") == data


def test_bytes_that_changed_on_the_way_are_read_again(storage, proxy):
    small_store_at(storage.uri)
    store = Store.open(storage.uri)
    wanted = store.locations(store.index["tile_id"].to_pylist()[:1])
    proxy.add(Rule("flip", methods=("GET",), path="shards", count=2))
    assert isinstance(read_tiles(storage, wanted, 64)[0], Tile)
    proxy.add(Rule("flip", methods=("GET",), path="shards"))
    assert isinstance(read_tiles(storage, wanted, 64)[0], BadTile)
    proxy.clear()
    ledger = Ledger(storage.at("run"), epoch=0)
    manifest = ledger.commit(0, {"a.bin": bytes(1000)}, dict)
    proxy.add(Rule("flip", methods=("GET",), path="a.bin", count=1))
    assert ledger.read(manifest, "a.bin") == bytes(1000)
    proxy.add(Rule("flip", methods=("GET",), path="a.bin"))
    with pytest.raises(DataError, match="sha256"):
        ledger.read(manifest, "a.bin")


@pytest.mark.parametrize(("kind", "text"), [("expired", "expired"), ("skewed", "too large")])
def test_a_refusal_that_persists_is_one_line_with_the_object(storage, proxy, kind, text):
    proxy.add(Rule(kind))
    denied = "ACCESS_DENIED"  # a read begins with a HEAD, whose answer has no body to say why
    for action, words in ((lambda: storage.read("a"), denied), (lambda: storage.create("a", b"x"), text)):
        began = time.monotonic()
        with pytest.raises(StorageError, match=rf"(?i){storage.uri}/a: .*{words}"):
            action()
        assert time.monotonic() - began < 40


def test_a_store_that_stays_busy_is_not_asked_for_ever(storage, proxy, monkeypatch):
    monkeypatch.setattr("raysed.io.storage._ATTEMPTS", 2)
    monkeypatch.setattr("raysed.io.storage._PATIENCE", 3.0)
    storage.write("a", b"x")
    proxy.add(Rule("slowdown"))
    for action in (
        lambda: storage.read("a"),
        lambda: storage.write("a", b"y"),
        lambda: storage.create("b", b"x"),
    ):
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"503|reduce your request rate"):
            action()
        assert 3 < time.monotonic() - began < 30


@pytest.mark.timeout(120)
def test_a_long_outage_ends_in_a_stated_time(storage, proxy, monkeypatch):
    """With half of the attempts and little patience, to be quick."""
    monkeypatch.setattr("raysed.io.storage._ATTEMPTS", 3)
    monkeypatch.setattr("raysed.io.storage._PATIENCE", 3.0)
    storage.write("a", b"x")
    proxy.add(Rule("refuse"))
    for action in (lambda: storage.read("a"), lambda: storage.create("b", b"x")):
        began = time.monotonic()
        with pytest.raises(StorageError, match="s3://raysed/"):
            action()
        assert time.monotonic() - began < 20


def test_an_outage_is_outlasted_when_the_client_has_no_attempts_left(storage, proxy, monkeypatch):
    """Many reads at once use up the budget of retries that the client library has for all of them."""
    storage.write("a", b"x")
    monkeypatch.setattr("raysed.io.storage._ATTEMPTS", 1)
    fresh = Storage(storage.uri)
    for action in (
        lambda: fresh.read("a") == b"x",
        lambda: fresh.create("b", b"y"),
        lambda: fresh.exists("b"),
    ):
        proxy.add(Rule("refuse", seconds=4))
        assert action()


def test_nobody_else_is_given_the_port_while_it_refuses(proxy):
    proxy.add(Rule("refuse"))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", proxy.port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    proxy.clear()
    socket.create_connection(("127.0.0.1", proxy.port), timeout=5).close()
