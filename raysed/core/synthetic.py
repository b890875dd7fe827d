"""A procedural world of aerial scenes with the eight land-cover classes of OpenEarthMap, for runs without real tiles.

A scene is drawn twice over.  First a map: every pixel holds the number of the surface on top (a field, a roof, a road),
and a surface knows its class, colour and texture.  Then a photograph: colours, textures and shadows of that map, seen
through an imperfect sensor.  Colours of different classes overlap on purpose; shape, texture and neighbourhood tell them
apart.  About one scene in eight is ambiguous, in whole or in part.

Lengths are pixels, points are (x, y), angles are radians.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from raysed.core.randomness import keyed_rng

UNKNOWN, BARE, RANGE, DEVELOPED, ROAD, TREE, WATER, FARM, BUILDING = range(9)

AMBIGUOUS = 0.13
"""Share of scenes that are ambiguous, in whole or in part."""
STEP = 5.0
"""Distance of the points of a road or a river."""


@dataclass(frozen=True)
class Scene:
    """One photograph and its map."""

    region: str
    image: np.ndarray
    """(side, side, 3) uint8 RGB."""
    label: np.ndarray
    """(side, side) uint8: 0 unknown, 1..8 the classes of OpenEarthMap in order."""
    ambiguous: np.ndarray
    """(side, side) float32 in 0..1: how far each pixel is obscured."""


class Kind(NamedTuple):
    """What one kind of landscape holds."""

    share: float  # frequency among scenes, before the region's taste
    spacing: float  # distance of side roads; 0 for a lone country road
    frontage: float  # probability that a place beside a road is built on
    footprint: tuple[float, float]  # shortest and longest side of a building
    rows: int  # rows of buildings on each side of a road
    paved: float  # share of the ground between buildings that is developed
    farm: float  # share of the parcels that are fields
    wood: float  # share of the ground under closed forest
    trees: float  # single trees per 1000 square pixels


KINDS = {
    "city": Kind(0.24, 86, 1.0, (13, 31), 3, 0.88, 0.0, 0.00, 1.6),
    "suburb": Kind(0.21, 76, 1.0, (11, 20), 2, 0.42, 0.0, 0.05, 3.4),
    "works": Kind(0.13, 140, 1.0, (24, 66), 3, 0.8, 0.0, 0.04, 0.7),
    "village": Kind(0.13, 140, 0.8, (10, 19), 1, 0.25, 0.5, 0.12, 1.6),
    "fields": Kind(0.13, 0, 0.06, (8, 20), 1, 0.05, 0.9, 0.06, 0.3),
    "forest": Kind(0.10, 0, 0.02, (7, 12), 1, 0.0, 0.08, 0.7, 0.6),
    "open": Kind(0.12, 0, 0.05, (7, 14), 1, 0.05, 0.1, 0.12, 1.0),
}

COLOURS = {
    "grass": [(110, 124, 74), (142, 138, 94), (94, 116, 64), (160, 148, 106), (126, 128, 82)],
    "tree": [(60, 80, 48), (76, 94, 56), (50, 68, 48), (92, 106, 62), (106, 104, 66)],
    "crop": [(90, 120, 58), (128, 140, 76), (164, 150, 100), (146, 122, 90), (70, 100, 52), (184, 168, 114)],
    "soil": [(162, 136, 104), (178, 154, 120), (152, 116, 88), (172, 158, 134), (140, 126, 106)],
    "paved": [(150, 148, 144), (170, 166, 158), (128, 126, 126), (142, 130, 114), (114, 114, 114)],
    "asphalt": [(112, 112, 114), (134, 132, 130), (104, 104, 106), (146, 144, 140)],
    "water": [(50, 66, 54), (66, 86, 72), (104, 100, 74), (44, 58, 56), (84, 104, 106)],
    "roof": [
        (158, 108, 84), (136, 96, 78), (128, 128, 132), (98, 98, 102), (196, 192, 188), (150, 134, 112),
        (172, 156, 132), (116, 126, 142), (120, 112, 104), (92, 106, 86), (142, 142, 140),
    ],
}  # fmt: skip
"""Mean colours of each material, RGB in 0..255; a region keeps some of them and shifts them."""


class Region(NamedTuple):
    """What the scenes of one region share."""

    kinds: np.ndarray  # (K,) probability of each kind of `KINDS`
    colours: dict[str, np.ndarray]  # material to (n, 3) RGB
    shadow: np.ndarray  # (2,) shadow of a height of one pixel
    angle: float  # preferred direction of roads and parcels
    haze: float  # usual weight of the haze, 0..1
    tint: np.ndarray  # (3,) gain of the sensor's channels


class Road(NamedTuple):
    """One street or track."""

    points: np.ndarray  # (n, 2) centre line, STEP apart
    width: int
    dirt: bool


class Site(NamedTuple):
    """The rectangle of a building."""

    centre: np.ndarray  # (2,)
    along: np.ndarray  # (2,) unit vector, parallel to the street
    length: float
    depth: float


class Surface(NamedTuple):
    """One thing on the ground.  Texture strengths are relative to its brightness."""

    label: int
    colour: np.ndarray  # (3,) RGB
    patchy: float = 0.06
    grainy: float = 0.04
    striped: float = 0.0
    angle: float = 0.0  # of the stripes
    period: float = 4.0  # of the stripes


class Canvas:
    """The map under construction."""

    def __init__(self, rng: Generator, region: Region, side: int) -> None:
        self.rng, self.region, self.side = rng, region, side
        self.top = np.zeros((side, side), np.int32)
        """(side, side) number of the surface on top."""
        self.shadow = np.zeros((side, side), np.uint8)
        """(side, side) 1 where something taller stands towards the sun."""
        self.surfaces: list[Surface] = []

    def add(self, label: int, material: str, spread: float = 7.0, **texture: float) -> int:
        """Number of a new surface in one of the region's colours of a material, `spread` levels around it."""
        colours = self.region.colours[material]
        colour = (
            colours[self.rng.integers(len(colours))] + self.rng.normal(0, spread) + self.rng.normal(0, 3, 3)
        )
        return self.add_like(Surface(label, colour, **texture))

    def add_like(self, surface: Surface) -> int:
        self.surfaces.append(surface)
        return len(self.surfaces) - 1

    def fill(self, number: int, polygon: np.ndarray) -> None:
        cv2.fillPoly(self.top, [polygon.round().astype(np.int32)], number)

    def labels(self) -> np.ndarray:
        """(side, side) uint8 class codes."""
        return np.array([s.label for s in self.surfaces], np.uint8)[self.top]


def scene(seed: int, number: int, side: int = 256, regions: int = 12) -> Scene:
    """Scene `number` of the world `seed`; a pure function of its arguments.

    Args:
        seed: of the world.
        number: of the scene; it lies in region `number % regions`.
        side: of image and label in pixels of about half a metre.
        regions: how many regions share the world.
    """
    rng = keyed_rng("scene", seed, number)
    region = draw_region(seed, number % regions)
    kind = list(KINDS.values())[rng.choice(len(KINDS), p=region.kinds)]
    canvas = Canvas(rng, region, side)
    paint_ground(canvas, kind)
    paint_water(canvas)
    roads = draw_roads(rng, side, kind, region.angle)
    paint_built(canvas, kind, roads)
    paint_trees(canvas, kind, roads)
    image, ambiguous = expose(rng, photograph(canvas), region)
    label = canvas.labels()
    if rng.random() < 0.03:
        blacken_corner(rng, image, label)
    return Scene(f"world{number % regions:02d}", image, label, ambiguous)


def draw_region(seed: int, region: int) -> Region:
    """Palette, mix of landscapes, sun and sensor of a region."""
    rng = keyed_rng("region", seed, region)
    shares = np.array([k.share for k in KINDS.values()]) * rng.gamma(5.0, 1 / 5.0, len(KINDS))
    season = rng.uniform(-1, 1) * np.array([22, 8, -6])
    colours = {}
    for material, means in COLOURS.items():
        kept = rng.choice(len(means), 6 if material == "roof" else 3, replace=False)
        shift = rng.normal(0, 9) + rng.normal(0, 5, 3) + season * (material in ("grass", "tree", "crop"))
        colours[material] = np.array(means, float)[kept] + shift
    sun = rng.uniform(0, 2 * np.pi)
    return Region(
        shares / shares.sum(),
        colours,
        direction(sun) * rng.uniform(0.5, 1.3),
        rng.uniform(0, np.pi / 2),
        rng.uniform(0, 0.2),
        rng.normal(1, 0.05, 3) * rng.normal(1, 0.08),
    )


def direction(angle: float) -> np.ndarray:
    """(2,) unit vector."""
    return np.array([np.cos(angle), np.sin(angle)])


def fractal(rng: Generator, side: int, cell: float, octaves: int = 3) -> np.ndarray:
    """(side, side) float32 noise of about unit variance, its coarsest features `cell` pixels wide."""
    coarse = int(side / cell) + 3
    grid = rng.standard_normal((coarse, coarse), np.float32)
    for octave in range(1, octaves):
        finer = cv2.resize(grid, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        grid = np.add(finer, rng.standard_normal(finer.shape, np.float32) / 2**octave)
    size = int(coarse * cell)
    x, y = rng.integers(0, size - side + 1, 2)
    return 1.15 * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)[y : y + side, x : x + side]


def highest(field: np.ndarray, share: float) -> np.ndarray:
    """Mask of the highest `share` of a field."""
    return field > np.quantile(field[::4, ::4], 1 - share) if share > 0 else np.zeros(field.shape, bool)


def blob(rng: Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """(32, 2) outline of a wobbly disc."""
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    stretch = sum(rng.normal(0, 0.32 / k**0.7) * np.cos(k * turn + rng.uniform(0, 6.3)) for k in range(1, 7))
    rim = np.stack([np.cos(turn), np.sin(turn)], 1)
    return centre + radius * (1 + np.maximum(stretch, -0.7))[:, None] * rim


def rectangle(centre: np.ndarray, along: np.ndarray, length: float, depth: float) -> np.ndarray:
    """(4, 2) corners of a rectangle whose `length` runs along a unit vector."""
    u, v = along * length / 2, across(along) * depth / 2
    return centre + np.array([-u - v, u - v, u + v, v - u])


def across(vector: np.ndarray) -> np.ndarray:
    """(2,) vector turned by a quarter."""
    return np.array([-vector[1], vector[0]])


def paint_ground(canvas: Canvas, kind: Kind) -> None:
    """Rangeland in patches, parcels of fields on it, bare patches last."""
    rng, side = canvas.rng, canvas.side
    canvas.top[:] = canvas.add(RANGE, "grass", patchy=0.1, grainy=0.07)
    for cell, share in ((60, 0.35), (25, 0.15)):
        patch = canvas.add(RANGE, "grass", patchy=0.12, grainy=0.1)
        canvas.top[highest(fractal(rng, side, cell, 4), share)] = patch
    if kind.farm:
        angle = canvas.region.angle + rng.normal(0, 0.15)
        for corner, size in parcels(rng, side, rng.uniform(50, 110)):
            if rng.random() < kind.farm:
                paint_field(canvas, corner, size, angle)
    for _ in range(rng.poisson(2.4 * (side / 256) ** 2)):
        bare = canvas.add(BARE, "soil", patchy=0.12, grainy=0.06)
        canvas.fill(bare, blob(rng, rng.uniform(0, side, 2), rng.uniform(7, 32)))


def parcels(rng: Generator, side: int, size: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(corner, extent) of rectangles that tile a disc around the scene's centre, each about `size` wide."""
    todo, done = [(np.full(2, -0.75 * side), np.full(2, 1.5 * side))], []
    while todo:
        corner, extent = todo.pop()
        axis = int(extent[1] > extent[0] * rng.uniform(0.6, 1.6))
        if extent[axis] < size * rng.uniform(0.9, 1.8):
            done.append((corner, extent))
            continue
        cut, step = extent.copy(), np.zeros(2)
        cut[axis] *= rng.uniform(0.35, 0.65)
        step[axis] = cut[axis]
        todo += [(corner, cut), (corner + step, extent - step)]
    return done


def paint_field(canvas: Canvas, corner: np.ndarray, extent: np.ndarray, angle: float) -> None:
    """A field with rows along one side, bounded by a narrow margin of grass."""
    rng = canvas.rng
    striped = rng.choice([0.0, 0.04, 0.09, 0.16])
    rows = angle + rng.integers(2) * np.pi / 2
    period = rng.uniform(2.6, 7)
    crop = canvas.add(FARM, "crop", 9, patchy=0.07, grainy=0.03, striped=striped, angle=rows, period=period)
    low, high = corner + rng.uniform(0.5, 3), corner + extent - rng.uniform(0.5, 3)
    along = direction(angle)
    middle = (low + high) / 2
    centre = canvas.side / 2 + middle[0] * along + middle[1] * across(along)
    canvas.fill(crop, rectangle(centre, along, *(high - low)) + rng.normal(0, 1.5, (4, 2)))


def paint_water(canvas: Canvas) -> None:
    """Now and then a river or a lake, more often a pond."""
    rng, side = canvas.rng, canvas.side
    chance = rng.random()
    if chance > 0.48:
        return
    water = canvas.add(WATER, "water", patchy=0.05, grainy=0.02)
    if chance < 0.15:
        course = walk(rng, rng.uniform(0.2, 0.8, 2) * side, rng.uniform(0, 6.3), side, 0.12)
        width = rng.integers(10, 34)
        bank = canvas.add(*((BARE, "soil") if rng.random() < 0.4 else (RANGE, "grass")))
        for number, extra in ((bank, 5), (water, 0)):
            cv2.polylines(canvas.top, [course.round().astype(np.int32)], False, number, int(width + extra))
    else:
        radius = rng.uniform(30, 75) if chance < 0.26 else rng.uniform(5, 18)
        canvas.fill(water, blob(rng, rng.uniform(0, side, 2), radius))


def walk(rng: Generator, start: np.ndarray, heading: float, side: int, bend: float) -> np.ndarray:
    """(n, 2) curve through `start` that leaves the scene at both ends."""
    free = np.zeros((side, side), np.uint8)
    there, back = (stroll(rng, start, heading + turn, free, bend=bend) for turn in (0, np.pi))
    return np.concatenate([back[:0:-1], there])


def stroll(
    rng: Generator,
    start: np.ndarray,
    heading: float,
    taken: np.ndarray,
    *,
    bend: float,
    length: float = np.inf,
) -> np.ndarray:
    """(n, 2) curve from `start` until it has left the scene, has its length, or has just entered a taken pixel."""
    side, points, turn = len(taken), [start], 0.0
    for n in range(int(min(length, 4 * side) / STEP)):
        turn = 0.85 * turn + rng.normal(0, bend * 0.3)
        heading += turn
        points.append(points[-1] + STEP * direction(heading))
        if np.abs(points[-1] - side / 2).max() >= side / 2:
            outwards = (points[-1] - side / 2) / np.hypot(*(points[-1] - side / 2))
            points += [points[-1] + STEP * outwards, points[-1] + 2 * STEP * outwards]
            break
        x, y = points[-1].astype(int)
        if n > 3 and taken[y, x]:
            points.append(points[-1] + STEP * direction(heading))
            break
    return np.array(points)


def draw_roads(rng: Generator, side: int, kind: Kind, angle: float) -> list[Road]:
    """A connected network: a main road, side roads from it, and lanes from those that end where they meet a road."""
    if kind.spacing == 0 and rng.random() < 0.25:
        return []
    rural = kind.spacing == 0
    bend = rng.choice([0.0, 0.02, 0.06]) + 0.03 * rural
    taken = np.zeros((side, side), np.uint8)
    heading = angle + rng.integers(2) * np.pi / 2 + rng.normal(0, 0.1)
    course = walk(rng, rng.uniform(0.3, 0.7, 2) * side, heading, side, bend)
    width = rng.integers(4, 7) if rural else rng.integers(6, 11)
    main = Road(course, int(width), bool(rural and rng.random() < 0.5))
    trace(taken, main)
    streets = side_roads(rng, main, kind, taken, bend=bend, lanes=False)
    lanes = [] if rural else [side_roads(rng, s, kind, taken, bend=bend, lanes=True) for s in streets]
    return [main, *streets, *(lane for some in lanes for lane in some)]


def side_roads(
    rng: Generator, parent: Road, kind: Kind, taken: np.ndarray, *, bend: float, lanes: bool
) -> list[Road]:
    """Roads that leave a parent across it: streets on both sides, lanes on one; they are marked as taken."""
    rural, spacing = kind.spacing == 0, kind.spacing or 150
    gap = spacing * (1.4 if lanes else 1.0)
    roads = []
    at = rng.uniform(0.2, 0.9) * gap
    while (n := int(at / STEP)) < len(parent.points) - 2:
        at += gap * rng.uniform(0.75, 1.3)
        start, ahead = parent.points[n], parent.points[n + 1] - parent.points[n]
        if start.min() < 0 or start.max() >= len(taken):
            continue
        for hand in (1,) if lanes else (1, -1):
            if rng.random() < (0.45 if rural else 0.15):
                continue
            heading = np.arctan2(ahead[1], ahead[0]) + hand * np.pi / 2 + rng.normal(0, 0.05)
            length = np.inf if rng.random() < 0.8 else rng.uniform(0.5, 1.5) * spacing
            points = stroll(rng, start, heading, taken, bend=bend, length=length)
            width = rng.integers(3, 5) if lanes or rural else rng.integers(4, 7)
            roads.append(Road(points, int(width), bool(rng.random() < (0.6 if rural else 0.1))))
    for road in roads:
        trace(taken, road)
    return roads


def trace(canvas: np.ndarray, road: Road, value: int = 1, extra: int = 0, shrink: float = 1.0) -> None:
    """Draws a road into an integer raster, `extra` pixels wider or at a fraction of its width."""
    width = max(1, round(road.width * shrink) + extra)
    cv2.polylines(canvas, [road.points.round().astype(np.int32)], False, value, width)


def paint_built(canvas: Canvas, kind: Kind, roads: list[Road]) -> None:
    """Pavement, lots, roads with cars, and buildings with their shadows."""
    rng, side = canvas.rng, canvas.side
    sites = building_sites(canvas, kind, roads)
    if kind.paved and kind.spacing > 0:
        paved = canvas.add(DEVELOPED, "paved", patchy=0.08, grainy=0.05)
        near = np.zeros((side, side), np.uint8)
        for road in roads:
            trace(near, road, extra=int(2.2 * kind.footprint[1]) + 12)
        ground = highest(fractal(rng, side, 40), kind.paved) & (near > 0)
        canvas.top[ground & (canvas.labels() != WATER)] = paved
    for site in sites:
        if rng.random() < 0.25 + 0.6 * kind.paved:
            lot = canvas.add(DEVELOPED, rng.choice(["paved", "paved", "asphalt", "soil"]), grainy=0.06)
            yard = rng.uniform((3, 4), (12, 14))
            canvas.fill(lot, rectangle(*site[:2], site.length + yard[0], site.depth + yard[1]))
    paint_roads(canvas, kind, roads)
    for site in sites:
        paint_building(canvas, site)


def paint_roads(canvas: Canvas, kind: Kind, roads: list[Road]) -> None:
    """Pavement beside streets, then the roads, the narrow ones first, with a line or cars on the wide ones."""
    rng = canvas.rng
    if kind.spacing > 0:
        walkway = canvas.add(DEVELOPED, "paved")
        for road in roads:
            trace(canvas.top, road, walkway, extra=2 * int(rng.integers(1, 4)))
    asphalt = [canvas.add(ROAD, "asphalt", 8, patchy=0.04, grainy=0.04) for _ in range(3)]
    dirt = canvas.add(ROAD, "soil", 8, patchy=0.08, grainy=0.05)
    line = canvas.add_like(Surface(ROAD, np.full(3, 205.0)))
    for road in sorted(roads, key=lambda r: r.width):
        trace(canvas.top, road, dirt if road.dirt else asphalt[rng.integers(3)])
        if road.width > 8 and not road.dirt:
            trace(canvas.top, road, line, shrink=0.05)
            for point in road.points[rng.random(len(road.points)) < 0.12]:
                car = canvas.add_like(Surface(ROAD, rng.choice([50.0, 120.0, 230.0]) + rng.normal(0, 20, 3)))
                cv2.circle(canvas.top, (point + rng.uniform(-2, 2, 2)).astype(int).tolist(), 1, car, -1)


def building_sites(canvas: Canvas, kind: Kind, roads: list[Road]) -> list[Site]:
    """Places for buildings along both sides of the roads, clear of roads, water and one another."""
    rng, sites = canvas.rng, []
    steps = np.linspace(-0.5, 0.5, int(kind.footprint[1] / 6) + 3)
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    taken = (canvas.labels() == WATER).astype(np.uint8)
    for road in roads:
        trace(taken, road, extra=3)
    for road in roads:
        for hand in (1, -1):
            at = rng.uniform(0, 12)
            while (n := int(at / STEP)) < len(road.points) - 1:
                along = (road.points[n + 1] - road.points[n]) / STEP
                out = hand * across(along)
                length, depth = rng.uniform(*kind.footprint, 2)
                corner = road.points[n] + out * (road.width / 2 + rng.uniform(2, 5))
                at += length + rng.uniform(1.5, 6)
                for _ in range(kind.rows):
                    inside = corner.min() > -depth and corner.max() < len(taken) + depth
                    if inside and rng.random() < kind.frontage:
                        sites += place(taken, corner, np.array([along * length, out * depth]), grid)
                    corner = corner + out * (depth + rng.uniform(2, 6))
    return sites


def place(taken: np.ndarray, corner: np.ndarray, sides: np.ndarray, grid: np.ndarray) -> list[Site]:
    """The largest building that fits at the corner of a lot, marked as taken; none where none fits.

    Args:
        taken: (side, side) uint8, changed in place.
        corner: (2,) nearest the street.
        sides: (2, 2) the lot's side along the street, and the one away from it.
        grid: (n, 2) in [-0.5, 0.5], spots of the unit square to look at.
    """
    length, depth = np.hypot(*sides.T).tolist()
    along = sides[0] / length
    for scale in (1.0, 0.7, 0.5):
        centre = corner + sides[0] / 2 + sides[1] * (scale / 2)
        x, y = (centre + (grid * (scale + 2 / depth)) @ sides).astype(int).clip(0, len(taken) - 1).T
        if not taken[y, x].any():
            site = Site(centre, along, scale * length, scale * depth)
            cv2.fillPoly(taken, [rectangle(*site).round().astype(np.int32)], 1)
            return [site]
    return []


def paint_building(canvas: Canvas, site: Site) -> None:
    """A flat or gabled roof, sometimes with something on it, and its shadow."""
    rng, (centre, along, length, depth) = canvas.rng, site
    base = rectangle(centre, along, length, depth)
    height = rng.uniform(4, 9) + 0.12 * min(length, depth) * rng.random() * 3
    hull = cv2.convexHull(np.concatenate([base, base + canvas.region.shadow * height]).astype(np.float32))
    cv2.fillPoly(canvas.shadow, [hull.round().astype(np.int32)], 1)
    roof = canvas.add(BUILDING, "roof", 8, patchy=0.03, grainy=0.04)
    canvas.fill(roof, base)
    shape, surface = rng.random(), canvas.surfaces[roof]
    if shape < 0.6 and depth < 24:
        uphill = across(along)
        slope = 1 - 0.18 * float(np.sign(uphill @ canvas.region.shadow)) * rng.uniform(0.5, 1.2)
        half = canvas.add_like(surface._replace(colour=surface.colour * slope))
        canvas.fill(half, rectangle(centre + uphill * depth / 4, along, length, depth / 2))
    elif shape < 0.85:
        for _ in range(int(rng.integers(1, 4))):
            spot = centre + rectangle(np.zeros(2), along, length, depth)[rng.integers(4)] * rng.uniform(
                0.2, 0.7
            )
            unit = canvas.add_like(surface._replace(colour=surface.colour * rng.uniform(0.75, 1.2)))
            canvas.fill(unit, rectangle(spot, along, rng.uniform(2, 6), rng.uniform(2, 5)))


def paint_trees(canvas: Canvas, kind: Kind, roads: list[Road]) -> None:
    """Forests of touching crowns, then clumps and single trees; the middle of a road stays open to the sky."""
    rng, side = canvas.rng, canvas.side
    below, labels = canvas.top.copy(), canvas.labels()
    core = np.zeros((side, side), np.uint8)
    for road in roads:
        trace(core, road, shrink=0.9)
    leaves = [canvas.add(TREE, "tree", 5, patchy=0.1, grainy=0.12) for _ in range(3)]
    size = rng.uniform(2.4, 4.6)
    closed = highest(fractal(rng, side, 70, 4), kind.wood * rng.uniform(0.6, 1.35))
    closed &= (labels == RANGE) | (labels == FARM) | (labels == BARE)
    canvas.top[closed] = leaves[0]
    pitch = np.arange(0, side, 1.5 * size)
    spots = np.stack(np.meshgrid(pitch, pitch), -1).reshape(-1, 2)
    spots = (spots + rng.normal(0, 0.4 * size, spots.shape)).clip(0, side - 1)
    spots = spots[closed[spots[:, 1].astype(int), spots[:, 0].astype(int)]]
    lone = rng.uniform(0, side, (rng.poisson(kind.trees * side**2 / 1000), 2))
    clumps = [c + rng.normal(0, 3 * size, (int(rng.integers(2, 7)), 2)) for c in lone[::3]]
    lone = np.concatenate([lone, *clumps]).clip(0, side - 1)
    at = labels[lone[:, 1].astype(int), lone[:, 0].astype(int)]
    lone = lone[(at == RANGE) | (at == DEVELOPED) | ((at == FARM) & (rng.random(len(at)) < 0.2))]
    paint_crowns(canvas, leaves, np.concatenate([spots, lone]), size)
    canvas.top[core > 0] = below[core > 0]


def paint_crowns(canvas: Canvas, leaves: list[int], spots: np.ndarray, size: float) -> None:
    """Round crowns, bright towards the sun, each with its shadow."""
    rng = canvas.rng
    shades = []
    for leaf in (canvas.surfaces[n] for n in leaves):
        for dark in (0.8, 0.95, 1.1):
            shades.append(
                [canvas.add_like(leaf._replace(colour=leaf.colour * f)) for f in (dark, 1.3 * dark)]
            )
    radii = size * rng.uniform(0.6, 1.5, len(spots))
    shade = [shades[n] for n in rng.integers(len(shades), size=len(spots))]
    sunward = -canvas.region.shadow / np.hypot(*canvas.region.shadow)
    caps = spots + 0.35 * radii[:, None] * sunward
    casts = spots + 1.2 * radii[:, None] * canvas.region.shadow
    rows = np.column_stack([spots, caps, casts, radii, 0.55 * radii]).round().astype(int).tolist()
    for (x, y, cap_x, cap_y, cast_x, cast_y, radius, cap), (dark, bright) in zip(rows, shade, strict=True):
        cv2.circle(canvas.shadow, (cast_x, cast_y), radius, 1, -1)
        cv2.circle(canvas.top, (x, y), radius, dark, -1)
        cv2.circle(canvas.top, (cap_x, cap_y), cap, bright, -1)


def photograph(canvas: Canvas) -> np.ndarray:
    """(side, side, 3) float32 in 0..255: the map with its textures and shadows, before the sensor."""
    rng, side, top = canvas.rng, canvas.side, canvas.top
    colour = np.array([s.colour for s in canvas.surfaces], np.float32)[top]
    texture = np.array([s[2:] for s in canvas.surfaces], np.float32)
    patchy, grainy = texture[:, 0][top], texture[:, 1][top]
    light = 1 + patchy * fractal(rng, side, 24, 4) + grainy * fractal(rng, side, 3, 2)
    y, x = np.nonzero(texture[:, 2][top])
    striped, angle, period = texture[top[y, x], 2:].T
    sway = fractal(rng, side, 60, 1)[y, x]
    light[y, x] += striped * np.sin(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle) + sway) / period)
    tall = np.isin(canvas.labels(), (BUILDING, TREE))
    shade = cv2.GaussianBlur((canvas.shadow * ~tall).astype(np.float32), (3, 3), 0)
    light *= 1 - rng.uniform(0.42, 0.62) * shade
    colour *= light[..., None]
    colour[..., 2] *= 1 + 0.12 * shade
    return colour


def expose(rng: Generator, image: np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """(side, side, 3) uint8, the scene through uneven light, cloud shadow, haze, optics and noise; and how far it is obscured."""
    side = len(image)
    ambiguous = np.zeros((side, side), np.float32)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    slope_x, slope_y = rng.normal(0, 0.06, 2).tolist()
    light = 1 + slope_x * ramp + slope_y * ramp[:, None]
    if rng.random() < 0.1:
        light *= 1 - 0.45 * np.clip(fractal(rng, side, 160, 2) + 0.2, 0, 1)
    gain = region.tint * rng.normal(1, 0.06, 3) * np.exp(min(rng.normal(-0.02, 0.2), 0.25))
    image = image * (light[..., None] * gain.astype(np.float32))
    if rng.random() < AMBIGUOUS:
        image, ambiguous = obscure(rng, image)
    haze = min(0.45, region.haze * rng.uniform(0.3, 1.5))
    image = image * (1 - haze) + haze * np.array([188, 196, 206], np.float32)
    image = cv2.GaussianBlur(image, (5, 5), rng.uniform(0.45, 0.95))
    image = image + rng.uniform(1.5, 5.5) * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), ambiguous


def obscure(rng: Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image, or a part of it, under thick haze, out of focus, or with its colours run together; (side, side) how far."""
    side = len(image)
    small = cv2.resize(image, (side // 8, side // 8), interpolation=cv2.INTER_AREA)
    smooth = cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)
    way = rng.integers(3)
    if way == 0:
        worse = 0.38 * image + 0.62 * np.array([186, 190, 194], np.float32)
    elif way == 1:
        worse = cv2.GaussianBlur(image, (0, 0), rng.uniform(2, 3.2))
    else:
        worse = 0.35 * image + 0.65 * (smooth * 0.5 + image.mean((0, 1)) * 0.5)
        worse *= 1 + 0.08 * fractal(rng, side, 5, 2)[..., None]
    if rng.random() < 0.5:
        return worse, np.ones((side, side), np.float32)
    weight = np.clip(0.5 + 2 * fractal(rng, side, 140, 2), 0, 1)
    return image + weight[..., None] * (worse - image), weight


def blacken_corner(rng: Generator, image: np.ndarray, label: np.ndarray) -> None:
    """Cuts the edge of the survey, black and of unknown class, out of a corner, in place."""
    side = len(label)
    corner = rng.integers(2, size=2) * (side - 1)
    legs = rng.uniform(0.3, 0.9, 2) * side * np.where(corner > 0, -1, 1)
    triangle = (corner + legs * [[0, 0], [1, 0], [0, 1]]).round().astype(np.int32)
    cv2.fillPoly(image, [triangle], (0, 0, 0))
    cv2.fillPoly(label, [triangle], UNKNOWN)
