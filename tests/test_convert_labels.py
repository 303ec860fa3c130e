"""convert_labels.py: masks right to the pixel, layouts that the scripts read, mistakes in one line."""
import base64
import contextlib
import copy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

import convert_labels
import train_deeplabv3
import train_efficientsam
import train_unet
import utils
from conftest import ROOT

VOC = "VOCdevkit/VOC2012"
SIZE = 48, 60  # height and width of the images
BOX, FAR_BOX = [4, 6, 14, 6, 14, 16, 4, 16], [50, 0, 60, 0, 60, 10, 50, 10]
INNER = [6, 8, 10, 8, 10, 12, 6, 12]  # in BOX
TRIANGLE = [20, 20, 40, 20, 20, 40]  # its slope runs through no centre but those of the diagonal


def convert(*words):
    return convert_labels.main(convert_labels.get_args_parser().parse_args([*map(str, words)]))


def save_images(folder, *names, size=SIZE):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        utils.save_image(path, np.full((*size, 3), (90 + number) % 256, np.uint8))


def encode(mask, compressed=False):
    """RLE of mask (H, W); the compressed form is written here as its inverse is in the script."""
    runs = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0, append=2))
    counts = np.diff(runs, prepend=0).tolist()
    if not compressed:
        return {"size": [*mask.shape], "counts": counts}
    text = ""
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            text += chr(48 + code + 32 * more)
    return {"size": [*mask.shape], "counts": text}


def coco(folder, objects, images=("p0.png",), categories=((5, "cat"), (3, "dog")), **extra):
    """annotations.json; objects: (image, category, segmentation, further keys)."""
    annotations = [{"id": k, "image_id": image, "category_id": category, "segmentation": shape, **dict(more)}
                   for k, (image, category, shape, *more) in enumerate(objects, 1)
                   for more in [more[0] if more else {}]]
    listed = [{"id": k, "file_name": name, "width": SIZE[1], "height": SIZE[0], **extra}
              for k, name in enumerate(images)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotations,
                                "categories": [{"id": k, "name": name} for k, name in categories]}))
    return path


def labelme(folder, name, shapes, image=None, **extra):
    shapes = [{"label": label, "points": np.reshape(points, (-1, 2)).tolist(), "shape_type": kind, **dict(more)}
              for label, points, kind, *rest in shapes for more in [rest[0] if rest else {}]]
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "6.3.1", "imagePath": image or f"{name}.png", "imageData": None,
                                "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": shapes, **extra}))


def rectangle(left, top, right, bottom, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def lower_triangle():
    """Pixels whose centres lie in TRIANGLE; those on its slope, a right edge, are outside."""
    y, x = np.indices(SIZE) + 0.5
    return (x > 20) & (y > 20) & (x + y < 60)


def read(folder, *names):
    """Masks, for a class True, of images in a folder of the output."""
    return [utils.read_mask(folder / name) for name in names]


def note(capsys, *words):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    return any(all(word in line for word in words) for line in lines)


# --- Pixels ---

def test_fill_is_even_odd_of_pixel_centres():
    rng = np.random.default_rng(0)
    for _ in range(200):
        polygon, mask = rng.uniform(-20, 70, (rng.integers(3, 12), 2)), np.zeros(SIZE, bool)
        convert_labels.fill(mask, polygon)
        (y, x), (x0, y0) = np.indices(SIZE)[..., None] + 0.5, polygon.T
        x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
        crossed = ((y0 > y) != (y1 > y)) & (x < x0 + (x1 - x0) * (y - y0) / (y1 - y0))
        assert (mask == crossed.sum(-1) % 2).all()


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none_out():
    rng = np.random.default_rng(1)
    for _ in range(50):
        x, y = rng.integers(1, 59), rng.integers(1, 47)  # four triangles about this point fill the image
        corners, counts = [(0, 0), (60, 0), (60, 48), (0, 48)], np.zeros(SIZE, int)
        for start, end in zip(corners, corners[1:] + corners[:1]):
            mask = np.zeros(SIZE, bool)
            convert_labels.fill(mask, np.array([start, end, (x + 0.5, y + 0.5)]))
            counts += mask
        assert (counts == 1).all()


def test_a_bridge_there_and_back_has_no_pixels():
    """So YOLO's converters join the parts of an object, and cut out holes."""
    polygon = [*BOX[:2], *INNER[:2], *INNER[6:], *INNER[4:6], *INNER[2:4], *INNER[:2], *BOX]
    mask = np.zeros(SIZE, bool)
    convert_labels.fill(mask, convert_labels.as_polygon(polygon))
    assert (mask == rectangle(4, 6, 14, 16) & ~rectangle(6, 8, 10, 12)).all()


def test_huge_and_outer_polygons_are_cut_off():
    for polygon, expected in (([-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9], np.ones(SIZE, bool)),
                              ([-9, -9, 5, -9, 5, 3, -9, 3], rectangle(0, 0, 5, 3)),
                              ([90, 90, 99, 90, 99, 99], np.zeros(SIZE, bool)),
                              ([3, 9, 30, 9, 50, 9], np.zeros(SIZE, bool))):
        mask = np.zeros(SIZE, bool)
        convert_labels.fill(mask, convert_labels.as_polygon(polygon))
        assert (mask == expected).all()


def test_run_lengths_end_with_the_last_run_as_cocos_own_do():
    for left, top, counts in ((3, 2, [14, 2, 2, 2]), (0, 0, [0, 2, 2, 2, 14]), (1, 1, [5, 2, 2, 2, 9])):
        found = convert_labels.run_lengths(np.ones((2, 2), bool), left, top, (4, 5))
        assert found == {"size": [4, 5], "counts": counts}


def test_an_arrays_sides_the_wrong_way_round_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 3), np.uint8))
    item = convert_labels.Item("a.npy", tmp_path / "a.npy", (4, 5), list)
    with pytest.raises(convert_labels.utils.InputError, match="width x height is 4 x 5, but .*a.npy has 5 x 4"):
        convert_labels.find_view(item, (5, 4), SimpleNamespace(input="folder"), None)


def test_run_lengths_are_read_in_both_forms():
    rng = np.random.default_rng(2)
    for share in (0, 0.02, 0.5, 0.98, 1):
        for size in (SIZE, (1, 1), (7, 300)):
            truth = rng.random(size) < share
            for compressed in (False, True):
                mask = np.zeros(size, bool)
                convert_labels.draw_coco(encode(truth, compressed), mask)
                assert (mask == truth).all()
    truth = rectangle(3, 2, 10, 7, (9, 12)) & ~rectangle(5, 4, 8, 5, (9, 12)) | rectangle(11, 0, 12, 1, (9, 12))
    mask = np.zeros((9, 12), bool)  # the text is pycocotools 2.0.11's
    convert_labels.draw_coco({"size": [9, 12], "counts": "m05400MM030M030M033007LM"}, mask)
    assert (mask == truth).all() and encode(truth, True)["counts"] == "m05400MM030M030M033007LM"


# --- The formats ---

def test_coco_polygons_run_lengths_holes_and_crowds_to_the_pixel(tmp_path):
    save_images(tmp_path, "p0.png", "p1.png", "p2.png")
    ring = rectangle(25, 5, 45, 25) & ~rectangle(30, 10, 40, 20)
    path = coco(tmp_path, [
        (0, 5, [TRIANGLE, BOX]), (0, 3, [FAR_BOX]), (1, 5, encode(ring)), (1, 3, encode(ring, True)),
        (2, 5, encode(rectangle(0, 0, 30, 48)), {"iscrowd": 1}), (2, 5, [BOX]), (2, 3, [INNER])],
        ["p0.png", "p1.png", "p2.png"])
    found = convert("coco", path, "--to", "masks", "voc", "npy", "--output-dir", tmp_path / "data")
    assert found == {"images": 3, "objects": {"dog": 3, "cat": 4}}  # by category id
    data = tmp_path / "data"
    assert (data / "masks/classes.txt").read_text() == "dog\ncat\n"
    box, far, triangle, inner = (rectangle(4, 6, 14, 16), rectangle(50, 0, 60, 10), lower_triangle(),
                                 rectangle(6, 8, 10, 12))
    for k, masks in enumerate([(far, ring, inner), (box | triangle, ring, rectangle(0, 0, 30, 48))]):
        for image, mask in enumerate(masks):
            assert (read(data / f"masks/{k}", f"p{image}.png")[0] == 255 * mask).all()
    labels = read(data / VOC / "SegmentationClass", "p0.png", "p1.png", "p2.png")
    ids = [np.load(data / f"gts/p{i}.npy") for i in range(3)]
    objects = read(data / VOC / "SegmentationObject", "p0.png", "p1.png", "p2.png")
    assert (labels[0] == far + 2 * (box | triangle)).all() and (ids[0] == 2 * far + (box | triangle)).all()
    assert (labels[1] == ring).all() and (ids[1] == 2 * ring).all()  # equal ones: the later on top
    crowd = rectangle(0, 0, 30, 48) & ~box
    assert (labels[2] == 255 * crowd + 2 * (box & ~inner) + inner).all()
    assert (ids[2] == 2 * (box & ~inner) + 3 * inner).all() and (objects[2] == ids[2] + 255 * crowd).all()
    assert (objects[0] == ids[0]).all() and ids[0].dtype == np.uint8
    assert Image.open(data / VOC / "SegmentationClass/p0.png").mode == "P"


def test_smaller_objects_lie_above_larger_ones_and_classes_overlap_in_masks(tmp_path):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 3, [INNER]), (0, 5, [BOX])])
    convert("coco", path, "--to", "masks", "voc", "npy", "--classes", "cat,dog", "--output-dir", tmp_path / "data")
    box, inner = rectangle(4, 6, 14, 16), rectangle(6, 8, 10, 12)
    assert (read(tmp_path / "data/masks/0", "p0.png")[0] == 255 * box).all()
    assert (read(tmp_path / "data/masks/1", "p0.png")[0] == 255 * inner).all()
    assert (read(tmp_path / "data" / VOC / "SegmentationClass", "p0.png")[0] == box * 1 + inner).all()
    assert (np.load(tmp_path / "data/gts/p0.npy") == 2 * box - 1 * inner).all()
    names = json.loads((tmp_path / "data" / VOC / "class_names.json").read_text())
    assert names == {"background": 0, "cat": 1, "dog": 2}


def test_labelme_shapes_to_the_pixel(tmp_path, capsys):
    save_images(tmp_path, "p0.png")
    blob = np.random.default_rng(0).random((7, 9)) < 0.5
    blob[0, 0] = True
    png = base64.b64encode(cv2.imencode(".png", blob * np.uint8(255))[1].tobytes()).decode()
    file = io.BytesIO()
    Image.fromarray(blob).save(file, "PNG")  # one bit per pixel, as LabelMe
    one_bit = base64.b64encode(file.getvalue()).decode()
    labelme(tmp_path, "p0", [
        ("dog", TRIANGLE, "polygon"), ("cat", [14, 16, 4, 6], "rectangle"),  # dragged to the upper left
        ("cat", [50.5, 10.5, 50.5, 13.5], "circle"), ("cat", [30, 30, 39, 37], "mask", {"mask": png}),
        ("bird", [0, 40, 9, 47], "mask", {"mask": one_bit}),
        ("dog", [0, 20, 4, 20, 4, 24, 0, 24], None, {"group_id": 1}),  # without a type: a polygon
        ("dog", [0, 30, 4, 30, 4, 34, 0, 34], "polygon", {"group_id": 1}),
        ("cat", [0, 36, 4, 36, 4, 38, 0, 38], "oriented_rectangle", {"group_id": 1}),
        ("cat", [1, 1, 9, 9], "line"), ("cat", [[3, 3]], "point")])
    found = convert("labelme", tmp_path, "--to", "masks", "npy", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"bird": 1, "cat": 4, "dog": 2}
    assert note(capsys, "objects with shapes that cannot be used: 2", "shapes[8] of", "p0.json: a line has no area")
    bird, cat, dog = [read(tmp_path / f"data/masks/{k}", "p0.png")[0] > 0 for k in range(3)]
    y, x = np.indices(SIZE)
    expected = rectangle(4, 6, 14, 16) | ((x - 50) ** 2 + (y - 10) ** 2 <= 9) | rectangle(0, 36, 4, 38)
    expected[30:37, 30:39] |= blob
    assert (cat == expected).all()
    assert (dog == lower_triangle() | rectangle(0, 20, 4, 24) | rectangle(0, 30, 4, 34)).all()
    assert (bird[40:47, :9] == blob).all() and bird.sum() == blob.sum()
    ids = np.load(tmp_path / "data/gts/p0.npy")
    assert len(np.unique(ids)) == 1 + 7 and ids[21, 1] == ids[31, 1] != ids[37, 1]  # a group of one label


@pytest.mark.parametrize("names", [
    "names: [cat, 'dog']  # two\nnc: 2", "nc: 2\nnames:\n  0: cat\n  1: dog\ntrain: x",
    "path: x\nnames:\n- cat\n- \"dog\"\n", "names: {0: cat, 1: dog}", "names: ['cat',\n  'dog']",
    "classes.txt", "--classes"])
def test_yolo_polygons_to_the_pixel(tmp_path, capsys, names):
    root = tmp_path / "set"
    save_images(root / "images/train", "p 0.png", "p1.jpg", "bare.png")
    (root / "labels/train").mkdir(parents=True)
    scaled = [" ".join(f"{value / side:.12f}" for value, side in zip(polygon, [60, 48] * 9))
              for polygon in (BOX, [20, 20, 39.6, 20, 20, 39.6])]  # its slope is near no centre
    lines = f"0 {scaled[0]}", "", f"1 {scaled[1]}", "0 0.5 0.5 0.2 0.2", "0 4 6 9 6 9 9", "7 0 0 1 1 0 1"
    (root / "labels/train/p 0.txt").write_text("\n".join(lines))
    (root / "labels/train/p1.txt").write_text("")
    options = []
    if names == "--classes":
        options = ["--classes", "cat,dog"]
    elif names == "classes.txt":
        (root / "classes.txt").write_text("cat\ndog\n")
    else:
        (root / "data.yaml").write_text(names + "\n")
    found = convert("yolo", root, *options, "--to", "masks", "coco", "--output-dir", tmp_path / "data")
    assert found == {"images": 2, "objects": {"cat": 1, "dog": 1}}
    cat, dog = [read(tmp_path / f"data/masks/{k}", "train_p 0.png")[0] > 0 for k in range(2)]
    assert (cat == rectangle(4, 6, 14, 16)).all() and (dog == lower_triangle()).all()
    assert not read(tmp_path / "data/masks/1", "train_p1.png")[0].any()
    assert (tmp_path / "data/images/train_p1.jpg").read_bytes() == (root / "images/train/p1.jpg").read_bytes()
    out = capsys.readouterr().out
    assert "images without a .txt" in out and "bare.png" in out and "boxes of cat, no polygons, left out" in out
    assert "line 4 of" in out and "line 5 of" in out and "is not in 0..1" in out
    assert "lines without a class of 0 to 1, left out: 1" in out and "line 6 of" in out
    assert "images without an object: 1" in out
    images = json.loads((tmp_path / "data/annotations.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["train/p 0.png", "train/p1.jpg"]


# --- Names of the classes ---

def yolo(folder, lines, names="cat,dog", image="p0.png"):
    """A data set of one image; names: text of data.yaml or, with commas, of classes.txt."""
    (folder / "labels").mkdir(parents=True)
    (folder / "labels/p0.txt").write_text("\n".join(lines) + "\n")
    save_images(folder / "images", image)
    file = "data.yaml" if "names" in names else "classes.txt"
    (folder / file).write_text(names if file == "data.yaml" else names.replace(",", "\n"))
    return folder


def outline(polygon):
    return " ".join(f"{value / side:.12f}" for value, side in zip(polygon, [60, 48] * 9))


@pytest.mark.parametrize("text, names", [
    ("names: ['cat, small', 'dog']\nnc: 2", ["cat, small", "dog"]),
    ("names: ['cat #1', \"dog\"]  # two, 'so'", ["cat #1", "dog"]),
    ("names: [cat, '', dog]", ["cat", "", "dog"]), ("names: [cat, , dog]", ["cat", "", "dog"]),
    ("names: ['cat',\n'dog',  # it's a dog\n]\nnc: 2", ["cat", "dog"]), ("names: [ ]\nnc: 0", []),
    ("names: {1: cat, 0: 'dog, big'}", ["dog, big", "cat"]), ('names: {"0":"cat","1":"dog"}', ["cat", "dog"]),
    ("names:\n- 'cat #1'\n- a#b # c\n-\n- it's\n\n- 'it''s'\nnc: 5", ["cat #1", "a#b", "", "it's", "it's"]),
    ("names:  # three, as 'so\n  # - none\n  - rock 'n roll\n  - a, b\n  - \"\\\"\\u00e9\"\nx:\n- y",
     ["rock 'n roll", "a, b", '"\u00e9']),
    ("path: it's\r\nnames:\r\n  1: cat\r\n  '0': ''\r\n  2: dog\r\ntrain: x\r\n", ["", "cat", "dog"]),
    ("names:\n    - 1.0\n    - yes\n---\n- x", ["1.0", "yes"]), ("names:\nnc: 2", []), ("task: segment", [])])
def test_names_in_yaml(text, names):
    assert convert_labels.parse_yaml(text) == names


@pytest.mark.parametrize("text, message", [
    ("names: [cat, dog", "dog is not the name"), ("names: ['cat' x, dog]", "is not the name of a class"),
    ("names: cat", "cat is not the name"), ("names: &a [cat]", "is not the name"),
    ("names: *a\nnc: 1", "is not the name"),
    ("names:\n- name: cat\n  id: 3", "- name: cat"), ("names:\n  - cat\n    small\n", "small is not the name"),
    ("names:\n- 'cat\n- dog\n", "- 'cat"), ("names: {0: cat, 2: dog}", "class 2 where 1 is due"),
    ("names:\n  0: cat\n  0: dog\n", "class 0 where 1 is due"), ("names: {1: cat}", "class 1 where 0 is due")])
def test_names_in_yaml_that_cannot_be_read_are_refused(tmp_path, text, message):
    source = yolo(tmp_path / "set", [f"0 {outline(BOX)}"], text)
    message = f"data.yaml: .*{re.escape(message)}.*; number the names 0, 1, 2 ... or list them"
    with pytest.raises(utils.InputError, match=message):
        convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "data")


def test_an_endless_comment_in_yaml_takes_no_time():
    for text in ("names:\n" + "# " * 9999 + "x", "names: [" + "a # " * 9999, "names: ['" + "''" * 9999):
        started = time.perf_counter()
        with contextlib.suppress(ValueError):
            convert_labels.parse_yaml(text)
        assert time.perf_counter() - started < 1


@pytest.mark.parametrize("names", [
    "cat,,dog", ",cat,dog", "names: [cat, '', dog]", "names: {0: cat, 2: dog, 1: }", "names:\n- cat\n- # none\n- dog\n",
    "--classes", "cat\u2028,\x85,dog,,"])
def test_an_id_does_not_change_because_of_another_name(tmp_path, capsys, names):
    """Of three classes one has no name; a name may also hold what Python takes for the end of a line."""
    source = yolo(tmp_path / "set", [f"2 {outline(BOX)}", f"1 {outline(FAR_BOX)}"], names)
    options = []
    if names == "--classes":
        (source / "classes.txt").unlink()
        options = ["--classes", "cat,,dog"]
    found = convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "data", *options)
    unnamed = "class 0" if names[0] == "," else "class 1"
    assert found["objects"]["dog"] == 1 and note(capsys, "classes without a name: 1", unnamed)
    if names == "--classes":  # which also chooses
        assert found["objects"] == {"cat": 0, "dog": 1}
        return
    classes = (tmp_path / "data/masks/classes.txt").read_text().splitlines()
    assert len(classes) == 3 and classes[2] == "dog" and unnamed in classes
    assert (read(tmp_path / "data/masks/2", "p0.png")[0] == 255 * rectangle(4, 6, 14, 16)).all()
    assert (read(tmp_path / "data/masks/1", "p0.png")[0] == 255 * rectangle(50, 0, 60, 10)).all()


def test_masks_keep_their_class_where_classes_txt_has_an_empty_line(tmp_path, capsys):
    save_images(tmp_path / "images", "p0.png")
    for k, box in enumerate([rectangle(4, 6, 14, 16), rectangle(50, 0, 60, 10), rectangle(20, 20, 30, 30)]):
        (tmp_path / f"masks/{k}").mkdir(parents=True)
        utils.save_image(tmp_path / f"masks/{k}/p0.png", box * np.uint8(255))
    (tmp_path / "masks/classes.txt").write_text("\ndog\n")
    convert("masks", tmp_path, "--to", "voc", "--output-dir", tmp_path / "data")
    label, = read(tmp_path / "data" / VOC / "SegmentationClass", "p0.png")
    assert (label == rectangle(4, 6, 14, 16) + 2 * rectangle(50, 0, 60, 10)).all()
    assert json.loads((tmp_path / "data" / VOC / "class_names.json").read_text()) == {
        "background": 0, "class 0": 1, "dog": 2}
    assert note(capsys, "folders that masks/classes.txt does not name, left out: 1", "masks/2")


def test_class_folders_have_the_order_of_their_numbers(tmp_path):
    save_images(tmp_path / "images", "p0.png")
    for k in range(11):
        (tmp_path / f"masks/{k}").mkdir(parents=True)
        utils.save_image(tmp_path / f"masks/{k}/p0.png", rectangle(4 * k, 0, 4 * k + 4, 5) * np.uint8(255))
    (tmp_path / "masks/.hidden").mkdir()
    convert("masks", tmp_path, "--to", "voc", "--output-dir", tmp_path / "data")
    label, = read(tmp_path / "data" / VOC / "SegmentationClass", "p0.png")
    assert label[0, ::4].tolist() == [*range(1, 12), 0, 0, 0, 0]  # as train_unet.py has them


def test_a_class_folder_with_odd_spaces(tmp_path):
    save_images(tmp_path / "images", "p0.png")
    (tmp_path / "masks/my  cat").mkdir(parents=True)
    utils.save_image(tmp_path / "masks/my  cat/p0.png", rectangle(4, 6, 14, 16) * np.uint8(255))
    found = convert("masks", tmp_path, "--to", "coco", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"my cat": 1}


def test_args_yaml_does_not_hide_data_yaml(tmp_path):
    source = yolo(tmp_path / "set", [f"1 {outline(BOX)}"], "names: [cat, dog]\n")
    (source / "args.yaml").write_text("task: segment\nmode: train\n")
    (source / "best.yaml").write_text("names: [x, y]\n")
    found = convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"cat": 0, "dog": 1}
    (source / "data.yaml").unlink()
    found = convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "best")
    assert found["objects"] == {"x": 0, "y": 1}
    (source / "best.yaml").unlink()
    (source / "labels/classes.txt").write_text("a\nb\n")  # where LabelImg writes it
    found = convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "other")
    assert found == {"images": 1, "objects": {"a": 0, "b": 1}}


# --- Two of one name ---

@pytest.mark.parametrize("same", [
    [(5, "cat"), (5, "dog")], [(5, "cat"), ("5", "dog")], [(5, "cat"), (3, "dog"), (3, "x")]])
def test_categories_of_one_id_are_refused(tmp_path, same):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX])], categories=same)
    message = r"categories\[\d\]: id [35] is that of another category too: (cat|dog) and (dog|x); correct it"
    with pytest.raises(utils.InputError, match=message):
        convert("coco", path, "--to", "masks", "--output-dir", tmp_path / "data")
    path = coco(tmp_path, [(0, 5, [BOX])], categories=[(5, "cat"), (5, "cat"), (3, "cat")])  # which differ in nothing
    assert convert("coco", path, "--to", "masks", "--output-dir", tmp_path / "data")["objects"] == {"cat": 1}


@pytest.mark.parametrize("kind, other", [
    ("yolo", ".jpg"), ("yolo", ".tif"), ("yolo --images", ".tif"), ("yolo labels", ".TXT"), ("masks", ".jpg"),
    ("masks --images", ".jpg"), ("class", ".tif"), ("labelme", ".JSON")])
def test_two_files_of_one_name_are_refused_by_name(tmp_path, kind, other):
    """p0.jpg beside p0.png, or an empty p0.tif."""
    source, options = tmp_path / "set", []
    if kind.startswith("yolo"):
        yolo(source, [f"0 {outline(BOX)}"])
        extra = source / "images/p0.png"
        if kind == "yolo labels":
            extra = source / "labels/p0.txt"
    elif kind == "labelme":
        labelme(source, "p0", [("cat", BOX, "polygon")])
        save_images(source, "p0.png")
        extra = source / "p0.json"
    else:
        save_images(source / "images", "p0.png")
        (source / "masks/0").mkdir(parents=True)
        utils.save_image(source / "masks/0/p0.png", rectangle(4, 6, 14, 16) * np.uint8(255))
        extra = source / ("masks/0/p0.png" if kind == "class" else "images/p0.png")
    if kind.endswith("--images"):
        (source / "images").rename(tmp_path / "elsewhere")
        extra, options = tmp_path / "elsewhere/p0.png", ["--images", tmp_path / "elsewhere"]
    extra.with_suffix(other).write_bytes(b"" if other == ".tif" else extra.read_bytes())
    words = [kind.split()[0].replace("class", "masks"), source, *options, "--to", "coco",
             "--output-dir", tmp_path / "data"]
    with pytest.raises(utils.InputError, match=r"p0\.\w+: p0\.\w+ has the same name; remove one"):
        convert(*words)
    assert not (tmp_path / "data").exists()
    extra.with_suffix(other).rename(extra.with_name(f".{extra.stem}{other}"))  # hidden files are left out
    assert convert(*words)["images"] == 1
    if options or kind in ("yolo", "masks"):  # nothing is said of images that are not used
        for ending in (".png", ".jpg"):
            extra.with_name(f"unused{ending}").write_bytes(extra.read_bytes())
        assert convert(*words, "--overwrite")["images"] == 1


def test_accents_of_macos_are_those_of_others(tmp_path):
    source = yolo(tmp_path / "set", [f"0 {outline(BOX)}"], image="e\u0301.png")
    (source / "labels/p0.txt").rename(source / "labels/\u00e9.txt")
    assert convert("yolo", source, "--to", "voc", "--output-dir", tmp_path / "data")["objects"] == {"cat": 1, "dog": 0}
    assert utils.read_lines(tmp_path / "data" / VOC / "ImageSets/Segmentation/val.txt") == ["\u00e9"]


# --- What is a mask of 0 and 255 ---

def masks_folder(folder, mask, name="p0.png"):
    save_images(folder / "images", "p0.png")
    (folder / "masks").mkdir()
    Image.fromarray(mask).save(folder / "masks" / name)
    return folder


@pytest.mark.parametrize("values", [(1, 255), (85, 170, 255), (1,), (1, 2, 3), (0, 127)])
def test_masks_of_ids_and_grey_codes_are_refused_by_name(tmp_path, values):
    mask = np.zeros(SIZE, np.uint8)
    for k, value in enumerate(values):
        mask[4 + 10 * k:14 + 10 * k, 5:40] = value
    source = masks_folder(tmp_path / "set", mask)
    with pytest.raises(utils.InputError, match="set/masks/p0.png: has values 0, .*; a mask holds 0 .* and 255"):
        convert("masks", source, "--to", "coco", "--output-dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["8 bits", "1 bit", "16 bits", "soft edges", "JPEG", "rgb"])
def test_masks_of_0_and_255_are_taken(tmp_path, kind):
    box, name = rectangle(5, 5, 40, 30), "p0.png"
    mask = box * np.uint8(255)
    if kind == "1 bit":
        mask = box
    elif kind == "16 bits":
        mask = box * np.uint16(65535)
    elif kind == "soft edges":
        mask = cv2.GaussianBlur(mask, (3, 3), 0)
    elif kind == "JPEG":
        name = "p0.jpg"
    elif kind == "rgb":
        mask = np.repeat(mask[..., None], 3, 2)
    source = masks_folder(tmp_path / "set", mask, name)
    convert("masks", source, "--to", "npy", "--output-dir", tmp_path / "data")
    assert (np.load(tmp_path / "data/gts/p0.npy") == box).all()


def test_masks_of_two_sizes_are_refused(tmp_path):
    save_images(tmp_path / "set/images", "p0.png")
    for k, size in enumerate([SIZE, (24, 30)]):
        (tmp_path / f"set/masks/{k}").mkdir(parents=True)
        utils.save_image(tmp_path / f"set/masks/{k}/p0.png", np.full(size, 255, np.uint8))
    with pytest.raises(utils.InputError, match="0/p0.png and .*1/p0.png differ in size; save them at one size"):
        convert("masks", tmp_path / "set", "--to", "coco", "--output-dir", tmp_path / "data")


# --- Shapes and values of other tools ---

def slanted(*corners):
    mask = np.zeros(SIZE, bool)
    convert_labels.fill(mask, np.array(corners, float))
    return mask


def ellipse(x, y, a, b, degrees=0.0):
    rows, columns = np.indices(SIZE) + 0.5
    angle = np.radians(degrees)
    along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    return (along / a) ** 2 + (across / b) ** 2 <= 1


TURNED = [[20, 10], [36, 22], [30, 30], [14, 18]]  # a box of 20 x 10 about (25, 20)


@pytest.mark.parametrize("kind, points, expected", [
    ("rectangle", [[4, 6], [14, 6], [14, 16], [4, 16]], rectangle(4, 6, 14, 16)),
    ("rectangle", [[4, 6], [14, 6], [14, 16], [4, 16], [4, 6]], rectangle(4, 6, 14, 16)),
    ("rectangle", [[-9, 40], [5, 99]], rectangle(0, 40, 5, 48)),
    ("rotation", TURNED, slanted(*TURNED)), ("quadrilateral", [[4, 6], [20, 8], [14, 30], [2, 20]],
                                             slanted([4, 6], [20, 8], [14, 30], [2, 20])),
    ("oriented_rectangle", TURNED, slanted(*TURNED)),
    ("polygon", [[50, 40], [99, 40], [99, 99], [50, 99]], rectangle(50, 40, 60, 48)),
    ("circle", [[60, 48], [60, 40]], ellipse(60, 48, 8, 8)),
    ("ellipse", [[10, 12], [38, 28]], ellipse(24, 20, 14, 8)),
    ("ellipse", [[24, 20], [38, 20], [24, 28]], ellipse(24, 20, 14, 8)),
    ("ellipse", [[10, 12], [38, 12], [38, 28], [10, 28]], ellipse(24, 20, 14, 8)),
    ("ellipse", [[24, 12], [38, 20], [24, 28], [10, 20]], ellipse(24, 20, 14, 8)),
    ("ellipse", TURNED, ellipse(25, 20, 10, 5, np.degrees(np.arctan2(12, 16)))),
    ("ellipse", [[25, 20], [33, 26], [22, 24]], ellipse(25, 20, 10, 5, np.degrees(np.arctan2(6, 8)))),
    ("ellipse", [[-8, -6], [8, 6]], ellipse(0, 0, 8, 6))])
def test_shapes_of_labelme_and_its_relatives(tmp_path, kind, points, expected):
    save_images(tmp_path, "p0.png")
    labelme(tmp_path, "p0", [("cat", points, kind)])
    assert convert("labelme", tmp_path, "--to", "masks", "--output-dir", tmp_path / "data")["objects"] == {"cat": 1}
    mask = read(tmp_path / "data/masks/0", "p0.png")[0] > 0
    assert expected.any() and (mask == expected).all()


@pytest.mark.parametrize("left, top", [(-3, -2), (55, 44), (10, -2), (30.4, 20.6), (-9, 0), (0, 48)])
def test_a_labelme_mask_over_the_edge_is_clipped(tmp_path, left, top):
    save_images(tmp_path, "p0.png")
    blob = np.random.default_rng(0).random((7, 9)) < 0.7
    png = base64.b64encode(cv2.imencode(".png", blob * np.uint8(255))[1].tobytes()).decode()
    labelme(tmp_path, "p0", [("cat", [left, top, left + 8, top + 6], "mask", {"mask": png}), ("cat", BOX, "polygon")])
    convert("labelme", tmp_path, "--to", "masks", "--output-dir", tmp_path / "data")
    wide, x, y = np.zeros((80, 90), bool), round(left) + 15, round(top) + 15
    wide[y:y + 7, x:x + 9] = blob
    expected = wide[15:15 + 48, 15:15 + 60] | rectangle(4, 6, 14, 16)
    assert (read(tmp_path / "data/masks/0", "p0.png")[0] == 255 * expected).all()


@pytest.mark.parametrize("kind, points, reason", [
    ("rectangle", [[1, 1], [5, 1], [5, 5]], "a rectangle of 3 points"),
    ("circle", [[1, 1], [2, 2], [3, 3]], "a circle of 3 points"), ("line", [[1, 1], [5, 1]], "a line has no area"),
    ("cuboid", [[k, k * k] for k in range(8)], "a cuboid has no area"),
    ("mask", [[1, 1], [5, 5]], "its mask is not a PNG in base64"),
    ("circle", [[1, 1]], "[[1, 1]] is not 2 or more points"),
    ("ellipse", [[9, 9], [19, 9], [20, 12]], "an ellipse whose axes are not at right angles"),
    ("rectangle", [["a", 1], [5, 5]], "[['a', 1], [5, 5]] are not pairs of numbers x, y"),
    ("polygon", [[1, 1], [5], [5, 5]], "[[1, 1], [5], [5, 5]] are not pairs of numbers x, y")])
def test_a_shape_that_cannot_be_drawn_is_named(tmp_path, capsys, kind, points, reason):
    save_images(tmp_path, "p0.png")
    labelme(tmp_path, "p0", [("cat", BOX, kind, {"points": points, "mask": "abc"}), ("cat", BOX, "polygon")])
    assert convert("labelme", tmp_path, "--to", "masks", "--output-dir", tmp_path / "data")["objects"] == {"cat": 1}
    assert note(capsys, "objects with shapes that cannot be used: 1 (shapes[0] of", reason)


def test_ignored_areas_are_no_class_but_void_in_voc(tmp_path, capsys):
    save_images(tmp_path, "p0.png", "p1.png")
    labelme(tmp_path, "p0", [("cat", BOX, "polygon"), ("__ignore__", [10, 10, 30, 10, 30, 20, 10, 20], "polygon")])
    labelme(tmp_path, "p1", [("__ignore__", BOX, "polygon"), ("_background_", FAR_BOX, "polygon")])
    found = convert("labelme", tmp_path, "--to", "masks", "voc", "npy", "coco", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"cat": 1} and note(capsys, "images without an object: 1 (p1.png)")
    box, ignored = rectangle(4, 6, 14, 16), rectangle(10, 10, 30, 20)
    label, = read(tmp_path / "data" / VOC / "SegmentationClass", "p0.png")
    ids, = read(tmp_path / "data" / VOC / "SegmentationObject", "p0.png")
    assert (label == box + 255 * (ignored & ~box)).all() and (ids == label).all()
    assert (np.load(tmp_path / "data/gts/p0.npy") == box).all()
    assert sorted(path.name for path in (tmp_path / "data/masks").iterdir()) == ["0", "classes.txt"]
    annotations = json.loads((tmp_path / "data/annotations.json").read_text())["annotations"]
    assert [annotation["category_id"] for annotation in annotations] == [1]


def test_numbers_may_be_text(tmp_path):
    """Ids, sizes, group_id and iscrowd, as some tools write them."""
    save_images(tmp_path, "p0.png")
    triangle = {"size": ["48", "60"], "counts": encode(lower_triangle())["counts"]}
    path = coco(tmp_path, [(0, "5", [BOX]), ("0", 10, triangle),
                           (0, 5, encode(rectangle(50, 0, 60, 10)), {"iscrowd": "1"})],
                categories=[("10", "dog"), ("5", "cat"), ("x", "cow")], width="60", height="48")
    found = convert("coco", path, "--to", "voc", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"cat": 2, "dog": 1, "cow": 0}  # by id
    label, = read(tmp_path / "data" / VOC / "SegmentationClass", "p0.png")
    assert (label == rectangle(4, 6, 14, 16) + 2 * lower_triangle() + 255 * rectangle(50, 0, 60, 10)).all()
    labelme(tmp_path / "l", "p0", [("cat", BOX, "polygon", {"group_id": "1"}),
                                   ("cat", FAR_BOX, "polygon", {"group_id": 1})], imageWidth="60", imageHeight="48")
    save_images(tmp_path / "l", "p0.png")
    assert convert("labelme", tmp_path / "l", "--to", "npy", "--output-dir", tmp_path / "data")["objects"] == {"cat": 1}


@pytest.mark.parametrize("file, listed", [("a b.png", "a%20b.png"), ("a b.png", "http://host/x%20y/a%20b.png"),
                                          ("x y/a.png", "x%20y/a.png"), ("a%20b.png", "a%20b.png")])
def test_a_file_name_of_a_url_is_found(tmp_path, file, listed):
    save_images(tmp_path / "in", file)
    path = coco(tmp_path, [(0, 5, [BOX])], [listed])
    convert("coco", path, "--images", tmp_path / "in", "--to", "masks", "--output-dir", tmp_path / "1")
    assert (read(tmp_path / "1/masks/0", next((tmp_path / "1/images").iterdir()).name)[0] > 0).sum() == 0
    assert (read(tmp_path / "1/masks/1", next((tmp_path / "1/images").iterdir()).name)[0] > 0).sum() == 100
    labelme(tmp_path / "labels", "p0", [("cat", BOX, "polygon")], listed)
    save_images(tmp_path / "labels", file)
    convert("labelme", tmp_path / "labels", "--to", "masks", "--output-dir", tmp_path / "2")
    assert (read(tmp_path / "2/masks/0", next((tmp_path / "2/images").iterdir()).name)[0] > 0).sum() == 100


@pytest.mark.parametrize("word, taken", [
    ("1", True), ("1.0", True), ("1.000000e+00", True), ("01", True), ("1.5", False), ("-1", False), ("0_1", False),
    ("nan", False), ("inf", False), ("2", False)])
def test_yolo_classes_may_be_written_as_floats(tmp_path, capsys, word, taken):
    source = yolo(tmp_path / "set", [f"{word} {outline(BOX)}", f"0 {outline(FAR_BOX)}"])
    found = convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"cat": 1, "dog": int(taken)}
    assert note(capsys, "lines without a class of 0 to 1, left out: 1", f"p0.txt: {word} ") == (not taken)


def test_confidences_and_boxes_are_said(tmp_path, capsys):
    source = yolo(tmp_path / "set", [f"0 {outline(BOX)} 0.9", "1 0.5 0.5 0.2 0.2 0.9"])
    with pytest.raises(utils.InputError, match="set: dog: has only boxes, no polygons; export polygons"):
        convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "data")
    out = capsys.readouterr().out
    assert "cannot be used: 1 (line 1 of" in out and "9 numbers are no pairs x y; if the last is a confid" in out
    assert "note: boxes of dog, no polygons, left out (predict.py --prompts makes masks of boxes): 1 (line 2 of" in out
    save_images(tmp_path, "p0.png")
    box = {"bbox": [4, 6, 10, 10]}
    path = coco(tmp_path, [(0, 5, [], box), (0, 5, [[]], box), (0, 5, None, box), (0, 5, [BOX], box)])
    assert convert("coco", path, "--to", "npy", "--output-dir", tmp_path / "data")["objects"] == {"cat": 1, "dog": 0}
    assert note(capsys, "boxes of cat, no polygons", ": 3 (annotation 1 of p0.png; annotation 2 of p0.png; ...)")


@pytest.mark.parametrize("kind", ["yolo", "coco"])
def test_a_class_that_has_only_boxes_is_refused(tmp_path, kind):
    """As of a detector's labels; a class without any object is none of these."""
    if kind == "yolo":
        lines = [f"1 {outline(BOX)}", "0 0.5 0.5 0.2 0.2", "2 0.5 0.5 0.2 0.2"]
        source = yolo(tmp_path / "set", lines, "cat,dog,cow,x")
    else:
        save_images(tmp_path, "p0.png")
        box = {"bbox": [4, 6, 10, 10]}
        source = coco(tmp_path, [(0, 2, [BOX]), (0, 1, [], box), (0, 3, [], box)],
                      categories=[(1, "cat"), (2, "dog"), (3, "cow"), (4, "x")])
    words = [kind, source, "--to", "masks", "--output-dir", tmp_path / "data"]
    with pytest.raises(utils.InputError, match=": cat, cow: has only boxes, .* leave the class out with --classes$"):
        convert(*words)
    with pytest.raises(utils.InputError, match=r"masks: no class would belong to the folders \[2, 3\]; move them away"):
        convert(*words, "--classes", "dog,x", "--overwrite")
    shutil.rmtree(tmp_path / "data")
    assert convert(*words, "--classes", "dog,x")["objects"] == {"dog": 1, "x": 0}


# --- A folder per image ---

def dsb(folder, *masks, name="p0", image="p0.png"):
    """A folder of the 2018 Data Science Bowl's kind: one image, a mask for each nucleus."""
    save_images(folder / name / "images", image)
    (folder / name / "masks").mkdir()
    for k, mask in enumerate(masks):
        utils.save_image(folder / name / f"masks/{k}f.png", mask * np.uint8(255))
    return folder


def test_nuclei_of_a_folder_per_image_to_the_pixel(tmp_path, capsys):
    first, second, inner = rectangle(4, 6, 14, 16), rectangle(10, 10, 30, 20), rectangle(20, 12, 24, 16)
    source = dsb(tmp_path / "set", first, second | rectangle(50, 40, 52, 42), inner, ~rectangle(0, 0, 60, 48))
    dsb(source, name="v1.2", image="x.tif")
    (source / "v1.2/masks/.DS_Store").write_bytes(b"x")
    for name in ("v1.2/extra", "other/images", ".hidden/masks", "no image/masks", "empty/masks", "empty/images"):
        (source / name).mkdir(parents=True)
    (source / "stage1_train_labels.csv").write_text("ImageId\n")
    image = np.dstack([np.random.default_rng(0).integers(0, 256, (*SIZE, 3)), np.zeros(SIZE)]).astype(np.uint8)
    Image.fromarray(image).save(source / "p0/images/p0.png")  # transparent everywhere
    found = convert("dsb", source, "--to", "masks", "voc", "npy", "coco", "--output-dir", tmp_path / "data")
    assert found == {"images": 2, "objects": {"nucleus": 3}}
    data, both = tmp_path / "data", second | rectangle(50, 40, 52, 42)
    assert (read(data / "masks/0", "p0.png")[0] == 255 * (first | both)).all()
    ids = np.load(data / "gts/p0.npy")  # where they overlap, the smaller one
    assert (ids == np.where(inner, 3, np.where(first, 1, both * 2))).all()
    assert (np.load(data / "imgs/p0.npy") == image[..., :3]).all()
    assert (read(data / VOC / "SegmentationClass", "p0.png")[0] == (first | both)).all()
    assert not read(data / "masks/0", "v1.2.png")[0].any() and (data / "images/v1.2.tif").is_file()
    assert (data / "masks/classes.txt").read_text() == "nucleus\n"
    text = json.loads((data / "annotations.json").read_text())
    assert [one["file_name"] for one in text["images"]] == ["p0/images/p0.png", "v1.2/images/x.tif"]
    out = capsys.readouterr().out
    assert "note: images without masks/, left out (an empty one says: no object): 1 (" in out and "set/other)" in out
    assert "images that are not there, left out: 2 (empty/images; no image/images)" in out
    assert "objects that cover no pixel, left out: 1 (" in out and "masks/3f.png)" in out
    assert "images without an object: 1 (v1.2/images/x.tif)" in out and ".hidden" not in out


@pytest.mark.parametrize("case, message", [
    ("size", "p0/masks/1f.png and .*p0/images/p0.png differ in size; save them at one size$"),
    ("two", "p0/images/q.jpg: a second image beside p0.png; keep the one that the masks are of$"),
    ("ids", "p0/masks/0f.png: has values 0, 1 ...; a mask holds 0 .* and 255"),
    ("cut", "p0/masks/0f.png: truncated or unreadable"),
    ("above", "above: no folder in it has images/ and masks/; give one that holds a folder per image"),
    ("images", "--images: those of dsb are in INPUT; leave it out$"),
    ("masks", r"set: has no masks/, but its parts have; .* \(dsb, if each has one image\): .*/p0, .*/p1, .*/p2 ...$")])
def test_a_folder_per_image_that_cannot_be(tmp_path, case, message):
    source, kind, options, masks = tmp_path / "above/set", "dsb", [], tmp_path / "above/set/p0/masks"
    for k in range(4):
        dsb(source, rectangle(4, 6, 14, 16), name=f"p{k}")
    if case == "size":
        utils.save_image(masks / "1f.png", np.zeros((24, 30), np.uint8))
    elif case == "two":
        save_images(source, "p0/images/q.jpg")
    elif case == "ids":
        utils.save_image(masks / "0f.png", rectangle(4, 6, 14, 16) * np.uint8(1))
    elif case == "cut":
        (masks / "0f.png").write_bytes((masks / "0f.png").read_bytes()[:60])
    elif case == "above":
        source = tmp_path / "above"
    elif case == "images":
        options = ["--images", source]
    elif case == "masks":
        kind = "masks"
    with pytest.raises(utils.InputError, match=message):
        convert(kind, source, *options, "--to", "masks", "--output-dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_real_nuclei_of_a_folder_per_image(real_data, tmp_path):
    """As another program made masks of the same images."""
    found = convert("dsb", real_data / "dsb2018_raw/stage1_train", "--to", "masks", "npy", "--output-dir", tmp_path)
    assert found == {"images": 12, "objects": {"nucleus": 427}}
    for path in (tmp_path / "masks/0").iterdir():
        assert (utils.read_mask(path) == utils.read_mask(real_data / f"nuclei/masks/0/{path.stem[:12]}.png")).all()
        count = len([*(real_data / f"dsb2018_raw/stage1_train/{path.stem}/masks").iterdir()])
        assert len(np.unique(np.load(tmp_path / f"gts/{path.stem}.npy"))) == 1 + count


@pytest.mark.parametrize("counts", [[0.5, 2879.5], ["2880"], [[2880]], [-1, 2881], {"a": 1}, [1], "", None, 5])
def test_run_lengths_that_are_none_are_said_without_numpy(tmp_path, capsys, counts):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, {"size": [48, 60], "counts": counts}), (0, 5, [BOX])])
    assert convert("coco", path, "--to", "masks", "--output-dir", tmp_path / "data")["objects"]["cat"] == 1
    text = capsys.readouterr().out
    assert "objects with shapes that cannot be used: 1 (annotation 1 of p0.png: " in text
    assert not any(word in text for word in ("array", "ufunc", "np.", "dtype", "OpenCV", "cast"))


@pytest.mark.parametrize("kind", ["yolo", "masks"])
def test_a_data_set_in_parts_names_the_parts(tmp_path, kind):
    """As Roboflow exports it: train/, valid/ and test/ beside data.yaml."""
    for part in ("train", "valid", "test"):
        if kind == "yolo":
            yolo(tmp_path / "set" / part, [f"1 {outline(BOX)}"])
            (tmp_path / "set" / part / "classes.txt").unlink()
        else:
            (tmp_path / "set" / part).mkdir(parents=True)
            masks_folder(tmp_path / "set" / part, rectangle(4, 6, 14, 16) * np.uint8(255))
    (tmp_path / "set/data.yaml").write_text("train: ../train/images\nnc: 2\nnames: ['cat', 'dog']\n")
    (tmp_path / "set/README.roboflow.txt").write_text("1 image\n")
    folder = "labels" if kind == "yolo" else "masks"
    with pytest.raises(utils.InputError, match=f"set: has no {folder}/, but its parts have; convert each on its own.*: "
                                               ".*set/test, .*set/train, .*set/valid$"):
        convert(kind, tmp_path / "set", "--to", "coco", "--output-dir", tmp_path / "data")
    found = convert(kind, tmp_path / "set/valid", "--to", "coco", "--output-dir", tmp_path / "data")
    assert found["objects"] == ({"cat": 0, "dog": 1} if kind == "yolo" else {"masks": 1})


def test_a_stray_json_is_left_out(tmp_path, capsys):
    save_images(tmp_path, "p0.png")
    labelme(tmp_path, "p0", [("cat", BOX, "polygon")])
    for name, content in (("a", {"categories": [], "images": []}), ("z", [1, 2])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert convert("labelme", tmp_path, "--to", "masks", "--output-dir", tmp_path / "data")["images"] == 1
    assert note(capsys, "json files that are not LabelMe's, left out: 2 (", "a.json; ", "z.json")


# --- Masks -> COCO ---

def decode(annotation, size=SIZE):
    segmentation, mask = annotation["segmentation"], np.zeros(size, bool)
    for shape in segmentation if isinstance(segmentation, list) else [segmentation]:
        convert_labels.draw_coco(shape, mask)
    return mask


@pytest.mark.parametrize("rle", [True, False])
def test_coco_to_masks_to_coco_keeps_the_areas(tmp_path, rle):
    save_images(tmp_path, "p0.png", "p1.png")
    ring = rectangle(25, 5, 45, 25) & ~rectangle(30, 10, 40, 20)
    second = encode(ring if rle else rectangle(25, 5, 45, 25))
    path = coco(tmp_path, [(0, 5, [BOX]), (0, 5, [FAR_BOX]), (0, 3, [TRIANGLE]), (1, 3, second)], ["p0.png", "p1.png"])
    convert("coco", path, "--to", "masks", "coco", *["--rle"] * rle, "--output-dir", tmp_path / "data")
    convert("masks", tmp_path / "data", "--to", "coco", *["--rle"] * rle, "--output-dir", tmp_path / "back")
    one, two = [json.loads((tmp_path / name / "annotations.json").read_text()) for name in ("data", "back")]
    assert one["images"] == two["images"] and one["categories"] == two["categories"] == [
        {"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    keys = [sorted((a["image_id"], a["category_id"], a["area"], tuple(a["bbox"])) for a in found["annotations"])
            for found in (one, two)]
    assert keys[0] == keys[1] and len(keys[0]) == 4
    assert {area for _, _, area, _ in keys[0]} == {100, lower_triangle().sum(), 300 if rle else 400}
    for found in (one, two):
        for annotation in found["annotations"]:
            mask = decode(annotation)
            assert mask.sum() == annotation["area"] and isinstance(annotation["segmentation"], dict) == rle


def test_a_small_crowd_lies_below_a_large_object(tmp_path):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX]), (0, 5, encode(rectangle(6, 8, 20, 12)), {"iscrowd": 1})])
    convert("coco", path, "--classes", "cat", "--to", "voc", "--output-dir", tmp_path / "data")
    label, = read(tmp_path / "data" / VOC / "SegmentationClass", "p0.png")
    assert (label == rectangle(4, 6, 14, 16) + 255 * rectangle(14, 8, 20, 12)).all()


def test_crowds_stay_crowds_in_coco(tmp_path):
    save_images(tmp_path, "p0.png")
    crowd = rectangle(3, 3, 30, 9) | rectangle(40, 20, 50, 30)
    path = coco(tmp_path, [(0, 5, encode(crowd, True), {"iscrowd": 1}), (0, 3, [BOX])])
    convert("coco", path, "--to", "coco", "--output-dir", tmp_path / "data")
    first, second = json.loads((tmp_path / "data/annotations.json").read_text())["annotations"]
    assert first["iscrowd"] == 1 and (decode(first) == crowd).all() and second["iscrowd"] == 0


def test_annotate_takes_parts_or_one_object_with_its_score():
    ring = rectangle(25, 5, 45, 25) & ~rectangle(30, 10, 40, 20) | rectangle(2, 2, 4, 4)
    annotations = []
    convert_labels.annotate(annotations, None, 1, 2, ring)
    convert_labels.annotate(annotations, "rle", 1, 2, np.zeros(SIZE, bool))
    assert annotations == []
    convert_labels.annotate(annotations, "rle", 1, 2, ring)
    convert_labels.annotate(annotations, "polygon", 3, 1, ring, 0.5)
    assert [(a["id"], a["image_id"], a["area"], a.get("score")) for a in annotations] == [
        (1, 1, 4, None), (2, 1, 300, None), (3, 3, 304, 0.5)]
    assert (decode(annotations[0]) | decode(annotations[1]) == ring).all()
    assert (decode(annotations[2]) == rectangle(25, 5, 45, 25) | rectangle(2, 2, 4, 4)).all()  # no hole
    small = convert_labels.polygons(np.ones((1, 1), bool), 5, 7)
    assert sorted(zip(*[iter(small[0])] * 2)) == [(5, 7), (5, 8), (6, 7), (6, 8)]
    assert json.dumps(annotations)


# --- Layouts and names ---

def check_loaders(data, num_classes, count):
    small = {train_unet: ["--num-classes", num_classes, "--image-size", "32"],
             train_deeplabv3: ["--num-classes", num_classes, "--base-size", "32", "--crop-size", "32", "-b", "2"],
             train_efficientsam: ["--image-size", "64"]}
    for script, options in small.items():
        words = ["--data-path", data, "-j", "0", "--device", "cpu", *options]
        args = script.get_args_parser().parse_args([*map(str, words)])
        train_loader, val_loader = script.create_loaders(args)[:2]
        assert len(train_loader.dataset) + len(val_loader.dataset) == count and next(iter(train_loader))


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_the_three_layouts_in_one_folder_are_read_by_the_scripts(tmp_path, capsys, kind):
    names = [f"p{i}.png" for i in range(6)]
    save_images(tmp_path / "in", *names)
    if kind == "coco":
        source = coco(tmp_path, [(i, category, shape) for i in range(6) for category, shape in (
            (5, [TRIANGLE, BOX]), (3, [FAR_BOX]))], names)
    else:
        source = tmp_path / "labels"
        for name in names:
            labelme(source, name[:-4], [("cat", TRIANGLE, "polygon"), ("dog", FAR_BOX, "polygon")], f"..\\in\\{name}")
    convert(kind, source, "--images", tmp_path / "in", "--to", "masks", "voc", "npy", "--output-dir", tmp_path / "data")
    check_loaders(tmp_path / "data", 2, 6)
    lists = [(tmp_path / "data" / VOC / f"ImageSets/Segmentation/{part}.txt").read_text().split()
             for part in ("train", "val")]
    assert lists == [["p1", "p2", "p3", "p4"], ["p0", "p5"]]
    assert "6 images, 12 objects (" in capsys.readouterr().out


def test_train_and_val_json_fill_one_voc_folder(tmp_path):
    for part, share in (("train", 0), ("val", 1)):
        folder = tmp_path / part
        save_images(folder, *[f"{part}{i}.jpg" for i in range(3)])
        path = coco(folder, [(i, 5, [BOX]) for i in range(3)], [f"{part}{i}.jpg" for i in range(3)])
        convert("coco", path, "--to", "voc", "--val", share, "--overwrite", share, "--output-dir", tmp_path / "data")
    for part in ("train", "val"):
        text = (tmp_path / "data" / VOC / f"ImageSets/Segmentation/{part}.txt").read_text()
        assert text == "".join(f"{part}{i}\n" for i in range(3))


@pytest.mark.parametrize("layout, file", [("voc", f"{VOC}/class_names.json"), ("masks", "masks/classes.txt")])
def test_what_fills_one_folder_has_one_list_of_classes(tmp_path, layout, file):
    categories = [(1, "cat"), (2, "dog"), (3, "cow")]

    def fill(part, names, *more):
        folder = tmp_path / f"{part}{len(names)}"
        save_images(folder, f"{part}.jpg")
        chosen = [category for category in categories if category[1] in names]
        path = coco(folder, [(0, chosen[-1][0], [BOX])], [f"{part}.jpg"], categories=chosen)
        return convert("coco", path, "--to", layout, "--output-dir", tmp_path / "data", *more)
    fill("train", ["dog"])
    with pytest.raises(utils.InputError, match=f"{file}: the masks already there have other classes"):
        fill("val", ["cat", "dog"], "--overwrite")
    fill("train", ["cat", "dog"], "--overwrite")  # all masks are new
    before = (tmp_path / "data" / file).read_bytes()
    (tmp_path / "data" / file).write_bytes(before.replace(b"\n", b"\r\n").replace(b"{", b"{\r\n "))  # by an editor
    with pytest.raises(utils.InputError, match='give --classes "cat,dog", or another'):
        fill("val", ["dog"], "--overwrite")
    fill("val", ["dog"], "--overwrite", "--classes", "cat,dog")
    assert (tmp_path / "data" / file).read_bytes() == before
    if layout == "masks":
        with pytest.raises(utils.InputError, match="the masks already there have other classes"):
            fill("val", ["cat", "dog", "cow"], "--overwrite")  # masks/2 would lack train.png
        shutil.rmtree(tmp_path / "data/images")
        for number in "01":
            (tmp_path / f"data/masks/{number}/val.png").unlink()
        with pytest.raises(utils.InputError, match=r"no class would belong to the folders \[1\]"):
            fill("train", ["dog"], "--overwrite")
    else:
        for text in ('{"background": 0, "cat": 1, "dog": 3}', '{"cat": 0, "dog": 1}', "", '["cat"]'):
            (tmp_path / "data" / file).write_text(text)
            with pytest.raises(utils.InputError, match="already there have other classes, .*; give another --output"):
                fill("val", ["cat", "dog"], "--overwrite")
        (tmp_path / "data" / file).write_bytes(before)
        with pytest.raises(utils.InputError, match='give --classes "cat,dog,cow", or another'):
            fill("val", ["cow"], "--overwrite")
        fill("val", ["cat", "dog", "cow"], "--overwrite")
        assert (tmp_path / "data" / file).read_bytes().startswith(before.rstrip(b"}"))


def test_labels_of_keypoints_and_masks_beside_folders_are_refused(tmp_path):
    source = yolo(tmp_path / "set", ["0 .5 .5 .4 .4 .3 .3 .7 .3"], "names: [cat]\nkpt_shape: [2, 2]\n")
    for _ in range(2):
        with pytest.raises(utils.InputError, match="data.yaml: labels of keypoints .*; export polygons"):
            convert("yolo", source, "--to", "masks", "--output-dir", tmp_path / "data")
        (source / "classes.txt").write_text("cat\n")
    for name in ("masks/p0.png", "masks/backup/p0.png"):
        save_images(tmp_path / "in", "images/p0.png", name)
    with pytest.raises(utils.InputError, match="masks/p0.png: lies beside class folders"):
        convert("masks", tmp_path / "in", "--to", "voc", "--output-dir", tmp_path / "data")


def test_names_agree_with_spaces_folders_backslashes_and_equal_stems(tmp_path):
    files = ["a b.png", "sub/a b.png", "sub/x.jpg", "other/x.jpg", "x.JPG", "x.bmp", "深 度.png", "x_2.png",
             "v1.2.png", "V1.2.tif"]
    save_images(tmp_path / "in", *files)
    listed = [file.replace("/", "\\") for file in files]
    listed[2] = "sub/x.jpg"
    path = coco(tmp_path, [(i, 5, [BOX]) for i in range(len(files))], listed)
    convert("coco", path, "--images", tmp_path / "in", "--to", "masks", "voc", "npy", "--output-dir", tmp_path / "data")
    voc, data = tmp_path / "data" / VOC, tmp_path / "data"
    ids = [line for part in ("train", "val") for line in (
        voc / f"ImageSets/Segmentation/{part}.txt").read_text(encoding="utf-8").splitlines()]
    assert len(ids) == len(files) == len({name.casefold() for name in ids})
    assert {"a b", "sub_a b", "sub_x", "other_x", "x", "x_2", "x_2_2", "深 度", "V1.2", "v1.2_2"} == set(ids)
    for folder in (data / "images", data / "masks/0", voc / "JPEGImages", voc / "SegmentationClass",
                   voc / "SegmentationObject", data / "imgs", data / "gts"):
        assert {path.stem for path in folder.iterdir()} == set(ids)
    assert {path.suffix for path in (data / "images").iterdir()} == {".png", ".jpg", ".JPG", ".bmp", ".tif"}
    for name in ("sub_a b", "a b"):  # image and mask belong together
        number = files.index(name.replace("_", "/") + ".png")
        assert (np.load(data / f"imgs/{name}.npy") == 90 + number).all()


@pytest.mark.parametrize("listed, stem", [("C:\\Users\\me\\a b.png", "a b"), ("/home/me/a b.png", "a b"),
                                          ("../in/a b.png", "in_a b"), ("./a b.png", "a b")])
def test_paths_of_another_computer_are_found_and_written_in_the_folder(tmp_path, listed, stem):
    save_images(tmp_path / "in", "a b.png")
    path = coco(tmp_path, [(0, 5, [BOX])], [listed])
    convert("coco", path, "--images", tmp_path / "in", "--to", "masks", "--output-dir", tmp_path / "data")
    assert [file.name for file in (tmp_path / "data/images").iterdir()] == [f"{stem}.png"]


def test_names_are_one_line_of_a_list(tmp_path):
    for name in ("a\nb.png", "c\u2028d.png", "  e .png"):
        save_images(tmp_path / "in", name)
    path = coco(tmp_path, [(i, 5, [BOX]) for i in range(3)], ["a\nb.png", "c\u2028d.png", "  e .png"],
                [(5, "big\ncat"), (3, "dog")])
    convert("coco", path, "--images", tmp_path / "in", "--to", "voc", "masks", "--val", 0,
            "--output-dir", tmp_path / "data")
    ids = (tmp_path / "data" / VOC / "ImageSets/Segmentation/train.txt").read_text().splitlines()
    assert sorted(ids) == ["a_b", "c_d", "e"]
    assert {path.stem for path in (tmp_path / "data" / VOC / "JPEGImages").iterdir()} == set(ids)
    assert (tmp_path / "data/masks/classes.txt").read_text().splitlines() == ["dog", "big cat"]


@pytest.mark.parametrize("name", [
    " a", "a ", "\u00a0a\u00a0", "\u3000a", "a\x85b", "a\nb", "a\u2028b", "\ufeffa", "e\u0301", "#a", "a\tb", "a\x1cb",
    ".a.", "a\\b", "\u200ba", " "])
def test_a_name_in_a_list_is_read_back_from_it(tmp_path, name):
    save_images(tmp_path / "in", f"{name}.png", "b.png")
    category = name if name.strip() else "x"
    path = coco(tmp_path, [(0, 5, [BOX])], [f"{name}.png", "b.png"], [(5, category), (3, "dog")])
    if "\\" in name:
        (tmp_path / "in" / f"{name}.png").rename(tmp_path / "in/b_.png")  # Windows' folder a
        save_images(tmp_path / "in/a", "b.png")
    convert("coco", path, "--images", tmp_path / "in", "--to", "voc", "masks", "--output-dir", tmp_path / "data")
    voc = tmp_path / "data" / VOC
    lists = [utils.read_lines(voc / f"ImageSets/Segmentation/{part}.txt") for part in ("train", "val")]
    listed = [*lists[0], *lists[1]]
    assert len(listed) == 2 and sorted(listed) == sorted(utils.list_images(voc / "JPEGImages"))
    classes = utils.read_lines(tmp_path / "data/masks/classes.txt")
    assert classes == [*json.loads((voc / "class_names.json").read_text(encoding="utf-8"))][1:]
    counts = convert("masks", tmp_path / "data", "--to", "coco", "--output-dir", tmp_path / "back")["objects"]
    assert list(counts) == classes and counts[classes[-1]] == 1


def test_images_are_copied_or_made_png_and_rotated_ones_agree_with_their_masks(tmp_path):
    save_images(tmp_path, "a.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = np.zeros((*SIZE[::-1], 3), np.uint8)  # as it is seen, 60 high
    Image.fromarray(np.rot90(tall)).save(tmp_path / "b.jpg", exif=exif)
    np.save(tmp_path / "c.npy", np.full((*SIZE, 3), 7, np.uint8))
    path = coco(tmp_path, [(i, 5, [BOX]) for i in range(3)], ["a.webp", "b.jpg", "c.npy"], width=None, height=None)
    convert("coco", path, "--classes", "cat", "--to", "masks", "npy", "--output-dir", tmp_path / "data")
    images = tmp_path / "data/images"
    assert {file.name for file in images.iterdir()} == {"a.webp", "b.jpg", "c.png"}
    assert (images / "b.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    assert (utils.read_image(images / "c.png") == 7).all()
    assert utils.read_image(images / "b.jpg").shape[:2] == (60, 48) == np.load(tmp_path / "data/imgs/b.npy").shape[:2]
    assert (read(tmp_path / "data/masks/0", "b.png")[0] == 255 * rectangle(4, 6, 14, 16, (60, 48))).all()


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_masks_are_turned_where_the_json_has_the_size_before_exif_rotation(tmp_path, capsys, orientation):
    exif, stored = Image.Exif(), np.zeros((*SIZE, 3), np.uint8)
    exif[0x0112] = orientation
    stored[6:16, 4:14] = 255  # BOX, in white
    Image.fromarray(stored).save(tmp_path / "p0.png", exif=exif)
    path = coco(tmp_path, [(0, 5, [BOX]), (0, 3, encode(rectangle(20, 0, 60, 5)))])
    convert("coco", path, "--to", "masks", "--output-dir", tmp_path / "data")
    image = utils.read_image(tmp_path / "data/images/p0.png")
    assert image.shape[:2] == (SIZE if orientation == 1 else SIZE[::-1])
    dog, cat = [read(tmp_path / f"data/masks/{k}", "p0.png")[0] for k in range(2)]
    assert (cat == image[..., 0]).all() and (dog > 0).sum() == 200
    assert note(capsys, "images annotated before EXIF rotation") == (orientation > 1)


def test_more_than_254_objects_and_classes(tmp_path, capsys):
    save_images(tmp_path, "p0.png")
    pixels = [(k % 60, k // 60) for k in range(300)]
    path = coco(tmp_path, [(0, 5, [[x, y, x + 1, y, x + 1, y + 1, x, y + 1]]) for x, y in pixels])
    convert("coco", path, "--to", "voc", "npy", "--output-dir", tmp_path / "data")
    ids, = read(tmp_path / "data" / VOC / "SegmentationObject", "p0.png")
    assert len(np.unique(ids)) == 301 and not (ids == 255).any() and ids.dtype == np.uint16
    assert (np.load(tmp_path / "data/gts/p0.npy") == ids).all() and note(capsys, "more than 254 objects", "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX])], categories=[(k, f"c{k}") for k in range(255)])
    with pytest.raises(utils.InputError, match="255 classes; one is needed, voc can hold 254: choose with --classes"):
        convert("coco", path, "--to", "voc", "--output-dir", tmp_path / "other")
    convert("coco", path, "--to", "voc", "--classes", "c5,c6", "--output-dir", tmp_path / "other")


def test_nothing_is_overwritten_or_written_over_what_is_read(tmp_path):
    save_images(tmp_path / "in/images", "p0.png", "p1.png")
    path = coco(tmp_path, [(0, 5, [BOX])], ["p0.png", "p1.png"])
    words = ["coco", path, "--images", tmp_path / "in/images", "--output-dir", tmp_path / "data", "--to"]
    convert(*words, "masks")
    before = {file: file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file()}
    for layouts, name in ((["masks"], "images"), (["voc", "masks"], "images")):
        with pytest.raises(utils.InputError, match=f"data/{name}: exists; give --overwrite or another --output-dir"):
            convert(*words, *layouts)
    assert {file: file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file()} == before
    convert(*words, "voc", "npy", "coco")  # further layouts may go beside it
    convert(*words, "masks", "voc", "npy", "coco", "--overwrite")
    for layout, out, target in (("masks", "in", "images"), ("coco", ".", "annotations.json")):
        with pytest.raises(utils.InputError, match=f"{target}: would be written, and is read"):
            convert(*words[:4], "--output-dir", tmp_path / out, "--to", layout, "--overwrite")
    with pytest.raises(utils.InputError, match="would be written, and is read"):
        convert("masks", tmp_path / "data", "--to", "masks", "--output-dir", tmp_path / "data", "--overwrite")


def test_limit_takes_the_first_images(tmp_path):
    save_images(tmp_path, "p0.png", "p1.png", "p2.png")
    path = coco(tmp_path, [(i, 5, [BOX]) for i in range(3)], ["p2.png", "p0.png", "p1.png"])
    assert convert("coco", path, "--to", "masks", "--limit", 2, "--output-dir", tmp_path / "data")["images"] == 2
    assert {file.name for file in (tmp_path / "data/images").iterdir()} == {"p0.png", "p1.png"}


# --- Mistakes ---

def test_the_odd_case_of_the_project(tmp_path, capsys):
    """A space in the name, an empty and a flat segmentation beside a good one."""
    save_images(tmp_path, "a b.png", size=(40, 40))
    shapes = [], [4, 4, 20, 4, 20, 20], [[4, 4, 20, 4, 20, 20, 4, 20]]
    (tmp_path / "odd.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a b.png", "width": 40, "height": 40}],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"id": k, "image_id": 1, "category_id": 5, "segmentation": shape}
                        for k, shape in enumerate(shapes, 1)]}))
    convert("coco", tmp_path / "odd.json", "--to", "voc", "--output-dir", tmp_path / "data")
    label, = read(tmp_path / "data" / VOC / "SegmentationClass", "a b.png")
    assert (label == rectangle(4, 4, 20, 20, (40, 40))).all()
    assert (tmp_path / "data" / VOC / "ImageSets/Segmentation/val.txt").read_text() == "a b\n"
    assert note(capsys, "objects with shapes that cannot be used: 2", "annotation 1 of a b.png: [] is not",
                "annotation 2 of a b.png: 4 is not a polygon")


def test_what_cannot_be_used_is_counted_and_the_first_are_named(tmp_path, capsys):
    save_images(tmp_path, "p0.png")
    good, bad = {"size": [*SIZE], "counts": [0, SIZE[0] * SIZE[1]]}, {"size": [9, 9], "counts": [81]}
    path = coco(tmp_path, [
        (0, 5, [BOX]), (7, 5, [BOX]), (0, 99, [BOX]), (0, 3, [BOX]), (0, 5, [[3, 9, 30, 9, 50, 9]]), (0, 5, bad),
        (0, 5, {**good, "counts": [5]}), (0, 5, {**good, "counts": "~~"}), (0, 5, None), (0, 5, [["a"] * 6]),
        (0, 5, [[1, 2, 3, 4, 5]]), (0, 5, [[1, 2, 3, 4]]), (0, 5, [[float("nan")] * 6])], ["p0.png", "gone.png"])
    found = convert("coco", path, "--classes", "cat", "--to", "masks", "--output-dir", tmp_path / "data")
    assert found["objects"] == {"cat": 1}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for words in ("annotations of an unknown image or category, left out: 2 (annotation 2; annotation 3)",
                  "images that are not there, left out: 1 (gone.png)", "objects of other classes, left out: 1 (dog)",
                  "objects that cover no pixel, left out: 1 (annotation 5 of p0.png)",
                  "objects with shapes that cannot be used: 8 (annotation 6 of p0.png: run lengths of size [9, 9]"):
        assert any(words in line for line in lines), words
    assert len(lines) == 5


def test_one_bad_part_leaves_the_others_of_the_object(tmp_path):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX, [1, 2, 3, 4]])])
    words = "--classes", "cat", "--to", "masks", "--output-dir", tmp_path / "data"
    assert convert("coco", path, *words)["objects"] == {"cat": 1}
    assert (read(tmp_path / "data/masks/0", "p0.png")[0] > 0).sum() == 100


def wrong_inputs():
    """{name: (kind, what lays the input, what the line says)}"""
    def spoilt(**changes):
        def lay(folder):
            path = coco(folder, [(0, 5, [BOX])])
            found = json.loads(path.read_text())
            path.write_text(json.dumps({**found, **changes}))
            return path
        return lay

    def labels(**changes):
        def lay(folder):
            labelme(folder / "labels", "p0", [("cat", BOX, "polygon")], "../p0.png")
            path = folder / "labels/p0.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
            return folder / "labels"
        return lay

    def text(content, name="annotations.json"):
        def lay(folder):
            (folder / name).write_bytes(content)
            return folder / name
        return lay

    def yolo(folder):
        (folder / "set").mkdir()
        (folder / "set/p0.txt").write_text("0 0 0 1 1 0 1\n")
        save_images(folder / "set", "p0.png")
        return folder / "set"

    def yolo_gap(folder):
        (yolo(folder) / "data.yaml").write_text("names:\n  1: cat\n  2: dog\n")
        return folder / "set"

    image = {"id": 0, "file_name": "p0.png"}
    return {
        "size": ("coco", spoilt(images=[{**image, "width": 60, "height": 40}]),
                 r"annotations.json: p0.png: width x height is 60 x 40, but .*p0.png has 60 x 48; give the image"),
        "turned": ("coco", spoilt(images=[{**image, "width": 48, "height": 60}]),
                   "annotations.json: p0.png: width x height is 48 x 60, but .*p0.png has 60 x 48; give the image"),
        "labelme size": ("labelme", labels(imageWidth=61), r"p0.png: width x height is 61 x 48, but .*60 x 48"),
        "no images": ("coco", spoilt(images=[{**image, "file_name": "x\\gone.png"}]),
                      r"annotations.json: none of its 1 images is there \(first: x/gone.png\); give their folder with"),
        "no image list": ("coco", spoilt(images=None), "annotations.json: .*; give COCO's json"),
        "twice": ("coco", spoilt(images=[image, {**image, "id": 1}]), r"two entries of .*p0.png; make them one"),
        "same id": ("coco", spoilt(images=[image, {**image, "file_name": "p1.png"}]), r"images\[1\]: id 0 is that of"),
        "no name": ("coco", spoilt(images=[{"id": 0}]),
                    r"annotations.json: images\[0\]: has no 'file_name'; correct it"),
        "name": ("coco", spoilt(images=[{**image, "file_name": 5}]), r"annotations.json: images\[0\]: "),
        "category": ("coco", spoilt(categories=[{"name": "cat"}]), r"annotations.json: categories\[0\]: has no 'id'"),
        "annotation": ("coco", spoilt(annotations=[3]), r"annotations.json: annotations\[0\]: "),
        "no objects": ("coco", spoilt(annotations=[]), "annotations.json: no object in 1 images"),
        "labelme as coco": ("coco", lambda folder: labels()(folder) / "p0.json",
                            "p0.json: has no 'categories'; .* labelme"),
        "coco as labelme": ("labelme", lambda folder: spoilt()(folder).parent,
                            "annotations.json: has no 'shapes'; .* coco"),
        "shape": ("labelme", labels(shapes=[{"points": []}]), r"p0.json: shapes\[0\]: has no 'label'"),
        "cut": ("coco", text(b'{"images": [{"id"'), "annotations.json: .*; it must be json: export it again"),
        "binary": ("coco", text(bytes(range(256))), "annotations.json: .*; give a file of UTF-8 text"),
        "gbk": ("coco", text('{"狗": 1}'.encode("gbk")), "annotations.json: .*; give a file of UTF-8 text"),
        "deep": ("coco", text(b"[" * 100000), "annotations.json: .*; it must be json"),
        "list": ("coco", text(b"[1, 2]"), "annotations.json: .*; give COCO's json"),
        "missing": ("coco", lambda folder: folder / "gone.json", "gone.json: No such file or directory; give"),
        "folder": ("coco", lambda folder: folder, "Is a directory"),
        "no folder": ("labelme", lambda folder: folder / "gone", "gone: no .json files here; give another folder"),
        "no classes": ("yolo", yolo, "set: no classes.txt or data.yaml that names the classes; give --classes"),
        "gap": ("yolo", yolo_gap, "data.yaml: class 1 where 0 is due; number the names 0, 1, 2"),
        "no masks": ("masks", lambda folder: folder,
                     "has no masks/; give a folder with images/ and masks/"),
        "no class": ("coco", spoilt(categories=[{"id": 5, "name": " "}]),
                     r"categories\[0\]: its class has no name; correct it"),
        "no label": ("labelme", labels(shapes=[{"label": "", "points": []}]),
                     r"p0.json: shapes\[0\]: its class has no name; correct it"),
        "null label": ("labelme", labels(shapes=[{"label": None, "points": []}]), r"its class has no name"),
        "bad image": ("coco", lambda folder: (folder / "p0.png").write_bytes(b"no image") and spoilt()(folder),
                      "p0.png: not an image that can be read"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_line_that_names_file_and_entry(tmp_path, name):
    save_images(tmp_path, "p0.png", "p1.png")
    kind, lay, message = wrong_inputs()[name]
    with pytest.raises(utils.InputError, match=message) as error:
        convert(kind, lay(tmp_path), "--to", "masks", "voc", "npy", "--output-dir", tmp_path / "data")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    if name != "no objects":
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_classes_that_never_occur(tmp_path, capsys, kind):
    save_images(tmp_path, "p0.png")
    if kind == "coco":
        source = coco(tmp_path, [(0, 5, [BOX])])
    else:
        labelme(tmp_path, "p0", [("cat", BOX, "polygon"), ("dog", FAR_BOX, "polygon")])
        source = tmp_path
    words = [kind, source, "--to", "masks", "--output-dir", tmp_path / "data", "--classes"]
    with pytest.raises(utils.InputError, match="--classes: horse, cow: no class of .* has (cat, dog|dog, cat); "):
        convert(*words, "horse,cow")
    if kind == "labelme":  # a part of the images may lack a class that others have
        assert convert(*words, "cat,horse")["objects"] == {"cat": 1, "horse": 0}
        assert note(capsys, "classes without an object: 1 (horse)")
        assert not read(tmp_path / "data/masks/1", "p0.png")[0].any()
    else:
        assert convert(*words, "cat,dog")["objects"] == {"cat": 1, "dog": 0}


def test_a_truncated_image_is_named_where_its_pixels_are_needed(tmp_path):
    save_images(tmp_path, "p0.png", "p1.png")
    whole = (tmp_path / "p1.png").read_bytes()
    (tmp_path / "p1.png").write_bytes(whole[:len(whole) - 30])
    path = coco(tmp_path, [(0, 5, [BOX])], ["p0.png", "p1.png"])
    with pytest.raises(utils.InputError, match="p1.png: truncated or unreadable"):
        convert("coco", path, "--to", "npy", "--output-dir", tmp_path / "data")


def test_names_may_be_any_bytes(tmp_path):
    name = "a\nb\u2028" + os.fsdecode(b"\xff")
    save_images(tmp_path, f"images/{name}.png")
    (tmp_path / "masks").mkdir()
    utils.save_image(tmp_path / f"masks/{name}.png", rectangle(4, 6, 14, 16) * np.uint8(255))
    convert("masks", tmp_path, "--to", "voc", "--output-dir", tmp_path / "data")
    assert utils.read_lines(tmp_path / "data" / VOC / "ImageSets/Segmentation/val.txt") == ["a_b__"]
    assert (tmp_path / "data" / VOC / "JPEGImages/a_b__.png").is_file()


@pytest.mark.parametrize("layout, file", [
    ("masks", "images/p0.png"), ("masks", "masks/0/p0.png"), ("masks", "masks/classes.txt"),
    ("voc", f"{VOC}/JPEGImages/p0.png"), ("voc", f"{VOC}/SegmentationObject/p0.png"),
    ("voc", f"{VOC}/ImageSets/Segmentation/val.txt"), ("npy", "imgs/p0.npy"), ("npy", "gts/p0.npy"),
    ("coco", "annotations.json")])
def test_a_full_disk_names_the_file_that_is_written(tmp_path, layout, file):
    save_images(tmp_path, "p0.png")
    path, target = coco(tmp_path, [(0, 5, [BOX])]), tmp_path / "data" / file
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        convert("coco", path, "--to", layout, "--output-dir", tmp_path / "data", "--overwrite")
    assert error.value.filename == str(target)


def test_a_disk_that_is_full_within_an_array_names_it(tmp_path, monkeypatch):
    """numpy then raises an OSError without errno and file name."""
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX])])

    def save(file, array):
        raise OSError("1000000 requested and 499872 written")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match="only a part was written") as error:
        convert("coco", path, "--to", "npy", "--output-dir", tmp_path / "data")
    assert error.value.filename == str(tmp_path / "data/gts/p0.npy") and error.value.errno == 28


def test_what_cannot_be_read_is_not_called_a_full_disk(tmp_path, monkeypatch):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX])])

    def read_bytes(source, read=Path.read_bytes):
        if source.name == "p0.png":
            raise OSError(5, "Input/output error")
        return read(source)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(utils.InputError, match="/p0.png: Input/output error; replace it"):
        convert("coco", path, "--to", "masks", "--output-dir", tmp_path / "data")


def test_text_is_written_as_utf_8_on_every_system():
    """Path.write_text and open take Windows' code page unless they are told an encoding."""
    text = (ROOT / "convert_labels.py").read_text(encoding="utf-8")
    assert "write_text(" not in text and ".read_text(" not in text and not re.search(r"(?<![\w.])open\(", text)


# --- Mutations ---

VALUES = [None, True, -1, 1e9, float("nan"), float("inf"), 10 ** 400, "", "5", "\ud800\n", [], [[]], {}, [1, [2]],
          {"size": [48, 60]}, {"size": "x", "counts": "\udcff"}, {"size": [48, 60], "counts": [-5, 2885]},
          {"size": [48, 60], "counts": "P" * 999}, [[1, 2, {}]], [[[[[[[1]]]]]]], ["mask", None]]


def places(value, path=()):
    """The path of every value in nested lists and dicts."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def mutate(found, rng):
    """Replaces, removes or repeats a random value."""
    *path, last = [*places(found)][1:][rng.integers(len([*places(found)]) - 1)]
    parent = found
    for key in path:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[last]
    elif isinstance(parent, list) and rng.random() < 0.2:
        parent.append(copy.deepcopy(parent[last]))
    else:
        parent[last] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])


def mutated_json(kind, number, folder):
    rng = np.random.default_rng(number)
    if kind == "coco":
        path = coco(folder, [(0, 5, [BOX, TRIANGLE]), (1, 3, encode(lower_triangle())),
                             (1, 5, encode(lower_triangle(), True), {"iscrowd": 1})], ["p0.png", "p1.png"])
    else:
        path = folder / "p0.json"
        png = base64.b64encode(cv2.imencode(".png", np.full((5, 5), 255, np.uint8))[1].tobytes()).decode()
        labelme(folder, "p0", [("cat", TRIANGLE, "polygon", {"group_id": 1}),
                               ("cat", BOX[:4], "rectangle", {"group_id": 1}),
                               ("dog", BOX[:4], "circle"), ("dog", [3, 3, 8, 8], "mask", {"mask": png})])
    found = json.loads(path.read_text())
    for _ in range(rng.integers(1, 3)):
        mutate(found, rng)
    data = json.dumps(found).encode()
    if number % 10 == 9:  # bytes of the file
        data = bytearray(data[:rng.integers(0, len(data))] if number % 20 == 9 else data)
        for place in rng.integers(0, len(data), 3):
            data[place] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    return path if kind == "coco" else folder


def mutated_yolo(number, folder):
    rng = np.random.default_rng(number)
    text = bytearray(b"0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.9 0.2 0.9 0.9 0.3 0.8\n")
    words = [b"nan", b"-1", b"1e999", b"99999999999999999999", b"\xff", b"\x00", b"x", b"", b"\xc2\xb2", b"0x1", b"1_0"]
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(0, len(text))
        text[place:place + rng.integers(0, 4)] = words[rng.integers(len(words))]
    (folder / "p0.txt").write_bytes(text)
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


SEEDS = {  # of the first 130, 90 and 40 those that take every step from line to line that all take
    "coco": [0, 2, 3, 4, 9, 10, 11, 14, 25, 26, 29, 33, 34, 50, 53, 66, 70, 78, 82, 84, 110, 126],
    "labelme": [0, 1, 2, 5, 7, 9, 11, 16, 23, 25, 26, 29, 41, 43, 51, 64, 82], "yolo": [0, 1, 4, 5, 8, 18]}


@pytest.mark.parametrize("kind, number", [(kind, number) for kind in SEEDS for number in SEEDS[kind]])
def test_mutated_input_is_one_line_or_masks_of_the_images_size(tmp_path, capsys, kind, number):
    check_mutated(tmp_path, capsys, kind, number)


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", [("coco", 1300), ("labelme", 900), ("yolo", 400)])
def test_more_mutated_input(tmp_path, capsys, kind, count):
    for number in range(count):
        (tmp_path / str(number)).mkdir()
        check_mutated(tmp_path / str(number), capsys, kind, number)


def check_mutated(folder, capsys, kind, number):
    for name in ("p0", "p1"):
        (folder / f"{name}.png").write_bytes(PNG)
    out = folder / "data"
    source = mutated_yolo(number, folder) if kind == "yolo" else mutated_json(kind, number, folder)
    with contextlib.suppress(utils.InputError), np.errstate(all="raise", under="ignore"):
        try:
            convert(kind, source, "--to", "masks", "coco", "--output-dir", out)
        except utils.InputError as error:
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 800
            raise
        masks = [*(out / "masks").rglob("*.png")]
        assert masks and all(utils.read_mask(path).shape == SIZE for path in masks)
        assert json.loads((out / "annotations.json").read_text())["annotations"]
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


PNG = cv2.imencode(".png", np.full((*SIZE, 3), 90, np.uint8))[1].tobytes()


# --- As a program ---

def test_it_says_its_counts_or_one_line(tmp_path, capsys):
    save_images(tmp_path, "p0.png")
    path = coco(tmp_path, [(0, 5, [BOX])])
    convert("coco", path, "--to", "masks", "--output-dir", tmp_path / "data")
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("1 images, 1 objects (dog 0, cat 1) in ")
    with pytest.raises(SystemExit, match="2"):
        convert(path, "--to", "masks")
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_it_in_one_line(tmp_path):
    save_images(tmp_path, "p0.png")
    for number in range(1, 1500):
        os.link(tmp_path / "p0.png", tmp_path / f"p{number}.png")
    path = coco(tmp_path, [(i, 5, [BOX]) for i in range(1500)], [f"p{i}.png" for i in range(1500)])
    process = subprocess.Popen(
        [sys.executable, ROOT / "convert_labels.py", "coco", path, "--to", "npy", "--output-dir", tmp_path / "data"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "data/imgs").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == "convert_labels.py: stopped by SIGINT\n"


def test_memory_does_not_grow_with_the_pixels_of_all_images(tmp_path):
    """Four times as many images: what is more is the json, not masks or images (of 36 KB each)."""
    peaks = []
    for count in (10, 40):
        folder = tmp_path / str(count)
        save_images(folder, *[f"p{i}.png" for i in range(count)], size=(100, 120))
        path = coco(folder, [(i, 5, [BOX]) for i in range(count)], [f"p{i}.png" for i in range(count)],
                    width=120, height=100)
        tracemalloc.start()
        convert("coco", path, "--to", "masks", "voc", "npy", "--output-dir", folder / "data")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 30 * 5000, peaks  # bytes


def test_images_without_a_labelme_json_are_counted(tmp_path, capsys):
    folder = tmp_path / "labels"
    folder.mkdir()
    for name in ("a", "b", "c"):
        utils.save_image(folder / f"{name}.png", np.full((20, 30, 3), 90, np.uint8))
    shapes = [{"label": "cat", "points": [[2, 2], [9, 2], [9, 9]], "shape_type": "polygon"}]
    (folder / "a.json").write_text(json.dumps({"imagePath": "a.png", "imageWidth": 30, "imageHeight": 20,
                                               "shapes": shapes}))
    args = ["labelme", str(folder), "--to", "npy", "--output-dir", str(tmp_path / "out")]
    assert convert_labels.main(convert_labels.get_args_parser().parse_args(args))["images"] == 1
    assert "images without a json file, left out: 2 (" in capsys.readouterr().out
