"""LPIPS with its published weights against the lpips package, and the distance of logits."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from tokenizers_lab.assets import find_state_dict
from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.sources import sample_path
from tokenizers_lab.errors import ConfigError, InputError, WeightsMissing
from tokenizers_lab.losses import perceptual
from tokenizers_lab.losses.perceptual import LPIPS, LPIPS_ASSETS, Classifier, LogitDistance, unit


@pytest.fixture(scope="module")
def photo():
    """A photograph of a cat, 144 × 144."""
    image = read_image(sample_path("photos", "train") / "chelsea.jpg")
    return F.avg_pool2d(TF.pil_to_tensor(image)[None] / 255, 2)


@pytest.fixture(scope="module", params=["vgg", "alex"])
def lpips(request):
    """Our LPIPS with real weights; skipped where they cannot be had."""
    try:
        return LPIPS(request.param), request.param
    except WeightsMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def noisy(photo):
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    return lambda sigma: (photo + sigma * noise).clamp(0, 1)


def test_equals_the_lpips_package(lpips):
    import lpips as package

    ours, net = lpips
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    state, _ = find_state_dict(LPIPS_ASSETS[net])
    theirs.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in theirs.net.state_dict()})
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 2, 3, 64, 72, generator=generator)
    x.requires_grad_()
    mine, reference = ours(x, y), theirs(x, y, normalize=True).flatten()
    assert mine.shape == (2,)
    assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (mine, reference)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)
    assert gradients[0].abs().max() > 0


def test_follows_perception(lpips, photo, noisy):
    """Nothing for the same image; more for more noise and more blur; less for a shift than for blur, unlike the squared error.

    With a random backbone (seeds 0 and 1, both nets) blur is less than a shift: the last line fails on untrained weights.
    """
    measure, net = lpips
    assert {"vgg": "vgg16", "alex": "alexnet"}[net] in measure.provenance
    assert measure(photo, photo).item() == 0
    noise = [measure(noisy(sigma), photo).item() for sigma in (0.02, 0.05, 0.1, 0.2)]
    blur = [measure(TF.gaussian_blur(photo, int(6 * sigma) | 1, [sigma]), photo).item() for sigma in (1.0, 2.0, 4.0)]
    assert noise == sorted(noise) and noise[-1] > 5 * noise[0]
    assert blur == sorted(blur)
    shifted, blurred = photo.roll(2, -1), TF.gaussian_blur(photo, 13, [2.0])
    assert F.mse_loss(shifted, photo) > F.mse_loss(blurred, photo)
    assert measure(shifted, photo) < measure(blurred, photo)


def test_frozen_and_quiet(lpips, photo, capfd):
    measure, net = lpips
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPIPS(net)
    assert torch.equal(state, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert not measure.train().training and not any(m.training for m in measure.modules())
    assert not any(p.requires_grad for p in measure.parameters())
    before = measure(photo, 1 - photo)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measure(photo, 1 - photo), before)


def test_gradient_where_no_channel_is_active():
    """The package's normalisation has a NaN gradient there, which would end a training."""
    features = torch.zeros(1, 4, 2, 2)
    features[..., 1] = torch.rand(1, 4, 2)
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(unit(features).square().sum(), features)
    assert gradient.isfinite().all()
    norm = features.detach().square().sum(1, keepdim=True).sqrt() + 1e-10
    assert torch.equal(unit(features.detach()), features.detach() / norm)


def test_vgg_heads_are_those_of_taming_transformers():
    import lpips as package

    file = Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    assert hashlib.md5(file.read_bytes()).hexdigest() == "d507d7349b931f0638a25a48a722f98a"


def test_wrong_inputs(lpips, photo):
    measure, _ = lpips
    with pytest.raises(InputError, match="one shape"):
        measure(photo, photo[..., 1:])
    with pytest.raises(InputError):
        measure(photo[:, :1], photo[:, :1])
    with pytest.raises(ConfigError, match="vgg, alex"):
        LPIPS("squeeze")
    with pytest.raises(WeightsMissing, match="no file"):
        LPIPS("vgg", path="nowhere/vgg16.pth")
    with pytest.raises(ConfigError, match="convnext_small"):
        LogitDistance("resnet")


@pytest.fixture(scope="module")
def small_classifier(photo):
    """A random classifier whose normalisation has seen the photo's noise, so that its logits follow the image."""
    from torchvision.models import mobilenet_v3_small

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = mobilenet_v3_small(weights=None)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network(F.interpolate(photo, 224) + 0.3 * torch.randn(8, 3, 224, 224))
    return network.eval()


def test_logit_distance_as_published(small_classifier, photo, noisy, monkeypatch):
    """Resize to 224 with antialias, ImageNet normalisation, mean squared difference of the logits; any classifier will do."""
    monkeypatch.setitem(perceptual.LOGIT_ASSETS, "mobilenet_v3_small", "any")
    monkeypatch.setattr(perceptual, "find_state_dict", lambda name, path: (small_classifier.state_dict(), "a test"))
    measure = LogitDistance("mobilenet_v3_small")
    x, y = torch.cat([noisy(0.1), noisy(0.3)]), photo.expand(2, -1, -1, -1)

    def logits(images):
        resized = TF.resize(images, [224, 224], TF.InterpolationMode.BILINEAR, antialias=True)
        return small_classifier(TF.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    x.requires_grad_()
    wanted = (logits(x) - logits(y)).pow(2).mean(1)
    found = measure(x, y)
    assert found.shape == (2,) and (wanted > 1e-6).all()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.abs().max() > 0
    assert measure.provenance == "a test"
    assert not measure.train().training


def test_convnext_small_loads_strictly():
    from torchvision.models import convnext_small

    with torch.device("meta"):
        names = convnext_small(weights=None).state_dict()
    network = Classifier("convnext_small", {name: torch.empty(t.shape) for name, t in names.items()})
    assert sum(p.numel() for p in network.parameters()) == 50_223_688       # torchvision's published count
    assert not any(p.is_meta for p in network.parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        Classifier("convnext_small", {name: torch.empty(t.shape) for name, t in list(names.items())[1:]})
