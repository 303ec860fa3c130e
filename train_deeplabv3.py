"""Train DeepLabV3 on a folder in PASCAL VOC layout.   Article: 【深度学习项目】语义分割-DeepLab网络

    python train_deeplabv3.py --demo
    python train_deeplabv3.py --data-path data --num-classes 20
    torchrun --nproc_per_node 2 train_deeplabv3.py --data-path data --num-classes 20

Data:   DATA_PATH/VOCdevkit/VOC2012/ with JPEGImages/ID.jpg, SegmentationClass/ID.png (0 background,
        1 ... classes, 255 void: ignored by loss and metrics), ImageSets/Segmentation/train.txt and
        val.txt (one ID per line) and, optionally, class_names.json ({"name": id}).
Writes: OUTPUT_DIR/best.pth (best val_miou), last.pth (for --resume), log.csv, curves.png,
        val_samples.png (image | truth | prediction), results*.txt (as the article), record_mAP.txt
        (figures of each class; --test-only: record_mAP_test.txt), split.json, args.json.
Parts:  the article's, and here: SegmentationPresetTrain = scale_flip_crop; SegmentationPresetEval =
        resize, normalize; ConfusionMatrix = count_pixels, scores, table; create_lr_scheduler =
        learning_rate; MetricLogger, SmoothedValue, init_distributed_mode = utils.Run; DeepLabV3,
        ASPP, DeepLabHead, FCNHead: the same in nets/deeplabv3.py; results.txt = write_results.
"""
import functools
import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

import utils
from nets.deeplabv3 import BACKBONES, COCO_WEIGHTS, PIXEL_MEAN, PIXEL_STD, VOC_CLASSES
from nets.deeplabv3 import deeplabv3, normalize, resize, scaled_size
from nets.weights import (check_net, fetch_weights, load_weights, read_weights,
                          reset_mismatched_heads)

VOID = 255  # in this script; read_item translates other codings
DEMO = {"model": "demo", "weights": "none", "num_classes": 3, "lr": 0.04,
        "epochs": 24, "batch_size": 4, "base_size": 96, "crop_size": 96, "workers": 0,
        "output_dir": "runs/train_deeplabv3_demo"}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    parser.add_run_options(output_dir="runs/train_deeplabv3")  # --demo, --resume, --device, --seed ...
    add, add_switch = parser.add_argument, parser.add_switch
    positive, non_negative = utils.number(int, 1), utils.number(float, 0)
    add("--data-path", help="folder that holds VOCdevkit/, or VOCdevkit itself")
    add("--year", default="2012", help="of the folder VOCdevkit/VOC2012 (%(default)s)")
    add("--train-set", default="train", help="list in ImageSets/Segmentation (%(default)s)")
    add("--val-set", default="val", help="list in ImageSets/Segmentation (%(default)s)")
    add("--num-classes", type=utils.number(int, 1, 254), default=20,
        help="classes; background is not counted (%(default)s)")
    add("--base-size", type=utils.number(int, 32), default=520,
        help="shorter side in pixels; in training 0.5 to 2 times it (%(default)s)")
    add("--crop-size", type=utils.number(int, 32), default=480,
        help="side of training crops in pixels (%(default)s)")

    add("--model", "--backbone", choices=list(BACKBONES), default="resnet50", help="(%(default)s)")
    add_switch("--aux", default=True, help="auxiliary head and its loss (%(default)s)")
    add("--freeze", choices=["none", "backbone"], default="none",
        help="keep the weights and the batch statistics of this part (%(default)s)")
    add("--weights", default="coco",
        help="start from: coco (official, fetched once), none or a path (%(default)s)")

    add("--epochs", type=positive, default=30, help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", type=positive, default=4,
        help="images per batch and process (%(default)s)")
    add("--accumulate", type=positive, default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", type=non_negative, default=1e-4, help="initial learning rate (%(default)s)")
    add("--weight-decay", "--wd", type=non_negative, default=1e-4, help="weight decay (%(default)s)")
    add("--momentum", type=non_negative, default=0.9, help="for SGD (%(default)s)")
    add_switch("--sync-bn", help="batch statistics over all processes (CUDA under torchrun)")

    add("--print-freq", action=utils.Obsolete,
        help="no effect: a bar shows every step, log.csv every epoch")
    add("--start-epoch", action=utils.Obsolete, help="no effect: --resume knows its epoch")
    add("--world-size", "--dist-url", dest="world_size", action=utils.Obsolete,
        help="no effect: give torchrun --nproc_per_node N, --nnodes, --rdzv-endpoint")
    return parser


# --- Data ---

class VOCSegmentation(torch.utils.data.Dataset):
    """[(epoch, index)] -> image (3, h, w) float32 normalised, label (H, W) uint8, index.

    In training both are scaled, flipped and cropped to (crop_size, crop_size); in validation the
    image has a shorter side of base_size and the label keeps the image's own size. What is random
    depends on (seed, epoch, index) alone.
    """

    def __init__(self, items, classes, args, train, augment):
        self.items, self.classes, self.args = items, classes, args
        self.train, self.augment = train, augment

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


def scale_flip_crop(image, label, args, augment):
    """Applies the article's augmentation: shorter side 0.5 to 2 times base_size, flipped or not, cropped.

    What a small image leaves of the crop is void, in ImageNet's mean colour (article: black).
    """
    low = high = args.base_size
    if augment:
        low, high = args.base_size // 2, 2 * args.base_size
    size = scaled_size(image, torch.randint(low, high + 1, ()).item())
    image = v2.functional.resize(image, size, antialias=True)
    # "nearest" would be up to half a pixel off
    label = v2.functional.resize(label, size, InterpolationMode.NEAREST_EXACT)
    if augment and torch.rand(()) < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    bottom, right = [max(0, args.crop_size - length) for length in size]
    image = v2.functional.pad(image, [0, 0, right, bottom], fill=[124, 116, 104])
    label = v2.functional.pad(label, [0, 0, right, bottom], fill=VOID)
    spare = [length - args.crop_size for length in image.shape[-2:]]
    top, left = [pixels // 2 for pixels in spare]
    if augment:
        top, left = [torch.randint(pixels + 1, ()).item() for pixels in spare]
    crop = (..., slice(top, top + args.crop_size), slice(left, left + args.crop_size))
    return image[crop], label[crop]


def read_item(item, num_classes):
    """(name, image path, label path) -> image (H, W, 3) uint8 RGB, label (H, W) uint8 of 0..K, 255."""
    _, image_path, path = item
    image, label = utils.read_image(image_path), utils.read_mask(path)
    if label.shape != image.shape[:2]:
        raise utils.InputError(f"{path}: {label.shape[1]}x{label.shape[0]} pixels, but {image_path} "
                               f"has {image.shape[1]}x{image.shape[0]}; save both at one size")
    outside = label[(label != VOID) & ((label < 0) | (label > num_classes))]
    if outside.size:
        raise utils.InputError(f"{path}: label {outside[0]} is outside 0..{num_classes} (and 255, "
                               "void); give --num-classes without the background, or correct the mask")
    return image, label.astype(np.uint8)


def find_root(data_path, year):
    """Returns the folder VOC<year> in data_path or in its VOCdevkit."""
    folders = [Path(data_path, "VOCdevkit"), Path(data_path)]
    for folder in folders:
        if (folder / f"VOC{year}").is_dir():
            return folder / f"VOC{year}"
    years = sorted(path.name[3:] for folder in folders for path in folder.glob("VOC[!d]*"))
    remedy = "give --data-path the folder that holds VOCdevkit, or another --year"
    if years:
        remedy = f"give --year {' or '.join(years)}"
    raise utils.InputError(f"{data_path}: holds neither VOCdevkit/VOC{year} nor VOC{year}; {remedy}")


def list_ids(root, name):
    """Returns the IDs of the list ImageSets/Segmentation/NAME.txt, in its order, and its path."""
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    try:
        lines = [utils.nfc(line) for line in utils.read_lines(path)]
    except FileNotFoundError:
        raise utils.InputError(f"{path}: no such list; write one with one ID per line") from None
    if not lines:
        raise utils.InputError(f"{path}: lists nothing; write one ID per line")
    # IDs may hold spaces, also at their ends; some lists have two columns, the second of -1, 0 or 1
    readings = [(line, line.strip(), re.sub(r"(?<!\s)\s+-?[01]$", "", line.strip())) for line in lines]
    known = utils.list_images(root / "JPEGImages", wanted={*itertools.chain(*readings)})
    ids = [next((text for text in texts if text in known), texts[1]) for texts in readings]
    repeated = len(ids) - len(set(ids))
    if repeated:
        print(f"note: {path} repeats {repeated} IDs; an image is used as often as it is listed")
    return ids, path


def list_files(folder, ids, list_path):
    """Returns {ID: path} of the images in folder; InputError if one of the ids has none, or two."""
    found = utils.list_images(folder, wanted=set(ids))
    for item_id in ids:
        if item_id not in found:
            raise utils.InputError(f"{folder}/{item_id}: no such image, but {list_path} lists it; add "
                                   "it or remove the line (IDs have no extension)")
    return found


def find_items(root, name):
    """Returns [(ID, image path, label path)] of a list, in its order."""
    ids, path = list_ids(root, name)
    images = list_files(root / "JPEGImages", ids, path)
    labels = list_files(root / "SegmentationClass", ids, path)
    return [(item_id, images[item_id], labels[item_id]) for item_id in ids]


def find_class_names(root):
    """Returns {id: name} of class_names.json in root or above it; {} without one."""
    for folder in (root, root.parent, root.parent.parent):
        path = folder / "class_names.json"
        if path.is_file():
            try:
                ids = json.loads(path.read_text(encoding="utf-8"))
                names = {int(value): str(name) for name, value in ids.items()}
                if [*names] != [*ids.values()]:
                    raise ValueError("ids are whole numbers, each once")
                return names
            except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise utils.InputError(f'{path}: not like {{"name": id}} ({error}); fix or remove '
                                       'it') from None
    return {}


def find_classes(root, num_classes):
    """Returns the names of classes 0..num_classes: of class_names.json, of VOC, or numbers."""
    names = find_class_names(root)
    if not names:
        return VOC_CLASSES if num_classes == 20 else [str(k) for k in range(num_classes + 1)]
    highest = max(set(names) - {VOID}, default=0)
    if highest > num_classes:
        raise utils.InputError(f"{root}: class_names.json: names class {highest}, but --num-classes is "
                               f"{num_classes} without the background; give a larger one")
    return [names.get(k, str(k) if k else "background") for k in range(num_classes + 1)]


def check_item(item, whole, num_classes):
    """Returns whether there is a class; if not `whole`, True if the sizes agree. InputError if bad."""
    if not whole and utils.image_size(item[1]) == utils.image_size(item[2]):
        return True
    label = read_item(item, num_classes)[1]
    return bool(((label > 0) & (label != VOID)).any())


def create_loaders(args):
    """Returns training and validation loaders over checked items."""
    if args.demo and not args.data_path:
        args.data_path = utils.draw_demo("scenes", Path(args.output_dir, "data"), 100)
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds VOCdevkit, or --demo")
    root = find_root(args.data_path, args.year)
    train_items = []  # which a test does not need
    if not args.test_only or args.overfit:
        train_items = find_items(root, args.train_set)[:args.limit]
    val_items = [] if args.overfit else find_items(root, args.val_set)[:args.limit]
    shared = {item[0] for item in train_items} & {item[0] for item in val_items}
    if args.overfit:
        train_items = val_items = train_items[:args.overfit]
    elif shared:
        print(f"note: {len(shared)} of {len(val_items)} validation images are trained on too")
    keep = count_trained(len(train_items), args)
    check = functools.partial(check_item, num_classes=args.num_classes)
    for part in [val_items] if args.test_only else [train_items, val_items]:
        if not any(utils.check_items(check, part, args)):
            raise utils.InputError(f"{part[0][2].parent}: none of {len(part)} masks has a label between 1 "
                                   f"and {args.num_classes}; 255 means void here: save the first class as "
                                   "1")
    classes = find_classes(root, args.num_classes)
    train_set = VOCSegmentation(train_items, classes, args, train=True, augment=not args.overfit)
    val_set = VOCSegmentation(val_items, classes, args, train=False, augment=False)
    train_loader = utils.create_loader(train_set, args, shuffle=True, keep=keep)
    return train_loader, utils.create_loader(val_set, args, shuffle=False, batch_size=1)


def count_trained(num_images, args):
    """Returns how many images an epoch trains on: as many in each process, and no batch of a single one.

    Article: a last batch of one image is an error. Here it is left out, another image each epoch.
    """
    if args.test_only or args.sanity_check:
        return num_images
    if args.batch_size == 1:
        raise utils.InputError("--batch-size 1: batch norm behind ASPP's pooling sees one value per "
                               "image, and one value has no variance; give 2 or more")
    world_size = utils.ranks()[1]
    per_process = num_images // world_size
    per_process -= per_process % args.batch_size == 1
    if not per_process:
        raise utils.InputError(f"{args.data_path}: {num_images} training images for {world_size} "
                               "processes; each needs two: add some, or raise --limit or --overfit")
    left_out = num_images - per_process * world_size
    if left_out:
        print(f"note: {left_out} of {num_images} training images are left out of each epoch, others "
              "each time: no process may have a batch of one, nor more images than another")
    return per_process * world_size


def sanity_check(train_set, val_set, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_set), ("val", val_set)):
        if not dataset.items:  # of a test
            continue
        sizes, empty = Counter(), 0
        pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)  # by label
        for item in dataset.items:
            label = read_item(item, args.num_classes)[1]
            counts = np.bincount(label.ravel(), minlength=256)
            sizes[f"{label.shape[1]}x{label.shape[0]}"] += 1
            pixels, images = pixels + counts, images + (counts > 0)
            empty += not counts[1:VOID].any()
        common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
        print(f"{part}: {len(dataset)} images, {common}")
        for k, name in [*enumerate(dataset.classes), (VOID, "void")]:
            share = pixels[k] / pixels.sum()
            print(f"  {k:3} {name}: {share:.2%} of all pixels, in {images[k]} images")
        print(f"  {empty} images have no class but 0")
    if not train_set.items:
        return {"train": 0, "val": len(val_set)}
    naive = naive_scores(train_set.items, val_set.items, args.num_classes + 1)
    print("baselines that ignore the image: val_miou {:.4f} by the commonest class everywhere, {:.4f} "
          "by the commonest class of each place".format(*naive))
    rows = {}
    for index in range(min(8, len(train_set))):
        image, label = read_item(train_set.items[index], args.num_classes)
        seen, seen_label, _ = train_set[0, index]
        seen = seen.permute(1, 2, 0) * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)
        seen = np.ascontiguousarray((seen * 255).round().clamp(0, 255).byte())
        rows[train_set.items[index][0]] = [image, utils.overlay(image, label),
                                           utils.overlay(seen, seen_label.numpy())]
    path = Path(args.output_dir, "sanity_check.png")
    legend = utils.class_tints(train_set.classes)
    utils.save_panel(path, rows, ["image", "label", "as trained"], legend)
    print(f"wrote {path}")
    return {"train": len(train_set), "val": len(val_set)}


# --- Model ---

def create_model(args, checkpoint=None):
    """Returns the net, with weights of checkpoint or --weights, and the arguments that rebuild it."""
    arch = {"backbone": args.model, "num_classes": args.num_classes + 1, "aux": args.aux}
    model = deeplabv3(**arch)
    if args.weights == "none":  # MobileNet's own 0.01 leaves statistics hundreds of steps behind
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    if checkpoint:
        check_net(checkpoint, f"--resume {args.resume}", {"net": "deeplabv3", **arch})
        load_weights(model, checkpoint["model"], f"--resume {args.resume}")
    elif args.weights != "none":
        load_pretrained(model, args, {"net": "deeplabv3", **arch})
    if args.freeze == "backbone":
        model.backbone.requires_grad_(False)
    return model, arch


def load_pretrained(model, args, wanted):
    """Loads --weights; of weights of other classes all but the last layer of each head.

    These layers start fresh, as does an auxiliary head that the file lacks, and a line says so; one
    that --aux False does not need is left out. The backbone must be this one.
    """
    path = args.weights
    if path == "coco" and args.model not in COCO_WEIGHTS:
        raise utils.InputError(f"--weights coco: there are none for {args.model}; give a path or none")
    if path == "coco":
        path = fetch_weights(**COCO_WEIGHTS[args.model])
    free = () if args.test_only else ["num_classes", "aux"]
    own, state = model.state_dict(), read_weights(path, wanted, free)
    if not args.aux:
        state = {key: value for key, value in state.items() if not key.startswith("aux_")}
    has_aux = any(key.startswith("aux_") for key in state)
    state, fresh = reset_mismatched_heads(model, state, ["classifier.4", "aux_classifier.4"])
    if not has_aux:
        fresh += [key for key in own if key.startswith("aux_")]
    load_weights(model, {**state, **{key: own[key] for key in fresh}}, path)
    if fresh and args.test_only:
        raise utils.InputError(f"{path}: has no trained {', '.join(fresh)}; give --num-classes and "
                               "--aux as trained")
    if fresh:
        print(f"{path}: {', '.join(fresh)} start fresh")


# --- Loss ---

def criterion(outputs, label):
    """Returns the mean cross entropy over the labelled pixels, of "out" plus half that of "aux"; 0 if all is void.

    Logits (B, K, H, W), label (B, H, W) in 0..K-1 and 255 -> scalar.
    """
    label = label.flatten().long()
    labelled = (label != VOID).sum().clamp(min=1)
    losses = {}
    for name, logits in outputs.items():
        logits = logits.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, K)
        losses[name] = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum") / labelled
    return losses["out"] + 0.5 * losses.get("aux", 0)


# --- Evaluation ---

def count_pixels(pred, label, num_classes):
    """Class ids pred and label of one shape, 255 void -> (K, K) pixels: rows truth, columns pred."""
    labelled = label != VOID
    pairs = num_classes * label[labelled].long() + pred[labelled]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(counts):
    """(K, K) of count_pixels -> figures in [0, 1]; NaN for a class in neither truth nor prediction.

    accuracy: pixels that are right. class_accuracy: of each class's pixels. class_iou, class_dice;
    miou, dice: their mean without NaN. fw_iou: IoU weighed by how much of the truth a class is.
    """
    counts = counts.double()
    right, true, pred = counts.diag(), counts.sum(1), counts.sum(0)
    iou, dice = right / (true + pred - right), 2 * right / (true + pred)
    return {"miou": iou.nanmean().item(), "dice": dice.nanmean().item(),
            "accuracy": (right.sum() / true.sum()).item(),
            "fw_iou": ((true / true.sum()) * iou).nansum().item(),
            "class_iou": iou.tolist(), "class_dice": dice.tolist(),
            "class_accuracy": (right / true).tolist()}


@torch.no_grad()
def evaluate(model, loader, run, args):
    """Returns the loss, and `scores` as val_..., at the images' own size, over all processes."""
    model.eval()
    num_classes = args.num_classes + 1
    losses = {}  # index: summed over labelled pixels
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=run.device)
    for image, label, (index,) in utils.until_stopped(loader, "validating", run.device):
        image = image.to(run.device, non_blocking=run.pinned)
        label = label.to(run.device, non_blocking=run.pinned)
        logits = predict(model, image, run.dtype, label.shape[-2:])
        losses[int(index)] = criterion({"out": logits}, label) * (label != VOID).sum()
        counts += count_pixels(logits.argmax(1), label, num_classes)
    counts = utils.sum_over_ranks(counts).cpu()
    if not counts.sum():
        raise utils.InputError(f"{args.val_set}.txt: none of its images has a labelled pixel; look at "
                               "their masks")
    losses = utils.merge_over_ranks({index: loss.item() for index, loss in losses.items()})
    figures = {"val_loss": sum(losses.values()) / counts.sum().item()}
    for key, value in scores(counts).items():
        figures[f"val_{key}" if isinstance(value, float) else key] = value
    return {**figures, "counts": counts.tolist()}


def predict(model, image, dtype, size):
    """Normalised image (B, 3, h, w) -> float32 logits (B, K, *size)."""
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        logits = model(image.contiguous(memory_format=torch.channels_last))["out"]
    return F.interpolate(logits.float(), size, mode="bilinear")


def naive_scores(train_items, val_items, num_classes):
    """Returns the mIoU of the commonest class everywhere, and of the commonest class of each place.

    Baselines that ignore the image. Places are the cells of a 64x64 grid laid over every image.
    """
    def resize_label(label, size):
        return v2.functional.resize(label[None], size, InterpolationMode.NEAREST_EXACT)[0]

    votes = torch.zeros(num_classes, 64 * 64, dtype=torch.int64)
    for item in train_items:
        label = torch.from_numpy(read_item(item, num_classes - 1)[1])
        label = resize_label(label, [64, 64]).flatten().long()
        places = (label != VOID).nonzero()[:, 0]
        votes[label[places], places] += 1
    answers = [votes.sum(1).argmax().expand(64, 64), votes.argmax(0).reshape(64, 64)]
    counts = torch.zeros(2, num_classes, num_classes, dtype=torch.int64)
    for item in val_items:
        label = torch.from_numpy(read_item(item, num_classes - 1)[1])
        for i, answer in enumerate(answers):
            counts[i] += count_pixels(resize_label(answer, label.shape), label, num_classes)
    return [scores(matrix)["miou"] for matrix in counts]


def table(title, figures, classes):
    """Returns the text for the screen and record_mAP.txt: means in [0, 1], figures of each class in percent."""
    means = {key: value for key, value in figures.items() if isinstance(value, float)}
    lines = [title + "".join(f"  {key} {value:.4f}" for key, value in means.items()),
             f"  {'class, %':>15}  {'IoU':>6}  {'Dice':>6}  {'accuracy':>8}  {'pixels':>12}"]
    columns = [figures[key] for key in ("class_iou", "class_dice", "class_accuracy", "counts")]
    for name, iou, dice, accuracy, row in zip(classes, *columns):
        lines.append(f"  {name:>15}  {100 * iou:6.2f}  {100 * dice:6.2f}  {100 * accuracy:8.2f}  "
                     f"{sum(row):12,}")
    return "\n".join(lines)


def write_record(run, name, text, figures):
    """Writes record_mAP.txt, which the article names but does not write: table, confusion matrix."""
    if run.rank == 0:
        matrix = "\n".join(" ".join(f"{count:10}" for count in row) for row in figures["counts"])
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(
            f"{text}\n\npixels of each class (rows: truth) predicted as each (columns)\n{matrix}\n",
            encoding="utf-8")


def write_results(run, path, figures):
    """Writes the article's results*.txt: one entry per epoch (from 0), in percent."""
    if run.rank == 0:
        accuracy = [f"{100 * value:.1f}" for value in figures["class_accuracy"]]
        iou = [f"{100 * value:.1f}" for value in figures["class_iou"]]
        head = f"[epoch: {run.progress['epoch']}]\n"
        before = path.read_text(encoding="utf-8").partition(head)[0] if path.exists() else ""
        path.write_text(f"{before}{head}train_loss: {run.mean_loss():.4f}\nlr: {run.learning_rate():.6f}\n"
                        f"global correct: {100 * figures['val_accuracy']:.1f}\n"
                        f"average row correct: {accuracy}\nIoU: {iou}\n"
                        f"mean IoU: {100 * figures['val_miou']:.1f}\n\n")


@torch.no_grad()
def draw_samples(model, dataset, run):
    """Draws val_samples.png: image | truth | prediction of the first four images."""
    model.eval()
    rows = {}
    for index in range(min(4, len(dataset))):
        image, label = read_item(dataset.items[index], dataset.args.num_classes)
        seen = dataset[0, index][0][None].to(run.device)
        pred = predict(model, seen, run.dtype, label.shape)[0].argmax(0).cpu().numpy()
        rows[dataset.items[index][0]] = [image, utils.overlay(image, label),
                                         utils.overlay(image, pred)]
    utils.save_panel(run.folder / "val_samples.png", rows, ["image", "truth", "prediction"],
                     utils.class_tints(dataset.classes))


# --- Training ---

def create_optimizer(model, args):
    """Returns SGD; the auxiliary head learns ten times as fast, as in the article."""
    rest = [*model.backbone.parameters(), *model.classifier.parameters()]
    groups = [{"params": [p for p in rest if p.requires_grad], "scale": 1.0}]
    if model.aux_classifier is not None:
        groups.append({"params": list(model.aux_classifier.parameters()), "scale": 10.0})
    return torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay,
                           fused=True)


def learning_rate(args, step, steps_per_epoch):
    """Returns the rate of step 0, 1 ...: up from a thousandth in the first epoch, then (1 - done)**0.9 down to 0.

    Of the step alone, so that a resumed run may have more --epochs. Article: a single epoch never
    ends its warm-up, and one step past the planned end the rate is a complex number.
    """
    total = args.epochs * steps_per_epoch
    warm_up = min(steps_per_epoch, total // 2)
    if step < warm_up:
        return args.lr * (1e-3 + (1 - 1e-3) * step / warm_up)
    return args.lr * max(0, 1 - (step - warm_up) / (total - warm_up)) ** 0.9


def set_learning_rate(optimizer, args, step, steps_per_epoch):
    """Sets the rate before each step."""
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(args, step, steps_per_epoch)


def train_one_epoch(model, loader, optimizer, run, args):
    """Trains for one pass over the training data, or the rest of a resumed one; run adds it up."""
    model.train()
    if args.freeze == "backbone":
        model.backbone.eval()
    for batches in run.steps(loader):  # the --accumulate batches of one optimizer step
        step = run.progress["epoch"] * run.steps_per_epoch + run.progress["step"]
        set_learning_rate(optimizer, args, step, run.steps_per_epoch)
        loss_sum, num_labelled = 0.0, 0
        for images, labels, _ in batches:
            images = images.to(run.device, non_blocking=run.pinned)
            labels = labels.to(run.device, non_blocking=run.pinned)
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
                outputs = model(images.contiguous(memory_format=torch.channels_last))
            # Labelled pixels in units of an image: sums over pixels would be too large for fp16
            labelled = (labels != VOID).sum() / labels[0].numel()
            loss = criterion(outputs, labels) * labelled  # the sum over labelled pixels
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            num_labelled += labelled
        if run.finish_gradient(optimizer, loss_sum, num_labelled):  # divides by num_labelled; False: not finite
            run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)


# --- Main ---

def main(args):
    """Trains as the options say; returns the last validation figures and the best val_miou."""
    run = utils.Run(args, net="deeplabv3")  # joins torchrun's processes; seeds; device, precision
    train_loader, val_loader = create_loaders(args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    if args.sanity_check:
        return sanity_check(train_set, val_set, args)

    model, arch = create_model(args, run.checkpoint)
    if args.sync_bn and run.device.type == "cuda" and args.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif args.sync_bn:
        print("note: --sync-bn: only has an effect on CUDA under torchrun")
    model = model.to(run.device, memory_format=torch.channels_last)
    run.describe(args.model, model, train_set, val_set)
    if args.test_only:
        run.check_test(same=["base_size"])
        figures = evaluate(model, val_loader, run, args)
        text = table("test:", figures, val_set.classes)
        print(text)
        write_record(run, "record_mAP_test.txt", text, figures)
        return figures

    if args.weights == "none" and not run.checkpoint and 10 * args.lr <= DEMO["lr"]:
        print(f"note: --lr {args.lr} suits official weights; from scratch --demo uses {DEMO['lr']}")
    optimizer = create_optimizer(model, args)
    progress = run.start(arch, train_set, val_set, model=model, optimizer=optimizer)
    if args.compile:
        model.compile()
    results = run.folder / f"results{time.strftime('%Y%m%d-%H%M%S')}.txt"
    if run.checkpoint:
        results = max(run.folder.glob("results*.txt"), default=results)

    figures = None
    with run.saved_when_stopped():  # SIGTERM, Ctrl-C
        while not run.is_over():    # --epochs, --early-stopping
            train_one_epoch(model, train_loader, optimizer, run, args)
            figures = evaluate(model, val_loader, run, args)
            write_results(run, results, figures)
            run.end_epoch(figures, show=["val_loss", "val_miou", "val_dice", "val_accuracy",
                                         "val_fw_iou"])
            if run.is_best(figures["val_miou"]):
                run.save_best()
            run.save_last()
            run.plot_curves(["loss", "val_loss"], ["val_miou", "val_accuracy"], ["lr"])
            draw_samples(model, val_set, run)

    figures = figures or evaluate(model, val_loader, run, args)
    text = table(f"after epoch {progress['epoch']}:", figures, val_set.classes)
    print(text)
    write_record(run, "record_mAP.txt", text, figures)
    run.finish("val_miou")
    if args.demo and args.data_path == str(run.folder / "data"):  # generated
        import demo_data
        train, val = ([read_item(item, args.num_classes) for item in part.items]
                      for part in (train_set, val_set))
        figures["baseline_miou"] = demo_data.colour_miou(train, val, args.num_classes + 1)
        print(f"colour of each pixel alone, on the same images: mIoU {figures['baseline_miou']:.4f}")
    return {**figures, "best_val_miou": progress["best"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
