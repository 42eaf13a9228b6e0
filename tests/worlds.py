"""Runs of several processes that many cases of one module look at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def once(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, called once for the same arguments. Unlike functools.cache it keeps a failure too: no second world
    is started to fail likewise. For a module's fixture, so that what it holds ends with the module.
    """
    outcomes: dict[tuple, tuple[Any, Exception | None]] = {}

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        key = (*args, *sorted(kwargs.items()))
        if key not in outcomes:
            try:
                outcomes[key] = run(*args, **kwargs), None
            except Exception as error:
                outcomes[key] = None, error
        value, error = outcomes[key]
        if error is not None:
            raise error
        return value

    return call
