"""UniFlow's losses: closed forms, what they see, where their gradients go."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tokenizers_lab.config import load_config
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.diffusion.pixel_flow import patchify
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.uniflow.config import TERMS, EncoderConfig, ModelConfig, ObjectiveConfig
from tokenizers_lab.models.uniflow.model import UniFlow
from tokenizers_lab.models.uniflow.objective import UniFlowObjective, dispersive_loss, layer_weights, self_distillation
from tokenizers_lab.settings import StageConfig
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

SMALL = ModelConfig(
    image_size=32, patch=8, latent_channels=6, encoder=EncoderConfig(width=32, depth=3, heads=4, hidden=48, drop_path=0.3),
    width=32, global_blocks=1, global_heads=4, flow_blocks=2,
)
DINO = {
    "model_type": "dinov3_vit", "hidden_size": "16", "intermediate_size": "24", "num_hidden_layers": "1",
    "num_attention_heads": "2", "patch_size": "8", "image_size": "32",
}
CONFIG = ObjectiveConfig(semantic_teacher=VisionTeacherConfig("random", config=DINO))
STAGE = StageConfig(name="flow", weights={"flow": 1.0, "distill": 1.0})
ALL = frozenset(TERMS)


def build(**changes):
    torch.manual_seed(0)
    tokenizer, objective = UniFlow(SMALL), UniFlowObjective(replace(CONFIG, **changes), SMALL)
    with torch.no_grad():      # away from the zeros of the first velocity
        for parameter in tokenizer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    objective.begin_stage(tokenizer, STAGE)
    return tokenizer.train(), objective.train()


@pytest.fixture
def batch():
    return ImageBatch(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ["a", "b"])


# --- distillation -------------------------------------------------------------------------------------------------------

def test_layer_weights_of_the_worked_example():
    misalignments = torch.tensor([0.1, 0.2, 0.4])
    weights = layer_weights(misalignments, beta=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.112244, 0.274190, 0.613566]), atol=1e-6, rtol=0)
    assert float((weights * misalignments).sum()) == pytest.approx(0.311489, abs=1e-6)
    torch.testing.assert_close(layer_weights(misalignments, beta=0.0), torch.tensor([1, 2, 3]) / 6)


def test_distillation_weighs_the_layers_distances_without_a_gradient_through_the_weights():
    def layer(distance):      # two tokens whose mean cosine with the teacher's is 1 − distance
        cos = torch.tensor([1 - 2 * distance, 1.0])
        return torch.stack([cos, (1 - cos**2).sqrt()], dim=-1)[None]

    teachers = [torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])] * 3
    students = [layer(d).requires_grad_() for d in (0.1, 0.2, 0.4)]
    loss, weights, misalignments = self_distillation(students, teachers, beta=2.0)
    torch.testing.assert_close(misalignments, torch.tensor([0.1, 0.2, 0.4]), atol=1e-6, rtol=0)
    assert float(loss.detach()) == pytest.approx(0.311489, abs=1e-6) and not weights.requires_grad
    loss.backward()
    for student, teacher, weight in zip(students, teachers, weights):
        fixed = student.detach().clone().requires_grad_()
        (weight * (1 - F.cosine_similarity(fixed, teacher, dim=-1).mean())).backward()
        torch.testing.assert_close(student.grad, fixed.grad)


def test_the_teacher_is_the_encoder_of_the_stages_beginning(batch):
    tokenizer, objective = build()
    teacher = objective.copies["teacher"]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, tokenizer.encoder.state_dict()[k]) for k, v in teacher.state_dict().items())
    tokenizer.eval()
    losses = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"distill"}))
    assert abs(losses.terms["distill"]) < 1e-6
    with torch.no_grad():
        tokenizer.encoder.layers[1].mlp.fc2.weight += 0.5 * torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    moved = objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"distill"}))
    assert moved.terms["distill"] > 1e-3
    assert moved.logs["misalignment_01"] < 1e-6 < moved.logs["misalignment_02"]
    assert sum(moved.logs[f"distill_weight_{i:02d}"] for i in (1, 2, 3)) == pytest.approx(1, abs=1e-6)
    other = StageConfig(name="semantic", weights={"semantic": 1.0})
    objective.begin_stage(tokenizer, other)      # a stage that does not distil leaves the copy alone
    assert objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"distill"})).terms["distill"] > 1e-3
    objective.begin_stage(tokenizer, STAGE)
    assert abs(objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"distill"})).terms["distill"]) < 1e-6


# --- flow ---------------------------------------------------------------------------------------------------------------

class Recorder(Draw):
    """A draw that remembers what it gave."""

    def __init__(self):
        super().__init__(3)
        self.given = {}

    def normal(self, purpose, shape):
        self.given[purpose] = super().normal(purpose, shape)
        return self.given[purpose]


def test_the_flow_loss_of_a_network_that_says_nothing_is_the_targets_mean_square(batch):
    tokenizer, objective = build()
    tokenizer.eval()
    with torch.no_grad():
        tokenizer.flow.out.weight.zero_()
        tokenizer.flow.out.bias.zero_()
    draw = Recorder()
    loss = objective.generator_losses(tokenizer, batch, draw, frozenset({"flow"})).terms["flow"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = (batch.images - mean) / std
    target = patchify(pixels, 8).flatten(0, 1) - draw.given["noise"]
    torch.testing.assert_close(loss, target.square().mean())


def test_the_network_is_shown_points_between_noise_and_pixels_at_a_thousand_times_the_time(batch):
    tokenizer, objective = build()
    tokenizer.eval()
    seen, draw = [], Recorder()
    tokenizer.flow.register_forward_pre_hook(lambda module, given: seen.append(given))
    objective.generator_losses(tokenizer, batch, draw, frozenset({"flow"}))
    (x, time, condition), = seen
    t = time[:, None] / 1000
    data = patchify(tokenizer.normalise(batch.images), 8).flatten(0, 1)
    torch.testing.assert_close(x, (1 - t) * draw.given["noise"] + t * data, atol=1e-5, rtol=1e-5)
    assert x.shape == (32, 192) and condition.shape == (32, 32) and t.unique().numel() == 32


def test_times_are_drawn_for_patches_or_for_images():
    _, objective = build()
    assert objective.times(3, 16, Draw(0)).unique().numel() == 48
    _, objective = build(time_per="image")
    times = objective.times(3, 16, Draw(0)).view(3, 16)
    assert times.unique().numel() == 3 and (times == times[:, :1]).all()


def test_the_flow_loss_reaches_the_encoder_through_the_condition(batch):
    tokenizer, objective = build()
    tokenizer.eval()      # no path is dropped
    objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"flow"})).terms["flow"].backward()
    last = tokenizer.encoder.layers[-1]
    for parameter in (last.mlp.fc2.weight, tokenizer.encoder.patch_embedding.weight, tokenizer.project.fc1.weight,
                      tokenizer.conditioner.blocks[0].attn.qkv.weight, tokenizer.flow.input_proj.weight):
        assert parameter.grad.abs().max() > 0
    assert all(p.grad is not None for p in tokenizer.parameters())
    assert all(p.grad is None for p in [*objective.copies.parameters(), *objective.heads.parameters()])


# --- the other terms ----------------------------------------------------------------------------------------------------

def test_the_semantic_term_trains_encoder_and_adapter_only(batch):
    tokenizer, objective = build()
    assert {k: tuple(v.shape) for k, v in objective.heads.state_dict().items()} == {
        "adapter.head.weight": (16, 32), "adapter.head.bias": (16,), "adapter.norm.weight": (16,), "adapter.norm.bias": (16,),
    }
    losses = objective.generator_losses(tokenizer.eval(), batch, Draw(0), frozenset({"semantic"}))
    tokens = tokenizer.encoder(tokenizer.normalise(batch.images))[-1]
    features = objective.frozen["semantic"].features(batch.images, (4, 4))
    expected = 1 - F.cosine_similarity(objective.heads["adapter"](tokens), features, dim=-1).mean()
    torch.testing.assert_close(losses.terms["semantic"], expected)
    losses.terms["semantic"].backward()
    assert all(p.grad is not None for p in [*objective.heads.parameters(), *tokenizer.encoder.parameters()])
    assert all(p.grad is None for p in [*objective.frozen.parameters(), *tokenizer.flow.parameters()])
    assert objective.provenance() == {"teacher.semantic": "random weights (seed 0)"}


def test_dispersive_loss_against_a_loop():
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pairs = [torch.exp(-(z[i] - z[j]).square().sum() / 15) for i in range(4) for j in range(4)]
    loss = dispersive_loss(z)
    torch.testing.assert_close(loss, torch.stack(pairs).mean().log())
    loss.backward()
    assert z.grad.isfinite().all() and z.grad.abs().max() > 0
    assert dispersive_loss(torch.ones(3, 2, 2)).item() == 0


def test_only_active_terms_are_computed_and_draws_repeat(batch):
    tokenizer, objective = build()
    tokenizer.eval()
    for active in (ALL, frozenset({"flow"}), frozenset({"semantic", "dispersive"}), frozenset()):
        losses = objective.generator_losses(tokenizer, batch, Draw(0), active)
        again = objective.generator_losses(tokenizer, batch, Draw(0), active)
        assert losses.terms.keys() == active
        assert all(t.dim() == 0 and t.dtype == torch.float32 for t in losses.terms.values())
        assert all(torch.equal(v, again.terms[k]) for k, v in losses.terms.items())
    other = objective.generator_losses(tokenizer, batch, Draw(0, step=1), ALL)
    first = objective.generator_losses(tokenizer, batch, Draw(0), ALL)
    assert {k for k in ALL if not torch.equal(first.terms[k], other.terms[k])} == {"flow"}


def test_without_a_semantic_teacher_there_is_no_head(batch):
    tokenizer, objective = build(semantic_teacher=None)
    assert not len(objective.heads) and not len(objective.frozen) and objective.provenance() == {}
    with pytest.raises(ConfigError, match="semantic_teacher"):
        objective.generator_losses(tokenizer, batch, Draw(0), frozenset({"semantic"}))
    with pytest.raises(ConfigError, match="teacher_width"):
        UniFlowObjective(CONFIG, SMALL, build_frozen=False)


@pytest.mark.parametrize(("overrides", "message"), [
    (["objective.time_per=pixel"], "time_per"),
    (["objective.norm=l3"], "norm"),
    (["objective.beta=-1"], "beta"),
    (["objective.time.distribution=normal"], r"time\.distribution"),
    (["objective.semantic_teacher=null"], "needs objective.semantic_teacher"),
    (["stages.0.weights={gan: 1.0}"], "no loss 'gan'"),
    (["stages.1.objective={semantic_teacher: null}"], "cannot change"),
    (["data.size=60"], "multiple of model.patch"),
])
def test_a_run_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("uniflow/tiny", overrides)
