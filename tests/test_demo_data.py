"""demo_data.py: deterministic pictures in the scripts' layouts, and baselines that mean what they say."""
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import demo_data
from conftest import ROOT


def test_a_picture_depends_on_its_index_alone(tmp_path):
    demo_data.write("cells", tmp_path / "few", 3)
    demo_data.write("cells", tmp_path / "more", 5)
    for sub in ("images", "masks/0"):
        assert len(list((tmp_path / "more" / sub).iterdir())) == 5
        for path in (tmp_path / "few" / sub).iterdir():
            assert np.array_equal(Image.open(path), Image.open(tmp_path / "more" / sub / path.name))
    image, mask = demo_data.draw_cells(2)
    assert np.array_equal(image, Image.open(tmp_path / "few/images/cell_0002.png"))  # RGB, not BGR
    assert np.array_equal(mask, Image.open(tmp_path / "few/masks/0/cell_0002.png")) and set(np.unique(mask)) == {0, 255}


def test_otsu_is_dataset_iou_and_misled_by_the_drawn_cells():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = 200
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3] = 255
    masks = [mask, np.zeros_like(mask)]
    assert demo_data.otsu_iou([(image, [mask]) for mask in masks]) == 4 / 20  # 4 in both, 12 + 8 in either
    drawn = [demo_data.draw_cells(index) for index in range(12)]
    assert demo_data.otsu_iou((image, [mask]) for image, mask in drawn) < 0.5


def test_a_grid_holds_the_drawings_side_by_side_each_object_with_its_own_id():
    image, ids = demo_data.draw_grid(demo_data.draw_instances, 1, 2)  # drawings 4 to 7
    assert image.shape == (384, 384, 3) and ids.shape == (384, 384)
    for i, (top, left) in enumerate([(0, 0), (0, 192), (192, 0), (192, 192)]):
        drawn, drawn_ids = demo_data.draw_instances(4 + i)
        tile = slice(top, top + 192), slice(left, left + 192)
        assert np.array_equal(image[tile], drawn)
        shifted = [(k + 4 * i if 0 < k < 255 else k) for k in np.unique(drawn_ids).tolist()]
        assert np.unique(ids[tile]).tolist() == shifted and np.array_equal(ids[tile] > 0, drawn_ids > 0)


def test_a_folder_with_files_of_others_is_left_alone(tmp_path):
    script = [sys.executable, ROOT / "demo_data.py", "scenes", "--output-dir", tmp_path / "data", "--count"]
    assert subprocess.run([*script, "3"], capture_output=True, text=True).stdout == f"3 images in {tmp_path}/data\n"
    (tmp_path / "data/.hidden").mkdir()
    (tmp_path / "data/.hidden/cell-checkpoint.png").touch()
    demo_data.write("scenes", tmp_path / "data", 4)  # its own are
    theirs = tmp_path / "data/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg"
    theirs.touch()
    before = (theirs.parents[1] / "ImageSets/Segmentation/train.txt").read_text()
    found = subprocess.run([*script, "9"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.splitlines()[-1] == (
        f"demo_data.py: error: {theirs}: was not written by a demo, and might be replaced; give another --output-dir")
    assert (theirs.parents[1] / "ImageSets/Segmentation/train.txt").read_text() == before
    found = subprocess.run([*script, "0"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.endswith("error: --count: 0 must be at least 1\n")


@pytest.mark.parametrize("kind", demo_data.WRITE)
def test_every_kind_knows_its_own_files(tmp_path, kind):
    for _ in range(2):
        demo_data.write(kind, tmp_path, 2)
