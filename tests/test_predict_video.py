"""predict_video.py: prompts on any frame of a video, masks on all; stopped and started again; what is refused."""
import copy
import csv
import json
import os
import shutil
import signal
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import demo_data
import predict_video
import train_sam2
import utils
from conftest import ROOT
from nets.sam2 import NETS, PIXEL_MEAN, PIXEL_STD

SIZE = (48, 64)  # H, W of the clip
BOX, POINT = "10,8,40,36", "30,20"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """net.pth; clip/00000.png ...: 8 frames; clip.avi of them; truth/clip/00000.png ... of ids 1 and 2."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    torch.save({"format": 2, "net": "sam2", "arch": {"model": "demo", "image_size": 64}, "classes": [], "args": {},
                "model": NETS["demo"](64).state_dict()}, folder / "net.pth")
    images, ids = demo_data.draw_clip(1, 64, 8)
    (folder / "clip").mkdir()
    (folder / "truth/clip").mkdir(parents=True)
    for t, (image, mask) in enumerate(zip(images[:, :SIZE[0]], ids[:, :SIZE[0]])):
        utils.save_image(folder / f"clip/{t:05d}.png", image)
        utils.save_mask(folder / f"truth/clip/{t:05d}.png", mask)
    write_video(folder / "clip.avi", images[:, :SIZE[0]])
    return folder


def write_video(path, images, codec="MJPG", fps=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, images[0].shape[1::-1])
    for image in images:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()


@pytest.fixture(scope="module")
def model(data):
    return predict_video.create_model(predict_video.get_args_parser().parse_args(["x", "--weights", f"{data}/net.pth"]))


@pytest.fixture
def run(data, model, tmp_path, monkeypatch):
    """run("--box", ..., out="b") -> figures of main; the files are in tmp_path/b. The net is loaded once."""
    create = predict_video.create_model

    def loaded(args):
        if args.image_size or args.model:
            return create(args)
        args.image_size = 64
        return model
    monkeypatch.setattr(predict_video, "create_model", loaded)

    def call(*more, source="clip", out="out"):
        options = ["--weights", data / "net.pth", data / source, "--output-dir", tmp_path / out, "--device", "cpu"]
        return predict_video.main(predict_video.get_args_parser().parse_args([*map(str, [*options, *more])]))
    return call


@pytest.fixture
def refuses(run):
    """refuses("--box", ..., words=[...]): one line with all of the words, and nothing written."""
    def call(*more, words, source="clip", out="refused"):
        with pytest.raises(utils.InputError) as caught:
            run(*more, source=source, out=out)
        text = str(caught.value)
        assert "\n" not in text and all(word in text for word in words), text
    return call


def files(folder):
    """{path in the folder: bytes} of all that a run writes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def masks(folder):
    return {path.stem: np.array(Image.open(path)) for path in sorted((folder / "masks").glob("*.png"))}


def areas(folder):
    with open(folder / "areas.csv", newline="") as file:
        return {(int(row["object"]), row["frame"]): (int(row["pixels"]), row["score"]) for row in csv.DictReader(file)}


# --- Masks ---

def track_by_hand(data, prompts, reverse):
    """[{"t": frame, "logits": (objects, H, W), "scores": (objects,)}] of the net alone."""
    model = NETS["demo"](64, dynamic_multimask_via_stability=True, binarize_mask_from_pts_for_mem_enc=True).eval()
    model.load_state_dict(torch.load(data / "net.pth")["model"])
    frames = []
    for path in sorted((data / "clip").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path)).transpose(2, 0, 1).copy())
        image = v2.functional.resize(image, [64, 64], antialias=True)
        frames.append(v2.functional.normalize(image.float(), PIXEL_MEAN, PIXEL_STD))
    found = {}
    for t, out in model.propagate(torch.stack(frames), prompts, track_in_reverse=reverse):
        logits = F.interpolate(out["pred_masks"], SIZE, mode="bilinear", align_corners=False)[:, 0]
        found[t] = logits.numpy(), out["object_score_logits"].sigmoid()[:, 0].numpy()
    return found


def points(*rows):
    """x, y, label in pixels of the clip -> a prompt of the net."""
    rows = torch.tensor(rows, dtype=torch.float32)
    return {"point_coords": rows[:, :2] * torch.tensor([64 / SIZE[1], 64 / SIZE[0]]), "point_labels": rows[:, 2].int()}


def test_points_boxes_and_masks_on_any_frame_give_what_the_net_gives(data, run, tmp_path):
    drawn = np.zeros(SIZE, np.uint8)
    drawn[12:36, 20:52] = 255
    utils.save_image(tmp_path / "drawn.png", drawn)
    assert run("--box", f"{BOX}@00000:7", "--point", "22,14,0@00000:7", "--point", "50,30@4:7", "--point",
               f"{POINT}@00003:2", "--mask", f"{tmp_path / 'drawn.png'}@00005:3") == {"frames": 8, "objects": 3}
    whole = v2.functional.resize(torch.from_numpy(drawn > 0)[None].float(), [64, 64], antialias=True) >= 0.5
    prompts = {2: {3: points([30, 20, 1])}, 3: {5: {"mask_inputs": whole}},
               7: {0: points([10, 8, 2], [40, 36, 3], [22, 14, 0]), 4: points([50, 30, 1])}}
    both = [track_by_hand(data, [*prompts.values()], reverse) for reverse in (False, True)]
    table, seen = areas(tmp_path / "out"), set()
    for t, mask in enumerate(masks(tmp_path / "out").values()):
        expected, highest = np.zeros(SIZE, np.uint8), np.zeros(SIZE)
        for i, (number, own) in enumerate(prompts.items()):
            logits, scores = both[t < min(own)][t]
            expected[logits[i] > highest] = number
            highest = np.maximum(highest, logits[i])
            assert float(table[number, f"{t:05d}"][1]) == pytest.approx(scores[i], abs=1e-4)
        assert (mask == expected).all(), t
        seen |= {*np.unique(mask)}
        for number in prompts:
            assert table[number, f"{t:05d}"][0] == (mask == number).sum()
    assert len(table) == 24 and seen == {0, 2, 3, 7}
    with Image.open(tmp_path / "out/masks/00005.png") as image:
        assert image.mode == "P" and image.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]


def test_a_json_of_prompts_says_the_same_as_options(data, run, tmp_path):
    run("--box", BOX, "--point", "22,14,0", "--point", f"{POINT}@4:3", "--mask",
        f"{data}/truth/clip/00002.png@2:9", out="options")
    shutil.copy(data / "truth/clip/00002.png", tmp_path / "drawn.png")
    (tmp_path / "prompts.json").write_text(json.dumps({
        "00000": {"boxes": [[10, 8, 40, 36]], "points": [[22, 14, 0]]}, "2": [{"mask": "drawn.png", "object": 9}],
        "00004": [{}, {"object": 3, "points": [[30, 20]]}]}).replace("{}", '{"object": 1}'))
    run("--prompts", tmp_path / "prompts.json", out="json")
    assert files(tmp_path / "options") == files(tmp_path / "json")


def test_entries_of_a_json_are_objects_in_order_and_ids_of_a_mask_their_numbers(data, run, tmp_path, capsys):
    entries = [{"boxes": [[10, 8, 40, 36]]}, {"class": "cat", "points": [[30, 20, 1]]}]
    (tmp_path / "prompts.json").write_text(json.dumps({"00000": entries, "00003": [{}, entries[1]]}))
    assert run("--prompts", tmp_path / "prompts.json", "--mask", f"{data}/truth/clip/00001.png@1")["objects"] == 2
    run("--box", f"{BOX}@0:1", "--point", f"{POINT}@0:2", "--point", f"{POINT}@3:2",
        *("--mask", f"{data}/truth/clip/00001.png@1"), out="options")
    assert files(tmp_path / "out") == files(tmp_path / "options")
    run("--mask", f"{data}/truth/clip/00002.png", "--mask", f"{data}/truth/clip/00000.png@3", out="named")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == [f"note: --mask {data}/truth/clip/00002.png: taken for the first frame, as no frame is given with "
                     "@00002"]
    args = predict_video.get_args_parser().parse_args(["clip", "--weights", "x", "--mask", "m.png@1"])
    assert args.mask == [("m.png", "1", None)]
    for ids, object_id, expected in (([[0, 1], [2, 255]], None, {1: [[0, 1], [0, 0]], 2: [[0, 0], [1, 0]]}),
                                     ([[0, 255], [0, 0]], None, {1: [[0, 1], [0, 0]]}),
                                     ([[0, 1], [2, 255]], 9, {9: [[0, 1], [1, 1]]})):
        utils.save_mask(tmp_path / "ids.png", np.array(ids))
        found = predict_video.split_mask(tmp_path / "ids.png", object_id, (2, 2))
        assert {k: mask.tolist() for k, mask in found.items()} == expected


def test_both_directions_from_the_middle_are_two_runs(run, tmp_path):
    prompts = ["--box", f"{BOX}@4:1", "--point", f"{POINT}@4:2"]
    for direction in ("both", "forward", "backward"):
        run(*prompts, "--direction", direction, out=direction)
    both, forward, backward = (masks(tmp_path / name) for name in ("both", "forward", "backward"))
    for t, name in enumerate(both):
        assert (both[name] == (backward if t < 4 else forward)[name]).all()
        assert not (forward if t < 4 else backward)[name].any() or t == 4
    assert any(mask.any() for mask in list(both.values())[:4])


def test_later_prompts_change_what_follows_and_nothing_of_other_objects(run, tmp_path):
    run("--box", f"{BOX}@0:1", "--direction", "forward", out="once")
    run("--box", f"{BOX}@0:1", "--point", "55,40@4:1", "--direction", "forward", out="twice")
    run("--box", f"{BOX}@0:1", "--box", "2,2,9,9@0:2", "--direction", "forward", out="beside")
    once, twice, beside = (areas(tmp_path / name) for name in ("once", "twice", "beside"))
    assert any(once[1, f"{t:05d}"] != twice[1, f"{t:05d}"] for t in range(4, 8))
    assert all(once[1, f"{t:05d}"][1] == beside[1, f"{t:05d}"][1] for t in range(8))  # the scores


# --- Videos and folders ---

def test_a_video_is_read_forwards_backwards_and_where_jumps_miss(data, monkeypatch):
    capture = cv2.VideoCapture(str(data / "clip.avi"))
    frames = [capture.read()[1][..., ::-1] for _ in range(8)]
    video = predict_video.VideoFile(data / "clip.avi", 1)
    assert video.names == [f"{t:05d}" for t in range(8)] and video.size == SIZE and video.fps == 10
    monkeypatch.setattr(predict_video, "CHUNK_BYTES", 3 * 3 * SIZE[0] * SIZE[1] + 1)
    for t in [0, 1, 7, 6, 5, 4, 3, 2, 1, 0, 3, 7, 2]:
        assert (video.read(t) == frames[t]).all()
        assert len(video.kept) <= 3
    every = predict_video.VideoFile(data / "clip.avi", 3)
    assert every.names == ["00000", "00003", "00006"] and every.fps == pytest.approx(10 / 3)
    assert all((every.read(t) == frames[3 * t]).all() for t in (2, 1, 0, 2))

    real = cv2.VideoCapture

    class Misses:  # by a frame, as with files whose index is wrong
        def __init__(self, *args):
            self.capture = real(*args)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def set(self, key, value):
            return self.capture.set(key, value + 1)
    monkeypatch.setattr(cv2, "VideoCapture", Misses)
    video = predict_video.VideoFile(data / "clip.avi", 1)
    assert all((video.read(t) == frames[t]).all() for t in (7, 6, 5, 2, 1, 0, 7))


def test_a_video_and_the_folder_of_its_frames_give_the_same(data, run, tmp_path):
    capture = cv2.VideoCapture(str(data / "clip.avi"))
    (tmp_path / "frames").mkdir()
    for t in range(8):
        cv2.imwrite(str(tmp_path / f"frames/img_{t + 5}.png"), capture.read()[1])  # 9 comes before 10
    run("--box", f"{BOX}@5", source="clip.avi", out="video")
    run("--box", f"{BOX}@img_10", "--fps", 10, source=tmp_path / "frames", out="folder")
    video, folder = masks(tmp_path / "video"), masks(tmp_path / "folder")
    assert list(folder) == sorted(f"img_{t + 5}" for t in range(8))
    assert all((video[f"{t:05d}"] == folder[f"img_{t + 5}"]).all() for t in range(8))
    assert (tmp_path / "video/overlay.mp4").read_bytes() == (tmp_path / "folder/overlay.mp4").read_bytes()


def test_every_nth_frame_is_a_video_of_these(data, run, tmp_path):
    (tmp_path / "few").mkdir()
    for t in (0, 3, 6):
        shutil.copy(data / f"clip/{t:05d}.png", tmp_path / "few")
    run("--box", f"{BOX}@3", "--every", 3)
    run("--box", f"{BOX}@3", source=tmp_path / "few", out="few_out")
    assert list(masks(tmp_path / "out")) == ["00000", "00003", "00006"]
    assert files(tmp_path / "out") == files(tmp_path / "few_out")


def test_the_overlay_is_a_video_that_opens(data, run, tmp_path):
    run("--mask", data / "truth/clip/00000.png", source="clip.avi")
    capture, found = cv2.VideoCapture(str(tmp_path / "out/overlay.mp4")), masks(tmp_path / "out")
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    for t, mask in enumerate(found.values()):
        image = np.array(Image.open(data / f"clip/{t:05d}.png"))
        shown = capture.read()[1][..., ::-1].astype(int)
        assert np.abs(shown - utils.overlay(image, mask)).mean() < 25  # compressed, of few pixels
    assert not capture.read()[0]
    run("--mask", data / "truth/clip/00000.png", "--overlay", "False", out="without")
    assert sorted(files(tmp_path / "without")) == ["areas.csv", *(f"masks/{t:05d}.png" for t in range(8))]


@pytest.mark.parametrize("kind", ["rle", "polygon"])
def test_coco_holds_each_object_of_each_frame(data, run, tmp_path, kind):
    run("--mask", data / "truth/clip/00000.png", "--coco", kind)
    coco, found = json.loads((tmp_path / "out/annotations.json").read_text()), masks(tmp_path / "out")
    assert [image["file_name"] for image in coco["images"]] == [f"{data}/clip/{t:05d}.png" for t in range(8)]
    table = areas(tmp_path / "out")
    keys = [(note["track_id"], f"{note['image_id'] - 1:05d}") for note in coco["annotations"]]
    assert sorted(keys) == sorted(key for key, (pixels, _) in table.items() if pixels)
    for key, note in zip(keys, coco["annotations"]):
        assert note["area"] == (found[key[1]] == key[0]).sum() and note["score"] == float(table[key][1])
        if kind == "rle":
            counts = note["segmentation"]["counts"]
            values = np.repeat(np.arange(len(counts)) % 2, counts) if isinstance(counts, list) else None
            if values is not None:
                assert (values.reshape(SIZE[::-1]).T == (found[key[1]] == key[0])).all()


VARYING = [0, 33, 66, 400, 433, 1000, 1010, 1020]  # ms


def write_mkv(path, frames, times, duration=None):
    """Matroska of JPEG frames (bytes) at these times; duration in ms, of 100 each unless there is none."""
    def element(code, content):
        content = content.to_bytes(4, "big") if isinstance(content, int) else content
        return bytes.fromhex(code) + (len(content) | 1 << 56).to_bytes(8, "big") + content
    size = cv2.imdecode(np.frombuffer(frames[0], np.uint8), 1).shape
    track = element("d7", 1) + element("73c5", 1) + element("83", 1) + element("86", b"V_MJPEG") + element(
        "e0", element("b0", size[1]) + element("ba", size[0]))
    info = element("2ad7b1", 10**6) + element("4d80", b"x") + element("5741", b"x")
    if duration:
        info += element("4489", np.array(duration, ">f8").tobytes())
        track += element("23e383", 10**8)
    blocks = [element("a3", b"\x81" + time.to_bytes(2, "big") + b"\x80" + frame) for time, frame in zip(times, frames)]
    path.write_bytes(element("1a45dfa3", element("4282", b"matroska")) + element(
        "18538067", element("1549a966", info) + element("1654ae6b", element("ae", track)) +
        element("1f43b675", element("e7", 0) + b"".join(blocks))))


@pytest.fixture(scope="module")
def jpegs(data):
    paths = sorted((data / "clip").iterdir())
    return [cv2.imencode(".jpg", cv2.imread(str(path)))[1].tobytes() for path in paths]


@pytest.mark.parametrize("times, duration, fps", [
    (VARYING, 1200, 6.86), (VARYING, 5000, 6.86), (VARYING, None, 6.86), (range(0, 800, 100), 800, 10),
    (range(0, 800, 100), 3000, 10)])  # the last has sound for longer
def test_a_whole_video_is_called_so_whatever_its_rate_and_length(jpegs, tmp_path, capsys, times, duration, fps):
    write_mkv(tmp_path / "a.mkv", jpegs, times, duration)
    video = predict_video.VideoFile(tmp_path / "a.mkv", 1)
    assert len(video.names) == 8 and not video.bad and video.fps == fps
    assert ("note" in capsys.readouterr().out) == (duration not in (None, 800))
    assert predict_video.VideoFile(tmp_path / "a.mkv", 2).fps == fps / 2


def test_a_video_without_a_count_of_frames_is_cut_or_damaged_if_it_says_more(jpegs, tmp_path):
    for name, frames in (("cut", jpegs), ("damaged", [*jpegs[:4], *[b"no jpeg"] * 3, jpegs[7]])):
        write_mkv(tmp_path / "a.mkv", frames, range(0, 800, 100), 800)
        content = (tmp_path / "a.mkv").read_bytes()
        (tmp_path / "a.mkv").write_bytes(content[:len(content) * 6 // 10] if name == "cut" else content)
        video = predict_video.VideoFile(tmp_path / "a.mkv", 1)
        assert video.bad == [f"{tmp_path}/a.mkv: truncated or damaged: {len(video.names)} of 8 frames can be read; "
                             f"frames {len(video.names)} to 7 are missing"] and 3 <= len(video.names) <= 5
    for head, end, lacks in ((b"", 1.6, True), (b"", 1.8, False), (b"RIFF", 1.9, True), (b"\0\0\0 ftyp", 1.9, True)):
        (tmp_path / "a").write_bytes(head)
        assert predict_video.lacks_frames(tmp_path / "a", 20, 10, np.linspace(0, end, 17)) == lacks
    write_mkv(tmp_path / "a.mkv", jpegs, range(0, 800, 100), 800)
    content = (tmp_path / "a.mkv").read_bytes()
    for cut, whole in ((0, True), (1, False)):
        (tmp_path / "a.mkv").write_bytes(content[:len(content) - cut])
        assert predict_video.is_whole(tmp_path / "a.mkv", content[:4096]) == whole


@pytest.mark.parametrize("suffix, codec", [("avi", "MJPG"), ("mp4", "mp4v")])
def test_a_video_that_lacks_its_end_is_never_called_whole(data, tmp_path, suffix, codec):
    """Two frames fewer than stated are taken from a file that is whole; a last frame may be decoded in part."""
    path = tmp_path / f"a.{suffix}"
    write_video(path, [cv2.imread(str(frame)) for frame in sorted((data / "clip").iterdir())], codec)
    content = path.read_bytes()
    if suffix == "mp4":  # what players fetch first: the table of frames before the frames
        start, end = content.index(b"mdat") - 4, content.index(b"moov") - 4
        table = content[end:]
        offset = table.index(b"stco") + 12
        first = int.from_bytes(table[offset:offset + 4], "big") + len(table)
        count = int.from_bytes(table[offset - 4:offset], "big")
        assert count == 1
        table = table[:offset] + first.to_bytes(4, "big") + table[offset + 4:]
        content = content[:start] + table + content[start:end]
    ends = {"avi": content.rfind(b"idx1"), "mp4": len(content)}[suffix]
    for kept, more, named in ((len(content), b"", False), (len(content), b"tail" * 9, False), (ends - 20, b"", True),
                              (ends - 900, b"", True), (ends - 1500, b"", True)):
        path.write_bytes(content[:kept] + more)
        video = predict_video.VideoFile(path, 1)
        assert bool(video.bad) == named and len(video.names) >= 2, (kept, video.bad)
        assert not named or "truncated or damaged" in video.bad[0] and "frames 8 to 7" not in video.bad[0]


def test_the_overlays_rate_is_that_of_the_video():
    steady = [k / 29.97 for k in range(50)]
    for stated, times, rate in ((29.97, steady, 29.97), (30, steady, 30), (1000, steady, 29.97), (90000, steady, 29.97),
                                (25, [0.0] * 9, 25), (90000, [0.0] * 9, 24), (0, [0.0], 24), (12, steady, 29.97)):
        assert predict_video.frame_rate(stated, times) == rate


def test_a_rate_that_mpeg4_has_not_is_rounded(run, tmp_path):
    run("--box", BOX, "--fps", 1000 / 7)
    assert cv2.VideoCapture(str(tmp_path / "out/overlay.mp4")).get(cv2.CAP_PROP_FPS) == 143


@pytest.mark.parametrize("change, reason", [
    (lambda image: (True, image[:30]),
     "frames from 5 on have 64x30 pixels, but the first has 64x48; they are left out"),
    (lambda image: (False, None), "frame 5 cannot be decoded; it and those after it are left out")])
def test_a_video_whose_frames_change_is_used_up_to_there(data, monkeypatch, change, reason):
    real = cv2.VideoCapture

    class Changes:
        def __init__(self, *args):
            self.capture = real(*args)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def retrieve(self):
            image = self.capture.retrieve()[1]
            return change(image) if self.capture.get(cv2.CAP_PROP_POS_FRAMES) > 5 else (True, image)
    monkeypatch.setattr(cv2, "VideoCapture", Changes)
    video = predict_video.VideoFile(data / "clip.avi", 1)
    assert len(video.names) == 5 and video.bad == [f"{data}/clip.avi: {reason}"]


def test_names_with_digits_that_are_no_numbers(data, run, tmp_path):
    (tmp_path / "odd").mkdir()
    names = ["2²", "10²", "10³", "m²_2", "m²_10", "m²_٣٠", "²"]
    for t, name in enumerate(names):
        shutil.copy(data / f"clip/{t:05d}.png", tmp_path / f"odd/{name}.png")
    run("--box", f"{BOX}@10²", source=tmp_path / "odd")
    assert predict_video.Folder(tmp_path / "odd", 1).names == names


def test_numbers_that_differ_in_zeros_alone_are_two_frames(data, run, tmp_path):
    (tmp_path / "odd").mkdir()
    for t, name in enumerate(["1", "01", "2"]):
        shutil.copy(data / f"clip/{t:05d}.png", tmp_path / f"odd/{name}.png")
    names = predict_video.Folder(tmp_path / "odd", 1).names
    args = predict_video.get_args_parser().parse_args(["x", "--weights", "x", *(
        f"--point={POINT}@{name}:{k}" for k, name in enumerate(("1", "01", "002"), 1))])
    prompts = predict_video.collect_prompts(args, predict_video.Folder(tmp_path / "odd", 1))
    assert [names[t] for by_frame in prompts.values() for t in by_frame] == ["1", "01", "2"]


def test_names_on_which_opencv_crashes_are_refused(data, refuses, tmp_path, monkeypatch):
    name = os.fsdecode(b"v\xff.avi")
    shutil.copy(data / "clip.avi", tmp_path / name)
    monkeypatch.setattr(cv2, "VideoCapture", None)
    refuses("--box", BOX, source=tmp_path / name, words=["v\\udcff.avi'", "no UTF-8; rename it"])
    refuses("--box", BOX, out=name, words=["no UTF-8; rename it"])


# --- Evaluation ---

def f_by_hand(pred, true, tolerance=1):
    """Of masks (H, W) bool: boundary pixels that have one of the other within tolerance, no distance transform."""
    def edge(mask):
        height, width = mask.shape
        others = [(y, x, min(y + dy, height - 1), min(x + dx, width - 1)) for y in range(height)
                  for x in range(width) for dy, dx in ((0, 1), (1, 0), (1, 1))]
        return np.array(sorted({(y, x) for y, x, row, column in others if mask[y, x] != mask[row, column]}))

    lines = edge(pred), edge(true)
    if not len(lines[0]) or not len(lines[1]):
        return float(len(lines[0]) == len(lines[1]))
    distance = np.linalg.norm(lines[0][:, None] - lines[1][None], axis=2)
    precision, recall = (distance.min(1) <= tolerance).mean(), (distance.min(0) <= tolerance).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("direction, frames", [("both", [0, 2, 3, 4, 5, 6]), ("forward", [2, 3, 4, 5, 6]),
                                               ("backward", [0])])
def test_eval_prints_j_and_f_of_the_frames_tracked(data, run, tmp_path, capsys, direction, frames):
    figures = run("--mask", f"{data}/truth/clip/00001.png@1", "--eval", data / "truth", "--direction", direction)
    found, rows = masks(tmp_path / "out"), []
    for number in (1, 2):
        pairs = [(found[f"{t:05d}"] == number, np.array(Image.open(data / f"truth/clip/{t:05d}.png")) == number)
                 for t in frames]
        js = [(pred & true).sum() / (pred | true).sum() if (pred | true).any() else 1.0 for pred, true in pairs]
        rows.append((np.mean(js), np.mean([f_by_hand(*pair) for pair in pairs])))
    j, f = np.mean(rows, 0)
    assert figures == {"frames": 8, "objects": 2, "jf": pytest.approx((j + f) / 2), "j": pytest.approx(j),
                       "f": pytest.approx(f)}
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in lines if line.startswith("  ") and "J&F" not in line]
    assert shown == [["object", str(k + 1), *(f"{100 * x:.2f}" for x in (sum(row) / 2, *row))]
                     for k, row in enumerate(rows)] + [["clip", *(f"{100 * x:.2f}" for x in ((j + f) / 2, j, f))]]


def test_void_of_the_truth_counts_for_nothing(data, run, tmp_path):
    (tmp_path / "truth").mkdir()
    run("--mask", f"{data}/truth/clip/00001.png@1")
    for name, found in masks(tmp_path / "out").items():  # right but for a corner that is void
        found = np.array(found)
        found[20:, 30:] = np.where(found[20:, 30:] > 0, 255, 0)
        utils.save_mask(tmp_path / f"truth/{name}.png", found.astype(np.uint8))
    figures = run("--mask", f"{data}/truth/clip/00001.png@1", "--eval", tmp_path / "truth", out="again")
    assert figures["j"] == figures["f"] == 1


def test_ids_of_16_bits_have_no_void(data, run, tmp_path):
    """The object of id 255 and that of 3 say the same of a prediction that spills over it."""
    figures = {}
    for third in (3, 255):
        for t in range(8):
            ids = np.array(Image.open(data / f"truth/clip/{t:05d}.png"))
            (tmp_path / f"{third}").mkdir(exist_ok=True)
            utils.save_image(tmp_path / f"{third}/{t:05d}.png", np.array([0, 1, third, 300], np.uint16)[ids])
        ids[10:12, 10:12] = 3
        utils.save_image(tmp_path / f"{third}/00007.png", np.array([0, 1, third, 300], np.uint16)[ids])
        figures[third] = run("--box", BOX, "--eval", tmp_path / f"{third}", out=f"out{third}")
    assert figures[3] == figures[255]


def test_truth_may_be_a_folder_per_object_and_have_few_frames(data, run, tmp_path, refuses, capsys):
    for t in (0, 2, 4, 6):
        ids = np.array(Image.open(data / f"truth/clip/{t:05d}.png"))
        for number, name in ((1, "truth/a9"), (2, "truth/a10"), (1, "named/1"), (2, "named/2"), (2, "one/2")):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)  # sorted by number, or it is the object's
            utils.save_image(tmp_path / f"{name}/{t}.png", (ids == number) * np.uint8(255))
        (tmp_path / "few").mkdir(exist_ok=True)
        shutil.copy(data / f"truth/clip/{t:05d}.png", tmp_path / "few")
    mask = ["--mask", data / "truth/clip/00000.png"]
    figures = [run(*mask, "--eval", tmp_path / name, out=f"out_{name}") for name in ("truth", "named", "few")]
    assert figures[0] == figures[1] == figures[2]
    capsys.readouterr()
    run(*mask, "--eval", tmp_path / "one", out="out_one")
    printed = capsys.readouterr().out
    assert "objects 1 are in the truth or" in printed and "object 2" in printed and "object 1 " not in printed
    run("--box", f"{BOX}@0:1", "--box", f"{BOX}@0:5", "--eval", tmp_path / "few")
    assert "objects 2, 5 are in the truth or among the prompts, not in both" in capsys.readouterr().out
    (tmp_path / "few/00004.png").unlink()
    (tmp_path / "few/00006.png").unlink()
    refuses(*mask, "--eval", tmp_path / "few", words=["few: has masks of 2 of the frames"])
    refuses(*mask, "--eval", tmp_path / "no", words=["--eval", "no such folder"])
    utils.save_mask(tmp_path / "few/00004.png", np.zeros((9, 9)))
    refuses(*mask, "--eval", tmp_path / "few", words=["00004.png", "64x48"])


@pytest.mark.parametrize("source", ["clip", "clip.avi"])
def test_truth_that_is_numbered_from_1_is_that_of_the_frames_from_0(data, run, refuses, tmp_path, capsys, source):
    mask = ["--mask", f"{data}/truth/clip/00001.png@1", "--eval"]
    expected = run(*mask, data / "truth/clip", source=source, out="expected")
    for first in (1, 5):
        (tmp_path / f"{first}").mkdir()
        for t in range(8):
            shutil.copy(data / f"truth/clip/{t:05d}.png", tmp_path / f"{first}/{t + first}.png")
    assert "note" not in capsys.readouterr().out
    assert run(*mask, tmp_path / "1", source=source) == expected
    assert "masks are numbered from 1 and frames from 0" in capsys.readouterr().out
    refuses(*mask, tmp_path / "5", source=source, words=["5: masks 5 to 12, but the frames are 0 to 7"])


def test_an_objects_truth_with_soft_edges_is_cut_at_half_as_in_training(tmp_path):
    soft = cv2.GaussianBlur(np.pad(np.full((16, 16), 255, np.uint8), 12), (0, 0), 2)
    Image.fromarray(soft).save(tmp_path / "00000.png")
    ids = predict_video.read_truth([(3, tmp_path / "00000.png")], train_sam2)
    assert np.array_equal(ids, 3 * (soft >= 128)) and (ids > 0).sum() < (soft > 0).sum()


def test_truth_of_more_or_fewer_frames_is_paired_by_number(data, run, tmp_path, capsys):
    (tmp_path / "from1").mkdir()
    for t in range(8):
        shutil.copy(data / f"clip/{t:05d}.png", tmp_path / f"from1/{t + 1}.png")
    figures = []
    for name, frames in (("few", range(1, 8)), ("all", range(8)), ("more", range(12))):
        (tmp_path / name).mkdir()
        for t in frames:
            shutil.copy(data / f"truth/clip/{t % 8:05d}.png", tmp_path / f"{name}/{t:03d}.png")
        figures.append(run("--mask", f"{data}/truth/clip/00000.png@0", "--eval", tmp_path / name, out=f"out_{name}"))
    assert figures[0] == figures[1] == figures[2]
    assert "more: 4 masks are of no frame, such as 8" in capsys.readouterr().out
    assert run("--mask", f"{data}/truth/clip/00000.png@1", "--eval", tmp_path / "all", source=tmp_path / "from1",
               out="from1_out") == figures[0]
    assert "masks are numbered from 0 and frames from 1" in capsys.readouterr().out
    run("--mask", f"{data}/truth/clip/00000.png@0", "--eval", tmp_path / "all", "--every", 2, out="every")
    assert "note" not in capsys.readouterr().out


# --- Stopped and started again ---

PROMPTS = ["--box", f"{BOX}@2:1", "--point", f"{POINT}@6:2", "--coco"]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Files of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    predict_video.main(predict_video.get_args_parser().parse_args([*map(str, [
        "--weights", data / "net.pth", data / "clip", "--output-dir", folder, "--device", "cpu", *PROMPTS])]))
    return files(folder)


def disturb(monkeypatch, count, action):
    """action() after so many masks and stored logits have been written."""
    written = []

    def after(function):
        def call(*args):
            function(*args)
            if "state.pth" not in str(args[0]):
                written.append(args[0])
                if len(written) == count:
                    action()
        return call
    monkeypatch.setattr(utils, "save_mask", after(utils.save_mask))
    monkeypatch.setattr(utils, "save_checkpoint", after(utils.save_checkpoint))


@pytest.mark.parametrize("count", [1, 5, 8, 11, 14])  # of 8 forwards, and 6 backwards
def test_a_stopped_run_goes_on_to_the_same_bytes(straight, run, tmp_path, monkeypatch, capsys, count):
    with monkeypatch.context() as patch:
        disturb(patch, count, lambda: utils._signals.append(signal.SIGTERM))
        with pytest.raises(utils.Stopped):
            run(*PROMPTS)
        utils._signals.clear()
    state = torch.load(tmp_path / "out/unfinished/state.pth")
    assert 8 * state["passes"] + state["tracking"].get("done", 0) == (count if count <= 8 else count + 2)
    run(*PROMPTS)
    assert "continuing the unfinished run" in capsys.readouterr().out
    assert files(tmp_path / "out") == straight


@pytest.mark.parametrize("count", [2, 7, 12])
def test_a_killed_run_goes_on_from_the_last_saved_state(straight, run, tmp_path, monkeypatch, count):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed
    monkeypatch.setattr(predict_video, "SAVE_EVERY", 3)
    with monkeypatch.context() as patch:
        disturb(patch, count, kill)
        with pytest.raises(Killed):
            run(*PROMPTS)
    run(*PROMPTS)
    assert files(tmp_path / "out") == straight


def test_an_unfinished_run_of_other_settings_is_not_continued(straight, run, model, refuses, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disturb(patch, 3, lambda: utils._signals.append(signal.SIGTERM))
        with pytest.raises(utils.Stopped):
            run("--box", BOX)
        utils._signals.clear()
    refuses(*PROMPTS, words=["unfinished run of other prompts", "--overwrite"], out="out")
    refuses("--box", BOX, "--every", 2, words=["masks/00001.png: is not of this video"], out="out")
    refuses("--box", BOX, "--direction", "forward", words=["unfinished run of other direction"], out="out")
    refuses("--box", BOX, source="clip.avi", words=["unfinished run of other frames"], out="out")
    with monkeypatch.context() as patch:
        other = copy.deepcopy(model)
        other.no_obj_ptr.data += 1
        patch.setattr(predict_video, "create_model", lambda args: setattr(args, "image_size", 64) or other)
        refuses("--box", BOX, words=["unfinished run of other weights"], out="out")
    with monkeypatch.context() as patch:  # as on another device, whose --amp auto is bf16
        patch.setattr(utils, "pick_precision", lambda amp, device: (torch.bfloat16, None))
        refuses("--box", BOX, words=["unfinished run of other amp"], out="out")
    run(*PROMPTS, "--overwrite")
    assert files(tmp_path / "out") == straight


def test_a_folder_of_the_users_own_called_unfinished_is_not_removed(run, refuses, tmp_path):
    (tmp_path / "out/unfinished").mkdir(parents=True)
    (tmp_path / "out/unfinished/notes.txt").write_text("mine")
    refuses("--box", BOX, words=["unfinished/notes.txt: is in the folder of an unfinished run"], out="out")
    assert (tmp_path / "out/unfinished/notes.txt").read_text() == "mine"


def test_state_does_not_grow_with_frames(data, run, tmp_path, monkeypatch):
    (tmp_path / "long").mkdir()
    for t in range(26):
        shutil.copy(data / f"clip/{t % 8:05d}.png", tmp_path / f"long/{t}.png")
    monkeypatch.setattr(predict_video, "SAVE_EVERY", 1)
    sizes, frames, save = [], [], utils.save_checkpoint

    def measure(path, state):
        save(path, state)
        if state["tracking"]:
            sizes.append(path.stat().st_size)
            frames.append(len(state["tracking"]["outputs"][0]["non_cond_frame_outputs"]))
    monkeypatch.setattr(utils, "save_checkpoint", measure)
    run("--box", BOX, "--overlay", "False", source=tmp_path / "long")
    assert len(sizes) == 26 and max(frames) == 16
    assert max(sizes[17:]) - min(sizes[17:]) < 0.01 * sizes[20] < 0.01 * 2 * sizes[16]


# --- What is refused ---

def test_coco_and_eval_need_their_scripts_beside_this_one(data, refuses, monkeypatch):
    for name, more in (("convert_labels", ["--coco"]), ("train_sam2", ["--eval", data / "truth"])):
        monkeypatch.setitem(sys.modules, name, None)
        refuses("--box", BOX, *more, words=[f"{more[0]}: {name}.py is not beside this script"])


def test_frames_that_cannot_be_read_are_named_when_the_rest_is_done(data, run, tmp_path):
    shutil.copytree(data / "clip", tmp_path / "clip")
    (tmp_path / "clip/00003.png").write_bytes((data / "clip/00003.png").read_bytes()[:500])
    utils.save_image(tmp_path / "clip/00005.png", np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(utils.InputError, match="00003.png: truncated.*; .*00005.png: 20x20 pixels, but .* 64x48"):
        run("--box", BOX, source=tmp_path / "clip")
    assert list(masks(tmp_path / "out")) == ["00000", "00001", "00002", "00004", "00006", "00007"]
    assert (tmp_path / "out/overlay.mp4").exists() and not (tmp_path / "out/unfinished").exists()


def test_alone_with_its_net_it_does_a_truncated_video_up_to_there(data, tmp_path, script):
    shutil.copytree(ROOT / "nets", tmp_path / "nets")
    for file in ("predict_video.py", "utils.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    content = (data / "clip.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[:len(content) * 6 // 10])
    done = script("predict_video.py", "--weights", data / "net.pth", "cut.avi", "--box", BOX, "--device", "cpu",
                  cwd=tmp_path)
    written = list(masks(tmp_path / "out"))
    assert 2 <= len(written) <= 6 and (tmp_path / "out/areas.csv").read_text().count("\n") == 1 + len(written)
    assert done.returncode == 2 and done.stderr == (
        f"predict_video.py: error: cut.avi: truncated or damaged: {len(written)} of 8 frames can be read; frames "
        f"{len(written)} to 7 are missing\n")


@pytest.mark.parametrize("more, words", [
    (["--box", f"{BOX}@9"], ["--box: frame 9 is not there", "00000, 00001, 00002 ... 00007"]),
    (["--point", f"{POINT}@x:2"], ["--point: frame x is not there"]),
    ([], ["net.pth: needs prompts: give --box"]),
    (["--box", f"{BOX}@2:3", "--box", f"{BOX}@2:3"], ["object 3 on frame 00002: has a second box", "@00002:4"]),
    (["--box", "10,8,70,36"], ["--box: object 1 on frame 00000: 10,8,70,36 is not in the frame's 64x48"]),
    (["--box", "40,8,10,36"], ["40,8,10,36"]), (["--point", "5,60"], ["5,60 is not"]),
    (["--point", "5,6,2"], ["5,6,2"]),
    (["--mask", "{}/small.png"], ["small.png: 10x20 pixels, but the video has 64x48"]),
    (["--mask", "{}/empty.png"], ["empty.png: shows no object"]),
    (["--mask", "{}/no.png"], ["no.png: no such file"]),
    (["--mask", "{}/truth/clip/00000.png", "--box", BOX], ["object 1 on frame 00000: has a mask and a box"]),
    (["--box", BOX, "--image-size", "65"], ["--image-size", "multiple of 32"]),
    (["--box", BOX, "--model", "tiny"], ["holds demo; leave --model out"])])
def test_prompts_and_options_that_cannot_be(data, refuses, tmp_path, more, words):
    utils.save_mask(data / "small.png", np.ones((20, 10)))
    utils.save_mask(data / "empty.png", np.zeros(SIZE))
    refuses(*[text.replace("{}", str(data)) for text in more], words=words)
    assert not (tmp_path / "refused/masks").exists()


@pytest.mark.parametrize("given, words", [
    ("{", ["no json of prompts like"]), ("[1]", ["no json of prompts like"]),
    ({"00000": [{"box": [1, 2, 3, 4]}]}, ["frame 00000 has box"]),
    ({"00000": [{"boxes": [[1, 2, 3]]}]}, ["no json of prompts like"]),
    *[({"00000": [{"points": [[1, 2]], "object": number}]}, [f"object {number} is no whole number from 1 to 254"])
      for number in (300, 0, 1.0, True)],
    ({"00000": [{"points": [[1, 2]]}, {"points": []}]}, ["object 2 has no prompt"]),
    ({"00000": [{"points": [[1, 2]]}], "00009": [{}]}, ["frame 00009 is not there"]),
    ({"00000": [{"points": [[1, 2, 5]]}]}, ["1,2,5", "no label 1 or 0"]),
    ('{"00000": ' + "[" * 60000, ["no json of prompts like"]),
    ({"9" * 5000: [{"points": [[1, 2]]}]}, ["is not there"])])
def test_json_that_cannot_be(refuses, tmp_path, given, words):
    (tmp_path / "prompts.json").write_text(given if isinstance(given, str) else json.dumps(given))
    refuses("--prompts", tmp_path / "prompts.json", words=["prompts.json", *words])


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "1,2,3,nan", "1,2,3,4@0:0", "1,2,3,4@0:255", "1,2,3,4@0:x"])
def test_options_that_are_no_prompts(text, capsys):
    with pytest.raises(SystemExit):
        predict_video.get_args_parser().parse_args(["clip", "--weights", "x", "--box", text])
    assert capsys.readouterr().err.startswith(f"{predict_video.get_args_parser().prog}: error: argument --box: {text}")


def test_inputs_that_are_no_videos(data, refuses, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "text.mp4", ["text.mp4: OpenCV cannot open it as a video", "mp4 (H.264)"]),
                          (tmp_path / "no.mp4", ["no.mp4: no such video or folder"]),
                          (tmp_path / "empty", ["empty: a folder without images"]),
                          (data / "clip/00000.png", ["00000.png: is an image; give the folder"])):
        refuses("--box", BOX, source=source, words=words)


def test_outputs_that_are_there_are_kept_unless_asked(data, run, refuses, tmp_path):
    run("--box", BOX, "--overlay", "False")
    before = files(tmp_path / "out")
    refuses("--point", POINT, words=["masks/00000.png: exists; give --overwrite"], out="out")
    refuses("--box", BOX, "--every", 2, "--overwrite", words=["masks/00001.png: is not of this video"], out="out")
    full = np.ones(SIZE)
    utils.save_mask(tmp_path / "out/masks/00000.png", full)
    refuses("--mask", tmp_path / "out/masks/00000.png", "--overwrite", words=["would be written, and is"], out="out")
    (tmp_path / "out/masks/00000.png").write_bytes(before["masks/00000.png"])
    assert files(tmp_path / "out") == before
    run("--point", POINT, "--overlay", "False", "--overwrite")
    assert files(tmp_path / "out") != before


def test_checkpoints_that_are_not_of_this_net(data, tmp_path):
    state = torch.load(data / "net.pth")["model"]
    for content, words in (({"format": 2, "net": "unet"}, "holds the net unet"), (state, "give --model"),
                           ({"format": 2, "net": "sam2", "arch": {"model": "x"}, "model": state}, "not a whole"),
                           ({"format": 2, "net": "sam2", "arch": {"model": "demo"}, "model": {}}, "another net")):
        torch.save(content, tmp_path / "a.pth")
        args = predict_video.get_args_parser().parse_args(["x", "--weights", str(tmp_path / "a.pth")])
        with pytest.raises(utils.InputError, match=f"a.pth: .*{words}"):
            predict_video.create_model(args)
    torch.save({"model": state}, tmp_path / "a.pth")  # as official files are
    args = predict_video.get_args_parser().parse_args(["x", "--weights", str(tmp_path / "a.pth"), "--model", "demo"])
    assert predict_video.create_model(args).image_size == 1024
