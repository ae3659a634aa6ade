"""Both ranks divide towers and a decoder and compare each with the whole one: msrun ... parts_job.py"""

import zlib

from mindvlm.parallel.launch import ends_all_ranks, limit_threads


def main() -> None:
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn, ops

    from mindvlm.core import runtime
    from mindvlm.models.vary.family import VISION_VOCABULARY
    from mindvlm.models.vary.model_config import VisionVocabularyConfig
    from mindvlm.models.vary.vision_vocabulary import VisionVocabulary
    from mindvlm.nn.config import VitConfig
    from mindvlm.nn.decoder import CausalLM
    from mindvlm.nn.rotary import inverse_frequencies
    from mindvlm.nn.vit import VisionTransformer
    from mindvlm.parallel.collectives import SumOver
    from mindvlm.parallel.mesh import Mesh, ParallelConfig, init_parallel
    from mindvlm.parallel.plan import DECODER, VISION_TRANSFORMER, apply_tensor_parallel
    from tests.parallel.tiny_training import CONFIGS, batch

    runtime.start(runtime.RuntimeConfig(device="cpu"))
    mesh = init_parallel(ParallelConfig(tp=2))

    def pixels(size):
        return Tensor(np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32))

    def weighted_sum(features):
        weights = ops.sin(ops.arange(features.size).astype(ms.float32)).reshape(features.shape)
        return (features * weights).sum()

    class ClipTower(nn.Cell):
        def __init__(self, config):
            super().__init__()
            self.vision_tower = VisionTransformer(config)

        def construct(self, pixels):
            return weighted_sum(self.vision_tower(pixels))

    class VocabularyTower(nn.Cell):
        def __init__(self, config):
            super().__init__()
            self.vision_vocabulary = VisionVocabulary(config)

        def construct(self, pixels):
            return weighted_sum(self.vision_vocabulary(pixels))

    class GatheredLogits(nn.Cell):
        def __init__(self, config):
            super().__init__()
            self.language_model = CausalLM(config)
            self.inv_freq = Tensor(inverse_frequencies(config.rotary_dim, config.rope_theta))

        def construct(self, ids):
            embeds = self.language_model.embed_tokens(ids)
            return weighted_sum(self.language_model.lm_head(self.language_model(embeds, self.inv_freq)))

    class TokenLoss(GatheredLogits):
        def construct(self, ids):
            states = self.language_model(self.language_model.embed_tokens(ids), self.inv_freq)
            return self.language_model.lm_head.loss_sum(states, ids)[0]

    vit = VitConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=28)
    sam = VisionVocabularyConfig(
        embed_dim=16,
        depth=2,
        num_heads=4,
        global_attn_indexes=[1],
        window_size=3,
        image_size=64,
        patch_size=16,
        mlp_ratio=2,
        out_chans=8,
        net_2_channels=8,
        net_3_channels=8,
    )
    cases = {
        "CLIP": (ClipTower, vit, VISION_TRANSFORMER, pixels(28)),
        "vision vocabulary": (VocabularyTower, sam, VISION_VOCABULARY, pixels(64)),
        "decoder": (GatheredLogits, CONFIGS["qwen"], DECODER, Tensor(batch(0)[0])),
        "biased head's loss": (TokenLoss, CONFIGS["phi"], DECODER, Tensor(batch(0)[0])),
        "tied decoder": (GatheredLogits, CONFIGS["opt"], DECODER, Tensor(batch(0)[0])),
    }
    over_tp = SumOver(mesh.tp_group)
    for name, (build, config, plan, inputs) in cases.items():
        found = {}
        for tp_mesh in (Mesh(), mesh):
            model = build(config)
            divided = apply_tensor_parallel(model, plan, tp_mesh)
            parameters = model.trainable_params()
            for parameter in parameters:
                spec = divided.specs.get(parameter.name)
                shape = tuple(parameter.shape) if spec is None else spec.full_shape(tuple(parameter.shape))
                values = np.random.default_rng(zlib.crc32(parameter.name.encode())).standard_normal(shape) * 0.3
                values = values.astype(np.float32)
                parameter.set_data(Tensor(values if spec is None else spec.take(values)))
            loss, gradients = ops.value_and_grad(model, None, ms.ParameterTuple(parameters))(inputs)
            arrays = {}
            for parameter, gradient in zip(parameters, gradients, strict=True):
                is_partial = parameter.name in divided.partial
                arrays[parameter.name] = (over_tp(gradient) if is_partial else gradient).asnumpy()
            found[tp_mesh.tp] = float(loss.asnumpy()), arrays
        np.testing.assert_allclose(found[2][0], found[1][0], rtol=1e-4)
        assert found[1][1].keys() == found[2][1].keys()
        # key biases have no gradient but rounding errors: the tolerance follows the other gradients of the layer
        tolerance = 1e-5 * float(np.median([np.abs(gradient).max() for gradient in found[1][1].values()]))
        for key, whole in found[1][1].items():
            expected = divided.specs[key].take(whole) if key in divided.specs else whole
            np.testing.assert_allclose(found[2][1][key], expected, rtol=1e-4, atol=tolerance, err_msg=key)
        print(f"rank {mesh.rank}: {name} with {len(divided.specs)} divided parameters agrees", flush=True)


if __name__ == "__main__":
    limit_threads()
    with ends_all_ranks():
        main()
