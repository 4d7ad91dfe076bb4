"""Sounds of the report: originals and reconstructions to play, each under its mel spectrogram; and how the codes are used."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenizers_lab.data.audio import encode_audio, read_audio

from .report_charts import MEL_LEFT, MEL_WIDTH, mel_chart, nice
from .report_parts import facts
from .sounds import mel_levels

if TYPE_CHECKING:
    from .report import RunView

SECONDS = 5.0              # of a clip that the page plays at most
ROOM = 3_800_000           # characters that the clips may take: the whole page stays below 5 MB


@dataclass
class Sound:
    """One column of a clip."""

    title: str
    audio: Tensor          # (channels, samples)
    rate: int              # Hz
    note: str = ""         # its values


def audio_uri(audio: Tensor, sample_rate: int) -> str:
    """Audio (channels, samples) inside the page, 16 bit. FLAC: every browser plays it, and it is half as long as WAV."""
    return "data:audio/flac;base64," + base64.b64encode(encode_audio(audio, sample_rate, "FLAC")).decode()


def sounds_of(view: "RunView", example: dict[str, Any]) -> list[Sound]:
    """Original, reconstruction and further decodings of one example, from its files, cut to what the page plays."""
    metrics = _results(view)["rows"][0]["metrics"]
    values = " · ".join(
        f"{metrics[name]['title']} {nice(value)} {metrics[name]['unit']}".strip() for name, value in example["values"].items())
    sounds = []
    for kind, file in example["sounds"].items():
        audio, rate = read_audio(view.run.path / file)
        title = f"{kind} {view.tag}" if view.tag else kind
        sounds.append(Sound(title, audio[:, : round(SECONDS * rate)], rate, values if kind == "reconstruction" else ""))
    return sounds


def shared_clips(views: "list[RunView]") -> list[tuple[dict[str, Any], list[Sound]]]:
    """What is known of the examples that all runs have, and their sounds. An original that all share is there once."""
    by_run = [{e["key"]: e for e in _results(v).get("examples", [])} if v.results else {} for v in views]
    clips = []
    for key, about in by_run[0].items():
        examples = [found[key] for found in by_run if key in found]
        same = all(e["text"] == about["text"] and abs(e["seconds"] - about["seconds"]) < 0.01 for e in examples)
        if len(examples) < len(views) or not same:
            continue
        columns = [sounds_of(view, example) for view, example in zip(views, examples)]
        first = columns[0][0]
        if all(sounds[0].rate == first.rate and sounds[0].audio.equal(first.audio) for sounds in columns):
            first.title = "original"
            columns = [columns[0], *(sounds[1:] for sounds in columns[1:])]
        clips.append((about, [sound for sounds in columns for sound in sounds]))
    return clips


def sounds_section(views: "list[RunView]") -> str:
    """A card for each clip: for each sound of it a spectrogram, in the colours of the original's loudness, and a player."""
    clips = shared_clips(views)
    if not clips:
        nothing = "There are no sounds." if len(views) == 1 else "The runs share no held-out clips."
        return f'<section id="sounds"><h2>Reconstructions</h2><p class="soft">{nothing}</p></section>'
    cards: list[str] = []
    for number, (about, sounds) in enumerate(clips):
        card = clip_card(number, about, sounds)
        if cards and sum(map(len, cards)) + len(card) > ROOM:
            break
        cards.append(card)
    more = f" There are {len(clips)} clips there." if len(cards) < len(clips) else ""
    return f"""<section id="sounds" style="--left:{MEL_LEFT:.1%};--width:{MEL_WIDTH:.1%}">
<h2>Reconstructions <small>of {len(cards)} held-out clips</small></h2>
<p class="soft">Of longer clips the first {SECONDS:g} s are here; the whole ones are in <code>examples/</code> as WAV files.{more}
Spectrograms are what the mel distance compares: 80 mel bands up to 8 kHz, natural logarithm of the magnitude; all of a clip
in the same colours, from the original's loudest band (white) to 80 dB below (black). Click into one to listen from there.</p>
{"".join(cards)}</section>"""


def clip_card(number: int, about: dict[str, Any], sounds: list[Sound]) -> str:
    """Spectrograms and players of one clip, the original first. about: key, seconds, speaker, text."""
    levels = [mel_levels(sound.audio, sound.rate) for sound in sounds]
    figures = []
    for column, (sound, level) in enumerate(zip(sounds, levels)):
        drawing = mel_chart(f"mel {number} {column}", level, levels[0].max())
        note = f"<small>{escape(sound.note)}</small>" if sound.note else ""
        label = f"{sound.title} of {Path(about['key']).name}"
        source = audio_uri(sound.audio, sound.rate)
        figures.append(f"""<figure class="sound" data-kind="{escape(sound.title)}">
<h4>{escape(sound.title)} <small>{nice(sound.rate / 1000)} kHz</small></h4>
<div class="mel">{drawing}<i></i></div>
<audio controls preload="metadata" aria-label="{escape(label)}" src="{source}"></audio>{note}</figure>""")
    cut = f"the first {SECONDS:g} s of {about['seconds']:.1f} s" if about["seconds"] > SECONDS else f"{about['seconds']:.1f} s"
    said = [cut, about["speaker"] or "", f"“{about['text']}”" if about["text"] else ""]
    title = f"{escape(Path(about['key']).name)} <small>{escape(' · '.join(filter(None, said)))}</small>"
    return f"""<article class="clip"><h3>{title}</h3>
<div class="sounds">{"".join(figures)}</div></article>"""


def codes_section(views: "list[RunView]") -> str:
    """Frame rate and bitrate, the use of each codebook, and the speed where it was measured."""
    parts = ['<section id="codes"><h2>Codes <small>of the held-out clips</small></h2>']
    for view in views:
        results = view.results or {}
        if view.tag and results.keys() & {"codes", "latents", "speed"}:
            parts.append(f"<h3>{escape(view.name)}</h3>")
        if "codes" in results:
            parts.append(_codes(results["codes"]))
        if "latents" in results:
            parts.append(_latents(results["latents"]))
        if "speed" in results:
            speed = results["speed"]
            parts.append(facts({
                f"seconds to {what} a second of sound": f"{nice(speed[f'{what}_rtf'])} ({speed['threads']} threads, "
                f"{speed['processor']})" for what in ("encode", "decode")}))
    if len(parts) == 1:
        parts.append('<p class="soft">Not measured.</p>')
    return "\n".join(parts) + "</section>"


def _codes(codes: dict[str, Any]) -> str:
    rows = "".join(
        f"""<tr><td>{number}</td><td>{book["size"]:,}</td>
<td class="bar"><i style="width:{book["usage"]:.2%}"></i>{book["used"]:,} ({book["usage"]:.1%})</td>
<td>{nice(book["perplexity"])}</td><td>{book["entropy_bits"]:.2f}</td></tr>"""
        for number, book in enumerate(codes["per_codebook"]))
    rate = facts({
        "frames a second": nice(codes["frame_rate"]),
        "bits of a frame": f"{nice(codes['bits_per_frame'])} from {codes['codebooks']} codebooks",
        "bitrate": f"{codes['bitrate']:,.0f} bit/s; {codes['entropy_bitrate']:,.0f} bit/s by the codes' entropy in these clips",
        "measured on": f"{codes['frames']:,} frames, {codes['seconds']:,.1f} s",
    })
    notes = "".join(f"<p>{escape(note)}</p>" for note in codes["warnings"])
    return f"""{rate}<div class="wide"><table class="books"><thead><tr><th>codebook</th><th>entries</th><th>used</th>
<th>perplexity</th><th>entropy, bits</th></tr></thead><tbody>{rows}</tbody></table></div>{notes}"""


def _latents(latents: dict[str, Any]) -> str:
    """Rate of a tokenizer that gives no codes."""
    rate = facts({
        "frames a second": nice(latents["frame_rate"]),
        "floats of a frame": latents["channels"],
        "floats a second": f"{latents['floats_per_second']:,.0f}",
        "measured on": f"{latents['frames']:,} frames, {latents['seconds']:,.1f} s",
    })
    return f'{rate}<p class="soft">{escape(latents["no_codes"])}</p>'


def _results(view: "RunView") -> dict[str, Any]:
    assert view.results is not None
    return view.results
