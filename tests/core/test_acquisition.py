import numpy as np
import pyarrow as pa

from raysed.core.acquisition import top_entropy, uniform
from raysed.core.randomness import keyed_rng

IDS = [f"t{i:02d}" for i in range(30)]
INDEX = pa.table({"tile_id": IDS})


def test_top_entropy_takes_the_highest_and_breaks_ties_by_id():
    entropy = np.zeros(30)
    entropy[[3, 7, 11]] = 2.0
    entropy[20] = 3.0
    shuffled = np.random.default_rng(0).permutation(30)
    scores = pa.table({"tile_id": np.array(IDS)[shuffled], "entropy": entropy[shuffled]})
    assert top_entropy(scores, INDEX, {}, 3, keyed_rng("x")).tile_ids == ["t20", "t03", "t07"]


def test_top_entropy_takes_only_tiles_of_the_index():
    scores = pa.table({"tile_id": ["gone", *IDS], "entropy": np.arange(31, 0, -1.0)})
    assert "gone" not in top_entropy(scores, INDEX, {}, 5, keyed_rng("x")).tile_ids


def test_uniform_is_without_replacement_replayable_and_free_of_the_index_order():
    one = uniform(None, INDEX, {}, 10, keyed_rng("select", 0, 4))
    again = uniform(None, INDEX.take(list(range(29, -1, -1))), {}, 10, keyed_rng("select", 0, 4))
    assert one == again
    assert len(set(one.tile_ids)) == 10
    assert one.tile_ids != uniform(None, INDEX, {}, 10, keyed_rng("select", 0, 5)).tile_ids


def test_uniform_is_uniform():
    counts = np.zeros(30)
    for k in range(2000):
        for t in uniform(None, INDEX, {}, 6, keyed_rng("u", k)).tile_ids:
            counts[int(t[1:])] += 1
    expected, spread = 400, np.sqrt(2000 * 0.2 * 0.8)
    assert np.abs(counts - expected).max() < 4.5 * spread
