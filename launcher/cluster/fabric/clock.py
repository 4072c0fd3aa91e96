"""The difference between two hosts' clocks, measured as NTP does: by four times of an exchange."""

from collections.abc import Sequence
from dataclasses import dataclass

NANO = 1e-9


@dataclass(frozen=True)
class Exchange:
    """Four times of one exchange in ns: the first rank asks, the second one answers.

    Attributes:
        asked: the first rank sends, by its clock.
        received: the second rank has received, by its clock.
        answered: the second rank sends, by its clock.
        returned: the first rank has received, by its clock.
    """

    asked: int
    received: int
    answered: int
    returned: int

    @property
    def round_trip(self) -> int:
        """The time in ns for which messages were under way."""
        return (self.returned - self.asked) - (self.answered - self.received)


@dataclass(frozen=True)
class Skew:
    """How far the second clock is ahead of the first, in seconds.

    Attributes:
        seconds: negative where it is behind.
        bound: the largest error: half of the round trip, as if one way had taken all of it.
    """

    seconds: float
    bound: float

    @property
    def at_least(self) -> float:
        """The distance of the clocks that is certain, in seconds."""
        return max(0.0, abs(self.seconds) - self.bound)

    def reversed(self) -> "Skew":
        """How far the first clock is ahead of the second."""
        return Skew(-self.seconds, self.bound)


def skew(exchanges: Sequence[Exchange]) -> Skew:
    """Computes the skew from the exchange with the shortest round trip (RFC 5905, section 8)."""
    best = min(exchanges, key=lambda exchange: exchange.round_trip)
    offset = ((best.received - best.asked) + (best.answered - best.returned)) / 2
    return Skew(offset * NANO, max(0, best.round_trip) / 2 * NANO)
