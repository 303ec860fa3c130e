"""Serves a local web page to cut out objects by clicks and boxes: EfficientSAM, SAM or SAM 2.

    python annotate.py --weights runs/train_efficientsam/best.pth images/ --output-dir labels
    python annotate.py --weights vit_b images/ --compare runs/finetune_sam_decoder/best.pth

Prints one URL; open it in a browser. On a server: ssh -L 8000:127.0.0.1:8000, and --port 8000.
Left click: object, right click or shift: background, drag: box, u: undo, enter: next object,
1 to 9: its class, of --classes, arrows: next or previous image, s: save. Wheel: zoom, space or the
middle button and drag: move, 0: all of it. --compare shows a second net's masks beside the first's.
Writes OUTPUT_DIR/prompts.json after each click (predict.py --prompts makes the same masks of it) and,
on s and when stopped by Ctrl-C, images and masks in the layout of a training script:
npy     of train_efficientsam.py: imgs/NAME.ext, gts/NAME.png
voc     of finetune_sam_decoder.py --year 2012: VOCdevkit/VOC2012/ with JPEGImages/NAME.ext,
        SegmentationObject/NAME.png, ImageSets/Segmentation/train.txt and val.txt (one of five); with
        --classes also of train_deeplabv3.py: SegmentationClass/NAME.png, class_names.json
masks   of train_unet.py: images/NAME.ext, masks/0/NAME.png ... of each class; with --classes also
        masks/classes.txt
A later object lies above an earlier one; in masks both are whole. Started again on the same folder,
it continues; unsaved.json names images whose masks, of each layout, are older than prompts.json.
Copying: this script, annotate.html, predict.py, utils.py and the folder nets/.
"""
import argparse
import base64
import functools
import hmac
import io
import json
import os
import re
import secrets
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import cv2
import numpy as np
import torch
from PIL import Image

import predict
import utils
from nets import efficient_sam, sam, sam2

NAMES = [*efficient_sam.WEIGHTS, *sam.WEIGHTS, *sam2.WEIGHTS]  # of official weights
VOC = "VOCdevkit/VOC2012"
LAYOUTS = {"npy": ("imgs", ["gts"]),
           "voc": (f"{VOC}/JPEGImages", [f"{VOC}/SegmentationObject", f"{VOC}/SegmentationClass"]),
           "masks": ("images", [f"masks/{k}" for k in range(9)])}
COLOURS = ["#e0483e", "#3a9c4e", "#3f74d1", "#eaa221", "#9a55c4", "#2fb3b8", "#e47fb5", "#96683a",
           "#85858a"]  # of --classes
SCREEN = 1600      # longer side, in pixels, of what the page shows; what is saved is not scaled
MAX_BODY = 65536   # bytes of a request
ACTIONS = {"add": (3, 4), "class": (1,), "undo": (0,), "next": (0,)}  # lengths of a change's prompt
MAX_PROMPTS = 100  # of one object; boxes that a later one replaced are among them


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0],
                                  "%(prog)s --weights CHECKPOINT IMAGES [IMAGES ...] [options]")
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES",
        help="image, .npy array, folder of them, glob, or .txt list of paths")
    add("--weights", required=True,
        help="a checkpoint of EfficientSAM, SAM or SAM 2, as predict.py takes it, or "
             f"{', '.join(NAMES)}")
    add("--model", choices=NAMES, help="the net of an official file at a path")
    add("--base", help="weights that a SAM decoder was trained on (those its checkpoint names)")
    add("--compare", metavar="CHECKPOINT",
        help="also show the masks of this one; those of --weights are saved")
    add("--compare-model", choices=NAMES, help="the net of an official file --compare")
    add("--output-dir", default="annotations", help="folder for prompts and masks (%(default)s)")
    add("--classes", type=class_names, default=[], metavar="NAME[,NAME...]",
        help="names of up to nine classes, for the keys 1 to 9")
    add("--to", choices=list(LAYOUTS),
        help="layout to write (voc, but npy with EfficientSAM and no --classes)")
    add("--port", type=utils.number(int, 0, 65535), default=0, help="of 127.0.0.1 (a free one)")
    parser.add_device_options()
    return parser


def class_names(text):
    """"cat,dog" -> their list."""
    names = [" ".join(name.split()) for name in text.split(",")]
    if len(names) > len(COLOURS) or "" in names or len({*names, "background"}) <= len(names):
        raise argparse.ArgumentTypeError(f"{text} must be one to nine different names with commas "
                                         "between, none of them background")
    return names


# --- Model ---

def load_nets(args):
    """Returns the nets of --weights and --compare."""
    nets = []
    for path, model in ((args.weights, args.model), (args.compare, args.compare_model)):
        if path:
            options = {**vars(args), "weights": path, "model": model, "depth": None}
            nets.append(predict.load_model(argparse.Namespace(**options)))
            if not nets[-1].net.encode:
                raise utils.InputError(f"{path}: is {nets[-1].name}, which takes no clicks; give a "
                                       "checkpoint of EfficientSAM, SAM or SAM 2")
    if args.compare_model and not args.compare:
        raise utils.InputError("--compare-model: is of --compare; give that too")
    if args.base and not any(loaded.name == "sam" for loaded in nets):
        raise utils.InputError(f"--base: is for SAM; {args.weights} is {nets[0].name}; leave it out")
    return nets


# --- Objects ---

class Refused(Exception):
    """Holds an HTTP status and the line that the page shows."""


class Annotation:
    """Holds an image's objects: each has a class, or None, and prompts in pixels.

    A prompt is [x, y, label] or [x0, y0, x1, y1]; of an object's boxes the last counts. The last
    object is the current one and may be without prompts. version counts the changes: a tab that has
    not seen the last one changes nothing.
    """

    def __init__(self, name, path, queries, first_class):
        self.name, self.path, self.version = name, path, 0
        self.objects = [as_object(*query) for query in queries]
        name = self.objects[-1]["class"] if queries else first_class
        self.objects.append({"class": name, "prompts": []})

    def entries(self):
        return as_entries(self.objects)


def as_entries(objects):
    """Returns objects as prompts.json holds them: a dict for each that has prompts."""
    entries = []
    for obj in objects:
        boxes = [prompt for prompt in obj["prompts"] if len(prompt) == 4]
        points = [prompt for prompt in obj["prompts"] if len(prompt) == 3]
        entry = {"class": obj["class"], "boxes": boxes[-1:], "points": points}
        if obj["prompts"]:
            entries.append({kind: given for kind, given in entry.items() if given})
    return entries


def as_object(points, labels, name):
    """Returns a query of predict.read_prompts as an object."""
    boxes = [[*points[0], *points[1]]] if labels[0] == 2 else []
    clicks = [[*point, label] for point, label in zip(points, labels) if label < 2]
    return {"class": name, "prompts": boxes + clicks}


class Session:
    """Keeps all objects, in memory and on disk. What changes or computes holds `lock`."""

    def __init__(self, args):
        self.args, self.nets, self.lock = args, load_nets(args), threading.Lock()
        self.max_points = min(loaded.net.max_points for loaded in self.nets)
        self.folder = Path(args.output_dir)
        self.classes = args.classes
        default = "npy" if self.nets[0].name == "efficient_sam" and not self.classes else "voc"
        self.layout = args.to or default
        images_dir, mask_dirs = LAYOUTS[self.layout]
        used = {"npy": 1, "voc": 2 if self.classes else 1, "masks": max(1, len(self.classes))}
        self.images_dir = self.folder / images_dir
        self.mask_dirs = [self.folder / name for name in mask_dirs[:used[self.layout]]]
        self.folder_lock = utils.lock_folder(self.folder)  # until the process ends
        self.earlier, self.outdated = self.read_earlier()
        self.unsaved = self.outdated[self.layout]
        self.check_class_file()
        self.check_classes()
        paths = predict.find_inputs(args.images)
        names = predict.name_outputs(paths, ["_mask.png", "_overlay.png"])  # as predict.py has them
        self.page, self.items = read_page(), []
        for name, path in zip(names, paths):
            queries = self.read_queries(name, self.earlier) if name in self.earlier else []
            item = Annotation(name, path, queries, self.classes[0] if self.classes else None)
            self.items.append(item)
            if self.layout == "voc" and not fits_list(name):
                raise utils.InputError(f"{str(path)!r}: a list of images cannot hold this name; rename "
                                       "the file, or give --to npy")
            masks, copy = self.files(item)
            for file in [*masks, copy]:
                ours = name in self.earlier or name in self.unsaved
                if not ours and file.exists() and not same_file(file, path):
                    raise utils.InputError(f"{file}: exists, and {self.folder}/prompts.json has no "
                                           "objects of it; give another --output-dir")
            if name in self.earlier and not all(mask.exists() for mask in masks):
                self.unsaved.add(name)
        self.read = functools.lru_cache(2)(lambda index: utils.read_image(self.items[index].path))
        self.embed = functools.lru_cache(16)(self.embed)
        self.cut_out = functools.lru_cache(600)(self.cut_out)

    def read_earlier(self):
        """Returns what an earlier session left: {name: entries}, and {layout: names} of unsaved.json."""
        path, unsaved = self.folder / "prompts.json", self.folder / "unsaved.json"
        earlier, names = {}, {}
        try:
            if path.exists():
                earlier = json.loads(path.read_text(encoding="utf-8-sig"))
            if unsaved.exists():
                names = json.loads(unsaved.read_text(encoding="utf-8"))
            if isinstance(names, list):  # of an earlier version, which did not know layouts apart
                names = dict.fromkeys(LAYOUTS, names)
            return dict(earlier), {layout: {*names.get(layout, [])} for layout in LAYOUTS}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise utils.InputError(f"{path} or {unsaved.name}: cannot be read ({error}); move it "
                                   "away") from None

    def check_classes(self):
        """Raises InputError if earlier objects, of any image, have other classes than --classes."""
        for name, entries in self.earlier.items():
            for entry in entries if isinstance(entries, list) else [entries]:
                if not isinstance(entry, dict) or not (entry.get("boxes") or entry.get("points")):
                    continue  # no object
                found = entry.get("class") and " ".join(str(entry["class"]).split())  # as predict.py
                if found not in (self.classes or [None]):
                    kind = f"the class {found}" if found else "no class"
                    raise utils.InputError(
                        f"{self.folder}/prompts.json: {name}: an object has {kind}, but --classes "
                        f"names {', '.join(self.classes) or 'none'}; give all of the file's, or "
                        "correct it")

    def class_file(self):
        """Returns the path and the text of the file that gives each class its id; no text: no file."""
        ids = {name: k for k, name in enumerate(["background", *self.classes])}
        texts = {"voc": (f"{VOC}/class_names.json", json.dumps(ids, ensure_ascii=False)),
                 "masks": ("masks/classes.txt", "".join(f"{name}\n" for name in self.classes))}
        name, text = texts.get(self.layout, ("", ""))
        return self.folder / name, text if self.classes else ""

    def check_class_file(self):
        """Raises InputError if earlier masks have other ids than --classes would give."""
        path, text = self.class_file()
        if path.is_file():
            earlier = path.read_text(encoding="utf-8", errors="replace").rstrip("}")
            if not text.startswith(earlier):
                raise utils.InputError(f"{path}: has other classes than --classes, or in another order; "
                                       "give these in this order, new ones last")

    def read_queries(self, name, given):
        """Returns an image's entries as predict.predict_queries takes them."""
        path = self.folder / "prompts.json"
        return predict.read_prompts(name, given, argparse.Namespace(prompts=path), self.max_points)

    def write_prompts(self):
        """Writes prompts.json, one image per line; those that are not among the images stay in it."""
        entries = {**self.earlier, **{item.name: item.entries() for item in self.items}}
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}"
                 for name, entry in entries.items() if entry]
        outdated = {layout: sorted(names) for layout, names in self.outdated.items()}
        replace_text(self.folder / "unsaved.json", json.dumps(outdated))
        replace_text(self.folder / "prompts.json", "{\n" + ",\n".join(lines) + "\n}\n")

    def files(self, item):
        """Returns the paths of an image's masks, and of its copy; only npy has arrays."""
        name, ending = item.name, item.path.suffix
        if self.layout != "npy" and ending.lower() == ".npy":
            ending = ".png"
        return [folder / f"{name}.png" for folder in self.mask_dirs], self.images_dir / (name + ending)

    @torch.no_grad()
    def save(self, *more):
        """Writes the masks of all images that have changed, and of the indices `more`.

        If one cannot be written the others still are; then its error is raised.
        """
        self.unsaved |= {self.items[index].name for index in more if self.items[index].entries()}
        self.write_prompts()
        failed, (path, text) = None, self.class_file()
        if text:
            replace_text(path, text)
        for index, item in enumerate(self.items):
            if item.name in self.unsaved:
                try:
                    self.write_masks(index)
                    self.unsaved.discard(item.name)
                except (utils.InputError, OSError, RuntimeError, MemoryError) as error:
                    failed = failed or error
        self.write_prompts()
        if self.layout == "voc":
            self.write_lists()
        if failed:
            raise failed

    def write_masks(self, index):
        """Writes an image's masks, by predict.py's own calls, so the same bits, and copies the image."""
        item, loaded = self.items[index], self.nets[0]
        paths, copy = self.files(item)
        if not item.entries():
            for path in paths:
                path.unlink(missing_ok=True)
            if copy.exists() and not same_file(copy, item.path):
                copy.unlink()
            return
        size, embeddings = self.embed(index)
        queries = self.read_queries(item.name, {item.name: item.entries()})
        masks = [np.zeros(size, np.uint8) for _ in paths]
        parts = predict.predict_queries(loaded, embeddings[0], size, queries)
        for k, (found, _, best) in enumerate(predict.each_object(parts), 1):
            name = queries[k - 1][2]
            class_id = self.classes.index(name) + 1 if name else 1
            if self.layout == "masks":
                masks[class_id - 1][found[best]] = 255
            else:
                for mask, number in zip(masks, (k, class_id)):
                    mask[found[best]] = number
        for path in (*paths, copy):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            self.copy_image(index, copy)
        temporary = self.folder / ".mask.png"
        for path, mask in zip(paths, masks):
            (utils.save_image if self.layout == "masks" else utils.save_mask)(temporary, mask)
            os.replace(temporary, path)

    def copy_image(self, index, copy):
        """Writes an image to copy, byte by byte or, if the ending differs, pixel by pixel."""
        path, temporary = self.items[index].path, self.folder / f".copy{copy.suffix}"
        if copy.suffix == path.suffix:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise utils.InputError(f"{path}: {error.strerror}; put it back, or undo its "
                                       "objects") from None
            temporary.write_bytes(content)
        else:
            utils.save_image(temporary, self.read(index))
        os.replace(temporary, copy)  # so that it is never half an image

    def write_lists(self):
        """Writes train.txt and val.txt: a name stays in its list, the 2nd, 7th ... goes to val."""
        folder = self.folder / VOC / "ImageSets/Segmentation"
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.stem for path in self.mask_dirs[0].glob("*.png") if fits_list(path.stem)}
        lists = {"train": [], "val": []}
        for part in lists:
            path = folder / f"{part}.txt"
            if path.exists():
                lines = [line if line in names else line.strip() for line in utils.read_lines(path)]
                lists[part] = [name for name in lines if name in names]
        for name in sorted(names - {*lists["train"], *lists["val"]}):
            count = len(lists["train"]) + len(lists["val"])
            lists["val" if len(lists["val"]) < count / 5 else "train"].append(name)
        if not lists["val"] and len(lists["train"]) > 1:  # or no training would take the folder
            lists["val"].append(lists["train"].pop())
        for part, listed in lists.items():
            replace_text(folder / f"{part}.txt", "".join(f"{name}\n" for name in listed))

    def embed(self, index):
        """Returns (H, W) of an image and its embedding by each net."""
        image = self.read(index)
        return image.shape[:2], [loaded.net.encode(loaded, image) for loaded in self.nets]

    def cut_out(self, which, index, entry):
        """Returns the rows and columns of an object, its mask there as bits, and its score.

        entry: the object as json text. The mask has the image's own size, however it is shown.
        """
        size, embeddings = self.embed(index)
        loaded, queries = self.nets[which], predict.read_entry(json.loads(entry))
        small = loaded.net._replace(enlarge=lambda loaded, logits, size: logits)
        (logits, scores, best), = predict.predict_queries(
            loaded._replace(net=small), embeddings[which], size, queries)
        best = best.item()
        logits = loaded.net.enlarge(loaded, logits[:, best:best + 1], size)  # of four only this one
        mask = (logits[0, 0] > 0).cpu().numpy()
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        window = slice(y, y + height), slice(x, x + width)
        return window, np.packbits(mask[window]), scores[0, best].item()

    def draw(self, which, index, part):
        """Returns part of an image's masks by one net, as the data URL of a PNG, and the last score."""
        item, score = self.items[index], None
        entries, colours = item.entries(), utils.tints()  # as utils.overlay
        if self.classes:
            ids = [0] + [self.classes.index(entry["class"]) for entry in entries]
            colours = np.array([[*bytes.fromhex(COLOURS[k].strip("#"))] for k in ids])
        ids = np.zeros(self.embed(index)[0], np.uint8)
        for k, entry in enumerate(entries, 1):
            window, bits, score = self.cut_out(which, index, json.dumps(entry))
            shown = ids[window]
            shown[np.unpackbits(bits, count=shown.size).reshape(shown.shape) > 0] = k
        x0, y0, x1, y1 = part
        height, width = screen_size((y1 - y0, x1 - x0))
        rows = y0 + (np.arange(height) + 0.5) * (y1 - y0) / height
        columns = x0 + (np.arange(width) + 0.5) * (x1 - x0) / width
        ids = ids[np.ix_(rows.astype(int), columns.astype(int))]
        zoom = max(1, 1000 // max(ids.shape))  # or outlines on a small part would be wide
        ids = ids.repeat(zoom, 0).repeat(zoom, 1)
        colours = colours.astype(np.uint8)
        pixels = np.dstack([colours[ids], np.where(ids, 100, 0).astype(np.uint8)])
        outline = cv2.erode(ids, np.ones((5, 5), np.uint8)) != ids
        pixels[outline, 3] = 255
        if item.objects[-1]["prompts"]:  # the current object's outline is white
            pixels[outline & (ids == len(entries))] = 255
        return f"data:image/png;base64,{base64.b64encode(encoded(pixels, 'PNG')).decode()}", score

    def photo(self, index, text):
        """Returns part of an image as JPEG, at its own resolution or, if larger, the screen's."""
        image = self.read(index)
        x0, y0, x1, y1 = read_part(text, image.shape)
        height, width = screen_size((y1 - y0, x1 - x0))
        shown = cv2.resize(image[y0:y1, x0:x1], (width, height), interpolation=cv2.INTER_AREA)
        return encoded(shown, "JPEG")

    def state(self, index, text):
        """Returns all that the page shows of an image, but the image itself."""
        item, (height, width) = self.items[index], self.embed(index)[0]
        part = read_part(text, (height, width))
        masks, scores = zip(*[self.draw(which, index, part) for which in range(len(self.nets))])
        current = item.objects[-1]
        return {"index": index, "name": item.name, "width": width, "height": height, "masks": masks,
                "part": part, "scores": scores, "titles": [self.args.weights, self.args.compare],
                "version": item.version, "objects": len(item.entries()), "class": current["class"],
                "prompts": current["prompts"], "classes": [*zip(COLOURS, self.classes)],
                "unsaved": sum(item.name in self.unsaved for item in self.items)}

    def change(self, index, version, action, prompt=None):
        """Adds a prompt, undoes one, sets the class or begins the next object; Refused if it cannot."""
        item = self.items[index]
        if version != item.version:
            raise Refused(409, "changed in another tab; nothing was done, this is how it is now")
        objects = [{**obj, "prompts": [*obj["prompts"]]} for obj in item.objects]
        if action == "add":
            objects[-1]["prompts"].append(prompt)
        elif action == "class":
            if prompt[0] not in range(1, len(self.classes) + 1):
                raise Refused(422, f"no class {prompt[0]}: --classes names {len(self.classes)}")
            objects[-1]["class"] = self.classes[int(prompt[0]) - 1]
        elif action == "undo":
            if not objects[-1]["prompts"] and len(objects) > 1:
                objects.pop()
            objects[-1]["prompts"] = objects[-1]["prompts"][:-1]
        elif action == "next" and objects[-1]["prompts"]:
            objects.append({"class": objects[-1]["class"], "prompts": []})
        if len(objects[-1]["prompts"]) > MAX_PROMPTS:
            raise Refused(422, f"more than {MAX_PROMPTS} prompts for one object; undo some")
        if entries := as_entries(objects):
            queries, size = self.read_queries(item.name, {item.name: entries}), self.embed(index)[0]
            predict.check_prompts(item.name, queries, size)
        if objects != item.objects:
            if entries != item.entries():
                for names in self.outdated.values():
                    names.add(item.name)
            item.objects, item.version = objects, item.version + 1
            self.write_prompts()


def read_part(text, shape):
    """"x0,y0,x1,y1" -> the four, a part of an image of this shape (H, W, ...); of "" all of it."""
    if not text:
        return 0, 0, shape[1], shape[0]
    if re.fullmatch("[0-9]{1,7}(,[0-9]{1,7}){3}", text):
        x0, y0, x1, y1 = map(int, text.split(","))
        if x0 < x1 <= shape[1] and y0 < y1 <= shape[0]:
            return x0, y0, x1, y1
    raise Refused(422, "part must be x0,y0,x1,y1 within the image")


def read_page():
    path = Path(__file__).with_name("annotate.html")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise utils.InputError(f"{path}: {error.strerror}; copy it with annotate.py") from None


def screen_size(size):
    """Returns the (H, W) at which the page shows an image of this (H, W)."""
    return tuple(max(1, round(side * min(1, SCREEN / max(size)))) for side in size)


def encoded(pixels, form):
    """Returns pixels (H, W, 3 or 4) uint8 as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, quality=92, subsampling=0, compress_level=1)
    return file.getvalue()


def same_file(path, other):
    return other.exists() and path.samefile(other)


def fits_list(name):
    """Returns whether a line of train.txt is read as this name, and the name is not a hidden file's."""
    marks = (".", "\ufeff", "\udcff\udcfe", "\udcfe\udcff")  # the last three are byte order marks
    return not ("\n" in name or "\r" in name or name.isspace() or name.startswith(marks))


def replace_text(path, text):
    """Writes a file so that it is always the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- Server ---

class Handler(BaseHTTPRequestHandler):
    """Answers those who know the key: the page, images by their index, and what the page posts."""
    timeout = 30  # seconds until a request must have arrived

    def do_GET(self):
        """Answers; whatever goes wrong is one JSON line to the page, a traceback only on stderr."""
        try:
            path, _, query = self.path.partition("?")
            self.check_caller(parse_qs(query))
            self.answer(f"{self.command} {path}", self.server.session)
        except Refused as error:
            self.send_error(*error.args)
        except utils.InputError as error:
            self.send_error(422, str(error))
        except ConnectionError:  # the page was closed; Server.handle_error ends it
            raise
        except Exception as error:
            traceback.print_exc()
            line = f"{type(error).__name__} in annotate.py, its terminal says more"
            if isinstance(error, OSError):
                line = f"{error.filename or 'output'}: {error.strerror}"
            elif utils.is_out_of_memory(error):
                line = "out of memory; start annotate.py with --amp bf16"
            self.send_error(500, f"{line}; all prompts are still there")

    do_POST = do_GET

    def check_caller(self, query):
        """Raises Refused without the key, or for another host's name, which would be DNS rebinding."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", hosts[0]):
            raise Refused(403, "wrong host")
        key = query.get("key", [""])[0].encode("utf-8", "replace")
        if not hmac.compare_digest(key, self.server.key.encode()):
            raise Refused(403, "wrong key; open the URL that annotate.py printed")
        text = query.get("index", ["0"])[0]
        self.index = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
        if not 0 <= self.index < len(self.server.session.items):
            raise Refused(404, "no image of this index")
        self.part = query.get("part", [""])[0]

    def answer(self, request, session):
        if request == "GET /":
            return self.send_page(session)
        if request == "GET /image":
            return self.send(200, "image/jpeg", session.photo(self.index, self.part))
        if request not in ("GET /state", "POST /change", "POST /save"):
            raise Refused(404, "no such page")
        body = self.read_body() if self.command == "POST" else {}
        with session.lock, torch.no_grad():
            if request == "POST /change":
                session.change(self.index, **body)
            elif request == "POST /save":
                session.save(self.index)
            state = session.state(self.index, self.part)
        self.send_json(200, state)

    def read_body(self):
        """Returns {"version": ..., "action": ..., "prompt": ...}; Refused if it is anything else."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,20}", length):
            raise Refused(411, "a body needs its Content-Length")
        if int(length) > MAX_BODY:
            raise Refused(413, f"body of more than {MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
            prompt, action = body.get("prompt", []), body.get("action")
            numbers = all(type(value) in (int, float) and abs(value) < 1e9 for value in prompt)
            lengths = ACTIONS.get(action, ())
        except (ValueError, RecursionError, AttributeError, TypeError):
            raise Refused(400, "not the JSON of a change") from None
        if self.path.startswith("/change") and not lengths:
            raise Refused(400, f"action must be one of {', '.join(ACTIONS)}")
        if not numbers or len(prompt) not in (lengths or (0,)):
            raise Refused(400, "prompt must be numbers, [x, y, label], [x0, y0, x1, y1] or [class]")
        return {"version": body.get("version"), "action": action, "prompt": prompt}

    def send_page(self, session):
        nonce = secrets.token_urlsafe()
        page = session.page.replace("NONCE", nonce).replace("COUNT", str(len(session.items)))
        page = page.replace("NETS", str(len(session.nets)))
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                  "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                  "frame-ancestors 'none'")
        self.send(200, "text/html; charset=utf-8", page.encode(), policy)

    def send_error(self, code, message=None, explain=None):
        """Sends one JSON line, for http.server's own errors too, in place of its HTML."""
        self.send_json(code, {"error": " ".join(str(message or "error").split())})

    def send_json(self, code, content):
        self.send(code, "application/json", json.dumps(content).encode() + b"\n")

    def send(self, code, kind, content, policy="default-src 'none'; frame-ancestors 'none'"):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(content),
                            "Content-Security-Policy": policy, "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Prints no line per request: it would hold the key."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait; of Python's 5 Linux resets some of 20 at once

    def handle_error(self, *args):
        """Prints a traceback, but not for a page that was closed before its answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*args)


def create_server(args):
    """Returns a server on 127.0.0.1 with .url, .key and .session."""
    try:
        server = Server(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise utils.InputError(f"--port {args.port}: {error.strerror}; give another, or "
                               "none") from None
    server.session, server.key = Session(args), secrets.token_urlsafe()
    server.url = f"http://127.0.0.1:{server.server_port}/?key={server.key}"
    return server


# --- Main ---

def main(args):
    """Serves the page until SIGINT or SIGTERM, then saves."""
    server = create_server(args)
    session = server.session
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{len(session.items)} images, {', '.join(loaded.name for loaded in session.nets)} on "
          f"{session.nets[0].device}; Ctrl-C saves and ends. Open in a browser:\n{server.url}")
    while not utils.stop_asked():
        time.sleep(0.1)
    server.shutdown()
    with session.lock:
        session.save()
        objects = sum(len(item.entries()) for item in session.items)
        print(f"objects saved: {objects}, in {session.folder}/prompts.json, {session.mask_dirs[0]}/*.png")
        utils.raise_if_stopped()


if __name__ == "__main__":
    utils.run(main, get_args_parser())
