"""Fetches, reads, checks and loads weights. In nets/, this and embeddings.py need utils.py."""
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import torch

from nets import efficient_sam, sam
from utils import InputError, first_rank_first, load_checkpoint


def fetch_weights(name, url, sha256=None, size=None):
    """Returns the path of an official file in the torch hub cache; fetches and unzips it once.

    It is verified each time. sha256: hex digest or the first part of it; size in bytes; None where
    it is not published.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    with first_rank_first():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
            except OSError as error:  # URLError is one
                reason = getattr(error, "reason", error)
                raise InputError(f"official weights {name}: cannot fetch {url} ({reason}); download "
                                 f"it elsewhere and put it at {path}") from None
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = path.stat().st_size
        if found != (size or found) or not digest.startswith(sha256 or ""):
            raise InputError(f"{path}: not the published {name}: {found} bytes, sha256 {digest[:8]} "
                             f"instead of {size or 'any'}, {sha256 or 'any'}; delete it and run "
                             "again")
        if path.suffix != ".zip":
            return path
        try:
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith(path.stem))
                temporary = path.with_suffix(f".{os.getpid()}.tmp")  # processes do not share one
                temporary.write_bytes(archive.read(member))
        except (zipfile.BadZipFile, StopIteration):
            raise InputError(f"{path}: not the published file; delete it and run again") from None
        return temporary.replace(path.with_suffix(""))


def official_file(path, table):
    """Returns path, or of a name in table (a net's WEIGHTS) the path of that official file."""
    return fetch_weights(**table[path]) if path in table else path


def read_weights(path, wanted, free=()):
    """Reads a state dict: a bare one, {"model": ...}, or that of our checkpoint of the wanted net.

    free: arguments of the net that may differ in our checkpoint; a note is printed if they do.
    """
    checkpoint = load_checkpoint(path)
    ours = isinstance(checkpoint, dict) and "format" in checkpoint
    arch = checkpoint.get("arch", {}) if ours else {}
    for key in free:
        if key in arch and arch[key] != wanted[key]:
            print(f"note: {path}: trained with {key} {arch[key]}, now {wanted[key]}")
            wanted = {**wanted, key: arch[key]}
    check_net(checkpoint, path, wanted)
    return state_of(checkpoint)


def state_of(checkpoint):
    """Returns the state dict inside a loaded checkpoint; {} if there is none.

    Strips the prefixes that wrappers (DistributedDataParallel, torch.compile, Lightning) put before
    every key, twice, as one wrapper may stand in another.
    """
    state = checkpoint if isinstance(checkpoint, dict) else {}
    for key in ("model", "state_dict", "model_state_dict", "net"):
        state = state[key] if isinstance(state.get(key), dict) else state
    for prefix in ("module.", "_orig_mod.", "model.", "net.") * 2:
        if state and all(str(key).startswith(prefix) for key in state):
            state = {str(key).removeprefix(prefix): value for key, value in state.items()}
    return {str(key): value for key, value in state.items()}


def check_net(checkpoint, path, wanted):
    """Raises InputError if our checkpoint is of another net or arguments; bare weights pass."""
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        return
    found = {"net": checkpoint.get("net"), **checkpoint.get("arch", {})}
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing:
        holds = ", ".join(f"{key} {found[key]}" for key in differing if key in found)
        asked = ", ".join(f"{key} {wanted[key]}" for key in differing if key in wanted)
        raise InputError(f"{path}: holds {holds}; asked for {asked} (give the options it was "
                         "trained with)")


def load_weights(model, state, path):
    """Strictly loads the tensors that were read from path; InputError if they are another net's."""
    known, differing = model.state_dict(), []
    for key, wanted in known.items():
        found = state.get(key)
        if key not in state:
            differing.append(f"{key} missing")
        elif not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
            shape = tuple(getattr(found, "shape", ()))
            differing.append(f"{key} {shape} instead of {tuple(wanted.shape)}")
    unknown = [f"{key} unknown" for key in state if key not in known]
    if differing or unknown:
        keys = ""
        if state and not state.keys() & known.keys():
            keys = f"; it begins with {next(iter(state))}, the net with {next(iter(known))}"
        raise InputError(f"{path}: weights of another net than {type(model).__name__}: "
                         f"{len(differing)} of {len(known)} tensors missing or of another shape, "
                         f"{len(unknown)} unknown ({', '.join([*differing, *unknown][:3])} ...){keys}")
    for key, wanted in known.items():
        same_kind = state[key].is_floating_point() == wanted.is_floating_point()
        if not (same_kind and state[key].isfinite().all()):
            raise InputError(f"{path}: {key} holds {state[key].dtype} or values that are not finite; "
                             "restore it from a copy, or train again with a lower --lr")
    model.load_state_dict(state)


def reset_mismatched_heads(model, state, heads):
    """Puts the model's own tensors where the state dict has another number of classes.

    heads: names of the last layers, whose tensors' first dimension is the classes. Returns (state,
    names of the reset tensors).
    """
    reset = {}
    for key, wanted in model.state_dict().items():
        found = state.get(key)
        is_head = key.rpartition(".")[0] in heads and isinstance(found, torch.Tensor)
        if is_head and len(found) != len(wanted) and found.shape[1:] == wanted.shape[1:]:
            reset[key] = wanted
    return {**state, **reset}, [*reset]


def complete_encoder(model, state, path, decoder=None):
    """Adds prompt encoder and decoder to the state dict of an EfficientSam's encoder alone.

    decoder: path or official name of SAM weights, whose tensors are taken where name and shape are
    model's; the others are those of model. A line says so. A whole net's state dict is returned as it
    is; InputError if there is a decoder too.
    """
    if not state or not all(key.startswith("image_encoder.") for key in state):
        if decoder:
            raise InputError(f"--decoder-weights {decoder}: {path} is no encoder alone; leave it out")
        return state
    own = {key: value for key, value in model.state_dict().items()
           if not key.startswith("image_encoder.")}
    taken = {}
    if decoder:
        found = state_of(load_checkpoint(official_file(decoder, sam.WEIGHTS)))
        found = efficient_sam.rename_sam(found)
        taken = {key: found[key] for key, value in own.items()
                 if getattr(found.get(key), "shape", None) == value.shape}
        if not taken:
            raise InputError(f"--decoder-weights {decoder}: no tensor of it fits; give SAM weights "
                             f"({', '.join(sam.WEIGHTS)} or a path), or leave it out")
    print(f"{path}: the encoder; of {len(own)} tensors of prompt encoder and decoder {len(taken)} are "
          f"from {decoder or 'SAM'}, {len(own) - len(taken)} start fresh")
    return {**own, **taken, **state}


def load_sam(model, path, base=None, official=False):
    """Loads a file into a Sam: the whole net, or a decoder alone after its base weights.

    base: path or official name of the base weights (default: those that the decoder's checkpoint
    names). official: path must be of an official file; InputError if it is a checkpoint of ours.
    Returns the path or name of the whole net's weights. Position codes of another image size are
    interpolated.
    """
    checkpoint = load_checkpoint(official_file(path, sam.WEIGHTS))
    ours = checkpoint if isinstance(checkpoint, dict) and "format" in checkpoint else {}
    trained_with, arch = ours.get("args", {}), ours.get("arch", {})
    if ours and official:
        raise InputError(f"{path}: names its own net; leave --model out")
    check_net(checkpoint, path, {"net": "sam", **arch})
    state = state_of(checkpoint)
    if not state or not all(key.startswith("mask_decoder.") for key in state):  # the whole net
        load_weights(model, sam.resize_positions(state, model), path)
        return path if path in sam.WEIGHTS else str(Path(path).resolve())
    if not base:
        base = trained_with.get("base")
        if not base:
            raise InputError(f"{path}: holds a decoder alone; give best.pth, which names its "
                             "base, or predict.py the --base weights")
        if base not in ("none", *sam.WEIGHTS) and not Path(base).exists():
            raise InputError(f"{path}: its decoder was trained on {base}, which is not "
                             "there; put it back, or give predict.py the --base weights")
    if base != "none":
        base = load_sam(model, base)
    # The hash is of the base at the image size of training; for another size that net is made too
    base_hash, size = trained_with.get("base_hash"), arch.get("image_size", model.image_size)
    original = model
    if size != model.image_size and base != "none":
        original = sam.NETS[arch["model"]](size)
        load_sam(original, base)
    if base_hash and size == original.image_size and base_hash != sam.hash_frozen(original):
        raise InputError(f"{path}: trained on other base weights than {base}; give predict.py "
                         "the right --base")
    frozen = {key: value for key, value in model.state_dict().items()
              if not key.startswith("mask_decoder.")}
    load_weights(model, {**frozen, **state}, path)
    return base
