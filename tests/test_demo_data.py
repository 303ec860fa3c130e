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


def test_a_grid_holds_the_drawings_side_by_side_each_object_with_its_own_id():
    image, ids = demo_data.draw_grid(demo_data.draw_instances, 1, 2)  # drawings 4 to 7
    assert image.shape == (384, 384, 3) and ids.shape == (384, 384)
    for i, (top, left) in enumerate([(0, 0), (0, 192), (192, 0), (192, 192)]):
        drawn, drawn_ids = demo_data.draw_instances(4 + i)
        tile = slice(top, top + 192), slice(left, left + 192)
        assert np.array_equal(image[tile], drawn)
        shifted = [(k + 4 * i if 0 < k < 255 else k) for k in np.unique(drawn_ids).tolist()]
        assert np.unique(ids[tile]).tolist() == shifted and np.array_equal(ids[tile] > 0, drawn_ids > 0)
