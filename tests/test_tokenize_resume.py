"""`toklab tokenize` interrupted anywhere, or out of room, and run again: every sample once, the bytes of an undisturbed run."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenized_sources import contents, save_network, tokenize, write_clips, write_images, write_shards

from tokenizers_lab.cli import main as cli
from tokenizers_lab.tokenizing import folder as folder_module
from tokenizers_lab.tokenizing import writing

PHASES = ["first block", "close", "hash", "before rename", "after rename", "record", "manifest"]


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOKLAB_DEBUG", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {system: save_network(system, root / system) for system in ("rectok", "lm_spt")}


def in_child(function, *args) -> int:
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join(60)
    return child.exitcode


def break_at(phase: str, count: int, action) -> None:
    """Do `action` when that phase comes for the count-th time."""
    left = [count]

    def tick(here: bool) -> None:
        if here:
            left[0] -= 1
            if left[0] == 0:
                action()

    def around(owner, name, before=None, after=None):
        real = getattr(owner, name)

        def broken(*args, **kwargs):
            if before is not None:
                tick(before(*args))
            found = real(*args, **kwargs)
            if after is not None:
                tick(after(*args))
            return found

        setattr(owner, name, broken)

    def is_shard(_, target):
        return Path(target).name.startswith("shard-") and Path(target).parent.name != "records"

    def is_record(_, target):
        return Path(target).parent.name == "records"

    if phase == "first block":
        around(writing.TarShard, "add", after=lambda *_: True)
    elif phase == "close":
        around(writing.TarShard, "close", before=lambda *_: True)
    elif phase == "hash":
        around(folder_module, "sha256_of", before=lambda *_: True)
    elif phase == "before rename":
        around(os, "replace", before=is_shard)
    elif phase == "after rename":
        around(os, "replace", after=is_shard)
    elif phase == "record":
        around(os, "replace", before=is_record)
    elif phase == "manifest":
        around(os, "replace", before=lambda _, target: Path(target).name == "manifest.json" and Path(target).exists())


def killed(words, phase, count) -> None:
    break_at(phase, count, lambda: os.kill(os.getpid(), signal.SIGKILL))
    tokenize(*words)


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_anywhere(tmp_path, model, phase):
    write_clips(tmp_path / "clips", [4000, 9000, 12_000, 3000, 8000, 7000, 5000])
    words = ["--model", model["lm_spt"], "--shard-size", 2, "--batch-size", 1, "--workers", 0]
    assert tokenize("clips", "whole", *words) == 0
    expected = contents(tmp_path / "whole")
    for count in [1] if phase == "manifest" else [1, 2]:
        assert in_child(killed, ["clips", "out", *words], phase, count) == -signal.SIGKILL
        assert contents(tmp_path / "out") != expected
    assert tokenize("clips", "out", *words) == 0
    assert contents(tmp_path / "out") == expected


def test_a_kill_in_the_middle_of_webdataset_shards(tmp_path, model):
    write_shards(tmp_path / "tars", [3, 4, 2], speech=False, bad=(4,))
    words = ["--model", model["rectok"], "--batch-size", 2, "--workers", 0, "--bad-fraction", 0.5]
    assert tokenize("tars/*.tar", "whole", *words) == 0
    assert in_child(killed, ["tars/*.tar", "out", *words], "first block", 4) == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    assert tokenize("tars/*.tar", "out", *words) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["delete", "truncate", "change", "record"])
def test_a_damaged_shard_is_made_anew(tmp_path, model, capsys, harm):
    write_images(tmp_path / "images", 6)
    words = ["images", "out", "--model", model["rectok"], "--shard-size", 2, "--workers", 0]
    assert tokenize(*words) == 0
    whole = contents(tmp_path / "out")
    shard, record = tmp_path / "out/shard-000001.tar", tmp_path / "out/records/shard-000001.json"
    if harm == "delete":
        shard.unlink()
    elif harm == "truncate":
        shard.write_bytes(shard.read_bytes()[:-600])
    elif harm == "change":
        shard.write_bytes(shard.read_bytes().replace(b"NUMPY", b"NUMPI", 1))
    else:
        record.write_text("{")
    capsys.readouterr()
    assert tokenize(*words) == 0
    assert "2 of 3 shards are finished already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_full_disk(tmp_path, model, form):
    """The limit on the size of a file makes the kernel refuse the write, as a full disk does."""
    write_images(tmp_path / "images", 40)
    words = ["--model", model["rectok"], "--shard-size", 20, "--workers", 0, "--format", form]
    assert tokenize("images", "whole", *words) == 0
    largest = max(path.stat().st_size for path in (tmp_path / "whole").glob("shard-*"))

    def full(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(tokenize("images", "out", *words))

    for limit in (2000, largest - 100):
        assert in_child(full, limit) == cli.USER_ERROR
        assert not list((tmp_path / "out").glob("shard-*")) and not list((tmp_path / "out").rglob("*.tmp"))
    assert tokenize("images", "out", *words) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_space_left_is_one_line(tmp_path, model, capsys, monkeypatch):
    write_images(tmp_path / "images", 6)
    words = ["images", "out", "--model", model["rectok"], "--shard-size", 2, "--workers", 0]
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    capsys.readouterr()
    assert tokenize(*words) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and "run the same command again" in said
    monkeypatch.setattr(os, "fsync", real)
    capsys.readouterr()
    assert tokenize(*words) == 0
    assert "of 3 shards are finished already" in capsys.readouterr().out


def test_two_runs_at_once_are_refused(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(folder_module, "WAIT", 0.3)
    write_images(tmp_path / "images", 2)
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        words = ["images", "out", "--model", model["rectok"], "--workers", 0]
        assert tokenize(*words) == cli.USER_ERROR
        assert "another toklab tokenize is at work in out" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert tokenize(*words) == 0


def children_of(pid: int) -> list[int]:
    """Its child processes."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def started(words, seen: Path, slow: float = 0.05) -> subprocess.Popen:
    """The command in a process of its own, slowed down, once the file `seen` is there."""
    code = ("import sys, time, torch; torch.set_num_threads(1); from tokenizers_lab.tokenizing import local; "
            f"real = local.encode_block; local.encode_block = lambda *a: (time.sleep({slow}), real(*a))[1]; "
            "from tokenizers_lab.cli import main; main.main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", code, "tokenize", *map(str, words)], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not seen.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_the_kill_of_a_decoding_process(tmp_path, model):
    write_images(tmp_path / "images", 60)
    words = ["--model", model["rectok"], "--shard-size", 3, "--batch-size", 1, "--workers", 2, "--device", "cpu"]
    assert tokenize("images", "whole", *words) == 0
    process = started(["images", "out", *words], tmp_path / "out/records/shard-000002.json", slow=0.3)
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == cli.USER_ERROR and "a decoding process died" in said and said.count("\n") == 1
    assert tokenize("images", "out", *words) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["network", "parent"])
def test_the_kill_of_one_of_several_processes(tmp_path, model, victim):
    """Whoever dies, no process of the run is left after a moment, and the next run goes on."""
    write_images(tmp_path / "images", 60)
    words = ["--model", model["rectok"], "--shard-size", 3, "--batch-size", 1, "--workers", 0, "--device", "cpu"]
    assert tokenize("images", "whole", *words) == 0
    process = started(["images", "out", *words, "--processes", "2"], tmp_path / "out/records/shard-000001.json")
    children = [pid for pid in children_of(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(children[0] if victim == "network" else process.pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert len(children) == 2
    if victim == "network":
        assert process.returncode == cli.USER_ERROR and "a process that runs the network died" in said
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert tokenize("images", "out", *words, "--processes", 2 if victim == "network" else 1) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
