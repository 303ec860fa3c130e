"""Good files of each kind, mutated: one line that names the file, or the right result; no traceback, no hang."""
import contextlib
import io
import json
import os
import shutil
import signal
import struct
import tempfile
import zlib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import demo_data
import predict
import utils
from test_annotate import save_net
from test_convert_labels import VALUES, mutate
from test_predict import noise, save_unet
from test_predict_video import write_video
from test_resume import SMALL

SIZE = 40, 56  # height and width of the images that predict.py is given
LIMIT = 300  # seconds that a run may take, on a busy machine
VOC = "VOCdevkit/VOC2012"
LISTS = f"{VOC}/ImageSets/Segmentation"
SOURCES = {  # kind: scripts, and the files of theirs that are mutated
    "images": [("train_unet", "images/cell_0001.png"), ("train_deeplabv3", f"{VOC}/JPEGImages/scene_0001.jpg"),
               ("predict", "a.png"), ("train_sam2", "JPEGImages/clip_0001/00001.jpg"), ("predict", "a.jpg"),
               ("finetune_sam_decoder", f"{VOC}/JPEGImages/blob_0001.jpg"), ("predict", "a.bmp"), ("predict", "a.tif"),
               ("predict", "a.webp"), ("predict", "a.gif")],
    "masks": [("train_unet", "masks/0/cell_0001.png"), ("train_deeplabv3", f"{VOC}/SegmentationClass/scene_0001.png"),
              ("finetune_sam_decoder", f"{VOC}/SegmentationObject/blob_0001.png"),
              ("train_sam2", "Annotations/clip_0001/00001.png")],
    "arrays": [("train_efficientsam", "imgs/object_0001.npy"), ("train_efficientsam", "gts/object_0001.npy"),
               ("predict", "a.npy")],
    "lists": [("train_deeplabv3", f"{LISTS}/train.txt"), ("finetune_sam_decoder", f"{LISTS}/train.txt"),
              ("train_sam2", "ImageSets/val.txt"), ("predict", "list.txt")],
    "json": [("train_unet", "split.json"), ("train_deeplabv3", f"{VOC}/class_names.json"), ("train_sam2", "sa_1.json"),
             ("predict", "prompts.json"), ("predict_video", "video.json")],
    "videos": [("predict_video", "clip.avi"), ("train_sam2", "clip.avi"), ("predict_video", "clip.mp4")],
    "checkpoints": [("predict", "net.pth"), ("train_efficientsam", "net.pth"), ("predict_video", "net.pth"),
                    ("train_unet", "net.pth"), ("train_deeplabv3", "net.pth"), ("finetune_sam_decoder", "net.pth"),
                    ("pretrain_sami", "net.pth"), ("train_sam2", "net.pth")],
}


# --- What is good ---

@cache
def good(script, file):
    """Returns the folder of a script's good data, with the file in it, and what the script makes of it."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["MUTATIONS"]), "data")
    if script.startswith("predict") or file.startswith(("clip", "sa_")):
        net = "unet" if script == "predict" else "sam2"
        net = "efficient_sam" if file == "prompts.json" else net
        write_small(folder, file, net)
    else:
        demo_data.write(SMALL[script][0], folder, 5)
        names = [f"cell_{i:04d}" for i in range(5)]
        (folder / "split.json").write_text(json.dumps({"train": names[1:], "val": names[:1]}))
        if file == "net.pth":
            train = ["--epochs", "1", "-b", "4", "--output-dir", str(folder.parent / "run")]
            call(script, folder, train)
            shutil.copy(folder.parent / "run/best.pth", folder / file)
    return folder, outcome(script, file, folder)


def write_small(folder, file, net):
    """Writes two images, lists, prompts and a net for predict.py, or a clip; or images of SA-1B."""
    folder.mkdir()
    if file.startswith("sa_"):
        for k in range(1, 6):
            image, ids = demo_data.draw_object_ids(k)
            utils.save_image(folder / f"sa_{k}.jpg", image)
            codes = [run_lengths(ids == i) for i in range(1, ids.max() + 1)]
            (folder / f"sa_{k}.json").write_text(json.dumps(
                {"image": {"image_id": k}, "annotations": [{"id": 3, "segmentation": code} for code in codes]}))
        return
    form = Path(file).suffix if file.startswith("a.") else ".png"
    for k, name in enumerate(("a", "b")):
        path = folder / f"{name}{form if name == 'a' else '.png'}"
        np.save(path, noise(*SIZE, k)) if form == ".npy" and name == "a" else utils.save_image(path, noise(*SIZE, k))
    (folder / "list.txt").write_text(f"a{form}\nb.png\n")
    prompts = {"a": [{"boxes": [[5, 4, 30, 25]], "points": [[12, 9, 1]]}], "b": {"points": [[20, 20, 1], [3, 4, 0]]}}
    save_unet(folder / "net.pth") if net == "unet" else save_net(folder / "net.pth", net, 1)
    if net == "sam2":
        images = demo_data.draw_clip(1, 64, 8)[0]
        for suffix, codec in (("avi", "MJPG"), ("mp4", "mp4v")):
            write_video(folder / f"clip.{suffix}", images, codec)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "video.json").write_text(json.dumps({"0": prompts["a"]}))


def run_lengths(mask):
    """COCO's run-length code, not compressed."""
    flat = mask.T.flatten()
    ends = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))
    return {"size": [*mask.shape], "counts": np.diff(ends, prepend=0).tolist()}


# --- What a script makes of it ---

class TooLong(Exception):
    """LIMIT seconds are over."""


def too_long(*_):
    raise TooLong


def call(script, folder, more):
    """Calls main; returns its figures, what it prints without notes and files, and the images it draws."""
    module, rows, printed = import_module(script), [], io.StringIO()
    words = [f"--data-path={folder}", "-j0", *SMALL[script][2].split()] if script in SMALL else []
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(utils, "save_panel", lambda path, images, *_: rows.append(images))
            figures = module.main(module.get_args_parser().parse_args([*words, "--device", "cpu", *map(str, more)]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    lines = [line for line in printed.getvalue().splitlines()
             if str(folder.parent) not in line and "note: " not in line]
    return figures, lines, rows


def outcome(script, file, folder):
    """Returns what the script makes of the data, or the InputError."""
    out = Path(tempfile.mkdtemp(dir=folder.parent))
    more = {"split.json": ["--split", folder / file], "net.pth": ["--test-only", "--weights", folder / file],
            "ImageSets/val.txt": ["--val-set", "val"]}.get(file, [])
    try:
        if script in SMALL and not file.startswith("clip"):
            more = [*more, "--output-dir", out / "run"]
            if file == "net.pth":
                return call(script, folder, more)[0]
            return call(script, folder, [*more, "--sanity-check"])
        if script in SMALL:
            video = next(folder.glob("clip.*"))
            call(script, folder, ["--extract-frames", video, out / "run", "--rate", 1])
            return [path.read_bytes() for path in sorted((out / "run").glob("*.jpg"))]
        if script == "predict_video":
            video = folder / (file if file.startswith("clip") else "clip.avi")
            video = video if video.exists() else folder / "frames"
            more = [video, "--overlay", "False", "--prompts", folder / "video.json"]
        elif file == "list.txt":
            more = [folder / file]
        else:
            more = sorted(path for path in folder.glob("[ab].*"))
            more += ["--prompts", folder / file] if file == "prompts.json" else []
        call(script, folder, [*more, "--weights", folder / "net.pth", "--output-dir", out])
        return {path.stem: utils.read_mask(path) for path in sorted(out.rglob("*.png")) if "overlay" not in path.name}
    except utils.InputError as error:
        return error


def same(one, other):
    """Whether nested dicts, lists and arrays are equal, nan to nan."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return np.array_equal(one, other, equal_nan=isinstance(one, float))


# --- What the mutated file holds ---

def read(path):
    """Returns a file's content, read without our code; None if it has none."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".txt":
            return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        if path.suffix == ".json":
            return json.loads(path.read_text("utf-8-sig"))
        if path.suffix in (".avi", ".mp4"):
            video, frames = cv2.VideoCapture(str(path)), []
            while (got := video.read())[0]:
                frames.append(got[1])
            return frames or None
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, RecursionError, struct.error, zlib.error, MemoryError):
        return None


def write_plainly(path, content):
    """Writes the content as a good file in place of the mutated one."""
    path.unlink()
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{line.strip()}\n" for line in content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix in (".avi", ".mp4"):
        (path.parent / "frames").mkdir()
        for t, frame in enumerate(content):
            cv2.imwrite(str(path.parent / f"frames/{t:05d}.png"), frame)
    else:
        utils.save_image(path.with_suffix(".png"), content)


# --- Mutations: each writes the file and returns what is right beside a refusal ---
# SAME: what the good file gives; VALID: what the content gives, plainly written; REFUSED: nothing

SAME, VALID, REFUSED, ANY = "same", "valid", "refused", "any"


def change_bytes(path, rng):
    """Cuts, flips, zeroes, appends to or empties a file."""
    data = bytearray(path.read_bytes())
    how, place = rng.choice(["cut", "cut", "flip", "flip", "zero", "zero", "tail", "empty"]), rng.integers(len(data))
    if how == "flip":  # in the head, where the sizes are, as often as elsewhere
        for spot in rng.integers(0, rng.choice([min(120, len(data)), len(data)]), rng.integers(1, 5)):
            data[spot] ^= 1 << rng.integers(8)
    elif how == "zero":
        data[place:place + 64] = bytes(len(data[place:place + 64]))
    else:
        data = {"cut": data[:place], "tail": data + rng.bytes(40), "empty": b""}[how]
    path.write_bytes(data)
    if path.suffix in (".txt", ".json"):
        return VALID
    return SAME if how in ("cut", "empty") or path.suffix in (".png", ".pth") else VALID


def change_image(path, rng):
    """Saves an image in another way, or something else in its place."""
    pixels, in_training = read(path), "a." not in path.name
    image, how = Image.fromarray(pixels), rng.integers(6)
    if how == 0:  # one of another format under this name, with a channel that is not used
        image.convert("RGBA").save(path, "PNG")
        return VALID
    if how == 1 and in_training:
        image.resize((50, 30)).save(path, "PNG")
        return REFUSED
    if how == 2:
        image.save(path, "TIFF", save_all=True, append_images=[image])
        return REFUSED
    if how == 3 and in_training:  # a mask and its image, swapped
        other = next((folder / f"{path.stem}.png" for folder in path.parents[1].glob("*[sS]*/**")
                      if (folder / f"{path.stem}.png").exists() and folder != path.parent), path)
        if other != path:
            other.rename(path.parent / "x"), path.rename(other), (path.parent / "x").rename(path)
            return REFUSED
    if how == 4:
        path.write_text("no image")
        return REFUSED
    Image.fromarray(pixels[::-1].copy()).save(path, "PNG")
    return VALID


def change_mask(path, rng):
    """Saves a mask with other values, channels, depth or size."""
    ids, unet = utils.read_mask(path), "masks" in path.parts
    how, tif = rng.integers(10), path.with_suffix(".tif")
    if how == 0:
        Image.fromarray(ids).resize((50, 30), 0).save(path)
    elif how == 1:
        Image.fromarray(np.dstack([ids, ids, ids * 0])).save(path)
    elif how == 2:
        Image.fromarray(np.dstack([ids, ids, ids, rng.integers(0, 255, ids.shape, np.uint8)])).save(path)
    elif how == 3 and "SegmentationClass" in path.parts:
        Image.fromarray(np.where(ids == 255, 255, ids + 100).astype(np.uint8)).save(path)
    elif how == 4:
        Image.fromarray(ids // 2 if unet else ids).save(path.with_suffix(".png" if unet else ".jpg"))
        unet or path.unlink()
    elif how == 5:
        Image.fromarray(ids.astype(np.float32) + np.float32(0.5)).save(tif)
        path.unlink()
        return ANY if unet else REFUSED  # edges may be soft there
    elif how == 6:
        Image.fromarray(ids.astype(np.uint16) * (257 if unet else 1)).save(path)
        return ANY if 255 in ids and not unet else SAME  # of 16 bits 255 may be an id
    elif how == 7:
        utils.save_mask(path, ids)
        return SAME
    elif how == 8:
        Image.fromarray(np.dstack([ids] * 3)).save(path)
        return SAME
    else:
        Image.fromarray(ids.astype(np.float32)).save(tif)
        path.unlink()
        return ANY if 255 in ids and not unet else SAME
    return REFUSED


def change_array(path, rng):
    """Saves an array of another type, shape, order or range."""
    array, how, is_mask = np.load(path), rng.integers(10), "gts" in path.parts
    in_training = "a." not in path.name
    floats = array.astype(np.float64)
    changed, right = [
        (np.asfortranarray(array), SAME), (floats if is_mask else floats / 255, SAME),
        (np.where(rng.random(array.shape) < 0.01, np.nan, floats), REFUSED), (array.astype(object), REFUSED),
        (array[:-1] if in_training else array[..., :2], REFUSED), (array[None], REFUSED),
        (floats + 0.5 if is_mask else floats * 1000, REFUSED), (array.astype("U3"), REFUSED),
        (array.astype(np.int16) - 300, REFUSED if is_mask else ANY),
        (array.astype(">i4") if is_mask else array[..., [0, 1, 2, 0]], SAME)][how]
    np.save(path, changed, allow_pickle=True)
    return right


def change_list(path, rng):
    """Writes a list as other editors do, or with other lines."""
    lines, how = path.read_text().splitlines(), rng.integers(9)
    text = "\n".join(lines) + "\n"
    encoded = [text.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"),
               text.replace("\n", " \n\n").encode()]
    if how < 4:
        path.write_bytes(encoded[how])
        return SAME
    others = [lines[::-1], [*lines, lines[0]], [*lines, "not_there"], ["", " "], ["\0", *lines]]
    path.write_text("\n".join(others[how - 4]))
    return VALID if how in (4, 5) else REFUSED


def change_json(path, rng):
    """Writes a json as other tools do, or with values that are none."""
    found, how = json.loads(path.read_text()), rng.integers(6)
    if how == 0:
        path.write_text(json.dumps(found, indent=3).replace("\n", "\r\n"))
        return SAME
    for _ in range(rng.integers(1, 3)):
        mutate(found, rng)
    path.write_text(json.dumps(found))
    return VALID


def change_checkpoint(path, rng):
    """Saves a checkpoint with a tensor or entry removed, reshaped, not finite or of another type."""
    found, how = torch.load(path, weights_only=True), rng.integers(9)
    state, right = found["model"], REFUSED
    key = [*state][rng.integers(len(state))]
    tensor, entry = state[key], [*found][rng.integers(len(found))]
    if how == 0:
        del state[key]
    elif how == 1:
        state[key] = tensor[None] if rng.random() < 0.5 else tensor.flatten()[1:]
    elif how == 2 and tensor.is_floating_point():
        tensor.view(-1)[rng.integers(tensor.numel())] = [np.nan, np.inf, -np.inf][rng.integers(3)]
    elif how == 3 and tensor.is_floating_point():
        state[key] = tensor.to([torch.int8, torch.bool, torch.complex64][rng.integers(3)])
    elif how == 4:
        state[key] = [None, 3, "x", [1.0]][rng.integers(4)]
    elif how == 5:
        state[key + "x"] = tensor
    elif how == 6:
        state[key], right = tensor.double() if tensor.is_floating_point() else tensor.int(), SAME
    elif how == 7:
        del found[entry]
        right = SAME
    else:
        places = found if rng.random() < 0.5 else found["arch"]
        entry = [*places][rng.integers(len(places))]
        places[entry] = [*VALUES, 3, -5, 10**6, "x"][rng.integers(len(VALUES) + 4)]
        right = SAME
    torch.save(found, path)
    return right


CHANGES = {"images": change_image, "masks": change_mask, "arrays": change_array, "lists": change_list,
           "json": change_json, "videos": change_bytes, "checkpoints": change_checkpoint}


def check_mutation(kind, number, folder):
    """Mutates a file of this kind, as the number says; asserts the outcome."""
    rng, sources = np.random.default_rng([list(SOURCES).index(kind), number]), SOURCES[kind]
    script, file = sources[number % len(sources)]
    whole, result = good(script, file)
    where = f"{kind}, seed {number}: {script}, {file}"
    assert not isinstance(result, utils.InputError), (where, result)
    shutil.copytree(whole, folder / "data")
    path = folder / "data" / file
    before = read(path) if path.suffix != ".pth" else None
    right = (change_bytes if rng.random() < 0.5 else CHANGES[kind])(path, rng)
    try:
        found = outcome(script, file, folder / "data")
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    if isinstance(found, utils.InputError):
        text = str(found)
        named = path.stem in text or text.startswith("--") or kind in ("lists", "json")  # or what it names
        assert "\n" not in text and named, (where, text)
        return
    assert right != REFUSED, where
    content = read(path) if right == VALID else None
    if right == VALID and not same(content, before):
        assert content is not None, f"{where}: holds nothing that can be read"
        write_plainly(path, content)
        result = outcome(script, file, folder / "data")
        if kind == "videos" and script == "train_sam2":
            result = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in content]
    assert right == ANY or same(found, result), where


@pytest.fixture(scope="module", autouse=True)
def good_data(tmp_path_factory):
    os.environ["MUTATIONS"] = str(tmp_path_factory.mktemp("good"))


SEEDS = {"images": [1, 3, 10, 12, 21, 72], "masks": [4, 9, 10, 19, 22], "arrays": [0, 1, 10, 14, 115],
         "lists": [0, 2, 3, 21], "json": [1, 7, 13, 16], "videos": [0, 2, 4], "checkpoints": [1, 24, 128]}


@pytest.mark.parametrize("kind, number", [(kind, number) for kind in SEEDS for number in SEEDS[kind]])
def test_a_mutated_file_is_named_or_done_rightly(kind, number, tmp_path):
    check_mutation(kind, number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_three_hundred_mutated_files(kind, tmp_path):
    for number in range(300):
        check_mutation(kind, number, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))


# --- predict.py: a good image beside one that is not ---

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def loaded(weights):
    """What load_model returns, once."""
    args = predict.get_args_parser().parse_args(["x", "--device", "cpu", "--weights", str(weights)])
    return predict.load_model(args)


def encoded(form, mode="RGB", **options):
    """Bytes of an image file."""
    image, file = Image.fromarray(noise(*SIZE)), io.BytesIO()
    if mode in ("I;16", "F"):
        ramp = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
        image = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.float32))
    elif mode in ("LA", "PA"):
        image = image.convert("L").convert("LA")
        image = image.convert("PA") if mode == "PA" else image
    else:
        image = image.convert(mode)
    image.save(file, form, **options)
    return file.getvalue()


def array(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def header(shape, descr="|u1"):
    """A .npy file that says what it does not hold."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(100)


def huge_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("JPEG", exif=exif)


# Spoilt for certain: these must be named.
BAD = {"text.png": b"no image\n", "text.npy": b"no array\n", "array.png": array(noise(*SIZE)),
       "image.npy": encoded("PNG"), "huge.png": huge_png(2 ** 31 - 1, 2 ** 31 - 1), "bomb.png": huge_png(30000, 9000),
       "large.npy": header((10 ** 7, 10 ** 7, 3)), "long.npy": header((2 ** 62, 2 ** 62)), "minus.npy": header((-5, 7)),
       "words.npy": header("('a', 'b')"), "open.npy": header("((((("), "type.npy": header((3, 3), "|O"),
       "zero.npy": array(np.zeros((0, 5, 3), np.uint8)), "flat.npy": array(np.zeros((5, 0), np.uint8)),
       "object.npy": array(np.array([[None, {}]], object)), "nan.npy": array(np.full(SIZE, np.nan)),
       "infinite.npy": array(np.full(SIZE, np.inf)), "text_array.npy": array(np.array([["a"]])),
       "many.npy": array(np.zeros((2, 3, 4, 5))), "one.npy": array(np.float32(3)), "zip.npy": b"PK\x03\x04" + bytes(50),
       "several.gif": encoded("GIF", "P", save_all=True, append_images=[Image.new("P", SIZE[::-1], 9)])}
# Odd, but images: these must be done, at their own size.
GOOD = {"one.png": encoded("PNG", "1"), "grey.png": encoded("PNG", "L"), "grey_alpha.png": encoded("PNG", "LA"),
        "alpha.png": encoded("PNG", "RGBA"), "deep.png": encoded("PNG", "I;16"), "palette.png": encoded("PNG", "P"),
        "clear.png": encoded("PNG", "P", transparency=3), "float.tif": encoded("TIFF", "F"),
        "cmyk.jpg": encoded("JPEG", "CMYK"), "cmyk.tif": encoded("TIFF", "CMYK"), "lab.tif": encoded("TIFF", "LAB"),
        "palette_alpha.tif": encoded("TIFF", "LA"), "wrong.jpg": encoded("PNG"), "WRONG.BMP": encoded("JPEG"),
        "half.npy": array(noise(*SIZE).astype(np.float16) / 255), "bool.npy": array(noise(*SIZE)[..., 0] > 99),
        **{f"turned{k}.jpg": turned(k) for k in (2, 3, 5, 6, 8)}}
CASES = [*[(name, data, "bad") for name, data in BAD.items()],
         *[(name, data, "good") for name, data in GOOD.items()],
         *[(name, None, "bad") for name in ("dangling.png", "folder.png", "list.txt", "loop.jpg")]]


def lay(folder, name, data):
    """The case beside a good image; returns what predict.py is given."""
    (folder / "in").mkdir(parents=True)
    Image.fromarray(noise(*SIZE)).save(folder / "in/fine.png")
    path = folder / "in" / name
    if data is not None:
        path.write_bytes(data)
    elif name == "folder.png":  # a glob finds it
        path.mkdir()
        return [str(folder / "in/*.png")]
    elif name == "list.txt":
        path.write_text("fine.png\nnot_there.png\n")
        return [str(path)]
    else:
        os.symlink(path if name == "loop.jpg" else folder / "nothing", path)
    return [str(folder / "in")]


def check(folder, name, data, kind, message):
    """The good image is done; the other has a mask of its size or is named in the one line of errors, not both."""
    masks = {path.name.removesuffix("_mask.png"): path for path in (folder / "out").glob("*_mask.png")}
    named, done = "not_there.png" if name == "list.txt" else name, masks.pop("fine")
    assert Image.open(done).size == SIZE[::-1]
    assert len(masks) == (not message) and "\n" not in message.strip()
    assert bool(message) == (kind == "bad")
    if message:
        assert named in message and "fine.png" not in message
        return
    with Image.open(*masks.values()) as mask:
        assert mask.mode == "P" and set(np.unique(mask)) <= {0, 1}
        assert mask.size == (SIZE if name in ("turned5.jpg", "turned6.jpg", "turned8.jpg") else SIZE[::-1])


@pytest.mark.parametrize("name, data, kind", CASES, ids=[name for name, *_ in CASES])
def test_odd_inputs_are_named_or_done_and_the_good_one_beside_them_is_done(
        weights, loaded, tmp_path, monkeypatch, name, data, kind):
    monkeypatch.setattr(predict, "load_model", lambda *_: loaded)
    inputs, message = lay(tmp_path, name, data), ""
    try:
        predict.main(predict.get_args_parser().parse_args(
            [*inputs, "--weights", str(weights), "--device", "cpu", "--output-dir", str(tmp_path / "out")]))
    except utils.InputError as error:
        message = str(error)
    check(tmp_path, name, data, kind, message)


@pytest.mark.parametrize("number", [0, 3, 6, 9, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 4, 5, 7, 8))])
def test_a_tenth_of_them_in_a_process_of_their_own(weights, tmp_path, script, number):
    name, data, kind = CASES[number * len(CASES) // 10]
    done = script("predict.py", *lay(tmp_path, name, data), "--weights", weights, "--device", "cpu", "--output-dir",
                  tmp_path / "out")
    assert "Traceback" not in done.stderr and done.returncode in (0, 2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("predict.py: error: ")]  # libtiff has its own
    assert len(lines) == (done.returncode == 2) and lines == done.stderr.splitlines()[-1:]
    check(tmp_path, name, data, kind, "".join(lines))


@pytest.mark.parametrize("text", ["", "{", "[" * 60000, "[]x", "3", "[1, 2]", '{"fine": 3}', '{"fine": {"boxes": 5}}',
                                  '"\\ud800"', '{"fine": {"boxes": [["a", 1, 2, 3]]}}',
                                  '{"fine": {"boxes": [[1, 2, 3]]}}', '{"fine": {"points": [[1e999, 2]]}}',
                                  '{"fine": {"points": [[NaN, 2, 1]]}}', '{"fine": {"boxes": [[9, 9, 1, 1]]}}',
                                  '{"fine": {"points": [[1, 2, 3, 4, 5]]}}',
                                  '{"other": {}}', json.dumps({"fine": {"boxes": [[1, 1, 9, 9]] * 300}})])
def test_spoilt_prompts_are_named(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    args = predict.get_args_parser().parse_args(["x", "--weights", "x", "--prompts", str(tmp_path / "prompts.json")])
    loaded = SimpleNamespace(net=predict.NETS["efficient_sam"], classes=[])
    with pytest.raises(utils.InputError, match=r"prompts.json|fine"):
        _, queries, bad = predict.plan_outputs([tmp_path / "fine.png"], loaded, args)
        if bad:
            raise utils.InputError(bad[0])
        predict.check_prompts("fine", queries["fine"], (*SIZE, 3))
