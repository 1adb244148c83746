"""The executor's slots as the scheduler sees them: who is in each, and which tokens its cache still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Slot:
    """One linear KV cache. `tokens[i]` is the token whose keys and values are valid at position i."""

    index: int
    tokens: list[int] = field(default_factory=list)
    owner: str | None = None
    last_used: int = 0

    def write(self, start: int, tokens: Sequence[int]) -> None:
        """Record that the executor ran `tokens` from `start` on; whatever lay behind is stale."""
        del self.tokens[start:]
        self.tokens.extend(tokens)


class SlotPool:
    """Free and used slots; a freed slot keeps its tokens, so that a later request can start behind them."""

    def __init__(self, num_slots: int) -> None:
        self.slots = [Slot(index) for index in range(num_slots)]
        self._clock = 0

    @property
    def num_used(self) -> int:
        return sum(slot.owner is not None for slot in self.slots)

    @property
    def num_free(self) -> int:
        return len(self.slots) - self.num_used

    @property
    def num_cached_tokens(self) -> int:
        """KV positions that running requests hold; those of free slots can go at any moment."""
        return sum(len(slot.tokens) for slot in self.slots if slot.owner is not None)

    def acquire(self, owner: str, prompt: Sequence[int], reuse: bool) -> tuple[Slot, int] | None:
        """(slot, number of reusable tokens), or None where every slot is in use.

        The free slot with the longest common prefix is taken, of equals the one unused for longest (an empty one
        first). The last prompt token is never reused: the logits that follow it are not in the cache.
        """
        free = [slot for slot in self.slots if slot.owner is None]
        if not free:
            return None
        limit = len(prompt) - 1 if reuse else 0
        lengths = {slot.index: min(common_prefix(slot.tokens, prompt), limit) if limit else 0 for slot in free}
        best = max(free, key=lambda slot: (lengths[slot.index], -slot.last_used))
        best.owner = owner
        return best, lengths[best.index]

    def release(self, slot: Slot) -> None:
        """Give a slot back; its tokens stay known."""
        self._clock += 1
        slot.owner, slot.last_used = None, self._clock


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share, by bisection over slices, which compare at C speed."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
