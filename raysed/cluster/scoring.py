"""The scorer pool: warm actors that score tiles with the current weights.  Exactly one score a tile, although scorers die.

A tile over which they die (its bytes break the decoder, say) is found by asking its chunk tile by tile, and is bad.
"""

import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group, remove_placement_group

from raysed.core.tiles import resize_image, target_of
from raysed.errors import RaysedError, ResourcesError, rebuilt
from raysed.io.storage import Storage
from raysed.io.store import BadTile, Locations, Tile, packed, read_tiles, unpacked

CHUNK = 32
"""Tiles a call; a chunk is always made of the same tiles in the same batches, so a score does not depend on who gives it."""
BATCH = 16
"""Tiles a forward pass."""
BLOCK = 128 * CHUNK
"""Tiles whose locations are made at once: 0.2 us a tile, 1.2 in blocks of 256, 18 in chunks."""
DEATHS = 2
"""Scorers that may die over a chunk before it is asked tile by tile, and over a single tile before it is bad."""
PATIENCE = 300.0
"""Seconds without any score after which scoring gives up (exit 7)."""
HUNG_SECONDS = 60.0
"""Seconds without any score after which idle scorers are asked what busy ones still owe."""
PLACED_SECONDS = 60.0
"""Patience with scorers on GPUs that are to find their places before anything else does."""


@dataclass(frozen=True)
class Network:
    """What a scorer needs to build the network whose weights it is sent."""

    arch: str
    classes: int
    device: str


class Scorer:
    """A scoring actor: builds the network once, keeps decoded tiles, scores chunks with the weights it is handed.

    Args:
        network: which network.
        uri: root of the tile store.
        side: side of a stored tile, pixels.
        cache_bytes: for decoded tiles.
    """

    def __init__(self, network: Network, uri: str, side: int, cache_bytes: int) -> None:
        import torch

        from raysed.core.networks import build

        self.device = torch.device(network.device)
        net = build(network.arch, network.classes, seed=0).to(self.device)
        self.net = net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.storage, self.side, self.version = Storage(uri), side, ""
        self.classes = network.classes
        self.cache: dict[str, np.ndarray] = {}
        self.room = cache_bytes // (side * side * 3)

    def node(self) -> str:
        """Id of the node this scorer is on."""
        return ray.get_runtime_context().get_node_id()

    def score(
        self,
        weights: dict[str, np.ndarray],
        version: str,
        tiles: bytes,
        side: int,
        *,
        threads: int,
        precision: str,
        features: bool = False,
        loss: bool = False,
    ) -> dict[str, Any]:
        """Scores of one chunk.

        Args:
            weights: state dict as arrays.
            version: their hash; loaded only when it changes.
            tiles: of the chunk, their locations as `store.packed` makes them.
            side: side at which the tiles are scored, pixels; smaller than stored is cheaper.
            threads: torch threads; sent with every call, since they follow from who else is on its node.
            precision: of the forward pass, that of the ranks: a score must not depend on who gave it.
            features: give the network's deepest features too.
            loss: give the mean cross-entropy over the known pixels of each tile's label too; at the stored side only.

        Returns:
            ids, (n, 2 + C) float32 scores, (n,) float32 loss (0 unless asked for) and (n, D) float16 features (D 0 unless asked for) of the good tiles, bad tiles, and
            the node; or `failed`, class name and text of a
            RaysedError.
        """
        import torch

        from raysed.core.step import DTYPES, to_device
        from raysed.core.uncertainty import log_probabilities, tile_scores, visit_scores

        if version != self.version:
            self.net.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()})
            self.version = version
        torch.set_num_threads(threads)
        locations = unpacked(tiles)
        try:
            images, bad = self._images(locations)
            labels = self._labels(locations) if loss else {}
        except RaysedError as error:
            return {"failed": (type(error).__name__, str(error))}
        ids, rows, deepest, losses = list(images), [], [], [np.zeros(0, np.float32)]
        dtype = DTYPES[precision]
        try:
            for i in range(0, len(ids), BATCH):
                batch = np.stack([resize_image(images[t], side, side) for t in ids[i : i + BATCH]])
                x, _ = to_device(batch, np.zeros((0,), np.uint8), self.device)
                with torch.inference_mode():
                    with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                        logits, found = (
                            self.net.with_features(x) if features else (self.net(x), x.new_zeros(len(x), 0))
                        )
                    log_p = log_probabilities(logits)
                    rows.append(tile_scores(log_p).cpu().numpy())
                    if loss:
                        target = torch.from_numpy(
                            target_of(np.stack([labels[t] for t in ids[i : i + BATCH]]))
                        )
                        seen = visit_scores(log_p, target.to(self.device))[:, rows[-1].shape[1]]
                        losses.append(seen.cpu().numpy())
                    deepest.append(found.half().cpu().numpy())
        except torch.OutOfMemoryError as error:
            text = (
                f"a scorer ran out of GPU memory over {BATCH} tiles of {side} px: lower optim.micro_batch, which leaves it more, or "
                f"give scorers GPUs of their own ({' '.join(str(error).split())[:200]})"
            )
            return {"failed": ("ResourcesError", text)}
        return {
            "ids": ids,
            "scores": np.concatenate(rows) if rows else np.zeros((0, 2), np.float32),
            "features": np.concatenate(deepest) if deepest else np.zeros((0, 0), np.float16),
            "loss": np.concatenate(losses) if loss else np.zeros(len(ids), np.float32),
            "bad": bad,
            "node": self.node(),
        }

    def _labels(self, locations: list[dict]) -> dict[str, np.ndarray]:
        """Stored labels of the good tiles; a pass over them is made once a run, so they are not kept."""
        read = read_tiles(self.storage, locations, self.side, self.classes)
        return {t.tile_id: t.label for t in read if isinstance(t, Tile) and t.label is not None}

    def _images(self, locations: list[dict]) -> tuple[dict[str, np.ndarray], list[dict]]:
        missing = [at for at in locations if at["tile_id"] not in self.cache]
        fresh, bad = {}, []
        for tile in read_tiles(self.storage, missing, self.side, self.classes) if missing else []:
            if isinstance(tile, Tile):
                fresh[tile.tile_id] = tile.image
            else:
                bad.append(asdict(tile))
        for tile_id, image in fresh.items():
            if len(self.cache) < self.room:
                self.cache[tile_id] = image
        held = {at["tile_id"]: self.cache.get(at["tile_id"], fresh.get(at["tile_id"])) for at in locations}
        return {t: image for t, image in held.items() if image is not None}, bad


@dataclass(frozen=True)
class Scores:
    """What scorers have answered."""

    ids: pa.StringArray
    """Sorted."""
    rows: np.ndarray
    """(n, 2 + C) float32: entropy, margin, mass of each class."""
    features: np.ndarray
    """(n, D) float16; D 0 if they were not asked for."""
    loss: np.ndarray
    """(n,) float32 mean cross-entropy; 0 if it was not asked for."""
    bad: list[BadTile]
    nodes: dict[str, int]
    """Node -> tiles scored there."""


class ScorerPool:
    """Scoring actors, made when they are needed; between two scorings they can be given back, so that the cluster may shrink.

    A copy in another process knows the actors that were made before it was sent there.  Ray does not restart them: it might do so
    while the training workers are down, and put a scorer where a worker is to come back to.

    Args:
        count: scorers.
        make: arguments of `Scorer`.
        options: of the actors, such as their resources; no two of those with a share of a GPU meet on one while others are free.
        kind: class of the actors.
        threads: most torch threads of a scorer; none means that its node's CPUs are the limit.
    """

    def __init__(
        self,
        count: int,
        make: tuple[Network, str, int, int],
        options: dict[str, Any],
        kind: type[Scorer] = Scorer,
        threads: int | None = None,
    ) -> None:
        self._make, self._options, self._kind, self._threads = make, options, kind, threads
        self.scorers: list[ActorHandle | None] = [None] * count
        self._nodes: dict[ActorHandle, str] = {}

    @property
    def up(self) -> int:
        """How many are made and not given back."""
        return len(self.scorers) - self.scorers.count(None)

    def start(self) -> None:
        """Make those that are missing; on CPUs without waiting for them."""
        missing = self.scorers.count(None)
        with self._rest_of_gpus_held(missing) as held:
            self.scorers = [s or self._made() for s in self.scorers]
            if held:
                asked: list[Any] = [s.node.remote() for s in self.scorers if s]
                ray.wait(asked, num_returns=len(asked), timeout=PLACED_SECONDS)

    @contextlib.contextmanager
    def _rest_of_gpus_held(self, missing: int) -> Iterator[int]:
        """Of as many free GPUs as scorers are missing, all but a scorer's share is taken inside the block; how many they are.

        Ray fills one GPU with shares before it takes the next: scorers made first would meet on one, and leave a training worker
        no place there.
        """
        share = self._options.get("num_gpus", 0)
        number = min(missing, int(ray.cluster_resources().get("GPU", 0))) if share else 0
        while number:
            bundles: list[dict[str, float]] = [{"GPU": 1 - share}] * number
            group = placement_group(bundles, strategy="PACK")
            try:
                if group.wait(3):
                    yield number
                    return
            finally:
                remove_placement_group(group)
            number //= 2
        yield 0

    def renew(self, dead: ActorHandle) -> ActorHandle:
        """One in place of a scorer that has died."""
        ray.kill(dead)  # it may live, out of reach
        fresh = self._made()
        self.scorers = [fresh if s == dead else s for s in self.scorers]
        return fresh

    def _made(self) -> ActorHandle:
        actor: Any = ray.remote(self._kind)
        return actor.options(scheduling_strategy="SPREAD", **self._options).remote(*self._make)

    def ready(
        self, patience: float, grace: float, taken: Mapping[str, int] | None = None
    ) -> tuple[list[ActorHandle], list[int]]:
        """The scorers that are up, and the part of its node's CPUs that each should use as torch threads.

        Args:
            patience: seconds to wait for the first; one whose node is gone may have found no other.
            grace: seconds to wait for the others then.
            taken: threads, by node, that work beside the scorers.

        Raises:
            ResourcesError: none is up within `patience` seconds.
        """
        self.start()
        until = time.monotonic() + patience
        asked: dict[Any, ActorHandle] = {s.node.remote(): s for s in self.scorers if s}
        self._nodes = {}
        replaced = 0
        while asked:
            answered, _ = ray.wait(list(asked), num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not answered:
                break
            scorer = asked.pop(answered[0])
            try:
                self._nodes[scorer] = ray.get(answered[0])
            except ray.exceptions.ActorDiedError:
                # or given back by the worker whose place this one has taken
                if replaced < len(self.scorers):
                    replaced += 1
                    fresh = self.renew(scorer)
                    asked[fresh.node.remote()] = fresh
                continue
            except ray.exceptions.RayActorError:
                continue
            if len(self._nodes) == 1:
                until = time.monotonic() + grace
        if not self._nodes:
            raise ResourcesError(
                f"none of {len(self.scorers)} scorers is up within {patience:.0f} s: lower --scorers"
            )
        cpus = {n["NodeID"]: n["Resources"].get("CPU", 1) for n in ray.nodes()}
        here = Counter(self._nodes.values())
        free = {node: cpus.get(node, 1) - (taken or {}).get(node, 0) for node in here}
        up = {s: self._nodes[s] for s in self.scorers if s in self._nodes}
        parts = [max(1, int(free[node] // here[node])) for node in up.values()]
        return list(up), [min(n, self._threads or n) for n in parts]

    def release(self, occupied: Collection[str]) -> int:
        """End the scorers on nodes other than these, where nothing else may be left to do; how many they were."""
        idle = [s for s in self.scorers if s and self._nodes.get(s) not in occupied]
        for scorer in idle:
            ray.kill(scorer)
        self.scorers = [None if s in idle else s for s in self.scorers]
        return len(idle)

    def kill(self) -> None:
        """End all."""
        self.release(())


class Work:
    """The chunks of a scoring, and who is to be asked which.

    Args:
        locations: rows of `store.LOCATION` by tile_id, so that a chunk always has the same tiles.
        scorers: how many there are.
    """

    def __init__(self, locations: Locations, scorers: int) -> None:
        self.locations, tiles = locations, len(locations)
        self.chunks = [range(i, min(i + CHUNK, tiles)) for i in range(0, tiles, CHUNK)]
        """Positions; also single tiles of those that were fatal."""
        self.whole = len(self.chunks)
        self.split: set[int] = set()
        """Chunks whose tiles are asked one by one."""
        self.deadly: list[BadTile] = []
        """Tiles that no scorer outlives."""
        self._deaths: Counter[int] = Counter()
        self._queues = [deque(range(n, self.whole, scorers)) for n in range(scorers)]
        # scorers ask for chunks that are near each other; a block is 0.8 MB
        self._block = lru_cache(min(scorers + 1, 64))(
            lambda first: locations.rows(slice(first, first + BLOCK))
        )

    def tiles(self, k: int) -> pa.RecordBatch:
        """Locations of the tiles of a chunk."""
        chunk = self.chunks[k]
        first = chunk.start // BLOCK * BLOCK
        return self._block(first).slice(chunk.start - first, len(chunk))

    def next(self, n: int) -> int | None:
        """Number of the chunk that scorer n is to be asked, its own or one of the fullest queue; None if none is left."""
        queue = self._queues[n] or max(self._queues, key=len)
        return queue.popleft() if queue else None

    def died(self, n: int, held: Sequence[int]) -> None:
        """Scorer n has died over the first of these chunks, and held the others."""
        first, *others = held
        self._queues[n].extendleft(reversed([*self._left(first), *others]))

    def _left(self, k: int) -> Sequence[int]:
        """What is to be asked again of a chunk that a scorer has died over."""
        self._deaths[k] += 1
        if self._deaths[k] < DEATHS:
            return [k]
        chunk = self.chunks[k]
        if len(chunk) == 1:
            at = self.locations[chunk.start]
            self.deadly.append(BadTile(at["tile_id"], f"{DEATHS} scorers died over it alone", at["sha256"]))
            return []
        self.split.add(k)
        self.chunks += [range(i, i + 1) for i in chunk]
        return range(len(self.chunks) - len(chunk), len(self.chunks))


def score_pool(
    scorers: Sequence[ActorHandle],
    threads: Sequence[int],
    weights: dict[str, np.ndarray],
    version: str,
    locations: Locations,
    *,
    side: int,
    features: bool = False,
    loss: bool = False,
    precision: str,
    renew: Callable[[ActorHandle], ActorHandle],
) -> Scores:
    """Score tiles with a pool of scorers; every tile gets one score, whoever dies.

    Chunk k goes first to scorer k mod n, which has its tiles decoded already; idle scorers take from the fullest queue.
    What a dead scorer held goes back to the front; what a silent one holds is asked of idle ones too, and the first answer counts.
    A chunk that `DEATHS` scorers did not outlive is asked tile by tile, so that one bad tile, or too many at once, costs no other
    its score; alone in its batch a tile's score may differ in the last bit.

    Args:
        scorers: that are up.
        threads: torch threads of each.
        weights: of the network.
        version: of the weights.
        locations: rows of `store.LOCATION` by tile_id.
        side: at which tiles are scored, pixels.
        features: whether features are wanted.
        loss: whether losses are wanted.
        precision: of the forward pass, the same on all.
        renew: makes a scorer in place of the last one, when that has died; the others are missed until the next scoring.

    Raises:
        ResourcesError: no score from any scorer within `PATIENCE`.
        RaysedError: what a scorer has raised on purpose.
    """
    work = Work(locations, len(scorers))
    more: dict[str, Any] = ({"features": True} if features else {}) | ({"loss": True} if loss else {})
    sent, living = ray.put(weights), dict(enumerate(scorers))

    def call(n: int, k: int) -> Any:
        return living[n].score.remote(
            sent, version, packed(work.tiles(k)), side, threads=threads[n], precision=precision, **more
        )

    asked = _Asked(work, living, call)
    for n in [*living, *living]:  # two in flight each, so that none waits for its next chunk
        asked.feed(n)
    heard, cause = time.monotonic(), ""
    while asked.is_waiting():
        done, _ = ray.wait(list(asked.flying), num_returns=1, timeout=10)
        silent = time.monotonic() - heard
        if silent > PATIENCE:
            scored = sum(k < work.whole for k in asked.answers.done)
            raise ResourcesError(
                f"no scorer has given a score for {PATIENCE:.0f} s, {scored} of {work.whole} chunks are scored{cause}"
            )
        if not done:
            if silent > HUNG_SECONDS:
                asked.ask_idle_ones()
            continue
        n, _ = asked.flying[done[0]]
        try:
            answer = ray.get(done[0])
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            cause = f"; the last one died ({' '.join(str(error).split())[:200]}): is there memory enough?"
            asked.died(n, renew)
            continue
        if "failed" in answer:
            raise rebuilt(*answer["failed"])
        asked.answered(done[0], answer)
        heard = time.monotonic()
    return asked.answers.scores()


class _Asked:
    """What has been asked of whom, and the answers.

    Args:
        work: the chunks.
        living: scorers by number.
        call: asks scorer n for chunk k.
    """

    def __init__(self, work: Work, living: dict[int, ActorHandle], call: Callable[[int, int], Any]) -> None:
        self._work, self._living, self._call = work, living, call
        self.flying: dict[Any, tuple[int, int]] = {}
        self.answers = Answers(work)
        self._again: set[int] = set()

    def _is_open(self, k: int) -> bool:
        return k not in self.answers.done and k not in self._work.split

    def is_waiting(self) -> bool:
        """Whether an answer is still wanted."""
        return any(self._is_open(k) for _, k in self.flying.values())

    def feed(self, n: int) -> None:
        """Ask scorer n for its next chunk, if there is one."""
        if (k := self._work.next(n)) is not None:
            self.flying[self._call(n, k)] = (n, k)

    def answered(self, ref: Any, answer: dict[str, Any]) -> None:
        """The first answer to a chunk counts."""
        n, k = self.flying.pop(ref)
        if self._is_open(k):
            self.answers.take(k, answer)
        self.feed(n)

    def ask_idle_ones(self) -> None:
        """Ask scorers without work for what others owe, once."""
        idle = sorted(self._living.keys() - {n for n, _ in self.flying.values()})
        late = [k for _, k in self.flying.values() if self._is_open(k) and k not in self._again]
        for n, k in zip(itertools.cycle(idle), late, strict=False):
            self.flying[self._call(n, k)] = (n, k)
            self._again.add(k)

    def died(self, n: int, renew: Callable[[ActorHandle], ActorHandle]) -> None:
        """Scorer n is dead: others do what it held."""
        held = {ref: k for ref, (m, k) in self.flying.items() if m == n}
        for ref in held:
            del self.flying[ref]
        if lost := [k for k in held.values() if self._is_open(k)]:
            self._work.died(n, lost)
        if len(self._living) > 1:
            del self._living[n]
        else:
            self._living[n] = renew(self._living[n])
        busy = {m for m, _ in self.flying.values()}
        for m in [m for m in self._living if m not in busy] * 2:
            self.feed(m)


class Answers:
    """The answers to chunks, each put in its place: as objects those of ten million tiles would take gigabytes."""

    def __init__(self, work: Work) -> None:
        self._work, tiles = work, len(work.locations)
        self.done: set[int] = set()
        """Chunks that are answered."""
        self._good = np.zeros(tiles, bool)
        self._rows, self._features = np.zeros((tiles, 2), np.float32), np.zeros((tiles, 0), np.float16)
        self._loss = np.zeros(tiles, np.float32)
        self._bad: list[tuple[int, BadTile]] = []
        self._nodes: Counter[str] = Counter()

    def take(self, k: int, answer: dict[str, Any]) -> None:
        """The answer to chunk k."""
        self.done.add(k)
        chunk = self._work.chunks[k]
        good = len(answer["ids"])
        at: slice | np.ndarray = slice(chunk.start, chunk.stop)
        if good < len(chunk):
            given = set(answer["ids"])
            names = self._work.tiles(k)["tile_id"].to_pylist()
            at = chunk.start + np.flatnonzero([name in given for name in names])
        if not any(self._nodes.values()):  # the first good tiles tell how wide their rows are
            self._rows = np.zeros((len(self._good), answer["scores"].shape[1]), np.float32)
            self._features = np.zeros((len(self._good), answer["features"].shape[1]), np.float16)
        if good:
            self._rows[at], self._features[at], self._loss[at] = (
                answer[name] for name in ("scores", "features", "loss")
            )
            self._good[at] = True
        self._bad += [(chunk.start, BadTile(**b)) for b in answer["bad"]]
        self._nodes[answer["node"]] += good

    def scores(self) -> Scores:
        """Of all good tiles."""
        ids, good = self._work.locations.ids, self._good
        bad = [b for _, b in sorted(self._bad, key=lambda pair: pair[0])]
        if good.all():
            found = ids, self._rows, self._features, self._loss
        else:
            found = ids.filter(pa.array(good)), self._rows[good], self._features[good], self._loss[good]
        return Scores(*found, [*self._work.deadly, *bad], dict(self._nodes))
