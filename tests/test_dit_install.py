"""The one line that lets a transformer read its cached references in place, on every model that has them."""

import copy
import pickle
import warnings

import pytest
import test_dit_glm_image
import test_dit_wan_animate2
import tiny_flux2
import tiny_qwen_image21
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from model_changes import randn

from lr_kernels import Source
from lr_kernels.diffusers import TransformerReferenceBank, extract_references, use_cached_references
from lr_kernels.diffusers.dit.cached.bank import model_of
from lr_kernels.diffusers.dit.cached.install import reference_layers
from lr_kernels.diffusers.processors.unet import OwnProcessor

MODELS = {
    "Flux2": (lambda: tiny_flux2.pipeline().transformer, 4),
    "QwenImage21": (tiny_qwen_image21.transformer, 2),
    "GlmImage": (test_dit_glm_image.build, 2),
    "WanAnimate2": (test_dit_wan_animate2.build, 2),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param][0]()


def processors_of(model):
    return {name: x.processor for name, x in model.named_modules() if hasattr(x, "processor")}


def test_one_line_replaces_the_processors_of_all_layers_and_one_restores_them(request, model):
    before, masks = processors_of(model), getattr(model, "block_masks", None)
    installation = use_cached_references(model)
    ours = {name for name, x in processors_of(model).items() if isinstance(x, OwnProcessor)}
    assert ours == set(installation.layers) and len(ours) == MODELS[request.node.callspec.params["model"]][1]
    assert not reference_layers(model)
    with pytest.raises(ValueError, match=r"model: expected a transformer with a stock processor .* remove\(\)"):
        use_cached_references(model)
    installation.remove()
    assert processors_of(model) == before and getattr(model, "block_masks", None) is masks


def test_a_compiled_model_is_served_too(model):
    with use_cached_references(torch.compile(model)) as installation:
        assert set(installation.layers) <= set(processors_of(model))
        assert all(isinstance(layer.processor, OwnProcessor) for layer in installation.layers.values())


def test_an_install_that_fails_midway_restores_all_layers(model):
    before = processors_of(model)
    last = list(reference_layers(model).values())[-1]

    def broken(processor):
        del last.set_processor
        raise RuntimeError("cannot be set")

    last.set_processor = broken  # of this layer alone, the first time
    with pytest.raises(RuntimeError, match="cannot be set"):
        use_cached_references(model)
    assert processors_of(model) == before


def test_only_the_model_whose_cached_keys_stand_alone_takes_a_bank(model):
    layers = {name: Source(randn(1, 3, 2, 16), randn(1, 3, 2, 16)) for name in reference_layers(model)}
    bank = TransformerReferenceBank(layers, model=model_of(model), ids=torch.zeros(3, 4))
    if type(model).__name__ == "Flux2Transformer2DModel":
        use_cached_references(model, bank).remove()
        return
    message = f"bank: expected None for this model, got a bank for {type(model).__name__}"
    with pytest.raises(NotImplementedError, match=message):
        use_cached_references(model, bank)


def test_processors_that_a_second_pipeline_replaces_are_warned_of_once():
    """The constructor of Flux2KleinKVPipeline gives its transformer new processors."""
    pipe = tiny_flux2.pipeline()
    before = tiny_flux2.generate(pipe)
    installation = use_cached_references(pipe.transformer, extract_references(pipe, tiny_flux2.references()))
    Flux2KleinKVPipeline.from_pipe(pipe)
    with pytest.warns(RuntimeWarning, match="4 of 4 attention processors were replaced") as caught:
        assert torch.equal(tiny_flux2.generate(pipe), before)
        installation.remove()
    assert sum("were replaced" in str(w.message) for w in caught) == 1
    assert not pipe.transformer._forward_pre_hooks


def test_a_warning_that_is_an_error_does_not_keep_the_model_from_being_restored(model):
    before = processors_of(model)
    installation = use_cached_references(model)
    name, layer = next(iter(installation.layers.items()))
    layer.set_processor(installation.previous[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="were replaced"):
            installation.remove()
    assert processors_of(model) == before and not model._forward_pre_hooks


def test_references_that_the_target_sees_are_refused_while_a_bank_is_read():
    pipe, images = tiny_flux2.pipeline(), tiny_flux2.references()
    bank = extract_references(pipe, images)
    plain = Flux2KleinPipeline(pipe.scheduler, pipe.vae, None, None, pipe.transformer)
    plain.set_progress_bar_config(disable=True)
    call = dict(seed=2, steps=1, guidance_scale=1.0)
    with use_cached_references(pipe.transformer, bank):
        tiny_flux2.generate(plain, **call)
        with pytest.raises(NotImplementedError, match="img_ids: expected the target's tokens alone while a bank"):
            tiny_flux2.generate(plain, image=images, **call)
    tiny_flux2.generate(plain, image=images, **call)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_does_not_watch_over_the_model(model, copied):
    with use_cached_references(model):
        other = copied(model)
    assert all(hook._call is None for hook in other._forward_pre_hooks.values()) and not model._forward_pre_hooks
