"""Numbers of a result as text: what the terminal and the report both say."""

from typing import Any


def step_heads(steps: dict[str, Any]) -> list[str]:
    """Heads of the columns of `step_cells`."""
    metrics = steps["rows"][0]["metrics"].values()
    return ["steps", *(f"{m['title']}, {m['unit']}" if m.get("unit") else m["title"] for m in metrics), f"s per {steps['per']}"]


def step_cells(steps: dict[str, Any], interval: bool = True) -> list[list[str]]:
    """A row of texts for each number of steps: steps, each metric, seconds."""
    names = list(steps["rows"][0]["metrics"])
    return [[str(row["steps"]), *(format_value(row["metrics"].get(name), interval) for name in names), f"{row['seconds']:.3g}"]
            for row in steps["rows"]]


def steps_note(steps: dict[str, Any]) -> str:
    """What the times are of, and how it was decoded."""
    said = [f"{name} {value}" for name, value in steps["protocol"].items()]
    return (f"decoding alone, median, {steps['clock']} ({steps['device']}); encoding, once: {steps['encode_seconds']:.3g} s per "
            f"{steps['per']}" + (f"; {', '.join(said)}" if said else ""))


def latents_line(latents: dict[str, Any]) -> str:
    """Rate of a speech tokenizer's continuous latents in one line."""
    return (f"latents: {latents['frame_rate']:g} frames a second, {latents['channels']} channels, "
            f"{latents['floats_per_second']:,.0f} floats a second; {latents['no_codes']}")


def codes_line(codes: dict[str, Any]) -> str:
    """Rate and use of a speech tokenizer's codes in one line."""
    return (f"codes: {codes['frame_rate']:g} frames a second, {codes['codebooks']} codebooks, {codes['bitrate']:,.0f} bit/s "
            f"({codes['entropy_bitrate']:,.0f} by entropy); {codes['usage']:.1%} of the entries used, mean perplexity "
            f"{codes['perplexity']:.1f}")


def format_value(result: dict[str, Any] | None, interval: bool = True) -> str:
    """A metric's value without its unit and, if asked, its 95 % interval; or that it is missing, or none of this row."""
    if result is None:
        return "–"
    if result["value"] is None:
        return "not here"
    digits = 2 if result["unit"] == "dB" else 4 if abs(result["value"]) < 100 else 1
    bounds = result["uncertainty"] if interval else None
    text = f"{result['value']:.{digits}f}"
    return text if bounds is None else f"{text} [{bounds['low']:.{digits}f}, {bounds['high']:.{digits}f}]"
