"""Which of many recorded steps to take: evenly over instructions, episodes and time."""

from __future__ import annotations

import numpy as np

from vlaopt.tensors import Array


def spread(tasks: Array, episodes: Array, steps: Array, count: int, seed: int) -> tuple[int, ...]:
    """`count` rows of the equally long int64 arrays, ascending; all of them when there are no more.

    The rows are laid out by task, then by episode in an order that `seed` shuffles, then by time, and taken at equal
    distances: each task gets its share, and so does each of its episodes. The same for the same arguments.
    """
    total = len(tasks)
    if count >= total:
        return tuple(range(total))
    rng = np.random.default_rng(seed)
    names, places = np.unique(episodes, return_inverse=True)
    shuffled = rng.permutation(len(names))[places]
    order = np.lexsort((steps, shuffled, tasks))
    chosen = np.floor((np.arange(count) + rng.random()) * total / count).astype(np.int64)
    return tuple(sorted(int(index) for index in order[chosen]))
