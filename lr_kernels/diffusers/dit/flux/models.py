"""A Flux pipeline with a personalized model beside the vanilla one: another transformer, or its own with LoRAs on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from ....runtime.checks import fail
from ...pipelines.adapters import adapters_off, check_free
from .settings import OP


class PersonalizedFluxPipeline(FluxPipeline):
    """`FluxPipeline` with, besides its own components,

        personalized_transformer: the transformer after personalization. None: `transformer` itself, whose LoRAs, with
            those of the text encoders, then are the personalization: the vanilla model is the same one with them off.
            Without LoRAs (textual inversion) the models differ in their prompts only.
        personalized_adapters: names of the LoRAs that the vanilla model does not have. None: all.

    The LoRAs must not be fused.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->transformer->personalized_transformer->vae"
    _optional_components = [*FluxPipeline._optional_components, "personalized_transformer"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        personalized_transformer: FluxTransformer2DModel | None = None,
        personalized_adapters: list[str] | None = None,
    ):
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self.register_modules(personalized_transformer=personalized_transformer)
        if personalized_adapters is not None and personalized_transformer is not None:
            fail(OP, "personalized_adapters", "None, since personalized_transformer is given", personalized_adapters)
        names = [personalized_adapters] if isinstance(personalized_adapters, str) else personalized_adapters
        self.register_to_config(personalized_adapters=None if names is None else list(names))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "PersonalizedFluxPipeline":
        """Build the pipeline from the components of another one: `from_pipe(pipe, personalized_transformer=…)`.

        The components keep their dtype unless another one is given (diffusers casts them to float32). ValueError where
        they have several and none is given; TypeError for a personalized_transformer that is none.
        """
        personalized = kwargs.get("personalized_transformer")
        if personalized is not None and not isinstance(personalized, nn.Module):
            op, got = f"{cls.__name__}.from_pipe", type(personalized).__name__
            fail(op, "personalized_transformer", "a FluxTransformer2DModel or None", got, error=TypeError)
        expected, _ = cls._get_signature_keys(cls)
        # those of other classes than the signature says, as tiny autoencoders, would be left out
        kwargs = {name: x for name, x in pipeline.components.items() if name in expected} | kwargs
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            dtypes = {name: kwargs[name].dtype for name in sorted(expected) if isinstance(kwargs.get(name), nn.Module)}
            if len(set(dtypes.values())) > 1:
                got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
                hint = "pass dtype=, which casts them all, or the components to the class, which casts none"
                fail(f"{cls.__name__}.from_pipe", "dtype", "a dtype, since the components have several", got, hint)
            kwargs["dtype"] = next(iter(dtypes.values()), None)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def personal_transformer(self) -> FluxTransformer2DModel:
        """The transformer for prompts with the subject."""
        return self.transformer if self.personalized_transformer is None else self.personalized_transformer

    @contextmanager
    def as_vanilla(self) -> Iterator[None]:
        """While it lasts, `transformer` and the text encoders are the vanilla model.

        Raises:
            ValueError: a name of personalized_adapters that is not active, fused LoRAs. RuntimeError: another call has
            them off.
        """
        if self.personalized_transformer is not None:
            yield
            return
        names = self.config.personalized_adapters
        with adapters_off(OP, self._adapted(), names, argument="personalized_adapters", model="transformer"):
            yield

    def check_adapters(self, *, lays_out: bool) -> None:
        """Raise what `as_vanilla` would, where the layout stage needs it; RuntimeError while another call has the
        models' LoRAs off."""
        check_free(OP, [self.personal_transformer, *self._adapted()], "transformer")
        if lays_out:
            with self.as_vanilla():
                pass

    def _adapted(self) -> list[nn.Module]:
        """The models whose LoRAs may be the personalization."""
        return [x for x in (self.transformer, self.text_encoder, self.text_encoder_2) if x is not None]


def check_models(pipe: PersonalizedFluxPipeline) -> None:
    """NotImplementedError, ValueError for transformers of another kind, or that do not fit each other or the VAE."""
    for name in ("latent_channels", "scaling_factor", "shift_factor"):
        if getattr(getattr(pipe.vae, "config", None), name, None) is None:
            fail(OP, "vae", f"an autoencoder whose config has {name}", type(pipe.vae).__name__)
    channels = 4 * pipe.vae.config.latent_channels
    for name in ("transformer", "personalized_transformer"):
        model = getattr(pipe, name)
        if model is None:
            continue
        kind = type(getattr(model, "_orig_mod", model))  # torch.compile wraps the module
        if not issubclass(kind, FluxTransformer2DModel):
            fail(OP, name, "a FluxTransformer2DModel", kind.__name__, error=NotImplementedError)
        if model.config.in_channels != channels:
            hint = "models that also read a picture or a mask have more"
            got = model.config.in_channels
            fail(OP, f"{name}.in_channels", f"{channels}, 4 of the VAE's each", got, hint, NotImplementedError)
        for width in ("joint_attention_dim", "pooled_projection_dim"):
            expected, got = pipe.transformer.config[width], model.config[width]
            if got != expected:
                fail(OP, f"{name}.{width}", f"{expected}, as the transformer has", got)
