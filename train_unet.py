"""Train U-Net or U-Net++ on images with one folder of masks per class.   Article: 图像分割实战 unet医学细胞分割

    python train_unet.py --demo
    python train_unet.py --data-path data/nuclei --image-size 256 --optimizer Adam

Data:   DATA_PATH/images/NAME.png (any image), DATA_PATH/masks/0/NAME.png ...: one folder per class,
        which may overlap: 0 background, 255 object. For a single class also DATA_PATH/masks/NAME.png.
        DATA_PATH/masks/classes.txt, if there is one, names the classes 0, 1 ..., one per line.
        Split 80:20, or validated on --val-path.
Writes: OUTPUT_DIR/best.pth (best val_iou), model.pth (its bare weights, as the article), last.pth
        (for --resume), log.csv, curves.png, val_samples.png (image | truth | prediction), split.json,
        args.json.
Parts:  the article's, and here: Dataset = MaskFolders; train_transform = its geometry, colour;
        archs = NETS; losses = LOSSES, criterion; train() = train_one_epoch; validate() = evaluate;
        scheduler = learning_rate; config.yml = args.json; early stopping, log = utils.Run.
"""
import argparse
import functools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

import utils
from nets.unet import NETS, PIXEL_MEAN, PIXEL_STD, forward, memory_format, normalize
from nets.weights import check_net, load_weights, read_weights, reset_mismatched_heads

DEMO = {"model": "UNet", "optimizer": "Adam", "lr": 2e-3, "epochs": 6, "batch_size": 4,
        "workers": 0, "output_dir": "runs/train_unet_demo"}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    parser.add_run_options(output_dir="runs/train_unet")  # --demo, --resume, --device, --seed ...
    add, add_switch = parser.add_argument, parser.add_switch
    positive, non_negative = utils.number(int, 1), utils.number(float, 0)
    add("--data-path", help="folder with images/ and masks/")
    add("--dataset", dest="data_path", type="inputs/{}".format, metavar="DATASET",
        help="the same as --data-path inputs/DATASET, as in the article")
    add("--name", dest="output_dir", type="models/{}".format, metavar="NAME",
        help="the same as --output-dir models/NAME, as in the article")
    add("--val-path", help="folder of the same layout to validate on, instead of splitting")
    add("--split", help="split.json of another run to use, instead of splitting by --seed")
    add("--img-ext", help="extension of the images, such as png or npy (any image file)")
    add("--mask-ext", help="extension of the masks, such as png or npy (any image file)")
    add("--image-size", type=pixel_size, default=(96, 96),
        help="N or W,H: pixels that images are resized to (96)")
    add("--input-w", type=utils.number(int, 32), help="width, overrides --image-size")
    add("--input-h", type=utils.number(int, 32), help="height, overrides --image-size")
    add("--input-channels", type=int, choices=[1, 3], default=3, help="1 grey, 3 RGB (%(default)s)")
    add("--num-classes", type=positive, default=1,
        help="folders of masks; background is not counted (%(default)s)")

    add("--model", "-a", "--arch", choices=list(NETS), default="NestedUNet",
        help="U-Net or U-Net++ (%(default)s)")
    add_switch("--deep-supervision", help="NestedUNet only: loss on all four heads")
    add("--depth", type=utils.number(int, 1, 4),
        help="with --test-only --deep-supervision: evaluate the net cut down to this many levels")
    add("--weights", default="none", help="start from: none or a path (%(default)s)")

    add("--loss", choices=list(LOSSES), default="BCEDiceLoss", help="(%(default)s)")
    add("--epochs", type=positive, default=100, help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", type=positive, default=16,
        help="images per batch and process (%(default)s)")
    add("--accumulate", type=positive, default=1, help="batches per optimizer step (%(default)s)")
    add("--optimizer", choices=["SGD", "Adam"], default="SGD", help="(%(default)s)")
    add("--lr", type=non_negative, default=1e-3, help="initial learning rate (%(default)s)")
    add("--weight-decay", "--wd", type=non_negative, default=1e-4, help="weight decay (%(default)s)")
    add("--momentum", type=non_negative, default=0.9, help="for SGD (%(default)s)")
    add_switch("--nesterov", help="for SGD")
    add("--scheduler", default="CosineAnnealingLR", help="learning rate over the epochs (%(default)s)",
        choices=["CosineAnnealingLR", "ReduceLROnPlateau", "MultiStepLR", "ConstantLR"])
    add("--min-lr", type=non_negative, default=1e-5, help="for cosine and plateau (%(default)s)")
    add("--factor", type=utils.number(float, 0, 0.999), default=0.1,
        help="for ReduceLROnPlateau (%(default)s)")
    add("--patience", type=utils.number(int, 0), default=2,
        help="for ReduceLROnPlateau, epochs (%(default)s)")
    add("--milestones", type=epoch_list, default=(1, 2), help="for MultiStepLR, epochs (1,2)")
    add("--gamma", type=non_negative, default=2 / 3, help="for MultiStepLR (2/3)")
    add_switch("--sync-bn", help="batch statistics over all processes (CUDA under torchrun)")
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
    """[(epoch, index)] -> image (C, h, w) float32 normalised, mask (K, h, w) or (K, H, W), index.

    Images are resized to --image-size. In training the masks too: float32, the share of each pixel
    that the object covers. In validation masks are uint8, 0 or 1, of the image's own size, so that the
    figures are about the user's pixels. Augmentation depends on (seed, epoch, index) alone.
    """

    def __init__(self, items, classes, args, train, augment):
        self.items, self.classes, self.args, self.train = items, classes, args, train
        self.geometry, self.colour = v2.Identity(), v2.Identity()
        if augment:  # the article's; torchvision lacks only albumentations' additive saturation
            turns = [v2.RandomRotation((angle, angle), expand=True) for angle in (0, 90, 180, 270)]
            self.geometry = v2.Compose([
                v2.RandomChoice(turns),
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
            image, mask = self.geometry(image, mask)
            image = self.colour(v2.functional.resize(image, [height, width], antialias=True))
        mask = mask.as_subclass(torch.Tensor)
        if self.train:  # not cut at half, which would change areas by up to 5 %
            mask = v2.functional.resize(mask.float(), [height, width], antialias=True)
        return normalize(image, self.args.input_channels), mask, index

    @staticmethod
    def collate(batch):
        """Images (B, C, h, w); masks (B, K, H, W), or a list where their sizes differ; indices."""
        images, masks, indices = zip(*batch)
        if len({mask.shape for mask in masks}) == 1:
            masks = torch.stack(masks)
        return torch.stack(images), masks, indices


def read_item(item):
    """(name, image path, mask paths) -> image (H, W, 3) uint8 RGB, mask (K, H, W) uint8 in {0, 1}."""
    _, image_path, mask_paths = item
    image, masks = utils.read_image(image_path), []
    for path in mask_paths:
        mask = utils.read_binary_mask(path)
        if mask.shape != image.shape[:2]:
            raise utils.InputError(f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels, but {image_path} "
                                   f"has {image.shape[1]}x{image.shape[0]}; save both at one size")
        masks.append(mask)
    return image, np.stack(masks).astype(np.uint8)


def list_images(folder, extension):
    """Returns {name without extension: path} of the folder's images that have this extension."""
    endings = {f".{extension.lower().lstrip('.')}"} if extension else utils.IMAGES
    return utils.list_images(folder, endings, remedy="remove one, or give --img-ext or --mask-ext")


def find_items(data_path, args):
    """Returns [(name, image path, [mask path per class])] sorted by name, and the class names."""
    root = Path(data_path, "masks")
    images = list_images(Path(data_path, "images"), args.img_ext)
    if not images:
        raise utils.InputError(f"{data_path}/images: no images; give the folder that holds images/ and "
                               "masks/")
    folders = []
    if root.is_dir():
        folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
        folders.sort(key=lambda path: path.name.zfill(9) if path.name.isdigit() else path.name)
    if not folders and args.num_classes > 1:
        raise utils.InputError(f"{root}: holds no class folders, but --num-classes is "
                               f"{args.num_classes}; put each class's masks into masks/0, masks/1 ...")
    beside = utils.list_images(root) if folders else {}
    if beside:
        raise utils.InputError(f"{next(iter(beside.values()))}: lies beside class folders; move the "
                               f"masks of one class into {root}/0, or the folders away")
    folders = folders or [root]
    if len(folders) != args.num_classes:
        names = ", ".join(path.name for path in folders[:5])
        raise utils.InputError(f"{root}: {len(folders)} class folders ({names}); give --num-classes "
                               f"{len(folders)}")
    masks = [list_images(folder, args.mask_ext) for folder in folders]
    for folder, found in zip(folders, masks):
        for name in sorted(images.keys() ^ found.keys()):  # the first one is named
            path, other = images.get(name), folder
            if name not in images:
                path, other = found[name], Path(data_path, "images")
            raise utils.InputError(f"{path}: {other} has no image file of that name; add it or remove "
                                   "this one (.npy: --mask-ext npy)")
    items = [(name, images[name], [found[name] for found in masks]) for name in sorted(images)]
    return items, name_classes(root, folders)


def name_classes(root, folders):
    """Returns the folders' class names: line K, from 0, of masks/classes.txt for masks/K.

    A folder that the file does not name, or all if there is none, keep their own.
    """
    path, names = root / "classes.txt", {}
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise utils.InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
        names = {str(k): line.strip() for k, line in enumerate(lines) if line.strip()}
    names = [names.get(folder.name, folder.name) for folder in folders]
    files = [utils.nfc(utils.file_part(name)).casefold() for name in names]  # predict.py writes one each
    clashing = [name for name, file in zip(names, files) if files.count(file) > 1]
    if clashing:
        raise utils.InputError(f"{path if path.is_file() else path.parent}: classes {' and '.join(clashing)} "
                               "have one name in predict.py's files; give each another")
    return names


def check_item(item, whole):
    """Returns whether there is an object; if not `whole`, True if the sizes agree. InputError if bad."""
    if not whole and len({utils.image_size(path) for path in (item[1], *item[2])}) == 1:
        return True
    return bool(read_item(item)[1].any())


def create_loaders(args):
    """Returns training and validation loaders over checked items."""
    if args.demo and not args.data_path:
        args.data_path = utils.draw_demo("cells", Path(args.output_dir, "data"), 60)
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds images/ and masks/, or --demo")
    items, classes = find_items(args.data_path, args)
    val_items, val_classes = find_items(args.val_path, args) if args.val_path else (None, classes)
    if val_classes != classes and args.num_classes > 1:
        raise utils.InputError(f"{args.val_path}/masks: classes {val_classes}, but training has "
                               f"{classes}; use the same folders and classes.txt")
    train_items, val_items = utils.split_items(items, args, val_items)
    for part in [val_items] if args.test_only else [train_items, val_items]:
        if not any(utils.check_items(check_item, part, args)):
            raise utils.InputError(f"{part[0][2][0].parent}: none of {len(part)} masks has an object; "
                                   "look at them")
    train_set = MaskFolders(train_items, classes, args, train=True, augment=not args.overfit)
    val_set = MaskFolders(val_items, classes, args, train=False, augment=False)
    # Article: drops the last, smaller batch, so that few images train nothing. Here: all are seen.
    train_loader = utils.create_loader(train_set, args, shuffle=True,
                                       keep=count_trained(len(train_items), args))
    return train_loader, utils.create_loader(val_set, args, shuffle=False)


def count_trained(num_images, args):
    """Returns how many images an epoch trains on: the most that the processes share equally."""
    world_size = utils.ranks()[1]
    left_out = num_images % world_size
    if left_out and not (args.test_only or args.sanity_check):
        if num_images < world_size:
            raise utils.InputError(f"{args.data_path}: {num_images} training images for {world_size} "
                                   "processes; add some, or start fewer processes")
        print(f"note: {left_out} of {num_images} training images are left out of each epoch, others "
              "each time: no process may have more images than another")
    return num_images - left_out


def sanity_check(train_set, val_set, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_set), ("val", val_set)):
        sizes, pixels, total = Counter(), [], 0
        for item in dataset.items:
            mask = read_item(item)[1]
            sizes[f"{mask.shape[2]}x{mask.shape[1]}"] += 1
            pixels.append(mask.sum((1, 2), dtype=int))  # (K,)
            total += mask[0].size
        common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
        print(f"{part}: {len(dataset)} images, {common}")
        for name, found in zip(dataset.classes, np.transpose(pixels)):
            share, empty = found.sum() / total, (found == 0).sum()
            print(f"  class {name}: {share:.2%} of all pixels, {empty} images without it")
    rows = {}
    for index in range(min(8, len(train_set))):
        image, mask = read_item(train_set.items[index])
        seen, seen_mask, _ = train_set[0, index]
        seen = seen.permute(1, 2, 0) * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)
        if args.input_channels == 1:  # the mean of the normalised channels
            seen = seen.mean(2, keepdim=True).expand(-1, -1, 3)
        seen = np.ascontiguousarray((seen * 255).round().clamp(0, 255).byte())
        rows[train_set.items[index][0]] = [image, draw_mask(image, mask),
                                           draw_mask(seen, seen_mask.numpy() >= 0.5)]
    path = Path(args.output_dir, "sanity_check.png")
    legend = utils.class_tints(train_set.classes, 1)
    utils.save_panel(path, rows, ["image", "mask", "as trained"], legend)
    print(f"wrote {path}")
    return {"train": len(train_set), "val": len(val_set)}


# --- Model ---

def create_model(args, checkpoint=None):
    """Returns the net, with weights of checkpoint or --weights, and the arguments that rebuild it."""
    arch = {"num_classes": args.num_classes, "input_channels": args.input_channels}
    if args.model == "NestedUNet":
        arch["deep_supervision"] = args.deep_supervision
    elif args.deep_supervision:
        raise utils.InputError("--deep-supervision: only NestedUNet has the heads for it; give --arch "
                               "NestedUNet")
    model, arch = NETS[args.model](**arch), {"model": args.model, **arch}
    if checkpoint:
        check_net(checkpoint, f"--resume {args.resume}", {"net": "unet", **arch})
        load_weights(model, checkpoint["model"], f"--resume {args.resume}")
    elif args.weights != "none":
        free = () if args.test_only else ["num_classes"]
        state = read_weights(args.weights, {"net": "unet", **arch}, free)
        heads = ["final", "final1", "final2", "final3", "final4"]
        state, fresh = reset_mismatched_heads(model, state, heads)
        if fresh and args.test_only:
            raise utils.InputError(f"{args.weights}: other classes; give --num-classes as trained")
        if fresh:
            print(f"{args.weights}: {', '.join(fresh)} start fresh")
        load_weights(model, state, args.weights)
    return model, arch


# --- Loss ---

def criterion(outputs, mask, loss):
    """Returns the named loss, averaged over outputs (deep supervision) and the images of the batch.

    Logits (B, K, H, W), one tensor or a list, and mask (B, K, H, W) in [0, 1] -> scalar.
    """
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return sum(LOSSES[loss](logits, mask) for logits in outputs) / len(outputs)


def bce_dice_loss(logits, mask, smooth=1e-5):
    """Returns the mean over images of 0.5 * binary cross entropy + 1 - Dice (classes flattened together)."""
    prob, target = logits.sigmoid().flatten(1), mask.flatten(1)
    dice = (2 * (prob * target).sum(1) + smooth) / (prob.sum(1) + target.sum(1) + smooth)
    return 0.5 * F.binary_cross_entropy_with_logits(logits, mask) + 1 - dice.mean()


def lovasz_hinge_loss(logits, mask):
    """Returns the Lovasz hinge of each image, its classes flattened together, averaged.

    Berman et al. 2018, arXiv:1705.08790: hinge errors are weighed, largest first, by how much each
    further wrong pixel lowers the Jaccard index. It is defined for 0 and 1: mask is cut at half.
    """
    losses = []
    for score, target in zip(logits.flatten(1), (mask >= 0.5).to(mask).flatten(1)):
        errors, order = (1 - score * (2 * target - 1)).sort(descending=True)
        target = target[order]
        intersection = target.sum() - target.cumsum(0)
        union = target.sum() + (1 - target).cumsum(0)
        jaccard = 1 - intersection / union
        weight = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(errors.relu() @ weight)
    return torch.stack(losses).mean()


# Each: logits, mask (B, K, H, W) float32, in training with soft edges -> mean over images
LOSSES = {"BCEDiceLoss": bce_dice_loss, "LovaszHingeLoss": lovasz_hinge_loss,
          "BCEWithLogitsLoss": F.binary_cross_entropy_with_logits}


# --- Evaluation ---

def count_pixels(pred, mask):
    """Boolean pred and mask (B, K, H, W) -> (K, 3) pixels in both, in pred, in mask."""
    return torch.stack([(pred & mask).sum((0, 2, 3)), pred.sum((0, 2, 3)), mask.sum((0, 2, 3))], 1)


def scores(counts):
    """(..., K, 3) of count_pixels -> IoU and Dice (..., K); NaN where a class is in neither mask."""
    intersection, pred, true = counts.double().unbind(-1)
    return intersection / (pred + true - intersection), 2 * intersection / (pred + true)


@torch.no_grad()
def evaluate(model, loader, run, args):
    """Returns loss and scores in [0, 1] at the images' own size: nothing depends on the batch size.

    val_iou: pixels counted over the whole set, then the mean over classes. val_image_iou,
    val_image_dice: of each class in each image, then the mean, without those in neither mask.
    class_iou, class_dice: over the whole set.
    """
    model.eval()
    found = {}  # index: loss and counts of this process's images
    for images, masks, indices in utils.until_stopped(loader, "validating", run.device):
        logits = forward(model, images.to(run.device, non_blocking=run.pinned), run.dtype)[-1]
        for index, logit, mask in zip(indices, logits, masks):
            mask = mask[None].to(run.device)  # (1, K, H, W)
            logit = F.interpolate(logit[None], mask.shape[-2:], mode="bilinear")
            loss = criterion(logit, mask.float(), args.loss)
            found[index] = loss, count_pixels(logit > 0, mask > 0)
    found = {index: (loss.cpu(), counts.cpu()) for index, (loss, counts) in found.items()}
    losses, counts = zip(*utils.merge_over_ranks(found).values())
    counts = torch.stack(counts)  # (images, K, 3)
    (iou, dice), (image_iou, image_dice) = scores(counts.sum(0)), scores(counts)
    return {"val_loss": float(sum(losses)) / len(counts),
            "val_iou": iou.nanmean().item(),
            "val_image_iou": image_iou.nanmean().item(),
            "val_image_dice": image_dice.nanmean().item(),
            "class_iou": iou.tolist(), "class_dice": dice.tolist()}


def print_table(title, figures, classes):
    means = {key: value for key, value in figures.items() if isinstance(value, float)}
    print(title + "".join(f"  {key} {value:.4f}" for key, value in means.items()))
    for name, iou, dice in zip(classes, figures["class_iou"], figures["class_dice"]):
        print(f"  class {name} over the set: IoU {iou:.4f}  Dice {dice:.4f}")


def draw_mask(image, mask):
    """Tints mask (K, H, W) in a copy of the image (H, W, 3), one colour per class."""
    for k, class_mask in enumerate(mask, 1):
        image = utils.overlay(image, class_mask.astype(int) * k)
    return image


@torch.no_grad()
def draw_samples(model, dataset, run):
    """Draws val_samples.png: image | truth | prediction of the first four images."""
    model.eval()
    rows = {}
    for index in range(min(4, len(dataset))):
        image, mask = read_item(dataset.items[index])
        logits = forward(model, dataset[0, index][0][None].to(run.device), run.dtype)[-1]
        pred = F.interpolate(logits, mask.shape[-2:], mode="bilinear")[0].cpu().numpy() > 0
        rows[dataset.items[index][0]] = [image, draw_mask(image, mask), draw_mask(image, pred)]
    utils.save_panel(run.folder / "val_samples.png", rows, ["image", "truth", "prediction"],
                     utils.class_tints(dataset.classes, 1))


# --- Training ---

def create_optimizer(model, args):
    if args.nesterov and (args.optimizer == "Adam" or not args.momentum):
        raise utils.InputError("--nesterov: needs --optimizer SGD and --momentum above 0")
    if args.optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                fused=True)
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, nesterov=args.nesterov,
                           weight_decay=args.weight_decay, fused=True)


def learning_rate(args, epoch):
    """Returns the rate of epoch 0, 1 ...: by the options alone, so a resumed run may change --epochs."""
    if args.scheduler == "CosineAnnealingLR":
        floor = min(args.min_lr, args.lr)
        return floor + (args.lr - floor) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    if args.scheduler == "MultiStepLR":
        return args.lr * args.gamma ** sum(epoch >= milestone for milestone in args.milestones)
    return args.lr


def set_learning_rate(optimizer, args, epoch):
    """Sets the rate before each epoch; ReduceLROnPlateau has its own way, in main."""
    if args.scheduler != "ReduceLROnPlateau":
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch)


def train_one_epoch(model, loader, optimizer, run, args):
    """Trains for one pass over the training data, or the rest of a resumed one; run adds it up.

    run.steps: bar, signals, --save-every. run.finish_gradient: the mean over images, False if not finite.
    """
    model.train()
    for batches in run.steps(loader):  # the --accumulate batches of one optimizer step
        loss_sum, num_images, counts = 0.0, 0, 0
        for images, masks, _ in batches:
            images = images.to(run.device, non_blocking=run.pinned)
            masks = masks.to(run.device, non_blocking=run.pinned)
            outputs = forward(model, images, run.dtype)
            loss = criterion(outputs, masks, args.loss) * len(images)  # the sum over images
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            num_images += len(images)
            counts += count_pixels(outputs[-1] > 0, masks >= 0.5)
        if run.finish_gradient(optimizer, loss_sum, num_images):  # divides by num_images; False: not finite
            run.scaler.step(optimizer)
            run.progress["counts"] += utils.sum_over_ranks(counts).cpu()
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)


# --- Main ---

def main(args):
    """Trains as the options say; returns the last validation figures and the best val_iou."""
    args.image_size = (args.input_w or args.image_size[0], args.input_h or args.image_size[1])
    if args.depth and not (args.test_only and args.deep_supervision):
        raise utils.InputError("--depth: works only together with --test-only and --deep-supervision")
    run = utils.Run(args, net="unet")  # joins torchrun's processes; seeds; device, precision
    train_loader, val_loader = create_loaders(args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    if args.sanity_check:
        return sanity_check(train_set, val_set, args)

    model, arch = create_model(args, run.checkpoint)
    if args.sync_bn and run.device.type == "cuda" and args.world_size > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif args.sync_bn:
        print("note: --sync-bn: only has an effect on CUDA under torchrun")
    model = model.to(run.device, memory_format=memory_format(run.device, run.dtype))
    run.describe(args.model, model, train_set, val_set)
    if args.test_only:
        run.check_test(same=["image_size"])
        if args.depth:
            model.forward = functools.partial(model.forward, depth=args.depth)
        figures = evaluate(model, val_loader, run, args)
        print_table("test:", figures, val_set.classes)
        return figures

    optimizer = create_optimizer(model, args)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=args.factor, patience=args.patience, min_lr=args.min_lr)
    sums = {"counts": torch.zeros(args.num_classes, 3, dtype=torch.int64)}  # by count_pixels
    progress = run.start(arch, train_set, val_set, sums,
                         model=model, optimizer=optimizer, lr_scheduler=plateau)
    if args.compile:
        model.compile()

    figures = None
    with run.saved_when_stopped():  # SIGTERM, Ctrl-C
        while not run.is_over():    # --epochs, --early-stopping
            set_learning_rate(optimizer, args, progress["epoch"])
            train_one_epoch(model, train_loader, optimizer, run, args)
            figures = evaluate(model, val_loader, run, args)
            train_iou = scores(progress["counts"])[0].nanmean().item()
            run.end_epoch({"iou": train_iou, **figures},
                          show=["iou", "val_loss", "val_iou", "val_image_iou", "val_image_dice"])
            if args.scheduler == "ReduceLROnPlateau":
                plateau.step(figures["val_loss"])
            if run.is_best(figures["val_iou"]):
                run.save_best()
                run.save_plain("model.pth", model.state_dict())  # as the article
            run.save_last()
            run.plot_curves(["loss", "val_loss"], ["iou", "val_iou", "val_image_iou"])
            draw_samples(model, val_set, run)

    figures = figures or evaluate(model, val_loader, run, args)
    print_table(f"after epoch {progress['epoch']}:", figures, val_set.classes)
    run.finish("val_iou")
    if args.demo and args.data_path == str(run.folder / "data"):  # generated
        import demo_data
        figures["baseline_iou"] = demo_data.otsu_iou(map(read_item, val_set.items))
        print(f"Otsu's threshold on the same images: IoU {figures['baseline_iou']:.4f}")
    return {**figures, "best_val_iou": progress["best"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
