"""The page's layout, and what its buttons call. What they do is in `actions`."""

import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
import torch

import tokenizers_lab
from tokenizers_lab.errors import InputError, TokenizersLabError

from . import actions
from .actions import ImageResult, Limits, Sampling, SoundResult
from .loaded import LoadedModel

SAMPLES = {      # shown first, where they are
    "photos": ("china", "coffee", "butterfly", "castle"),
    "speech": ("en_US_f_Allison_45", "en_US_f_Allison_47", "fillets_nl_big_06", "fillets_cs_small_06"),
}
SAMPLE_COUNT = 4
SIZES = (256, 512)             # of centre crops, beside the models' own training sizes
NO_MODEL = -1                  # in a choice of models: none, or the one that fits
EMPTY_SLOT = [gr.update(visible=False), "", None, gr.update(visible=False), None, None]
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}      # all models are on one device


def build_page(models: Sequence[LoadedModel], limits: Limits, keep: float) -> gr.Blocks:
    """The page of these models. keep: seconds after which files that were dropped or made are deleted."""
    with gr.Blocks(title="tokenizers-lab", analytics_enabled=False, fill_width=True,
                   delete_cache=(min(60, round(keep)), round(keep))) as page:
        gr.HTML(_head(models, limits))
        with gr.Tabs():
            if any(not model.speech for model in models):
                with gr.Tab("Images", id="images"):
                    _image_tab(models, limits)
            if any(model.speech for model in models):
                with gr.Tab("Speech", id="speech"):
                    _speech_tab(models, limits)
            with gr.Tab("Decode a file", id="decode"):
                _decode_tab(models, limits)
    return page


# --- tabs -----------------------------------------------------------------------------------------------------------------

def _image_tab(models: Sequence[LoadedModel], limits: Limits) -> None:
    own = [model for model in models if not model.speech]
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="asked"):
            picture = gr.Image(label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260,
                               elem_id="image-in", buttons=[])
            _take_paths(picture)
            gr.Examples(_samples("photos", ".jpg"), picture, label="Samples, not trained on", examples_per_page=SAMPLE_COUNT)
            first, second = _model_choices(models, own)
            view = gr.Dropdown(_views(own), value=_views(own)[0][1], label="View")
            sampling = _sampling(own)
            run = gr.Button("Encode and decode", variant="primary", elem_id="image-run")
        with gr.Column(scale=3):
            slots: list[list[Any]] = [[], []]
            with gr.Row():
                for i, parts in enumerate(slots):
                    with gr.Column(visible=i == 0, min_width=320) as column:
                        title = gr.HTML(_blank() if i == 0 else "")
                        slider = gr.ImageSlider(label="original | reconstruction", format="png", elem_id=f"image-out-{i}",
                                                interactive=False, max_height=440, buttons=["fullscreen"])
                    parts += [column, title, slider]
            table = gr.HTML(elem_id="image-table")
            with gr.Row():
                for i, parts in enumerate(slots):
                    with gr.Column(visible=i == 0, min_width=320) as column:
                        latents = gr.Image(label="latents: three principal axes as red, green, blue", format="png", height=260,
                                           interactive=False, elem_id=f"image-latents-{i}", buttons=["fullscreen"])
                        made = gr.File(label="latents as of toklab encode, and the PNG", interactive=False,
                                       file_count="multiple", elem_id=f"image-files-{i}")
                    parts += [column, latents, made]

    def compute(
        file: dict[str, Any] | None, one: int, other: int, size: int, steps: float, guidance: float, seed: float, folder: Path,
        progress: gr.Progress,
    ) -> list[Any]:
        path, name = _given(file, "an image")
        results = {}
        for model in _chosen(models, one, other):
            progress(0.1, desc=model.title)
            results[model.title] = actions.reconstruct_image(
                model, path, name, size or None, Sampling(*_numbers(steps, guidance, seed)), limits, _subfolder(folder, model))
        shown = []
        for slot in range(2):
            result = list(results.values())[slot] if slot < len(results) else None
            shown += _image_slot(result, _chosen(models, one, other)[slot] if result else None)
        return [*shown, facts_table({title: result.facts for title, result in results.items()})]

    outputs = [part for slot in slots for part in slot] + [table]

    def act(file: Any, one: int, other: int, size: int, steps: float, guidance: float, seed: float,
            progress: gr.Progress = gr.Progress()) -> Iterator[list[Any]]:      # noqa: B008 (Gradio's way)
        with _folder() as folder:
            with _reported():
                made = compute(file, one, other, size, steps, guidance, seed, folder, progress)
            yield made

    run.click(act, [picture, first, second, view, *sampling], outputs, api_visibility="private", **ONE_AT_A_TIME)


def _speech_tab(models: Sequence[LoadedModel], limits: Limits) -> None:
    own = [model for model in models if model.speech]
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="asked"):
            sound = gr.Audio(label="Sound", type="filepath", sources=["upload", "microphone"], elem_id="sound-in", buttons=[])
            _take_paths(sound)
            gr.Examples(_samples("speech", ".flac"), sound, label="Samples, not trained on", examples_per_page=SAMPLE_COUNT)
            first, second = _model_choices(models, own)
            text = gr.Textbox(label="What is said", info="for decoders that read along (TaDiCodec)",
                              visible=any(getattr(model.tokenizer, "takes_texts", False) for model in own))
            sampling = _sampling(own)
            run = gr.Button("Encode and decode", variant="primary", elem_id="sound-run")
        with gr.Column(scale=3):
            mel = _chart("sound-mel", visible=False)
            slots: list[list[Any]] = [[], []]
            with gr.Row():
                for i, parts in enumerate(slots):
                    with gr.Column(visible=i == 0, min_width=320) as column:
                        title = gr.HTML(_blank() if i == 0 else "")
                        player = gr.Audio(label="reconstruction", interactive=False, elem_id=f"sound-out-{i}", buttons=[])
                    parts += [column, title, player]
            table = gr.HTML(elem_id="sound-table")
            with gr.Row():
                for i, parts in enumerate(slots):
                    with gr.Column(visible=i == 0, min_width=320) as column:
                        codes = _chart(f"sound-codes-{i}")
                        made = gr.File(label="codes as of toklab encode, and the WAV", interactive=False, file_count="multiple",
                                       elem_id=f"sound-files-{i}")
                    parts += [column, codes, made]

    def compute(
        file: dict[str, Any] | None, one: int, other: int, said: str, steps: float, guidance: float, seed: float, folder: Path,
        progress: gr.Progress,
    ) -> list[Any]:
        path, name = _given(file, "a sound")
        results: dict[str, SoundResult] = {}
        for model in _chosen(models, one, other):
            told = Sampling(*_numbers(steps, guidance, seed), (said or "").strip())
            results[model.title] = actions.reconstruct_sound(
                model, path, name, told, limits, _subfolder(folder, model), _Share(progress, model.title))
        picture = actions.mel_picture((path, name), results, folder)
        shown: list[Any] = [gr.update(value=picture, visible=True)]
        for slot in range(2):
            result = list(results.values())[slot] if slot < len(results) else None
            shown += _sound_slot(result, _chosen(models, one, other)[slot] if result else None)
        return [*shown, facts_table({title: result.facts for title, result in results.items()})]

    def act(file: Any, one: int, other: int, said: str, steps: float, guidance: float, seed: float,
            progress: gr.Progress = gr.Progress()) -> Iterator[list[Any]]:      # noqa: B008
        with _folder() as folder:
            with _reported():
                made = compute(file, one, other, said, steps, guidance, seed, folder, progress)
            yield made

    outputs = [mel, *(part for slot in slots for part in slot), table]
    run.click(act, [sound, first, second, text, *sampling], outputs, api_visibility="private", **ONE_AT_A_TIME)


def _decode_tab(models: Sequence[LoadedModel], limits: Limits) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="asked"):
            file = gr.File(label="Codes or latents", file_types=[".safetensors"],
                           elem_id="file-in", height=140)
            _take_paths(file)
            chosen = gr.Dropdown([("the one that encoded it", NO_MODEL), *((m.title, i) for i, m in enumerate(models))],
                                 value=NO_MODEL, label="Model")
            any_model = gr.Checkbox(False, label="allow another than the one that encoded it")
            text = gr.Textbox(label="What is said", info="for decoders that read along (TaDiCodec)",
                              visible=any(getattr(model.tokenizer, "takes_texts", False) for model in models))
            sampling = _sampling(models)
            run = gr.Button("Decode", variant="primary", elem_id="file-run")
        with gr.Column(scale=3):
            title = gr.HTML(_blank("Drop a file that toklab encode or this page wrote"))
            image = gr.Image(label="decoded", format="png", interactive=False, visible=False, elem_id="file-image", height=400)
            player = gr.Audio(label="decoded", interactive=False, visible=False, elem_id="file-sound", buttons=[])
            mel, picture = _chart("file-mel", visible=False), _chart("file-codes", visible=False)
            made = gr.File(label="Files", interactive=False, file_count="multiple", visible=False, elem_id="file-files")
            table = gr.HTML(elem_id="file-table")

    def compute(
        given: dict[str, Any] | None, wanted: int, allow: bool, said: str, steps: float, guidance: float, seed: float,
        folder: Path, progress: gr.Progress,
    ) -> list[Any]:
        path, name = _given(given, "a file of codes or latents")
        encoded = actions.open_encoded(path, name, limits)
        model = actions.choose_model(list(models), encoded, None if wanted == NO_MODEL else _pick(models, wanted), allow)
        told = Sampling(*_numbers(steps, guidance, seed), (said or "").strip())
        hidden = gr.update(value=None, visible=False)
        if model.speech:
            sound = actions.decode_sound(model, encoded, told, limits, folder, _Share(progress, model.title))
            drawn = actions.mel_picture(None, {model.title: sound}, folder)
            parts = [hidden, gr.update(value=str(sound.made), visible=True), gr.update(value=drawn, visible=True)]
            result: ImageResult | SoundResult = sound
        else:
            result = actions.decode_image(model, encoded, told, limits, folder)
            parts = [gr.update(value=result.made, visible=True), hidden, hidden]
        return [_title(model), *parts, gr.update(value=result.picture, visible=True),
                gr.update(value=[str(path) for path in result.files], visible=True), facts_table({model.title: result.facts})]

    def act(given: Any, wanted: int, allow: bool, said: str, steps: float, guidance: float, seed: float,
            progress: gr.Progress = gr.Progress()) -> Iterator[list[Any]]:      # noqa: B008
        with _folder() as folder:
            with _reported():
                shown = compute(given, wanted, allow, said, steps, guidance, seed, folder, progress)
            yield shown

    run.click(act, [file, chosen, any_model, text, *sampling], [title, image, player, mel, picture, made, table],
              api_visibility="private", **ONE_AT_A_TIME)


# --- parts of tabs --------------------------------------------------------------------------------------------------------

def _model_choices(models: Sequence[LoadedModel], own: Sequence[LoadedModel]) -> tuple[gr.Dropdown, gr.Dropdown]:
    """The model, and another one to stand beside it: the next, if there are several."""
    numbered = [(model.title, i) for i, model in enumerate(models) if model in own]
    first = gr.Dropdown(numbered, value=numbered[0][1], label="Model")
    beside = [("none", NO_MODEL), *numbered]
    second = gr.Dropdown(beside, value=numbered[1][1] if len(own) > 1 else NO_MODEL, label="Beside it", visible=len(own) > 1)
    return first, second


def _chart(name: str, visible: bool = True) -> gr.Image:
    """Where a drawing is shown that says itself what it is."""
    return gr.Image(show_label=False, format="png", interactive=False, elem_id=name, buttons=["fullscreen"], visible=visible)


def _views(models: Sequence[LoadedModel]) -> list[tuple[str, int]]:
    """Centre crops of the training sizes, the first model's first, of some others, and the whole image (0)."""
    own = [int(getattr(model.tokenizer.cfg, "image_size", 0)) for model in models]
    sizes = list(dict.fromkeys(size for size in (*own, *SIZES) if size))
    trained = dict.fromkeys(own, " as trained")
    return [*((f"centre, {n} × {n}{trained.get(n, '')}", n) for n in sizes), ("the whole image", 0)]


def _sampling(models: Sequence[LoadedModel]) -> list[gr.Number]:
    """Steps, guidance and seed of diffusion decoders; hidden where there is none. 0 and −1 stand for the model's own."""
    there = any(model.tokenizer.decode_options for model in models)
    with gr.Accordion("Sampling of diffusion decoders", open=False, visible=there):
        steps = gr.Number(0, label="steps", info="0: the model's own", precision=0, minimum=0, maximum=actions.MOST_STEPS)
        guidance = gr.Number(-1, label="guidance", info="1: none; −1: the model's own", minimum=-1, maximum=20)
        seed = gr.Number(-1, label="seed of the noise", info="−1: always the same noise", precision=0, minimum=-1)
    return [steps, guidance, seed]


def _numbers(steps: float | None, guidance: float | None, seed: float | None) -> tuple[int | None, float | None, int | None]:
    """What the fields of `_sampling` say; a field that was emptied says nothing."""
    return (int(steps) if steps else None, float(guidance) if guidance is not None and guidance >= 0 else None,
            int(seed) % 2**63 if seed is not None and seed >= 0 else None)


def _samples(kind: str, suffix: str) -> list[list[str]]:
    """Packaged files that the tiny recipes keep for validation."""
    folder = Path(str(files(tokenizers_lab))) / "data" / "samples" / kind / "val"
    found = sorted(folder.rglob(f"*{suffix}"))
    found.sort(key=lambda path: path.stem not in SAMPLES[kind])
    return [[str(path)] for path in found[:SAMPLE_COUNT]]


def _image_slot(result: ImageResult | None, model: LoadedModel | None) -> list[Any]:
    """Updates of a slot: column, title, slider; column, picture, files."""
    if result is None or model is None:
        return EMPTY_SLOT
    return [gr.update(visible=True), _title(model), (result.original, result.made), gr.update(visible=True), result.picture,
            [str(path) for path in result.files]]


def _sound_slot(result: SoundResult | None, model: LoadedModel | None) -> list[Any]:
    """Updates of a slot: column, title, player; column, picture, files."""
    if result is None or model is None:
        return EMPTY_SLOT
    return [gr.update(visible=True), _title(model), str(result.made), gr.update(visible=True), result.picture,
            [str(path) for path in result.files]]


# --- HTML -----------------------------------------------------------------------------------------------------------------

def _head(models: Sequence[LoadedModel], limits: Limits) -> str:
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    device = escape(str(models[0].tokenizer.device))
    return ('<div class="top"><h1>tokenizers-lab</h1><p>What a tokenizer keeps of an image or a sound. '
            f"{count} on {device}; files of at most {limits.megabytes:g} MB, sounds of {limits.seconds:g} s.</p></div>")


def _blank(text: str = "Choose or drop something at the left, then encode and decode") -> str:
    return f'<div class="model"><p class="soft">{escape(text)}.</p></div>'


def _title(model: LoadedModel) -> str:
    """A model's name, and what must be known of its weights."""
    flag = f'<p class="flag">{escape(model.warning)}</p>' if model.warning else ""
    return f'<div class="model"><h2>{escape(model.title)} <small>{escape(model.tokenizer.system)}</small></h2>{flag}</div>'


def facts_table(columns: dict[str, dict[str, str]]) -> str:
    """Facts of one or two models side by side, as an HTML table."""
    names = list(dict.fromkeys(name for facts in columns.values() for name in facts))
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    cells = {name: "".join(f"<td>{escape(facts.get(name, '–'))}</td>" for facts in columns.values()) for name in names}
    rows = "".join(f"<tr><th>{escape(name)}</th>{row}</tr>" for name, row in cells.items())
    return f'<table class="facts"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'


# --- what every action needs ----------------------------------------------------------------------------------------------

class _Share:
    """Adds up shares of the work for the progress bar."""

    def __init__(self, progress: gr.Progress, title: str):
        self.progress, self.title, self.done = progress, title, 0.0

    def __call__(self, share: float) -> None:
        self.done = min(1.0, self.done + share)
        self.progress(self.done, desc=self.title)


def _take_paths(component: Any) -> None:
    """Hand the upload itself to the action. Gradio would open images before, with every format that Pillow has a plugin for."""
    component.preprocess = _uploaded_path


def _uploaded_path(payload: Any) -> dict[str, str] | None:
    """Path and name of a file that was uploaded. Gradio has made sure by now that it lies in its own folder of uploads."""
    if payload is None or payload.path is None:
        return None
    return {"path": payload.path, "name": Path(payload.orig_name or payload.path).name}


def _given(file: dict[str, Any] | None, what: str) -> tuple[Path, str]:
    """The uploaded file and its name. Raises InputError if there is none."""
    if not file:
        raise InputError(f"drop {what} first")
    return Path(file["path"]), str(file["name"])


def _pick(models: Sequence[LoadedModel], number: int) -> LoadedModel:
    if not 0 <= number < len(models):
        raise InputError("that model is not on this page: load the page again")
    return models[number]


def _chosen(models: Sequence[LoadedModel], one: int, other: int) -> list[LoadedModel]:
    """One or two different models."""
    numbers = [one] if other in (NO_MODEL, one) else [one, other]
    return [_pick(models, number) for number in numbers]


def _subfolder(folder: Path, model: LoadedModel) -> Path:
    """A folder for what one of the models makes: both name their files by the input."""
    made = folder / model.sha256[:16]
    made.mkdir(exist_ok=True)
    return made


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is gone when the files in it have been handed over: Gradio copies what is yielded into its own."""
    with tempfile.TemporaryDirectory(prefix="made-", dir=tempfile.gettempdir()) as folder:
        yield Path(folder)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors and warnings become messages on the page, one line each; only a fault of ours is traced, in the terminal."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    except TokenizersLabError as error:
        raise _message(str(error)) from None
    except (torch.OutOfMemoryError, MemoryError):
        raise _message("there is not enough memory for that: choose a smaller view or a shorter sound") from None
    except Exception as error:
        traceback.print_exc()
        raise _message(f"this failed ({type(error).__name__}); the terminal of toklab app says where") from None
    for warning in caught:
        if warning.category is UserWarning:
            gr.Warning(escape(" ".join(str(warning.message).split())))


def _message(text: str) -> gr.Error:
    return gr.Error(escape(" ".join(text.split())), duration=None, title="That did not work", print_exception=False)
