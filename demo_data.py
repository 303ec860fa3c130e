"""Generates the data sets of --demo, and computes the naive baseline of each.

    python demo_data.py cells --output-dir data/cells --count 60
    python demo_data.py scenes --output-dir data/scenes --count 100

cells   The layout of train_unet.py: images/NAME.png (RGB), masks/0/NAME.png (0 ground, 255 cell).
        Touching cells of varied brightness on uneven ground, with bright specks that are not
        labelled, so that brightness alone misleads.
scenes  The PASCAL VOC layout of train_deeplabv3.py, a fifth in val.txt.
        Discs with rings, squares with checks, triangles with dots. Their hues overlap each
        other's and the ground's, so that colour alone misleads. Borders are 255.
objects The layout of train_efficientsam.py: imgs/NAME.npy, gts/NAME.npy.
        Leaves, beans and stars that overlap, one id per object.
plain   The PASCAL VOC layout of finetune_sam_decoder.py, SegmentationObject; every 20th in val.txt.
        Long blobs of one colour. Borders are 255.
rings   The same, a fifth in val.txt: rings of two colours, which a net that knows plain has not seen.
clips   The layout of train_sam2.py: JPEGImages/NAME/00000.jpg, Annotations/NAME/00000.png, a fifth
        in ImageSets/val.txt. A coloured shape passes behind a bar, leaves the image and comes back,
        or comes late.

Numpy and OpenCV only. Image i of a kind is the same on every machine and for every count.
"""
import argparse
import errno
import json
import re
from pathlib import Path

import cv2
import numpy as np

# Files that a demo writes
WRITTEN = r"/((cell|scene|object|blob|clip)_\d+(\.\w+|/\d+\.\w+)|(train|val)\.txt|class_names\.json)$"


def smooth_noise(rng, size, cells):
    """Smooth random field (size, size) in about [-1, 1] with `cells` bumps along each side."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def draw_cells(index, size=96):
    """Image `index`: image (size, size, 3) uint8 RGB, mask (size, size) uint8 in {0, 255}."""
    rng = np.random.default_rng([1, index])
    # The ground: in some places as bright as cells in others
    image = 0.40 + 0.22 * smooth_noise(rng, size, 3)
    mask = np.zeros((size, size), np.uint8)

    centres = [rng.uniform(0.1, 0.9, 2) * size]
    for _ in range(rng.integers(7, 13)):  # most cells touch an earlier one
        near = centres[rng.integers(len(centres))] + rng.normal(0, size * 0.13, 2)
        centres.append(near if rng.random() < 0.6 else rng.uniform(0, size, 2))
    for centre in centres:
        axes = rng.uniform(0.05, 0.11, 2) * size
        angle = rng.uniform(0, 180)
        cell = np.zeros((size, size), np.uint8)
        cv2.ellipse(
            cell, (centre.round().astype(int).tolist(), (2 * axes).tolist(), angle), 255, -1)
        inside = cell > 0
        depth = cv2.distanceTransform(cell, cv2.DIST_L2, 3)
        # Cells have a bright rim and a grainy inside
        texture = 0.07 * smooth_noise(rng, size, 24)
        rim = 0.10 * np.exp(-np.square(depth - 1.5) / 2)
        image[inside] = (image + rng.uniform(0.02, 0.26) + texture + rim)[inside]
        mask[inside] = 255

    for _ in range(rng.integers(10, 18)):  # dirt: brighter than any cell, not labelled
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        radius = int(rng.integers(1, 4))
        speck = cv2.circle(np.zeros((size, size), np.float32), centre, radius, 1.0, -1)
        image[(speck > 0) & (mask == 0)] += rng.uniform(0.35, 0.5)

    image = cv2.GaussianBlur(image, (0, 0), 0.7) + rng.normal(0, 0.03, (size, size))
    tint = np.array([0.85, 0.95, 1.0]) + rng.uniform(-0.05, 0.05, 3)
    return (image[..., None] * tint * 255).clip(0, 255).astype(np.uint8), mask


SCENE_CLASSES = ("background", "disc", "square", "triangle")


def outline(kind, centre, radius, angle):
    """Polygon (N, 2) of a disc, square or triangle (1, 2, 3), each about as large as the disc."""
    sides, reach = {1: (40, 1.0), 2: (4, 1.25), 3: (3, 1.5)}[kind]
    turns = angle + 2 * np.pi * np.arange(sides) / sides
    return centre + radius * reach * np.stack([np.cos(turns), np.sin(turns)], 1)


def pattern(kind, size, centre, angle, rng):
    """Texture (size, size) in {-1, 1}: rings (1), checks (2) or dots (3) about centre."""
    y, x = np.mgrid[:size, :size] - centre[::-1, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(0.08, 0.11) * size
    waves = {
        1: np.sin(2 * np.pi * np.hypot(x, y) / period),
        2: np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period),
        3: np.cos(2 * np.pi * u / period) + np.cos(2 * np.pi * v / period) - 0.6,
    }
    return np.sign(waves[kind])


def draw_scene(index, size=128):
    """Image `index`: image (size, size, 3) uint8 RGB, mask (size, size) uint8.

    The mask has indices into SCENE_CLASSES, and 255.
    """
    rng = np.random.default_rng([2, index])
    hue = rng.uniform(0, 180) + 25 * smooth_noise(rng, size, 4)
    value = 130 + 35 * smooth_noise(rng, size, 5)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 5)):
        kind = int(rng.integers(1, 4))
        centre, radius = rng.uniform(0.15, 0.85, 2) * size, rng.uniform(0.20, 0.30) * size
        angle = rng.uniform(0, 2 * np.pi)
        polygon = outline(kind, centre, radius, angle).round().astype(np.int32)
        inside = cv2.fillPoly(np.zeros((size, size), np.uint8), [polygon], 1) > 0
        hue[inside] = (rng.normal(30 + 60 * kind, 25) + 6 * smooth_noise(rng, size, 8))[inside]
        brightness = rng.uniform(100, 170)
        value[inside] = (brightness + 45 * pattern(kind, size, centre, angle, rng))[inside]
        mask[inside] = kind
        cv2.polylines(mask, [polygon], True, 255, 2)
    colours = np.stack([hue % 180, np.full_like(hue, 110), value.clip(0, 255)], -1).astype(np.uint8)
    image = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB) + rng.normal(0, 8, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def write(kind, folder, count, **options):
    """Writes `count` images of this kind in their layout under folder; returns folder.

    FileExistsError if the folder holds files with other names than a demo gives: its lists and
    classes might be of a data set that somebody uses.
    """
    for path in Path(folder).rglob("*"):
        hidden = "/." in f"/{path.relative_to(folder).as_posix()}" or path.name in ("Thumbs.db", "desktop.ini")
        if not hidden and path.is_file() and not re.search(WRITTEN, path.as_posix()):
            raise FileExistsError(errno.EEXIST, "was not written by a demo, and might be replaced", str(path))
    WRITE[kind](Path(folder), count, **options)
    return Path(folder)


def write_cells(folder, count):
    for sub in ("images", "masks/0"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = draw_cells(index)
        save(folder / "images" / f"cell_{index:04d}.png", image)
        save(folder / "masks/0" / f"cell_{index:04d}.png", mask)


def write_scenes(folder, count):
    root = folder / "VOCdevkit" / "VOC2012"
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = draw_scene(index)
        save(root / "JPEGImages" / f"scene_{index:04d}.jpg", image)
        save(root / "SegmentationClass" / f"scene_{index:04d}.png", mask)
    write_lists(root, "scene", count)
    class_names = {name: i for i, name in enumerate(SCENE_CLASSES)}
    (root / "class_names.json").write_text(json.dumps(class_names))


def object_outline(kind, width):
    """Polygon (60, 2) in [-1, 1] of a leaf, bean or star (0, 1, 2); width of the first two."""
    turns = 2 * np.pi * np.arange(60) / 60
    x, y = np.cos(turns), np.sin(turns)
    if kind == 0:
        return np.stack([x, width * y * np.abs(y)**0.5], 1)
    if kind == 1:
        return np.stack([x, 0.8 * width * y + 0.5 * x**2 - 0.25], 1)
    return np.stack([x, y], 1) * (0.78 + 0.22 * np.cos(5 * turns))[:, None]


def draw_object_ids(index, size=128):
    """Image `index`: image (size, size, 3) uint8 RGB, ids (size, size) uint16 of 2 to 4 objects.

    Each is a leaf, bean or star with its own colour and texture.
    """
    rng = np.random.default_rng([3, index])
    image = 120 + 25 * np.stack([smooth_noise(rng, size, 4) for _ in range(3)], -1)
    ids = np.zeros((size, size), np.uint16)
    colours, areas = [np.full(3, 120.0)], [size**2]
    wanted = int(rng.integers(2, 5))
    for _ in range(200):
        if len(areas) > wanted:
            break
        tilt, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.18, 0.29) * size
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        shape = object_outline(rng.integers(3), rng.uniform(0.35, 0.6)) @ turn
        polygon = rng.uniform(0.15, 0.85, 2) * size + length * shape
        inside = cv2.fillPoly(np.zeros((size, size), np.uint8),
                              [polygon.round().astype(np.int32)], 1) > 0
        visible = np.bincount(ids[~inside], minlength=len(areas))
        if (visible < 0.75 * np.array(areas)).any():  # would hide too much of the ground or of an object
            continue
        # Of eight colours the one least like the ground and the earlier objects
        drawn = rng.uniform(30, 225, (8, 1, 3))
        colour = drawn[np.linalg.norm(drawn - colours, axis=2).min(1).argmax(), 0]
        grain = rng.uniform(8, 30) * smooth_noise(rng, size, int(rng.integers(16, 40)))
        image[inside] = (colour + grain[..., None])[inside]
        ids[inside] = len(areas)
        colours.append(colour)
        areas.append(np.count_nonzero(inside))
    image = image + rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), ids


def draw_grid(draw, index, grid):
    """Image `index` of grid * grid drawings side by side: image, ids of draw(i), numbered through.

    draw: draw_object_ids or draw_instances, of at most 4 objects and 255; grid: at most 7.
    """
    images, ids = zip(*[draw(i) for i in range(index * grid**2, (index + 1) * grid**2)])
    ids = [np.where((part > 0) & (part < 255), part + 4 * i, part) for i, part in enumerate(ids)]
    return [np.concatenate([np.concatenate(parts[row:row + grid], 1) for row in range(0, grid**2, grid)])
            for parts in (images, ids)]


def write_objects(folder, count, grid=1):
    for sub in ("imgs", "gts"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        for sub, pixels in zip(("imgs", "gts"), draw_grid(draw_object_ids, index, grid)):
            np.save(folder / sub / f"object_{index:04d}.npy", pixels)


def draw_instances(index, size=192, rings=False):
    """Image `index`: image (size, size, 3) uint8 RGB, ids (size, size) uint8 of 2 to 4 objects.

    Long blobs of one colour each, or rings of two colours with the ground in their hole. Edges are
    255.
    """
    rng = np.random.default_rng([4 + rings, index])
    ground_colour = rng.uniform(60, 190, 3)
    image = ground_colour + 18 * np.stack([smooth_noise(rng, size, 5) for _ in range(3)], -1)
    ground, ids, placed = image.copy(), np.zeros((size, size), np.uint8), []
    mean_colour = ground.mean((0, 1))
    turns = 2 * np.pi * np.arange(60) / 60
    for _ in range(60):
        if len(placed) == 4 or len(placed) >= 2 and rng.random() < 0.1:
            break
        centre, length = rng.uniform(0.15, 0.85, 2) * size, rng.uniform(0.14, 0.21) * size
        if any(np.hypot(*(centre - other)) < length + reach + 6 for other, reach in placed):
            continue
        angle = rng.choice([-1, 1]) * rng.uniform(0.4, 1.2)
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-np.sin(angle), np.cos(angle)])
        width = rng.uniform(0.75, 1) if rings else rng.uniform(0.27, 0.42)
        waves = 1 + sum(rng.uniform(0, 0.1) * np.cos(k * turns + rng.uniform(0, 6)) for k in (2, 3))
        shape = np.cos(turns)[:, None] * along + width * np.sin(turns)[:, None] * across
        shape = length * waves[:, None] * shape
        colours = sorted(rng.uniform(20, 235, (50, 3)),
                         key=lambda colour: -np.abs(colour - mean_colour).sum())
        placed.append((centre, length))
        parts = [(1, colours[0], len(placed))]
        if rings:
            parts += [(0.8, colours[1], len(placed)), (0.55, ground, 0)]
        for scale, colour, number in parts:
            outline = [(centre + scale * shape).round().astype(np.int32)]
            inside = cv2.fillPoly(np.zeros((size, size), np.uint8), outline, 1) > 0
            image[inside] = colour[inside] if colour is ground else colour
            ids[inside] = number
        for scale in (1, 0.55) if rings else (1,):
            cv2.polylines(ids, [(centre + scale * shape).round().astype(np.int32)], True, 255, 1)
    image = cv2.GaussianBlur(image, (0, 0), 0.8) + rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), ids


def write_instances(folder, count, rings=False, size=192, grid=1):
    """VOC layout with SegmentationObject and SegmentationClass (one class).

    One image of 20 is in val.txt, with rings one of 5.
    """
    root = folder / "VOCdevkit" / "VOC2012"
    for sub in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, ids = draw_grid(lambda i: draw_instances(i, size, rings), index, grid)
        save(root / "JPEGImages" / f"blob_{index:04d}.jpg", image)
        save(root / "SegmentationObject" / f"blob_{index:04d}.png", ids)
        mask = np.where(ids == 255, 255, ids > 0).astype(np.uint8)
        save(root / "SegmentationClass" / f"blob_{index:04d}.png", mask)
    write_lists(root, "blob", count, every=5 if rings else 20)
    (root / "class_names.json").write_text(json.dumps({"blob": 1}))


def write_rings(folder, count, grid=1):
    write_instances(folder, count, rings=True, grid=grid)


def write_lists(root, name, count, every=5):
    """ImageSets/Segmentation: one image of `every` in val.txt, the others in train.txt."""
    for part, wanted in (("val", True), ("train", False)):
        lines = [f"{name}_{i:04d}\n" for i in range(count) if (i % every == 0) == wanted]
        (root / "ImageSets/Segmentation" / f"{part}.txt").write_text("".join(lines))


def draw_clip(index, size=96, num_frames=12, objects=2):
    """Clip `index`: images (T, size, size, 3) uint8 RGB, ids (T, size, size) uint8.

    The last object is hidden by a bar for a while (index 0, 3, ...), leaves the image and comes back
    (1, 4, ...), or comes late (2, 5, ...). A first one, if there are two, is always there.
    """
    rng = np.random.default_rng([6, index])
    case, time = index % 3, np.linspace(0, 1, num_frames)
    grain = np.stack([smooth_noise(rng, size, 6) for _ in range(3)], -1)
    ground = 110 + rng.uniform(-25, 25, 3) + 22 * grain
    hues = (rng.uniform(0, 180) + np.array([0, 90]) + rng.uniform(-25, 25, 2)) % 180
    radii = rng.uniform(0.13, 0.18, 2) * size
    kinds, turn = rng.integers(1, 4, 2), rng.uniform(-3, 3, 2)
    side = rng.choice([-1, 1])  # from which the second one comes
    bar = int(rng.uniform(0.42, 0.58) * size), int(rng.uniform(0.16, 0.2) * size)

    start, end = rng.uniform(0.2, 0.8, 2), rng.uniform(0.2, 0.8, 2)
    end[0] = start[0] - 0.5 if start[0] > 0.5 else start[0] + 0.5
    first = start + time[:, None] * (end - start)
    across = {
        0: 0.14 + 0.72 * time,
        1: 0.3 - 0.65 * np.sin(np.pi * time),
        2: np.minimum(-0.6 + 1.3 * time, 0.75)}[case]
    down = rng.uniform(0.3, 0.7) + rng.uniform(-0.2, 0.2) * (2 * time - 1)
    second = np.stack([across if side > 0 else 1 - across, down], 1)

    images, ids = [], np.zeros((num_frames, size, size), np.uint8)
    for t in range(num_frames):
        image = ground.copy()
        for number, path in ((1, first), (2, second))[2 - objects:]:
            polygon = outline(kinds[number - 1], path[t] * size, radii[number - 1],
                              turn[number - 1] * time[t])
            inside = cv2.fillPoly(np.zeros((size, size), np.uint8), [polygon.round().astype(np.int32)], 1) > 0
            colour = cv2.cvtColor(np.uint8([[[hues[number - 1], 190, 215]]]), cv2.COLOR_HSV2RGB)[0, 0]
            image[inside] = (colour + 12 * grain)[inside]
            ids[t][inside] = number - 2 + objects
        if case == 0:
            left, width = bar[0] - bar[1], 2 * bar[1]
            image[:, left:left + width] = 60 + 20 * grain[:, left:left + width]
            ids[t, :, left:left + width] = 0
        image = cv2.GaussianBlur(image, (0, 0), 0.6) + rng.normal(0, 5, image.shape)
        images.append(image.clip(0, 255).astype(np.uint8))
    return np.stack(images), ids


def write_clips(folder, count, size=96, num_frames=12, objects=1):
    (folder / "ImageSets").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        images, ids = draw_clip(index, size, num_frames, objects)
        for sub, frames, ending in (("JPEGImages", images, "jpg"), ("Annotations", ids, "png")):
            (folder / sub / f"clip_{index:04d}").mkdir(parents=True, exist_ok=True)
            for t, pixels in enumerate(frames):
                save(folder / sub / f"clip_{index:04d}" / f"{t:05d}.{ending}", pixels)
    for part, wanted in (("val", True), ("train", False)):
        lines = [f"clip_{i:04d}\n" for i in range(count) if (i % 5 == 0) == wanted]
        (folder / "ImageSets" / f"{part}.txt").write_text("".join(lines))


def save(path, pixels):
    """uint8 (H, W) or RGB (H, W, 3) -> file; not by cv2.imwrite, which takes ASCII paths only."""
    if pixels.ndim == 3:
        pixels = pixels[..., ::-1]  # OpenCV wants BGR
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def otsu_iou(items):
    """IoU over the set of Otsu's threshold; items: (RGB image (H, W, 3), mask (1, H, W)) each."""
    intersection = union = 0
    for image, (mask,) in items:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        _, bright = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        intersection += np.count_nonzero((bright > 0) & (mask > 0))
        union += np.count_nonzero((bright > 0) | (mask > 0))
    return intersection / union


def colour_miou(train_items, val_items, num_classes):
    """Mean IoU of colour alone: each of 16**3 colours gets its most frequent class in training.

    Items: (RGB image (H, W, 3), label (H, W)) each. Frequent classes therefore win more colours;
    colours never seen are background; 255 is ignored.
    """
    (train_images, train_masks), (images, masks) = zip(*train_items), zip(*val_items)

    def colours(images):
        return np.concatenate(
            [(image.reshape(-1, 3) // 16).astype(np.int64) @ [256, 16, 1] for image in images])

    def labels(masks):
        return np.concatenate([mask.ravel().astype(np.int64) for mask in masks])

    colour, label = colours(train_images), labels(train_masks)
    known = label != 255
    votes = np.bincount(num_classes * colour[known] + label[known], minlength=num_classes * 16**3)
    class_of_colour = votes.reshape(-1, num_classes).argmax(1)

    pred, label = class_of_colour[colours(images)], labels(masks)
    known = label != 255
    counts = np.bincount(num_classes * label[known] + pred[known], minlength=num_classes**2)
    counts = counts.reshape(num_classes, num_classes)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal()[union > 0] / union[union > 0]).mean()


WRITE = {"cells": write_cells, "scenes": write_scenes, "objects": write_objects,
         "plain": write_instances, "rings": write_rings, "clips": write_clips}


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=WRITE, help="which data set")
    parser.add_argument("--output-dir", required=True, help="folder to write it to")
    parser.add_argument("--count", type=int, default=60, help="number of images (%(default)s)")
    parser.add_argument("--grid", type=int, choices=range(1, 8), default=1,
        help="objects, plain, rings: so many drawings side by side, and below each other, in an image")
    return parser


if __name__ == "__main__":
    parser = get_args_parser()
    args = parser.parse_args()
    options = {"grid": args.grid} if args.grid > 1 else {}
    if options and args.kind not in ("objects", "plain", "rings"):
        parser.error(f"--grid: is for objects, plain and rings, not for {args.kind}")
    if args.count < 1:
        parser.error(f"--count: {args.count} must be at least 1")
    try:
        print(f"{args.count} images in {write(args.kind, args.output_dir, args.count, **options)}")
    except OSError as error:
        parser.error(f"{error.filename or args.output_dir}: {error.strerror or error}; give another --output-dir")
