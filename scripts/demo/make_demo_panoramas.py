"""Render equirectangular panoramas of box rooms with square lamps on the ceiling, and their depth maps.

    python scripts/demo/make_demo_panoramas.py demo/rooms --areas 4 --rooms 3 --frames 7 --height 64 --depth

Writes FOLDER/area0/room0/output/panorama_0000.png, ... (twice as wide as high) and with --depth depth_0000.png (16 bit,
millimetres along the ray; 0 where nothing was measured, the windows). The camera moves through each room. The same seed
gives the same files.
"""

from __future__ import annotations

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vae3d.argparse_types import non_negative_int, positive_int

SAMPLES = 2  # rays per pixel and axis
MILLIMETRES = 1000
FLOOR, CEILING, LAMP_EDGE, WHITE = (4, 5, (70, 70, 74), (255, 255, 250))  # faces are 2 * axis + (1 at the far end)


@dataclass(frozen=True)
class Room:
    """A room of `size` (x, y, z) metres, z up, a corner at the origin, a cupboard on the floor from `low` to `high`."""

    size: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lamps: np.ndarray  # [N, 2], centres
    lamp_side: float
    walls: np.ndarray  # [4, 3], colours
    floors: np.ndarray  # [2, 3]
    stripes: np.ndarray  # [4], width in metres of each wall's stripes; 0 is none
    noise: np.ndarray  # [16, 16], tiled
    door: int  # of the four walls
    window: int
    picture: int
    blocks: np.ndarray  # [3, 4, 3], colours of the picture


def furnish(rng: np.random.Generator) -> Room:
    size = np.array([rng.uniform(4, 7), rng.uniform(3.5, 6), rng.uniform(2.5, 3.2)])
    cupboard = np.array([rng.uniform(0.6, 1.0), rng.uniform(0.5, 0.9), rng.uniform(0.7, 1.6)])
    corner = rng.integers(0, 2, 2) * (size[:2] - cupboard[:2])
    low = np.array([*corner, 0.0])
    across, along = rng.integers(1, 3), rng.integers(1, 3)
    x, y = (np.linspace(0, side, n + 2)[1:-1] for side, n in ((size[0], across + 1), (size[1], along)))
    door, window, picture = rng.permutation(4)[:3]
    return Room(
        size=size,
        low=low,
        high=low + cupboard,
        lamps=np.stack(np.meshgrid(x, y), -1).reshape(-1, 2),
        lamp_side=rng.uniform(0.5, 0.8),
        walls=rng.uniform(120, 225, (4, 3)),
        floors=np.stack([rng.uniform(60, 110, 3), rng.uniform(130, 190, 3)]),
        stripes=rng.choice([0.0, 0.0, 0.25, 0.4], 4),
        noise=rng.uniform(-1, 1, (16, 16)),
        door=int(door),
        window=int(window),
        picture=int(picture),
        blocks=rng.uniform(30, 255, (3, 4, 3)),
    )


def directions(height: int) -> np.ndarray:
    """[H, 2H, 3] unit vectors through the pixels' centres: the top row points up, the middle column along x."""
    latitude = (0.5 - (np.arange(height) + 0.5) / height) * np.pi
    longitude = ((np.arange(2 * height) + 0.5) / (2 * height) - 0.5) * 2 * np.pi
    up, right = np.meshgrid(latitude, longitude, indexing="ij")
    return np.stack([np.cos(up) * np.cos(right), -np.cos(up) * np.sin(right), np.sin(up)], -1)


def slabs(eye: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., 3] distances along the rays at which they enter and leave a box, axis by axis."""
    with np.errstate(divide="ignore"):
        both = np.stack([(low - eye) / rays, (high - eye) / rays])
    return both.min(0), both.max(0)


def trace(room: Room, eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance, face (of the room 0 to 5, of the cupboard 6 to 11) and point that each ray hits."""
    _, leave = slabs(eye, rays, np.zeros(3), room.size)
    axis = leave.argmin(-1)
    distance, face = leave.min(-1), 2 * axis + (np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0)
    enter, leave = slabs(eye, rays, room.low, room.high)
    axis, near = enter.argmax(-1), enter.max(-1)
    hit = (near > 0) & (near < leave.min(-1))
    side = 2 * axis + (np.take_along_axis(rays, axis[..., None], -1)[..., 0] < 0)
    distance, face = np.where(hit, near, distance), np.where(hit, 6 + side, face)
    return distance, face, eye + distance[..., None] * rays


def inside(u: np.ndarray, v: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Whether points lie in (left, bottom, right, top)."""
    return (u > box[0]) & (v > box[1]) & (u < box[2]) & (v < box[3])


def speckle(room: Room, u: np.ndarray, v: np.ndarray, cell: float) -> np.ndarray:
    """Smooth noise in [-1, 1] with features of `cell` metres, interpolated from the room's lattice."""
    x, y = u / cell, v / cell
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    s, t = (3 * f**2 - 2 * f**3 for f in (x - i, y - j))
    at = lambda a, b: room.noise[(i + a) % 16, (j + b) % 16]  # noqa: E731
    return (at(0, 0) * (1 - s) + at(1, 0) * s) * (1 - t) + (at(0, 1) * (1 - s) + at(1, 1) * s) * t


def window_box(room: Room) -> tuple[float, float, float, float]:
    length = room.size[1] if room.window < 2 else room.size[0]
    return (0.3 * length, 0.9, 0.7 * length, 2.0)


def paint_wall(room: Room, wall: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Colours of points on a wall, u metres along it and v above the floor."""
    length = room.size[1] if wall < 2 else room.size[0]
    colour = room.walls[wall] * (1 + 0.06 * speckle(room, u, v, 0.3))[..., None]
    if room.stripes[wall]:
        colour = np.where((u // room.stripes[wall] % 2 == 0)[..., None], colour, 0.75 * colour)

    def put(box: tuple[float, float, float, float], paint: np.ndarray | tuple[float, ...]) -> None:
        np.copyto(colour, np.broadcast_to(paint, colour.shape), where=inside(u, v, box)[..., None])

    put((0, 0, length, 0.1), (245, 240, 230))  # skirting board
    if wall == room.door:
        left = 0.55 * length
        put((left - 0.08, 0, left + 0.98, 2.13), (235, 230, 220))
        put((left, 0, left + 0.9, 2.05), (120, 78, 48))
        put((left + 0.75, 1.0, left + 0.83, 1.06), (220, 200, 90))
    if wall == room.window:
        left, bottom, right, top = window_box(room)
        put((left - 0.07, bottom - 0.07, right + 0.07, top + 0.07), (250, 250, 250))
        glass = np.stack([150 + 30 * v, 190 + 20 * v, np.full_like(v, 250)], -1)
        put((left, bottom, right, top), glass)
        middle = (left + right) / 2
        put((middle - 0.03, bottom, middle + 0.03, top), (250, 250, 250))
    if wall == room.picture:
        left, bottom = 0.35 * length, 1.2
        put((left - 0.06, bottom - 0.06, left + 1.26, bottom + 0.81), (40, 30, 25))
        row, column = np.clip((v - bottom) // 0.25, 0, 2).astype(int), np.clip((u - left) // 0.3, 0, 3).astype(int)
        put((left, bottom, left + 1.2, bottom + 0.75), room.blocks[row, column])
    return colour


def paint(room: Room, face: np.ndarray, point: np.ndarray) -> np.ndarray:
    """[..., 3] colours of the points that rays hit."""
    x, y, z = np.moveaxis(point, -1, 0)
    colour = np.empty(point.shape)
    for wall in range(4):
        here = face == wall
        colour[here] = paint_wall(room, wall, (y if wall < 2 else x)[here], z[here])
    tile = ((x // 0.5 + y // 0.5) % 2).astype(int)
    tiles = room.floors[tile] * (1 + 0.1 * speckle(room, x, y, 0.15))[..., None]
    np.copyto(colour, tiles, where=(face == FLOOR)[..., None])
    np.copyto(colour, (0.93 + 0.02 * speckle(room, x, y, 0.6))[..., None] * 245, where=(face == CEILING)[..., None])
    doors = np.where((z % 0.4 < 0.02)[..., None], (60, 42, 30), (150, 108, 70)) * np.ones_like(colour)
    np.copyto(colour, doors, where=(face >= 6)[..., None])
    colour *= shade(room, face, point)[..., None]
    for lamp in room.lamps:  # after shading, because lamps emit light
        off = np.maximum(abs(x - lamp[0]), abs(y - lamp[1]))
        for half, paint_ in ((room.lamp_side / 2 + 0.04, LAMP_EDGE), (room.lamp_side / 2, WHITE)):
            np.copyto(colour, np.array(paint_, float), where=((face == CEILING) & (off < half))[..., None])
    return colour.clip(0, 255)


def shade(room: Room, face: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Light at the points: ambient light, and more from lamps that are near and in front."""
    normal = np.zeros((12, 3))
    normal[np.arange(12), np.arange(12) % 6 // 2] = np.tile([1.0, -1.0], 6) * np.repeat([1.0, -1.0], 6)
    light = np.zeros(face.shape)
    for lamp in room.lamps:
        towards = np.array([*lamp, room.size[2] - 0.01]) - point
        distance = np.linalg.norm(towards, axis=-1)
        light += np.maximum((towards * normal[face]).sum(-1), 0) / distance / (1 + distance**2)
    ambient = np.where(face == CEILING, 0.85, 0.55)  # the ceiling gets no direct light, but the floor's
    return np.minimum(ambient + 1.2 * light / len(room.lamps) ** 0.5, 1.1)


def render(room: Room, eye: np.ndarray, height: int) -> np.ndarray:
    """[H, 2H, 3] uint8, the mean of SAMPLES x SAMPLES rays per pixel."""
    _, face, point = trace(room, eye, directions(SAMPLES * height))
    fine = paint(room, face, point).reshape(height, SAMPLES, 2 * height, SAMPLES, 3)
    return np.rint(fine.mean((1, 3))).astype(np.uint8)


def depth(room: Room, eye: np.ndarray, height: int) -> np.ndarray:
    """[H, 2H] uint16, millimetres along the ray of each pixel's centre; 0 in windows."""
    distance, face, point = trace(room, eye, directions(height))
    along = point[..., 1] if room.window < 2 else point[..., 0]
    glass = (face == room.window) & inside(along, point[..., 2], window_box(room))
    return np.where(glass, 0, np.rint(distance * MILLIMETRES)).astype(np.uint16)


def walk(room: Room, frames: int, rng: np.random.Generator) -> np.ndarray:
    """[frames, 3] camera positions on a straight line through the middle of the room."""
    start, end = (room.size * [*rng.uniform(0.35, 0.65, 2), 0] + [0, 0, 1.5] for _ in range(2))
    return start + (end - start) * np.linspace(0, 1, frames)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (("areas", 4), ("rooms", 3), ("frames", 7), ("height", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=non_negative_int if name == "seed" else positive_int, default=default)
    parser.add_argument("--depth", action="store_true", help="also write depth maps")
    args = parser.parse_args()
    for area in range(args.areas):
        for number in range(args.rooms):
            rng = np.random.default_rng([args.seed, area, number])
            room = furnish(rng)
            output = args.folder / f"area{area}/room{number}/output"
            output.mkdir(parents=True, exist_ok=True)
            for i, eye in enumerate(walk(room, args.frames, rng)):
                Image.fromarray(render(room, eye, args.height)).save(output / f"panorama_{i:04d}.png")
                if args.depth:
                    Image.fromarray(depth(room, eye, args.height)).save(output / f"depth_{i:04d}.png")
    count = args.areas * args.rooms
    size = f"{args.height}x{2 * args.height}"
    print(f"{count} rooms of {args.areas} areas, {args.frames} panoramas of {size} each -> {args.folder}")


if __name__ == "__main__":
    main()
