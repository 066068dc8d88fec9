"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attncompile import metrics


def test_relative_l2_and_max_abs() -> None:
    r, o = np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float32)
    assert metrics.relative_l2(r, o) == pytest.approx(0.1)
    assert metrics.max_abs(r, o) == 0.5


def test_relative_l2_of_zero_arrays() -> None:
    zero = np.zeros(2)
    assert metrics.relative_l2(zero, zero) == 0.0
    assert metrics.relative_l2(zero, np.ones(2)) == math.inf
    assert math.isnan(metrics.relative_l2(zero, np.array([np.nan, 0.0])))


def test_cosine() -> None:
    assert metrics.cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
    assert metrics.cosine(np.array([1.0, 2.0]), np.array([-1.0, -2.0])) == pytest.approx(-1.0)
    assert metrics.cosine(np.zeros(2), np.zeros(2)) == 1.0
    assert metrics.cosine(np.zeros(2), np.ones(2)) == 0.0


def test_psnr() -> None:
    r, o = np.array([0.0, 10.0]), np.array([1.0, 10.0])
    assert metrics.psnr(r, o) == pytest.approx(10 * math.log10(100 / 0.5))
    assert metrics.psnr(r, r) == math.inf


def test_kl_divergence() -> None:
    r, o = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.25, 0.75]]))
    assert metrics.kl_divergence(r, o) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert metrics.kl_divergence(r + 7, r) == pytest.approx(0, abs=1e-12)


def test_kl_divergence_of_ruled_out_entries() -> None:
    r = np.array([[0.0, 0.0, -np.inf]])
    assert metrics.kl_divergence(r, r) == 0.0
    assert metrics.kl_divergence(np.zeros((1, 3)), r) == math.inf


def test_top1_agreement() -> None:
    r = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    o = np.array([[1.0, 3.0], [1.0, 2.0], [0.0, 1.0], [5.0, 1.0]])
    assert metrics.top1_agreement(r, o) == 0.5


def test_next_token_loss() -> None:
    assert metrics.next_token_loss(np.zeros((1, 3, 8)), np.array([[1, 2, 3]])) == pytest.approx(math.log(8))
    with pytest.raises(ValueError, match="next-token"):
        metrics.next_token_loss(np.zeros((1, 1, 8)), np.array([[1]]))


def test_nan_never_gives_a_good_number() -> None:
    bad = np.array([[1.0, np.nan], [1.0, 2.0]])
    m = metrics.compute(np.ones((2, 2)), bad)
    for value in (m.relative_l2, m.max_abs, m.cosine, m.psnr, m.kl, m.top1_agreement):
        assert value is not None and math.isnan(value)
    assert set(m.to_json().values()) == {None, 4}


def test_compute_refuses_empty_and_unequal() -> None:
    with pytest.raises(ValueError, match="empty"):
        metrics.compute(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="shapes"):
        metrics.compute(np.zeros(2), np.zeros(3))


def test_logit_metrics_need_two_entries() -> None:
    m = metrics.compute(np.ones((4, 1)), np.ones((4, 1)))
    assert m.kl is None and m.top1_agreement is None and m.relative_l2 == 0.0
