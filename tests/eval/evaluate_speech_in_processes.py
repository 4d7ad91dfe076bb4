"""Evaluates the toy codec on one process's share of the clips: RANK WORLD STORE RESULT; the first process writes the result."""

import sys
from pathlib import Path

import torch
from toy_speech import Steps, config

from tokenizers_lab.eval.provenance import write_json
from tokenizers_lab.eval.speech_data import evaluate_speech_data

torch.set_num_threads(1)
rank, world = map(int, sys.argv[1:3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
result = evaluate_speech_data(Steps.fitted(), config(), ["mel", "stft", "bitrate", "rtf"], batch_size=1)
if rank == 0:
    write_json(result, Path(sys.argv[4]))
torch.distributed.destroy_process_group()
