"""A sparsifier for sparsekit, a rule that drops activations; ``sparsekit sparsify RUN --sparsifier new_part``.

It masks what down projections read, the neurons of dense feed-forwards; ``sparsekit.sparsifiers.base.Sparsifier`` is
what one derives from that masks something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import NonNegativeFloat
from sparsekit.probes.anatomy import Weight
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import LayeredModel
from sparsekit.sparsifiers.base import InOrder, Parts
from sparsekit.sparsifiers.installed import SiteOf, Target
from sparsekit.sparsifiers.neurons import NeuronSparsifier
from sparsekit.sparsifiers.rules import Limit, Rule
from sparsekit.sparsifiers.sites import DOWN


class NewPart(NeuronSparsifier):
    """Drops neuron i where |a_i| <= factor r, r the root mean square of its layer's neurons on the calibration text.

    Layers are calibrated in order, each on the streams that the masks before it make.

    Source: sparsekit
    """

    class Params(NeuronSparsifier.Params):
        factor: NonNegativeFloat = 0.5

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        return Target(weight, Rule(limit), parts)

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        found: dict[SiteOf, Limit] = {}
        order, parts = InOrder(view, tokens, self.seed), self.parts(view, meta)
        for layer in range(view.n_layers):
            if layer in parts:
                pending = self.pending(view, layer, parts[layer])
                sizes = order.samples({DOWN: pending})[DOWN].scores()
                limit = found[layer, DOWN] = Limit(self.params.factor * sizes.square().mean().sqrt())
                order.mask(DOWN, pending.limited(limit))
            order.advance()
        return found
