"""DeepLabV3 (Chen et al. 2017, arXiv:1706.05587) on ResNet-50, ResNet-101 or MobileNetV3-Large.

Keys, shapes and outputs match torchvision.models.segmentation (read at 0.29.2), whose code the
article shows, so the official COCO files load strictly. The backbones are torchvision's own, but for
a small one that --demo uses; ASPP and the two heads are written here. As there, and unlike the
paper: no multi-grid, and an auxiliary FCN head. Left out: downloads by torchvision.
"""
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import v2

PIXEL_MEAN, PIXEL_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet, RGB in 0..1
ATROUS_RATES = (12, 24, 36)  # the paper's for stride 8; torchvision keeps them at MobileNet's 16

URL = "https://download.pytorch.org/models/deeplabv3_"
COCO_WEIGHTS = {  # torchvision's, with 21 outputs and the auxiliary head; sha256: its first digits
    "resnet50": {"name": "coco", "url": f"{URL}resnet50_coco-cd0a2569.pth", "sha256": "cd0a2569"},
    "resnet101": {"name": "coco", "url": f"{URL}resnet101_coco-586e9e4e.pth", "sha256": "586e9e4e"},
    "mobilenet_v3_large": {"name": "coco", "url": f"{URL}mobilenet_v3_large-fc3c493d.pth",
                           "sha256": "fc3c493d"},
}
VOC_CLASSES = (  # the classes of these weights, in order
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor").split()


class Backbone(nn.ModuleDict):
    """Image (B, 3, H, W) -> [features of each layer named in taps]; later layers are left out."""

    def __init__(self, layers, taps):
        names = [name for name, _ in layers]
        last = max(map(names.index, taps))
        super().__init__(layers[:last + 1])
        self.taps = taps

    def forward(self, x):
        found = {}
        for name, layer in self.items():
            x = layer(x)
            found[name] = x
        return [found[name] for name in self.taps]


def conv_bn_relu(in_channels, out_channels, kernel_size, dilation=1):
    """Convolution that keeps height and width, batch norm, ReLU."""
    padding = dilation * (kernel_size // 2)
    return [nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation,
                      bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU()]


class ASPPPooling(nn.Sequential):
    """(B, in, h, w) -> (B, out, h, w): the mean over the image, the same at every place.

    In training, its batch norm sees one value per channel and image, so a batch of one image raises
    ValueError.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels, 1))

    def forward(self, x):
        return super().forward(x).expand(-1, -1, *x.shape[-2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, in, h, w) -> (B, out, h, w).

    Five branches see each place at different scales; their outputs are concatenated and projected.
    """

    def __init__(self, in_channels, out_channels=256):
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Sequential(*conv_bn_relu(in_channels, out_channels, 1)),
            *[nn.Sequential(*conv_bn_relu(in_channels, out_channels, 3, rate))
              for rate in ATROUS_RATES],
            ASPPPooling(in_channels, out_channels),
        ])
        self.project = nn.Sequential(
            *conv_bn_relu(5 * out_channels, out_channels, 1), nn.Dropout(0.5))

    def forward(self, x):
        return self.project(torch.cat([conv(x) for conv in self.convs], 1))


class DeepLabHead(nn.Sequential):
    """Features (B, in, h, w) -> logits (B, num_classes, h, w)."""

    def __init__(self, in_channels, num_classes):
        super().__init__(
            ASPP(in_channels), *conv_bn_relu(256, 256, 3), nn.Conv2d(256, num_classes, 1))


class FCNHead(nn.Sequential):
    """Features (B, in, h, w) of an earlier layer -> logits (B, num_classes, h, w).

    The auxiliary loss is computed from them.
    """

    def __init__(self, in_channels, num_classes):
        hidden = in_channels // 4
        super().__init__(*conv_bn_relu(in_channels, hidden, 3), nn.Dropout(0.1),
                         nn.Conv2d(hidden, num_classes, 1))


class DeepLabV3(nn.Module):
    """Image (B, 3, H, W) -> {"out": logits (B, num_classes, H, W), "aux": same shape}.

    The image is normalised with ImageNet's statistics. num_classes counts the background. With
    aux=False there is no auxiliary head, and no "aux" in the result.
    """

    def __init__(self, backbone, classifier, aux_classifier=None):
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier

    def forward(self, image):
        size = image.shape[-2:]
        deep, early = self.backbone(image)  # ResNet: (B, 2048, H/8, W/8), (B, 1024, H/8, W/8)
        logits = {"out": self.classifier(deep)}
        if self.aux_classifier is not None:
            logits["aux"] = self.aux_classifier(early)
        return {name: F.interpolate(x, size, mode="bilinear", align_corners=False)
                for name, x in logits.items()}


# --- Images in, masks out ---

def normalize(image):
    """Normalises RGB uint8 (3, H, W) -> float32 by ImageNet's statistics."""
    return v2.functional.normalize(image / 255, PIXEL_MEAN, PIXEL_STD)


def resize(image, side):
    """Resizes an image (3, H, W) uint8 so that its shorter side is `side` pixels."""
    return v2.functional.resize(image, scaled_size(image, side), antialias=True)


def scaled_size(image, side):
    """Returns [height, width] of an image (..., H, W) once its shorter side is `side`."""
    height, width = image.shape[-2:]
    return [max(side, round(length * side / min(height, width))) for length in (height, width)]


# Fresh weights; to start from ImageNet's, give the builders below weights="DEFAULT"
def _resnet(build):
    net = build(weights=None, replace_stride_with_dilation=[False, True, True])
    return Backbone(list(net.named_children()), ("layer4", "layer3")), 2048, 1024


def _mobilenet_v3_large():
    # Its batch norm has eps 1e-3 and momentum 0.01
    net = torchvision.models.mobilenet_v3_large(weights=None, dilated=True)
    return Backbone(list(net.features.named_children()), ("16", "4")), 960, 40


def _demo():
    """Six plain convolutions at up to stride 8, the last two dilated: learns in a minute on a CPU."""
    channels, dilations, layers = (3, 32, 64, 128, 128, 128, 128), (1, 1, 1, 1, 2, 4), []
    for i, dilation in enumerate(dilations):
        layer = conv_bn_relu(channels[i], channels[i + 1], 3, dilation)
        layers.append((str(i), nn.Sequential(*layer, *[nn.MaxPool2d(2)] * (i < 3))))
    return Backbone(layers, ("5", "3")), 128, 128


BACKBONES = {  # name: function -> backbone, channels of its deep and of its early features
    "resnet50": lambda: _resnet(torchvision.models.resnet50),
    "resnet101": lambda: _resnet(torchvision.models.resnet101),
    "mobilenet_v3_large": _mobilenet_v3_large,
    "demo": _demo,
}


def deeplabv3(backbone="resnet50", num_classes=21, aux=True):
    """DeepLabV3 with fresh weights; backbone must be one of BACKBONES, else ValueError."""
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    features, deep, early = BACKBONES[backbone]()
    classifier = DeepLabHead(deep, num_classes)
    aux_classifier = FCNHead(early, num_classes) if aux else None
    return DeepLabV3(features, classifier, aux_classifier)
