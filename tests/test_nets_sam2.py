"""SAM 2.1 against numbers of the official classes (tests/fixtures/sam2, weights by key names)."""
import hashlib
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT
from nets import sam2, weights
from nets.sam2 import NETS, SAM2, WEIGHTS, LayerNorm2d, sam2_demo, sam2_hiera_tiny
from parity_fill import fill, manifest
from parity_inputs import discs, frames

FIXTURES = ROOT / "tests/fixtures/sam2"
REGISTRY = json.loads((FIXTURES / "sam2_registry.json").read_text())
ATOL = {"mini": 1e-4, "tiny": 5e-4}
MINI = {"embed_dim": 16, "stages": (1, 2, 3, 1), "global_att_blocks": (4,), "d_model": 32,
        "mem_dim": 8, "memory_layers": 2, "memory_mlp_dim": 64}
POINTS = torch.tensor([[[30.0, 40]], [[90.5, 77.25]]])  # P2 of the specification: two objects
TINY_POINTS = torch.tensor([[[130.0, 240]], [[390.5, 177.25]]])


def build(name, **options):
    return SAM2(128, **MINI, **options) if name == "mini" else sam2_hiera_tiny(512, **options)


def load_reference(name):
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def clip(*arguments):
    return torch.from_numpy(frames(*arguments))


def disc_masks(size, *circles):
    """Masks (len(circles), 1, size, size) bool; a circle is x, y, radius."""
    circles = [(*circle, 0, 0, 0, 0) for circle in circles]
    return torch.from_numpy(discs(1, size, circles)).transpose(0, 1)


def click(coords, labels):
    return {"point_coords": torch.as_tensor(coords), "point_labels": torch.as_tensor(labels)}


@pytest.fixture(scope="module")
def models():
    """models("tiny"): filled, in eval mode, made once. Tests leave them as they find them."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = fill(build(name)).eval()
        return made[name]
    return get


def check(name, result, expected, atol):
    assert result.shape == expected.shape, name
    difference = (result - expected).abs().max().item()
    assert difference <= atol, f"{name}: {difference}"


def slices(x, channels, side):
    return x[0, ::channels, ::side, ::side]


def encode(model, images, videos):
    """Features of each object's image, as track_step takes them."""
    backbone = model._prepare_backbone_features(model.forward_image(images))
    _, feats, positions, sizes = backbone
    return [x[:, videos] for x in feats], [x[:, videos] for x in positions], sizes


def track(model, features, prompts, order, reverse):
    """Outputs of track_step by frame, as in the specification.

    features: of each frame, for one object; prompts: {frame: its argument of track_step}.
    """
    objects = len(per_object(prompts))
    bank = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    for t in order:
        feats, positions, sizes = features[t]
        feats = [x.expand(-1, objects, -1) for x in feats]
        positions = [x.expand(-1, objects, -1) for x in positions]
        inputs = {"point_inputs": None, "mask_inputs": None, **prompts.get(t, {})}
        out = model.track_step(t, t in prompts, feats, positions, sizes, **inputs, output_dict=bank,
                               num_frames=len(features), track_in_reverse=reverse)
        bank["cond_frame_outputs" if t in prompts else "non_cond_frame_outputs"][t] = out
    return {**bank["cond_frame_outputs"], **bank["non_cond_frame_outputs"]}


def per_object(prompts):
    """Prompts of track -> prompts of propagate."""
    objects = []
    for t, prompt in prompts.items():
        (parts,) = prompt.values()
        parts = parts if isinstance(parts, dict) else {"mask_inputs": parts}
        for i in range(len(next(iter(parts.values())))):
            objects += [{}] * (i == len(objects))
            objects[i] = {**objects[i], t: {name: part[i] for name, part in parts.items()}}
    return objects


# --- Equal to the official classes ---

@pytest.mark.parametrize("name", REGISTRY)
def test_keys_shapes_and_types_are_the_official_ones(name):
    with torch.device("meta"):
        model = build(name) if name == "mini" else NETS[name]()
    lines = sorted(f"{key} {shape} {dtype}" for key, (shape, dtype) in manifest(model).items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert REGISTRY[name] == {
        "tensors": len(lines), "parameters": parameters, "manifest_sha256": digest}
    if name in WEIGHTS:  # a file holds the tensors and less than 0.5 MB beside them
        bytes_of_tensors = 4 * sum(x.numel() for x in model.state_dict().values())
        assert 0 < WEIGHTS[name]["size"] - bytes_of_tensors < 500_000


@pytest.mark.parametrize("name, heads, whole, windows", [
    ("tiny", 1, [5, 7, 9], [8, 8, 4, 4, 14, 14, 14, 14, 7]),
    ("small", 1, [7, 10, 13], [8, 8, 4, 4, *[14] * 8, 7]),
    ("base_plus", 2, [12, 16, 20], [8, 8, 8, 4, 4, 4, *[14] * 13, 7, 7]),
    ("large", 2, [23, 33, 43], [*[8] * 3, *[4] * 6, *[16] * 33, 8, 8, 8])])
def test_windows_and_heads_are_those_of_the_papers_table(name, heads, whole, windows):
    """The first block of a stage has the windows of the stage before."""
    with torch.device("meta"):
        trunk = NETS[name]().image_encoder.trunk
    assert [i for i, block in enumerate(trunk.blocks) if not block.window] == whole
    found = [block.window for block in trunk.blocks if block.window]
    assert found == windows
    assert [trunk.blocks[i].attn.num_heads for i in trunk.stage_ends] == [
        heads, 2 * heads, 4 * heads, 8 * heads]


def test_signatures_are_the_official_ones():
    def names(function):
        return list(inspect.signature(function).parameters)
    model = sam2_demo()
    step = ["frame_idx", "is_init_cond_frame", "current_vision_feats", "current_vision_pos_embeds",
            "feat_sizes", "point_inputs", "mask_inputs", "output_dict", "num_frames",
            "track_in_reverse"]
    assert names(model.track_step) == names(model._track_step) == step  # official: two more, unused here
    assert names(model._prepare_memory_conditioned_features) == [*step[:5], *step[7:]]
    assert names(model.forward_image) == ["img_batch"]
    assert names(model._prepare_backbone_features) == ["backbone_out"]
    assert names(model._forward_sam_heads) == [
        "backbone_features", "point_inputs", "mask_inputs", "high_res_features", "multimask_output"]
    assert names(model._use_mask_as_output) == [
        "backbone_features", "high_res_features", "mask_inputs"]
    assert names(model._use_multimask) == ["is_init_cond_frame", "point_inputs"]
    assert names(model._encode_new_memory) == [
        "current_vision_feats", "feat_sizes", "pred_masks_high_res", "object_score_logits",
        "is_mask_from_pts"]
    assert names(model.memory_encoder.forward) == ["pix_feat", "masks"]
    assert names(model.memory_attention.forward) == [
        "curr", "memory", "curr_pos", "memory_pos", "num_obj_ptr_tokens"]
    assert names(model.sam_mask_decoder.forward) == [
        "image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings",
        "multimask_output", "repeat_image", "high_res_features"]
    assert (model.image_size, model.hidden_dim, model.mem_dim) == (128, 64, 16)
    assert model.device == torch.device("cpu")


def test_weights_are_the_four_published_files():
    assert list(WEIGHTS) == ["tiny", "small", "base_plus", "large"]
    for name, record in WEIGHTS.items():
        assert record["name"] == name and len(bytes.fromhex(record["sha256"])) == 32
        assert record["url"] == ("https://dl.fbaipublicfiles.com/segment_anything_2/092824/"
                                 f"sam2.1_hiera_{name}.pt")


def test_official_files_load_strictly(tmp_path, models):
    model = models("mini")
    torch.save({"model": model.state_dict()}, tmp_path / "sam2.1_hiera_mini.pt")
    state = weights.read_weights(tmp_path / "sam2.1_hiera_mini.pt", {})
    loaded = build("mini")
    weights.load_weights(loaded, state, "file")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


@pytest.fixture(scope="module")
def images(models):
    """images("tiny"): the specification's image, its reference, what the encoder makes of it."""
    made = {}

    @torch.no_grad()
    def get(name):
        if name not in made:
            s = SimpleNamespace(model=models(name), reference=load_reference(f"{name}_image"))
            s.image = clip(11, 1, 128) if name == "mini" else clip(31, 1, 512)
            hook = s.model.image_encoder.register_forward_hook(
                lambda module, args, out: setattr(s, "raw", list(out["backbone_fpn"])))
            s.backbone = s.model.forward_image(s.image)
            hook.remove()
            made[name] = s
        return made[name]
    return get


both_sizes = pytest.mark.parametrize("name", ["mini", "tiny"])


@both_sizes
def test_image_encoder_equals_the_official_one(name, images):
    s, atol = images(name), {"mini": 1e-5, "tiny": 1e-4}[name]
    check("input", s.image.double().sum(), s.reference["in_sum"], 1e-6)
    check("input", s.image[0, :, 0, :8], s.reference["in_head"], 0)
    steps = {"mini": [(2, 2), (2, 1), (1, 1)], "tiny": [(16, 8), (16, 4), (8, 2)]}[name]
    for i, (channels, side) in enumerate(steps):
        features, position = s.raw[i], s.backbone["vision_pos_enc"][i]
        assert features.shape == position.shape
        check(f"neck{i}", slices(features, channels, side), s.reference[f"neck{i}"], atol)
        mean_std = torch.stack([features.mean(), features.std()])
        check(f"neck{i}", mean_std, s.reference[f"neck{i}_meanstd"].float(), atol)
        check(f"pos{i}", slices(position, channels, side), s.reference[f"pos{i}"], atol)
    for i in range(2):
        channels, side = steps[i]
        part = slices(s.backbone["backbone_fpn"][i], max(1, channels // 8), side)
        check(f"hires{i}", part, s.reference[f"hires{i}"], atol)
    assert s.backbone["vision_features"] is s.backbone["backbone_fpn"][2]


def image_prompts():
    """Of the specification, by model and case: point_inputs, mask_inputs, multimask_output."""
    masks = 20 * disc_masks(128, (64, 64, 20), (30, 90, 14)).float() - 10
    one, box = torch.ones(2, 1), torch.tensor([[[20.0, 24], [100, 110]]])
    middle = torch.tensor([[[64.0, 64]]])
    three = torch.tensor([[[30.0, 40], [70, 80], [5, 120]]])
    tiny_box = torch.tensor([[[80.0, 90], [400, 410]]])
    return {
        "mini": {
            "click": (click(POINTS, one), None, True), "click1": (click(POINTS, one), None, False),
            "negpos": (click(three, [[1, 0, 1]]), None, False),
            "box": (click(box, [[2, 3]]), None, False),
            "box3": (click(torch.cat([box, middle], 1), [[2, 3, 1]]), None, False),
            "none": (None, masks, True),
            "maskpt": (click(POINTS, [[1], [0]]), masks, False)},
        "tiny": {"click": (click(TINY_POINTS, one), None, True),
                 "box": (click(tiny_box, [[2, 3]]), None, False)}}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name, case", [(name, case) for name, cases in image_prompts().items()
                                        for case in cases])
@torch.no_grad()
def test_prompts_and_masks_equal_the_official_ones(name, case, dynamic, images, monkeypatch):
    s, atol, k = images(name), ATOL[name], 1 if name == "mini" else 4
    points, masks, multimask = image_prompts()[name][case]
    monkeypatch.setattr(s.model.sam_mask_decoder, "dynamic_multimask_via_stability", dynamic)
    objects = len(masks) if points is None else len(points["point_coords"])
    feature = s.backbone["vision_features"] + s.model.no_mem_embed[0, 0][:, None, None]
    high_res = [x.expand(objects, -1, -1, -1) for x in s.backbone["backbone_fpn"][:2]]
    low, high, iou, best, best_high, pointer, score = s.model._forward_sam_heads(
        feature.expand(objects, -1, -1, -1), points, masks, high_res, multimask)
    size = s.model.image_size
    assert low.shape == (objects, 3 if multimask else 1, size // 4, size // 4)
    key = f"dyn_{case}" if dynamic and not multimask else case  # of three masks nothing is replaced
    check("masks", low[..., ::k, ::k], s.reference[f"{key}_masks"], atol)
    check("hi", high[..., ::8 * k, ::8 * k], s.reference[f"{key}_hi"], atol)
    check("ious", iou, s.reference[f"{key}_ious"], 1e-5)
    check("best", best[..., ::k, ::k], s.reference[f"{key}_best"], atol)
    check("ptr", pointer, s.reference[f"{key}_ptr"], atol)
    check("score", score, s.reference[f"{key}_score"], atol)
    up = F.interpolate(best, (size, size), mode="bilinear", align_corners=False)
    check("best_high", best_high, up, 1e-5)


def video_case(case):
    """Of the specification: model, frames, prompts by frame, order, backwards."""
    one = torch.ones(2, 1)
    click_both = {"point_inputs": click(POINTS, one)}
    x8 = clip(14, 8, 128)
    if case == "point":
        return "mini", clip(12, 20, 128), {0: click_both}, range(20), False
    if case == "mask":
        masks = disc_masks(128, (50, 60, 20), (90, 30, 12), (-9, 0, 1))  # the third is empty
        return "mini", clip(13, 6, 128), {0: {"mask_inputs": masks}}, range(6), False
    if case == "cond2":
        second = click([[[20.0, 20], [90, 90]], [[64, 64], [70, 10]]], [[2, 3], [1, 0]])
        prompts = {0: click_both, 5: {"point_inputs": second}}
        return "mini", x8, prompts, [0, 5, 1, 2, 3, 4, 6, 7], False
    if case == "reverse":
        return "mini", x8, {7: click_both}, range(7, -1, -1), True
    if case == "absent":
        return "mini", x8[:4], {0: click_both}, range(4), False
    if case == "tiny point":
        prompts = {0: {"point_inputs": click(TINY_POINTS, one)}}
        return "tiny", clip(32, 4, 512), prompts, range(4), False
    prompts = {0: {"mask_inputs": disc_masks(512, (200, 240, 80))}}
    return "tiny", clip(32, 4, 512), prompts, [0, 1, 2], False


@pytest.fixture
def adapted(models, monkeypatch):
    """adapted(case): the model of a video case with the settings of that case."""
    def get(case):
        model = models(video_case(case)[0])
        if case == "absent":
            bias = model.sam_mask_decoder.pred_obj_score_head.layers[2].bias
            monkeypatch.setattr(bias, "data", torch.full_like(bias, -3.0))
        return model
    return get


cases = ["point", "mask", "cond2", "reverse", "absent", "tiny point", "tiny mask"]


@pytest.fixture(scope="module")
def encoded(models):
    """encoded(model's name, video): features of each frame; those of the last video are kept."""
    kept = {}

    @torch.no_grad()
    def get(name, video):
        key = name, len(video), video.sum().item()
        if key not in kept:
            kept.clear()
            kept[key] = [encode(models(name), frame[None], [0]) for frame in video]
        return kept[key]
    return get


@pytest.mark.parametrize("case", cases)
@torch.no_grad()
def test_tracking_equals_the_official_one(case, adapted, encoded):
    model, (name, video, prompts, order, reverse) = adapted(case), video_case(case)
    reference, tag = load_reference(f"{name}_video"), case.split()[-1]
    outputs = track(model, encoded(name, video), prompts, order, reverse)
    by_frame = [outputs[t] for t in sorted(outputs)]
    k, atol = (2, ATOL["mini"]) if name == "mini" else (4, ATOL["tiny"])
    masks = torch.stack([out["pred_masks"][:, 0] for out in by_frame])
    check("masks", masks[..., ::k, ::k], reference[f"{tag}_masks"], atol)
    check("ptr", torch.stack([out["obj_ptr"] for out in by_frame]), reference[f"{tag}_ptr"], atol)
    scores = torch.stack([out["object_score_logits"] for out in by_frame])
    check("score", scores, reference[f"{tag}_score"], atol)
    areas = torch.stack([(out["pred_masks_high_res"] > 0).sum((1, 2, 3)) for out in by_frame])
    expected = reference[f"{tag}_hi_area"]
    tolerance = 5 if name == "mini" else 0.001 * expected + 1
    assert ((areas - expected).abs() <= tolerance).all(), areas - expected
    for frame, key in ((order[0], "mem_first"), (order[-1], "mem_last")):
        memory = outputs[frame]["maskmem_features"]
        step = max(1, memory.shape[3] // 8)
        check(key, memory[:, ::2, ::step, ::step], reference[f"{tag}_{key}"], 5e-4)
    if case == "absent":
        assert (masks == -1024).all()
        assert all(torch.equal(out["obj_ptr"], model.no_obj_ptr.expand(2, -1)) for out in by_frame)


@pytest.mark.parametrize("case", cases[:5])
def test_propagate_tracks_like_the_official_classes(case, adapted):
    model, (_, video, prompts, _, reverse) = adapted(case), video_case(case)
    reference = load_reference("mini_video")
    outputs = list(model.propagate(video, per_object(prompts), track_in_reverse=reverse))
    assert [t for t, _ in outputs] == list(range(len(video)))[::-1 if reverse else 1]
    outputs = [out for _, out in sorted(outputs, key=lambda item: item[0])]
    masks = torch.stack([out["pred_masks"][:, 0, ::2, ::2] for out in outputs])
    scores = torch.stack([out["object_score_logits"] for out in outputs])
    check("masks", masks, reference[f"{case}_masks"], ATOL["mini"])
    check("score", scores, reference[f"{case}_score"], ATOL["mini"])
    assert not masks.requires_grad


def sigmoid_focal(logits, target):
    """Mean over pixels, (B, M); alpha 0.25, gamma 2 (Lin et al. 2017)."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    correct = torch.exp(-loss)
    weight = 0.25 * target + 0.75 * (1 - target)
    return (weight * (1 - correct) ** 2 * loss).mean((2, 3))


def official_loss(steps, target):
    """20 focal + Dice of the best mask, IoU, object score: summed over steps, mean over objects."""
    target, total = target.float(), 0
    present = target.flatten(1).any(1).float()
    for _, high, iou, _, _, _, score in steps:
        wanted = target.expand_as(high)
        focal, prob = sigmoid_focal(high, wanted), high.sigmoid()
        dice = 1 - (2 * (prob * wanted).sum((2, 3)) + 1) / ((prob + wanted).sum((2, 3)) + 1)
        predicted = high > 0
        overlap = (predicted & (wanted > 0)).sum((2, 3))
        true_iou = overlap / (predicted | (wanted > 0)).sum((2, 3)).clamp(min=1)
        best = (20 * focal + dice).min(1).values
        total += (present * (best + (iou - true_iou).abs().mean(1))).mean()
        total += F.binary_cross_entropy_with_logits(score[:, 0], present)
    return total


@pytest.mark.parametrize("tag", ["maskprompt", "clicks", "image"])
def test_training_steps_losses_and_gradients_equal_the_official_ones(tag, models):
    """Three objects of two videos, clicks of the reference; what a training script calls."""
    model, reference = models("mini"), load_reference("mini_train")
    video = clip(15, 8, 128).unflatten(0, (4, 2))
    masks = torch.from_numpy(discs(4, 128, [(50, 60, 20, 3, 1, 0, 3), (90, 30, 12, -2, 4, 0, 1),
                                            (30, 95, 16, 1, -3, 0, 3)]))[:, :, None]
    num_frames, videos = 1 if tag == "image" else 4, [0, 0, 1]
    bank, loss = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}, 0
    for t in range(num_frames):
        feats, positions, sizes = encode(model, video[t], videos)
        clicks = reference.get(f"{tag}_f{t}_points")
        labels = reference.get(f"{tag}_f{t}_labels")
        points = None if clicks is None else click(clicks[:, :1], labels[:, :1])
        mask = masks[t] if tag == "maskprompt" and t == 0 else None
        out, outputs, high_res, seen = model._track_step(
            t, t == 0, feats, positions, sizes, points, mask, bank, num_frames)
        steps = [outputs]
        for i in range(1, 0 if clicks is None else clicks.shape[1]):
            points = click(clicks[:, :i + 1], labels[:, :i + 1])
            multimask = model._use_multimask(t == 0, points)
            outputs = model._forward_sam_heads(seen, points, outputs[3], high_res, multimask)
            steps.append(outputs)
        _, _, _, low, high, pointer, score = outputs
        memory, position = model._encode_new_memory(feats, sizes, high, score, points is not None)
        out.update(obj_ptr=pointer, maskmem_features=memory, maskmem_pos_enc=position)
        bank["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = out

        assert len(steps) == reference[f"{tag}_f{t}_nsteps"]
        check("pred", low[..., ::2, ::2], reference[f"{tag}_f{t}_pred"], 1e-4)
        best = torch.cat([step[3] for step in steps], 1)[..., ::4, ::4]
        check("steps", best, reference[f"{tag}_f{t}_steps"], 1e-4)
        for j, step in enumerate(steps):
            check("ious", step[2], reference[f"{tag}_f{t}_s{j}_ious"], 1e-5)
            check("score", step[6], reference[f"{tag}_f{t}_s{j}_score"], 1e-4)
        loss = loss + official_loss(steps, masks[t])

    expected = reference[f"{tag}_loss_core_loss"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    norms = json.loads((FIXTURES / "mini_grad_norms.json").read_text())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == norms.keys()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for key, gradient in zip(parameters, gradients):
        norm = norms[key][["maskprompt", "clicks", "image"].index(tag)]
        if norm is None or norm == 0:
            assert gradient is None if norm is None else not gradient.any(), key
        elif not key.endswith("k_proj.bias"):  # mathematically zero
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), key


def test_position_codes_of_times_are_the_official_ones():
    times = torch.tensor([0.0, 1, 3, -2]) / 15
    check("sine", sam2.get_1d_sine_pe(times, 32), load_reference("samplers")["sine_1d"], 1e-6)


def test_eps_of_every_norm(models):
    for name, module in models("mini").named_modules():
        if isinstance(module, (nn.LayerNorm, LayerNorm2d)):
            exact = name.startswith("image_encoder") or isinstance(module, LayerNorm2d)
            assert module.eps == (1e-6 if exact else 1e-5), name


# --- Beyond the official classes ---

def collect(model, *arguments, **options):
    """Masks (T, B, S/4, S/4) and scores (T, B) of propagate, by frame."""
    outputs = dict(model.propagate(*arguments, **options))
    masks = torch.stack([outputs[t]["pred_masks"][:, 0] for t in sorted(outputs)])
    return masks, torch.stack([outputs[t]["object_score_logits"][:, 0] for t in sorted(outputs)])


def point(x, y, label=1):
    return click([[float(x), y]], [label])


def test_several_videos_in_one_batch_equal_the_official_ones_and_each_alone(models):
    model, reference = models("mini"), load_reference("mini_train")
    videos = clip(15, 8, 128).unflatten(0, (4, 2))  # (T, V, 3, S, S)
    masks = disc_masks(128, (50, 60, 20), (90, 30, 12), (30, 95, 16))
    prompts = [{0: {"mask_inputs": mask}} for mask in masks]
    together, scores = collect(model, videos, prompts, [0, 0, 1])
    for t in range(4):
        check("pred", together[t, :, None, ::2, ::2], reference[f"maskprompt_f{t}_pred"], 1e-4)
    for video, objects in ((0, [0, 1]), (1, [2])):
        alone, scores_alone = collect(model, videos[:, video], [prompts[i] for i in objects])
        check("masks", together[:, objects], alone, 1e-5)
        check("scores", scores[:, objects], scores_alone, 1e-5)
    mixed, _ = collect(model, videos, [{1: point(64, 64)}, prompts[2], prompts[0]], [0, 1, 0])
    check("masks", mixed[:, 1:], together[:, [2, 0]], 1e-5)


def test_objects_with_different_prompts_equal_each_alone(models):
    model, video = models("mini"), clip(14, 6, 128)
    mask = {"mask_inputs": disc_masks(128, (60, 60, 25))[0]}
    prompts = [
        {0: point(30, 40)},
        {3: point(90, 77)},                                    # comes late
        {0: click([[20.0, 20], [90, 90]], [2, 3]), 3: point(64, 64, 0)},
        {3: mask},
        {0: point(64, 20)},                                    # goes in one batch with the first
        {0: click([[64.0, 20], [5, 6], [9, 100]], [1, 0, 0])}]
    together, scores = collect(model, video, prompts)
    for i, prompt in enumerate(prompts):
        alone, scores_alone = collect(model, video, [prompt])
        check("masks", together[:, i], alone[:, 0], 1e-5)
        check("scores", scores[:, i], scores_alone[:, 0], 1e-5)
    for i in (1, 3):
        assert (together[:3, i] == -1024).all() and (scores[:3, i] == -1024).all()
        assert (together[3:, i] > -1024).any() and (scores[3:, i] > -1024).all()
    first, _ = collect(model, video, [{0: prompts[2][0]}])
    assert not torch.equal(together[1, 2], first[1, 0])        # later prompts are seen before

    backwards, scores = collect(model, video, prompts, track_in_reverse=True)
    assert (backwards[1:, 0] == -1024).all() and (backwards[0, 0] > -1024).any()
    assert (scores[4:, 1] == -1024).all() and (scores[:4, 1] > -1024).all()


def test_a_late_object_equals_a_clip_that_starts_there(models):
    model, video = models("mini"), clip(12, 20, 128)           # 17 frames: the same pointer times
    late, _ = collect(model, video, [{3: point(30, 40)}, {0: point(90, 77)}])
    early, _ = collect(model, video[3:], [{0: point(30, 40)}])
    check("masks", late[3:, 0], early[:, 0], 1e-5)


def test_absent_objects_leave_the_others_alone(models):
    model, video = models("mini"), clip(13, 6, 128)
    masks = disc_masks(128, (50, 60, 20), (-9, 0, 1))
    prompts = [{0: {"mask_inputs": mask}} for mask in masks]
    together, scores = collect(model, video, prompts)
    check("empty", together[0, 1], torch.full((32, 32), -10.0), 1e-5)
    assert scores[0].tolist() == [10, -10]
    check("masks", together[:, 0], collect(model, video, prompts[:1])[0][:, 0], 1e-5)
    absent = torch.where(scores[1:, :, None, None] > 0, 0, together[1:])
    assert ((absent == 0) | (absent == -1024)).all()


def test_frames_of_8_bits_are_normalised_by_imagenets_means(models):
    model, video = models("mini"), (clip(12, 2, 128) * 60 + 120).clamp(0, 255).byte()
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[:, :, None, None]
    masks, scores = collect(model, video, [{0: point(30, 40)}])
    expected, expected_scores = collect(model, (video - mean) / std, [{0: point(30, 40)}])
    check("masks", masks, expected, 1e-4)
    check("scores", scores, expected_scores, 1e-4)


@pytest.mark.parametrize("backwards", [False, True])
def test_long_videos_are_read_frame_by_frame_and_forgotten(backwards, models, monkeypatch):
    model, read, sizes = models("mini"), [], []

    class Video:
        def __len__(self):
            return 25

        def __getitem__(self, t):
            read.append(t)
            return clip(t, 1, 128)[0]
    step = SAM2.track_step

    def counted(self, *arguments):
        sizes.append(len(arguments[7]["non_cond_frame_outputs"]))
        assert not any("pred_masks_high_res" in out for kind in (
            "cond_frame_outputs", "non_cond_frame_outputs") for out in arguments[7][kind].values())
        return step(self, *arguments)
    monkeypatch.setattr(SAM2, "track_step", counted)
    order = list(range(25))[::-1 if backwards else 1]
    first, _, third, *rest = order
    prompts = [{first: point(30, 40)}, {third: point(64, 64)}]
    outputs = model.propagate(Video(), prompts, track_in_reverse=backwards)
    assert next(outputs)[0] == first and sorted(read) == sorted([first, third])
    assert [t for t, _ in outputs] == order[1:]                # read only when it is asked for
    assert read[2:] == [order[1], third, *rest] and max(sizes) == 16


@torch.no_grad()
def test_memory_holds_the_published_frames_and_pointers(models, monkeypatch):
    model = models("mini")
    make = {t: {"maskmem_features": torch.full((1, 8, 8, 8), float(t)),
                "maskmem_pos_enc": [torch.zeros(1, 8, 8, 8)],
                "obj_ptr": torch.full((1, 32), t + 0.5)} for t in range(40)}
    bank = {"cond_frame_outputs": {t: make[t] for t in (0, 35)},
            "non_cond_frame_outputs": {t: make[t] for t in range(40) if t not in (0, 28, 35)}}

    def held(reverse=False):
        memory, position, tokens = model._memory(30, bank, 40, reverse)
        maps = memory[:len(memory) - tokens].unflatten(0, (-1, 64))[:, 0, 0, 0]
        pointers = memory[len(memory) - tokens:].unflatten(0, (-1, 4))[:, 0, 0, 0]
        times = position[:len(memory) - tokens].unflatten(0, (-1, 64))[:, 0, 0]
        return maps.tolist(), (pointers - 0.5).tolist(), times

    maps, pointers, times = held()
    assert maps == [0, 35, 29, 27, 26, 25, 24]                 # 28 was not tracked
    assert pointers == [0, 29, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15]
    assert torch.equal(times, model.maskmem_tpos_enc[[6, 6, 0, 2, 3, 4, 5], 0, 0])
    model.train()
    assert held()[1][:2] == [0, 35]                            # in training pointers may be future
    model.eval()
    monkeypatch.setattr(model, "max_obj_ptrs_in_encoder", 4)   # fewer pointers than maps
    assert held()[1] == [0, 29, 27] and held()[0] == maps
    monkeypatch.undo()
    maps, pointers, _ = held(reverse=True)
    assert maps == [0, 35, 31, 32, 33, 34, 36] and pointers == [35, 31, 32, 33, 34, 36, 37, 38, 39]


@torch.no_grad()
def test_binarised_masks_are_for_clicked_frames_in_eval_mode(models, monkeypatch):
    model, seen = models("mini"), []
    features, _, sizes = encode(model, clip(11, 1, 128), [0])
    logits = torch.tensor([-3.0, 0, 0.1, 5]).view(1, 1, 2, 2).repeat(1, 1, 64, 64)
    encoder = model.memory_encoder
    hook = encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    for binarize, clicked in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(model, "binarize_mask_from_pts_for_mem_enc", binarize)
        model._encode_new_memory(features, sizes, logits, torch.ones(1, 1), clicked)
    model.train()
    monkeypatch.setattr(model, "binarize_mask_from_pts_for_mem_enc", True)
    model._encode_new_memory(features, sizes, logits, torch.ones(1, 1), True)
    model.eval()
    hook.remove()
    check("soft", seen[0], 20 * logits.sigmoid() - 10, 1e-5)
    assert torch.equal(seen[1][0, 0, :2, :2], torch.tensor([[-10.0, -10], [10, 10]]))
    assert torch.equal(seen[2], seen[0]) and torch.equal(seen[3], seen[0])

    hook = encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    collect(model, clip(12, 2, 128), [{0: point(30, 40)}])
    hook.remove()
    clicked, tracked = seen[4:]
    assert set(clicked.unique().tolist()) == {-10, 10} and len(tracked.unique()) > 2


@torch.no_grad()
def test_a_score_of_zero_is_an_absent_object(models, monkeypatch):
    model = models("mini")
    last = model.sam_mask_decoder.pred_obj_score_head.layers[2]
    for parameter in last.parameters():
        monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    masks, scores = collect(model, clip(12, 2, 128), [{0: point(30, 40)}])
    assert (scores == 0).all() and (masks == -1024).all()


@torch.no_grad()
def test_absent_objects_are_marked_in_the_memory(models):
    model = models("mini")
    features, _, sizes = encode(model, clip(11, 1, 128), [0, 0, 0])
    logits = torch.zeros(3, 1, 128, 128)
    scores = torch.tensor([[0.1], [0.0], [-0.1]])
    memory, _ = model._encode_new_memory(features, sizes, logits, scores, False)
    marked = memory[:1] + model.no_obj_embed_spatial[0, :, None, None]
    check("memory", memory[1:], marked.expand(2, -1, -1, -1), 1e-6)


@torch.no_grad()
def test_masks_are_replaced_only_if_unstable_and_in_eval_mode(models, monkeypatch):
    decoder = models("mini").sam_mask_decoder
    masks = torch.full((3, 4, 10, 11), 0.06)
    masks[..., 10] = -0.06                                     # 100 of 110 pixels are above -0.05
    masks[0, 0, 0, :3] = 0.04                                  # 97 of 100 are above 0.05: unstable
    masks[1, 0, 0, :2] = -0.04                                 # 98 of 100: stable
    masks[2, 0] = -1.0                                         # empty: stable
    masks[:, 2] = 7.0
    iou = torch.tensor([0.9, 0.1, 0.3, 0.2]).expand(3, 4)
    chosen, chosen_iou = decoder.replace_unstable(masks, iou)
    assert chosen[:, 0, 9, 9].tolist() == pytest.approx([7, 0.06, -1])
    check("iou", chosen_iou, torch.tensor([[0.3], [0.9], [0.9]]), 1e-6)

    called = []
    monkeypatch.setattr(decoder, "dynamic_multimask_via_stability", True)
    monkeypatch.setattr(decoder, "replace_unstable", lambda *pair: called.append(1) or pair)
    model, features = models("mini"), torch.zeros(1, 32, 8, 8)
    high_res = [torch.zeros(1, 4, 32, 32), torch.zeros(1, 8, 16, 16)]
    model._forward_sam_heads(features, high_res_features=high_res)
    model.train()
    model._forward_sam_heads(features, high_res_features=high_res)
    model.eval()
    assert called == [1]


@torch.no_grad()
def test_prompts_can_be_given_as_the_official_predictors_do(models):
    encoder = models("mini").sam_prompt_encoder
    masks, box = torch.randn(2, 1, 32, 32), torch.tensor([[20.0, 24, 100, 110], [5, 6, 70, 80]])
    corners, two_three = box.view(2, 2, 2), torch.tensor([[2, 3], [2, 3]])
    both, dense = encoder(points=(POINTS, torch.ones(2, 1)), boxes=box, masks=masks)
    as_points, _ = encoder(points=(torch.cat([POINTS, corners], 1),
                                   torch.cat([torch.ones(2, 1), two_three], 1)), boxes=None)
    assert torch.equal(both, as_points[:, :3]) and as_points.shape == (2, 4, 32)
    assert torch.equal(encoder(boxes=box)[0], as_points[:, 1:3])
    padding, _ = encoder(points=(POINTS, torch.tensor([[-1], [1]])))
    assert torch.equal(padding[0, 0], encoder.not_a_point_embed.weight[0])
    assert torch.equal(padding[:, 1], encoder.not_a_point_embed.weight.expand(2, -1))
    tokens, again = encoder(points=None, boxes=None, masks=masks)
    assert tokens.shape == (2, 0, 32) and torch.equal(again, dense)
    tokens, dense = encoder()
    assert tokens.shape == (1, 0, 32) and dense.shape == (1, 32, 8, 8)


@torch.no_grad()
def test_one_image_for_several_prompts_needs_no_copies(models, images):
    s = images("mini")
    tokens, dense = s.model.sam_prompt_encoder((POINTS, torch.ones(2, 1)))
    image_pe, high_res = s.model.sam_prompt_encoder.get_dense_pe(), s.backbone["backbone_fpn"][:2]
    feature, decoder = s.backbone["vision_features"], s.model.sam_mask_decoder
    once = decoder(feature, image_pe, tokens, dense, True, True, high_res)
    copies = decoder(feature.expand(2, -1, -1, -1), image_pe, tokens, dense, True, False, high_res)
    for name, one, several in zip(("masks", "iou", "tokens", "score"), once, copies):
        check(name, one, several, 1e-5)
    with pytest.raises(ValueError, match="2 objects need an image each, or one .*; got 1 images"):
        decoder(feature, image_pe, tokens, dense, True, False, high_res)


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model, image = fill(build("mini")), clip(11, 1, 128)

    def gradients():
        loss = sum(x.square().mean() for x in model.forward_image(image)["backbone_fpn"])
        loss.backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found
    calls, trunk = [], model.image_encoder.trunk
    trunk.blocks[3].register_forward_pre_hook(lambda *call: calls.append(call))
    plain = gradients()
    assert len(calls) == 1
    trunk.gradient_checkpointing = True
    again = gradients()
    assert len(calls) == 3                                     # the backward pass made it again
    assert plain.keys() == again.keys() and len(plain) > 100
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_a_frozen_image_encoder_builds_no_graph_but_its_projections_learn():
    model = sam2_demo()
    model.image_encoder.requires_grad_(False)
    maps = model.forward_image(clip(11, 1, 128))["backbone_fpn"]
    assert [x.requires_grad for x in maps] == [True, True, False]


@torch.no_grad()
def test_drop_path_and_dropout_act_in_training_only():
    model = build("mini", drop_path_rate=0.5)
    rates = [block.drop_path for block in model.image_encoder.trunk.blocks]
    assert rates == pytest.approx([0, 0.5 / 6, 1 / 6, 0.25, 2 / 6, 2.5 / 6, 0.5])
    block, branch = model.image_encoder.trunk.blocks[6], torch.ones(1000, 2, 2, 3)
    kept = block.train().skip(branch)
    assert set(kept.unique().tolist()) == {0, 2} and abs(kept.mean() - 1) < 0.1
    assert (kept == kept[:, :1, :1, :1]).all()                 # an image is kept or dropped
    assert torch.equal(block.eval().skip(branch), branch)

    attention = model.memory_attention
    curr, memory = torch.randn(64, 2, 32), torch.randn(64 + 4, 2, 8)
    arguments = (curr, memory, torch.zeros_like(curr), torch.zeros_like(memory), 4)
    assert torch.equal(attention.eval()(*arguments), attention(*arguments))
    assert not torch.equal(attention.train()(*arguments), attention(*arguments))
    widths = []
    for layer in attention.layers:
        layer.dropout.register_forward_hook(lambda *call: widths.append(call[2].shape[2]))
    attention(*arguments)
    assert widths == [32, 32, 64, 32] * 2                      # both attentions, then the MLP
    of_scores, table = attention.layers[0].self_attn, sam2.rotary_table(8, 32, "cpu")
    x = curr.transpose(0, 1)
    assert not torch.equal(of_scores(x, x, x, table), of_scores(x, x, x, table))
    dropped = [m.p for m in attention.modules() if isinstance(m, nn.Dropout)]
    dropped += [m.dropout_p for m in attention.modules() if isinstance(m, sam2.RoPEAttention)]
    assert dropped == [0.1] * 6


@torch.no_grad()
def test_pointer_tokens_have_no_place():
    """Moving two maps of the memory as a whole changes what is seen, swapping pointers does not."""
    torch.manual_seed(0)
    attention = sam2.RoPEAttention(32, 8, 0.0).eval()
    q, k = torch.randn(1, 64, 32), torch.randn(1, 64 + 4, 8)
    table = sam2.rotary_table(8, 32, "cpu")
    plain = attention(q, k, k, table, 4)
    swapped = torch.cat([k[:, :64], k[:, 64:].flip(1)], 1)
    check("pointers", attention(q, swapped, swapped, table, 4), plain, 1e-6)
    turned = torch.cat([k[:, :64].flip(1), k[:, 64:]], 1)
    assert (attention(q, turned, turned, table, 4) - plain).abs().max() > 1e-3


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    table = sam2.rotary_table(8, 32, "cpu")
    x = torch.randn(32).expand(64, 32)
    turned = sam2.rotate(x, table)
    check("length", turned.norm(dim=1), x.norm(dim=1), 1e-4)
    scores = (turned @ turned.T).view(8, 8, 8, 8)              # row, column, row, column
    check("distance", scores[0, 0, 2, 3], scores[4, 1, 6, 4], 1e-3)
    assert sam2.rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_new_weights_start_small():
    torch.manual_seed(0)
    model = sam2_demo()
    for key in ("maskmem_tpos_enc", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr",
                "no_obj_embed_spatial"):
        assert 0.005 < model.get_parameter(key).std() < 0.04
    assert (model.memory_encoder.fuser.layers[0].gamma == torch.tensor(1e-6)).all()


def test_demo_is_small_and_learns_to_track():
    torch.manual_seed(0)
    model = sam2_demo(64)
    assert sum(p.numel() for p in model.parameters()) < 2e6
    masks = torch.from_numpy(discs(3, 64, [(20, 20, 9, 6, 4, 0, 9), (44, 40, 7, -5, 3, 0, 9)]))
    masks = masks[:, :, None]
    video = torch.zeros(3, 3, 64, 64)
    video[:, 0] += 2.0 * masks[:, 0, 0]
    video[:, 1] += 2.0 * masks[:, 1, 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        backbone = model._prepare_backbone_features(model.forward_image(video))
        bank, loss = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}, 0
        for t in range(3):
            _, feats, positions, sizes = backbone
            out = model.track_step(t, t == 0, [x[:, [t, t]] for x in feats],
                                   [x[:, [t, t]] for x in positions], sizes, None,
                                   masks[0] if t == 0 else None, bank, 3)
            bank["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = out
            if t:
                score = out["object_score_logits"]
                loss = loss + F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
                logits = out["pred_masks_high_res"].clamp(min=-20)
                loss = loss + F.binary_cross_entropy_with_logits(logits, masks[t].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_bfloat16_stays_near_float32(models):
    model, video = models("mini"), clip(12, 4, 128)
    prompts = [{0: point(30, 40)}, {0: point(90, 77)}]
    prompts.append({1: {"mask_inputs": disc_masks(128, (60, 60, 25))[0]}})
    exact, scores = collect(model, video, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        masks, scores_again = collect(model, video, prompts)
    assert masks.dtype == scores_again.dtype == torch.float32
    assert ((masks > 0) != (exact > 0)).float().mean() < 0.03
    assert torch.equal(scores_again > 0, scores > 0)


def test_many_objects_are_tracked_sixteen_at_a_time(models, monkeypatch):
    model, video = models("mini"), clip(12, 3, 128)
    prompts = [{0: point(5 + 6 * i, 60)} for i in range(20)]
    seen, step = [], model.track_step

    def track_step(t, prompted, feats, *more):
        seen.append(feats[0].shape[1])
        return step(t, prompted, feats, *more)
    monkeypatch.setattr(model, "track_step", track_step)
    masks, scores = collect(model, video, prompts)
    assert seen == [16, 4] * 3
    some = [0, 15, 16, 19]
    few, few_scores = collect(model, video, [prompts[i] for i in some])
    assert torch.allclose(masks[:, some], few, atol=1e-4) and torch.allclose(scores[:, some], few_scores, atol=1e-4)
    assert (few[:, 0] - few[:, 3]).abs().max() > 0.1


def test_every_tensor_is_made_on_the_device_of_the_model():
    """The meta device refuses tensors of another one, as a GPU would."""
    model = build("mini", dynamic_multimask_via_stability=True).eval().to("meta")
    prompts = [{0: point(30, 40), 2: click([[20.0, 20], [90, 90]], [2, 3])}, {1: point(90, 77)},
               {0: {"mask_inputs": torch.zeros(1, 128, 128)}}]
    video = torch.zeros(4, 2, 3, 128, 128)
    for _, out in model.propagate(video, prompts, [0, 1, 1]):
        assert out["pred_masks"].device == out["object_score_logits"].device == model.device
    boxes = torch.zeros(2, 4, device="meta")
    assert model.sam_prompt_encoder(boxes=boxes)[0].device == model.device


def test_bfloat16_trains():
    torch.manual_seed(0)
    model = sam2_demo()
    features = None
    bank, loss = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}, 0
    with torch.autocast("cpu", torch.bfloat16):
        for t in range(2):
            features = encode(model, clip(12, 1, 128), [0])
            mask = disc_masks(128, (60, 60, 25)) if t == 0 else None
            out = model.track_step(t, t == 0, *features, None, mask, bank, 2)
            bank["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = out
            loss = loss + out["pred_masks_high_res"].sigmoid().mean()
            assert out["maskmem_features"].dtype == torch.bfloat16
    loss.backward()
    gradients = [p.grad for key, p in model.named_parameters() if key.startswith("memory_encoder")]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_bad_arguments_name_the_rule(models):
    model, video = models("mini"), clip(14, 3, 128)
    for size in (100, 16, 144):
        with pytest.raises(ValueError, match=f"multiple of 32, got {size}"):
            sam2_hiera_tiny(size)
    with pytest.raises(ValueError, match="multiple of 64, got 96"):
        SAM2(96, window_spec=(16, 4, 14, 7))
    with pytest.raises(ValueError, match="before a stage change must be even, got 5"):
        SAM2(128, window_spec=(8, 4, 5, 7))
    with pytest.raises(ValueError, match=r"128 pixels square, got \(128, 96\)"):
        model.forward_image(torch.zeros(1, 3, 128, 96))
    with pytest.raises(ValueError, match=r"must be \(128, 128\), got \(64, 64\)"):
        list(model.propagate(video, [{0: {"mask_inputs": torch.zeros(1, 64, 64)}}]))
    with pytest.raises(ValueError, match=r"object 1 needs prompts on frames 0 to 2, got \[\]"):
        list(model.propagate(video, [{0: point(3, 4)}, {}]))
    with pytest.raises(ValueError, match=r"object 0 needs prompts on frames 0 to 2, got \[0, 3\]"):
        list(model.propagate(video, [{0: point(3, 4), 3: point(3, 4)}]))
    with pytest.raises(ValueError, match=r"got \['point_coords'\]"):
        list(model.propagate(video, [{0: {"point_coords": POINTS[0]}}]))
    features = encode(model, video[:1], [0])
    with pytest.raises(ValueError, match="frame 1 has no conditioning frame"):
        model.track_step(1, False, *features, None, None,
                         {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}, 3)


@torch.no_grad()
def test_any_multiple_of_32_will_do():
    for size in (32, 96):
        model = sam2_demo(size).eval()
        masks, _ = collect(model, torch.randn(2, 3, size, size), [{0: point(9, 9)}])
        assert masks.shape == (2, 1, size // 4, size // 4) and masks.isfinite().all()
