"""The switches that the stock pipelines have for `unet` and `text_encoder`, applied to both models."""

from collections.abc import Iterable

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...runtime.checks import fail
from .settings import OP


class Switches(DiffusionPipeline):
    """Methods of the stock pipelines that would reach the vanilla model alone. FreeU, fused projections and textual
    inversions of the personalized model alone are set on `personalized_unet` or `personalized_text_encoder`."""

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (arXiv 2309.11497) in both UNets."""
        super().enable_freeu(s1, s2, b1, b2)
        for unet in self._other_unets():
            unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        """No FreeU in both UNets."""
        super().disable_freeu()
        for unet in self._other_unets():
            unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Fused projections in both UNets, and in the VAE. A call that shares attention refuses them by name."""
        super().fuse_qkv_projections(unet, vae)
        for other in self._other_unets() if unet else ():
            other.fuse_qkv_projections()
            other.set_attn_processor(FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Separate projections again, in both UNets and in the VAE."""
        fused = getattr(self, "fusing_unet", False)
        super().unfuse_qkv_projections(unet, vae)
        for other in self._other_unets() if unet and fused else ():
            other.unfuse_qkv_projections()

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: object,
        token: str | list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        """Load embeddings into a text encoder, and into that of the other model that shares its tokenizer.

        Raises:
            ValueError: the other encoder's embeddings are of another width; nothing is loaded.
        """
        text_encoder = self.text_encoder if text_encoder is None else text_encoder
        partners = self._partners(text_encoder)
        for name, partner in partners.items():
            expected, got = (x.get_input_embeddings().embedding_dim for x in (text_encoder, partner))
            if expected != got:
                fail(OP, name, f"embeddings of {expected} channels, as the other model's encoder", got)
        before = {name: partner.get_input_embeddings().num_embeddings for name, partner in partners.items()}
        super().load_textual_inversion(pretrained_model_name_or_path, token, tokenizer, text_encoder, **kwargs)
        table = text_encoder.get_input_embeddings().weight.data
        for name, partner in partners.items():
            partner.resize_token_embeddings(len(table), mean_resizing=False)
            own = partner.get_input_embeddings().weight.data
            own[before[name] :] = table[before[name] :].to(own)

    def unload_textual_inversion(
        self,
        tokens: str | list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
    ) -> None:
        """Remove embeddings from a text encoder, and from that of the other model that shares its tokenizer."""
        text_encoder = self.text_encoder if text_encoder is None else text_encoder
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        ids = {x.content: i for i, x in tokenizer.added_tokens_decoder.items() if not x.special}
        wanted = ids if not tokens else [tokens] if isinstance(tokens, str) else tokens
        removed = {ids[token] for token in wanted if token in ids}
        super().unload_textual_inversion(tokens, tokenizer, text_encoder)
        for partner in self._partners(text_encoder).values():
            table = partner.get_input_embeddings().weight.data
            kept = torch.tensor([i for i in range(len(table)) if i not in removed], device=table.device)
            embeddings = nn.Embedding(len(kept), table.shape[1], device=table.device, dtype=table.dtype)
            embeddings.weight.data = table[kept]
            partner.set_input_embeddings(embeddings)

    def _other_unets(self) -> Iterable[UNet2DConditionModel]:
        return () if self.personalized_unet is None else (self.personalized_unet,)

    def _partners(self, text_encoder: PreTrainedModel) -> dict[str, PreTrainedModel]:
        """By name: the text encoder of the other model that reads the same tokenizer's tokens."""
        pairs = zip(self.readers(personal=False), self.readers(personal=True))
        found = {}
        for vanilla, personal in pairs:
            if vanilla.encoder is personal.encoder:
                continue
            if text_encoder is vanilla.encoder:
                found[personal.name] = personal.encoder
            elif text_encoder is personal.encoder:
                found[vanilla.name] = vanilla.encoder
        return found
