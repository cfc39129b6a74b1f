from functools import partial
from unittest import mock

from models.backbone import BackboneError, Classifier

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize(
    "name", ["test_resnet", "mobilenetv3_small_050", "test_vit", "test_efficientnet"]
    + [pytest.param("test_convnext", marks=pytest.mark.slow)],
)
def test_any_timm_backbone_takes_one_channel(name):
    model = Classifier(name, 10, 64).eval()
    images = torch.randn(2, 1, 64, 64)
    assert model(images).shape == (2, 10)
    torch.testing.assert_close(model(images), model.head(model.features(images)))


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(BackboneError, match="resnet18"):
        Classifier("resnt18", 10, 64)


# Sides of the images at IMAGE_SIZE 56 and 96 with the scales of the scripts, and the backbone's sizes for them.
SIDES = {56: (49, 56, 63), 96: (84, 96, 108)}
SMALL = {
    "test_resnet": {49: 49, 56: 56, 63: 63, 84: 84, 96: 96, 108: 108},
    "test_convnext": {49: 64, 56: 64, 63: 64, 84: 96, 96: 96, 108: 96},
    "test_vit": {49: 48, 56: 64, 63: 64, 84: 80, 96: 96, 108: 112},
    "test_vit2": {49: 48, 56: 64, 63: 64, 84: 80, 96: 96, 108: 112},
    "test_efficientnet": {49: 49, 56: 56, 63: 63, 84: 84, 96: 96, 108: 108},
    "test_nfnet": {49: 49, 56: 56, 63: 63, 84: 84, 96: 96, 108: 108},
    "test_byobnet": {49: 49, 56: 56, 63: 63, 84: 84, 96: 96, 108: 108},
    "vit_tiny_patch16_224": {49: 48, 56: 64, 63: 64, 84: 80, 96: 96, 108: 112},
    "gmlp_ti16_224": {49: 64, 56: 64, 63: 64, 84: 96, 96: 96, 108: 96},
}
# One of each further kind of timm's image classifiers, a small one of its family.
KINDS = (
    "resnet10t", "convnext_atto", "efficientnet_lite0", "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224", "mixer_s32_224", "maxvit_nano_rw_256", "coatnet_pico_rw_224",
    "levit_128s", "regnety_002", "mobilenetv3_small_050", "densenet121", "efficientformerv2_s0",
    "poolformer_s12", "cait_xxs24_224", "xcit_nano_12_p16_224", "pvt_v2_b0", "twins_pcpvt_small",
    "gcvit_xxtiny", "nest_tiny", "mobilevit_xxs", "edgenext_xx_small", "ghostnet_050", "vgg11",
    "resmlp_12_224", "mobileone_s0",
)  # fmt: skip


def takes_and_uses_all_pixels(model, side):
    """Whether a training batch of this side passes, and its last row and its last column each reach the features."""
    model.to(memory_format=torch.channels_last).train()
    model(torch.randn(2, 1, side, side)).sum().backward()
    image = torch.randn(1, 1, side, side)
    model.eval()
    for last in (image[..., -1, :], image[..., -1]):
        pixels = last.clone()
        last.fill_(torch.nan)  # spreads to all that depends on it, whatever the weights are
        with torch.no_grad():
            if not model.features(image).isnan().any():
                return False
        last.copy_(pixels)
    return True


QUICK = ("test_resnet",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_images_are_resized_to_the_nearest_size_that_the_backbone_takes(name):
    for image_size, sides in SIDES.items():
        model = Classifier(name, 3, image_size).check_sizes(sides)
        assert {side: model.input_size(side) for side in sides} == {side: SMALL[name][side] for side in sides}
        assert all(takes_and_uses_all_pixels(model, side) for side in sides)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_convnext", "pvt_v2_b0"])
def test_no_row_is_left_over_within_a_network(name):
    """56 px would give these a map of 7 rows, of which 2x2 tiles use 6."""
    model, left_over = Classifier(name, 3, 56).check_sizes([49]).eval(), []

    def count(layer, inputs, output):
        left_over.append(inputs[0].shape[2] - layer.stride[0] * output.shape[2])

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == layer.stride != (1, 1):
            layer.register_forward_hook(count)
    for side in (49, 56):
        model.features(torch.randn(1, 1, side, side))
    assert len(left_over) >= 6 and not any(left_over)


@pytest.mark.slow
def test_rows_are_left_over_where_no_size_near_has_none(monkeypatch):
    monkeypatch.setattr("models.backbone.REACH", 3)
    assert Classifier("test_convnext", 3, 56).input_size(56) == 56


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_classifier_takes_the_sizes_of_the_scripts(name):
    sides = SIDES[56]
    model = Classifier(name, 3, 56).check_sizes(sides)
    assert all(takes_and_uses_all_pixels(model, side) for side in sides)


@pytest.mark.slow
def test_the_last_pixels_change_the_features_of_a_transformer():
    model = Classifier("vit_tiny_patch16_224", 3, 56).eval()
    images = torch.randn(2, 1, 56, 56)
    images[1] = images[0]
    images[1, :, -1] += 1
    one, other = model.features(images)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.slow
def test_only_sizes_that_the_backbone_does_not_take_are_resized():
    images = torch.randn(2, 1, 49, 49)
    model = Classifier("test_resnet", 3, 56).eval()
    assert torch.equal(model.features(images), model.backbone(images.to(memory_format=torch.channels_last)))
    model = Classifier("test_vit", 3, 56).eval()
    smaller = F.interpolate(images, size=(48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.features(images), model.backbone(smaller))
    larger = F.interpolate(images, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(model.features(larger), model.backbone(larger))


def test_finding_a_size_changes_nothing_else():
    model = Classifier("test_efficientnet", 3, 56).freeze().train()
    model.backbone.blocks[0].train()
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    model.check_sizes([33, 49])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_a_backbone_of_one_size_gets_it_for_all_images():
    model = Classifier("efficientformer_l1", 3, 56)
    assert {model.input_size(side) for side in (49, 56, 63, 300)} == {224}


def test_a_backbone_that_takes_no_size(monkeypatch):
    def refuse(model, size):
        raise AssertionError("wrong size")

    monkeypatch.setattr("models.backbone._probe", refuse)
    with pytest.raises(BackboneError, match="BACKBONE=test_vit takes no .* 56 px, nor of 160 px.*IMAGE_SIZE"):
        Classifier("test_vit", 3, 56)


def test_sizes_under_fake_tensors():
    vit = Classifier("test_vit", 3, 56).check_sizes([57])  # timm cannot build it under fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in (vit, Classifier("test_resnet", 3, 56)):
            assert model(torch.zeros(2, 1, 57, 57)).shape == (2, 3)


@pytest.mark.slow
def test_export_with_a_resize():
    model = Classifier("test_vit", 3, 56).check_sizes([49]).eval()
    images = torch.randn(3, 1, 49, 49)
    chips = {0: torch.export.Dim("chips", min=1, max=2**30)}
    with torch.no_grad():
        program = torch.export.export(model, (images[:2],), dynamic_shapes=(chips,))
        torch.testing.assert_close(program.module()(images), model(images))


def test_frozen_backbone_stays_bit_for_bit():
    model = Classifier("test_resnet", 4, 32).freeze()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        model(torch.randn(8, 1, 32, 32)).square().sum().backward()
        optimizer.step()
    assert not model.backbone.training and model.head.training
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("channels", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
@pytest.mark.parametrize("classes", [pytest.param(1000, marks=pytest.mark.slow), 7])
def test_weights_from_a_file(tmp_path, channels, classes):
    source = timm.create_model("test_resnet", in_chans=channels, num_classes=classes)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = Classifier("test_resnet", 10, 64, str(tmp_path / "weights.pt"))
    first = next(k for k, v in model.backbone.state_dict().items() if v.ndim == 4)
    for key, value in model.backbone.state_dict().items():
        expected = source.state_dict()[key]
        if key == first:
            expected = expected.sum(1, keepdim=True)
        torch.testing.assert_close(value, expected)


@pytest.mark.slow
def test_weights_from_our_own_checkpoint(tmp_path):
    source = Classifier("test_resnet", 5, 64)
    torch.save({"model": source.state_dict()}, tmp_path / "best.pt")
    model = Classifier("test_resnet", 10, 64, str(tmp_path / "best.pt"))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[key]), key


@pytest.mark.slow
def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(BackboneError, match="does not hold the weights of test_resnet"):
        Classifier("test_resnet", 10, 64, str(tmp_path / "weights.pt"))


@pytest.mark.slow
def test_weights_of_another_size_from_a_file(tmp_path):
    torch.save(timm.create_model("test_vit", in_chans=1).state_dict(), tmp_path / "vit.pt")
    model = Classifier("test_vit", 3, 56, str(tmp_path / "vit.pt"))
    rebuilt = Classifier("test_vit", 3, 56)
    rebuilt.load_state_dict(model.state_dict())
    assert [model.input_size(side) for side in (49, 56, 80)] == [rebuilt.input_size(side) for side in (49, 56, 80)]
    torch.save(timm.create_model("gmlp_ti16_224", in_chans=1).state_dict(), tmp_path / "gmlp.pt")
    with pytest.raises(BackboneError, match="gmlp_ti16_224 for inputs of 64 px.*set IMAGE_SIZE=224"):
        Classifier("gmlp_ti16_224", 3, 56, str(tmp_path / "gmlp.pt"))


@pytest.mark.slow
def test_files_without_weights(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    with pytest.raises(BackboneError, match="is not a file of weights"):
        Classifier("test_resnet", 10, 64, str(tmp_path / "weights.pt"))
    with pytest.raises(BackboneError, match="there is no weights file"):
        Classifier("test_resnet", 10, 64, str(tmp_path / "none.pt"))


def test_hub_weights_without_network_say_how_to_get_a_file(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", no_network)
    with pytest.raises(BackboneError, match="WEIGHTS=resnet18.pt"):
        Classifier("resnet18", 10, 64, "timm")


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.9", reason="older versions of torch compile for each size")
def test_three_training_sizes_compile_twice():
    """For the first size, then once for any size."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    model = Classifier("test_resnet", 3, 56)
    model.backbone.compile(backend=backend)
    for size in (49, 56, 63, 49, 56):
        model.backbone(torch.rand(4, 1, size, size)).sum().backward()
    assert len(graphs) == 2


@pytest.fixture
def own_backbone():
    """A backbone that timm's own builder does not make, as the README says."""

    def ours(pretrained=False, in_chans=1, num_classes=0, pooled=True, **options):
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else []
        return nn.Sequential(nn.Conv2d(in_chans, 4, 3, padding=1), nn.ReLU(), *pool)

    def around_timm(pretrained=False, in_chans=1, num_classes=0, **options):
        return timm.create_model("test_resnet", in_chans=in_chans, num_classes=num_classes)

    def without_options(pretrained=False, in_chans=1, num_classes=0):
        return ours()

    own = {
        "ours": ours, "unpooled": partial(ours, pooled=False), "without_options": without_options,
        "around_timm": around_timm,
    }  # fmt: skip
    with mock.patch.dict("timm.models._registry._model_entrypoints", own):
        yield


def test_a_backbone_of_ones_own_takes_its_weights_from_a_file_or_refuses(own_backbone, tmp_path):
    path = str(tmp_path / "ours.pt")
    for name in ("around_timm", "ours"):
        trained = Classifier(name, 3, 16).backbone.state_dict()
        torch.save(trained, path)
        loaded = Classifier(name, 3, 16, path).backbone.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in trained.items())
    with pytest.raises(BackboneError, match="timm has no weights of your own backbone ours"):
        Classifier("ours", 3, 16, "timm")
    torch.save({"0.weight": torch.zeros(5, 1, 3, 3), "0.bias": torch.zeros(5)}, path)
    with pytest.raises(BackboneError, match="does not hold the weights of ours"):
        Classifier("ours", 3, 16, path)


def test_a_backbone_of_ones_own_that_does_not_pool_or_takes_no_options_is_refused(own_backbone):
    with pytest.raises(BackboneError, match=r"no pooled features \[N, D\] but \[1, 4, "):
        Classifier("unpooled", 3, 16)
    with pytest.raises(BackboneError, match="without_options cannot be built: .* takes pretrained, in_chans"):
        Classifier("without_options", 3, 16)
