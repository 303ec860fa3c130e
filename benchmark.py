"""Compares our scripts with the articles' way: training step, inference, memory, data loader.

    python benchmark.py --quick
    python benchmark.py --device cuda --cases UNet-256 -b 64 --steps 50 --workers 8
    python benchmark.py --start-up 100000
    python benchmark.py --fine-tune 2
    python benchmark.py --videos 2

A way is one variant of a case, such as the article's, MONAI's or ours. The ways take turns,
step by step in one process, so that a busy machine slows all of them alike. A step is forward,
loss, backward and optimizer, on a batch that is already on the device. Peak memory is that of two
steps in a separate process. train_efficientsam_ddp.py does the same steps as train_efficientsam.py.
Writes: OUTPUT_DIR/benchmark.md (what it prints), OUTPUT_DIR/benchmark.png (the ratios).
"""
import contextlib
import functools
import multiprocessing
import os
import platform
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median

import numpy as np
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
from nets.unet import CHANNELS

MONAI_NETS = {"UNet": BasicUNet, "NestedUNet": BasicUNetPlusPlus}
IMAGE_SIDE = 256  # side in pixels of the images in EfficientSAM's cases, as in the article
SCRIPTS = {  # name: module, function that draws images, paths of image and mask, size options
    "train_unet": (
        train_unet, demo_data.draw_cells,
        ("images/{}.png", "masks/{}.png"), ["--image-size={}"]),
    "train_deeplabv3": (
        train_deeplabv3, demo_data.draw_scene,
        ("VOCdevkit/VOC2012/JPEGImages/{}.jpg", "VOCdevkit/VOC2012/SegmentationClass/{}.png"),
        ["--base-size={}", "--crop-size={}"]),
    "train_efficientsam": (
        train_efficientsam, demo_data.draw_object_ids,
        ("imgs/{}.npy", "gts/{}.npy"), ["--image-size={}"]),
}


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    add, add_switch = parser.add_argument, parser.add_switch
    add("--output-dir", default="runs/benchmark",
        help="folder for benchmark.md and benchmark.png (%(default)s)")
    add_switch("--quick", help=f"{len(QUICK)} cases, three steps, small batches: "
                               "a good minute on two idle CPU cores")
    add("--cases", nargs="+", metavar="CASE", choices=CASES,
        help=f"{', '.join(CASES)} (all, fewer with --quick)")
    add_switch("--parts", help="also measure the ways in between: "
                               "channels_last, bf16 or fused attention alone")
    add("--steps", type=utils.number(int, 1),
        help="timed steps of each way (10, at 1024 pixels and with --quick 3)")
    add("-b", "--batch-size", type=utils.number(int, 1),
        help="images per batch (U-Net 16 at 96 pixels, 4 at 256, DeepLab 4, EfficientSAM 1; "
             "less with --quick)")
    add("-j", "--workers", type=utils.number(int, 1), default=min(4, os.cpu_count()),
        help="loader processes, measured beside none (%(default)s)")
    add("--threads", type=utils.number(int, 1), default=2,
        help="CPU threads of torch (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--start-up", type=utils.number(int, 10), metavar="N",
        help="instead: seconds and memory until each script has checked a data set "
             "of N tiny images")
    add("--fine-tune", type=utils.number(int, 1), metavar="N",
        help="instead: ten epochs of finetune_sam_decoder.py on N images (demo net with --quick)")
    add("--videos", type=utils.number(int, 1), metavar="N",
        help="instead: N steps of train_sam2.py on a clip of four frames (demo net with --quick)")
    return parser


# --- Ways ---
# One function per script: settings of a way -> net, optimizer, function that computes the training
# loss, function that predicts. With plain=True, optimizer, DeepLab's net and loss, and
# EfficientSAM's attention are as in the article. Everything else is ours.

def unet(batch, net, size, monai=False, plain=False, dtype=None, channels_last=False):
    args = train_unet.get_args_parser().parse_args(["--model", net])
    image = torch.rand(batch, 3, size, size)
    mask = (torch.rand(batch, 1, size, size) > 0.5).float()
    if monai:
        model = MONAI_NETS[net](2, 3, 1, (*CHANNELS, CHANNELS[0]), norm="batch", act="relu")
    else:
        model = train_unet.create_model(args)[0]
    if plain:
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    else:
        optimizer = train_unet.create_optimizer(model, args)

    def predict():
        if channels_last:
            return train_unet.forward(model, image, dtype)[-1]
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            outputs = model(image)
        if isinstance(outputs, list):  # of NestedUNet: the last one is the prediction
            outputs = outputs[-1]
        return outputs.float()

    return model, optimizer, lambda: train_unet.criterion(predict(), mask, args.loss), predict


def deeplabv3(batch, net, size, plain=False, dtype=None, channels_last=False):
    args = train_deeplabv3.get_args_parser().parse_args(["--model", net, "--weights", "none"])
    num_classes = args.num_classes + 1  # with the background
    image = torch.randn(batch, 3, size, size)
    label = torch.randint(num_classes, (batch, size, size))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if plain:  # the net that the article copies
        build = getattr(torchvision.models.segmentation, f"deeplabv3_{net}")
        model = build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True)
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    else:
        model, label = train_deeplabv3.create_model(args)[0], label.byte()
        optimizer = train_deeplabv3.create_optimizer(model, args)

    def forward():
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            return model(image.contiguous(memory_format=layout))

    def compute_loss():
        outputs = forward()
        if not plain:
            return train_deeplabv3.criterion(outputs, label)
        out = F.cross_entropy(outputs["out"], label, ignore_index=255)
        aux = F.cross_entropy(outputs["aux"], label, ignore_index=255)
        return out + 0.5 * aux

    return model, optimizer, compute_loss, lambda: forward()["out"].float()


def efficient_sam(batch, net, size, objects=1, plain=False, dtype=None):
    """plain: images of IMAGE_SIDE pixels, enlarged to `size` by the net; else of `size` already."""
    args = train_efficientsam.get_args_parser().parse_args(
        ["--model", net, "--weights", "none", f"--image-size={size}"])
    side = mask_side = IMAGE_SIDE
    if not plain:
        side, mask_side = size, min(size, train_efficientsam.MASK_SIZE)
    image = torch.rand(batch, 3, side, side)
    masks = torch.rand(batch, objects, mask_side, mask_side) > 0.5
    box = side * torch.tensor([[0.2, 0.3], [0.7, 0.8]])  # its corners
    points = box.expand(batch, objects, 2, 2)
    labels = torch.tensor([2, 3]).expand(batch, objects, 2)
    valid = torch.ones(batch, objects, dtype=torch.bool)
    model = train_efficientsam.create_model(args)[0]
    if plain:
        optimizer = torch.optim.AdamW(
            model.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = train_efficientsam.create_optimizer(model, args)

    def forward(output_side):
        """Logits of masks of output_side pixels (-1: the decoder's size), and the net's own IoU."""
        attention = written_out_attention() if plain else contextlib.nullcontext()
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None), attention:
            embedding = model.get_image_embeddings(image)
            return model.predict_masks(
                embedding, points, labels, True, side, side, output_side, output_side)

    def compute_loss():
        logits, iou = forward(IMAGE_SIDE if plain else -1)
        logits = logits.float()
        if logits.shape[-2:] != masks.shape[-2:]:
            resized = F.interpolate(logits.flatten(0, 1), masks.shape[-2:], mode="bicubic",
                                    align_corners=False)
            logits = resized.unflatten(0, logits.shape[:2])
        loss_sum = train_efficientsam.criterion(logits, iou.float(), masks, valid, args)
        return loss_sum / (batch * objects)

    return model, optimizer, compute_loss, lambda: forward(IMAGE_SIDE)


def sam2(net, size, together=False, again=False, checkpointing=False, frozen=False, dtype=None):
    """A clip of four frames and one object, clicked eight times on the first frame; no prediction.

    Without options as the issue on train_sam2.py calls official: the encoder sees frame by frame, the
    losses of all masks at full size are kept for the backward pass, float32. together: all frames at
    once; again: our criterion, which computes those losses again in the backward pass.
    """
    args = train_sam2.get_args_parser().parse_args([
        "--model", net, "--weights", "none", f"--image-size={size}", "--num-frames=4",
        f"--gradient-checkpointing={checkpointing}", "--freeze", "image_encoder" if frozen else "none"])
    model = train_sam2.create_model(args)[0]
    optimizer = train_sam2.create_optimizer(model, args)
    images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    masks = torch.zeros(4, 1, size, size, dtype=torch.bool)
    for t in range(4):
        masks[t, :, size // 4:size // 2, (t + 2) * size // 8:(t + 4) * size // 8] = True
    click = {"point_coords": torch.full((1, 1, 2), 0.3 * size), "point_labels": torch.ones(1, 1).int()}
    draws = torch.rand(4, args.num_correction_points, 1)
    clip = train_sam2.Clip(images, masks, {0: click}, (0,), draws)
    videos = torch.zeros(1, dtype=torch.long)
    weights = torch.tensor([args.focal_weight, args.dice_weight, args.iou_weight, args.score_weight])
    criterion = train_sam2.criterion if again else kept_losses

    def compute_loss():
        if frozen:
            model.image_encoder.eval()
        if together:
            backbone = train_sam2.encode(model, images, dtype)
        else:
            maps, positions, sizes = zip(*[
                train_sam2.encode(model, image[None], dtype) for image in images])
            backbone = [[torch.cat(level, 1) for level in zip(*part)] for part in (maps, positions)]
            backbone.append(sizes[0])
        losses = 0
        for t, passes in train_sam2.track_clips(model, backbone, videos, clip, args, dtype):
            for outputs in passes:
                losses = losses + criterion(*outputs, masks[t], args)
        return (weights * losses).sum()

    return model, optimizer, compute_loss, None


def kept_losses(low_res, ious, score, masks, args):
    """As train_sam2.criterion with its defaults, with everything kept for the backward pass."""
    losses = [train_sam2.mask_losses(logits.float(), masks, args) for logits in low_res.unbind(1)]
    focal, dice, true_ious = (torch.stack(part, 1) for part in zip(*losses))
    rows = torch.arange(len(masks), device=masks.device)
    best = (args.focal_weight * focal + args.dice_weight * dice).argmin(1)
    present = masks.flatten(1).any(1).float()
    error = (ious.float() - true_ious).abs().mean(1)
    wrong = F.binary_cross_entropy_with_logits(score[:, 0].float(), present, reduction="sum")
    return torch.stack([(focal[rows, best] * present).sum(), (dice[rows, best] * present).sum(),
                        (error * present).sum(), wrong])


@contextlib.contextmanager
def written_out_attention():
    """Inside, attention is as the authors wrote it: all weights, (N, N) for N tokens, in memory."""
    def attention(q, k, v, attn_mask=0):
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return (scores + attn_mask).softmax(-1) @ v

    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def create_step(create, device, train, settings):
    """A function without arguments, and the net.

    The function does one training step, with train=False one prediction.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as in the articles' scripts and ours
    with device:  # where new tensors are made
        model, optimizer, compute_loss, predict = create(**settings)
    channels_last = settings.get("channels_last")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.train(train).to(memory_format=layout)

    def article_step():
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def our_step():
        loss = compute_loss()
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None])
        if torch.isfinite(loss.detach() + norm):
            optimizer.step()
        optimizer.zero_grad()

    step = article_step if settings.get("plain") else our_step
    return step if train else torch.no_grad()(predict), model


BF16 = torch.bfloat16
FLOAT32, CONTIGUOUS = {"channels_last": True}, {"dtype": BF16}
OURS = {**FLOAT32, **CONTIGUOUS}
UNET_WAYS = {
    "article": {"plain": True},
    "MONAI": {"plain": True, "monai": True},
    "ours, float32": FLOAT32,
    "ours, contiguous": CONTIGUOUS,
    "ours": OURS,
}
DEEPLAB_WAYS = {
    "article (torchvision)": {"plain": True},
    "ours, float32": FLOAT32,
    "ours, contiguous": CONTIGUOUS,
    "ours": OURS,
}
SAM_WAYS = {
    "article, 1024": {"plain": True, "size": 1024},
    "ours 1024, float32": {"size": 1024},
    "ours 1024": {"dtype": BF16, "size": 1024},
    "ours 512": {"dtype": BF16, "size": 512},
    "ours 256": {"dtype": BF16, "size": 256},
}
OBJECT_WAYS = {
    "1 a pass": {"dtype": BF16, "objects": 1},
    "ours, 8 a pass": {"dtype": BF16, "objects": 8},
}
SAM2_WAYS = {
    "official": {},
    "all frames encoded together": {"together": True},
    "losses computed again": {"again": True},
    "--gradient-checkpointing": {"checkpointing": True},
    "--freeze image_encoder": {"frozen": True},
    "--amp bf16": {"dtype": BF16},
    "ours, bf16, all trained": {"together": True, "again": True, "dtype": BF16},
    "ours, all of these": {"together": True, "again": True, "dtype": BF16, "checkpointing": True,
                           "frozen": True},
}
PARTS = ("ours, float32", "ours, contiguous", "ours 1024, float32")  # only with --parts
CASES = {  # script, its function above, settings of all ways, ways, batch, --quick's batch, steps
    "UNet-96": ("train_unet", unet, {"net": "UNet", "size": 96}, UNET_WAYS, 16, 4, 10),
    "UNet-256": ("train_unet", unet, {"net": "UNet", "size": 256}, UNET_WAYS, 4, 1, 10),
    "NestedUNet-96": ("train_unet", unet, {"net": "NestedUNet", "size": 96}, UNET_WAYS, 16, 4, 10),
    "NestedUNet-256": ("train_unet", unet, {"net": "NestedUNet", "size": 256}, UNET_WAYS, 4, 1, 10),
    "deeplabv3_mobilenet_v3_large": (
        "train_deeplabv3", deeplabv3, {"net": "mobilenet_v3_large", "size": 256},
        DEEPLAB_WAYS, 4, 2, 10),
    "deeplabv3_resnet50": (
        "train_deeplabv3", deeplabv3, {"net": "resnet50", "size": 256}, DEEPLAB_WAYS, 4, 2, 10),
    "efficient_sam_vitt": (
        "train_efficientsam", efficient_sam, {"net": "efficient_sam_vitt"}, SAM_WAYS, 1, 1, 3),
    "efficient_sam_vits": (
        "train_efficientsam", efficient_sam, {"net": "efficient_sam_vits"}, SAM_WAYS, 1, 1, 3),
    "objects-256": (
        "train_efficientsam", efficient_sam, {"net": "efficient_sam_vitt", "size": 256},
        OBJECT_WAYS, 1, 1, 10),
    "objects-1024": (
        "train_efficientsam", efficient_sam, {"net": "efficient_sam_vitt", "size": 1024},
        OBJECT_WAYS, 1, 1, 3),
}

QUICK = ("UNet-96", "UNet-256", "NestedUNet-96", "deeplabv3_mobilenet_v3_large", "objects-256")


# --- Measuring ---

def time_steps(steps, warm_up, count, device, title):
    """{way: function} -> {way: seconds of count calls}; the functions take turns."""
    seconds = {way: [] for way in steps}
    for _ in tqdm(range(warm_up + count), title, leave=False, disable=None):
        for way, step in steps.items():
            utils.raise_if_stopped()
            started = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds[way].append(time.perf_counter() - started)
    return {way: values[warm_up:] for way, values in seconds.items()}


def peak_memory(create, device, settings, threads):
    """MB that two training steps add to Python and its imports, number of parameters.

    On CUDA: MB of the device.
    """
    torch.set_num_threads(threads)
    before = utils.peak_memory_mb(device)
    step, model = create_step(create, device, True, settings)
    step()
    step()  # the first step creates the optimizer's state, this one holds it from its start
    return utils.peak_memory_mb(device) - before, sum(p.numel() for p in model.parameters())


def draw_images(script, folder, count, size, different):
    """`count` images in the script's layout: the first `different` drawn, the others hard links."""
    _, draw, places, _ = SCRIPTS[script]
    for place in places:
        Path(folder, place).parent.mkdir(parents=True)
    for index in range(count):
        utils.raise_if_stopped()
        paths = [Path(folder, place.format(index)) for place in places]
        if index >= different:
            for place, path in zip(places, paths):
                os.link(Path(folder, place.format(index % different)), path)
            continue
        for path, pixels in zip(paths, draw(index, size)):
            if path.suffix == ".npy":
                np.save(path, pixels)
            else:
                utils.save_image(path, pixels)
    if script == "train_deeplabv3":
        lists = Path(folder, "VOCdevkit/VOC2012/ImageSets/Segmentation")
        lists.mkdir(parents=True)
        for name, is_val in (("train", False), ("val", True)):
            lines = [f"{index}\n" for index in range(count) if (index % 5 == 0) == is_val]
            (lists / f"{name}.txt").write_text("".join(lines))


def create_loader(script, folder, size, batch, workers):
    """The script's training loader of the images in folder, at this size."""
    module, *_, size_options = SCRIPTS[script]
    options = [f"--data-path={folder}", f"--batch-size={batch}", f"--workers={workers}"]
    options += [option.format(size) for option in size_options]
    return module.create_loaders(module.get_args_parser().parse_args(options))[0]


@functools.cache  # ways of one size share it
def loader_speed(script, size, folder, batch, workers):
    """Images/s of three epochs of the loader alone, the start of its workers included."""
    side = IMAGE_SIDE if script == "train_efficientsam" else size
    folder = Path(folder, f"{script}_{side}_{batch}")
    if not folder.exists():  # 16 batches, the rest is for validation
        draw_images(script, folder, 20 * batch, side, 20 * batch)
    loader = create_loader(script, folder, size, batch, workers)
    speeds = []
    for epoch in range(3):
        utils.raise_if_stopped()
        loader.sampler.set_epoch(epoch)
        started = time.perf_counter()
        for _ in loader:
            pass
        speeds.append(len(loader.sampler) / (time.perf_counter() - started))
    return speeds


def start_up(script, folder):
    """Seconds until the script has checked its data and made its loaders, MB that this takes."""
    cpu = torch.device("cpu")
    before, started = utils.peak_memory_mb(cpu), time.perf_counter()
    create_loader(script, folder, 64, 2, 0)
    return time.perf_counter() - started, utils.peak_memory_mb(cpu) - before


def call_fresh(fresh_process, title, function, *args):
    """function(*args) in a process of its own, which Ctrl-C ends at once."""
    try:
        return fresh_process.submit(function, *args).result()
    except (BrokenProcessPool, EOFError, torch.OutOfMemoryError):  # killed by Ctrl-C or the system
        utils.raise_if_stopped()
        raise utils.InputError(f"{title}: ran out of memory; give a smaller --batch-size, "
                               "or other --cases") from None


def measure(name, args, device, folder, fresh_process):
    """Ratios {pair: {figure: ratio}} of a case, its table rows of figures and of loaders."""
    script, create, common, ways, batch, quick_batch, steps = CASES[name]
    batch = args.batch_size or (quick_batch if args.quick else batch)
    warm_up = 1 if args.quick or steps < 10 else 2
    steps = args.steps or (3 if args.quick else steps)
    settings = {way: {**common, "batch": batch, **own} for way, own in ways.items()
                if args.parts or way not in PARTS}
    ours = [way for way in settings if way.startswith("ours")]

    # Loaders first, because they refuse a batch size that the script cannot train with
    loader_speeds = {}
    for way in ours:
        size = settings[way]["size"]
        loader_speeds[way] = [loader_speed(script, size, folder, batch, workers)
                              for workers in (0, args.workers)]
    memory, parameters = {}, {}
    for way in settings:
        title = f"{name}, {way}, --batch-size {batch}"
        memory[way], parameters[way] = call_fresh(
            fresh_process, title, peak_memory, create, device, settings[way], args.threads)

    def time_ways(train):
        functions = {way: create_step(create, device, train, settings[way])[0] for way in settings}
        return time_steps(functions, warm_up, steps, device, name)

    training, inference = time_ways(train=True), time_ways(train=False)
    step_s = {way: median(seconds) for way, seconds in training.items()}
    inference_s = {way: median(seconds) for way, seconds in inference.items()}
    items = {way: batch * settings[way].get("objects", 1) for way in settings}

    figures = []
    for way in settings:
        figures.append([
            name, str(batch), way, f"{parameters[way] / 1e6:.2f}",
            spread(training[way]), digits(items[way] / step_s[way]), f"{memory[way]:.0f}",
            spread(inference[way]), digits(items[way] / inference_s[way])])
    ratios = {}
    for way in ours:
        for other in settings:
            if other in ours:
                continue
            ratios[f"{other} / {way}"] = {
                "training step": step_s[other] / items[other] / step_s[way] * items[way],
                "inference": inference_s[other] / items[other] / inference_s[way] * items[way],
                "peak memory": memory[other] / memory[way],
                "loader / step": max(map(median, loader_speeds[way])) * step_s[way] / batch}
    loaders = []
    for way in ours:
        loaders.append([name, str(batch), way, *map(spread, loader_speeds[way]),
                        digits(batch / step_s[way])])
    return ratios, figures, loaders


def measure_videos(net, size, steps, args, device, fresh_process):
    """{way of SAM2_WAYS: (seconds of each step, peak MB)}; the ways take turns."""
    common, functions, memory = {"net": net, "size": size}, {}, {}
    for way, own in SAM2_WAYS.items():
        memory[way], _ = call_fresh(fresh_process, f"--videos, {way}", peak_memory, sam2, device,
                                    {**common, **own}, args.threads)
    for way, own in SAM2_WAYS.items():
        functions[way] = create_step(sam2, device, True, {**common, **own})[0]
    seconds = time_steps(functions, 1, steps, device, "--videos")
    return {way: (seconds[way], memory[way]) for way in SAM2_WAYS}


def fine_tune(net, size, images, device):
    """Ten epochs on the same images -> {way: seconds of each}, {way: seconds of the encoder alone}.

    The article's way: the encoder looks at each image in each epoch, in float32 and with attention
    written out over all heads at once; one object at a time; loss at the image's own size. Neither way
    validates. Ours: finetune_sam_decoder.py with --amp bf16, the cache made in the first epoch.
    """
    seconds, encoder = {"article": [], "ours": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        demo_data.write_instances(Path(folder), images + 1, rings=True, size=500)
        options = ["--data-path", folder, "--year", "2012", "--model", net, "--weights", "none",
                   "--image-size", str(size), "--amp", "bf16", "-j", "0", "--device", str(device),
                   "--output-dir", f"{folder}/run", "--epochs", "10", "--train-set", "val"]
        lists = Path(folder, "VOCdevkit/VOC2012/ImageSets/Segmentation")
        names = [f"blob_{index:04d}\n" for index in range(images)]
        (lists / "val.txt").write_text("".join(names))
        args = finetune_sam_decoder.get_args_parser().parse_args(options)
        run = utils.Run(args, "sam")
        loader = finetune_sam_decoder.create_loaders(args)[0]
        model, arch = finetune_sam_decoder.create_model(args)
        model.to(device)
        image = finetune_sam_decoder.read_input(loader.dataset.items[0], False, args)[None].to(device)
        plain = {"dtype": None, "plain": True}
        for way, settings in {"article": plain, "ours, float32": {"dtype": None},
                              "ours": {"dtype": BF16}}.items():
            encode = functools.partial(encode_image, model, image, **settings)
            encoder[way] = time_steps({way: encode}, 1, 3, device, way)[way]

        start = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW(
            model.mask_decoder.parameters(), args.lr, weight_decay=args.weight_decay)
        for _ in tqdm(range(args.epochs), "article", leave=False, disable=None):
            started = time.perf_counter()
            for item in loader.dataset.items:
                utils.raise_if_stopped()
                loss = article_loss(model, item, args, device)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seconds["article"].append(time.perf_counter() - started)

        model.load_state_dict(start)
        args.base_hash = finetune_sam_decoder.hash_frozen(model)
        part = finetune_sam_decoder.trained_part(model, args)
        optimizer = finetune_sam_decoder.create_optimizer(model, args)
        run.start(arch, loader.dataset, loader.dataset, model=part, optimizer=optimizer)
        for _ in range(args.epochs):
            started = time.perf_counter()
            if not seconds["ours"]:
                finetune_sam_decoder.cache_embeddings(model, [loader.dataset], run, args)
            finetune_sam_decoder.train_one_epoch(model, loader, optimizer, run, args)
            seconds["ours"].append(time.perf_counter() - started)
            run.progress.update(epoch=run.progress["epoch"] + 1, step=0)
    return seconds, encoder


@torch.no_grad()
def encode_image(model, image, dtype, plain=False):
    """Embedding of a normalised image; plain: in blocks written like the official ones."""
    fused = sam.Attention.forward
    if plain:
        sam.Attention.forward = official_attention
    try:
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            return model.image_encoder(image).float()
    finally:
        sam.Attention.forward = fused


def official_attention(self, x):
    """nets/sam.py's Attention as its authors arrange it: the scores of all heads in memory at once."""
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


def article_loss(model, item, args, device):
    """One image as article 002 trains it: encoded anew, its objects one by one, in two passes each."""
    ids = finetune_sam_decoder.read_ids(item)
    image = finetune_sam_decoder.read_input(item, False, args)[None].to(device)
    embedding = encode_image(model, image, None, plain=True)
    size = sam.resized_size(*ids.shape, args.image_size)
    scale = torch.tensor([size[1] / ids.shape[1], size[0] / ids.shape[0]])
    loss = 0
    for number in range(1, ids.max() + 1):
        points, labels, boxes, _ = finetune_sam_decoder.sample_prompts(ids, [number], args, False)
        clicks = (points * scale).to(device), labels.to(device)
        low_logits = None
        for multimask in (True, False):
            with torch.no_grad():
                prompts = model.prompt_encoder(
                    points=clicks, boxes=(boxes * scale.repeat(2)).to(device), masks=low_logits)
            masks, iou = model.mask_decoder(
                embedding, model.prompt_encoder.get_dense_pe(), *prompts, multimask)
            low_logits = masks[:, iou[0].argmax()][:, None]
        prob = model.postprocess_masks(low_logits, size, ids.shape)[0, 0].sigmoid()
        truth = torch.from_numpy(ids == number).float().to(device)
        dice = (2 * (prob * truth).sum() + 1e-5) / (prob.sum() + truth.sum() + 1e-5)
        loss = loss + F.binary_cross_entropy(prob, truth) + 1 - dice
    return loss


# --- Report ---

def describe_machine(device):
    """One line, with the load that others put on the machine before we start."""
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
    """At least three digits: 0.0123, 1.20, 1234."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def spread(values):
    return f"{digits(median(values))} ({digits(min(values))} to {digits(max(values))})"


def table(head, rows):
    """Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)


def report(machine, left_out, ratios, figures, loaders, args, device):
    """The text of benchmark.md."""
    amp_note = beyond = shared = left_out_line = ""
    if not utils.pick_precision("auto", device)[0]:
        amp_note = "; on this device bf16 has to be asked for: --amp bf16"
    if device.type != "cuda":
        beyond = " beyond what the imports took"
    if device.type == "cpu":
        shared = "; beside training it has to share the processor with it"
    if left_out:
        left_out_line = f"- left out by --quick, as they take minutes: {', '.join(left_out)}\n"

    ratio_head = ["case", "ratio of", "training step", "inference", "peak memory", "loader / step"]
    ratio_rows = [[name, pair, *map("{:.2f}".format, row.values())]
                  for name, pairs in ratios.items() for pair, row in pairs.items()]
    figure_head = ["case", "batch", "way", "M parameters", "training, s", "items/s", "memory, MB",
                   "inference, s", "items/s"]
    loader_head = ["case", "batch", "way", "0 workers", f"{args.workers} workers", "training step"]
    return f"""# The article's way beside ours

{machine}

- article: float32, contiguous, torch's plain optimizer; the losses of U-Net and EfficientSAM are ours;
  DeepLab: torchvision's net; EfficientSAM: images of {IMAGE_SIDE} pixels enlarged to 1024 inside the
  net, one object per image, attention written out
- MONAI: BasicUNet and BasicUNetPlusPlus of the same widths, trained as in the article
- ours: bf16 autocast, channels_last, fused optimizer{amp_note}
  EfficientSAM: fused attention, the image at the side named
- objects: of one image of EfficientSAM-Ti, both ways ours; ratios of time and items/s are for each object
{left_out_line}
Ratios, other / ours: above 1 ours takes less time or memory; they say little where the spreads below overlap much.
Loader / step: images/s of the faster loader / images/s of our training step; above 1 the loader alone outruns the step.

{table(ratio_head, ratio_rows)}
Seconds per batch: median (smallest to largest) of the steps. Memory: peak of training{beyond}.

{table(figure_head, figures)}
Images/s of the loader alone, start of its workers included{shared}.

{table(loader_head, loaders)}"""


def plot_ratios(path, ratios, title):
    """Bars of {case: {pair: {figure: other / ours}}}, from 1 to either side."""
    import matplotlib  # late: it takes a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = {f"{name}\n{pair}": row
            for name, pairs in ratios.items() for pair, row in pairs.items()}
    figure, axis = plt.subplots(figsize=(10, 1.5 + 0.7 * len(rows)), layout="constrained")
    for shift, kind in ((-0.26, "training step"), (0, "inference"), (0.26, "peak memory")):
        places = [i + shift for i in range(len(rows))]
        values = [row[kind] for row in rows.values()]
        bars = axis.barh(places, [value - 1 for value in values], 0.24, left=1, label=kind)
        axis.bar_label(bars, map(digits, values), padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set(yticks=range(len(rows)), yticklabels=list(rows),
             xlabel="other / ours: right of the line ours takes less time or memory")
    axis.set_title(title, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- Main ---

def main(args):
    """Measures the cases; returns {case: {"other / ours": {figure: ratio}}}.

    The figures are training step, inference, peak memory and loader / step. With --start-up it
    returns {script: (seconds, MB)}, with --fine-tune what fine_tune does.
    """
    device = utils.pick_device(args.device)
    torch.set_num_threads(args.threads)
    machine = describe_machine(device)
    if args.fine_tune:
        net, size = ("demo", 192) if args.quick else ("vit_b", 1024)
        seconds, encoder = fine_tune(net, size, args.fine_tune, device)
        print(f"{machine}\n\n{net}, {size} pixels, {args.fine_tune} images, seconds:\n")
        print(table(["way", "encoder alone, one image"], [
            [way, spread(values)] for way, values in encoder.items()]))
        print(table(["way", "first epoch", "second", "ten epochs"], [
            [way, digits(values[0]), digits(values[1]), digits(sum(values))]
            for way, values in seconds.items()]))
        return seconds, encoder
    left_out = []
    if args.quick and not args.cases:
        left_out = [name for name in CASES if name not in QUICK]
    names = args.cases or [name for name in CASES if name not in left_out]
    # A fork server imports once for all fresh processes; CUDA may not survive a fork
    forks = device.type == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(["monai.losses", "monai.networks.nets", "torchvision"])
    with (tempfile.TemporaryDirectory() as folder,
          ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_DFL),
                              max_tasks_per_child=1) as fresh_process):
        if args.start_up:
            count = args.start_up
            for script in SCRIPTS:
                draw_images(script, Path(folder, script), count, 32, count // 1000 + 10)
            found = {}
            for script in SCRIPTS:
                found[script] = call_fresh(fresh_process, f"--start-up {count}: {script}",
                                           start_up, script, Path(folder, script))
            head = ["script", "images", "seconds to check it", "memory, MB"]
            rows = [[script, str(count), digits(seconds), f"{mb:.0f}"]
                    for script, (seconds, mb) in found.items()]
            print(f"{machine}\n\n" + table(head, rows))
            return found

        if args.videos:
            net, size = ("demo", 64) if args.quick else ("tiny", 512)
            found = measure_videos(net, size, args.videos, args, device, fresh_process)
            official_s, official_mb = median(found["official"][0]), found["official"][1]
            rows = [[way, spread(seconds), f"{mb:.0f}", f"{official_s / median(seconds):.2f}",
                     f"{mb / official_mb:.2f}"] for way, (seconds, mb) in found.items()]
            print(f"{machine}\n\nSAM 2.1 {net}, {size} pixels, 4 frames, 1 object, 11 decoder passes; the "
                  "last columns are against the first way:\n")
            print(table(["way", "training step, s", "memory, MB", "speed", "memory"], rows))
            return found

        ratios, figures, loaders = {}, [], []
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in names:
            ratios[name], figure_rows, loader_rows = measure(
                name, args, device, folder, fresh_process)
            figures += figure_rows
            loaders += loader_rows
            text = report(machine, left_out, ratios, figures, loaders, args, device)
            # Written after each case, because the next one may run out of memory
            (output_dir / "benchmark.md").write_text(text)

    plot_ratios(output_dir / "benchmark.png", ratios, machine)
    print(f"{text}\nwrote {output_dir}/benchmark.md {output_dir}/benchmark.png")
    return ratios


if __name__ == "__main__":
    utils.run(main, get_args_parser())
