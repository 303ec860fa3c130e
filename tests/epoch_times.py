"""Whole epochs of all training scripts on real data beside the articles' way, and where their time goes.

    FLATSEG_DATA=data python tests/epoch_times.py
    FLATSEG_DATA=data python tests/epoch_times.py --only train_unet --epochs 3 --output runs/epoch.png

Ours: each script's main, in float32, without loader processes, so that reading can be told from training. "start"
checks files, makes nets and judges them; "encoding" keeps embeddings; both once per run, the rest per epoch. The
article's way: our reading of the data, its nets, losses and steps as benchmark.py writes them, its validation (here
the forward pass alone) where it has one, and what it saves. Where it does not validate, "training" is what compares.
EfficientSAM's article trains one object per image at 1024 pixels (one image at a time: four do
not fit into 24 GB), ours up to eight at 256. Data sets: tests/README.md.
"""
import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import dataloader

sys.path.insert(0, str(Path(__file__).parents[1]))
import benchmark  # noqa: E402
import utils  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CPU = torch.device("cpu")
PARTS = ("reading", "training", "validation", "drawing", "saving")  # per epoch
RUNS = {  # script: its data set, options, the other options of the article's way; None: there is none
    "train_unet": ("nuclei", "", ""),
    "train_deeplabv3": ("camvid_voc", "--num-classes 10 --weights none --backbone mobilenet_v3_large --limit 40", ""),
    "train_efficientsam": ("npy_sample", "--weights none --image-size 256 --limit 4",
                           "--image-size 1024 --max-objects 1 -b 1"),
    "finetune_sam_decoder": ("voc2007_sample", "--year 2007 --weights none", ""),
    "train_sam2": ("video_sample", "--weights none --model tiny --image-size 512 --num-frames 4 --max-objects 1 "
                   "--prob-points 1", ""),
    "pretrain_sami": ("nuclei/images", "--teacher demo --teacher-weights none --model efficient_sam_vitt", None)}


# --- The articles' ways ---

class Way(NamedTuple):
    """What an article trains, and how. The loss is of a batch of our loader, or of a key if it reads the image."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    compute_loss: Callable
    predict: Callable | None = None  # of a batch, where the article validates
    keep: Callable = lambda key: True  # the entries of the net's state that are saved
    saves_optimizer: bool = True
    reads: bool = False
    clip_grad: float = 0.0


def train_unet(script, args):
    model = script.create_model(args)[0]

    def predict(batch):
        return script.forward(model, batch[0], None)

    def compute_loss(batch):
        return script.criterion(predict(batch), batch[1], args.loss)

    return Way(model, script.create_optimizer(model, args), compute_loss, predict, saves_optimizer=False)


def train_deeplabv3(script, args):
    build = getattr(torchvision.models.segmentation, f"deeplabv3_{args.model}")
    model = build(weights=None, weights_backbone=None, num_classes=args.num_classes + 1, aux_loss=True)

    def compute_loss(batch):
        logits = model(batch[0])
        out, aux = (F.cross_entropy(logits[name], batch[1].long(), ignore_index=255) for name in ("out", "aux"))
        return out + 0.5 * aux

    def predict(batch):
        return model(batch[0])["out"].argmax(1)

    return Way(model, script.create_optimizer(model, args), compute_loss, predict)


def train_efficientsam(script, args):
    model = script.create_model(args)[0]

    def compute_loss(batch):
        image, points, labels, masks, valid, _ = batch
        with mock.patch.object(F, "scaled_dot_product_attention", benchmark.written_out_attention):
            logits, iou = model(image, points, labels, False)
        logits = F.interpolate(logits.flatten(0, 1), masks.shape[-2:], mode="bicubic").unflatten(0, masks.shape[:2])
        return script.criterion(logits, iou, masks, valid, args) / valid.sum()

    return Way(model, script.create_optimizer(model, args), compute_loss)


def finetune_sam_decoder(script, args):
    model = script.create_model(args)[0]
    items = script.create_loaders(args)[0].dataset.items

    def compute_loss(key):
        return benchmark.article_loss(model, items[key[1]], None, args, CPU)

    return Way(model, script.create_optimizer(model, args), compute_loss, reads=True,
               keep=lambda key: key.startswith("mask_decoder."), saves_optimizer=False)


def train_sam2(script, args):
    model = script.create_model(args)[0]
    weights = torch.tensor([args.focal_weight, args.dice_weight, args.iou_weight, args.score_weight])

    def compute_loss(batch):
        clips, losses = batch[0], 0
        backbone = script.encode(model, torch.cat([clip.images for clip in clips]), None)
        for videos, clip in script.group_clips(clips, CPU):
            for t, outputs in benchmark.official_passes(model, backbone, videos, clip, args):
                losses = losses + benchmark.official_losses(outputs, clip.masks[t], args)
        return (weights * losses).sum()

    return Way(model, script.create_optimizer(model, args), compute_loss, clip_grad=args.clip_grad)


# --- Measuring ---

class Clock:
    """Counts the seconds of each part; what a part calls that is a part itself counts there alone."""

    def __init__(self):
        self.seconds, self.parts, self.since, self.trains = Counter(), ["start"], time.perf_counter(), False

    def lap(self):
        now = time.perf_counter()
        self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def count(self, part):
        self.lap()
        self.parts.append(part)
        try:
            yield
        finally:
            self.lap()
            self.parts.pop()

    def counted(self, owner, name, part):
        """A context in which calls of the function count as that part; before the first epoch, as their callers."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.trains |= part == "training"
            with self.count(part if self.trains or part == "encoding" else self.parts[-1]):
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, timed)


def run_ours(script, args, clock):
    counted = {"training": [(script, "train_one_epoch")], "validation": [(script, "evaluate")],
               "reading": [(dataloader._BaseDataLoaderIter, "__next__")],
               "drawing": [(script, "draw_samples"), (utils.Run, "plot_curves")],
               "saving": [(utils.Run, name) for name in ("save_last", "save_best", "save_plain", "end_epoch")],
               "encoding": [(script, name) for name in ("cache_embeddings", "cache_features") if hasattr(script, name)]}
    with contextlib.ExitStack() as stack:
        for part, functions in counted.items():
            for owner, name in functions:
                stack.enter_context(clock.counted(owner, name, part))
        script.main(args)


def run_article(script, args, clock):
    """Trains args.epochs epochs as the article does, in float32."""
    torch.use_deterministic_algorithms(False)  # which ours asks for on a CPU
    loader, val_loader, *_ = script.create_loaders(args)
    way = globals()[script.__name__](script, args)
    benchmark.use_default_kind(way.optimizer)
    clock.trains = True
    with clock.counted(dataloader._BaseDataLoaderIter, "__next__", "reading"):
        for epoch in range(args.epochs):
            loader.sampler.set_epoch(epoch)
            with clock.count("training"):
                way.model.train()
                for batch in loader.sampler if way.reads else loader:
                    loss = way.compute_loss(batch)
                    way.optimizer.zero_grad()
                    loss.backward()
                    if way.clip_grad:
                        torch.nn.utils.clip_grad_norm_(way.model.parameters(), way.clip_grad)
                    way.optimizer.step()
            if way.predict:
                with clock.count("validation"), torch.no_grad():
                    way.model.eval()
                    for batch in val_loader:
                        way.predict(batch)
            with clock.count("saving"):
                state = {key: value for key, value in way.model.state_dict().items() if way.keep(key)}
                torch.save([state, way.optimizer.state_dict() if way.saves_optimizer else None],
                           Path(args.output_dir + ".pth"))


def measure(run, name, options, args):
    """Returns {part: seconds, of PARTS per epoch} of one way."""
    script, clock = importlib.import_module(name), Clock()
    with tempfile.TemporaryDirectory() as folder:
        run(script, script.get_args_parser().parse_args([
            f"--data-path={Path(args.data, RUNS[name][0])}", f"--output-dir={folder}/run", f"--epochs={args.epochs}",
            "--device=cpu", "--amp=off", "--workers=0", "--seed=0", *options.split()]), clock)
        clock.lap()
    return {part: seconds / (args.epochs if part in PARTS else 1) for part, seconds in clock.seconds.items()}


def draw(path, results):
    """Draws a bar per script: the shares of an epoch's parts."""
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.5 * len(results)), layout="constrained")
    for i, seconds in enumerate(results.values()):
        total, left = sum(seconds.get(part, 0) for part in PARTS), 0
        for part, colour in zip(PARTS, plt.cm.tab10.colors):
            share = seconds.get(part, 0) / total
            axis.barh(i, share, left=left, color=colour, label=None if i else part)
            left += share
        axis.text(1.01, i, f"{total:.3g} s", va="center")
    axis.set(yticks=range(len(results)), yticklabels=results, xlim=(0, 1), title="where an epoch's time goes")
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axis.invert_yaxis()
    figure.legend(ncols=len(PARTS), loc="outside lower center", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("FLATSEG_DATA"), required="FLATSEG_DATA" not in os.environ,
                        help="folder of tests/README.md (FLATSEG_DATA)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="scripts (all)")
    parser.add_argument("--epochs", type=int, default=2, help="of each script (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--output", default="epoch.png", help="picture (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns, found = ("start", "encoding", *PARTS), {}
    rows = []
    for name in args.only:
        _, options, of_article = RUNS[name]
        ways = {"ours": measure(run_ours, name, options, args)}
        if of_article is not None:
            ways["article"] = measure(run_article, name, f"{options} {of_article}", args)
        found[name] = ways["ours"]
        for way, seconds in ways.items():
            epoch = sum(seconds.get(part, 0) for part in PARTS)
            numbers = [f"{seconds[part]:.3g}" if part in seconds else "" for part in columns]
            rows.append([name, way, *numbers, f"{epoch:.3g}"])
            print(dict(zip(("script", "way", *columns, "epoch"), rows[-1])), flush=True)  # should a later one fail
    print(benchmark.table(["script", "way", *columns, "epoch"], rows))
    draw(args.output, found)
