"""Work in a process of its own, with the memory that a service's actors have."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from cola_runtime.process_environment import in_actor_environment

P = ParamSpec("P")
R = TypeVar("R")


def as_an_actor(function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
    """What a module's `function` returns in a new process, which has base models' and devices' allocator.

    Nothing that this process holds or has freed is in its way. Raises what `function` raises.
    """
    with in_actor_environment(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **keywords).result()
