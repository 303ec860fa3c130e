"""predict.py on a hundred spoilt inputs: one line and exit 2 for each, and the good image beside it is still done."""
import io
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import predict
import utils
from test_predict import noise, save_unet

SIZE = 40, 56  # height and width of the drawn images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def loaded(weights):
    """What load_model returns, once."""
    args = predict.get_args_parser().parse_args(["x", "--device", "cpu", "--weights", str(weights)])
    return predict.load_model(args)


def encoded(form, mode="RGB", **options):
    """Bytes of an image file."""
    image, file = Image.fromarray(noise(*SIZE)), io.BytesIO()
    if mode in ("I;16", "F"):
        ramp = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
        image = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.float32))
    elif mode in ("LA", "PA"):
        image = image.convert("L").convert("LA")
        image = image.convert("PA") if mode == "PA" else image
    else:
        image = image.convert(mode)
    image.save(file, form, **options)
    return file.getvalue()


def array(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def header(shape, descr="|u1"):
    """A .npy file that says what it does not hold."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(100)


def huge_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("JPEG", exif=exif)


def damaged():
    """{name: bytes} of spoilt files: nothing is known but that no traceback may come of them."""
    rng, files = np.random.default_rng(0), {}
    sources = {"png": encoded("PNG"), "jpg": encoded("JPEG"), "bmp": encoded("BMP"), "gif": encoded("GIF", "P"),
               "tif": encoded("TIFF", compression="tiff_lzw"), "webp": encoded("WEBP"), "npy": array(noise(*SIZE))}
    for ending, whole in sources.items():
        for k in range(4):  # bits flipped: half of them in the head, where the sizes are
            spoilt = bytearray(whole)
            for place in rng.integers(0, len(whole) if k % 2 else min(120, len(whole)), 1 + 4 * k):
                spoilt[place] ^= 1 << rng.integers(8)
            files[f"bits{k}.{ending}"] = bytes(spoilt)
        for k in range(2):
            files[f"cut{k}.{ending}"] = whole[:rng.integers(1, len(whole))]
        files[f"empty.{ending}"] = b""
    return files


# Spoilt for certain: these must be named.
BAD = {"text.png": b"no image\n", "text.npy": b"no array\n", "array.png": array(noise(*SIZE)),
       "image.npy": encoded("PNG"), "huge.png": huge_png(2 ** 31 - 1, 2 ** 31 - 1), "bomb.png": huge_png(30000, 9000),
       "large.npy": header((10 ** 7, 10 ** 7, 3)), "long.npy": header((2 ** 62, 2 ** 62)), "minus.npy": header((-5, 7)),
       "words.npy": header("('a', 'b')"), "open.npy": header("((((("), "type.npy": header((3, 3), "|O"),
       "zero.npy": array(np.zeros((0, 5, 3), np.uint8)), "flat.npy": array(np.zeros((5, 0), np.uint8)),
       "object.npy": array(np.array([[None, {}]], object)), "nan.npy": array(np.full(SIZE, np.nan)),
       "infinite.npy": array(np.full(SIZE, np.inf)), "text_array.npy": array(np.array([["a"]])),
       "many.npy": array(np.zeros((2, 3, 4, 5))), "one.npy": array(np.float32(3)), "zip.npy": b"PK\x03\x04" + bytes(50),
       "several.gif": encoded("GIF", "P", save_all=True, append_images=[Image.new("P", SIZE[::-1], 9)])}
# Odd, but images: these must be done, at their own size.
GOOD = {"one.png": encoded("PNG", "1"), "grey.png": encoded("PNG", "L"), "grey_alpha.png": encoded("PNG", "LA"),
        "alpha.png": encoded("PNG", "RGBA"), "deep.png": encoded("PNG", "I;16"), "palette.png": encoded("PNG", "P"),
        "clear.png": encoded("PNG", "P", transparency=3), "float.tif": encoded("TIFF", "F"),
        "cmyk.jpg": encoded("JPEG", "CMYK"), "cmyk.tif": encoded("TIFF", "CMYK"), "lab.tif": encoded("TIFF", "LAB"),
        "palette_alpha.tif": encoded("TIFF", "LA"), "wrong.jpg": encoded("PNG"), "WRONG.BMP": encoded("JPEG"),
        "half.npy": array(noise(*SIZE).astype(np.float16) / 255), "bool.npy": array(noise(*SIZE)[..., 0] > 99),
        **{f"turned{k}.jpg": turned(k) for k in (2, 3, 5, 6, 8)}}
CASES = [*[(name, data, None) for name, data in damaged().items()],
         *[(name, data, "bad") for name, data in BAD.items()],
         *[(name, data, "good") for name, data in GOOD.items()],
         *[(name, None, "bad") for name in ("dangling.png", "folder.png", "list.txt", "loop.jpg")]]


def lay(folder, name, data):
    """The case beside a good image; returns what predict.py is given."""
    (folder / "in").mkdir(parents=True)
    Image.fromarray(noise(*SIZE)).save(folder / "in/fine.png")
    path = folder / "in" / name
    if data is not None:
        path.write_bytes(data)
    elif name == "folder.png":  # a glob finds it
        path.mkdir()
        return [str(folder / "in/*.png")]
    elif name == "list.txt":
        path.write_text("fine.png\nnot_there.png\n")
        return [str(path)]
    else:
        os.symlink(path if name == "loop.jpg" else folder / "nothing", path)
    return [str(folder / "in")]


def check(folder, name, data, kind, message):
    """The good image is done; the other has a mask of its size or is named in the one line of errors, not both."""
    masks = {path.name.removesuffix("_mask.png"): path for path in (folder / "out").glob("*_mask.png")}
    named, done = "not_there.png" if name == "list.txt" else name, masks.pop("fine")
    assert Image.open(done).size == SIZE[::-1]
    assert len(masks) == (not message) and "\n" not in message.strip()
    if kind:
        assert bool(message) == (kind == "bad")
    if message:
        assert named in message and "fine.png" not in message
        return
    with Image.open(*masks.values()) as mask:
        assert mask.mode == "P" and set(np.unique(mask)) <= {0, 1}
        if kind:
            assert mask.size == (SIZE if name in ("turned5.jpg", "turned6.jpg", "turned8.jpg") else SIZE[::-1])
        else:
            assert mask.size == predict.read_image(folder / "in" / name).shape[1::-1]


def test_there_are_a_hundred_cases():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 92  # and eight checkpoints, sixteen prompts below


@pytest.mark.parametrize("name, data, kind", CASES, ids=[name for name, *_ in CASES])
def test_spoilt_inputs_are_named_or_done_and_the_good_one_beside_them_is_done(
        weights, loaded, tmp_path, monkeypatch, name, data, kind):
    monkeypatch.setattr(predict, "load_model", lambda *_: loaded)
    inputs, message = lay(tmp_path, name, data), ""
    try:
        predict.main(predict.get_args_parser().parse_args(
            [*inputs, "--weights", str(weights), "--device", "cpu", "--output-dir", str(tmp_path / "out")]))
    except utils.InputError as error:
        message = str(error)
    check(tmp_path, name, data, kind, message)


@pytest.mark.parametrize("number", [0, 3, 6, 9, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 4, 5, 7, 8))])
def test_a_tenth_of_them_in_a_process_of_their_own(weights, tmp_path, script, number):
    name, data, kind = CASES[number * len(CASES) // 10]
    done = script("predict.py", *lay(tmp_path, name, data), "--weights", weights, "--device", "cpu", "--output-dir",
                  tmp_path / "out")
    assert "Traceback" not in done.stderr and done.returncode in (0, 2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("predict.py: error: ")]  # libtiff has its own
    assert len(lines) == (done.returncode == 2) and lines == done.stderr.splitlines()[-1:]
    check(tmp_path, name, data, kind, "".join(lines))


@pytest.mark.parametrize("spoil", range(8))
def test_spoilt_checkpoints_are_named(weights, tmp_path, spoil):
    whole, rng = weights.read_bytes(), np.random.default_rng(spoil)
    spoilt = bytearray(whole[:rng.integers(1, len(whole))] if spoil % 2 else whole)
    if spoil % 2 == 0:
        spoilt[rng.integers(64, len(whole) - 64)] ^= 255
    (tmp_path / "bad.pth").write_bytes(spoilt)
    Image.fromarray(noise(*SIZE)).save(tmp_path / "fine.png")
    args = [str(tmp_path / "fine.png"), "--weights", str(tmp_path / "bad.pth"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(utils.InputError, match=r"^[^\n]*bad\.pth: [^\n]*$"):
        predict.main(predict.get_args_parser().parse_args([*args, "--device", "cpu"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[" * 60000, "[]x", "3", "[1, 2]", '{"fine": 3}', '{"fine": {"boxes": 5}}',
                                  '"\\ud800"', '{"fine": {"boxes": [["a", 1, 2, 3]]}}',
                                  '{"fine": {"boxes": [[1, 2, 3]]}}', '{"fine": {"points": [[1e999, 2]]}}',
                                  '{"fine": {"points": [[NaN, 2, 1]]}}', '{"fine": {"boxes": [[9, 9, 1, 1]]}}',
                                  '{"fine": {"points": [[1, 2, 3, 4, 5]]}}',
                                  '{"other": {}}', json.dumps({"fine": {"boxes": [[1, 1, 9, 9]] * 300}})])
def test_spoilt_prompts_are_named(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    args = predict.get_args_parser().parse_args(["x", "--weights", "x", "--prompts", str(tmp_path / "prompts.json")])
    loaded = SimpleNamespace(net=predict.NETS["efficient_sam"], classes=[])
    with pytest.raises(utils.InputError, match=r"prompts.json|fine"):
        _, queries, bad = predict.plan_outputs([tmp_path / "fine.png"], loaded, args)
        if bad:
            raise utils.InputError(bad[0])
        predict.check_prompts("fine", queries["fine"], (*SIZE, 3))
