"""DeepLabV3 against torchvision's, built beside it: keys, outputs in eval and train mode, running statistics."""
import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import nets.deeplabv3
from nets.deeplabv3 import BACKBONES, deeplabv3
from parity_fill import fill, manifest

pytestmark = pytest.mark.usefixtures("two_threads")
FIXTURES = Path(__file__).parent / "fixtures"
# Atrous rates 24 and 36 fall wholly on padding unless the features are wider than that: strides are 8 and 16
WIDE = {"resnet50": (1, 3, 33, 401), "resnet101": (1, 3, 33, 401), "mobilenet_v3_large": (1, 3, 33, 705)}


def official(backbone, num_classes, aux):
    build = getattr(torchvision.models.segmentation, f"deeplabv3_{backbone}")
    return build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux)


def image(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs):
    """Largest difference over the outputs, relative to the largest value."""
    assert list(ours) == list(theirs)
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


def no_dropout(model):
    """Train mode without what is random in it."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


def compare(backbone, num_classes=21, aux=True):
    """Differences in eval mode, in train mode, of running variances after it, of the gradients' norms."""
    ours, theirs = fill(deeplabv3(backbone, num_classes, aux)), fill(official(backbone, num_classes, aux))
    with torch.no_grad():
        evaluated = difference(ours.eval()(image(WIDE[backbone])), theirs.eval()(image(WIDE[backbone])))
    outputs = [no_dropout(model)(image((2, 3, 65, 97), 1)) for model in (ours, theirs)]
    trained = difference(*outputs)
    for output in outputs:
        sum(x.square().mean() for x in output.values()).backward()
    norms = [torch.stack([p.grad.norm() for p in model.parameters()]) for model in (ours, theirs)]
    variances = zip(ours.named_buffers(), theirs.named_buffers())
    variance = max(((a - b).abs().max() / b.abs().max()).item() for (name, a), (_, b) in variances if "var" in name)
    return evaluated, trained, variance, ((norms[0] - norms[1]).norm() / norms[1].norm()).item()


def test_keys_shapes_types_and_order_equal_the_official_manifest():
    expected = json.loads((FIXTURES / "deeplab_manifest.json").read_text())
    assert len(expected) == 6
    for name, tensors in expected.items():
        net, aux, _ = name.split("/")
        ours = manifest(deeplabv3(net.removeprefix("deeplabv3_"), 21, aux == "aux=1"))
        assert ours == tensors and list(ours) == list(tensors), name


def test_dropout_is_the_official_one():
    ours, theirs = deeplabv3("mobilenet_v3_large"), official("mobilenet_v3_large", 21, True)
    for head in ("classifier", "aux_classifier"):
        found = [[layer.p for layer in getattr(net, head).modules() if isinstance(layer, nn.Dropout)]
                 for net in (ours, theirs)]
        assert found[0] == found[1] != []


def test_parameter_counts_are_the_official_ones():
    counts = {name: sum(p.numel() for p in deeplabv3(name).parameters()) for name in BACKBONES}
    assert counts.pop("demo") < 4_000_000  # the only one that is not torchvision's
    assert counts == {"resnet50": 42_004_074, "resnet101": 60_996_202, "mobilenet_v3_large": 11_029_328}


@pytest.mark.parametrize("backbone, num_classes, aux", [
    ("resnet50", 21, True), ("resnet50", 2, False), ("resnet101", 5, True), ("mobilenet_v3_large", 21, True),
    ("mobilenet_v3_large", 11, False)])
def test_outputs_statistics_and_gradients_equal_torchvisions(backbone, num_classes, aux):
    evaluated, trained, variance, gradient = compare(backbone, num_classes, aux)
    assert evaluated < 2e-5 and trained < 5e-3 and variance < 1e-4 and gradient < 5e-3


def test_a_wrong_atrous_rate_would_be_seen(monkeypatch):
    monkeypatch.setattr(nets.deeplabv3, "ATROUS_RATES", (12, 24, 24))
    assert compare("mobilenet_v3_large")[0] > 1e-2


@pytest.mark.parametrize("eps, momentum, figure", [(1e-5, 0.01, 0), (1e-3, 0.1, 2)])
def test_mobilenets_batch_norm_settings_would_be_seen(monkeypatch, eps, momentum, figure):
    build = nets.deeplabv3._mobilenet_v3_large

    def altered():
        backbone, *channels = build()
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = eps, momentum
        return backbone, *channels

    monkeypatch.setitem(BACKBONES, "mobilenet_v3_large", altered)
    assert compare("mobilenet_v3_large")[figure] > 1e-4


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet50, resnet101, mobilenet_v3_large, demo, got 'vgg'"):
        deeplabv3("vgg")


def test_a_training_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        deeplabv3("mobilenet_v3_large").train()(image((1, 3, 64, 64)))
