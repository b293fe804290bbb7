"""Inputs for a tiny model of any family: text, images, video, sound, series; padded or not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, DECODER_LENGTH = 3, 12, 9
MEL_FRAMES, SAMPLES = 64, 4000
_LENGTHS = (LENGTH, 5, 9)  # of the three padded texts
_IMAGE_AND_TEXT = (
    "CLIP", "Sig", "Align", "Chinese", "Alt", "Bridge", "Vilt", "Owl", "XCLIP", "GroupVi", "MetaCl",
    "Florence", "Tip", "Layout", "Flava", "Blip",
)  # fmt: skip
_VIDEO = ("Video", "Vivit", "Timesf", "VJEPA", "XCLIP")
_NESTED = (
    "vision_config", "audio_config", "encoder", "text_config", "thinker_config", "backbone_config",
    "encoder_config",
)  # fmt: skip


@dataclass
class Inputs:
    tensors: dict[str, Tensor]
    text_mask: Tensor | None  # (BATCH, LENGTH), True at tokens, where the text is padded

    def are_padded(self) -> bool:
        return not self.tensors.keys().isdisjoint(("attention_mask", "decoder_attention_mask"))


def accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def field(config: Any, *names: str) -> Any:
    """The first of the fields that is a number or a list, also in nested configurations."""
    for name in names:
        if isinstance(getattr(config, name, None), (int, list, tuple)):
            return getattr(config, name)
    for nested in _NESTED:
        inner = getattr(config, nested, None)
        if inner is not None and not isinstance(inner, dict):
            found = field(inner, *names)
            if found is not None:
                return found
    return None


def make_inputs(model: Any, padding: str | None) -> Inputs:
    """padding: None, "left" or "right"."""
    config, name = model.config, type(model).__name__
    main = getattr(model, "main_input_name", "input_ids")
    inputs = Inputs({}, None)
    with_images = any(part in name for part in _IMAGE_AND_TEXT)
    if accepts(model, "input_ids") and main in ("input_ids", "pixel_values"):
        _add_text(model, inputs, padding)
    if main in ("pixel_values", "pixel_values_videos"):
        inputs.tensors[main] = _images(config, name)
    elif main == "input_ids" and accepts(model, "pixel_values") and with_images:
        inputs.tensors["pixel_values"] = _images(config, name)
    if main == "input_features" or (accepts(model, "input_features") and main != "input_ids"):
        _add_spectrogram(model, inputs, padding)
    if main == "input_values":
        _add_waveform(model, inputs, padding)
    if main == "past_values":
        inputs.tensors[main] = _series(config, name)
    if getattr(config, "is_encoder_decoder", False) and accepts(model, "decoder_input_ids"):
        inputs.tensors["decoder_input_ids"] = _tokens(config, DECODER_LENGTH, seed=3)
        if padding == "right" and accepts(model, "decoder_attention_mask"):
            mask = torch.ones(BATCH, DECODER_LENGTH, dtype=torch.long)
            mask[1, 6:] = 0
            inputs.tensors["decoder_attention_mask"] = mask
    return inputs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(config: Any, length: int, seed: int) -> Tensor:
    vocabulary = min(field(config, "vocab_size") or 100, 800)
    return torch.randint(5, vocabulary, (BATCH, length), generator=_generator(seed))


def _add_text(model: Any, inputs: Inputs, padding: str | None) -> None:
    inputs.tensors["input_ids"] = _tokens(model.config, LENGTH, seed=1)
    if padding and accepts(model, "attention_mask"):
        mask = torch.arange(LENGTH) < torch.tensor(_LENGTHS)[:, None]
        inputs.text_mask = mask.flip(1) if padding == "left" else mask
        inputs.tensors["attention_mask"] = inputs.text_mask.long()
    if accepts(model, "bbox"):
        inputs.tensors["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)


def _images(config: Any, name: str) -> Tensor:
    size = field(config, "image_size", "img_size", "input_size") or 32
    height_width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = field(config, "num_channels", "in_channels", "in_chans", "num_input_channels") or 3
    frames = field(config, "num_frames") if any(part in name for part in _VIDEO) else None
    shape = (BATCH, *([frames] if frames else []), channels, *height_width)
    return torch.randn(shape, generator=_generator(2))


def _add_spectrogram(model: Any, inputs: Inputs, padding: str | None) -> None:
    config, name = model.config, type(model).__name__
    mel = field(
        config, "num_mel_bins", "input_feat_per_channel", "input_dim", "n_mels",
        "feature_projection_input_dim",
    ) or 80  # fmt: skip
    positions = field(config, "max_source_positions")
    if positions and any(part in name for part in ("Whisper", "Qwen2Audio", "Voxtral")):
        shape = (BATCH, mel, 2 * positions)
    else:
        shape = (BATCH, MEL_FRAMES, mel)
    inputs.tensors["input_features"] = torch.randn(shape, generator=_generator(2))
    if padding and accepts(model, "attention_mask") and "Whisper" not in name:
        inputs.tensors["attention_mask"] = _sound_mask(MEL_FRAMES, 40)


def _add_waveform(model: Any, inputs: Inputs, padding: str | None) -> None:
    config = model.config
    if type(model).__name__.startswith(("AST", "ASTF")):
        shape = (BATCH, config.max_length, config.num_mel_bins)
        inputs.tensors["input_values"] = torch.randn(shape, generator=_generator(2))
        return
    inputs.tensors["input_values"] = torch.randn(BATCH, SAMPLES, generator=_generator(2))
    if padding and accepts(model, "attention_mask"):
        inputs.tensors["attention_mask"] = _sound_mask(SAMPLES, 2500)


def _sound_mask(length: int, second: int) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, second:] = 0
    return mask


def _series(config: Any, name: str) -> Tensor:
    length = field(config, "context_length") or 32
    channels = field(config, "num_input_channels", "input_size") or 1
    columns = (channels,) if channels > 1 or "Patch" in name else ()
    return torch.randn(BATCH, length, *columns, generator=_generator(2))
