"""Train U-Net or U-Net++ on images with one mask folder a class.   Article: 图像分割实战 unet医学细胞分割

    python train_unet.py --demo
    python train_unet.py --data-path data/nuclei --image-size 256 --optimizer Adam

Data:   DATA_PATH/images/NAME.png (any picture), DATA_PATH/masks/0/NAME.png ... a folder for each class, which may
        overlap: 0 background, 255 object; for a single class DATA_PATH/masks/NAME.png too. Split 80:20 or --val-path.
Writes: OUTPUT_DIR/best.pth (best val_iou), model.pth (its bare weights, as the article), last.pth (for --resume),
        log.csv, curves.png, val_samples.png (image | truth | prediction), split.json, args.json.
"""
import argparse
import functools
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
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import utils
from nets.unet import NETS, STRIDE

DEMO = {"arch": "UNet", "optimizer": "Adam", "lr": 2e-3, "epochs": 9, "batch_size": 8, "workers": 0,
        "output_dir": "runs/train_unet_demo"}
RESUME_FREE = ["resume", "weights", "data_path", "dataset", "val_path", "split", "output_dir", "name", "overwrite",
               "epochs", "early_stopping", "save_every", "workers", "device"]  # may differ when a run is continued


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    add, flag = parser.add_argument, {"nargs": "?", "const": True, "default": False, "type": utils.switch}
    add("--data-path", help="folder with images/ and masks/")
    add("--demo", **flag, help="train on drawn data with small settings")
    add("--sanity-check", **flag, help="read the whole data set, print counts, write sanity_check.png, train nothing")
    add("--limit", type=utils.number(int, 1), help="use only the first N items of each split")
    add("--overfit", type=utils.number(int, 1), help="train and validate on the same N items, without augmentation")
    add("--output-dir", default="runs/train_unet", help="folder for checkpoints, log and pictures (%(default)s)")
    add("--overwrite", **flag, help="replace a former run in --output-dir")
    add("--weights", default="none", help="start from: none or a path (%(default)s)")
    add("--resume", help="continue a run: auto (from last.pth if it is there) or a path")
    add("--save-every", type=utils.number(int, 0), default=0, metavar="N",
        help="save last.pth every N steps too, 0 at the end of epochs only (%(default)s)")
    add("--epochs", type=utils.number(int, 1), default=100, help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", "--batch_size", type=utils.number(int, 1), default=16,
        help="items a batch and process (%(default)s)")
    add("--accumulate", type=utils.number(int, 1), default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", type=utils.number(float, 0), default=1e-3, help="initial learning rate (%(default)s)")
    add("--weight-decay", "--wd", "--weight_decay", type=utils.number(float, 0), default=1e-4,
        help="weight decay (%(default)s)")
    add("-j", "--workers", "--num_workers", type=utils.number(int, 0), default=min(4, os.cpu_count()),
        help="loader processes, 0 for none (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=41,
        help="of all that is random: weights, order, augmentation (%(default)s)")
    add("--deterministic", **flag, help="same bits on CUDA too, slower")
    add("--test-only", **flag, help="evaluate --weights or --resume, train nothing")
    add("--compile", **flag, help="torch.compile the net")
    add("--early-stopping", "--early_stopping", type=int, default=-1, metavar="N",
        help="stop after N epochs without a better val_iou, -1 never (%(default)s)")

    add("--model", "-a", "--arch", dest="arch", choices=list(NETS), default="NestedUNet",
        help="U-Net or U-Net++ (%(default)s)")
    add("--deep-supervision", "--deep_supervision", **flag, help="NestedUNet only: loss on all four heads")
    add("--depth", type=utils.number(int, 1, 4),
        help="with --test-only and --deep-supervision: the net cut down to so many levels, as predict.py --depth")
    add("--input-channels", "--input_channels", type=int, choices=[1, 3], default=3, help="1 grey, 3 RGB (%(default)s)")
    add("--num-classes", "--num_classes", type=utils.number(int, 1), default=1,
        help="mask folders, background not counted (%(default)s)")
    add("--image-size", type=pixel_size, default=(96, 96), help="N or W,H in pixels that pictures are resized to (96)")
    add("--input_w", type=utils.number(int, 32), help="width, overrides --image-size")
    add("--input_h", type=utils.number(int, 32), help="height, overrides --image-size")
    add("--dataset", help="--data-path inputs/DATASET, as in the article")
    add("--name", help="--output-dir models/NAME, as in the article")
    add("--val-path", help="folder of the same layout to validate on, instead of splitting")
    add("--split", help="split.json of another run to use, instead of splitting by --seed")
    add("--img-ext", "--img_ext", help="only images with this extension (any)")
    add("--mask-ext", "--mask_ext", help="only masks with this extension (any)")
    add("--loss", choices=["BCEDiceLoss", "LovaszHingeLoss", "BCEWithLogitsLoss"], default="BCEDiceLoss",
        help="(%(default)s)")
    add("--optimizer", choices=["SGD", "Adam"], default="SGD", help="(%(default)s)")
    add("--momentum", type=utils.number(float, 0), default=0.9, help="of SGD (%(default)s)")
    add("--nesterov", **flag, help="of SGD (%(default)s)")
    add("--scheduler", choices=["CosineAnnealingLR", "ReduceLROnPlateau", "MultiStepLR", "ConstantLR"],
        default="CosineAnnealingLR", help="learning rate over the epochs (%(default)s)")
    add("--min-lr", "--min_lr", type=utils.number(float, 0), default=1e-5, help="of cosine and plateau (%(default)s)")
    add("--factor", type=utils.number(float, 0, 0.999), default=0.1, help="of ReduceLROnPlateau (%(default)s)")
    add("--patience", type=utils.number(int, 0), default=2, help="of ReduceLROnPlateau, epochs (%(default)s)")
    add("--milestones", type=epoch_list, default=(1, 2), help="of MultiStepLR, epochs (1,2)")
    add("--gamma", type=utils.number(float, 0), default=2 / 3, help="of MultiStepLR (2/3)")
    return parser


def epoch_list(text):
    return tuple(int(epoch) for epoch in text.split(","))


def pixel_size(text):
    """"96" or "128,96" -> (width, height)."""
    sides = [int(side) for side in text.split(",")]
    if len(sides) > 2 or min(sides) < 32:
        raise argparse.ArgumentTypeError(f"{text} must be N or W,H, each at least 32")
    return sides[0], sides[-1]


# --- Data ---

class MaskFolders(torch.utils.data.Dataset):
    """[(epoch, index)] -> image (C, h, w) float32 normalised, mask (K, H, W) uint8 in {0, 1}, index.

    Images are resized to --image-size; in training the masks too, in validation they keep the picture's own size, so
    that the figures speak of the pixels the user has. Augmentation depends on (seed, epoch, index) alone.
    """

    def __init__(self, items, args, train, augment):
        self.items, self.args, self.train = items, args, train
        self.turn, self.colour = v2.Identity(), v2.Identity()
        if augment:  # the article's, of which torchvision has all but albumentations' additive saturation
            self.turn = v2.Compose([
                v2.RandomChoice([v2.RandomRotation((angle, angle), expand=True) for angle in (0, 90, 180, 270)]),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
            ])
            self.colour = v2.RandomChoice([
                v2.ColorJitter(hue=20 / 180, saturation=30 / 255, brightness=20 / 255),
                v2.ColorJitter(brightness=0.2),
                v2.ColorJitter(contrast=0.2),
            ])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key
        image, mask = read_item(self.items[index])
        image, mask = tv_tensors.Image(image.transpose(2, 0, 1)), tv_tensors.Mask(mask)
        width, height = self.args.image_size
        with utils.seeded(self.args.seed, epoch, index):
            image, mask = self.turn(image, mask)
            image = self.colour(v2.functional.resize(image, [height, width], antialias=True))
        mask = mask.as_subclass(torch.Tensor)
        if self.train:  # as the image, cut at half: "nearest" would shift it by up to half a pixel of the small picture
            mask = (v2.functional.resize(mask * 255, [height, width], antialias=True) >= 128).to(torch.uint8)
        return normalize(image, self.args.input_channels), mask, index


def normalize(image, channels=3):
    """RGB uint8 (3, H, W) -> float32 (channels, H, W) by ImageNet's statistics."""
    image = image.as_subclass(torch.Tensor) / 255
    image = v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return image if channels == 3 else image.mean(0, keepdim=True)


def read_item(item):
    """(name, image path, mask paths) -> image (H, W, 3) uint8 RGB, mask (K, H, W) uint8 in {0, 1}; or InputError."""
    _, image_path, mask_paths = item
    image = utils.read_image(image_path)
    masks = []
    for path in mask_paths:
        mask = utils.read_mask(path)
        if mask.shape != image.shape[:2]:
            raise utils.InputError(f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels, but {image_path} has "
                                   f"{image.shape[1]}x{image.shape[0]}; save both at one size")
        mask = mask * np.uint8(255) if mask.dtype == bool else mask // 257 if mask.max() == 65535 else mask
        # Soft edges of a resized or JPEG mask are fine, cut at half; 0/1 masks and ids of classes or instances are not.
        middle, high = ((64 <= mask) & (mask < 192)).sum(), (mask >= 192).sum()
        if mask.min() < 0 or mask.max() > 255 or middle > high or (mask.any() and mask.max() < 64):
            found = ", ".join(map(str, np.unique(mask)[:5]))
            raise utils.InputError(f"{path}: has values {found} ...; a mask holds 0 (background) and 255 (object): "
                                   "multiply a 0/1 mask by 255, give each class a folder of its own")
        masks.append(mask >= 128)
    return image, np.stack(masks).astype(np.uint8)


def list_pictures(folder, extension):
    """{name without extension: path} of the pictures in folder."""
    if not folder.is_dir():
        raise utils.InputError(f"{folder}: no such folder; give --data-path the folder that holds images/ and masks/")
    endings = {f".{extension.lower().lstrip('.')}"} if extension else utils.PICTURES
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in endings and not path.is_dir() and not path.name.startswith("."):
            if path.stem in found:
                raise utils.InputError(f"{path}: {found[path.stem].name} is there too; remove one, or give --img-ext "
                                       "or --mask-ext")
            found[path.stem] = path
    return found


def find_items(data_path, args):
    """[(name, image path, [mask path of each class])] sorted by name, and the class names; or InputError."""
    root = Path(data_path, "masks")
    images = list_pictures(Path(data_path, "images"), args.img_ext)
    if not images:
        raise utils.InputError(f"{data_path}/images: no pictures; give the folder that holds images/ and masks/")
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."] if root.is_dir() else []
    folders = sorted(folders, key=lambda path: (path.name.zfill(9) if path.name.isdigit() else path.name)) or [root]
    if len(folders) != args.num_classes:
        names = ", ".join(path.name for path in folders[:5])
        raise utils.InputError(f"{root}: {len(folders)} class folders ({names}); give --num-classes {len(folders)}")
    masks = [list_pictures(folder, args.mask_ext) for folder in folders]
    for folder, found in zip(folders, masks):
        for name in sorted(images.keys() ^ found.keys()):
            path, other = (images[name], folder) if name in images else (found[name], Path(data_path, "images"))
            raise utils.InputError(f"{path}: {other} has no picture of that name; add it or remove this one")
    items = [(name, images[name], [found[name] for found in masks]) for name in sorted(images)]
    return items, [folder.name for folder in folders]


def split_items(items, classes, args):
    """Training and validation items: by --val-path, by --split, or 80:20 by --seed (41: the article's very split)."""
    if args.val_path:
        val_items, val_classes = find_items(args.val_path, args)
        if val_classes != classes and args.num_classes > 1:
            raise utils.InputError(f"{args.val_path}/masks: classes {val_classes}, training {classes}; name them alike")
        return items, val_items
    if args.split:
        by_name = {item[0]: item for item in items}
        try:
            split = json.loads(Path(args.split).read_text())
            return [by_name[name] for name in split["train"]], [by_name[name] for name in split["val"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise utils.InputError(f"{args.split}: no split of {args.data_path} ({error}); give another") from None
    if len(items) < 2:
        raise utils.InputError(f"{args.data_path}: one picture cannot be split; add more or give --val-path")
    order = np.random.RandomState(args.seed).permutation(len(items))  # what sklearn's train_test_split draws
    num_val = math.ceil(0.2 * len(items))
    return [items[i] for i in sorted(order[num_val:])], [items[i] for i in sorted(order[:num_val])]


def check_items(items, num_pixels):
    """Sizes of all items, pixels of the first num_pixels; InputError names the first file that is unfit."""
    objects = len(items) > num_pixels
    for i, item in enumerate(tqdm(items, "checking", leave=False, disable=utils.quiet())):
        utils.check_stop()
        if i < num_pixels or any(utils.image_size(path) != utils.image_size(item[1]) for path in item[2]):
            objects |= read_item(item)[1].any()
    if not objects:
        raise utils.InputError(f"{items[0][2][0].parent}: none of {len(items)} masks has an object (255); look at them")


def create_loaders(args):
    """Training and validation loaders over checked items."""
    if args.demo and not args.data_path:
        args.data_path = str(utils.draw_demo("cells", Path(args.output_dir, "data"), 60))
    args.data_path = args.data_path or (args.dataset and str(Path("inputs", args.dataset)))
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds images/ and masks/, or --demo")
    items, classes = find_items(args.data_path, args)
    train_items, val_items = [part[:args.limit] for part in split_items(items, classes, args)]
    both = {item[1] for item in train_items} & {item[1] for item in val_items}
    if both or not train_items or not val_items:
        raise utils.InputError(f"{args.split or args.val_path}: {len(train_items)} training and {len(val_items)} "
                               f"validation pictures, {len(both)} in both; give some to each, none to both")
    if args.overfit:
        train_items = val_items = train_items[:args.overfit]
    for part in (train_items, val_items):
        check_items(part, len(part) if args.sanity_check else 2000)
    train_set = MaskFolders(train_items, args, train=True, augment=not args.overfit)
    val_set = MaskFolders(val_items, args, train=False, augment=False)
    train_set.classes = val_set.classes = classes
    # Article: drops the last, smaller batch, and with less than one batch trains on nothing. Here: every picture.
    return [torch.utils.data.DataLoader(
        dataset, args.batch_size, sampler=utils.EpochSampler(len(dataset), args.seed, shuffle=dataset.train),
        num_workers=args.workers, worker_init_fn=utils.outlive_signals, collate_fn=collate,
        pin_memory=utils.pick_device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(args.seed)) for dataset in (train_set, val_set)]


def collate(batch):
    """Images stacked (B, C, h, w); masks (B, K, H, W), or a list of them where their sizes differ; indices."""
    images, masks, indices = zip(*batch)
    return torch.stack(images), torch.stack(masks) if len({mask.shape for mask in masks}) == 1 else masks, indices


def sanity_check(train_loader, val_loader, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_loader.dataset), ("val", val_loader.dataset)):
        masks = (read_item(item)[1] for item in dataset.items)
        shapes, pixels = zip(*[(mask.shape[1:], mask.sum((1, 2), dtype=int)) for mask in masks])  # pixels: (K,) each
        sizes = Counter(f"{width}x{height}" for height, width in shapes).most_common(5)
        print(f"{part}: {len(dataset)} images, " + ", ".join(f"{count} of {size}" for size, count in sizes))
        for name, found in zip(dataset.classes, np.transpose(pixels)):
            share, empty = found.sum() / sum(map(math.prod, shapes)), (found == 0).sum()
            print(f"  class {name}: {share:.2%} of all pixels, {empty} images without it")
    dataset, rows = train_loader.dataset, {}
    for index in range(min(8, len(dataset))):
        image, mask = read_item(dataset.items[index])
        seen, seen_mask, _ = dataset[0, index]
        seen = ((seen - seen.min()) / (seen.max() - seen.min()).clamp(min=1e-6) * 255).byte().expand(3, -1, -1)
        seen = np.ascontiguousarray(seen.permute(1, 2, 0))
        rows[dataset.items[index][0]] = [image, draw_mask(image, mask), draw_mask(seen, seen_mask.numpy())]
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    utils.save_panel(Path(args.output_dir, "sanity_check.png"), rows, ["image", "mask", "as trained"])
    print(f"wrote {args.output_dir}/sanity_check.png")
    return {"train": len(dataset), "val": len(val_loader.dataset)}


# --- Model ---

def create_model(args):
    """The net, and the name and arguments that make it again."""
    arch = {"num_classes": args.num_classes, "input_channels": args.input_channels}
    if args.arch == "NestedUNet":
        arch["deep_supervision"] = args.deep_supervision
    elif args.deep_supervision:
        raise utils.InputError("--deep-supervision: only NestedUNet has the heads for it; give --arch NestedUNet")
    model, arch = NETS[args.arch](**arch), {"model": args.arch, **arch}
    if args.weights != "none":
        utils.load_weights(model, utils.read_weights(args.weights, {"net": "unet", **arch}), args.weights)
    return model, arch


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


# --- Loss ---

def criterion(outputs, mask, loss):
    """The named loss, its mean over outputs (deep supervision): logits and mask in [0, 1] (B, K, H, W) -> scalar."""
    outputs = outputs if isinstance(outputs, list) else [outputs]
    function = {"BCEDiceLoss": bce_dice_loss, "LovaszHingeLoss": lovasz_hinge_loss,
                "BCEWithLogitsLoss": F.binary_cross_entropy_with_logits}[loss]
    return sum(function(logits, mask) for logits in outputs) / len(outputs)


def bce_dice_loss(logits, mask, smooth=1e-5):
    """Half the mean binary cross entropy, plus 1 - Dice of each picture (its classes flattened together), averaged."""
    prob, target = logits.sigmoid().flatten(1), mask.flatten(1)
    dice = (2 * (prob * target).sum(1) + smooth) / (prob.sum(1) + target.sum(1) + smooth)
    return 0.5 * F.binary_cross_entropy_with_logits(logits, mask) + 1 - dice.mean()


def lovasz_hinge_loss(logits, mask):
    """Lovasz hinge (Berman et al. 2018, arXiv:1705.08790), each picture by itself with its classes flattened, averaged.

    Hinge errors are weighed, largest first, by how much each further wrong pixel lowers the Jaccard index.
    """
    losses = []
    for score, target in zip(logits.flatten(1), mask.flatten(1)):
        errors, order = (1 - score * (2 * target - 1)).sort(descending=True)
        target = target[order]
        intersection = target.sum() - target.cumsum(0)
        union = target.sum() + (1 - target).cumsum(0)
        jaccard = 1 - intersection / union
        weight = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(errors.relu() @ weight)
    return torch.stack(losses).mean()


# --- Evaluation ---

def count_pixels(pred, mask):
    """Boolean pred and mask (B, K, H, W) -> (K, 3) pixels in both, in pred, in mask."""
    return torch.stack([(pred & mask).sum((0, 2, 3)), pred.sum((0, 2, 3)), mask.sum((0, 2, 3))], 1)


def scores(counts):
    """(..., K, 3) of count_pixels -> IoU and Dice (..., K), NaN where a class is neither in prediction nor truth."""
    both, pred, true = counts.double().unbind(-1)
    return both / (pred + true - both), 2 * both / (pred + true)


@torch.no_grad()
def evaluate(model, loader, device, dtype, args):
    """Loss and scores in [0, 1] at the pictures' own size: nothing depends on the batch size.

    val_iou: pixels counted over the whole set, then the mean over classes. val_image_iou, val_image_dice: of each class
    in each picture, then the mean, without those neither predicted nor there. class_iou, class_dice: over the set.
    """
    model.eval()
    loss, counts = 0.0, []
    for images, masks, _ in tqdm(loader, "validating", leave=False, disable=None):
        utils.check_stop()
        logits = forward(model, images.to(device, non_blocking=True), dtype)[-1]
        for logit, mask in zip(logits, masks):
            mask = mask[None].to(device)  # (1, K, H, W)
            logit = F.interpolate(logit[None], mask.shape[-2:], mode="bilinear", align_corners=False)
            loss += criterion(logit, mask.float(), args.loss)
            counts.append(count_pixels(logit > 0, mask > 0))
    counts = torch.stack(counts).cpu()  # (pictures, K, 3)
    (iou, dice), (image_iou, image_dice) = scores(counts.sum(0)), scores(counts)
    return {"val_loss": float(loss) / len(counts), "val_iou": iou.nanmean().item(),
            "val_image_iou": image_iou.nanmean().item(), "val_image_dice": image_dice.nanmean().item(),
            "class_iou": iou.tolist(), "class_dice": dice.tolist()}


def print_table(title, figures, classes):
    print(title + "".join(f"  {key} {value:.4f}" for key, value in figures.items() if not isinstance(value, list)))
    for name, iou, dice in zip(classes, figures["class_iou"], figures["class_dice"]):
        print(f"  class {name} over the set: IoU {iou:.4f}  Dice {dice:.4f}")


def draw_mask(image, mask):
    """Image (H, W, 3) with mask (K, H, W) tinted, one colour a class."""
    for k, one in enumerate(mask):
        image = utils.overlay(image, one.astype(int) * (k + 1))
    return image


@torch.no_grad()
def draw_samples(model, dataset, device, dtype, path):
    """val_samples.png: image | truth | prediction of the first four pictures."""
    model.eval()
    rows = {}
    for index in range(min(4, len(dataset))):
        image, mask = read_item(dataset.items[index])
        logits = forward(model, dataset[0, index][0][None].to(device), dtype)[-1]
        pred = F.interpolate(logits, mask.shape[-2:], mode="bilinear", align_corners=False)[0] > 0
        rows[dataset.items[index][0]] = [image, draw_mask(image, mask), draw_mask(image, pred.cpu().numpy())]
    utils.save_panel(path, rows, ["image", "truth", "prediction"])


# --- Training ---

def create_optimizer(model, args):
    if args.optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    if args.nesterov and not args.momentum:
        raise utils.InputError("--nesterov: needs --momentum above 0")
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, nesterov=args.nesterov,
                           weight_decay=args.weight_decay, fused=True)


def learning_rate(args, epoch):
    """Of epoch 0, 1, ... by every schedule but ReduceLROnPlateau; stateless, so that --epochs may grow on resuming."""
    if args.scheduler == "CosineAnnealingLR":
        floor = min(args.min_lr, args.lr)
        return floor + (args.lr - floor) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    if args.scheduler == "MultiStepLR":
        return args.lr * args.gamma ** sum(epoch >= milestone for milestone in args.milestones)
    return args.lr


def new_epoch(args):
    """What an epoch sums up as it goes; part of every checkpoint."""
    return {"step": 0, "images": 0, "loss": 0.0, "counts": torch.zeros(args.num_classes, 3, dtype=torch.int64),
            "skipped": 0}


def train_one_epoch(model, loader, optimizer, scaler, device, dtype, args, state, save):
    """Trains what is left of epoch state["epoch"] after state["step"] steps, and keeps state up to date."""
    model.train()
    images_a_step = args.batch_size * args.accumulate
    loader.sampler.set_epoch(state["epoch"], skip=state["step"] * images_a_step)
    left = len(loader.sampler)
    bar = tqdm(total=state["step"] + math.ceil(left / images_a_step), initial=state["step"],
               desc=f"epoch {state['epoch'] + 1}", leave=False, disable=None)
    names = []  # of the pictures in the gradient so far
    for images, masks, indices in loader:
        if not names:
            pending, loss_sum, counts = min(images_a_step, left), 0.0, 0
            buffers = [buffer.clone() for buffer in model.buffers()]
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        outputs = forward(model, images, dtype)
        loss = criterion(outputs, masks.float(), args.loss)
        scaler.scale(loss * len(images) / pending).backward()
        loss_sum += loss.detach() * len(images)
        counts += count_pixels(outputs[-1] > 0, masks > 0)
        names += [loader.dataset.items[index][0] for index in indices]
        if len(names) < pending:  # --accumulate
            continue

        # One NaN would spoil the weights for good: such a step is undone
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if torch.isfinite(loss_sum + norm):
            scaler.step(optimizer)
            state["bad_steps"] = 0
            state["images"] += pending
            state["loss"] += loss_sum.item()
            state["counts"] += counts.cpu()
        else:
            for buffer, before in zip(model.buffers(), buffers):
                buffer.copy_(before)
            state["skipped"] += 1
            state["bad_steps"] += not (scaler.is_enabled() and torch.isfinite(loss_sum))  # fp16 has to find its scale
            if state["bad_steps"] == 10:
                raise utils.InputError(f"loss or gradient not finite ten times in a row, last on {', '.join(names)}; "
                                       "lower --lr, or look at these files")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        left -= pending
        names = []
        bar.set_postfix(loss=f"{state['loss'] / max(state['images'], 1):.4f}", refresh=False,
                        lr=f"{optimizer.param_groups[0]['lr']:.2g}", mem=f"{utils.peak_memory_mb(device):.0f}M")
        bar.update()
        utils.check_stop()
        if args.save_every and state["step"] % args.save_every == 0:
            save("last.pth")
    bar.close()


# --- Main ---

def main(args):
    """Trains as args say; returns the last validation figures and the best val_iou."""
    args.image_size = (args.input_w or args.image_size[0], args.input_h or args.image_size[1])
    args.output_dir = str(Path("models", args.name)) if args.name else args.output_dir
    output_dir = Path(args.output_dir)
    if args.depth and not (args.test_only and args.deep_supervision):
        raise utils.InputError("--depth: is for --test-only of a net with --deep-supervision; leave it out")
    utils.seed_everything(args.seed, args.deterministic)
    device = utils.pick_device(args.device)
    dtype, scaler = utils.pick_precision(args.amp, device)
    train_loader, val_loader = create_loaders(args)
    if args.sanity_check:
        return sanity_check(train_loader, val_loader, args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    args.data_hash = utils.data_hash(train_set.items + val_set.items)

    model, arch = create_model(args)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(model, args)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=args.factor, patience=args.patience, min_lr=args.min_lr)
    state = {"epoch": 0, "best": {"val_iou": -1.0, "epoch": 0}, "bad_steps": 0, **new_epoch(args)}
    checkpoint = utils.find_checkpoint(args.resume, output_dir)
    if checkpoint:
        utils.check_net(checkpoint, f"--resume {args.resume}", {"net": "unet", **arch})
        model.load_state_dict(checkpoint["model"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.arch}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained; "
          f"{len(train_set)} train and {len(val_set)} val images (data hash {args.data_hash}); {device}, "
          f"{dtype or torch.float32}, torch {torch.__version__}")
    if args.test_only:
        if args.weights == "none" and not checkpoint:
            raise utils.InputError("--test-only: nothing to test; give --weights or --resume a checkpoint")
        trained_with = (checkpoint or utils.load_checkpoint(args.weights)).get("args", {})
        if list(trained_with.get("image_size", args.image_size)) != list(args.image_size):
            raise utils.InputError(f"--image-size {args.image_size}: trained with {trained_with['image_size']}")
        if trained_with.get("data_hash", args.data_hash) != args.data_hash:
            print("note: other pictures or another split than in training: some may have been trained on")
        if args.depth:
            model.forward = functools.partial(model.forward, depth=args.depth)
        figures = evaluate(model, val_loader, device, dtype, args)
        print_table("test:", figures, train_set.classes)
        return figures
    if checkpoint:
        utils.check_resume(checkpoint, args, RESUME_FREE)
        optimizer.load_state_dict(checkpoint["optimizer"])
        plateau.load_state_dict(checkpoint["lr_scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        state = {key: checkpoint[key] for key in state}
        utils.set_rng_state(checkpoint["rng"])
        print(f"resumed in epoch {state['epoch'] + 1} after step {state['step']}")
    split = {"train": [item[0] for item in train_set.items], "val": [item[0] for item in val_set.items]}
    utils.start_run(args, split)
    if args.compile:
        model.compile()

    def save(name):
        utils.save_checkpoint(output_dir / name, {
            "format": 1, "net": "unet", "arch": arch, "classes": train_set.classes, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "lr_scheduler": plateau.state_dict(),
            "scaler": scaler.state_dict(), "rng": utils.rng_state(), "args": vars(args), **state})

    figures = None
    while state["epoch"] < args.epochs:
        if 0 < args.early_stopping <= state["epoch"] - state["best"]["epoch"]:
            print(f"early stopping: no better val_iou in {args.early_stopping} epochs")
            break
        if args.scheduler != "ReduceLROnPlateau":
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, state["epoch"])
        started, images_before = time.perf_counter(), state["images"]
        try:
            train_one_epoch(model, train_loader, optimizer, scaler, device, dtype, args, state, save)
            seconds = time.perf_counter() - started
            figures = evaluate(model, val_loader, device, dtype, args)
        except utils.Stopped:
            save("last.pth")
            raise
        row = {"epoch": state["epoch"] + 1, "step": (state["epoch"] + 1) * state["step"],
               "lr": optimizer.param_groups[0]["lr"], "loss": state["loss"] / (state["images"] or math.nan),
               "iou": scores(state["counts"])[0].nanmean().item(),
               **{key: value for key, value in figures.items() if isinstance(value, float)},
               "skipped": state["skipped"], "seconds": seconds,
               "images_per_s": (state["images"] - images_before) / seconds, "peak_mb": utils.peak_memory_mb(device)}
        print(f"epoch {state['epoch'] + 1}/{args.epochs}  " + "  ".join(f"{key} {row[key]:.4g}" for key in (
            "lr", "loss", "iou", "val_loss", "val_iou", "val_image_iou", "val_image_dice")) + f"  {seconds:.1f} s")
        if state["skipped"]:
            print(f"  {state['skipped']} of {state['step']} steps skipped: loss or gradient not finite")
        state.update(epoch=state["epoch"] + 1, **new_epoch(args))
        if args.scheduler == "ReduceLROnPlateau":
            plateau.step(figures["val_loss"])
        rows = utils.log_row(output_dir / "log.csv", row)
        if figures["val_iou"] > state["best"]["val_iou"]:
            state["best"] = {"val_iou": figures["val_iou"], "epoch": state["epoch"]}
            save("best.pth")
            utils.save_checkpoint(output_dir / "model.pth", model.state_dict())
        save("last.pth")
        utils.plot_curves(output_dir / "curves.png", rows, ["loss", "val_loss"], ["iou", "val_iou", "val_image_iou"])
        draw_samples(model, val_set, device, dtype, output_dir / "val_samples.png")

    figures = figures or evaluate(model, val_loader, device, dtype, args)
    print_table(f"after epoch {state['epoch']}:", figures, train_set.classes)
    print(f"best val_iou {state['best']['val_iou']:.4f} in epoch {state['best']['epoch']}: {output_dir}/best.pth")
    if args.demo:
        import demo_data
        images, masks = zip(*[read_item(item) for item in val_set.items])
        figures["baseline_iou"] = demo_data.baseline_cells(images, [mask[0] for mask in masks])
        print(f"Otsu's threshold on the same images: IoU {figures['baseline_iou']:.4f}")
        print("wrote " + " ".join(map(str, sorted(output_dir.glob("*.*")))))
    return {**figures, "best_val_iou": state["best"]["val_iou"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
