"""The quarantine list: each key once, always whole lines, and the share that ends a run."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from tokenizers_lab.data.quarantine import JUDGED_FROM, Bad, Quarantine
from tokenizers_lab.errors import DataError


def entries(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_key_is_listed_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, 1.0)
    for _ in range(2):
        quarantine.count(5, [Bad("ä.jpg", "ä.jpg: broken"), Bad("b", "b: broken"), Bad("ä.jpg", "ä.jpg: broken")])
    assert entries(path) == [{"key": "ä.jpg", "reason": "ä.jpg: broken"}, {"key": "b", "reason": "b: broken"}]
    assert (quarantine.seen, quarantine.bad) == (16, 6)
    Quarantine(path, 1.0).count(0, [Bad("b", "again"), Bad("c", "c: broken")])   # a resumed run
    assert [e["key"] for e in entries(path)] == ["ä.jpg", "b", "c"]


def test_a_line_torn_by_a_kill_is_replaced(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"key": "a", "reason": "x"}\n{"key": "b", "rea')
    Quarantine(path, 1.0).count(0, [Bad("a", "x"), Bad("b", "y")])
    assert entries(path) == [{"key": "a", "reason": "x"}, {"key": "b", "reason": "y"}]


def test_the_share_that_ends_a_run(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.01)
    quarantine.count(0, [Bad(str(i), f"{i}: broken") for i in range(JUDGED_FROM // 100)])   # 1 % of JUDGED_FROM
    with pytest.raises(DataError, match=r"11 of 11 .*bad_fraction \(0.01\).*q\.jsonl.*last: broken"):
        quarantine.count(0, [Bad("last", "last: broken")])
    later = Quarantine(None, 0.01, seen=4990, bad=49)
    later.count(9, [Bad("50", "x")])       # 50 of 5000
    with pytest.raises(DataError):
        later.count(98, [Bad("51", "x"), Bad("52", "x")])


def test_no_tolerance_ends_at_the_first_bad_sample():
    quarantine = Quarantine(None, 0.0)
    quarantine.count(100, [])
    with pytest.raises(DataError):
        quarantine.count(1, [Bad("a", "x")])


def _write(path: Path, rank: int) -> None:
    quarantine = Quarantine(path, 1.0)
    read = quarantine._read_others
    quarantine._read_others = lambda file: (read(file), time.sleep(0.003))   # long enough for another rank to come between
    for i in range(20):
        quarantine.count(0, [Bad(f"{i}", "r" * 200), Bad(f"{rank}-{i}", "r" * 200)])


def test_several_ranks_write_whole_lines_and_no_key_twice(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    processes = [multiprocessing.Process(target=_write, args=(path, rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    keys = [e["key"] for e in entries(path)]
    assert len(keys) == 80 and set(keys) == {f"{i}" for i in range(20)} | {f"{r}-{i}" for r in range(3) for i in range(20)}
