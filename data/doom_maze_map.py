"""Random mazes as playable ViZDoom maps: grids, textures, UDMF text and the WAD file that holds them.

A maze is a square grid of cells; `grid[row][column]` is True where one can walk. Columns count along x and
rows along y, so a cell covers map units [column * CELL_SIZE, (column + 1) * CELL_SIZE) in x, likewise in y.
The engine builds the BSP nodes of a UDMF map when it loads it, so no node builder is needed.
"""

import hashlib
import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CELL_SIZE = 112  # map units; the player is 32 wide and 56 high
WALL_HEIGHT = 96  # map units
LIGHT_LEVELS = (176, 224)  # range of a region's light, of 255
NODES_PER_SIDE = (4, 5)  # least and most; a maze of n x n nodes has (2n + 1) x (2n + 1) cells with its border
LOOP_PROBABILITY = 0.15  # that a wall between two nodes is opened, so that mazes are not trees
VALIDATION_SHARE = 8  # one layout in eight belongs to the validation split

# Names of textures in the Freedoom WAD that comes with ViZDoom.
# fmt: off
WALLS = (
    "REDWALL", "SP_HOT1", "STWALL", "BIGMURAL", "AQLITE12", "A-CAMO4", "DOKGRIR", "COMPBLUE", "ZZWOLF9",
    "SKSNAKE2", "STARBR2", "WOOD3", "BRICK6", "AQPANL10", "MARBLE1", "GRAYRED", "CARLLF1", "BIGBRIK1",
    "SILVER2", "TEKGREN1",
)
LANDMARKS = (
    "PANRED", "PANBLACK", "ZZWOLF3B", "ZZWOLF12", "AQLITE15", "AQLITE10", "AQLITE07", "AQLITE13", "BRICKLIT",
)
FLOORS = (
    "FLOOR1_6", "FLAT14", "FLAT5_3", "FLOOR7_2", "AQF022", "FLAT8", "FLOOR4_6", "AQF047", "MFLR8_3", "FLAT20",
    "FLOOR0_2", "FLAT5_1",
)
CEILINGS = ("CEIL3_5", "FLAT18", "CEIL5_2", "FLAT1_1", "FLOOR0_5", "CEIL1_1", "FLAT19", "AQF007")
# fmt: on


@dataclass(frozen=True)
class Style:
    """What a maze is made of."""

    walls: tuple[str, ...]
    landmarks: tuple[str, ...]
    landmark_probability: float  # that one wall face carries a landmark in place of its region's texture
    floors: tuple[str, ...] = FLOORS
    ceilings: tuple[str, ...] = CEILINGS


# Textures of which little is left at 64 x 64 pixels. The autoencoder of checkpoints/far-doom-maze-64
# reconstructs mazes that are made of one of these walls at 24.8 to 26.1 dB, of the other walls at 27.7 to
# 34.9 dB; of one of these landmarks at 22.3 and 23.9 dB, of the others at 24.6 to 29.7 dB. Measured with
#     python data/measure_textures.py checkpoints/far-doom-maze-64/vae
BLURRED = ("ZZWOLF9", "A-CAMO4", "SKSNAKE2", "SILVER2", "AQPANL10", "AQLITE12", "AQLITE07", "AQLITE15")

ORIGINAL = Style(WALLS, LANDMARKS, 0.12)
MEMORABLE = Style(
    walls=tuple(texture for texture in WALLS if texture not in BLURRED),
    landmarks=tuple(texture for texture in LANDMARKS if texture not in BLURRED),
    landmark_probability=0.24,
)
# Of textures that neither of them has: a world that the shipped models never saw, to fine-tune them on.
# fmt: off
OTHER = Style(
    walls=(
        "BRICK10", "MARBGRAY", "GSTONE1", "WOOD12", "TANROCK2", "CRATE1", "METAL1", "STONE2", "STARG3",
        "PANEL5", "ZIMMER2", "A-BRICK2", "TEKWALL1", "ICKWALL3", "BSTONE2", "SPACEW2",
    ),
    landmarks=("PANBLUE", "EXITSTON", "MARBFACE", "PANBOOK", "MURAL1", "COMPSTA1"),
    landmark_probability=0.12,
    floors=(
        "FLOOR5_1", "FLAT5_4", "GRASS1", "RROCK04", "MFLR8_1", "FLAT1", "FLOOR4_8", "SLIME13", "FLAT10",
        "CEIL4_2", "AQF004", "FLOOR6_1",
    ),
    ceilings=("CEIL3_1", "FLAT5_5", "CEIL4_1", "FLAT23", "FLOOR7_1", "AQF012"),
)
# fmt: on
MAX_TEXTURES = len(FLOORS)  # regions of one maze differ in their walls and in their floors

Grid = tuple[tuple[bool, ...], ...]
Cell = tuple[int, int]  # (column, row)
Point = tuple[int, int]  # a corner of the grid, in cells


@dataclass(frozen=True)
class Maze:
    """One maze: where one can walk, and the map text the engine loads."""

    grid: Grid
    map_text: str

    @property
    def open_cells(self) -> list[Cell]:
        return [
            (column, row)
            for row, cells in enumerate(self.grid)
            for column, is_open in enumerate(cells)
            if is_open
        ]

    def rows(self) -> list[str]:
        """The grid as text, one string per row, '#' for a wall and '.' for an open cell."""
        return ["".join("." if is_open else "#" for is_open in cells) for cells in self.grid]


def build_maze(
    split: str,
    rng: random.Random,
    num_textures: int,
    nodes_per_side: tuple[int, int] = NODES_PER_SIDE,
    style: Style = ORIGINAL,
) -> Maze:
    """A random maze whose layout belongs to `split`, with `num_textures` differently textured regions.

    Every layout belongs to one split (see `split_of_grid`), so splits share no maze, however many there are.
    """
    sizes = range(nodes_per_side[0], nodes_per_side[1] + 1)
    while split_of_grid(grid := random_grid(rng, rng.choice(sizes))) != split:
        pass
    return Maze(grid, map_text(grid, rng, num_textures, style))


def split_of_grid(grid: Grid) -> str:
    """The split a layout belongs to: a hash decides, the same for all rotations and reflections."""
    variants = []
    for turned in (grid, tuple(zip(*grid, strict=True))):
        for flipped in (turned, turned[::-1]):
            variants += [flipped, tuple(cells[::-1] for cells in flipped)]
    digest = hashlib.sha256(repr(min(variants)).encode()).digest()
    return "validation" if digest[0] % VALIDATION_SHARE == 0 else "train"


def random_grid(rng: random.Random, nodes_per_side: int) -> Grid:
    """A depth-first maze with some walls opened into loops and one room of 3 x 3 cells."""
    side = 2 * nodes_per_side + 1
    is_open = [[False] * side for _ in range(side)]

    column, row = (2 * rng.randrange(nodes_per_side) + 1 for _ in range(2))
    is_open[row][column] = True
    trail = [(column, row)]
    while trail:
        column, row = trail[-1]
        steps = [
            (dx, dy)
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))
            if 0 < column + 2 * dx < side
            and 0 < row + 2 * dy < side
            and not is_open[row + 2 * dy][column + 2 * dx]
        ]
        if not steps:
            trail.pop()
            continue
        dx, dy = rng.choice(steps)
        is_open[row + dy][column + dx] = is_open[row + 2 * dy][column + 2 * dx] = True
        trail.append((column + 2 * dx, row + 2 * dy))

    for row in range(1, side - 1):
        for column in range(1, side - 1):
            between_nodes = (column + row) % 2 == 1
            if between_nodes and not is_open[row][column] and rng.random() < LOOP_PROBABILITY:
                is_open[row][column] = True

    column, row = (2 * rng.randrange(nodes_per_side - 1) + 1 for _ in range(2))
    for cells in is_open[row : row + 3]:
        cells[column : column + 3] = [True] * 3
    return tuple(tuple(cells) for cells in is_open)


def map_text(grid: Grid, rng: random.Random, num_textures: int, style: Style = ORIGINAL) -> str:
    """The maze in UDMF, the text format of Doom maps, with a random start.

    The maze is cut into `num_textures` regions, each the cells nearest to a random point. A region has a wall
    texture, a floor, a ceiling and a light level of its own, and is one sector of the map.
    """
    side = len(grid)
    regions = range(num_textures)
    centers = [(rng.uniform(0, side), rng.uniform(0, side)) for _ in regions]
    walls = rng.sample(style.walls, num_textures)
    floors = rng.sample(style.floors, num_textures)
    ceilings = [rng.choice(style.ceilings) for _ in regions]
    lights = [rng.randint(*LIGHT_LEVELS) for _ in regions]

    vertices: dict[Point, int] = {}
    line_blocks: list[str] = []
    side_blocks: list[str] = []

    def region_of(column: int, row: int) -> int:
        return min(regions, key=lambda k: (centers[k][0] - column) ** 2 + (centers[k][1] - row) ** 2)

    def vertex(point: Point) -> int:
        return vertices.setdefault(point, len(vertices))

    def sidedef(region: int, texture: str | None = None) -> int:
        middle = f'texturemiddle="{texture}";' if texture else ""
        side_blocks.append(f"sidedef{{sector={region};{middle}}}")
        return len(side_blocks) - 1

    open_cells = [(column, row) for row in range(side) for column in range(side) if grid[row][column]]
    for column, row in open_cells:
        region = region_of(column, row)
        # Edges run so that the open cell lies on their right, which is a line's front.
        for dx, dy, start, end in (
            (0, -1, (column + 1, row), (column, row)),
            (-1, 0, (column, row), (column, row + 1)),
            (0, 1, (column, row + 1), (column + 1, row + 1)),
            (1, 0, (column + 1, row + 1), (column + 1, row)),
        ):
            if not grid[row + dy][column + dx]:  # the border is always wall, so the index stays inside
                is_landmark = rng.random() < style.landmark_probability
                texture = rng.choice(style.landmarks) if is_landmark else walls[region]
                sides = f"sidefront={sidedef(region, texture)};blocking=true;"
            elif dx + dy > 0 and (other := region_of(column + dx, row + dy)) != region:
                sides = f"sidefront={sidedef(region)};sideback={sidedef(other)};twosided=true;"
            else:
                continue  # inside one region, or a border already drawn from the other cell
            line_blocks.append(f"linedef{{v1={vertex(start)};v2={vertex(end)};{sides}}}")

    column, row = rng.choice(open_cells)
    x, y = (column + 0.5) * CELL_SIZE, (row + 0.5) * CELL_SIZE
    skills = "".join(f"skill{level}=true;" for level in range(1, 6))
    player = f"thing{{x={x};y={y};angle={rng.randrange(0, 360, 15)};type=1;{skills}single=true;class1=true;}}"
    return "\n".join(
        [
            'namespace="zdoom";',
            *(f"vertex{{x={x * CELL_SIZE};y={y * CELL_SIZE};}}" for x, y in vertices),
            *line_blocks,
            *side_blocks,
            *(
                f"sector{{heightfloor=0;heightceiling={WALL_HEIGHT};"
                f'texturefloor="{floors[k]}";textureceiling="{ceilings[k]}";lightlevel={lights[k]};}}'
                for k in regions
            ),
            player,
        ]
    )


def write_wad(path: Path, maps: Iterable[tuple[str, str]]) -> None:
    """Write (name, UDMF text) pairs as one WAD file; names have at most 8 characters."""
    lumps = [
        lump for name, text in maps for lump in ((name, b""), ("TEXTMAP", text.encode()), ("ENDMAP", b""))
    ]
    header_size = 12
    directory, offset = b"", header_size
    for name, content in lumps:
        directory += struct.pack("<ii8s", offset, len(content), name.encode())
        offset += len(content)
    header = struct.pack("<4sii", b"PWAD", len(lumps), offset)
    path.write_bytes(header + b"".join(content for _, content in lumps) + directory)
