"""Average Activation: an expert's mean training activation in the gate's place.

Muqeeth et al. 2024, section 4.2. Means are taken over the tokens of the expert's training inputs
(`training.statistics`); everything else is as in PHATGOOSE.
"""

from __future__ import annotations

from .affinities import AffinityRouting


class AverageActivation(AffinityRouting):
    """Router average-activation: scores activations against mean activations."""

    vectors = "means"
