"""Configs: inheritance, overrides, and errors that name the key, the nearest key, the file and the line."""

import dataclasses
from pathlib import Path

import pytest

from tokenizers_lab import config
from tokenizers_lab.config import describe, find_recipe, list_recipes, load_config, override_objective, save_config
from tokenizers_lab.config_help import field_help
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.models.rectok.config import ModelConfig, ObjectiveConfig, ViTConfig
from tokenizers_lab.settings import ImageDataConfig, RunConfig
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

BASE = """\
system: rectok
name: base
model:
  encoder: {width: 32, depth: 1, heads: 2}
objective:
  gamma: 0.5
  teachers:
    small: {backend: timm, source: s}
data:
  train: sample:photos
train:
  optimizer:
    betas: [0.8, 0.9]
stages:
  - name: one
    steps: 10
    lr: 1e-3
    weights: {mse: 1, kl: 1e-6}
    starts: {kl: 3}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a child config beside the base, in the working folder, and returns its name."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)

    def write(text: str, inherit: str = "inherit: base.yaml\n") -> str:
        Path("my.yaml").write_text(inherit + text)
        return "my.yaml"

    return write


def test_typed_instances(write):
    cfg = load_config(write(""))
    assert type(cfg) is RunConfig and type(cfg.model) is ModelConfig
    assert type(cfg.objective) is ObjectiveConfig and type(cfg.data) is ImageDataConfig
    assert cfg.model.encoder == ViTConfig(32, 1, 2) and cfg.model.decoder == ModelConfig().decoder
    assert cfg.train.optimizer.betas == (0.8, 0.9) and isinstance(cfg.train.optimizer.betas, tuple)
    assert cfg.stages[0].lr == 1e-3 and cfg.stages[0].weights == {"mse": 1.0, "kl": 1e-6}


def test_sections_merge_and_values_replace(write):
    cfg = load_config(write("model: {encoder: {depth: 3}}\nobjective: {teachers: {other: {source: o}}}\n"
                            "stages:\n- {name: two, epochs: 2, weights: {mse: 2}}\n"))
    assert cfg.model.encoder == ViTConfig(32, 3, 2)                                  # merged
    assert cfg.objective.teachers == {"other": VisionTeacherConfig(source="o")}      # replaced, neither default nor base stay
    assert cfg.objective.gamma == 0.5
    assert [s.name for s in cfg.stages] == ["two"] and cfg.stages[0].weights == {"mse": 2.0}


def test_default_teachers_stay_until_named(write):
    text = BASE.replace("  teachers:\n    small: {backend: timm, source: s}\n", "")
    assert load_config(write(text, inherit="")).objective.teachers == ObjectiveConfig().teachers
    assert load_config(write(text, inherit=""), ["objective.teachers={}"]).objective.teachers == {}


def test_overrides_reach_into_lists_and_dicts(write):
    cfg = load_config(write(""), [
        "stages.0.steps=11", "stages.0.weights.gan=2", "objective.teachers.small.input_size=64",
        "objective.teachers.new.source=n",
        "model.encoder={depth: 4}", "train.precision=no", "name=2024_01", "train.optimizer.eps=1e-6", "data.val=null"])
    assert cfg.stages[0].steps == 11 and cfg.stages[0].weights == {"mse": 1.0, "kl": 1e-6, "gan": 2.0}
    assert cfg.objective.teachers["small"] == VisionTeacherConfig("timm", "s", 64)
    assert cfg.objective.teachers["new"] == VisionTeacherConfig(source="n")
    assert cfg.model.encoder == ViTConfig(32, 4, 2)
    assert (cfg.train.precision, cfg.name, cfg.train.optimizer.eps, cfg.data.val) == ("no", "2024_01", 1e-6, None)


def test_inherits_from_a_recipe_by_its_name(write):
    cfg, recipe = load_config(write("name: mine\n", inherit="inherit: rectok/tiny\n")), load_config("rectok/tiny")
    assert (cfg.name, cfg.model, cfg.stages) == ("mine", recipe.model, recipe.stages)


def test_inherits_over_folders_and_refuses_circles(write, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mid.yaml").write_text("inherit: ../base.yaml\nname: mid\n")
    cfg = load_config(write("out: elsewhere\n", inherit="inherit: sub/mid.yaml\n"))
    assert (cfg.name, cfg.out, cfg.system) == ("mid", "elsewhere", "rectok")
    (tmp_path / "sub" / "mid.yaml").write_text("inherit: ../my.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: my\.yaml -> mid\.yaml -> my\.yaml"):
        load_config("my.yaml")


def test_references(write):
    cfg = load_config(write("name: from-${system}\nmodel: {decoder: '${model.encoder}'}\n"))
    assert cfg.name == "from-rectok" and cfg.model.decoder == cfg.model.encoder


def test_saved_config_reads_back_equal(write, tmp_path):
    cfg = load_config(write("train: {precision: no, max_minutes: 2}\n"), ["stages.0.objective={gamma: 0}", "name=1e3"])
    assert load_config(save_config(cfg, tmp_path / "saved.yaml")) == cfg


INT, FLOAT = "could not be converted to Integer", "could not be converted to Float"
STAGE = "stages:\n- name: q\n  steps: 3\n  weights: {mse: 1}\n"


@pytest.mark.parametrize("text, line, message", [
    ("model:\n  encoder:\n    widht: 3\n", 4, "model.encoder has no option 'widht'; nearest: 'width'"),
    ("modle: {}\n", 2, "the config has no option 'modle'; nearest: 'model'"),
    ("batch_size: 3\n", 2, "the config has no option 'batch_size'; nearest: 'train.batch_size'"),
    ("objective:\n  teachers:\n    t:\n      sorce: x\n",
     5, "objective.teachers.t has no option 'sorce'; nearest: 'source'"),
    ("model:\n  encoder:\n    width: 3.5\n", 4, f"model.encoder.width: Value '3.5' of type 'float' {INT}"),
    ("model:\n  encoder:\n", 3, "model.encoder is a section of options, but is empty; options: width, depth, heads"),
    ("train:\n  optimizer: {betas: [1]}\n", 3, "train.optimizer.betas: TupleConfig length 1 does not match type hint length 2"),
    ("train:\n  precision: bf17\n", 3, "train.precision must be one of no, bf16; not 'bf17'; nearest: 'bf16'"),
    ("train:\n  batch_size: 3\n  accumulate: 2\n", 4, "train.accumulate: train.batch_size 3 is not a multiple of 2"),
    ("train: {max_minutes: 0}\n", 2, "train.max_minutes must be above 0, not 0.0"),
    ("data: {crop: centre}\n", 2, "data.crop must be one of center, random; not 'centre'; nearest: 'center'"),
    ("name: a\nname: b\n", 3, "name is said twice, in line 2 and here"),
    ("name: ${zzz}\n", 2, "name: Interpolation key 'zzz' not found"),
    ("train: [1\n", 3, "not YAML: expected ',' or ']', but got '<stream end>'"),
    ("system: rektok\n", 2, "there is no system 'rektok'; nearest: 'rectok'"),
    ("stages: []\n", 2, "stages: a run needs at least one stage"),
    (STAGE.replace("3", "x"), 4, f"stages.0.steps: Value 'x' of type 'str' {INT}"),
    (STAGE.replace("mse: 1", "mse: a"), 5, f"stages.0.weights.mse: Value 'a' of type 'str' {FLOAT}"),
    (STAGE.replace("  steps: 3\n", ""), 3, "stages.0: stage 'q' needs its length in steps or epochs"),
    (STAGE + "  epochs: 1\n", 3, "stages.0: stage 'q' has its length in both steps and epochs; give one"),
    (STAGE.replace("- name: q\n  steps", "- steps"), 0, "stages.0.name: needs a value"),
    (STAGE + "  starts:\n    mae: 2\n", 7, "stages.0.starts.mae: the stage has no weight for 'mae'; nearest: 'mse'"),
    (STAGE + "  schedule: cosin\n", 6,
     "stages.0.schedule must be one of cosine, linear, constant, inverse_sqrt; not 'cosin'; nearest: 'cosine'"),
    (STAGE + "  schedule: inverse_sqrt\n  warmup: 0\n", 7,
     "stages.0.warmup: must be above 0 for schedule=inverse_sqrt, which falls as √(warmup / done)"),
    (STAGE + "  discriminator_schedule: constnat\n", 6,
     "stages.0.discriminator_schedule must be one of cosine, constant; not 'constnat'; nearest: 'constant'"),
    (STAGE + "  warmup: -1\n", 6, "stages.0.warmup must not be negative, but is -1.0"),
    (STAGE + "  parts: [encoder, '']\n", 6, "stages.0.parts.1: an empty name"),
    (STAGE + "  objective:\n    gama: 0\n", 7, "stages.0.objective has no option 'gama'; nearest: 'gamma'"),
    (STAGE + "  objective:\n    gamma: x\n",
     7, f"stages.0.objective.gamma: Value 'x' of type 'str' {FLOAT}"),
])
def test_errors_of_files(write, text, line, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert str(caught.value) == message + (f" (my.yaml, line {line})" if line else " (my.yaml)")


@pytest.mark.parametrize("override, message", [
    ("stages.1.steps=3", "stages has no item '1': it has 1, counted from 0 WHERE"),
    ("stages.0.stps=3", "stages.0 has no option 'stps'; nearest: 'steps' WHERE"),
    ("model.encoder.width=x", f"model.encoder.width: Value 'x' of type 'str' {INT} WHERE"),
    ("stages.0.weights.mse=-1", "stages.0.weights.mse: must be finite and not negative, but is -1.0 WHERE"),
    ("model.patch.x=3", "model.patch is one value and has no options, so no 'x' WHERE"),
    ("system=rektok", "there is no system 'rektok'; nearest: 'rectok' WHERE"),
    ("model.patch", "an override is key=value, such as train.batch_size=8; not 'model.patch'"),
    ("name=[1", "the value of the override 'name=[1' is not YAML: expected ',' or ']', but got '<stream end>'"),
])
def test_errors_of_overrides(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(""), [override])
    assert str(caught.value) == message.replace("WHERE", f"(override '{override}')")


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"# only a comment\n", "empty"), (b"- 1\n", "mapping"), (b"word\n", "mapping"),
    (b"\xff\xfe\x00", "cannot read"),
    (b"a: \x00\n", "not YAML"), (b"name: x\n", "system is missing"),
])
def test_files_that_are_no_config(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")


def test_mandatory_values(write):
    with pytest.raises(ConfigError, match=r"^name, data\.train: needs a value"):
        load_config(write("system: rectok\n" + STAGE, inherit=""))


def test_recipes_by_name(tmp_path, monkeypatch):
    for name in ("rectok/tiny", "rectok/imagenet256"):
        file = tmp_path / "recipes" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(BASE)
    monkeypatch.setattr(config, "recipes_folder", lambda: tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    assert list_recipes() == ["rectok/imagenet256", "rectok/tiny"]
    assert find_recipe("rectok/tiny") == find_recipe("configs/rectok/tiny.yaml") == tmp_path / "recipes/rectok/tiny.yaml"
    with pytest.raises(ConfigError, match="nearest: 'rectok/tiny'"):
        find_recipe("rectok/tny")
    with pytest.raises(ConfigError, match="is a folder"):
        find_recipe(str(tmp_path))


@pytest.mark.parametrize("name", list_recipes())
def test_every_packaged_recipe_loads_and_saves(name, tmp_path):
    cfg = load_config(name)
    assert load_config(save_config(cfg, tmp_path / "saved.yaml")) == cfg


def test_override_objective_is_a_new_checked_instance():
    before = ObjectiveConfig()
    after = override_objective(before, {"gamma": 0, "teachers": {"a": {"source": "s"}}})
    assert type(after) is ObjectiveConfig and after.gamma == 0.0 and after.teachers == {"a": VisionTeacherConfig(source="s")}
    assert before == ObjectiveConfig()
    with pytest.raises(ConfigError, match="objective has no option 'gama'; nearest: 'gamma'"):
        override_objective(before, {"gama": 0})


@dataclasses.dataclass
class Documented:
    """For the test below."""

    plain: int = 1                    # one line
    long: str = "# not a comment"     # first line
                                      # and a second
    # about the next field
    several: tuple[int, ...] = (
        1,
    )                                 # behind its last line
    silent: int = 0


def test_help_is_the_comment_behind_the_field():
    assert field_help(Documented) == {
        "plain": "one line", "long": "first line and a second", "several": "behind its last line", "silent": ""}


def test_every_option_has_help(write):
    rows = describe(load_config(write("")))
    keys = [key for key, _, _ in rows]
    assert len(set(keys)) == len(keys) and {"model.encoder.width", "stages.0.lr", "objective.teachers.small.source"} <= set(keys)
    assert [key for key, _, text in rows if not text] == []
    assert {k: v for k, v, _ in rows}["stages.0.weights"] == {"mse": 1.0, "kl": 1e-6}


def test_speech_is_read_at_the_rate_of_the_model():
    with pytest.raises(ConfigError, match="read at 16000 Hz, but the model takes 24000"):
        load_config("lm_spt/librispeech24k", ["data.sample_rate=16000"])
