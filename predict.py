"""Writes masks and overlays of images, from a training script's checkpoint or an official one.

    python predict.py --weights runs/train_unet/best.pth images/ --output-dir out
    python predict.py --weights runs/train_deeplabv3/best.pth images/ --flip --scales 0.75,1,1.25
    python predict.py --weights coco --model deeplabv3_resnet50 image.jpg
    python predict.py --weights runs/train_efficientsam/best.pth image.jpg --box 75,275,340,450
    python predict.py --weights vit_b image.jpg --everything

Inputs: image files, .npy arrays (as train_efficientsam.py reads them), folders of both, globs, and
.txt lists of them: one path per line, relative to the list's folder or to the working directory.
Writes for each image, at its own size: NAME_mask.png (palette PNG of class ids, 0 background; classes
of train_unet.py count from 1), NAME_overlay.png and, where classes may overlap, NAME_mask_CLASS.png
(0 and 255); also areas.csv (pixels of each class in each image; its id is that in NAME_mask.png)
and, with --coco, annotations.json.
NAME is the file's, with its extension and folders where others have the same.
SAM, SAM 2 and EfficientSAM need prompts, and number what they cut out from 1: each --box is an
object; the --points together are one, or belong to a single box. --prompts gives those of a folder,
in pixels: {"NAME": {"boxes": [[x0, y0, x1, y1]], "points": [[x, y, label]]}}, or a list of such, one
per object, as annotate.py writes from clicks on a page; "class": "cat" names an entry's objects in
areas.csv and annotations.json. --everything clicks on a grid and keeps what the net is sure of, each
object once.
Copying: this script, utils.py and the folder nets/; for --coco convert_labels.py too.
"""
import csv
import functools
import glob
import itertools
import json
import math
import os
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torchvision import ops
from torchvision.transforms import v2
from tqdm import tqdm

import utils
from nets import deeplabv3, efficient_sam, sam, sam2, unet
from nets.weights import load_sam, load_weights, official_file, state_of

OFFICIAL = [*[f"deeplabv3_{backbone}" for backbone in deeplabv3.COCO_WEIGHTS],
            *efficient_sam.WEIGHTS, *sam.WEIGHTS, *sam2.WEIGHTS]


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0],
                                  "%(prog)s --weights CHECKPOINT INPUT [INPUT ...] [options]")
    add, add_switch = parser.add_argument, parser.add_switch
    add("inputs", nargs="+", metavar="INPUT",
        help="image, .npy array, folder of them, glob, or .txt list of paths")
    add("--weights", required=True,
        help="best.pth or last.pth of a training script; with --model an official file, or its name: "
             f"coco (DeepLab's), {', '.join([*efficient_sam.WEIGHTS, *sam.WEIGHTS])}, or "
             f"{', '.join(sam2.WEIGHTS)} (SAM 2.1's), fetched once")
    add("--model", choices=OFFICIAL, help="net of an official file; our checkpoints name theirs")
    add("--base", help="weights that a SAM decoder was trained on (those its checkpoint names)")
    add("--output-dir", default="out", help="folder for masks and overlays (%(default)s)")
    add_switch("--overwrite", help="replace files in --output-dir")
    add("--coco", nargs="?", const="polygon", choices=["polygon", "rle"], metavar="[polygon|rle]",
        help="also write annotations.json: each connected part of a class, or each object; "
             "polygons cannot represent holes")
    add("-b", "--batch-size", type=utils.number(int, 1), default=1,
        help="images per batch, with --tile tiles; nets with prompts take one at a time (%(default)s)")
    add("--tile", type=utils.number(int, 32), metavar="N",
        help="cut larger images into tiles of N x N pixels, about the size of those trained on")
    add("--overlap", type=utils.number(float, 0, 0.9), help="fraction by which tiles overlap (0.25)")
    add("--depth", type=utils.number(int, 1, 4),
        help="levels to compute of a U-Net++ trained with --deep-supervision; fewer are faster (all)")
    add_switch("--flip", help="average with the mirrored image")
    add("--scales", type=utils.numbers(1, 20), default=[1.0], metavar="S[,S...]",
        help="average over these sizes, times that of training (1)")
    add("--point", type=utils.numbers(2, 3), action="append", default=[], metavar="X,Y[,LABEL]",
        help="a click: label 1 object (default), 0 background (EfficientSAM was not trained on it)")
    add("--box", type=utils.numbers(4, 4), action="append", default=[], metavar="X0,Y0,X1,Y1",
        help="may be repeated")
    add("--prompts", help="json file of points and boxes for each image")
    add("--everything", nargs="?", type=utils.number(int, 1, 256), const=32, metavar="N",
        help="instead of prompts: every object that one of N x N clicks shows (32)")
    add("--min-iou", type=utils.number(float, 0, 1),
        help="of --everything: leave out masks that the net itself rates lower "
             "(0.88; SAM 2: 0.8)")
    add("--min-stability", type=utils.number(float, 0, 1),
        help="and those whose area changes more between the thresholds 1 and -1 (0.95)")
    add("--min-pixels", type=utils.number(int, 0), help="and regions and holes that are smaller (25)")
    add_switch("--all-masks", help="also write all three masks of each object, NAME_OBJECT_1.png to "
                                   "_3.png")
    parser.add_device_options()
    return parser


# --- Data ---

def find_inputs(inputs):
    """Returns every image path named, once; files that a list names may be missing."""
    paths, kinds = [], {*utils.IMAGES, ".npy"}
    for text in inputs:
        given, reason = Path(text), "no such image, folder or glob"
        if given.is_dir():
            found = sorted(path for path in given.iterdir() if path.suffix.lower() in kinds
                           and not path.is_dir() and not path.name.startswith("."))
            reason = ("a folder without images; for those in its folders give a glob: "
                      f'"{text}/*/*.png"')
        elif given.suffix.lower() == ".txt":
            found = read_list(given)
        elif given.exists():
            found = [given]
        else:
            found = sorted(glob.glob(text, recursive=True))
        if not found:
            raise utils.InputError(f"{text}: {reason}")
        paths += map(Path, found)
    return [*dict.fromkeys(paths)]


def read_list(path):
    """Returns the paths that a text file lists, one per line; lines that begin with # are comments."""
    try:
        lines = utils.read_lines(path)
    except OSError as error:
        raise utils.InputError(f"{path}: no list that can be read ({error}); write one path per "
                               "line") from None
    paths = []
    for line in lines:
        if not line.lstrip().startswith("#"):
            name = line.strip()  # unless a file has these spaces in its name
            known = [path.parent / line, Path(line), path.parent / name]
            paths.append(next((place for place in known if place.exists()), Path(name)))
    return paths


def name_outputs(paths, endings):
    """Returns a unique output name per path, also on file systems that ignore case or composition."""
    def key(name):
        return utils.nfc(name).casefold()

    names = [path.stem for path in paths]
    for num_folders in range(19):  # first the extension, then one folder more each time
        counts = Counter(map(key, names))
        for i, path in enumerate(paths):
            if counts[key(names[i])] > 1:
                folders = path.absolute().parts[1:-1]
                folders = folders[-num_folders:] if num_folders else ()
                names[i] = "_".join([*folders, path.name.replace(".", "_")])
    taken = set()
    for i, name in enumerate(names):
        number = 1
        while taken & (files := {key(names[i] + ending) for ending in endings}):
            number += 1
            names[i] = f"{name}_{number}"
        taken |= files
    return names


def read_batches(inputs, size, bad):
    """Yields lists of up to `size` (name, path, image), read ahead; bad gets a line per bad file."""
    with ThreadPoolExecutor(2) as pool:
        remaining, waiting, batch = deque(inputs), deque(), []
        while remaining or waiting:
            while remaining and len(waiting) <= size:  # this image and a batch ahead
                name, path = remaining.popleft()
                waiting.append((name, path, pool.submit(utils.read_image, path)))
            name, path, image = waiting.popleft()
            try:
                batch.append((name, path, image.result()))
            except utils.InputError as error:
                bad.append(str(error))
            except MemoryError:
                bad.append(f"{path}: too large for the memory here; cut it into parts")
            if len(batch) == size or (batch and not waiting):
                yield batch
                batch.clear()


# --- Model ---

class Net(NamedTuple):
    """Says what this script has to know of a net; NETS has one of each."""
    build: Callable            # the "arch" of a checkpoint -> the net
    required_option: str       # option of its training that predicting needs
    predict: Callable = None   # of nets without prompts: see predict_unet
    overlapping: bool = False  # their classes may overlap: a sigmoid for each, ids from 1
    # Of nets with prompts. Their model has image_size, the side of its square. labels (q, N): 1 object,
    # 0 background, 2 and 3 the corners of a box, -1 padding
    encode: Callable = None    # (loaded, image (H, W, 3) uint8) -> its embedding, for the next two
    decode: Callable = None    # (loaded, embedding, points (q, N, 2) in the square, labels) -> mask
    #                            logits (q, C, M, M), scores (q, C), index of the best (q,)
    click: Callable = None     # the same of single clicks (q, 1, 2) -> three masks and their scores
    enlarge: Callable = None   # (loaded, mask logits, size) -> (q, C, *size), the image's (H, W)
    content: Callable = None   # (loaded, size) -> [height, width] it fills of the net's square
    together: int = 1          # queries that are decoded at once
    max_points: int = 64       # of a query, corners of its box included
    min_iou: float = 0.88      # what --min-iou is if not given, as the authors set it


class Loaded(NamedTuple):
    """Holds a net with its weights, and its checkpoint's name, arguments, options and classes."""
    model: torch.nn.Module
    net: Net
    name: str
    arch: dict
    args: SimpleNamespace
    classes: list
    device: torch.device
    dtype: torch.dtype  # of autocast, None for float32


def load_model(args):
    """Returns the net that --weights holds, as Loaded."""
    device = utils.pick_device(args.device)
    dtype, _ = utils.pick_precision(args.amp, device)
    path = args.weights
    if path == "coco" and not args.model:
        raise utils.InputError(f"--weights coco: of which net? give --model "
                               f"({', '.join(OFFICIAL)})")
    name = args.model or (path if path in OFFICIAL else None)
    checkpoint = official_checkpoint(path, name) if name else utils.load_checkpoint(path)
    if not isinstance(checkpoint, dict) or not {"format", "net"} <= checkpoint.keys():
        raise utils.InputError(f"{path}: does not say what net it is of; give a training script's "
                               f"best.pth or last.pth, or --model ({', '.join(OFFICIAL)})")
    net = NETS.get(str(checkpoint["net"]))
    if not net:
        raise utils.InputError(f"{path}: holds the net {checkpoint['net']}; this script knows "
                               f"{', '.join(NETS)}")
    try:
        trained_with = SimpleNamespace(**checkpoint["args"])
        getattr(trained_with, net.required_option)
        torch.manual_seed(checkpoint["args"].get("seed", 0))  # draws what was frozen untrained
        if len(checkpoint["classes"]) != checkpoint["arch"].get("num_classes", 0):
            raise ValueError("names of other classes than the net's")
        model = net.build(**checkpoint["arch"])
        if checkpoint["net"] == "sam":
            load_sam(model, path, args.base, official=not checkpoint["format"])
        else:
            load_weights(model, checkpoint["model"], path)
        model = model.to(device, memory_format=torch.channels_last).eval()
        loaded = Loaded(model, net, checkpoint["net"], checkpoint["arch"], trained_with,
                        checkpoint["classes"], device, dtype)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise utils.InputError(f"{path}: not a whole checkpoint "
                               f"({' '.join(str(error).split())[:200]})") from None
    if args.depth:
        if not checkpoint["arch"].get("deep_supervision"):
            raise utils.InputError("--depth: is for NestedUNet trained with --deep-supervision; "
                                   f"{path} is not; leave it out")
        model.forward = functools.partial(model.forward, depth=args.depth)
    return loaded


def official_checkpoint(path, name):
    """Returns an official file, or any bare weights of this net, as a checkpoint of ours."""
    arch, args = {"model": name, "image_size": 1024}, {"image_size": 1024, "preprocess": "official"}
    ours = {"format": 0, "net": "sam", "classes": [], "arch": arch, "args": args}
    if name in sam.WEIGHTS:  # load_sam reads the file
        return ours
    backbone, files = name.removeprefix("deeplabv3_"), {**efficient_sam.WEIGHTS, **sam2.WEIGHTS}
    if backbone in deeplabv3.COCO_WEIGHTS:
        files["coco"] = deeplabv3.COCO_WEIGHTS[backbone]
    checkpoint = utils.load_checkpoint(official_file(path, files))
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        raise utils.InputError(f"{path}: names its own net; leave --model out")
    state = state_of(checkpoint)
    for net, names in (("efficient_sam", efficient_sam.WEIGHTS), ("sam2", sam2.WEIGHTS)):
        if name in names:
            return {**ours, "net": net, "model": state}
    try:
        num_classes = len(state["classifier.4.bias"])
    except (KeyError, TypeError):
        raise utils.InputError(f"{path}: not weights of {name}: has no classifier.4.bias") from None
    has_aux = "aux_classifier.4.bias" in state
    arch = {"backbone": backbone, "num_classes": num_classes, "aux": has_aux}
    classes = [str(k) for k in range(num_classes)]
    if num_classes == len(deeplabv3.VOC_CLASSES):
        classes = deeplabv3.VOC_CLASSES
    return {**ours, "net": "deeplabv3", "model": state, "classes": classes, "arch": arch,
            "args": {"base_size": 520}}


# --- Prediction ---

def as_tensor(image):
    """Returns an image (H, W, 3) uint8 as a tensor (3, H, W)."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def predict_unet(loaded, images, scale):
    """Returns logits (K, h, w) per image (H, W, 3) uint8, resized as train_unet.py validates."""
    width, height = [max(32, round(scale * side)) for side in loaded.args.image_size]
    resized = []
    for image in images:
        image = v2.functional.resize(as_tensor(image), [height, width], antialias=True)
        resized.append(unet.normalize(image, loaded.arch["input_channels"]))
    return [*unet.forward(loaded.model, torch.stack(resized).to(loaded.device), loaded.dtype)[-1]]


def predict_deeplabv3(loaded, images, scale):
    """Returns logits (K, h, w) per image (H, W, 3) uint8, resized as train_deeplabv3.py validates."""
    side = max(32, round(scale * loaded.args.base_size))
    resized = [deeplabv3.normalize(deeplabv3.resize(as_tensor(image), side)) for image in images]
    outputs = [None] * len(images)
    for shape in {image.shape for image in resized}:
        places = [i for i, image in enumerate(resized) if image.shape == shape]
        batch = torch.stack([resized[i] for i in places]).to(loaded.device)
        with torch.autocast(loaded.device.type, loaded.dtype, enabled=loaded.dtype is not None):
            logits = loaded.model(batch.contiguous(memory_format=torch.channels_last))["out"]
        for i, output in zip(places, logits.float()):
            outputs[i] = output
    return outputs


@torch.no_grad()
def predict_averaged(loaded, images, args):
    """Yields, per image (H, W, 3) uint8, logits (K, H, W) of the mean probability of its views.

    Views are --scales and --flip. The net's own outputs are there for the whole batch; those of the
    image's size for one image at a time.
    """
    views = []
    for scale in args.scales:
        views.append(loaded.net.predict(loaded, images, scale))
        if args.flip:
            mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]
            outputs = loaded.net.predict(loaded, mirrored, scale)
            views.append([logits.flip(-1) for logits in outputs])
    for image, *outputs in zip(images, *views):
        size = image.shape[:2]
        sized = (F.interpolate(logits[None], size, mode="bilinear")[0] for logits in outputs)
        if len(views) == 1:
            yield next(sized)
            continue
        prob = 0
        for logits in sized:
            share = logits.sigmoid_() if loaded.net.overlapping else logits.softmax(0)
            prob += share / len(views)
        if loaded.net.overlapping:
            yield torch.logit(prob, 1e-7)
        else:
            yield prob.clamp_(min=1e-12).log_()  # finite, for blending


def predict_tiled(loaded, image, args):
    """Returns logits (K, H, W), on the CPU, of an image (H, W, 3) uint8 that is cut into tiles.

    Memory: 3 bytes per pixel for the image, 4 (K + 1) for the logits and their weights, and a batch
    of tiles. What comes after, mask and overlay, adds about 12 bytes per pixel.
    """
    from monai.inferers import sliding_window_inference  # late: it takes seconds
    height, width = image.shape[:2]

    def predict_windows(_, places):
        utils.raise_if_stopped()
        tiles = [image[rows, columns] for *_, rows, columns in places]
        return torch.stack([*predict_averaged(loaded, tiles, args)])

    blank = torch.zeros(()).expand(1, 1, height, width)  # no memory; MONAI wants float32
    size = [min(args.tile, height), min(args.tile, width)]
    overlap = 0.25 if args.overlap is None else args.overlap
    return sliding_window_inference(
        blank, size, args.batch_size, predict_windows, overlap, "gaussian", with_coord=True,
        sw_device=loaded.device, device="cpu", progress=sys.stderr.isatty())[0]


def predict_batch(loaded, images, args):
    """Returns an iterable of logits (K, H, W), one per image; larger ones are cut into tiles."""
    if args.tile and max(images[0].shape) > args.tile:
        return [predict_tiled(loaded, images[0], args)]
    return predict_averaged(loaded, images, args)


def write_classes(logits, image, loaded, prefix, annotate):
    """Writes mask and overlay; returns [id, class, pixels, ""] of each class.

    The mask holds the most probable class. Classes that may overlap are numbered from 1, 0 is where
    none has a probability above 0.5; if there are several, each also gets a mask of its own.
    """
    overlapping, masks = loaded.net.overlapping, []
    for rows in logits.split(256, 1):  # so many rows at a time, for memory
        mask = rows.argmax(0)
        if overlapping:
            mask = (mask + 1) * (rows.amax(0) > 0)
        masks.append(mask.byte())
    mask = torch.cat(masks).cpu().numpy()
    utils.save_mask(f"{prefix}_mask.png", mask)
    utils.save_image(f"{prefix}_overlay.png", utils.overlay(image, mask))
    found = []
    for k, name in enumerate(loaded.classes, int(overlapping)):
        class_mask = (logits[k - 1] > 0).cpu().numpy() if overlapping else mask == k
        if overlapping and len(logits) > 1:
            utils.save_image(f"{prefix}_mask_{utils.file_part(name)}.png", class_mask * np.uint8(255))
        found.append([k, name, np.count_nonzero(class_mask), ""])
        if k:  # background is no object
            annotate(k, class_mask)
    return found


def read_prompts(name, given, args, max_points):
    """Returns the queries of an image, [(points [[x, y]], labels, class or None)]: one per object.

    Each box is an object; the points are one more or, beside a single box, belong to it. In a list
    each entry is read so.
    """
    entries = given.get(name, {}) if args.prompts else {"boxes": args.box, "points": args.point}
    try:
        queries = []
        for entry in entries if isinstance(entries, list) else [entries]:
            queries += read_entry(entry)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        form = '{"boxes": [[x0, y0, x1, y1]], "points": [[x, y, label]]}'
        raise utils.InputError(f"{args.prompts or '--box or --point'}: {name}: not like {form} "
                               f"({error})") from None
    if len(queries) > 254:
        raise utils.InputError(f"{name}: {len(queries)} objects; a palette mask can hold 254, give "
                               "fewer at a time")
    if not queries:
        names = ", ".join(list(given)[:3])
        raise utils.InputError(f"{args.prompts}: no prompts for {name}, but for {names} ...; a name "
                               "has no extension")
    if max(len(labels) for _, labels, _ in queries) > max_points:
        raise utils.InputError(f"{name}: more than {max_points} points for one object, corners of "
                               "its box included; the net takes no more")
    return queries


def read_entry(entry):
    """Returns the queries of {"boxes": ..., "points": ...}; ValueError says what is wrong with it."""
    if entry.keys() - {"class", "boxes", "points"}:
        raise ValueError(f"it has {', '.join(entry)}")
    name = entry.get("class")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ValueError('"class" is a name')
    name = name and " ".join(name.split())
    boxes = [[*map(float, box)] for box in entry.get("boxes", [])]
    points = [[*map(float, point), 1.0][:3] for point in entry.get("points", [])]
    queries = [([[x0, y0], [x1, y1]], [2, 3]) for x0, y0, x1, y1 in boxes]
    clicks = [[x, y] for x, y, _ in points], [int(label) for *_, label in points]
    if not {label for *_, label in points} <= {0.0, 1.0}:
        raise ValueError("a point's label is 1 or 0")
    if any(0 < max(box) <= 1 for box in boxes) or any(0 < max(x, y) < 1 for x, y, _ in points):
        raise ValueError("coordinates are in pixels, not fractions of the image")
    if len(queries) == 1 and points:
        queries = [(queries[0][0] + clicks[0], queries[0][1] + clicks[1])]
    elif points:
        queries.append(clicks)
    return [(*query, name) for query in queries]


def check_prompts(name, queries, shape):
    """Raises InputError if any lie outside the image of this shape (H, W, 3)."""
    corners = np.array([point for points, *_ in queries for point in points])
    empty = any(labels[0] == 2 and not np.less(*points[:2]).all() for points, labels, *_ in queries)
    if empty or not ((corners >= 0) & (corners <= [shape[1], shape[0]])).all():
        raise utils.InputError(f"{name}: a box or point lies outside its {shape[1]}x{shape[0]} "
                               "pixels, or a box is empty (x0,y0 is its upper left corner, x1,y1 the "
                               "lower right one)")


def encode_efficient_sam(loaded, image):
    """Returns the embedding of an image (H, W, 3) uint8, which the functions below take."""
    size, mode = loaded.model.image_size, loaded.args.preprocess
    image = efficient_sam.preprocess(as_tensor(image), size, mode)
    return efficient_sam.encode(loaded.model, image[None].to(loaded.device), loaded.dtype)


def decode_efficient_sam(loaded, embedding, points, labels):
    """Returns mask logits (q, C, M, M), scores (q, C) and index of the best (q,) of q queries.

    points (q, N, 2) are in the net's square, labels (q, N). As in validation; C is 3.
    """
    logits, scores = efficient_sam.decode(loaded.model, embedding, points, labels, loaded.dtype)
    return logits, scores, scores.argmax(1)


def encode_sam(loaded, image):
    """Returns the embedding of an image (H, W, 3) uint8."""
    image = sam.preprocess(as_tensor(image), loaded.model.image_size)
    return sam.encode(loaded.model, image[None].to(loaded.device), loaded.dtype)


def decode_sam(loaded, embedding, points, labels):
    """Returns as decode_efficient_sam; C is 4: the second pass's mask, the best, then the first's."""
    corner = labels[0] >= 2  # of the box
    boxes, kind = None, sam.POINTS
    if corner.any():
        boxes = points[:, corner].reshape(1, 4)
        kind = sam.BOX if corner.all() else sam.BOTH
    first, first_scores, second, second_scores = sam.two_passes(
        loaded.model, embedding, points[:, ~corner], labels[:, ~corner], boxes,
        torch.tensor([kind], device=points.device), loaded.dtype)
    logits, scores = torch.cat([second, first], 1), torch.cat([second_scores, first_scores], 1)
    return logits, scores, torch.tensor([0])


def click_sam(loaded, embedding, points, labels):
    """Returns the three masks of the first pass and their scores."""
    embeddings = embedding.expand(len(points), -1, -1, -1)
    kinds = torch.full((len(points),), sam.POINTS, device=points.device)
    return sam.decode(
        loaded.model, embeddings, points, labels, None, kinds, None, True, loaded.dtype)


def encode_sam2(loaded, image):
    """Returns the embedding of an image (H, W, 3) uint8."""
    image = sam2.resize_images([image], loaded.model.image_size)[0]
    return sam2.encode(loaded.model, image.to(loaded.device), loaded.dtype)


def decode_sam2(loaded, embedding, points, labels):
    """Returns as decode_efficient_sam; C is 4: the mask of clear prompts, then the three of one click.

    The best is the first, as train_sam2.py validates, but after a single click that of the three
    which the net rates highest, as in the official image predictor.
    """
    one, score = sam2.decode(loaded.model, embedding, points, labels, False, loaded.dtype)
    three, scores = click_sam2(loaded, embedding, points, labels)
    best = 1 + scores.argmax(1) if labels.shape[1] == 1 else torch.tensor([0])
    return torch.cat([one, three], 1), torch.cat([score, scores], 1), best


def click_sam2(loaded, embedding, points, labels):
    """Returns the three masks of one click and their scores."""
    return sam2.decode(loaded.model, embedding, points, labels, True, loaded.dtype)


NETS = {
    "unet": Net(lambda model, **arch: unet.NETS[model](**arch), "image_size", predict_unet,
                overlapping=True),
    "deeplabv3": Net(deeplabv3.deeplabv3, "base_size", predict_deeplabv3),
    "efficient_sam": Net(
        lambda model, image_size: efficient_sam.NETS[model](image_size), "preprocess",
        encode=encode_efficient_sam, decode=decode_efficient_sam,
        click=lambda *query: decode_efficient_sam(*query)[:2],
        enlarge=lambda loaded, logits, size: efficient_sam.enlarge(
            logits, size, loaded.model.image_size, loaded.args.preprocess),
        content=lambda loaded, size: efficient_sam.content_size(
            size, loaded.model.image_size, loaded.args.preprocess),
        together=8, max_points=6),
    "sam": Net(
        lambda model, image_size: sam.NETS[model](image_size), "image_size",
        encode=encode_sam, decode=decode_sam, click=click_sam,
        enlarge=lambda loaded, logits, size: sam.enlarge(loaded.model, logits, size),
        content=lambda loaded, size: sam.resized_size(*size, loaded.model.image_size)),
    "sam2": Net(
        lambda model, image_size: sam2.NETS[model](image_size, dynamic_multimask_via_stability=True),
        "image_size", encode=encode_sam2, decode=decode_sam2, click=click_sam2,
        enlarge=lambda loaded, logits, size: sam2.enlarge(logits, size),
        content=lambda loaded, size: [loaded.model.image_size] * 2, min_iou=0.8),
}


def predict_queries(loaded, embedding, size, queries):
    """Yields mask logits (q, C, H, W), scores (q, C) and the index of the best (q,) of q queries.

    size (H, W) is that of the image, queries are as read_prompts returns them, in its pixels.
    """
    for first in range(0, len(queries), loaded.net.together):
        chosen = queries[first:first + loaded.net.together]
        most = max(len(labels) for _, labels, *_ in chosen)
        points = [points + [[-1, -1]] * (most - len(points)) for points, *_ in chosen]
        labels = [labels + [-1] * (most - len(labels)) for _, labels, *_ in chosen]
        points = to_square(loaded, torch.tensor(points), size)
        labels = torch.tensor(labels, device=loaded.device)
        logits, scores, best = loaded.net.decode(loaded, embedding, points, labels)
        yield loaded.net.enlarge(loaded, logits, size), scores, best


def to_square(loaded, points, size):
    """Returns points (..., 2) in an image of this size (H, W) as those in the net's square."""
    height, width = loaded.net.content(loaded, size)
    return (points * torch.tensor([width / size[1], height / size[0]])).to(loaded.device)


def click(loaded, embedding, size, clicks):
    """Returns what single clicks (q, 2) on an image of this size (H, W) show, for find_everything.

    That is mask logits (q, 3, M, M), scores (q, 3), and how many of the M rows and columns show the
    image; the others are padding.
    """
    labels = torch.ones(len(clicks), 1, dtype=torch.long, device=loaded.device)
    points = to_square(loaded, clicks, size)[:, None]
    logits, scores = loaded.net.click(loaded, embedding, points, labels)
    return logits, scores, [math.ceil(logits.shape[-1] * length / loaded.model.image_size)
                            for length in loaded.net.content(loaded, size)]


def find_everything(loaded, image, args):
    """Yields mask (1, 1, H, W) bool, score (1, 1) and index 0 of every object, the largest first.

    As the official SamAutomaticMaskGenerator, without its crops: clicks on a grid; of the three
    masks of each those that the net rates well and whose area hardly depends on the threshold; of
    those with nearly the same box (IoU above 0.7) the best rated. All at the decoder's own size.
    """
    size, steps = image.shape[:2], (torch.arange(args.everything) + 0.5) / args.everything
    clicks = torch.cartesian_prod(steps, steps).flip(1) * torch.tensor([size[1], size[0]])
    embedding, masks, scores, boxes = loaded.net.encode(loaded, image), [], [], []
    for chunk in clicks.split(32):
        utils.raise_if_stopped()
        logits, iou, (height, width) = click(loaded, embedding, size, chunk)
        logits, iou = logits.flatten(0, 1), iou.flatten()
        shown = logits[:, :height, :width]
        stability = (shown > 1).sum((1, 2)) / (shown > -1).sum((1, 2))  # nan if there are none
        good = (iou >= args.min_iou) & (stability >= args.min_stability) & (shown > 0).any(2).any(1)
        masks.append(logits[good])
        scores.append(iou[good])
        corners = torch.tensor([0, 0, 1, 1], device=iou.device)
        boxes.append(ops.masks_to_boxes(shown[good] > 0) + corners)
    masks, scores = torch.cat(masks), torch.cat(scores)
    found = []
    for k in ops.nms(torch.cat(boxes), scores, 0.7).tolist():
        mask = loaded.net.enlarge(loaded, masks[k, None, None], size)[0, 0] > 0
        mask = drop_small(mask.cpu().numpy(), args.min_pixels)
        if mask.any():
            found.append((mask, scores[k]))
        if len(found) == 254:
            print("note: 254 objects, as many as a palette mask can hold; others, rated lower, are "
                  "left out")
            break
    for mask, score in sorted(found, key=lambda found_mask: -np.count_nonzero(found_mask[0])):
        yield torch.from_numpy(mask)[None, None], score[None, None], torch.tensor([0])


def drop_small(mask, least):
    """Returns mask (H, W) bool without holes, then without regions, of fewer than `least` pixels."""
    for value in (False, True):
        _, labels, stats, _ = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8))
        small = stats[:, cv2.CC_STAT_AREA] < least
        mask = mask ^ small[labels]
    return mask


def each_object(parts):
    """Yields masks (C, H, W) bool, C scores and the best's index per query of predict_queries."""
    for logits, scores, best in parts:
        yield from zip((logits > 0).cpu().numpy(), scores.tolist(), best.tolist())


def write_objects(parts, image, prefix, annotate, all_masks, names):
    """Writes mask and overlay; returns [id, class, pixels, score] of each object.

    The mask holds ids 1, 2 ...; a later object lies above an earlier one. names: of the objects'
    classes; one that has None is "object 1", "object 2" ...
    """
    ids, rows = np.zeros(image.shape[:2], np.uint8), []
    for k, ((masks, scores, best), name) in enumerate(zip(each_object(parts), names), 1):
        ids[masks[best]] = k
        annotate(name or "object", masks[best], round(scores[best], 4))
        rows.append([k, name or f"object {k}", int(masks[best].sum()), f"{scores[best]:.4f}"])
        if all_masks:  # the last three: SAM and SAM 2 put another mask first
            for i, (mask, score) in enumerate(zip(masks[-3:], scores[-3:]), 1):
                utils.save_image(f"{prefix}_{k}_{i}.png", mask * np.uint8(255))
                rows.append(["", f"object {k} mask {i}", int(mask.sum()), f"{score:.4f}"])
    utils.save_mask(f"{prefix}_mask.png", ids)
    utils.save_image(f"{prefix}_overlay.png", utils.overlay(image, ids))
    return rows


# --- Main ---

def check_options(args, loaded):
    """Raises InputError for an option that is not for this net or beside another; sets defaults."""
    dense = {"--flip": args.flip, "--scales": args.scales != [1.0], "--tile": args.tile}
    prompts = {"--box": args.box, "--point": args.point, "--prompts": args.prompts,
               "--all-masks": args.all_masks, "--everything": args.everything}
    others, kind = (dense, "without") if loaded.net.encode else (prompts, "with")
    for option, given in others.items():
        if given:
            raise utils.InputError(f"{option}: is for nets {kind} prompts; {args.weights} is "
                                   f"{loaded.name}; leave it out")
    if not all(0.1 <= scale <= 10 for scale in args.scales):
        raise utils.InputError(f"--scales {args.scales}: must be from 0.1 to 10")
    if args.base and loaded.name != "sam":
        raise utils.InputError(f"--base: is for SAM; {args.weights} is {loaded.name}; leave it out")
    if args.overlap is not None and not args.tile:
        raise utils.InputError("--overlap: is of tiles; give --tile too")
    if args.prompts and (args.box or args.point):
        raise utils.InputError("--prompts: takes the place of --box and --point; give one or the "
                               "other")
    if args.everything:
        others = [option for option, given in prompts.items() if given and option != "--everything"]
        if others:
            raise utils.InputError(f"--everything: takes the place of prompts; leave {others[0]} "
                                   "out")
    defaults = {"min_iou": loaded.net.min_iou, "min_stability": 0.95, "min_pixels": 25}
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
        elif not args.everything:
            raise utils.InputError(f"{utils.option_of(option)}: is of --everything; give that too")
    if loaded.net.encode and not (args.everything or args.prompts or args.box or args.point):
        raise utils.InputError(f"{args.weights}: needs prompts: give --box X0,Y0,X1,Y1, --point X,Y, "
                               "--prompts FILE or --everything")


def plan_outputs(paths, loaded, args):
    """Returns [(name, path)], queries by name, errors; InputError if a file must not be written."""
    endings, prompts, queries, bad = ["_mask.png", "_overlay.png"], {}, {}, []
    if loaded.net.overlapping and len(loaded.classes) > 1:
        endings += [f"_mask_{utils.file_part(name)}.png" for name in loaded.classes]
    if args.prompts:
        prompts = read_all_prompts(args.prompts)
    inputs = [*zip(name_outputs(paths, endings), paths)]
    files = [name + ending for name, _ in inputs for ending in endings] + ["areas.csv"]
    if args.coco:
        files.append("annotations.json")
    if loaded.net.encode and not args.everything:
        for name, _ in inputs:
            try:
                queries[name] = read_prompts(utils.nfc(name), prompts, args, loaded.net.max_points)
            except utils.InputError as error:
                bad.append(str(error))
        inputs = [(name, path) for name, path in inputs if name in queries]
        if args.all_masks:
            files += [f"{name}_{k}_{i}.png" for name, objects in queries.items()
                      for k in range(1, len(objects) + 1) for i in (1, 2, 3)]
    sources = [*paths, args.weights, args.prompts or ""]
    read = {os.stat(path)[1:3] for path in sources if os.path.exists(path)}  # inode and device
    for path in (Path(args.output_dir, file) for file in files):
        if path.exists() and os.stat(path)[1:3] in read:
            raise utils.InputError(f"{path}: would be written, and is read; give another --output-dir")
        if path.exists() and not args.overwrite:
            raise utils.InputError(f"{path}: exists; give --overwrite or another --output-dir")
    return inputs, queries, bad


def read_all_prompts(path):
    """Returns the entries of --prompts, by name."""
    try:
        prompts = dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        if {"images", "annotations"} <= prompts.keys():
            raise ValueError('a COCO json; wanted is {"NAME": {"boxes": [...], "points": [...]}}')
        return {utils.nfc(name): entries for name, entries in prompts.items()}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise utils.InputError(f"{path}: no json of prompts that can be read ({error})") from None


def cut_out(loaded, name, image, queries, args):
    """Returns the objects of an image, as predict_queries yields them."""
    if args.everything:
        return find_everything(loaded, image, args)
    check_prompts(name, queries[name], image.shape)
    embedding = loaded.net.encode(loaded, image)
    return predict_queries(loaded, embedding, image.shape[:2], queries[name])


def predict_and_write(batch, loaded, queries, annotate, args):
    """Predicts and writes a batch of images; yields name, path, image and areas of each."""
    if loaded.net.encode:
        outputs = [cut_out(loaded, name, image, queries, args) for name, _, image in batch]
    else:
        outputs = predict_batch(loaded, [image for *_, image in batch], args)
    for (name, path, image), output in zip(batch, outputs):
        utils.raise_if_stopped()
        prefix = Path(args.output_dir, name)
        if loaded.net.encode:
            names = [query[2] for query in queries[name]] if queries else itertools.repeat(None)
            rows = write_objects(output, image, prefix, annotate, args.all_masks, names)
        else:
            rows = write_classes(output, image, loaded, prefix, annotate)
        yield name, path, image, rows


def write_tables(output_dir, areas, images, annotations, loaded, coco):
    """Writes areas.csv and, with coco (the script convert_labels), annotations.json."""
    path = output_dir / "areas.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([["image", "id", "class", "pixels", "share", "score"], *areas])
    if coco:
        names = dict(enumerate(loaded.classes, int(loaded.net.overlapping)))
        names.pop(0, None)  # the background
        coco.write_coco(output_dir / "annotations.json", images, names, annotations)


@torch.no_grad()
def main(args):
    """Predicts every input; returns {"images": how many}. Bad files are named when the rest is done."""
    loaded = load_model(args)
    check_options(args, loaded)
    paths = find_inputs(args.inputs)
    inputs, queries, bad = plan_outputs(paths, loaded, args)
    if loaded.net.encode:  # which has no classes but those of the prompts
        named = {query[2] or "object" for objects in queries.values() for query in objects}
        loaded = loaded._replace(classes=[None, *sorted(named or {"object"})])
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    areas, images, annotations, started = [], [], [], time.perf_counter()
    coco = utils.import_script("convert_labels", "--coco") if args.coco else None

    def annotate(category, mask, score=None):  # an object of the image now being processed
        if coco:
            if loaded.net.encode:
                category = loaded.classes.index(category)
            coco.annotate(annotations, args.coco, len(images) + 1, category, mask, score)

    size = 1 if loaded.net.encode or args.tile else args.batch_size
    try:
        batches = read_batches(inputs, size, bad)
        for batch in tqdm(batches, total=math.ceil(len(inputs) / size), leave=False, disable=None):
            done = predict_and_write(batch, loaded, queries, annotate, args)
            try:
                for name, path, image, rows in done:
                    height, width = image.shape[:2]
                    areas += [[name, k, label, pixels, f"{pixels / (height * width):.6f}", score]
                              for k, label, pixels, score in rows]
                    images.append({"id": len(images) + 1, "file_name": path.as_posix(),
                                   "width": width, "height": height})
            except utils.InputError as error:
                bad.append(str(error))
            except (RuntimeError, MemoryError, cv2.error) as error:
                if not utils.is_out_of_memory(error):
                    raise
                written = {image["file_name"] for image in images}
                advice = "--everything 16" if loaded.net.encode else "--tile, a smaller -b"
                bad += [f"{path}: out of memory; try {advice}, or --amp bf16"
                        for _, path, _ in batch if path.as_posix() not in written]
            finally:  # of an image that failed after its first object
                while annotations and annotations[-1]["image_id"] > len(images):
                    annotations.pop()
    finally:  # however it ends: what has been written is listed
        write_tables(output_dir, areas, images, annotations, loaded, coco)
    if len(paths) == 1:
        for _, k, name, pixels, share, score in areas:
            rating = f"  score {score}" if score else ""
            print(f"  {k:>3}  {name:>15}  {pixels:12,} pixels  {float(share):7.2%}{rating}")
    if loaded.net.encode and loaded.classes != [None, "object"]:
        counts = Counter(row[2] if row[2] in loaded.classes else "object" for row in areas if row[1])
        print("objects: " + ", ".join(f"{name} {counts[name]}" for name in loaded.classes[1:]))
    empty = len(images) - len({row[0] for row in areas})
    if empty and args.everything:
        print(f"note: nothing found in {empty} images; try a lower --min-iou or --min-stability")
    seconds = time.perf_counter() - started
    files = "*_mask.png, *_overlay.png, areas.csv" + (", annotations.json" if args.coco else "")
    files = f": {output_dir}/{files}" if images else ""
    print(f"{len(images)} of {len(paths)} images predicted in {seconds:.1f} s{files}")
    if bad:
        message = "; ".join(bad[:10])
        if len(bad) > 10:
            message += "; and " + ", ".join(line.split(": ")[0] for line in bad[10:])
        raise utils.InputError(" ".join(message.splitlines()))
    return {"images": len(images)}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
