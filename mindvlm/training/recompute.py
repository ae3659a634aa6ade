"""Gradients of a step whose blocks keep their inputs alone and are computed again on the way back (arXiv 1604.06174).

`Cell.recompute` does not do it: on the CPU backend of MindSpore 2.10 a graph with it takes as much memory as without,
since whatever a Cell with a `bprop` of its own takes is kept as well. So the way back is written out here.
"""

from collections.abc import Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, nn, ops

from mindvlm.nn.decoder import CausalLM, all_positions
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.training.pass_loss import mean_loss

BATCH, NOTHING, SHARED = 0, 1, 2
"""What a stage takes besides the states: the batch, nothing, or what all decoder layers share."""


class RecomputedGradients(nn.Cell):
    """batch -> (sum of the losses, number of labels), gradients: what `value_and_grad` of the model gives.

    The blocks are the decoder's layers and, where something in the towers trains, those of the model's
    `recomputed_tower`. What lies before the first of them runs once.

    Args:
        model: takes (input_ids, labels, inv_freq, *pixels, sources).
        parameters: those to compute gradients of; the gradients come in this order.
        averages: gives the mean of the losses and 1.
        is_scaled: takes (scale, *batch) and gives (loss * scale, loss, number of labels), and gradients of the first.
    """

    def __init__(
        self, model: ImageTextModel, parameters: Sequence[Parameter], *, is_scaled: bool, averages: bool = False
    ):
        super().__init__(auto_prefix=False)
        decoder = model.language_model
        self.decoder = decoder
        self.is_scaled = is_scaled
        cells, kinds, start = list(decoder.layers), [SHARED] * len(decoder.layers), []
        if model.freeze_vision_tower:
            self.start = Embeds(model)
        else:
            tower = model.recomputed_tower
            self.start = TowerStart(tower)
            front = set(map(id, tower.parameters_before_blocks()))
            start = [parameter for parameter in parameters if id(parameter) in front]
            blocks = list(tower.blocks)
            cells = [*blocks, EmbedsBehindBlocks(model), *cells]
            kinds = [NOTHING] * len(blocks) + [BATCH, *kinds]
        self.stages = nn.CellList(cells, auto_prefix=False)
        self.kinds = tuple(kinds)

        self.loss = Loss(decoder, is_scaled=is_scaled, averages=averages)
        ends = trained((decoder.norm, decoder.lm_head), parameters)
        own = [trained((cell,), parameters) if kind != BATCH else [] for cell, kind in zip(cells, kinds, strict=True)]
        table = decoder.embed_tokens.weight
        placed = {id(one) for group in (ends, start, *own) for one in group} - {id(table)}
        rest = [one for one in parameters if id(one) not in placed]
        if model.freeze_vision_tower:
            start = rest
        else:
            own[kinds.index(BATCH)] = rest
        # where each parameter's gradient is among all; the table of a tied head has a second one
        order = [one for group in (start, *own, ends) for one in group]
        found = [[i for i, one in enumerate(order) if one is wanted] for wanted in parameters]
        self.places = tuple(places[0] for places in found)
        self.second_places = tuple(places[1] if len(places) > 1 else -1 for places in found)
        # a loop over all parameters would pass the depth of calls that the compiler allows
        self.for_all = ops.HyperMap()

        self.has_start, self.has_ends = bool(start), bool(ends)
        self.num_weights = tuple(len(group) for group in own)
        # gradients go back to the first stage that has something to train
        self.first = 0 if start else next((i for i, group in enumerate(own) if group), len(cells))
        self.start_weights = ms.ParameterTuple(start)
        self.stage_weights = [ms.ParameterTuple(group) for group in own]
        self.of_loss = ops.value_and_grad(self.loss, 0, ms.ParameterTuple(ends) if ends else None, has_aux=True)
        self.of_weights = ops.GradOperation(get_by_list=True, sens_param=True)
        self.of_inputs = ops.GradOperation(get_all=True, sens_param=True)
        self.of_all = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, *batch):
        scale = batch[0]
        if self.is_scaled:
            batch = batch[1:]
        batch_size, length = batch[0].shape
        shared = self.decoder.shared_inputs(all_positions(batch_size, length), batch[2])
        extras = (batch, (), shared)
        states = (self.start(*batch),)
        for i in range(len(self.kinds)):
            states = states + (self.stages[i](states[-1], *extras[self.kinds[i]]),)
        value, back = self.of_loss(states[-1], scale, batch[1])
        gradients = ()
        if self.has_ends:
            back, gradients = back
        for k in range(len(self.kinds) - self.first):
            i = len(self.kinds) - 1 - k
            # computed again when the gradient is there, and not taken from the way forward
            x = ops.depend(states[i], back)
            if self.num_weights[i] > 0:
                stage = self.of_all(self.stages[i], self.stage_weights[i])
                inputs, weights = stage(x, *extras[self.kinds[i]], back)
                gradients = weights + gradients
            else:
                inputs = self.of_inputs(self.stages[i])(x, *extras[self.kinds[i]], back)
            back = inputs[0]
        if self.has_start:
            gradients = self.of_weights(self.start, self.start_weights)(*batch, back) + gradients
        return value, self.for_all(ops.Partial()(gradient_at, gradients), self.places, self.second_places)


gradient_at = ops.MultitypeFuncGraph("gradient_at")


@gradient_at.register("Tuple", "Number", "Number")
def _gradient_at(gradients, place, second):
    """The gradient at a place, plus a second one where there is one (not -1)."""
    if second >= 0:
        return gradients[place] + gradients[second]
    return gradients[place]


class Embeds(nn.Cell):
    """batch -> what enters the decoder's first layer."""

    def __init__(self, model: ImageTextModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *batch):
        return self.enter(batch, self.model.encode_images(*batch[3:-1]))

    def enter(self, batch, features):
        embeds = self.model.merge(batch[0], features, batch[-1])
        positions = all_positions(embeds.shape[0], embeds.shape[1])
        return self.model.language_model.embed_positions(embeds, positions)


class EmbedsBehindBlocks(Embeds):
    """Output of the tower's blocks, batch -> what enters the decoder's first layer."""

    def construct(self, states, *batch):
        return self.enter(batch, self.model.features_behind_blocks(states, *batch[3:-1]))


class TowerStart(nn.Cell):
    """batch -> what enters the first block of the tower, whose pixels are the last ones of a batch."""

    def __init__(self, tower: nn.Cell):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, *batch):
        return self.tower.embed(batch[-2])


class Loss(nn.Cell):
    """Output of the decoder's last layer, scale, labels -> as the model, or with the scaled loss before."""

    def __init__(self, decoder: CausalLM, *, is_scaled: bool, averages: bool):
        super().__init__(auto_prefix=False)
        self.norm = decoder.norm
        self.lm_head = decoder.lm_head
        self.is_scaled = is_scaled
        self.averages = averages

    def construct(self, states, scale, labels):
        loss, num_labels = self.lm_head.loss_sum(self.norm(states), labels)
        if self.averages:
            loss, num_labels = mean_loss(loss, num_labels)
        if self.is_scaled:
            return loss * scale, loss, num_labels
        return loss, num_labels


def trained(cells: Iterable[nn.Cell], parameters: Sequence[Parameter]) -> list[Parameter]:
    """Those of the parameters that belong to the Cells."""
    own = {id(parameter) for cell in cells for parameter in cell.get_parameters()}
    return [parameter for parameter in parameters if id(parameter) in own]
