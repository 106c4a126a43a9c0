"""What a folder of TensorBoard's events holds."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def logged(folder: Path) -> dict[str, tuple[int, int]]:
    """Name of each histogram -> (the step of its last entry, how many values it is of)."""
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    last = {name: events.Histograms(name)[-1] for name in events.Tags()["histograms"]}
    return {name: (event.step, int(event.histogram_value.num)) for name, event in last.items()}
