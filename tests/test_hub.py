"""Saving, finding, loading, converting and publishing tokenizers."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import tokenizers_lab
from tokenizers_lab import hub
from tokenizers_lab.errors import CheckpointError, InputError, TokenizersLabError, WeightsMissing
from tokenizers_lab.models.rectok import convert
from tokenizers_lab.models.rectok.config import ModelConfig, ViTConfig
from tokenizers_lab.models.rectok.model import RecTok, SemanticTransformer
from tokenizers_lab.network import CONFIG_FILE, WEIGHTS_FILE
from tokenizers_lab.tokenizer import Tokenizer
from tokenizers_lab.training.checkpoint import checkpoint_folder, save_checkpoint

SMALL = ModelConfig(image_size=16, patch=8, latent_channels=6, encoder=ViTConfig(192, 3, 4), decoder=ViTConfig(192, 3, 4))
MANIFEST = Path(__file__).parent / "parity" / "rectok" / "official_full_manifest.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the caches of this machine, nor waits for a network."""
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.delenv(hub.OFFICIAL_ENV, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return hub.build_tokenizer("rectok", SMALL)


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    return tokenizer.save_pretrained(tmp_path / "saved")


def same(a: Tokenizer, b: Tokenizer) -> bool:
    return a.cfg == b.cfg and all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def make_run(tokenizer: Tokenizer, run: Path, steps: tuple[int, ...]) -> Path:
    """A run whose checkpoint of step n has n in its first bias."""
    for step in steps:
        next(p for n, p in tokenizer.named_parameters() if n.endswith("bias")).data.fill_(step)
        save_checkpoint(run, step, lambda folder: [tokenizer.save_pretrained(folder)], lambda folder: None, 0, lambda ok: ok)
    return run


def test_save_and_load_give_the_same_bytes(tokenizer, saved, tmp_path):
    loaded = tokenizers_lab.load(saved)
    assert same(tokenizer, loaded) and not loaded.training and isinstance(loaded, RecTok)
    again = loaded.save_pretrained(tmp_path / "again")
    for name in (CONFIG_FILE, WEIGHTS_FILE, "README.md"):
        assert (saved / name).read_bytes() == (again / name).read_bytes()
    assert hub.weights_sha256(saved) == hub.weights_sha256(again)


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.random.get_rng_state()
    tokenizers_lab.load(saved)
    assert torch.equal(before, torch.random.get_rng_state())


def test_building_on_the_meta_device_takes_no_memory():
    with torch.device("meta"):
        assert {p.device.type for p in hub.build_tokenizer("rectok", SMALL).parameters()} == {"meta"}


def test_a_run_gives_its_newest_whole_checkpoint(tokenizer, tmp_path):
    run = make_run(tokenizer, tmp_path / "run", (1, 2, 3))
    bias = next(n for n, _ in tokenizer.named_parameters() if n.endswith("bias"))
    assert tokenizers_lab.load(run).state_dict()[bias][0] == 3
    assert tokenizers_lab.load(checkpoint_folder(run, 1)).state_dict()[bias][0] == 1
    with open(checkpoint_folder(run, 3) / WEIGHTS_FILE, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors"):
        tokenizers_lab.load(checkpoint_folder(run, 3))
    with pytest.warns(UserWarning, match="damaged"):
        assert tokenizers_lab.load(run).state_dict()[bias][0] == 2
    for step in (1, 2):
        (checkpoint_folder(run, step) / "manifest.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="every checkpoint"):
        tokenizers_lab.load(run)
    with pytest.raises(CheckpointError, match="damaged"):
        tokenizers_lab.load(checkpoint_folder(run, 1))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / WEIGHTS_FILE).unlink(), "missing or damaged"),
    (lambda f: os.truncate(f / WEIGHTS_FILE, 1000), "missing or damaged"),
    (lambda f: (f / CONFIG_FILE).write_text("{"), "no readable config.json"),
    (lambda f: (f / CONFIG_FILE).write_text("[]"), "no readable config.json"),
    (lambda f: change_config(f, system="other"), "the system 'other', which is not installed"),
    (lambda f: change_config(f, model={"pach": 8}), "model has no option 'pach'; nearest: 'patch'"),
    (lambda f: change_config(f, model=asdict(replace(SMALL, latent_channels=7))), "does not fit the model: it has in another"),
    (lambda f: change_config(f, model=asdict(replace(SMALL, qk_norm=True))), "does not fit the model: it misses"),
    (lambda f: save_file(load_file(f / WEIGHTS_FILE) | {"extra": torch.zeros(1)}, f / WEIGHTS_FILE), "left over extra"),
    (lambda f: (f / CONFIG_FILE).unlink(), "holds no tokenizer"),
])
def test_damaged_folders_get_their_error(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        tokenizers_lab.load(saved)


def test_names_that_lead_nowhere(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"nearest: '.*saved'"):
        tokenizers_lab.load(tmp_path / "savd")
    with pytest.raises(WeightsMissing, match=r"no folder runs/tiny here.*hf download runs/tiny"):
        tokenizers_lab.load("runs/tiny")
    with pytest.raises(CheckpointError, match="toklab convert"):
        Path("x.pth").write_bytes(b"")
        tokenizers_lab.load("x.pth")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="no finished checkpoint yet"):
        tokenizers_lab.load("begun")


class Other(Tokenizer):
    """Of another system."""

    system = "other"


def test_from_pretrained_checks_the_class(saved):
    assert isinstance(RecTok.from_pretrained(saved), RecTok)
    with pytest.raises(CheckpointError, match="holds a rectok network, not other"):
        Other.from_pretrained(saved)


# --- the authors' weights -----------------------------------------------------------------------------------------------

def official_release(folder: Path, tokenizer: Tokenizer, extra: dict | None = None) -> dict[str, torch.Tensor]:
    """A folder of the hub's layout with the two files of the release; returns the heads in our names."""
    head = SemanticTransformer(SMALL.latent_channels, ViTConfig(192, 3, 4), 4, 10)
    heads = {f"semantic_dinov3.{k}": v for k, v in head.state_dict().items()}
    own = dict(tokenizer.state_dict())
    place = folder / convert.OFFICIAL["hub_id"]
    place.mkdir(parents=True)
    state = convert.to_official(own, heads)
    teacher = {"sem_foundation_models.dinov3.layer.weight": torch.zeros(3)}
    raw = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"model": raw, "model_ema": state | teacher | (extra or {})}, place / "RecTok.pth")
    torch.save({"model_ema": convert.to_official(own)}, place / "RecTok_decft.pth")
    return heads


def test_official_weights_are_converted_once(tokenizer, tmp_path, monkeypatch):
    heads = official_release(tmp_path / "downloads", tokenizer)
    monkeypatch.setenv(hub.OFFICIAL_ENV, str(tmp_path / "downloads"))
    loaded = tokenizers_lab.load("rectok/official")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in tokenizer.state_dict().items())
    assert loaded.cfg == SMALL and loaded.provenance["licence"] == "Apache-2.0" and loaded.provenance["file"] == "RecTok.pth"
    folder = hub.resolve_folder("rectok/official")
    assert str(folder).startswith(str(tmp_path / "cache" / "converted" / "rectok"))
    written = load_file(folder / hub.HEADS_FILE)
    assert written.keys() == heads.keys() and all(torch.equal(written[k], heads[k]) for k in heads)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "QingyuShi/RecTok" in card
    monkeypatch.setattr(hub, "convert_official", lambda *a: pytest.fail("converted again"))
    assert same(tokenizers_lab.load("rectok/official"), loaded)


def test_official_file_by_path_and_variant(tokenizer, tmp_path):
    official_release(tmp_path / "downloads", tokenizer)
    place = tmp_path / "downloads" / convert.OFFICIAL["hub_id"]
    for path in (place / "RecTok_decft.pth", place, tmp_path / "downloads"):
        loaded = tokenizers_lab.load("rectok/official/RecTok_decft", path=path)
        assert loaded.provenance["file"] == "RecTok_decft.pth"
    assert not (hub.resolve_folder("rectok/official/RecTok_decft", place) / hub.HEADS_FILE).exists()
    with pytest.raises(CheckpointError, match="no official weights 'x'; there are: rectok/official/RecTok, "):
        tokenizers_lab.load("rectok/official/x")


def test_official_weights_that_are_not_here(tmp_path):
    with pytest.raises(WeightsMissing, match=r"needs RecTok\.pth of QingyuShi/RecTok .*set TOKENIZERS_LAB_OFFICIAL=FOLDER"):
        tokenizers_lab.load("rectok/official")
    with pytest.raises(WeightsMissing, match=r"put RecTok\.pth of QingyuShi/RecTok there"):
        tokenizers_lab.load("rectok/official", path=tmp_path)


def test_official_weights_from_the_hubs_cache(tokenizer, tmp_path):
    official_release(tmp_path / "downloads", tokenizer)
    snapshot = tmp_path / "hf" / "models--QingyuShi--RecTok" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "downloads" / "QingyuShi" / "RecTok", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert tokenizers_lab.load("rectok/official").provenance["converted_from"] == "QingyuShi/RecTok"


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_official_files_are_refused_unless_they_fit_and_are_data(tokenizer, tmp_path):
    official_release(tmp_path / "downloads", tokenizer, extra={"decoder.unknown": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"RecTok\.pth: .*left over decoder\.unknown"):
        tokenizers_lab.load("rectok/official", path=tmp_path / "downloads")
    assert list((tmp_path / "cache" / "converted" / "rectok").glob("*/config.json")) == []
    torch.save({"model_ema": Hostile()}, "bad.pth")
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        hub.convert_official("rectok", "bad.pth")
    assert not Path("hostile").exists()
    torch.save([1, 2], "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        hub.convert_official("rectok", "list.pth")
    with pytest.raises(CheckpointError, match="there is no file"):
        hub.convert_official("rectok", "none.pth")


@pytest.mark.slow
@pytest.mark.skipif(not MANIFEST.exists(), reason="the full key list is not here")
def test_full_size_official_release(tmp_path):
    tensors = json.loads(MANIFEST.read_text())["tensors"]
    shapes = {k: tuple(v["shape"] if isinstance(v, dict) else v) for k, v in tensors.items()}
    values = {k: torch.full(shape, (i % 251) / 251) for i, (k, shape) in enumerate(shapes.items())}
    (tmp_path / "downloads").mkdir()
    torch.save({"model_ema": values}, tmp_path / "downloads" / "RecTok.pth")
    loaded = tokenizers_lab.load("rectok/official", path=tmp_path / "downloads")
    heads = load_file(hub.resolve_folder("rectok/official", tmp_path / "downloads") / hub.HEADS_FILE)
    back = convert.to_official(loaded.state_dict(), heads)
    assert back.keys() == values.keys() and all(torch.equal(back[k], values[k]) for k in values)
    assert sum(p.numel() for p in loaded.parameters()) == 171_970_900
    with torch.inference_mode():
        assert loaded.decode(loaded.encode(torch.rand(1, 3, 256, 256)).latents).shape == (1, 3, 256, 256)


# --- the hub ------------------------------------------------------------------------------------------------------------

def test_hub_id_from_the_hubs_cache(tokenizer, saved, tmp_path):
    snapshot = tmp_path / "hf" / "models--someone--mine" / "snapshots" / "abc"
    shutil.copytree(saved, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert same(tokenizer, tokenizers_lab.load("someone/mine"))
    (snapshot / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer of ours"):
        tokenizers_lab.load("someone/mine")


class FakeHub:
    """Keeps what would be uploaded."""

    files: dict[str, bytes]
    private: bool

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        FakeHub.private = private
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: str) -> None:
        FakeHub.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}


def test_push_uploads_a_saved_folder(tokenizer, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    assert tokenizer.push_to_hub("me/mine") == "https://hub/me/mine" and FakeHub.private
    assert FakeHub.files == {p.name: p.read_bytes() for p in saved.iterdir()}


def test_pushing_converted_weights_asks_first(tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    FakeHub.files = {}
    tokenizer.provenance = {"converted_from": "QingyuShi/RecTok", "licence": "Apache-2.0", "source": "somewhere"}
    with pytest.raises(InputError, match=r"come from QingyuShi/RecTok \(licence: Apache-2\.0\).*yes=True"):
        hub.push(tokenizer, "me/mine")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(InputError, match="not pushed"):
        hub.push(tokenizer, "me/mine")
    assert FakeHub.files == {}
    hub.push(tokenizer, "me/mine", private=False, yes=True)
    assert b"license: apache-2.0" in FakeHub.files["README.md"] and not FakeHub.private


def test_a_failed_push_is_one_line(tokenizer, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    with pytest.raises(TokenizersLabError, match=r"^could not push to me/mine \(no route\)"):
        hub.push(tokenizer, "me/mine")
