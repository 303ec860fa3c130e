"""What every script needs and no article teaches. Data, losses, metrics and loops are in the scripts."""
import argparse
import contextlib
import copy
import csv
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".ppm", ".pgm"}
READ_WHOLE = 2000  # images of each part whose pixels are read before the first step
FORMAT = 2      # of checkpoints; a last.pth of format 1 cannot be continued, its weights still load
MAY_CHANGE = {  # options that may differ when a run is continued
    "resume", "weights", "data_path", "val_path", "split", "output_dir", "overwrite", "epochs",
    "early_stopping", "save_every", "workers", "device", "cache_dir", "teacher_weights"}
WRITTEN = ["last.pth", "best.pth", "model.pth", "decoder.pth", "encoder.pth", "log.csv", "curves.png",
           "val_samples.png", "val_videos.csv", "results????????-??????.txt",
           "record_mAP.txt"]  # what --overwrite replaces
CHINESE_FONTS = [  # file names on Linux, Windows, macOS; the first one there draws Chinese names
    "NotoSansCJK-Regular", "NotoSansSC-Regular", "wqy-microhei", "wqy-zenhei",
    "DroidSansFallbackFull", "msyh", "simhei", "PingFang", "Hiragino Sans GB", "STHeiti Light"]
_signals = []   # SIGTERM or SIGINT, once they have come


# --- Command line ---

class InputError(Exception):
    """A mistake of the user: one line that names file or option and the remedy; exit status 2."""


class Stopped(Exception):
    """Raised by raise_if_stopped after SIGTERM or SIGINT, where it is safe to save."""


class Obsolete(argparse.Action):
    """Accepts an article's option that has no effect here and prints its help."""

    def __call__(self, parser, namespace, values, option_string=None):
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {option_string}: {self.help}")


class ArgumentParser(argparse.ArgumentParser):
    """Takes --batch_size and -batch_size for --batch-size; demo: the defaults with --demo."""

    def __init__(self, description, usage="%(prog)s [options]", demo=None):
        super().__init__(
            description=description, usage=usage, allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=48, width=140))
        self.demo = demo or {}

    def add_switch(self, *names, default=False, help):
        """Adds an on/off option: --aux, --aux True and --aux False all mean what they say."""
        self.add_argument(*names, nargs="?", const=True, default=default, type=switch,
                          metavar="BOOL", help=help)

    def add_device_options(self):
        self.add_argument("--device", default="auto",
                          help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
        self.add_argument("--amp", nargs="?", const="auto", default="auto", type=amp_mode, metavar="MODE",
                          help="precision: auto (bf16 on CUDA devices that support it, with --demo on CPUs "
                               "too, else off), bf16, fp16 or off (%(default)s)")

    def add_run_options(self, output_dir):
        """Adds the options shared by all training scripts."""
        add, add_switch = self.add_argument, self.add_switch
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # those that this process may use; not on macOS, Windows
            cores = len(os.sched_getaffinity(0))
        add_switch("--demo", help="train on generated data with small settings; no download")
        add_switch("--sanity-check", help="read the whole data set, print counts, "
                                          "write sanity_check.png; no training")
        add_switch("--test-only", help="evaluate --weights or --resume; no training")
        add("--limit", type=number(int, 1), metavar="N", help="use the first N items of each split")
        add("--overfit", type=number(int, 1), metavar="N",
            help="train and validate on the same N items, without augmentation")
        add("--output-dir", default=output_dir,
            help="folder for checkpoints, log and images (%(default)s)")
        add_switch("--overwrite", help="replace an earlier run in --output-dir")
        add("--resume", help="continue a run: auto (from last.pth if there is one) or a path")
        add("--save-every", type=number(int, 0), default=0, metavar="N",
            help="also save last.pth every N steps, 0 only after each epoch (%(default)s)")
        add("--early-stopping", type=int, default=-1, metavar="N",
            help="stop after N epochs without a better validation score, -1 never (%(default)s)")
        add("-j", "--workers", "--num-workers", type=number(int, 0), default=min(4, cores),
            help="loader processes, 0 for none (%(default)s)")
        self.add_device_options()
        add("--seed", type=number(int, 0, 2**32 - 1), default=41,
            help="seed of weights, order and augmentation (%(default)s)")
        add_switch("--deterministic", help="bit-identical results on CUDA too; slower")
        add_switch("--compile", help="torch.compile the net")

    def parse_known_args(self, args=None, namespace=None):
        args = [self.known_spelling(word) for word in (sys.argv[1:] if args is None else args)]
        given = {}
        for word in args:
            action = self._option_string_actions.get(word.partition("=")[0])
            if action and given.setdefault(action.dest, action) is not action:
                both = f"{given[action.dest].option_strings[0]} and {action.option_strings[0]}"
                self.error(f"{both}: two names of one setting; give one")
        parsed = super().parse_known_args(args, namespace)
        if getattr(parsed[0], "demo", False):
            parsed = super().parse_known_args(args, argparse.Namespace(**self.demo))
        return parsed

    def known_spelling(self, word):
        """Returns --batch-size=4 for -batch_size=4 and --batch_size=4, else the word itself."""
        if re.match(r"-[\d.]", word):  # a value, as in --box -1,2,3,4
            return " " + word  # the space stops argparse from taking it for an option
        name, equals, value = word.partition("=")
        known, options = "--" + name.lstrip("-").replace("_", "-"), self._option_string_actions
        if name.startswith("-") and name not in options and known in options:
            return known + equals + value
        return word

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf):
    """Returns the type of a number option within bounds: number(int, 1) takes 1, 2 ...; no nan."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value
    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def numbers(least, most):
    """Returns the type of an option of `least` to `most` numbers with commas between."""
    def parse(text):
        try:
            values = [float(value) for value in text.split(",")]
        except ValueError:
            values = []
        if not least <= len(values) <= most or not np.isfinite(values).all():
            raise argparse.ArgumentTypeError(f"{text} must be {least} to {most} numbers with commas "
                                             "between")
        return values
    return parse


def run(main, parser):
    """Calls main(parsed arguments); user errors and lack of memory are one line and exit status 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember_signal)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # logs show each line at once
    try:
        main(parser.parse_args())
        leave_process_group()
    except InputError as error:  # from a loader process: after that one's traceback
        parser.error(str(error).strip().splitlines()[-1].removeprefix("utils.InputError: "))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(0)
    except (EOFError, ConnectionError):  # a batch was on its way
        try:  # torch's handler of the loader's end raises, even while we leave; Windows has none
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        finally:
            leave_without_loader(parser.prog)
    except OSError as error:  # a folder that cannot be written, a full disk: the OS's message
        if error.errno is None:
            raise
        remedy = "free space, or give" if error.errno == errno.ENOSPC else "look at it, or give"
        parser.error(f"{error.filename or 'output'}: {error.strerror}; {remedy} another file or folder")
    except Stopped:
        leave_process_group()
        number = signal.Signals((_signals or [signal.SIGTERM])[0])  # another process may have got it
        parser.exit(128 + number, f"{parser.prog}: stopped by {number.name}\n")
    except (RuntimeError, MemoryError, cv2.error) as error:
        if "RANK" in os.environ and "peer" in str(error):  # Gloo: another process is gone
            rank = os.environ["RANK"]
            parser.exit(1, f"{parser.prog}: rank {rank}: lost another process, see its message\n")
        if re.search(r"DataLoader worker .* (killed|exited)", str(error)):
            leave_without_loader(parser.prog)
        if not is_out_of_memory(error):
            raise
        parser.error("out of memory: try a smaller --batch-size with --accumulate, a smaller image "
                     f"size, or --amp bf16 ({' '.join(str(error).split())[:200]})")


def import_script(name, option):
    """Returns the script that this option alone needs, as --demo needs demo_data."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{option}: {name}.py is not beside this script; copy it too, or leave "
                         f"{option} out") from None


def leave_without_loader(prog):
    """Ends a process that has lost a loader process, to a signal or to lack of memory; exit status 1."""
    sys.stderr.write(f"{prog}: error: a loader process was killed; --resume auto continues from the last "
                     "save; if memory was full, give fewer --workers\n")
    sys.stderr.flush()
    os._exit(1)  # Python would wait for the loaders, and stumble over the lost one


# --- A training run ---

class Run:
    """Keeps the books of one training run: device, progress, folder. It never calls the script.

    device; dtype of autocast, None for float32; scaler: a GradScaler; pinned: whether copies to the
    device may be non_blocking; checkpoint: what --resume continues, or None. progress: epoch, step,
    best ... and the sums of the running epoch over all processes: images, loss, count (by which the
    mean loss divides), skipped steps, and those that the script adds. Every checkpoint holds it.
    A data set has `classes` (names) and `items`: tuples that begin with a name and the image's path
    (of a video: its frames' paths). It is indexed by (epoch, index); what it returns ends with index.
    """

    def __init__(self, args, net):
        """Joins torchrun's processes, seeds, picks device and precision, reads --resume."""
        self.args, self.net, self.folder = args, net, Path(args.output_dir)
        self.device = start_process_group(pick_device(args.device))
        self.rank, args.world_size = ranks()
        torch.manual_seed(args.seed)  # of the weights; `steps` seeds each step
        # On a CPU always, at no cost: two threads add the gradients of x[index] in any order
        torch.use_deterministic_algorithms(args.deterministic or self.device.type == "cpu",
                                           warn_only=not args.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
        if args.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        fast = args.demo and args.amp == "auto" and has_bf16(self.device)
        self.dtype, self.scaler = pick_precision("bf16" if fast else args.amp, self.device)
        self.pinned = self.device.type == "cuda"  # the loader's memory, so that copies need not block
        if args.resume and args.overwrite:
            raise InputError("--overwrite: has no effect beside --resume; give one of them")
        self.checkpoint, position = find_checkpoint(args.resume, self.folder), None
        if self.checkpoint:
            position = self.checkpoint["epoch"], self.checkpoint["step"]
            args.weights = self.checkpoint["args"]["weights"]  # those that the run started from
        if len({*merge_over_ranks({self.rank: position}).values()}) > 1:
            raise InputError(f"--resume {args.resume}: the processes do not see the same last.pth; all "
                             "hosts need the same --output-dir")

    def describe(self, name, model, train_set, val_set):
        """Prints the start line: parameters, images, device; sets args.data_hash."""
        self.args.data_hash = f"{data_hash(train_set.items)}+{data_hash(val_set.items)}"
        precision = str(self.dtype or torch.float32)
        if self.dtype is None and self.args.amp == "auto" and has_bf16(self.device):
            precision += " (--amp bf16 is often faster on this processor)"
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        unit = getattr(train_set, "unit", "images")  # of train_sam2.py: videos and images
        print(f"{name}: {trained:,} of {total:,} parameters trained; {len(train_set.items)} train and "
              f"{len(val_set.items)} val {unit} (data hash {self.args.data_hash}); {self.device} x "
              f"{self.args.world_size}, {precision}, torch {torch.__version__}")

    def check_test(self, same):
        """Checks that --test-only has weights, and that the options `same` are as in training."""
        args, checkpoint = self.args, self.checkpoint
        if not checkpoint and (args.weights == "none" or args.resume):
            raise InputError("--test-only: nothing to test; give --weights or --resume a checkpoint")
        if not checkpoint:  # a file, or an official name
            checkpoint = load_checkpoint(args.weights) if Path(args.weights).is_file() else {}
        trained_with = checkpoint.get("args", {})
        for key in same:
            now, before = getattr(args, key), trained_with.get(key)
            if before is not None and json.dumps(now) != json.dumps(before):
                raise InputError(f"{option_of(key)} {now}: trained with {before}; give that")
        before = trained_with.get("data_hash", args.data_hash)
        if before.partition("+")[2] != args.data_hash.partition("+")[2]:  # of the validation images
            print("note: other images or another split than in training: some may have been trained on")

    def start(self, arch, train_set, val_set, sums=None, **parts):
        """Restores what --resume continues, prepares the folder and returns progress.

        sums: further entries of progress, which start anew each epoch. parts: the model, the
        optimizer and whatever else has a state_dict that checkpoints are to hold.
        """
        self.sums = {"step": 0, "images": 0, "loss": 0.0, "count": 0.0, "skipped": 0, **(sums or {})}
        self.progress = {"epoch": 0, "best": -math.inf, "best_epoch": 0, "bad_steps": 0,
                         **copy.deepcopy(self.sums)}
        self.parts = {**parts, "scaler": self.scaler}
        self.head = {"format": FORMAT, "net": self.net, "arch": arch, "classes": train_set.classes}
        if self.checkpoint:
            check_resume(self.checkpoint, self.args)
            for name, part in self.parts.items():
                if name not in self.checkpoint:
                    raise InputError(f"--resume {self.args.resume}: was saved without {name}; start "
                                     "a new run from it with --weights")
                try:
                    part.load_state_dict(self.checkpoint[name])
                except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    raise InputError(f"--resume {self.args.resume}: its {name} does not fit ({error}); "
                                     "start a new run from it with --weights") from None
            others = self.checkpoint.keys() - {*self.head, *self.parts, "args"}
            self.progress.update({key: self.checkpoint[key] for key in others})
            print(f"resumed in epoch {self.progress['epoch'] + 1} after step {self.progress['step']}")
        if self.args.world_size > 1:  # the same weights in all processes, whatever machine drew them
            with torch.no_grad():
                for tensor in [*parts["model"].parameters(), *parts["model"].buffers()]:
                    torch.distributed.broadcast(tensor, 0)
        if self.rank == 0:
            self.lock = lock_folder(self.folder)  # held while this object lives
            prepare_folder(self.args, {"train": [item[0] for item in train_set.items],
                                       "val": [item[0] for item in val_set.items]})
            if self.checkpoint and not (self.folder / "last.pth").exists():
                self.move_here()
        return self.progress

    def move_here(self):
        """Writes last.pth and copies the best weights: of a run that is continued in another folder."""
        self.save_last()
        source = Path(self.args.resume)
        source = source if source.is_dir() else source.parent
        try:
            best = load_checkpoint(source / "best.pth") if (source / "best.pth").exists() else {}
            if isinstance(best, dict) and best.get("best") == self.progress["best"]:  # not another's
                for name in ("best.pth", "model.pth", "decoder.pth", "encoder.pth"):
                    if (source / name).exists():
                        save_checkpoint(self.folder / name, load_checkpoint(source / name))
        except InputError as error:
            print(f"note: the best weights so far are not all copied from {source}: {error}")

    def is_over(self):
        """Returns whether --epochs are done or --early-stopping ends the run."""
        epoch, patience = self.progress["epoch"], self.args.early_stopping
        if 0 < patience <= epoch - self.progress["best_epoch"]:
            print(f"early stopping: no better validation score in {patience} epochs")
            return True
        return epoch >= self.args.epochs

    def steps(self, loader):
        """Yields, for each remaining step of the epoch, its --accumulate batches.

        A batch ends with the indices of its items; -1 is padding, so that all processes have as many.
        Between steps: the progress bar, last.pth every --save-every steps, Stopped once a signal has
        come to any process. Randomness on the device (dropout) derives from (seed, epoch, step, rank).
        """
        args, progress = self.args, self.progress
        loader.sampler.set_epoch(progress["epoch"])  # len(loader) is that of a whole epoch
        self.steps_per_epoch = math.ceil(len(loader) / args.accumulate)
        done = progress["step"] * args.batch_size * args.accumulate
        loader.sampler.set_epoch(progress["epoch"], skip=done)
        batches, started, self.images_before = iter(loader), time.perf_counter(), progress["images"]
        torch.backends.cudnn.benchmark = not args.deterministic  # sizes are fixed in training alone
        bar = tqdm(total=self.steps_per_epoch, initial=progress["step"], leave=False,
                   desc=f"epoch {progress['epoch'] + 1}", disable=hide_bar())
        while group := list(itertools.islice(batches, args.accumulate)):
            indices = [index for batch in group for index in batch[-1] if index >= 0]
            self.items = [loader.dataset.items[index] for index in indices]
            self.buffers = [buffer.clone() for buffer in self.parts["model"].buffers()]
            torch.manual_seed(mix(args.seed, progress["epoch"], progress["step"], self.rank))
            yield group
            progress["step"] += 1
            bar.set_postfix(loss=f"{self.mean_loss():.4f}", lr=f"{self.learning_rate():.2g}",
                            mem=f"{peak_memory_mb(self.device):.0f}M", refresh=False)
            bar.update()
            raise_if_stopped(self.device)
            if args.save_every and progress["step"] % args.save_every == 0:
                self.save_last()
        bar.close()
        torch.backends.cudnn.benchmark = False
        if args.world_size > 1:  # each process has its own batch statistics: the first one's are kept
            for buffer in self.parts["model"].buffers():
                torch.distributed.broadcast(buffer, 0)
        self.seconds = time.perf_counter() - started

    def finish_gradient(self, optimizer, loss_sum, count, clip_grad=0.0, averaged=False):
        """Divides the gradient of loss_sum by count; returns whether to take the step.

        loss_sum, count (of images, labelled pixels, objects ...): of this process's batches of the
        step. They are added over all processes first, and so is the gradient, unless averaged: then
        DistributedDataParallel has made it the mean over processes. If loss or gradient is not
        finite, the weights would be ruined: batch statistics are restored, the step is counted, ten
        in a row end the run.
        """
        model, progress, world_size = self.parts["model"], self.progress, self.args.world_size
        trained = [p for p in model.parameters() if p.requires_grad]
        if world_size > 1 and not averaged:
            sum_gradients(trained)
        if all(p.grad is None for p in trained):  # nothing in these images counts
            for p in trained:
                p.grad = torch.zeros_like(p)
        parameters = [p for p in trained if p.grad is not None]
        gradients = [p.grad for p in parameters]
        self.scaler.scale(torch.zeros((), device=self.device))  # or unscale_ fails if nothing counted yet
        self.scaler.unscale_(optimizer)
        sums = [torch.as_tensor(value, dtype=torch.float32, device=self.device)
                for value in (loss_sum, count, len(self.items))]
        loss_sum, count, images = sum_over_ranks(torch.stack(sums))
        scale = (world_size if averaged else 1) / count.clamp(min=1e-9)  # if nothing counts, they are 0
        torch._foreach_mul_(gradients, scale)
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)
        if clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        loss_sum, count, images, norm = torch.stack([loss_sum, count, images, norm]).tolist()
        if math.isfinite(loss_sum + norm):
            progress["bad_steps"] = 0
            progress["images"] += int(images)
            progress["loss"] += loss_sum
            progress["count"] += count
            return True
        for buffer, before in zip(model.buffers(), self.buffers):
            buffer.copy_(before)
        progress["skipped"] += 1
        adapting = self.scaler.get_scale() > 1 and math.isfinite(loss_sum)  # of fp16: its scale falls
        if not adapting:
            progress["bad_steps"] += 1
        if progress["bad_steps"] == 10:
            names = ", ".join(item[0] for item in self.items)
            raise InputError(f"loss or gradient not finite ten times in a row, last on {names}; "
                             "lower --lr, or look at these files")
        return False

    def mean_loss(self):
        """Mean loss of the epoch so far, over the images, labelled pixels or objects that count."""
        return self.progress["loss"] / (self.progress["count"] or math.nan)

    def learning_rate(self):
        return self.parts["optimizer"].param_groups[0]["lr"]

    def end_epoch(self, figures, show):
        """Prints the figures named in show, writes all of them to log.csv and begins the next epoch.

        figures: numbers; lists and dicts (figures of each class) are left out of the log. Afterwards
        progress["epoch"] is one more, and loss and sums are those of the next epoch.
        """
        progress, epoch = self.progress, self.progress["epoch"] + 1
        numbers = {name: float(value) for name, value in figures.items()
                   if not isinstance(value, (list, dict))}
        row = {"epoch": epoch, "step": epoch * self.steps_per_epoch, "lr": self.learning_rate(),
               "loss": self.mean_loss(), **numbers,
               "skipped": progress["skipped"], "seconds": self.seconds,
               "images_per_s": (progress["images"] - self.images_before) / self.seconds,
               "peak_mb": peak_memory_mb(self.device)}
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in ["lr", "loss", *show])
        print(f"epoch {epoch}/{self.args.epochs}  {shown}  {self.seconds:.1f} s")
        if progress["skipped"]:
            print(f"  {progress['skipped']} of {progress['step']} steps skipped: loss or gradient not finite")
        if self.rank == 0:
            self.rows = log_row(self.folder / "log.csv", row)
        progress.update(epoch=epoch, **copy.deepcopy(self.sums))

    def is_best(self, value):
        """Returns whether value is the highest so far, and remembers the highest with its epoch."""
        if not value > self.progress["best"]:  # NaN is never the best
            return False
        self.progress.update(best=value, best_epoch=self.progress["epoch"])
        return True

    def save_best(self):
        """Writes best.pth, the file to share: the weights and what predict.py needs."""
        self.save("best.pth", {"model": self.parts["model"].state_dict()})

    def save_last(self):
        """Writes last.pth, which --resume continues to the bit."""
        self.save("last.pth", {name: part.state_dict() for name, part in self.parts.items()})

    def save(self, name, states):
        self.save_plain(name, {**self.head, **states, "args": vars(self.args), **self.progress})

    def save_plain(self, name, state):
        """Writes state, of any form, to a file in the run's folder; the first process does."""
        if self.rank == 0:
            save_checkpoint(self.folder / name, state)

    @contextlib.contextmanager
    def saved_when_stopped(self):
        """Saves last.pth when a signal stops the block (see steps and raise_if_stopped)."""
        try:
            yield
        except Stopped:
            self.save_last()
            wait_for_ranks()  # torchrun ends all processes once one has left
            raise

    def plot_curves(self, *groups):
        """Draws curves.png: one plot for each group of columns of log.csv, over the epochs.

        Lines of equal values all show: the later ones have gaps.
        """
        if self.rank:
            return
        from matplotlib.figure import Figure  # late: it takes a second
        figure = Figure(figsize=(5 * len(groups), 3.5))
        axes = figure.subplots(1, len(groups), squeeze=False)[0]
        for axis, names in zip(axes, groups):
            epochs = [int(row["epoch"]) for row in self.rows]
            for name, style in zip(names, itertools.cycle(["-", "--", ":", "-."])):
                values = [float(row.get(name) or "nan") for row in self.rows]
                axis.plot(epochs, values, style, marker=".", label=name)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend()
        best_epoch = self.progress["best_epoch"]
        figure.suptitle(f"{self.net}, {self.args.model}: best in epoch {best_epoch}")
        figure.subplots_adjust(left=0.12 / len(groups), right=0.98, bottom=0.14, top=0.9)
        figure.savefig(self.folder / "curves.png", dpi=100)

    def finish(self, name):
        """Prints the last lines: the best value of the figure `name`, and the files of --demo."""
        wait_for_ranks()
        best, epoch = self.progress["best"], self.progress["best_epoch"]
        print(f"best {name} {best:.4f} in epoch {epoch}: {self.folder}/best.pth")
        if not epoch and (self.folder / "best.pth").exists():
            print("no epoch beat the start: best.pth holds the starting weights, last.pth those of "
                  "the last epoch; try another --lr or more --epochs")
        if self.args.demo:
            print("wrote " + " ".join(map(str, sorted(self.folder.glob("[!.]*.*")))))


# --- Data ---

def split_items(items, args, val_items=None):
    """Returns training and validation items: val_items (--val-path), or by --split, or 80:20 by --seed.

    The 80:20 is what sklearn's train_test_split draws: seed 41 is the article's split.
    """
    if args.split and args.val_path:
        raise InputError("--split: has no effect beside --val-path; give one of them")
    train_items = items
    if val_items is None and args.split:
        by_name = {item[0]: item for item in items}
        try:
            split = json.loads(Path(args.split).read_text(encoding="utf-8"))
            train_items = [by_name[name] for name in split["train"]]
            val_items = [by_name[name] for name in split["val"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{args.split}: not a split of {args.data_path} ({error}); "
                             "give another") from None
    elif val_items is None:
        order = np.random.RandomState(args.seed).permutation(len(items)).tolist()
        num_val = math.ceil(0.2 * len(items))
        train_items = [items[i] for i in sorted(order[num_val:])]
        val_items = [items[i] for i in sorted(order[:num_val])]
    train_items, val_items = train_items[:args.limit], val_items[:args.limit]
    if args.overfit:  # which needs no split: a single item will do
        train_items = (train_items or items)[:args.overfit]
        return train_items, train_items

    def paths_of(items):  # of the images, and of the videos' first frames
        firsts = [item[1][0] if isinstance(item[1], tuple) else item[1] for item in items]
        return {os.path.abspath(str(first)) for first in firsts}

    shared = paths_of(train_items) & paths_of(val_items)
    if shared or not train_items or not val_items:
        path = args.split or args.val_path or args.data_path
        path = ", ".join(path) if isinstance(path, list) else path
        raise InputError(f"{path}: {len(train_items)} training and {len(val_items)} validation images, "
                         f"{len(shared)} in both; each needs some, none may be in both: add images, or "
                         "give --val-path or another --split")
    return train_items, val_items


def check_items(check, items, args):
    """Calls check(item, whole) for each item; returns the results, whether it has an object, in order.

    check may raise InputError. whole: read the pixels, as of the first READ_WHOLE items, and of all
    with --sanity-check; else the sizes suffice. --workers processes check a large data set, and each
    of torchrun's its share.
    """
    rank, world_size = ranks()
    tasks = [(item, args.sanity_check or i < READ_WHOLE) for i, item in enumerate(items)]
    tasks = tasks[rank::world_size]
    loader = torch.utils.data.DataLoader(
        tasks, batch_size=16, collate_fn=functools.partial(check_batch, check),
        num_workers=args.workers if len(tasks) > 1000 else 0, worker_init_fn=ignore_group_signals,
        generator=torch.Generator())
    results = []
    nccl = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    for batch in until_stopped(loader, "checking", "cuda" if nccl else "cpu"):
        results += batch
    found = dict(zip(range(rank, len(items), world_size), results))
    return list(merge_over_ranks(found).values())


def check_batch(check, tasks):
    """Runs in loader processes, as the collate_fn of check_items: tasks are (item, whole)."""
    return [check(item, whole) for item, whole in tasks]


def note_small_objects(widths, image_size, cell=4):
    """Prints a note if half of the objects are less than 8 cells of the decoder's mask wide.

    widths: square roots of objects' areas, in sides of the net's square; cell: pixels of its side.
    """
    cells = float(np.median(widths)) * image_size / cell
    if cells < 8:
        needed = math.ceil(8 / cells * image_size / 64) * 64
        print(f"note: half of the objects are at most {cells:.1f} cells of the decoder's mask wide "
              f"(a cell is {cell} pixels of --image-size), too few for their outlines: "
              f"--image-size {needed} gives them 8, or crop the images")


def create_loader(dataset, args, shuffle, batch_size=None, batches=None, **sampling):
    """Returns the DataLoader of this process's share; its order derives from (seed, epoch) alone.

    sampling: keep and pad of EpochSampler; or batches: a sampler of lists of keys, as train_sam2.py
    has. The data set's `collate`, if any, makes the batches.
    """
    sampler = batches or EpochSampler(len(dataset), args.seed, shuffle, *ranks(), **sampling)
    batch_size = None if batches else batch_size or args.batch_size
    return torch.utils.data.DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=args.workers,
        worker_init_fn=ignore_group_signals, collate_fn=getattr(dataset, "collate", None),
        persistent_workers=args.workers > 0,  # starting workers takes seconds, except with fork
        pin_memory=pick_device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(args.seed))


@contextlib.contextmanager
def seeded(*numbers):
    """Seeds torch's CPU generator, which transforms use, with these numbers within the block."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.default_generator.manual_seed(mix(*numbers))
    torch.set_num_threads(1)  # as in loader processes: a sum by two can differ in its last bit
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def draw_demo(kind, folder, count):
    """Writes the generated data set of --demo and returns its folder."""
    demo_data = import_script("demo_data", "--demo")
    with first_rank_first():
        if ranks()[0] == 0:
            demo_data.write(kind, folder, count)
    return str(folder)


# --- Checkpoints ---

def load_checkpoint(path):
    """Returns a checkpoint or state dict, on the CPU: verified, never a pickle that runs code."""
    reason = "damaged (checksum differs); restore it from a copy"
    try:  # the zip's checksums first, which torch.load does not look at
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None:
            with warnings.catch_warnings(action="ignore"):  # about pickles, before they are refused
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            ours = checkpoint if isinstance(checkpoint, dict) and "format" in checkpoint else {}
            if all(isinstance(ours.get(key, {}), dict) for key in ("model", "arch", "args")):
                return checkpoint
            reason = "not a whole checkpoint (restore it from a copy)"
    except FileNotFoundError:
        reason = "no such file"
    except Exception as error:  # the readers raise a dozen types on damaged or hostile bytes
        reason = "not a checkpoint, or a damaged one (restore it from a copy)"
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            reason = "holds Python objects that could run code (save a plain state dict)"
    raise InputError(f"{path}: {reason}")


def save_checkpoint(path, state):
    """Saves to a temporary name, then renames it: path is always the whole old or new file."""
    path, temporary, buffer = Path(path), Path(f"{path}.{os.getpid()}.tmp"), io.BytesIO()
    torch.save(state, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        needed, free = buffer.tell() / 2**20, shutil.disk_usage(path.parent).free / 2**20
        raise InputError(f"{path}: cannot be written ({error.strerror}): {needed:.1f} MB needed, "
                         f"{free:.1f} MB free; the previous file is intact (make room, then "
                         "--resume auto)") from None


# --- Images ---

def list_images(folder, endings=IMAGES, wanted=None, remedy="remove one"):
    """Returns {name without extension: path} of the images in folder, sorted, without hidden files.

    wanted: only these names, as `nfc` returns them. remedy: what to do if two files have one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give --data-path the folder that has it")
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, ending = os.path.splitext(entry.name)
        name = nfc(stem)
        if entry.name[0] == "." or ending.lower() not in endings or entry.is_dir() \
                or wanted is not None and name not in wanted:
            continue
        path = folder / entry.name
        if name in found:
            raise InputError(f"{path}: {found[name].name} has the same name; {remedy}")
        found[name] = path
    return found


def read_lines(path):
    """Returns a text file's lines that are not blank; UTF-8, or UTF-16 with a byte order mark.

    Spaces at both ends are kept, as a name may have them; bytes that are not UTF-8 become surrogates,
    as in the names that the OS gives.
    """
    data = Path(path).read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16") if utf16 else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        raise InputError(f"{path}: neither UTF-8 nor UTF-16 text; save it as UTF-8") from None
    return [line for line in re.split("\r\n?|\n", text) if line.strip()]


def nfc(name):
    """Returns name with each accented letter as one character (NFC): macOS writes them as two."""
    return unicodedata.normalize("NFC", name)


def file_part(name):
    """Returns a class's name as a part of a file's name: without / and what else none may have."""
    return re.sub(r'[/\\:*?"<>|]', "_", str(name))


def read_image(path):
    """Reads an image file of any mode, or a .npy array (H, W) or (H, W, 1, 3 or 4) -> RGB uint8 (H, W, 3).

    EXIF rotation is applied, transparency left out. 8 bits stay as they are; 16-bit files and
    other integers are scaled by their own range; floats in an array are 0..1 (a little more or less,
    as bicubic resizing makes it, is cut off) or 0..255.
    """
    is_array = Path(path).suffix.lower() == ".npy"
    pixels = read_array(path) if is_array else read_file(path)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"{path}: has shape {pixels.shape}; an image is (H, W, 3) or (H, W)")
    pixels = pixels[..., :3]  # the alpha channel has a range of its own
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        if is_array and pixels.dtype.kind == "f":
            if not (low >= -0.5 and (high <= 1.5 or 16 <= high <= 255.5)):  # between, it may be either
                raise InputError(f"{path}: floats from {low:g} to {high:g}; give 0..1 or 0..255")
            low, high = 0, (1 if high <= 1.5 else 255)
            pixels = pixels.clip(low, high)
        pixels = (pixels.astype(float) - low) * (255 / max(high - low, 1e-12))
        pixels = (pixels + 0.5).astype(np.uint8)
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, 2)
    return np.ascontiguousarray(pixels)


def read_mask(path, lossy=False):
    """Reads a mask (H, W) as stored: palette indices, 8- or 16-bit values, bool of 1-bit files, .npy.

    InputError if it is colour-coded, transparent or, unless lossy, of a format that may change ids.
    """
    mode, remedy = None, "save one value per pixel (grey or palette PNG)"
    if Path(path).suffix.lower() == ".npy":
        mask = read_array(path)
        if mask.ndim != 2:
            raise InputError(f"{path}: has shape {mask.shape}; a mask is (H, W)")
    else:
        with open_image(path) as image:
            changed = None if lossy else find_changed_ids(image)
            if changed:
                raise InputError(f"{path}: {changed}; save the ids as a grey PNG of 8 or 16 bits")
            mode, mask = image.mode, read_deep(path, image)
            if mask is None:
                mask = np.array(ImageOps.exif_transpose(image))
    if mode == "LA" or (mode != "CMYK" and mask.ndim == 3 and mask.shape[2] == 4):
        if (mask[..., -1] != mask[0, 0, -1]).any():
            raise InputError(f"{path}: mask with transparency; {remedy}")
        mask = mask[..., :-1]
    if mask.ndim == 3:
        if mode == "CMYK" or (mask != mask[..., :1]).any():
            raise InputError(f"{path}: colour-coded mask; {remedy}")
        mask = mask[..., 0]
    if mask.dtype.kind == "f" and not lossy:
        if (mask != np.round(mask)).any():
            raise InputError(f"{path}: ids must be whole numbers; save it as integers")
        mask = mask.astype(np.int64)
    return mask


def find_changed_ids(image):
    """Returns why an opened file may not have the ids that were saved; None if it has."""
    raw = image.tile[0][3] if image.tile else ""  # what PIL decodes from, as "L;4" or ("L;4", 0, 1)
    raw, highest = (raw if isinstance(raw, tuple) and len(raw) > 1 else (raw, 255))[:2]
    if image.format in ("JPEG", "JPEG2000", "MPO", "WEBP"):
        return f"{image.format} can change ids near edges"
    if image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):  # of TIFF
        return "its compression can change ids near edges"
    if str(raw).startswith(("L;2", "L;4", "L;I")) or image.format == "PPM" and highest not in (255, 65535):
        return "its grey values are scaled or inverted when read"
    if image.mode == "P":
        palette = np.reshape(image.getpalette("RGB"), (-1, 3))
        used = [k for k, count in enumerate(image.histogram()[:len(palette)]) if count]
        used = {(k, *palette[k]) for k in used} - {(0, 0, 0, 0), (1, 255, 255, 255)}
        if image.format == "GIF" and used:
            return "GIF can renumber ids"
        if (palette == palette[:, :1]).all() and any(k != grey for k, grey, *_ in used):
            return "its palette has greys other than its indices: either may be the ids"
    return None


def read_binary_mask(path):
    """Reads a mask of 0 and 255 (object), soft edges too -> bool (H, W), cut at half."""
    mask = read_mask(path, lossy=True)
    if mask.dtype == bool:
        return mask
    if mask.max() == 65535:
        mask = mask // 257
    if mask.min() < 0 or mask.max() > 255 or 0 < mask.max() < 192 or holds_codes(mask):
        found = ", ".join(map(str, np.unique(mask)[:5]))
        raise InputError(f"{path}: has values {found} ...; a mask holds 0 (background) and 255 "
                         "(object): multiply a 0/1 mask by 255, cut a soft one at 128, "
                         "give each class a folder")
    return mask >= 128


def holds_codes(mask):
    """Returns whether values between 0 and 255 fill areas of mask (H, W), as ids and grey codes do.

    In a soft edge each value lies between its neighbours: hardly any window has one value only.
    """
    mask = mask.astype(np.uint8)
    between = (mask > 0) & (mask < 248)
    if not between.any():
        return False
    for side, lowest in ((3, 8), (5, 1)):  # JPEG blurs more at low values
        window = np.ones((side, side), np.uint8)
        flat = cv2.erode(mask, window) == cv2.dilate(mask, window)
        if (flat & between & (mask >= lowest)).sum() > 0.01 * np.count_nonzero(mask):
            return True
    return False


def image_size(path):
    """(width, height) from the header alone, after EXIF rotation."""
    if Path(path).suffix.lower() == ".npy":
        return read_array(path, header_only=True).shape[1::-1]
    with open_image(path) as image:
        size = image.size
        if image.format == "TIFF":  # whose size PIL turns in some versions
            size = image.tag_v2[256], image.tag_v2[257]
        exif = Image.Image.getexif(image)  # a PNG's own getexif would decode its pixels
        return size[::-1] if exif.get(0x0112, 1) in (5, 6, 7, 8) else size


def save_image(path, pixels):
    """uint8 (H, W) or RGB (H, W, 3) -> image file."""
    Image.fromarray(pixels).save(path)


def save_mask(path, mask):
    """Mask (H, W) of ids 0..255 -> PNG with VOC's palette; the stored values are the ids."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette().tobytes())
    image.save(path)


def palette():
    """PASCAL VOC's colours, (256, 3) uint8: 0 black, 1 dark red, ... 255 cream."""
    bits = np.arange(256)[:, None] >> np.arange(3)  # red has bits 0, 3, 6 of the id, green 1, 4, 7
    return ((bits & 1) << 7 | (bits & 8) << 3 | (bits & 64) >> 1).astype(np.uint8)


def tints():
    """Colours of overlays, (256, 3) uint8; the first 20 differ more than VOC's, where many are red."""
    ids = np.arange(256)
    hue, saturation = 180 * ((ids - 1) * 0.21 % 1), np.array([140, 255])[ids % 2]
    hsv = np.stack([hue, saturation, np.array([200, 200, 255])[ids % 3]], 1).astype(np.uint8)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def class_tints(names, first=0):
    """Returns {"id name": colour} of classes, ids from `first` on; not of 0, nor of one class."""
    names = dict(enumerate(names, first)) if len(names) > 1 else {}
    return {f"{k} {name}": tuple(tints()[k % 255].tolist()) for k, name in names.items() if k % 255}


def overlay(image, mask):
    """RGB image (H, W, 3) uint8 with ids (H, W) in 1..254 tinted and outlined; 0, 255 stay clear."""
    # torchvision's draw_segmentation_masks would take gigabytes at 25 megapixels
    ids = np.where(mask == 255, 0, mask).astype(np.uint8)
    colours = tints()
    tinted = cv2.addWeighted(image, 0.6, colours[ids], 0.4, 0)
    width = 2 * max(1, max(ids.shape) // 800) + 1
    outline = cv2.erode(ids, np.ones((width, width), np.uint8)) != ids
    tinted[outline] = colours[ids[outline]]
    return np.where(ids[..., None] > 0, tinted, image)


def save_panel(path, rows, titles, legend={}):
    """Writes a PNG of {name: RGB images}: a row under each name, a title over each column.

    legend: {text: RGB colour}, shown below.
    """
    side = 256  # pixels of an image's longer side
    texts = [(2 + k * (side + 4), 2, title) for k, title in enumerate(titles)]
    chinese = any("\u2e80" <= letter < "\ud800" for letter in "".join([*rows, *legend]))
    font, width, y, parts = load_font(chinese), (side + 4) * len(titles), 20, []
    for name, images in rows.items():
        texts.append((2, y + 2, name.encode("utf-8", "replace").decode()))  # it may be any bytes
        small = []
        for image in images:
            size = [max(1, round(side * n / max(image.shape[:2]))) for n in image.shape[1::-1]]
            small.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        parts += [(k * (side + 4), y + 20, Image.fromarray(image)) for k, image in enumerate(small)]
        y += 24 + max(map(len, small))
    x = 2
    for text, colour in legend.items():
        text = text.encode("utf-8", "replace").decode()
        if x > 2 and x + 20 + font.getlength(text) > width:
            x, y = 2, y + 20
        parts.append((x, y + 4, Image.new("RGB", (12, 12), colour)))
        texts.append((x + 18, y + 2, text))
        x += 34 + round(font.getlength(text))
    if ranks()[0] == 0:
        panel = Image.new("RGB", (width, y + 20 * bool(legend)), "white")
        for x, y, part in parts:
            panel.paste(part, (x, y))
        for x, y, text in texts:
            ImageDraw.Draw(panel).text((x, y), text, "black", font)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        panel.save(path, compress_level=3)  # a third of the time for a tenth more bytes


@functools.cache
def load_font(chinese):
    """Returns a font of 12 pixels; Chinese letters are boxes in it if no font here has them."""
    for name in CHINESE_FONTS if chinese else ():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 12)
    if chinese:
        print("note: no Chinese font on this machine: names are drawn as boxes; install one, such "
              "as fonts-noto-cjk")
    import matplotlib  # late; it brings a font to every machine
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 12)


# --- Processes ---

def ranks():
    """Returns (rank of this process, number of processes): (0, 1) without torchrun."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sum_over_ranks(tensor):
    """Sums the tensor over all processes, in place, and returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Replaces each gradient by its sum over processes; one that no process has stays None."""
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    parameters = [p for p, processes in zip(parameters, sum_over_ranks(used).tolist()) if processes]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if parameters:
        flat = sum_over_ranks(torch.cat([p.grad.flatten() for p in parameters]))
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))


def merge_over_ranks(found):
    """Returns {index: result} of all processes, by index; each process gives its own part."""
    parts = [found]
    if torch.distributed.is_initialized():
        parts = [None] * ranks()[1]
        torch.distributed.all_gather_object(parts, found)
    return dict(sorted((index, result) for part in parts for index, result in part.items()))


def wait_for_ranks():
    """Waits until all processes are here, as what the first one has written is read next."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def first_rank_first():
    """Runs the block in the first process, then in the others, which find its files."""
    rank = ranks()[0]
    if rank > 0:
        wait_for_ranks()
    yield
    if rank == 0:
        wait_for_ranks()


def stop_asked():
    """Returns whether SIGTERM or SIGINT has come to this process."""
    return bool(_signals)


def raise_if_stopped(device=None):
    """Raises Stopped if SIGTERM or SIGINT has come; called where it is safe to save.

    With a device: in all processes if it has come to any; each must call it equally often.
    """
    stopped = stop_asked()
    if device is not None and ranks()[1] > 1:
        stopped = sum_over_ranks(torch.tensor(float(stopped), device=device)).item()
    if stopped:
        raise Stopped


def until_stopped(items, title, device=None):
    """Yields items under a progress bar; once a signal has come it ends, and all processes leave.

    device: as in raise_if_stopped, which it calls at the end.
    """
    for item in tqdm(items, title, leave=False, disable=hide_bar()):
        if stop_asked():
            break
        yield item
    raise_if_stopped(device)


def hide_bar():
    """Returns tqdm's `disable`: a bar only on the first rank, and where stderr is a terminal."""
    return True if os.environ.get("RANK", "0") != "0" else None


# --- Details of the above ---

def switch(text):
    """Returns the value of an on/off option: to Python, bool("False") is True."""
    value = text.lower()
    if value not in ("true", "yes", "1", "on", "false", "no", "0", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value in ("true", "yes", "1", "on")


def amp_mode(text):
    """Returns the mode of --amp; the articles' `--amp True` and `--amp False` mean auto and off."""
    mode = {"true": "auto", "false": "off"}.get(text.lower(), text.lower())
    if mode not in ("auto", "bf16", "fp16", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, bf16, fp16, off")
    return mode


def is_out_of_memory(error):
    """Returns whether an error, of OpenCV too, says that memory, of any device, is full."""
    words = ("Memory", "of memory", "allocate memory", "enough memory", "Insufficient memory",
             "ALLOC_FAILED")  # the last of cuBLAS, cuDNN
    return any(word in f"{type(error).__name__} {error}" for word in words)


def remember_signal(number, frame):
    if _signals and "RANK" not in os.environ:  # the second time: at once; torchrun sends one too
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _signals.append(number)


def ignore_group_signals(worker):
    """Keeps a loader process alive when a signal hits the whole group, so that the step can finish.

    SIGTERM from the script itself still ends it: so Python ends the loaders when the script ends.
    """
    def obey_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()


def mix(*numbers):
    """Returns a seed made of these numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index) in an order given by (seed, epoch) alone; rank r of n takes every n-th.

    set_epoch(epoch, skip) leaves out the first items, which an interrupted epoch has trained on. So
    that all ranks have equally many: keep only that many of each epoch, or pad it with (epoch, -1).
    """

    def __init__(self, num_items, seed, shuffle=True, rank=0, world_size=1, keep=None, pad=False):
        self.num_items, self.seed, self.shuffle = num_items, seed, shuffle
        self.rank, self.world_size, self.keep, self.pad = rank, world_size, keep, pad
        self.set_epoch(0)

    def set_epoch(self, epoch, skip=0):
        order = list(range(self.num_items))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(self.num_items, generator=generator).tolist()
        order = order[:self.keep]
        if self.pad:
            order += [-1] * (-len(order) % self.world_size)
        self.keys = [(epoch, index) for index in order[self.rank::self.world_size][skip:]]

    def __iter__(self):
        return iter(self.keys)

    def __len__(self):
        return len(self.keys)


def pick_device(text):
    """Returns the device of --device: auto takes cuda, then mps, then cpu; a number N means cuda:N."""
    if text == "auto":
        text = "mps" if torch.backends.mps.is_available() else "cpu"
        text = "cuda" if torch.cuda.is_available() else text
    try:
        device = torch.device(f"cuda:{text}" if text.isdigit() else text)
    except RuntimeError:
        raise InputError(f"--device {text}: no such device; give auto, cpu, cuda, cuda:N or "
                         "mps") from None
    available = {"cpu": True, "mps": torch.backends.mps.is_available(),
                 "cuda": (device.index or 0) < torch.cuda.device_count()}
    if not available.get(device.type, False):
        raise InputError(f"--device {text}: not on this machine ({torch.cuda.device_count()} CUDA "
                         "devices); give auto")
    return device


def has_bf16(device):
    """Returns whether device is a CPU whose bf16 instructions PyTorch uses."""
    asked = [getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile")]
    return device.type == "cpu" and any(supported() for supported in asked)


def pick_precision(amp, device):
    """Returns (autocast dtype or None for float32, GradScaler) of --amp; only fp16 scales the loss."""
    if amp == "fp16" and device.type != "cuda":
        raise InputError(f"--amp fp16: needs CUDA, device is {device}; give bf16 or off")
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def start_process_group(device):
    """Joins torchrun's processes, if any (NCCL on CUDA, else Gloo), and returns this one's device."""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"torchrun --nproc_per_node: more processes than the {torch.cuda.device_count()} "
                             "CUDA devices here; give as many, or --device cpu")
        torch.cuda.set_device(device)
    elif device.type == "mps":  # which no backend can sum over
        device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(hours=2))  # the check of a large data set may keep one process busy
    if ranks()[0]:  # only the first prints
        sys.stdout = open(os.devnull, "w")
    return device


def leave_process_group():
    """Ends Gloo's or NCCL's threads: a process that exits beside them may abort (SIGABRT)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def peak_memory_mb(device):
    """Returns the most memory used so far: of a CUDA device, else resident (nan except on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would count what the parent process had in use
    words = status.read_text().split() if status.exists() else []
    return int(words[words.index("VmHWM:") + 1]) / 2**10 if "VmHWM:" in words else math.nan


def find_checkpoint(resume, output_dir):
    """Returns the checkpoint of --resume (a path, or auto: output_dir/last.pth), or None."""
    if not resume:
        return None
    last = Path(output_dir if resume == "auto" else resume, "last.pth")
    if resume == "auto" and not last.exists():
        return None
    checkpoint = load_checkpoint(last if last.exists() else resume)  # a run's folder will do
    needed = {"format", "model", "optimizer", "args", "epoch", "step"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise InputError(f"--resume {resume}: not a run's last.pth; start a new run from it with "
                         "--weights")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"--resume {resume}: saved by another version of these scripts; start a "
                         "new run from it with --weights")
    return checkpoint


def check_resume(checkpoint, args):
    """Checks that the options that shape the run, all but MAY_CHANGE, are as they were."""
    for key, value in json.loads(json.dumps(vars(args))).items():
        before = json.loads(json.dumps(checkpoint["args"].get(key, value)))
        if key not in MAY_CHANGE and before != value:
            raise InputError(f"--resume {args.resume}: trained with {option_of(key)} {before}, now "
                             f"{value}; give the same, or start a new run from it with --weights")


def option_of(key):
    """Returns the user's name for the entry `key` of args."""
    words = {"data_hash": "images of data hash", "world_size": "torchrun --nproc_per_node",
             "base_hash": "base weights of hash"}
    return words.get(key, "--" + key.replace("_", "-"))


def lock_folder(folder):
    """Makes and locks folder, returns the open lock file; InputError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
    except ImportError:  # Windows
        pass
    except OSError:
        raise InputError(f"{folder}: another process is writing there; end that one, or give another "
                         "--output-dir") from None
    return file


def prepare_folder(args, split):
    """Removes stale files, refuses an earlier run's folder, writes args.json and split.json."""
    folder = Path(args.output_dir)
    for stale in [*folder.glob("*.pth.*.tmp"), *folder.glob("log.csv.tmp")]:
        stale.unlink()
    source = Path(args.resume or "").resolve()  # a checkpoint, or its folder
    resumed = args.resume == "auto" or args.resume and folder.resolve() in (source, source.parent)
    if any((folder / name).exists() for name in ("last.pth", "best.pth")) and not resumed:
        with contextlib.suppress(OSError, ValueError, KeyError):
            earlier = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
            args.overwrite |= args.demo and earlier["demo"]  # a demo may replace a demo
        if not args.overwrite:
            raise InputError(f"{folder}: there is a run here; continue it with --resume auto, replace "
                             "it with --overwrite, or give another --output-dir")
        for path in itertools.chain(*map(folder.glob, WRITTEN)):
            path.unlink()
    command, git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError):
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "numpy": np.__version__, "git": git}
    settings = {"args": vars(args), "versions": versions}
    for name, content in (("args.json", settings), ("split.json", split)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def data_hash(items):
    """Returns eight hex digits of the names and sizes, not contents, of all files in nested lists."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, (list, tuple)):
            item = data_hash(item)
        elif isinstance(item, Path):
            item = f"{item.parent.name}/{item.name} {item.stat().st_size}"
        digest.update(f"{item}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:8]


def log_row(path, row):
    """Writes row to a csv in place of its epoch's and later rows, and returns all rows."""
    rows = []
    if Path(path).exists():
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
        except (KeyError, ValueError):
            raise InputError(f"{path}: not as this script left it; move it away and --resume "
                             "auto") from None
    rows.append({key: f"{value:.6g}" if isinstance(value, float) else str(value)
                 for key, value in row.items()})
    columns = dict.fromkeys(key for row in reversed(rows) for key in row)
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)
    return rows


@contextlib.contextmanager
def open_image(path):
    """Opens an image file; whatever PIL raises about a bad one becomes an InputError."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a JPEG with a preview
                raise InputError(f"{path}: holds {image.n_frames} images; save each as its own file")
            yield image
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: not an image that can be read") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; save it as .npy, or in parts") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # PIL raises a dozen types on damaged or hostile bytes
        raise InputError(f"{path}: truncated or unreadable ({type(error).__name__}: {error}); replace "
                         "it") from None


def read_file(path):
    """Returns an image file's pixels: RGB uint8 (H, W, 3); more than 8 bits as stored."""
    with open_image(path) as image:
        pixels = read_deep(path, image)
        if pixels is not None:
            return pixels
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


def read_deep(path, image):
    """Returns the pixels of an opened file of more than 8 bits, (H, W) or (H, W, 3 or 4); else None."""
    if image.format == "PNG":  # PIL looks at no checksum of the pixels, unless asked
        with Image.open(path) as copied:
            copied.verify()
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    # PIL names 16 bits in the mode, as I;16, or only in what it will decode from, as RGB;16B
    deep = image.mode in ("I", "F") or ";16" in image.mode + str(image.tile[:1])
    if not deep and max(tags.get(258, (8,))) <= 8:  # bits per channel
        return None
    turned, planes = image.getexif().get(0x0112, 1) != 1, tags.get(284, 1) == 2
    if turned or planes:  # which the readers do in their own ways, or not at all
        reason = "EXIF rotation" if turned else "separate colour planes"
        raise InputError(f"{path}: 16-bit file with {reason}; save it again as a plain PNG")
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8:  # PIL cut 16-bit colour down to 8 bits
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.dtype == np.uint8:
            raise InputError(f"{path}: cannot be read; save it again as a plain PNG")
        if pixels.ndim == 3:
            pixels = pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]  # BGR
    if not np.isfinite(pixels).all():
        raise InputError(f"{path}: has values that are not finite; replace them")
    return pixels


def read_array(path, header_only=False):
    """Returns the numbers in a .npy file, memory-mapped if header_only; unpickles nothing."""
    try:
        array = np.load(path, "r" if header_only else None, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # numpy reads the head as Python: a dozen types, MemoryError among them
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not an array of numbers that can be read ({reason}); save it by "
                         "numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif" or 0 in array.shape:
        raise InputError(f"{path}: not an array of numbers; save one image per file by numpy.save")
    if not header_only and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: has values that are not finite; replace them")
    return array
