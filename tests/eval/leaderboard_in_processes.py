"""Compares codecs in one process of several: RANK WORLD STORE RESULT; the first writes the result and its examples."""

import json
import sys
from pathlib import Path

import torch
from leaderboards import codecs, speech

torch.set_num_threads(1)
rank, world = map(int, sys.argv[1:3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
result, examples = speech(codecs())
if rank == 0:
    kept = {item.key: {label: made.tolist() for label, (made, _) in item.made.items()} for item in examples.items}
    Path(sys.argv[4]).write_text(json.dumps([result, kept]))
torch.distributed.destroy_process_group()
