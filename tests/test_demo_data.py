"""demo_data.py: deterministic pictures in the scripts' layouts, and baselines that mean what they say."""
import numpy as np
from PIL import Image

import demo_data


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
