"""From clusters of tokens to experts: variance, kept neurons, routes."""

import numpy as np
import torch

from lib.measure.extraction_steps import extraction_steps

# Four neurons; cluster 0 varies by 2 and 8 on neurons 0 and 1, cluster 1 by 2 on neuron 3 alone.
# The last token is in no cluster.
HIDDEN = torch.tensor([[0.0, 0, 7, 1], [2, 4, 7, 1], [5, 5, 5, 0], [5, 5, 5, 2], [99, 99, 99, 99]])
INPUTS = torch.tensor([[1.0, 0], [1, 0.2], [0, 1], [1, 0.1], [9, 9]])
LABELS = np.array([0, 0, 1, 1, -1])


def test_variance_is_taken_on_the_tokens_of_a_cluster_alone():
    steps = extraction_steps(INPUTS, HIDDEN, LABELS, 50.0)
    np.testing.assert_allclose(steps.variance, [[2, 8, 0, 0], [0, 0, 0, 2]])


def test_each_cluster_keeps_the_shortest_list_that_holds_the_percentage():
    one = extraction_steps(INPUTS, HIDDEN, LABELS, 75.0).kept_neurons  # 8 of 10 hold it
    assert one.tolist() == [[False, True, False, False], [False, False, False, True]]
    two = extraction_steps(INPUTS, HIDDEN, LABELS, 90.0).kept_neurons
    assert two.tolist() == [[True, True, False, False], [False, False, False, True]]


def test_tokens_go_to_the_mean_input_of_largest_cosine():
    # Mean inputs (1, 0.1) and (0.5, 0.55): the token (1, 0.1) of cluster 1 goes to cluster 0.
    steps = extraction_steps(INPUTS, HIDDEN, LABELS, 50.0)
    np.testing.assert_allclose(steps.routed_share, [[1, 0], [0.5, 0.5]])
