"""Masks and overlays of pictures, from a checkpoint of one of the training scripts or an official one.

    python predict.py --weights runs/train_unet/best.pth pictures/ --output-dir out
    python predict.py --weights runs/train_deeplabv3/best.pth pictures/ --flip --scales 0.75,1,1.25
    python predict.py --weights coco --model deeplabv3_resnet50 picture.jpg
    python predict.py --weights runs/train_efficientsam/best.pth picture.jpg --box 75,275,340,450 --box 20,30,90,120

Inputs: pictures, folders, globs. Writes for each picture, at its own size: NAME_mask.png (palette PNG of class ids, 0
background; the classes of train_unet.py count from 1), NAME_overlay.png and, where classes may overlap,
NAME_mask_CLASS.png (0 and 255); and areas.csv, the pixels of each class in each picture. EfficientSAM wants to be told
what to cut out, and numbers it from 1: each --box is an object; the --points together are one, or say more about a
single box. --prompts gives a folder's: {"NAME": {"boxes": [[x0, y0, x1, y1]], "points": [[x, y, label]]}}; in pixels.
"""
import argparse
import csv
import glob
import json
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
from nets.efficient_sam import NETS as SAM_NETS
from nets.unet import NETS as UNETS
from nets.unet import STRIDE

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
COCO_WEIGHTS = {  # of torchvision, 21 outputs, with the auxiliary head; a name ends in the start of its sha256
    "resnet50": "https://download.pytorch.org/models/deeplabv3_resnet50_coco-cd0a2569.pth",
    "resnet101": "https://download.pytorch.org/models/deeplabv3_resnet101_coco-586e9e4e.pth",
    "mobilenet_v3_large": "https://download.pytorch.org/models/deeplabv3_mobilenet_v3_large-fc3c493d.pth",
}
SAM_WEIGHTS = {  # of the authors, who publish no hash: that every key and shape fits is the check
    "efficient_sam_vits": "https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vits.pt.zip",
    "efficient_sam_vitt": "https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vitt.pt",
}
OFFICIAL = [*[f"deeplabv3_{backbone}" for backbone in COCO_WEIGHTS], *SAM_WEIGHTS]


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], "%(prog)s --weights CHECKPOINT INPUT [INPUT ...] [options]")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="picture, folder of pictures, or glob")
    add("--weights", required=True, help="best.pth or last.pth of a training script; with --model an official file, or "
        f"its name: coco (DeepLab's), {', '.join(SAM_WEIGHTS)}, fetched once")
    add("--model", choices=OFFICIAL, help="the net that an official file is of; our checkpoints know theirs")
    add("--output-dir", default="out", help="folder for masks and overlays (%(default)s)")
    add("--overwrite", nargs="?", const=True, default=False, type=utils.switch, help="replace files in --output-dir")
    add("--flip", nargs="?", const=True, default=False, type=utils.switch, help="average with the mirrored picture")
    add("--scales", type=scale_list, default=(1.0,), help="average over these sizes, times that of training (1)")
    add("--point", type=numbers(2, 3), action="append", default=[], metavar="X,Y[,LABEL]",
        help="a click, label 1 object (or left out) or 0 background (which EfficientSAM was not trained on)")
    add("--box", type=numbers(4, 4), action="append", default=[], metavar="X0,Y0,X1,Y1", help="may be repeated")
    add("--prompts", help="json file of points and boxes for each picture")
    add("--all-masks", nargs="?", const=True, default=False, type=utils.switch,
        help="also write the three masks of each object, NAME_OBJECT_1.png to _3.png, scores in areas.csv")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    return parser


def numbers(least, most):
    """Type of an option of so many numbers with commas between."""
    def parse(text):
        values = [float(value) for value in text.split(",")]
        if not least <= len(values) <= most or not np.isfinite(values).all():
            raise argparse.ArgumentTypeError(f"{text} must be {least} to {most} numbers with commas between")
        return values
    return parse


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
    args.model = args.model or (path if path in SAM_WEIGHTS else None)
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
        needed = {"unet": "image_size", "deeplabv3": "base_size", "efficient_sam": "preprocess"}[checkpoint["net"]]
        checkpoint["args"][needed], checkpoint["classes"]
        model = NETS[checkpoint["net"]][0](**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise utils.InputError(f"{path}: not a whole checkpoint ({' '.join(str(error).split())[:200]})") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def fetch_sam(name):
    """Path of the authors' file; that of the larger net comes in a zip, and is unpacked beside it."""
    path = utils.fetch_weights(name, SAM_WEIGHTS[name])
    if path.suffix != ".zip":
        return path
    return utils.unzip(path, f"{name}.pt")


def refuse_ours(path):
    checkpoint = utils.load_checkpoint(path)
    if isinstance(checkpoint, dict) and "format" in checkpoint:
        raise utils.InputError(f"{path}: knows what net it is of; leave --model out")


def official_checkpoint(path, name):
    """An official file, or any bare weights of this net, as a checkpoint of ours."""
    if name in SAM_WEIGHTS:
        path = fetch_sam(path) if path in SAM_WEIGHTS else path
        refuse_ours(path)
        return {"net": "efficient_sam", "model": utils.read_weights(path, {}), "classes": [],
                "arch": {"model": name, "image_size": 1024}, "args": {"preprocess": "official"}}
    backbone = name.removeprefix("deeplabv3_")
    if path == "coco":
        url = COCO_WEIGHTS[backbone]
        path = utils.fetch_weights("coco", url, sha256=url.removesuffix(".pth").rsplit("-", 1)[1])
    refuse_ours(path)
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


def build_efficient_sam(model, image_size):
    return SAM_NETS[model](image_size)


def read_prompts(name, shape, given, args):
    """Points (Q, N, 2) and labels (Q, N) of a picture, by --prompts under its name, else by --box and --point.

    Each box is an object; the points are one more, or, beside a single box, belong to it. InputError if there are none,
    or if they lie outside the picture of this shape (H, W).
    """
    own = given.get(name, {}) if args.prompts else {"boxes": args.box, "points": args.point}
    try:
        boxes = [[*map(float, box)] for box in own.get("boxes", [])]
        points = [[*map(float, point), 1.0][:3] for point in own.get("points", [])]
        queries = [([[x0, y0], [x1, y1]], [2, 3]) for x0, y0, x1, y1 in boxes]
        clicks = [[x, y] for x, y, _ in points], [int(label) for *_, label in points]
        if not {label for *_, label in points} <= {0.0, 1.0}:
            raise ValueError("a point's label is 1 or 0")
    except (TypeError, ValueError, AttributeError) as error:
        form = '{"boxes": [[x0, y0, x1, y1]], "points": [[x, y, label]]}'
        raise utils.InputError(f"{args.prompts}: {name}: not as {form} ({error})") from None
    if len(queries) == 1 and points:
        queries = [(queries[0][0] + clicks[0], queries[0][1] + clicks[1])]
    elif points:
        queries.append(clicks)
    if len(queries) > 254:
        raise utils.InputError(f"{name}: {len(queries)} objects; a palette mask tells 254 apart, give fewer at a time")
    if not queries:
        raise utils.InputError(f"{args.prompts or '--box'}: nothing to cut out of {name}; give --box, --point or "
                               "--prompts")
    corners = np.array([point for query, _ in queries for point in query])
    if max(len(labels) for _, labels in queries) > 6:
        raise utils.InputError(f"{name}: more than six points for an object, corners of its box included; the net "
                               "takes no more")
    empty = any(x1 <= x0 or y1 <= y0 for x0, y0, x1, y1 in boxes)
    if empty or not ((corners >= 0) & (corners <= [shape[1], shape[0]])).all():
        raise utils.InputError(f"{name}: a box or point lies outside its {shape[1]}x{shape[0]} pixels, or a box is "
                               "empty (x0,y0 is its upper left corner, x1,y1 its lower right one)")
    most = max(len(labels) for _, labels in queries)
    points = torch.full((len(queries), most, 2), -1.0)
    labels = torch.full((len(queries), most), -1)
    for i, (query, kinds) in enumerate(queries):
        points[i, :len(kinds)], labels[i, :len(kinds)] = torch.tensor(query), torch.tensor(kinds)
    return points, labels


def predict_efficient_sam(model, checkpoint, image, points, labels, device, dtype):
    """RGB (H, W, 3) uint8, prompts -> yields logits (q, 3, H, W), scores (q, 3) as train_efficientsam.py validates."""
    args = argparse.Namespace(**{**checkpoint["args"], "image_size": checkpoint["arch"]["image_size"]})
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())
    height, width = placed_size(image.shape[1:], args)
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]])
    points = torch.where(points < 0, -1.0, points * scale)
    return predict_masks(model, preprocess(image, args)[None].to(device), points[None].to(device),
                         labels[None].to(device), image.shape[-2:], args, dtype)


def placed_size(size, args):
    """[height, width] that a picture of this size (H, W) fills of the net's square."""
    if args.preprocess == "official":
        return [args.image_size, args.image_size]
    return [max(1, round(side * args.image_size / max(size))) for side in size]


def preprocess(image, args):
    """Picture (3, H, W) uint8 -> (3, S, S) float32 in 0..1, by --preprocess; the net subtracts ImageNet's mean."""
    size = placed_size(image.shape[1:], args)
    image = F.interpolate(image[None] / 255, size, mode="bilinear", align_corners=False)[0]
    if args.preprocess == "official":
        return image
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-8)
    return F.pad(image, (0, args.image_size - size[1], 0, args.image_size - size[0]))


def predict_masks(model, image, points, labels, size, args, dtype):
    """Image (1, 3, S, S), points (1, Q, N, 2), labels -> yields first, logits (q, 3, *size), iou (q, 3).

    At the picture's own size, and for eight queries at a time from number `first` on, which fit in memory.
    """
    side = args.image_size
    height, width = placed_size(size, args)
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        embedding = model.get_image_embeddings(image)
    for i in range(0, points.shape[1], 8):
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            logits, iou = model.predict_masks(embedding, points[:, i:i + 8], labels[:, i:i + 8], True, side, side)
        logits = logits[0].float()
        if args.preprocess == "article":  # what was padded is cut off, at the net's own size
            logits = F.interpolate(logits, (side, side), mode="bicubic", align_corners=False)[..., :height, :width]
        yield i, F.interpolate(logits, size, mode="bicubic", align_corners=False), iou[0].float()


def write_efficient_sam(parts, image, prefix, all_masks):
    """Mask of object ids 1, 2 ... (where they overlap the later one), overlay; returns [object, pixels, score]."""
    mask, rows = np.zeros(image.shape[:2], int), []
    found = ((three.cpu().numpy(), own.cpu().numpy()) for _, logits, scores in parts
             for three, own in zip(logits > 0, scores))
    for k, (three, own) in enumerate(found, 1):
        best = own.argmax()
        mask[three[best]] = k
        rows.append([f"object {k}", int(three[best].sum()), f"{own[best]:.4f}"])
        for i in range(3) if all_masks else []:
            utils.save_picture(f"{prefix}_{k}_{i + 1}.png", three[i] * np.uint8(255))
            rows.append([f"object {k} mask {i + 1}", int(three[i].sum()), f"{own[i]:.4f}"])
    utils.save_mask(f"{prefix}_mask.png", mask)
    utils.save_picture(f"{prefix}_overlay.png", utils.overlay(image, np.where(mask > 0, (mask - 1) % 20 + 1, 0)))
    return rows


NETS = {"unet": (build_unet, predict_unet, write_unet),
        "deeplabv3": (deeplabv3, predict_deeplabv3, write_deeplabv3),
        "efficient_sam": (build_efficient_sam, None, None)}


# --- Main ---

@torch.no_grad()
def main(args):
    """Predicts every input; returns how many masks were written. A bad file is reported, the others are still done."""
    device = utils.pick_device(args.device)
    dtype, _ = utils.pick_precision(args.amp, device)
    model, checkpoint = load_model(args, device)
    told = args.box or args.point or args.prompts or args.all_masks
    if told if checkpoint["net"] != "efficient_sam" else (args.flip or args.scales != (1.0,)):
        raise utils.InputError("--flip and --scales are for U-Net and DeepLab; --box, --point, --prompts, --all-masks "
                               f"for EfficientSAM; {args.weights} is {checkpoint['net']}")
    if args.prompts and (args.box or args.point):
        raise utils.InputError("--prompts: takes the place of --box and --point; give one or the other")
    inputs = find_inputs(args.inputs)
    output_dir = Path(args.output_dir)
    names = [*(f"{name}_mask.png" for name, _ in inputs), "areas.csv"]
    taken = [name for name in names if (output_dir / name).exists()]
    if taken and not args.overwrite:
        raise utils.InputError(f"{output_dir}/{taken[0]}: is there already; give --overwrite or --output-dir")
    prompts = {}
    if args.prompts:
        try:
            prompts = dict(json.loads(Path(args.prompts).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise utils.InputError(f"{args.prompts}: no json of prompts that can be read ({error})") from None
    output_dir.mkdir(parents=True, exist_ok=True)
    areas, bad = [], []
    for name, path in tqdm(inputs, leave=False, disable=None):
        utils.check_stop()
        try:
            image = utils.read_image(path)
        except utils.InputError as error:
            bad.append(str(error))
            continue
        if checkpoint["net"] == "efficient_sam":
            try:
                points, labels = read_prompts(name, image.shape, prompts, args)
            except utils.InputError as error:
                bad.append(str(error))
                continue
            parts = predict_efficient_sam(model, checkpoint, image, points, labels, device, dtype)
            rows = write_efficient_sam(parts, image, output_dir / name, args.all_masks)
        else:
            logits = predict_averaged(model, checkpoint, image, device, dtype, args)
            pixels = NETS[checkpoint["net"]][2](logits, image, checkpoint, output_dir / name)
            rows = [[*pair, ""] for pair in zip(checkpoint["classes"], pixels.tolist())]
        areas += [[name, of, pixels, pixels / image[..., 0].size, score] for of, pixels, score in rows]
    with open(output_dir / "areas.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["picture", "class", "pixels", "share", "score"], *areas])
    for _, name, pixels, share, score in areas if len(inputs) == 1 else []:
        print(f"  {name:>15}  {pixels:12,} pixels  {share:7.2%}" + f"  score {score}" * bool(score))
    print(f"{len(inputs) - len(bad)} of {len(inputs)} pictures predicted: {output_dir}/*_mask.png, *_overlay.png, "
          "areas.csv")
    if bad:
        raise utils.InputError("; ".join(bad))
    return {"pictures": len(inputs)}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
