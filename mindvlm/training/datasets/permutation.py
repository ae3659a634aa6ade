"""A random order of millions of records that takes no memory."""

import hashlib

NUM_ROUNDS = 8
_MASK = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """64 bits that depend on every part, and on nothing else (not on the process, as `hash` does)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A bijection of 0..size-1, chosen by `key`.

    An alternating Feistel network over two mixed-radix digits of nearly equal range (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002); the few numbers that fall outside are sent through it again.
    """

    def __init__(self, size: int, key: int):
        self.size = size
        self.high = int(size**0.5)
        self.high += self.high * self.high < size
        self.low = -(-size // self.high)
        self.round_keys = [derive_key("permutation", key, number) for number in range(NUM_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Where `position` goes. Raises IndexError outside of 0..size-1."""
        if not 0 <= position < self.size:
            raise IndexError(position)
        while True:
            position = self._mix(position)
            if position < self.size:
                return position

    def _mix(self, position: int) -> int:
        high, low = divmod(position, self.low)
        for number, key in enumerate(self.round_keys):
            if number % 2:
                low = (low + _scramble(high ^ key)) % self.low
            else:
                high = (high + _scramble(low ^ key)) % self.high
        return high * self.low + low


def _scramble(value: int) -> int:
    """The output function of the SplitMix64 generator."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
