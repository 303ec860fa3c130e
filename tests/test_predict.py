"""predict.py: masks at the image's own size from a checkpoint alone; a bad image does not stop the others."""
import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_unet
import utils
from nets import deeplabv3, efficient_sam, sam, sam2, unet, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a short training, in whose folder lie its images too."""
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
    images = [trained / f"images/{name}.png" for name in split]
    run("--weights", trained / "run/last.pth", *images, "--output-dir", tmp_path)
    both = union = 0
    for name in split:
        pred = np.array(Image.open(tmp_path / f"{name}_mask.png")) == 1
        true = np.array(Image.open(trained / f"masks/0/{name}.png")) > 0
        both, union = both + (pred & true).sum(), union + (pred | true).sum()
    log = (trained / "run/log.csv").read_text().splitlines()
    last = dict(zip(log[0].split(","), log[-1].split(",")))
    assert both / union == pytest.approx(float(last["val_iou"]), abs=1e-5)


def test_folder_glob_and_image_give_palette_masks_of_their_own_size(trained, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "in/wide.jpg")
    Image.fromarray(np.zeros((33, 20), np.uint16)).save(tmp_path / "in/deep.png")
    for number, inputs in enumerate(([tmp_path / "in"], [tmp_path / "in/*.jpg", tmp_path / "in/deep.png"])):
        out = tmp_path / f"out{number}"
        assert run("--weights", trained / "run/best.pth", *inputs, "--output-dir", out) == {"images": 2}
        assert sorted(path.name for path in out.iterdir()) == [
            "areas.csv", "deep_mask.png", "deep_overlay.png", "wide_mask.png", "wide_overlay.png"]
        with Image.open(out / "wide_mask.png") as mask:
            assert mask.mode == "P" and mask.size == (70, 50) and set(np.unique(mask)) <= {0, 1}
        assert Image.open(out / "deep_overlay.png").size == (20, 33)


def test_one_bad_image_does_not_stop_a_folder(trained, tmp_path, script):
    shutil.copytree(trained / "images", tmp_path / "in")
    (tmp_path / "in/cell_0003.png").write_bytes(b"spoilt")
    done = script("predict.py", "--weights", trained / "run/best.pth", tmp_path / "in",
                  "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and len(list((tmp_path / "out").glob("*_mask.png"))) == 9
    assert done.stderr == f"predict.py: error: {tmp_path}/in/cell_0003.png: not an image that can be read\n"
    assert "9 of 10 images predicted" in done.stdout


def test_images_of_one_stem_do_not_overwrite_each_other(tmp_path):
    for name in ("a/x.png", "a/x.jpg", "b/x.png", "b/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = predict.find_inputs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert predict.name_outputs(paths, ["_mask.png"]) == ["x_jpg", "a_x_png", "b_x_png", "y"]


def test_nothing_is_overwritten_unless_asked(trained, tmp_path):
    image = trained / "images/cell_0001.png"
    run("--weights", trained / "run/best.pth", image, "--output-dir", tmp_path)
    with pytest.raises(utils.InputError, match="cell_0001_mask.png: exists; give --overwrite"):
        run("--weights", trained / "run/best.pth", image, "--output-dir", tmp_path)
    run("--weights", trained / "run/best.pth", image, "--output-dir", tmp_path, "--overwrite")


def test_overlapping_classes_get_a_mask_each(tmp_path):
    logits = torch.full((2, 1, 3), -1.0)
    logits[0, 0, :2], logits[1, 0, 1:] = 1.0, 2.0  # pixel 0: class a, pixel 1: both, b likelier, pixel 2: b
    loaded, given = SimpleNamespace(net=predict.NETS["unet"], classes=["a", "../b:"]), []
    found = predict.write_classes(logits, np.zeros((1, 3, 3), np.uint8), loaded, tmp_path / "x",
                                  lambda category, mask: given.append((category, mask.sum())))
    assert found == [[1, "a", 2, ""], [2, "../b:", 2, ""]] and given == [(1, 2), (2, 2)]  # as in the mask
    assert np.array(Image.open(tmp_path / "x_mask.png")).tolist() == [[1, 2, 2]]
    assert np.array(Image.open(tmp_path / "x_mask_a.png")).tolist() == [[255, 255, 0]]
    assert np.array(Image.open(tmp_path / "x_mask_.._b_.png")).tolist() == [[0, 255, 255]]


def save_changed(path, entries, **final):
    """A checkpoint with other entries, and other tensors of the last layer."""
    checkpoint = torch.load(save_unet(path), weights_only=True)
    state = {**checkpoint["model"], **{f"final.{name}": tensor for name, tensor in final.items()}}
    torch.save({**checkpoint, "model": state, **entries}, path)


@pytest.mark.parametrize("make, words", [
    (lambda path: torch.save({"w": torch.zeros(2)}, path), "does not say what net"),
    (lambda path: path.write_text("x"), "not a checkpoint"),
    (lambda path: torch.save({"format": 1, "net": "other"}, path), "holds the net other"),
    (lambda path: torch.save({"format": 1, "net": "unet", "arch": {"model": "UNet"}}, path), "not a whole checkpoint"),
    (lambda path: torch.save({"format": 1, "net": "unet", "args": {}}, path), "not a whole checkpoint"),
    (lambda path: torch.save({"format": 1, "net": "unet", "arch": None, "args": {}}, path), "not a whole checkpoint"),
    (lambda path: save_changed(path, {}, bias=torch.tensor([np.nan])), "final.bias .*not finite"),
    (lambda path: save_changed(path, {}, bias=torch.tensor([1])), "final.bias holds torch.int64"),
    (lambda path: save_changed(path, {"classes": ["a", "b"]}), "not a whole checkpoint"),
    (lambda path: None, "no such file")])
def test_checkpoints_that_cannot_be_used(trained, tmp_path, make, words):
    make(tmp_path / "a.pth")
    with pytest.raises(utils.InputError, match=f"a.pth: .*{words}"):
        run("--weights", tmp_path / "a.pth", trained / "images", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_there(trained, tmp_path):
    with pytest.raises(utils.InputError, match=r"nothing\*: no such image, folder or glob"):
        run("--weights", trained / "run/best.pth", tmp_path / "nothing*", "--output-dir", tmp_path / "out")


# --- DeepLab ---

@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory):
    """A DeepLab checkpoint of a short training, in whose folder lie its images too."""
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
    assert rows[0] == ["image", "id", "class", "pixels", "share", "score"]
    assert [row[1:3] for row in rows[1:]] == [["0", "background"], ["1", "disc"], ["2", "square"], ["3", "triangle"]]
    assert [int(row[3]) for row in rows[1:]] == np.bincount(mask.ravel(), minlength=4).tolist()
    assert [row[4] for row in rows[1:]] == [f"{(mask == k).mean():.6f}" for k in range(4)]
    assert re.search("  1 +disc +[0-9,]+ pixels +[0-9.]+%\n", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["unet", "deeplabv3"])
def test_flip_makes_a_mirrored_image_give_the_mirrored_mask_and_scales_change_it(trained, scenes_run, kind):
    weights = trained / "run/best.pth" if kind == "unet" else scenes_run[0] / "run/last.pth"
    args = predict.get_args_parser().parse_args(["x", "--weights", str(weights), "--flip", "--scales", "0.75,1.25"])
    loaded = predict.load_model(args)
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)

    def logits(image):
        return next(predict.predict_averaged(loaded, [image], args))
    both = logits(image)
    assert torch.allclose(both, logits(image[:, ::-1].copy()).flip(-1), atol=1e-4)
    args.flip, args.scales = False, (1.0,)
    one = logits(image)
    assert one.shape == both.shape == (1 if kind == "unet" else 4, 60, 90) and not torch.allclose(one, both, atol=1e-3)


def test_sizes_and_scales_reach_the_nets(trained, scenes_run, monkeypatch):
    image, seen = np.zeros((60, 90, 3), np.uint8), []
    args = predict.get_args_parser().parse_args(["x", "--weights", str(trained / "run/best.pth")])
    loaded = predict.load_model(args)
    loaded.args.image_size = (192, 128)  # width, height
    monkeypatch.setattr(predict.unet, "forward", lambda model, images, dtype: seen.append(images.shape) or [images])
    predict.predict_unet(loaded, [image], 0.5)
    args.weights = str(scenes_run[0] / "run/last.pth")
    loaded = predict.load_model(args)
    loaded.args.base_size = 80
    loaded = loaded._replace(model=lambda images: seen.append(images.shape) or {"out": images})
    predict.predict_deeplabv3(loaded, [image], 0.5)
    assert seen == [(1, 3, 64, 96), (1, 3, 40, 60)]


def test_official_files_need_the_nets_name(tmp_path):
    import torchvision
    build = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    theirs = build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "official.pth")
    image = np.random.default_rng(0).integers(0, 256, (520, 640, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "x.png")
    with pytest.raises(utils.InputError, match="does not say what net.*--model"):
        run("--weights", tmp_path / "official.pth", tmp_path / "x.png", "--output-dir", tmp_path / "out")
    with pytest.raises(utils.InputError, match="weights of another net"):
        run("--weights", tmp_path / "official.pth", "--model", "deeplabv3_resnet50", tmp_path / "x.png")
    with pytest.raises(utils.InputError, match="coco: no such file"):  # which is DeepLab's
        run("--weights", "coco", "--model", "tiny", tmp_path / "x.png")
    run("--weights", tmp_path / "official.pth", "--model", "deeplabv3_mobilenet_v3_large", tmp_path / "x.png",
        "--output-dir", tmp_path / "out")
    tensor = torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))[None]  # 520 is the size the preset asks for
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = theirs((tensor - mean) / std)["out"][0].argmax(0).numpy()
    assert (np.array(Image.open(tmp_path / "out/x_mask.png")) == expected).mean() > 0.999
    assert "aeroplane" in (tmp_path / "out/areas.csv").read_text()


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
            scores = [float(row[5]) for row in rows if row[:2] == [name, ""] and row[2].startswith(f"object {k} mask")]
            mask = np.array(Image.open(tmp_path / f"out/{name}_{k}_{np.argmax(scores) + 1}.png")) > 0
            ious.append((mask & (ids == own)).sum() / (mask | (ids == own)).sum())
    assert np.mean(ious) == pytest.approx(figures["val_iou"], abs=1e-4)


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
    ([], "needs prompts: give --box"), (["--box", "60,10,10,60"], "a box is empty"), (["--point", "500,3"], "outside"),
    (["--prompts", "none.json"], "none.json: no json"), (["--point", "3,3,2"], "label is 1 or 0"),
    (["--box", "1,1,9,9", *["--point", "3,3"] * 5], "more than 6 points"), (["--box", "1,1,9,9", "--flip"], "--flip"),
    (["--prompts", "x.json", "--box", "1,1,9,9"], "one or the other")])
def test_prompts_that_cannot_be(objects_run, tmp_path, more, words):
    folder, _ = objects_run
    Image.fromarray(np.load(folder / "imgs/object_0001.npy")).save(tmp_path / "x.png")
    with pytest.raises(utils.InputError, match=words):
        run("--weights", folder / "run/last.pth", tmp_path / "x.png", *more, "--output-dir", tmp_path / "out")


def test_a_list_of_prompts_is_one_object_per_entry(objects_run, tmp_path):
    folder, _ = objects_run
    Image.fromarray(np.load(folder / "imgs/object_0001.npy")).save(tmp_path / "x.png")
    box, clicks = [10, 10, 60, 60], [[30, 30, 1], [70, 70, 0]]
    entries = [{"points": [[30, 40, 1]]}, {"points": clicks}, {"boxes": [box], "points": clicks}]
    (tmp_path / "prompts.json").write_text(utils.json.dumps({"x": entries}))
    run("--weights", folder / "run/last.pth", tmp_path / "x.png", "--prompts", tmp_path / "prompts.json",
        "--output-dir", tmp_path / "out")
    rows = (tmp_path / "out/areas.csv").read_text().splitlines()[1:]
    for k, (points, more) in enumerate([(["30,40,1"], []), (["30,30,1", "70,70,0"], []),
                                        (["30,30,1", "70,70,0"], ["--box", "10,10,60,60"])]):
        given = [word for point in points for word in ("--point", point)]
        run("--weights", folder / "run/last.pth", tmp_path / "x.png", *given, *more, "--output-dir", tmp_path / f"{k}")
        (alone,) = (tmp_path / f"{k}/areas.csv").read_text().splitlines()[1:]
        pixels, found = (int(row.split(",")[3]) for row in (alone, rows[k]))
        assert abs(pixels - found) <= 2 and pixels > 0  # several at once are rounded otherwise
    assert [row.split(",")[1] for row in rows] == ["1", "2", "3"]


def test_objects_are_counted_by_the_class_that_prompts_name(objects_run, tmp_path, capsys):
    folder, _ = objects_run
    for name in "xy":
        Image.fromarray(np.load(folder / "imgs/object_0001.npy")).save(tmp_path / f"{name}.png")
    boxes = [[10, 10, 60, 60], [30, 30, 70, 70]]
    entries = {"x": [{"class": " dog ", "boxes": boxes}, {"points": [[30, 40, 1]]},
                     {"class": "cat", "boxes": boxes[:1]}],
               "y": {"class": "dog", "points": [[30, 40, 1]]}}
    (tmp_path / "prompts.json").write_text(utils.json.dumps(entries))
    run("--weights", folder / "run/last.pth", tmp_path / "?.png", "--prompts", tmp_path / "prompts.json",
        "--coco", "rle", "--output-dir", tmp_path / "out")
    assert "objects: cat 1, dog 3, object 1\n" in capsys.readouterr().out
    rows = [row.split(",")[:4] for row in (tmp_path / "out/areas.csv").read_text().splitlines()[1:]]
    assert [row[:3] for row in rows] == [["x", "1", "dog"], ["x", "2", "dog"], ["x", "3", "object 3"],
                                         ["x", "4", "cat"], ["y", "1", "dog"]]
    coco = utils.json.loads((tmp_path / "out/annotations.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert names == {1: "cat", 2: "dog", 3: "object"}
    assert [names[found["category_id"]] for found in coco["annotations"]] == ["dog", "dog", "object", "cat", "dog"]
    assert [found["area"] for found in coco["annotations"]] == [int(row[3]) for row in rows]


# --- SAM ---

@pytest.fixture(scope="module")
def sam_run(tmp_path_factory):
    """A SAM decoder of a short training, its base weights, and its images."""
    import demo_data
    import finetune_sam_decoder
    folder = tmp_path_factory.mktemp("sam_run")
    demo_data.write_instances(folder, 10, rings=True, size=64)
    torch.manual_seed(0)
    torch.save(sam.NETS["demo"](64).state_dict(), folder / "base.pth")
    figures = finetune_sam_decoder.main(finetune_sam_decoder.get_args_parser().parse_args(
        ["--data-path", str(folder), "--output-dir", str(folder / "run"), "--model", "demo", "--image-size", "64",
         "--weights", str(folder / "base.pth"), "-b", "2", "-j", "0", "--epochs", "1", "--lr", "0", "--device", "cpu",
         "--year", "2012"]))
    return folder, figures


def test_boxes_give_what_sams_validation_scored(sam_run, tmp_path):
    import finetune_sam_decoder as script_
    folder, figures = sam_run
    names, prompts, truth = voc(folder, "ImageSets/Segmentation/val.txt").read_text().split(), {}, {}
    for name in names:
        image, ids = voc(folder, f"JPEGImages/{name}.jpg"), voc(folder, f"SegmentationObject/{name}.png")
        ids = script_.read_ids((name, image, ids))
        truth[name] = [ids == k for k in range(1, ids.max() + 1)], ids >= 0
        prompts[name] = {"boxes": script_.masks_to_boxes(torch.from_numpy(np.stack(truth[name][0]))).tolist()}
    (tmp_path / "prompts.json").write_text(utils.json.dumps(prompts))
    ious = []
    for name in names:  # one object at a time, as in the mask of ids a later one lies above
        for k, (box, mask) in enumerate(zip(prompts[name]["boxes"], truth[name][0])):
            run("--weights", folder / "run/last.pth", voc(folder, f"JPEGImages/{name}.jpg"), "--box",
                ",".join(map(str, box)), "--output-dir", tmp_path / f"{name}_{k}")
            pred = np.array(Image.open(tmp_path / f"{name}_{k}/{name}_mask.png")) == 1
            labelled = truth[name][1]
            ious.append((pred & mask & labelled).sum() / max(1, ((pred | mask) & labelled).sum()))
    assert np.mean(ious) == pytest.approx(figures["val_box_iou"], abs=0.01) and figures["val_box_iou"] > 0.02


def test_a_decoder_of_drawn_weights_finds_them_by_its_seed(sam_run, tmp_path):
    import finetune_sam_decoder
    finetune_sam_decoder.main(finetune_sam_decoder.get_args_parser().parse_args(
        ["--data-path", str(sam_run[0]), "--output-dir", str(tmp_path / "run"), "--model", "demo", "--image-size", "64",
         "--weights", "none", "--seed", "3", "-j", "0", "--epochs", "1", "--device", "cpu", "--year", "2012",
         "--limit", "2"]))
    image = next(voc(sam_run[0], "JPEGImages").iterdir())
    run("--weights", tmp_path / "run/last.pth", image, "--box", "1,1,9,9", "--output-dir", tmp_path / "out")


def test_a_decoder_alone_needs_its_base_and_an_official_file_nothing(sam_run, tmp_path, monkeypatch):
    folder, _ = sam_run
    image = voc(folder, "JPEGImages/blob_0000.jpg")
    monkeypatch.setitem(sam.WEIGHTS, "demo", {})
    monkeypatch.setattr(predict, "OFFICIAL", ["demo"])
    masks = []
    for number, weights in enumerate([["run/best.pth"], ["run/best.pth", "--base", folder / "base.pth"]]):
        out = tmp_path / str(number)
        run("--weights", folder / weights[0], *weights[1:], image, "--point", "30,30", "--box", "5,5,50,50",
            "--all-masks",
            "--output-dir", out)
        masks.append(np.array(Image.open(out / "blob_0000_mask.png")))
        assert len((out / "areas.csv").read_text().splitlines()) == 5 and (out / "blob_0000_1_3.png").exists()
    assert np.array_equal(*masks)
    other = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save(sam.NETS["demo"](64).state_dict(), other)
    with pytest.raises(utils.InputError, match="trained on other base weights"):
        run("--weights", folder / "run/best.pth", "--base", other, image, "--point", "30,30")
    args = predict.get_args_parser().parse_args(["x", "--weights", str(folder / "run/decoder.pth"), "--device", "cpu"])
    args.model = "demo"
    with pytest.raises(utils.InputError, match="decoder.pth: holds a decoder alone; give best.pth"):
        predict.load_model(args)
    monkeypatch.setattr(predict, "official_checkpoint", lambda path, name: {
        "format": 0, "net": "sam", "classes": [], "arch": {"model": "demo", "image_size": 64},
        "args": {"image_size": 64}})
    args.base = str(folder / "base.pth")
    ours, _ = load(folder / "run/best.pth")
    theirs = predict.load_model(args)
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[key])
    args.weights, args.base = str(folder / "base.pth"), None
    assert predict.load_model(args).name == "sam"
    monkeypatch.undo()
    args.weights, args.model = str(folder / "run/best.pth"), "vit_b"  # which is not of 1024 pixels
    with pytest.raises(utils.InputError, match="best.pth: names its own net; leave --model out"):
        predict.load_model(args)


def test_options_that_are_not_for_sam(sam_run, tiny, tmp_path):
    folder, _ = sam_run
    for weights, more, words in ((folder / "run/best.pth", ["--box", "1,1,9,9", "--tile", "64"],
                                  "--tile: is for nets without"),
                                 (tiny, ["--base", "x.pth"], "--base: is for SAM")):
        with pytest.raises(utils.InputError, match=words):
            run("--weights", weights, voc(folder, "JPEGImages/blob_0000.jpg"), *more, "--output-dir", tmp_path / "out")


# --- SAM 2 ---

@pytest.fixture(scope="module")
def sam2_file(tmp_path_factory):
    """A checkpoint of train_sam2.py's kind, not trained."""
    path = tmp_path_factory.mktemp("sam2") / "best.pth"
    torch.manual_seed(0)
    model = sam2.NETS["demo"](64)
    torch.nn.init.ones_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias)  # objects are there
    torch.save({"format": 2, "net": "sam2", "arch": {"model": "demo", "image_size": 64}, "classes": [],
                "args": {"image_size": 64}, "model": model.state_dict()}, path)
    return path


def sam2_by_hand(path, image, points, labels):
    """Masks (3, H, W) bool, IoU (3,) as the tracker gives them on a first frame: one, or three after one click."""
    model = sam2.NETS["demo"](64, dynamic_multimask_via_stability=True).eval()
    model.load_state_dict(torch.load(path)["model"])
    x = torch.nn.functional.interpolate(torch.tensor(image.transpose(2, 0, 1))[None].float(), (64, 64),
                                        mode="bilinear", antialias=True).round()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (sam2.PIXEL_MEAN, sam2.PIXEL_STD))
    _, feats, positions, sizes = model._prepare_backbone_features(model.forward_image((x - mean) / std))
    scale = torch.tensor([64 / image.shape[1], 64 / image.shape[0]])
    prompt = {"point_coords": torch.tensor([points]) * scale, "point_labels": torch.tensor([labels])}
    _, outputs, _, _ = model._track_step(0, True, feats, positions, sizes, prompt, None, {}, 1)
    assert outputs[6] > 0  # the object is there, or the tracker would give no mask
    logits = torch.nn.functional.interpolate(outputs[0], image.shape[:2], mode="bilinear")[0]
    return (logits > 0).numpy(), outputs[2][0].numpy()


@pytest.mark.parametrize("prompts, points, labels", [
    (["--point", "30,20"], [[30.0, 20.0]], [1]), (["--box", "5,6,60,40"], [[5.0, 6.0], [60.0, 40.0]], [2, 3]),
    (["--box", "5,6,60,40", "--point", "9,9,0"], [[5.0, 6.0], [60.0, 40.0], [9.0, 9.0]], [2, 3, 0]),
    (["--point", "30,20", "--point", "9,9,0"], [[30.0, 20.0], [9.0, 9.0]], [1, 0])])
@torch.no_grad()
def test_sam2_gives_what_its_net_gives(sam2_file, tmp_path, prompts, points, labels):
    image = noise(50, 80)
    Image.fromarray(image).save(tmp_path / "x.png")
    run("--weights", sam2_file, tmp_path / "x.png", *prompts, "--all-masks", "--output-dir", tmp_path / "out")
    masks, ious = sam2_by_hand(sam2_file, image, points, labels)
    assert len(masks) == (3 if len(labels) == 1 else 1)
    best = ious.argmax()
    found = utils.read_mask(tmp_path / "out/x_mask.png") == 1
    assert (found != masks[best]).mean() < 0.01 and 0 < found.sum() < found.size
    rows = [line.split(",") for line in (tmp_path / "out/areas.csv").read_text().splitlines()[1:]]
    assert float(rows[0][5]) == pytest.approx(ious[best], abs=2e-3) and len(rows) == 4
    if len(masks) == 3:
        for k in range(3):
            assert ((utils.read_mask(tmp_path / f"out/x_1_{k + 1}.png") > 0) != masks[k]).mean() < 0.01


def test_names_of_sam2_are_official_files(sam2_file, tmp_path, monkeypatch):
    assert [*sam2.WEIGHTS] == ["tiny", "small", "base_plus", "large"]
    assert predict.OFFICIAL[-4:] == [*sam2.WEIGHTS]
    state, fetched = torch.load(sam2_file)["model"], []
    torch.save({"model": state}, tmp_path / "official.pt")
    monkeypatch.setattr(weights, "fetch_weights", lambda **entry: fetched.append(entry) or tmp_path / "official.pt")
    monkeypatch.setitem(sam2.NETS, "tiny", sam2.NETS["demo"])
    for options in (["--weights", "tiny"], ["--weights", str(tmp_path / "official.pt"), "--model", "tiny"]):
        loaded = predict.load_model(predict.get_args_parser().parse_args(["x", "--device", "cpu", *options]))
        assert (loaded.name, loaded.model.image_size) == ("sam2", 1024)
        assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())
    assert fetched == [sam2.WEIGHTS["tiny"]]
    with pytest.raises(utils.InputError, match="best.pth: names its own net; leave --model out"):
        run("--weights", sam2_file, "--model", "tiny", tmp_path / "x.png")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "official.pt")
    with pytest.raises(utils.InputError, match="weights of another net"):
        run("--weights", tmp_path / "official.pt", "--model", "tiny", tmp_path / "x.png")


def test_sam2_finds_everything_and_refuses_what_is_not_for_it(sam2_file, tmp_path):
    Image.fromarray(noise(50, 80)).save(tmp_path / "x.png")
    run("--weights", sam2_file, tmp_path / "x.png", "--everything", 3, "--min-iou", 0, "--min-stability", 0,
        "--output-dir", tmp_path / "out")
    assert utils.read_mask(tmp_path / "out/x_mask.png").any()
    args = predict.get_args_parser().parse_args(["x", "--weights", str(sam2_file), "--everything"])
    predict.check_options(args, predict.load_model(args))
    for more, words in ((["--tile", "64"], "--tile: is for nets without"), (["--base", "x"], "--base: is for SAM;"),
                        ([], "needs prompts: give --box X0,Y0,X1,Y1, --point X,Y, --prompts FILE or --everything")):
        with pytest.raises(utils.InputError, match=words):
            run("--weights", sam2_file, tmp_path / "x.png", *more, "--output-dir", tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


# --- Tiles, depth, batches ---

def save_unet(path, classes=("a",), image_size=32, model="UNet", **arch):
    """A checkpoint of random weights, whose logits on noise lie on both sides of 0."""
    arch = {"model": model, "num_classes": len(classes), "input_channels": 3, **arch}
    torch.manual_seed(0)
    net = predict.NETS["unet"].build(**arch).eval()
    with torch.no_grad():
        noise = net(torch.randn(1, 3, 64, 64))
        for head, logits in zip([one for name, one in net.named_children() if name.startswith("final")],
                                noise if isinstance(noise, list) else [noise]):
            head.bias -= logits.flatten(2).median(2).values[0]
            for one in (head.weight, head.bias):
                one /= logits.std()
    torch.save({"format": 1, "net": "unet", "arch": arch, "classes": [*classes], "model": net.state_dict(),
                "args": {"image_size": [image_size, image_size]}}, path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("tiny") / "tiny.pth")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("two") / "two.pth", ["a", "b"])


def noise(height, width, seed=0):
    """RGB (H, W, 3) uint8, smooth enough for masks of some size."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height)))


def load(weights, *options):
    """The loaded net and args as main has them."""
    args = predict.get_args_parser().parse_args(["x", "--device", "cpu", "--weights", str(weights), *options])
    return predict.load_model(args), args


def whole(loaded, image, args):
    return next(predict.predict_averaged(loaded, [image], args))


@pytest.mark.parametrize("more", [[], ["--flip", "--scales", "1,1.5"]])
@pytest.mark.parametrize("kind", ["unet", "deeplabv3"])
def test_tiles_are_predicted_as_images_of_their_own_and_blended_where_they_overlap(two, scenes_run, kind, more):
    loaded, args = load(two if kind == "unet" else scenes_run[0] / "run/last.pth", "--tile", "40", "-b", "3", *more)
    image = noise(70, 100)
    logits = predict.predict_tiled(loaded, image, args)
    assert logits.shape == (2 if kind == "unet" else 4, 70, 100) and logits.dtype == torch.float32
    first, below, last = [whole(loaded, image[rows, columns], args) for rows, columns in (
        (slice(0, 40), slice(0, 40)), (slice(30, 70), slice(0, 40)), (slice(30, 70), slice(60, 100)))]
    assert torch.allclose(logits[:, :30, :30], first[:, :30, :30], atol=1e-4)  # each tile begins 30 after the former
    assert torch.allclose(logits[:, 40:, :30], below[:, 10:, :30], atol=1e-4)
    assert torch.allclose(logits[:, 40:, 70:], last[:, 10:, 10:], atol=1e-4)
    both = torch.stack([first[:, 30:, :30], below[:, :10, :30]])
    blend = logits[:, 30:40, :30]
    assert (blend >= both.amin(0) - 1e-4).all() and (blend <= both.amax(0) + 1e-4).all()
    upper, lower = (blend - both).abs().mean((1, 2, 3)), (blend[:, [0, -1]] - both[:, :, [0, -1]]).abs().mean((1, 3))
    assert (upper > 1e-3).all() and lower[0, 0] < lower[0, 1] and lower[1, 0] > lower[1, 1]  # the nearer one prevails


def test_an_image_no_larger_than_the_tile_is_done_whole_and_a_thin_one_too(tiny, tmp_path):
    for name, size in (("small", (30, 64)), ("thin", (20, 200)), ("even", (64, 64))):
        Image.fromarray(noise(*size)).save(tmp_path / f"{name}.png")
    run("--weights", tiny, tmp_path, "--tile", "64", "--output-dir", tmp_path / "a")
    run("--weights", tiny, tmp_path, "--output-dir", tmp_path / "b")
    same = {name: (np.array(Image.open(tmp_path / f"a/{name}_mask.png")) ==
                   np.array(Image.open(tmp_path / f"b/{name}_mask.png"))) for name in ("small", "thin", "even")}
    assert same["small"].all() and same["even"].all() and not same["thin"].all() and same["thin"].shape == (20, 200)


def test_tiles_take_no_float_copy_of_the_image(tiny, monkeypatch):
    import monai.inferers
    seen, theirs = [], monai.inferers.sliding_window_inference
    monkeypatch.setattr(monai.inferers, "sliding_window_inference",
                        lambda blank, *more, **also: seen.append(blank) or theirs(blank, *more, **also))
    loaded, args = load(tiny, "--tile", "64")
    logits = predict.predict_tiled(loaded, noise(100, 130), args)
    assert seen[0].shape == (1, 1, 100, 130) and seen[0].untyped_storage().nbytes() == 4
    assert logits.untyped_storage().nbytes() == 4 * 100 * 130


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_cuts_a_deeply_supervised_net_short(tmp_path, depth):
    weights = save_unet(tmp_path / "deep.pth", model="NestedUNet", deep_supervision=True)
    Image.fromarray(noise(32, 32)).save(tmp_path / "x.png")
    run("--weights", weights, tmp_path / "x.png", "--depth", depth, "--output-dir", tmp_path / "out")
    loaded, _ = load(weights)
    with torch.no_grad():
        heads = loaded.model(deeplabv3.normalize(torch.from_numpy(noise(32, 32).transpose(2, 0, 1)))[None])
    masks = [(head[0, 0] > 0).numpy() for head in heads]
    assert (np.array(Image.open(tmp_path / "out/x_mask.png")) == masks[depth - 1]).all()
    assert (masks[depth - 1] != masks[3]).any()


@pytest.mark.parametrize("preprocess, scale", [("official", [2, 4]), ("article", [2, 2])])
def test_prompts_follow_a_wide_image_into_the_nets_square(monkeypatch, preprocess, scale):
    loaded = SimpleNamespace(args=SimpleNamespace(preprocess=preprocess), net=predict.NETS["efficient_sam"],
                             model=SimpleNamespace(image_size=64), device=torch.device("cpu"), dtype=None)
    seen = []
    monkeypatch.setattr(efficient_sam, "decode", lambda model, image, points, labels, dtype: (
        seen.extend([image, points, labels]), (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3)))[1])
    monkeypatch.setattr(efficient_sam, "encode", lambda model, image, dtype: image)
    embedding = predict.NETS["efficient_sam"].encode(loaded, noise(16, 32))
    queries = [([[3, 5], [20, 12]], [2, 3]), ([[1, 2]], [1])]
    (logits, scores, best), = predict.predict_queries(loaded, embedding, (16, 32), queries)
    image, points, labels = seen
    assert image.shape == (1, 3, 64, 64) and logits.shape == (2, 3, 16, 32) and labels.tolist() == [[2, 3], [1, -1]]
    assert points[0].tolist() == [[3 * scale[0], 5 * scale[1]], [20 * scale[0], 12 * scale[1]]]
    assert points[1, 0].tolist() == [scale[0], 2 * scale[1]]
    assert (image[..., 32:, :] == 0).all() == (preprocess == "article")
    predict.check_prompts("x", [([[30, 15]], [1])], (16, 32, 3))
    with pytest.raises(utils.InputError, match="outside its 32x16 pixels"):
        predict.check_prompts("x", [([[15, 30]], [1])], (16, 32, 3))


def test_options_of_another_net_are_refused(tiny, scenes_run, objects_run, tmp_path):
    deep = save_unet(tmp_path / "plain.pth", model="NestedUNet", deep_supervision=False)
    deeplab, sam = scenes_run[0] / "run/last.pth", objects_run[0] / "run/last.pth"
    Image.fromarray(noise(32, 32)).save(tmp_path / "x.png")
    for weights, option, words in [
            (tiny, "--depth 2", "--depth: is for NestedUNet"), (deep, "--depth 2", "--depth: is for NestedUNet"),
            (deeplab, "--depth 2", "--depth: is for NestedUNet"), (sam, "--depth 2", "--depth: is for NestedUNet"),
            (sam, "--tile 64 --box 1,1,9,9", "--tile: is for nets without prompts"), 
            (tiny, "--box 1,1,9,9", "--box: is for nets with prompts"),
            (sam, "--prompts x.json --box 1,1,9,9", "one or the other"),
            (tiny, "--overlap 0.5", "--overlap: is of tiles"), (tiny, "--scales 1,20", "--scales.*from 0.1 to 10")]:
        with pytest.raises(utils.InputError, match=words):
            run("--weights", weights, tmp_path / "x.png", *option.split(), "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["unet", "deeplabv3"])
def test_batches_give_what_single_images_give(two, scenes_run, kind):
    loaded, args = load(two if kind == "unet" else scenes_run[0] / "run/last.pth", "--flip")
    images = [noise(*size, seed) for seed, size in enumerate([(50, 70), (70, 50), (50, 70), (33, 80), (100, 140)])]
    sizes = []
    loaded.model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    together = [*predict.predict_averaged(loaded, images, args)]
    assert sorted(sizes) == ([5, 5] if kind == "unet" else [1, 1, 1, 1, 3, 3])  # 140x100 is of the 70x50s' shape
    for image, logits in zip(images, together):
        assert torch.allclose(logits, whole(loaded, image, args), atol=1e-3)


def test_images_are_read_a_batch_ahead_and_no_further(tmp_path, monkeypatch):
    read, bad = [], []
    monkeypatch.setattr(utils, "read_image", lambda path: read.append(path) or np.zeros((2, 2, 3), np.uint8))
    done = 0
    for batch in predict.read_batches([(str(k), tmp_path / str(k)) for k in range(11)], 3, bad):
        done += len(batch)
        assert [name for name, *_ in batch] == [str(k) for k in range(done - len(batch), done)]
        assert done <= len(read) <= done + 3 and len(batch) == (3 if done < 11 else 2)
    assert done == len(read) == 11 and not bad


# --- Inputs, names, files ---

def test_a_list_file_names_images_beside_it_or_here(tiny, tmp_path, monkeypatch):
    for name in ("lists/a.png", "here/b.png", "here/c d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(20, 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    spaced, raw = " b.png ", os.fsdecode(b"\xe9.png")
    for name in (spaced, raw):
        Image.fromarray(noise(20, 30)).save(tmp_path / "lists" / name, "png")
    (tmp_path / "lists/all.txt").write_text(f"# images\na.png\n\n  b.png\n{tmp_path}/here/c d.png\nmissing.png\n"
                                            f"  # {spaced}\n{spaced}\n{raw}\n", errors="surrogateescape")
    with pytest.raises(utils.InputError, match="^missing.png: no such file$"):
        run("--weights", tiny, tmp_path / "lists/all.txt", "--output-dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*_mask.png")) == [
        " b_mask.png", "a_mask.png", "b_mask.png", "c d_mask.png", raw[0] + "_mask.png"]


@pytest.mark.parametrize("array, expected", [
    (np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20, np.arange(12).reshape(2, 2, 3) * 20),
    (np.array([[0, 1], [0.5, 1]]), [[0, 255], [128, 255]]), (np.array([[0, 1.6], [200, 255]]), [[0, 2], [200, 255]]),
    (np.array([[-100, -90], [50, 100]], np.int16), [[0, 13], [191, 255]]),
    (np.array([[False, True]]), [[0, 255]]), (np.full((1, 2, 4), 7, np.uint8), np.full((1, 2, 3), 7))])
def test_arrays_are_images_of_their_own_range(tmp_path, array, expected):
    np.save(tmp_path / "x.npy", array)
    image, expected = utils.read_image(tmp_path / "x.npy"), np.array(expected)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    assert (image == (expected if expected.ndim == 3 else expected[..., None])).all()


@pytest.mark.parametrize("array, words", [
    (np.array([[0, np.nan]]), "has values that are not finite"), (np.array([[-1.0, 0]]), "floats from -1 to 0"),
    (np.zeros((2, 2, 2), np.uint8), "has shape"), (np.zeros(5), "has shape"), (np.zeros((0, 3)), "not an array"),
    (np.array([[None]], object), "not an array of numbers"), (np.zeros((2, 2), complex), "not an array")])
def test_arrays_that_are_no_images(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(utils.InputError, match=f"x.npy: {words}"):
        utils.read_image(tmp_path / "x.npy")


@pytest.mark.parametrize("files, names", [
    (["a.jpg", "a.png", "b.png"], ["a_jpg", "a_png", "b"]),
    (["a.jpg", "a.png", "a_jpg.gif"], ["p_a_jpg", "a_png", "p_a_jpg_gif"]),
    (["A.png", "a.jpg"], ["A_png", "a_jpg"]), (["q/x.png", "r/x.png"], ["q_x_png", "r_x_png"]),
    (["s/q/x.png", "t/q/x.png"], ["s_q_x_png", "t_q_x_png"]), (["a/b_x.png", "a_b/x.png"], ["b_x", "x"]),
    (["a/b/x.png", "a_b/x.png"], ["b_x_png", "a_b_x_png"]),
    (["x.png", "x_mask_0.png"], ["x", "x_mask_0_2"])])
def test_names_never_collide(tmp_path, files, names):
    paths = [tmp_path / "p" / file for file in files]
    assert predict.name_outputs(paths, ["_mask.png", "_overlay.png", "_mask_0_mask.png"]) == names


def test_names_that_some_file_systems_take_for_one_are_two():
    for names in (("e\u0301.png", "\u00e9.png"), ("a.png", "A.png")):
        first, second = predict.name_outputs([predict.Path("/p", name) for name in names], ["_mask.png"])
        assert first[-4:] == "_png" and second[-6:] == "_png_2"


def test_any_names_get_files_of_their_own():
    rng, endings = np.random.default_rng(0), ["_mask.png", "_mask_a.png", "_mask_a_mask.png"]
    for _ in range(200):
        parts = ["a", "A", "a_mask_a", "a.png", "b", "a_b"]
        paths = [predict.Path(*rng.choice(parts, 2), f"{rng.choice(parts)}.{rng.choice(['png', 'jpg', 'PNG'])}")
                 for _ in range(12)]
        paths = [*dict.fromkeys(paths)]
        files = [(name + ending).lower() for name in predict.name_outputs(paths, endings) for ending in endings]
        assert len(set(files)) == 3 * len(paths)


def test_every_file_is_looked_for_before_the_first_is_written(two, objects_run, tmp_path):
    Image.fromarray(noise(32, 32)).save(tmp_path / "x.png")
    sam = objects_run[0] / "run/last.pth", "--box", "2,2,20,20", "--box", "5,5,30,30", "--all-masks", "yes"
    for weights, taken in [((two,), one) for one in (
            "x_mask.png", "x_overlay.png", "x_mask_a.png", "x_mask_b.png", "areas.csv", "annotations.json")] + [
            (sam, one) for one in ("x_1_1.png", "x_2_3.png")]:
        out = tmp_path / f"out_{taken}"
        out.mkdir()
        (out / taken).write_text("mine")
        with pytest.raises(utils.InputError, match=f"{taken}: exists; give --overwrite"):
            run("--weights", *weights, tmp_path / "x.png", "--coco", "rle", "--output-dir", out)
        assert [path.name for path in out.iterdir()] == [taken] and (out / taken).read_text() == "mine"
        run("--weights", *weights, tmp_path / "x.png", "--coco", "rle", "--output-dir", out, "--overwrite")
        assert (out / taken).read_bytes() != b"mine"


def test_what_is_read_is_never_written_over(tiny, tmp_path):
    for name in ("x.png", "x_mask.png"):
        Image.fromarray(noise(32, 32)).save(tmp_path / name)
    before = (tmp_path / "x_mask.png").read_bytes()
    with pytest.raises(utils.InputError, match="x_mask.png: would be written, and is read; give another --output-dir"):
        run("--weights", tiny, tmp_path / "x.png", tmp_path / "x_mask.png", "--output-dir", tmp_path, "--overwrite")
    assert (tmp_path / "x_mask.png").read_bytes() == before and len([*tmp_path.iterdir()]) == 2


def test_a_file_that_vanishes_or_is_too_large_is_one_of_the_errors_and_many_are_cut_short(tiny, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for k in range(14):
        Image.fromarray(noise(20, 20)).save(tmp_path / f"in/p{k:02}.png")
    theirs = utils.read_image

    def read(path):
        if path.name not in ("p05.png", "p13.png"):
            path.unlink()
        return theirs(path)
    monkeypatch.setattr(utils, "read_image", read)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # p05 and p13 are bombs now
    with pytest.raises(utils.InputError) as error:
        run("--weights", tiny, tmp_path / "in", "--output-dir", tmp_path / "out")
    lines = str(error.value)
    assert "p00.png: no such file; " in lines and "decompression bomb" in lines and "; and " in lines
    assert lines.endswith("p13.png") and lines.count(".png: ") == 10 and lines.count(".png") == 14 and "\n" not in lines
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["areas.csv"]


def test_annotations_of_an_image_that_fails_are_left_out(objects_run, tmp_path, monkeypatch):
    """OpenCV has an error of its own for lack of memory; it comes after the first annotation."""
    for k in range(3):
        Image.fromarray(noise(40, 40)).save(tmp_path / f"p{k}.png")
    overlay, done = utils.overlay, []

    def fail_once(image, mask):
        done.append(1)
        if len(done) == 2:
            raise cv2.error("OpenCV: (-4:Insufficient memory) Failed to allocate 9 bytes")
        return overlay(image, mask)
    monkeypatch.setattr(utils, "overlay", fail_once)
    monkeypatch.setattr(predict, "each_object", lambda parts: (
        (np.ones((3, 40, 40), bool), [1.0] * 3, 0) for _ in parts))
    with pytest.raises(utils.InputError, match="p1.png: out of memory"):
        run("--weights", objects_run[0] / "run/last.pth", *[tmp_path / f"p{k}.png" for k in range(3)], "--box",
            "2,2,20,20", "--coco", "rle", "--output-dir", tmp_path / "out")
    found = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [image["file_name"][-6:] for image in found["images"]] == ["p0.png", "p2.png"]
    assert [annotation["image_id"] for annotation in found["annotations"]] == [1, 2]


def test_what_is_done_is_listed_however_the_run_ends(tiny, tmp_path, monkeypatch):
    for k in range(4):
        Image.fromarray(noise(20, 20)).save(tmp_path / f"p{k}.png")
    theirs, asked = predict.predict_batch, []

    def predict_batch(loaded, images, args):
        asked.append(len(images))
        if len(asked) == 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return theirs(loaded, images, args)
    monkeypatch.setattr(predict, "predict_batch", predict_batch)
    with pytest.raises(utils.InputError, match="^[^;]*p1.png: out of memory; try --tile"):
        run("--weights", tiny, tmp_path, "--output-dir", tmp_path / "out")
    rows = (tmp_path / "out/areas.csv").read_text().split()
    assert [row.split(",")[0] for row in rows] == ["image", "p0", "p2", "p3"]

    def check_stop():
        if (tmp_path / "stopped/p1_mask.png").exists():
            raise utils.Stopped
    monkeypatch.setattr(utils, "raise_if_stopped", check_stop)
    with pytest.raises(utils.Stopped):
        run("--weights", tiny, tmp_path, "--output-dir", tmp_path / "stopped", "--coco")
    rows = (tmp_path / "stopped/areas.csv").read_text().split()
    assert [row.split(",")[0] for row in rows] == ["image", "p0", "p1"]
    assert len(coco(tmp_path / "stopped")["images"]) == 2


def test_options_reach_the_net(tiny, tmp_path, monkeypatch):
    import monai.inferers
    Image.fromarray(noise(100, 90)).save(tmp_path / "x.png")
    theirs, seen = monai.inferers.sliding_window_inference, []
    monkeypatch.setattr(monai.inferers, "sliding_window_inference", lambda *args, **more: (
        seen.append(args[2:5:2]), theirs(*args, **more))[1])
    normal, dtypes = unet.forward, set()
    monkeypatch.setattr(unet, "forward", lambda model, batch, dtype: (
        dtypes.add((dtype, len(batch))), normal(model, batch, dtype))[1])
    run("--weights", tiny, tmp_path / "x.png", tmp_path / "x.png", "--tile", 64, "-b", 3, "--overlap", 0.5, "--amp",
        "bf16", "--output-dir", tmp_path / "out")
    assert seen == [(3, 0.5)] and {dtype for dtype, _ in dtypes} == {torch.bfloat16} and max(dtypes, key=str)[1] == 3


@pytest.mark.parametrize("net", ["unet", "deeplabv3"])
def test_views_are_averaged_as_probabilities(net):
    """Two scales whose logits are 0 and 4 for the first class, 0 for the second."""
    def predict_one(loaded, images, scale):
        return [torch.stack([torch.full((4, 4), 4.0 * (scale == 2)), torch.zeros(4, 4)])]
    loaded = SimpleNamespace(net=predict.NETS[net]._replace(predict=predict_one))
    args = predict.get_args_parser().parse_args(["x", "--weights", "x", "--scales", "1,2"])
    logits = next(predict.predict_averaged(loaded, [np.zeros((4, 4, 3), np.uint8)], args))
    sure = 1 / (1 + math.exp(-4))
    prob = logits.sigmoid() if net == "unet" else logits.exp()
    assert prob[0].tolist() == [[pytest.approx((0.5 + sure) / 2)] * 4] * 4
    assert prob[1].tolist() == [[pytest.approx(0.5 if net == "unet" else (1.5 - sure) / 2)] * 4] * 4


# --- COCO ---

def decode(counts, size):
    assert sum(counts) == size[0] * size[1] and min(counts[1:-1]) > 0
    return np.repeat(np.arange(len(counts)) % 2, counts).reshape(size[::-1]).T.astype(bool)


def fill(polygons, size):
    """Pixels whose centre lies inside: from there to the right an odd number of edges is crossed."""
    mask = np.zeros(size, bool)
    for polygon in polygons:
        points = np.array(polygon).reshape(-1, 2)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, 1, 0)):
            for row in range(max(0, int(min(y0, y1)) - 1), min(size[0], int(max(y0, y1)) + 1)):
                if (y0 <= row + 0.5) != (y1 <= row + 0.5):
                    mask[row] ^= np.arange(size[1]) + 0.5 < x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    return mask


def without_holes(mask):
    import cv2
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), outlines, -1, 1, -1) > 0


def coco(folder):
    return utils.json.loads((folder / "annotations.json").read_text())


@pytest.mark.parametrize("kind", ["unet", "deeplabv3", "efficient_sam"])
def test_coco_annotations_decode_to_the_masks(two, scenes_run, objects_run, tmp_path, kind):
    (tmp_path / "in").mkdir()
    for k in range(2):
        Image.fromarray(noise(70, 90 + k, k) if kind == "unet" else np.array(Image.open(voc(
            scenes_run[0], f"JPEGImages/scene_000{k}.jpg")))).save(tmp_path / f"in/p{k}.png")
    loaded, args = load(scenes_run[0] / "run/last.pth")
    checkpoint = utils.load_checkpoint(scenes_run[0] / "run/last.pth")
    logits = whole(loaded, np.array(Image.open(tmp_path / "in/p0.png")), args)
    checkpoint["model"]["classifier.4.bias"][0] -= (logits[0] - logits[1:].amax(0)).median()  # half of it background
    torch.save(checkpoint, tmp_path / "scenes.pth")
    weights = {"unet": [two], "deeplabv3": [tmp_path / "scenes.pth"], "efficient_sam": [
        objects_run[0] / "run/last.pth", "--box", "10,10,60,60", "--box", "30,40,90,90"]}[kind]
    for form in (["--coco"], ["--coco", "rle"]):
        out = tmp_path / form[-1].strip("-")
        run("--weights", *weights, tmp_path / "in", *form, "--output-dir", out)
        found = coco(out)
        assert [image["file_name"] for image in found["images"]] == [f"{tmp_path}/in/p{k}.png" for k in range(2)]
        assert [one["name"] for one in found["categories"]] == {
            "unet": ["a", "b"], "deeplabv3": ["disc", "square", "triangle"], "efficient_sam": ["object"]}[kind]
        assert [one["id"] for one in found["annotations"]] == list(range(1, len(found["annotations"]) + 1))
        masks = {}
        for one in found["annotations"]:
            image = found["images"][one["image_id"] - 1]
            size = [image["height"], image["width"]]
            if form[-1] == "rle":
                assert one["segmentation"]["size"] == size
                mask = decode(one["segmentation"]["counts"], size)
                rows, columns = np.nonzero(mask)
                x, y = columns.min(), rows.min()
                assert one["area"] == mask.sum()
                assert one["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
            else:
                mask = fill(one["segmentation"], size)
            masks.setdefault((image["id"], one["category_id"]), []).append((mask, one))
        assert len(masks) > 1
        for (image_id, category), parts in masks.items():
            if kind == "efficient_sam":
                truth = np.array(Image.open(out / f"p{image_id - 1}_mask.png"))
                last = parts[-1][0]  # of two objects the later one is whole in the mask
                expected = truth == len(parts)
                assert 0 <= parts[0][1]["score"] <= 1.5 and len(parts) == 2
            else:
                name = f"p{image_id - 1}_mask" + (f"_{'ab'[category - 1]}" if kind == "unet" else "")
                expected = np.array(Image.open(out / f"{name}.png"))
                expected = expected > 0 if kind == "unet" else expected == category
                last = np.any([mask for mask, _ in parts], 0)
                assert sum(one["area"] for _, one in parts) == expected.sum() and "score" not in parts[0][1]
            assert (last == (expected if form[-1] == "rle" else without_holes(expected))).all()


def test_coco_needs_convert_labels_beside_it(tiny, tmp_path, monkeypatch):
    Image.fromarray(noise(20, 30)).save(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "convert_labels", None)
    with pytest.raises(utils.InputError, match="--coco: convert_labels.py is not beside this script"):
        run("--weights", tiny, tmp_path / "x.png", "--coco", "--output-dir", tmp_path / "out")
    run("--weights", tiny, tmp_path / "x.png", "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("given, words", [
    ({"x": {"box": [[1, 2, 9, 9]]}}, "x: not like .*it has box"),
    ({"x": {"boxes": [[1, 2, 9, 9]], "class": 3}}, 'x: not like .*"class" is a name'),
    ({"x": {"boxes": [[1, 2, 9, 9]], "class": " "}}, 'x: not like .*"class" is a name'),
    ({"x.png": {"boxes": [[1, 2, 9, 9]]}}, "no prompts for x, but for x.png ...; a name has no extension"),
    ({"images": [], "annotations": [], "categories": []}, "a COCO json; wanted is"),
    ({"x": {"boxes": [[0.1, 0.2, 0.5, 1.0]]}}, "in pixels, not fractions"),
    ({"x": {"points": [[0.3, 0.5, 1]]}}, "in pixels, not fractions")])
def test_prompts_files_of_another_kind_say_what_they_hold(objects_run, tmp_path, capsys, given, words):
    folder, _ = objects_run
    utils.save_image(tmp_path / "x.png", np.full((20, 30, 3), 90, np.uint8))
    (tmp_path / "prompts.json").write_text(json.dumps(given))
    with pytest.raises(utils.InputError, match=words):
        run("--weights", folder / "run/last.pth", tmp_path / "x.png", "--prompts", tmp_path / "prompts.json",
            "--output-dir", tmp_path / "out")
    assert "_mask.png" not in capsys.readouterr().out  # none was written


def test_a_folder_of_folders_and_an_empty_one_are_told_from_a_missing_one(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name, words in (("a", "a folder without images; for those in its folders give a glob"), ("c", "no such image")):
        with pytest.raises(utils.InputError, match=words):
            predict.find_inputs([str(tmp_path / name)])


# --- Everything ---

def objects_net(monkeypatch, net, ids):
    """The net's record, but a click shows the object of ids (H, W) there: as a mask of a pixel of ids each.

    Of the three masks the first is right, with a speck and a hole; the second is larger and rated low;
    the third is rated best, but depends on the threshold. Background: everything, rated low.
    """
    ids, seen = torch.tensor(ids), []

    def click(loaded, embedding, size, clicks):
        seen.extend(clicks.tolist())
        masks, scores = [], []
        for x, y in (clicks * ids.shape[0] / size[0]).long().tolist():
            mask = torch.where(ids == ids[y, x], 8.0, -8.0)
            row, column = (ids == ids[y, x]).nonzero()[0]
            if ids[y, x] != 5:  # which is thin
                mask[row + 2, column + 2] = -8  # a hole, and a speck
                mask[row, column - 2] = 8
            masks.append(torch.stack([mask, torch.full_like(mask, 8), (mask + 8).clamp(max=9) - 8.5]))
            scores.append([0.9 + 0.01 * x / ids.shape[1] if ids[y, x] else 0.2, 0.3, 0.99 if ids[y, x] else 0.4])
        padded = torch.nn.functional.pad(torch.stack(masks), (0, 7, 0, 5), value=8)
        return padded, torch.tensor(scores), ids.shape

    def enlarge(loaded, logits, size):
        return torch.nn.functional.interpolate(logits[..., :ids.shape[0], :ids.shape[1]], size)

    record = predict.NETS[net]._replace(enlarge=enlarge)
    monkeypatch.setattr(predict, "click", click)
    monkeypatch.setitem(predict.NETS, net, record)
    return seen


def test_everything_finds_each_object_once(objects_run, tmp_path, monkeypatch):
    folder, _ = objects_run
    ids = np.zeros((40, 60), np.uint8)
    for k, (rows, columns) in enumerate([(slice(2, 12), slice(5, 20)), (slice(15, 38), slice(2, 25)),
                                         (slice(5, 30), slice(30, 55)), (slice(12, 20), slice(38, 48))], 1):
        ids[rows, columns] = k
    ids[3:37, 57] = 5
    seen = objects_net(monkeypatch, "efficient_sam", ids)
    Image.fromarray(noise(80, 120)).save(tmp_path / "x.png")
    line = ["--weights", folder / "run/last.pth", tmp_path / "x.png", "--everything", 12, "--coco", "rle"]
    run(*line, "--output-dir", tmp_path / "out")
    places = [(k + 0.5) / 12 for k in range(12)]
    assert np.allclose(seen, [[120 * x, 80 * y] for y in places for x in places])
    mask = utils.read_mask(tmp_path / "out/x_mask.png")
    truth = ids.repeat(2, 0).repeat(2, 1)
    assert (mask > 0).sum() == (truth > 0).sum()
    for k in range(1, 6):  # the large ones below, each with an id of its own, without speck and hole
        own = mask[truth == k]
        assert (own == own[0]).all() and own[0] == [0, 3, 2, 1, 4, 5][k]
    rows = [line.split(",") for line in (tmp_path / "out/areas.csv").read_text().splitlines()[1:]]
    assert [int(row[3]) for row in rows] == [(truth == k).sum() for k in (3, 2, 1, 4, 5)]
    assert all(0.9 < float(row[5]) <= 0.91 for row in rows)  # of the clicks on it, that rated best
    found = json.loads((tmp_path / "out/annotations.json").read_text())["annotations"]
    assert len(found) == 5 and len({json.dumps(one["segmentation"]) for one in found}) == 5
    run(*line, "--output-dir", tmp_path / "small", "--min-pixels", 2000)
    assert len((tmp_path / "small/areas.csv").read_text().splitlines()) == 3
    run(*line, "--output-dir", tmp_path / "unsure", "--min-stability", 0, "--min-iou", 0.98)
    rows = [line.split(",") for line in (tmp_path / "unsure/areas.csv").read_text().splitlines()[1:]]
    assert {row[5] for row in rows} == {"0.9900"} and len(rows) == 5


def test_everything_that_finds_nothing_says_so(objects_run, tmp_path, monkeypatch, capsys):
    folder, _ = objects_run
    objects_net(monkeypatch, "efficient_sam", np.zeros((40, 60), np.uint8))
    Image.fromarray(noise(80, 120)).save(tmp_path / "x.png")
    run("--weights", folder / "run/last.pth", tmp_path / "x.png", "--everything", 3, "--output-dir", tmp_path / "out")
    assert "note: nothing found in 1 images; try a lower --min-iou" in capsys.readouterr().out
    assert not utils.read_mask(tmp_path / "out/x_mask.png").any()


@pytest.mark.parametrize("size", [(70, 40), (64, 64), (30, 90)])
@pytest.mark.parametrize("net, preprocess", [
    ("efficient_sam", "official"), ("efficient_sam", "article"), ("sam", ""), ("sam2", "official")])
def test_a_click_of_everything_is_a_point_prompt(objects_run, sam_run, sam2_file, net, preprocess, size):
    loaded, _ = load({"efficient_sam": objects_run[0] / "run/last.pth", "sam": sam_run[0] / "run/best.pth",
                      "sam2": sam2_file}[net])
    loaded.args.preprocess = preprocess
    record, clicks = predict.NETS[net], torch.tensor([[7.5, 9.0], [33.0, 21.5], [1.0, 29.0]])
    with torch.no_grad():
        embedding = record.encode(loaded, noise(*size))
        logits, iou, (height, width) = predict.click(loaded, embedding, size, clicks)
        side = logits.shape[-1]
        content = size if preprocess != "official" else (64, 64)
        assert [height, width] == [math.ceil(side * length / max(content)) for length in content]
        enlarged = record.enlarge(loaded, logits, size)
        for k, point in enumerate(clicks.tolist()):
            (one, scores, _), = predict.predict_queries(loaded, embedding, size, [([point], [1])])
            assert (one[0, -3:] - enlarged[k]).abs().max() < 1e-3 and (scores[0, -3:] - iou[k]).abs().max() < 1e-4


def found_in(monkeypatch, objects_run, masks, scores, *options):
    """Areas and scores of what --everything keeps of these masks (N, H, W), three of each click."""
    loaded, args = load(objects_run[0] / "run/last.pth", "--everything", "10", *options)
    predict.check_options(args, loaded)
    shown = iter(zip(masks.float().reshape(-1, 3, *masks.shape[1:]), torch.tensor(scores).reshape(-1, 3)))

    def click(loaded, embedding, size, clicks):
        parts = [next(shown, (torch.full((3, *masks.shape[1:]), -9.0), torch.zeros(3))) for _ in clicks]
        return *map(torch.stack, zip(*parts)), masks.shape[1:]
    monkeypatch.setattr(predict, "click", click)
    net = loaded.net._replace(encode=lambda *_: None, enlarge=lambda loaded, logits, size: logits)
    found = predict.find_everything(loaded._replace(net=net), np.zeros((*masks.shape[1:], 3), np.uint8), args)
    return [(int(mask.sum()), round(score.item(), 3)) for mask, score, _ in found]


def test_everything_takes_the_published_constants(objects_run, sam2_file, monkeypatch):
    """Boxes of IoU above 0.7 are one object; rated 0.88 at least, stable to 0.95 between -1 and 1; 32 x 32 clicks."""
    def draw(rows, columns, value=9.0, background=-9.0):
        mask = torch.full((40, 250), background)
        mask[rows, columns] = value
        return mask
    first, near, apart = (draw(slice(0, 20), slice(x, x + 100)) for x in (0, 14, 32))  # IoU 0.754; 0.695 to near
    assert found_in(monkeypatch, objects_run, torch.stack([first, near, apart]), [0.95, 0.94, 0.93]) == [
        (2000, 0.95), (2000, 0.93)]
    assert found_in(monkeypatch, objects_run, torch.stack([near, apart, first]), [0.95, 0.94, 0.93]) == [
        (2000, 0.95), (2000, 0.94)]
    stable, unstable = (draw(slice(0, 10), slice(0, 100), 1.01, -1.01) for _ in range(2))
    stable[0, :25], stable[0, 25:50] = 0.95, -0.95  # 950 of 1000 pixels are above 1
    unstable[0, :30], unstable[0, 30:60] = 0.95, -0.95
    last = draw(slice(20, 30), slice(0, 50))
    assert found_in(monkeypatch, objects_run, torch.stack([stable, last, last]), [0.9, 0.881, 0.879]) == [
        (975, 0.9), (500, 0.881)]
    assert found_in(monkeypatch, objects_run, torch.stack([unstable] * 3), [0.9] * 3) == []
    holes = draw(slice(0, 20), slice(0, 100))
    holes[5, 5:29] = holes[10, 5:30] = -9
    assert found_in(monkeypatch, objects_run, torch.stack([holes] * 3), [0.9] * 3) == [(1975, 0.9)]
    for weights, min_iou in ((objects_run[0] / "run/last.pth", 0.88), (sam2_file, 0.8)):
        loaded, args = load(weights, "--everything")
        predict.check_options(args, loaded)
        assert (args.everything, args.min_iou, args.min_stability, args.min_pixels) == (32, min_iou, 0.95, 25)


def test_everything_is_at_most_what_a_palette_holds(objects_run, monkeypatch, capsys):
    masks = torch.full((300, 30, 40), -9.0)
    for k in range(300):
        masks[k, k // 20 * 2, k % 20 * 2] = 9
    found = found_in(monkeypatch, objects_run, masks, [1 - k / 3000 for k in range(300)], "--min-pixels", "0")
    assert len(found) == 254 and min(score for _, score in found) == round(1 - 253 / 3000, 3)
    assert "note: 254 objects, as many as a palette mask can hold" in capsys.readouterr().out


def test_small_holes_are_filled_and_small_regions_dropped():
    mask = np.zeros((20, 30), bool)
    mask[2:12, 2:12] = True
    mask[4:6, 4:7] = False  # a hole of 6
    mask[14:16, 20:22] = True  # a speck of 4
    for least, hole, speck in [(0, False, True), (5, False, False), (6, False, False), (7, True, False)]:
        cleaned = predict.drop_small(mask, least)
        assert cleaned[4:6, 4:7].all() == hole and cleaned[14:16, 20:22].any() == speck
        assert cleaned[2:4].sum() == 20 and cleaned.sum() == 94 + 6 * hole + 4 * speck
    assert not predict.drop_small(mask, 300).any()


@pytest.mark.parametrize("more, words", [
    (["--everything", "--box", "1,1,9,9"], "--everything: takes the place of prompts; leave --box out"),
    (["--everything", "--all-masks"], "leave --all-masks out"), (["--min-iou", "0.5"], "--min-iou: is of --everything"),
    (["--box", "1,1,9,9", "--min-pixels", "3"], "--min-pixels: is of --everything")])
def test_options_of_everything(objects_run, tmp_path, more, words):
    folder, _ = objects_run
    Image.fromarray(noise(80, 120)).save(tmp_path / "x.png")
    with pytest.raises(utils.InputError, match=words):
        run("--weights", folder / "run/last.pth", tmp_path / "x.png", *more, "--output-dir", tmp_path / "out")


@pytest.mark.slow
def test_the_demos_net_finds_most_objects(tmp_path):
    """Recall at IoU 0.5 of generated objects by the net that --demo of finetune_sam_decoder.py starts from."""
    import demo_data
    import finetune_sam_decoder
    demo = finetune_sam_decoder.get_args_parser().parse_args(["--demo", "--output-dir", str(tmp_path / "demo")])
    finetune_sam_decoder.main(demo)
    demo_data.write_instances(tmp_path / "new", 20)
    root = tmp_path / "new/VOCdevkit/VOC2012"
    run("--weights", tmp_path / "demo/base/best.pth", root / "JPEGImages", "--everything", 16, "--min-iou", 0.5,
        "--min-stability", 0.7, "--output-dir", tmp_path / "out")
    found = total = 0
    for path in (root / "SegmentationObject").glob("*.png"):
        ids, mask = utils.read_mask(path), utils.read_mask(tmp_path / f"out/{path.stem}_mask.png")
        predicted = [mask == k for k in np.unique(mask) if k]
        for k in set(np.unique(ids)) - {0, 255}:
            ious = [(one & (ids == k)).sum() / (one | (ids == k)).sum() for one in predicted]
            total, found = total + 1, found + (max(ious, default=0) >= 0.5)
    print(f"recall at IoU 0.5: {found} of {total}")
    assert found / total > 0.5
