"""`toklab app`: its page in headless Chromium, and what its server refuses."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from devtools import browser
from PIL import Image

import tokenizers_lab
from tokenizers_lab.cli import main as cli
from tokenizers_lab.eval.app import server
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.dm_codec.config import ModelConfig as DMConfig
from tokenizers_lab.models.rectok.config import ModelConfig as RecTokConfig
from tokenizers_lab.models.rectok.config import ViTConfig

SAMPLES = Path(tokenizers_lab.__file__).parent / "data" / "samples"
PHOTO, CLIP = SAMPLES / "photos" / "val" / "coffee.jpg", SAMPLES / "speech" / "val" / "en_US_f_Allison_43.flac"
SMALL = RecTokConfig(image_size=32, patch=8, latent_channels=6, encoder=ViTConfig(48, 1, 4), decoder=ViTConfig(64, 2, 4))


# --- without a browser ----------------------------------------------------------------------------------------------------

def toklab(capsys, *words: str) -> str:
    """Stderr of a command that ends as a user's error, in one line."""
    assert cli.call(["app", *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


@pytest.fixture
def gradio(monkeypatch, tmp_path):
    """As if it were here, in this version; the folder has no runs."""
    found = {"version": "6.31.0"}
    monkeypatch.setattr(server, "version", lambda name: found["version"])
    monkeypatch.chdir(tmp_path)
    return found


def test_a_missing_or_old_gradio_is_told(capsys, monkeypatch, gradio):
    gradio["version"] = "3.18.0"
    assert "needs gradio 6 or newer, not 3.18.0: pip install 'tokenizers-lab[app]'" in toklab(capsys)

    def missing(name: str) -> str:
        raise server.PackageNotFoundError(name)

    monkeypatch.setattr(server, "version", missing)
    assert "needs the package gradio: pip install 'tokenizers-lab[app]'" in toklab(capsys)


def test_without_a_model_or_a_run(capsys, gradio):
    assert "no MODEL was named and runs/ holds no run: train one (toklab train rectok/tiny" in toklab(capsys, "--port", "0")


def test_options_are_checked(capsys, gradio):
    assert "--max-seconds must be above 0, not -1" in toklab(capsys, "--max-seconds", "-1")
    assert "give another --host or --port" in toklab(capsys, "--host", "192.0.2.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be served (Address already in use)" in toklab(capsys, "--port", str(taken.getsockname()[1]))


@pytest.mark.parametrize("path, refused", [
    ("/", False), ("/config", False), ("/gradio_api/file=/tmp/x/http.png", False), ("/gradio_api/queue/join", False),
    ("/assets/index-1.js", False), ("/gradio_api/file=http://10.0.0.1/", True), ("/gradio_api/file=HTTPS://a", True),
    ("/gradio_api/proxy=http://a.hf.space/x", True), ("/gradio_api/file/ftp://a", True), ("/gradio_api/process_recording", True),
])
def test_the_guard_refuses_what_fetches_addresses(path, refused):
    assert asyncio.run(answer(path, b"127.0.0.1:7860")) == (403 if refused else 200)


@pytest.mark.parametrize("host, status", [
    (b"127.0.0.1:7860", 200), (b"localhost", 200), (b"[::1]:7860", 200), (b"evil.example:7860", 403),
    (b"127.0.0.1.evil.example", 403),
])
def test_the_guard_answers_to_this_machine_alone(host, status):
    assert asyncio.run(answer("/", host)) == status


async def answer(path: str, host: bytes) -> int:
    """Status that the guard lets through, or its own."""
    sent = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = server.Guard(app, {"127.0.0.1", *server.LOOPBACK})
    await guard({"type": "http", "path": path, "headers": [(b"host", host)]}, None, send)
    assert dict(sent[0]["headers"])[b"content-security-policy"].startswith(b"default-src 'self'")
    return sent[0]["status"]


def test_blocked_folders_leave_room_for_uploads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path.resolve()) in server.blocked_paths("/somewhere/else")
    assert str(tmp_path.resolve()) not in server.blocked_paths(str(tmp_path / "uploads"))
    assert str(Path(tokenizers_lab.__file__).resolve().parents[1]) in server.blocked_paths(str(tmp_path))


# --- with a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page of two small untrained models: (address, its process, its folder for temporary files)."""
    pytest.importorskip("gradio", minversion="6")
    root = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    build_tokenizer("rectok", SMALL).save_pretrained(root / "images")
    build_tokenizer("dm_codec", DMConfig(filters=4, width=16, codebooks=3, codebook_size=64)).save_pretrained(root / "speech")
    temporary = root / "temporary"
    temporary.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tokenizers_lab", "app", str(root / "images"), str(root / "speech"), "--device", "cpu",
               "--port", str(port), "--max-mb", "5"]
    # what a user's shell may hold must not open the page
    hostile = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True"}
    environment = {**os.environ, **hostile, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = root / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=root)
    try:
        for _ in range(1200):
            if "open http://" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert f"open http://127.0.0.1:{port}/" in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}", process, temporary, log
    finally:
        process.kill()
        process.wait()


def fetch(address: str, data: bytes | None = None) -> tuple[int, str]:
    """Status and text of an answer."""
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            return response.status, response.read(100_000).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def result_of(address: str, session: str) -> str:
    """What the queue says of the one event of a session."""
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream:
            if b"process_completed" in line:
                return line.decode()
    raise AssertionError("the queue ended without a result")


@pytest.mark.browser
def test_no_file_of_the_machine_is_served(served):
    address, _, temporary, _ = served
    (temporary.parent / "secret.txt").write_text("for nobody")
    here = Path(tokenizers_lab.__file__).resolve()
    for file in ("/etc/passwd", str(here), str(here.parents[1] / "README.md"), str(temporary.parent / "secret.txt"),
                 str(temporary.parent / "images" / "config.json"), "README.md", "../../../../etc/passwd", "file:///etc/passwd"):
        status, text = fetch(f"{address}/gradio_api/file={file}")
        assert status in (403, 404) and "root:x" not in text and "nobody" not in text, file
    assert fetch(f"{address}/gradio_api/file=http://127.0.0.1:9/")[0] == 403
    assert '"analytics_enabled":false' in fetch(f"{address}/config")[1]


@pytest.mark.browser
def test_actions_take_no_path_that_was_not_uploaded(served):
    address, _, temporary, _ = served
    config = json.loads(urllib.request.urlopen(f"{address}/config", timeout=30).read())
    kinds = {part["id"]: part["type"] for part in config["components"]}
    event = next(d for d in config["dependencies"] if d["inputs"] and kinds[d["inputs"][0]] == "image" and len(d["inputs"]) > 4)
    secret = temporary.parent / "secret.png"
    Image.new("RGB", (64, 64), "red").save(secret)
    for path in (str(secret), "/etc/passwd", "http://127.0.0.1:9/x.png"):
        file = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        session = f"s{abs(hash(path))}"
        body = {"data": [file, 0, -1, 32, 0, -1, -1], "fn_index": event["id"], "session_hash": session}
        assert fetch(f"{address}/gradio_api/queue/join", json.dumps(body).encode())[0] == 200
        assert '"success":false' in result_of(address, session), path
    assert not [file for file in temporary.rglob("*") if file.suffix == ".safetensors"]


@pytest.mark.browser
def test_the_page_works_in_a_browser(served, chromium, tmp_path):
    address, _, _, log = served
    before, broken = len(log.read_text()), tmp_path / "broken.png"
    broken.write_bytes(PHOTO.read_bytes()[:3000])
    asyncio.run(use(address, chromium, tmp_path, broken))
    assert log.read_text()[before:] == "", "a person's error is no matter for the terminal"


async def use(address: str, chromium: str, folder: Path, broken: Path) -> None:
    """Do on the page what a person does, and look."""
    async with browser(chromium, folder / "profile", 1280, 1300) as page:
        await page.open(address)
        await page.choose_file("#image-in", PHOTO)
        await page.until("document.querySelector('#image-in img')")
        await page.click("#image-run")
        loaded = "[...document.querySelectorAll('#image-out-0 img')].filter(i => i.naturalWidth == 320).length == 2"
        await page.until(loaded)
        table = await page.until("document.querySelector('#image-table table')?.innerText")
        assert "PSNR" in table and "6 × 4 × 4" in table and "random weights: never trained" in table
        assert await page.until("document.querySelector('#image-latents-0 img')?.naturalWidth") == 320
        files = await page.until("[...document.querySelectorAll('#image-files-0 a')].map(a => a.href)")
        encoded = next(file for file in files if file.endswith("coffee.safetensors"))
        assert "random weights: never trained" in await page.run("document.querySelector('.flag').innerText")
        await page.screenshot(folder / "image.png")
        with Image.open(folder / "image.png") as seen:
            assert seen.width == 1280 and len(seen.convert("RGB").getcolors(10**7)) > 500

        await page.click("#image-in button[aria-label='Remove Image']")
        await page.choose_file("#image-in", broken)
        await page.until("document.querySelector('#image-in img')?.src.includes('broken')")
        await page.click("#image-run")
        await page.until("document.body.innerText.includes('broken.png: truncated or damaged')")
        assert "Traceback" not in await page.run("document.body.innerText")

        await open_tab(page, "Speech")
        await page.choose_file("#sound-in", CLIP)
        await page.until("document.querySelector('#sound-in [data-testid=waveform-controls]')")
        await page.click("#sound-run")
        table = await page.until("document.querySelector('#sound-table table')?.innerText")
        assert "900 bit/s" in table and "mel distance" in table
        assert await page.until("document.querySelector('#sound-mel img')?.naturalWidth") == 900
        assert await page.until("document.querySelector('#sound-codes-0 img')?.naturalWidth") == 900
        assert await page.until("document.querySelector('#sound-out-0').innerText.includes('0:03')")
        await page.screenshot(folder / "speech.png")

        status, _ = fetch(encoded)
        assert status == 200
        (folder / "coffee.safetensors").write_bytes(urllib.request.urlopen(encoded, timeout=30).read())
        await open_tab(page, "Decode a file")
        await page.choose_file("#file-in", folder / "coffee.safetensors")
        await page.until("document.querySelector('#file-in').innerText.includes('coffee')")
        await page.click("#file-run")
        await page.until("document.querySelector('#file-image img')?.naturalWidth == 320")

        foreign = [asked for asked in page.requests if not asked.startswith((address, "data:", "blob:"))]
        assert foreign == [] and page.problems == []
        assert await page.run("document.documentElement.scrollWidth - innerWidth") <= 0


async def open_tab(page, name: str) -> None:
    await page.run(f"[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText.trim() == '{name}').click()")


@pytest.mark.browser
def test_nothing_is_left_behind(served):
    _, process, temporary, _ = served
    assert [folder.name[:11] for folder in ours(temporary)] == ["toklab-app-"], "of what was made Gradio's copies are left"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert ours(temporary) == []


def ours(folder: Path) -> list[Path]:
    """What the page made there; torch has folders of its own."""
    return [*folder.glob("toklab-app-*"), *folder.glob("made-*"), *folder.glob("gradio*")]
