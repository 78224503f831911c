"""The world: a few coloured shapes that enter, move, stop, bounce and leave, in that order of time.

A scene is sampled from a seed and knows its own facts, so nothing has to be labelled. Lengths are pixels of a
FRAME x FRAME picture with the origin at the top left, times are seconds.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

FRAME = 168  # pixels a side: a 6 x 6 grid of visual tokens of 28 pixels
SAMPLED_FPS = 2  # what the models see; with two frames a visual token one grid step is one second

COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.97, 0.92, 0.12),
    "green": (0.10, 0.65, 0.18),
    "cyan": (0.12, 0.82, 0.90),
    "blue": (0.12, 0.22, 0.92),
    "purple": (0.60, 0.12, 0.75),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
RADII = {"small": (9.0, 11.0), "large": (18.0, 21.0)}  # pixels
SPEEDS = {"slowly": (14.0, 17.0), "quickly": (34.0, 42.0)}  # pixels a second
BRIGHTNESS = {"dark": 0.14, "grey": 0.45, "light": 0.80}
TEXTURES = ("plain", "striped", "spotted")

DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "down": (0, 1),
    "up": (0, -1),
    "lower right": (1, 1),
    "lower left": (-1, 1),
    "upper right": (1, -1),
    "upper left": (-1, -1),
}
PLACES = {
    f"{row} {column}".strip() or "centre": (x, y)
    for row, y in (("top", 28.0), ("", 84.0), ("bottom", 140.0))
    for column, x in (("left", 28.0), ("", 84.0), ("right", 140.0))
}
ENTRIES = (*(f"from {side}" for side in ("left", "right", "top", "bottom")), *(f"at {place}" for place in PLACES))

ENTRY_GAP = 1.5  # seconds between two entries, so that their order can be seen
LAST_ENTRY = 4.0  # seconds before the end
SETTLED = 1.25  # seconds for which an ending must be in view to count as one
CORNER = 20.0  # pixels: paths that cross the frame's edge nearer to a corner have no clear side
MIN_OBJECTS = {16: 2}  # by sampled frames; 3 in anything longer
MAX_OBJECTS = {16: 3, 24: 4}  # 5 in anything longer


@dataclass(frozen=True)
class Path:
    """Where one object is at any time, and the words for it."""

    entry: str  # "from left" or "at top left"
    end: str  # "leaves right", "stops centre", "bounces left", "moving", "stays", "vanishes"
    waypoints: np.ndarray  # [K, 3]: second, x, y; straight in between
    shown: tuple[float, float]  # seconds
    direction: str | None = None
    speed: str | None = None

    def centres(self, seconds: np.ndarray) -> np.ndarray:
        """Centres [T, 2] in pixels at `seconds` [T]."""
        times, xs, ys = self.waypoints.T
        return np.stack([np.interp(seconds, times, xs), np.interp(seconds, times, ys)], axis=-1)

    def visible(self, seconds: np.ndarray) -> np.ndarray:
        """Whether it is drawn at `seconds` [T]; it may still be outside the frame."""
        return (seconds >= self.shown[0]) & (seconds < self.shown[1])


@dataclass(frozen=True)
class Thing:
    """One object."""

    colour: str
    shape: str
    size: str
    radius: float  # pixels
    digit: int | None
    path: Path

    def facts(self) -> dict[str, str]:
        """One entry a slot of the caption; small objects carry no digit, resting ones have no direction."""
        facts = {"size": self.size, "colour": self.colour, "shape": self.shape}
        if self.size == "large":
            facts["digit"] = "none" if self.digit is None else str(self.digit)
        facts["entry"] = self.path.entry
        if self.path.direction:
            facts |= {"direction": self.path.direction, "speed": self.path.speed}
        return facts | {"end": self.path.end}

    @property
    def remains(self) -> bool:
        """Whether it is in view at the end."""
        return self.path.shown[1] == np.inf

    @property
    def name(self) -> str:
        """What picks it out: no two objects of a scene have one colour."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What one clip shows; `things` stand in order of appearance."""

    seed: tuple[int, ...]
    num_frames: int  # at SAMPLED_FPS
    brightness: str
    texture: str
    things: tuple[Thing, ...]
    look: dict[str, float] = field(repr=False, default_factory=dict)  # drift, noise and phases; no fact depends on it

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.num_frames / SAMPLED_FPS

    def facts(self) -> dict[str, str]:
        """All facts, keyed by slot ("background", "count", "remaining") or "k.slot" for the k-th object."""
        facts = {
            "background": f"{self.brightness} {self.texture}",
            "count": str(len(self.things)),
            "remaining": " ".join(thing.colour for thing in self.things if thing.remains) or "none",
        }
        for k, thing in enumerate(self.things):
            facts |= {f"{k}.{slot}": value for slot, value in thing.facts().items()}
        return facts


class Edge(NamedTuple):
    """Where a straight course crosses the frame's edge."""

    distance: float  # pixels from where the course was asked
    side: str
    clear: bool  # far enough from a corner to name the side


def to_edge(point: np.ndarray, step: np.ndarray) -> Edge:
    """Where the course from `point` along the unit vector `step` leaves the frame."""
    reach, sides = [], []
    for axis, (low, high) in enumerate((("left", "right"), ("top", "bottom"))):
        if abs(step[axis]) > 1e-9:
            wall = FRAME if step[axis] > 0 else 0.0
            reach.append((wall - point[axis]) / step[axis])
            sides.append(high if step[axis] > 0 else low)
    nearest = int(np.argmin(reach))
    return Edge(reach[nearest], sides[nearest], len(reach) == 1 or abs(reach[0] - reach[1]) > CORNER)


def near(rng: Generator, spot: str) -> np.ndarray:
    """A point [2] close to the middle of that place."""
    return np.array(PLACES[spot]) + rng.uniform(-7, 7, 2)


def sample_rest(rng: Generator, start: float, end: float, spot: str) -> Path | None:
    """An object that appears at `spot` and stays, or vanishes after a while."""
    where = near(rng, spot)
    waypoints = np.array([[start, *where], [end, *where]])
    if rng.random() < 0.65:
        return Path(f"at {spot}", "stays", waypoints, (start, np.inf))
    gone = start + rng.uniform(2.5, 6.0)
    return Path(f"at {spot}", "vanishes", waypoints, (start, gone)) if gone < end - SETTLED else None


def course(
    kind: str, through: np.ndarray, step: np.ndarray, behind: Edge, ahead: Edge, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """First and last point [2] of a straight course; outside the frame where the object enters or leaves."""
    outside = (radius + 2) / np.abs(step).max()
    first = through if kind == "depart" else through - (behind.distance + outside) * step
    if kind == "stop":
        return first, through
    return first, through + (ahead.distance + (-radius if kind == "bounce" else outside)) * step


def outcome(kind: str, spot: str, side: str, left: float) -> str | None:
    """The words for the end of a course that is over `left` seconds before the clip; None when it is a close call."""
    if left < 0:
        return "moving"
    if left <= SETTLED:
        return None
    return {"stop": f"stops {spot}", "bounce": f"bounces {side}"}.get(kind, f"leaves {side}")


def sample_motion(rng: Generator, start: float, end: float, spot: str, radius: float) -> Path | None:
    """An object that moves; None when the drawn one would leave a fact unclear."""
    kind = str(rng.choice(["cross", "stop", "bounce", "depart"], p=[0.36, 0.28, 0.18, 0.18]))
    direction = str(rng.choice(list(DIRECTIONS)[:4] if kind == "bounce" else list(DIRECTIONS)))
    speed = str(rng.choice(list(SPEEDS)))
    step = np.array(DIRECTIONS[direction]) / np.linalg.norm(DIRECTIONS[direction])
    rate = rng.uniform(*SPEEDS[speed])
    through = near(rng, spot) if kind in ("stop", "depart") else rng.uniform(36, FRAME - 36, 2)
    behind, ahead = to_edge(through, -step), to_edge(through, step)

    first, last = course(kind, through, step, behind, ahead, radius)
    arrival = start + np.linalg.norm(last - first) / rate
    ending = outcome(kind, spot, ahead.side, end - arrival)
    if ending is None:
        return None
    waypoints = [[start, *first], [arrival, *last]]
    if kind == "bounce":
        waypoints.append([2 * arrival - start, *first])
    gone = np.inf if kind == "stop" or waypoints[-1][0] >= end else waypoints[-1][0]
    entry = f"at {spot}" if kind == "depart" else f"from {behind.side}"
    path = Path(entry, ending, np.array(waypoints), (start, gone), direction, speed)

    sides_clear = (kind == "depart" or behind.clear) and (ahead.clear or not ending.startswith("leaves"))
    place = path.centres(np.array([end]))[0]
    inside = bool(((place > 8) & (place < FRAME - 8)).all())
    return path if sides_clear and (inside or gone < np.inf) else None


def sample_path(rng: Generator, start: float, end: float, spot: str, radius: float) -> Path:
    """A path whose every fact can be seen before `end`."""
    while True:
        path = (
            sample_rest(rng, start, end, spot) if rng.random() < 0.2 else sample_motion(rng, start, end, spot, radius)
        )
        if path is not None:
            return path


def sample_starts(rng: Generator, count: int, end: float) -> np.ndarray:
    """Entry times [count], at least ENTRY_GAP apart; the first object is often there from the start."""
    slack = max(end - LAST_ENTRY - ENTRY_GAP * (count - 1), 0.0)
    free = np.sort(rng.uniform(0, slack, count))
    if rng.random() < 0.5:
        free[0] = 0.0
    free[0] = min(free[0], 2.0)
    return free + ENTRY_GAP * np.arange(count)


def sample_thing(rng: Generator, colour: str, spot: str, start: float, end: float) -> Thing:
    """An object that enters at `start` seconds; `spot` is where it rests, stops or starts from, if it does."""
    size = str(rng.choice(list(RADII)))
    radius = rng.uniform(*RADII[size])
    digit = int(rng.integers(10)) if size == "large" and rng.random() < 0.6 else None
    return Thing(colour, str(rng.choice(SHAPES)), size, radius, digit, sample_path(rng, start, end, spot, radius))


def sample_scene(seed: tuple[int, ...], num_frames: int, max_objects: int = 5) -> Scene:
    """The scene of `seed`: 2 to 5 objects of different colours in `num_frames` frames at SAMPLED_FPS."""
    rng = np.random.default_rng(seed)
    most = min(MAX_OBJECTS.get(num_frames, 5), max_objects)
    count = int(rng.integers(min(MIN_OBJECTS.get(num_frames, 3), most - 1), most + 1))
    end = (num_frames - 1) / SAMPLED_FPS
    colours = rng.permutation(list(COLOURS))[:count]
    spots = rng.permutation(list(PLACES))[:count]
    starts = sample_starts(rng, count, end)
    things = tuple(
        sample_thing(rng, str(colour), str(spot), float(start), end)
        for colour, spot, start in zip(colours, spots, starts, strict=True)
    )
    look = {
        "drift_x": rng.uniform(-0.8, 0.8),  # pixels a second
        "drift_y": rng.uniform(-0.8, 0.8),
        "angle": rng.uniform(0, np.pi),
        "noise": rng.uniform(0.0, 0.03),  # standard deviation, of a range of 1
        "level": rng.uniform(-0.04, 0.04),
    }
    return Scene(seed, num_frames, str(rng.choice(list(BRIGHTNESS))), str(rng.choice(TEXTURES)), things, look)
