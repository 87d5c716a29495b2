"""The prompts of a call: texts that the text encoders embed, or embeddings that are given."""

from collections.abc import Sequence
from typing import NamedTuple

from diffusers.utils import logging
from torch import Tensor

from ...runtime.checks import fail
from .components import PersonalizedPipeline
from .settings import OP, check_numbers, one_or, refuse
from .stock import StockArguments
from .text import Embeds, tokenized


class Prompts(NamedTuple):
    """The prompts of a call, one per image; text or embeddings of each kind."""

    texts: list[str]
    layout_texts: list[str]
    """empty where there is no layout stage, or where embeddings are given"""
    negatives: list[str | None]
    """None: no text"""
    embeds: Embeds | None = None
    layout_embeds: Embeds | None = None
    negative_embeds: Embeds | None = None

    @property
    def images(self) -> int:
        """As many as there are prompts."""
        return len(self.negatives)

    def embedded(self, pipe: PersonalizedPipeline, *, personal: bool, guided: bool) -> tuple[Embeds | None, Embeds]:
        """(of the negative prompts, None without guidance; of the prompts), as one of the models reads them."""
        given, texts = (self.embeds, self.texts) if personal else (self.layout_embeds, self.layout_texts)
        prompts = pipe.embed(texts, personal=personal, clip_skip=pipe.clip_skip) if given is None else given
        if not guided:
            return None, prompts
        if self.negative_embeds is not None:
            return self.negative_embeds, prompts
        return pipe.embed_negatives(self.negatives, prompts, personal=personal), prompts


def check_texts(pipe: PersonalizedPipeline, argument: str, texts: Sequence[str], *, personal: bool) -> None:
    """Before anything is computed: warn of what the tokenizer cuts off, as the stock pipelines do.

    Raises:
        ValueError: there is no text encoder or tokenizer; a clip_skip beyond its layers; a token that it has no
            embedding for.
    """
    if not texts:
        return
    logger = logging.get_logger(pipe.stock_module)
    for reader in pipe.readers(personal):
        name, tokenizer, encoder = reader
        for component, part in ((name, encoder), ("tokenizer", tokenizer)):
            if part is None:
                hint = "pass the component, or embeddings in place of text where there are such arguments"
                fail(OP, component, f"one, since {argument} is text", None, hint)
        layers = getattr(encoder.config, "num_hidden_layers", None)
        if layers is not None and (pipe.clip_skip or 0) > layers - pipe.pools:  # SDXL leaves one out by itself
            fail(OP, "clip_skip", f"at most {layers - pipe.pools}, since {name} has {layers} layers", pipe.clip_skip)
        ids = tokenized(pipe, tokenizer, texts).input_ids
        whole = tokenizer(pipe.maybe_convert_prompt(list(texts), tokenizer)).input_ids
        length = tokenizer.model_max_length
        removed = tokenizer.batch_decode([x[length - 1 : -1] for x in whole if len(x) > length])
        if removed and argument != "negative_prompt":  # in the words of the stock pipelines, which do not warn of these
            logger.warning(
                "The following part of your input was truncated because CLIP can only handle sequences up to"
                f" {length} tokens: {removed}"
            )
        rows = encoder.get_input_embeddings().num_embeddings
        if (unknown := int(ids.max())) >= rows:
            token = tokenizer.convert_ids_to_tokens(unknown)
            hint = "load it with this pipeline's load_textual_inversion, which both models' text encoders then have"
            fail(OP, name, f"an embedding of {token!r}, which is in {argument}", f"{rows} others", hint)


def read_prompts(
    pipe: PersonalizedPipeline,
    stock: StockArguments,
    prompt: str | Sequence[str] | None,
    layout_prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    copies: int = 1,
    lays_out: bool = True,
    finds_subjects: bool = True,
) -> Prompts:
    """The prompts of a call's arguments, each `copies` times in a row.

    Args:
        lays_out: there is a layout stage. finds_subjects: the texts of `prompt` are needed beside embeddings.
    """
    if stock.prompt_embeds is None or finds_subjects:
        texts = as_list(prompt)
        count = len(texts)
    else:
        refuse("there are prompt_embeds and no subject_tokens to be found in it", prompt=prompt)
        texts, count = [], len(stock.prompt_embeds) if isinstance(stock.prompt_embeds, Tensor) else 0
    layout_texts: list[str] = []
    if not lays_out:
        refuse("there is no layout stage", layout_prompt_embeds=stock.layout_prompt_embeds)
    elif stock.layout_prompt_embeds is None:
        layout_texts = as_list(layout_prompt, count, "layout_prompt")
    else:
        refuse("layout_prompt_embeds is given", layout_prompt=layout_prompt)
    negatives: list[str | None] = [None] * count
    if negative_prompt is not None:
        if stock.negative_prompt_embeds is not None:
            refuse("negative_prompt_embeds is given", negative_prompt=negative_prompt)
        negatives = [*as_list(negative_prompt, count, "negative_prompt")]
    embeds = [_given_embeds(pipe, stock, kind, count, copies) for kind in ("", "layout_", "negative_")]
    return Prompts(
        [x for x in texts for _ in range(copies)],
        [x for x in layout_texts for _ in range(copies)],
        [x for x in negatives for _ in range(copies)],
        *embeds,
    )


def check_prompts(
    pipe: PersonalizedPipeline, prompts: Prompts, references: Sequence[str], *, lays_out: bool, guided: bool
) -> None:
    """Texts as `check_texts`; ValueError where embeddings that go together have other numbers of tokens."""
    personal = [] if prompts.embeds is not None else prompts.texts
    check_texts(pipe, "prompt", personal, personal=True)
    check_texts(pipe, "layout_prompt", prompts.layout_texts, personal=False)
    check_texts(pipe, "reference_prompt", references, personal=True)
    if guided and prompts.negative_embeds is None and not pipe.zeroes(prompts.negatives):
        negatives = [text or "" for text in prompts.negatives]
        check_texts(pipe, "negative_prompt", negatives, personal=True)
        check_texts(pipe, "negative_prompt", negatives if lays_out else [], personal=False)
    lengths = {"prompt_embeds": prompts.embeds, "layout_prompt_embeds": prompts.layout_embeds}
    for name, embeds in lengths.items():
        length = pipe.text_length if embeds is None else embeds.tokens.shape[1]
        if guided and (lays_out or name == "prompt_embeds"):
            negative = pipe.text_length
            if prompts.negative_embeds is not None:
                negative = prompts.negative_embeds.tokens.shape[1]
            if negative != length and not (prompts.negative_embeds is None and pipe.zeroes(prompts.negatives)):
                hint = f"negative prompts have {negative}; pass negative_prompt_embeds of {length}"
                fail(OP, name, "as many tokens as the negative prompts have", length, hint)
        if references and name == "prompt_embeds" and length != pipe.text_length:
            fail(OP, name, f"{pipe.text_length} tokens, as the references' prompts have", length)


def as_list(
    x: str | Sequence[str] | None, count: int | None = None, name: str = "prompt", per: str = "prompts"
) -> list[str]:
    """One string or several -> a list of `count`, one for each of `per`."""
    texts = [x] if isinstance(x, str) else list(x) if isinstance(x, (list, tuple)) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        fail(OP, name, "a string or several", repr(x))
    if count is None or len(texts) == count:
        return texts
    if len(texts) != 1:
        fail(OP, name, f"{one_or(count)} strings, as there are {per}", len(texts))
    return texts * count


def _given_embeds(
    pipe: PersonalizedPipeline, stock: StockArguments, kind: str, prompts: int, copies: int
) -> Embeds | None:
    """The given embeddings of a kind, "", "layout_" or "negative_", or None; ValueError where they do not fit."""
    name, pooled_name = f"{kind}prompt_embeds", f"{kind}pooled_prompt_embeds"
    tokens, pooled = getattr(stock, name), getattr(stock, pooled_name)
    if tokens is None:
        refuse(f"{name} is not given", **{pooled_name: pooled})
        return None
    if pipe.pools and pooled is None:
        fail(OP, pooled_name, f"what belongs to {name}", None)
    for argument, x, dims in ((name, tokens, 3), (pooled_name, pooled, 2)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != dims or len(x) != prompts:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            fail(OP, argument, f"a floating tensor of {dims} dimensions and {prompts} rows, as there are prompts", got)
        check_numbers(argument, x)
    width, unet = pipe.context_widths(personal=kind != "layout_")
    if width is not None and tokens.shape[2] != width:
        fail(OP, name, f"{width} channels, as {unet} takes", tokens.shape[2])
    place = {"device": pipe._execution_device, "dtype": pipe.prompt_dtype}
    tokens = tokens.to(**place).repeat_interleave(copies, 0)
    return Embeds(tokens, None if pooled is None else pooled.to(**place).repeat_interleave(copies, 0))
