"""Draws the data sets of --demo, and gives the naive baseline each one is to beat.

    python demo_data.py cells --output-dir data/cells --count 60
    python demo_data.py scenes --output-dir data/scenes --count 100

cells   images/NAME.png (RGB) and masks/0/NAME.png (0 ground, 255 cell), the layout of train_unet.py: touching cells of
        varied brightness on uneven ground, with bright unlabelled specks, so that brightness alone misleads.
scenes  PASCAL VOC layout of train_deeplabv3.py, a fifth in val.txt: discs with rings, squares with stripes, triangles
        with dots, their hues overlapping each other's and the ground's, so that colour alone misleads. 255 border.
objects imgs/NAME.npy, gts/NAME.npy of train_efficientsam.py: blobs that overlap, an id each.

Numpy and OpenCV only. Picture i of a kind is the same on every machine and for every count.
"""
import argparse
import json
from pathlib import Path

import cv2
import numpy as np


def smooth_noise(rng, size, cells):
    """Smooth random field (size, size) in about [-1, 1] with `cells` bumps a side."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def draw_cells(index, size=96):
    """Picture `index`: image (size, size, 3) uint8 RGB, mask (size, size) uint8 in {0, 255}."""
    rng = np.random.default_rng([1, index])
    image = 0.40 + 0.22 * smooth_noise(rng, size, 3)                      # ground as bright here as cells there
    mask = np.zeros((size, size), np.uint8)
    centres = [rng.uniform(0.1, 0.9, 2) * size]
    for _ in range(rng.integers(7, 13)):                                   # most cells touch an earlier one
        near = centres[rng.integers(len(centres))] + rng.normal(0, size * 0.13, 2)
        centres.append(near if rng.random() < 0.6 else rng.uniform(0, size, 2))
    for centre in centres:
        axes = rng.uniform(0.05, 0.11, 2) * size
        cell = np.zeros((size, size), np.uint8)
        cv2.ellipse(cell, (centre.round().astype(int).tolist(), (2 * axes).tolist(), rng.uniform(0, 180)), 255, -1)
        inside = cell > 0
        depth = cv2.distanceTransform(cell, cv2.DIST_L2, 3)
        texture = 0.07 * smooth_noise(rng, size, 24)
        rim = 0.10 * np.exp(-np.square(depth - 1.5) / 2)                   # cells have a bright rim and a grainy inside
        image[inside] = (image + rng.uniform(0.02, 0.26) + texture + rim)[inside]
        mask[inside] = 255
    for _ in range(rng.integers(10, 18)):                                  # dirt: brighter than any cell, not labelled
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        speck = cv2.circle(np.zeros((size, size), np.float32), centre, int(rng.integers(1, 4)), 1.0, -1)
        image[(speck > 0) & (mask == 0)] += rng.uniform(0.35, 0.5)
    image = cv2.GaussianBlur(image, (0, 0), 0.7) + rng.normal(0, 0.03, (size, size))
    tint = np.array([0.85, 0.95, 1.0]) + rng.uniform(-0.05, 0.05, 3)
    return (image[..., None] * tint * 255).clip(0, 255).astype(np.uint8), mask


SCENE_CLASSES = ("background", "disc", "square", "triangle")


def outline(kind, centre, radius, angle):
    """Polygon (N, 2) of a disc, square or triangle (1, 2, 3), each about as large as a disc of this radius."""
    sides, reach = {1: (40, 1.0), 2: (4, 1.25), 3: (3, 1.5)}[kind]
    turns = angle + 2 * np.pi * np.arange(sides) / sides
    return centre + radius * reach * np.stack([np.cos(turns), np.sin(turns)], 1)


def pattern(kind, size, centre, angle, rng):
    """Texture (size, size) in {-1, 1}: rings (1), stripes (2) or dots (3) about centre."""
    y, x = np.mgrid[:size, :size] - centre[::-1, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(7, 10)
    wave = {1: np.sin(2 * np.pi * np.hypot(x, y) / period), 2: np.sin(2 * np.pi * u / period),
            3: np.cos(2 * np.pi * u / period) + np.cos(2 * np.pi * v / period) - 0.6}[kind]
    return np.sign(wave)


def draw_scene(index, size=96):
    """Picture `index`: image (size, size, 3) uint8 RGB, mask (size, size) uint8 of ids in SCENE_CLASSES and 255."""
    rng = np.random.default_rng([2, index])
    hue = rng.uniform(0, 180) + 25 * smooth_noise(rng, size, 4)
    value = 130 + 35 * smooth_noise(rng, size, 5)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 5)):
        kind = int(rng.integers(1, 4))
        centre, radius = rng.uniform(0.12, 0.88, 2) * size, rng.uniform(0.19, 0.30) * size
        angle = rng.uniform(0, 2 * np.pi)
        polygon = outline(kind, centre, radius, angle).round().astype(np.int32)
        inside = cv2.fillPoly(np.zeros((size, size), np.uint8), [polygon], 1) > 0
        hue[inside] = (rng.normal(30 + 60 * kind, 25) + 6 * smooth_noise(rng, size, 8))[inside]
        value[inside] = (rng.uniform(100, 170) + 35 * pattern(kind, size, centre, angle, rng))[inside]
        mask[inside] = kind
        cv2.polylines(mask, [polygon], True, 255, 2)
    colours = np.stack([hue % 180, np.full_like(hue, 110), value.clip(0, 255)], -1).astype(np.uint8)
    image = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB) + rng.normal(0, 8, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def write(kind, folder, count):
    """Write `count` pictures of this kind in their layout under folder; returns folder."""
    WRITE[kind](Path(folder), count)
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
    for name, part in (("val", range(0, count, 5)), ("train", sorted({*range(count)} - {*range(0, count, 5)}))):
        (root / "ImageSets/Segmentation" / f"{name}.txt").write_text("".join(f"scene_{i:04d}\n" for i in part))
    (root / "class_names.json").write_text(json.dumps({name: i for i, name in enumerate(SCENE_CLASSES)}))


def draw_object_ids(index, size=128):
    """Picture `index`: image (size, size, 3) uint8 RGB, ids (size, size) uint16: blobs, a colour and texture each."""
    rng = np.random.default_rng([3, index])
    image = 120 + 25 * np.stack([smooth_noise(rng, size, 4) for _ in range(3)], -1)
    ids = np.zeros((size, size), np.uint16)
    for number in range(1, int(rng.integers(3, 7)) + 1):
        turns = 2 * np.pi * np.arange(60) / 60
        waves = sum(rng.uniform(0, 0.35) * np.cos(k * turns + rng.uniform(0, 6)) for k in (2, 3, 4))
        reach, tilt = rng.uniform(0.12, 0.26) * size * (1 + waves).clip(0.35)[:, None], rng.uniform(0, np.pi)
        along, across = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
        shape = reach * (np.cos(turns)[:, None] * along + rng.uniform(0.3, 0.6) * np.sin(turns)[:, None] * across)
        shape = rng.uniform(0.15, 0.85, 2) * size + shape
        inside = cv2.fillPoly(np.zeros((size, size), np.uint8), [shape.round().astype(np.int32)], 1) > 0
        colour, grain = rng.uniform(40, 220, 3), rng.uniform(8, 30) * smooth_noise(rng, size, int(rng.integers(16, 40)))
        image[inside] = (colour + grain[..., None])[inside]
        ids[inside] = number
    image = image + rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), ids


def write_objects(folder, count):
    for sub in ("imgs", "gts"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        for sub, pixels in zip(("imgs", "gts"), draw_object_ids(index)):
            np.save(folder / sub / f"object_{index:04d}.npy", pixels)


def save(path, pixels):
    """uint8 (H, W) or RGB (H, W, 3) -> file; OpenCV wants BGR, and its imwrite no letters but ASCII in a path."""
    path.write_bytes(cv2.imencode(path.suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes())


def baseline_cells(images, masks):
    """Dataset IoU of Otsu's threshold on RGB images (H, W, 3) against masks (H, W)."""
    intersection = union = 0
    for image, mask in zip(images, masks):
        _, bright = cv2.threshold(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        intersection += np.count_nonzero((bright > 0) & (mask > 0))
        union += np.count_nonzero((bright > 0) | (mask > 0))
    return intersection / union


def baseline_scenes(train_images, train_masks, images, masks, num_classes=len(SCENE_CLASSES)):
    """Mean IoU of colour alone: each of 16**3 colours is given the class that has most of it in training.

    Classes count in proportion to their size, colours never seen are background; 255 is left out.
    """
    def cells(pictures):
        return np.concatenate([(image.reshape(-1, 3) // 16).astype(np.int64) @ [256, 16, 1] for image in pictures])

    def labels(masks):
        return np.concatenate([mask.ravel().astype(np.int64) for mask in masks])

    colour, label = cells(train_images), labels(train_masks)
    known = label != 255
    votes = np.bincount(num_classes * colour[known] + label[known], minlength=num_classes * 16**3)
    pred, label = votes.reshape(-1, num_classes).argmax(1)[cells(images)], labels(masks)
    known = label != 255
    counts = np.bincount(num_classes * label[known] + pred[known], minlength=num_classes**2)
    counts = counts.reshape(num_classes, num_classes)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal()[union > 0] / union[union > 0]).mean()


WRITE = {"cells": write_cells, "scenes": write_scenes, "objects": write_objects}


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=WRITE, help="which data set")
    parser.add_argument("--output-dir", required=True, help="folder to write it to")
    parser.add_argument("--count", type=int, default=60, help="number of pictures (%(default)s)")
    return parser


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    print(f"{args.count} pictures in {write(args.kind, args.output_dir, args.count)}")
