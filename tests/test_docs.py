"""The documentation: its commands exist and, where they can, run; what it names is there; the site builds.

In docs/, blocks marked sh and python are run, in the order of PAGES and in one folder, made small by SMALL; blocks marked bash
are only checked, as are those without a mark of the README and of the older pages.
"""

import contextlib
import functools
import glob
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from tokenizers_lab.cli import main as cli
from tokenizers_lab.config import list_recipes, load_config
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.registry import get_system, systems
from tokenizers_lab.settings import StageConfig

ROOT = Path(__file__).parent.parent
DOCS = sorted(ROOT.glob("docs/**/*.md"))
PAGES = [      # those that run, in order
    "tutorial.md", "index.md", "systems/index.md", "howto/data.md", "howto/teachers.md", "howto/resume.md", "howto/metrics.md",
    "howto/tokenize.md", "howto/generation.md", "howto/diffusers-transformers.md"]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHERS = {"accelerate", "torchrun"}
REPOSITORY = ("configs/", "models/", "eval/", "scripts/", "tests/", "tokenizers_lab/")      # what docs name of it
SMALL = {      # arguments that make a command small
    "train": ["train.batch_size=2", "data.val_limit=2", "data.workers=0", "train.validate_every=0"],
    "eval": ["--limit", "2"], "compare": ["--limit", "2", "--repeats", "0"], "latents": ["--batch-size", "4"],
    "generate": ["--n", "4", "--steps", "2"], "latent-stats": ["--limit", "8"],
}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(mark, rest of the mark's line, text) of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def command_lines(text: str) -> list[list[str]]:
    """The words of each line of a block of shell, without comments; lines that end in a backslash go on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def toklab_arguments(words: list[str]) -> list[str] | None:
    """The arguments of toklab in a command, also behind a launcher; None if it is another command."""
    if words[0] == "toklab":
        return words[1:]
    if words[0] in LAUNCHERS and "tokenizers_lab" in words:
        assert words[words.index("tokenizers_lab") - 1] == "-m"
        return words[words.index("tokenizers_lab") + 1 :]
    return None


parser = functools.cache(cli.build_parser)


@functools.cache
def check_config(name: str, overrides: tuple[str, ...]) -> None:
    """Raise ConfigError unless the recipe has these options."""
    load_config(name, overrides)


def parse(arguments: list[str]) -> Namespace:
    """The arguments, parsed as `toklab` would. Fails on an unknown command or option."""
    assert cli.check_command(arguments) is None, cli.check_command(arguments)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args, left = parser().parse_known_args(arguments)
    except SystemExit:
        raise AssertionError(errors.getvalue()) from None
    assert not left or (hasattr(args, "overrides") and not any(word.startswith("-") for word in left)), left
    if left:
        args.overrides = [*args.overrides, *left]
    return args


def check_line(words: list[str]) -> None:
    """Fail on a command, option, recipe, override or file of the repository that does not exist."""
    arguments = toklab_arguments(words)
    if arguments is not None:
        args = parse(arguments)
        config = getattr(args, "config", None)
        if args.command == "info" and args.model in list_recipes():
            config = args.model
        assert config is None or config in list_recipes() or config.endswith(".yaml"), f"there is no recipe {config}"
        if config in list_recipes():
            check_config(config, tuple(args.overrides))
    for word in words:
        if word.startswith("scripts/") and words[0] in ("python", "bash"):
            assert (ROOT / word).is_file(), f"there is no {word}"


def checked_blocks() -> list[tuple[str, str]]:
    """(page, text) of every block of commands."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
    return [(page.relative_to(ROOT).as_posix(), text) for page in pages for mark, _, text in blocks(page)
            if mark in ("", "sh", "bash")]


@pytest.mark.parametrize("page", sorted({page for page, _ in checked_blocks()}))
def test_commands_exist(page):
    for name, text in checked_blocks():
        for words in command_lines(text) if name == page else []:
            try:
                check_line(words)
            except (AssertionError, ConfigError) as error:
                pytest.fail(f"{page}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize("words", [
    ["toklab", "trian", "rectok/tiny"], ["toklab", "eval", "run", "data", "--metric-names", "psnr"],
    ["toklab", "train", "rectok/tinny"], ["toklab", "train", "rectok/tiny", "model.chanels=3"],
    ["torchrun", "--nproc_per_node", "2", "-m", "tokenizers_lab", "latents", "run"], ["python", "scripts/none.py"],
])
def test_commands_that_do_not_exist_are_found(words):
    with pytest.raises((AssertionError, ConfigError)):
        check_line(words)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    """Files of the repository and recipes between backticks."""
    recipes, names = list_recipes(), systems()
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.fullmatch(r"[\w./-]+", code) and code.startswith(REPOSITORY):
            assert (ROOT / code).exists(), f"{page.name}: there is no {code}"
        if re.fullmatch(rf"({'|'.join([*names, 'generation'])})/[\w.-]+", code):
            assert code in recipes or code.split("/")[1] == "official", f"{page.name}: there is no recipe {code}"


def test_every_recipe_and_system_has_its_page():
    for recipe in list_recipes():
        system = recipe.split("/")[0]
        page = ROOT / "docs/systems" / f"{'generators' if system == 'generation' else system}.md"
        assert f"`{recipe}`" in page.read_text(encoding="utf-8"), f"{page.name} does not name {recipe}"
    generators = (ROOT / "docs/systems/generators.md").read_text(encoding="utf-8")
    for name in systems():
        assert get_system(name).kind != "generator" or f"`{name}`" in generators


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of every table, by the column's name."""
    found = []
    for table in re.findall(r"(?:^\|[^\n]*\|\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found.append([dict(zip(head, row)) for row in rows])
    return found


@pytest.mark.parametrize("page", sorted((ROOT / "docs/systems").glob("*.md")), ids=lambda page: page.stem)
def test_numbers_of_recipes_are_those_of_the_configs(page):
    """Of tables of recipes: lengths in steps or epochs, and the weights of losses."""
    for table in tables(page.read_text(encoding="utf-8")):
        for row in table:
            names = [name for name in re.findall(r"`([\w./-]+)`", row.get("recipe", "")) if name in list_recipes()]
            stages = [stage for name in names for stage in load_config(name).stages]
            if names:
                check_row(row, stages)


def check_row(row: dict[str, str], stages: list[StageConfig]) -> None:
    """Fail if a length, or a loss's weight, is in none of the row's stages."""
    text = " | ".join(row.values())
    lengths = {stage.steps for stage in stages} | {stage.epochs for stage in stages}
    said = re.findall(r"([\d,]*\d)(?= (?:steps|epochs))", text) + re.findall(r"[\d,]*\d", row.get("steps", ""))
    for number in said:
        assert float(number.replace(",", "")) in lengths, f"{number} in {text}"
    weights = {(term, weight) for stage in stages for term, weight in stage.weights.items()}
    for term in {term for term, _ in weights}:
        for number in re.findall(rf"\b{term} (\d[\d.e-]*)", row.get("weights", "") + row.get("learning rate, weights", "")):
            assert (term, float(number)) in weights, f"{term} {number} in {text}"


def test_figures_are_those_of_their_description():
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "scripts/draw_figures.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, svg in script.figures().items():
        assert (ROOT / f"docs/figures/{name}.svg").read_text(encoding="utf-8") == svg, "run python scripts/draw_figures.py"


def smaller(arguments: list[str]) -> list[str]:
    """A command's arguments with those of SMALL behind them; a training has two steps a stage."""
    word = arguments[0]
    more = list(SMALL.get(word, [])) if arguments[1:2] not in (["gfid"], ["statistics"]) else []
    if word == "train":
        args = parse(arguments)
        stages = load_config(args.config, args.overrides).stages
        more += [f"stages.{i}.steps=2" for i in range(len(stages))]
    return arguments[:1] + [path for argument in arguments[1:] for path in expanded(argument)] + more


def expanded(argument: str) -> list[str]:
    """The files that a pattern of the shell stands for, or the argument itself."""
    return sorted(glob.glob(argument)) if "*" in argument and glob.glob(argument) else [argument]


def run_shell(text: str) -> None:
    """Run a block; toklab in this process, which has everything imported, the rest by bash."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "toklab":
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                status = cli.call(smaller(words[1:]))
            assert status == 0, f"{line}\nended with {status}\n{output.getvalue()[-2000:]}"
        elif words:
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_the_pages_run(tmp_path, monkeypatch):
    """Every sh and python block, in order, in one folder."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "120")
    torch.set_num_threads(1)
    ran = 0
    for page in PAGES:
        for mark, rest, text in blocks(ROOT / "docs" / page):
            if mark == "yaml" and (title := re.search(r'title="([^"]+)"', rest)):
                Path(title[1]).write_text(text, encoding="utf-8")
            elif mark == "sh":
                run_shell(text)
                ran += 1
            elif mark == "python":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(text, f"docs/{page}", "exec"), {"__name__": "docs"})
                ran += 1
    assert ran > 25


def test_pages_that_run_are_listed():
    """A page with blocks to run is among PAGES."""
    marked = {page.relative_to(ROOT / "docs").as_posix() for page in DOCS if any(mark == "sh" for mark, _, _ in blocks(page))}
    assert marked <= set(PAGES)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Offline: whatever a page would load from elsewhere is found in its files."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs and mkdocstrings are not installed: pip install 'tokenizers-lab[docs]'")
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    assert "tokenizers_lab.models.rectok.model.RecTok.encode" in (site / "reference/models.html").read_text(encoding="utf-8")
    assert "tokenizers_lab.eval.fid" in (site / "reference/eval.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="https?:[^"]+', text)
        loaded += re.findall(r'<link(?=[^>]*(?:stylesheet|icon|preload))[^>]+href="https?:[^"]+', text)
        assert not loaded, f"{page.name} loads {loaded[0]}"


def test_the_navigation_names_every_page():
    class Loose(yaml.SafeLoader):
        """Reads tags of mkdocs' own as nothing."""

    Loose.add_multi_constructor("!", lambda loader, suffix, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loose)["nav"]
    named = set(re.findall(r"[\w/-]+\.md", str(nav)))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS}
