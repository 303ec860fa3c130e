"""Annotations of other tools -> the layouts of the training scripts; masks -> COCO json.

    python convert_labels.py coco annotations.json --images images --to voc --output-dir data
    python convert_labels.py labelme labels --to masks voc npy --classes cat,dog --output-dir data
    python convert_labels.py yolo dataset --to npy --output-dir data
    python convert_labels.py masks data --to coco --output-dir out-coco

Reads:  coco     a json file: polygons, run lengths (compressed or not), crowds
        labelme  a folder of json files: polygons, rectangles, circles, ellipses, masks; shapes of
                 one label and one group_id are one object; __ignore__ is void in voc, no class
        yolo     a folder with labels/*.txt (class x y x y ... in 0..1) and images/; names of the
                 classes in classes.txt or data.yaml, else in --classes
        masks    a folder with images/ and masks/ (0 and 255): each connected part is an object
        dsb      a folder per image, as the 2018 Data Science Bowl has them: ID/images/ID.png and
                 ID/masks/*.png (0 and 255), each mask a nucleus; NAME is ID
Writes: masks    images/NAME.*, masks/0/NAME.png ... (0 and 255; may overlap), masks/classes.txt
        voc      VOCdevkit/VOC2012/: JPEGImages, SegmentationClass, SegmentationObject,
                 ImageSets/Segmentation/train.txt and val.txt, class_names.json
        npy      imgs/NAME.npy, gts/NAME.npy (one number per object)
        coco     annotations.json: polygons, which cannot represent holes, or with --rle run lengths
NAME is the image's path without its ending: sub_a for sub/a.jpg. Images are copied unchanged.
A pixel belongs to a polygon if its centre (0.5, 0.5 for the first) is inside, by the even-odd rule.
An object is the union of its shapes, without what lies outside the image. In voc and npy smaller
objects lie above larger ones. A crowd is part of its class in masks, 255 (void) in voc where no
object is, and left out in npy. Masks fit the image as it is displayed, with EXIF rotation; they are
rotated if the json's width and height are those before it. Whatever cannot be used (a shape without
area, a missing image ...) is counted at the end, and the first two are named.
"""
import base64
import contextlib
import errno
import itertools
import json
import math
import os
import re
import reprlib
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple
from urllib.parse import unquote

import cv2
import numpy as np

import utils

VOID = 255
VOC = "VOCdevkit/VOC2012"
TARGETS = {"masks": ["images", "masks"], "voc": [VOC], "npy": ["imgs", "gts"],
           "coco": ["annotations.json"]}
STORED = {5: np.transpose, 6: np.rot90, 7: lambda mask: np.rot90(mask.T, 2),
          8: lambda mask: np.rot90(mask, -1)}  # EXIF orientation: view of a mask (H, W) before it
IGNORED = "__ignore__"  # LabelMe's name of areas that are neither class nor background
LABELME_POINTS = {  # of LabelMe's and X-AnyLabeling's shapes: how many points they may have
    "rectangle": (2, 4, 5), "oriented_rectangle": (4, 5), "rotation": (4, 5),
    "quadrilateral": (4, 5), "circle": (2,), "ellipse": (2, 3, 4), "mask": (2,)}
BOXES = "boxes of {}, no polygons, left out (predict.py --prompts makes masks of boxes)"
BAD_VALUES = (ValueError, TypeError, LookupError, AttributeError, OverflowError, cv2.error)


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0],
                                  "%(prog)s KIND INPUT --to LAYOUT [LAYOUT ...] [options]")
    add = parser.add_argument
    add("kind", choices=list(READERS), help=f"what INPUT is: {', '.join(READERS)}")
    add("input", metavar="INPUT", help="json file, or folder")
    add("--to", nargs="+", required=True, choices=list(TARGETS),
        help="one or several: masks (for train_unet.py), voc (train_deeplabv3.py), npy "
             "(train_efficientsam.py), coco (json)")
    add("--images", help="folder of the images (that of the json; of yolo and masks INPUT/images)")
    add("--output-dir", default="data", help="folder for the layouts (%(default)s)")
    parser.add_switch("--overwrite", help="replace files in --output-dir")
    add("--classes", type=lambda text: text.split(","), metavar="NAME[,NAME...]",
        help="classes to convert, in this order (all)")
    add("--val", type=utils.number(float, 0, 1), default=0.2, metavar="SHARE",
        help="of voc's images in val.txt, evenly spaced; 0 or 1 writes one list only (%(default)s)")
    parser.add_switch("--rle", help="coco: run lengths, which can represent holes, not polygons")
    add("--limit", type=utils.number(int, 1), metavar="N", help="convert the first N images")
    return parser


# --- Shapes ---

def crop(mask):
    """Returns the window (slices) of what is set in mask (H, W) bool, and that part (h, w)."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    window = np.s_[y:y + height, x:x + width]
    return window, mask[window]


def connected_parts(mask):
    """Yields window and part (h, w) of each connected part (8 neighbours) of mask (H, W) bool."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    for label in range(1, count):
        x, y, width, height, _ = map(int, stats[label])
        window = np.s_[y:y + height, x:x + width]
        yield window, labels[window] == label


def fill(mask, polygon):
    """Sets the pixels of mask (H, W) bool whose centres are in polygon (N, 2), even-odd rule.

    A centre on a left or upper edge is inside, on a right or lower one outside: neighbours share no
    pixel.
    """
    start, end = polygon - 0.5, np.roll(polygon, -1, 0) - 0.5  # now centres are whole numbers
    upward = start[:, 1:] > end[:, 1:]
    (x0, y0), (x1, y1) = np.where(upward, end, start).T, np.where(upward, start, end).T
    first, last = [np.ceil(y).clip(0, mask.shape[0]).astype(int) for y in (y0, y1)]
    edge = np.repeat(np.arange(len(y0)), last - first)  # one entry per row that it crosses
    if not edge.size:
        return
    row = np.arange(len(edge)) + (last - np.cumsum(last - first))[edge]
    x = x0[edge] + (x1 - x0)[edge] * ((row - y0[edge]) / (y1 - y0)[edge])
    column = np.ceil(x).clip(0, mask.shape[1]).astype(int)  # the first pixel right of the crossing
    top, bottom, left, right = row.min(), row.max() + 1, column.min(), column.max()
    crossings = np.zeros((bottom - top, right - left + 1), np.uint8)
    np.bitwise_xor.at(crossings, (row - top, column - left), 1)
    mask[top:bottom, left:right] |= np.bitwise_xor.accumulate(crossings, 1)[:, :-1].view(bool)


def as_polygon(values, least=3):
    """Turns [x, y, x, y ...] or [[x, y] ...] into (N, 2); ValueError if N is below `least`."""
    try:
        points = np.asarray(values if isinstance(values, list) else [], np.float64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{short(values)} are not pairs of numbers x, y") from None
    if len(points) < least or not (np.abs(points) <= 1e9).all():  # not so if NaN
        wanted = "a polygon of three or more" if least == 3 else f"{least} or more"
        raise ValueError(f"{short(values)} is not {wanted} points")
    return points


def draw_coco(shape, mask):
    """Draws a polygon [x, y, x, y ...], or run lengths {"size": [H, W], "counts": ...}."""
    if not isinstance(shape, dict):
        return fill(mask, as_polygon(shape))
    size, counts = [as_number(side) for side in shape["size"]], shape["counts"]
    counts = decode_counts(counts) if isinstance(counts, str) else counts
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError("run lengths that are not whole numbers from 0 on")
    if size != [*mask.shape] or sum(counts) != mask.size:
        raise ValueError(f"run lengths of size {short(size)} with {short(sum(counts))} pixels, but "
                         f"the image is {[*mask.shape]}")
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # down the columns
    mask |= runs.reshape(mask.shape[::-1]).T


def decode_counts(text):
    """Decodes COCO's compressed run lengths to a list of int.

    A character holds five bits, the lowest first, and whether more follow; the highest bit is the
    sign. From the fourth number on it is the difference to the one two before.
    """
    counts, value, shift = [], 0, 0
    for code in text.encode():
        code -= 48
        if not 0 <= code < 64 or shift > 40:
            raise ValueError(f"{text[:60]!r} are no run lengths")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def draw_labelme(shape, mask):
    """Draws a shape of LabelMe or its relatives; ValueError for a line or a point, without area."""
    kind = str(shape.get("shape_type") or "polygon")
    if kind == "polygon":
        return fill(mask, as_polygon(shape["points"]))
    if kind not in LABELME_POINTS:
        raise ValueError(f"a {short(kind)} has no area")
    points = as_polygon(shape["points"], least=2)
    if len(points) not in LABELME_POINTS[kind]:
        raise ValueError(f"a {kind} of {len(points)} points")
    (x0, y0), (x1, y1) = points[:2]
    if kind == "mask":
        return draw_part(round(x0), round(y0), decode_mask(shape["mask"]), mask)
    if kind == "circle":  # its centre and a point on it
        rows, columns = np.ogrid[:mask.shape[0], :mask.shape[1]]
        mask |= np.hypot(columns + 0.5 - x0, rows + 0.5 - y0) <= math.hypot(x1 - x0, y1 - y0)
        return
    if len(points) == 2:  # opposite corners
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    draw = draw_ellipse if kind == "ellipse" else fill
    draw(mask, points)


def decode_mask(text):
    """Returns the mask (h, w) bool of a PNG in base64."""
    try:
        data = np.frombuffer(base64.b64decode(text), np.uint8)
        return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) > 0  # None if it is no image: TypeError
    except (ValueError, TypeError, cv2.error):
        raise ValueError("its mask is not a PNG in base64") from None


def draw_ellipse(mask, points):
    """Draws an ellipse: of three points, which are its centre and an end of each axis, or of four.

    Four are the corners of its box, or the ends of both axes if these are upright.
    """
    if len(points) == 4:
        diagonals = np.abs(points[2:] - points[:2])
        ends = points[1:3] if not diagonals.min(1).any() else (points[1:3] + points[2:]) / 2
        points = np.array([points.mean(0), *ends])
    (ax, ay), (bx, by) = points[1:] - points[0]
    a, b = math.hypot(ax, ay), math.hypot(bx, by)
    if min(a, b) < 1e-3 or abs(ax * bx + ay * by) > 0.05 * a * b:
        raise ValueError("an ellipse whose axes are not at right angles, or without length")
    y, x = np.ogrid[:mask.shape[0], :mask.shape[1]]
    x, y = x + 0.5 - points[0, 0], y + 0.5 - points[0, 1]
    mask |= np.hypot((x * ax + y * ay) / a / a, (x * ay - y * ax) / a / b) <= 1


def draw_yolo(values, mask):
    """Draws a polygon [x, y, x, y ...] in fractions of the image's width and height."""
    if len(values) % 2:
        raise ValueError(f"{len(values)} numbers are no pairs x y; if the last is a confidence, "
                         "save the labels without")
    polygon = as_polygon(values)
    if polygon.min() < -0.1 or polygon.max() > 1.1:
        raise ValueError(f"{short(values)} is not in 0..1")
    fill(mask, polygon * mask.shape[::-1])


def draw_file(path, mask):
    """Draws a mask file of the same size."""
    mask |= utils.read_binary_mask(path)


def draw_part(left, top, part, mask):
    """Sets the pixels of part (h, w) bool, whose corner is at (left, top), that lie in mask."""
    height, width = part.shape
    inside = mask[max(top, 0):max(top + height, 0), max(left, 0):max(left + width, 0)]
    inside |= part[max(-top, 0):, max(-left, 0):][:inside.shape[0], :inside.shape[1]]


# --- Reading ---

class Object(NamedTuple):
    """An object; each of its shapes is a function that draws it on a mask (H, W) bool."""
    name: str  # of its class
    where: str  # its place in the annotations, for messages
    shapes: list  # empty if it has only a box
    crowd: bool = False


class Item(NamedTuple):
    """An image, and a function that returns its Objects."""
    file: str  # relative path
    path: Path | None  # None if there is no such image
    size: tuple  # (width, height) as the annotations say, None where they do not
    load: Callable
    name: str = ""  # in the layouts, if it is not that of the file


def short(value, length=60):
    """Returns any value as one line of printable text."""
    text = str(value) if isinstance(value, (str, Path)) else reprlib.repr(value)
    text = text if len(text) <= length else text[:length] + " ..."
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def reason(error):
    """Returns the error's message, as one line."""
    text = getattr(error, "strerror", None) or str(error)  # OSError's without its number and file
    if isinstance(error, (TypeError, AttributeError)):
        text = f"a value of the wrong type ({text})"
    return short(f"has no {text}" if isinstance(error, KeyError) else text, 120)


@contextlib.contextmanager
def reading(place, remedy="correct it, or export it again"):
    """Turns any error from bad values inside the block into one InputError naming `place`."""
    try:
        yield
    except (*BAD_VALUES, OSError, RecursionError) as error:
        raise utils.InputError(f"{short(place, 200)}: {reason(error)}; {remedy}") from None


def read_text(path):
    with reading(path, "give one file that can be read"):
        data = Path(path).read_bytes()
    with reading(path, "give a file of UTF-8 text"):
        return data.decode("utf-8-sig")


def read_json(path):
    with reading(path, "it must be json: export it again"):
        return json.loads(read_text(path))


def as_number(value):
    """Returns the whole number that a text such as "64" holds; any other value unchanged."""
    is_number = isinstance(value, str) and re.fullmatch("-?(0|[1-9][0-9]*)", value)
    return int(value) if is_number else value


def class_name(value):
    """Returns a class's name as one line of printable text; ValueError if it is empty."""
    name = "" if value is None else short(" ".join(str(value).split()), 100)
    if not name:
        raise ValueError("its class has no name")
    return name


def number_names(names, notes):
    """Returns the names of classes 0, 1, 2 ...; an empty one keeps its id, as "class 1"."""
    numbered = []
    for class_id, name in enumerate(names):
        if not name.strip():
            name = f"class {class_id}"
            notes["classes without a name"].append(name)
        numbered.append(class_name(name))
    return numbered


def parse_lines(text):
    """Returns the lines of a text, without empty ones at its end."""
    return re.split(r"\r\n?|\n", text.rstrip()) if text.strip() else []


def list_files(folder, endings, wanted=None):
    """Returns {path in folder without ending: path}, sorted; hidden files are left out.

    InputError if there are none, or two of one name (of those in `wanted`, if it is given).
    """
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(part[0] == "." for part in relative.parts)
        if path.suffix.lower() not in endings or is_hidden or not path.is_file():
            continue
        name = utils.nfc(relative.with_suffix("").as_posix())
        if name in found and (wanted is None or name in wanted):
            raise utils.InputError(f"{path}: {found[name].name} has the same name; remove one")
        found[name] = path
    if not found:
        raise utils.InputError(f"{folder}: no {' '.join(sorted(endings))} files here; give another folder")
    return found


def check_parts(root, folder):
    """Raises InputError if not root but its parts, as train/ and valid/, have such a folder."""
    parts = sorted(str(path.parent) for path in root.glob(f"*/{folder}") if path.is_dir())
    if parts:
        hint = " (dsb, if each has one image)" if folder == "masks" else ""
        raise utils.InputError(f"{root}: has no {folder}/, but its parts have; convert each on its "
                               f"own{hint}: {', '.join(parts[:3])}{' ...' if parts[3:] else ''}")


def find_image(folder, name):
    """Returns (name, path) of an image in folder; the path is None if it is not there.

    If need be without the folders of another computer, or with %20 and its like decoded.
    """
    name = name.replace("\\", "/")
    for file in (name, unquote(name), name.rsplit("/", 1)[-1], unquote(name).rsplit("/", 1)[-1]):
        if os.path.isfile(Path(folder, file)):
            return file, Path(folder, file)
    return name, None


def read_coco(args, notes):
    """Returns the names of the classes, by id, and the Items of a COCO json."""
    path = Path(args.input)
    content, names, items, objects = read_json(path), {}, {}, {}
    with reading(path, "give COCO's json; for LabelMe's the KIND is labelme"):
        for i, category in enumerate(content["categories"]):
            with reading(f"{path}: categories[{i}]"):
                category_id, name = as_number(category["id"]), class_name(category["name"])
                if names.setdefault(category_id, name) != name:
                    raise ValueError(f"id {short(category_id)} is that of another category too: "
                                     f"{names[category_id]} and {name}")
        for i, image in enumerate(content["images"]):
            with reading(f"{path}: images[{i}]"):
                image_id = as_number(image["id"])
                size = as_number(image.get("width")), as_number(image.get("height"))
                if image_id in items:
                    raise ValueError(f"id {short(image_id)} is that of another image too")
                objects[image_id] = []
                file = find_image(args.images or path.parent, image["file_name"])
                items[image_id] = Item(*file, size, objects[image_id].copy)
        for i, annotation in enumerate(content["annotations"]):
            with reading(f"{path}: annotations[{i}]"):
                image_id = as_number(annotation["image_id"])
                category_id = as_number(annotation["category_id"])
                where = f"annotation {short(annotation.get('id', f'[{i}]'))}"
                if image_id not in items or category_id not in names:
                    notes["annotations of an unknown image or category, left out"].append(where)
                    continue
                shapes = annotation.get("segmentation")
                shapes = shapes if shapes and isinstance(shapes, list) else [shapes]
                has_only_box = annotation.get("bbox") and not any(shapes)
                draws = [] if has_only_box else [partial(draw_coco, shape) for shape in shapes]
                where += f" of {items[image_id].file}"
                is_crowd = as_number(annotation.get("iscrowd")) == 1
                objects[image_id].append(Object(names[category_id], where, draws, is_crowd))
        ids = sorted(names, key=lambda category_id: (isinstance(category_id, str), category_id))
        return [names[category_id] for category_id in ids], [*items.values()]


def read_labelme(args, notes):
    """Returns the names of the classes, sorted, and the Items of LabelMe's json files."""
    files, items, names = list_files(args.input, {".json"}), [], set()
    for key, path in utils.until_stopped(files.items(), "reading"):
        content = load_labelme(path)
        if content is None:
            notes["json files that are not LabelMe's, left out"].append(path)
            continue
        objects, image, size = content
        names |= {obj.name for obj in objects}
        file = (Path(key).parent / image.replace("\\", "/").rsplit("/", 1)[-1]).as_posix()
        found = find_image(args.images, file) if args.images else find_image(path.parent, image)
        items.append(Item(file, found[1], size, lambda path=path: load_labelme(path)[0]))
    if not items:
        raise utils.InputError(f"{path}: has no 'shapes'; give LabelMe's json; for COCO's the KIND is coco")
    used = {item.path.resolve() for item in items if item.path}
    for path in sorted(Path(args.images or args.input).rglob("*")):
        if path.suffix.lower() in utils.IMAGES and path.resolve() not in used:
            notes["images without a json file, left out"].append(path)
    return sorted(names), items


def load_labelme(path):
    """Returns a json file's Objects, its image's file and size; None if it is not LabelMe's."""
    content, objects = read_json(path), {}
    if not isinstance(content, dict) or not {"shapes", "imagePath"} & content.keys():
        return None
    with reading(path, "give LabelMe's json; for COCO's the KIND is coco"):
        for i, shape in enumerate(content["shapes"]):
            with reading(f"{path}: shapes[{i}]"):
                name, group = class_name(shape["label"]), as_number(shape.get("group_id"))
                obj = Object(name, f"shapes[{i}] of {path}", [])
                obj = objects.setdefault(i if group is None else (name, group), obj)
                obj.shapes.append(partial(draw_labelme, shape))
        size = as_number(content.get("imageWidth")), as_number(content.get("imageHeight"))
        return [*objects.values()], "" + content["imagePath"], size  # TypeError if it is no text


def read_yolo(args, notes):
    """Returns the names of the classes, by id, and the Items of a folder of YOLO's txt files."""
    root, names = Path(args.input), []
    for folder in (root, root / "labels", root.parent):
        names = names or read_yolo_names(folder, notes)
    names = names or number_names(args.classes or [], notes)
    if not names:
        raise utils.InputError(f"{root}: no classes.txt or data.yaml that names the classes; give "
                               "--classes the names of 0, 1, 2 ...")
    labels, folder = [root / sub if (root / sub).is_dir() else root for sub in ("labels", "images")]
    labels = list_files(labels, {".txt"})
    images = list_files(args.images or folder, utils.IMAGES, wanted=labels)
    if not labels.keys() & images.keys():
        check_parts(root, "labels")
    for key, path in images.items():
        if key not in labels:
            notes["images without a .txt, left out (an empty one says: no object)"].append(path)
    return names, [Item(key, images.get(key), (None, None), partial(load_yolo, path, names, notes))
                   for key, path in labels.items() if path.name != "classes.txt"]


def read_yolo_names(folder, notes):
    """Returns the names in a folder's classes.txt, data.yaml or other yaml file; [] if none has."""
    yaml_paths = sorted(folder.glob("*.y*ml"), key=lambda path: (path.stem != "data", path))
    for path in [folder / "classes.txt", *yaml_paths]:
        parse = parse_lines if path.suffix == ".txt" else parse_yaml
        if path.is_file():
            with reading(path, "number the names 0, 1, 2 ... or list them: [cat, dog]"):
                names = parse(read_text(path))
            for other in {path, folder / "data.yaml"} if names else ():
                is_yaml = other.suffix != ".txt" and other.is_file()
                if is_yaml and re.search("^[ \t]*kpt_shape", read_text(other), re.M):
                    raise utils.InputError(f"{other}: labels of keypoints (kpt_shape), whose numbers are no "
                                           "polygons; export polygons (segmentation)")
            if names:
                print(f"classes are named by {path}")
                return number_names(names, notes)
    return []


# Patterns of YAML. Each *+ keeps what it has matched, so that no file takes long
GAP = r"(?:[^\S\n]|(?<=\s)#.*)*+"   # spaces and a comment, up to the end of the line
BLANK = r"(?:\s|(?<=\s)#.*)*+"      # the same over any number of lines
DASH = r"-(?!--)"                   # of an entry; --- begins another document
ID = r"""["']?(?P<id>\d+)["']?[ \t]*:"""
QUOTED = r"""'(?:[^']|'')*+'|"(?:[^"\\]|\\.)*+\""""
PLAIN = r"""(?!["'&*!|>%@`])(?:(?!\s#|:\s)LETTER)*?"""  # up to a comment, or a colon and a space


def parse_yaml(text):
    """Returns the names under "names:", a list or a map of ids, in brackets or line by line."""
    start = re.search(rf"""^["']?names["']?[ \t]*:{BLANK}""", text, re.M)
    if not start:
        return []
    position, form = start.end(), text[start.end():start.end() + 1]
    marker = {"[": "", "-": DASH}.get(form, ID)
    if form in ("[", "{"):
        position += 1
        gap, letter, separator, ending = BLANK, r"[^,\[\]{}]", r"(?:,|(?=[\]}]))", r"[\]}]"
    else:  # one per line, up to a line that is neither indented nor begins with a dash
        gap, letter, separator, ending = GAP, ".", r"(?:\n|\Z)", rf"(?:^(?!{DASH})|\Z)"
    name = QUOTED + "|" + PLAIN.replace("LETTER", letter)
    entry = re.compile(f"{BLANK}{marker}{gap}(?P<name>{name}){gap}{separator}")
    ending = re.compile(BLANK + ending, re.M)
    names = []
    while not ending.match(text, position):
        found = entry.match(text, position)
        if not found:
            raise ValueError(f"{short(text[position:].strip(), 40)} is not the name of a class")
        position = found.end()
        class_id = int(found["id"]) if marker == ID else len(names)
        names.append((class_id, unquote_yaml(found["name"].strip())))
    names.sort()
    for expected, (class_id, _) in enumerate(names):
        if class_id != expected:
            raise ValueError(f"class {class_id} where {expected} is due")
    return [name for _, name in names]


def unquote_yaml(name):
    """Returns a name without the quotes of YAML around it, if it has any."""
    if name.startswith("'"):
        return name[1:-1].replace("''", "'")
    return json.loads(name, strict=False) if name.startswith('"') else name


def load_yolo(path, names, notes):
    """Returns the Objects of a txt file."""
    objects = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        word, *values = line.split() or [""]
        where, class_id = f"line {number} of {path}", math.nan
        with contextlib.suppress(ValueError):
            class_id = float(word.replace("_", "x"))  # some tools write 1.0; Python takes 1_0 too
        if class_id.is_integer() and 0 <= class_id < len(names):
            is_box = len(values) in (4, 5)  # a fifth number is a confidence
            draws = [] if is_box else [partial(draw_yolo, values)]
            objects.append(Object(names[int(class_id)], where, draws))
        elif word:
            notes[f"lines without a class of 0 to {len(names) - 1}, left out"].append(f"{where}: {line}")
    return objects


def read_masks(args, notes):
    """Returns the names of the classes and the Items of a folder of masks."""
    root = Path(args.input)
    if not (root / "masks").is_dir():
        check_parts(root, "masks")
        raise utils.InputError(f"{root}: has no masks/; give a folder with images/ and masks/")
    names, layers = find_masks(root / "masks", notes)
    folder, images = args.images or root / "images", {}
    if os.path.isdir(folder):
        images = list_files(folder, utils.IMAGES, wanted={utils.nfc(key) for key in layers})
    items = []
    for key, found in layers.items():
        size = utils.image_size(found[0][1])
        items.append(Item(key, images.pop(utils.nfc(key), None), size, partial(load_masks, found)))
    for path in images.values():
        notes["images without a mask, left out"].append(path)
    return names, items


def find_masks(folder, notes):
    """Returns the names of the classes and {image: [(class, path of its mask)]} of masks/."""
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    folders.sort(key=lambda path: path.name.zfill(9) if path.name.isdigit() else path.name)
    beside = utils.list_images(folder)
    if folders and beside:
        raise utils.InputError(f"{next(iter(beside.values()))}: lies beside class folders; move these masks, "
                               "or the folders, out of masks/")
    folders = folders or [folder]
    names, layers = [class_name(path.name) for path in folders], {}
    if (folder / "classes.txt").is_file():
        names = number_names(parse_lines(read_text(folder / "classes.txt")), notes)
        named = [folder / str(number) for number in range(len(names))]
        for path in sorted({*folders} - {*named, folder}):
            notes["folders that masks/classes.txt does not name, left out"].append(path)
        folders = named
    for name, folder in zip(names, folders):
        for key, path in list_files(folder, utils.IMAGES).items():
            layers.setdefault(key, []).append((name, path))
    return names, layers


def load_masks(layers):
    """Returns the Objects of an image: each connected part of a class."""
    objects, shapes = [], {}
    for name, path in layers:
        mask = utils.read_binary_mask(path)
        shapes[mask.shape] = path
        if len(shapes) > 1:
            raise utils.InputError(f"{' and '.join(map(str, shapes.values()))} differ in size; "
                                   "save them at one size")
        for (rows, columns), part in connected_parts(mask):
            draw = partial(draw_part, columns.start, rows.start, part)
            objects.append(Object(name, path, [draw]))
    return objects


def read_dsb(args, notes):
    """Returns the name of the class and the Items of a folder that holds a folder per image."""
    root, items = Path(args.input), []
    if args.images:
        raise utils.InputError("--images: those of dsb are in INPUT; leave it out")
    folders = {path.parent for sub in ("images", "masks") for path in root.glob(f"*/{sub}")}
    folders = [folder for folder in sorted(folders) if folder.name[0] != "."]
    for folder in utils.until_stopped(folders, "reading"):
        images = []
        if (folder / "images").is_dir():
            images = [*utils.list_images(folder / "images").values()]
        if not (folder / "masks").is_dir():
            notes["images without masks/, left out (an empty one says: no object)"].append(folder)
            continue
        masks = utils.list_images(folder / "masks").values()
        path = images[0] if images else None
        if len(images) > 1:
            raise utils.InputError(f"{images[1]}: a second image beside {path.name}; keep the one "
                                   "that the masks are of")
        size = utils.image_size(path) if path else None
        for mask in masks:
            if path and utils.image_size(mask) != size:
                raise utils.InputError(f"{mask} and {path} differ in size; save them at one size")
        objects = [Object("nucleus", mask, [partial(draw_file, mask)]) for mask in masks]
        file = (path or folder / "images").relative_to(root).as_posix()
        items.append(Item(file, path, (None, None), objects.copy, folder.name))
    if not items:
        raise utils.InputError(f"{root}: no folder in it has images/ and masks/; give one that holds "
                               "a folder per image, as stage1_train")
    return ["nucleus"], items


READERS = {"coco": read_coco, "labelme": read_labelme, "yolo": read_yolo, "masks": read_masks,
           "dsb": read_dsb}


# --- COCO ---

def annotate(annotations, kind, image_id, category, mask, score=None):
    """Appends annotations of mask (H, W) bool: one, or without score one per connected part.

    kind: polygon or rle; None appends nothing.
    """
    for window, part in connected_parts(mask) if score is None else [crop(mask)]:
        if kind and part.size:
            annotate_part(annotations, kind, image_id, category, window, part, mask.shape)
            if score is not None:
                annotations[-1]["score"] = score


def annotate_part(annotations, kind, image_id, category, window, part, size, crowd=False):
    """Appends the annotation of an object, part (h, w) in a window of an image of size (H, W)."""
    top, left = [side.start for side in window]
    if kind == "rle" or crowd:
        segmentation = run_lengths(part, left, top, size)
    else:
        segmentation = polygons(part, left, top)
    annotations.append({
        "id": len(annotations) + 1, "image_id": image_id, "category_id": category,
        "iscrowd": int(crowd), "bbox": [left, top, *part.shape[::-1]], "area": int(part.sum()),
        "segmentation": segmentation})


def polygons(part, left, top):
    """Returns outlines [[x, y, x, y ...]] of part (h, w) along the pixels' edges, without holes."""
    nodes = np.zeros(2 * np.array(part.shape) + 1, np.uint8)  # half a pixel apart
    nodes[1::2, 1::2] = part  # the pixels' centres
    nodes = cv2.dilate(nodes, np.ones((3, 3), np.uint8))  # and their edges
    outlines, _ = cv2.findContours(nodes, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(outline[:, 0] / 2 + (left, top)).ravel().tolist() for outline in outlines]


def run_lengths(part, left, top, size):
    """Returns COCO's run lengths of part (h, w) in an image (H, W): of 0, 1, 0 ... by columns."""
    columns = np.zeros((part.shape[1], size[0]), bool)  # those of the image that part is in
    columns[:, top:top + part.shape[0]] = part.T
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False))
    counts = np.diff(changes + left * size[0], prepend=0, append=size[0] * size[1]).tolist()
    return {"size": [*size], "counts": counts if counts[-1] else counts[:-1]}


def write_coco(path, images, names, annotations):
    """Writes annotations.json; names: {category id: name}."""
    categories = [{"id": category_id, "name": name} for category_id, name in names.items()]
    content = {"images": images, "categories": categories, "annotations": annotations}
    write(Path(path), Path.write_bytes, json.dumps(content).encode())


# --- Writing ---

def draw_objects(item, size, view, classes, notes):
    """Yields objects: (class from 0, -1 for __ignore__; whether it is void; window, part: see crop)."""
    for obj in item.load():
        is_ignored = obj.name == IGNORED
        if obj.name not in classes and not is_ignored:
            notes["objects of other classes, left out"].append(obj.name)
            continue
        mask, errors = np.zeros(size[::-1], bool), []
        for draw in obj.shapes:
            try:
                draw(view(mask))
            except BAD_VALUES as error:
                errors.append(error)
        window, part = crop(mask)
        if not obj.shapes:
            notes[BOXES.format(obj.name)].append(obj.where)
        elif errors:
            notes["objects with shapes that cannot be used"].append(f"{obj.where}: {reason(errors[0])}")
        elif not part.size:
            notes["objects that cover no pixel, left out"].append(obj.where)
        if part.size:
            number = -1 if is_ignored else classes.index(obj.name)
            yield number, obj.crowd or is_ignored, window, part.copy()


def paint(drawn, size):
    """Returns classes and objects from 1, each (H, W) int32; 255 is void; smaller ones on top."""
    label, ids = np.zeros((2, *size[::-1]), np.int32)
    order = sorted((not is_void, -part.sum(), i) for i, (_, is_void, _, part) in enumerate(drawn))
    for *_, i in order:
        number, is_void, window, part = drawn[i]
        label[window][part] = VOID if is_void else number + 1
        ids[window][part] = VOID if is_void else i + 1 + (i + 1 >= VOID)  # no object is 255
    return label, ids


def write(path, save, *values):
    """Makes path's folder and calls save(path, *values); OSError with path if the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, *values)
    except OSError as error:  # PIL's and NumPy's name no file, NumPy's has no errno
        message = error.strerror or "only a part was written"
        raise OSError(error.errno or errno.ENOSPC, message, error.filename or str(path)) from None


def write_masks(out, name, path, drawn, label, num_classes):
    for class_id in range(num_classes):
        mask = np.zeros(label.shape, np.uint8)
        for number, _, window, part in drawn:
            if number == class_id:
                mask[window][part] = 255
        write(out / f"masks/{class_id}/{name}.png", utils.save_image, mask)
    copy_image(path, out / "images" / name)


def write_voc(out, name, path, label, ids, notes):
    write(out / VOC / f"SegmentationClass/{name}.png", utils.save_mask, label)
    file = out / VOC / f"SegmentationObject/{name}.png"
    if ids.max() > VOID:
        write(file, utils.save_image, ids.astype(np.uint16))
        notes["images with more than 254 objects, SegmentationObject as 16-bit PNG"].append(file)
    else:
        write(file, utils.save_mask, ids)
    copy_image(path, out / VOC / "JPEGImages" / name)


def write_npy(out, name, path, ids):
    ids = np.where(ids == VOID, 0, ids)
    write(out / f"gts/{name}.npy", np.save, ids.astype(np.min_scalar_type(ids.max())))
    write(out / f"imgs/{name}.npy", np.save, utils.read_image(path))


def copy_image(path, target):
    """Copies an image to target, with its ending; as PNG if the scripts do not read that ending."""
    if path.suffix.lower() not in utils.IMAGES:
        return write(Path(f"{target}.png"), utils.save_image, utils.read_image(path))
    with reading(path, "replace it"):
        data = path.read_bytes()
    write(Path(f"{target}{path.suffix}"), Path.write_bytes, data)


# --- Main ---

def choose_classes(names, args):
    """Returns the classes to convert, in their order."""
    names = [name for name in names if name not in ("background", "_background_", IGNORED)]
    classes = names
    if args.classes is not None:
        classes = [class_name(name) for name in args.classes if name.strip()]
    classes = [*dict.fromkeys(classes)]
    known = {*names, *itertools.chain(*earlier_classes(args).values())}
    unknown = [name for name in classes if name not in known]
    if unknown and (args.kind != "labelme" or len(unknown) == len(classes)):  # a part may lack some
        known = short(", ".join(names) or "none", 200)
        raise utils.InputError(f"--classes: {', '.join(unknown)}: no class of {args.input}, which "
                               f"has {known}; correct it or leave it out")
    if not classes or ("voc" in args.to and len(classes) >= VOID):
        raise utils.InputError(f"{args.input}: {len(classes)} classes; one is needed, voc can hold "
                               "254: choose with --classes")
    return classes


def find_images(items, args, notes):
    """Returns {name: (item, file, size, view)} of the images that are there, if all fit.

    view: that of a mask on which the objects are drawn, see STORED.
    """
    found, names, paths = {}, set(), set()
    items = sorted(items, key=lambda item: item.file)
    for item in utils.until_stopped(items, "checking"):
        file, size = Path(item.file), item.size
        if item.path:
            file, size = file.with_name(item.path.name), utils.image_size(item.path)
        elif args.kind != "masks" or args.to != ["coco"]:
            notes["images that are not there, left out"].append(item.file)
            continue
        view = find_view(item, size, args, notes)
        if item.path in paths:
            raise utils.InputError(f"{args.input}: two entries of {item.path}; make them one")
        paths |= {item.path} - {None}
        name = output_name(item.name or file.with_suffix("").as_posix())
        while name.casefold() in names:
            name += "_2"
        names.add(name.casefold())
        found[name] = item, file, size, view
        if len(found) == args.limit:
            break
    if not found:
        first = f" (first: {short(items[0].file)})" if items else ""
        raise utils.InputError(f"{args.input}: none of its {len(items)} images is there{first}; "
                               "give their folder with --images")
    return found


def find_view(item, size, args, notes):
    """Returns the view of a mask in which the annotations fit an image of this (width, height)."""
    if all(side in (None, actual) for side, actual in zip(item.size, size)):
        return np.asarray
    if item.size == size[::-1] and item.path.suffix.lower() != ".npy":  # an array has no EXIF
        with utils.open_image(item.path) as image:
            orientation = image.getexif().get(0x0112)
        if orientation in STORED:
            notes["images annotated before EXIF rotation, masks turned"].append(item.file)
            return STORED[orientation]
    annotated = " x ".join(map(short, item.size))
    raise utils.InputError(
        f"{args.input}: {short(item.file)}: width x height is {annotated}, but {item.path} has "
        f"{size[0]} x {size[1]}; give the image that was annotated")


def output_name(path):
    """Returns an image's name in the layouts: a line that reading a list leaves as it is."""
    name = "_".join(part for part in re.split(r"[/\\:]", path) if part.strip(". "))
    name = utils.nfc("".join(letter if letter.isprintable() else "_" for letter in name))
    return name.encode()[-200:].decode(errors="ignore").strip(". ") or "image"


def check_targets(found, classes, args):
    """Raises InputError if what would be written is there, is read from, or names other classes."""
    read = {Path(args.input).resolve(), Path(args.input, "masks").resolve()}
    for item, *_ in found.values():
        if item.path:
            read |= {item.path.parent.resolve(), *item.path.parent.resolve().parents}
    for target in [target for layout in args.to for target in TARGETS[layout]]:
        path = Path(args.output_dir, target)
        if path.resolve() in read:
            raise utils.InputError(f"{path}: would be written, and is read; give another --output-dir")
        if path.exists() and not args.overwrite:
            raise utils.InputError(f"{path}: exists; give --overwrite or another --output-dir")
    for path, earlier in earlier_classes(args).items():
        of_others = {mask.stem for mask in path.parent.glob("*/*.png")} - found.keys()  # they stay
        new = [name for name in classes if name not in earlier]
        wanted = earlier if path.suffix == ".txt" else earlier + new  # a folder has masks of all images
        if of_others and (not earlier or classes != wanted):
            advice = "" if "," in "".join(wanted) or not earlier else f'--classes "{",".join(wanted)}", or '
            raise utils.InputError(f"{path}: the masks already there have other classes, or another order "
                                   f"of them; give {advice}another --output-dir")
    folder = Path(args.output_dir, "masks")
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    numbers = [number for number in numbers if number >= len(classes)]
    if numbers and "masks" in args.to:
        raise utils.InputError(f"{folder}: no class would belong to the folders {short(numbers)}; move "
                               "them away, or give another --output-dir")


def earlier_classes(args):
    """Returns {path: names by id} of the files that an earlier conversion into the same folder left.

    There are no names if it is not a file of ours, with ids from 1 on, or cannot be read.
    """
    found = {path: [] for path in class_files([], args) if path.is_file()}
    for path in found:
        with contextlib.suppress(*BAD_VALUES, OSError, RecursionError):
            text = path.read_bytes().decode("utf-8-sig")
            if path.suffix == ".txt":
                found[path] = number_names(parse_lines(text), defaultdict(list))
                continue
            ids = {name: k for name, k in json.loads(text).items() if name != "background"}
            if sorted(ids.values()) == [*range(1, len(ids) + 1)]:
                found[path] = sorted(ids, key=ids.get)
    return found


def class_files(classes, args):
    """Returns {path: text} of the files that give each class its id."""
    texts, out = {}, Path(args.output_dir)
    if "masks" in args.to:
        texts[out / "masks/classes.txt"] = "".join(f"{name}\n" for name in classes)
    if "voc" in args.to:
        ids = {name: class_id for class_id, name in enumerate(["background", *classes])}
        texts[out / VOC / "class_names.json"] = json.dumps(ids, ensure_ascii=False)
    return texts


def write_lists(out, names, classes, args):
    """Writes the names of the classes and, for voc, of the images."""
    lists = defaultdict(list)
    for i, name in enumerate(names if "voc" in args.to else []):
        part = "val" if math.ceil((i + 1) * args.val) > math.ceil(i * args.val) else "train"
        lists[out / VOC / f"ImageSets/Segmentation/{part}.txt"].append(f"{name}\n")
    texts = {path: "".join(lines) for path, lines in lists.items()}
    for path, text in {**class_files(classes, args), **texts}.items():
        write(path, Path.write_bytes, text.encode())


def main(args):
    """Converts all images; returns {"images": how many, "objects": {class: how many}}."""
    notes, images, annotations = defaultdict(list), [], []
    names, items = READERS[args.kind](args, notes)
    classes = choose_classes(names, args)
    found = find_images(items, args, notes)
    check_targets(found, classes, args)
    out, counts = Path(args.output_dir), Counter(dict.fromkeys(classes, 0))
    for name, (item, file, size, view) in utils.until_stopped(found.items(), "converting"):
        drawn = [*draw_objects(item, size, view, classes, notes)]
        objects = [obj for obj in drawn if obj[0] >= 0]
        counts.update(classes[class_id] for class_id, *_ in objects)
        label, ids = paint(drawn, size)
        if not objects:
            notes["images without an object"].append(file)
        if "masks" in args.to:
            write_masks(out, name, item.path, drawn, label, len(classes))
        if "voc" in args.to:
            write_voc(out, name, item.path, label, ids, notes)
        if "npy" in args.to:
            write_npy(out, name, item.path, ids)
        if "coco" in args.to:
            images.append({"id": len(images) + 1, "file_name": file.as_posix(),
                           "width": size[0], "height": size[1]})
            for class_id, is_crowd, window, part in objects:
                annotate_part(annotations, "rle" if args.rle else "polygon", len(images),
                              class_id + 1, window, part, size[::-1], is_crowd)
    write_lists(out, found, classes, args)
    if "coco" in args.to:
        write_coco(out / "annotations.json", images, dict(enumerate(classes, 1)), annotations)
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{len(found)} images, {counts.total()} objects ({shown}) in {out}")
    for name in classes:
        if not counts[name]:
            notes["classes without an object"].append(name)
    for what, places in notes.items():
        first = "; ".join(short(place, 200) for place in places[:2])
        print(f"note: {what}: {len(places)} ({first}{'; ...' if len(places) > 2 else ''})")
    boxes = [name for name in classes if not counts[name] and BOXES.format(name) in notes]
    if boxes:
        raise utils.InputError(f"{args.input}: {', '.join(boxes)}: has only boxes, no polygons; export "
                               "polygons (segmentation), make masks by predict.py --prompts, or leave "
                               "the class out with --classes")
    if not counts.total():
        raise utils.InputError(f"{args.input}: no object in {len(found)} images; see the notes")
    return {"images": len(found), "objects": dict(counts)}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
