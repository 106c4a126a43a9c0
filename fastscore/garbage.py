"""Fewer searches for garbage.

Python looks through all objects of a process once a quarter as many new ones have lived for a while. Whoever has
imported PyTorch has half a million: one search takes as long as the tracing of a small model. What is made and let go
while a model is traced would bring one or two about, and is gone soon after without them.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NEW = 100_000  # objects, at least, after which new ones are looked through
_lock = threading.Lock()
_inside = 0  # blocks, of any thread
_before = gc.get_threshold()  # as the first of them found it


@contextmanager
def seldom_searched() -> Iterator[None]:
    """In the block, new objects are looked through after many more of them; never, where that was so. The last of
    several blocks to end brings back what the first found."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = gc.get_threshold()
            if _before[0]:
                gc.set_threshold(max(_before[0], _NEW), *_before[1:])
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_before)
