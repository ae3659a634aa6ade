"""Cases of DeLVM's pictures: VQGANs, pre-processing, codes of pictures, the whole demo."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.request import Request
from mindvlm.models.delvm.checkpoint_config import VQGAN_CLASS, from_published
from mindvlm.models.delvm.made_data.alignment import six_boxes
from mindvlm.models.delvm.made_data.run_lengths import paint
from mindvlm.models.delvm.made_data.segmentation import read_masks
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.processor import DelvmProcessor, DelvmProcessorConfig
from mindvlm.processing.images.loading import load_image
from tests.golden_readers.case import Case
from tests.golden_readers.delvm_loaded import load_model
from tests.golden_readers.delvm_packing import compare_joined
from tests.golden_readers.loaded import RecordingEngine
from tests.golden_readers.report import FORWARD_BOUND, Report, relative_error

MARGIN = 1e-4
"""A code whose distance is nearer than this to that of another code may differ."""


class VqganStages(nn.Cell):
    """Computes all recorded stages of pixels (N, 3, height, width), channels-last."""

    def __init__(self, vqgan):
        super().__init__(auto_prefix=False)
        self.vqgan = vqgan

    def construct(self, pixels):
        vqgan = self.vqgan
        x = vqgan.encoder.conv_in(ops.transpose(pixels, (0, 2, 3, 1)))
        down = ()
        for i in range(len(vqgan.encoder.down)):
            x = vqgan.encoder.down[i](x)
            down = down + (x,)
        mid = vqgan.encoder.mid(x)
        latent = vqgan.latent(pixels)
        codes = vqgan.quantize.codes(latent)
        quantized = vqgan.entries(codes, latent.shape[1])
        loss, passed = vqgan.quantize.losses(latent, quantized)
        y = vqgan.decoder.mid(vqgan.decoder.conv_in(vqgan.post_quant_conv(quantized)))
        decoder_mid, up = y, ()
        for i in range(len(vqgan.decoder.up)):
            y = vqgan.decoder.up[len(vqgan.decoder.up) - 1 - i](y)
            up = (y, *up)
        distances = vqgan.quantize.distances(latent)
        return down, mid, latent, codes, quantized, loss, passed, decoder_mid, up, distances, vqgan.decode(quantized)


class CodeDecoder(nn.Cell):
    """Codes (N, P) -> the pixels of square pictures."""

    def __init__(self, model: DelvmModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, codes):
        return self.model.decode_images(codes)


def channels_first(array: Tensor) -> np.ndarray:
    return array.asnumpy().transpose(0, 3, 1, 2)


def is_vqgan(case: Case) -> bool:
    return case.config.get("_class_name") == VQGAN_CLASS and case.weights.exists()


def read_vqgan_case(case: Case, report: Report, mode: str) -> None:
    """Compares the stages of pictures, the codes and the reconstruction."""
    model = load_model(case.folder, from_published(case.config))
    pixels = case.inputs["pixel_values"]
    stages = VqganStages(model.vqgan)(Tensor(pixels))
    down, mid, latent, codes, quantized, loss, passed, decoder_mid, up, distances, recon = stages
    known = {"enc_mid": mid, "latent": latent, "quantized": quantized, "dec_mid": decoder_mid}
    known |= {"quantized_straight_through": passed}
    known |= {f"enc_level{level}": stage for level, stage in enumerate(down)}
    known |= {f"dec_up{level}": stage for level, stage in enumerate(up)}
    for name, stage in known.items():
        close_part(report, name, channels_first(stage))
    encoded = model.vqgan.encoder(Tensor(pixels.transpose(0, 2, 3, 1)))
    close_part(report, "enc_out", channels_first(encoded))
    near = np.sort(distances.asnumpy(), -1)
    margin = (near[:, 1] - near[:, 0]).reshape(codes.shape)
    report.close("indices", codes.asnumpy(), at=case.outputs["code_margin"] > MARGIN)
    scale = max(1.0, float(np.abs(near[:, 0]).max()))
    difference = float(np.abs(margin - case.outputs["code_margin"]).max())
    report.check("code_margin", difference / scale, bound=MARGIN, note="largest difference over the largest distance")
    report.close("codebook_loss", loss.asnumpy())
    soft = ops.softmax(-distances / 2.0, -1).asnumpy()
    report.close("soft_code_temp2_img0", soft[: len(case.outputs["soft_code_temp2_img0"])])
    pictures = recon.asnumpy()
    close_map(report, "recon", pictures)
    if "codes" in case.inputs:
        ids = Tensor(case.inputs["codes"])
        close_map(report, "recon_from_codes", CodeDecoder(model)(ids).asnumpy())
        rows = round(ids.shape[1] ** 0.5)
        report.close("codebook_entry", channels_first(model.vqgan.entries(ids, rows)))
        report.close("codebook_entry_lvm", model.vqgan.quantize.embedding(ids).asnumpy())
    compare_pixels(report, "image_u8", pictures)


def close_part(report: Report, name: str, array: np.ndarray) -> None:
    """Compares the first pictures and channels that are recorded of an array."""
    if name in report.recorded:
        shape = report.recorded[name].shape
        close_map(report, name, array[: shape[0], : shape[1]])


def close_map(report: Report, name: str, array: np.ndarray) -> None:
    """Compares latents or pixels: by the relative error, or by the largest difference, which the README suggests."""
    recorded = report.recorded[name]
    if array.shape == recorded.shape and relative_error(array, recorded) > FORWARD_BOUND:
        difference = float(np.abs(array - recorded).max())
        report.check(name, difference, bound=MARGIN, note="largest difference")
    else:
        report.close(name, array)


def compare_pixels(report: Report, name: str, pictures: np.ndarray) -> None:
    """Compares pictures (N, 3, height, width) as 8-bit; a value near a whole number may be rounded to either side."""
    recorded = report.recorded[name]
    processor = DelvmProcessor(DelvmProcessorConfig(size=256))
    shown = np.stack([np.asarray(processor.picture(one)) for one in pictures]).reshape(recorded.shape)
    scaled = (np.clip(pictures, 0, 1) * 255).transpose(0, 2, 3, 1).reshape(recorded.shape)
    clear = np.abs(scaled - np.rint(scaled)) > 255 * MARGIN
    report.close(name, shown, at=clear, note="off whole numbers")


def is_sequence(case: Case) -> bool:
    return any(name.startswith("pixels_u8.demo.") for name in case.outputs) and (case.folder / "vqgan").is_dir()


def read_sequence(case: Case, report: Report, mode: str) -> None:
    """Compares the pixels of pictures, and the codes of batches of pixels."""
    processor = DelvmProcessor(DelvmProcessorConfig(size=256))
    for name in case.outputs:
        kind, _, stem = name.removeprefix("pixels_u8.").partition(".")
        if name.startswith(("pixels_u8.demo.", "pixels_u8.rgb.")):
            file = case.folder / f"{stem}.png"
            # a picture in memory has lost its transparency before it is resized
            shown = np.asarray(processor.squared(load_image(file) if kind == "rgb" else file))
            report.close(name, shown.transpose(2, 0, 1))
    folder = case.folder / "vqgan"
    model = load_model(folder, from_published(json.loads((folder / "config.json").read_text())))
    for prefix in ("batches4d", "batches5d"):
        for number, line in enumerate(lines_of(case, model, prefix)):
            report.close(f"{prefix}.line{number}", line)
    compare_joined(case, report)
    compare_crops(case, report)
    compare_masks(case, report)
    for name in filter(lambda name: name.startswith("pixels_u8.no_crop."), case.outputs):
        report.skip(name, "no command resizes pictures without cropping")


def compare_crops(case: Case, report: Report) -> None:
    """Compares the six crops of pictures, each resized to 256 pixels."""
    stride = case.config["six_stride"]
    processor = DelvmProcessor(DelvmProcessorConfig(size=256))
    for stem, crop in case.config["six_crop"]:
        image = load_image(case.folder / f"{stem}.png")
        squares = [processor.squared(image.crop(box)) for box in six_boxes(*image.size, crop)]
        pixels = np.stack([np.asarray(square).transpose(2, 0, 1) for square in squares])
        name = f"six.{stem}_{crop}"
        report.close(f"{name}.pixels_u8_stride", pixels[:, :, ::stride, ::stride])
        report.close(f"{name}.rows", pixels[:, :, 100])
        report.close(f"{name}.sum", pixels.sum((2, 3), dtype=np.int32))


def compare_masks(case: Case, report: Report) -> None:
    """Compares masks in the recorded colours, and the picture of them where at most one mask lies.

    The original adds the colours of masks that overlap, modulo 256; the commands paint the smaller over the larger one.
    """
    for entry in case.config["sam"]:
        name = f"sam.{Path(entry['file']).stem}"
        content = json.loads((case.folder / entry["file"]).read_text())
        height, width = content["annotations"][0]["segmentation"]["size"]
        masks = read_masks(json.dumps(content).encode(), height, width)
        colours = case.outputs[f"{name}.colours_in_area_order"]
        white = np.full((1, 3), 255, np.uint8)
        flat = [paint([mask], white, height, width)[..., 0] > 0 for mask in masks]
        added = sum(mask[..., None] * colour for mask, colour in zip(flat, colours, strict=True)) * np.float32(255)
        report.close(f"{name}.mask_u8", added.astype(np.int64).astype(np.uint8))
        report.close(f"{name}.wrapped_fraction", np.float32((added > 255).mean()))
        painted = paint(masks, (colours * 255).astype(np.uint8), height, width)
        alone = sum(map(np.int64, flat)) < 2
        difference = int(np.abs(painted.astype(int) - case.outputs[f"{name}.mask_u8"])[alone].max())
        report.check(f"{name}.painted", difference, bound=0, note="off overlaps")
        report.skip(f"{name}.colours_in_area_order", "they are random")


def lines_of(case: Case, model: DelvmModel, prefix: str) -> Iterator[np.ndarray]:
    """Yields the codes of two consecutive pictures of a batch; a last single one has its own line."""
    for name in sorted(name for name in case.inputs if name.startswith(f"{prefix}_")):
        pixels = case.inputs[name].astype(np.float32) / np.float32(255)
        codes = model.vqgan.encode(Tensor(pixels.reshape(-1, *pixels.shape[-3:]))).asnumpy()
        for start in range(0, len(codes), 2):
            yield codes[start : start + 2].reshape(-1)


def is_demo(case: Case) -> bool:
    return all((case.folder / name).is_dir() for name in ("lm", "vqgan", "prompt"))


def read_demo(case: Case, report: Report, mode: str) -> None:
    """Encodes the prompt and the query, continues the recorded codes greedily and decodes the result."""
    folder = case.folder
    vqgan = load_model(folder / "vqgan", from_published(json.loads((folder / "vqgan/config.json").read_text())))
    decoder = load_model(folder / "lm", from_published(json.loads((folder / "lm/config.json").read_text())))
    processor = DelvmProcessor(DelvmProcessorConfig(size=vqgan.config.vqgan.resolution))
    files = [*sorted((folder / "prompt").iterdir()), folder / "query.png"]
    encoder = CodeEncoder(vqgan)
    codes = [encoder(Tensor(processor.pixels(str(file))[None])).asnumpy()[0] for file in files]
    report.close("input_ids", np.concatenate(codes)[None], at=case.outputs["code_margin"][None] > MARGIN)
    steps = case.outputs["generated_ids"].shape[1]
    ids = case.outputs["input_ids"][0].tolist()
    length = len(ids) + steps
    engine = RecordingEngine(decoder, placeholder_id=-1, max_length=length, graph_mode=mode == "graph")
    (slot,) = engine.complete([Request(ids=ids, options=GenerationConfig(max_new_tokens=steps))])
    report.close("generated_ids", np.array([slot.new_ids], np.int32))
    logits = np.concatenate(engine.recorded)
    report.close("prefill_logits_last_position", logits[0])
    report.close("generated_logits_first4_last4", np.concatenate((logits[:4], logits[-4:])))
    top = np.sort(logits, -1)
    report.close("generated_margin", top[:, -1] - top[:, -2], bound=1e-4, note="a difference of logits")
    pictures = CodeDecoder(vqgan)(Tensor(case.outputs["generated_ids"])).asnumpy()
    close_map(report, "image_stride2", pictures[:, :, ::2, ::2])
    report.close("image_mean_per_channel", pictures.mean((2, 3)))
    compare_pixels(report, "image_u8", pictures)
    report.skip("code_margin", "it says which codes are compared")


class CodeEncoder(nn.Cell):
    """Pixels (N, 3, height, width) -> codes (N, P)."""

    def __init__(self, model: DelvmModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, pixels):
        return self.model.encode_images(pixels)
