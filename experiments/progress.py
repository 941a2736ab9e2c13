"""Progress that a person can follow: bars on a terminal, plain lines wherever else output goes."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Told(Progress):
    """Bars; where the console is no terminal, a line at a task's start, at each quarter of it that
    took a while, and at its end."""

    def __init__(self, console: Console, *, every: float = 5.0):
        self._live = console.is_terminal
        self._every = every
        self._said: dict[TaskID, float] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, disable=not self._live)

    def add_task(self, description: str, *args, **options) -> TaskID:
        task = super().add_task(description, *args, **options)
        if not self._live:
            self._said[task] = time.perf_counter()
            self.console.print(f"{description} ...", markup=False, highlight=False)
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if self._live:
            return
        task = next(task for task in self.tasks if task.id == task_id)
        total = task.total or 0
        quarter = int(4 * task.completed / total) if total else 0
        before = int(4 * (task.completed - advance) / total) if total else 0
        late = time.perf_counter() - self._said[task_id] >= self._every
        if task.finished or (quarter > before and late):
            self._said[task_id] = time.perf_counter()
            self.console.print(
                f"{task.description}: {task.completed:g} of {total:g}, {task.elapsed or 0:.0f} s",
                markup=False,
                highlight=False,
            )
