"""Crops, colours and masks on batches, against torch and torchvision, and what their draws promise."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as reference

from tokenizers_lab.data.multicrop import (
    CropConfig,
    blurred,
    brighter,
    contrasted,
    distort,
    draw_boxes,
    jittered,
    multi_crops,
    resized_crop,
    saturated,
    turned_hue,
)
from tokenizers_lab.draw import Draw
from tokenizers_lab.nn.masking import block_mask, block_masks
from tokenizers_lab.schedules import half_cosine, ramp
from tokenizers_lab.settings import StageConfig
from tokenizers_lab.training.optim import learning_rate


def pictures(items: int = 3, size: int = 40) -> torch.Tensor:
    small = torch.rand(items, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)


def test_a_resized_crop_is_torchs_antialiased_bicubic():
    x = pictures()
    boxes = torch.tensor([[0, 0, 40, 40], [3, 5, 31, 17], [20, 30, 7, 9]])
    mirrored = torch.tensor([False, True, False])
    for size in (12, 16, 48):
        made = resized_crop(x, boxes, size, mirrored)
        for i, (top, left, height, width) in enumerate(boxes.tolist()):
            part = x[i : i + 1, :, top : top + height, left : left + width]
            wanted = F.interpolate(part, (size, size), mode="bicubic", antialias=True).clamp(0, 1)[0]
            torch.testing.assert_close(made[i], wanted.flip(-1) if mirrored[i] else wanted, rtol=0, atol=1e-5)


def test_boxes_are_within_image_scale_and_aspect():
    boxes = draw_boxes(2000, (60, 90), (0.1, 0.5), Draw(0))
    top, left, height, width = boxes.unbind(1)
    assert min(top.min(), left.min()) == 0 and (top + height).max() == 60 and (left + width).max() == 90
    share, aspect = height * width / 5400, width / height
    assert 0.09 < share.min() < 0.12 and 0.46 < share.max() < 0.52
    assert 0.65 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.5
    whole = draw_boxes(3, (10, 400), (1.0, 1.0), Draw(0))      # no box of that area and aspect fits
    assert whole.tolist() == [[0, 0, 10, 400]] * 3


def test_colours_change_as_in_torchvision():
    x = pictures()
    for own, theirs, amount in ((brighter, reference.adjust_brightness, 0.3), (contrasted, reference.adjust_contrast, -0.4),
                                (saturated, reference.adjust_saturation, 0.4)):
        given = torch.tensor([amount, 0.0, -amount]).view(-1, 1, 1, 1)
        made = own(x, given)
        for i, value in enumerate(given.flatten().tolist()):
            torch.testing.assert_close(made[i], theirs(x[i], 1 + value), rtol=0, atol=2e-4)
    greys = torch.cat([x, x[:1].mean(1, keepdim=True).expand(-1, 3, -1, -1)])
    turned = turned_hue(greys, torch.tensor([0.1, -0.25, 0.5, 0.3]).view(-1, 1, 1, 1))
    for i, value in enumerate((0.1, -0.25, 0.5, 0.3)):
        torch.testing.assert_close(turned[i], reference.adjust_hue(greys[i], value), rtol=0, atol=1e-5)
    made = blurred(x, torch.tensor([0.1, 1.0, 2.0]))
    for i, sigma in enumerate((0.1, 1.0, 2.0)):
        torch.testing.assert_close(made[i], reference.gaussian_blur(x[i], [9, 9], [sigma, sigma]), rtol=0, atol=1e-5)


def test_shares_of_distortions():
    x = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).expand(400, -1, -1, -1)
    plain = CropConfig(jitter_share=0, grey_share=0)
    assert torch.equal(distort(x, plain, 0.0, 0.0, Draw(0)), x)
    cases = (({"grey_share": 0.2}, 0, 0, 0.2), ({"jitter_share": 0.8}, 0, 0, 0.8), ({}, 0.5, 0, 0.5), ({}, 0, 0.2, 0.2))
    for changes, blur, solarise, wanted in cases:
        made = distort(x, replace(plain, **changes), blur, solarise, Draw(0))
        changed = (made - x).abs().amax((1, 2, 3)) > 1e-6
        assert changed.float().mean() == pytest.approx(wanted, abs=0.08)
        assert made.min() >= 0 and made.max() <= 1
    orders = jittered(x, (0.4, 0.4, 0.2, 0.1), Draw(0))
    assert len(orders.flatten(1).mean(1).unique()) > 390


def test_crops_are_crop_major_and_follow_the_draw():
    x = pictures(4)
    cfg = CropConfig(global_size=32, local_size=16, local_crops=3)
    first, local = multi_crops(x, cfg, Draw(0, step=3))
    again, other = multi_crops(x, cfg, Draw(0, step=3))[0], multi_crops(x, cfg, Draw(0, step=4))[0]
    assert first.shape == (8, 3, 32, 32) and local.shape == (12, 3, 16, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert multi_crops(x, replace(cfg, local_crops=0), Draw(0))[1] is None
    constant = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 40, 40) / 4      # what is cropped of an image tells which it was
    plain = replace(cfg, jitter_share=0, grey_share=0, solarise_share=0)
    crops, local = multi_crops(constant, plain, Draw(0))
    torch.testing.assert_close(crops.mean((1, 2, 3)), torch.arange(4).repeat(2) / 4)
    torch.testing.assert_close(local.mean((1, 2, 3)), torch.arange(4).repeat(3) / 4)


def test_half_of_the_crops_are_masked_with_ratios_over_the_whole_range():
    masks = block_masks(40, (14, 14), 0.5, (0.1, 0.5), Draw(0))
    shares = masks.float().mean(1)
    assert masks.shape == (40, 196) and (shares == 0).sum() == 20
    hidden = shares[shares > 0].sort().values
    bins = torch.linspace(0.1, 0.5, 21)
    assert (hidden <= bins[1:]).all() and (hidden > bins[:-1] - 0.03).all()      # one in each bin; blocks may miss a few tokens
    assert not (shares[:20] > 0).all()                                           # at random places
    assert torch.equal(masks, block_masks(40, (14, 14), 0.5, (0.1, 0.5), Draw(0)))
    assert not block_masks(3, (4, 4), 0.0, (0.1, 0.5), Draw(0)).any()


def test_masks_are_made_of_blocks():
    mask = block_mask((16, 16), 64, random.Random(0))
    together = sum(int((mask & mask.roll(1, axis)).sum()) for axis in (0, 1)) / 2 / int(mask.sum())
    assert 50 < mask.sum() <= 64 and together > 0.65      # 0.25 of random tokens have their neighbour masked too


def test_schedules():
    momentum = [half_cosine(0.994, 1, step / 5) for step in range(5)]
    assert momentum == pytest.approx([.994, .994573, .996073, .997927, .999427], abs=1e-6)
    stage = StageConfig("s", steps=10, lr=1e-3, warmup=2, min_lr=1e-6)
    rates = [learning_rate(stage, stage.lr, done, 10) for done in range(10)]
    assert rates[2:5] + rates[9:] == pytest.approx([1e-3, 9.6198e-4, 8.5370e-4, 3.9022e-5], rel=1e-4)
    assert [ramp(0.04, 0.07, share) for share in (0, 0.5, 1, 3)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert math.isclose(half_cosine(2, 1, 5), 1)
