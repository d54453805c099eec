"""Who does not answer is asked less often, and comes back as soon as he does."""

from __future__ import annotations

from server.absence import BENCH_ROUNDS, LONGEST_PAUSE_SECONDS, BackOff, Bench
from server.exchange import Answer


def missing(site: str) -> Answer:
    return Answer(site, 1, None, "missing", "no answer within 5 s")


def failed(site: str) -> Answer:
    return Answer(site, 1, None, "failed", "data: no rows")


def test_pauses_double_up_to_an_hour() -> None:
    now = [0.0]
    back_off = BackOff(lambda: now[0])
    pauses = []
    for _ in range(9):
        back_off.missed(7)
        start = now[0]
        while 7 in back_off.resting():
            now[0] += 60.0
        pauses.append(now[0] - start)
    assert pauses == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, *[LONGEST_PAUSE_SECONDS] * 3]
    back_off.missed(7)
    back_off.answered(7)
    assert back_off.resting() == set()
    back_off.missed(7)
    now[0] += 60.0
    assert back_off.resting() == set()


def test_two_misses_in_a_row_cost_three_rounds() -> None:
    bench = Bench()
    bench.note([missing("a"), missing("b")])
    assert "a" not in bench
    bench.note([missing("a"), failed("b")])
    assert "a" in bench and "b" not in bench
    sat_out = 0
    for _ in range(5):
        bench.next_round()
        sat_out += "a" in bench
    assert sat_out == BENCH_ROUNDS == 3


def test_a_miss_after_the_bench_benches_anew_and_an_answer_ends_it() -> None:
    bench = Bench()
    bench.note([missing("a"), missing("a")])
    for _ in range(BENCH_ROUNDS + 1):
        bench.next_round()
    assert "a" not in bench
    bench.note([missing("a")])
    assert "a" in bench
    bench.note([failed("a")])
    assert "a" not in bench
    bench.note([missing("a")])
    assert "a" not in bench


def test_who_sits_out_is_recorded() -> None:
    bench = Bench()
    bench.note([missing("b"), missing("b"), missing("a"), missing("a")])
    bench.next_round()
    assert [(r.site, r.status) for r in bench.records(["c"])] == [("a", "missing"), ("b", "missing")]
    [record] = bench.records(["a"])
    assert record.reason == "not asked: it missed 2 deadlines in a row; 3 rounds left" and record.bytes_down == 0
