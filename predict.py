"""Masks and overlays of pictures, from a checkpoint that one of the training scripts has written.

    python predict.py --weights runs/train_unet/best.pth pictures/ --output-dir out

Inputs: pictures, folders, globs. Writes for each picture, at its own size: NAME_mask.png (palette PNG: 0 background,
class k of the checkpoint as k + 1), NAME_overlay.png and, where classes may overlap, NAME_mask_CLASS.png (0 and 255).
"""
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
from nets.unet import NETS as UNETS
from nets.unet import STRIDE


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0], "%(prog)s --weights CHECKPOINT INPUT [INPUT ...] [options]")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="picture, folder of pictures, or glob")
    add("--weights", required=True, help="best.pth or last.pth of a training script")
    add("--output-dir", default="out", help="folder for masks and overlays (%(default)s)")
    add("--overwrite", nargs="?", const=True, default=False, type=utils.switch, help="replace files in --output-dir")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    add("--amp", nargs="?", const="auto", default="auto", type=utils.amp_mode, metavar="MODE",
        help="precision: auto (bf16 on CUDA that has it, else off), bf16, fp16 or off (%(default)s)")
    return parser


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


def normalize(image, channels):
    """RGB uint8 (3, H, W) -> float32 (channels, H, W) by ImageNet's statistics. Article: /255 once more; BGR."""
    image = image.as_subclass(torch.Tensor) / 255
    image = v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return image if channels == 3 else image.mean(0, keepdim=True)


# --- Model ---

def load_model(path, device):
    """The net in a checkpoint, ready to predict, and the checkpoint."""
    checkpoint = utils.load_checkpoint(path)
    if not isinstance(checkpoint, dict) or not {"format", "net"} <= checkpoint.keys():
        raise utils.InputError(f"{path}: does not say what net it is of; give a training script's best.pth or last.pth")
    if str(checkpoint.get("net")) not in NETS:
        raise utils.InputError(f"{path}: holds the net {checkpoint.get('net')}; this script knows {', '.join(NETS)}")
    try:
        checkpoint["args"]["image_size"], checkpoint["classes"]
        model = NETS[checkpoint["net"]][0](**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise utils.InputError(f"{path}: not a whole checkpoint ({str(error).splitlines()[0]})") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


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

@torch.no_grad()
def predict_unet(model, checkpoint, image, device, dtype):
    """RGB (H, W, 3) uint8 -> logits (K, H, W) as train_unet.py validates: resized to --image-size, and back."""
    width, height = checkpoint["args"]["image_size"]
    resized = v2.functional.resize(tv_tensors.Image(image.transpose(2, 0, 1)), [height, width], antialias=True)
    batch = normalize(resized, checkpoint["arch"]["input_channels"])[None].to(device)
    logits = forward(model, batch, dtype)[-1]
    return F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0]


def write_unet(logits, image, checkpoint, prefix):
    """Mask of the likeliest class where any is likelier than not; with several classes a mask of each too; overlay."""
    logits = logits.cpu().numpy()
    mask = np.where(logits.max(0) > 0, logits.argmax(0) + 1, 0)
    utils.save_mask(f"{prefix}_mask.png", mask)
    for name, one in zip(checkpoint["classes"], logits if len(logits) > 1 else []):
        utils.save_picture(f"{prefix}_mask_{name}.png", (one > 0) * np.uint8(255))
    utils.save_picture(f"{prefix}_overlay.png", utils.overlay(image, mask))


NETS = {"unet": (build_unet, predict_unet, write_unet)}


# --- Main ---

def main(args):
    """Predicts every input; returns how many masks were written. A bad file is reported, the others are still done."""
    device = utils.pick_device(args.device)
    dtype, _ = utils.pick_precision(args.amp, device)
    model, checkpoint = load_model(args.weights, device)
    _, predict, write = NETS[checkpoint["net"]]
    inputs = find_inputs(args.inputs)
    output_dir = Path(args.output_dir)
    taken = [name for name, _ in inputs if (output_dir / f"{name}_mask.png").exists()]
    if taken and not args.overwrite:
        raise utils.InputError(f"{output_dir}/{taken[0]}_mask.png: is there already; give --overwrite or --output-dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    bad = []
    for name, path in tqdm(inputs, leave=False, disable=None):
        utils.check_stop()
        try:
            image = utils.read_image(path)
        except utils.InputError as error:
            bad.append(str(error))
            continue
        write(predict(model, checkpoint, image, device, dtype), image, checkpoint, output_dir / name)
    print(f"{len(inputs) - len(bad)} of {len(inputs)} pictures predicted: {output_dir}/*_mask.png, *_overlay.png")
    if bad:
        raise utils.InputError("; ".join(bad))
    return {"pictures": len(inputs)}


if __name__ == "__main__":
    utils.run(main, get_args_parser())
