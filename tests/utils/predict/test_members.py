from data.store import ChipStore
from utils.predict.members import choose_score, load_members, set_views
from utils.predict.tta import IDENTITY, predict, tta_views

import pytest
import torch

CPU = torch.device("cpu")


def test_members_come_from_a_path_a_list_or_a_string_with_commas(make_checkpoint):
    one, two = make_checkpoint("one.pt"), make_checkpoint("two.pt", seed=1, image_size=48, chip_side=40)
    assert [member.path for member in load_members(one, CPU)] == [str(one)]
    for several in ([one, str(two)], f"{one}, {two}"):
        assert [member.checkpoint["image_size"] for member in load_members(several, CPU)] == [40, 48]
    with pytest.raises(ValueError, match="CHECKPOINT names no file"):
        load_members(f"{one},", CPU)
    with pytest.raises(ValueError, match="there is no checkpoint nowhere.pt; run first: python finetune.py"):
        load_members(f"{one},nowhere.pt", CPU)


@pytest.mark.parametrize("entry", [{"classes": ("SUV", "sedan", "van")}, {"class_ids": (0, 1, 2)}])
def test_members_of_other_classes_are_refused_with_both_files(make_checkpoint, entry):
    one, two = make_checkpoint("one.pt"), make_checkpoint("two.pt", **entry)
    with pytest.raises(ValueError, match=rf"one\.pt and .*two\.pt .*{next(iter(entry))} differ"):
        load_members([one, two], CPU)


def test_the_score_is_the_default_if_all_members_hold_its_fit(make_checkpoint):
    members = load_members([make_checkpoint("one.pt"), make_checkpoint("two.pt", ood={})], CPU)
    assert choose_score("", members[:1]) == "gaussian_energy" and choose_score("", members) == "energy"
    assert choose_score("knn", members[:1]) == "knn" and choose_score("max_logit", members) == "max_logit"
    with pytest.raises(ValueError, match=r"two\.pt holds no fit of the OOD score knn; run finetune.py"):
        choose_score("knn", members)
    with pytest.raises(ValueError, match="OOD_SCORE is empty or one of energy, gaussian_energy, max_softmax"):
        choose_score("entropy", members)


@pytest.mark.parametrize("change", [
    {"mean": torch.ones(3, 2).double()}, {"white": torch.full((512, 512), torch.nan).double()},
    {"location": torch.tensor(torch.nan)}, {"log_prior": torch.zeros(4).double()},
])  # fmt: skip
def test_a_fit_of_other_features_is_refused(make_checkpoint, change):
    members = load_members(make_checkpoint(), CPU)
    members[0].checkpoint["ood"]["gaussian_energy"] |= change
    with pytest.raises(ValueError, match=r"gaussian_energy in .*best\.pt does not fit the features"):
        choose_score("", members)


def test_views_are_those_of_the_checkpoint_until_others_are_set(make_checkpoint, capsys):
    members = load_members(make_checkpoint(views=((0, 1.0), (4, 1.0), (0, 1.25), (4, 1.25))), CPU)
    assert set_views(members)[0].views == members[0].views
    assert set(set_views(members, (), ("1.25", "1"))[0].views) == set(members[0].views)
    assert not capsys.readouterr().out
    assert set_views(members, ("0", "90"), ("1",))[0].views == tta_views((0, 90), (1.0,))
    fitted_for = (
        "best.pt: its head and its OOD scores were fitted for 4 views (rotations 0 degrees, as it is and flipped; "
        "scales 1, 1.25); the settings ask for "
    )
    others = "4 views (rotations 0, 90 degrees, as it is and flipped; scales 1)\n"
    assert capsys.readouterr().out.endswith(fitted_for + others)
    assert set_views(members, tta=False)[0].views == IDENTITY
    assert capsys.readouterr().out.endswith(fitted_for + "1 view (rotations 0 degrees; scales 1)\n")
    with pytest.raises(ValueError, match="does not take inputs of 1 px|SCALES"):
        set_views(members, (), (0.0,))


def test_a_member_predicts_in_its_views_or_in_others(make_checkpoint, chips):
    (member,) = load_members(make_checkpoint(), CPU)
    store = ChipStore(chips, CPU)
    stores = {member.reading: store}
    results = [member.output(stores, views=views) for views in (None, IDENTITY)]
    for views, output in zip((member.views, IDENTITY), results, strict=True):
        logits, features = predict(member.model, store, 40, (0.4, 0.15), views)
        torch.testing.assert_close((output.logits, output.features), (logits, features))
        torch.testing.assert_close(output.head(features), logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(results[0].logits, results[1].logits)
