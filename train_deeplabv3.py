"""Train DeepLabV3 on a folder in PASCAL VOC layout.   Article: 【深度学习项目】语义分割-DeepLab网络

    python train_deeplabv3.py --demo
    python train_deeplabv3.py --data-path data --num-classes 20
    torchrun --nproc_per_node 2 train_deeplabv3.py --data-path data --num-classes 20

Data:   DATA_PATH/VOCdevkit/VOC2012/ with JPEGImages/ID.jpg, SegmentationClass/ID.png (0 background, 1 ... classes, 255
        void: in no loss and no figure), ImageSets/Segmentation/train.txt and val.txt (an ID a line), and, if you like,
        class_names.json ({"name": id}).
Writes: OUTPUT_DIR/best.pth (best val_miou), last.pth (for --resume), log.csv, curves.png, val_samples.png (image |
        truth | prediction), results*.txt (as the article), record_mAP.txt (figures of each class), args.json.
"""
import argparse
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import utils
from nets.deeplabv3 import BACKBONES, deeplabv3

VOID = 255
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
COCO_WEIGHTS = {  # of torchvision, 21 outputs, with the auxiliary head; a name ends in the start of its sha256
    "resnet50": "https://download.pytorch.org/models/deeplabv3_resnet50_coco-cd0a2569.pth",
    "resnet101": "https://download.pytorch.org/models/deeplabv3_resnet101_coco-586e9e4e.pth",
    "mobilenet_v3_large": "https://download.pytorch.org/models/deeplabv3_mobilenet_v3_large-fc3c493d.pth",
}
DEMO = {"backbone": "mobilenet_v3_large", "weights": "none", "num_classes": 3, "lr": 0.04, "epochs": 16,
        "batch_size": 8, "base_size": 96, "crop_size": 96, "workers": 0, "output_dir": "runs/train_deeplabv3_demo"}
RESUME_FREE = ["resume", "weights", "data_path", "output_dir", "overwrite", "epochs", "early_stopping", "save_every",
               "workers", "device"]  # may differ when a run is continued


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    add, flag = parser.add_argument, {"nargs": "?", "const": True, "default": False, "type": utils.switch}
    add("--data-path", help="folder that holds VOCdevkit/, or VOCdevkit itself")
    add("--demo", **flag, help="train on drawn data with small settings")
    add("--sanity-check", **flag, help="read the whole data set, print counts, write sanity_check.png, train nothing")
    add("--limit", type=utils.number(int, 1), help="use only the first N items of each split")
    add("--overfit", type=utils.number(int, 1), help="train and validate on the same N items, without augmentation")
    add("--output-dir", default="runs/train_deeplabv3", help="folder for checkpoints, log and pictures (%(default)s)")
    add("--overwrite", **flag, help="replace a former run in --output-dir")
    add("--weights", default="coco", help="start from: coco (official, fetched once), none or a path (%(default)s)")
    add("--resume", help="continue a run: auto (from last.pth if it is there) or a path")
    add("--save-every", type=utils.number(int, 0), default=0, metavar="N",
        help="save last.pth every N steps too, 0 at the end of epochs only (%(default)s)")
    add("--epochs", type=utils.number(int, 1), default=30, help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", type=utils.number(int, 1), default=4, help="items a batch and process (%(default)s)")
    add("--accumulate", type=utils.number(int, 1), default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", type=utils.number(float, 0), default=1e-4, help="initial learning rate (%(default)s)")
    add("--weight-decay", "--wd", type=utils.number(float, 0), default=1e-4, help="weight decay (%(default)s)")
    add("-j", "--workers", type=utils.number(int, 0), default=min(4, os.cpu_count()),
        help="loader processes, 0 for none (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=41,
        help="of all that is random: weights, order, augmentation (%(default)s)")
    add("--deterministic", **flag, help="same bits on CUDA too, slower")
    add("--test-only", **flag, help="evaluate --weights or --resume, train nothing")
    add("--compile", **flag, help="torch.compile the net")
    add("--early-stopping", type=int, default=-1, metavar="N",
        help="stop after N epochs without a better val_miou, -1 never (%(default)s)")

    add("--model", "--backbone", dest="backbone", choices=list(BACKBONES), default="resnet50", help="(%(default)s)")
    add("--aux", **{**flag, "default": True}, help="auxiliary head and its loss (%(default)s)")
    add("--freeze", choices=["none", "backbone"], default="none",
        help="keep the weights and the batch statistics of this part (%(default)s)")
    add("--num-classes", type=utils.number(int, 1, 254), default=20, help="background not counted (%(default)s)")
    add("--year", default="2012", help="of the folder VOCdevkit/VOC2012 (%(default)s)")
    add("--train-set", default="train", help="list in ImageSets/Segmentation to train on (%(default)s)")
    add("--val-set", default="val", help="list in ImageSets/Segmentation to validate on (%(default)s)")
    add("--base-size", type=utils.number(int, 32), default=520,
        help="shorter side in pixels: 0.5 to 2 times it in training, just it in validation (%(default)s)")
    add("--crop-size", type=utils.number(int, 32), default=480, help="side of training crops in pixels (%(default)s)")
    add("--momentum", type=utils.number(float, 0), default=0.9, help="of SGD (%(default)s)")
    add("--sync-bn", "--sync_bn", **flag, help="batch statistics over all processes (CUDA under torchrun)")
    add("--print-freq", action=utils.Obsolete, help="no effect: a bar shows every step, log.csv every epoch")
    add("--start-epoch", "--start_epoch", action=utils.Obsolete, help="no effect: --resume knows its epoch")
    add("--world-size", "--dist-url", dest="world_size", action=utils.Obsolete,
        help="no effect: give torchrun --nproc_per_node N, --nnodes, --rdzv-endpoint")
    return parser


# --- Data ---

class VOCSegmentation(torch.utils.data.Dataset):
    """[(epoch, index)] -> image (3, h, w) float32 normalised, label (H, W) uint8 of class ids and 255, index.

    In training both are scaled, flipped and cropped to (crop_size, crop_size); in validation the image has a shorter
    side of base_size and the label keeps the picture's own size. All that is random depends on (seed, epoch, index).
    """

    def __init__(self, items, args, train, augment):
        self.items, self.args, self.train, self.augment = items, args, train, augment

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key
        image, label = read_item(self.items[index], self.args.num_classes)
        image, label = torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label)
        if self.train:
            with utils.seeded(self.args.seed, epoch, index):
                image, label = scale_flip_crop(image, label[None], self.args, self.augment)
        else:
            image = resize(image, self.args.base_size)
        return normalize(image), label.squeeze(0), index


def resize(image, side):
    """Image (3, H, W) uint8 with its shorter side made `side` pixels."""
    return v2.functional.resize(image, scaled_size(image, side), antialias=True)


def scaled_size(image, side):
    """[height, width] of image (..., H, W) once its shorter side is `side`."""
    height, width = image.shape[-2:]
    return [max(side, round(length * side / min(height, width))) for length in (height, width)]


def scale_flip_crop(image, label, args, augment):
    """The article's augmentation: shorter side 0.5 to 2 times base_size, flipped half the time, a crop anywhere.

    What a small picture leaves of the crop is filled with ImageNet's mean colour (article: black) and void.
    """
    low, high = (args.base_size // 2, 2 * args.base_size) if augment else (args.base_size, args.base_size)
    size = scaled_size(image, torch.randint(low, high + 1, ()).item())
    image = v2.functional.resize(image, size, antialias=True)
    label = v2.functional.resize(label, size, InterpolationMode.NEAREST_EXACT)  # "nearest" would be half a pixel off
    if augment and torch.rand(()) < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    right, bottom = [max(0, args.crop_size - length) for length in (size[1], size[0])]
    image = v2.functional.pad(image, [0, 0, right, bottom], fill=[124, 116, 104])
    label = v2.functional.pad(label, [0, 0, right, bottom], fill=VOID)
    top, left = [torch.randint(length - args.crop_size + 1, ()).item() if augment else (length - args.crop_size) // 2
                 for length in image.shape[-2:]]
    crop = (..., slice(top, top + args.crop_size), slice(left, left + args.crop_size))
    return image[crop], label[crop]


def normalize(image, channels=3):
    """RGB uint8 (3, H, W) -> float32 (channels, H, W) by ImageNet's statistics."""
    image = image.as_subclass(torch.Tensor) / 255
    image = v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return image if channels == 3 else image.mean(0, keepdim=True)


def read_item(item, num_classes):
    """(name, image path, label path) -> image (H, W, 3) uint8 RGB, label (H, W) uint8 in 0..num_classes, 255."""
    _, image_path, path = item
    image, label = utils.read_image(image_path), utils.read_mask(path).astype(np.int64)
    if label.shape != image.shape[:2]:
        raise utils.InputError(f"{path}: {label.shape[1]}x{label.shape[0]} pixels, but {image_path} has "
                               f"{image.shape[1]}x{image.shape[0]}; save both at one size")
    unfit = label[(label != VOID) & ((label < 0) | (label > num_classes))]
    if unfit.size:
        raise utils.InputError(f"{path}: label {unfit[0]} is outside 0..{num_classes} (and 255, void); give "
                               "--num-classes without the background, or correct the mask")
    return image, label.astype(np.uint8)


def find_root(data_path, year):
    """The folder VOC2012 in data_path or its VOCdevkit."""
    for root in (Path(data_path, "VOCdevkit", f"VOC{year}"), Path(data_path, f"VOC{year}")):
        if root.is_dir():
            return root
    raise utils.InputError(f"{data_path}: holds neither VOCdevkit/VOC{year} nor VOC{year}; give --data-path the folder "
                           "that holds VOCdevkit, or another --year")


def find_items(root, name):
    """[(ID, image path, label path)] of the list ImageSets/Segmentation/NAME.txt, in its order; or InputError."""
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise utils.InputError(f"{path}: no such list; write one with an ID a line") from None
    ids = [line.split()[0] for line in lines if line.strip()]  # VOC's lists of one class have a second column
    if not ids:
        raise utils.InputError(f"{path}: lists nothing; write an ID a line")
    found, set_of_ids = [], set(ids)
    for folder in (root / "JPEGImages", root / "SegmentationClass"):
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        files = [folder / name for name in names if Path(name).suffix.lower() in utils.PICTURES and name[0] != "."]
        found.append({file.stem: file for file in files})
        for one in ids:
            if one not in found[-1]:
                raise utils.InputError(f"{folder}/{one}: no such picture, but {path} lists it; add it or drop the line "
                                       "(IDs have no extension)")
        twice = [file for file in files if file.stem in set_of_ids and found[-1][file.stem] != file]
        if twice:
            raise utils.InputError(f"{twice[0]}: {found[-1][twice[0].stem].name} is there too; remove one")
    twice = [one for one, count in Counter(ids).items() if count > 1]
    if twice:
        raise utils.InputError(f"{path}: lists {twice[0]} twice; take one out")
    return [(one, found[0][one], found[1][one]) for one in ids]


def find_classes(root, num_classes):
    """Names of the classes 0..num_classes: of class_names.json in root or beside VOCdevkit, of VOC, or numbers."""
    for path in (root / "class_names.json", root.parent / "class_names.json", root.parent.parent / "class_names.json"):
        if path.is_file():
            try:
                names = {int(value): str(name) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise utils.InputError(f'{path}: not as {{"name": id}} ({error}); mend or remove it') from None
            if max(set(names) - {VOID}, default=0) > num_classes:
                raise utils.InputError(f"{path}: names class {max(set(names) - {VOID})}, but --num-classes is "
                                       f"{num_classes} without the background; give a larger one")
            return [names.get(k, "background" if k == 0 else str(k)) for k in range(num_classes + 1)]
    return VOC_CLASSES if num_classes == 20 else [str(k) for k in range(num_classes + 1)]


def check_items(items, num_pixels, num_classes):
    """Sizes of all items, pixels of the first num_pixels; InputError names the first file that is unfit."""
    labels = len(items) > num_pixels
    for i, item in enumerate(tqdm(items, "checking", leave=False, disable=utils.quiet())):
        utils.check_stop()
        if i < num_pixels or utils.image_size(item[1]) != utils.image_size(item[2]):
            label = read_item(item, num_classes)[1]
            labels |= ((label > 0) & (label != VOID)).any()
    if not labels:
        raise utils.InputError(f"{items[0][2].parent}: none of {len(items)} masks has a label between 1 and "
                               f"{num_classes}; 255 means void here: save the first class as 1")


def create_loaders(args, rank=0, world_size=1):
    """Training and validation loaders over checked items."""
    if args.demo and not args.data_path:
        args.data_path = str(utils.draw_demo("scenes", Path(args.output_dir, "data"), 100))
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds VOCdevkit, or --demo")
    root = find_root(args.data_path, args.year)
    train_items, val_items = [find_items(root, name)[:args.limit] for name in (args.train_set, args.val_set)]
    if args.overfit:
        train_items = val_items = train_items[:args.overfit]
    elif both := {item[0] for item in train_items} & {item[0] for item in val_items}:
        print(f"note: {len(both)} of {len(val_items)} validation pictures are trained on too")
    # Every process has as many batches, each of two pictures or more; which ones are left over differs from epoch to
    # epoch. Article: a last batch of one picture is an error, and validation pictures count twice if ranks are uneven.
    training = not (args.test_only or args.sanity_check)
    if args.batch_size == 1 and training:
        raise utils.InputError("--batch-size 1: batch norm behind ASPP's pooling sees one value a picture, and one "
                               "value has no variance; give 2 or more")
    each = len(train_items) // world_size
    each -= each % args.batch_size == 1
    if not each and training:
        raise utils.InputError(f"{root}: {len(train_items)} training pictures for {world_size} processes; each needs "
                               "two: add some, or raise --limit or --overfit")
    if each * world_size < len(train_items) and training:
        print(f"note: {len(train_items) - each * world_size} of {len(train_items)} training pictures sit out each "
              "epoch, others each time: no process may have a batch of one, nor more pictures than another")
    if rank == 0:
        for part in (train_items, val_items):
            check_items(part, len(part) if args.sanity_check else 2000, args.num_classes)
    train_set = VOCSegmentation(train_items, args, train=True, augment=not args.overfit)
    val_set = VOCSegmentation(val_items, args, train=False, augment=False)
    train_set.classes = val_set.classes = find_classes(root, args.num_classes)
    return [torch.utils.data.DataLoader(
        dataset, args.batch_size if dataset.train else 1, sampler=utils.EpochSampler(
            len(dataset), args.seed, dataset.train, rank, world_size, each * world_size if dataset.train else None),
        num_workers=args.workers, worker_init_fn=utils.outlive_signals,
        pin_memory=utils.pick_device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(args.seed)) for dataset in (train_set, val_set)]


def naive_scores(train_items, val_items, num_classes):
    """mIoU in [0, 1] of two answers that look at no picture: the commonest class, and that of each place in training.

    Places are the cells of a 64x64 grid laid over every picture. What a net must beat before its mIoU means anything.
    """
    votes = torch.zeros(num_classes, 64 * 64, dtype=torch.int64)
    for item in train_items:
        label = torch.from_numpy(read_item(item, num_classes - 1)[1])[None]
        label = v2.functional.resize(label, [64, 64], InterpolationMode.NEAREST_EXACT).flatten().long()
        places = (label != VOID).nonzero()[:, 0]
        votes[label[places], places] += 1
    answers = [votes.sum(1).argmax().expand(64, 64), votes.argmax(0).reshape(64, 64)]
    counts = torch.zeros(2, num_classes, num_classes, dtype=torch.int64)
    for item in val_items:
        label = torch.from_numpy(read_item(item, num_classes - 1)[1])
        for i, answer in enumerate(answers):
            pred = v2.functional.resize(answer[None], label.shape, InterpolationMode.NEAREST_EXACT)[0]
            counts[i] += count_pixels(pred, label, num_classes)
    return [scores(one)["miou"] for one in counts]


def sanity_check(train_loader, val_loader, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_loader.dataset), ("val", val_loader.dataset)):
        sizes, empty, pixels, pictures = Counter(), 0, np.zeros(256, np.int64), np.zeros(256, np.int64)
        for item in dataset.items:
            label = read_item(item, args.num_classes)[1]
            sizes[f"{label.shape[1]}x{label.shape[0]}"] += 1
            counts = np.bincount(label.ravel(), minlength=256)
            pixels, pictures, empty = pixels + counts, pictures + (counts > 0), empty + (not counts[1:VOID].any())
        print(f"{part}: {len(dataset)} images, " + ", ".join(f"{count} of {size}" for size, count in
                                                             sizes.most_common(5)))
        for k, name in [*enumerate(dataset.classes), (VOID, "void")]:
            print(f"  {k:3} {name}: {pixels[k] / pixels.sum():.2%} of all pixels, in {pictures[k]} images")
        print(f"  {empty} images have no class but 0")
    naive = naive_scores(train_loader.dataset.items, val_loader.dataset.items, args.num_classes + 1)
    print("to beat: val_miou {:.4f} by the commonest class everywhere, {:.4f} by that of each place".format(*naive))
    dataset, rows = train_loader.dataset, {}
    for index in range(min(8, len(dataset))):
        image, label = read_item(dataset.items[index], args.num_classes)
        seen, seen_label, _ = dataset[0, index]
        seen = ((seen - seen.min()) / (seen.max() - seen.min()).clamp(min=1e-6) * 255).byte()
        seen = np.ascontiguousarray(seen.permute(1, 2, 0))
        rows[dataset.items[index][0]] = [image, utils.overlay(image, label), utils.overlay(seen, seen_label.numpy())]
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    utils.save_panel(Path(args.output_dir, "sanity_check.png"), rows, ["image", "label", "as trained"])
    print(f"wrote {args.output_dir}/sanity_check.png")
    return {"train": len(dataset), "val": len(val_loader.dataset)}


# --- Model ---

def create_model(args, checkpoint=None):
    """The net, with the weights of a checkpoint or of --weights, and the arguments that make it again."""
    arch = {"backbone": args.backbone, "num_classes": args.num_classes + 1, "aux": args.aux}
    model = deeplabv3(**arch)
    if args.weights == "none":  # MobileNet's own 0.01 would leave its statistics hundreds of steps behind fresh weights
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    if checkpoint:
        utils.check_net(checkpoint, f"--resume {args.resume}", {"net": "deeplabv3", **arch})
        model.load_state_dict(checkpoint["model"])
    elif args.weights != "none":
        load_pretrained(model, args, {"net": "deeplabv3", **arch})
    if args.freeze == "backbone":
        model.backbone.requires_grad_(False)
    return model, arch


def load_pretrained(model, args, wanted):
    """--weights into model. Of bare weights with other classes all but the last layer of each head is used, said aloud.

    An auxiliary head that they lack starts fresh too; one that --aux False does not want is left out. A checkpoint of
    ours must be of this very net: InputError.
    """
    path = args.weights
    if path == "coco" and args.backbone not in COCO_WEIGHTS:
        raise utils.InputError(f"--weights coco: there are none for {args.backbone}; give a path or none")
    if path == "coco":
        url = COCO_WEIGHTS[args.backbone]
        path = utils.fetch_weights("coco", url, sha256=url.removesuffix(".pth").rsplit("-", 1)[1])
    own, state = model.state_dict(), utils.read_weights(path, wanted)
    if not args.aux:
        state = {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}
    no_aux = args.aux and not any(key.startswith("aux_classifier.") for key in state)
    fresh = [key for key in own if no_aux and key.startswith("aux_classifier.")]
    fresh += [key for key in own if key.rsplit(".", 1)[0] in ("classifier.4", "aux_classifier.4") and key in state
              and state[key].shape[1:] == own[key].shape[1:] and len(state[key]) != len(own[key])]
    utils.load_weights(model, {**state, **{key: own[key] for key in fresh}}, path)
    if fresh and args.test_only:
        raise utils.InputError(f"{path}: has no trained {', '.join(fresh)}; give --num-classes and --aux as trained")
    if fresh:
        print(f"{path}: all but {', '.join(fresh)}, which start fresh")


# --- Loss ---

def criterion(outputs, label):
    """Mean cross entropy over the labelled pixels, of "out" plus half that of "aux"; 0 if all is void.

    Logits (B, K, H, W), label (B, H, W) in 0..K-1 and 255 -> scalar.
    """
    label = label.flatten().long()
    labelled = (label != VOID).sum().clamp(min=1)
    losses = {name: F.cross_entropy(logits.float().permute(0, 2, 3, 1).flatten(0, 2), label, ignore_index=VOID,
                                    reduction="sum") / labelled for name, logits in outputs.items()}
    return losses["out"] + 0.5 * losses.get("aux", 0)


# --- Evaluation ---

def count_pixels(pred, label, num_classes):
    """Class ids pred and label of one shape, 255 in label void -> (K, K) pixels: rows truth, columns prediction."""
    labelled = label != VOID
    pairs = num_classes * label[labelled].long() + pred[labelled]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(counts):
    """(K, K) of count_pixels -> dict of figures in [0, 1]; NaN for a class that is neither there nor predicted.

    accuracy: pixels that are right. class_accuracy: of each class's pixels. class_iou, class_dice; miou, dice: their
    mean without NaN. fw_iou: IoU weighed by how much of the truth a class is.
    """
    counts = counts.double()
    right, true, pred = counts.diag(), counts.sum(1), counts.sum(0)
    iou, dice = right / (true + pred - right), 2 * right / (true + pred)
    return {"miou": iou.nanmean().item(), "dice": dice.nanmean().item(),
            "accuracy": (right.sum() / true.sum()).item(), "fw_iou": ((true / true.sum()) * iou).nansum().item(),
            "class_iou": iou.tolist(), "class_dice": dice.tolist(), "class_accuracy": (right / true).tolist()}


@torch.no_grad()
def evaluate(model, loader, device, dtype, args):
    """Loss, and figures of `scores` with val_ before them, at the pictures' own size, over all processes."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    counts = torch.zeros(args.num_classes + 1, args.num_classes + 1, dtype=torch.int64, device=device)
    for image, label, _ in tqdm(loader, "validating", leave=False, disable=utils.quiet()):
        if utils.stop_asked():
            break
        logits = predict(model, image.to(device, non_blocking=True), dtype, label.shape[-2:])
        label = label.to(device, non_blocking=True)
        loss += criterion({"out": logits}, label) * (label != VOID).sum()
        counts += count_pixels(logits.argmax(1), label, args.num_classes + 1)
    utils.check_stop(device)
    counts = utils.sum_over_ranks(counts).cpu()
    if not counts.sum():
        raise utils.InputError(f"{args.val_set}.txt: none of its pictures has a labelled pixel; look at their masks")
    figures = {f"val_{key}" if isinstance(value, float) else key: value for key, value in scores(counts).items()}
    return {"val_loss": utils.sum_over_ranks(loss).item() / counts.sum().item(), **figures, "counts": counts.tolist()}


def predict(model, image, dtype, size):
    """Normalised image (B, 3, h, w) -> float32 logits (B, K, *size)."""
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        logits = model(image.contiguous(memory_format=torch.channels_last))["out"]
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def table(title, figures, classes):
    """The text that is printed and written to record_mAP.txt: figures in [0, 1], of each class in percent."""
    lines = [title + "".join(f"  {key} {value:.4f}" for key, value in figures.items() if isinstance(value, float)),
             f"  {'class, %':>15}  {'IoU':>6}  {'Dice':>6}  {'accuracy':>8}  {'pixels':>12}"]
    columns = [figures[key] for key in ("class_iou", "class_dice", "class_accuracy", "counts")]
    for name, iou, dice, accuracy, row in zip(classes, *columns):
        lines.append(f"  {name:>15}  {100 * iou:6.2f}  {100 * dice:6.2f}  {100 * accuracy:8.2f}  {sum(row):12,}")
    return "\n".join(lines)


def write_record(path, text, figures):
    """The file of figures of each class that the article only promises, and the confusion matrix."""
    matrix = "\n".join(" ".join(f"{count:10}" for count in row) for row in figures["counts"])
    path.write_text(f"{text}\n\npixels of each class (rows: truth) predicted as each (columns)\n{matrix}\n", "utf-8")


def write_results(path, epoch, loss, lr, figures):
    """The article's results*.txt: an entry an epoch, in percent; later entries of a former try are dropped."""
    per_class = [[f"{100 * value:.1f}" for value in figures[key]] for key in ("class_accuracy", "class_iou")]
    before = path.read_text().partition(f"[epoch: {epoch}]\n")[0] if path.exists() else ""
    path.write_text(f"{before}[epoch: {epoch}]\ntrain_loss: {loss:.4f}\nlr: {lr:.6f}\n"
                    f"global correct: {100 * figures['val_accuracy']:.1f}\naverage row correct: {per_class[0]}\n"
                    f"IoU: {per_class[1]}\nmean IoU: {100 * figures['val_miou']:.1f}\n\n")


@torch.no_grad()
def draw_samples(model, dataset, device, dtype, path):
    """val_samples.png: image | truth | prediction of the first four pictures."""
    model.eval()
    rows = {}
    for index in range(min(4, len(dataset))):
        image, label = read_item(dataset.items[index], dataset.args.num_classes)
        pred = predict(model, dataset[0, index][0][None].to(device), dtype, label.shape)[0].argmax(0)
        rows[dataset.items[index][0]] = [image, utils.overlay(image, label), utils.overlay(image, pred.cpu().numpy())]
    utils.save_panel(path, rows, ["image", "truth", "prediction"])


# --- Training ---

def create_optimizer(model, args):
    """SGD; the auxiliary head learns ten times as fast, as in the article."""
    aux = list(model.aux_classifier.parameters()) if model.aux_classifier is not None else []
    rest = [p for part in (model.backbone, model.classifier) for p in part.parameters() if p.requires_grad]
    groups = [{"params": rest, "scale": 1.0}] + ([{"params": aux, "scale": 10.0}] if aux else [])
    return torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)


def learning_rate(args, step, steps_per_epoch):
    """Of step 0, 1, ...: up from a thousandth in the first epoch, then down by (1 - progress)**0.9 to 0 and no lower.

    Stateless, so that --epochs may grow on resuming. Article: a single epoch never ends its warm-up, and one step past
    the planned end the rate is a complex number.
    """
    total = args.epochs * steps_per_epoch
    warm_up = min(steps_per_epoch, total // 2)
    if step < warm_up:
        return args.lr * (1e-3 + (1 - 1e-3) * step / warm_up)
    return args.lr * max(0, 1 - (step - warm_up) / (total - warm_up)) ** 0.9


def new_epoch(args):
    """What an epoch sums up as it goes, over all processes; part of every checkpoint."""
    return {"step": 0, "images": 0, "loss": 0.0, "pixels": 0, "skipped": 0}


def train_one_epoch(net, loader, optimizer, scaler, device, dtype, args, state, save):
    """Trains what is left of epoch state["epoch"] after state["step"] steps, and keeps state up to date."""
    model = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    model.train()
    if args.freeze == "backbone":
        model.backbone.eval()
    images_a_step = args.batch_size * args.accumulate
    loader.sampler.set_epoch(state["epoch"], skip=state["step"] * images_a_step)
    left = len(loader.sampler)
    steps = state["step"] + math.ceil(left / images_a_step)
    bar = tqdm(total=steps, initial=state["step"], desc=f"epoch {state['epoch'] + 1}", leave=False,
               disable=utils.quiet())
    names = []  # of the pictures in the gradient so far
    for images, labels, indices in loader:
        if not names:
            pending, loss_sum, pixels = min(images_a_step, left), 0.0, 0
            buffers = [buffer.clone() for buffer in model.buffers()]
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        names += [loader.dataset.items[index][0] for index in indices]
        net.require_backward_grad_sync = len(names) == pending  # else --accumulate: no need to talk yet
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = net(images.contiguous(memory_format=torch.channels_last))
        loss = criterion(outputs, labels)
        scaler.scale(loss * len(images) / pending).backward()
        labelled = (labels != VOID).sum()
        loss_sum += loss.detach() * labelled
        pixels += labelled
        if len(names) < pending:  # --accumulate
            continue

        # One NaN would spoil the weights for good: such a step is undone, in all processes
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        loss_sum, pixels, norm = utils.sum_over_ranks(torch.stack([loss_sum, pixels, norm])).tolist()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(args, state["epoch"] * steps + state["step"], steps)
        if math.isfinite(loss_sum + norm):
            scaler.step(optimizer)
            state["bad_steps"] = 0
            state["images"] += pending * args.world_size
            state["loss"] += loss_sum
            state["pixels"] += int(pixels)
        else:
            for buffer, before in zip(model.buffers(), buffers):
                buffer.copy_(before)
            state["skipped"] += 1
            state["bad_steps"] += not (scaler.is_enabled() and math.isfinite(loss_sum))  # fp16 has to find its scale
            if state["bad_steps"] == 10:
                raise utils.InputError(f"loss or gradient not finite ten times in a row, last on {', '.join(names)}; "
                                       "lower --lr, or look at these files")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        left -= pending
        names = []
        bar.set_postfix(loss=f"{state['loss'] / max(state['pixels'], 1):.4f}", refresh=False,
                        lr=f"{optimizer.param_groups[0]['lr']:.2g}", mem=f"{utils.peak_memory_mb(device):.0f}M")
        bar.update()
        utils.check_stop(device)
        if args.save_every and state["step"] % args.save_every == 0:
            save("last.pth")
    bar.close()
    if net is not model:  # each process has batch statistics of its own; the first one's are saved and evaluated
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


# --- Main ---

def main(args):
    """Trains as args say; returns the last validation figures and the best val_miou."""
    output_dir = Path(args.output_dir)
    rank, args.world_size, device = utils.start_process_group(utils.pick_device(args.device))
    utils.seed_everything(args.seed + rank, args.deterministic)
    dtype, scaler = utils.pick_precision(args.amp, device)
    train_loader, val_loader = create_loaders(args, rank, args.world_size)
    if args.sanity_check:
        return {} if rank else sanity_check(train_loader, val_loader, args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    args.data_hash = utils.data_hash(train_set.items + val_set.items)

    checkpoint = utils.find_checkpoint(args.resume, output_dir)
    if checkpoint:
        args.weights = checkpoint["args"]["weights"]  # what the run began with
    model, arch = create_model(args, checkpoint)
    if args.sync_bn and device.type == "cuda" and args.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif args.sync_bn:
        print("note: --sync-bn: no effect but on CUDA under torchrun")
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(model, args)
    state = {"epoch": 0, "best": {"val_miou": -1.0, "epoch": 0}, "bad_steps": 0, **new_epoch(args)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.backbone}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained; "
          f"{len(train_set)} train and {len(val_set)} val images (data hash {args.data_hash}); {device} x "
          f"{args.world_size}, {dtype or torch.float32}, torch {torch.__version__}")
    if args.test_only:
        if args.weights == "none" and not checkpoint:
            raise utils.InputError("--test-only: nothing to test; give --weights or --resume a checkpoint")
        trained_with = checkpoint or ({} if args.weights == "coco" else utils.load_checkpoint(args.weights))
        trained_with = trained_with.get("args", {})
        if trained_with.get("base_size", args.base_size) != args.base_size:
            raise utils.InputError(f"--base-size {args.base_size}: trained with {trained_with['base_size']}")
        if trained_with.get("data_hash", args.data_hash) != args.data_hash:
            print("note: other pictures than in training: some may have been trained on")
        figures = evaluate(model, val_loader, device, dtype, args)
        text = table("test:", figures, train_set.classes)
        print(text)
        if rank == 0:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_record(output_dir / "record_mAP.txt", text, figures)
        return figures
    if checkpoint:
        utils.check_resume(checkpoint, args, RESUME_FREE)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        state = {key: checkpoint[key] for key in state}
        utils.set_rng_state(checkpoint["rng"], rank)
        print(f"resumed in epoch {state['epoch'] + 1} after step {state['step']}")
    if args.compile:
        model.compile()
    net = model if args.world_size == 1 else nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
    if rank == 0:
        utils.start_run(args)
    results = next(iter(sorted(output_dir.glob("results*.txt"), reverse=True)), None) if checkpoint else None
    results = results or output_dir / f"results{time.strftime('%Y%m%d-%H%M%S')}.txt"

    def save(name):
        rng = utils.rng_state()  # of every process
        if rank == 0:
            utils.save_checkpoint(output_dir / name, {
                "format": 1, "net": "deeplabv3", "arch": arch, "classes": train_set.classes,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": {},
                "scaler": scaler.state_dict(), "rng": rng, "args": vars(args), **state})

    figures = None
    while state["epoch"] < args.epochs:
        if 0 < args.early_stopping <= state["epoch"] - state["best"]["epoch"]:
            print(f"early stopping: no better val_miou in {args.early_stopping} epochs")
            break
        started, images_before = time.perf_counter(), state["images"]
        try:
            train_one_epoch(net, train_loader, optimizer, scaler, device, dtype, args, state, save)
            seconds = time.perf_counter() - started
            figures = evaluate(model, val_loader, device, dtype, args)
        except utils.Stopped:
            save("last.pth")
            raise
        row = {"epoch": state["epoch"] + 1, "step": (state["epoch"] + 1) * state["step"],
               "lr": optimizer.param_groups[0]["lr"], "loss": state["loss"] / (state["pixels"] or math.nan),
               **{key: value for key, value in figures.items() if isinstance(value, float)},
               "skipped": state["skipped"], "seconds": seconds,
               "images_per_s": (state["images"] - images_before) / seconds, "peak_mb": utils.peak_memory_mb(device)}
        print(f"epoch {state['epoch'] + 1}/{args.epochs}  " + "  ".join(f"{key} {row[key]:.4g}" for key in (
            "lr", "loss", "val_loss", "val_miou", "val_dice", "val_accuracy", "val_fw_iou")) + f"  {seconds:.1f} s")
        if state["skipped"]:
            print(f"  {state['skipped']} of {state['step']} steps skipped: loss or gradient not finite")
        state.update(epoch=state["epoch"] + 1, **new_epoch(args))
        if rank == 0:
            rows = utils.log_row(output_dir / "log.csv", row)
            write_results(results, row["epoch"] - 1, row["loss"], row["lr"], figures)
        if figures["val_miou"] > state["best"]["val_miou"]:
            state["best"] = {"val_miou": figures["val_miou"], "epoch": state["epoch"]}
            save("best.pth")
        save("last.pth")
        if rank == 0:
            utils.plot_curves(output_dir / "curves.png", rows, ["loss", "val_loss"], ["val_miou", "val_accuracy"],
                              ["lr"])
            draw_samples(model, val_set, device, dtype, output_dir / "val_samples.png")

    figures = figures or evaluate(model, val_loader, device, dtype, args)
    text = table(f"after epoch {state['epoch']}:", figures, train_set.classes)
    print(text)
    print(f"best val_miou {state['best']['val_miou']:.4f} in epoch {state['best']['epoch']}: {output_dir}/best.pth")
    if rank == 0:
        write_record(output_dir / "record_mAP.txt", text, figures)
    if args.demo and rank == 0:
        import demo_data
        parts = [zip(*[read_item(item, args.num_classes) for item in part.items]) for part in (train_set, val_set)]
        figures["baseline_miou"] = demo_data.baseline_scenes(*parts[0], *parts[1], args.num_classes + 1)
        print(f"colour of each pixel alone, on the same images: mIoU {figures['baseline_miou']:.4f}")
        print("wrote " + " ".join(map(str, sorted(output_dir.glob("*.*")))))
    return {**figures, "best_val_miou": state["best"]["val_miou"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
