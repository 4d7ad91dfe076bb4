"""What every system owes: these tests run over the registry, with the model of each system's tiny recipe."""

import hashlib

import pytest
import torch

import tokenizers_lab
from tokenizers_lab.config import list_recipes, load_config
from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.registry import systems
from tokenizers_lab.tokenizer import ImageTokenizer

SYSTEMS = [name for name, system in systems().items() if system.kind != "generator"]


@pytest.fixture(params=SYSTEMS)
def tokenizer(request):
    """With seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return build_tokenizer(request.param, load_config(f"{request.param}/tiny").model).eval()


def example(tokenizer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(tokenizer, ImageTokenizer):
        return torch.rand(2, 3, 64, 64, generator=generator)
    return 0.2 * torch.randn(2, tokenizer.channels, 8 * tokenizer.hop, generator=generator).clamp(-5, 5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_there_is_a_tiny_recipe_and_one_of_the_paper(system):
    recipes = [name for name in list_recipes() if name.startswith(f"{system}/")]
    assert f"{system}/tiny" in recipes and len(recipes) >= 2


def test_saved_loaded_and_saved_again_is_the_same_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = tokenizers_lab.load(str(tmp_path / "a"))
    assert type(loaded) is type(tokenizer) and loaded.cfg == tokenizer.cfg and not loaded.training
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors", "README.md"):
        a, b = (hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest() for folder in ("a", "b"))
        assert a == b, name


def test_encoding_and_decoding_are_deterministic_and_leave_the_input_alone(tokenizer):
    given = example(tokenizer)
    before = given.clone()
    with torch.inference_mode():
        first, second = (tokenizer.encode(given).code for _ in range(2))
        restored = [tokenizer.decode(first) for _ in range(2)]
    assert torch.equal(first, second) and torch.equal(*restored) and torch.equal(given, before)
    assert restored[0].shape == given.shape and restored[0].isfinite().all()


def test_bad_input_is_a_typed_error(tokenizer):
    given = example(tokenizer)
    for bad in (given * float("nan"), given[:, :0], given[0], given.double().int(), given + 5):
        with pytest.raises(InputError):
            tokenizer.encode(bad)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_checkpoint_of_another_system_is_refused(system, tmp_path):
    other = next(name for name in SYSTEMS if name != system)
    build_tokenizer(other, load_config(f"{other}/tiny").model).save_pretrained(tmp_path)
    own = type(build_tokenizer(system, load_config(f"{system}/tiny").model))
    with pytest.raises(CheckpointError, match=f"{other} network, not {system}"):
        own.from_pretrained(tmp_path)
