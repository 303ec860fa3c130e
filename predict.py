"""Masks and overlays of pictures, from a checkpoint of one of the training scripts or an official one.

    python predict.py --weights runs/train_unet/best.pth pictures/ --output-dir out
    python predict.py --weights runs/train_deeplabv3/best.pth pictures/ --flip --scales 0.75,1,1.25
    python predict.py --weights coco --model deeplabv3_resnet50 picture.jpg

Inputs: pictures, folders, globs. Writes for each picture, at its own size: NAME_mask.png (palette PNG of class ids, 0
background; the classes of train_unet.py count from 1), NAME_overlay.png and, where classes may overlap,
NAME_mask_CLASS.png (0 and 255); and areas.csv, the pixels of each class in each picture.
"""
import argparse
import csv
import glob
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import utils
from nets.deeplabv3 import deeplabv3
from nets.unet import NETS as UNETS
from nets.unet import STRIDE

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
COCO_WEIGHTS = {  # of torchvision, 21 outputs, with the auxiliary head; a name ends in the start of its sha256
    "resnet50": "https://download.pytorch.org/models/deeplabv3_resnet50_coco-cd0a2569.pth",
    "resnet101": "https://download.pytorch.org/models/deeplabv3_resnet101_coco-586e9e4e.pth",
    "mobilenet_v3_large": "https://download.pytorch.org/models/deeplabv3_mobilenet_v3_large-fc3c493d.pth",
}
OFFICIAL = [f"deeplabv3_{backbone}" for backbone in COCO_WEIGHTS]


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], "%(prog)s --weights CHECKPOINT INPUT [INPUT ...] [options]")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="picture, folder of pictures, or glob")
    add("--weights", required=True, help="best.pth or last.pth of a training script; with --model an official file, or "
        "coco (DeepLab's, fetched once)")
    add("--model", choices=OFFICIAL, help="the net that an official file is of; our checkpoints know theirs")
    add("--output-dir", default="out", help="folder for masks and overlays (%(default)s)")
    add("--overwrite", nargs="?", const=True, default=False, type=utils.switch, help="replace files in --output-dir")
    add("--flip", nargs="?", const=True, default=False, type=utils.switch, help="average with the mirrored picture")
    add("--scales", type=scale_list, default=(1.0,), help="average over these sizes, times that of training (1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    return parser


def scale_list(text):
    """"0.75,1,1.25" -> floats."""
    scales = tuple(float(scale) for scale in text.split(","))
    if not all(0.1 <= scale <= 10 for scale in scales):
        raise argparse.ArgumentTypeError(f"{text} must be numbers from 0.1 to 10 with commas between")
    return scales


# --- Data ---

def find_inputs(inputs):
    """[(output name, path)] of all pictures named; two files of one stem keep their extension in the output name."""
    paths = []
    for text in inputs:
        if Path(text).is_dir():
            found = sorted(path for path in Path(text).iterdir() if path.suffix.lower() in utils.PICTURES
                           and not path.is_dir() and not path.name.startswith("."))
        else:
            found = [Path(text)] if Path(text).exists() else [Path(path) for path in sorted(glob.glob(text))]
        if not found:
            raise utils.InputError(f"{text}: no such picture, folder or glob")
        paths += [path for path in found if path not in paths]
    stems, names = Counter(path.stem for path in paths), Counter(path.name for path in paths)
    return [(path.stem if stems[path.stem] == 1 else path.name.replace(".", "_") if names[path.name] == 1 else
             "_".join([*path.absolute().parts[1:-1], path.name.replace(".", "_")]), path) for path in paths]


def normalize(image, channels=3):
    """RGB uint8 (3, H, W) -> float32 (channels, H, W) by ImageNet's statistics."""
    image = image.as_subclass(torch.Tensor) / 255
    image = v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return image if channels == 3 else image.mean(0, keepdim=True)


# --- Model ---

def load_model(args, device):
    """The net that --weights holds, ready to predict, and its checkpoint."""
    path = args.weights
    if path == "coco" and not args.model:
        raise utils.InputError(f"--weights coco: of which net? give --model ({', '.join(OFFICIAL)})")
    if args.model:
        checkpoint = official_checkpoint(path, args.model)
    else:
        checkpoint = utils.load_checkpoint(path)
        if not isinstance(checkpoint, dict) or not {"format", "net"} <= checkpoint.keys():
            raise utils.InputError(f"{path}: does not say what net it is of; give a training script's best.pth or "
                                   f"last.pth, or --model ({', '.join(OFFICIAL)})")
    if str(checkpoint.get("net")) not in NETS:
        raise utils.InputError(f"{path}: holds the net {checkpoint.get('net')}; this script knows {', '.join(NETS)}")
    try:
        checkpoint["args"]["image_size" if checkpoint["net"] == "unet" else "base_size"], checkpoint["classes"]
        model = NETS[checkpoint["net"]][0](**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise utils.InputError(f"{path}: not a whole checkpoint ({' '.join(str(error).split())[:200]})") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def official_checkpoint(path, name):
    """A file of torchvision, or any bare weights of this net, as a checkpoint of ours."""
    backbone = name.removeprefix("deeplabv3_")
    if path == "coco":
        url = COCO_WEIGHTS[backbone]
        path = utils.fetch_weights("coco", url, sha256=url.removesuffix(".pth").rsplit("-", 1)[1])
    checkpoint = utils.load_checkpoint(path)
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        raise utils.InputError(f"{path}: knows what net it is of; leave --model out")
    state = utils.read_weights(path, {})
    try:
        num_classes = len(state["classifier.4.bias"])
    except (KeyError, TypeError):
        raise utils.InputError(f"{path}: not weights of {name}: has no classifier.4.bias") from None
    return {"net": "deeplabv3", "model": state, "args": {"base_size": 520},
            "classes": VOC_CLASSES if num_classes == 21 else [str(k) for k in range(num_classes)],
            "arch": {"backbone": backbone, "num_classes": num_classes, "aux": "aux_classifier.4.bias" in state}}


def build_unet(model, **arch):
    return UNETS[model](**arch)


def forward(model, image, dtype):
    """Image (B, C, H, W) of any size -> list of float32 logits (B, K, H, W), the prediction last.

    The net wants multiples of 16: the border is repeated to the right and below, and what it yields is cut off again.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        outputs = model(padded.contiguous(memory_format=torch.channels_last))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [logits[..., :height, :width].float() for logits in outputs]


# --- Prediction ---

def predict_unet(model, checkpoint, image, scale, device, dtype):
    """RGB (H, W, 3) uint8 -> logits (K, H, W) as train_unet.py validates: resized to --image-size, and back."""
    width, height = [max(32, round(scale * side)) for side in checkpoint["args"]["image_size"]]
    resized = v2.functional.resize(tv_tensors.Image(image.transpose(2, 0, 1)), [height, width], antialias=True)
    batch = normalize(resized, checkpoint["arch"]["input_channels"])[None].to(device)
    logits = forward(model, batch, dtype)[-1]
    return F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0]


def predict_deeplabv3(model, checkpoint, image, scale, device, dtype):
    """RGB (H, W, 3) uint8 -> logits (K, H, W) as train_deeplabv3.py validates: shorter side --base-size, and back."""
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())
    batch = normalize(resize(image, max(32, round(scale * checkpoint["args"]["base_size"]))))[None].to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(batch.contiguous(memory_format=torch.channels_last))["out"]
    return F.interpolate(logits.float(), image.shape[-2:], mode="bilinear", align_corners=False)[0]


def resize(image, side):
    """Image (3, H, W) uint8 with its shorter side made `side` pixels."""
    return v2.functional.resize(image, scaled_size(image, side), antialias=True)


def scaled_size(image, side):
    """[height, width] of image (..., H, W) once its shorter side is `side`."""
    height, width = image.shape[-2:]
    return [max(side, round(length * side / min(height, width))) for length in (height, width)]


@torch.no_grad()
def predict_averaged(model, checkpoint, image, device, dtype, args):
    """Logits (K, H, W) of the probabilities' mean over --scales and --flip; of one view just its logits."""
    predict, prob = NETS[checkpoint["net"]][1], 0
    if args.scales == (1.0,) and not args.flip:
        return predict(model, checkpoint, image, 1.0, device, dtype)
    for scale in args.scales:
        for flip in [False, True][:1 + args.flip]:
            view = image[:, ::-1].copy() if flip else image
            logits = predict(model, checkpoint, view, scale, device, dtype)
            view = logits.sigmoid() if checkpoint["net"] == "unet" else logits.softmax(0)
            prob = prob + (view.flip(-1) if flip else view)
    prob = prob / (len(args.scales) * (1 + args.flip))
    return torch.logit(prob) if checkpoint["net"] == "unet" else prob.log()


def write_unet(logits, image, checkpoint, prefix):
    """Mask of the likeliest class where any is likelier than not; with several classes a mask of each too; overlay."""
    logits = logits.cpu().numpy()
    mask = np.where(logits.max(0) > 0, logits.argmax(0) + 1, 0)
    utils.save_mask(f"{prefix}_mask.png", mask)
    for name, one in zip(checkpoint["classes"], logits if len(logits) > 1 else []):
        utils.save_picture(f"{prefix}_mask_{name}.png", (one > 0) * np.uint8(255))
    utils.save_picture(f"{prefix}_overlay.png", utils.overlay(image, mask))
    return (logits > 0).sum((1, 2))


def write_deeplabv3(logits, image, checkpoint, prefix):
    """Mask of the likeliest class; overlay. Returns the pixels of each class."""
    mask = logits.argmax(0).cpu().numpy()
    utils.save_mask(f"{prefix}_mask.png", mask)
    utils.save_picture(f"{prefix}_overlay.png", utils.overlay(image, mask))
    return np.bincount(mask.ravel(), minlength=len(logits))


NETS = {"unet": (build_unet, predict_unet, write_unet),
        "deeplabv3": (deeplabv3, predict_deeplabv3, write_deeplabv3)}


# --- Main ---

def main(args):
    """Predicts every input; returns how many masks were written. A bad file is reported, the others are still done."""
    device = utils.pick_device(args.device)
    dtype, _ = utils.pick_precision(args.amp, device)
    model, checkpoint = load_model(args, device)
    inputs = find_inputs(args.inputs)
    output_dir = Path(args.output_dir)
    names = [*(f"{name}_mask.png" for name, _ in inputs), "areas.csv"]
    taken = [name for name in names if (output_dir / name).exists()]
    if taken and not args.overwrite:
        raise utils.InputError(f"{output_dir}/{taken[0]}: is there already; give --overwrite or --output-dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    areas, bad = [], []
    for name, path in tqdm(inputs, leave=False, disable=None):
        utils.check_stop()
        try:
            image = utils.read_image(path)
        except utils.InputError as error:
            bad.append(str(error))
            continue
        logits = predict_averaged(model, checkpoint, image, device, dtype, args)
        pixels = NETS[checkpoint["net"]][2](logits, image, checkpoint, output_dir / name)
        areas += [[name, *pair, pair[1] / image[..., 0].size] for pair in zip(checkpoint["classes"], pixels.tolist())]
    with open(output_dir / "areas.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["picture", "class", "pixels", "share"], *areas])
    for _, name, pixels, share in areas if len(inputs) == 1 else []:
        print(f"  {name:>15}  {pixels:12,} pixels  {share:7.2%}")
    print(f"{len(inputs) - len(bad)} of {len(inputs)} pictures predicted: {output_dir}/*_mask.png, *_overlay.png, "
          "areas.csv")
    if bad:
        raise utils.InputError("; ".join(bad))
    return {"pictures": len(inputs)}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
