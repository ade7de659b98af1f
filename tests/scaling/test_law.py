"""The law's closed forms, against numbers by brute force and the paper's own."""

import numpy as np
import pytest
from phalanx_server.scaling.law import Law


def test_the_loss_is_the_sum_of_three_terms():
    law = Law(E=1.5, A=8.0, B=27.0, alpha=0.5, beta=1 / 3)
    assert law.loss(64, 27) == pytest.approx(1.5 + 1 + 9)
    assert law.loss([[64], [16]], [27, 8]).shape == (2, 2)


@pytest.mark.parametrize("flops", [1e18, 1e21, 5.76e23])
@pytest.mark.parametrize("k", [6.0, 7.5])
def test_no_other_split_of_the_compute_has_less_loss(hoffmann, flops, k):
    parameters, tokens = hoffmann.best_split(flops, flops_per_parameter_token=k)
    assert k * parameters * tokens == pytest.approx(flops)
    others = parameters * np.geomspace(0.01, 100, 2001)
    losses = hoffmann.loss(others, flops / (k * others))
    assert hoffmann.best_loss(flops, flops_per_parameter_token=k) == pytest.approx(losses.min())
    assert others[losses.argmin()] == pytest.approx(parameters, rel=0.01)


def test_the_published_constants_give_gopher_s_budget_to_a_smaller_model_and_more_tokens(hoffmann):
    """Gopher had 280 billion parameters and 300 billion tokens; approach 3 says 40 billion parameters (section 3.3),
    and with the constants as rounded in the paper somewhat fewer."""
    parameters, tokens = hoffmann.best_split(5.76e23)
    assert 3e10 < parameters < 4.5e10 and 2e12 < tokens < 3.3e12
