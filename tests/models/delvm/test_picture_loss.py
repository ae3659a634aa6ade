"""The loss of a VQGAN in training, beside torch: values, gradients, and codes that come back into use."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops
from torch.nn import functional as F

from convert.reference.vqgan import ReferenceVqgan
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.model_config import VqganConfig
from mindvlm.models.delvm.picture_loss import PictureLoss, PictureLossConfig, usage_loss
from mindvlm.models.delvm.vqgan import Vqgan

SIZES = {"resolution": 8, "hidden_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 8}
CONFIG = VqganConfig(**SIZES, z_channels=6, num_embeddings=12, quantized_embed_dim=4, attn_resolutions=[8])


@pytest.fixture(autouse=True)
def eager():
    ms.set_context(mode=ms.PYNATIVE_MODE)


def both_models():
    torch.manual_seed(0)
    reference, vqgan = ReferenceVqgan(CONFIG).double(), Vqgan(CONFIG)
    tensors = dict(reference.named_parameters())
    assert tensors.keys() == {parameter.name for parameter in vqgan.get_parameters()}
    for parameter in vqgan.get_parameters():
        tensors[parameter.name].data += 0.05 * torch.randn_like(tensors[parameter.name])
        parameter.set_data(Tensor(tensors[parameter.name].detach().float().numpy()))
    return reference, vqgan.set_train()


def reference_terms(reference, pixels, config):
    """The terms as the literature writes them: straight-through by adding the detached difference."""
    latent = reference.quant_conv(reference.encoder(pixels)).permute(0, 2, 3, 1)
    table = reference.quantize.embedding.weight
    distances = ((latent[..., None, :] - table) ** 2).sum(-1).reshape(-1, len(table))
    chosen = table[distances.argmin(1)].reshape(latent.shape)
    codebook = F.mse_loss(latent, chosen.detach()) + CONFIG.commitment_cost * F.mse_loss(chosen, latent.detach())
    passed = latent + (chosen - latent).detach()
    count = int(len(pixels) * config.bypass)
    passed = torch.cat((latent[:count], passed[count:]))
    made = reference.decoder(reference.post_quant_conv(passed.permute(0, 3, 1, 2)))
    difference = made - pixels
    loss = (difference**2 if config.reconstruction == "l2" else difference.abs()).mean()
    choices = torch.softmax(-distances / (distances.min(1).values.mean().detach() + 1e-6), -1)
    mean = choices.mean(0)
    usage = (mean * torch.log(mean + 1e-9)).sum() - (choices * torch.log(choices)).sum(1).mean()
    return [loss, config.codebook_weight * codebook, config.usage_weight * loss.detach() * usage]


@pytest.mark.parametrize(
    "options", [{}, {"reconstruction": "l1", "codebook_weight": 0.3, "usage_weight": 0.5, "bypass": 0.5}]
)
def test_terms_and_gradients_equal_the_reference(options):
    config = PictureLossConfig(**options)
    reference, vqgan = both_models()
    pixels = np.random.default_rng(1).random((3, 3, 8, 8)).astype(np.float32)
    expected = reference_terms(reference, torch.tensor(pixels).double(), config)
    sum(expected).backward()

    loss, parameters = PictureLoss(vqgan, config), vqgan.trainable_params()
    compute = ops.value_and_grad(lambda x: loss(x)[0].sum(), None, ms.ParameterTuple(parameters))
    terms, count = loss(Tensor(pixels))
    _, gradients = compute(Tensor(pixels))
    assert count.asnumpy() == 3 and len(loss.loss_terms) == 3
    np.testing.assert_allclose(terms.asnumpy() / 3, [term.item() for term in expected], rtol=1e-5)
    tensors = dict(reference.named_parameters())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # the attention of a level with one block is not used
        given = tensors[parameter.name].grad
        wanted = np.zeros(parameter.shape) if given is None else 3 * given.numpy()
        scale = max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(gradient.asnumpy() / scale, wanted / scale, atol=2e-5, err_msg=parameter.name)
    by_name = {parameter.name: gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.weight"):
        assert np.abs(by_name[name].asnumpy()).max() > 0


def test_unused_codes_are_drawn_to_the_positions():
    latent = np.random.default_rng(0).normal(0, 1, (32, 2))
    table = ms.Parameter(Tensor(np.concatenate([latent[:1] + 0.1, [[3.5, 3.5], [3, -3], [-4, 0]]]), ms.float32))

    def usage():
        flat = Tensor(latent, ms.float32)
        return usage_loss(ops.square(flat.expand_dims(1) - table.expand_dims(0)).sum(-1))

    def num_used():
        return len(np.unique(((latent[:, None] - table.asnumpy()) ** 2).sum(-1).argmin(1)))

    assert num_used() < 4
    for _ in range(300):
        table.set_data(table - 0.5 * ops.grad(usage, None, ms.ParameterTuple([table]))()[0])
    assert num_used() == 4


@pytest.mark.parametrize(("key", "value"), [("usage_weight", -1.0), ("codebook_weight", -0.1), ("bypass", 1.0)])
def test_weights_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"vqgan_loss.{key} is {value}"):
        PictureLossConfig(**{key: value})
