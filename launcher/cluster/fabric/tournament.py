"""The order in which pairs are measured: a round-robin tournament, as for chess players."""

Pair = tuple[int, int]


def tournament(players: int) -> list[list[Pair]]:
    """Returns rounds of disjoint pairs of the numbers below `players`; every pair meets once.

    One player stays, the others go round (the circle method). There are players − 1 rounds, or as
    many as players where their number is odd and one of them pauses in each round.
    """
    circle = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        facing = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None is not b])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def rounds_of(pairs: set[Pair], players: int) -> list[list[Pair]]:
    """Returns the rounds of the tournament with some of its pairs alone; empty rounds fall out."""
    kept = ([pair for pair in round_ if pair in pairs] for round_ in tournament(players))
    return [round_ for round_ in kept if round_]
