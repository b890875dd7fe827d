import multiprocessing
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raysed.core.averaging import decay_after
from raysed.core.batchnorm import BatchNormStatistics
from raysed.core.counts import class_sums
from raysed.core.networks import Network, UNet
from raysed.core.plan import plan
from raysed.core.randomness import keyed_rng
from raysed.core.step import (
    Learner,
    MicroBatch,
    common_precision,
    learning_rate,
    resolve_precision,
    to_device,
)

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


STABLE = {"ema": 0.9, "clip": 0.05, "weight_decay": 0.1}


def train(rank: int, workers: int, *, norm: bool, ordered: bool, steps: int, stable: bool = False) -> Learner:
    torch.set_num_threads(1)
    alpha = np.array([0.5, 1.0, 1.5], np.float32)
    learner = Learner(
        small_net(norm),
        alpha=alpha,
        gamma=2,
        batch=BATCH,
        precision="fp32",
        ordered_sums=ordered,
        **(STABLE if stable else {}),
    )
    order = plan(IDS, 0, 0, BATCH, MICRO)
    seen = []
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
        seen.append(([(m.number, m.images) for m in micro], -(-tiles // MICRO)))
    learner.estimate(seen if stable else [])
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
    {"norm": True, "ordered": True, "steps": 3, "stable": True},
    {"norm": False, "ordered": False, "steps": 1, "stable": True},
]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.alone)])
def ranks(request, tmp_path_factory):
    folder, workers = tmp_path_factory.mktemp("ranks"), request.param
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # torch is imported once
    arguments = (workers, 29500 + os.getpid() % 1000 + workers, str(folder), KINDS)
    mp.start_processes(_rank, arguments, nprocs=workers, start_method="forkserver")
    return [
        [torch.load(folder / f"{k}-{r}.pt", weights_only=True) for r in range(workers)]
        for k in range(len(KINDS))
    ]


def test_a_step_counts_pixels_by_class_where_asked_for():
    learner = Learner(
        small_net(False), alpha=np.ones(CLASSES, np.float32), gamma=2, batch=2, precision="fp32"
    )
    images, labels = (np.stack(x) for x in zip(tile(0), tile(1), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))
    wanted = class_sums(learner.net(x).argmax(1), y, CLASSES)
    done = learner.step(
        [MicroBatch(0, x[:1], y[:1]), MicroBatch(1, x[1:], y[1:])], lr=0.0, key=("k",), total=2, by_class=True
    )
    assert done[2:].tolist() == wanted.tolist()
    plain = learner.step(
        [MicroBatch(0, x[:1], y[:1]), MicroBatch(1, x[1:], y[1:])], lr=0.0, key=("k",), total=2
    )
    assert plain.tolist() == done[:2].tolist()


@pytest.mark.parametrize("kind", [0, 1, 2, 5])
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


@pytest.mark.parametrize("kind", [3, 4])
def test_ordered_sums_are_bit_equal_for_any_worker_count(ranks, kind):
    alone = train(0, 1, **KINDS[kind]).weights()
    for other in ranks[kind]:
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


@pytest.mark.parametrize("extra", [{}, STABLE], ids=["plain", "stable"])
def test_overfits_one_batch_and_resumes_bit_equal(extra):
    images, labels = (np.stack(x) for x in zip(*map(tile, range(4)), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))

    def fresh() -> Learner:
        return Learner(
            small_net(True), alpha=np.ones(3, np.float32), gamma=2, batch=4, precision="fp32", **extra
        )

    def losses(learner: Learner, steps: range) -> list[float]:
        sums = [learner.step([MicroBatch(0, x, y)], lr=2e-2, key=("o", s), total=1) for s in steps]
        return [(loss / pixels).item() for loss, pixels in sums]

    one = fresh()
    first = losses(one, range(30))
    assert first[-1] < first[0] / 2 if extra else first[-1] < first[0] / 4
    one.estimate([([(0, x)], 1)] if extra else [])
    saved, moments = one.weights(), one.optimizer_state()
    rest = losses(one, range(30, 36))
    other = fresh()
    other.load_weights(saved)
    other.load_optimizer_state(moments)
    assert losses(other, range(30, 36)) == rest
    assert all(torch.equal(v, other.weights()[k]) for k, v in one.weights().items())


@pytest.mark.parametrize("extra", [{}, STABLE], ids=["plain", "stable"])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(extra):
    images, labels = (np.stack(x) for x in zip(*map(tile, range(4)), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))
    learner = Learner(small_net(True), alpha=np.ones(3, np.float32), gamma=2, batch=4, precision="fp32", **extra)  # fmt: skip
    good = [MicroBatch(0, x, y)]
    learner.step(good, lr=1e-2, key=("o", 0), total=1)
    before, moments = learner.weights(), learner.optimizer_state()
    for count in (1, 2):
        done = learner.step([MicroBatch(0, x * torch.nan, y)], lr=1e-2, key=("o", count), total=1)
        assert done.tolist() == [0, 0]
        assert learner.skipped == count
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())
    assert all(torch.equal(v, moments[k]) for k, v in learner.optimizer_state().items())
    assert learner.step(good, lr=1e-2, key=("o", 3), total=1)[1] > 0
    assert learner.skipped == 0


@pytest.mark.parametrize("extra", [{}, STABLE], ids=["plain", "stable"])
def test_an_overflow_in_fp16_changes_nothing_but_the_scale(extra):
    """A loss scaler on the CPU stands for the GPU's; the forward pass overflows as one in fp16 may."""
    images, labels = (np.stack(x) for x in zip(*map(tile, range(4)), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))

    def fresh() -> Learner:
        made = Learner(
            small_net(True), alpha=np.ones(3, np.float32), gamma=2, batch=4, precision="fp32", **extra
        )
        made.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        return made

    learner = fresh()
    good, bad = [MicroBatch(0, x, y)], [MicroBatch(0, x * torch.inf, y)]
    learner.step(good, lr=1e-2, key=("o", 0), total=1)
    before = learner.weights()
    for scale, skipped in ((2.0, 0), (1.0, 0), (0.5, 1)):  # a scale below 1 is no longer to blame
        done = learner.step(bad, lr=1e-2, key=("o", 1), total=1)
        assert done.tolist() == [0, 0]
        assert (learner.scaler.get_scale(), learner.skipped) == (scale, skipped)
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())
    learner.step(good, lr=1e-2, key=("o", 2), total=1)
    assert learner.skipped == 0
    other = fresh()
    other.load_weights(learner.weights())
    other.load_optimizer_state(learner.optimizer_state())
    for step in (3, 4, 5):
        own = [one.step(good, lr=1e-2, key=("o", step), total=1) for one in (learner, other)]
        assert torch.equal(*own)
        assert learner.scaler.get_scale() == other.scaler.get_scale()
    assert learner.scaler.get_scale() == 1.0


def test_a_fused_step_is_adam_s_and_keeps_the_layout_of_the_weights():
    """Fused kernels walk the memory of weight, gradient and moments side by side."""
    learner = train(0, 1, norm=True, ordered=True, steps=1)
    plain = {n: p.detach().clone().requires_grad_() for n, p in learner.parameters.items()}
    adam = torch.optim.AdamW(plain.values(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
    for own, p in zip(plain.values(), learner.parameters.values(), strict=True):
        own.grad = p.grad.clone()
        adam.state[own] = {k: v.clone() for k, v in learner.adam.state[p].items()}
        assert p.stride() == p.grad.stride() == learner.adam.state[p]["exp_avg"].stride()
    assert any(p.ndim == 4 and not p.is_contiguous() for p in plain.values())
    learner.adam.step()
    adam.step()
    for name, own in plain.items():
        torch.testing.assert_close(learner.parameters[name], own)


def test_a_state_from_before_the_first_step_can_be_continued():
    one, other = (train(0, 1, norm=True, ordered=False, steps=0) for _ in range(2))
    other.load_optimizer_state(one.optimizer_state())
    assert other.optimizer_state() == {}


def test_the_average_is_the_recursion_and_is_what_is_evaluated_and_committed():
    learner = train(0, 1, norm=True, ordered=False, steps=0, stable=True)
    images, labels = (np.stack(x) for x in zip(*map(tile, range(2)), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))
    name = "net.head.weight"
    wanted = learner.net.state_dict()[name].clone()
    for step, decay in enumerate([0.1, 2 / 11, 0.25]):
        learner.step([MicroBatch(0, x, y)], lr=1e-2, key=("k", step), total=1)
        wanted = decay * wanted + (1 - decay) * learner.net.state_dict()[name]
    assert torch.allclose(learner.weights()[name], wanted, rtol=1e-5)
    assert not torch.allclose(learner.net.state_dict()[name], wanted, rtol=1e-3)
    before = learner.predict(x)
    with torch.no_grad():
        learner.net.net.head.weight.zero_()
    assert torch.equal(learner.predict(x), before)
    assert decay_after(0.9, 1000) == 0.9


def test_estimated_statistics_are_those_of_the_averaged_weights():
    learner = train(0, 1, norm=True, ordered=False, steps=2, stable=True)
    parts = [to_device(*(v[None] for v in tile(i)), torch.device("cpu"))[0] for i in range(3)]
    running = learner.norm.flat.clone()
    learner.estimate([([(0, parts[0]), (1, parts[1])], 2), ([(0, parts[2]), (1, parts[0])], 1)])
    first = learner.served.net.down[0]
    own = [first[0]((p - learner.served.mean) / learner.served.std) for p in parts]
    means = torch.stack([o.mean((0, 2, 3)) for o in own]).mean(0)
    assert torch.allclose(first[1].running_mean, means, atol=1e-5)
    assert torch.equal(learner.norm.flat, running)


def test_clipping_bounds_the_norm_and_decay_spares_biases():
    images, labels = (np.stack(x) for x in zip(*map(tile, range(2)), strict=True))
    x, y = to_device(images, labels, torch.device("cpu"))
    alpha = np.ones(3, np.float32)
    clipped = Learner(small_net(False), alpha=alpha, gamma=2, batch=4, precision="fp32", clip=1e-3)
    free = Learner(small_net(False), alpha=alpha, gamma=2, batch=4, precision="fp32")
    for learner in (clipped, free):
        learner.step([MicroBatch(0, x, y)], lr=1e-2, key=("k",), total=1)
    assert gradients(clipped).norm().item() == pytest.approx(1e-3, rel=1e-3)
    one, other = gradients(clipped), gradients(free)
    assert nn.functional.cosine_similarity(one, other, dim=0) > 0.9999
    decayed = Learner(small_net(False), alpha=alpha, gamma=2, batch=4, precision="fp32", weight_decay=0.5)
    before = small_net(False).state_dict()
    decayed.step([MicroBatch(0, x, y)], lr=1e-2, key=("k",), total=1)
    for name, weight in decayed.weights().items():
        shrunk = 5e-3 * before[name] if weight.ndim > 1 else 0
        assert torch.allclose(free.weights()[name] - weight, shrunk + torch.zeros_like(weight), atol=1e-7)


def test_evaluation_ignores_void_and_counts_every_known_pixel():
    learner = train(0, 1, norm=True, ordered=False, steps=1)
    batches = [
        to_device(*(np.stack(x) for x in zip(*map(tile, r), strict=True)), torch.device("cpu"))
        for r in (range(3), range(3, 5))
    ]
    groups = [torch.tensor([0, 1, 1]), torch.tensor([2, 0])]
    totals = learner.evaluate([(*b, g) for b, g in zip(batches, groups, strict=True)], 3)
    own = [
        learner.evaluate([(x[k : k + 1], y[k : k + 1], torch.zeros(1))], 1)
        for x, y in batches
        for k in range(len(x))
    ]
    assert torch.equal(totals.counts[1], own[1].counts[0] + own[2].counts[0])
    assert torch.equal(totals.counts[0], own[0].counts[0] + own[4].counts[0])
    known = sum(int((y < CLASSES).sum()) for _, y in batches)
    assert totals.counts.sum() == known == totals.sums[1]
    assert totals.sums[3] == 2


def test_cosine_starts_at_the_base_and_ends_near_zero():
    rates = [learning_rate(1.0, "cosine", s, 100) for s in range(100)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-3
    assert learning_rate(0.3, "constant", 99, 100) == 0.3


@pytest.mark.parametrize(
    ("matrices", "vectors", "native"),
    [(True, True, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_is_the_precision_in_which_this_cpu_is_fastest(monkeypatch, matrices, vectors, native):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == native
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("auto", cpu, "fp32") == "fp32"
    assert resolve_precision("auto", cpu, "bf16") == native
    assert resolve_precision("bf16", cpu, "fp32") == "bf16"


def test_ranks_of_several_kinds_of_devices_compute_in_one_precision():
    assert common_precision(["bf16", "fp16", "bf16"]) == "fp16"
    assert common_precision(["bf16", "bf16"]) == "bf16"
    assert common_precision(["bf16", "fp32"]) == "fp32"


def test_a_state_of_another_precision_is_loaded_without_its_scale():
    learners = [
        Learner(small_net(norm=True), alpha=np.ones(CLASSES, np.float32), gamma=2, batch=2, precision=p)
        for p in ("fp32", "fp16")
    ]
    images, labels = np.zeros((2, SIDE, SIDE, 3), np.uint8), np.ones((2, SIDE, SIDE), np.uint8)
    micro = MicroBatch(0, *to_device(images, labels, torch.device("cpu")))
    learners[0].step([micro], lr=1e-3, key=("k",), total=1)
    learners[1].load_optimizer_state(learners[0].optimizer_state())
    one, two = (next(iter(x.adam.state.values()))["exp_avg"] for x in learners)
    assert torch.equal(one, two)
    assert learners[1].scaler.get_scale() == 65536


def test_in_training_bf16_leaves_grouped_convolutions_in_fp32():
    dense, grouped = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    net = nn.Sequential(dense, grouped)
    Learner(net, alpha=np.ones(4, np.float32), gamma=2, batch=1, precision="bf16")
    taken = []
    plain = nn.Conv2d._conv_forward

    def noted(self, x, *rest):
        taken.append((self is grouped, x.dtype, torch.is_autocast_enabled("cpu")))
        return plain(self, x, *rest)

    x = torch.rand(1, 4, 8, 8)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(nn.Conv2d, "_conv_forward", noted)
        assert net(x).dtype == torch.bfloat16
        assert taken == [(False, torch.float32, True), (True, torch.float32, False)]
        taken.clear()
        with torch.inference_mode():
            net(x)
        assert taken == [(False, torch.float32, True), (True, torch.bfloat16, True)]
    net(x).sum().backward()
    assert net.state_dict().keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
