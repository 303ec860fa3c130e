"""Draws the data sets of --demo, and gives the naive baseline each one is to beat.

    python demo_data.py cells --output-dir data/cells --count 60

cells   images/NAME.png (RGB) and masks/0/NAME.png (0 ground, 255 cell), the layout of train_unet.py: touching cells of
        varied brightness on uneven ground, with bright unlabelled specks, so that brightness alone misleads.

Numpy and OpenCV only. Picture i of a kind is the same on every machine and for every count.
"""
import argparse
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


def write(kind, folder, count):
    """Write `count` pictures of this kind in their layout under folder; returns folder."""
    folder = Path(folder)
    for sub in ("images", "masks/0"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = DRAW[kind](index)
        cv2.imwrite(str(folder / "images" / f"cell_{index:04d}.png"), image[..., ::-1])  # OpenCV wants BGR
        cv2.imwrite(str(folder / "masks/0" / f"cell_{index:04d}.png"), mask)
    return folder


def baseline(kind, images, masks):
    """Figure of the naive method on RGB images (H, W, 3) and masks (H, W): cells: dataset IoU of Otsu's threshold."""
    assert kind == "cells"
    intersection = union = 0
    for image, mask in zip(images, masks):
        _, bright = cv2.threshold(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        intersection += np.count_nonzero((bright > 0) & (mask > 0))
        union += np.count_nonzero((bright > 0) | (mask > 0))
    return intersection / union


DRAW = {"cells": draw_cells}



def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=DRAW, help="which data set")
    parser.add_argument("--output-dir", required=True, help="folder to write it to")
    parser.add_argument("--count", type=int, default=60, help="number of pictures (%(default)s)")
    return parser


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    print(f"{args.count} pictures in {write(args.kind, args.output_dir, args.count)}")
