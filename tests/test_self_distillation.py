"""What student and teacher say of crops, the DINO head, and the teacher's step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenizers_lab.nn.dino_head import DINOHead
from tokenizers_lab.nn.dinov3_vit import BlocksConfig, RotaryViT
from tokenizers_lab.self_distillation import frozen_copy, masked_patches, student_logits, teacher_logits, update_teacher


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    trunk, head = RotaryViT(BlocksConfig(32, 2, 4), 8), DINOHead(32, 11, 16, 5)
    with torch.no_grad():
        for parameter in [*trunk.parameters(), *head.parameters()]:
            parameter += 0.2 * torch.randn_like(parameter)
    return trunk.eval(), head.eval()


def test_the_heads_last_map_is_weight_normalised():
    torch.manual_seed(0)
    head = DINOHead(7, 5, 9, 4, layers=2)
    assert [type(m) for m in head.mlp] == [nn.Linear, nn.GELU, nn.Linear]
    x = torch.randn(3, 7)
    hidden = F.normalize(head.mlp[2](F.gelu(head.mlp[0](x))), dim=-1)
    g, v = (head.get_parameter(f"last.parametrizations.weight.original{i}") for i in (0, 1))
    assert g.tolist() == [[1.0]] * 5
    torch.testing.assert_close(head(x), hidden @ (v / v.norm(dim=1, keepdim=True)).T)
    with torch.no_grad():
        v.mul_(3)                                          # the length of v says nothing, that of g does
        before = head(x)
        g.mul_(2)
    torch.testing.assert_close(before, hidden @ (v / v.norm(dim=1, keepdim=True)).T)
    torch.testing.assert_close(head(x), 2 * before)
    with pytest.raises(ValueError, match="at least 1"):
        DINOHead(7, 5, layers=0)


def test_student_and_teacher_look_at_the_right_things(networks):
    trunk, head = networks
    crops, local = torch.randn(4, 3, 32, 24), torch.randn(6, 3, 16, 16)
    masks = torch.zeros(4, 12, dtype=torch.uint8)
    masks[0, [1, 5]] = masks[3, 11] = 1
    masked = masked_patches(masks)
    assert masked.tolist() == [1, 5, 47]
    said = student_logits(trunk, head, crops, masks, local)
    assert (said.classes.shape, said.local_classes.shape, said.patches.shape) == ((4, 11), (6, 11), (3, 11))
    torch.testing.assert_close(said.classes[3:], head(trunk(crops[3:], masks[3:].bool()).class_token), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said.local_classes[:1], head(trunk(local[:1]).class_token), atol=1e-5, rtol=1e-5)
    seen = trunk(crops[3:], masks[3:].bool())
    torch.testing.assert_close(said.patches[2], head(seen.patch_tokens[0, 11]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said.class_tokens[3:], seen.class_token, atol=1e-5, rtol=1e-5)
    taught = teacher_logits(trunk, head, crops, masked)
    assert not taught.classes.requires_grad and not taught.patches.requires_grad
    for row, other in enumerate((2, 3, 0, 1)):             # the other crop of the same image, without a mask
        seen = trunk(crops[other : other + 1])
        torch.testing.assert_close(taught.classes[row], head(seen.class_token)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(taught.patches[2], head(trunk(crops[3:]).patch_tokens[0, 11]), atol=1e-5, rtol=1e-5)
    assert student_logits(trunk, head, crops, masks).local_classes.shape == (0, 11)


def test_the_teacher_follows_by_name(networks):
    student = nn.ModuleDict({"head": networks[1], "trunk": networks[0]})
    teacher = nn.ModuleDict({"trunk": frozen_copy(networks[0]), "head": frozen_copy(networks[1])})      # another order
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher["trunk"].training
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 1
    before = {k: p.clone() for k, p in teacher.named_parameters()}
    update_teacher(teacher, student, 0.75)
    for name, parameter in student.named_parameters():
        expected = 0.75 * before[name] + 0.25 * parameter
        torch.testing.assert_close(teacher.get_parameter(name), expected, atol=1e-6, rtol=1e-6)
    after = {k: p.clone() for k, p in teacher.named_parameters()}
    update_teacher(teacher, student, 1.0)
    assert all(torch.equal(p, after[k]) for k, p in teacher.named_parameters())
    with pytest.raises(ValueError, match=r"only one of them has head\."):
        update_teacher(nn.ModuleDict({"trunk": teacher["trunk"]}), student, 0.5)
