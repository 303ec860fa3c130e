"""Serves a local web page to cut out objects by clicks and boxes: EfficientSAM, SAM or SAM 2.

    python annotate.py --weights runs/train_efficientsam/best.pth images/ --output-dir labels
    python annotate.py --weights vit_b images/ --compare runs/finetune_sam_decoder/best.pth

Prints one URL; open it in a browser. On a server: ssh -L 8000:127.0.0.1:8000, and --port 8000.
Left click: object, right click or shift: background, drag: box, u: undo, enter: next object,
arrows: next or previous image, s: save. --compare shows a second net's masks beside the first's.
Writes OUTPUT_DIR/prompts.json after each click (predict.py --prompts makes the same masks of it) and,
on s and when stopped by Ctrl-C, images and masks of ids in the layout of a training script:
npy     of train_efficientsam.py: imgs/NAME.ext, gts/NAME.png
voc     of finetune_sam_decoder.py --year 2012: VOCdevkit/VOC2012/ with JPEGImages/NAME.ext,
        SegmentationObject/NAME.png, ImageSets/Segmentation/train.txt and val.txt (every fifth)
A later object lies above an earlier one. Started again on the same folder, it continues;
unsaved.json names images whose masks are older than prompts.json.
Copying: this script, predict.py, utils.py and the folder nets/.
"""
import base64
import functools
import hmac
import io
import json
import os
import re
import secrets
import threading
import time
import traceback
from argparse import Namespace
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
LAYOUTS = {"npy": ("imgs", "gts"), "voc": (f"{VOC}/JPEGImages", f"{VOC}/SegmentationObject")}
SCREEN = 1600      # longer side, in pixels, of what the page shows; what is saved is not scaled
MAX_BODY = 65536   # bytes of a request
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
    add("--to", choices=list(LAYOUTS), help="layout to write (npy with EfficientSAM, else voc)")
    add("--port", type=utils.number(int, 0, 65535), default=0, help="of 127.0.0.1 (a free one)")
    parser.add_device_options()
    return parser


# --- Model ---

def load_nets(args):
    """Returns the nets of --weights and --compare."""
    nets = []
    for path, model in ((args.weights, args.model), (args.compare, args.compare_model)):
        if path:
            options = {**vars(args), "weights": path, "model": model, "depth": None}
            nets.append(predict.load_model(Namespace(**options)))
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
    """Holds an image's objects, each a list of prompts in pixels: [x, y, label], [x0, y0, x1, y1].

    The last object is the current one and may be empty; of an object's boxes the last counts. version
    counts the changes: a tab that has not seen the last one changes nothing.
    """

    def __init__(self, name, path, queries):
        self.name, self.path, self.version = name, path, 0
        self.objects = [as_prompts(*query) for query in queries] + [[]]

    def entries(self):
        return as_entries(self.objects)


def as_entries(objects):
    """Returns objects as prompts.json holds them: a dict for each that has prompts."""
    entries = []
    for prompts in objects:
        boxes = [prompt for prompt in prompts if len(prompt) == 4]
        entry = {"boxes": boxes[-1:], "points": [prompt for prompt in prompts if len(prompt) == 3]}
        if prompts:
            entries.append({kind: given for kind, given in entry.items() if given})
    return entries


def as_prompts(points, labels):
    """Returns a query of predict.read_prompts as the prompts of an object."""
    boxes = [[*points[0], *points[1]]] if labels[0] == 2 else []
    return boxes + [[*point, label] for point, label in zip(points, labels) if label < 2]


class Session:
    """Keeps all objects, in memory and on disk. What changes or computes holds `lock`."""

    def __init__(self, args):
        self.args, self.nets, self.lock = args, load_nets(args), threading.Lock()
        self.max_points = min(loaded.net.max_points for loaded in self.nets)
        self.folder = Path(args.output_dir)
        layout = args.to or {"efficient_sam": "npy"}.get(self.nets[0].name, "voc")
        self.images_dir, self.masks_dir = [self.folder / name for name in LAYOUTS[layout]]
        self.folder_lock = utils.lock_folder(self.folder)  # until the process ends
        self.earlier, self.unsaved = self.read_earlier()
        paths = predict.find_inputs(args.images)
        names = predict.name_outputs(paths, ["_mask.png", "_overlay.png"])  # as predict.py has them
        self.items = []
        for name, path in zip(names, paths):
            queries = self.read_queries(name, self.earlier) if name in self.earlier else []
            item = Annotation(name, path, queries)
            self.items.append(item)
            if layout == "voc" and not fits_list(name):
                raise utils.InputError(f"{str(path)!r}: a list of images cannot hold this name; rename "
                                       "the file, or give --to npy")
            mask, copy = self.files(item)
            for file in (mask, copy):
                if name not in self.earlier and file.exists() and not same_file(file, path):
                    raise utils.InputError(f"{file}: exists, and {self.folder}/prompts.json has no "
                                           "objects of it; give another --output-dir")
            if name in self.earlier and not mask.exists():
                self.unsaved.add(name)
        self.read = functools.lru_cache(2)(lambda index: predict.read_image(self.items[index].path))
        self.embed = functools.lru_cache(16)(self.embed)
        self.cut_out = functools.lru_cache(1000)(self.cut_out)

    def read_earlier(self):
        """Returns what an earlier session left: {name: entries}, and the names in unsaved.json."""
        path, unsaved = self.folder / "prompts.json", self.folder / "unsaved.json"
        earlier, names = {}, []
        try:
            if path.exists():
                earlier = json.loads(path.read_text(encoding="utf-8-sig"))
            if unsaved.exists():
                names = json.loads(unsaved.read_text(encoding="utf-8"))
            return dict(earlier), set(names)
        except (ValueError, TypeError, RecursionError) as error:
            raise utils.InputError(f"{path} or {unsaved.name}: cannot be read ({error}); move it "
                                   "away") from None

    def read_queries(self, name, given):
        """Returns an image's entries as predict.predict_queries takes them."""
        path = self.folder / "prompts.json"
        return predict.read_prompts(name, given, Namespace(prompts=path), self.max_points)

    def write_prompts(self):
        """Writes prompts.json, one image per line; those that are not among the images stay in it."""
        entries = {**self.earlier, **{item.name: item.entries() for item in self.items}}
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}"
                 for name, entry in entries.items() if entry]
        replace_text(self.folder / "unsaved.json", json.dumps(sorted(self.unsaved)))
        replace_text(self.folder / "prompts.json", "{\n" + ",\n".join(lines) + "\n}\n")

    def files(self, item):
        """Returns the paths of an image's mask and copy; voc has no arrays."""
        name, ending = item.name, item.path.suffix
        if self.images_dir.name == "JPEGImages" and ending.lower() == ".npy":
            ending = ".png"
        return self.masks_dir / f"{name}.png", self.images_dir / (name + ending)

    @torch.no_grad()
    def save(self, *more):
        """Writes the masks of all images that have changed, and of the indices `more`.

        If one cannot be written the others still are; then its error is raised.
        """
        self.write_prompts()
        failed = None
        for index, item in enumerate(self.items):
            if item.name in self.unsaved or (index in more and item.entries()):
                try:
                    self.write_mask(index)
                    self.unsaved.discard(item.name)
                except (utils.InputError, OSError, RuntimeError, MemoryError) as error:
                    failed = failed or error
        self.write_prompts()
        if self.images_dir.name == "JPEGImages":
            self.write_lists()
        if failed:
            raise failed

    def write_mask(self, index):
        """Writes the mask of ids, by predict.py's own calls, so the same bits, and copies the image."""
        item, loaded = self.items[index], self.nets[0]
        mask_path, copy = self.files(item)
        if not item.entries():
            mask_path.unlink(missing_ok=True)
            if copy.exists() and not same_file(copy, item.path):
                copy.unlink()
            return
        size, embeddings = self.embed(index)
        queries = self.read_queries(item.name, {item.name: item.entries()})
        mask = np.zeros(size, np.uint8)
        parts = predict.predict_queries(loaded, embeddings[0], size, queries)
        for k, (masks, _, best) in enumerate(predict.each_object(parts), 1):
            mask[masks[best]] = k
        for path in (mask_path, copy):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            self.copy_image(index, copy)
        temporary = self.folder / ".mask.png"
        utils.save_mask(temporary, mask)
        os.replace(temporary, mask_path)

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
        """Writes train.txt and val.txt: a name stays in its list, every fifth new one goes to val."""
        folder = self.folder / VOC / "ImageSets/Segmentation"
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.stem for path in self.masks_dir.glob("*.png") if fits_list(path.stem)}
        lists = {"train": [], "val": []}
        for part in lists:
            path = folder / f"{part}.txt"
            if path.exists():
                lines = [line if line in names else line.strip() for line in utils.read_lines(path)]
                lists[part] = [name for name in lines if name in names]
        for name in sorted(names - {*lists["train"], *lists["val"]}):
            count = len(lists["train"]) + len(lists["val"])
            lists["val" if count % 5 == 4 else "train"].append(name)
        for part, listed in lists.items():
            replace_text(folder / f"{part}.txt", "".join(f"{name}\n" for name in listed))

    def embed(self, index):
        """Returns (H, W) of an image and its embedding by each net."""
        image = self.read(index)
        return image.shape[:2], [loaded.net.encode(loaded, image) for loaded in self.nets]

    def cut_out(self, which, index, entry):
        """Returns an object's mask, as bits of the screen's size, and score; entry: its json text."""
        size, embeddings = self.embed(index)
        shown, loaded = screen_size(size), self.nets[which]
        (points, labels), = predict.read_entry(json.loads(entry))
        points = [[x * shown[1] / size[1], y * shown[0] / size[0]] for x, y in points]
        parts = predict.predict_queries(loaded, embeddings[which], shown, [(points, labels)])
        (masks, scores, best), = predict.each_object(parts)
        return np.packbits(masks[best]), scores[best]

    def draw(self, which, index):
        """Returns an image's masks by one net, as the data URL of a PNG, and the last object's score."""
        item, score = self.items[index], None
        ids = np.zeros(screen_size(self.embed(index)[0]), np.uint8)
        for k, entry in enumerate(item.entries(), 1):
            bits, score = self.cut_out(which, index, json.dumps(entry))
            ids[np.unpackbits(bits, count=ids.size).reshape(ids.shape) > 0] = k
        zoom = max(1, 1000 // max(ids.shape))  # or outlines on a small image would be wide
        ids = ids.repeat(zoom, 0).repeat(zoom, 1)
        colours = (utils.palette() * 0.75 + 64).astype(np.uint8)  # as utils.overlay
        pixels = np.dstack([colours[ids], np.where(ids, 100, 0).astype(np.uint8)])
        outline = cv2.erode(ids, np.ones((5, 5), np.uint8)) != ids
        pixels[outline, 3] = 255
        if item.objects[-1]:  # the current object's outline is white
            pixels[outline & (ids == len(item.entries()))] = 255
        return f"data:image/png;base64,{base64.b64encode(encoded(pixels, 'PNG')).decode()}", score

    def photo(self, index):
        """Returns an image as JPEG of the screen's size."""
        image = self.read(index)
        height, width = screen_size(image.shape[:2])
        return encoded(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), "JPEG")

    def state(self, index):
        """Returns all that the page shows of an image, but the image itself."""
        item, (height, width) = self.items[index], self.embed(index)[0]
        masks, scores = zip(*[self.draw(which, index) for which in range(len(self.nets))])
        return {"index": index, "name": item.name, "width": width, "height": height, "masks": masks,
                "scores": scores, "titles": [self.args.weights, self.args.compare],
                "version": item.version, "objects": len(item.entries()), "prompts": item.objects[-1],
                "unsaved": sum(item.name in self.unsaved for item in self.items)}

    def change(self, index, version, action, prompt=None):
        """Adds a prompt, undoes one, or begins the next object; Refused, InputError if it cannot."""
        item = self.items[index]
        if version != item.version:
            raise Refused(409, "changed in another tab; nothing was done, this is how it is now")
        objects = [[*prompts] for prompts in item.objects]
        if action == "add":
            objects[-1].append(prompt)
        elif action == "undo":
            if not objects[-1] and len(objects) > 1:
                objects.pop()
            objects[-1] = objects[-1][:-1]
        elif action == "next" and objects[-1]:
            objects.append([])
        if len(objects[-1]) > MAX_PROMPTS:
            raise Refused(422, f"more than {MAX_PROMPTS} prompts for one object; undo some")
        if entries := as_entries(objects):
            queries, size = self.read_queries(item.name, {item.name: entries}), self.embed(index)[0]
            predict.check_prompts(item.name, queries, size)
        if objects != item.objects:
            item.objects, item.version = objects, item.version + 1
            self.unsaved |= {item.name} if action != "next" else set()
            self.write_prompts()


def screen_size(size):
    """Returns the (H, W) at which the page shows an image of this (H, W)."""
    return tuple(max(1, round(side * min(1, SCREEN / max(size)))) for side in size)


def encoded(pixels, form):
    """Returns pixels (H, W, 3 or 4) uint8 as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, quality=92, compress_level=1)
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
        except ConnectionError:  # the page was closed
            pass
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

    def answer(self, request, session):
        if request == "GET /":
            return self.send_page(session)
        if request == "GET /image":
            return self.send(200, "image/jpeg", session.photo(self.index))
        if request not in ("GET /state", "POST /change", "POST /save"):
            raise Refused(404, "no such page")
        body = self.read_body() if self.command == "POST" else {}
        with session.lock, torch.no_grad():
            if request == "POST /change":
                session.change(self.index, **body)
            elif request == "POST /save":
                session.save(self.index)
            state = session.state(self.index)
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
        except (ValueError, RecursionError, AttributeError, TypeError):
            raise Refused(400, "not the JSON of a change") from None
        if action not in ("add", "undo", "next") and self.path.startswith("/change"):
            raise Refused(400, "action must be add, undo or next")
        if not numbers or len(prompt) not in ((3, 4) if action == "add" else (0,)):
            raise Refused(400, "prompt must be numbers, [x, y, label] or [x0, y0, x1, y1]")
        return {"version": body.get("version"), "action": action, "prompt": prompt}

    def send_page(self, session):
        nonce = secrets.token_urlsafe()
        page = PAGE.replace("NONCE", nonce).replace("COUNT", str(len(session.items)))
        page = page.replace("FIGURES", FIGURE * len(session.nets))
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


def create_server(args):
    """Returns a server on 127.0.0.1 with .url, .key and .session."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise utils.InputError(f"--port {args.port}: {error.strerror}; give another, or "
                               "none") from None
    server.session, server.key = Session(args), secrets.token_urlsafe()
    server.url = f"http://127.0.0.1:{server.server_port}/?key={server.key}"
    return server


# --- Page ---

FIGURE = "<figure><figcaption></figcaption><svg><image/><image/><g></g></svg></figure>"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>annotate</title><link rel="icon" href="data:,">
<style nonce="NONCE">
html, body { height: 100%; margin: 0 }
body { display: flex; flex-direction: column; background: #f3f3f1; color: #333;
       font: 14px/1.5 system-ui, sans-serif }
p, figcaption { margin: 0; min-height: 1.5em; white-space: nowrap; overflow: hidden;
                text-overflow: ellipsis }
p { padding: 6px 14px }
p.error { color: #a3231b }
#keys, figcaption { color: #777 }
#keys { white-space: normal }
main { flex: 1; min-height: 0; display: flex; gap: 14px; padding: 0 14px; user-select: none }
figure { flex: 1; min-width: 0; margin: 0; display: flex; flex-direction: column }
figure:only-child figcaption { display: none }
svg { flex: 1; min-height: 0; width: 100%; cursor: crosshair; touch-action: none }
path, rect { fill: none; stroke: #fff; stroke-width: 2px; stroke-linecap: round;
             vector-effect: non-scaling-stroke }
path { stroke-width: 13px }
path.object { stroke: #2f9e44; stroke-width: 9px }
path.background { stroke: #d6336c; stroke-width: 9px }
</style>
<p id="state"></p><main>FIGURES</main>
<p id="keys">left click: object &ensp; right click or shift: background &ensp; drag: box &ensp;
u: undo &ensp; enter: next object &ensp; &larr; &rarr;: image &ensp; s: save</p>
<script nonce="NONCE">
"use strict"
const key = new URLSearchParams(location.search).get("key"), count = COUNT
const line = document.getElementById("state"), views = [...document.querySelectorAll("svg")]
let index = Math.min(Math.max(parseInt(location.hash.slice(1)) - 1 || 0, 0), count - 1)
let state = null, drag = null, queue = Promise.resolve()

function say(error, ...words) {
  line.textContent = line.title = [`image ${index + 1} of ${count}`, ...words].join(" \\u00b7 ")
  line.className = error ? "error" : ""
}

async function ask(path, body) {
  const form = body && { method: "POST", body: JSON.stringify(body) }
  let reply
  try { reply = await fetch(`${path}?key=${key}&index=${index}`, form) }
  catch { throw Error("no answer; is annotate.py still running?") }
  const content = await reply.json()
  if (!reply.ok) throw Error(content.error)
  return content
}

// Requests go one after the other: each has seen what the one before it left.
function enqueue(step) {
  const asked = index
  queue = queue.then(() => asked === index && step()).catch(error => say(true, error.message))
}

async function load() {
  const asked = index
  state = null
  history.replaceState(null, "", `#${index + 1}`)
  for (const view of views) view.replaceChildren(make("image"), make("image"), make("g"))
  say(false, "reading ...")
  const photo = new Image()
  photo.src = `/image?key=${key}&index=${index}`
  try { await photo.decode() } catch { await ask("/state") }
  for (const view of views) {
    view.setAttribute("viewBox", `0 0 ${photo.width} ${photo.height}`)
    fill(view.children[0], photo.src, photo.width, photo.height)
  }
  say(false, "the net looks at the image ...")
  await new Promise(done => setTimeout(done, 150))  // leafing past it is not slowed
  if (asked !== index) return
  await show(await ask("/state"))
}

function make(name, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  return element
}

function fill(image, href, width, height) {
  for (const [name, value] of Object.entries({ href, width, height, preserveAspectRatio: "none" }))
    image.setAttribute(name, value)
}

async function show(found) {
  if (found.index !== index) return  // an arrow was pressed meanwhile
  for (const href of found.masks) {  // decoded before the old one goes: nothing flickers
    const mask = new Image()
    mask.src = href
    await mask.decode()
  }
  state = found
  const { width, height, objects, prompts } = state
  views.forEach((view, i) => {
    view.setAttribute("viewBox", `0 0 ${width} ${height}`)
    fill(view.children[0], view.children[0].getAttribute("href"), width, height)
    fill(view.children[1], state.masks[i], width, height)
    view.previousSibling.textContent = view.previousSibling.title = state.titles[i]
  })
  mark()
  const clicks = prompts.filter(prompt => prompt.length === 3).length
  const given = clicks < prompts.length ? ["box"] : []
  if (clicks) given.push(`clicks ${clicks}`)
  const scores = state.scores.map(score => score === null ? "" : score.toFixed(2))
  say(false, state.name, `${width} x ${height}`, `object ${objects + !prompts.length}`,
      ...(prompts.length ? [...given, `score ${scores.join(" and ")}`] : ["click it"]),
      state.unsaved ? `${state.unsaved} to save` : "saved")
}

// The prompts of the current object, and the box that is being drawn.
function mark() {
  const boxes = state.prompts.filter(prompt => prompt.length === 4).slice(-1)
  if (drag && drag.to) boxes.push(corners(drag))
  for (const view of views) {
    view.children[2].replaceChildren(...boxes.map(([x, y, x1, y1]) =>
      make("rect", { x, y, width: x1 - x, height: y1 - y })))
    for (const [x, y, label] of state.prompts.filter(prompt => prompt.length === 3))
      for (const kind of ["", label ? "object" : "background"])
        view.children[2].append(make("path", { class: kind, d: `M${x + 0.5} ${y + 0.5}h0` }))
  }
}

function corners({ from, to }) {
  return [Math.min, Math.max].flatMap(pick => from.map((value, i) => pick(value, to[i])))
}

function change(action, prompt) {
  enqueue(async () => {
    if (!state) return
    try { await show(await ask("/change", { version: state.version, action, prompt })) }
    catch (error) { await show(await ask("/state")); throw error }
  })
}

function save() {
  enqueue(async () => {
    say(false, "saving ...")
    await show(await ask("/save", {}))
  })
}

function move(step) {
  index = Math.min(Math.max(index + step, 0), count - 1)
  enqueue(load)
}

// The pixel of the image, counted from 0, under the pointer: the nearest one if it is outside.
function pixel(event, view) {
  const point = new DOMPoint(event.clientX, event.clientY)
  const { x, y } = point.matrixTransform(view.getScreenCTM().inverse())
  const nearest = (value, side) => Math.min(Math.max(Math.floor(value), 0), side - 1)
  const outside = x < 0 || y < 0 || x >= state.width || y >= state.height
  return { outside, at: [nearest(x, state.width), nearest(y, state.height)] }
}

for (const view of views) {
  view.oncontextmenu = event => event.preventDefault()
  view.onpointerdown = event => {
    if (!state || pixel(event, view).outside) return
    view.setPointerCapture(event.pointerId)
    drag = { from: pixel(event, view).at, to: null, x: event.clientX, y: event.clientY }
  }
  view.onpointermove = event => {
    if (!drag || !state || event.buttons !== 1 || event.shiftKey) return
    const far = Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4
    if (far || drag.to) drag.to = pixel(event, view).at
    mark()
  }
  view.onpointerup = event => {
    if (!drag || !state) return
    const label = event.button === 2 || event.shiftKey ? 0 : 1
    change("add", drag.to ? corners(drag) : [...drag.from, label])
    drag = null
  }
}

addEventListener("keydown", event => {
  const actions = { u: () => change("undo"), Enter: () => change("next"), s: save,
                    ArrowRight: () => move(1), ArrowLeft: () => move(-1) }
  if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return
  event.preventDefault()
  actions[event.key]()
})
enqueue(load)
</script>
"""


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
        print(f"objects saved: {objects}, in {session.folder}/prompts.json, {session.masks_dir}/*.png")
        utils.raise_if_stopped()


if __name__ == "__main__":
    utils.run(main, get_args_parser())
