"""Encode and decode: our codecs against transformers' Mimi, EnCodec and DAC and the package encodec, in turns, in one process.

python scripts/bench_codecs.py [--threads N] [--seconds S] [--rounds R] [--only TEXT] [--markdown]

All networks have random weights, on which speed does not depend, at their full size: DM-Codec and LM-SPT as released, EnCodec
24 kHz, Mimi, DAC 16 kHz. Real-time factor: seconds of computation for each second of sound, below 1 is faster than real time.
With one thread, processor time is what a quiet machine's clock would show; the clock also counts what other programs take.
Below them stand pairs of one shape, the same layers and sizes in our code and in transformers', and the ratio of their
processor times: ours / theirs, each round its own. Goal: at most 1. The sound is sample speech at each codec's rate.
"""

import argparse
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import WeightsMissing
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.eval.speech_peers import DacPeer, EncodecPeer, load_speech_peer, random_peer
from tokenizers_lab.models.dm_codec.config import ModelConfig as DMCodecConfig
from tokenizers_lab.models.dm_codec.model import DMCodec
from tokenizers_lab.models.lm_spt.config import ModelConfig as LMSPTConfig
from tokenizers_lab.models.lm_spt.model import LMSPT
from tokenizers_lab.settings import SpeechDataConfig

PEERS = ("encodec:random@8", "encodec-package:random@8", "mimi:random@8", "dac:random")
SAME_ENCODEC = {      # DM-Codec's shape but for the direction of its encoder's LSTM, which EnCodec's cannot turn
    "sampling_rate": 16_000, "num_filters": 64, "hidden_size": 1024, "use_causal_conv": False, "target_bandwidths": [4.0]}
SAME_DAC = {          # LM-SPT's shape, with one encoder
    "sampling_rate": 24_000, "encoder_hidden_size": 32, "decoder_hidden_size": 1536, "downsampling_ratios": [4, 5, 6, 8, 2],
    "n_codebooks": 8, "codebook_size": 4096}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--seconds", type=float, default=10.0, help="of sound")
parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
parser.add_argument("--only", default="", metavar="TEXT", help="codecs and shapes with this in their name")
parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.set_flush_denormal(True)      # what random weights make of sound may be so small that a processor takes many times as long

# --- who takes part ---------------------------------------------------------------------------------------------------------
torch.manual_seed(0)
systems = {
    "DM-Codec": DMCodec(DMCodecConfig()).eval().fuse(),
    "LM-SPT, 12.5 Hz": LMSPT(LMSPTConfig()).eval().fuse(),
}
absent = {}
for name in PEERS:
    try:
        systems[name.replace(":random", "")] = load_speech_peer(name)
    except WeightsMissing as error:
        absent[name] = str(error)
pairs = {
    "EnCodec's shape, 16 kHz, width 64": (
        DMCodec(DMCodecConfig(bidirectional=False)).eval(), random_peer(EncodecPeer, SAME_ENCODEC)),
    "DAC's shape, 24 kHz, LM-SPT's widths": (
        LMSPT(LMSPTConfig(shared_encoder=True, semantic_size=4096)).eval(), random_peer(DacPeer, SAME_DAC)),
}
for shape, (ours, theirs) in pairs.items():
    ours.fuse()
    systems[f"{shape}: ours"], systems[f"{shape}: transformers"] = ours, theirs
    assert (ours.sample_rate, ours.hop, ours.codebooks) == (theirs.sample_rate, theirs.hop, theirs.codebooks)


def sound(rate):
    """(1, 1, samples) of sample speech, clips one after another."""
    cfg = SpeechDataConfig(train="sample:speech", val="sample:speech", sample_rate=rate, workers=0)
    pieces, wanted = [], round(args.seconds * rate)
    for batch in validation_batches(cfg, 1):
        pieces.append(batch.audio[0, 0])
        if sum(map(len, pieces)) >= wanted:
            break
    return torch.cat(pieces)[None, None, :wanted].clamp(-1, 1)


systems = {name: system for name, system in systems.items() if args.only in name}
pairs = [shape for shape in pairs if f"{shape}: ours" in systems and f"{shape}: transformers" in systems]
sounds = {rate: sound(rate) for rate in sorted({system.sample_rate for system in systems.values()})}


def timed(function):
    """(its result, wall seconds, processor seconds of all threads)."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - processor


# --- rounds: every system once, in turns -----------------------------------------------------------------------------------
console = Console(width=170)
times = {name: {"encode": [], "decode": []} for name in systems}      # (wall, processor) of each round
with torch.inference_mode():
    for number in range(args.rounds + 1):
        for name, system in systems.items():
            audio = sounds[system.sample_rate]
            codes, *encode = timed(lambda: system.encode(audio).codes)      # noqa: B023 (called at once)
            _, *decode = timed(lambda: system.decode(codes))      # noqa: B023
            if number:      # the first one warms up
                times[name]["encode"].append(encode)
                times[name]["decode"].append(decode)
        print(f"round {number} of {args.rounds}", file=sys.stderr)


# --- tables -----------------------------------------------------------------------------------------------------------------
def real_time(name, part):
    """Median real-time factor by processor time, and by the clock."""
    wall, processor = (statistics.median(column) / args.seconds for column in zip(*times[name][part]))
    return f"{processor:.3f} ({wall:.3f})"


def ratio(ours, theirs, part):
    """Median and quartiles of the rounds' ratios of processor time."""
    found = [a / b for (_, a), (_, b) in zip(times[ours][part], times[theirs][part])]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def show(title, heads, rows):
    """A table, or its Markdown."""
    if args.markdown:
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
        print("\n".join([title, "", *lines, ""]))
        return
    table = Table(*heads, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


machine = environment()
show(
    f"{args.seconds:g} s of speech, {args.threads} thread(s), {machine['processor']}, torch {torch.__version__}, random weights; "
    f"real-time factors: processor time, in brackets by the clock; median of {args.rounds} rounds in turns",
    ["codec", "parameters", "Hz", "frames/s", "codebooks", "encode", "decode"],
    [[name, f"{sum(p.numel() for p in system.parameters()) / 1e6:.1f} M", str(system.sample_rate),
      f"{system.sample_rate / system.hop:g}", str(system.codebooks), real_time(name, "encode"),
      real_time(name, "decode")] for name, system in systems.items()])
show("ours / transformers, processor time, quartiles of the rounds in brackets (goal: at most 1)", ["shape", "encode", "decode"],
     [[shape, *(ratio(f"{shape}: ours", f"{shape}: transformers", part) for part in ("encode", "decode"))] for shape in pairs])
for name, reason in absent.items():
    print(f"left out: {name}: {reason}")
