"""Masks and overlays of pictures, from a checkpoint of one of the training scripts or an official one.

    python predict.py --weights runs/train_unet/best.pth pictures/ --output-dir out
    python predict.py --weights runs/train_deeplabv3/best.pth pictures/ --flip --scales 0.75,1,1.25
    python predict.py --weights coco --model deeplabv3_resnet50 picture.jpg
    python predict.py --weights runs/train_efficientsam/best.pth picture.jpg --box 75,275,340,450 --box 20,30,90,120

Inputs: pictures, .npy arrays (as train_efficientsam.py reads them), folders of both, globs, and .txt lists of them, a
path a line, relative to the list's folder or else to where one is. Writes for each picture, at its own size:
NAME_mask.png (palette PNG of class ids, 0 background; the classes of train_unet.py count from 1), NAME_overlay.png and,
where classes may overlap, NAME_mask_CLASS.png (0 and 255); and areas.csv, the pixels of each class in each picture;
with --coco annotations.json too. NAME is the file's, with its extension and folders where others have the same.
EfficientSAM wants to be told what to cut out, and numbers it from 1: each --box is an object; the --points together are
one, or say more about a single box. --prompts gives a folder's: {"NAME": {"boxes": [[x0, y0, x1, y1]], "points":
[[x, y, label]]}}; in pixels. Or show it with the mouse: --click.
"""
import argparse
import csv
import glob
import json
import math
import os
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import utils
from nets.deeplabv3 import deeplabv3
from nets.efficient_sam import NETS as SAM_NETS
from nets.unet import NETS as UNETS
from nets.unet import STRIDE

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
COCO_WEIGHTS = {  # of torchvision, 21 outputs, with the auxiliary head; a name ends in the start of its sha256
    "resnet50": "https://download.pytorch.org/models/deeplabv3_resnet50_coco-cd0a2569.pth",
    "resnet101": "https://download.pytorch.org/models/deeplabv3_resnet101_coco-586e9e4e.pth",
    "mobilenet_v3_large": "https://download.pytorch.org/models/deeplabv3_mobilenet_v3_large-fc3c493d.pth",
}
SAM_WEIGHTS = {  # of the authors, who publish no hash: that every key and shape fits is the check
    "efficient_sam_vits": "https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vits.pt.zip",
    "efficient_sam_vitt": "https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vitt.pt",
}
OFFICIAL = [*[f"deeplabv3_{backbone}" for backbone in COCO_WEIGHTS], *SAM_WEIGHTS]


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], "%(prog)s --weights CHECKPOINT INPUT [INPUT ...] [options]")
    add = parser.add_argument
    flag = {"nargs": "?", "const": True, "default": False, "type": utils.switch}
    add("inputs", nargs="+", metavar="INPUT", help="picture, .npy array, folder of them, glob, or .txt list of paths")
    add("--weights", required=True, help="best.pth or last.pth of a training script; with --model an official file, or "
        f"its name: coco (DeepLab's), {', '.join(SAM_WEIGHTS)}, fetched once")
    add("--model", choices=OFFICIAL, help="the net that an official file is of; our checkpoints know theirs")
    add("--output-dir", default="out", help="folder for masks and overlays (%(default)s)")
    add("--overwrite", **flag, help="replace files in --output-dir")
    add("--coco", nargs="?", const="polygon", choices=["polygon", "rle"], metavar="[polygon|rle]",
        help="also write annotations.json: each connected part of a class, or each object; a polygon holds no holes")
    add("-b", "--batch-size", type=utils.number(int, 1), default=1,
        help="pictures a batch, with --tile tiles; EfficientSAM takes one at a time (%(default)s)")
    add("--tile", type=utils.number(int, 32), metavar="N",
        help="cut larger pictures into tiles of N of their own pixels, about the size of those trained on")
    add("--overlap", type=utils.number(float, 0, 0.9), help="share of a tile that its neighbour has too (0.25)")
    add("--depth", type=utils.number(int, 1, 4), help="levels of a U-Net++ trained with --deep-supervision to compute, "
        "1 to 4; fewer are faster (all)")
    add("--flip", **flag, help="average with the mirrored picture")
    add("--scales", type=numbers(1, 20), default=[1.0], metavar="S[,S...]",
        help="average over these sizes, times that of training (1)")
    add("--point", type=numbers(2, 3), action="append", default=[], metavar="X,Y[,LABEL]",
        help="a click, label 1 object (or left out) or 0 background (which EfficientSAM was not trained on)")
    add("--box", type=numbers(4, 4), action="append", default=[], metavar="X0,Y0,X1,Y1", help="may be repeated")
    add("--prompts", help="json file of points and boxes for each picture")
    add("--click", **flag, help="show each picture in a window, to click on")
    add("--all-masks", **flag,
        help="also write the three masks of each object, NAME_OBJECT_1.png to _3.png, scores in areas.csv")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    return parser


def numbers(least, most):
    """Type of an option of so many numbers with commas between."""
    def parse(text):
        try:
            values = [float(value) for value in text.split(",")]
        except ValueError:
            values = []
        if not least <= len(values) <= most or not np.isfinite(values).all():
            raise argparse.ArgumentTypeError(f"{text} must be {least} to {most} numbers with commas between")
        return values
    return parse


# --- Data ---

def find_inputs(inputs):
    """Paths of all pictures and arrays named, each once; those that a list names may be missing."""
    paths, kinds = [], {*utils.PICTURES, ".npy"}
    for text in inputs:
        if Path(text).is_dir():
            found = sorted(path for path in Path(text).iterdir() if path.suffix.lower() in kinds
                           and not path.is_dir() and not path.name.startswith("."))
        elif Path(text).suffix.lower() == ".txt":
            found = read_list(Path(text))
        else:
            found = [text] if Path(text).exists() else sorted(glob.glob(text, recursive=True))
        if not found:
            raise utils.InputError(f"{text}: no such picture, folder or glob")
        paths += map(Path, found)
    return [*dict.fromkeys(paths)]


def read_list(path):
    """Paths in a text file, one a line; not its blank lines nor those that begin with #."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise utils.InputError(f"{path}: no list that can be read ({error}); write a path a line") from None
    paths = [line for line in lines if line and not line.startswith("#")]
    return [path.parent / one if (path.parent / one).exists() else Path(one) for one in paths]


def name_outputs(paths, endings):
    """A name for each path, so that no NAME + ending is another's, on file systems that ignore case too."""
    names = [path.stem for path in paths]
    for depth in range(1, 20):  # first the extension, then one folder more each time
        counts = Counter(name.casefold() for name in names)
        names = [name if counts[name.casefold()] == 1 else
                 "_".join([*path.absolute().parts[1:-1][1 - depth:][:depth - 1], path.name.replace(".", "_")])
                 for name, path in zip(names, paths)]
    taken = set()
    for i, name in enumerate(names):
        number = 1
        while taken & (files := {(names[i] + ending).casefold() for ending in endings}):
            number += 1
            names[i] = f"{name}_{number}"
        taken |= files
    return names


def read_batches(inputs, size, bad):
    """Yields lists of up to `size` (name, path, picture), as many read ahead by threads; bad gets a line a bad file."""
    with ThreadPoolExecutor(2) as pool:
        waiting, batch = deque(), []
        for i in range(len(inputs) + size):
            if i < len(inputs):
                waiting.append((inputs[i], pool.submit(read_picture, inputs[i][1])))
            if i >= size and waiting:
                (name, path), picture = waiting.popleft()
                try:
                    batch.append((name, path, picture.result()))
                except utils.InputError as error:
                    bad.append(str(error))
            if len(batch) == size or (batch and not waiting):
                yield batch
                batch.clear()


def read_picture(path):
    """Picture or .npy array -> RGB uint8 (H, W, 3); InputError whatever is wrong with it."""
    try:
        if path.suffix.lower() != ".npy":
            return utils.read_image(path)
        return np.array(utils.to_rgb(utils.read_pixels(path), path), order="C")
    except utils.InputError:
        raise
    except Exception as error:  # damaged or hostile bytes make the decoders raise a dozen types, MemoryError among them
        raise utils.InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); replace it") from None


def normalize(image, channels=3):
    """RGB uint8 (3, H, W) -> float32 (channels, H, W) by ImageNet's statistics."""
    image = image.as_subclass(torch.Tensor) / 255
    image = v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return image if channels == 3 else image.mean(0, keepdim=True)


# --- Model ---

def load_model(args, device):
    """The net that --weights holds, ready to predict, and its checkpoint."""
    path = args.weights
    if path == "coco" and not args.model:
        raise utils.InputError(f"--weights coco: of which net? give --model ({', '.join(OFFICIAL)})")
    args.model = args.model or (path if path in SAM_WEIGHTS else None)
    if args.model:
        checkpoint = official_checkpoint(path, args.model)
    else:
        checkpoint = utils.load_checkpoint(path)
        if not isinstance(checkpoint, dict) or not {"format", "net"} <= checkpoint.keys():
            raise utils.InputError(f"{path}: does not say what net it is of; give a training script's best.pth or "
                                   f"last.pth, or --model ({', '.join(OFFICIAL)})")
    if str(checkpoint.get("net")) not in NETS:
        raise utils.InputError(f"{path}: holds the net {checkpoint.get('net')}; this script knows {', '.join(NETS)}")
    try:
        needed = {"unet": "image_size", "deeplabv3": "base_size", "efficient_sam": "preprocess"}[checkpoint["net"]]
        checkpoint["args"][needed], checkpoint["classes"]
        model = NETS[checkpoint["net"]][0](**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
        checkpoint.pop("optimizer", None)  # up to two more copies of the weights
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise utils.InputError(f"{path}: not a whole checkpoint ({' '.join(str(error).split())[:200]})") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def fetch_official(name, url):
    """Path of the authors' file; that of the larger net comes in a zip, and is unpacked beside it."""
    path = utils.fetch_weights(name, url)
    return utils.unzip(path, f"{name}.pt") if path.suffix == ".zip" else path


def refuse_ours(path):
    checkpoint = utils.load_checkpoint(path)
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        raise utils.InputError(f"{path}: knows what net it is of; leave --model out")


def official_checkpoint(path, name):
    """An official file, or any bare weights of this net, as a checkpoint of ours."""
    if name in SAM_WEIGHTS:
        path = fetch_official(path, SAM_WEIGHTS[path]) if path in SAM_WEIGHTS else path
        refuse_ours(path)
        return {"net": "efficient_sam", "model": utils.read_weights(path, {}), "classes": [],
                "arch": {"model": name, "image_size": 1024}, "args": {"preprocess": "official"}}
    backbone = name.removeprefix("deeplabv3_")
    if path == "coco":
        url = COCO_WEIGHTS[backbone]
        path = utils.fetch_weights("coco", url, sha256=url.removesuffix(".pth").rsplit("-", 1)[1])
    refuse_ours(path)
    state = utils.read_weights(path, {})
    try:
        num_classes = len(state["classifier.4.bias"])
    except (KeyError, TypeError):
        raise utils.InputError(f"{path}: not weights of {name}: has no classifier.4.bias") from None
    return {"net": "deeplabv3", "model": state, "args": {"base_size": 520},
            "classes": VOC_CLASSES if num_classes == 21 else [str(k) for k in range(num_classes)],
            "arch": {"backbone": backbone, "num_classes": num_classes, "aux": "aux_classifier.4.bias" in state}}


def forward(model, image, dtype):
    """Image (B, C, H, W) of any size -> list of float32 logits (B, K, H, W), the prediction last.

    The net wants multiples of 16: the border is repeated to the right and below, and what it yields is cut off again.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        outputs = model(padded.contiguous(memory_format=torch.channels_last))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [logits[..., :height, :width].float() for logits in outputs]


# --- Prediction ---

def predict_unet(model, checkpoint, images, scale, device, dtype):
    """RGB (H, W, 3) uint8 each -> logits (K, h, w) each as train_unet.py validates: all resized to --image-size."""
    width, height = [max(32, round(scale * side)) for side in checkpoint["args"]["image_size"]]
    resized = [v2.functional.resize(tv_tensors.Image(image.transpose(2, 0, 1)), [height, width], antialias=True)
               for image in images]
    batch = torch.stack([normalize(image, checkpoint["arch"]["input_channels"]) for image in resized]).to(device)
    return [*forward(model, batch, dtype)[-1]]


def predict_deeplabv3(model, checkpoint, images, scale, device, dtype):
    """RGB (H, W, 3) uint8 each -> logits (K, h, w) each as train_deeplabv3.py validates: shorter side --base-size."""
    side = max(32, round(scale * checkpoint["args"]["base_size"]))
    resized = [normalize(resize(torch.from_numpy(image.transpose(2, 0, 1).copy()), side)) for image in images]
    outputs = [None] * len(images)
    for shape in {image.shape for image in resized}:
        own = [i for i, image in enumerate(resized) if image.shape == shape]
        batch = torch.stack([resized[i] for i in own]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(batch.contiguous(memory_format=torch.channels_last))["out"]
        for i, one in zip(own, logits.float()):
            outputs[i] = one
    return outputs


def resize(image, side):
    """Image (3, H, W) uint8 with its shorter side made `side` pixels."""
    return v2.functional.resize(image, scaled_size(image, side), antialias=True)


def scaled_size(image, side):
    """[height, width] of image (..., H, W) once its shorter side is `side`."""
    height, width = image.shape[-2:]
    return [max(side, round(length * side / min(height, width))) for length in (height, width)]


@torch.no_grad()
def predict_averaged(model, checkpoint, images, device, dtype, args):
    """RGB (H, W, 3) uint8 each -> yields logits (K, H, W) of each, those of the probabilities' mean over all views.

    Views are --scales and --flip. Only what the net yields is there for the whole batch, the picture's size for one.
    """
    unet, views = checkpoint["net"] == "unet", []
    for scale in args.scales:
        for flip in [False, True][:1 + args.flip]:
            seen = [np.ascontiguousarray(image[:, ::-1]) if flip else image for image in images]
            outputs = NETS[checkpoint["net"]][1](model, checkpoint, seen, scale, device, dtype)
            views.append([one.flip(-1) for one in outputs] if flip else outputs)
    for image, *outputs in zip(images, *views):
        sized = (F.interpolate(one[None], image.shape[:2], mode="bilinear", align_corners=False)[0] for one in outputs)
        if len(views) == 1:
            yield next(sized)
            continue
        prob = 0
        for logits in sized:
            prob += (logits.sigmoid_() if unet else logits.softmax(0)) / len(views)
        yield torch.logit(prob, 1e-7) if unet else prob.clamp_(min=1e-12).log_()  # finite, for blending


def predict_tiled(model, checkpoint, image, device, dtype, args):
    """RGB (H, W, 3) uint8 -> logits (K, H, W) on the CPU, of overlapping tiles, each predicted as a picture of its own.

    Memory: 3 bytes a pixel for the picture, 4 (K + 1) for the logits and their weights, and a batch of tiles; no other
    float copy. What comes after, mask and overlay, adds about 10 bytes a pixel.
    """
    from monai.inferers import sliding_window_inference  # late: it takes seconds
    height, width = image.shape[:2]

    def predict_windows(_, places):
        utils.check_stop()
        tiles = [image[rows, columns] for *_, rows, columns in places]
        return torch.stack([*predict_averaged(model, checkpoint, tiles, device, dtype, args)])

    blank = torch.zeros(()).expand(1, 1, height, width)  # no memory; MONAI would want the whole picture as float32
    size = [min(args.tile, height), min(args.tile, width)]
    overlap = 0.25 if args.overlap is None else args.overlap
    return sliding_window_inference(blank, size, args.batch_size, predict_windows, overlap, "gaussian", with_coord=True,
                                    sw_device=device, device="cpu", progress=sys.stderr.isatty())[0]


def predict_batch(model, checkpoint, images, device, dtype, args):
    """RGB (H, W, 3) uint8 each -> logits (K, H, W) of each; only what is larger than a tile is cut into tiles."""
    if args.tile and max(images[0].shape) > args.tile:
        return [predict_tiled(model, checkpoint, images[0], device, dtype, args)]
    return predict_averaged(model, checkpoint, images, device, dtype, args)


def annotate(annotations, kind, image_id, category, mask, score=None):
    """Appends COCO's annotations of mask (H, W) bool: one if it has a score, else one for each connected part of it."""
    if not kind or not mask.any():
        return
    mask = mask.astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask) if score is None else (
        2, mask, [None, [*cv2.boundingRect(mask), cv2.countNonZero(mask)]], None)
    for k in range(1, count):
        x, y, width, height, area = map(int, stats[k])
        part = (labels[y:y + height, x:x + width] == k).astype(np.uint8)
        shape = run_lengths(part, x, y, mask.shape) if kind == "rle" else polygons(part, x, y)
        annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0,
                            "bbox": [x, y, width, height], "area": area, "segmentation": shape,
                            **({} if score is None else {"score": score})})


def polygons(part, left, top):
    """Outlines [[x, y, x, y ...]] of part (h, w), along the pixels' edges, without holes; (left, top) is its corner."""
    nodes = np.pad(part.repeat(2, 0).repeat(2, 1), ((0, 1), (0, 1)))  # pixel i covers nodes 2i to 2i + 2
    nodes[1:] |= nodes[:-1].copy()
    nodes[:, 1:] |= nodes[:, :-1].copy()
    outlines, _ = cv2.findContours(nodes, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(outline[:, 0] / 2 + (left, top)).ravel().tolist() for outline in outlines]


def run_lengths(part, left, top, size):
    """COCO's uncompressed RLE of part (h, w) in a picture of this size (H, W): lengths of 0, 1, 0 ... down columns."""
    columns, rows = np.nonzero(part.T)
    places = (left + columns) * size[0] + top + rows
    starts, ends = places[np.diff(places, prepend=-2) != 1], places[np.diff(places, append=-2) != 1] + 1
    counts = np.diff(np.stack([starts, ends], 1).ravel(), prepend=0, append=size[0] * size[1])
    return {"size": [*size], "counts": counts.tolist()}


def write_classes(logits, image, checkpoint, prefix, note):
    """Mask of the likeliest class, overlay. Returns [class, pixels, ""] of each class.

    U-Net's classes may overlap and count from 1: 0 is where none is likelier than not; if several, a mask of each too.
    """
    unet = checkpoint["net"] == "unet"
    mask = torch.cat([((rows.argmax(0) + unet) * (rows.amax(0) > 0 if unet else 1)).byte()
                      for rows in logits.split(256, 1)]).cpu().numpy()
    utils.save_mask(f"{prefix}_mask.png", mask)
    utils.save_picture(f"{prefix}_overlay.png", utils.overlay(image, mask))
    found = []
    for k, name in enumerate(checkpoint["classes"]):
        one = (logits[k] > 0).cpu().numpy() if unet else mask == k
        if unet and len(logits) > 1:
            utils.save_picture(f"{prefix}_mask_{name}.png", one * np.uint8(255))
        found.append([name, np.count_nonzero(one), ""])
        if unet or k:  # DeepLab's background is no object
            note(k + unet, one)
    return found


def read_prompts(name, given, args):
    """[(points [[x, y]], labels)], an object each, of a picture: by --prompts under its name, else --box and --point.

    Each box is an object; the points are one more, or, beside a single box, belong to it. InputError if there are none.
    """
    own = given.get(name, {}) if args.prompts else {"boxes": args.box, "points": args.point}
    try:
        boxes = [[*map(float, box)] for box in own.get("boxes", [])]
        points = [[*map(float, point), 1.0][:3] for point in own.get("points", [])]
        queries = [([[x0, y0], [x1, y1]], [2, 3]) for x0, y0, x1, y1 in boxes]
        clicks = [[x, y] for x, y, _ in points], [int(label) for *_, label in points]
        if not {label for *_, label in points} <= {0.0, 1.0}:
            raise ValueError("a point's label is 1 or 0")
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        form = '{"boxes": [[x0, y0, x1, y1]], "points": [[x, y, label]]}'
        raise utils.InputError(f"{args.prompts or '--point'}: {name}: not as {form} ({error})") from None
    if len(queries) == 1 and points:
        queries = [(queries[0][0] + clicks[0], queries[0][1] + clicks[1])]
    elif points:
        queries.append(clicks)
    if len(queries) > 254:
        raise utils.InputError(f"{name}: {len(queries)} objects; a palette mask tells 254 apart, give fewer at a time")
    if not queries:
        raise utils.InputError(f"{args.prompts or '--box'}: nothing to cut out of {name}; give --box, --point, "
                               "--prompts or --click")
    if max(len(labels) for _, labels in queries) > 6:
        raise utils.InputError(f"{name}: more than six points for an object, corners of its box included; the net "
                               "takes no more")
    return queries


def check_prompts(name, queries, shape):
    """InputError if any lie outside the picture of this shape (H, W, 3)."""
    corners = np.array([point for points, _ in queries for point in points])
    empty = any(labels[0] == 2 and not np.less(*points[:2]).all() for points, labels in queries)
    if empty or not ((corners >= 0) & (corners <= [shape[1], shape[0]])).all():
        raise utils.InputError(f"{name}: a box or point lies outside its {shape[1]}x{shape[0]} pixels, or a box is "
                               "empty (x0,y0 is its upper left corner, x1,y1 its lower right one)")


def predict_efficient_sam(model, checkpoint, image, device, dtype, queries):
    """RGB (H, W, 3) uint8, prompts -> yields logits (q, 3, H, W), scores (q, 3) as train_efficientsam.py validates."""
    args = argparse.Namespace(**{**checkpoint["args"], "image_size": checkpoint["arch"]["image_size"]})
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())
    height, width = placed_size(image.shape[1:], args)
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]])
    most = max(len(labels) for _, labels in queries)
    points, labels = torch.full((len(queries), most, 2), -1.0), torch.full((len(queries), most), -1)
    for i, (query, kinds) in enumerate(queries):
        points[i, :len(kinds)], labels[i, :len(kinds)] = torch.tensor(query) * scale, torch.tensor(kinds)
    return predict_masks(model, preprocess(image, args)[None].to(device), points[None].to(device),
                         labels[None].to(device), image.shape[-2:], args, dtype)


def placed_size(size, args):
    """[height, width] that a picture of this size (H, W) fills of the net's square."""
    if args.preprocess == "official":
        return [args.image_size, args.image_size]
    return [max(1, round(side * args.image_size / max(size))) for side in size]


def preprocess(image, args):
    """Picture (3, H, W) uint8 -> (3, S, S) float32 in 0..1, by --preprocess; the net subtracts ImageNet's mean."""
    size = placed_size(image.shape[1:], args)
    image = image / 255
    if [*image.shape[1:]] != size:
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    if args.preprocess == "official":
        return image
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)
    return F.pad(image, (0, args.image_size - size[1], 0, args.image_size - size[0]))


def predict_masks(model, image, points, labels, size, args, dtype):
    """Image (1, 3, S, S), points (1, Q, N, 2), labels -> yields first, logits (q, 3, *size), iou (q, 3).

    At the picture's own size, and for eight queries at a time from number `first` on, which fit in memory.
    """
    side = args.image_size
    height, width = placed_size(size, args)
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        embedding = model.get_image_embeddings(image)
    for i in range(0, points.shape[1], 8):
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            logits, iou = model.predict_masks(embedding, points[:, i:i + 8], labels[:, i:i + 8], True, side, side)
        logits = logits[0].float()
        if args.preprocess == "article":  # what was padded is cut off, at the net's own size
            logits = F.interpolate(logits, (side, side), mode="bicubic", align_corners=False)[..., :height, :width]
        yield i, F.interpolate(logits, size, mode="bicubic", align_corners=False), iou[0].float()


def write_efficient_sam(parts, image, prefix, note, all_masks):
    """Mask of object ids 1, 2 ... (where they overlap the later one), overlay; returns [object, pixels, score]."""
    mask, rows = np.zeros(image.shape[:2], np.uint8), []
    found = ((three.cpu().numpy(), own.cpu().numpy()) for _, logits, scores in parts
             for three, own in zip(logits > 0, scores))
    for k, (three, own) in enumerate(found, 1):
        best = own.argmax()
        mask[three[best]] = k
        note(1, three[best], round(float(own[best]), 4))
        rows.append([f"object {k}", int(three[best].sum()), f"{own[best]:.4f}"])
        for i in range(3) if all_masks else []:
            utils.save_picture(f"{prefix}_{k}_{i + 1}.png", three[i] * np.uint8(255))
            rows.append([f"object {k} mask {i + 1}", int(three[i].sum()), f"{own[i]:.4f}"])
    utils.save_mask(f"{prefix}_mask.png", mask)
    utils.save_picture(f"{prefix}_overlay.png", utils.overlay(image, mask))
    return rows


def keep_embedding(model):
    """The net for one picture: its embedding is computed at the first call."""
    kept = []

    def embed(image):
        kept[:] = kept or [model.get_image_embeddings(image)]
        return kept[0]
    return SimpleNamespace(get_image_embeddings=embed, predict_masks=model.predict_masks)


class ClickWindow:
    """A picture in a matplotlib figure, to click on: `queries` are then as read_prompts gives them; s or q end it.

    predict([query]) yields 0, logits (1, 3, H, W), scores (1, 3); the best mask is drawn after each change.
    """

    KEYS = "left: object   right: background   drag: box   u: undo   enter: next object   s: save   q: quit"

    def __init__(self, figure, image, predict):
        self.figure, self.image, self.predict, self.pressed, self.done = figure, image, predict, None, None
        self.objects, self.masks = [[]], [None]  # of each object its boxes and clicks in order, and what they cut out
        figure.clear()
        self.axes = figure.add_axes([0, 0, 1, 0.93])
        self.axes.axis("off")
        self.picture = self.axes.imshow(image)
        for event in ("button_press_event", "button_release_event", "key_press_event", "close_event"):
            figure.canvas.mpl_connect(event, getattr(self, event))
        self.draw()

    @property
    def queries(self):
        return [self.query(prompts) for prompts in self.objects if prompts]

    def query(self, prompts):
        """What one object was shown by; of several boxes the last counts."""
        boxes, clicks = [p for p in prompts if len(p) == 4][-1:], [p for p in prompts if len(p) == 3]
        corners = [[*box[i:i + 2]] for box in boxes for i in (0, 2)]
        return corners + [[x, y] for x, y, _ in clicks], [2, 3][:len(corners)] + [label for *_, label in clicks]

    def button_press_event(self, event):
        if event.inaxes is self.axes and not getattr(self.figure.canvas.toolbar, "mode", ""):  # neither pan nor zoom
            self.pressed = event

    def button_release_event(self, event):
        first, self.pressed = self.pressed, None
        if first is None:
            return
        places = self.axes.transData.inverted().transform([(first.x, first.y), (event.x, event.y)])
        start, stop = places.clip(0, np.array(self.image.shape[1::-1]) - 1)
        prompt = (*start.tolist(), int(first.button == 1))
        if first.button == 1 and max(abs(event.x - first.x), abs(event.y - first.y)) > 4:  # pixels of the screen
            prompt = (*np.minimum(start, stop).tolist(), *np.maximum(start, stop).tolist())
        area = len(prompt) == 3 or (stop != start).all()
        if area and len(self.query([*self.objects[-1], prompt])[1]) <= 6:  # the net takes no more
            self.objects[-1].append(prompt)
            self.change()

    def key_press_event(self, event):
        if event.key in ("s", "q"):
            self.end(event.key)
        elif event.key == "enter" and self.objects[-1] and len(self.objects) < 254:
            self.objects, self.masks = [*self.objects, []], [*self.masks, None]
            self.draw()
        elif event.key == "u" and self.queries:
            if not self.objects[-1]:
                self.objects, self.masks = self.objects[:-1], self.masks[:-1]
            self.objects[-1].pop()
            self.change()

    def close_event(self, event):
        self.end("q")

    def end(self, key):
        self.done = self.done or key
        self.figure.canvas.stop_event_loop()

    def change(self):
        """The object last shown is cut out anew."""
        self.masks[-1] = None
        if self.objects[-1]:
            _, logits, scores = next(self.predict([self.query(self.objects[-1])]))
            self.masks[-1] = (logits[0, scores[0].argmax()] > 0).cpu().numpy()
        self.draw()

    def draw(self):
        ids = np.zeros(self.image.shape[:2], np.uint8)
        for k, mask in enumerate(self.masks, 1):
            ids[mask if mask is not None else ids > 255] = k
        shown, size = utils.overlay(self.image, ids), max(2, max(ids.shape) // 200)
        for points, labels in self.queries:
            for point, label in zip(np.round(points).astype(int).tolist(), labels):
                cv2.circle(shown, point, size, [(255, 0, 0), (0, 255, 0), (255, 255, 0), (255, 255, 0)][label], -1)
        self.picture.set_data(shown)
        self.figure.suptitle(f"object {len(self.objects)}   {self.KEYS}", fontsize=9)
        self.figure.canvas.draw_idle()


def open_figure():
    """An empty figure on the screen; InputError where there is none."""
    try:
        import matplotlib.pyplot as plt  # late: it takes a second
        plt.rcParams.update({key: [] for key in plt.rcParams if key.startswith("keymap.")})  # s and q are ours
        figure = plt.figure("predict.py", figsize=(10, 8))
        there = figure.canvas.required_interactive_framework
    except Exception:  # each toolkit has errors of its own
        there = None
    if not there:
        raise utils.InputError("--click: no display to open a window on; give --point or --box")
    figure.show()
    figure.timer = figure.canvas.new_timer(200)  # milliseconds; a toolkit's loop sees no Ctrl-C
    figure.timer.add_callback(lambda: utils.stop_asked() and figure.canvas.stop_event_loop())
    figure.timer.start()
    return figure


NETS = {  # how to build it from a checkpoint's "arch", and what predicts a batch
    "unet": (lambda model, **arch: UNETS[model](**arch), predict_unet),
    "deeplabv3": (deeplabv3, predict_deeplabv3),
    "efficient_sam": (lambda model, image_size: SAM_NETS[model](image_size), None),  # see do_prompts
}


# --- Main ---

def check_options(args, checkpoint):
    """InputError for an option that is not for this net."""
    sam = checkpoint["net"] == "efficient_sam"
    ours = {"--flip": args.flip, "--scales": args.scales != [1.0], "--tile": args.tile, "--depth": args.depth}
    theirs = {"--box": args.box, "--point": args.point, "--prompts": args.prompts, "--all-masks": args.all_masks,
              "--click": args.click}
    for option, given in (ours if sam else theirs).items():
        if given:
            raise utils.InputError(f"{option}: is for {'U-Net and DeepLab' if sam else 'EfficientSAM'}; {args.weights} "
                                   f"is {checkpoint['net']}; leave it out")
    if args.depth and not (checkpoint["net"] == "unet" and checkpoint["arch"].get("deep_supervision")):
        raise utils.InputError(f"--depth: is for NestedUNet trained with --deep-supervision; {args.weights} is not; "
                               "leave it out")
    if not all(0.1 <= scale <= 10 for scale in args.scales):
        raise utils.InputError(f"--scales {args.scales}: must be from 0.1 to 10")
    if args.overlap is not None and not args.tile:
        raise utils.InputError("--overlap: is of tiles; give --tile too")
    if args.click and args.all_masks:
        raise utils.InputError("--all-masks: not with --click, which cannot know beforehand what it will write")
    if (args.prompts or args.click) and (args.box or args.point) or (args.prompts and args.click):
        raise utils.InputError("--prompts: takes the place of --box and --point, --click of all; give one or the other")


def plan_outputs(paths, checkpoint, args):
    """[(name, path)], prompts by name, errors of those that have none; InputError if a file must not be written."""
    sam, endings = checkpoint["net"] == "efficient_sam", ["_mask.png", "_overlay.png"]
    prompts, queries, bad = {}, {}, []
    if checkpoint["net"] == "unet" and len(checkpoint["classes"]) > 1:
        endings += [f"_mask_{name}.png" for name in checkpoint["classes"]]
    if args.prompts:
        try:
            prompts = dict(json.loads(Path(args.prompts).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise utils.InputError(f"{args.prompts}: no json of prompts that can be read ({error})") from None
    inputs = [*zip(name_outputs(paths, endings), paths)]
    files = [name + ending for name, _ in inputs for ending in endings] + ["areas.csv"]
    files += ["annotations.json"] if args.coco else []
    for name, _ in inputs if sam and not args.click else []:
        try:
            queries[name] = read_prompts(name, prompts, args)
            files += [f"{name}_{k + 1}_{i}.png" for k in range(len(queries[name])) for i in (1, 2, 3) if args.all_masks]
        except utils.InputError as error:
            bad.append(str(error))
    read = {os.stat(path)[1:3] for path in [*paths, args.weights, args.prompts or ""] if os.path.exists(path)}
    for path in (Path(args.output_dir, file) for file in files):
        if path.exists() and os.stat(path)[1:3] in read:  # inode and device: it may be spelt otherwise
            raise utils.InputError(f"{path}: would be written, and is read; give another --output-dir")
        if path.exists() and not args.overwrite:
            raise utils.InputError(f"{path}: is there already; give --overwrite or --output-dir")
    return [one for one in inputs if one[0] in queries or args.click or not sam], queries, bad


def write_tables(output_dir, areas, images, annotations, checkpoint, args):
    """areas.csv and, with --coco, annotations.json."""
    with open(output_dir / "areas.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([["picture", "class", "pixels", "share", "score"], *areas])
    if args.coco:
        names = enumerate(checkpoint["classes"], checkpoint["net"] == "unet")
        names = {1: "object"} if checkpoint["net"] == "efficient_sam" else dict(names)
        categories = [{"id": k, "name": name} for k, name in names.items() if k > 0]
        (output_dir / "annotations.json").write_text(json.dumps(
            {"images": images, "categories": categories, "annotations": annotations}))


def do_classes(batch, model, checkpoint, note, device, dtype, args):
    """Predicts and writes a batch by U-Net or DeepLab; yields name, path, picture, areas of each."""
    pictures = [image for *_, image in batch]
    for (name, path, image), logits in zip(batch, predict_batch(model, checkpoint, pictures, device, dtype, args)):
        utils.check_stop()
        yield name, path, image, write_classes(logits, image, checkpoint, Path(args.output_dir, name), note)


def do_prompts(batch, model, checkpoint, note, device, dtype, args, queries, figure, quit_):
    """Cuts out one picture by its queries, or by clicks into figure; yields as do_classes, or nothing."""
    (name, path, image), = batch
    predict = partial(predict_efficient_sam, keep_embedding(model), checkpoint, image, device, dtype)
    own = queries.get(name)
    if figure:
        window = ClickWindow(figure, image, predict)
        figure.canvas.start_event_loop()
        utils.check_stop()
        own = window.queries if window.done == "s" else []
        if window.done == "q":
            quit_()
    if own:
        check_prompts(name, own, image.shape)
        rows = write_efficient_sam(predict(own), image, Path(args.output_dir, name), note, args.all_masks)
        yield name, path, image, rows


@torch.no_grad()
def main(args):
    """Predicts every input; returns {"pictures": how many}. A bad file is reported, the others are still done."""
    device = utils.pick_device(args.device)
    dtype, _ = utils.pick_precision(args.amp, device)
    model, checkpoint = load_model(args, device)
    check_options(args, checkpoint)
    if args.depth:
        model.forward = partial(model.forward, depth=args.depth)
    sam, output_dir = checkpoint["net"] == "efficient_sam", Path(args.output_dir)
    paths = find_inputs(args.inputs)
    inputs, queries, bad = plan_outputs(paths, checkpoint, args)
    figure = open_figure() if args.click else None
    output_dir.mkdir(parents=True, exist_ok=True)
    areas, images, annotations, started = [], [], [], time.perf_counter()

    def note(category, mask, score=None):  # what --coco wants to know of the picture that is being done
        annotate(annotations, args.coco, len(images) + 1, category, mask, score)

    size = 1 if sam or args.tile else args.batch_size
    batches = read_batches(inputs, size, bad)
    do = partial(do_prompts, queries=queries, figure=figure, quit_=batches.close) if sam else do_classes
    try:
        for batch in tqdm(batches, total=math.ceil(len(inputs) / size), leave=False, disable=None):
            try:
                for name, path, image, found in do(batch, model, checkpoint, note, device, dtype, args):
                    areas += [[name, of, pixels, pixels / image[..., 0].size, score] for of, pixels, score in found]
                    images.append({"id": len(images) + 1, "file_name": path.as_posix(), "width": image.shape[1],
                                   "height": image.shape[0]})
            except utils.InputError as error:
                bad.append(str(error))
            except (RuntimeError, MemoryError) as error:
                if not utils.is_out_of_memory(error):
                    raise
                done = {image["file_name"] for image in images}
                bad += [f"{path}: out of memory; try --tile, a smaller -b, or --amp bf16" for _, path, _ in batch
                        if path.as_posix() not in done]
    finally:  # however it ends: what has been written is listed
        write_tables(output_dir, areas, images, annotations, checkpoint, args)
    for _, name, pixels, share, score in areas if len(paths) == 1 else []:
        print(f"  {name:>15}  {pixels:12,} pixels  {share:7.2%}" + f"  score {score}" * bool(score))
    print(f"{len(images)} of {len(paths)} pictures predicted in {time.perf_counter() - started:.1f} s: {output_dir}/"
          "*_mask.png, *_overlay.png, areas.csv" + ", annotations.json" * bool(args.coco))
    if bad:
        more = "; and " + ", ".join(line.split(": ")[0] for line in bad[10:]) if len(bad) > 10 else ""
        raise utils.InputError(" ".join(("; ".join(bad[:10]) + more).splitlines()))
    return {"pictures": len(images)}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
