"""annotate.py over HTTP: clicks in, masks out, files that predict.py and the trainings read; who is refused."""
import ast
import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import annotate
import finetune_sam_decoder
import predict
import train_efficientsam
import utils
from conftest import QUIET, ROOT

CLICK, BACKGROUND, BOX = [30, 20, 1], [70, 40, 0], [10, 5, 50, 45]


def save_net(path, net, seed):
    """A checkpoint of a small net that was not trained; its masks have both values."""
    arch = {"model": "demo", "image_size": 64}
    torch.manual_seed(seed)
    model = predict.NETS[net].build(**arch)
    torch.save({"format": 2, "net": net, "arch": arch, "classes": [], "model": model.state_dict(),
                "args": {"preprocess": "article", "image_size": 64, "seed": seed}}, path)
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    kinds = {"efficient_sam": "efficient_sam", "efficient_sam2": "efficient_sam", "sam": "sam", "sam2": "sam2"}
    return {name: save_net(folder / f"{name}.pth", kind, len(name)) for name, kind in kinds.items()}


@pytest.fixture
def images(tmp_path):
    """a.png 96x64, b.jpg 50x80 turned by EXIF, c.png broken, <b>&.npy."""
    import demo_data
    folder = tmp_path / "images"
    folder.mkdir()
    drawn = demo_data.draw_object_ids(3)[0]
    Image.fromarray(drawn[:64, :96]).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(drawn[:50, :80]).save(folder / "b.jpg", exif=exif)
    (folder / "c.png").write_bytes(b"spoilt")
    np.save(folder / "d <b>&.npy", drawn[:40, :40])
    return folder


class Page:
    """What the page's script does, without the browser."""

    def __init__(self, server):
        self.server, self.session, self.key, self.port = server, server.session, server.key, server.server_port
        self.version = {}

    def request(self, method, path, body=None, key=None, host=None, **headers):
        """(status, headers, content) of one request; a str body is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, f"{path}{'&' if '?' in path else '?'}key={self.key if key is None else key}",
                              skip_host=True)
        for value in [f"127.0.0.1:{self.port}"] if host is None else host:
            connection.putheader("Host", value)
        body = body if isinstance(body, (str, type(None))) else json.dumps(body)
        if body is not None:
            headers = {"Content-Length": len(body), **headers}
        for name, value in headers.items():
            connection.putheader(name, str(value))
        connection.endheaders(body and body.encode())
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, reply.headers, content

    def ask(self, path, index, body=None, expect=200):
        status, headers, content = self.request("POST" if body is not None else "GET", f"{path}?index={index}", body)
        assert (status, headers["Content-Type"]) == (expect, "application/json"), content
        assert content.count(b"\n") == 1
        content = json.loads(content)
        if expect == 200:
            self.version[index] = content["version"]
        return content

    def do(self, index, action, prompt=None, expect=200):
        body = {"version": self.version.get(index, 0), "action": action, **({"prompt": prompt} if prompt else {})}
        return self.ask("/change", index, body, expect)

    def mask(self, state, which=0):
        """(H, W) bool: what is tinted, at the image's own size."""
        data = base64.b64decode(state["masks"][which].removeprefix("data:image/png;base64,"))
        pixels = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
        zoom = pixels.shape[1] // state["width"]
        return pixels[zoom // 2::zoom, zoom // 2::zoom, 3] > 0


@pytest.fixture
def start(tmp_path, nets, images):
    """start("--compare", ...) -> Page of a server in this process."""
    servers = []

    def call(*more, weights="efficient_sam", inputs=(images,)):
        options = ["--weights", nets[weights], "--device", "cpu", "--output-dir", tmp_path / "out", *inputs, *more]
        server = annotate.create_server(annotate.get_args_parser().parse_args([*map(str, options)]))
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return Page(server)
    yield call
    for server in servers:
        stop(server)


def stop(server):
    server.shutdown()
    server.server_close()
    server.session.folder_lock.close()


def predicted(tmp_path, weights, *more):
    """{name: mask of ids} by predict.py --prompts."""
    (tmp_path / "only.json").write_text((tmp_path / "out/prompts.json").read_text())
    args = ["--weights", weights, tmp_path / "images", "--prompts", tmp_path / "only.json", "--device", "cpu",
            "--output-dir", tmp_path / "predicted", "--overwrite", *more]
    with pytest.raises(utils.InputError, match="c.png|no prompts"):  # the broken image, and those without prompts
        predict.main(predict.get_args_parser().parse_args([*map(str, args)]))
    return {path.name.removesuffix("_mask.png"): utils.read_mask(path)
            for path in (tmp_path / "predicted").glob("*_mask.png")}


def annotate_some(page):
    page.do(0, "add", CLICK)
    page.do(0, "add", BACKGROUND)
    page.do(0, "next")
    page.do(0, "add", BOX)
    page.do(0, "add", [40, 40, 1])
    page.do(0, "next")
    page.do(0, "add", [80, 50, 1])
    page.do(1, "add", [40, 70, 1])
    page.do(3, "add", [1, 1, 39, 39])


# --- Clicks and masks ---

@pytest.mark.parametrize("weights", ["efficient_sam", "sam", "sam2"])
def test_saved_masks_equal_those_of_predict_to_the_bit(start, nets, tmp_path, weights):
    page = start(weights=weights)
    annotate_some(page)
    clicks = [[x, 60, 1] for x in range(5, 35, 5)] if weights != "efficient_sam" else []  # which takes six points
    for click in clicks:
        page.do(1, "add", click)
    assert not list((tmp_path / "out").rglob("*.png"))  # nothing before s
    assert page.ask("/save", 0, {})["unsaved"] == 0
    assert page.do(0, "next")["unsaved"] == 0  # which changes no mask
    masks = {item.name: utils.read_mask(page.session.files(item)[0][0]) for item in page.session.items[:2] +
             page.session.items[3:]}
    expected = predicted(tmp_path, nets[weights])
    assert masks.keys() == expected.keys() == {"a", "b", "d <b>&"}
    for name, mask in masks.items():
        assert (mask == expected[name]).all() and mask.any()
    assert set(np.unique(masks["a"])) <= {0, 1, 2, 3} and len(np.unique(masks["a"])) > 2
    assert masks["b"].shape == (80, 50)  # EXIF rotation applied
    assert json.loads((tmp_path / "out/prompts.json").read_text()) == {
        "a": [{"points": [CLICK, BACKGROUND]}, {"boxes": [BOX], "points": [[40, 40, 1]]}, {"points": [[80, 50, 1]]}],
        "b": [{"points": [[40, 70, 1], *clicks]}], "d <b>&": [{"boxes": [[1, 1, 39, 39]]}]}


def test_the_mask_on_the_page_is_the_saved_one(start, tmp_path):
    page = start()
    state = page.do(0, "add", CLICK)
    assert (state["name"], state["width"], state["height"], state["unsaved"]) == ("a", 96, 64, 1)
    assert state["prompts"] == [CLICK] and state["objects"] == 1 and len(state["masks"]) == 1
    other = page.mask(page.do(0, "add", BACKGROUND))
    page.do(0, "undo")
    page.ask("/save", 0, {})
    saved = utils.read_mask(tmp_path / "out/gts/a.png") > 0
    assert (page.mask(state) == saved).all() and (other != saved).any()
    status, headers, photo = page.request("GET", "/image?index=1")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg") and Image.open(io.BytesIO(photo)).size == (50, 80)


def test_of_several_masks_the_page_shows_the_best(start):
    page = start()
    loaded = page.session.nets[0]
    first = page.mask(page.do(0, "add", CLICK))

    def decode(*query):
        return (*loaded.net.decode(*query)[:2], torch.full((len(query[3]),), 2))

    page.session.nets[0] = loaded._replace(net=loaded.net._replace(decode=decode))
    page.do(0, "undo")
    page.session.cut_out.cache_clear()
    third = page.do(0, "add", CLICK)
    page.ask("/save", 0, {})
    saved = utils.read_mask(page.session.mask_dirs[0] / "a.png") > 0
    assert (page.mask(third) == saved).all() and (first != saved).any()


def test_a_page_that_was_not_copied_is_named(start, monkeypatch, tmp_path):
    monkeypatch.setattr(annotate, "__file__", str(tmp_path / "annotate.py"))
    with pytest.raises(utils.InputError, match="annotate.html: No such file or directory; copy it with annotate.py"):
        start()


def test_large_images_are_scaled_for_the_screen_and_clicks_are_not(start, images, monkeypatch):
    monkeypatch.setattr(annotate, "SCREEN", 48)
    page = start(inputs=[images / "a.png"])
    assert Image.open(io.BytesIO(page.request("GET", "/image?index=0")[2])).size == (48, 32)
    small = page.do(0, "add", [90, 60, 1])
    assert (small["width"], small["height"]) == (96, 64)
    pixels = Image.open(io.BytesIO(base64.b64decode(small["masks"][0].split(",")[1])))
    assert pixels.size == (48 * 20, 32 * 20)
    page.ask("/save", 0, {})
    saved = utils.read_mask(page.session.mask_dirs[0] / "a.png") > 0
    shown = np.array(pixels.resize((96, 64), 0))[..., 3] > 0
    assert saved.shape == (64, 96) and (saved == shown).mean() > 0.8  # rims of half the size are coarser
    assert max((saved == other).mean() for other in (shown[::-1], shown[:, ::-1])) < 0.7
    page.do(0, "add", [97, 60, 1], expect=422)  # outside the image's own pixels


def test_the_visible_part_is_sent_at_the_images_own_resolution(start, images, monkeypatch):
    monkeypatch.setattr(annotate, "SCREEN", 24)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    pixels[:32, :48] = 200, 60, 60
    pixels[20, 10:16] = 20, 240, 240
    Image.fromarray(pixels).save(images / "a.png")
    page = start(inputs=[images / "a.png"])
    whole = page.do(0, "add", BOX)
    assert whole["part"] == [0, 0, 96, 64]
    page.ask("/save", 0, {})
    saved = utils.read_mask(page.session.mask_dirs[0] / "a.png") > 0
    for part in ([0, 0, 24, 24], [30, 20, 51, 28], [95, 63, 96, 64], [0, 0, 96, 64]):
        x0, y0, x1, y1 = part
        text = ",".join(map(str, part))
        photo = np.array(Image.open(io.BytesIO(page.request("GET", f"/image?index=0&part={text}")[2])), int)
        state = json.loads(page.request("GET", f"/state?index=0&part={text}")[2])
        shown = page.mask({**state, "width": min(24, x1 - x0)})
        assert state["part"] == part
        if part == [0, 0, 96, 64]:
            assert shown.shape == photo.shape[:2] == (16, 24) and state["masks"] == whole["masks"]
            assert (shown == saved[2::4, 2::4]).all()  # the pixels in the middle of those that it stands for
            continue
        assert (shown == saved[y0:y1, x0:x1]).all() and photo.shape == (y1 - y0, x1 - x0, 3)
        if part == [0, 0, 24, 24]:
            assert shown.any() and not shown.all()
            assert abs(photo - pixels[y0:y1, x0:x1]).max() < 50  # JPEG, but a line of a pixel keeps its colour
    for text in ("0,0,97,64", "0,0,96,65", "5,5,5,9", "5,9,9,9", "9,9,5,12", "1,2,3", "1,2,3,4,5", "-1,0,9,9", "a",
                 "0,0,1.5,9", "0,0,99999999,9", "%C2%B2,0,9,9"):
        for path in ("/image", "/state"):
            assert refused(page, 422, "GET", f"{path}?index=0&part={text}").startswith("part must be x0,y0,x1,y1")


def test_undo_takes_back_one_prompt_and_walks_into_earlier_objects(start):
    page = start()
    first, second = page.do(0, "add", CLICK), page.do(0, "add", BACKGROUND)
    page.do(0, "next")
    assert page.do(0, "next")["version"] == page.do(0, "next")["version"]  # an empty object is not left behind
    page.do(0, "add", BOX)
    replaced = page.do(0, "add", [1, 1, 90, 60])  # a second box takes the first one's place
    assert page.session.items[0].entries()[1] == {"boxes": [[1, 1, 90, 60]]} and replaced["objects"] == 2
    assert page.do(0, "undo")["prompts"] == [BOX]  # and gives it back
    assert page.do(0, "undo")["prompts"] == []
    third = page.do(0, "undo")
    assert third["prompts"] == [CLICK] and third["masks"] == first["masks"] != second["masks"]
    page.do(0, "undo")
    assert page.do(0, "undo")["objects"] == 0  # once more does nothing
    assert page.do(0, "undo")["version"] == page.version[0]
    assert "a" not in json.loads((page.session.folder / "prompts.json").read_text())


def test_compare_shows_both_and_saves_the_first(start, nets, tmp_path):
    page = start("--compare", nets["efficient_sam2"])
    state = page.do(0, "add", BOX)
    assert state["titles"] == [str(nets["efficient_sam"]), str(nets["efficient_sam2"])] and len(state["scores"]) == 2
    assert (page.mask(state, 0) != page.mask(state, 1)).any()
    page.ask("/save", 0, {})
    assert (utils.read_mask(tmp_path / "out/gts/a.png") == predicted(tmp_path, nets["efficient_sam"])["a"]).all()
    assert page.request("GET", "/")[2].count(b"i < 2; i++") == 1
    alone = start("--output-dir", tmp_path / "other", weights="efficient_sam2").do(0, "add", BOX)
    assert alone["masks"][0] == state["masks"][1] and alone["scores"][0] == state["scores"][1]


def test_an_image_is_encoded_once(start, monkeypatch):
    page, calls = start(), []
    net = page.session.nets[0].net
    loaded = page.session.nets[0]
    counted = net._replace(encode=lambda *args: calls.append(torch.is_grad_enabled()) or net.encode(*args))
    page.session.nets[0] = loaded._replace(net=counted)
    annotate_some(page)
    page.ask("/save", 0, {})
    page.ask("/state", 0)
    assert calls == [False] * 3


def test_a_broken_image_is_named_and_the_others_go_on(start):
    page = start()
    for path, body in (("/state", None), ("/change", {"version": 0, "action": "add", "prompt": CLICK})):
        assert re.search("c.png: not an image", page.ask(path, 2, body, expect=422)["error"])
    assert b"c.png: not an image" in page.request("GET", "/image?index=2")[2]
    assert page.do(0, "add", CLICK)["objects"] == 1


# --- Work is kept ---

def test_two_tabs_do_not_undo_each_other_unawares(start):
    page = start()
    other = Page(page.server)
    page.do(0, "add", CLICK)
    for action, prompt in (("add", BOX), ("undo", None), ("next", None)):
        assert "another tab" in other.do(0, action, prompt, expect=409)["error"]
    assert page.session.items[0].entries() == [{"points": [CLICK]}]
    assert other.ask("/state", 0)["prompts"] == [CLICK]
    other.do(0, "next")
    page.do(0, "add", BACKGROUND, expect=409)  # it would have gone to another object
    other.do(1, "add", [5, 5, 1])
    page.do(3, "add", [5, 5, 1])  # of other images nobody minds


def test_clicks_at_once_all_count_or_are_refused(start):
    page, replies = start(), []

    def click(x):
        body = {"version": 0, "action": "add", "prompt": [x, 5, 1]}
        replies.append((page.request("POST", "/change?index=0", body)[0], x))
    threads = [threading.Thread(target=click, args=(x,)) for x in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (x,) = [x for status, x in replies if status == 200]
    assert sorted(status for status, _ in replies) == [200] + [409] * 5
    assert page.session.items[0].entries() == [{"points": [[x, 5, 1]]}]


def test_twenty_tabs_and_hostile_requests_at_once_lose_no_click(start, tmp_path, capfd):
    """Each tab clicks once, again where another was first; between them come requests that are refused."""
    page, done, files = start(), [], len(os.listdir("/proc/self/fd"))

    def work(number):
        tab, index = Page(page.server), (0, 1, 3)[number % 3]
        status = 0
        while status != 200:
            version = tab.ask("/state", index)["version"]
            action = {"action": "next"} if status == 422 else {"action": "add", "prompt": [number, 5, 1]}
            status = tab.request("POST", f"/change?index={index}", {"version": version, **action})[0]
            status = 0 if action == {"action": "next"} else status  # 422: an object takes six points
            refused(tab, 403, "GET", "/state?index=0", key="x")
            refused(tab, 400, "POST", f"/change?index={index}", "[" * 60000)
            refused(tab, 413, "POST", f"/save?index={index}", **{"Content-Length": annotate.MAX_BODY + 1})
            with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
                connection.sendall(b"POST /save?key=")  # and leaves, by a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        done.append(number)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clicks = [point for item in page.session.items for entry in item.entries() for point in entry["points"]]
    assert sorted(done) == list(range(20)) and sorted(clicks) == [[number, 5, 1] for number in range(20)]
    page.ask("/save", 0, {})
    saved = json.loads((tmp_path / "out/prompts.json").read_text())
    assert sum(len(entry["points"]) for entries in saved.values() for entry in entries) == 20
    assert len(os.listdir("/proc/self/fd")) <= files + 2  # a thread of the server may be about to end
    stop(page.server)
    assert "Traceback" not in capfd.readouterr().err  # those who left are no error


def test_sixty_connections_at_once_wait_for_the_server(nets, images, tmp_path):
    parser = annotate.get_args_parser()
    options = ["--weights", str(nets["efficient_sam"]), str(images / "a.png"), "--output-dir", str(tmp_path / "out")]
    server = annotate.create_server(parser.parse_args([*options, "--device", "cpu"]))
    connections = [socket.create_connection(("127.0.0.1", server.server_port), timeout=1) for _ in range(60)]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for connection in connections:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
    for connection in connections:
        connection.settimeout(20)
        assert b" 403 " in connection.recv(100)  # no key
        connection.close()
    stop(server)


@pytest.mark.parametrize("path, body", [("/state", None), ("/change", {"version": 0, "action": "add", "prompt": CLICK}),
                                        ("/save", {})])
def test_changes_and_saving_take_turns(start, path, body):
    page, replies = start(), []
    thread = threading.Thread(target=lambda: replies.append(page.ask(path, 0, body)))
    with page.session.lock:
        thread.start()
        thread.join(0.2)
        assert not replies and page.session.items[0].version == 0
    thread.join()
    assert len(replies) == 1


def test_a_restart_continues_and_keeps_what_it_does_not_show(start, images, tmp_path, nets):
    page = start()
    annotate_some(page)
    page.ask("/save", 0, {})
    page.do(3, "add", [5, 5, 1])  # its mask is not written: as after kill -9
    stop(page.server)
    before = json.loads((tmp_path / "out/prompts.json").read_text())
    again = start(inputs=[images / "a.png", images / "b.jpg"])
    state = again.ask("/state", 0)
    assert state["objects"] == 3 and state["prompts"] == [] and state["unsaved"] == 0
    assert again.do(0, "undo")["objects"] == 2
    assert json.loads((tmp_path / "out/prompts.json").read_text()) == {**before, "a": before["a"][:2]}
    again.ask("/save", 0, {})
    stop(again.server)
    third = start()
    assert third.ask("/state", 0)["unsaved"] == 1  # d's mask is still the old one
    third.ask("/save", 0, {})
    expected = predicted(tmp_path, nets["efficient_sam"])
    assert (utils.read_mask(tmp_path / "out/gts/d <b>&.png") == expected["d <b>&"]).all()
    stop(third.server)
    (tmp_path / "out/gts/b.png").unlink()
    assert start().ask("/state", 0)["unsaved"] == 1


def test_each_layout_of_one_folder_knows_what_it_lacks(start, tmp_path):
    page = start()
    page.do(0, "add", CLICK)
    page.do(1, "add", [5, 5, 1])
    page.ask("/save", 0, {})
    old = utils.read_mask(tmp_path / "out/gts/a.png")
    stop(page.server)
    page = start("--to", "masks")
    assert page.ask("/state", 0)["unsaved"] == 2
    page.do(0, "undo")
    page.do(0, "add", BOX)
    page.do(1, "undo")
    page.ask("/save", 0, {})
    stop(page.server)
    assert (utils.read_mask(tmp_path / "out/gts/a.png") == old).all() and (tmp_path / "out/gts/b.png").exists()
    page = start()
    assert page.ask("/state", 0)["unsaved"] == 2
    page.ask("/save", 0, {})
    new = utils.read_mask(tmp_path / "out/gts/a.png")
    assert (new > 0).tolist() == (utils.read_mask(tmp_path / "out/masks/0/a.png") > 0).tolist() != (old > 0).tolist()
    assert not (tmp_path / "out/gts/b.png").exists()
    stop(page.server)
    (tmp_path / "out/unsaved.json").write_text('["a"]')  # of an earlier version
    assert start().ask("/state", 0)["unsaved"] == 1


def test_s_makes_the_mask_of_the_shown_image_anew_by_other_weights(start, tmp_path, nets):
    page = start()
    annotate_some(page)
    page.ask("/save", 0, {})
    stop(page.server)
    before = {path.stem: utils.read_mask(path) for path in (tmp_path / "out/gts").glob("*.png")}
    start(weights="efficient_sam2").ask("/save", 0, {})
    expected, after = predicted(tmp_path, nets["efficient_sam2"]), utils.read_mask(tmp_path / "out/gts/a.png")
    assert (after == expected["a"]).all() and (after != before["a"]).any()
    assert (utils.read_mask(tmp_path / "out/gts/b.png") == before["b"]).all()  # nobody looked at it


def test_what_predict_reads_can_be_continued_too(start, tmp_path):
    (tmp_path / "out").mkdir()
    given = {"a": {"boxes": [BOX], "points": [CLICK]}, "z": {"boxes": []}}
    (tmp_path / "out/prompts.json").write_text(json.dumps(given))
    page = start()
    assert page.session.items[0].entries() == [{"boxes": [BOX], "points": [CLICK]}]
    page.do(1, "add", [1, 1, 1])
    assert json.loads((tmp_path / "out/prompts.json").read_text())["z"] == {"boxes": []}


def test_an_image_without_objects_any_more_has_no_mask(start, images, tmp_path):
    page = start()
    page.do(0, "add", CLICK)
    page.ask("/save", 0, {})
    assert (tmp_path / "out/gts/a.png").exists() and (tmp_path / "out/imgs/a.png").exists()
    page.do(0, "undo")
    page.ask("/save", 0, {})
    assert not (tmp_path / "out/gts/a.png").exists() and not (tmp_path / "out/imgs/a.png").exists()
    assert (images / "a.png").exists()


def test_images_of_one_name_are_told_apart_as_by_predict(start, images, nets, tmp_path):
    (images / "more").mkdir()
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(images / "more/a.png")
    page = start(inputs=[images / "a.png", images / "more/a.png"])
    page.do(0, "add", CLICK)
    page.do(1, "add", [5, 6, 1])
    page.ask("/save", 0, {})
    names = {path.stem for path in (tmp_path / "out/gts").iterdir()}
    predict.main(predict.get_args_parser().parse_args([*map(str, (
        "--weights", nets["efficient_sam"], images / "a.png", images / "more/a.png", "--device", "cpu", "--prompts",
        tmp_path / "out/prompts.json", "--output-dir", tmp_path / "predicted"))]))
    assert names == {f.name.removesuffix("_mask.png") for f in (tmp_path / "predicted").glob("*_mask.png")}
    assert names == {"images_a_png", "more_a_png"}


def test_a_data_set_can_be_worked_on_in_place_and_masks_of_others_are_safe(start, images, tmp_path):
    (tmp_path / "out/gts").mkdir(parents=True)
    images.rename(tmp_path / "out/imgs")
    page = start(inputs=[tmp_path / "out/imgs"])
    page.do(0, "add", CLICK)
    page.ask("/save", 0, {})
    page.do(0, "undo")
    page.ask("/save", 0, {})
    assert (tmp_path / "out/imgs/a.png").exists()  # the image itself, no copy
    stop(page.server)
    utils.save_mask(tmp_path / "out/gts/a.png", np.ones((64, 96)))
    with pytest.raises(utils.InputError, match=r"gts/a.png: exists, and .*prompts.json has no objects of it"):
        start(inputs=[tmp_path / "out/imgs"])


def test_a_full_disk_loses_nothing(start, monkeypatch, tmp_path, capfd):
    page = start()
    page.do(0, "add", CLICK)
    before = (tmp_path / "out/prompts.json").read_text()
    with monkeypatch.context() as patch:
        def full(*_):
            raise OSError(28, "No space left on device", "prompts.json")
        patch.setattr(annotate.os, "fsync", full)
        answer = page.do(0, "add", BACKGROUND, expect=500)
        assert answer["error"] == "prompts.json: No space left on device; all prompts are still there"
    assert (tmp_path / "out/prompts.json").read_text() == before
    assert page.ask("/state", 0)["prompts"] == [CLICK, BACKGROUND]
    page.ask("/save", 0, {})
    assert "70, 40, 0" in (tmp_path / "out/prompts.json").read_text()
    assert "Traceback" in capfd.readouterr().err  # in the terminal, not on the page


def test_one_mask_that_cannot_be_written_does_not_stop_the_others(start, tmp_path, images):
    page = start()
    page.session.embed = page.session.embed.__wrapped__  # nothing is kept
    page.do(0, "add", CLICK)
    page.do(1, "add", [5, 5, 1])
    (images / "a.png").unlink()
    page.session.read.cache_clear()
    assert "a.png: no such file" in page.ask("/save", 1, {}, expect=422)["error"]
    assert (tmp_path / "out/gts/b.png").exists() and page.ask("/state", 1)["unsaved"] == 1


def test_an_image_that_is_gone_is_named_with_the_remedy(start, tmp_path, images, monkeypatch):
    page = start()
    page.do(0, "add", CLICK)
    page.do(1, "add", [5, 5, 1])
    page.do(3, "add", [5, 5, 1])
    (images / "a.png").unlink()  # what the net needs of it is known
    error = page.ask("/save", 1, {}, expect=422)["error"]
    assert error == f"{images}/a.png: No such file or directory; put it back, or undo its objects"
    assert sorted(path.name for path in (tmp_path / "out/gts").iterdir()) == ["b.png", "d <b>&.png"]
    page.do(0, "undo")
    assert page.ask("/save", 0, {})["unsaved"] == 0


def test_a_copy_is_whole_or_not_there(start, tmp_path, images, monkeypatch):
    page, whole = start(), (images / "a.png").read_bytes()
    page.do(0, "add", CLICK)
    with monkeypatch.context() as patch:
        def full(path, content):
            with open(path, "wb") as file:
                file.write(content[:50])
            raise OSError(28, "No space left on device")
        patch.setattr(annotate.Path, "write_bytes", full)
        assert "output: No space left on device" in page.ask("/save", 0, {}, expect=500)["error"]
    assert not (tmp_path / "out/imgs/a.png").exists()
    shutil.rmtree(tmp_path / "out/imgs")
    page.ask("/save", 0, {})
    assert (tmp_path / "out/imgs/a.png").read_bytes() == whole


def test_ctrl_c_saves_everything(nets, images, tmp_path):
    command = [sys.executable, ROOT / "annotate.py", "--weights", nets["efficient_sam"], images, "--device", "cpu",
               "--output-dir", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", **QUIET})
    try:
        assert process.stdout.readline().startswith("4 images, efficient_sam on cpu; Ctrl-C saves")
        url = process.stdout.readline()
        port, key = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?key=([\w-]{20,})\n", url).groups()
        page = Page(SimpleNamespace(session=None, key=key, server_port=int(port)))
        page.do(0, "add", CLICK)
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "annotate.py: stopped by SIGINT\n"
    assert "objects saved: 1, in" in out
    assert (utils.read_mask(tmp_path / "out/gts/a.png") == predicted(tmp_path, nets["efficient_sam"])["a"]).all()


def test_sigterm_saves_everything_and_takes_no_more(nets, images, tmp_path, monkeypatch):
    created, made = [], annotate.create_server
    monkeypatch.setattr(annotate, "create_server", lambda args: created.append(made(args)) or created[0])

    def stop_asked():  # main asks it again and again
        page = Page(created[0])
        page.do(0, "add", CLICK)
        return True
    monkeypatch.setattr(utils, "stop_asked", stop_asked)
    monkeypatch.setattr(utils, "raise_if_stopped", lambda: created[0].session.lock.locked() or 1 / 0)
    options = ["--weights", nets["efficient_sam"], images, "--device", "cpu", "--output-dir", tmp_path / "out"]
    annotate.main(annotate.get_args_parser().parse_args([*map(str, options)]))
    created[0].session.folder_lock.close()
    assert (tmp_path / "out/gts/a.png").exists()
    assert json.loads((tmp_path / "out/unsaved.json").read_text())["npy"] == []


# --- Layouts ---

def test_efficientsam_trains_on_what_is_saved(start, tmp_path):
    page = start()
    annotate_some(page)
    page.ask("/save", 0, {})
    items = train_efficientsam.find_items(tmp_path / "out")
    assert [item[0] for item in items] == ["a", "b", "d <b>&"]
    for item in items:
        image, ids = train_efficientsam.read_item(item)
        assert image.shape[:2] == ids.shape and ids.any()


def test_the_sam_decoder_trains_on_what_is_saved(start, tmp_path):
    page = start("--to", "voc")
    annotate_some(page)
    page.ask("/save", 0, {})
    args = SimpleNamespace(masks="object")
    root = finetune_sam_decoder.find_root(tmp_path / "out", "2012")
    items = finetune_sam_decoder.find_items(root, "train", args)
    assert [item[0] for item in items] == ["a", "d <b>&"] and items[1][1].suffix == ".png"
    assert finetune_sam_decoder.find_items(root, "val", args)[0][0] == "b"
    assert finetune_sam_decoder.read_ids(items[0]).max() >= 2
    for number in range(4):  # the fourth to the seventh
        utils.save_mask(page.session.mask_dirs[0] / f"{number}.png", np.ones((4, 4)))
    page.ask("/save", 0, {})
    lists = root / "ImageSets/Segmentation"
    assert (lists / "val.txt").read_text() == "b\n3\n"  # the second and the seventh
    assert (lists / "train.txt").read_text() == "a\nd <b>&\n0\n1\n2\n"
    page.do(1, "undo")
    page.ask("/save", 0, {})
    assert (lists / "train.txt").read_text() == "a\nd <b>&\n0\n1\n2\n" and (lists / "val.txt").read_text() == "3\n"


@pytest.mark.parametrize("before", [None, "train"])
def test_two_images_are_enough_for_both_lists(start, tmp_path, before):
    page = start("--to", "voc")
    lists = tmp_path / "out/VOCdevkit/VOC2012/ImageSets/Segmentation"
    for index in (0, 1):
        page.do(index, "add", [20, 20, 1])
    if before:  # all in one list, as of an earlier version
        page.ask("/save", 0, {})
        (lists / "val.txt").write_text("")
        (lists / "train.txt").write_text("a\nb\n")
    page.ask("/save", 0, {})
    assert ((lists / "train.txt").read_text(), (lists / "val.txt").read_text()) == ("a\n", "b\n")
    page.do(1, "undo")
    page.ask("/save", 0, {})
    assert ((lists / "train.txt").read_text(), (lists / "val.txt").read_text()) == ("a\n", "")


# --- Classes ---

def rectangles(monkeypatch, *boxes):
    """The net finds these, whatever is clicked."""
    def each_object(parts):
        objects = [logits for part in parts for logits in part[0]]
        for (x0, y0, x1, y1), logits in zip(boxes, objects):
            mask = np.zeros((1, *logits.shape[-2:]), bool)
            mask[0, y0:y1, x0:x1] = True
            yield mask, [1.0], 0
    monkeypatch.setattr(predict, "each_object", each_object)


def label_pets(page):
    """Two cats, and a dog that lies above the first, on two images."""
    page.do(0, "add", CLICK)
    page.do(0, "next")
    page.do(0, "class", [2])
    page.do(0, "add", BOX)
    page.do(1, "add", [40, 70, 1])


def test_a_key_chooses_the_class_of_the_current_object(start, tmp_path):
    page = start("--classes", " cat,hot  dog")
    state = page.ask("/state", 0)
    assert state["class"] == "cat" and [name for _, name in state["classes"]] == ["cat", "hot dog"]
    assert page.do(0, "class", [2])["class"] == "hot dog" and page.do(0, "undo")["class"] == "hot dog"
    assert page.do(0, "add", CLICK)["unsaved"] == 1
    page.ask("/save", 0, {})
    assert page.do(0, "next")["class"] == "hot dog"  # until another is chosen
    assert page.do(0, "class", [1])["unsaved"] == 0  # which changes no mask
    page.do(0, "add", BOX)
    page.ask("/save", 0, {})
    changed = page.do(0, "class", [2])
    assert (changed["class"], changed["unsaved"], changed["objects"]) == ("hot dog", 1, 2)
    page.do(0, "class", [1])
    assert json.loads((tmp_path / "out/prompts.json").read_text()) == {
        "a": [{"class": "hot dog", "points": [CLICK]}, {"class": "cat", "boxes": [BOX]}]}
    for number in (0, 3, 1.5, -1):
        assert "--classes names 2" in page.do(0, "class", [number], expect=422)["error"]
    stop(page.server)
    again = start("--classes", "cat,hot dog").ask("/state", 0)
    assert (again["class"], again["objects"]) == ("cat", 2)
    assert "--classes names 0" in start("--output-dir", tmp_path / "x").do(0, "class", [1], expect=422)["error"]


def test_objects_have_the_colour_of_their_class(start):
    page = start("--classes", "cat,dog")
    colours = {}
    for number in (1, 2, 1):
        state = page.do(0, "class", [number])
        state = page.do(0, "add", BOX if not colours else CLICK)
        data = base64.b64decode(state["masks"][0].split(",")[1])
        pixels = np.array(Image.open(io.BytesIO(data)))
        inside = pixels[pixels[..., 3] == 100][:, :3]
        colours.setdefault(number, {"#%02x%02x%02x" % tuple(pixel) for pixel in inside})
    assert colours == {k: {annotate.COLOURS[k - 1]} for k in (1, 2)}
    assert [colour for colour, _ in state["classes"]] == annotate.COLOURS[:2]
    assert len({*annotate.COLOURS}) == 9


def test_deeplab_and_sam_train_on_classes(start, tmp_path, monkeypatch):
    import train_deeplabv3
    rectangles(monkeypatch, [2, 2, 30, 30], [20, 10, 40, 40])
    page = start("--classes", "猫,dog", "--to", "voc")
    label_pets(page)
    page.ask("/save", 0, {})
    root = train_deeplabv3.find_root(tmp_path / "out", "2012")
    assert train_deeplabv3.find_classes(root, 2) == ["background", "猫", "dog"]
    (item,), (other,) = [train_deeplabv3.find_items(root, part) for part in ("train", "val")]
    _, label = train_deeplabv3.read_item(item, 2)
    assert label[5, 5] == 1 and label[15, 25] == label[35, 35] == 2 and label[50, 50] == 0  # the later lies above
    assert {*np.unique(train_deeplabv3.read_item(other, 2)[1])} == {0, 1}
    args = SimpleNamespace(masks="object")
    ids = finetune_sam_decoder.read_ids(finetune_sam_decoder.find_items(root, "train", args)[0])
    assert ((ids > 0) == (label > 0)).all() and ids[15, 25] == 2 and ids[5, 5] == 1
    assert finetune_sam_decoder.find_class_names(root)[2] == "dog"


def test_unet_trains_on_classes_that_are_whole_where_they_overlap(start, tmp_path, monkeypatch):
    import train_unet
    rectangles(monkeypatch, [2, 2, 30, 30], [20, 10, 40, 40])
    page = start("--classes", "cat,dog", "--to", "masks")
    label_pets(page)
    page.do(3, "class", [2])
    page.do(3, "add", [20, 20, 1])
    page.ask("/save", 0, {})
    args = SimpleNamespace(img_ext=None, mask_ext=None, num_classes=2)
    items, names = train_unet.find_items(tmp_path / "out", args)
    assert [item[0] for item in items] == ["a", "b", "d <b>&"] and names == ["cat", "dog"]
    cat, dog = train_unet.read_item(items[0])[1]
    assert cat.sum() == 28 * 28 and dog.sum() == 20 * 30 and (cat * dog).sum() == 10 * 20
    assert [mask.any() for mask in train_unet.read_item(items[1])[1]] == [True, False]  # a mask of each class
    page.do(0, "undo")
    page.do(0, "undo")
    page.ask("/save", 0, {})
    assert not list((tmp_path / "out").rglob("a.png"))  # of an image without objects nothing is left


def test_masks_of_no_classes_are_one_folder(start, tmp_path):
    import train_unet
    page = start("--to", "masks")
    annotate_some(page)
    page.ask("/save", 0, {})
    args = SimpleNamespace(img_ext=None, mask_ext=None, num_classes=1)
    items, _ = train_unet.find_items(tmp_path / "out", args)
    assert len(items) == 3 and all(train_unet.read_item(item)[1].any() for item in items)
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["0"]


@pytest.mark.parametrize("layout", ["voc", "masks"])
def test_ids_of_classes_never_change_their_meaning(start, tmp_path, layout):
    page = start("--classes", "cat,dog", "--to", layout)
    label_pets(page)
    page.ask("/save", 0, {})
    stop(page.server)
    for names in ("dog,cat", "cat", "cat,cow,dog", "cats,dog", None):
        with pytest.raises(utils.InputError, match="has other classes than --classes, or in another order"):
            start("--to", layout, *(["--classes", names] if names else []))
    page = start("--classes", "cat,dog,cow", "--to", layout)
    assert page.ask("/state", 0)["unsaved"] == (2 if layout == "masks" else 0)  # no image has a mask of cows
    page.ask("/save", 0, {})
    assert page.ask("/state", 0)["unsaved"] == 0
    if layout == "masks":
        assert [path.name for path in sorted((tmp_path / "out/masks/2").iterdir())] == ["a.png", "b.png"]


@pytest.mark.parametrize("entry, more, words", [
    ({"class": "cow"}, ["--classes", "cat"], "an object has the class cow, but --classes names cat"),
    ({}, ["--classes", "cat"], "an object has no class, but --classes names cat"),
    ({"class": " cow "}, [], "an object has the class cow, but --classes names none")])
def test_earlier_objects_of_other_classes_are_named(start, tmp_path, entry, more, words):
    (tmp_path / "out").mkdir()
    for name in ("a", "elsewhere"):  # which is not among the images given
        text = json.dumps({name: [{**entry, "points": [CLICK]}]})
        (tmp_path / "out/prompts.json").write_text(text)
        with pytest.raises(utils.InputError, match=f"{name}: {words}"):
            start(*more)
        assert (tmp_path / "out/prompts.json").read_text() == text


@pytest.mark.parametrize("text", ["", "a,a", "a,,b", "a, a ", "background,a", "1,2,3,4,5,6,7,8,9,10"])
def test_classes_that_cannot_be(text, capsys):
    with pytest.raises(SystemExit):
        annotate.get_args_parser().parse_args(["x", "--weights", "x", "--classes", text])
    assert "one to nine different names" in capsys.readouterr().err


def test_classes_are_written_as_voc_unless_asked_otherwise(start, tmp_path):
    page = start("--classes", "cat,dog")
    label_pets(page)
    page.ask("/save", 0, {})
    assert (tmp_path / "out/VOCdevkit/VOC2012/SegmentationClass/a.png").exists()
    stop(page.server)
    page = start("--classes", "cat,dog", "--to", "npy")
    assert page.ask("/save", 0, {})["unsaved"] == 0 and (tmp_path / "out/gts/a.png").exists()


# --- Names ---

ODD = [" a", "a ", "a", "\xa0b", "b\xa0", "b c", "c\u2028d\x85", "\t", "e\u0301", "#f", "g\ufeff", "%20a", "𝔥"]


@pytest.fixture
def odd(tmp_path):
    """Images of names that lists have to keep, among them bytes that are no UTF-8."""
    (tmp_path / "odd").mkdir()
    names = [*(name for name in ODD if name.strip()), os.fsdecode(b"\xff\xe9"), os.fsdecode(b"z\xb0")]
    for k, name in enumerate(names):
        Image.fromarray(np.full((12, 16, 3), 9 * k, np.uint8)).save(tmp_path / f"odd/{name}.png")
    return {unicodedata.normalize("NFC", name): name for name in names}


def listed(tmp_path):
    """IDs of both lists as the training script reads them."""
    root, args = finetune_sam_decoder.find_root(tmp_path / "out", "2012"), SimpleNamespace(masks="object")
    return [item[0] for part in ("train", "val") for item in finetune_sam_decoder.find_items(root, part, args)]


def test_every_name_is_read_back_from_the_lists(start, odd, tmp_path):
    for session in range(2):  # started again, it goes on
        page = start("--to", "voc", inputs=[tmp_path / "odd"])
        for index in range(len(odd) - 1 if session == 0 else len(odd)):
            page.do(index, "add", [3 + session, 3, 1])
            page.ask("/save", index, {}) if index < 2 else None
        page.session.save()
        stop(page.server)
        names = listed(tmp_path)
        assert len(names) == len(odd) - 1 + session and len(set(names)) == len(names) and set(names) <= set(odd)
        if session == 0:
            before = names
    assert set(before) < set(names)
    lists = tmp_path / "out/VOCdevkit/VOC2012/ImageSets/Segmentation"
    text = (lists / "train.txt").read_bytes()
    (lists / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))  # as an editor on Windows
    start("--to", "voc", inputs=[tmp_path / "odd"]).session.save()
    assert (lists / "train.txt").read_bytes() == text


@pytest.mark.parametrize("name", ["a\nb", "a\r", " ", ".a", "\ufeffa", os.fsdecode(b"\xff\xfea")])
def test_names_that_no_list_can_hold_are_refused_where_there_are_lists(start, tmp_path, name):
    utils.save_image(tmp_path / f"{name}.png", np.full((12, 16, 3), 9, np.uint8))
    with pytest.raises(utils.InputError, match="a list of images cannot hold this name; rename the file") as caught:
        start("--to", "voc", inputs=[tmp_path / f"{name}.png"])
    assert "\n" not in str(caught.value)
    page = start("--output-dir", tmp_path / "npy", inputs=[tmp_path / f"{name}.png"])
    page.do(0, "add", [3, 3, 1])
    page.session.save()
    assert (tmp_path / f"npy/gts/{name}.png").exists()


def test_masks_of_such_names_are_in_no_list_and_a_list_of_other_text_is_named(start, tmp_path):
    page = start("--to", "voc")
    page.do(0, "add", CLICK)
    page.session.mask_dirs[0].mkdir(parents=True)
    utils.save_mask(page.session.mask_dirs[0] / ".b.png", np.ones((4, 4)))
    page.session.save()
    path = tmp_path / "out/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    assert path.read_text() == "a\n"
    path.write_bytes(b"\xff\xfea")  # half a character of UTF-16
    page.do(1, "add", [5, 5, 1])
    assert "train.txt: neither UTF-8 nor UTF-16" in page.ask("/save", 0, {}, expect=422)["error"]
    assert (page.session.mask_dirs[0] / "b.png").exists()
    assert json.loads((tmp_path / "out/unsaved.json").read_text())["voc"] == []


@pytest.mark.parametrize("name", ["annotate", "predict", "predict_video"])
def test_every_text_file_has_an_encoding(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        call = ast.unparse(node) if isinstance(node, ast.Call) else ""
        if re.match(r"open\(|.*\.(read_text|write_text)\([^()]*\)$", call):
            assert "encoding=" in call or "'rb'" in call, call


# --- Who is refused ---

def refused(page, status, *args, **kwargs):
    found, headers, content = page.request(*args, **kwargs)
    assert (found, headers["Content-Type"], content.count(b"\n")) == (status, "application/json", 1), content
    assert b"Traceback" not in content and [*json.loads(content)] == ["error"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    return json.loads(content)["error"]


def test_only_those_with_the_key_are_answered(start):
    page = start()
    for key in ("", "x", page.key[:-1], page.key + "x", "%C3%A9%FF", page.key.lower() + page.key.upper()):
        for method, path in (("GET", "/"), ("GET", "/image?index=0"), ("GET", "/state?index=0"), ("GET", "/no"),
                             ("POST", "/change?index=0"), ("POST", "/save?index=0")):
            assert "wrong key" in refused(page, 403, method, path, {} if method == "POST" else None, key=key)
    assert not (page.session.folder / "prompts.json").exists() and len(page.key) >= 40
    assert page.key != start("--output-dir", page.session.folder / "other").key
    assert page.request("GET", "/")[0] == 200


def test_the_key_is_compared_in_constant_time(start, monkeypatch):
    page, compared = start(), []
    real = annotate.hmac.compare_digest
    monkeypatch.setattr(annotate.hmac, "compare_digest", lambda *both: compared.append(both) or real(*both))
    refused(page, 403, "GET", "/", key="x")
    assert compared == [(b"x", page.key.encode())]


def test_another_hosts_name_is_refused(start):
    page = start()
    for host in (["evil.example"], [f"evil.example:{page.port}"], ["127.0.0.1.evil.example"], ["localhost@evil"], [""],
                 [], ["localhost", "evil.example"], ["xlocalhost"], ["127.0.0.2"], ["127.0.0.1:80x"]):
        assert refused(page, 403, "GET", "/state?index=0", host=host) == "wrong host"
    for host in (["localhost"], ["127.0.0.1:1234"], [f"localhost:{page.port}"]):  # ssh -L has any port
        assert page.request("GET", "/state?index=0", host=host)[0] == 200


def test_it_listens_on_loopback_only(start):
    page = start()
    assert page.server.server_address[0] == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # this machine's address, if it has one
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((own, page.port), timeout=2)


def test_no_file_is_served_by_name(start, images):
    page = start()
    for path in ("/a.png", f"{images}/a.png", "/../annotate.py", "/image/../../a.png", "/etc/passwd", "/image/a.png",
                 "/state/", "/image/", "/change", "/save"):
        assert refused(page, 404, "GET", path) == "no such page"
    for index in ("-1", "4", "99999999999999999999", "a.png", "0.5", "1e0", "%00", "0x1", "nan", "²", "..%2F.."):
        assert refused(page, 404, "GET", f"/image?index={index}".replace("²", "%C2%B2")) == "no image of this index"
        refused(page, 404, "POST", f"/save?index={index}".replace("²", "%C2%B2"), {})


def test_bodies_are_bounded(start):
    page = start()
    refused(page, 413, "POST", "/change?index=0", **{"Content-Length": annotate.MAX_BODY + 1})
    refused(page, 413, "POST", "/change?index=0", **{"Content-Length": "9" * 20})
    for length in ("-1", "x", "", "9" * 21, "1e3", "+5"):
        refused(page, 411, "POST", "/change?index=0", **{"Content-Length": length})
    refused(page, 411, "POST", "/change?index=0", **{"Transfer-Encoding": "chunked"})
    assert page.ask("/state", 0)["objects"] == 0


@pytest.mark.parametrize("body", [
    "", "{", "[]", "3", "null", "\"x\"", "[" * 60000, "{\"version\": " + "9" * 5000 + "}", {}, {"action": "add"},
    {"action": "delete"}, {"action": ["add"]}, {"action": "add", "prompt": 5}, {"action": "add", "prompt": {"x": 1}},
    {"action": "add", "prompt": [1, 2]}, {"action": "add", "prompt": [1, 2, 3, 4, 5]},
    {"action": "add", "prompt": "123"},
    {"action": "add", "prompt": [1, None, 1]}, {"action": "add", "prompt": [1, True, 1]},
    {"action": "class"}, {"action": "class", "prompt": [1, 2]}, {"action": "class", "prompt": ["cat"]},
    {"action": "add", "prompt": [[1], 2, 1]}, {"action": "undo", "prompt": [1, 2, 1]},
    '{"version": 0, "action": "add", "prompt": [NaN, 2, 1]}',
    '{"version": 0, "action": "add", "prompt": [1e999, 2, 1]}',
    '{"version": 0, "action": "add", "prompt": [Infinity, 2, 1]}',
    '{"version": 0, "action": "add", "prompt": [1e10, 2, 1]}'])
def test_bodies_that_are_no_change(start, body):
    page = start()
    refused(page, 400, "POST", "/change?index=0", body)
    assert page.session.items[0].objects == [{"class": None, "prompts": []}] and page.session.items[0].version == 0


def test_a_save_is_no_change_of_an_odd_action(start):
    page = start()
    assert "not the JSON" in refused(page, 400, "POST", "/save?index=0", {"action": ["add"]})
    assert "action must be one of add, class" in refused(page, 400, "POST", "/change?index=0", {"action": "delete"})


def test_prompts_that_cannot_be(start):
    page = start()
    for prompt in ([-1, 2, 1], [97, 2, 1], [2, 65, 1], [2, 2, 2], [2, 2, -1], [2, 2, 0.5], [9, 9, 9, 20], [9, 9, 5, 5],
                   [0, 0, 97, 5]):
        error = page.do(0, "add", prompt, expect=422)["error"]
        assert "outside" in error or "label is 1 or 0" in error
    for version in ("0", None, 1, -1, 0.5, [0]):
        status = page.request("POST", "/change?index=0", {"version": version, "action": "add", "prompt": CLICK})[0]
        assert status == 409
    for x in range(6):
        page.do(0, "add", [x, 2, 1])
    assert "more than 6 points" in page.do(0, "add", [7, 2, 1], expect=422)["error"]
    assert page.session.items[0].entries() == [{"points": [[x, 2, 1] for x in range(6)]}]


def test_objects_and_boxes_are_bounded(start):
    page = start()
    page.session.items[0].objects = [{"class": None, "prompts": [[1, 1, 1]]}] * 254 + [{"class": None, "prompts": []}]
    assert "254" in page.do(0, "add", CLICK, expect=422)["error"]
    page.session.items[1].objects = [{"class": None, "prompts": [[1, 1, 5, 5]] * annotate.MAX_PROMPTS}]
    assert "undo some" in page.do(1, "add", [1, 1, 6, 6], expect=422)["error"]


def test_what_http_server_itself_refuses_is_json_too(start):
    page = start()
    for method in ("PUT", "OPTIONS", "DELETE", "X"):
        refused(page, 501, method, "/")
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/9.9 <b>x</b>\r\n\r\n")
        reply = connection.makefile("rb").read()
    assert reply.startswith(b'{"error": "Bad request version') and reply.count(b"\n") == 1  # too old for headers
    refused(page, 414, "GET", "/" + "x" * 70000)
    refused(page, 431, "GET", "/", **{f"X-{k}": "x" for k in range(200)})
    refused(page, 404, "GET", "http://[/?x=1")


def test_our_own_mistakes_are_one_line_to_the_page(start, monkeypatch, capfd):
    page = start()
    monkeypatch.setattr(page.session, "photo", lambda *_: 1 / 0)
    error = refused(page, 500, "GET", "/image?index=0")
    assert error == "ZeroDivisionError in annotate.py, its terminal says more; all prompts are still there"
    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err


def test_the_page_trusts_nothing_but_itself(start):
    page = start()
    status, headers, content = page.request("GET", "/")
    policy, text = headers["Content-Security-Policy"], content.decode()
    (nonce,) = set(re.findall(r'nonce="([\w-]{40,})"', text))
    assert status == 200 and f"script-src 'nonce-{nonce}'" in policy and "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy and (headers["Referrer-Policy"], headers["Cache-Control"]) == (
        "no-referrer", "no-store")
    assert nonce not in page.request("GET", "/")[2].decode()  # a new one each time
    assert "innerHTML" not in text and page.key not in text and "<b>&" not in text and "efficient_sam" not in text
    assert "const key" in text and "count = 4" in text
    assert not re.search(r"COUNT|NONCE|NETS|https?://(?!www.w3)", text)


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_the_pages_script_parses(tmp_path):
    page = annotate.read_page().replace("COUNT", "1").replace("NETS", "1")
    (tmp_path / "page.js").write_text(page[page.index('"use strict"'):page.index("</script>")])
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Options ---

@pytest.mark.parametrize("more, words", [
    (["--compare-model", "vit_b"], "--compare-model: is of --compare"), (["--base", "x"], "--base: is for SAM"),
    (["--compare", "unet"], "unet.pth: is unet, which takes no clicks"),
    (["--compare", "none"], "none.pth: no such file")])
def test_options_that_cannot_be(start, tmp_path, more, words):
    from test_predict import save_unet
    save_unet(tmp_path / "unet.pth")
    more = [tmp_path / f"{word}.pth" if word in ("unet", "none") else word for word in more]
    with pytest.raises(utils.InputError, match=words):
        start(*more)


def test_a_folder_or_port_that_cannot_be_used(start, tmp_path):
    page = start()
    with pytest.raises(utils.InputError, match=rf"--port {page.port}: Address already in use; give another"):
        start("--port", page.port, "--output-dir", tmp_path / "other")
    assert page.session.folder_lock.name == str(tmp_path / "out/.lock")  # see test_utils
    (tmp_path / "spoilt").mkdir()
    for text in ("{", "[1]", "[" * 60000, '{"a": 3}', '{"a": [{"boxes": [[1]]}]}', '{"a": [{"points": [[1, 1, 7]]}]}'):
        (tmp_path / "spoilt/prompts.json").write_text(text)
        with pytest.raises(utils.InputError, match="prompts.json(: | or unsaved.json: cannot be read)"):
            start("--output-dir", tmp_path / "spoilt")
        assert (tmp_path / "spoilt/prompts.json").read_text() == text
