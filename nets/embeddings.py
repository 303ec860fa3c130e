"""Keeps embeddings of a frozen image encoder on disk. In nets/, this and weights.py need utils.py."""
import functools
import hashlib
import shutil
from pathlib import Path

import torch

from utils import InputError, ignore_group_signals, load_checkpoint, merge_over_ranks, ranks, \
    save_checkpoint, sum_over_ranks, until_stopped, wait_for_ranks


@torch.no_grad()
def keep_embeddings(datasets, key, read_input, encode, numbers, run):
    """Makes the embeddings of the data sets' images that are not yet on disk; each process its part.

    A file is named by key(hash of the image's bytes, mirrored), a text of all that the embedding
    depends on: none is ever taken for another. Each data set gets embeddings {(index, mirrored):
    file}, mirrored ones too if it has `augment` and --flip is on. read_input(item, mirrored, args) ->
    what the encoder sees; encode(batch) -> embeddings (B, D, E, E) of `numbers` numbers each.
    Damaged ones are made again. Stopped and started again, it goes on.
    """
    args = run.args
    folder = Path(args.cache_dir or Path(args.output_dir).parent / "embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    rank, world_size = ranks()
    images = {}  # path of each embedding: its image and whether that is mirrored
    for dataset in datasets:
        hashes = {}
        for index in until_stopped(range(rank, len(dataset), world_size), "embeddings", run.device):
            hashes[index] = hashlib.sha256(dataset.items[index][1].read_bytes()).hexdigest()
        for index, image in merge_over_ranks(hashes).items():
            for mirrored in (False, True) if dataset.augment and args.flip else (False,):
                name = hashlib.sha256(key(image, mirrored).encode()).hexdigest()[:32]
                path = folder / f"{name}.pth"
                dataset.embeddings[index, mirrored] = path
                images[path] = dataset.items[index], mirrored
    missing = []
    for path in until_stopped([*images][rank::world_size], "embeddings", run.device):
        if not is_whole(path):
            missing.append(path)
    count = int(sum_over_ranks(torch.tensor(float(len(missing)), device=run.device)))
    needed, free = 2 * numbers * count / 1e9, shutil.disk_usage(folder).free / 1e9
    if count:
        print(f"making {count} embeddings, {needed:.2f} GB, in {folder}")
    if needed > free:
        raise InputError(f"{folder}: {needed:.2f} GB needed, {free:.2f} GB free; free space, give "
                         "another --cache-dir, or --no-cache")
    loader = torch.utils.data.DataLoader(
        [images[path] for path in missing], batch_size=1 if run.device.type == "cpu" else 8,
        collate_fn=functools.partial(read_inputs, read_input, args), num_workers=args.workers,
        worker_init_fn=ignore_group_signals, pin_memory=run.device.type == "cuda")
    paths = iter(missing)
    for batch in until_stopped(loader, "encoding", run.device):
        embeddings = encode(batch.to(run.device, non_blocking=run.pinned))
        for embedding in embeddings.half().cpu():
            save_checkpoint(next(paths), {"embedding": embedding.clone()})
    wait_for_ranks()
    if not all(path.exists() for path in images):
        raise InputError(f"{folder}: holds this host's embeddings alone; give all hosts one "
                         "--cache-dir")


def read_inputs(read_input, args, images):
    """Runs in loader processes, as collate_fn of keep_embeddings: images are (item, mirrored)."""
    return torch.stack([read_input(item, mirrored, args) for item, mirrored in images])


def is_whole(path):
    """Returns whether there is a good embedding; a damaged one is reported."""
    if not path.exists():
        return False
    try:
        read_embedding(path)
    except InputError as error:
        print(f"note: {error}: made again")
        return False
    return True


def load_embedding(path):
    """Returns an embedding (D, E, E) in half precision, of a file of keep_embeddings."""
    try:
        return read_embedding(path)
    except InputError as error:  # damaged since then
        raise InputError(f"{error}: --resume auto makes it again") from None


def read_embedding(path):
    found = load_checkpoint(path)
    embedding = found.get("embedding") if isinstance(found, dict) else None
    if getattr(embedding, "dtype", None) != torch.float16 or embedding.ndim != 3:
        raise InputError(f"{path}: not an embedding")
    return embedding
