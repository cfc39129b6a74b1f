from models.backbone import BackboneError, Classifier

import pytest
import timm
import torch


@pytest.mark.parametrize(
    "name", ["test_resnet", "mobilenetv3_small_050", "test_vit", "test_convnext", "test_efficientnet"]
)
def test_any_timm_backbone_takes_one_channel(name):
    model = Classifier(name, 10, 64).eval()
    images = torch.randn(2, 1, 64, 64)
    assert model(images).shape == (2, 10)
    torch.testing.assert_close(model(images), model.head(model.features(images)))


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(BackboneError, match="resnet18"):
        Classifier("resnt18", 10, 64)


def test_input_sizes_that_a_backbone_does_not_take():
    Classifier("test_resnet", 3, 64).check_sizes([56, 64, 72])
    with pytest.raises(BackboneError, match="does not take inputs of 72 px"):
        Classifier("test_vit", 3, 64).check_sizes([64, 72])


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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("classes", [1000, 7])
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


def test_weights_from_our_own_checkpoint(tmp_path):
    source = Classifier("test_resnet", 5, 64)
    torch.save({"model": source.state_dict()}, tmp_path / "best.pt")
    model = Classifier("test_resnet", 10, 64, str(tmp_path / "best.pt"))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[key]), key


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(BackboneError, match="does not hold the weights of test_resnet"):
        Classifier("test_resnet", 10, 64, str(tmp_path / "weights.pt"))


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
