"""train_sam2.py: official losses, steps and groups; prompts, J and F by hand; videos as they are found; training."""
import csv
import json
import math
import re
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import demo_data
import train_sam2 as script_
import utils
from conftest import ROOT, save_grey
from parity_fill import fill
from parity_inputs import discs
from test_nets_sam2 import FIXTURES, build, check, clip, disc_masks, load_reference

SMALL = ["--model", "demo", "--weights", "none", "--image-size", "64", "--num-frames", "3", "-b", "2", "-j", "0",
         "--device", "cpu", "--lr", "0.001", "--vision-lr", "0.001", "--epochs", "1", "--multiplier", "1",
         "--num-correction-points", "1"]


def options(*texts):
    return script_.get_args_parser().parse_args([str(text) for text in texts])


def train(folder, output, *more):
    return script_.main(options("--data-path", folder, "--output-dir", output, *SMALL, *more))


@pytest.fixture
def clips(tmp_path):
    """Folder of six 64x64 videos of five frames and two objects."""
    demo_data.write_clips(tmp_path / "clips", 6, size=64, num_frames=5, objects=2)
    return tmp_path / "clips"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data, output folder, figures) of a short run, with all that a run writes."""
    folder = tmp_path_factory.mktemp("trained")
    demo_data.write_clips(folder / "clips", 6, size=64, num_frames=5, objects=2)
    return folder / "clips", folder / "run", train(folder / "clips", folder / "run", "--epochs", 2)


def dataset(folder, *more, part="train", args=()):
    args = options("--data-path", folder, *SMALL, *more)
    train_loader, val_loader = script_.create_loaders(args)
    return (train_loader if part == "train" else val_loader).dataset


def refuses(folder, *expected, more=()):
    with pytest.raises(utils.InputError) as caught:
        dataset(folder, *more)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message


def set_of(*circles, size=64):
    return disc_masks(size, *circles)[:, 0]


# --- Against the official training ---

@pytest.mark.parametrize("name, more", [
    ("mose", []), ("noall", ["--supervise-all-iou", "False"]), ("mse", ["--iou-use-l1-loss", "False"]),
    ("noobj", ["--pred-obj-scores", "False"]),
    ("focalobj", ["--focal-gamma-obj-score", "2", "--focal-alpha-obj-score", "0.25"])])
def test_losses_and_their_gradients_are_the_official_ones(name, more):
    reference, args = load_reference("losses"), options(*more)
    shape = reference["shape"].tolist()
    targets = np.unpackbits(reference["targets_packed"].numpy())[:math.prod(shape)].reshape(shape).astype(bool)
    draw, passes = np.random.RandomState(reference["seed"].item()), []
    for t, counts in enumerate(((3, 1, 1), (3,))):
        for j, count in enumerate(counts):
            logits = 3 * draw.randn(3, count, 64, 64) + 4 * (targets[t][:, None] - 0.5)
            leaves = [torch.from_numpy(x.astype(np.float32)).requires_grad_()
                      for x in (logits, draw.rand(3, count), 2 * draw.randn(3, 1))]
            passes.append((t, j, leaves))
    # Logits of the masks' own size: resizing them leaves them as they are
    sums = sum(script_.criterion(*leaves, torch.from_numpy(targets[t]), args) for t, _, leaves in passes) / 3
    names = ("mask", "dice", "iou", "class")
    for key, value in zip(names, sums.tolist()):
        assert value == pytest.approx(reference[f"{name}_loss_{key}"].item(), rel=1e-5), key
    weighted = sums @ torch.tensor([20.0, 1, 1, 1])
    assert weighted.item() == pytest.approx(reference[f"{name}_core_loss"].item(), rel=1e-5)
    if name == "mose":
        weighted.backward()
        for t, j, (logits, ious, score) in passes:
            check("masks", logits.grad[:, :, ::8, ::8], reference[f"grad_{t}_{j}_masks"], 1e-6)
            assert logits.grad.norm().item() == pytest.approx(reference[f"grad_{t}_{j}_masknorm"].item(), rel=1e-4)
            check("ious", ious.grad, reference[f"grad_{t}_{j}_ious"], 1e-6)
            check("score", score.grad, reference[f"grad_{t}_{j}_score"], 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tag", ["maskprompt", "clicks", "image"])
def test_passes_losses_and_gradients_of_a_clip_are_the_official_ones(tag, checkpointing, monkeypatch):
    """Three objects of two videos; the clicks are the reference's, drawn by the official 'center' rule."""
    model, reference = fill(build("mini")).eval(), load_reference("mini_train")
    model.image_encoder.trunk.gradient_checkpointing = checkpointing
    num_frames = 1 if tag == "image" else 4
    images = clip(15, 8, 128).unflatten(0, (4, 2))[:num_frames].transpose(0, 1).flatten(0, 1)  # video after video
    masks = torch.from_numpy(discs(4, 128, [(50, 60, 20, 3, 1, 0, 3), (90, 30, 12, -2, 4, 0, 1),
                                            (30, 95, 16, 1, -3, 0, 3)]))[:num_frames]
    prompts, corrected, draws = {0: {}}, (), torch.zeros(num_frames, 0, 3)
    if tag != "maskprompt":
        points, labels = reference[f"{tag}_f0_points"], reference[f"{tag}_f0_labels"]
        prompts = {0: {"point_coords": points[:, :1], "point_labels": labels[:, :1]}}
        corrected, draws = (0,), torch.zeros(num_frames, points.shape[1] - 1, 3)
        given = iter(range(1, points.shape[1]))

        def next_clicks(masks, pred, draws, void):
            i = next(given)
            return points[:, i:i + 1], labels[:, i:i + 1]
        monkeypatch.setattr(script_, "next_clicks", next_clicks)
    args = options("--gradient-checkpointing", checkpointing)
    backbone = model._prepare_backbone_features(model.forward_image(images))[1:]
    videos, losses = torch.tensor([0, 0, 1]), 0
    one = script_.Clip(None, masks, prompts, corrected, draws)
    for t, passes in script_.track_clips(model, backbone, videos, one, args, None):
        assert len(passes) == reference[f"{tag}_f{t}_nsteps"]
        for j, (low_res, ious, score) in enumerate(passes):
            check("ious", ious, reference[f"{tag}_f{t}_s{j}_ious"], 1e-5)
            check("score", score, reference[f"{tag}_f{t}_s{j}_score"], 1e-4)
            losses = losses + script_.criterion(low_res, ious, score, masks[t], args) / 3
    for key, value in zip(("mask", "dice", "iou", "class"), losses.tolist()):
        assert value == pytest.approx(reference[f"{tag}_loss_loss_{key}"].item(), rel=1e-5), key
    (losses @ torch.tensor([20.0, 1, 1, 1])).backward()
    norms = json.loads((FIXTURES / "mini_grad_norms.json").read_text())
    for key, p in model.named_parameters():
        norm = norms[key][["maskprompt", "clicks", "image"].index(tag)]
        if norm is None or norm == 0:
            assert p.grad is None or not p.grad.any(), key
        elif not key.endswith("k_proj.bias"):  # mathematically zero
            assert p.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), key


def test_optimizer_groups_and_rates_are_the_official_ones():
    reference = json.loads((FIXTURES / "param_groups_mini.json").read_text())
    model, args = build("mini"), options()
    optimizer = script_.create_optimizer(model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for i, done in enumerate(reference["where"]):
        script_.set_learning_rate(optimizer, args, done)
        for group in optimizer.param_groups:
            for p in group["params"]:
                expected = reference["params"][names[id(p)]]
                assert group["lr"] == pytest.approx(expected["lr"][i], rel=1e-6), names[id(p)]
                assert group["weight_decay"] == expected["wd"], names[id(p)]
            assert [*group["betas"], group["eps"]] == [*reference["betas"], reference["eps"]]


# --- Prompts ---

NO_VOID = torch.zeros(8, 1, 1, 1, dtype=torch.bool)  # of up to eight frames, of any size


def test_a_click_is_on_a_wrong_pixel_and_says_what_it_should_be():
    masks = set_of((20, 20, 8), (40, 40, 10), (30, 30, 6))
    pred = set_of((28, 20, 8), (40, 40, 10), (30, 30, 9))  # moved; right; too large
    seen = torch.zeros(2, 64, 64, dtype=torch.bool)
    for draw in torch.linspace(0, 0.9999, 300):
        coords, labels = script_.next_clicks(masks, pred, draw.expand(3), NO_VOID[0])
        assert coords.shape == (3, 1, 2) and labels.shape == (3, 1)
        (x, y), label = coords[0, 0].int().tolist(), labels[0, 0].item()
        assert masks[0, y, x] != pred[0, y, x] and label == masks[0, y, x]
        seen[label, y, x] = True
        (x, y), label = coords[1, 0].int().tolist(), labels[1, 0].item()
        assert not masks[1, y, x] and label == 0  # nothing is wrong: on the background
        (x, y), label = coords[2, 0].int().tolist(), labels[2, 0].item()
        assert pred[2, y, x] and not masks[2, y, x] and label == 0
    wrong = masks[0] ^ pred[0]
    assert seen.any(0).sum() > 0.95 * min(300, wrong.sum())
    assert (seen[1].sum() - seen[0].sum()).abs() < 20  # equally likely: both parts have the same size


def test_every_wrong_pixel_is_equally_likely():
    masks, pred = torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2, 3] = masks[0, 7, 7] = pred[0, 0, 0] = pred[0, 5, 1] = True
    found = [script_.next_clicks(masks, pred, torch.tensor([draw]), NO_VOID[0])
             for draw in (0.0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.999999, 1 - 2**-24)]
    assert [coords[0, 0].tolist() for coords, _ in found] == [
        [0, 0], [0, 0], [3, 2], [3, 2], [1, 5], [7, 7], [7, 7], [7, 7]]
    assert [labels.item() for _, labels in found] == [0, 0, 1, 1, 0, 1, 1, 1]


def test_clicks_from_the_truth_and_on_a_full_or_empty_mask():
    mask = set_of((20, 20, 8))
    for draw in torch.linspace(-1, -0.001, 50):  # below 0: as if nothing were predicted
        coords, labels = script_.next_clicks(mask, mask, draw[None], NO_VOID[0])
        x, y = coords[0, 0].int().tolist()
        assert mask[0, y, x] and labels.item() == 1
    full, empty = torch.ones(1, 9, 9, dtype=torch.bool), torch.zeros(1, 9, 9, dtype=torch.bool)
    draw = torch.tensor([0.5])
    assert script_.next_clicks(full, full, draw, NO_VOID[0])[1].item() == 1   # official: 0 at 0, 0
    assert script_.next_clicks(empty, empty, draw, NO_VOID[0])[1].item() == 0


def test_boxes_move_by_a_tenth_at_most_and_absent_objects_have_none():
    masks = torch.zeros(3, 512, 512, dtype=torch.bool)
    masks[0, 100:201, 50:101] = True    # 50 x 100, so moved by up to 5 and 10
    masks[1, 5:505, 5:505] = True       # by 20 at most, within the image
    corners = []
    for _ in range(200):
        coords, labels = script_.draw_boxes(masks, NO_VOID[0])
        assert coords.shape == (3, 2, 2) and labels[:2].tolist() == [[2, 3], [2, 3]]
        assert labels[2].tolist() == [0, -1]  # a click beside it, and padding
        corners.append(coords[:2].flatten(1))
    moved = torch.stack(corners) - torch.tensor([[50.0, 100, 100, 200], [5, 5, 504, 504]])
    assert (moved[:, 0].abs().amax(0) <= torch.tensor([5.0, 10, 5, 10])).all()
    assert (moved[:, 0].abs().amax(0) > torch.tensor([4.5, 9, 4.5, 9])).all()
    assert 19 < moved[:, 1].abs().max() <= 20 and torch.stack(corners).min() >= 0 and torch.stack(corners).max() <= 511


def test_prompts_have_the_official_shares():
    masks = torch.from_numpy(discs(8, 32, [(16, 16, 8, 0, 0, 0, 7), (20, 20, 5, 0, 0, 0, 3)]))
    args, plans = options("--image-size", 32), []
    with utils.seeded(0):
        plans = [script_.simulate_prompts(masks, args, NO_VOID) for _ in range(1500)]
    by_points = [plan for plan in plans if plan[0][0]]
    assert 0.46 < len(by_points) / len(plans) < 0.54
    assert 0.46 < np.mean([len(prompts) == 1 for prompts, *_ in plans]) < 0.54   # 1 or 2 prompted frames
    boxes = [points["point_labels"].shape[1] == 2 for prompts, *_ in by_points for points in prompts.values()]
    assert 0.46 < np.mean(boxes) < 0.54
    for prompts, corrected, draws in plans:
        assert next(iter(prompts)) == 0 and len(prompts) <= 2
        if not prompts[0]:
            assert corrected == () and draws.shape == (8, 0, 2)
            continue
        assert draws.shape == (8, 7, 2) and list(corrected)[:len(prompts)] == list(prompts)
        assert len(set(corrected)) == len(corrected) <= 2
    alone = [corrected for prompts, corrected, _ in by_points if len(prompts) == 1]
    assert 0.42 < np.mean([len(corrected) == 1 for corrected in alone]) < 0.58
    truth = torch.stack([draws for _, _, draws in by_points]) < 0
    assert (truth.all(-1) == truth.any(-1)).all() and 0.08 < truth.float().mean() < 0.12
    later = [t for prompts, *_ in plans for t in list(prompts)[1:]]
    assert set(later) == set(range(1, 8))
    args = options("--image-size", 32, "--prompted-frames", 3, "--corrected-frames", 4, "--prob-points", 1)
    with utils.seeded(0):
        plans = [script_.simulate_prompts(masks, args, NO_VOID) for _ in range(600)]
    counts = [(len(prompts), len(corrected)) for prompts, corrected, _ in plans]
    for prompted in (1, 2, 3):  # a third each; of these prompted to 4 corrected, equally often
        corrected = [count for number, count in counts if number == prompted]
        assert 150 < len(corrected) < 250
        shares = [corrected.count(count) / len(corrected) for count in range(prompted, 5)]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0.75 / len(shares)


def test_a_clip_of_one_frame_is_clicked_or_boxed_and_fixed_numbers_are_kept():
    masks = torch.from_numpy(discs(4, 32, [(16, 16, 8, 0, 0, 0, 7)]))
    for _ in range(20):
        prompts, corrected, draws = script_.simulate_prompts(masks[:1], options("--prob-points", "0"), NO_VOID)
        assert list(prompts) == [0] and prompts[0] and corrected == (0,) and draws.shape == (1, 7, 1)
        args = options("--prob-points", 1, "--vary-prompted", "False", "--corrected-frames", 4,
                       "--vary-corrected", "False")
        prompts, corrected, _ = script_.simulate_prompts(masks, args, NO_VOID)
        assert len(prompts) == 2 and sorted(corrected) == [0, 1, 2, 3]


# --- J and F ---

def blocks(*boxes, size=(100, 120)):
    mask = np.zeros(size, bool)
    for y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def test_j_of_hand_worked_masks():
    one, other = blocks((10, 30, 10, 30)), blocks((10, 30, 20, 40))
    assert script_.region_similarity(one, other) == 200 / 600
    empty = blocks()
    assert script_.region_similarity(empty, empty) == 1 and script_.region_similarity(one, empty) == 0


def test_boundary_pixels_are_davis():
    mask = blocks((1, 3, 1, 3), size=(5, 5))
    assert script_.boundary(mask).astype(int).tolist() == [
        [1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    full = blocks((0, 5, 0, 5), size=(5, 5))
    assert not script_.boundary(full).any()  # the image's edge is no boundary


def test_f_of_hand_worked_masks():
    size = (100, 120)   # 0.008 of the diagonal 156.2 is 1.25, rounded up 2 pixels
    one = blocks((20, 40, 20, 40), size=size)
    assert script_.contour_accuracy(one, one) == 1
    assert script_.contour_accuracy(blocks((22, 42, 20, 40), size=size), one) == 1   # moved by 2
    # Moved by 3, of the 80 boundary pixels (a square of side 21 without its inside):
    moved, ring = blocks((23, 43, 20, 40), size=size), 80
    assert script_.boundary(one).sum() == ring
    matched = 2 * 20 + 4  # all but the last of either side, and the first line's next two pixels at either end
    assert script_.contour_accuracy(moved, one) == pytest.approx(matched / ring)
    empty = blocks(size=size)
    assert script_.contour_accuracy(empty, empty) == 1
    assert script_.contour_accuracy(one, empty) == script_.contour_accuracy(empty, one) == 0
    far = blocks((70, 90, 80, 100), size=size)
    assert script_.contour_accuracy(far, one) == 0
    half = blocks((20, 40, 20, 40), (70, 90, 80, 100), size=size)  # one right, one too many
    assert script_.contour_accuracy(half, one) == pytest.approx(2 * 0.5 * 1 / 1.5)


def brute_force(pred, true, radius):
    """F by the definition: every boundary pixel against every other one's distance."""
    lines = [np.argwhere(script_.boundary(mask)) for mask in (pred, true)]
    distance = np.sqrt(((lines[0][:, None] - lines[1][None]) ** 2).sum(-1))
    precision, recall = (distance.min(1) <= radius).mean(), (distance.min(0) <= radius).mean()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("size, radius", [((64, 64), 1), ((100, 120), 2), ((240, 320), 4), ((170, 180), 2)])
def test_f_equals_the_definition_on_random_blobs(size, radius):
    """radius: 0.008 of the diagonal, rounded up, by hand: 0.72, 1.25, 3.2 and 1.98 (0.0081 would give 3)."""
    draw = np.random.default_rng(0)
    for _ in range(5):
        masks = [demo_data.smooth_noise(draw, max(size), 5)[:size[0], :size[1]] > 0.3 for _ in range(2)]
        assert script_.contour_accuracy(*masks) == pytest.approx(brute_force(*masks, radius))


@pytest.mark.parametrize("size, radius", [((480, 854), 8), ((480, 910), 9), ((1080, 1920), 18)])
def test_boundaries_of_davis_sizes_match_within_their_number_of_pixels(size, radius):
    one = blocks((100, 200, 100, 200), size=size)
    assert script_.contour_accuracy(blocks((100, 200, 100 + radius, 200 + radius), size=size), one) == 1
    assert script_.contour_accuracy(blocks((100, 200, 101 + radius, 201 + radius), size=size), one) < 1


@pytest.mark.parametrize("radius", [1, 5, 8, 18])
def test_pixels_match_within_a_circle(radius):
    size = 2 * radius + 5
    other, rows = np.zeros((size, size), bool), np.arange(size) - size // 2
    other[size // 2, size // 2] = True
    inside = rows[:, None] ** 2 + rows ** 2 <= radius ** 2
    assert script_.near(inside, other, radius) == 1 and script_.near(~inside, other, radius) == 0


def test_figures_leave_out_the_given_and_the_last_frame_and_begin_where_an_object_does(monkeypatch):
    ids = torch.zeros(6, 40, 40, dtype=torch.uint8)
    ids[:4, 5:15, 5:15] = 1    # gone in frames 4 and 5
    ids[2:, 20:30, 20:30] = 2  # comes in frame 2
    labels = ids.clone()
    labels[0] = labels[2] = labels[5] = 0  # wrong where it does not count, but for object 1 in frame 2
    labels[4][ids[4] == 0] = 1             # object 1 is said to be everywhere in frame 4
    monkeypatch.setattr(script_, "track_video", lambda *args: torch.stack([labels, ids]))

    class Loader(list):
        dataset = SimpleNamespace(items=[SimpleNamespace(name=name, still=False) for name in "ab"])
    run = SimpleNamespace(device=torch.device("cpu"))
    figures = script_.evaluate(torch.nn.Identity(), Loader([(None, ids, [0]), (None, ids, [1])]), run,
                               SimpleNamespace(world_size=1))
    # Object 1: frames 1 to 4: 1, 0, 1, 0; object 2: frames 3 and 4: 1, 1
    assert figures["val_j"] == figures["val_f"] == figures["val_jf"] == (0.5 + 1) / 2
    assert figures["val_click_j"] == 1
    # Copied: object 1: 1, 1, 1, 0; object 2: 1, 1
    assert figures["copied_j"] == (0.75 + 1) / 2
    assert figures["per_video"]["b"]["objects"] == 2 and figures["per_video"]["b"]["val_jf"] == 0.75
    assert [*run.tracked] == [0, 1] and torch.equal(run.tracked[1], labels)


def test_a_video_or_image_without_objects_counts_nothing(monkeypatch):
    monkeypatch.setattr(script_, "image_scores", lambda *args: torch.tensor([[0.5, 0.25]]))  # of one object

    class Loader(list):
        dataset = SimpleNamespace(items=[SimpleNamespace(name=name, still=name != "c") for name in "abc"])
    masks, nothing = torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)  # the last is void
    figures = script_.evaluate(
        torch.nn.Identity(), Loader([(None, nothing, [0]), (None, masks, [1]), (None, torch.zeros(3, 4, 4), [2])]),
        SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(world_size=1))
    assert figures["val_image_box_iou"] == 0.5 and figures["per_video"]["a"]["objects"] == 0


def test_tracking_gives_each_object_its_mask_or_click_where_it_appears(clips):
    videos = dataset(clips, part="val")
    images, ids, index = videos[0, 0]
    firsts = script_.first_frames(ids)
    given = {}

    class Model:
        image_size = 64

        def propagate(self, frames, prompts):
            given.update(prompts=prompts, frame=frames[0], count=len(frames))
            for t in range(len(frames)):
                logits = torch.full((len(prompts), 1, 16, 16), -5.0)
                logits[-1] = 1.0 if t == 3 else -1.0
                yield t, {"pred_masks": logits}
    labels = script_.track_video(Model(), images, ids, firsts, SimpleNamespace(device=torch.device("cpu"), dtype=None))
    assert labels.shape == (2, *ids.shape) and (labels[1, 3] == len(firsts)).all() and not labels[0].any()
    assert not labels[1, :3].any()
    for k, (first, by_mask, by_click) in enumerate(zip(firsts, given["prompts"], given["prompts"][len(firsts):]), 1):
        assert torch.equal(by_mask[first]["mask_inputs"][0], ids[first] == k)
        x, y = by_click[first]["point_coords"][0].tolist()
        assert ids[first][round(y), round(x)] == k and by_click[first]["point_labels"].tolist() == [1]
    assert torch.equal(given["frame"], images[0])  # which the net normalises


def test_a_mask_prompt_covers_the_pixels_whose_middle_is_in_the_mask():
    mask = torch.zeros(100, 200, dtype=torch.bool)
    mask[:46] = True  # the middle of the fifth of ten rows is at 45
    assert script_.resize_mask(mask, 10)[0].sum(0).tolist() == [5] * 10
    mask[44:] = False
    assert script_.resize_mask(mask, 10)[0].sum(0).tolist() == [4] * 10


def test_masks_of_clips_are_resized_to_the_nearest_pixel(clips):
    half = dataset(clips, "--image-size", 32, "--overfit", 1)
    sources = half.items[0].masks[0]
    ids = utils.read_mask(sources[0][1])
    assert {*half[0, 0][0].masks[0].sum((1, 2)).tolist()} == {(ids[1::2, 1::2] == k).sum() for k in (1, 2)}


def test_a_tiny_object_still_is_a_mask_prompt():
    mask = torch.zeros(500, 700, dtype=torch.bool)
    mask[100, 200] = True
    assert script_.resize_mask(mask, 64).sum() >= 1


# --- Data ---

def test_clips_have_consecutive_frames_visible_objects_and_depend_on_seed_epoch_index_alone(clips):
    videos = dataset(clips)
    assert len(videos) == len(videos.items) and videos[0, len(videos.items) + 1][1] == 1
    one, index = videos[0, 1]
    assert one.images.shape == (3, 3, 64, 64) and one.images.dtype == torch.uint8
    assert one.masks.dtype == torch.bool and one.masks.shape[:1] == (3,) and one.masks[0].flatten(1).any(1).all()
    torch.rand(5)
    again, _ = videos[0, 1]
    assert torch.equal(one.images, again.images) and torch.equal(one.draws, again.draws)
    others = [videos[epoch, index][0] for epoch, index in ((1, 1), (0, len(videos.items) + 1))]
    assert not any(torch.equal(one.images, other.images) for other in others)


def test_stride_reverse_and_starts_reach_all_frames(tmp_path):
    """Frames are grey values 10 t, so that a clip tells which frames it has."""
    for name in "ab":
        write_video(tmp_path, name, [np.full((64, 64, 3), 10 * t) for t in range(12)],
                    [disc_masks(64, (30, 30, 12))[0, 0] * 7] * 12)
    videos = dataset(tmp_path, "--overfit", 1, "--stride", 2)
    assert values(videos[0, 0][0]) == [0, 2, 4]  # without augmentation the first clip that has an object
    videos.augment = True
    for name in ("hflip_prob", "degrees", "shear", "gray_prob"):
        setattr(videos.args, name, 0.0)
    videos.args.jitter = videos.args.frame_jitter = [0.0, 0.0, 0.0]
    found = {tuple(values(videos[epoch, 0][0])) for epoch in range(60)}
    assert found == {(t, t + 2, t + 4) for t in range(8)}
    videos.args.reverse_time_prob = 1.0
    found = {tuple(values(videos[epoch, 0][0])) for epoch in range(60)}
    assert found == {(t + 4, t + 2, t) for t in range(8)}


def values(one):
    return [round(frame.float().median().item() / 10) for frame in one.images]


def write_video(folder, name, images, ids):
    for sub, frames, ending in (("JPEGImages", images, "png"), ("Annotations", ids, "png")):
        (folder / sub / name).mkdir(parents=True, exist_ok=True)
        for t, pixels in enumerate(frames):
            save_grey(folder / sub / name / f"{t:05d}.{ending}", np.asarray(pixels).astype(np.uint8))


def test_all_frames_are_transformed_alike_and_masks_with_them(tmp_path):
    mask = disc_masks(96, (40, 30, 14))[0, 0].numpy()
    image = np.where(mask[..., None], (250, 30, 30), (20, 20, 120))
    for name in "ab":
        write_video(tmp_path, name, [image] * 4, [mask * 3] * 4)
    videos = dataset(tmp_path, "--overfit", 1, "--image-size", 96)
    videos.augment, seen = True, []
    for epoch in range(8):
        videos.args.frame_jitter = [0.0, 0.0, 0.0]
        one, _ = videos[epoch, 0]
        assert all(torch.equal(one.images[0], frame) for frame in one.images)
        assert all(torch.equal(one.masks[0], masks) for masks in one.masks)
        red = one.images[0, 0].float() - one.images[0, 2].float() > 40
        if not (one.images[0, 0] == one.images[0, 1]).all():  # not a grey clip
            overlap = (red & one.masks[0, 0]).sum() / (red | one.masks[0, 0]).sum()
            assert overlap > 0.9
        seen.append(one.masks[0])
        videos.args.frame_jitter = [0.3, 0.05, 0.05]
        one, _ = videos[epoch, 0]
        assert not torch.equal(one.images[0], one.images[1])
    assert len({masks.numpy().tobytes() for masks in seen}) == 8


def test_colours_change_alike_in_all_frames_then_in_each():
    frames = torch.tensor([90, 130, 170], dtype=torch.uint8)[None, :, None, None].expand(3, 3, 8, 8)

    def changed(count=40, **options):
        args = SimpleNamespace(**{"jitter": [0.0] * 3, "frame_jitter": [0.0] * 3, "gray_prob": 0.0, **options})
        found = [script_.change_colours(frames, args) for _ in range(count)]
        alike = [torch.equal(clip[0], clip[1]) and torch.equal(clip[0], clip[2]) for clip in found]
        grey = [torch.equal(clip[:, 0], clip[:, 1]) for clip in found]
        return len({clip[0].numpy().tobytes() for clip in found}), all(alike), sum(grey)
    torch.manual_seed(0)
    assert changed() == (1, True, 0)
    assert changed(gray_prob=1.0) == (1, True, 40) and 0 < changed(gray_prob=0.1)[2] < 15
    kinds, alike, _ = changed(jitter=[0.3, 0.0, 0.0])
    assert kinds > 20 and alike
    kinds, alike, _ = changed(frame_jitter=[0.3, 0.0, 0.0])
    assert kinds > 20 and not alike


@pytest.mark.parametrize("kind", ["ids", "sav"])
def test_masks_of_a_frame_are_decoded_once(tmp_path, kind, clips, monkeypatch):
    name, folder = "read_mask", clips
    if kind == "sav":
        name, folder = "decode_rle", tmp_path / "sav"
        for video in ("sav_1", "sav_2"):
            write_sav(folder, video, sav_masks(5), 20)
    videos, decoded = dataset(folder, "--max-objects", 2), []
    owner = script_ if kind == "sav" else utils
    true = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: decoded.append(args) or true(*args))
    for epoch in range(5):
        decoded.clear()
        script_.find_objects.cache_clear()
        one, _ = videos[epoch, 0]
        assert one.masks.shape[:2] == (3, 2) and len(decoded) == (6 if kind == "sav" else 3)


def test_rotation_turns_as_said_and_is_left_out_where_an_object_would_vanish():
    ids = np.zeros((65, 65), np.uint8)
    ids[30:35, 50:55] = 1
    image = np.repeat(ids[..., None] * 200, 3, 2)
    args = SimpleNamespace(hflip_prob=0.0, degrees=90.0, shear=0.0)
    with utils.seeded(3):
        images, (turned,) = script_.change_clip([image], [np.stack([ids, 0 * ids])], args)
    assert turned[0].astype(int).sum() == pytest.approx(25, abs=8) and not np.array_equal(turned[0], ids)
    corner = np.zeros((3, 65, 65), np.uint8)
    corner[0, 0, 0] = corner[1, 40, 40] = 1
    kept = 0
    for seed in range(10):
        with utils.seeded(seed):
            kept += np.array_equal(script_.change_clip([image], [corner], args)[1][0], corner)
    assert kept >= 8
    with utils.seeded(3):
        (filled,), _ = script_.change_clip([255 + 0 * image], [np.stack([ids, 0 * ids])], args)
    assert np.abs(filled[0, 0] - (124, 116, 104)).max() <= 1  # ImageNet's mean, as the official transform
    args.hflip_prob = 1.0
    args.degrees = 0.0
    mirrored = script_.change_clip([image], [np.stack([ids, ids])], args)[1][0]
    assert np.array_equal(mirrored, np.stack([ids, ids])[:, :, ::-1])


def test_folders_per_object_davis_resolutions_and_frames_in_order_of_number(tmp_path):
    mask = disc_masks(64, (20, 20, 8), (40, 40, 9))[:, 0].numpy()
    for t in (1, 2, 10):
        for sub in ("JPEGImages/480p/v", "Annotations/480p/v/000", "Annotations/480p/v/007"):
            (tmp_path / sub).mkdir(parents=True, exist_ok=True)
        save_grey(tmp_path / f"JPEGImages/480p/v/{t}.jpg", np.full((64, 64, 3), t, np.uint8))
        save_grey(tmp_path / f"Annotations/480p/v/000/{t}.png", mask[0].astype(np.uint8) * 255)
        if t != 10:
            save_grey(tmp_path / f"Annotations/480p/v/007/{t}.png", mask[1].astype(np.uint8) * 255)
    args = options("--data-path", tmp_path)
    ((name, images, masks, still, source),) = script_.find_items(str(tmp_path), args)
    assert (still, source) == (False, 0)
    assert [path.stem for path in images] == ["1", "2", "10"] and [len(mask) for mask in masks] == [2, 2, 1]
    found = script_.find_objects(masks[0])
    assert [*found] == [1, 2] and np.array_equal(found[1](), mask[0]) and np.array_equal(found[2](), mask[1])
    assert np.array_equal(script_.find_objects(masks[2])[1](), mask[0])


def test_lists_exclusions_and_other_folders(clips, tmp_path):
    (tmp_path / "train.txt").write_text("clip_0001\nclip_0003\n\nclip_0004\n")
    (tmp_path / "not.txt").write_text("clip_0003\n")
    (tmp_path / "val.txt").write_text("clip_0002\n")
    lists = ["--train-set", tmp_path / "train.txt", "--excluded-videos-list-txt", tmp_path / "not.txt"]
    assert [item[0] for item in dataset(clips, *lists, "--val-set", tmp_path / "val.txt").items] == [
        "clip_0001", "clip_0004"]
    named = dataset(clips, "--val-set", "val")  # ImageSets/val.txt; the others are trained on
    assert [item[0] for item in named.items] == ["clip_0001", "clip_0002", "clip_0003", "clip_0004"]
    shutil.move(clips / "JPEGImages", tmp_path / "images")
    moved = dataset(clips, "--img-folder", tmp_path / "images", "--gt-folder", clips / "Annotations")
    assert len(moved.items) == 4
    refuses(clips, "JPEGImages: no such folder", "--img-folder")
    refuses(clips, "nowhere: no such folder; give another --img-folder", more=["--img-folder", tmp_path / "nowhere"])
    shutil.move(tmp_path / "images", clips / "JPEGImages")
    (tmp_path / "train.txt").write_text("")
    refuses(clips, tmp_path / "train.txt", "lists nothing", more=lists)
    refuses(clips, "nolist", "no such list", more=["--train-set", "nolist"])
    (tmp_path / "train.txt").write_text("clip_0009\n")
    refuses(clips, "clip_0009", "no such folder", more=lists)


def frame(folder, sub, video, t, ending):
    return folder / sub / f"clip_{video:04d}" / f"{t:05d}.{ending}"


def test_bad_videos_are_refused_in_one_line(clips, tmp_path):
    mask = frame(clips, "Annotations", 1, 2, "png")
    whole = mask.read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(mask)
    refuses(clips, mask, "colour-coded mask")     # a palette lost
    save_grey(mask, np.ones((32, 32), np.uint8))
    refuses(clips, mask, "32x32", "64x64")
    mask.write_bytes(whole)
    image = frame(clips, "JPEGImages", 1, 2, "jpg")
    pixels = image.read_bytes()
    image.write_bytes(pixels[:len(pixels) // 2])
    refuses(clips, image, "truncated or unreadable")
    save_grey(image, np.zeros((32, 32, 3), np.uint8))
    refuses(clips, image, "32x32")
    image.unlink()
    refuses(clips, mask, "has no frame 00002")
    image.write_bytes(pixels)
    shutil.rmtree(clips / "Annotations/clip_0003")
    refuses(clips, "Annotations/clip_0003: no masks; add them, or leave the video out of the list")
    refuses(tmp_path / "nothing", "JPEGImages: no such folder")


def test_odd_videos_are_left_out_aloud(clips, capsys):
    frame(clips, "Annotations", 1, 2, "png").unlink()
    for t in range(5):
        save_grey(frame(clips, "Annotations", 2, t, "png"), np.zeros((64, 64), np.uint8))
    for t in (2, 3, 4):
        frame(clips, "Annotations", 3, t, "png").unlink()
    videos = dataset(clips, "--val-set", "val")
    said = capsys.readouterr().out
    assert [item[0] for item in videos.items] == ["clip_0001", "clip_0004"] and len(videos.items[0][1]) == 4
    assert "4 frames of 2 videos have no annotation and are left out" in said
    assert "1 of 4 training videos have fewer than 3 frames and are left out" in said
    assert "1 of 4 training videos and images have no object and are left out" in said
    refuses(clips, "none of 4 training videos has 9 frames", "--num-frames", more=["--val-set", "val",
                                                                                  "--num-frames", 9])


def test_a_clip_that_fails_later_is_named_and_replaced_within_a_limit(clips, capsys):
    videos = dataset(clips, "--val-set", "val")
    for t in range(5):
        frame(clips, "JPEGImages", 1, t, "jpg").write_bytes(b"x")
    one, index = videos[0, 0]
    said = capsys.readouterr().out
    assert index == 0 and one.images.shape == (3, 3, 64, 64)
    assert "clip_0001" in said and "another clip is taken" in said
    again, _ = videos[0, 0]
    assert torch.equal(one.images, again.images)
    videos.args.max_replaced = 3
    for video in range(6):
        for t in range(5):
            frame(clips, "JPEGImages", video, t, "jpg").write_bytes(b"x")
    with pytest.raises(utils.InputError, match="--max-replaced 3"):
        videos[0, 0]


def test_the_article_s_command_is_taken_and_says_what_stands_for_it(clips, tmp_path, capsys):
    train(clips, tmp_path / "out", "-c", "configs/sam2.1_hiera_b+_MOSE_finetune.yaml", "--use-cluster", 0,
          "--num-gpus", 8, "--sanity-check")
    said = capsys.readouterr().out
    assert said.count("docs/sam2_options.md") == 3 and "note: -c: no effect" in said and "torchrun" in said
    text = (ROOT / "docs/sam2_options.md").read_text()
    assert "--use-cluster 0" in text and text.index("torchrun --nproc_per_node 8 train_sam2.py") < text.index("|")


def test_the_end_shows_a_last_epoch_that_did_not_beat_the_start(clips, tmp_path, capsys, monkeypatch):
    plots = []
    monkeypatch.setattr(utils.Run, "plot_curves", lambda run, *groups: plots.append(groups))
    figures = train(clips, tmp_path / "out", "--epochs", 1, "--lr", 0, "--vision-lr", 0)
    said = capsys.readouterr().out
    assert plots == [(["pass_dice", "pass_iou", "pass_score"], ["val_jf", "val_click_jf", "copied_jf"])]
    assert "best, epoch" not in said and "last, epoch 1" in said and "no epoch beat the start" in said
    assert figures["val_jf"] == pytest.approx(figures["before"]["val_jf"])


def test_sanity_check_counts_and_draws(clips, tmp_path, capsys):
    assert train(clips, tmp_path / "out", "--sanity-check") == {"train": 4, "val": 2}
    said = capsys.readouterr().out
    assert "train: 4 videos and images, 4 of 64x64, 5 to 5 frames" in said and "8 objects, 2 to 2 per video" in said
    assert "cells of the decoder's mask wide" in said
    assert Image.open(tmp_path / "out/sanity_check.png").width == 3 * 260


def grey_frames(count):
    return [np.full((48, 64, 3), 20 * t, np.uint8) for t in range(count)]


def extract(*more):
    return script_.main(options("--extract-frames", *more))["frames"]


def test_extract_frames_keeps_the_numbers_of_the_video(tmp_path, capsys):
    write_mp4(tmp_path / "in.mp4", grey_frames(10))
    assert extract(tmp_path / "in.mp4", tmp_path / "out", "--rate", 4) == 3
    assert "wrote 3 of 10 frames" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.jpg", "00004.jpg", "00008.jpg"]
    assert abs(utils.read_image(tmp_path / "out/00004.jpg").mean() - 80) < 5
    with pytest.raises(utils.InputError, match="is not empty"):
        extract(tmp_path / "in.mp4", tmp_path / "out")
    (tmp_path / "text.mp4").write_text("x")
    with pytest.raises(utils.InputError, match="cannot open it as a video"):
        extract(tmp_path / "text.mp4", tmp_path / "new")


def test_overwriting_leaves_no_frame_of_an_earlier_video_and_nothing_else_is_removed(tmp_path):
    write_mp4(tmp_path / "long.mp4", grey_frames(12))
    write_mp4(tmp_path / "short.mp4", grey_frames(5))
    extract(tmp_path / "long.mp4", tmp_path / "out", "--rate", 1)
    for name in ("notes.txt", "2026-01.jpg", "cover.jpg"):
        (tmp_path / "out" / name).write_text("mine")
    assert extract(tmp_path / "short.mp4", tmp_path / "out", "--rate", 2, "--overwrite") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.jpg", "00002.jpg", "00004.jpg", "2026-01.jpg", "cover.jpg", "notes.txt"]


def damage(path):
    """Overwrites the second half of a video's frames; what it states of them stays."""
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[(start + end) // 2:end] = bytes(end - (start + end) // 2)
    path.write_bytes(data)


def noisy_frames(count):
    return [*np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), np.uint8)]


def test_a_video_that_cannot_be_read_to_its_end_is_one_line_and_status_2(tmp_path, script):
    write_mp4(tmp_path / "in.mp4", noisy_frames(10))
    damage(tmp_path / "in.mp4")
    done = script("train_sam2.py", "--extract-frames", tmp_path / "in.mp4", tmp_path / "out", "--rate", 1)
    count = len([*(tmp_path / "out").glob("*.jpg")])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and 1 <= count < 8
    assert f"in.mp4: truncated or damaged: {count} of 10 frames can be read; frames {count} to 9 are missing" \
        in done.stderr
    (tmp_path / "empty.mp4").write_bytes((tmp_path / "in.mp4").read_bytes()[:40])
    with pytest.raises(utils.InputError, match="cannot open it as a video"):
        extract(tmp_path / "empty.mp4", tmp_path / "new")


def test_a_folder_of_videos_is_extracted_and_what_is_whole_is_skipped(tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in ("a.mp4", "b.c.mp4", "d.mp4"):
        write_mp4(videos / name, noisy_frames(9))
    (videos / "notes.txt").write_text("x")
    (videos / "._a.mp4").write_text("of macOS")
    whole = (videos / "d.mp4").read_bytes()
    damage(videos / "d.mp4")
    with pytest.raises(utils.InputError, match="d.mp4: truncated or damaged"):
        extract(videos, out)  # the others first; --rate 4
    frames = {folder.name: sorted(path.name for path in folder.glob("*.jpg")) for folder in out.iterdir()}
    assert sorted(frames) == ["a", "b.c", "d"]
    assert frames["a"] == frames["b.c"] == ["00000.jpg", "00004.jpg", "00008.jpg"]
    before = (out / "a/00000.jpg").stat().st_mtime_ns
    (videos / "d.mp4").write_bytes(whole)
    assert extract(videos, out) == 3 and extract(videos, out) == 0  # only the one that was not whole
    assert (out / "a/00000.jpg").stat().st_mtime_ns == before
    with pytest.raises(utils.InputError, match="a: is not empty; .*b.c: is not empty"):  # of another rate
        extract(videos, out, "--rate", 2)
    assert extract(videos, out, "--rate", 2, "--overwrite") == 15
    write_mp4(videos / "a.avi", noisy_frames(1))
    with pytest.raises(utils.InputError, match="a.mp4: a.avi has the same name"):
        extract(videos, out)
    with pytest.raises(utils.InputError, match="out/a: no videos"):
        extract(out / "a", tmp_path / "new")


def test_extraction_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    videos, out, asked = tmp_path / "videos/sub", tmp_path / "out/sub", []  # as SA-V's, in folders
    for name in "ab":
        write_mp4(videos / f"{name}.mp4", grey_frames(6))

    def stop_asked():
        asked.append(1)
        return len(asked) in (22, 23)  # while the second video is written
    monkeypatch.setattr(utils, "stop_asked", stop_asked)
    with pytest.raises(utils.Stopped):
        extract(videos.parent, out.parent, "--rate", 1)
    assert len([*(out / "a").iterdir()]) == 6 and 1 < len([*(out / "b").iterdir()]) < 6
    assert extract(videos.parent, out.parent, "--rate", 1) == 6
    assert sorted(path.name for path in (out / "b").iterdir()) == [f"{t:05d}.jpg" for t in range(6)]
    (out / "b/00005.jpg").unlink()
    (out / "b/.b.mp4.incomplete").touch()  # killed; another video must not take its place
    with pytest.raises(utils.InputError, match="is not empty"):
        extract(videos / "a.mp4", out / "b", "--rate", 1)
    assert extract(videos / "b.mp4", out / "b", "--rate", 1) == 6


# --- Training ---

def test_a_run_writes_what_it_says(trained):
    data, folder, figures = trained
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {
        "args.json", "best.pth", "curves.png", "last.pth", "log.csv", "split.json", "val_samples.png",
        "val_videos.csv"}
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and {"loss", *script_.FIGURES, "pass_focal", "pass_dice", "pass_iou", "pass_score"} <= {
        *rows[0]}
    with open(folder / "val_videos.csv", newline="") as file:
        videos = list(csv.DictReader(file))
    split = json.loads((folder / "split.json").read_text())
    assert [row["video"] for row in videos] == split["val"] and all(int(row["objects"]) >= 1 for row in videos)
    weights = [int(row["objects"]) for row in videos]
    mean = np.average([float(row["val_jf"]) for row in videos], weights=weights)
    assert mean == pytest.approx(figures["val_jf"], abs=1e-4)
    best = torch.load(folder / "best.pth", weights_only=True)
    assert best["net"] == "sam2" and best["arch"] == {"model": "demo", "image_size": 64} and "optimizer" not in best
    height = Image.open(folder / "val_samples.png").height
    assert height == 20 + 2 * 3 * (24 + 256)  # the titles; two videos: image, truth, prediction


def test_the_official_sum_is_the_mean_per_pass_times_passes(trained):
    folder = trained[1]
    last = torch.load(folder / "last.pth", weights_only=True)
    with open(folder / "log.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    weights = dict(zip(script_.LOSSES, (20, 1, 1, 1)))
    per_pass = sum(weight * float(row[f"pass_{name}"]) for name, weight in weights.items())
    assert 2.999 <= float(row["loss"]) / per_pass <= 5.001  # 3 frames, at most 2 corrected by one click
    assert last["before"].keys() == {*script_.FIGURES, "per_video"}


def test_test_only_prints_the_figures_of_the_run(trained, capsys):
    data, folder, figures = trained
    again = train(data, folder / "test", "--test-only", "--weights", folder / "last.pth",
                  "--split", folder / "split.json")
    assert {name: again[name] for name in script_.FIGURES} == {name: figures[name] for name in script_.FIGURES}
    assert "test" in capsys.readouterr().out and not (folder / "test").exists()
    with pytest.raises(utils.InputError, match="image_size 64; asked for|trained with 64"):
        train(data, folder / "test", "--test-only", "--weights", folder / "last.pth", "--image-size", 96)


def test_official_files_start_a_run(clips, tmp_path):
    model = script_.NETS["demo"](64)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pt")
    loaded, _ = script_.create_model(options(*SMALL, "--weights", tmp_path / "official.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert loaded.sam_mask_decoder.dynamic_multimask_via_stability
    assert loaded.memory_attention.layers[0].dropout.p == 0.1
    with pytest.raises(utils.InputError, match="weights of another net"):
        script_.create_model(options(*SMALL, "--model", "tiny", "--weights", tmp_path / "official.pt"))


def step(model, clips, *more, seed=0):
    """Loss sums of the clips, backward done."""
    args, losses = options(*SMALL, *more), 0
    torch.manual_seed(seed)
    backbone = script_.encode(model, torch.cat([one.images for one in clips]), None)
    for videos, one in script_.group_clips(clips, torch.device("cpu")):
        for t, passes in script_.track_clips(model, backbone, videos, one, args, None):
            losses = losses + sum(script_.criterion(*outputs, one.masks[t], args) for outputs in passes)
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def some(clips):
    """Four clips, some of them of one group."""
    videos = dataset(clips, "--prob-box", "0", "--corrected-frames", "1", "--prompted-frames", "1")
    return [videos[0, index][0] for index in range(4)]


def test_clips_of_pinned_memory_are_grouped_alike(some):
    """torch 2.10's pin_memory, which a loader uses on CUDA alone, makes lists of tuples."""
    pinned = [one._replace(corrected=[*one.corrected]) for one in some]
    grouped = [[videos.tolist() for videos, _ in script_.group_clips(clips, torch.device("cpu"))]
               for clips in (some, pinned)]
    assert grouped[0] == grouped[1]


def test_clips_in_one_batch_count_as_each_alone(some):
    groups = list(script_.group_clips(some, torch.device("cpu")))
    assert 1 < len(groups) < 4  # prompted by masks and by clicks
    torch.manual_seed(0)
    model = script_.NETS["demo"](64, memory_dropout=0.0)
    together, gradients = step(model.train(), some)
    model.zero_grad()
    alone = sum(step(model, [one])[0] for one in some)
    assert torch.allclose(together, alone, rtol=1e-4)
    for name, p in model.named_parameters():
        if gradients[name] is not None and not name.endswith("k_proj.bias"):  # whose true gradient is zero
            assert torch.allclose(gradients[name], p.grad, rtol=1e-3, atol=1e-4 * gradients[name].abs().max()), name


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(some):
    assert some[0].prompts == {0: {}}  # a mask: clicks would jump by what is rounded
    kept, gradients = [], []
    for checkpointing in ("False", "True"):
        model, _ = script_.create_model(options(*SMALL, "--gradient-checkpointing", checkpointing, "--drop-path", 0))
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            gradients.append(step(model.train(), some[:1], "--gradient-checkpointing", checkpointing)[1])
        kept.append(sum(sizes.values()))
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        if gradient is not None:
            apart = (gradient - gradients[1][name]).norm()  # what is rounded differs from run to run
            assert apart <= 2e-3 * gradient.norm() + 1e-5, name
    assert kept[1] < 0.5 * kept[0]


def test_checkpointing_sees_the_memories_of_its_frame_alone(some, monkeypatch):
    """Frame 1 is corrected and so remembered as prompted: computed again, it must not see itself."""
    masks = some[0].masks
    coords, labels = script_.draw_clicks(masks[0], NO_VOID[0])
    monkeypatch.setattr(script_, "next_clicks", lambda *args: (coords, labels))
    one = script_.Clip(some[0].images, masks, {0: {"point_coords": coords, "point_labels": labels}}, (0, 1),
                       torch.rand(3, 1, masks.shape[1]))
    gradients = []
    for checkpointing in ("False", "True"):
        torch.manual_seed(0)
        model = script_.NETS["demo"](64, memory_dropout=0.0).train()
        torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 2.0)
        for block in model.memory_encoder.fuser.layers:
            torch.nn.init.ones_(block.gamma)
        gradients.append(step(model, [one], "--gradient-checkpointing", checkpointing)[1])
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None and not name.endswith("k_proj.bias"):  # whose true gradient is zero
            assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5 * gradient.abs().max()), name


GIVEN = ["--num-frames", 2, "--prompted-frames", 2, "--vary-prompted", "False", "--prob-points", 0]  # all by masks

def test_masks_are_never_given_on_all_frames_of_a_clip(clips):
    """The net would find nothing itself: no gradient."""
    def given(*more):
        clip = dataset(clips, *GIVEN, *more)[0, 0][0]
        return [t for t, prompt in clip.prompts.items() if prompt == {}]
    assert given() == [0] and len(given("--num-frames", 3)) == 2
    assert given("--prob-points", 1) == [] and given("--num-frames", 1) == []  # clicked


def test_dropout_and_drop_path_are_where_they_belong():
    model, _ = script_.create_model(options(*SMALL, "--dropout", 0.25, "--drop-path", 0.5))
    memory = [m.p for m in model.memory_attention.modules() if isinstance(m, torch.nn.Dropout)]
    paths = [m.drop_path for m in model.image_encoder.modules() if hasattr(m, "drop_path")]
    assert {*memory} == {0.25} and (min(paths), max(paths)) == (0, 0.5)


def test_the_rate_is_set_before_each_step_by_the_share_of_the_run_that_is_done(clips, tmp_path, monkeypatch):
    seen, set_rate = [], script_.set_learning_rate
    monkeypatch.setattr(script_, "set_learning_rate", lambda optimizer, args, done: (
        seen.append(done), set_rate(optimizer, args, done)))
    train(clips, tmp_path / "run", "--epochs", 2, "--limit", 2, "--multiplier", 1, "-b", 1)
    assert seen == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("part", ["image_encoder", "memory", "prompt"])
def test_freezing_trains_nothing_of_it_and_frees_memory(part, some):
    kept = []
    for freeze in ("none", part):
        model, _ = script_.create_model(options(*SMALL, "--freeze", freeze))
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            gradients = step(model.train(), some, "--freeze", freeze)[1]
        kept.append(sum(sizes.values()))
    frozen = {name for name in gradients if name.startswith(script_.PARTS[part])}
    assert frozen and all(gradients[name] is None for name in frozen)
    assert any(gradient is not None for gradient in gradients.values())
    optimizer = script_.create_optimizer(model, options(*SMALL))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(gradients) - len(frozen)
    share = {"image_encoder": 0.7, "memory": 1, "prompt": 1.01}[part]  # the last is small; addresses come again
    assert kept[1] < share * kept[0]


def test_frozen_parts_have_no_dropout_and_stay_as_they_are(clips, tmp_path, monkeypatch):
    modes = {}

    def forward(self, x, original=script_.NETS["demo"](64).image_encoder.__class__.forward):
        modes.setdefault(torch.is_grad_enabled(), self.training)
        return original(self, x)
    monkeypatch.setattr("nets.sam2.ImageEncoder.forward", forward)
    train(clips, tmp_path / "run", "--freeze", "image_encoder", "prompt", "--limit", 2)
    assert modes == {False: False, True: False}  # validation; training
    start, _ = script_.create_model(options(*SMALL))
    last = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    torch.manual_seed(41)
    start = script_.NETS["demo"](64).state_dict()
    for name, value in last.items():
        same = torch.equal(value, start[name])
        assert same or not name.startswith(("image_encoder", "sam_prompt_encoder")), name
    assert not torch.equal(last["memory_attention.norm.weight"], start["memory_attention.norm.weight"])


def test_accumulated_batches_are_one_large_batch(clips, tmp_path):
    exact = ["--dropout", "0", "--drop-path", "0", "--val-set", "val"]
    train(clips, tmp_path / "large", "-b", 4, *exact)
    train(clips, tmp_path / "small", "-b", 1, "--accumulate", 4, *exact)
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("large", "small"))
    for key in one:
        if not key.endswith("k_proj.bias"):  # whose true gradient is zero
            assert (one[key] - two[key]).abs().max() <= 1e-4 * max(1, one[key].abs().max()), key


@pytest.mark.slow
def test_it_learns_two_clips_by_heart(clips, tmp_path):
    figures = train(clips, tmp_path / "run", "--overfit", 2, "--epochs", 12, "--multiplier", 3, "--clip-grad", 1,
                    "--lr", 0.003, "--vision-lr", 0.003, "--layer-decay", 1, "--num-frames", 3)
    with open(tmp_path / "run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    assert figures["val_jf"] > figures["before"]["val_jf"]


def test_options_that_make_no_sense_are_refused(clips, tmp_path):
    for more, expected in ((["--image-size", 70], "multiple of 32"), (["--resume", "nofile"], "nofile")):
        with pytest.raises(utils.InputError, match=expected):
            train(clips, tmp_path / "run", *more)
    with pytest.raises(utils.InputError, match="--data-path"):
        script_.main(options(*SMALL))


def test_real_videos_are_read(real_data, tmp_path, capsys):
    figures = train(real_data / "video_sample", tmp_path / "out", "--sanity-check")
    assert figures == {"train": 2, "val": 1} and "videos" in capsys.readouterr().out


# --- Several data sets ---

@pytest.fixture
def instances(tmp_path):
    """Folder with a VOCdevkit of eight 64x64 drawn images of objects."""
    demo_data.write_instances(tmp_path / "instances", 8, size=64)
    return tmp_path / "instances"


def encode_rle(mask, compressed):
    """Mask (H, W) bool -> COCO's run lengths, by the definition."""
    flat, counts, value = mask.T.ravel(), [], False
    while len(flat):
        run = len(flat) if (flat == value).all() else int(np.argmax(flat != value))
        counts.append(run)
        flat, value = flat[run:], not value
    if not compressed:
        return {"size": [*mask.shape], "counts": counts}
    text = ""
    for i, count in enumerate(counts):
        rest, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            bits, rest = rest & 31, rest >> 5
            more = not (rest == 0 and not bits & 16 or rest == -1 and bits & 16)
            text += chr(48 + (bits | 32 if more else bits))
    return {"size": [*mask.shape], "counts": text}


def write_sav(folder, name, masks, frames, video=False, first=0, kind="manual", **more):
    """SA-V's layout: masks {frame: [masks of objects, or None]}; frame t is grey, 40 + 10 t, and named first + t."""
    folder.mkdir(parents=True, exist_ok=True)
    masklet = [[None if mask is None else encode_rle(mask, True) for mask in masks[t]] for t in sorted(masks)]
    (folder / f"{name}_{kind}.json").write_text(json.dumps({"video_id": name, "masklet": masklet, **more}))
    images = [np.full((64, 96, 3), 40 + 10 * t, np.uint8) for t in range(frames)]
    if video:
        write_mp4(folder / f"{name}.mp4", images)
    else:
        (folder / name).mkdir()
        for t, image in enumerate(images):
            save_grey(folder / f"{name}/{first + t:05d}.png", image)


def write_mp4(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 24, images[0].shape[1::-1])
    for image in images:
        writer.write(image)
    writer.release()


def sav_masks(count, step=4):
    masks = {t: [np.zeros((64, 96), bool), np.zeros((64, 96), bool)] for t in range(0, count * step, step)}
    for t, (one, other) in masks.items():
        one[10:30, t:t + 20] = True
        other[20:50, 40:70] = True  # they overlap
    return masks


def test_sa_v_is_read_to_the_very_masks_and_frames(tmp_path):
    masks = sav_masks(5)
    masks[8][1] = None  # not annotated: the frame is left out
    for name in ("sav_1", "sav_2"):
        write_sav(tmp_path / "sav", name, masks, 20)
    items = script_.find_items(str(tmp_path / "sav"), options("--data-path", tmp_path / "sav"))
    assert [(item.name, item.still, len(item.images)) for item in items] == [("sav_1", False, 4), ("sav_2", False, 4)]
    assert_pairs(items[0], masks)
    write_sav(tmp_path / "val", "sav_3", sav_masks(5), 20)
    one, _ = dataset(tmp_path / "sav", "--val-path", tmp_path / "val")[0, 0]
    assert one.masks.shape == (3, 2, 64, 64) and one.masks[0].flatten(1).any(1).all()


def assert_pairs(item, masks):
    """Each frame's image is that of write_sav, and its masks are those given for it."""
    frames = [t for t in sorted(masks) if all(mask is not None for mask in masks[t])]
    assert len(item.images) == len(frames)
    for t, image_source, sources in zip(frames, item.images, item.masks):
        image, object_ids, found = script_.read_frame(image_source, sources, (64, 96))
        assert object_ids == [1, 2]
        assert np.array_equal(found[:-1], masks[t]) and abs(np.median(image) - 40 - 10 * t) <= 4.5


def test_sa_v_published_json_is_read_to_the_published_areas(real_data):
    path = real_data / "sav_json/sav_000001_manual.json"
    published = json.loads(path.read_text())
    areas = np.zeros(5)
    for t in range(121):
        found = script_.find_objects(((0, script_.JsonFrame(path, t)),))
        areas += [found[k]().sum() for k in range(1, 6)]
    seen = [sum(len(frame[k]["counts"]) > 4 for frame in published["masklet"]) for k in range(5)]
    assert found[1]().shape == (848, 480)
    assert areas / seen == pytest.approx(published["masklet_size_abs"], rel=0.02)


def test_sa_1b_masks_may_overlap_and_images_are_clips_of_one_frame(tmp_path):
    masks = np.zeros((3, 40, 60), bool)
    masks[0, 5:30, 5:40] = masks[1, 10:20, 10:20] = masks[2, 35:39, 50:59] = True  # one in the other
    for name in ("sa_2", "sa_10"):
        save_grey(tmp_path / f"{name}.jpg", np.full((40, 60, 3), 90, np.uint8))
        codes = [{"segmentation": encode_rle(mask, compressed)} for mask, compressed in zip(masks, (True, False, True))]
        (tmp_path / f"{name}.json").write_text(json.dumps({"image": {}, "annotations": codes}))
    items = script_.find_items(str(tmp_path), options("--data-path", tmp_path))
    assert [(item.name, item.still) for item in items] == [("sa_2", True), ("sa_10", True)]
    assert np.array_equal(script_.read_frame(items[0].images[0], items[0].masks[0], (40, 60))[2][:-1], masks)
    args = options("--data-path", tmp_path, *SMALL)
    images, found = script_.read_item(items[0], args)
    assert images.shape == (1, 3, 64, 64) and np.array_equal(found[:-1], masks) and not found[-1].any()
    one, _ = script_.VideoDataset(items, args, train=True, augment=True)[0, 0]
    assert one.images.shape == (1, 3, 64, 64) and one.masks.shape == (1, 3, 64, 64)
    assert one.prompts[0]["point_coords"].shape[0] == 3 and one.corrected == (0,)  # points are forced


def test_instances_of_voc_need_no_conversion_and_void_is_no_object(instances):
    args = options("--data-path", instances, *SMALL)
    items = script_.find_items(str(instances), args)
    assert len(items) == 8 and all(item.still for item in items)
    ids = utils.read_mask(items[0].masks[0][0][1])
    found = script_.find_objects(items[0].masks[0])
    assert 255 in ids and {*found} == {*np.unique(ids).tolist()} - {255}  # VOID is 0
    assert all(np.array_equal(read(), ids == (k or 255)) for k, read in found.items())
    masks = script_.read_item(items[0], args)[1]
    assert len(masks) == len(found) and np.array_equal(masks[-1], ids == 255)
    one, _ = script_.VideoDataset(items, args, train=True, augment=False)[0, 0]
    assert one.void.shape == one.masks.shape and one.void.any() and not (one.void & one.masks).any()
    shutil.copytree(instances / "VOCdevkit/VOC2012", instances / "VOCdevkit/VOC2007")
    with pytest.raises(utils.InputError, match="holds 2 folders of VOC; give --data-path one of them"):
        script_.find_items(str(instances), args)
    shutil.rmtree(instances / "VOCdevkit/VOC2007")
    listed = script_.find_items(str(instances), args, "train")
    assert [item.name for item in listed] == (
        instances / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").read_text().split()


def paint(clips, change):
    for path in clips.glob("Annotations/*/*.png"):
        utils.save_mask(path, change(utils.read_mask(path)))


def band(ids):
    return np.where(np.arange(ids.shape[1]) < 8, 255, ids).astype(np.uint8)


def test_255_beside_other_ids_is_void_in_videos_too(clips, capsys, monkeypatch):
    paint(clips, band)
    args = options("--data-path", clips, *SMALL, "--prob-points", 0)
    items = script_.find_items(str(clips), args)
    assert f"255 beside other ids is void in the masks of 6 videos, such as {items[0].name}" in capsys.readouterr().out
    simulate, given = script_.simulate_prompts, []
    monkeypatch.setattr(script_, "simulate_prompts", lambda *args: given.append(args[2]) or simulate(*args))
    one, _ = script_.VideoDataset(items, args, train=True, augment=False)[0, 0]
    assert one.void.shape == one.masks.shape and one.void[..., :8].all() and not one.void[..., 8:].any()
    assert torch.equal(given[0].expand_as(one.void), one.void)
    assert one.masks.any() and not (one.masks & one.void).any()
    _, ids, _ = script_.VideoDataset(items, args, train=False, augment=False)[0, 0]
    assert (ids[..., :8] == 255).all() and {*ids[..., 8:].unique().tolist()} == {0, 1, 2}
    firsts = script_.first_frames(ids)
    assert len(firsts) == 2
    pred = torch.where(ids == 255, 1, ids)
    monkeypatch.setattr(script_, "track_video", lambda *args: [pred, pred])
    figures, _ = script_.video_scores(None, None, ids, None)
    assert figures.shape == (2, 9) and (figures[:, :6] == 1).all() and (figures[:, 6:] < 1).any()

    class Loader(list):
        dataset = SimpleNamespace(items=[SimpleNamespace(name="a", still=False)])
    nothing = torch.full((3, 4, 4), 255)
    figures = script_.evaluate(torch.nn.Identity(), Loader([(None, nothing, [0])]),
                               SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(world_size=1))
    assert figures["per_video"]["a"]["objects"] == 0


@pytest.mark.parametrize("kind, change", [
    ("alone", lambda ids: np.where(ids == 1, 255, 0).astype(np.uint8)),
    ("of 16 bits", lambda ids: np.array([0, 255, 300], np.uint16)[ids])])
def test_255_is_an_object_in_masks_of_0_and_255_and_among_higher_ids(clips, capsys, monkeypatch, kind, change):
    masks, videos = [*clips.glob("Annotations/*/*.png")], [*clips.glob("Annotations/*")]
    for path in masks:
        utils.save_image(path, change(utils.read_mask(path)))
    args, reads, read_mask = options("--data-path", clips, *SMALL), [], utils.read_mask
    monkeypatch.setattr(utils, "read_mask", lambda path: reads.append(path) or read_mask(path))
    items = script_.find_items(str(clips), args)
    assert len(reads) == len(masks if kind == "alone" else videos)
    assert "void" not in capsys.readouterr().out
    ids = script_.read_item(items[0], args)[1]
    assert {*ids.unique().tolist()} == ({0, 1} if kind == "alone" else {0, 1, 2})


def test_what_255_is_is_told_by_a_videos_masks(tmp_path):
    blank = np.zeros((8, 16), np.uint8)
    one, white = blank + 1, blank + 255
    for name, masks, void in (("a", [blank, band(blank), white], False), ("b", [blank, one, white], True),
                              ("c", [blank, band(blank), one], True), ("d", [blank, band(one)], True),
                              ("e", [blank], False)):
        write_video(tmp_path, name, [np.stack([blank] * 3, 2)] * len(masks), masks)
        items = script_.find_items(str(tmp_path), options("--data-path", tmp_path, *SMALL))
        assert items[-1].masks[0][0][0] == (script_.IDS_AND_VOID if void else script_.IDS), name
        shutil.rmtree(tmp_path / "Annotations")
        shutil.rmtree(tmp_path / "JPEGImages")


def test_a_mask_that_cannot_be_read_stops_no_run_that_does_not_use_it(clips, tmp_path):
    broken = sorted(clips.glob("Annotations/*"))[0]
    for path in broken.iterdir():
        path.write_bytes(b"no image")
    (tmp_path / "list.txt").write_text(broken.name)
    assert len(dataset(clips, "--excluded-videos-list-txt", tmp_path / "list.txt")) == 4
    refuses(clips, broken.name)


def test_videos_without_objects_are_drawn_and_score_nothing(clips, tmp_path, monkeypatch):
    paint(clips, np.zeros_like)
    args = options("--data-path", clips, *SMALL)
    videos = script_.VideoDataset(script_.find_items(str(clips), args), args, train=False, augment=False)
    run = SimpleNamespace(folder=tmp_path, device=torch.device("cpu"), dtype=None, tracked={})
    script_.draw_samples(script_.NETS["demo"](64), videos, run)
    assert (tmp_path / "val_samples.png").exists()


def test_the_panel_shows_what_validation_has_tracked(clips, tmp_path, monkeypatch):
    args, files = options("--data-path", clips, *SMALL), []
    videos = script_.VideoDataset(script_.find_items(str(clips), args), args, train=False, augment=False)
    run = SimpleNamespace(folder=tmp_path, device=torch.device("cpu"), dtype=None, tracked={})
    model = script_.NETS["demo"](64)
    real, tracked = script_.track_video, []
    monkeypatch.setattr(script_, "track_video", lambda *args: tracked.append(real(*args)) or tracked[-1])
    for _ in range(2):
        script_.draw_samples(model, videos, run)
        files.append((tmp_path / "val_samples.png").read_bytes())
        run.tracked = dict(enumerate(by_mask for by_mask, _ in tracked))
    assert len(tracked) == len(script_.sample_videos(videos)) and files[0] == files[1]


def sampler(sizes, *more, images=(), rank=0, world_size=1, monkeypatch=None):
    if monkeypatch:
        monkeypatch.setattr(utils, "ranks", lambda: (rank, world_size))
    items = [script_.Item(str(i), (), (), source in images, source) for source, size in enumerate(sizes)
             for i in range(size)]
    return script_.MixSampler(items, options(*more))


def drawn(mix, sizes, epoch):
    """Numbers of each batch and the data set that it is of."""
    mix.set_epoch(epoch)
    ends, batches = np.cumsum(sizes), []
    for batch in mix:
        assert {one for one, _ in batch} == {epoch}
        (source,) = {int(np.searchsorted(ends, number % ends[-1], side="right")) for _, number in batch}
        batches.append((source, [number for _, number in batch]))
    return batches


def test_the_shares_drawn_are_the_shares_asked():
    sizes = [20, 6, 200]
    mix = sampler(sizes, "--mix", "2:1:3", "--multiplier", 1, "-b", 2, "--image-batch-size", 4, images=[1, 2])
    seen = [[], [], []]
    for epoch in range(8):
        batches = drawn(mix, sizes, epoch)
        assert [sum(source == k for source, _ in batches) for k in range(3)] == [10, 5, 15]
        assert {len(numbers) for source, numbers in batches if source == 0} == {2}
        assert {len(numbers) for source, numbers in batches if source > 0} == {4}
        numbers = [number for _, numbers in batches for number in numbers]
        assert len(set(numbers)) == len(numbers)  # an item that comes twice is drawn anew
        for source, numbers in batches:
            seen[source] += [number % sum(sizes) for number in numbers]
    assert {seen[0].count(i) for i in range(20)} == {8}  # the first: all in each epoch
    assert {seen[1].count(i) for i in range(20, 26)} <= {26, 27}  # a small one comes around again
    assert {seen[2].count(i) for i in range(26, 226)} <= {2, 3}  # a large one takes several epochs
    orders = [[source for source, _ in drawn(mix, sizes, epoch)] for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_without_mix_an_epoch_has_every_clip_and_phases_cut_it():
    sizes = [7, 5]
    mix = sampler(sizes, "--multiplier", "3", "-b", 2, images=[1])
    numbers = [number for _, numbers in drawn(mix, sizes, 4) for number in numbers]
    assert sorted(numbers) == [i + 12 * k for k in range(3) for i in range(12) if i < 7 or k == 0]
    half = sampler([8], "--multiplier", 1, "-b", 2, "--phases", 2)
    halves = [sorted(number % 8 for _, numbers in drawn(half, [8], epoch) for number in numbers) for epoch in (0, 1)]
    assert len(halves[0]) == 4 and sorted(halves[0] + halves[1]) == [*range(8)]
    each = sampler([4, 4], "--multiplier", "1:2", "-b", 4)
    assert sum(source == 1 for source, _ in drawn(each, [4, 4], 0)) == 2


def test_processes_share_each_batch_and_a_resumed_epoch_leaves_out_what_is_done(monkeypatch):
    sizes = [9, 4]
    line = ["--mix", "1:1", "--multiplier", 1, "-b", 2, "--image-batch-size", 3]
    whole = sampler(sizes, *line[:4], "-b", 4, "--image-batch-size", 6, images=[1])
    parts = [sampler(sizes, *line, images=[1], rank=rank, world_size=2, monkeypatch=monkeypatch)
             for rank in (0, 1)]
    for epoch in (0, 3):
        for mix in (whole, *parts):
            mix.set_epoch(epoch)
        for batch, *own in zip(whole, *parts, strict=True):
            assert {key for keys in own for key in keys if key[1] >= 0} == set(batch)
            assert len(own[0]) == len(own[1])
        rest = [*parts[0]][2:]
        parts[0].set_epoch(epoch, skip=2 * 2)
        assert [*parts[0]] == rest and len(parts[0]) == len(rest)


def test_objects_of_images_are_scored_by_box_and_by_click(monkeypatch):
    masks = torch.zeros(3, 30, 50, dtype=torch.bool)
    masks[0, 5:15, 10:20] = masks[1, 20:26, 30:46] = masks[2, 2:5, 10:20] = True  # the last is void
    asked = []

    class Model:
        image_size = 100

        def propagate(self, frames, prompts):
            assert len(frames) == 1
            asked.extend(prompt[0] for prompt in prompts)
            shown = masks[:2].clone()
            shown[0, 2:5, 10:20] = True
            if len(prompts[0][0]["point_labels"]) == 1:
                shown[0, 10:] = False  # half of the first
            yield 0, {"pred_masks": torch.where(shown[:, None], 5.0, -5.0)}
    run = SimpleNamespace(device=torch.device("cpu"), dtype=None)
    figures = script_.image_scores(Model(), torch.zeros(1, 3, 100, 100, dtype=torch.uint8), masks, run)
    assert figures.tolist() == [[1, 0.5], [1, 1]]
    assert asked[0]["point_labels"].tolist() == [2, 3] and asked[2]["point_labels"].tolist() == [1]
    assert asked[0]["point_coords"] + 0.5 == pytest.approx(torch.tensor([[20, 100 / 6], [40, 50]]))
    place = (asked[2]["point_coords"][0] + 0.5) * torch.tensor([0.5, 0.3]) - 0.5  # the middle of a pixel
    assert torch.allclose(place, place.round(), atol=1e-4)
    x, y = place.round().long().tolist()
    assert masks[0, y - 3:y + 4, x - 3:x + 4].all()


def test_a_mixed_run_trains_on_both_and_has_one_table(clips, instances, tmp_path, capsys):
    line = ["--data-path", instances, "--mix", "1:2", "--image-batch-size", 3]
    figures = train(clips, tmp_path / "run", *line)
    assert {"val_jf", *script_.IMAGE_FIGURES} <= figures.keys() and "best_val_jf" in figures
    with open(tmp_path / "run/val_videos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {bool(row["val_jf"]) for row in rows} == {True, False}
    assert all(bool(row["val_jf"]) != bool(row["val_image_box_iou"]) for row in rows)
    table = capsys.readouterr().out.split("best, epoch")[1]
    assert "val_click_jf" in table and "val_image_click_iou" in table
    only = train(instances, tmp_path / "images")
    assert "val_jf" not in only and only["best_val_image_box_iou"] >= 0
    assert (tmp_path / "images/val_samples.png").stat().st_size > 0


def spoil_json(folder):
    (folder / "sav_1_manual.json").write_text('{"masklets": []}')


def spoil_counts(folder):
    text = (folder / "sav_1_manual.json").read_text()
    (folder / "sav_1_manual.json").write_text(text.replace("[64, 96]", "[64, 95]"))


def spoil_sizes(folder):
    masks = {t: [np.ones((32, 48), bool)] for t in range(0, 20, 4)}
    masklet = [[encode_rle(mask, True) for mask in masks[t]] for t in sorted(masks)]
    (folder / "sav_1_manual.json").write_text(json.dumps({"masklet": masklet}))


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: shutil.rmtree(folder / "sav_1"), ["sav_1_manual.json: neither", "sav_1.mp4", "--img-folder"]),
    (spoil_json, ["sav_1_manual.json: neither SA-V's nor SA-1B's json"]),
    (spoil_counts, ["sav_1_manual.json, masks of frame 0: no run-length code"]),
    (spoil_sizes, ["sav_1_manual.json, masks of frame 0: 48x32 pixels, but its clip has 96x64"])])
def test_what_is_wrong_with_sa_v_is_one_line(tmp_path, spoil, words):
    for name in ("sav_1", "sav_2"):
        write_sav(tmp_path / "sav", name, sav_masks(5), 20)
    spoil(tmp_path / "sav")
    refuses(tmp_path / "sav", *words)


def test_masks_are_never_given_to_other_frames(tmp_path, capsys):
    """By another --ann-every than the data's each mask would lie on another frame, and nothing would fail."""
    write_sav(tmp_path / "sav/000", "sav_1", sav_masks(5), 18)
    write_sav(tmp_path / "sav/001", "sav_2", sav_masks(5), 18)
    (tmp_path / "sav/000/sav_1/00008.png").unlink()
    items = script_.find_items(str(tmp_path / "sav"), options("--data-path", tmp_path / "sav"))
    assert [[int(path.stem) for path in item.images] for item in items] == [[0, 4, 12, 16], [0, 4, 8, 12, 16]]
    assert [sources[0][1].frame for sources in items[0].masks] == [0, 1, 3, 4]
    assert "note: 1 frames have no image" in capsys.readouterr().out
    for path in (tmp_path / "sav").glob("*/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "video_frame_count": 18.0}))
    script_.read_json.cache_clear()
    refuses(tmp_path / "sav", "has masks of 5 frames, but the video 18; give --ann-every 4", more=["--ann-every", 1])
    write_sav(tmp_path / "few", "sav_1", sav_masks(5), 5)
    refuses(tmp_path / "few", "few/sav_1: frames 0 to 4, one by one, but masks up to frame 16", "--ann-every 1")
    for name, frames in (("one", range(1, 6)), ("less", range(4))):  # renumbered from 1; not all
        write_sav(tmp_path / name, "sav_1", sav_masks(5), 0)
        for t in frames:
            save_grey(tmp_path / name / f"sav_1/{t:05d}.png", np.zeros((64, 96, 3), np.uint8))
        refuses(tmp_path / name, "one by one, but masks up to frame 16")


@pytest.mark.parametrize("length", [20.0, None])
def test_frames_of_sa_v_that_are_numbered_from_1_are_paired_rightly_and_said(tmp_path, length, capsys):
    more = {"video_frame_count": length} if length else {}
    write_sav(tmp_path / "all", "sav_1", sav_masks(5), 20, first=1, **more)
    write_sav(tmp_path / "every 4th", "sav_1", sav_masks(5), 20, first=1, **more)
    for t in range(20):
        if t % 4:
            (tmp_path / f"every 4th/sav_1/{t + 1:05d}.png").unlink()
    for name in ("all", "every 4th"):
        (item,) = script_.find_items(str(tmp_path / name), options("--data-path", tmp_path / name))
        assert_pairs(item, sav_masks(5))
        assert f"1 videos are numbered from 1, such as {tmp_path / name / 'sav_1'}" in capsys.readouterr().out


@pytest.mark.parametrize("frames", [
    range(2, 22), range(1, 20), range(1, 22), range(25), range(100, 120), [1, 4, 8, 40]])
def test_frames_of_sa_v_that_cannot_be_the_videos_are_refused(tmp_path, frames):
    write_sav(tmp_path, "sav_1", sav_masks(5), 0, video_frame_count=20.0)
    for t in frames:
        save_grey(tmp_path / f"sav_1/{t:05d}.png", np.zeros((64, 96, 3), np.uint8))
    refuses(tmp_path, f"sav_1: frames {min(frames)} to {max(frames)}, but the video's are 0 to 19")


@pytest.mark.parametrize("frames", [range(20), range(22), range(3, 20), [4, 8, 12, 16], [0, 4, 8, 12, 16]])
def test_frames_of_sa_v_that_are_numbered_from_0_need_not_be_all(tmp_path, frames, capsys):
    write_sav(tmp_path, "sav_1", sav_masks(5), 0, video_frame_count=20.0)
    for t in frames:
        save_grey(tmp_path / f"sav_1/{t}.png", np.full((64, 96, 3), 40 + 10 * t, np.uint8))
    (item,) = script_.find_items(str(tmp_path), options("--data-path", tmp_path))
    assert_pairs(item, {t: masks for t, masks in sav_masks(5).items() if t in frames})
    assert "numbered from 1" not in capsys.readouterr().out


def test_a_json_that_was_cut_gets_no_wrong_remedy(tmp_path):
    write_sav(tmp_path, "sav_1", sav_masks(3), 20, video_frame_count=20.0)
    with pytest.raises(utils.InputError, match="3 frames, but the video 20; it may be incomplete") as caught:
        script_.find_items(str(tmp_path), options("--data-path", tmp_path))
    assert "--ann-every 7" not in str(caught.value)


def test_masks_that_are_numbered_otherwise_than_the_frames_are_refused_by_both_numbers(clips):
    """Images from 0, masks from 1 or of every second frame: removing the last mask would shift all others."""
    folder = clips / "Annotations/clip_0001"
    for t in reversed(range(5)):
        (folder / f"{t:05d}.png").rename(folder / f"{t + 1:05d}.png")
    said = "00005.png: {} has no frame 00005; its images are 00000 to 00004, the masks 00001 to 00005: give both"
    refuses(clips, said.format(clips / "JPEGImages/clip_0001"))
    for t in reversed(range(5)):
        (folder / f"{t + 1:05d}.png").rename(folder / f"{2 * t:05d}.png")
    refuses(clips, "has no frame 00006; its images are 00000 to 00004, the masks 00000 to 00008: give both")
    (folder / "00006.png").unlink()
    (folder / "00008.png").rename(folder / "x.png")
    (folder / "00004.png").unlink()
    refuses(clips, "x.png", "has no frame x; add it or remove this mask")


# --- Other forms of masks and names ---

def masks_of_object(folder, mask):
    """A folder of masks per object, of one frame; returns the mask as it is read."""
    path = folder / "Annotations/v/1/00000.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grey(path, mask)
    (sources,) = script_.find_masks(folder / "Annotations/v").values()
    script_.find_objects.cache_clear()
    return script_.find_objects(sources)[1]()


@pytest.mark.parametrize("value, dtype", [(1, np.uint8), (7, np.uint8), (255, np.uint8), (65535, np.uint16),
                                          (True, bool), (300, np.uint16)])
def test_a_mask_of_one_object_may_have_any_single_value(tmp_path, value, dtype):
    square = blocks((10, 30, 10, 30), size=(64, 64))
    assert np.array_equal(masks_of_object(tmp_path, (square * value).astype(dtype)), square)


def test_a_mask_of_one_object_with_soft_edges_is_cut_at_half_and_ids_are_refused(tmp_path):
    square = blocks((10, 30, 10, 30), size=(64, 64))
    soft = cv2.GaussianBlur(255 * square.astype(np.uint8), (5, 5), 0)
    found = masks_of_object(tmp_path, soft)
    assert np.array_equal(found, soft >= 128) and abs(found.sum() - 400) < 10 < (soft > 0).sum() - 400
    rim = blocks((8, 32, 8, 32), size=(64, 64))
    for ids in (np.where(square, 1, 255 * rim), np.where(square, 85, 170 * rim), np.where(square, 2, 1 * rim)):
        with pytest.raises(utils.InputError, match=r"00000.png: has values 0, .* a mask holds 0 \(background\)"):
            masks_of_object(tmp_path, ids.astype(np.uint8))


def test_masks_beside_folders_of_masks_are_refused_if_the_folders_have_more(clips, tmp_path):
    folder = clips / "Annotations/clip_0001"
    shutil.copytree(folder, tmp_path / "shown")
    shutil.move(tmp_path / "shown", folder / "shown")   # the ids are complete: as before
    (folder / ".ipynb_checkpoints").mkdir()
    assert [sources[0][0] for sources in script_.find_masks(folder).values()] == [script_.IDS] * 5
    (folder / "00003.png").unlink()
    refuses(clips, f"{folder}: holds masks and folders of masks, such as shown; keep either")
    for path in folder.glob("*.png"):
        path.unlink()
    assert [sources[0][0] for sources in script_.find_masks(folder).values()] == [1] * 5


def test_names_with_other_digits_are_sorted_and_read(clips):
    """\u00b2 is a digit to str.isdigit, but no number to int."""
    assert sorted(["f10", "f2\u00b2", "f2"], key=script_.by_number) == ["f2", "f2\u00b2", "f10"]
    for sub in ("JPEGImages", "Annotations"):
        (path,) = (clips / sub / "clip_0001").glob("00002.*")
        path.rename(path.with_stem("00002\u00b2"))
    (item,) = [item for item in script_.find_items(str(clips), options("--data-path", clips))
               if item.name == "clip_0001"]
    assert [path.stem for path in item.images] == ["00000", "00001", "00002\u00b2", "00003", "00004"]


def test_spaces_around_the_names_of_a_list(clips, tmp_path):
    for sub in ("JPEGImages", "Annotations"):
        (clips / sub / "clip_0001").rename(clips / sub / "clip_0001 ")
    (tmp_path / "train.txt").write_text("clip_0001 \n  clip_0003\t\nclip_0004\r\nclip_0003\n")
    items = script_.find_items(str(clips), options("--data-path", clips), str(tmp_path / "train.txt"))
    assert [item.name for item in items] == ["clip_0001 ", "clip_0003", "clip_0004"]
    (tmp_path / "list.txt").write_text("caf\u0065\u0301\n2007_000032  1\n 2007_000033 -1\nnone such\nn\u00e9e\nb 2\n")
    known = ["2007_000032", "2007_000033", "caf\u00e9", "ne\u0301e", "b"]
    assert script_.select(tmp_path / "list.txt", "", known) == [
        "caf\u00e9", "2007_000032", "2007_000033", "none such", "ne\u0301e", "b 2"]


def test_a_single_video_can_be_overfitted(clips, tmp_path):
    for index in range(1, 6):
        for sub in ("JPEGImages", "Annotations"):
            shutil.rmtree(clips / sub / f"clip_{index:04d}")
    for part in ("train", "val"):
        videos = dataset(clips, "--overfit", 3, part=part)
        assert [item.name for item in videos.items] == ["clip_0000"]


def late_objects(clips, video, *frames):
    """Empties all masks of a video but those of these frames."""
    for t in {*range(5)} - {*frames}:
        save_grey(frame(clips, "Annotations", video, t, "png"), np.zeros((64, 64), np.uint8))


def test_videos_with_objects_on_the_last_frames_only_are_left_out_with_a_remedy(clips, capsys):
    lists = ["--val-set", "val"]  # 0 and 5
    late_objects(clips, 1, 3, 4)
    late_objects(clips, 2, 2)     # the last frame on which a clip of 3 can begin
    late_objects(clips, 5, 3, 4)  # of validation: the last two have no figure
    videos = dataset(clips, *lists)
    said = capsys.readouterr().out
    assert [item.name for item in videos.items] == ["clip_0002", "clip_0003", "clip_0004"]
    assert "note: 1 of 4 training videos show objects only where no clip of 3 frames begins (give fewer " \
        "--num-frames or a smaller --stride) and are left out" in said
    assert "note: 1 of 2 validation videos show objects only on their last two frames, which are not scored" in said
    for epoch in range(20):
        for index in range(3):
            assert videos[epoch, index][0].masks[0].any()
    assert "another clip is taken" not in capsys.readouterr().out
    assert [item.name for item in dataset(clips, *lists, part="val").items] == ["clip_0000"]
    (clips / "ImageSets/late.txt").write_text("clip_0005\n")
    refuses(clips, "none of 1 validation videos has 3 frames and an object", "--val-set", more=["--val-set", "late"])
    backwards = dataset(clips, *lists, "--reverse-time-prob", 1)  # begins on the last
    assert [item.name for item in backwards.items] == ["clip_0001", "clip_0002", "clip_0003", "clip_0004"]
    assert len(dataset(clips, *lists, "--num-frames", 2).items) == 4
    assert [item.name for item in dataset(clips, *lists, "--num-frames", 2, "--stride", 3).items] == [
        "clip_0003", "clip_0004"]


def test_automatic_masks_of_sa_v_alone_are_read_and_said(tmp_path, capsys):
    write_sav(tmp_path, "sav_1", sav_masks(5), 20, kind="auto")
    (item,) = script_.find_items(str(tmp_path), options("--data-path", tmp_path))
    assert item.name == "sav_1"
    assert_pairs(item, sav_masks(5))
    assert "no *_manual.json is there: the masks are those of *_auto.json" in capsys.readouterr().out
    write_sav(tmp_path, "sav_2", sav_masks(5), 20)
    assert [item.name for item in script_.find_items(str(tmp_path), options("--data-path", tmp_path))] == ["sav_2"]
    assert "_auto" not in capsys.readouterr().out


def test_videos_of_sa_v_without_frames_get_the_command(tmp_path, script):
    for name in ("sav_1", "sav_2"):
        write_sav(tmp_path / "my sav/000", name, sav_masks(5), 20, video=True, video_frame_count=20.0)
    folder = tmp_path / "my sav"
    command = f"train_sam2.py --extract-frames '{folder}' '{folder}' --rate 4"
    refuses(folder, "sav_1_manual.json: no frames in", f"write those of all videos: python {command}")
    assert extract(folder, folder, "--rate", 4) == 10
    for item in script_.find_items(str(folder), options("--data-path", folder)):
        assert_pairs(item, sav_masks(5))


def test_images_of_sa_1b_without_objects_are_one_line_about_images(tmp_path):
    for k in range(3):
        save_grey(tmp_path / f"sa_{k}.jpg", np.full((40, 60, 3), 90, np.uint8))
        codes = [{"segmentation": {"size": [40, 60], "counts": [2400]}}] * k
        (tmp_path / f"sa_{k}.json").write_text(json.dumps({"annotations": codes}))
    refuses(tmp_path, f"{tmp_path}: none of 2 training images has an object; give images whose masks are not empty")


def test_void_counts_for_nothing():
    """As if it were cut out: in losses, their gradient, and correcting clicks."""
    args, draw = options(), torch.Generator().manual_seed(0)
    masks, void = torch.zeros(1, 32, 32, dtype=torch.bool), torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 8:20, 8:20] = True
    void[0, :, 20:] = True
    logits = torch.randn(1, 3, 32, 32, generator=draw)
    other = torch.where(void[:, None], torch.randn(1, 3, 32, 32, generator=draw), logits).requires_grad_()
    ious, score = torch.rand(1, 3, generator=draw), torch.ones(1, 1)
    losses = [script_.criterion(x, ious, score, masks, args, void) for x in (logits, other)]
    assert torch.equal(losses[0], losses[1].detach())
    losses[1].sum().backward()
    assert not other.grad[0, :, :, 20:].any() and other.grad[0, :, :, :20].any()
    cut = script_.criterion(logits[..., :20], ious, score, masks[..., :20], args)
    assert losses[0][1:].tolist() == pytest.approx(cut[1:].tolist(), rel=1e-4)
    assert script_.criterion(logits, ious, score, masks, args)[1] != losses[0][1]


def test_no_click_falls_on_void(monkeypatch):
    """Of an object that is there, of an absent one, where the mask is right and where it is wrong."""
    masks, void = torch.zeros(1, 2, 64, 64, dtype=torch.bool), torch.zeros(1, 2, 64, 64, dtype=torch.bool)
    masks[0, 0, 20:30, 20:30] = True
    void[:, :, 32:] = True
    seen, true = [], script_.next_clicks

    def next_clicks(*args):
        coords, labels = true(*args)
        seen.extend(coords[:, 0, 1].tolist())
        return coords, labels
    monkeypatch.setattr(script_, "next_clicks", next_clicks)
    for _ in range(20):
        script_.simulate_prompts(masks, options("--prob-box", 0), void[:, :1])
        script_.draw_boxes(masks[0], void[0])
        next_clicks(masks[0], masks[0], torch.rand(2), void[0])
        next_clicks(masks[0], torch.ones_like(masks[0]), torch.rand(2), void[0])
    assert len(seen) == 160 and max(seen) < 32
    seen.clear()
    model = script_.NETS["demo"](64).eval()
    coords, labels = script_.draw_clicks(masks[0], void[0])
    one = script_.Clip(None, masks, {0: {"point_coords": coords, "point_labels": labels}}, (0,),
                       torch.rand(1, 7, 2), void)
    backbone = script_.encode(model, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), None)
    with torch.no_grad():
        [*script_.track_clips(model, backbone, torch.tensor([0, 0]), one, options(), None)]
    assert len(seen) == 16 and max(seen) < 32


@pytest.mark.parametrize("text", ['{"masklet": []}', '{"masklet": [3]}', '{"masklet": {"a": 1}}', '{"annotations": 3}'])
def test_jsons_of_another_form_are_one_line(tmp_path, text):
    write_sav(tmp_path / "sav", "sav_1", sav_masks(5), 20)
    (tmp_path / "sav/sav_1_manual.json").write_text(text)
    refuses(tmp_path / "sav", "sav_1_manual.json: neither SA-V's nor SA-1B's json")


@pytest.mark.parametrize("code", [{"size": [2, 2], "counts": [1.5, 2.5]}, {"size": [-2, -2], "counts": [4]},
                                  {"size": [2, 2], "counts": []}, {"size": [2, 2], "counts": [5]}, {"size": 3}, 7])
def test_codes_that_are_none_are_one_line(code):
    with pytest.raises(utils.InputError, match="x.json, masks of frame 0: no run-length code"):
        script_.decode_rle(code, script_.JsonFrame("x.json", 0))


def test_mix_gives_no_share_to_another_data_set(clips, instances, capsys):
    more = ["--data-path", clips, "--mix", "1:2", "--num-frames", 5, "--stride", 2]  # the clips are too short
    refuses(instances, "clips: nothing of it is left to train on, but --mix", more=more)
    assert "fewer than 9 frames" in capsys.readouterr().out


def test_one_folder_spelt_twice_is_not_validated_on(clips, monkeypatch):
    monkeypatch.chdir(clips.parent)
    refuses("clips", "6 in both", more=["--val-path", clips])


def test_options_that_do_not_fit_the_data_sets(clips, instances):
    refuses(clips, "--mix: 3 numbers for 2 --data-path", more=["--data-path", instances, "--mix", "1:2:3"])
    refuses(clips, "--multiplier: 3 numbers for 2", more=["--data-path", instances, "--multiplier", "1:2:3"])
    refuses(clips, "--img-folder, --gt-folder: are of a single", more=["--data-path", instances, "--img-folder", "x"])
    refuses(clips, "--split: takes the place of --train-set, --val-set", more=["--split", "x", "--val-set", "val"])
    refuses(clips, "--split: takes the place of", more=["--split", "x", "--val-path", str(clips), "--test-only"])
    for text in ("0:1", "2:", "a"):
        with pytest.raises(SystemExit):
            options("--mix", text)


def test_the_table_of_official_settings_names_every_option_and_its_default():
    text = (ROOT / "docs/sam2_options.md").read_text()
    parser = script_.get_args_parser()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[\w-]+)", text)) <= set(actions)
    rows = re.findall(r"^\| `.*\| `(--[\w-]+).*\| ([^|]+) \|$", text, re.M)
    assert len(rows) > 40
    for option, default in rows:
        value = actions[option].default
        assert default == (" ".join(map(str, value)) if isinstance(value, list) else str(value)), option
    for name in re.findall(r"`(?:model|scratch|loss)\.(\w+)`", text):  # the official spelling is taken too
        option = f"--{name.replace('_', '-')}"
        assert option in actions or name in ("phases_per_epoch", "use_act_ckpt_iterative_pt_sampling"), option


def test_from_scratch_objects_are_believed_present_and_loaded_weights_stay_as_they_are(tmp_path):
    model, _ = script_.create_model(options(*SMALL))
    assert model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.item() == 2
    assert all((block.gamma == 1).all() for block in model.memory_encoder.fuser.layers)
    official = script_.NETS["demo"](64).state_dict()
    torch.save({"model": official}, tmp_path / "official.pt")
    model, _ = script_.create_model(options(*SMALL, "--weights", tmp_path / "official.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, official[name]), name
