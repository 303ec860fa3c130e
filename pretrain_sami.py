"""Pretrain EfficientSAM's encoder on unlabelled images (SAMI).   Article: 【Segment Anything Model】十三 EfficientSAM

    python pretrain_sami.py --demo
    python pretrain_sami.py --data-path images --teacher vit_h --model efficient_sam_vitt

The encoder sees a quarter of an image's patches; from these a decoder tells what SAM's image encoder
makes of all (Xiong et al. 2023, arXiv:2312.00863, sections 3.2 and 4.1). The authors published no
code: docs/departures.md lists what the paper leaves open, and what was chosen.
Data:   every image file and .npy array in DATA_PATH and in its folders; no labels. Split 80:20, or
        validated on --val-path.
Writes: OUTPUT_DIR/encoder.pth (the encoder alone, of the best epoch, for train_efficientsam.py
        --weights encoder.pth), best.pth (best val_explained), last.pth (for --resume), log.csv,
        curves.png, val_samples.png (image | what the encoder sees | SAM's features | prediction),
        split.json, args.json. --cache-dir: SAM's features of whole images, one file per image.
Parts:  the article's, and here: unmasked and masked tokens = UnlabelledImages; lightweight
        encoder = Sami; cross-attention decoder = Decoder, CrossBlock; linear projection head = Sami;
        features from SAM = target_features; reconstruction loss = criterion.
"""
import contextlib
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
from torchvision import transforms
from torchvision.transforms import v2

import utils
from nets import efficient_sam, sam
from nets.efficient_sam import DecoderAttention, TransformerMLP
from nets.embeddings import keep_embeddings, load_embedding
from nets.weights import check_net, load_sam, load_weights, read_weights

CROP_SCALE = (0.2, 1.0)  # share of the image that a crop covers, as MAE
MEAN_OVER = 256  # training images of which the baselines are the mean
FIGURES = ("val_{}_error", "mean_{}_error", "position_{}_error", "val_{}_cosine")  # masked, visible
HIDDEN = {"hidden from the encoder": (124, 116, 104)}  # in pictures: ImageNet's mean, the encoder's 0
PREPROCESS = "stretched"  # change it when what SAM sees changes: kept features are then made again
DEMO = {"model": "demo", "teacher": "demo", "amp": "off", "image_size": 64, "teacher_size": 128,
        "crop": False, "flip": False, "decoder_dim": 128, "decoder_depth": 2, "epochs": 18,
        "warmup_epochs": 2, "batch_size": 16, "lr": 0.256, "workers": 0,
        "output_dir": "runs/pretrain_sami_demo"}
UNLABELLED, LABELLED, HELD_OUT = 400, 12, 24  # images of --demo
TEACHER_EPOCHS, FINETUNE_EPOCHS = 7, 3  # of --demo; in the latter each labelled image comes ten times


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], demo=DEMO)
    parser.add_run_options(output_dir="runs/pretrain_sami")  # --demo, --resume, --device ...
    add, add_switch = parser.add_argument, parser.add_switch
    positive, non_negative = utils.number(int, 1), utils.number(float, 0)
    add("--data-path", help="folder of images, in folders of any depth; no labels")
    add("--val-path", help="another such folder to validate on, instead of splitting")
    add("--split", help="split.json of another run to use, instead of splitting by --seed")
    add("--image-size", type=utils.number(int, 32), default=224,
        help="side in pixels at which the encoder sees an image (%(default)s)")
    add_switch("--crop", default=True,
               help="train on random crops, on which SAM runs in every epoch; False: on whole images, whose "
                    "features (100 kB each; with --flip twice) are made once and kept")
    add_switch("--flip", default=True, help="train on mirrored images half the time (%(default)s)")
    add("--cache-dir", help="folder of the kept features (embeddings/ beside --output-dir)")
    add_switch("--no-cache", help="keep no features without --crop either")

    add("--teacher", choices=list(sam.NETS), default="vit_h", help="which SAM (%(default)s)")
    add("--teacher-weights", help="its weights: none, or a path (the official file of --teacher)")
    add("--teacher-size", type=utils.number(int, 64), default=1024,
        help="side in pixels at which SAM sees an image; its features are resized to the encoder's "
             "grid, its position codes to this size (%(default)s)")
    add("--model", choices=list(efficient_sam.NETS), default="efficient_sam_vitt",
        help="whose encoder is trained (%(default)s)")
    add("--weights", default="none",
        help="start from: none, or best.pth of this script (%(default)s)")
    add("--mask-share", type=utils.number(float, 0, 0.99), default=0.75,
        help="fraction of the patches that the encoder does not see (%(default)s)")
    add("--decoder-depth", type=positive, default=8, help="blocks of the decoder (%(default)s)")
    add("--decoder-dim", type=utils.number(int, 32), default=512,
        help="its width, a multiple of 32 (%(default)s)")

    add("--epochs", type=positive, default=400, help="passes over the training data (%(default)s)")
    add("--warmup-epochs", type=non_negative, default=40,
        help="epochs in which the rate rises, at most half of --epochs (%(default)s)")
    add("-b", "--batch-size", type=positive, default=64,
        help="images per batch and process (%(default)s)")
    add("--accumulate", type=positive, default=1, help="batches per optimizer step (%(default)s)")
    add("--lr", type=non_negative, default=2.4e-3,
        help="highest rate, for 4096 images per step; in proportion for fewer (%(default)s)")
    add("--weight-decay", "--wd", type=non_negative, default=0.05,
        help="weight decay (%(default)s)")
    return parser


# --- Data ---

class UnlabelledImages(torch.utils.data.Dataset):
    """[(epoch, index)] -> image, features, order, index.

    image (3, S, S) float32, normalised, S = --image-size; features: what SAM sees of the same part,
    (3, T, T) float32, T = --teacher-size, or its kept features (D, E, E) in half precision. order
    (E*E,): numbers of the tokens; the encoder sees the first `num_visible` of them. Random draws
    depend on (seed, epoch, index) alone.
    """
    classes = []  # images have none

    def __init__(self, items, args, augment):
        self.items, self.args, self.augment = items, args, augment
        self.embeddings = {}  # (index, mirrored): file, once cache_features has made it

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key
        args, image = self.args, read_image(self.items[index])
        with utils.seeded(args.seed, epoch, index):
            order = torch.randperm(args.grid**2)
            mirrored = self.augment and args.flip and bool(torch.rand(()) < 0.5)
            box = (0, 0, *image.shape[1:])
            if self.augment and args.crop:
                box = transforms.RandomResizedCrop.get_params(image, CROP_SCALE, (3 / 4, 4 / 3))
        if self.embeddings:
            features = load_embedding(self.embeddings[index % len(self), mirrored])
        else:
            features = teacher_view(image, box, mirrored, args)
        image = resize(image, box, mirrored, args.image_size) / 255
        image = v2.functional.normalize(image, efficient_sam.PIXEL_MEAN, efficient_sam.PIXEL_STD)
        return image, features, order, index


def read_image(item):
    """(name, path) -> image (3, H, W) uint8 RGB."""
    return torch.from_numpy(utils.read_image(item[1]).transpose(2, 0, 1).copy())


def resize(image, box, mirrored, side):
    """Image (3, H, W) uint8, box (top, left, height, width) -> (3, side, side) float32, 0..255."""
    image = v2.functional.resized_crop(image, *box, [side, side], antialias=True).float()
    return image.flip(2) if mirrored else image


def teacher_view(image, box, mirrored, args):
    """Image (3, H, W) uint8 -> what SAM sees of the box, (3, T, T) float32.

    Stretched to a square, as EfficientSAM stretches it, where SAM itself would pad.
    """
    image = resize(image, box, mirrored, args.teacher_size)
    return v2.functional.normalize(image, sam.PIXEL_MEAN, sam.PIXEL_STD)


def read_teacher_input(item, mirrored, args):
    """(name, path) -> what SAM sees of the whole image, (3, T, T) float32."""
    image = read_image(item)
    return teacher_view(image, (0, 0, *image.shape[1:]), mirrored, args)


def find_items(data_path):
    """Returns [(name, path)] of all images in a folder and those in it, sorted by name.

    The name is the path below data_path. Hidden files and folders are left out; links are followed,
    but no folder is read twice.
    """
    items, folders = [], set()
    if not Path(data_path).is_dir():
        raise utils.InputError(f"{data_path}: no such folder; give --data-path a folder of images")
    for folder, subfolders, files in os.walk(data_path, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        if os.path.realpath(folder) in folders:
            subfolders.clear()
            continue
        folders.add(os.path.realpath(folder))
        for name in files:
            path = Path(folder, name)
            if name[0] != "." and path.suffix.lower() in {*utils.IMAGES, ".npy"}:
                items.append((utils.nfc(path.relative_to(data_path).as_posix()), path))
    if not items:
        raise utils.InputError(f"{data_path}: no images or .npy files in it or its folders; give "
                               "--data-path a folder of images")
    return sorted(items)


def check_item(item, whole):
    """Returns True; InputError if the image, or its header if not `whole`, cannot be read."""
    if whole:
        read_image(item)
    else:
        utils.image_size(item[1])
    return True


def create_loaders(args):
    """Returns training and validation loaders over checked items."""
    if not args.data_path:
        raise utils.InputError("--data-path: give a folder of images, or --demo")
    val_items = find_items(args.val_path) if args.val_path else None
    train_items, val_items = utils.split_items(find_items(args.data_path), args, val_items)
    utils.check_items(check_item, [*train_items, *val_items], args)
    train_set = UnlabelledImages(train_items, args, augment=not args.overfit)
    val_set = UnlabelledImages(val_items, args, augment=False)
    train_loader = utils.create_loader(train_set, args, shuffle=True, pad=True)
    return train_loader, utils.create_loader(val_set, args, shuffle=False, batch_size=1)


def sanity_check(train_set, val_set, args):
    """Prints what is in the data and draws what training sees."""
    for part, dataset in (("train", train_set), ("val", val_set)):
        sizes = Counter("{}x{}".format(*utils.image_size(item[1])) for item in dataset.items)
        common = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(5))
        print(f"{part}: {len(dataset)} images, {common}")
    rows = {}
    for index in range(min(8, len(train_set))):
        image, _, order, _ = train_set[0, index]
        rows[train_set.items[index][0]] = [
            np.ascontiguousarray(read_image(train_set.items[index]).permute(1, 2, 0)),
            as_pixels(image), as_pixels(hide(image, order, args))]
    path = Path(args.output_dir, "sanity_check.png")
    utils.save_panel(path, rows, ["image", "as trained", "what the encoder sees"], HIDDEN)
    print(f"wrote {path}")
    return {"train": len(train_set), "val": len(val_set)}


def as_pixels(image):
    """Normalised image (3, S, S) -> (S, S, 3) uint8 RGB."""
    std, mean = torch.tensor(efficient_sam.PIXEL_STD), torch.tensor(efficient_sam.PIXEL_MEAN)
    image = image.permute(1, 2, 0).cpu() * std + mean
    return np.ascontiguousarray((255 * image).round().clamp(0, 255).byte())


def hide(image, order, args):
    """Image (3, S, S) -> a copy in which the patches that the encoder does not see are grey (0)."""
    seen = torch.zeros(args.grid**2, dtype=torch.bool)
    seen[order[:args.num_visible]] = True
    seen = seen.view(args.grid, args.grid)
    patch = args.image_size // args.grid
    return image * seen.repeat_interleave(patch, 0).repeat_interleave(patch, 1)


# --- Model ---

class CrossBlock(nn.Module):
    """Masked tokens (B, M, W) look at the visible (B, V, W) and at themselves -> (B, M, W)."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DecoderAttention(dim, dim // 32)  # MAE: 16 heads of 512 channels
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TransformerMLP(dim, 4 * dim)

    def forward(self, masked, visible):
        tokens = self.norm1(torch.cat([visible, masked], 1))
        queries = tokens[:, visible.shape[1]:]
        masked = masked + self.attn(queries, tokens, tokens)
        return masked + self.mlp(self.norm2(masked))


class Decoder(nn.Module):
    """Tokens that the encoder has seen (B, V, C), order (B, N) -> the others' (B, N - V, C)."""

    def __init__(self, encoder_dim, dim, depth, grid):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("position", sine_positions(grid, dim), persistent=False)
        self.blocks = nn.ModuleList(CrossBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.unembed = nn.Linear(dim, encoder_dim)

    def forward(self, visible, order):
        position = self.position[order]  # (B, N, W)
        count = visible.shape[1]
        visible = self.embed(visible) + position[:, :count]
        masked = self.mask_token + position[:, count:]
        for block in self.blocks:
            masked = block(masked, visible)
        return self.unembed(self.norm(masked))


class Sami(nn.Module):
    """Image (B, 3, S, S), order of its tokens (B, N), number of visible ones -> features (B, N, D).

    The features are in the image's own order; D is SAM's width.
    """

    def __init__(self, encoder, decoder_dim, decoder_depth, teacher_dim):
        super().__init__()
        self.image_encoder = encoder
        dim = encoder.pos_embed.shape[2]
        grid = efficient_sam.PRETRAINED_GRID
        encoder.pos_embed.data[0, 1:] = sine_positions(grid, dim)  # as MAE; here they are trained
        self.decoder = Decoder(dim, decoder_dim, decoder_depth, encoder.grid)
        self.head = nn.Linear(dim, teacher_dim)

    def encode(self, image, visible):
        """Image, numbers of visible tokens (B, V) -> their features (B, V, C); no other is seen."""
        encoder, rows = self.image_encoder, torch.arange(len(image), device=image.device)[:, None]
        x = encoder.patch_embed(image) + encoder.position()  # (B, C, E, E)
        x = x.flatten(2).transpose(1, 2)[rows, visible]      # (B, V, C)
        for block in encoder.blocks:
            x = block(x)
        return x

    def forward(self, image, order, num_visible):
        x = self.encode(image, order[:, :num_visible])
        if num_visible < order.shape[1]:
            x = torch.cat([x, self.decoder(x, order)], 1)    # (B, N, C), in `order`
        rows = torch.arange(len(image), device=image.device)[:, None]
        return self.head(x[rows, order.argsort(1)])


def sine_positions(grid, dim):
    """Position codes (grid * grid, dim): sines and cosines of column and of row, as MAE."""
    frequency = 10000 ** (-torch.arange(dim // 4) / (dim / 4))
    angle = torch.arange(grid)[:, None] * frequency
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim / 2)
    columns, rows = code.expand(grid, -1, -1), code[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1)


def create_model(args, checkpoint=None):
    """Returns the net, with weights of checkpoint or --weights, and the arguments that rebuild it."""
    arch = {"model": args.model, "image_size": args.image_size, "decoder_dim": args.decoder_dim,
            "decoder_depth": args.decoder_depth, "teacher": args.teacher}
    encoder = efficient_sam.NETS[args.model](args.image_size).image_encoder
    model = Sami(encoder, args.decoder_dim, args.decoder_depth, args.teacher_dim)
    if checkpoint:
        check_net(checkpoint, f"--resume {args.resume}", {"net": "sami", **arch})
        load_weights(model, checkpoint["model"], f"--resume {args.resume}")
    elif args.weights != "none":
        state = read_weights(args.weights, {"net": "sami", **arch}, free=["image_size"])
        load_weights(model, state, args.weights)
    # The neck is behind what SAMI trains: encoder.pth holds it as it was drawn
    model.image_encoder.neck.requires_grad_(False)
    return model, arch


def create_teacher(args, device):
    """Returns SAM at --teacher-size with --teacher-weights.

    Of it are used: image_encoder, (B, 3, T, T) -> (B, D, E, E), and prompt_encoder.dim, which is D.
    """
    teacher = sam.NETS[args.teacher](args.teacher_size)
    weights = args.teacher_weights or args.teacher
    if weights != "none":
        if weights not in sam.WEIGHTS and not Path(weights).exists():
            raise utils.InputError(f"--teacher-weights {weights}: no such file; give a path")
        load_sam(teacher, weights)
    args.base_hash = sam.hash_frozen(teacher)
    args.teacher_dim = teacher.prompt_encoder.dim
    return teacher.requires_grad_(False).eval().to(device)


@torch.no_grad()
def target_features(teacher, features, args, dtype):
    """What the data set gives -> SAM's features (B, D, E, E) float32 on the encoder's grid."""
    if features.dtype == torch.float16:  # kept ones
        return features.float()
    features = sam.encode(teacher, features, dtype)
    return F.interpolate(features, (args.grid, args.grid), mode="bilinear", antialias=True)


def cache_features(teacher, datasets, run, args):
    """Keeps SAM's features of whole images on disk, on the encoder's grid, in half precision."""
    def key(image, mirrored):
        sizes = f"{args.teacher_size} {args.grid}"
        return f"{image} {args.base_hash} {sizes} {run.dtype} {mirrored} {PREPROCESS}"

    def encode(images):
        return target_features(teacher, images, args, run.dtype)

    keep_embeddings(datasets, key, read_teacher_input, encode, args.teacher_dim * args.grid**2, run)


# --- Loss ---

def criterion(pred, target, valid):
    """Returns the sum over images of the mean squared error of all tokens.

    pred, target (B, N, D), valid (B,) bool: which images count. The paper's equation sums the squares
    over the D channels, its text says mean: a constant factor.
    """
    return ((pred - target).square().mean((1, 2)) * valid).sum()


# --- Evaluation ---

@torch.no_grad()
def evaluate(model, teacher, mean, loader, run, args):
    """Returns means over images, of which each has the same mask always; mean: of mean_features.

    val_masked_error, val_visible_error: mean squared error of those tokens; val_masked_cosine,
    val_visible_cosine: cosine similarity; mean_*_error, position_*_error: errors of the mean feature
    and of each position's mean; val_explained: 1 - error / error of the mean feature, all tokens.
    """
    model.eval()
    rows = {}  # index: (2, 4), figures of masked and of visible tokens
    for *batch, (index,) in utils.until_stopped(loader, "validating", run.device):
        image, features, order = [part.to(run.device) for part in batch]
        target = as_tokens(target_features(teacher, features, args, run.dtype))
        pred = reconstruct(model, image, order, run.dtype, args)
        positions = as_tokens(mean[None].to(run.device))
        found = [(guess - target).square().mean(2)
                 for guess in (pred, positions.mean(1, keepdim=True), positions)]
        found.append(F.cosine_similarity(pred, target, dim=2))
        found = torch.stack(found)[:, 0, order[0]].cpu().double()  # (4, N), in `order`
        visible, masked = found[:, :args.num_visible], found[:, args.num_visible:]
        rows[int(index)] = torch.stack([masked.mean(1), visible.mean(1)])
    rows = torch.stack([*utils.merge_over_ranks(rows).values()]).mean(0)
    figures = {}
    for part, row in zip(("masked", "visible"), rows.tolist()):
        names = [name.format(part) for name in FIGURES]
        figures.update(zip(names, row))
    visible = args.num_visible / args.grid**2  # with --mask-share 0 no token is masked: nan
    error, baseline, *_ = ((1 - visible) * rows[0].nan_to_num() + visible * rows[1]).tolist()
    return {**figures, "val_explained": 1 - error / baseline}


def as_tokens(features):
    """(B, D, E, E) -> (B, E*E, D)."""
    return features.flatten(2).transpose(1, 2)


def reconstruct(model, image, order, dtype, args):
    """Image (B, 3, S, S), order (B, N) -> predicted features (B, N, D) float32."""
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        return model(image, order, args.num_visible).float()


@torch.no_grad()
def mean_features(teacher, dataset, run, args):
    """Returns the mean of SAM's features at each position over a data set's images, (D, E, E)."""
    loader = utils.create_loader(dataset, args, shuffle=False, batch_size=1)
    total = torch.zeros(args.teacher_dim, args.grid, args.grid, dtype=torch.float64)
    for _, features, _, _ in utils.until_stopped(loader, "mean features", run.device):
        features = target_features(teacher, features.to(run.device), args, run.dtype)
        total += features[0].cpu().double()
    return (sum(utils.merge_over_ranks({run.rank: total}).values()) / len(dataset)).float()


def print_table(figures):
    """Prints figures of evaluate: a column each of masked and of visible tokens."""
    print(f"{'':26}{'masked tokens':>16}{'visible tokens':>16}")
    titles = ["mean squared error", "  of the mean feature", "  of each position's mean",
              "cosine similarity"]
    for title, name in zip(titles, FIGURES):
        masked, visible = [figures[name.format(part)] for part in ("masked", "visible")]
        print(f"{title:26}{masked:16.4f}{visible:16.4f}")


@torch.no_grad()
def draw_samples(model, teacher, dataset, run):
    """Draws val_samples.png: image | what the encoder sees | SAM's features | prediction.

    Features as colours: the first three principal components of SAM's features of that image.
    """
    model.eval()
    rows, args = {}, dataset.args
    for index in range(min(4, len(dataset))):
        image, features, order = [part[None].to(run.device) for part in dataset[0, index][:3]]
        target = as_tokens(target_features(teacher, features, args, run.dtype))[0].cpu()
        pred = reconstruct(model, image, order, run.dtype, args)[0].cpu()
        _, _, axes = torch.linalg.svd(target - target.mean(0), full_matrices=False)
        colours = [(part - target.mean(0)) @ axes[:3].T for part in (target, pred)]  # (N, 3)
        low, high = colours[0].amin(0), colours[0].amax(0)
        row = [as_pixels(image[0]), as_pixels(hide(image[0].cpu(), order[0].cpu(), args))]
        for colour in colours:
            colour = (255 * (colour - low) / (high - low).clamp(min=1e-6)).clamp(0, 255).byte()
            colour = colour.view(args.grid, args.grid, 3).numpy()
            row.append(colour.repeat(16, 0).repeat(16, 1))
        rows[dataset.items[index][0]] = row
    titles = ["image", "what the encoder sees", "SAM's features", "prediction"]
    utils.save_panel(run.folder / "val_samples.png", rows, titles, HIDDEN)


# --- Training ---

def create_optimizer(model, args):
    """Returns AdamW; weight decay on matrices, as MAE, and not on position codes."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and "pos_embed" not in name]
    others = [p for name, p in trained if p.ndim < 2 or "pos_embed" in name]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                             fused=True)


def learning_rate(args, epoch):
    """Returns the rate at epoch 0.0 to --epochs: rises linearly, then falls as a cosine to 0.

    By the options alone, so a resumed run may change --epochs.
    """
    highest = args.lr * args.batch_size * args.accumulate * args.world_size / 4096
    warm_up = min(args.warmup_epochs, args.epochs / 2)
    if epoch < warm_up:
        return highest * epoch / warm_up
    return highest * (1 + math.cos(math.pi * (epoch - warm_up) / (args.epochs - warm_up))) / 2


def set_learning_rate(optimizer, args, epoch):
    """Sets the rate before each step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, epoch)


def train_one_epoch(model, teacher, loader, optimizer, run, args):
    """Trains for one pass over the training data, or the rest of a resumed one; run adds it up."""
    model.train()
    for batches in run.steps(loader):  # the --accumulate batches of one optimizer step
        loss_sum, num_images = 0.0, 0
        for batch in batches:
            image, features, order, index = [part.to(run.device, non_blocking=run.pinned)
                                             for part in batch]
            target = as_tokens(target_features(teacher, features, args, run.dtype))
            valid = index >= 0  # -1 only fills up a process's last batch
            loss = criterion(reconstruct(model, image, order, run.dtype, args), target, valid)
            run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            num_images += valid.sum()
        epoch = run.progress["epoch"] + run.progress["step"] / run.steps_per_epoch
        set_learning_rate(optimizer, args, epoch)
        if run.finish_gradient(optimizer, loss_sum, num_images):  # divides by num_images; False: not finite
            run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad(set_to_none=True)


# --- Main ---

def save_encoder(run, model):
    """Writes encoder.pth: the encoder's tensors alone, with official names."""
    state = model.state_dict()
    run.save_plain("encoder.pth", {key: value for key, value in state.items()
                                   if key.startswith("image_encoder.")})


def set_sizes(args):
    """Sets args.grid, tokens along a side, and args.num_visible; InputError if sizes cannot be."""
    encoder = efficient_sam.NETS[args.model]().image_encoder
    patch = encoder.patch_embed.proj.kernel_size[0]
    divisors = {"image_size": patch, "teacher_size": sam.PATCH_SIZE, "decoder_dim": 32}
    for name, divisor in divisors.items():
        value = getattr(args, name)
        if value % divisor:
            raise utils.InputError(f"{utils.option_of(name)} {value}: must be a multiple of {divisor}")
    args.grid = args.image_size // patch
    args.num_visible = max(1, round(args.grid**2 * (1 - args.mask_share)))


def print_cost(teacher, item, run, args):
    """Prints what SAM costs per image on this device: seconds, and bytes of its kept features."""
    features = read_teacher_input(item, False, args)[None].to(run.device)
    target_features(teacher, features, args, run.dtype).cpu()  # the first call is slower
    started = time.monotonic()
    target_features(teacher, features, args, run.dtype).cpu()
    seconds, size = time.monotonic() - started, 2 * args.teacher_dim * args.grid**2
    print(f"SAM takes {seconds:.3g} s per image: with --crop in every epoch; with --crop False once "
          f"(--flip: twice), and keeps {size / 1e3:.0f} kB each time")


def prepare_demo(args):
    """Prepares --demo: objects without labels, and a small SAM trained on others, not downloaded."""
    utils.start_process_group(utils.pick_device(args.device))  # so that one process draws
    folder = Path(args.output_dir)
    if not args.data_path:
        names = [f"object_{i:04d}" for i in range(HELD_OUT + UNLABELLED)]
        utils.draw_demo("objects", folder / "data", len(names))
        args.data_path, split = str(folder / "data/imgs"), str(folder / "unlabelled.json")
        args.split = None if args.val_path else split
        val, train = names[:HELD_OUT], names[HELD_OUT:]  # neither part trains on those held out
        with utils.first_rank_first():
            write_split(split, [f"{name}.npy" for name in train], [f"{name}.npy" for name in val])
            write_split(folder / "labelled.json", 10 * train[:LABELLED], val)
    if args.teacher_weights:
        return
    args.teacher_weights = str(folder / "teacher/best.pth")
    if args.sanity_check or args.test_only:
        return
    script = utils.import_script("finetune_sam_decoder", "--demo")
    print("First a small SAM learns plain objects; it takes the place of an official file.")
    plain = utils.draw_demo("plain", folder / "teacher/data", 120)
    options = ["--demo", "--train", "all", "--weights", "none", "-b", "2", "--epochs", str(TEACHER_EPOCHS),
               "--image-size", str(args.teacher_size), "--data-path", plain,
               "--output-dir", str(folder / "teacher"), "--seed", str(args.seed), "--device", args.device]
    options += ["--resume", "auto"] if args.resume else ["--overwrite"]
    script.main(script.get_args_parser().parse_args(options))
    print("Then a small encoder learns its features from other images, without labels.")


def write_split(path, train, val):
    """Writes the names of a split.json."""
    Path(path).write_text(json.dumps({"train": train, "val": val}), encoding="utf-8")


def compare_students(script, args):
    """Prints and returns val_iou of fresh and of pretrained encoders, fine-tuned in equal steps.

    By the script train_efficientsam on few labelled images; the decoder starts alike.
    """
    folder = Path(args.output_dir)
    print(f"At last the encoder and fresh ones are fine-tuned on {LABELLED} labelled images.")
    ious = {"fresh": [], "pretrained": []}
    for seed in range(3):
        for name, weights in (("fresh", "none"), ("pretrained", str(folder / "encoder.pth"))):
            options = ["--demo", "--epochs", str(FINETUNE_EPOCHS), "--weights", weights,
                       "--image-size", str(args.image_size), "--data-path", str(folder / "data"),
                       "--split", str(folder / "labelled.json"), "--seed", str(seed),
                       "--device", args.device, "--output-dir", str(folder / f"{name}_{seed}")]
            with contextlib.redirect_stdout(None):
                figures = script.main(script.get_args_parser().parse_args(options))
            ious[name].append(figures["val_iou"])
    print(f"{'val_iou':8}{'fresh':>12}{'pretrained':>12}   (the filled box: {figures['box_iou']:.4f})")
    for seed, (fresh, pretrained) in enumerate(zip(*ious.values())):
        print(f"seed {seed:<3}{fresh:12.4f}{pretrained:12.4f}")
    print(f"{'mean':8}" + "".join(f"{sum(found) / len(found):12.4f}" for found in ious.values()))
    return {f"{name}_val_iou": found for name, found in ious.items()}


def main(args):
    """Pretrains as the options say; returns the last figures and the best val_explained."""
    compared = None
    if args.demo and not (args.data_path or args.sanity_check or args.test_only):
        compared = utils.import_script("train_efficientsam", "--demo")  # for the end, or an error now
    if args.demo:
        prepare_demo(args)
    set_sizes(args)
    run = utils.Run(args, net="sami")  # joins torchrun's processes; seeds; device, precision
    if args.deterministic and run.device.type == "cuda" and args.grid != efficient_sam.PRETRAINED_GRID:
        size = args.image_size // args.grid * efficient_sam.PRETRAINED_GRID
        raise utils.InputError("--deterministic: bicubic resizing of position codes has no deterministic "
                               f"gradient on CUDA; leave it out, or give --image-size {size}")
    train_loader, val_loader = create_loaders(args)
    train_set, val_set = train_loader.dataset, val_loader.dataset
    if args.sanity_check:
        return sanity_check(train_set, val_set, args)

    teacher = create_teacher(args, run.device)
    model, arch = create_model(args, run.checkpoint)
    model = model.to(run.device)
    run.describe(args.model, model, train_set, val_set)
    mean_set = UnlabelledImages(train_set.items[:MEAN_OVER], args, augment=False)
    sets = [val_set, mean_set]  # whose features can be kept
    if not args.test_only and not (args.crop and train_set.augment):
        sets.append(train_set)
    if args.test_only:
        run.check_test(same=["mask_share", "teacher_size", "base_hash"])
        if not args.no_cache:
            cache_features(teacher, sets, run, args)
        mean = mean_features(teacher, mean_set, run, args)
        figures = evaluate(model, teacher, mean, val_loader, run, args)
        print_table(figures)
        return figures

    print_cost(teacher, train_set.items[0], run, args)
    optimizer = create_optimizer(model, args)
    progress = run.start(arch, train_set, val_set, model=model, optimizer=optimizer)
    if args.compile:
        model.compile()

    figures = None
    with run.saved_when_stopped():  # SIGTERM, Ctrl-C
        if not args.no_cache:
            cache_features(teacher, sets, run, args)
        if "mean" not in progress:
            progress["mean"] = mean_features(teacher, mean_set, run, args)
        while not run.is_over():    # --epochs, --early-stopping
            train_one_epoch(model, teacher, train_loader, optimizer, run, args)
            figures = evaluate(model, teacher, progress["mean"], val_loader, run, args)
            run.end_epoch(figures, show=["val_masked_error", "position_masked_error",
                                         "val_visible_error", "val_explained"])
            if run.is_best(figures["val_explained"]):
                run.save_best()
                save_encoder(run, model)
            run.save_last()
            run.plot_curves(["loss"], ["val_masked_error", "position_masked_error",
                                       "mean_masked_error", "val_visible_error"], ["val_explained"])
            draw_samples(model, teacher, val_set, run)

    figures = figures or evaluate(model, teacher, progress["mean"], val_loader, run, args)
    print_table(figures)
    run.finish("val_explained")
    if (run.folder / "encoder.pth").exists():
        print(f"the encoder of that epoch: {run.folder}/encoder.pth")
    if compared:
        figures.update(compare_students(compared, args))
    return {**figures, "best_val_explained": progress["best"]}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
