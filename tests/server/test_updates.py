"""What counts in a round that took several attempts."""

from __future__ import annotations

from giva_core.types import SiteRecord
from server.updates import merge_attempts


def test_only_the_counted_attempt_counts() -> None:
    earlier = [
        SiteRecord("a", "ok", num_examples=40, num_steps=5, train_loss=0.5, bytes_up=10, bytes_down=3),
        SiteRecord("b", "ok", num_examples=30, num_steps=4, train_loss=0.4, bytes_up=11, bytes_down=3),
        SiteRecord("c", "missing", "no answer within 5 s", bytes_down=3),
        SiteRecord("d", "ok", num_examples=20, bytes_up=12, bytes_down=3),
    ]
    later = [
        SiteRecord("a", "ok", num_examples=40, num_steps=6, train_loss=0.6, bytes_up=10, bytes_down=3),
        SiteRecord("d", "refused", "not finite", bytes_up=12, bytes_down=3),
    ]
    assert merge_attempts(earlier, later) == [
        SiteRecord("a", "ok", num_examples=40, num_steps=6, train_loss=0.6, bytes_up=20, bytes_down=6),
        SiteRecord("b", "failed", "attempt without quorum", bytes_up=11, bytes_down=3),
        SiteRecord("c", "missing", "no answer within 5 s", bytes_down=3),
        SiteRecord("d", "refused", "not finite", bytes_up=24, bytes_down=6),
    ]


def test_a_single_attempt_is_what_it_is() -> None:
    records = [SiteRecord("b", "ok", num_examples=3), SiteRecord("a", "failed", "data")]
    assert merge_attempts([], records) == [records[1], records[0]]
