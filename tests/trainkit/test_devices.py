"""Where a rank computes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from trainkit.distribution import choose_device
from trainkit.errors import EXIT_USAGE, UserError


def test_a_rank_gets_the_device_that_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu", local_rank=1) == torch.device("cpu")
    assert choose_device("cuda", local_rank=1) == choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert choose_device("cuda:0", local_rank=1) == torch.device("cuda", 0)


@pytest.mark.parametrize(("name", "local_rank"), [("meta", 0), ("cuda:7", 0), ("cuda", 1), ("auto", 1), ("quantum", 0)])
def test_a_device_that_cannot_train_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, local_rank: int
) -> None:
    """On a machine with one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"training\.device = .*; use auto") as error:
        choose_device(name, local_rank)
    assert error.value.exit_code == EXIT_USAGE
