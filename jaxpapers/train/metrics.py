"""Metrics on disk: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from jaxpapers.train.files import write_whole


def json_value(value: Any) -> Any:
    """What JSON can hold of a metric: text, numbers, nested lists and dicts; NaN and infinities become text."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    array = np.asarray(value)
    if array.ndim:
        return [json_value(row) for row in array]
    number = array.item()
    return number if not isinstance(number, float) or np.isfinite(number) else str(number)


class MetricsWriter:
    """Appends metrics of one stage of a run; a resumed run first drops what lies after its checkpoint.

    Args:
      workdir: folder of the run; `metrics.jsonl` and `tensorboard/` lie in it.
      stage: name of the stage (a run may fit several models one after another).
      resume_step: lines of this stage with a later step are dropped, so that the file ends as if the run had
        never stopped.
    """

    def __init__(self, workdir: Path, stage: str, resume_step: int = 0):
        self.stage = stage
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, stage, resume_step)
        self._file = path.open("a", encoding="utf8")
        # Not tensorboardX's SummaryWriter: it writes in a thread, and once the disk is full that thread is dead and
        # every later call waits for it. The process id keeps two runs of one second out of one file.
        board = workdir / "tensorboard" / stage
        board.mkdir(parents=True, exist_ok=True)
        self._board = EventsWriter(str(board / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)  # TensorBoard hides what earlier files have from this step on
        self._board.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values of one step: scalars, or arrays of shape (models,) for a population."""
        numbers = {name: json_value(value) for name, value in values.items()}
        line = {"stage": self.stage, "step": step, **numbers}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            array = np.asarray(value, dtype=float)
            for index in np.ndindex(array.shape):
                if np.isfinite(array[index]):  # tensorboardX warns of every other value; metrics.jsonl has them
                    summary = scalar("/".join([name, *map(str, index)]), array[index])
                    self._board.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._board.flush()

    def close(self) -> None:
        """Closes both files; `contextlib.closing` does it."""
        self._file.close()
        self._board.close()


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` (those of one stage, if named); a last line cut by a crash is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if stage is None or line["stage"] == stage:
            lines.append(line)
    return lines


def _drop_after(path: Path, stage: str, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["stage"] != stage or line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
