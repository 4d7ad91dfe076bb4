"""Processes that worked together end without threads of theirs: else some abort at their exit."""

import subprocess
import sys
from pathlib import Path

import pytest

# torch.distributed.nn.functional is imported when anything of torch.distributed.nn is used, within a run too
EVALUATES = """
from tokenizers_lab.cli.common import process_group
from tokenizers_lab.eval.gather import all_processes
with process_group() as rank:
    import torch.distributed.nn.functional
    assert all_processes(rank) == [0, 1]
"""
TRAINS = """
import torch
from tokenizers_lab.training.loop import Accelerator
accelerator = Accelerator(cpu=True)
import torch.distributed.nn.functional
assert accelerator.reduce(torch.ones(()), "sum") == 2
del accelerator
from tokenizers_lab.cli.train import leave_process_group
leave_process_group()
"""
COUNTS = """
from pathlib import Path
names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("script", [EVALUATES, TRAINS], ids=["evaluation", "training"])
def test_no_thread_of_gloo_outlives_the_group(tmp_path, script):
    file = tmp_path / "script.py"
    file.write_text(script + COUNTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
