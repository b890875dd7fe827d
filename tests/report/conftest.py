import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import ARCH, CYCLES, write_arm, write_store

from raysed.config import DataConfig, Experiment, ModelConfig, SelectConfig
from raysed.io.storage import Storage
from raysed.io.store import Store


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny forward passes wait for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("tiny"))
    write_store(uri)
    return uri


@pytest.fixture(scope="session")
def tiny_run(tiny_store, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("run"))
    active = Experiment(
        run=uri,
        cycles=CYCLES,
        data=DataConfig(uri=tiny_store),
        model=ModelConfig(arch=ARCH),
        select=SelectConfig(strategy="entropy", tiles=6),
    )
    write_arm(Storage(uri), active, Store.open(tiny_store))
    passive = replace(active, select=SelectConfig(strategy="uniform", tiles=6))
    write_arm(Storage(f"{uri}/baseline"), passive, Store.open(tiny_store))
    return uri


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def report_job():
    path = Path(__file__).resolve().parents[2] / "jobs" / "report.py"
    spec = importlib.util.spec_from_file_location("report_job", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.job
