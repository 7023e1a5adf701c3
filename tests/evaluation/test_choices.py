"""Sign test, exact interval and kappas against scipy, scikit-learn and closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from driftrl.checks import InputError
from driftrl.evaluation.choices import binomial_interval, cohen_kappa, fleiss_kappa, sign_test

COUNTS = st.integers(0, 60)
ANSWERS = st.lists(st.tuples(*[st.sampled_from("ab=")] * 2), min_size=1, max_size=40)


@given(COUNTS, COUNTS)
def test_sign_test_and_interval_agree_with_scipy(wins, losses):
    if wins + losses == 0:
        assert sign_test(0, 0) == 1 and binomial_interval(0, 0) == (0, 1)
        return
    reference = binomtest(wins, wins + losses)
    assert sign_test(wins, losses) == pytest.approx(reference.pvalue, rel=1e-9)
    for level in (0.5, 0.95):
        theirs = reference.proportion_ci(level, "exact")
        assert binomial_interval(wins, losses, level) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_large_counts():
    assert sign_test(3000, 3000) == 1 and sign_test(0, 3000) == 0
    theirs = binomtest(2500, 4000).proportion_ci(0.95, "exact")
    assert binomial_interval(2500, 1500) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(COUNTS, COUNTS)
def test_neither_method_is_favoured(wins, losses):
    low, high = binomial_interval(wins, losses)
    assert binomial_interval(losses, wins) == pytest.approx((1 - high, 1 - low))
    assert sign_test(wins, losses) == sign_test(losses, wins)
    assert (sign_test(wins, losses) < 0.05) == (not low <= 0.5 <= high)


@given(ANSWERS)
def test_cohen_agrees_with_scikit_learn(pairs):
    first, second = zip(*pairs, strict=True)
    ours = cohen_kappa(first, second)
    if set(first) == set(second) and len(set(first)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(cohen_kappa_score(first, second))


def test_fleiss_on_his_example():
    # Fleiss 1971 as retold by many: 10 subjects, 14 raters, 5 categories, kappa 0.210.
    counts = ["0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1", "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2",
              "6 5 2 1 0", "0 2 2 3 7"]  # fmt: skip
    answers = [[c for c, n in enumerate(map(int, row.split())) for _ in range(n)] for row in counts]
    assert fleiss_kappa(answers) == pytest.approx(0.210, abs=5e-4)


def test_agreement_at_its_ends():
    assert fleiss_kappa(["aaa", "bbb", "==="]) == pytest.approx(1)
    assert fleiss_kappa(["aa", "aa"]) is None
    assert cohen_kappa("ab", "ba") == fleiss_kappa(["ab", "ba"]) == -1


def test_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="at least 0"):
        sign_test(-1, 2)
    with pytest.raises(InputError, match="level"):
        binomial_interval(1, 2, 95)
    with pytest.raises(InputError, match="same questions"):
        cohen_kappa("ab", "a")
    for answers in ([], ["a"], ["ab", "abc"]):
        with pytest.raises(InputError, match="same number of raters"):
            fleiss_kappa(answers)
