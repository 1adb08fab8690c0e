"""Who counts in a window of fairness, and that the simulated service loses nothing when its machines fail."""

from __future__ import annotations

import pytest

from cola_runtime.testing.backlogs import Backlogs, jain_index
from cola_runtime.testing.simulated_service import Scale, Simulation


def test_the_index_is_one_for_equal_shares_and_one_in_n_where_one_has_everything() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([0.0, 7.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([1.0, 2.0]) == pytest.approx(0.9)


def test_tokens_over_weight_of_those_count_who_had_something_waiting_all_the_window() -> None:
    backlogs = Backlogs([1.0, 2.0, 1.0, 1.0])
    for tenant in (0, 1, 2):
        backlogs.wait(tenant, 0.0)
    backlogs.wait(3, 1.0)  # only later
    backlogs.leave(2)
    backlogs.wait(2, 5.0)  # was away for a moment
    for tenant, tokens in ((0, 100), (1, 100), (2, 999), (3, 999)):
        backlogs.serve(tenant, tokens)
    backlogs.end_window(10.0)
    (window,) = backlogs.windows
    assert (window.tenants, window.least_over_mean, window.most_over_mean) == (2, 50 / 75, 100 / 75)
    assert window.jain_index == pytest.approx(0.9)


def test_a_window_counts_what_was_served_in_it_only_and_one_tenant_alone_is_no_window() -> None:
    backlogs = Backlogs([1.0, 1.0])
    backlogs.wait(0, 0.0)
    backlogs.serve(0, 1000)
    backlogs.end_window(10.0)
    assert backlogs.windows == []
    backlogs.wait(1, 10.0)
    backlogs.serve(0, 50)
    backlogs.serve(1, 50)
    backlogs.end_window(20.0)
    assert [window.jain_index for window in backlogs.windows] == [pytest.approx(1.0)]


@pytest.mark.parametrize("failures", [0.01, 20_000.0])
def test_a_simulated_service_loses_no_job_when_machines_fail(failures: float) -> None:
    scale = Scale(tenants=20, jobs=200, replicas=3, devices=5, load=0.5, failures=failures)
    simulation = Simulation(scale, 0)
    measured = simulation.run()
    waiting = [ticket for replica in simulation._replicas for ticket in replica.queue._entries]
    alive = [job for job in simulation._jobs if job.replica >= 0 and job.done < job.steps]
    assert sum(simulation.backlogs._waiting) == len(waiting) == sum(len(job.waiting) for job in alive)
    assert (measured.failures > 50) == (measured.steps_repeated > 0) == (failures > 1)
    assert measured.jobs_done >= 100
    assert sum(job.done for job in simulation._jobs) == measured.steps_done - measured.steps_repeated
