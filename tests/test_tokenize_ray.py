"""`toklab tokenize --ray` on a Ray cluster of two nodes: the bytes of a local run, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenized_sources import contents, save_network, tokenize, write_clips, write_shards

ray = pytest.importorskip("ray")
STORE = 200_000_000      # bytes of a node's object store


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU: one decodes, the other has the network. Ended whatever happens."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        del node["include_dashboard"]
        made.add_node(**node)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOKLAB_DEBUG", raising=False)
    torch.set_num_threads(1)


def networks(cluster) -> list[int]:
    """Processes of the cluster that run a network."""
    raylets = {info.process.pid for node in cluster.list_all_nodes() for kind, started in node.all_processes.items()
               if "raylet" in kind for info in started}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title, parent = (path / "cmdline").read_text(), int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent in raylets and "Network" in title:
            found.append(int(path.name))
    return found


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_worker_leave_no_trace(tmp_path, cluster):
    model = save_network("lm_spt", tmp_path / "model")
    write_clips(tmp_path / "clips", [24_000 * (1 + i % 4) for i in range(36)], rate=24_000)
    (tmp_path / "clips/7.flac").write_bytes(b"no sound")
    words = ["--model", model, "--shard-size", 3, "--batch-size", 2, "--window", 3.5, "--bad-fraction", 0.1]
    assert tokenize("clips", "whole", *words, "--workers", 0) == 0
    command = [sys.executable, "-m", "tokenizers_lab", "tokenize", "clips", "out", *map(str, words), "--ray", cluster.address]

    def recorded(count):
        return lambda: len(list((tmp_path / "out/records").glob("*.json"))) >= count

    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(recorded(2), first)
    first.kill()
    first.communicate()
    assert 2 <= len(list((tmp_path / "out/records").glob("*.json"))) < 12
    there = len(list((tmp_path / "out/records").glob("*.json")))
    second = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(recorded(there + 1), second)
    victims = networks(cluster)
    assert victims and not (tmp_path / "out/records/shard-000011.json").exists()
    os.kill(victims[0], signal.SIGKILL)
    said, errors = second.communicate(timeout=150)
    assert second.returncode == 0, errors
    assert f"{there} of 12 shards are finished already" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_shards_on_the_cluster(tmp_path, cluster, capsys):
    model = save_network("rectok", tmp_path / "model")
    write_shards(tmp_path / "tars", [7, 0, 4], speech=False, bad=(3,))
    words = ["--model", model, "--batch-size", 2, "--bad-fraction", 0.1, "--format", "parquet"]
    assert tokenize("tars/*.tar", "whole", *words, "--workers", 0) == 0
    assert tokenize("tars/*.tar", "out", *words, "--ray", cluster.address) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["samples"] == 10

    whole = (tmp_path / "tars/2.tar").read_bytes()
    (tmp_path / "tars/2.tar").write_bytes(whole[:3000])
    capsys.readouterr()
    assert tokenize("tars/*.tar", "torn", *words, "--ray", cluster.address) == 2
    said = capsys.readouterr().err
    assert "DataError: shard" in said and "2.tar is damaged" in said and "Traceback" not in said


@pytest.mark.parametrize("address, said", [
    ("127.0.0.1:9", "no Ray cluster answers"), ("somewhere", "write HOST:PORT"), ("127.0.0.1:port", "write HOST:PORT")])
def test_no_cluster_is_one_line(tmp_path, capsys, address, said):
    model = save_network("rectok", tmp_path / "model")
    write_shards(tmp_path / "tars", [1], speech=False)
    assert tokenize("tars/0.tar", "out", "--model", model, "--ray", address) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"ConfigError: --ray {address}: {said}") and shown.count("\n") == 1
