"""Jobs whose data and run are in a bucket of a real SeaweedFS."""

import json
import shutil
import time
import zipfile

import numpy as np
import pytest
import rasterio
from processes import FAST, ROOT, STABLE, error_line, kill_at, run, run_here, start

from raysed.cluster.chaos import small_store as small_store_at
from raysed.cluster.faultproxy import FaultProxy, Rule
from raysed.cluster.prepare import Settings, prepare, synthetic
from raysed.config import DataConfig, Experiment, ModelConfig
from raysed.core.networks import build
from raysed.errors import StorageError
from raysed.io.checkpoint import pack
from raysed.io.ledger import Ledger, difference, verify
from raysed.io.storage import Storage
from raysed.io.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_head")]


def beyond_the_policy(prefix):
    """What worker-policy.json forbids a job, and all but reading of its data."""
    name, _, folder = prefix.partition("/")
    below = rf"prefix={folder}(%2F|/)(tiles|run)"
    return (
        Rule("denied", path=rf"^/{name}/?(\?(?!.*{below})|$)"),
        Rule("denied", path=rf"^/{name}/(?!{folder}/(tiles|run)/|\?|$)"),
        Rule("denied", path=rf"^/{name}/{folder}/tiles/", methods=("PUT", "POST", "DELETE")),
        Rule("denied", path=r"^/(\?|$)"),
    )


@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_with_the_least_rights_killed_inside_a_cycle_equals_the_undisturbed_run_on_disk(  # noqa: PLR0917
    ray_session, object_server, bucket, tmp_path, monkeypatch, capsys
):
    """With by-product scores and averaged weights: visits, ages and the weights in training are in the ledger, the tiles that batch norm is
    estimated from are drawn again.
    """
    flags = ["--source", "synthetic", "--scenes", "10", "--tile", "64", "--json"]
    flags += ["--target", f"{bucket}/tiles"]
    remote = run_here(monkeypatch, capsys, "prepare", *flags, code=0)
    disk = prepare(None, synthetic(10), str(tmp_path / "tiles"), Settings(tile=64), say=lambda _: None)
    assert json.loads(remote.stdout) == disk
    flags = ["--cycles", "3", "--select", "entropy", "--select.scores", "byproduct", *FAST, *STABLE]
    flags += ["--cluster.commit-every-steps", "1"]
    where = ["--data", str(tmp_path / "tiles"), "--run", str(tmp_path / "run")]
    run_here(monkeypatch, capsys, "active", *flags, *where, code=0)
    with FaultProxy(object_server.endpoint) as proxy:
        for rule in beyond_the_policy(bucket.removeprefix("s3://")):
            proxy.add(rule)
        by_proxy = object_server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
        by_proxy |= {"RAYSED_DATA": f"{bucket}/tiles", "RAYSED_RUN": f"{bucket}/run"}
        kill_at("train@2", "active", *flags, **by_proxy)
        steps = [p for p in Storage(f"{bucket}/run").list("cycle_0002") if p.endswith("manifest.json")]
        assert steps == ["cycle_0002/step_000001/manifest.json"]
        done = run("active", *flags, **by_proxy)
        assert "continues after cycle 2 of 3 and step 1 of cycle 3" in done.stdout
        assert proxy.requests > 20
        assert [(i.method, i.path) for i in proxy.injected] == []
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for beyond in (
            lambda: Storage("s3://raysed").list(),
            lambda: Storage(bucket).list(),
            lambda: Storage(f"{bucket}/tiles").create("new", b"x"),
            lambda: Storage(f"{bucket}/elsewhere").create("new", b"x"),
        ):
            with pytest.raises(StorageError, match=r"ACCESS_DENIED|Access Denied"):
                beyond()
        monkeypatch.undo()
    secret = object_server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    kept = Storage(bucket)
    assert [path for path in kept.list() if secret in kept.read(path)] == []
    logs = [p for p in (ray_session.session / "session_latest/logs").rglob("*") if p.is_file()]
    assert len(logs) > 10
    assert [p for p in logs if secret in p.read_bytes()] == []
    assert f"report   {bucket}/run/report.html" in done.stdout
    there, here = Ledger(Storage(f"{bucket}/run")), Ledger(Storage(str(tmp_path / "run")))
    assert difference(there, here) == []
    assert verify(there, Store.open(f"{bucket}/tiles").split("train")) == []
    left = there.storage.list()
    assert {"summary.json", "cycles.jsonl", "report.html"} <= left.keys()
    assert [p for p in left if p.startswith("tensorboard/")]
    assert not [p for p in left if "step_" in p]
    scored = [m.record["scores"]["tiles"] for m in there.manifests()]
    assert scored == [128, 37, 37]  # 24 visited and 13 oldest
    verified = run_here(monkeypatch, capsys, "report", f"{bucket}/run", "--verify", code=0)
    assert "verified: 3 cycles" in verified.stdout


def write_run(bucket):
    """A store and a run of one cycle over it, untrained."""
    small_store_at(f"{bucket}/tiles")
    experiment = Experiment(
        run=f"{bucket}/run",
        data=DataConfig(uri=f"{bucket}/tiles"),
        model=ModelConfig(arch="unet:tu-test_resnet"),
        cycles=1,
    )
    ledger = Ledger(Storage(experiment.run), epoch=0)
    ledger.open(experiment, Store.open(experiment.data.uri).dataset.content_hash)
    weights = pack(build(experiment.model.arch, 8, seed=0).state_dict())
    ledger.commit(0, {"model.safetensors": weights}, lambda: {"val": {"miou": 0.1, "iou": {}}})


def write_scene(storage, path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 200, 220), np.uint8)
    shape = {"count": 3, "height": 200, "width": 220, "dtype": "uint8"}
    with rasterio.MemoryFile() as file:
        with file.open(driver="GTiff", **shape, crs="EPSG:32640", transform=place(seed)) as made:
            made.write(pixels)
        storage.write(path, file.read())


def place(seed):
    return rasterio.Affine(0.5, 0, 325000 + 200 * seed, 0, -0.5, 2785000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_is_exported_and_maps_a_bucket_of_images_though_it_is_killed(object_server, bucket):
    write_run(bucket)
    done = run("export", f"{bucket}/run", "--target", f"{bucket}/models/first", **object_server.environment)
    assert f"{bucket}/models/first: unet:tu-test_resnet after cycle 0" in done.stdout
    names = [f"{'north' if i % 2 else 'south/far'}/scene_{i}" for i in range(24)]
    for seed, name in enumerate(names):
        write_scene(Storage(f"{bucket}/scenes"), f"{name}.tif", seed)
    Storage(f"{bucket}/scenes").write("north/notes.txt", b"no image")
    flags = [f"{bucket}/models/first", "--source", f"{bucket}/scenes/**/*.tif", "--target", f"{bucket}/maps"]
    flags += ["--entropy", "--json"]
    maps = Storage(f"{bucket}/maps")
    maps_there = lambda: {p: s for p, s in maps.look_below().items() if p[:-4] in names}  # noqa: E731
    process = start("predict", *flags, **object_server.environment)
    while not maps_there():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = maps_there()
    done = run("predict", *flags, **object_server.environment)
    result = json.loads(done.stdout)
    assert result["bad"] == {}
    assert 0 < result["there before"] < len(names)
    assert result["maps"] + result["there before"] == len(names)
    after = maps_there()
    assert before.items() <= after.items()
    assert sorted(after) == sorted(f"{name}.tif" for name in names)
    for seed, name in enumerate(names):
        for path in (f"{name}.tif", f"{name}.entropy.tif"):
            with rasterio.MemoryFile(maps.read(path)) as file, file.open() as made:
                assert (made.crs.to_epsg(), made.transform) == (32640, place(seed))
                assert (made.width, made.height) == (220, 200)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_an_object_deleted_between_index_and_read_ends_with_code_4(bucket, monkeypatch, capsys):
    small_store_at(f"{bucket}/tiles")
    Storage(bucket).remove("tiles/shards/part-00001.parquet")
    flags = ["--data", f"{bucket}/tiles", "--run", f"{bucket}/run", "--cycles", "1", *FAST]
    done = run_here(monkeypatch, capsys, "active", *flags, code=4)
    assert "shard shards/part-00001.parquet is missing" in error_line(done)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("change", "argv", "code"),
    [
        pytest.param({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, [], 6, marks=pytest.mark.slow),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, [], 6),
        ({}, ["--data", "s3://no-such-bucket/tiles"], 2),
        ({}, ["--run", "s3://no-such-bucket/run"], 6),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(bucket, monkeypatch, capsys, change, argv, code):  # noqa: PLR0917
    small_store_at(f"{bucket}/tiles")
    began = time.monotonic()
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    flags = ["--data", f"{bucket}/tiles", "--run", f"{bucket}/run", "--cycles", "1", *FAST, *argv]
    done = run_here(monkeypatch, capsys, "train", *flags, code=code)
    assert "s3://" in error_line(done)
    assert "wrong-secret" not in done.stderr
    assert time.monotonic() - began < 90


def test_what_ray_job_submit_would_upload_holds_no_data_and_no_keys(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    for name in ("jobs/active.py", "raysed/a.py", "pyproject.toml", "constraints.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("kept")
    for name in (".git/config", ".venv/bin/python", "data/x.parquet", "runs/a/model.safetensors", "results/x.svg", "key.pem",
                 ".env", ".aws/credentials", "id_rsa", "server.key", ".netrc"):  # fmt: skip
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret or large")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, project / name)
    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=True)
    with zipfile.ZipFile(package) as zipped:
        names = {n for n in zipped.namelist() if not n.endswith("/")}
    kept = {n for n in names if (project / n).exists() and (project / n).read_text() == "kept"}
    assert len(kept) == 4
    assert not [n for n in names if (project / n).exists() and "secret" in (project / n).read_text()]
