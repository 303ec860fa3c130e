"""Train or fine-tune SAM 2.1 on videos.   Article: 【SAM2代码解析】training部分-1总体概述

    python train_sam2.py --demo
    python train_sam2.py --data-path data/MOSE/train --weights base_plus
    torchrun --nproc_per_node 8 train_sam2.py --data-path data/MOSE/train --resume auto
    python train_sam2.py --extract-frames data/videos data/JPEGImages --rate 4

Data:   DATA_PATH, which may be repeated; the layout is detected from the folder's contents. Videos:
        JPEGImages/VIDEO/00000.jpg ..., Annotations/VIDEO/00000.png of ids (0 background, each other
        id one object; in 8-bit masks 255 is void if other ids occur), or one folder per object,
        Annotations/VIDEO/OBJECT/00000.png; DAVIS' 480p/ in between is found. SA-V: VIDEO_manual.json
        with a folder VIDEO of frames, which --extract-frames writes. Images: SA-1B's sa_N.jpg with
        sa_N.json; or VOC's JPEGImages/ID.jpg with SegmentationObject/ID.png (255 void). Split 80:20,
        or by lists.
Writes: OUTPUT_DIR/best.pth (best val_jf; of images alone best val_image_box_iou) and last.pth (for
        --resume), log.csv, curves.png, val_videos.csv (figures of each video), val_samples.png
        (frames of a clip in a row: image, truth, prediction), split.json, args.json.
Parts:  the article's, and here: VOSDataset, RandomUniformSampler = VideoDataset; the raw data sets =
        find_items, find_videos, find_sav, find_sa1b; TorchTrainMixedDataset = MixSampler; transforms =
        change_clip; SAM2Train = simulate_prompts, track_clips; loss_fns.py = criterion, mask_losses;
        optimizer.py = create_optimizer; trainer.py = train_one_epoch, main; the yaml = the options.
"""
import argparse
import csv
import functools
import json
import math
import re
import shlex
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

import utils
from nets.sam2 import NETS, PIXEL_MEAN, WEIGHTS, enlarge, normalize, resize_images, resize_mask
from nets.weights import check_net, load_weights, official_file, read_weights

FIGURES = ("val_jf", "val_j", "val_f", "val_click_jf", "val_click_j", "val_click_f",
           "copied_jf", "copied_j", "copied_f")  # of evaluate, of videos
IMAGE_FIGURES = ("val_image_box_iou", "val_image_click_iou")  # and of images
VOID = 0       # key of the void mask among objects, whose ids begin at 1
VOID_ID = 255  # of void pixels in mask files and arrays of ids
IDS, IDS_AND_VOID = 0, -1  # instead of an object's id: a file of many; 255 is an object, or void
LOSSES = ("focal", "dice", "iou", "score")  # of criterion
PARTS = {  # of --freeze
    "image_encoder": ("image_encoder",),
    "memory": ("memory_attention", "memory_encoder", "obj_ptr_proj", "obj_ptr_tpos_proj",
               "maskmem_tpos_enc", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr",
               "no_obj_embed_spatial"),
    "prompt": ("sam_prompt_encoder", "mask_downsample"),
    "none": ()}
DEMO = {"model": "demo", "weights": "none", "amp": "off", "image_size": 96, "num_frames": 4, "stride": 2,
        "max_objects": 1, "lr": 1e-3, "vision_lr": 1e-3, "layer_decay": 1.0, "clip_grad": 1.0,
        "epochs": 6, "batch_size": 4, "workers": 0, "multiplier": [4], "prompted_frames": 1,
        "corrected_frames": 1, "num_correction_points": 1, "prob_box": 0.0,  # few kinds of clips: faster
        "dropout": 0.0, "drop_path": 0.0, "degrees": 10.0, "shear": 5.0, "reverse_time_prob": 0.5,
        "train_set": "train", "val_set": "val", "output_dir": "runs/train_sam2_demo"}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    parser.add_run_options(output_dir="runs/train_sam2")  # --demo, --resume, --device ...
    add, add_switch = parser.add_argument, parser.add_switch
    count, positive = utils.number(int, 0), utils.number(int, 1)
    non_negative, share = utils.number(float, 0), utils.number(float, 0, 1)
    add("--data-path", action="append", help="folder in one of these layouts; may be repeated")
    add("--mix", type=ratio, help="batches per --data-path as a ratio, such as 2:1 (all data)")
    add("--phases", "--phases-per-epoch", type=positive, default=1,
        help="epochs that the data is divided over: with 2 each has one half (%(default)s)")
    add("--ann-every", type=positive, default=4,
        help="SA-V: how its json was made: masks on every N-th frame (%(default)s)")
    add("--img-folder", help="folder of the videos' images, instead of DATA_PATH/JPEGImages")
    add("--gt-folder", help="folder of the videos' masks, instead of DATA_PATH/Annotations")
    add("--train-set", "--file-list-txt",
        help="list of videos to train on, one per line: a file, or NAME of DATA_PATH/ImageSets/NAME.txt")
    add("--excluded-videos-list-txt", help="list of videos not to train on")
    add("--val-set", help="list of videos to validate on; the others are trained on")
    add("--val-path", action="append",
        help="folder of any layout to validate on, instead of splitting; may be repeated")
    add("--split", help="split.json of another run to use, instead of splitting by --seed")
    add("--image-size", "--resolution", type=positive, default=1024,
        help="side in pixels of the square that the net sees, a multiple of 32 (%(default)s)")
    add("--num-frames", type=positive, default=8, help="frames of a clip (%(default)s)")
    add("--stride", "--sample-rate", type=positive, default=1,
        help="a clip takes every N-th annotated frame (%(default)s)")
    add("--max-objects", "--max-num-objects", type=positive, default=3,
        help="most objects per clip, of those on its first frame (%(default)s)")
    add("--multiplier", type=ratio, default=[2],
        help="clips of each video and epoch, or 2:1 for each --data-path; of an image 1 (2)")
    add("--max-replaced", type=count, default=100,
        help="clips in a row that may fail to load and are replaced (%(default)s)")
    add("--reverse-time-prob", type=share, default=0.0, help="share of reversed clips (%(default)s)")
    add("--hflip-prob", type=share, default=0.5, help="share of mirrored clips (%(default)s)")
    add("--degrees", type=utils.number(float, 0, 180), default=25.0,
        help="clips are rotated by up to this (%(default)s)")
    add("--shear", type=utils.number(float, 0, 60), default=20.0,
        help="clips are sheared by up to this angle (%(default)s)")
    add("--jitter", type=share, nargs=3, default=[0.1, 0.03, 0.03], metavar=("B", "C", "S"),
        help="brightness, contrast, saturation of a clip vary by this share (%(default)s)")
    add("--frame-jitter", type=share, nargs=3, default=[0.1, 0.05, 0.05], metavar=("B", "C", "S"),
        help="those of each frame, on top (%(default)s)")
    add("--gray-prob", type=share, default=0.05, help="share of grey clips (%(default)s)")

    add("--prob-points", "--prob-to-use-pt-input-for-train", type=share, default=0.5,
        help="share of clips prompted by clicks or boxes, not masks (%(default)s)")
    add("--prob-box", "--prob-to-use-box-input-for-train", type=share, default=0.5,
        help="share of their prompted frames that get boxes (%(default)s)")
    add("--prompted-frames", "--num-init-cond-frames-for-train", type=positive, default=2,
        help="most frames prompted from the start: the first, and random ones (%(default)s)")
    add_switch("--vary-prompted", "--rand-init-cond-frames-for-train", default=True,
               help="draw 1 to --prompted-frames of them, else take all (%(default)s)")
    add("--corrected-frames", "--num-frames-to-correct-for-train", type=positive, default=2,
        help="most frames that get correcting clicks, in clips of clicks and boxes (%(default)s)")
    add_switch("--vary-corrected", "--rand-frames-to-correct-for-train", default=True,
               help="draw how many, up to --corrected-frames, else take all (%(default)s)")
    add_switch("--corrected-as-prompted", "--add-all-frames-to-correct-as-cond", default=True,
               help="corrected frames are remembered as prompted ones are (%(default)s)")
    add("--num-correction-points", "--num-correction-pt-per-frame", type=count, default=7,
        help="correcting clicks on such a frame (%(default)s)")
    add("--prob-click-truth", "--prob-to-sample-from-gt-for-train", type=share, default=0.1,
        help="share of them anywhere on the object, not where the mask is wrong (%(default)s)")

    add("--model", choices=list(NETS), default="base_plus", help="(%(default)s)")
    add("--weights", help=f"none, a path, {', '.join(WEIGHTS)} (official; default: of --model)")
    add("--freeze", choices=list(PARTS), nargs="+", default=["none"],
        help="parts that are not trained: less memory (%(default)s)")
    add_switch("--gradient-checkpointing", help="less memory, 1.5 times the time")
    add("--drop-path", "--drop-path-rate", type=utils.number(float, 0, 0.99), default=0.1,
        help="share of the image encoder's last block skipped in training (%(default)s)")
    add("--dropout", type=share, default=0.1, help="of the memory attention (%(default)s)")

    add("--focal-weight", "--loss-mask", type=non_negative, default=20.0, help="(%(default)s)")
    add("--dice-weight", "--loss-dice", type=non_negative, default=1.0, help="(%(default)s)")
    add("--iou-weight", "--loss-iou", type=non_negative, default=1.0, help="(%(default)s)")
    add("--score-weight", "--loss-class", type=non_negative, default=1.0, help="(%(default)s)")
    add_switch("--supervise-all-iou", default=True, help="not of the best mask alone (%(default)s)")
    add_switch("--iou-use-l1-loss", default=True, help="absolute, not squared error (%(default)s)")
    add_switch("--pred-obj-scores", default=True, help="learn if an object is absent (%(default)s)")
    add("--focal-alpha", type=share, default=0.25, help="weight of object pixels (%(default)s)")
    add("--focal-gamma", type=non_negative, default=2.0, help="of the focal loss (%(default)s)")
    add("--focal-alpha-obj-score", type=float, default=-1.0, help="below 0: none (%(default)s)")
    add("--focal-gamma-obj-score", type=non_negative, default=0.0, help="0: none (%(default)s)")

    add("--epochs", "--num-epochs", type=positive, default=40,
        help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", "--train-batch-size", type=positive, default=1,
        help="clips per batch and process (%(default)s)")
    add("--image-batch-size", type=positive, help="the same for data sets of images (--batch-size)")
    add("--accumulate", type=positive, default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", "--base-lr", type=non_negative, default=5e-6,
        help="initial learning rate (%(default)s)")
    add("--vision-lr", type=non_negative, default=3e-6, help="of the image encoder (%(default)s)")
    add("--layer-decay", type=share, default=0.9,
        help="rate of each block of the image encoder / rate of the next (%(default)s)")
    add("--final-lr", type=share, default=0.1, help="final rate / initial rate (%(default)s)")
    add("--weight-decay", "--wd", type=non_negative, default=0.1, help="weight decay (%(default)s)")
    add("--clip-grad", "--max-norm", type=non_negative, default=0.1,
        help="largest gradient norm, 0 for any (%(default)s)")

    add("-c", "--config", action=utils.Obsolete, metavar="YAML",
        help="no effect: docs/sam2_options.md has that file's run as a command, and its keys as options")
    add("--use-cluster", "--num-gpus", "--num-nodes", "--partition", "--account", "--qos",
        dest="num_gpus", action=utils.Obsolete,
        help="no effect: give torchrun --nproc_per_node N, --nnodes (docs/sam2_options.md)")

    add("--extract-frames", nargs=2, metavar=("VIDEO", "FOLDER"),
        help="write a video's frames, or those of each video in a folder; no training")
    add("--rate", type=positive, default=4, help="with it: write every N-th frame (%(default)s)")
    return parser


def ratio(text):
    """Type of an option of whole numbers from 1 with colons between."""
    parts = text.split(":")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers from 1 with colons between")
    return [int(part) for part in parts]


# --- Data ---

class Item(NamedTuple):
    """The annotated frames of a video, or an image: a video of one frame."""
    name: str
    images: tuple  # a path of each frame
    masks: tuple   # ((object_id, path or JsonFrame), ...) of each frame, see find_objects
    still: bool
    source: int    # index of its --data-path


class JsonFrame(NamedTuple):
    """The masks of one frame in a json file of SA-V, or all of one of SA-1B (frame 0)."""
    path: Path
    frame: int

    def __str__(self):
        return f"{self.path}, masks of frame {self.frame}"


class Clip(NamedTuple):
    """T frames, N objects and what a user does: images (T, 3, S, S) uint8, masks (T, N, S, S) bool.

    prompts: {frame: {}} for masks, or {frame: {"point_coords": (N, P, 2), "point_labels": (N, P)}},
    as of nets/sam2.py, in the order in which they are given. corrected: frames that get clicks.
    draws (T, K, N): numbers in [0, 1) that place the K clicks; negative: anywhere on the object.
    void (T, N, S, S): pixels that do not count, if there are any.
    """
    images: torch.Tensor
    masks: torch.Tensor
    prompts: dict
    corrected: tuple
    draws: torch.Tensor
    void: torch.Tensor = None


class VideoDataset(torch.utils.data.Dataset):
    """Videos and images: [(epoch, index)] -> training: Clip, item; validation: images, masks, item.

    Training: [list of keys] gives a list. index = item + len(items) * how often the epoch has had that
    item before, so that each of its clips is another. A clip that cannot be loaded is reported and
    replaced by one of another item of the same --data-path. What is random depends on (seed, epoch,
    index) alone.
    Validation: images (T, 3, S, S) uint8; at the item's own size, of a video ids (T, H, W) uint8, 1 to
    N or 255 for void; of an image masks (N + 1, H, W) bool, the last its void pixels.
    """
    classes, unit = [], "videos and images"

    def __init__(self, items, args, train, augment):
        self.items, self.args, self.train, self.augment = items, args, train, augment

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        if isinstance(key, list):
            return [self[pair] for pair in key]
        epoch, index = key
        if not self.train:
            return *read_item(self.items[index], self.args), index
        place = index if index < 0 else index % len(self.items)  # -1 fills up, see MixSampler
        with utils.seeded(self.args.seed, epoch, index):
            item = self.items[place]
            for failed in range(self.args.max_replaced + 1):
                try:
                    return self.cut_clip(item), place
                except utils.InputError as error:
                    if failed == self.args.max_replaced:
                        raise utils.InputError(f"{error} (--max-replaced {failed}: as many clips in a row "
                                               "could not be loaded)") from None
                    print(f"note: {error}: another clip is taken", flush=True)
                    others = [other for other in self.items if other.source == item.source]
                    item = others[draw_int(0, len(others) - 1)]

    def cut_clip(self, item):
        """Returns a random Clip of the item; InputError if it cannot be read or shows no object."""
        args, images, masks = self.args, item.images, item.masks
        num_frames = 1 if item.still else args.num_frames
        starts = range(len(images) - (num_frames - 1) * args.stride)
        if self.augment:
            starts = torch.randperm(len(starts)).tolist()
        backwards = self.augment and happens(args.reverse_time_prob)
        for start in starts:
            frames = range(start, len(images), args.stride)[:num_frames]
            frames = frames[::-1] if backwards else frames
            if object_ids := draw_objects(masks[frames[0]], args.max_objects):
                break
        else:
            raise utils.InputError(f"{masks[0][0][1]}: no clip of it begins with an object")
        size = utils.image_size(images[frames[0]])[::-1]
        images, _, masks = zip(*[read_frame(images[t], masks[t], size, object_ids) for t in frames])
        if self.augment:
            images, masks = change_clip(images, masks, args)
        images = resize_images(images, args.image_size)
        masks = v2.functional.resize(torch.from_numpy(np.stack(masks)), [args.image_size] * 2,
                                     v2.InterpolationMode.NEAREST_EXACT) > 0
        masks, void = masks[:, :-1], masks[:, -1:]
        if not masks[0].any():
            raise utils.InputError(f"{item.masks[frames[0]][0][1]}: its objects vanish at --image-size "
                                   f"{args.image_size}")
        if self.augment:
            images = change_colours(images, args)
        return Clip(images, masks, *simulate_prompts(masks, args, void),
                    void.expand_as(masks) if void.any() else None)

    @staticmethod
    def collate(batch):
        """Returns clips and their items' indices in training, the single item in validation."""
        if len(batch[0]) == 2:
            clips, indices = zip(*batch)
            return [*clips], indices
        ((images, masks, index),) = batch
        return images, masks, [index]


class MixSampler(torch.utils.data.Sampler):
    """Yields batches of keys (epoch, index), each of one --data-path; order by (seed, epoch) alone.

    An epoch has every clip once, or 1 / --phases of them in turn; with --mix as many batches of the
    first --data-path, and the others' in proportion: small ones come around again, large ones take
    several epochs. Rank r of n takes every n-th of a batch n times as large; -1 fills up.
    """

    def __init__(self, items, args):
        self.args, self.num_items, self.parts = args, len(items), []
        self.rank, self.world_size = utils.ranks()
        for source in sorted({item.source for item in items}):
            members = [i for i, item in enumerate(items) if item.source == source]
            still = items[members[0]].still
            size = args.image_batch_size if still and args.image_batch_size else args.batch_size
            times = 1 if still else args.multiplier[min(source, len(args.multiplier) - 1)]
            self.parts.append((members * times, size * self.world_size))
        self.counts = [math.ceil(len(clips) / args.phases) for clips, _ in self.parts]
        if args.mix and self.parts:  # a test has no training items
            first = math.ceil(self.counts[0] / self.parts[0][1])
            self.counts = [max(1, round(first * share / args.mix[0])) * size
                           for share, (_, size) in zip(args.mix, self.parts)]
        self.set_epoch(0)

    def set_epoch(self, epoch, skip=0):
        """Draws the epoch's batches; skip: --batch-size times those that a resumed epoch has done."""
        batches = []
        for part, ((clips, size), count) in enumerate(zip(self.parts, self.counts)):
            indices, drawn = [], Counter()  # drawn: how often each item, in this epoch
            # Passes over all clips, each in a new order, follow each other; an epoch is the next
            # `count` clips of them, wherever in a pass it begins or ends
            for position in range(epoch * count, (epoch + 1) * count):
                passes_done, place = divmod(position, len(clips))
                if not indices or place == 0:
                    order = self.permutation(len(clips), part, passes_done)
                item = clips[order[place]]
                indices.append(item + self.num_items * drawn[item])  # see VideoDataset
                drawn[item] += 1
            batches += [indices[i:i + size] for i in range(0, count, size)]
        order = self.permutation(len(batches), -1, epoch)
        batches = [batches[i] + [-1] * (-len(batches[i]) % self.world_size) for i in order]
        self.keys = [[(epoch, index) for index in batch[self.rank::self.world_size]]
                     for batch in batches[skip // self.args.batch_size:]]

    def permutation(self, length, *numbers):
        generator = torch.Generator().manual_seed(utils.mix(self.args.seed, *numbers))
        return torch.randperm(length, generator=generator).tolist()

    def __iter__(self):
        return iter(self.keys)

    def __len__(self):
        return len(self.keys)


def happens(probability):
    return torch.rand(()).item() < probability


def draw_int(low, high):
    """Returns a random whole number from low to high, both included."""
    return torch.randint(low, high + 1, ()).item()


def change_clip(images, masks, args):
    """Mirrors, rotates and shears frames (H, W, 3) and masks (N + 1, H, W), lists, all alike.

    The last mask is void. If an object would leave the first frame, the clip is only mirrored.
    """
    if happens(args.hflip_prob):
        images, masks = [np.flip(x, 1) for x in images], [np.flip(x, 2) for x in masks]
    angle, shear = [math.radians((2 * torch.rand(()).item() - 1) * limit)
                    for limit in (args.degrees, args.shear)]
    height, width = masks[0].shape[1:]
    centre = np.array([width - 1, height - 1]) / 2
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = matrix @ [[1, -math.tan(shear)], [0, 1]]
    matrix = np.column_stack([matrix, centre - matrix @ centre])

    def warp(pixels, flags, border):
        return cv2.warpAffine(np.ascontiguousarray(pixels), matrix, (width, height), flags=flags,
                              borderValue=border)
    warped = [np.stack([warp(mask, cv2.INTER_NEAREST, 0) for mask in frame]) for frame in masks]
    if not warped[0][:-1].any((1, 2)).all() or warped[0][:-1].any(0).all():
        return images, masks
    return [warp(x, cv2.INTER_LINEAR, PIXEL_MEAN) for x in images], warped


def change_colours(images, args):
    """Changes the colours of images (T, 3, S, S) uint8: of all frames alike, then of each frame."""
    images = v2.ColorJitter(*args.jitter)(images)  # brightness, contrast, saturation
    images = v2.RandomGrayscale(args.gray_prob)(images)
    jitter = v2.ColorJitter(*args.frame_jitter)
    return torch.stack([jitter(image) for image in images])


def simulate_prompts(masks, args, void):
    """Masks (T, N, S, S) bool of a clip -> prompts, corrected, draws of Clip: what a user may do.

    void (T, 1, S, S): where nothing is clicked. Masks are given on one or two frames; or clicks and
    boxes there, and clicks on what is then wrong, on these and other frames. A clip of one frame is
    clicked or boxed. All as in the official training, but for masks on all frames, which teach nothing.
    """
    num_frames, num_objects = masks.shape[:2]
    by_points = happens(args.prob_points) or num_frames == 1
    prompted = min(args.prompted_frames, num_frames)
    if args.vary_prompted:
        prompted = draw_int(1, prompted)
    others = (1 + torch.randperm(num_frames - 1)).tolist()
    frames, others = [0, *others[:prompted - 1]], others[prompted - 1:]
    if not by_points:  # on one frame the net finds the masks itself, or there would be no gradient
        frames = frames[:num_frames - 1]
        return {t: {} for t in frames}, (), torch.zeros(num_frames, 0, num_objects)
    corrected = max(prompted, min(args.corrected_frames, num_frames))
    if args.vary_corrected:
        corrected = draw_int(prompted, corrected)
    prompts = {}
    for t in frames:
        draw = draw_boxes if happens(args.prob_box) else draw_clicks
        coords, labels = draw(masks[t], void[t])
        prompts[t] = {"point_coords": coords, "point_labels": labels}
    draws = torch.rand(num_frames, args.num_correction_points, num_objects)
    for places in draws.flatten(0, 1):  # views: subtracting changes draws
        if happens(args.prob_click_truth):
            places -= 1  # below 0: on the whole object, see next_clicks
    return prompts, (*frames, *others[:corrected - prompted]), draws


def draw_boxes(masks, void):
    """Masks (N, S, S) bool -> corners (N, 2, 2), moved by up to a tenth of the side or 20; labels.

    An absent object has no box: a click beside it, and padding (official: a box turned inside out).
    """
    coords, labels = draw_clicks(masks, void)
    coords, labels = F.pad(coords, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
    for i, mask in enumerate(masks):
        if mask.any():
            box = masks_to_boxes(mask[None])[0]
            reach = (0.1 * (box[2:] - box[:2])).clamp(max=20).repeat(2)
            box = (box + (2 * torch.rand(4) - 1) * reach).clamp(0, mask.shape[1] - 1)
            coords[i], labels[i] = box.view(2, 2), torch.tensor([2, 3])
    return coords, labels


def draw_clicks(masks, void):
    """Masks (N, S, S) bool -> a click on each, (N, 1, 2), and labels (N, 1); see next_clicks."""
    return next_clicks(masks, torch.zeros_like(masks), torch.rand(len(masks)), void)


def next_clicks(masks, pred, draws, void):
    """Masks, pred (N, S, S) bool, draws (N,) in [0, 1) -> clicks (N, 1, 2) (x, y), labels (N, 1).

    On any wrong pixel, all equally likely; label 1 where the mask lacks it, else 0. A draw below 0:
    as if pred were empty. If nothing is wrong, on the background; without background, on the object
    (official: always background, at 0, 0 without any). Never on void (N or 1, S, S).
    """
    def or_else(region, other):  # of each object, the other region if the first is empty
        return torch.where(region.flatten(1).any(1)[:, None, None], region, other)

    wrong = (masks ^ (pred & (draws >= 0)[:, None, None])) & ~void
    region = or_else(wrong, or_else(~(masks | void), masks)).flatten(1)
    counts = region.cumsum(1)  # the k-th pixel of the region is where this becomes k
    k = (draws % 1 * counts[:, -1]).long().minimum(counts[:, -1] - 1) + 1
    place = torch.searchsorted(counts, k[:, None])
    labels = masks.flatten(1).gather(1, place).int()
    side = masks.shape[2]
    return torch.stack([place % side, place // side], 2).float(), labels


@functools.lru_cache(maxsize=1)  # draw_objects and read_frame ask for a clip's first frame in turn
def find_objects(sources):
    """((object_id, source), ...) of one frame -> {object_id: function returning its mask (H, W) bool}.

    Void has the key VOID. Each mask is decoded once, and only if it is asked for: not all are drawn.
    """
    found = {}
    for object_id, source in sources:
        if isinstance(source, JsonFrame):
            codes = read_json(source.path)["masklet"][source.frame]
            for k, code in enumerate(codes, 1):
                found[k] = functools.cache(functools.partial(decode_rle, code, source))
        elif object_id > 0:
            found[object_id] = functools.cache(functools.partial(read_object, source))
        else:
            ids = read_id_mask(source)
            for k in np.unique(ids[ids > 0]).tolist():
                is_void = object_id == IDS_AND_VOID and k == VOID_ID
                found[VOID if is_void else k] = functools.partial(np.equal, ids, k)
    return found


def read_id_mask(path):
    """Reads a mask of ids (H, W); InputError if one is negative."""
    ids = utils.read_mask(path)
    if ids.min() < 0:
        raise utils.InputError(f"{path}: ids must not be negative; 0 is background, each other "
                               "number one object")
    return ids


def read_object(path):
    """Reads the mask (H, W) bool of one object: any single id, or 255 with soft edges."""
    ids = read_id_mask(path)
    if ((ids > 0) & (ids < ids.max())).any():
        return utils.read_binary_mask(path)
    return ids > 0


@functools.lru_cache(maxsize=4)
def read_json(path):
    """Reads SA-V's or SA-1B's json -> {"masklet": [[code of each object] of each frame], ...}."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "masklet" not in data:
            data = {"masklet": [[mask["segmentation"] for mask in data["annotations"]]]}
        if not data["masklet"] or not all(type(codes) is list for codes in data["masklet"]):
            raise ValueError("masklet is not a list of lists")
        data["video_frame_count"] = int(data.get("video_frame_count") or 0)
        return data
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise utils.InputError(f"{path}: neither SA-V's nor SA-1B's json ({type(error).__name__}: "
                               f"{error}); remove or replace it") from None


def decode_rle(code, source):
    """Decodes COCO's {"size": [H, W], "counts": compressed or not} -> mask (H, W) bool."""
    try:
        counts = code["counts"]
        counts = np.asarray(decode_counts(counts) if isinstance(counts, str) else counts)
        height, width = code["size"]
        valid = counts.dtype.kind == "i" and counts.min() >= 0 and min(width, height) >= 1
        if not valid or counts.sum() != height * width:
            raise ValueError(f"run lengths of {counts.sum()} pixels for {width}x{height}")
    except (ValueError, TypeError, KeyError) as error:
        raise utils.InputError(f"{source}: no run-length code ({error}); remove or replace it") from None
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # down the columns
    return runs.reshape(width, height).T


def decode_counts(text):
    """Decodes COCO's compressed run lengths to a list of int.

    A character holds five bits, the lowest first, and whether more follow; the highest bit is the
    sign. From the fourth number on it is the difference to the one two before.
    """
    counts, value, shift = [], 0, 0
    for code in text.encode():
        code -= 48
        if not 0 <= code < 64 or shift > 40:
            raise ValueError(f"{text[:60]!r} are no run lengths")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def draw_objects(sources, most):
    """Returns the ids of random objects that a frame shows, at most `most`."""
    found, object_ids = find_objects(sources), []
    for i in torch.randperm(len(found)).tolist():
        object_id = [*found][i]
        if object_id != VOID and len(object_ids) < most and found[object_id]().any():
            object_ids.append(object_id)
    return object_ids


def read_frame(image_source, sources, size, object_ids=None):
    """Returns image (H, W, 3) uint8 RGB, object_ids, and masks (N + 1, H, W) uint8, void last.

    Of `object_ids`, or of all objects. size (H, W): the clip's, which all must have.
    """
    image, found = utils.read_image(image_source), find_objects(sources)
    object_ids = [k for k in found if k != VOID] if object_ids is None else object_ids
    masks = np.zeros((len(object_ids) + 1, *size), np.uint8)
    check_size(image_source, image.shape[:2], size)
    for i, object_id in enumerate([*object_ids, VOID]):
        if object_id in found:
            mask = found[object_id]()
            check_size(dict(sources).get(object_id, sources[0][1]), mask.shape, size)
            masks[i] = mask
    return image, object_ids, masks


def check_size(source, found, size):
    """Checks that (H, W) of an image or mask is that of its clip."""
    if found != size:
        raise utils.InputError(f"{source}: {found[1]}x{found[0]} pixels, but its clip has "
                               f"{size[1]}x{size[0]}; save all frames and masks at one size")


def read_item(item, args):
    """Returns images (T, 3, S, S) uint8 of an item, and the masks of VideoDataset's validation."""
    size, frames, ids = utils.image_size(item.images[0])[::-1], [], []
    for image_source, sources in zip(item.images, item.masks):
        image, object_ids, masks = read_frame(image_source, sources, size)
        frames.append(resize_images([image], args.image_size)[0])
        if item.still:
            kept = [*masks[:-1].any((1, 2)), True]  # objects with a pixel, and void
            return torch.stack(frames), torch.from_numpy(masks[kept]) > 0
        ids.append(np.zeros(size, np.int64))
        for object_id, mask in zip([*object_ids, -1], masks):  # -1: void
            ids[-1][mask > 0] = object_id
    object_ids = sorted({k for frame in ids for k in np.unique(frame).tolist()} - {0, -1})
    if len(object_ids) > 254:
        raise utils.InputError(f"{item.masks[0][0][1]}: {len(object_ids)} objects; at most 254 can be told apart")
    new_ids = np.array([VOID_ID, *range(len(object_ids) + 1)], np.uint8)
    ids = [new_ids[np.searchsorted([-1, 0, *object_ids], frame)] for frame in ids]
    return torch.stack(frames), torch.from_numpy(np.stack(ids))


def find_items(data_path, args, list_name=None, source=0):
    """Returns the items of a --data-path, by its layout: those that a list names, or all."""
    root, find, still = Path(data_path), find_videos, False
    if data_path not in args.data_path:  # of --val-path
        args = argparse.Namespace(**{**vars(args), "img_folder": None, "gt_folder": None})
    if any(root.glob("sa_*.json")):
        find, still = find_sa1b, True
    elif find_jsons(args.gt_folder or root):
        find = find_sav
    elif years := [folder for folder in (root, *root.glob("VOC*"), *root.glob("VOCdevkit/VOC*"))
                   if (folder / "SegmentationObject").is_dir()]:
        root, find, still = years[0], find_voc, True
        if len(years) > 1:
            raise utils.InputError(f"{data_path}: holds {len(years)} folders of VOC; give --data-path one "
                                   f"of them, such as {root}")
    prefix = f"{source + 1}/" if source or len(args.data_path) > 1 else ""  # names may be the same
    items = []
    for name, images, masks in find(root, args, list_name):  # dicts by frame; some may have no masks
        images = tuple(images[frame] for frame in masks)
        items.append(Item(prefix + name, images, tuple(masks.values()), still, source))
    return items


def find_voc(root, args, list_name):
    """Yields images JPEGImages/ID.jpg with SegmentationObject/ID.png: 0 background, 255 void."""
    images, masks = utils.list_images(root / "JPEGImages"), utils.list_images(root / "SegmentationObject")
    for name in select(list_name, root, sorted(masks)):
        for folder, found in (("JPEGImages", images), ("SegmentationObject", masks)):
            if name not in found:
                raise utils.InputError(f"{root / folder / name}: no such image; add it, or leave it out")
        yield name, images, {name: ((IDS_AND_VOID, masks[name]),)}


def find_sa1b(root, args, list_name):
    """Yields images sa_N.jpg with sa_N.json, which holds the run-length codes of its masks."""
    images, jsons = utils.list_images(root), [path.stem for path in root.glob("sa_*.json")]
    for name in select(list_name, root, sorted(jsons, key=by_number)):
        path = root / f"{name}.json"
        if name not in images or not path.is_file():
            raise utils.InputError(f"{path}: this json and an image beside it are needed; add what is missing")
        yield name, images, {name: ((IDS, JsonFrame(path, 0)),)}


def find_sav(root, args, list_name):
    """Yields videos VIDEO_manual.json with a folder VIDEO of frames named by their numbers.

    Frames on which an object was not annotated, or that the folder lacks, are left out.
    """
    jsons, left_out, from_1 = find_jsons(args.gt_folder or root), 0, []
    for name in select(list_name, root, jsons):
        if name not in jsons:
            raise utils.InputError(f"{root / name}_manual.json: no such file; add it, or leave it out of the list")
        path, data = jsons[name], read_json(jsons[name])
        count, length = len(data["masklet"]), data["video_frame_count"]
        if length and math.ceil(length / args.ann_every) != count:
            fitting = [every for every in (4, 1) if math.ceil(length / every) == count]
            remedy = f"give --ann-every {fitting[0]}" if fitting else \
                "it may be incomplete: replace it, or give the --ann-every that it was made with"
            raise utils.InputError(f"{path}: has masks of {count} frames, but the video {length}; {remedy}")
        folder = Path(args.img_folder or path.parent, name)
        masks = {t * args.ann_every: ((IDS, JsonFrame(path, t)),)
                 for t, codes in enumerate(data["masklet"]) if codes and None not in codes}
        images, first = number_frames(folder, masks, (count - 1) * args.ann_every, length)
        if first:
            from_1.append(folder)
        masks = {frame: sources for frame, sources in masks.items() if frame in images}
        if not masks and Path(f"{folder}.mp4").is_file():
            videos = shlex.quote(str(args.img_folder or args.gt_folder or root))
            raise utils.InputError(f"{path}: no frames in {folder}/; write those of all videos: python "
                                   f"train_sam2.py --extract-frames {videos} {videos} --rate {args.ann_every}")
        if not masks:
            raise utils.InputError(f"{path}: neither {folder}.mp4 nor frames in {folder}/ are there; add "
                                   "them, or give --img-folder")
        left_out += count - len(masks)
        yield name, images, masks
    if any(path.name.endswith("_auto.json") for path in jsons.values()):
        print("note: no *_manual.json is there: the masks are those of *_auto.json")
    if from_1:
        print(f"note: the frames of {len(from_1)} videos are numbered from 1, such as {from_1[0]}: their "
              "first image is taken for the video's frame 0")
    if left_out:
        print(f"note: {left_out} frames have no image, or an object that was not annotated, and are left out")


def number_frames(folder, masks, last, length):
    """Returns {frame: image} of a folder of numbered images, and the first number: 0 or 1.

    masks: a dict by frame; last: the last frame that may have some; length: of the video, or 0 if
    unknown. InputError if the names cannot be the numbers of the video's frames.
    """
    paths = utils.list_images(folder) if folder.is_dir() else {}
    images = {int(stem): path for stem, path in paths.items() if stem.isdecimal()}
    if not images:
        return {}, 0
    first, final = min(images), max(images)
    named, in_a_row = f"{folder}: frames {first} to {final}", len(images) == final - first + 1
    if in_a_row and 1 < len(images) <= last:
        raise utils.InputError(f"{named}, one by one, but masks up to frame {last}; name them by their "
                               "number in the video, or give --ann-every 1 if these are those with masks")
    if first == 1:
        whole = final == length if length else in_a_row
        sparse = not any(frame in images for frame in masks) and final <= (length or final)
        if whole or sparse:
            return {number - 1: path for number, path in images.items()}, 1
    allowed = length - 1 if first else length + 1  # a decoder may find a few frames more
    if length and (final > allowed or first == 1 and in_a_row):
        raise utils.InputError(f"{named}, but the video's are 0 to {length - 1}; name them by their number "
                               "in the video")
    return images, 0


def find_jsons(folder):
    """Returns {video: path} of SA-V's jsons in a folder or its folders: manual ones, else auto."""
    for kind in ("_manual.json", "_auto.json"):
        for pattern in (f"*{kind}", f"*/*{kind}"):
            if paths := sorted(Path(folder).glob(pattern)):
                return {path.name.removesuffix(kind): path for path in paths}
    return {}


def find_videos(root, args, list_name):
    """Yields JPEGImages/VIDEO/FRAME.jpg with Annotations/VIDEO/FRAME.png or /OBJECT/FRAME.png."""
    images_root = Path(args.img_folder or find_folder(root, "JPEGImages", "--img-folder"))
    masks_root = Path(args.gt_folder or find_folder(root, "Annotations", "--gt-folder"))
    if not images_root.is_dir():
        raise utils.InputError(f"{images_root}: no such folder; give another --img-folder")
    names = select(list_name, root, sorted(path.name for path in images_root.iterdir()
                                           if path.is_dir() and path.name[0] != "."))
    if not names:
        raise utils.InputError(f"{images_root}: no folders; put the frames of each video into one")
    unlabelled, void = Counter(), []
    for name in tqdm(names, "reading", leave=False, disable=utils.hide_bar()):
        images, masks = utils.list_images(images_root / name), find_masks(masks_root / name)
        check_pairs(images_root / name, images, masks)
        if len(images) > len(masks):
            unlabelled[name] = len(images) - len(masks)
        if not masks:
            raise utils.InputError(f"{masks_root / name}: no masks; add them, or leave the video out of the list")
        ids = first_ids(tuple(path for sources in masks.values() for object_id, path in sources
                              if object_id == IDS))
        if ids - {VOID_ID}:  # not masks of 0 and 255 alone
            masks = {frame: ((IDS_AND_VOID, sources[0][1]),) for frame, sources in masks.items()}
            if VOID_ID in ids:
                void.append(name)
        yield name, images, masks
    if void:
        print(f"note: 255 beside other ids is void in the masks of {len(void)} videos, such as "
              f"{void[0]}; if it is an object there, give it another id; if its edges are grey, "
              "make them 0 or 255")
    if unlabelled:
        print(f"note: {unlabelled.total()} frames of {len(unlabelled)} videos have no annotation and are "
              f"left out, such as of {unlabelled.most_common(1)[0][0]}")


def check_pairs(folder, images, masks):
    """Checks that each frame with masks has an image in folder; images, masks: dicts by frame."""
    missing = [frame for frame in masks if frame not in images]
    if missing:
        remedy = "add it or remove this mask"
        names, mask_names = sorted(images, key=by_number), [*masks]
        if images and (names[0] != mask_names[0] or len(images) == len(masks)):
            remedy = (f"its images are {names[0]} to {names[-1]}, the masks {mask_names[0]} to "
                      f"{mask_names[-1]}: give both the same numbers")
        raise utils.InputError(f"{masks[missing[0]][0][1]}: {folder} has no frame {missing[0]}; {remedy}")


def find_folder(data_path, name, option):
    """Returns DATA_PATH/NAME, or DAVIS' folder of one resolution in it."""
    for sub in ("480p", "Full-Resolution", ""):
        if Path(data_path, name, sub).is_dir():
            return Path(data_path, name, sub)
    raise utils.InputError(f"{Path(data_path, name)}: no such folder; give --data-path one that has it or "
                           f"another layout (see --help), or {option}")


def find_masks(folder):
    """Returns, in order, {frame: ((IDS, path),)} of ids, or {frame: ((1, path), ...)} of folders."""
    if not folder.is_dir():
        return {}
    masks = {stem: ((IDS, path),) for stem, path in utils.list_images(folder).items()}
    objects = sorted(filter(Path.is_dir, folder.glob("[!.]*")), key=lambda path: by_number(path.name))
    named, by_object = all(path.name.isdecimal() and int(path.name) for path in objects), {}
    for k, path in enumerate(objects, 1):
        object_id = int(path.name) if named else k
        for stem, file in utils.list_images(path).items():
            by_object[stem] = (*by_object.get(stem, ()), (object_id, file))
    if masks and by_object.keys() - masks.keys():
        raise utils.InputError(f"{folder}: holds masks and folders of masks, such as {objects[0].name}; "
                               "keep either one mask per frame, or one folder per object")
    found = masks or by_object
    return {frame: found[frame] for frame in sorted(found, key=by_number)}


@functools.lru_cache(maxsize=None)
def first_ids(paths):
    """Returns the ids, without 0, of a video's masks, as far as the first that has another than 255.

    Stops before 16-bit masks, in which 255 is an id like any other.
    """
    ids = set()
    for path in paths:
        with suppress(utils.InputError):  # raised where the mask is used
            mask = utils.read_mask(path)
            if mask.itemsize > 1:
                break
            ids |= {*np.unique(mask).tolist()} - {0}
        if ids - {VOID_ID}:
            break
    return ids


def by_number(name):
    """Returns a sort key by which frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def select(list_name, root, known):
    """Returns all known names, or those in a list: a file, or NAME of ROOT/ImageSets/NAME.txt."""
    if not list_name:
        return [*known]
    folders = [Path(root, "ImageSets", sub) for sub in ("", "2017", "Segmentation")]
    paths = [Path(list_name), *(folder / f"{list_name}.txt" for folder in folders)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise utils.InputError(f"{list_name}: no such list, nor {paths[1]}; write one with one video per line")
    names = utils.read_lines(path)
    if not names:
        raise utils.InputError(f"{path}: lists nothing; write one video per line")
    known, chosen = {utils.nfc(name): name for name in known}, {}
    for line in map(utils.nfc, names):  # as list_ids of train_deeplabv3.py
        readings = (line, line.strip(), re.sub(r"(?<!\s)\s+-?[01]$", "", line.strip()))
        name = next((text for text in readings if text in known), readings[1])
        chosen[known.get(name, name)] = True
    return [*chosen]


def check_item(frame, whole):
    """Returns whether there is an object; if not `whole`, True if sizes agree. InputError if bad."""
    image_source, sources, first = frame
    size = utils.image_size(first)[::-1]
    if whole:
        return bool(read_frame(image_source, sources, size)[2][:-1].any())
    for source in (image_source, *(source for _, source in sources)):
        if not isinstance(source, JsonFrame):
            check_size(source, utils.image_size(source)[::-1], size)
    return True


def keep_usable(items, part, num_frames, args):
    """Returns the items that have a clip of num_frames which begins with an object; reports others.

    A frame whose pixels the start does not read counts as one with an object.
    """
    enough, kept = [item for item in items if item.still or len(item.images) >= num_frames], []
    left_out = Counter({f"videos have fewer than {num_frames} frames": len(items) - len(enough)})
    if part == "training":
        remedy = "give fewer --num-frames or a smaller --stride"
        late = f"videos show objects only where no clip of {num_frames} frames begins ({remedy})"
    else:
        remedy = "give others by --val-set or --val-path"
        late = "videos show objects only on their last two frames, which are not scored,"
    frames = [(image, mask, item.images[0]) for item in enough
              for image, mask in zip(item.images, item.masks)]
    found = iter(utils.check_items(check_item, frames, args))
    for item in enough:
        shown, span = [next(found) for _ in item.images], 1 if item.still else num_frames
        firsts = shown[:len(shown) - span + 1]
        if part == "training" and args.reverse_time_prob:
            firsts += shown[span - 1:]
        if any(firsts):
            kept.append(item)
        else:
            left_out[late if any(shown) else "videos and images have no object"] += 1
    for reason, count in left_out.items():
        if count:
            print(f"note: {count} of {len(items)} {part} {reason} and are left out")
    if kept:
        return kept
    paths = " ".join(args.val_path if part == "validation" and args.val_path else args.data_path)
    if all(item.still for item in items):
        raise utils.InputError(f"{paths}: none of {len(items)} {part} images has an object; give images "
                               "whose masks are not empty")
    raise utils.InputError(f"{paths}: none of {len(items)} {part} videos has {num_frames} frames and an "
                           f"object on the first of them; look at them, or {remedy}")


def find_groups(args):
    """Yields, for each --data-path, the items to train on and those of --val-path or --val-set."""
    val_path_items = []
    for source, path in enumerate(args.val_path or []):
        val_path_items += find_items(path, args, args.val_set, source)
    for source, path in enumerate(args.data_path):
        items = find_items(path, args, args.train_set, source)
        given, excluded = val_path_items, []
        if args.val_set and not args.val_path:
            given = find_items(path, args, args.val_set, source)
            excluded = [] if args.train_set else given
        if args.excluded_videos_list_txt:
            excluded = excluded + find_items(path, args, args.excluded_videos_list_txt, source)
        excluded = {item.images for item in excluded}
        yield [item for item in items if item.images not in excluded], given


def create_loaders(args):
    """Returns training and validation loaders over checked videos and images."""
    if args.demo and not args.data_path:
        args.data_path = [utils.draw_demo("clips", Path(args.output_dir, "data"), 60)]
    if not args.data_path and not (args.img_folder and args.gt_folder):
        raise utils.InputError("--data-path: give the folder that holds JPEGImages/ and Annotations/, or --demo")
    args.data_path = args.data_path or [str(Path(args.img_folder).parent)]
    check_mix(args)
    train_items, val_items, groups = [], [], [*find_groups(args)]
    if args.split:  # one list for the items of all --data-path
        groups = [([item for items, _ in groups for item in items], groups[0][1])]
    for items, given in groups:
        if given and args.test_only and not args.overfit:
            items, given = [], given[:args.limit]  # a test needs no training items
        else:
            items, given = utils.split_items(items, args, given or None)
        train_items += items
        val_items = given if args.val_path else val_items + given
    if not args.test_only:
        span = (args.num_frames - 1) * args.stride + 1
        train_items = keep_usable(train_items, "training", span, args)
    val_items = keep_usable(val_items, "validation", 3, args)  # the first and last frame do not count
    for source, path in enumerate(args.data_path):
        if args.mix and not args.test_only and not any(item.source == source for item in train_items):
            raise utils.InputError(f"{path}: nothing of it is left to train on, but --mix gives it a share")
    train_set = VideoDataset(train_items, args, train=True, augment=not args.overfit)
    val_set = VideoDataset(val_items, args, train=False, augment=False)
    batches = MixSampler(train_items, args)
    train_loader = utils.create_loader(train_set, args, shuffle=True, batches=batches)
    return train_loader, utils.create_loader(val_set, args, shuffle=False, batch_size=1)


def check_mix(args):
    """Checks that the options of several data sets fit --data-path."""
    paths = len(args.data_path)
    several = args.multiplier if len(args.multiplier) > 1 else None  # a single one is for all
    for option, numbers in (("--mix", args.mix), ("--multiplier", several)):
        if numbers and len(numbers) != paths:
            raise utils.InputError(f"{option}: {len(numbers)} numbers for {paths} --data-path; give one for each")
    if args.split and (args.val_set or args.train_set or args.val_path):
        raise utils.InputError("--split: takes the place of --train-set, --val-set and --val-path; give "
                               "one or the other")
    if paths > 1 and (args.img_folder or args.gt_folder):
        raise utils.InputError("--img-folder, --gt-folder: are of a single --data-path; leave them out")


def sanity_check(train_set, val_set, args):
    """Prints what is in the data and draws what training sees; returns {part: items}."""
    for part, dataset in (("train", train_set), ("val", val_set)):
        if not dataset.items:  # of a test
            continue
        sizes, objects, lengths, shares = Counter(), [], [], []
        for item in dataset.items:
            size, seen = utils.image_size(item.images[0])[::-1], set()
            for image_source, sources in zip(item.images, item.masks):
                _, object_ids, masks = read_frame(image_source, sources, size)
                areas = dict(zip(object_ids, masks.mean((1, 2)).tolist()))
                seen |= {object_id for object_id, area in areas.items() if area}
                shares += [area for area in areas.values() if area]
            sizes[f"{size[1]}x{size[0]}"] += 1
            objects.append(len(seen))
            lengths.append(len(item.images))
        frames = np.dot(objects, lengths)  # of the objects' videos
        absent = 1 - len(shares) / frames
        common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
        print(f"{part}: {len(dataset.items)} videos and images, {common}, {min(lengths)} to "
              f"{max(lengths)} frames")
        print(f"  {sum(objects)} objects, {min(objects)} to {max(objects)} per video, absent in "
              f"{absent:.1%} of their frames; share of the image {min(shares):.3%} to "
              f"{max(shares):.3%}, half below {np.median(shares):.3%}")
        utils.note_small_objects(np.sqrt(shares), args.image_size)
    rows, count = {}, len(train_set.items)
    for index in np.linspace(0, count - 1, min(8, count)).astype(int).tolist():  # of all data sets
        frames = paint_clip(train_set[0, index][0])
        blank = [np.full_like(frames[0], 255)] * (args.num_frames - len(frames))
        rows[train_set.items[index].name] = frames + blank
    if rows:
        path = Path(args.output_dir, "sanity_check.png")
        legend = {"border: prompted frame; inside: box": (255, 255, 0), "click on the object": (0, 255, 0),
                  "border: frame with correcting clicks; dot: click on the background": (255, 0, 0)}
        utils.save_panel(path, rows, [f"frame {t + 1}" for t in range(args.num_frames)], legend)
        print(f"wrote {path}")
    return {"train": count, "val": len(val_set.items)}


def paint_clip(clip):
    """Returns the frames of a training clip with masks and prompts; prompted ones have a border."""
    painted = []
    ids = torch.arange(1, clip.masks.shape[1] + 1)[:, None, None]
    for t, (image, masks) in enumerate(zip(clip.images, clip.masks)):
        image = np.ascontiguousarray(image.permute(1, 2, 0))
        image = utils.overlay(image, (masks * ids).amax(0).numpy())
        size, side = max(2, len(image) // 100), len(image) - 1
        if t in clip.prompts:
            cv2.rectangle(image, (0, 0), (side, side), (255, 255, 0), size)
            for coords, labels in zip(*clip.prompts[t].values()):  # of each object, if not masks
                coords, labels = coords.int().tolist(), labels.tolist()
                if labels == [2, 3]:
                    cv2.rectangle(image, *coords, (255, 255, 0), max(1, size // 2))
                else:
                    colour = (0, 255, 0) if labels[0] else (255, 0, 0)
                    cv2.circle(image, coords[0], 2 * size, colour, -1)
        elif t in clip.corrected:
            cv2.rectangle(image, (0, 0), (side, side), (255, 0, 0), size)
        painted.append(image)
    return painted


# --- Model ---

def create_model(args, checkpoint=None):
    """Returns the net, with weights of checkpoint or --weights, and the arguments to rebuild it."""
    arch = {"model": args.model, "image_size": args.image_size}
    model = NETS[args.model](  # the last two as in the official predictors
        args.image_size, drop_path_rate=args.drop_path, memory_dropout=args.dropout,
        dynamic_multimask_via_stability=True, binarize_mask_from_pts_for_mem_enc=True)
    if checkpoint:
        check_net(checkpoint, f"--resume {args.resume}", {"net": "sam2", **arch})
        load_weights(model, checkpoint["model"], f"--resume {args.resume}")
    elif args.weights != "none":
        path = official_file(args.weights, WEIGHTS)
        state = read_weights(path, {"net": "sam2", **arch}, free=["image_size"])
        load_weights(model, state, path)
    else:  # the defaults suit trained weights; from scratch, memory would learn very slowly
        for block in model.memory_encoder.fuser.layers:
            nn.init.ones_(block.gamma)
        # A mask gets no gradient while its object is taken for absent: start with all present
        nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 2.0)
    for part in frozen_parts(model, args):
        part.requires_grad_(False)
    model.image_encoder.trunk.gradient_checkpointing = args.gradient_checkpointing
    return model, arch


def frozen_parts(model, args):
    """Returns the modules and parameters that --freeze names."""
    return [getattr(model, name) for part in args.freeze for name in PARTS[part]]


def encode(model, images, dtype):
    """Images (V, 3, S, S) uint8 -> three maps (H*W, V, C), their position codes, sizes [(H, W)]."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return model._prepare_backbone_features(model.forward_image(normalize(images)))[1:]


def track_clips(model, backbone, videos, clip, args, dtype):
    """Tracks N objects through a clip, prompted and corrected as it says: yields frame, decoder passes.

    backbone: of encode, for the frames of one or several videos, T each, video after video; videos
    (N,): the index of each object's. A pass is logits (N, M, S/4, S/4), or (N, 1, S, S) of a mask
    prompt, IoU (N, M), score (N, 1).
    """
    maps, positions, sizes = backbone
    num_frames = len(clip.masks)
    bank = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    order = [*clip.prompts, *(t for t in range(num_frames) if t not in clip.prompts)]

    def run(function, *inputs):
        with torch.autocast(videos.device.type, dtype, enabled=dtype is not None):
            if args.gradient_checkpointing:
                return checkpoint(function, *inputs, use_reentrant=False)
            return function(*inputs)

    for t in order:
        images = videos * num_frames + t
        feats, codes = [x[:, images] for x in maps], [positions[-1][:, images]]
        prompt = clip.prompts.get(t)
        points, mask = prompt or None, clip.masks[t][:, None] if prompt == {} else None
        # A copy: with checkpointing the backward pass must not see memories that came later
        memory = {key: dict(outputs) for key, outputs in bank.items()}
        _, outputs, finer_maps, features = run(
            model._track_step, t, prompt is not None, feats, codes, sizes, points, mask, memory,
            num_frames)
        low_res, full_size, iou, best_low_res, best_full_size, pointer, score = outputs
        # A mask that was given as a prompt is exact at full size alone
        passes = [(low_res if mask is None else full_size, iou, score)]
        for draws in clip.draws[t] if t in clip.corrected else ():
            pred = best_full_size[:, 0].detach() > 0
            void = torch.zeros_like(pred) if clip.void is None else clip.void[t]
            coords, labels = next_clicks(clip.masks[t], pred, draws, void)
            if points is not None:
                coords = torch.cat([points["point_coords"], coords], 1)
                labels = torch.cat([points["point_labels"], labels], 1)
            points = {"point_coords": coords, "point_labels": labels}
            multimask = model._use_multimask(prompt is not None, points)
            low_res, _, iou, best_low_res, best_full_size, pointer, score = run(
                model._forward_sam_heads, features, points, best_low_res, finer_maps, multimask)
            passes.append((low_res, iou, score))
        yield t, passes
        if t == order[-1]:
            return
        stored, codes = run(
            model._encode_new_memory, feats, sizes, best_full_size, score, points is not None)
        as_prompted = prompt is not None or args.corrected_as_prompted and t in clip.corrected
        bank["cond_frame_outputs" if as_prompted else "non_cond_frame_outputs"][t] = {
            "obj_ptr": pointer, "maskmem_features": stored, "maskmem_pos_enc": codes}


def group_clips(clips, device):
    """Joins clips with like prompts on the same frames: yields (videos, clip) for track_clips."""
    groups = {}
    for i, clip in enumerate(clips):
        kinds = [(t, tuple(points["point_labels"].shape[1:]) if points else ())
                 for t, points in clip.prompts.items()]
        # A tuple again: torch 2.10 makes a list of it where it pins a batch for CUDA
        groups.setdefault((*kinds, tuple(clip.corrected)), []).append(i)
    for members in groups.values():
        chosen = [clips[i] for i in members]
        videos = torch.cat([torch.full((clip.masks.shape[1],), i) for i, clip in zip(members, chosen)])
        prompts = {t: {key: torch.cat([clip.prompts[t][key] for clip in chosen]).to(device)
                       for key in points}
                   for t, points in chosen[0].prompts.items()}
        void = None
        if any(clip.void is not None for clip in chosen):
            void = [torch.zeros_like(clip.masks) if clip.void is None else clip.void for clip in chosen]
            void = torch.cat(void, 1).to(device)
        yield videos.to(device), Clip(
            None, torch.cat([clip.masks for clip in chosen], 1).to(device), prompts,
            chosen[0].corrected, torch.cat([clip.draws for clip in chosen], 2).to(device), void)


# --- Loss ---

def criterion(low_res, ious, score, masks, args, void=None):
    """Returns focal, Dice, IoU and score loss (4,) of a decoder pass, each summed over N objects.

    Logits (N, M, S/4, S/4) or of full size, predicted ious (N, M), score (N, 1), masks (N, S, S)
    bool. Masks are compared at full size. Of M masks the one with the least loss is trained; of an
    absent object only the score. The backward pass computes the large tensors again. void (N, S, S)
    bool: pixels that do not count.
    """
    low_res, ious, score = low_res.float(), ious.float(), score[:, 0].float()
    present = masks.flatten(1).any(1)
    counts = present.float() if args.pred_obj_scores else torch.ones_like(score)
    with torch.no_grad():
        losses = [mask_losses(low_res[:, m], masks, args, void) for m in range(low_res.shape[1])]
        focal, dice, true_ious = (torch.stack(part, 1) for part in zip(*losses))  # (N, M)
        best = (args.focal_weight * focal + args.dice_weight * dice).argmin(1)
    rows = torch.arange(len(masks), device=masks.device)
    focal, dice, _ = checkpoint(mask_losses, low_res[rows, best], masks, args, void, use_reentrant=False)
    error = ious - true_ious
    error = error.abs() if args.iou_use_l1_loss else error.square()
    error = error.mean(1) if args.supervise_all_iou else error[rows, best]
    wrong = torch.zeros_like(score)
    if args.pred_obj_scores:
        wrong = focal_loss(score, present.float(), args.focal_alpha_obj_score,
                           args.focal_gamma_obj_score)
    return torch.stack([(focal * counts).sum(), (dice * counts).sum(), (error * counts).sum(),
                        wrong.sum()])


def mask_losses(low_res, masks, args, void=None):
    """Returns focal loss (mean of pixels), Dice loss and IoU, each (N,), of logits (N, H, W)."""
    logits = F.interpolate(low_res[:, None], masks.shape[1:], mode="bilinear",
                           align_corners=False)[:, 0]
    if void is not None:  # contributes nothing to any of the three
        logits = logits.masked_fill(void, -100)
    target, pred = masks.float(), logits.detach() > 0
    focal = focal_loss(logits, target, args.focal_alpha, args.focal_gamma).mean((1, 2))
    prob = logits.sigmoid()
    overlap, total = (prob * target).sum((1, 2)), prob.sum((1, 2)) + target.sum((1, 2))
    iou = (pred & masks).sum((1, 2)) / (pred | masks).sum((1, 2)).clamp(min=1)
    return focal, 1 - (2 * overlap + 1) / (total + 1), iou


def focal_loss(logits, target, alpha, gamma):
    """Returns each logit's focal loss (Lin et al. 2017): target 1 weighs alpha, 0 the rest."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if gamma:
        loss = loss * (logits.sigmoid() - target).abs() ** gamma
    if alpha >= 0:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss


# --- Evaluation ---

@torch.no_grad()
def evaluate(model, loader, run, args):
    """Returns means over all objects of all videos, and over those of all images, in [0, 1].

    Videos: J, F and their mean as DAVIS defines them (Perazzi et al. 2016). val_jf, val_j, val_f:
    each object's mask on its first frame is given; val_click_...: a click in its middle instead;
    copied_...: that mask is copied to all frames, the baseline. Images: IoU by box and by click.
    per_video: the same of each video or image: {name: {"objects": 2, "val_jf": ...}}.
    run.tracked keeps the masks of the videos that draw_samples shows, so that they are tracked once.
    """
    model.eval()
    items, found, run.tracked = loader.dataset.items, {}, {}
    shown = sample_videos(loader.dataset)
    for images, masks, (index,) in utils.until_stopped(loader, "validating", run.device):
        objects = masks[:-1] if items[index].still else masks % VOID_ID
        if objects.any():  # a large data set may hold items without, which the start has not read
            if items[index].still:
                found[index] = image_scores(model, images, masks, run)
                continue
            found[index], by_mask = video_scores(model, images, masks, run)
            if index in shown:
                run.tracked[index] = by_mask
    found = utils.merge_over_ranks(found)
    figures, per_video = {}, {}
    for names, still in ((FIGURES, False), (IMAGE_FIGURES, True)):
        none = torch.zeros(0, len(names), dtype=torch.float64)
        chosen = [(item.name, found.get(i, none)) for i, item in enumerate(items) if item.still == still]
        if chosen:
            total = torch.stack([rows.sum(0) for _, rows in chosen]).sum(0)
            figures |= zip(names, (total / sum(len(rows) for _, rows in chosen)).tolist())
        for name, rows in chosen:
            means = dict(zip(names, (rows.sum(0) / len(rows)).tolist()))
            per_video[name] = {"objects": len(rows), **means}
    return {**figures, "per_video": per_video}


def video_scores(model, images, ids, run):
    """Images (T, 3, S, S) uint8, ids (T, H, W) -> FIGURES of N objects (N, 9) float64; ids by mask.

    Means over an object's frames without its first, which is given, and the video's last, as DAVIS
    has it: one that first appears on the last two has no row. Void pixels are left out.
    """
    firsts, rows = first_frames(ids), []
    by_mask, by_click = track_video(model, images, ids, firsts, run)  # ids (T, H, W) each
    for k, first in enumerate(firsts, 1):
        frames, figures = range(first + 1, len(ids) - 1), []
        if not frames:
            continue
        copied = ids[first].expand_as(ids)  # the baseline
        for pred in (by_mask, by_click, copied):
            pairs = [(((pred[t] == k) & (ids[t] != VOID_ID)).numpy(), (ids[t] == k).numpy())
                     for t in frames]
            j = float(np.mean([region_similarity(*pair) for pair in pairs]))
            f = float(np.mean([contour_accuracy(*pair) for pair in pairs]))
            figures += [(j + f) / 2, j, f]
        rows.append(figures)
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(FIGURES)), by_mask


def image_scores(model, images, masks, run):
    """Image (1, 3, S, S) uint8, masks (N + 1, H, W) bool -> IoU by box, by click: (N, 2) float64.

    The last mask is void: those pixels are left out.
    """
    rows, masks, void = [], masks[:-1], masks[-1]
    for prompt in (box_prompt, click_prompt):
        pred = predict_image(model, images, masks, prompt, run) & ~void
        rows.append((pred & masks).sum((1, 2)) / (pred | masks).sum((1, 2)).double())
    return torch.stack(rows, 1)


def predict_image(model, images, masks, prompt, run):
    """Image (1, 3, S, S) uint8, masks (N, H, W) bool -> masks predicted from prompt(mask, scale)."""
    size = masks.shape[1:]
    scale = model.image_size / torch.tensor(size[::-1])
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        prompts = [{0: prompt(mask, scale)} for mask in masks]
        ((_, out),) = model.propagate(images, prompts)
    return torch.cat([enlarge(logits, size)[:, 0].cpu() > 0
                      for logits in out["pred_masks"].float().split(16)])  # 16 at a time, for memory


def box_prompt(mask, scale):
    """Returns the box of a mask (H, W) bool as a prompt, in pixels of the net's square."""
    corners = masks_to_boxes(mask[None]).view(2, 2) + torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # edges
    return {"point_coords": corners * scale - 0.5, "point_labels": torch.tensor([2, 3])}


def click_prompt(mask, scale):
    """Returns a click in the middle of a mask (H, W) bool as a prompt."""
    return {"point_coords": (middle(mask)[None] + 0.5) * scale - 0.5,
            "point_labels": torch.tensor([1])}


def first_frames(ids):
    """Returns the first frame of each object in ids (T, H, W), 1 to N or void."""
    present = torch.stack([torch.bincount(frame.flatten().int(), minlength=256) > 0 for frame in ids])
    present = present[:, 1:VOID_ID]
    return present[:, present.any(0)].int().argmax(0).tolist()


def track_video(model, images, ids, firsts, run):
    """Tracks objects 1 to N of ids (T, H, W) from their first frames -> (2, T, H, W): mask, click."""
    by_mask, by_click = [], []
    for k, first in enumerate(firsts, 1):
        mask = ids[first] == k
        by_mask.append({first: {"mask_inputs": resize_mask(mask, model.image_size)}})
        by_click.append({first: click_prompt(mask, model.image_size / torch.tensor(mask.shape[::-1]))})
    labels = torch.zeros(2, *ids.shape, dtype=torch.uint8)
    if not firsts:  # no object
        return labels
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        for t, out in model.propagate(images, by_mask + by_click):
            masks = enlarge(out["pred_masks"].float(), ids.shape[1:])
            for result, logits in zip(labels, masks[:, 0].split(len(firsts))):
                highest, index = logits.max(0)
                result[t] = torch.where(highest > 0, index + 1, 0).byte().cpu()
    return labels


def region_similarity(pred, true):
    """Returns J: intersection over union of masks (H, W) bool; 1 if both are empty."""
    union = np.count_nonzero(pred | true)
    return np.count_nonzero(pred & true) / union if union else 1.0


def contour_accuracy(pred, true):
    """Returns F: boundaries match within 0.008 of the diagonal, rounded up; 1 if both are empty."""
    tolerance = math.ceil(0.008 * math.hypot(*true.shape))
    lines = boundary(pred), boundary(true)
    if not lines[0].any() or not lines[1].any():
        return float(not lines[0].any() and not lines[1].any())
    precision, recall = [near(line, other, tolerance) for line, other in (lines, lines[::-1])]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask):
    """Returns DAVIS' boundary (H, W): pixels that differ from the next to the right, below or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])


def near(line, other, tolerance):
    """Returns the share of the line's pixels within `tolerance` pixels of the other line."""
    distance = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.count_nonzero(distance[line] <= tolerance + 1e-3) / np.count_nonzero(line)


def depth(mask):
    """Returns each pixel's distance to the nearest one outside a mask (H, W) bool; 0 outside."""
    padded = np.pad(np.asarray(mask, np.uint8), 1)
    return torch.from_numpy(cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1])


def middle(mask):
    """Returns (x, y) float32 of the place in a mask (H, W) bool that is farthest from its edge."""
    distance = depth(mask)
    y, x = divmod(distance.argmax().item(), distance.shape[1])
    return torch.tensor([x, y], dtype=torch.float32)


def print_table(columns):
    """Prints {title: figures of evaluate}, one column per title, in percent."""
    print(" " * 22 + "".join(f"{title:>16}" for title in columns))
    for name in FIGURES + IMAGE_FIGURES:
        if all(name in figures for figures in columns.values()):
            values = [f"{100 * figures[name]:16.2f}" for figures in columns.values()]
            print(f"  {name:20}" + "".join(values))


def write_videos(run, figures):
    """Writes val_videos.csv: the figures of each video and image."""
    if run.rank:
        return
    columns = [name for name in FIGURES + IMAGE_FIGURES if name in figures]
    with open(run.folder / "val_videos.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["video", "objects", *columns])
        writer.writeheader()
        for name, row in figures["per_video"].items():
            writer.writerow({"video": name, **{key: round(row[key], 4) for key in row}})


def sample_videos(dataset):
    """Returns the indices of the videos that val_samples.png shows."""
    return [i for i, item in enumerate(dataset.items) if not item.still][:3]


@torch.no_grad()
def draw_samples(model, dataset, run):
    """Draws val_samples.png: six frames of three videos: image, truth, prediction by mask.

    Without videos: the first four images, truth, predictions by boxes.
    """
    model.eval()
    rows = {}
    for index in sample_videos(dataset):
        item, (images, ids, _) = dataset.items[index], dataset[0, index]
        pred = run.tracked.get(index)
        if pred is None:  # another process has tracked it, or it shows no object
            pred = track_video(model, images, ids, first_frames(ids), run)[0]
        frames = np.linspace(0, len(item.images) - 1, 6).round().astype(int)
        shown = [utils.read_image(item.images[t]) for t in frames]
        rows[f"images {item.name}"] = shown
        for title, labels in (("truth", ids), ("prediction", pred)):
            rows[f"{title} {item.name}"] = [utils.overlay(image, labels[t].numpy())
                                            for image, t in zip(shown, frames)]
    titles = ["first", "1/5", "2/5", "3/5", "4/5", "last"]
    if not rows:
        titles = ["image", "truth", "prediction by boxes"]
        for index in range(min(4, len(dataset))):
            item, (inputs, masks, _) = dataset.items[index], dataset[0, index]
            masks = masks[:-1]
            pred = predict_image(model, inputs, masks, box_prompt, run)
            image, ids = utils.read_image(item.images[0]), torch.arange(1, len(masks) + 1) % 255
            rows[item.name] = [image, *(utils.overlay(image, (part * ids[:, None, None]).amax(0).numpy())
                                        for part in (masks, pred))]
    utils.save_panel(run.folder / "val_samples.png", rows, titles)


# --- Training ---

def create_optimizer(model, args):
    """Returns AdamW: no decay of biases and layer norms; the image encoder's first blocks learn slowest.

    As in the official training: its position codes are at --vision-lr, norms of maps are decayed.
    """
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    blocks, groups = len(model.image_encoder.trunk.blocks), {}
    for name, p in model.named_parameters():
        lr = args.lr
        if name.startswith("image_encoder."):
            lr = args.vision_lr
            block = re.match(r"image_encoder\.trunk\.(?:blocks\.(\d+)|patch_embed)\.", name)
            if block:  # layer 0 is the patch embedding, 1 the first block
                layer = int(block[1]) + 1 if block[1] else 0
                lr *= args.layer_decay ** (blocks + 1 - layer)
        decay = 0.0 if "bias" in name or id(p) in norms else args.weight_decay
        if p.requires_grad:
            groups.setdefault((lr, decay), []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "initial": lr, "weight_decay": decay}
         for (lr, decay), params in groups.items()], args.lr, fused=True)


def learning_rate(args, done):
    """Returns the share of the initial rate when `done` of the run is over: a cosine."""
    return args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer, args, done):
    """Sets the rates before each step."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * learning_rate(args, done)


def train_one_epoch(model, loader, optimizer, run, args):
    """Trains for one pass, or its rest; returns the unweighted losses per object and decoder pass."""
    model.train()
    for part in frozen_parts(model, args):
        if isinstance(part, nn.Module):
            part.eval()  # no dropout
    weights = torch.tensor([args.focal_weight, args.dice_weight, args.iou_weight, args.score_weight],
                           device=run.device)
    for batches in run.steps(loader):  # the --accumulate batches of one optimizer step
        step = run.progress["epoch"] * run.steps_per_epoch + run.progress["step"]
        set_learning_rate(optimizer, args, step / (args.epochs * run.steps_per_epoch))
        loss_sum, num_objects = 0.0, 0
        sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64)
        for clips, indices in batches:
            clips = [clip for clip, index in zip(clips, indices) if index >= 0]
            if not clips:  # they only fill up
                continue
            images = torch.cat([clip.images.to(run.device, non_blocking=run.pinned) for clip in clips])
            backbone, losses = encode(model, images, run.dtype), 0.0
            for videos, clip in group_clips(clips, run.device):
                for t, passes in track_clips(model, backbone, videos, clip, args, run.dtype):
                    for outputs in passes:
                        void = None if clip.void is None else clip.void[t]
                        losses = losses + criterion(*outputs, clip.masks[t], args, void)
                    sums[-1] += len(passes) * len(videos)
                num_objects += len(videos)
            loss = (weights * losses).sum()  # over objects, frames and passes
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            sums[:-1] += losses.detach().cpu()
        if args.world_size > 1:
            sums = utils.sum_over_ranks(sums.to(run.device)).cpu()
        if run.finish_gradient(optimizer, loss_sum, num_objects, args.clip_grad):  # mean over objects
            run.scaler.step(optimizer)
            run.progress["passes"] += sums
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
    *sums, count = run.progress["passes"].tolist()
    return {f"pass_{name}": value / (count or math.nan) for name, value in zip(LOSSES, sums)}


# --- Main ---

def main(args):
    """Trains as the options say; returns the last figures, those before training and the best."""
    if args.extract_frames:
        reader = utils.import_script("predict_video", "--extract-frames")
        return reader.extract_frames(*args.extract_frames, args)
    args.weights = args.weights or (args.model if args.model in WEIGHTS else "none")
    if args.image_size % 32:
        raise utils.InputError(f"--image-size {args.image_size}: must be a multiple of 32")
    run = utils.Run(args, net="sam2")  # joins torchrun's processes; seeds; picks device ...
    if args.deterministic and run.device.type == "cuda" and "image_encoder" not in args.freeze:
        raise utils.InputError("--deterministic: bicubic resizing of position codes has no deterministic "
                               "gradient on CUDA; leave it out, or --freeze image_encoder")
    train_loader, val_loader = create_loaders(args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    if args.sanity_check:
        return sanity_check(train_set, val_set, args)

    model, arch = create_model(args, run.checkpoint)
    model = model.to(run.device)
    run.describe(args.model, model, train_set, val_set)
    if args.test_only:
        run.check_test(same=["image_size"])
        figures = evaluate(model, val_loader, run, args)
        print_table({"test": figures})
        return figures

    if args.weights == "none" and not run.checkpoint and 10 * args.lr <= DEMO["lr"]:
        print(f"note: --lr {args.lr} suits official weights; from scratch --demo uses "
              f"--lr {DEMO['lr']} --vision-lr {DEMO['vision_lr']} --clip-grad {DEMO['clip_grad']}")
    optimizer = create_optimizer(model, args)
    sums = {"passes": torch.zeros(len(LOSSES) + 1, dtype=torch.float64)}
    progress = run.start(arch, train_set, val_set, sums, model=model, optimizer=optimizer)
    if args.compile:
        model.image_encoder.compile()

    figures = None
    best = "val_image_box_iou" if all(item.still for item in val_set.items) else "val_jf"
    with run.saved_when_stopped():  # SIGTERM, Ctrl-C
        if "before" not in progress:  # what the starting weights can do: fine-tuning's baseline
            progress["before"] = progress["after"] = evaluate(model, val_loader, run, args)
            run.is_best(progress["before"][best])
            run.save_best()
        print_table({"before": progress["before"]})
        while not run.is_over():    # --epochs, --early-stopping
            means = train_one_epoch(model, train_loader, optimizer, run, args)
            figures = evaluate(model, val_loader, run, args)
            values = {**figures, **means}
            shown = ["pass_focal", "pass_dice", "val_jf", "val_j", "val_f", "val_click_jf", *IMAGE_FIGURES]
            run.end_epoch(values, show=[name for name in shown if name in values])
            write_videos(run, figures)
            if run.is_best(figures[best]):
                progress["after"] = figures
                run.save_best()
            run.save_last()
            shown = ["val_jf", "val_click_jf", "copied_jf", *IMAGE_FIGURES]
            # Not loss and pass_focal: an object wrongly believed absent, logits -1024, hides all else
            run.plot_curves(["pass_dice", "pass_iou", "pass_score"],
                            [name for name in shown if name in figures])
            draw_samples(model, val_set, run)

    figures = figures or evaluate(model, val_loader, run, args)
    title, shown = f"best, epoch {progress['best_epoch']}", progress["after"]
    if not progress["best_epoch"]:  # none beat the start
        title, shown = f"last, epoch {progress['epoch']}", figures
    print_table({"before": progress["before"], title: shown})
    run.finish(best)
    if "copied_jf" in figures:
        print(f"the first frame's mask, copied: J&F {figures['copied_jf']:.4f}")
    return {**figures, "before": progress["before"], f"best_{best}": progress["best"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
