"""Fine-tune EfficientSAM on one's own masks, by boxes or clicks.   Article: 【Segment Anything Model】十三 EfficientSAM

    torchrun --nproc_per_node 2 train_efficientsam_ddp.py --demo
    torchrun --nproc_per_node 2 train_efficientsam_ddp.py --data-path data/npy --image-size 512 --resume auto

train_efficientsam.py on several devices or hosts; the files differ by what that takes, and by the article's defaults.
After a lost process torchrun itself starts again by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts 3 ...
--resume auto (without the variable the new processes wait for the lost one's address).

Data:   DATA_PATH/imgs/NAME.npy (H, W, 3) or (H, W), DATA_PATH/gts/NAME.npy (H, W) of any integer type: 0 background,
        each other number one object. Split 80:20 or --val-path.
Writes: OUTPUT_DIR/best.pth (best val_iou), last.pth (for --resume), log.csv, curves.png, val_samples.png (image with
        prompts | truth | prediction), split.json, args.json.
"""
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

import utils
from nets.efficient_sam import NETS

MASK_SIZE = 256  # side in pixels, at most, at which training compares masks, as the article; the decoder's own at 1024
WEIGHTS = {  # of the authors, who publish no hash: that every key and shape fits is the check
    "efficient_sam_vits": "https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vits.pt.zip",
    "efficient_sam_vitt": "https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vitt.pt",
}
DEMO = {"model": "demo", "weights": "none", "image_size": 128, "lr": 2e-3, "epochs": 14, "batch_size": 2, "workers": 0,
        "scheduler": "cosine", "bbox_shift": 5,
        "output_dir": "runs/train_efficientsam_ddp_demo"}
RESUME_FREE = ["resume", "weights", "data_path", "val_path", "split", "output_dir", "overwrite", "epochs",
               "early_stopping", "save_every", "workers", "device"]  # may differ when a run is continued


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    add, flag = parser.add_argument, {"nargs": "?", "const": True, "default": False, "type": utils.switch}
    add("--data-path", "-i", "--tr_npy_path", "-data_root", help="folder with imgs/ and gts/")
    add("--demo", **flag, help="train on drawn data with small settings")
    add("--sanity-check", "--sanity_check", **flag,
        help="read the whole data set, print counts, write sanity_check.png, train nothing")
    add("--limit", type=utils.number(int, 1), help="use only the first N items of each split")
    add("--overfit", type=utils.number(int, 1), help="train and validate on the same N items, without augmentation")
    add("--output-dir", "-work_dir", default="runs/train_efficientsam_ddp",
        help="folder for checkpoints, log and pictures (%(default)s)")
    add("--overwrite", **flag, help="replace a former run in --output-dir")
    add("--weights", "-pretrained_checkpoint",
        help=f"start from: none, a path, {' or '.join(WEIGHTS)} (official, fetched once; default: that of --model)")
    add("--resume", "-resume", help="continue a run: auto (from last.pth if it is there) or a path")
    add("--save-every", type=utils.number(int, 0), default=0, metavar="N",
        help="save last.pth every N steps too, 0 at the end of epochs only (%(default)s)")
    add("--epochs", "-num_epochs", type=utils.number(int, 1), default=1000,
        help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", "-batch_size", type=utils.number(int, 1), default=4,
        help="items a batch and process (%(default)s)")
    add("--accumulate", type=utils.number(int, 1), default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", "-lr", type=utils.number(float, 0), default=5e-4, help="initial learning rate (%(default)s)")
    add("--weight-decay", "--wd", "-weight_decay", type=utils.number(float, 0), default=0.01,
        help="weight decay (%(default)s)")
    add("-j", "--workers", "-num_workers", type=utils.number(int, 0), default=min(4, os.cpu_count()),
        help="loader processes, 0 for none (%(default)s)")
    add("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=41,
        help="of all that is random: weights, order, augmentation (%(default)s)")
    add("--deterministic", **flag, help="same bits on CUDA too, slower")
    add("--test-only", **flag, help="evaluate --weights or --resume, train nothing")
    add("--compile", **flag, help="torch.compile the net")
    add("--early-stopping", type=int, default=-1, metavar="N",
        help="stop after N epochs without a better val_iou, -1 never (%(default)s)")

    add("--model", choices=list(NETS), default="efficient_sam_vits", help="(%(default)s)")
    add("--image-size", type=utils.number(int, 64), default=1024,
        help="side in pixels at which the net sees a picture, a multiple of 16 (%(default)s)")
    add("--preprocess", choices=["official", "article"], default="official",
        help="official: stretched to a square, 0..1; article: ratio kept, padded, contrast stretched (%(default)s)")
    add("--max-objects", type=utils.number(int, 1), default=8,
        help="objects trained of each picture, drawn anew each epoch; the article: 1 (%(default)s)")
    add("--prompt", choices=["box", "point", "both"], default="box", help="what the net is told (%(default)s)")
    add("--bbox-shift", "-bbox_shift", type=utils.number(int, 0), default=10,
        help="training boxes' sides move by up to this, in or out, in pixels of a 256 pixel picture (%(default)s)")
    add("--data-aug", "--data_aug", **{**flag, "default": True}, help="flip left-right and up-down (%(default)s)")
    add("--multimask", choices=["min", "all"], default="min",
        help="train the best of the three masks, or, as the article, all on the same truth (%(default)s)")
    add("--seg-loss-weight", "-seg_loss_weight", type=utils.number(float, 0), default=1.0, help="of Dice (%(default)s)")
    add("--ce-loss-weight", "-ce_loss_weight", type=utils.number(float, 0), default=1.0,
        help="of cross entropy (%(default)s)")
    add("--iou-loss-weight", "-iou_loss_weight", type=utils.number(float, 0), default=1.0,
        help="of the squared error of the net's own IoU (%(default)s)")
    add("--scheduler", choices=["plateau", "cosine"], default="plateau",
        help="plateau: times 0.9 after 5 epochs without a lower training loss, as the article (%(default)s)")
    add("--clip-grad", type=utils.number(float, 0), default=0.0, help="largest gradient norm, 0 none (%(default)s)")
    add("--freeze", choices=["none", "encoder"], default="none", help="part that is not trained (%(default)s)")
    add("--gradient-checkpointing", **flag, help="less memory, a third more time")
    add("--val-path", help="folder of the same layout to validate on, instead of splitting 80:20")
    add("--split", help="split.json of another run to use, instead of splitting by --seed")
    add("--bucket-cap-mb", "-bucket_cap_mb", type=utils.number(int, 1), default=25,
        help="gradients sent at a time, MB (%(default)s)")
    add("-world_size", "-node_rank", "-init_method", dest="world_size", action=utils.Obsolete,
        help="no effect: give torchrun --nproc_per_node N, --nnodes, --rdzv-endpoint")
    add("-task_name", action=utils.Obsolete, help="no effect: --output-dir names the run")
    return parser


# --- Data ---

class NpyDataset(torch.utils.data.Dataset):
    """[(epoch, index)] -> dict of one picture: image, prompts and masks of Q objects, and its index.

    image (3, S, S) float32 in 0..1, S = --image-size; points (Q, N, 2) in its pixels (x, y) and labels (Q, N) as
    nets/efficient_sam.py wants them. Training: masks (Q, M, M) bool of up to --max-objects, M = min(S, MASK_SIZE);
    else ids (H, W) of the picture's own size, 1 to Q. valid (Q,): these are objects. A picture without any, which the
    start has not looked at, has one query that is none; index -1, with which processes keep step, has only such. What
    is random depends on (seed, epoch, index); in validation nothing is.
    """

    def __init__(self, items, args, train, augment):
        self.items, self.args, self.train, self.augment = items, args, train, augment

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key
        image, ids = read_item(self.items[index])
        args, objects = self.args, np.unique(ids[ids != 0])
        with utils.seeded(args.seed, epoch, index):
            if self.train:
                objects = objects[torch.randperm(len(objects))[:args.max_objects].numpy()]
            if self.augment and args.data_aug:
                for axis in (0, 1):
                    if torch.rand(()) < 0.5:
                        image, ids = np.flip(image, axis), np.flip(ids, axis)
            valid = torch.full((max(len(objects), 1),), len(objects) > 0 and index >= 0)
            objects = objects if len(objects) else np.zeros(1, int)
            points, labels = zip(*[draw_prompt(ids == k, args, self.augment) for k in objects])
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        height, width = placed_size(ids.shape, args)
        item = {"image": preprocess(image, args), "labels": torch.tensor(np.stack(labels)), "valid": valid,
                "points": torch.tensor(np.stack(points)) * torch.tensor([width / ids.shape[1], height / ids.shape[0]])}
        if self.train:
            return {**item, "masks": shrink(torch.from_numpy(ids == objects[:, None, None]), args), "index": index}
        return {**item, "ids": torch.from_numpy((np.searchsorted(objects, ids) + 1) * (ids > 0)), "index": index}


def draw_prompt(mask, args, vary):
    """Mask (H, W) bool -> points (N, 2) float32 in its pixels (x, y), labels (N): 2, 3 corners of a box, 1 a click."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    limit = np.array(mask.shape[::-1], np.float32) - 1
    points, labels = [], []
    if args.prompt in ("box", "both"):
        if vary:  # in or out and inside the picture; the article's boxes only grow, and may leave it
            inward = args.bbox_shift * max(mask.shape) / 256 * (2 * torch.rand(4).numpy() - 1)
            inward = np.minimum(inward, np.tile(box[2:] - box[:2], 2) / 4)  # half of a small object's box is left
            box = (box + inward * [1, 1, -1, -1]).reshape(2, 2).clip(0, limit).ravel().astype(np.float32)
        points, labels = [*box.reshape(2, 2)], [2, 3]
    if args.prompt in ("point", "both"):
        if vary:
            inside = np.argwhere(mask)
            y, x = inside[torch.randint(len(inside), ()).item()]
        else:  # the place farthest from the rim
            depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
        points, labels = [*points, np.array([x, y], np.float32)], [*labels, 1]
    return np.stack(points), np.array(labels)


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


def shrink(masks, args):
    """Masks (Q, H, W) bool of the picture -> (Q, M, M) bool, placed as in the net's square, none of them empty."""
    whole = min(MASK_SIZE, args.image_size)
    size = [max(1, round(side * whole / args.image_size)) for side in placed_size(masks.shape[1:], args)]
    soft = v2.functional.resize(masks.float(), size, antialias=True)
    soft = soft >= soft.flatten(1).max(1).values.clamp(max=0.5)[:, None, None]  # the most covered pixel is always kept
    return F.pad(soft, (0, whole - size[1], 0, whole - size[0]))


def read_arrays(item, mmap_mode=None):
    """(name, image path, mask path) -> the arrays as stored, of one height and width; or InputError."""
    _, image_path, path = item
    image, ids = utils.read_pixels(image_path, mmap_mode), utils.read_npy(path, mmap_mode)
    if ids.shape != image.shape[:2]:
        raise utils.InputError(f"{path}: has shape {ids.shape}, but {image_path} has {image.shape}; masks are (H, W)")
    return image, ids


def read_item(item):
    """(name, image path, mask path) -> image (H, W, 3) uint8 RGB, ids (H, W) int64; or InputError."""
    _, image_path, path = item
    image, ids = read_arrays(item)
    if (ids.dtype.kind == "f" and (ids != np.round(ids)).any()) or ids.min() < 0:
        raise utils.InputError(f"{path}: ids must be whole and not negative; 0 is background, each other an object")
    return utils.to_rgb(image, image_path), ids.astype(np.int64)


def find_items(data_path):
    """[(name, image path, mask path)] sorted by name; or InputError."""
    found = []
    for sub in ("imgs", "gts"):
        folder = Path(data_path, sub)
        if not folder.is_dir():
            raise utils.InputError(f"{folder}: no such folder; give --data-path the folder that holds imgs/ and gts/")
        found.append({path.stem: path for path in sorted(folder.glob("*.npy")) if path.name[0] != "."})
    images, masks = found
    if not images:
        raise utils.InputError(f"{data_path}/imgs: no .npy files; give the folder that holds imgs/ and gts/")
    for name in sorted(images.keys() ^ masks.keys()):
        path, other = (images[name], "gts") if name in images else (masks[name], "imgs")
        raise utils.InputError(f"{path}: {data_path}/{other} has no file of that name; add it or remove this one")
    return [(name, images[name], masks[name]) for name in sorted(images)]


def split_items(items, args):
    """Training and validation items: by --val-path, by --split, or 80:20 by --seed."""
    if args.val_path:
        return items, find_items(args.val_path)
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


def check_items(items, num_pixels, part):
    """Shapes of all items, pixels of the first num_pixels; InputError names the first file that is unfit.

    Returns them without those in which no object was found, which are counted aloud.
    """
    kept = []
    for i, item in enumerate(tqdm(items, "checking", leave=False, disable=utils.quiet())):
        utils.check_stop()
        if i >= num_pixels:
            read_arrays(item, "r")
        if i >= num_pixels or read_item(item)[1].any():
            kept.append(item)
    if len(kept) < len(items):
        print(f"note: {len(items) - len(kept)} of {len(items)} {part} pictures have no object and are left out")
    if not kept:
        raise utils.InputError(f"{items[0][2].parent}: none of {len(items)} masks has an object (an id above 0)")
    return kept


def create_loaders(args, rank=0, world_size=1):
    """Training and validation loaders over checked items, of this process's share."""
    if args.demo and not args.data_path:
        args.data_path = str(utils.draw_demo("objects", Path(args.output_dir, "data"), 200))
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds imgs/ and gts/, or --demo")
    train_items, val_items = [part[:args.limit] for part in split_items(find_items(args.data_path), args)]
    both = {item[1] for item in train_items} & {item[1] for item in val_items}
    if both or not train_items or not val_items:
        raise utils.InputError(f"{args.split or args.val_path}: {len(train_items)} training and {len(val_items)} "
                               f"validation pictures, {len(both)} in both; give some to each, none to both")
    if args.overfit:
        train_items = val_items = train_items[:args.overfit]
    train_items, val_items = [check_items(items, len(items) if args.sanity_check else 2000, part)
                              for items, part in ((train_items, "training"), (val_items, "validation"))]
    train_set = NpyDataset(train_items, args, train=True, augment=not args.overfit)
    val_set = NpyDataset(val_items, args, train=False, augment=False)
    return [torch.utils.data.DataLoader(
        dataset, args.batch_size if dataset.train else 1,
        sampler=utils.EpochSampler(len(dataset), args.seed, dataset.train, rank, world_size, pad=dataset.train),
        num_workers=args.workers, worker_init_fn=utils.outlive_signals, collate_fn=collate if dataset.train else None,
        pin_memory=utils.pick_device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(args.seed)) for dataset in (train_set, val_set)]


def collate(batch):
    """Stacked dict of training; a picture with fewer objects is filled up with queries that say nothing."""
    most = max(len(one["masks"]) for one in batch)
    for one in batch:
        extra = most - len(one["masks"])
        one["valid"] = F.pad(one["valid"], (0, extra))
        one["points"] = F.pad(one["points"], (0, 0, 0, 0, 0, extra), value=-1.0)
        one["labels"] = F.pad(one["labels"], (0, 0, 0, extra), value=-1)
        one["masks"] = F.pad(one["masks"], (0, 0, 0, 0, 0, extra))
    return {key: [one[key] for one in batch] if key == "index" else torch.stack([one[key] for one in batch])
            for key in batch[0]}


def sanity_check(train_loader, val_loader, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_loader.dataset), ("val", val_loader.dataset)):
        sizes, objects, shares = Counter(), [], []
        for item in dataset.items:
            ids = read_item(item)[1]
            counts = np.unique(ids[ids != 0], return_counts=True)[1]
            sizes[f"{ids.shape[1]}x{ids.shape[0]}"] += 1
            objects.append(len(counts))
            shares.extend(counts / ids.size)
        print(f"{part}: {len(dataset)} images, " + ", ".join(f"{n} of {size}" for size, n in sizes.most_common(5)))
        print(f"  {sum(objects)} objects, {min(objects)} to {max(objects)} an image; share of the image "
              f"{min(shares):.3%} to {max(shares):.3%}, half below {np.median(shares):.3%}")
    dataset, rows = train_loader.dataset, {}
    for index in range(min(8, len(dataset))):
        image, ids = read_item(dataset.items[index])
        item = dataset[0, index]
        seen = np.ascontiguousarray((item["image"].permute(1, 2, 0) * 255).byte().numpy())
        masks = F.interpolate(item["masks"][None].float(), seen.shape[:2])[0].numpy()
        trained = (masks * np.arange(1, len(masks) + 1)[:, None, None]).max(0).astype(int)
        rows[dataset.items[index][0]] = [image, utils.overlay(image, color_ids(ids)), draw_prompts(
            utils.overlay(seen, color_ids(trained)), item["points"].numpy(), item["labels"].numpy())]
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    utils.save_panel(Path(args.output_dir, "sanity_check.png"), rows, ["image", "objects", "as trained, with prompts"])
    print(f"wrote {args.output_dir}/sanity_check.png")
    return {"train": len(train_loader.dataset), "val": len(val_loader.dataset)}


def color_ids(ids):
    """Ids of any size -> 1..20, and 0, for drawing."""
    return np.where(ids > 0, (ids - 1) % 20 + 1, 0)


def draw_prompts(image, points, labels):
    """Image (H, W, 3) uint8 with boxes and clicks (Q, N, 2), labels (Q, N), drawn into it."""
    image = image.copy()
    for query, kinds in zip(points, labels):
        corners = [tuple(int(v) for v in point) for point, kind in zip(query, kinds) if kind in (2, 3)]
        if corners:
            cv2.rectangle(image, *corners, (255, 255, 0), max(1, len(image) // 300))
        for point in query[kinds == 1]:
            cv2.circle(image, [int(v) for v in point], max(2, len(image) // 100), (255, 255, 0), -1)
    return image


# --- Model ---

def create_model(args, checkpoint=None):
    """The net, with the weights of a checkpoint or of --weights, and the arguments that make it again."""
    arch = {"model": args.model, "image_size": args.image_size}
    model = NETS[args.model](args.image_size)
    if checkpoint:
        utils.check_net(checkpoint, f"--resume {args.resume}", {"net": "efficient_sam", **arch})
        model.load_state_dict(checkpoint["model"])
    elif args.weights != "none":
        path = fetch_official(args.weights, WEIGHTS[args.weights]) if args.weights in WEIGHTS else args.weights
        utils.load_weights(model, utils.read_weights(path, {"net": "efficient_sam", **arch}), path)
    model.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(False)  # of the mask that is never asked for
    if args.freeze == "encoder":
        model.image_encoder.requires_grad_(False)
    model.image_encoder.gradient_checkpointing = args.gradient_checkpointing
    return model, arch


def fetch_official(name, url):
    """Path of the authors' file; that of the larger net comes in a zip, and is unpacked beside it."""
    path = utils.fetch_weights(name, url)
    return utils.unzip(path, f"{name}.pt") if path.suffix == ".zip" else path


# --- Loss ---

def criterion(logits, iou, masks, valid, args):
    """Sum over the objects of Dice + cross entropy of the best mask (or all) + squared error of the net's own IoU.

    Logits (B, Q, 3, M, M), iou (B, Q, 3), masks (B, Q, M, M) bool, valid (B, Q) bool -> scalar. Each mask has its own
    Dice and its own IoU; the article's MONAI call sees three masks as one volume, and its IoU is one of all three.
    """
    target = masks[:, :, None].float().expand_as(logits)
    dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")(
        logits.flatten(0, 2)[:, None], target.flatten(0, 2)[:, None]).reshape(iou.shape)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-2, -1))
    loss = args.seg_loss_weight * dice + args.ce_loss_weight * entropy  # (B, Q, 3)
    loss = loss.min(-1).values if args.multimask == "min" else loss.mean(-1)
    error = (iou - mask_iou(logits > 0, masks[:, :, None])).square().mean(-1)
    return ((loss + args.iou_loss_weight * error) * valid).sum()


def mask_iou(pred, mask):
    """Boolean masks (..., H, W) -> IoU (...); 0 where both are empty."""
    both = (pred & mask).sum((-2, -1))
    return both / (pred | mask).sum((-2, -1)).clamp(min=1)


# --- Evaluation ---

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


@torch.no_grad()
def evaluate(model, loader, device, dtype, args):
    """Means over all objects, in [0, 1], at the pictures' own size, from boxes and clicks that nothing has moved.

    val_iou, val_dice: of the mask that the net thinks best; val_oracle_iou: of the best of its three; val_iou_error:
    how far its own guess of the IoU is off; box_iou: of the filled box, which all of this has to beat.
    """
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64)
    for batch in tqdm(loader, "validating", leave=False, disable=utils.quiet()):
        if utils.stop_asked():
            break
        if not batch["valid"].any():
            continue
        image, points, labels, ids = (batch[key].to(device) for key in ("image", "points", "labels", "ids"))
        for first, logits, guess in predict_masks(model, image, points, labels, ids.shape[-2:], args, dtype):
            truth = ids == torch.arange(first + 1, first + 1 + len(guess), device=device)[:, None, None]
            iou = mask_iou(logits > 0, truth[:, None])  # (q, 3)
            best = guess.argmax(1, keepdim=True)
            chosen = iou.gather(1, best)[:, 0]
            error = (guess.gather(1, best)[:, 0] - chosen).abs()
            sums += torch.stack([chosen, 2 * chosen / (1 + chosen), iou.max(1).values, error, box_iou(truth),
                                 torch.ones_like(chosen)]).cpu().double().sum(1)
    utils.check_stop(device)
    sums = utils.sum_over_ranks(sums.to(device)).cpu() if args.world_size > 1 else sums
    names = ("val_iou", "val_dice", "val_oracle_iou", "val_iou_error", "box_iou")
    return dict(zip(names, (sums[:5] / sums[5]).tolist()))


def box_iou(masks):
    """Boolean masks (Q, H, W) -> IoU of each with its own filled box."""
    x0, y0, x1, y1 = masks_to_boxes(masks).unbind(1)
    return masks.sum((1, 2)) / ((x1 - x0 + 1) * (y1 - y0 + 1))


def print_table(title, figures):
    print(title + "".join(f"  {key} {value:.4f}" for key, value in figures.items()))


@torch.no_grad()
def draw_samples(model, dataset, device, dtype, path):
    """val_samples.png: image with prompts | truth | prediction of the first four pictures."""
    model.eval()
    rows = {}
    for index in range(min(4, len(dataset))):
        image, ids = read_item(dataset.items[index])
        item, pred = dataset[0, index], np.zeros(ids.shape, int)
        inputs = [item[key][None].to(device) for key in ("image", "points", "labels")]
        for first, logits, guess in predict_masks(model, *inputs, ids.shape, dataset.args, dtype):
            best = torch.take_along_dim(logits, guess.argmax(1)[:, None, None, None], 1)[:, 0]
            for k, mask in enumerate((best > 0).cpu().numpy(), first + 1):
                pred[mask] = k
        height, width = placed_size(ids.shape, dataset.args)
        points = item["points"].numpy() / [width / ids.shape[1], height / ids.shape[0]]
        rows[dataset.items[index][0]] = [draw_prompts(image, points, item["labels"].numpy()),
                                         utils.overlay(image, color_ids(item["ids"].numpy())),
                                         utils.overlay(image, color_ids(pred))]
    utils.save_panel(path, rows, ["image, prompts", "truth", "prediction"])


# --- Training ---

def create_optimizer(model, args):
    """AdamW that shrinks matrices only: prompts that this data never gives have no gradient to hold theirs up."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    groups = {True: [], False: []}  # shrunk or not
    for p in model.parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and id(p) not in embeddings].append(p)
    return torch.optim.AdamW([{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}], args.lr,
                             weight_decay=args.weight_decay, fused=True)


def learning_rate(args, epoch):
    """Of epoch 0, 1, ... by --scheduler cosine; stateless, so that --epochs may grow on resuming."""
    return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def new_epoch(args):
    """What an epoch sums up as it goes; part of every checkpoint."""
    return {"step": 0, "images": 0, "loss": 0.0, "objects": 0, "skipped": 0}


def train_one_epoch(model, loader, optimizer, scaler, device, dtype, args, state, save):
    """Trains what is left of epoch state["epoch"] after state["step"] steps, and keeps state up to date."""
    model.train()
    images_a_step = args.batch_size * args.accumulate
    loader.sampler.set_epoch(state["epoch"], skip=state["step"] * images_a_step)
    left = len(loader.sampler)
    bar = tqdm(total=state["step"] + math.ceil(left / images_a_step), initial=state["step"],
               desc=f"epoch {state['epoch'] + 1}", leave=False, disable=utils.quiet())
    names = []  # of the pictures in the gradient so far
    for batch in loader:
        if not names:
            pending, loss_sum, objects = min(images_a_step, left), 0.0, 0
        image, points, labels, masks, valid = (batch[key].to(device, non_blocking=True) for key in (
            "image", "points", "labels", "masks", "valid"))
        names += [loader.dataset.items[index][0] for index in batch["index"]]
        model.require_backward_grad_sync = len(names) == pending  # else --accumulate: no need to talk yet
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits, iou = model(image, points, labels, False)
        logits = logits.float()
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = F.interpolate(logits.flatten(0, 1), masks.shape[-2:], mode="bicubic",
                                   align_corners=False).unflatten(0, logits.shape[:2])
        loss = criterion(logits, iou.float(), masks, valid, args)
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
        objects += valid.sum()
        if len(names) < pending:  # --accumulate
            continue

        # The gradient is the mean over the step's objects, however they lie in batches and processes
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        loss_sum, objects = utils.sum_over_ranks(torch.stack([loss_sum, objects]))
        torch._foreach_mul_(gradients, args.world_size / objects.clamp(min=1))  # DistributedDataParallel took the mean
        norm = torch.nn.utils.get_total_norm(gradients)
        if args.clip_grad:
            torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], args.clip_grad,
                                                 norm)
        # One NaN would spoil the weights for good: such a step is undone
        if torch.isfinite(loss_sum + norm):
            scaler.step(optimizer)
            state["bad_steps"] = 0
            state["images"] += pending
            state["loss"] += loss_sum.item()
            state["objects"] += int(objects)
        else:
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
        bar.set_postfix(loss=f"{state['loss'] / max(state['objects'], 1):.4f}", refresh=False,
                        lr=f"{optimizer.param_groups[0]['lr']:.2g}", mem=f"{utils.peak_memory_mb(device):.0f}M")
        bar.update()
        utils.check_stop(device)
        if args.save_every and state["step"] % args.save_every == 0:
            save("last.pth")
    bar.close()


# --- Main ---

def main(args):
    """Trains as args say; returns the last validation figures, those before training and the best val_iou."""
    args.weights = args.weights or (args.model if args.model in WEIGHTS else "none")
    output_dir = Path(args.output_dir)
    if args.image_size % 16:
        raise utils.InputError(f"--image-size {args.image_size}: must be a multiple of 16")
    rank, args.world_size, device = utils.start_process_group(utils.pick_device(args.device))
    if args.world_size == 1:
        print("note: a single process; for several: torchrun --nproc_per_node N train_efficientsam_ddp.py ...")
    utils.seed_everything(args.seed, args.deterministic)
    if args.deterministic and device.type == "cuda":
        raise utils.InputError("--deterministic: bicubic resizing has no deterministic gradient on CUDA; leave it out")
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
    model = model.to(device)
    optimizer = create_optimizer(model, args)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=5)
    state = {"epoch": 0, "best": {"val_iou": -1.0, "epoch": 0}, "before": {}, "bad_steps": 0, **new_epoch(args)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.model}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained; "
          f"{len(train_set)} train and {len(val_set)} val images (data hash {args.data_hash}); {device} x "
          f"{args.world_size}, {dtype or torch.float32}, torch {torch.__version__}")
    if args.test_only:
        if (args.weights == "none" or args.resume) and not checkpoint:
            raise utils.InputError("--test-only: nothing to test; give --weights or --resume a checkpoint")
        trained_with = checkpoint or ({} if args.weights in WEIGHTS else utils.load_checkpoint(args.weights))
        trained_with = trained_with.get("args", {})
        for option in ("preprocess", "prompt"):
            if trained_with.get(option, getattr(args, option)) != getattr(args, option):
                raise utils.InputError(f"--{option} {getattr(args, option)}: trained with {trained_with[option]}")
        if trained_with.get("data_hash", args.data_hash) != args.data_hash:
            print("note: other pictures or another split than in training: some may have been trained on")
        figures = evaluate(model, val_loader, device, dtype, args)
        print_table("test:", figures)
        return figures
    if checkpoint:
        utils.check_resume(checkpoint, args, RESUME_FREE)
        optimizer.load_state_dict(checkpoint["optimizer"])
        plateau.load_state_dict(checkpoint["lr_scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        state = {key: checkpoint[key] for key in state}
        utils.set_rng_state(checkpoint["rng"], rank)
        print(f"resumed in epoch {state['epoch'] + 1} after step {state['step']}")
    split = {"train": [item[0] for item in train_set.items], "val": [item[0] for item in val_set.items]}
    if rank == 0:
        utils.start_run(args, split)
    if args.compile:
        model.compile()
    net = model if args.world_size == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, bucket_cap_mb=args.bucket_cap_mb)

    def save(name):
        rng = utils.rng_state()
        if rank:  # whose generators the first process now has
            return
        utils.save_checkpoint(output_dir / name, {
            "format": 1, "net": "efficient_sam", "arch": arch, "classes": [], "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "lr_scheduler": plateau.state_dict(),
            "scaler": scaler.state_dict(), "rng": rng, "args": vars(args), **state})

    if not state["before"]:  # what the starting weights can do: the row that fine-tuning has to beat
        save("last.pth")
        state["before"] = evaluate(model, val_loader, device, dtype, args)
        state["best"] = {"val_iou": state["before"]["val_iou"], "epoch": 0}
        save("best.pth")
    print_table("before training:", state["before"])
    figures = None
    while state["epoch"] < args.epochs:
        if 0 < args.early_stopping <= state["epoch"] - state["best"]["epoch"]:
            print(f"early stopping: no better val_iou in {args.early_stopping} epochs")
            break
        if args.scheduler == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, state["epoch"])
        started, images_before = time.perf_counter(), state["images"]
        try:
            train_one_epoch(net, train_loader, optimizer, scaler, device, dtype, args, state, save)
            seconds = time.perf_counter() - started
            figures = evaluate(model, val_loader, device, dtype, args)
        except utils.Stopped:
            save("last.pth")
            raise
        row = {"epoch": state["epoch"] + 1, "step": (state["epoch"] + 1) * state["step"],
               "lr": optimizer.param_groups[0]["lr"], "loss": state["loss"] / (state["objects"] or math.nan), **figures,
               "skipped": state["skipped"], "seconds": seconds,
               "images_per_s": (min(args.world_size * state["images"], len(train_set))  # without those that fill up
                                - args.world_size * images_before) / seconds,
               "peak_mb": utils.peak_memory_mb(device)}
        print(f"epoch {state['epoch'] + 1}/{args.epochs}  " + "  ".join(f"{key} {row[key]:.4g}" for key in (
            "lr", "loss", "val_iou", "val_dice", "val_oracle_iou", "val_iou_error")) + f"  {seconds:.1f} s")
        if state["skipped"]:
            print(f"  {state['skipped']} of {state['step']} steps skipped: loss or gradient not finite")
        state.update(epoch=state["epoch"] + 1, **new_epoch(args))
        if args.scheduler == "plateau":
            plateau.step(row["loss"])
        rows = utils.log_row(output_dir / "log.csv", row) if rank == 0 else []
        if figures["val_iou"] > state["best"]["val_iou"]:
            state["best"] = {"val_iou": figures["val_iou"], "epoch": state["epoch"]}
            save("best.pth")
        save("last.pth")
        if rank:
            continue
        utils.plot_curves(output_dir / "curves.png", rows, ["loss"], ["val_iou", "val_oracle_iou", "box_iou"],
                          ["seconds"])
        draw_samples(model, val_set, device, dtype, output_dir / "val_samples.png")

    figures = figures or evaluate(model, val_loader, device, dtype, args)
    print_table("before training: ", state["before"])
    print_table(f"after epoch {state['epoch']}:", figures)
    print(f"best val_iou {state['best']['val_iou']:.4f} in epoch {state['best']['epoch']}: {output_dir}/best.pth")
    print(f"filled boxes of the same objects: IoU {figures['box_iou']:.4f}")
    if args.demo:
        print("wrote " + " ".join(map(str, sorted(output_dir.glob("*.*")))))
    return {**figures, "before": state["before"], "best_val_iou": state["best"]["val_iou"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
