import multiprocessing
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raysed.core.networks import Network, UNet
from raysed.core.plan import plan
from raysed.core.randomness import keyed_rng
from raysed.core.step import BatchNormStatistics, Learner, MicroBatch, learning_rate, to_device

SIDE, CLASSES, BATCH, MICRO = 16, 3, 8, 2
IDS = [f"t{i}" for i in range(21)]  # the last step has 5 tiles: micro-batches of 2, 2, 1 and none


def small_net(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    if norm:
        return Network(UNet(CLASSES, widths=(4, 8)), ((0.5,) * 3, (0.5,) * 3), 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))


def tile(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = keyed_rng("tile", number)
    label = rng.integers(0, CLASSES + 1, (SIDE, SIDE)).astype(np.uint8)  # a quarter of the pixels is void
    image = np.clip(label[..., None] * 60 + rng.integers(0, 60, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    return image, label


def train(rank: int, workers: int, *, norm: bool, ordered: bool, steps: int) -> Learner:
    torch.set_num_threads(1)
    alpha = np.array([0.5, 1.0, 1.5], np.float32)
    learner = Learner(
        small_net(norm), alpha=alpha, gamma=2, batch=BATCH, precision="fp32", ordered_sums=ordered
    )
    order = plan(IDS, 0, 0, BATCH, MICRO)
    for step in range(steps):
        micro = []
        for number, positions in order.micro_batches(step, rank, workers):
            pairs = [tile(p) for p in positions] or [
                (np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8))
            ]
            images, labels = (np.stack(x) for x in zip(*pairs, strict=True))
            micro.append(MicroBatch(number, *to_device(images, labels, torch.device("cpu"))))
        tiles = min(BATCH, len(IDS) - step * BATCH)
        learner.step(micro, lr=1e-2, key=("k", step), total=-(-tiles // MICRO))
    return learner


def gradients(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.parameters.values()])


def _rank(rank: int, workers: int, port: int, folder: str, kinds: list[dict]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    for k, kind in enumerate(kinds):
        learner = train(rank, workers, **kind)
        torch.save({"grad": gradients(learner), **learner.weights()}, f"{folder}/{k}-{rank}.pt")
    dist.destroy_process_group()


KINDS = [
    {"norm": False, "ordered": False, "steps": 1},
    {"norm": False, "ordered": False, "steps": 3},
    {"norm": True, "ordered": False, "steps": 1},
    {"norm": True, "ordered": True, "steps": 3},
]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    folder, workers = tmp_path_factory.mktemp("ranks"), request.param
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # torch is imported once
    arguments = (workers, 29500 + os.getpid() % 1000 + workers, str(folder), KINDS)
    mp.start_processes(_rank, arguments, nprocs=workers, start_method="forkserver")
    return [
        [torch.load(folder / f"{k}-{r}.pt", weights_only=True) for r in range(workers)]
        for k in range(len(KINDS))
    ]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_gradients_of_many_workers_equal_those_of_one(ranks, kind):
    alone = gradients(train(0, 1, **KINDS[kind]))
    for other in ranks[kind]:
        assert torch.allclose(other["grad"], alone, rtol=1e-4, atol=1e-7)
    assert alone.abs().max() > 1e-5


def test_running_statistics_do_not_depend_on_the_worker_count(ranks):
    alone = train(0, 1, **KINDS[2]).weights()
    for other in ranks[2]:
        for name in alone:
            if "running" in name:
                assert torch.allclose(other[name], alone[name], rtol=1e-5)


def test_ordered_sums_are_bit_equal_for_any_worker_count(ranks):
    alone = train(0, 1, **KINDS[3]).weights()
    for other in ranks[3]:
        assert all(torch.equal(other[name], alone[name]) for name in alone)


def test_young_running_statistics_are_the_mean_of_what_was_seen_then_a_moving_average():
    net = small_net(norm=True)
    norm = BatchNormStatistics(net)
    seen = [torch.full_like(norm.flat, float(v)) for v in (4, 8, 3)]
    norm.merge(norm.now(), seen[:2])
    assert norm.flat.unique().tolist() == [6]
    norm.merge(norm.now(), seen[2:])
    assert norm.flat.unique().tolist() == [5]
    for _ in range(20):
        norm.merge(norm.now(), seen[:1])
    before = norm.flat.clone()
    norm.merge(norm.now(), seen[1:2])
    assert torch.allclose(norm.flat, torch.lerp(before, seen[1], 0.1))  # the layers' own momentum
    assert net.net.down[0][1].num_batches_tracked == 24


def test_one_micro_batch_gives_the_statistics_of_that_batch():
    learner = train(0, 1, norm=True, ordered=False, steps=0)
    x, y = to_device(*(np.stack(v) for v in zip(*map(tile, range(2)), strict=True)), torch.device("cpu"))
    learner.step([MicroBatch(0, x, y)], lr=0.0, key=("k",), total=1)
    first = learner.net.net.down[0]
    own = first[0]((x - learner.net.mean) / learner.net.std)
    assert torch.allclose(first[1].running_mean, own.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first[1].running_var, own.var((0, 2, 3)), rtol=1e-4)


def test_overfits_one_batch_and_resumes_bit_equal():
    images, labels = (np.stack(x) for x in zip(*map(tile, range(4)), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))

    def fresh() -> Learner:
        return Learner(small_net(True), alpha=np.ones(3, np.float32), gamma=2, batch=4, precision="fp32")

    def losses(learner: Learner, steps: range) -> list[float]:
        sums = [learner.step([MicroBatch(0, x, y)], lr=2e-2, key=("o", s), total=1) for s in steps]
        return [(loss / pixels).item() for loss, pixels in sums]

    one = fresh()
    first = losses(one, range(30))
    assert first[-1] < first[0] / 4
    saved, moments = one.weights(), one.optimizer_state()
    rest = losses(one, range(30, 36))
    other = fresh()
    other.load_weights(saved)
    other.load_optimizer_state(moments)
    assert losses(other, range(30, 36)) == rest
    assert all(torch.equal(v, other.weights()[k]) for k, v in one.weights().items())


def test_evaluation_ignores_void_and_counts_every_known_pixel():
    learner = train(0, 1, norm=True, ordered=False, steps=1)
    batches = [
        to_device(*(np.stack(x) for x in zip(*map(tile, r), strict=True)), torch.device("cpu"))
        for r in (range(3), range(3, 5))
    ]
    totals = learner.evaluate(batches)
    known = sum(int((y < CLASSES).sum()) for _, y in batches)
    assert totals.counts.sum() == known == totals.sums[1]
    assert totals.sums[3] == 2


def test_cosine_starts_at_the_base_and_ends_near_zero():
    rates = [learning_rate(1.0, "cosine", s, 100) for s in range(100)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-3
    assert learning_rate(0.3, "constant", 99, 100) == 0.3
