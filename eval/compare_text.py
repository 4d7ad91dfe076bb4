"""A comparison in words: names of rows and columns, the protocol, and the table as Markdown."""

from typing import Any

from .summary_lines import format_value

QUALITY, RATE, COST = "quality", "rate", "cost"      # groups of columns
HIDDEN = ("audio_sha256", "images_sha256", "metric_rates")


def label_of(row: dict[str, Any]) -> str:
    """A row's name, with a warning behind it where its weights are random or it has no numbers."""
    if "failed" in row:
        return f"{row['label']} (failed)"
    return f"{row['label']} (random weights)" if row.get("random") else row["label"]


def heading(column: dict[str, Any]) -> str:
    """A column's title with its unit and an arrow to the better side."""
    arrow = {"higher": " ↑", "lower": " ↓"}.get(column["better"], "")
    return column["title"] + (f", {column['unit']}" if column["unit"] else "") + arrow


def noun_of(result: dict[str, Any]) -> str:
    """What the items are."""
    return "clips" if "speech" in result["kind"] else "images"


def threads_of(costs: dict[str, Any]) -> str:
    """How many threads were timed."""
    return f"{costs['threads']} thread{'s' if costs['threads'] > 1 else ''}"


def failures(result: dict[str, Any]) -> list[str]:
    """Each model that could not be measured, with the reason."""
    return [f"{row['label']} could not be measured: {row['failed']}" for row in result["rows"] if "failed" in row]


def protocol_lines(result: dict[str, Any]) -> list[str]:
    """What was measured, how and where, in words."""
    protocol, environment, costs = result["protocol"], result["environment"], result["costs"]
    said = "; ".join(f"{name}: {value}" for name, value in protocol.items() if name not in HIDDEN and value is not None)
    networks = {metric["network"] for row in result["rows"] for metric in row["metrics"].values() if metric.get("network")}
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    digest = protocol.get("audio_sha256") or protocol.get("images_sha256")
    timing = "" if costs is None else (
        f"Speed and memory: {costs['batch']}; {costs['repeats']} repeats, {costs['order']}; {threads_of(costs)}, "
        f"{costs['processor']}. Peak memory: {costs['memory']}.")
    return [
        f"{result['n']} {noun_of(result)}. Protocol: {said}.",
        f"SHA-256 of the data: {digest}.",
        *(f"Network: {network}." for network in sorted(map(str, networks))),
        f"Machine: {environment['processor']}, {environment['cpu_count']} cores, {environment['platform']}; commit "
        f"{environment['commit']}; {versions}.",
        *filter(None, [timing]),
        "Intervals of quality are at 95 %, over the items; those of speed are the range of the repeats. ↑: higher is better, "
        "↓: lower is better. Bold: the best of the models whose weights are not random.",
        *failures(result),
        *(f"Note: {text}" for text in result["warnings"]),
        *(f"Left out: {text}" for text in result["skipped"]),
    ]


def cell_text(metric: dict[str, Any] | None, column: dict[str, Any], interval: bool = True) -> str:
    """A row's value in a column; rates and costs, whose sizes are far apart, in four significant digits."""
    if metric is None or metric["value"] is None or column["group"] == QUALITY:
        return format_value(metric, interval)
    bounds = metric["uncertainty"] if interval else None
    text = f"{metric['value']:.4g}" if metric["value"] < 1e4 else f"{metric['value']:.0f}"
    return text + (f" [{bounds['low']:.4g}, {bounds['high']:.4g}]" if bounds else "")


def markdown(result: dict[str, Any]) -> str:
    """The table, the margins to the first model, and the protocol."""
    columns = result["columns"]
    lines = [f"| | {' | '.join(_cell_text(heading(column)) for column in columns)} |", "|---|" + "---:|" * len(columns)]
    for row in result["rows"]:
        cells = []
        for column in columns:
            text = cell_text(row["metrics"].get(column["name"]), column)
            cells.append(f"**{text}**" if result["best"].get(column["name"]) == row["label"] else text)
        lines.append(f"| {_cell_text(label_of(row))} | {' | '.join(cells)} |")
    if result["margins"]:
        lines += ["", f"Better than {result['margins'][0]['over']} by (mean of the differences, item by item):", ""]
        names = list(dict.fromkeys(margin["metric"] for margin in result["margins"]))
        titles = {column["name"]: column["title"] for column in columns}
        lines += [f"| | {' | '.join(_cell_text(titles[name]) for name in names)} |", "|---|" + "---:|" * len(names)]
        for label in dict.fromkeys(margin["row"] for margin in result["margins"]):
            found = {margin["metric"]: margin for margin in result["margins"] if margin["row"] == label}
            lines.append(f"| {_cell_text(label)} | {' | '.join(margin_text(found.get(name)) for name in names)} |")
    return "\n".join([f"# {title_of(result)}", "", *lines, "", *(f"- {line}" for line in protocol_lines(result))]) + "\n"


def title_of(result: dict[str, Any]) -> str:
    """The kind, as a title."""
    return result["kind"][0].upper() + result["kind"][1:]


def margin_text(margin: dict[str, Any] | None) -> str:
    """A difference with its sign and interval."""
    if margin is None:
        return "–"
    bounds = margin["uncertainty"]
    return f"{margin['value']:+.4g}" + (f" [{bounds['low']:+.3g}, {bounds['high']:+.3g}]" if bounds else "")


def _cell_text(text: str) -> str:
    return text.replace("|", "\\|")
