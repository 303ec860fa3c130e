"""Tracks objects through a video with SAM 2, from points, boxes or masks on some of its frames.

    python predict_video.py --weights base_plus video.mp4 --box 210,300,420,460
    python predict_video.py --weights runs/train_sam2/best.pth frames/ --point 210,350@30 --coco
    python predict_video.py --weights tiny video.mp4 --box 10,20,90,80@0:1 --box 200,20,300,90@0:2
    python predict_video.py --weights tiny JPEGImages/bear --mask Annotations/bear/00000.png@00000 \\
        --eval Annotations

INPUT:   a video that OpenCV opens, or a folder of frames, sorted by the numbers in their names.
Prompts: VALUE@FRAME:OBJECT, in pixels. FRAME is a number in the video, from 0, or a file's name in
         the folder without its ending; left out, the first. OBJECT, 1 to 254, tells objects apart:
         prompts of one id show one object, on any frames, at most one box on each; left out, it is 1.
         In --mask each id is the object of that id (255 none; in a mask of 0 and 255 object 1); with
         :OBJECT all of it is that object. --prompts is a json of all: {"FRAME": [{"boxes": [[x0, y0,
         x1, y1]], "points": [[x, y, label]], "mask": "FILE.png"}, ...]}: on each frame the first
         entry shows object 1, the next 2 ..., or the one of its "object": N; {} skips one. What
         annotate.py writes is such a file; a "class" in it is not used.
Writes:  OUTPUT_DIR/masks/FRAME.png (palette PNG of object ids; where objects overlap, the higher
         logit wins, as in the official predictor), overlay.mp4, areas.csv (pixels of each object in
         masks/; score: probability that the frame shows it) and, with --coco, annotations.json.
An object is tracked from its first prompt to the end and, unless --direction says otherwise, back to
the start. Stopped (Ctrl-C, SIGTERM) and started again on the same folder, it continues. A frame that
cannot be read, in a video file also those after it, is left out and named at the end, with exit
status 2. If a video's size changes, OpenCV stretches the later frames to the first one's, or they
are left out.
Copying: this script, utils.py and the folder nets/; for --coco convert_labels.py, for --eval
train_sam2.py too.
"""
import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import utils
from nets.sam2 import NETS, WEIGHTS, enlarge, resize_images, resize_mask
from nets.weights import load_weights, official_file, state_of

SAVE_EVERY = 100     # frames after which the state is saved, should the process be killed
MP4_BEGINS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # bytes 4 to 7
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
CHUNK_BYTES = 2**27  # of frames kept when a video is read backwards


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0],
                                  "%(prog)s --weights CHECKPOINT INPUT --box X0,Y0,X1,Y1 [options]")
    add, add_switch = parser.add_argument, parser.add_switch
    add("input", metavar="INPUT", help="video file, or folder of frames")
    add("--weights", required=True,
        help="best.pth or last.pth of train_sam2.py; with --model an official file; or its name: "
             f"{', '.join(WEIGHTS)}, fetched once")
    add("--model", choices=list(NETS), help="net of an official file; our checkpoints name theirs")
    add("--image-size", type=utils.number(int, 32), metavar="N",
        help="side of the square that frames are resized to (that of training, official: 1024)")
    add("--output-dir", default="out", help="folder for masks and overlay (%(default)s)")
    add_switch("--overwrite", help="replace files in --output-dir")
    add("--box", type=prompt(utils.numbers(4, 4)), action="append", default=[],
        metavar="X0,Y0,X1,Y1[@FRAME[:OBJECT]]", help="may be repeated, as all prompts")
    add("--point", type=prompt(utils.numbers(2, 3)), action="append", default=[],
        metavar="X,Y[,LABEL][@FRAME[:OBJECT]]",
        help="a click: label 1 object (default), 0 background; it refines the box of its object")
    add("--mask", type=prompt(str), action="append", default=[],
        metavar="FILE.png[@FRAME[:OBJECT]]", help="mask of one or several objects")
    add("--prompts", help="json file of prompts on any frames")
    add("--direction", choices=["both", "forward", "backward"], default="both",
        help="forward from an object's first prompt, backward from its last, or forward and then "
             "from the first back to the start (%(default)s)")
    add("--every", type=utils.number(int, 1), default=1, metavar="N",
        help="use every N-th frame (%(default)s)")
    add_switch("--overlay", default=True, help="write overlay.mp4")
    add("--fps", type=utils.number(float, 0.1, 1000),
        help="frames per second of overlay.mp4 (the video's divided by --every; of a folder 24)")
    add("--coco", nargs="?", const="polygon", choices=["polygon", "rle"], metavar="[polygon|rle]",
        help="also write annotations.json; polygons cannot represent holes")
    add("--eval", metavar="DIR",
        help="print J and F against true masks: DIR/FRAME.png of ids or DIR/OBJECT/FRAME.png; or "
             "DIR/VIDEO that holds them")
    parser.add_device_options()
    return parser


def prompt(parse):
    """Returns the type of VALUE[@FRAME[:OBJECT]]: (value, frame or None, object or None)."""
    def parse_prompt(text):
        value, _, place = text.rpartition("@") if "@" in text else (text, "", "")
        frame, _, object_id = place.partition(":")
        if object_id and not (object_id.isdecimal() and 1 <= int(object_id) <= 254):
            raise argparse.ArgumentTypeError(f"{text}: an object is a number from 1 to 254")
        return parse(value), frame or None, int(object_id) if object_id else None
    return parse_prompt


# --- Frames ---

class Folder:
    """Reads the frames of a folder: names, size (H, W), read(t).

    all_names: also those that --every skips. bad: a line for each file that cannot be used. digest:
    of all frames that can.
    """

    fps = 24.0

    def __init__(self, path, every):
        found, digest = utils.list_images(path), hashlib.sha256()
        self.name, self.size = path.absolute().name, None
        self.names, self.paths, self.bad = [], [], []
        self.all_names = sorted(found, key=by_number)
        for name in utils.until_stopped(self.all_names[::every], "reading"):
            try:
                image = utils.read_image(found[name])
                self.size = self.size or image.shape[:2]
                if image.shape[:2] != self.size:
                    raise utils.InputError(f"{found[name]}: {size_text(image.shape)} pixels, but the "
                                           f"first frame has {size_text(self.size)}")
            except utils.InputError as error:
                self.bad.append(str(error))
                continue
            digest.update(f"{name} {zlib.crc32(image)} ".encode("utf-8", "surrogateescape"))
            self.names.append(name)
            self.paths.append(found[name])
        self.digest = digest.hexdigest()
        if not self.names:
            reason = f"{path}: a folder without images; give one that holds frames"
            raise utils.InputError([*self.bad, reason][0])

    def read(self, t):
        """Returns frame t as RGB uint8 (H, W, 3)."""
        return utils.read_image(self.paths[t])


class VideoFile:
    """Reads the frames of a video file, as Folder; a name is the frame's number in the file.

    All are decoded once at first: the number that a file states may be wrong, and their checksums
    prove later that jumping to a frame has found it, which OpenCV does not promise.
    """

    def __init__(self, path, every):
        check_name(path)
        self.path, self.every, self.paths, self.bad = path, every, [path], []
        self.name, self.checks, self.size, self.kept = path.stem, [], None, {}
        self.open()
        stated = int(self.video.get(cv2.CAP_PROP_FRAME_COUNT))
        rate, times = self.video.get(cv2.CAP_PROP_FPS), []
        grabbed = iter(self.video.grab, False)  # until there is no further frame
        for _ in tqdm(grabbed, "reading", max(stated, 0), leave=False, disable=None):
            utils.raise_if_stopped()
            if self.place % every == 0:
                found, image = self.video.retrieve()
                if not found:
                    self.bad.append(f"{path}: frame {self.place} cannot be decoded; it and those "
                                    "after it are left out")
                    break
                self.size = self.size or image.shape[:2]
                if image.shape[:2] != self.size:
                    self.bad.append(f"{path}: frames from {self.place} on have "
                                    f"{size_text(image.shape)} pixels, but the first has "
                                    f"{size_text(self.size)}; they are left out")
                    break
                self.checks.append(zlib.crc32(image))
            times.append(self.video.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            self.place += 1
        if not self.checks:
            raise utils.InputError(f"{path}: no frame can be read; convert it to mp4 (H.264)")
        if not self.bad and lacks_frames(path, stated, rate, times):
            missing = "the last ones perhaps in part"
            if self.place < stated:
                missing = f"frames {self.place} to {stated - 1} are missing"
            self.bad.append(f"{path}: truncated or damaged: {self.place} of {stated} frames can be read; "
                            f"{missing}")
        self.fps = frame_rate(rate, times) / every
        self.all_names = [f"{number:05d}" for number in range(self.place)]
        self.names = self.all_names[::every]
        self.digest = hashlib.sha256(repr(self.checks).encode()).hexdigest()

    def open(self, place=0):
        """Makes decoding go on at this place, or nearby."""
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is said in one line
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self.video, self.place = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG), place
        if not self.video.isOpened():
            raise utils.InputError(f"{self.path}: OpenCV cannot open it as a video; convert it to "
                                   "mp4 (H.264), or give a folder of frames")
        if place:
            self.video.set(cv2.CAP_PROP_POS_FRAMES, place)

    def read(self, t):
        """Returns frame t as RGB uint8 (H, W, 3).

        Decoding goes forwards only: to go back, a chunk that ends at t is decoded.
        """
        if t in self.kept:
            return self.kept[t]
        first = t
        if self.kept and t < min(self.kept):
            first = max(0, t + 1 - max(1, CHUNK_BYTES // (3 * math.prod(self.size))))
        if not self.place <= first * self.every <= self.place + 100:
            self.open(first * self.every)
        self.kept = self.decode(first, t)
        if t not in self.kept:  # the jump has missed
            self.open()
            self.kept = self.decode(first, t)
        if t not in self.kept:
            raise utils.InputError(f"{self.path}: has changed while it was read; start again")
        return self.kept[t]

    def decode(self, first, last):
        """Returns {t: RGB uint8 (H, W, 3)} of frames first to last, as far as checksums agree."""
        frames = {}
        while self.place <= last * self.every and self.video.grab():
            t, skipped = divmod(self.place, self.every)
            self.place += 1
            if t >= first and not skipped:
                found, image = self.video.retrieve()
                if not found or zlib.crc32(image) != self.checks[t]:
                    break
                frames[t] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return frames


def lacks_frames(path, stated, rate, times):
    """Returns whether a video, decoded to its end, lacks frames; times: of those read, in seconds.

    It does if the file ends too early. MP4 and AVI files count their frames. Of others OpenCV
    multiplies duration and rate: too many if the rate varies or sound goes on after the last frame.
    They lack frames if some cannot be decoded.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    whole = is_whole(path, head)
    if whole is False:
        return True
    if stated - len(times) <= 2:
        return False
    if head[:4] == b"RIFF" or head[4:8] in MP4_BEGINS:
        return True
    packets = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
    undecoded = sum(iter(packets.grab, False)) - len(times)
    if undecoded > 2 or (whole is None and stated / rate - times[-1] > 3 / rate):
        return True
    print(f"note: {path}: {len(times)} frames in {stated / rate:.1f} s, as its rate varies or its sound "
          "is longer")
    return False


def is_whole(path, head):
    """Returns whether a video of these first bytes is as long as it says: MP4, AVI, mkv, webm; else None."""
    place, total = 0, path.stat().st_size
    if head[:4] == b"\x1a\x45\xdf\xa3":
        place = head.find(b"\x18\x53\x80\x67") + 4  # of the segment's size
        if place < 4:
            return None
        width = 9 - head[place].bit_length()  # of the size, in bytes
        size = int.from_bytes(head[place:place + width], "big") - 2**(7 * width)
        if size == 2**(7 * width) - 1:  # a stream, of unknown size
            return None
        return place + width + size <= total
    riff = head[:4] == b"RIFF"
    if not riff and head[4:8] not in MP4_BEGINS:
        return None
    with open(path, "rb") as file:
        while place < total:  # from part to part: RIFF and size, or size and name
            file.seek(place)
            part = file.read(16)
            if riff:
                size = 8 + int.from_bytes(part[4:8], "little")
                known = part[:4] == b"RIFF" and 8 < size < 2**32
            else:
                size = int.from_bytes(part[:4], "big")
                if size == 1:  # a long one
                    size = int.from_bytes(part[8:], "big")
                known = part[4:8] in (*MP4_BEGINS, b"moof", b"sidx", b"uuid", b"meta") and size >= 8
            if not known:  # as long as the file, or what does not belong to it
                return None
            place += size
    return place <= total + 8  # as some leave out the eight bytes of RIFF and size


def frame_rate(stated, times):
    """Returns frames per second: as stated, unless the frames' times in seconds differ; else 24."""
    span = times[-1] - times[0]
    measured = round((len(times) - 1) / span, 2) if span > 0 else 0
    known = 0.1 <= stated <= 1000
    if 0.1 <= measured <= 1000 and not (known and 0.8 < stated / measured < 1.25):
        return measured
    return stated if known else 24.0


class NetFrames:
    """Gives frames as the net takes them, (3, S, S) uint8, read when asked for."""

    def __init__(self, video, side):
        self.video, self.side = video, side

    def __len__(self):
        return len(self.video.names)

    def __getitem__(self, t):
        return resize_images([self.video.read(t)], self.side)[0]


def open_video(args):
    """Returns the frames of INPUT."""
    path = Path(args.input)
    if path.is_dir():
        return Folder(path, args.every)
    if not path.exists():
        raise utils.InputError(f"{path}: no such video or folder")
    if path.suffix.lower() in utils.IMAGES - {".gif"}:
        raise utils.InputError(f"{path}: is an image; give the folder that holds the frames")
    return VideoFile(path, args.every)


def check_name(path):
    """Raises InputError for a name on which OpenCV crashes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise utils.InputError(f"{str(path)!r}: OpenCV takes no name of bytes that are no UTF-8; "
                               "rename it") from None


def extract_frames(source, folder, args):
    """Writes every --rate-th frame of a video into folder, of each in a folder into folder/VIDEO.

    Returns {"frames": how many were written}. InputError at the end, after all other videos, if one
    cannot be read, or not to its end.
    """
    source, folder = Path(source), Path(folder)
    videos = find_video_files(source, folder) if source.is_dir() else {folder: source}
    written, bad = 0, []
    for target, path in videos.items():
        try:
            written += extract_video(path, target, args, skip_whole=source.is_dir())
        except utils.InputError as error:
            bad.append(str(error))
    if bad:
        more = f"; and {len(bad) - 10} more videos" if len(bad) > 10 else ""
        raise utils.InputError("; ".join(bad[:10]) + more)
    return {"frames": written}


def find_video_files(source, folder):
    """Returns {folder/VIDEO: path} of the videos in source, or of those in its folders."""
    for pattern in ("*", "*/*"):
        videos = {}
        for path in sorted(source.glob(pattern)):
            if path.suffix.lower() in VIDEOS and path.name[0] != "." and path.is_file():
                target = (folder / path.relative_to(source)).with_suffix("")
                if target in videos:
                    raise utils.InputError(f"{path}: {videos[target].name} has the same name; rename one")
                videos[target] = path
        if videos:
            return videos
    raise utils.InputError(f"{source}: no videos ({' '.join(sorted(VIDEOS))}); give --extract-frames a "
                           "video, or a folder of videos")


def extract_video(path, folder, args, skip_whole):
    """Writes folder/00000.jpg, 00004.jpg ..., numbers in the video; returns how many.

    A hidden file marks the folder until the last frame is written; then skip_whole skips the video.
    """
    mark, names = folder / f".{path.name}.incomplete", {found.name for found in folder.glob("[!.]*")}
    if names and not mark.exists() and not args.overwrite:
        if skip_whole and names == {f"{args.rate * i:05d}.jpg" for i in range(len(names))}:
            return 0
        raise utils.InputError(f"{folder}: is not empty; give another folder, or --overwrite")
    video = VideoFile(path, args.rate)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for found in [*folder.iterdir()]:  # of an earlier or another video
        if re.fullmatch(r"[0-9]{5,}\.jpg|\..+\.incomplete", found.name) and found != mark:
            found.unlink()
    for t, name in enumerate(utils.until_stopped(video.names, "writing")):
        (folder / f"{name}.jpg").write_bytes(cv2.imencode(".jpg", video.read(t)[..., ::-1])[1])
    print(f"wrote {len(video.names)} of {len(video.all_names)} frames to {folder}")
    if video.bad:
        raise utils.InputError(video.bad[0])
    mark.unlink()
    return len(video.names)


def by_number(name):
    """Returns a sort key by which frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def size_text(size):
    """Returns (H, W ...) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def plain(name):
    """Returns a frame's name, without leading zeros if it is a number."""
    return str(int(name)) if name.isdecimal() and len(name) < 256 else name


def index_frames(names):
    """Returns {name: t} of the frames, and of numbers also without leading zeros."""
    indices = {name: t for t, name in enumerate(names)}
    return {**{plain(name): t for name, t in indices.items()}, **indices}


# --- Prompts ---

def read_entries(args):
    """Yields (source, frame, object id, kind, value) of all prompts; kind None names an object."""
    for kind in ("box", "point", "mask"):
        for value, frame, object_id in getattr(args, kind):
            yield f"--{kind}", frame, object_id, kind, value
    if not args.prompts:
        return
    path = Path(args.prompts)
    try:
        for frame, entries in dict(json.loads(path.read_text(encoding="utf-8-sig"))).items():
            for place, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
                object_id = entry.get("object", place)
                if entry.keys() - {"class", "object", "boxes", "points", "mask"}:
                    raise ValueError(f"frame {frame} has {', '.join(entry)}")
                if type(object_id) is not int or not 1 <= object_id <= 254:  # true, 1.0
                    raise ValueError(f"object {object_id} is no whole number from 1 to 254")
                if "mask" in entry:
                    yield (args.prompts, frame, entry.get("object"), "mask",
                           str(path.parent / entry["mask"]))
                else:
                    yield args.prompts, frame, object_id, None, None
                for x0, y0, x1, y1 in entry.get("boxes", []):
                    yield args.prompts, frame, object_id, "box", [*map(float, (x0, y0, x1, y1))]
                for x, y, *label in entry.get("points", []):
                    yield args.prompts, frame, object_id, "point", [*map(float, (x, y, *label[:1]))]
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        form = '{"FRAME": [{"boxes": [[x0, y0, x1, y1]], "points": [[x, y, label]]}]}'
        raise utils.InputError(f"{args.prompts}: no json of prompts like {form} "
                               f"({error})") from None


def collect_prompts(args, video):
    """Returns {object id: {t: {"box": [...], "point": [[...]], "mask": (H, W) bool}}}, sorted."""
    prompts, names, indices = {}, video.names, index_frames(video.names)
    for source, frame, object_id, kind, value in read_entries(args):
        t = 0 if frame is None else indices.get(frame, indices.get(plain(frame)))
        if t is None:
            raise utils.InputError(f"{source}: frame {frame} is not there; the frames are "
                                   f"{names[0]}, {', '.join(names[1:3])} ... {names[-1]}")
        if kind == "mask" and frame is None and indices.get(plain(Path(value).stem)):
            print(f"note: {source} {value}: taken for the first frame, as no frame is given with "
                  f"@{Path(value).stem}")
        found = {object_id or 1: value}
        if kind == "mask":
            found = split_mask(value, object_id, video.size)
        for object_id, value in found.items():
            by_frame = prompts.setdefault(object_id, {})
            if not kind:
                continue
            given = by_frame.setdefault(t, {})
            where = f"{source}: object {object_id} on frame {names[t]}"
            if kind != "mask":
                check_place(where, value, video.size)
            if kind == "point":
                given.setdefault("point", []).append([*value, 1.0][:3])
            elif kind in given:
                raise utils.InputError(f"{where}: has a second {kind}; number other objects "
                                       f"otherwise, as @{names[t]}:{object_id + 1}")
            else:
                given[kind] = value
            if "mask" in given and len(given) > 1:
                raise utils.InputError(f"{where}: has a mask and a box or points; give one or the "
                                       "other")
    for object_id, by_frame in prompts.items():
        if not by_frame:
            raise utils.InputError(f"{args.prompts}: object {object_id} has no prompt; give it a box, "
                                   "points or a mask on some frame")
    if not prompts:
        raise utils.InputError(f"{args.weights}: needs prompts: give --box X0,Y0,X1,Y1, --point X,Y, "
                               "--mask FILE or --prompts FILE")
    return dict(sorted(prompts.items()))


def check_place(where, value, size):
    """Raises InputError unless a box, or a point with or without label, is in the frame (H, W)."""
    points = np.array([value[:2], value[-2:]] if len(value) == 4 else [value[:2]])
    inside = ((points >= 0) & (points <= size[::-1])).all()
    empty = len(value) == 4 and not (points[0] < points[1]).all()
    if not inside or empty or (len(value) == 3 and value[2] not in (0, 1)):
        text = ",".join(f"{number:g}" for number in value)
        raise utils.InputError(f"{where}: {text} is not in the frame's {size_text(size)} pixels, or "
                               "no box x0,y0,x1,y1 from upper left to lower right, or no label 1 or 0")


def split_mask(path, object_id, size):
    """Returns {id: (H, W) bool} of the objects in a mask file; with object_id all of it is one."""
    mask = utils.read_mask(path)
    if mask.shape != size:
        raise utils.InputError(f"{path}: {size_text(mask.shape)} pixels, but the video has "
                               f"{size_text(size)}; save it at that size")
    ids = mask.astype(int)
    if object_id:
        ids = (ids > 0) * object_id
    elif set(np.unique(ids)) <= {0, 255}:
        ids = ids // 255
    ids[ids == 255] = 0  # void
    found = [int(k) for k in np.unique(ids) if k]
    if not found or not 1 <= found[0] <= found[-1] <= 254:
        raise utils.InputError(f"{path}: shows no object, or an id that is not from 1 to 254")
    return {k: ids == k for k in found}


def as_tensors(given, size, side):
    """Returns a frame's prompts as SAM2.propagate takes them, in pixels of the net's square."""
    if "mask" in given:
        return {"mask_inputs": resize_mask(torch.from_numpy(given["mask"]), side)}
    x0, y0, x1, y1 = given.get("box", [0, 0, 0, 0])
    points = [[x0, y0, 2], [x1, y1, 3]] if "box" in given else []
    points = torch.tensor(points + given.get("point", []))  # as the official code: corners first
    scale = side / torch.tensor([size[1], size[0]])
    return {"point_coords": points[:, :2] * scale, "point_labels": points[:, 2].int()}


# --- Model ---

def create_model(args):
    """Returns the net that --weights holds, on the CPU; sets args.image_size."""
    name = args.model or (args.weights if args.weights in WEIGHTS else None)
    path = official_file(args.weights, WEIGHTS)
    checkpoint = utils.load_checkpoint(path)
    arch = {"model": name, "image_size": 1024}
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        if checkpoint.get("net") != "sam2":
            raise utils.InputError(f"{path}: holds the net {checkpoint.get('net')}; this script "
                                   "tracks with sam2, of train_sam2.py")
        arch.update(checkpoint.get("arch", {}))
        if name not in (None, arch["model"]):
            raise utils.InputError(f"{path}: holds {arch['model']}; leave --model out")
    if not arch["model"]:
        raise utils.InputError(f"{path}: does not say what net it is of; give --model "
                               f"({', '.join(WEIGHTS)})")
    args.image_size = args.image_size or arch["image_size"]
    try:
        model = NETS[arch["model"]](args.image_size, dynamic_multimask_via_stability=True,
                                    binarize_mask_from_pts_for_mem_enc=True)
    except (KeyError, TypeError) as error:
        raise utils.InputError(f"{path}: not a whole checkpoint ({error})") from None
    except ValueError as error:
        raise utils.InputError(f"--image-size: {error}") from None
    load_weights(model, state_of(checkpoint), path)
    return model.eval()


# --- Tracking ---

def digest_of(values):
    """Returns a short text that differs if any tensor, array or value of a nested dict does."""
    digest = hashlib.sha256()
    for key, value in values.items():
        if isinstance(value, dict):
            value = digest_of(value)
        if isinstance(value, (torch.Tensor, np.ndarray)):
            value = zlib.crc32(np.ascontiguousarray(value))
        digest.update(f"{key}: {value}; ".encode())
    return digest.hexdigest()[:16]


def start(folder, settings, video, prompts, args, device):
    """Returns the state that an unfinished run of the same settings has saved, or a new one."""
    path = folder / "unfinished/state.pth"
    if path.exists():
        state = utils.load_checkpoint(path)
        differing = [key for key in settings if state["settings"].get(key) != settings[key]]
        if not differing:
            print(f"continuing the unfinished run in {folder}")
            return to_device(state, device)
        if not args.overwrite:
            raise utils.InputError(f"{folder}: has an unfinished run of other {', '.join(differing)}; "
                                   "give the same to continue it, --overwrite or another "
                                   "--output-dir")
    for found in path.parent.glob("[!.]*"):
        if not re.search(r"\.(pt|pth)(\.\d+\.tmp)?$", found.name):
            raise utils.InputError(f"{found}: is in the folder of an unfinished run, which is removed; move "
                                   "it, or give another --output-dir")
    shutil.rmtree(path.parent, ignore_errors=True)
    (folder / "masks").mkdir(exist_ok=True)
    path.parent.mkdir()
    state = {"settings": settings, "passes": 0, "tracking": {},
             "scores": torch.zeros(len(video.names), len(prompts), device=device)}
    utils.save_checkpoint(path, state)
    return state


def to_device(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def plan_passes(prompts, length, direction):
    """Returns the passes: (backwards, {object: frames whose mask this pass decides})."""
    if direction == "backward":
        return [(True, {k: range(max(by_frame) + 1) for k, by_frame in prompts.items()})]
    first = {k: min(by_frame) for k, by_frame in prompts.items()}
    passes = [(False, {k: range(t, length) for k, t in first.items()})]
    if direction == "both" and any(first.values()):
        passes.append((True, {k: range(t) for k, t in first.items() if t}))
    return passes


@torch.no_grad()
def track(model, video, prompts, state, folder, args):
    """Writes masks/FRAME.png of all frames and state["scores"]; stopped, it can be called again.

    A frame may have objects of both passes: the first then stores their logits for the second.
    """
    frames = NetFrames(video, args.image_size)
    objects, path = [*prompts], folder / "unfinished"
    passes = plan_passes(prompts, len(frames), args.direction)
    for i, (backwards, spans) in [*enumerate(passes)][state["passes"]:]:
        later = passes[-1][1].values() if i < len(passes) - 1 else []
        inputs = [{t: as_tensors(given, video.size, args.image_size)
                   for t, given in prompts[k].items()} for k in spans]
        tracked = model.propagate(
            frames, inputs, track_in_reverse=backwards, state=state["tracking"])
        for t, out in tqdm(tracked, "backward" if backwards else "forward", len(frames), leave=False,
                           disable=None, initial=state["tracking"].get("done", 0)):
            logits, stored = {}, path / f"{video.names[t]}.pt"
            for k, mask, score in zip(spans, out["pred_masks"], out["object_score_logits"]):
                if t in spans[k]:
                    logits[k] = mask
                    state["scores"][t, objects.index(k)] = score.sigmoid()
            if any(t in span for span in later):
                utils.save_checkpoint(stored, logits)
            elif logits or i == 0:  # the first pass writes frames without objects too
                if i and stored.exists():
                    logits |= to_device(utils.load_checkpoint(stored), model.device)
                mask = compose(dict(sorted(logits.items())), video.size, model.device)
                utils.save_mask(folder / f"masks/{video.names[t]}.png", mask)
            if utils.stop_asked() or state["tracking"]["done"] % SAVE_EVERY == 0:
                utils.save_checkpoint(path / "state.pth", state)
            utils.raise_if_stopped()
        state.update(passes=i + 1, tracking={})
        utils.save_checkpoint(path / "state.pth", state)


def compose(logits, size, device):
    """Returns ids (H, W) uint8 of {id: logits (1, h, w)}; where several are above 0, the highest."""
    ids = torch.zeros(size, dtype=torch.uint8, device=device)
    highest = torch.zeros(size, device=device)
    for object_id, low_res in logits.items():
        mask = enlarge(low_res[None].float(), size)[0, 0]
        ids[mask > highest] = object_id
        highest = torch.maximum(highest, mask)
    return ids.cpu().numpy()


# --- Evaluation ---

def find_truth(args, video, train_sam2):
    """Returns {t: [(object id, path), ...]} of frames that --eval has masks of; id 0: a mask of ids."""
    if not args.eval:
        return {}
    folder = Path(args.eval, video.name)
    folder = folder if folder.is_dir() else Path(args.eval)
    if not folder.is_dir():
        raise utils.InputError(f"--eval {folder}: no such folder; give that of true masks")
    masks = train_sam2.find_masks(folder)
    shift = find_shift(masks, folder, video)
    truth, indices = {}, index_frames(video.names)
    for name, found in masks.items():
        if shift and name.isdecimal():
            name = str(int(name) - shift)
        t = indices.get(name, indices.get(plain(name)))
        if t is not None:
            truth.setdefault(t, []).extend(found)
    for found in truth.values():
        for _, path in found:
            if utils.image_size(path)[::-1] != video.size:
                raise utils.InputError(f"{path}: is not of the video's {size_text(video.size)} pixels")
        read_truth(found, train_sam2)  # what cannot be read is said before hours of tracking
    if len(truth) < 3:  # the last is not counted, nor are those with prompts
        raise utils.InputError(f"{folder}: has masks of {len(truth)} of the frames; give --eval "
                               "the folder that holds those of more")
    return truth


def find_shift(names, folder, video):
    """Returns by how much masks are numbered higher than frames: 0, or 1 or -1 if only that fits."""
    masks = {int(name) for name in names if name.isdecimal()}
    frames = {int(name) for name in video.all_names if name.isdecimal()}
    strays = masks - frames
    if not strays or not frames:
        return 0
    shift = min(masks) - min(frames)
    if {number - shift for number in masks} != frames:
        print(f"note: {folder}: {len(strays)} masks are of no frame, such as {min(strays)}")
        return 0
    if abs(shift) > 1:
        raise utils.InputError(f"{folder}: masks {min(masks)} to {max(masks)}, but the frames are "
                               f"{min(frames)} to {max(frames)}; number them alike")
    print(f"note: {folder}: masks are numbered from {min(masks)} and frames from {min(frames)}; the "
          "first mask is taken for the first frame's")
    return shift


def read_truth(masks, train_sam2):
    """Returns ids (H, W) of a frame's [(object id, path), ...]; where objects overlap, the last's."""
    ids = 0
    for object_id, path in masks:
        if object_id == train_sam2.IDS:
            return train_sam2.read_id_mask(path)
        ids = np.where(train_sam2.read_object(path), object_id, ids)
    return ids


def evaluate(video, prompts, truth, folder, train_sam2, args):
    """Prints and returns J and F, in [0, 1], as train_sam2.py and DAVIS define them.

    The last frame with truth is left out, as there, and the frames on which an object was prompted,
    or which the direction does not reach.
    """
    last, found, values = max(truth), set(), {}
    codes = set().union(*(np.unique(read_truth(masks, train_sam2)).tolist() for masks in truth.values()))
    binary = codes <= {0, 255}  # then 255 is the object
    for t, masks in utils.until_stopped(sorted(truth.items()), "evaluating"):
        true = read_truth(masks, train_sam2)
        ids = utils.read_mask(folder / f"masks/{video.names[t]}.png")
        if binary:
            true = true // 255
        void = (true == 255) & (true.itemsize == 1)  # as in train_sam2.py: not in 16-bit masks
        true = np.where(void, 0, true)
        found |= {int(k) for k in np.unique(true) if k}
        for k, by_frame in prompts.items():
            reached = {"forward": t > min(by_frame), "backward": t < max(by_frame), "both": True}
            if reached[args.direction] and t not in by_frame and t != last:
                pair = (ids == k) & ~void, true == k
                j, f = train_sam2.region_similarity(*pair), train_sam2.contour_accuracy(*pair)
                values.setdefault(k, []).append((j, f))
    if others := found ^ prompts.keys():
        print(f"note: objects {', '.join(map(str, sorted(others)))} are in the truth or among the "
              "prompts, not in both; they are left out")
    rows = {f"object {k}": np.mean(values[k], 0) for k in values if k in found}
    if not rows:
        return {}
    rows[video.name] = np.mean([*rows.values()], 0)
    width = max(map(len, rows))
    print(f"  {'':{width}}     J&F       J       F")
    for title, (j, f) in rows.items():
        print(f"  {title:{width}}  {50 * (j + f):6.2f}  {100 * j:6.2f}  {100 * f:6.2f}")
    j, f = rows[video.name]
    return {"jf": float(j + f) / 2, "j": float(j), "f": float(f)}


# --- Main ---

def check_outputs(args, video, truth):
    """Raises InputError if a file must not be written: is read, exists, or is of another video."""
    if args.overlay:
        check_name(args.output_dir)
    folder = Path(args.output_dir)
    masks = [folder / f"masks/{name}.png" for name in video.names]
    sources = [*video.paths, args.weights, args.prompts or "", *(value for value, *_ in args.mask)]
    sources += [path for _, path in itertools.chain(*truth.values())]
    read = {os.stat(path)[1:3] for path in sources if os.path.exists(path)}  # inode and device
    may_exist = args.overwrite or (folder / "unfinished/state.pth").exists()
    for path in filter(Path.exists, [*masks, *(folder / name for name in tables(args))]):
        if os.stat(path)[1:3] in read:
            raise utils.InputError(f"{path}: would be written, and is read; give another "
                                   "--output-dir")
        if not may_exist:
            raise utils.InputError(f"{path}: exists; give --overwrite or another --output-dir")
    others = {*(folder / "masks").glob("*.png")}.difference(masks)
    if others:
        raise utils.InputError(f"{folder}/masks/{min(others).name}: is not of this video; move it "
                               "away, or give another --output-dir")


def tables(args):
    """Returns the files that are written beside the masks."""
    wanted = {"areas.csv": True, "overlay.mp4": args.overlay, "annotations.json": args.coco}
    return [name for name, written in wanted.items() if written]


def write_outputs(video, prompts, state, folder, coco, args):
    """Writes everything but the masks, which it reads frame by frame; coco: the script, or None."""
    rows, images, annotations = [], [], []
    writer = open_overlay(video, folder, args) if args.overlay else None
    scores = state["scores"].tolist()
    for t, name in enumerate(utils.until_stopped(video.names, "writing")):
        ids = utils.read_mask(folder / f"masks/{name}.png")
        for k, score in zip(prompts, scores[t]):
            mask = ids == k
            rows.append([k, name, np.count_nonzero(mask), f"{score:.4f}"])
            if coco and mask.any():
                coco.annotate(annotations, args.coco, t + 1, 1, mask, round(score, 4))
                annotations[-1]["track_id"] = k
        path = video.paths[t].as_posix() if isinstance(video, Folder) else f"{name}.jpg"
        height, width = ids.shape
        images.append({"id": t + 1, "file_name": path, "width": width, "height": height})
        if writer:
            writer.write(np.ascontiguousarray(utils.overlay(video.read(t), ids)[..., ::-1]))
    if writer:
        writer.release()
    path = folder / "areas.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([["object", "frame", "pixels", "score"], *rows])
    if coco:
        coco.write_coco(folder / "annotations.json", images, {1: "object"}, annotations)


def open_overlay(video, folder, args):
    """Returns the writer of overlay.mp4; MPEG-4, as OpenCV's packages have no encoder of H.264."""
    rate = args.fps or video.fps
    for fps in (rate, round(rate)):  # MPEG-4 has no 142.857
        writer = cv2.VideoWriter(str(folder / "overlay.mp4"), cv2.VideoWriter_fourcc(*"mp4v"),
                                 fps, video.size[::-1])
        if writer.isOpened():
            return writer
    raise utils.InputError(f"{folder}/overlay.mp4: OpenCV cannot write it; give --overlay False")


def main(args):
    """Tracks and writes; returns {"frames": how many, "objects": how many} and what --eval found."""
    device = utils.pick_device(args.device)
    dtype, _ = utils.pick_precision(args.amp, device)
    coco = utils.import_script("convert_labels", "--coco") if args.coco else None
    train_sam2 = utils.import_script("train_sam2", "--eval") if args.eval else None
    model = create_model(args)
    video = open_video(args)
    prompts, truth = collect_prompts(args, video), find_truth(args, video, train_sam2)
    folder = Path(args.output_dir)
    check_outputs(args, video, truth)
    settings = {
        "image_size": args.image_size, "every": args.every, "direction": args.direction,
        "amp": str(dtype), "frames": video.digest, "prompts": digest_of(prompts),
        "weights": digest_of(model.state_dict())}
    lock = utils.lock_folder(folder)
    state = start(folder, settings, video, prompts, args, device)
    print(f"{args.input}: {len(video.names)} frames of {size_text(video.size)}, {len(prompts)} "
          f"objects; {device}, {dtype or torch.float32}, at {args.image_size}x{args.image_size}")
    started = time.perf_counter()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            track(model.to(device), video, prompts, state, folder, args)
    except (RuntimeError, MemoryError, cv2.error) as error:
        if not utils.is_out_of_memory(error):
            raise
        raise utils.InputError("out of memory; try --image-size 512, fewer objects at a time, or "
                               "--amp bf16") from None
    seconds = time.perf_counter() - started
    write_outputs(video, prompts, state, folder, coco, args)
    figures = evaluate(video, prompts, truth, folder, train_sam2, args) if truth else {}
    shutil.rmtree(folder / "unfinished")
    lock.close()
    print(f"{len(video.names)} frames tracked in {seconds:.1f} s, peak memory "
          f"{utils.peak_memory_mb(device):.0f} MB: {folder}/{', '.join(['masks/*.png', *tables(args)])}")
    if video.bad:
        message = "; ".join(video.bad[:10])
        if len(video.bad) > 10:
            message += "; and " + ", ".join(line.split(": ")[0] for line in video.bad[10:])
        raise utils.InputError(" ".join(message.splitlines()))
    return {"frames": len(video.names), "objects": len(prompts), **figures}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
