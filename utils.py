"""What every script needs and no article teaches: errors, seeds, devices, checkpoints, pictures, logs, processes.

Data sets, transforms, losses, metrics, schedules and training steps are the lesson: they stand in the scripts.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


# --- Command line, errors, signals ---

class InputError(Exception):
    """A mistake of the user: one line that names the file or option and the remedy; `run` makes it exit status 2."""


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; raised by `check_stop` where it is safe to save."""


class HelpFormatter(argparse.HelpFormatter):
    """One line an option: all its spellings, its value once."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=48, width=140)

    def _format_action_invocation(self, action):
        names = ", ".join(action.option_strings)
        if not names:
            return super()._format_action_invocation(action)
        value = action.metavar or ("" if action.nargs in ("?", 0) else "N" if action.type else None)
        return f"{names} {self._format_args(action, action.dest.upper()) if value is None else value}"


class Obsolete(argparse.Action):
    """An option of an article that has no meaning left: accepted, and its help, which says what to use, is printed."""

    def __call__(self, parser, namespace, values, option_string=None):
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {option_string}: {self.help}")


class ArgumentParser(argparse.ArgumentParser):
    """Errors of one line, no abbreviations; with --demo the given demo settings are the defaults."""

    def __init__(self, description, usage="%(prog)s [options]", demo=None):
        super().__init__(description=description, usage=usage, allow_abbrev=False, formatter_class=HelpFormatter)
        self.demo = demo or {}

    def parse_known_args(self, args=None, namespace=None):
        parsed = super().parse_known_args(args, namespace)
        if getattr(parsed[0], "demo", False):
            self.set_defaults(**self.demo)
            parsed = super().parse_known_args(args, namespace)
        return parsed

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(main, parser):
    """main(parsed arguments). InputError and lack of memory: one line and exit 2; SIGINT 130, SIGTERM 143."""
    def remember(number, frame):
        if _signals:  # the second time: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _signals.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    try:
        main(parser.parse_args())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except InputError as error:  # from a loader process it comes with that process's traceback before it
        parser.error(str(error).strip().splitlines()[-1].removeprefix("utils.InputError: "))
    except OSError as error:  # a folder that cannot be written, a full disk: the system's words, with the file
        if error.errno is None:
            raise
        parser.error(f"{error.filename or 'output'}: {error.strerror}; free space, or give another file or folder")
    except Stopped:
        parser.exit(128 + _signals[0], f"{parser.prog}: stopped by {signal.Signals(_signals[0]).name}\n")
    except (RuntimeError, MemoryError) as error:
        if "RANK" in os.environ and "peer" in str(error):  # Gloo's word when another process is gone
            parser.exit(1, f"{parser.prog}: rank {os.environ['RANK']}: lost another process, see its message\n")
        if not is_out_of_memory(error):
            raise
        parser.error("out of memory: try a smaller --batch-size with --accumulate, a smaller picture, or --amp bf16 "
                     f"({' '.join(str(error).split())[:200]})")


def is_out_of_memory(error):
    """Whether a RuntimeError or MemoryError says so, of the CPU or a device."""
    words = ("Memory", "of memory", "allocate memory", "enough memory")
    return any(one in f"{type(error).__name__} {error}" for one in words)


_signals = []


def stop_asked():
    """Whether SIGTERM or SIGINT has come to this process."""
    return bool(_signals)


def check_stop(device=None):
    """Raises Stopped if SIGTERM or SIGINT has come; called between steps, so that what is saved is whole.

    With a device: if it has come to any of the processes, and then in all of them; each must call it equally often.
    """
    if stop_asked() if device is None else sum_over_ranks(torch.tensor(float(stop_asked()), device=device)):
        raise Stopped


def outlive_signals(worker):
    """worker_init_fn of loaders: a signal to the whole group must not end them before the step that needs them.

    SIGTERM of the script itself still does: Python sends it to the processes that are left when a script ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: tells the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def switch(text):
    """Type of on/off options: true/false, yes/no, 1/0 in any case (to Python bool("False") is True)."""
    values = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if str(text).lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[str(text).lower()]


def number(kind, low=-sys.float_info.max, high=sys.float_info.max):
    """Type of an int or float option with bounds: number(int, 1) takes 1, 2, 3 ...; never nan or inf."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}" + f" and at most {high}" * (high < 1e300))
        return value
    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def amp_mode(text):
    """Type of --amp; the articles' `--amp True` and `--amp False` mean auto and off."""
    mode = {"true": "auto", "false": "off"}.get(text.lower(), text.lower())
    if mode not in ("auto", "bf16", "fp16", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, bf16, fp16, off")
    return mode


# --- Seeds ---

def seed_everything(seed, deterministic=False):
    """Seeds torch; deterministic forbids CUDA algorithms whose sums depend on timing, else cuDNN picks the fastest."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index) for the data set, in an order given by (seed, epoch) alone; rank r of n takes every n-th.

    set_epoch(epoch, skip) leaves out the first skip items: those that an interrupted epoch has already trained on.
    So that every rank has as many: keep only so many items of each epoch's order, or pad it with (epoch, -1).
    """

    def __init__(self, num_items, seed, shuffle=True, rank=0, world_size=1, keep=None, pad=False):
        self.num_items, self.seed, self.shuffle, self.rank, self.world_size = num_items, seed, shuffle, rank, world_size
        self.keep, self.pad = keep, -num_items % world_size if pad else 0
        self.set_epoch(0)

    def set_epoch(self, epoch, skip=0):
        self.epoch, self.skip = epoch, skip

    def order(self):
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = torch.randperm(self.num_items, generator=generator).tolist() if self.shuffle else range(self.num_items)
        return [*order[:self.keep], *[-1] * self.pad][self.rank::self.world_size]

    def __iter__(self):
        return iter([(self.epoch, index) for index in self.order()[self.skip:]])

    def __len__(self):
        return max(len(self.order()) - self.skip, 0)  # skip counts a last, smaller batch as a full one


def _mix(*numbers):
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


@contextlib.contextmanager
def seeded(*numbers):
    """Inside, torch's CPU generator (which torchvision's transforms use) depends on these numbers alone.

    On one thread, as in loader processes: a mean over the pixels, summed by two threads, can differ in its last bit.
    """
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.default_generator.manual_seed(_mix(*numbers))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def rng_state():
    """torch's generators in each process, for a checkpoint, to be called by all; the data need none: see `seeded`."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = {"cpu": torch.get_rng_state(), "cuda": cuda}
    if not torch.distributed.is_initialized():
        return [state]
    states = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def set_rng_state(states, rank=0):
    state = states[rank]
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


# --- Device and precision ---

def pick_device(text):
    """--device: auto takes cuda, then mps, then cpu; a number N means cuda:N. InputError if it is not there."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{text}" if text.isdigit() else text)
    except RuntimeError:
        raise InputError(f"--device {text}: no such device; give auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "mps": torch.backends.mps.is_available(),
             "cuda": (device.index or 0) < torch.cuda.device_count()}.get(device.type, False)
    if not there:
        raise InputError(f"--device {text}: not on this machine ({torch.cuda.device_count()} CUDA devices); give auto")
    return device


def pick_precision(amp, device):
    """--amp -> (autocast dtype or None for plain float32, GradScaler); only fp16 on CUDA scales the loss."""
    if amp == "fp16" and device.type != "cuda":
        raise InputError(f"--amp fp16: needs CUDA, device is {device}; give bf16 or off")
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def peak_memory_mb(device):
    """Most memory in use since the process started: of a CUDA device, else resident (nan where it is not Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would count what the process that started this one had in use
    words = status.read_text().split() if status.exists() else []
    return int(words[words.index("VmHWM:") + 1]) / 2**10 if "VmHWM:" in words else float("nan")


# --- Checkpoints and weights ---

def save_checkpoint(path, state):
    """torch.save under a temporary name, fsync, rename: at any moment path is the old file or the new one, whole.

    The zip's own CRCs leave its headers unguarded, so the file ends in a zip comment with the CRC of all before it.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", len("crc32=00000000")))  # the length of the comment that follows
            file.flush()
            file.seek(0)
            crc = crc32(file, os.path.getsize(temporary))
            file.write(b"crc32=%08x" % crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) and "write" not in str(error) and "unexpected pos" not in str(error):
            raise
        needed, free = num_bytes(state) / 2**20, shutil.disk_usage(path.parent).free / 2**20
        reason = getattr(error, "strerror", None) or "no space left"
        raise InputError(f"{path}: cannot be written ({reason}): {needed:.1f} MB needed, {free:.1f} MB free; "
                         "the former file is whole (make room, then --resume auto)") from None


def num_bytes(value):
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(num_bytes, value)) if isinstance(value, (list, tuple)) else getattr(value, "nbytes", 0)


def crc32(file, size):
    """CRC of the next size bytes of an open file, which are left behind."""
    crc = 0
    for start in range(0, size, 2**20):
        crc = zlib.crc32(file.read(min(2**20, size - start)), crc)
    return crc


def load_checkpoint(path):
    """A file of save_checkpoint, or anybody's state dict, on the CPU; verified, and never a pickle that runs code."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
                ours = archive.comment.startswith(b"crc32=")
                whole = archive.comment == b"crc32=%08x" % crc32(file, os.path.getsize(path) - len(archive.comment)) \
                    if ours else not archive.comment and archive.testzip() is None
            if not whole:
                raise InputError(f"{path}: damaged (checksum differs); restore it from a copy")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:  # the zip and pickle readers raise a dozen types on damaged or hostile bytes
        unsafe = "Unsupported global" in str(error) or "Unsupported class" in str(error)
        reason = "holds Python objects that could run code (save a plain state dict)" if unsafe else \
            "not a checkpoint, or a damaged one (restore it from a copy)"
        raise InputError(f"{path}: {reason}") from None


def find_checkpoint(resume, output_dir):
    """The checkpoint that --resume means: a path, or auto for output_dir/last.pth if it is there; else None."""
    last = Path(output_dir if resume == "auto" else resume or "", "last.pth")
    if not resume or (resume == "auto" and not last.exists()):
        return None
    checkpoint = load_checkpoint(last if last.exists() else resume)  # a run's folder will do
    needed = {"format", "net", "arch", "args", "model", "optimizer", "lr_scheduler", "scaler", "rng"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise InputError(f"--resume {resume}: not a run's last.pth; start a new run from it with --weights")
    return checkpoint


def read_weights(path, wanted):
    """Tensors by name: from a checkpoint of ours (which must be as wanted), {"model": ...} or a bare state dict."""
    checkpoint = load_checkpoint(path)
    check_net(checkpoint, path, wanted)
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    state = state if isinstance(state, dict) else {}
    return {str(key).removeprefix("module."): value for key, value in state.items()}  # DataParallel's prefix


def load_weights(model, state, path):
    """Strictly load the tensors that were read from path; InputError if they are another net's or of other shapes."""
    own = model.state_dict()
    differing = [f"{key} {tuple(getattr(state.get(key), 'shape', ()))} instead of {tuple(own[key].shape)}"
                 if key in state else f"{key} missing" for key in own
                 if not isinstance(state.get(key), torch.Tensor) or state[key].shape != own[key].shape]
    differing += [f"{key} unknown" for key in state if key not in own]
    if differing:
        raise InputError(f"{path}: weights of another net than {type(model).__name__}: {len(differing)} of {len(own)} "
                         f"tensors differ ({', '.join(differing[:3])} ...)")
    model.load_state_dict(state)


def check_net(checkpoint, path, wanted):
    """InputError unless a checkpoint of ours has the net and constructor arguments wanted; bare weights pass."""
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        found = {"net": checkpoint.get("net"), **checkpoint.get("arch", {})}
        differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differing:
            holds, asked = (", ".join(f"{k} {side[k]}" for k in differing if k in side) for side in (found, wanted))
            raise InputError(f"{path}: holds {holds}; asked for {asked} (give the options it was trained with)")


def check_resume(checkpoint, args, free):
    """InputError if an option that shapes the run is not what it was; those in free may change."""
    for key, value in json.loads(json.dumps(vars(args))).items():
        before = checkpoint["args"].get(key, value)  # an option that is new since then
        if key not in free and json.loads(json.dumps(before)) != value:
            option = {"data_hash": "pictures of data hash", "world_size": "torchrun --nproc_per_node"}.get(
                key, "--" + key.replace("_", "-"))
            raise InputError(f"--resume {args.resume}: trained with {option} {before}, now {value}; give the same, or "
                             "start a new run from it with --weights")


def fetch_weights(name, url, sha256=None, size=None):
    """Path of an official file in the torch hub cache, downloaded once, verified on every call.

    sha256: hex digest or the first part of it; size in bytes; each None where it is not published.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    with first_rank_first():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
            except OSError as error:  # URLError is one
                raise InputError(f"--weights {name}: cannot fetch {url} ({getattr(error, 'reason', error)}); "
                                 f"download it elsewhere and put it at {path}") from None
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != (size or path.stat().st_size) or not digest.startswith(sha256 or ""):
        raise InputError(f"{path}: not the published {name}: {path.stat().st_size} bytes, sha256 {digest[:8]} instead "
                         f"of {size or 'any'}, {sha256 or 'any'}; delete it and run again")
    return path


def unzip(path, ending):
    """Path of the member of a zip file whose name ends so, unpacked beside it under that name, anew on every call."""
    target = Path(path).with_name(ending)
    try:
        with zipfile.ZipFile(path) as archive, first_rank_first():
            member = next(member for member in archive.namelist() if member.endswith(ending))
            temporary = Path(f"{target}.{os.getpid()}.tmp")
            temporary.write_bytes(archive.read(member))
            os.replace(temporary, target)
    except (zipfile.BadZipFile, StopIteration):
        raise InputError(f"{path}: not the published file; delete it and run again") from None
    return target


# --- Pictures ---

@contextlib.contextmanager
def _open(path):
    """The opened picture; whatever PIL makes of a bad file becomes one line."""
    try:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # MPO: a phone's JPEG with a preview
                raise InputError(f"{path}: holds {picture.n_frames} pictures; save each as a file of its own")
            yield picture
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: not a picture that can be read") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; save it as .npy, or in parts") from None
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: truncated or unreadable ({error}); replace it") from None


def image_size(path):
    """(width, height) from the header alone, after EXIF rotation."""
    with _open(path) as picture:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return picture.size[::-1] if turned else picture.size


def read_image(path):
    """Picture of any mode -> RGB uint8 (H, W, 3): EXIF rotation applied, 16-bit scaled by its own range."""
    with _open(path) as picture:
        deep = picture.mode in ("I", "F") or picture.mode.startswith("I;16") or ";16" in str(picture.tile[:1])
        if deep:
            pixels = np.asarray(ImageOps.exif_transpose(picture))
            if pixels.dtype == np.uint8:  # PIL cut 16-bit colour down to 8 bits
                pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)[..., 2::-1]
            pixels = pixels.astype(np.float64)
            low, high = pixels.min(), pixels.max()
            if not np.isfinite(high - low):
                raise InputError(f"{path}: has pixels that are not finite; replace them")
            pixels = ((pixels - low) * (255 / max(high - low, 1e-12)) + 0.5).astype(np.uint8)
            return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return np.array(picture.convert("RGB"))


def read_mask(path):
    """Mask (H, W) as stored: palette indices, 8- or 16-bit values, bool of 1-bit files. InputError if colour-coded."""
    with _open(path) as picture:
        mode, mask = picture.mode, np.array(ImageOps.exif_transpose(picture))
    if mode in ("LA", "RGBA"):
        if (mask[..., -1] != mask[0, 0, -1]).any():
            raise InputError(f"{path}: mask with transparency; save one value per pixel (grey or palette PNG)")
        mask = mask[..., :-1]
    if mask.ndim == 3:
        if mode == "CMYK" or (mask != mask[..., :1]).any():
            raise InputError(f"{path}: colour-coded mask; save one value per pixel (grey or palette PNG)")
        mask = mask[..., 0]
    return mask


def read_npy(path, mmap_mode=None):
    """The array in a .npy file; InputError if it is none, or holds Python objects, which could run code.

    With mmap_mode "r" just the header is read and the file's size looked at.
    """
    try:
        array = np.load(path, mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not an array of numbers that can be read ({error}); save it by numpy.save") \
            from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif" or 0 in array.shape:
        raise InputError(f"{path}: not an array of numbers; save one picture a file by numpy.save")
    if not mmap_mode and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: has values that are not finite; replace them")
    return array


def read_pixels(path, mmap_mode=None):
    """The array of a picture as stored, (H, W), (H, W, 1) or (H, W, 3); a fourth channel is left out."""
    image = read_npy(path, mmap_mode)
    if image.ndim == 3 and image.shape[2] == 4:
        image = image[..., :3]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise InputError(f"{path}: has shape {image.shape}; an image is (H, W, 3) or (H, W)")
    return image


def to_rgb(image, path):
    """What read_pixels read from path -> (H, W, 3) uint8 RGB.

    uint8 as it is; floats are 0..1, or 0..255 if any is above 1; other integers are scaled by their own range.
    """
    if image.dtype.kind == "f":
        if image.min() < 0 or image.max() > 255:
            raise InputError(f"{path}: floats from {image.min():g} to {image.max():g}; give 0..1 or 0..255")
        image = image * (255 if image.max() <= 1 else 1)
    elif image.dtype != np.uint8:
        low, high = int(image.min()), int(image.max())
        image = (image.astype(np.float64) - low) * (255 / max(high - low, 1))
    image = (image + 0.5).astype(np.uint8) if image.dtype != np.uint8 else image
    image = image if image.ndim == 3 else image[..., None]
    return np.broadcast_to(image, (*image.shape[:2], 3))


def palette():
    """PASCAL VOC's colours, (256, 3) uint8: 0 black, 1 dark red, ... 255 cream."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def save_mask(path, mask):
    """Mask (H, W) of ids 0..255 -> PNG with VOC's palette; the stored values are the ids."""
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(palette().tobytes())
    picture.save(path)


def save_picture(path, pixels):
    """uint8 (H, W) or RGB (H, W, 3) -> picture file."""
    Image.fromarray(pixels).save(path)


def overlay(image, mask):
    """RGB image (H, W, 3) with mask ids (H, W) tinted and outlined; 0 and 255 stay clear."""
    out = image.copy()
    for value in np.unique(mask):
        if value not in (0, 255):
            inside = (mask == value).astype(np.uint8)
            colour = np.minimum(palette()[int(value) % 256] * 1.33 + 40, 255)  # the palette's own are too dark to see
            tint = (0.6 * np.arange(256)[:, None] + 0.4 * colour).astype(np.uint8)  # (256, 3): each value, tinted
            np.copyto(out, cv2.LUT(image, tint[None]), where=inside[..., None] > 0)
            outlines, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(out, outlines, -1, colour.tolist(), max(1, max(mask.shape) // 400))
    return out


def save_panel(path, rows, titles, height=224):
    """PNG of {name: RGB pictures}, a row each, scaled to this height, under their column titles."""
    scaled = [[cv2.resize(picture, (max(1, round(picture.shape[1] * height / picture.shape[0])), height),
                          interpolation=cv2.INTER_AREA) for picture in row] for row in rows.values()]
    lefts = np.cumsum([0] + [max(row[i].shape[1] for row in scaled) + 4 for i in range(len(titles))]).tolist()
    sheet = np.full((24 + len(rows) * (height + 4), lefts[-1], 3), 255, np.uint8)
    for i, row in enumerate(scaled):
        for left, picture in zip(lefts, row):
            sheet[24 + i * (height + 4):][:height, left:left + picture.shape[1]] = picture
    texts = [(title, left + 4, 17) for title, left in zip(titles, lefts)]
    texts += [(name.encode("ascii", "replace").decode(), 4, 40 + i * (height + 4)) for i, name in enumerate(rows)]
    for text, left, bottom in texts:
        sheet[bottom - 13:bottom + 4, left:left + 9 * len(text)] = 255
        cv2.putText(sheet, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    save_picture(path, sheet)


# --- Run folder ---

def draw_demo(kind, folder, count):
    """--demo: the drawn data set of this kind; InputError where the script was copied without demo_data.py."""
    try:
        import demo_data
    except ImportError:
        raise InputError("--demo: demo_data.py is not beside this script; copy it too, or give --data-path") from None
    with first_rank_first():
        if os.environ.get("RANK", "0") == "0":
            demo_data.write(kind, folder, count)
    return folder


def start_run(args, split=None):
    """Make --output-dir ready: remove stale temporaries, refuse a finished run's folder; args.json and split.json."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.pth.tmp"), *folder.glob("log.csv.tmp")]:
        stale.unlink()
    resumed = args.resume == "auto" or (args.resume and Path(args.resume).resolve().parent == folder.resolve())
    if any((folder / name).exists() for name in ("last.pth", "best.pth")) and not resumed:
        with contextlib.suppress(OSError, ValueError, KeyError):
            args.overwrite |= args.demo and json.loads((folder / "args.json").read_text())["args"]["demo"]
        if not args.overwrite:
            raise InputError(f"{folder}: there is a run here; continue it with --resume auto, replace it with "
                             "--overwrite, or give another --output-dir")
        for pattern in ("last.pth", "best.pth", "model.pth", "log.csv", "*.png", "results*.txt", "record_mAP.txt"):
            for path in folder.glob(pattern):
                path.unlink()
    command, git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError):
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "git": git}
    (folder / "args.json").write_text(json.dumps({"args": vars(args), "versions": versions}, indent=1))
    if split:
        (folder / "split.json").write_text(json.dumps(split, indent=1))


def data_hash(items):
    """Eight hex digits of the names and sizes, not the contents, of all files in nested lists."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, (list, tuple)):
            item = data_hash(item)
        elif isinstance(item, Path):
            item = f"{item.parent.name}/{item.name} {item.stat().st_size}"
        digest.update(f"{item}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:8]


def log_row(path, row):
    """Write row, whose first item is the epoch, to a csv in place of that and later epochs; returns all rows."""
    rows = []
    if Path(path).exists():
        try:
            with open(path, newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
        except (KeyError, ValueError):
            raise InputError(f"{path}: not as this script left it; move it away and --resume auto") from None
    rows.append({key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()})
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)
    return rows


def plot_curves(path, rows, *groups):
    """curves.png: one plot for each group of column names over the epochs."""
    import matplotlib  # late: it takes a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 3.5), squeeze=False)
    for axis, names in zip(axes[0], groups):
        for name in names:
            values = [float(row[name] or "nan") for row in rows]  # empty before a column was added
            axis.plot([int(row["epoch"]) for row in rows], values, ".-", label=name)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- Several processes ---

def start_process_group(device):
    """Under torchrun: joins its process group (NCCL on CUDA, else Gloo). Returns (rank, world size, own device).

    All ranks but the first are silent on stdout from here on.
    """
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"torchrun --nproc_per_node: more processes than the {torch.cuda.device_count()} CUDA "
                             "devices here; give as many, or --device cpu")
        torch.cuda.set_device(device)
    elif device.type == "mps":  # which no backend can sum over
        device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = torch.distributed.get_rank()
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank, torch.distributed.get_world_size(), device


@contextlib.contextmanager
def first_rank_first():
    """The body runs in the first process, then in the others, which find its files."""
    several, rank = torch.distributed.is_initialized(), os.environ.get("RANK", "0")
    if several and rank != "0":
        torch.distributed.barrier()
    yield
    if several and rank == "0":
        torch.distributed.barrier()


def sum_over_ranks(tensor):
    """The sum of this tensor over all processes, in place; alone, the tensor itself."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def quiet():
    """What tqdm's `disable` wants: no bar on ranks but the first, nor where standard error is no terminal."""
    return True if os.environ.get("RANK", "0") != "0" else None
