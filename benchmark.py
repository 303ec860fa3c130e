"""Compares our scripts with the articles' way: seconds and memory at equal precision, and as run.

    python benchmark.py --quick
    python benchmark.py --cases UNet sam2 --steps 5
    python benchmark.py --device cuda --cases UNet-256 -b 64 --steps 50

CASES below is the list. A case makes the article's way and ours with one function and two settings,
and measures both in float32, both in bf16, and each in its own settings: those that the article
trains with, and those that we recommend. All ways of a case take turns in one process, so that a
busy machine slows them alike; peak memory is that of a process for each way. Data lies on the
device already, except in the cases named decoder and data. train_efficientsam_ddp.py does the same
steps as train_efficientsam.py.
Writes: OUTPUT_DIR/benchmark.md (what it prints), OUTPUT_DIR/benchmark.png (the ratios).
"""
import argparse
import contextlib
import importlib
import inspect
import itertools
import math
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from monai.networks.nets import BasicUNet, BasicUNetPlusPlus
from tqdm import tqdm

import demo_data
import finetune_sam_decoder
import train_deeplabv3
import train_efficientsam
import train_sam2
import train_unet
import utils
from nets import sam
from nets import unet as unet_nets

BF16 = torch.bfloat16
COLUMNS = ("float32", "bf16", "own settings")
MONAI_NETS = {"UNet": BasicUNet, "NestedUNet": BasicUNetPlusPlus}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    add, add_switch = parser.add_argument, parser.add_switch
    add("--output-dir", default="runs/benchmark",
        help="folder for benchmark.md and benchmark.png (%(default)s)")
    add_switch("--quick", help=f"{len(QUICK)} cases, three steps, small batches: "
                               "a few minutes on two idle CPU cores")
    add("--cases", nargs="+", metavar="CASE", type=find_cases,
        help=f"cases, or how their names begin: {', '.join(CASES)} (all, fewer with --quick)")
    add("--steps", type=utils.number(int, 1),
        help="timed steps of each way (1 to 10, with --quick at most 3)")
    add("-b", "--batch-size", type=utils.number(int, 1),
        help="images per batch; of decoder, in the data set (1 to 16, less with --quick)")
    add("-j", "--workers", type=utils.number(int, 1), default=min(4, os.cpu_count()),
        help="loader processes, measured beside none (%(default)s)")
    add("--threads", type=utils.number(int, 1), default=2,
        help="CPU threads of torch (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    return parser


def find_cases(text):
    """Type of --cases: returns the case of that name, or all that begin so."""
    names = [text] if text in CASES else [name for name in CASES if name.startswith(text)]
    if not names:
        raise argparse.ArgumentTypeError(f"{text}: no case begins so; they are {', '.join(CASES)}")
    return names


# --- Ways ---
# What cases make: (setup, settings of a way) -> {figure: function}. The function does the work once
# and returns how many items (images, objects ...) that were: times are for one item.
# setup: device, batch, workers, threads and a folder for data sets. Settings: plain=True is the
# article's way; dtype is that of autocast, None for float32. The docstrings are printed, too.

def unet(setup, net, size, plain=False, monai=False, dtype=None):
    """Trains and runs U-Net or U-Net++.

    Article: contiguous tensors, torch's default optimizer. MONAI: BasicUNet, BasicUNetPlusPlus of
    the same widths, in the article's way. Ours: channels_last, but in float32 on a CPU, and a
    fused optimizer. The loss is the same. Own settings: article float32, ours bf16.
    """
    args = train_unet.get_args_parser().parse_args(["--model", net])
    image = torch.rand(setup.batch, 3, size, size, device=setup.device)
    mask = (torch.rand(setup.batch, 1, size, size, device=setup.device) > 0.5).float()
    if monai:
        model = MONAI_NETS[net](2, 3, 1, (*unet_nets.CHANNELS, unet_nets.CHANNELS[0]),
                                norm="batch", act="relu")
    else:
        model = train_unet.create_model(args)[0]
    layout = unet_nets.memory_format(setup.device, dtype)
    model.to(setup.device, memory_format=torch.contiguous_format if plain else layout)

    def predict():
        if not plain:
            return unet_nets.forward(model, image, dtype)[-1]
        with torch.autocast(setup.device.type, dtype, enabled=dtype is not None):
            outputs = model(image)
        outputs = outputs if isinstance(outputs, list) else [outputs]  # of MONAI's U-Net++
        return outputs[-1].float()

    def compute_loss():
        return train_unet.criterion(predict(), mask, args.loss)

    optimizer = train_unet.create_optimizer(model, args)
    return step_and_inference(
        setup, "image", setup.batch, model, optimizer, plain, compute_loss, predict)


def deeplabv3(setup, net, size, plain=False, dtype=None):
    """Trains and runs DeepLabV3.

    Article: torchvision's net, contiguous tensors, torch's default optimizer. Ours: channels_last,
    fused optimizer, a loss without copies. Own settings: article float32, ours bf16.
    """
    args = train_deeplabv3.get_args_parser().parse_args(
        ["--model", net, "--weights", "none", "--batch-size", str(setup.batch)])
    train_deeplabv3.count_trained(setup.batch, args)  # InputError for a batch of one
    num_classes = args.num_classes + 1  # with the background
    image = torch.randn(setup.batch, 3, size, size, device=setup.device)
    label = torch.randint(num_classes, (setup.batch, size, size), device=setup.device)
    if plain:  # the net that the article copies
        build = getattr(torchvision.models.segmentation, f"deeplabv3_{net}")
        model = build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True)
        layout = torch.contiguous_format
    else:
        model, label = train_deeplabv3.create_model(args)[0], label.byte()
        layout = torch.channels_last
    model.to(setup.device, memory_format=layout)

    def forward():
        with torch.autocast(setup.device.type, dtype, enabled=dtype is not None):
            return model(image.contiguous(memory_format=layout))

    def compute_loss():
        outputs = forward()
        if not plain:
            return train_deeplabv3.criterion(outputs, label)
        out, aux = (F.cross_entropy(outputs[name].float(), label, ignore_index=255)
                    for name in ("out", "aux"))
        return out + 0.5 * aux

    optimizer = train_deeplabv3.create_optimizer(model, args)
    return step_and_inference(
        setup, "image", setup.batch, model, optimizer, plain, compute_loss, forward)


def efficient_sam(setup, net, size, objects=1, plain=False, dtype=None):
    """Trains and runs EfficientSAM, all of it, on one object per image.

    Article: attention with all weights in memory, torch's default optimizer. Ours: fused attention,
    fused optimizer. Own settings: article 1024 pixels, whatever the image's size, and float32; ours
    the case's size and bf16. Cases named objects: both ways are ours; the first encodes an image
    for each of its objects, the second once for eight of them; own settings: bf16. With a number
    at the end: only ours, once for so many.
    """
    args = train_efficientsam.get_args_parser().parse_args(
        ["--model", net, "--weights", "none", f"--image-size={size}"])
    shape, device = (setup.batch, objects), setup.device
    image = torch.rand(setup.batch, 3, size, size, device=device)
    mask_side = min(size, train_efficientsam.MASK_SIZE)
    masks = torch.rand(*shape, mask_side, mask_side, device=device) > 0.5
    corners = size * torch.tensor([[0.2, 0.3], [0.7, 0.8]], device=device)
    points = corners.expand(*shape, 2, 2)
    labels = torch.tensor([2, 3], device=device).expand(*shape, 2)
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    attention = written_out_attention if plain else F.scaled_dot_product_attention
    model = train_efficientsam.create_model(args)[0].to(device)

    def forward():
        with (torch.autocast(device.type, dtype, enabled=dtype is not None),
              mock.patch.object(F, "scaled_dot_product_attention", attention)):
            logits, iou = model(image, points, labels, False)
        logits = logits.float().flatten(0, 1)
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = F.interpolate(logits, masks.shape[-2:], mode="bicubic")
        return logits.unflatten(0, shape), iou.float()

    def compute_loss():
        loss_sum = train_efficientsam.criterion(*forward(), masks, valid, args)
        return loss_sum / math.prod(shape)

    optimizer = train_efficientsam.create_optimizer(model, args)
    return step_and_inference(
        setup, "object", math.prod(shape), model, optimizer, plain, compute_loss, forward)


def sam2(setup, net, size, frames=4, objects=1, frozen=False, checkpointing=False, plain=False,
         dtype=None):
    """Trains SAM 2.1 on a clip of four frames: one object, one click, seven corrections of it.

    Article: what the official training does, with our SAM2 class in place of its own: it encodes
    all frames together, runs eleven decoder passes, enlarges every mask of each to full size,
    encodes the memory of every frame, and computes the losses of all masks at the end, keeping all
    for the backward pass; torch's default AdamW. How the official class computes its layers is not
    in the ratios. Ours: the losses are computed again in the backward pass, the last frame's memory
    is not encoded, fused AdamW. Own settings: bf16 in both, as in the official configuration.
    Cases named checkpointing: ours with --gradient-checkpointing. Cases named frozen: neither way
    trains the image encoder. Other numbers of frames and objects are in the cases' names.
    """
    args = train_sam2.get_args_parser().parse_args([
        "--model", net, "--weights", "none", f"--image-size={size}", f"--num-frames={frames}",
        f"--gradient-checkpointing={checkpointing}",
        "--freeze", "image_encoder" if frozen else "none"])
    device = setup.device
    model = train_sam2.create_model(args)[0].to(device)
    optimizer = train_sam2.create_optimizer(model, args)
    images = torch.randint(256, (frames, 3, size, size), dtype=torch.uint8, device=device)
    masks = torch.zeros(frames, objects, size, size, dtype=torch.bool, device=device)
    for t in range(frames):  # squares that move to the right
        left = (t + 2) * size // (2 * frames)
        masks[t, :, size // 4:size // 2, left:left + size // 4] = True
    clicks = torch.tensor([0.3 * size, 0.3 * size], device=device).expand(objects, 1, 2)
    labels = torch.ones(objects, 1, dtype=torch.int32, device=device)
    draws = torch.rand(frames, args.num_correction_points, objects, device=device)
    clip = train_sam2.Clip(
        images, masks, {0: {"point_coords": clicks, "point_labels": labels}}, (0,), draws)
    videos = torch.zeros(objects, dtype=torch.long, device=device)
    weights = torch.tensor([args.focal_weight, args.dice_weight, args.iou_weight,
                            args.score_weight], device=device)

    def official_loss():
        optimizer.zero_grad()  # before the forward pass
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            backbone = train_sam2.encode(model, images, dtype)
            passes = official_passes(model, backbone, videos, clip, args)
            losses = [official_losses(outputs, masks[t], args) for t, outputs in passes]
            return (weights * sum(losses)).sum()

    def our_loss():
        if frozen:
            model.image_encoder.eval()
        backbone, losses = train_sam2.encode(model, images, dtype), 0
        for t, passes in train_sam2.track_clips(model, backbone, videos, clip, args, dtype):
            for outputs in passes:
                losses = losses + train_sam2.criterion(*outputs, masks[t], args)
        return (weights * losses).sum()

    compute_loss = official_loss if plain else our_loss
    return step_and_inference(
        setup, "clip", 1, model, optimizer, plain, compute_loss, clip_grad=args.clip_grad)


def decoder(setup, net, size, plain=False, dtype=None):
    """Fine-tunes SAM's decoder on images of 500 pixels, without validation.

    Article: encodes every image in every epoch, with the scores of all heads in memory at once;
    trains one object at a time; loss at the image's own size. Ours: finetune_sam_decoder.py, which
    keeps the embeddings of the first epoch. Own settings: article float32, ours bf16.
    """
    data_path = Path(setup.folder, "instances")
    if not data_path.exists():
        demo_data.write_instances(data_path, 2 * setup.batch + 2, rings=True, size=500)
    run_folder = tempfile.mkdtemp(dir=setup.folder)
    args = finetune_sam_decoder.get_args_parser().parse_args([
        f"--data-path={data_path}", "--year=2012", f"--overfit={setup.batch}", f"--model={net}",
        "--weights=none", f"--image-size={size}", f"--amp={'bf16' if dtype else 'off'}",
        f"--device={setup.device}", "--workers=0", f"--output-dir={run_folder}/run"])
    run = utils.Run(args, "sam")
    loader = finetune_sam_decoder.create_loaders(args)[0]
    dataset = loader.dataset
    model, arch = finetune_sam_decoder.create_model(args)
    args.base_hash = finetune_sam_decoder.hash_frozen(model)
    model.to(setup.device)
    optimizer = finetune_sam_decoder.create_optimizer(model, args)

    def encode():
        image = finetune_sam_decoder.read_input(dataset.items[0], False, args)
        encode_image(model, image[None].to(setup.device), dtype, plain)
        return 1

    def article_epoch():
        as_script(plain, setup.device)
        model.train()
        for item in dataset.items:
            utils.raise_if_stopped()
            loss = article_loss(model, item, dtype, args, setup.device)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return 1

    def first_epoch():
        shutil.rmtree(Path(run_folder, "embeddings"), ignore_errors=True)
        with contextlib.redirect_stdout(None):  # how many embeddings are made, and where
            finetune_sam_decoder.cache_embeddings(model, [dataset], run, args)
        return later_epoch()

    def later_epoch():
        as_script(plain, setup.device)
        finetune_sam_decoder.train_one_epoch(model, loader, optimizer, run, args)
        run.progress.update(epoch=run.progress["epoch"] + 1, step=0)
        return 1

    if plain:
        use_default_kind(optimizer)
        return {"first epoch, s": article_epoch, "later epoch, s": article_epoch,
                "encoder, s/image": encode}
    part = finetune_sam_decoder.trained_part(model, args)
    run.start(arch, dataset, dataset, model=part, optimizer=optimizer)
    return {"first epoch, s": first_epoch, "later epoch, s": later_epoch,
            "encoder, s/image": encode}


def data(setup, script, kind, count=100_000):
    """Checks a data set as a script does before its first step, then loads 64 batches from it.

    The images are generated, 96 to 128 pixels in size; the script's options are its defaults.
    Start-up reads the names and sizes of all of them and the pixels of the first 2,000. Where
    loading takes less than the training step, the net waits for nothing; on a CPU they share the
    processor. There is only our way.
    """
    folder = Path(setup.folder, f"{script}_{count}")
    if not folder.exists():
        write_many(kind, folder, count)
    module, loaders = importlib.import_module(script), []
    args = module.get_args_parser().parse_args(
        [f"--data-path={folder}", f"--batch-size={setup.batch}", f"--workers={setup.workers}"])

    def start_up():
        loaders[:] = module.create_loaders(args)
        return 1

    def load(workers):
        loader = loaders[0]  # of training
        loader.num_workers = workers
        loader.sampler.set_epoch(0)
        return sum(len(batch[-1]) for batch in itertools.islice(loader, 64))

    return {f"start-up, {count} images, s": start_up,
            "loader, 0 workers, s/image": lambda: load(0),
            f"loader, {setup.workers} workers, s/image": lambda: load(setup.workers)}


# --- What ways consist of ---

def step_and_inference(setup, item, items, model, optimizer, plain, compute_loss, predict=None,
                       clip_grad=0.0):
    """Returns {figure: function}: a training step on `items` items, and a prediction of them.

    compute_loss returns the mean loss over the items.
    """
    run = utils.Run.__new__(utils.Run)  # without folder, log and checkpoints
    run.args, run.device = SimpleNamespace(world_size=1), setup.device
    run.parts, run.progress, run.items = {"model": model}, Counter(), [("",)] * items
    run.scaler = torch.amp.GradScaler(setup.device.type, enabled=False)

    def step():
        as_script(plain, setup.device)
        model.train()
        run.buffers = [] if plain else [buffer.clone() for buffer in model.buffers()]
        loss = compute_loss()
        if plain:
            optimizer.zero_grad()
            loss.backward()
            if clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            return items
        loss = loss * items  # as the scripts, whose loss is a sum
        loss.backward()
        if run.finish_gradient(optimizer, loss.detach(), items, clip_grad):
            optimizer.step()
        optimizer.zero_grad()
        return items

    @torch.no_grad()
    def inference():
        model.eval()
        predict()
        return items

    if plain:
        use_default_kind(optimizer)
    figures = {f"training step, s/{item}": step}
    if predict:
        figures[f"inference, s/{item}"] = inference
    return figures


def as_script(plain, device):
    """Asks for deterministic algorithms, as utils.Run does on a CPU, or not, as the articles."""
    torch.use_deterministic_algorithms(not plain and device.type == "cpu", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def use_default_kind(optimizer):
    """Lets torch choose how to compute the optimizer, as if fused=True had not been given."""
    for group in optimizer.param_groups:
        group["fused"] = None


def written_out_attention(q, k, v):
    """Computes attention as EfficientSAM's authors wrote it: all weights, (N, N), in memory."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v


def official_passes(model, backbone, videos, clip, args):
    """Tracks objects through a clip as the official training does; returns [(frame, outputs)].

    Arguments: of train_sam2.track_clips. The outputs are those of SAM2._forward_sam_heads, for each
    decoder pass. Nothing is freed, and every frame's memory is encoded.
    """
    maps, positions, sizes = backbone
    bank = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    num_frames, passes = len(clip.masks), []
    for t in [*clip.prompts, *(t for t in range(num_frames) if t not in clip.prompts)]:
        masks, images = clip.masks[t], videos * num_frames + t
        features, codes = [x[:, images] for x in maps], [positions[-1][:, images]]
        points, prompted = clip.prompts.get(t) or None, t in clip.prompts
        mask = masks[:, None] if prompted and not points else None
        _, outputs, finer_maps, seen = model._track_step(
            t, prompted, features, codes, sizes, points, mask, bank, num_frames)
        passes.append((t, outputs))
        for draws in clip.draws[t] if t in clip.corrected else ():
            best_low_res, best_full_size = outputs[3:5]
            pred = best_full_size[:, 0].detach() > 0
            coords, labels = train_sam2.next_clicks(masks, pred, draws, torch.zeros_like(pred))
            if points is not None:
                coords = torch.cat([points["point_coords"], coords], 1)
                labels = torch.cat([points["point_labels"], labels], 1)
            points = {"point_coords": coords, "point_labels": labels}
            outputs = model._forward_sam_heads(
                seen, points, best_low_res, finer_maps, model._use_multimask(prompted, points))
            passes.append((t, outputs))
        *_, best_full_size, pointer, score = outputs
        memory, codes = model._encode_new_memory(
            features, sizes, best_full_size, score, points is not None)
        as_prompted = prompted or args.corrected_as_prompted and t in clip.corrected
        bank["cond_frame_outputs" if as_prompted else "non_cond_frame_outputs"][t] = {
            "obj_ptr": pointer, "maskmem_features": memory, "maskmem_pos_enc": codes}
    return passes


def official_losses(outputs, masks, args):
    """Returns train_sam2.criterion of full-size masks; all is kept for the backward pass."""
    _, logits, ious, *_, score = outputs  # logits (N, M, S, S)
    losses = [train_sam2.mask_losses(mask_logits, masks, args) for mask_logits in logits.unbind(1)]
    focal, dice, true_ious = (torch.stack(part, 1) for part in zip(*losses))
    best = (args.focal_weight * focal + args.dice_weight * dice).argmin(1, keepdim=True)
    focal, dice = (part.gather(1, best)[:, 0] for part in (focal, dice))
    error, present = (ious.float() - true_ious).abs().mean(1), masks.flatten(1).any(1).float()
    wrong = F.binary_cross_entropy_with_logits(score[:, 0].float(), present, reduction="sum")
    return torch.stack([*((part * present).sum() for part in (focal, dice, error)), wrong])


@torch.no_grad()
def encode_image(model, image, dtype, plain):
    """Returns the embedding of a normalised image; plain: attention as SAM's authors arrange it."""
    attention = official_attention if plain else sam.Attention.forward
    with mock.patch.object(sam.Attention, "forward", attention):
        return sam.encode(model, image, dtype)


def official_attention(self, x):
    """Computes nets/sam.py's Attention with the scores of all heads in memory at once."""
    batch, side, _, channels = x.shape
    qkv = self.qkv(x).reshape(batch, side**2, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.flatten(1, 2)  # each (batch * heads, tokens, channels of a head)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    places = torch.arange(side, device=x.device)
    distance = places[:, None] - places + side - 1
    square = q.unflatten(1, (side, side))
    rows = torch.einsum("bhwc,hkc->bhwk", square, self.rel_pos_h[distance])
    columns = torch.einsum("bhwc,wkc->bhwk", square, self.rel_pos_w[distance])
    scores = scores.view(-1, side, side, side, side) + rows[..., None] + columns[..., None, :]
    x = scores.flatten(3).flatten(1, 2).softmax(-1) @ v
    x = x.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, side, side, channels)
    return self.proj(x)


def article_loss(model, item, dtype, args, device):
    """Returns the loss of one image: encoded anew, its objects one by one, in two passes each."""
    ids = finetune_sam_decoder.read_ids(item)
    image = finetune_sam_decoder.read_input(item, False, args)[None].to(device)
    embedding = encode_image(model, image, dtype, plain=True)
    height, width = sam.resized_size(*ids.shape, args.image_size)
    scale, loss = torch.tensor([width / ids.shape[1], height / ids.shape[0]]), 0
    for number in range(1, ids.max() + 1):
        points, labels, boxes, kinds = finetune_sam_decoder.sample_prompts(
            ids, [number], args, False)
        prompts = points * scale, labels, boxes * scale.repeat(2), kinds
        _, _, logits, _ = sam.two_passes(
            model, embedding, *(part.to(device) for part in prompts), dtype)
        prob = sam.enlarge(model, logits, ids.shape)[0, 0].sigmoid()
        truth = torch.from_numpy(ids == number).float().to(device)
        dice = (2 * (prob * truth).sum() + 1e-5) / (prob.sum() + truth.sum() + 1e-5)
        loss = loss + F.binary_cross_entropy(prob, truth) + 1 - dice
    return loss


def write_many(kind, folder, count):
    """Writes `count` images of demo_data.py's kind: a hundred, then hard links to them."""
    demo_data.write(kind, folder, 100)
    endings = [f"_{copy}" for copy in range(1, count // 100)]
    for path in list(folder.rglob("*_????.*")):
        utils.raise_if_stopped()
        for ending in endings:
            os.link(path, path.with_stem(path.stem + ending))
    for path in folder.rglob("ImageSets/*/*.txt"):  # lists of names
        names = path.read_text().split()
        names += [name + ending for ending in endings for name in names]
        path.write_text("\n".join(names))


# --- Cases ---

class Case(NamedTuple):
    """What is made, and the settings of the article's way and of ours.

    make: one of the functions in Ways. common: settings of both ways. article, ours: those in
    which they differ at equal precision; article is None where there is only our way. own: what
    changes in each for its own settings. warm_up steps are not timed.
    """
    make: Callable
    common: dict
    article: dict | None = {"plain": True}
    ours: dict = {}
    own: tuple = ({"dtype": None}, {"dtype": BF16})
    batch: int = 1
    quick_batch: int = 1
    steps: int = 3
    warm_up: int = 1

    def columns(self, bf16):
        """Returns {column of the table: settings of the article's way or None, and of ours}.

        Without bf16 there is no such column, and own settings are in float32.
        """
        ours = {**self.common, **self.ours}
        if self.article is None:
            return {"own settings": (None, ours)}
        article = {**self.common, **self.article}
        found = {"float32": ({**article, "dtype": None}, {**ours, "dtype": None}),
                 "bf16": ({**article, "dtype": BF16}, {**ours, "dtype": BF16}),
                 "own settings": ({**article, **self.own[0]}, {**ours, **self.own[1]})}
        if not bf16:
            del found["bf16"]
            for settings in found["own settings"]:
                settings["dtype"] = None
        return found


UNET_96, UNET_256 = {"net": "UNet", "size": 96}, {"net": "UNet", "size": 256}
NESTED_96, NESTED_256 = {"net": "NestedUNet", "size": 96}, {"net": "NestedUNet", "size": 256}
MONAI = {"plain": True, "monai": True}
VITT, VITS = {"net": "efficient_sam_vitt"}, {"net": "efficient_sam_vits"}
AT_1024 = {"dtype": None, "size": 1024}, {"dtype": BF16}
ONE, EIGHT = {"objects": 1}, {"objects": 8}
SAM2, BOTH_BF16 = {"net": "tiny", "size": 512}, ({"dtype": BF16}, {"dtype": BF16})
CASES = {
    "UNet-96": Case(unet, UNET_96, batch=16, quick_batch=4, steps=10),
    "UNet-256": Case(unet, UNET_256, batch=4, steps=10),
    "NestedUNet-96": Case(unet, NESTED_96, batch=16, quick_batch=4, steps=10),
    "NestedUNet-256": Case(unet, NESTED_256, batch=4, steps=5),
    "MONAI-UNet-96": Case(unet, UNET_96, MONAI, batch=16, quick_batch=4, steps=10),
    "MONAI-NestedUNet-96": Case(unet, NESTED_96, MONAI, batch=16, quick_batch=4, steps=10),
    "deeplabv3_mobilenet_v3_large": Case(
        deeplabv3, {"net": "mobilenet_v3_large", "size": 256}, batch=4, quick_batch=2, steps=10),
    "deeplabv3_resnet50": Case(
        deeplabv3, {"net": "resnet50", "size": 256}, batch=4, quick_batch=2, steps=5),
    "efficient_sam_vitt-256": Case(efficient_sam, {**VITT, "size": 256}, own=AT_1024),
    "efficient_sam_vitt-512": Case(efficient_sam, {**VITT, "size": 512}, own=AT_1024),
    "efficient_sam_vitt-1024": Case(efficient_sam, {**VITT, "size": 1024}, own=AT_1024),
    "efficient_sam_vits-256": Case(efficient_sam, {**VITS, "size": 256}, own=AT_1024),
    "efficient_sam_vits-512": Case(efficient_sam, {**VITS, "size": 512}, own=AT_1024),
    "efficient_sam_vits-1024": Case(efficient_sam, {**VITS, "size": 1024}, own=AT_1024),
    "objects-256": Case(efficient_sam, {**VITT, "size": 256}, ONE, EIGHT, BOTH_BF16),
    "objects-1024": Case(efficient_sam, {**VITT, "size": 1024}, ONE, EIGHT, BOTH_BF16),
    "objects-256-64": Case(efficient_sam, {**VITT, "size": 256, "objects": 64}, None),
    "objects-256-200": Case(efficient_sam, {**VITT, "size": 256, "objects": 200}, None),
    "sam2_tiny": Case(sam2, SAM2, own=BOTH_BF16),
    "sam2_tiny-checkpointing": Case(sam2, SAM2, ours={"checkpointing": True}, own=BOTH_BF16),
    "sam2_tiny-frozen": Case(sam2, {**SAM2, "frozen": True}, own=BOTH_BF16),
    "sam2_tiny-8-frames": Case(sam2, {**SAM2, "frames": 8}, own=BOTH_BF16, steps=1),
    "sam2_tiny-3-objects": Case(sam2, {**SAM2, "objects": 3}, own=BOTH_BF16, steps=1),
    "decoder_vit_b": Case(decoder, {"net": "vit_b", "size": 1024}, batch=2, steps=2),
    "data-train_unet": Case(
        data, {"script": "train_unet", "kind": "cells"}, None, batch=16, steps=1, warm_up=0),
    "data-train_unet-1k": Case(
        data, {"script": "train_unet", "kind": "cells", "count": 1000}, None, batch=16, warm_up=0),
    "data-train_unet-10k": Case(
        data, {"script": "train_unet", "kind": "cells", "count": 10_000}, None, batch=16, warm_up=0),
    "data-train_deeplabv3": Case(
        data, {"script": "train_deeplabv3", "kind": "scenes"}, None, batch=4, steps=1, warm_up=0),
    "data-train_efficientsam": Case(
        data, {"script": "train_efficientsam", "kind": "objects"}, None, steps=1, warm_up=0),
}
QUICK = ("UNet-96", "UNet-256", "NestedUNet-96", "deeplabv3_mobilenet_v3_large", "objects-256")


# --- Measuring ---

def has_bf16(device):
    """Returns whether bf16 is worth measuring: a CPU without instructions for it is far slower."""
    return device.type != "cpu" or utils.has_bf16(device)


def build(make, setup, settings):
    """Returns {figure: function} of one way."""
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as in the articles' scripts and ours
    return make(setup, **settings)


def time_ways(functions, warm_up, count, device, title):
    """Calls the functions in turn, `count` times each; returns each one's seconds per item."""
    seconds = [[] for _ in functions]
    for _ in tqdm(range(warm_up + count), title, leave=False, disable=None):
        for function, values in zip(functions, seconds):
            utils.raise_if_stopped()
            started = time.perf_counter()
            items = function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            values.append((time.perf_counter() - started) / items)
    return [values[warm_up:] for values in seconds]


def peak_memory(make, setup, settings, calls):
    """Returns the MB that a way's first figure adds to Python and its imports; on CUDA, its MB.

    A training step needs two calls: the first creates the state of the optimizer.
    """
    before = utils.peak_memory_mb(setup.device)
    function = next(iter(build(make, setup, settings).values()))
    for _ in range(calls):
        function()
    return utils.peak_memory_mb(setup.device) - before


def call_fresh(fresh_process, title, function, *args):
    """Returns function(*args), called in a process of its own, which Ctrl-C ends at once."""
    try:
        return fresh_process.submit(function, *args).result()
    except (BrokenProcessPool, EOFError, torch.OutOfMemoryError):  # killed by Ctrl-C or the system
        utils.raise_if_stopped()
        raise utils.InputError(f"{title}: ran out of memory; give a smaller --batch-size, "
                               "or other --cases") from None


def measure(name, args, device, folder, fresh_process):
    """Measures one case; returns [(figure, {column: (article's value, ours)}, spread)].

    Values are medians, None where there is no such way. The spread is (largest - smallest) / median
    of the way where it is largest; 0 for memory, and where there is one step.
    """
    case = CASES[name]
    batch = args.batch_size or (case.quick_batch if args.quick else case.batch)
    steps = args.steps or (min(3, case.steps) if args.quick else case.steps)
    setup = SimpleNamespace(device=device, batch=batch, workers=args.workers,
                            threads=args.threads, folder=folder)
    columns, ways = case.columns(has_bf16(device)), []  # ways: all different settings
    for settings in itertools.chain(*columns.values()):
        if settings is not None and settings not in ways:
            ways.append(settings)

    def by_column(values):
        """Returns {column: the article's value and ours} of one value per way."""
        return {column: tuple(None if settings is None else values[ways.index(settings)]
                              for settings in pair) for column, pair in columns.items()}

    figures = [build(case.make, setup, settings) for settings in ways]  # this draws the data, too
    memory = [call_fresh(fresh_process, f"{name}, --batch-size {batch}", peak_memory, case.make,
                         setup, settings, case.warm_up + 1) for settings in ways]
    rows = []
    for figure in figures[0]:
        functions = [functions[figure] for functions in figures]
        seconds = time_ways(functions, case.warm_up, steps, device, name)
        spread = max((max(values) - min(values)) / median(values) for values in seconds)
        rows.append((figure, by_column(list(map(median, seconds))), spread))
    return [*rows, ("peak memory, MB", by_column(memory), 0)]


# --- Report ---

def describe_machine(device):
    """Returns one line, with the load that others put on the machine before we start."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    names.append(platform.processor())
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    cores = f"{os.cpu_count()} cores, threads used: {torch.get_num_threads()}{load}"
    return (f"{names[0]} ({cores}){gpu}; device {device}; torch {torch.__version__}; "
            f"{time.strftime('%Y-%m-%d')}")


def digits(value):
    """Formats with at least three digits: 0.0123, 1.20, 1234; None is empty."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def table(head, rows):
    """Returns a markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)


def report(machine, left_out, results, device):
    """Returns the text of benchmark.md."""
    head, lines, notes = ["case", "figure"], [], {}
    for column in COLUMNS:
        head += [f"{column}: article", "ours", "article / ours"]
    for name, rows in results.items():
        notes[CASES[name].make] = inspect.getdoc(CASES[name].make)
        for figure, columns, spread in rows:
            line = [name, figure]
            for column in COLUMNS:
                article, ours = columns.get(column, (None, None))
                ratio = "" if article is None else f"{article / ours:.2f}"
                line += [digits(article), digits(ours), ratio]
            lines.append([*line, f"{spread:.0%}" if spread else ""])
    notes = "\n\n".join(f"**{make.__name__}**: {text}" for make, text in notes.items())
    amp_note = beyond = left_out_line = ""
    if not has_bf16(device):
        amp_note = " This processor has no instructions for bf16: all is in float32."
    elif utils.pick_precision("auto", device)[0] is None:
        amp_note = " On this device our bf16 has to be asked for: --amp bf16."
    if device.type != "cuda":
        beyond = " beyond what the imports took"
    if left_out:
        left_out_line = f"Left out by --quick, as they take minutes: {', '.join(left_out)}.\n\n"
    return f"""# The article's way beside ours

{machine}

article / ours: above 1, ours takes less time or memory. Both are in float32, both in bf16
autocast, and each in its own settings.{amp_note}
Seconds: median of the steps. Spread: (largest - smallest) / median, of the way where it is largest;
a ratio that is closer to 1 than that says little. Memory: peak of the first figure{beyond}.

{table([*head, "spread"], lines)}
{left_out_line}{notes}
"""


def plot_ratios(path, results, title):
    """Draws bars from 1 to article / ours of each case's training step, in the three columns."""
    import matplotlib  # late: it takes a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [name for name in results if CASES[name].article is not None]
    figure, axis = plt.subplots(figsize=(10, 2 + 0.6 * len(names)), layout="constrained")
    for shift, column in zip((-0.26, 0, 0.26), COLUMNS):
        pairs = [results[name][0][1].get(column, (1, 1)) for name in names]
        values = [article / ours for article, ours in pairs]
        bars = axis.barh([i + shift for i in range(len(names))], [value - 1 for value in values],
                         0.24, left=1, label=column)
        axis.bar_label(bars, map(digits, values), padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set(yticks=range(len(names)), yticklabels=names,
             xlabel="training step (decoder: first epoch), article / ours: above 1 ours is faster")
    axis.set_title(title, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- Main ---

def main(args):
    """Measures the cases; returns {case: what measure returns}."""
    device = utils.pick_device(args.device)
    torch.set_num_threads(args.threads)
    machine = describe_machine(device)
    names, left_out = list(CASES), []
    if args.cases:
        names = list(dict.fromkeys(itertools.chain(*args.cases)))
    elif args.quick:
        names, left_out = QUICK, [name for name in CASES if name not in QUICK]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # A fork server imports once for all fresh processes; CUDA may not survive a fork
    forks = device.type == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(["benchmark", "monai.networks.nets", "torchvision"])
    results = {}
    with (tempfile.TemporaryDirectory() as folder,
          ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_DFL),
                              max_tasks_per_child=1) as fresh_process):
        for name in names:
            results[name] = measure(name, args, device, folder, fresh_process)
            # Written after each case, because the next one may run out of memory
            text = report(machine, left_out, results, device)
            (output_dir / "benchmark.md").write_text(text)
    plot_ratios(output_dir / "benchmark.png", results, machine)
    print(f"{text}\nwrote {output_dir}/benchmark.md {output_dir}/benchmark.png")
    return results


if __name__ == "__main__":
    utils.run(main, get_args_parser())
