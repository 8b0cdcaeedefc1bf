"""A cache that is bounded by number and by bytes: host memory must not grow with the length of a run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedCache(Generic[T]):
    """Least recently used entries go first, as soon as either bound is passed. Safe to share between threads."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> T | None:
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: str, value: T, num_bytes: int) -> None:
        with self._lock:
            if key in self._entries:
                self.num_bytes -= self._entries.pop(key)[1]
            self._entries[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self._entries and (len(self._entries) > self.max_entries or self.num_bytes > self.max_bytes):
                _, (_, freed_bytes) = self._entries.popitem(last=False)
                self.num_bytes -= freed_bytes
