"""What this process compiled, loaded and was refused: the list of it, a log line for each, and who else is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from jit_kernel.engine import progress
from jit_kernel.engine.spec import Event, recorded

_hooks: list[Callable[[Event], None]] = []
_LINES = {"loaded": "hit", "compiled": "miss", "refused": "refused"}


class Stats(TypedDict):
    """Counts and seconds of this process since it began; `layers` counts what was loaded by the store it came from."""

    loaded: int
    compiled: int
    refused: int
    load_seconds: float
    compile_seconds: float
    layers: dict[str, int]


def post(event: Event) -> None:
    """Keep an event, log it, and tell every hook; one that raises is logged and told of later events all the same."""
    recorded.append(event)
    why = f": {event.reason}" if event.reason else ""
    progress.log.info(
        f"{_LINES[event.action]} {event.spec} for {event.target} {event.key[:12]}, {event.action} "
        f"{f'from {event.layer} ' if event.layer else ''}in {event.seconds * 1e3:.1f} ms{why}"
    )
    for hook in list(_hooks):
        try:
            hook(event)
        except Exception:
            progress.log.exception(f"the event hook {hook!r} raised; the kernel is served all the same")


def on_event(hook: Callable[[Event], None]) -> Callable[[], None]:
    """Have hook(event) called for everything that is compiled, loaded or refused from now on, by the thread that does
    it. Answers with a function that ends it."""
    if not callable(hook):
        raise TypeError(f"hook is of type {type(hook).__name__}; it must be a function of an Event")
    _hooks.append(hook)

    def end() -> None:
        if hook in _hooks:
            _hooks.remove(hook)

    return end


def stats() -> Stats:
    """What this process compiled, loaded and was refused so far, in numbers."""
    found = Stats(loaded=0, compiled=0, refused=0, load_seconds=0.0, compile_seconds=0.0, layers={})
    for event in list(recorded):
        if event.action == "loaded":
            found["loaded"] += 1
            found["load_seconds"] += event.seconds
            found["layers"][event.layer] = found["layers"].get(event.layer, 0) + 1
        elif event.action == "compiled":
            found["compiled"] += 1
            found["compile_seconds"] += event.seconds
        else:
            found["refused"] += 1
    return found
