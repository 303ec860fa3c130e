"""check_official_weights.py against stand-ins: random weights in the official layout, which must not pass."""
import hashlib
import zipfile
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import check_official_weights as checks
from conftest import ROOT
from nets import efficient_sam, sam, sam2

SMALL = ["efficient_sam_vitt", "deeplabv3_mobilenet_v3_large", "tiny"]
DEEPLAB = "deeplabv3_mobilenet_v3_large"


@pytest.fixture
def images(tmp_path):
    """Folder of blank images with the names of the real ones."""
    for name in checks.IMAGES:
        Image.new("RGB", (1800, 1200)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of official files, empty; nothing is known of their bytes, as stand-ins have others."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for entry in checks.FILES.values():
        monkeypatch.setitem(entry, "size", None)
        monkeypatch.setitem(entry, "sha256", None)
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def draw(name):
    """Random weights as the file of this name holds them."""
    torch.manual_seed(0)
    if name.startswith("deeplabv3"):
        return getattr(torchvision.models.segmentation, name)(
            weights=None, weights_backbone=None, num_classes=21, aux_loss=True).state_dict()
    if name in sam.WEIGHTS:
        return sam.NETS[name]().state_dict()
    return {"model": {**efficient_sam.NETS, **sam2.NETS}[name]().state_dict()}


def put(state, name, hub):
    """Writes a stand-in where the official file would be."""
    path = hub / checks.FILES[name]["url"].rsplit("/", 1)[-1]
    if path.suffix != ".zip":
        torch.save(state, path)
        return
    with zipfile.ZipFile(path, "w") as archive, archive.open(f"weights/{path.stem}", "w") as file:
        torch.save(state, file)


def run(images, *names):
    return checks.main(checks.get_args_parser().parse_args(["--images", str(images), "--only", *names]))


@pytest.mark.parametrize("name", [*SMALL, *[pytest.param(name, marks=pytest.mark.slow)
                                            for name in checks.FILES if name not in SMALL]])
def test_random_weights_load_strictly_and_fail(name, images, hub, capsys):
    put(draw(name), name, hub)
    assert run(images, name) == [name]
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}: FAILED (IoU") and ", IoU 0." in line and "(at least 0.75)" in line
    assert ("score" in line) == (name in checks.CLICKS)
    path, = (path for path in hub.iterdir() if path.suffix != ".zip")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{path.stat().st_size} bytes, sha256 {digest}, " in line  # none is published, now


def test_a_tensor_too_few_fails(images, hub, capsys):
    state = draw("efficient_sam_vitt")
    del state["model"]["image_encoder.neck.0.weight"]
    put(state, "efficient_sam_vitt", hub)
    assert run(images, "efficient_sam_vitt") == ["efficient_sam_vitt"]
    printed = capsys.readouterr().out
    assert "FAILED (not checked)" in printed and "image_encoder.neck.0.weight" in printed


@pytest.mark.parametrize("right", [True, False])
def test_the_tyre_and_the_dog_pass_and_what_lies_beside_them_fails(right, images, hub, monkeypatch, capsys):
    """The nets are stand-ins, their answers are given."""
    put(draw("efficient_sam_vitt"), "efficient_sam_vitt", hub)
    put(draw(DEEPLAB), DEEPLAB, hub)
    tyre, dog = np.full((2, 1200, 1800), -1, np.float32)
    cv2.circle(tyre, *checks.TYRE, 1, -1)
    cv2.fillPoly(dog, [np.array(checks.DOG)], 1)
    if not right:
        tyre, dog = np.roll(tyre, 40, 1), -dog
    classes = torch.zeros(21, 1200, 1800)
    classes[12] = torch.from_numpy(dog)  # VOC's number
    monkeypatch.setattr(checks.predict, "predict_batch", lambda *args: [classes])
    monkeypatch.setattr(checks.predict, "predict_queries", lambda *args: iter([(
        torch.from_numpy(np.stack([-tyre, tyre])[None]), None, torch.tensor([1]))]))
    monkeypatch.setattr(efficient_sam, "encode", lambda *args: None)
    assert run(images, "efficient_sam_vitt", DEEPLAB) == ([] if right else ["efficient_sam_vitt", DEEPLAB])
    assert capsys.readouterr().out.count(": ok: " if right else "FAILED (IoU)") == 2


@pytest.mark.parametrize("off", [0.005, 0.02])
def test_a_predicted_iou_that_is_not_the_published_one_fails(off, images, hub, monkeypatch, capsys):
    """One of the three masks' must be, within 0.01; here of EfficientSAM, whose is not published."""
    put(draw("efficient_sam_vitt"), "efficient_sam_vitt", hub)
    scores = torch.tensor([[0.2, 0.7 + off, 0.9]])
    monkeypatch.setitem(checks.CLICKS, "efficient_sam_vitt", ("car.png", 400, 650, 0.7))
    monkeypatch.setattr(checks.predict, "click", lambda *args: (None, scores, None))
    monkeypatch.setattr(efficient_sam, "encode", lambda *args: torch.zeros(1, 256, 64, 64))
    assert run(images, "efficient_sam_vitt")
    wrong = "(IoU)" if off < 0.01 else "(IoU, score)"
    assert f"FAILED {wrong}" in capsys.readouterr().out


def test_other_bytes_than_the_published_are_named_and_the_next_file_is_checked(images, script, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(images))
    folder = images / "hub/checkpoints"
    folder.mkdir(parents=True)
    for entry in checks.FILES.values():
        (folder / entry["url"].rsplit("/", 1)[-1]).write_bytes(b"no weights")
    done = script("tests/check_official_weights.py", "--images", images)
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": FAILED (not checked): ")[0] for line in lines] == [*checks.FILES]
    published = [name for name, entry in checks.FILES.items() if entry.get("sha256")]
    assert [line.split(":")[0] for line in lines if "sha256 " in line and "delete it" in line] == published


def test_without_network_each_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(url, *args, **options):
        raise URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert run(tmp_path / "images", "tiny", DEEPLAB) == ["tiny", DEEPLAB]
    assert capsys.readouterr().out.count("FAILED (not checked): URLError: <urlopen error no network>") == 2


def test_images_are_fetched_once_and_their_hash_is_checked(tmp_path, monkeypatch):
    source = tmp_path / "truck.png"
    Image.new("RGB", (8, 6)).save(source)
    digits = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(checks.IMAGES, "truck.jpg", (source.as_uri(), "00000000"))
    with pytest.raises(RuntimeError, match="invalid hash"):
        checks.read_image("truck.jpg", tmp_path / "images")
    assert not (tmp_path / "images/truck.jpg").exists()
    monkeypatch.setitem(checks.IMAGES, "truck.jpg", (source.as_uri(), digits))
    assert checks.read_image("truck.jpg", tmp_path / "images").shape == (6, 8, 3)
    source.unlink()
    assert checks.read_image("truck.jpg", tmp_path / "images").shape == (6, 8, 3)


def test_the_document_says_what_the_script_checks():
    text = (ROOT / "docs/official-weights.md").read_text()
    for name, entry in checks.FILES.items():
        row, = [line for line in text.splitlines() if line.startswith(f"| `{name}` | [")]
        assert entry["url"] in row and (entry.get("sha256") or "") in row and str(entry.get("size", "")) in row
    for name, (image, x, y, score) in checks.CLICKS.items():
        assert f"| `{name}` | {image} | {x},{y} | " in text and str(score) in text
    (x, y), radius = checks.TYRE
    assert f"--box {checks.BOX}" in text and f"radius {radius} about {x},{y}" in text
    assert text.count(f"at least {checks.LEAST_IOU}") == 2
    for url, digits in checks.IMAGES.values():
        assert url.rsplit("/notebooks", 1)[0].removesuffix("/assets/car.png") in text and (digits or "") in text
