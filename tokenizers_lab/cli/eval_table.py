"""What `toklab eval` prints of a result."""

from typing import Any

from .common import say


def show_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Print every row's values; returns what to be wary of."""
    from tokenizers_lab.eval.summary_lines import format_value

    notes = []
    for row in rows:
        say(row["label"])
        for name, value in row["metrics"].items():
            title = value.get("title", name) + (f" to {value['reference']}" if "reference" in value else "")
            say(f"  {title:<18} {format_value(value)}{' ' + value['unit'] if value.get('unit') else ''}")
            notes += [f"{title}: {note}" for note in [*value.get("warnings", []), *filter(None, [value.get("missing")])]]
            lost = list(value.get("unmeasured", {}).values()) if value["value"] is not None else []
            notes += [f"{title} of {row['label']}: {lost.count(why)} of {len(value['per_clip'])} clips have no value: {why}"
                      for why in dict.fromkeys(lost)]
    return notes


def show_notes(result: dict[str, Any], notes: list[str]) -> None:
    """Print notes, each once, and what was left out."""
    for note in dict.fromkeys(notes):
        say(f"note: {note}")
    for reason in result["skipped"]:
        say(f"left out: {reason}")


def show_latents(latents: dict[str, Any]) -> None:
    """Print the size and use of an image tokenizer's latents."""
    shape = " × ".join(map(str, latents["shape"]))
    if latents["kind"] == "codes":
        say(f"latents: {shape} codes, {latents['bits_per_image']} bits an image, perplexity {latents['perplexity']}")
        return
    say(f"latents: {shape}, {latents['floats_per_image']} floats an image ({latents['values_per_float']:.1f} pixel values each), "
        f"{latents['active_units']} of {latents['shape'][0]} channels active")
    for name in ("mean", "std"):
        say(f"  {name} of channels: {min(latents[name]):.3f} to {max(latents[name]):.3f}")
    if latents["kl_bits_per_image"] is not None:
        say(f"  KL to N(0, I): {latents['kl_bits_per_image']:.1f} bits an image")


def show_codes(codes: dict[str, Any]) -> None:
    """Print bitrate and use of a speech tokenizer's codebooks."""
    say(f"codes: {codes['codebooks']} codebooks, {codes['frame_rate']:g} frames/s, {codes['bitrate']:.0f} bit/s "
        f"({codes['measured_bitrate']:.0f} with filled-up last frames), entropy {codes['entropy_bitrate']:.0f} bit/s")
    for number, book in enumerate(codes["per_codebook"]):
        say(f"  codebook {number}: {book['used']} of {book['size']} codes used ({book['usage']:.1%}), "
            f"perplexity {book['perplexity']:.1f}, {book['entropy_bits']:.2f} bits")


def show_speed(speed: dict[str, Any]) -> None:
    """Print real-time factors."""
    say(f"real-time factor: encode {speed['encode_rtf']:.4f}, decode {speed['decode_rtf']:.4f} (computation for each second of "
        f"sound, {speed['audio_seconds']:.1f} s at once, {speed['threads']} threads, {speed['processor']})")


def show_steps(steps: dict[str, Any]) -> None:
    """Print a diffusion decoder's quality and time at each number of sampling steps."""
    from tokenizers_lab.eval.summary_lines import step_cells, step_heads, steps_note

    say(f"sampling steps, on {steps['n']} of {steps['of']}")
    lines = [step_heads(steps), *step_cells(steps)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        say("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    say(f"  {steps_note(steps)}")
