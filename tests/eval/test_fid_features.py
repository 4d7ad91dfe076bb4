"""The networks behind FID: torch-fidelity's, its stand-ins, and how images enter them."""

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tokenizers_lab.errors import CheckpointError, ConfigError, InputError, WeightsMissing
from tokenizers_lab.eval.features import FeatureExtractor, Features, build_extractor, random_inception, to_uint8


@pytest.fixture(scope="module")
def random_extractor() -> FeatureExtractor:
    return build_extractor("random", seed=3)


def pictures(count: int, size: tuple[int, int] = (40, 48)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def test_equals_torch_fidelity(random_extractor: FeatureExtractor, tmp_path: Path) -> None:
    state = random_extractor.network.state_dict()
    state["fc.bias"] = torch.randn(1008, generator=torch.Generator().manual_seed(1))      # which the logits must not have
    torch.save(state, tmp_path / "weights.pth")
    weights = tmp_path / "weights.pth"
    other = FeatureExtractorInceptionV3("test", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    spatial = {}
    hook = other.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.update(output=output))
    images = pictures(2)
    found = build_extractor("inception", str(weights))(images)
    with torch.no_grad():
        pool, logits = other((images * 255).round().byte())
    hook.remove()
    assert torch.allclose(found.pool, pool, rtol=0, atol=1e-5) and torch.allclose(found.logits, logits, rtol=0, atol=1e-4)
    assert pool.std(dim=0).mean() > 1e-4
    by_hand = [spatial["output"][0, c, 0, 1] for c in range(7)]          # flattened as (row, column, channel)
    assert found.spatial.shape == (2, 17 * 17 * 7) and torch.allclose(found.spatial[0, 7:14], torch.stack(by_hand), atol=1e-5)


def test_an_image_alone_has_the_same_bits(random_extractor: FeatureExtractor) -> None:
    images = pictures(3)
    whole = random_extractor(images)
    torch.set_num_threads(2)
    try:
        alone = Features.join([random_extractor(image[None]) for image in images])
        threaded = random_extractor(images)
    finally:
        torch.set_num_threads(1)
    for name, tensor in whole.parts().items():
        assert torch.equal(tensor, alone.parts()[name]) and torch.equal(tensor, threaded.parts()[name]), name
    assert len({bytes(row.numpy().tobytes()) for row in whole.pool}) == 3


def test_random_weights_are_seeded_and_named(random_extractor: FeatureExtractor) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    again, other = random_inception(3).state_dict(), random_inception(4).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    mine = random_extractor.network.state_dict()
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    assert not torch.equal(mine["fc.weight"], other["fc.weight"])
    assert random_extractor.metric_name("rfid") == "frechet_random" and "random weights" in random_extractor.provenance
    assert not random_extractor.is_inception


def test_inception_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENIZERS_LAB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"weights-inception-2015-12-05-6726825d\.pth.*put the file into") as caught:
        build_extractor("inception")
    assert "\n" not in str(caught.value)


def test_weights_of_the_user(random_extractor: FeatureExtractor, tmp_path: Path) -> None:
    torch.save(random_extractor.network.state_dict(), tmp_path / "mine.pth")
    given = build_extractor("inception", str(tmp_path / "mine.pth"))
    assert given.kind == "given" and given.metric_name("rfid") == "frechet_given"      # not the published file
    images = pictures(1)
    assert torch.equal(given(images).pool, random_extractor(images).pool)
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    torch.save(FeatureExtractor, tmp_path / "class.pth")
    for name in ("text", "other", "class"):
        with pytest.raises(CheckpointError, match="does not hold torch-fidelity's Inception weights"):
            build_extractor("inception", str(tmp_path / f"{name}.pth"))
    with pytest.raises(ConfigError, match="known: inception, random, teacher"):
        build_extractor("resnet")


def test_rounding_is_named() -> None:
    pixel = torch.full((1, 3, 1, 1), 100.6 / 255)
    assert to_uint8(pixel).unique().tolist() == [101]
    assert to_uint8(pixel, "truncate").unique().tolist() == [100]
    assert to_uint8(torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]
    assert build_extractor("random", rounding="truncate").protocol()["rounding"] == "uint8, truncate"


@pytest.mark.parametrize(("images", "message"), [
    (torch.rand(1, 1, 8, 8), "RGB"), (torch.rand(3, 8, 8), "RGB"), (torch.rand(0, 3, 8, 8), "RGB"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.int32), "16-bit"), (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
])
def test_bad_images(images: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_uint8(images)


def test_teacher_features() -> None:
    try:
        teacher = build_extractor("teacher")
    except WeightsMissing as error:
        pytest.skip(str(error))
    images = pictures(2)
    found = teacher(images)
    assert found.pool.shape == (2, 320) and found.logits.shape == (2, 1000) and found.spatial is None
    assert torch.equal(teacher(images[:1]).pool, found.pool[:1])
    assert teacher.metric_name("rfid") == "frechet_teacher" and "efficientnet-lite0" in teacher.identifier
