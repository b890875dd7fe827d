"""Networks: (B, 3, H, W) RGB in [0, 1] to (B, C, H, W) logits.  Scaling of the input belongs to the network."""

import difflib

import torch
from torch import Tensor, nn

from raysed.core.randomness import keyed_seed
from raysed.errors import UsageError

ENCODERS = {"efficientunet-b0": "efficientnet-b0", "efficientunet-b4": "efficientnet-b4"}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


HEADS = ("head.", "segmentation_head.")
"""Where names of the tensors begin that depend on the classes: of `UNet`, of segmentation-models-pytorch."""


class UNet(nn.Module):
    """The classic U-Net (Ronneberger et al. 2015) with same padding and batch norm; about 31 million parameters.

    Args:
        classes: C.
        widths: channels of the levels, top to bottom.
    """

    def __init__(self, classes: int, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.down = nn.ModuleList(_double(i, o) for i, o in zip(ins, widths, strict=True))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in pairs)
        self.up = nn.ModuleList(_double(2 * o, o) for _, o in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down[:-1]:
            skips.append(x := level(x))
            x = nn.functional.max_pool2d(x, 2)
        x = self.down[-1](x)
        for widen, up, skip in zip(self.widen, self.up, reversed(skips), strict=True):
            x = up(torch.cat([skip, widen(x)], 1))
        return self.head(x)


def _double(ins: int, outs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (ins, outs):
        layers += [nn.Conv2d(i, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Network(nn.Module):
    """A network with its input scaling and the side its input must be a multiple of."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, scaling: tuple[tuple[float, ...], tuple[float, ...]], multiple: int
    ) -> None:
        super().__init__()
        self.net = net
        self.multiple = multiple
        for name, values in zip(("mean", "std"), scaling, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.net((image - self.mean) / self.std)

    def with_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and (B, D) the deepest features, mean over their pixels."""
        deepest: list[Tensor] = []
        bottom = self.net.down[-1] if isinstance(self.net, UNet) else self.net.encoder
        assert isinstance(bottom, nn.Module)
        hook = bottom.register_forward_hook(
            lambda _module, _inputs, out: deepest.append(out[-1] if isinstance(out, list | tuple) else out)
        )
        try:
            logits = self.forward(image)
        finally:
            hook.remove()
        return logits, deepest[0].mean((2, 3))


def build(arch: str, classes: int, seed: int, encoder_weights: str | None = None) -> Network:
    """A network on the CPU; the same (arch, classes, seed) gives the same initial weights.

    Args:
        arch: `unet`, `efficientunet-b0`, `efficientunet-b4` or `unet:<encoder of segmentation-models-pytorch>`.
        classes: C.
        seed: of the initial weights.
        encoder_weights: a name that smp downloads, such as `imagenet`; None starts from scratch.

    Raises:
        UsageError: unknown architecture or encoder (with the nearest name), or weights that cannot be fetched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed("weights", seed))
        if arch == "unet":
            if encoder_weights:
                raise UsageError(
                    f"model.encoder_weights {encoder_weights!r}: the classic unet has no encoder to load into"
                )
            return Network(UNet(classes), _HALF, 16)
        kind, _, encoder = arch.partition(":")
        encoder = ENCODERS.get(arch, encoder if kind == "unet" else "")
        if not encoder:
            near = difflib.get_close_matches(arch, ["unet", *ENCODERS], n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"unknown architecture {arch!r}: unet, {', '.join(ENCODERS)}, unet:<smp encoder>{hint}"
            )
        net = _smp_unet(encoder, classes, encoder_weights)
    for head in _UNUSED:
        if all(hasattr(net.encoder, name) for name in head):
            for name in head:
                getattr(net.encoder, name).requires_grad_(False)
    return Network(net, _HALF if "lite0" in encoder else _IMAGENET, 32)


_UNUSED = (("_conv_head", "_bn1"), ("conv_head", "bn2"))
"""Heads that smp's EfficientNets, its own and those of timm, carry and never use; DDP would wait for their gradients."""


def _smp_unet(encoder: str, classes: int, weights: str | None) -> nn.Module:
    import segmentation_models_pytorch as smp

    try:
        return smp.Unet(encoder, encoder_weights=weights, classes=classes)
    except (KeyError, RuntimeError, ValueError) as error:
        names = smp.encoders.get_encoder_names()
        if encoder in names and weights is not None:
            raise UsageError(
                f"encoder weights {weights!r} of {encoder} cannot be had: {_first_line(error)}; give a file instead"
            ) from error
        near = difflib.get_close_matches(encoder, names, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown encoder {encoder!r} ({_first_line(error)}){hint}") from error
    except OSError as error:  # the hub cannot be reached
        raise UsageError(
            f"encoder weights {weights!r} of {encoder} cannot be downloaded: {_first_line(error)}; give a file instead"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
