"""CharaConsist in Flux: its attention and a whole run of identity image, search and frames against transcriptions with
concatenated keys, dense masks and the matrix of all similarities; what stays stock; and what users can do wrong."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from model_changes import add_lora
from plain_chara_consist import (
    ALL_LAYERS,
    DIM,
    FRAME_WORDS,
    FRAMES,
    GRID,
    HEADS,
    IDENTITY,
    POINT,
    SETTINGS,
    STEPS,
    TEXT,
    WORDS,
    B,
    M,
    N,
    call,
    flux,
    of_frames,
    of_layer,
    pipeline,
    plain,
    plain_clean,
    plain_reading,
    plain_share,
    predict,
    randn,
    rotary,
    turned,
    with_processors,
    words_of,
)

from lr_kernels.diffusers.dit.chara_consist import attention as chara_consist_attention
from lr_kernels.diffusers.dit.chara_consist.attention import (
    Points,
    foreground_of,
    foreground_share,
    match_points,
    merge_points,
    route_frame,
)
from lr_kernels.diffusers.dit.chara_consist.attention import (
    chara_consist_attention as attend,
)
from lr_kernels.diffusers.dit.chara_consist.driver import CharaConsist, merge_weights
from lr_kernels.diffusers.dit.chara_consist.processor import CharaConsistFluxAttnProcessor, Kept, Task
from lr_kernels.diffusers.processors.joint import CustomFluxAttnProcessor, Tokens, joint_attention_layers
from lr_kernels.testing import assert_matches


def ours(background=True, layers=None, pipe=None):
    """Images of the identity and of two frames; the identity's mask, the frames' masks and points."""
    pipe = pipeline() if pipe is None else pipe
    with CharaConsist(pipe, background=background, layers=layers, **SETTINGS) as chara:
        with chara.keep(WORDS):
            images = [call(pipe, IDENTITY)]
        with chara.search(FRAME_WORDS):
            call(pipe, FRAMES)
        with chara.read(FRAME_WORDS):
            images.append(call(pipe, FRAMES))
            found = chara.identity_mask, chara.mask, chara.points
    return torch.cat(images), found


@pytest.mark.parametrize("layers", [None, ALL_LAYERS], ids=["single", "double-too"])
@pytest.mark.parametrize("background", [True, False])
def test_a_run_matches_a_transcription(background, layers):
    """Identity image, search and frames by FluxPipeline, two frames at once, with masks made of words."""
    found, (identity, masks, points) = ours(background, layers)
    assert_matches(found, *(plain(dtype, background, layers) for dtype in (torch.float32, torch.float64)))
    assert (found[1:] - call(pipeline(), FRAMES)).abs().mean((1, 2)).min() > 1e-3  # reading changes both frames
    for mask in (identity[0], *masks, *(points.matched | ~masks)):
        assert mask.any() and not mask.all()  # of both kinds, and foreground without a match


# The attention of one layer


def plain_layer(apart, reads, rows, tokens, dtype, rounded=None):
    text, image, (key, value) = of_layer(apart, rows, tokens, dtype, rounded)
    foreground, identity_foreground, points = of_frames(tokens)
    joined = image[:3] if text is None else [torch.cat(x, 1) for x in zip(text[:3], image[:3])]
    out = []
    for row in range(B):
        here = points.matched[row].nonzero()[:, 0]
        pairs = (here, points.token[row, here]) if reads[0] else None
        kept = [x[row if rows > 1 else 0] for x in (key, value)]
        background = ~identity_foreground[0] if reads[1] else None
        out.append(plain_reading(*(x[row] for x in joined), kept, foreground[row], pairs, background, rotary()))
    return torch.stack(out)


def our_layer(apart, reads, rows=1, tokens=N, dtype=torch.float32):
    foreground, identity_foreground, points = of_frames(tokens)
    routing = route_frame(TEXT, foreground, points if reads[0] else None, ~identity_foreground if reads[1] else None)
    text, image, identity = of_layer(apart, rows, tokens, dtype)
    of_text, of_image = attend(text, image, identity, routing, rotary())
    return of_image if of_text is None else torch.cat([of_text, of_image], 1)


@pytest.mark.parametrize("apart", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("reads", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.fault(number=1)
def test_a_layer_matches_concatenated_keys_and_a_dense_mask(apart, reads, rows):
    found = our_layer(apart, reads, rows)
    assert_matches(found, *(plain_layer(apart, reads, rows, N, dtype) for dtype in (torch.float32, torch.float64)))


@pytest.mark.parametrize("apart", [True, False], ids=["double", "single"])
def test_the_foreground_of_an_identity_image_of_another_size_is_read(apart):
    reads = (True, False)
    expected = (plain_layer(apart, reads, 1, M, dtype) for dtype in (torch.float32, torch.float64))
    assert_matches(our_layer(apart, reads, 1, M), *expected)


def test_bf16_is_computed():
    expected = plain_layer(False, (True, True), 1, N, torch.float64, torch.bfloat16)
    low = plain_layer(False, (True, True), 1, N, torch.bfloat16)
    assert_matches(our_layer(False, (True, True), dtype=torch.bfloat16), low, expected)


@pytest.mark.fault(number=32)
def test_text_and_background_do_not_see_the_identitys_foreground():
    """Bit for bit the same whatever the identity is."""
    foreground, _, points = of_frames()
    routing = route_frame(TEXT, foreground, points)
    text, image, identity = of_layer(True)
    found, other = (
        attend(text, image, tuple(x * factor for x in identity), routing, rotary()) for factor in (1, torch.nan)
    )
    assert torch.equal(found[0], other[0]) and torch.equal(found[1][~foreground], other[1][~foreground])
    assert other[1][foreground].isnan().all()


def test_a_key_is_read_where_it_is_placed():
    """Equal logits, whatever the places: a key at the query's own position has the logit of both before RoPE."""
    query, key = randn(1, N, HEADS, DIM), randn(1, 1, HEADS, DIM, seed=1)
    tokens = Tokens(
        torch.stack([turned(query[0], rotary())]), torch.full_like(query, -torch.inf), torch.zeros_like(query)
    )
    points = Points(torch.zeros(1, N, dtype=torch.int64), torch.ones(1, N), torch.eye(N, dtype=torch.bool)[:1])
    logits = []
    for place in (0, 5, N - 1):
        matched = torch.zeros(1, N, dtype=torch.bool)
        matched[0, place] = True
        routing = route_frame(0, torch.ones(1, N, dtype=torch.bool), points._replace(matched=matched))
        value = torch.ones(1, 1, HEADS, DIM)
        own = tokens._replace(key=torch.zeros_like(query))  # N own keys of logit 0 and of value 0
        _, out = attend(None, own, (key, value), routing, rotary())
        share = out[0, place, :, 0]  # exp(logit) / (exp(logit) + N)
        logits.append((share / (1 - share)).log() + math.log(N))
        expected = (query[0, place] * key[0, 0]).sum(-1) / math.sqrt(DIM)
        torch.testing.assert_close(logits[-1], expected, atol=1e-5, rtol=1e-5)


def doubled(text, image):
    """Joint attention in which the image's queries see the image's keys twice: their logits are larger by log 2."""
    start = 0 if text is not None else TEXT
    query, key, value = image[:3] if text is None else tuple(torch.cat(x, 1) for x in zip(text[:3], image[:3]))
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(DIM)
    logits[:, :, TEXT:, TEXT:] += math.log(2)
    out = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value)
    return (None, out) if start else (out[:, :TEXT], out[:, TEXT:])


def kept_by(model, rows=1):
    """Processors of a model that has run once and kept all."""
    for layer in joint_attention_layers(model).values():
        layer.processor.prepare(Task(TEXT, keeps_keys=True, keeps_out=True))
    out = predict(model, rows=rows)
    return out, {name: layer.processor for name, layer in joint_attention_layers(model).items()}


@pytest.mark.parametrize("kind", ["points", "background"])
def test_keys_before_rope_at_their_own_places_are_the_models(kind):
    """An image that reads itself, each token where it lies, sees every key of its own twice, in all blocks."""
    everywhere = torch.ones(1, N, dtype=torch.bool)
    points = Points(torch.arange(N)[None], torch.ones(1, N), everywhere)
    routing = (
        route_frame(TEXT, everywhere, points) if kind == "points" else route_frame(TEXT, ~everywhere, None, everywhere)
    )

    class ReadsItself(CharaConsistFluxAttnProcessor):
        def attend_rotated(self, text, image, rotary):
            start = 0 if text is not None else TEXT
            self.task = Task(TEXT, routing=routing, identity=Kept(image.key[:, start:], image.value[:, start:], None))
            return super().attend_rotated(text, image, rotary)

    model = with_processors(torch.float32, ReadsItself)
    for layer in joint_attention_layers(model).values():
        layer.processor.prepare(Task(TEXT))
    expected = [
        predict(with_processors(dtype, lambda: CustomFluxAttnProcessor(doubled)), dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    assert_matches(predict(model), *expected)
    assert not torch.allclose(expected[0], predict(flux()), atol=1e-3)


# Points, merging, masks


@pytest.mark.parametrize("rows", [1, B])
def test_points_are_the_argmax_of_the_mean_similarity(rows):
    features, identity = [randn(B, N, 8, seed=i) for i in range(3)], [randn(rows, M, 8, seed=i) for i in range(3, 6)]
    foreground, identity_foreground, _ = of_frames(M)
    found = match_points(features, identity, foreground, identity_foreground, 0.4)
    cosines = [torch.cosine_similarity(a[:, :, None], b[:, None], dim=-1) for a, b in zip(features, identity)]
    best, token = torch.stack(cosines).mean(0).max(2)
    matched = foreground & identity_foreground[0][token] & (best > 0.4)
    assert torch.equal(found.token, token) and torch.equal(found.matched, matched)
    assert matched.any() and not torch.equal(matched, foreground)
    torch.testing.assert_close(found.similarity, best)


def test_features_of_many_sizes_count_alike_and_nan_matches_nothing():
    features, identity = [randn(1, N, 8, seed=i) for i in range(2)], [randn(1, N, 8, seed=i) for i in range(2, 4)]
    everywhere = torch.ones(1, N, dtype=torch.bool)
    found = match_points(features, identity, everywhere, everywhere, 0.0)
    scaled = [x * factor for x, factor in zip(features, (1e-3, 1e4))]
    assert torch.equal(match_points(scaled, identity, everywhere, everywhere, 0.0).token, found.token)
    scaled[1][0, 3] = torch.nan
    broken = match_points(scaled, identity, everywhere, everywhere, 0.0)
    assert found.matched[0, 3] and not broken.matched[0, 3]
    assert torch.equal(broken.matched.sum(), found.matched.sum() - 1)


def test_outputs_of_matched_tokens_are_merged_and_no_others():
    _, _, points = of_frames()
    out, identity = randn(B, N, 8), randn(1, N, 8, seed=1)
    found = merge_points(out, identity, points, torch.tensor(0.8))

    def merged(dtype):
        share = (0.8 * points.similarity.to(dtype))[..., None]
        return torch.where(
            points.matched[..., None], (1 - share) * out.to(dtype) + share * identity[0][points.token].to(dtype), out
        )

    assert_matches(found, merged(torch.float32), merged(torch.float64))
    assert torch.equal(found[~points.matched], out[~points.matched])


@pytest.mark.parametrize("width", [1.0, 30.0])
def test_the_share_of_the_foregrounds_words_is_the_softmax_over_words(width):
    """Also where logits are far apart."""
    query, key = randn(B, N, HEADS, DIM) * width, randn(B, TEXT, HEADS, DIM, seed=1)
    pairs = [(2, 6), (3, 7)]

    def share(dtype):
        rows = [plain_share(q, k, w)[1] * (w[1] - w[0]) for q, k, w in zip(query.to(dtype), key.to(dtype), pairs)]
        return torch.stack(rows) / HEADS

    found = foreground_share(query, (key, key), words_of(*pairs))
    assert_matches(found, share(torch.float32), share(torch.float64))


def test_a_foreground_is_opened_and_grows():
    share = torch.full((1, 9, 8), 0.2)
    share[0, 0:4, 0:3] = share[0, 5:8, 4:7] = 0.9  # at the border, and inside
    share[0, 2, 6] = 0.9  # alone
    share[0, 5:8, 4:7] = 0.6
    words = words_of((2, 5))  # two words of the background and three of the foreground: from 0.6 on
    found = foreground_of(share.flatten(1), words, (9, 8))
    expected = plain_clean(share[0] > 0.5)
    assert torch.equal(found.unflatten(1, (9, 8))[0], expected) and expected.any() and not expected.all()
    assert not foreground_of(share.flatten(1), words_of((1, 5)), (9, 8)).unflatten(1, (9, 8))[0, 5:8, 5:].any()


def test_the_weights_of_merging_are_the_papers():
    found = merge_weights()
    assert len(found) == 31 and found[0] == 0 and found[1:12] == [0.8] * 11
    assert found[21] == pytest.approx(0.4) and 0 < found[30] < 0.01


# What stays stock


def test_without_reading_pictures_are_stock_bit_for_bit():
    """Outside the blocks, in `keep`, in the search without background, and when all is over."""
    stock, pipe = call(pipeline(), IDENTITY), pipeline()
    before = pipe.transformer.attn_processors
    steps = []
    with CharaConsist(pipe, background=False, **SETTINGS) as chara:
        assert torch.equal(call(pipe, IDENTITY), stock)
        with chara.keep(WORDS):
            assert torch.equal(call(pipe, IDENTITY), stock)
        assert torch.equal(call(pipe, IDENTITY), stock)

        def note(pipe, step, t, given):
            steps.append((step, given["latents"]))
            return {}

        with chara.search(WORDS):
            call(pipe, IDENTITY, callback_on_step_end=note)
        searched = dict(steps)
        steps.clear()
        assert torch.equal(call(pipe, IDENTITY, callback_on_step_end=note), stock)
        assert list(searched) == list(range(POINT + 1)) and len(steps) == STEPS
        assert all(torch.equal(searched[step], dict(steps)[step]) for step in searched)
    assert pipe.transformer.attn_processors == before and torch.equal(call(pipe, IDENTITY), stock)


def test_a_processor_without_a_task_is_stock_bit_for_bit():
    assert torch.equal(predict(with_processors(torch.float32, CharaConsistFluxAttnProcessor)), predict(flux()))
    out, processors = kept_by(with_processors(torch.float32, CharaConsistFluxAttnProcessor))
    assert torch.equal(out, predict(flux()))
    for processor in processors.values():
        assert [x.shape for x in processor.kept] == [(1, N, HEADS, DIM)] * 2 + [(1, N, HEADS * DIM)]
    assert isinstance(CharaConsistFluxAttnProcessor(), FluxAttnProcessor)
    assert not isinstance(CharaConsistFluxAttnProcessor(), torch.nn.Module)


def test_an_error_in_the_pipeline_leaves_the_model_stock():
    pipe, stock = pipeline(), call(pipeline(), FRAMES)

    def stop(pipe, step, t, given):
        if step == POINT:
            raise KeyError
        return {}

    with CharaConsist(pipe, **SETTINGS) as chara:
        with chara.keep(WORDS):
            call(pipe, IDENTITY)
        with chara.search(FRAME_WORDS):
            call(pipe, FRAMES)
        with pytest.raises(KeyError), chara.read(FRAME_WORDS):
            call(pipe, FRAMES, callback_on_step_end=stop)
        assert torch.equal(call(pipe, FRAMES), stock)
    with pytest.raises(KeyError), CharaConsist(pipe, **SETTINGS) as chara, chara.keep(WORDS):
        call(pipe, IDENTITY, callback_on_step_end=stop)
    assert torch.equal(call(pipe, FRAMES), stock)


# The driver


def test_masks_and_points_may_be_given():
    """The same masks and points by hand make the frames of the search that found them."""
    pipe = pipeline()
    masks = [torch.zeros(GRID, dtype=torch.bool) for _ in range(3)]
    for i, mask in enumerate(masks):
        mask[i : i + 4, i : i + 3] = True
    frames = torch.stack(masks[1:]).flatten(1)
    with CharaConsist(pipe, **SETTINGS) as chara:
        with chara.keep(foreground=masks[0].flatten()):
            call(pipe, IDENTITY)
        assert torch.equal(chara.identity_mask[0], masks[0].flatten())
        with chara.search(foreground=frames):
            call(pipe, FRAMES)
        points = chara.points
        assert points.matched.any(1).all() and not (points.matched & ~frames).any()
        with chara.read(foreground=frames):
            found = call(pipe, FRAMES)
        chara.points = points
        with chara.read(foreground=frames):
            assert torch.equal(call(pipe, FRAMES), found)
        chara.points = points._replace(matched=torch.zeros_like(points.matched))
        with chara.read(foreground=frames):
            assert not torch.allclose(call(pipe, FRAMES), found, atol=1e-3)


@pytest.mark.fault(number=22)
def test_plans_are_built_when_masks_change_not_in_layers(monkeypatch):
    built, plan_attention = [], chara_consist_attention.plan_attention
    monkeypatch.setattr(
        chara_consist_attention, "plan_attention", lambda *a, **k: built.append(a) or plan_attention(*a, **k)
    )
    monkeypatch.setattr("lr_kernels.attention.prepare.build_plan", lambda *a: pytest.fail("a layer built a plan"))
    pipe = pipeline()
    mask = torch.zeros(GRID, dtype=torch.bool)
    mask[1:4, 1:4] = True
    with CharaConsist(pipe, layers=ALL_LAYERS, **SETTINGS) as chara:
        with chara.keep(foreground=mask.flatten()):
            call(pipe, IDENTITY)
        with chara.search(foreground=mask.flatten()):
            call(pipe, FRAMES)
        assert len(built) == 1  # the background, for all layers and steps
        with chara.read(foreground=mask.flatten()):
            call(pipe, FRAMES)
    assert (
        len(built) == 1 + 2 * 2
    )  # layers with and without the foreground, before and after the points are found again


def test_what_is_kept_and_how_many_bytes_it_takes():
    key = out = N * HEADS * DIM * 4
    for background, layers in ((True, 3), (False, 2)):
        pipe = pipeline()
        with CharaConsist(pipe, background=background, **SETTINGS) as chara:
            with chara.keep(WORDS):
                call(pipe, IDENTITY)
            outputs = 2 * 3 + 1  # two layers merge in three steps; one more at the point step
            assert chara.nbytes == 2 * key * layers * 3 + out * outputs
            assert sorted(step for step, kept in chara.kept.items() if kept) == [1, 2, 3]


def test_a_lora_is_computed():
    models = [flux.__wrapped__() for _ in range(2)]
    for model in models:
        add_lora(model)
    models[1].fuse_lora()
    found, fused = (ours(pipe=pipeline(model=model))[0] for model in models)
    torch.testing.assert_close(found, fused, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, ours()[0], atol=1e-2)


@pytest.mark.parametrize("phase", ["keep", "read"])
@pytest.mark.fault(number=29)
def test_it_compiles_whole(phase):
    model = with_processors(torch.float32, CharaConsistFluxAttnProcessor, singles=1)
    _, processors = kept_by(model)
    kept = {name: x.kept for name, x in processors.items()}
    foreground, identity_foreground, points = of_frames()
    words = words_of((2, 6), (3, 7))
    routing = route_frame(TEXT, foreground, points, ~identity_foreground)

    def prepare():
        for name, processor in processors.items():
            task = Task(TEXT, keeps_keys=phase == "keep", keeps_out=True, kept_on=torch.device("cpu"), words=words)
            if phase == "read":
                task = task._replace(routing=routing, identity=kept[name], points=points, merge=torch.tensor(0.5))
            processor.prepare(task)

    prepare()
    expected = predict(model, rows=2)
    of_layers = [(x.share, x.kept.out) for x in processors.values()]
    prepare()
    torch.compiler.reset()
    torch.testing.assert_close(predict(torch.compile(model, fullgraph=True, backend="aot_eager"), rows=2), expected)
    for x, (share, out) in zip(processors.values(), of_layers, strict=True):
        torch.testing.assert_close(x.share, share)
        torch.testing.assert_close(x.kept.out, out)


def test_a_compiled_transformer_is_driven():
    """The wrapper of torch.compile is, here without its compiler: each kind of pass takes seconds."""
    pipe = pipeline(model=flux.__wrapped__())
    pipe.transformer = torch.compile(pipe.transformer)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(ours(pipe=pipe)[0], ours()[0])
