"""Fine-tune SAM's mask decoder on one's own objects.   Article: Segment-anything学习到微调系列3_SAM微调decoder

    python finetune_sam_decoder.py --demo
    python finetune_sam_decoder.py --data-path data --weights vit_b --epochs 20

The image encoder is frozen, unless --train all: it looks at each image once (with --flip twice),
and its embedding is kept on disk.
Data:   DATA_PATH/VOCdevkit/VOC2007/ with JPEGImages/ID.jpg, SegmentationObject/ID.png (0 background,
        each other number one object, 255 void: ignored by prompts, loss and metrics), optionally
        SegmentationClass/ID.png and class_names.json for figures of each class, and
        ImageSets/Segmentation/train.txt and val.txt (one ID per line).
Writes: OUTPUT_DIR/best.pth (best val_box_iou) and last.pth (for --resume), both without the frozen
        parts; decoder.pth (the best decoder alone, as the article), log.csv, curves.png,
        val_samples.png (image with prompts | truth | by box | by click), split.json, args.json.
        --cache-dir: the embeddings, one file per image.
Parts:  the article's, and here: CustomDataset = VOCObjects; custom_collate = collate; set_image,
        get_image_embedding = encode, cache_embeddings; get_random_prompts = sample_prompts;
        mask2one_hot = read_ids, cover; the two calls of mask_decoder = two_passes; BCEseg,
        soft_dice_loss = criterion; postprocess_masks = enlarge; saving the decoder = save_decoder.
"""
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

import utils
from nets.embeddings import keep_embeddings, load_embedding
from nets.sam import BOTH, BOX, NETS, PIXEL_MEAN, PIXEL_STD, POINTS, WEIGHTS, decode, encode, enlarge
from nets.sam import hash_frozen, preprocess, resized_size, two_passes
from nets.weights import check_net, load_sam, load_weights

VOID = 255
PREPROCESS = "antialiased"  # change it when `preprocess` changes: embeddings are then made again
CLICKS = (1, 3, 5)  # how many clicks the figures of evaluate are for; main names some of them
PROMPT_COLOURS = {"box": (255, 255, 0), "click on the object": (0, 255, 0),
                  "click on the background": (255, 0, 0)}
DEMO = {"model": "demo", "amp": "off", "image_size": 192, "lr": 1e-3, "epochs": 10, "batch_size": 4,
        "workers": 0, "year": "2012", "output_dir": "runs/finetune_sam_decoder_demo"}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    parser.add_run_options(output_dir="runs/finetune_sam_decoder")  # --demo, --resume, --device ...
    add, add_switch = parser.add_argument, parser.add_switch
    positive, non_negative = utils.number(int, 1), utils.number(float, 0)
    add("--data-path", "--data", help="folder that holds VOCdevkit/, or VOCdevkit itself")
    add("--save-dir", dest="output_dir", metavar="DIR", help="the same as --output-dir, as in the article")
    add("--year", default="2007", help="of the folder VOCdevkit/VOC2007 (%(default)s)")
    add("--train-set", default="train", help="list in ImageSets/Segmentation (%(default)s)")
    add("--val-set", default="val", help="list in ImageSets/Segmentation (%(default)s)")
    add("--keep-path", help="a second data set; its --val-set is evaluated before and after, to see "
                            "what was forgotten")
    add("--masks", choices=["object", "class"], default="object",
        help="SegmentationObject, or SegmentationClass: each class is one object (%(default)s)")
    add("--image-size", type=utils.number(int, 64), default=1024,
        help="side in pixels at which the net sees an image, a multiple of 16 (%(default)s)")
    add("--max-objects", type=positive, default=8,
        help="objects trained per image, drawn anew each epoch (%(default)s)")
    add_switch("--point-prompt", default=True, help="train with clicks (%(default)s)")
    add_switch("--box-prompt", default=True, help="train with boxes (%(default)s)")
    add("--points", type=positive, default=1, help="clicks on each object (%(default)s)")
    add("--background-points", type=utils.number(int, 0),
        help="background clicks (half as many as --points, at least 1)")
    add("--bbox-shift", type=utils.number(int, 0), default=5,
        help="training boxes' sides move by up to this, in or out, in pixels of a 256 pixel image")
    add_switch("--flip", help="train on mirrored images half the time; twice the embeddings")
    add("--cache-dir", help="folder of the embeddings (embeddings/ beside --output-dir)")
    add_switch("--no-cache", help="keep no embeddings: encode each image in each epoch")

    add("--model", "--model-type", "--type", choices=list(NETS), default="vit_b", help="(%(default)s)")
    add("--weights", "--sam-weights", "--w",
        help=f"start from: none, a path, {', '.join(WEIGHTS)} (official; default: that of --model)")
    add("--train", choices=["decoder", "token", "all"], default="decoder",
        help="token: only mask tokens, their MLPs and the IoU head, which forgets less; all: the whole "
             "net (%(default)s)")

    add("--epochs", type=positive, default=100, help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", type=positive, default=1,
        help="images per batch and process (%(default)s)")
    add("--accumulate", type=positive, default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", type=non_negative, default=1e-4, help="initial learning rate (%(default)s)")
    add("--min-lr", type=non_negative, default=1e-7, help="final learning rate (%(default)s)")
    add("--weight-decay", "--wd", type=non_negative, default=5e-4, help="weight decay (%(default)s)")
    return parser


# --- Data ---

class VOCObjects(torch.utils.data.Dataset):
    """[(epoch, index)] -> one image and its objects.

    Training: features, points, labels, boxes, kinds, masks, weight, index of Q drawn objects.
    features: the embedding (D, E, E) in half precision or, where none is kept, the image (3, S, S)
    float32. points (Q, N, 2) in pixels of the net's square (x, y), labels (Q, N) 1 object, 0
    background; boxes (Q, 4); kinds (Q,): POINTS, BOX or BOTH count. masks (Q, M, M): the share of
    each cell of the decoder's mask that the object covers; weight (M, M): 0 for void and padding.
    Validation: features, ids, index; ids (H, W) of the image's own size as of read_ids.
    Random draws depend on (seed, epoch, index) alone.
    """
    classes = []  # objects have none

    def __init__(self, items, class_names, args, train, augment):
        self.items, self.class_names, self.args = items, class_names, args
        self.train, self.augment = train, augment
        self.embeddings = {}  # (index, mirrored): file, once cache_embeddings has made it

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key
        args, ids = self.args, read_ids(self.items[index])
        if not self.train:
            return self.features(index, False), torch.from_numpy(ids), index
        with utils.seeded(args.seed, epoch, index):
            mirrored = self.augment and args.flip and bool(torch.rand(()) < 0.5)
            if mirrored:
                ids = ids[:, ::-1].copy()
            objects = 1 + torch.randperm(max(ids.max(), 0))[:args.max_objects]
            objects = objects[:0] if index < 0 else objects  # -1 only fills up the last batch
            points, labels, boxes, kinds = sample_prompts(ids, objects.tolist(), args, self.augment)
        height, width = resized_size(*ids.shape, args.image_size)
        scale = torch.tensor([width / ids.shape[1], height / ids.shape[0]])
        masks, weight = cover(torch.from_numpy(ids), objects, args)
        boxes = boxes * scale.repeat(2)
        return (self.features(index, mirrored), points * scale, labels, boxes, kinds, masks, weight,
                index)

    def features(self, index, mirrored):
        if self.embeddings:
            return load_embedding(self.embeddings[index % len(self), mirrored])
        return read_input(self.items[index], mirrored, self.args)

    @staticmethod
    def collate(batch):
        """Puts the objects of all images in a row; `owner`: which of the batch's images each is of."""
        if len(batch[0]) == 3:  # validation, one image
            ((features, ids, index),) = batch
            return features[None], ids[None], [index]
        features, points, labels, boxes, kinds, masks, weight, indices = zip(*batch)
        owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(kinds)])
        objects = map(torch.cat, (points, labels, boxes, kinds, masks))
        return torch.stack(features), owner, *objects, torch.stack(weight), indices


def sample_prompts(ids, objects, args, vary):
    """ids (H, W), Q numbers -> points (Q, N, 2) (x, y), labels (Q, N), boxes (Q, 4), kinds (Q,).

    In pixels of the image. Void is neither clicked on nor boxed. With vary, boxes move in or out,
    inside the image, and half the time one of the two kinds is dropped, each equally likely.
    """
    background = args.background_points
    if background is None:
        background = max(1, args.points // 2)
    points = torch.zeros(len(objects), args.points + background, 2)
    labels, boxes = torch.zeros(points.shape[:2], dtype=torch.long), torch.zeros(len(objects), 4)
    both = args.point_prompt and args.box_prompt
    kind = BOX if args.box_prompt else POINTS
    kinds = torch.full((len(objects),), BOTH if both else kind)
    for i, number in enumerate(objects):
        mask = ids == number
        beside = (ids >= 0) & ~mask
        points[i, :args.points] = sample_points(mask, args.points)
        labels[i, :args.points] = 1
        if beside.any():
            points[i, args.points:] = sample_points(beside, background)
        else:
            labels[i, args.points:] = -1  # padding
        box = masks_to_boxes(torch.from_numpy(mask[None]))[0]
        if vary:
            inward = args.bbox_shift * max(ids.shape) / 256 * (2 * torch.rand(4) - 1)
            inward = inward.minimum((box[2:] - box[:2]).repeat(2) / 4)  # half of a small box stays
            box = box + inward * torch.tensor([1, 1, -1, -1])
        height, width = ids.shape
        boxes[i] = box.clamp(min=torch.zeros(4), max=torch.tensor([width, height] * 2) - 1)
        if vary and both and torch.rand(()) < 0.5:
            kinds[i] = (POINTS, BOX)[torch.randint(2, ())]
    return points, labels, boxes, kinds


def sample_points(mask, count):
    """Draws `count` pixels (x, y) of a mask (H, W) bool, with repetition."""
    inside = np.flatnonzero(mask)
    y, x = np.divmod(inside[torch.randint(len(inside), (count,)).numpy()], mask.shape[1])
    return torch.from_numpy(np.stack([x, y], 1)).float()


def cover(ids, objects, args):
    """ids (H, W), numbers (Q,) -> masks (Q, M, M) in 0..1, weight (M, M), as the decoder's masks.

    masks: the fraction of a pixel's labelled part that is object, so that edges stay in place; void
    and padding weigh 0. A small object, which covers no pixel by half, is divided by its highest
    value.
    """
    height, width = resized_size(*ids.shape, args.image_size)
    parts = torch.cat([ids[None] == objects[:, None, None], ids[None] >= 0]).float()
    parts = v2.functional.resize(parts, [height, width], antialias=True)
    parts = F.pad(parts, (0, args.image_size - width, 0, args.image_size - height))
    parts = F.avg_pool2d(parts, 4)
    weight = parts[-1]
    masks = (parts[:-1] / weight.clamp(min=1e-6)).clamp(0, 1)
    highest = masks.amax((1, 2), keepdim=True)
    return torch.where(highest < 0.5, masks / highest.clamp(min=1e-6), masks), weight


def read_input(item, mirrored, args):
    """(ID, image path, ...) -> (3, S, S) float32, the encoder's input."""
    image = torch.from_numpy(utils.read_image(item[1]).transpose(2, 0, 1).copy())
    return preprocess(image, args.image_size, mirrored)


def read_ids(item):
    """(ID, image path, mask path, ...) -> ids (H, W) int64: 1 to Q, 0 background, -1 void."""
    path = item[2]
    mask = utils.read_mask(path).astype(np.int64)
    size = utils.image_size(item[1])
    if mask.shape != size[::-1]:
        raise utils.InputError(f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels, but {item[1]} "
                               f"has {size[0]}x{size[1]}; save both at one size")
    if mask.min() < 0:
        raise utils.InputError(f"{path}: ids must not be negative; 0 is background, 255 void, each "
                               "other number one object")
    void = mask == VOID
    numbers = np.unique(mask[~void & (mask > 0)])
    ids = (np.searchsorted(numbers, mask) + 1) * (mask > 0)
    ids[void] = -1
    return ids


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


def find_items(root, name, args):
    """Returns [(ID, image path, mask path, class mask path or None)] of a list, in its order."""
    ids, path = list_ids(root, name)
    images = list_files(root / "JPEGImages", ids, path)
    masks = list_files(root / f"Segmentation{args.masks.capitalize()}", ids, path)
    classes = {}
    if (root / "SegmentationClass").is_dir():
        classes = list_files(root / "SegmentationClass", ids, path)
    return [(item_id, images[item_id], masks[item_id], classes.get(item_id)) for item_id in ids]


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


def check_item(item, whole):
    """Returns whether there is an object; if not `whole`, True if the sizes agree. InputError if bad."""
    if not whole and len({utils.image_size(path) for path in item[1:] if path}) == 1:
        return True
    ids = read_ids(item)
    classes_of(item, ids, [])
    return bool(ids.max() > 0)


def keep_items(items, part, args):
    """Drops items without objects and reports how many."""
    found = utils.check_items(check_item, items, args)
    kept = [item for item, has_object in zip(items, found) if has_object]
    if len(kept) < len(items):
        print(f"note: {len(items) - len(kept)} of {len(items)} {part} images have no object and are "
              "left out")
    if not kept:
        raise utils.InputError(f"{items[0][2].parent}: none of {len(items)} masks has an object; look at "
                               "them")
    return kept


def create_loaders(args):
    """Returns training and validation loaders over checked items, and that of --keep-path or None."""
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds VOCdevkit, or --demo")
    root = find_root(args.data_path, args.year)
    train_items = []  # which a test does not need
    if not args.test_only or args.overfit:
        train_items = find_items(root, args.train_set, args)[:args.limit]
    val_items = [] if args.overfit else find_items(root, args.val_set, args)[:args.limit]
    shared = {item[0] for item in train_items} & {item[0] for item in val_items}
    if args.overfit:
        train_items = val_items = train_items[:args.overfit]
    elif shared:
        print(f"note: {len(shared)} of {len(val_items)} validation images are trained on too")
    if not args.test_only:
        train_items = keep_items(train_items, "training", args)
    val_items = keep_items(val_items, "validation", args)
    names = find_class_names(root)
    train_set = VOCObjects(train_items, names, args, train=True, augment=not args.overfit)
    val_set = VOCObjects(val_items, names, args, train=False, augment=False)
    train_loader = utils.create_loader(train_set, args, shuffle=True, pad=True)
    val_loader, keep_loader = utils.create_loader(val_set, args, shuffle=False, batch_size=1), None
    if args.keep_path:
        root = find_root(args.keep_path, args.year)
        items = keep_items(find_items(root, args.val_set, args)[:args.limit], "--keep-path", args)
        keep_set = VOCObjects(items, find_class_names(root), args, train=False, augment=False)
        keep_loader = utils.create_loader(keep_set, args, shuffle=False, batch_size=1)
    return train_loader, val_loader, keep_loader


def sanity_check(train_set, val_set, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_set), ("val", val_set)):
        if not dataset.items:  # of a test
            continue
        sizes, objects, shares, widths, void = Counter(), [], [], [], []
        for item in dataset.items:
            ids = read_ids(item)
            sizes[f"{ids.shape[1]}x{ids.shape[0]}"] += 1
            objects.append(ids.max())
            areas = np.bincount(ids[ids > 0])[1:]
            shares.extend(areas / ids.size)
            widths.extend(np.sqrt(areas) / max(ids.shape))
            void.append((ids < 0).mean())
        common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
        print(f"{part}: {len(dataset)} images, {common}")
        print(f"  {sum(objects)} objects, {min(objects)} to {max(objects)} per image; share of the "
              f"image {min(shares):.3%} to {max(shares):.3%}, half below {np.median(shares):.3%}")
        print(f"  {np.mean(void):.2%} of the pixels are void")
        utils.note_small_objects(widths, args.image_size)
    if not train_set.items:
        return {"train": 0, "val": len(val_set)}
    rows = {}
    for index in range(min(8, len(train_set))):
        item = train_set.items[index]
        _, *prompts, masks, weight, _ = train_set[0, index]
        image, seen = utils.read_image(item[1]), read_input(item, False, args)
        seen = (seen.permute(1, 2, 0) * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)).clamp(0, 255)
        numbers = torch.arange(1, len(masks) + 1)[:, None, None]
        trained = ((masks >= 0.5) * numbers).amax(0).where(weight > 0, torch.tensor(VOID))
        trained = F.interpolate(trained[None, None].float(), seen.shape[:2])[0, 0]  # nearest
        seen = utils.overlay(np.ascontiguousarray(seen.byte()), trained.numpy())
        objects = utils.overlay(image, colour_ids(read_ids(item)))
        rows[item[0]] = [image, objects, draw_prompts(seen, *prompts)]
    path = Path(args.output_dir, "sanity_check.png")
    utils.save_panel(path, rows, ["image", "objects", "as trained, with prompts"], PROMPT_COLOURS)
    print(f"wrote {path}")
    return {"train": len(train_set), "val": len(val_set)}


def colour_ids(ids):
    """Maps ids (H, W) of read_ids to 1 to 20, 0 and VOID, for drawing."""
    ids = np.asarray(ids)
    return np.where(ids > 0, (ids - 1) % 20 + 1, np.where(ids < 0, VOID, 0))


def draw_prompts(image, points, labels, boxes, kinds):
    """Draws the prompts of Q objects, in its own pixels, into a copy of the image (H, W, 3) uint8."""
    image, size = image.copy(), max(2, len(image) // 100)
    for query, positive, box, kind in zip(points.int(), labels, boxes.int().tolist(), kinds):
        if kind != POINTS:
            cv2.rectangle(image, box[:2], box[2:], (255, 255, 0), max(1, size // 3))
        for point, label in zip(query.tolist(), positive.tolist()):
            if kind != BOX and label >= 0:
                cv2.circle(image, point, size, (0, 255, 0) if label else (255, 0, 0), -1)
    return image


# --- Model ---

def create_model(args, checkpoint=None):
    """Returns the net, with --weights and a checkpoint's trained part, and its arguments."""
    arch = {"model": args.model, "image_size": args.image_size}
    model = NETS[args.model](args.image_size)
    args.base = args.weights
    if checkpoint:
        args.base = checkpoint["args"].get("base", args.weights)
    if args.base != "none":
        args.base = load_sam(model, args.base)
    model.requires_grad_(args.train == "all")
    model.mask_decoder.requires_grad_(True)
    if args.train == "token":
        model.mask_decoder.transformer.requires_grad_(False)
        model.mask_decoder.output_upscaling.requires_grad_(False)
        model.mask_decoder.iou_token.requires_grad_(False)
    if checkpoint:
        check_net(checkpoint, f"--resume {args.resume}", {"net": "sam", **arch})
        part = trained_part(model, args)
        load_weights(part, checkpoint["model"], f"--resume {args.resume}")
    return model, arch


def trained_part(model, args):
    """Returns what checkpoints hold: the decoder, or with --train all the net; official keys."""
    if args.train == "all":
        return nn.ModuleDict(dict(model.named_children()))
    return nn.ModuleDict({"mask_decoder": model.mask_decoder})


def embed(model, features, dtype):
    """Images (B, 3, S, S) float32, or kept embeddings in half precision -> (B, D, E, E) float32."""
    return features.float() if features.dtype == torch.float16 else encode(model, features, dtype)


def cache_embeddings(model, datasets, run, args):
    """Keeps the embeddings of the data sets' images on disk, in half precision."""
    def key(image, mirrored):
        return f"{image} {args.base_hash} {args.image_size} {run.dtype} {mirrored} {PREPROCESS}"

    numbers = model.prompt_encoder.get_dense_pe().numel()  # of an embedding
    keep_embeddings(datasets, key, read_input, lambda images: encode(model, images, run.dtype), numbers,
                    run)


# --- Loss ---

def criterion(logits, iou, masks, weight):
    """Returns (P,): cross entropy + Dice loss of the best of C masks + squared error of iou.

    Logits (P, C, M, M), the predicted iou (P, C), masks (P, M, M) in 0..1, weight (P, M, M): 0 for
    void and padding. Article: of the second pass alone; void is background; BCELoss of a sigmoid,
    whose gradient is 0 where the net is surely wrong.
    """
    masks, weight = masks[:, None], weight[:, None]
    entropy = F.binary_cross_entropy_with_logits(logits, masks.expand_as(logits), reduction="none")
    entropy = (entropy * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-6)
    prob = logits.sigmoid() * weight
    overlap, total = (prob * masks).sum((2, 3)), (prob + masks * weight).sum((2, 3))
    dice = (2 * overlap + 1e-5) / (total + 1e-5)
    loss = (entropy + 1 - dice).min(1).values
    error = iou - soft_iou(logits > 0, masks, weight)
    return loss + error.square().mean(1)


def soft_iou(pred, masks, weight):
    """Boolean pred (P, C, M, M), masks in 0..1 and weight (P, 1, M, M) -> IoU (P, C)."""
    pred, true = pred * weight, (masks >= 0.5) * weight
    intersection = torch.minimum(pred, true).sum((2, 3))
    return intersection / torch.maximum(pred, true).sum((2, 3)).clamp(min=1e-6)


# --- Evaluation ---

@torch.no_grad()
def evaluate(model, loader, run, args):
    """Returns means of judge's figures over all objects, at the images' own size, without perturbation.

    val_box_iou, val_box_biou (IoU of the boundaries): by box; val_click1_iou, 3, 5: after 1, 3, 5 clicks,
    the first where the object's edge is farthest, each next in the middle of the largest wrong region;
    val_iou_error: how far the predicted IoU for the box is off. Baselines: box_iou of the filled
    box, disc_iou of the largest disc about the first click that the object holds. Void is left out.
    class_box_iou: {class: (mean, objects)} where there is a SegmentationClass.
    """
    model.eval()
    found = {}  # index: figures and classes of 8 objects at a time
    for features, ids, (index,) in utils.until_stopped(loader, "validating", run.device):
        ids = ids[0]
        if ids.max() < 1:  # the start reads not all of many images
            continue
        embedding = embed(model, features.to(run.device, non_blocking=run.pinned), run.dtype)
        found[index] = [(judge(model, embedding, ids, numbers, run.dtype),
                         classes_of(loader.dataset.items[index], ids, numbers))
                        for numbers in torch.arange(1, ids.max() + 1).split(8)]  # to limit memory
    parts = list(itertools.chain(*utils.merge_over_ranks(found).values()))
    if not parts:
        folder = loader.dataset.items[0][2].parent
        raise utils.InputError(f"{folder}: no validation mask has an object; look at them")
    rows = {name: torch.cat([figures[name] for figures, _ in parts]).double() for name in parts[0][0]}
    classes = itertools.chain(*[classes for _, classes in parts])
    per_class = defaultdict(list)
    for class_id, iou in zip(classes, rows["val_box_iou"].tolist()):  # of each object
        if class_id is not None:
            per_class[loader.dataset.class_names.get(class_id, str(class_id))].append(iou)
    per_class = {name: (sum(ious) / len(ious), len(ious)) for name, ious in per_class.items()}
    return {**{name: row.mean().item() for name, row in rows.items()}, "class_box_iou": per_class}


def judge(model, embedding, ids, numbers, dtype):
    """Embedding (1, D, E, E), ids (H, W), q object ids -> {figure of evaluate: (q,)}."""
    truth, labelled = ids == numbers[:, None, None], ids >= 0
    points, labels, boxes = clear_prompts(truth)
    logits, _, guess = segment(model, embedding, ids.shape, points, labels, boxes, BOX, None, dtype)
    by_box = logits > 0
    iou = mask_iou(by_box, truth, labelled)
    figures = {"val_box_iou": iou, "val_box_biou": boundary_iou(by_box, truth, labelled)}
    low_logits = None  # of the click before
    for count in range(1, max(CLICKS) + 1):
        if count > 1:  # one more click, where the mask is wrong
            clicks = [next_click(mask, true, labelled) for mask, true in zip(logits > 0, truth)]
            points = torch.cat([points, torch.stack([point for point, _ in clicks])[:, None]], 1)
            labels = torch.cat([labels, torch.tensor([[label] for _, label in clicks])], 1)
        logits, low_logits, _ = segment(model, embedding, ids.shape, points, labels, boxes, POINTS,
                                        low_logits, dtype)
        if count in CLICKS:
            figures[f"val_click{count}_iou"] = mask_iou(logits > 0, truth, labelled)
    figures["val_iou_error"] = (guess - iou).abs()

    y, x = torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij")
    x0, y0, x1, y1 = boxes.T[..., None, None]
    filled = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    figures["box_iou"] = mask_iou(filled, truth, labelled)
    centre_x, centre_y = points[:, 0].T[..., None, None]
    radius = torch.stack([depth(mask).max() for mask in truth])[:, None, None]
    disc = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
    figures["disc_iou"] = mask_iou(disc, truth, labelled)
    return figures


def clear_prompts(masks):
    """Masks (q, H, W) bool -> a click each, points (q, 1, 2) and labels (q, 1), and boxes (q, 4)."""
    points = torch.stack([middle(mask) for mask in masks])[:, None]
    labels = torch.ones(len(masks), 1, dtype=torch.long)
    return points, labels, masks_to_boxes(masks)


def segment(model, embedding, size, points, labels, boxes, kind, low_logits, dtype):
    """Embedding (1, D, E, E) of an image of this size (H, W), prompts of q objects in its pixels.

    Returns logits (q, H, W) and the predicted IoU (q,) on the CPU, and low_logits (q, 1, M, M). Without
    low_logits of an earlier call both passes are made, with them the second alone.
    """
    device, side = embedding.device, model.image_size
    height, width = resized_size(*size, side)
    scale = torch.tensor([width / size[1], height / size[0]])
    prompts = [(points * scale).to(device), labels.to(device), (boxes * scale.repeat(2)).to(device),
               torch.full((len(points),), kind, device=device)]
    embeddings = embedding.expand(len(points), -1, -1, -1)
    if low_logits is None:
        *_, low_logits, iou = two_passes(model, embeddings, *prompts, dtype)
    else:
        low_logits, iou = decode(model, embeddings, *prompts, low_logits, False, dtype)
    return enlarge(model, low_logits, size)[:, 0].cpu(), low_logits, iou[:, 0].cpu()


def depth(mask):
    """Returns each pixel's distance to the nearest one outside a mask (H, W) bool; 0 outside."""
    padded = np.pad(np.asarray(mask, np.uint8), 1)
    return torch.from_numpy(cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1])


def middle(mask):
    """Returns (x, y) float32 of the place in a mask (H, W) bool that is farthest from its edge."""
    distance = depth(mask)
    y, x = divmod(distance.argmax().item(), distance.shape[1])
    return torch.tensor([x, y], dtype=torch.float32)


def next_click(pred, truth, labelled):
    """Masks (H, W) bool -> middle (x, y) of the largest wrong region, label: 1 missed, 0 too large.

    Where nothing is wrong, the middle of the object again.
    """
    largest, area, label = truth, 0, 1
    for kind, wrong in ((1, truth & ~pred & labelled), (0, pred & ~truth & labelled)):
        count, regions, stats, _ = cv2.connectedComponentsWithStats(wrong.numpy().astype(np.uint8))
        for k in range(1, count):
            if stats[k, cv2.CC_STAT_AREA] > area:
                largest, area, label = regions == k, stats[k, cv2.CC_STAT_AREA], kind
    return middle(largest), label


def mask_iou(pred, truth, labelled):
    """Boolean masks (q, H, W), labelled (H, W) -> IoU (q,) where labelled; 0 if both are empty."""
    intersection = (pred & truth & labelled).sum((1, 2))
    return intersection / ((pred | truth) & labelled).sum((1, 2)).clamp(min=1)


def boundary_iou(pred, truth, labelled):
    """Returns the IoU of the masks' inner boundaries, 2 % of the diagonal wide (Cheng et al. 2021)."""
    width = max(1, round(0.02 * math.hypot(*labelled.shape)))

    def boundary(mask):
        padded = np.pad(np.asarray(mask, np.uint8), 1)
        inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
        return mask & torch.from_numpy(inner == 0)
    pred, truth = [torch.stack([boundary(mask & labelled) for mask in masks]) for masks in (pred, truth)]
    return mask_iou(pred, truth, labelled)


def classes_of(item, ids, numbers):
    """Returns each object's commonest class id in SegmentationClass; None without that."""
    if item[3] is None:
        return [None] * len(numbers)
    labels = torch.from_numpy(utils.read_mask(item[3]).astype(np.int64))
    if labels.shape != ids.shape:
        raise utils.InputError(f"{item[3]}: {labels.shape[1]}x{labels.shape[0]} pixels, but {item[2]} "
                               f"has {ids.shape[1]}x{ids.shape[0]}; save both at one size")
    return [labels[ids == number].mode().values.item() for number in numbers]


def print_table(columns):
    """Prints {title: figures of evaluate}: one column each, in percent."""
    first = next(iter(columns.values()))
    print(f"{'':20} %" + "".join(f"{title:>16}" for title in columns))
    for name in [name for name, value in first.items() if isinstance(value, float)]:
        values = "".join(f"{100 * figures[name]:16.2f}" for figures in columns.values())
        print(f"  {name:20}{values}")
    for name in first["class_box_iou"]:
        found = [figures["class_box_iou"].get(name, (math.nan, 0)) for figures in columns.values()]
        values = "".join(f"{100 * mean:9.2f} ({count:4})" for mean, count in found)
        print(f"  {name:20}{values}")


@torch.no_grad()
def draw_samples(model, dataset, run):
    """Draws val_samples.png: image, prompts | truth | by box | by click of the first four images."""
    model.eval()
    rows = {}
    for index in range(min(4, len(dataset))):
        image, (features, ids, _) = utils.read_image(dataset.items[index][1]), dataset[0, index]
        ids = torch.where(ids <= 20, ids, 0)  # a crowd's first objects
        numbers = torch.arange(1, ids.max() + 1)
        prompts = clear_prompts(ids == numbers[:, None, None])
        embedding = embed(model, features[None].to(run.device), run.dtype)
        kinds = torch.full((len(numbers),), BOTH)
        row = [draw_prompts(image, *prompts, kinds), utils.overlay(image, colour_ids(ids))]
        for kind in (BOX, POINTS):
            logits = segment(model, embedding, ids.shape, *prompts, kind, None, run.dtype)[0]
            pred = ((logits > 0) * numbers[:, None, None]).amax(0)
            row.append(utils.overlay(image, colour_ids(pred)))
        rows[dataset.items[index][0]] = row
    titles = ["image, prompts", "truth", "by box", "by click"]
    utils.save_panel(run.folder / "val_samples.png", rows, titles, PROMPT_COLOURS)


# --- Training ---

def create_optimizer(model, args):
    """Returns AdamW; weight decay on matrices, not on norms, biases, tokens (article: on all)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for name, p in model.named_parameters() if "pos" in name}  # position codes
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in tables]
    others = [p for p in trained if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def learning_rate(args, epoch):
    """Returns the rate of epoch 0, 1 ...: by the options alone, so a resumed run may change --epochs."""
    floor = min(args.min_lr, args.lr)
    return floor + (args.lr - floor) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def set_learning_rate(optimizer, args, epoch):
    """Sets the rate before each epoch."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, epoch)


def train_one_epoch(model, loader, optimizer, run, args):
    """Trains for one pass over the training data, or the rest of a resumed one; run adds it up."""
    model.train()
    for batches in run.steps(loader):  # the --accumulate batches of one optimizer step
        loss_sum, num_objects = 0.0, 0
        for batch in batches:
            features, owner, points, labels, boxes, kinds, masks, weight = [
                part.to(run.device, non_blocking=run.pinned) for part in batch[:-1]]
            if not len(owner):  # empty masks beyond those checked at the start, or filled up
                continue
            with torch.set_grad_enabled(args.train == "all"):
                embeddings = embed(model, features, run.dtype)[owner]
            first, first_iou, second, second_iou = two_passes(
                model, embeddings, points, labels, boxes, kinds, run.dtype)
            loss = criterion(first, first_iou, masks, weight[owner]).sum()
            loss = loss + criterion(second, second_iou, masks, weight[owner]).sum()
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            num_objects += len(owner)
        if run.finish_gradient(optimizer, loss_sum, num_objects):  # divides by num_objects; False: not finite
            run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)


# --- Main ---

def prepare_demo(args):
    """Prepares --demo: generated rings, and a small net trained on other objects, not downloaded."""
    utils.start_process_group(utils.pick_device(args.device))  # so that one process draws and prints
    folder = Path(args.output_dir)
    args.data_path = args.data_path or utils.draw_demo("rings", folder / "data", 120)
    if args.weights or args.sanity_check or args.test_only:
        return
    print("First a small net learns plain objects, all of it; it takes the place of an official file.")
    plain = utils.draw_demo("plain", folder / "base/data", 200)
    options = ["--demo", "--train", "all", "--weights", "none", "--epochs", "10", "--data-path", plain,
               "--output-dir", str(folder / "base"), "--seed", str(args.seed), "--device", args.device]
    options += ["--resume", "auto"] if args.resume else ["--overwrite"]
    main(get_args_parser().parse_args(options))
    args.weights = str(folder / "base/best.pth")
    print("Then its decoder learns rings, of which it has seen none.")


def save_decoder(run, part):
    """Writes decoder.pth, as the article: the decoder's tensors alone, with official names."""
    decoder = {key: value for key, value in part.state_dict().items() if key.startswith("mask_decoder.")}
    run.save_plain("decoder.pth", decoder)


def main(args):
    """Fine-tunes as the options say; returns the last figures, those before, the best val_box_iou."""
    if args.demo:
        prepare_demo(args)
    if not args.weights and args.model not in WEIGHTS and not (args.resume or args.sanity_check):
        raise utils.InputError(f"--weights: there is no official file for {args.model}; give a path or none")
    args.weights = args.weights or args.model  # the official file
    if args.image_size % 16:
        raise utils.InputError(f"--image-size {args.image_size}: must be a multiple of 16")
    if not (args.point_prompt or args.box_prompt):
        raise utils.InputError("--point-prompt False: no prompts are left; keep one of the two kinds")
    run = utils.Run(args, net="sam")  # joins torchrun's processes; seeds; device, precision
    train_loader, val_loader, keep_loader = create_loaders(args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    if args.sanity_check:
        return sanity_check(train_set, val_set, args)

    model, arch = create_model(args, run.checkpoint)
    # best.pth holds the decoder alone: the hash tells predict.py whether the base is the right one
    args.base_hash = None if args.train == "all" and not args.test_only else hash_frozen(model)
    model = model.to(run.device)
    run.describe(args.model, model, train_set, val_set)
    keeps = not args.no_cache and args.train != "all"  # embeddings
    if args.test_only:
        run.check_test(same=["masks", "image_size", "base_hash"])
        loaders = {"test": val_loader}
        if keep_loader is not None:  # an empty loader, of a process without images, counts as False
            loaders["kept"] = keep_loader
        if keeps:
            cache_embeddings(model, [loader.dataset for loader in loaders.values()], run, args)
        columns = {title: evaluate(model, loader, run, args) for title, loader in loaders.items()}
        print_table(columns)
        return columns["test"]

    if args.weights == "none" and not run.checkpoint and 10 * args.lr <= DEMO["lr"]:
        print(f"note: --lr {args.lr} suits official weights; from scratch --demo's small net learns "
              f"with --train all --lr {DEMO['lr']}")
    optimizer = create_optimizer(model, args)
    part = trained_part(model, args)
    progress = run.start(arch, train_set, val_set, model=part, optimizer=optimizer)
    if args.compile:
        model.mask_decoder.compile()

    figures = None
    with run.saved_when_stopped():  # SIGTERM, Ctrl-C
        if keeps:
            sets = [train_set, val_set]
            if keep_loader is not None:
                sets.append(keep_loader.dataset)
            cache_embeddings(model, sets, run, args)
        if "before" not in progress:  # what the starting weights can do: fine-tuning's baseline
            progress["before"] = evaluate(model, val_loader, run, args)
            progress["keep_before"] = None
            if keep_loader is not None:
                progress["keep_before"] = evaluate(model, keep_loader, run, args)
            run.is_best(progress["before"]["val_box_iou"])
            progress["after"] = progress["before"]
            run.save_best()
            save_decoder(run, part)
        print_table({"before": progress["before"]})
        while not run.is_over():    # --epochs, --early-stopping
            set_learning_rate(optimizer, args, progress["epoch"])
            train_one_epoch(model, train_loader, optimizer, run, args)
            figures = evaluate(model, val_loader, run, args)
            run.end_epoch(figures, show=["val_box_iou", "val_click1_iou", "val_click5_iou",
                                         "val_iou_error"])
            if run.is_best(figures["val_box_iou"]):
                progress["after"] = figures
                run.save_best()
                save_decoder(run, part)
            run.save_last()
            run.plot_curves(["loss"], ["val_box_iou", "val_click1_iou", "val_click5_iou", "box_iou"])
            draw_samples(model, val_set, run)

    figures = figures or evaluate(model, val_loader, run, args)  # nothing was left to train
    best_epoch = progress["best_epoch"]
    columns = {"before": progress["before"], f"best, epoch {best_epoch}": progress["after"]}
    if not best_epoch:  # none beat the start
        columns = {"before": progress["before"], f"last, epoch {progress['epoch']}": figures}
    if keep_loader is not None:
        columns["kept, before"] = progress["keep_before"]
        if best_epoch:  # evaluated with the best weights, not the last
            utils.wait_for_ranks()
            best = utils.load_checkpoint(run.folder / "best.pth")
            load_weights(part, best["model"], run.folder / "best.pth")
        title = "kept, best" if best_epoch else "kept, last"
        columns[title] = evaluate(model, keep_loader, run, args)
    print_table(columns)
    run.finish("val_box_iou")
    return {**figures, "before": progress["before"], "best_val_box_iou": progress["best"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
