"""README's recipe from COCO and LabelMe json makes what the three scripts read."""
import json
import re

import numpy as np
import pytest

import train_deeplabv3
import train_efficientsam
import train_unet
import utils
from conftest import ROOT

BOX, TRIANGLE = [4, 6, 14, 6, 14, 16, 4, 16], [20.0, 20.0, 40.0, 20.0, 20.0, 40.0]


def recipe():
    text = (ROOT / "README.md").read_text()
    code = re.search(r"\n    import json\n(?:    .*\n|\n)+", text)[0].replace("\n    ", "\n")
    names = {}
    exec(code[:code.index("\nwrite(from_coco")], names)
    return names


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_recipe_makes_the_three_layouts(kind, tmp_path):
    names = recipe()
    (tmp_path / "pictures").mkdir()
    files = [f"p{i}.png" for i in range(6)]
    for file in files:
        utils.save_image(tmp_path / "pictures" / file, np.full((48, 60, 3), 90, np.uint8))
    if kind == "coco":
        found = {"categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 9, "name": "bird"}],
                 "images": [{"id": 10 + i, "file_name": file} for i, file in enumerate(files)],
                 "annotations": [{"image_id": 10 + i, "category_id": category, "segmentation": shapes}
                                 for i in range(6) for category, shapes in (
                                     (7, [TRIANGLE, BOX]), (3, [[50, 0, 60, 0, 60, 10, 50, 10]]),
                                     (7, {"size": [48, 60], "counts": [48 * 60]}), (9, [BOX]))]}
        (tmp_path / "annotations.json").write_text(json.dumps(found))
        found = names["from_coco"](tmp_path / "annotations.json")
    else:
        for file in files:
            shapes = [("cat", [[20, 20], [40, 20], [20, 40]]), ("cat", np.reshape(BOX, (-1, 2)).tolist()),
                      ("dog", [[50, 0], [60, 0], [60, 10], [50, 10]])]
            (tmp_path / file).with_suffix(".json").write_text(json.dumps({"imagePath": file, "shapes": [
                {"label": label, "shape_type": "polygon", "points": points} for label, points in shapes]}))
        found = names["from_labelme"](tmp_path)
    names["write"](found, tmp_path / "pictures", tmp_path / "data", ["cat", "dog"])

    cat = utils.read_mask(tmp_path / "data/masks/masks/0/p3.png")
    assert (cat[6:16, 4:14] == 255).all() and (cat[:20] > 0).sum() == 100  # pixels 4 to 13, 6 to 15: area 10 x 10
    assert (cat[20:] > 0).sum() == pytest.approx(200, abs=12)              # half of 20 x 20
    label = utils.read_mask(tmp_path / "data/voc/VOCdevkit/VOC2012/SegmentationClass/p3.png")
    assert label[10, 10] == 1 and label[5, 55] == 2 and (label == 2).sum() == 100
    ids = np.load(tmp_path / "data/npy/gts/p3.npy")
    assert len(np.unique(ids)) == (3 if kind == "coco" else 4)  # COCO's object of two parts is one
    small = {train_unet: ["masks", "--num-classes", "2", "--image-size", "32"],
             train_deeplabv3: ["voc", "--num-classes", "2", "--base-size", "32", "--crop-size", "32", "-b", "2"],
             train_efficientsam: ["npy", "--image-size", "64"]}
    for script, (folder, *options) in small.items():
        data = tmp_path / "data" / folder
        args = script.get_args_parser().parse_args(["--data-path", str(data), "-j", "0", *options])
        train_loader, val_loader = script.create_loaders(args)[:2]
        assert len(train_loader.dataset) + len(val_loader.dataset) == 6 and next(iter(train_loader))
