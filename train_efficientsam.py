"""Fine-tune EfficientSAM on one's own masks, by boxes or clicks.   Article: 【Segment Anything Model】十三 EfficientSAM

    python train_efficientsam.py --demo
    python train_efficientsam.py --data-path data/npy --image-size 512

Data:   DATA_PATH/imgs/NAME.npy (H, W, 3) or (H, W), or any image file; DATA_PATH/gts/NAME.npy (H, W)
        of any integer type, or .png, .tif: 0 background, each other number one object. Split 80:20,
        or validated on --val-path.
Writes: OUTPUT_DIR/best.pth (best val_iou), last.pth (for --resume), log.csv, curves.png,
        val_samples.png (image with prompts | truth | prediction), split.json, args.json.
Parts:  the article's, and here: NpyDataset = NpyDataset; its random box = draw_prompt;
        resize_longest_side, pad_image = preprocess; collate_fn = collate; seg_loss, ce_loss,
        iou_loss = criterion; cal_iou = mask_iou; build_efficient_sam_vits = efficient_sam_vits;
        sanity_check_dataset, show_box, show_mask = sanity_check, draw_prompts; log.png = curves.png.
"""
import math
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

import utils
from nets.efficient_sam import NETS, WEIGHTS, content_size, encode, predict_masks, preprocess
from nets.weights import check_net, complete_encoder, load_weights, official_file, read_weights

FIGURES = ("val_iou", "val_dice", "val_oracle_iou", "val_iou_error", "box_iou")  # of evaluate
MASK_SIZE = 256  # largest side in pixels at which training compares masks, as the article
PROMPT_COLOURS = {"box": (255, 255, 0), "click": (0, 255, 0)}
DEMO = {"model": "demo", "weights": "none", "amp": "off", "image_size": 96, "lr": 2e-3, "epochs": 18,
        "workers": 0, "scheduler": "cosine", "bbox_shift": 5, "multimask": "all",
        "batch_size": 4, "output_dir": "runs/train_efficientsam_demo"}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    parser.add_run_options(output_dir="runs/train_efficientsam")  # --demo, --resume, --device ...
    add, add_switch = parser.add_argument, parser.add_switch
    positive, non_negative = utils.number(int, 1), utils.number(float, 0)
    add("--data-path", "--data-root", "--tr-npy-path", "-i", help="folder with imgs/ and gts/")
    add("--work-dir", dest="output_dir", help="the same as --output-dir, as in the article")
    add("--val-path", help="folder of the same layout to validate on, instead of splitting")
    add("--split", help="split.json of another run to use, instead of splitting by --seed")
    add("--image-size", type=utils.number(int, 64), default=1024,
        help="side in pixels at which the net sees an image, a multiple of 16 (%(default)s)")
    add("--preprocess", choices=["official", "article"], default="official",
        help="official: stretched to a square; article: ratio kept, padded, contrast stretched")
    add("--max-objects", type=positive, default=8,
        help="objects trained per image, drawn anew each epoch; the article: 1 (%(default)s)")
    add("--prompt", choices=["box", "point", "both"], default="box",
        help="what the net is given (%(default)s)")
    add("--bbox-shift", type=utils.number(int, 0), default=5,
        help="training boxes' sides move by up to this, in or out, in pixels of a 256 pixel image")
    add_switch("--data-aug", default=True, help="flip left-right and up-down (%(default)s)")

    add("--model", choices=list(NETS), default="efficient_sam_vits", help="(%(default)s)")
    add("--weights", "--pretrained-checkpoint",
        help=f"start from: none, a path, {' or '.join(WEIGHTS)} (official; default: of --model)")
    add("--decoder-weights", help="beside --weights encoder.pth (of pretrain_sami.py): vit_b, vit_l, vit_h "
                                  "or a path, SAM's decoder to start from (default: fresh)")
    add("--freeze", choices=["none", "encoder"], default="none",
        help="part that is not trained, but for the neck of encoder.pth, which is new (%(default)s)")
    add_switch("--gradient-checkpointing", help="less memory, a third more time")

    add("--multimask", choices=["min", "all"], default="min",
        help="train the best of the three masks, or, as the article, all on the same truth")
    add("--seg-loss-weight", type=non_negative, default=1.0, help="weight of Dice (%(default)s)")
    add("--ce-loss-weight", type=non_negative, default=1.0, help="weight of cross entropy (%(default)s)")
    add("--iou-loss-weight", type=non_negative, default=1.0,
        help="weight of the squared error of the net's own IoU (%(default)s)")
    add("--epochs", "--num-epochs", type=positive, default=10,
        help="passes over the training data (%(default)s)")
    add("-b", "--batch-size", type=positive, default=4,
        help="images per batch and process (%(default)s)")
    add("--accumulate", type=positive, default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", type=non_negative, default=5e-5, help="initial learning rate (%(default)s)")
    add("--weight-decay", "--wd", type=non_negative, default=0.01, help="weight decay (%(default)s)")
    add("--clip-grad", type=non_negative, default=0.0,
        help="largest gradient norm, 0 for any (%(default)s)")
    add("--scheduler", choices=["plateau", "cosine"], default="plateau",
        help="plateau: times 0.9 after 5 epochs without a lower training loss, as the article")
    return parser


# --- Data ---

class NpyDataset(torch.utils.data.Dataset):
    """[(epoch, index)] -> image, points, labels, masks, valid, index: one image and its Q objects.

    image (3, S, S) float32 in 0..1, S = --image-size; points (Q, N, 2) in its pixels (x, y) and
    labels (Q, N) as in nets/efficient_sam.py. Training: masks (Q, M, M) in 0..1 of up to --max-objects,
    M = min(S, MASK_SIZE); validation: ids (H, W) of the image's own size, 1 to Q. valid (Q,): which
    of them count in loss and metrics. An image without objects, which the start may not have read,
    gives one that does not count; of index -1, which fills up a process's last batch, none counts.
    Random draws depend on (seed, epoch, index) alone.
    """
    classes = []  # objects have none

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
            if not len(objects):  # the background takes an object's place
                objects = np.zeros(1, int)
            points, labels = zip(*[draw_prompt(ids == k, args, self.augment) for k in objects])
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        image = preprocess(image, args.image_size, args.preprocess)
        height, width = content_size(ids.shape, args.image_size, args.preprocess)
        scale = torch.tensor([width / ids.shape[1], height / ids.shape[0]])
        points, labels = torch.tensor(np.stack(points)) * scale, torch.tensor(np.stack(labels))
        if self.train:
            masks = resize_masks(torch.from_numpy(ids == objects[:, None, None]), args)
        else:
            masks = torch.from_numpy((np.searchsorted(objects, ids) + 1) * (ids > 0))
        return image, points, labels, masks, valid, index

    @staticmethod
    def collate(batch):
        """Stacks each; an image with fewer objects gets empty queries, which do not count."""
        most, filled = max(len(valid) for *_, valid, _ in batch), []
        for image, points, labels, masks, valid, index in batch:
            extra = most - len(valid)
            if extra:
                points = F.pad(points, (0, 0, 0, 0, 0, extra), value=-1.0)
                labels = F.pad(labels, (0, 0, 0, extra), value=-1)
                masks = F.pad(masks, (0, 0, 0, 0, 0, extra))
                valid = F.pad(valid, (0, extra))
            filled.append((image, points, labels, masks, valid, index))
        *tensors, indices = zip(*filled)
        return *map(torch.stack, tensors), indices


def draw_prompt(mask, args, vary):
    """Mask (H, W) bool -> points (N, 2) float32 (x, y), labels (N): 2, 3 box corners, 1 a click."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    limit = np.array(mask.shape[::-1], np.float32) - 1
    points, labels = [], []
    if args.prompt in ("box", "both"):
        if vary:  # in or out and inside the image; the article's boxes only grow, and may leave it
            inward = args.bbox_shift * max(mask.shape) / 256 * (2 * torch.rand(4).numpy() - 1)
            inward = np.minimum(inward, np.tile(box[2:] - box[:2], 2) / 4)  # half of a small box stays
            box = (box + inward * [1, 1, -1, -1]).astype(np.float32)
        points, labels = [*box.reshape(2, 2).clip(0, limit)], [2, 3]
    if args.prompt in ("point", "both"):
        if vary:
            inside = np.argwhere(mask)
            y, x = inside[torch.randint(len(inside), ()).item()]
        else:  # the place farthest from the edge
            padded = np.pad(mask, 1).astype(np.uint8)
            depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
        points, labels = [*points, np.array([x, y], np.float32)], [*labels, 1]
    return np.stack(points), np.array(labels)


def resize_masks(masks, args):
    """Masks (Q, H, W) bool -> (Q, M, M) in 0..1: the fraction of each pixel that is object.

    Laid out as in the net's square. Not cut at 0.5, which would change areas. The values of a small
    object, which covers no pixel by half, are scaled up to a highest of 1.
    """
    whole = min(MASK_SIZE, args.image_size)
    size = content_size(masks.shape[1:], args.image_size, args.preprocess)
    size = [max(1, round(side * whole / args.image_size)) for side in size]
    masks = v2.functional.resize(masks.float(), size, antialias=True)
    highest = masks.amax((1, 2), keepdim=True)
    masks = torch.where(highest < 0.5, masks / highest.clamp(min=1e-6), masks)
    return F.pad(masks, (0, whole - size[1], 0, whole - size[0]))


def read_item(item):
    """(name, image path, mask path) -> image (H, W, 3) uint8 RGB, ids (H, W) int64."""
    _, image_path, path = item
    image, ids = utils.read_image(image_path), utils.read_mask(path)
    if ids.shape != image.shape[:2]:
        raise utils.InputError(f"{path}: {ids.shape[1]}x{ids.shape[0]} pixels, but {image_path} "
                               f"has {image.shape[1]}x{image.shape[0]}; save both at one size")
    if ids.min() < 0:
        raise utils.InputError(f"{path}: ids must not be negative; 0 is background, each other "
                               "number one object")
    return image, ids.astype(np.int64)


def find_items(data_path):
    """Returns [(name, image path, mask path)] sorted by name."""
    images, masks = [utils.list_images(Path(data_path, sub), {*utils.IMAGES, ".npy"})
                     for sub in ("imgs", "gts")]
    if not images:
        raise utils.InputError(f"{data_path}/imgs: no images or .npy files; give the folder that holds "
                               "imgs/ and gts/")
    for name in sorted(images.keys() ^ masks.keys()):
        path, other = (images[name], "gts") if name in images else (masks[name], "imgs")
        raise utils.InputError(f"{path}: {data_path}/{other} has no {name}.npy, .png ...; add it or "
                               "remove this one")
    return [(name, images[name], masks[name]) for name in sorted(images)]


def check_item(item, whole):
    """Returns whether there is an object; if not `whole`, True if the sizes agree. InputError if bad."""
    if not whole and utils.image_size(item[1]) == utils.image_size(item[2]):
        return True
    return bool(read_item(item)[1].any())


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
    """Returns training and validation loaders over checked items."""
    if args.demo and not args.data_path:
        args.data_path = utils.draw_demo("objects", Path(args.output_dir, "data"), 200)
    if not args.data_path:
        raise utils.InputError("--data-path: give the folder that holds imgs/ and gts/, or --demo")
    val_items = find_items(args.val_path) if args.val_path else None
    train_items, val_items = utils.split_items(find_items(args.data_path), args, val_items)
    if not args.test_only:
        train_items = keep_items(train_items, "training", args)
    val_items = keep_items(val_items, "validation", args)
    train_set = NpyDataset(train_items, args, train=True, augment=not args.overfit)
    val_set = NpyDataset(val_items, args, train=False, augment=False)
    train_loader = utils.create_loader(train_set, args, shuffle=True, pad=True)
    return train_loader, utils.create_loader(val_set, args, shuffle=False, batch_size=1)


def sanity_check(train_set, val_set, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_set), ("val", val_set)):
        sizes, objects, shares = Counter(), [], []
        for item in dataset.items:
            ids = read_item(item)[1]
            counts = np.unique(ids[ids != 0], return_counts=True)[1]
            sizes[f"{ids.shape[1]}x{ids.shape[0]}"] += 1
            objects.append(len(counts))
            shares.extend(counts / ids.size)
        common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
        print(f"{part}: {len(dataset)} images, {common}")
        print(f"  {sum(objects)} objects, {min(objects)} to {max(objects)} per image; share of the "
              f"image {min(shares):.3%} to {max(shares):.3%}, half below {np.median(shares):.3%}")
        utils.note_small_objects(np.sqrt(shares), args.image_size, 2 if args.model == "demo" else 4)
    rows = {}
    for index in range(min(8, len(train_set))):
        image, ids = read_item(train_set.items[index])
        seen, points, labels, masks, _, _ = train_set[0, index]
        seen = np.ascontiguousarray((seen.permute(1, 2, 0) * 255).byte().numpy())
        masks = F.interpolate(masks[None], seen.shape[:2])[0].numpy() >= 0.5
        trained = (masks * np.arange(1, len(masks) + 1)[:, None, None]).max(0).astype(int)
        seen = draw_prompts(utils.overlay(seen, color_ids(trained)), points.numpy(), labels.numpy())
        rows[train_set.items[index][0]] = [image, utils.overlay(image, color_ids(ids)), seen]
    path = Path(args.output_dir, "sanity_check.png")
    utils.save_panel(path, rows, ["image", "objects", "as trained, with prompts"], PROMPT_COLOURS)
    print(f"wrote {path}")
    return {"train": len(train_set), "val": len(val_set)}


def color_ids(ids):
    """Maps ids of any size to 1..20, and 0 to 0, for drawing."""
    return np.where(ids > 0, (ids - 1) % 20 + 1, 0)


def draw_prompts(image, points, labels):
    """Draws boxes and clicks (Q, N, 2), labels (Q, N), into a copy of the image (H, W, 3) uint8."""
    image = image.copy()
    for query, kinds in zip(points, labels):
        query = query.astype(int)
        corners = query[(kinds == 2) | (kinds == 3)].tolist()
        if corners:
            cv2.rectangle(image, *corners, (255, 255, 0), max(1, len(image) // 300))
        for point in query[kinds == 1].tolist():
            cv2.circle(image, point, max(2, len(image) // 100), (0, 255, 0), -1)
    return image


# --- Model ---

def create_model(args, checkpoint=None):
    """Returns the net, with weights of checkpoint or --weights, and the arguments that rebuild it."""
    arch = {"model": args.model, "image_size": args.image_size}
    model = NETS[args.model](args.image_size)
    args.new_neck = False
    if checkpoint:
        args.new_neck = checkpoint["args"].get("new_neck", False)
        check_net(checkpoint, f"--resume {args.resume}", {"net": "efficient_sam", **arch})
        load_weights(model, checkpoint["model"], f"--resume {args.resume}")
    elif args.weights != "none":
        path = official_file(args.weights, WEIGHTS)
        state = read_weights(path, {"net": "efficient_sam", **arch}, free=["image_size"])
        args.new_neck = all(key.startswith("image_encoder.") for key in state)
        state = complete_encoder(model, state, path, args.decoder_weights)
        load_weights(model, state, path)
    # The mask that is never asked for
    model.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(False)
    if args.freeze == "encoder":
        model.image_encoder.requires_grad_(False)
        # SAMI trains what is before the neck: encoder.pth has the neck as it was drawn
        model.image_encoder.neck.requires_grad_(args.new_neck)
    model.image_encoder.gradient_checkpointing = args.gradient_checkpointing
    return model, arch


# --- Loss ---

def criterion(logits, iou, masks, valid, args):
    """Returns the sum over objects of Dice + cross entropy of the best mask (or all) + squared error of iou.

    Logits (B, Q, 3, M, M), the net's own iou (B, Q, 3), masks (B, Q, M, M) in 0..1, valid (B, Q) bool
    -> scalar. Each mask has its own Dice and IoU; the article's MONAI call takes three masks as one
    volume, and its IoU is one of all three.
    """
    masks = masks[:, :, None].float()
    target = masks.expand_as(logits)
    dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")(
        logits.flatten(0, 2)[:, None], target.flatten(0, 2)[:, None]).reshape(iou.shape)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-2, -1))
    loss = args.seg_loss_weight * dice + args.ce_loss_weight * entropy  # (B, Q, 3)
    loss = loss.min(-1).values if args.multimask == "min" else loss.mean(-1)
    error = (iou - mask_iou(logits > 0, masks >= 0.5)).square().mean(-1)
    return ((loss + args.iou_loss_weight * error) * valid).sum()


def mask_iou(pred, mask):
    """Boolean masks (..., H, W) -> IoU (...); 0 where both are empty."""
    intersection = (pred & mask).sum((-2, -1))
    return intersection / (pred | mask).sum((-2, -1)).clamp(min=1)


# --- Evaluation ---

@torch.no_grad()
def evaluate(model, loader, run, args):
    """Returns means over all objects, in [0, 1], at the images' own size; boxes and clicks are unperturbed.

    val_iou, val_dice: of the mask that the net rates best; val_oracle_iou: of the best of its three;
    val_iou_error: how far its own guess is off; box_iou: of the filled box, the baseline.
    """
    model.eval()
    rows = {}  # index: figures of each object of an image
    for batch in utils.until_stopped(loader, "validating", run.device):
        image, points, labels, ids, valid = [part.to(run.device) for part in batch[:-1]]
        if not valid.any():
            continue
        (index,), found = batch[-1], []
        embedding, size = encode(model, image, run.dtype), ids.shape[-2:]
        predictions = predict_masks(model, embedding, points[0], labels[0], size, args.preprocess,
                                    run.dtype)
        for first, logits, guess in predictions:
            numbers = torch.arange(first + 1, first + 1 + len(guess), device=run.device)
            truth = ids == numbers[:, None, None]
            iou = mask_iou(logits > 0, truth[:, None])  # (q, 3)
            best = guess.argmax(1, keepdim=True)
            chosen = iou.gather(1, best)[:, 0]
            error = (guess.gather(1, best)[:, 0] - chosen).abs()
            figures = [chosen, 2 * chosen / (1 + chosen), iou.max(1).values, error, box_iou(truth)]
            found.append(torch.stack(figures, 1).cpu().double())
        rows[index] = torch.cat(found)
    rows = utils.merge_over_ranks(rows).values()
    rows = torch.cat([torch.zeros(0, len(FIGURES), dtype=torch.float64), *rows])
    return dict(zip(FIGURES, (rows.sum(0) / len(rows)).tolist()))


def box_iou(masks):
    """Boolean masks (Q, H, W) -> IoU of each with its own filled box."""
    x0, y0, x1, y1 = masks_to_boxes(masks).unbind(1)
    return masks.sum((1, 2)) / ((x1 - x0 + 1) * (y1 - y0 + 1))


def print_table(title, figures):
    print(title + "".join(f"  {key} {value:.4f}" for key, value in figures.items()))


@torch.no_grad()
def draw_samples(model, dataset, run):
    """Draws val_samples.png: image with prompts | truth | prediction of the first four images."""
    model.eval()
    rows, args = {}, dataset.args
    for index in range(min(4, len(dataset))):
        image, ids = read_item(dataset.items[index])
        seen, points, labels, truth, _, _ = dataset[0, index]
        seen, *prompts = [part.to(run.device) for part in (seen, points, labels)]
        embedding, pred = encode(model, seen[None], run.dtype), np.zeros(ids.shape, int)
        predictions = predict_masks(model, embedding, *prompts, ids.shape, args.preprocess, run.dtype)
        for first, logits, guess in predictions:
            best = torch.take_along_dim(logits, guess.argmax(1)[:, None, None, None], 1)[:, 0]
            for k, mask in enumerate((best > 0).cpu().numpy(), first + 1):
                pred[mask] = k
        height, width = content_size(ids.shape, args.image_size, args.preprocess)
        points = points.numpy() / [width / ids.shape[1], height / ids.shape[0]]
        rows[dataset.items[index][0]] = [draw_prompts(image, points, labels.numpy()),
                                         utils.overlay(image, color_ids(truth.numpy())),
                                         utils.overlay(image, color_ids(pred))]
    titles = ["image, prompts", "truth", "prediction"]
    utils.save_panel(run.folder / "val_samples.png", rows, titles, PROMPT_COLOURS)


# --- Training ---

def create_optimizer(model, args):
    """Returns AdamW, weight decay on matrices only: embeddings of unused prompts would fade away."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def learning_rate(args, epoch):
    """Returns the rate of epoch 0, 1 ...: by the options alone, so a resumed run may change --epochs."""
    return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def set_learning_rate(optimizer, args, epoch):
    """Sets the rate before each epoch; --scheduler plateau has its own way, in main."""
    if args.scheduler == "cosine":
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch)


def train_one_epoch(model, loader, optimizer, run, args):
    """Trains for one pass over the training data, or the rest of a resumed one; run adds it up."""
    model.train()
    for batches in run.steps(loader):  # the --accumulate batches of one optimizer step
        loss_sum, num_objects = 0.0, 0
        for batch in batches:
            image, points, labels, masks, valid = [part.to(run.device, non_blocking=run.pinned)
                                                   for part in batch[:-1]]
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
                logits, iou = model(image, points, labels, False)
            logits = logits.float()
            if logits.shape[-2:] != masks.shape[-2:]:
                logits = F.interpolate(logits.flatten(0, 1), masks.shape[-2:], mode="bicubic")
                logits = logits.unflatten(0, masks.shape[:2])
            loss = criterion(logits, iou.float(), masks, valid, args)
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            num_objects += valid.sum()
        if run.finish_gradient(optimizer, loss_sum, num_objects, args.clip_grad):  # of the mean over objects
            run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)


# --- Main ---

def main(args):
    """Trains as the options say; returns the last figures, those before and the best val_iou."""
    args.weights = args.weights or (args.model if args.model in WEIGHTS else "none")
    if args.decoder_weights and args.weights == "none":
        raise utils.InputError("--decoder-weights: needs --weights encoder.pth, of pretrain_sami.py")
    if args.image_size % 16:
        raise utils.InputError(f"--image-size {args.image_size}: must be a multiple of 16")
    run = utils.Run(args, net="efficient_sam")  # joins torchrun; seeds; device, precision
    if args.deterministic and run.device.type == "cuda":
        raise utils.InputError("--deterministic: bicubic resizing has no deterministic gradient on "
                               "CUDA; leave it out")
    train_loader, val_loader = create_loaders(args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    if args.sanity_check:
        return sanity_check(train_set, val_set, args)

    model, arch = create_model(args, run.checkpoint)
    model = model.to(run.device)
    run.describe(args.model, model, train_set, val_set)
    if args.test_only:
        run.check_test(same=["preprocess", "prompt"])
        figures = evaluate(model, val_loader, run, args)
        print_table("test:", figures)
        return figures

    if args.weights == "none" and not run.checkpoint and 10 * args.lr <= DEMO["lr"]:
        print(f"note: --lr {args.lr} suits official weights; from scratch --demo uses {DEMO['lr']}")
    optimizer = create_optimizer(model, args)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=5)
    progress = run.start(arch, train_set, val_set,
                         model=model, optimizer=optimizer, lr_scheduler=plateau)
    if args.compile:
        model.compile()

    figures = None
    with run.saved_when_stopped():  # SIGTERM, Ctrl-C
        if "before" not in progress:  # what the starting weights can do: fine-tuning's baseline
            progress["before"] = evaluate(model, val_loader, run, args)
            run.is_best(progress["before"]["val_iou"])
            run.save_best()
        print_table("before training:", progress["before"])
        while not run.is_over():    # --epochs, --early-stopping
            set_learning_rate(optimizer, args, progress["epoch"])
            train_one_epoch(model, train_loader, optimizer, run, args)
            figures, loss = evaluate(model, val_loader, run, args), run.mean_loss()
            run.end_epoch(figures, show=["val_iou", "val_dice", "val_oracle_iou", "val_iou_error"])
            if args.scheduler == "plateau":
                plateau.step(loss)
            if run.is_best(figures["val_iou"]):
                run.save_best()
            run.save_last()
            run.plot_curves(["loss"], ["val_iou", "val_oracle_iou", "box_iou"], ["seconds"])
            draw_samples(model, val_set, run)

    figures = figures or evaluate(model, val_loader, run, args)
    print_table("before training:", progress["before"])
    print_table(f"after epoch {progress['epoch']}:", figures)
    print(f"filled boxes of the same objects: IoU {figures['box_iou']:.4f}")
    run.finish("val_iou")
    return {**figures, "before": progress["before"], "best_val_iou": progress["best"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
