"""A progress bar for work in a few named stages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def stage_bar(stages: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """A bar with one step per stage and the time so far; yields what to call when a stage begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(stages[0], total=len(stages))
        yield lambda stage: progress.update(task, description=stage, completed=stages.index(stage))
        progress.update(task, description="done", completed=len(stages))
