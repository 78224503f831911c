"""The KV cache: length is its state."""

import pytest
import torch

from specvlm.core.errors import CapacityError
from specvlm.runtime.kv import KVCache


def rows(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


def stored(cache, layer=0):
    return cache.update(rows(), rows(), layer)[0].flatten().tolist()


def filled(*values, capacity=8):
    cache = KVCache(torch.full((2, 2, 1, capacity, 1), torch.nan))
    for layer in (0, 1):
        cache.update(rows(*values), rows(*values) + layer, layer)
    cache.advance(len(values))
    return cache


def test_all_layers_write_behind_the_same_length():
    cache = filled(1, 2, 3)
    keys, values = cache.update(rows(9), rows(9), 1)
    assert keys.flatten().tolist() == [1, 2, 3, 9]
    assert values.flatten().tolist() == [2, 3, 4, 9]
    assert cache.get_seq_length() == 3


def test_keep_moves_one_path_together_in_every_layer():
    cache = filled(1, 2, 10, 11, 12, 13)
    cache.keep(2, [0, 2, 3])
    assert cache.length == 5
    assert stored(cache, 0) == [1, 2, 10, 12, 13]
    assert cache.update(rows(), rows(), 1)[1].flatten().tolist() == [2, 3, 11, 13, 14]


def test_keep_nothing_is_a_rollback():
    cache = filled(1, 2, 10)
    cache.keep(2, [])
    assert stored(cache) == [1, 2]
    cache.rollback(1)
    assert stored(cache) == [1]
    with pytest.raises(ValueError, match="roll back"):
        cache.rollback(2)


def test_a_full_cache_says_so():
    cache = filled(1, 2, capacity=3)
    with pytest.raises(CapacityError, match="4 rows"):
        cache.update(rows(3, 4), rows(3, 4), 0)
    assert cache.capacity == 3
