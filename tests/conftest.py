"""Fixtures of all tests: drawn data sets in the scripts' layouts; real ones through FLATSEG_DATA."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)
QUIET = {"PYTHONWARNINGS": "ignore::FutureWarning"}  # monai 1.5 and torch 2.15 warn of what is not ours


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow checks too")
    parser.addoption("--half", type=int, choices=[1, 2],
                     help="run every other file of tests: two halves side by side take half the time")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--half"):
        files = list(dict.fromkeys(item.path for item in items))
        chosen = files[config.getoption("--half") - 1::2]
        config.hook.pytest_deselected(items=[item for item in items if item.path not in chosen])
        items[:] = [item for item in items if item.path in chosen]
    if not config.getoption("--slow") and "slow" not in (config.getoption("-m") or ""):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow or -m slow"))


@pytest.fixture
def two_threads():
    """For large nets; what is compared to the bit keeps to one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def cells(tmp_path):
    """Folder of ten 48x48 pictures of drawn cells."""
    import demo_data
    folder = tmp_path / "cells"
    for sub in ("images", "masks/0"):
        (folder / sub).mkdir(parents=True)
    for index in range(10):
        image, mask = demo_data.draw_cells(index, size=48)
        Image.fromarray(image).save(folder / f"images/cell_{index}.png")
        Image.fromarray(mask).save(folder / f"masks/0/cell_{index}.png")
    return folder


@pytest.fixture
def scenes(tmp_path):
    """Folder with a VOCdevkit of ten 64x64 drawn scenes of three classes, eight to train on."""
    import demo_data
    folder = tmp_path / "scenes"
    root = folder / "VOCdevkit/VOC2012"
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / sub).mkdir(parents=True)
    for index in range(10):
        image, mask = demo_data.draw_scene(index, size=64)
        Image.fromarray(image).save(root / f"JPEGImages/s{index}.jpg")
        Image.fromarray(mask).save(root / f"SegmentationClass/s{index}.png")
    for name, part in (("train", range(8)), ("val", range(8, 10))):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"s{i}\n" for i in part))
    return folder


@pytest.fixture
def real_data():
    """The folder of real pictures that FLATSEG_DATA names; the test is skipped without it."""
    if not os.environ.get("FLATSEG_DATA"):
        pytest.skip("FLATSEG_DATA is not set")
    return Path(os.environ["FLATSEG_DATA"])


@pytest.fixture
def script():
    """script("train_unet.py", "--epochs", 1) runs it as a user does, in a process of its own."""
    def call(name, *options, cwd=ROOT, **kwargs):
        command = [sys.executable, str(name), *map(str, options)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **QUIET}, **kwargs)
    return call


def save_grey(path, array):
    Image.fromarray(np.asarray(array)).save(path)
