"""EfficientSam against numbers of the official class (tests/fixtures/efficient_sam, weights drawn from key names)."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT
from nets.efficient_sam import EfficientSam, LayerNorm2d, efficient_sam_vits, efficient_sam_vitt
from parity_fill import fill, manifest

pytestmark = pytest.mark.usefixtures("two_threads")
FIXTURES = ROOT / "tests/fixtures/efficient_sam"
INDEX = json.loads((FIXTURES / "index.json").read_text())


def build(name):
    c = INDEX[name]["config"]
    return EfficientSam(
        image_size=c["img_size"], patch_size=c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"],
        num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], neck_dim=c["neck_dim"], max_points=c["max_points"],
        decoder_depth=c["dec_depth"], decoder_mlp_dim=c["dec_mlp_dim"], decoder_num_heads=c["dec_heads"],
        upscaling_dims=c["upscaling_dims"], num_multimask=c["num_multimask"], iou_hidden=c["iou_hidden"],
        iou_layers=c["iou_layers"])


@pytest.fixture(scope="module")
def filled():
    """filled("vitt"): the net with weights drawn from its key names, made once."""
    made = {}
    return lambda name: made.setdefault(name, fill(build(name)).eval())


@pytest.mark.parametrize("name, make", [("small", lambda: build("small")), ("vitt", efficient_sam_vitt),
                                        ("vits", efficient_sam_vits), ("vitt", lambda: efficient_sam_vitt(256))])
def test_keys_shapes_types_and_parameters_are_the_official_ones(name, make):
    model = make()
    assert manifest(model) == json.loads((FIXTURES / f"keys_{name}.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == INDEX[name]["n_params"]


CASES = [(name, case) for name in INDEX for case in INDEX[name]["cases"]]


def test_every_case_of_the_specification_is_there():
    assert len(CASES) >= 14 and {name for name, _ in CASES} == {"small", "vitt", "vits", "vitt256"}


@pytest.mark.parametrize("name, case", CASES)
@torch.no_grad()
def test_outputs_equal_the_official_ones(name, case, filled):
    model, spec = filled(name), INDEX[name]["cases"][case]
    atol = 2e-5 if name == "small" else 1e-4
    b, _, h, w = spec["image_shape"]
    image = torch.from_numpy(np.random.RandomState(spec["seed"]).rand(b, 3, h, w).astype(np.float32))
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        reference = {key.split("/")[1]: torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{case}/")}
    points, labels = reference["points"], reference["labels"]

    embedding = model.get_image_embeddings(image)
    assert list(embedding.shape) == spec["embedding_shape"]
    assert (embedding[tuple(slice(None, None, s) for s in spec["embedding_strides"])]
            - reference["embedding"]).abs().max() <= atol
    size = (h, w) if spec["scale_to_original_image_size"] else (-1, -1)
    masks, iou = model.predict_masks(embedding, points, labels, True, h, w, *size)
    if name == "small":  # forward is these two, and the larger nets' encoders take seconds
        for part, whole in zip((masks, iou), model(image, points, labels, spec["scale_to_original_image_size"])):
            torch.testing.assert_close(part, whole)
    assert list(masks.shape) == spec["mask_shape"]
    masks = masks[..., ::spec["mask_stride"], ::spec["mask_stride"]]
    assert (masks - reference["masks"]).abs().max() <= atol and (iou - reference["iou"]).abs().max() <= atol
    clear = reference["masks"].abs() > 1e-3
    assert torch.equal((masks > 0)[clear], (reference["masks"] > 0)[clear])
    masks, iou = model.predict_masks(embedding, points, labels, False, h, w)
    assert list(masks.shape) == spec["single_shape"]
    masks = masks[..., ::spec["single_stride"], ::spec["single_stride"]]
    assert (masks - reference["single_low_res"]).abs().max() <= atol
    assert (iou - reference["single_iou"]).abs().max() <= atol


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_official_ones(checkpointing):
    model = fill(build("small")).train()
    model.image_encoder.gradient_checkpointing = checkpointing
    image = torch.from_numpy(np.random.RandomState(51).rand(2, 3, 128, 128).astype(np.float32))
    points = torch.tensor([[[[20.0, 30], [90, 100]]], [[[5, 50], [70, 120]]]])
    target = torch.from_numpy((np.random.RandomState(52).rand(2, 1, 1, 128, 128) > 0.5).astype(np.float32))
    masks, iou = model(image, points, torch.tensor([[[2, 3]], [[2, 3]]]))
    loss = F.binary_cross_entropy_with_logits(masks, target.expand_as(masks)) + iou.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(INDEX["small"]["gradients"]["loss"], rel=1e-5)
    expected = json.loads((FIXTURES / "grads_small.json").read_text())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, (norm, total) in expected.items():
        gradient = parameters[name].grad.double()
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
        assert abs(gradient.sum().item() - total) <= 1e-3 * max(norm, 1e-3), name


def test_eps_of_every_norm(filled):
    """The encoder's eps is below what the outputs above could tell."""
    for name, module in filled("small").named_modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, LayerNorm2d)):
            assert module.eps == (1e-6 if name.startswith("image_encoder") else 1e-5), name


def test_a_wrong_detail_would_be_seen(filled, monkeypatch):
    """The comparison can fail: a first layer that adds the position, as the others do."""
    model = build("small")
    fill(model).eval()
    model.mask_decoder.transformer.layers[0].first = False
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[[[20.0, 30], [90, 100]]]]), torch.tensor([[[2, 3]]])
    with torch.no_grad():
        assert (model(image, *prompt)[0] - filled("small")(image, *prompt)[0]).abs().max() > 1e-2


@torch.no_grad()
def test_prompts_keep_their_places_under_bfloat16(filled):
    model, coords = filled("small"), torch.tensor([[[100.0, 50.0], [101.0, 50.0]]])
    with torch.autocast("cpu", torch.bfloat16):
        under = model.prompt_encoder(coords, torch.ones(1, 2))
    assert torch.equal(under, model.prompt_encoder(coords, torch.ones(1, 2)))
    assert not torch.equal(under[:, 0], under[:, 1])


def test_bad_sizes_name_the_rule(filled):
    with pytest.raises(ValueError, match="multiple of 16, got 100"):
        EfficientSam(image_size=100)
    with pytest.raises(ValueError, match=r"128 pixels square, got \(64, 64\)"):
        filled("small").image_encoder(torch.zeros(1, 3, 64, 64))
