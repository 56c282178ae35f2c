"""What every lossy part of the preset costs, beside its margin: `pytest --quality`."""

import pytest

from specdecode.evals.intervals import Outcome


def test_cost(cost, quality_run):
    """The whole interval of the cost lies within the margin; that of a negative control beyond it."""
    judgement = next(each for each in quality_run.judgements if (each.arm, each.measure) == cost)
    if judgement.verdict is None:
        pytest.skip(judgement.reason)
    if judgement.verdict is not judgement.expected:
        wanted = "has to fail, as a negative control" if judgement.expected is Outcome.FAIL else "has to pass"
        pytest.fail(f"{' '.join(cost)} {wanted}, and is {judgement.verdict.value}: {judgement.reason}", pytrace=False)
