"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) and U-Net++ (Zhou et al. 2018, arXiv:1807.10165).

Keys, shapes and outputs match UNet and NestedUNet of github.com/4uiiurz1/pytorch-nested-unet
(commit 557ea02), the code behind the article, so its weights load strictly. As there, and unlike
the 2015 paper: padded 3x3 convolutions with batch norm, half the channels, bilinear upsampling with
align_corners=True.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

PIXEL_MEAN, PIXEL_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet, RGB in 0..1
CHANNELS = (32, 64, 128, 256, 512)  # of levels 0 to 4; the 2015 paper has twice as many
STRIDE = 16                         # four poolings: input height and width must be multiples of it


class VGGBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels, middle_channels, out_channels):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, middle_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(middle_channels)
        self.conv2 = nn.Conv2d(middle_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


def check_size(image):
    if image.shape[-2] % STRIDE or image.shape[-1] % STRIDE:
        raise ValueError(
            f"height and width must be multiples of {STRIDE}, got {tuple(image.shape[-2:])}")


class UNet(nn.Module):
    """Image (B, input_channels, H, W) -> logits (B, num_classes, H, W).

    H and W must be multiples of 16, else ValueError.
    """

    def __init__(self, num_classes, input_channels=3):
        super().__init__()
        c = CHANNELS
        self.pool = nn.MaxPool2d(2, 2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

        self.conv0_0 = VGGBlock(input_channels, c[0], c[0])
        self.conv1_0 = VGGBlock(c[0], c[1], c[1])
        self.conv2_0 = VGGBlock(c[1], c[2], c[2])
        self.conv3_0 = VGGBlock(c[2], c[3], c[3])
        self.conv4_0 = VGGBlock(c[3], c[4], c[4])

        self.conv3_1 = VGGBlock(c[3] + c[4], c[3], c[3])
        self.conv2_2 = VGGBlock(c[2] + c[3], c[2], c[2])
        self.conv1_3 = VGGBlock(c[1] + c[2], c[1], c[1])
        self.conv0_4 = VGGBlock(c[0] + c[1], c[0], c[0])
        self.final = nn.Conv2d(c[0], num_classes, 1)

    def forward(self, image):
        check_size(image)
        x0_0 = self.conv0_0(image)            # (B, 32, H, W)
        x1_0 = self.conv1_0(self.pool(x0_0))  # (B, 64, H/2, W/2)
        x2_0 = self.conv2_0(self.pool(x1_0))  # (B, 128, H/4, W/4)
        x3_0 = self.conv3_0(self.pool(x2_0))  # (B, 256, H/8, W/8)
        x4_0 = self.conv4_0(self.pool(x3_0))  # (B, 512, H/16, W/16)

        # The skip connection comes first, then what comes from the level below
        x3_1 = self.conv3_1(torch.cat([x3_0, self.up(x4_0)], 1))
        x2_2 = self.conv2_2(torch.cat([x2_0, self.up(x3_1)], 1))
        x1_3 = self.conv1_3(torch.cat([x1_0, self.up(x2_2)], 1))
        x0_4 = self.conv0_4(torch.cat([x0_0, self.up(x1_3)], 1))
        return self.final(x0_4)


class NestedUNet(nn.Module):
    """U-Net++: image (B, input_channels, H, W) -> logits (B, num_classes, H, W).

    H and W must be multiples of 16, else ValueError.
    convI_J is at level I (stride 2**I). Its input is all of convI_0 .. convI_(J-1) and the
    upsampled output of the level below.
    With deep_supervision: a list of four logits, shallow to deep; the last one is the prediction.
    With depth 1 to 4: the logits of this head alone; layers that only deeper heads need are not
    computed (the paper's pruning).
    """

    def __init__(self, num_classes, input_channels=3, deep_supervision=False):
        super().__init__()
        c = CHANNELS
        self.deep_supervision = deep_supervision
        self.pool = nn.MaxPool2d(2, 2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

        self.conv0_0 = VGGBlock(input_channels, c[0], c[0])
        self.conv1_0 = VGGBlock(c[0], c[1], c[1])
        self.conv2_0 = VGGBlock(c[1], c[2], c[2])
        self.conv3_0 = VGGBlock(c[2], c[3], c[3])
        self.conv4_0 = VGGBlock(c[3], c[4], c[4])

        self.conv0_1 = VGGBlock(c[0] + c[1], c[0], c[0])
        self.conv1_1 = VGGBlock(c[1] + c[2], c[1], c[1])
        self.conv2_1 = VGGBlock(c[2] + c[3], c[2], c[2])
        self.conv3_1 = VGGBlock(c[3] + c[4], c[3], c[3])

        self.conv0_2 = VGGBlock(c[0] * 2 + c[1], c[0], c[0])
        self.conv1_2 = VGGBlock(c[1] * 2 + c[2], c[1], c[1])
        self.conv2_2 = VGGBlock(c[2] * 2 + c[3], c[2], c[2])

        self.conv0_3 = VGGBlock(c[0] * 3 + c[1], c[0], c[0])
        self.conv1_3 = VGGBlock(c[1] * 3 + c[2], c[1], c[1])

        self.conv0_4 = VGGBlock(c[0] * 4 + c[1], c[0], c[0])

        if deep_supervision:
            self.final1 = nn.Conv2d(c[0], num_classes, 1)
            self.final2 = nn.Conv2d(c[0], num_classes, 1)
            self.final3 = nn.Conv2d(c[0], num_classes, 1)
            self.final4 = nn.Conv2d(c[0], num_classes, 1)
        else:
            self.final = nn.Conv2d(c[0], num_classes, 1)

    def forward(self, image, depth=None):
        check_size(image)
        if depth is not None and not (self.deep_supervision and 1 <= depth <= 4):
            raise ValueError(f"depth must be 1 to 4 and the net deeply supervised, got {depth}")
        x0_0 = self.conv0_0(image)            # (B, 32, H, W)
        x1_0 = self.conv1_0(self.pool(x0_0))  # (B, 64, H/2, W/2)
        x0_1 = self.conv0_1(torch.cat([x0_0, self.up(x1_0)], 1))
        if depth == 1:
            return self.final1(x0_1)

        x2_0 = self.conv2_0(self.pool(x1_0))  # (B, 128, H/4, W/4)
        x1_1 = self.conv1_1(torch.cat([x1_0, self.up(x2_0)], 1))
        x0_2 = self.conv0_2(torch.cat([x0_0, x0_1, self.up(x1_1)], 1))
        if depth == 2:
            return self.final2(x0_2)

        x3_0 = self.conv3_0(self.pool(x2_0))  # (B, 256, H/8, W/8)
        x2_1 = self.conv2_1(torch.cat([x2_0, self.up(x3_0)], 1))
        x1_2 = self.conv1_2(torch.cat([x1_0, x1_1, self.up(x2_1)], 1))
        x0_3 = self.conv0_3(torch.cat([x0_0, x0_1, x0_2, self.up(x1_2)], 1))
        if depth == 3:
            return self.final3(x0_3)

        x4_0 = self.conv4_0(self.pool(x3_0))  # (B, 512, H/16, W/16)
        x3_1 = self.conv3_1(torch.cat([x3_0, self.up(x4_0)], 1))
        x2_2 = self.conv2_2(torch.cat([x2_0, x2_1, self.up(x3_1)], 1))
        x1_3 = self.conv1_3(torch.cat([x1_0, x1_1, x1_2, self.up(x2_2)], 1))
        x0_4 = self.conv0_4(torch.cat([x0_0, x0_1, x0_2, x0_3, self.up(x1_3)], 1))

        if depth == 4:
            return self.final4(x0_4)
        if self.deep_supervision:
            return [self.final1(x0_1), self.final2(x0_2), self.final3(x0_3), self.final4(x0_4)]
        return self.final(x0_4)


# --- Images in, masks out ---

def normalize(image, channels=3):
    """RGB uint8 (3, H, W) -> float32 (channels, H, W) by ImageNet's statistics; 1 channel is grey."""
    image = v2.functional.normalize(image.as_subclass(torch.Tensor) / 255, PIXEL_MEAN, PIXEL_STD)
    return image if channels == 3 else image.mean(0, keepdim=True)


def memory_format(device, dtype):
    """Returns the fastest layout of the weights to train with; all maps of the net follow it.

    In float32 on a CPU (AVX2) the backward pass of 3x3 convolutions takes 1.65 times as long with
    channels_last; without gradients, in bf16 and on CUDA channels_last is the faster one.
    """
    plain = device.type == "cpu" and dtype is None
    return torch.contiguous_format if plain else torch.channels_last


def forward(model, image, dtype):
    """Image (B, C, H, W) of any size -> list of float32 logits (B, K, H, W), the prediction last.

    The net needs multiples of 16: right and lower borders are replicated, the output is cropped back.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        outputs = model(padded)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [logits[..., :height, :width].float() for logits in outputs]


# Called with num_classes= and input_channels=; they return logits, or a list with the prediction last
NETS = {"UNet": UNet, "NestedUNet": NestedUNet}
