"""Word and character error rates: counts of edits, rates of clips and of a corpus, and their intervals.

The counts are those of jiwer, also where several shortest alignments exist: errors do not depend on the choice, hits do, and
with them WIL. Texts are compared as they come; `tokenizers_lab.text_normalisers` makes them comparable first.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tokenizers_lab.errors import InputError

from .bootstrap import Interval, mean_summary, resampled_interval

MAX_CELLS = 4_000_000_000     # reference × hypothesis: two bits each are kept for the way back


@dataclass(frozen=True)
class EditCounts:
    """How a hypothesis differs from its reference: each reference unit is a hit, substituted or deleted."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: "EditCounts") -> "EditCounts":
        return EditCounts(self.hits + other.hits, self.substitutions + other.substitutions,
                          self.deletions + other.deletions, self.insertions + other.insertions)

    @property
    def reference(self) -> int:
        """Units of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def hypothesis(self) -> int:
        """Units of the hypothesis."""
        return self.hits + self.substitutions + self.insertions

    @property
    def errors(self) -> int:
        """The edit distance."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for each unit of the reference (WER, CER); against an empty reference, the number of insertions (jiwer)."""
        return float(self.errors / self.reference) if self.reference else float(self.insertions)

    @property
    def information_lost(self) -> float:
        """WIL (Morris et al. 2004): 1 − hits² / (reference · hypothesis), in [0, 1]; 0 if both are empty."""
        if not self.reference or not self.hypothesis:
            return float(bool(self.reference or self.hypothesis))
        return 1 - (self.hits / self.reference) * (self.hits / self.hypothesis)


def word_edits(reference: str, hypothesis: str) -> EditCounts:
    """Edits between the words of two texts; words are what spaces separate."""
    return count_edits(reference.split(), hypothesis.split())


def character_edits(reference: str, hypothesis: str) -> EditCounts:
    """Edits between the characters of two texts, single spaces included, spaces around the text left out."""
    return count_edits(" ".join(reference.split()), " ".join(hypothesis.split()))


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> EditCounts:
    """Edits of a shortest alignment (Levenshtein); of several, the one that jiwer takes.

    Going back from the end, jiwer's way (rapidfuzz's, Hyyrö 2003) is a deletion wherever one is on a shortest path, else an
    insertion if that is where its matrix of differences falls, else a pair; common beginnings and ends are paired first.
    Beyond about 2,000 × 2,000 units rapidfuzz cuts the matrix into parts: the distance stays the same, the kinds of edits may
    then differ. Raises InputError for texts that would need gigabytes.
    """
    codes: dict[str, int] = {}
    ref = [codes.setdefault(unit, len(codes)) for unit in reference]
    hyp = [codes.setdefault(unit, len(codes)) for unit in hypothesis]
    common = 0
    while common < min(len(ref), len(hyp)) and ref[common] == hyp[common]:
        common += 1
    ref, hyp = ref[common:], hyp[common:]
    ending = 0
    while ending < min(len(ref), len(hyp)) and ref[-1 - ending] == hyp[-1 - ending]:
        ending += 1
    ref, hyp = ref[: len(ref) - ending], hyp[: len(hyp) - ending]
    return _trace(ref, hyp, common + ending)


def _trace(ref: list[int], hyp: list[int], hits: int) -> EditCounts:
    """The way back through the differences of the distance matrix; `hits` were counted before."""
    rises, falls = _differences(ref, hyp)
    i, j = len(ref), len(hyp)
    substitutions = deletions = insertions = 0
    while i and j:
        if _bit(rises[j - 1], i - 1):                  # one more reference unit costs one more edit
            deletions += 1
            i -= 1
        elif j > 1 and _bit(falls[j - 2], i - 1):      # without this hypothesis unit the reference unit saves an edit
            insertions += 1
            j -= 1
        else:
            same = ref[i - 1] == hyp[j - 1]
            hits, substitutions = hits + same, substitutions + (not same)
            i, j = i - 1, j - 1
    return EditCounts(hits, substitutions, deletions + i, insertions + j)


def _differences(ref: list[int], hyp: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each hypothesis unit, where the distance rises or falls by one from one reference unit to the next, as packed bits."""
    if len(ref) * len(hyp) > MAX_CELLS:
        raise InputError(f"texts of {len(ref):,} and {len(hyp):,} units are too long to align; cut them into utterances")
    units, steps = np.asarray(ref), np.arange(len(ref) + 1)
    before, rises, falls = steps, [], []
    for row, unit in enumerate(hyp, start=1):
        best = np.minimum(before[:-1] + (units != unit), before[1:] + 1)     # paired, or inserted
        distances = np.minimum.accumulate(np.concatenate([[row], best]) - steps) + steps      # or reference units deleted
        difference = np.diff(distances)
        rises.append(np.packbits(difference == 1))
        falls.append(np.packbits(difference == -1))
        before = distances
    return rises, falls


def _bit(packed: np.ndarray, place: int) -> bool:
    return bool(packed[place >> 3] >> (7 - (place & 7)) & 1)


def corpus_interval(
    counts: Sequence[EditCounts], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Bootstrap interval of the corpus rate: utterances are drawn, errors and reference units summed (Bisani and Ney 2004).

    Expanded for small samples as `bootstrap.mean_interval`; the order of the utterances does not matter. None for fewer than
    two utterances with a reference, which are the only ones that count.
    """
    pairs = np.array(sorted((c.errors, c.reference) for c in counts if c.reference), dtype=np.float64).reshape(-1, 2)
    n = len(pairs)
    if n < 2:
        return None

    def rate(drawn: np.ndarray) -> np.ndarray:
        sums = pairs[drawn].sum(axis=1)
        return sums[:, 0] / sums[:, 1]

    return resampled_interval(rate, n, level, resamples, seed, what="utterances")


def summarise_edits(counts: Sequence[EditCounts], seed: int = 0) -> dict[str, Any]:
    """What a result says of a corpus, as JSON data: rates in %, and counts.

    value: the corpus rate, errors of all utterances over units of all references, with its interval (uncertainty); macro: the
    mean of the utterances' rates, with its own; wil: WIL of the summed counts, as jiwer gives it.
    Raises InputError without utterances, or if every reference is empty.
    """
    total = sum(counts, EditCounts())
    if not total.reference:
        raise InputError("an error rate needs at least one reference that is not empty")
    macro = mean_summary([100 * c.rate for c in counts], seed)
    return {
        "value": 100 * total.rate, "uncertainty": _percent(corpus_interval(counts, seed=seed)),
        "macro": macro["value"], "macro_uncertainty": macro["uncertainty"], "wil": 100 * total.information_lost,
        **asdict(total), "reference_units": total.reference, "hypothesis_units": total.hypothesis, "utterances": len(counts),
    }


def _percent(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(replace(interval, low=100 * interval.low, high=100 * interval.high))
