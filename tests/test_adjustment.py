"""Logit adjustment reaches training as a plain loop has it, and is on where labels are skewed."""

from dataclasses import replace

import pytest
from plain import OneClient
from runs import federation, largest_difference, same_bits, start, state

SUM_ORDER = 2e-6
"""fp32 sums of some hundred terms of size 1 in another order, 100 x 2^-24, in a few steps of rate 0.05."""


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_adjusted_client_equals_a_plain_loop(tmp_path, tuning, micro_batch_size):
    """9 examples of two grades of five; the bias is summed up from probabilities, answer by answer."""
    options = {"tuning": tuning, "micro_batch_size": micro_batch_size}
    client = OneClient(tmp_path, **options, logit_adjustment="on")
    labels = [example.label for example in client.batcher.examples]
    ids = [i for i, label in enumerate(labels) if label == 0][:7] + [labels.index(1), labels.index(1) + 1]
    task = replace(client.task(), example_ids=tuple(ids))
    got, expected = client.train(task), client.plain(task)
    assert largest_difference(got, expected) <= SUM_ORDER
    unadjusted = OneClient(tmp_path, **options, logit_adjustment="off")
    assert largest_difference(got, unadjusted.train(task)) > 30 * SUM_ORDER


def test_auto_adjusts_closed_answers_where_the_partition_or_nothing_else_mends_skew(tmp_path):
    fed = federation(tmp_path)

    def adjusts(**options):
        return replace(fed, run=replace(fed.run, **options)).adjusts_logits

    partitioners = ("dirichlet", "pathological", "iid", "natural", "size_skewed")
    assert fed.run.logit_adjustment == "auto" and fed.data.answers is not None
    assert [adjusts(partitioner=name) for name in partitioners] == [True, True, False, False, False]
    assert not adjusts(partitioner="dirichlet", balanced_sampling=True)
    assert not replace(fed, data=replace(fed.data, answers=None)).adjusts_logits
    assert [adjusts(partitioner="iid", logit_adjustment=how) for how in ("on", "off")] == [True, False]
    assert not adjusts(logit_adjustment="off")


@pytest.mark.parametrize(("partitioner", "adjusted"), [("dirichlet", True), ("iid", False)])
def test_a_run_under_auto_is_the_run_it_stands_for(tmp_path, partitioner, adjusted):
    ends = {}
    for how in ("auto", "on", "off"):
        (folder := tmp_path / how).mkdir()
        run_folder = start(folder, "--logit_adjustment", how, partitioner=partitioner, num_rounds=1)
        ends[how] = state(run_folder, 1)
    assert same_bits(ends["auto"], ends["on"]) == adjusted
    assert same_bits(ends["auto"], ends["off"]) != adjusted
