"""One fixed order in which the numbers of a step are added, whoever holds them.

Adding floats in another order gives other bits. A step has n leaves (its micro-batches, in sample order); the tree over
them is a function of n alone: halve a range while its length is even, add an odd range from left to right. A rank that
owns [r·n/R, (r+1)·n/R), with R a power of two that divides n, holds whole subtrees; what is left is the top of the
tree, over ranks. So the sum has the same bits for every such R.
"""

from __future__ import annotations

from torch import Tensor


def odd_part(number: int) -> int:
    """The largest odd divisor: how many neighbouring leaves of `number` are added from left to right."""
    return number // (number & -number)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def finished_pairs(index: int) -> int:
    """How many subtrees become complete with block `index` (from 0): the ones at the end of it in binary."""
    return (index ^ (index + 1)).bit_length() - 1


def tree_sum(values: Tensor) -> Tensor:
    """`values` [n, …] added over the first dimension in the order of the tree, [...]."""
    blocks = values.unflatten(0, (-1, odd_part(len(values))))
    total = blocks[:, 0]
    for leaf in blocks.unbind(1)[1:]:
        total = total + leaf
    while len(total) > 1:
        total = total[0::2] + total[1::2]
    return total[0]
