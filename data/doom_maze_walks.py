"""The walkers of the doom-maze recorder: each decides from the pose at a frame what to do next.

`explore` heads for cells that were rarely visited. `revisit` comes back: to cells, along paths, and to views
that it turned away from. `scripted` leaves a view for a set number of frames and regains it, for evaluation.
"""

import collections
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from doom_maze_files import ACTIONS
from doom_maze_map import CELL_SIZE, Cell, Maze

NOOP, FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(len(ACTIONS))
OPPOSITE = {LEFT: RIGHT, RIGHT: LEFT, NOOP: NOOP}

DEGREES_PER_FRAME = 15
HALF_CIRCLE = 180 // DEGREES_PER_FRAME  # in turns
HIDDEN = 90 // DEGREES_PER_FRAME  # turns after which nothing of a view is left: frames show 90 degrees
FRICTION = 0.90625**4  # the share of its speed that the engine leaves a player after a frame's four tics
GLIDE = FRICTION / (1 - FRICTION)  # how far a player still glides, in displacements of the last frame

TURN_AWAY = {"turn-away-8": 8, "turn-away-16": 16, "turn-away-32": 32, "turn-away-64": 64}
SCRIPTS = (*TURN_AWAY, "there-and-back")  # episode i runs script i modulo 5
FREE_FRAMES = 100  # of a scripted walk, before its script
FRAMES_AFTER_RETURN = 16  # at least so many views that were seen before follow the regained one
MIN_SCRIPTED_FRAMES = 280

Pose = tuple[float, float, float]  # x, y in map units and the angle in degrees


@dataclass
class ExploreWalk:
    """Walks to random cells, rarely visited ones first; now and then holds a random action for a while."""

    maze: Maze
    rng: random.Random
    path: list[Cell] = field(default_factory=list)
    held_action: int = NOOP
    num_held: int = 0  # frames for which held_action is still to be repeated
    num_still: int = 0  # frames since the last change of cell
    last_cell: Cell | None = None
    visits: collections.Counter[Cell] = field(default_factory=collections.Counter)

    def __call__(self, x: float, y: float, angle: float) -> int:
        """The next action at a pose (map units; degrees, counter-clockwise from the x axis)."""
        cell = cell_at(x, y)
        self.visits[cell] += 1
        if self.num_held > 0:
            self.num_held -= 1
            return self.held_action

        self.num_still = self.num_still + 1 if cell == self.last_cell else 0
        self.last_cell = cell
        if self.num_still > 40 or self.rng.random() < 0.02:
            self.path, self.num_still = [], 0
            self.held_action, self.num_held = random_held_action(self.rng)
            return self.held_action

        self._follow_path(cell)
        if not self.path:  # the goal is here
            return self.rng.choice([LEFT, RIGHT])
        return steer(x, y, angle, self.path[0])

    def _follow_path(self, cell: Cell) -> None:
        """Drop the cells of the path that are behind; choose a new goal at its end or when off it."""
        self.path = rest_of_path(self.path, cell)
        if not self.path:
            goal = rarely_visited(self.maze, self.rng, self.visits)
            self.path = shortest_path(self.maze, cell, goal)[1:]


class RevisitWalk:
    """Walks so that most of what it sees comes back.

    Half of its goals are cells that it has been to. A fifth of its walks goes out and back along the same
    path, and a tenth of its decisions is to turn around. On the way it looks away now and then, by 4 to 24
    turns and back by the same number, and seldom holds a random action.
    """

    def __init__(self, maze: Maze, rng: random.Random) -> None:
        self.maze, self.rng = maze, rng
        self.visits: collections.Counter[Cell] = collections.Counter()
        self.poses: list[Pose] = []  # at all frames up to the present one
        self._actions = self._walk()

    def __call__(self, x: float, y: float, angle: float) -> int:
        """The next action at a pose (map units; degrees, counter-clockwise from the x axis)."""
        self.poses.append((x, y, angle))
        self.visits[self.cell] += 1
        return next(self._actions)

    @property
    def frame(self) -> int:
        return len(self.poses) - 1

    @property
    def pose(self) -> Pose:
        return self.poses[-1]

    @property
    def cell(self) -> Cell:
        return cell_at(*self.pose[:2])

    @property
    def velocity(self) -> tuple[float, float]:
        """Map units from the last frame to this one."""
        last, now = self.poses[-2:] if self.frame else (self.pose, self.pose)
        return now[0] - last[0], now[1] - last[1]

    # What follows are generators of actions; at each `yield`, `self.pose` changes.

    def _walk(self) -> Iterator[int]:
        while True:
            choice = self.rng.random()
            if choice < 0.1:
                yield from self._turn(HALF_CIRCLE, self.rng.choice([LEFT, RIGHT]))
            elif choice < 0.28:
                path = shortest_path(self.maze, self.cell, self._goal())[: self.rng.randint(3, 6)]
                yield from self._stroll(path)
                yield from self._stroll(path[::-1])
            else:
                yield from self._stroll(shortest_path(self.maze, self.cell, self._goal()))

    def _goal(self) -> Cell:
        """A cell other than this one; a visited one half of the time."""
        if self.rng.random() < 0.5 and len(self.visits) > 1:
            return self.rng.choice(sorted(cell for cell in self.visits if cell != self.cell))
        while (goal := rarely_visited(self.maze, self.rng, self.visits)) == self.cell:
            pass
        return goal

    def _stroll(self, path: list[Cell]) -> Iterator[int]:
        """Follow a path, with distractions."""
        for action in self._follow(path):
            yield action
            chance = self.rng.random()
            if chance < 0.015:
                yield from self._look_away()
            elif chance < 0.025:
                action, num_more = random_held_action(self.rng)
                yield from self._turn(1 + num_more, action)

    def _follow(self, path: list[Cell]) -> Iterator[int]:
        """Walk along neighboring cells to the last; give up when off the path or stuck."""
        last_cell, num_still = None, 0
        while path := rest_of_path(path, self.cell):
            num_still = num_still + 1 if self.cell == last_cell else 0
            last_cell = self.cell
            if num_still > 40:
                action, num_more = random_held_action(self.rng)
                yield from self._turn(1 + num_more, action)
                return
            yield steer(*self.pose, path[0])

    def _look_away(self) -> Iterator[int]:
        num_turns, action = self.rng.randint(4, 24), self.rng.choice([LEFT, RIGHT])
        yield from self._turn(num_turns, action)
        yield from self._turn(self.rng.randint(0, 4), NOOP)
        yield from self._turn(num_turns, OPPOSITE[action])

    def _turn(self, num_frames: int, action: int) -> Iterator[int]:
        for _ in range(num_frames):
            yield action


class ScriptedWalk(RevisitWalk):
    """After a free walk, leaves one view and regains it, as the script says.

    `turn-away-N` turns away, so that nothing of the view is on screen for N frames, looks around meanwhile,
    and turns back. `there-and-back` walks up to 4 cells ahead and back to the same pose. Afterwards it turns
    over views that it has seen, and then walks freely again.
    """

    def __init__(self, maze: Maze, rng: random.Random, script: str) -> None:
        super().__init__(maze, rng)
        self.script = script
        self.start_frame: int | None = None  # the last frame with the view, before it is left
        self.return_frame: int | None = None  # the first frame with the same view again

    def _walk(self) -> Iterator[int]:
        free_walk = super()._walk()
        while self.frame < FREE_FRAMES:
            yield next(free_walk)
        while math.hypot(*self.velocity) > 0.5:
            yield NOOP
        for _ in range(2 * HALF_CIRCLE):  # a wall straight ahead would be a poor view to remember
            if self._path_ahead():
                break
            yield LEFT

        self.start_frame, start_pose = self.frame, self.pose
        if self.script in TURN_AWAY:
            script = self._turn_away(self.rng.choice([LEFT, RIGHT]), TURN_AWAY[self.script])
        else:
            script = self._there_and_back()
        was_hidden = False
        for action in script:
            yield action
            was_hidden |= not is_in_view(self.pose, start_pose)
            if was_hidden and is_same_view(self.pose, start_pose):
                break
        self.return_frame = self.frame

        turn = self._known_side(num_turns=3)
        for _ in range(3):
            yield from self._turn(3, turn)
            yield from self._turn(3, OPPOSITE[turn])
        yield from super()._walk()

    def _known_side(self, num_turns: int) -> int:
        """The turn that shows, `num_turns` times, only views that were seen before; noop if neither does."""
        x, y, angle = self.pose
        for turn, sign in ((LEFT, 1), (RIGHT, -1)):
            views = [(x, y, angle + sign * DEGREES_PER_FRAME * i) for i in range(1, num_turns + 1)]
            if all(any(is_same_view(view, pose) for pose in self.poses) for view in views):
                return turn
        return NOOP

    def _turn_away(self, turn: int, num_frames: int) -> Iterator[int]:
        """Turn until the view is hidden, keep it hidden for `num_frames` and turn back the same way."""
        yield from self._turn(HIDDEN, turn)
        turned, farthest = HIDDEN, 2 * HALF_CIRCLE - HIDDEN
        goal = self.rng.randint(HIDDEN + 2, farthest)
        for num_left in range(num_frames - 1, 0, -1):  # frames that are still to be hidden after this one
            if turned == goal:
                goal = self.rng.randint(HIDDEN, farthest)
            step = (goal > turned) - (goal < turned)
            while turned + step - HIDDEN > num_left - 1:  # or it could not be back in time
                step -= 1
            turned += step
            yield (NOOP, turn, OPPOSITE[turn])[step]
        yield from self._turn(HIDDEN, OPPOSITE[turn])

    def _there_and_back(self) -> Iterator[int]:
        (x, y, angle), cell = self.pose, self.cell
        path = self._path_ahead()
        yield from self._follow(path)
        yield from self._follow(path[::-1])
        while self.cell != cell:  # it got stuck, which is rare
            yield from self._follow(shortest_path(self.maze, self.cell, cell))
        yield from self._approach(x, y)
        # The long way around, so that the view is out of sight just before it is regained.
        left_turns = round(angle_between(self.pose, (x, y, angle)) / DEGREES_PER_FRAME)
        action = RIGHT if left_turns > 0 else LEFT
        yield from self._turn(2 * HALF_CIRCLE - abs(left_turns), action)

    def _path_ahead(self) -> list[Cell]:
        """From here through the cell straight ahead to one 4 steps away, or as far as there is one; or []."""
        x, y, angle = self.pose
        ahead = cell_at(
            x + CELL_SIZE * math.cos(math.radians(angle)), y + CELL_SIZE * math.sin(math.radians(angle))
        )
        if ahead not in neighbors(self.maze, self.cell):
            return []
        paths = [shortest_path(self.maze, self.cell, goal) for goal in self.maze.open_cells]
        paths = [path for path in paths if path[1:2] == [ahead] and len(path) <= 5]
        longest = max(len(path) for path in paths)
        return self.rng.choice([path for path in paths if len(path) == longest])

    def _approach(self, x: float, y: float) -> Iterator[int]:
        """Come to rest within 9 map units of a point in sight.

        A frame of forward moves the player by 16 map units in the end, after gliding, so that no point is
        farther than about 8 from where the player can stop.
        """
        while True:
            dx, dy = (
                goal - now - GLIDE * speed
                for goal, now, speed in zip((x, y), self.pose[:2], self.velocity, strict=True)
            )
            left_turn = (math.degrees(math.atan2(dy, dx)) - self.pose[2] + 180) % 360 - 180
            if math.hypot(dx, dy) < 9:
                if math.hypot(*self.velocity) < 0.5:
                    return
                yield NOOP
            elif abs(left_turn) <= DEGREES_PER_FRAME / 2 + 0.1:
                yield FORWARD
            else:
                yield LEFT if left_turn > 0 else RIGHT


def is_same_view(pose: Pose, other: Pose) -> bool:
    """Whether two poses differ by less than a frame of walking or turning makes."""
    return math.dist(pose[:2], other[:2]) < 16 and abs(angle_between(pose, other)) < DEGREES_PER_FRAME / 2


def is_in_view(pose: Pose, other: Pose) -> bool:
    """Whether two poses at one place show a part of the same; frames show 90 degrees."""
    return abs(angle_between(pose, other)) < 90 - 1  # turns add up to a multiple of 15 degrees within 1


def angle_between(pose: Pose, other: Pose) -> float:
    """Degrees to turn left from the angle of one pose to that of another, from -180 to 180."""
    return (other[2] - pose[2] + 180) % 360 - 180


def cell_at(x: float, y: float) -> Cell:
    return int(x // CELL_SIZE), int(y // CELL_SIZE)


def neighbors(maze: Maze, cell: Cell) -> list[Cell]:
    """The open cells beside a cell."""
    column, row = cell
    return [
        (column + dx, row + dy)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))
        if maze.grid[row + dy][column + dx]
    ]


def shortest_path(maze: Maze, start: Cell, goal: Cell) -> list[Cell]:
    """Cells from `start` to `goal`, both included."""
    came_from: dict[Cell, Cell | None] = {start: None}
    queue = collections.deque([start])
    while goal not in came_from:
        cell = queue.popleft()
        for neighbor in neighbors(maze, cell):
            if neighbor not in came_from:
                came_from[neighbor] = cell
                queue.append(neighbor)
    path = [goal]
    while (cell_before := came_from[path[-1]]) is not None:
        path.append(cell_before)
    return path[::-1]


def rest_of_path(path: list[Cell], cell: Cell) -> list[Cell]:
    """The cells of a path that are ahead when at `cell`; none when off the path."""
    if cell in path:
        return path[path.index(cell) + 1 :]
    is_beside = bool(path) and abs(cell[0] - path[0][0]) + abs(cell[1] - path[0][1]) == 1
    return path if is_beside else []


def rarely_visited(maze: Maze, rng: random.Random, visits: collections.Counter[Cell]) -> Cell:
    """The least visited of four random cells."""
    return min(rng.sample(maze.open_cells, 4), key=lambda goal: visits[goal])


def random_held_action(rng: random.Random) -> tuple[int, int]:
    """An action to do now, and for how many more frames."""
    action = rng.choice([NOOP, LEFT, LEFT, RIGHT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT])
    return action, rng.randint(1, 8)


def steer(x: float, y: float, angle: float, cell: Cell) -> int:
    """The action that leads from a pose toward the center of a cell."""
    column, row = cell
    to_cell = math.atan2((row + 0.5) * CELL_SIZE - y, (column + 0.5) * CELL_SIZE - x)
    left_turn = (math.degrees(to_cell) - angle + 180) % 360 - 180
    if abs(left_turn) < 10:
        return FORWARD
    if abs(left_turn) < 35:
        return FORWARD_LEFT if left_turn > 0 else FORWARD_RIGHT
    return LEFT if left_turn > 0 else RIGHT
