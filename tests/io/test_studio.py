"""Regions of a Label Studio export: masks against an encoder of our own, and what a broken export is told."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysed.core.tiles import LandClass
from raysed.errors import DataError
from raysed.io import studio
from raysed.io.store import Dataset

SIDE = 16
DATASET = Dataset(
    "x", (LandClass("road", "#112233", 4), LandClass("water", "#7788AA", 9)), (0,), SIDE, {}, {}, ""
)
LENGTHS = (3, 4, 8, 16)


def packed(
    values: np.ndarray, lengths=LENGTHS, choose=min, said: int | None = None, width: int = 8
) -> list[int]:
    """Bytes of a mask; `choose` takes one of the widths that a run fits into, which need not be the narrowest."""
    bits = f"{len(values) if said is None else said:032b}{width - 1:05b}" + "".join(
        f"{n - 1:04b}" for n in lengths
    )
    longest = 2 ** max(lengths)

    def run(flag: int, count: int, content: list[int]) -> str:
        kind = choose(k for k in range(4) if count <= 2 ** lengths[k])
        return f"{flag}{kind:02b}{count - 1:0{lengths[kind]}b}" + "".join(f"{v:08b}" for v in content)

    runs = [(v, len(list(g))) for v, g in itertools.groupby(values.tolist())]
    for alone, group in itertools.groupby(runs, lambda r: r[1] == 1):
        if alone:
            singles = [v for v, _ in group]
            bits += "".join(
                run(0, len(part), part)
                for part in (singles[i : i + longest] for i in range(0, len(singles), longest))
            )
            continue
        for value, count in group:
            bits += "".join(run(1, min(longest, count - i), [value]) for i in range(0, count, longest))
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def brush(rle: object, name: str = "water", side: int = SIDE) -> dict:
    value = {"format": "rle", "rle": rle, "brushlabels": [name]}
    return {
        "id": "Xy7",
        "type": "brushlabels",
        "original_width": side,
        "original_height": side,
        "value": value,
    }


def rgba(alpha: np.ndarray) -> np.ndarray:
    return np.repeat(alpha.astype(np.uint8).ravel(), 4)


RUNS = st.lists(st.tuples(st.integers(0, 255), st.integers(1, 40)), min_size=1, max_size=30)


@given(
    RUNS, st.lists(st.integers(1, 16), min_size=4, max_size=4), st.sampled_from([min, max]), st.integers(0, 2)
)
def test_what_was_packed_is_unpacked(runs, lengths, choose, spare):
    values = np.repeat(*np.array(runs).T).astype(np.uint8)
    data = bytes(packed(values, lengths, choose)) + bytes(spare)
    assert np.array_equal(studio.unpacked(data, len(values)), values)


@given(RUNS, st.data())
def test_a_mask_cut_short_or_of_another_size_is_refused(runs, data):
    values = np.repeat(*np.array(runs).T).astype(np.uint8)
    whole = bytes(packed(values))
    short = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ValueError, match="a mask"):
        studio.unpacked(short, len(values))
    with pytest.raises(ValueError, match="expected"):
        studio.unpacked(whole, len(values) + 1)


@given(st.binary(max_size=60))
def test_any_bytes_give_the_values_or_an_error(data):
    with contextlib.suppress(ValueError):
        assert studio.unpacked(bytes(packed(np.zeros(64, np.uint8)))[:6] + data, 64).shape == (64,)


def test_runs_longer_than_the_longest_width_and_a_format_s_own_example():
    values = np.repeat(np.array([0, 255, 7], np.uint8), [70_000, 140_000, 1])
    assert np.array_equal(studio.unpacked(bytes(packed(values)), len(values)), values)
    # 1 value of 8 bits, widths 3 4 8 16, then: repeated, first width, once, 255
    by_hand = int("0" * 31 + "1" + "00111" + "0010001101111111" + "10000011111111" + "0" * 5, 2)
    assert studio.unpacked(by_hand.to_bytes(9, "big"), 1).tolist() == [255]


def test_masks_lie_over_each_other_in_their_order_and_any_opacity_counts():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, SIDE, SIDE)) < 0.4
    opacity = np.where(second, rng.integers(1, 256, (SIDE, SIDE)), 0)
    regions = [brush(packed(rgba(255 * first)), "road"), brush(packed(rgba(opacity)))]
    wanted = np.where(second, 2, np.where(first, 1, 0))
    assert np.array_equal(studio.drawn(regions, DATASET, "here"), wanted)
    square = {
        "type": "polygonlabels",
        "value": {"points": [[0, 0], [100, 0], [100, 100], [0, 100]], "polygonlabels": ["road"]},
    }
    assert (studio.drawn([*regions, square], DATASET, "here") == 1).all()


EMPTY = np.zeros(4 * SIDE**2, np.uint8)


@pytest.mark.parametrize(
    ("region", "text"),
    [
        (brush([]), r"Xy7: a mask of 0 bytes, its header alone has 7"),
        (brush(packed(EMPTY)[:-1]), r"Xy7: a mask that ends after 9 bytes within a run"),
        (brush(packed(EMPTY[4:])), r"Xy7: a mask of 1020 values of 8 bits, expected 1024 of 8"),
        (brush(packed(EMPTY, said=2**32 - 1)), r"Xy7: a mask of 4294967295 values"),
        (brush(packed(EMPTY, width=9)), r"Xy7: a mask of 1024 values of 9 bits"),
        (brush(packed(np.r_[EMPTY, EMPTY], said=1024)), r"Xy7: a mask with a run of 2048 at value 0 of 1024"),
        (brush(packed(EMPTY), side=32), r"Xy7: a mask of an image of 32 x 32, the tile has 16 x 16"),
        (brush("AAEC"), r"Xy7: a mask that is not a list of bytes"),
        (brush(10**9), r"Xy7: a mask that is not a list of bytes"),
        (brush([1, 256]), r"Xy7: bytes must be in range"),
        (brush([1, "2"]), r"Xy7 cannot be read \(TypeError"),
        (brush(packed(EMPTY), "lava"), r"Xy7: class \['lava'\], the data set has road, water"),
        ({"id": "Xy7", "type": "brushlabels", "value": {"brushlabels": ["road"]}}, r"Xy7 cannot be read \(KeyError"),
        ({"type": "polygonlabels", "value": {"polygonlabels": ["road"], "points": []}}, r"region 1: points that are"),
        ({"type": "polygonlabels", "value": {"polygonlabels": ["road"]}}, r"region 1 cannot be read"),
        ({"type": "relation"}, r"region 1: type 'relation'"),
        (None, r"region 1 cannot be read"),
    ],
)  # fmt: skip
def test_a_region_that_cannot_be_used_is_named(region, text):
    with pytest.raises(DataError, match=rf"^e.json, tile t0, (region )?{text}"):
        studio.drawn([region], DATASET, "e.json, tile t0")
