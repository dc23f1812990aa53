"""What a run says by itself when something is amiss though nothing is broken."""

from __future__ import annotations

from collections.abc import Mapping

_WAIT = 0.2  # share of a step
_SECONDS = 0.01  # of waiting a step: less is not worth a word
_WINDOWS = 2  # in a row; the first one holds the start of the readers


class ZeroLossMonitor:
    """Notices a gradient or a term of the loss that is exactly 0 in two records in a row. Says so once for each."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._told: set[str] = set()

    def messages(self, values: Mapping[str, float], step: int) -> list[str]:
        """What to tell the user after the record of a step; ``values`` are its gradient norm and terms."""
        found = []
        for name, value in values.items():
            if value != 0:
                self._since.pop(name, None)
            elif name not in self._since:
                self._since[name] = step
            elif name not in self._told:
                self._told.add(name)
                what = "the gradient is" if name == "gradient_norm" else f"the term {name} is"
                found.append(
                    f"{what} exactly 0 in every record since step {self._since[name]}: nothing is learned from it. "
                    "Look at what is hidden, at the batch size and at the sensors that samples have"
                )
        return found


class DataStarvationMonitor:
    """Notices that training waits for data. Says so once."""

    def __init__(self) -> None:
        self._windows = 0

    def messages(self, averages: Mapping[str, float]) -> list[str]:
        """What to tell the user after a window of steps (``MetricWindow.averages``)."""
        if "data_wait" not in averages or self._windows >= _WINDOWS:
            return []
        waited = averages["data_wait"] * averages["step_seconds"]
        self._windows = self._windows + 1 if averages["data_wait"] > _WAIT and waited > _SECONDS else 0
        if self._windows < _WINDOWS:
            return []
        return [
            f"training waits for data {averages['data_wait']:.0%} of the time: more reading processes a rank "
            "(workers=), a local copy or a larger cache of the shards (cache.size=), or a smaller window would help"
        ]
