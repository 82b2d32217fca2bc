"""A progress bar on a terminal, silence elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(title: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(step, note)`, which moves the bar; it does nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step, note: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=start, note="")
        yield lambda step, note: progress.update(task, completed=step, note=note)
