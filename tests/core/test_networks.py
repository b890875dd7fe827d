import pytest
import torch

from raysed.core.networks import UNet, build
from raysed.errors import UsageError
from raysed.io.checkpoint import LITE0, load_encoder, pack, unpack


@pytest.mark.parametrize("arch", ["unet", "efficientunet-b0", "efficientunet-b4", "unet:resnet18"])
def test_shape_of_the_output(arch):
    net = build(arch, 5, 0).eval()
    with torch.inference_mode():
        assert net(torch.rand(2, 3, 64, 64)).shape == (2, 5, 64, 64)


def test_the_classic_unet_has_31_million_parameters():
    assert sum(p.numel() for p in UNet(8).parameters()) == pytest.approx(31.0e6, rel=0.01)


def test_same_seed_same_weights_other_seed_other_weights_global_generator_untouched():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = (pack(build("efficientunet-b0", 4, s).state_dict()) for s in (0, 0, 1))
    assert one == again
    assert one != other
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("arch", ["efficientunet-b0", "unet:timm-efficientnet-b0"])
def test_every_parameter_that_is_trained_has_a_gradient(arch):
    """DDP would wait for the others, and Adam has nothing of them to commit."""
    net = build(arch, 2, seed=0)
    net.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("arch", "hint"),
    [("unett", "unet"), ("efficientunet-b5", "efficientunet-b"), ("unet:resnet181", "resnet")],
)
def test_unknown_architecture_names_the_nearest(arch, hint):
    with pytest.raises(UsageError, match=f"did you mean '{hint}"):
        build(arch, 4, 0)


def test_real_imagenet_weights_of_lite0_load_into_the_encoder():
    net = build("unet:tu-tf_efficientnet_lite0", 4, 0)
    before = net.net.encoder.model.conv_stem.weight.clone()
    load_encoder(net.net.encoder, LITE0)
    after = net.net.encoder.model.conv_stem.weight
    assert not torch.equal(before, after)
    assert after.std().item() == pytest.approx(0.6, abs=0.5)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    net = build("unet:resnet18", 4, 0)
    with pytest.raises(UsageError, match="does not fit the encoder"):
        load_encoder(net.net.encoder, LITE0)
    (tmp_path / "w.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="is no state dict"):
        load_encoder(net.net.encoder, str(tmp_path / "w.safetensors"))
    with pytest.raises(UsageError, match="no file"):
        load_encoder(net.net.encoder, str(tmp_path / "missing.pth"))


def test_pack_and_unpack_are_inverse():
    state = build("unet:resnet18", 3, 0).state_dict()
    again = unpack(pack(state), "x")
    assert state.keys() == again.keys()
    assert all(torch.equal(state[k], again[k]) for k in state)


@pytest.mark.parametrize(("arch", "width"), [("unet", 1024), ("unet:resnet18", 512)])
def test_features_are_the_deepest_level_and_leave_the_logits_alone(arch, width):
    net, image = build(arch, 3, seed=0).eval(), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits, features = net.with_features(image)
        assert torch.equal(net(image), logits)
    assert features.shape == (2, width)
    assert not torch.equal(features[0], features[1])
