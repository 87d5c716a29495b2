"""What users can do wrong with CharaConsist in Flux."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from plain_chara_consist import (
    ALL_LAYERS,
    DIM,
    FRAME_WORDS,
    FRAMES,
    HEADS,
    IDENTITY,
    SETTINGS,
    TEXT,
    WORDS,
    N,
    call,
    flux,
    of_frames,
    of_layer,
    pipeline,
    randn,
    rotary,
    with_processors,
)
from tiny_joint import sd3
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lr_kernels.diffusers.dit.chara_consist.attention import chara_consist_attention, match_points, route_frame
from lr_kernels.diffusers.dit.chara_consist.driver import CharaConsist, merge_weights, prompt_words
from lr_kernels.diffusers.dit.chara_consist.processor import CharaConsistFluxAttnProcessor, Task
from lr_kernels.diffusers.processors.joint import joint_attention_layers


def run_of(phase="keep", of=IDENTITY, call_changes=None, settings=None, words=WORDS, **given):
    """One block, after the identity image where it needs one."""
    pipe = pipeline()
    with CharaConsist(pipe, **SETTINGS | (settings or {})) as chara:
        if phase != "keep":
            with chara.keep(WORDS):
                call(pipe, IDENTITY)
        if phase == "read":
            with chara.search(FRAME_WORDS):
                call(pipe, FRAMES)
        with getattr(chara, phase)(words, **given):
            call(pipe, of, **(call_changes or {}))


FOREGROUND = torch.ones(N, dtype=torch.bool)
LONGER = {"steps": range(1, 8)}
PROMPTS = {"negative_prompt_embeds": torch.zeros(1, TEXT, 32), "negative_pooled_prompt_embeds": torch.zeros(1, 32)}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"words": None}, ValueError, "words: expected either words or a foreground, got none"),
        ({"foreground": FOREGROUND}, ValueError, "words: expected either words or a foreground, got both"),
        ({"words": (6, 3)}, ValueError, r"words: expected \(tokens of the background, end of the words\), with 0 < "),
        ({"words": (0, 3)}, ValueError, r"words: expected \(tokens of the background, end of the words\)"),
        ({"words": 3}, ValueError, r"words: expected \(tokens of the background, end of the words\).*, got 3"),
        ({"words": []}, ValueError, r"words: expected \(tokens of the background, end of the words\).*, got \[\]"),
        ({"words": (3, 8)}, ValueError, "words: expected numbers of tokens up to the text's 7, got"),
        ({"words": FRAME_WORDS}, ValueError, "words: expected one pair, or 1 for the images, got 2"),
        ({"phase": "read", "of": FRAMES, "words": [(1, 2)] * 3}, ValueError, "words: expected one pair, or 2 for"),
        ({"words": None, "foreground": FOREGROUND.float()}, ValueError, "foreground: expected a bool tensor"),
        ({"words": None, "foreground": FOREGROUND[:9]}, ValueError, r"foreground: expected shape \(36,\) or \(1, 36\)"),
        ({"of": FRAMES}, ValueError, "pipe: expected one identity image, got 2 images"),
        ({"phase": "read", "of": IDENTITY}, ValueError, "points: expected points of 1 frames with 36 tokens, got"),
        ({"call_changes": {"num_inference_steps": 2}}, ValueError, "point_step: expected a run that reaches step 2"),
        (
            {"call_changes": {"true_cfg_scale": 2.0, **PROMPTS}},
            NotImplementedError,
            "pipe: expected one pass of the model in each step of one call, got another one in step 0; leave true_",
        ),
        (
            {"phase": "search", "call_changes": {"height": 64, "latents": randn(1, 24, 16)}},
            ValueError,
            r"pipe: expected frames of \(6, 6\) tokens, got \(4, 6\); frames of the identity's size, or",
        ),
        (
            {"phase": "search", "call_changes": {"height": 64, "width": 144}},
            ValueError,
            r"pipe: expected frames of \(6, 6\) tokens, got \(4, 9\); frames of the identity's size",
        ),
        (
            {"phase": "search", "call_changes": {"sigmas": [1.0, 0.9, 0.5, 0.2, 0.1]}},
            ValueError,
            "steps: expected the 5 timesteps of the identity image, got 5 other ones; take equal schedules",
        ),
        (
            {"phase": "read", "of": FRAMES, "call_changes": {"num_inference_steps": 9}, "settings": LONGER},
            ValueError,
            "steps: expected the 5 timesteps of the identity image, got 9 other ones; take equal schedules",
        ),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_refused(given, error, message):
    with pytest.raises(error, match="lr_kernels.CharaConsist: " + message):
        run_of(**given)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 3}, ValueError, r"steps: expected a range of steps, as range\(1, 41\), got 3"),
        ({"steps": range(-1, 3)}, ValueError, "steps: expected a range of steps"),
        ({"point_step": 1.5}, ValueError, "point_step: expected a step, from 0, got 1.5"),
        ({"merge": [0.5, 2]}, ValueError, r"merge\[1\]: expected a number from 0 to 1, got 2"),
        ({"threshold": 2}, ValueError, "threshold: expected a number from -1 to 1, got 2"),
        ({"layers": ["attn"]}, ValueError, "layers: expected names of layers such as 'transformer_blocks.0.attn', got"),
        ({"background": "no"}, ValueError, "background: expected True or False, got 'no'"),
        ({"merge": 0.5}, TypeError, "merge: expected a sequence, got float"),
        ({"layers": "attn"}, TypeError, "layers: expected a sequence, got str"),
        ({"kept_on": "gpu"}, ValueError, "kept_on: expected a device of this machine, got 'gpu'"),
        ({"layers": []}, ValueError, "layers: expected at least one layer, got none"),
        (
            {"foreground_layers": ALL_LAYERS[:1]},
            ValueError,
            "foreground_layers: expected names of layers such as 'singl",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, error, message):
    with pytest.raises(error, match="lr_kernels.CharaConsist: " + message):
        CharaConsist(pipeline(), **SETTINGS | settings)


def test_other_pipelines_are_refused():
    with pytest.raises(ValueError, match="CharaConsist: pipe: expected a Flux pipeline, got Linear"):
        CharaConsist(torch.nn.Linear(2, 2))
    other = SimpleNamespace(transformer=sd3(), scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        ValueError, match="CharaConsist: pipe: expected a transformer of Flux, got SD3Transformer2DModel"
    ):
        CharaConsist(other)
    compiled = pipeline(model=flux.__wrapped__())
    compiled.transformer.compile()
    with pytest.raises(NotImplementedError, match="expected one that is not compiled in place"):
        CharaConsist(compiled).__enter__()


def test_blocks_out_of_order_are_refused():
    pipe = pipeline()
    with pytest.raises(ValueError, match="keep: expected a block within `with CharaConsist"):
        CharaConsist(pipe, **SETTINGS).keep(WORDS).__enter__()
    with CharaConsist(pipe, **SETTINGS) as chara:
        with pytest.raises(ValueError, match="keep: expected a run of the identity image first"), chara.search(WORDS):
            pass
        with pytest.raises(ValueError, match="search: expected a block of its own, got one within keep"):
            with chara.keep(WORDS):
                chara.identity_mask = FOREGROUND[None]
                with chara.search(WORDS):
                    pass
        with chara.keep(WORDS):
            call(pipe, IDENTITY)
        with pytest.raises(ValueError, match=r"points: expected those of search\(\), or points"), chara.read(WORDS):
            pass
        with chara.search(WORDS):
            call(pipe, IDENTITY)
        with chara.read(WORDS):
            call(pipe, IDENTITY)
        with pytest.raises(ValueError, match=r"points: expected those of search\(\), or points"), chara.read(WORDS):
            pass  # of another frame
        with pytest.raises(ValueError, match="point_step: expected a run that reaches step 2, got none"):
            with chara.search(WORDS):
                pass
    assert torch.equal(call(pipe, IDENTITY), call(pipeline(), IDENTITY))


@pytest.mark.fault(number=16)
def test_what_a_layer_lacks_is_refused_not_dropped():
    model = with_processors(torch.float32, CharaConsistFluxAttnProcessor)
    attn = joint_attention_layers(model)[ALL_LAYERS[0]]
    processor, x = attn.processor, torch.randn(1, 4, HEADS * DIM)
    processor.prepare(Task(4))
    with pytest.raises(NotImplementedError, match="attention_mask: expected None"):
        processor(attn, x, x, attention_mask=torch.ones(1, 1, 8, 8))
    with pytest.raises(NotImplementedError, match="ip_hidden_states: expected None"):
        processor(attn, x, x, ip_hidden_states=[x])
    processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match="_parallel_config: expected None"):
        processor(attn, x, x)
    pipe = pipeline(model=model)
    with pytest.raises(NotImplementedError, match="expected a stock attention processor"):
        CharaConsist(pipe).__enter__()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_tokens": -1}, ValueError, "text_tokens: expected an integer of at least 0, got -1"),
        ({"foreground": FOREGROUND}, ValueError, r"foreground: expected a tensor of shape \(rows, tokens\), got"),
        (
            {"foreground": FOREGROUND[None].float()},
            TypeError,
            "foreground: expected a tensor of bools, got torch.float32",
        ),
        ({"points": (1, 2)}, TypeError, "points: expected Points from match_points, or None, got tuple"),
        ({"foreground": FOREGROUND[None]}, ValueError, r"points.matched: expected shape \(1, 36\), got \(2, 36\)"),
        (
            {"identity_background": FOREGROUND[None, :9]},
            ValueError,
            r"identity_background: expected shape \(1, 36\) or ",
        ),
    ],
)
def test_routings_that_do_not_fit_are_refused(changes, error, message):
    foreground, identity_foreground, points = of_frames()
    given = {
        "text_tokens": TEXT,
        "foreground": foreground,
        "points": points,
        "identity_background": ~identity_foreground,
    }
    with pytest.raises(error, match="lr_kernels.route_frame: " + message):
        route_frame(**given | changes)


def test_tokens_of_another_routing_are_refused():
    routing = route_frame(TEXT - 1, *of_frames()[::2])
    for apart in (True, False):
        text, image, identity = of_layer(apart)
        with pytest.raises(ValueError, match=r"chara_consist_attention: routing: expected a routing of 2 rows and "):
            chara_consist_attention(text, image, identity, routing, rotary())


def test_features_that_do_not_fit_are_refused():
    x, everywhere = randn(1, N, 8), FOREGROUND[None]
    with pytest.raises(
        ValueError, match="match_points: identity: expected features of 1 layers, as the frames', got 0"
    ):
        match_points([x], [], everywhere, everywhere)
    with pytest.raises(ValueError, match=r"match_points: features: expected tensors \(B, N, C\) of one layer at le"):
        match_points([], [], everywhere, everywhere)
    with pytest.raises(ValueError, match=r"match_points: features\[1\]: expected torch.float32 of shape"):
        match_points([x, x[:, :9]], [x, x], everywhere, everywhere)
    with pytest.raises(ValueError, match=r"match_points: identity_foreground: expected shape \(1, 36\), got \(1, 9\)"):
        match_points([x], [x], everywhere, everywhere[:, :9])
    with pytest.raises(ValueError, match="correspondence: reference: expected shape"):
        match_points([x], [x[..., :4]], everywhere, everywhere)


def test_the_words_of_a_prompt_are_counted():
    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "beach": 3, "cat": 4, "runs": 5, "be": 6}, "<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    assert prompt_words(tokenizer, "a beach", "a beach a cat runs") == (2, 5)
    with pytest.raises(ValueError, match="prompt_words: prompt: expected one that begins with 'a cat', got 'a beach"):
        prompt_words(tokenizer, "a cat", "a beach a cat")
    with pytest.raises(
        ValueError, match="prompt_words: prompt: expected words of the foreground after those of the ba"
    ):
        prompt_words(tokenizer, "a beach", "a beach ")
    with pytest.raises(ValueError, match="prompt_words: background: expected words that end where one of 'a beach a"):
        prompt_words(tokenizer, "a be", "a beach a cat runs")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 2.0}, "weight: expected a number from 0 to 1, got 2.0"),
        ({"weight": "a"}, "weight: expected a number"),
        ({"start": -1}, "start: expected an integer of at least 0"),
        ({"start": 12}, "decay: expected an integer of at least 12, got 11"),
        ({"end": 11}, "end: expected an integer of at least 12, got 11"),
    ],
)
def test_merge_weights_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=f"merge_weights: {message}"):
        merge_weights(**given)


def test_processors_that_were_replaced_are_refused_by_name():
    pipe = pipeline()
    with pytest.warns(RuntimeWarning, match="were replaced"), CharaConsist(pipe, **SETTINGS) as chara:
        with chara.keep(WORDS):
            call(pipe, IDENTITY)
        pipe.transformer.set_attn_processor(FluxAttnProcessor())
        with pytest.raises(ValueError, match="pipe: expected the processors that the block installed, got FluxAttn"):
            with chara.search(FRAME_WORDS):
                call(pipe, FRAMES)
