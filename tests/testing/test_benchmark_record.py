import json
from datetime import UTC, datetime

import pytest

from cola_runtime.testing.record import Timing, argument_parser, compare, emit, interleaved, record


def test_every_benchmark_takes_the_common_arguments():
    arguments = argument_parser("x").parse_args(["--quick", "--json", "--seed", "4"])
    assert (arguments.quick, arguments.json, arguments.seed) == (True, True, 4)


def test_the_last_line_is_one_json_object_and_the_same_is_saved(tmp_path, capsys):
    kept = record("speed", {"ratio": 1.25, "by_size": {"16": 2.0}}, seed=3, started=datetime.now(UTC))
    emit(kept, True, folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == kept == json.loads((tmp_path / "speed.json").read_text())
    assert kept["by_size"] == {"16": 2.0}
    assert kept["seed"] == 3
    assert kept["machine"]["cores"] >= 1
    assert kept["versions"]["torch"].startswith("2.")
    assert any(line.split() == ["by_size.16", "2"] for line in lines)


def test_without_json_only_the_table_is_printed(tmp_path, capsys):
    emit(record("speed", {"ratio": 1.25}, seed=0, started=datetime.now(UTC)), False, folder=tmp_path)
    assert "{" not in capsys.readouterr().out
    assert (tmp_path / "speed.json").is_file()


def test_results_cannot_shadow_the_context():
    with pytest.raises(ValueError, match="seed"):
        record("speed", {"seed": 1}, seed=0, started=datetime.now(UTC))


def test_sides_take_turns_in_alternating_order_and_warm_up_is_not_counted():
    calls = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1
    )
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(timing.wall_seconds) for timing in timings.values()] == [3, 3]
    assert all(seconds >= 0 for seconds in timings["a"].thread_cpu_seconds)


def test_thread_cpu_time_counts_work_and_not_waiting():
    import threading

    timings = interleaved(
        {"work": lambda: sum(range(300_000)), "wait": lambda: threading.Event().wait(0.05)},
        rounds=1,
        warmup=0,
    )
    assert timings["wait"].wall_seconds[0] >= 0.05
    assert timings["wait"].thread_cpu_seconds[0] < timings["work"].thread_cpu_seconds[0]


def test_both_ratios_are_taken_against_the_baseline():
    timings = {
        "base": Timing(wall_seconds=(1.0, 2.0, 4.0), thread_cpu_seconds=(1.0, 1.0, 1.0)),
        "ours": Timing(wall_seconds=(3.0, 2.0, 8.0), thread_cpu_seconds=(2.0, 3.0, 4.0)),
    }
    ours = compare(timings, "base")["ours"]
    assert ours["wall_median_seconds"] == 3.0
    assert ours["wall_over_baseline"] == 1.5
    assert ours["wall_paired_over_baseline"] == 2.0
    assert ours["thread_cpu_over_baseline"] == ours["thread_cpu_paired_over_baseline"] == 3.0
