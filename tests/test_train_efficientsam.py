"""train_efficientsam.py: losses and IoU on hand-worked masks, prompts, .npy files honest and spoilt, training."""
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_efficientsam as script_
import utils
from nets import efficient_sam, weights

SMALL = ["--model", "demo", "--image-size", "64", "-b", "2", "-j", "0", "--device", "cpu", "--lr", "0.001"]


@pytest.fixture
def objects(tmp_path):
    """Folder of six 48x48 arrays with two or more objects each."""
    folder = tmp_path / "npy"
    for sub in ("imgs", "gts"):
        (folder / sub).mkdir(parents=True)
    import demo_data
    for index in range(6):
        for sub, pixels in zip(("imgs", "gts"), demo_data.draw_object_ids(index, 48)):
            np.save(folder / sub / f"o{index}.npy", pixels)
    return folder


def options(*texts):
    return script_.get_args_parser().parse_args([str(text) for text in texts])


def train(folder, output, *more):
    return script_.main(options("--data-path", folder, "--output-dir", output, *SMALL, *more))


def refuses(folder, *expected, more=()):
    output = folder.parent / "refused"
    with pytest.raises(utils.InputError) as caught:
        train(folder, output, "--epochs", 1, *more)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message
    assert not (output / "last.pth").exists()


# --- Losses and figures ---

def hand_worked():
    """One object, the upper half of 4x4; masks: exact, its upper half, everything. Returns logits, truth, IoU."""
    truth = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    truth[..., :2, :] = True
    logits = torch.full((1, 1, 3, 4, 4), -20.0)
    logits[0, 0, 0, :2] = logits[0, 0, 1, :1] = 20.0
    logits[0, 0, 2] = 20.0
    return logits, truth, torch.tensor([[[1.0, 0.5, 0.5]]])


def test_each_mask_has_its_own_iou():
    logits, truth, iou = hand_worked()
    assert torch.equal(script_.mask_iou(logits > 0, truth[:, :, None].expand_as(logits)), iou)
    assert script_.mask_iou(torch.zeros(4, 4).bool(), torch.zeros(4, 4).bool()) == 0


def test_loss_of_hand_worked_masks():
    """Dice with squared predictions: 1 - 2 * both / (pred + true), with MONAI's 1e-5; a wrong pixel's entropy is 20."""
    logits, truth, iou = hand_worked()
    valid = torch.tensor([[True]])
    dice = [0, 1 - (2 * 4 + 1e-5) / (4 + 8 + 1e-5), 1 - (2 * 8 + 1e-5) / (16 + 8 + 1e-5)]
    entropy = [0, 20 * 4 / 16, 20 * 8 / 16]
    losses = [a + b for a, b in zip(dice, entropy)]
    args = options("--multimask", "all")
    assert script_.criterion(logits, iou, truth, valid, args).item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    wrong = torch.tensor([[[0.0, 0.5, 0.5]]])  # the net's own IoU of the first mask is off by 1
    assert script_.criterion(logits, wrong, truth, valid, args).item() == pytest.approx((sum(losses) + 1) / 3, rel=1e-5)
    args = options("--multimask", "min", "-iou_loss_weight", 3)
    assert script_.criterion(logits, iou, truth, valid, args).item() == pytest.approx(losses[0], abs=1e-5)
    assert script_.criterion(logits, wrong, truth, valid, args).item() == pytest.approx(1, rel=1e-5)
    args = options("--multimask", "all", "-seg_loss_weight", 2, "-ce_loss_weight", 0, "-iou_loss_weight", 0)
    assert script_.criterion(logits, iou, truth, valid, args).item() == pytest.approx(2 * sum(dice) / 3, rel=1e-5)
    unsure = script_.criterion(0 * logits, iou, truth, valid, args).item()  # sigmoid 0.5: its square counts
    assert unsure == pytest.approx(2 * (1 - 2 * 0.5 * 8 / (0.25 * 16 + 8)), rel=1e-5)
    args = options("-seg_loss_weight", 0, "-ce_loss_weight", 0)  # what is covered by less than half is no object
    assert script_.criterion(logits, iou, truth.float().clamp(min=0.4), valid, args).item() == 0


def test_only_the_best_mask_is_trained_and_filled_up_queries_are_not():
    logits, truth, iou = hand_worked()
    logits = (logits / 20).repeat(1, 2, 1, 1, 1).requires_grad_()
    args = options("-iou_loss_weight", 0)
    loss = script_.criterion(logits, iou.repeat(1, 2, 1), truth.repeat(1, 2, 1, 1), torch.tensor([[True, False]]), args)
    loss.backward()
    assert logits.grad[0, 0, 0].any() and not logits.grad[0, 0, 1:].any() and not logits.grad[0, 1].any()


def test_filled_boxes():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True                       # a box itself
    masks[1, 0, 0] = masks[1, 3, 7] = True          # two corners of 4 x 8
    assert script_.box_iou(masks).tolist() == pytest.approx([1, 2 / 32])


# --- Data ---

def test_prompts_of_a_hand_drawn_mask():
    mask = np.zeros((20, 30), bool)
    mask[4:11, 6:21] = True
    points, labels = script_.draw_prompt(mask, options("--prompt", "both"), vary=False)
    assert points.tolist()[:2] == [[6, 4], [20, 10]] and labels.tolist() == [2, 3, 1]
    assert mask[int(points[2, 1]), int(points[2, 0])] and points[2, 1] == 7
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        points, labels = script_.draw_prompt(mask, options("-bbox_shift", 200), vary=True)
        assert labels.tolist() == [2, 3] and (points >= 0).all() and (points <= [29, 19]).all()
        assert (points[1] - points[0] >= [7, 3]).all()  # half of it at least
        seen |= {("in" if points[0, 0] > 6 else "out"), points[0, 0].item()}
    assert {"in", "out"} <= seen and len(seen) > 30  # both ways, which the article's are not
    moved = [script_.draw_prompt(mask, options("-bbox_shift", 12), vary=True)[0][0, 0] - 6 for _ in range(200)]
    assert 1.2 < max(np.abs(moved)) <= 12 * 30 / 256  # of an image of 256 pixels
    clicks = {tuple(script_.draw_prompt(mask, options("--prompt", "point"), vary=True)[0][0]) for _ in range(200)}
    assert len(clicks) > 60 and all(mask[int(y), int(x)] for x, y in clicks)


def test_image_masks_and_prompts_are_mirrored_together(objects):
    ids = np.zeros((64, 64), np.uint16)
    ids[5:20, 10:50] = 300
    np.save(objects / "gts/o0.npy", ids)
    np.save(objects / "imgs/o0.npy", np.dstack([(ids > 0) * np.uint8(255)] * 3))
    args, places = options("--image-size", 64, "-bbox_shift", 0), set()
    dataset = script_.NpyDataset(script_.find_items(objects), args, train=True, augment=True)
    for epoch in range(20):
        image, points, _, masks, *_ = dataset[epoch, 0]
        (x0, y0), (x1, y1) = points[0].int().tolist()
        assert torch.equal(image[0], masks[0]) and masks[0, y0:y1 + 1, x0:x1 + 1].all() and masks.sum() == 600
        places.add((x0, y0))
    assert places == {(10, 5), (14, 5), (10, 44), (14, 44)}


def test_points_follow_the_image_into_the_nets_square(objects):
    np.save(objects / "imgs/o0.npy", np.zeros((40, 80, 3), np.uint8))
    ids = np.zeros((40, 80), np.int32)
    ids[10:20, 20:40] = 70_000
    np.save(objects / "gts/o0.npy", ids)
    items = script_.find_items(objects)
    dataset = script_.NpyDataset(items, options("--image-size", 64), train=True, augment=False)
    image, points, _, masks, *_ = dataset[0, 0]
    assert points.tolist() == [[[16, 16], pytest.approx([31.2, 30.4])]] and image.shape == (3, 64, 64)
    assert masks.shape == (1, 64, 64) and masks[0, 16:32, 16:32].all() and masks.sum() == 256
    args = options("--image-size", 64, "--preprocess", "article")
    _, points, _, masks, *_ = script_.NpyDataset(items, args, True, False)[0, 0]
    assert points.tolist() == [[[16, 8], pytest.approx([31.2, 15.2])]]
    assert masks[0, 8:16, 16:32].all() and masks.sum() == 128


@pytest.mark.parametrize("size", [1, 2])
def test_no_object_vanishes_when_masks_shrink(size):
    for corner in range(0, 40, 3):
        mask = torch.zeros(1, 2000, 2000, dtype=torch.bool)
        mask[0, corner:corner + size, corner:corner + size] = True
        assert script_.resize_masks(mask, options("--image-size", 128)).max() == 1


def test_areas_stay_when_masks_shrink():
    """Cut at half, they would grow by 1 to 5 % where the image is shrunk by exactly 2 or 4."""
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    disc = ((x - 60) ** 2 + (y - 66) ** 2 < 20**2)[None]
    for side in (64, 128):
        shrunk = script_.resize_masks(disc, options("--image-size", side))
        assert shrunk.sum().item() == pytest.approx(disc.sum().item() * (side / 256) ** 2, rel=2e-3)


@pytest.mark.parametrize("shape", [(303, 400), (10, 300), (300, 10), (128, 128)])
def test_what_the_articles_preprocessing_pads_is_cut_off_again(shape):
    """A decoder that says 1 wherever the image was put: the whole image at its own size, nothing of the padding."""
    height, width = script_.content_size(shape, 128, "article")

    class Placed:
        image_size = 128

        def predict_masks(self, image, points, labels, *rest):
            logits = torch.full((1, points.shape[1], 3, 128, 128), -1.0)
            logits[..., :height, :width] = 1
            return logits, torch.zeros(1, points.shape[1], 3)
    parts = list(script_.predict_masks(Placed(), torch.zeros(1, 3, 128, 128), torch.zeros(11, 2, 2),
                                       torch.zeros(11, 2), shape, "article", None))
    logits = torch.cat([logits for _, logits, _ in parts])
    assert [first for first, _, _ in parts] == [0, 8] and logits.shape == (11, 3, *shape) and (logits > 0).all()


def test_masks_are_enlarged_bicubically_as_by_the_official_class():
    edge = torch.tensor([-1.0, -1, -1, -1, 1, 1, 1, 1]).expand(1, 1, 8, 8)
    for mode in ("official", "article"):
        large = efficient_sam.enlarge(edge, (32, 32), 8, mode)
        assert 1.05 < large.max() < 1.3  # beside an edge it overshoots, which linear interpolation does not


def test_training_enlarges_masks_as_prediction_does(monkeypatch):
    edge, seen = torch.nn.Linear(1, 8), []
    edge.bias.data = torch.tensor([-1.0, -1, -1, -1, 1, 1, 1, 1])
    model = torch.nn.Module()
    model.forward = lambda *_: (edge.bias.expand(1, 2, 3, 8, 8), torch.zeros(1, 2, 3))
    monkeypatch.setattr(script_, "criterion", lambda logits, *_: seen.append(logits.max().item()) or logits.sum())
    run = SimpleNamespace(steps=lambda loader: loader, device=torch.device("cpu"), pinned=False, dtype=None,
                          scaler=torch.amp.GradScaler("cpu", enabled=False), finish_gradient=lambda *_: False)
    batch = [torch.zeros(1, 3, 32, 32), None, None, torch.zeros(1, 2, 32, 32), torch.ones(1, 2).bool()]
    batch[1:3] = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2)
    optimizer = torch.optim.SGD(edge.parameters(), 1)
    script_.train_one_epoch(model, [[[*batch, (0,)]]], optimizer, run, options())
    assert 1.05 < seen[0] < 1.3


def test_the_articles_preprocessing_stretches_the_contrast():
    image = torch.full((3, 20, 40), 60, dtype=torch.uint8)
    image[:, :, 10:], image[1, :, 20:] = 110, 160
    seen = script_.preprocess(image, 40, "article")
    assert seen.unique().tolist() == pytest.approx([0, 0.5, 1], abs=1e-6) and not seen[:, 20:].any()
    plain = script_.preprocess(image, 40, "official")
    assert plain.unique().tolist() == pytest.approx([value / 255 for value in (60, 110, 160)])
    small = script_.preprocess(image, 20, "article")  # linear: it stays between the two
    assert small.min() == 0 and small.max() == 1


def test_training_compares_masks_of_256_pixels_at_most():
    mask = torch.ones(1, 20, 20, dtype=torch.bool)
    sides = [script_.resize_masks(mask, options("--image-size", side)).shape[-1] for side in (128, 256, 1024)]
    assert sides == [128, 256, 256]


def test_every_object_of_validation_and_at_most_max_objects_of_training(objects):
    ids = np.arange(48 * 48).reshape(48, 48) // 48 * 300  # 47 rows of one object each, ids up to 14,100
    np.save(objects / "gts/o0.npy", ids.astype(np.uint16))
    items = script_.find_items(objects)
    trained = script_.NpyDataset(items, options("--image-size", 64, "--max-objects", 5), True, True)
    assert [len(trained[epoch, 0][3]) for epoch in range(3)] == [5, 5, 5]
    draws = [trained[epoch, 0][3] for epoch in range(3)]
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[0], trained[0, 0][3])
    _, points, _, numbers, *_ = script_.NpyDataset(items, options(), False, False)[0, 0]
    assert len(points) == 47 and np.array_equal(numbers, ids // 300)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32, bool])
def test_ids_of_every_kind(objects, dtype):
    ids = np.zeros((48, 48), dtype)
    ids[5:9, 5:9] = 1 if dtype == bool else 200
    ids[20:30, 20:30] = 1 if dtype == bool else 255
    np.save(objects / "gts/o0.npy", ids)
    read = script_.read_item(script_.find_items(objects)[0])[1]
    assert read.dtype == np.int64 and np.array_equal(read, ids.astype(np.int64))


@pytest.mark.parametrize("image, expected", [
    (np.full((48, 48, 3), 100, np.uint8), 100), (np.full((48, 48), 100, np.uint8), 100),
    (np.full((48, 48, 3), 0.5, np.float32), 128), (np.full((48, 48, 3), 100.0), 100),
    (np.full((48, 48, 4), 100, np.uint8), 100), (np.full((48, 48, 1), 100, np.uint8), 100),
    (np.pad(np.full((46, 46), 3000, np.uint16), 1, constant_values=1000), 255)])
def test_images_of_every_kind(objects, image, expected):
    np.save(objects / "imgs/o0.npy", image)
    read = script_.read_item(script_.find_items(objects)[0])[0]
    assert read.shape == (48, 48, 3) and read.dtype == np.uint8 and (read[10, 10] == expected).all()


def test_ones_own_checkpoint_trains_on_at_another_size(objects, tmp_path, capsys):
    train(objects, tmp_path / "a", "--epochs", 1)
    train(objects, tmp_path / "b", "--epochs", 1, "--image-size", 80, "--weights", tmp_path / "a/best.pth")
    assert "trained with image_size 64, now 80" in capsys.readouterr().out


def test_images_without_objects_are_counted_and_left_out(objects, capsys):
    np.save(objects / "gts/o0.npy", np.zeros((48, 48), np.uint8))
    loaders = script_.create_loaders(options("--data-path", objects, *SMALL))
    assert sum(len(loader.dataset) for loader in loaders) == 5
    assert "images have no object and are left out" in capsys.readouterr().out


def test_beyond_the_first_images_only_headers_are_read_and_empty_masks_do_no_harm(objects, tmp_path, monkeypatch):
    items, args = script_.find_items(objects), options("--data-path", objects, *SMALL)
    for index in (1, 2, 3):
        np.save(objects / "gts" / f"o{index}.npy", np.zeros((48, 48), np.uint8))
    assert len(script_.keep_items(items, "training", args)) == 3
    monkeypatch.setattr(utils, "READ_WHOLE", 1)
    assert len(script_.keep_items(items, "training", args)) == 6
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["o0", "o1", "o2", "o3"], "val": ["o4", "o5"]}))
    figures = train(objects, tmp_path / "some", "--split", split, "-b", 1, "--epochs", 2)
    rows = (tmp_path / "some/log.csv").read_text().splitlines()
    column = {name: rows[-1].split(",")[i] for i, name in enumerate(rows[0].split(","))}
    assert math.isfinite(float(column["loss"])) and column["skipped"] == "0" and 0 <= figures["val_iou"] <= 1
    np.save(objects / "gts/o5.npy", np.zeros((48, 48), np.uint8))  # not looked at, and in no figure
    before = script_.main(options("--data-path", objects, "--split", split, "--test-only", "--weights",
                                  tmp_path / "some/last.pth", *SMALL))
    split.write_text(json.dumps({"train": ["o0"], "val": ["o4"]}))
    alone = script_.main(options("--data-path", objects, "--split", split, "--test-only", "--weights",
                                 tmp_path / "some/last.pth", *SMALL))
    assert before == alone
    for sub, array in (("gts", np.ones((40, 48), np.uint8)), ("imgs", np.array([None]))):
        np.save(objects / sub / "o2.npy", array)
        with pytest.raises(utils.InputError, match=f"{sub}/o2.npy"):
            script_.keep_items(items, "training", args)
    np.save(objects / "gts/o2.npy", np.ones((48, 48), np.uint8))
    np.save(objects / "imgs/o2.npy", np.ones((48, 48, 3), np.uint8))
    (objects / "imgs/o2.npy").write_bytes((objects / "imgs/o2.npy").read_bytes()[:-9])
    with pytest.raises(utils.InputError, match="imgs/o2.npy"):
        script_.keep_items(items, "training", args)


def test_a_image_that_is_all_object_has_one(objects):
    np.save(objects / "gts/o0.npy", np.full((48, 48), 7, np.uint8))
    masks = script_.NpyDataset(script_.find_items(objects), options("--image-size", 64), True, False)[0, 0][3]
    assert masks.shape == (1, 64, 64) and masks.all()


# --- Training ---

def test_every_file_is_written_and_testing_repeats_the_figures(objects, tmp_path, capsys):
    figures = train(objects, tmp_path / "run", "--epochs", 3)
    for name in ("last.pth", "best.pth", "log.csv", "curves.png", "val_samples.png", "split.json", "args.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert printed.count("before training:") == 2 and "filled boxes" in printed
    assert 0 <= figures["val_iou"] <= figures["val_oracle_iou"] <= 1
    assert figures["best_val_iou"] >= figures["before"]["val_iou"]
    tested = train(objects, tmp_path / "x", "--test-only", "--resume", tmp_path / "run/last.pth")
    assert tested == {key: figures[key] for key in tested}
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("more", [
    ["--prompt", "point"], ["--prompt", "both"], ["--multimask", "all"], ["--freeze", "encoder"], ["--amp", "bf16"],
    ["--accumulate", "2", "-b", "1"], ["--scheduler", "cosine"], ["--clip-grad", "0.1"], ["--gradient-checkpointing"],
    ["--preprocess", "article"], ["--max-objects", "1"], ["--data_aug", "False"], ["--overfit", "2"]])
def test_every_option_trains(objects, tmp_path, more):
    figures = train(objects, tmp_path / "run", "--epochs", 1, *more)
    assert math.isfinite(figures["val_iou"])
    model = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    assert all(p.isfinite().all() for p in model.values())


@pytest.mark.parametrize("more", [["--accumulate", 4, "-b", 1], ["-b", 3]])
def test_the_gradient_is_the_mean_over_objects_however_they_lie_in_batches(objects, tmp_path, more):
    for name, batches in (("a", ["-b", 4]), ("b", more)):
        train(objects, tmp_path / name, "--epochs", 1, *batches)
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in "ab")
    close = all(torch.allclose(a["model"][key], b["model"][key], atol=1e-4) for key in a["model"]
                if "k_proj.bias" not in key and "qkv.bias" not in key)  # whose true gradient is 0
    assert close == ("--accumulate" in more)  # three and one are two steps: the comparison can fail


def test_weight_decay_is_on_matrices_alone_and_the_cosine_falls():
    model, args = script_.NETS["demo"](64), options("--weight-decay", 0.25, "--lr", 2, "--epochs", 4)
    decayed, others = script_.create_optimizer(model, args).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0)
    assert {p.ndim for p in decayed["params"]}.isdisjoint({0, 1})
    embeddings = [id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert {*embeddings} <= {id(p) for p in others["params"]}
    rates = [script_.learning_rate(args, epoch) for epoch in range(4)]
    assert rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])


def test_the_rate_falls_by_a_tenth_after_six_epochs_without_a_lower_loss(objects, tmp_path, monkeypatch):
    losses, figures = iter([1.0, 0.5, *[0.6] * 8]), dict.fromkeys(script_.FIGURES, 0.5)
    monkeypatch.setattr(script_, "evaluate", lambda *_: figures)
    monkeypatch.setattr(script_, "draw_samples", lambda *_: None)
    monkeypatch.setattr(utils.Run, "mean_loss", lambda _: current[0])
    current, end_epoch = [next(losses)], utils.Run.end_epoch

    def end(run, *args, **more):
        end_epoch(run, *args, **more)
        current[0] = next(losses)
    monkeypatch.setattr(utils.Run, "end_epoch", end)
    train(objects, tmp_path / "run", "--epochs", 9, "--limit", 2, "--scheduler", "plateau")
    rates = [float(line.split(",")[2]) for line in (tmp_path / "run/log.csv").read_text().splitlines()[1:]]
    assert rates == pytest.approx([1e-3] * 8 + [9e-4])


def test_prompts_that_are_never_given_and_the_mask_never_asked_for_stay_as_they_are(objects, tmp_path):
    train(objects, tmp_path / "run", "--epochs", 2, "--weight-decay", 0.5, "--multimask", "all")
    torch.manual_seed(41)
    before = script_.NETS["demo"](64).state_dict()
    after = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    same = [key for key in before if torch.equal(before[key], after[key])]
    unused = ("gaussian_matrix", "point_embeddings.weight", "hypernetworks_mlps.0.")
    assert all(any(word in key for word in unused) for key in same), same
    assert all(any(word in key for key in same) for word in unused)
    assert "prompt_encoder.point_embeddings.weight" in same


def test_a_frozen_encoder_stays_as_it_is(objects, tmp_path):
    train(objects, tmp_path / "run", "--epochs", 1, "--freeze", "encoder")
    torch.manual_seed(41)
    fresh = script_.create_model(options(*SMALL, "--weights", "none"))[0].state_dict()
    trained = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    same = {key for key in fresh if torch.equal(fresh[key], trained[key])}
    assert {key for key in fresh if key.startswith("image_encoder.")} <= same
    assert "mask_decoder.iou_token.weight" not in same


def test_of_an_encoder_alone_the_neck_is_trained_though_it_is_frozen(objects, tmp_path):
    state = script_.NETS["demo"](64).state_dict()
    encoder = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    start = "--weights", tmp_path / "encoder.pth", "--freeze", "encoder"
    train(objects, tmp_path / "run", "--epochs", 1, *start)
    train(objects, tmp_path / "run", "--epochs", 2, *start, "--resume", "auto")
    train(objects, tmp_path / "straight", "--epochs", 2, *start)
    resumed, straight = [torch.load(tmp_path / name / "last.pth", weights_only=True)["model"]
                         for name in ("run", "straight")]
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key
        if key in encoder:
            assert torch.equal(value, encoder[key]) == ("neck" not in key), key
    whole = "--weights", tmp_path / "run/best.pth", "--freeze", "encoder"  # whose neck has been trained
    model, _ = script_.create_model(options(*SMALL, *whole))
    assert not any(p.requires_grad for p in model.image_encoder.parameters())


def test_official_files_load_by_path_and_offline_the_url_is_told(tmp_path, monkeypatch):
    args = options("--model", "efficient_sam_vitt", "--weights", "none")
    theirs = script_.create_model(args)[0].state_dict()
    torch.save({"model": theirs}, tmp_path / "vitt.pt")
    args = options("--model", "efficient_sam_vitt", "--image-size", 256, "--weights", tmp_path / "vitt.pt")
    ours = script_.create_model(args)[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    args.model = "efficient_sam_vits"
    with pytest.raises(utils.InputError, match="vitt.pt: weights of another net"):
        script_.create_model(args)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(url, path, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(utils.InputError, match="efficient_sam_vits.pt.zip.*put it at"):
        weights.fetch_weights(**script_.WEIGHTS["efficient_sam_vits"])

    def online(url, path, **kwargs):
        import zipfile
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "vitt.pt", "weights/efficient_sam_vits.pt")
    monkeypatch.setattr(torch.hub, "download_url_to_file", online)
    path = weights.fetch_weights(**script_.WEIGHTS["efficient_sam_vits"])
    assert path.name == "efficient_sam_vits.pt" and path.read_bytes() == (tmp_path / "vitt.pt").read_bytes()


def test_the_articles_command_line_runs(objects, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script_.main(options(*f"""-data_root {objects} -pretrained_checkpoint none -work_dir ./workdir -num_epochs 1
        -batch_size 4 -num_workers 0 -device cpu -bbox_shift 5 -lr 0.00005 -weight_decay 0.01 -iou_loss_weight 1.0
        -seg_loss_weight 1.0 -ce_loss_weight 1.0 --model demo --image-size 64""".split()))
    assert (tmp_path / "workdir/best.pth").exists()


def test_sanity_check_prints_counts_and_draws_a_panel(objects, tmp_path, capsys):
    train(objects, tmp_path / "run", "--sanity_check")
    printed = capsys.readouterr().out
    assert "train: 4 images, 4 of 48x48" in printed and "objects, " in printed
    assert "note: half" not in printed  # they are 9.1 of the demo net's cells wide
    assert (tmp_path / "run/sanity_check.png").exists() and not (tmp_path / "run/last.pth").exists()


# --- Bad input ---

def test_missing_folders_and_pairs(objects, tmp_path):
    refuses(tmp_path / "nowhere", "nowhere/imgs: no such folder", "--data-path")
    (objects / "gts/o2.npy").unlink()
    refuses(objects, "imgs/o2.npy", "gts has no o2.npy")
    for path in (objects / "imgs").iterdir():
        path.unlink()
    refuses(objects, "imgs: no images or .npy files")


def test_image_files_and_id_masks_train_as_the_arrays_do(objects, tmp_path):
    folder = tmp_path / "files"
    for sub in ("imgs", "gts"):
        (folder / sub).mkdir(parents=True)
    for index in range(6):
        image, ids = (np.load(objects / sub / f"o{index}.npy") for sub in ("imgs", "gts"))
        Image.fromarray(image).save(folder / f"imgs/o{index}.{('png', 'bmp', 'tif')[index % 3]}")
        if index == 0:
            utils.save_mask(folder / "gts/o0.png", ids)
        else:  # 8 and 16 bits
            ids = ids.astype(np.uint8) if index % 2 else ids.astype(np.uint16) * 300
            Image.fromarray(ids).save(folder / f"gts/o{index}.{('png', 'tiff')[index % 2]}")
    for name, data in (("a", objects), ("b", folder)):
        train(data, tmp_path / name, "--epochs", 1)
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in "ab")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_lossy_masks_and_two_files_of_one_name_are_refused(objects):
    ids = np.load(objects / "gts/o1.npy")
    (objects / "gts/o1.npy").unlink()
    for name in ("o1.jpg", "o1.png"):  # what a file holds counts, not what it is called
        Image.fromarray(ids.astype(np.uint8)).save(objects / "gts" / name, "JPEG")
        refuses(objects, f"gts/{name}: JPEG can change ids")
        (objects / "gts" / name).unlink()
    np.save(objects / "gts/o1.npy", ids)
    Image.fromarray(np.load(objects / "imgs/o2.npy")).save(objects / "imgs/o2.png")
    refuses(objects, "imgs/o2.png: o2.npy has the same name; remove one")


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_object_arrays_are_refused_without_unpickling(objects):
    with open(objects / "gts/o1.npy", "wb") as file:
        np.lib.format.write_array(file, np.array([Evil()], dtype=object), allow_pickle=True)
    refuses(objects, "gts/o1.npy: not an array of numbers")
    (objects / "gts/o1.npy").write_bytes(pickle.dumps(Evil()))
    refuses(objects, "gts/o1.npy: not an array of numbers")


@pytest.mark.parametrize("sub, array, words", [
    ("imgs", np.zeros((48, 48, 2), np.uint8), "has shape (48, 48, 2)"), ("imgs", np.zeros(5), "has shape (5,)"),
    ("gts", np.zeros((48, 40), np.uint8), "40x48 pixels, but"), ("gts", np.zeros((48, 48, 1), np.uint8), "has shape"),
    ("imgs", np.full((48, 48, 3), np.nan), "not finite"), ("imgs", np.full((48, 48, 3), -1.0), "floats from -1 to -1"),
    ("gts", np.full((48, 48), 0.5), "whole"), ("gts", np.full((48, 48), -1), "not be negative"),
    ("imgs", np.array(["a"]), "not an array of numbers"), ("imgs", np.zeros((0, 4, 3)), "not an array of numbers")])
def test_arrays_that_cannot_be(objects, sub, array, words):
    np.save(objects / sub / "o1.npy", array)
    refuses(objects, f"{sub}/o1.npy", words)


def test_truncated_and_empty_files(objects):
    path = objects / "imgs/o1.npy"
    path.write_bytes(path.read_bytes()[:200])
    refuses(objects, path, "not an array of numbers")
    path.write_bytes(b"")
    refuses(objects, path, "not an array of numbers")


def test_no_object_at_all(objects):
    for path in (objects / "gts").iterdir():
        np.save(path, np.zeros((48, 48), np.uint8))
    refuses(objects, "gts: none of 4 masks has an object")


@pytest.mark.parametrize("more, words", [
    (["--image-size", "100"], ["--image-size 100", "multiple of 16"]),
    (["--weights", "no.pth"], ["no.pth", "no such file"]),
    (["--resume", "no.pth"], ["no.pth", "no such file"]), (["--test-only"], ["--test-only", "--weights or --resume"])])
def test_options_that_cannot_be(objects, more, words):
    refuses(objects, *words, more=more)


def test_testing_with_other_prompts_or_preprocessing_is_refused(objects, tmp_path):
    train(objects, tmp_path / "run", "--epochs", 1)
    for more in (["--prompt", "point"], ["--preprocess", "article"]):
        refuses(objects, f"{more[0]} {more[1]}: trained with",
                more=["--test-only", "--weights", tmp_path / "run/best.pth", *more])


def test_a_run_of_the_ddp_script_is_not_resumed_by_this_one(objects, tmp_path):
    train(objects, tmp_path / "run", "--epochs", 1)
    checkpoint = torch.load(tmp_path / "run/last.pth", weights_only=True)
    checkpoint["args"]["world_size"] = 2
    utils.save_checkpoint(tmp_path / "run/last.pth", checkpoint)
    with pytest.raises(utils.InputError, match="torchrun --nproc_per_node 2, now 1"):
        train(objects, tmp_path / "run", "--epochs", 2, "--resume", "auto")


def test_splits_are_written_and_read_again(objects, tmp_path):
    train(objects, tmp_path / "a", "--epochs", 1)
    split = json.loads((tmp_path / "a/split.json").read_text())
    train(objects, tmp_path / "b", "--epochs", 1, "--seed", 3, "--split", tmp_path / "a/split.json")
    assert json.loads((tmp_path / "b/split.json").read_text()) == split
    refuses(objects, "in both", more=["--val-path", objects])


def test_real_arrays_pass_the_sanity_check(real_data, tmp_path, capsys):
    train(real_data / "npy_sample", tmp_path / "run", "--sanity-check")
    assert "train: 32 images" in capsys.readouterr().out


def test_figures_are_of_the_mask_the_net_rates_best(objects, monkeypatch):
    """Two objects; of three masks the net rates the second best, which is half of each, the first is exact."""
    dataset = script_.create_loaders(options("--data-path", objects, *SMALL))[1].dataset
    batch = script_.NpyDataset.collate([dataset[0, 0]])
    ids, count = batch[3][0], int(batch[3].max())

    def predict_masks(model, embedding, points, labels, size, args, dtype):
        truth = torch.stack([ids == k for k in range(1, count + 1)])
        half = truth & (torch.cumsum(truth.flatten(1), 1).reshape(truth.shape) <= truth.sum((1, 2))[:, None, None] // 2)
        masks = torch.stack([truth, half, torch.zeros_like(truth)], 1)
        yield 0, torch.where(masks, 9.0, -9.0), torch.tensor([[0.2, 0.75, 0.1]]).expand(count, -1)
    monkeypatch.setattr(script_, "predict_masks", predict_masks)
    monkeypatch.setattr(script_, "encode", lambda *args: None)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=None, pinned=False)
    figures = script_.evaluate(SimpleNamespace(eval=lambda: None), [batch], run, options(*SMALL))
    assert figures["val_iou"] == pytest.approx(0.5, abs=0.01) and figures["val_oracle_iou"] == 1
    assert figures["val_iou_error"] == pytest.approx(0.25, abs=0.01)
    assert figures["val_dice"] == pytest.approx(2 / 3, abs=0.01)


def test_uneven_ends_are_filled_up_for_each_process(objects, monkeypatch):
    import train_efficientsam_ddp
    args = train_efficientsam_ddp.get_args_parser().parse_args(["--data-path", str(objects), *SMALL, "--limit", "3"])
    loaders = []
    for rank in (0, 1):
        monkeypatch.setattr(utils, "ranks", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(train_efficientsam_ddp, "keep_items", lambda items, part, args: items)
        loaders.append(train_efficientsam_ddp.create_loaders(args)[0])
    keys = [key for loader in loaders for key in loader.sampler]
    assert [len(loader) for loader in loaders] == [1, 1] and sorted(index for _, index in keys) == [-1, 0, 1, 2]
