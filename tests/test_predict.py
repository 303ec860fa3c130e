"""predict.py: masks at the picture's own size from a checkpoint alone; a bad picture does not stop the others."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_unet
import utils


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a short training, in whose folder lie its pictures too."""
    import demo_data
    folder = tmp_path_factory.mktemp("trained")
    demo_data.write("cells", folder, 10)
    train_unet.main(train_unet.get_args_parser().parse_args(
        ["--data-path", str(folder), "--output-dir", str(folder / "run"), "--arch", "UNet", "--image-size", "64",
         "-b", "4", "-j", "0", "--epochs", "3", "--optimizer", "Adam", "--device", "cpu"]))
    return folder


def run(*texts):
    return predict.main(predict.get_args_parser().parse_args(["--device", "cpu", *map(str, texts)]))


def test_predictions_are_what_validation_scored(trained, tmp_path):
    split = utils.json.loads((trained / "run/split.json").read_text())["val"]
    pictures = [trained / f"images/{name}.png" for name in split]
    run("--weights", trained / "run/last.pth", *pictures, "--output-dir", tmp_path)
    both = union = 0
    for name in split:
        pred = np.array(Image.open(tmp_path / f"{name}_mask.png")) == 1
        true = np.array(Image.open(trained / f"masks/0/{name}.png")) > 0
        both, union = both + (pred & true).sum(), union + (pred | true).sum()
    log = (trained / "run/log.csv").read_text().splitlines()
    last = dict(zip(log[0].split(","), log[-1].split(",")))
    assert both / union == pytest.approx(float(last["val_iou"]), abs=1e-5)


def test_folder_glob_and_picture_give_palette_masks_of_their_own_size(trained, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "in/wide.jpg")
    Image.fromarray(np.zeros((33, 20), np.uint16)).save(tmp_path / "in/deep.png")
    for number, inputs in enumerate(([tmp_path / "in"], [tmp_path / "in/*.jpg", tmp_path / "in/deep.png"])):
        out = tmp_path / f"out{number}"
        assert run("--weights", trained / "run/best.pth", *inputs, "--output-dir", out) == {"pictures": 2}
        assert sorted(path.name for path in out.iterdir()) == [
            "areas.csv", "deep_mask.png", "deep_overlay.png", "wide_mask.png", "wide_overlay.png"]
        with Image.open(out / "wide_mask.png") as mask:
            assert mask.mode == "P" and mask.size == (70, 50) and set(np.unique(mask)) <= {0, 1}
        assert Image.open(out / "deep_overlay.png").size == (20, 33)


def test_one_bad_picture_does_not_stop_a_folder(trained, tmp_path, script):
    shutil.copytree(trained / "images", tmp_path / "in")
    (tmp_path / "in/cell_0003.png").write_bytes(b"spoilt")
    done = script("predict.py", "--weights", trained / "run/best.pth", tmp_path / "in",
                  "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and len(list((tmp_path / "out").glob("*_mask.png"))) == 9
    assert done.stderr == f"predict.py: error: {tmp_path}/in/cell_0003.png: not a picture that can be read\n"
    assert "9 of 10 pictures predicted" in done.stdout


def test_pictures_of_one_stem_do_not_overwrite_each_other(tmp_path):
    for name in ("a/x.png", "a/x.jpg", "b/x.png", "b/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [name for name, _ in predict.find_inputs([str(tmp_path / "a"), str(tmp_path / "b")])]
    assert len(set(names)) == 4 and names[-1] == "y"


def test_nothing_is_overwritten_unless_asked(trained, tmp_path):
    picture = trained / "images/cell_0001.png"
    run("--weights", trained / "run/best.pth", picture, "--output-dir", tmp_path)
    with pytest.raises(utils.InputError, match="cell_0001_mask.png: is there already; give --overwrite"):
        run("--weights", trained / "run/best.pth", picture, "--output-dir", tmp_path)
    run("--weights", trained / "run/best.pth", picture, "--output-dir", tmp_path, "--overwrite")


def test_overlapping_classes_get_a_mask_each(tmp_path):
    logits = torch.full((2, 1, 3), -1.0)
    logits[0, 0, :2], logits[1, 0, 1:] = 1.0, 2.0  # pixel 0: class a, pixel 1: both, b likelier, pixel 2: b
    predict.write_unet(logits, np.zeros((1, 3, 3), np.uint8), {"classes": ["a", "b"]}, tmp_path / "x")
    assert np.array(Image.open(tmp_path / "x_mask.png")).tolist() == [[1, 2, 2]]
    assert np.array(Image.open(tmp_path / "x_mask_a.png")).tolist() == [[255, 255, 0]]
    assert np.array(Image.open(tmp_path / "x_mask_b.png")).tolist() == [[0, 255, 255]]


@pytest.mark.parametrize("make, words", [
    (lambda path: torch.save({"w": torch.zeros(2)}, path), "does not say what net"),
    (lambda path: path.write_text("x"), "not a checkpoint"),
    (lambda path: torch.save({"format": 1, "net": "other"}, path), "holds the net other"),
    (lambda path: torch.save({"format": 1, "net": "unet", "arch": {"model": "UNet"}}, path), "not a whole checkpoint"),
    (lambda path: None, "no such file")])
def test_checkpoints_that_cannot_be_used(trained, tmp_path, make, words):
    make(tmp_path / "a.pth")
    with pytest.raises(utils.InputError, match=f"a.pth: .*{words}"):
        run("--weights", tmp_path / "a.pth", trained / "images", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_there(trained, tmp_path):
    with pytest.raises(utils.InputError, match=r"nothing\*: no such picture, folder or glob"):
        run("--weights", trained / "run/best.pth", tmp_path / "nothing*", "--output-dir", tmp_path / "out")


# --- DeepLab ---

@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory):
    """A DeepLab checkpoint of a short training, in whose folder lie its pictures too."""
    import demo_data
    import train_deeplabv3
    folder = tmp_path_factory.mktemp("scenes_run")
    demo_data.write("scenes", folder, 10)
    figures = train_deeplabv3.main(train_deeplabv3.get_args_parser().parse_args(
        ["--data-path", str(folder), "--output-dir", str(folder / "run"), "--backbone", "mobilenet_v3_large",
         "--weights", "none", "--num-classes", "3", "--base-size", "64", "--crop-size", "64", "-b", "4", "-j", "0",
         "--epochs", "2", "--lr", "0.02", "--device", "cpu"]))
    return folder, figures


def voc(folder, *parts):
    return folder.joinpath("VOCdevkit/VOC2012", *parts)


def test_deeplab_predictions_are_what_validation_scored(scenes_run, tmp_path):
    folder, figures = scenes_run
    names = voc(folder, "ImageSets/Segmentation/val.txt").read_text().split()
    run("--weights", folder / "run/last.pth", *[voc(folder, f"JPEGImages/{name}.jpg") for name in names],
        "--output-dir", tmp_path)
    counts = np.zeros((4, 4), int)
    for name in names:
        mask = Image.open(tmp_path / f"{name}_mask.png")
        true = np.array(Image.open(voc(folder, f"SegmentationClass/{name}.png")))
        assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]
        np.add.at(counts, (true[true < 255], np.array(mask)[true < 255]), 1)
    assert counts.tolist() == figures["counts"]


def test_areas_csv_counts_the_pixels_of_the_masks(scenes_run, tmp_path, capsys):
    folder, _ = scenes_run
    run("--weights", folder / "run/last.pth", voc(folder, "JPEGImages/scene_0000.jpg"), "--output-dir", tmp_path)
    rows = [line.split(",") for line in (tmp_path / "areas.csv").read_text().splitlines()]
    mask = np.array(Image.open(tmp_path / "scene_0000_mask.png"))
    assert rows[0] == ["picture", "class", "pixels", "share", "score"]
    assert [row[1] for row in rows[1:]] == ["background", "disc", "square", "triangle"]
    assert [int(row[2]) for row in rows[1:]] == np.bincount(mask.ravel(), minlength=4).tolist()
    assert sum(float(row[3]) for row in rows[1:]) == pytest.approx(1)
    assert "disc" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["unet", "deeplabv3"])
def test_flip_makes_a_mirrored_picture_give_the_mirrored_mask_and_scales_change_it(trained, scenes_run, kind):
    weights = trained / "run/best.pth" if kind == "unet" else scenes_run[0] / "run/last.pth"
    args = predict.get_args_parser().parse_args(["x", "--weights", str(weights), "--flip", "--scales", "0.75,1.25"])
    model, checkpoint = predict.load_model(args, torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)

    def logits(image):
        return predict.predict_averaged(model, checkpoint, image, torch.device("cpu"), None, args)
    both = logits(image)
    assert torch.allclose(both, logits(image[:, ::-1].copy()).flip(-1), atol=1e-4)
    args.flip, args.scales = False, (1.0,)
    one = logits(image)
    assert one.shape == both.shape == (1 if kind == "unet" else 4, 60, 90) and not torch.allclose(one, both, atol=1e-3)


def test_official_files_need_the_nets_name(tmp_path):
    import torchvision
    build = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    theirs = build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "official.pth")
    image = np.random.default_rng(0).integers(0, 256, (520, 640, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "x.png")
    with pytest.raises(utils.InputError, match="does not say what net.*--model"):
        run("--weights", tmp_path / "official.pth", tmp_path / "x.png", "--output-dir", tmp_path / "out")
    with pytest.raises(utils.InputError, match="not a whole checkpoint"):
        run("--weights", tmp_path / "official.pth", "--model", "deeplabv3_resnet50", tmp_path / "x.png")
    run("--weights", tmp_path / "official.pth", "--model", "deeplabv3_mobilenet_v3_large", tmp_path / "x.png",
        "--output-dir", tmp_path / "out")
    tensor = torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))[None]  # 520 is the size the preset asks for
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = theirs((tensor - mean) / std)["out"][0].argmax(0).numpy()
    assert (np.array(Image.open(tmp_path / "out/x_mask.png")) == expected).mean() > 0.999
    assert "aeroplane" in (tmp_path / "out/areas.csv").read_text()


def test_what_two_scripts_know_of_the_official_files_agrees():
    import train_deeplabv3
    assert predict.COCO_WEIGHTS == train_deeplabv3.COCO_WEIGHTS and predict.VOC_CLASSES == train_deeplabv3.VOC_CLASSES
    assert len(predict.VOC_CLASSES) == 21


# --- EfficientSAM ---

@pytest.fixture(scope="module")
def objects_run(tmp_path_factory):
    """An EfficientSAM checkpoint of a short training, in whose folder lie its arrays too."""
    import demo_data
    import train_efficientsam
    folder = tmp_path_factory.mktemp("objects_run")
    demo_data.write("objects", folder, 8)
    figures = train_efficientsam.main(train_efficientsam.get_args_parser().parse_args(
        ["--data-path", str(folder), "--output-dir", str(folder / "run"), "--model", "demo", "--image-size", "64",
         "-b", "4", "-j", "0", "--epochs", "3", "--lr", "0.002", "--device", "cpu"]))
    return folder, figures


def test_boxes_give_what_validation_scored(objects_run, tmp_path):
    import train_efficientsam
    folder, figures = objects_run
    split, ious, prompts = utils.json.loads((folder / "run/split.json").read_text())["val"], [], {}
    for name in split:
        ids = np.load(folder / f"gts/{name}.npy").astype(int)
        Image.fromarray(np.load(folder / f"imgs/{name}.npy")).save(tmp_path / f"{name}.png")
        boxes = [[np.argwhere(ids == k)[:, ::-1].min(0).tolist(), np.argwhere(ids == k)[:, ::-1].max(0).tolist()]
                 for k in np.unique(ids[ids > 0])]
        prompts[name] = {"boxes": [a + b for a, b in boxes]}
    (tmp_path / "prompts.json").write_text(utils.json.dumps(prompts))
    run("--weights", folder / "run/last.pth", tmp_path / "*.png", "--prompts", tmp_path / "prompts.json", "--all-masks",
        "--output-dir", tmp_path / "out")
    rows = [line.split(",") for line in (tmp_path / "out/areas.csv").read_text().splitlines()[1:]]
    for name in split:
        ids = np.load(folder / f"gts/{name}.npy").astype(int)
        for k, own in enumerate(np.unique(ids[ids > 0]), 1):
            scores = [float(row[4]) for row in rows if row[:1] == [name] and row[1].startswith(f"object {k} mask")]
            mask = np.array(Image.open(tmp_path / f"out/{name}_{k}_{np.argmax(scores) + 1}.png")) > 0
            ious.append((mask & (ids == own)).sum() / (mask | (ids == own)).sum())
    assert np.mean(ious) == pytest.approx(figures["val_iou"], abs=1e-4)
    assert train_efficientsam.WEIGHTS == predict.SAM_WEIGHTS


def test_points_and_boxes_of_the_command_line(objects_run, tmp_path, capsys):
    folder, _ = objects_run
    Image.fromarray(np.load(folder / "imgs/object_0001.npy")).save(tmp_path / "x.png")
    for number, (more, objects) in enumerate([
            (["--box", "10,10,60,60"], 1), (["--box", "10,10,60,60", "--box", "50,50,90,90"], 2),
            (["--point", "30,40", "--point", "50,50,0"], 1), (["--box", "10,10,60,60", "--point", "30,30"], 1),
            (["--box", "1,1,9,9", "--box", "5,5,90,90", "--point", "30,30"], 3)]):
        run("--weights", folder / "run/last.pth", tmp_path / "x.png", *more, "--output-dir", tmp_path / str(number))
        assert len((tmp_path / f"{number}/areas.csv").read_text().splitlines()) == 1 + objects
        assert Image.open(tmp_path / f"{number}/x_mask.png").size == (128, 128)
    assert "score" in capsys.readouterr().out


@pytest.mark.parametrize("more, words", [
    ([], "nothing to cut out of x"), (["--box", "60,10,10,60"], "a box is empty"), (["--point", "500,3"], "outside"),
    (["--prompts", "none.json"], "none.json: no json"), (["--point", "3,3,2"], "label is 1 or 0"),
    (["--box", "1,1,9,9", *["--point", "3,3"] * 5], "more than six points"), (["--box", "1,1,9,9", "--flip"], "--flip"),
    (["--prompts", "x.json", "--box", "1,1,9,9"], "one or the other")])
def test_prompts_that_cannot_be(objects_run, tmp_path, more, words):
    folder, _ = objects_run
    Image.fromarray(np.load(folder / "imgs/object_0001.npy")).save(tmp_path / "x.png")
    with pytest.raises(utils.InputError, match=words):
        run("--weights", folder / "run/last.pth", tmp_path / "x.png", *more, "--output-dir", tmp_path / "out")
